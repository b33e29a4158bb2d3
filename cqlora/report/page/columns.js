// Packed columns back into numbers; see columns.py.
async function unpack(column) {
  const packed = Uint8Array.from(atob(column.data), (letter) => letter.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  const shuffled = new Uint8Array(await new Response(stream).arrayBuffer());
  const size = Number(column.type[1]);
  const count = shuffled.length / size;
  const bytes = new Uint8Array(shuffled.length);
  for (let place = 0; place < size; place++) {
    for (let item = 0; item < count; item++) bytes[item * size + place] = shuffled[place * count + item];
  }
  return size === 8 ? new Float64Array(bytes.buffer) : new Float32Array(bytes.buffer);
}

async function unpackCurves(curves) {
  const names = Object.keys(curves?.columns ?? {});
  const columns = await Promise.all(names.map((name) => unpack(curves.columns[name])));
  return Object.fromEntries(names.map((name, place) => [name, columns[place]]));
}

async function unpackPage(page) {
  const runs = page.kind === "run" ? [page.run] : page.runs;
  await Promise.all(runs.map(async (run) => { run.columns = await unpackCurves(run.curves); }));
  return page;
}

// An exponential mean whose first numbers are not drawn to zero.
function smooth(numbers, weight) {
  if (!weight) return numbers;
  let [sum, norm] = [0, 0];
  return numbers.map((number) => {
    if (Number.isNaN(number)) return number;
    [sum, norm] = [sum * weight + (1 - weight) * number, norm * weight + (1 - weight)];
    return sum / norm;
  });
}

// The page of a sweep: table, curves, parallel axes and scatter over the same runs.
const sweepState = { sort: null, filter: "", state: "", brushed: null, chosen: null, measure: "", axis: "step", x: "", y: "", explained: "" };

function showSweep(page) {
  const measures = [...new Set(page.runs.flatMap((run) => Object.keys(run.values)))].sort();
  const settings = [...new Set(page.runs.flatMap((run) => Object.keys(run.overrides)))];
  const varied = page.runs.length < 2 ? settings : settings.filter((key) => new Set(page.runs.map((run) => show(run.overrides[key]))).size > 1);
  const keys = varied.length ? varied : page.differing.slice(0, 8);
  page.runs.forEach((run, place) => { run.number ??= place; run.told = keys.filter((key) => key in run.overrides); });
  pickDefaults(measures);
  const views = { page, measures, keys };
  const parts = [runTable(views), curvesOf(views), parallelOf(views), scatterOf(views), importancesOf(views), differencesOf(views), failuresOf(views)].filter(Boolean);
  currentRedraw = () => parts.forEach((part) => part.redraw?.());
  later(currentRedraw);
  return parts.map((part) => part.element);
}

function pickDefaults(measures) {
  const first = (...names) => names.find((name) => measures.includes(name)) ?? measures[0] ?? "";
  if (!measures.includes(sweepState.measure)) sweepState.measure = first("eval/zh/bits_per_character", "eval/loss", "train/loss");
  if (!measures.includes(sweepState.x)) sweepState.x = first("eval/zh/bits_per_character/gain", "eval/loss/gain", "eval/loss");
  if (!measures.includes(sweepState.y)) sweepState.y = first("eval/en/bits_per_byte/gain", "train/seconds");
  // Best first, as the terminal shows it.
  sweepState.sort ??= measures.includes(sweepState.measure) ? { key: sweepState.measure, down: isGain(sweepState.measure) } : { key: "number", down: false };
  if (!measures.includes(sweepState.explained)) sweepState.explained = sweepState.measure;
}

// The runs that filter, state and brushed axes leave.
function visibleRuns(page) {
  const words = sweepState.filter.toLowerCase();
  return page.runs.filter((run) => {
    const text = `${run.name} ${run.state} ${Object.entries(run.overrides).map(([key, value]) => `${key}=${show(value)}`).join(" ")}`.toLowerCase();
    return text.includes(words) && (!sweepState.state || run.state === sweepState.state) && (!sweepState.brushed || sweepState.brushed.has(run.number));
  });
}

// A run by its number and by those of its overrides that others do not share.
function runTitle(run) {
  const told = run.told.map((key) => `${key.split(".").at(-1)}=${show(run.overrides[key])}`).join(" ");
  return `${run.name}${told ? ` ${told}` : ""}`;
}

const isGain = (measure) => measure.endsWith("/gain") || measure.endsWith("tokens_per_second");

function tableMeasures(measures) {
  const wanted = ["eval/loss", "eval/zh/bits_per_character", "eval/zh/bits_per_character/gain", "eval/en/bits_per_byte", "eval/en/bits_per_byte/gain", "train/loss", "train/seconds", "train/peak_memory_gib"];
  const found = wanted.filter((name) => measures.includes(name));
  return found.length ? found : measures.slice(0, 8);
}

function runTable({ page, measures, keys }) {
  const box = make("div", { class: "scroll high", tabindex: 0 });
  const count = make("span", { role: "status" });
  const columns = [
    { key: "number", title: say("number"), number: true, value: (run) => run.number, cell: (run) => (run.report ? make("a", { href: run.report }, run.name) : run.name) },
    { key: "state", title: say("state"), value: (run) => run.state, cell: (run) => stateBadge(run.state) },
    ...keys.map((key) => ({ key, title: key, value: (run) => run.differing[key] ?? null, cell: (run) => (key in run.differing ? show(run.differing[key]) : "–") })),
    ...tableMeasures(measures).map((key) => ({ key, title: key, number: true, value: (run) => run.values[key] ?? null, cell: (run) => formatNumber(run.values[key], 6) })),
  ];
  const redraw = () => {
    const shown = visibleRuns(page);
    count.textContent = say("shown", shown.length, page.runs.length);
    const table = sortable(columns, shown, {
      look: "measures", sort: sweepState.sort, chosen: (run) => run.number === sweepState.chosen,
      onSort: (key) => { sweepState.sort = { key, down: sweepState.sort.key === key && !sweepState.sort.down }; redraw(); box.querySelector(`th[aria-sort="${sweepState.sort.down ? "descending" : "ascending"}"] button`)?.focus(); },
      onRow: (run) => { sweepState.chosen = sweepState.chosen === run.number ? null : run.number; currentRedraw(); },
    });
    box.replaceChildren(table);
  };
  const states = [...new Set(page.runs.map((run) => run.state))].sort();
  const controls = [
    make("input", { type: "search", value: sweepState.filter, placeholder: say("filter"), "aria-label": say("filter"), oninput: (event) => { sweepState.filter = event.target.value; currentRedraw(); } }),
    choose(say("state"), [["", say("allStates")], ...states.map((state) => [state, say(state)])], sweepState.state, (value) => { sweepState.state = value; currentRedraw(); }),
    make("button", { type: "button", onclick: () => saveFile("runs.csv", "text/csv", toCsv(visibleRuns(page), keys, measures)) }, say("csv")),
    make("button", { type: "button", onclick: () => saveFile("runs.json", "application/json", toJson(visibleRuns(page))) }, say("json")), count,
  ];
  return { element: section(say("runs"), controls, box), redraw };
}

// A cell that a spreadsheet would take for a formula is quoted, as OWASP asks.
function csvCell(value) {
  const text = value === null || value === undefined ? "" : show(value);
  const safe = typeof value === "string" && /^[=+\-@\t\r]/.test(text) ? `'${text}` : text;
  return /[",\n\r]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
}

function toCsv(runs, keys, measures) {
  const head = ["number", "state", ...keys, ...measures, "error"];
  const rows = runs.map((run) => [run.number, run.state, ...keys.map((key) => run.differing[key]), ...measures.map((key) => run.values[key]), run.error]);
  return `\ufeff${[head, ...rows].map((row) => row.map(csvCell).join(",")).join("\r\n")}\r\n`;
}

function toJson(runs) {
  return JSON.stringify(runs.map(({ number, state, overrides, differing, values, error, folder }) => ({ number, state, overrides, differing, values, error, folder })), null, 2);
}

function curvesOf({ page }) {
  const box = make("div", { class: "chart tall" });
  const names = [...new Set(page.runs.flatMap((run) => Object.keys(run.columns)))].filter((name) => !["step", "tokens", "elapsed", "seconds"].includes(name));
  const held = ["bits_per_character", "bits_per_byte", "loss", "perplexity"].flatMap((measure) => [...new Set(page.runs.flatMap((run) => (run.evaluations ?? []).map((one) => `${one.source} (${one.language})`)))].map((source) => `${measure}: ${source}`));
  const options = [...held.map((name) => [`held ${name}`, name.replace(/^\w+/, (measure) => say(measure))]), ...names.map((name) => [`train ${name}`, `${say("trainLoss")}: ${LABELS[language][name] ?? name}`])];
  if (!options.length) return null;
  sweepState.curve = options.some(([value]) => value === sweepState.curve) ? sweepState.curve : options[0][0];
  const redraw = () => {
    const series = visibleRuns(page).map((run) => curveOf(run, sweepState.curve)).filter(Boolean);
    drawLines(box, series, { x: say(sweepState.axis), legend: series.length <= 12, label: say("curves") });
  };
  const controls = [
    choose(say("measure"), options, sweepState.curve, (value) => { sweepState.curve = value; redraw(); }),
    choose(say("axis"), Object.keys(AXES).map((name) => [name, say(name)]), sweepState.axis, (value) => { sweepState.axis = value; redraw(); }),
  ];
  return { element: section(say("curves"), controls, box), redraw };
}

function curveOf(run, curve) {
  const faint = sweepState.chosen !== null && sweepState.chosen !== run.number;
  const look = { name: runTitle(run), faint, width: faint ? 1 : 1.8, colour: PALETTE[run.number % PALETTE.length] };
  if (curve.startsWith("train ")) {
    const y = run.columns[curve.slice(6)];
    return y && { ...look, x: run.columns[AXES[sweepState.axis][0]], y: smooth(Array.from(y), 0.6) };
  }
  const [measure, source] = [curve.slice(5, curve.indexOf(": ")), curve.slice(curve.indexOf(": ") + 2)];
  const one = (run.evaluations ?? []).find((series) => `${series.source} (${series.language})` === source);
  return one && { ...look, x: one[AXES[sweepState.axis][1]], y: one[measure].map((value) => value ?? NaN), dots: true };
}

function parallelOf({ page, keys, measures }) {
  const axes = [...keys.slice(0, 7), ...tableMeasures(measures).slice(0, 4)];
  if (axes.length < 2) return null;
  const box = make("div", { class: "chart tall" });
  const valueOf = (run, key) => (key in run.values ? run.values[key] : run.differing[key]);
  let order = [];
  const redraw = () => {
    order = page.runs.filter((run) => axes.every((key) => valueOf(run, key) !== undefined));
    if (sweepState.brushed && echarts.getInstanceByDom(box)) return;
    dropChart(box);
    const drawnAxes = axes.map((key, dim) => parallelAxis(key, dim, order.map((run) => valueOf(run, key)), keys.includes(key)));
    // To an axis of places a number would be the number of its place.
    const valuesOf = (run) => drawnAxes.map((one, dim) => (one.type === "category" ? show(valueOf(run, axes[dim])) : valueOf(run, axes[dim])));
    const drawn = chart(box, {
      color: PALETTE, parallel: { left: 40, right: 70, top: 64, bottom: 26, parallelAxisDefault: { nameTextStyle: { color: colour("faint"), fontSize: 11 }, axisLabel: { color: colour("ink"), textBorderColor: colour("paper"), textBorderWidth: 3 }, axisLine: { lineStyle: { color: colour("faint") } } } },
      parallelAxis: drawnAxes,
      series: [{ type: "parallel", lineStyle: { width: 2, opacity: 0.6 }, inactiveOpacity: 0.06, data: order.map((run) => ({ value: valuesOf(run), lineStyle: { color: PALETTE[run.number % PALETTE.length] } })) }],
    }, say("parallel"));
    drawn.on("axisareaselected", () => {
      const chosen = drawn.getModel().getSeriesByIndex(0).getRawIndicesByActiveState("active");
      const inactive = drawn.getModel().getSeriesByIndex(0).getRawIndicesByActiveState("inactive");
      sweepState.brushed = inactive.length ? new Set(chosen.map((place) => order[place].number)) : null;
      currentRedraw();
    });
  };
  return { element: section(say("parallel"), null, make("p", { class: "note" }, say("parallelHint")), box), redraw };
}

// A name in lines of about so many characters, which end behind a slash or a dot.
function foldName(key, width) {
  const lines = [];
  for (const part of nameParts(key)) {
    if (lines.length && (lines.at(-1) + part).length <= width) lines[lines.length - 1] += part;
    else lines.push(part);
  }
  return lines.join("\n");
}

const FEW = 8;

// A setting of few values has a place for each, by their size; numbers that span more than a factor of 10 are spread by
// their logarithm.
function parallelAxis(key, dim, values, isSetting) {
  const name = foldName(key, 20);
  const numeric = values.every((value) => typeof value === "number");
  const distinct = [...new Set(values)];
  if (!numeric || (isSetting && distinct.length <= FEW)) {
    return { dim, name, type: "category", boundaryGap: false, data: (numeric ? distinct.sort((one, other) => one - other) : distinct).map(show) };
  }
  const [low, high] = [Math.min(...values), Math.max(...values)];
  return { dim, name, type: low > 0 && high / low > 10 ? "log" : "value", scale: true, min: low === high ? undefined : low, max: low === high ? undefined : high, axisLabel: { color: colour("ink"), formatter: (value) => formatNumber(value, 5) } };
}

function scatterOf({ page, measures, keys }) {
  const box = make("div", { class: "chart tall" });
  const numeric = keys.filter((key) => page.runs.some((run) => typeof run.differing[key] === "number"));
  const options = [...measures, ...numeric].map((name) => [name, name]);
  if (options.length < 2) return null;
  const valueOf = (run, key) => run.values[key] ?? run.differing[key];
  const redraw = () => {
    const [x, y] = [sweepState.x, sweepState.y];
    const runs = visibleRuns(page).filter((run) => Number.isFinite(valueOf(run, x)) && Number.isFinite(valueOf(run, y)));
    const points = runs.map((run) => ({ name: runTitle(run), value: [valueOf(run, x), valueOf(run, y)], itemStyle: { color: PALETTE[run.number % PALETTE.length] }, symbolSize: sweepState.chosen === run.number ? 18 : 11 }));
    const front = paretoFront(points.map((point) => point.value), isGain(x), isGain(y));
    dropChart(box);
    chart(box, {
      tooltip: tooltip({ trigger: "item", formatter: (item) => `${item.name}\n${x}: ${formatNumber(item.value[0])}\n${y}: ${formatNumber(item.value[1])}` }),
      grid: { left: 76, right: 20, top: 20, bottom: 50 }, xAxis: axis(`${x} (${say(isGain(x) ? "higher" : "lower")})`, { type: "value" }), yAxis: axis(`${y} (${say(isGain(y) ? "higher" : "lower")})`, { type: "value", nameGap: 56 }),
      series: [{ type: "scatter", data: points }, { type: "line", name: say("pareto"), data: front, showSymbol: false, lineStyle: { type: "dashed", color: colour("faint") }, tooltip: { show: false } }],
    }, say("scatter"));
  };
  const controls = ["x", "y"].map((side) => choose(say(side), options, sweepState[side], (value) => { sweepState[side] = value; redraw(); }));
  return { element: section(`${say("scatter")} · ${say("pareto")}`, controls, box), redraw };
}

// Points that no other beats in both, by the first number.
function paretoFront(points, higherX, higherY) {
  const better = (one, other, higher) => (higher ? one > other : one < other);
  const beaten = (point) => points.some((other) => !better(point[0], other[0], higherX) && !better(point[1], other[1], higherY) && (better(other[0], point[0], higherX) || better(other[1], point[1], higherY)));
  return points.filter((point) => !beaten(point)).sort((one, other) => one[0] - other[0]);
}

function importancesOf({ page, measures }) {
  if (!measures.length) return null;
  const box = make("div", {});
  const redraw = () => {
    const { runs = 0, shares = {} } = page.importances[sweepState.explained] ?? {};
    const least = 10;
    if (runs < least) { box.replaceChildren(make("p", { class: "note" }, say("tooFew", runs, least))); return; }
    const bars = Object.entries(shares).slice(0, 12).map(([key, share]) => make("div", { class: "bar" }, make("span", {}, key), make("meter", { min: 0, max: 1, value: share, "aria-label": key }), make("span", {}, `${Math.round(share * 100)}%`)));
    box.replaceChildren(make("p", { class: "note" }, say("importanceHint", runs)), ...bars);
  };
  const controls = choose(say("measure"), measures.map((name) => [name, name]), sweepState.explained, (value) => { sweepState.explained = value; redraw(); });
  return { element: section(say("importances"), controls, box), redraw };
}

function differencesOf({ page }) {
  if (!page.differing.length) return null;
  const columns = [
    { key: "number", title: say("number"), number: true, value: (run) => run.number, cell: (run) => run.name },
    ...page.differing.map((key) => ({ key, title: key, text: true, value: (run) => run.differing[key] ?? null, cell: (run) => (key in run.differing ? show(run.differing[key]) : "–") })),
  ];
  const box = make("div", { class: "scroll high", tabindex: 0 });
  return { element: section(say("differing"), null, box), redraw: () => box.replaceChildren(sortable(columns, visibleRuns(page))) };
}

function failuresOf({ page }) {
  const failed = page.runs.filter((run) => run.error);
  if (!failed.length) return null;
  return { element: section(say("failures"), null, failed.map((run) => [make("h3", {}, runTitle(run)), make("p", { class: "error" }, run.error)])) };
}

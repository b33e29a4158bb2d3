// The page of one run.
const runState = { axis: "step", smoothing: 0.6, measure: "relative", changed: true, filter: "" };

function showRun(page) {
  const run = page.run;
  return [
    facts(run), notesOf(run), beforeAfter(run), lossCharts(run), smallCharts(run),
    repliesOf(run), evaluationOf(run), mixOf(run), eventsOf(run), settingsOf(run), commandsOf(run),
  ].filter(Boolean);
}

function facts(run) {
  const values = run.values;
  const steps = run.columns.step?.at(-1);
  const planned = run.planned_gib ? say("planned", `${formatNumber(run.planned_gib, 3)} GiB`) : null;
  const peak = values["train/peak_memory_gib"];
  const rows = [
    [say("state"), stateBadge(run.state), run.modified],
    [say("steps"), formatNumber(steps ?? null)],
    [say("tokens"), formatNumber(values["train/tokens"])],
    [say("time"), formatSeconds(values["train/seconds"])],
    [say("speed"), formatNumber(Math.round(values["train/tokens_per_second"]))],
    [say("memory"), peak === undefined ? "–" : `${formatNumber(peak, 3)} GiB`, planned],
  ];
  return make("dl", { class: "facts" }, rows.map(([name, value, small]) => make("div", {}, make("dt", {}, name), make("dd", {}, value, small ? make("small", {}, small) : null))));
}

function notesOf(run) {
  if (!run.notes?.length) return null;
  return section(say("notes"), null, run.notes.map((note) => make("p", { class: "note" }, note)));
}

function beforeAfter(run) {
  const rows = run.evaluations.filter((series) => series.step.length);
  if (!rows.length) return null;
  const measures = ["bits_per_character", "bits_per_byte", "perplexity", "loss"];
  const head = [say("source"), say("lang"), ...measures.flatMap((name) => [`${say(name)}: ${say("start")}`, say("end"), say("change")])];
  const body = rows.map((series) => make("tr", {}, make("td", {}, series.source), make("td", {}, series.language), measures.flatMap((name) => {
    const [first, last] = [series[name][0], series[name].at(-1)];
    const change = first === null || last === null || series.step.length < 2 ? null : last - first;
    const kind = change === null || change === 0 ? "" : change < 0 ? "good" : "bad";
    const told = change === null ? "–" : `${change > 0 ? "+" : ""}${formatNumber(change, 3)}`;
    return [make("td", { class: "number" }, formatNumber(first)), make("td", { class: "number" }, formatNumber(last)), make("td", { class: `number ${kind}` }, told)];
  })));
  const table = make("table", { class: "measures" }, make("thead", {}, make("tr", {}, head.map((text, place) => make("th", { class: place > 1 ? "number" : "", scope: "col" }, text)))), make("tbody", {}, body));
  return section(`${say("beforeAfter")} · ${say("heldOut")}`, make("span", {}, say("bitsHint")), make("div", { class: "scroll" }, table));
}

// Where training and evaluation lines stand on the chosen axis.
const AXES = { step: ["step", "step"], tokens: ["tokens", "seen"], elapsed: ["elapsed", "elapsed"] };

function axisChoice(redraw) {
  const options = Object.keys(AXES).map((name) => [name, say(name)]);
  return choose(say("axis"), options, runState.axis, (value) => { runState.axis = value; redraw(); });
}

function lossCharts(run) {
  const [train, held] = [make("div", { class: "chart" }), make("div", { class: "chart" })];
  const measures = ["relative", "bits_per_character", "bits_per_byte", "loss", "perplexity"];
  const redraw = () => { drawTraining(run, train); drawHeldOut(run, held); };
  later(redraw);
  const controls = [
    axisChoice(redraw),
    slide(say("smoothing"), runState.smoothing, (value) => { runState.smoothing = value; drawTraining(run, train); }),
    choose(say("measure"), measures.map((name) => [name, say(name)]), runState.measure, (value) => { runState.measure = value; drawHeldOut(run, held); }),
  ];
  const { points, lines } = run.curves;
  const thinned = points < lines ? make("p", { class: "note" }, say("points", formatNumber(points), formatNumber(lines))) : null;
  return section(say("losses"), controls, make("div", { class: "grid" }, train, held), thinned);
}

function drawTraining(run, box) {
  const columns = run.columns;
  const names = Object.keys(columns).filter((name) => name === "loss" || name.startsWith("loss/"));
  const x = columns[AXES[runState.axis][0]] ?? [];
  const series = names.flatMap((name, place) => {
    const title = name === "loss" ? say("trainLossName") : name.slice(5);
    const numbers = Array.from(columns[name]);
    const tint = PALETTE[place % PALETTE.length];
    return [{ name: title, x, y: smooth(numbers, runState.smoothing), colour: tint, width: name === "loss" ? 2.2 : 1.2 }];
  });
  const marks = run.events.map((event) => ({ x: placeOf(run, event.step), name: event.event })).filter((mark) => mark.x !== undefined);
  drawLines(box, series, { x: say(runState.axis), y: say("loss"), marks: marks.slice(0, 30), label: say("losses") });
}

function drawHeldOut(run, box) {
  const series = run.evaluations.map((one, place) => ({
    name: `${one.source} (${one.language})`, x: one[AXES[runState.axis][1]], y: heldOut(one), dots: true, colour: PALETTE[(place + 1) % PALETTE.length],
  }));
  drawLines(box, series, { x: say(runState.axis), y: say(runState.measure), label: say("heldOut") });
}

// A source's numbers; in per cent of its first loss, sources of any language share an axis.
function heldOut(one) {
  if (runState.measure !== "relative") return one[runState.measure].map((value) => value ?? NaN);
  return one.loss.map((value) => (value === null || !one.loss[0] ? NaN : 100 * (value / one.loss[0] - 1)));
}

// Where a step lies on the chosen axis.
function placeOf(run, step) {
  const steps = run.columns.step;
  if (!steps?.length) return undefined;
  let place = steps.findIndex((one) => one >= step);
  if (place < 0) place = steps.length - 1;
  return run.columns[AXES[runState.axis][0]][place];
}

function smallCharts(run) {
  const names = ["learning_rate", "grad_norm", "tokens_per_second", "peak_memory_gib"].filter((name) => run.columns[name]);
  if (!names.length) return null;
  const boxes = names.map((name) => {
    const box = make("div", { class: "chart" });
    later(() => drawLines(box, [{ name: say(name), x: run.columns.step, y: run.columns[name] }], {
      x: say("step"), label: say(name),
      level: name === "peak_memory_gib" && run.planned_gib ? { y: run.planned_gib, name: say("planned", formatNumber(run.planned_gib, 3)) } : null,
    }));
    return make("div", {}, make("h3", {}, say(name)), box);
  });
  return make("section", {}, make("div", { class: "grid" }, boxes));
}

function mixOf(run) {
  const sources = Object.entries(run.mix?.sources ?? {});
  if (!sources.length) return null;
  const total = (counts) => Object.values(counts ?? {}).reduce((sum, count) => sum + count, 0);
  const columns = [
    ["source", ([name]) => name], ["documents", ([, one]) => one.read], ["rejected", ([, one]) => total(one.rejected)],
    ["duplicates", ([, one]) => (one.duplicates ?? 0) + (one.near_duplicates ?? 0)], ["kept", ([, one]) => one.kept?.train],
    ["characters", ([, one]) => one.characters], ["trainTokens", ([, one]) => one.tokens], ["perCharacter", ([, one]) => one.tokens_per_chinese_character],
  ].map(([key, value], place) => ({ key, title: say(key), number: place > 0, value, cell: (row) => (place ? formatNumber(value(row)) : value(row)) }));
  return section(say("mix"), null, make("div", { class: "scroll" }, sortable(columns, sources)));
}

function eventsOf(run) {
  if (!run.events.length) return section(say("events"), null, make("p", { class: "note" }, say("noEvents")));
  const columns = [
    { key: "step", title: say("step"), number: true, value: (row) => row.step, cell: (row) => formatNumber(row.step) },
    { key: "event", title: say("event"), value: (row) => row.event, cell: (row) => row.event },
    { key: "details", title: say("details"), text: true, value: () => "", cell: (row) => Object.entries(row.details).map(([key, value]) => `${key}=${show(value)}`).join("  ") },
  ];
  return section(say("events"), null, make("div", { class: "scroll high" }, sortable(columns, run.events)));
}

function settingsOf(run) {
  if (!run.settings) return null;
  const box = make("div", { class: "scroll high", tabindex: 0 });
  const columns = ["key", "value", "default"].map((key) => ({ key, title: say(key), text: key !== "key", value: (row) => show(row[key]), cell: (row) => (key in row ? show(row[key]) : "–") }));
  const redraw = () => {
    const rows = run.settings.filter((row) => (!runState.changed || row.changed || !("default" in row)) && row.key.includes(runState.filter));
    if (!rows.length) { box.replaceChildren(make("p", { class: "note" }, say("allDefaults"))); return; }
    box.replaceChildren(sortable(columns, rows, { rowClass: (row) => (row.changed ? "changed" : "") }));
  };
  redraw();
  const only = make("input", { type: "checkbox", checked: runState.changed, onchange: (event) => { runState.changed = event.target.checked; redraw(); } });
  const filter = make("input", { type: "search", value: runState.filter, placeholder: say("filter"), "aria-label": say("filter"), oninput: (event) => { runState.filter = event.target.value; redraw(); } });
  return section(say("settings"), [make("label", {}, only, say("onlyChanged")), filter], box);
}

function commandsOf(run) {
  if (!run.commands) return null;
  return section(say("commands"), null, Object.entries(run.commands).map(([name, command]) => [make("h3", {}, say(name)), make("pre", {}, command)]));
}

// What the model in training said, its steps side by side.
function repliesOf(run) {
  if (!run.replies.length) return null;
  return section(say("replies"), null, replies(run.replies.map((one) => ({ ...one, name: `${say("step")} ${formatNumber(one.step)}` }))));
}

// What `cqlora evaluate` has found, its models side by side.
function evaluationOf(run) {
  const models = run.evaluation;
  if (!models?.length) return section(say("evaluation"), null, make("p", { class: "note" }, say("noEvaluation")));
  return section(say("evaluation"), null, textTable(models), probeChart(models), choiceTable(models), generationsOf(models));
}

function textTable(models) {
  const rows = models.flatMap((model) => (model.text ?? []).map((row) => ({ ...row, model: model.name })));
  if (!rows.length) return null;
  const numbers = ["bits_per_character", "bits_per_byte", "perplexity", "loss"];
  const columns = [
    ...["model", "source"].map((key) => ({ key, title: say(key), value: (row) => row[key], cell: (row) => show(row[key]) })),
    { key: "lang", title: say("lang"), value: (row) => row.language, cell: (row) => show(row.language) },
    ...numbers.map((key) => ({ key, title: say(key), number: true, value: (row) => row[key], cell: (row) => formatNumber(row[key]) + (row[`${key}_error`] ? ` ± ${formatNumber(row[`${key}_error`], 2)}` : "") })),
  ];
  return make("div", { class: "scroll" }, sortable(columns, rows));
}

function probeChart(models) {
  const series = models.flatMap((model) => (model.probe ?? []).map((row) => ({ name: `${model.name}: ${row.pattern} ${row.language ?? ""}`, x: (row.losses ?? []).map((_, place) => place + 1), y: row.losses ?? [], dots: true })));
  if (!series.length) return null;
  const box = make("div", { class: "chart" });
  later(() => drawLines(box, series, { x: say("example"), y: say("loss"), label: say("probe") }));
  return make("div", {}, make("h3", {}, say("probe")), box);
}

function choiceTable(models) {
  const rows = models.flatMap((model) => (model.choice ?? []).map((row) => ({ ...row, model: model.name })));
  if (!rows.length) return null;
  const columns = [
    ...["model", "task", "shots"].map((key) => ({ key, title: say(key), value: (row) => row[key], cell: (row) => show(row[key]) })),
    { key: "micro", title: "micro", number: true, value: (row) => row.micro, cell: (row) => `${formatNumber(row.micro)} ± ${formatNumber(row.micro_error, 2)}` },
    { key: "macro", title: "macro", number: true, value: (row) => row.macro, cell: (row) => formatNumber(row.macro) },
  ];
  return make("div", {}, make("h3", {}, say("choice")), make("div", { class: "scroll" }, sortable(columns, rows)));
}

function generationsOf(models) {
  return models.some((model) => model.generations?.length) ? make("div", {}, make("h3", {}, say("generations")), replies(models)) : null;
}

function replies(models) {
  const prompts = [...new Set(models.flatMap((model) => (model.generations ?? []).map((row) => row.prompt)))];
  return make("div", {}, prompts.map((prompt) => make("details", { open: prompt === prompts[0] }, make("summary", {}, prompt), make("div", { class: "replies" }, models.map((model) => {
    const row = (model.generations ?? []).find((one) => one.prompt === prompt);
    const told = row ? `${say(row.ended ? "ended" : "cut")} · ${say("language_share")} ${formatNumber(row.language_share, 2)} · ${say("repetition")} ${formatNumber(row.repetition, 2)}` : "";
    return make("div", {}, make("strong", {}, model.name), `\n${row?.reply ?? "–"}\n`, make("span", { class: "note" }, told));
  })))));
}

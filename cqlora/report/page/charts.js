// Charts on ECharts; tooltips are drawn on the canvas too, so no name becomes markup.
const charts = new Set();

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}

function chart(box, option, label) {
  const drawn = echarts.init(box, null, { renderer: "canvas" });
  box.setAttribute("role", "img");
  box.setAttribute("aria-label", label);
  drawn.setOption({ animation: false, textStyle: { color: colour("ink"), fontFamily: "inherit" }, ...option });
  charts.add(drawn);
  return drawn;
}

function dropCharts() {
  for (const drawn of charts) drawn.dispose();
  charts.clear();
}

function dropChart(box) {
  const drawn = echarts.getInstanceByDom(box);
  if (drawn) { charts.delete(drawn); drawn.dispose(); }
}

window.addEventListener("resize", () => { for (const drawn of charts) drawn.resize(); });
window.addEventListener("beforeprint", () => { for (const drawn of charts) drawn.resize(); });

function axis(name, extra = {}) {
  return {
    name, nameLocation: "middle", nameGap: 28, scale: true, nameTextStyle: { color: colour("faint") },
    axisLabel: { color: colour("faint"), hideOverlap: true, formatter: (value) => formatNumber(value, 6) }, axisLine: { lineStyle: { color: colour("line") } },
    splitLine: { lineStyle: { color: colour("line"), opacity: 0.5 } }, ...extra,
  };
}

function tooltip(extra = {}) {
  return {
    renderMode: "richText", confine: true, backgroundColor: colour("card"), borderColor: colour("line"),
    textStyle: { color: colour("ink"), fontSize: 12 }, valueFormatter: (value) => formatNumber(value), ...extra,
  };
}

// The next number that an axis may well end with.
function roundUp(value) {
  const step = 10 ** Math.floor(Math.log10(value)) / 5;
  return Math.ceil(value / step) * step;
}

// series: {name, x, y, dots?, colour?, width?, faint?}; marks: [{x, name}]; level: {y, name}
function drawLines(box, series, { x, y = "", marks = [], level = null, legend = true, label = "" }) {
  dropChart(box);
  const lines = series.map((one, place) => ({
    type: "line", name: one.name, showSymbol: Boolean(one.dots), symbolSize: 5, sampling: "lttb", connectNulls: true,
    lineStyle: { width: one.width ?? 1.6, opacity: one.faint ? 0.3 : 1 }, itemStyle: one.colour ? { color: one.colour } : {},
    data: Array.from(one.x, (value, item) => [value, Number.isFinite(one.y[item]) ? one.y[item] : null]),
    markLine: place === 0 && (marks.length || level) ? {
      symbol: "none", silent: true, lineStyle: { color: colour("faint"), type: "dashed" }, label: { color: colour("faint"), fontSize: 11, formatter: "{b}", position: "insideEndTop" },
      data: [...marks.map((mark) => ({ xAxis: mark.x, name: mark.name })), ...(level ? [{ yAxis: level.y, name: level.name }] : [])],
    } : undefined,
  }));
  const highest = level ? { max: (value) => roundUp(Math.max(value.max, level.y)), min: 0 } : {};
  const named = legend && series.length > 1;
  return chart(box, {
    color: PALETTE, tooltip: tooltip({ trigger: "axis" }), legend: { show: named, type: "scroll", top: 0, textStyle: { color: colour("ink") }, pageTextStyle: { color: colour("ink") } },
    grid: { left: 62, right: 18, top: named ? 34 : 14, bottom: 44 },
    xAxis: axis(x, { type: "value", min: "dataMin", max: "dataMax" }), yAxis: axis(y, { type: "value", nameGap: 48, ...highest }),
    dataZoom: [{ type: "inside", zoomOnMouseWheel: "ctrl", moveOnMouseMove: true }], series: lines,
  }, label);
}

const PALETTE = ["#0b6bcb", "#d9480f", "#2b8a3e", "#9c36b5", "#b8860b", "#0b8793", "#c2255c", "#5c6f82", "#6741d9", "#7a8c1c"];

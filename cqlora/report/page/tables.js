// A table whose columns sort: {key, title, number?, cell(row), value(row)}; its class is `look`.
function sortable(columns, rows, { sort, onSort, onRow, chosen, rowClass, look = "" } = {}) {
  const column = columns.find((one) => one.key === sort?.key);
  const ordered = column ? [...rows].sort((one, other) => compareValues(column.value(one), column.value(other), sort.down)) : rows;
  const head = columns.map((one) => {
    const mark = sort?.key === one.key ? (sort.down ? " ↓" : " ↑") : "";
    const order = sort?.key === one.key ? (sort.down ? "descending" : "ascending") : "none";
    const title = onSort ? make("button", { type: "button", onclick: () => onSort(one.key) }, breakable(one.title), mark) : one.title;
    return make("th", { class: one.number ? "number" : "", scope: "col", "aria-sort": onSort ? order : null }, title);
  });
  const body = ordered.map((row) => make("tr", { class: [rowClass?.(row) ?? "", chosen?.(row) ? "chosen" : ""].join(" ").trim(), onclick: onRow ? () => onRow(row) : () => {} },
    columns.map((one) => make("td", { class: one.number ? "number" : one.text ? "text" : "" }, one.cell(row)))));
  return make("table", { class: look }, make("thead", {}, make("tr", {}, head)), make("tbody", {}, body));
}

// The parts of a dotted or slashed name, each with what ends it.
const nameParts = (name) => name.split(/(?<=[/.])/);

// A name that may go on in another line behind a slash, a dot or an underscore.
const breakable = (name) => name.split(/(?<=[/._])/).flatMap((part) => [part, make("wbr")]);

// Numbers by size, texts by the language's order; what is missing comes last either way.
function compareValues(one, other, down = false) {
  const [missing, missingToo] = [one, other].map((value) => value === null || value === undefined || Number.isNaN(value));
  if (missing || missingToo) return missing - missingToo;
  const numbers = typeof one === "number" && typeof other === "number";
  const order = numbers ? one - other : String(one).localeCompare(String(other), language, { numeric: true });
  return down ? -order : order;
}

function show(value) {
  if (value === null || value === undefined) return "null";
  return typeof value === "object" ? JSON.stringify(value) : String(value);
}

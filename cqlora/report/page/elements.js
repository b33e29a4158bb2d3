// Elements are made of nodes and text, and never of markup: what a run is named stays text.
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "class") element.className = value;
    else if (typeof value === "boolean") element.toggleAttribute(name, value);
    else if (value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  return element;
}

function section(title, controls, ...children) {
  return make("section", {}, make("div", { class: "title" }, make("h2", {}, title), make("div", { class: "controls" }, controls ?? [])), children);
}

function choose(label, options, current, onChoice) {
  const items = options.map(([value, text]) => make("option", { value, selected: value === current }, text));
  return make("label", {}, label, make("select", { onchange: (event) => onChoice(event.target.value) }, items));
}

function slide(label, current, onChange) {
  const input = make("input", { type: "range", min: 0, max: 0.99, step: 0.01, value: current });
  input.addEventListener("input", () => onChange(Number(input.value)));
  return make("label", {}, label, input);
}

function stateBadge(state) {
  return make("span", { class: `state ${["finished", "running", "failed", "refused", "missing"].includes(state) ? state : ""}` }, say(state));
}

function saveFile(name, type, text) {
  const link = make("a", { href: URL.createObjectURL(new Blob([text], { type })), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

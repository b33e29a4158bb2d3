// A message's text on the page: what was asked as it is, what was answered as Markdown.

import { label } from "./labels.js";
import { markdownNodes } from "./markdown.js";

export function renderPlain(text, target) {
  const prose = element("div", "prose");
  prose.textContent = text;
  target.replaceChildren(prose);
}

export function renderMarkdown(text, target) {
  const nodes = markdownNodes(text);
  if (nodes === null) {
    renderPlain(text, target);
    return;
  }
  for (const code of nodes.querySelectorAll("pre > code")) code.parentElement.replaceWith(codeBlock(code));
  for (const table of nodes.querySelectorAll("table")) {
    const frame = element("div", "scroll");
    frame.tabIndex = 0;
    table.replaceWith(frame);
    frame.append(table);
  }
  const prose = element("div", "markdown");
  prose.append(nodes);
  target.replaceChildren(...(prose.hasChildNodes() ? [prose] : []));
}

// A button whose words are a label.
export function button(name, act) {
  const made = element("button", name);
  made.type = "button";
  made.dataset.label = name;
  made.textContent = label(name);
  made.addEventListener("click", act);
  return made;
}

export function copyButton(read) {
  const made = button("copy", async () => {
    made.textContent = label((await copy(read())) ? "copied" : "copyFailed");
    setTimeout(() => (made.textContent = label("copy")), 1500);
  });
  return made;
}

export function element(tag, className) {
  const made = document.createElement(tag);
  made.className = className;
  return made;
}

function codeBlock(code) {
  const figure = element("figure", "code");
  const caption = document.createElement("figcaption");
  const name = document.createElement("span");
  name.textContent = /language-(\S+)/.exec(code.className)?.[1] ?? "";
  const text = code.textContent.replace(/\n$/, "");
  caption.append(name, copyButton(() => text));
  const pre = document.createElement("pre");
  pre.tabIndex = 0;
  const body = document.createElement("code");
  body.textContent = text;
  pre.append(body);
  figure.append(caption, pre);
  return figure;
}

// The clipboard's own interface is only there on localhost and https.
async function copy(text) {
  if (navigator.clipboard) {
    try {
      await navigator.clipboard.writeText(text);
      return true;
    } catch {
      return false;
    }
  }
  const area = document.createElement("textarea");
  area.value = text;
  document.body.append(area);
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  return done;
}

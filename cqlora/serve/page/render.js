// A message's text as nodes: fenced code stands in a block of its own; text is never read as HTML.

import { label } from "./labels.js";

const FENCE = /^[ \t]*(```+|~~~+)[ \t]*([\w+#.-]*)[ \t]*$/;

export function renderText(text, target) {
  target.replaceChildren(...splitBlocks(text).map((block) => (block.code ? codeBlock(block) : paragraph(block))));
}

// Consecutive blocks of prose and code; a fence that is not closed yet runs to the end.
export function splitBlocks(text) {
  const blocks = [];
  let block = { code: false, language: "", lines: [] };
  let fence = "";
  const close = (next) => {
    if (block.code || block.lines.join("").trim()) blocks.push(block);
    block = next;
  };
  for (const line of text.split("\n")) {
    const found = FENCE.exec(line);
    if (!fence && found) {
      fence = found[1];
      close({ code: true, language: found[2], lines: [] });
    } else if (fence && found && found[1].startsWith(fence) && !found[2]) {
      fence = "";
      close({ code: false, language: "", lines: [] });
    } else {
      block.lines.push(line);
    }
  }
  close(null);
  return blocks;
}

export function copyButton(read) {
  const button = document.createElement("button");
  button.type = "button";
  button.className = "copy";
  button.dataset.label = "copy";
  button.textContent = label("copy");
  button.addEventListener("click", async () => {
    button.textContent = label((await copy(read())) ? "copied" : "copyFailed");
    setTimeout(() => (button.textContent = label("copy")), 1500);
  });
  return button;
}

function paragraph(block) {
  const element = document.createElement("div");
  element.className = "prose";
  element.textContent = block.lines.join("\n").replace(/^\n+|\s+$/g, "");
  return element;
}

function codeBlock(block) {
  const figure = document.createElement("figure");
  const caption = document.createElement("figcaption");
  const name = document.createElement("span");
  name.textContent = block.language;
  const text = block.lines.join("\n");
  caption.append(name, copyButton(() => text));
  const pre = document.createElement("pre");
  pre.tabIndex = 0;
  const code = document.createElement("code");
  code.textContent = text;
  pre.append(code);
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

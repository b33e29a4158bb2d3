// The list of kept conversations: open, rename, delete, export.

import { label } from "./labels.js";
import { button, element } from "./render.js";
import { deleteChat, exportLine, listChats, onOtherTabs, readChat, saveChat, titleOf } from "./store.js";
import { systemPrompt } from "./settings.js";

const list = document.getElementById("chat-list");
let page;

// `page` has current(), open(chat), forget(id), renamed(id, title) and full().
export function setUpChats(given) {
  page = given;
  onOtherTabs(drawChats);
  drawChats();
}

export function drawChats() {
  const chats = listChats();
  list.replaceChildren(...chats.map(chatItem));
  document.getElementById("no-chats").hidden = chats.length > 0;
}

function chatItem(chat) {
  const item = document.createElement("li");
  const open = element("button", "open");
  open.type = "button";
  open.textContent = titleOf(chat);
  open.title = titleOf(chat);
  if (chat.id === page.current().id) open.setAttribute("aria-current", "true");
  open.addEventListener("click", () => {
    const kept = readChat(chat.id);
    if (kept) page.open(kept);
  });
  const acts = element("div", "acts");
  acts.append(
    button("rename", () => rename(chat, item)),
    button("export", () => download(chat)),
    button("delete", () => remove(chat)),
  );
  item.append(open, acts);
  return item;
}

function rename(chat, item) {
  const field = element("input", "title");
  field.value = titleOf(chat);
  field.maxLength = 200;
  field.setAttribute("aria-label", label("rename"));
  let done = false;
  const finish = (kept) => {
    if (done) return;
    done = true;
    const title = field.value.trim();
    const stored = readChat(chat.id);
    if (kept && title && stored) {
      if (saveChat({ ...stored, title })) page.renamed(chat.id, title);
      else page.full();
    }
    drawChats();
  };
  field.addEventListener("keydown", (event) => {
    if (event.isComposing || event.keyCode === 229) return;
    if (event.key === "Enter") finish(true);
    if (event.key === "Escape") finish(false);
    event.stopPropagation();
  });
  field.addEventListener("blur", () => finish(true));
  item.replaceChildren(field);
  field.select();
}

function remove(chat) {
  if (!window.confirm(`${label("deleteAsk")}\n${titleOf(chat)}`)) return;
  deleteChat(chat.id);
  page.forget(chat.id);
  drawChats();
}

function download(chat) {
  const link = document.createElement("a");
  const line = exportLine(readChat(chat.id) ?? chat, systemPrompt());
  link.href = URL.createObjectURL(new Blob([line], { type: "application/jsonl" }));
  link.download = "conversation.jsonl";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

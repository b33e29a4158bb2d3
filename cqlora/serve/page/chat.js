// The conversation: what was said, what is being said, and who may speak next.

import { ApiError, fetchModel, streamReply } from "./api.js";
import { drawChats, setUpChats } from "./chats.js";
import { label } from "./labels.js";
import { closePanels, setUpPanels } from "./panels.js";
import { button, copyButton, element, renderMarkdown, renderPlain } from "./render.js";
import { limitTokens, samplingRequest, setUpSettings, showModelsPrompt, systemPrompt } from "./settings.js";
import { newChat, saveChat } from "./store.js";

const byId = (id) => document.getElementById(id);
const messages = byId("messages");
const words = byId("words");

let model = "";
let chat = newChat();
let speaking = null;
let key = sessionStorage.getItem("cqlora-key") ?? "";

async function connect() {
  try {
    const found = await fetchModel(key);
    model = found.id;
    byId("model").textContent = model;
    document.title = `${model} · cqlora`;
    limitTokens(found.max_tokens);
    showModelsPrompt(found.system_prompt);
    say("");
  } catch (error) {
    complain(error);
  }
}

function send() {
  const text = words.value.trim();
  if (!text || speaking) return;
  words.value = "";
  fitWords();
  ask(chat.messages, text);
}

// Says `text` after the messages before it.
function ask(before, text) {
  return reply([...before, { role: "user", content: text }], () => {
    if (!words.value) words.value = text;
    fitWords();
  });
}

// The last answer once more.
function regenerate() {
  if (!speaking) reply(chat.messages.slice(0, -1), () => {});
}

// Follows one reply to `asked`; where nothing of it is said, all is as it was, and `giveBack` is called.
async function reply(asked, giveBack) {
  const mine = chat;
  const before = chat.messages;
  chat.messages = asked;
  draw();
  const answer = showMessage("assistant", "");
  const kept = await listen(answer);
  // Another conversation may have been opened meanwhile.
  if (mine !== chat) return;
  chat.messages = kept ? [...asked, { role: "assistant", content: answer.text }] : before;
  if (kept) keep();
  else giveBack();
  draw();
}

// Follows one stream; whether anything of it is to be kept.
async function listen(answer) {
  const system = systemPrompt();
  const turns = system ? [{ role: "system", content: system }, ...chat.messages] : chat.messages;
  const controller = new AbortController();
  const began = performance.now();
  setSpeaking(controller);
  try {
    // Before the model's name is known the server takes its only one.
    const request = { ...(model && { model }), messages: turns, ...samplingRequest() };
    const { finishReason, tokens } = await streamReply(request, key, controller.signal, answer.add);
    const seconds = ((performance.now() - began) / 1000).toFixed(1);
    if (speaking === controller) say((finishReason === "length" ? `${label("cut")} ` : "") + label("speed")(tokens, seconds));
    return true;
  } catch (error) {
    if (speaking === controller) complain(error);
    return answer.text !== "";
  } finally {
    if (speaking === controller) setSpeaking(null);
  }
}

function setSpeaking(controller) {
  speaking = controller;
  byId("send").hidden = Boolean(controller);
  byId("stop").hidden = !controller;
  messages.setAttribute("aria-busy", Boolean(controller));
  if (controller) say("");
  if (!controller) words.focus();
}

function keep() {
  chat.updated = Date.now();
  if (!saveChat(chat)) say(label("storeFull"), true);
  drawChats();
}

// Every message of the conversation anew.
function draw() {
  for (const article of messages.querySelectorAll("article")) article.remove();
  byId("greeting").hidden = chat.messages.length > 0;
  chat.messages.forEach(({ role, content }, number) => showMessage(role, content, number));
  messages.scrollTop = messages.scrollHeight;
}

// A message on the page: `add` appends to its text, and is drawn once a frame.
function showMessage(role, text, number = null) {
  const article = element("article", role);
  const body = element("div", "body");
  const message = { text };
  const render = role === "assistant" ? renderMarkdown : renderPlain;
  let drawing = false;
  const redraw = () => {
    drawing = false;
    const atEnd = messages.scrollHeight - messages.scrollTop - messages.clientHeight < 80;
    render(message.text, body);
    if (atEnd) messages.scrollTop = messages.scrollHeight;
  };
  message.add = (more) => {
    message.text += more;
    if (!drawing) requestAnimationFrame(redraw);
    drawing = true;
  };
  article.append(body);
  if (number === null) article.classList.add("pending");
  else article.append(acts(role, number, article, message));
  messages.append(article);
  redraw();
  messages.scrollTop = messages.scrollHeight;
  return message;
}

function acts(role, number, article, message) {
  const bar = element("div", "acts");
  bar.append(copyButton(() => message.text));
  if (role === "user") bar.append(button("edit", () => edit(number, article)));
  else if (number === chat.messages.length - 1) bar.append(button("regenerate", regenerate));
  return bar;
}

// Turns a question into a field; what followed it goes when the new one is sent.
function edit(number, article) {
  if (speaking) return;
  const field = document.createElement("textarea");
  field.value = chat.messages[number].content;
  field.rows = Math.min(12, field.value.split("\n").length + 1);
  field.setAttribute("aria-label", label("edit"));
  const submit = () => {
    const text = field.value.trim();
    if (text && !speaking) ask(chat.messages.slice(0, number), text);
  };
  field.addEventListener("keydown", (event) => {
    if (composing(event)) return;
    if (event.key === "Enter" && !event.shiftKey) {
      event.preventDefault();
      submit();
    }
    if (event.key === "Escape") draw();
  });
  const bar = element("div", "acts");
  bar.append(button("sendEdit", submit), button("cancel", draw));
  article.classList.add("editing");
  article.replaceChildren(field, bar);
  field.focus();
}

function complain(error) {
  if (error.name === "AbortError") say(label("stopped"));
  else if (error.status === 401) askForKey();
  else if (error instanceof ApiError) say(label("failed") + error.message, true);
  else say(label("lost"), true);
}

function say(text, bad = false) {
  byId("notice").textContent = text;
  byId("notice").classList.toggle("bad", bad);
}

function askForKey() {
  if (!byId("key-dialog").open) byId("key-dialog").showModal();
}

function openChat(opened) {
  speaking?.abort();
  setSpeaking(null);
  chat = opened;
  draw();
  drawChats();
  say("");
  closePanels();
  words.focus();
}

function fitWords() {
  words.style.height = "auto";
  words.style.height = `${Math.min(words.scrollHeight + 2, 220)}px`;
}

byId("key-dialog").addEventListener("close", () => {
  key = byId("key").value;
  sessionStorage.setItem("cqlora-key", key);
  connect();
});
byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
byId("stop").addEventListener("click", () => speaking?.abort());
byId("new").addEventListener("click", () => openChat(newChat()));
words.addEventListener("input", fitWords);
// Keys that are meant for an input method, which chooses or drops a candidate; Safari tells the last by 229 alone.
const composing = (event) => event.isComposing || event.keyCode === 229;
words.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !composing(event)) {
    event.preventDefault();
    send();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !composing(event) && !byId("key-dialog").open && !closePanels()) speaking?.abort();
});

setUpSettings();
setUpPanels();
setUpChats({
  current: () => chat,
  open: openChat,
  forget: (id) => {
    if (id === chat.id) openChat(newChat());
  },
  renamed: (id, title) => {
    if (id === chat.id) chat.title = title;
  },
  full: () => say(label("storeFull"), true),
});
connect();

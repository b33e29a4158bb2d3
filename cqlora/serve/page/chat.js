// The conversation: what was said, what is being said, and who may speak next.

import { ApiError, fetchModel, streamReply } from "./api.js";
import { label } from "./labels.js";
import { copyButton, renderText } from "./render.js";
import { limitTokens, samplingRequest, setUpSettings, systemPrompt } from "./settings.js";

const byId = (id) => document.getElementById(id);
const messages = byId("messages");
const words = byId("words");

let model = "";
let history = [];
let speaking = null;
let key = sessionStorage.getItem("cqlora-key") ?? "";

async function connect() {
  try {
    const found = await fetchModel(key);
    model = found.id;
    byId("model").textContent = model;
    document.title = `${model} · cqlora`;
    limitTokens(found.max_tokens);
    say("");
  } catch (error) {
    complain(error);
  }
}

async function send() {
  const text = words.value.trim();
  if (!text || speaking) return;
  words.value = "";
  fitWords();
  byId("greeting").hidden = true;
  const asked = showMessage("user", text);
  const conversation = history;
  conversation.push({ role: "user", content: text });
  const answer = showMessage("assistant", "");
  const kept = await listen(answer);
  // A new conversation may have begun meanwhile.
  if (conversation !== history) return;
  if (kept) {
    history.push({ role: "assistant", content: answer.text });
  } else {
    // Nothing was said: the question goes back where it can be sent again.
    history.pop();
    asked.element.remove();
    answer.element.remove();
    if (!words.value) words.value = text;
    fitWords();
  }
}

// Follows one reply; whether anything of it is to be kept.
async function listen(answer) {
  const system = systemPrompt();
  const turns = system ? [{ role: "system", content: system }, ...history] : history;
  const controller = new AbortController();
  const began = performance.now();
  setSpeaking(controller);
  try {
    // Before the model's name is known the server takes its only one.
    const request = { ...(model && { model }), messages: turns, ...samplingRequest() };
    const { finishReason, tokens } = await streamReply(request, key, controller.signal, answer.add);
    const seconds = ((performance.now() - began) / 1000).toFixed(1);
    say((finishReason === "length" ? `${label("cut")} ` : "") + label("speed")(tokens, seconds));
    return true;
  } catch (error) {
    complain(error);
    return answer.text !== "";
  } finally {
    answer.finish();
    setSpeaking(null);
  }
}

function setSpeaking(controller) {
  speaking = controller;
  byId("send").hidden = Boolean(controller);
  byId("stop").hidden = !controller;
  messages.setAttribute("aria-busy", Boolean(controller));
  if (controller) say("");
  words.focus();
}

// A message on the page: `add` appends to its text, and is drawn once a frame.
function showMessage(role, text) {
  const element = document.createElement("article");
  element.className = role;
  const body = document.createElement("div");
  body.className = "body";
  const message = { element, text };
  let drawing = false;
  const draw = () => {
    drawing = false;
    const atEnd = messages.scrollHeight - messages.scrollTop - messages.clientHeight < 80;
    renderText(message.text, body);
    if (atEnd) messages.scrollTop = messages.scrollHeight;
  };
  message.add = (more) => {
    message.text += more;
    if (!drawing) requestAnimationFrame(draw);
    drawing = true;
  };
  message.finish = () => {
    element.classList.remove("pending");
    draw();
  };
  element.append(body, copyButton(() => message.text));
  if (role === "assistant") element.classList.add("pending");
  messages.append(element);
  draw();
  messages.scrollTop = messages.scrollHeight;
  return message;
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
  if (!byId("door").open) byId("door").showModal();
}

function newChat() {
  speaking?.abort();
  history = [];
  for (const article of messages.querySelectorAll("article")) article.remove();
  byId("greeting").hidden = false;
  say("");
  words.focus();
}

function fitWords() {
  words.style.height = "auto";
  words.style.height = `${Math.min(words.scrollHeight + 2, 220)}px`;
}

byId("door").addEventListener("close", () => {
  key = byId("key").value;
  sessionStorage.setItem("cqlora-key", key);
  connect();
});
byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
byId("stop").addEventListener("click", () => speaking?.abort());
byId("new").addEventListener("click", newChat);
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
  if (event.key === "Escape" && !composing(event) && !byId("door").open) speaking?.abort();
});

setUpSettings();
connect();

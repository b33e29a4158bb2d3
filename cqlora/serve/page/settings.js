// The sampling controls and the looks, kept in this browser.

import { currentLanguage, label, setLanguage, writeLabels } from "./labels.js";

const STORE = "cqlora";
const THEMES = ["auto", "light", "dark"];
const NUMBERS = ["temperature", "top_p", "top_k", "repetition_penalty", "max_tokens", "seed"];

const byId = (id) => document.getElementById(id);
const fields = () => [...NUMBERS, "system"].map(byId);
let looks = { theme: "auto", language: "" };
let modelsPrompt = "";

export function setUpSettings() {
  const kept = readStore();
  looks = { ...looks, ...kept.looks };
  for (const field of fields()) {
    if (kept.values?.[field.id] !== undefined) field.value = kept.values[field.id];
    field.addEventListener("input", () => {
      showValues();
      writeStore();
    });
  }
  byId("reset").addEventListener("click", () => {
    for (const field of fields()) field.value = field.defaultValue;
    showValues();
    writeStore();
  });
  byId("theme").addEventListener("click", () => change({ theme: THEMES[(THEMES.indexOf(looks.theme) + 1) % 3] }));
  byId("language").addEventListener("click", () => change({ language: currentLanguage() === "zh" ? "en" : "zh" }));
  showLooks();
  showValues();
}

// What the API takes; an empty field is left to the server.
export function samplingRequest() {
  const filled = NUMBERS.filter((id) => byId(id).value !== "" && byId(id).validity.valid);
  return Object.fromEntries(filled.map((id) => [id, Number(byId(id).value)]));
}

export function systemPrompt() {
  return byId("system").value.trim();
}

// The server's longest reply bounds what may be asked for.
export function limitTokens(most) {
  const field = byId("max_tokens");
  field.max = most;
  field.defaultValue = Math.min(Number(field.defaultValue), most);
  if (Number(field.value) > most) field.value = most;
}

// What the model was tuned to begin with stands where nothing is written.
export function showModelsPrompt(prompt) {
  modelsPrompt = prompt ?? "";
  showLooks();
}

function change(what) {
  looks = { ...looks, ...what };
  showLooks();
  writeStore();
}

function showLooks() {
  setLanguage(looks.language || (navigator.language.toLowerCase().startsWith("zh") ? "zh" : "en"));
  document.documentElement.dataset.theme = looks.theme;
  writeLabels(document);
  if (modelsPrompt) byId("system").placeholder = modelsPrompt;
  byId("theme").textContent = label("theme")[looks.theme];
  byId("language").textContent = label("otherLanguage");
  byId("language").lang = currentLanguage() === "zh" ? "en" : "zh-CN";
}

function showValues() {
  for (const output of document.querySelectorAll("output")) {
    output.textContent = Number(byId(output.htmlFor.value).value).toFixed(2);
  }
}

// A browser may forbid the store: the page then forgets, and works.
function readStore() {
  try {
    return JSON.parse(localStorage.getItem(STORE)) ?? {};
  } catch {
    return {};
  }
}

function writeStore() {
  const values = Object.fromEntries(fields().map((field) => [field.id, field.value]));
  try {
    localStorage.setItem(STORE, JSON.stringify({ looks, values }));
  } catch {
    // Nothing to do: see above.
  }
}

// Head, language, theme, and a page that is watched.
const THEMES = ["auto", "light", "dark"];
let theme = "auto";
let page = null;
let waiting = [];
let currentRedraw = () => {};

// Charts need a place on the page to know their size.
function later(draw) { waiting.push(draw); if (waiting.length === 1) requestAnimationFrame(runWaiting); }
function runWaiting() { const draws = waiting; waiting = []; for (const draw of draws) draw(); }

const systemDark = matchMedia("(prefers-color-scheme: dark)");
function applyTheme() {
  const dark = theme === "dark" || (theme === "auto" && systemDark.matches);
  document.documentElement.dataset.theme = dark ? "dark" : "light";
}
systemDark.addEventListener("change", () => { applyTheme(); render(); });

function render() {
  dropCharts();
  document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
  const title = page.kind === "run" ? page.run.title ?? page.name : page.name;
  document.title = `${page.name} · cqlora`;
  const controls = make("div", { class: "controls" },
    choose(say("theme"), THEMES.map((name) => [name, say(name)]), theme, (value) => { theme = value; applyTheme(); render(); }),
    make("button", { type: "button", id: "language", onclick: () => { language = language === "zh" ? "en" : "zh"; render(); document.getElementById("language").focus(); } }, say("language")));
  const kind = page.kind === "run" ? `${say("run")} ${page.name}` : say("sweep");
  document.getElementById("head").replaceChildren(make("h1", {}, title), make("span", { class: "note" }, kind), controls);
  const content = document.getElementById("content");
  const parts = page.kind === "run" ? showRun(page) : showSweep(page);
  content.replaceChildren(...parts);
  document.getElementById("foot").replaceChildren(make("p", { id: "written" }, `cqlora ${page.version} · ${say("written")} ${page.written} · ${page.kind === "run" ? page.run.folder : page.folder}`));
}

const WATCH_SECONDS = 5;
async function follow() {
  try {
    const answer = await fetch("data");
    if (!answer.ok) throw new Error(answer.statusText);
    const text = await answer.text();
    const newest = await unpackPage(JSON.parse(text));
    const shape = JSON.stringify({ ...newest, written: "" });
    if (shape !== follow.shape && !document.activeElement?.matches("input, select")) {
      follow.shape = shape;
      page = newest;
      const place = scrollY;
      render();
      later(() => scrollTo(0, place));
    }
    document.getElementById("written").textContent = say("updated", newest.written);
  } catch {
    document.getElementById("written").textContent = say("lost", page.written);
  }
  setTimeout(follow, WATCH_SECONDS * 1000);
}

async function start() {
  page = await unpackPage(JSON.parse(document.getElementById("data").textContent));
  applyTheme();
  render();
  document.body.dataset.ready = "true";
  if (document.body.dataset.watched === "true") setTimeout(follow, WATCH_SECONDS * 1000);
}
start();

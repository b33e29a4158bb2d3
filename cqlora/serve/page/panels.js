// The two panels beside the conversation: columns where there is room, and else over it, one at a time.

const WIDE = window.matchMedia("(min-width: 1000px)");
const panels = ["chats", "settings"].map((id) => ({
  panel: document.getElementById(id),
  toggle: document.getElementById(`${id}-toggle`),
}));

export function setUpPanels() {
  for (const one of panels) {
    show(one, WIDE.matches);
    one.toggle.addEventListener("click", () => {
      const open = one.panel.hidden;
      if (open && !WIDE.matches) closePanels();
      show(one, open);
      if (open && !WIDE.matches) one.panel.querySelector("button")?.focus();
    });
    one.panel.querySelector(".close").addEventListener("click", () => {
      show(one, false);
      one.toggle.focus();
    });
  }
  WIDE.addEventListener("change", () => panels.forEach((one) => show(one, WIDE.matches)));
  document.getElementById("shade").addEventListener("click", closePanels);
}

// Where they lie over the conversation; whether any was open.
export function closePanels() {
  if (WIDE.matches) return false;
  const open = panels.filter(({ panel }) => !panel.hidden);
  for (const one of open) show(one, false);
  return open.length > 0;
}

function show({ panel, toggle }, open) {
  panel.hidden = !open;
  toggle.setAttribute("aria-expanded", open);
  document.getElementById("shade").hidden = WIDE.matches || panels.every((one) => one.panel.hidden);
}

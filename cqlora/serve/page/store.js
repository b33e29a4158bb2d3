// Conversations, kept in this browser and nowhere else: each under a key of its own, so that two tabs do not
// overwrite each other's.

const PREFIX = "cqlora-chat-";
const MOST_CHATS = 100;
const MOST_CHARACTERS = 1_000_000;
const TITLE_CHARACTERS = 60;

export function newChat() {
  // crypto.randomUUID is only there on localhost and https.
  const id = `${Date.now()}-${Math.random().toString(36).slice(2, 10)}`;
  return { id, title: "", updated: 0, messages: [] };
}

// The newest first; what is damaged is passed over.
export function listChats() {
  try {
    const keys = Object.keys(localStorage).filter((key) => key.startsWith(PREFIX));
    const chats = keys.map((key) => readChat(key.slice(PREFIX.length))).filter(Boolean);
    return chats.sort((one, other) => other.updated - one.updated);
  } catch {
    return [];
  }
}

export function readChat(id) {
  try {
    const chat = JSON.parse(localStorage.getItem(PREFIX + id));
    const right = (message) => ["user", "assistant"].includes(message.role) && typeof message.content === "string";
    if (chat.id !== id || typeof chat.title !== "string" || !chat.messages.every(right)) return null;
    return { ...chat, updated: Number(chat.updated) || 0 };
  } catch {
    return null;
  }
}

// Whether there was room for it.
export function saveChat(chat) {
  const text = JSON.stringify(chat);
  try {
    const isNew = localStorage.getItem(PREFIX + chat.id) === null;
    if (text.length > MOST_CHARACTERS || (isNew && listChats().length >= MOST_CHATS)) return false;
    localStorage.setItem(PREFIX + chat.id, text);
    return true;
  } catch {
    return false;
  }
}

export function deleteChat(id) {
  try {
    localStorage.removeItem(PREFIX + id);
  } catch {
    // A browser that forbids the store keeps nothing to delete.
  }
}

export function titleOf(chat) {
  const title = chat.title || chat.messages[0]?.content.trim().split("\n")[0] || "";
  return title.length > TITLE_CHARACTERS ? `${title.slice(0, TITLE_CHARACTERS)}…` : title;
}

// As `/save` of `cqlora chat` writes it: a line that a run can train on.
export function exportLine(chat, system) {
  const turns = chat.messages.map(({ role, content }) => ({ role, text: content }));
  return `${JSON.stringify(system ? [{ role: "system", text: system }, ...turns] : turns)}\n`;
}

export function onOtherTabs(act) {
  window.addEventListener("storage", (event) => {
    if (event.key === null || event.key.startsWith(PREFIX)) act();
  });
}

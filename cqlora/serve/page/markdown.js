// Markdown to nodes: parsed by marked, cleaned by DOMPurify; HTML in a text stays text, and nothing is loaded.

import { Marked } from "./vendor/marked.js";
import DOMPurify from "./vendor/purify.js";

const LONGEST = 50_000;
const CLEAN = {
  ALLOWED_TAGS: [
    "a", "blockquote", "br", "code", "del", "em", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "li", "ol", "p", "pre",
    "strong", "table", "tbody", "td", "th", "thead", "tr", "ul",
  ],
  ALLOWED_ATTR: ["align", "class", "href", "start"],
  ALLOWED_URI_REGEXP: /^(?:https?|mailto):/i,
  ADD_URI_SAFE_ATTR: ["align", "start"],
  ALLOW_ARIA_ATTR: false,
  ALLOW_DATA_ATTR: false,
  RETURN_DOM_FRAGMENT: true,
};

const marked = new Marked({
  gfm: true,
  breaks: true,
  renderer: {
    html: ({ text }) => escape(text),
    // A picture would be fetched from elsewhere: its words and its address stand for it.
    image: ({ text, href }) => escape(`${text || "image"} (${href})`),
    checkbox: ({ checked }) => (checked ? "☑ " : "☐ "),
  },
});

// A fragment of the text's nodes, or null where it is too long to be worth it, or cannot be parsed.
export function markdownNodes(text) {
  if (text.length > LONGEST) return null;
  try {
    const fragment = DOMPurify.sanitize(marked.parse(text), CLEAN);
    for (const link of fragment.querySelectorAll("a[href]")) {
      link.target = "_blank";
      link.rel = "noopener noreferrer nofollow";
    }
    return fragment;
  } catch {
    return null;
  }
}

function escape(text) {
  return text.replace(/[&<>"']/g, (character) => `&#${character.charCodeAt(0)};`);
}

// Every word of the page, in English and Chinese.

const LABELS = {
  en: {
    newChat: "New chat",
    settings: "Settings",
    close: "Close",
    chats: "Chats",
    noChats: "What you say is kept in this browser only, and listed here.",
    rename: "Rename",
    export: "Export",
    delete: "Delete",
    deleteAsk: "Delete this conversation?",
    storeFull: "This browser has no room for the conversation: delete or export others.",
    edit: "Edit",
    sendEdit: "Send again",
    cancel: "Cancel",
    regenerate: "Regenerate",
    conversation: "Conversation",
    greeting: "Ask something to begin. Nothing leaves this server.",
    message: "Message",
    messageHint: "Message, Enter sends",
    send: "Send",
    stop: "Stop",
    copy: "Copy",
    copied: "Copied",
    copyFailed: "Could not copy",
    systemPrompt: "System prompt",
    systemHint: "None",
    temperature: "Temperature",
    topP: "Top-p",
    topK: "Top-k (0: off)",
    penalty: "Repetition penalty",
    maxTokens: "Max tokens",
    seed: "Seed",
    seedHint: "Random",
    reset: "Reset settings",
    keyTitle: "This server asks for an API key",
    keyHint: "API key (kept until the tab is closed)",
    keyEnter: "Continue",
    cut: "Reached max tokens.",
    stopped: "Stopped.",
    lost: "The connection was lost.",
    failed: "The server answered: ",
    speed: (tokens, seconds) => `${tokens} tokens in ${seconds} s`,
    theme: { auto: "Theme: auto", light: "Theme: light", dark: "Theme: dark" },
    otherLanguage: "中文",
  },
  zh: {
    newChat: "新对话",
    settings: "设置",
    close: "关闭",
    chats: "对话列表",
    noChats: "对话只保存在本浏览器中，并显示在这里。",
    rename: "重命名",
    export: "导出",
    delete: "删除",
    deleteAsk: "删除这个对话？",
    storeFull: "浏览器存储空间不足，本对话未保存：请删除或导出其他对话。",
    edit: "编辑",
    sendEdit: "重新发送",
    cancel: "取消",
    regenerate: "重新生成",
    conversation: "对话",
    greeting: "输入问题即可开始，内容不会离开本服务器。",
    message: "消息",
    messageHint: "输入消息，Enter 发送",
    send: "发送",
    stop: "停止",
    copy: "复制",
    copied: "已复制",
    copyFailed: "复制失败",
    systemPrompt: "系统提示词",
    systemHint: "无",
    temperature: "温度",
    topP: "Top-p",
    topK: "Top-k（0 表示不限）",
    penalty: "重复惩罚",
    maxTokens: "最大生成词元数",
    seed: "随机种子",
    seedHint: "随机",
    reset: "恢复默认设置",
    keyTitle: "本服务器需要 API 密钥",
    keyHint: "API 密钥（仅保存到标签页关闭）",
    keyEnter: "继续",
    cut: "已达到词元数上限。",
    stopped: "已停止。",
    lost: "连接已断开。",
    failed: "服务器返回：",
    speed: (tokens, seconds) => `${tokens} 个词元，用时 ${seconds} 秒`,
    theme: { auto: "主题：自动", light: "主题：浅色", dark: "主题：深色" },
    otherLanguage: "English",
  },
};

let language = "en";

export function label(name) {
  return LABELS[language][name];
}

// Writes every label of `root`; elements name theirs in data-label, data-placeholder, data-aria.
export function writeLabels(root) {
  for (const element of root.querySelectorAll("[data-label]")) {
    element.textContent = label(element.dataset.label);
  }
  for (const element of root.querySelectorAll("[data-placeholder]")) {
    element.placeholder = label(element.dataset.placeholder);
  }
  for (const element of root.querySelectorAll("[data-aria]")) {
    element.setAttribute("aria-label", label(element.dataset.aria));
  }
}

export function currentLanguage() {
  return language;
}

export function setLanguage(wanted) {
  language = wanted in LABELS ? wanted : "en";
  document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
}

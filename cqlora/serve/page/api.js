// This server's API: the model's name and limits, and a reply as it comes.

export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export async function fetchModel(key) {
  const response = await fetch("/v1/models", { headers: headers(key) });
  if (!response.ok) throw await readError(response);
  return (await response.json()).data[0];
}

// Calls `onText` with each delta of the reply; resolves to {finishReason, tokens}.
export async function streamReply(request, key, signal, onText) {
  const response = await fetch("/v1/chat/completions", {
    method: "POST",
    headers: { ...headers(key), "Content-Type": "application/json" },
    body: JSON.stringify({ ...request, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  if (!response.ok) throw await readError(response);
  const result = { finishReason: null, tokens: 0 };
  for await (const data of readEvents(response.body)) {
    if (data === "[DONE]") return result;
    const event = JSON.parse(data);
    if (event.error) throw new ApiError(0, event.error.message);
    if (event.usage) result.tokens = event.usage.completion_tokens;
    const choice = event.choices[0];
    if (choice?.delta.content) onText(choice.delta.content);
    if (choice?.finish_reason) result.finishReason = choice.finish_reason;
  }
  throw new TypeError("the stream ended before its end");
}

async function* readEvents(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    held += value;
    const events = held.split("\n\n");
    held = events.pop();
    for (const event of events) {
      if (event.startsWith("data: ")) yield event.slice("data: ".length);
    }
  }
}

function headers(key) {
  return key ? { Authorization: `Bearer ${key}` } : {};
}

async function readError(response) {
  const text = await response.text();
  try {
    return new ApiError(response.status, JSON.parse(text).error.message);
  } catch {
    return new ApiError(response.status, `${response.status} ${text.slice(0, 200)}`);
  }
}

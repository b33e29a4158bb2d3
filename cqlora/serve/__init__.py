"""A model over HTTP: OpenAI's API, a chat page, a queue in front of one batch."""

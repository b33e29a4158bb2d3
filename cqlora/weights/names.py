"""Names of the two embedding matrices in a LLaMA's files; a tied model has the first alone."""

INPUT, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"

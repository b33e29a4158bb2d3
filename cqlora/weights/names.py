"""Names of the two embedding matrices in a LLaMA's files; a tied model has the first alone."""

INPUT, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
DERIVED = "rotary_emb.inv_freq"
"""End of the names of frequencies that old LLaMA folders store though the configuration gives them."""

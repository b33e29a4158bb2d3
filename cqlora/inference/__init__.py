"""Generation: a LLaMA decoder of our own, loaded by mapping, with replies that share a batch."""

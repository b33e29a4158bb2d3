"""The training run itself, in each of its workers."""

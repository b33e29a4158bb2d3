"""QLoRA of LLaMA models in Chinese: compose, plan, train, evaluate, merge, serve."""

__version__ = "0.1.0"

"""QLoRA of LLaMA models in Chinese: compose, plan, train, evaluate, merge, serve."""

import logging

__version__ = "0.1.0"

# bitsandbytes warns at import that a kernel of the hub is missing, on every processor that it has one for.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

"""The base and its adapters: loading, attention, loss, placement."""

import logging

# bitsandbytes warns at import that a kernel of the hub is missing, on every processor that it has one for.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

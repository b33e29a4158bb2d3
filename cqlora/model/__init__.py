"""The base and its adapters: loading, attention, loss, placement."""

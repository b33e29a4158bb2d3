"""Streaming conversion, extension and merging of weight files."""

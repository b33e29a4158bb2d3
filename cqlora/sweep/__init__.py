"""Comparing runs: what became of each job of a sweep, which were best, what to try next; files are all it reads."""

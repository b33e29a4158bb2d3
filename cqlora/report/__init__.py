"""One self-contained HTML page of a run, or of a sweep: what it bought, what it cost, and how it was made.

It reads files that runs, sweeps and `cqlora evaluate` have written, and nothing of theirs is imported.
"""

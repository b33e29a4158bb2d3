"""Memory and time of a run before it is launched, from its configuration alone; no torch."""

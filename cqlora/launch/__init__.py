"""From a configuration that is right to a run that goes on: settled, checked against this machine, started."""

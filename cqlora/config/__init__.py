"""The typed configuration: its fields and defaults, how it is composed, how mistakes are reported. No torch here."""

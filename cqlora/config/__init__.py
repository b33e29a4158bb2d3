"""The typed configuration: its fields and defaults, how it is composed, how mistakes are told. No torch here."""

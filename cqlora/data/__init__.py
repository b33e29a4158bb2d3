"""From sources to a token cache: read, clean, mix, encode, pack."""

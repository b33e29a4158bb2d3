"""The bytes behind a vocabulary's pieces: the alphabet of byte-level BPE, and how SentencePiece writes text."""


def byte_letters() -> list[str]:
    """The letter that byte-level BPE writes for each byte (openai/gpt-2, encoder.py, `bytes_to_unicode`)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte if byte in printable else 256 + others.index(byte)) for byte in range(256)]


_LETTERS = frozenset(byte_letters())
_BYTE_OF = {ord(letter): byte for byte, letter in enumerate(byte_letters())}
_BYTE_PIECE_LENGTH = len("<0x00>")


def piece_bytes(piece: str, byte_level: bool) -> bytes:
    """The bytes of text that a piece of a byte-level or of a SentencePiece vocabulary stands for."""
    if byte_level:
        spelled = _LETTERS.issuperset(piece)
        return piece.translate(_BYTE_OF).encode("latin-1") if spelled else piece.encode()
    if len(piece) == _BYTE_PIECE_LENGTH and piece.startswith("<0x") and piece.endswith(">"):
        return bytes([int(piece[3:5], 16)])
    return piece.replace("▁", " ").encode()

"""Sizes as people type them. No torch."""

from cqlora.errors import ConfigError

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}


def parse_size(key: str, text: str) -> int:
    """Bytes of a size such as `4GB` or `500MiB`.

    Raises:
        ConfigError: `text` is no size above zero.
    """
    typed = text.strip().upper()
    number = typed.rstrip("KMGIB")
    try:
        size = int(float(number) * _UNITS[typed[len(number) :].strip()])
    except (ValueError, KeyError, OverflowError):
        size = 0
    if size <= 0:
        raise ConfigError(f"{key}={text} is not a size; use for instance {key}=4GB.")
    return size

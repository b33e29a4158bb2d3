"""What bytes are that are no UTF-8: much Chinese text on people's disks is GB18030."""

import codecs

_LOOKED_AT = 1 << 16
_COMMON = range(0xA1, 0xD8)
"""First bytes of GB 2312's punctuation and of its 3,755 common characters; accented letters of Latin 1 lie above."""
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def describe_undecodable(raw: bytes) -> str:
    """Why bytes cannot be read as text, and what to type where their encoding shows."""
    encoding = "UTF-16" if raw.startswith(_UTF16) else "GB18030" if is_gb18030(raw) else ""
    if not encoding:
        return "not UTF-8"
    return f"{encoding} and not UTF-8, to which `iconv -f {encoding} -t UTF-8 FILE` converts"


def is_gb18030(raw: bytes) -> bool:
    """Whether bytes, taken for GB18030 (and so for GBK and GB 2312), are mostly Chinese beside ASCII."""
    try:
        text = codecs.getincrementaldecoder("gb18030")().decode(raw[:_LOOKED_AT])
    except UnicodeDecodeError:
        return False
    leads = [character.encode("gb18030")[0] for character in text if not character.isascii()]
    return 2 * sum(lead in _COMMON for lead in leads) > len(leads)

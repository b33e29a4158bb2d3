"""What this processor has that decides how a model is computed; CQLORA_CPU_FEATURES hides it. No torch at import.

Every part that chooses by the processor asks here, so that one variable makes any machine compute as another does.
What torch and oneDNN choose by themselves is hidden from them by ATEN_CPU_CAPABILITY and ONEDNN_MAX_CPU_ISA.
"""

import os
import platform
from enum import Enum
from functools import cache
from pathlib import Path

from cqlora.errors import ConfigError

SWITCH = "CQLORA_CPU_FEATURES"
"""Environment variable with one of Features' names."""

_FLAGS = ("flags", "Features")
"""How /proc/cpuinfo calls them on x86 and on Arm."""
_UNITS = {"avx512_bf16", "amx_bf16", "bf16"}
_ONEDNN_WITHOUT_UNITS = {"SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX512_CORE", "AVX512_CORE_VNNI"}


class Features(Enum):
    """What is taken to be there."""

    all = "all"
    """What the processor has."""
    plain = "plain"
    """float32 alone: no bfloat16 units, no layout of oneDNN's, no fused NF4 product."""
    bfloat16 = "bfloat16"
    """bfloat16 is what suits, emulated where there are no units for it; no fused NF4 product."""


def read_features() -> Features:
    """What the environment asks for.

    Raises:
        ConfigError: a name that is none of Features.
    """
    name = os.environ.get(SWITCH) or Features.all.value
    try:
        return Features(name)
    except ValueError:
        names = ", ".join(each.value for each in Features)
        raise ConfigError(f"{SWITCH}={name} is unknown; use one of {names}, or unset it.") from None


def suits_bfloat16() -> bool:
    """Whether to train in bfloat16 unasked: where the processor multiplies it (AMX, AVX512-BF16, Arm's BF16)."""
    features = read_features()
    if features is not Features.all:
        return features is Features.bfloat16
    return _has_units() and os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper() not in _ONEDNN_WITHOUT_UNITS


def suits_bfloat16_matrices() -> bool:
    """Whether to generate from bfloat16 matrices unasked: a product of few rows is as slow as the matrix is large.

    oneDNN reads them from AVX512 on, by way of float32 where there are no units.
    """
    return read_features() is Features.bfloat16 or packs_bfloat16()


def packs_bfloat16() -> bool:
    """Whether oneDNN can lay bfloat16 matrices out in its own order."""
    if read_features() is Features.plain:
        return False
    import torch

    ask = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return ask is not None and bool(ask())


def may_fuse_nf4() -> bool:
    """Whether bitsandbytes' fused NF4 product may be used where the processor has it."""
    return read_features() is Features.all


def describe_processor() -> list[str]:
    """What tells a kind of processor from others: its name, and what it has."""
    return [platform.machine(), *(_first_line(names) for names in (("model name", "CPU part"), _FLAGS))]


@cache
def _has_units() -> bool:
    return bool(_UNITS & set(_first_line(_FLAGS).split()))


def _first_line(names: tuple[str, ...]) -> str:
    """The first line of /proc/cpuinfo that begins with one of these; "" where there is none."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return ""
    return next((line for line in text.splitlines() if line.startswith(names)), "")

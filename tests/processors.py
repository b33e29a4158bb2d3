"""`make test-processors`: the tests that choose by the processor, as on processors that this one is not."""

import os
import subprocess
import sys

from cqlora.system.processor import SWITCH, packs_bfloat16, suits_bfloat16

PROCESSORS = {
    "plain": {SWITCH: "plain", "ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "bfloat16": {SWITCH: "bfloat16"},
}
"""What hides the units of this processor, or takes those to be there that it lacks."""


def name_others(suits: bool, packs: bool) -> list[str]:
    """The processors that this one is not: `make test` has run the tests as on this one."""
    own = "bfloat16" if suits else "" if packs else "plain"
    return [name for name in PROCESSORS if name != own]


def main() -> None:
    """Run them; the arguments are pytest's."""
    for name in name_others(suits_bfloat16(), packs_bfloat16()):
        print(f"as on a processor of the kind {name}", flush=True)
        command = [sys.executable, "-m", "pytest", "-m", "processor", *sys.argv[1:]]
        if code := subprocess.run(command, env={**os.environ, **PROCESSORS[name]}, check=False).returncode:
            sys.exit(code)


if __name__ == "__main__":
    main()

"""Which model to generate with and how it is held: the keys that `chat` and `serve` share."""

import logging
import math
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import MISSING

from cqlora.architectures import Part, require_known
from cqlora.base import fingerprint_tokenizer, fingerprint_weights, read_base
from cqlora.config.checks import check_fields
from cqlora.errors import ConfigError
from cqlora.inference.damage import described_as_damage
from cqlora.inference.requests import check_held
from cqlora.lineage import check_fingerprints
from cqlora.system.machine import list_gpus

if TYPE_CHECKING:
    from cqlora.engine import LlamaEngine

LLAMA_CPP = "For speed on a processor there is llama.cpp: `cqlora merge` with format=gguf writes the file it reads."
VLLM = "For speed on GPUs, and many users, there is vLLM: "


@dataclass(kw_only=True, slots=True)
class EngineConfig:
    """A model's folders and form."""

    base: str = MISSING
    """A merged model's folder, or the base's with `adapter`."""
    adapter: str = ""
    """An adapter's folder; empty where the base is a merged model."""
    quantization: str = "auto"
    """auto: an adapter's base as it was trained on, a merged model as it is; nf4; none."""
    dtype: str = "auto"
    """auto (what computes fastest here), float32, bfloat16."""
    device: str = "auto"
    """auto, cpu, cuda, or one GPU such as cuda:1."""
    cache: bool = True
    """Keep a snapshot, in the user's cache folder, that the next start maps."""
    prefix_cache_gib: float = 1.0
    """Memory in which keys and values of ended replies wait for prompts that begin with the same tokens; 0 is none."""

    def __post_init__(self) -> None:
        check_fields(self, paths=("base", "adapter"), filled=("base",))
        check_held(self.quantization, self.dtype, self.device)
        if not 0 <= self.prefix_cache_gib < math.inf:
            raise ConfigError(f"prefix_cache_gib={self.prefix_cache_gib} is no size; give GiB, or 0 to keep nothing.")

    def check_folders(self) -> None:
        """Raise for what can be known to be wrong without torch: missing folders, another base's adapter."""
        with described_as_damage(Path(self.base), Path(self.adapter) if self.adapter else None):
            self._check_folders()

    def _check_folders(self) -> None:
        base = read_base(self.base)
        require_known(Part.engine, base.config, base.path)
        if not self.adapter:
            return
        adapter = Path(self.adapter)
        if not (adapter / "adapter_config.json").is_file():
            raise ConfigError(
                f"adapter={adapter} has no adapter_config.json; give the adapter/ folder of a finished run."
            )
        check_fingerprints(adapter, fingerprint_tokenizer(base.path), fingerprint_weights(base.path))

    def name_faster(self) -> str:
        """The program that is faster with this model on its device, and how it gets the model, in one line.

        Asked of the driver and not of torch, which may still be being imported.
        """
        if self.device == "cpu" or (self.device == "auto" and not list_gpus()):
            return LLAMA_CPP
        if not self.adapter:
            return f"{VLLM}`vllm serve {shlex.quote(self.base)}`."
        merge = shlex.join(
            ["cqlora", "merge", f"base={self.base}", f"adapter={self.adapter}", "output_dir=models/merged"]
        )
        return f"{VLLM}`{merge}`, then `vllm serve models/merged`."

    def load_engine(self) -> "LlamaEngine":
        """The engine of these folders.

        Raises:
            ModelError: they cannot be read or do not belong together.
        """
        from cqlora.engine import LlamaEngine

        # It warns of a kernel package that it would fetch from the net; the one that it has is the one in use.
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        folders = (self.adapter, self.base) if self.adapter else (self.base, "")
        return LlamaEngine(
            *folders,
            use_lora=bool(self.adapter),
            quantization=self.quantization,
            dtype=self.dtype,
            device=self.device,
            cache=self.cache,
            prefix_cache_gib=self.prefix_cache_gib,
        )

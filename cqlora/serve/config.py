"""The schema of `cqlora serve`; every default stands here."""

from dataclasses import dataclass
from pathlib import Path

from omegaconf import MISSING

from cqlora.errors import ConfigError

_CHOICES = {"quantization": ("auto", "nf4", "none"), "dtype": ("auto", "float32", "bfloat16")}
_KINDS = {"base": "a Hugging Face model", "adapter": "a trained adapter"}


@dataclass(kw_only=True, slots=True)
class ServeConfig:
    """What is served, where, and to how many at once. The API key stands in the environment only."""

    base: str = MISSING
    """Folder of a merged model, or of the base that `adapter` was trained on."""
    adapter: str = ""
    """Folder of an adapter; empty serves the base as it is."""
    quantization: str = "auto"
    """auto takes the base as the adapter was trained on it, and a merged model as it is; nf4; none."""
    dtype: str = "auto"
    """What is computed in: auto (the fastest here), float32, bfloat16."""
    device: str = "auto"
    """auto takes a GPU where there is one; cpu; cuda:0."""
    cache: bool = False
    """Keep a snapshot of the quantised weights that the next start maps."""
    name: str = ""
    """The name by which clients ask for the model; empty takes the folder's."""
    host: str = "127.0.0.1"
    """Any address but a loopback one demands CQLORA_API_KEY in the environment."""
    port: int = 8000
    """0 takes a free one."""
    slots: int = 8
    """Replies that are generated together."""
    queue: int = 32
    """Requests that may wait for a slot; one more is answered 429."""
    max_tokens: int = 1024
    """Longest reply that a request may ask for, in tokens, and the default of one that does not say."""
    timeout: float = 300.0
    """Seconds that a request may take, waiting included."""
    grace: float = 30.0
    """Seconds that replies have to finish after SIGTERM."""

    def __post_init__(self) -> None:
        for key in ("base", "adapter"):
            folder = getattr(self, key)
            if folder and not Path(folder).is_dir():
                raise ConfigError(f"{key}={folder} is no folder; give {key}=FOLDER of {_KINDS[key]}.")
        for key, choices in _CHOICES.items():
            if getattr(self, key) not in choices:
                raise ConfigError(f"{key}={getattr(self, key)} is unknown; use {', '.join(choices)}.")
        for key, least in (("port", 0), ("slots", 1), ("queue", 0), ("max_tokens", 1), ("grace", 0)):
            if getattr(self, key) < least:
                raise ConfigError(f"{key}={getattr(self, key)} cannot be served with; give {least} or more.")
        if self.port > 65535:
            raise ConfigError(f"port={self.port} is no port; give one from 0 to 65535.")
        if self.timeout <= 0:
            raise ConfigError(f"timeout={self.timeout:g} leaves no time to reply in; give seconds above 0.")

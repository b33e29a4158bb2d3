"""The schema of `cqlora serve`; every default stands here."""

from dataclasses import dataclass

from cqlora.engine_config import EngineConfig
from cqlora.errors import ConfigError


@dataclass(kw_only=True, slots=True)
class ServeConfig(EngineConfig):
    """What is served, where, and to how many at once. The API key stands in the environment only."""

    name: str = ""
    """The name by which clients ask for the model; empty takes the folder's."""
    host: str = "127.0.0.1"
    """Any address but a loopback one demands CQLORA_API_KEY in the environment."""
    port: int = 8000
    """0 takes a free one."""
    prefix_cache_gib: float = 0.0
    """Memory in which keys and values of ended replies wait for prompts that begin alike; nothing unless asked for,
    since a first token that comes early tells what others have sent."""
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
        EngineConfig.__post_init__(self)
        for key, least in (("port", 0), ("slots", 1), ("queue", 0), ("max_tokens", 1), ("grace", 0)):
            if getattr(self, key) < least:
                raise ConfigError(f"{key}={getattr(self, key)} cannot be served with; give {least} or more.")
        if self.port > 65535:
            raise ConfigError(f"port={self.port} is no port; give one from 0 to 65535.")
        if not self.timeout > 0:
            raise ConfigError(f"timeout={self.timeout:g} leaves no time to reply in; give seconds above 0.")

"""`python -m cqlora.chat`: a conversation in the terminal, streamed, which Ctrl-C interrupts and does not end."""

import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from cqlora.base import fingerprint_tokenizer, fingerprint_weights, read_base
from cqlora.cli import run_program
from cqlora.errors import ConfigError
from cqlora.inference.requests import Sampling
from cqlora.inference.terminal import Conversation, open_terminal, talk
from cqlora.preflight import check_fingerprints


@dataclass(kw_only=True, slots=True)
class ChatConfig:
    """Whom to talk to, and how replies are sampled."""

    base: str = MISSING
    """A merged model's folder, or the base's with `adapter`."""
    adapter: str = ""
    system: str = ""
    """What stands before the conversation, in the role of the system."""
    quantization: str = "auto"
    """auto: an adapter's base as it was trained on, a merged model as it is; nf4; none."""
    dtype: str = "auto"
    """auto (what computes fastest here), float32, bfloat16."""
    device: str = "auto"
    cache: bool = True
    """Keep a snapshot, in the user's cache folder, that the next start maps."""
    max_new_tokens: int = 512
    temperature: float = 0.7
    """0 takes the likeliest token each time."""
    top_p: float = 0.9
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        for key, choices in (("quantization", ("auto", "nf4", "none")), ("dtype", ("auto", "float32", "bfloat16"))):
            if getattr(self, key) not in choices:
                raise ConfigError(f"{key}={getattr(self, key)} is unknown; use {', '.join(choices)}.")
        self.sampling()

    def sampling(self) -> Sampling:
        """The fields that say how a reply is sampled, checked."""
        return Sampling(
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            repetition_penalty=self.repetition_penalty,
            seed=self.seed,
        )


def chat(config: ChatConfig) -> None:
    """Check the folders, then load the model while the first message is being typed."""
    check_folders(config)
    with ThreadPoolExecutor(max_workers=1) as loader:
        engine = loader.submit(load_engine, config)
        talk(Conversation(config.system), engine.result, config.sampling(), open_terminal())


def check_folders(config: ChatConfig) -> None:
    """Raise ModelError for what can be known to be wrong without torch: missing folders, another base's adapter."""
    base = read_base(config.base)
    if not config.adapter:
        return
    adapter = Path(config.adapter)
    if not (adapter / "adapter_config.json").is_file():
        raise ConfigError(f"adapter={adapter} has no adapter_config.json; give the adapter/ folder of a finished run.")
    check_fingerprints(adapter, fingerprint_tokenizer(base.path), fingerprint_weights(base.path))


def load_engine(config: ChatConfig):  # type: ignore[no-untyped-def]  # its type would import torch here
    """The engine of the configured folders."""
    from cqlora.engine import LlamaEngine

    # It warns of a kernel package that it would fetch from the net; the one that it has is the one in use.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    folders = (config.adapter, config.base) if config.adapter else (config.base, "")
    return LlamaEngine(
        *folders,
        use_lora=bool(config.adapter),
        quantization=config.quantization,
        dtype=config.dtype,
        device=config.device,
        cache=config.cache,
    )


def main() -> None:
    """The verb `chat`."""
    ConfigStore.instance().store(name="chat_schema", node=ChatConfig)
    run_program("chat", ChatConfig, chat)


if __name__ == "__main__":
    main()

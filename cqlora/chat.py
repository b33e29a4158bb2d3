"""`python -m cqlora.chat`: a conversation in the terminal, streamed, which Ctrl-C interrupts and does not end."""

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from hydra.core.config_store import ConfigStore

from cqlora.cli import run_program
from cqlora.config.checks import require_used
from cqlora.engine_config import EngineConfig
from cqlora.inference.requests import Sampling
from cqlora.inference.terminal import Conversation, open_terminal, talk

_DEFAULT = Sampling()


@dataclass(kw_only=True, slots=True)
class ChatConfig(EngineConfig):
    """Whom to talk to, and how replies are sampled."""

    system: str = ""
    """What stands before the conversation, in the role of the system."""
    max_new_tokens: int = _DEFAULT.max_new_tokens
    """Longest reply, in tokens."""
    temperature: float = _DEFAULT.temperature
    """0 takes the likeliest token each time."""
    top_p: float = _DEFAULT.top_p
    """Sample among the fewest likeliest tokens that together have this probability; 1 is all."""
    top_k: int = _DEFAULT.top_k
    """Sample among this many likeliest tokens; 0 is all."""
    repetition_penalty: float = _DEFAULT.repetition_penalty
    """Divides the positive logits of tokens already in prompt or reply, multiplies the negative (1909.05858)."""
    seed: int | None = _DEFAULT.seed
    """The same seed, prompt and model give the same reply; null takes another each time."""

    def __post_init__(self) -> None:
        EngineConfig.__post_init__(self)
        self.sampling()
        for key in ("top_p", "top_k", "seed"):
            require_used(self, key, self.temperature > 0, "a temperature above 0")

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
    config.check_folders()
    with ThreadPoolExecutor(max_workers=1) as loader:
        engine = loader.submit(config.load_engine)
        talk(Conversation(config.system), engine.result, config.sampling(), open_terminal(), config.name_faster())
        if not engine.done():
            leave()


def leave() -> None:
    """End the process with code 0 without waiting: a thread inside torch when Python shuts down would abort it."""
    sys.stdout.flush()
    os._exit(0)


def main() -> None:
    """The verb `chat`."""
    ConfigStore.instance().store(name="chat_schema", node=ChatConfig)
    run_program("chat", ChatConfig, chat)


if __name__ == "__main__":
    main()

"""`python -m cqlora.chat`: a conversation in the terminal, streamed, which Ctrl-C interrupts and does not end."""

import threading
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hydra.core.config_store import ConfigStore

from cqlora.cli import run_program
from cqlora.engine_config import EngineConfig
from cqlora.inference.requests import Sampling
from cqlora.inference.terminal import Conversation, open_terminal, talk

if TYPE_CHECKING:
    from cqlora.engine import LlamaEngine


@dataclass(kw_only=True, slots=True)
class ChatConfig(EngineConfig):
    """Whom to talk to, and how replies are sampled."""

    system: str = ""
    """What stands before the conversation, in the role of the system."""
    max_new_tokens: int = 512
    temperature: float = 0.7
    """0 takes the likeliest token each time."""
    top_p: float = 0.9
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        EngineConfig.__post_init__(self)
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
    config.check_folders()
    engine = load_meanwhile(config)
    talk(Conversation(config.system), engine.result, config.sampling(), open_terminal())


def load_meanwhile(config: ChatConfig) -> "Future[LlamaEngine]":
    """The engine to come; the program's end does not wait for it, as it would for an executor's thread."""
    engine: Future[LlamaEngine] = Future()

    def load() -> None:
        try:
            engine.set_result(config.load_engine())
        except BaseException as error:  # noqa: BLE001 - raised where the engine is asked for
            engine.set_exception(error)

    threading.Thread(target=load, daemon=True).start()
    return engine


def main() -> None:
    """The verb `chat`."""
    ConfigStore.instance().store(name="chat_schema", node=ChatConfig)
    run_program("chat", ChatConfig, chat)


if __name__ == "__main__":
    main()

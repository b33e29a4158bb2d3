"""`python -m cqlora.fetch`: brings the small real base model and makes it a Hugging Face folder."""

from dataclasses import dataclass
from pathlib import Path

from hydra.core.config_store import ConfigStore

from cqlora.base import read_base, read_card
from cqlora.cli import run_program
from cqlora.config.checks import check_fields


@dataclass(kw_only=True, slots=True)
class FetchConfig:
    """Where the model goes."""

    output_dir: str = "models/smollm2_135m"
    """Folder that the model is written to."""

    def __post_init__(self) -> None:
        check_fields(self, paths=("output_dir",), filled=("output_dir",))


def fetch(config: FetchConfig) -> None:
    """Fetch SmolLM2-135M-Instruct unless it is there, and say so."""
    folder = Path(config.output_dir)
    card = read_card(folder)
    if "SmolLM2" in card.get("source", "") and "first_added_row" not in card:
        read_base(folder)
        print(f"{folder} is already there.")
        return
    from cqlora.weights.fetch import fetch_smollm2

    fetch_smollm2(folder)
    print(f"{folder} holds SmolLM2-135M-Instruct: 134.5M parameters, 49,152 tokens, float16.")


def main() -> None:
    """The verb `fetch`."""
    ConfigStore.instance().store(name="fetch_schema", node=FetchConfig)
    run_program("fetch", FetchConfig, fetch)


if __name__ == "__main__":
    main()

"""`python -m cqlora.push`: an adapter or a merged model to a hub, or what would be uploaded."""

import re
from dataclasses import dataclass
from pathlib import Path

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from cqlora.cli import run_program
from cqlora.config.checks import check_fields, require_used
from cqlora.errors import ConfigError

HUB = "https://huggingface.co"
_REPO = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_HERE = re.compile(r"http://(localhost|127\.0\.0\.1|\[::1\])(:\d+)?/?")


@dataclass(kw_only=True, slots=True)
class PushConfig:
    """What is uploaded, and where to."""

    folder: str = MISSING
    """Folder of an adapter or a merged model."""
    repo: str = MISSING
    """ORGANISATION/NAME on the hub; it is made where it is not there."""
    license: str = ""
    """Licence that the model card gets, such as apache-2.0, where its front matter names none."""
    base_model: str = ""
    """ORGANISATION/NAME of the base on the hub, which the model card gets where it names none."""
    private: bool = False
    """Make a new repository private."""
    endpoint: str = HUB
    """Address of the hub, or of one like it; HF_ENDPOINT, which may be a mirror for reading, is not asked."""
    message: str = "Upload by cqlora"
    """The commit's message."""
    dry_run: bool = False
    """Say what would be uploaded, ask nothing of any hub."""

    def __post_init__(self) -> None:
        check_fields(self, paths=("folder",), filled=("folder", "repo", "endpoint", "message"))
        for key in ("repo", "base_model"):
            name = getattr(self, key)
            if name and not _REPO.fullmatch(name):
                raise ConfigError(f"{key}={name} is no name on a hub; use {key}=ORGANISATION/NAME.")
        if not self.endpoint.startswith("https://") and not _HERE.fullmatch(self.endpoint):
            raise ConfigError(f"endpoint={self.endpoint} would be sent your token unencrypted; use https://….")
        require_used(self, "private", not self.dry_run, "dry_run=false")


def push(config: PushConfig) -> None:
    """Check the folder, tell its files, and upload them."""
    from cqlora.publication import gather, tell, upload

    publication = gather(Path(config.folder), config.license, config.base_model)
    print(tell(publication))
    if config.dry_run:
        print(f"dry run: nothing was sent to {config.endpoint}/{config.repo}.")
        return
    address = upload(publication, config.repo, config.endpoint, config.private, config.message)
    print(f"{address} has them.")


def main() -> None:
    """The verb `push`."""
    ConfigStore.instance().store(name="push_schema", node=PushConfig)
    run_program("push", PushConfig, push)


if __name__ == "__main__":
    main()

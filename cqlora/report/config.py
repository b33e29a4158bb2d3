"""The schema of `cqlora report`; every default stands here."""

import os
from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING

from cqlora.config.checks import check_fields, check_path, require_used
from cqlora.errors import ConfigError


@dataclass(kw_only=True, slots=True)
class ReportConfig:
    """What the page shows, and where it goes."""

    folder: Any = MISSING
    """Folder of a run or of a sweep; several runs are compared: [outputs/a,outputs/b]."""
    output: str = ""
    """File to write; empty writes report.html into the first folder, or comparison.html here for several."""
    watch: bool = False
    """Serve the page to this machine's browsers instead of writing it, and follow runs that are going on."""
    port: int = 8010
    """Of watch=true; 0 takes a free one."""

    def __post_init__(self) -> None:
        check_fields(self, paths=("output",))
        self.folder = [self.folder] if isinstance(self.folder, str) else self.folder
        whole = isinstance(self.folder, list) and all(isinstance(each, str) and each.strip() for each in self.folder)
        if not whole or not self.folder:
            raise ConfigError(f"folder={self.folder} names no folder; use folder=FOLDER or folder=[FIRST,SECOND].")
        self.folder = [os.path.expanduser(each) for each in self.folder]
        for each in self.folder:
            check_path("folder", each)
        if self.output and not self.output.endswith(".html"):
            raise ConfigError(f"output={self.output} is to be a page; give a name that ends in .html.")
        require_used(self, "port", self.watch, "watch=true")
        require_used(self, "output", not self.watch, "watch=false")
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port={self.port} is no port; give one from 0 to 65535.")

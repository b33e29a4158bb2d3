"""Composing a configuration: Hydra's loader, with mistakes reported by file and line, and secrets refused."""

from codecs import BOM_UTF8
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import hydra._internal.hydra as hydra_internals
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import ConfigRepository, IConfigRepository
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.default_element import ResultDefault
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import setup_globals
from hydra.errors import HydraException
from hydra.plugins.config_source import ConfigLoadError, ConfigResult, ConfigSource
from hydra.types import RunMode
from hydra.version import VersionBase, setbase
from omegaconf import DictConfig, OmegaConf
from omegaconf.basecontainer import BaseContainer
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from cqlora.config.base_shape import register_resolver
from cqlora.config.diagnosis import explain_composition, find_misfit, missing_keys, name_missing_line
from cqlora.config.files import describe_damage, holds_key, locate_key, locate_words, name_file
from cqlora.config.schema import CONFIG_DIR, register_schemas
from cqlora.config.secrets import (
    guard_environment,
    holds_secret,
    raise_refusal,
    refusal,
    refuse_secret_values,
    refuse_secrets,
)
from cqlora.errors import ConfigError

_COMPOSING_ERRORS = (
    HydraException,
    OmegaConfBaseException,
    ConfigLoadError,
    ValueError,
    TypeError,
    OverflowError,
    AssertionError,
)
"""What Hydra and OmegaConf raise for configurations that they cannot make sense of."""


class CheckedRepository(ConfigRepository):
    """Hydra's files, with a sentence for one that cannot be read."""

    def load_config(self, config_path: str) -> ConfigResult | None:
        """As Hydra's; ConfigError for a file that is no YAML with keys at its top."""
        file = self.find_file(config_path)
        if file is None:
            return super().load_config(config_path)
        try:
            loaded = super().load_config(config_path)
        except (YAMLError, OmegaConfBaseException, ValueError, TypeError, OSError, RecursionError) as error:
            raise ConfigError(describe_damage(file, error)) from error
        if file.read_bytes().startswith(BOM_UTF8):
            raise ConfigError(f"{name_file(file)} begins with a byte order mark; save it as UTF-8 without one.")
        if loaded is not None and not isinstance(loaded.config, DictConfig):
            raise ConfigError(f"{name_file(file)} holds no keys; write one key: value a line.")
        return loaded

    def find_file(self, config_path: str | None) -> Path | None:
        """The file that Hydra's name stands for; None for a schema."""
        if config_path is None:
            return None
        source = next((source for source in self.sources if source.is_config(config_path)), None)
        if source is None or source.scheme() != "file":
            return None
        return Path(source.path, ConfigSource._normalize_file_name(config_path))


class Composer(ConfigLoaderImpl):
    """Hydra's loader over checked files: every composition, of a run, of a sweep and of each of its jobs, is its."""

    def __init__(self, config_search_path: ConfigSearchPath, schema: type) -> None:
        super().__init__(config_search_path)
        self.repository: CheckedRepository = CheckedRepository(config_search_path)
        self.schema = schema
        self.merging: ResultDefault | None = None
        self.merged: Any = {}
        self.overrides: list[str] = []

    def load_configuration(
        self,
        config_name: str | None,
        overrides: list[str],
        run_mode: RunMode,
        from_shell: bool = True,
        validate_sweep_overrides: bool = True,
    ) -> DictConfig:
        """As Hydra's.

        Raises:
            ConfigError: what is composed is wrong, or a secret is in it.
        """
        # Here too, since a launcher's job composes again in a process of its own.
        guard_environment()
        register_resolver()
        refuse_secrets(overrides)
        self.merging = None
        try:
            for_all = leave_to_jobs(overrides) if run_mode is RunMode.MULTIRUN else overrides
            composed = super().load_configuration(config_name, for_all, run_mode, from_shell, validate_sweep_overrides)
        except _COMPOSING_ERRORS as error:
            raise_refusal(error)
            sentence = self.explain(error, overrides)
            raise (refusal("") if holds_secret(sentence) else ConfigError(sentence)) from error
        refuse_secret_values(composed)
        if for_all != overrides:
            composed.hydra.overrides.task = [each for each in overrides if not each.startswith("hydra")]
        self.refuse_missing(composed)
        return composed

    def refuse_missing(self, composed: DictConfig) -> None:
        """Raise ConfigError for a key that a file of one's own had to give, and does not even leave to be typed."""
        for group, choice in composed.hydra.runtime.choices.items():
            file = self.repository.find_file(f"{group}/{choice}")
            if group not in composed or file is None or file.is_relative_to(CONFIG_DIR):
                continue
            for key in missing_keys(composed[group], f"{group}."):
                if not holds_key(file, key.removeprefix(f"{group}.")):
                    parent = key.rpartition(".")[0]
                    place = f"{name_file(file)}, line 1" if parent == group else locate_key(file, parent)
                    raise ConfigError(f"{place}: {name_missing_line(key, str(choice))}")

    def explain(self, error: Exception, overrides: list[str]) -> str:
        """The sentence for what went wrong: in a file, or on the command line."""
        self.overrides = overrides
        misfit = find_misfit(self.merged, self.schema) if self.merging else None
        if misfit is not None:
            return f"{self.place_of(misfit[0])}{misfit[0]} is {misfit[1]}."
        return explain_composition(error, self.schema, overrides, self.place_of)

    def _load_single_config(self, default: ResultDefault, repo: IConfigRepository) -> ConfigResult:
        self.merging = default
        loaded = super()._load_single_config(default, repo)
        self.merged = OmegaConf.to_container(loaded.config) if self.repository.find_file(default.config_path) else {}
        return loaded

    def _compose_config_from_defaults_list(self, defaults: list[ResultDefault], repo: IConfigRepository) -> DictConfig:
        composed = super()._compose_config_from_defaults_list(defaults, repo)
        # What fails from here on is the command line's.
        self.merging = None
        return composed

    def place_of(self, key: str, config_path: str | None = None) -> str:
        """`FILE, line N: ` of a key in the file that was being merged, or of a word in a named one; empty for none."""
        if config_path is None:
            file = self.repository.find_file(self.merging.config_path if self.merging else None)
            return f"{locate_key(file, key)}: " if file else ""
        # An override in a chosen file's defaults is said to be the primary one's.
        chosen = [override.lstrip("+").replace("=", "/", 1) for override in self.overrides]
        files = [file for path in (*chosen, config_path) if (file := self.repository.find_file(path))]
        return next((f"{place}: " for file in files if (place := locate_words(file, key))), "")


def leave_to_jobs(overrides: list[str]) -> list[str]:
    """The overrides that hold for all jobs of a sweep: of `stage=pretrain,sft stage.KEY=1`, the first stage alone.

    What a swept group has below it is each job's own, and is composed with it.
    """
    parsed = OverridesParser.create().parse_overrides(overrides)
    groups = {each.key_or_group for each in parsed if each.is_sweep_override() and each.is_choice_sweep()}
    groups = {group for group in groups if "." not in group and group != "seed"}
    kept = []
    for override in parsed:
        if override.key_or_group in groups:
            kept.append(f"{override.key_or_group}={next(iter(override.sweep_string_iterator()))}")
        elif override.key_or_group.partition(".")[0] not in groups:
            kept.append(str(override.input_line))
    return kept


@contextmanager
def compose_checked(schema: type) -> Iterator[None]:
    """Let Hydra's programs compose with `Composer`; Hydra has no hook that may refuse a composition."""
    plain = vars(hydra_internals)["ConfigLoaderImpl"]
    vars(hydra_internals)["ConfigLoaderImpl"] = partial(Composer, schema=schema)
    try:
        yield
    finally:
        vars(hydra_internals)["ConfigLoaderImpl"] = plain


@contextmanager
def compose_alone(config_name: str, schema: type, overrides: list[str]) -> Iterator[DictConfig]:
    """A composition outside Hydra's programs, to be read in the block, with what is Hydra's own in `hydra`.

    The program around it may use Hydra itself: its GlobalHydra is not looked at, and what is global of Hydra's and
    OmegaConf's is put back.

    Raises:
        ConfigError: as `Composer`, and for several values where one run is meant.
    """
    resolvers, version = dict(BaseContainer._resolvers), VersionBase.instance().version_base
    try:
        setbase("1.3")
        setup_globals()
        register_schemas()
        refuse_several(overrides)
        composer = Composer(create_config_search_path(str(CONFIG_DIR.resolve())), schema)
        yield composer.load_configuration(config_name, overrides, RunMode.RUN, from_shell=False)
    finally:
        BaseContainer._resolvers = resolvers
        VersionBase.instance().version_base = version


def refuse_several(overrides: list[str]) -> None:
    """Raise ConfigError for a sweep's override, such as `seed=1,2`."""
    refuse_secrets(overrides)
    # A word that is no override at all is reported when it is composed.
    with suppress(HydraException):
        for override in OverridesParser.create().parse_overrides(overrides):
            if override.is_sweep_override():
                raise ConfigError(f"`{override.input_line}` has several values; call train() once with each.")

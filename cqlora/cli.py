"""Every verb is a Hydra program: `run_program` is what they share, `main` is the console script `cqlora VERB`."""

import importlib
import os
import re
import runpy
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

from cqlora.config.secrets import guard_environment, raise_refusal, refuse_secret_values, refuse_secrets
from cqlora.errors import ConfigError, CqloraError, DoesNotFit, Preempted
from cqlora.system.documents import escape_controls
from cqlora.system.refusals import described_as_sentence
from cqlora.system.signals import INTERRUPTED, Stopped

VERBS = {
    "run": "train one run, or a sweep with --multirun",
    "plan": "memory per GPU and time of a run, before it is launched",
    "fetch": "bring the small real base model",
    "convert": "raw Meta weights to a Hugging Face folder",
    "extend": "add a Chinese vocabulary to a base",
    "evaluate": "held-out text, an in-context probe, C-Eval and CMMLU, generations, of models side by side",
    "merge": "put adapters into their base: safetensors, GGUF or NF4",
    "prepare": "build a run's token cache and say what is in it",
    "generate": "documents that a base writes itself, to be replayed",
    "chat": "talk to a base with its adapter, or to a merged model, in the terminal",
    "serve": "an OpenAI-compatible HTTP API and a chat page for a model of yours",
    "report": "one HTML page of a run, a sweep or several runs",
    "push": "upload an adapter or a merged model to a hub, or say what would be",
}

_FLAGS_WITH_VALUE = {
    "--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd",
    "--experimental-rerun",
}  # fmt: skip
_FLAGS = _FLAGS_WITH_VALUE | {
    "--help", "-h", "--hydra-help", "--version", "--resolve", "--run", "-r", "--multirun", "-m", "--shell-completion",
    "-sc", "--info", "-i",
}  # fmt: skip
_MODES = {"-r": "--run", "-m": "--multirun", "-c": "--cfg", "-i": "--info", "-sc": "--shell-completion"}
"""Flags of which Hydra takes one."""
_NOBODY_READS = 128 + signal.SIGPIPE
_FULL_WIDTH = "＝“”‘’「」"
_VALUE_WORD = re.compile(r"[^,\[\]\s][^,\[\]]*")
_NEEDS_QUOTES = re.compile(r"[^\x00-\x7f]|[~=#&!;<>^()`]")
_SWEEP_FUNCTION = re.compile(r"(choice|range|interval|glob|sort|shuffle|tag|int|float|str|bool|json_str|extend_list)\(")
_INFO_CHOICES = {"all", "config", "defaults", "defaults-tree", "plugins", "searchpath"}


def run_program(
    config_name: str,
    schema: type,
    action: Callable[[Any], Any],
    around: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> None:
    """Compose `configs/<config_name>.yaml` with the command line, build `schema`, call `action` with it.

    A CqloraError, whether of the composition or of the action, is printed as one sentence and becomes the
    exit code, and so is what the operating system refuses; other exceptions keep their traceback. An int that
    `action` returns is the exit code too. The jobs of a sweep all run, whatever becomes of one of them.
    `around` each job is a context that sees how it ends.
    """
    with until_nobody_reads():
        sys.exit(call_program(config_name, Jobs(schema, action, around)))


def call_program(config_name: str, jobs: "Jobs") -> int:
    """Compose and call; print the sentence of a CqloraError; the exit code."""
    try:
        refuse_secrets(sys.argv[1:])
        check_words(sys.argv[1:])
        sys.argv[1:] = order_flags([quote_words(argument) for argument in sys.argv[1:]])
        if {"--help", "-h"} & set(sys.argv):
            print_help(config_name, jobs)
            return 0
        with described_as_sentence():
            outcomes = _compose_and_call(config_name, jobs)
    except CqloraError as error:
        stop(error)
    except KeyboardInterrupt:
        return INTERRUPTED
    if len(outcomes) > 1:
        return report_sweep(outcomes)
    (outcome,) = outcomes or [None]
    if isinstance(outcome, CqloraError):
        stop(outcome)
    return outcome if type(outcome) is int else 0


@contextmanager
def until_nobody_reads() -> Iterator[None]:
    """End in silence where what reads our output has ended, such as `head`, as programs do that SIGPIPE ends."""
    try:
        try:
            yield
        finally:
            # None where it was closed before Python began.
            if sys.stdout is not None:
                sys.stdout.flush()
    except BrokenPipeError:
        # Python writes what is left once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(_NOBODY_READS)


def print_help(config_name: str, jobs: "Jobs") -> None:
    """Tell a verb's keys and groups, with those of folders of one's own."""
    from cqlora.config.reference import render_help
    from cqlora.config.schema import CONFIG_DIR

    flags = [number for number, argument in enumerate(sys.argv) if argument in ("--config-dir", "-cd")]
    folders = [CONFIG_DIR, *(Path(argument) for number in flags for argument in sys.argv[number + 1 : number + 2])]
    print(f"cqlora {jobs.action.__name__} KEY=VALUE … [--multirun] [--cfg job] [--config-dir FOLDER]\n")
    print(f"{render_help(config_name, jobs.schema, folders)}\n\nHydra's own flags: --hydra-help")


def report_sweep(outcomes: list[Any]) -> int:
    """Say at a sweep's end which jobs failed and which were skipped, each with its overrides; the exit code.

    A job that does not fit its machine is skipped: the sweep has failed only where another did, or none ran.
    """
    errors = [outcome for outcome in outcomes if isinstance(outcome, CqloraError)]
    failed = [error for error in errors if not isinstance(error, DoesNotFit)]
    for error in errors:
        kind = "skipped" if isinstance(error, DoesNotFit) else "error"
        print(f"{kind}: {' '.join(getattr(error, '__notes__', []))}: {error}", file=sys.stderr)
    if failed:
        return Preempted.exit_code if isinstance(failed[-1], Preempted) else CqloraError.exit_code
    return DoesNotFit.exit_code if len(errors) == len(outcomes) else 0


def main() -> None:
    """The console script: `cqlora VERB key=value …` is `python -m cqlora.VERB key=value …`."""
    with until_nobody_reads():
        call_verb()


def call_verb() -> None:
    """The verb that was typed, or what verbs there are."""
    verb = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if verb in ("--help", "-h"):
        print("cqlora VERB key=value …   (cqlora VERB --help lists a verb's keys)\n")
        print("\n".join(f"  {name:9} {what}" for name, what in VERBS.items()))
        return
    if verb == "--version":
        print(importlib.import_module("cqlora").__version__)
        return
    if verb not in VERBS:
        near = get_close_matches(verb, VERBS, n=1)
        hint = f"did you mean `cqlora {near[0]}`?" if near else f"use one of {', '.join(VERBS)}."
        stop(ConfigError(f"`cqlora {verb}` is not a verb; {hint}"))
    sys.argv = [f"cqlora {verb}", *sys.argv[2:]]
    runpy.run_module(f"cqlora.{verb}", run_name="__main__", alter_sys=False)


def check_words(arguments: list[str]) -> None:
    """Refuse what is no override and no flag of Hydra's, before Hydra says so over ten lines.

    Raises:
        ConfigError: a flag of another program's, two that exclude each other, a word without `=`, full-width signs,
            an empty folder.
    """
    values = {
        number + 1 for number, argument in enumerate(arguments) if argument in _FLAGS_WITH_VALUE | {"--info", "-i"}
    }
    modes = {_MODES.get(argument, argument) for argument in arguments} & set(_MODES.values())
    if len(modes) > 1:
        raise ConfigError(f"{' and '.join(sorted(modes))} cannot be had at once; leave out all but one of them.")
    for number, argument in enumerate(arguments):
        key, equals, value = argument.partition("=")
        if number in values or (argument.startswith("-") and key in _FLAGS):
            continue
        if argument.startswith("-"):
            name = key.lstrip("-").replace("-", "_")
            raise ConfigError(f"{key} is no flag; keys are typed without dashes, as in {name}={value or 'VALUE'}.")
        if any(sign in key for sign in _FULL_WIDTH):
            raise ConfigError(f"`{argument}` has a full-width sign; type = and quotes as ASCII, as in KEY=VALUE.")
        if not equals and not argument.startswith("~"):
            raise ConfigError(f"`{argument}` is not of the form KEY=VALUE; type {argument}=VALUE, or leave it out.")
        if key in ("hydra.run.dir", "hydra.sweep.dir") and not value.strip("'\" "):
            raise ConfigError(f"{key}= is empty; give a folder, or leave it out for one named after the time.")


def quote_words(argument: str) -> str:
    """Quote what Hydra's grammar reads only in quotes: `base=模型/底座`, `model.path=~/llama`, `path=a=b`."""
    key, equals, value = argument.partition("=")
    if key.startswith("hydra.") and value.startswith("~/"):
        # Other paths are expanded beside their fields; Hydra's folders have none of ours.
        value = os.path.expanduser(value)
        argument = f"{key}={value}"
    if not equals or any(character in value for character in "'\"{}") or _SWEEP_FUNCTION.match(value):
        return argument
    return f"{key}={re.sub(_VALUE_WORD, lambda word: quote_word(word[0]), value)}"


def quote_word(word: str) -> str:
    """One value in quotes where it needs them."""
    return f"'{word}'" if _NEEDS_QUOTES.search(word) and not word.endswith("\\") else word


def order_flags(arguments: list[str]) -> list[str]:
    """Overrides first, flags last: Hydra's parser rejects `a=1 --multirun b=2,3`, people type it."""
    overrides, flags = [], []
    remaining = list(arguments)
    while remaining:
        argument = remaining.pop(0)
        if not argument.startswith("-"):
            overrides.append(argument)
            continue
        flags.append(argument)
        takes_value = argument in _FLAGS_WITH_VALUE
        takes_choice = argument in ("--info", "-i") and remaining and remaining[0] in _INFO_CHOICES
        if remaining and (takes_value or takes_choice):
            flags.append(remaining.pop(0))
    return overrides + flags


class Jobs:
    """The jobs of a command: Hydra calls it once for each, here or in a process elsewhere; it keeps their outcomes."""

    def __init__(
        self, schema: type, action: Callable[[Any], Any], around: Callable[[], AbstractContextManager[None]]
    ) -> None:
        self.schema, self.action, self.around = schema, action, around
        self.outcomes: list[Any] = []
        """What the action returned or which CqloraError it raised, one entry a job."""
        self.started: list[Path] = []
        self.home = os.getpid()

    def __call__(self, composed: Any) -> Any:
        """One job; what its action returned."""
        from hydra.core.hydra_config import HydraConfig

        from cqlora.launch.run_folder import drop_unused

        self.started.append(Path(HydraConfig.get().runtime.output_dir))
        outcome = None
        try:
            with self.around():
                outcome = self.call(composed)
            self.outcomes.append(outcome)
        except CqloraError as error:
            error.add_note(describe_job())
            if os.getpid() != self.home:
                # A launcher runs the job elsewhere, and what it raises is what comes back.
                raise
            self.outcomes.append(error)
            if isinstance(error, Preempted):
                # Hydra would start the next job of a sweep.
                raise _SweepStopped from error
        finally:
            drop_unused(self.started[-1])
        return outcome

    def call(self, composed: Any) -> Any:
        """The action, with the typed configuration."""
        from cqlora.config.diagnosis import to_schema

        # Again, now that what Hydra sets for each job can be resolved.
        refuse_secret_values(composed)
        with described_as_sentence():
            return self.action(to_schema(composed, self.schema))


def _compose_and_call(config_name: str, jobs: Jobs) -> list[Any]:
    """What the jobs came to."""
    import hydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from cqlora.config.composition import compose_checked
    from cqlora.config.diagnosis import explain_composition
    from cqlora.config.schema import CONFIG_DIR, register_schemas
    from cqlora.launch.run_folder import describe_refusal, drop_unused_sweeps

    # Hydra otherwise prints errors itself, over several lines, and exits.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    register_schemas()
    guard_environment()
    program = hydra.main(version_base="1.3", config_path=str(CONFIG_DIR.resolve()), config_name=config_name)
    try:
        with compose_checked(jobs.schema):
            program(jobs)()
    except _SweepStopped:
        pass
    except Stopped as stopped:
        jobs.outcomes.append(stop_early(stopped))
    except (HydraException, OmegaConfBaseException) as error:
        raise_refusal(error)
        raise ConfigError(explain_composition(error, jobs.schema, sys.argv[1:])) from error
    except OSError as error:
        if jobs.started or error.filename is None:
            raise
        raise ConfigError(describe_refusal(error, Path(error.filename))) from error
    finally:
        drop_unused_sweeps()
    return jobs.outcomes


def stop_early(stopped: Stopped) -> Preempted:
    """The sentence for a signal that came before a run began in this process or after it had ended."""
    return Preempted(f"stopped by {stopped.name} before a run had begun; the same command starts it.")


class _SweepStopped(BaseException):
    """A signal ended a job, and with it the jobs that would have come after."""


def describe_job() -> str:
    """Which job of a sweep this is, by its number and what it alone has overridden."""
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    job = HydraConfig.get().job
    number = "" if OmegaConf.is_missing(job, "num") else f"job {Path(HydraConfig.get().runtime.output_dir).name} "
    return f"{number}({job.override_dirname.replace(',', ' ')})"


def stop(error: CqloraError) -> NoReturn:
    """End with an error's sentence and exit code."""
    print(f"error: {escape_controls(str(error))}", file=sys.stderr)
    sys.exit(error.exit_code)


if __name__ == "__main__":
    main()

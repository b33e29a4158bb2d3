"""The errors that a user can cause, each one sentence: what, the value received, what to type instead."""


class CqloraError(Exception):
    """Base of every error that is shown to a user without a traceback."""

    exit_code = 1


class ConfigError(CqloraError):
    """A key, a value or a combination of values that cannot be run."""

    exit_code = 2


class DataError(CqloraError):
    """A source that is missing or holds what cannot be read."""


class ModelError(CqloraError):
    """A model folder that is missing, damaged or unfit for what was asked."""


class CheckpointError(CqloraError):
    """A checkpoint that cannot be written, read or continued from."""


class DiskError(CqloraError):
    """A file or folder that the operating system would not read or write, or that another process is writing."""


class TrainingError(CqloraError):
    """A run that cannot go on, such as one whose loss stays non-finite."""


class DoesNotFit(CqloraError):
    """A run that the planned hardware cannot hold."""

    exit_code = 3


class Preempted(CqloraError):
    """A run that a signal stopped after it committed: started again, it goes on (sysexits' EX_TEMPFAIL)."""

    exit_code = 75


def error_of_code(code: int, sentence: str) -> CqloraError:
    """The error that another process reported by its exit code and a sentence."""
    kinds = {kind.exit_code: kind for kind in (TrainingError, ConfigError, DoesNotFit, Preempted)}
    return kinds.get(code, TrainingError)(sentence)

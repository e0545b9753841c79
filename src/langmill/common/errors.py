"""The error tree. A message says what happened, where, and what to do about it.

    LangmillError          exit 1   anything that Langmill itself reports
      UsageError           exit 2   the command or its arguments are wrong
        SettingsError      exit 2   a setting is unknown, malformed or out of range
        MissingExtra       exit 2   an optional dependency is not installed
      DataError            exit 1   text, rows or shards cannot be used
      ModelError           exit 1   a model folder, file or shape cannot be used
      CheckpointError      exit 1   a checkpoint is missing, damaged or of another run
      TrainingError        exit 1   a run cannot go on (non-finite loss, no memory, full disk)
      QueueFull            exit 1   the engine has too much to do for one more request
      Interrupted          exit 130 Ctrl-C (or 143, SIGTERM): the state was saved first

The command line prints the message as one sentence and leaves with `exit_code`; a traceback
appears only with `--debug`.
"""

from __future__ import annotations


class LangmillError(Exception):
    """Base of every error that Langmill raises on purpose; `exit_code` is the process's."""

    exit_code: int = 1


class UsageError(LangmillError):
    """The arguments are wrong: nothing was started."""

    exit_code = 2


class SettingsError(UsageError):
    """A setting is unknown, of the wrong type or out of range."""


class MissingExtra(UsageError):
    """A capability whose packages are not installed.

    `MissingExtra("data", "zstandard")` names the package that was looked for and the line
    that installs it.
    """

    def __init__(self, extra: str, package: str) -> None:
        self.extra = extra
        self.package = package
        super().__init__(f'this needs the package {package}: run  pip install "langmill[{extra}]"')

    def __reduce__(self) -> tuple[type[MissingExtra], tuple[str, str]]:
        return (type(self), (self.extra, self.package))


class DataError(LangmillError):
    """Text, rows or shards that cannot be read or used."""


class ModelError(LangmillError):
    """A model, its files or its shapes that cannot be used."""


class CheckpointError(LangmillError):
    """A checkpoint that is missing, damaged or belongs to another run."""


class TrainingError(LangmillError):
    """A training run that cannot go on."""


class QueueFull(LangmillError):
    """More waits in the engine than may: the same request can succeed later."""


class Interrupted(LangmillError):
    """A run stopped by Ctrl-C (`exit_code` 130) or SIGTERM (143), its state saved."""

    def __init__(self, message: str, exit_code: int = 130) -> None:
        super().__init__(message)
        self.exit_code = exit_code

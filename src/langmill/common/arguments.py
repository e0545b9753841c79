"""Words of a command line, told apart into arguments and overrides of a settings class."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from langmill.common.configure import Key, resolve
from langmill.common.errors import SettingsError, UsageError
from langmill.common.settings import Settings

_OVERRIDE = re.compile(r"[A-Za-z_][\w.-]*=.*", re.DOTALL)


def sort_words(
    cls: type[Settings],
    words: Sequence[str],
    others: Sequence[str] = (),
    texts: bool = False,
    pairs: bool = True,
) -> tuple[list[str], list[str]]:
    """Tell arguments from overrides: `--key value`, `--key=value`, `--flag`, `--no-flag`, `key=value`.

    `others` are option names that the caller handles, to think of where a name is unknown. A word with "="
    that names no setting is an argument where a file has that name, or where arguments are `texts`; else it
    is a SettingsError, as is every unknown option. Without `pairs` every word is an argument but options, so that
    no text, wherever it comes from, sets anything. Returns the arguments and the overrides (`key=value`).
    """
    arguments: list[str] = []
    overrides: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word.startswith("--"):
            overrides.append(_option(cls, word[2:], rest, others))
        elif word.startswith("-") and word != "-" and not word[1:2].isdigit():
            raise UsageError(
                f"there is no option '{word}' (see --help; text that starts with '-' goes behind '--')"
            )
        elif pairs and _OVERRIDE.fullmatch(word) and _is_override(cls, word, others, texts):
            overrides.append(word)
        else:
            arguments.append(word)
    return arguments, overrides


def place(cls: type[Settings], positional: Sequence[str], arguments: Sequence[str]) -> dict[str, Any]:
    """Give arguments to the positional settings: one each, all that are left to a list; too many: UsageError."""
    left = list(arguments)
    given: dict[str, Any] = {}
    for name in positional:
        if left and resolve(cls, name).is_list:
            given[name], left = left, []
        elif left:
            given[name] = left.pop(0)
    if left:
        raise UsageError(f"there is no place for '{left[0]}' (see --help)")
    return given


def find(cls: type[Settings], name: str) -> Key | None:
    """The setting that a name means, or None."""
    try:
        return resolve(cls, name)
    except SettingsError:
        return None


def _option(cls: type[Settings], word: str, rest: list[str], others: Sequence[str]) -> str:
    """The override that an option means; its value, if it needs one, is taken from `rest`."""
    name, equals, value = word.partition("=")
    denied = find(cls, name.removeprefix("no-"))
    if name.startswith("no-") and not equals and denied and denied.is_flag:
        return f"{denied.name}=false"
    key = resolve(cls, name, others)
    if equals:
        return f"{key.name}={value}"
    if key.is_flag and not (rest and rest[0].lower() in ("true", "false")):
        return f"{key.name}=true"
    if not rest or rest[0].startswith("--"):
        raise SettingsError(
            f"--{name} needs a value: {key.description} (if it starts with '--': --{name}=VALUE)"
        )
    return f"{key.name}={rest.pop(0)}"


def _is_override(cls: type[Settings], word: str, others: Sequence[str], texts: bool) -> bool:
    name = word.partition("=")[0]
    if find(cls, name):
        return True
    if texts or Path(word).exists():
        return False
    resolve(cls, name, others)  # raises, naming the setting that was meant
    return True

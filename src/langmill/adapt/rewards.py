"""Functions of one's own that judge answers: found by name, called as TRL's trainers call them, and held to their word.

    def reward(prompts, completions, **fields) -> list[float]

prompts: as the rows have them, texts or lists of messages, one for each completion. completions: texts, or, where the
prompt is messages, [{"role": "assistant", "content": text}]. fields: a list for each further field of the rows, and
`completion_ids`. None in the place of a number says that the function has nothing to say of that one.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from langmill.common.errors import DataError, SettingsError, UsageError

GIVEN = ("prompts", "completions", "completion_ids")
_TAKES = "--reward takes module:function or file.py:function"


@dataclass(frozen=True)
class Reward:
    """A function with its name and what it weighs. `wanted`: the arguments that it takes by name, None for any."""

    name: str
    function: Callable[..., Any]
    weight: float = 1.0
    wanted: frozenset[str] | None = None
    needed: frozenset[str] = frozenset()


def find(names: Sequence[str], weights: Sequence[float]) -> list[Reward]:
    """The functions that settings name. UsageError where one is not there, SettingsError for a wrong number of
    weights; what a user's module raises on import is told in its own words."""
    if not names:
        raise SettingsError(f"--task reinforce learns from rewards: {_TAKES}")
    if weights and len(weights) != len(names):
        raise SettingsError(
            f"reward_weights has {len(weights)} numbers and there are {len(names)} reward functions"
        )
    return [_found(name, weight) for name, weight in zip(names, weights or [1.0] * len(names), strict=True)]


def _found(spec: str, weight: float) -> Reward:
    place, colon, name = spec.rpartition(":")
    if not colon or not place or not name:
        raise UsageError(f"{spec!r} names no function: {_TAKES}")
    module = _module(place)
    function = getattr(module, name, None)
    if not callable(function):
        there = [key for key, value in vars(module).items() if inspect.isfunction(value) and key[0] != "_"]
        raise UsageError(f"{place} has no function {name}; there are {', '.join(there) or 'none'}")
    if inspect.iscoroutinefunction(function):
        raise UsageError(f"{spec} is async: a reward function is a plain one")
    try:
        taken = inspect.signature(function).parameters.values()
    except ValueError:  # some written in C do not tell
        return Reward(spec, function, weight)
    named = [p for p in taken if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    open_ended = any(p.kind == p.VAR_KEYWORD for p in taken)
    wanted = None if open_ended else frozenset(p.name for p in named)
    return Reward(spec, function, weight, wanted, frozenset(p.name for p in named if p.default is p.empty))


def _module(place: str) -> ModuleType:
    path = Path(place)
    if path.suffix == ".py" and not path.is_file():
        raise UsageError(f"{place} is no file: {_TAKES}")
    folder = path.resolve().parent if path.suffix == ".py" else Path.cwd()
    with _importable(folder):
        try:
            if path.suffix != ".py":
                return importlib.import_module(place)
            spec = importlib.util.spec_from_file_location(path.stem, path)
            assert spec and spec.loader
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            return module
        except Exception as error:
            beside = f"; for a file give {place}.py:…" if Path(f"{place}.py").is_file() else ""
            raise UsageError(
                f"{place} cannot be imported: {type(error).__name__}: {error}{beside}"
            ) from error


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """What lies beside a reward function can be imported by it, as where Python runs it."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def check_fields(rewards: Sequence[Reward], fields: Sequence[str]) -> None:
    """UsageError for a function that needs a field which the rows do not have."""
    for reward in rewards:
        missing = sorted(reward.needed - {*GIVEN, *fields})
        if missing:
            there = ", ".join(fields) or "no field but the prompt"
            raise UsageError(f"{reward.name} takes {', '.join(missing)}, and the rows have {there}")


def judge(
    rewards: Sequence[Reward], prompts: Sequence[Any], completions: Sequence[Any], ids: Sequence[list[int]],
    fields: Mapping[str, Sequence[Any]], names: Sequence[str],
) -> list[list[float | None]]:  # fmt: skip
    """What each function says of each completion: a list a completion. `names`: where the rows stand.

    DataError names the function, the row and what is wrong with the value: it raised, gave a wrong number of values, or
    one that is no finite number; or no function has anything to say of a completion.
    """
    given = {"prompts": prompts, "completions": completions, "completion_ids": ids, **fields}
    columns = [_column(reward, given, names) for reward in rewards]
    told = [list(row) for row in zip(*columns, strict=True)]
    for name, row in zip(names, told, strict=True):
        if all(value is None for value in row):
            raise DataError(f"every reward function gives None for an answer to {name}: one must judge it")
    return told


def total(rewards: Sequence[Reward], told: Sequence[float | None]) -> float:
    """Their weighted sum."""
    return sum(r.weight * value for r, value in zip(rewards, told, strict=True) if value is not None)


def _column(reward: Reward, given: Mapping[str, Sequence[Any]], names: Sequence[str]) -> list[float | None]:
    kept = {name: list(v) for name, v in given.items() if reward.wanted is None or name in reward.wanted}
    try:
        found = reward.function(**kept)
    except Exception as error:
        where = _culprit(reward, kept, names)
        raise DataError(f"the reward function {reward.name} fails{where}: {_said(error)}") from error
    if not isinstance(found, Sequence) and not hasattr(found, "__len__"):
        raise DataError(
            f"the reward function {reward.name} gives {type(found).__name__}, and not a list of numbers"
        )
    if len(found) != len(names):
        raise DataError(
            f"the reward function {reward.name} gives {len(found)} values for {len(names)} completions: it must give "
            "one for each"
        )
    return [
        _number(reward, value, name, completion)
        for value, name, completion in zip(found, names, given["completions"], strict=True)
    ]


def _number(reward: Reward, value: Any, name: str, completion: Any) -> float | None:
    if value is None:
        return None
    try:
        number = math.nan if isinstance(value, str) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise DataError(
            f"the reward function {reward.name} gives {value!r} for an answer to {name}, which is no finite number; "
            f"the answer: {str(completion)[:200]!r}"
        )
    return number


def _culprit(reward: Reward, kept: Mapping[str, Sequence[Any]], names: Sequence[str]) -> str:
    """The first row that fails alone as well; nothing where none does."""
    for at, name in enumerate(names):
        try:
            reward.function(**{key: [values[at]] for key, values in kept.items()})
        except Exception:
            answer = f" ({str(kept['completions'][at])[:200]!r})" if "completions" in kept else ""
            return f" on an answer to {name}{answer}"
    return ""


def _said(error: Exception) -> str:
    """The error with the line of the user's code that raised it."""
    trace = error.__traceback__
    while trace and trace.tb_next:
        trace = trace.tb_next
    where = f" ({Path(trace.tb_frame.f_code.co_filename).name}, line {trace.tb_lineno})" if trace else ""
    return f"{type(error).__name__}: {error}{where}"

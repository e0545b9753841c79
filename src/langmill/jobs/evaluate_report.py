"""What every evaluation says and keeps: scores with intervals, two models side by side, and how they came about."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from langmill.common.errors import UsageError
from langmill.common.files import atomic_write, sha256
from langmill.common.settings import EvaluateSettings
from langmill.evaluate.compare import Difference
from langmill.evaluate.loss import Interval
from langmill.families.folder import Model
from langmill.jobs.report import shown

_PACKAGES = ("langmill", "torch", "tokenizers", "numpy", "safetensors", "sacrebleu")


def record(
    settings: EvaluateSettings, kind: str, template: str, before: str, models: Mapping[str, Any]
) -> dict[str, Any]:
    """Everything that a score depends on. models: `of_model` of each, by name."""
    files = {path.as_posix(): sha256(path) for path in _files(settings)}
    return {
        "task": kind,
        "template": template,
        "template_sha256": _hash(template),
        "shots": settings.shots,
        "target_delimiter": settings.target_delimiter,
        "examples_sha256": _hash(before) if before else None,
        "seed": settings.seed,
        "resamples": settings.resamples,
        "micro_batch_size": settings.micro_batch_size,
        "models": dict(models),
        "files": files,
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in _PACKAGES},
    }


def of_model(model: Model) -> dict[str, str]:
    """A model's number type and device."""
    like = next((p for p in model.parameters() if p.is_floating_point()), None)
    if like is None:
        return {"dtype": "none", "device": str(next(model.buffers(), torch.zeros(0)).device)}
    return {"dtype": str(like.dtype).removeprefix("torch."), "device": str(like.device)}


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _files(settings: EvaluateSettings) -> Iterator[Path]:
    given = [*settings.on, *([] if settings.examples is None else [str(settings.examples)])]
    for path in map(Path, given):
        if path.is_dir():
            yield from sorted(file for file in path.rglob("*") if file.is_file())
        elif path.is_file():
            yield path


def check_out(settings: EvaluateSettings) -> None:
    """UsageError before any work, where --out cannot be written."""
    if settings.out is None:
        return
    if settings.out.exists() and not settings.force:
        raise UsageError(f"{settings.out} exists: choose another --out, or --force")
    if not settings.out.parent.is_dir():
        raise UsageError(f"there is no folder {settings.out.parent} to write {settings.out.name} to")


def write_rows(settings: EvaluateSettings, results: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """The rows of each model, by its name, to --out as JSONL."""
    if settings.out is None:
        return
    lines = [
        json.dumps({"model": name, **row}, ensure_ascii=False) + "\n"
        for name, rows in results.items()
        for row in rows
    ]
    atomic_write(settings.out, "".join(lines))


def score_lines(figures: Mapping[str, float], between: Mapping[str, Interval]) -> list[str]:
    """A line a figure, with its interval."""
    lines = []
    for name, value in figures.items():
        found = between.get(name)
        range = "" if found is None else f"95 % interval {shown(found[0])} to {shown(found[1])}"
        lines.append(f"  {name.replace('_', ' '):<18}{shown(value):>8}  {range}".rstrip())
    return lines


def unknown_lines(unknown: Mapping[str, int], most: int = 10) -> list[str]:
    """The labels of the rows that a model cannot say, and in how many texts or spans they are right."""
    lines = [f"{label!r} (in {shown(count)}) is never said" for label, count in list(unknown.items())[:most]]
    return lines + [f"and {len(unknown) - most} more"] * (len(unknown) > most)


def difference_lines(ours: str, theirs: str, found: Sequence[Difference]) -> list[str]:
    """Two models in words, a line a figure: both scores, the difference, its interval, the verdict."""
    lines = [f"{ours} against {theirs}, on the same rows:"]
    for one in found:
        between = ""
        if one.interval is not None:
            between = f" (95 % interval {shown(one.interval[0])} to {shown(one.interval[1])})"
        lines.append(
            f"  {one.name.replace('_', ' '):<18}{shown(one.ours)} against {shown(one.theirs)}, "
            f"difference {shown(one.difference)}{between}: {one.verdict}"
        )
    return lines


def flat(figures: Mapping[str, float], between: Mapping[str, Interval]) -> dict[str, object]:
    """Figures and NAME_interval beside each, None where there is none, for JSON."""
    made: dict[str, object] = {}
    for name, value in figures.items():
        made |= {name: value, f"{name}_interval": list(between[name]) if name in between else None}
    return made

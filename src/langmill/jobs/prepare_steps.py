"""The steps of `langmill data prepare`, in order, as the settings choose them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import yaml

from langmill.common.errors import UsageError
from langmill.common.files import sha256
from langmill.common.prepare_settings import PrepareSettings
from langmill.data.c4 import C4, JoinLines
from langmill.data.cjk_rules import CJK_C4, CJK_FINEWEB, CJK_QUALITY, CJK_REPETITION
from langmill.data.decontaminate import Decontaminate
from langmill.data.forgotten import Forget
from langmill.data.minhash import Shape
from langmill.data.repetition import GopherRepetition
from langmill.data.rules import FineWeb, GopherQuality
from langmill.data.tidy import Language, Tidy
from langmill.data.units import Recipe, Step
from langmill.privacy.key import read_key
from langmill.privacy.redact import Redact

REPETITION: tuple[Step, ...] = (GopherRepetition(), CJK_REPETITION)
PRESETS: dict[str, tuple[Step, ...]] = {
    "none": (),
    "repetition": REPETITION,
    "web": (
        JoinLines(), GopherQuality(), CJK_QUALITY, *REPETITION, C4(), CJK_C4, FineWeb(), CJK_FINEWEB,
    ),
}  # fmt: skip


def recipe(settings: PrepareSettings, run: Path) -> Recipe:
    """How documents are made. Forget comes last: it takes the text of what others dropped too."""
    t, language, d = settings.tidy, settings.language, settings.duplicates
    steps: list[Step] = [Tidy(t.mojibake, t.normalize, t.controls)]
    if language.detect or language.keep:
        steps.append(Language(tuple(language.keep), language.min_score))
    steps += changed(PRESETS[settings.rules.preset], settings.rules.thresholds)
    if settings.redact.policy != "none":
        steps.append(redaction(settings))
    if settings.rules.decontaminate:
        steps.append(
            Decontaminate(tuple(str(Path(file).absolute()) for file in settings.rules.decontaminate))
        )
    shape = Shape(d.n, d.bands, d.rows) if d.exact or d.near is not None else None
    reads = tuple(_hash(file) for file in settings.rules.decontaminate)
    return Recipe(settings.read, tuple(steps), shape, (Forget(run.absolute()),), reads)


def redaction(settings: PrepareSettings) -> Redact:
    """UsageError where pseudonyms have no key, or a type does not exist."""
    r = settings.redact
    assert r.policy != "none"
    key = read_key(r.key_file, r.key_env, r.make_key) if r.policy == "pseudonym" else None
    return Redact(r.policy, tuple(r.types), key)


def _hash(file: str) -> str:
    if not Path(file).is_file():
        raise UsageError(f"rules.decontaminate: {file} is no file")
    return sha256(Path(file))


def changed(steps: Sequence[Any], thresholds: Iterable[str]) -> list[Step]:
    """The steps with `step.field=value` set; UsageError names the nearest where there is none, or a wrong kind."""
    by_name = {step.name: step for step in steps}
    known = {
        f"{name}.{field.name}": getattr(step, field.name)
        for name, step in by_name.items()
        for field in fields(step)
        if field.name not in ("name", "single") and not isinstance(getattr(step, field.name), tuple)
    }
    for given in thresholds:
        place, equals, text = given.partition("=")
        if not equals or place not in known:
            near = difflib.get_close_matches(place, known, n=1, cutoff=0.4)
            hint = f": did you mean {near[0]}?" if near else f": the steps are {', '.join(by_name) or 'none'}"
            raise UsageError(
                f"rules.thresholds '{given}' is not STEP.FIELD=VALUE of a step that is used{hint}"
            )
        value = yaml.safe_load(text)
        if value is not None and (
            isinstance(value, bool) != isinstance(known[place], bool) or isinstance(value, str)
        ):
            raise UsageError(
                f"rules.thresholds '{given}': {text} is no value for {place}, which is {known[place]}"
            )
        name, _, field = place.partition(".")
        by_name[name] = replace(by_name[name], **{field: value})
    return [*by_name.values()]

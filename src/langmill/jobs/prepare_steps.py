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
from langmill.data.words import Words, pairs
from langmill.privacy.key import read_key
from langmill.privacy.names import names
from langmill.privacy.redact import Redact

# The languages that `Language` knows, as ISO 639 and fastText's lid.176 write them; "und": it could not tell.
LANGUAGES = frozenset(
    "af als am an ar arz as ast av az azb ba bar bcl be bg bh bn bo bpy br bs bxr ca cbk ce ceb ckb co cs cv cy "
    "da de diq dsb dty dv el eml en eo es et eu fa fi fr frr fy ga gd gl gn gom gu gv he hi hif hr hsb ht hu hy "
    "ia id ie ilo io is it ja jbo jv ka kk km kn ko krc ku kv kw ky la lb lez li lmo lo lrc lt lv mai mg mhr min "
    "mk ml mn mr mrj ms mt mwl my myv mzn nah nap nds ne new nl nn no oc or os pa pam pfl pl pms pnb ps pt qu rm "
    "ro ru rue sa sah sc scn sco sd sh si sk sl so sq sr su sv sw ta te tg th tk tl tr tt tyv ug uk ur uz vec vep "
    "vi vls vo wa war wuu xal xmf yi yo yue zh und".split()
)
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
    t, language = settings.tidy, settings.language
    steps: list[Step] = [Tidy(t.mojibake, t.normalize, t.controls)]
    if language.detect or language.keep:
        _known(language.keep)
        steps.append(Language(tuple(language.keep), language.min_score))
    steps += changed(PRESETS[settings.rules.preset], settings.rules.thresholds)
    steps += [step for step in (_words(settings), _quality(settings)) if step is not None]
    if settings.redact.policy != "none":
        steps.append(redaction(settings))
    elif settings.redact.names is not None:
        raise UsageError(
            "redact.names finds what redact.policy says how to replace, and that is none: take mask"
        )
    if settings.rules.decontaminate:
        steps.append(
            Decontaminate(tuple(str(Path(file).absolute()) for file in settings.rules.decontaminate))
        )
    reads = [_hash("rules.decontaminate", file) for file in settings.rules.decontaminate]
    reads += [_hash("rules.words", file) for _, file in pairs(settings.rules.words, "rules.words")]
    for step in steps:
        if isinstance(step, Decontaminate | Words):
            step.read()  # what is wrong with the files is told before any work
    if settings.redact.names is not None and not _of_spacy(settings.redact.names):
        reads.append(_hash_of_model(settings.redact.names))
    return Recipe(settings.read, tuple(steps), shape(settings), (Forget(run.absolute()),), tuple(reads))


def _known(codes: Iterable[str]) -> None:
    """UsageError for a language that no document would be told to be in, with the nearest that there is."""
    for given in codes:
        if given in LANGUAGES:
            continue
        low = given.lower()
        parts = [low.replace("_", "-").split("-")[0], low[:2], low[:3]]
        near = next((part for part in parts if part in LANGUAGES), "") or next(
            iter(difflib.get_close_matches(low, sorted(LANGUAGES), 1)), ""
        )
        raise UsageError(
            f"language.keep: '{given}' is no language that is told apart: "
            + (f"did you mean {near}? " if near else "")
            + f"There are {' '.join(sorted(LANGUAGES))}"
        )


def shape(settings: PrepareSettings) -> Shape | None:
    """Of the signatures by which duplicates are found; None where none are looked for."""
    d = settings.duplicates
    return Shape(d.n, d.bands, d.rows) if d.exact or d.near is not None else None


def redaction(settings: PrepareSettings) -> Redact:
    """UsageError where pseudonyms have no key, or a type does not exist; ModelError for `names` that is no tagger."""
    r = settings.redact
    assert r.policy != "none"
    key = read_key(r.key_file, r.key_env, r.make_key) if r.policy == "pseudonym" else None
    finder = None
    if r.names is not None:
        # One thread, so that what is found is the same however many processes work.
        finder = names(r.names if _of_spacy(r.names) else _model(r.names), 1)
        finder(["x"])  # what is wrong with it is told before any work
    return Redact(r.policy, tuple(r.types), key, finder)


def _words(settings: PrepareSettings) -> Words | None:
    r = settings.rules
    lists = pairs(r.words, "rules.words")
    most = {}
    for name, number in pairs(r.words_at_most, "rules.words_at_most"):
        if name not in dict(lists):
            raise UsageError(
                f"rules.words_at_most: no list is called '{name}': rules.words={name}=FILE gives one"
            )
        try:
            most[name] = float(number)
        except ValueError:
            raise UsageError(f"rules.words_at_most '{name}={number}': {number} is no number") from None
    found = tuple((name, str(Path(file).absolute())) for name, file in lists)
    return Words(found, tuple(most.items())) if found else None


def _quality(settings: PrepareSettings) -> Step | None:
    """The classifier's step; torch is imported where there is one alone."""
    q = settings.quality
    if q.model is None:
        return None
    from langmill.jobs.quality import Quality

    made = Quality(_model(q.model), q.label, q.at_least, _hash_of_model(q.model))
    made.check()
    return made


def _of_spacy(names: str) -> bool:
    return names.partition(":")[0] == "presidio"


def _model(where: str) -> str:
    from langmill.families.hub import resolve

    return str(resolve(where).absolute())


def _hash_of_model(where: str) -> str:
    folder = Path(_model(where))
    own = (f"{file.name} {sha256(file)}" for file in sorted(folder.iterdir()) if file.is_file())
    return " ".join(own) if folder.is_dir() else sha256(folder)


def _hash(setting: str, file: str) -> str:
    if not Path(file).is_file():
        raise UsageError(f"{setting}: {file} is no file")
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

"""What a resumed run is held to: the settings that it began with."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from langmill.common.configure import configure, keys
from langmill.common.errors import SettingsError
from langmill.common.files import read_json
from langmill.common.metrics import Report
from langmill.common.settings import Settings

# A resumed run may differ in these; every other setting that is given again must be as it was.
FREE = frozenset({"resume", "force", "out", "track", "train.save_every", "train.eval_every", "train.keep_last",
                  "train.log_every", "train.non_finite", "train.device"})  # fmt: skip
BEGAN = "choices.json"  # the first file that the training loop writes: a run that has it can go on
S = TypeVar("S", bound=Settings)


def settled(settings: S, folder: Path) -> S:
    """The settings of the run that `folder` holds, where it is resumed; else those given.

    What the user gave again must agree with what the run began with; what was not given is taken from it.
    """
    path, now = folder / "settings.yaml", dict(settings)
    if not now["resume"] or not path.is_file():
        return settings
    kind = type(settings)
    before = configure(kind, path)
    mine, theirs = given(settings), {key.name: value(before, key.path) for key in keys(kind)}
    changed = [
        f"{name} was {theirs[name]} and is {found}"
        for name, found in mine.items()
        if name not in FREE and found is not None and found != theirs[name]
    ]
    if changed:
        raise SettingsError(
            f"{folder} is of a run with other settings: {'; '.join(changed)}. Resume with the same settings, or start "
            "a new run (--from goes on with a model's weights)"
        )
    free = {name: found for name, found in mine.items() if name in FREE}
    words = {
        "resume": True,
        "force": False,
        "out": now["out"],
        "track": free.get("track", dict(before)["track"]),
    }
    train = {name.partition(".")[2]: found for name, found in free.items() if name.startswith("train.")}
    return before.model_copy(update=words | {"train": dict(before)["train"].model_copy(update=train)})


def finished(out: Path, made: Path, folder: Path) -> Report | None:
    """The report of a run that has nothing left to do: OUT is made, as `made` shows, and the report is written."""
    if not made.exists() or not (folder / "report.json").is_file():
        return None
    saved = read_json(folder / "report.json", "report", 1)
    words = f"{out} is finished already: there is nothing to resume\n{saved['text']}"
    return Report(out, saved["counts"], saved["figures"], words, saved["extra"])


def given(settings: Settings) -> dict[str, Any]:
    """The settings that were given, by their dotted names."""
    found = {}
    for key in keys(type(settings)):
        group = getattr(settings, key.path[0], settings) if len(key.path) > 1 else settings
        if key.field in group.model_fields_set:
            found[key.name] = getattr(group, key.field)
    return found


def value(settings: Settings, path: tuple[str, ...]) -> Any:
    """The setting at a path of names."""
    found: Any = settings
    for part in path:
        found = getattr(found, "from_model" if part == "from" else part)
    return found

"""What is done to the clean set as a whole, when copies are out: lines that sites share are cut, sources are mixed."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from langmill.common.prepare_settings import PrepareSettings
from langmill.data import boilerplate, mixture
from langmill.data.boilerplate import Boilerplate
from langmill.data.mixture import Mixture
from langmill.data.units import BATCH, KEPT, Flow, Flows, Step, amount, through


@dataclass(frozen=True)
class Last:
    """The steps over all sources; None where one is off."""

    boilerplate: Boilerplate | None = None
    mixture: Mixture | None = None

    @property
    def steps(self) -> tuple[Step, ...]:
        return tuple(step for step in (self.boilerplate, self.mixture) if step is not None)

    def __call__(self, batch: pa.Table, flows: Flows) -> tuple[pa.Table, pa.Table]:
        """The rows (id, text, source, meta) that are written, and (id, dropped) of the others; counted in `flows`."""
        for step in self.steps:
            flows.setdefault(step.name, Flow())
        open_ = batch.append_column(BATCH.field("dropped"), pa.nulls(len(batch), pa.string()))
        after = through(open_, self.steps, flows)
        left = after.filter(pc.is_null(after["dropped"])).select(KEPT.names).cast(KEPT)
        gone = after.filter(pc.is_valid(after["dropped"])).select(["id", "dropped"])
        if self.mixture is None:
            return left, gone
        again = self.mixture.repeat(left).cast(KEPT)
        out, once, more = flows[self.mixture.name].out, amount(left["text"]), amount(again["text"])
        out.documents += more.documents - once.documents
        out.bytes += more.bytes - once.bytes
        out.characters += more.characters - once.characters
        return again, gone


def last(
    stays: Callable[[], Iterable[pa.Table]], settings: PrepareSettings, named: Sequence[str], run: Path
) -> Last:
    """The steps, after counting what they need over all documents that stay. `named`: the sources.

    UsageError for weights that fit no source.
    """
    weights = mixture.weights_of(settings.mixture.weights, named)
    made = Last()
    if settings.boilerplate.cut:
        folder = run / "lines"
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
        folder.mkdir()
        try:
            made = Last(boilerplate.count(stays(), folder, settings.boilerplate))
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    if weights:
        sizes: Counter[str] = Counter()
        for batch in stays():
            left, _ = made(batch, {})
            if len(left):
                sizes[left["source"][0].as_py()] += amount(left["text"]).bytes
        times = mixture.repeats(sizes, weights, settings.mixture.most)
        made = Last(made.boilerplate, Mixture(tuple(sorted(times.items()))))
    return made

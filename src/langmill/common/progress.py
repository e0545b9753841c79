"""Progress of a long step on standard error: a bar on a terminal, a plain line every ten seconds elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

PLAIN_SECONDS = 10.0


def track(description: str, total: float | None = None, unit: str = "it", quiet: bool = False) -> Progress:
    """`with track("training", total=1000, unit="steps") as p: p.advance(1, loss=2.5)`.

    `total` may be None (unknown) and set later as `p.total`. The unit "B" is shown as kB, MB, GB.
    Extra fields of `advance` are shown behind the rate; the last value of each stays until replaced.
    `quiet` shows nothing. NO_COLOR is honoured.
    """
    return Progress(description, total, unit, quiet)


class Progress:
    """What `track` yields; `done` counts, `total` is the aim or None."""

    def __init__(self, description: str, total: float | None, unit: str, quiet: bool) -> None:
        self.description, self.total, self.unit, self.quiet = description, total, unit, quiet
        self.done = 0.0
        self._fields: dict[str, float | int | str] = {}
        self._start = self._shown = time.monotonic()
        self._bar: Bar | None = None
        self._ended = False
        self._printed: float | None = None  # what was done at the last plain line

    def __enter__(self) -> Self:
        self._start = self._shown = time.monotonic()
        if not self.quiet and sys.stderr.isatty():
            self._bar = _bar()
            self._bar.start()
            self._bar.add_task(self.description, total=self.total, status="")
        return self

    def advance(self, amount: float = 1, **fields: float | int | str) -> None:
        """Count `amount` more as done and replace the fields given."""
        self.done += amount
        self._fields.update(fields)
        if self._bar:
            task = self._bar.task_ids[0]
            self._bar.update(task, completed=self.done, total=self.total, status=self.status())
        elif not self.quiet and time.monotonic() - self._shown >= PLAIN_SECONDS:
            self._print()

    def status(self) -> str:
        """`120/1000 steps (12%)  34 steps/s  ETA 0:26  loss 3.21`."""
        seconds = max(time.monotonic() - self._start, 1e-9)
        rate = self.done / seconds
        parts = [_amount(self.done, self.unit) + (f"/{_amount(self.total, self.unit)}" if self.total else "")]
        if self.unit != "B":
            parts[0] += f" {self.unit}"
        if self.total:
            parts[0] += f" ({min(1.0, self.done / self.total):.0%})"
        if self.done:
            parts.append(f"{_amount(rate, self.unit)}{'' if self.unit == 'B' else ' ' + self.unit}/s")
        if self.total and 0 < self.done < self.total and not self._ended:
            parts.append(f"ETA {_clock((self.total - self.done) / rate)}")
        elif self.done:
            parts.append(f"took {_clock(seconds)}")
        named = (
            f"{name.replace('_per_second', '/s')} {_value(value)}" for name, value in self._fields.items()
        )
        return "  ".join([*parts, *named])

    def _print(self) -> None:
        self._shown, self._printed = time.monotonic(), self.done
        print(f"{self.description}  {self.status()}", file=sys.stderr, flush=True)

    def _all_told(self) -> bool:
        """Whether the last plain line was the final one already."""
        return self.done == self._printed and not (self.total and self.done < self.total)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended = True
        if self._bar:
            self._bar.update(self._bar.task_ids[0], status=self.status())
            self._bar.stop()
            self._bar = None
        elif not self.quiet and (self.done or not error) and not self._all_told():
            self._print()


def _bar() -> Bar:
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}", markup=False), BarColumn(bar_width=24))
    return Bar(*columns, TextColumn("{task.fields[status]}", markup=False), console=Console(stderr=True))


def _amount(value: float, unit: str) -> str:
    """Three digits and a letter where the number is large: 950, 12.3k, 4.56M, 4.56 MB."""
    gap, name = (" ", "B") if unit == "B" else ("", "")
    if value < (1000 if name else 10_000):
        return f"{value:.0f}{gap}{name}" if value == int(value) or value >= 100 else f"{value:.3g}{gap}{name}"
    power = 1
    while power < 6 and value / 1000**power >= 999.5:
        power += 1
    return f"{value / 1000**power:.3g}{gap}{'kMGTPE'[power - 1]}{name}"


def _value(value: float | int | str) -> str:
    if isinstance(value, float):
        return _amount(value, "") if value >= 10_000 else f"{value:.4g}"
    return _amount(value, "") if isinstance(value, int) and value >= 10_000 else str(value)


def _clock(seconds: float) -> str:
    whole = round(seconds)
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"

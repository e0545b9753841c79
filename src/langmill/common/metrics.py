"""What a run measures: the report a job hands back, and the metrics it logs on the way."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from langmill.common.errors import MissingExtra
from langmill.common.files import atomic_write


@dataclass(frozen=True)
class Report:
    """What a job did, for a person (`text`) and for a program (the rest, printed by `--json`).

    `out` is what it wrote, if anything; `counts` are whole numbers of things (documents, tokens,
    steps), `figures` measured values (loss, bits_per_byte, tokens_per_second), `extra` further keys
    of the JSON object (`results` of generate). All values must be plain JSON values. `ok`: False where it
    went on after errors that it has told; the exit code is then 1.
    """

    out: Path | None = None
    counts: Mapping[str, Any] = field(default_factory=dict)
    figures: Mapping[str, Any] = field(default_factory=dict)
    text: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)
    ok: bool = True


class Metrics:
    """The measured values of a run: `metrics.jsonl` in `folder`, one object a step, and TensorBoard if asked.

    A line is on its way to the disk when `log` returns, so a killed run keeps all but its last line.
    A value that is NaN or infinite is written as null. `tensorboard` without its package is a MissingExtra.
    """

    def __init__(self, folder: Path, tensorboard: bool = False) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "metrics.jsonl"
        self._board: Any = None
        if tensorboard:
            try:
                from tensorboard.summary import Writer
            except ImportError:
                raise MissingExtra("track", "tensorboard") from None
            self._board = Writer(str(folder / "tensorboard"))

    def log(self, step: int, **values: float | int | str | None) -> None:
        row = {
            name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in values.items()
        }
        with open(self.path, "a", encoding="utf-8", newline="\n") as file:
            file.write(json.dumps({"step": step, **row}, ensure_ascii=False) + "\n")
        if self._board:
            for name, value in row.items():
                if isinstance(value, (int, float)):
                    self._board.add_scalar(name, value, step)
            self._board.flush()

    def truncate(self, step: int) -> None:
        """Forget every line beyond `step`, and one that a kill cut short: what a resumed run will write again."""
        if self.path.exists():
            kept = [json.dumps(row, ensure_ascii=False) + "\n" for row in self.rows() if row["step"] <= step]
            atomic_write(self.path, "".join(kept))

    def rows(self) -> list[dict[str, Any]]:
        """All logged rows, oldest first; none where nothing was logged. A line cut short by a kill is left out."""
        if not self.path.exists():
            return []
        lines = self.path.read_bytes().decode("utf-8", errors="replace").splitlines(keepends=True)
        whole = [line for line in lines if line.endswith("\n")]
        return [json.loads(line) for line in whole]

    def close(self) -> None:
        if self._board:
            self._board.close()
            self._board = None

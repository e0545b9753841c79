from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from langmill.common import progress
from langmill.common.progress import track


def test_plain_lines_go_to_standard_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with track("reading", total=1000, unit="rows") as bar:
        bar.advance(250)
        assert capsys.readouterr().err == ""  # not yet ten seconds
        monkeypatch.setattr(progress, "PLAIN_SECONDS", 0.0)
        bar.advance(250, loss=2.345678, tokens_per_second=12345.6)
        line = capsys.readouterr().err
    pattern = r"reading  500/1000 rows \(50%\)  \S+ rows/s  ETA 0:00  loss 2.346  tokens/s 12.3k\n"
    assert re.fullmatch(pattern, line)
    last = capsys.readouterr()
    assert "took 0:00" in last.err and last.out == ""


def test_quiet_and_unknown_totals(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "PLAIN_SECONDS", 0.0)
    with track("x", total=3, quiet=True) as bar:
        bar.advance(3)
    assert capsys.readouterr().err == ""
    with track("x", unit="B") as bar:
        bar.advance(5_000_000)
        assert re.match(r"5 MB  \S+ .B/s  took 0:00$", bar.status())
        bar.total = 20_000_000
        assert bar.status().startswith("5 MB/20 MB (25%)")


def test_what_was_shown_is_not_shown_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "PLAIN_SECONDS", 0.0)
    with track("encoding", unit="B") as bar:
        bar.advance(1)
        bar.advance(1)
    assert capsys.readouterr().err.count("\n") == 2


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
@pytest.mark.parametrize("no_color", [False, True])
def test_a_terminal_gets_a_bar(tmp_path: Path, no_color: bool) -> None:
    code = """
from langmill.common.progress import track
with track("train[ing]", total=4, unit="steps") as bar:
    for step in range(4): bar.advance(1, loss=step / 2)
"""
    reader, writer = os.openpty()
    environment = {"TERM": "xterm-256color", "COLUMNS": "120", "PATH": os.environ["PATH"]}
    environment |= {"NO_COLOR": "1"} if no_color else {}
    process = subprocess.run(
        [sys.executable, "-c", code], stderr=writer, capture_output=False, env=environment
    )
    shown = os.read(reader, 65536).decode()
    os.close(reader)
    os.close(writer)
    assert process.returncode == 0
    assert "train[ing]" in shown and "4/4 steps (100%)" in shown and "loss 1.5" in shown
    assert bool(re.search(r"\x1b\[(3\d|38;)", shown)) is not no_color


def test_clocks_and_amounts() -> None:
    assert [progress._clock(seconds) for seconds in (0.4, 61, 3725)] == ["0:00", "1:01", "1:02:05"]
    assert [progress._amount(n, "") for n in (9, 2.5, 9999, 12_345, 4_560_000)] == [
        "9",
        "2.5",
        "9999",
        "12.3k",
        "4.56M",
    ]

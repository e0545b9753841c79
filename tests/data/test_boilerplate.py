"""Lines that documents of a site share are cut, and nothing else is; what is counted is exact however it is spilt."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from langmill.common.prepare_settings import BoilerplateSettings
from langmill.data import boilerplate
from langmill.data.boilerplate import Boilerplate, count
from langmill.data.units import BATCH

MENU, NOTICE = "Home   About us   Contact", "版权所有，翻印必究"


def batch(rows: list[tuple[str, str, str]]) -> pa.Table:
    """Of (id, host or "", text)."""
    return pa.Table.from_pylist(
        [
            {"id": id, "text": text, "source": "a", "meta": json.dumps({"url": f"https://{host}/x"} if host else {})}
            for id, host, text in rows
        ],
        BATCH,
    )  # fmt: skip


def cut(step: Boilerplate, rows: list[tuple[str, str, str]]) -> list[str | None]:
    """Texts; None where a document was dropped."""
    after = step(batch(rows))
    return [
        text if gone is None else None
        for text, gone in zip(after["text"].to_pylist(), after["dropped"].to_pylist(), strict=True)
    ]


def test_what_a_host_or_a_folder_shares_is_cut_and_the_same_line_elsewhere_stays(tmp_path: Path) -> None:
    rows = [
        (f"web/{i}.html#00000000", "One.example", f"{MENU}\n\nArticle {i} is here.\n  {NOTICE}")
        for i in range(20)
    ]
    rows += [(f"web/o{i}.html#00000000", "other.example", f"{MENU}\nAnother {i}.") for i in range(9)]
    rows += [
        (f"files/sub/{i}.txt#00000000", "", f"Sent from my telephone\nLetter {i} is here.\n}}")
        for i in range(12)
    ]
    rows += [(f"files/{i}.txt#00000000", "", "Sent from my telephone") for i in range(3)]
    rows += [("web/empty.html#00000000", "one.example", f"{MENU}\n{NOTICE}")]
    step = count(
        [batch(rows[:7]), batch(rows[7:]), batch([])], tmp_path, BoilerplateSettings(cut=True, documents=10)
    )
    wanted: list[str | None] = [f"Article {i} is here." for i in range(20)]
    wanted += [f"{MENU}\nAnother {i}." for i in range(9)] + [f"Letter {i} is here.\n}}" for i in range(12)]
    assert cut(step, rows) == [*wanted, *["Sent from my telephone"] * 3, None]
    dropped = batch(rows).set_column(4, "dropped", pa.array(["x: gone"] * len(rows)))
    assert step(dropped)["text"].equals(dropped["text"])


@given(
    st.lists(
        st.tuples(st.sampled_from("ab"), st.lists(st.sampled_from(["x", "yy", " zz", "é", ""]), max_size=5)),
        max_size=12,
    ),
    st.integers(2, 4),
    st.sampled_from([0.2, 0.5, 1.0]),
)
def test_counts_are_those_of_a_dictionary(
    tmp_path_factory: pytest.TempPathFactory, given_: list[tuple[str, list[str]]], least: int, share: float
) -> None:
    rows = [(f"s/{i}#00000000", site, "\n".join(lines)) for i, (site, lines) in enumerate(given_)]
    counts = Counter((site, line.strip()) for site, lines in given_ for line in set(map(str.strip, lines)))
    sites = Counter(site for site, _ in given_)
    bad = {(s, line) for (s, line), n in counts.items() if line and n >= least and n >= share * sites[s]}
    folder = tmp_path_factory.mktemp("lines")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(boilerplate, "_HELD", 3)
        settings = BoilerplateSettings(cut=True, documents=least, share=share, bytes=1)
        step = count([batch([row]) for row in rows], folder, settings)
    assert len(step.shared) == len(bad)
    for (_, site, text), new in zip(rows, cut(step, rows), strict=True):
        left = [line for line in text.split("\n") if (site, line.strip()) not in bad]
        if len(left) < len(text.split("\n")):
            assert new == ("\n".join(left).strip("\n") if "".join(left).strip() else None)
        else:
            assert new == text

"""Sources in the shares that were asked for, none too often; every document it leaves out or repeats is told apart."""

from __future__ import annotations

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from langmill.common.errors import UsageError
from langmill.data.mixture import Mixture, repeats, weights_of
from langmill.data.units import BATCH


@given(
    st.dictionaries(
        st.text("abc", min_size=1, max_size=2), st.tuples(st.integers(1, 10**9), st.floats(0.01, 100)), min_size=1
    ),
    st.floats(1, 5),
)  # fmt: skip
def test_the_whole_stays_as_long_and_what_is_not_capped_keeps_its_proportion(
    given_: dict[str, tuple[int, float]], most: float
) -> None:
    sizes, weights = {n: s for n, (s, _) in given_.items()}, {n: w for n, (_, w) in given_.items()}
    times = repeats(sizes, weights, most)
    total = sum(sizes.values())
    assert sum(sizes[n] * t for n, t in times.items()) == pytest.approx(total)
    assert all(0 < t <= most for t in times.values())
    ratios = {n: sizes[n] * t / weights[n] for n, t in times.items()}
    free = [ratio for n, ratio in ratios.items() if times[n] < most]
    assert not free or max(free) == pytest.approx(min(free))
    assert all(r <= max(free, default=r) * 1.000001 for n, r in ratios.items() if times[n] == most)


def test_documents_are_left_out_and_repeated_evenly() -> None:
    rows = [
        {"id": f"{source}/x#{i:08d}", "text": f"text {i}", "source": source, "meta": "{}"}
        for source in ("more", "less", "once")
        for i in range(2000)
    ]
    step = Mixture((("less", 0.25), ("more", 2.5)))
    after = step(pa.Table.from_pylist(rows, BATCH))
    assert set(after["dropped"].to_pylist()) == {None, "mixture: more than its source's share"}
    left = step.repeat(after.filter(after["dropped"].is_null()))
    by_source = {s: left["source"].to_pylist().count(s) for s in ("more", "less", "once")}
    assert by_source["once"] == 2000
    assert by_source["more"] == pytest.approx(5000, rel=0.05)
    assert by_source["less"] == pytest.approx(500, rel=0.2)
    ids = left["id"].to_pylist()
    assert len(set(ids)) == len(ids) and ids[:2] == ["more/x#00000000", "more/x#00000000~2"]
    assert [i for i in ids if i.startswith("more")] == sorted(i for i in ids if i.startswith("more"))


def test_weights_name_each_source_once() -> None:
    assert weights_of([], ["a"]) == {}
    assert weights_of(["a=2", "b/c=.5"], ["a", "b/c"]) == {"a": 2, "b/c": 0.5}
    wrong = {
        "a=x": "is not SOURCE=WEIGHT",
        "a=0": "above 0",
        "a=inf": "above 0",
        "webb=1": "did you mean web",
    }
    for given_, told in (wrong | {"a=1": "no weight to web"}).items():
        with pytest.raises(UsageError, match=told):
            weights_of([given_], ["a", "web"])

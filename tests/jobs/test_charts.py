import itertools
import math
import re
from xml.etree import ElementTree

from hypothesis import given
from hypothesis import strategies as st

from langmill.jobs.charts import HEIGHT, WIDTH, Bar, Series, bar_chart, line_chart, number, ticks

finite = st.floats(-1e9, 1e9)


@given(finite, finite)
def test_ticks_are_round_and_cover_the_range(a: float, b: float) -> None:
    low, high = min(a, b), max(a, b)
    marks = ticks(low, high)
    slack = 1e-6 * max(1, abs(low), abs(high))
    assert marks[0] <= low + slack and marks[-1] >= high - slack and 2 <= len(marks) <= 12
    assert all(x < y for x, y in itertools.pairwise(marks))


def test_number() -> None:
    assert [number(v) for v in (0, 0.25, 1500, 2_000_000, 3e9)] == ["0", "0.25", "1.5k", "2M", "3G"]


@given(st.lists(st.tuples(st.floats(0, 1e7), st.floats(allow_nan=True)), max_size=900))
def test_any_line_stays_inside_its_frame(points: list[tuple[float, float]]) -> None:
    points = [(x, y if not math.isfinite(y) else math.fmod(y, 1e6)) for x, y in points]
    html = line_chart("Loss", [Series("a <b>", points)], "x", "y")
    ElementTree.fromstring(html)
    path = re.search(r'points="([^"]+)"', html)
    if path:
        places = [tuple(map(float, p.split(","))) for p in path[1].split()]
        assert len(places) <= 400
        assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in places)


def test_charts_say_what_they_show_and_escape_names() -> None:
    html = line_chart("A & B", [Series("<i>", [(0, 1), (5, 2)], "s1")], "steps", "loss", zero=True)
    figure = ElementTree.fromstring(html)
    svg = figure.find("svg")
    assert svg is not None and svg.get("role") == "img"
    assert svg.get("aria-label") == "A & B. loss over steps: <i> from 1 to 2."
    bars = ElementTree.fromstring(bar_chart("Bits", [Bar("mine", 1.5, (1.2, 1.8)), Bar("xz", 3.0)], "bits"))
    widths = [float(r.get("width", "")) for r in bars.iter("rect")]
    assert math.isclose(widths[1] / widths[0], 2, rel_tol=1e-3)
    assert len([p for p in bars.iter("path") if p.get("class") == "whisker"]) == 1
    assert bar_chart("Bits", [Bar("none", math.nan)], "bits").startswith("<p>")

import re
from html.parser import HTMLParser

from langmill.jobs.report import (
    Page,
    Sample,
    Tile,
    bytes_shown,
    commands,
    count_shown,
    folded,
    join,
    ledger,
    loss_chart,
    render,
    samples,
    seconds_shown,
    settings,
    shown,
    speed_chart,
    table,
    text,
)

VOID = {"meta", "link", "br", "img"}
EVIL = "</div><script>alert('x')</script>&<b>"


class Strict(HTMLParser):
    """Fails on a tag that is closed out of order; notes what a browser would fetch or run."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [
            f"{k}={v}" for k, v in attrs if k in ("src", "href", "data", "action") or k.startswith("on")
        ]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def page() -> Page:
    rows = [{"step": i * 10, "loss": 5 / i, "tokens_per_second": 100.0} for i in range(1, 9)]
    rows += [{"step": 40, "eval_loss": 2.0}, {"step": 80, "eval_loss": None}]
    counts = {"documents": 2, "bytes": 30}
    record = {"read": counts, "kept": counts, "dropped": {EVIL: counts | {"examples": [EVIL]}},
              "sources": {EVIL: {"read": counts, "kept": counts, "dropped": {}}}}  # fmt: skip
    parts = join(
        text(EVIL, note=True),
        table(EVIL, ("a", EVIL), [(EVIL, 1234567), ("x", None)], numbers=1, best=0),
        samples(
            [
                Sample(EVIL, EVIL, EVIL),
                Sample("zh", "床前明月光", "，疑是地上霜"),
                Sample("ar", "مرحبا", " بالعالم"),
            ]
        ),
        commands([(EVIL, EVIL)]),
        folded(EVIL, settings({"train": {"steps": 3, "rate": None}, "x": EVIL})),
        ledger(record),
        loss_chart([(EVIL, rows), ("b", rows)]),
        speed_chart([("", rows)]),
    )
    return Page(EVIL, EVIL, EVIL, [Tile(EVIL, EVIL, EVIL)], [EVIL], [(EVIL, parts)])


def test_a_page_stands_alone_and_escapes_all_it_is_given() -> None:
    html = render(page())
    parser = Strict()
    parser.feed(html)
    parser.close()
    assert parser.open == [] and parser.fetched == []
    assert not {"script", "link", "img", "iframe"} & set(parser.tags)
    assert not re.search(r"url\(|@import|https?://", html)
    assert html.startswith("<!doctype html>") and "alert(&#x27;x&#x27;)" in html and "床前明月光" in html
    assert "1,234,567" in html and "train.steps" in html and 'dir="auto"' in html
    assert parser.tags.count("h1") == 1 and 'scope="row"' in html and 'lang="en"' in html


def test_values_for_people() -> None:
    assert [shown(v) for v in (None, True, 1234, 0.12345, 123456.7, [1, "a"])] == [
        "–",
        "yes",
        "1,234",
        "0.1235",
        "123,457",
        "1, a",
    ]
    assert [bytes_shown(n) for n in (12, 1_234_567)] == ["12 bytes", "1.23 MB"]
    assert [count_shown(n) for n in (12, 1_234_567)] == ["12", "1.23 M"]
    assert [seconds_shown(s) for s in (1.234, 75, 100, 7265, 300_000)] == [
        "1.2 s",
        "75 s",
        "1 min 40 s",
        "2 h 1 min",
        "3.5 days",
    ]

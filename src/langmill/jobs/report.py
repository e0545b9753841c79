"""The report: one HTML page that stands alone, with its style and charts inside and no script.

Everything that comes from text, settings or a model is escaped here, so callers hand over plain strings.
Parts that are HTML already have the type Html.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.resources import files
from typing import Any, NewType

from langmill.jobs.charts import Series, line_chart

Html = NewType("Html", str)


@dataclass(frozen=True)
class Tile:
    """One figure of the first row: `more` says what it is measured on."""

    label: str
    value: str
    more: str = ""


@dataclass(frozen=True)
class Sample:
    """What a model wrote after `prompt`; `style` is the model's colour class."""

    by: str
    prompt: str
    text: str
    style: str = "s0"


@dataclass(frozen=True)
class Page:
    """A report: `notices` are warnings that come first, `sections` headings with their content."""

    title: str
    kicker: str
    summary: str
    tiles: Sequence[Tile] = ()
    notices: Sequence[str] = ()
    sections: Sequence[tuple[str, Html]] = field(default_factory=tuple)


def render(page: Page) -> str:
    """The whole page as UTF-8 text."""
    style = (files("langmill.jobs") / "report.css").read_text(encoding="utf-8")
    tiles = "".join(
        f'<li><span class="label">{escape(t.label)}</span><span class="value">{escape(t.value)}</span>'
        f'<span class="more">{escape(t.more)}</span></li>'
        for t in page.tiles
    )
    notices = "".join(
        f'<p class="notice" role="note"><strong>Note.</strong> {escape(n)}</p>' for n in page.notices
    )
    sections = "".join(
        f'<section aria-labelledby="part-{i}"><h2 id="part-{i}">{escape(heading)}</h2>{content}</section>'
        for i, (heading, content) in enumerate(page.sections)
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(page.title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n"
        f'<header><p class="kicker">{escape(page.kicker)}</p><h1>{escape(page.title)}</h1>'
        f'<p class="summary">{escape(page.summary)}</p></header>\n{notices}'
        f'<ul class="tiles" aria-label="Main figures">{tiles}</ul>\n{sections}\n'
        "<footer>Written by Langmill. This page needs no network and holds its charts, styles and samples "
        "itself. The samples are a model's output: they can be wrong and can repeat training text.</footer>\n"
        "</main>\n</body>\n</html>\n"
    )


def text(words: str, note: bool = False) -> Html:
    """A paragraph."""
    return Html(f"<p{' class=note' if note else ''}>{escape(words)}</p>")


def join(*parts: str) -> Html:
    """Parts one after the other."""
    return Html("".join(parts))


def table(
    caption: str,
    head: Sequence[str],
    rows: Iterable[Sequence[object]],
    numbers: int = 0,
    best: int | None = None,
) -> Html:
    """A table whose first column names the row. The last `numbers` columns are set right, row `best` bold."""
    first = len(head) - numbers

    def cell(tag: str, index: int, value: object, scope: str = "") -> str:
        return f"<{tag}{scope}{' class=n' if index >= first else ''}>{escape(shown(value))}</{tag}>"

    top = "".join(cell("th", i, name, ' scope="col"') for i, name in enumerate(head))
    body = "".join(
        f"<tr{' class=best' if i == best else ''}>"
        + cell("th", 0, row[0], ' scope="row"')
        + "".join(cell("td", j, value) for j, value in enumerate(row[1:], 1))
        + "</tr>"
        for i, row in enumerate(rows)
    )
    return Html(
        f'<div class="scroll"><table><caption>{escape(caption)}</caption><thead><tr>{top}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def samples(items: Iterable[Sample]) -> Html:
    """Prompts and what came of them; right-to-left text is set right to left."""
    return Html(
        "".join(
            (f'<p class="by">{escape(s.by)}</p>' if s.by else "")
            + f'<div class="sample {escape(s.style)}" dir="auto"><b>{escape(s.prompt)}</b>{escape(s.text)}</div>'
            for s in items
        )
    )


def commands(items: Iterable[tuple[str, str]]) -> Html:
    """What to do next: a sentence and the command line for it."""
    return Html(
        "".join(f'<p>{escape(why)}</p><pre class="command">{escape(line)}</pre>' for why, line in items)
    )


def folded(title: str, content: str) -> Html:
    """Content that is shown on a click, and always on paper where the reader opened it."""
    return Html(f"<details><summary>{escape(title)}</summary>{content}</details>")


def settings(values: Mapping[str, Any]) -> Html:
    """Settings as a table of dotted names."""
    return table("The settings as resolved", ("setting", "value"), sorted(_flat(values)))


def ledger(record: Mapping[str, Any]) -> Html:
    """Documents and bytes (a `Ledger.as_dict()`): read, kept, and left out with the reason and examples."""
    rows: list[tuple[object, ...]] = [("read", record["read"]["documents"], record["read"]["bytes"], "")]
    for reason, count in record["dropped"].items():
        rows.append((f"left out: {reason}", count["documents"], count["bytes"], "; ".join(count["examples"])))
    rows.append(("kept", record["kept"]["documents"], record["kept"]["bytes"], ""))
    total = table(
        "Every document is counted once: read = left out + kept", ("", "documents", "bytes", "where"), rows
    )
    by_source = [
        (name, entry["read"]["documents"], entry["kept"]["documents"], entry["kept"]["bytes"])
        for name, entry in record["sources"].items()
    ]
    head = ("source", "read", "kept", "bytes kept")
    return join(
        total, folded(f"By source ({len(by_source)})", table("Documents by source", head, by_source, 3))
    )


def loss_chart(models: Sequence[tuple[str, Sequence[Mapping[str, Any]]]]) -> Html:
    """Loss over steps of one or several models, each a name and its rows of metrics.jsonl."""
    lines = []
    for index, (name, rows) in enumerate(models):
        label = f"{name}, " if name else ""
        lines.append(Series(f"{label}training", _points(rows, "loss"), f"s{index}"))
        lines.append(Series(f"{label}held out", _points(rows, "eval_loss"), f"v{index}"))
    return Html(line_chart("Loss", lines, "optimizer steps", "nats a token"))


def speed_chart(models: Sequence[tuple[str, Sequence[Mapping[str, Any]]]]) -> Html:
    """Tokens a second over the run."""
    lines = [
        Series(name or "training", _points(rows, "tokens_per_second"), f"s{index}")
        for index, (name, rows) in enumerate(models)
    ]
    return Html(line_chart("Speed", lines, "optimizer steps", "tokens a second", zero=True))


def _points(rows: Iterable[Mapping[str, Any]], y: str) -> list[tuple[float, float]]:
    return [(float(row["step"]), float(row[y])) for row in rows if row.get(y) is not None]


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, object]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def shown(value: object) -> str:
    """A value for people: thousands set apart, floats to four digits, None as a dash."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 10_000 else f"{value:,.0f}"
    if isinstance(value, (list, tuple)):
        return ", ".join(shown(v) for v in value) or "–"
    return str(value)


def bytes_shown(count: float) -> str:
    """1,234,567 → 1.2 MB."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count:.0f} bytes"


def count_shown(count: float) -> str:
    """1,234,567 → 1.23 M."""
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count:.0f}"


def seconds_shown(seconds: float) -> str:
    """75 → 1 min 15 s."""
    if seconds < 90:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 90:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours / 24:.1f} days"


def machine() -> str:
    """The machine in a few words."""
    return f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"

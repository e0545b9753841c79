"""Markdown that a model wrote as HTML that is safe to show: CommonMark with tables and strikethrough.

What comes out holds no script, no style, nothing that loads from anywhere: pictures become links, HTML in the text
stays text, and links do not tell where they were followed from.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import nh3
from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markdown_it.token import Token
from markdown_it.utils import EnvType, OptionsDict

TAGS = {
    "a", "blockquote", "br", "code", "del", "em", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "li", "ol", "p", "pre", "s",
    "strong", "table", "tbody", "td", "th", "thead", "tr", "ul",
}  # fmt: skip
ATTRIBUTES = {
    "a": {"href", "title"}, "code": {"class"}, "ol": {"start"}, "td": {"align"}, "th": {"align"},
}  # fmt: skip
SCHEMES = {"http", "https", "mailto"}


def render(text: str) -> str:
    """The HTML of a text."""
    return _clean(_parser().render(text))


class Blocks:
    """Markdown that arrives in pieces: each block is made HTML once, as soon as nothing can be added to it.

    The blocks joined are what `render` makes of the whole, but for links whose address comes only later.
    """

    def __init__(self) -> None:
        self.rest = ""  # what is no finished block yet, as plain text
        self._parser, self._known = _parser(), dict[str, Any]()
        self._due = (
            0  # characters of `rest` that make it worth looking: a long block is not read for each line
        )

    def push(self, piece: str) -> str:
        """The HTML of the blocks that this piece completes, mostly none."""
        self.rest += piece
        if "\n" not in piece or len(self.rest) < self._due:  # a line says what it is once it is whole
            return ""
        lines = self.rest.split("\n")
        starts = [
            token.map[0]
            for token in self._parser.parse("\n".join([*lines[:-1], ""]), self._known)
            if token.level == 0 and token.map and token.nesting >= 0
        ]
        if not starts or not starts[-1]:
            self._due = len(self.rest) * 9 // 8
            return ""
        self._due = 0
        done, self.rest = "\n".join([*lines[: starts[-1]], ""]), "\n".join(lines[starts[-1] :])
        return _clean(self._parser.render(done, self._known))


def _parser() -> MarkdownIt:
    made = MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"])
    made.add_render_rule("image", _picture)
    for name in ("td_open", "th_open"):
        made.add_render_rule(name, _cell)
    return made


def _picture(
    renderer: RendererHTML, tokens: Sequence[Token], place: int, options: OptionsDict, env: EnvType
) -> str:
    """A picture as a link to it."""
    token = tokens[place]
    link = Token("link_open", "a", 1, attrs={"href": token.attrs.get("src", "")})
    label = renderer.renderInlineAsText(token.children, options, env) or str(token.attrs.get("src", ""))
    return f"{renderer.renderToken([link], 0, options, env)}{_escaped(label)}</a>"


def _cell(
    renderer: RendererHTML, tokens: Sequence[Token], place: int, options: OptionsDict, env: EnvType
) -> str:
    """A table's cell, aligned without a style."""
    token = tokens[place]
    if style := token.attrs.pop("style", None):
        token.attrs["align"] = str(style).removeprefix("text-align:")
    return renderer.renderToken(tokens, place, options, env)


def _escaped(text: str) -> str:
    cleaned: Any = nh3.clean_text(text)
    return str(cleaned)


def _clean(html: str) -> str:
    return nh3.clean(
        html, tags=TAGS, attributes=ATTRIBUTES, attribute_filter=_attribute, url_schemes=SCHEMES,
        link_rel="noopener noreferrer nofollow",
    )  # fmt: skip


def _attribute(tag: str, name: str, value: str) -> str | None:
    """A language's name is all that a class may say, and an address must say where it leads."""
    if name == "class":
        return value if value.startswith("language-") and " " not in value else None
    if name == "href":
        return value if value.partition(":")[0].lower() in SCHEMES else None
    return value

"""What a model writes cannot run, load or spy in the page; and blocks that arrive in pieces are those of the whole."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from langmill.serve.markdown import SCHEMES, TAGS, Blocks, render

ATTACKS = [
    "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "<svg/onload=alert(1)>", "<iframe src=//e.org>",
    "[a](javascript:alert(1))", "[a](JaVaScRiPt:alert(1))", "[a](java\nscript:alert(1))",
    "[a](data:text/html,<script>)",
    "[a](vbscript:x)", "[a](&#106;avascript:alert(1))", "[a](java%0ascript:alert(1))", "<javascript:alert(1)>",
    "![a](https://e.org/spy.png)", "![a](javascript:alert(1))", '![a"onerror="alert(1)](x)',
    "[![a](//e.org/x)](//e.org)",
    '[a](https://e.org "\\" onmouseover=alert(1) x=\\"")', "```\"><script>alert(1)</script>\nx\n```",
    "```x onload=alert(1)\nx\n```", "<style>*{background:url(//e.org)}</style>", "[a](//e.org/x)", "[a](/api/x)",
    "|a|\n|:-:|\n|<img src=x onerror=alert(1)>|", "<a href='https://e.org' target=_top onclick=x>b</a>",
    "[a]: javascript:alert(1)\n\n[a]", "<!--><img src=x onerror=alert(1)>-->", "<math><mtext></math><script>x</script>",
    "\u202e[a](ht\ttps://e.org)", "[a](https://e.org\x00)", "> <base href=//e.org>", "<form action=//e.org><input>",
]  # fmt: skip


class Seen(HTMLParser):
    """Every tag and attribute of some HTML."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def assert_safe(html: str) -> None:
    for tag, attributes in Seen(html).tags:
        assert tag in TAGS
        assert set(attributes) <= {"href", "title", "rel", "class", "start", "align"}
        if (address := attributes.get("href")) is not None:
            assert address.partition(":")[0].lower() in SCHEMES
            assert attributes["rel"] == "noopener noreferrer nofollow"


@pytest.mark.parametrize("attack", ATTACKS)
def test_attacks_become_text_or_nothing(attack: str) -> None:
    html = render(attack)
    assert_safe(html)
    assert_safe(Blocks().push(attack + "\n\nend\n"))


@given(st.text(st.sampled_from("<>[]()!\"'`&#:=/\\ \n|-*_javscriptonl\x00é"), max_size=80))
def test_no_text_makes_anything_else(text: str) -> None:
    assert_safe(render(text))


def test_what_markdown_is_for() -> None:
    html = render(
        "# 标题\n\n**a** ~~b~~ `c<d`\n\n|x|\n|--:|\n|1|\n\n3. z\n\n```py\nif a < b:\n```\n\n[l](https://e.org/?a=1&b=2)"
    )
    for part in (
        "<h1>标题</h1>", "<strong>a</strong>", "<s>b</s>", "<code>c&lt;d</code>", '<td align="right">1</td>',
        '<ol start="3">', '<code class="language-py">if a &lt; b:', 'href="https://e.org/?a=1&amp;b=2"',
    ):  # fmt: skip
        assert part in html
    assert render("![a cat](https://e.org/cat.png)").startswith('<p><a href="https://e.org/cat.png"')
    assert render("<b>bold</b>") == "<p>&lt;b&gt;bold&lt;/b&gt;</p>\n"


LINES = st.sampled_from([
    "word", "# head", "#not", "- item", "  - inner", "    deep", "1. one", "> quote", "```", "```py", "---", "===", "",
    "", "| a | b |", "|---|:-:|", "| 1 | 2 |", "**bold", "~~~", "\tcode", "text  ", "<div>", "[a](https://e.org)",
])  # fmt: skip


@given(st.lists(LINES, max_size=14), st.integers(1, 7))
def test_blocks_in_pieces_are_those_of_the_whole(lines: list[str], size: int) -> None:
    text, blocks = "\n".join(lines), Blocks()
    made = "".join(blocks.push(text[at : at + size]) for at in range(0, len(text), size))
    assert made + render(blocks.rest) == render(text)


def test_a_finished_block_is_told_as_soon_as_the_next_one_begins() -> None:
    blocks = Blocks()
    assert (blocks.push("Some *text*"), blocks.push(".\n\n"), blocks.push("- ")) == ("", "", "")
    assert blocks.push("a\n") == "<p>Some <em>text</em>.</p>\n"
    assert blocks.rest == "- a\n"

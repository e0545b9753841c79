"""Main text out of pages, PDFs and mail, and what hostile ones cost: one document, never the run."""

from __future__ import annotations

import io
import logging
import threading
import time
from collections.abc import Iterator
from email.message import EmailMessage
from types import SimpleNamespace
from typing import Any

import pytest

from langmill.data.chats import Unusable
from langmill.data.extract import NOTHING, decoded, html, mail, pdf
from langmill.data.guard import Guard

WORDS = "The garden behind the house was full of old apple trees, and nobody had cut them for years. "
PAGE = (
    '<html lang="en"><head><title>Apples &amp; pears</title><link rel="license" href="https://example.org/by"></head>'
    f"<body><nav><a href=/>Home</a><a href=/b>About</a></nav><article><h1>Apples</h1><p>{WORDS * 3}</p>"
    f"<p>Café 你好 مرحبا {WORDS * 2}</p></article><footer>Copyright, all rights reserved</footer></body></html>"
)
JAPANESE = "宣言は間違っていますが、この文章はシフトJISで書かれています。東京の天気は今日も晴れでした。"
RUSSIAN = "Привет, это письмо по-русски, хотя заголовок говорит иначе. Погода сегодня хорошая."


def test_a_page_gives_its_main_text_and_what_it_says_of_itself() -> None:
    [(text, meta)] = html(PAGE.encode())
    assert (
        WORDS.strip() in text and "Café 你好 مرحبا" in text and "About" not in text and "rights" not in text
    )
    assert meta == {"title": "Apples & pears", "lang": "en", "licence": "https://example.org/by"}


def test_what_the_libraries_think_goes_nowhere_and_others_are_heard(
    caplog: pytest.LogCaptureFixture,
) -> None:
    for read, data in (
        (html, b"<p>"),
        (html, b"<html><body><div></div></body></html>"),
        (pdf, "no-such.pdf"),
    ):
        with pytest.raises(Unusable):
            read(data)  # type: ignore[operator]
    assert not caplog.records
    logging.getLogger("langmill").error("heard")
    assert [record.message for record in caplog.records] == ["heard"]


@pytest.mark.parametrize(
    ("data", "declared", "text", "encoding"),
    [
        ("café".encode(), "windows-1252", "café", "utf-8"),  # a wrong declaration
        ("café".encode("cp1252"), "utf-8", "café", "windows-1252"),
        ("привет".encode("koi8-r"), "koi8-r", "привет", "koi8-r"),
        ("你好".encode("gb18030"), "gb18030", "你好", "gb18030"),
        ("<meta charset=shift_jis>日本".encode("shift_jis"), "", "<meta charset=shift_jis>日本", "shift_jis"),
        ("\ufeffhello".encode("utf-16"), "", "hello", "utf-16"),
        (b"caf\xe9", "no-such-encoding", "café", "windows-1252"),
        (b"a\xe9", "zlib", "aé", "windows-1252"),  # a codec, and no encoding of text
        ("明日の会議".encode("iso2022_jp"), "ISO-2022-JP", "明日の会議", "iso-2022-jp"),  # which is ASCII too
        ("明日の会議".encode("iso2022_jp"), "", "明日の会議", "iso-2022-jp"),
        (JAPANESE.encode("shift_jis"), "utf-8", JAPANESE, "cp932"),  # of which nothing that is named is true
        (RUSSIAN.encode("cp1251"), "us-ascii", RUSSIAN, "cp1251"),
        (b"%s\xff." % ("你好" * 9).encode(), "", "你好" * 9 + "\ufffd.", "utf-8"),
        ("<b>caféé".encode()[:-1], "", "<b>café", "utf-8"),  # cut within a character
        ("“Größe” des Käses".encode("cp1252"), "ascii", "“Größe” des Käses", "windows-1252"),
    ],
)
def test_bytes_are_read_by_what_they_are_before_what_was_declared(
    data: bytes, declared: str, text: str, encoding: str
) -> None:
    assert decoded(data, declared) == (text, encoding)


def letter(**headers: str) -> EmailMessage:
    message = EmailMessage()
    for name, value in {"From": "ann@example.org", "Subject": "Apples", **headers}.items():
        message[name.replace("_", "-")] = value
    return message


def test_a_mail_gives_subject_and_text_and_not_who_wrote_it() -> None:
    message = letter(Message_ID="<2@x>", References="<1@x> <1b@x>", Date="Mon, 02 Jan 2023 10:00:00 +0000")
    message.set_content("They are ripe. Grüße, 你好")
    message.add_alternative("<p>They are ripe</p>", subtype="html")
    [(text, meta)] = mail(bytes(message))
    assert text == "Apples\n\nThey are ripe. Grüße, 你好\n"
    assert meta == {"date": "Mon, 02 Jan 2023 10:00:00 +0000", "id": "<2@x>", "thread": "<1@x>"}
    message.add_attachment("What else there is", filename="more.txt")
    assert mail(bytes(message)) == [(text, meta | {"attachments": 1})]
    only = letter()
    only.set_content(PAGE, subtype="html")
    assert WORDS.strip() in mail(bytes(only))[0][0]


def test_a_subject_in_bytes_of_no_stated_encoding_is_read_as_the_text_is() -> None:
    text = "Grüße aus Köln\n\n> Who asks?\nÄpfel"
    assert mail(f"Subject: {text}".encode("cp1252")) == [(text, {})]


def test_bytes_that_fit_no_encoding_are_set_aside() -> None:
    with pytest.raises(Unusable, match="neither UTF-8 nor shift_jis"):
        decoded(b"<p>" + b"a\x81 \x8d " * 50, "shift_jis")


@pytest.mark.parametrize(
    "data", [b"", b"Subject: x\n\n", b"Content-Type: multipart/mixed; boundary=a\n\n--a\n" * 30]
)
def test_a_mail_without_text_says_so(data: bytes) -> None:
    with pytest.raises(Unusable):
        mail(data)


def made_pdf(text: str, loop: bool = False) -> bytes:
    """A PDF of one page; with `loop` its tree of pages leads back to itself."""
    stream = f"BT /F1 12 Tf 72 700 Td ({text}) Tj ET".encode()
    kids = "[2 0 R]" if loop else "[3 0 R]"
    objects = [
        b"<</Type/Catalog/Pages 2 0 R>>",
        f"<</Type/Pages/Kids{kids}/Count 1>>".encode(),
        b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 612 792]/Contents 4 0 R/Resources<</Font<</F1 5 0 R>>>>>>",
        b"<</Length %d>>stream\n%s\nendstream" % (len(stream), stream),
        b"<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>",
    ]
    out, places = io.BytesIO(b"%PDF-1.4\n"), []
    out.seek(0, 2)
    for number, body in enumerate(objects, 1):
        places.append(out.tell())
        out.write(b"%d 0 obj" % number + body + b"endobj\n")
    start = out.tell()
    out.write(b"xref\n0 6\n0000000000 65535 f \n" + b"".join(b"%010d 00000 n \n" % place for place in places))
    out.write(b"trailer<</Size 6/Root 1 0 R>>\nstartxref\n%d\n%%%%EOF" % start)
    return out.getvalue()


def test_a_pdf_gives_its_text_and_broken_ones_a_reason(tmp_path: Any) -> None:
    file = tmp_path / "a.pdf"
    file.write_bytes(made_pdf("Apples are ripe"))
    assert pdf(str(file)) == [("Apples are ripe", {"pages": 1})]
    for data in (made_pdf("x", loop=True), made_pdf("x")[:200], b"%PDF-1.4\n" + b"\0" * 1000, b""):
        file.write_bytes(data)
        with pytest.raises(Unusable):
            pdf(str(file))


@pytest.fixture(scope="module")
def guard() -> Iterator[Guard]:
    with Guard(1.5, 1 << 30) as made:
        made.call("html", PAGE.encode())
        yield made


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"<div>" * 100_000 + WORDS.encode() * 9, "no text in the page"),
        (b"<html><body><p>" + b"hello world " * 900_000, "no text in the page"),
        (b"<html><body>" + b"<p>hello world this is it</p>" * 120_000, "took too long to read"),
        (b"\0" * 100_000, "no text in the page"),
    ],
)
def test_a_hostile_page_costs_itself_alone(guard: Guard, data: bytes, reason: str) -> None:
    with pytest.raises(Unusable) as error:
        guard.call("html", data)
    assert error.value.reason == reason
    assert WORDS.strip() in guard.call("html", PAGE.encode())[0][0]  # the next one is read


def test_a_reader_that_is_killed_is_replaced_and_what_kills_it_alone_is_told(guard: Guard) -> None:
    guard._process.kill()  # what came before may have a part in it
    assert guard.call("html", PAGE.encode())
    with Guard(30, 1 << 30) as fresh:

        def kill() -> None:
            while fresh._process is None or not fresh._process.is_alive():
                time.sleep(0.01)
            fresh._process.kill()

        killer = threading.Thread(target=kill)
        killer.start()
        with pytest.raises((Unusable, OSError)):
            fresh.call("html", b"<html><body>" + b"<p>hello world this is it</p>" * 120_000)
        killer.join()
        assert fresh.call("html", PAGE.encode())


@pytest.mark.parametrize(
    "reason, full, tries", [("cannot be read", False, 2), (NOTHING, False, 1), (NOTHING, True, 2)]
)
def test_what_others_may_have_caused_is_tried_alone(
    monkeypatch: pytest.MonkeyPatch, reason: str, full: bool, tries: int
) -> None:
    made, asked = Guard(1, 1 << 30), list[str]()

    def call(self: Guard, name: str, *given: Any) -> Any:
        asked.append(name)
        self._full = full
        raise Unusable(reason, "x")

    monkeypatch.setattr(Guard, "_call", call)
    made._pipe = SimpleNamespace(close=lambda: None)  # type: ignore[assignment]  # it has served others
    with pytest.raises(Unusable):
        made.call("html", b"x")
    assert len(asked) == tries

"""What is found where: forms, context, scripts, overlaps, made-up people, and texts made to take long."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from langmill.privacy.patterns import Find, apart, find, tables
from langmill.privacy.plain import plain

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
KEY = (
    "-----BEGIN RSA PRIVATE KEY-----\nMIIEow"
    + "Ab1+" * 12
    + "\n"
    + "Cd2/" * 15
    + "\n-----END RSA PRIVATE KEY-----"
)


def said(text: str) -> list[tuple[str, str]]:
    return [(text[one.start : one.end], one.type) for one in find(text)]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("mail <Joe.Bloggs+x@mail.example.co.uk>, now", [("Joe.Bloggs+x@mail.example.co.uk", "email")]),
        ("邮箱zhang@example.com联系", [("zhang@example.com", "email")]),
        ("icon@2x.png and @name and a@b", []),
        ("+44 20 7946 0958 3 items", [("+44 20 7946 0958", "phone")]),
        ("(212) 555-0100 ext. 12", [("(212) 555-0100 ext. 12", "phone")]),
        ("030/1234567, 0151 23456789", [("030/1234567", "phone"), ("0151 23456789", "phone")]),
        ("089 12 34 56-0 und so", [("089 12 34 56-0", "phone")]),
        ("0755-88888888、0755-8888 8888", [("0755-88888888", "phone"), ("0755-8888 8888", "phone")]),
        ("331 900 000 people, 602 214 076 000 000 m", []),
        ("06 12 34 56 78", [("06 12 34 56 78", "phone")]),
        ("call 4155550100", [("4155550100", "phone")]),
        ("total 4155550100", []),
        ("order 555-234-5678; phone 555-234-5678", [("555-234-5678", "phone")]),
        ("电话：１３８００１３８０００", [("１３８００１３８０００", "phone")]),
        ("رقم الهاتف ٠١٠٠١٢٣٤٥٦٧", [("٠١٠٠١٢٣٤٥٦٧", "phone")]),
        ("फ़ोन ९८७६५ ४३२१०", [("९८७६५ ४३२१०", "phone")]),
        ("04 00 03 00 00 10 01 02 03 04 05 call 318.653496, Boston, MA 02111-1307", []),
        ("Austin, TX 78701 +1 512 374 0500", [("+1 512 374 0500", "phone")]),
        ("2024-01-02 12:30:45, 01.02.2024 12:30, 3.14159265358979", []),
        ("card 4111 1111 1111 1111 12/29", [("4111 1111 1111 1111", "card")]),
        ("card 4111 1111 1111 1112", []),
        ("676325899133, Maestro card 676325899133", [("676325899133", "card")]),
        ("2 71 11 2B 033 221 41", [("2 71 11 2B 033 221 41", "fr_nir")]),
        ("IBAN GB82 WEST 1234 5698 7654 32.", [("GB82 WEST 1234 5698 7654 32", "iban")]),
        ("DE89370400440532013000X", []),
        ("123-45-6780", [("123-45-6780", "us_ssn")]),
        ("123456780", []),
        ("Social Security: 123456780", [("123456780", "us_ssn")]),
        ("QQ123456C, AB123456C", [("AB123456C", "uk_nino")]),
        ("NHS 943 476 5919", [("943 476 5919", "uk_nhs")]),
        ("Steuer-ID 86 095 742 719", [("86 095 742 719", "de_tax_id")]),
        ("Ausweis L01X00T471", [("L01X00T471", "de_id_card")]),
        ("NIR 1 84 12 76 451 089 46", [("1 84 12 76 451 089 46", "fr_nir")]),
        ("2341 2341 2346 / ABCPE1234F", [("2341 2341 2346", "in_aadhaar"), ("ABCPE1234F", "in_pan")]),
        ("身份证11010519491231002X。", [("11010519491231002X", "cn_id")]),
        ("from 203.0.113.7:22", [("203.0.113.7", "ip")]),
        ("version 1.2.3.4, v1.2.3.4, 1.2.3.4.5, 127.0.0.1", []),
        ("fe80::1%eth0 2001:db8::8a2e:370:7334", [("fe80::1", "ip"), ("2001:db8::8a2e:370:7334", "ip")]),
        ("::ffff:203.0.113.7 64:ff9b::1", [("::ffff:203.0.113.7", "ip"), ("64:ff9b::1", "ip")]),
        ("std::dec a::b ::1 12:30:45 [::2]", []),
        ("00:1A:2B:3C:4D:5E 001a.2b3c.4d5e", [("00:1A:2B:3C:4D:5E", "mac"), ("001a.2b3c.4d5e", "mac")]),
        ("16:27:ac:a5:76:28:2d:36", []),
        ("see https://joe:pw@example.com/x?y=1.", [("https://joe:pw@example.com/x?y=1", "url")]),
        ("http://a.example），电话:0760@b http://a.example:80/@x", []),
        ("key AKIA" + "ABCDEFGH12345678", [("AKIA" + "ABCDEFGH12345678", "secret")]),
        ("api_key: 'abcDEF1234567890xyzQ'", [("abcDEF1234567890xyzQ", "secret")]),
        ("密码：abcDEF1234567890xyzQ", [("abcDEF1234567890xyzQ", "secret")]),
        ("token: " + "aB3d5F7h" * 100 + ". end", [("aB3d5F7h" * 100, "secret")]),
        ("token = get_token1234567890(x)", []),
        (f"a {KEY} b", [(KEY, "private_key")]),
        (KEY.partition("-----END")[0], [(KEY.partition("\n-----END")[0], "private_key")]),
        ("joe [at] mail (dot) example.org! joe%2Bx%40example.com&y", [("joe [at] mail (dot) example.org", "email"),
         ("joe%2Bx%40example.com", "email")]),
        ("meet me at example dot com, look (at) this. Then", []),
        ("joe+news@bücher.example, почта@пример.рф", [("joe+news@bücher.example", "email"),
         ("почта@пример.рф", "email")]),
        ("iban gb82 west 1234 5698 7654 32 and", [("gb82 west 1234 5698 7654 32", "iban")]),
        ("DE89.3704.0044.0532.0130.00, De89370400440532013000", [("DE89.3704.0044.0532.0130.00", "iban"),
         ("De89370400440532013000", "iban")]),
        ("se11 the quick brown fox jumped over", []),
        ("4111.1111.1111.1111 or 4111 - 1111 - 1111 - 1111", [("4111.1111.1111.1111", "card"),
         ("4111 - 1111 - 1111 - 1111", "card")]),
        ("AE51 4111 1111 1111 1111 123; card 4111 1111 1111 1111 123", [("4111 1111 1111 1111", "card")]),
        ("4111.1111.1111.1112 192.168.1.10.4 2024.1127.0945.1234", []),
        ("912-71-1234; order 912-71-1234; my itin is 912 94 1234", [("912-71-1234", "us_itin"),
         ("912 94 1234", "us_itin")]),
        ("Steuer-ID 8609 5742 719", [("8609 5742 719", "de_tax_id")]),
        ("2 71 11 2b 033 221 41; sécu 1 8412 76451 089 46", [("2 71 11 2b 033 221 41", "fr_nir"),
         ("1 8412 76451 089 46", "fr_nir")]),
        ("AB 123456 C, ab 12 34 56 c, ni number ab 123456c", [("AB 123456 C", "uk_nino"), ("ab 12 34 56 c", "uk_nino"),
         ("ab 123456c", "uk_nino")]),
        ("sales rose by 123456 a year", []),
        ("code abcpe1234f; aadhaar 2341.2341.2346, pan abcpe1234f", [("2341.2341.2346", "in_aadhaar"),
         ("abcpe1234f", "in_pan")]),
        ("020.7946.0958 030.123.45.67 (0)20 7946 0958", [("020.7946.0958", "phone"), ("030.123.45.67", "phone"),
         ("(0)20 7946 0958", "phone")]),
        ("(212).555.0100 138.0013.8000 91-9876543210", [("(212).555.0100", "phone"), ("138.0013.8000", "phone"),
         ("91-9876543210", "phone")]),
        ("030.1234567 on 01131.00012, tel. 030.1234567", [("030.1234567", "phone")]),
        ("code a1b2-c3d4-e5f6, 4111.1111.1111; mac 001a-2b3c-4d5e", [("001a-2b3c-4d5e", "mac")]),
        ("https://hooks.slack.com/services/T0AB12CD3/B0AB12CD3/" + "aB3" * 8,
         [("hooks.slack.com/services/T0AB12CD3/B0AB12CD3/" + "aB3" * 8, "secret")]),
        ("550e8400-e29b-41d4-a716-446655440000 978-3-16-148410-0 0-306-40615-2", []),
    ],
)  # fmt: skip
def test_forms(text: str, found: list[tuple[str, str]]) -> None:
    assert said(text) == found


def test_made_up_people_are_found_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sentences and names that are held back; wrong check digits, orders, versions, hashes among them."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import _people

    made = _people.rows(900, held=True, seed=5)
    scores = _people.score([[(f.start, f.end, f.type) for f in find(row.text)] for row in made], made)
    assert scores["all"]["f1"] >= 0.97 and scores["all"]["spans"] > 800
    assert {name: s["f1"] for name, s in scores.items() if s["spans"] > 30 and s["f1"] < 0.8} == {}


def test_finds_are_joined_where_they_overlap() -> None:
    one, two, three = Find(0, 5, "a"), Find(3, 12, "b"), Find(12, 14, "c")
    assert apart([three, two, one]) == [Find(0, 12, "b"), three]
    assert apart([Find(0, 4, "a"), Find(0, 4, "b", True)]) == [Find(0, 4, "b", True)]


@given(st.text("0123456789 .-/()+:@abfXZ٣１，电\n=_", max_size=200))
def test_finds_are_in_order_apart_and_inside(text: str) -> None:
    ends = 0
    for one in find(text):
        assert ends <= one.start < one.end <= len(text) and one.type in tables().types
        ends = one.end
    assert len(plain(text)) == len(text)


def test_digits_of_every_script_read_as_their_value() -> None:
    assert plain("٣１३৩３−　＠") == "31333- @"
    assert plain("abc") == "abc"


PIECES = (
    "1", "1 ", "12 34 ", "a@", ":", "::1", "0171-", "(0", "1.", "1.1.1.1 ", "AB12 ", "-00", "a://b:", "token_", "sk-1",
    "eyJ-", "-----BEGIN PRIVATE KEY-----\n", "x@a.", "tel 030 1234567 ", "1234567890" * 4 + " ", "٠", "123-45-6780 ",
)  # fmt: skip


@pytest.mark.parametrize("piece", PIECES)
def test_time_grows_with_the_length_alone(piece: str) -> None:
    """Twice the text takes about twice the processor's time, not four times: no pattern goes back over all of it."""
    times = []
    for size in (15_000, 60_000):
        text = piece * (size // len(piece))
        began = time.process_time()
        find(text)
        times.append(time.process_time() - began)
    assert times[1] < 10 * times[0] + 0.3

"""Check digits: against published examples, and by the one digit that any of them must notice."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from langmill.privacy import checks
from langmill.privacy.checks import CHECKS

RIGHT = {
    "card": ["4111 1111 1111 1111", "3782-822463-10005", "5555555555554444", "6011111111111117"],
    "iban": ["GB82 WEST 1234 5698 7654 32", "de89370400440532013000", "FR14 2004 1010 0505 0001 3M02 606"],
    "aadhaar": ["2341 2341 2346"],
    "ssn": ["123-45-6780", "899-01-0001"],
    "itin": ["912-50-1234", "912711234", "999 99 0001"],
    "nino": ["AB 12 34 56 C"],
    "nhs": ["943 476 5919"],
    "steuer_id": ["86095742719", "47 036 892 816"],
    "id_card": ["L01X00T471", "T220001293"],
    "nir": ["2 55 08 14 168 025 38", "1 84 12 76 451 089 46"],
    "resident": ["11010519491231002X"],
    "dni": ["12345678Z", "X1234567L", "54362315-K"],
    "luhn": ["79927398713"],
    "ip": ["8.8.8.8", "2001:db8::1"],
    "mac": ["00:1A:2B:3C:4D:5E"],
    "egyptian": ["29001011234567"],
    "secret": ["wJalrXUtnFEMI7MDENGbPxRfiCY"],
}
WRONG = {
    "card": ["9111 1111 1111 1111", "4111 1111 1111 111"],
    "aadhaar": ["1341 2341 2346"],
    "ssn": ["000-45-6789", "666-45-6789", "900-45-6789", "123-00-6789", "123-45-0000", "078-05-1120"],
    "itin": ["912-49-1234", "912-66-1234", "912-89-1234", "912-93-1234"],
    "nino": ["GB 12 34 56 C"],
    "nhs": ["000 000 0000"],
    "steuer_id": ["12345678903", "06095742719"],
    "resident": ["99010519491231002X", "11010519491331002X"],
    "nir": ["2 55 13 14 168 025 38"],
    "ip": ["127.0.0.1", "0.0.0.0", "255.255.255.0", "::", "::1", "1::2::3"],
    "mac": ["00:00:00:00:00:00"],
    "egyptian": ["29001321234567"],
    "secret": ["aaaaaaaaaaaaaaaa1", "configurationdirectory"],
}


@pytest.mark.parametrize("name", CHECKS)
def test_published_numbers(name: str) -> None:
    assert [value for value in RIGHT[name] if not CHECKS[name](value)] == []
    assert [value for value in WRONG.get(name, []) if CHECKS[name](value)] == []


@pytest.mark.parametrize(
    "name", ["card", "iban", "aadhaar", "nhs", "steuer_id", "id_card", "nir", "resident", "dni", "luhn"]
)
@given(st.data())
def test_one_other_digit_is_noticed(name: str, data: st.DataObject) -> None:
    value = data.draw(st.sampled_from(RIGHT[name]))
    place = data.draw(st.sampled_from([i for i, sign in enumerate(value) if sign.isdigit()]))
    digit = data.draw(st.sampled_from("0123456789"))
    assume(digit != value[place])
    if name == "id_card":  # letters and digits that differ by ten look the same to it, digits do not
        assume(place < 10)
    assert not CHECKS[name](value[:place] + digit + value[place + 1 :])


@given(st.text("0123456789", min_size=1, max_size=15))
def test_verhoeff_knows_one_last_digit_and_neighbours_that_changed_places(body: str) -> None:
    last = [digit for digit in "0123456789" if checks.verhoeff(body + digit)]
    assert len(last) == 1
    whole = body + last[0]
    swapped = whole[:-2] + whole[-1] + whole[-2]
    assert swapped == whole or not checks.verhoeff(swapped)


def test_entropy_is_shannons() -> None:
    assert checks.entropy("abcd") == 2.0 and checks.entropy("aaaa") == 0.0

"""Every golden file, read by the shape that its vendor's contract has for this call and status; and
the shapes themselves.

The golden files pin what the broker answers. These tests pin that a vendor's client can read it: a
golden file without a shape fails, as does a shape without a golden file.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest

from broker.dialects import DIALECTS
from tests.dialects.contracts import CONTRACTS, place, places, shape
from tests.support.golden import FOLDER, golden_file
from tests.support.shapes import EPOCH_MS, Whole, either, fits, text, word

FILES = sorted(FOLDER.glob("*/golden/*.json"))


def test_every_dialect_has_a_contract() -> None:
    assert {dialect.name for dialect in DIALECTS} == set(CONTRACTS)
    assert {file.parents[1].name for file in FILES} == set(CONTRACTS)


@pytest.mark.parametrize("name", [f"{file.parents[1].name}/{file.stem}" for file in FILES])
def test_a_golden_answer_has_the_shape_of_its_contract(name: str) -> None:
    contract = CONTRACTS[name.partition("/")[0]]
    told = json.loads(golden_file(name).read_text())
    at = place(contract, told["request"], told["answer"]["status"])
    assert at is not None, "the contract has no shape for this call and status"
    fits(told["answer"]["body"], shape(contract, at), masked=True)


@pytest.mark.parametrize("dialect", CONTRACTS)
def test_every_shape_of_a_contract_is_seen(dialect: str) -> None:
    seen = set()
    for file in FILES:
        if file.parents[1].name == dialect:
            told = json.loads(file.read_text())
            seen.add(place(CONTRACTS[dialect], told["request"], told["answer"]["status"]))
    assert places(CONTRACTS[dialect]) - seen == set()


# -- the shapes are strict -------------------------------------------------------------------------


def fields(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every field of every object."""
    for name, item in value.items() if isinstance(value, dict) else enumerate(value):
        if isinstance(value, dict):
            yield *at, name
        if isinstance(item, dict | list):
            yield from fields(item, (*at, name))


def test_a_field_more_less_or_renamed_is_found() -> None:
    """In each answer to a mail code's calls: nothing in them may be left out but `userId`, and
    nothing be there besides.
    """
    tried = 0
    for file in FILES:
        if file.parents[1].name != "passlock" or not file.stem.startswith("mail-"):
            continue
        told = json.loads(file.read_text())
        at = place(
            passlock_contract := CONTRACTS["passlock"], told["request"], told["answer"]["status"]
        )
        assert at is not None
        kind, body = shape(passlock_contract, at), told["answer"]["body"]
        for way in fields(body):
            if "metadata" in way[:-1] or way[-1] == "userId":
                continue
            tried += 1
            for change in ("less", "more", "null"):
                broken = copy.deepcopy(body)
                holder = broken
                for step in way[:-1]:
                    holder = holder[step]
                taken = holder.pop(way[-1])
                if change == "more":
                    holder |= {way[-1]: taken, "unheard": taken}
                elif change == "null" and way[-1] != "metadata":
                    holder[way[-1]] = None
                with pytest.raises(AssertionError):
                    fits(broken, kind, masked=True)
    assert tried > 40


@pytest.mark.parametrize(
    ("value", "kind", "masked"),
    [
        (True, int, False),
        (1.0, Whole(32), False),
        (2**31, Whole(32), False),
        ("gone", word("here"), False),
        (None, {"a?": str}, False),
        ({"a": None}, {"a?": str}, False),
        ({"a": 1}, either({"a": str}, {"b": int}), False),
        (["x", 1], [str], False),
        ("x" * 24, text("<id>"), True),
        ({"expiresAt": 1700000000}, {"expiresAt": EPOCH_MS}, True),
    ],
)
def test_what_does_not_fit(value: Any, kind: object, masked: bool) -> None:
    with pytest.raises(AssertionError):
        fits(value, kind, masked=masked)


def test_an_open_shape_reads_over_what_it_does_not_know() -> None:
    fits({"a": 1, "b": {"c": 1}}, {"a": int, "b": {}}, closed=False)
    with pytest.raises(AssertionError):
        fits({"a": 1, "b": {"c": 1}}, {"a": int, "b": {}})

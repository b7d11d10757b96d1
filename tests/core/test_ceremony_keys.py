"""Stored public keys at a sign-in: in which form they are handed on, and what is no key."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations
from typing import Any

import cbor2
import pytest

from broker.ceremony import cose
from broker.errors import CeremonyRefused
from tests.support.authenticator import EDDSA, ES512, RS256
from tests.support.ceremonies import (
    ORIGIN,
    authenticate,
    registered,
    relying_party,
    request_options,
)


def test_a_key_is_the_same_however_its_members_are_ordered() -> None:
    """Of the usual order py_webauthn is given the point alone, of any other what was stored."""
    rp = relying_party()
    made, device = registered(rp)
    members = cbor2.loads(made.public_key)
    point = b"\x04" + members[-2] + members[-3]
    assert cose.for_py_webauthn(made.public_key) == point
    for order in permutations(members):
        raw = cbor2.dumps({name: members[name] for name in order})
        assert cose.for_py_webauthn(raw) == (point if raw == made.public_key else raw)
        authenticate(
            rp,
            replace(made, public_key=raw),
            device.authenticate(request_options(rp, made), ORIGIN),
        )


@pytest.mark.parametrize(
    "change",
    [
        {-2: bytes(32)},  # not on the curve
        {-3: bytes(31)},
        {-3: bytes(33)},
        {-3: False},
        {-1: 2},
        {1: 3},
        {4: 1},
    ],
    ids=str,
)
def test_a_stored_key_that_is_none_is_a_refusal(change: dict[int, Any]) -> None:
    rp = relying_party()
    made, device = registered(rp)
    broken = replace(made, public_key=cbor2.dumps(cbor2.loads(made.public_key) | change))
    answer = device.authenticate(request_options(rp, made), ORIGIN)
    if change == {4: 1}:  # a member more hides no key
        authenticate(rp, broken, answer)
        return
    with pytest.raises(CeremonyRefused) as refused:
        authenticate(rp, broken, answer)
    assert refused.value.reason == "public_key"


@pytest.mark.parametrize("algorithm", [EDDSA, RS256, ES512], ids=str)
def test_other_keys_are_handed_on_as_they_are(algorithm: int) -> None:
    rp = relying_party(algorithms=(algorithm,))
    made, _ = registered(rp)
    assert cose.for_py_webauthn(made.public_key) == made.public_key

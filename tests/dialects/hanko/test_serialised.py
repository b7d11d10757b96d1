"""The text that an approved payload is hashed as: Go's JSON, character by character, and its hash
inside a challenge.
"""

from __future__ import annotations

import hashlib
import json
import random
import struct
import subprocess

import pytest

from broker.dialects.hanko.serialised import go_json, go_json_again
from tests.conftest import Started
from tests.support import parts
from tests.support.authenticator import Authenticator, unb64
from tests.support.hanko import TRANSACTION, Hanko
from tests.support.signals import refused
from tests.support.wire import Wire

# What Go's encoding/json (1.22 and newer) writes for these texts once it has read them into
# interface{} values.
NUMBERS = {
    "0": "0",
    "-0": "-0",
    "-0.0": "-0",
    "0.0": "0",
    "1": "1",
    "-1": "-1",
    "1.0": "1",
    "1e0": "1",
    "100": "100",
    "1E5": "100000",
    "12.50": "12.5",
    "-12.5e-1": "-1.25",
    "0.1": "0.1",
    "0.30000000000000004": "0.30000000000000004",
    "0.000001": "0.000001",
    "0.00000123": "0.00000123",
    "1e-6": "0.000001",
    "9.99e-7": "9.99e-7",
    "0.0000001": "1e-7",
    "1.5e-9": "1.5e-9",
    "1e-10": "1e-10",
    "2.5e-100": "2.5e-100",
    "5e-324": "5e-324",
    "1e20": "100000000000000000000",
    "123456789012345680000": "123456789012345680000",
    "999999999999999900000.0": "999999999999999900000",
    "1e21": "1e+21",
    "-1.25e21": "-1.25e+21",
    "1e100": "1e+100",
    "1.7976931348623157e308": "1.7976931348623157e+308",
    "9007199254740992": "9007199254740992",
    "9007199254740993": "9007199254740992",
    "12345678901234567890": "12345678901234567000",
    "3.14159": "3.14159",
}
TEXTS = {
    '""': '""',
    '"a b"': '"a b"',
    r'"\"\\\/"': r'"\"\\/"',
    r'"\b\f\n\r\t"': r'"\b\f\n\r\t"',
    r'"\u0001\u001f\u000b"': r'"\u0001\u001f\u000b"',
    r'"\u007f\u0080"': '"\x7f\x80"',
    '"<script>&amp;</script>"': r'"\u003cscript\u003e\u0026amp;\u003c/script\u003e"',
    '"\u2028\u2029"': r'"\u2028\u2029"',
    r'"\u2028\u2029\u202a"': '"\\u2028\\u2029\u202a"',
    r'"\u00e4\u20ac\ud83d\ude00"': '"ä€😀"',
    '"ä€😀\ufffd\ufeff"': '"ä€😀\ufffd\ufeff"',
    '"\'`"': '"\'`"',
}
VALUES = {
    "null": "null",
    " true ": "true",
    "[ ]": "[]",
    "{ }": "{}",
    "[1, [2.0, {}], null]": "[1,[2,{}],null]",
    '{"b": 1, "a": {"d": false, "c": "x"}}': '{"a":{"c":"x","d":false},"b":1}',
    '{"": 0, "B": 1, "a": 2, "10": 3, "9": 4}': '{"":0,"10":3,"9":4,"B":1,"a":2}',
    # By bytes of UTF-8, not by units of UTF-16, where the emoji would stand before U+FFFD.
    '{"😀": 1, "\ufffd": 2, "ä": 3, "z": 4}': '{"z":4,"ä":3,"\ufffd":2,"😀":1}',
    '{"<a>": 1, "\\u2028": 2, "\\"": 3}': '{"\\"":3,"\\u003ca\\u003e":1,"\\u2028":2}',
}


@pytest.mark.parametrize(("given", "written"), [*NUMBERS.items(), *TEXTS.items(), *VALUES.items()])
def test_as_go_writes_it(given: str, written: str) -> None:
    assert go_json_again(f'{{"x":1,"data":{given}}}'.encode(), "data") == written
    assert json.loads(written, parse_int=float) == json.loads(given, parse_int=float)


def test_numbers_are_ecmascripts_but_for_the_sign_of_zero() -> None:
    """Go's numbers have the form of `Number.prototype.toString`: 20,000 doubles of every size,
    written by Node.
    """
    chance = random.Random(1)
    doubles = [struct.unpack("<d", chance.randbytes(8))[0] for _ in range(10_000)]
    doubles += [chance.uniform(-1, 1) * 10 ** chance.randint(-9, 23) for _ in range(10_000)]
    doubles = [x for x in doubles if x == x and abs(x) != float("inf")]
    node = parts.node()
    done = subprocess.run(
        [
            *node.node,
            "-e",
            "console.log(JSON.stringify(JSON.parse(require('fs').readFileSync(0)).map(String)))",
        ],
        input=json.dumps(doubles).encode(),
        env=node.environment(),
        capture_output=True,
        check=True,
    )
    assert [go_json(x) for x in doubles] == json.loads(done.stdout)
    assert go_json(-0.0) == "-0"


def test_what_is_no_json() -> None:
    for value in (float("nan"), float("inf"), -float("inf"), b"", object(), {"a": {1}}):
        with pytest.raises(ValueError, match="JSON"):
            go_json(value)
    with pytest.raises(OverflowError):
        go_json(10**400)


async def test_the_challenge_ends_with_the_hash(wire: Wire, device: Authenticator) -> None:
    """32 random bytes, then SHA-256 of id and text; the vendor's own formula."""
    hanko = Hanko(wire)
    await hanko.register("ann", device)
    bodies = {
        "t-1": (
            b'{"to": "Bob & Co", "amount": 12.50, "<k>": [1e2, -0]}',
            r'{"\u003ck\u003e":[100,-0],"amount":12.5,"to":"Bob \u0026 Co"}',
        ),
        "ü-2": (b'"x"', '"x"'),
        "t-3": (b"[]", "[]"),
        "t-4": (b"{}", "{}"),
        "t-5": (b"true", "true"),
        "t-6": (b"1e-7", "1e-7"),
    }  # fmt: skip
    seen = set()
    for identifier, (data, text) in bodies.items():
        body = b'{"user_id":"ann","transaction_id":"%s","transaction_data":%s}' % (
            identifier.encode(),
            data,
        )
        answer = await hanko.send("POST", TRANSACTION + "/initialize", data=body)
        assert answer.status == 200
        challenge = unb64(answer.json["publicKey"]["challenge"])
        assert len(answer.json["publicKey"]["challenge"]) == 86
        assert challenge[32:] == hashlib.sha256((identifier + text).encode()).digest()
        seen.add(challenge[:32])
    assert len(seen) == len(bodies)
    user = (await wire.keyed("GET", "/users?identifier=ann")).json["users"][0]["id"]
    listed = await hanko.get(f"{TRANSACTION}/{user}")
    assert {row["identifier"]: row["data"] for row in listed} == {
        k: text for k, (_, text) in bodies.items()
    }


@pytest.mark.parametrize("data", [b"null", b"false", b"0", b"0.0", b"-0", b'""', None])
async def test_what_the_vendor_takes_for_missing(wire: Wire, data: bytes | None) -> None:
    hanko = Hanko(wire)
    body = (
        b'{"user_id":"ann","transaction_id":"t"'
        + (b',"transaction_data":' + data if data else b"")
        + b"}"
    )
    details = await hanko.refused(
        400, "unable to validate request", TRANSACTION + "/initialize", data=body
    )
    assert details == "transaction_data is a required field"


@pytest.mark.parametrize(
    "data",
    [
        b'"\xff"',
        b'"\\ud800"',
        b'"\\u0000"',
        b"NaN",
        b"1e400",
        b"1" * 30,
        b'{"a":1,"a":2}',
        b"[" * 40 + b"]" * 40,
    ],
)
async def test_what_parsers_disagree_on_is_refused(
    broker: Started, wire: Wire, data: bytes
) -> None:
    hanko = Hanko(wire)
    body = b'{"user_id":"ann","transaction_id":"t","transaction_data":' + data + b"}"
    before = broker.metric("broker_refusals_total", code="user_not_found", reason="user_not_found")
    await hanko.refused(400, "unable to process request", TRANSACTION + "/initialize", data=body)
    assert (
        broker.metric("broker_refusals_total", code="user_not_found", reason="user_not_found")
        == before
    )
    with refused(broker, "user_not_found", "user_not_found"):
        body = body.replace(data, b'"good"')
        await hanko.refused(404, "unable to find user", TRANSACTION + "/initialize", data=body)

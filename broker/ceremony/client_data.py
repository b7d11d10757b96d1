"""Client data: what the browser says it did. WebAuthn L3 §5.8.1 (CollectedClientData), judged as
§7.1 and §7.2 say alike.

The bytes are read as UTF-8 JSON in which nothing is ambiguous: an object without equal keys,
without NaN, Infinity, lone surrogates, or numbers that Python would refuse to read. Origins are
compared as text with the app's list: nothing here takes an origin apart, so nothing can be fooled
by how it is written.
"""

from __future__ import annotations

import json
import re
from base64 import urlsafe_b64decode
from typing import Any, NoReturn

import orjson

from broker.ceremony.verdict import refuse
from broker.errors import CeremonyRefused, InvalidRequest
from broker.model import RelyingParty, base64url

CREATE, GET = "webauthn.create", "webauthn.get"
_CHALLENGE = re.compile(r"[A-Za-z0-9_-]{22,171}")
_DEEPEST = 500  # levels


def judge_client_data(raw: bytes, *, kind: str, challenge: bytes, rp: RelyingParty) -> str:
    """Judge `clientDataJSON` (the bytes as the browser made them); return the origin.

    Raises:
        CeremonyRefused: "malformed", "type", "challenge", "origin", "cross_origin", "top_origin".
    """
    data = _read(raw)
    # WebAuthn L3 §7.1 "Verify that the value of C.type is webauthn.create", §7.2 "… is the string
    # webauthn.get"
    if _text(data, "type") != kind:
        raise refuse("type", f"The client data's type is not {kind}.")
    # §7.1, §7.2 "Verify that the value of C.challenge equals the base64url encoding of
    # pkOptions.challenge"
    if _text(data, "challenge") != base64url(challenge):
        raise refuse("challenge", "The challenge is not the one that was sent for this ceremony.")
    # §7.1, §7.2 "Verify that the value of C.origin is an origin expected by the Relying Party"
    origin = _text(data, "origin")
    if origin not in rp.accepted_origins:
        raise refuse("origin", "The ceremony ran on an origin that is not registered for the app.")
    _judge_embedding(data, rp)
    if "tokenBinding" in data:
        _judge_token_binding(data)
    return origin


def challenge_of(raw: bytes) -> bytes:
    """The challenge that client data carries, to find its ceremony by. Whether it is the right one
    is judged after that was taken.

    Raises:
        InvalidRequest: the client data can't be read, or has no challenge in canonical base64url of
            16 to 128 bytes.
    """
    try:
        encoded = _text(_read(raw), "challenge")
    except CeremonyRefused as refusal:
        raise InvalidRequest(refusal.hint, reason="client_data") from None
    if not _CHALLENGE.fullmatch(encoded) or len(encoded) % 4 == 1:
        raise InvalidRequest(
            "The client data's challenge is not base64url of ours.", reason="client_data"
        )
    challenge = urlsafe_b64decode(encoded + "=" * (-len(encoded) % 4))
    if base64url(challenge) != encoded:
        raise InvalidRequest(
            "The client data's challenge is not base64url of ours.", reason="client_data"
        )
    return challenge


def _judge_embedding(data: dict[str, Any], rp: RelyingParty) -> None:
    crossing = data.get("crossOrigin", False)
    if not isinstance(crossing, bool):
        raise refuse("malformed", "The client data's crossOrigin is neither true nor false.")
    # §7.1, §7.2 "If C.crossOrigin is present and set to true, verify that the Relying Party expects
    # …"
    if crossing and not rp.policy.allow_cross_origin:
        raise refuse(
            "cross_origin",
            "The ceremony ran in a cross-origin iframe, which the app does not allow.",
        )
    # §7.1, §7.2 "If C.topOrigin is present"; §5.8.1 "It is set only if … crossOrigin is true"
    if "topOrigin" in data:
        top = _text(data, "topOrigin")
        if not crossing:
            raise refuse("top_origin", "The client data has a topOrigin without crossOrigin.")
        if top not in rp.policy.top_origins:
            raise refuse(
                "top_origin", "The ceremony was embedded by a page that the app does not list."
            )


def _judge_token_binding(data: dict[str, Any]) -> None:
    """L3 §5.8.1 reserves the field; L2 §5.8.1 says what it held."""
    binding = data["tokenBinding"]
    if not isinstance(binding, dict) or binding.get("status") not in ("present", "supported"):
        raise refuse("malformed", "The client data's tokenBinding is not well-formed.")


def _text(data: dict[str, Any], key: str) -> str:
    value = data.get(key)
    if not isinstance(value, str):
        raise refuse("malformed", f"The client data has no {key} that is text.")
    return value


def _read(raw: bytes) -> dict[str, Any]:
    try:
        # What orjson would write itself, as browsers do, has no equal keys: one of them would be
        # missing. Everything else takes its time.
        quick = orjson.loads(raw)
        if type(quick) is dict and orjson.dumps(quick) == raw:
            return quick
    except (
        ValueError,
        orjson.JSONEncodeError,
    ):  # the latter for what is nested so deep that it reads, but does not write it
        pass
    try:
        # §7.1, §7.2 "Let JSONtext be the result of running UTF-8 decode": which takes off a byte
        # order mark
        text = raw.decode("utf-8-sig")
        data = _DECODER.decode(text)
        if text.count("[") + text.count("{") > _DEEPEST:
            _judge_depth(data)
        if "\\u" in text or "\\U" in text:
            json.dumps(data, ensure_ascii=False).encode()  # fails on a lone surrogate
    except (
        ValueError,
        RecursionError,
    ):  # ValueError: not UTF-8, not JSON, a number of thousands of digits
        raise refuse("malformed", "The client data is not UTF-8 JSON.") from None
    if not isinstance(data, dict):
        raise refuse("malformed", "The client data is not a JSON object.")
    return data


def _judge_depth(data: object) -> None:
    """How deep Python's parser goes depends on its version: what is nested deeper than `_DEEPEST`
    is a ValueError with each.
    """
    level = [data]
    for _ in range(_DEEPEST):
        level = [
            item
            for value in level
            if isinstance(value, dict | list)
            for item in (value.values() if isinstance(value, dict) else value)
        ]
        if not level:
            return
    raise ValueError("nesting")


def _members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("equal keys")
    return members


def _constant(name: str) -> NoReturn:
    raise ValueError(name)


_DECODER = json.JSONDecoder(object_pairs_hook=_members, parse_constant=_constant)

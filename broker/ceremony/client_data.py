"""Client data: the browser's part of a ceremony, WebAuthn L3 §5.8.1 (CollectedClientData); rules
that §7.1 and §7.2 share.

The bytes must be unambiguous UTF-8 JSON: an object without equal keys, NaN, Infinity, lone
surrogates or numbers that Python refuses to read. An origin is compared as text with the app's
list. No code parses an origin, so its spelling can't deceive a parser.
"""

from __future__ import annotations

import json
import re
from base64 import urlsafe_b64decode
from typing import Any, NoReturn

import orjson

from broker.ceremony.reasons import refuse, require
from broker.errors import CeremonyRefused, InvalidRequest
from broker.model import RelyingParty, base64url

CREATE, GET = "webauthn.create", "webauthn.get"
_CHALLENGE = re.compile(r"[A-Za-z0-9_-]{22,171}")
_MAX_DEPTH = 500  # levels


def judge_client_data(raw: bytes, *, kind: str, challenge: bytes, rp: RelyingParty) -> str:
    """Verify `clientDataJSON`, as the bytes that the browser made; return the origin.

    Raises:
        CeremonyRefused: "malformed", "type", "challenge", "origin", "cross_origin", "top_origin".
    """
    data = _read(raw)
    # WebAuthn L3 §7.1 "Verify that the value of C.type is webauthn.create", §7.2 "… is the string
    # webauthn.get"
    require(_text(data, "type") == kind, "type", f"The client data's type is not {kind}.")
    # §7.1, §7.2 "Verify that the value of C.challenge equals the base64url encoding of
    # pkOptions.challenge"
    require(
        _text(data, "challenge") == base64url(challenge),
        "challenge",
        "The challenge is not the one that was sent for this ceremony.",
    )
    # §7.1, §7.2 "Verify that the value of C.origin is an origin expected by the Relying Party"
    origin = _text(data, "origin")
    require(
        origin in rp.accepted_origins,
        "origin",
        "The ceremony ran on an origin that is not registered for the app.",
    )
    _judge_embedding(data, rp)
    if "tokenBinding" in data:
        _judge_token_binding(data["tokenBinding"])
    return origin


def challenge_of(raw: bytes) -> bytes:
    """The challenge in client data, which finds the pending ceremony. Its value is verified after
    the ceremony was taken.

    Raises:
        InvalidRequest: the client data can't be read, or has no challenge in canonical base64url of
            16 to 128 bytes.
    """
    try:
        encoded = _text(_read(raw), "challenge")
    except CeremonyRefused as refusal:
        raise InvalidRequest(refusal.hint, reason="client_data") from None
    if _CHALLENGE.fullmatch(encoded) and len(encoded) % 4 != 1:
        challenge = urlsafe_b64decode(encoded + "=" * (-len(encoded) % 4))
        if base64url(challenge) == encoded:
            return challenge
    raise InvalidRequest(
        "The client data's challenge is not base64url of ours.", reason="client_data"
    )


def _judge_embedding(data: dict[str, Any], rp: RelyingParty) -> None:
    crossing = data.get("crossOrigin", False)
    require(
        isinstance(crossing, bool),
        "malformed",
        "The client data's crossOrigin is neither true nor false.",
    )
    # §7.1, §7.2 "If C.crossOrigin is present and set to true, verify that the Relying Party expects
    # …"
    require(
        not crossing or rp.policy.allow_cross_origin,
        "cross_origin",
        "The ceremony ran in a cross-origin iframe, which the app does not allow.",
    )
    # §7.1, §7.2 "If C.topOrigin is present"; §5.8.1 "It is set only if … crossOrigin is true"
    if "topOrigin" in data:
        top = _text(data, "topOrigin")
        require(crossing, "top_origin", "The client data has a topOrigin without crossOrigin.")
        require(
            top in rp.policy.top_origins,
            "top_origin",
            "The ceremony was embedded by a page that the app does not list.",
        )


def _judge_token_binding(binding: object) -> None:
    """Verify the form of a field that L3 §5.8.1 reserves and L2 §5.8.1 defined."""
    require(
        isinstance(binding, dict) and binding.get("status") in ("present", "supported"),
        "malformed",
        "The client data's tokenBinding is not well-formed.",
    )


def _text(data: dict[str, Any], key: str) -> str:
    value = data.get(key)
    if not isinstance(value, str):
        raise refuse("malformed", f"The client data has no {key} that is text.")
    return value


def _read(raw: bytes) -> dict[str, Any]:
    try:
        # Fast path for what browsers write: JSON that orjson writes back byte for byte has no
        # equal keys, because one of two would be missing.
        quick = orjson.loads(raw)
        if type(quick) is dict and orjson.dumps(quick) == raw:
            return quick
    except (ValueError, orjson.JSONEncodeError):  # orjson reads deeper nesting than it writes
        pass
    try:
        # §7.1, §7.2 "Let JSONtext be the result of running UTF-8 decode": which takes off a byte
        # order mark
        text = raw.decode("utf-8-sig")
        data = _DECODER.decode(text)
        if text.count("[") + text.count("{") > _MAX_DEPTH:
            _judge_depth(data)
        if "\\u" in text or "\\U" in text:
            json.dumps(data, ensure_ascii=False).encode()  # fails on a lone surrogate
    except (ValueError, RecursionError):
        # ValueError: not UTF-8, not JSON, or a number of thousands of digits
        raise refuse("malformed", "The client data is not UTF-8 JSON.") from None
    if not isinstance(data, dict):
        raise refuse("malformed", "The client data is not a JSON object.")
    return data


def _judge_depth(data: object) -> None:
    """Raise ValueError beyond `_MAX_DEPTH` levels. The limit of Python's parser depends on its
    version.
    """
    level = [data]
    for _ in range(_MAX_DEPTH):
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

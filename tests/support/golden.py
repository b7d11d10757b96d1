"""Golden files of the wire.

`tests/dialects/<dialect>/golden/<name>.json` holds one request and its answer as they travel:
method, path, the headers that matter, body. What differs from run to run is masked, by this scheme
and no other (`_MASKS` by shape, `_TIMES` and the rest by key), and a value is masked only where it
has the shape it must have: a nonce that is no longer 43 characters shows as a difference.

    <transaction> <handshake> <nonce> <ticket> <key>    our tokens: prefix and 43 characters (a
                                                        bound handshake: 86)
    <id>                                         24 alphanumerics: app, user, passkey
    <uuid>                                       RFC 9562, as an `id`
    <32 bytes>                                   43 characters of base64url: challenges, credential
                                                 ids
    <64 bytes> <256 bytes> <ES256 key>           86, 342 and 103 characters of it: a challenge with
                                                 a hash, an RSA modulus, a COSE key
    <user handle>                                58 characters: the base64url of a handle's 43
                                                 characters
    <mail secret> <mail code>                    three groups of 24 alphanumerics; six digits, also
                                                 within a message
    <time> <epoch> <epoch ms>                    RFC 3339 in UTC; seconds, milliseconds since the
                                                 epoch
    <number>                                     an event's number
    <sentence>                                   a sentence of ours for people, in `_SENTENCES`:
                                                 capital letter, full stop; those of a contract have
                                                 neither and stay
    <answer>                                     what an authenticator made, in requests (an object,
                                                 or its JSON text)
    {"header", "claims"}                         a signed token, in place of its text

`GOLDEN=write` in the environment writes the files anew; without it, a missing file is a failure.
"""

from __future__ import annotations

import json
import os
import re
from base64 import urlsafe_b64decode
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.support.wire import Answer, Wire

FOLDER = Path(__file__).parents[1] / "dialects"
_HEADERS = (
    "Access-Control-Allow-Credentials",
    "Access-Control-Allow-Headers",
    "Access-Control-Allow-Methods",
    "Access-Control-Allow-Origin",
    "Access-Control-Max-Age",
    "Allow",
    "Cache-Control",
    "Content-Type",
    "Link",
    "Location",
    "Retry-After",
    "Set-Cookie",
    "Vary",
    "WWW-Authenticate",
    "X-Content-Type-Options",
    "X-Total-Count",
)
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z")
_MASKS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"pbt_[\w-]{43}(?![\w-])"), "<transaction>"),
    (re.compile(r"pbh_[\w-]{43}(?:[\w-]{43})?(?![\w-])"), "<handshake>"),
    (re.compile(r"pbn_[\w-]{43}(?![\w-])"), "<nonce>"),
    (re.compile(r"pbk_[\w-]{43}(?![\w-])"), "<key>"),
    (re.compile(r"pbs_[\w-]{43}(?![\w-])"), "<ticket>"),
    (re.compile(r"pbm_[A-Za-z0-9]{24}-[A-Za-z0-9]{24}-[A-Za-z0-9]{24}(?![\w-])"), "<mail secret>"),
    (re.compile(r"(?<![\w-])[A-Za-z0-9]{24}(?![\w-])"), "<id>"),
)
_BYTES = {
    "challenge": 43,
    "cred": 43,
    "cred_id": 43,
    "credential_id": 43,
    "credentialId": 43,
    "id": 43,
}
_BYTES |= {"jti": 43, "allAcceptedCredentialIds": 43, "x": 43, "y": 43}
_HANDLES = {"id", "userId"}
_EPOCHS = {"created_before", "exp", "iat", "timestamp"}
_UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_MAIL_CODE = re.compile(r"(?<!\w)\d{6}(?!\w)")
_MAIL_CODES = {"code", "html", "text"}
_EPOCHS_MS = {"createdAt", "expiresAt", "updatedAt", "lastUsed"}
_LONGER = {
    "challenge": (86, "<64 bytes>"),
    "n": (342, "<256 bytes>"),
    "public_key": (103, "<ES256 key>"),
}
_LONGER["publicKey"] = _LONGER["public_key"]
# A credential id within a name, a path or a sentence.
_NAMED = re.compile(r"(?:(?<=cred-)|(?<=/credentials/)|(?<= id '))[\w-]{43}(?![\w-])")
_TOKEN = re.compile(r"([\w-]+)\.([\w-]+)\.[\w-]+")
_TOKENS = {"id_token", "token"}
_SENTENCES = {"error", "message", "details"}
_SENTENCE = re.compile(r"[A-Z][^\n]* [^\n]*\.")
_ANSWERS = {"handshake_response", "credential", "publicKey", "response"}
_TIMES = {
    "created_at",
    "updated_at",
    "last_login_at",
    "confirmed_at",
    "last_used_at",
    "expires_at",
    "at",
}
_TIMES.add("approved_at")


def masked(value: Any, key: str = "") -> Any:
    """`value` with what differs from run to run replaced, by the scheme above."""
    if isinstance(value, dict):
        response = value.get("response")
        if isinstance(response, dict) and "clientDataJSON" in response:
            return "<answer>"
        return {
            k: "<answer>" if k in _ANSWERS and "clientDataJSON" in str(v) else masked(v, k)
            for k, v in value.items()
        }
    if isinstance(value, list):
        return [masked(item, key) for item in value]
    if isinstance(value, str):
        if key == "command":  # a word of the wire; one of them happens to have an id's shape
            return value
        if key in ("user_agent", "meta_user_agent") and value:
            return "<user agent>"
        if key in _TIMES and _TIME.fullmatch(value):
            return "<time>"
        if key in _SENTENCES and _SENTENCE.fullmatch(value):
            return "<sentence>"
        if key in _MAIL_CODES:
            value = _MAIL_CODE.sub("<mail code>", value)
        if key in _BYTES and re.fullmatch(r"[\w-]{43}", value):
            return "<32 bytes>"
        if key in _HANDLES and re.fullmatch(r"[\w-]{58}", value):
            return "<user handle>"
        if key == "id" and _UUID.fullmatch(value):
            return "<uuid>"
        if key == "id" and value.isdigit():
            return "<number>"
        if key in _LONGER and re.fullmatch(rf"[\w-]{{{_LONGER[key][0]}}}", value):
            return _LONGER[key][1]
        if key in _TOKENS and (parts := _TOKEN.fullmatch(value)):
            read = [json.loads(urlsafe_b64decode(part + "==")) for part in parts.groups()]
            return {"header": masked(read[0]), "claims": masked(read[1])}
        value = _NAMED.sub("<32 bytes>", value)
        for pattern, name in _MASKS:
            value = pattern.sub(name, value)
        return value
    if key == "id" and type(value) is int:
        return "<number>"
    if key in _EPOCHS and isinstance(value, int) and 1_700_000_000 < value < 2**33:
        return "<epoch>"
    if key in _EPOCHS_MS and isinstance(value, int) and 1_700_000_000_000 < value < 2**43:
        return "<epoch ms>"
    return value


def _shown(data: bytes) -> str:
    """A body that is no JSON of ours."""
    return data.decode() if len(data) < 1_000 else f"<{len(data)} bytes>"


def golden_file(name: str) -> Path:
    """The golden file `<dialect>/<name>`."""
    dialect, _, stem = name.partition("/")
    return FOLDER / dialect / "golden" / f"{stem}.json"


async def golden(
    wire: Wire,
    name: str,
    method: str,
    path: str,
    json_body: object = None,
    *,
    headers: Mapping[str, str],
    data: bytes | None = None,
    below: str = "/v1/apps/{app_id}",
) -> Answer:
    """Send a request to a path below the app (or below `below`) and compare it and its answer with
    the golden file `name`.
    """
    place = below.replace("{app_id}", wire.app_id) + path
    answer = await wire.send(method, wire.url + place, json=json_body, data=data, headers=headers)
    seen = {
        "request": {
            "method": method,
            "path": masked(place),
            "headers": {k: masked(v) for k, v in headers.items()},
            "body": masked(json_body) if data is None else _shown(data),
        },
        "answer": {
            "status": answer.status,
            "headers": {k: masked(answer.headers[k]) for k in _HEADERS if k in answer.headers},
            "body": masked(answer.json) if answer.body else "",
        },
    }
    file = golden_file(name)
    if os.environ.get("GOLDEN") == "write":
        file.write_text(json.dumps(seen, indent=2, ensure_ascii=False) + "\n")
    assert file.exists(), f"{file.name} is missing; GOLDEN=write makes it"
    assert seen == json.loads(file.read_text()), name
    return answer

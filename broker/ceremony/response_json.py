"""Parsing of RegistrationResponseJSON and AuthenticationResponseJSON (WebAuthn L3 §5.1): faults of
form.

A fault of form is found before anything is spent: a missing member, a wrong type, text that is not
base64url, a size that no authenticator makes. Unknown members are ignored, because browsers add
some (`authenticatorData`, `publicKey`, extension results). `finish` verifies what the bytes mean.
"""

from __future__ import annotations

import re
from binascii import a2b_base64, b2a_base64
from collections.abc import Mapping
from typing import Any

from broker.ceremony.authenticator_data import MAX_CREDENTIAL_ID
from broker.errors import InvalidRequest
from broker.model import Attachment, AuthenticationAnswer, RegistrationAnswer

# WebAuthn L3 §5.8.4 and the older "cable", which platforms still send.
TRANSPORTS = frozenset({"usb", "nfc", "ble", "smart-card", "hybrid", "internal", "cable"})

# Bytes after decoding, several times the longest known values.
MAX_CLIENT_DATA = 16_384
MAX_ATTESTATION_OBJECT = 49_152
MAX_AUTHENTICATOR_DATA = 8_192
MAX_SIGNATURE = 2_048
MAX_USER_HANDLE = 256  # characters
MAX_TRANSPORTS = 32

_ATTACHMENTS: dict[object, Attachment] = {
    "platform": "platform",
    "cross-platform": "cross-platform",
}
_BASE64URL = re.compile(r"[A-Za-z0-9_-]+={0,2}\Z")
# From base64url to the decoder's alphabet (RFC 4648 §4). "+" and "/" become characters of neither.
_STANDARD = bytes.maketrans(b"-_+/", b"+/!!")
# Padding, by the number of characters behind the last whole group of four.
_PADDING = (b"", b"===", b"==", b"=")


def parse_registration(value: object) -> RegistrationAnswer:
    """Read `PublicKeyCredential.toJSON()` after `create()`. `transports` may stand in `response` or
    beside it.

    Raises:
        InvalidRequest: with a sentence that names the member.
    """
    credential_id, answer, response = _parse_common(value)
    return RegistrationAnswer(
        credential_id=credential_id,
        client_data_json=_bytes(response, "clientDataJSON", MAX_CLIENT_DATA),
        attestation_object=_bytes(response, "attestationObject", MAX_ATTESTATION_OBJECT),
        transports=_transports(response) or _transports(answer),
        attachment=_attachment(answer),
        resident_key=_resident_key(answer),
    )


def parse_authentication(value: object) -> AuthenticationAnswer:
    """Read `PublicKeyCredential.toJSON()` after `get()`. A `userHandle` that is absent, null or ""
    becomes None.

    Raises:
        InvalidRequest: with a sentence that names the member.
    """
    credential_id, _, response = _parse_common(value)
    handle = response.get("userHandle")
    if handle is not None and not isinstance(handle, str):
        raise InvalidRequest("userHandle is text or absent.")
    if handle and len(handle) > MAX_USER_HANDLE:
        raise InvalidRequest("userHandle is too long.")
    return AuthenticationAnswer(
        credential_id=credential_id,
        client_data_json=_bytes(response, "clientDataJSON", MAX_CLIENT_DATA),
        authenticator_data=_bytes(response, "authenticatorData", MAX_AUTHENTICATOR_DATA),
        signature=_bytes(response, "signature", MAX_SIGNATURE),
        user_handle=handle or None,
    )


def _parse_common(value: object) -> tuple[bytes, Mapping[str, Any], Mapping[str, Any]]:
    if not isinstance(value, dict):
        raise InvalidRequest("The passkey's answer is a JSON object.")
    response = value.get("response")
    if not isinstance(response, dict):
        raise InvalidRequest("response is missing or not an object.")
    if value.get("type") != "public-key":
        raise InvalidRequest('type is not "public-key".')
    credential_id = _bytes(value, "id", MAX_CREDENTIAL_ID)
    if (
        value.get("rawId") != value["id"]
        and _bytes(value, "rawId", MAX_CREDENTIAL_ID) != credential_id
    ):
        raise InvalidRequest("id and rawId differ.")
    return credential_id, value, response


def _bytes(holder: Mapping[str, Any], name: str, limit: int) -> bytes:
    """Decode a base64url member (RFC 4648 §5): no other alphabet, padding whole or absent, unused
    bits zero.

    The decoder is lenient, so the decoded bytes are encoded again and compared with the text.
    """
    text = holder.get(name)
    if not isinstance(text, str):
        raise InvalidRequest(f"{name} is missing or not text.")
    if len(text) > limit * 4 // 3 + 4:
        raise InvalidRequest(f"{name} is longer than {limit} bytes.")
    over = len(text) % 4
    try:
        padded = text.encode().translate(_STANDARD) + _PADDING[over]
        raw = a2b_base64(padded)
    except ValueError:  # half of a surrogate pair, or padding that no text has
        raw = padded = b""
    if not raw or b2a_base64(raw, newline=False) != padded or (over and text[-1] == "="):
        raise InvalidRequest(f"{name} is {_fault(text)}.")
    if len(raw) > limit:
        raise InvalidRequest(f"{name} is longer than {limit} bytes.")
    return raw


def _fault(text: str) -> str:
    """The fault of text that is not canonical base64url."""
    bare = text.rstrip("=")
    if (
        not _BASE64URL.match(text)
        or len(bare) % 4 == 1
        or (len(bare) != len(text) and len(text) % 4)
    ):
        return "empty or not base64url"
    return "not canonical base64url"


def _transports(holder: Mapping[str, Any]) -> tuple[str, ...]:
    given = holder.get("transports")
    if given is None:
        return ()
    if not isinstance(given, list) or len(given) > MAX_TRANSPORTS:
        raise InvalidRequest("transports is a short list of names.")
    if not all(isinstance(name, str) for name in given):
        raise InvalidRequest("transports holds names only.")
    return tuple(dict.fromkeys(name for name in given if name in TRANSPORTS))


def _attachment(answer: Mapping[str, Any]) -> Attachment | None:
    given = answer.get("authenticatorAttachment")
    return _ATTACHMENTS.get(given) if isinstance(given, str) else None


def _resident_key(answer: Mapping[str, Any]) -> bool | None:
    """`credProps.rk` (WebAuthn L3 §10.1.3), "true indicates that the … credential is discoverable".
    None: the answer lacks it.
    """
    found: Any = answer
    for name in ("clientExtensionResults", "credProps", "rk"):
        found = found.get(name) if isinstance(found, dict) else None
    return found if isinstance(found, bool) else None

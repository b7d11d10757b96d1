"""Canonical JSON (RFC 8785), and the hash of an approval in that form.

The challenge of an approval has 64 bytes: 32 random bytes, then SHA-256 of the canonical form of

    {"data": …, "id": …}

the two members of `approval` in the caller's request. A caller that keeps the authenticator's
answer can prove the content of the approval later: take the challenge out of the client data,
compute the digest of the expected approval, and compare the last 32 bytes.

For text, lists, objects with ASCII names and whole numbers, Python's
`json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)` gives the same form.

This module stands alone as the specification of these bytes.
"""

from __future__ import annotations

import hashlib

import rfc8785

from broker.errors import InvalidRequest


def approval_digest(identifier: str, data: object) -> bytes:
    """SHA-256 of the canonical form of `{"data", "id"}`: the end of the challenge.

    Raises:
        InvalidRequest: see `canonical`.
    """
    return hashlib.sha256(canonical({"id": identifier, "data": data}).encode()).digest()


def canonical(value: object) -> str:
    """A JSON value in the form of RFC 8785 §3.2.

    Raises:
        InvalidRequest: an integer beyond 2^53 - 1 (RFC 7493 §2.2), which parsers read differently.
    """
    try:
        return rfc8785.dumps(value).decode()  # type: ignore[arg-type]  # any parsed JSON
    except rfc8785.IntegerDomainError:
        raise InvalidRequest(
            "approval.data has a whole number beyond 2^53 - 1, which parsers read differently;"
            " send it as text.",
            reason="number",
        ) from None

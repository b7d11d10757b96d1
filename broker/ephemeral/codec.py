"""One-time values as bytes: a line of JSON, a NUL, then the byte strings as they are.

The JSON is an array, a tag with the format's number and then what the value has, in an order of its
kind; a byte string stands there as its length and follows behind the NUL, which JSON can't hold. A
third smaller than base64 in JSON, and as quick. The app is left out: it is part of every key's
digest, so who finds a record knows it. So is the owner of an offered passkey, the record's user.

A tag that this code doesn't know is of newer code, in a roll-back say: the value is as unknown, and
its owner starts over. Each kind has its own two functions, for a login runs through eight of them;
a new field is a new tag.

A transaction stands with its pending ceremony in one value (`BegunCeremony` in `broker.model`): a
plus sign, the digest of the only handle that may take the ceremony, its length in two bytes, the
ceremony, then the transaction; or a minus sign and the transaction. Scripts of `broker.ephemeral`
read that much of it, and the transaction's tag.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import orjson

from broker.model import (
    NO_OPTIONS,
    AllowedCredential,
    BegunCeremony,
    CeremonyOptions,
    PendingAuthentication,
    PendingRegistration,
    Purpose,
    Receipt,
    Redeemable,
    Transaction,
    UserVerification,
    Verifications,
    as_dict,
)

_REGISTER, _AUTHENTICATE, _LOOK_UP = "tr4", "ta4", "tl4"
_HEADS = {tag: b'["%b",' % tag.encode() for tag in (_REGISTER, _AUTHENTICATE, _LOOK_UP)}
_BEGINNING, _REGISTRATION, _AUTHENTICATION, _NONCE = "b2", "r6", "a4", "n4"
_NO_AAGUID = "00000000-0000-0000-0000-000000000000"  # stored as null
_CHALLENGE = 32  # bytes, of a ceremony that has a transaction
_BY_INITIAL: dict[str, UserVerification] = {"r": "required", "p": "preferred", "d": "discouraged"}


def _joined(head: object, blobs: Sequence[bytes]) -> bytes:
    return b"\0".join((orjson.dumps(head), b"".join(blobs)))


def _split(stored: bytes) -> tuple[Any, bytes]:
    head, _, blobs = stored.partition(b"\0")
    return orjson.loads(head), blobs


# -- what is inside of others ----------------------------------------------------------------------


def _asked(asked: CeremonyOptions) -> list[Any] | None:
    """Nothing asked is stored as null: most ceremonies."""
    return None if asked is NO_OPTIONS or asked == NO_OPTIONS else list(as_dict(asked).values())


def _asked_of(stored: list[Any] | None) -> CeremonyOptions:
    if stored is None:
        return NO_OPTIONS
    values: list[Any] = [tuple(value) if isinstance(value, list) else value for value in stored]
    return CeremonyOptions(*values)


def _offered(offered: tuple[AllowedCredential, ...], blobs: list[bytes]) -> list[tuple[Any, ...]]:
    found = []
    for o in offered:
        blobs += (o.credential_id, o.public_key)
        found.append(
            (
                o.id,
                len(o.credential_id),
                o.transports,
                o.user_handle,
                len(o.public_key),
                o.algorithm,
                o.sign_count,
                o.backup_eligible,
                o.backed_up,
                o.attestation_trust,
                None if o.aaguid == _NO_AAGUID else o.aaguid,
            )
        )
    return found


def _offered_of(
    stored: list[Any], blobs: bytes, app_id: str, user_id: str
) -> tuple[AllowedCredential, ...]:
    found, at = [], 0
    for (
        identifier,
        name,
        transports,
        handle,
        key,
        algorithm,
        count,
        eligible,
        backed,
        trust,
        aaguid,
    ) in stored:
        middle = at + name
        end = middle + key
        found.append(
            AllowedCredential(
                identifier,
                blobs[at:middle],
                tuple(transports),
                handle,
                blobs[middle:end],
                algorithm,
                count,
                eligible,
                backed,
                trust,
                aaguid or _NO_AAGUID,
                user_id,
                app_id,
            )
        )
        at = end
    return tuple(found)


# -- transactions and their pending ceremonies -----------------------------------------------------


def head_of(purpose: Purpose, beginning: BegunCeremony) -> bytes:
    """How the record of a transaction begins which this may begin: what a script compares before it
    writes. One whose passkeys are to be looked up begins when it is known who is allowed."""
    if purpose == "register":
        return _HEADS[_REGISTER]
    return _HEADS[_AUTHENTICATE if beginning.allowed is None else _LOOK_UP]


def dump_transaction(t: Transaction) -> bytes:
    """The value of a transaction without a pending ceremony."""
    blobs: list[bytes] = []
    if t.purpose == "authenticate":
        offered = _offered(t.offered, blobs)
        head: tuple[Any, ...] = (
            _LOOK_UP if t.to_look_up else _AUTHENTICATE,
            t.user_id,
            t.external_id,
            offered,
            _asked(t.asked),
            t.expires_at,
        )
    else:
        head = (
            _REGISTER,
            t.user_id,
            t.external_id,
            t.user_handle,
            t.user_name,
            t.user_display_name,
            t.nickname,
            _asked(t.asked),
            t.expires_at,
        )
    return b"-" + _joined(head, blobs)


def without_ceremony(stored: bytes) -> bytes:
    """The transaction in a value, without the mark and the pending ceremony in front."""
    return stored[35 + int.from_bytes(stored[33:35], "big") :] if stored[:1] == b"+" else stored[1:]


def load_transaction(app_id: str, stored: bytes) -> Transaction | None:
    """A transaction, without the mark in front; None for a format that this code does not know."""
    head, blobs = _split(stored)
    if head[0] in (_AUTHENTICATE, _LOOK_UP):
        _, user_id, external_id, offered, asked, ends = head
        held = _offered_of(offered, blobs, app_id, user_id) if offered else ()
        return Transaction(
            app_id,
            "authenticate",
            user_id,
            external_id,
            "",
            "",
            "",
            "",
            held,
            _asked_of(asked),
            ends,
        )
    if head[0] == _REGISTER:
        _, user_id, external_id, handle, user_name, display_name, nickname, asked, ends = head
        return Transaction(
            app_id,
            "register",
            user_id,
            external_id,
            handle,
            user_name,
            display_name,
            nickname,
            (),
            _asked_of(asked),
            ends,
        )
    return None


def dump_beginning(handle: bytes, beginning: BegunCeremony) -> bytes:
    """What stands before a transaction once a ceremony was begun; `handle` is the digest of the
    only handle that may take it.
    """
    challenge, begun_at, life, (user, second, weaker), algorithms, allowed, attachment = beginning
    head = orjson.dumps(
        (_BEGINNING, begun_at, life, user[0] + second[0], weaker, algorithms, allowed, attachment)
    )
    return b"+%b%b%b%b" % (handle, (len(challenge) + len(head)).to_bytes(2, "big"), challenge, head)


def load_beginning(record: bytes) -> BegunCeremony | None:
    """A beginning, without what stands before it; None for a format that this code does not
    know.
    """
    tag, *values = orjson.loads(record[_CHALLENGE:])
    if tag != _BEGINNING:
        return None
    begun_at, life, initials, weaker, algorithms, allowed, attachment = values
    return BegunCeremony(
        record[:_CHALLENGE],
        begun_at,
        life,
        Verifications(_BY_INITIAL[initials[0]], _BY_INITIAL[initials[1]], weaker),
        tuple(algorithms),
        None if allowed is None else tuple(allowed),
        attachment,
    )


# -- pending ceremonies without a transaction ------------------------------------------------------


def dump_pending(p: PendingRegistration | PendingAuthentication) -> bytes:
    """A pending ceremony that has no transaction."""
    blobs = [p.challenge]
    if isinstance(p, PendingAuthentication):
        offered = _offered(p.offered, blobs)
        head: tuple[Any, ...] = (
            _AUTHENTICATION,
            len(p.challenge),
            p.user_id,
            p.external_id,
            p.allowed
            if p.allowed != tuple([o.id for o in p.offered])
            else None,  # else they are those offered
            offered,
            p.approval,
            _asked(p.asked),
            p.user_verification,
            p.begun_at,
            p.expires_at,
        )
    else:
        head = (
            _REGISTRATION,
            len(p.challenge),
            p.user_id,
            p.external_id,
            p.user_handle,
            p.user_name,
            p.user_display_name,
            p.nickname,
            _asked(p.asked),
            p.user_verification,
            p.algorithms,
            p.begun_at,
            p.expires_at,
            p.attachment,
        )
    return _joined(head, blobs)


def load_pending(app_id: str, stored: bytes) -> PendingRegistration | PendingAuthentication | None:
    """None for a format that this code does not know."""
    if stored[:1] != b"[":
        return None
    head, blobs = _split(stored)
    if head[0] == _AUTHENTICATION:
        (
            _,
            length,
            user_id,
            external_id,
            allowed,
            offered,
            approval,
            asked,
            verification,
            begun,
            ends,
        ) = head
        held = _offered_of(offered, blobs[length:], app_id, user_id) if offered else ()
        return PendingAuthentication(
            app_id,
            blobs[:length],
            None,
            user_id,
            external_id,
            tuple([o.id for o in held]) if allowed is None else tuple(allowed),
            held,
            approval,
            _asked_of(asked),
            verification,
            begun,
            ends,
        )
    if head[0] == _REGISTRATION:
        _, length, user_id, external_id, handle, user_name, shown, nickname, *more = head
        asked, verification, algorithms, begun, ends, attachment = more
        return PendingRegistration(
            app_id,
            blobs[:length],
            None,
            user_id,
            external_id,
            handle,
            user_name,
            shown,
            nickname,
            _asked_of(asked),
            verification,
            tuple(algorithms),
            begun,
            ends,
            attachment,
        )
    return None


# -- nonces ----------------------------------------------------------------------------------------


def dump_redeemable(r: Redeemable) -> bytes:
    """What a nonce stands for."""
    receipt = list(r.receipt)
    credential_id = r.receipt.credential_id
    receipt[_CREDENTIAL_ID] = len(credential_id)
    return _joined((_NONCE, receipt, r.expires_at), (credential_id, r.transaction or b""))


def load_redeemable(stored: bytes) -> Redeemable | None:
    """None for a format that this code does not know."""
    head, blobs = _split(stored)
    if head[0] != _NONCE:
        return None
    _, receipt, ends = head
    length = receipt[_CREDENTIAL_ID]
    receipt[_CREDENTIAL_ID] = blobs[:length]
    return Redeemable(Receipt(*cast("Any", receipt)), blobs[length:] or None, ends)


_CREDENTIAL_ID = Receipt._fields.index("credential_id")

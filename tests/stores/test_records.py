"""One-time values as bytes (`broker.ephemeral.codec`), and the base64url of answers
(`broker.ceremony.response_json`): whatever the values are.
"""

from __future__ import annotations

import string
from base64 import urlsafe_b64decode, urlsafe_b64encode
from typing import get_args

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from broker.ceremony.response_json import _bytes
from broker.ephemeral.codec import DecodeError, decode, encode
from broker.errors import InvalidRequest
from broker.model import (
    ANYONE,
    AllowedCredential,
    Attachment,
    BegunCeremony,
    CeremonyOptions,
    Named,
    PendingAuthentication,
    PendingRegistration,
    Purpose,
    Receipt,
    Redeemable,
    Subject,
    Transaction,
    Trust,
    Unowned,
    UserEntity,
    UserVerification,
    Verifications,
)

# -- base64url -------------------------------------------------------------------------------------

ALPHABET = string.ascii_letters + string.digits + "-_"
LIMIT = 64  # bytes


def reference(text: str) -> bytes | None:
    """What canonical base64url stands for (RFC 4648 §5, §3.5), found slowly; None for anything
    else.
    """
    bare = text.rstrip("=")
    whole = bare + "=" * (-len(bare) % 4)
    if (
        not bare
        or not set(bare) <= set(ALPHABET)
        or len(bare) % 4 == 1
        or text not in (bare, whole)
    ):
        return None
    raw = urlsafe_b64decode(whole)
    return raw if urlsafe_b64encode(raw).decode() == whole and len(raw) <= LIMIT else None


def read(text: str) -> bytes | None:
    try:
        return _bytes({"field": text}, "field", LIMIT)
    except InvalidRequest:
        return None


@settings(max_examples=200, deadline=None)
@given(st.text(ALPHABET, max_size=100), st.integers(0, 4))
def test_base64url_is_read_where_it_is_canonical(bare: str, padding: int) -> None:
    text = bare + "=" * padding
    assert read(text) == reference(text)


@settings(max_examples=200, deadline=None)
@given(st.text(ALPHABET + "=+/ \n.~\0é\N{FULLWIDTH LATIN CAPITAL LETTER A}", max_size=12))
def test_text_that_may_be_no_base64url(text: str) -> None:
    assert read(text) == reference(text)


def test_every_end_of_base64url() -> None:
    """Two and three characters behind a group of four, the last of them each that there is, with
    each padding.
    """
    accepted = {2: 0, 3: 0}
    for last in ALPHABET:
        for end in ("A" + last, "-" + last, "zA" + last, "__" + last):
            for padding in ("", "=", "=="):
                text = "QUJD" + end + padding
                assert read(text) == reference(text), text
                accepted[len(end)] += read(text) is not None
    assert accepted == {2: 2 * 4 * 2, 3: 2 * 16 * 2}, (
        "four of 64 have no bit to spare set, or 16; padded and bare"
    )


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=LIMIT + 2), st.booleans())
def test_bytes_come_back_from_base64url(raw: bytes, padded: bool) -> None:
    text = urlsafe_b64encode(raw).decode()
    expected = raw if 0 < len(raw) <= LIMIT else None
    assert read(text if padded else text.rstrip("=")) == expected


# -- records ---------------------------------------------------------------------------------------

APP = "A" * 24
WORDS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)  # NUL is among them
IDS = st.text(string.ascii_letters + string.digits, min_size=24, max_size=24)
DIGESTS = st.binary(min_size=32, max_size=32)
BLOBS = st.binary(max_size=40) | st.sampled_from([b"\0", b"\0\0", b'["b1",', b"+" * 33, b"-"])
TIMES = st.floats(min_value=0, max_value=4e9, allow_nan=False)
VERIFICATIONS = st.sampled_from(get_args(UserVerification))
TRUSTS = st.sampled_from(get_args(Trust))
AAGUIDS = st.sampled_from(
    ["00000000-0000-0000-0000-000000000000", "08987058-cadc-4b81-b6e1-30de50dcbe96"]
)
ATTACHMENTS = st.none() | st.sampled_from(get_args(Attachment))
MANY = st.lists(IDS, max_size=3).map(tuple)
ALGORITHMS = st.lists(st.sampled_from([-7, -8, -35, -53, -257]), max_size=4).map(tuple)
OPTIONS = st.just(CeremonyOptions()) | st.builds(
    CeremonyOptions,
    user_verification=st.none() | VERIFICATIONS,
    life=st.none() | TIMES,
    exclude=st.none() | MANY,
    allow=st.none() | MANY,
    second_factor=st.booleans(),
    unowned=st.booleans(),
    mediation=st.sampled_from(["required", "conditional"]),
)
NAMED = st.builds(Named, IDS, WORDS, st.integers(0, 2**53))
UNOWNED = st.builds(Unowned, IDS)
ENTITIES = st.builds(UserEntity, WORDS, WORDS, WORDS, WORDS)


def offered(subject: Subject) -> st.SearchStrategy[tuple[AllowedCredential, ...]]:
    """Passkeys of a named user, as all that are offered are; none of another subject."""
    user_id = subject.user_id if isinstance(subject, Named) else None
    one = st.builds(
        AllowedCredential,
        id=IDS,
        credential_id=BLOBS,
        transports=st.lists(WORDS, max_size=2).map(tuple),
        user_handle=WORDS,
        public_key=BLOBS,
        algorithm=st.integers(-70000, 0),
        sign_count=st.integers(0, 2**32 - 1),
        backup_eligible=st.booleans(),
        backed_up=st.booleans(),
        attestation_trust=TRUSTS,
        aaguid=AAGUIDS,
        user_id=st.just(user_id),
        app_id=st.just(APP),
    )
    return st.lists(one, max_size=3 if user_id else 0).map(tuple)


@st.composite
def transactions(draw: st.DrawFn) -> Transaction:
    purpose: Purpose = draw(st.sampled_from(get_args(Purpose)))
    registers = purpose == "register"
    others: st.SearchStrategy[Subject] = UNOWNED if registers else st.just(ANYONE)
    subject: Subject = draw(NAMED | others)
    return Transaction(
        app_id=APP,
        purpose=purpose,
        subject=subject,
        entity=draw(ENTITIES) if registers else None,
        offered=() if registers else draw(offered(subject)),
        options=draw(OPTIONS),
        expires_at=draw(TIMES),
    )


BEGINNINGS = st.builds(
    BegunCeremony,
    challenge=DIGESTS,
    begun_at=TIMES,
    life=st.integers(1, 3600),
    verifications=st.builds(Verifications, VERIFICATIONS, VERIFICATIONS, st.booleans()),
    algorithms=ALGORITHMS,
    allowed=st.none() | MANY,
    attachment=ATTACHMENTS,
    approval=st.none() | WORDS,
)
REGISTRATIONS = st.builds(
    PendingRegistration,
    app_id=st.just(APP),
    challenge=BLOBS,
    transaction=st.none(),
    subject=NAMED | UNOWNED,
    entity=ENTITIES,
    options=OPTIONS,
    user_verification=VERIFICATIONS,
    algorithms=ALGORITHMS,
    begun_at=TIMES,
    expires_at=TIMES,
    attachment=ATTACHMENTS,
)


@st.composite
def authentications(draw: st.DrawFn) -> PendingAuthentication:
    subject = draw(NAMED | st.just(ANYONE))
    held = draw(offered(subject))
    return PendingAuthentication(
        app_id=APP,
        challenge=draw(BLOBS),
        transaction=None,
        subject=subject,
        allowed=draw(MANY | st.just(tuple(one.id for one in held))),
        offered=held,
        approval=draw(st.none() | WORDS),
        options=draw(OPTIONS),
        user_verification=draw(VERIFICATIONS),
        begun_at=draw(TIMES),
        expires_at=draw(TIMES),
    )


RECEIPTS = st.builds(
    Receipt,
    subject=NAMED | UNOWNED,
    purpose=st.sampled_from(get_args(Purpose)),
    passkey_id=IDS,
    credential_id=BLOBS,
    origin=WORDS,
    user_present=st.booleans(),
    user_verified=st.booleans(),
    backup_eligible=st.booleans(),
    backed_up=st.booleans(),
    backup_changed=st.booleans(),
    counter_regressed=st.booleans(),
    attestation=TRUSTS,
    authenticator_name_claimed=st.none() | WORDS,
    second_factor=st.booleans(),
    approval=st.none() | WORDS,
    at=TIMES,
)


@settings(max_examples=25, deadline=None)
@given(transactions())
def test_a_transaction_comes_back(made: Transaction) -> None:
    assert decode(Transaction, encode(made)) == made


@settings(max_examples=25, deadline=None)
@given(BEGINNINGS, transactions())
@example(
    BegunCeremony(
        b"\0" * 32,
        0.0,
        1,
        Verifications("required", "preferred", False),
        allowed=tuple("a" * 24 for _ in range(64)),
    ),
    Transaction(
        APP, "register", Unowned("u" * 24), UserEntity("", "", "", ""), (), CeremonyOptions(), 0.0
    ),
)
def test_a_begun_ceremony_comes_back_with_its_transaction(
    made: BegunCeremony, of: Transaction
) -> None:
    """As an array that the script puts together."""
    stored = b"\x92" + encode(made) + encode(of)
    assert decode(tuple[BegunCeremony, Transaction], stored) == (made, of)


@settings(max_examples=25, deadline=None)
@given(REGISTRATIONS | authentications())
def test_a_pending_ceremony_comes_back(made: PendingRegistration | PendingAuthentication) -> None:
    assert decode(type(made), encode(made)) == made


@settings(max_examples=25, deadline=None)
@given(RECEIPTS, st.none() | DIGESTS, TIMES)
def test_what_a_nonce_stands_for_comes_back(
    receipt: Receipt, transaction: bytes | None, ends: float
) -> None:
    made = Redeemable(receipt, transaction, ends)
    assert decode(Redeemable, encode(made)) == made


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200) | transactions().map(encode))
def test_bytes_that_are_no_such_value_are_refused(stored: bytes) -> None:
    for type_ in (Redeemable, PendingRegistration, PendingAuthentication, BegunCeremony):
        with pytest.raises(DecodeError):
            decode(type_, stored)

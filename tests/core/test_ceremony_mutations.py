"""Valid answers, changed: every byte turned, every length cut, structures bent, rubbish. Always a
refusal, never another exception.

Where no signature covers a byte ("none" attestation, and what a U2F signature leaves out), a turned
byte may pass; then the tests say exactly which bytes these are and that nothing but their own field
changed.
"""

from __future__ import annotations

import json
from base64 import urlsafe_b64decode
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import cbor2
import pytest
from cryptography.x509 import load_der_x509_certificate
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from broker.ceremony import cbor as strict
from broker.ceremony import (
    finish_authentication,
    finish_registration,
    parse_authentication,
    parse_registration,
)
from broker.ceremony.reasons import REASONS
from broker.errors import CeremonyRefused, InvalidRequest, Refusal
from broker.model import (
    AuthenticationAnswer,
    RegistrationAnswer,
    RelyingParty,
    VerifiedAuthentication,
    VerifiedRegistration,
)
from tests.support.authenticator import (
    ED448,
    EDDSA,
    ES256,
    ES384,
    Attestation,
    Authenticator,
    Authority,
    b64,
)
from tests.support.ceremonies import (
    ORIGIN,
    authenticate,
    creation_options,
    pending_authentication,
    pending_registration,
    register,
    registered,
    relying_party,
    request_options,
)

# A turned byte can make a serial number negative; cryptography still reads such a certificate, and
# warns.
pytestmark = pytest.mark.filterwarnings("ignore:Parsed a serial number")

T = TypeVar("T")
ROOT = Authority("Root")
STRICT = settings(
    max_examples=300,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
    derandomize=True,
)


def outcome(call: Callable[[], T]) -> T | Refusal:
    """What a call returns, or the refusal that it raises; any other exception fails the test."""
    try:
        return call()
    except (CeremonyRefused, InvalidRequest) as refused:
        return refused


def judged(rp: RelyingParty, answer: RegistrationAnswer) -> VerifiedRegistration | None:
    """None for a refusal with one of the documented reasons."""
    verdict = outcome(lambda: finish_registration(pending_registration(rp), rp, answer))
    if isinstance(verdict, Refusal):
        assert type(verdict) is CeremonyRefused
        assert verdict.reason in REASONS
        return None
    return verdict


def turned(raw: bytes) -> list[tuple[int, bytes]]:
    """Every copy of `raw` with one bit or all bits of one byte turned, and the byte's place."""
    return [
        (at, raw[:at] + bytes([raw[at] ^ mask]) + raw[at + 1 :])
        for at in range(len(raw))
        for mask in (1 << (at % 8), 0xFF)
    ]


def parsed(form: Attestation, rp: RelyingParty) -> RegistrationAnswer:
    device = Authenticator(attestation=form, authority=ROOT)
    return parse_registration(device.register(creation_options(rp), ORIGIN))


def changes(before: VerifiedRegistration, after: VerifiedRegistration) -> set[str]:
    return {name for name in before._fields if getattr(before, name) != getattr(after, name)}


def unused_bits(answer: RegistrationAnswer) -> int | None:
    """The place of the byte that no signature can cover: the number of unused bits before a
    certificate's own signature.
    """
    chain = cbor2.loads(answer.attestation_object)["attStmt"].get("x5c")
    if chain is None:
        return None
    return answer.attestation_object.index(load_der_x509_certificate(chain[0]).signature) - 1


ROOTED = {"attestation": "direct", "attestation_roots": (ROOT.pem,)}
SIGNED: tuple[Attestation, ...] = ("packed-self", "packed", "android-key", "apple", "tpm")


@pytest.mark.parametrize("form", SIGNED)
def test_every_byte_of_a_signed_registration_counts(form: Attestation) -> None:
    """All but `unused_bits`, where a turned bit changes nothing."""
    rp = relying_party(**ROOTED)
    answer = parsed(form, rp)
    made = judged(rp, answer)
    assert made is not None
    unused = unused_bits(answer)
    for at, raw in turned(answer.attestation_object):
        after = judged(rp, answer._replace(attestation_object=raw))
        assert after is None or (at == unused and after == made)
    for _, raw in turned(answer.client_data_json):
        assert judged(rp, answer._replace(client_data_json=raw)) is None


@pytest.mark.parametrize("form", ["none", "fido-u2f"])
def test_bytes_that_no_signature_covers(form: Attestation) -> None:
    """AAGUID and counter may be anything; the flags may say more or less of what is not
    required.
    """
    rp = relying_party(**ROOTED)
    answer = parsed(form, rp)
    made = judged(rp, answer)
    assert made is not None
    data = cbor2.loads(answer.attestation_object)["authData"]
    begin = answer.attestation_object.index(data)
    unused = unused_bits(answer)
    free: dict[int, set[str]] = {32: {"backed_up", "backup_eligible", "user_verified"}}
    free |= {place: {"sign_count"} for place in range(33, 37)}
    free |= {place: {"aaguid"} for place in range(37, 53)}
    for at, raw in turned(answer.attestation_object):
        after = judged(rp, answer._replace(attestation_object=raw))
        if after is not None:
            assert changes(made, after) <= (set() if at == unused else free[at - begin])


def test_client_data_that_no_signature_covers() -> None:
    """With "none", only the name of a key that says nothing (`crossOrigin: false`) may change."""
    rp = relying_party()
    answer = parsed("none", rp)
    made = judged(rp, answer)
    name = answer.client_data_json.index(b"crossOrigin")
    for at, raw in turned(answer.client_data_json):
        after = judged(rp, answer._replace(client_data_json=raw))
        if after is not None:
            assert at in range(name, name + len("crossOrigin"))
            assert after == made


@pytest.mark.parametrize("form", ["none", "fido-u2f", *SIGNED])
def test_every_cut_of_a_registration(form: Attestation) -> None:
    rp = relying_party(**ROOTED)
    answer = parsed(form, rp)
    for end in range(len(answer.attestation_object)):
        cut = answer._replace(attestation_object=answer.attestation_object[:end])
        assert judged(rp, cut) is None
    for end in range(len(answer.client_data_json)):
        assert judged(rp, answer._replace(client_data_json=answer.client_data_json[:end])) is None
    data = cbor2.loads(answer.attestation_object)
    for end in range(len(data["authData"])):
        raw = cbor2.dumps({**data, "authData": data["authData"][:end]})
        assert judged(rp, answer._replace(attestation_object=raw)) is None


@pytest.mark.parametrize("form", ["packed", "fido-u2f", "android-key", "apple", "tpm"])
def test_certificates_cut_and_turned(form: Attestation) -> None:
    """Without roots nobody vouches for the certificate, so a turned byte may pass as a claim; it
    never breaks the reader.
    """
    rp = relying_party(attestation="direct")
    answer = parsed(form, rp)
    data = cbor2.loads(answer.attestation_object)
    certificate = data["attStmt"]["x5c"][0]
    bent = [raw for _, raw in turned(certificate)]
    bent += [certificate[:end] for end in range(len(certificate))]
    verdicts = []
    for raw in bent:
        data["attStmt"]["x5c"] = [raw]
        after = judged(rp, answer._replace(attestation_object=cbor2.dumps(data)))
        assert after is None or after.attestation_trust == "claimed"
        verdicts.append(after)
    assert verdicts.count(None) > len(certificate)
    assert all(verdict is None for verdict in verdicts[2 * len(certificate) :])


ALGORITHMS = {"by py_webauthn": ES256, "by us": ES384}


@pytest.mark.parametrize("algorithm", ALGORITHMS.values(), ids=ALGORITHMS.keys())
def test_every_byte_of_an_authentication_counts(algorithm: int) -> None:
    rp = relying_party(algorithms=(algorithm,))
    made, device = registered(rp)
    answer = parse_authentication(device.authenticate(request_options(rp, made), ORIGIN))
    pending = pending_authentication(rp, made)

    def seen(**change: Any) -> VerifiedAuthentication | None:
        bent: AuthenticationAnswer = answer._replace(**change)
        verdict = outcome(lambda: finish_authentication(pending, rp, made, bent))
        if isinstance(verdict, Refusal):
            assert type(verdict) is CeremonyRefused
            assert verdict.reason in REASONS
            return None
        return verdict

    assert seen() is not None
    for name in ("client_data_json", "authenticator_data", "signature", "credential_id"):
        raw = getattr(answer, name)
        assert [at for at, bent in turned(raw) if seen(**{name: bent})] == []
        assert [end for end in range(len(raw)) if seen(**{name: raw[:end]})] == []
        assert seen(**{name: raw + b"\0"}) is None
    handle = answer.user_handle or ""
    assert [
        at for at in range(len(handle)) if seen(user_handle=handle[:at] + "!" + handle[at + 1 :])
    ] == []


@pytest.mark.parametrize("algorithm", ALGORITHMS.values(), ids=ALGORITHMS.keys())
def test_every_byte_of_a_stored_key_counts(algorithm: int) -> None:
    """A damaged row is a refusal like any other."""
    rp = relying_party(algorithms=(algorithm,))
    made, device = registered(rp)
    answer = parse_authentication(device.authenticate(request_options(rp, made), ORIGIN))
    keys = [raw for _, raw in turned(made.public_key)]
    keys += [made.public_key[:end] for end in range(len(made.public_key))]
    for raw in keys:
        with pytest.raises(CeremonyRefused) as refused:
            finish_authentication(
                pending_authentication(rp, made), rp, replace(made, public_key=raw), answer
            )
        assert refused.value.reason in ("public_key", "signature", "malformed", "algorithm")


STORED: list[Any] = [
    b"", b"\xff", b"\x04" + bytes(64), b"\x04" * 65, 0, "text", [], [1, 2, 3], {}, {1: 2}, {1: 2, 3: -7}, {1: 0, 3: 0},
    {1: 2, 3: -7, -1: 1}, {1: 2, 3: -7, -1: 1, -2: b""}, {1: 2, 3: -7, -1: 1, -2: b"", -3: b""},
    {1: 2, 3: -7, -1: 1, -2: 5, -3: 5}, {1: 2, 3: -7, -1: 9, -2: b"x", -3: b"y"}, {1: 2, 3: -7, -1: [], -2: b"x", -3: b"y"},
    {1: 1, 3: -8, -1: 6, -2: b"x"}, {1: 1, 3: -8, -1: 6, -2: "x" * 32}, {1: 3, 3: -257, -1: b"\1", -2: b"\1"},
    {1: 3, 3: -257, -1: b"\xff" * 256, -2: b"\0"}, {1: 7, 3: -48, -1: b"x"}, {1: 7, 3: -7}, {1: [], 3: {}},
    {1: 3, 3: -257, -1: b"\xff" * 4096, -2: b"\xff" * 600}, {1: 2, 3: -7, -1: 1, -2: b"\xff" * 600, -3: b"\xff" * 600},
    {1: 2, 3: "ES256", -1: 1, -2: b"x" * 32, -3: b"y" * 32},
]  # fmt: skip


@pytest.mark.parametrize("algorithm", [ES256, EDDSA, ED448])
@pytest.mark.parametrize("stored", STORED, ids=repr)
def test_rubbish_as_a_stored_key(stored: Any, algorithm: int) -> None:
    rp = relying_party()
    made, device = registered(rp)
    answer = device.authenticate(request_options(rp, made), ORIGIN)
    raw = stored if isinstance(stored, bytes) else cbor2.dumps(stored)
    with pytest.raises(CeremonyRefused) as refused:
        authenticate(rp, replace(made, public_key=raw, algorithm=algorithm), answer)
    assert refused.value.reason in ("public_key", "signature", "malformed", "algorithm")


# CBOR.

WRONG_CBOR: list[tuple[str, str]] = [
    ("nothing", ""),
    ("number in two bytes that fits one", "1801"),
    ("number in three bytes that fits two", "190010"),
    ("number in five bytes that fits three", "1a0000ffff"),
    ("number in nine bytes that fits five", "1b00000000ffffffff"),
    ("length in two bytes that fits one", "580161"),
    ("reserved length", "1c"),
    ("endless bytes", "5f4101ff"),
    ("endless text", "7f6161ff"),
    ("endless list", "9f01ff"),
    ("endless map", "bf0102ff"),
    ("break alone", "ff"),
    ("tag of a big number", "c24101"),
    ("tag of a date", "c074323031332d30332d32315432303a30343a30305a"),
    ("tag of a regular expression", "d8236161"),
    ("tag of a shared value", "d81c81d81d00"),
    ("tag of itself", "d9d9f700"),
    ("undefined", "f7"),
    ("simple value", "f0"),
    ("simple value in two bytes", "f8ff"),
    ("bytes that end early", "4261"),
    ("bytes of absurd length", "5bffffffffffffffff"),
    ("list of absurd length", "9bffffffffffffffff"),
    ("map of absurd length", "bbffffffffffffffff"),
    ("list that ends early", "820101"[:4]),
    ("map without value", "a101"),
    ("map with equal keys", "a201010102"),
    ("map with equal text keys", "a2616101616102"),
    ("map with a bytes key", "a1416101"),
    ("map with a list key", "a18001"),
    ("map with a map key", "a1a001"),
    ("map with a true key", "a1f501"),
    ("map with a float key", "a1f93c0001"),
    ("map that ends before a key", "a20101"),
    ("text that is not UTF-8", "61ff"),
    ("text with a surrogate", "63eda080"),
    ("a tail", "0000"),
    ("nine lists deep", "81" * 9 + "00"),
    ("nine maps deep", "a101" * 9 + "00"),
    ("a thousand lists deep", "81" * 20_000),
    ("float that ends early", "fb00"),
    ("list of a thousand", "9903e8" + "00" * 1000),
    ("lists of a thousand in all", "98c8" + "8400000000" * 200),
    ("map of five hundred", "b901f4" + "".join(f"19{n:04x}00" for n in range(1000, 1500))),
]


@pytest.mark.parametrize(
    "raw", [pytest.param(bytes.fromhex(raw), id=name) for name, raw in WRONG_CBOR]
)
def test_cbor_that_is_refused(raw: bytes) -> None:
    with pytest.raises(CeremonyRefused) as refused:
        strict.read_all(raw)
    assert refused.value.reason == "malformed"
    rp = relying_party()
    assert judged(rp, parsed("none", rp)._replace(attestation_object=raw)) is None


def test_cbor_of_as_many_values_as_may_be() -> None:
    assert len(strict.read_all(bytes.fromhex("9903e7" + "00" * 999))) == 999


LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-(2**64), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.binary(max_size=40)
    | st.text(max_size=20)
)
TREES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.integers(-9, 9) | st.text(max_size=4), inner, max_size=4)
    ),
    max_leaves=12,
)


@STRICT
@given(TREES)
def test_the_strict_reader_agrees_with_cbor2(value: Any) -> None:
    """On everything that both accept; what it refuses for depth it refuses alone."""
    raw = cbor2.dumps(value)
    read = outcome(lambda: strict.read_all(raw))
    if isinstance(read, Refusal):
        with pytest.raises(cbor2.CBORDecodeError):
            cbor2.loads(raw, max_depth=strict.DEPTH)
        return
    assert read == value == cbor2.loads(raw)


@STRICT
@given(st.binary(max_size=80))
def test_the_strict_reader_on_rubbish(raw: bytes) -> None:
    value = outcome(lambda: strict.read_all(raw))
    if isinstance(value, Refusal):
        assert value.reason == "malformed"
        return
    assert repr(value) == repr(cbor2.loads(raw))


# Structures bent by hypothesis.

FORMS = ("none", "packed-self", "packed", "fido-u2f", "android-key", "apple", "tpm")
PATHS = (
    "fmt",
    "attStmt",
    "authData",
    "sig",
    "x5c",
    "alg",
    "ver",
    "pubArea",
    "certInfo",
    "x5c.0",
    "new",
)


def bend(whole: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy with one member replaced, of the object or of its statement."""
    if path in ("fmt", "attStmt", "authData"):
        return {**whole, path: value}
    statement = dict(whole["attStmt"])
    if path == "x5c.0":
        statement["x5c"] = [value, *statement.get("x5c", [])[1:]]
    else:
        statement[path] = value
    return {**whole, "attStmt": statement}


@pytest.mark.parametrize("form", FORMS)
def test_bent_statements(form: Attestation) -> None:
    rp = relying_party(attestation="direct")
    answer = parsed(form, rp)
    whole = cbor2.loads(answer.attestation_object)
    made = judged(rp, answer)

    @settings(STRICT, max_examples=150)
    @given(st.sampled_from(PATHS), TREES)
    def run(path: str, value: Any) -> None:
        bent = bend(whole, path, value)
        after = judged(rp, answer._replace(attestation_object=cbor2.dumps(bent)))
        # A member that the format does not know is ignored where the specification does not list
        # them all.
        assert after is None or (bent == whole and after == made) or _unknown_member(form, path)

    run()


def _unknown_member(form: Attestation, path: str) -> bool:
    known: dict[str, set[str]] = {
        "packed": {"alg", "sig", "x5c", "x5c.0"},
        "packed-self": {"alg", "sig", "x5c", "x5c.0"},
        "android-key": {"alg", "sig", "x5c", "x5c.0"},
        "apple": {"x5c", "x5c.0"},
        "fido-u2f": {"sig", "x5c", "x5c.0"},
        "tpm": {"alg", "sig", "x5c", "x5c.0", "ver", "pubArea", "certInfo"},
    }
    return form in known and path not in known[form] | {"fmt", "attStmt", "authData"}


def test_bent_keys() -> None:
    rp = relying_party()
    members = (1, 3, -1, -2, -3, -4, 2, "x")

    @STRICT
    @given(st.sampled_from(members), TREES)
    def run(member: Any, value: Any) -> None:
        device = Authenticator()
        answer = device.register(creation_options(rp), ORIGIN, key={member: value})
        if value is None and member in (-4, 2, "x"):  # the authenticator leaves such a member out
            assert register(rp, answer)
            return
        with pytest.raises(CeremonyRefused) as refused:
            register(rp, answer)
        assert refused.value.reason in ("public_key", "algorithm", "malformed")

    run()


@STRICT
@given(st.binary(max_size=120))
def test_rubbish_as_authenticator_data(tail: bytes) -> None:
    rp = relying_party()
    answer = parsed("none", rp)
    whole = cbor2.loads(answer.attestation_object)
    for data in (tail, whole["authData"][:37] + tail, whole["authData"][:55] + tail):
        bent = cbor2.dumps({**whole, "authData": data})
        assert judged(rp, answer._replace(attestation_object=bent)) is None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=8,
)
KEYS = ("type", "challenge", "origin", "crossOrigin", "topOrigin", "tokenBinding")


@STRICT
@given(st.sampled_from(KEYS), JSON)
def test_bent_client_data(key: str, value: Any) -> None:
    rp = relying_party()
    answer = Authenticator().register(creation_options(rp), ORIGIN, client_data={key: value})
    if (key, value) == ("crossOrigin", False):
        assert register(rp, answer)
        return
    with pytest.raises(CeremonyRefused) as refused:
        register(rp, answer)
    assert refused.value.reason in REASONS


PARSERS: list[tuple[Callable[[object], object], bool]] = [
    (parse_registration, True),
    (parse_authentication, False),
]


@pytest.mark.parametrize(("parse", "registers"), PARSERS, ids=["registration", "authentication"])
def test_bent_form(parse: Callable[[object], object], registers: bool) -> None:
    """Any JSON in any place of the wire form: read, or a fault of form."""
    rp = relying_party()
    made, device = registered(rp)
    good = (
        Authenticator().register(creation_options(rp), ORIGIN)
        if registers
        else device.authenticate(request_options(rp, made), ORIGIN)
    )
    places = [*good, *(f"response.{name}" for name in good["response"])]

    @STRICT
    @given(st.sampled_from(places), JSON)
    def run(place: str, value: Any) -> None:
        answer: dict[str, Any] = json.loads(json.dumps(good))
        holder = answer["response"] if place.startswith("response.") else answer
        holder[place.removeprefix("response.")] = value
        read = outcome(lambda: parse(answer))
        if isinstance(read, Refusal):
            assert type(read) is InvalidRequest
            return
        name = place.removeprefix("response.")
        if name not in (
            "clientExtensionResults",
            "authenticatorAttachment",
            "transports",
            "userHandle",
        ):
            assert isinstance(value, str)
            assert b64(urlsafe_b64decode(value + "=" * (-len(value) % 4))) == value.rstrip("=")

    run()

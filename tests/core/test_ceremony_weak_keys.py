"""Public keys for which anybody can make a signature: refused at registration and at a sign-in, for
every algorithm of a policy.

The arithmetic of the two Edwards curves is written here a second time, affine and slow, and shares
nothing with the broker: the points of small order are found by multiplying points with the order of
the main subgroup (RFC 8032 §5.1, §5.2), and their encodings by trying.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import cbor2
import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ed448, ed25519

from broker.embedded import EmbeddedStores
from broker.errors import CeremonyRefused
from broker.model import ALGORITHMS, Credential
from tests.conftest import Started
from tests.support.authenticator import (
    ED448,
    EDDSA,
    ES256,
    ES384,
    ES512,
    RS256,
    Authenticator,
    rsa_key,
)
from tests.support.ceremonies import (
    ORIGIN,
    authenticate,
    creation_options,
    register,
    registered,
    relying_party,
    request_options,
)
from tests.support.servers import session_of
from tests.support.signals import counted, refused
from tests.support.wire import ORIGIN as SITE
from tests.support.wire import Wire

Point = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Curve:
    """ax² + y² = 1 + dx²y² modulo p. `order` is that of the main subgroup; a key has `size`
    bytes.
    """

    algorithm: int
    p: int
    a: int
    d: int
    order: int
    cofactor: int
    size: int

    def add(self, one: Point, other: Point) -> Point:
        """RFC 8032 §5.1.4, in affine coordinates; the formula is complete."""
        (x, y), (u, v), p = one, other, self.p
        t = self.d * x * y * u * v
        return (
            (x * v + u * y) * pow(1 + t, -1, p) % p,
            (y * v - self.a * x * u) * pow(1 - t, -1, p) % p,
        )

    def times(self, number: int, point: Point) -> Point:
        total = (0, 1)
        for bit in bin(number)[2:]:
            total = self.add(total, total)
            if bit == "1":
                total = self.add(total, point)
        return total

    def lift(self, y: int) -> Point | None:
        """A point with this y, or None. p is 5 modulo 8 for the one curve, 3 modulo 4 for the
        other.
        """
        p = self.p
        square = (1 - y * y) * pow(self.a - self.d * y * y, -1, p) % p
        root = pow(square, (p + 3) // 8 if p % 8 == 5 else (p + 1) // 4, p)
        for x in (root, root * pow(2, (p - 1) // 4, p) % p):
            if x * x % p == square:
                return x, y
        return None

    def encode(self, point: Point, *, more: int = 0) -> bytes:
        """RFC 8032 §5.1.2, §5.2.2; with `more` added to y, which a decoder that reduces would not
        see.
        """
        return self.raw(point[1] + more, point[0] & 1)

    def raw(self, y: int, sign: int) -> bytes:
        return (y | sign << (8 * self.size - 1)).to_bytes(self.size, "little")


EDWARDS = {
    EDDSA: Curve(
        algorithm=EDDSA,
        p=2**255 - 19,
        a=-1,
        d=-121665 * pow(121666, -1, 2**255 - 19),
        order=2**252 + 27742317777372353535851937790883648493,
        cofactor=8,
        size=32,
    ),
    ED448: Curve(
        algorithm=ED448,
        p=2**448 - 2**224 - 1,
        a=1,
        d=-39081,
        order=2**446 - 13818066809895115352007386748515426880336692474882178609894547503885,
        cofactor=4,
        size=57,
    ),
}
# The coordinates y in the list of libsodium's ge25519_has_small_order (crypto_core/ed25519/ref10),
# which ignores the sign of x.
LIBSODIUM = {
    0,
    1,
    2707385501144840649318225287225658788936804267575313519463743609750303402022,
    55188659117513257062467267217118295137698188065244968500265048394206261417927,
    2**255 - 20,
    2**255 - 19,
    2**255 - 18,
}


@cache
def small(algorithm: int) -> tuple[Point, ...]:
    """All points whose order divides the cofactor."""
    curve, found, y = EDWARDS[algorithm], {(0, 1)}, 2
    while len(found) < curve.cofactor:
        if point := curve.lift(y):
            found.add(curve.times(curve.order, point))
        y += 1
    return tuple(sorted(found))


def encodings(algorithm: int) -> Iterator[bytes]:
    """Every canonical encoding of a point of small order."""
    return map(EDWARDS[algorithm].encode, small(algorithm))


def odd_encodings(algorithm: int) -> Iterator[bytes]:
    """The others that a decoder could take for such a point: y not reduced, and "-0" for an x
    of 0.
    """
    curve = EDWARDS[algorithm]
    for _, y in small(algorithm):
        for more in range(0, 2 ** (8 * curve.size - 1) - y, curve.p):
            for sign in (0, 1):
                raw = curve.raw(y + more, sign)
                if raw not in set(encodings(algorithm)):
                    yield raw


class NoKey:
    """Signs without a private key: S is 0, and R the point of small order for which the equation of
    RFC 8032 §5.1.7 holds, if any does.
    """

    def __init__(self, algorithm: int, public: bytes) -> None:
        kind = ed25519.Ed25519PublicKey if algorithm == EDDSA else ed448.Ed448PublicKey
        self._key: Any = kind.from_public_bytes(public)
        self._candidates = [r + bytes(len(public)) for r in encodings(algorithm)]
        self.verified = False

    def sign(self, data: bytes) -> bytes:
        for signature in self._candidates:
            try:
                self._key.verify(signature, data)
            except InvalidSignature:
                continue
            self.verified = True
            return signature
        return self._candidates[0]


def forging(device: Authenticator, algorithm: int, public: bytes) -> NoKey:
    """The authenticator has lost its private key."""
    (held,) = device.held.values()
    held.key = forger = NoKey(algorithm, public)  # type: ignore[assignment]
    return forger


def with_members(made: Credential, members: dict[int, Any]) -> Credential:
    return replace(made, public_key=cbor2.dumps(cbor2.loads(made.public_key) | members))


def refuses_registration(algorithm: int, members: dict[int, Any]) -> None:
    rp = relying_party(algorithms=(algorithm,))
    answer = Authenticator(algorithms=(algorithm,)).register(
        creation_options(rp), ORIGIN, key=members
    )
    with pytest.raises(CeremonyRefused) as refusal:
        register(rp, answer)
    assert refusal.value.reason == "public_key", members


def test_the_points_of_small_order_are_those_that_others_list() -> None:
    ours = {y for _, y in small(EDDSA)}
    assert ours | {2**255 - 19, 2**255 - 18} == LIBSODIUM
    assert {y for _, y in small(ED448)} == {0, 1, EDWARDS[ED448].p - 1}


@pytest.mark.parametrize("algorithm", EDWARDS, ids=ALGORITHMS.get)
def test_an_edwards_key_of_small_order_does_not_register(algorithm: int) -> None:
    for public in (*encodings(algorithm), *odd_encodings(algorithm)):
        refuses_registration(algorithm, {-2: public})


@pytest.mark.parametrize("algorithm", EDWARDS, ids=ALGORITHMS.get)
def test_a_stored_edwards_key_of_small_order_never_signs_in(algorithm: int) -> None:
    """As registered by older code. Each is shown to verify what nobody signed, once the counter
    makes the hash fit; only the two points of Ed448 with x = 0 are refused by OpenSSL too."""
    rp = relying_party(algorithms=(algorithm,))
    for point in small(algorithm):
        public = EDWARDS[algorithm].encode(point)
        made, device = registered(rp, Authenticator(algorithms=(algorithm,)))
        forger, made = forging(device, algorithm, public), with_members(made, {-2: public})
        for _ in range(100):
            answer = device.authenticate(request_options(rp, made), ORIGIN)
            with pytest.raises(CeremonyRefused) as refusal:
                authenticate(rp, made, answer)
            assert refusal.value.reason == "public_key"
            if forger.verified:
                break
        assert forger.verified == (algorithm == EDDSA or point[0] != 0), point


@pytest.mark.parametrize("algorithm", EDWARDS, ids=ALGORITHMS.get)
def test_an_edwards_key_that_is_no_point_or_not_canonical_does_not_register(algorithm: int) -> None:
    """RFC 8032 §5.1.3, §5.2.3: decoding fails for a y that is not reduced, and for one without an
    x.
    """
    curve = EDWARDS[algorithm]
    fit = min(curve.p + 64, 2 ** (8 * curve.size - 1))
    not_reduced = [curve.raw(y, sign) for y in range(curve.p, fit) for sign in (0, 1)]
    too_large = [b"\xff" * curve.size, curve.raw(2 ** (8 * curve.size - 1) - 1, 0)]
    off_curve = [curve.raw(y, sign) for y in range(2, 40) if not curve.lift(y) for sign in (0, 1)]
    assert len(off_curve) > 10
    for public in (*not_reduced, *too_large, *off_curve):
        refuses_registration(algorithm, {-2: public})


@pytest.mark.parametrize("algorithm", EDWARDS, ids=ALGORITHMS.get)
def test_a_stored_edwards_key_that_is_no_point_never_signs_in(algorithm: int) -> None:
    curve = EDWARDS[algorithm]
    rp = relying_party(algorithms=(algorithm,))
    made, device = registered(rp, Authenticator(algorithms=(algorithm,)))
    off_curve = next(y for y in range(2, 40) if not curve.lift(y))
    for public, reason in (
        (curve.raw(curve.p + 3, 0), "public_key"),
        (curve.raw(off_curve, 0), "signature"),
    ):
        answer = device.authenticate(request_options(rp, made), ORIGIN)
        with pytest.raises(CeremonyRefused) as refusal:
            authenticate(rp, with_members(made, {-2: public}), answer)
        assert refusal.value.reason == reason


@pytest.mark.parametrize("algorithm", EDWARDS, ids=ALGORITHMS.get)
def test_every_other_point_of_an_edwards_curve_is_a_key(algorithm: int) -> None:
    """Small numbers as y, and points with a part of small order: who knows the main part's
    logarithm signs, nobody else.
    """
    curve = EDWARDS[algorithm]
    rp = relying_party(algorithms=(algorithm,))
    points = [point for y in range(2, 40) if (point := curve.lift(y))]
    points += [curve.add(points[0], other) for other in small(algorithm)]
    for public in map(curve.encode, points):
        device = Authenticator(algorithms=(algorithm,))
        made = register(rp, device.register(creation_options(rp), ORIGIN, key={-2: public}))
        assert cbor2.loads(made.public_key)[-2] == public


PRIMES = {
    ES256: (32, 2**256 - 2**224 + 2**192 + 2**96 - 1),
    ES384: (48, 2**384 - 2**128 - 2**96 + 2**32 - 1),
    ES512: (66, 2**521 - 1),
}


@pytest.mark.parametrize("algorithm", PRIMES, ids=ALGORITHMS.get)
def test_a_point_that_is_not_on_its_prime_curve_is_no_key(algorithm: int) -> None:
    """These curves have cofactor 1, and coordinates can't express the point at infinity: being on
    the curve is all.
    """
    size, _ = PRIMES[algorithm]
    rp = relying_party(algorithms=(algorithm,))
    made, device = registered(rp, Authenticator(algorithms=(algorithm,)))
    answer = device.authenticate(request_options(rp, made), ORIGIN)
    key = cbor2.loads(made.public_key)
    zero, most, ours = bytes(size), b"\xff" * size, key[-2]
    for x, y in (
        (zero, zero),
        (zero, ours),
        (ours, zero),
        (ours, ours),
        (most, most),
        (zero, most),
    ):
        refuses_registration(algorithm, {-2: x, -3: y})
        with pytest.raises(CeremonyRefused) as refusal:
            authenticate(rp, with_members(made, {-2: x, -3: y}), answer)
        assert refusal.value.reason == "public_key"


@pytest.mark.parametrize("algorithm", PRIMES, ids=ALGORITHMS.get)
def test_a_coordinate_that_is_not_reduced_is_no_key(algorithm: int) -> None:
    size, p = PRIMES[algorithm]
    rp = relying_party(algorithms=(algorithm,))
    made, _ = registered(rp, Authenticator(algorithms=(algorithm,)))
    key = cbor2.loads(made.public_key)
    x, y = (int.from_bytes(key[name], "big") for name in (-2, -3))
    b = y * y - x**3 + 3 * x
    roots = ((x, pow(x**3 - 3 * x + b, (p + 1) // 4, p)) for x in range(2, 200))
    x, y = next((x, y) for x, y in roots if (y * y - x**3 + 3 * x - b) % p == 0)
    right = {-2: x.to_bytes(size, "big"), -3: y.to_bytes(size, "big")}
    register(
        rp, Authenticator(algorithms=(algorithm,)).register(creation_options(rp), ORIGIN, key=right)
    )
    refuses_registration(algorithm, right | {-2: (x + p).to_bytes(size, "big")})


def number(value: int) -> bytes:
    return value.to_bytes((value.bit_length() + 7) // 8, "big")


RIGHT = rsa_key().public_key().public_numbers().n
WEAK_RSA: dict[str, dict[int, bytes]] = {
    "exponent 1: a signature is the padded hash": {-2: b"\x01"},
    "exponent 0": {-2: b"\x00"},
    "no exponent": {-2: b""},
    "an even exponent": {-2: b"\x02"},
    "an even exponent near the usual one": {-2: b"\x01\x00\x00"},
    "an exponent of 5 bytes": {-2: b"\x01\x00\x00\x00\x01"},
    "modulus 1": {-1: b"\x01"},
    "a modulus of 512 bits": {-1: number(RIGHT >> 1536 | 1)},
    "a modulus of 1024 bits": {-1: number(RIGHT >> 1024 | 1)},
    "a modulus of 2047 bits": {-1: number(RIGHT >> 1 | 1)},
    "a modulus of 8200 bits": {-1: b"\xff" * 1025},
    "an even modulus": {-1: number(RIGHT - 1)},
    "a modulus with the factor 3": {
        -1: number(RIGHT - RIGHT % 3 + (0 if (RIGHT - RIGHT % 3) % 2 else 3))
    },
    "a modulus with the factor 751": {-1: number(751 * (RIGHT // 751 | 1))},
    "a square": {-1: number((2**1024 - 105) ** 2)},
    "no modulus": {-1: b""},
    "a zero in front": {-1: b"\0" + number(RIGHT)},
}


@pytest.mark.parametrize("members", WEAK_RSA.values(), ids=WEAK_RSA.keys())
def test_a_weak_rsa_key_is_no_key(members: dict[int, bytes]) -> None:
    """Neither new nor stored. NIST SP 800-89 §5.3.3: the exponent is odd, the modulus is odd and
    has no factor below 752.
    """
    refuses_registration(RS256, members)
    rp = relying_party(algorithms=(RS256,))
    made, device = registered(rp, Authenticator(algorithms=(RS256,)))
    answer = device.authenticate(request_options(rp, made), ORIGIN)
    with pytest.raises(CeremonyRefused) as refusal:
        authenticate(rp, with_members(made, members), answer)
    assert refusal.value.reason == "public_key"


def test_every_algorithm_of_a_policy_is_judged_here() -> None:
    assert {*EDWARDS, *PRIMES, RS256} == set(ALGORITHMS)


async def test_an_operator_sees_a_weak_key(
    stores: EmbeddedStores, broker: Started, wire: Wire
) -> None:
    """At the registration, and at the sign-in with one that is stored already: answer, metric, log
    line and event.
    """
    public = next(encodings(EDDSA))
    transaction = await wire.open_registration("ann")
    handle, options = await wire.begin("register", transaction)
    device = Authenticator(algorithms=(EDDSA,))
    with (
        refused(broker, "webauthn_login_failed", "public_key"),
        counted(
            broker, "broker_ceremonies_total", kind="register", step="finish", result="refused"
        ),
    ):
        made = device.register(options, SITE, key={-2: public})
        answer = await wire.finish("register", handle, made, transaction)
    assert (answer.status, answer.json["signal"]["credential_id"]) == (401, made["id"])
    assert (await broker.events(wire.app_id))[-1] == ("passkey.registered", "refused", "public_key")

    await wire.register(transaction, device)
    [passkey] = (await wire.keyed("GET", "/passkeys")).json["passkeys"]
    async with session_of(stores) as session:
        await session.execute(
            "UPDATE credentials SET public_key = $2 WHERE id = $1",
            passkey["id"],
            cbor2.dumps({1: 1, 3: EDDSA, -1: 6, -2: public}),
        )
    transaction = await wire.open_authentication("ann")
    handle, options = await wire.begin("authenticate", transaction)
    forging(device, EDDSA, public)
    with (
        refused(broker, "webauthn_login_failed", "public_key"),
        counted(
            broker, "broker_ceremonies_total", kind="authenticate", step="finish", result="refused"
        ),
    ):
        made = device.authenticate(options, SITE)
        answer = await wire.finish("authenticate", handle, made, transaction)
    assert answer.status == 401
    assert (await broker.events(wire.app_id))[-1] == ("passkey.used", "refused", "public_key")

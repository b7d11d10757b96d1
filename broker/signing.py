"""Signing keys of JSON Web Tokens: key sets (JWKS), key rotation, and signing.

Some wire formats' backends verify tokens offline; these keys serve them.

**Key sets.** Each app has a key set of its own. Wire formats whose key set names no app share the
broker's own set (`app` None). There the claim `aud` keeps apps apart, so every verifier must check
it. In a set, each algorithm has its own keys, of which exactly one signs.

**First key.** The first call that needs a key makes it, in a thread, one call at a time. The
store keeps the first one stored, so any number of instances end with one key.

**Rotation.** A verifier caches a key set for up to `JWKS_MAX_AGE` seconds, the Cache-Control of the
dialects' answers. So the next key is published at once and signs only after that time and `SKEW`:
by then no cache lacks the key. The key before it stays published until `TOKEN_LIFE_LIMIT` and
`SKEW` after its last signature, when the last token that it signed has expired. `TOKEN_LIFE_LIMIT`
is the longest life that settings allow, because the operator's command line may have other settings
than the service. Then the key leaves the set, and the next rotation deletes it. `SKEW` covers
clocks that differ, and the second in which an instance still caches the keys of before.

**Leaked key.** With `now` the next key signs at once. A verifier that does not look up a `kid` it
lacks refuses tokens until its cache expires. With `drop` the older keys also leave the set at once,
and tokens that they signed no longer verify. A verifier that caches the old set accepts them for up
to `JWKS_MAX_AGE` more.

**Cache.** Key sets are cached as apps are (`broker.durable.cache`), so a rotation is effective
on every instance within a second. The state of a key follows from the time at which the key is
used, not at which it was read. A signature takes a third of a millisecond on the event loop with
RSA, and less with the others.

**Sealed keys.** A key sealed under a secret that this process lacks is `Unavailable`. No other key
signs in its place, and no new key is made: the operator supplies the secret, or rotates. `broker
doctor` reports such keys.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from itertools import groupby
from operator import attrgetter
from typing import Any, Literal

from broker.durable import instant
from broker.durable.cache import Cache
from broker.durable.signing_keys import SigningKeys, StoredKey
from broker.errors import InvalidSetting, Unavailable
from broker.model import RelyingParty, TokenAlgorithm
from broker.settings import TOKEN_LIFE_LIMIT
from broker.telemetry import Metrics, remaining
from broker.tokens import Mint, SystemMint
from broker.tokens.sealed import SealBroken
from broker.tokens.signed import PrivateKey, Seal, generate, public_jwk, sign

JWKS_MAX_AGE = 600  # seconds
SKEW = 60  # seconds
PUBLISHED_AHEAD = JWKS_MAX_AGE + SKEW  # seconds
_GENERATION_TIMEOUT = 5.0  # seconds for a first key, the wait for the lock included

State = Literal["signs", "next", "old", "gone"]


@dataclass(slots=True)
class _KeySet:
    """A key set as read, and the private keys opened since."""

    keys: list[StoredKey]
    opened: dict[str, PrivateKey] = field(default_factory=dict, repr=False)

    def signer(self, algorithm: TokenAlgorithm, now: datetime) -> StoredKey | None:
        """The newest key of the algorithm that may sign. None: the set has no key of it.

        If none may sign yet, because another instance's clock is ahead, the oldest signs.
        """
        keys = [key for key in self.keys if key.algorithm == algorithm]
        return next(
            (key for key in reversed(keys) if key.signs_from <= now), keys[0] if keys else None
        )

    def states(self, now: datetime) -> list[tuple[StoredKey, State]]:
        """Every key with its state."""
        return [(key, self._state(key, now)) for key in self.keys]

    def _state(self, key: StoredKey, now: datetime) -> State:
        signer = self.signer(key.algorithm, now) or key
        if key is signer:
            return "signs"
        if key.retires_at is not None and key.retires_at <= now:
            return "gone"
        return "next" if key.generation > signer.generation else "old"


class Signing:
    """Signs tokens, publishes and rotates keys.

    `secret_keys` gives the secrets that seal private keys (`broker.tokens.signed`): the first
    seals, any opens.
    """

    def __init__(
        self,
        keys: SigningKeys,
        secret_keys: Callable[[], Sequence[str]],
        *,
        clock: Callable[[], float] = time.time,
        mint: Mint | None = None,
        cache_seconds: float = 0.9,
        monotonic: Callable[[], float] = time.monotonic,
        metrics: Metrics | None = None,
    ) -> None:
        self._keys = keys
        self._secret_keys = secret_keys
        self._clock = clock
        self._mint = mint or SystemMint()
        self._sets: Cache[_KeySet] = Cache(cache_seconds, monotonic)
        if metrics is not None:
            self._sets.report("signing_keys", metrics)
        self._generation = asyncio.Lock()

    async def sign(
        self, app: RelyingParty | None, algorithm: TokenAlgorithm, claims: Mapping[str, Any]
    ) -> str:
        """A JSON Web Token with exactly these claims, signed by the app's key (None: the broker's
        own). Makes the first key.

        Raises:
            UnknownApp: the app was deleted meanwhile.
            Unavailable: the store does not answer; or `reason` is "no_secret_key",
                "signing_key_sealed" (under a secret that this process lacks) or "signing_key_slow".
        """
        key, private = await self._signer(app, algorithm)
        return sign(claims, private, key.id, algorithm)

    async def ready(self, app: RelyingParty | None, algorithm: TokenAlgorithm) -> None:
        """Verify that `sign` can, before a value is taken that a failure would spend. Makes the
        first key.

        Raises:
            UnknownApp, Unavailable: as `sign`.
        """
        await self._signer(app, algorithm)

    async def key_set(
        self, app: RelyingParty | None, algorithm: TokenAlgorithm = "RS256"
    ) -> dict[str, list[Mapping[str, str]]]:
        """The JWK Set of the app (None: the broker's own), `{"keys": […]}` (RFC 7517 §5).

        It holds every algorithm's keys, those that sign first. The first key of `algorithm` is
        made, so that it is published before it signs.

        Raises:
            UnknownApp, Unavailable: as `sign`.
        """
        key_set = await self._set(app, algorithm)
        states = sorted(key_set.states(instant(self._clock())), key=lambda pair: pair[1] != "signs")
        return {"keys": [key.public for key, state in states if state != "gone"]}

    async def rotate(
        self,
        app: RelyingParty | None,
        algorithm: TokenAlgorithm,
        *,
        now: bool = False,
        drop: bool = False,
    ) -> list[tuple[StoredKey, State]]:
        """Make the next key of an algorithm; return the set as `list_keys` does.

        The key signs when every verifier can know it, or with `now` at once. With `drop` the older
        keys leave the set at once. A first key signs at once.

        Raises:
            InvalidSetting: `drop` without `now`. No published key would verify tokens until the
                next key signs.
            UnknownApp, Unavailable.
        """
        if drop and not now:
            raise InvalidSetting("Older keys can be dropped only when the next one signs now.")
        app_id = app.id if app else None
        if any(key.algorithm == algorithm for key in await self._keys.of(app_id)):
            key = await self._new(app_id, algorithm)
            signs_from = (
                key.created_at if now else key.created_at + timedelta(seconds=PUBLISHED_AHEAD)
            )
            last = (
                key.created_at if drop else signs_from + timedelta(seconds=TOKEN_LIFE_LIMIT + SKEW)
            )
            await self._keys.rotate(replace(key, signs_from=signs_from), others_retire_at=last)
        else:
            await self._keys.add_first(await self._new(app_id, algorithm), rotated=True)
        self._sets.forget(app_id)
        return await self.list_keys(app)

    async def list_keys(self, app: RelyingParty | None) -> list[tuple[StoredKey, State]]:
        """The keys of a set with their states: signs, next, old (verifies tokens that it signed) or
        gone (left the set).
        """
        keys = await self._keys.of(app.id if app else None)
        return _KeySet(keys).states(instant(self._clock()))

    async def list_seals(self) -> list[tuple[StoredKey, int | None]]:
        """Every key of every set that signs or will sign, with the number of the secret that opens
        it: 0 seals new keys; None: no secret of this process opens it.
        """
        now = instant(self._clock())
        return [
            (key, opened[1] if (opened := self._open(key)) else None)
            for _, keys in groupby(await self._keys.all(), attrgetter("scope"))
            for key, state in _KeySet(list(keys)).states(now)
            if state in ("signs", "next")
        ]

    async def reseal(self) -> tuple[int, int]:
        """Seal every key under the first secret. May be repeated, and run beside instances that
        serve with both secrets.

        Returns how many keys were resealed, and how many no secret of this process opens.
        """
        resealed = lost = 0
        for key in await self._keys.all():
            opened = self._open(key)
            if opened is None:
                lost += 1
            elif opened[1] != 0:
                sealed = self._seal.close(
                    opened[0], kid=key.id, scope=key.scope, algorithm=key.algorithm
                )
                resealed += await self._keys.reseal(key, sealed, instant(self._clock()))
        return resealed, lost

    # -- below -------------------------------------------------------------------------------------

    @property
    def _seal(self) -> Seal:
        return Seal(self._secret_keys())

    async def _signer(
        self, app: RelyingParty | None, algorithm: TokenAlgorithm
    ) -> tuple[StoredKey, PrivateKey]:
        """The key that signs now, and its private half."""
        key_set = await self._set(app, algorithm)
        key = key_set.signer(algorithm, instant(self._clock()))
        assert key is not None, "_set makes the first key"
        if key.id not in key_set.opened:
            opened = self._open(key)
            if opened is None:
                raise Unavailable(reason="signing_key_sealed")
            key_set.opened[key.id] = opened[0]
        return key, key_set.opened[key.id]

    async def _set(self, app: RelyingParty | None, algorithm: TokenAlgorithm) -> _KeySet:
        """The set, which has a key of `algorithm`."""
        app_id = app.id if app else None
        key_set = self._sets.get(app_id)
        if key_set is None or not _has(key_set, algorithm):
            key_set = await self._read(app_id)
        if _has(key_set, algorithm):
            return key_set
        try:
            async with asyncio.timeout(remaining(_GENERATION_TIMEOUT)), self._generation:
                key_set = await self._read(app_id)
                if not _has(key_set, algorithm):
                    await self._keys.add_first(await self._new(app_id, algorithm))
                    key_set = await self._read(app_id)
        except TimeoutError:
            raise Unavailable(reason="signing_key_slow") from None
        return key_set

    async def _read(self, app_id: str | None) -> _KeySet:
        asked_at = self._sets.now()
        key_set = _KeySet(await self._keys.of(app_id))
        if key_set.keys:
            self._sets.put(app_id, key_set, asked_at)
        return key_set

    async def _new(self, app_id: str | None, algorithm: TokenAlgorithm) -> StoredKey:
        """A new key that signs from now on. The caller stores it."""
        if not self._seal:
            raise Unavailable(reason="no_secret_key")
        kid, private = self._mint.id(), await asyncio.to_thread(generate, algorithm)
        now = instant(self._clock())
        sealed = self._seal.close(private, kid=kid, scope=app_id or "", algorithm=algorithm)
        return StoredKey(
            kid, app_id, algorithm, 1, sealed, public_jwk(private, kid, algorithm), now, now
        )

    def _open(self, key: StoredKey) -> tuple[PrivateKey, int] | None:
        """The private key, and the number of the secret that opens it. None: no secret does."""
        try:
            return self._seal.open(key.sealed, kid=key.id, scope=key.scope, algorithm=key.algorithm)
        except SealBroken:
            return None


def _has(key_set: _KeySet, algorithm: TokenAlgorithm) -> bool:
    return any(key.algorithm == algorithm for key in key_set.keys)

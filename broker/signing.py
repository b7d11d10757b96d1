"""Signed tokens: which key signs, and which public keys a verifier trusts. For wire formats whose
backends check tokens offline.

**Sets.** Each app has a key set of its own. Wire formats whose key set names no app share one that
is the broker's (`app` None); there the claim `aud` keeps apps apart, so whoever verifies must check
it. In a set each algorithm has a line of keys, of which one signs.

**The first key** is made when it is first asked for, in a thread, one at a time. The store decides
whose it is, so any number of instances end with one.

**Rotation** never meets a verifier unprepared. Verifiers remember a key set for `JWKS_MAX_AGE`
seconds, the Cache-Control that dialects send with it. So the next key is published at once and
signs only when that time and `SKEW` have passed: by then nobody remembers a set without it. The key
before it stays published until the last token it signed has expired: `TOKEN_LIFE_LIMIT` (the
longest life that settings allow, so that it does not matter which settings the operator's command
line has) and `SKEW` after it signed last. Then it leaves the set, and the next rotation deletes it.
`SKEW` is for clocks that differ and for the second in which an instance still has the keys of
before.

**A leaked key.** With `now` the next key signs at once, and a verifier that does not look again for
a `kid` it does not know refuses tokens until it does. With `drop` as well the older keys leave the
set at once, and tokens they signed die with them: a forger gets nothing from a verifier that asks
again, but one that remembers the old set trusts it for up to `JWKS_MAX_AGE` more.

**Memory.** Keys are remembered as apps are (`broker.durable.remembered`), so a rotation is
effective on every instance within a second. What a key does follows from the time at which it is
used, not at which it was read. Signing costs a third of a millisecond on the loop (RSA; less
otherwise).

A key sealed under a secret that this process does not have is `Unavailable`; nothing is signed by
another key instead, and none is made anew: the operator has the secret, or says so by rotating.
`broker doctor` finds it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any, Literal

from broker.durable import instant
from broker.durable.remembered import News, Remembered
from broker.durable.signing_keys import SigningKeys, StoredKey
from broker.errors import InvalidSetting, Unavailable
from broker.model import RelyingParty, TokenAlgorithm
from broker.settings import TOKEN_LIFE_LIMIT
from broker.telemetry import remaining
from broker.tokens import Mint, SystemMint
from broker.tokens.signed import PrivateKey, Seal, SealBroken, generate, public_jwk, sign

JWKS_MAX_AGE = 600  # seconds
SKEW = 60  # seconds
PUBLISHED_AHEAD = JWKS_MAX_AGE + SKEW  # seconds
_MAKING = 5.0  # seconds that a caller waits for a first key, its turn included

State = Literal["signs", "next", "old", "gone"]


@dataclass(slots=True)
class _Set:
    """A key set as it was read, and the private keys opened since."""

    keys: list[StoredKey]
    opened: dict[str, PrivateKey] = field(default_factory=dict, repr=False)

    def signer(self, algorithm: TokenAlgorithm, now: datetime) -> StoredKey | None:
        """The newest key that may sign. Where none may yet, for the maker's clock is ahead of ours,
        the oldest; None: there is none.
        """
        line = [key for key in self.keys if key.algorithm == algorithm]
        return next(
            (key for key in reversed(line) if key.signs_from <= now), line[0] if line else None
        )

    def states(self, now: datetime) -> list[tuple[StoredKey, State]]:
        """Every key, with what it does."""
        signers = {key.algorithm: self.signer(key.algorithm, now) or key for key in self.keys}
        return [(key, _state(key, signers[key.algorithm], now)) for key in self.keys]


def _state(key: StoredKey, signer: StoredKey, now: datetime) -> State:
    if key is signer:
        return "signs"
    if key.retires_at is not None and key.retires_at <= now:
        return "gone"
    return "next" if key.generation > signer.generation else "old"


class Signing:
    """The verbs. `secret_keys` seal private keys (`broker.tokens.signed`): the first one seals, all
    of them open.
    """

    def __init__(
        self,
        keys: SigningKeys,
        secret_keys: Sequence[str],
        *,
        clock: Callable[[], float] = time.time,
        mint: Mint | None = None,
        cache_seconds: float = 0.9,
        news: News | None = None,
    ) -> None:
        self._keys = keys
        self._seal = Seal(secret_keys)
        self._clock = clock
        self._mint = mint or SystemMint()
        self._sets: Remembered[_Set] = Remembered(
            cache_seconds, clock, news, "signing_keys", lambda scope: scope or None
        )
        self._making = asyncio.Lock()

    async def sign(
        self, app: RelyingParty | None, algorithm: TokenAlgorithm, claims: Mapping[str, Any]
    ) -> str:
        """A JSON Web Token with exactly these claims, signed by the app's key (None: the broker's
        own). Makes the first key.

        Raises:
            UnknownApp: deleted meanwhile.
            Unavailable: the store; or `reason` is "no_secret_key", "signing_key_sealed" (under a
                secret that is not ours) or "signing_key_slow".
        """
        key_id, private = await self._signer(app, algorithm)
        return sign(claims, private, key_id, algorithm)

    async def ready(self, app: RelyingParty | None, algorithm: TokenAlgorithm) -> None:
        """Find out whether `sign` can, before something is taken that a failure would spend. Makes
        the first key.

        Raises:
            UnknownApp, Unavailable: as `sign`.
        """
        await self._signer(app, algorithm)

    async def key_set(
        self, app: RelyingParty | None, algorithm: TokenAlgorithm = "RS256"
    ) -> dict[str, list[Mapping[str, str]]]:
        """`{"keys": […]}` (RFC 7517 §5): what verifies the app's tokens (None: of the broker's own
        set), of every algorithm, the signing ones first. Makes the first key of `algorithm`, so
        that it is published before it signs.

        Raises:
            UnknownApp, Unavailable: as `sign`.
        """
        found = await self._set(app, algorithm)
        states = found.states(instant(self._clock()))
        shown = sorted((s != "signs", n) for n, (_, s) in enumerate(states) if s != "gone")
        return {"keys": [states[n][0].public for _, n in shown]}

    async def rotate(
        self,
        app: RelyingParty | None,
        algorithm: TokenAlgorithm,
        *,
        now: bool = False,
        drop: bool = False,
    ) -> list[tuple[StoredKey, State]]:
        """Make the next key of a line; it signs when every verifier can know it, or `now`. With
        `drop` the older keys leave at once. Where the line has none, make the first, which signs at
        once. Returns the set as `listed`.

        Raises:
            InvalidSetting: `drop` without `now`: nothing published would verify until the next key
                signs. UnknownApp, Unavailable.
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
        return await self.listed(app)

    async def listed(self, app: RelyingParty | None) -> list[tuple[StoredKey, State]]:
        """The keys of a set and what each does: it signs, is the next one, verifies what it signed
        (old), or has left (gone).
        """
        return _Set(await self._keys.of(app.id if app else None)).states(instant(self._clock()))

    async def seals(self) -> list[tuple[StoredKey, int | None]]:
        """Every key of every set that signs or will sign, and which secret opens it: 0 is the one
        that seals; None: none of ours.
        """
        found: dict[str, list[StoredKey]] = {}
        for key in await self._keys.all():
            found.setdefault(key.scope, []).append(key)
        now = instant(self._clock())
        states = [pair for keys in found.values() for pair in _Set(keys).states(now)]
        return [(key, self._opened_by(key)) for key, state in states if state in ("signs", "next")]

    async def reseal(self) -> tuple[int, int]:
        """Seal every key under the first secret; may be repeated, and run beside serving instances
        that have both secrets.

        Returns how many were sealed anew, and how many none of our secrets opens.
        """
        changed = lost = 0
        for key in await self._keys.all():
            try:
                private, number = self._open(key)
            except SealBroken:
                lost += 1
                continue
            if number:
                sealed = self._seal.close(
                    private, kid=key.id, scope=key.scope, algorithm=key.algorithm
                )
                changed += await self._keys.reseal(key, sealed)
        return changed, lost

    # -- below -------------------------------------------------------------------------------------

    async def _signer(
        self, app: RelyingParty | None, algorithm: TokenAlgorithm
    ) -> tuple[str, PrivateKey]:
        """The id of the key that signs now, and the key."""
        found = await self._set(app, algorithm)
        key = found.signer(algorithm, instant(self._clock()))
        assert key is not None, "the line was made"
        private = found.opened.get(key.id)
        if private is None:
            try:
                private, _ = self._open(key)
            except SealBroken:
                raise Unavailable(reason="signing_key_sealed") from None
            found.opened[key.id] = private
        return key.id, private

    async def _set(self, app: RelyingParty | None, algorithm: TokenAlgorithm) -> _Set:
        """The set, with a key of `algorithm` in it."""
        app_id = app.id if app else None
        found = self._sets.get(app_id)
        if found is None or not _has(found, algorithm):
            found = await self._read(app_id)
        if _has(found, algorithm):
            return found
        try:
            async with asyncio.timeout(remaining(_MAKING)), self._making:
                found = await self._read(app_id)
                if not _has(found, algorithm):
                    await self._keys.add_first(await self._new(app_id, algorithm))
                    found = await self._read(app_id)
        except TimeoutError:
            raise Unavailable(reason="signing_key_slow") from None
        return found

    async def _read(self, app_id: str | None) -> _Set:
        asked = self._sets.ask()
        found = _Set(await self._keys.of(app_id))
        if found.keys:
            self._sets.put(app_id, found, asked)
        return found

    async def _new(self, app_id: str | None, algorithm: TokenAlgorithm) -> StoredKey:
        """A key that signs from now on, not stored yet."""
        if not self._seal:
            raise Unavailable(reason="no_secret_key")
        kid, private = self._mint.id(), await asyncio.to_thread(generate, algorithm)
        now = instant(self._clock())
        sealed = self._seal.close(private, kid=kid, scope=app_id or "", algorithm=algorithm)
        return StoredKey(
            kid, app_id, algorithm, 1, sealed, public_jwk(private, kid, algorithm), now, now
        )

    def _open(self, key: StoredKey) -> tuple[PrivateKey, int]:
        return self._seal.open(key.sealed, kid=key.id, scope=key.scope, algorithm=key.algorithm)

    def _opened_by(self, key: StoredKey) -> int | None:
        try:
            return self._open(key)[1]
        except SealBroken:
            return None


def _has(found: _Set, algorithm: TokenAlgorithm) -> bool:
    return any(key.algorithm == algorithm for key in found.keys)

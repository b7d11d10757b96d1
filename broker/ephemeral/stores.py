"""Typed one-time stores: transactions, pending ceremonies, nonces and tickets.

Only digests are stored (`tokens.digest`, which hashes in the kind and, but for nonces, the app):

    {T}:t             a transaction; T is the digest of its id in base64url
    {T}:c             the pending ceremony of that transaction
    p:N               a pending ceremony of a user whom a keyed caller named; N is the digest of the
                      external id
    p:{app}:H         a pending ceremony without a transaction: H is the digest of its handle, or of
                      its challenge, which the value then lacks
    d:{app}           the open ceremonies of an app that its cap counts, by end of life
    n:H               a nonce
    s:H               a ticket for signals
    i:K               the answer to an idempotent open: K is the digest of API key and
                      Idempotency-Key
    f:T               a counter: refused finishes of a transaction; it outlives the transaction

**Ceremonies.** Opener and kind are part of the name of a ceremony (`tokens.ceremony_digest`); in
`{T}:c` they are compared by the script. So the finish of another dialect, or of another kind, takes
nothing. A transaction has one pending ceremony: a new begin replaces it, and the old handle finds
nothing. A handle carries T behind its secret; the digest of the whole handle is what a take must
prove. One script writes `{T}:c` while `{T}:t` lives and is of an expected kind. One script takes
`{T}:c` and reads `{T}:t`, whose content completes the ceremony (`BegunCeremony.pending`). The
transaction stays until it is taken, and its ceremony ends with it.

**Nonces.** The name of a nonce lacks the app, so that a nonce of another app is told apart
(`foreign`); it stays. A nonce is known for 10 minutes after it was taken or has ended. Its
content is sealed under a key derived from the nonce, which Redis lacks.

**Idempotent requests.** The tombstone of a nonce is the record of an idempotent redemption: it has
the digests of key and request, and the sealed content. An idempotent open has a record of its own,
which is no one-time value. The record is written after the transaction, by SET NX, so the answer of
the first of two concurrent requests is that of both. It is sealed under a key derived from API key
and Idempotency-Key, which Redis lacks.

An operator can compute: keys = open transactions + pending ceremonies + tickets + nonces of the
last 11 minutes + idempotent opens of the last minute + one set per app with open discoverable
ceremonies. A request without a key stores 6 KiB at most.
"""

from __future__ import annotations

import asyncio
from base64 import urlsafe_b64decode
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import Any, get_args

from broker.ephemeral.codec import DecodeError, decode, encode
from broker.ephemeral.one_time import (
    Answer,
    Envelope,
    Expected,
    FirstTake,
    Group,
    OneTimeStore,
    Replayed,
    Taken,
    Unknown,
)
from broker.ephemeral.one_time_scripts import TOLERANCE, TOMBSTONE
from broker.ephemeral.transport import Script, Transport
from broker.errors import IdempotencyConflict, TooManyRequests
from broker.model import (
    IDEMPOTENCY_LIFE,
    BegunCeremony,
    FinishKind,
    Idempotency,
    Opener,
    Pending,
    PendingAuthentication,
    PendingRegistration,
    Proof,
    Redeemable,
    Transaction,
    base64url,
    finish_kind_of,
    purpose_of,
)
from broker.telemetry import Metrics, context
from broker.tokens import FoundBy, ceremony_digest, digest
from broker.tokens.sealed import SealBroken, seal, unseal

_SECRET = len("pbh_") + 43  # characters of a handle before the transaction's digest
_HANDLE = _SECRET + 43

_FINISHES: tuple[FinishKind, ...] = (*get_args(Proof), "approve_second_factor")
_TO_LOOK_UP = "_to_look_up"  # kind of a transaction whose credentials must be queried

# KEYS: f:T. ARGV: life in ms.
_COUNT_REFUSAL = Script("""
local refusals = redis.call('INCR', KEYS[1])
redis.call('PEXPIRE', KEYS[1], ARGV[1])
return refusals
""")
_REFUSALS_LIFE = 600_000  # ms; no transaction lives longer


class Transactions:
    """Transactions. `name` is the digest of a transaction's id."""

    def __init__(self, store: OneTimeStore, transport: Transport) -> None:
        self._store = store
        self._transport = transport

    def put(self, transaction_id: str, transaction: Transaction) -> Awaitable[None]:
        """Put a transaction until `expires_at`."""
        kind = transaction.kind + (_TO_LOOK_UP if transaction.to_look_up else "")
        value = Envelope(kind, "", transaction.expires_at, encode(transaction))
        name = digest("transaction", transaction.app_id, transaction_id)
        return self._store.put("put_transaction", _transaction_key(name), value)

    async def peek(self, name: bytes) -> Transaction | Unknown:
        """A transaction, which stays."""
        key = _transaction_key(name)
        return await self._store.peek("peek_transaction", key, Transaction, Expected(()))

    def take(self, name: bytes) -> Awaitable[Answer[Transaction]]:
        """Take a transaction, with its pending ceremony."""
        keys = [_transaction_key(name), _begun_key(name)]
        return self._store.take("take_transaction", keys, Transaction, Expected(()))

    async def count_refusal(self, name: bytes) -> int:
        """Count a refused finish of a transaction; how many there were."""
        args = [_REFUSALS_LIFE]
        refusals = await self._transport.run("count_refusal", _COUNT_REFUSAL, [b"f:" + name], args)
        return int(refusals)

    async def refusals(self, name: bytes) -> int:
        """How many finishes of a transaction were refused, also where it has ended."""
        return int(await self._transport.ask("refusals", "GET", b"f:" + name) or 0)


class Ceremonies:
    """Pending ceremonies. `clock` gives seconds since the epoch; `openers` are all that there
    are.
    """

    def __init__(
        self,
        store: OneTimeStore,
        transport: Transport,
        clock: Callable[[], float],
        metrics: Metrics,
        openers: Collection[Opener],
    ) -> None:
        self._store = store
        self._transport = transport
        self._clock = clock
        self._openers = openers
        self._open: dict[str, tuple[float, int]] = {}  # by app: the last one's end, and how many
        self._abandoned = metrics.ceremonies_abandoned
        metrics.ceremonies_open.add(self._count_open)

    async def begin(
        self,
        app_id: str,
        name: bytes,
        opener: Opener,
        kinds: Sequence[FinishKind],
        secret: str,
        begun: BegunCeremony,
    ) -> tuple[str, Transaction] | Unknown:
        """Put the pending ceremony of the transaction of that name, in place of the earlier one.
        The new handle, made from `secret` (a minted token), and the transaction.

        A transaction of none of `kinds` keeps its earlier ceremony, as does one whose credentials
        must be queried (`Transaction.to_look_up`) while `begun.allowed` is None. The answer is
        `other_kind` then, with the transaction.
        """
        assert opener in self._openers, "a dialect declares its openers"
        handle = secret + base64url(name)
        queried = [] if begun.allowed is None else [kind + _TO_LOOK_UP for kind in kinds]
        proof = digest("handle", app_id, handle)
        purpose = "register" if kinds[0].startswith("register") else "authenticate"
        found = await self._store.put_beside(
            "begin",
            _begun_key(name),
            Envelope(purpose, opener, begun.begun_at + begun.life, proof + encode(begun)),
            _transaction_key(name),
            Transaction,
            Expected([*kinds, *queried]),
        )
        return found if isinstance(found, Unknown) else (handle, found)

    async def put(
        self, by: FoundBy, token: str, pending: Pending, *, opener: Opener, cap: int | None = None
    ) -> None:
        """Put a pending ceremony without a transaction, which the token finds: a minted handle, the
        challenge in base64url, or the external id of the user, whose earlier ceremony of this
        purpose and opener it replaces. `cap` is None for ceremonies that no cap counts.

        Raises:
            TooManyRequests: the app has `cap` open ceremonies that a cap counts.
        """
        assert opener in self._openers, "a dialect declares its openers"
        app_id, ends = pending.app_id, pending.expires_at
        kind = finish_kind_of(pending) if by == "challenge" else purpose_of(pending)
        if by == "challenge":
            pending = pending._replace(challenge=b"")
        key = _key(by, app_id, opener, kind, token)
        value = Envelope(kind, opener, ends, encode(pending))
        if cap is None:
            await self._store.put("put_pending", key, value)
            return
        group = Group(_cap_key(app_id), cap, int(ends * 1000), "cap")
        put = await self._store.put_counted("put_pending", key, value, [group])
        if put.wait:
            raise TooManyRequests(reason="discoverable_limit")
        self._open[app_id] = (ends, put.members)
        self._abandoned.add(put.ended)

    async def take(
        self, by: FoundBy, app_id: str, token: str, openers: Sequence[Opener], kind: FinishKind
    ) -> Answer[Pending]:
        """Take the pending ceremony of this kind that the token finds, if one of `openers` began
        it. `foreign`: the ceremony waits for another finish."""
        if by == "handle" and len(token) != _SECRET:
            return await self._take_begun(app_id, token, openers[0], kind)
        type_: Any = PendingRegistration if kind.startswith("register") else PendingAuthentication
        keys = [_key(by, app_id, opener, kind, token) for opener in openers]
        found: Answer[Pending]
        if by == "user":
            found = await self._store.take("take_pending", keys, type_, Expected((kind,)))
        else:
            found = await self._store.take_counted(
                "take_pending", _cap_key(app_id), keys, type_, Expected((kind,))
            )
        if isinstance(found, Taken) and by == "challenge":
            challenge = urlsafe_b64decode(token + "==")  # more than enough
            return Taken(found.value._replace(challenge=challenge))
        if found == Unknown("unknown") and await self._waits(by, app_id, token, kind):
            return Unknown("foreign")
        return found

    def _count_open(self) -> float:
        now = self._clock()
        self._open = {app: known for app, known in self._open.items() if known[0] > now}
        return sum(count for _, count in self._open.values())

    async def _take_begun(
        self, app_id: str, handle: str, opener: Opener, kind: FinishKind
    ) -> Answer[Pending]:
        if len(handle) != _HANDLE:
            return Unknown("unknown")
        name = urlsafe_b64decode(handle[_SECRET:] + "=")
        found = await self._store.take_beside(
            "take_pending",
            _begun_key(name),
            _transaction_key(name),
            tuple[BegunCeremony, Transaction],
            Expected((kind,), opener, digest("handle", app_id, handle)),
        )
        if not isinstance(found, Taken):
            return found if isinstance(found, Unknown) else Unknown("unknown")
        begun, transaction = found.value
        pending = begun.pending(name, transaction)
        # The life that the caller asked for is not known to the script of the begin.
        if pending.expires_at + TOLERANCE / 1000 <= self._clock():
            return Unknown("expired")
        return Taken(pending)

    async def _waits(self, by: FoundBy, app_id: str, token: str, kind: FinishKind) -> bool:
        """True if the ceremony waits for another finish than the one that asked. A user may have a
        ceremony of each purpose, so their other one is not meant.
        """
        kinds = (kind,) if by == "user" else _FINISHES
        keys = [_key(by, app_id, o, k, token) for o in self._openers for k in kinds]
        # Keys with a tag share a slot, others don't.
        commands = [[key] for key in keys] if by == "user" else [keys]
        asked = [self._transport.ask("find_pending", "EXISTS", *some) for some in commands]
        return any(await asyncio.gather(*asked))


class Nonces:
    """Nonces. `clock` gives seconds since the epoch."""

    def __init__(self, store: OneTimeStore, clock: Callable[[], float]) -> None:
        self._store = store
        self._clock = clock

    def put(self, app_id: str, nonce: str, redeemable: Redeemable) -> Awaitable[None]:
        """Put what a nonce stands for until `expires_at`."""
        content = encode(seal(nonce, encode(redeemable)))
        value = Envelope("nonce", app_id, redeemable.expires_at, content)
        key = b"n:" + digest("nonce", nonce)
        return self._store.put("put_nonce", key, value, grace=TOMBSTONE)

    async def take(
        self, app_id: str, nonce: str, idempotency: Idempotency | None = None
    ) -> Answer[Redeemable]:
        """Take what a nonce stands for; again for the same idempotent request.

        Raises:
            IdempotencyConflict: an idempotent request with this key, and another body, took it.
        """
        now = context()
        key, request = (
            (_idempotency_name(idempotency), idempotency.request) if idempotency else (b"", b"")
        )
        found = await self._store.take(
            "take_nonce",
            [b"n:" + digest("nonce", nonce)],
            bytes,
            Expected(("nonce",), app_id, grace=TOMBSTONE),
            first=FirstTake(self._clock(), now.request_id, now.actor, key, request),
        )
        if isinstance(found, Unknown):
            return found
        try:
            redeemable = decode(Redeemable, unseal(nonce, found.value))
        except (DecodeError, SealBroken):
            return Unknown("unreadable")
        if isinstance(found, Replayed):
            return Replayed(found.first, redeemable)
        return Taken(redeemable, found.repeated)


class OpenAnswers:
    """Answers to idempotent opens: transaction ids."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    async def find(self, idempotency: Idempotency) -> str | None:
        """The answer to an earlier request with this key.

        Raises:
            IdempotencyConflict: to another request.
        """
        found = await self._transport.ask("find_open", "GET", _open_key(idempotency))
        return _opened(idempotency, found)

    async def keep(self, idempotency: Idempotency, transaction_id: str) -> str:
        """Keep the answer, unless there is one by now: the answer that is kept.

        Raises:
            IdempotencyConflict: that is the answer to another request.
        """
        key, life = _open_key(idempotency), IDEMPOTENCY_LIFE * 1000
        value = idempotency.request + seal(idempotency.key, transaction_id.encode())
        ask = self._transport.ask
        found = await ask("keep_open", "SET", key, value, "PX", life, "NX", "GET")
        return _opened(idempotency, found) or transaction_id


class Tickets:
    """Tickets for signals."""

    def __init__(self, store: OneTimeStore) -> None:
        self._store = store

    def put(self, app_id: str, ticket: str, value: object, ends: float) -> Awaitable[None]:
        """Put what a ticket stands for, a JSON value, until `ends`."""
        key = b"s:" + digest("ticket", app_id, ticket)
        return self._store.put("put_ticket", key, Envelope("ticket", "", ends, encode(value)))

    def take(self, app_id: str, ticket: str) -> Awaitable[Answer[Any]]:
        """Take what a ticket stands for."""
        keys = [b"s:" + digest("ticket", app_id, ticket)]
        type_: Any = Any
        return self._store.take("take_ticket", keys, type_, Expected(("ticket",)))


def _transaction_key(name: bytes) -> bytes:
    return b"{%b}:t" % base64url(name).encode()


def _begun_key(name: bytes) -> bytes:
    return b"{%b}:c" % base64url(name).encode()


def _idempotency_name(idempotency: Idempotency) -> bytes:
    return digest("idempotency", idempotency.key)


def _open_key(idempotency: Idempotency) -> bytes:
    return b"i:" + _idempotency_name(idempotency)


def _opened(idempotency: Idempotency, found: bytes | None) -> str | None:
    if found is None:
        return None
    size = len(idempotency.request)
    if found[:size] != idempotency.request:
        raise IdempotencyConflict
    return unseal(idempotency.key, found[size:]).decode()


def _key(by: FoundBy, app_id: str, opener: Opener, kind: FinishKind, token: str) -> bytes:
    name = ceremony_digest(by, app_id, opener, kind, token)
    return b"p:" + name if by == "user" else b"p:{%b}:%b" % (app_id.encode(), name)


def _cap_key(app_id: str) -> bytes:
    return b"d:{%b}" % app_id.encode()

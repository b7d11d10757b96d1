"""One-time store: the envelope of a one-time value, and the puts, peeks and takes of values.

**Taking is validating.** A take is one atomic script: it judges the value and spends it. Of any
number of takes, on any number of instances, one gets the value. The answer is `Taken`, `Replayed`
or `Unknown`. `Unknown.reason` is for operators; callers get one answer for all reasons. The scripts
stand in `broker.ephemeral.one_time_scripts`.

**Envelope.** A value in Redis is a header in ASCII and a payload:

    version   one byte; a value of another version is unknown
    term      the term in which the value was put: 16 hex digits
    kind      what may take it: a purpose, "nonce", "ticket", …
    opener    the opener of a ceremony, the app of a nonce, else empty
    end       end of life in ms by the broker's clock
    state     `l` (live) or `s` (spent)
    payload   where the taker must prove something, 32 bytes of digest; then msgpack

**Terms.** Redis replicates asynchronously, so a value that was taken may exist elsewhere: on a
replica that was promoted, on a primary that was isolated, in a snapshot. A term is the `role` and
the first 16 digits of the `master_replid` of a primary. A server draws the id at random whenever it
begins to be primary: at its start, at a promotion, when its first replica attaches, when its
backlog was freed. No id returns. A put stamps the value with the term. Each script that spends or
peeks compares that term with its server's, in the same atomic step: `term_over` if they differ.

- *Invariant.* All successful takes of a value happen in one term, so in the memory of one process,
  which goes forward. The first take there ends the value.
- *It rests on* the random id, the atomic script, and a server that draws a new id before it serves
  data that is not its own latest. Replication, persistence and clocks don't matter. `run_id` would
  not do: a server that is demoted and promoted again keeps it.
- *Stale stamps.* A plain put stamps what its connection knew at most a second ago
  (`Commands.term`). A stale stamp ends the value, and can't duplicate it. A put that meets MOVED
  is repeated, because its stamp is the former owner's.
- *Not covered.* Old data written into a living primary: `DEBUG RELOAD NOSAVE`, `RESTORE`, the
  restored memory of a virtual machine, and `MIGRATE` of a left-over copy. A `MIGRATE` that timed
  out leaves a copy. If its slot moves back within the value's life, the copy is in its term again.
  The tombstone of a nonce refuses it, unless `REPLACE` is given. Other kinds leave nothing.
- *Tombstones* of any term are believed. A lost one makes a second redemption `term_over`.
- *With a ledger* (`BROKER_ONE_TIME=postgres`) values carry its stamp instead of a term. A script
  takes the value, then the ledger decides: `term_over` if it has the value. Guesses are counted in
  Redis alone, so a failover may give some back.
- *Cost*: 15 to 17 us of the server's CPU a take, against 4 us without the comparison.

**Time.** Redis's TTL decides about the life. `end` guards against a restored snapshot, with
`TOLERANCE` for skew between the clocks of the broker's instances. A value with a `grace` stays that
much longer, in which a take says that it has expired.

**Spent values.** A spent value is deleted, or leaves a tombstone in place: an envelope with state
`s` whose payload is the msgpack array of the first take and of the value's content. The script
deletes before it writes the tombstone, so that a full server still redeems.

**Groups.** A put may count the value in groups: sorted sets of keys, scored by the end in ms. A
group that is full refuses the put, or loses its oldest values. The set and its values share a hash
tag, so a script may delete the keys that it reads there.

**Nothing one-time is sent twice.** redis-py retries by default, and a repeated take would answer
"unknown" for a value that it took itself. Every client here has `Retry(NoBackoff(), 0)`. A lost
reply is `Unavailable`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Generic, Literal, NamedTuple, Protocol, TypeAlias, TypeVar

from broker.ephemeral import one_time_scripts as scripts
from broker.ephemeral.codec import DecodeError, decode, encode
from broker.ephemeral.connection import term_of
from broker.ephemeral.transport import Script, Transport
from broker.errors import IdempotencyConflict
from broker.model import IDEMPOTENCY_LIFE

T = TypeVar("T")

_CONNECTIONS = 3  # that must read the same term

# `foreign`: of another opener or app. `term_over`: put in another term. `wrong`: the guess.
# `spent`: the guesses are used up.
Reason = Literal[
    "unknown", "expired", "foreign", "term_over", "other_kind", "wrong", "spent", "unreadable"
]
Action = Literal["refuse", "cap", "evict", "replace"]


class Envelope(NamedTuple):
    """A live one-time value. `ends` in seconds since the epoch."""

    kind: str
    opener: str
    ends: float
    payload: bytes

    def serialize(self, term: bytes = b"") -> bytes:
        """The value as Redis holds it. Without a term, a script stamps it."""
        kind, opener, ends, payload = self
        return b"%b%b|%b|%b|%d|l|%b" % (
            scripts.VERSION,
            term,
            kind.encode(),
            opener.encode(),
            int(ends * 1000),
            payload,
        )


class Expected(NamedTuple):
    """Expectation of a take: the value's kind (one of these, none for any), its opener ("" for
    any), and the digest that its payload begins with. `grace` in ms.
    """

    kinds: Sequence[str]
    opener: str = ""
    proof: bytes = b""
    grace: int = 0


class Group(NamedTuple):
    """A sorted set of keys that a put joins with `score` (ms since the epoch). When it has `limit`
    members: `refuse` the put, or `evict` the oldest values; `replace` deletes all others. `cap`
    refuses too, and keeps members that have ended for 10 minutes, so that the next put counts them.
    """

    key: bytes
    limit: int
    score: int
    action: Action


class Counted(NamedTuple):
    """A put that groups count. `wait`: the ms after which a full group may take the value; 0: it
    was put. Then `members` are the live ones of the first group, and `ended` those that had ended
    since the put before.
    """

    wait: int
    members: int
    ended: int


class FirstTake(NamedTuple):
    """The take that spent a value: time, request and actor (`Context.actor`). Of an idempotent
    request also the digests of its key and of the request, else b"".
    """

    at: float
    request_id: str
    actor: str
    idempotency_key: bytes = b""
    request: bytes = b""

    def repeats(self, earlier: FirstTake) -> bool:
        """True if both are one idempotent request, within `IDEMPOTENCY_LIFE`.

        Raises:
            IdempotencyConflict: the same key, and another request.
        """
        same = self.idempotency_key and self.idempotency_key == earlier.idempotency_key
        if not same or self.at - earlier.at >= IDEMPOTENCY_LIFE:
            return False
        if self.request != earlier.request:
            raise IdempotencyConflict
        return True


class Taken(NamedTuple, Generic[T]):
    """The value, which is spent now. `repeated`: the same idempotent request took it before."""

    value: T
    repeated: bool = False


class Replayed(NamedTuple, Generic[T]):
    """The value was spent before, by this take."""

    first: FirstTake
    value: T


class Unknown(NamedTuple):
    """No such value for this caller. `value` is there where the reason is `other_kind` or
    `wrong`.
    """

    reason: Reason
    value: Any = None


TERM_OVER = Unknown("term_over")

Answer: TypeAlias = Taken[T] | Replayed[T] | Unknown


class Ledger(Protocol):
    """Where the mode `postgres` records which values are spent (`broker.durable.ledger`)."""

    async def stamp(self) -> str:
        """Stamp of values in place of a term: 16 hex digits."""
        ...

    async def spend(self, ends: float, digest: bytes, claim: bytes) -> bool:
        """Spend a value that ends at `ends`, in seconds since the epoch. False: it was spent, and
        not with this claim.
        """
        ...


class OneTimeStore:
    """Puts, peeks and takes of envelopes. `clock` gives seconds since the epoch. Every method
    raises `Unavailable`; its `operation` names it in metrics and the log.
    """

    def __init__(
        self, transport: Transport, clock: Callable[[], float], ledger: Ledger | None
    ) -> None:
        self._transport = transport
        self._clock = clock
        self._ledger = ledger

    async def put(self, operation: str, key: bytes, value: Envelope, *, grace: int = 0) -> None:
        """Put a value, in place of an earlier one."""
        for _ in range(2):
            moves = self._transport.moves
            if self._ledger is None:
                term = await self._transport.term(operation, key)
            else:
                term = (await self._ledger.stamp()).encode()
            life = self._life(value.ends) + grace
            await self._transport.ask(operation, "SET", key, value.serialize(term), "PX", life)
            if self._transport.moves == moves:
                return
            # The slot has another owner, so the stamp may be the former owner's.

    async def put_counted(
        self,
        operation: str,
        key: bytes,
        value: Envelope,
        groups: Sequence[Group],
        *,
        grace: int = 0,
    ) -> Counted:
        """Put a value that groups count, unless a full one refuses it."""
        args = [value.serialize(), self._life(value.ends) + grace, int(self._clock() * 1000)]
        for group in groups:
            args += group[1:]
        args.append(await self._stamp())
        keys = [key, *[group.key for group in groups]]
        return Counted(*await self._transport.run(operation, scripts.PUT, keys, args))

    async def put_beside(
        self,
        operation: str,
        key: bytes,
        value: Envelope,
        beside: bytes,
        type_: type[T],
        expected: Expected,
    ) -> T | Unknown:
        """Put a value while the one `beside` lives and is as expected: the latter's content."""
        more = (value.serialize(), self._life(value.ends))
        keys = [beside, key]
        return _left(await self._run(operation, scripts.PUT_BESIDE, keys, type_, expected, *more))

    async def peek(
        self, operation: str, key: bytes, type_: type[T], expected: Expected, *, skip: int = 0
    ) -> T | Unknown:
        """A value, which stays. `skip`: bytes of digest before the content."""
        return _left(await self._run(operation, scripts.PEEK, [key], type_, expected, skip))

    def take(
        self,
        operation: str,
        keys: Sequence[bytes],
        type_: type[T],
        expected: Expected,
        *,
        first: FirstTake | None = None,
    ) -> Awaitable[Answer[T]]:
        """Take the value under the first key; the other keys are deleted with it. `first` describes
        this take in a tombstone; None leaves none. A value with a proof leaves none. A take that
        repeats the first one (`FirstTake.repeats`) gets the value again.
        """
        tombstone = b"\x92" + encode(first) if first else b""  # an array of two
        return self._run(operation, scripts.TAKE, keys, type_, expected, tombstone, first=first)

    def take_beside(
        self, operation: str, key: bytes, beside: bytes, type_: type[T], expected: Expected
    ) -> Awaitable[Answer[T]]:
        """Take a value that was put beside another one: the contents of both."""
        return self._run(operation, scripts.TAKE_BESIDE, [key, beside], type_, expected)

    def take_counted(
        self,
        operation: str,
        group: bytes,
        keys: Sequence[bytes],
        type_: type[T],
        expected: Expected,
    ) -> Awaitable[Answer[T]]:
        """Take the value under the first key that has one, out of its group too."""
        return self._run(operation, scripts.TAKE_COUNTED, [group, *keys], type_, expected, b"")

    def guess(
        self, operation: str, key: bytes, type_: type[T], expected: Expected, guess: bytes
    ) -> Awaitable[Answer[T]]:
        """Take a value if the guess (a digest) is right, else count it."""
        return self._run(operation, scripts.GUESS, [key], type_, expected, guess)

    async def is_term_readable(self) -> bool:
        """True if several connections read one term of each server, in a script and outside.

        A proxy may send connections to several servers, and an access control list may refuse INFO.
        """
        survey = self._transport.survey
        evals = await survey("term", "EVAL", scripts.READ_TERM, 0, "", connections=_CONNECTIONS)
        infos = await survey("term", "INFO", "replication", connections=_CONNECTIONS)
        return bool(evals and infos) and all(
            read[0] and {*read, *map(term_of, told)} == {read[0]}
            for read, told in zip(evals or (), infos or (), strict=False)
        )

    def drop(self, operation: str, key: bytes) -> Awaitable[int]:
        """Delete a value: how many were there."""
        return self._transport.ask(operation, "DEL", key)

    async def _stamp(self) -> str:
        """The last argument of a script."""
        return "" if self._ledger is None else await self._ledger.stamp()

    def _life(self, ends: float) -> int:
        return max(1, int((ends - self._clock()) * 1000))

    async def _run(
        self,
        operation: str,
        script: Script,
        keys: Sequence[bytes],
        type_: type[T],
        expected: Expected,
        *more: Any,
        first: FirstTake | None = None,
    ) -> Answer[T]:
        """Run a script, and say what its reply means."""
        kinds, opener, proof, grace = expected
        among = f"|{'|'.join(kinds)}|" if kinds else ""
        args = [int(self._clock() * 1000), grace, among, opener, proof, *more]
        args.append(await self._stamp())
        verdict, *rest = await self._transport.run(operation, script, keys, args)
        payload, *spent = rest or [b""]
        try:
            if verdict == b"replayed":
                pair: Any = tuple[FirstTake, type_]  # type: ignore[valid-type]
                earlier, content = decode(pair, payload)
                if first and first.repeats(earlier) and await self._decide(first, *spent):
                    return Taken(content, repeated=True)
                return Replayed(earlier, content)
            value = decode(type_, payload) if rest else None
        except DecodeError as fault:
            self._transport.tell(operation, fault)
            return Unknown("unreadable")
        if verdict == b"live" and value is not None:
            if spent and not await self._decide(first, *spent):
                return TERM_OVER
            return Taken(value)
        if verdict == b"term_over":
            self._transport.forget_terms()
        return Unknown(verdict.decode(), value)

    async def _decide(self, first: FirstTake | None, key: bytes, ends: bytes) -> bool:
        """True without a ledger, or if it lets this take spend the value. A tombstone alone proves
        no take there."""
        if self._ledger is None:
            return True
        claim = b""
        if first and first.idempotency_key:
            claim = _digest(key, ends, first.idempotency_key, first.request)
        return await self._ledger.spend(int(ends) / 1000, _digest(key, ends), claim)


def _digest(key: bytes, ends: bytes, *claim: bytes) -> bytes:
    """Name of a value in the ledger: the same in each copy of the value. With `claim`, also of the
    request that took it.

    Values that follow each other under one key have ends of their own. The payload would not do:
    guesses change it.
    """
    return hashlib.sha256(b"|".join((key, ends, *claim))).digest()


def _left(answer: Answer[T]) -> T | Unknown:
    """The answer about a value that stays."""
    if isinstance(answer, Unknown):
        return answer
    return Unknown("unknown") if isinstance(answer, Replayed) else answer.value

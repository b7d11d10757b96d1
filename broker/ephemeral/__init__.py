"""One-time values with a life, on Redis: put, peek, take.

**Taking is validating.** A value is there or it is not; `take` reads and deletes in one command, so
of any number of callers on any number of instances one gets it. Nothing here answers "is it
valid?".

**Names.** Only digests are stored (`tokens.digest`, which hashes in the kind and the app), the 32
bytes of one as they are. The digest of a pending ceremony also takes in its opener and its kind
(`tokens.ceremony_digest`): a finish of another dialect, or of another kind of ceremony, finds
nothing and takes nothing.

    t:T               a transaction and, once begun, its pending ceremony with the digest of the
                      handle that may take it
    p:N               a pending ceremony of a user whom a keyed caller named; N is the digest of the
                      external id
    p:{app}:H         a pending ceremony without a transaction: H is the digest of its handle, or of
                      its challenge, which the record then lacks: whoever reads it here can't make
                      an answer
    d:{app}           the open ones of an app, by end of life: what the cap counts
    f:T               how many finishes of a transaction were refused; it outlives the transaction
    n:H               what a nonce stands for
    s:H               what a ticket for signals stands for
    ready             nothing, for a second: what `check` writes
    m:, o:, w:        mail codes: see `broker.ephemeral.mailbox`

A transaction has one place for a pending ceremony, so a new begin replaces the old one by writing
over it, and the old handle finds nothing. One script reads the transaction and writes the ceremony,
so begin costs one round trip; what the ceremony takes from the transaction is worked out when both
are taken (`BegunCeremony`). A handle carries T behind its secret, which is how finish finds `t:T`
from the handle alone; the script compares the secret's digest and leaves the ceremony alone if it
is another's. The transaction stays until it is taken by itself. A server that is full refuses that
script as a whole, for it writes what is left: nothing is taken then. `peek` is for transactions
only.

The braces keep what must change together in one slot of a cluster. No cap counts a user's ceremony:
a key opened it; it replaces what was there. An external id is no secret, but no handle leads to its
ceremony, for a transaction's keys begin with another letter.

**Time.** Every record carries the end of its life by the server's clock and is also given to Redis
with a TTL; a record past its end is never returned, even if a restored snapshot brings it back.

**Nothing one-time is sent twice.** redis-py retries by default, and a repeated GETDEL answers
"nothing there": the value would be burnt and its owner told it was never valid. Every client here
has `Retry(NoBackoff(), 0)`. A lost reply is `Unavailable`. A connection whose reply was not awaited
to its end is closed, so nobody reads another's answer.

An operator can compute: keys = open transactions + pending ceremonies without one + unredeemed
nonces and tickets + one set per app with open discoverable ceremonies; about half a kB each. A
request without a key stores 6 KiB at most, which a test measures on every route.
"""

from __future__ import annotations

import asyncio
import time
from base64 import urlsafe_b64decode
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar, get_args

import orjson

from broker.ephemeral.codec import (
    dump_beginning,
    dump_pending,
    dump_redeemable,
    dump_transaction,
    head_of,
    load_beginning,
    load_pending,
    load_redeemable,
    load_transaction,
    without_ceremony,
)
from broker.ephemeral.faults import Faults
from broker.ephemeral.transport import DOWN, Commands, NoScriptError, Script, connect
from broker.errors import TooManyCeremonies, Unavailable
from broker.model import (
    BegunCeremony,
    FinishKind,
    Opener,
    Pending,
    Proof,
    Purpose,
    Redeemable,
    Transaction,
    base64url,
    finish_kind_of,
    purpose_of,
)
from broker.telemetry import Log, Metrics, remaining
from broker.tokens import FoundBy, ceremony_digest, digest

__all__ = ["Ephemeral", "connect"]

_SECRET = len("pbh_") + 43  # characters of a handle before the transaction's digest
_HANDLE = _SECRET + 43

_PURPOSES: tuple[Purpose, ...] = get_args(Purpose)
_KINDS: tuple[FinishKind, ...] = (*get_args(Proof), "approve_second_factor")

# What a transaction's value (`broker.ephemeral.codec`) has behind its mark and its pending
# ceremony.
_REST = """
local function rest(v)
  if string.byte(v) == 43 then
    return string.sub(v, 36 + 256 * string.byte(v, 34) + string.byte(v, 35))
  end
  return string.sub(v, 2)
end
"""

# KEYS: t:T. ARGV: how a transaction begins that this ceremony may belong to; the ceremony with what
# stands before it. Another transaction is only read.
_BEGIN = Script(
    _REST
    + """
local v = redis.call('GET', KEYS[1])
if not v then
  return false
end
local opened = rest(v)
if string.sub(opened, 1, #ARGV[1]) == ARGV[1] then
  redis.call('SET', KEYS[1], ARGV[2] .. opened, 'KEEPTTL')
end
return opened
"""
)

# KEYS: t:T. ARGV: digest of the handle. The pending ceremony, if this is the handle that may take
# it, and the transaction, which stays.
_TAKE_BOUND = Script(
    _REST
    + """
local v = redis.call('GET', KEYS[1])
if v and string.sub(v, 1, 33) == '+' .. ARGV[1] then
  local opened = rest(v)
  redis.call('SET', KEYS[1], '-' .. opened, 'KEEPTTL')
  return {string.sub(v, 36, #v - #opened), opened}
end
return false
"""
)

# KEYS: p:{app}:H, d:{app}. ARGV: record, life in ms, now in ms, end in ms, cap, member. SET is the
# first write: a full server refuses it, while it lets a script that has begun to write go on past
# its limit.
_PUT_OPEN = Script("""
if redis.call('ZCOUNT', KEYS[2], '(' .. ARGV[3], '+inf') >= tonumber(ARGV[5]) then
  return 0
end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', ARGV[3])
redis.call('ZADD', KEYS[2], ARGV[4], ARGV[6])
redis.call('PEXPIREAT', KEYS[2], ARGV[4], 'GT')
redis.call('PEXPIREAT', KEYS[2], ARGV[4], 'NX')
return 1
""")

# KEYS: d:{app}, then p:{app}:H of each name that the ceremony may have. ARGV: the members.
_TAKE_OPEN = Script("""
for i, member in ipairs(ARGV) do
  local v = redis.call('GETDEL', KEYS[i + 1])
  if v then
    redis.call('ZREM', KEYS[1], member)
    return v
  end
end
return false
""")

# KEYS: f:T. ARGV: life in ms.
_COUNT_REFUSAL = Script("""
local refusals = redis.call('INCR', KEYS[1])
redis.call('PEXPIRE', KEYS[1], ARGV[1])
return refusals
""")
_REFUSALS_LIFE = 600_000  # ms; no transaction lives longer


Ends = TypeVar("Ends", Transaction, Redeemable)


class Ephemeral:
    """The ephemeral store. `clock` gives seconds since the epoch; `timeout` in seconds limits one
    wait.
    """

    def __init__(
        self,
        commands: Commands,
        *,
        timeout: float,
        metrics: Metrics,
        log: Log,
        clock: Callable[[], float],
    ) -> None:
        self._commands = commands
        self._timeout = timeout
        self._metrics = metrics
        self._faults = Faults(metrics, log, time.monotonic)
        self._clock = clock

    async def close(self) -> None:
        """Close every connection."""
        await self._commands.close()

    def _ask(self, operation: str, *command: Any) -> Awaitable[Any]:
        """The reply to one command, within the limit.

        Raises:
            Unavailable: the server is down, slow, full, or refuses to write; or its reply was lost.
        """
        reply = self._commands.ask(*command, limit=remaining(self._timeout))
        return self._watched(operation, reply)

    async def _watched(self, operation: str, reply: Awaitable[Any]) -> Any:
        began = time.perf_counter()
        try:
            return await reply
        except NoScriptError:
            raise
        except DOWN as fault:
            self._faults.tell(operation, fault)
            raise Unavailable(reason="redis") from fault
        finally:
            self._metrics.store_seconds.observe(time.perf_counter() - began, "redis", operation)

    async def run(
        self, operation: str, script: Script, *, keys: list[bytes], args: list[Any]
    ) -> Any:
        """Run a Lua script whose keys share a hash tag: atomic, and one round trip once the server
        has it.

        Raises:
            Unavailable: see `_ask`.
        """
        try:
            return await self._ask(operation, "EVALSHA", script.sha1, len(keys), *keys, *args)
        except NoScriptError:  # nothing was run
            return await self._ask(operation, "EVAL", script.text, len(keys), *keys, *args)

    async def check(self) -> None:
        """Raise `Unavailable` unless the server, or every master of a cluster, takes a write: one
        that is full, or a replica, answers PING and serves nobody."""
        await self._watched("check", self._commands.check(limit=remaining(self._timeout)))

    async def facts(self) -> dict[str, Any]:
        """For `broker doctor`: version, seconds since the epoch by the server's clock, eviction
        policy.
        """
        server = _info(await self._ask("facts", "INFO", b"server"))
        memory = _info(await self._ask("facts", "INFO", b"memory"))
        now = await self._ask("facts", "TIME")
        return {
            "version": server.get("valkey_version") or server["redis_version"],
            "clock": int(now[0]) + int(now[1]) / 1e6,
            "eviction": memory.get("maxmemory_policy", "noeviction"),
        }

    # -- transactions ------------------------------------------------------------------------------

    def put_transaction(self, transaction_id: str, transaction: Transaction) -> Awaitable[None]:
        """Store a transaction until `expires_at`."""
        name = digest("transaction", transaction.app_id, transaction_id)
        return self._put(
            "put_transaction", b"t:" + name, dump_transaction(transaction), transaction.expires_at
        )

    async def peek_transaction(
        self, app_id: str, transaction_id: str
    ) -> tuple[bytes, Transaction] | None:
        """A transaction and the digest of its id, left where it is."""
        name = digest("transaction", app_id, transaction_id)
        stored = await self._ask("peek_transaction", "GET", b"t:" + name)
        if stored is None:
            return None
        found = self._living(load_transaction(app_id, without_ceremony(stored)))
        return (name, found) if found else None

    async def begin(
        self,
        app_id: str,
        transaction_id: str,
        opener: Opener,
        purpose: Purpose,
        secret: str,
        beginning: BegunCeremony,
    ) -> tuple[str, bytes, Transaction] | None:
        """Begin a ceremony of a transaction: replaces its pending one. The new handle, made from
        `secret` (a minted token), the digest of the transaction's id, and the transaction. A
        transaction of another purpose is left as it is, as is one whose passkeys are to be looked
        up (`Transaction.to_look_up`) while `allowed` is None: the caller sees it, and the handle
        finds nothing."""
        name = digest("transaction", app_id, transaction_id)
        handle = secret + base64url(name)
        opened = await self.run(
            "begin",
            _BEGIN,
            keys=[b"t:" + name],
            args=[
                head_of(purpose, beginning),
                dump_beginning(
                    ceremony_digest("handle", app_id, opener, purpose, handle), beginning
                ),
            ],
        )
        found = self._living(load_transaction(app_id, opened)) if opened else None
        return (handle, name, found) if found else None

    async def take_transaction(self, name: bytes) -> bool:
        """Take the transaction whose id has this digest; whether it was there. Who asks has taken
        its pending ceremony, and so has all that it says, and knows that it has not ended."""
        return bool(await self._ask("take_transaction", "DEL", b"t:" + name))

    async def count_refusal(self, name: bytes) -> int:
        """Count a refused finish of the transaction whose id has this digest; how many there
        were.
        """
        keys = [b"f:" + name]
        return int(
            await self.run("count_refusal", _COUNT_REFUSAL, keys=keys, args=[_REFUSALS_LIFE])
        )

    async def refusals(self, app_id: str, transaction_id: str) -> int:
        """How many finishes of a transaction were refused, also where it has ended."""
        name = digest("transaction", app_id, transaction_id)
        return int(await self._ask("refusals", "GET", b"f:" + name) or 0)

    # -- pending ceremonies ------------------------------------------------------------------------

    async def put_pending(self, secret: str, pending: Pending, *, opener: Opener, cap: int) -> None:
        """Store a pending ceremony that has no transaction; `secret`, a minted token, is its
        handle.

        Raises:
            TooManyCeremonies: the app has `cap` open ceremonies without a transaction. Counted in
                the same round trip.
        """
        name = ceremony_digest("handle", pending.app_id, opener, purpose_of(pending), secret)
        await self._put_open_pending(name, pending, cap)

    async def put_pending_by_challenge(
        self, pending: Pending, *, opener: Opener, cap: int | None
    ) -> None:
        """Store a pending ceremony that its challenge finds. `cap` is None for those that no cap
        counts.

        Raises:
            TooManyCeremonies: see `put_pending`.
        """
        challenge = base64url(pending.challenge)
        name = ceremony_digest(
            "challenge", pending.app_id, opener, finish_kind_of(pending), challenge
        )
        pending = pending._replace(challenge=b"")
        if cap is not None:
            await self._put_open_pending(name, pending, cap)
        else:
            key = _open_key(pending.app_id, name)
            await self._put("put_pending", key, dump_pending(pending), pending.expires_at)

    async def _put_open_pending(self, name: bytes, pending: Pending, cap: int) -> None:
        now = int(self._clock() * 1000)
        end = int(pending.expires_at * 1000)
        stored = await self.run(
            "put_pending",
            _PUT_OPEN,
            keys=[_open_key(pending.app_id, name), _cap_key(pending.app_id)],
            args=[dump_pending(pending), max(1, end - now), now, end, cap, name],
        )
        if not stored:
            raise TooManyCeremonies(reason="discoverable_limit")

    async def take_pending(
        self, app_id: str, handle: str, opener: Opener, purpose: Purpose
    ) -> Pending | None:
        """Take the pending ceremony that `handle` finds, with a transaction or without one."""
        name = ceremony_digest("handle", app_id, opener, purpose, handle)
        if len(handle) == _SECRET:
            return await self._take_open_pending(app_id, name)
        if len(handle) != _HANDLE:
            return None
        place = _transaction_in(handle)
        found = await self.run("take_pending", _TAKE_BOUND, keys=[b"t:" + place], args=[name])
        if not found:
            return None
        beginning, transaction = load_beginning(found[0]), load_transaction(app_id, found[1])
        if beginning is None or transaction is None:
            return None
        return self._living_pending(beginning.pending(place, transaction))

    async def take_pending_by_challenge(
        self, app_id: str, challenge: bytes, openers: tuple[Opener, ...], kind: FinishKind
    ) -> Pending | None:
        """Take the pending ceremony with this challenge, whichever of `openers` began it."""
        token = base64url(challenge)
        names = [ceremony_digest("challenge", app_id, opener, kind, token) for opener in openers]
        found = await self._take_open_pending(app_id, *names)
        return found._replace(challenge=challenge) if found else None

    async def _take_open_pending(self, app_id: str, *names: bytes) -> Pending | None:
        keys = [_cap_key(app_id), *[_open_key(app_id, name) for name in names]]
        stored = await self.run("take_pending", _TAKE_OPEN, keys=keys, args=list(names))
        return self._living_pending(load_pending(app_id, stored)) if stored else None

    def put_pending_of(
        self, external_id: str, pending: Pending, *, opener: Opener
    ) -> Awaitable[None]:
        """Store a user's pending ceremony; the opener's earlier one of this purpose is gone."""
        name = ceremony_digest("user", pending.app_id, opener, purpose_of(pending), external_id)
        return self._put("put_pending", b"p:" + name, dump_pending(pending), pending.expires_at)

    async def take_pending_of(
        self, app_id: str, external_id: str, opener: Opener, purpose: Purpose
    ) -> Pending | None:
        """Take the user's pending ceremony of this purpose that `opener` began."""
        name = ceremony_digest("user", app_id, opener, purpose, external_id)
        stored = await self._ask("take_pending", "GETDEL", b"p:" + name)
        return self._living_pending(load_pending(app_id, stored)) if stored else None

    # Asked after a take found nothing, for the reason that the operator reads. The caller's answer
    # stays the same.

    async def other_finish_of_handle(self, app_id: str, handle: str) -> bool:
        """Whether this handle's ceremony waits for another finish than the one that asked for
        it.
        """
        names = _names("handle", app_id, _PURPOSES, handle)
        if len(handle) == _HANDLE:
            key = b"t:" + _transaction_in(handle)
            return await self._ask("find_pending", "GETRANGE", key, 1, 32) in names
        return await self._is_there([_open_key(app_id, name) for name in names])

    async def other_finish_of_challenge(self, app_id: str, challenge: bytes) -> bool:
        """Whether this challenge's ceremony waits for another finish than the one that asked for
        it.
        """
        names = _names("challenge", app_id, _KINDS, base64url(challenge))
        return await self._is_there([_open_key(app_id, name) for name in names])

    async def other_finish_of_user(self, app_id: str, external_id: str, purpose: Purpose) -> bool:
        """Whether the user has a ceremony of this purpose that waits for another opener's
        finish.
        """
        names = _names("user", app_id, (purpose,), external_id)
        # Each name lies in a slot of its own.
        return any(await asyncio.gather(*[self._is_there([b"p:" + name]) for name in names]))

    async def _is_there(self, keys: list[bytes]) -> bool:
        return bool(await self._ask("find_pending", "EXISTS", *keys))

    # -- nonces ------------------------------------------------------------------------------------

    def put_nonce(self, app_id: str, nonce: str, redeemable: Redeemable) -> Awaitable[None]:
        """Store what a nonce stands for until `expires_at`."""
        key = b"n:" + digest("nonce", app_id, nonce)
        return self._put("put_nonce", key, dump_redeemable(redeemable), redeemable.expires_at)

    async def take_nonce(self, app_id: str, nonce: str) -> Redeemable | None:
        """Take what a nonce stands for."""
        stored = await self._ask("take_nonce", "GETDEL", b"n:" + digest("nonce", app_id, nonce))
        return self._living(load_redeemable(stored)) if stored else None

    # -- tickets -----------------------------------------------------------------------------------

    async def put_ticket(self, app_id: str, ticket: str, value: object, ends: float) -> None:
        """Store what a ticket stands for, a JSON value, until `ends`."""
        key = b"s:" + digest("ticket", app_id, ticket)
        life = max(1, int((ends - self._clock()) * 1000))
        await self._ask("put_ticket", "SET", key, orjson.dumps([ends, value]), "PX", life)

    async def take_ticket(self, app_id: str, ticket: str) -> Any | None:
        """Take what a ticket stands for."""
        key = b"s:" + digest("ticket", app_id, ticket)
        stored = await self._ask("take_ticket", "GETDEL", key)
        if not stored:
            return None
        ends, value = orjson.loads(stored)
        return value if ends > self._clock() else None

    # -- records -----------------------------------------------------------------------------------

    def _put(self, operation: str, key: bytes, record: bytes, ends: float) -> Awaitable[None]:
        life = max(1, int((ends - self._clock()) * 1000))
        return self._ask(operation, "SET", key, record, "PX", life)

    def _living(self, record: Ends | None) -> Ends | None:
        """The record, unless it is past its end."""
        return record if record is not None and record.expires_at > self._clock() else None

    def _living_pending(self, record: Pending | None) -> Pending | None:
        return record if record is not None and record.expires_at > self._clock() else None


def _open_key(app_id: str, name: bytes) -> bytes:
    return b"p:{%b}:%b" % (app_id.encode(), name)


def _cap_key(app_id: str) -> bytes:
    return b"d:{%b}" % app_id.encode()


def _transaction_in(handle: str) -> bytes:
    """The digest of the transaction's id, which a handle of a transaction's ceremony carries."""
    return urlsafe_b64decode(handle[_SECRET:] + "=")


def _names(by: FoundBy, app_id: str, kinds: tuple[FinishKind, ...], token: str) -> list[bytes]:
    """The names under which any opener may have begun this ceremony."""
    return [
        ceremony_digest(by, app_id, opener, kind, token)
        for opener in get_args(Opener)
        for kind in kinds
    ]


def _info(reply: bytes | dict[str, Any]) -> dict[str, str]:
    """An INFO reply, of either client."""
    if isinstance(reply, dict):
        return {name: str(value) for name, value in reply.items()}
    lines = (line.partition(":") for line in reply.decode().splitlines())
    return {name: value for name, colon, value in lines if colon}

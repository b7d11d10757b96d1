"""One-time values with a life, on Redis: put, peek, take.

**Taking is validating.** A value is there or it is not; `take` reads and deletes in one command, so of any number of callers
on any number of instances one gets it. Nothing here answers "is it valid?".

**Names.** Only digests are stored (`tokens.digest`, which hashes in the kind and the app). With a transaction T:

    t:{T}             the transaction
    p:{T}             its pending ceremony: SHA-256 of the handle, then the record

    p:{H}             a pending ceremony under a name that a keyed caller chose; H is the name's digest
    p:{app}:H         a pending ceremony without a transaction: H is the digest of its handle, or of its challenge, which the record
                      then lacks: whoever reads it here can't make an answer
    d:{app}           the open ones of an app, by end of life: what the cap counts
    n:H               what a nonce stands for
    s:H               what a ticket for signals stands for
    ready             nothing, for a second: what `check` writes
    m:, o:, w:        mail codes: see `broker.ephemeral.mailbox`

A transaction has one place for a pending ceremony, so a new begin replaces the old one by writing over it, and the old handle
finds nothing. A handle carries T behind its secret, which is how finish finds `p:{T}` from the handle alone; the script compares
the secret's digest and leaves the record alone if it is another's. The braces keep what must change together in one slot of a
cluster. `peek` is for transactions only.

A chosen name is no secret: whoever knows it could make up a handle that leads to `p:{H}`. Such a handle takes nothing, since the
record there has no digest in front to match. A put under a name replaces what was there. No cap counts it: a key opened it.

**Time.** Every record carries the end of its life by the server's clock and is also given to Redis with a TTL; a record past its
end is never returned, even if a restored snapshot brings it back.

**Nothing one-time is sent twice.** redis-py retries by default, and a repeated GETDEL answers "nothing there": the value would be
burnt and its owner told it was never valid. Every client here has `Retry(NoBackoff(), 0)`. A lost reply is `Unavailable`. A
connection whose reply was not awaited to its end is closed, so nobody reads another's answer.

An operator can compute: keys = open transactions + pending ceremonies + unredeemed nonces and tickets + one set per app with open
discoverable ceremonies; about 0.4 kB each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar, cast

import orjson

from broker.ephemeral.client import DOWN, Commands, Script, connect, run_script
from broker.ephemeral.records import dump, load
from broker.errors import TooManyCeremonies, Unavailable
from broker.model import (
    Pending,
    PendingAuthentication,
    Redeemable,
    Transaction,
)
from broker.telemetry import Metrics, Stopwatch, context
from broker.tokens import digest, text

__all__ = ["Ephemeral", "connect"]

T = TypeVar("T")

_SECRET = len("pbh_") + 43  # characters of a handle before the transaction's digest
_HASH = 32

_PROBE = b"ready"

# KEYS: p:{T}, t:{T}. ARGV: digest of the handle. The record starts with the digest of the only handle that may take it. The
# transaction comes along and stays.
_TAKE_BOUND = Script("""
local v = redis.call('GET', KEYS[1])
if v and string.sub(v, 1, 32) == ARGV[1] then
  redis.call('DEL', KEYS[1])
  return {v, redis.call('GET', KEYS[2])}
end
return false
""")

# KEYS: p:{app}:H, d:{app}. ARGV: record, life in ms, now in ms, end in ms, cap, member.
# SET is the first write: a full server refuses it, while it lets a script that has begun to write go on past its limit.
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

# KEYS: p:{app}:H, d:{app}. ARGV: member.
_TAKE_OPEN = Script("""
redis.call('ZREM', KEYS[2], ARGV[1])
return redis.call('GETDEL', KEYS[1])
""")


class Ephemeral:
    """The ephemeral store. `clock` gives seconds since the epoch; `timeout` in seconds limits one wait."""

    def __init__(
        self, commands: Commands, *, timeout: float, metrics: Metrics, clock: Callable[[], float]
    ) -> None:
        self._commands = commands
        self._timeout = timeout
        self._metrics = metrics
        self._clock = clock

    async def close(self) -> None:
        """Close every connection."""
        await self._commands.close()

    async def _ask(self, operation: str, *command: Any) -> Any:
        """The reply to one command, within the limit.

        Raises:
            Unavailable: the server is down, slow, full, or refuses to write; or its reply was lost.
        """
        try:
            with Stopwatch(self._metrics, "redis", operation):
                return await self._commands.ask(*command, limit=context().remaining(self._timeout))
        except DOWN as fault:
            raise Unavailable(reason="redis") from fault

    async def run(self, operation: str, script: Script, *, keys: list[bytes], args: list[Any]) -> Any:
        """Run a Lua script whose keys share a hash tag: atomic, and one round trip once the server has it.

        Raises:
            Unavailable: see `_ask`.
        """
        try:
            with Stopwatch(self._metrics, "redis", operation):
                limit = context().remaining(self._timeout)
                return await run_script(self._commands, script, keys, args, limit)
        except DOWN as fault:
            raise Unavailable(reason="redis") from fault

    async def check(self) -> None:
        """Raise `Unavailable` unless the server takes a write: one that is full, or a replica, answers PING and serves nobody."""
        await self._ask("check", "SET", _PROBE, b"", "PX", 1000)

    async def facts(self) -> dict[str, Any]:
        """For `broker doctor`: version, seconds since the epoch by the server's clock, eviction policy."""
        server = _info(await self._ask("facts", "INFO", b"server"))
        memory = _info(await self._ask("facts", "INFO", b"memory"))
        now = await self._ask("facts", "TIME")
        return {
            "version": server.get("valkey_version") or server["redis_version"],
            "clock": int(now[0]) + int(now[1]) / 1e6,
            "eviction": memory.get("maxmemory_policy", "noeviction"),
        }

    # -- transactions ---------------------------------------------------------------------------------------------------------

    async def put_transaction(self, transaction_id: str, transaction: Transaction) -> None:
        """Store a transaction until `expires_at`."""
        key = b"t:{%s}" % text(digest("transaction", transaction.app_id, transaction_id)).encode()
        await self._put("put_transaction", key, transaction)

    async def peek_transaction(self, app_id: str, transaction_id: str) -> tuple[bytes, Transaction] | None:
        """A transaction and the digest of its id, left where it is."""
        name = digest("transaction", app_id, transaction_id)
        stored = await self._ask("peek_transaction", "GET", b"t:{%s}" % text(name).encode())
        found = self._load(app_id, cast(bytes | None, stored), Transaction)
        return (name, found) if found else None

    async def take_transaction(self, app_id: str, name: bytes) -> Transaction | None:
        """Take the transaction whose id has this digest."""
        stored = await self._ask("take_transaction", "GETDEL", b"t:{%s}" % text(name).encode())
        return self._load(app_id, cast(bytes | None, stored), Transaction)

    # -- pending ceremonies ---------------------------------------------------------------------------------------------------

    async def put_pending(self, secret: str, pending: Pending, *, cap: int) -> str:
        """Store a pending ceremony under a new handle, made from `secret` (a minted token), and return the handle.

        Raises:
            TooManyCeremonies: the app has `cap` open ceremonies without a transaction. Counted in the same round trip.
        """
        if pending.transaction is not None:
            place = text(pending.transaction)
            handle = secret + place
            await self._put(
                "put_pending",
                b"p:{%s}" % place.encode(),
                pending,
                before=digest("handle", pending.app_id, handle),
            )
            return handle
        await self._put_open_pending(digest("handle", pending.app_id, secret), pending, cap)
        return secret

    async def put_pending_by_challenge(self, pending: Pending, *, cap: int | None) -> None:
        """Store a pending ceremony that its challenge finds. `cap` is None for those that no cap counts.

        Raises:
            TooManyCeremonies: see `put_pending`.
        """
        name = digest("challenge", pending.app_id, text(pending.challenge))
        pending = replace(pending, challenge=b"")
        if cap is not None:
            await self._put_open_pending(name, pending, cap)
        else:
            await self._put("put_pending", self._open_keys(pending.app_id, name)[0], pending)

    async def _put_open_pending(self, name: bytes, pending: Pending, cap: int) -> None:
        now = int(self._clock() * 1000)
        end = int(pending.expires_at * 1000)
        stored = await self.run(
            "put_pending",
            _PUT_OPEN,
            keys=self._open_keys(pending.app_id, name),
            args=[dump(pending), max(1, end - now), now, end, cap, name],
        )
        if not stored:
            raise TooManyCeremonies(reason="discoverable_limit")

    async def take_pending(self, app_id: str, handle: str) -> Pending | None:
        """Take the pending ceremony that `handle` finds, of either kind."""
        name = digest("handle", app_id, handle)
        if len(handle) > _SECRET:
            place = handle[_SECRET:].encode()
            found = await self.run(
                "take_pending", _TAKE_BOUND, keys=[b"p:{%s}" % place, b"t:{%s}" % place], args=[name]
            )
            if not found:
                return None
            pending = self._load_pending(app_id, found[0][_HASH:])
            if isinstance(pending, PendingAuthentication):
                transaction = self._load(app_id, found[1], Transaction)
                return replace(pending, offered=transaction.offered) if transaction else None
            return pending
        return await self._take_open_pending(app_id, name)

    async def take_pending_by_challenge(self, app_id: str, challenge: bytes) -> Pending | None:
        """Take the pending ceremony with this challenge."""
        found = await self._take_open_pending(app_id, digest("challenge", app_id, text(challenge)))
        return replace(found, challenge=challenge) if found else None

    async def _take_open_pending(self, app_id: str, name: bytes) -> Pending | None:
        stored = await self.run("take_pending", _TAKE_OPEN, keys=self._open_keys(app_id, name), args=[name])
        return self._load_pending(app_id, stored)

    @staticmethod
    def _open_keys(app_id: str, name: bytes) -> list[bytes]:
        app = app_id.encode()
        return [b"p:{%s}:%s" % (app, text(name).encode()), b"d:{%s}" % app]

    async def put_pending_as(self, name: str, pending: Pending) -> None:
        """Store a pending ceremony under `name`, within its app; an earlier one of that name is gone."""
        await self._put("put_pending", self._name_key(pending.app_id, name), pending)

    async def take_pending_as(self, app_id: str, name: str) -> Pending | None:
        """Take the pending ceremony that was put under `name`."""
        stored = await self._ask("take_pending", "GETDEL", self._name_key(app_id, name))
        return self._load_pending(app_id, cast(bytes | None, stored))

    @staticmethod
    def _name_key(app_id: str, name: str) -> bytes:
        return b"p:{%s}" % text(digest("handle", app_id, name)).encode()

    # -- nonces ---------------------------------------------------------------------------------------------------------------

    async def put_nonce(self, app_id: str, nonce: str, redeemable: Redeemable) -> None:
        """Store what a nonce stands for until `expires_at`."""
        await self._put("put_nonce", b"n:" + text(digest("nonce", app_id, nonce)).encode(), redeemable)

    async def take_nonce(self, app_id: str, nonce: str) -> Redeemable | None:
        """Take what a nonce stands for."""
        key = b"n:" + text(digest("nonce", app_id, nonce)).encode()
        stored = await self._ask("take_nonce", "GETDEL", key)
        return self._load(app_id, cast(bytes | None, stored), Redeemable)

    # -- tickets --------------------------------------------------------------------------------------------------------------

    async def put_ticket(self, app_id: str, ticket: str, value: object, ends: float) -> None:
        """Store what a ticket stands for, a JSON value, until `ends`."""
        key = b"s:" + text(digest("ticket", app_id, ticket)).encode()
        life = max(1, int((ends - self._clock()) * 1000))
        await self._ask("put_ticket", "SET", key, orjson.dumps([ends, value]), "PX", life)

    async def take_ticket(self, app_id: str, ticket: str) -> Any | None:
        """Take what a ticket stands for."""
        key = b"s:" + text(digest("ticket", app_id, ticket)).encode()
        stored = await self._ask("take_ticket", "GETDEL", key)
        if not stored:
            return None
        ends, value = orjson.loads(cast(bytes, stored))
        return value if ends > self._clock() else None

    # -- records --------------------------------------------------------------------------------------------------------------

    async def _put(
        self, operation: str, key: bytes, record: Transaction | Pending | Redeemable, *, before: bytes = b""
    ) -> None:
        life = max(1, int((record.expires_at - self._clock()) * 1000))
        await self._ask(operation, "SET", key, before + dump(record), "PX", life)

    def _load(self, app_id: str, stored: bytes | None, kind: type[T]) -> T | None:
        record = load(app_id, stored) if stored else None
        if not isinstance(record, kind) or cast(Transaction, record).expires_at <= self._clock():
            return None
        return record

    def _load_pending(self, app_id: str, stored: bytes | None) -> Pending | None:
        record = load(app_id, stored) if stored else None
        if isinstance(record, Pending) and record.expires_at > self._clock():
            return record
        return None


def _info(reply: bytes | dict[str, Any]) -> dict[str, str]:
    """An INFO reply, of either client."""
    if isinstance(reply, dict):
        return {name: str(value) for name, value in reply.items()}
    lines = (line.partition(":") for line in reply.decode().splitlines())
    return {name: value for name, colon, value in lines if colon}

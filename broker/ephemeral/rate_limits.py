"""Rate limits: token buckets (GCRA) in the process's memory, shared by all instances through Redis.

    begin_rate             begins of one client address
    discoverable_rate      begins without a transaction of one client address
    keyed_rate             keyed calls of one API key, but for finishes and redemptions
    unknown_finish_rate    finishes of one client address that found no ceremony

Each is a setting, and a policy key that overrides it for an app. A bucket belongs to one app. An
address is an IPv4 address or an IPv6 /64 (`broker.web.client_address`).

**A refusal spends and writes nothing.** The process decides before the verb's first command, by its
own copy of the bucket. The charge goes to Redis without a wait, with the next batch of commands.
Its reply tells what all instances have charged, and moves the copy. So a limit costs no
round trip, on a single server and in a Cluster, where a bucket lies in another slot than the value.
A script that judged the bucket and wrote the value would need one slot; a bucket asked first costs
every begin a round trip; a write that is undone has replaced the earlier ceremony.

**What this bounds.** One instance is exact. N instances admit at most what reaches the others
during one round trip, once: that excess is charged too, and delays later requests. In the long run
all instances together admit the rate.

**After the fact.** Finishes and redemptions have no bucket. A finish that finds no ceremony is
charged to its address, and an instance that knows the bucket to be full refuses that address's
finishes before anything is taken.

**Fails open.** While Redis does not answer, each instance limits by its own copy. The failures
count in `broker_store_failures_total` with operation `charge`.

**Bucket.** A key whose remaining life is the time until the bucket is empty:

    l:{app|address}:b d f    l:{key}:k

A request that is admitted adds the interval of its rate. A bucket has room while it empties within
`burst` intervals. So a bucket needs no clock but Redis's, and an empty one no memory. The key names
the address for as long as the bucket is not empty: 30 s by the defaults.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple

from broker.ephemeral.transport import Script, Transport
from broker.errors import TooManyRequests, policy_hint
from broker.model import RATE_KEYS, UNLIMITED, Caller, Rate, rate_of

_PROXIES = " Behind a proxy all clients are one address, unless BROKER_TRUSTED_PROXIES names it."
_HINTS = {
    "begin_rate": policy_hint("begin_rate", "RATE") + _PROXIES,
    "discoverable_rate": policy_hint("discoverable_rate", "RATE") + _PROXIES,
    "keyed_rate": policy_hint("keyed_rate", "RATE"),
    "unknown_finish_rate": policy_hint("unknown_finish_rate", "RATE") + _PROXIES,
}
_ROUNDING = 0.002  # seconds: Redis counts whole ms
_PRUNED_AT = 10_000  # buckets in memory

# KEYS: buckets. ARGV: the interval of each in ms. Answers the ms until each is empty.
_CHARGE = Script("""
local full = {}
for i, key in ipairs(KEYS) do
  full[i] = math.max(redis.call('PTTL', key), 0) + ARGV[i]
  redis.call('SET', key, '', 'PX', full[i])
end
return full
""")


class _Bucket(NamedTuple):
    limit: str
    key: bytes
    rate: Rate


class RateLimits:
    """The limits. `rates` are the settings, by name. `clock` is monotonic, in seconds."""

    def __init__(
        self, transport: Transport, rates: Mapping[str, str], clock: Callable[[], float]
    ) -> None:
        self._transport = transport
        self._rates = rates
        self._clock = clock
        self._empty_at: dict[bytes, float] = {}  # by bucket
        self._prune_at = _PRUNED_AT

    def begin(self, caller: Caller, *, discoverable: bool) -> None:
        """Charge a begin to its client address; keyed callers are limited by their key.

        Raises:
            TooManyRequests.
        """
        if caller.key_id is None:
            buckets = [self._of_address(caller, "begin_rate", b"b")]
            if discoverable:
                buckets.append(self._of_address(caller, "discoverable_rate", b"d"))
            self._charge(buckets)

    def keyed_call(self, caller: Caller) -> None:
        """Charge a call to its API key.

        Raises:
            TooManyRequests.
        """
        assert caller.key_id is not None
        key = b"l:{%b}:k" % caller.key_id.encode()
        bucket = _Bucket("keyed_rate", key, self._rate(caller, "keyed_rate"))
        self._charge([bucket])

    def finish(self, caller: Caller) -> None:
        """Admit a finish, and charge nothing.

        Raises:
            TooManyRequests: too many finishes of the client address found no ceremony.
        """
        if caller.key_id is None:
            self._judge([self._of_address(caller, "unknown_finish_rate", b"f")])

    def unknown_finish(self, caller: Caller) -> None:
        """Charge a finish that found no ceremony to its client address."""
        if caller.key_id is None:
            # Parallel finishes are all admitted before the first is charged. Beyond a full bucket
            # they would refuse the address for longer than its rate says.
            with suppress(TooManyRequests):
                self._charge([self._of_address(caller, "unknown_finish_rate", b"f")])

    def _of_address(self, caller: Caller, limit: str, suffix: bytes) -> _Bucket:
        key = b"l:{%b|%b}:%b" % (caller.app.id.encode(), caller.address.encode(), suffix)
        return _Bucket(limit, key, self._rate(caller, limit))

    def _rate(self, caller: Caller, limit: str) -> Rate:
        chosen = rate_of(caller.app.policy[RATE_KEYS[limit]])
        return chosen or rate_of(self._rates.get(limit, "0")) or UNLIMITED

    def _judge(self, buckets: Sequence[_Bucket]) -> None:
        now = self._clock()
        for limit, key, (interval, burst) in buckets:
            backlog = self._empty_at.get(key, now) - now
            wait = max(backlog, 0.0) - (burst - 1) * interval / 1000
            if burst and wait > _ROUNDING:
                raise TooManyRequests(reason=limit, hint=_HINTS[limit], retry_after=math.ceil(wait))

    def _charge(self, buckets: Sequence[_Bucket]) -> None:
        """Charge a request to buckets that share a slot.

        Raises:
            TooManyRequests: one is full; none is charged.
        """
        buckets = [bucket for bucket in buckets if bucket.rate.burst]
        if not buckets:
            return
        self._judge(buckets)
        now = self._clock()
        for _, key, (interval, _) in buckets:
            self._empty_at[key] = max(self._empty_at.get(key, now), now) + interval / 1000
        if len(self._empty_at) > self._prune_at:
            self._empty_at = {key: at for key, at in self._empty_at.items() if at > now}
            self._prune_at = max(_PRUNED_AT, 2 * len(self._empty_at))
        keys = [bucket.key for bucket in buckets]
        intervals = [bucket.rate.interval for bucket in buckets]
        self._transport.post(
            "charge", _CHARGE, keys, intervals, lambda reply: self._merge(keys, reply)
        )

    def _merge(self, keys: Sequence[bytes], full: Sequence[int]) -> None:
        """Take over what all instances have charged."""
        now = self._clock()
        for key, milliseconds in zip(keys, full, strict=True):
            self._empty_at[key] = max(self._empty_at.get(key, now), now + milliseconds / 1000)

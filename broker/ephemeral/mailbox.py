"""Mail codes at rest: put, peek, judge, drop. Each is one Lua script, so one round trip, and
atomic.

**Names.** All keys of an app share its hash tag, so that one script may change them together in a
cluster too:

    m:{app}:C         a mail code; C is the digest of its id
    o:{app}:G         those of one purpose and mailbox, or of one purpose and user, by end of life:
                      what a new one may replace
    w:{app}:L         when codes were made for one purpose and mailbox, or for one user: what the
                      rate is counted by

**What a dump is worth.** Ids, secrets and codes are stored as SHA-256 only. Six digits are guessed
in a blink, so the digest of the code takes in the secret, which has more than 256 bits of chance
and stands nowhere: whoever has only the dump can't try a single code against it. Address, purpose
and metadata are there in the clear, for the backend reads them back.

**Judging is counting.** A guess with the right secret is counted before it is compared, by a write;
so a server that refuses writes judges nothing, and of N parallel guesses no more are compared than
the code allows. The right one deletes the record in the same script: of N parallel right ones one
succeeds. A guess without the right secret is nobody's attempt: it counts nothing and learns
nothing.

**Time.** Every record carries its end by the broker's clock. It stays for `GRACE` seconds beyond,
in which it answers nothing but that it has expired.

**Bounds.** One purpose and mailbox, or purpose and user, has at most `PENDING` codes; a newer one
pushes out the oldest, also where no rate is asked for. An operator can compute: keys = codes of the
last 20 minutes + two for each mailbox and two for each user that they are for; a code takes about
0.5 kB and its metadata. The keys that a script deletes by name it finds in `o:{app}:G`; they begin
with the same tag, so they are in the slot that the script runs in.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Any, Literal

import orjson

from broker.ephemeral import Ephemeral
from broker.ephemeral.transport import Script
from broker.model import base64url

GRACE = 600  # seconds in which an expired code is known to have expired
PENDING = 10
WINDOW = 900  # seconds that the rate is counted over
PER_MAILBOX = 5  # codes of one purpose for one mailbox in a window
PER_USER = 10  # codes for one user in a window, of whatever purpose

Verdict = Literal["right", "wrong", "exhausted", "spent", "expired", "unknown"]

# KEYS: m, then pairs of o and w: the mailbox's and, where there is a user, the user's. ARGV: 1
# record, 2 digest of the secret, 3 digest of the code, 4 end in ms, 5 attempts, 6 name of the code,
# 7 what names begin with,
#       8 now in ms, 9 life in ms, 10 grace in ms, 11 window in ms, 12 codes of a group, 13 whether
#       to replace the others, 14 whether the rate counts, 15 and 16 the rates of mailbox and user.
# Answers the ms to wait for; 0: stored. HSET is the first write: a full server refuses it, and lets
# later ones of the script go on.
_PUT = Script("""
local now, window = tonumber(ARGV[8]), tonumber(ARGV[11])
local since = '(' .. string.format('%.0f', now - window)
local wait = 0
if ARGV[14] == '1' then
  for i = 3, #KEYS, 2 do
    local limit = tonumber(ARGV[14 + (i - 1) / 2])
    local count = redis.call('ZCOUNT', KEYS[i], since, '+inf')
    if count >= limit then
      local found = redis.call('ZRANGEBYSCORE', KEYS[i], since, '+inf', 'WITHSCORES', 'LIMIT', count - limit, 1)
      wait = math.max(wait, tonumber(found[2]) + window - now)
    end
  end
end
if wait > 0 then
  return wait
end
redis.call('HSET', KEYS[1], 'r', ARGV[1], 's', ARGV[2], 'c', ARGV[3], 'e', ARGV[4], 'n', ARGV[5])
redis.call('PEXPIRE', KEYS[1], ARGV[9] + ARGV[10])
local function cut(group, last)
  for _, name in ipairs(redis.call('ZRANGE', group, 0, last)) do
    redis.call('DEL', ARGV[7] .. name)
  end
  redis.call('ZREMRANGEBYRANK', group, 0, last)
end
if ARGV[13] == '1' then
  cut(KEYS[4] or KEYS[2], -1)
end
for i = 2, #KEYS, 2 do
  redis.call('ZREMRANGEBYSCORE', KEYS[i], '-inf', ARGV[8])
  local over = redis.call('ZCARD', KEYS[i]) + 1 - tonumber(ARGV[12])
  if over > 0 then
    cut(KEYS[i], over - 1)
  end
  redis.call('ZADD', KEYS[i], ARGV[4], ARGV[6])
  redis.call('PEXPIRE', KEYS[i], ARGV[9])
  if ARGV[14] == '1' then
    redis.call('ZREMRANGEBYSCORE', KEYS[i + 1], '-inf', string.sub(since, 2))
    redis.call('ZADD', KEYS[i + 1], now, ARGV[6])
    redis.call('PEXPIRE', KEYS[i + 1], window)
  end
end
return 0
""")

# KEYS: m. ARGV: digest of the secret, digest of the code, now in ms. Answers a verdict, and the
# record where a guess was counted.
_JUDGE = Script("""
local f = redis.call('HMGET', KEYS[1], 's', 'c', 'e', 'n', 'r')
if not f[1] or f[1] ~= ARGV[1] then
  return {'unknown'}
end
if tonumber(f[3]) <= tonumber(ARGV[3]) then
  return {'expired'}
end
if tonumber(f[4]) <= 0 then
  return {'spent'}
end
local left = redis.call('HINCRBY', KEYS[1], 'n', -1)
if f[2] == ARGV[2] then
  redis.call('DEL', KEYS[1])
  return {'right', f[5], left}
end
return {left > 0 and 'wrong' or 'exhausted', f[5], left}
""")

_PEEK = Script("return redis.call('HMGET', KEYS[1], 'r', 'n', 'e')")
_DROP = Script("return redis.call('DEL', KEYS[1])")


@dataclass(frozen=True, slots=True)
class MailCode:
    """A 6-digit code that proves that somebody reads a mailbox, without the code and its secret.
    Times in seconds since the epoch.

    `external_id` is the caller's user, whom the app need not know (yet); `attempts_left` counts the
    guesses that will be judged.
    """

    id: str
    app_id: str
    purpose: str
    email: str
    external_id: str | None
    metadata: dict[str, Any] | None
    created_at: float
    expires_at: float
    attempts_left: int


class MailCodes:
    """The store of mail codes, on the ephemeral store's connections. Every method raises
    `Unavailable`.
    """

    def __init__(self, ephemeral: Ephemeral) -> None:
        self._ephemeral = ephemeral

    async def put(
        self, code: MailCode, secret: str, digits: str, *, counted: bool, replace_others: bool
    ) -> int:
        """Store a code that `secret` and `digits` redeem. Returns 0, or the whole seconds after
        which the rate allows one; then nothing was stored.

        `counted`: the rate is asked for, and this one counts. `replace_others`: the other codes of
        the same purpose are deleted, the user's where the code has one, else the mailbox's.
        """
        app, name = code.app_id, _name(code.app_id, code.id)
        # Addresses are compared byte for byte, but spelt in another case they are mostly one
        # mailbox: the rate can't be dodged so.
        places: list[tuple[str, ...]] = [
            ("mailbox", code.purpose, code.email),
            ("mailbox", code.purpose, code.email.lower()),
        ]
        if code.external_id is not None:
            places += [("user", code.purpose, code.external_id), ("user", code.external_id)]
        groups = [
            b"%s:{%s}:%s"
            % (b"ow"[n % 2 : n % 2 + 1], app.encode(), base64url(_digest(app, *place)).encode())
            for n, place in enumerate(places)
        ]
        wait: int = await self._ephemeral.run(
            "put_mail_code",
            _PUT,
            keys=[_key(app, name), *groups],
            args=[
                _dump(code),
                _digest(app, "secret", code.id, secret),
                _digest(app, "code", code.id, secret, digits),
                _ms(code.expires_at),
                code.attempts_left,
                name,
                _key(app, b""),
                _ms(code.created_at),
                _ms(code.expires_at) - _ms(code.created_at),
                GRACE * 1000,
                WINDOW * 1000,
                PENDING,
                int(replace_others),
                int(counted),
                PER_MAILBOX,
                PER_USER,
            ],
        )
        return min(WINDOW, math.ceil(wait / 1000))  # the clock may have been set back

    async def peek(self, app_id: str, code_id: str, now: float) -> MailCode | None:
        """A code that has not ended, left where it is."""
        record, left, end = await self._ephemeral.run(
            "peek_mail_code", _PEEK, keys=[_key(app_id, _name(app_id, code_id))], args=[]
        )
        if record is None or int(end) <= _ms(now):
            return None
        return _load(app_id, code_id, record, int(left))

    async def judge(
        self, app_id: str, code_id: str, secret: str, digits: str, now: float
    ) -> tuple[Verdict, MailCode | None]:
        """Judge a guess.

            unknown    no such code, or not its secret: nothing was counted
            expired    it is past its end
            spent      it was guessed wrong too often before
            wrong      counted; another guess is allowed
            exhausted  counted, and it was the last: of N parallel guesses one is told so
            right      and the code is gone

        The code comes along with the last three.
        """
        answer = await self._ephemeral.run(
            "judge_mail_code",
            _JUDGE,
            keys=[_key(app_id, _name(app_id, code_id))],
            args=[
                _digest(app_id, "secret", code_id, secret),
                _digest(app_id, "code", code_id, secret, digits),
                _ms(now),
            ],
        )
        verdict: Verdict = answer[0].decode()
        if len(answer) == 1:
            return verdict, None
        code = _load(app_id, code_id, answer[1], answer[2])
        return (verdict, code) if code else ("unknown", None)

    async def drop(self, app_id: str, code_id: str) -> None:
        """Delete a code, if it is there."""
        await self._ephemeral.run(
            "drop_mail_code", _DROP, keys=[_key(app_id, _name(app_id, code_id))], args=[]
        )


def _digest(app_id: str, *parts: str) -> bytes:
    """SHA-256 over the app and the parts; as JSON, so that no two lists of parts are one text."""
    return hashlib.sha256(orjson.dumps(["mail_code", app_id, *parts])).digest()


def _name(app_id: str, code_id: str) -> bytes:
    return base64url(_digest(app_id, "id", code_id)).encode()


def _key(app_id: str, name: bytes) -> bytes:
    return b"m:{%s}:%s" % (app_id.encode(), name)


def _ms(seconds: float) -> int:
    return round(seconds * 1000)


_FORMAT = "m1"


def _dump(code: MailCode) -> bytes:
    """A JSON array: the format's number, then what is neither the code's name nor counted."""
    return orjson.dumps(
        [
            _FORMAT,
            code.purpose,
            code.email,
            code.external_id,
            code.metadata,
            code.created_at,
            code.expires_at,
        ]
    )


def _load(app_id: str, code_id: str, record: bytes, left: int) -> MailCode | None:
    """None for a format that this code does not know: of newer code in a roll-back, say."""
    kind, *values = orjson.loads(record)
    if kind != _FORMAT:
        return None
    purpose, email, external_id, metadata, created_at, expires_at = values
    return MailCode(
        code_id,
        app_id,
        purpose,
        email,
        external_id,
        metadata,
        created_at,
        expires_at,
        attempts_left=left,
    )

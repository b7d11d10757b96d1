"""Mail codes at rest: put, peek, judge, drop.

All keys of an app share its hash tag:

    c:{app}:C         a mail code; C is the digest of its id
    o:{app}:G         the codes of one purpose and mailbox, or of one purpose and user: a group that
                      loses its oldest
    w:{app}:L         the codes made for one purpose and mailbox, or for one user, in a window: a
                      group that refuses, so a rate

**Worth of a dump.** Ids, secrets and codes are stored as SHA-256 only. The digest of the code takes
in the secret, which has more than 256 bits of chance and stands nowhere: six digits alone would be
guessed at once. Address, purpose and metadata are stored as they are, for the backend reads them
back.

**Judging is counting.** A guess with the right secret is counted before it is compared, by a write;
so a server that refuses writes judges nothing, and of N parallel guesses no more are compared than
the code allows. The right guess takes the code in the same script. A guess without the right secret
counts nothing and learns nothing.

**Bounds.** One purpose and mailbox, or purpose and user, has at most `PENDING` codes; a newer one
pushes out the oldest, also where no rate is asked for. An operator can compute: keys = codes of the
last 20 minutes + two for each mailbox and two for each user that they are for; a code takes about
0.5 kB and its metadata.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any, Literal, NamedTuple

import orjson

from broker.ephemeral.codec import encode
from broker.ephemeral.one_time import (
    Envelope,
    Expected,
    Group,
    OneTimeStore,
    Taken,
    Unknown,
)
from broker.model import base64url

GRACE = 600  # seconds in which an expired code is known to have expired
PENDING = 10
WINDOW = 900  # seconds that the rate is counted over
PER_MAILBOX = 5  # codes of one purpose for one mailbox in a window
PER_USER = 10  # codes for one user in a window, of whatever purpose

Verdict = Literal["right", "wrong", "exhausted", "spent", "expired", "term_over", "unknown"]

_DIGESTS = 64  # bytes before the msgpack: the digests of the secret and of the code


class MailCode(NamedTuple):
    """A 6-digit code that proves that somebody reads a mailbox, without the code and its secret.
    Times in seconds since the epoch.

    `external_id` is the caller's user, whom the app need not know (yet); `attempts_left` counts the
    guesses that will be judged. It is the first field, where the script that counts finds it.
    """

    attempts_left: int
    id: str
    app_id: str
    purpose: str
    email: str
    external_id: str | None
    metadata: dict[str, Any] | None
    created_at: float
    expires_at: float


class MailCodes:
    """The store of mail codes. Every method raises `Unavailable`."""

    def __init__(self, store: OneTimeStore) -> None:
        self._store = store

    async def put(
        self, code: MailCode, secret: str, digits: str, *, counted: bool, replace_others: bool
    ) -> int:
        """Put a code that `secret` and `digits` redeem. Returns 0, or the whole seconds after which
        the rate allows one; then nothing was put.

        `counted`: the rate is asked for, and this one counts. `replace_others`: the other codes of
        the same purpose are deleted, the user's where the code has one, else the mailbox's.
        """
        app, user = code.app_id, code.external_id
        owners: list[tuple[str, ...]] = [("mailbox", code.purpose, code.email)]
        # Addresses are compared byte for byte, but spelt in another case they are mostly one
        # mailbox: another spelling doesn't dodge the rate.
        rated: list[tuple[int, tuple[str, ...]]] = [
            (PER_MAILBOX, ("mailbox", code.purpose, code.email.lower()))
        ]
        if user is not None:
            owners.append(("user", code.purpose, user))
            rated.append((PER_USER, ("user", user)))
        end, window = _ms(code.expires_at), _ms(code.created_at + WINDOW)
        groups = [Group(_group(b"o", app, place), PENDING, end, "evict") for place in owners]
        if replace_others:
            groups[-1] = groups[-1]._replace(action="replace")
        if counted:
            groups += [Group(_group(b"w", app, p), limit, window, "refuse") for limit, p in rated]
        digests = _secret(app, code.id, secret) + _code(app, code.id, secret, digits)
        outcome = await self._store.put_counted(
            "put_mail_code",
            _key(app, code.id),
            Envelope(
                "mail_code", "", code.expires_at, digests + encode(code._replace(id="", app_id=""))
            ),
            groups,
            grace=GRACE * 1000,
        )
        return min(WINDOW, math.ceil(outcome.wait / 1000))  # the clock may have been set back

    async def peek(self, app_id: str, code_id: str) -> MailCode | None:
        """A code that has not ended, left where it is."""
        found = await self._store.peek(
            "peek_mail_code", _key(app_id, code_id), MailCode, _EXPECTED, skip=_DIGESTS
        )
        if isinstance(found, Unknown):
            return None
        return found._replace(id=code_id, app_id=app_id)

    async def judge(
        self, app_id: str, code_id: str, secret: str, digits: str
    ) -> tuple[Verdict, MailCode | None]:
        """Judge a guess.

            unknown    no such code, or not its secret: nothing was counted
            expired    it is past its end
            term_over  it was put in another term: unknown to the caller
            spent      it was guessed wrong too often before
            wrong      counted; another guess is allowed
            exhausted  counted, and it was the last: of N parallel guesses one is told so
            right      and the code is gone

        The code comes along with the last three.
        """
        found = await self._store.guess(
            "judge_mail_code",
            _key(app_id, code_id),
            MailCode,
            _EXPECTED._replace(proof=_secret(app_id, code_id, secret)),
            _code(app_id, code_id, secret, digits),
        )
        match found:
            case Taken(code):
                return "right", code._replace(id=code_id, app_id=app_id)
            case Unknown("wrong", code):
                code = code._replace(id=code_id, app_id=app_id)
                return ("wrong" if code.attempts_left else "exhausted"), code
            case Unknown("spent" | "expired" | "term_over" as verdict):
                return verdict, None
        return "unknown", None

    async def drop(self, app_id: str, code_id: str) -> None:
        """Delete a code, if it is there."""
        await self._store.drop("drop_mail_code", _key(app_id, code_id))


_EXPECTED = Expected(("mail_code",), grace=GRACE * 1000)


def _digest(app_id: str, *parts: str) -> bytes:
    """SHA-256 over the app and the parts; as JSON, so that no two lists of parts are one text."""
    return hashlib.sha256(orjson.dumps(["mail_code", app_id, *parts])).digest()


def _secret(app_id: str, code_id: str, secret: str) -> bytes:
    return _digest(app_id, "secret", code_id, secret)


def _code(app_id: str, code_id: str, secret: str, digits: str) -> bytes:
    return _digest(app_id, "code", code_id, secret, digits)


def _group(letter: bytes, app_id: str, place: tuple[str, ...]) -> bytes:
    return b"%b:{%b}:%b" % (letter, app_id.encode(), base64url(_digest(app_id, *place)).encode())


def _key(app_id: str, code_id: str) -> bytes:
    return _group(b"c", app_id, ("id", code_id))


def _ms(seconds: float) -> int:
    return round(seconds * 1000)

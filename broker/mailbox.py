"""Mail codes: one-time passcodes of six digits that prove control of a mailbox. For keyed callers,
whose backend sends the mail.

    create   -> the code, its secret and the message; the backend mails the message and keeps id
             and secret
    verify   id, secret and the typed digits -> the code's facts, once
    get      the facts of a code that has not ended
    delete   the code redeems nothing any more

**Two factors.** The mailbox gets six digits, and the backend keeps the secret with the person's
session. Neither redeems anything alone: a reader of the mail, or a caller that guesses digits for
an address, lacks the secret.

**Odds.** A code lives for `LIFE` seconds and takes `ATTEMPTS` guesses; the last wrong one ends it.
So the guesses at one code succeed with 5 in a million. The rate limits the codes to guess at, and
the mail that can be sent to an address: `PER_MAILBOX` codes of one purpose for one mailbox in 15
minutes, `PER_USER` for one user. A caller with a limit of its own may skip the rate.

**Addresses** are compared byte for byte. The broker neither trims nor folds them, because only the
mail server knows which addresses are one mailbox. Only the rate counts by the lower-cased address,
so that another spelling does not evade it.

**Refusals.** Keyed callers may know the cause. An unknown code, a used code, another app's code and
a wrong secret share one refusal. An expired code and a code without attempts each have their own. A
guess with the right secret that ends a known user's code is an event.

`broker.ephemeral.mail_codes` describes at-most-once and storage.
"""

from __future__ import annotations

import html
import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from broker.durable import Durable, instant
from broker.ephemeral import Ephemeral
from broker.ephemeral.mail_codes import PER_MAILBOX, PER_USER, WINDOW, MailCode, Verdict
from broker.errors import (
    InvalidRequest,
    MailCodeAttempts,
    MailCodeExpired,
    MailCodeRate,
    Refusal,
    Unavailable,
    UnknownMailCode,
    WrongMailCode,
)
from broker.model import ID, RelyingParty
from broker.telemetry import Metrics
from broker.tokens import Mint, SystemMint

__all__ = [
    "ATTEMPTS",
    "LIFE",
    "PER_MAILBOX",
    "PER_USER",
    "WINDOW",
    "MailCode",
    "Mailbox",
    "Message",
    "NewMailCode",
]

LIFE = 600  # seconds
ATTEMPTS = 5
MAX_METADATA = 4096  # bytes of JSON

_PREFIX = "pbm_"
_DIGITS = re.compile(r"[0-9]{6}\Z")
_PURPOSE = re.compile(r"[A-Za-z0-9._:-]{1,64}\Z")
# A bare address: no quoted local part, no address literal, and no character that separates
# addresses in a header (RFC 5322 §3.2.3).
_EMAIL = re.compile(r'[^\s@<>()\[\],;:\\"]+@[^\s@<>()\[\],;:\\".]+(\.[^\s@<>()\[\],;:\\".]+)+\Z')
_MAX_EMAIL = 254  # RFC 5321 §4.5.3.1.3, without the angle brackets
_MAX_USER = 256


@dataclass(frozen=True, slots=True)
class Message:
    """The body of the mail, as HTML and as plain text. Neither refers to another resource."""

    html: str
    text: str


@dataclass(frozen=True, slots=True)
class NewMailCode:
    """A new mail code, with its secret and digits, which are not stored in clear text."""

    code: MailCode
    secret: str
    digits: str
    message: Message


class Mailbox:
    """Makes and redeems mail codes. `clock` gives seconds since the epoch, `mint` randomness."""

    def __init__(
        self,
        *,
        ephemeral: Ephemeral,
        durable: Durable,
        metrics: Metrics,
        clock: Callable[[], float] = time.time,
        mint: Mint | None = None,
    ) -> None:
        self._codes = ephemeral.mail_codes
        self._durable = durable
        self._metrics = metrics
        self._clock = clock
        self._mint = mint or SystemMint()

    async def create(
        self,
        app: RelyingParty,
        email: str,
        purpose: str,
        *,
        external_id: str | None = None,
        metadata: dict[str, Any] | None = None,
        replace_others: bool = False,
        skip_rate: bool = False,
    ) -> NewMailCode:
        """Make a code for a mailbox.

        `purpose` is the caller's own word. `external_id` names a user of the caller, whom the app
        need not know. `metadata` comes back with the code. `replace_others` deletes the pending
        codes of this purpose: of the user if one is named, otherwise of the mailbox.

        Raises:
            InvalidRequest, MailCodeRate, Unavailable.
        """
        _check(email, purpose, external_id, metadata)
        now = round(self._clock(), 3)
        code = MailCode(
            id=self._mint.id(),
            app_id=app.id,
            purpose=purpose,
            email=email,
            external_id=external_id,
            metadata=metadata,
            created_at=now,
            expires_at=now + LIFE,
            attempts_left=ATTEMPTS,
        )
        secret = _PREFIX + "-".join(self._mint.id() for _ in range(3))
        digits = f"{int.from_bytes(self._mint.challenge()) % 1_000_000:06d}"
        wait = await self._codes.put(
            code, secret, digits, counted=not skip_rate, replace_others=replace_others
        )
        if wait:
            self._refuse("limited", MailCodeRate(retry_after=wait))
        self._metrics.mail_codes.inc("created")
        return NewMailCode(code, secret, digits, _message(app.name, digits))

    async def get(self, app: RelyingParty, code_id: str) -> MailCode:
        """A code that has not ended.

        Raises:
            UnknownMailCode: also for an expired code.
            Unavailable.
        """
        found = None
        if ID.match(code_id):
            found = await self._codes.peek(app.id, code_id)
        if found is None:
            raise UnknownMailCode
        return found

    async def verify(self, app: RelyingParty, code_id: str, secret: str, digits: str) -> MailCode:
        """Redeem a code: at most once, and never after `ATTEMPTS` wrong guesses. Text that is not
        six digits is wrong, and is not counted as a guess.

        Raises:
            UnknownMailCode, WrongMailCode, MailCodeExpired, MailCodeAttempts, Unavailable.
        """
        if not ID.match(code_id):
            self._refuse("unknown", UnknownMailCode())
        if not _DIGITS.match(digits):
            self._refuse("wrong", WrongMailCode(reason="mail_code_form"))
        verdict, code = await self._codes.judge(app.id, code_id, secret, digits)
        if verdict == "right" and code is not None:
            self._metrics.mail_codes.inc("verified")
            return code
        if verdict == "exhausted" and code is not None and code.external_id is not None:
            await self._record_exhausted(app, code.external_id)
        reason = verdict if verdict == "term_over" else None
        self._refuse(verdict, _REFUSALS[verdict](reason=reason))

    async def delete(self, app: RelyingParty, code_id: str) -> None:
        """Delete a code, if it exists.

        Raises:
            Unavailable.
        """
        if ID.match(code_id):
            await self._codes.drop(app.id, code_id)

    def _refuse(self, result: str, refusal: Refusal) -> NoReturn:
        self._metrics.mail_codes.inc(result)
        raise refusal

    async def _record_exhausted(self, app: RelyingParty, external_id: str) -> None:
        """Write the event of a code that ended by its last guess, if the app knows the user.

        If the event can't be written, a metric counts that, and the caller still gets its refusal.
        """
        try:
            user = await self._durable.users.find(app.id, external_id=external_id)
            if user is not None:
                await self._durable.events.add(
                    app.id,
                    "mail_code.exhausted",
                    result="refused",
                    reason=MailCodeAttempts.code,
                    user_id=user.id,
                    now=instant(self._clock()),
                )
        except Unavailable:
            self._metrics.events_lost.inc()


_REFUSALS: dict[Verdict, type[Refusal]] = {
    "unknown": UnknownMailCode,
    "wrong": WrongMailCode,
    "expired": MailCodeExpired,
    "exhausted": MailCodeAttempts,
    "spent": MailCodeAttempts,
    "term_over": UnknownMailCode,
}


def _check(
    email: str, purpose: str, external_id: str | None, metadata: dict[str, Any] | None
) -> None:
    if len(email) > _MAX_EMAIL or not email.isprintable() or not _EMAIL.match(email):
        raise InvalidRequest(
            "The e-mail address is not of the form name@example.org, or has more than "
            f"{_MAX_EMAIL} characters.",
            reason="email",
        )
    if not _PURPOSE.match(purpose):
        raise InvalidRequest(
            "The purpose has 1 to 64 letters, digits, dots, colons, dashes or underscores.",
            reason="purpose",
        )
    if external_id is not None and not 1 <= len(external_id) <= _MAX_USER:
        raise InvalidRequest(
            f"The user's id has 1 to {_MAX_USER} characters.", reason="external_id"
        )
    if len(json.dumps(metadata, separators=(",", ":"), ensure_ascii=False).encode()) > MAX_METADATA:
        raise InvalidRequest(
            f"The metadata has more than {MAX_METADATA} bytes of JSON.", reason="metadata"
        )


def _message(name: str, digits: str) -> Message:
    minutes = LIFE // 60
    before = f"Your code for {name}, to confirm that this mailbox is yours:"
    after = f"It works once, for {minutes} minutes. Give it to nobody who asks you for it."
    unasked = "If you did not ask for it, ignore this mail: without the code nothing happens."
    return Message(
        html=(
            '<!doctype html><html lang="en"><head><meta charset="utf-8">'
            "<title>Your code</title></head>"
            '<body style="font:16px/1.5 sans-serif">'
            f"<p>{html.escape(before)}</p>"
            f'<p style="font:bold 28px monospace;letter-spacing:4px">{digits}</p>'
            f"<p>{after}</p><p>{unasked}</p></body></html>"
        ),
        text=f"{before}\n\n{digits}\n\n{after}\n\n{unasked}\n",
    )

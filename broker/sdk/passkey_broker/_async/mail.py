"""Mail codes: one-time passcodes of six digits that prove control of a mailbox."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .. import answers, arguments
from ..arguments import Request
from ..results import MailCode, NewMailCode
from .connection import AsyncConnection


class AsyncMailCodes(AsyncConnection):
    """See `AsyncBrokerClient`."""

    async def create_mail_code(
        self,
        email: str,
        purpose: str,
        *,
        external_id: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        invalidate_others: bool = False,
        skip_rate_limit: bool = False,
    ) -> NewMailCode:
        """Make a code and its message. Your backend mails the message.

        Keep `id` and `secret` in the session. Neither they nor the digits redeem anything alone.

        Args:
            email: the mailbox.
            purpose: a word of yours, 1 to 64 letters, digits, `.`, `_`, `:`, `-`. Compare it when
                the code comes back.
            external_id: comes back with the code; need not be a user of the app.
            metadata: a JSON object of at most 4 KiB, comes back with the code.
            invalidate_others: end the pending codes of the purpose: of the user if one is named,
                otherwise of the mailbox.
            skip_rate_limit: don't count against 5 codes in 15 minutes for a mailbox.

        Raises:
            MailCodeRateLimited, InvalidRequest
        """
        arguments.require_texts(email=email, purpose=purpose)
        body = {
            "email": email,
            "purpose": purpose,
            **arguments.texts(external_id=external_id),
            **arguments.objects(metadata=metadata),
            **arguments.flags(invalidate_others=invalidate_others, skip_rate_limit=skip_rate_limit),
        }
        return answers.new_mail_code(await self._answer(Request("POST", "/mail_codes", body)))

    async def verify_mail_code(self, mail_code_id: str, secret: str, code: str) -> MailCode:
        """Redeem a code with the typed digits, once. Compare its purpose and its email with those
        of the session.

        Args:
            mail_code_id: from the session, like `secret`.
            code: the digits, as typed. A wrong guess counts if it has six digits.

        Raises:
            WrongMailCode, MailCodeNotFound, MailCodeExpired, MailCodeAttemptsExceeded,
            InvalidRequest
        """
        arguments.require_texts(mail_code_id=mail_code_id, secret=secret, code=code)
        body = {"id": mail_code_id, "secret": secret, "code": code}
        return answers.mail_code(await self._answer(Request("POST", "/mail_codes/verify", body)))

    async def get_mail_code(self, mail_code_id: str) -> MailCode:
        """A code, until it is redeemed or ends. Raises `MailCodeNotFound`, `MailCodeExpired`."""
        return answers.mail_code(await self._answer(Request("GET", _path(mail_code_id))))

    async def delete_mail_code(self, mail_code_id: str) -> None:
        """Delete a code, if it exists."""
        answers.accept(await self._answer(Request("DELETE", _path(mail_code_id))))


def _path(mail_code_id: str) -> str:
    return f"/mail_codes/{arguments.segment('mail_code_id', mail_code_id)}"

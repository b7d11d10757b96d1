# Generated from _async/ceremonies.py by `python tests/support/sync_client.py`: change that one.
"""Transactions, nonces, and ceremonies that a backend carries for the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .. import answers, arguments
from ..arguments import Request
from ..results import (
    ApprovalRequest,
    Attachment,
    Mediation,
    Proof,
    Receipt,
    UserVerification,
)
from .connection import Connection


class Ceremonies(Connection):
    """See `BrokerClient`."""

    # -- with a transaction: the page speaks to the broker, the backend redeems its nonce

    def create_register_transaction(
        self,
        external_id: str,
        passkey_display_name: str,
        *,
        user_name: str | None = None,
        user_verification: UserVerification | None = None,
        ceremony_timeout: float | None = None,
        exclude_passkeys: Sequence[str] | None = None,
        second_factor: bool = False,
        mediation: Mediation | None = None,
    ) -> str:
        """Permit one new passkey for the user, who is created if new.

        Args:
            external_id: the user, as you name them, 1 to 256 characters.
            passkey_display_name: what the authenticator shows.
            user_name: shown beside it; the same, if not given.
            user_verification: beyond the app's policy.
            ceremony_timeout: seconds, 1 to 600, and never more than the app's `ceremony_life`.
            exclude_passkeys: ids of passkeys whose authenticator shall make no other one, besides
                the user's own.
            second_factor: the passkey signs in only where a second factor is asked for.
            mediation: "conditional" permits a passkey that the browser makes without a prompt
                (conditional create, the page SDK's `autoRegister`).

        Returns:
            The transaction's id, for the page: a bearer right to add a passkey until it is used or
            ends.

        Raises:
            InvalidRequest: an option has no form that the broker takes.
            TooManyPasskeys
        """
        arguments.judge_texts(external_id=external_id, passkey_display_name=passkey_display_name)
        body = {
            "external_id": external_id,
            "passkey_display_name": passkey_display_name,
            **arguments.texts(user_name=user_name, mediation=mediation),
            **arguments.registration(
                user_verification, ceremony_timeout, exclude_passkeys, second_factor
            ),
        }
        answer = self._answer(Request("POST", "/transactions/register", body))
        return answers.Fields(answer).text("transaction_id")

    def create_authenticate_transaction(
        self,
        external_id: str | None = None,
        *,
        passkeys: Sequence[str] | None = None,
        discoverable: bool = False,
        user_verification: UserVerification | None = None,
        ceremony_timeout: float | None = None,
        second_factor: bool = False,
        mediation: Mediation | None = None,
    ) -> str:
        """Permit one sign-in.

        Args:
            external_id: the user. Without one it is a sign-in of whoever has one of `passkeys`, or
                with `discoverable` of whoever has a passkey: act on the receipt's external id
                alone.
            passkeys: ids of the only passkeys that may answer; an empty list is refused.
            discoverable: whoever has a passkey may answer.
            user_verification: beyond the app's policy.
            ceremony_timeout: seconds, 1 to 600, and never more than the app's `ceremony_life`.
            second_factor: the user's second factors may answer, too.
            mediation: "conditional" for a page that offers passkeys in its form fields.

        Returns:
            The transaction's id, for the page.

        Raises:
            UserNotFound, NoPasskeys, InvalidRequest
        """
        body = arguments.authentication(
            external_id,
            passkeys,
            user_verification,
            ceremony_timeout,
            discoverable=discoverable,
            second_factor=second_factor,
            mediation=mediation,
        )
        answer = self._answer(Request("POST", "/transactions/authenticate", body))
        return answers.Fields(answer).text("transaction_id")

    def verify_nonce(
        self,
        nonce: str,
        *,
        purpose: Proof | None = None,
        transaction_id: str | None = None,
        external_id: str | None = None,
        signed: bool = False,
    ) -> Receipt:
        """Redeem a nonce that a page brought, once. Sign in `receipt.external_id` and nobody else.

        Always state what the session expects. A mismatch spends the nonce. Sent once: after
        `BrokerUnreachable` or `BrokerUnavailable` the nonce may be spent, and the person signs in
        again.

        Args:
            nonce: as the page brought it.
            purpose: keeps a registration from buying a login. The nonce of a second factor or of an
                approval is redeemed only where its own purpose is stated.
            transaction_id: keeps the nonce of another session out.
            external_id: keeps another person's nonce out.
            signed: ask for `Receipt.token` as well, for services that check it offline with the
                app's key set.

        Raises:
            InvalidNonce, InvalidRequest
        """
        arguments.judge_texts(nonce=nonce)
        body = {
            "nonce": nonce,
            **arguments.texts(
                purpose=purpose, transaction_id=transaction_id, external_id=external_id
            ),
            **arguments.flags(signed=signed),
        }
        answer = self._answer(Request("POST", "/authenticate/verify", body))
        return answers.expected_receipt(answer, purpose, external_id, signed=signed)

    # -- keyed, found by the challenge: any number may be open for a user

    def start_registration(
        self,
        external_id: str,
        user_name: str,
        *,
        user_display_name: str | None = None,
        passkey_display_name: str | None = None,
        authenticator_attachment: Attachment | None = None,
        user_verification: UserVerification | None = None,
        ceremony_timeout: float | None = None,
        exclude_passkeys: Sequence[str] | None = None,
        second_factor: bool = False,
    ) -> dict[str, Any]:
        """Begin a registration whose messages this backend carries: no transaction, no nonce.

        Only for a person who is signed in or has a new account.

        Args:
            external_id: the user, who is created if new.
            user_name: what the authenticator shows, beside `user_display_name`.
            user_display_name: the same as `user_name`, if not given.
            passkey_display_name: what lists show.
            authenticator_attachment: "platform", "cross-platform" or "any"; the app's policy, if
                not given.

        The others are as in `create_register_transaction`.

        Returns:
            Options for the page's `PublicKeyCredential.parseCreationOptionsFromJSON`.

        Raises:
            InvalidRequest, TooManyPasskeys
        """
        body = _registration(external_id, user_name) | {
            **arguments.texts(
                user_display_name=user_display_name,
                passkey_display_name=passkey_display_name,
                authenticator_attachment=authenticator_attachment,
            ),
            **arguments.registration(
                user_verification, ceremony_timeout, exclude_passkeys, second_factor
            ),
        }
        answer = self._answer(Request("POST", "/ceremonies/register/start", body))
        return answers.Fields(answer).object("options")

    def finish_registration(
        self, credential: Mapping[str, Any], *, second_factor: bool = False
    ) -> Receipt:
        """Finish what `start_registration` began. The new passkey is confirmed and live.

        Args:
            credential: `toJSON()` of what the browser made.
            second_factor: as at start; otherwise the ceremony is unknown, and spent.

        Raises:
            CeremonyRefused, TransactionNotFound, TooManyPasskeys, InvalidRequest
        """
        body = {
            **arguments.credential(credential),
            **arguments.flags(second_factor=second_factor),
        }
        answer = self._answer(Request("POST", "/ceremonies/register/finish", body))
        return answers.finished_receipt(
            answer, "register_second_factor" if second_factor else "register"
        )

    def start_authentication(
        self,
        external_id: str | None = None,
        *,
        passkeys: Sequence[str] | None = None,
        discoverable: bool = False,
        user_verification: UserVerification | None = None,
        ceremony_timeout: float | None = None,
        second_factor: bool = False,
        approval: ApprovalRequest | None = None,
    ) -> dict[str, Any]:
        """Begin a sign-in, a second factor or an approval whose messages this backend carries.

        Args:
            approval: what the user shall sign; needs `external_id`. The challenge is 32 random
                bytes and the SHA-256 of the canonical JSON (RFC 8785) of `{"data": …, "id": …}`.

        The others are as in `create_authenticate_transaction`.

        Returns:
            Options for the page's `PublicKeyCredential.parseRequestOptionsFromJSON`.

        Raises:
            UserNotFound, NoPasskeys, ApprovalExists, InvalidRequest
        """
        body = {
            **arguments.authentication(
                external_id,
                passkeys,
                user_verification,
                ceremony_timeout,
                discoverable=discoverable,
                second_factor=second_factor,
            ),
            **arguments.approval(approval),
        }
        answer = self._answer(Request("POST", "/ceremonies/authenticate/start", body))
        return answers.Fields(answer).object("options")

    def finish_authentication(
        self, credential: Mapping[str, Any], *, second_factor: bool = False, approval: bool = False
    ) -> Receipt:
        """Finish what `start_authentication` began. Act on `receipt.external_id` and nobody else.

        Args:
            credential: `toJSON()` of what the browser made.
            second_factor: as at start; otherwise the ceremony is unknown, and spent.
            approval: the same, for an approval; its id stands on the receipt.

        Raises:
            CeremonyRefused, TransactionNotFound, InvalidRequest
        """
        body = {
            **arguments.credential(credential),
            **arguments.flags(second_factor=second_factor, approval=approval),
        }
        answer = self._answer(Request("POST", "/ceremonies/authenticate/finish", body))
        plain: Proof = "authenticate_second_factor" if second_factor else "authenticate"
        return answers.finished_receipt(answer, "approve" if approval else plain)

    # -- keyed, found by the user: one ceremony of each purpose, which a new start replaces

    def start_user_registration(
        self,
        external_id: str,
        user_name: str,
        *,
        user_display_name: str | None = None,
        passkey_display_name: str | None = None,
        authenticator_attachment: Attachment | None = None,
        user_verification: UserVerification | None = None,
        ceremony_timeout: float | None = None,
        exclude_passkeys: Sequence[str] | None = None,
    ) -> dict[str, Any]:
        """As `start_registration`, for the one registration that the user may have open."""
        body = _registration(external_id, user_name) | {
            **arguments.texts(
                user_display_name=user_display_name,
                passkey_display_name=passkey_display_name,
                authenticator_attachment=authenticator_attachment,
            ),
            **arguments.registration(user_verification, ceremony_timeout, exclude_passkeys),
        }
        answer = self._answer(Request("POST", "/register/start", body))
        return answers.Fields(answer).object("options")

    def finish_user_registration(self, external_id: str, credential: Mapping[str, Any]) -> Receipt:
        """Finish what `start_user_registration` began for this user, right or wrong.

        Take `external_id` from your own session. Raises as `finish_registration`.
        """
        arguments.judge_texts(external_id=external_id)
        body = {"external_id": external_id, **arguments.credential(credential)}
        answer = self._answer(Request("POST", "/register/finish", body))
        return answers.finished_receipt(answer, "register", external_id)

    def start_user_authentication(
        self,
        external_id: str,
        *,
        passkeys: Sequence[str] | None = None,
        user_verification: UserVerification | None = None,
        ceremony_timeout: float | None = None,
    ) -> dict[str, Any]:
        """As `start_authentication`, for the one sign-in that the user may have open."""
        arguments.judge_texts(external_id=external_id)
        body = arguments.authentication(external_id, passkeys, user_verification, ceremony_timeout)
        answer = self._answer(Request("POST", "/authenticate/start", body))
        return answers.Fields(answer).object("options")

    def finish_user_authentication(
        self, external_id: str, credential: Mapping[str, Any]
    ) -> Receipt:
        """Finish what `start_user_authentication` began for this user, right or wrong.

        Take `external_id` from your own session. Raises as `finish_authentication`.
        """
        arguments.judge_texts(external_id=external_id)
        body = {"external_id": external_id, **arguments.credential(credential)}
        answer = self._answer(Request("POST", "/authenticate/finish", body))
        return answers.finished_receipt(answer, "authenticate", external_id)


def _registration(external_id: str, user_name: str) -> dict[str, Any]:
    arguments.judge_texts(external_id=external_id, user_name=user_name)
    return {"external_id": external_id, "user_name": user_name}

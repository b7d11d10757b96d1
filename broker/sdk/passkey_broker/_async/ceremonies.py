"""Transactions, nonces, and ceremonies whose messages the backend relays."""

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
from .connection import AsyncConnection


class AsyncCeremonies(AsyncConnection):
    """See `AsyncBrokerClient`."""

    # -- with a transaction: the page calls the broker, the backend redeems the nonce

    async def create_register_transaction(
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
        binding_challenge: str | None = None,
    ) -> str:
        """Permit one new passkey for the user. A new user is created.

        Args:
            external_id: your id of the user, 1 to 256 characters.
            passkey_display_name: the name that the authenticator shows.
            user_name: the second name that the authenticator shows; by default the same.
            user_verification: the requirement, if it differs from the app's policy.
            ceremony_timeout: seconds, 1 to 600, and never more than the app's `ceremony_life`.
            exclude_passkeys: ids of further passkeys whose authenticators must not make another
                one, as those of the user's own must not.
            second_factor: the passkey signs in only as a second factor.
            mediation: "conditional" permits a passkey that the browser makes without a prompt
                (conditional create, the page SDK's `autoRegister`).
            binding_challenge: `Binding.challenge`; the nonce is redeemed only with its verifier.

        Returns:
            The transaction's id, for the page: a bearer right to add a passkey until it is used or
            ends.

        Raises:
            InvalidRequest: the broker does not accept an option.
            TooManyPasskeys
        """
        arguments.require_texts(external_id=external_id, passkey_display_name=passkey_display_name)
        body = {
            "external_id": external_id,
            "passkey_display_name": passkey_display_name,
            **arguments.texts(
                user_name=user_name, mediation=mediation, binding_challenge=binding_challenge
            ),
            **arguments.registration(
                user_verification, ceremony_timeout, exclude_passkeys, second_factor
            ),
        }
        return await self._transaction("/transactions/register", body)

    async def create_authenticate_transaction(
        self,
        external_id: str | None = None,
        *,
        passkeys: Sequence[str] | None = None,
        discoverable: bool = False,
        user_verification: UserVerification | None = None,
        ceremony_timeout: float | None = None,
        second_factor: bool = False,
        mediation: Mediation | None = None,
        binding_challenge: str | None = None,
    ) -> str:
        """Permit one sign-in.

        Args:
            external_id: the user. Without it the owner of one of `passkeys` signs in, or with
                `discoverable` the owner of any passkey: act on the receipt's external id alone.
            passkeys: ids of the allowed passkeys; an empty list is refused.
            discoverable: any passkey is allowed.
            user_verification: the requirement, if it differs from the app's policy.
            ceremony_timeout: seconds, 1 to 600, and never more than the app's `ceremony_life`.
            second_factor: the user's second factors are allowed too.
            mediation: "conditional" for a page that offers passkeys in its form fields.
            binding_challenge: as in `create_register_transaction`.

        Returns:
            The transaction's id, for the page.

        Raises:
            UserNotFound, NoPasskeys, InvalidRequest
        """
        body = {
            **arguments.authentication(
                external_id,
                passkeys,
                user_verification,
                ceremony_timeout,
                discoverable=discoverable,
                second_factor=second_factor,
                mediation=mediation,
            ),
            **arguments.texts(binding_challenge=binding_challenge),
        }
        return await self._transaction("/transactions/authenticate", body)

    async def cancel_transaction(self, transaction_id: str) -> None:
        """End a transaction, and the ceremony that the page has begun with it.

        Sent again, or for a transaction that is unknown, used or ended, it changes nothing. A
        nonce that the page holds already can still be redeemed.

        Raises:
            InvalidRequest
        """
        arguments.require_texts(transaction_id=transaction_id)
        body = {"transaction_id": transaction_id}
        answers.accept(await self._answer(Request("POST", "/transactions/cancel", body)))

    async def verify_nonce(
        self,
        nonce: str,
        *,
        purpose: Proof | None = None,
        transaction_id: str | None = None,
        external_id: str | None = None,
        binding_verifier: str | None = None,
        signed: bool = False,
    ) -> Receipt:
        """Redeem a page's nonce, once. Sign in `receipt.external_id` and no other user.

        Always state purpose, transaction and user of the session. A mismatch spends the nonce. The
        request is repeated once after a lost answer. After `BrokerUnreachable` or
        `BrokerUnavailable` the nonce may be spent, and the person signs in again.

        Args:
            nonce: the nonce from the page.
            purpose: refuses the nonce of a registration at a sign-in. The nonce of a second factor
                or of an approval is redeemed only if its own purpose is stated.
            transaction_id: refuses the nonce of another session.
            external_id: refuses the nonce of another user.
            binding_verifier: `Binding.verifier` of the session, if the nonce is bound.
            signed: request `Receipt.token` too, for services that verify it offline with the app's
                key set.

        Raises:
            InvalidNonce, InvalidRequest
        """
        arguments.require_texts(nonce=nonce)
        body = {
            "nonce": nonce,
            **arguments.texts(
                purpose=purpose,
                transaction_id=transaction_id,
                external_id=external_id,
                binding_verifier=binding_verifier,
            ),
            **arguments.flags(signed=signed),
        }
        answer = await self._answer(Request.idempotent("/authenticate/verify", body))
        return answers.expected_receipt(answer, purpose, external_id, signed=signed)

    # -- keyed, identified by the challenge: a user may have any number open

    async def start_registration(
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
        """Begin a registration whose messages the backend relays: no transaction, no nonce.

        Only for a person who is signed in or has a new account.

        Args:
            external_id: the user. A new user is created.
            user_name: the name that the authenticator shows, beside `user_display_name`.
            user_display_name: by default the same as `user_name`.
            passkey_display_name: the name in lists.
            authenticator_attachment: "platform", "cross-platform" or "any"; by default the app's
                policy.

        The other arguments are as in `create_register_transaction`.

        Returns:
            Options for the page's `PublicKeyCredential.parseCreationOptionsFromJSON`.

        Raises:
            InvalidRequest, TooManyPasskeys
        """
        arguments.require_texts(external_id=external_id, user_name=user_name)
        body = {
            "external_id": external_id,
            "user_name": user_name,
            **arguments.texts(
                user_display_name=user_display_name,
                passkey_display_name=passkey_display_name,
                authenticator_attachment=authenticator_attachment,
            ),
            **arguments.registration(
                user_verification, ceremony_timeout, exclude_passkeys, second_factor
            ),
        }
        return await self._options("/ceremonies/register/start", body)

    async def finish_registration(
        self, credential: Mapping[str, Any], *, second_factor: bool = False
    ) -> Receipt:
        """Finish the registration of `start_registration`. The new passkey is confirmed and live.

        Args:
            credential: `toJSON()` of the browser's credential.
            second_factor: as at start; otherwise the ceremony is unknown, and spent.

        Raises:
            CeremonyRefused, TransactionNotFound, TooManyPasskeys, InvalidRequest
        """
        body = {
            **arguments.credential(credential),
            **arguments.flags(second_factor=second_factor),
        }
        answer = await self._answer(Request("POST", "/ceremonies/register/finish", body))
        return answers.finished_receipt(
            answer, "register_second_factor" if second_factor else "register"
        )

    async def start_authentication(
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
        """Begin a sign-in, a second factor or an approval whose messages the backend relays.

        Args:
            approval: the data that the user signs; needs `external_id`. The challenge is 32 random
                bytes and the SHA-256 of the canonical JSON (RFC 8785) of `{"data": …, "id": …}`.

        The other arguments are as in `create_authenticate_transaction`.

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
        return await self._options("/ceremonies/authenticate/start", body)

    async def finish_authentication(
        self, credential: Mapping[str, Any], *, second_factor: bool = False, approval: bool = False
    ) -> Receipt:
        """Finish the ceremony of `start_authentication`. Act on `receipt.external_id` alone.

        Args:
            credential: `toJSON()` of the browser's credential.
            second_factor: as at start; otherwise the ceremony is unknown, and spent.
            approval: as at start, for an approval; the receipt carries its id.

        Raises:
            CeremonyRefused, TransactionNotFound, InvalidRequest
        """
        body = {
            **arguments.credential(credential),
            **arguments.flags(second_factor=second_factor, approval=approval),
        }
        answer = await self._answer(Request("POST", "/ceremonies/authenticate/finish", body))
        plain: Proof = "authenticate_second_factor" if second_factor else "authenticate"
        return answers.finished_receipt(answer, "approve" if approval else plain)

    # -- keyed, identified by the user: one ceremony of each purpose, which a new start replaces

    async def start_user_registration(
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
        """As `start_registration`, for the user's only open registration."""
        arguments.require_texts(external_id=external_id, user_name=user_name)
        body = {
            "external_id": external_id,
            "user_name": user_name,
            **arguments.texts(
                user_display_name=user_display_name,
                passkey_display_name=passkey_display_name,
                authenticator_attachment=authenticator_attachment,
            ),
            **arguments.registration(user_verification, ceremony_timeout, exclude_passkeys),
        }
        return await self._options("/register/start", body)

    async def finish_user_registration(
        self, external_id: str, credential: Mapping[str, Any]
    ) -> Receipt:
        """Finish the registration of `start_user_registration`, which any answer spends.

        Take `external_id` from your own session. Raises as `finish_registration`.
        """
        arguments.require_texts(external_id=external_id)
        body = {"external_id": external_id, **arguments.credential(credential)}
        answer = await self._answer(Request("POST", "/register/finish", body))
        return answers.finished_receipt(answer, "register", external_id)

    async def start_user_authentication(
        self,
        external_id: str,
        *,
        passkeys: Sequence[str] | None = None,
        user_verification: UserVerification | None = None,
        ceremony_timeout: float | None = None,
    ) -> dict[str, Any]:
        """As `start_authentication`, for the user's only open sign-in."""
        arguments.require_texts(external_id=external_id)
        body = arguments.authentication(external_id, passkeys, user_verification, ceremony_timeout)
        return await self._options("/authenticate/start", body)

    async def finish_user_authentication(
        self, external_id: str, credential: Mapping[str, Any]
    ) -> Receipt:
        """Finish the sign-in of `start_user_authentication`, which any answer spends.

        Take `external_id` from your own session. Raises as `finish_authentication`.
        """
        arguments.require_texts(external_id=external_id)
        body = {"external_id": external_id, **arguments.credential(credential)}
        answer = await self._answer(Request("POST", "/authenticate/finish", body))
        return answers.finished_receipt(answer, "authenticate", external_id)

    async def _transaction(self, path: str, body: dict[str, Any]) -> str:
        answer = await self._answer(Request.idempotent(path, body))
        return answers.Fields(answer).text("transaction_id")

    async def _options(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The ceremony options of a start."""
        answer = await self._answer(Request("POST", path, body))
        return answers.Fields(answer).object("options")

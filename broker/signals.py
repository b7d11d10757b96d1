"""Signal API (WebAuthn L3 §5.1.10): tells authenticators of new names, deleted passkeys and the
passkeys that still sign in.

Only a page can call `PublicKeyCredential.signal…`, and only the backend may decide its arguments.
So the backend prepares a signal: the change is made at once, and the arguments are stored under a
one-time **ticket** of five minutes. The page exchanges the ticket for the arguments. A lost ticket
changes nothing about sign-ins: signals only keep the list in the authenticator up to date.

The arguments carry user handles and credential ids, which a page can learn nowhere else. So a
ticket is taken like every one-time value, is bound to its app and kind, and is stored as a digest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from broker.durable import Durable, instant
from broker.ephemeral import TERM_OVER, Ephemeral, Taken
from broker.errors import UnknownTicket
from broker.model import ID, Credential, RelyingParty, base64url, validate_text
from broker.tokens import Mint, well_formed

TICKET_LIFE = 300  # seconds

SignalKind = Literal["update", "delete", "prune"]
Instruction = dict[str, Any]


@dataclass(frozen=True, slots=True)
class SignalTicket:
    """A ticket and its end (seconds since the epoch).

    `missing` are the requested passkeys that the app lacks; `empty`: there is nothing to signal.
    """

    ticket: str
    expires_at: float
    missing: tuple[str, ...]
    empty: bool


@dataclass(frozen=True, slots=True)
class Instructions:
    """The arguments of a signal, one call each: of `signalCurrentUserDetails` (update),
    `signalUnknownCredential` (delete; with the `userId`) or `signalAllAcceptedCredentials` (prune).
    """

    calls: tuple[Instruction, ...]
    missing: tuple[str, ...]
    empty: bool


class Signals:
    """Prepares signals and exchanges tickets. `clock` gives seconds since the epoch."""

    def __init__(
        self,
        *,
        ephemeral: Ephemeral,
        durable: Durable,
        clock: Callable[[], float],
        mint: Mint,
    ) -> None:
        self._ephemeral = ephemeral
        self._durable = durable
        self._clock = clock
        self._mint = mint

    async def prepare_update(
        self, app: RelyingParty, external_id: str, user_name: str, display_name: str | None = None
    ) -> SignalTicket:
        """Change the user's name on all passkeys of the user.

        The display name is signalled and not stored; without one it is the name.

        Raises:
            InvalidRequest, Unavailable.
        """
        validate_text(external_id, "external_id")
        validate_text(user_name, "user_name")
        if display_name is not None:
            validate_text(display_name, "user_display_name")
        await self._durable.credentials.rename(
            app.id, external_id=external_id, user_name=user_name, now=instant(self._clock())
        )
        names = {"name": user_name, "displayName": display_name or user_name}
        handles = await self._by_handle(app, external_id)
        calls = [{"rpId": app.rp_id, "userId": handle} | names for handle in handles]
        return await self._prepare(app, "update", calls)

    async def prepare_delete(
        self,
        app: RelyingParty,
        *,
        passkey_ids: Sequence[str] | None = None,
        external_id: str | None = None,
    ) -> SignalTicket:
        """Revoke passkeys by their ids, or all of a user. The ticket is stored before.

        Raises:
            InvalidRequest, Unavailable.
        """
        if passkey_ids is not None:
            credentials = await self._by_ids(app, [i for i in passkey_ids if ID.match(i)])
        else:
            assert external_id is not None, "callers pass ids or a user"
            validate_text(external_id, "external_id")
            credentials = await self._durable.credentials.of_external_id(app.id, external_id)
        found = {c.id for c in credentials}
        missing = tuple(dict.fromkeys(i for i in passkey_ids or () if i not in found))
        calls = [
            {
                "rpId": app.rp_id,
                "userId": _user_id(c),
                "credentialId": base64url(c.credential_id),
            }
            for c in credentials
        ]
        prepared = await self._prepare(app, "delete", calls, missing)
        if external_id is None:
            await self._revoke(app, credentials)
            return prepared
        user = await self._durable.users.find(app.id, external_id=external_id)
        if user is not None:
            now = instant(self._clock())
            await self._durable.credentials.revoke(app.id, user.id, None, now)
        return prepared

    async def _revoke(self, app: RelyingParty, credentials: list[Credential]) -> None:
        """Revoke passkeys. A passkey without an owner may get one meanwhile, once: its new row is
        read and revoked.
        """
        now = instant(self._clock())
        while credentials:
            left = {c.id for c in credentials}
            for user_id in {c.user_id for c in credentials}:
                ids = [c.id for c in credentials if c.user_id == user_id]
                left -= set(await self._durable.credentials.revoke(app.id, user_id, ids, now))
            credentials = await self._by_ids(app, list(left)) if left else []

    async def prepare_prune(self, app: RelyingParty, external_id: str) -> SignalTicket:
        """Signal the passkeys that the user has, so that authenticators drop all others. The store
        does not change.

        Raises:
            InvalidRequest, Unavailable.
        """
        validate_text(external_id, "external_id")
        calls = [
            {
                "rpId": app.rp_id,
                "userId": handle,
                "allAcceptedCredentialIds": [base64url(c.credential_id) for c in credentials],
            }
            for handle, credentials in (await self._by_handle(app, external_id)).items()
        ]
        return await self._prepare(app, "prune", calls)

    async def exchange(self, app: RelyingParty, kind: SignalKind, ticket: str) -> Instructions:
        """Exchange a ticket, once.

        Raises:
            UnknownTicket, Unavailable.
        """
        if not well_formed(ticket, "ticket"):
            raise UnknownTicket
        answer = await self._ephemeral.tickets.take(app.id, ticket)
        if answer == TERM_OVER:
            raise UnknownTicket(reason="term_over")
        if not isinstance(answer, Taken) or answer.value["kind"] != kind:
            raise UnknownTicket
        found = answer.value
        return Instructions(tuple(found["calls"]), tuple(found["missing"]), not found["calls"])

    async def _by_ids(self, app: RelyingParty, passkey_ids: Sequence[str]) -> list[Credential]:
        return [o.credential for o in await self._durable.credentials.by_ids(app.id, passkey_ids)]

    async def _by_handle(self, app: RelyingParty, external_id: str) -> dict[str, list[Credential]]:
        """The user's passkeys by `user.id`. An imported passkey has a handle of its own."""
        found: dict[str, list[Credential]] = {}
        for credential in await self._durable.credentials.of_external_id(app.id, external_id):
            found.setdefault(_user_id(credential), []).append(credential)
        return found

    async def _prepare(
        self,
        app: RelyingParty,
        kind: SignalKind,
        calls: list[Instruction],
        missing: tuple[str, ...] = (),
    ) -> SignalTicket:
        ticket, end = self._mint.token("ticket"), self._clock() + TICKET_LIFE
        value = {"kind": kind, "calls": calls, "missing": missing}
        await self._ephemeral.tickets.put(app.id, ticket, value, end)
        return SignalTicket(ticket, end, missing, not calls)


def _user_id(credential: Credential) -> str:
    """`user.id` of the options in which the passkey was registered: the base64url of the handle's
    ASCII bytes.
    """
    return base64url(credential.user_handle.encode())

"""What an authenticator should hear of its passkeys: a new name, a deletion, which ones still count
(WebAuthn L3 §5.1.10, the Signal API).

Only a page can speak to an authenticator, and only the backend may say what. So the backend
prepares: the change is made at once and what to signal is kept behind a one-time **ticket** of five
minutes; the page exchanges the ticket for instructions and hands them to
`PublicKeyCredential.signal…`. A ticket that is lost changes nothing about who signs in: signals
only keep the person's list tidy.

Instructions carry user handles and credential ids, which a page otherwise learns from nobody.
Therefore the ticket is taken like every one-time value here, is bound to app and kind, and is
stored by its digest only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from broker.durable import Durable, instant
from broker.ephemeral import Ephemeral
from broker.errors import UnknownTicket
from broker.model import ID, Credential, RelyingParty, base64url, validate_text
from broker.tokens import Mint, well_formed

TICKET_LIFE = 300  # seconds

SignalKind = Literal["update", "delete", "prune"]
Instruction = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Prepared:
    """A ticket and its end (seconds since the epoch); of what was asked, the passkeys that the app
    doesn't have.
    """

    ticket: str
    expires_at: float
    missing: tuple[str, ...]
    empty: bool


@dataclass(frozen=True, slots=True)
class Instructions:
    """What to signal: the arguments of `signalCurrentUserDetails` (update),
    `signalUnknownCredential` (delete; with the `userId`) or `signalAllAcceptedCredentials` (prune),
    one call each."""

    calls: tuple[Instruction, ...]
    missing: tuple[str, ...]
    empty: bool


class Signals:
    """Prepare and exchange. `clock` gives seconds since the epoch."""

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
    ) -> Prepared:
        """Change the user's name on all their passkeys; the display name (the name, if not given)
        is only signalled.

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
        held = await self._of_user(app, external_id)
        calls = [{"rpId": app.rp_id, "userId": handle} | names for handle in _by_handle(held)]
        return await self._prepare(app, "update", calls, ())

    async def prepare_delete(
        self,
        app: RelyingParty,
        *,
        passkey_ids: Sequence[str] | None = None,
        external_id: str | None = None,
    ) -> Prepared:
        """Revoke passkeys, by their ids or all of a user; what to signal is noted before.

        Raises:
            InvalidRequest, Unavailable.
        """
        if passkey_ids is not None:
            credentials = await self._by_ids(app, [i for i in passkey_ids if ID.match(i)])
        else:
            assert external_id is not None, "one of the two selects"
            validate_text(external_id, "external_id")
            credentials = await self._of_user(app, external_id)
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
        await self._revoke(app, credentials)
        return prepared

    async def _revoke(self, app: RelyingParty, credentials: list[Credential]) -> None:
        """Whoever owns them by now: what nobody owned may have got its owner meanwhile, which
        happens once.
        """
        now = instant(self._clock())
        while credentials:
            gone = set[str]()
            for user_id in {c.user_id for c in credentials}:
                ids = [c.id for c in credentials if c.user_id == user_id]
                gone.update(await self._durable.credentials.revoke(app.id, user_id, ids, now))
            left = [c.id for c in credentials if c.id not in gone]
            credentials = await self._by_ids(app, left) if left else []

    async def prepare_prune(self, app: RelyingParty, external_id: str) -> Prepared:
        """Let authenticators forget the passkeys that are no longer the user's. Changes nothing
        here.

        Raises:
            InvalidRequest, Unavailable.
        """
        validate_text(external_id, "external_id")
        held = _by_handle(await self._of_user(app, external_id))
        calls = [
            {
                "rpId": app.rp_id,
                "userId": handle,
                "allAcceptedCredentialIds": [base64url(c.credential_id) for c in credentials],
            }
            for handle, credentials in held.items()
        ]
        return await self._prepare(app, "prune", calls, ())

    async def exchange(self, app: RelyingParty, kind: SignalKind, ticket: str) -> Instructions:
        """Exchange a ticket, once.

        Raises:
            UnknownTicket, Unavailable.
        """
        found = (
            await self._ephemeral.take_ticket(app.id, ticket)
            if well_formed(ticket, "ticket")
            else None
        )
        if found is None or found["kind"] != kind:
            raise UnknownTicket
        return Instructions(tuple(found["calls"]), tuple(found["missing"]), not found["calls"])

    async def _of_user(self, app: RelyingParty, external_id: str) -> list[Credential]:
        return await self._durable.credentials.of_external_id(app.id, external_id)

    async def _by_ids(self, app: RelyingParty, passkey_ids: Sequence[str]) -> list[Credential]:
        return [o.credential for o in await self._durable.credentials.by_ids(app.id, passkey_ids)]

    async def _prepare(
        self,
        app: RelyingParty,
        kind: SignalKind,
        calls: list[Instruction],
        missing: tuple[str, ...],
    ) -> Prepared:
        ticket, ends = self._mint.token("ticket"), self._clock() + TICKET_LIFE
        value = {"kind": kind, "calls": calls, "missing": missing}
        await self._ephemeral.put_ticket(app.id, ticket, value, ends)
        return Prepared(ticket, ends, missing, not calls)


def _user_id(credential: Credential) -> str:
    """The user handle as `user.id` stood in the options: the base64url of its ASCII bytes."""
    return base64url(credential.user_handle.encode())


def _by_handle(credentials: Sequence[Credential]) -> dict[str, list[Credential]]:
    found: dict[str, list[Credential]] = {}
    for credential in credentials:
        found.setdefault(_user_id(credential), []).append(credential)
    return found

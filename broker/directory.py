"""Directory of relying parties, API keys, users and passkeys: the look-ups and changes of operators
and keyed callers. Ceremonies are in `broker.broker`.

**Cache.** Every request needs its relying party, and every keyed request its key. Both are cached
for less than a second (`broker.durable.cache`), so a changed policy or a revoked key is effective
on every instance within that time.

**Unknown ids and keys** are cached apart, so that those of a flood evict no other. No id and no key
becomes known later: the broker makes both at random. Look-ups that miss the caches share statements
(`broker.durable.group_commit`), so a flood of different ones holds few connections.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime

from broker.durable import Durable, UserOrder, instant
from broker.durable.cache import Cache
from broker.errors import InvalidKey, UnknownApp, UnknownPasskey, UnknownUser
from broker.model import (
    ID,
    ApiKey,
    ApprovalRecord,
    AuditRow,
    Credential,
    Event,
    Owned,
    Policy,
    RelyingParty,
    User,
    base64url,
    validate_text,
)
from broker.telemetry import Metrics
from broker.tokens import Mint, SystemMint, key_digest, key_hint, well_formed


class Directory:
    """The look-ups and the changes. `clock` gives seconds since the epoch; `cache_seconds` is how
    long a look-up is cached, by `monotonic`."""

    def __init__(
        self,
        *,
        durable: Durable,
        clock: Callable[[], float] = time.time,
        mint: Mint | None = None,
        cache_seconds: float = 0.9,
        monotonic: Callable[[], float] = time.monotonic,
        metrics: Metrics | None = None,
    ) -> None:
        self._durable = durable
        self._clock = clock
        self._mint = mint or SystemMint()
        self._apps: Cache[RelyingParty] = Cache(cache_seconds, monotonic)
        self._keys: Cache[tuple[str, str]] = Cache(cache_seconds, monotonic)
        self._unknown: Cache[bool] = Cache(cache_seconds, monotonic)
        if metrics is not None:
            self._apps.report("apps", metrics)
            self._keys.report("keys", metrics)

    def now(self) -> datetime:
        """The server's time."""
        return instant(self._clock())

    # -- callers -----------------------------------------------------------------------------------

    async def tell_refused_origin(self, app: RelyingParty, origin: str) -> None:
        """Write the event of a page that was refused for its origin. `origin` must be validated:
        operators read events.
        """
        await self._durable.events.add(
            app.id, "origin.refused", result="refused", reason=origin, now=self.now()
        )

    async def app(self, app_id: str) -> RelyingParty:
        """The relying party with this id.

        Raises:
            UnknownApp, Unavailable.
        """
        app = self._apps.get(app_id)
        if app is None:
            if not ID.match(app_id) or self._unknown.get(app_id):
                raise UnknownApp
            asked_at = self._apps.now()
            app = await self._durable.apps.find(app_id)
            if app is None:
                self._unknown.put(app_id, True, asked_at)
                raise UnknownApp
            self._apps.put(app_id, app, asked_at)
        return app

    async def authorise(self, app_id: str, key: str) -> str:
        """The id of the app's API key `key`.

        Raises:
            InvalidKey: malformed, unknown, revoked, or of another app; also for an unknown app.
            Unavailable.
        """
        if not ID.match(app_id):
            raise InvalidKey(reason="key_malformed")
        key_id, owner = await self.owner(key)
        if owner != app_id:
            raise InvalidKey(reason="key_of_another_app")
        return key_id

    def remembered(self, key: str) -> tuple[str, RelyingParty] | None:
        """The id of an API key and its app, where both are cached, as for nearly every request."""
        if not key.isascii():
            return None
        found = self._keys.get(key_digest(key))
        app = self._apps.get(found[1]) if found else None
        return (found[0], app) if found and app else None

    async def owner(self, key: str) -> tuple[str, str]:
        """The id of the API key `key` and the app it belongs to.

        Raises:
            InvalidKey: malformed, unknown or revoked.
            Unavailable.
        """
        if not well_formed(key, "key"):
            raise InvalidKey(reason="key_malformed")
        name = key_digest(key)
        found = self._keys.get(name)
        if found is None:
            if self._unknown.get(name):
                raise InvalidKey(reason="key_unknown")
            asked_at = self._keys.now()
            found = await self._durable.api_keys.find(name)
            if found is None:
                self._unknown.put(name, True, asked_at)
                raise InvalidKey(reason="key_unknown")
            self._keys.put(name, found, asked_at)
        return found

    # -- users and passkeys (keyed) ----------------------------------------------------------------

    async def user(
        self, app: RelyingParty, *, user_id: str | None = None, external_id: str | None = None
    ) -> User:
        """One user, by our id or by the caller's.

        Raises:
            UnknownUser, Unavailable.
        """
        if user_id is not None and not ID.match(user_id):
            raise UnknownUser
        user = await self._durable.users.find(app.id, user_id=user_id, external_id=external_id)
        if user is None:
            raise UnknownUser
        return user

    async def users(
        self,
        app: RelyingParty,
        *,
        limit: int,
        page: int = 1,
        external_id: str | None = None,
        user_id: str | None = None,
        status: str | None = None,
        created_before: datetime | None = None,
        order: UserOrder = "created_at",
    ) -> tuple[list[User], int]:
        """A page of users and how many there are in all. `external_id` is compared byte for
        byte.
        """
        return await self._durable.users.page(
            app.id,
            limit=limit,
            offset=(page - 1) * limit,
            external_id=external_id,
            user_id=user_id,
            status=status,
            created_before=created_before,
            order=order,
        )

    async def credentials(self, app: RelyingParty, user: User) -> list[Credential]:
        """The user's passkeys, oldest first."""
        return await self._durable.credentials.of_user(app.id, user.id)

    async def revoke(self, app: RelyingParty, user: User, passkey_id: str | None) -> list[str]:
        """Revoke one passkey, or all (`passkey_id` None). A revoked passkey never signs in again.
        Returns the ids revoked.

        Raises:
            UnknownPasskey: the user has no such passkey.
            Unavailable.
        """
        if passkey_id is not None and not ID.match(passkey_id):
            raise UnknownPasskey
        gone = await self._durable.credentials.revoke(
            app.id, user.id, None if passkey_id is None else [passkey_id], self.now()
        )
        if passkey_id is not None and not gone:
            raise UnknownPasskey
        return gone

    async def credentials_of(self, app: RelyingParty, external_id: str) -> list[Credential]:
        """The passkeys of the user with this external id, oldest first; none where there is no such
        user.
        """
        return await self._durable.credentials.of_external_id(app.id, external_id)

    async def revoke_of(
        self, app: RelyingParty, external_id: str, credential_id: str | None
    ) -> None:
        """Revoke one passkey of the user with this external id, by its credential id (base64url
        without padding), or all of them (`credential_id` None).

        Raises:
            UnknownPasskey: no such user, or the user has no such passkey; never for all.
            Unavailable.
        """
        user = await self._durable.users.find(app.id, external_id=external_id)
        if user is None:
            if credential_id is not None:
                raise UnknownPasskey
            return
        if credential_id is None:
            await self.revoke(app, user, None)
            return
        for credential in await self._durable.credentials.of_user(app.id, user.id):
            if base64url(credential.credential_id) == credential_id:
                await self.revoke(app, user, credential.id)
                return
        raise UnknownPasskey

    async def passkeys(
        self,
        app: RelyingParty,
        *,
        external_id: str | None = None,
        limit: int,
        page: int = 1,
        newest_first: bool = True,
    ) -> tuple[list[Owned], int]:
        """A page of the app's passkeys, or of one user's, and how many there are in all."""
        return await self._durable.credentials.page(
            app.id,
            external_id=external_id,
            limit=limit,
            offset=(page - 1) * limit,
            newest_first=newest_first,
        )

    async def passkeys_after(
        self, app: RelyingParty, after: tuple[datetime, str] | None, limit: int
    ) -> list[Owned]:
        """The app's passkeys, oldest first, after a cursor of time and id. Inserts and deletions
        don't move the page.
        """
        return await self._durable.credentials.after(app.id, after, limit)

    async def passkey(self, app: RelyingParty, passkey_id: str) -> Owned:
        """One passkey of the app.

        Raises:
            UnknownPasskey, Unavailable.
        """
        return self._found(
            await self._durable.credentials.find(app.id, passkey_id=passkey_id)
            if ID.match(passkey_id)
            else None
        )

    async def passkey_by_credential(self, app: RelyingParty, credential_id: bytes) -> Owned:
        """The app's passkey with this credential id.

        Raises:
            UnknownPasskey, Unavailable.
        """
        return self._found(
            await self._durable.credentials.find(app.id, credential_id=credential_id)
        )

    @staticmethod
    def _found(owned: Owned | None) -> Owned:
        if owned is None:
            raise UnknownPasskey
        return owned

    async def passkeys_by_ids(self, app: RelyingParty, passkey_ids: Sequence[str]) -> list[Owned]:
        """Those of the app's passkeys that have one of these ids, oldest first."""
        return await self._durable.credentials.by_ids(
            app.id, [i for i in passkey_ids if ID.match(i)]
        )

    async def rename(self, app: RelyingParty, passkey_id: str, nickname: str) -> None:
        """Change a passkey's name in lists: 1 to 256 characters.

        Raises:
            InvalidRequest, UnknownPasskey, Unavailable.
        """
        validate_text(nickname, "nickname")
        if not ID.match(passkey_id) or not await self._durable.credentials.rename(
            app.id, passkey_id=passkey_id, nickname=nickname, now=self.now()
        ):
            raise UnknownPasskey

    async def rename_user(self, app: RelyingParty, external_id: str, user_name: str) -> list[str]:
        """Change the user's name on all their passkeys; returns the passkeys' ids. A signal tells
        authenticators the new name.

        Raises:
            InvalidRequest, Unavailable.
        """
        validate_text(user_name, "user_name")
        return await self._durable.credentials.rename(
            app.id, external_id=external_id, user_name=user_name, now=self.now()
        )

    async def rename_user_of(self, app: RelyingParty, passkey_id: str, user_name: str) -> None:
        """Change the user's name on one passkey.

        Raises:
            InvalidRequest, UnknownPasskey, Unavailable.
        """
        validate_text(user_name, "user_name")
        if not ID.match(passkey_id) or not await self._durable.credentials.rename(
            app.id, passkey_id=passkey_id, user_name=user_name, now=self.now()
        ):
            raise UnknownPasskey

    async def revoke_passkey(self, app: RelyingParty, passkey_id: str) -> Owned:
        """Revoke a passkey of any owner or none. Returns its last state.

        Raises:
            UnknownPasskey, Unavailable.
        """
        owned = await self.passkey(app, passkey_id)
        if not await self._durable.credentials.revoke(
            app.id, owned.credential.user_id, [passkey_id], self.now()
        ):
            raise UnknownPasskey
        return owned

    async def assign(self, app: RelyingParty, passkey_id: str, external_id: str) -> Owned:
        """Give an ownerless passkey its owner, once. A missing user is created.

        Raises:
            InvalidRequest, UnknownPasskey, OwnedAlready, Unavailable.
        """
        validate_text(external_id, "external_id")
        if not ID.match(passkey_id):
            raise UnknownPasskey
        await self._durable.credentials.assign(
            app.id,
            passkey_id,
            external_id,
            new_id=self._mint.id(),
            new_handle=self._mint.user_handle(),
            now=self.now(),
        )
        return await self.passkey(app, passkey_id)

    async def approvals(self, app: RelyingParty, user_id: str) -> list[ApprovalRecord]:
        """The approvals of a user (the broker's id), signed or not, oldest first."""
        return await self._durable.approvals.of_user(app.id, user_id)

    async def audit(
        self,
        app: RelyingParty,
        *,
        limit: int,
        page: int = 1,
        start: datetime | None = None,
        end: datetime | None = None,
        kinds: Sequence[tuple[str, str]] | None = None,
        user: str | None = None,
        address: str | None = None,
        either: str | None = None,
    ) -> tuple[list[AuditRow], int]:
        """A page of events, newest first, and how many there are in all. `kinds` are pairs of
        action and result, None for all. `user` is a part of the external id, `address` a part of
        the address, and `either` a part of external id or address. `start` and `end` are exclusive.
        """
        return await self._durable.events.page(
            app.id,
            limit=limit,
            offset=(page - 1) * limit,
            start=start,
            end=end,
            kinds=kinds,
            user=user,
            address=address,
            either=either,
        )

    async def disable_user(self, app: RelyingParty, external_id: str, *, disabled: bool) -> None:
        """Disable a user, or enable a disabled one. A disabled user neither signs in nor registers.
        The user's open transactions, ceremonies and nonces end. The passkeys stay.

        Raises:
            UnknownUser, Unavailable.
        """
        if not await self._durable.users.set_disabled(
            app.id, external_id, self.now(), disabled=disabled
        ):
            raise UnknownUser

    async def delete_user(self, app: RelyingParty, external_id: str) -> None:
        """Delete a user with passkeys and approvals. The user's events keep kind, time and our ids.

        Raises:
            UnknownUser, Unavailable.
        """
        if not await self._durable.users.delete(app.id, external_id, self.now()):
            raise UnknownUser

    # -- relying parties and keys (operators) ------------------------------------------------------

    async def create_app(
        self,
        name: str,
        rp_id: str,
        origins: Sequence[str],
        *,
        related_origins: Sequence[str] = (),
        policy: Policy | None = None,
    ) -> tuple[RelyingParty, str]:
        """Make a relying party and its first API key. Only this call returns the key.

        Raises:
            InvalidSetting, Unavailable.
        """
        app = RelyingParty(
            self._mint.id(), name, rp_id, tuple(origins), tuple(related_origins), policy or Policy()
        ).checked()
        secret, key = self._new_key(app.id, "first")
        await self._durable.apps.create(app, key, key_digest(secret))
        return replace(app, created_at=key.created_at, updated_at=key.created_at), secret

    async def apps(self) -> list[RelyingParty]:
        """Every relying party, oldest first."""
        return await self._durable.apps.all()

    async def update_app(self, app: RelyingParty) -> RelyingParty:
        """Replace the name, RP ID, origins and policy of an app as it was read. The change is
        effective everywhere when cached look-ups have ended.

        Raises:
            Conflict: the app was changed since it was read.
            InvalidSetting, UnknownApp, Unavailable.
        """
        try:
            updated = await self._durable.apps.update(app.checked(), self.now())
        finally:
            self._apps.forget(app.id)
        if updated is None:
            raise UnknownApp
        return updated

    async def delete_app(self, app_id: str) -> None:
        """Delete an app with its keys, users and passkeys. Its events stay.

        Raises:
            UnknownApp, Unavailable.
        """
        if not await self._durable.apps.delete(app_id, self.now()):
            raise UnknownApp
        self._apps.forget(app_id)

    async def create_key(self, app_id: str, name: str) -> tuple[ApiKey, str]:
        """Make another API key. Only this call returns the key.

        Raises:
            UnknownApp, Unavailable.
        """
        secret, key = self._new_key(app_id, name)
        if not await self._durable.api_keys.create(key, key_digest(secret)):
            raise UnknownApp
        return key, secret

    def _new_key(self, app_id: str, name: str) -> tuple[str, ApiKey]:
        secret = self._mint.token("key")
        return secret, ApiKey(self._mint.id(), app_id, key_hint(secret), name, self.now(), None)

    async def keys(self, app_id: str) -> list[ApiKey]:
        """The app's keys, oldest first."""
        return await self._durable.api_keys.of_app(app_id)

    async def revoke_key(self, app_id: str, key_id: str) -> bool:
        """Revoke a key. False: no such key, or revoked before."""
        return await self._durable.api_keys.revoke(app_id, key_id, self.now())

    async def events(self, app_id: str, *, limit: int) -> Sequence[Event]:
        """The newest events of an app, oldest first."""
        return await self._durable.events.newest(app_id, limit=limit)

    async def events_after(
        self, app_id: str, cursor: int, *, limit: int
    ) -> tuple[list[AuditRow], int]:
        """The first events of an app after a cursor (an event's id; 0 for all), oldest first, and
        the next cursor. An event that is committed later has a greater id than that cursor.
        """
        return await self._durable.events.after(app_id, cursor, limit=limit)

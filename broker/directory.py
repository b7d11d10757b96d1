"""Who there is: relying parties, their API keys, their users and passkeys. Operators and keyed callers ask here; ceremonies are
in `broker.broker`.

**Remembered look-ups.** Every request needs its relying party, every keyed one its key. Both are remembered for less than a second,
so a changed policy or a revoked key is effective on every instance within that time, without a message between instances. Unknown
ids and keys are not remembered: memory belongs to those who exist.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Generic, TypeVar

from broker.durable import Durable, UserOrder, instant
from broker.errors import InvalidKey, UnknownApp, UnknownPasskey, UnknownUser
from broker.model import ID, ApiKey, Credential, Event, Policy, RelyingParty, User
from broker.tokens import Mint, SystemMint, key_digest, key_hint, text, well_formed

_REMEMBERED = 10_000

V = TypeVar("V")


class _Remembered(Generic[V]):
    """Look-ups remembered for at most `seconds`, so that a change is effective everywhere within that time.

    The time counts from when the store was asked, not from its answer, which may have been long on the way; and a clock that was
    set back ends the memory instead of lengthening it.
    """

    def __init__(self, seconds: float, clock: Callable[[], float]) -> None:
        self._seconds = seconds
        self._clock = clock
        self._values: dict[object, tuple[float, V]] = {}

    def get(self, key: object) -> V | None:
        found = self._values.get(key)
        return found[1] if found and 0 <= self._clock() - found[0] < self._seconds else None

    def forget(self, key: object) -> None:
        self._values.pop(key, None)

    def put(self, key: object, value: V, asked: float) -> None:
        if len(self._values) >= _REMEMBERED:
            self._values.clear()
        self._values[key] = (asked, value)


class Directory:
    """The look-ups and the changes. `clock` gives seconds since the epoch; `cache_seconds` is how long a look-up is remembered."""

    def __init__(
        self,
        *,
        durable: Durable,
        clock: Callable[[], float] = time.time,
        mint: Mint | None = None,
        cache_seconds: float = 0.9,
    ) -> None:
        self._durable = durable
        self._clock = clock
        self._mint = mint or SystemMint()
        self._apps: _Remembered[RelyingParty] = _Remembered(cache_seconds, clock)
        self._keys: _Remembered[tuple[str, str]] = _Remembered(cache_seconds, clock)

    def now(self) -> datetime:
        """The server's time."""
        return instant(self._clock())

    # -- who asks -------------------------------------------------------------------------------------------------------------

    async def app(self, app_id: str) -> RelyingParty:
        """The relying party with this id.

        Raises:
            UnknownApp, Unavailable.
        """
        app = self._apps.get(app_id)
        if app is None:
            asked = self._clock()
            app = await self._durable.app(app_id) if ID.match(app_id) else None
            if app is None:
                raise UnknownApp
            self._apps.put(app_id, app, asked)
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
            asked = self._clock()
            found = await self._durable.key(name)
            if found is None:
                raise InvalidKey(reason="key_unknown")
            self._keys.put(name, found, asked)
        return found

    # -- users and passkeys (keyed) -------------------------------------------------------------------------------------------

    async def user(
        self, app: RelyingParty, *, user_id: str | None = None, external_id: str | None = None
    ) -> User:
        """One user, by our id or by the caller's.

        Raises:
            UnknownUser, Unavailable.
        """
        if user_id is not None and not ID.match(user_id):
            raise UnknownUser
        user = await self._durable.user(app.id, user_id=user_id, external_id=external_id)
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
        """A page of users and how many there are in all. `external_id` is compared byte for byte."""
        return await self._durable.users(
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
        return await self._durable.credentials(app.id, user.id)

    async def revoke(self, app: RelyingParty, user: User, passkey_id: str | None) -> list[str]:
        """Revoke one passkey, or all (`passkey_id` None); it never signs in again. Returns the ids revoked.

        Raises:
            UnknownPasskey: the user has no such passkey.
            Unavailable.
        """
        if passkey_id is not None and not ID.match(passkey_id):
            raise UnknownPasskey
        gone = await self._durable.revoke_credentials(app.id, user.id, passkey_id, self.now())
        if passkey_id is not None and not gone:
            raise UnknownPasskey
        return gone

    async def credentials_of(self, app: RelyingParty, external_id: str) -> list[Credential]:
        """The passkeys of the user with this external id, oldest first; none where there is no such user."""
        user = await self._durable.user(app.id, external_id=external_id)
        return await self._durable.credentials(app.id, user.id) if user else []

    async def revoke_of(self, app: RelyingParty, external_id: str, credential_id: str | None) -> None:
        """Revoke one passkey of the user with this external id, by its credential id (base64url without padding), or all of them
        (`credential_id` None).

        Raises:
            UnknownPasskey: no such user, or the user has no such passkey; never for all.
            Unavailable.
        """
        user = await self._durable.user(app.id, external_id=external_id)
        if user is None:
            if credential_id is not None:
                raise UnknownPasskey
            return
        if credential_id is None:
            await self.revoke(app, user, None)
            return
        for credential in await self._durable.credentials(app.id, user.id):
            if text(credential.credential_id) == credential_id:
                await self.revoke(app, user, credential.id)
                return
        raise UnknownPasskey

    async def delete_user(self, app: RelyingParty, external_id: str) -> None:
        """Delete a user with all traces.

        Raises:
            UnknownUser, Unavailable.
        """
        if not await self._durable.delete_user(app.id, external_id, self.now()):
            raise UnknownUser

    # -- relying parties and keys (operators) ---------------------------------------------------------------------------------

    async def create_app(
        self,
        name: str,
        rp_id: str,
        origins: Sequence[str],
        *,
        related_origins: Sequence[str] = (),
        policy: Policy | None = None,
    ) -> tuple[RelyingParty, str]:
        """Make a relying party and its first API key; the key is shown this once.

        Raises:
            InvalidSetting, Unavailable.
        """
        app = RelyingParty(
            self._mint.id(), name, rp_id, tuple(origins), tuple(related_origins), policy or Policy()
        ).checked()
        secret, key = self._new_key(app.id, "first")
        await self._durable.create_app(app, key, key_digest(secret))
        return app, secret

    async def apps(self) -> list[RelyingParty]:
        """Every relying party, oldest first."""
        return await self._durable.apps()

    async def update_app(self, app: RelyingParty) -> RelyingParty:
        """Replace an app's name, RP ID, origins and policy. Effective everywhere when remembered look-ups have ended.

        Raises:
            InvalidSetting, UnknownApp, Unavailable.
        """
        checked = app.checked()
        if not await self._durable.update_app(checked, self.now()):
            raise UnknownApp
        self._apps.forget(checked.id)
        return checked

    async def delete_app(self, app_id: str) -> None:
        """Delete an app with its keys, users, passkeys and events.

        Raises:
            UnknownApp, Unavailable.
        """
        if not await self._durable.delete_app(app_id, self.now()):
            raise UnknownApp
        self._apps.forget(app_id)

    async def create_key(self, app_id: str, name: str) -> tuple[ApiKey, str]:
        """Make another API key; it is shown this once.

        Raises:
            UnknownApp, Unavailable.
        """
        secret, key = self._new_key(app_id, name)
        if not await self._durable.create_key(key, key_digest(secret)):
            raise UnknownApp
        return key, secret

    def _new_key(self, app_id: str, name: str) -> tuple[str, ApiKey]:
        secret = self._mint.token("key")
        return secret, ApiKey(self._mint.id(), app_id, key_hint(secret), name, self.now(), None)

    async def keys(self, app_id: str) -> list[ApiKey]:
        """The app's keys, oldest first."""
        return await self._durable.keys(app_id)

    async def revoke_key(self, app_id: str, key_id: str) -> bool:
        """Revoke a key. False: no such key, or revoked before."""
        return await self._durable.revoke_key(app_id, key_id, self.now())

    async def events(self, app_id: str, *, limit: int, after: int = 0) -> Sequence[Event]:
        """The newest events of an app, oldest first."""
        return await self._durable.events(app_id, limit=limit, after=after)

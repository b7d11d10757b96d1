# Generated from _async/management.py by `python tests/support/sync_client.py`: change that one.
"""Users, passkeys, approvals, events, signals, and the app."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from typing import Any
from urllib.parse import quote

from .. import answers, arguments
from ..arguments import Request
from ..errors import UserNotFound
from ..results import (
    App,
    Approval,
    Event,
    EventBatch,
    EventPage,
    ListedUser,
    OwnedPasskey,
    Passkey,
    PasskeyPage,
    SignalKind,
    SignalTicket,
    User,
    UserOrder,
    UserPage,
    UserStatus,
)
from .connection import Connection


class Management(Connection):
    """See `BrokerClient`."""

    # -- users

    def get_user(self, external_id: str) -> User:
        """The user with all passkeys. Raises `UserNotFound`."""
        return self.get_user_by_id(self._user_id(external_id))

    def get_user_by_id(self, user_id: str) -> User:
        """The user with the broker's own id, as in receipts and events. Raises `UserNotFound`."""
        arguments.require_texts(user_id=user_id)
        return answers.user(self._answer(Request("GET", _user(user_id))))

    def list_users(
        self,
        *,
        status: UserStatus | None = None,
        order_by: UserOrder | None = None,
        created_before: int | None = None,
        page: int = 1,
        limit: int = 100,
    ) -> UserPage:
        """A page of the app's users, by default oldest first.

        Args:
            status: only users with this status.
            created_before: Unix seconds, the `created_before` of the first page.
            page: from 1.
            limit: 500 at most.

        Raises:
            InvalidRequest
        """
        query = {
            **arguments.place(page, limit),
            **arguments.texts(status=status, order_by=order_by),
            **arguments.whole(created_before=created_before),
        }
        return answers.user_page(self._answer(Request("GET", "/users", query=query)))

    def iter_users(
        self,
        *,
        status: UserStatus | None = None,
        order_by: UserOrder | None = None,
        limit: int = 100,
    ) -> Iterator[ListedUser]:
        """All users, `limit` of them a request, without users who are created meanwhile.

        The deletion of a user meanwhile moves the later users, so that one of them may be left out.
        """
        page, created_before = 1, None
        while True:
            found = self.list_users(
                status=status,
                order_by=order_by,
                created_before=created_before,
                page=page,
                limit=limit,
            )
            for user in found.users:
                yield user
            if not found.users or page * limit >= found.total:
                return
            page, created_before = page + 1, found.created_before

    def rename_user(self, external_id: str, user_name: str) -> list[OwnedPasskey]:
        """Change the name that authenticators show, on each passkey of the user; return the
        passkeys.

        `prepare_signals` sends the name to the authenticators.

        Raises:
            UserNotFound, InvalidRequest
        """
        arguments.require_texts(user_name=user_name)
        path = _user(self._user_id(external_id))
        answer = self._answer(Request("PATCH", path, {"user_name": user_name}))
        return [answers.owned_passkey(each) for each in answers.Fields(answer).each("passkeys")]

    def disable_user(self, external_id: str) -> None:
        """End the user's sign-ins and registrations, begun or new, until `enable_user`. The
        passkeys stay. Raises `UserNotFound`.
        """
        path = f"{_user(self._user_id(external_id))}/disable"
        answers.accept(self._answer(Request("POST", path)))

    def enable_user(self, external_id: str) -> None:
        """Let a disabled user sign in and register again. Raises `UserNotFound`."""
        path = f"{_user(self._user_id(external_id))}/enable"
        answers.accept(self._answer(Request("POST", path)))

    def list_approvals(self, external_id: str) -> list[Approval]:
        """The user's approvals, signed or not, oldest first. Raises `UserNotFound`."""
        path = f"{_user(self._user_id(external_id))}/approvals"
        answer = self._answer(Request("GET", path))
        return [answers.approval(each) for each in answers.Fields(answer).each("approvals")]

    def _user_id(self, external_id: str) -> str:
        arguments.require_texts(external_id=external_id)
        query = {"identifier": external_id, "limit": "1"}
        answer = self._answer(Request("GET", "/users", query=query))
        for user in answers.Fields(answer).each("users"):
            if user.text("external_id") == external_id:
                return user.text("id")
        sentence = "The app has no such user."
        raise UserNotFound("user_not_found", sentence, answer.status, answer.request_id)

    # -- passkeys

    def list_passkeys(self, external_id: str) -> list[Passkey]:
        """The user's passkeys. Raises `UserNotFound`."""
        path = f"{_user(self._user_id(external_id))}/devices"
        answer = self._answer(Request("GET", path))
        return [answers.passkey(each) for each in answers.Fields(answer).each("devices")]

    def list_all_passkeys(
        self,
        external_id: str | None = None,
        *,
        page: int = 1,
        limit: int = 100,
        newest_first: bool = False,
    ) -> PasskeyPage:
        """A page of the app's passkeys, or of one user's; `limit` is 500 at most.

        An unknown user has no passkeys. Raises `InvalidRequest`.
        """
        query = {**arguments.place(page, limit), **arguments.texts(external_id=external_id)}
        if arguments.flags(newest_first=newest_first):
            query["order_by"] = "created_at:DESC"
        return answers.passkey_page(self._answer(Request("GET", "/passkeys", query=query)))

    def iter_passkeys(
        self, external_id: str | None = None, *, limit: int = 100
    ) -> Iterator[OwnedPasskey]:
        """All passkeys of the app, or of one user, oldest first, `limit` of them a request.

        A revocation meanwhile moves the later passkeys, so that one of them may be left out.
        """
        page = 1
        while True:
            found = self.list_all_passkeys(external_id, page=page, limit=limit)
            for passkey in found.passkeys:
                yield passkey
            if not found.passkeys or page * limit >= found.total:
                return
            page += 1

    def get_passkey(self, passkey_id: str) -> OwnedPasskey:
        """One passkey of the app, of any user. Raises `PasskeyNotFound`."""
        return answers.one_passkey(self._answer(Request("GET", _passkey(passkey_id))))

    def rename_passkey(self, passkey_id: str, nickname: str) -> OwnedPasskey:
        """Change the name of a passkey in lists. Raises `PasskeyNotFound`, `InvalidRequest`."""
        path = _passkey(passkey_id)
        arguments.require_texts(nickname=nickname)
        request = Request("PATCH", path, {"nickname": nickname})
        return answers.one_passkey(self._answer(request))

    def set_passkey_owner(self, passkey_id: str, external_id: str) -> OwnedPasskey:
        """Give a passkey without an owner to a user. A new user is created. An owner never changes.

        Raises:
            PasskeyNotFound, PasskeyHasOwner, InvalidRequest
        """
        path = f"{_passkey(passkey_id)}/owner"
        arguments.require_texts(external_id=external_id)
        request = Request("POST", path, {"external_id": external_id})
        return answers.one_passkey(self._answer(request))

    def revoke_passkey(self, external_id: str, passkey_id: str) -> None:
        """Revoke a passkey of this user.

        Raises:
            UserNotFound, PasskeyNotFound
        """
        segment = arguments.segment("passkey_id", passkey_id)
        path = f"{_user(self._user_id(external_id))}/devices/{segment}"
        answers.accept(self._answer(Request("DELETE", path)))

    def delete_passkey(self, passkey_id: str) -> None:
        """Revoke a passkey of the app, of any user. Raises `PasskeyNotFound`.

        At a signed-in person's request use `revoke_passkey`, which takes only that user's passkeys.
        """
        answers.accept(self._answer(Request("DELETE", _passkey(passkey_id))))

    def prepare_signals(
        self,
        kind: SignalKind,
        *,
        external_id: str | None = None,
        user_name: str | None = None,
        user_display_name: str | None = None,
        passkeys: Sequence[str] | None = None,
    ) -> SignalTicket:
        """Change passkeys, and make a ticket with which the page signals the authenticator.

        Args:
            kind: "update" stores `user_name` on all passkeys of the user. "delete" revokes
                `passkeys`, or all of the user, at once. "prune" changes nothing, and lets the
                authenticator drop passkeys that the user no longer has.
            external_id: the user; for "delete" in place of `passkeys`.
            user_display_name: only signalled, not stored.

        Raises:
            UserNotFound, InvalidRequest
        """
        arguments.require_texts(kind=kind)
        body = {
            **arguments.texts(
                external_id=external_id,
                user_name=user_name,
                user_display_name=user_display_name,
            ),
            **arguments.ids("passkeys", passkeys),
        }
        request = Request("POST", f"/signals/{quote(kind, safe='')}", body)
        return answers.signal_ticket(self._answer(request))

    # -- events

    def list_events(
        self,
        *,
        after: datetime | None = None,
        before: datetime | None = None,
        action: str | None = None,
        user: str | None = None,
        page: int = 1,
        limit: int = 100,
    ) -> EventPage:
        """A page of the app's events, newest first.

        Args:
            after: only later events.
            before: only earlier events.
            action: only events of this action, like "passkey.registered".
            user: only events of users with this text in their external id.
            page: from 1.
            limit: 500 at most.

        Raises:
            InvalidRequest
        """
        query = {
            **arguments.place(page, limit),
            **arguments.moments(after=after, before=before),
            **arguments.texts(action=action, user=user),
        }
        return answers.event_page(self._answer(Request("GET", "/events", query=query)))

    def iter_events(
        self,
        *,
        after: datetime | None = None,
        before: datetime | None = None,
        action: str | None = None,
        user: str | None = None,
        limit: int = 100,
    ) -> Iterator[Event]:
        """Events as of `list_events`, newest first, `limit` of them a request.

        Events that happen meanwhile are left out. To follow all events use `list_events_after`.
        """
        page, last = 1, set[int]()
        while True:
            found = self.list_events(
                after=after, before=before, action=action, user=user, page=page, limit=limit
            )
            for event in found.events:
                if event.id not in last:
                    yield event
            if not found.events or page * limit >= found.total:
                return
            if before is None:  # newer events would move the pages
                before = found.events[0].at + timedelta(microseconds=1)
            page, last = page + 1, {event.id for event in found.events}

    def list_events_after(self, cursor: str = "0", *, limit: int = 100) -> EventBatch:
        """Events after a cursor, oldest first. None is skipped, whatever the order of commits.

        Args:
            cursor: "0" for all, then each answer's `next_cursor`. An unchanged cursor means no new
                event: call again later.
            limit: 500 at most.

        Raises:
            InvalidRequest
        """
        arguments.require_texts(cursor=cursor)
        query = {"cursor": cursor, "limit": arguments.place(1, limit)["limit"]}
        return answers.event_batch(self._answer(Request("GET", "/events", query=query)))

    # -- the app

    def get_app(self) -> App:
        """The app of the API key."""
        return answers.app(self._answer(Request("GET", "/")))

    def get_key_set(self) -> dict[str, Any]:
        """The app's public keys as a JSON Web Key Set, to verify `Receipt.token`.

        The set has the keys of the app's other tokens too: verify `alg`, `iss`, `aud` and
        `purpose`.
        """
        fields = answers.Fields(self._answer(Request("GET", "/.well-known/jwks.json")))
        return {"keys": fields.objects("keys")}


def _user(user_id: str) -> str:
    return f"/users/{quote(user_id, safe='')}"


def _passkey(passkey_id: str) -> str:
    return f"/passkeys/{arguments.segment('passkey_id', passkey_id)}"

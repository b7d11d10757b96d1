"""The requests of each dialect, and what their successes say.

A `Dialect` builds the request of each step; a step that the dialect lacks is None. It shares
nothing with the clients of the other tests, which fail on answers that a fault brings.
"""

from __future__ import annotations

from base64 import urlsafe_b64decode
from typing import Any, Literal, NamedTuple, Protocol

import orjson

from tests.support.authenticator import flex_wire_form
from tests.support.wire import ORIGIN, RP_ID

Purpose = Literal["register", "authenticate"]
_LONG = {"register": "registration", "authenticate": "authentication"}


class App(NamedTuple):
    """A relying party of the traffic, and the key of its backend."""

    id: str
    key: str


class Request(NamedTuple):
    """`auth` is the header that carries the key; "" for a page."""

    method: str
    path: str
    body: object = None
    auth: Literal["Authorization", "apiKey", ""] = ""

    def headers(self, app: App) -> dict[str, str]:
        made = {"Content-Type": "application/json"}
        if self.auth == "Authorization":
            return made | {"Authorization": f"Bearer {app.key}"}
        return made | ({"apiKey": app.key} if self.auth else {"Origin": ORIGIN})


class Begun(NamedTuple):
    """What a begin answers: the handle of the ceremony ("" without one), and the options."""

    handle: str
    options: dict[str, Any]


class Dialect(Protocol):
    name: str

    def open(self, app: App, purpose: Purpose, user: str) -> Request | None: ...
    def opened(self, body: Any) -> str: ...
    def begin(self, app: App, purpose: Purpose, user: str, transaction: str) -> Request: ...
    def begun(self, body: Any) -> Begun: ...
    def finish(
        self, app: App, purpose: Purpose, user: str, handle: str, answer: dict[str, Any]
    ) -> Request: ...
    def proof(self, body: Any) -> str:
        """The nonce of a finish; "" where the dialect has none."""

    def claims(self, body: Any) -> dict[str, Any]:
        """What the answer of a finish says of the user."""

    def redeem(self, app: App, proof: str) -> Request: ...
    def receipt(self, body: Any) -> dict[str, Any]: ...


class Flex:
    """The native API with transactions."""

    name = "flex"

    def open(self, app: App, purpose: Purpose, user: str) -> Request | None:
        body = {"external_id": user}
        if purpose == "register":
            body["passkey_display_name"] = user
        return Request("POST", f"/v1/apps/{app.id}/transactions/{purpose}", body, "Authorization")

    def opened(self, body: Any) -> str:
        return str(body["transaction_id"])

    def begin(self, app: App, purpose: Purpose, user: str, transaction: str) -> Request:
        body = {"transaction_id": transaction} if transaction else {}
        return Request("POST", f"/v1/apps/{app.id}/{purpose}/transactions/webauthn/start", body)

    def begun(self, body: Any) -> Begun:
        handshake = body["handshake"]
        return Begun(handshake["id"], handshake["challenge"]["publicKey"])

    def finish(
        self, app: App, purpose: Purpose, user: str, handle: str, answer: dict[str, Any]
    ) -> Request:
        body = {"handshake_id": handle, "handshake_response": flex_wire_form(answer)}
        return Request("POST", f"/v1/apps/{app.id}/{purpose}/transactions/webauthn/finish", body)

    def proof(self, body: Any) -> str:
        return str(body["nonce"])

    def claims(self, body: Any) -> dict[str, Any]:
        return {}

    def redeem(self, app: App, proof: str) -> Request:
        path = f"/v1/apps/{app.id}/authenticate/verify"
        return Request("POST", path, {"nonce": proof}, "Authorization")

    def receipt(self, body: Any) -> dict[str, Any]:
        return {
            "user": body["external_id"],
            "credential": body["credential_id"],
            "purpose": body["purpose"],
        }


class Discoverable(Flex):
    """The native API's sign-in without a transaction; registrations as `Flex` has them."""

    name = "discoverable"

    def open(self, app: App, purpose: Purpose, user: str) -> Request | None:
        return super().open(app, purpose, user) if purpose == "register" else None


class Hanko(Flex):
    """Hanko's: the challenge finds the ceremony, and the token's `jti` is a nonce of the native
    API.
    """

    name = "hanko"

    def open(self, app: App, purpose: Purpose, user: str) -> Request | None:
        return None

    def begin(self, app: App, purpose: Purpose, user: str, transaction: str) -> Request:
        body = {"user_id": user}
        if purpose == "register":
            body["username"] = user
        path = f"/hanko/{app.id}/{self._path(purpose)}/initialize"
        return Request("POST", path, body, "apiKey")

    @staticmethod
    def _path(purpose: Purpose) -> str:
        return "registration" if purpose == "register" else "login"

    def begun(self, body: Any) -> Begun:
        return Begun("", body["publicKey"])

    def finish(
        self, app: App, purpose: Purpose, user: str, handle: str, answer: dict[str, Any]
    ) -> Request:
        path = f"/hanko/{app.id}/{self._path(purpose)}/finalize"
        return Request("POST", path, answer, "apiKey")

    def proof(self, body: Any) -> str:
        return str(_claims(body["token"])["jti"])

    def claims(self, body: Any) -> dict[str, Any]:
        found = _claims(body["token"])
        return {"user": found["sub"], "credential": found["cred"]}


class Passlock:
    """Passlock's, generation E."""

    name = "passlock"

    def open(self, app: App, purpose: Purpose, user: str) -> Request | None:
        body = {"rpId": RP_ID, "userId": user}
        if purpose == "register":
            body |= {"rpName": "Example", "username": user}
        path = f"/v2/{app.id}/passkey/{_LONG[purpose]}/authorize"
        return Request("POST", path, body, "Authorization")

    def opened(self, body: Any) -> str:
        return str(body.get("registrationToken") or body["authenticationToken"])

    def begin(self, app: App, purpose: Purpose, user: str, transaction: str) -> Request:
        path = f"/v2/{app.id}/passkey/{_LONG[purpose]}/options"
        return Request("POST", path, {f"{_LONG[purpose]}Token": transaction})

    def begun(self, body: Any) -> Begun:
        return Begun(body["sessionToken"], body["optionsJSON"])

    def finish(
        self, app: App, purpose: Purpose, user: str, handle: str, answer: dict[str, Any]
    ) -> Request:
        path = f"/v2/{app.id}/passkey/{_LONG[purpose]}/verification"
        return Request("POST", path, {"sessionToken": handle, "response": answer})

    def proof(self, body: Any) -> str:
        return str(body["code"])

    def claims(self, body: Any) -> dict[str, Any]:
        return {"user": body["principal"]["userId"]}

    def redeem(self, app: App, proof: str) -> Request:
        return Request("GET", f"/v2/{app.id}/principal/{proof}", None, "Authorization")

    def receipt(self, body: Any) -> dict[str, Any]:
        return {"user": body["userId"], "purpose": body["purpose"]}


class PropelAuth:
    """PropelAuth BYO's: the user finds the ceremony, and a finish has no proof."""

    name = "propelauth"

    def open(self, app: App, purpose: Purpose, user: str) -> Request | None:
        return None

    def opened(self, body: Any) -> str:
        raise AssertionError("this API opens no transactions")

    def begin(self, app: App, purpose: Purpose, user: str, transaction: str) -> Request:
        if purpose == "register":
            return _command("StartPasskeyRegistration", userId=user, emailOrUsername=user)
        return _command("StartPasskeyAuthentication", userId=user)

    def begun(self, body: Any) -> Begun:
        return Begun("", body.get("registrationOptions") or body["authenticationOptions"])

    def finish(
        self, app: App, purpose: Purpose, user: str, handle: str, answer: dict[str, Any]
    ) -> Request:
        command = f"FinishPasskey{_LONG[purpose].title()}"
        return _command(command, userId=user, publicKey=answer)

    def proof(self, body: Any) -> str:
        return ""

    def claims(self, body: Any) -> dict[str, Any]:
        return {}

    def redeem(self, app: App, proof: str) -> Request:
        raise AssertionError("this API hands out no nonces")

    def receipt(self, body: Any) -> dict[str, Any]:
        raise AssertionError("this API hands out no nonces")


def revoke(app: App, credential: str) -> Request:
    """Revoke one passkey, by its credential id."""
    return Request("DELETE", f"/hanko/{app.id}/credentials/{credential}", None, "apiKey")


def revoke_all(user: str) -> Request:
    """Revoke every passkey of a user."""
    return _command("DeregisterAllPasskeysForUser", userId=user)


def cancel(app: App, transaction: str) -> Request:
    path = f"/v1/apps/{app.id}/transactions/cancel"
    return Request("POST", path, {"transaction_id": transaction}, "Authorization")


def passkeys_of(app: App, user: str) -> Request:
    """A keyed read of a user's passkeys."""
    return Request("GET", f"/v1/apps/{app.id}/passkeys?external_id={user}", None, "Authorization")


def disable(app: App, user_id: str, *, disabled: bool = True) -> Request:
    """Disable a user, or enable them again."""
    verb = "disable" if disabled else "enable"
    return Request("POST", f"/v1/apps/{app.id}/users/{user_id}/{verb}", None, "Authorization")


def show_app(app: App) -> Request:
    """A keyed read."""
    return Request("GET", f"/v1/apps/{app.id}/passkeys?limit=1", None, "Authorization")


DIALECTS: tuple[Dialect, ...] = (Flex(), Discoverable(), Hanko(), Passlock(), PropelAuth())


def _command(command: str, **data: object) -> Request:
    body = {"command": command, "data": data}
    return Request("POST", "/propelauth/run-command", body, "Authorization")


def _claims(token: str) -> dict[str, Any]:
    """The claims of a JWT, unverified."""
    found: dict[str, Any] = orjson.loads(urlsafe_b64decode(token.split(".")[1] + "=="))
    return found

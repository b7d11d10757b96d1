"""A backend that speaks PropelAuth BYO's commands to a running broker, and reads answers as the
strictest of the vendor's clients.

    byo = Byo(wire) options = await byo.ok("StartPasskeyRegistration", userId="ann",
    emailOrUsername="ann@example.org")
    await byo.register("ann", device)                       # start and finish

Every answer passes `judge`: JSON and labelled so; a success is 200 with exactly the declared
fields; an error has a type that the command declares, with details exactly where the type has them
and of exactly their shape. The vendor's Java client fails on any field more and the Python client
on any field less.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Unpack

from tests.support.authenticator import Authenticator, Misbehaviour
from tests.support.wire import ORIGIN, Answer, Wire

PATH = "/propelauth/run-command"
JAVA = "Java-http-client/17.0.15"
_NONE: Mapping[str, type] = {}
SUCCESS: dict[str, Mapping[str, type]] = {
    "StartPasskeyRegistration": {"registrationOptions": dict},
    "FinishPasskeyRegistration": _NONE,
    "StartPasskeyAuthentication": {"authenticationOptions": dict},
    "FinishPasskeyAuthentication": _NONE,
    "FetchAllPasskeysForUser": {"passkeys": list},
    "DeregisterPasskey": _NONE,
    "DeregisterAllPasskeysForUser": _NONE,
    "Ping": {"timestamp": int},
}
ERRORS: dict[str, set[str]] = {
    "StartPasskeyRegistration": {"CannotParseAdditionalAllowedOrigin", "TooManyPasskeys"},
    "FinishPasskeyRegistration": {
        "CannotParseAdditionalAllowedOrigin",
        "NoRegistrationChallengeFound",
        "OriginNotAllowed",
        "PasskeyForUserAlreadyExists",
    },
    "StartPasskeyAuthentication": {
        "CannotParseAdditionalAllowedOrigin",
        "NoPasskeysRegisteredForUser",
    },
    "FinishPasskeyAuthentication": {
        "CannotParseAdditionalAllowedOrigin",
        "NoAuthenticationChallengeFound",
        "OriginNotAllowed",
    },
    "DeregisterPasskey": {"PasskeyNotFound"},
}
KEY_ERRORS = {"NoIntegrationKeyFoundInHeader", "InvalidPrefix", "IntegrationKeyNotFound"}
COUNTS: dict[str, type] = {"max_passkeys": int, "current_count": int}
DETAILS: dict[str, type | dict[str, type]] = {
    "UnexpectedError": str,
    "InvalidPrefix": str,
    "OriginNotAllowed": {"message": str},
    "TooManyPasskeys": COUNTS | {"maxPasskeys": int, "currentCount": int},
}


def _exact(value: Any, fields: Mapping[str, type]) -> None:
    assert isinstance(value, dict), value
    assert {name: type(found) for name, found in value.items()} == dict(fields)


def judge(answer: Answer, command: str, *, java: bool = False) -> None:
    """Fail unless every one of the vendor's clients takes the answer to `command` ("" where none
    was understood).
    """
    assert answer.headers["Content-Type"].startswith("application/json")
    body = answer.json
    if answer.status == 200:
        _exact(body, SUCCESS[command])
        for item in body.get("passkeys", []):
            assert {"credentialId"} <= set(item) <= {"credentialId", "displayName"}
            assert all(isinstance(value, str) for value in item.values())
        return
    assert answer.status >= 400
    kind = body["type"]
    assert kind in ERRORS.get(command, set()) | KEY_ERRORS | {"UnexpectedError"}, body
    details = DETAILS.get(kind)
    if details is None:
        assert set(body) == {"type"}
    elif isinstance(details, dict):
        _exact(body, {"type": str, "details": dict})
        _exact(body["details"], COUNTS if java and kind == "TooManyPasskeys" else details)
    else:
        _exact(body, {"type": str, "details": details})


@dataclass(slots=True)
class Byo:
    """The backend of `wire`'s app."""

    wire: Wire

    async def send(
        self, body: object, *, headers: Mapping[str, str] | None = None, data: bytes | None = None
    ) -> Answer:
        """One request, with the app's key unless `headers` has another."""
        given = {"Authorization": f"Bearer {self.wire.key}", **(headers or {})}
        return await self.wire.send(
            "POST", self.wire.url + PATH, json=body, data=data, headers=given
        )

    async def run(self, command: str, *, agent: str = "node", **data: object) -> Answer:
        answer = await self.send({"command": command, "data": data}, headers={"User-Agent": agent})
        judge(answer, command, java=agent.startswith("Java"))
        return answer

    async def ok(self, command: str, **data: Any) -> Any:
        answer = await self.run(command, **data)
        assert answer.status == 200, answer.body
        return answer.json

    async def refused(self, status: int, kind: str, command: str, **data: Any) -> Any:
        """The details of an error that must come."""
        answer = await self.run(command, **data)
        assert (answer.status, answer.json["type"]) == (status, kind), answer.body
        return answer.json.get("details")

    async def begin_registration(self, user: str, **more: object) -> dict[str, Any]:
        data = {"userId": user, "emailOrUsername": f"{user[:99]}@example.org", **more}
        options: dict[str, Any] = (await self.ok("StartPasskeyRegistration", **data))[
            "registrationOptions"
        ]
        return options

    async def begin_authentication(self, user: str) -> dict[str, Any]:
        answer = await self.ok("StartPasskeyAuthentication", userId=user)
        options: dict[str, Any] = answer["authenticationOptions"]
        return options

    async def register(
        self, user: str, device: Authenticator, **misbehaviour: Unpack[Misbehaviour]
    ) -> str:
        """A whole registration; the credential id."""
        made = device.register(await self.begin_registration(user), ORIGIN, **misbehaviour)
        assert await self.ok("FinishPasskeyRegistration", userId=user, publicKey=made) == {}
        return str(made["id"])

    async def authenticate(
        self, user: str, device: Authenticator, **misbehaviour: Unpack[Misbehaviour]
    ) -> None:
        answer = device.authenticate(await self.begin_authentication(user), ORIGIN, **misbehaviour)
        assert await self.ok("FinishPasskeyAuthentication", userId=user, publicKey=answer) == {}

    async def passkeys(self, user: str) -> list[dict[str, str]]:
        listed: list[dict[str, str]] = (await self.ok("FetchAllPasskeysForUser", userId=user))[
            "passkeys"
        ]
        return listed

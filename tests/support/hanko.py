"""A tenant's backend and page that speak Hanko's Passkey API to a running broker, and read answers
as its SDK does.

    hanko = Hanko(wire) options = await hanko.ok("/registration/initialize", {"user_id": "ann",
    "username": "ann@example.org"})
    claims = await hanko.register("ann", device)            # initialize and finalize; the verified
                                                            token's claims

Every answer passes `judge`: a success is what the contract has; an error is JSON with `title`,
`details` and `status`, never empty, and says its length, for the SDK resolves to undefined where an
error has an empty body.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Unpack

import jwt

from tests.support.authenticator import Authenticator, Misbehaviour
from tests.support.wire import ORIGIN, Answer, Wire

REGISTRATION, LOGIN = "/registration", "/login"
SECOND_REGISTRATION, SECOND_LOGIN = "/mfa/registration", "/mfa/login"
TRANSACTION = "/transaction"
TENANT = "/hanko/{app_id}"
KEY_SETS = {
    ("GET", TENANT + "/.well-known/jwks.json"),
    ("OPTIONS", TENANT + "/.well-known/jwks.json"),
}
# What pages may call; on a port for keyed callers alone it needs a key.
PAGES = {
    (method, f"{TENANT}{path}")
    for method in ("POST", "OPTIONS")
    for path in (REGISTRATION + "/finalize", LOGIN + "/initialize", LOGIN + "/finalize")
}
KEYED = {
    ("POST", f"{TENANT}{REGISTRATION}/initialize"),
    *(
        ("POST", f"{TENANT}{at}/initialize")
        for at in (SECOND_REGISTRATION, SECOND_LOGIN, TRANSACTION)
    ),
    *(
        ("POST", f"{TENANT}{at}/finalize")
        for at in (SECOND_REGISTRATION, SECOND_LOGIN, TRANSACTION)
    ),
    ("GET", f"{TENANT}{TRANSACTION}/{{user_id}}"),
    ("GET", f"{TENANT}/credentials"),
    ("GET", f"{TENANT}/credentials/{{credential_id}}"),
    ("PATCH", f"{TENANT}/credentials/{{credential_id}}"),
    ("DELETE", f"{TENANT}/credentials/{{credential_id}}"),
    ("GET", f"{TENANT}/audit_logs"),
}
NO_CHALLENGE = "received challenge does not match with any stored one"


def judge(answer: Answer) -> None:
    """Fail unless the vendor's SDK takes the answer for what it is."""
    if answer.status == 204:
        assert answer.body == b""
        return
    assert answer.headers["Content-Type"].startswith("application/json")
    assert int(answer.headers["Content-Length"]) == len(answer.body) > 0
    body = answer.json
    if answer.status == 200:
        assert isinstance(body, dict | list)
        return
    assert {name: type(value) for name, value in body.items()} == {
        "title": str,
        "details": str,
        "status": int,
    }
    assert body["title"], body
    assert body["status"] == answer.status >= 400


@dataclass(slots=True)
class Hanko:
    """The backend of `wire`'s app, and its page."""

    wire: Wire

    @property
    def base(self) -> str:
        return f"{self.wire.url}/hanko/{self.wire.app_id}"

    async def send(
        self,
        method: str,
        path: str,
        json: object = None,
        *,
        key: str | None = None,
        data: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        """One request to a path below the tenant; with the tenant's key unless `key` is another
        ("": none).
        """
        given = {**({} if key == "" else {"apiKey": key or self.wire.key}), **(headers or {})}
        answer = await self.wire.send(method, self.base + path, json=json, data=data, headers=given)
        judge(answer)
        return answer

    async def page(
        self,
        path: str,
        json: object = None,
        *,
        data: bytes | None = None,
        origin: str | None = ORIGIN,
    ) -> Answer:
        """As a page: POST without a key."""
        headers = {"Origin": origin} if origin else {}
        return await self.send("POST", path, json, data=data, key="", headers=headers)

    async def ok(self, path: str, json: object = None) -> Any:
        return (await self.send("POST", path, json)).of(200)

    async def get(self, path: str) -> Any:
        answer = await self.send("GET", path)
        assert answer.status == 200, answer.body
        return answer.json

    async def refused(
        self, status: int, title: str, path: str, json: object = None, **how: Any
    ) -> str:
        """The details of an error that must come."""
        answer = await self.send(how.pop("method", "POST"), path, json, **how)
        assert (answer.status, answer.json["title"]) == (status, title), answer.body
        return str(answer.json["details"])

    # -- ceremonies --------------------------------------------------------------------------------

    async def begin_registration(
        self, user: str, *, at: str = REGISTRATION, **more: object
    ) -> dict[str, Any]:
        body = {"user_id": user, "username": f"{user[:99]}@example.org", **more}
        options: dict[str, Any] = (await self.ok(at + "/initialize", body))["publicKey"]
        return options

    async def begin(self, at: str = LOGIN, **body: object) -> dict[str, Any]:
        """A login, discoverable without a `user_id`, or with `at` another ceremony."""
        options: dict[str, Any] = (await self.ok(at + "/initialize", body))["publicKey"]
        return options

    async def finish(self, at: str, answer: object) -> dict[str, Any]:
        """The claims of the token that a finalize gives."""
        return await self.claims((await self.ok(at + "/finalize", answer))["token"])

    async def register(
        self,
        user: str,
        device: Authenticator,
        *,
        at: str = REGISTRATION,
        **how: Unpack[Misbehaviour],
    ) -> dict[str, Any]:
        made = device.register(await self.begin_registration(user, at=at), ORIGIN, **how)
        return await self.finish(at, made)

    async def login(
        self,
        device: Authenticator,
        *,
        at: str = LOGIN,
        user: str | None = None,
        **how: Unpack[Misbehaviour],
    ) -> dict[str, Any]:
        options = await self.begin(at, **({"user_id": user} if user is not None else {}))
        return await self.finish(at, device.authenticate(options, ORIGIN, **how))

    async def claims(self, token: str) -> dict[str, Any]:
        """The claims of a token, verified with the published keys."""
        keys = jwt.PyJWKSet.from_dict(await self.get("/.well-known/jwks.json"))
        head = jwt.get_unverified_header(token)
        found: dict[str, Any] = jwt.decode(
            token, keys[head["kid"]], [head["alg"]], audience="example.org", leeway=3600
        )
        return found

    async def credentials(self, user: str) -> list[dict[str, Any]]:
        listed: list[dict[str, Any]] = await self.get(f"/credentials?user_id={user}")
        return listed

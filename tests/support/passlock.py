"""A backend and a page that speak Passlock's API to a running broker, and read answers as strictly
as its two SDKs.

    passlock = Passlock(wire)                               # generation E; Passlock(wire,
                                                            prefix="") for the unprefixed paths
    done = await passlock.register("ann", device)           # authorize, options, verification:
                                                            {principal, id_token, code}
    who = await passlock.exchange(done["code"])

Every answer passes `judge`. The vendor's server SDK decodes by schema: a required field that is
missing, another type, a null anywhere but in `cursor` and `metadata`, breaks it. Its browser SDK
reads an error's body only if the content type is exactly `application/json`, and adds members of
its own to a success. So these are looked at in every answer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Unpack

from tests.dialects.passlock import contract
from tests.dialects.passlock.contract import AUTHENTICATION_OPTIONS, REGISTRATION_OPTIONS
from tests.support.authenticator import Authenticator, Misbehaviour
from tests.support.shapes import fits
from tests.support.wire import ORIGIN, RP_ID, Answer, Wire

_NEW, _OLD = "/v2/{app_id}", "/{app_id}"
_AUTHORIZED: dict[str, object] = {"rpId": RP_ID, "userId": "ann", "username": "ann"}
KEYED: dict[tuple[str, str], dict[str, object] | None] = {
    ("POST", f"{_NEW}/passkey/{kind}/{verb}"): _AUTHORIZED
    for kind in ("registration", "authentication")
    for verb in ("authorize", "prepare")
}
KEYED |= {
    ("POST", f"{_NEW}/passkeys/update"): {"userId": "ann", "username": "ann"},
    ("POST", f"{_NEW}/passkeys/delete"): {"userId": "ann"},
    ("POST", f"{_NEW}/passkeys/prune"): {"userId": "ann"},
}
for _tenancy in (_NEW, _OLD):
    KEYED |= {
        ("GET", f"{_tenancy}/principal/{{code}}"): None,
        ("POST", f"{_tenancy}/principal/{{code}}"): {"userId": "ann"},
        ("GET", f"{_tenancy}/passkeys/"): None,
        ("GET", f"{_tenancy}/passkeys/{{passkey_id}}"): None,
        ("PATCH", f"{_tenancy}/passkeys/{{passkey_id}}"): {"userId": "ann", "username": "ann"},
        ("DELETE", f"{_tenancy}/passkeys/{{passkey_id}}"): None,
        ("PATCH", f"{_tenancy}/users/{{user_id}}/passkeys/"): {"username": "ann"},
        ("DELETE", f"{_tenancy}/users/{{user_id}}/passkeys/"): {"userId": "ann"},
        ("POST", f"{_tenancy}/challenges"): {"email": "ann@example.org", "purpose": "login"},
        ("POST", f"{_tenancy}/challenges/verify"): {
            "challengeId": "x",
            "secret": "x",
            "code": "000000",
        },
        ("GET", f"{_tenancy}/challenges/{{challenge_id}}"): None,
        ("DELETE", f"{_tenancy}/challenges/{{challenge_id}}"): None,
    }
_STEPS: dict[str, dict[str, object]] = {
    f"/passkey/{kind}/{step}": {field: "x", "response": {}}
    for kind in ("registration", "authentication")
    for step, field in (("options", f"{kind}Token"), ("verification", "sessionToken"))
}
POSTS: dict[str, dict[str, object]] = {
    **{tenancy + path: body for tenancy in (_NEW, _OLD) for path, body in _STEPS.items()},
    **{
        f"{_NEW}/passkeys/{kind}/exchange": {f"{kind}PasskeysToken": "x"}
        for kind in ("update", "delete", "prune")
    },
}
GETS = {f"{_OLD}/credential/{{passkey_id}}", f"{_OLD}/credentials/{{passkey_ids}}"}
PAGES = (
    {("POST", path) for path in POSTS}
    | {("GET", path) for path in GETS}
    | {("OPTIONS", path) for path in {*POSTS, *GETS}}
)
KEY_SETS = {("GET", "/v2/.well-known/jwks.json"), ("GET", "/.well-known/jwks.json")}
ICONS = {("GET", "/aaguid/{aaguid}/icon.svg")}
# The same paths with an id that can't be a tenancy's, for any method.
NOT_OF_KEYS = {("*", path) for _, path in KEYED}
NOT_OF_PAGES = {("*", path) for _, path in PAGES}

ADDED_BY_THE_SDK = {"success", "failure", "value", "error"}
MAY_BE_NULL = {"cursor", "metadata"}
# Successes by their tag, and of those without a tag the ceremonies' options, by path.
OPTIONS = {
    "/passkey/registration/options": REGISTRATION_OPTIONS,
    "/passkey/authentication/options": AUTHENTICATION_OPTIONS,
}
SHAPES: dict[str, object] = {
    tag: shape
    for answers in contract.ANSWERS.values()
    for status, shape in answers.items()
    if status < 300 and isinstance(shape, dict) and "_tag" in shape
    for tag in shape["_tag"].words
}
ERRORS = {
    "@error/BadRequest",
    "@error/Forbidden",
    "@error/NotFound",
    "@error/InvalidCode",
    "@error/PasskeyNotFound",
    "@error/InvalidChallenge",
    "@error/InvalidChallengeCode",
    "@error/ChallengeExpired",
    "@error/ChallengeAttemptsExceeded",
    "@error/ChallengeRateLimited",
    "@error/InternalServerError",
    "@error/ServiceUnavailable",
}


def filled(template: str, wire: Wire) -> str:
    """A route's URL, with an id that nobody has in every place but the tenancy's."""
    path = template.replace("{app_id}", wire.app_id)
    return wire.url + re.sub(r"\{[a-z_]+\}", "x" * 24, path)


def judge(answer: Answer, shape: object = None) -> None:
    """Fail unless both SDKs take the answer; `shape` for a success without a tag."""
    assert answer.headers["Content-Type"] == "application/json", answer.headers
    body = answer.json
    assert isinstance(body, dict), answer.body
    assert not ADDED_BY_THE_SDK & set(body)
    _no_nulls(body)
    if answer.status < 300:
        fits(body, shape or SHAPES[body["_tag"]])
        return
    assert answer.status >= 400
    assert body["_tag"] in ERRORS, body
    assert isinstance(body["message"], str)
    assert body["message"]
    extra = set(body) - {"_tag", "message"}
    assert extra == {
        "@error/PasskeyNotFound": {"credentialId", "rpId"},
        "@error/ChallengeRateLimited": {"retryAfterSeconds"},
    }.get(body["_tag"], set())


def _no_nulls(value: Any) -> None:
    for name, item in value.items() if isinstance(value, dict) else enumerate(value):
        assert item is not None or name in MAY_BE_NULL, name
        if isinstance(item, dict | list):
            _no_nulls(item)


@dataclass(slots=True)
class Passlock:
    """The backend and the page of `wire`'s app. `prefix` is "/v2", or "" for clients of the
    unprefixed paths.
    """

    wire: Wire
    prefix: str = "/v2"

    @property
    def base(self) -> str:
        return f"{self.wire.url}{self.prefix}/{self.wire.app_id}"

    async def keyed(
        self,
        method: str,
        path: str,
        json: object = None,
        *,
        key: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        """As the backend."""
        bearer = {"Authorization": f"Bearer {self.wire.key if key is None else key}"}
        headers = {**bearer, **(headers or {})}
        answer = await self.wire.send(method, self.base + path, json=json, headers=headers)
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
        """As the page: POST."""
        headers = {"Accept": "application/json", **({"Origin": origin} if origin else {})}
        answer = await self.wire.send(
            "POST", self.base + path, json=json, data=data, headers=headers
        )
        judge(answer, OPTIONS.get(path))
        if origin is not None and "Forbidden" not in answer.json.get("_tag", ""):
            assert answer.headers["Access-Control-Allow-Origin"] == origin
        return answer

    async def ok(self, method: str, path: str, json: object = None) -> Any:
        answer = await self.keyed(method, path, json)
        assert answer.status < 300, answer.body
        return answer.json

    async def page_ok(self, path: str, json: object) -> Any:
        return (await self.page(path, json)).of(200)

    # -- the backend -------------------------------------------------------------------------------

    async def authorize_registration(self, user: str, **more: object) -> str:
        body = {
            "rpId": RP_ID,
            "rpName": "Example",
            "userId": user,
            "username": f"{user}@example.org",
            **more,
        }
        done = await self.ok("POST", "/passkey/registration/authorize", body)
        return str(done["registrationToken"])

    async def authorize_authentication(self, user: str | None = None, **more: object) -> str:
        """Of a user; discoverable where neither user nor `allowCredentials` is given."""
        body: dict[str, object] = {"rpId": RP_ID, **({"userId": user} if user else {}), **more}
        if not user and "allowCredentials" not in more:
            body["discoverable"] = True
        done = await self.ok("POST", "/passkey/authentication/authorize", body)
        return str(done["authenticationToken"])

    async def exchange(self, code: str) -> Any:
        return await self.ok("GET", f"/principal/{code}")

    async def passkey(self, passkey_id: str) -> Any:
        return await self.ok("GET", f"/passkeys/{passkey_id}")

    # -- the page ----------------------------------------------------------------------------------

    async def begin(self, kind: str, body: object) -> tuple[str, dict[str, Any]]:
        """`kind` is "registration" or "authentication". Returns sessionToken and options."""
        begun = await self.page_ok(f"/passkey/{kind}/options", body)
        return begun["sessionToken"], begun["optionsJSON"]

    async def finish(self, kind: str, session: str, response: object) -> Answer:
        return await self.page(
            f"/passkey/{kind}/verification", {"sessionToken": session, "response": response}
        )

    async def run(
        self, kind: str, body: object, device: Authenticator, **misbehaviour: Unpack[Misbehaviour]
    ) -> Any:
        """Options and verification with what authorises them; the success."""
        session, options = await self.begin(kind, body)
        make = device.register if kind == "registration" else device.authenticate
        answer = await self.finish(kind, session, make(options, ORIGIN, **misbehaviour))
        return answer.of(200)

    async def register(
        self, user: str, device: Authenticator, **misbehaviour: Unpack[Misbehaviour]
    ) -> Any:
        """A whole registration, backend and page; {principal, id_token, code}."""
        body = {"registrationToken": await self.authorize_registration(user)}
        return await self.run("registration", body, device, **misbehaviour)

    async def authenticate(
        self, user: str | None, device: Authenticator, **misbehaviour: Unpack[Misbehaviour]
    ) -> Any:
        """A whole authentication, discoverable without a user."""
        body = {"authenticationToken": await self.authorize_authentication(user)}
        return await self.run("authentication", body, device, **misbehaviour)

    async def user(self, user: str, device: Authenticator) -> str:
        """A user with a passkey; its id."""
        return str((await self.register(user, device))["principal"]["authenticatorId"])

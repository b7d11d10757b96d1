"""The vendor's own clients for PropelAuth BYO, unmodified: the Python one in this process, the Node
one in a process of its own.

Both are called alike, by the wire's names, so that one test runs through both:

    outcome = await client.call("startRegistration", userId="ann",
    emailOrUsername="ann@example.org") outcome.data["registrationOptions"]; outcome.error["type"]

What the Python client gives back as dataclasses is checked to be of the class that its method
declares for that type, and shown as the JSON it stands for. `browser_library` bundles what the
vendor's documentation has pages use.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass, is_dataclass
from typing import Any, Protocol

from propelauth_byo import create_client, is_ok

from tests.sdk.node import Script, bundled

OPERATIONS = {
    "startRegistration": "StartPasskeyRegistration",
    "finishRegistration": "FinishPasskeyRegistration",
    "startAuthentication": "StartPasskeyAuthentication",
    "finishAuthentication": "FinishPasskeyAuthentication",
    "fetchAllPasskeysForUser": "FetchAllPasskeysForUser",
    "deregisterPasskey": "DeregisterPasskey",
    "deregisterAllPasskeysForUser": "DeregisterAllPasskeysForUser",
    "ping": "Ping",
}
_ONE_CLASS = {"FetchAllPasskeysForUser", "DeregisterAllPasskeysForUser", "Ping"}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a client gave back; one of the two is None."""

    data: Any = None
    error: Any = None


class Client(Protocol):
    async def call(self, method: str, **arguments: object) -> Outcome: ...


def _snake(name: str) -> str:
    return re.sub(r"[A-Z]", lambda found: "_" + found[0].lower(), name)


def _camel(name: str) -> str:
    return re.sub(r"_([a-z])", lambda found: found[1].upper(), name)


def _plain(value: Any) -> Any:
    """Dataclasses as JSON: camelCase names, nothing for None."""
    if is_dataclass(value) and not isinstance(value, type):
        return {
            _camel(k): _plain(getattr(value, k))
            for k in asdict(value)
            if getattr(value, k) is not None
        }
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value


class PythonClient:
    """`propelauth_byo`."""

    def __init__(self, url: str, key: str) -> None:
        self._client = create_client(url=url, integration_key=key)

    async def call(self, method: str, **arguments: object) -> Outcome:
        of = self._client if method == "ping" else self._client.passkeys
        result = await getattr(of, _snake(method))(**{_snake(k): v for k, v in arguments.items()})
        operation = OPERATIONS[method]
        if is_ok(result):
            assert type(result.data).__name__ == f"{operation}Response"
            return Outcome(data=_plain(result.data))
        error = result.error
        variant = "" if operation in _ONE_CLASS else error.type
        assert type(error).__name__ == f"{operation}Error{variant}"
        return Outcome(error=_plain(error))


@dataclass(slots=True)
class NodeClient:
    """`@propelauth/byo-node` behind byo.mjs."""

    script: Script

    @classmethod
    @contextlib.asynccontextmanager
    async def open(cls, url: str, key: str) -> AsyncIterator[NodeClient]:
        """Start Node, end it afterwards.

        Raises:
            MissingPart: Node, or a package of tests/sdk, is not there.
        """
        async with Script.open(
            "byo.mjs", url, key, packages={"@propelauth/byo-node": "1.0.4"}
        ) as script:
            yield cls(script)

    async def call(self, method: str, **arguments: object) -> Outcome:
        result = await self.script.ask({"method": method, "argument": arguments})
        return Outcome(data=result["data"]) if result["ok"] else Outcome(error=result["error"])


def browser_library() -> bytes:
    """`@simplewebauthn/browser` as one ES module."""
    return bundled("@simplewebauthn/browser")

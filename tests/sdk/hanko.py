"""The vendor's own Node SDK for Hanko's Passkey API, unmodified, in a process of its own; and the
library that its pages use.

async with Sdk.open(url, tenant_id, key) as sdk:
    options = await sdk.ok("login.initialize")
    error = await sdk.fails("login.finalize", answer)              # what the SDK throws
    listed = await sdk.ok("user(ann).credentials")
    claims = await sdk.verified(token, "example.org")              # jose, with the keys that the
                                                                   broker publishes
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from tests.sdk.node import Script, bundled

_VERSIONS = {"@teamhanko/passkeys-sdk": "0.2.1", "@github/webauthn-json": "2.1.1"}


def _step(text: str) -> str | list[str]:
    """`user(ann)` as a call on the way."""
    found = re.fullmatch(r"(\w+)\((.*)\)", text)
    return [found[1], found[2]] if found else text


@dataclass(slots=True)
class Sdk:
    """`@teamhanko/passkeys-sdk` behind hanko.mjs."""

    script: Script

    @classmethod
    @contextlib.asynccontextmanager
    async def open(cls, url: str, tenant_id: str, key: str) -> AsyncIterator[Sdk]:
        """Start Node, end it afterwards. `url` is what stands before the tenant's id.

        Raises:
            MissingPart: Node, or a package of tests/sdk, is not there.
        """
        async with Script.open("hanko.mjs", url, tenant_id, key, packages=_VERSIONS) as script:
            yield cls(script)

    async def call(self, method: str, *arguments: object) -> dict[str, Any]:
        """`{ok, data}` or `{ok, error: {message, originalError}}`. The SDK resolves to undefined
        where an error has no body.
        """
        path = [_step(step) for step in re.split(r"\.(?![^(]*\))", method)]
        result = await self.script.ask({"path": path, "arguments": arguments})
        assert not result.get("undefined"), "the SDK took an error for success"
        return result

    async def ok(self, method: str, *arguments: object) -> Any:
        result = await self.call(method, *arguments)
        assert result["ok"], result
        return result["data"]

    async def fails(self, method: str, *arguments: object) -> dict[str, Any]:
        """The `originalError` that the SDK throws with."""
        result = await self.call(method, *arguments)
        assert not result["ok"], result
        error = result["error"]
        assert error["message"] == "Request failed: " + json.dumps(
            error["originalError"], separators=(",", ":"), ensure_ascii=False
        )
        original: dict[str, Any] = error["originalError"]
        return original

    async def verified(self, token: str, audience: str) -> dict[str, Any]:
        """`{payload, protectedHeader}`, or `{code}` of jose's error."""
        result = await self.script.ask({"verify": token, "audience": audience})
        found: dict[str, Any] = (
            result["data"] if result["ok"] else {"code": result["error"]["code"]}
        )
        return found


def browser_library() -> bytes:
    """`@github/webauthn-json` as one ES module."""
    return bundled("@github/webauthn-json")

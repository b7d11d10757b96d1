"""Passlock: a registration and a login, and what its errors look like."""

from __future__ import annotations

from tests.support.authenticator import Authenticator
from tests.support.passlock import Passlock
from tests.support.passlock import judge as judge
from tests.support.wire import Wire

WORD = "_tag"
KEYED = ("/v2/{app_id}", "/passkeys/prune")


def key(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}


async def register(wire: Wire, user: str, device: Authenticator) -> None:
    await Passlock(wire).register(user, device)


async def sign_in(wire: Wire, user: str | None, device: Authenticator) -> str:
    passlock = Passlock(wire)
    done = await passlock.authenticate(user, device)
    principal = await passlock.exchange(done["code"])
    assert principal["userId"] == done["principal"]["userId"]
    return str(principal["userId"])


async def page_signs_in(wire: Wire, user: str | None, device: Authenticator) -> str:
    """Its older clients, which begin without a backend."""
    assert user is None
    done = await Passlock(wire, "").run("authentication", {}, device)
    return str(done["principal"]["userId"])


BY_NAME = {"passlock": sign_in}
WITHOUT = {"passlock": sign_in, "passlock-page": page_signs_in}

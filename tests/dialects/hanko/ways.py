"""Hanko: a registration and a login, and what its errors look like."""

from __future__ import annotations

from tests.support.authenticator import Authenticator
from tests.support.hanko import Hanko
from tests.support.hanko import judge as judge
from tests.support.wire import Wire

WORD = "title"
KEYED = ("/hanko/{app_id}", "/registration/initialize")


def key(secret: str) -> dict[str, str]:
    return {"apiKey": secret}


async def register(wire: Wire, user: str, device: Authenticator) -> None:
    await Hanko(wire).register(user, device)


async def sign_in(wire: Wire, user: str | None, device: Authenticator) -> str:
    claims = await Hanko(wire).login(device, user=user)
    assert claims["purpose"] == "authenticate"
    return str(claims["sub"])


BY_NAME = {"hanko": sign_in}
WITHOUT = {"hanko": sign_in}

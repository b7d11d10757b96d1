"""The Flex API: a registration and a login, and what its errors look like."""

from __future__ import annotations

from tests.dialects.flex.contract import ERROR, strict
from tests.support.authenticator import Authenticator
from tests.support.wire import Answer, Wire

WORD = "code"
KEYED = ("/v1/apps/{app_id}", "/transactions/register")


def key(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}


def judge(answer: Answer) -> None:
    strict(answer.json, ERROR)


async def register(wire: Wire, user: str, device: Authenticator) -> None:
    nonce = await wire.register(await wire.open_registration(user), device)
    assert (await wire.redeem(nonce, purpose="register")).status == 200


async def sign_in(wire: Wire, user: str | None, device: Authenticator) -> str:
    transaction = await wire.open_authentication(user) if user else None
    receipt = await wire.redeem(
        await wire.authenticate(transaction, device), purpose="authenticate"
    )
    return str(receipt.json["external_id"])


BY_NAME = {"flex": sign_in}
WITHOUT = {"flex": sign_in}

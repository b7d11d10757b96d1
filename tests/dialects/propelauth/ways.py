"""PropelAuth BYO: a registration and a login, and what its errors look like."""

from __future__ import annotations

from tests.support.authenticator import Authenticator
from tests.support.byo import Byo
from tests.support.byo import judge as judge_command
from tests.support.wire import Answer, Wire

WORD = "type"
KEYED = ("/propelauth", "/run-command")


def key(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}


def judge(answer: Answer) -> None:
    judge_command(answer, "")


async def register(wire: Wire, user: str, device: Authenticator) -> None:
    await Byo(wire).register(user, device)


async def sign_in(wire: Wire, user: str | None, device: Authenticator) -> str:
    assert user is not None
    await Byo(wire).authenticate(user, device)
    return user


BY_NAME = {"propelauth": sign_in}
WITHOUT: dict[str, object] = {}

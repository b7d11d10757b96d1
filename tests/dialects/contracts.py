"""What each vendor's clients take for an answer: a module a vendor, written from the vendor's
contract and not from our code.

    ANSWERS      by call (method and path, or PropelAuth's command) and status: the shape of the
                 body
    EVERYWHERE   by status: what any call may be answered with
    call         a request of a golden file in the words of `ANSWERS`

`tests/dialects/test_contracts.py` reads every golden file by them; the vendors' stand-ins
(`tests.support.passlock` and its siblings) read running answers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib import import_module
from types import ModuleType
from typing import Any

from broker.dialects import DIALECTS

CONTRACTS: Mapping[str, ModuleType] = {
    dialect.name: import_module(f"tests.dialects.{dialect.name}.contract") for dialect in DIALECTS
}
_EVERYWHERE = ""


def place(contract: ModuleType, request: Mapping[str, Any], status: int) -> tuple[str, int] | None:
    """Where `contract` has the shape of an answer to this request: a call that has the status, the
    one with the fewest parameters first; else `EVERYWHERE`, whose call is "". None where it has
    none."""
    asked = contract.call(request["method"], request["path"].partition("?")[0], request["body"])
    fitting = [
        call for call in contract.ANSWERS if re.fullmatch(re.sub(r"\{\w+\}", "[^/]+", call), asked)
    ]
    for call in sorted(fitting, key=lambda call: call.count("{"))[:1]:
        if status in contract.ANSWERS[call]:
            return call, status
    return (_EVERYWHERE, status) if status in contract.EVERYWHERE else None


def shape(contract: ModuleType, at: tuple[str, int]) -> object:
    """The shape at a place."""
    call, status = at
    answers: Mapping[int, object] = contract.ANSWERS[call] if call else contract.EVERYWHERE
    return answers[status]


def places(contract: ModuleType) -> set[tuple[str, int]]:
    """Where the contract has shapes."""
    found = {(call, status) for call, answers in contract.ANSWERS.items() for status in answers}
    return found | {(_EVERYWHERE, status) for status in contract.EVERYWHERE}

"""How each dialect registers and signs in, and what its errors look like: a module a dialect,
`tests/dialects/<name>/ways.py`.

    WORD             the field of an error that says which error it is
    KEYED            a request with a key: the place, and the path below it
    key              the headers with a key
    judge            fail unless the vendor's strictest client reads the answer as an error
    register         a whole registration of a user
    BY_NAME, WITHOUT sign-ins of a user who is named, and of a user who is not; each returns the
                     external id that it proves
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from importlib import import_module
from types import ModuleType

from broker.dialects import DIALECTS
from tests.support.authenticator import Authenticator
from tests.support.wire import Wire

Register = Callable[[Wire, str, Authenticator], Awaitable[object]]
SignIn = Callable[[Wire, str | None, Authenticator], Awaitable[str]]

WAYS: Mapping[str, ModuleType] = {
    dialect.name: import_module(f"tests.dialects.{dialect.name}.ways") for dialect in DIALECTS
}
REGISTER: dict[str, Register] = {name: way.register for name, way in WAYS.items()}
BY_NAME: dict[str, SignIn] = {k: v for way in WAYS.values() for k, v in way.BY_NAME.items()}
WITHOUT: dict[str, SignIn] = {k: v for way in WAYS.values() for k, v in way.WITHOUT.items()}

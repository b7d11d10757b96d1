"""The client as source: its synchronous half is what its asynchronous half makes, and its version
is the server's.
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, get_origin, get_type_hints

import pytest

from broker import __version__, errors
from broker.sdk import passkey_broker as sdk
from broker.sdk.passkey_broker import AsyncBrokerClient, BrokerClient
from broker.sdk.passkey_broker.errors import BY_CODE
from tests.support.sync_client import PACKAGE, generated


def test_the_synchronous_client_is_generated() -> None:
    """What is committed is what `tests/support/sync_client.py` writes, and nothing besides."""
    made = generated()
    for path, text in made.items():
        assert path.read_text() == text, (
            f"run python tests/support/sync_client.py: {path.name} is not what it makes"
        )
    assert set((PACKAGE / "_sync").glob("*.py")) == made.keys()


def methods(client: type) -> dict[str, Callable[..., Any]]:
    return {
        name: function
        for name, function in inspect.getmembers(client, inspect.isfunction)
        if not name.startswith("_")
    }


def test_both_clients_have_the_same_methods() -> None:
    """Same names, arguments and results; every public method says in its docstring what it does."""
    blocking, waiting = methods(BrokerClient), methods(AsyncBrokerClient)
    assert blocking.keys() == waiting.keys()
    assert len(blocking) > 35
    for name, function in blocking.items():
        assert function.__doc__, name
        mine, other = inspect.signature(function), inspect.signature(waiting[name])
        assert mine.parameters == other.parameters, name
        result = get_type_hints(waiting[name])["return"]
        if get_origin(result) is AsyncIterator:
            assert get_origin(get_type_hints(function)["return"]) is Iterator
            assert inspect.isgeneratorfunction(function)
        else:
            assert inspect.iscoroutinefunction(waiting[name])
            assert not inspect.iscoroutinefunction(function)
            assert get_type_hints(function)["return"] == result, name


def test_its_version_is_the_servers() -> None:
    assert sdk.__version__ == __version__


# Codes that a keyed caller never meets, or about which a backend has nothing to decide.
PLAIN = {
    "conflict": "command line",
    "invalid_setting": "command line",
    "idempotency_key_reused": "a fault of the client",
    "internal_server_error": "a status from 500",
    "service_unavailable": "a status from 500",
    "operation_not_allowed": "pages",
    "ticket_not_found": "pages",
    "method_not_allowed": "a fault of the client",
    "not_found": "a fault of the client",
    "request_timeout": "nothing to decide",
    "request_too_large": "nothing to decide",
    "unsupported_media_type": "a fault of the client",
}


CODES = {
    kind.code
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, errors.Refusal) and "code" in vars(kind)
}


@pytest.mark.parametrize("code", sorted(CODES))
def test_every_refusal_has_a_class(code: str) -> None:
    """Or is named above."""
    assert (code in BY_CODE) != (code in PLAIN), code


def test_no_class_is_for_a_code_that_is_no_more() -> None:
    assert BY_CODE.keys() | PLAIN.keys() <= CODES

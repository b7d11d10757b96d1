"""`deploy/.env.example`: every setting, each with a value that the broker takes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields

from broker.dialects import DIALECTS, load_settings
from broker.settings import PREFIX, Settings
from tests.support.load_balancers import DEPLOY

STORES = {"BROKER_DATABASE_URL": "postgresql://db/x", "BROKER_REDIS_URL": "redis://r"}
DECLARED = [setting for dialect in DIALECTS for setting in dialect.settings]


def lines() -> Iterator[tuple[bool, str, str]]:
    """Whether the setting is set, its variable, its value."""
    line = re.compile(r"(#?)(BROKER_[A-Z_]+)=(.*)")
    for text in (DEPLOY / ".env.example").read_text().splitlines():
        if found := line.fullmatch(text):
            yield not found[1], found[2], found[3]


def values_of(settings: Settings) -> list[object]:
    core = [getattr(settings, f.name) for f in fields(Settings) if f.metadata]
    return [*core, *(settings[each] for each in DECLARED)]


def test_it_has_every_setting() -> None:
    core = {f.name: f for f in fields(Settings) if f.metadata}
    names = {PREFIX + name.upper() for name in (*core, *(each.name for each in DECLARED))}
    files = {f"{PREFIX}{name.upper()}_FILE" for name, f in core.items() if not f.repr}
    assert {variable for _, variable, _ in lines()} == names | files


def test_each_value_is_taken() -> None:
    given = {name: value for _, name, value in lines() if not name.endswith("_FILE")}
    assert load_settings(STORES | given).unknown == ()


def test_a_value_that_is_not_set_is_the_default() -> None:
    """Where the default is something that can be written down: the others are examples."""
    default = values_of(load_settings(STORES))
    for is_set, name, value in lines():
        if not is_set and not name.endswith(("_URL", "_PROXIES", "_DIALECTS")):
            assert values_of(load_settings(STORES | {name: value})) == default, name

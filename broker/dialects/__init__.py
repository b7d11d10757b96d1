"""Vendors' wire formats. A dialect only translates: parse the vendor's body, call one verb, render
the vendor's answer.

A dialect is a package here, which declares itself, and a line of `DIALECTS`. README.md holds the
glossary, and each dialect's folder a page with every deviation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from broker.dialects.declaration import Dialect
from broker.dialects.flex import FLEX
from broker.dialects.hanko import HANKO
from broker.dialects.passlock import PASSLOCK
from broker.dialects.propelauth import PROPELAUTH
from broker.model import POLICY_KEYS, Opener, PolicyKey
from broker.settings import Settings, SettingsFault

# The first dialect renders the refusals on paths that belong to no dialect.
DIALECTS: tuple[Dialect, ...] = (FLEX, HANKO, PASSLOCK, PROPELAUTH)


def policy_keys() -> list[PolicyKey[Any]]:
    """Every policy key: the core's, and those that the dialects declare."""
    return [*POLICY_KEYS, *(key for dialect in DIALECTS for key in dialect.policy_keys)]


def openers() -> frozenset[Opener]:
    """The openers of every dialect."""
    return frozenset(opener for dialect in DIALECTS for opener in dialect.openers)


def load_settings(
    environment: Mapping[str, str], *, needed: Sequence[str] = ("database_url", "redis_url")
) -> Settings:
    """`Settings.load` with the settings of the dialects.

    Raises:
        SettingsFault: as `Settings.load`.
    """
    declared = [setting for dialect in DIALECTS for setting in dialect.settings]
    return Settings.load(environment, needed=needed, declared=declared)


def chosen(settings: Settings) -> tuple[Dialect, ...]:
    """The dialects that answer. Without a secret key, dialects that sign tokens don't answer unless
    the setting names them.

    Raises:
        SettingsFault: the setting names an unknown dialect, or one that lacks a secret key.
    """
    named = {dialect.name: dialect for dialect in DIALECTS}
    if not set(settings.dialects) <= named.keys():
        raise SettingsFault(
            [f"BROKER_DIALECTS must be of {', '.join(named)}, with commas between."]
        )
    lacking = [name for name in settings.dialects if named[name].signs and not settings.secret_key]
    if lacking:
        raise SettingsFault(
            [f"BROKER_SECRET_KEY is missing; without it {' and '.join(lacking)} can't sign."]
        )
    left = left_out(settings)
    return tuple(named[name] for name in settings.dialects or named if name not in left)


def left_out(settings: Settings) -> tuple[str, ...]:
    """The names of the dialects that do not answer because they sign tokens and there is no secret
    key.
    """
    if settings.secret_key or settings.dialects:
        return ()
    return tuple(dialect.name for dialect in DIALECTS if dialect.signs)

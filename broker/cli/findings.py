"""Findings about a store, which `doctor` prints and a start asks for."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from broker.errors import Unavailable

if TYPE_CHECKING:
    from broker.ephemeral import RedisFacts

MIN_REDIS = (7, 0)
MAX_SKEW = 1.0  # seconds
NEEDED = ("term", "eviction", "debug command")  # checks without which no process serves


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of a check. `todo` is the remedy, "" if all is well. A finding that is `ok` and
    has a remedy is a warning.
    """

    check: str
    ok: bool
    found: str
    todo: str = ""


# By the names of types, because those of the drivers belong to the packages of the stores.
_CAUSES = {
    "gaierror": "its host name can't be resolved",
    "SSLError": "TLS failed",
    "AuthenticationError": "user or password refused",
    "InvalidAuthorizationSpecificationError": "user or password refused",
    "InvalidCatalogNameError": "no such database",
    "TooManyConnectionsError": "too many connections",
    "NoPermissionError": "a permission is missing",
    "InsufficientPrivilegeError": "a permission is missing",
    "TimeoutError": "no answer in time",
    "OperatorInterventionError": "the server starts or stops",
    "PostgresConnectionError": "connection lost",
    "InterfaceError": "connection lost",
    "InternalClientError": "connection lost",
}


def cause_of(outage: Unavailable) -> str:
    """Why a store can't be used. The text of an error may quote a secret, so it is left out."""
    seen = first = outage.__cause__
    if first is None:
        return "it takes no writes"
    while seen is not None:
        for kind in type(seen).__mro__:
            if kind.__name__ in _CAUSES:
                return _CAUSES[kind.__name__]
        if isinstance(seen, OSError) and "rejected SSL upgrade" in str(seen):  # asyncpg
            return _CAUSES["SSLError"]
        # The loop joins the errors of several addresses to one without a number.
        if isinstance(seen, OSError) and (found := re.search(r"\[Errno ([0-9]+)\]", str(seen))):
            return os.strerror(int(found[1])).lower()
        seen = seen.__cause__ or seen.__context__
    return type(first).__name__


def postgres_findings(facts: Mapping[str, Any], pool: int) -> list[Finding]:
    """Checks of Postgres' settings and of the service's role. `pool` is
    `BROKER_DATABASE_CONNECTIONS`.
    """
    return [
        *(
            Finding(name, is_warning, f"off: {reason}", todo)
            if facts[name] == "off"
            else Finding(name, True, facts[name] or "unseen")
            for name, is_warning, reason, todo in _OF_COMMITS
        ),
        standby(facts["synchronous_standbys"], facts["synchronous_commit"], facts["standbys"]),
        role(superuser=facts["superuser"], owner=facts["owner"]),
        schema(is_open=facts["open_schema"]),
        rights(facts["denied"]),
        connections(facts["connections"], pool),
    ]


# Settings of Postgres that acknowledged commits rest on: whether `off` is a warning, what it means,
# the remedy.
_OF_COMMITS = (
    (
        "fsync",
        False,
        "a crash of the machine loses acknowledged registrations, and may damage all data.",
        "Set fsync on.",
    ),
    (
        "synchronous_commit",
        False,
        "a crash of Postgres loses acknowledged registrations.",
        "Set it on, also where the role or the database sets it.",
    ),
    (
        "full_page_writes",
        True,
        "a crash of the machine may damage pages.",
        "Set it on, unless the file system writes whole pages.",
    ),
)


def standby(names: str, synchronous_commit: str, standbys: int) -> Finding:
    """Check that a failover loses no acknowledged registration. `names` is
    `synchronous_standby_names`.
    """
    if names and synchronous_commit == "local":
        return Finding(
            "standby",
            True,
            "synchronous_commit is local: a failover may lose acknowledged registrations.",
            "Set synchronous_commit on.",
        )
    if names:
        return Finding("standby", True, f"synchronous_standby_names is {names}")
    if not standbys:
        return Finding("standby", True, "none follows")
    return Finding(
        "standby",
        True,
        "none is synchronous: a failover may lose acknowledged registrations.",
        "Set synchronous_standby_names.",
    )


def rights(denied: str) -> Finding:
    """Check that the service's role may read and write each table. `denied` names the tables on
    which it lacks a right. Readiness reads a few tables only.
    """
    if not denied:
        return Finding("rights", True, "on all tables")
    return Finding(
        "rights",
        True,
        f"lacks some on {denied}: requests that need them get 503.",
        "Run deploy/grants.sql again.",
    )


def role(*, superuser: bool, owner: bool) -> Finding:
    """Check that the service's role owns no table. `owner`: it has the rights of an owner."""
    if not superuser and not owner:
        return Finding("role", True, "owns no table")
    says = "is a superuser" if superuser else "owns tables"
    return Finding(
        "role",
        True,
        f"{says}: a leaked password of the service can change the schema.",
        "Let `serve` connect as broker_service of deploy/grants.sql.",
    )


def schema(*, is_open: bool) -> Finding:
    """Check that not every role may create in the schema. A function with the arguments of a call
    replaces Postgres' own `format` there, and runs with the caller's rights.
    """
    if not is_open:
        return Finding("schema", True, "not open to every role")
    return Finding(
        "schema",
        True,
        "is open: every role of the database can make functions that run with the broker's rights.",
        "Run deploy/grants.sql.",
    )


def connections(limit: int, pool: int) -> Finding:
    """Check that Postgres has connections for two instances, which an upgrade runs beside each
    other.
    """
    found = f"{limit} at most, and an instance takes {pool + 1}"
    if limit >= 2 * (pool + 1):
        return Finding("connections", True, found)
    return Finding(
        "connections",
        True,
        f"{found}: an upgrade runs two beside each other.",
        "Raise max_connections, or lower BROKER_DATABASE_CONNECTIONS.",
    )


def redis_findings(facts: RedisFacts, mode: str) -> list[Finding]:
    """Checks of Redis: of each primary, if there are several."""
    found = [
        redis_version(facts.version),
        clock("redis", facts.ahead),
        eviction(facts.eviction),
        term(readable=facts.term_readable, mode=mode),
        configured(
            "debug command",
            facts.settings.get("enable-debug-command", ()),
            lambda value: value == "no",
            Finding(
                "debug command",
                False,
                "enable-debug-command is {}: DEBUG RELOAD can bring back a value that was taken.",
                "Set enable-debug-command no.",
            ),
        ),
    ]
    if not facts.replicas:
        return found
    return found + [
        configured(
            name,
            facts.settings.get(name, ()),
            right,
            Finding(name, True, f"{name} is {{}}: {reason}", todo),
        )
        for name, right, reason, todo in _OF_REPLICAS
    ]


# Of servers with replicas: the setting, the right values, what another value means, the remedy.
_OF_REPLICAS: tuple[tuple[str, Callable[[str], bool], str, str], ...] = (
    (
        "replica-read-only",
        lambda value: value == "yes",
        "a replica takes writes that are lost.",
        "Set replica-read-only yes, also on the replicas.",
    ),
    (
        "repl-backlog-ttl",
        lambda value: value == "0",
        "logins in flight end when all replicas were gone for that many seconds.",
        "Set repl-backlog-ttl 0.",
    ),
    (
        "min-replicas-to-write",
        lambda value: value != "0",
        "a primary that is cut off takes logins that end with it.",
        "Set min-replicas-to-write 1, if two replicas or more are there.",
    ),
)


def configured(
    check: str, values: Sequence[str], right: Callable[[str], bool], wrong: Finding
) -> Finding:
    """Check a setting of Redis, by its values on all servers. No values: it can't be seen."""
    if not values:
        name = wrong.found.partition(" ")[0]
        return Finding(
            check,
            True,
            "unseen: the broker's user may not read it.",
            f"Check {name} on the server, or allow +config|get.",
        )
    faults = [value for value in values if not right(value)]
    if not faults:
        return Finding(check, True, ", ".join(values))
    return Finding(check, wrong.ok, wrong.found.format(", ".join(faults)), wrong.todo)


def redis_version(version: str) -> Finding:
    """Check that Redis or Valkey is new enough. Valkey's first version is above Redis's minimum."""
    if tuple(int(part) for part in version.split(".")[:2]) >= MIN_REDIS:
        return Finding("redis", True, f"version {version}")
    return Finding("redis", False, f"version {version}.", "Use Redis 7.0, Valkey 7.2 or newer.")


def eviction(policy: str) -> Finding:
    """Check that a full Redis refuses writes instead of dropping one-time values."""
    if policy == "noeviction":
        return Finding("eviction", True, policy)
    return Finding(
        "eviction",
        False,
        f"maxmemory-policy is {policy}: one-time values may vanish early.",
        "Set it to noeviction; a full Redis then answers 503.",
    )


def term(*, readable: bool, mode: str) -> Finding:
    """Check that the term can be read, on which at-most-once rests in the mode `term`."""
    if mode == "postgres":
        return Finding("term", True, "not compared; the ledger in Postgres decides")
    if readable:
        return Finding("term", True, "readable in scripts, the same on each connection")
    return Finding(
        "term",
        False,
        "the replication id of Redis can't be read in a script, or differs between connections.",
        "Allow +info and +eval, and connect to the primary itself, not through a proxy; or set "
        "BROKER_ONE_TIME=postgres.",
    )


def clock(store: str, ahead: float) -> Finding:
    """Check that a store's clock, `ahead` of ours by these seconds, agrees with ours."""
    if abs(ahead) <= MAX_SKEW:
        return Finding("clock", True, f"within {MAX_SKEW:g} s of {store}'s")
    return Finding(
        "clock", False, f"{abs(ahead):.0f} s off {store}'s.", "Run NTP on both machines."
    )

"""What the durable store's statements share: columns, the insert of an event, and rows as domain
types.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any, cast, get_args, get_type_hints

import asyncpg
import orjson

from broker.model import LONGEST_NONCE, AllowedCredential, Credential, Owned, Policy, RelyingParty
from broker.telemetry import context

CREDENTIAL = (
    "c.id, c.app_id, c.user_id, c.credential_id, c.user_handle, c.public_key, c.algorithm, c.sign_count, c.backup_eligible, "
    "c.backed_up, c.transports, c.attachment, c.aaguid, c.attestation_format, c.attestation_trust, c.user_name, "
    "c.user_display_name, c.nickname, c.live, c.second_factor, c.confirmed_at, c.created_at, c.updated_at, c.last_used_at, c.use_count"
)
USER = """
    u.id, u.app_id, u.external_id, u.handle, u.status, u.created_at, u.updated_at,
    u.past_logins + coalesce(k.uses, 0)::bigint AS login_count, greatest(u.past_login_at, k.used_at) AS last_login_at
"""
USES = """
    LEFT JOIN LATERAL (
        SELECT sum(c.use_count) AS uses, max(c.last_used_at) AS used_at FROM credentials c WHERE c.user_id = u.id
    ) k ON true
"""
OFFERED = (
    "c.id, c.credential_id, c.transports, c.user_handle, c.public_key, c.algorithm, c.sign_count, c.backup_eligible, c.backed_up, "
    "c.attestation_trust, c.aaguid, c.user_id, c.app_id"
)
APP = "id, name, rp_id, origins, related_origins, policy, created_at, updated_at"
# Of users who are gone, all that their events hold and a caller chose. A column that is added to
# events has its place here, or is ours.
ERASE = "UPDATE events SET request_id = '' WHERE user_id = ANY ($1::text[]) AND request_id <> ''"
# For how long after its registration a passkey that is not confirmed may still be: its nonce lives
# no longer, by any instance's clock.
UNCONFIRMED = timedelta(seconds=LONGEST_NONCE + 60)
TELL = "INSERT INTO events (at, app_id, actor, action, user_id, passkey_id, result, reason, request_id)"


def who() -> tuple[str, str]:
    now = context()
    return now.actor, now.request_id


_KINDS: dict[object, str] = {
    str: "text",
    int: "bigint",
    bool: "boolean",
    datetime: "timestamptz",
    tuple[str, ...]: "text[]",
}


class Callers:
    """What callers ask of one statement, as its table `a`, numbered. Its columns are the fields of
    `row`, a NamedTuple of what one asks.

    A caller alone is a row of the statement's parameters: Postgres then plans for one row instead
    of a hundred, and reads no JSON, and a statement takes about a fifth less time. Several are one
    value, a JSON array of objects: asyncpg asks of each item of an array whether it is one as well.
    `one` and `several` are the table's two forms, for a FROM.
    """

    def __init__(self, row: type[tuple[object, ...]]) -> None:
        kinds = {name: _kind(hint) for name, hint in get_type_hints(row).items()}
        self._names = ("number", *kinds)
        parameters = ", ".join(f"${n}::{kind}" for n, kind in enumerate(kinds.values(), 1))
        self.one = f"(VALUES (0, {parameters})) a ({', '.join(self._names)})"
        columns = ", ".join(map(" ".join, kinds.items()))
        self.several = f"json_to_recordset($1::text::json) a (number integer, {columns})"

    def table(self, asked: Sequence[tuple[object, ...]]) -> tuple[str, tuple[object, ...]]:
        """The table for so many, and the statement's values; each of `asked` has a value for every
        column.
        """
        return (self.one, asked[0]) if len(asked) == 1 else (self.several, (self.array(asked),))

    def array(self, asked: Sequence[tuple[object, ...]]) -> str:
        """The value of `several`, for any number."""
        rows = [
            dict(zip(self._names, (number, *values), strict=True))
            for number, values in enumerate(asked)
        ]
        return orjson.dumps(rows).decode()


def _kind(hint: object) -> str:
    """The type that Postgres has for a field's; what may be None is of the same."""
    return (
        _KINDS.get(hint) or _KINDS[next(kind for kind in get_args(hint) if kind is not type(None))]
    )


def app_of(row: asyncpg.Record) -> RelyingParty:
    return RelyingParty(
        id=row["id"],
        name=row["name"],
        rp_id=row["rp_id"],
        origins=tuple(row["origins"]),
        related_origins=tuple(row["related_origins"]),
        policy=Policy.load(cast("dict[str, Any]", row["policy"])),
        created_at=row["created_at"],
        updated_at=row["updated_at"],
    )


def credential_of(row: asyncpg.Record) -> Credential:
    values = {k: v for k, v in row.items() if k != "external_id"}
    values["transports"] = tuple(values["transports"])
    return Credential(**values)


def owned_of(row: asyncpg.Record) -> Owned:
    """A credential's columns and `external_id`."""
    return Owned(credential_of(row), row["external_id"])


def offered_of(row: asyncpg.Record) -> AllowedCredential:
    """The columns of `OFFERED`, besides others."""
    return AllowedCredential(
        row["id"],
        row["credential_id"],
        tuple(row["transports"]),
        row["user_handle"],
        row["public_key"],
        row["algorithm"],
        row["sign_count"],
        row["backup_eligible"],
        row["backed_up"],
        row["attestation_trust"],
        row["aaguid"],
        row["user_id"],
        row["app_id"],
    )

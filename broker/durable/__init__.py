"""The durable store, on Postgres: a module a table, each statement beside its method.

**The write decides.** Unique indexes and `UPDATE … WHERE` answer "already there", "counter went
back" and "revoked meanwhile"; no method reads first and trusts what it read; a foreign key answers
"deleted meanwhile". Each step of a ceremony is one statement, and so one commit: a credential and
its event are committed together or not at all.

Reading order:

    apps, api_keys, users, credentials, approvals, signing_keys    the tables
    ceremonies      what a login and a registration read and write
    ledger          spent one-time values, in one of the two modes of one-time values
    events          the audit log: its writer and its readers
    postgres        the connection pool, limits and faults
    group_commit    one statement for all callers of one operation; `batch_input`: its parameters
    housekeeping    periodic clean-up
    migrations      the schema
"""

from __future__ import annotations

from datetime import UTC, datetime

from broker.durable.api_keys import ApiKeys
from broker.durable.approvals import Approvals
from broker.durable.apps import Apps
from broker.durable.ceremonies import Ceremonies, ExcludedCredential
from broker.durable.credentials import Credentials
from broker.durable.events import Events
from broker.durable.ledger import Ledger
from broker.durable.migrations import MigrationFault, Patience, sql_files
from broker.durable.postgres import Postgres
from broker.durable.signing_keys import SigningKeys
from broker.durable.users import UserOrder, Users

__all__ = [
    "Durable",
    "ExcludedCredential",
    "MigrationFault",
    "Patience",
    "Postgres",
    "UserOrder",
    "instant",
    "sql_files",
]


class Durable:
    """The tables, on one connection pool."""

    def __init__(self, postgres: Postgres) -> None:
        self.apps = Apps(postgres)
        self.api_keys = ApiKeys(postgres)
        self.users = Users(postgres)
        self.credentials = Credentials(postgres)
        self.ceremonies = Ceremonies(postgres)
        self.approvals = Approvals(postgres)
        self.events = Events(postgres)
        self.signing_keys = SigningKeys(postgres)
        self.ledger = Ledger(postgres)


def instant(epoch: float) -> datetime:
    """Seconds since the epoch as an aware `datetime`."""
    return datetime.fromtimestamp(epoch, UTC)

"""`broker migrate` and `broker signing-key`: the database's schema and the signing keys."""

from __future__ import annotations

import argparse
import secrets
from typing import TYPE_CHECKING, get_args

from broker.cli.output import Row
from broker.cli.parsing import Commands, add_group, option
from broker.cli.records import Records, add, chosen_app
from broker.model import RelyingParty, TokenAlgorithm
from broker.settings import OneTimeMode

if TYPE_CHECKING:
    from broker.durable.signing_keys import StoredKey
    from broker.signing import State


def add_commands(commands: Commands) -> None:
    """Add `migrate` and `signing-key`."""
    add(
        commands,
        "migrate",
        "apply missing migrations",
        migrate,
        empty="Nothing to apply.",
        examples=("migrate",),
    )

    add(
        commands,
        "one-time",
        "show or change what decides the take of a one-time value",
        one_time,
        options=(
            option(
                "--set",
                "record this mode, which ends logins in flight; "
                "then set BROKER_ONE_TIME and restart every instance",
                choices=get_args(OneTimeMode),
                dest="mode",
            ),
        ),
        examples=("one-time", "one-time --set postgres"),
    )

    group = add_group(commands, "signing-key", "keys that sign tokens")
    add(
        group,
        "list",
        "the keys of a set",
        list_signing_keys,
        options=(_SET,),
        examples=("signing-key list", "signing-key list --app Shop --json"),
    )
    sealing = ("database_url", "secret_key")
    add(
        group,
        "rotate",
        "make the next key of a set",
        rotate_signing_key,
        needed=sealing,
        options=(
            _SET,
            option(
                "--algorithm",
                "which keys (default RS256)",
                choices=get_args(TokenAlgorithm),
                default="RS256",
            ),
            option("--now", "sign with it at once: verifiers may not know it", action="store_true"),
            option(
                "--drop",
                "with --now: unpublish the older keys, a leaked one",
                action="store_true",
            ),
        ),
        examples=("signing-key rotate --app Shop", "signing-key rotate --app Shop --now --drop"),
    )
    add(
        group,
        "reseal",
        "seal every key under the first secret key",
        reseal_signing_keys,
        needed=sealing,
        examples=("signing-key reseal",),
    )


_SET = option(
    "--app", "an app's set, by its id or name; without it the broker's own", metavar="APP"
)


async def _app_of_set(records: Records, options: argparse.Namespace) -> RelyingParty | None:
    """The app of the set. None: the broker's own. BROKER_APP is ignored, because a rotation must
    not depend on the shell's environment.
    """
    return await chosen_app(records, options.app) if options.app is not None else None


async def migrate(records: Records, _: argparse.Namespace) -> list[str]:
    """The names of the migrations applied."""
    return await records.postgres.migrate(records.directory.now())


async def one_time(records: Records, options: argparse.Namespace) -> Row:
    """The recorded mode, after a change."""
    ledger = records.durable.ledger
    if options.mode is not None:
        stamp = secrets.token_hex(8) if options.mode == "postgres" else ""
        await ledger.record(options.mode, stamp, records.directory.now())
    return {"mode": (await ledger.recorded()).mode}


async def list_signing_keys(records: Records, options: argparse.Namespace) -> list[Row]:
    """The keys of a set, by algorithm, oldest first."""
    app = await _app_of_set(records, options)
    return [_signing_key_row(key, state) for key, state in await records.signing.list_keys(app)]


async def rotate_signing_key(records: Records, options: argparse.Namespace) -> list[Row]:
    """The keys of the set after the rotation."""
    app = await _app_of_set(records, options)
    found = await records.signing.rotate(app, options.algorithm, now=options.now, drop=options.drop)
    return [_signing_key_row(key, state) for key, state in found]


async def reseal_signing_keys(records: Records, _: argparse.Namespace) -> Row:
    """`{"resealed": number, "lost": number}`; no secret key opens a lost one."""
    changed, lost = await records.signing.reseal()
    return {"resealed": changed, "lost": lost}


def _signing_key_row(key: StoredKey, state: State) -> Row:
    return {
        "kid": key.id,
        "algorithm": key.algorithm,
        "state": state,
        "signs_from": key.signs_from,
        "retires_at": key.retires_at,
        "created_at": key.created_at,
    }

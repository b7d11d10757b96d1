"""`broker migrate` and `broker signing-key`: the upkeep of what every app shares."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, get_args

from broker.cli.output import Row
from broker.cli.parsing import Commands, add_group
from broker.cli.records import Records, add, chosen_app
from broker.model import RelyingParty, TokenAlgorithm

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

    group = add_group(commands, "signing-key", "keys that sign tokens")
    command = add(
        group,
        "list",
        "the keys of a set",
        list_signing_keys,
        examples=("signing-key list", "signing-key list --app Shop --json"),
    )
    _set(command)
    sealing = ("database_url", "secret_key")
    command = add(
        group,
        "rotate",
        "make the next key of a set",
        rotate_signing_key,
        needed=sealing,
        examples=("signing-key rotate --app Shop", "signing-key rotate --app Shop --now --drop"),
    )
    _set(command)
    command.add_argument(
        "--algorithm",
        choices=get_args(TokenAlgorithm),
        default="RS256",
        help="which keys (default RS256)",
    )
    command.add_argument(
        "--now", action="store_true", help="sign with it at once: verifiers may not know it"
    )
    command.add_argument(
        "--drop", action="store_true", help="with --now: unpublish the older keys, a leaked one"
    )
    add(
        group,
        "reseal",
        "seal every key under the first secret key",
        reseal_signing_keys,
        needed=sealing,
        examples=("signing-key reseal",),
    )


def _set(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--app", metavar="APP", help="an app's set, by its id or name; without it the broker's own"
    )


async def _app_of_set(records: Records, options: argparse.Namespace) -> RelyingParty | None:
    """None: the broker's own set. BROKER_APP names no set: a rotation must not depend on the shell
    it is typed in.
    """
    return await chosen_app(records, options.app) if options.app is not None else None


async def migrate(records: Records, _: argparse.Namespace) -> list[str]:
    """The names of the migrations applied."""
    return await records.postgres.migrate(records.directory.now())


async def list_signing_keys(records: Records, options: argparse.Namespace) -> list[Row]:
    """The keys of a set, by algorithm, oldest first."""
    app = await _app_of_set(records, options)
    return [_signing_key_row(key, state) for key, state in await records.signing.list_keys(app)]


async def rotate_signing_key(records: Records, options: argparse.Namespace) -> list[Row]:
    """The keys of the set as they are then."""
    app = await _app_of_set(records, options)
    found = await records.signing.rotate(app, options.algorithm, now=options.now, drop=options.drop)
    return [_signing_key_row(key, state) for key, state in found]


async def reseal_signing_keys(records: Records, _: argparse.Namespace) -> Row:
    """`{"resealed": how many, "lost": how many no secret key opens}`."""
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

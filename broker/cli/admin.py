"""Commands on data: apps, keys, passkeys, users, events, signing keys, migrations. Each is one verb, and one way to print its answer.

Printed values are made harmless: a user's name or a passkey's may hold control characters, which a terminal would obey.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import secrets
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, get_args

from broker.cli.dev import DATA, read, read_secret
from broker.cli.serving import run
from broker.errors import InvalidSetting
from broker.model import (
    ALGORITHMS,
    ApiKey,
    Credential,
    Event,
    Policy,
    RelyingParty,
    TokenAlgorithm,
    fields_of,
    web_origin,
)
from broker.settings import Settings
from broker.telemetry import CONTEXT, Context
from broker.tokens import text

if TYPE_CHECKING:
    from broker.directory import Directory
    from broker.durable import Postgres
    from broker.durable.signing_keys import StoredKey
    from broker.signing import Signing, State

PATIENCE = 60.0  # seconds

Row = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Records:
    """What these commands act on: Postgres alone. The service is three times as long to import, and nothing here serves."""

    postgres: Postgres
    directory: Directory
    signing: Signing


async def _with_records(settings: Settings, work: Callable[[Records], Awaitable[object]]) -> object:
    from broker.directory import Directory
    from broker.durable import Catalogue, Durable, Postgres
    from broker.durable.signing_keys import SigningKeys
    from broker.signing import Signing
    from broker.telemetry import Metrics

    postgres = Postgres(
        settings.database_url,
        timeout=settings.store_timeout,
        connections=settings.database_connections,
        metrics=Metrics(),
    )
    await postgres.open()
    directory = Directory(durable=Durable(postgres), catalogue=Catalogue(postgres))
    try:
        return await work(Records(postgres, directory, Signing(SigningKeys(postgres), settings.secret_key)))
    finally:
        await postgres.close()


Work: TypeAlias = "Callable[[Records, argparse.Namespace], Awaitable[object]]"


def settings_for_data(*needed: str, given: Mapping[str, str] | None = None) -> Settings:
    """The settings of a command on data: the environment's, or those of the `broker dev` that runs below here. `given` are variables
    that the command line sets.

    Raises:
        SettingsFault: one can't be used, or one of those `needed` (default: the database's URL) is missing.
    """
    environment = {**os.environ, **(given or {})}
    if not environment.get("BROKER_DATABASE_URL") and (stored := read(Path(DATA) / "dev.json")):
        sys.stderr.write(f"broker: acting on the dev instance of {DATA}/dev.json.\n")
        environment["BROKER_DATABASE_URL"] = str(stored.get("database_url", ""))
        environment["BROKER_REDIS_URL"] = environment.get("BROKER_REDIS_URL") or str(
            stored.get("redis_url", "")
        )
        environment["BROKER_SECRET_KEY"] = environment.get("BROKER_SECRET_KEY") or read_secret(Path(DATA))
    return Settings.load(environment, needed=needed or ("database_url",))


def _command(work: Work, empty: str, needed: Sequence[str]) -> Callable[[argparse.Namespace], int]:
    def act(options: argparse.Namespace) -> int:
        async def main(records: Records) -> object:
            CONTEXT.set(Context(request_id=f"cli-{secrets.token_hex(8)}", actor="cli"))
            return await work(records, options)

        # A person waits for the answer, and deleting a large app takes longer than a request may.
        settings = replace(settings_for_data(*needed), store_timeout=PATIENCE)
        result = run(_with_records(settings, main))
        _print(result, as_json=options.json, empty=empty)
        return 0

    return act


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `migrate`, `app`, `key`, `passkey`, `user`, `events` and `signing-key`."""
    _add(commands, "migrate", "apply missing migrations", migrate, empty="Nothing to apply.")

    group = commands.add_parser("app", help="relying parties").add_subparsers(required=True, metavar="action")
    command = _add(group, "create", "make an app and its first key", create_app)
    command.add_argument("--name", required=True)
    command.add_argument("--rp-id", required=True, help="the domain passkeys belong to, like example.com")
    _origins(command, required=True)
    _policy(command)
    _add(group, "list", "every app", list_apps)
    _app(_add(group, "show", "one app", show_app))
    command = _app(_add(group, "update", "change an app", update_app))
    command.add_argument("--name")
    command.add_argument("--rp-id")
    _origins(command, required=False)
    for action, says in (("add", "one more origin"), ("remove", "an origin that is no longer allowed")):
        command.add_argument(
            f"--{action}-origin",
            action="append",
            default=[],
            metavar="ORIGIN",
            help=f"{says}, beside those there are; may be repeated",
        )
    _policy(command)
    _app(_add(group, "delete", "delete an app with its keys, users and passkeys", delete_app))

    group = commands.add_parser("key", help="API keys").add_subparsers(required=True, metavar="action")
    command = _app(_add(group, "create", "make a key; it is shown this once", create_key))
    command.add_argument("--name", default="", help="what it is for")
    _app(_add(group, "list", "an app's keys", list_keys))
    command = _app(_add(group, "revoke", "revoke a key", revoke_key))
    command.add_argument("--key", required=True, metavar="ID", help="the key's id, as `key list` shows it")

    group = commands.add_parser("passkey", help="users' passkeys").add_subparsers(
        required=True, metavar="action"
    )
    _user(_app(_add(group, "list", "a user's passkeys", list_passkeys)))
    command = _user(_app(_add(group, "revoke", "revoke passkeys of a user", revoke_passkeys)))
    which = command.add_mutually_exclusive_group(required=True)
    which.add_argument("--passkey", metavar="ID")
    which.add_argument("--all", action="store_true")

    group = commands.add_parser("user", help="users").add_subparsers(required=True, metavar="action")
    _user(_app(_add(group, "delete", "delete a user with all traces", delete_user)))

    command = _app(_add(commands, "events", "what happened in an app", list_events))
    command.add_argument(
        "--limit",
        type=_whole(1, 10_000),
        default=100,
        metavar="N",
        help="at most N, the newest (default 100)",
    )
    command.add_argument(
        "--after",
        type=_whole(0, 2**63 - 1),
        metavar="ID",
        help="the first N after this event, none skipped; 0 for all",
    )

    group = commands.add_parser("signing-key", help="keys that sign tokens").add_subparsers(
        required=True, metavar="action"
    )
    _set(_add(group, "list", "the keys of a set", list_signing_keys))
    sealing = ("database_url", "secret_key")
    command = _set(_add(group, "rotate", "make the next key of a set", rotate_signing_key, needed=sealing))
    command.add_argument(
        "--algorithm", choices=get_args(TokenAlgorithm), default="RS256", help="which keys (default RS256)"
    )
    command.add_argument("--now", action="store_true", help="sign with it at once: verifiers may not know it")
    command.add_argument(
        "--drop", action="store_true", help="with --now: unpublish the older keys, a leaked one"
    )
    _add(group, "reseal", "seal every key under the first secret key", reseal_signing_keys, needed=sealing)


def _whole(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,19}", text) or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"a whole number from {low} to {high} is needed")
        return int(text)

    return parse


def _add(
    group: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    says: str,
    work: Work,
    empty: str = "None.",
    needed: Sequence[str] = ("database_url",),
) -> argparse.ArgumentParser:
    command = group.add_parser(name, help=says)
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(run=_command(work, empty, needed))
    return command


def _app(command: argparse.ArgumentParser) -> argparse.ArgumentParser:
    command.add_argument("--app", required=True, metavar="ID")
    return command


def _user(command: argparse.ArgumentParser) -> argparse.ArgumentParser:
    command.add_argument("--user", required=True, metavar="EXTERNAL_ID")
    return command


def _set(command: argparse.ArgumentParser) -> argparse.ArgumentParser:
    command.add_argument("--app", metavar="ID", help="an app's set; without it the broker's own")
    return command


def _origins(command: argparse.ArgumentParser, *, required: bool) -> None:
    says = "like https://example.com or android:apk-key-hash:…; may be repeated" + (
        "" if required else "; replaces those there are"
    )
    command.add_argument("--origin", action="append", required=required, metavar="ORIGIN", help=says)
    command.add_argument(
        "--related-origin",
        action="append",
        metavar="ORIGIN",
        help="one outside the RP ID's domain" + ("" if required else "; '' removes those there are"),
    )


def _policy(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a policy key; see README"
    )


def _changed(policy: Policy, changes: Sequence[str]) -> Policy:
    for change in changes:
        key, equals, value = change.partition("=")
        if not equals:
            raise InvalidSetting(f"--set takes KEY=VALUE, not {change!r}.")
        policy = policy.set(key, value)
    return policy


# -- the commands ---------------------------------------------------------------------------------------------------------------------


async def migrate(records: Records, _: argparse.Namespace) -> list[str]:
    """The names of the migrations applied."""
    return await records.postgres.migrate(records.directory.now())


async def create_app(records: Records, options: argparse.Namespace) -> Row:
    """`{"app_id", "api_key"}`."""
    app, key = await records.directory.create_app(
        options.name,
        options.rp_id,
        options.origin,
        related_origins=options.related_origin or (),
        policy=_changed(Policy(), options.set),
    )
    return {"app_id": app.id, "api_key": key}


async def list_apps(records: Records, _: argparse.Namespace) -> list[Row]:
    """Every app."""
    return [_app_row(app) for app in await records.directory.apps()]


async def show_app(records: Records, options: argparse.Namespace) -> Row:
    """One app."""
    return _app_row(await records.directory.app(options.app))


async def update_app(records: Records, options: argparse.Namespace) -> Row:
    """The changed app."""
    given = (options.name, options.rp_id, options.origin, options.related_origin)
    if all(value is None for value in given) and not (
        options.set or options.add_origin or options.remove_origin
    ):
        raise InvalidSetting(
            "Nothing to change; give --name, --rp-id, --origin, --add-origin, --remove-origin, --related-origin or --set."
        )
    app = await records.directory.app(options.app)
    app = replace(
        app,
        name=options.name if options.name is not None else app.name,
        rp_id=options.rp_id if options.rp_id is not None else app.rp_id,
        origins=_changed_origins(app, options),
        related_origins=tuple(filter(None, options.related_origin))
        if options.related_origin is not None
        else app.related_origins,
        policy=_changed(app.policy, options.set),
    )
    return _app_row(await records.directory.update_app(app))


def _changed_origins(app: RelyingParty, options: argparse.Namespace) -> tuple[str, ...]:
    """Those that `--origin` gives, else those there are, without the removed and with the added; `checked` judges them."""
    if options.origin and (options.add_origin or options.remove_origin):
        raise InvalidSetting("--origin replaces every origin; give it, or --add-origin and --remove-origin.")
    origins = list(options.origin or app.origins)
    for given in options.remove_origin:
        origin = given if given.startswith("android:") else web_origin(given)
        if origin in app.related_origins:
            raise InvalidSetting(f"{origin} is a related origin; --related-origin replaces those.")
        if origin not in origins:
            raise InvalidSetting(f"{origin} is none of the app's origins: {', '.join(origins)}.")
        origins.remove(origin)
    return (*origins, *options.add_origin)


async def delete_app(records: Records, options: argparse.Namespace) -> Row:
    """`{"deleted": id}`."""
    await records.directory.delete_app(options.app)
    return {"deleted": options.app}


async def create_key(records: Records, options: argparse.Namespace) -> Row:
    """`{"key_id", "api_key"}`."""
    key, secret = await records.directory.create_key(options.app, options.name)
    return {"key_id": key.id, "api_key": secret}


async def list_keys(records: Records, options: argparse.Namespace) -> list[Row]:
    """An app's keys, revoked ones too."""
    await records.directory.app(options.app)
    return [_key_row(key) for key in await records.directory.keys(options.app)]


async def revoke_key(records: Records, options: argparse.Namespace) -> Row:
    """`{"revoked": id}`."""
    if not await records.directory.revoke_key(options.app, options.key):
        raise InvalidSetting("The app has no such unrevoked key; `broker key list` shows the ids.")
    return {"revoked": options.key}


async def list_passkeys(records: Records, options: argparse.Namespace) -> list[Row]:
    """A user's passkeys."""
    app = await records.directory.app(options.app)
    user = await records.directory.user(app, external_id=options.user)
    return [_passkey_row(c) for c in await records.directory.credentials(app, user)]


async def revoke_passkeys(records: Records, options: argparse.Namespace) -> Row:
    """`{"revoked": [ids]}`."""
    app = await records.directory.app(options.app)
    user = await records.directory.user(app, external_id=options.user)
    return {"revoked": await records.directory.revoke(app, user, None if options.all else options.passkey)}


async def delete_user(records: Records, options: argparse.Namespace) -> Row:
    """`{"deleted": external id}`."""
    app = await records.directory.app(options.app)
    await records.directory.delete_user(app, options.user)
    return {"deleted": options.user}


async def list_events(records: Records, options: argparse.Namespace) -> list[Row]:
    """The newest events, or the first ones after one of them; oldest first. Also of an app deleted since."""
    if options.after is None:
        found = await records.directory.events(options.app, limit=options.limit)
    else:
        rows, _ = await records.directory.events_after(options.app, options.after, limit=options.limit)
        found = [row.event for row in rows]
    if not found:
        await records.directory.app(options.app)
    return [_event_row(event) for event in found]


async def list_signing_keys(records: Records, options: argparse.Namespace) -> list[Row]:
    """The keys of a set, by algorithm, oldest first."""
    app = await records.directory.app(options.app) if options.app is not None else None
    return [_signing_key_row(key, state) for key, state in await records.signing.listed(app)]


async def rotate_signing_key(records: Records, options: argparse.Namespace) -> list[Row]:
    """The keys of the set as they are then."""
    app = await records.directory.app(options.app) if options.app is not None else None
    found = await records.signing.rotate(app, options.algorithm, now=options.now, drop=options.drop)
    return [_signing_key_row(key, state) for key, state in found]


async def reseal_signing_keys(records: Records, _: argparse.Namespace) -> Row:
    """`{"resealed": how many, "lost": how many no secret key opens}`."""
    changed, lost = await records.signing.reseal()
    return {"resealed": changed, "lost": lost}


# -- printing -------------------------------------------------------------------------------------------------------------------------


def _app_row(app: RelyingParty) -> Row:
    policy = {
        **fields_of(app.policy),
        "algorithms": [ALGORITHMS[number] for number in app.policy.algorithms],
        "attestation_roots": len(app.policy.attestation_roots),  # how many; they are long
    }
    return {
        "app_id": app.id,
        "name": app.name,
        "rp_id": app.rp_id,
        "origins": list(app.origins),
        "related_origins": list(app.related_origins),
        "policy": policy,
        "created_at": app.created_at,
    }


def _key_row(key: ApiKey) -> Row:
    return {
        "key_id": key.id,
        "hint": key.hint,
        "name": key.name,
        "created_at": key.created_at,
        "revoked_at": key.revoked_at,
    }


def _passkey_row(credential: Credential) -> Row:
    return {
        "passkey_id": credential.id,
        "name": credential.nickname or credential.user_name,
        "credential_id": text(credential.credential_id),
        "sign_count": credential.sign_count,
        "use_count": credential.use_count,
        "backup_eligible": credential.backup_eligible,
        "backed_up": credential.backed_up,
        "attestation": credential.attestation_trust,
        "aaguid": credential.aaguid,
        "live": credential.live,
        "created_at": credential.created_at,
        "confirmed_at": credential.confirmed_at,
        "last_used_at": credential.last_used_at,
    }


def _signing_key_row(key: StoredKey, state: State) -> Row:
    return {
        "kid": key.id,
        "algorithm": key.algorithm,
        "state": state,
        "signs_from": key.signs_from,
        "retires_at": key.retires_at,
        "created_at": key.created_at,
    }


def _event_row(event: Event) -> Row:
    return fields_of(event)


def _print(result: object, *, as_json: bool, empty: str) -> None:
    if as_json:
        print(json.dumps(result, indent=2, default=_as_text))  # noqa: T201 - the command's answer
    elif isinstance(result, list):
        print("\n".join(_line(row) for row in result) or empty)  # noqa: T201
    elif isinstance(result, Mapping):
        print("\n".join(f"{name:<17}{_cell(value)}" for name, value in result.items()))  # noqa: T201


def _line(row: Row | str) -> str:
    if isinstance(row, str):
        return row
    return "  ".join(_cell(value) for value in row.values() if not isinstance(value, Mapping))


def _cell(value: object) -> str:
    if isinstance(value, Mapping):
        return " ".join(f"{name}={_cell(item)}" for name, item in value.items())
    if isinstance(value, list | tuple):
        return ",".join(map(_cell, value)) or "-"
    if isinstance(value, bool):
        return str(value).lower()
    return "-" if value in (None, "") else _as_text(value)


def _as_text(value: Any) -> str:
    if hasattr(value, "isoformat"):
        return str(value.isoformat(timespec="seconds"))
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in str(value))

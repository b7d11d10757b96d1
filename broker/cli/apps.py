"""`broker app`, `broker policy` and `broker key`: relying parties with their origins and policies,
and API keys.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace

from broker.cli.output import Row, counted, print_answer
from broker.cli.parsing import Commands, Option, add_group, option
from broker.cli.records import Records, add, chosen_app, shown_app
from broker.dialects import policy_keys
from broker.errors import InvalidSetting
from broker.model import (
    ALGORITHMS,
    ApiKey,
    Policy,
    RelyingParty,
    web_origin,
)


def add_commands(commands: Commands) -> None:
    """Add `app`, `policy` and `key`."""
    group = add_group(commands, "app", "relying parties")
    add(
        group,
        "create",
        "make an app and its first key",
        create_app,
        options=(
            option("--name", "what lists show", required=True),
            option("--rp-id", "the domain passkeys belong to, like example.com", required=True),
            *_origins(required=True),
            _POLICY,
        ),
        examples=(
            "app create --name Shop --rp-id example.com --origin https://example.com",
            "app create --name Shop --rp-id example.com --origin https://example.com"
            " --set nonce_life=120 --json",
        ),
    )
    add(
        group,
        "list",
        "every app",
        list_apps,
        columns=("app_id", "name", "rp_id", "created_at", "origins"),
        examples=("app list", "app list --json"),
    )
    add(
        group,
        "show",
        "one app",
        show_app,
        app=True,
        examples=("app show", "app show --app Shop --json"),
    )
    add(
        group,
        "update",
        "change an app",
        update_app,
        app=True,
        options=(
            option("--name", "what lists show"),
            option("--rp-id", "another domain: passkeys of the old one no longer sign in"),
            *_origins(required=False),
            _changed_origin("add", "one more origin"),
            _changed_origin("remove", "an origin that is no longer allowed"),
            _POLICY,
        ),
        examples=(
            "app update --add-origin http://localhost:8081",
            "app update --app Shop --set user_verification=preferred --set nonce_life=120",
        ),
    )
    add(
        group,
        "delete",
        "delete an app with its keys, users and passkeys",
        delete_app,
        app=True,
        removes=True,
        question=ask_about_app,
        examples=("app delete --app Shop", "app delete --app Shop --yes"),
    )

    says = "show this app's values too, by its id or name"
    command = add(
        commands,
        "policy",
        "the keys of --set: values, defaults and meaning",
        show_policy,
        options=(option("--app", says, metavar="APP"),),
        examples=("policy", "policy --app Shop", "policy --json"),
    )
    of_an_app = command.get_default("run")
    command.set_defaults(
        run=lambda options: of_an_app(options) if options.app else _show_defaults(options)
    )

    group = add_group(commands, "key", "API keys")
    add(
        group,
        "create",
        "make a key; it is shown this once",
        create_key,
        app=True,
        options=(option("--name", "what it is for", default=""),),
        examples=('key create --name "second backend"', "key create --app Shop --json"),
    )
    add(
        group,
        "list",
        "an app's keys, revoked ones too",
        list_keys,
        app=True,
        examples=("key list", "key list --app Shop --json"),
    )
    says = "the key's id, as `key list` shows it"
    add(
        group,
        "revoke",
        "revoke a key, on every instance within a second",
        revoke_key,
        app=True,
        removes=True,
        options=(option("--key", says, required=True, metavar="ID"),),
        examples=("key revoke --app Shop --key KEY_ID",),
    )


def _origins(*, required: bool) -> tuple[Option, Option]:
    replaces, removes = (
        ("", "")
        if required
        else (
            "; replaces those there are",
            "; '' removes those there are",
        )
    )
    says = f"like https://example.com or android:apk-key-hash:…; may be repeated{replaces}"
    related = f"one outside the RP ID's domain{removes}"
    return (
        option("--origin", says, action="append", required=required, metavar="ORIGIN"),
        option("--related-origin", related, action="append", metavar="ORIGIN"),
    )


def _changed_origin(action: str, says: str) -> Option:
    says = f"{says}, beside those there are; may be repeated"
    return option(f"--{action}-origin", says, action="append", default=[], metavar="ORIGIN")


_POLICY = option(
    "--set",
    "a key of the policy, as `broker policy` lists them; may be repeated",
    action="append",
    default=[],
    metavar="KEY=VALUE",
)


def _changed(policy: Policy, changes: Sequence[str]) -> Policy:
    for change in changes:
        key, equals, value = change.partition("=")
        if not equals:
            raise InvalidSetting(f"--set takes KEY=VALUE, not {change!r}.")
        policy = policy.set(key, value, policy_keys())
    return policy


# -- the commands ----------------------------------------------------------------------------------


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


async def show_app(_: Records, options: argparse.Namespace) -> Row:
    """One app."""
    return _app_row(options.app)


async def update_app(records: Records, options: argparse.Namespace) -> Row:
    """The changed app."""
    given = (options.name, options.rp_id, options.origin, options.related_origin)
    if all(value is None for value in given) and not (
        options.set or options.add_origin or options.remove_origin
    ):
        raise InvalidSetting(
            "Nothing to change; give --name, --rp-id, --origin, --add-origin, --remove-origin, "
            "--related-origin or --set."
        )
    app: RelyingParty = options.app
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
    """The origins of `--origin`, or the present ones, without the removed and with the added ones.
    `RelyingParty.checked` validates them.
    """
    if options.origin and (options.add_origin or options.remove_origin):
        raise InvalidSetting(
            "--origin replaces every origin; give it, or --add-origin and --remove-origin."
        )
    origins = list(options.origin or app.origins)
    for given in options.remove_origin:
        origin = given if given.startswith("android:") else web_origin(given)
        if origin in app.related_origins:
            raise InvalidSetting(f"{origin} is a related origin; --related-origin replaces those.")
        if origin not in origins:
            raise InvalidSetting(f"{origin} is none of the app's origins: {', '.join(origins)}.")
        origins.remove(origin)
    return (*origins, *options.add_origin)


async def ask_about_app(records: Records, options: argparse.Namespace) -> str:
    """The question, with the number of users and passkeys that are deleted with the app."""
    _, users = await records.directory.users(options.app, limit=1)
    _, passkeys = await records.directory.passkeys(options.app, limit=1)
    lost = f"{counted(users, 'user')} and {counted(passkeys, 'passkey')}"
    return f"Delete the app {shown_app(options.app)} with its {lost}?"


async def delete_app(records: Records, options: argparse.Namespace) -> Row:
    """`{"deleted": id}`."""
    await records.directory.delete_app(options.app.id)
    return {"deleted": options.app.id}


def _show_defaults(options: argparse.Namespace) -> int:
    """The keys with their defaults, which need no database."""
    print_answer(_policy_rows(), as_json=options.json, empty="")
    return 0


async def show_policy(records: Records, options: argparse.Namespace) -> list[Row]:
    """The keys with the app's values."""
    return _policy_rows((await chosen_app(records, options.app)).policy)


def _policy_rows(policy: Policy | None = None) -> list[Row]:
    default, present = _policy_row(Policy()), _policy_row(policy) if policy else None
    return [
        {
            "key": key.name,
            **({"value": present[key.name]} if present else {}),
            "default": default[key.name],
            "values": key.values.in_words,
            "meaning": key.meaning,
        }
        for key in policy_keys()
    ]


async def create_key(records: Records, options: argparse.Namespace) -> Row:
    """`{"key_id", "api_key"}`."""
    key, secret = await records.directory.create_key(options.app.id, options.name)
    return {"key_id": key.id, "api_key": secret}


async def list_keys(records: Records, options: argparse.Namespace) -> list[Row]:
    """An app's keys, revoked ones too."""
    return [_key_row(key) for key in await records.directory.keys(options.app.id)]


async def revoke_key(records: Records, options: argparse.Namespace) -> Row:
    """`{"revoked": id}`."""
    if not await records.directory.revoke_key(options.app.id, options.key):
        raise InvalidSetting("The app has no such unrevoked key; `broker key list` shows the ids.")
    return {"revoked": options.key}


def _app_row(app: RelyingParty) -> Row:
    return {
        "app_id": app.id,
        "name": app.name,
        "rp_id": app.rp_id,
        "origins": list(app.origins),
        "related_origins": list(app.related_origins),
        "policy": _policy_row(app.policy),
        "created_at": app.created_at,
    }


def _policy_row(policy: Policy) -> dict[str, object]:
    return {
        **{key.name: policy[key] for key in policy_keys()},
        "algorithms": [ALGORITHMS[number] for number in policy.algorithms],
        "attestation_roots": len(policy.attestation_roots),  # their number: they are long
    }


def _key_row(key: ApiKey) -> Row:
    return {
        "key_id": key.id,
        "hint": key.hint,
        "name": key.name,
        "created_at": key.created_at,
        "revoked_at": key.revoked_at,
    }

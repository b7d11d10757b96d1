"""`broker user` and `broker passkey`: the users of an app and their passkeys."""

from __future__ import annotations

import argparse

from broker.cli.output import Row, counted, harmless, say
from broker.cli.parsing import Commands, add_group, option, whole
from broker.cli.records import Records, add, shown_app
from broker.errors import InvalidSetting
from broker.model import Credential, User, base64url


def add_commands(commands: Commands) -> None:
    """Add `passkey` and `user`."""
    group = add_group(commands, "passkey", "users' passkeys")
    add(
        group,
        "list",
        "a user's passkeys",
        list_passkeys,
        app=True,
        options=(_USER,),
        columns=(
            "passkey_id",
            "name",
            "live",
            "backed_up",
            "use_count",
            "created_at",
            "last_used_at",
        ),
        examples=("passkey list --user user-7", "passkey list --app Shop --user user-7 --json"),
    )
    command = add(
        group,
        "revoke",
        "revoke passkeys of a user",
        revoke_passkeys,
        app=True,
        removes=True,
        question=ask_about_passkeys,
        options=(_USER,),
        examples=(
            "passkey revoke --user user-7 --passkey PASSKEY_ID",
            "passkey revoke --app Shop --user user-7 --all --yes",
        ),
    )
    which = command.add_mutually_exclusive_group(required=True)
    which.add_argument("--passkey", metavar="ID", help="this one, as `passkey list` shows it")
    which.add_argument("--all", action="store_true", help="all of them")

    group = add_group(commands, "user", "users")
    add(
        group,
        "list",
        "an app's users, oldest first",
        list_users,
        app=True,
        options=(
            option("--user", "only this one, byte for byte", metavar="EXTERNAL_ID"),
            option(
                "--status", "only those with this status", choices=("active", "inactive", "pending")
            ),
            option(
                "--limit",
                "users of a page (default 100)",
                type=whole(1, 1000),
                default=100,
                metavar="N",
            ),
            option(
                "--page", "which page (default 1)", type=whole(1, 1_000_000), default=1, metavar="N"
            ),
        ),
        columns=("external_id", "status", "login_count", "last_login_at", "created_at", "user_id"),
        examples=(
            "user list",
            "user list --app Shop --status pending --limit 50 --page 2",
            "user list --user user-7 --json",
        ),
    )
    add(
        group,
        "disable",
        "end a user's sign-ins and registrations until the user is enabled",
        disable_user,
        app=True,
        options=(_USER,),
        examples=("user disable --app Shop --user user-7",),
    )
    add(
        group,
        "enable",
        "enable a disabled user, with the passkeys of before",
        enable_user,
        app=True,
        options=(_USER,),
        examples=("user enable --app Shop --user user-7",),
    )
    add(
        group,
        "delete",
        "delete a user with passkeys and approvals",
        delete_user,
        app=True,
        removes=True,
        question=ask_about_user,
        options=(_USER,),
        examples=("user delete --user user-7", "user delete --app Shop --user user-7 --yes"),
    )


_USER = option("--user", "your backend's id of the user", required=True, metavar="EXTERNAL_ID")


async def list_passkeys(records: Records, options: argparse.Namespace) -> list[Row]:
    """A user's passkeys."""
    user = await records.directory.user(options.app, external_id=options.user)
    return [_passkey_row(c) for c in await records.directory.credentials(options.app, user)]


async def ask_about_passkeys(records: Records, options: argparse.Namespace) -> str:
    """The question, with the user who loses all passkeys; "" for the revocation of one passkey."""
    if not options.all:
        return ""
    user = await records.directory.user(options.app, external_id=options.user)
    number = len(await records.directory.credentials(options.app, user))
    return f"Revoke {counted(number, 'passkey')} of {_shown(options)}?"


async def revoke_passkeys(records: Records, options: argparse.Namespace) -> Row:
    """`{"revoked": [ids]}`."""
    user = await records.directory.user(options.app, external_id=options.user)
    passkey = None if options.all else options.passkey
    return {"revoked": await records.directory.revoke(options.app, user, passkey)}


async def list_users(records: Records, options: argparse.Namespace) -> list[Row]:
    """A page of users. Without `--json` a sentence names the number of pages."""
    if options.user is not None and "\0" in options.user:
        raise InvalidSetting("An external id has no NUL character.")
    users, total = await records.directory.users(
        options.app,
        limit=options.limit,
        page=options.page,
        external_id=options.user,
        status=options.status,
    )
    pages = max(1, -(-total // options.limit))
    if pages > 1 and not options.json:
        say(f"page {options.page} of {pages}, {total} users in all; --page shows another one.")
    return [_user_row(user) for user in users]


async def disable_user(records: Records, options: argparse.Namespace) -> Row:
    """`{"disabled": external id}`."""
    await records.directory.disable_user(options.app, options.user, disabled=True)
    return {"disabled": options.user}


async def enable_user(records: Records, options: argparse.Namespace) -> Row:
    """`{"enabled": external id}`."""
    await records.directory.disable_user(options.app, options.user, disabled=False)
    return {"enabled": options.user}


async def ask_about_user(records: Records, options: argparse.Namespace) -> str:
    """The question, with the user and the number of passkeys."""
    user = await records.directory.user(options.app, external_id=options.user)
    number = len(await records.directory.credentials(options.app, user))
    return f"Delete {_shown(options)} with {counted(number, 'passkey')}?"


async def delete_user(records: Records, options: argparse.Namespace) -> Row:
    """`{"deleted": external id}`."""
    await records.directory.delete_user(options.app, options.user)
    return {"deleted": options.user}


def _shown(options: argparse.Namespace) -> str:
    return f"the user {harmless(options.user)} of the app {shown_app(options.app)}"


def _user_row(user: User) -> Row:
    return {
        "user_id": user.id,
        "external_id": user.external_id,
        "status": user.status,
        "login_count": user.login_count,
        "last_login_at": user.last_login_at,
        "created_at": user.created_at,
        "updated_at": user.updated_at,
    }


def _passkey_row(credential: Credential) -> Row:
    return {
        "passkey_id": credential.id,
        "name": credential.nickname or credential.user_name,
        "credential_id": base64url(credential.credential_id),
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

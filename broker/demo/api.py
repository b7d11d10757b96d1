"""The sample site's own backend: the part that a site adds to offer passkeys.

Each ceremony is two requests of the page.

- `start` opens a transaction at the broker, stores in the session what its proof must show, and
  gives the transaction id to the page. The page runs the ceremony against the broker and gets a
  nonce.
- `finish` takes the begun ceremony out of the session; the first answer spends it, right or wrong.
  It compares the page's transaction with the stored digest. It redeems the nonce and states
  purpose, transaction and user. A nonce of another purpose, transaction or person is refused.

A sign-in without a name has no transaction, because the user is not known before. Its nonce is
redeemed for the purpose alone, and the external id on the receipt must be an account of this site.

Two decisions: sign-in by name tells that a name has no account, because sign-up must tell that a
name has one. A visitor may revoke the last passkey after a clear warning (`last: true`), because a
site that refuses keeps a lost key valid.
"""

from __future__ import annotations

import hmac
import logging
from typing import Any

from aiohttp import web

from broker.demo.accounts import (
    NAME_LIMIT,
    Account,
    Ceremony,
    InvalidName,
    Kind,
    NameTaken,
    Session,
    hash_token,
    parse_name,
)
from broker.demo.guard import (
    ACCOUNTS,
    APP_ID,
    CLIENT,
    REDEMPTIONS,
    RENEWED,
    DemoRefusal,
    answer,
    clear_cookie,
    current_session,
    read_body,
    set_cookie,
    text_field,
)
from broker.demo.replay import Redemption
from broker.sdk.passkey_broker import (
    InvalidNonce,
    InvalidRequest,
    NoPasskeys,
    PasskeyNotFound,
    Receipt,
    UserNotFound,
)

routes = web.RouteTableDef()

log = logging.getLogger(__name__)

NAME_FIELD_LIMIT = 256  # characters before Unicode normalisation; a name has at most 64 after it
TOKEN_LIMIT = 256


def _person(account: Account) -> dict[str, Any]:
    return {"name": account.name, "external_id": account.external_id, "since": account.created_at}


def _name(body: dict[str, Any], field: str = "name") -> tuple[str, str]:
    """A name or a label. An empty text is the visitor's mistake, not the page's: `parse_name` has
    the sentence for it.
    """
    try:
        return parse_name(text_field(body, field, NAME_FIELD_LIMIT, least=0))
    except InvalidName as fault:
        raise DemoRefusal(400, "invalid_name", str(fault)) from None


async def _renewed(request: web.Request, old: Session | None) -> Session:
    """A new session, in which a ceremony begins. Every answer carries its token, also a refusal."""
    request[RENEWED], session = await request.app[ACCOUNTS].renew(old)
    return session


async def _signed_in(request: web.Request) -> tuple[Session, Account]:
    session = await current_session(request)
    if session is None or session.account is None:
        raise DemoRefusal(401, "not_signed_in", "You're signed out. Sign in to go on.")
    return session, session.account


async def _finishing(request: web.Request) -> tuple[str, str]:
    """The nonce and the transaction id of the page, at the end of a ceremony."""
    body = await read_body(request)
    return text_field(body, "nonce", TOKEN_LIMIT), text_field(body, "transaction_id", TOKEN_LIMIT)


async def _expected(
    request: web.Request, kind: Kind, transaction_id: str
) -> tuple[Session, Ceremony]:
    """The session and its begun ceremony of this kind, which is spent, also if it is of another
    transaction.
    """
    session = await current_session(request)
    ceremony = await request.app[ACCOUNTS].take(session, kind) if session is not None else None
    if session is None or ceremony is None:
        raise DemoRefusal(
            409, "nothing_begun", "That took too long, or was already finished. Start again."
        )
    if not hmac.compare_digest(ceremony.transaction_hash, hash_token(transaction_id)):
        raise _nonce_refused()
    return session, ceremony


def _nonce_refused() -> DemoRefusal:
    return DemoRefusal(
        401,
        "nonce_refused",
        "That proof was too late, already used, or meant for something else. Start again.",
    )


async def _redeem(request: web.Request, redemption: Redemption) -> Receipt:
    try:
        return await redemption.send(request.app[CLIENT])
    except (InvalidNonce, InvalidRequest):
        raise _nonce_refused() from None


async def _keep_claimed_name(request: web.Request, receipt: Receipt) -> None:
    """Label a new passkey with the claimed name of its authenticator (WebAuthn L3 §6.5.2), until
    the owner changes it.
    """
    if receipt.authenticator_name_claimed:
        await request.app[ACCOUNTS].set_label(
            receipt.external_id,
            receipt.passkey_id,
            receipt.authenticator_name_claimed[:NAME_LIMIT],
        )


async def _welcome(
    request: web.Request, session: Session | None, receipt: Receipt, redemption: Redemption
) -> web.Response:
    """Sign in the user of the receipt, under a new session token."""
    accounts = request.app[ACCOUNTS]
    token = await accounts.sign_in(session, receipt.external_id, receipt.passkey_id)
    account = await accounts.owner(receipt.external_id)
    if token is None or account is None:
        raise DemoRefusal(
            404,
            "no_such_account",
            "This passkey is good, but its account isn't on this site any more. "
            "Sign up to make a new one.",
        )
    request.app[REDEMPTIONS].keep(hash_token(token), redemption)
    response = answer(account=_person(account), receipt=_highlights(receipt))
    set_cookie(request, response, token)
    return response


def _highlights(receipt: Receipt) -> dict[str, Any]:
    """The fields of a receipt that the page shows."""
    return {
        "purpose": receipt.purpose,
        "external_id": receipt.external_id,
        "passkey_id": receipt.passkey_id,
        "origin": receipt.origin,
        "user_verified": receipt.user_verified,
        "backup_eligible": receipt.backup_eligible,
        "backed_up": receipt.backed_up,
        "attestation": receipt.attestation,
        "authenticator": receipt.authenticator_name_claimed,
    }


@routes.get("/api/state")
async def state(request: web.Request) -> web.Response:
    """The app id for the page, and the signed-in account."""
    session = await current_session(request)
    account = session.account if session else None
    return answer(app_id=request.app[APP_ID], account=_person(account) if account else None)


@routes.post("/api/sign-up/start")
async def sign_up_start(request: web.Request) -> web.Response:
    """Reserve the name for this session, and open a register transaction for its new external
    id.
    """
    name, key = _name(await read_body(request))
    old = await current_session(request)
    if old is not None and old.account is not None:
        raise DemoRefusal(
            409, "signed_in", f"You're signed in as {old.account.name}. Sign out first."
        )
    session = await _renewed(request, old)
    try:
        account = await request.app[ACCOUNTS].reserve(name, key, session)
    except NameTaken:
        raise DemoRefusal(
            409,
            "name_taken",
            f"The name “{name}” is taken. If it's yours, sign in; otherwise pick another one.",
        ) from None
    return await _begin_registration(request, session, "sign-up", account)


async def _begin_registration(
    request: web.Request, session: Session, kind: Kind, account: Account
) -> web.Response:
    transaction_id = await request.app[CLIENT].create_register_transaction(
        account.external_id, account.name
    )
    await request.app[ACCOUNTS].expect(session, kind, account.external_id, transaction_id)
    return answer(transaction_id=transaction_id)


@routes.post("/api/sign-up/finish")
async def sign_up_finish(request: web.Request) -> web.Response:
    nonce, transaction_id = await _finishing(request)
    session, ceremony = await _expected(request, "sign-up", transaction_id)
    redemption = Redemption(nonce, "register", transaction_id, ceremony.external_id)
    receipt = await _redeem(request, redemption)
    response = await _welcome(request, session, receipt, redemption)
    await _keep_claimed_name(request, receipt)
    return response


@routes.post("/api/sign-in/start")
async def sign_in_start(request: web.Request) -> web.Response:
    """Open an authenticate transaction for the account of a name."""
    name, key = _name(await read_body(request))
    accounts = request.app[ACCOUNTS]
    account = await accounts.find(key)
    if account is None:
        raise DemoRefusal(
            404, "unknown_name", f"There's no account called “{name}” here. Sign up to make one."
        )
    try:
        transaction_id = await request.app[CLIENT].create_authenticate_transaction(
            account.external_id
        )
    except (NoPasskeys, UserNotFound):
        raise DemoRefusal(
            409,
            "no_passkeys",
            f"“{account.name}” has no passkeys left, so nobody can sign in to it any more.",
        ) from None
    session = await _renewed(request, await current_session(request))
    await accounts.expect(session, "sign-in", account.external_id, transaction_id)
    return answer(transaction_id=transaction_id)


@routes.post("/api/sign-in/finish")
async def sign_in_finish(request: web.Request) -> web.Response:
    nonce, transaction_id = await _finishing(request)
    session, ceremony = await _expected(request, "sign-in", transaction_id)
    redemption = Redemption(nonce, "authenticate", transaction_id, ceremony.external_id)
    return await _welcome(request, session, await _redeem(request, redemption), redemption)


@routes.post("/api/sign-in/discoverable")
async def sign_in_discoverable(request: web.Request) -> web.Response:
    """Sign in the passkey's owner, without a transaction and a name."""
    nonce = text_field(await read_body(request), "nonce", TOKEN_LIMIT)
    redemption = Redemption(nonce, "authenticate")
    receipt = await _redeem(request, redemption)
    return await _welcome(request, await current_session(request), receipt, redemption)


@routes.post("/api/redeem-again")
async def redeem_again(request: web.Request) -> web.Response:
    """Repeat the session's last redemption. The answer has the broker's refusal and its replay
    alarm.
    """
    await read_body(request)
    session, account = await _signed_in(request)
    redemption = request.app[REDEMPTIONS].of(session.token_hash)
    if redemption is None:
        raise DemoRefusal(
            409,
            "no_nonce_kept",
            "This site doesn't keep that nonce any more. "
            "Sign in again, then redeem it twice at once.",
        )
    try:
        await redemption.send(request.app[CLIENT])
    except InvalidNonce as refusal:
        return answer(
            refusal={"status": refusal.status, "code": refusal.code, "error": refusal.message},
            alarm=await _replay_alarm(request, account),
        )
    log.error("the broker redeemed a nonce twice")
    raise DemoRefusal(
        502,
        "redeemed_twice",
        "The broker redeemed the nonce a second time, which must never happen. "
        "Its operator has to know.",
    )


async def _replay_alarm(request: web.Request, account: Account) -> dict[str, Any] | None:
    """The newest replay alarm of the account. A site would follow these events with a cursor, and
    end the session that `first_request_id` opened.
    """
    found = await request.app[CLIENT].list_events(
        action="nonce.replayed", user=account.external_id, limit=1
    )
    for event in found.events:
        if event.payload is not None:
            return {"first_at": event.payload["first_at"], "again_at": event.at.isoformat()}
    return None


@routes.post("/api/sign-out")
async def sign_out(request: web.Request) -> web.Response:
    await read_body(request)
    session = await current_session(request)
    if session is not None:
        request.app[REDEMPTIONS].forget(session.token_hash)
        await request.app[ACCOUNTS].sign_out(session)
    response = answer()
    clear_cookie(request, response)
    return response


@routes.get("/api/passkeys")
async def passkeys(request: web.Request) -> web.Response:
    session, account = await _signed_in(request)
    return answer(passkeys=await _list(request, session, account))


async def _list(request: web.Request, session: Session, account: Account) -> list[dict[str, Any]]:
    """The account's passkeys as the page shows them, oldest first."""
    labels = await request.app[ACCOUNTS].labels(account.external_id)
    found = await request.app[CLIENT].list_passkeys(account.external_id)
    return [
        {
            "id": passkey.id,
            "name": passkey.name,
            "label": labels.get(passkey.id),
            "kind": passkey.type,
            "created_at": passkey.created_at.isoformat(),
            "last_used_at": passkey.last_used_at.isoformat() if passkey.last_used_at else None,
            "backed_up": passkey.backed_up,
            "current": passkey.id == session.passkey_id,
        }
        for passkey in sorted(found, key=lambda passkey: passkey.created_at)
    ]


@routes.post("/api/passkeys/start")
async def add_start(request: web.Request) -> web.Response:
    """Open a register transaction for the signed-in account, and for no other."""
    await read_body(request)
    session, account = await _signed_in(request)
    return await _begin_registration(request, session, "add", account)


@routes.post("/api/passkeys/finish")
async def add_finish(request: web.Request) -> web.Response:
    nonce, transaction_id = await _finishing(request)
    session, account = await _signed_in(request)
    _, ceremony = await _expected(request, "add", transaction_id)
    redemption = Redemption(nonce, "register", transaction_id, ceremony.external_id)
    receipt = await _redeem(request, redemption)
    request.app[REDEMPTIONS].keep(session.token_hash, redemption)
    await _keep_claimed_name(request, receipt)
    return answer(receipt=_highlights(receipt), passkeys=await _list(request, session, account))


@routes.post("/api/passkeys/{passkey_id:[A-Za-z0-9]{24}}/label")
async def label(request: web.Request) -> web.Response:
    """Label a passkey of the account. The label is this site's; the broker and the device keep
    their names.
    """
    text, _ = _name(await read_body(request), "label")
    session, account = await _signed_in(request)
    passkey_id = request.match_info["passkey_id"]
    owned = await request.app[CLIENT].list_passkeys(account.external_id)
    if all(passkey.id != passkey_id for passkey in owned):
        raise _unknown_passkey()
    await request.app[ACCOUNTS].set_label(account.external_id, passkey_id, text)
    return answer(passkeys=await _list(request, session, account))


@routes.post("/api/passkeys/{passkey_id:[A-Za-z0-9]{24}}/revoke")
async def revoke(request: web.Request) -> web.Response:
    """Revoke a passkey of the account; the last one only if the page says that it warned the
    visitor.
    """
    body = await read_body(request)
    session, account = await _signed_in(request)
    passkey_id = request.match_info["passkey_id"]
    client = request.app[CLIENT]
    owned = {passkey.id for passkey in await client.list_passkeys(account.external_id)}
    if passkey_id not in owned:
        raise _unknown_passkey()
    if len(owned) == 1 and body.get("last") is not True:
        raise DemoRefusal(
            409,
            "last_passkey",
            "This is your only passkey. Without it nobody can sign in to this account again.",
        )
    try:
        await client.revoke_passkey(account.external_id, passkey_id)
    except PasskeyNotFound:
        raise _unknown_passkey() from None
    accounts = request.app[ACCOUNTS]
    await accounts.drop_label(account.external_id, passkey_id)
    ended = await accounts.end_sessions_of_passkey(account.external_id, passkey_id, keep=session)
    return answer(ended=ended, passkeys=await _list(request, session, account))


def _unknown_passkey() -> DemoRefusal:
    return DemoRefusal(
        404, "unknown_passkey", "That passkey isn't one of yours; perhaps it's revoked already."
    )

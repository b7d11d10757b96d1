"""FastAPI. Run it beside page.html: `uvicorn fastapi_app:app --host localhost --port 8081`."""

import os
import secrets
from pathlib import Path
from typing import Annotated, Any

from fastapi import Cookie, FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from passkey_broker import AsyncBrokerClient, BrokerError
from pydantic import BaseModel

URL, APP, KEY = (os.environ[name] for name in ("PASSKEYS_URL", "PASSKEYS_APP_ID", "PASSKEYS_KEY"))
broker = AsyncBrokerClient(URL, APP, KEY)
app = FastAPI()
accounts: dict[str, str] = {}  # yours: a database
sessions: dict[str, dict[str, Any]] = {}


class Named(BaseModel):
    name: str


class Finished(BaseModel):
    nonce: str


def answer(body: dict[str, str], **session: object) -> Response:
    """With a new session each time, so that nobody can plant one."""
    response = JSONResponse(body)
    sessions[key := secrets.token_urlsafe()] = session
    response.set_cookie("session", key, httponly=True, samesite="strict")
    return response


@app.get("/")
def page() -> FileResponse:
    return FileResponse(Path(__file__).with_name("page.html"))


@app.get("/broker")
def where() -> dict[str, str]:
    return {"url": URL, "app": APP}


@app.post("/begin-sign-up")
async def begin_sign_up(asked: Named) -> Response:
    # nobody adds a passkey by typing an account's name
    if not asked.name or asked.name in accounts:
        return PlainTextResponse("Choose another name.", 409)
    account = f"user-{secrets.token_hex(8)}"
    transaction = await broker.create_register_transaction(account, asked.name)
    expected = {"purpose": "register", "transaction_id": transaction, "external_id": account}
    return answer({"transaction": transaction}, name=asked.name, expected=expected)


@app.post("/begin-sign-in")
async def begin_sign_in(asked: Named) -> Response:
    if asked.name not in accounts:
        return PlainTextResponse("There is no account of this name.", 404)
    account = accounts[asked.name]
    transaction = await broker.create_authenticate_transaction(account)
    expected = {"purpose": "authenticate", "transaction_id": transaction, "external_id": account}
    return answer({"transaction": transaction}, expected=expected)


@app.post("/finish")
async def finish(asked: Finished, session: Annotated[str, Cookie()] = "") -> Response:
    mine = sessions.pop(session, {})
    expected = mine.get("expected", {"purpose": "authenticate"})
    receipt = await broker.verify_nonce(asked.nonce, **expected)
    if receipt.purpose == "register":
        accounts[mine["name"]] = receipt.external_id
    return answer({"account": receipt.external_id}, account=receipt.external_id)


@app.exception_handler(BrokerError)
def refused(_: Request, error: BrokerError) -> Response:
    return PlainTextResponse(error.message, 503 if (error.status or 503) >= 500 else 409)

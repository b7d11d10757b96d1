"""Django, in one file. Run it beside page.html: `python django_app.py runserver localhost:8081`."""

import json
import os
import secrets
import sys
from pathlib import Path

from django.conf import settings
from django.core.management import execute_from_command_line
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.urls import path
from passkey_broker import BrokerClient, BrokerError

settings.configure(
    ALLOWED_HOSTS=["localhost"],
    ROOT_URLCONF=__name__,
    SECRET_KEY=secrets.token_urlsafe(),
    SESSION_ENGINE="django.contrib.sessions.backends.signed_cookies",
    SESSION_COOKIE_SAMESITE="Strict",  # another site's page sends no session, so it can't post here
    MIDDLEWARE=["django.contrib.sessions.middleware.SessionMiddleware"],
)
URL, APP, KEY = (os.environ[name] for name in ("PASSKEYS_URL", "PASSKEYS_APP_ID", "PASSKEYS_KEY"))
broker = BrokerClient(URL, APP, KEY)
accounts: dict[str, str] = {}  # yours: a model


def page(_: HttpRequest) -> HttpResponse:
    return HttpResponse(Path(__file__).with_name("page.html").read_bytes())


def where(_: HttpRequest) -> HttpResponse:
    return JsonResponse({"url": URL, "app": APP})


def begin_sign_up(request: HttpRequest) -> HttpResponse:
    name = json.loads(request.body)["name"]
    if not name or name in accounts:  # nobody adds a passkey by typing an account's name
        return HttpResponse("Choose another name.", status=409)
    account = f"user-{secrets.token_hex(8)}"
    transaction = broker.create_register_transaction(account, name)
    expect(request, "register", transaction, account)
    request.session["name"] = name
    return JsonResponse({"transaction": transaction})


def begin_sign_in(request: HttpRequest) -> HttpResponse:
    name = json.loads(request.body)["name"]
    if name not in accounts:
        return HttpResponse("There is no account of this name.", status=404)
    transaction = broker.create_authenticate_transaction(accounts[name])
    expect(request, "authenticate", transaction, accounts[name])
    return JsonResponse({"transaction": transaction})


def expect(request: HttpRequest, purpose: str, transaction: str, account: str) -> None:
    request.session.flush()  # a new session each time, so that nobody can plant one
    expected = {"purpose": purpose, "transaction_id": transaction, "external_id": account}
    request.session["expected"] = expected


def finish(request: HttpRequest) -> HttpResponse:
    expected = request.session.pop("expected", {"purpose": "authenticate"})
    try:
        receipt = broker.verify_nonce(json.loads(request.body)["nonce"], **expected)
    except BrokerError as error:
        return HttpResponse(error.message, status=409)
    if receipt.purpose == "register":
        accounts[request.session["name"]] = receipt.external_id
    request.session.flush()
    request.session["account"] = receipt.external_id
    return JsonResponse({"account": receipt.external_id})


views = [begin_sign_up, begin_sign_in, finish]
urlpatterns = [path("", page), path("broker", where)]
urlpatterns += [path(view.__name__.replace("_", "-"), view) for view in views]
if __name__ == "__main__":
    execute_from_command_line(sys.argv)

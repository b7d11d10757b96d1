"""Hanko's Passkey API, under `/hanko/{tenant_id}`; a tenant is an app, and its id the app's.

Backends call it with an API key in the header `apiKey`. Pages may call the finalize routes, a login
without a user id, and the key set directly. A ceremony has no handle on this wire: the challenge
inside the answer finds it. Finalize answers with a signed token. A verifier checks the token
offline, so the token can be replayed until it expires. Its `jti` is a nonce of the broker, which a
backend may redeem once through the Flex API instead. The vendor's word "transaction" means a
payload that a user approves by signing.

README.md summarises the wire contract, with every decision where the contract is open and every
deviation from it.

    refusals     refusals in the vendor's shape
    ceremonies   initialize and finalize of registration, login, second factor and transaction; the
                 token
    records      credentials, transactions, audit log, key set
    serialised   the text that an approved payload is hashed as
"""

from __future__ import annotations

import re

from aiohttp import web

from broker.dialects.hanko import ceremonies, records
from broker.dialects.hanko.refusals import STATUS, TITLES, render
from broker.web import Handler, browser_routes, keyed, preflight_any, public_app

__all__ = ["PATHS", "STATUS", "TITLES", "render", "routes"]

PATHS = re.compile(r"/hanko(?:/|\Z)")
_TENANT = "/hanko/{app_id}"
_KEYS = f"{_TENANT}/.well-known/jwks.json"
_PAGE_HEADERS = "content-type, apikey"  # the SDK sends both with every request


def routes(*, management: bool, browser: bool) -> list[web.RouteDef]:
    """The routes of a port that serves keyed callers, pages, or both.

    A port for pages serves the pages' routes without a key. If such a port also takes keys, a login
    that names a user needs a key. A port for keyed callers alone serves the same paths with a key,
    so that the vendor's SDK on a backend needs one address only.
    """
    found = [web.get(_KEYS, public_app(records.key_set), allow_head=False)]
    keyed_here = dict(_KEYED)
    if browser:
        found.append(web.options(_KEYS, preflight_any(_PAGE_HEADERS)))
        begin = ceremonies.begin_login if management else ceremonies.begin_login_of_anyone
        posts = {
            f"{_TENANT}/{path}": handler for path, handler in {**_SHARED, _LOGIN: begin}.items()
        }
        found += browser_routes(posts, headers=_PAGE_HEADERS)
    else:
        keyed_here |= {("POST", path): handler for path, handler in _SHARED.items()}
    if management:
        for (method, path), handler in keyed_here.items():
            more = {"allow_head": False} if method == "GET" else {}
            guarded = keyed(handler, ceremonies.KEY, limited=not path.endswith("/finalize"))
            found.append(web.route(method, f"{_TENANT}/{path}", guarded, **more))
    return found


_LOGIN = "login/initialize"
# Routes for pages, or for keyed callers on a port without pages.
_SHARED: dict[str, Handler] = {
    "registration/finalize": ceremonies.finish_registration,
    _LOGIN: ceremonies.begin_login,
    "login/finalize": ceremonies.finish_login,
}
_KEYED: dict[tuple[str, str], Handler] = {
    ("POST", "registration/initialize"): ceremonies.begin_registration,
    ("POST", "mfa/registration/initialize"): ceremonies.begin_second_factor_registration,
    ("POST", "mfa/registration/finalize"): ceremonies.finish_second_factor_registration,
    ("POST", "mfa/login/initialize"): ceremonies.begin_second_factor_login,
    ("POST", "mfa/login/finalize"): ceremonies.finish_second_factor_login,
    ("POST", "transaction/initialize"): ceremonies.begin_approval,
    ("POST", "transaction/finalize"): ceremonies.finish_approval,
    ("GET", "transaction/{user_id}"): records.list_approvals,
    ("GET", "credentials"): records.list_credentials,
    ("GET", "credentials/{credential_id}"): records.get_credential,
    ("PATCH", "credentials/{credential_id}"): records.rename_credential,
    ("DELETE", "credentials/{credential_id}"): records.revoke_credential,
    ("GET", "audit_logs"): records.list_audit_logs,
}

"""Signed receipts in the Flex API, beyond the contract: JSON Web Tokens (RFC 7519) that other
services verify offline.

A backend that redeems a nonce with `"signed": true` gets the receipt and, as `token`, the same
receipt as a JWT, signed with ES256 by the app's own key. The backend passes the token to services
without an API key. These verify it with the app's public key set, `GET /.well-known/jwks.json`
below the app.

    iss     the app's address: `BROKER_PUBLIC_URL` and the path, or the path alone
    sub     the external id
    aud     a list of the app's id alone
    jti     the digest of the nonce, which doesn't reveal the nonce

A nonce gives one token, so no `jti` repeats. The other claims are the receipt's. A verifier must
compare `purpose`: a registration is no login.

A verifier offline can't see a replay before `exp`, `BROKER_RECEIPT_TOKEN_LIFE` seconds after `iat`.
A backend that must act only once on a token stores its `jti` until then, or redeems a nonce
instead.
"""

from __future__ import annotations

from typing import Any

from aiohttp import web

from broker.broker import Signed
from broker.dialects.flex import RECEIPT_TOKEN_LIFE
from broker.dialects.flex.objects import receipt_object
from broker.errors import InvalidRequest
from broker.model import Caller, Receipt, RelyingParty, TokenAlgorithm, base64url
from broker.signing import JWKS_MAX_AGE
from broker.tokens import digest
from broker.web import DIRECTORY, PUBLIC_URL, SETTINGS, SIGNING, json_answer, public_app

ALGORITHM: TokenAlgorithm = "ES256"


def receipt_token(request: web.Request, app: RelyingParty) -> Signed:
    """The signed token of a redemption with `signed`.

    Raises:
        InvalidRequest: the broker has no secret key, so it signs nothing.
    """
    settings = request.app[SETTINGS]
    if not settings.secret_key:
        raise InvalidRequest(
            "This broker signs nothing; leave out signed.",
            reason="no_secret_key",
            hint="The setting BROKER_SECRET_KEY is missing; signed receipts need it.",
        )

    def claims(receipt: Receipt, nonce: str) -> dict[str, Any]:
        issued = int(request.app[DIRECTORY].now().timestamp())
        return {
            "iss": f"{request.app[PUBLIC_URL]}/v1/apps/{app.id}",
            "sub": receipt.external_id,
            "aud": [app.id],
            "iat": issued,
            "exp": issued + settings[RECEIPT_TOKEN_LIFE],
            "jti": base64url(digest("nonce", app.id, nonce)),
        } | receipt_object(receipt)

    return Signed(app, ALGORITHM, claims)


async def key_set(request: web.Request, caller: Caller) -> web.StreamResponse:
    """The public keys of the app, for any page and any service. Without a secret key the set has
    only earlier keys, and may be empty.
    """
    signing = request.app[SIGNING]
    if request.app[SETTINGS].secret_key:
        keys = (await signing.key_set(caller.app, ALGORITHM))["keys"]
    else:
        keys = [key.public for key, state in await signing.list_keys(caller.app) if state != "gone"]
    return json_answer({"keys": keys}, headers={"Cache-Control": f"public, max-age={JWKS_MAX_AGE}"})


def routes(base: str) -> list[web.RouteDef]:
    """The public route below `base`, the path of an app."""
    return [web.get(f"{base}/.well-known/jwks.json", public_app(key_set), allow_head=False)]

"""The options of a ceremony as JSON (WebAuthn L3 §5.1.8, `PublicKeyCredentialCreationOptionsJSON`
and its sibling), which every vendor hands to the browser in an envelope of its own. Without nulls:
browsers refuse a null where a member may be absent."""

from __future__ import annotations

from tests.support.shapes import HANDLE, OBJECT, text, word

CHALLENGE = text("<32 bytes>", "<64 bytes>")
TRANSPORT = word("ble", "hybrid", "internal", "nfc", "usb", "cable", "smart-card")
DESCRIPTOR: dict[str, object] = {
    "type": word("public-key"),
    "id": text("<32 bytes>"),
    "transports?": [TRANSPORT],
}
USER: dict[str, object] = {"id": HANDLE, "name": str, "displayName": str}
VERIFICATION = word("required", "preferred", "discouraged")
CREATION: dict[str, object] = {
    "rp": {"id": str, "name": str},
    "user": USER,
    "challenge": CHALLENGE,
    "pubKeyCredParams": [{"type": word("public-key"), "alg": int}],
    "timeout?": int,
    "excludeCredentials?": [DESCRIPTOR],
    "authenticatorSelection?": {
        "authenticatorAttachment?": word("platform", "cross-platform"),
        "residentKey?": word("required", "preferred", "discouraged"),
        "requireResidentKey?": bool,
        "userVerification?": VERIFICATION,
    },
    "hints?": [word("security-key", "client-device", "hybrid")],
    "attestation?": word("none", "indirect", "direct", "enterprise"),
    "extensions?": OBJECT,
}
REQUEST: dict[str, object] = {
    "challenge": CHALLENGE,
    "rpId": str,
    "timeout?": int,
    "allowCredentials?": [DESCRIPTOR],
    "userVerification?": VERIFICATION,
    "hints?": [word("security-key", "client-device", "hybrid")],
    "extensions?": OBJECT,
}


def jwks(key: dict[str, object]) -> dict[str, object]:
    """A JWK set (RFC 7517 §5) of one kind of key."""
    return {"keys": [{"kid": text("<id>"), "use": word("sig"), **key}]}


RSA = {"kty": word("RSA"), "alg": word("RS256"), "e": str, "n": text("<256 bytes>")}
P256 = {
    "kty": word("EC"),
    "alg": word("ES256"),
    "crv": word("P-256"),
    "x": text("<32 bytes>"),
    "y": text("<32 bytes>"),
}

"""Decoys: passkeys for users who have none, so that a page can't enumerate users.

With policy `decoys` an authentication of an unknown user, or of a user without a passkey, begins
like any other. The page gets credential ids that no authenticator has, and every answer is refused
like a wrong answer of a known user. The steps, the stored values and the signature check are those
of a genuine passkey, and so are their times.

Decoys are stable: an HMAC of the user's external id, under a key derived from the app and the last
secret of `BROKER_SECRET_KEY`. So a second look finds the same ids, on every instance, until that
secret is removed. Lengths and transports are those of common authenticators.

The second half of a decoy's credential id is an HMAC of the first half. So the broker recognises a
decoy that a page brings to another ceremony, and judges it like another user's passkey: there is no
signal of an unknown passkey, and the registration of a decoy's id is refused as a duplicate. The
key of that HMAC is derived from the RP ID, because at another RP ID a genuine passkey is unknown.

No answer passes as a decoy. The private key of its public key was never kept, and the write of a
sign-in finds no such credential.

Not hidden: a disabled user, whom the backend is told of, and a user who registers a passkey, whose
decoys end.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable, Sequence
from functools import lru_cache

from broker import ceremony
from broker.errors import Unavailable
from broker.model import AllowedCredential, RelyingParty, base64url

# Length of a credential id in bytes, and transports.
_KINDS: tuple[tuple[int, tuple[str, ...]], ...] = (
    (16, ("hybrid", "internal")),
    (20, ("hybrid", "internal")),
    (20, ("internal", "hybrid")),
    (32, ("internal",)),
)
_SECOND = 64  # of 256 users have a second decoy


class Decoys:
    """The decoys of each user. `secret_keys` gives the setting's secrets."""

    def __init__(self, secret_keys: Callable[[], Sequence[str]]) -> None:
        self._secret_keys = secret_keys
        self._public_key = ceremony.public_key_without_owner()
        # Few digests, so that decoys take no longer than a genuine passkey's row.
        self._derived = lru_cache(1024)(_derive)

    def _key(self, purpose: bytes) -> bytes:
        return self._derived(self._secret_keys()[-1], purpose)

    def of(self, app: RelyingParty, external_id: str, user_id: str) -> Sequence[AllowedCredential]:
        """The decoys of a user. An unknown user's id is "": the decoys then have one.

        Raises:
            Unavailable: no secret key is set (reason `no_secret_key`).
        """
        if not self._secret_keys():
            raise Unavailable(reason="no_secret_key")
        name = external_id.encode()
        key = self._key(b"decoys:" + app.id.encode())
        user = hmac.digest(key, b"user:" + name, "sha512")
        decoys = []
        for number in range(2 if user[0] < _SECOND else 1):
            length, transports = _KINDS[user[1 + number] % len(_KINDS)]
            passkey = hmac.digest(key, b"passkey%d:" % number + name, "sha512")
            decoys.append(
                self._decoy(
                    app,
                    self._marked(app.rp_id, passkey, length),
                    id=passkey[32:44].hex(),
                    transports=transports,
                    user_handle=base64url(user[32:]),
                    user_id=user_id or user[4:16].hex(),
                )
            )
        return decoys

    def find(self, app: RelyingParty, credential_id: bytes) -> AllowedCredential | None:
        """The decoy with this credential id, of whatever user."""
        return self._decoy(app, credential_id) if self.has(app.rp_id, credential_id) else None

    def has(self, rp_id: str, credential_id: bytes) -> bool:
        """True if the credential id is a decoy's of an app of this RP ID."""
        length = len(credential_id)
        return (
            bool(self._secret_keys())
            and any(length == known for known, _ in _KINDS)
            and hmac.compare_digest(credential_id, self._marked(rp_id, credential_id, length))
        )

    def _decoy(
        self,
        app: RelyingParty,
        credential_id: bytes,
        *,
        id: str = "",
        transports: tuple[str, ...] = (),
        user_handle: str = "",
        user_id: str = "",
    ) -> AllowedCredential:
        return AllowedCredential(
            id=id,
            credential_id=credential_id,
            transports=transports,
            user_handle=user_handle,
            public_key=self._public_key,
            algorithm=-7,
            sign_count=0,
            backup_eligible=True,
            backed_up=True,
            attestation_trust="none",
            aaguid="00000000-0000-0000-0000-000000000000",
            user_id=user_id,
            app_id=app.id,
        )

    def _marked(self, rp_id: str, derived: bytes, length: int) -> bytes:
        """A credential id of this length from the beginning of `derived`."""
        half = derived[: length // 2]
        key = self._key(b"decoy ids:" + rp_id.encode())
        return half + hmac.digest(key, half, "sha256")[: length // 2]


def _derive(secret: str, purpose: bytes) -> bytes:
    return hmac.digest(secret.encode(), purpose, "sha256")

"""Decoys: passkeys for users who have none, so that a page can't enumerate users.

With policy `decoys` an authentication of an unknown user, or of a user without a passkey, begins
like any other. The page gets credential ids that no authenticator has, and every answer is refused
like a wrong answer of a known user. The steps, the stored values and the signature check are those
of a genuine passkey, and so are their times.

Decoys are stable: an HMAC of the user's external id, under a key derived from the app and the last
secret of `BROKER_SECRET_KEY`. So a second look finds the same ids, on every instance, until that
secret is removed. Lengths and transports are those of common authenticators.

No answer passes as a decoy. The private key of its public key was never kept, and the write of a
sign-in finds no such credential.

Not hidden: a disabled user, whom the backend is told of, and a user who registers a passkey, whose
decoys end.
"""

from __future__ import annotations

import hmac
from collections.abc import Sequence

from broker import ceremony
from broker.errors import Unavailable
from broker.model import AllowedCredential, base64url

# Length of a credential id in bytes, and transports.
_KINDS: tuple[tuple[int, tuple[str, ...]], ...] = (
    (16, ("hybrid", "internal")),
    (20, ("hybrid", "internal")),
    (20, ("internal", "hybrid")),
    (32, ("internal",)),
)
_SECOND = 64  # of 256 users have a second decoy


class Decoys:
    """The decoys of each user. `secret_keys` are the setting's."""

    def __init__(self, secret_keys: Sequence[str]) -> None:
        self._secret = secret_keys[-1].encode() if secret_keys else b""
        self._public_key = ceremony.public_key_without_owner()

    def of(self, app_id: str, external_id: str, user_id: str) -> Sequence[AllowedCredential]:
        """The decoys of a user. An unknown user's id is "": the decoys then have one.

        Raises:
            Unavailable: no secret key is set (reason `no_secret_key`).
        """
        if not self._secret:
            raise Unavailable(reason="no_secret_key")
        key = hmac.digest(self._secret, b"decoys:" + app_id.encode(), "sha256")

        def derive(name: str) -> bytes:
            return hmac.digest(key, f"{name}:{external_id}".encode(), "sha256")

        shape = derive("shape")
        return [
            AllowedCredential(
                id=derive(f"passkey{number}").hex()[:24],
                credential_id=derive(f"credential{number}")[:length],
                transports=transports,
                user_handle=base64url(derive("handle")),
                public_key=self._public_key,
                algorithm=-7,
                sign_count=0,
                backup_eligible=True,
                backed_up=True,
                attestation_trust="none",
                aaguid="00000000-0000-0000-0000-000000000000",
                user_id=user_id or derive("user").hex()[:24],
                app_id=app_id,
            )
            for number in range(2 if shape[0] < _SECOND else 1)
            for length, transports in [_KINDS[shape[1 + number] % len(_KINDS)]]
        ]

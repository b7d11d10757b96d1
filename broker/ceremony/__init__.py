"""WebAuthn begin and finish, of registration and authentication. Pure: no I/O, no clock, no
randomness.

What it promises. `finish_registration` and `finish_authentication` return only when every rule of
WebAuthn L3 §7.1 and §7.2 holds that a server can judge from the answer, what was offered (the
pending ceremony), the relying party and the stored credential; else they raise `CeremonyRefused`,
whose `reason` is one of `REASONS`. `parse_registration` and `parse_authentication` find faults of
form before anything is spent and raise `InvalidRequest`. Nothing that a browser can send gives
another exception. What stays with the caller: that challenge and pending ceremony are used once,
that a credential id is not yet registered (§7.1 "Verify that the credentialId is not yet registered
for any user"), and the counter's compare-and-swap.

How. Each value is first read by strict readers of our own (`form`: JSON and base64url;
`client_data`; `authenticator_data` with `cbor` and `keys`) that accept one encoding only, and all
rules but the signature are judged on what they read. The signature is then judged by py_webauthn,
and every rule that it also knows is judged a second time there, by code of other authors. Its own
parsers run only on bytes which the strict readers have accepted.

What is complemented, and why:
- py_webauthn parses but does not judge `crossOrigin`, `topOrigin`, the credential offered, the user
  handle, a change of backup eligibility, the length of a credential id. Of equal JSON keys it takes
  the last; it reads base64url tolerantly.
- It has neither ES384 nor Ed448: `keys.verify` judges those two.
- It always raises on a counter that did not rise: it gets 0 as the stored count, and the policy
  decides here.
- It trusts an attestation chain when no roots are configured, knows hidden roots for some formats,
  and asks the machine's clock: it is never given a chain to judge. `attestation.chain_trust`
  verifies chains, to the policy's roots only, at the time the ceremony began.
- "packed": it checks neither the certificate's subject nor its AAGUID extension (§8.2, §8.2.1):
  both are checked here.
- "android-key": it expects the root at the end of `x5c`, where the specification allows the leaf
  alone. "apple": it checks only against Apple's root. "tpm": a closed list of manufacturers, the
  first extended key usage only, no AAGUID extension. "fido-u2f": it demands an AAGUID of zeros.
  These four are judged in `attestation` and `tpm`.

Decisions where the specification leaves room:
- An attestation format that is unknown is refused. So are "android-safetynet" (deprecated in L3;
  the service behind it is shut down) and "compound".
- Members that a statement's format does not know are ignored: some platforms add `alg` where none
  is due.
- fido-u2f with an AAGUID that is not zero is accepted: L3 §8.6 verifies nothing about it, and the
  W3C's own vector carries one.
- android-key: origin and purpose are judged on the union of both authorization lists, as §8.4
  allows where no trusted execution environment is demanded; a value that is present must be right,
  an absent one says nothing (the W3C's vector has empty lists).
- Trust: "none" without a statement; "claimed" for self attestation and for a chain when no roots
  are configured; "verified" for a chain to a configured root. When the policy asks for attestation
  and has roots, a chain that leads to none of them is refused (§7.1 "SHOULD fail the registration
  ceremony"). Most passkeys come without any statement; they pass unless the policy's
  `attestation_required` says "any" (a statement, of whatever trust) or "verified".
- `authenticatorAttachment` and `credProps.rk` are judged where the answer has them: an answer that
  contradicts the options is refused, one that says nothing passes. Neither is signed, so this finds
  honest pages whose browser did otherwise, not forgers.
- An AAGUID makes no decision here: it is a claim, and only trust "verified" proves it. So self
  attestation with the AAGUID of a certified model is "claimed", and does not register where
  "verified" is required.
- Whether an attestation certificate was revoked is not asked: that needs the vendors' servers, and
  nothing here does I/O.
- SHA-1 (RS1) is accepted in a TPM's own signature, for old Windows machines have no other, and
  never makes more than "claimed".
- A credential id over 1023 bytes is a fault of form in the answer, a refusal inside authenticator
  data.
- `crossOrigin: true` without `topOrigin` is accepted where the policy allows cross-origin use: not
  every browser tells it.
- `tokenBinding` is reserved in L3; one that L2 would call ill-formed is refused, others are
  ignored.
- RSA keys have 2048 to 8192 bits. UP is required, but for a registration whose caller permitted
  conditional create (`mediation` "conditional", §7.1): the browser then makes the passkey without a
  prompt.

Reading order: `finish`, `client_data`, `authenticator_data`, `keys`, `attestation`, `tpm`, then
`form` and `options`.
"""

from __future__ import annotations

from broker.ceremony.client_data import challenge_of
from broker.ceremony.finish import finish_authentication, finish_registration
from broker.ceremony.form import parse_authentication, parse_registration
from broker.ceremony.identity import authenticator_name, user_handle_matches
from broker.ceremony.options import begin_authentication, begin_registration
from broker.ceremony.verdict import REASONS, Reason

__all__ = [
    "REASONS",
    "Reason",
    "authenticator_name",
    "begin_authentication",
    "begin_registration",
    "challenge_of",
    "finish_authentication",
    "finish_registration",
    "parse_authentication",
    "parse_registration",
    "user_handle_matches",
]

"""WebAuthn ceremonies: begin and finish of registrations and authentications. Pure: no I/O, no
clock, no randomness.

**Guarantee.** `finish_registration` and `finish_authentication` return only if every rule of
WebAuthn L3 §7.1 and §7.2 holds that a server can verify. Their inputs are the answer, the pending
ceremony, the relying party and the stored credential. Otherwise they raise `CeremonyRefused`, whose
`reason` is one of `REASONS`. `parse_registration` and `parse_authentication` find faults of form
before anything is spent, and raise `InvalidRequest`. No input of a browser raises another
exception.

Left to the caller: a challenge and a pending ceremony are used once, a credential id is new (§7.1
"Verify that the credentialId is not yet registered for any user"), and the counter is written by
compare-and-swap.

**Two implementations.** Strict readers of our own accept one encoding of each value only:
`response_json` (JSON and base64url), `client_data`, `authenticator_data` with `cbor`, and `cose`.
Every rule but the signature is verified on what they read. Then py_webauthn, whose parsers get only
bytes that the strict readers accepted, verifies the signature and once more every rule it knows.

py_webauthn is complemented where it falls short:

- It parses `crossOrigin`, `topOrigin`, the allowed credential, the user handle, a change of backup
  eligibility and the length of a credential id, and verifies none of them. Of equal JSON keys it
  takes the last. It reads base64url leniently.
- It has neither ES384 nor Ed448: `cose.verify` verifies those two.
- It refuses every counter that did not rise. It gets 0 as the stored counter, and the policy
  decides here.
- It trusts an attestation chain if no roots are configured, has hidden roots for some formats, and
  reads the machine's clock. So it never gets a chain. `attestation.chain_trust` verifies chains to
  the policy's roots only, at the time when the ceremony began.
- "packed": it verifies neither the certificate's subject nor its AAGUID extension (§8.2, §8.2.1).
  Both are verified here.
- "android-key": it expects the root at the end of `x5c`, where the specification allows the leaf
  alone. "apple": it verifies only against Apple's root. "tpm": it has a closed list of
  manufacturers, and reads the first extended key usage only and no AAGUID extension. "fido-u2f": it
  demands an AAGUID of zeros. `attestation` and `tpm` verify these four formats.

**Decisions** where the specification leaves room:

- An unknown attestation format is refused. So are "android-safetynet" (deprecated in L3; its
  service is shut down) and "compound".
- Members that a statement's format does not know are ignored: some platforms add an `alg`.
- fido-u2f with an AAGUID that is not zero is accepted. L3 §8.6 has no rule about it, and the W3C's
  own vector carries one.
- android-key: origin and purpose are verified on the union of both authorization lists, as §8.4
  allows where no trusted execution environment is demanded. A value that is present must be right,
  and an absent one passes (the W3C's vector has empty lists).
- Trust is "none" without a statement, "claimed" for self attestation and for a chain without
  configured roots, and "verified" for a chain to a configured root. If the policy asks for
  attestation and has roots, a chain to none of them is refused (§7.1 "SHOULD fail the registration
  ceremony"). Most passkeys come without a statement. They pass, unless the policy's
  `attestation_required` is "any" (a statement of any trust) or "verified".
- `authenticatorAttachment` and `credProps.rk` are verified if the answer has them. An answer that
  contradicts the options is refused. Neither is signed: the rule finds a browser that chose
  another authenticator, not a forged answer.
- An AAGUID decides nothing here. It is a claim, which only trust "verified" proves. So self
  attestation with the AAGUID of a certified model is "claimed", and does not register if "verified"
  is required.
- Revocation of an attestation certificate is not checked: that needs the vendors' servers.
- SHA-1 (RS1) is accepted in a TPM's own signature, because old Windows machines have no other. The
  trust is then "claimed" at most.
- A credential id over 1023 bytes is a fault of form in the answer, and a refusal inside
  authenticator data.
- `crossOrigin: true` without `topOrigin` is accepted if the policy allows cross-origin use: not
  every browser sends `topOrigin`.
- `tokenBinding` is reserved in L3. A value that L2 calls ill-formed is refused, others are ignored.
- RSA keys have 2048 to 8192 bits.
- UP is required, except in a registration whose caller permitted conditional create (`mediation`
  "conditional", §7.1): the browser then makes the passkey without a prompt.

Reading order: `finish`, `client_data`, `authenticator_data`, `cose`, `attestation`, `tpm`, then
`response_json`, `options` and `reasons`.
"""

from __future__ import annotations

from broker.ceremony.client_data import challenge_of
from broker.ceremony.cose import public_key_without_owner
from broker.ceremony.finish import finish_authentication, finish_registration
from broker.ceremony.identity import authenticator_name, user_handle_matches
from broker.ceremony.options import begin_authentication, begin_registration
from broker.ceremony.reasons import REASONS, Reason
from broker.ceremony.response_json import parse_authentication, parse_registration

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
    "public_key_without_owner",
    "user_handle_matches",
]

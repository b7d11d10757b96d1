"""Passkey broker: passkeys for any backend, without moving its users.

Reading order: `model` and `errors` (domain types and refusals), `broker` (the verbs; read it
first), `ceremony` (WebAuthn's rules), `ephemeral` and `durable` (the two stores), `web` and
`dialects` (the wire formats), `app` and `cli` (composition root, command line). Imports point down
only; tests/project/test_imports.py has the order and enforces it.
"""

from __future__ import annotations

__version__ = "0.1.0"

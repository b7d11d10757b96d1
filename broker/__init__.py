"""Passkey broker: passkeys for any backend, without moving its users.

Reading order: `model` and `errors` (the words), `broker` (the verbs; the file to read first),
`ceremony` (WebAuthn's rules), `ephemeral` and `durable` (the two stores), `web` and `dialects` (the
wire), `app` and `cli` (how it is put together). Imports point down only;
tests/project/test_imports.py holds the order and enforces it.
"""

from __future__ import annotations

__version__ = "0.1.0"

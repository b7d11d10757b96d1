"""Hanko's Passkey API.

This package declares the dialect; `routes` is its wire format.
"""

from __future__ import annotations

from broker.dialects.declaration import Dialect, WireFormat


def _load() -> WireFormat:
    from broker.dialects.hanko import routes

    return routes


HANKO = Dialect("hanko", _load, signs=True)

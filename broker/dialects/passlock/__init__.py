"""Passlock's API.

This package declares the dialect; `routes` is its wire format.
"""

from __future__ import annotations

from broker.dialects.declaration import Dialect, WireFormat


def _load() -> WireFormat:
    from broker.dialects.passlock import routes

    return routes


PASSLOCK = Dialect("passlock", _load, signs=True)

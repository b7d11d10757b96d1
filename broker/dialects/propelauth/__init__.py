"""PropelAuth BYO's passkey commands, at `/propelauth/run-command`.

This package declares the dialect; `routes` is its wire format.
"""

from __future__ import annotations

from broker.dialects.declaration import Dialect, WireFormat
from broker.model import Opener

OPENER: Opener = "propelauth"


def _load() -> WireFormat:
    from broker.dialects.propelauth import routes

    return routes


PROPELAUTH = Dialect("propelauth", _load, segments=("propelauth",), openers=(OPENER,))

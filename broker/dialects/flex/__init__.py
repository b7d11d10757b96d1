"""The Flex API: both HTTP APIs of Passage Flex, and what the broker adds to them.

This package declares the dialect; `routes` is its wire format.
"""

from __future__ import annotations

from broker.dialects.declaration import Dialect, WireFormat


def _load() -> WireFormat:
    from broker.dialects.flex import routes

    return routes


FLEX = Dialect("flex", _load)

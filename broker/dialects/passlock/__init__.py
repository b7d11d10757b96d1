"""Passlock's API, at the root of the origin.

This package declares the dialect; `routes` is its wire format.
"""

from __future__ import annotations

from broker.dialects.declaration import Dialect, WireFormat
from broker.model import LONGEST_NONCE, Opener
from broker.model.values import whole
from broker.settings import TOKEN_LIFE_LIMIT, Setting

# The vendor states no life of its id_tokens. Its codes live 300 seconds.
TOKEN_LIFE = Setting(
    "passlock_token_life",
    300,
    whole(10, TOKEN_LIFE_LIMIT),
    "seconds that a Passlock `id_token` lives",
)
CODE_LIFE = Setting(
    "passlock_code_life", 300, whole(10, LONGEST_NONCE), "seconds that a Passlock `code` lives"
)

OPENER: Opener = "passlock"


def _load() -> WireFormat:
    from broker.dialects.passlock import routes

    return routes


PASSLOCK = Dialect(
    "passlock",
    _load,
    segments=("v2", ".well-known", "aaguid"),
    openers=(OPENER,),
    signs=True,
    settings=(TOKEN_LIFE, CODE_LIFE),
)

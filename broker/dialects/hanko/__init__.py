"""Hanko's Passkey API, under `/hanko/{tenant_id}`.

This package declares the dialect; `routes` is its wire format.
"""

from __future__ import annotations

from typing import get_args

from broker.dialects.declaration import Dialect, WireFormat
from broker.model import Opener, PolicyKey, TokenAlgorithm
from broker.model.values import choice, whole
from broker.settings import TOKEN_LIFE_LIMIT, Setting

# The vendor's tokens live 300 seconds.
TOKEN_LIFE = Setting(
    "hanko_token_life", 300, whole(10, TOKEN_LIFE_LIMIT), "seconds that a Hanko token lives"
)
ALGORITHM: PolicyKey[TokenAlgorithm] = PolicyKey(
    "hanko_algorithm",
    "RS256",
    choice(*get_args(TokenAlgorithm)),
    "signs the tokens of the Hanko API",
)

# The openers of ceremonies, with a key and without.
OPENER: Opener = "hanko"
KEYLESS: Opener = "hanko_keyless"


def _load() -> WireFormat:
    from broker.dialects.hanko import routes

    return routes


HANKO = Dialect(
    "hanko",
    _load,
    segments=("hanko",),
    openers=(OPENER, KEYLESS),
    signs=True,
    settings=(TOKEN_LIFE,),
    policy_keys=(ALGORITHM,),
)

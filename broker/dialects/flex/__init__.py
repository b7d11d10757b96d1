"""The Flex API: the two HTTP APIs of Passage Flex and what the broker adds, under `/v1`.

This package declares the dialect; `routes` is its wire format.
"""

from __future__ import annotations

from broker.dialects.declaration import Dialect, WireFormat
from broker.model import Opener
from broker.model.values import whole
from broker.settings import TOKEN_LIFE_LIMIT, Setting

RECEIPT_TOKEN_LIFE = Setting(
    "receipt_token_life", 300, whole(10, TOKEN_LIFE_LIMIT), "seconds that a signed receipt lives"
)

# The openers of ceremonies: a page's, and those that a backend carries itself.
PAGE: Opener = "page"
KEYED: Opener = "keyed"


def _load() -> WireFormat:
    from broker.dialects.flex import routes

    return routes


# Without a secret key the dialect answers, and signs no receipt.
FLEX = Dialect(
    "flex",
    _load,
    segments=("v1",),
    openers=(PAGE, KEYED),
    settings=(RECEIPT_TOKEN_LIFE,),
)

"""A fifth dialect in one folder: all that a dialect can declare, and nothing elsewhere.

A backend starts and finishes the login of a user whom it names. The answer of a finish has the
user's name in the letters that the app's policy says, and how long it may be kept.
"""

from __future__ import annotations

from broker.dialects.declaration import Dialect, WireFormat
from broker.model import Opener, PolicyKey
from broker.model.values import choice, whole
from broker.settings import Setting

KEEP = Setting("fifth_keep", 30, whole(5, 600), "seconds that a name may be kept")
LETTERS: PolicyKey[str] = PolicyKey(
    "fifth_letters", "small", choice("small", "capital"), "the letters of a name"
)

OPENER: Opener = "fifth"


def _load() -> WireFormat:
    from tests.support.fifth import routes

    return routes


FIFTH = Dialect(
    "fifth",
    _load,
    segments=("fifth",),
    openers=(OPENER,),
    settings=(KEEP,),
    policy_keys=(LETTERS,),
)

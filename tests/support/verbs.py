"""What a test passes to the broker's verbs: a caller with a key, what the keyed finish and the
page's finish expect, and what a begin or a finish gave.

    begun = await verbs.begin_registration(keyed(app), ByChallenge("ann"), "keyed", names=…)
    outcome = await verbs.finish_registration(keyed(app), ByChallenge(), answer, KEYED)
"""

from __future__ import annotations

from broker.broker import Begun, Outcome
from broker.model import ALL_SCOPES, ByHandle, Caller, ExpectedCeremony, RelyingParty

KEYED = ExpectedCeremony(("keyed",))
PAGE = ExpectedCeremony(("page",), second_factor=None)


def keyed(app: RelyingParty) -> Caller:
    """A backend of the app."""
    return Caller(app, "k" * 24, ALL_SCOPES)


def by_handle(begun: Begun) -> ByHandle:
    """The handle of a ceremony that has one."""
    assert begun.handle is not None
    return ByHandle(begun.handle)


def nonce_of(outcome: Outcome) -> str:
    """The nonce of a finish that asked for one."""
    assert outcome.nonce is not None
    return outcome.nonce

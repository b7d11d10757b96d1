"""Links and expectations: how a begin and a finish find their ceremony, and what a finish or a
redemption accepts.
"""

from __future__ import annotations

from typing import NamedTuple

from broker.model.ceremonies import ANYONE, Anyone, Opener, Proof


class ByTransaction(NamedTuple):
    """Begins the ceremony of a transaction; the new handle finds it. `second_factor`: whether the
    transaction must be about second factors, None for either.
    """

    transaction_id: str
    second_factor: bool | None = None


class ByUser(NamedTuple):
    """The user's pending ceremony. A user has one of each purpose and opener: a begin replaces
    it.
    """

    external_id: str


class ByChallenge(NamedTuple):
    """The challenge in the answer finds the ceremony; any number may be open. `external_id` is the
    user at begin.
    """

    external_id: str | Anyone = ANYONE


class ByHandle(NamedTuple):
    """The handle of a begun ceremony."""

    handle: str


# `ANYONE` begins a ceremony without a transaction; the new handle finds it.
BeginLink = ByTransaction | ByUser | ByChallenge | Anyone
FinishLink = ByHandle | ByUser | ByChallenge


class ExpectedCeremony(NamedTuple):
    """The ceremonies that a finish accepts: begun by one of `openers`, about second factors or not
    (None: either), about an approval or not, of this transaction (None: of any or none).
    """

    openers: tuple[Opener, ...]
    second_factor: bool | None = False
    approval: bool = False
    transaction_id: str | None = None


class ExpectedReceipt(NamedTuple):
    """The receipts that a redemption accepts: of one of `proofs`, of this user and this transaction
    (None: of any). `unowned`: also the proof of a passkey without an owner. `binding_verifier` is
    None for a nonce without a binding.
    """

    proofs: tuple[Proof, ...] = ("register", "authenticate")
    external_id: str | None = None
    transaction_id: str | None = None
    unowned: bool = False
    binding_verifier: str | None = None

"""Client of the passkey broker for backends: opens transactions, redeems nonces, manages passkeys.

    with BrokerClient("https://broker.example", app_id, api_key) as broker:
        transaction = broker.create_authenticate_transaction("user-7")  # give it to the page
        receipt = broker.verify_nonce(
            nonce, purpose="authenticate", transaction_id=transaction, external_id="user-7"
        )

`AsyncBrokerClient` has the same methods as coroutines.

Guarantees. No redirect is followed. Opening a transaction and redeeming a nonce are repeated once
after a lost answer, with an Idempotency-Key: the broker redeems once and answers both alike. Reads
are repeated on request (`read_retries`), and nothing else. Every failure is a `BrokerError`. A
receipt is returned only if all of it could be read, and if it agrees with the purpose and the
external id that the caller stated. The API key is in one header, and in no message, repr or
exception. An argument that is not a text where the broker expects one (a session's missing field is
None) is `InvalidRequest` before anything is sent. An answer is read up to `LARGEST_ANSWER` bytes
and within `timeout` seconds.

The package needs httpx and the standard library, and no other part of the broker. All its imports
are relative: its name is `passkey_broker` if installed, and `broker.sdk.passkey_broker` within the
server. `errors` and `results` are the types, `arguments` and `answers` the two directions of the
wire, `transport` the limits of a request. `_async` is the client, from which `_sync` is generated.
"""

from __future__ import annotations

from ._async import AsyncBrokerClient
from ._sync import BrokerClient
from .answers import Answer
from .arguments import Binding, Request, new_binding
from .errors import (
    AppNotFound,
    ApprovalExists,
    BrokerError,
    BrokerUnavailable,
    BrokerUnreachable,
    CeremonyRefused,
    DiscoverableRefused,
    InvalidKey,
    InvalidNonce,
    InvalidRequest,
    MailCodeAttemptsExceeded,
    MailCodeExpired,
    MailCodeNotFound,
    MailCodeRateLimited,
    NoPasskeys,
    PasskeyHasOwner,
    PasskeyNotFound,
    Retry,
    TooManyPasskeys,
    TooManyRequests,
    TransactionNotFound,
    UnexpectedAnswer,
    UnknownCredential,
    UserDisabled,
    UserNotFound,
    WrongMailCode,
)
from .results import (
    App,
    Approval,
    ApprovalRequest,
    Attachment,
    Event,
    EventBatch,
    EventPage,
    ListedUser,
    MailCode,
    MailMessage,
    Mediation,
    NewMailCode,
    OwnedPasskey,
    Passkey,
    PasskeyPage,
    Proof,
    Purpose,
    Receipt,
    SignalKind,
    SignalTicket,
    User,
    UserOrder,
    UserPage,
    UserStatus,
    UserVerification,
)
from .transport import CONNECT_TIMEOUT, LARGEST_ANSWER, TIMEOUT, __version__

__all__ = [
    "CONNECT_TIMEOUT",
    "LARGEST_ANSWER",
    "TIMEOUT",
    "Answer",
    "App",
    "AppNotFound",
    "Approval",
    "ApprovalExists",
    "ApprovalRequest",
    "AsyncBrokerClient",
    "Attachment",
    "Binding",
    "BrokerClient",
    "BrokerError",
    "BrokerUnavailable",
    "BrokerUnreachable",
    "CeremonyRefused",
    "DiscoverableRefused",
    "Event",
    "EventBatch",
    "EventPage",
    "InvalidKey",
    "InvalidNonce",
    "InvalidRequest",
    "ListedUser",
    "MailCode",
    "MailCodeAttemptsExceeded",
    "MailCodeExpired",
    "MailCodeNotFound",
    "MailCodeRateLimited",
    "MailMessage",
    "Mediation",
    "NewMailCode",
    "NoPasskeys",
    "OwnedPasskey",
    "Passkey",
    "PasskeyHasOwner",
    "PasskeyNotFound",
    "PasskeyPage",
    "Proof",
    "Purpose",
    "Receipt",
    "Request",
    "Retry",
    "SignalKind",
    "SignalTicket",
    "TooManyPasskeys",
    "TooManyRequests",
    "TransactionNotFound",
    "UnexpectedAnswer",
    "UnknownCredential",
    "User",
    "UserDisabled",
    "UserNotFound",
    "UserOrder",
    "UserPage",
    "UserStatus",
    "UserVerification",
    "WrongMailCode",
    "__version__",
    "new_binding",
]

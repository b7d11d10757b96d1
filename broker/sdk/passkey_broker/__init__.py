"""Client of the passkey broker for backends: open a transaction, redeem a nonce, look after
passkeys.

    with BrokerClient("https://broker.example", app_id, api_key) as broker:
        transaction = broker.create_authenticate_transaction("user-7")  # give it to the page
        receipt = broker.verify_nonce(
            nonce, purpose="authenticate", transaction_id=transaction, external_id="user-7"
        )

`AsyncBrokerClient` has the same methods, to be awaited.

What it promises. Every request is sent once, no redirect is followed, and nothing but a read is
ever repeated (`read_retries`), so a nonce is never redeemed twice by this code and a lost answer is
an error, after which the person signs in again. Every failure is a `BrokerError`. A receipt is
returned only when all of it could be read and it agrees with the purpose and the external id that
the caller named. The API key goes into one header and into no message, repr or exception. An
argument that is no text where the broker takes one (a session's field that is not there is None) is
`InvalidRequest` before anything is sent. An answer is read up to `LARGEST_ANSWER` bytes and within
`timeout` seconds.

Needs httpx and the standard library, nothing of the broker. All imports of the package are
relative: it is `passkey_broker` where it is installed, and `broker.sdk.passkey_broker` within the
server. `errors` and `results` are the types, `arguments` and `answers` the two directions of the
wire, `transport` carries requests, `_async` is the client and `_sync` is generated from it.
"""

from __future__ import annotations

from ._async import AsyncBrokerClient
from ._sync import BrokerClient
from .answers import Answer
from .arguments import Request
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
    "UserNotFound",
    "UserOrder",
    "UserPage",
    "UserStatus",
    "UserVerification",
    "WrongMailCode",
    "__version__",
]

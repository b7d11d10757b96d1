"""Transport of requests over httpx: address, headers, limits of size and time, retries.

A request is repeated after a lost answer or a 503. Opening a transaction and redeeming a nonce are
repeated once, with the same Idempotency-Key: the broker answers both alike and redeems once. Reads
(GET) are repeated if the caller asked for it with `read_retries`. Any other request is sent once. A
lost answer is `BrokerUnreachable`. No redirect is followed. The API key is in one header, and in no
message, repr or exception.
"""

from __future__ import annotations

import ipaddress
import ssl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote, urlsplit

import httpx

from .answers import Answer
from .arguments import Request
from .errors import BrokerUnreachable, UnexpectedAnswer

__version__ = "0.1.0"

CONNECT_TIMEOUT = 2.0  # seconds
TIMEOUT = 10.0  # seconds, for the answer
LARGEST_ANSWER = 1 << 20  # bytes; a user with a hundred passkeys needs some tens of thousands
MOST_RETRIES = 10
FIRST_PAUSE = 0.1  # seconds before the second attempt, twice that before the third, and so on
LONGEST_PAUSE = 5.0  # seconds; a longer Retry-After ends the retries


async def pause_async(seconds: float) -> None:
    """Sleep. httpx itself runs on asyncio and on trio through anyio."""
    import anyio

    await anyio.sleep(seconds)


def pause(seconds: float) -> None:
    """Sleep."""
    time.sleep(seconds)


class Body:
    """The body of an answer, read within its limits of size and time."""

    def __init__(self, timeout: float) -> None:
        self._end = time.monotonic() + timeout
        self._chunks: list[bytes] = []
        self._size = 0

    def add(self, chunk: bytes) -> None:
        self._chunks.append(chunk)
        self._size += len(chunk)
        if self._size > LARGEST_ANSWER:
            message = f"The answer is larger than {LARGEST_ANSWER} bytes."
            raise UnexpectedAnswer("unexpected_answer", message)
        if time.monotonic() > self._end:
            raise BrokerUnreachable("unreachable", "The answer did not arrive in time.")

    def answer(self, response: httpx.Response) -> Answer:
        return Answer(response.status_code, response.headers, b"".join(self._chunks))


class Address:
    """The address of the app, and the headers of its requests.

    The API key is kept only in httpx's headers, whose repr hides it.
    """

    def __init__(
        self, url: str, app_id: str, api_key: str, *, timeout: float, read_retries: int
    ) -> None:
        parts = urlsplit(url)
        if (
            parts.scheme not in ("http", "https")
            or not parts.hostname
            or parts.query
            or parts.fragment
        ):
            raise ValueError("url is the broker's, like https://broker.example")
        if "@" in parts.netloc:
            raise ValueError(
                "url has a user name or a password; the API key is all that the broker asks for"
            )
        if not app_id:
            raise ValueError("app_id is empty")
        if not api_key or not api_key.isascii() or not api_key.isprintable() or " " in api_key:
            raise ValueError(
                "api_key is not an API key: it is empty or has characters that no key has"
            )
        if type(read_retries) is not int or not 0 <= read_retries <= MOST_RETRIES:
            raise ValueError(f"read_retries is a whole number from 0 to {MOST_RETRIES}")
        self.name = f"{url!r}, {app_id!r}"
        self.timeout = timeout
        self.read_retries = read_retries
        self._host = parts.hostname
        self._base = f"{url.rstrip('/')}/v1/apps/{quote(app_id, safe='')}"
        self._headers = httpx.Headers(
            {
                "Authorization": f"Bearer {api_key}",
                "Accept": "application/json",
                "Accept-Encoding": "identity",
                "User-Agent": f"passkey-broker-client/{__version__}",
            }
        )

    def options(
        self, verify: ssl.SSLContext | None, proxy: str | httpx.Proxy | None
    ) -> dict[str, Any]:
        """The arguments of an httpx client of our own."""
        if verify is not None and not isinstance(verify, ssl.SSLContext):
            raise ValueError("verify is an ssl.SSLContext")
        # A proxy of the environment can't reach a loopback address of this machine.
        chosen: dict[str, Any] = {"proxy": proxy, "trust_env": not _loopback(self._host)}
        return chosen if verify is None else {**chosen, "verify": verify}

    def request(self, request: Request) -> dict[str, Any]:
        """The arguments of httpx's `stream`. Raises `InvalidRequest`."""
        content = request.encoded()
        headers = self._headers.copy()
        if content is not None:
            headers["Content-Type"] = "application/json"
        if request.idempotency_key is not None:
            headers["Idempotency-Key"] = request.idempotency_key
        return {
            "method": request.method,
            "url": self._base + request.path,
            "params": request.query,
            "content": content,
            "headers": headers,
            "auth": None,  # a given httpx client's own would replace the API key
            "follow_redirects": False,
            "timeout": httpx.Timeout(self.timeout, connect=min(CONNECT_TIMEOUT, self.timeout)),
        }

    @contextmanager
    def reaching(self) -> Iterator[Body]:
        """Translate httpx's errors. The time limit of the answer begins here."""
        try:
            yield Body(self.timeout)
        except httpx.TimeoutException as error:
            raise BrokerUnreachable("unreachable", "The broker did not answer in time.") from error
        except (httpx.RequestError, httpx.InvalidURL) as error:
            raise BrokerUnreachable(
                "unreachable", f"The broker can't be reached: {error}"
            ) from error

    def pause_after(
        self, request: Request, attempt: int, outcome: Answer | BrokerUnreachable
    ) -> float | None:
        """Seconds until the request is repeated. None: it is not.

        After no answer or a 503 an idempotent request is repeated once, and a GET at most
        `read_retries` times.
        """
        if request.idempotency_key is not None:
            retries = 1
        else:
            retries = self.read_retries if request.method == "GET" else 0
        if attempt >= retries:
            return None
        wanted = min(FIRST_PAUSE * 2**attempt, LONGEST_PAUSE)
        if isinstance(outcome, Answer):
            if outcome.status != 503:
                return None
            wanted = outcome.retry_after if outcome.retry_after is not None else wanted
        return wanted if wanted <= LONGEST_PAUSE else None


def require_client(
    http: object, kind: type[httpx.Client] | type[httpx.AsyncClient], **others: object
) -> None:
    """Refuse an httpx client of the other kind, or beside arguments of a new client."""
    if not isinstance(http, kind):
        raise ValueError(f"http is an httpx.{kind.__name__}")
    for name, value in others.items():
        if value is not None:
            raise ValueError(f"{name} belongs to the given http client")


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")

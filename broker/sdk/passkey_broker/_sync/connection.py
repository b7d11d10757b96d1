# Generated from _async/connection.py by `python tests/support/sync_client.py`: change that one.
"""Connection of a client: an httpx client, the app's address, and the loop that repeats reads."""

from __future__ import annotations

import ssl
from types import TracebackType
from typing import Self

import httpx

from ..answers import Answer
from ..arguments import Request
from ..errors import BrokerUnreachable
from ..transport import TIMEOUT, Address, given, pause


class Connection:
    """What every method of `BrokerClient` sends its requests through."""

    def __init__(
        self,
        url: str,
        app_id: str,
        api_key: str,
        *,
        timeout: float = TIMEOUT,
        http: httpx.Client | None = None,
        verify: ssl.SSLContext | None = None,
        proxy: str | httpx.Proxy | None = None,
        read_retries: int = 0,
    ) -> None:
        """See the class.

        Raises:
            ValueError: an argument that can't work; the message never holds the API key.
        """
        self._address = Address(url, app_id, api_key, timeout=timeout, read_retries=read_retries)
        self._owned = http is None
        if http is None:
            http = httpx.Client(**self._address.options(verify, proxy))
        else:
            given(http, httpx.Client, verify=verify, proxy=proxy)
        self._http = http

    def send(self, request: Request) -> Answer:
        """Carry one request, once. A subclass that watches requests overrides this.

        Raises:
            InvalidRequest: the request can't be encoded; nothing was sent.
            BrokerUnreachable: no answer, or none in time.
            UnexpectedAnswer: the answer is larger than `LARGEST_ANSWER`.
        """
        arguments = self._address.request(request)
        with self._address.reaching() as body:
            with self._http.stream(**arguments) as response:
                for chunk in response.iter_bytes():
                    body.add(chunk)
                return body.answer(response)

    def _answer(self, request: Request) -> Answer:
        """Send a request; a read as often as `read_retries` allows."""
        attempt = 0
        while True:
            try:
                answer = self.send(request)
            except BrokerUnreachable as error:
                seconds = self._address.pause_after(request, attempt, error)
                if seconds is None:
                    raise
            else:
                seconds = self._address.pause_after(request, attempt, answer)
                if seconds is None:
                    return answer
            pause(seconds)
            attempt += 1

    def close(self) -> None:
        """Close the connections, but not those of an httpx client that was given."""
        if self._owned:
            self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._address.name})"

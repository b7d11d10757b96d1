"""Connection of a client: the httpx client, the app's address, and its retries."""

from __future__ import annotations

import ssl
from itertools import count
from typing import Self

import httpx

from ..answers import Answer
from ..arguments import Request
from ..errors import BrokerUnreachable
from ..transport import TIMEOUT, Address, pause_async, require_client


class AsyncConnection:
    """Sends the requests of `AsyncBrokerClient`."""

    def __init__(
        self,
        url: str,
        app_id: str,
        api_key: str,
        *,
        timeout: float = TIMEOUT,
        http: httpx.AsyncClient | None = None,
        verify: ssl.SSLContext | None = None,
        proxy: str | httpx.Proxy | None = None,
        read_retries: int = 0,
    ) -> None:
        """See the class.

        Raises:
            ValueError: an argument can't be used. The message never holds the API key.
        """
        self._address = Address(url, app_id, api_key, timeout=timeout, read_retries=read_retries)
        self._owned = http is None
        if http is None:
            http = httpx.AsyncClient(**self._address.options(verify, proxy))
        else:
            require_client(http, httpx.AsyncClient, verify=verify, proxy=proxy)
        self._http = http

    async def send(self, request: Request) -> Answer:
        """Send one request, once. A subclass overrides this method to observe requests.

        Raises:
            InvalidRequest: the request can't be encoded; nothing was sent.
            BrokerUnreachable: no answer arrived in time.
            UnexpectedAnswer: the answer is larger than `LARGEST_ANSWER`.
        """
        arguments = self._address.request(request)
        with self._address.reaching() as body:
            async with self._http.stream(**arguments) as response:
                async for chunk in response.aiter_bytes():
                    body.add(chunk)
                return body.answer(response)

    async def _answer(self, request: Request) -> Answer:
        """Send a request, again where `Address.pause_after` says so."""
        for attempt in count():
            outcome: Answer | BrokerUnreachable
            try:
                outcome = await self.send(request)
            except BrokerUnreachable as error:
                outcome = error
            seconds = self._address.pause_after(request, attempt, outcome)
            if seconds is None:
                break
            await pause_async(seconds)
        if isinstance(outcome, BrokerUnreachable):
            raise outcome
        return outcome

    async def close(self) -> None:
        """Close the connections, unless the caller gave the httpx client."""
        if self._owned:
            await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._address.name})"

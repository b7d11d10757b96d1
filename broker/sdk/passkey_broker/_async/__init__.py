"""The asynchronous client, source of the synchronous one: `_sync` is generated from this folder.

After a change run `python tests/support/sync_client.py`. `ceremonies` has transactions, nonces and
keyed ceremonies, `management` has users, passkeys, events and the app, `mail` has mail codes;
`connection` carries the requests of all.
"""

from __future__ import annotations

from .ceremonies import AsyncCeremonies
from .mail import AsyncMailCodes
from .management import AsyncManagement


class AsyncBrokerClient(AsyncCeremonies, AsyncManagement, AsyncMailCodes):
    """An asynchronous client of one app, for asyncio or trio. Keeps connections: make one and close
    it, or use it in an `async with`.

    Args:
        url: where the broker's keyed API is, like "https://broker.example".
        app_id: 24 alphanumerics, from `broker app create`.
        api_key: the app's key, `pbk_…`.
        timeout: seconds for an answer; connecting has 2 s at most.
        http: an httpx client of yours (`httpx.AsyncClient`), for its transport, limits,
            certificates, proxies and hooks. You close it. This client sets URL, headers, timeout
            and redirects of each request.
        verify: certificates to trust, as an `ssl.SSLContext`; not together with `http`.
        proxy: URL of a proxy, or an `httpx.Proxy`; not together with `http`. Without it proxies of
            the environment are used, but for a broker on this machine.
        read_retries: how often a read (GET) is repeated after no answer or a 503, 0 to 10. It waits
            for the answer's Retry-After up to 5 s, otherwise 0.1 s and twice that each time. No
            other request is ever sent twice.

    Every method raises `InvalidKey`, `TooManyRequests`, `BrokerUnavailable`, `BrokerUnreachable`,
    `UnexpectedAnswer`, and the errors in its docstring; all are `BrokerError`. `InvalidRequest` is
    raised before anything is sent for an argument of the wrong type or an empty text.
    """

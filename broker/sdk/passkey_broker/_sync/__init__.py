# Generated from _async/__init__.py by `python tests/support/sync_client.py`: change that one.
"""The synchronous client, generated from the asynchronous one in `_async`.

`ceremonies` has transactions, nonces and
keyed ceremonies, `management` has users, passkeys, events and the app, `mail` has mail codes;
`connection` carries the requests of all.
"""

from __future__ import annotations

from .ceremonies import Ceremonies
from .mail import MailCodes
from .management import Management


class BrokerClient(Ceremonies, Management, MailCodes):
    """A blocking client of one app, thread-safe. Keeps connections: make one and close it, or use
    it in a `with`.

    Args:
        url: where the broker's keyed API is, like "https://broker.example".
        app_id: 24 alphanumerics, from `broker app create`.
        api_key: the app's key, `pbk_…`.
        timeout: seconds for an answer; connecting has 2 s at most.
        http: an httpx client of yours (`httpx.Client`), for its transport, limits,
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

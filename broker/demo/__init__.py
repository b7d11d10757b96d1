"""The sample site that `broker dev` serves at /demo/: a real backend with our client, and a page
with our SDK.

It is the example to copy, so it is small, complete and safe. Reading order: `api` (the part that a
site adds to offer passkeys, two requests a ceremony), `guard` (the checks of every request),
`accounts` (the site's own data), `wire` (the trace that the page shows), `replay` (the repeated
redemption), `site` (the application), and in `static/` `demo.js` (the page's side of each
ceremony).

Like every customer it reaches the broker over HTTP only, through the client `passkey_broker`, with
an app id and an API key.
"""

from __future__ import annotations

from broker.demo.site import demo_app

__all__ = ["demo_app"]

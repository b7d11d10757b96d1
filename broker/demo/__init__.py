"""The sample site that `broker dev` opens at /demo/: a real backend that uses our client, and a
page that uses our SDK.

It is the example people copy, so it is small, whole and safe. Reading order: `api` (what a site
adds to offer passkeys, two requests a ceremony), `guard` (what every request goes through),
`accounts` (what the site remembers), `wire` (how the page comes to show what travelled), `replay`
(how a nonce is redeemed twice), `site` (how it is put together), and in `static/` `demo.js` (the
page's side of each ceremony).

It knows the broker only as any customer does: over HTTP, through the client `passkey_broker`, with
an app id and an API key.
"""

from __future__ import annotations

from broker.demo.site import demo_app

__all__ = ["demo_app"]

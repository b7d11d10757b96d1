"""Both ends of the broker for its users: `passkey.js` for pages, `passkey_broker` for backends.

Neither imports another part of the broker, and neither keeps state between calls. `passkey.js`
(types in `passkey.d.ts`) is an ES module without dependencies, which the broker serves at
`/sdk/passkey.js`. `passkey_broker` is a distribution of its own, `passkey-broker-client`
(`pyproject.toml` beside it), and needs httpx, the server's extra `client`. `client.py` is its
former name.
"""

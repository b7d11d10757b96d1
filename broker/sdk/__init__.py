"""Both ends of the broker for those who use it: `passkey.js` for pages, `client.py` for backends.

Neither imports anything of the broker, and neither keeps state between calls. `passkey.js` (types in `passkey.d.ts`) is an ES
module without dependencies that the broker serves at `/sdk/passkey.js`; `client.py` needs httpx, the extra `client`.
"""

"""Former name of the client for backends, kept until 1.0: import `passkey_broker` instead.

Both names give the same classes, those of `broker.sdk.passkey_broker`.
"""

from __future__ import annotations

from broker.sdk.passkey_broker import *  # noqa: F403  all public names, later ones too

"""INFO for fakeredis, which lacks it: a primary whose term never changes. Scripts may ask too."""

from __future__ import annotations

from typing import Any

import fakeredis
from fakeredis._commands import command
from fakeredis._socket._base import BaseFakeSocket

TERM = "0123456789abcdef"
_INFO = f"# Replication\r\nrole:master\r\nmaster_replid:{TERM}{'0' * 24}\r\n".encode()


@command(name="info", fixed=(), repeat=(bytes,))
def _info(_: Any, *sections: bytes) -> bytes:
    return _INFO


def fake_client(server: fakeredis.FakeServer) -> fakeredis.FakeAsyncRedis:
    """A client of a server in this process."""
    return fakeredis.FakeAsyncRedis(server=server)


setattr(BaseFakeSocket, "_info", _info)  # noqa: B010 - fakeredis finds a command by this name

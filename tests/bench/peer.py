"""The Node peer: started like the broker, on the same core, with the same stores."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.bench.service import Cores, Server, Stores, _listening
from tests.support import parts
from tests.support.processes import free_port

HERE = Path(__file__).parent / "peer"


@contextmanager
def peer(made: Stores, cores: Cores) -> Iterator[Server]:
    """The peer, with an empty table of its own."""
    port = free_port()
    parts.npm_packages(HERE)
    found = parts.node()
    environment = {
        **found.environment(),
        "PORT": str(port),
        "DATABASE_URL": made.database_url,
        "REDIS_URL": made.redis_url,
        "NODE_ENV": "production",
    }
    with _listening(
        [*found.node, str(HERE / "server.mjs")], environment, cores.server, port, "/health", None
    ) as process:
        yield Server(process, f"http://127.0.0.1:{port}")


if __name__ == "__main__":
    try:
        parts.install_node()
        parts.install_npm(HERE)
    except parts.MissingPart as missing:
        sys.exit(str(missing))

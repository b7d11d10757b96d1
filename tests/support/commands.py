"""Running commands of `broker`: in this process, as a program, and as a program at a terminal."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import pty
import re
import select
import subprocess
import sys
import termios
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from broker.embedded import EmbeddedStores
from tests.support.processes import DEADLINE
from tests.support.wire import ORIGIN, RP_ID

BROKER = Path(sys.executable).with_name("broker")
CLEAN = {name: value for name, value in os.environ.items() if not name.startswith("BROKER_")}
NEW = ("app", "create", "--name", "Example", "--rp-id", RP_ID, "--origin", ORIGIN)
UNKNOWN = "A" * 24
ID = r"[A-Za-z0-9]{24}"
KEY = r"pbk_[A-Za-z0-9_-]{43}"
ACTING = rf"broker: acting on the app .+ \(.+, {ID}\)\.\n"  # notice of commands that delete


@dataclass(frozen=True, slots=True)
class Done:
    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        assert (self.status, re.sub(ACTING, "", self.err)) == (0, ""), self
        return json.loads(self.out)


Cli = Callable[..., Done]


def beside(cli: Cli) -> Callable[..., Awaitable[Done]]:
    """The same, beside a broker that runs in this thread's loop."""
    return lambda *arguments: asyncio.to_thread(cli, *arguments)


def refusal(done: Done) -> str:
    """The one sentence of a refused command."""
    assert (done.status, done.out) == (1, ""), done
    match = re.fullmatch(rf"(?:{ACTING})?broker: ([^\n]+\.)\n", done.err)
    assert match, done.err
    return match[1]


def program(
    stores: EmbeddedStores, *arguments: str | bytes, **options: Any
) -> subprocess.CompletedProcess[str]:
    urls = {"BROKER_DATABASE_URL": stores.database_url, "BROKER_REDIS_URL": stores.redis_url}
    return subprocess.run(
        [str(BROKER), *arguments],
        env=CLEAN | urls,
        capture_output=True,
        text=True,
        timeout=60,
        **options,
    )


def refused_serve() -> str:
    """Why `broker serve` does not start, as a program of this process's environment: it handles
    signals, so it needs a main thread.
    """
    argv = [str(BROKER), "serve", "--port", "0"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=DEADLINE, check=False)
    assert done.returncode == 1
    return done.stderr


class Terminal:
    """A command at a terminal of its own; `shown` is what it has written there."""

    def __init__(self, stores: EmbeddedStores, *arguments: str, **environment: str) -> None:
        self._terminal, inside = pty.openpty()
        self.shown = ""
        self.process = subprocess.Popen(
            [str(BROKER), *arguments],
            env={
                **CLEAN,
                "BROKER_DATABASE_URL": stores.database_url,
                "TERM": "xterm",
                **environment,
            },
            stdin=inside,
            stdout=inside,
            stderr=inside,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(
                0, termios.TIOCSCTTY, 0
            ),  # Ctrl-C is a signal to the command
        )
        os.close(inside)

    def wait_for(self, text: str) -> str:
        """Read until `text` is shown."""
        deadline = time.monotonic() + DEADLINE
        while text not in self.shown:
            assert self._read(deadline), f"never shown: {text!r}, but {self.shown!r}"
        return self.shown

    def press(self, text: str) -> None:
        """Press keys: a line with its end, or one like Ctrl-C."""
        os.write(self._terminal, text.encode())

    def end(self) -> int:
        """Read what is left, and return the exit status."""
        deadline = time.monotonic() + DEADLINE
        while self._read(deadline):
            pass
        return self.process.wait(DEADLINE)

    def _read(self, deadline: float) -> bool:
        ready, _, _ = select.select([self._terminal], [], [], max(0.0, deadline - time.monotonic()))
        try:
            read = os.read(self._terminal, 65536) if ready else b""
        except OSError:  # EIO: nobody has it open any more
            read = b""
        self.shown += read.decode(errors="replace").replace("\r\n", "\n")
        return bool(read)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        fault: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._terminal)

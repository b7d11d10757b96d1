"""The figures of several processes that are one service, in a folder of theirs; any of them can
tell the sums.

Each process publishes its dump under its name: a file with another name first, then renamed, so
that a reader finds an old one or a new one. A process publishes about once a second, and `others`
publishes before it reads. So whoever asks any process at any time gets figures that never go down:
what one answer told of a process, the process's file has held since, and the next answer reads that
file or a later one. What a process counted after it published last is lost when it is killed.

When a process has ended, the keeper of the folder `inherit`s its file: adds the figures to its own,
publishes those together with the name, and only then removes the file. A reader looks at the
keeper's file last: a file that was gone is in it, and one that was still there and is in it already
is left out. The folder is private (0700), and its files hold counts and bounded labels only.
"""

from __future__ import annotations

from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Any

import orjson

from broker.telemetry.metrics import Dump, Tally

KEEPER = "keeper"
_REMEMBERED = 64  # names; a reader looks at files and keeper within a moment


class Shared:
    """One process's place among several. `name` is never used again in the folder; `KEEPER` is who
    inherits.
    """

    def __init__(self, folder: Path, name: str, tally: Tally) -> None:
        self._folder = folder
        self._name = name
        self._tally = tally
        self._inherited: deque[str] = deque(maxlen=_REMEMBERED)

    def publish(self) -> None:
        """Let the others see this process's figures. Without the folder, whose end is the
        service's, nothing happens.
        """
        fresh = self._folder / f"{self._name}.new"
        with suppress(OSError):
            fresh.write_bytes(orjson.dumps([list(self._inherited), self._tally.dump()]))
            fresh.replace(self._folder / f"{self._name}.json")

    def others(self) -> list[Dump]:
        """The dumps of all other processes, as of their last second; for `Tally.others`."""
        self.publish()
        found = {path.stem: _read(path) for path in sorted(self._folder.glob("*.json"))}
        inherited, kept = _read(self._folder / f"{KEEPER}.json")
        left_out = {KEEPER, self._name, *inherited}
        dumps: list[Dump] = [dump for name, (_, dump) in found.items() if name not in left_out]
        return dumps if self._name == KEEPER else [*dumps, kept]

    def inherit(self, name: str) -> None:
        """Take over the figures of a process that has ended."""
        path = self._folder / f"{name}.json"
        self._tally.absorb(_read(path)[1])
        self._inherited.append(name)
        self.publish()
        for left in (path, path.with_suffix(".new")):
            with suppress(OSError):
                left.unlink(missing_ok=True)


def _read(path: Path) -> tuple[list[str], dict[str, Any]]:
    """Whom a process inherited from, and its figures; nothing where there is no file."""
    try:
        inherited, dump = orjson.loads(path.read_bytes())
    except (OSError, ValueError):
        return [], {}
    return inherited, dump

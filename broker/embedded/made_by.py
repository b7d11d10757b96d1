"""Which server made a data directory: its kind and version, from a record beside the data or from
the data's own files.

PostgreSQL writes its major version into `PG_VERSION`. Of Valkey or Redis the broker records what
runs, before it runs, in `valkey.made-by`. Where that is missing (an older broker made the data) the
header of the newest base file says it: an RDB file begins with a magic word and, as its first
auxiliary field, the version of the server that wrote it (Redis `src/rdb.c`, `rdbSaveInfoAuxFields`;
Valkey the same with `valkey-ver`).
"""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path
from typing import NamedTuple

from broker.embedded.place import Account, EmbeddedFault, entered, read_ours, write

RECORD = "valkey.made-by"
_LOG = "appendonlydir"

_RECORDED = re.compile(r"(Redis|Valkey) (\d{1,4})\.(\d{1,4})(?:\.(\d{1,4}))?\n?")
_BASE = re.compile(r"appendonly\.aof\.(\d{1,9})\.base\.rdb")
_HEADER = re.compile(
    rb"(?:REDIS\d{4}|VALKEY\d{3})\xfa(?:\x09(redis)-ver|\x0a(valkey)-ver)[\x03-\x3f](\d{1,4})\.(\d{1,4})(?:\.(\d{1,4}))?"
)


class Maker(NamedTuple):
    """The kind of server ("Redis", "Valkey") that wrote the directory `home`, and its version."""

    product: str
    version: tuple[int, ...]
    home: Path

    @property
    def title(self) -> str:
        return f"{self.product} {'.'.join(map(str, self.version))}"

    def is_read_by(self, product: str, version: tuple[int, ...]) -> bool:
        """Whether a server of that kind and version reads what this one wrote: one of the same kind
        that is not older, by release and not by patch. Valkey also reads what Redis up to 7.2
        wrote, from which it was forked."""
        if product == self.product:
            return version[:2] >= self.version[:2]
        return product == "Valkey" and self.version[:2] <= (7, 2)


def postgres_major(home: Path, account: Account) -> int | None:
    """The major version that made PostgreSQL's directory; None where there is none yet.

    Raises:
        EmbeddedFault: as `has_data`, and for a file that holds no version.
    """
    if not has_data(home, account, "PG_VERSION"):
        return None
    with entered(home, account) as directory:
        version = read(directory, "PG_VERSION")
    try:
        return int(version)
    except ValueError:
        raise EmbeddedFault(
            f"{home / 'PG_VERSION'} does not hold a version; restore the data directory, or move it away to begin anew."
        ) from None


def redis_maker(place: Path, account: Account) -> Maker | None:
    """The server that ran last on the data of Valkey or Redis; None where there is no data, or
    nothing tells.

    Raises:
        EmbeddedFault: as `has_data`, and for a record that the broker did not write.
    """
    home = place / "valkey"
    if not has_data(home, account, _LOG):
        return None
    with contextlib.suppress(FileNotFoundError):
        match = _RECORDED.fullmatch(read_ours(place / RECORD))
        if match:
            return Maker(match[1], _numbers(match.groups()[1:]), home)
    with contextlib.suppress(OSError), entered(home, account) as directory:
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
        log = os.open(_LOG, flags, dir_fd=directory)
        try:
            header = _HEADER.match(_newest_base(log))
        finally:
            os.close(log)
        if header is not None:
            return Maker("Redis" if header[1] else "Valkey", _numbers(header.groups()[2:]), home)
    return None


def record_redis(place: Path, title: str) -> None:
    """Record the server that is about to run on the data, by kind and version. Raises OSError."""
    write(place / RECORD, title + "\n")


def _newest_base(log: int) -> bytes:
    """How the newest base file of an append-only log begins; empty where there is none."""
    bases = {int(match[1]): name for name in os.listdir(log) if (match := _BASE.fullmatch(name))}
    return _read(log, bases[max(bases)]) if bases else b""


def _numbers(groups: tuple[str | bytes | None, ...]) -> tuple[int, ...]:
    return tuple(int(group) for group in groups if group is not None)


def has_data(home: Path, account: Account, mark: str) -> bool:
    """Whether a server's directory has its data, of which `mark` is one name.

    Raises:
        EmbeddedFault: a file or a link in its place, somebody else's directory, or one that has
            content but not the mark.
    """
    try:
        with entered(home, account) as directory:
            names = os.listdir(directory)
    except FileNotFoundError:
        return False
    except OSError as fault:
        raise EmbeddedFault(f"{home} can't be read: {fault.strerror}.") from None
    if names and mark not in names:
        raise EmbeddedFault(
            f"{home} is damaged or not a server's data: it has files but no {mark}; restore it, or move it away to begin anew."
        )
    return bool(names)


def read(directory: int, name: str) -> str:
    """The text of one of a server's own small files; empty where there is none, or a link or
    something else in its place.
    """
    return _read(directory, name).decode("utf-8", "replace")


def _read(directory: int, name: str) -> bytes:
    try:
        descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=directory)
    except OSError:
        return b""
    try:
        return os.read(descriptor, 4096)
    except OSError:
        return b""
    finally:
        os.close(descriptor)

"""Data versions: the kind and version of the server that wrote a data directory.

PostgreSQL writes its major version into `PG_VERSION`. For Valkey and Redis the broker writes a
record, `valkey.made-by`, before the server starts. If the record is missing (an older broker made
the data), the header of the newest base file has the version. An RDB file begins with a magic word
and, as its first auxiliary field, the version of its server (Redis `src/rdb.c`,
`rdbSaveInfoAuxFields`; Valkey the same with `valkey-ver`).
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from broker.embedded.directories import Account, EmbeddedFault, entered, read_ours, write

RECORD = "valkey.made-by"
_LOG = "appendonlydir"

_RECORDED = re.compile(r"(Redis|Valkey) (\d{1,4})\.(\d{1,4})(?:\.(\d{1,4}))?\n?")
_BASE = re.compile(r"appendonly\.aof\.(\d{1,9})\.base\.rdb")
_HEADER = re.compile(
    rb"(?:REDIS\d{4}|VALKEY\d{3})\xfa(?:\x09(redis)-ver|\x0a(valkey)-ver)[\x03-\x3f](\d{1,4})\.(\d{1,4})(?:\.(\d{1,4}))?"
)


class DataVersion(NamedTuple):
    """The kind ("Redis", "Valkey") and version of the server that wrote the directory `home`."""

    product: str
    version: tuple[int, ...]
    home: Path

    @property
    def title(self) -> str:
        return f"{self.product} {'.'.join(map(str, self.version))}"

    def is_read_by(self, product: str, version: tuple[int, ...]) -> bool:
        """True if a server of that kind and version reads this data: one of the same kind and of
        the same release or newer. Valkey also reads data of Redis up to 7.2, from which it was
        forked.
        """
        if product == self.product:
            return version[:2] >= self.version[:2]
        return product == "Valkey" and self.version[:2] <= (7, 2)


def postgres_major(home: Path, account: Account) -> int | None:
    """The major version that made PostgreSQL's directory. None: there is no data yet.

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
            f"{home / 'PG_VERSION'} does not hold a version; restore the data directory, or move "
            "it away to begin anew."
        ) from None


def redis_data_version(servers: Path, account: Account) -> DataVersion | None:
    """The server that ran last on the data of Valkey or Redis. None: there is no data, or neither
    record nor header is readable.

    Raises:
        EmbeddedFault: as `has_data`, and for a record that the broker did not write.
    """
    home = servers / "valkey"
    if not has_data(home, account, _LOG):
        return None
    with contextlib.suppress(FileNotFoundError):
        if match := _RECORDED.fullmatch(read_ours(servers / RECORD)):
            return DataVersion(match[1], numbers(match.groups()[1:]), home)
    with contextlib.suppress(OSError), entered(home, account) as directory:
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
        log = os.open(_LOG, flags, dir_fd=directory)
        try:
            header = _HEADER.match(_newest_base(log))
        finally:
            os.close(log)
        if header is not None:
            kind = "Redis" if header[1] else "Valkey"
            return DataVersion(kind, numbers(header.groups()[2:]), home)
    return None


def record_redis(servers: Path, title: str) -> None:
    """Record kind and version of the server that is about to start on the data. Raises OSError."""
    write(servers / RECORD, title + "\n")


def _newest_base(log: int) -> bytes:
    """The beginning of the newest base file of an append-only log; empty without one."""
    bases = {int(match[1]): name for name in os.listdir(log) if (match := _BASE.fullmatch(name))}
    return _read(log, bases[max(bases)]) if bases else b""


def numbers(groups: Iterable[str | bytes | None]) -> tuple[int, ...]:
    """The numbers of a version, from the groups of a match."""
    return tuple(int(group) for group in groups if group is not None)


def has_data(home: Path, account: Account, mark: str) -> bool:
    """True if a server's directory has data. `mark` is the name of a file that all data has.

    Raises: EmbeddedFault: a file or a link in its place, a foreign directory, or files without the
        mark.
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
            f"{home} is damaged or not a server's data: it has files but no {mark}; "
            "restore it, or move it away to begin anew."
        )
    return bool(names)


def read(directory: int, name: str) -> str:
    """The text of a server's small file; empty if the file is missing, a link or not a file."""
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

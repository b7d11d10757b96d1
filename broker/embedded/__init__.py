"""Embedded stores: real PostgreSQL and Valkey under a data directory, for `broker dev` and for
tests.

Guarantees:

- *No network.* Both servers listen on Unix sockets only, in a directory with mode 0700. PostgreSQL
  authenticates the caller by the kernel (`peer`), mapped to one role. No password exists that could
  leak, and no local user is trusted.
- *No process outlives the broker.* `stop` ends both servers, and so does the kernel if the broker
  is killed (`processes`). A second broker on the same data is refused (`directories`).
- *No acknowledged write is lost, and no deleted value returns.* PostgreSQL runs with fsync and
  synchronous commit. Valkey appends every write to its log and syncs before it answers
  (`appendfsync always`). With `everysec` a crash could undo an acknowledged GETDEL, and a nonce
  could be redeemed twice. The cost is one fdatasync per iteration of Valkey's event loop.
- *A data directory is complete or absent.* initdb works in `postgres.new`, which is renamed when it
  is complete. The next start removes the rest of an interrupted first start.
- *Every fault is one sentence* (`EmbeddedFault`), with the server's own message and the path of its
  log if it has any.

The servers start side by side. Features that a small installation doesn't need (replication, huge
pages, JIT, time zone detection) are off. Logs hold faults, and neither statements nor values of
keys: a failed insert's DETAIL would carry external ids.

The servers' directory (see `directories`) holds `postgres/`, `valkey/`, `run/` (sockets),
`postgres.log`, `valkey.log`, `valkey.made-by` and `servers.json`.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Self
from urllib.parse import quote

from broker.embedded.binaries import INSTALL, Binaries, find_postgres, find_redis
from broker.embedded.data_version import postgres_major, read, record_redis, redis_data_version
from broker.embedded.directories import (
    Account,
    Claim,
    EmbeddedFault,
    binaries_directory,
    claim,
    entered,
    is_new,
    make_directory_elsewhere,
    own,
    recorded_directory,
    server_account,
    socket_directory,
    user_name,
    write,
)
from broker.embedded.processes import Log, Server, exists, reap, record, runs, stop

__all__ = ["INSTALL", "EmbeddedFault", "EmbeddedStores", "is_new"]

READY_WITHIN = 30.0
ROLE = "broker"

_POSTGRES_SETTINGS = {
    "listen_addresses": "",
    "port": "5432",
    "unix_socket_permissions": "0700",
    "fsync": "on",
    "full_page_writes": "on",
    "synchronous_commit": "on",
    "password_encryption": "scram-sha-256",
    "max_connections": "100",
    "shared_buffers": "32MB",
    "huge_pages": "off",
    "jit": "off",
    "wal_level": "minimal",
    "max_wal_senders": "0",
    "max_logical_replication_workers": "0",
    "logging_collector": "off",
    "log_checkpoints": "off",
    "log_min_messages": "log",
    "log_min_error_statement": "panic",
    "log_error_verbosity": "terse",
}

_VALKEY_SETTINGS = {
    "port": "0",
    "unixsocketperm": "700",
    "daemonize": "no",
    "set-proc-title": "no",
    "save": "",
    "appendonly": "yes",
    "appendfsync": "always",
    "maxmemory-policy": "noeviction",
    "always-show-logo": "no",
    "loglevel": "notice",
    "logfile": "",
}


class EmbeddedStores:
    """Embedded servers for the stores without a configured URL. `start` makes one; a context
    manager that ends in `stop`.

    `database_url` and `redis_url` are the configured URLs, or those of the embedded servers. `data`
    is the data directory, absolute. `directory` holds the servers' files, and is mostly the same.
    `servers` names the running servers, and `notes` are sentences for the operator.
    """

    def __init__(
        self,
        claimed: Claim,
        database_url: str | None,
        redis_url: str | None,
        meanwhile: Callable[[], object] | None,
        postgres: Mapping[str, str],
        on_step: Callable[[str], object],
    ) -> None:
        self.data = claimed.path
        self.directory = claimed.path
        self.database_url = database_url or ""
        self.redis_url = redis_url or ""
        self.servers: tuple[str, ...] = ()
        self.notes: tuple[str, ...] = ()
        self._running: list[Server] = []
        self._meanwhile = meanwhile
        self._postgres_settings = _POSTGRES_SETTINGS | dict(postgres)
        self._on_step = on_step
        self._process = os.getpid()
        self._cleanup = contextlib.ExitStack()
        self._cleanup.callback(claimed.release)

    @classmethod
    def start(
        cls,
        data: Path,
        meanwhile: Callable[[], object] | None = None,
        postgres: Mapping[str, str] = MappingProxyType({}),
        on_step: Callable[[str], object] = lambda _: None,
        /,
        *,
        database_url: str | None = None,
        redis_url: str | None = None,
    ) -> Self:
        """Claim the data directory, start the stores that are not configured, and return when they
        answer. Main thread only.

        `meanwhile` is called once, during the first wait. A first start waits for initdb, as long
        as the import of a web framework takes. An exception in `meanwhile` ends the start.
        `postgres` adds or replaces settings of Postgres. `on_step` is called with each step as it
        begins.

        Raises EmbeddedFault for every fault that an operator can mend. No process is left running
        then. If a server is missing, no data directory is made.
        """
        if is_new(data):
            account = server_account()
            if not database_url:
                find_postgres(account, None)
            if not redis_url:
                find_redis(account)
        stores = cls(claim(data), database_url, redis_url, meanwhile, postgres, on_step)
        try:
            if not (database_url and redis_url):
                stores._start(server_account())
            stores._run_meanwhile()
        except BaseException as fault:
            stores.stop()
            if not isinstance(fault, OSError):
                raise
            where = f" ({fault.filename})" if fault.filename else ""
            raise EmbeddedFault(
                f"The embedded stores can't start: {fault.strerror or fault}{where}."
            ) from None
        return stores

    def stop(self) -> None:
        """Stop the servers and release the data directory. Idempotent; no effect in a forked
        child.
        """
        if os.getpid() == self._process:
            self._cleanup.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _run_meanwhile(self) -> None:
        meanwhile, self._meanwhile = self._meanwhile, None
        if meanwhile is not None:
            meanwhile()

    def _start(self, account: Account) -> None:
        recorded = recorded_directory(self.data)
        home = recorded or self.data
        major = None if self.database_url else postgres_major(home / "postgres", account)
        version = None if self.redis_url else redis_data_version(home, account)
        found = [] if self.database_url else [find_postgres(account, major)]
        found += [] if self.redis_url else [find_redis(account, version)]
        self._settle(account, recorded, found, has_data=major is not None)
        if not all(binaries.reachable for binaries in found):
            self._on_step("Copying the servers to where they can run")
        reap(self.directory / "servers.json", account)
        sockets = socket_directory(self.directory, account)
        self._cleanup.callback(self._remove_sockets, sockets, account)
        _empty(sockets, account)
        self._cleanup.callback(self._stop_servers)
        starting: list[tuple[Server, Callable[[], bool]]] = []
        for each in reversed(found):  # initdb is the longest wait, so Valkey starts before it
            binaries = each
            if not each.reachable:
                binaries = each.carried_to(binaries_directory(self.directory))
            if each.product == "PostgreSQL":
                starting.append(self._start_postgres(binaries, account, sockets, new=major is None))
            else:
                starting.append(self._start_redis(binaries, account, sockets))
        self._on_step(f"Starting {' and '.join(binaries.title for binaries in found)}")
        self._run_meanwhile()
        _until_ready(starting)
        self.servers = tuple(binaries.title for binaries in found)

    def _settle(
        self, account: Account, recorded: Path | None, found: list[Binaries], *, has_data: bool
    ) -> None:
        """Choose the servers' directory, give it to the account, and hold its lock."""
        if recorded:
            self.directory = recorded
            self.notes = (f"The stores' data is in {recorded}, as {self.data / 'where'} says.",)
        else:
            closed = not account.can_enter(self.data.parent)
            if closed and has_data:
                raise EmbeddedFault(
                    f"{self.data} has data, but the servers' user {account.name} can no longer "
                    f"enter {self.data.parent}; let others enter that directory again, or move the "
                    "data directory to where they can."
                )
            if closed or (not has_data and not all(binaries.reachable for binaries in found)):
                which = self.data.parent if closed else "the directory of the installed binaries"
                self.directory, self.notes = make_directory_elsewhere(
                    self.data,
                    f"the servers run as the user {account.name}, who can't enter {which}",
                )
        own(self.directory, account)
        if self.directory != self.data:
            self._cleanup.callback(claim(self.directory).release)

    def _remove_sockets(self, sockets: Path, account: Account) -> None:
        if sockets.parent == self.directory:
            with contextlib.suppress(EmbeddedFault, OSError):
                _empty(sockets, account)
        else:
            shutil.rmtree(sockets, ignore_errors=True)

    def _stop_servers(self) -> None:
        stop(self._running)
        with contextlib.suppress(OSError):
            (self.directory / "servers.json").unlink()

    def _spawn(
        self, title: str, argv: list[str], account: Account, cwd: Path, log: Log, mark: Path
    ) -> Server:
        is_postgres = Path(argv[0]).name == "postgres"
        server = Server(
            title,
            argv,
            account=account,
            cwd=cwd,
            log=log,
            stop_signal=signal.SIGINT if is_postgres else signal.SIGTERM,
            mark=mark,
        )
        self._running.append(server)
        record(self.directory / "servers.json", self._running)
        return server

    def _log(self, name: str) -> Log:
        log = Log(self.directory / name)
        self._cleanup.callback(log.close)
        return log

    def _start_redis(
        self, binaries: Binaries, account: Account, sockets: Path
    ) -> tuple[Server, Callable[[], bool]]:
        home = self.directory / "valkey"
        own(home, account)
        record_redis(self.directory, binaries.title)
        path = sockets / "valkey.sock"
        argv = [str(binaries.directory / binaries.server), "--unixsocket", str(path)]
        for name, value in _VALKEY_SETTINGS.items():
            argv += [f"--{name}", value]
        self.redis_url = f"unix://{quote(str(path))}?db=0"
        log = self._log("valkey.log")
        server = self._spawn(binaries.title, argv, account, home, log, path)
        return server, lambda: _is_redis_ready(path)

    def _start_postgres(
        self, binaries: Binaries, account: Account, sockets: Path, *, new: bool
    ) -> tuple[Server, Callable[[], bool]]:
        home = self.directory / "postgres"
        log = self._log("postgres.log")
        if new:
            self._initialise(binaries, account, home, log)
        names = {pwd.getpwuid(0).pw_name, user_name(os.geteuid())}
        users = "".join(f'{ROLE} "{name}" {ROLE}\n' for name in sorted(names))
        with entered(home, account) as directory:
            _remove_stale_pid_file(directory, home, account)
            write(
                "pg_hba.conf", f"local all {ROLE} peer map={ROLE}\n", account, directory=directory
            )
            write("pg_ident.conf", users, account, directory=directory)
        argv = [str(binaries.directory / "postgres"), "-D", str(home)]
        settings = self._postgres_settings | {"unix_socket_directories": str(sockets)}
        for name, value in settings.items():
            argv += ["-c", f"{name}={value}"]
        self.database_url = f"postgresql://{ROLE}@/postgres?host={quote(str(sockets), safe='')}"
        server = self._spawn(binaries.title, argv, account, home, log, home)
        return server, lambda: _is_postgres_ready(server, home, account)

    def _initialise(self, binaries: Binaries, account: Account, home: Path, log: Log) -> None:
        self._on_step(f"Making a database with {binaries.title}")
        new = home.with_name("postgres.new")
        if new.is_dir() and not new.is_symlink():
            shutil.rmtree(new)
        own(new, account)
        argv = [str(binaries.directory / "initdb"), "-D", str(new), "-U", ROLE, "--auth=peer"]
        argv += ["--no-sync", "--locale=C", "-E", "UTF8", "--no-instructions"]
        initdb = self._spawn(f"initdb of {binaries.title}", argv, account, self.directory, log, new)
        self._run_meanwhile()
        try:
            status = initdb.process.wait(READY_WITHIN)
        except subprocess.TimeoutExpired:
            raise EmbeddedFault(
                f"{initdb.title} took longer than {READY_WITHIN:.0f} s; its log is {log.path}."
            ) from None
        if status != 0:
            raise initdb.failed()
        self._running.remove(initdb)
        new.rename(home)


def _is_redis_ready(path: Path) -> bool:
    """True if the server answers PING. While it loads its log, it answers -LOADING."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(1.0)
        try:
            connection.connect(str(path))
            connection.sendall(b"PING\r\n")
            return connection.recv(64).startswith(b"+PONG")
        except OSError:
            return False


def _is_postgres_ready(server: Server, home: Path, account: Account) -> bool:
    """True if line 8 of postmaster.pid says so (PostgreSQL, src/include/utils/pidfile.h)."""
    try:
        with entered(home, account) as directory:
            lines = read(directory, "postmaster.pid").splitlines()
    except OSError:
        return False
    return len(lines) >= 8 and lines[0] == str(server.process.pid) and lines[7].strip() == "ready"


def _until_ready(starting: list[tuple[Server, Callable[[], bool]]]) -> None:
    deadline = time.monotonic() + READY_WITHIN
    while starting := [pair for pair in starting if not pair[1]()]:
        for server, _ in starting:
            if server.process.poll() is not None:
                raise server.failed()
            if time.monotonic() > deadline:
                raise EmbeddedFault(
                    f"{server.title} was not ready within {READY_WITHIN:.0f} s: "
                    f"{server.log.last_words()}; its log is {server.log.path}."
                )
        time.sleep(0.004)  # between two looks


def _remove_stale_pid_file(directory: int, home: Path, account: Account) -> None:
    """Remove a postmaster.pid whose process id now belongs to another program: PostgreSQL would not
    start.

    Process ids repeat after a reboot, and in containers at every start. The broker holds the lock
    of the data directory and has reaped the servers of an earlier broker, so such a file is stale.
    PostgreSQL itself removes the file of a process that has ended.
    """
    number = read(directory, "postmaster.pid").partition("\n")[0]
    if number.isdecimal() and exists(int(number)) and not runs(int(number), str(home), account):
        with contextlib.suppress(FileNotFoundError):
            os.unlink("postmaster.pid", dir_fd=directory)


def _empty(sockets: Path, account: Account) -> None:
    """Remove an earlier server's sockets: a stale socket keeps Valkey from binding."""
    with entered(sockets, account) as directory:
        for name in os.listdir(directory):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name, dir_fd=directory)

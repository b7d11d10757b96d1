"""Real PostgreSQL and Valkey under a data directory, for `broker dev` and for tests.

What it promises:

- *Nothing listens on the network.* Both servers have Unix sockets only, in a directory that is
  0700. PostgreSQL knows the caller by the kernel's word (`peer`), mapped to one role; no password
  exists that could leak, and no local user is trusted.
- *Nothing survives the broker.* `stop` ends both; so does the kernel when the broker is killed (see
  `children`). A second broker on the same data is refused (see `place`).
- *Nothing acknowledged is lost or comes back.* PostgreSQL runs with fsync and synchronous commit.
  Valkey appends every write to its log and syncs before it answers (`appendfsync always`): with
  `everysec` a crash could undo an acknowledged GETDEL, and a nonce would buy twice. It costs one
  fdatasync per turn of Valkey's loop.
- *A data directory is complete or absent.* initdb works in `postgres.new`, which is renamed when it
  is whole; what an interrupted first start left is removed by the next.
- *Every fault is one sentence* (`EmbeddedFault`), with the server's own last words and the place of
  its log where it has any.

Start-up is quick because the servers start side by side, and because what a small installation
doesn't need (replication, huge pages, JIT, time zone detection) is off. Logs hold faults only and
no statements or key values: a failed insert's DETAIL would carry external ids.

Layout of the place (`place` says where that is): `postgres/`, `valkey/`, `run/` (sockets),
`postgres.log`, `valkey.log`, `valkey.made-by`, `servers.json`.
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
from types import MappingProxyType, TracebackType
from typing import Self
from urllib.parse import quote

from broker.embedded.binaries import INSTALL, Binaries, find_postgres, find_redis
from broker.embedded.children import Log, Server, exists, reap, record, runs, stop
from broker.embedded.made_by import postgres_major, read, record_redis, redis_maker
from broker.embedded.place import (
    Account,
    Claim,
    EmbeddedFault,
    binaries_directory,
    claim,
    entered,
    is_new,
    own,
    place_elsewhere,
    recorded_place,
    server_account,
    socket_directory,
    user_name,
    write,
)

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
    """Embedded servers for the stores that have no configured URL. Made by `start`; a context
    manager that ends in `stop`.

    `database_url` and `redis_url` are the configured ones or those of our servers. `data` is the
    data directory, absolute. `place` is where the servers' files are, almost always the same
    directory. `servers` names what runs, and `notes` are sentences that whoever started the broker
    should read.
    """

    def __init__(self, claimed: Claim, database_url: str | None, redis_url: str | None) -> None:
        self.data = claimed.path
        self.place = claimed.path
        self.database_url = database_url or ""
        self.redis_url = redis_url or ""
        self.servers: tuple[str, ...] = ()
        self.notes: tuple[str, ...] = ()
        self._claim = claimed
        self._running: list[Server] = []
        self._logs: list[Log] = []
        self._sockets: Path | None = None
        self._account: Account | None = None
        self._process = os.getpid()
        self._meanwhile: Callable[[], object] | None = None
        self._tell: Callable[[str], object] = lambda _: None
        self._postgres_settings = dict(_POSTGRES_SETTINGS)

    @classmethod
    def start(
        cls,
        data: Path,
        meanwhile: Callable[[], object] | None = None,
        postgres: Mapping[str, str] = MappingProxyType({}),
        tell: Callable[[str], object] = lambda _: None,
        /,
        *,
        database_url: str | None = None,
        redis_url: str | None = None,
    ) -> Self:
        """Claim the data directory and start what is not configured; returns when both answer. Main
        thread only.

        `meanwhile` is called once, as soon as there is something to wait for: a first start waits
        for initdb most of its time, as long as importing a web framework takes. Its exceptions end
        the start. `postgres` are settings of Postgres, by name, beside or instead of ours. `tell`
        hears of each step as it begins.

        Raises EmbeddedFault for everything that a person can put right. Nothing is left running
        then, and where there was no data directory and a server is missing, none is made.
        """
        if is_new(data):
            account = server_account()
            if not database_url:
                find_postgres(account, None)
            if not redis_url:
                find_redis(account)
        stores = cls(claim(data), database_url, redis_url)
        stores._meanwhile = meanwhile
        stores._tell = tell
        stores._postgres_settings |= postgres
        try:
            if not (database_url and redis_url):
                stores._start(postgres=not database_url, redis=not redis_url)
            stores._use_the_wait()
        except OSError as fault:
            stores.stop()
            where = f" ({fault.filename})" if fault.filename else ""
            raise EmbeddedFault(
                f"The embedded stores can't start: {fault.strerror or fault}{where}."
            ) from None
        except BaseException:
            stores.stop()
            raise
        return stores

    def stop(self) -> None:
        """End the servers and give the data directory back. Idempotent; does nothing in a forked
        child.
        """
        if os.getpid() != self._process:
            return
        stop(self._running)
        if self._running:
            with contextlib.suppress(OSError):
                (self.place / "servers.json").unlink()
        self._running.clear()
        for log in self._logs:
            log.close()
        if self._sockets is not None and self._account is not None:
            if self._sockets.parent == self.place:
                with contextlib.suppress(EmbeddedFault, OSError):
                    _empty(self._sockets, self._account)
            else:
                shutil.rmtree(self._sockets, ignore_errors=True)
            self._sockets = None
        self._claim.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        fault: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def _use_the_wait(self) -> None:
        meanwhile, self._meanwhile = self._meanwhile, None
        if meanwhile is not None:
            meanwhile()

    def _start(self, *, postgres: bool, redis: bool) -> None:
        account = self._account = server_account()
        recorded = recorded_place(self.data)
        home = recorded or self.data
        major = postgres_major(home / "postgres", account) if postgres else None
        maker = redis_maker(home, account) if redis else None
        pg = find_postgres(account, major) if postgres else None
        valkey = find_redis(account, maker) if redis else None
        found = [binaries for binaries in (pg, valkey) if binaries]
        self.place = self._settle(account, recorded, found, has_data=major is not None)
        if not all(binaries.reachable for binaries in found):
            self._tell("Copying the servers to where they can run")
        if pg and not pg.reachable:
            pg = pg.carried_to(binaries_directory(self.place))
        if valkey and not valkey.reachable:
            valkey = valkey.carried_to(binaries_directory(self.place))
        reap(self.place / "servers.json", account)
        self._sockets = socket_directory(self.place, account)
        _empty(self._sockets, account)
        waiting: list[_Valkey | _Postgres] = []
        if valkey:
            waiting.append(self._valkey(valkey, account, self._sockets))
        if pg:
            waiting.append(self._postgres(pg, account, self._sockets, fresh=major is None))
        self._tell(f"Starting {' and '.join(binaries.title for binaries in found)}")
        self._use_the_wait()
        _until_ready(waiting)
        self.servers = tuple(binaries.title for binaries in found)

    def _settle(
        self, account: Account, recorded: Path | None, found: list[Binaries], *, has_data: bool
    ) -> Path:
        """The place of the servers' files, owned by their account; see `place`."""
        place = recorded or self.data
        if recorded:
            self.notes = (f"The stores' data is in {recorded}, as {self.data / 'where'} says.",)
        else:
            closed = not account.can_enter(self.data.parent)
            if closed and has_data:
                raise EmbeddedFault(
                    f"{self.data} has data, but the servers' user {account.name} can no longer enter {self.data.parent}; "
                    "let others enter that directory again, or move the data directory to where they can."
                )
            if closed or (not has_data and not all(binaries.reachable for binaries in found)):
                why = f"the servers run as the user {account.name}, who can't enter "
                why += (
                    str(self.data.parent) if closed else "the directory of the installed binaries"
                )
                place, self.notes = place_elsewhere(self.data, account, why)
        own(place, account)
        if place != self.data:
            self._claim.also(claim(place))
        return place

    def _spawn(
        self, title: str, argv: list[str], account: Account, cwd: Path, log: Log, mark: Path
    ) -> Server:
        postgres = Path(argv[0]).name == "postgres"
        server = Server(
            title,
            argv,
            account=account,
            cwd=cwd,
            log=log,
            stop_signal=signal.SIGINT if postgres else signal.SIGTERM,
            mark=mark,
        )
        self._running.append(server)
        record(self.place / "servers.json", self._running)
        return server

    def _log(self, name: str) -> Log:
        log = Log(self.place / name)
        self._logs.append(log)
        return log

    def _valkey(self, binaries: Binaries, account: Account, sockets: Path) -> _Valkey:
        home = self.place / "valkey"
        own(home, account)
        record_redis(self.place, binaries.title)
        path = sockets / "valkey.sock"
        argv = [str(binaries.directory / binaries.server), "--unixsocket", str(path)]
        for name, value in _VALKEY_SETTINGS.items():
            argv += [f"--{name}", value]
        self.redis_url = f"unix://{quote(str(path))}?db=0"
        return _Valkey(
            self._spawn(binaries.title, argv, account, home, self._log("valkey.log"), path), path
        )

    def _postgres(
        self, binaries: Binaries, account: Account, sockets: Path, *, fresh: bool
    ) -> _Postgres:
        home = self.place / "postgres"
        log = self._log("postgres.log")
        if fresh:
            self._initialise(binaries, account, home, log)
        names = {pwd.getpwuid(0).pw_name, user_name(os.geteuid())}
        users = "".join(f'{ROLE} "{name}" {ROLE}\n' for name in sorted(names))
        with entered(home, account) as directory:
            _forget_stranger(directory, home, account)
            write(
                "pg_hba.conf", f"local all {ROLE} peer map={ROLE}\n", account, directory=directory
            )
            write("pg_ident.conf", users, account, directory=directory)
        argv = [str(binaries.directory / "postgres"), "-D", str(home)]
        for name, value in {
            **self._postgres_settings,
            "unix_socket_directories": str(sockets),
        }.items():
            argv += ["-c", f"{name}={value}"]
        self.database_url = f"postgresql://{ROLE}@/postgres?host={quote(str(sockets), safe='')}"
        return _Postgres(self._spawn(binaries.title, argv, account, home, log, home), home, account)

    def _initialise(self, binaries: Binaries, account: Account, home: Path, log: Log) -> None:
        self._tell(f"Making a database with {binaries.title}")
        new = home.with_name("postgres.new")
        if new.is_dir() and not new.is_symlink():
            shutil.rmtree(new)
        own(new, account)
        argv = [
            str(binaries.directory / "initdb"),
            "-D",
            str(new),
            "-U",
            ROLE,
            "--auth=peer",
            "--no-sync",
        ]
        argv += ["--locale=C", "-E", "UTF8", "--no-instructions"]
        initdb = self._spawn(f"initdb of {binaries.title}", argv, account, self.place, log, new)
        self._use_the_wait()
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


class _Valkey:
    def __init__(self, server: Server, path: Path) -> None:
        self.server = server
        self._path = path

    def ready(self) -> bool:
        """Whether it answers PING; while it loads its log it answers -LOADING."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(1.0)
            try:
                connection.connect(str(self._path))
                connection.sendall(b"PING\r\n")
                return connection.recv(64).startswith(b"+PONG")
            except OSError:
                return False


class _Postgres:
    def __init__(self, server: Server, home: Path, account: Account) -> None:
        self.server = server
        self._home = home
        self._account = account

    def ready(self) -> bool:
        """Whether the postmaster says so: line 8 of postmaster.pid (PostgreSQL,
        src/include/utils/pidfile.h).
        """
        try:
            with entered(self._home, self._account) as directory:
                lines = read(directory, "postmaster.pid").splitlines()
        except OSError:
            return False
        return (
            len(lines) >= 8
            and lines[0] == str(self.server.process.pid)
            and lines[7].strip() == "ready"
        )


def _until_ready(waiting: list[_Valkey | _Postgres]) -> None:
    deadline = time.monotonic() + READY_WITHIN
    while waiting := [store for store in waiting if not store.ready()]:
        for store in waiting:
            if store.server.process.poll() is not None:
                raise store.server.failed()
            if time.monotonic() > deadline:
                raise EmbeddedFault(
                    f"{store.server.title} was not ready within {READY_WITHIN:.0f} s: {store.server.log.last_words()}; "
                    f"its log is {store.server.log.path}."
                )
        time.sleep(0.004)  # between two looks


def _forget_stranger(directory: int, home: Path, account: Account) -> None:
    """Remove a postmaster.pid whose number now belongs to another program, which would keep
    PostgreSQL from starting.

    Numbers come back after a reboot, and in containers at every start. The lock of the data
    directory is ours and the servers of an earlier broker have ended, so such a file is stale. One
    whose process has ended PostgreSQL removes itself.
    """
    number = read(directory, "postmaster.pid").partition("\n")[0]
    if number.isdecimal() and exists(int(number)) and not runs(int(number), str(home), account):
        with contextlib.suppress(FileNotFoundError):
            os.unlink("postmaster.pid", dir_fd=directory)


def _empty(sockets: Path, account: Account) -> None:
    """Remove what an earlier server left: a stale socket keeps Valkey from binding."""
    with entered(sockets, account) as directory:
        for name in os.listdir(directory):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name, dir_fd=directory)

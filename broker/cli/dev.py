"""`broker dev`: the same service as `serve`, with embedded stores and the demo site.

The stores are started first and stopped last. The dev app (RP ID `localhost`) and its key are made once and found again in
`dev.json`, readable by its owner only; each start adds its own origin to the app. SIGINT and SIGTERM stop everything; when the
process is killed, the kernel stops the stores (`broker.embedded`).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import webbrowser
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from broker.cli.serving import run, start, until_told
from broker.embedded import EmbeddedStores
from broker.errors import InvalidKey, UnknownApp
from broker.model import RelyingParty
from broker.settings import Settings
from broker.telemetry import CONTEXT, Context, Log, capture_library_records

if TYPE_CHECKING:
    from aiohttp import web

    from broker.app import Parts

DATA = ".broker"
NAME = "Passkey broker demo"


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `dev`."""
    command = commands.add_parser("dev", help="run everything here, with embedded stores and the demo site")
    command.add_argument("--data", type=Path, default=Path(DATA), help=f"data directory (default {DATA})")
    command.add_argument("--host", help="address to listen on (HOST; default localhost)")
    command.add_argument("--port", type=int, help="port (PORT; default 8080)")
    command.add_argument("--no-open", action="store_true", help="don't open the browser")
    command.set_defaults(run=run_dev)


def run_dev(options: argparse.Namespace) -> int:
    """Start the stores, serve until told to stop, stop the stores."""
    environment = dict(os.environ)
    for name in ("host", "port"):
        value = getattr(options, name) or environment.get(name.upper())
        if value is not None:
            environment[f"BROKER_{name.upper()}"] = str(value)
    environment.setdefault("BROKER_LOG_LEVEL", "warning")  # the banner is what a person looks for
    stores = {
        name: environment.get(f"BROKER_{name.upper()}") or None for name in ("database_url", "redis_url")
    }
    Settings.load(environment, needed=())  # faults are reported before anything is started
    with EmbeddedStores.start(options.data, _load, **stores) as embedded:
        environment["BROKER_DATABASE_URL"] = embedded.database_url
        environment["BROKER_REDIS_URL"] = embedded.redis_url
        settings = Settings.load(environment)
        run(_dev(settings, options.data, embedded.notes, opens=not options.no_open))
    return 0


def _load() -> None:
    """Import the service: as long as Postgres takes to start, so it is done meanwhile."""
    import broker.app
    import broker.demo  # noqa: F401


async def _dev(settings: Settings, data: Path, notes: tuple[str, ...], *, opens: bool) -> None:
    CONTEXT.set(Context(request_id="dev", actor="cli"))
    log = Log(level=settings.log_level)
    capture_library_records(log)
    from broker.app import assemble
    from broker.demo import demo_app

    parts = await assemble(settings, log=log)
    try:
        await parts.postgres.migrate(datetime.now(UTC))
        app, key = await _dev_app(parts, data / "dev.json")
    except BaseException:
        await parts.close()
        raise
    address = "127.0.0.1" if settings.host in ("localhost", "0.0.0.0", "") else settings.host  # noqa: S104 - compared, not bound
    address = f"[{address}]" if ":" in address else address

    async def prepare(port: int) -> dict[str, web.Application]:
        """Whoever finds the service ready finds this start's origin and `dev.json` too."""
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
        _write(data / "dev.json", facts)
        demo = demo_app(
            broker_url=f"http://{address}:{port}", app_id=app.id, api_key=key, data=data, origins=(url,)
        )
        return {"/demo/": demo}

    service = await start(parts, prepare)
    try:
        url = f"http://localhost:{service.port}"
        print(_banner(url, app.id, data / "dev.json", notes), flush=True)  # noqa: T201 - the banner
        if opens and _has_screen():
            webbrowser.open(f"{url}/demo/")
        await until_told()
    finally:
        await service.close()


async def _dev_app(parts: Parts, place: Path) -> tuple[RelyingParty, str]:
    """The dev app and its key: those of `dev.json` where they still hold, else the same app with a new key, else a new app."""
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


def read(place: Path) -> dict[str, Any] | None:
    """A `dev.json`; None where there is none or it is not one."""
    try:
        value = json.loads(place.read_text())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _write(place: Path, value: dict[str, str]) -> None:
    """Replace `dev.json` in one step, mode 0600 from the first byte."""
    fresh = place.with_name(place.name + ".new")
    fresh.unlink(missing_ok=True)
    with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(json.dumps(value, indent=2) + "\n")
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

"""`broker serve`."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
from collections.abc import Mapping

from broker.cli.parsing import Commands, add_command
from broker.cli.process import (
    apply_migrations,
    reload_at_hangup,
    run_with_log,
    start,
    until_told,
    watch_postgres,
)
from broker.dialects import left_out, load_settings
from broker.settings import Settings
from broker.telemetry import Log


def add_commands(commands: Commands) -> None:
    """Add `serve`."""
    says = "run the service; settings come from BROKER_… variables"
    examples = (
        "serve --host 0.0.0.0 --port 8000",
        "serve --management-port 9000 --migrate",
    )
    command = add_command(commands, "serve", says, examples)
    command.add_argument("--host", help="address to listen on (BROKER_HOST; default localhost)")
    command.add_argument(
        "--port", type=int, help="port for pages, and for everything without a management port"
    )
    command.add_argument(
        "--management-port", type=int, help="port for keyed callers, health and metrics"
    )
    command.add_argument("--migrate", action="store_true", help="apply missing migrations first")
    command.set_defaults(run=run_serve)


def listening(environment: Mapping[str, str], options: argparse.Namespace) -> dict[str, str]:
    """The environment with what the command line said about host and ports."""
    given = {
        f"BROKER_{name.upper()}": str(value)
        for name in ("host", "port", "management_port")
        if (value := getattr(options, name, None)) is not None
    }
    return {**environment, **given}


def run_serve(options: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT."""
    settings = load_settings(listening(os.environ, options))
    run_with_log(lambda log: _serve(settings, log, migrate=options.migrate), settings)
    return 0


async def _serve(settings: Settings, log: Log, *, migrate: bool) -> None:
    from broker.app import assemble

    parts = await assemble(settings, log=log)
    if migrate:
        try:
            await apply_migrations(parts)
        except BaseException:
            await parts.close()
            raise
    reload_at_hangup(parts)
    service = await start(parts)
    told = until_told()  # before anybody learns that it listens
    if left := left_out(settings):
        log("dialects_left_out", dialects=left, missing="BROKER_SECRET_KEY")
    log(
        "listening",
        host=settings.host,
        port=service.port,
        management_port=service.management_port,
        metrics=settings.metrics_at,
    )
    looking = asyncio.create_task(watch_postgres(parts))
    if await told == signal.SIGTERM and settings.lame_duck_seconds:
        parts.ending = True
        log("lame_duck", seconds=settings.lame_duck_seconds)
        await asyncio.sleep(settings.lame_duck_seconds)
    looking.cancel()
    log("draining", seconds=settings.drain_seconds)
    await service.close()
    log("stopped")

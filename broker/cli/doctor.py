"""`broker doctor`: checks settings, stores, clocks, the secret key and origins, with a remedy for
each fault. `broker config`: the effective settings.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from broker.cli.findings import Finding, cause_of, clock, postgres_findings, redis_findings
from broker.cli.output import GREEN, RED, YELLOW, has_colour, painted, print_answer, progress, say
from broker.cli.parsing import JSON, Commands, add_command, option
from broker.cli.process import run, with_parts
from broker.cli.records import settings_for_data
from broker.cli.serving import listening
from broker.dialects import DIALECTS, left_out, load_settings
from broker.errors import InvalidSetting, Unavailable
from broker.settings import PREFIX, Settings, SettingsFault, with_secrets

if TYPE_CHECKING:
    from broker.app import Parts

MIN_POSTGRES = 15


def add_commands(commands: Commands) -> None:
    """Add `doctor` and `config`."""
    command = add_command(
        commands,
        "doctor",
        "check settings, stores, clocks and origins",
        ("doctor", "doctor --json"),
        (JSON, option("--management-port", "the one that `serve` is given", type=int)),
    )
    command.set_defaults(run=run_doctor)
    command = add_command(
        commands,
        "config",
        "print the effective settings without secrets",
        ("config", "config --json"),
        (JSON,),
    )
    command.set_defaults(run=run_config)


def run_config(options: argparse.Namespace) -> int:
    """Print every setting that `serve` would have. Of a store's URL only scheme, hosts and path are
    shown.

    Raises:
        SettingsFault: a setting can't be used.
    """
    settings = load_settings(os.environ, needed=())
    values = {f.name: getattr(settings, f.name) for f in fields(Settings) if f.metadata}
    secrets = {f.name for f in fields(Settings) if f.metadata and not f.repr}
    values |= {s.name: settings[s] for dialect in DIALECTS for s in dialect.settings}
    given = with_secrets(os.environ)
    rows = []
    for name, value in values.items():
        variable = PREFIX + name.upper()
        shown = _without_secret(value) if name in secrets else value
        rows.append({"variable": variable, "value": shown, "set": bool(given.get(variable))})
    print_answer(rows, as_json=options.json, empty="")
    for name in settings.unknown:
        say(f"{name} is not a setting; it has no effect.")
    return 0


def _without_secret(value: str | tuple[str, ...]) -> str:
    """A store's URL without user, password and options. Of a secret key only whether there is
    one.
    """
    if isinstance(value, tuple) or not value:
        return "(hidden)" if value else ""
    parts = urlsplit(value)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def run_doctor(options: argparse.Namespace) -> int:
    """Exit status 0: all is well. 1: a check failed."""
    try:
        settings = settings_for_data("database_url", "redis_url", given=listening({}, options))
        with progress("broker doctor"):
            findings = [
                readable(settings),
                *run(with_parts(settings, _look)),
            ]
    except SettingsFault as fault:
        findings = [
            Finding("settings", False, sentence, "Set it right and run again.")
            for sentence in fault.faults
        ]
    if options.json:
        print(json.dumps([asdict(f) for f in findings], indent=2))  # noqa: T201 - the command's answer
    else:
        for finding in findings:
            mark, code = ("ok  ", GREEN) if finding.ok else ("FAIL", RED)
            if finding.ok and finding.todo:
                mark, code = "warn", YELLOW
            mark = painted(mark, code, colour=has_colour(sys.stdout))
            print(f"{mark} {finding.check}: {finding.found} {finding.todo}".rstrip())  # noqa: T201
    return 0 if all(f.ok for f in findings) else 1


async def _look(parts: Parts) -> list[Finding]:
    return [
        ports(parts.settings),
        metrics(parts.settings),
        traces(parts.settings),
        *await _postgres(parts),
        *await _redis(parts),
        *await _signing(parts),
        *await _origins(parts),
    ]


def readable(settings: Settings) -> Finding:
    """All settings are readable; unknown variables are named."""
    ignored = ", ".join(settings.unknown)
    return Finding(
        "settings", True, f"all readable; ignored: {ignored}" if ignored else "all readable"
    )


def ports(settings: Settings) -> Finding:
    """The routes of each port, by the settings. `serve` may have a `--management-port` that this
    command lacks.
    """
    page, management = settings.port, settings.management_port
    if management:
        return Finding(
            "ports", True, f"port {management} serves keyed routes, port {page} serves pages"
        )
    return Finding(
        "ports",
        True,
        f"no BROKER_MANAGEMENT_PORT: port {page} serves pages and keyed routes,"
        " unless `serve --management-port` parts them",
    )


def metrics(settings: Settings) -> Finding:
    """The port that serves `/metrics`."""
    says = {
        "management": f"served on port {settings.management_port}",
        "public": f"served on port {settings.port}, to all who reach it",
        "nowhere": "served nowhere, unless `serve --management-port` names a port; set"
        " BROKER_MANAGEMENT_PORT, or BROKER_METRICS=public where only operators reach the port",
    }
    return Finding("metrics", True, says[settings.metrics_at])


def traces(settings: Settings) -> Finding:
    """Check that what makes traces is installed, where the settings ask for traces."""
    if settings.traces == "otlp":
        try:
            import broker.telemetry.tracing  # noqa: F401 - whether it can be imported
        except ImportError:
            return Finding(
                "traces",
                False,
                "BROKER_TRACES is otlp, and OpenTelemetry is not installed: `serve` won't start.",
                "Install passkey-broker[otel], or unset BROKER_TRACES.",
            )
    return Finding("traces", True, settings.traces)


async def _postgres(parts: Parts) -> list[Finding]:
    try:
        facts = await parts.postgres.facts()
    except Unavailable as fault:
        found = f"can't be used ({cause_of(fault)})."
        todo = "Check BROKER_DATABASE_URL, or start `broker dev`."
        return [Finding("postgres", False, found, todo)]
    findings = [
        postgres_version(facts["version"]),
        clock("postgres", facts["clock"] - time.time()),
        *postgres_findings(facts, parts.settings.database_connections),
    ]
    try:
        await parts.postgres.check()
        findings.append(Finding("migrations", True, "complete"))
        recorded = await parts.durable.ledger.recorded()
        standbys = facts["synchronous_standbys"]
        findings.append(one_time(parts.settings.one_time, recorded.mode, standbys))
        findings.append(event_months(**await parts.durable.events.months()))
    except Unavailable as fault:
        found, todo = "some are missing.", "Run `broker migrate`."
        if fault.reason == "postgres_denied":
            found, todo = "can't be seen.", "Give the role the rights of deploy/grants.sql."
        findings.append(Finding("migrations", False, found, todo))
    return findings


async def _redis(parts: Parts) -> list[Finding]:
    try:
        facts = await parts.ephemeral.facts()
    except Unavailable as fault:
        found = f"can't be used ({cause_of(fault)})."
        return [Finding("redis", False, found, "Check BROKER_REDIS_URL, or start `broker dev`.")]
    return redis_findings(facts, parts.settings.one_time)


def one_time(mode: str, recorded: str, standbys: str) -> Finding:
    """Check that the mode of one-time values is the recorded one. `standbys` is Postgres'
    `synchronous_standby_names`, on which the ledger rests in a failover.
    """
    if mode != recorded:
        return Finding(
            "one-time",
            False,
            f"BROKER_ONE_TIME is {mode}, and Postgres records {recorded}.",
            f"Set it to {recorded}, or run `broker one-time --set {mode}`.",
        )
    if mode == "term":
        return Finding("one-time", True, mode)
    if standbys:
        return Finding("one-time", True, f"{mode}; synchronous_standby_names is {standbys}")
    return Finding(
        "one-time",
        True,
        f"{mode}; synchronous_standby_names is empty: a failover of Postgres may lose entries.",
        "Set synchronous_standby_names, if Postgres has a standby.",
    )


def event_months(*, covered: bool, astray: bool) -> Finding:
    """Check the monthly partitions of events. `covered`: this month and the next have theirs.
    `astray`: some events belong to no month.
    """
    check = "event months"
    if not covered:
        return Finding(
            check,
            True,
            "this month or the next has no partition; its events go to events_default.",
            "Let an instance of this release run, and look for its log line `housekeeping_failed`.",
        )
    if astray:
        return Finding(
            check,
            True,
            "events_default has events: their time was in no month.",
            "Check the clocks of all instances. Retention deletes those events like others.",
        )
    return Finding(check, True, "this and the next are there")


def postgres_version(major: int) -> Finding:
    """Check that Postgres is new enough."""
    if major >= MIN_POSTGRES:
        return Finding("postgres", True, f"version {major}")
    return Finding("postgres", False, f"version {major}.", f"Use Postgres {MIN_POSTGRES} or newer.")


async def _signing(parts: Parts) -> list[Finding]:

    try:
        seals = await parts.signing.list_seals()
    except Unavailable:
        return []  # the check of Postgres reports the fault
    return [secret_key(parts.settings, left_out(parts.settings), [number for _, number in seals])]


def secret_key(settings: Settings, left: Sequence[str], seals: Sequence[int | None]) -> Finding:
    """Check that tokens can be signed. `seals` has the number of the secret that opens each key
    that signs or will sign; None: no secret does.
    """
    check, many = "secret key", len(seals)
    if lost := seals.count(None):
        return Finding(
            check,
            False,
            f"{lost} of {many} signing keys were sealed under another BROKER_SECRET_KEY.",
            "Name it after a comma in BROKER_SECRET_KEY, or make new keys: "
            "`broker signing-key rotate --now` for each --app and --algorithm.",
        )
    if not settings.secret_key:
        without = (
            f"; without one {' and '.join(left)} don't answer"
            if left
            else ", and nothing that needs one"
        )
        return Finding(check, True, f"none{without}")
    if older := many - seals.count(0):
        says = (
            f"{older} of {many} signing keys are sealed under an older one; "
            "`broker signing-key reseal` changes that"
        )
        return Finding(check, True, says)
    return Finding(
        check, True, f"opens all {many} signing keys" if many else "set; no signing keys yet"
    )


async def _origins(parts: Parts) -> list[Finding]:
    try:
        apps = await parts.directory.apps()
    except Unavailable:
        return []
    if not apps:
        return [Finding("apps", True, "none yet; `broker app create` makes one")]
    findings = []
    for app in apps:
        try:
            app.checked()
            findings.append(
                Finding("app", True, f"{app.id} {app.rp_id}: {', '.join(app.accepted_origins)}")
            )
        except InvalidSetting as fault:
            findings.append(
                Finding(
                    "app", False, f"{app.id}: {fault.sentence}", "Mend it with `broker app update`."
                )
            )
    return findings

"""`broker events`: the audit log of an app: shown, followed or exported.

**Following.** `--follow` goes on from a cursor. No event is ever committed behind a cursor
(`broker.durable.events`), so none is skipped, however transactions overlap. Ctrl-C ends it with
status 130. With `--json` each event is one object on one line.

**Exporting.** `export` prints every event, oldest first, with the user's external id: one JSON
object on one line (NDJSON). `--after` goes on behind the last one of an earlier export.

**Filters.** `--action` and `--user` (a whole external id) filter each page here, so they mean the
same with and without `--follow`. Events of a deleted user have no external id.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime

from broker.cli.output import as_json_text, has_colour, table
from broker.cli.parsing import Commands, app_option, option, whole
from broker.cli.records import Records, add, chosen_app
from broker.errors import InvalidSetting, UnknownApp
from broker.model import ID, AuditRow, as_dict

PAGE = 1000  # events read at once
PAUSE = 0.5  # seconds between two looks for new events
COLUMNS = ("id", "at", "action", "result", "reason", "actor", "user_id", "passkey_id")


def add_commands(commands: Commands) -> None:
    """Add `events`."""
    add(
        commands,
        "events",
        "what happened in an app",
        list_events,
        columns=COLUMNS,
        progress=False,
        options=(
            app_option("; '' for the broker's own events"),
            option(
                "--limit",
                "at most N, the newest (default 100)",
                type=whole(1, 10_000),
                default=100,
                metavar="N",
            ),
            option(
                "--after",
                "the first N after this event, none skipped; 0 for all",
                type=whole(0, 2**63 - 1),
                metavar="ID",
            ),
            option(
                "export",
                "print all of them, oldest first, as one JSON object a line",
                nargs="?",
                choices=("export",),
            ),
            option(
                "--since",
                "only those from this time on, like 2026-11-30 or 2026-11-30T12:00:00Z (UTC)",
                type=_time,
                metavar="TIME",
            ),
            option("--action", "only these, like passkey.used", metavar="ACTION"),
            option("--user", "only those of this user", metavar="EXTERNAL_ID"),
            option(
                "--follow",
                "go on printing new events until Ctrl-C (status 130)",
                action="store_true",
            ),
        ),
        examples=(
            "events --app Shop",
            "events --action passkey.used --limit 20",
            "events --follow --json --user user-7",
            "events export --since 2026-11-01",
        ),
    )


async def list_events(
    records: Records, options: argparse.Namespace
) -> list[dict[str, object]] | None:
    """The newest events, or the first ones after `--after`; oldest first. Also of a deleted app.
    None: they were exported.
    """
    if options.user is not None and "\0" in options.user:
        raise InvalidSetting("An external id has no NUL character.")
    app_id = await _app_id(records, options.app)
    if options.follow:
        start = (
            options.after if options.after is not None else await _start(records, app_id, options)
        )
        await _follow(records, app_id, start, options)
    if options.export:
        await _export(records, app_id, options)
        options.json = False  # the answer is printed
        return None
    if options.after is None:
        found = await _newest(records, app_id, options)
    else:
        found = await _first(records, app_id, options)
    return [as_dict(row.event) for row in found]


async def _newest(records: Records, app_id: str, options: argparse.Namespace) -> list[AuditRow]:
    """The newest events that pass the filters, oldest first."""
    kinds = [(options.action, result) for result in ("done", "refused")] if options.action else None
    found: list[AuditRow] = []
    offset = 0
    while len(found) < options.limit:
        rows = await records.durable.events.page(
            app_id,
            limit=min(PAGE, options.limit) if options.user is None else PAGE,
            offset=offset,
            start=None,
            end=None,
            kinds=kinds,
            user=options.user,
        )
        if not rows[0]:
            break
        offset += len(rows[0])
        found += _wanted(rows[0], options)
    return found[: options.limit][::-1]


async def _first(records: Records, app_id: str, options: argparse.Namespace) -> list[AuditRow]:
    """The first events after `--after` that pass the filters, oldest first."""
    found: list[AuditRow] = []
    async for rows in _pages(records, app_id, options.after):
        if not rows:
            break
        found += _wanted(rows, options)
        if len(found) >= options.limit:
            break
    return found[: options.limit]


async def _pages(records: Records, app_id: str, cursor: int) -> AsyncIterator[list[AuditRow]]:
    """The events after a cursor, page by page, without end. A page is empty if there are none
    yet.
    """
    while True:
        rows, cursor = await records.directory.events_after(app_id, cursor, limit=PAGE)
        yield rows


def _wanted(rows: Sequence[AuditRow], options: argparse.Namespace) -> list[AuditRow]:
    return [
        row
        for row in rows
        if options.action in (None, row.event.action)
        and options.user in (None, row.external_id)
        and (options.since is None or row.event.at >= options.since)
    ]


async def _export(records: Records, app_id: str, options: argparse.Namespace) -> None:
    """Print all events that are there now."""
    cursor = options.after or 0
    if options.since is not None:
        cursor = max(cursor, await records.durable.events.cursor_before(app_id, options.since))
    async for rows in _pages(records, app_id, cursor):
        if not rows:
            return
        for row in _wanted(rows, options):
            line = as_json_text({**as_dict(row.event), "external_id": row.external_id})
            print(line)  # noqa: T201 - the command's answer


def _time(text: str) -> datetime:
    """A time in ISO 8601; without a zone it is in UTC."""
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError("a time like 2026-11-30T12:00:00Z is needed") from None
    return time if time.tzinfo else time.replace(tzinfo=UTC)


async def _start(records: Records, app_id: str, options: argparse.Namespace) -> int:
    """The cursor before the newest events.

    Every later event has a higher id: the transactions that had drawn a lower one have ended.
    """
    newest = await records.directory.events(app_id, limit=1)
    if not newest:
        return 0
    settled = newest[0].id
    async for rows in _pages(records, app_id, settled - 1):
        if rows:
            break
        await asyncio.sleep(PAUSE)
    shown = await _newest(records, app_id, options)
    return min(settled, shown[0].event.id - 1) if shown else settled


async def _follow(records: Records, app_id: str, cursor: int, options: argparse.Namespace) -> None:
    """Print new events until the process ends."""
    widths: list[int] = []
    async for rows in _pages(records, app_id, cursor):
        found = [as_dict(row.event) for row in _wanted(rows, options)]
        if options.json:
            lines = [as_json_text(event) for event in found]
        else:
            lines = (
                table(found, COLUMNS, colour=has_colour(sys.stdout), widths=widths) if found else []
            )
        if lines:
            print("\n".join(lines), flush=True)  # noqa: T201 - the command's answer
        if not rows:
            await asyncio.sleep(PAUSE)


async def _app_id(records: Records, given: str | None) -> str:
    """The id of the app: also "", and the id of a deleted app, which has no name any more."""
    if given == "":
        return ""
    try:
        return (await chosen_app(records, given)).id
    except UnknownApp:
        wanted = given or records.app
        if not ID.match(wanted) or not await records.directory.events(wanted, limit=1):
            raise
        return wanted

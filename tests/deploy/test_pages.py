"""The pages for operators: entries of the runbook; commands, queries and names on a page."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from broker.cli import parser
from broker.cli.parsing import Usage
from broker.embedded import EmbeddedStores
from broker.settings import PREFIX
from tests.deploy.test_monitoring import RULES, labels_of_metrics
from tests.project.test_docs import MONITORING, PAGES, SOURCES, log_events, setting_names
from tests.support.load_balancers import DEPLOY, variables
from tests.support.pages import blocks, without_blocks
from tests.support.parts import program
from tests.support.servers import session_of

RUNBOOK, PROXIES = "deploy/RUNBOOK.md", "deploy/PROXIES.md"
WORDS = ("Means", "Look at", "Do")
OPERATORS = [page for page in PAGES if page.startswith("deploy/")]


def section(page: str, heading: str) -> str:
    """The text below a heading, up to the next heading of its level."""
    level = heading.partition(" ")[0]
    return PAGES[page].partition(f"\n{heading}\n")[2].partition(f"\n{level} ")[0]


def first_cells(text: str) -> set[str]:
    """The code spans in the first cells of a table's rows, without its head."""
    rows = [line.split(" | ")[0] for line in text.splitlines() if line.startswith("| `")]
    return {name for row in rows[1:] for name in re.findall(r"`(\w+)`", row)}


def spans(page: str) -> list[str]:
    """The code spans of a page."""
    return re.findall(r"`([^`\n]+)`", without_blocks(PAGES[page]))


def test_the_runbook_has_an_entry_for_each_alert() -> None:
    """And none for an alert that is gone."""
    entries = section(RUNBOOK, "## Alerts")
    assert re.findall(r"^### (\w+)$", entries, re.M) == [rule["alert"] for rule in RULES]
    for rule in RULES:
        entry = section(RUNBOOK, f"### {rule['alert']}")
        told = [re.search(rf"^\*\*{word}:\*\* \S", entry, re.M) for word in WORDS]
        assert all(told), rule["alert"]
        critical = rule["labels"]["severity"] == "critical"
        assert ("**Means:** Critical." in entry) == critical, rule["alert"]


@pytest.mark.parametrize("page", [RUNBOOK, MONITORING])
def test_a_page_has_a_row_for_each_log_line(page: str) -> None:
    """`request` stands in the text of MONITORING.md."""
    heading = {RUNBOOK: "## Log lines", MONITORING: "## Logs"}[page]
    assert first_cells(section(page, heading)) | {"request"} == set(log_events())


@pytest.mark.parametrize("page", OPERATORS)
def test_a_command_in_a_sentence_is_one(page: str) -> None:
    """Words in capitals stand for values. A sentence may leave out options that are required."""
    known = parser()
    for span in spans(page):
        if span.startswith("broker ") and "…" not in span:
            given = span.replace("ALGORITHM", "ES256").replace("--since TIME", "--since 2026-11-01")
            words = shlex.split(given)[1:]
            try:
                known.parse_args(words)
            except Usage as fault:
                if "arguments are required" not in str(fault):
                    pytest.fail(f"{span}: {fault}")


@pytest.mark.parametrize("page", OPERATORS)
def test_metrics_and_settings_in_a_sentence_exist(page: str) -> None:
    metrics = set(labels_of_metrics())
    settings = {PREFIX + name.upper() for name in setting_names()}
    for span in spans(page):
        for name in re.findall(r"\bbroker_[a-z_]+[a-z]\b", span):
            told = {name, f"{name}_total", f"{name}_bucket"}
            assert told & metrics or name in {"broker_owner", "broker_service"}, name
        for name in re.findall(r"\bBROKER_[A-Z_]+", span):
            assert name.removesuffix("_FILE") in settings, name


@pytest.mark.parametrize("page", OPERATORS)
def test_a_service_of_compose_in_a_sentence_exists(page: str) -> None:
    """In `docker compose run` and `up`, behind the options."""
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    for span in spans(page):
        if found := re.fullmatch(r"docker compose (?:run|up)(?: --\w[\w-]*)*(?: (\S+).*)?", span):
            assert found[1] is None or found[1] in services, span


def test_promtool_reads_the_queries(tmp_path: Path) -> None:
    queries = [each for page in OPERATORS for each in spans(page) if re.match(r"sum |rate\(", each)]
    assert queries
    rules = [{"record": f"x:{n}", "expr": query} for n, query in enumerate(queries)]
    written = tmp_path / "queries.yaml"
    written.write_text(yaml.safe_dump({"groups": [{"name": "pages", "rules": rules}]}))
    argv = [program("promtool"), "check", "rules", "--lint=none", str(written)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_haproxy_accepts_what_the_page_on_proxies_shows(tmp_path: Path) -> None:
    """The lines for a CDN in their place, and the listener with the PROXY protocol."""
    behind_a_network, listener = blocks(PROXIES, "haproxy")
    networks = tmp_path / "network.lst"
    networks.write_text("192.0.2.0/24\n")
    whole = (DEPLOY / "haproxy.cfg").read_text()
    replaced = "    http-request set-header X-Forwarded-For %[src]\n"
    shown = behind_a_network.replace("/etc/haproxy/network.lst", str(networks))
    assert whole.count(replaced) == 2
    changed = tmp_path / "haproxy.cfg"
    changed.write_text(whole.replace(replaced, shown, 1))
    alone = tmp_path / "listener.cfg"
    times = "".join(f" timeout {side} 9s\n" for side in ("connect", "client", "server"))
    alone.write_text(f"defaults\n{times}{listener}")
    (check,) = blocks(PROXIES, "sh")
    given = os.environ | variables(tmp_path, pages=[1, 2, 3], management=[4, 5, 6])
    for path in (DEPLOY / "haproxy.cfg", changed, alone):
        argv = shlex.split(check.replace("haproxy.cfg", str(path)))
        done = subprocess.run(argv, env=given, capture_output=True, text=True, check=False)
        said = done.stdout + done.stderr
        judged = re.findall(r"(?i)warn|alert|emerg", said)
        assert (done.returncode, judged) == (0, []), said


def fields_of_log_lines() -> dict[str, set[str]]:
    """The fields of each log line, by its event. A call that unpacks a mapping may have any key of
    its module, and those of `fault`.
    """
    found: dict[str, set[str]] = {}
    for text in SOURCES.values():
        unpacked = {"error", "trace", *re.findall(r'"(\w+)"', text)}
        for call in ast.walk(ast.parse(text)):
            match call:
                case ast.Call(args=[ast.Constant(str(event)), *_], keywords=keywords):
                    fields = found.setdefault(event, set())
                    for keyword in keywords:
                        fields |= unpacked if keyword.arg is None else {keyword.arg}
    return found


def test_fields_of_a_log_line_exist() -> None:
    """Those that the runbook says to look at."""
    known = fields_of_log_lines()
    _, *rows = re.findall(r"^\| (`\w.*)$", section(RUNBOOK, "## Log lines"), re.M)
    for row in rows:
        events, _, look_at, *_ = row.split(" | ")
        named = set(re.findall(r"`([a-z_]+)`", look_at)) - set(log_events())
        fields = {field for event in re.findall(r"`(\w+)`", events) for field in known[event]}
        assert named <= fields, events


async def test_the_runbook_s_query_finds_a_long_transaction(stores: EmbeddedStores) -> None:
    (query,) = blocks(RUNBOOK, "sql")
    async with session_of(stores) as blocking, session_of(stores) as operator:
        pid = await blocking.fetchval("SELECT pg_backend_pid()")
        async with blocking.transaction():
            await blocking.execute("LOCK TABLE events")
            found = await operator.fetch(query.replace("10 seconds", "0 seconds"))
            assert (pid, "LOCK TABLE events") in [(row["pid"], row["query"]) for row in found]

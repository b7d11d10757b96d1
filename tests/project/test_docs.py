"""The documentation names everything that a reader can meet, its links lead somewhere, and its
pages are short enough to read.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path

import pytest
from prometheus_client import Metric

from broker import dialects
from broker.cli import parser
from broker.dialects import policy_keys
from broker.errors import Refusal
from broker.model import Policy
from broker.settings import PREFIX, Settings
from broker.telemetry import Metrics
from tests.support import pages
from tests.support.pages import ROOT

PAGES = pages.pages()
TROUBLESHOOTING, OPERATE = "broker/TROUBLESHOOTING.md", "deploy/README.md"
MONITORING, SECURITY = "deploy/MONITORING.md", "deploy/SECURITY.md"
SOURCES = {path: path.read_text() for path in (ROOT / "broker").rglob("*.py")}
MOST_LINES, MOST_WORDS = 400, 4000
README_LINES, README_WORDS = 150, 1500


def _kinds(kind: type[Refusal]) -> Iterator[type[Refusal]]:
    yield kind
    for below in kind.__subclasses__():
        yield from _kinds(below)


def refusal_codes() -> list[str]:
    return sorted({kind.code for kind in _kinds(Refusal) if "code" in vars(kind)})


def metric_names() -> list[str]:
    """As a scrape shows them: counters end in `_total`."""
    found: list[Metric] = list(Metrics().registry.collect())
    return [m.name + ("_total" if m.type == "counter" else "") for m in found]


def log_events() -> list[str]:
    """What the code logs by name. The demo's logger and the lines of requests have none."""
    call = re.compile(r"\b(?:log|_log|parts\.log)\(\s*\"([a-z_]+)\"[,)]")
    return sorted({name for text in SOURCES.values() for name in call.findall(text)})


def audit_actions() -> list[str]:
    """Actions of events: words with a dot that durable statements and the core write."""
    word = re.compile(
        r"['\"]((?:app|key|user|passkey|second_factor|approval|mail_code|signing_key|origin)\.[a-z]+ed)['\"]"
    )
    code = (
        text
        for path, text in SOURCES.items()
        if {"durable", "broker", "model"} & set(path.parts[:-1])
    )
    return sorted({name for text in code for name in word.findall(text)})


def commands() -> list[str]:
    """Every command of the command line, like `app create`."""
    return sorted(_leaves(parser()))


def _leaves(command: argparse.ArgumentParser, before: str = "") -> Iterator[str]:
    groups = [a for a in command._actions if isinstance(a, argparse._SubParsersAction)]
    if not groups:
        yield before.strip()
    for group in groups:
        for name, below in group.choices.items():
            yield from _leaves(below, f"{before} {name}")


def setting_names() -> list[str]:
    """The core's, and those that dialects declare."""
    core = [f.name for f in fields(Settings) if f.metadata]
    declared = [setting.name for dialect in dialects.DIALECTS for setting in dialect.settings]
    return core + declared


NAMED: dict[str, tuple[str, Callable[[], list[str]]]] = {
    "setting": (OPERATE, lambda: [PREFIX + name.upper() for name in setting_names()]),
    "policy key": (OPERATE, lambda: [key.name for key in policy_keys()]),
    "metric": (MONITORING, metric_names),
    "log event": (MONITORING, log_events),
    "event": (MONITORING, audit_actions),
}


def missing(kind: str) -> list[str]:
    """The names that their page lacks."""
    page, names = NAMED[kind]
    return [name for name in names() if f"`{name}`" not in PAGES[page]]


@pytest.mark.parametrize("kind", NAMED)
def test_a_page_names_every(kind: str) -> None:
    assert len(NAMED[kind][1]()) > 5
    assert missing(kind) == []


@pytest.mark.parametrize("page", PAGES)
def test_tests_that_a_page_names_are_there(page: str) -> None:
    """As `tests/web/test_guards.py::test_one_port_for_everything`, or the file alone."""
    for named in re.findall(r"`(tests/[\w/]+\.py[^`]*)`", PAGES[page]):
        path, _, function = named.partition("::")
        if not function:
            assert (ROOT / path).exists(), named
            continue
        definition = rf"^(?:async )?def {function}\("
        assert re.search(definition, (ROOT / path).read_text(), re.M), named


@pytest.mark.parametrize("page", PAGES)
def test_policies_that_a_page_sets_are_accepted(page: str) -> None:
    """As `--set keyed_rate=1000/s:2000`; `key=value` is none."""
    for key, value in re.findall(r"--set\s+(?!key=value)([a-z_]+)=([a-z0-9/:]+)", PAGES[page]):
        Policy().set(key, value)


def test_every_row_of_the_threat_model_names_its_test() -> None:
    table = PAGES[SECURITY].partition("\n## Threat model\n")[2].partition("\n## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ")][2:]
    assert len(rows) > 20
    assert [row for row in rows if "::test_" not in row and "| not defended" not in row] == []


def test_every_command_is_told_of() -> None:
    """As `broker app create`, or in a list as `broker app create`, `list`."""
    rows = [
        re.findall(r"`(?:broker )?([a-z -]+)`", line.split(" | ")[0])
        for line in PAGES[OPERATE].splitlines()
    ]
    told = set()
    for first, *more in filter(None, rows):
        group = first.partition(" ")[0]
        told |= {first, *more, *(f"{group} {name}" for name in more)}
    assert len(commands()) > 15
    assert [command for command in commands() if command not in told] == []


def test_every_refusal_has_its_heading() -> None:
    """With what the person sees and what to do; and no heading outlives its code."""
    page = PAGES[TROUBLESHOOTING]
    headings = set(re.findall(r"^## ([a-z_]+)$", page, re.M))
    assert headings == set(refusal_codes())
    for code in refusal_codes():
        section = page.partition(f"\n## {code}\n")[2].partition("\n## ")[0]
        assert re.search(r"^Status \d{3}\. \*\*The person sees:\*\* \w", section, re.M), code
        assert re.search(r"^\*\*Do:\*\* \w", section, re.M), code


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", pages.without_blocks(PAGES[page]))
    dead = []
    for link in links:
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (ROOT / page).parent / name if name else ROOT / page
        if not target.exists() or (anchor and anchor not in pages.anchors(target.read_text())):
            dead.append(link)
    assert dead == []


@pytest.mark.parametrize("page", PAGES)
def test_pages_are_of_a_size_to_read(page: str) -> None:
    lines, words = PAGES[page].count("\n"), len(PAGES[page].split())
    most = (README_LINES, README_WORDS) if page == "README.md" else (MOST_LINES, MOST_WORDS)
    assert (lines <= most[0], words <= most[1]) == (True, True), f"{lines} lines, {words} words"


def test_every_page_is_found_from_the_first() -> None:
    """Within two links."""
    near = {"README.md"}
    for _ in range(2):
        near |= {
            str((ROOT / page).parent.joinpath(link.partition("#")[0]).resolve().relative_to(ROOT))
            for page in near
            for link in re.findall(
                r"\]\(([^)\s:#]+(?:#[^)\s]*)?)\)", pages.without_blocks(PAGES[page])
            )
            if link.partition("#")[0].endswith(".md")
        }
    assert PAGES.keys() - near == set()


# What people ask, and where the answer stands: a page that README links, and a word that the answer
# can't do without.
QUESTIONS = {
    "how long a nonce lives": ("broker/dialects/flex/README.md", "60 seconds"),
    "a 409": (TROUBLESHOOTING, "## user_has_no_passkeys"),
    "which port faces the internet": (OPERATE, "## Which port faces the internet"),
    "a leaked key": (OPERATE, "**A key has leaked.**"),
    "can't be reached, on my page": (TROUBLESHOOTING, "**The page SDK says `network`.**"),
    "lost passkeys": (TROUBLESHOOTING, "**People lost their passkeys.**"),
    "back up and restore": (OPERATE, "## Back up and restore"),
    "behind Cloudflare": ("deploy/PROXIES.md", "## Cloudflare"),
    "many people behind one NAT": ("deploy/LIMITS.md", "## Client address"),
    "upgrade and roll back": (OPERATE, "## Upgrade and roll back"),
    "CSP for my page": ("broker/sdk/README.md", "Content-Security-Policy"),
}


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_question_is_answered_in_two_clicks(question: str) -> None:
    page, answer = QUESTIONS[question]
    assert f"]({page}" in PAGES["README.md"]
    assert answer in PAGES[page]


def test_every_promise_names_tests() -> None:
    page = PAGES["broker/PROMISES.md"]
    promises = re.findall(r"^\| (\d+) \| \*\*.+\*\*.* \| (`tests/.+`) \|$", page, re.M)
    assert [int(number) for number, _ in promises] == list(range(1, 19))


def test_the_layout_shows_where_things_are() -> None:
    """It has every part of the code under its present name, and no other."""
    package = ROOT / "broker"
    block = PAGES["broker/README.md"].partition("## Layout\n\n```\n")[2].partition("\n```")[0]
    named = [name for line in block.splitlines() for name in line.partition("  ")[0].split(", ")]
    shown = {name.removeprefix("broker/") for name in named[:-1]}
    parts = {f"{path.name}/" if path.is_dir() else path.name for path in package.iterdir()}
    assert shown == {
        part for part in parts if not part.startswith("__") and not part.endswith(".md")
    }


def test_no_page_names_a_machine() -> None:
    for page, text in PAGES.items():
        assert not re.search(r"(?<![\w.])/(?:work|root|home)/", text), page
        assert Path(page).name in {
            "README.md",
            "TROUBLESHOOTING.md",
            "CHANGES.md",
            "DECISIONS.md",
            "MONITORING.md",
            "LIMITS.md",
            "SECRETS.md",
            "PROMISES.md",
            "HARDENING.md",
            "PRIVACY.md",
            "SECURITY.md",
            "SCALING.md",
            "RUNBOOK.md",
            "TOPOLOGIES.md",
            "UPGRADE.md",
            "PROXIES.md",
        }

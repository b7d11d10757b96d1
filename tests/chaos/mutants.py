"""Mutants: each safeguard is removed from a copy of the tree, and a run on the copy must fail.

A mutant that passes shows that the harness can't see what the safeguard prevents. The product has
no setting for any of this: `copied` edits the text of a copy. `test_checker` proves quickly that
every edit still applies to the present tree.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.chaos import faults
from tests.chaos.deployment import Kind
from tests.chaos.faults import Fault
from tests.support.parts import ROOT

_COPIED = ("broker", "sql")


@dataclass(frozen=True, slots=True)
class Edit:
    """A replacement in one file, whose old text occurs there once."""

    path: str
    old: str
    new: str

    def apply(self, tree: Path) -> None:
        text = (tree / self.path).read_text()
        assert text.count(self.old) == 1, f"{self.path} has not once: {self.old}"
        (tree / self.path).write_text(text.replace(self.old, self.new))


@dataclass(frozen=True, slots=True)
class Mutant:
    """A safeguard, the edits that remove it, and the rule that the run then breaks."""

    safeguard: str
    edits: tuple[Edit, ...]
    fault: Fault
    rule: str
    kind: Kind = "sentinel"


_ONE_TIME = "broker/ephemeral/one_time.py"
_SCRIPTS = "broker/ephemeral/one_time_scripts.py"

MUTANTS = {
    "term": Mutant(
        "the term of a value is compared",
        (Edit(_SCRIPTS, "elseif state == 'l' and stamp ~= term() then", "elseif false then"),),
        faults.split_brain,
        "bought once",
    ),
    "atomic-take": Mutant(
        "a take reads and deletes in one script",
        (
            Edit(
                _SCRIPTS,
                "    redis.call('DEL', key)\n    if ARGV[6] ~= '' then",
                "    if false then",
            ),
            Edit(
                _ONE_TIME,
                "_run(operation, scripts.TAKE, keys, type_, expected, tombstone, first=first)\n",
                "_take_in_two(first, operation, scripts.TAKE, keys, type_, expected, tombstone)\n\n"
                "    async def _take_in_two(self, first, *take):\n"
                "        found = await self._run(*take, first=first)\n"
                '        await self._transport.ask(take[0], "DEL", take[2][0])\n'
                "        return found\n",
            ),
        ),
        faults.calm,
        "bought once",
    ),
    "challenge-first": Mutant(
        "a ceremony is taken before any cryptography",
        (
            Edit(
                _SCRIPTS,
                "redis.call('SET', KEYS[1], '', 'KEEPTTL')\nredis.call('DEL', KEYS[1])\n",
                "",
            ),
        ),
        faults.mistakes,
        "refused once",
    ),
    "transaction-first": Mutant(
        "a transaction is taken before the durable write",
        (
            Edit(
                "broker/broker/registration.py",
                "            await self._take_transaction(pending.transaction)\n",
                "",
            ),
            Edit(
                "broker/broker/registration.py",
                '        if outcome != "added":\n',
                "        await self._take_transaction(pending.transaction)\n"
                '        if outcome != "added":\n',
            ),
        ),
        faults.postgres_slow,
        "refused writes nothing",
    ),
    "opener": Mutant(
        "the opener is part of the name of a ceremony",
        (
            Edit(
                "broker/tokens/__init__.py",
                'f"{opener}:{kind}:{token}"',
                'f"{kind}:{token}"',
            ),
        ),
        faults.mistakes,
        "own door",
    ),
    "epoch": Mutant(
        "the epoch of a user ends what began before",
        (
            Edit(
                "broker/durable/ceremonies.py",
                "u.epoch = a.epoch AS current",
                "true AS current",
            ),
        ),
        faults.calm,
        "revoked is final",
    ),
    "replies": Mutant(
        "a connection with an overdue reply ends, so each reply reaches its own caller",
        (
            Edit(
                "broker/ephemeral/connection.py",
                "            self.end(TimeoutError())\n",
                "            self.due.popleft()\n",
            ),
        ),
        faults.redis_stalls,
        "no faults",
    ),
}


@contextlib.contextmanager
def copied(mutant: Mutant) -> Iterator[Path]:
    """A copy of the tree without the safeguard."""
    tree = Path(tempfile.mkdtemp(prefix="broker-mutant-"))
    try:
        for name in _COPIED:
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, tree / name, ignore=ignored)
        for edit in mutant.edits:
            edit.apply(tree)
        yield tree
    finally:
        shutil.rmtree(tree)

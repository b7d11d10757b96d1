"""One-time values have one home: no code but `broker.ephemeral.one_time` and its scripts has a
Redis command that writes or deletes.

The syntax of the whole package is read. A command is the first word of a string in capitals: an
argument of `ask`, or `redis.call('…'` in a script.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from tests.support.servers import Valkey

PACKAGE = Path(__file__).parents[2] / "broker"
HOME = ("ephemeral/one_time.py", "ephemeral/one_time_scripts.py")
# What else writes to Redis, and what: probes of `check`, the runner of scripts, a counter, the
# answers of idempotent opens, the buckets of rate limits.
OTHERS = {
    "ephemeral/cluster.py": {"SET", "EVAL", "EVALSHA"},
    "ephemeral/connection.py": {"SET"},
    "ephemeral/rate_limits.py": {"SET"},
    "ephemeral/stores.py": {"INCR", "PEXPIRE", "SET"},
    "ephemeral/transport.py": {"SET", "EVAL", "EVALSHA"},
}
# Words of SQL and HTTP that are names of Redis' commands too, where no Redis is at hand.
ELSEWHERE = {"SET", "DELETE", "COPY", "MOVE", "MERGE", "RESTORE"}
CALL = re.compile(r"redis\.p?call\(\s*['\"](\w+)")


def commands(tree: ast.AST) -> Iterator[str]:
    """The words of a module that may be commands of Redis."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str | bytes):
            text = node.value if isinstance(node.value, str) else node.value.decode("latin-1")
            yield from (word.upper() for word in CALL.findall(text))
            if re.fullmatch(r"[A-Z]+", text):
                yield text


def writing(server: Valkey) -> frozenset[str]:
    """Every command that writes, and those that run scripts."""
    with server.client() as client:
        known = client.command()
    names = {name.upper() for name, facts in known.items() if "write" in facts["flags"]}
    return frozenset(names | {"EVAL", "EVALSHA", "FCALL", "EVAL_RO", "EVALSHA_RO", "FCALL_RO"})


def test_no_other_module_writes_or_deletes_a_one_time_value(tmp_path: Path) -> None:
    server = Valkey.start(tmp_path / "valkey")
    try:
        writes = writing(server)
    finally:
        server.stop()
    found: dict[str, set[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        module = str(path.relative_to(PACKAGE))
        words = writes.intersection(commands(ast.parse(path.read_text())))
        if not module.startswith("ephemeral/"):
            words -= ELSEWHERE
        if words:
            found[module] = set(words)
    home = set().union(*map(found.pop, HOME))
    assert home >= {"SET", "DEL", "ZADD", "ZREM"}, "the test finds commands"
    assert found == OTHERS

"""Generates the client's synchronous half (`passkey_broker/_sync`) from its asynchronous one
(`_async`), word by word.

    python tests/support/sync_client.py

`test_client_source` compares what is committed with what this makes. Words that differ are in
`WORDS`; `PHRASES` are the sentences of docstrings that are true of one half only, each of which
must occur.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "broker" / "sdk" / "passkey_broker"
MARK = "# Generated from _async/{name} by `python tests/support/sync_client.py`: change that one.\n"

WORDS = {
    r"\basync (def|with|for)\b": r"\1",
    r"\bawait ": "",
    r"\bpause_async\b": "pause",
    r"\b__a(enter|exit)__\b": r"__\1__",
    r"\baclose\b": "close",
    r"\baiter_bytes\b": "iter_bytes",
    r"\bAsync(?=[A-Z])": "",
    r"\basync with\b": "with",
}
PHRASES = {
    "__init__.py": {
        "The asynchronous client, source of the synchronous one: "
        "`_sync` is generated from this folder.": (
            "The synchronous client, generated from the asynchronous one in `_async`."
        ),
        "After a change run `python tests/support/sync_client.py`. ": "",
        "An asynchronous client of one app, for asyncio or trio. Keeps connections: "
        "make one and close\n    it, or use it in an `async with`.": (
            "A blocking client of one app, thread-safe. Keeps connections: "
            "make one and close it, or use\n    it in a `with`."
        ),
    }
}


def generated() -> dict[Path, str]:
    """The files of `_sync` by path, formatted as the repository is."""
    found = {}
    for source in sorted((PACKAGE / "_async").glob("*.py")):
        text = source.read_text()
        for phrase, other in PHRASES.get(source.name, {}).items():
            assert phrase in text, f"{source.name} says no more: {phrase}"
            text = text.replace(phrase, other)
        for word, other in WORDS.items():
            text = re.sub(word, other, text)
        target = PACKAGE / "_sync" / source.name
        found[target] = _formatted(MARK.format(name=source.name) + text, target)
    return found


def _formatted(text: str, target: Path) -> str:
    """Shorter words let the formatter join lines, and sort imports otherwise."""
    ruff = str(Path(sys.executable).with_name("ruff"))
    name = ["--stdin-filename", str(target), "-"]
    for command in (["check", "--quiet", "--select", "I", "--fix"], ["format", "--quiet"]):
        done = subprocess.run(
            [ruff, *command, *name], input=text, capture_output=True, text=True, check=True
        )
        text = done.stdout
    return text


if __name__ == "__main__":
    for target, text in generated().items():
        target.parent.mkdir(exist_ok=True)
        target.write_text(text)

"""The documentation's pages, as tests read them: their text, code blocks, headings and links."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_VECTORS = "tests/core/vectors/README.md"  # tells of test data, not of the broker


def pages() -> dict[str, str]:
    """Text of each page, by its path below the repository's root."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    return {path: (ROOT / path).read_text() for path in sorted(listed) if path != _VECTORS}


def blocks(page: str, language: str) -> list[str]:
    """Code blocks of a page in `language`, in order."""
    return [text for found, text in every_block(page) if found == language]


def every_block(page: str) -> list[tuple[str, str]]:
    """Language and text of each code block of a page; the language is "" where the block names
    none.
    """
    return re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / page).read_text(), re.S | re.M)


def without_blocks(text: str) -> str:
    """A page's text without its code blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.S | re.M)


def anchors(text: str) -> set[str]:
    """The anchors that the headings of a page make, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", without_blocks(text), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}

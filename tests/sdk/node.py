"""Node behind a test: a script of this folder that answers each line of JSON with a line of JSON,
and packages bundled for a page.

The packages are those that package.json pins; a script that needs one says which version it was
written for.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from tests.support import parts


@dataclass(slots=True)
class Script:
    """A script that runs."""

    _process: asyncio.subprocess.Process

    @classmethod
    @contextlib.asynccontextmanager
    async def open(
        cls, name: str, *arguments: str, packages: Mapping[str, str]
    ) -> AsyncIterator[Script]:
        """Start a script, end it afterwards. `packages` has the versions that it must find.

        Raises:
            MissingPart: Node, or a package, is not there.
        """
        node, modules = parts.node(), parts.npm_packages()
        for package, version in packages.items():
            assert (
                json.loads((modules / package / "package.json").read_text())["version"] == version
            )
        process = await asyncio.create_subprocess_exec(
            *node.node,
            str(parts.SDK / name),
            *arguments,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=1 << 20,
            env=node.environment(),
        )
        try:
            yield cls(process)
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    async def ask(self, command: Mapping[str, Any]) -> dict[str, Any]:
        """What the script answers to one command."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(command).encode() + b"\n")
        line = await asyncio.wait_for(self._process.stdout.readline(), 30)
        assert line, "Node ended"
        found: dict[str, Any] = json.loads(line)
        return found


@cache
def bundled(package: str, names: str = "*") -> bytes:
    """A package as one ES module that exports `names`.

    Raises:
        MissingPart: Node, or a package, is not there.
    """
    modules, node = parts.npm_packages(), parts.node()
    done = subprocess.run(
        [modules / ".bin" / "esbuild", "--bundle", "--format=esm", "--log-level=warning"],
        input=f'export {names} from "{package}";'.encode(),
        cwd=parts.SDK,
        env=node.environment(),
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout

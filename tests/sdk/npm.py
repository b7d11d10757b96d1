"""The page SDK as its npm package: packed, installed without network, bundled and type-checked in a
folder of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.support import parts

SDK = parts.ROOT / "broker" / "sdk"
NAME = "passkey-broker-browser"


@dataclass(frozen=True, slots=True)
class Project:
    """A user's project that has the package in node_modules, and no other package."""

    folder: Path

    @classmethod
    def make(cls, folder: Path) -> Project:
        """Pack the SDK and install the tarball; npm has an empty cache and may not use the network.

        Raises:
            MissingPart: Node, or a package of tests/sdk, is not there.
        """
        parts.npm_packages()
        (folder / "package.json").write_text('{"private": true, "type": "module"}')
        project = cls(folder)
        packed = project.run(*parts.node().npm, "pack", str(SDK), "--json")
        (tarball,) = json.loads(packed)
        project.run(*parts.node().npm, "install", f"./{tarball['filename']}")
        return project

    def write(self, **files: str) -> None:
        """Write files; `__` in a name is the dot before its ending."""
        for name, text in files.items():
            (self.folder / name.replace("__", ".")).write_text(text)

    def esbuild(self, entry: str, to: str, *options: str) -> bytes:
        """Bundle `entry` into `to`, a file of the folder."""
        flags = ("--bundle", "--format=esm", "--log-level=error", f"--outfile={to}")
        self.run(str(_binary("esbuild")), entry, *flags, *options)
        return (self.folder / to).read_bytes()

    def vite(self, to: str) -> Path:
        """Build the folder's index.html into the folder `to`."""
        self.run(str(_binary("vite")), "build", "--outDir", to, "--logLevel", "error")
        return self.folder / to

    def tsc(self, *options: str) -> str:
        """Type-check the folder's TypeScript strictly; the compiler's complaints."""
        return self.run(str(_binary("tsc")), "--noEmit", "--strict", "--pretty", "false", *options)

    def run(self, *argv: str) -> str:
        """Run a program in the folder; what it printed. A failure fails the test."""
        found = parts.node().environment()
        environment = {
            key: value for key, value in found.items() if not key.lower().startswith("npm_")
        }
        cache = str(self.folder / ".npm")
        environment |= {
            "npm_config_offline": "true",
            "npm_config_cache": cache,
            "NODE_ENV": "production",
        }
        environment |= {"npm_config_audit": "false", "npm_config_fund": "false"}
        done = subprocess.run(
            argv, cwd=self.folder, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


def _binary(name: str) -> Path:
    return parts.npm_packages() / ".bin" / name


def link_packages(project: Project, *names: str) -> None:
    """Let the project have packages of tests/sdk too, as if it had installed them."""
    for name in names:
        os.symlink(parts.npm_packages() / name, project.folder / "node_modules" / name)

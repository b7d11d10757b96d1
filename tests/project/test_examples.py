"""The examples: each backend as its README starts it, the page in a real Chromium."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.browser.chromium import Chromium
from tests.project.test_docs_run import (
    Dev,
    Shop,
    bash,
    dev,
    free_port,
    said_after,
    stop,
    until_served,
    wait_registered,
)
from tests.support import parts
from tests.support.pages import ROOT, blocks

EXAMPLES = ROOT / "tests" / "examples"
BACKENDS = sorted(path.name for path in EXAMPLES.iterdir() if path.suffix in {".py", ".mjs"})
MOST_LINES = 80

__all__ = ["dev"]  # a fixture


def test_each_is_short_and_in_the_readme() -> None:
    readme = (EXAMPLES / "README.md").read_text()
    assert len(BACKENDS) == 3
    for name in (*BACKENDS, "page.html"):
        assert (EXAMPLES / name).read_text().count("\n") < MOST_LINES, name
        assert f"]({name})" in readme


def test_the_documentation_shows_the_express_backend() -> None:
    """Piece by piece as it runs below."""
    backend = (EXAMPLES / "express_app.mjs").read_text()
    shown = (ROOT / "broker/sdk/README.md").read_text().partition("## Pages")[0]
    pieces = re.findall(r"^```js\n(.*?)^```$", shown, re.S | re.M)
    assert len(pieces) == 2
    assert [piece for piece in pieces if piece not in backend] == []


def start_of(name: str, port: int) -> list[str]:
    """README's command for this backend, on another port."""
    row = next(r for r in (EXAMPLES / "README.md").read_text().splitlines() if f"({name})" in r)
    program, *arguments = shlex.split(re.findall(r"`([^`]+)`", row)[-1].replace("8081", str(port)))
    found = {
        "node": [*parts.node().node],
        "python": [sys.executable],
        "uvicorn": [sys.executable, "-m", "uvicorn"],
    }
    return [*found[program], *arguments]


@pytest.fixture(params=BACKENDS)
def shop(request: pytest.FixtureRequest, dev: Dev, tmp_path: Path) -> Iterator[str]:
    """The origin of a running example, in a folder of its own, where Node finds what it imports."""
    port = free_port()
    origin = f"http://localhost:{port}"
    (allow,) = blocks("tests/examples/README.md", "sh")
    bash(allow.replace("8081", str(port)), dev.folder)
    wait_registered(dev, origin)
    folder = Path(shutil.copytree(EXAMPLES, tmp_path / "example"))
    (folder / "node_modules").symlink_to(parts.npm_packages())
    process = subprocess.Popen(
        start_of(request.param, port),
        cwd=folder,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT / "broker" / "sdk"),
            "PASSKEYS_URL": dev.facts["url"],
            "PASSKEYS_APP_ID": dev.facts["app_id"],
            "PASSKEYS_KEY": dev.facts["api_key"],
        },
    )
    try:
        until_served(Shop(origin, process))
        yield origin
    finally:
        stop(process)
        bash(f"broker app update --remove-origin {origin}", dev.folder)


def test_sign_up_sign_in_and_the_refusals(shop: str) -> None:
    with Chromium() as browser, browser.page() as page:
        device = page.authenticator()
        page.goto(shop)
        page.wait_for_text("The passkey prompt ended without a passkey.")
        signed_in = said_after(page, "ann", "Sign up")
        assert re.fullmatch(r"Signed in as user-[0-9a-f]{16}", signed_in)
        assert said_after(page, "ann", "Sign in") == signed_in
        assert said_after(page, "ann", "Sign up") == "Choose another name."
        assert said_after(page, "nobody", "Sign in") == "There is no account of this name."
        assert len(device.credentials()) == 1

        page.reload()  # autofill: the passkey says whose it is
        page.wait_for_text(signed_in)
        sent = json.dumps(page.sent("/finish")[-1].body)
        again = f"""fetch("finish", {{
            method: "POST", headers: {{"Content-Type": "application/json"}}, body: {sent}
        }}).then((answer) => answer.status)"""
        assert page.js(again) == 409
        assert page.errors == []


def test_no_cookie_can_be_planted(shop: str) -> None:
    """Each answer that changes a session has a new one, whatever cookie came."""
    with httpx.Client(base_url=shop, trust_env=False, cookies={"session": "planted"}) as http:
        http.post("/begin-sign-up", json={"name": "mallory"}).raise_for_status()
        given = [cookie.value for cookie in http.cookies.jar if cookie.value != "planted"]
        assert len(given) == 1

"""README's commands and snippets, run as a newcomer would: in a fresh folder beside a running `broker dev`.

Every fenced block in a language that runs is run here: `sh` blocks in bash, the Python block as the backend and the HTML block
as the page of one small site, in a real Chromium. A new block without a test fails `test_every_block_is_run`.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from tests import parts
from tests.authenticator import Authenticator
from tests.browser.chromium import Answer, Chromium, Page, button, textbox

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", (ROOT / "README.md").read_text(), re.S | re.M)
MAKE, CURL, SERVE, APPS = (text for language, text in BLOCKS if language == "sh")
PYTHON, MAIL, PROPELAUTH, PASSLOCK = (text for language, text in BLOCKS if language == "python")
HANKO, HANKO_PAGE = (text for language, text in BLOCKS if language == "js" and "hanko" in text)
(PASSAGE_PAGE,) = (text for language, text in BLOCKS if language == "js" and "PassageFlex" in text)
(PAGE,) = (text for language, text in BLOCKS if language == "html")
PATH = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))


@dataclass(frozen=True, slots=True)
class Dev:
    """A running `broker dev` and the folder it was started in."""

    folder: Path
    facts: dict[str, str]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_ready(url: str, process: subprocess.Popen[bytes], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while True:
        assert process.poll() is None, "the process ended"
        try:
            if httpx.get(f"{url}/health/ready", trust_env=False).status_code == 200:
                return
        except httpx.TransportError:
            pass
        assert time.monotonic() < deadline, f"{url} was not ready in time"
        time.sleep(0.02)  # between two looks


def wait_registered(dev: Dev, origin: str) -> None:
    """Until the running broker, which remembers apps for up to a second, answers pages of `origin`."""
    path = f"/v1/apps/{dev.facts['app_id']}/authenticate/transactions/webauthn/start"
    deadline = time.monotonic() + 10
    while httpx.post(dev.facts["url"] + path, headers={"Origin": origin}, trust_env=False).is_error:
        assert time.monotonic() < deadline, f"{origin} was not registered in time"
        time.sleep(0.02)  # between two looks


def stop(process: subprocess.Popen[bytes]) -> int:
    process.send_signal(signal.SIGTERM)
    return process.wait(30)


@pytest.fixture(scope="module")
def dev() -> Iterator[Dev]:
    """What `make run` starts, in a folder of its own, which the servers' unprivileged user can enter."""
    folder = Path(tempfile.mkdtemp(prefix="newcomer-"))
    folder.chmod(0o755)
    port = free_port()
    process = subprocess.Popen(
        ["broker", "dev", "--no-open"], cwd=folder, env={**os.environ, "PATH": PATH, "PORT": str(port)}
    )
    wait_ready(f"http://127.0.0.1:{port}", process)
    yield Dev(folder, json.loads((folder / ".broker/dev.json").read_text()))
    assert stop(process) == 0
    shutil.rmtree(folder)


def bash(script: str, folder: Path, **environment: str) -> str:
    """Run a block; any failing command fails the test."""
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=folder,
        env={**os.environ, "PATH": PATH, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_block_is_run() -> None:
    assert sorted(language for language, _ in BLOCKS if language != "mermaid") == [
        "html",
        *["js"] * 3,
        *["python"] * 4,
        *["sh"] * 4,
    ]


def test_make_run_starts_what_the_other_blocks_use() -> None:
    assert MAKE.strip() == "make run"
    shown = subprocess.run(["make", "-n", "run"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert re.search(r"broker dev\b", shown), shown


def test_curl(dev: Dev) -> None:
    answers = [
        json.loads(line) for line in re.findall(r"\{.*?\}(?=\{|\Z)", bash(CURL, dev.folder).strip(), re.S)
    ]
    opened, begun, refused, found = answers
    assert opened["transaction_id"].startswith("pbt_")
    assert begun["handshake"]["challenge"]["publicKey"]["rpId"] == "localhost"
    assert refused["code"] == "invalid_nonce"
    assert found["users"][0]["external_id"] == "user-7"


def test_apps(dev: Dev) -> None:
    out = bash(APPS, dev.folder)
    assert '"api_key": "pbk_' in out
    assert "user_verification=preferred" in out
    assert '"action": "key.created"' in out
    left = json.loads(bash("broker app list --json", dev.folder))
    assert [app["name"] for app in left] == ["Passkey broker demo"]


def test_serve(dev: Dev) -> None:
    """Beside the running one, on its stores: two instances are interchangeable."""
    page, management = free_port(), free_port()
    script = re.sub(r"postgresql://\S+ ", f"'{dev.facts['database_url']}' ", SERVE.replace("8000", str(page)))
    script = re.sub(r"redis://\S+", f"'{dev.facts['redis_url']}'", script).replace("9000", str(management))
    script = script.replace("0.0.0.0", "127.0.0.1").replace("broker serve", "exec broker serve")
    script = script.replace("cat secret-key", "cat .broker/secret-key")
    process = subprocess.Popen(
        ["bash", "-euo", "pipefail", "-c", script], cwd=dev.folder, env={**os.environ, "PATH": PATH}
    )
    try:
        wait_ready(f"http://127.0.0.1:{page}", process)
        app = f"/v1/apps/{dev.facts['app_id']}"
        keyed = {"Authorization": f"Bearer {dev.facts['api_key']}"}
        opened = httpx.get(f"http://127.0.0.1:{management}{app}/users", headers=keyed, trust_env=False)
        hidden = httpx.get(f"http://127.0.0.1:{page}{app}/users", headers=keyed, trust_env=False)
        assert (opened.status_code, hidden.status_code) == (200, 404)
    finally:
        assert stop(process) == 0


class Backend:
    """A Python block of README, run in the newcomer's folder, and a session."""

    def __init__(self, dev: Dev, block: str = PYTHON) -> None:
        here = Path.cwd()
        os.chdir(dev.folder)
        self.names: dict[str, Any] = {}
        try:
            exec(compile(block, "README.md", "exec"), self.names)
        finally:
            os.chdir(here)
        self.session: dict[str, Any] = {}

    def __call__(self, function: str, *arguments: object) -> Any:
        return self.names[function](self.session, *arguments)


def finish(dev: Dev, kind: str, transaction: str | None, device: Authenticator) -> str:
    """The page's part over HTTP, and the nonce."""
    base = f"{dev.facts['url'].replace('localhost', '127.0.0.1')}/v1/apps/{dev.facts['app_id']}/{kind}"
    with httpx.Client(trust_env=False, headers={"Origin": dev.facts["url"]}) as http:
        body = {"transaction_id": transaction} if transaction else {}
        begun = http.post(f"{base}/transactions/webauthn/start", json=body).json()["handshake"]
        answer = (device.register if kind == "register" else device.authenticate)(
            begun["challenge"]["publicKey"], dev.facts["url"]
        )
        done = http.post(
            f"{base}/transactions/webauthn/finish",
            json={**body, "handshake_id": begun["id"], "handshake_response": answer},
        )
        return str(done.json()["nonce"])


def test_python(dev: Dev) -> None:
    backend, device = Backend(dev), Authenticator()
    transaction = backend("begin_sign_up", "Bea")["transaction"]
    account = backend("finish", finish(dev, "register", transaction, device))
    transaction = backend("begin_sign_in", "Bea")["transaction"]
    assert backend("finish", finish(dev, "authenticate", transaction, device)) == account
    assert backend.session == account

    backend.session.clear()
    assert backend("finish_without_a_name", finish(dev, "authenticate", None, device)) == account
    assert backend.session == account

    errors = sys.modules["broker.sdk.client"]
    for mine, other in (("begin_sign_in", "register"), ("begin_sign_up", "authenticate")):
        transaction = backend("begin_sign_up", "Cid")["transaction"]
        registered = finish(dev, "register", transaction, Authenticator())
        nonce = registered if other == "register" else finish(dev, "authenticate", None, device)
        backend(mine, "Bea" if mine == "begin_sign_in" else "Dan")
        with pytest.raises(errors.InvalidNonce):
            backend("finish", nonce)
    for function, name in (("begin_sign_in", "nobody"), ("begin_sign_up", "Bea"), ("begin_sign_up", "")):
        with pytest.raises(ValueError, match=r"name\."):
            backend(function, name)


def test_mail_codes(dev: Dev) -> None:
    backend, mails = Backend(dev, MAIL), list[tuple[str, ...]]()
    backend("ask_for_a_code", "dora@example.org", lambda *mail: mails.append(mail))
    ((address, _, text, html),) = mails
    (digits,) = re.findall(r"\b[0-9]{6}\b", text)
    assert (address, digits in html) == ("dora@example.org", True)
    assert backend("take_the_code", f"{(int(digits) + 1) % 1_000_000:06d}") is None
    assert backend("take_the_code", digits) == "dora@example.org"
    assert backend.session == {}


async def test_coming_from_propelauth(dev: Dev) -> None:
    backend, device, url = Backend(dev, PROPELAUTH), Authenticator(), dev.facts["url"]
    assert await backend("begin_sign_in", "user-10") is None
    backend.session["account"] = "user-10"
    options = await backend("begin_adding_a_passkey", "Cleo")
    assert await backend("finish_adding_a_passkey", device.register(options, url))

    backend.session.clear()
    answer = device.authenticate(await backend("begin_sign_in", "user-10"), url)
    assert await backend("finish_sign_in", answer)
    assert backend.session == {"account": "user-10"}
    backend.session["claimed"] = "user-10"
    assert not await backend("finish_sign_in", answer)

    native = Backend(dev)
    native("finish_without_a_name", finish(dev, "authenticate", None, device))
    assert native.session == {"account": "user-10"}


def bundled(module: str) -> str:
    """A page's module with what it imports, as a script that sets `page` to its exports."""
    done = subprocess.run(
        [parts.npm_packages() / ".bin/esbuild", "--bundle", "--format=iife", "--global-name=page"],
        input=module.encode(),
        cwd=parts.SDK,
        env=parts.node().environment(),
        capture_output=True,
        check=True,
    )
    return done.stdout.decode()


@pytest.fixture
def hanko_site(dev: Dev) -> Iterator[str]:
    """README's page and README's backend for Hanko's SDK, on an origin of their own, which the app gets to know."""
    node, modules = parts.node(), parts.npm_packages()
    (dev.folder / "node_modules").symlink_to(modules)  # where the backend finds what it imports
    (dev.folder / "backend.mjs").write_text(HANKO)
    page = HANKO_PAGE.replace("http://localhost:8080", dev.facts["url"]).replace(
        "APP_ID", dev.facts["app_id"]
    )
    bundle = dev.folder / "page.js"
    bundle.write_text(bundled(page))
    process = subprocess.Popen(
        [*node.node, str(parts.SDK / "hanko-site.mjs"), str(dev.folder / "backend.mjs"), str(bundle)],
        cwd=dev.folder,
        env=node.environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        url = f"http://localhost:{process.stdout.readline().strip()}"
        bash(
            f"broker app update --app {dev.facts['app_id']} --origin {dev.facts['url']} --origin {url}",
            dev.folder,
        )
        wait_registered(dev, url)
        yield url
    finally:
        process.kill()
        process.wait(30)


def test_coming_from_hanko(hanko_site: str) -> None:
    with Chromium() as browser, browser.page() as page:
        device = page.authenticator()
        page.goto(hanko_site)
        page.js("page.addAPasskey('Dana')")
        assert [kept["userName"] for kept in device.credentials()] == ["Dana"]
        assert page.js("page.signIn()") == {"account": "user-11"}
        sent = json.dumps(page.sent("/finish-sign-in")[-1].body)
        again = f"fetch('finish-sign-in', {{method: 'POST', body: {sent}}})"
        assert page.js(f"{again}.then((answer) => answer.json())") == {
            "details": "This login was used before."
        }


def test_coming_from_passage(dev: Dev) -> None:
    """Its SDK in a page at the broker's own origin, which `dev` has registered; the backend's calls are those of the API."""
    url, app = dev.facts["url"], dev.facts["app_id"]
    page_module = PASSAGE_PAGE.replace("http://localhost:8080", url).replace("APP_ID", app)
    script = bundled(page_module)
    headers = {"Authorization": f"Bearer {dev.facts['api_key']}"}
    base = f"{url.replace('localhost', '127.0.0.1')}/v1/apps/{app}"
    with (
        Chromium() as browser,
        browser.page() as page,
        httpx.Client(headers=headers, trust_env=False) as backend,
    ):
        device = page.authenticator()
        page.goto(f"{url}/health/live")  # any address of the origin
        page.js(script)
        opened = backend.post(
            f"{base}/transactions/register", json={"external_id": "user-13", "passkey_display_name": "Finn"}
        ).json()["transaction_id"]
        told = backend.post(
            f"{base}/authenticate/verify", json={"nonce": page.js(f"page.register({opened!r})")}
        ).json()
        assert (told["external_id"], told["purpose"]) == ("user-13", "register")
        assert len(device.credentials()) == 1
        opened = backend.post(f"{base}/transactions/authenticate", json={"external_id": "user-13"}).json()
        for call in (f"page.authenticate({opened['transaction_id']!r})", "page.signInByAnyPasskey()"):
            expected = {"nonce": page.js(call), "purpose": "authenticate", "external_id": "user-13"}
            assert backend.post(f"{base}/authenticate/verify", json=expected).status_code == 200


def test_coming_from_passlock(dev: Dev) -> None:
    backend, device, url = Backend(dev, PASSLOCK), Authenticator(), dev.facts["url"]

    def run(kind: str, token: str) -> str:
        """The page's part, and the code."""
        base = f"{url.replace('localhost', '127.0.0.1')}/v2/{dev.facts['app_id']}/passkey/{kind}"
        with httpx.Client(trust_env=False, headers={"Origin": url}) as http:
            begun = http.post(f"{base}/options", json={f"{kind}Token": token}).json()
            make = device.register if kind == "registration" else device.authenticate
            body = {"sessionToken": begun["sessionToken"], "response": make(begun["optionsJSON"], url)}
            return str(http.post(f"{base}/verification", json=body).json()["code"])

    backend.session["account"] = "user-12"
    registered = run("registration", backend("begin_adding_a_passkey", "Emil"))
    backend.session.clear()
    assert not backend("finish_sign_in", registered)
    code = run("authentication", backend("begin_sign_in"))
    assert backend("finish_sign_in", code)
    assert backend.session == {"account": "user-12"}
    assert not backend("finish_sign_in", code)


@dataclass
class Shop:
    """README's page and README's backend on an origin of their own; `sessions` by the value of a cookie."""

    origin: str
    backend: Backend
    sessions: dict[str, dict[str, Any]]

    @property
    def accounts(self) -> dict[str, str]:
        found: dict[str, str] = self.backend.names["accounts"]
        return found


@pytest.fixture
def shop(dev: Dev) -> Iterator[Shop]:
    """Both samples as README says they fit: a path is a function, the body its arguments, an exception an HTTP error."""
    shop = Shop("", Backend(dev), defaultdict(dict))
    page = PAGE.replace("http://localhost:8080", dev.facts["url"]).replace("APP_ID", dev.facts["app_id"])

    class Site(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer(200, "text/html; charset=utf-8", page)

        def do_POST(self) -> None:
            assert self.headers["Content-Type"] == "application/json"
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            session = shop.sessions[self.headers["Cookie"]]
            try:
                result = shop.backend.names[self.path.strip("/").replace("-", "_")](session, **body)
            except Exception as error:  # noqa: BLE001 - any, as a web framework does
                self.answer(400, "text/plain", str(error))
            else:
                self.answer(200, "application/json", json.dumps(result))

        def answer(self, status: int, kind: str, body: str) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            if "Cookie" not in self.headers:
                self.send_header("Set-Cookie", f"session={secrets.token_hex(8)}; HttpOnly")
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Site) as server:
        shop.origin = f"http://localhost:{server.server_port}"
        origins = f"--origin {dev.facts['url']} --origin {shop.origin}"
        bash(f"broker app update --app {dev.facts['app_id']} {origins}", dev.folder)
        Thread(target=server.serve_forever, daemon=True).start()
        wait_registered(dev, shop.origin)
        yield shop
        server.shutdown()


def visit_as_a_stranger(page: Page, shop: Shop) -> None:
    """Open the page where there is no passkey: the virtual authenticator then ends autofill at once, as a browser would not."""
    page.goto(shop.origin)
    page.wait_for_text("The passkey prompt ended without a passkey.")


def said_after(page: Page, name: str, press: str) -> str:
    """What the page says when somebody typed `name` and pressed that button."""
    page.js("document.querySelector('output').textContent = ''")
    page.fill(textbox("Name"), name)
    page.click(button(press))
    page.wait_until("document.querySelector('output').textContent")
    return str(page.js("document.querySelector('output').textContent"))


def test_page_and_backend(shop: Shop) -> None:
    with Chromium() as browser, browser.page() as page:
        device = page.authenticator()
        visit_as_a_stranger(page, shop)
        signed_in = said_after(page, "ann", "Sign up")
        assert list(shop.accounts) == ["ann"]
        assert signed_in == f"Signed in as {shop.accounts['ann']}"
        assert said_after(page, "ann", "Sign in") == signed_in
        assert len(device.credentials()) == 1

        page.reload()  # the form's autofill offers the passkey, and the virtual authenticator takes it
        page.wait_for_text(signed_in)
        assert page.errors == []


def test_an_unknown_name_signs_nobody_in(dev: Dev, shop: Shop) -> None:
    """The browser has a passkey that would answer a nameless sign-in. Nor does a name that is taken get a second passkey."""
    with Chromium() as browser, browser.page() as page:
        device = page.authenticator()
        visit_as_a_stranger(page, shop)
        assert said_after(page, "ann", "Sign up").startswith("Signed in as ")
        (uses,) = [kept["signCount"] for kept in device.credentials()]
        page.send("Network.clearBrowserCookies")
        page.js("fetch('/')")  # another person's session, in the same browser
        shop.sessions.clear()
        asked = len(page.requests)
        assert said_after(page, "nobody", "Sign in") == "There is no account of this name."
        assert said_after(page, "ann", "Sign up") == "Choose another name."
        assert [urlsplit(request.url).path for request in page.requests[asked:]] == [
            "/begin-sign-in",
            "/begin-sign-up",
        ]

        # Nor where a backend answers its refusal with status 200: then it is the SDK that stops.
        page.intercept("*/begin-sign-*", lambda _: Answer(200, body=b'{"error": "No such name."}'))
        for press in ("Sign in", "Sign up"):
            assert "transactionId is not a non-empty string" in said_after(page, "nobody", press)
        assert not [
            one for one in page.requests[asked:] if urlsplit(one.url).path.endswith(("start", "/finish"))
        ]
        assert [kept["signCount"] for kept in device.credentials()] == [uses]
        assert not any(shop.sessions.values())
        assert page.errors == []

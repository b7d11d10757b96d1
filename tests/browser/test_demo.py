"""The sample site in a real Chromium, with virtual authenticators, on a real broker and its stores.

Every test ends with the same look at what the browser said: no script error, no breach of the
content security policy, and no request to anywhere but the site. The virtual authenticator answers
a conditional get at once, so tests that are not about autofill run in a browser that reports no
support for it.
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import re
import shlex
import subprocess
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
from aiohttp import web

from broker.app import Service, assemble, serve
from broker.demo import demo_app
from broker.embedded import EmbeddedStores
from broker.telemetry import Log
from tests.browser.chromium import (
    Answer,
    Authenticator,
    Chromium,
    Named,
    Page,
    Request,
    button,
    link,
    textbox,
)
from tests.conftest import settings_for
from tests.support import parts

T = TypeVar("T")

NO_AUTOFILL = "PublicKeyCredential.getClientCapabilities = async () => ({ conditionalGet: false });"
COUNT_PROMPTS = """
  const real = navigator.credentials.get.bind(navigator.credentials);
  globalThis.prompts = [];
  navigator.credentials.get = (options) => {
    const got = real(options);
    prompts.push(options.mediation ?? "modal");
    return got;
  };
"""

# What became of each prompt, as the platform told it.
NOTE_PROMPTS = """
  globalThis.prompted = [];
  for (const verb of ["create", "get"]) {
    const real = navigator.credentials[verb].bind(navigator.credentials);
    navigator.credentials[verb] = (options) => {
      const told = real(options);
      told.then(() => prompted.push("answered"), (error) => prompted.push(error.name));
      return told;
    };
  }
"""

# The page's own requests to `finish` wait for `release()`.
HOLD_FINISH = """
  const real = globalThis.fetch;
  globalThis.finishing = 0;
  const gate = new Promise((resolve) => (globalThis.release = resolve));
  globalThis.fetch = async (resource, init) => {
    if (String(resource).endsWith("/webauthn/finish")) { finishing += 1; await gate; }
    return real(resource, init);
  };
"""

# What moved, by how much, and where to, as the browser tells it (Layout Instability).
SHIFTS = """new Promise((resolve) => {
  new PerformanceObserver((list) => resolve(list.getEntries().map(({ value, sources }) =>
    [value, ...sources.map(({ node, previousRect: a, currentRect: b }) => [node?.outerHTML?.slice(0, 60), a.y, b.y])])))
    .observe({ type: "layout-shift", buffered: true });
  requestAnimationFrame(() => setTimeout(() => resolve([]), 100));
})"""

HOLD_LIST = """(() => {
  const real = globalThis.fetch;
  Object.assign(globalThis, { held: [], places: new Set(), frames: 0 });
  globalThis.fetch = async (resource, init) => {
    if (String(resource).endsWith("/api/passkeys")) await new Promise((resolve) => held.push(resolve));
    return real(resource, init);
  };
  const add = document.getElementById("add");
  const look = () => {
    frames += 1;
    const { x, y } = add.getBoundingClientRect();
    if (add.checkVisibility({ visibilityProperty: true })) places.add(`${x},${y + scrollY}`);
    requestAnimationFrame(look);
  };
  look();
})()"""

CREATE, SIGN_IN, WITHOUT, ADD, OUT = map(
    button,
    ("Create account", "Sign in", "Sign in without a name", "Add another passkey", "Sign out"),
)
CANCEL, AGAIN, COPY_CURL = button("Cancel"), button("Redeem it again"), button("Copy as curl")
NEW_NAME, NAME = textbox("New name"), textbox("Your name")


@dataclass(frozen=True, slots=True)
class Demo:
    service: Service
    key: str

    @property
    def origin(self) -> str:
        return f"http://localhost:{self.service.port}"

    @property
    def url(self) -> str:
        return f"{self.origin}/demo/"


@pytest.fixture(scope="module")
def demo(stores: EmbeddedStores, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    """The broker with the demo, in an event loop on a thread of its own: the browser's client
    blocks.
    """
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="demo server")
    thread.start()

    def run(work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, loop).result(30)

    service, key = run(_serve(stores, tmp_path_factory.mktemp("demo")))
    yield Demo(service, key)
    run(service.close())
    loop.call_soon_threadsafe(loop.stop)
    thread.join(30)
    loop.close()


async def _serve(stores: EmbeddedStores, data: Path) -> tuple[Service, str]:
    broker = await assemble(
        settings_for(stores, host="localhost", store_timeout=1.5),
        log=Log(io.StringIO(), level="warning"),
    )
    app, key = await broker.directory.create_app("Demo", "localhost", ["http://localhost:1"])

    async def prepare(port: int) -> dict[str, web.Application]:
        demo = demo_app(
            broker_url=f"http://127.0.0.1:{port}",
            app_id=app.id,
            api_key=key,
            data=data,
            origins={f"http://localhost:{port}"},
        )
        return {"/demo/": demo}

    service = await serve(broker, prepare=prepare)
    await broker.directory.update_app(replace(app, origins=(f"http://localhost:{service.port}",)))
    return service, key


@pytest.fixture(scope="module")
def browser() -> Iterator[Chromium]:
    with Chromium() as started:
        yield started


@pytest.fixture
def page(browser: Chromium, demo: Demo) -> Iterator[Page]:
    """A tab in a context of its own; what the browser said in it is judged at the end."""
    with browser.page() as opened:
        yield opened
        assert opened.errors == []
        said = [
            line
            for line in opened.console
            if not re.search(r"the server responded with|ERR_INTERNET_DISCONNECTED", line)
        ]
        assert said == []
        elsewhere = [
            r.url for r in opened.requests if not r.url.startswith((demo.origin + "/", "about:"))
        ]
        assert elsewhere == []


@pytest.fixture
def device(page: Page) -> Authenticator:
    return page.authenticator()


@pytest.fixture
def site(page: Page, demo: Demo, device: Authenticator) -> Page:
    """The demo, opened in a browser with a platform authenticator and no autofill of passkeys."""
    page.before_scripts(NO_AUTOFILL)
    page.goto(demo.url)
    page.wait_for(CREATE)
    page.wait_for_text("doesn't suggest passkeys")
    return page


_names = iter(range(1000))


def fresh_name() -> str:
    return f"Visitor {next(_names)}"


def sign_up(page: Page) -> str:
    name = fresh_name()
    page.fill(NEW_NAME, name)
    page.click(CREATE)
    page.wait_for_text(f"Hello, {name}")
    page.wait_until("document.querySelectorAll('.key').length === 1")
    return name


def sign_out(page: Page) -> None:
    page.click(OUT)
    page.wait_for(WITHOUT)
    page.wait_for_text("You're signed out")


def sign_in(page: Page, name: str) -> None:
    page.fill(NAME, name)
    page.click(SIGN_IN)


def steps_done(page: Page) -> list[str]:
    done: list[str] = page.js(
        "[...document.querySelectorAll('#tour .done')].map((item) => item.dataset.step)"
    )
    return done


def finished(page: Page, path: str) -> Any:
    """The body with which the page finished a step at its backend."""
    return json.loads(page.wait_sent(path).body or "")


# The six things to try


def test_sign_up_with_a_name_makes_a_passkey_and_shows_what_travelled(
    site: Page, device: Authenticator
) -> None:
    name = sign_up(site)
    assert len(device.credentials()) == 1
    assert site.text("#announcer") == "Your account is open and its first passkey is kept."
    assert site.focused() == Named("heading", f"Hello, {name}")
    assert "its first passkey is kept" in site.text("#account-notice")
    assert "Person verified by the device" in site.text("#receipt-facts")

    nonce = finished(site, "/api/sign-up/finish")["nonce"]
    transaction = json.loads(site.wait_sent("/register/transactions/webauthn/start").body or "")[
        "transaction_id"
    ]
    external_id = site.text("#external-id")
    shown = site.text("#flow")
    for token in (nonce, transaction):
        assert f"{token[:8]}…{token[-2:]}" in shown
        assert token not in site.js("document.documentElement.innerHTML")
    assert f"{external_id[:8]}…{external_id[-2:]}" in shown
    hops = site.js(
        "[...document.querySelectorAll('#flow .exchange > .hops > .hop:not(.back)')]"
        ".map((hop) => hop.querySelector('.what').textContent)"
    )
    assert [re.sub(r"\s+", " ", hop) for hop in hops] == [
        "This page to its backend: POST /demo/api/sign-up/start",
        "Its backend to broker: POST /transactions/register",
        "This page to broker: POST /register/transactions/webauthn/start",
        "This page to broker: POST /register/transactions/webauthn/finish",
        "This page to its backend: POST /demo/api/sign-up/finish",
        "Its backend to broker: POST /authenticate/verify",
    ]
    assert site.count("#flow .hop.back") == 6
    site.wait_for_text("3 look-ups", within="#flow .lookups")
    assert steps_done(site) == ["sign-up"]


def test_sign_in_by_name(site: Page) -> None:
    name = sign_up(site)
    sign_out(site)
    sign_in(site, name.upper())
    site.wait_for_text("You signed in by name.")
    assert site.focused() == Named("heading", f"Hello, {name}")
    assert "Proves a sign-in" in site.text("#receipt-facts")
    assert site.sent("/api/sign-in/finish")[0].status == 200
    assert steps_done(site) == ["sign-up", "by-name"]


def test_sign_in_without_a_name(site: Page) -> None:
    name = sign_up(site)
    sign_out(site)
    site.click(WITHOUT)
    site.wait_for_text("You signed in without typing a name.")
    assert site.text("#account-title") == f"Hello, {name}"
    body = json.loads(site.sent("/authenticate/transactions/webauthn/start")[0].body or "")
    assert "transaction_id" not in body
    assert steps_done(site) == ["sign-up", "without-name"]


def test_sign_in_from_autofill(page: Page, demo: Demo, device: Authenticator) -> None:
    page.goto(demo.url)
    page.wait_for(CREATE)
    page.wait_for_text(
        "Nothing to suggest right now"
    )  # this authenticator refuses at once when it has no passkey
    assert page.count("#sign-in-notice") == 0, "nobody asked, so nobody is told"
    name = sign_up(page)
    page.click(OUT)
    page.wait_for_text(
        "You signed in from the field\u2019s autofill."
    )  # and this one chooses by itself
    assert page.text("#account-title") == f"Hello, {name}"
    assert (
        page.js("document.querySelector('#flow details[open] h3').textContent")
        == "Sign in from autofill"
    )
    assert steps_done(page) == ["sign-up", "autofill"]


def test_autofill_that_waits_gives_way_to_a_button_and_waits_again(
    page: Page, demo: Demo, device: Authenticator
) -> None:
    page.before_scripts(COUNT_PROMPTS)
    device.present(False)
    page.goto(demo.url)
    page.wait_until("prompts.length === 1")
    device.present(True)
    name = sign_up(page)
    device.present(False)
    sign_out(page)
    page.wait_until("prompts.length === 2")
    assert page.count("#wire-empty") == 0
    device.present(True)
    sign_in(page, name)
    page.wait_for_text("You signed in by name.")
    assert page.js("prompts") == ["conditional", "conditional", "modal"]
    device.present(False)
    sign_out(page)
    page.wait_until("prompts.length === 4")
    assert page.js("prompts.at(-1)") == "conditional"


def test_a_second_passkey_on_another_device(site: Page, device: Authenticator) -> None:
    sign_up(site)
    device.present(False)  # the person touches the stick; otherwise the two race to answer
    stick = site.authenticator(transport="usb")
    site.click(ADD)
    site.wait_for_text("You can sign in with either passkey now.")
    assert (len(device.credentials()), len(stick.credentials())) == (1, 1)
    assert (
        site.count(button("Revoke Device passkey"))
        == site.count(button("Revoke Security key"))
        == 1
    )
    stick.unplug()
    site.authenticator(transport="nfc")
    site.click(ADD)
    site.wait_for(button("Revoke Security key 2"))
    device.unplug()
    sign_out(site)
    site.click(WITHOUT)
    site.wait_for_text("You signed in without typing a name.")
    assert steps_done(site) == ["sign-up", "without-name", "second"]


def test_a_new_step_takes_away_what_the_last_one_said(site: Page, device: Authenticator) -> None:
    sign_up(site)
    sign_out(site)
    site.click(WITHOUT)
    site.wait_for_text("You signed in without typing a name.", within="#account-notice")
    device.present(False)
    site.authenticator(transport="usb")
    site.click(ADD)
    site.wait_for_text("You can sign in with either passkey now.", within="#passkeys-notice")
    assert "Proves a new passkey" in site.text("#receipt-facts")
    assert site.count("#account-notice") == 0


def test_the_add_button_stays_where_it_appeared(site: Page, device: Authenticator) -> None:
    """The list is held back; the button's place is noted at every frame in which a person could
    click it.
    """
    name = sign_up(site)
    device.present(False)
    site.authenticator(transport="usb")
    site.click(ADD)
    site.wait_until("document.querySelectorAll('.key').length === 2")
    device.present(True)
    sign_out(site)
    site.js(HOLD_LIST)
    sign_in(site, name)
    site.wait_for_text("You signed in by name.")
    site.wait_until("held.length === 1 && frames > 5")
    assert site.attribute("#passkeys", "aria-busy") == "true"
    assert site.js("document.querySelector('#keys li').getBoundingClientRect().height") == 70
    site.js("held[0]()")
    site.wait_until("document.querySelectorAll('.key').length === 2")
    shown = site.js("frames")
    site.wait_until(f"frames > {shown} + 5")
    places = site.js("[...places]")
    assert len(places) == 1, places
    site.click(button("Revoke Security key"))
    site.wait_for(Named("dialog", "Revoke this passkey?"))


def test_passkeys_can_be_named(site: Page) -> None:
    sign_up(site)
    site.click("#keys .tools button:first-child")
    site.wait_for(Named("dialog", "Name this passkey"))
    assert site.focused() == textbox("Name")
    site.fill(textbox("Name"), "Work <laptop>")
    site.press("Enter")
    site.wait_for_text("Use letters, digits", within="#label-notice")
    assert site.count("#keys laptop") == 0
    site.fill(textbox("Name"), "Work laptop")
    site.click(button("Save"))
    site.wait_for(button("Revoke Work laptop"))
    assert site.focused() == button("Rename Work laptop")
    site.reload()
    site.wait_for(button("Revoke Work laptop"))


def test_a_revoked_passkey_no_longer_signs_in_and_the_page_says_so(
    site: Page, device: Authenticator
) -> None:
    sign_up(site)
    device.present(False)  # the person touches the stick; otherwise the two race to answer
    stick = site.authenticator(transport="usb")
    site.click(ADD)
    site.wait_for_text("You can sign in with either passkey now.")
    device.present(True)
    site.click("#keys .key:first-child .tools button:last-child")
    site.wait_for(Named("dialog", "Revoke this passkey?"))
    assert site.focused() == button("Keep it")
    assert site.count("#revoke-last") == 0
    site.click(button("Revoke"))
    site.wait_for_text("is revoked.")
    assert site.count(".key") == 1
    assert site.focused() == Named("heading", "Your passkeys")
    assert steps_done(site) == ["sign-up", "second", "revoke"]
    sign_out(site)
    stick.unplug()
    site.click(WITHOUT)
    site.wait_for_text("it may have been revoked", within="#without-name-notice")
    refused = site.wait_sent("/authenticate/transactions/webauthn/finish")
    assert refused.status == 401
    device.wait_event("deleted")  # the WebAuthn Signal API: the device forgets it too
    assert device.credentials() == []


def test_the_last_passkey_is_revoked_after_a_warning(site: Page) -> None:
    name = sign_up(site)
    site.click("#keys .tools button:last-child")
    site.wait_for(Named("dialog", "Revoke this passkey?"))
    site.wait_for_text("This is your only passkey.", within="#revoke-last")
    site.press("Escape")
    site.wait_gone(Named("dialog", "Revoke this passkey?"))
    assert site.sent("/revoke") == []
    assert site.focused().role == "button"
    site.click("#keys .tools button:last-child")
    site.click(button("Revoke"))
    site.wait_for_text("Add a new passkey before you sign out")
    sign_out(site)
    sign_in(site, name)
    site.wait_for_text("has no passkeys left", within="#sign-in-notice")


# While the device is asked


@dataclass(frozen=True, slots=True)
class Way:
    """A way to a ceremony: the card, its button, where its sentence stands, and that sentence after
    Cancel.
    """

    card: str
    press: Named
    notice: str
    sentence: str


WAYS = {
    "sign-up": Way("#sign-up", CREATE, "#sign-up-notice", "Cancelled, no passkey was made."),
    "by-name": Way("#sign-in", SIGN_IN, "#sign-in-notice", "Cancelled, no passkey was used."),
    "without-name": Way(
        "#sign-in", WITHOUT, "#without-name-notice", "Cancelled, no passkey was used."
    ),
    "second": Way("#passkeys", ADD, "#passkeys-notice", "Cancelled, no passkey was added."),
}


@pytest.mark.parametrize("step", WAYS)
def test_a_ceremony_that_waits_says_so_and_can_be_cancelled(
    page: Page, demo: Demo, device: Authenticator, step: str
) -> None:
    page.before_scripts(NO_AUTOFILL)
    page.before_scripts(NOTE_PROMPTS)
    page.goto(demo.url)
    page.wait_for(CREATE)
    name = sign_up(page)
    if step != "second":
        sign_out(page)
    way = WAYS[step]
    if step == "sign-up":
        page.fill(NEW_NAME, name := fresh_name())
    elif step == "by-name":
        page.fill(NAME, name)
    device.present(False)
    box = f"(({{ offsetTop, offsetHeight }}) => [offsetTop, offsetHeight])(document.querySelector('{way.card}'))"
    page.click(way.press)
    page.wait_for_text("Waiting for your device", within=f"{way.card} .waiting")
    page.wait_for_text(re.compile("Your device asks"), within="#flow")
    assert page.focused() == CANCEL
    assert page.text("#announcer") == "Waiting for your device."
    assert page.count(way.press) == 0, "out of reach while the device is asked"
    waiting = page.js(box)
    assert page.js("prompted") == ["answered"], "the prompt waits"
    page.click(CANCEL)
    page.wait_for_text(way.sentence, within=way.notice)
    page.wait_until("prompted.length === 2")
    assert page.js("prompted") == ["answered", "AbortError"], "the prompt itself was taken back"
    assert page.count(".waiting") == 0
    assert page.focused() == way.press
    assert "bad" not in (page.attribute(way.notice, "class") or "")
    assert page.text("#announcer") == page.text(way.notice)
    page.wait_for_text("You cancelled, and the prompt was taken back.", within="#flow")
    page.wait_for_text("stopped", within="#flow .exchange[open] .sum")
    page.js(f"document.querySelector('{way.notice}').replaceChildren()")
    assert page.js(box) == waiting, "nothing moved while the device was asked"
    device.forget()
    device.present(True)
    if step in ("sign-up", "second"):
        page.click(way.press)
        page.wait_until("prompted.length === 3")
        assert page.js("prompted[2]") == "answered"
        page.wait_until(
            f"document.querySelectorAll('.key').length === {1 if step == 'sign-up' else 2}"
        )


def test_what_the_device_answered_can_no_longer_be_cancelled(
    page: Page, demo: Demo, device: Authenticator
) -> None:
    page.before_scripts(NO_AUTOFILL)
    page.before_scripts(HOLD_FINISH)
    page.goto(demo.url)
    page.fill(NEW_NAME, name := fresh_name())
    page.click(CREATE)
    page.wait_until("finishing === 1")
    assert page.count(".waiting") == page.count(CANCEL) == 0
    assert page.attribute("#sign-up-form", "aria-busy") == "true"
    page.js("release()")
    page.wait_for_text(f"Hello, {name}")


def test_the_card_that_waits_is_the_one_whose_prompt_runs(
    site: Page, device: Authenticator
) -> None:
    name = sign_up(site)
    device.present(False)
    sign_out(site)
    site.fill(NEW_NAME, fresh_name())
    site.click(CREATE)
    site.wait_for("#sign-up .waiting")
    sign_in(site, name)
    site.wait_for("#sign-in .waiting")
    site.wait_gone("#sign-up .waiting")
    site.wait_for(CREATE)
    assert site.count(SIGN_IN) == 0
    assert site.count("#sign-up-notice") == 0, (
        "who began another prompt needs no sentence about the first"
    )


# What goes wrong


def test_a_refused_prompt_is_a_sentence_and_can_be_tried_again(
    site: Page, device: Authenticator
) -> None:
    name = fresh_name()
    device.verified(False)
    site.fill(NEW_NAME, name)
    site.click(CREATE)
    site.wait_for_text("No passkey was made", within="#sign-up-notice")
    site.wait_for_text("Your device gave no passkey: cancelled.", within="#flow")
    assert site.sent("/register/transactions/webauthn/finish") == []
    device.verified(True)
    site.click(CREATE)
    site.wait_for_text(f"Hello, {name}")
    device.verified(False)
    sign_out(site)
    site.click(WITHOUT)
    site.wait_for_text("No passkey was used", within="#without-name-notice")
    sign_in(site, name)
    site.wait_for_text("this device has none for that name", within="#sign-in-notice")


def test_another_button_ends_a_prompt_that_waits(site: Page, device: Authenticator) -> None:
    name = sign_up(site)
    device.present(False)
    sign_out(site)
    site.fill(NEW_NAME, fresh_name())
    site.click(CREATE)
    site.wait_for_text("Your device asks you to make a passkey.", within="#flow")
    device.present(True)  # this releases no prompt that waits already
    sign_in(site, name)
    site.wait_for_text("You signed in by name.")
    assert site.text("#account-title") == f"Hello, {name}"
    assert site.sent("/api/sign-up/finish")[1:] == [], "the ended sign-up came to nothing"


@pytest.mark.parametrize(
    ("platform", "sentence"),
    [
        ("NotAllowedError", "No passkey was made"),
        ("InvalidStateError", "already made a passkey for this name"),
        ("NotSupportedError", "This browser can't use passkeys here."),
        ("SecurityError", "This browser can't use passkeys here."),
    ],
)
def test_what_the_platform_says_is_said_in_words(
    page: Page, demo: Demo, platform: str, sentence: str
) -> None:
    page.before_scripts(NO_AUTOFILL)
    page.before_scripts(
        f"navigator.credentials.create = () => Promise.reject(new DOMException('secret words', '{platform}'))"
    )
    page.goto(demo.url)
    page.fill(NEW_NAME, fresh_name())
    page.click(CREATE)
    page.wait_for_text(sentence, within="#sign-up-notice")
    assert "secret words" not in page.text()
    assert page.focused() == CREATE, "the focus stays where the visitor was"


def test_a_browser_without_passkeys_is_told_before_it_tries(page: Page, demo: Demo) -> None:
    page.before_scripts("delete globalThis.PublicKeyCredential")
    page.goto(demo.url)
    page.wait_for_text("This browser can't use passkeys here.", within="#unsupported")
    assert page.attribute("#unsupported", "role") == "alert"
    assert page.js(
        "[...document.querySelectorAll('.card button')].filter((b) => !b.hidden && b.checkVisibility()).every((b) => b.disabled)"
    )


def test_a_browser_without_scripts_is_told_why_nothing_happens(page: Page, demo: Demo) -> None:
    page.send("Emulation.setScriptExecutionDisabled", value=True)
    page.goto(demo.url)
    assert "This demo needs JavaScript" in page.text()


def test_this_device_already_has_one(site: Page, device: Authenticator) -> None:
    """Nothing is wrong, so nothing looks like an alarm."""
    sign_up(site)
    site.click(ADD)
    site.wait_for_text(
        "This device already has a passkey for this account.", within="#passkeys-notice"
    )
    assert (site.attribute("#passkeys-notice", "class") or "").split() == ["notice"]
    assert site.count("#flow .exchange.bad") == site.count("#flow .bad") == 0
    site.wait_for_text("3 calls, stopped", within="#flow .exchange[open] .sum")
    assert site.count(".key") == 1
    assert len(device.credentials()) == 1


def test_an_existing_name_is_refused_at_its_field(site: Page, device: Authenticator) -> None:
    name = sign_up(site)
    sign_out(site)
    site.fill(NEW_NAME, name.lower())
    site.click(CREATE)
    site.wait_for_text("is taken", within="#sign-up-notice")
    assert site.focused() == NEW_NAME
    assert site.attribute("#sign-up-name", "aria-invalid") == "true"
    assert "sign-up-notice" in (site.attribute("#sign-up-name", "aria-describedby") or "")
    assert len(device.credentials()) == 1


def test_an_unknown_name_is_refused_at_its_field(site: Page) -> None:
    sign_in(site, "Nobody at all")
    site.wait_for_text("There's no account called “Nobody at all” here.", within="#sign-in-notice")
    assert site.focused() == NAME
    assert site.attribute("#sign-in-name", "aria-invalid") == "true"
    assert (site.attribute("#sign-in-name", "aria-describedby") or "").split()[
        0
    ] == "sign-in-notice"
    field, notice, other = (
        site.js(f"document.querySelector('{part}').getBoundingClientRect().top")
        for part in ("#sign-in-name", "#sign-in-notice", "#without-name")
    )
    assert field < notice < other


def test_autofill_in_the_background_takes_no_sentence_away(
    page: Page, demo: Demo, device: Authenticator
) -> None:
    """The broker is down for the autofill that nobody asked for, before and after the visitor's own
    step.
    """

    def down(request: Request) -> Answer | None:
        if "transaction_id" in (request.body or ""):
            return None
        body = {"code": "service_unavailable", "error": "secret words"}
        return Answer(503, json.dumps(body).encode(), {"Content-Type": "application/json"})

    page.intercept("*/authenticate/transactions/webauthn/start", down)
    page.goto(demo.url)
    page.wait_for_text("Nothing to suggest right now", within="#autofill-hint")
    assert page.js("document.querySelectorAll('.notice:not(:empty)').length") == 0
    assert page.count("#flow .exchange") == 0, "nobody asked, so nothing is shown"
    sign_in(page, "Nobody at all")
    page.wait_for_text("There's no account", within="#sign-in-notice")
    page.wait_for_text("Nothing to suggest right now", within="#autofill-hint")
    tries = len(page.sent("/authenticate/transactions/webauthn/start"))
    page.js("document.activeElement.blur()")
    page.click(NAME)
    page.wait_sent("/authenticate/transactions/webauthn/start", tries + 1)
    page.wait_for_text("Nothing to suggest right now", within="#autofill-hint")
    sentence = "There's no account called “Nobody at all” here. Sign up to make one."
    assert page.text("#sign-in-notice") == page.text("#announcer") == sentence
    assert page.attribute("#sign-in-name", "aria-invalid") == "true"


def test_a_passkey_chosen_from_autofill_and_refused_is_a_sentence_at_the_field(
    page: Page, demo: Demo, device: Authenticator
) -> None:
    page.goto(demo.url)
    page.wait_for_text("Nothing to suggest right now", within="#autofill-hint")
    sign_up(page)
    device.misbehave(bogus_signature=True)
    page.click(OUT)
    page.wait_for_text("This passkey isn't accepted here", within="#sign-in-notice")
    assert (
        page.js("document.querySelector('#flow details[open] h3').textContent")
        == "Sign in from autofill"
    )
    page.wait_for_text("failed", within="#flow .exchange[open] .sum")


@pytest.mark.parametrize(("field", "press"), [("sign-up", CREATE), ("sign-in", SIGN_IN)])
def test_no_name_at_all_is_a_sentence_at_its_field(site: Page, field: str, press: Named) -> None:
    site.click(press)
    site.wait_for_text("Type a name first.", within=f"#{field}-notice")
    assert site.text(f"#{field}-notice") == site.text("#announcer") == "Type a name first."
    assert site.js("document.activeElement.id") == f"{field}-name"
    assert site.attribute(f"#{field}-name", "aria-invalid") == "true"
    assert site.sent(f"/api/{field}/start")[0].status == 400
    other, elsewhere = ("sign-in", SIGN_IN) if field == "sign-up" else ("sign-up", CREATE)
    site.click(elsewhere)
    site.wait_for_text("Type a name first.", within=f"#{other}-notice")
    assert site.count(f"#{field}-notice") == 0
    assert site.attribute(f"#{field}-name", "aria-invalid") == "false"


def test_a_passkey_without_a_name_is_a_sentence_in_the_dialog(site: Page) -> None:
    sign_up(site)
    site.click("#keys .tools button:first-child")
    site.fill(textbox("Name"), "")
    site.press("Delete")
    site.click(button("Save"))
    site.wait_for_text("Type a name first.", within="#label-dialog")
    assert site.text("#label-notice") == "Type a name first."
    assert site.focused() == textbox("Name")
    assert site.attribute("#label-text", "aria-invalid") == "true"
    assert "label-notice" in (site.attribute("#label-text", "aria-describedby") or "")
    assert site.js(AUDIT) == []
    site.click(button("Cancel"))
    site.click("#keys .tools button:first-child")
    assert site.js("document.getElementById('label-text').value") == "Device passkey"
    assert site.attribute("#label-text", "aria-invalid") == "false"
    assert site.count("#label-notice") == 0
    site.fill(textbox("Name"), "Blue key")
    site.click(button("Save"))
    site.wait_for(button("Rename Blue key"))


def test_a_session_that_ended_closes_the_dialog(site: Page) -> None:
    sign_up(site)
    site.click("#keys .tools button:first-child")
    site.wait_for(Named("dialog", "Name this passkey"))
    site.send("Network.clearBrowserCookies")
    site.click(button("Save"))
    site.wait_for_text("You're signed out. Sign in to go on.", within="#visit-notice")
    assert site.count(Named("dialog", "Name this passkey")) == 0


def test_a_list_that_does_not_come_leaves_the_button(site: Page) -> None:
    sign_up(site)

    def down(_: Request) -> Answer:
        body = {"code": "broker_down", "error": "Wait a moment.", "trace": []}
        return Answer(503, json.dumps(body).encode(), {"Content-Type": "application/json"})

    site.intercept("*/demo/api/passkeys", down)
    site.reload()
    site.wait_for_text("Wait a moment.", within="#passkeys-notice")
    site.wait_for(ADD)
    assert site.count("#keys li") == 0


def test_a_broker_that_is_down_is_a_sentence(site: Page) -> None:
    def down(_: Request) -> Answer:
        body = {"code": "service_unavailable", "error": "secret words"}
        return Answer(503, json.dumps(body).encode(), {"Content-Type": "application/json"})

    site.intercept("*/v1/apps/*", down)
    site.click(WITHOUT)
    site.wait_for_text(
        "The passkey service can't be reached right now.", within="#without-name-notice"
    )
    assert "secret words" not in site.text()
    assert "503" in site.text("#flow")


def test_a_site_that_is_down_is_a_sentence(site: Page) -> None:
    site.fill(NEW_NAME, fresh_name())
    site.offline()
    site.click(CREATE)
    site.wait_for_text("This site can't be reached.", within="#sign-up-notice")
    site.offline(False)
    site.click(CREATE)
    site.wait_for(OUT)


def test_a_session_that_ended_leads_back_to_sign_in(site: Page) -> None:
    sign_up(site)
    site.send("Network.clearBrowserCookies")
    site.click(ADD)
    site.wait_for_text("You're signed out. Sign in to go on.", within="#visit-notice")
    assert site.count(ADD) == 0


# For everybody


def tab_to(page: Page, target: Named) -> None:
    """Press Tab until the focus is there, as a person without a mouse does."""
    for _ in range(60):
        page.press("Tab")
        if page.focused() == target:
            return
    raise AssertionError(f"{target} is not reached by Tab")


def test_the_whole_visit_by_keyboard(site: Page) -> None:
    name = fresh_name()
    site.press("Tab")
    assert site.focused() == Named("link", "Skip to the demo")
    site.press("Enter")
    tab_to(site, NEW_NAME)
    site.send("Input.insertText", text=name)
    site.press("Enter")
    site.wait_for_text(f"Hello, {name}")
    site.wait_until("document.activeElement.id === 'account-title'")
    tab_to(site, OUT)
    site.press("Enter")
    site.wait_until("document.activeElement.id === 'sign-in-title'")
    tab_to(site, NAME)
    site.send("Input.insertText", text=name)
    tab_to(site, SIGN_IN)
    site.press("Space")
    site.wait_for_text("You signed in by name.")
    site.wait_until(
        "document.activeElement.id === 'account-title' && !!document.querySelector('.key')"
    )
    tab_to(
        site, button(site.js("document.querySelector('#keys .tools button:last-child').ariaLabel"))
    )
    site.press("Enter")
    site.wait_for(Named("dialog", "Revoke this passkey?"))
    site.press("Escape")
    site.wait_gone(Named("dialog", "Revoke this passkey?"))


def test_the_focus_is_always_visible(site: Page) -> None:
    hidden = []
    for _ in range(60):
        site.press("Tab")
        if site.js("document.activeElement === document.body"):
            break  # round the end of the page
        outline = site.js(
            "(() => { const s = getComputedStyle(document.activeElement);"
            " return [s.outlineStyle, parseFloat(s.outlineWidth), document.activeElement.outerHTML.slice(0, 80)] })()"
        )
        if outline[0] == "none" or outline[1] < 2:
            hidden.append(outline)
    else:
        raise AssertionError("Tab never reaches the end of the page")
    assert hidden == []


def test_the_form_lies_within_the_first_screen_of_a_phone(site: Page) -> None:
    site.view(360, 640)
    bottom = "document.getElementById('sign-up-form').getBoundingClientRect().bottom"
    assert site.js("scrollY") == 0
    assert 0 < site.js(bottom) <= 640
    assert site.count(CREATE) == 1


@pytest.mark.parametrize("width", [320, 360, 1280])
def test_the_brand_link_has_its_name(site: Page, width: int) -> None:
    site.view(width, 640)
    assert site.count(link("passkey broker")) == 1
    tall = "document.querySelector('.top').getBoundingClientRect().height"
    assert site.js(tall) < 70, "one line"


@pytest.mark.parametrize("width", [360, 1280])
def test_nothing_moves_while_the_page_opens(
    page: Page, demo: Demo, device: Authenticator, width: int
) -> None:
    page.before_scripts(NO_AUTOFILL)
    page.view(width, 640 if width == 360 else 900)
    page.goto(demo.url)
    page.wait_for_text("doesn't suggest passkeys")
    assert page.js(SHIFTS) == []


@pytest.mark.parametrize("width", [320, 360, 768, 1280])
def test_nothing_scrolls_sideways(site: Page, width: int) -> None:
    site.view(width, 800)
    measure = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert site.js(measure) == 0
    sign_up(site)
    assert site.js(measure) == 0
    clipped = """[...document.querySelectorAll("main :is(p, h1, h2, h3, button, li, dd, code, input)")]
      .filter((e) => e.checkVisibility() && !e.closest("pre") && !e.closest(".vh") && !e.matches(".vh"))
      .filter((e) => { const r = e.getBoundingClientRect(); return r.right > innerWidth + 0.5 || r.left < -0.5; })
      .map((e) => e.outerHTML.slice(0, 100))"""
    assert site.js(clipped) == []


def test_targets_are_large_enough_for_a_finger(site: Page) -> None:
    site.view(360, 800)
    sign_up(site)
    small = """[...document.querySelectorAll("button, input, summary")].filter((e) => e.checkVisibility())
      .filter((e) => e.getBoundingClientRect().height < 44).map((e) => e.outerHTML.slice(0, 100))"""
    assert site.js(small) == []


AUDIT = r"""(() => {
  const all = (s) => [...document.querySelectorAll(s)].filter((e) => e.checkVisibility());
  const faults = [];
  const say = (what, e) => faults.push(`${what}: ${e.outerHTML.slice(0, 90)}`);
  if (!document.documentElement.lang) faults.push("no language");
  if (!document.title) faults.push("no title");
  if (all("h1").length !== 1) faults.push("not one h1");
  for (const landmark of ["header", "main", "nav", "footer"]) if (!all(landmark).length) faults.push(`no ${landmark}`);
  if (all("main").length !== 1) faults.push("not one main");
  for (const e of all("nav, section"))
    if (!e.ariaLabel && !document.getElementById(e.getAttribute("aria-labelledby"))) say("unnamed region", e);
  for (const e of all("input")) if (!e.labels.length || !e.labels[0].textContent.trim()) say("no label", e);
  for (const e of all("button, a, summary")) if (!(e.ariaLabel || e.textContent.trim() || e.querySelector("img[alt]")?.alt)) say("no name", e);
  for (const e of all("img")) if (!e.hasAttribute("alt")) say("no alt", e);
  for (const e of all("svg")) if (!e.closest("[aria-hidden=true]")) say("drawing read aloud", e);
  const ids = [...document.querySelectorAll("[id]")].map((e) => e.id);
  for (const id of ids) if (ids.indexOf(id) !== ids.lastIndexOf(id)) faults.push(`id twice: ${id}`);
  for (const name of ["aria-labelledby", "aria-describedby", "for"])
    for (const e of document.querySelectorAll(`[${name}]`))
      for (const id of e.getAttribute(name).split(" ")) if (!document.getElementById(id)) say(`${name} leads nowhere`, e);
  for (const e of all("a[href^='#']")) if (!document.getElementById(e.hash.slice(1))) say("link leads nowhere", e);
  let level = 0;
  for (const e of all("h1, h2, h3, h4")) {
    const mine = Number(e.tagName[1]);
    if (mine > level + 1) say("heading skips a level", e);
    level = mine;
  }
  if (document.querySelectorAll("[style], [onclick], style").length) faults.push("inline style or script");
  for (const e of document.querySelectorAll("[tabindex]")) if (e.tabIndex > 0) say("tab order forced", e);
  if (all("[role=status]").length !== 1) faults.push("not one live region");
  return faults;
})()"""


def test_structure_is_there_for_those_who_do_not_see_the_page(site: Page) -> None:
    assert site.js(AUDIT) == []
    sign_up(site)
    assert site.js(AUDIT) == []


# WCAG 2.2, 1.4.3 (text 4.5:1) and 1.4.11 (edges of controls 3:1); colours as computed, backgrounds
# composed from the ancestors.
CONTRAST = r"""(() => {
  const parse = (text) => {
    const n = text.match(/[\d.]+/g).map(Number);
    return text.startsWith("color(srgb") ? [n[0] * 255, n[1] * 255, n[2] * 255, n[3] ?? 1] : [n[0], n[1], n[2], n[3] ?? 1];
  };
  const over = (top, under) => top.slice(0, 3).map((c, i) => c * top[3] + under[i] * (1 - top[3]));
  const behind = (e) => {
    const layers = [];
    for (let at = e; at; at = at.parentElement) layers.push(parse(getComputedStyle(at).backgroundColor));
    return layers.reverse().reduce((under, top) => over(top, under), [255, 255, 255]);
  };
  const light = (c) => {
    const [r, g, b] = c.map((v) => ((v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ratio = (a, b) => { const [x, y] = [light(a), light(b)].sort((p, q) => q - p); return (x + 0.05) / (y + 0.05); };
  const faults = [];
  let judged = 0;
  for (const e of document.querySelectorAll("body *")) {
    if (!e.checkVisibility() || e.closest(".vh, .skip, noscript")) continue;
    if (![...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim())) continue;
    judged += 1;
    const ground = behind(e);
    const found = ratio(over(parse(getComputedStyle(e).color), ground), ground);
    if (found < 4.5 && !e.closest(":disabled")) faults.push(`${found.toFixed(2)} ${e.outerHTML.slice(0, 90)}`);
  }
  for (const e of document.querySelectorAll("input")) {
    if (!e.checkVisibility()) continue;
    const ground = behind(e.parentElement);
    const found = ratio(over(parse(getComputedStyle(e).borderTopColor), ground), ground);
    if (found < 3) faults.push(`edge ${found.toFixed(2)} ${e.outerHTML.slice(0, 90)}`);
  }
  return judged > 40 ? faults : [`only ${judged} texts judged`];
})()"""


@pytest.mark.parametrize("dark", [False, True])
def test_contrast_is_enough_in_both_schemes(site: Page, dark: bool) -> None:
    site.view(1280, 900, dark=dark, prefers_reduced_motion="reduce")
    assert site.js(CONTRAST) == []
    sign_in(site, "Nobody at all")
    site.wait_for_text("There's no account", within="#sign-in-notice")
    assert site.js(CONTRAST) == []
    sign_up(site)
    assert site.js(CONTRAST) == []
    background = site.js("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(12, 18, 16)" if dark else "rgb(244, 246, 242)")


def test_nothing_moves_for_those_who_asked_for_that(site: Page) -> None:
    site.view(1280, 900, prefers_reduced_motion="reduce")
    sign_up(site)
    assert site.js("document.getAnimations().length") == 0


# axe-core's rules for WCAG 2.2 A and AA, and its good practice.
AXE = """axe.run(document, { runOnly: ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"] })
  .then(({ passes, violations }) => ({
    passes: passes.length,
    violations: violations.flatMap(({ id, nodes }) => nodes.map((node) => `${id}: ${node.html.slice(0, 120)} ${node.failureSummary}`)),
  }))"""


def axe_finds_nothing(page: Page) -> None:
    page.js((parts.npm_packages() / "axe-core/axe.min.js").read_text() + ";0")
    told = page.js(AXE, timeout=60)
    assert told["violations"] == []
    assert told["passes"] > 10


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [360, 768, 1280])
def test_axe_finds_nothing_in_any_state(
    site: Page, device: Authenticator, width: int, dark: bool
) -> None:
    site.view(width, 640 if width == 360 else 900, dark=dark, prefers_reduced_motion="reduce")
    axe_finds_nothing(site)  # start

    sign_in(site, "Nobody at all")
    site.wait_for_text("There's no account", within="#sign-in-notice")
    axe_finds_nothing(site)  # a refusal at its field

    device.present(False)
    site.fill(NEW_NAME, fresh_name())
    site.click(CREATE)
    site.wait_for(".waiting")
    site.wait_for_text("Your device asks you to make a passkey.", within="#flow")
    axe_finds_nothing(site)  # waiting for the device
    site.click(CANCEL)
    site.wait_for_text("Cancelled", within="#sign-up-notice")
    device.present(True)

    sign_up(site)
    axe_finds_nothing(site)  # signed in
    site.click(ADD)
    site.wait_for_text("already has a passkey", within="#passkeys-notice")
    site.click(AGAIN)
    site.wait_for_text("Refused, as it should be", within="#again-notice")
    site.js(
        "document.querySelectorAll('#wire details').forEach((details) => (details.open = true))"
    )
    site.click(button("Node"))
    site.js("document.querySelector('details.codes').open = true")
    axe_finds_nothing(site)  # all of the wire and of the code opened
    site.click("#keys .tools button:last-child")
    site.wait_for(Named("dialog", "Revoke this passkey?"))
    axe_finds_nothing(site)  # a dialog with a warning
    site.press("Escape")
    site.click("#keys .tools button:first-child")
    site.fill(textbox("Name"), "<")
    site.press("Enter")
    site.wait_for_text("Use letters", within="#label-notice")
    axe_finds_nothing(site)  # a dialog with a refusal


# What the page shows of itself


def test_a_nonce_redeemed_again_is_refused(site: Page) -> None:
    sign_up(site)
    nonce = finished(site, "/api/sign-up/finish")["nonce"]
    site.click(AGAIN)
    site.wait_for_text("Refused, as it should be: 401 invalid_nonce.", within="#again-notice")
    shown = site.text("#alarm-notice")
    assert re.fullmatch(r"Replay alarm: this nonce was redeemed at .+ and again at .+ now\.", shown)
    assert site.text("#announcer") == f"{site.text('#again-notice')} {shown}"
    hops = site.js(
        "[...document.querySelectorAll('#flow .exchange[open] .hop')].map((hop) => hop.textContent)"
    )
    first_words = [" ".join(hop.split(": ", 1)[1].split()[:2]) for hop in hops]
    assert first_words[:2] == ["POST /demo/api/redeem-again", "POST /authenticate/verify"]
    assert [words.split()[0] for words in first_words[2:]] == ["401", "GET", "200", "200"]
    assert "invalid_nonce" in hops[2]
    assert f"{nonce[:8]}…{nonce[-2:]}" in hops[1], "the nonce of the receipt"
    assert nonce not in site.js("document.documentElement.innerHTML")
    sign_out(site)
    site.click(WITHOUT)
    site.wait_for_text("You signed in without typing a name.")
    assert site.count("#again-notice") == site.count("#alarm-notice") == 0
    site.click(AGAIN)
    site.wait_for_text("401 invalid_nonce", within="#again-notice")


@pytest.fixture
def clipboard(page: Page, demo: Demo) -> Callable[[], str]:
    """What the page has copied."""
    allowed = ["clipboardReadWrite", "clipboardSanitizedWrite"]
    page.browser.send(
        "Browser.grantPermissions",
        permissions=allowed,
        origin=demo.origin,
        browserContextId=page.context,
    )
    return lambda: str(page.js("navigator.clipboard.readText()"))


def test_each_call_opens_to_its_json_and_can_be_copied_as_curl(
    site: Page, demo: Demo, clipboard: Callable[[], str]
) -> None:
    name = sign_up(site)
    nonce = finished(site, "/api/sign-up/finish")["nonce"]
    (session,) = (cookie["value"] for cookie in site.cookies() if cookie["name"] == "demo_session")
    assert site.count("#flow .raw") == 0, "folded until somebody wants it"
    for answer in site.js(
        "[...document.querySelectorAll('#flow .back .what')].map((e) => e.textContent)"
    ):
        assert re.search(r"\b20[01] [\d.]+ ms$", answer), answer
    assert re.fullmatch(r"\d\d:\d\d:\d\d", site.text("#flow time"))

    first, second = (f"#flow .hop:nth-child({n})" for n in (1, 2))
    site.click(f"{first} summary")
    assert json.loads(site.text(f"{first} pre")) == {"name": name}
    site.click(f"{second} summary")
    sent = json.loads(site.text(f"{second} pre"))
    assert sent["passkey_display_name"] == name
    assert re.fullmatch(".{8}….{2}", sent["external_id"]), "cut"
    site.click(f"{second} .copy")
    site.wait_for_text("Copied", within=f"{second} .copy")
    command = clipboard()
    assert "Authorization: Bearer $BROKER_API_KEY" in command
    ran = subprocess.run(
        ["sh", "-c", command + " -sS --noproxy '*'"],
        env={**os.environ, "BROKER_URL": demo.origin, "BROKER_API_KEY": demo.key},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(ran.stdout)["transaction_id"].startswith("pbt_"), "with a key it works"

    site.js(
        "document.querySelectorAll('#wire details').forEach((details) => (details.open = true))"
    )
    copied = []
    for number in range(site.js("document.querySelectorAll('#flow .copy').length")):
        site.js(f"document.querySelectorAll('#flow .copy')[{number}].click()")
        site.wait_until(
            f"document.querySelectorAll('#flow .copy')[{number}].textContent === 'Copied'"
        )
        copied.append(clipboard())
    assert len(copied) == 9
    assert '--data \'{"nonce":"<nonce>"' in copied[4]
    shown = site.js("document.documentElement.innerHTML")
    for secret in (demo.key, nonce, session):
        assert secret not in shown + "".join(copied)


def test_a_name_with_a_quote_stays_one_word_of_the_command(
    site: Page, clipboard: Callable[[], str]
) -> None:
    name = f"O'Neil & (co) {fresh_name()}"
    site.fill(NEW_NAME, name)
    site.click(CREATE)
    site.wait_for_text(f"Hello, {name}")
    site.js(
        "document.querySelectorAll('#flow .hop details').forEach((details) => (details.open = true))"
    )
    site.click("#flow .hop:nth-child(1) .copy")
    site.wait_for_text("Copied", within="#flow .hop:nth-child(1) .copy")
    words = shlex.split(clipboard().replace("\\\n", ""))
    assert json.loads(words[words.index("--data") + 1]) == {"name": name}


def test_look_ups_are_folded(site: Page) -> None:
    sign_up(site)
    site.wait_for_text("3 look-ups", within="#flow .lookups")
    assert site.count("#flow .lookups .hop") == 0
    site.click("#flow .lookups summary")
    site.wait_until("document.querySelector('#flow .lookups details').open")
    assert site.count("#flow .lookups .hop:not(.back)") == 3
    site.wait_for_text("6 calls, done", within="#flow .sum")


@pytest.mark.parametrize("width", [360, 1280])
def test_the_title_of_the_wire_stays_in_sight(site: Page, width: int) -> None:
    site.view(width, 640)
    sign_up(site)
    site.js(
        "document.querySelectorAll('#flow .hop details').forEach((details) => (details.open = true))"
    )
    site.js("document.querySelector('#flow .verdict').scrollIntoView({ block: 'end' })")
    site.js("document.getElementById('flow').scrollTop = 1e6")
    for title in ("#wire-title", "#wire .lanes"):
        box = site.js(
            f"(({{ top, bottom }}) => [top, bottom])(document.querySelector('{title}').getBoundingClientRect())"
        )
        assert 50 < box[0] < box[1] < 300, title


@pytest.mark.parametrize("language", ["Python", "Node", "curl"])
def test_the_code_is_shown_in_the_language_of_the_backend(
    site: Page, clipboard: Callable[[], str], language: str
) -> None:
    site.click(button(language))
    pressed = (
        "[...document.querySelectorAll('#language [aria-pressed=true]')].map((e) => e.textContent)"
    )
    assert site.js(pressed) == [language]
    assert site.count("#code > .codes figure:not(:nth-child(2)) pre") == 2
    for number in (1, 2, 3):
        site.click(f"#code > div figure:nth-child({number}) .copy")
        site.wait_for_text("Copied", within=f"#code > div figure:nth-child({number}) .copy")
        assert clipboard() == site.js(
            f"document.querySelector('#code > div figure:nth-child({number}) pre:not([hidden])').textContent"
        )
    assert site.count("details.codes figure") == 0, "look-ups are folded"
    site.click("details.codes summary")
    site.wait_for("details.codes figure")


def test_a_clipboard_that_is_forbidden_is_said(site: Page, demo: Demo) -> None:
    site.js(
        "navigator.clipboard.writeText = () => Promise.reject(new DOMException('no', 'NotAllowedError'))"
    )
    site.click("#code figure:nth-child(1) .copy")
    site.wait_for_text("Not allowed", within="#code figure:nth-child(1) .copy")


def test_the_footer_leads_to_documentation_and_source(site: Page) -> None:
    links = site.js(
        "[...document.querySelectorAll('footer a')].map((a) => [a.textContent, a.getAttribute('href')])"
    )
    assert [text for text, _ in links] == [
        "Documentation",
        "Source: backend",
        "Source: page",
        "Backend SDK",
        "Page SDK",
    ]
    for _, address in links:
        assert address.startswith("/"), "no host is made up"
        assert site.js(f"fetch('{address}').then((answer) => answer.status)") == 200


def test_links_to_steps_that_are_hidden_say_what_to_do_first(site: Page) -> None:
    site.click(Named("link", "Revoke one"))
    site.wait_for_text("Sign up or sign in first", within="#sign-up-notice")
    sign_up(site)
    site.click(Named("link", "Sign in by name"))
    site.wait_for_text("Sign out first", within="#account-notice")


def test_the_diagram_can_be_cleared(site: Page) -> None:
    sign_up(site)
    site.click(button("Clear"))
    site.wait_for_text("Nothing has travelled yet.", within="#flow")
    assert site.count("#flow .hop") == 0


def test_a_name_is_shown_as_text_wherever_it_comes_from(site: Page) -> None:
    """Were a hostile name to pass the backend, the page still shows it as text (and the policy
    forbids it to act).
    """

    markup = "<img src=x onerror=document.title='owned'>"

    def hostile(request: Request) -> Answer:
        account = {"name": markup, "external_id": markup, "since": time.time()}
        key = {
            "id": "A" * 24,
            "label": markup,
            "name": markup,
            "kind": "passkey",
            "created_at": "2026-01-01T00:00:00Z",
        }
        body = {"app_id": "A" * 24, "account": account, "passkeys": [key], "trace": []}
        return Answer(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

    site.intercept("*/demo/api/*", hostile)
    site.reload()
    site.wait_for_text("Hello, <img src=x")
    site.wait_for(button(f"Revoke {markup}"))
    assert site.js("document.title") == "Passkey broker: live demo"
    assert site.count("#account img, #passkeys img") == 0

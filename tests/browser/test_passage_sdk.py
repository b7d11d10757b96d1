"""The vendor's own browser SDK, unmodified, in a real Chromium against a running broker: what
works, and what it shows when not.
"""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import replace

import pytest

from broker.ceremony.reasons import refuse
from broker.errors import CeremonyRefused, DiscoverableRefused, UnknownTransaction
from tests.browser.chromium import Authenticator, Chromium, Page, wait_until
from tests.conftest import OpenApp, Started, Starter
from tests.sdk.passage import HOST, PACKAGES, Name, Outcome, Site, Way, body, held_name, opened_site
from tests.support.wire import Wire

REGISTER = "/register/transactions/webauthn/"
AUTHENTICATE = "/authenticate/transactions/webauthn/"
NOT_FOUND = {"name": "PassageError", "message": UnknownTransaction.default, "statusCode": 404}
UNVERIFIED_USER = refuse("user_verification", "").sentence
UNVERIFIED = {"name": "PassageError", "statusCode": 401}

both_versions = pytest.mark.parametrize("version", PACKAGES)
both_ways = pytest.mark.parametrize("way", ["redirected", "overridden"])


@pytest.fixture(scope="module")
def name(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Name]:
    with held_name(tmp_path_factory.mktemp("tls")) as held:
        yield held


@pytest.fixture(scope="module")
def chromium(name: Name) -> Iterator[Chromium]:
    rules = f"MAP {HOST} 127.0.0.1:{name.port} , MAP * ~NOTFOUND , EXCLUDE localhost , EXCLUDE 127.0.0.1"
    flags = (
        f"--host-resolver-rules={rules}",
        f"--ignore-certificate-errors-spki-list={name.key_hash}",
    )
    with Chromium(flags) as browser:
        yield browser


@pytest.fixture
def device(page: Page) -> Authenticator:
    return page.authenticator()


@pytest.fixture
async def site(page: Page, broker: Started, open_app: OpenApp, name: Name) -> AsyncIterator[Site]:
    async with opened_site(page, broker, open_app, name) as opened:
        yield opened


# -- what works ------------------------------------------------------------------------------------


@both_versions
@both_ways
async def test_registers_and_signs_in(
    site: Site, device: Authenticator, version: str, way: Way
) -> None:
    """Register, sign in by transaction and without one; each nonce buys once, and only what it was
    made for.
    """
    await site.open(version, way)
    transaction = await site.wire.open_registration("ann@example.org", "Ann's key")
    outcome = await site.register(transaction)
    receipt = await site.redeemed(outcome, purpose="register", transaction_id=transaction)
    assert receipt["external_id"] == "ann@example.org"
    [kept] = device.credentials()
    assert kept["userName"] == "Ann's key"
    assert base64.urlsafe_b64decode(receipt["credential_id"] + "==") == base64.b64decode(
        kept["credentialId"]
    )

    transaction = await site.wire.open_authentication("ann@example.org")
    for named in (transaction, None):
        outcome = await site.authenticate(named)
        expected = {"transaction_id": named} if named else {}
        used = await site.redeemed(
            outcome, purpose="authenticate", external_id="ann@example.org", **expected
        )
        assert used["passkey_id"] == receipt["passkey_id"]

    replayed = ("nonce.replayed", "refused", "nonce_replayed")
    assert await site.broker.events(site.wire.app_id) == [
        ("app.created", "done", None),
        ("user.created", "done", None),
        ("passkey.registered", "done", None),
        ("passkey.confirmed", "done", None),
        replayed,
        ("passkey.used", "done", None),
        replayed,
        ("passkey.used", "done", None),
        replayed,
    ]
    steps = [verb + step for verb in (REGISTER, AUTHENTICATE) for step in ("start", "finish")]
    assert site.served("OPTIONS") == [
        (step, 204) for step in steps
    ]  # the browser asked before each new URL
    assert site.served("POST") == [(step, 200) for step in steps + steps[2:]]


async def test_what_1_0_2_sends(site: Site, device: Authenticator) -> None:
    """JSON with its own header; `transports` beside `response`; no transaction where none was
    given.
    """
    await site.open()
    transaction = await site.wire.open_registration("ann")
    receipt = await site.redeemed(await site.register(transaction))
    await site.redeemed(await site.authenticate())
    start, finish = site.posted(REGISTER + "start")[0], site.posted(REGISTER + "finish")[0]
    for request in (start, finish):
        assert request.url.startswith(f"https://{HOST}/v1/apps/{site.wire.app_id}/")
        assert request.headers["Passage-Flex-Version"] == "@passageidentity/passage-flex-js 1.0.2"
        assert request.headers["Content-Type"] == "application/json"
    assert body(start) == {"transaction_id": transaction, "authenticator_attachment": "platform"}
    answered = body(finish)["handshake_response"]
    assert answered["transports"] == ["internal"]
    assert set(answered["response"]) == {"attestationObject", "clientDataJSON"}
    [kept] = await site.devices("ann")
    assert (kept["id"], kept["transports"]) == (receipt["passkey_id"], ["internal"])

    start, finish = site.posted(AUTHENTICATE + "start")[0], site.posted(AUTHENTICATE + "finish")[0]
    assert body(start) == {}
    assert "transaction_id" not in body(finish)


async def test_what_0_1_3_sends(site: Site, device: Authenticator) -> None:
    """A GET of the app at construction, text/plain, and no body at all at the start of a sign-in
    without a transaction.
    """
    await site.open("0.1.3")
    asked = await asyncio.to_thread(site.page.wait_sent, f"/v1/apps/{site.wire.app_id}", 1, "GET")
    assert (asked.url.split("/v1/")[0], asked.status) == (f"https://{HOST}", 200)
    await asyncio.to_thread(
        site.page.wait_until, "pf.isWebauthnSupported"
    )  # auth_origin is the page's
    transaction = await site.wire.open_registration("ann")
    await site.redeemed(await site.register(transaction))
    await site.redeemed(await site.authenticate())
    start, finish = site.posted(REGISTER + "start")[0], site.posted(REGISTER + "finish")[0]
    for request in (start, finish):
        headers = {key.lower(): value for key, value in request.headers.items()}
        assert headers["passage-flex-version"] == "@passageidentity/passage-flex-js 0.1.3"
        assert headers["content-type"] == "text/plain;charset=UTF-8"
    assert body(start) == {"transaction_id": transaction, "authenticator_attachment": "platform"}

    start = site.posted(AUTHENTICATE + "start")[0]
    assert start.body is None
    assert "content-type" not in {key.lower() for key in start.headers}


async def test_0_1_3_on_any_registered_origin(site: Site, device: Authenticator) -> None:
    """Its constructor compares `auth_origin` with the page's and rejects where they differ (711),
    which nobody can catch. It is told the page's own origin where that is registered, be it the
    first or not."""
    app = await site.broker.parts.directory.app(site.wire.app_id)
    await site.broker.parts.directory.update_app(replace(app, origins=(site.stranger, site.origin)))
    for origin in (site.stranger, site.origin):
        await site.open("0.1.3", origin=origin)
        await asyncio.to_thread(site.page.wait_until, "pf.isWebauthnSupported")
        assert site.page.errors == []
    assert (await site.enrol("ann"))["external_id"] == "ann"
    app = await site.broker.parts.directory.app(site.wire.app_id)
    await site.broker.parts.directory.update_app(replace(app, origins=(site.stranger,)))
    await site.open("0.1.3")
    await asyncio.to_thread(wait_until, lambda: site.page.errors, "unhandled rejection")
    assert "auth_origin" in site.page.errors.pop()


@pytest.mark.parametrize(
    ("asked", "plugged", "chosen"),
    [
        (None, ("usb", "internal"), "internal"),
        ("platform", ("usb", "internal"), "internal"),
        ("cross-platform", ("usb", "internal"), "usb"),
        ("any", ("internal",), "internal"),
        ("any", ("usb",), "usb"),
    ],
)
async def test_attachment(
    site: Site, asked: str | None, plugged: tuple[str, ...], chosen: str
) -> None:
    """The SDK applies no attachment of its own: the options say which authenticator may answer."""
    devices = {transport: site.page.authenticator(transport=transport) for transport in plugged}
    await site.open()
    outcome = await site.register(await site.wire.open_registration("ann"), asked)
    await site.redeemed(outcome, purpose="register")
    sent = body(site.posted(REGISTER + "start")[0])["authenticator_attachment"]
    assert sent == (asked or "platform")
    assert {t: len(d.credentials()) for t, d in devices.items()} == {
        t: int(t == chosen) for t in plugged
    }
    [kept] = await site.devices("ann")
    assert kept["transports"] == [chosen]
    await site.redeemed(await site.authenticate(await site.wire.open_authentication("ann")))


@both_versions
async def test_autofill(site: Site, device: Authenticator, version: str) -> None:
    await site.open(version)
    await site.enrol("ann")
    await site.open(version)  # register() ended autofill for the rest of that document
    outcome = await site.authenticate(autofill=True)
    assert (await site.redeemed(outcome, purpose="authenticate"))["external_id"] == "ann"
    assert "transaction_id" not in body(site.posted(AUTHENTICATE + "finish")[0])


async def test_autofill_drops_the_transaction(site: Site, device: Authenticator) -> None:
    """1.0.2 leaves out the transaction it was given, so the nonce is of no transaction and the
    backend sees that.
    """
    await site.open()
    await site.enrol("ann")
    await site.open()
    transaction = await site.wire.open_authentication("ann")
    outcome = await site.authenticate(transaction, autofill=True)
    assert body(site.posted(AUTHENTICATE + "start")[0]) == {}
    answer = await site.wire.redeem(outcome["nonce"], transaction_id=transaction)
    assert (answer.status, answer.code) == (401, "invalid_nonce")
    await site.redeemed(await site.authenticate(transaction), transaction_id=transaction)


@both_versions
async def test_a_modal_call_ends_autofill_for_good(
    site: Site, device: Authenticator, version: str
) -> None:
    """The SDK has one AbortController a document. What that leaves behind here is a start without a
    finish, which harms nothing.
    """
    site.page.before_scripts(ASKED)
    await site.open(version)
    await site.enrol("ann")
    await site.open(version)
    device.present(False)
    await site.js(
        "void (window.waiting = told(pf.passkey.authenticate({isConditionalMediation: true})))"
    )
    await asyncio.to_thread(site.page.wait_until, "window.asked === 1")
    device.present(True)
    transaction = await site.wire.open_authentication("ann")
    await site.redeemed(await site.authenticate(transaction), transaction_id=transaction)
    assert (await site.js("window.waiting"))["statusCode"] == 702

    assert (await site.authenticate(autofill=True))["statusCode"] == 702
    assert len(site.posted(AUTHENTICATE + "start")) == 3
    assert len(site.posted(AUTHENTICATE + "finish")) == 1
    await site.redeemed(await site.authenticate(), external_id="ann")


ASKED = """
  window.asked = 0;
  const get = navigator.credentials.get.bind(navigator.credentials);
  navigator.credentials.get = (options) => {
    const answer = get(options);
    window.asked += 1;
    return answer;
  };
"""


async def test_second_device(site: Site, device: Authenticator) -> None:
    """The device that has the passkey refuses another; the transaction it was refused for makes one
    on the next device.
    """
    await site.open()
    first = await site.enrol("ann")
    transaction = await site.wire.open_registration("ann", "Ann's stick")
    outcome = await site.register(transaction)
    assert (outcome["statusCode"], outcome["message"]) == (707, "Error creating creadential")
    assert "already registered" in outcome["statusText"]
    assert len(site.posted(REGISTER + "finish")) == 1
    assert len(await site.devices("ann")) == 1

    stick = site.page.authenticator(transport="usb")
    outcome = await site.register(transaction, "cross-platform")
    second = await site.redeemed(outcome, purpose="register", transaction_id=transaction)
    assert second["user_id"] == first["user_id"]
    assert {kept["id"] for kept in await site.devices("ann")} == {
        first["passkey_id"],
        second["passkey_id"],
    }
    assert device.credentials()[0]["userHandle"] == stick.credentials()[0]["userHandle"]


async def test_support_is_known_without_a_request(site: Site) -> None:
    await site.open()
    assert await site.js("pf.passkey.canRegisterPasskey()") is True
    assert await site.js("pf.passkey.canAuthenticateWithPasskey()") is True
    assert [request for request in site.page.requests if HOST in request.url] == []


# -- beside our own SDK ----------------------------------------------------------------------------


async def ours(site: Site, call: str) -> Outcome:
    """What a page learns from `passkey.js`, which the broker serves."""
    module, app_id = json.dumps(f"{site.broker_url}/sdk/passkey.js"), json.dumps(site.wire.app_id)
    passkeys = f"new Passkeys({json.dumps(site.broker_url)}, {app_id})"
    return await site.told(f"import({module}).then(({{ Passkeys }}) => {passkeys}.{call})")


@both_versions
async def test_a_passkey_of_the_sdk_works_in_ours(
    site: Site, device: Authenticator, version: str
) -> None:
    await site.open(version)
    receipt = await site.enrol("ann")
    transaction = await site.wire.open_authentication("ann")
    for options in (json.dumps({"transactionId": transaction}), "", "{conditional: true}"):
        used = await site.redeemed(await ours(site, f"authenticate({options})"), external_id="ann")
        assert used["passkey_id"] == receipt["passkey_id"]


@both_versions
async def test_a_passkey_of_ours_works_in_the_sdk(
    site: Site, device: Authenticator, version: str
) -> None:
    await site.open(version)
    transaction = await site.wire.open_registration("ann")
    receipt = await site.redeemed(await ours(site, f"register({json.dumps(transaction)})"))
    outcomes = [
        await site.authenticate(autofill=True),
        await site.authenticate(await site.wire.open_authentication("ann")),
        await site.authenticate(),
    ]
    for outcome in outcomes:
        used = await site.redeemed(outcome, external_id="ann", purpose="authenticate")
        assert used["passkey_id"] == receipt["passkey_id"]


# -- what is refused -------------------------------------------------------------------------------

Made = Callable[[Site, Wire], Awaitable[str]]  # a transaction id; the second app is another one


async def _used_register(site: Site, _: Wire) -> str:
    transaction = await site.wire.open_registration("ann")
    await site.redeemed(await site.register(transaction))
    return transaction


async def _used_authenticate(site: Site, _: Wire) -> str:
    await site.enrol("ann")
    transaction = await site.wire.open_authentication("ann")
    await site.redeemed(await site.authenticate(transaction))
    return transaction


async def _register_kind(site: Site, _: Wire) -> str:
    return await site.wire.open_registration("ann")


async def _authenticate_kind(site: Site, _: Wire) -> str:
    await site.enrol("ann")
    return await site.wire.open_authentication("ann")


async def _foreign(_: Site, other: Wire) -> str:
    return await other.open_registration("ann")


async def _unknown(_: Site, __: Wire) -> str:
    return "pbt_" + "A" * 43


async def _vendors(_: Site, __: Wire) -> str:
    return "4fXbM0gXkOqmvGk8Yl2hwnRz"  # the vendor's own look


@pytest.mark.parametrize(
    ("verb", "made"),
    [
        ("register", _unknown),
        ("register", _vendors),
        ("register", _used_register),
        ("register", _authenticate_kind),
        ("register", _foreign),
        ("authenticate", _unknown),
        ("authenticate", _vendors),
        ("authenticate", _used_authenticate),
        ("authenticate", _register_kind),
        ("authenticate", _foreign),
    ],
)
async def test_a_transaction_that_is_none(
    site: Site, open_app: OpenApp, device: Authenticator, verb: str, made: Made
) -> None:
    """Unknown, used, of the other kind, of another app: the page sees one answer, and the person no
    prompt.
    """
    other = await open_app(rp_id="localhost", origins=(site.origin,))
    await site.open()
    transaction = await made(site, other)
    prompts, refused = len(device.events), len(site.posted(f"/{verb}/transactions/webauthn/finish"))
    outcome = await (site.register if verb == "register" else site.authenticate)(transaction)
    assert outcome == outcome | NOT_FOUND
    assert site.served("POST")[-1] == (f"/{verb}/transactions/webauthn/start", 404)
    assert len(device.events) == prompts
    assert len(site.posted(f"/{verb}/transactions/webauthn/finish")) == refused


async def test_0_1_3_shows_the_same_sentence(site: Site, device: Authenticator) -> None:
    await site.open("0.1.3")
    outcome = await site.register("pbt_" + "A" * 43)
    assert outcome == outcome | NOT_FOUND


async def test_an_empty_transaction(site: Site, device: Authenticator) -> None:
    """Registration needs one (400); a sign-in with an empty one is a sign-in without."""
    await site.open()
    await site.enrol("ann")
    outcome = await site.register("")
    assert (outcome["name"], outcome["statusCode"]) == ("PassageError", 400)
    assert "transaction_id" in outcome["message"]
    await site.redeemed(await site.authenticate(""), external_id="ann")
    assert body(site.posted(AUTHENTICATE + "start")[0]) == {"transaction_id": ""}


@both_ways
@pytest.mark.parametrize("verb", ["register", "authenticate"])
async def test_an_origin_that_is_not_registered(
    site: Site, device: Authenticator, verb: str, way: Way
) -> None:
    """The preflight is granted, so the browser shows the SDK the refusal, and the page can say
    which origin is not registered.
    """
    await site.open()
    await site.enrol("ann")
    await site.open(way=way, origin=site.stranger)
    already, refusals = len(site.served("POST")), _refusals(site, "operation_not_allowed", "origin")
    opened = site.wire.open_registration if verb == "register" else site.wire.open_authentication
    outcome = await (site.register if verb == "register" else site.authenticate)(
        await opened("ann")
    )
    sentence = f"This page's origin {site.stranger} is not registered for the app;"
    assert (outcome["name"], outcome["statusCode"]) == ("PassageError", 403)
    assert outcome["message"].startswith(sentence)
    start = f"/{verb}/transactions/webauthn/start"
    assert (site.served("OPTIONS")[-1], site.served("POST")[already:]) == (
        (start, 204),
        [(start, 403)],
    )
    assert _refusals(site, "operation_not_allowed", "origin") == refusals + 1


def _refusals(site: Site, code: str, reason: str) -> float:
    return site.broker.metric("broker_refusals_total", code=code, reason=reason)


@pytest.mark.parametrize("named", [True, False], ids=["transaction", "discoverable"])
@pytest.mark.parametrize(
    ("fault", "reason", "sentence"),
    [
        ("bogus_signature", "signature", CeremonyRefused.default),
        ("bad_uv", "user_verification", UNVERIFIED_USER),
        ("bad_up", "user_presence", refuse("user_presence", "").sentence),
    ],
)
async def test_an_answer_that_does_not_verify(
    site: Site, device: Authenticator, fault: str, reason: str, sentence: str, named: bool
) -> None:
    """401 with a sentence, an event for the operator; the same transaction then serves an honest
    answer.
    """
    await site.open()
    await site.enrol("ann")
    transaction = await site.wire.open_authentication("ann") if named else None
    device.misbehave(**{fault: True})
    outcome = await site.authenticate(transaction)
    message = sentence if named else DiscoverableRefused.default
    assert outcome == outcome | UNVERIFIED | {"message": message}
    assert site.served("POST")[-1] == (AUTHENTICATE + "finish", 401)
    told = ("passkey.used", "refused", reason) in await site.broker.events(site.wire.app_id)
    assert told == (transaction is not None), "an event tells of somebody whom the backend named"
    assert (
        _refusals(site, "webauthn_login_failed" if named else "discoverable_login_failed", reason)
        == 1
    )
    device.misbehave()
    expected = {"transaction_id": transaction} if transaction else {}
    await site.redeemed(await site.authenticate(transaction), external_id="ann", **expected)


async def test_a_registration_that_does_not_verify(site: Site, device: Authenticator) -> None:
    await site.open()
    transaction = await site.wire.open_registration("ann")
    device.misbehave(bad_uv=True)
    outcome = await site.register(transaction)
    assert outcome == outcome | UNVERIFIED | {"message": UNVERIFIED_USER}
    assert await site.devices("ann") == []
    assert (await site.broker.events(site.wire.app_id))[-1] == (
        "passkey.registered",
        "refused",
        "user_verification",
    )
    device.misbehave()
    device.forget()
    await site.redeemed(await site.register(transaction), transaction_id=transaction)


@both_versions
async def test_user_verification_that_fails(
    site: Site, device: Authenticator, version: str
) -> None:
    """The authenticator refuses, so nothing is sent; the transactions are as they were."""
    await site.open(version)
    await site.enrol("ann")
    registration = await site.wire.open_registration("ben")
    authentication = await site.wire.open_authentication("ann")
    finished = [len(site.posted(verb + "finish")) for verb in (REGISTER, AUTHENTICATE)]
    device.verified(False)
    assert (await site.register(registration))["statusCode"] == 707
    assert (await site.authenticate(authentication))["statusCode"] == 702
    assert (await site.authenticate())["statusCode"] == 702
    assert [len(site.posted(verb + "finish")) for verb in (REGISTER, AUTHENTICATE)] == finished
    device.verified(True)
    await site.redeemed(await site.authenticate(authentication), transaction_id=authentication)
    await site.redeemed(await site.register(registration), transaction_id=registration)


async def test_a_revoked_passkey(site: Site, device: Authenticator) -> None:
    """The device still offers it; the broker no longer takes it."""
    await site.open()
    receipt = await site.enrol("ann")
    revoked = await site.wire.keyed(
        "DELETE", f"/users/{receipt['user_id']}/devices/{receipt['passkey_id']}"
    )
    assert revoked.status == 200
    outcome = await site.authenticate()
    assert outcome == outcome | UNVERIFIED | {"message": DiscoverableRefused.default}
    assert _refusals(site, "discoverable_login_failed", "unknown_credential") == 1


@both_ways
async def test_a_broker_that_is_down(
    site: Site, start_broker: Starter, device: Authenticator, way: Way
) -> None:
    """A network failure, not a hang; another broker on the same stores takes the transaction up."""
    await site.open(way=way)
    await site.enrol("ann")
    transaction = await site.wire.open_authentication("ann")
    await site.broker.service.close()
    assert (await site.authenticate(transaction))["name"] == "FetchError"
    site.broker = await start_broker()
    site.doorway.port = site.broker.service.port
    site.wire.url = site.broker.url
    if way == "overridden":
        await site.js(f"void point(pf, {json.dumps(site.broker_url)})")
    await site.redeemed(await site.authenticate(transaction), transaction_id=transaction)

"""The sample site's backend, over HTTP, on a real broker: what a visitor can do, and what an
attacker can't.

A `Visitor` is a browser reduced to what matters here: one cookie, an Origin header, and a software
authenticator that answers the broker. Attacks are sent as a browser, or a program, would send them;
each test looks at the answer and at what is true after.
"""

from __future__ import annotations

import asyncio
import html
import io
import json
import os
import re
import secrets
import sqlite3
import stat
import textwrap
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import orjson
import pytest
from aiohttp import web

from broker.app import Parts, Service, application, assemble, serve
from broker.demo import demo_app
from broker.demo.accounts import (
    CEREMONY_LIFE,
    NAME_LIMIT,
    RESERVATION_LIFE,
    SESSION_LIFE,
    InvalidName,
    parse_name,
)
from broker.demo.api import routes
from broker.demo.guard import BODY_LIMIT, COOKIE, REDEMPTIONS
from broker.demo.replay import REDEMPTION_LIFE, REDEMPTION_LIMIT, LastRedemptions, Redemption
from broker.demo.wire import BODY_SHOWN, redacted, short
from broker.embedded import EmbeddedStores
from broker.errors import Fault
from broker.sdk.passkey_broker import AsyncBrokerClient
from broker.telemetry import Log
from tests.conftest import Clock, settings_for
from tests.support import parts
from tests.support.authenticator import Authenticator, flex_wire_form

ROOT = Path(__file__).parents[2]
POSTS = sorted(
    route.path.replace("{passkey_id:[A-Za-z0-9]{24}}", "A" * 24)
    for route in routes
    if isinstance(route, web.RouteDef) and route.method == "POST"
)


@dataclass(slots=True)
class Reply:
    status: int
    headers: Any
    body: bytes

    @property
    def json(self) -> Any:
        return orjson.loads(self.body)

    @property
    def code(self) -> str:
        """The refusal's code; each has a sentence that ends like one."""
        assert self.json["error"].endswith((".", "?")), self.body
        return str(self.json["code"])


@dataclass(slots=True)
class Site:
    """The demo, mounted on a broker as `broker dev` mounts it."""

    service: Service
    session: aiohttp.ClientSession
    clock: Clock
    data: Path
    app_id: str
    key: str
    subapp: web.Application
    log: io.StringIO

    @property
    def origin(self) -> str:
        return f"http://localhost:{self.service.port}"

    @property
    def parts(self) -> Parts:
        return self.service.parts

    def visitor(self) -> Visitor:
        return Visitor(self)

    def database(self) -> sqlite3.Connection:
        return sqlite3.connect(self.data / "demo.sqlite3", isolation_level=None)


@dataclass(slots=True)
class Visitor:
    site: Site
    device: Authenticator = field(default_factory=Authenticator)
    cookie: str | None = None
    cookie_name: str = COOKIE
    transaction: str = "pbt_none"  # the last one that the site gave
    set_cookies: list[str] = field(default_factory=list)

    async def send(
        self,
        method: str,
        path: str,
        body: object = None,
        *,
        data: Any = None,
        origin: str | None = "",
        content_type: str = "application/json",
    ) -> Reply:
        """One request to the demo; `origin` "" means the site's own, None sends none."""
        headers = {"Content-Type": content_type} if method == "POST" else {}
        if origin is not None and method == "POST":
            headers["Origin"] = origin or self.site.origin
        if self.cookie:
            headers["Cookie"] = f"{self.cookie_name}={self.cookie}"
        url = f"{self.site.origin}/demo{path}"
        sent = orjson.dumps(body) if data is None and method == "POST" else data
        async with self.site.session.request(
            method, url, data=sent, headers=headers, allow_redirects=False
        ) as response:
            for line in response.headers.getall("Set-Cookie", []):
                self.set_cookies.append(line)
                self.cookie_name, _, token = line.split(";")[0].partition("=")
                self.cookie = token.strip('"') or None
            reply = Reply(response.status, response.headers, await response.read())
        if path.endswith("/start") and reply.status == 200:
            self.transaction = reply.json["transaction_id"]
        return reply

    async def post(self, path: str, **body: object) -> Reply:
        """As the page does: a ceremony's end names the transaction that its start gave."""
        named = {"transaction_id": self.transaction} if path.endswith("/finish") else {}
        return await self.send("POST", path, named | body)

    async def get(self, path: str) -> Reply:
        return await self.send("GET", path)

    # The page's part of a ceremony, against the broker

    async def _step(self, path: str, body: object) -> Any:
        url = f"{self.site.origin}/v1/apps/{self.site.app_id}/{path}"
        async with self.site.session.post(
            url, data=orjson.dumps(body), headers={"Origin": self.site.origin}
        ) as response:
            answer = orjson.loads(await response.read())
            assert response.status == 200, answer
            return answer

    async def register(self, transaction: str) -> str:
        """A nonce for a new passkey on the visitor's device."""
        begun = await self._step(
            "register/transactions/webauthn/start", {"transaction_id": transaction}
        )
        options = begun["handshake"]["challenge"]["publicKey"]
        answer = flex_wire_form(self.device.register(options, self.site.origin))
        body = {
            "handshake_id": begun["handshake"]["id"],
            "handshake_response": answer,
            "transaction_id": transaction,
        }
        return str((await self._step("register/transactions/webauthn/finish", body))["nonce"])

    async def authenticate(self, transaction: str | None = None) -> str:
        """A nonce for a sign-in with the visitor's device."""
        begun = await self._step(
            "authenticate/transactions/webauthn/start", {"transaction_id": transaction}
        )
        options = begun["handshake"]["challenge"]["publicKey"]
        answer = self.device.authenticate(options, self.site.origin)
        body = {"handshake_id": begun["handshake"]["id"], "handshake_response": answer}
        return str((await self._step("authenticate/transactions/webauthn/finish", body))["nonce"])

    # Whole steps

    async def begin_sign_up(self, name: str) -> str:
        started = await self.post("/api/sign-up/start", name=name)
        assert started.status == 200, started.body
        return str(started.json["transaction_id"])

    async def sign_up(self, name: str) -> Reply:
        nonce = await self.register(await self.begin_sign_up(name))
        done = await self.post("/api/sign-up/finish", nonce=nonce)
        assert done.status == 200, done.body
        return done

    async def begin_sign_in(self, name: str) -> str:
        started = await self.post("/api/sign-in/start", name=name)
        assert started.status == 200, started.body
        return str(started.json["transaction_id"])

    async def passkeys(self) -> list[dict[str, Any]]:
        listed = await self.get("/api/passkeys")
        assert listed.status == 200, listed.body
        found: list[dict[str, Any]] = listed.json["passkeys"]
        return found

    async def account(self) -> str | None:
        """Who the site says is signed in."""
        state = (await self.get("/api/state")).json["account"]
        return None if state is None else str(state["name"])


StartSite = Callable[..., Any]


@pytest.fixture
async def start_site(stores: EmbeddedStores, tmp_path: Path) -> AsyncIterator[StartSite]:
    """Start the demo on a broker; again on the same data is a restart. Arguments replace those of
    `demo_app`.
    """
    opened: list[tuple[Service, aiohttp.ClientSession]] = []

    async def start(again: Site | None = None, **changes: Any) -> Site:
        clock, log = again.clock if again else Clock(), io.StringIO()
        broker = await assemble(
            settings_for(stores, host="localhost", store_timeout=1.5),
            log=Log(log, level="debug"),
            clock=clock,
        )
        if again is None:
            app, key = await broker.directory.create_app(
                "Demo", "localhost", ["http://localhost:1"]
            )
        else:
            app, key = await broker.directory.app(again.app_id), again.key
        made: list[web.Application] = []

        async def prepare(port: int) -> dict[str, web.Application]:
            arguments: dict[str, Any] = {
                "broker_url": f"http://127.0.0.1:{port}",
                "app_id": app.id,
                "api_key": key,
                "data": tmp_path,
                "origins": lambda: {f"http://localhost:{port}", "https://demo.example"},
                "clock": clock,
            }
            made.append(demo_app(**arguments | changes))
            return {"/demo/": made[0]}

        service = await serve(broker, prepare=prepare)
        await broker.directory.update_app(
            replace(app, origins=(f"http://localhost:{service.port}",))
        )
        session = aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar())
        opened.append((service, session))
        return Site(service, session, clock, tmp_path, app.id, key, made[0], log)

    yield start
    for service, session in opened:
        await session.close()
        await service.close()


@pytest.fixture
async def site(start_site: StartSite) -> Site:
    started: Site = await start_site()
    return started


@pytest.fixture
def ada(site: Site) -> Visitor:
    return site.visitor()


@pytest.fixture
def eve(site: Site) -> Visitor:
    return site.visitor()


# What a visitor can do


async def test_a_visit_from_sign_up_to_revocation(ada: Visitor) -> None:
    done = await ada.sign_up("Ada Lovelace")
    assert done.json["account"]["name"] == "Ada Lovelace"
    assert done.json["receipt"]["purpose"] == "register"
    assert (
        done.json["receipt"]["external_id"] == done.json["account"]["external_id"] != "Ada Lovelace"
    )
    assert await ada.account() == "Ada Lovelace"

    assert (await ada.post("/api/sign-out")).status == 200
    assert await ada.account() is None

    by_name = await ada.post(
        "/api/sign-in/finish",
        nonce=await ada.authenticate(await ada.begin_sign_in("ada  LOVELACE")),
    )
    assert by_name.json["account"]["name"] == "Ada Lovelace"
    assert by_name.json["receipt"]["purpose"] == "authenticate"

    await ada.post("/api/sign-out")
    without = await ada.post("/api/sign-in/discoverable", nonce=await ada.authenticate())
    assert without.json["account"]["name"] == "Ada Lovelace"

    second = Visitor(ada.site, cookie=ada.cookie)
    added = await ada.post("/api/passkeys/start")
    done = await ada.post(
        "/api/passkeys/finish", nonce=await second.register(added.json["transaction_id"])
    )
    assert [key["current"] for key in done.json["passkeys"]] == [True, False]
    extra = done.json["passkeys"][1]["id"]

    renamed = await ada.post(f"/api/passkeys/{extra}/label", label="Blue key")
    assert [key["label"] for key in renamed.json["passkeys"]] == [None, "Blue key"]

    revoked = await ada.post(f"/api/passkeys/{extra}/revoke")
    assert [key["current"] for key in revoked.json["passkeys"]] == [True]
    assert await ada.passkeys() == revoked.json["passkeys"]


async def test_the_trace_tells_of_every_call_and_holds_no_secret(ada: Visitor) -> None:
    transaction = await ada.begin_sign_up("Ada")
    nonce = await ada.register(transaction)
    done = await ada.post("/api/sign-up/finish", nonce=nonce)
    (hop,) = done.json["trace"]
    assert (hop["method"], hop["path"], hop["status"]) == ("POST", "/authenticate/verify", 200)
    assert hop["sent"]["nonce"] == short(nonce)
    assert hop["sent"]["transaction"] == short(transaction)
    assert hop["got"]["external id"] == short(done.json["account"]["external_id"])
    assert hop["body"] == {
        "nonce": short(nonce),
        "purpose": "register",
        "transaction_id": short(transaction),
        "external_id": short(done.json["account"]["external_id"]),
    }
    assert hop["answer"]["external_id"] == short(done.json["account"]["external_id"])
    assert hop["ms"] > 0
    listed = await ada.get("/api/passkeys")
    assert [h["path"].split("/")[-1] for h in listed.json["trace"]] == ["users", "devices"]
    external_id = done.json["account"]["external_id"]
    assert listed.json["trace"][0]["query"] == {"identifier": short(external_id), "limit": "1"}
    for reply in (done, listed):
        for secret in (nonce, ada.site.key, ada.cookie or "no cookie"):
            assert secret.encode() not in reply.body


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("pbn_" + "x" * 43, "pbn_xxxx…xx"),
        ("0d142565-22ae-43c8-b29f-d082a9337e2f", "0d142565…2f"),
        ("Ada Lovelace, Countess of", "Ada Lovelace, Countess of"),
        (
            {"users": [{"id": "A" * 24, "count": 7, "last": None}]},
            {"users": [{"id": "AAAAAAAA…AA", "count": 7, "last": None}]},
        ),
    ],
)  # fmt: skip
def test_bodies_are_shown_with_tokens_and_ids_cut(value: object, shown: object) -> None:
    assert redacted(value) == shown


async def test_a_long_answer_of_the_broker_is_not_shown(
    ada: Visitor, monkeypatch: pytest.MonkeyPatch
) -> None:
    await ada.sign_up("Ada")
    shown = (await ada.get("/api/passkeys")).json["trace"][1]
    assert len(shown["answer"]["devices"]) == 1
    assert BODY_SHOWN > 10_000
    monkeypatch.setattr("broker.demo.wire.BODY_SHOWN", 100)
    hidden = (await ada.get("/api/passkeys")).json["trace"][1]
    assert (hidden["status"], hidden["answer"], hidden["got"]) == (200, None, {"passkeys": "1"})


async def test_accounts_and_sessions_survive_a_restart(
    start_site: StartSite, site: Site, ada: Visitor
) -> None:
    await ada.sign_up("Ada")
    await site.service.close()
    ada.site = await start_site(site)
    assert await ada.account() == "Ada"
    await ada.post("/api/sign-out")
    nonce = await ada.authenticate()
    assert (await ada.post("/api/sign-in/discoverable", nonce=nonce)).json["account"][
        "name"
    ] == "Ada"


# Names


@pytest.mark.parametrize(
    ("typed", "shown"),
    [
        ("Ada", "Ada"),
        ("  Ada   Lovelace ", "Ada Lovelace"),
        ("\uff21\uff44\uff41", "Ada"),
        ("Zoë O'Neill-Ümit", "Zoë O'Neill-Ümit"),
        ("李小龙", "李小龙"),
        ("नमस्ते", "नमस्ते"),
        ("a@b.example", "a@b.example"),
        ("x" * NAME_LIMIT, "x" * NAME_LIMIT),
    ],
)
def test_names_are_shown_as_typed_but_for_their_form(typed: str, shown: str) -> None:
    assert parse_name(typed)[0] == shown


@pytest.mark.parametrize(
    "typed",
    [
        "",
        "   ",
        "---",
        "a" * (NAME_LIMIT + 1),
        "a\x00b",
        "a\u202eb",
        "a\u200db",
        "<b>",
        "a\ud800",
        "a/b",
        "🦊",
    ],
)
def test_names_that_mislead_or_break_are_refused_with_a_sentence(typed: str) -> None:
    with pytest.raises(InvalidName, match=r"\.$"):
        parse_name(typed)


@pytest.mark.parametrize(
    ("one", "other"), [("Ada", "aDA"), ("Straße", "STRASSE"), ("ﬁn", "FIN"), ("Å", "a\u030a")]
)
def test_names_are_compared_without_case_and_form(one: str, other: str) -> None:
    assert parse_name(one)[1] == parse_name(other)[1]


@pytest.mark.parametrize("name", ["Ada", "aDa", "  ADA ", "\uff21da"])
async def test_an_existing_name_is_not_signed_up_again(
    ada: Visitor, eve: Visitor, name: str
) -> None:
    await ada.sign_up("Ada")
    refused = await eve.post("/api/sign-up/start", name=name)
    assert (refused.status, refused.code) == (409, "name_taken")
    assert "transaction_id" not in refused.json
    assert refused.json["trace"] == []
    assert len(await ada.passkeys()) == 1


async def test_an_unfinished_name_is_held_for_its_session_and_then_free(
    site: Site, ada: Visitor, eve: Visitor
) -> None:
    await ada.begin_sign_up("Ada")
    refused = await eve.post("/api/sign-up/start", name="ada")
    assert (refused.status, refused.code) == (409, "name_taken")

    again = await ada.post("/api/sign-up/start", name="ADA")
    assert again.status == 200
    first = again.json["trace"][0]["sent"]["external id"]

    site.clock.ahead += RESERVATION_LIFE + 1
    taken = await eve.post("/api/sign-up/start", name="Ada")
    assert taken.status == 200
    assert taken.json["trace"][0]["sent"]["external id"] != first, (
        "a name's next owner must not get old passkeys"
    )


async def test_a_retry_begins_anew(ada: Visitor) -> None:
    """Whoever else has the first transaction has one for nobody's account."""
    first = await ada.post("/api/sign-up/start", name="Ada")
    second = await ada.post("/api/sign-up/start", name="Ada")
    assert (
        first.json["trace"][0]["sent"]["external id"]
        != second.json["trace"][0]["sent"]["external id"]
    )
    assert first.json["transaction_id"] != second.json["transaction_id"]
    nonce = await ada.register(first.json["transaction_id"])
    refused = await ada.post("/api/sign-up/finish", nonce=nonce)
    assert (refused.status, refused.code) == (401, "nonce_refused"), (
        "the session expects the second transaction"
    )


async def test_a_session_holds_one_unfinished_name_only(ada: Visitor, eve: Visitor) -> None:
    await ada.begin_sign_up("Ada")
    await ada.begin_sign_up("Grace")
    assert (await eve.post("/api/sign-up/start", name="Ada")).status == 200
    assert (await eve.post("/api/sign-up/start", name="Grace")).code == "name_taken"


async def test_an_unfinished_account_is_found_by_no_name(ada: Visitor, eve: Visitor) -> None:
    await ada.begin_sign_up("Ada")
    refused = await eve.post("/api/sign-in/start", name="Ada")
    assert (refused.status, refused.code) == (404, "unknown_name")


async def test_a_passkey_whose_answer_was_lost_finishes_the_sign_up(ada: Visitor) -> None:
    await ada.register(await ada.begin_sign_up("Ada"))  # and the page never brings the nonce
    nonce = await ada.authenticate()
    assert (await ada.post("/api/sign-in/discoverable", nonce=nonce)).json["account"][
        "name"
    ] == "Ada"
    assert len(await ada.passkeys()) == 1


# Requests that are not our page's


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize(
    "origin", [None, "null", "https://evil.example", "http://localhost:1", "HTTPS://DEMO.EXAMPLE"]
)
async def test_a_request_from_elsewhere_is_refused_before_it_is_read(
    ada: Visitor, path: str, origin: str | None
) -> None:
    refused = await ada.send("POST", path, {"name": "Ada"}, origin=origin)
    assert (refused.status, refused.code) == (403, "foreign_origin")
    assert "Access-Control-Allow-Origin" not in refused.headers
    assert ada.set_cookies == []


async def test_a_foreign_page_cannot_sign_a_visitor_out_or_revoke(ada: Visitor) -> None:
    await ada.sign_up("Ada")
    (key,) = await ada.passkeys()
    for path in ("/api/sign-out", f"/api/passkeys/{key['id']}/revoke"):
        assert (
            await ada.send("POST", path, {"last": True}, origin="https://evil.example")
        ).status == 403
    assert await ada.account() == "Ada"
    assert len(await ada.passkeys()) == 1


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize(
    "content_type", ["text/plain", "application/x-www-form-urlencoded", "application/jsonx"]
)
async def test_only_json_is_read(ada: Visitor, path: str, content_type: str) -> None:
    refused = await ada.send("POST", path, {"name": "Ada"}, content_type=content_type)
    assert (refused.status, refused.code) == (415, "unsupported_media_type")


@pytest.mark.parametrize(
    ("data", "status", "code"),
    [
        (b"", 400, "invalid_request"),
        (b"[]", 400, "invalid_request"),
        (b"null", 400, "invalid_request"),
        (b"{", 400, "invalid_request"),
        (b"\xff{}", 400, "invalid_request"),
        (b"[" * BODY_LIMIT, 400, "invalid_request"),
        (b'{"name":"a","name":"b"}', 400, "invalid_request"),
        (b'{"name":NaN}', 400, "invalid_request"),
        (b"{}", 400, "invalid_request"),
        (b'{"name":null}', 400, "invalid_request"),
        (b'{"name":7}', 400, "invalid_request"),
        (b'{"name":""}', 400, "invalid_name"),
        (b'{"name":" "}', 400, "invalid_name"),
        (b'{"name":"\\ud800"}', 400, "invalid_request"),
        (b'{"name":"\\u0000"}', 400, "invalid_name"),
        (b'{"name":"' + b"a" * 65 + b'"}', 400, "invalid_name"),
        (b'{"name":"' + b"a" * 257 + b'"}', 400, "invalid_request"),
        (b'{"name":"' + b"a" * BODY_LIMIT + b'"}', 413, "request_too_large"),
    ],
)
@pytest.mark.parametrize("path", ["/api/sign-up/start", "/api/sign-in/start"])
async def test_bad_bodies_get_a_sentence(
    ada: Visitor, path: str, data: bytes, status: int, code: str
) -> None:
    refused = await ada.send("POST", path, data=data)
    assert (refused.status, refused.code) == (status, code)
    assert refused.json["trace"] == []


async def test_a_body_without_a_length_is_bounded_too(ada: Visitor) -> None:
    async def endless() -> AsyncIterator[bytes]:
        for _ in range(64):
            yield b" " * 1024

    refused = await ada.send("POST", "/api/sign-up/start", data=endless())
    assert (refused.status, refused.code) == (413, "request_too_large")


async def test_a_body_that_breaks_off_is_a_sentence(site: Site) -> None:
    head = (
        f"POST /demo/api/sign-up/start HTTP/1.1\r\nHost: localhost\r\nOrigin: {site.origin}\r\n"
        "Content-Type: application/json\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
    )
    reader, writer = await asyncio.open_connection("localhost", site.service.port)
    writer.write(head.encode() + b'5\r\n{"nam\r\nnot a size\r\n')
    answer = await asyncio.wait_for(reader.read(), 30)
    writer.close()
    assert answer.split()[1] == b"400"
    assert b'"code":"' in answer
    assert b"nam" not in answer


# Sessions


async def test_cookies_are_out_of_reach_of_scripts_and_other_sites(ada: Visitor) -> None:
    await ada.sign_up("Ada")
    await ada.post("/api/sign-out")
    assert len(ada.set_cookies) == 3  # visit, signed in, cleared
    for line in ada.set_cookies:
        assert line.startswith("demo_session=")
        flags = {part.strip().lower() for part in line.split(";")[1:]}
        assert {"httponly", "samesite=strict", "path=/demo/"} <= flags
        assert "secure" not in flags, "plain http on localhost"
        assert not any(flag.startswith("domain") for flag in flags)


async def test_cookies_are_secure_over_https(ada: Visitor) -> None:
    await ada.send("POST", "/api/sign-up/start", {"name": "Ada"}, origin="https://demo.example")
    await ada.send("POST", "/api/sign-out", {}, origin="https://demo.example")
    assert len(ada.set_cookies) == 2
    for line in ada.set_cookies:
        assert line.startswith("__Host-demo_session=")
        flags = {part.strip().lower() for part in line.split(";")[1:]}
        assert {"httponly", "samesite=strict", "path=/", "secure"} <= flags
        assert not any(flag.startswith("domain") for flag in flags)


async def test_a_planted_session_is_worth_nothing_after_sign_in(ada: Visitor, eve: Visitor) -> None:
    """Session fixation: Eve gives Ada's browser a session that Eve knows; Ada signs in with it."""
    await eve.begin_sign_up("Eve")
    ada.cookie = planted = eve.cookie
    await ada.sign_up("Ada")
    assert ada.cookie != planted
    assert await ada.account() == "Ada"
    assert await eve.account() is None
    assert (await eve.get("/api/passkeys")).code == "not_signed_in"


async def test_a_planted_session_gets_no_transaction_for_the_sign_up_under_way(
    ada: Visitor, eve: Visitor
) -> None:
    """Eve knows the session with which Ada begins, and asks for a transaction of her own before Ada
    has finished.
    """
    await eve.begin_sign_up("Eve")
    ada.cookie = planted = eve.cookie
    transaction = await ada.begin_sign_up("Ada")
    assert ada.cookie != planted
    refused = await eve.post("/api/sign-up/start", name="Ada")
    assert (refused.status, refused.code, refused.json["trace"]) == (409, "name_taken", [])
    assert "transaction_id" not in refused.json
    finished = await ada.post("/api/sign-up/finish", nonce=await ada.register(transaction))
    assert finished.status == 200
    assert len(await ada.passkeys()) == 1


async def test_a_name_that_a_planted_session_holds_brings_no_passkey_along(
    ada: Visitor, eve: Visitor
) -> None:
    """Eve begins Ada's sign-up herself, plants that session, and registers her own passkey when Ada
    has signed up.
    """
    transaction = await eve.begin_sign_up("Ada")
    ada.cookie = eve.cookie
    await ada.sign_up("Ada")
    await eve.register(transaction)
    refused = await eve.post("/api/sign-in/discoverable", nonce=await eve.authenticate())
    assert (refused.status, refused.code) == (404, "no_such_account")
    assert len(await ada.passkeys()) == 1


async def test_a_planted_session_has_no_part_in_a_sign_in_by_name(
    ada: Visitor, eve: Visitor
) -> None:
    await ada.sign_up("Ada")
    await ada.post("/api/sign-out")
    await eve.begin_sign_up("Eve")
    ada.cookie = planted = eve.cookie
    nonce = await ada.authenticate(await ada.begin_sign_in("Ada"))
    assert ada.cookie != planted
    refused = await eve.post("/api/sign-in/finish", nonce=nonce, transaction_id=ada.transaction)
    assert (refused.status, refused.code, refused.json["trace"]) == (409, "nothing_begun", [])
    assert (await ada.post("/api/sign-in/finish", nonce=nonce)).status == 200


async def test_who_is_signed_in_stays_so_when_a_sign_in_begins(ada: Visitor) -> None:
    await ada.sign_up("Ada")
    old = ada.cookie
    await ada.begin_sign_in("Ada")
    assert ada.cookie != old
    assert await ada.account() == "Ada"
    ada.cookie = old
    assert await ada.account() is None


async def test_a_cookie_without_the_prefix_is_none_over_https(
    start_site: StartSite, site: Site
) -> None:
    """Anybody who can answer for the host over http, or for one beside it, can plant that one."""
    eve = site.visitor()
    await eve.sign_up("Eve")
    assert eve.cookie_name == "demo_session"
    await site.service.close()
    ada = (await start_site(site, origins={"https://demo.example"})).visitor()
    ada.cookie = eve.cookie
    assert await ada.account() is None
    refused = await ada.send("POST", "/api/passkeys/start", {}, origin="https://demo.example")
    assert (refused.status, refused.code) == (401, "not_signed_in")
    ada.cookie_name = "__Host-demo_session"
    assert await ada.account() == "Eve"


async def test_an_https_page_of_a_site_that_has_both_takes_the_prefixed_cookie_alone(
    ada: Visitor,
) -> None:
    await ada.sign_up("Ada")
    refused = await ada.send("POST", "/api/passkeys/start", {}, origin="https://demo.example")
    assert (refused.status, refused.code) == (401, "not_signed_in")
    assert (await ada.post("/api/passkeys/start")).status == 200


async def test_a_session_of_the_visitors_own_making_is_not_taken_up(ada: Visitor) -> None:
    ada.cookie = "A" * 43
    await ada.begin_sign_up("Ada")
    assert ada.cookie != "A" * 43


async def test_sign_in_renews_and_ends_the_session_before(ada: Visitor) -> None:
    await ada.sign_up("Ada")
    old = ada.cookie
    done = await ada.post("/api/sign-in/discoverable", nonce=await ada.authenticate())
    assert done.status == 200
    assert ada.cookie != old
    ada.cookie = old
    assert await ada.account() is None


async def test_sign_out_ends_the_session_on_the_server(ada: Visitor) -> None:
    await ada.sign_up("Ada")
    stolen = ada.cookie
    await ada.post("/api/sign-out")
    ada.cookie = stolen
    assert await ada.account() is None


async def test_sessions_end_by_time(site: Site, ada: Visitor) -> None:
    await ada.sign_up("Ada")
    site.clock.ahead += SESSION_LIFE - 60
    assert await ada.account() == "Ada"
    site.clock.ahead += 61
    assert await ada.account() is None
    assert (await ada.get("/api/passkeys")).status == 401


OLD_CEREMONY = """
DROP TABLE ceremony;
CREATE TABLE ceremony (
  token_hash     TEXT NOT NULL REFERENCES session (token_hash) ON DELETE CASCADE,
  kind           TEXT NOT NULL,
  external_id    TEXT NOT NULL,
  transaction_id TEXT NOT NULL,
  expires_at     REAL NOT NULL,
  PRIMARY KEY (token_hash, kind)
);
"""


async def test_an_older_file_opens_and_keeps_no_transaction(
    start_site: StartSite, site: Site, ada: Visitor
) -> None:
    """Accounts and sessions stay; ceremonies that were under way begin again."""
    await ada.sign_up("Ada")
    transaction = "pbt_" + secrets.token_urlsafe(32)
    await site.service.close()
    with closing(site.database()) as db:
        db.executescript(OLD_CEREMONY)
        db.execute(
            "INSERT INTO ceremony SELECT token_hash, 'sign-in', external_id, ?, expires_at"
            " FROM session",
            (transaction,),
        )
        db.execute("UPDATE ceremony SET transaction_id = transaction_id || '-again'")
    assert any(
        transaction.encode() in path.read_bytes() for path in site.data.glob("demo.sqlite3*")
    )
    ada.site = await start_site(site)
    for path in site.data.glob("demo.sqlite3*"):
        assert transaction.encode() not in path.read_bytes()
    assert await ada.account() == "Ada"
    assert (await ada.post("/api/sign-in/finish", nonce="pbn_x")).code == "nothing_begun"
    nonce = await ada.authenticate(await ada.begin_sign_in("Ada"))
    assert (await ada.post("/api/sign-in/finish", nonce=nonce)).status == 200


@pytest.mark.parametrize("kind", ["sign-up", "sign-in", "passkeys"])
async def test_a_ceremony_ends_with_the_transaction_it_began_with(ada: Visitor, kind: str) -> None:
    """The page has to name it; another one spends the ceremony, and the broker isn't asked."""
    if kind != "sign-up":
        await ada.sign_up("Ada")
    if kind == "passkeys":
        ada.device = Authenticator()
    started = await ada.post(
        f"/api/{kind}/start", **({} if kind == "passkeys" else {"name": "Ada"})
    )
    assert started.status == 200
    device = ada.authenticate if kind == "sign-in" else ada.register
    nonce = await device(ada.transaction)
    refused = await ada.post(f"/api/{kind}/finish", nonce=nonce, transaction_id="pbt_" + "x" * 43)
    assert (refused.status, refused.code, refused.json["trace"]) == (401, "nonce_refused", [])
    again = await ada.post(f"/api/{kind}/finish", nonce=nonce)
    assert (again.status, again.code) == (409, "nothing_begun")


async def test_the_file_is_private_and_holds_no_token(site: Site, ada: Visitor) -> None:
    transactions = [await ada.begin_sign_up("Ada")]
    await ada.post("/api/sign-up/finish", nonce=await ada.register(ada.transaction))
    transactions += [
        (await ada.post("/api/passkeys/start")).json["transaction_id"],
        await ada.begin_sign_in("Ada"),
    ]
    files = sorted(site.data.glob("demo.sqlite3*"))
    assert len(files) >= 1
    for path in files:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        content = path.read_bytes()
        assert (ada.cookie or "no cookie").encode() not in content
        assert site.key.encode() not in content
        for transaction in transactions:
            assert transaction.encode() not in content


@pytest.mark.parametrize("path", [path for path in POSTS if path.startswith("/api/passkeys/")])
async def test_passkeys_need_a_session(ada: Visitor, path: str) -> None:
    await ada.begin_sign_up("Ada")  # a session, but nobody's
    for cookie in (ada.cookie, None, "forged"):
        ada.cookie = cookie
        refused = await ada.send(
            "POST", path, {"nonce": "pbn_x", "transaction_id": "x", "label": "x"}
        )
        assert (refused.status, refused.code) == (401, "not_signed_in")
        assert refused.json["trace"] == [], "the broker isn't asked"
    assert (await ada.get("/api/passkeys")).code == "not_signed_in"


async def test_a_signed_in_visitor_signs_out_before_another_sign_up(ada: Visitor) -> None:
    await ada.sign_up("Ada")
    refused = await ada.post("/api/sign-up/start", name="Grace")
    assert (refused.status, refused.code) == (409, "signed_in")


# Nonces


async def test_a_registration_buys_no_sign_in(ada: Visitor, eve: Visitor) -> None:
    """Eve registers a passkey in her own sign-up, and brings that nonce to each way in."""
    await ada.sign_up("Ada")
    for path in ("/api/sign-in/discoverable", "/api/sign-in/finish"):
        nonce = await eve.register(await eve.begin_sign_up("Eve"))
        await eve.begin_sign_in("Ada")
        refused = await eve.post(path, nonce=nonce)
        assert (refused.status, refused.code) == (401, "nonce_refused")
        assert await eve.account() is None
        eve.device = Authenticator()


async def test_another_persons_nonce_buys_nothing(ada: Visitor, eve: Visitor) -> None:
    await ada.sign_up("Ada")
    await eve.sign_up("Eve")
    await eve.post("/api/sign-out")
    await eve.begin_sign_in("Ada")
    refused = await eve.post("/api/sign-in/finish", nonce=await eve.authenticate())
    assert (refused.status, refused.code) == (401, "nonce_refused")
    assert await eve.account() is None


async def test_the_nonce_of_another_transaction_buys_nothing(ada: Visitor) -> None:
    await ada.sign_up("Ada")
    await ada.post("/api/sign-out")
    first = await ada.begin_sign_in("Ada")
    await ada.begin_sign_in("Ada")
    refused = await ada.post("/api/sign-in/finish", nonce=await ada.authenticate(first))
    assert (refused.status, refused.code) == (401, "nonce_refused")


async def test_a_sign_in_buys_no_sign_up(ada: Visitor, eve: Visitor) -> None:
    await eve.sign_up("Eve")
    await eve.post("/api/sign-out")
    await eve.begin_sign_up("Mallory")
    refused = await eve.post("/api/sign-up/finish", nonce=await eve.authenticate())
    assert (refused.status, refused.code) == (401, "nonce_refused")
    assert (await ada.post("/api/sign-in/start", name="Mallory")).code == "unknown_name"


async def test_a_passkey_of_another_account_is_not_added(ada: Visitor, eve: Visitor) -> None:
    await ada.sign_up("Ada")
    nonce = await eve.register(await eve.begin_sign_up("Eve"))
    await ada.post("/api/passkeys/start")
    refused = await ada.post("/api/passkeys/finish", nonce=nonce)
    assert (refused.status, refused.code) == (401, "nonce_refused")
    assert len(await ada.passkeys()) == 1


async def test_a_nonce_and_a_ceremony_are_good_once(ada: Visitor) -> None:
    await ada.sign_up("Ada")
    nonce = await ada.authenticate()
    assert (await ada.post("/api/sign-in/discoverable", nonce=nonce)).status == 200
    again = await ada.post("/api/sign-in/discoverable", nonce=nonce)
    assert (again.status, again.code) == (401, "nonce_refused")

    transaction = await ada.begin_sign_in("Ada")
    wrong = await ada.post("/api/sign-in/finish", nonce="pbn_" + "x" * 43)
    assert wrong.code == "nonce_refused"
    spent = await ada.post("/api/sign-in/finish", nonce=await ada.authenticate(transaction))
    assert (spent.status, spent.code) == (409, "nothing_begun"), "a wrong answer can't be retried"


async def sign_in_without_a_name(visitor: Visitor) -> str:
    nonce = await visitor.authenticate()
    assert (await visitor.post("/api/sign-in/discoverable", nonce=nonce)).status == 200
    return nonce


async def sign_in_by_name(visitor: Visitor) -> str:
    transaction = await visitor.begin_sign_in("Ada")
    nonce = await visitor.authenticate(transaction)
    finished = await visitor.post("/api/sign-in/finish", nonce=nonce, transaction_id=transaction)
    assert finished.status == 200, finished.body
    return nonce


async def add_a_passkey(visitor: Visitor) -> str:
    visitor.device = Authenticator()
    transaction = (await visitor.post("/api/passkeys/start")).json["transaction_id"]
    nonce = await visitor.register(transaction)
    finished = await visitor.post("/api/passkeys/finish", nonce=nonce, transaction_id=transaction)
    assert finished.status == 200, finished.body
    return nonce


@pytest.mark.parametrize("last", [sign_in_without_a_name, sign_in_by_name, add_a_passkey])
async def test_redeeming_again_shows_the_refusal(
    ada: Visitor, last: Callable[[Visitor], Awaitable[str]], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    await ada.sign_up("Ada")
    nonce = await last(ada)
    for _ in range(2):
        again = await ada.post("/api/redeem-again")
        assert again.status == 200, again.body
        assert again.json["refusal"]["status"] == 401
        assert again.json["refusal"]["code"] == "invalid_nonce"
        assert again.json["alarm"]["first_at"] < again.json["alarm"]["again_at"]
        hop, events = again.json["trace"]
        assert (events["path"], events["query"]["action"]) == ("/events", "nonce.replayed")
        assert (hop["path"], hop["status"], hop["got"]) == (
            "/authenticate/verify",
            401,
            {"code": "invalid_nonce"},
        )
        assert hop["body"]["nonce"] == short(nonce), "the nonce of the last step"
        assert nonce.encode() not in again.body
    assert await ada.account() == "Ada"
    said = ada.site.log.getvalue()
    assert said.count('"reason":"nonce_replayed"') == 2
    assert nonce not in said + caplog.text


async def test_a_nonce_is_redeemed_again_for_its_own_session_only(
    ada: Visitor, eve: Visitor, site: Site, start_site: StartSite
) -> None:
    assert (await ada.post("/api/redeem-again")).code == "not_signed_in"
    await ada.begin_sign_up("Nobody")
    assert (await ada.post("/api/redeem-again")).code == "not_signed_in"
    await ada.sign_up("Ada")
    await eve.sign_up("Eve")
    left = ada.cookie
    assert len(site.subapp[REDEMPTIONS]) == 2
    await ada.post("/api/sign-out")
    assert len(site.subapp[REDEMPTIONS]) == 1, "forgotten with the session"
    ada.cookie = left
    assert (await ada.post("/api/redeem-again")).code == "not_signed_in"

    site.clock.ahead += REDEMPTION_LIFE - 1
    assert (await eve.post("/api/redeem-again")).status == 200
    site.clock.ahead += 2
    refused = await eve.post("/api/redeem-again")
    assert (refused.status, refused.code, refused.json["trace"]) == (409, "no_nonce_kept", [])

    await sign_in_without_a_name(eve)
    eve.site = await start_site(again=site)
    assert (await eve.post("/api/redeem-again")).code == "no_nonce_kept", "kept in memory only"


async def test_a_broker_that_redeems_twice_is_no_success(
    ada: Visitor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A fresh nonce stands in for the spent one, so that the broker does redeem it."""
    await ada.sign_up("Ada")
    fresh = await ada.authenticate()
    monkeypatch.setattr(LastRedemptions, "of", lambda *_: Redemption(fresh, "authenticate"))
    worried = await ada.post("/api/redeem-again")
    assert (worried.status, worried.code) == (502, "redeemed_twice")
    assert "the broker redeemed a nonce twice" in caplog.text
    assert fresh not in caplog.text


def test_few_redemptions_are_kept_and_none_is_printed() -> None:
    clock = Clock()
    kept = LastRedemptions(clock)
    for number in range(REDEMPTION_LIMIT + 1):
        kept.keep(str(number), Redemption("pbn_secret", "authenticate"))
    assert len(kept) == REDEMPTION_LIMIT
    assert kept.of("0") is None, "the oldest leaves"
    assert kept.of(str(REDEMPTION_LIMIT)) is not None
    assert "pbn_secret" not in repr(kept.of(str(REDEMPTION_LIMIT)))
    clock.ahead += REDEMPTION_LIFE + 1
    kept.keep("next", Redemption("pbn_secret", "authenticate"))
    assert len(kept) == 1, "what has expired is removed"


@pytest.mark.parametrize("nonce", ["x", "\x00", "é", "a" * 256])
async def test_what_is_no_nonce_is_refused_as_one(ada: Visitor, nonce: str) -> None:
    data = json.dumps({"nonce": nonce}).encode()
    refused = await ada.send("POST", "/api/sign-in/discoverable", data=data)
    assert (refused.status, refused.code) == (401, "nonce_refused")


@pytest.mark.parametrize("nonce", [None, "", 7, ["x"], "\ud800", "a" * 257])
async def test_what_is_no_text_is_not_even_asked_about(ada: Visitor, nonce: object) -> None:
    data = json.dumps({"nonce": nonce}).encode()
    for path in (
        "/api/sign-up/finish",
        "/api/sign-in/finish",
        "/api/sign-in/discoverable",
        "/api/passkeys/finish",
    ):
        refused = await ada.send("POST", path, data=data)
        assert (refused.status, refused.code) == (400, "invalid_request")
        assert refused.json["trace"] == []


@pytest.mark.parametrize("path", ["/api/sign-up/finish", "/api/sign-in/finish"])
async def test_finishing_needs_a_session_that_began(ada: Visitor, eve: Visitor, path: str) -> None:
    await ada.sign_up("Ada")
    nonce = await ada.authenticate(await ada.begin_sign_in("Ada"))
    refused = await eve.post(path, nonce=nonce)
    assert (refused.status, refused.code) == (409, "nothing_begun")
    assert refused.json["trace"] == [], "the nonce is not redeemed, its owner still can"
    assert (await ada.post("/api/sign-in/finish", nonce=nonce)).status == 200


async def test_a_begun_ceremony_is_forgotten_in_time(site: Site, ada: Visitor) -> None:
    await ada.sign_up("Ada")
    transaction = await ada.begin_sign_in("Ada")
    nonce = await ada.authenticate(transaction)
    site.clock.ahead += CEREMONY_LIFE + 1
    refused = await ada.post("/api/sign-in/finish", nonce=nonce)
    assert (refused.status, refused.code) == (409, "nothing_begun")


async def test_a_good_passkey_of_nobody_here_opens_nothing(site: Site, ada: Visitor) -> None:
    """The app's other sites may have users of their own; the receipt names one of them."""
    await ada.sign_up("Ada")
    await ada.post("/api/sign-out")
    with site.database() as db:
        db.execute("PRAGMA foreign_keys = ON")
        db.execute("DELETE FROM account")
    refused = await ada.post("/api/sign-in/discoverable", nonce=await ada.authenticate())
    assert (refused.status, refused.code) == (404, "no_such_account")
    assert await ada.account() is None


# Passkeys


async def test_a_passkey_of_somebody_else_is_not_renamed_or_revoked(
    ada: Visitor, eve: Visitor
) -> None:
    await ada.sign_up("Ada")
    await eve.sign_up("Eve")
    (key,) = await ada.passkeys()
    for verb, body in (("label", {"label": "mine"}), ("revoke", {"last": True})):
        refused = await eve.post(f"/api/passkeys/{key['id']}/{verb}", **body)
        assert (refused.status, refused.code) == (404, "unknown_passkey")
    assert await ada.passkeys() == [key]


async def test_the_last_passkey_goes_only_after_a_warning(ada: Visitor, eve: Visitor) -> None:
    await ada.sign_up("Ada")
    (key,) = await ada.passkeys()
    for last in (None, False, "true", 1):
        refused = await ada.post(f"/api/passkeys/{key['id']}/revoke", last=last)
        assert (refused.status, refused.code) == (409, "last_passkey")
    gone = await ada.post(f"/api/passkeys/{key['id']}/revoke", last=True)
    assert gone.json["passkeys"] == []
    assert await ada.account() == "Ada", "still signed in, so a new passkey can be added"
    refused = await eve.post("/api/sign-in/start", name="Ada")
    assert (refused.status, refused.code) == (409, "no_passkeys")
    assert (await eve.post("/api/sign-up/start", name="Ada")).code == "name_taken"


async def test_a_revoked_passkey_ends_the_sessions_it_opened(site: Site, ada: Visitor) -> None:
    await ada.sign_up("Ada")
    thief = Visitor(site, device=ada.device)
    await thief.post("/api/sign-in/discoverable", nonce=await thief.authenticate())
    assert await thief.account() == "Ada"
    (key,) = await ada.passkeys()
    assert (await ada.post(f"/api/passkeys/{key['id']}/revoke", last=True)).json["ended"] == 1
    assert await thief.account() is None
    assert await ada.account() == "Ada"


async def test_a_new_passkey_is_called_what_its_authenticator_claims_to_be(ada: Visitor) -> None:
    ada.device = Authenticator(aaguid=bytes.fromhex("fbfc3007154e4ecc8c0b6e020557d7bd"))
    await ada.sign_up("Ada")
    ((label, backed_up),) = [(key["label"], key["backed_up"]) for key in await ada.passkeys()]
    assert (label, backed_up) == ("iCloud Keychain", True)


@pytest.mark.parametrize("label", ["", " ", "a" * 65, "a\u202eb"])
async def test_a_label_is_judged_like_a_name(ada: Visitor, label: str) -> None:
    await ada.sign_up("Ada")
    (key,) = await ada.passkeys()
    refused = await ada.post(f"/api/passkeys/{key['id']}/label", label=label)
    assert (refused.status, refused.code) == (400, "invalid_name")
    assert (await ada.passkeys())[0]["label"] is None


# What is down


@pytest.mark.parametrize(
    ("change", "status", "code", "calls"),
    [
        ({"broker_url": "http://127.0.0.1:9"}, 503, "broker_down", 2),
        ({"api_key": "pbk_" + "x" * 43}, 502, "broker_refused", 1),
    ],
)
async def test_a_broker_that_is_down_or_refuses_is_one_sentence(
    start_site: StartSite, change: dict[str, str], status: int, code: str, calls: int
) -> None:
    """The client repeats a call without an answer once. The trace has every call."""
    site: Site = await start_site(**change)
    refused = await site.visitor().post("/api/sign-up/start", name="Ada")
    assert (refused.status, refused.code) == (status, code)
    assert ("Retry-After" in refused.headers) == (status == 503)
    assert [hop["path"] for hop in refused.json["trace"]] == ["/transactions/register"] * calls
    assert b"pbk_" not in refused.body


async def test_a_sign_up_that_the_broker_did_not_answer_can_be_tried_again(
    start_site: StartSite, site: Site
) -> None:
    """The name is the visitor's, although the session is a new one."""
    await site.service.close()
    down = (await start_site(site, broker_url="http://127.0.0.1:9")).visitor()
    assert (await down.post("/api/sign-up/start", name="Ada")).code == "broker_down"
    await down.site.service.close()
    down.site = await start_site(site)
    await down.sign_up("Ada")
    assert await down.account() == "Ada"


async def test_a_file_that_cannot_be_used_is_one_sentence(site: Site, ada: Visitor) -> None:
    await ada.sign_up("Ada")
    with site.database() as db:
        db.execute("DROP TABLE ceremony")
        db.execute("DROP TABLE session")
    refused = await ada.get("/api/state")
    assert (refused.status, refused.code) == (503, "accounts_down")
    assert b"no such table" not in refused.body


def _garbage(place: Path) -> None:
    place.write_bytes(b"garbage " * 1000)


def _link(place: Path) -> None:
    victim = place.with_name("victim")
    victim.write_bytes(b"")
    victim.chmod(0o644)
    place.symlink_to(victim)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (_garbage, "file is not a database"),
        (Path.mkdir, "Is a directory"),
        (_link, "Too many levels of symbolic links"),
    ],
)
async def test_a_file_that_cannot_be_opened_is_a_fault_with_its_name(
    start_site: StartSite, tmp_path: Path, spoil: Callable[[Path], None], reason: str
) -> None:
    place = tmp_path / "demo.sqlite3"
    spoil(place)
    with pytest.raises(Fault) as told:
        await start_site()
    assert str(told.value) == (
        f"The demo's accounts file {place} can't be used ({reason}); "
        "move it away and start again, then the demo begins a new one."
    )
    place.rename(tmp_path / "moved")
    site: Site = await start_site()
    await site.visitor().sign_up("Ada")


# Pages


@pytest.mark.parametrize(
    ("path", "content_type"),
    [
        ("/", "text/html"),
        ("/static/demo.js", "text/javascript"),
        ("/static/wire.js", "text/javascript"),
        ("/static/words.js", "text/javascript"),
        ("/static/demo.css", "text/css"),
        ("/static/icons.svg", "image/svg+xml"),
        ("/static/favicon.svg", "image/svg+xml"),
        ("/api/state", "application/json"),
        ("/static/guard.py", "application/json"),
    ],
)
async def test_every_answer_has_the_security_headers(
    ada: Visitor, path: str, content_type: str
) -> None:
    answer = await ada.get(path)
    assert answer.headers["Content-Type"].startswith(content_type)
    policy = dict(
        part.strip().split(" ", 1) for part in answer.headers["Content-Security-Policy"].split(";")
    )
    assert policy["default-src"] == policy["base-uri"] == policy["frame-ancestors"] == "'none'"
    assert (
        policy["script-src"]
        == policy["style-src"]
        == policy["connect-src"]
        == policy["form-action"]
        == "'self'"
    )
    assert "unsafe" not in answer.headers["Content-Security-Policy"]
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["Referrer-Policy"] == "same-origin"
    assert answer.headers["Cross-Origin-Opener-Policy"] == "same-origin"
    assert "publickey-credentials-get=(self)" in answer.headers["Permissions-Policy"]


@pytest.mark.parametrize(
    "path",
    [
        "/source/passkey.js",
        "/source/..%2fbroker.py",
        "/source/",
        "/static/guard.py",
        "/static/..%2fguard.py",
        "/static/%2e%2e%2fdemo.sqlite3",
        "/static/",
        "/nothing",
    ],
)
async def test_nothing_but_the_pages_is_served(ada: Visitor, path: str) -> None:
    refused = await ada.get(path)
    assert (refused.status, refused.code) == (404, "not_found")


@pytest.mark.parametrize("name", ["README.md", "api.py", "guard.py", "accounts.py", "client.py"])
async def test_documentation_and_source_are_plain_text(ada: Visitor, name: str) -> None:
    served = await ada.get(f"/source/{name}")
    assert served.status == 200
    assert served.headers["Content-Type"] == "text/plain; charset=utf-8"
    assert served.headers["X-Content-Type-Options"] == "nosniff"
    text = served.body.decode()
    assert str(ROOT) not in text
    found = {"README.md": ROOT, "client.py": ROOT / "broker/sdk"}.get(name, ROOT / "broker/demo")
    assert text == (found / name).read_text()


async def test_documentation_of_an_installed_package_is_its_metadata(
    start_site: StartSite, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An installed package has no README.md beside it."""
    installed = tmp_path / "site-packages/broker/demo"
    installed.mkdir(parents=True)
    monkeypatch.setattr("broker.demo.site.HERE", installed)
    site: Site = await start_site()
    served = await site.visitor().get("/source/README.md")
    assert served.status == 200
    assert served.body.startswith(b"# ")
    assert b"make run" in served.body


# The code that the page shows


CODE = [
    html.unescape(code)
    for code in re.findall(
        r"<pre [^>]*><code>(.*?)</code></pre>",
        (ROOT / "broker/demo/static/index.html").read_text(),
        re.S,
    )
]
PYTHON, NODE, CURL = (
    [CODE[n], CODE[n + 4], CODE[n + 7]] for n in (0, 1, 2)
)  # the page's own part is the fourth
USER = SimpleNamespace(id="user-7", name="Ada")


async def shell(site: Site, *command: str, **environment: str) -> str:
    """What a program of another language prints."""
    process = await asyncio.create_subprocess_exec(
        *command,
        env={
            **os.environ,
            "URL": site.origin,
            "APP_ID": site.app_id,
            "API_KEY": site.key,
            "USER_ID": USER.id,
            "USER_NAME": USER.name,
            "NO_PROXY": "*",
            **environment,
        },
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, faults = await process.communicate()
    assert process.returncode == 0, faults.decode()
    return out.decode()


def test_the_code_is_there_in_three_languages() -> None:
    assert len(CODE) == 10
    assert all("broker" in code for code in PYTHON + NODE)
    assert all(code.count("curl") for code in CURL)
    assert "passkeys.register(" in CODE[3]


async def test_the_code_in_python_runs(
    site: Site, ada: Visitor, capsys: pytest.CaptureFixture[str]
) -> None:
    session = SimpleNamespace()
    async with AsyncBrokerClient(site.origin, site.app_id, site.key) as broker:

        async def run(code: str, **names: object) -> dict[str, Any]:
            scope: dict[str, Any] = {"broker": broker, "user": USER, "session": session, **names}
            exec(f"async def run():\n{textwrap.indent(code, ' ')}\n return locals()", scope)
            found: dict[str, Any] = await scope["run"]()
            return found

        await run(PYTHON[0])
        nonce = await ada.register(session.expects)
        receipt = (await run(PYTHON[1], nonce=nonce))["receipt"]
        assert (receipt.external_id, receipt.purpose) == (USER.id, "register")
        await run(PYTHON[2])
        assert receipt.passkey_id in capsys.readouterr().out
        assert await broker.list_passkeys(USER.id) == [], "the last one is revoked"


async def test_the_code_for_node_runs(site: Site, ada: Visitor) -> None:
    given = """
    const { URL: url, APP_ID: appId, API_KEY: apiKey, NONCE: nonce, EXPECTS } = process.env;
    const user = { id: process.env.USER_ID, name: process.env.USER_NAME };
    const session = { expects: EXPECTS };"""
    node = (*parts.node().node, "--input-type=module", "--eval")
    begun = await shell(site, *node, f"{given}\n{NODE[0]}\nconsole.log(session.expects);")
    nonce = await ada.register(begun.strip())
    helper = NODE[0].split("\n\n")[0]
    script = "\n".join([given, helper, NODE[1], "console.log(JSON.stringify(receipt));", NODE[2]])
    out = await shell(site, *node, script, NONCE=nonce, EXPECTS=begun.strip())
    receipt = json.loads(out.splitlines()[0])
    assert (receipt["external_id"], receipt["purpose"]) == (USER.id, "register")
    assert out.splitlines()[1].startswith(receipt["passkey_id"])
    async with AsyncBrokerClient(site.origin, site.app_id, site.key) as broker:
        assert await broker.list_passkeys(USER.id) == [], "the last one is revoked"


async def test_the_code_for_curl_runs(site: Site, ada: Visitor) -> None:
    begun = json.loads(await shell(site, "sh", "-c", CURL[0]))["transaction_id"]
    nonce = await ada.register(begun)
    receipt = json.loads(await shell(site, "sh", "-c", CURL[1], NONCE=nonce, TRANSACTION=begun))
    assert (receipt["external_id"], receipt["purpose"]) == (USER.id, "register")
    users, find, devices, delete = CURL[2].split("\n\n")
    (user,) = json.loads(await shell(site, "sh", "-c", f"{users}\n{find}"))["users"]
    assert user["external_id"] == USER.id
    known = {"ID": user["id"], "PASSKEY": receipt["passkey_id"]}
    (device,) = json.loads(await shell(site, "sh", "-c", f"{users}\n{devices}", **known))["devices"]
    assert device["id"] == receipt["passkey_id"]
    await shell(site, "sh", "-c", f"{users}\n{delete}", **known)
    assert (
        json.loads(await shell(site, "sh", "-c", f"{users}\n{devices}", **known))["devices"] == []
    )


async def test_a_page_that_did_not_change_is_not_sent_again(site: Site, ada: Visitor) -> None:
    tag = (await ada.get("/static/demo.css")).headers["ETag"]
    async with site.session.get(
        f"{site.origin}/demo/static/demo.css", headers={"If-None-Match": tag}
    ) as again:
        assert again.status == 304
        assert "Content-Security-Policy" in again.headers


async def test_the_bare_address_leads_to_the_host_that_passkeys_work_on(site: Site) -> None:
    url = f"http://127.0.0.1:{site.service.port}/demo/"
    async with site.session.get(url, allow_redirects=False) as moved:
        assert moved.status == 302
        assert moved.headers["Location"] == f"{site.origin}/demo/"
    async with site.session.get(
        url, headers={"Host": "evil.example"}, allow_redirects=False
    ) as served:
        assert served.status == 200


HOSTS = [
    b"[::1",
    b"::1]",
    b"[]",
    b"[::1]x",
    b"[::g]",
    b"[1.2.3.4]",
    b"[v1.x]",
    b"127.0.0.1:99999",
    b"127.0.0.1:65536",
    b"127.0.0.1:abc",
    b"127.0.0.1:-1",
    b"127.0.0.1:+1",
    b"127.0.0.1:8080:8080",
    b"localhost:" + b"9" * 5000,
    "127.0.0.1:\u0661".encode(),
    b"user@localhost",
    b"localhost/demo",
    b"localhost?x",
    b"localhost#x",
    b"local host",
    b"a,b",
    b"\xff",
    b"%00",
    b"http://localhost",
]


@pytest.mark.parametrize("version", ["1.0", "1.1"])
async def test_an_odd_host_is_refused_by_every_route_that_reads_it(
    site: Site, version: str
) -> None:
    """RFC 9112 §3.2 "any request message that contains ... a Host header field with an invalid
    field value". No other route fails over it.
    """
    routes = {
        (route.method, re.sub(r"\{[^}]*\}", "A" * 24, route.resource.canonical))
        for app in (site.subapp, application(site.parts, management=True, browser=True))
        for route in app.router.routes()
        if route.resource is not None
    }
    assert {
        ("GET", "/demo/"),
        ("GET", "/health/ready"),
        ("POST", "/demo/api/sign-up/start"),
    } <= routes
    assert len(routes) > 60
    forwarded = (
        b"X-Forwarded-Host: [::1\r\nX-Forwarded-Port: abc\r\nForwarded: host=[::1;proto=\r\n"
    )
    for method, path in sorted(routes):
        for host in HOSTS if path == "/demo/" else HOSTS[:8]:
            reader, writer = await asyncio.open_connection("127.0.0.1", site.service.port)
            head = f"{method} {path} HTTP/{version}\r\nConnection: close\r\nHost: ".encode()
            writer.write(head + host + b"\r\n" + forwarded + b"\r\n")
            answer = await asyncio.wait_for(reader.read(), 10)
            writer.close()
            status, body = int(answer.split()[1]), answer.partition(b"\r\n\r\n")[2]
            if path.startswith("/demo/"):
                assert status == 400, (method, path, host, answer)
                assert method == "HEAD" or json.loads(body)["code"] == "invalid_request"
            assert status not in (500, 502), (method, path, host)
    told = [json.loads(line) for line in site.log.getvalue().splitlines()]
    assert [line for line in told if line["event"] == "defect"] == []
    refused = [line for line in told if line.get("route") == "/demo/" and line.get("status") == 400]
    assert len(refused) == len(HOSTS)


@pytest.mark.parametrize(
    "host",
    ["localhost", "LOCALHOST:1", "[::1]:65535", "[::ffff:1.2.3.4]", "a.b-c_d.example.", "10.0.0.1"],
)
async def test_a_usual_host_is_taken(site: Site, host: str) -> None:
    async with site.session.get(f"{site.origin}/demo/", headers={"Host": host}) as served:
        assert served.status == 200


async def test_a_wrong_method_is_refused_in_the_same_shape(ada: Visitor) -> None:
    refused = await ada.get("/api/sign-out")
    assert (refused.status, refused.code) == (405, "method_not_allowed")
    assert refused.headers["Allow"] == "POST"

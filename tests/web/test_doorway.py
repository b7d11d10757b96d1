"""At the door: what changes while a body is on its way, headers that are sent twice, who may read
the metrics, who reads nothing.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import replace

import pytest

from broker.app import Service, assemble, serve
from broker.embedded import EmbeddedStores
from broker.model import Policy
from broker.web import Limits
from tests.conftest import OpenApp, Started, Starter, settings_for
from tests.support.authenticator import Authenticator, flex_wire_form
from tests.support.processes import DEADLINE, free_port
from tests.support.servers import eventually
from tests.support.signals import lines, refused
from tests.support.waited import Waited
from tests.support.wire import ORIGIN, Wire


class SlowRequest:
    """A request whose head is here and whose body is still to come."""

    def __init__(self, wire: Wire, path: str, body: object, **headers: str) -> None:
        self._body = json.dumps(body).encode()
        lines = [f"POST /v1/apps/{wire.app_id}{path} HTTP/1.1", "Host: broker", "Connection: close"]
        lines += [f"Content-Length: {len(self._body)}", *(f"{n}: {v}" for n, v in headers.items())]
        self._head = "\r\n".join([*lines, "", ""]).encode()

    async def begin(self, broker: Started) -> None:
        self._reader, self._writer = await asyncio.open_connection("127.0.0.1", broker.service.port)
        self._writer.write(self._head + self._body[:1])
        await self._writer.drain()

    async def end(self) -> tuple[int, bytes]:
        self._writer.write(self._body[1:])
        answer = await asyncio.wait_for(self._reader.read(), DEADLINE)
        self._writer.close()
        return int(answer.split()[1]), answer.partition(b"\r\n\r\n")[2]


async def admitted(broker: Started, app_id: str, looked_up: Callable[[], float]) -> None:
    """Wait until the guard has let the request in, and a while longer, so that its body counts as
    slow.
    """
    await eventually(lambda: looked_up() > 0, "the look-up")
    await asyncio.sleep(0.2)  # the slowness itself


async def test_a_key_revoked_while_the_body_comes_is_refused(broker: Started, wire: Wire) -> None:
    key, secret = await broker.parts.directory.create_key(wire.app_id, "second")
    fields = {"external_id": "ann", "passkey_display_name": "Ann"}
    slow = SlowRequest(wire, "/transactions/register", fields, Authorization=f"Bearer {secret}")
    await slow.begin(broker)
    looks = lambda: broker.metric("broker_store_seconds_count", store="postgres", operation="key")  # noqa: E731
    await admitted(broker, wire.app_id, looks)
    assert await broker.parts.directory.revoke_key(wire.app_id, key.id)
    with refused(broker, "invalid_access_token", "key_unknown"):
        status, body = await slow.end()
    assert (status, json.loads(body)["code"]) == (401, "invalid_access_token")


async def test_an_origin_removed_while_the_body_comes_is_refused(
    broker: Started, wire: Wire
) -> None:
    slow = SlowRequest(wire, "/authenticate/transactions/webauthn/start", {}, Origin=ORIGIN)
    await slow.begin(broker)
    looks = lambda: broker.metric("broker_store_seconds_count", store="postgres", operation="app")  # noqa: E731
    await admitted(broker, wire.app_id, looks)
    app = await broker.parts.directory.app(wire.app_id)
    await broker.parts.directory.update_app(replace(app, origins=("https://www.example.org",)))
    with refused(broker, "operation_not_allowed", "origin"):
        status, body = await slow.end()
    assert (status, json.loads(body)["code"]) == (403, "operation_not_allowed")


@pytest.mark.parametrize("name", ["Origin", "Authorization"])
async def test_a_header_that_decides_is_sent_once(broker: Started, wire: Wire, name: str) -> None:
    """A proxy in front may have read the other one."""
    value = ORIGIN if name == "Origin" else f"Bearer {wire.key}"
    path = (
        "/authenticate/transactions/webauthn/start" if name == "Origin" else "/authenticate/verify"
    )
    reader, writer = await asyncio.open_connection("127.0.0.1", broker.service.port)
    head = (
        f"POST /v1/apps/{wire.app_id}{path} HTTP/1.1\r\nHost: b\r\n"
        "Connection: close\r\nContent-Length: 2\r\n"
    )
    with refused(broker, "invalid_request", "header_twice"):
        writer.write(f"{head}{name}: {value}\r\n{name}: {value}\r\n\r\n{{}}".encode())
        answer = await asyncio.wait_for(reader.read(), DEADLINE)
    assert answer.startswith(b"HTTP/1.1 400")
    writer.close()


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("expect", ["", "Expect: \r\n"])
@pytest.mark.parametrize(
    ("encodings", "status", "code", "reason"),
    [
        (("identity", "gzip"), 400, "invalid_request", "header_twice"),
        (("gzip", "identity"), 400, "invalid_request", "header_twice"),
        (("identity", "identity"), 400, "invalid_request", "header_twice"),
        (("identity, gzip",), 415, "unsupported_media_type", "unsupported_media_type"),
        (("gzip, identity",), 415, "unsupported_media_type", "unsupported_media_type"),
    ],
)
async def test_an_encoding_is_said_once(
    broker: Started,
    wire: Wire,
    encodings: tuple[str, ...],
    status: int,
    code: str,
    reason: str,
    expect: str,
    chunked: bool,
) -> None:
    """A proxy in front may have unpacked by the other one."""
    reader, writer = await asyncio.open_connection("127.0.0.1", broker.service.port)
    lines = [
        f"POST /v1/apps/{wire.app_id}/authenticate/transactions/webauthn/start HTTP/1.1",
        "Host: b",
    ]
    lines += ["Transfer-Encoding: chunked" if chunked else "Content-Length: 2"]
    lines += [f"Content-Encoding: {value}" for value in encodings]
    body = "2\r\n{}\r\n0\r\n\r\n" if chunked else "{}"
    with refused(broker, code, reason):
        writer.write(("\r\n".join([*lines, expect]) + f"\r\n{body}").encode())
        writer.write_eof()
        answer = await asyncio.wait_for(reader.read(), 5)
    assert answer.startswith(f"HTTP/1.1 {status} ".encode())
    writer.close()


async def test_a_policy_made_stricter_applies_to_ceremonies_under_way(
    broker: Started, open_app: OpenApp
) -> None:
    wire, device = await open_app(Policy(user_verification="preferred")), Authenticator()
    app = await broker.parts.directory.app(wire.app_id)
    await wire.user("ann", device)
    handle, options = await wire.begin("authenticate", None)
    registration, creation = await wire.begin("register", await wire.open_registration("bea"))
    strict = replace(app, policy=replace(app.policy, user_verification="required"))
    await broker.parts.directory.update_app(strict)
    with refused(broker, "discoverable_login_failed", "user_verification"):
        answer = await wire.finish(
            "authenticate", handle, device.authenticate(options, ORIGIN, uv=False)
        )
    assert answer.status == 401
    made = flex_wire_form(Authenticator().register(creation, ORIGIN, uv=False))
    with refused(broker, "webauthn_login_failed", "user_verification"):
        assert (await wire.finish("register", registration, made)).status == 401


FORWARDED = [
    {},  # nginx's `proxy_pass` adds none
    *({name: "for=192.0.2.1"} for name in ("Forwarded", "X-Forwarded-For", "X-Real-IP", "Via")),
]


@pytest.mark.parametrize("headers", FORWARDED, ids=str)
async def test_a_port_that_pages_reach_has_no_metrics(
    broker: Started, wire: Wire, headers: dict[str, str]
) -> None:
    """The peer's address and forwarding headers decide nothing: a proxy on this machine has
    both.
    """
    with refused(broker, "not_found", "not_found"):
        answer = await wire.send("GET", f"{wire.url}/metrics", headers=headers)
    assert (answer.status, answer.code) == (404, "not_found")


@pytest.mark.parametrize("headers", FORWARDED, ids=str)
async def test_metrics_are_public_where_the_setting_says_so(
    start_broker: Starter, wire: Wire, headers: dict[str, str]
) -> None:
    public = await start_broker(metrics="public")
    answer = await wire.send("GET", f"{public.url}/metrics", headers=headers)
    assert (answer.status, b"broker_request_seconds" in answer.body) == (200, True)
    assert len(lines(public, route="/metrics", status=200)) == 1


@pytest.mark.parametrize("metrics", ["management", "public"])
async def test_metrics_are_on_the_management_port_only(
    start_broker: Starter, wire: Wire, metrics: str
) -> None:
    parted = await start_broker(management_port=free_port(), metrics=metrics)
    with refused(parted, "not_found", "not_found"):
        assert (await wire.send("GET", f"{parted.url}/metrics")).status == 404
    management = f"http://127.0.0.1:{parted.service.management_port}"
    assert (await wire.send("GET", f"{management}/metrics")).status == 200
    assert len(lines(parted, route="/metrics", status=200)) == 1


async def test_who_does_not_read_is_let_go_and_does_not_hold_up_the_end(
    stores: EmbeddedStores,
) -> None:
    parts = await assemble(settings_for(stores, drain_seconds=1.0))
    service: Service = await serve(parts, limits=Limits(body=0.3))
    reader, writer = await asyncio.open_connection("127.0.0.1", service.port, limit=1024)
    request = b"GET /sdk/passkey.js HTTP/1.1\r\nHost: b\r\n\r\n"
    writer.write(request * 2_000)  # and not a byte is read
    with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
        await asyncio.wait_for(_until_cut(writer, request), DEADLINE)
    with Waited() as waited:
        await asyncio.wait_for(service.close(), DEADLINE)
    assert waited.seconds < 5
    del reader


async def _until_cut(writer: asyncio.StreamWriter, request: bytes) -> None:
    while True:
        writer.write(request)
        await writer.drain()
        await asyncio.sleep(0.02)  # between two writes
        if writer.transport.is_closing():
            raise ConnectionResetError

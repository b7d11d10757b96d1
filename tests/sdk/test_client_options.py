"""The client's options: a given httpx client, certificates, proxies, retries of reads, paging; what
is never sent.

Each test runs with the blocking client and with the asynchronous one.
"""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import json
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from broker.sdk import passkey_broker as sdk
from broker.sdk.passkey_broker import AsyncBrokerClient, BrokerClient
from tests.support.scripted import APP, KEY, KINDS, Caller, ScriptedBroker, scripted_broker

Kind = type[BrokerClient] | type[AsyncBrokerClient]
AT = "2026-01-16T12:00:00.250000Z"
BUSY = {"code": "service_unavailable", "error": "Briefly."}
EVENT: dict[str, Any] = {
    "id": 1,
    "at": AT,
    "actor": "page",
    "action": "user.created",
    "result": "done",
    **dict.fromkeys(("reason", "external_id", "user_id", "passkey_id", "request_id")),
}
USER = {
    "id": "U" * 24,
    "external_id": "ada",
    "status": "active",
    "login_count": 0,
    **dict.fromkeys(("created_at", "updated_at", "last_login_at"), AT),
}
PASSKEY = {
    "id": "P" * 24,
    **dict.fromkeys(("credential_id", "user_name", "type"), "x"),
    **dict.fromkeys(("second_factor", "live", "backed_up"), True),
    "use_count": 1,
    "created_at": AT,
}


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
def kind(request: pytest.FixtureRequest) -> Kind:
    chosen: Kind = request.param
    return chosen


@pytest.fixture
async def scripted() -> AsyncIterator[ScriptedBroker]:
    async with scripted_broker() as broker:
        yield broker


@pytest.fixture
async def call(kind: Kind, scripted: ScriptedBroker) -> AsyncIterator[Caller]:
    caller = Caller(kind(scripted.url, APP, KEY))
    yield caller
    await caller("close")


async def collected(
    client: BrokerClient | AsyncBrokerClient, method: str, **named: Any
) -> list[Any]:
    """All that an iterator of either client yields."""
    found = getattr(client, method)(**named)
    if isinstance(client, AsyncBrokerClient):
        return [item async for item in found]
    return await asyncio.to_thread(list, found)


# -- the httpx client


async def test_its_version_is_in_the_user_agent(call: Caller, scripted: ScriptedBroker) -> None:
    scripted.says(201, {"transaction_id": "pbt_1"})
    await call("create_authenticate_transaction", "ada")
    assert scripted.seen[0].headers["User-Agent"] == f"passkey-broker-client/{sdk.__version__}"


async def test_a_given_http_client(kind: Kind, scripted: ScriptedBroker) -> None:
    """Its hooks see the requests; neither its authentication nor its redirects replace ours; it
    stays open.
    """
    hooked: list[str] = []

    async def hook_async(request: httpx.Request) -> None:
        hooked.append(request.method)

    def hook(request: httpx.Request) -> None:
        hooked.append(request.method)

    options: dict[str, Any] = {
        "auth": ("somebody", "else"),
        "follow_redirects": True,
        "trust_env": False,
    }
    http: Any
    if kind is AsyncBrokerClient:
        http = httpx.AsyncClient(event_hooks={"request": [hook_async]}, **options)
    else:
        http = httpx.Client(event_hooks={"request": [hook]}, **options)
    call = Caller(kind(scripted.url, APP, KEY, http=http))
    scripted.says(201, {"transaction_id": "pbt_1"}).says(307, b"", Location=scripted.url)
    assert await call("create_authenticate_transaction", "ada") == "pbt_1"
    with pytest.raises(sdk.UnexpectedAnswer):
        await call("create_authenticate_transaction", "ada")
    await call("close")
    assert hooked == ["POST", "POST"]
    assert not http.is_closed
    assert {seen.headers["Authorization"] for seen in scripted.seen} == {f"Bearer {KEY}"}
    assert KEY not in f"{http.headers!r} {vars(call.client)!r} {vars(call.client._address)!r}"


def test_options_that_contradict_each_other(kind: Kind) -> None:
    other: Any = httpx.AsyncClient() if kind is BrokerClient else httpx.Client()
    fitting: Any = httpx.Client() if kind is BrokerClient else httpx.AsyncClient()
    wrong: list[dict[str, Any]] = [
        {"http": other},
        {"http": fitting, "verify": ssl.create_default_context()},
        {"http": fitting, "proxy": "http://127.0.0.1:1"},
        {"verify": False},
        {"read_retries": -1},
        {"read_retries": 11},
        {"read_retries": True},
    ]
    for options in wrong:
        with pytest.raises(ValueError, match=r"http|verify|read_retries"):
            kind("https://broker.example", APP, KEY, **options)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that signs itself, for the loopback address, with its key in the same file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "loopback")])
    now = datetime.datetime.now(datetime.UTC)
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    made = (
        x509.CertificateBuilder(
            name, name, key.public_key(), 1, now, now + datetime.timedelta(days=1)
        )
        .add_extension(x509.SubjectAlternativeName([address]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path_factory.mktemp("certificate") / "both.pem"
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path.write_bytes(private + made.public_bytes(serialization.Encoding.PEM))
    return path


async def test_certificates(kind: Kind, certificate: Path) -> None:
    """A broker behind a private authority is reached with that authority, and without it not at
    all.
    """
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate)
    async with scripted_broker(context) as scripted:
        scripted.says(201, {"transaction_id": "pbt_1"})
        trusting = ssl.create_default_context(cafile=str(certificate))
        call = Caller(kind(scripted.url, APP, KEY, verify=trusting))
        assert await call("create_authenticate_transaction", "ada") == "pbt_1"
        await call("close")
        call = Caller(kind(scripted.url, APP, KEY))
        with pytest.raises(sdk.BrokerUnreachable, match="certificate verify failed"):
            await call("create_authenticate_transaction", "ada")
        await call("close")
        assert len(scripted.seen) == 1


async def test_a_proxy(kind: Kind, scripted: ScriptedBroker) -> None:
    """It gets the request for a broker elsewhere; its password is in no repr."""
    proxy = scripted.url.replace("http://", "http://user:hidden@")
    scripted.says(201, {"transaction_id": "pbt_1"})
    call = Caller(kind("http://broker.invalid", APP, KEY, proxy=proxy))
    assert await call("create_authenticate_transaction", "ada") == "pbt_1"
    assert (
        scripted.seen[0].target == f"http://broker.invalid/v1/apps/{APP}/transactions/authenticate"
    )
    assert "hidden" not in repr(call.client)
    await call("close")


# -- retries


async def lost(request: web.BaseRequest) -> web.StreamResponse:
    assert request.transport is not None
    request.transport.close()
    return web.Response()


async def test_reads_are_repeated_where_that_is_asked_for(
    kind: Kind, scripted: ScriptedBroker
) -> None:
    call = Caller(kind(scripted.url, APP, KEY, read_retries=2))
    scripted.does(lost).says(503, BUSY, Retry_After="0").says(200, {"passkey": PASSKEY})
    assert (await call("get_passkey", "P" * 24)).id == "P" * 24
    assert [seen.method for seen in scripted.seen] == ["GET"] * 3
    scripted.seen.clear()
    scripted.says(503, BUSY, Retry_After="0").does(lost).says(503, BUSY, Retry_After="0")
    with pytest.raises(sdk.BrokerUnavailable):
        await call("get_passkey", "P" * 24)
    assert len(scripted.seen) == 3
    await call("close")


@pytest.mark.parametrize(
    ("status", "body", "after"),
    [
        (503, BUSY, "6"),
        (500, BUSY, "0"),
        (502, {}, "0"),
        (429, {"code": "too_many_requests"}, "0"),
        (200, {}, "0"),
    ],
)
async def test_what_ends_the_retries(
    kind: Kind, scripted: ScriptedBroker, status: int, body: object, after: str
) -> None:
    """Another status, an answer that can't be read, or a broker that asks for a longer pause than a
    call shall take.
    """
    call = Caller(kind(scripted.url, APP, KEY, read_retries=5))
    scripted.says(status, body, Retry_After=after)
    with pytest.raises(sdk.BrokerError):
        await call("get_passkey", "P" * 24)
    assert len(scripted.seen) == 1
    await call("close")


ID = "P" * 24
CREDENTIAL = {"id": "x"}
WRITES: list[tuple[str, tuple[Any, ...]]] = [
    ("cancel_transaction", ("pbt_1",)),
    ("start_registration", ("ada", "Ada")),
    ("finish_registration", (CREDENTIAL,)),
    ("start_authentication", ("ada",)),
    ("finish_authentication", (CREDENTIAL,)),
    ("start_user_registration", ("ada", "Ada")),
    ("finish_user_registration", ("ada", CREDENTIAL)),
    ("start_user_authentication", ("ada",)),
    ("finish_user_authentication", ("ada", CREDENTIAL)),
    ("rename_passkey", (ID, "Phone")),
    ("set_passkey_owner", (ID, "ada")),
    ("delete_passkey", (ID,)),
    ("prepare_signals", ("prune",)),
    ("create_mail_code", ("ada@example.org", "sign-up")),
    ("verify_mail_code", ("pbm_1", "s", "000000")),
    ("delete_mail_code", ("pbm_1",)),
]
WRITES_OF_A_USER: list[tuple[str, tuple[Any, ...]]] = [
    ("revoke_passkey", ("ada", ID)),
    ("rename_user", ("ada", "Ada L.")),
    ("disable_user", ("ada",)),
    ("enable_user", ("ada",)),
]


@pytest.mark.parametrize(
    ("method", "arguments"), WRITES + WRITES_OF_A_USER, ids=lambda part: str(part)
)
@pytest.mark.parametrize("fault", ["lost", "503"])
async def test_other_writes_are_never_repeated(
    kind: Kind, scripted: ScriptedBroker, method: str, arguments: tuple[Any, ...], fault: str
) -> None:
    call = Caller(kind(scripted.url, APP, KEY, read_retries=5))
    if (method, arguments) in WRITES_OF_A_USER:
        scripted.says(200, {"users": [USER]})
    if fault == "503":
        scripted.says(503, BUSY, Retry_After="0")
    else:
        scripted.does(lost)
    with pytest.raises(sdk.BrokerError) as caught:
        await call(method, *arguments)
    assert type(caught.value) is (
        sdk.BrokerUnavailable if fault == "503" else sdk.BrokerUnreachable
    )
    assert [seen.method for seen in scripted.seen if seen.method != "GET"] == [
        scripted.seen[-1].method
    ]
    await call("close")


# -- paging


async def test_iterating_users(call: Caller, scripted: ScriptedBroker) -> None:
    """The first page's `created_before` keeps the next ones from moving."""
    users = [{**USER, "external_id": name} for name in ("ada", "bob", "cid")]
    page = {"total_users": 3, "created_before": 1768564801}
    scripted.says(200, {**page, "users": users[:2]}).says(200, {**page, "users": users[2:]})
    found = await collected(call.client, "iter_users", status="active", limit=2)
    assert [user.external_id for user in found] == ["ada", "bob", "cid"]
    assert [seen.target.partition("?")[2] for seen in scripted.seen] == [
        "page=1&limit=2&status=active",
        "page=2&limit=2&status=active&created_before=1768564801",
    ]


async def test_iterating_passkeys(call: Caller, scripted: ScriptedBroker) -> None:
    """Ends with the last page, also where that has become empty meanwhile."""
    scripted.says(200, {"passkeys": [PASSKEY], "total": 2}).says(200, {"passkeys": [], "total": 2})
    assert len(await collected(call.client, "iter_passkeys", external_id="ada", limit=1)) == 1
    assert [seen.target.partition("?")[2] for seen in scripted.seen] == [
        "page=1&limit=1&external_id=ada",
        "page=2&limit=1&external_id=ada",
    ]


async def test_iterating_events(call: Caller, scripted: ScriptedBroker) -> None:
    """Newer events don't move the pages, and one that is found again is yielded once."""
    events = [{**EVENT, "id": number} for number in (3, 2, 2, 1)]
    scripted.says(200, {"events": events[:2], "total": 4}).says(
        200, {"events": events[2:], "total": 4}
    )
    found = await collected(call.client, "iter_events", action="user.created", limit=2)
    assert [event.id for event in found] == [3, 2, 1]
    assert [seen.target.partition("?")[2] for seen in scripted.seen] == [
        "page=1&limit=2&action=user.created",
        "page=2&limit=2&before=2026-01-16T12%3A00%3A00.250001%2B00%3A00&action=user.created",
    ]


async def test_an_iterator_asks_for_no_page_that_nobody_wants(
    call: Caller, scripted: ScriptedBroker
) -> None:
    scripted.says(200, {"passkeys": [PASSKEY], "total": 9})
    found: Any = call.client.iter_passkeys(limit=1)
    if isinstance(call.client, AsyncBrokerClient):
        assert (await anext(found)).id == ID
        await found.aclose()
    else:
        assert (await asyncio.to_thread(next, found)).id == ID
        found.close()
    assert len(scripted.seen) == 1


# -- what is never sent

NO_OBJECTS: list[Any] = [
    None,
    "",
    "{}",
    7,
    [CREDENTIAL],
    {"id": b"x"},
    {"id": {1}},
    {"n": float("nan")},
    {"\ud800": 1},
]
NO_TEXTS: list[Any] = [None, "", 7, True, b"x", ["x"]]
NO_FLAGS: list[Any] = [None, 1, "true"]
NEVER: list[tuple[str, tuple[Any, ...], dict[str, Any], list[Any]]] = [
    *[(f"finish_{kind}", (...,), {}, NO_OBJECTS) for kind in ("registration", "authentication")],
    *[
        (f"finish_user_{kind}", ("ada", ...), {}, NO_OBJECTS)
        for kind in ("registration", "authentication")
    ],
    *[
        (f"finish_user_{kind}", (..., CREDENTIAL), {}, NO_TEXTS)
        for kind in ("registration", "authentication")
    ],
    *[(f"start{who}_registration", (..., "Ada"), {}, NO_TEXTS) for who in ("", "_user")],
    *[(f"start{who}_registration", ("ada", ...), {}, NO_TEXTS) for who in ("", "_user")],
    ("start_user_authentication", (...,), {}, NO_TEXTS),
    ("start_authentication", (), {"external_id": ..., "discoverable": True}, NO_TEXTS[1:]),
    ("start_authentication", ("ada",), {"approval": ...}, [{"id": "1", "data": 1}, "1", ("1", 1)]),
    ("start_authentication", ("ada",), {"approval": sdk.ApprovalRequest("", 1)}, [...]),
    ("start_authentication", ("ada",), {"approval": sdk.ApprovalRequest("1", {1})}, [...]),
    ("finish_authentication", (CREDENTIAL,), {"approval": ...}, NO_FLAGS),
    ("finish_registration", (CREDENTIAL,), {"second_factor": ...}, NO_FLAGS),
    ("verify_nonce", ("pbn_1",), {"signed": ...}, NO_FLAGS),
    (
        "create_authenticate_transaction",
        ("ada",),
        {"ceremony_timeout": ...},
        [0, -1, True, "60", float("nan")],
    ),
    ("create_authenticate_transaction", ("ada",), {"mediation": ...}, NO_TEXTS[1:]),
    ("create_mail_code", (..., "sign-up"), {}, NO_TEXTS),
    ("create_mail_code", ("ada@example.org", ...), {}, NO_TEXTS),
    ("create_mail_code", ("ada@example.org", "sign-up"), {"metadata": ...}, NO_OBJECTS[1:]),
    ("create_mail_code", ("ada@example.org", "sign-up"), {"skip_rate_limit": ...}, NO_FLAGS),
    ("verify_mail_code", (..., "s", "000000"), {}, NO_TEXTS),
    ("verify_mail_code", ("pbm_1", ..., "000000"), {}, NO_TEXTS),
    ("verify_mail_code", ("pbm_1", "s", ...), {}, NO_TEXTS),
    ("set_passkey_owner", (ID, ...), {}, NO_TEXTS),
    ("rename_user", (..., "Ada"), {}, NO_TEXTS),
    ("rename_user", ("ada", ...), {}, NO_TEXTS),
    ("disable_user", (...,), {}, NO_TEXTS),
    ("enable_user", (...,), {}, NO_TEXTS),
    ("list_approvals", (...,), {}, NO_TEXTS),
    ("get_user_by_id", (...,), {}, NO_TEXTS),
    ("list_users", (), {"created_before": ...}, [-1, True, "7", 1.5]),
    ("list_users", (), {"limit": ...}, [0, True, "7", None]),
    ("list_events", (), {"after": ...}, [AT, 7, datetime.datetime(2026, 1, 16)]),
    ("list_events_after", (...,), {}, NO_TEXTS),
    *[
        (method, (...,), {}, [None, 7, b"P"])
        for method in ("get_passkey", "delete_passkey", "get_mail_code", "delete_mail_code")
    ],
]


@pytest.mark.parametrize(("method", "arguments", "named", "values"), NEVER, ids=str)
async def test_arguments_are_judged_before_anything_is_sent(
    call: Caller,
    scripted: ScriptedBroker,
    method: str,
    arguments: tuple[Any, ...],
    named: dict[str, Any],
    values: list[Any],
) -> None:
    for value in values:
        with pytest.raises(sdk.InvalidRequest) as caught:
            await call(
                method,
                *[value if argument is ... else argument for argument in arguments],
                **{
                    name: value if argument is ... else argument for name, argument in named.items()
                },
            )
        assert caught.value.code == "invalid_request"
    assert scripted.seen == []


@pytest.mark.parametrize("odd", ["", ".", "..", "a/b", "a?b", "a%2Fb", "ü"])
async def test_ids_that_would_change_the_path(
    call: Caller, scripted: ScriptedBroker, odd: str
) -> None:
    for method in ("get_passkey", "delete_passkey"):
        with pytest.raises(sdk.PasskeyNotFound):
            await call(method, odd)
    with pytest.raises(sdk.PasskeyNotFound):
        await call("set_passkey_owner", odd, "ada")
    for method in ("get_mail_code", "delete_mail_code"):
        with pytest.raises(sdk.MailCodeNotFound):
            await call(method, odd)
    assert scripted.seen == []


# -- what answers say


@pytest.mark.parametrize(
    "damage",
    [{"purpose": "authenticate_second_factor"}, {"purpose": "register"}, {"external_id": "eve"}],
)
async def test_a_receipt_of_another_ceremony_is_none(
    call: Caller, scripted: ScriptedBroker, damage: dict[str, str]
) -> None:
    flags = (
        "user_present",
        "user_verified",
        "backup_eligible",
        "backed_up",
        "backup_changed",
        "counter_regressed",
    )
    texts = ("user_id", "passkey_id", "credential_id", "origin", "attestation")
    receipt = {**dict.fromkeys(flags, True), **dict.fromkeys(texts, "x"), "at": AT}
    said = {**receipt, "external_id": "ada", "purpose": "authenticate"}
    scripted.says(200, said).says(200, {**said, **damage})
    assert (await call("finish_user_authentication", "ada", CREDENTIAL)).external_id == "ada"
    with pytest.raises(sdk.UnexpectedAnswer):
        await call("finish_user_authentication", "ada", CREDENTIAL)


async def test_what_an_error_carries(call: Caller, scripted: ScriptedBroker) -> None:
    """A passkey that the page may have forgotten, and where the code is explained; what can't be
    read is left out.
    """
    signal = {"type": "unknown_credential", "rp_id": "example.org", "credential_id": "AQID"}
    said = {
        "code": "webauthn_login_failed",
        "error": "No.",
        "signal": signal,
        "doc": "https://docs.example/#x",
    }
    scripted.says(401, said).says(401, {**said, "signal": {**signal, "rp_id": 7}, "doc": 7})
    with pytest.raises(sdk.CeremonyRefused) as caught:
        await call("finish_authentication", CREDENTIAL)
    assert caught.value.signal == sdk.UnknownCredential("example.org", "AQID")
    assert caught.value.doc == "https://docs.example/#x"
    with pytest.raises(sdk.CeremonyRefused) as caught:
        await call("finish_authentication", CREDENTIAL)
    assert (caught.value.signal, caught.value.doc) == (None, None)


async def test_secrets_are_in_no_repr(call: Caller, scripted: ScriptedBroker) -> None:
    made = {
        "id": "pbm_1",
        "purpose": "sign-up",
        "email": "ada@example.org",
        "created_at": AT,
        "expires_at": AT,
        "attempts_left": 5,
        "secret": "hidden-secret",
        "code": "424242",
        "message": {"html": "<b>424242</b>", "text": "424242"},
    }
    scripted.says(201, {"mail_code": made})
    code = await call("create_mail_code", "ada@example.org", "sign-up", metadata={"a": [1]})
    assert (code.secret, code.code, code.message.text) == ("hidden-secret", "424242", "424242")
    assert "hidden" not in repr(code)
    assert "424242" not in repr(code)
    assert json.loads(scripted.seen[0].body) == {
        "email": "ada@example.org",
        "purpose": "sign-up",
        "metadata": {"a": [1]},
    }

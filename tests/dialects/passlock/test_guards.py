"""Who may call Passlock's routes, from where, and what becomes of input that can't be used: on
every route.
"""

from __future__ import annotations

import socket
from itertools import product
from typing import Any

import pytest

from broker.app import application
from broker.demo.guard import COOKIE_PATH
from tests.conftest import OpenApp, Started, Starter
from tests.support.authenticator import Authenticator
from tests.support.passlock import ICONS, KEY_SETS, KEYED, PAGES, POSTS, Passlock, filled, judge
from tests.support.signals import lines, refused, same_answer
from tests.support.wire import ORIGIN, Answer, Wire

BODIES: list[bytes] = [
    b"",
    b"[]",
    b"{",
    b'"x"',
    b"null",
    b"{}{}",
    b"\xff\xfe",
    b"\xef\xbb\xbf{}",
    b'{"a":NaN}',
    b'{"a":1e999}',
    b'{"a":1,"a":2}',
    b'{"userId":"a\\u0000b"}',
    b'{"userId":"\\ud800"}',
    b'{"a":' * 40 + b"1" + b"}" * 40,
]
VALUES: list[Any] = [
    None,
    "",
    " ",
    7,
    -1,
    1.5,
    True,
    [],
    ["x"],
    [None],
    {},
    {"a": 1},
    "x" * 300,
    "\u202e",
    "pbt_x",
    "/../",
]

BODIED = [
    r for r in sorted(KEYED) if KEYED[r] is not None and r[1].startswith("/v2/")
]  # the others are the same


def key(wire: Wire) -> dict[str, str]:
    return {"Authorization": f"Bearer {wire.key}"}


# -- keys ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "template"), sorted(KEYED))
async def test_passlocks_key_is_checked_before_anything_else(
    broker: Started, wire: Wire, open_app: OpenApp, method: str, template: str
) -> None:
    """Without the app's key nobody gets to know what is wrong with a body, nor whether there is
    such an app.
    """
    other = await open_app()
    nobody = Wire(wire.session, wire.url, "x" * 24, wire.key)
    first = None
    for at, headers in (
        (wire, {}),
        (wire, key(other)),
        (nobody, key(wire)),
        (wire, {"Authorization": "Basic x"}),
    ):
        for body in (b"{", b" " * 70_000, b""):
            answer = await at.send(method, filled(template, at), data=body, headers=headers)
            judge(answer)
            assert (answer.status, answer.json["_tag"]) == (403, "@error/Forbidden")
            same_answer(first or answer, answer)
            first = answer
    assert lines(broker, code="invalid_access_token", status=403)


async def test_keyed_answers_have_no_cors_headers(wire: Wire) -> None:
    """A key does not belong in a page."""
    for method, template in sorted(KEYED):
        answer = await wire.send(
            method, filled(template, wire), headers=key(wire) | {"Origin": ORIGIN}
        )
        assert not [name for name in answer.headers if name.lower().startswith("access-control")]


# -- tenancies -------------------------------------------------------------------------------------

NO_TENANCY = (
    "short",
    "x" * 23,
    "x" * 25,
    "x" * 23 + "-",
    "x" * 23 + "%C3%A9",
    "%20",
    "%0A",
    "pbk_x",
    "1" * 3000,
)
METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "HEAD")


@pytest.mark.parametrize("template", sorted({template for _, template in (*KEYED, *PAGES)}))
async def test_an_id_that_can_not_be_a_tenancys(broker: Started, wire: Wire, template: str) -> None:
    """The one tag that every call of the SDKs declares, for whatever method, with and without a
    key.
    """
    with refused(broker, "app_not_found", "tenancy", times=len(NO_TENANCY) * len(METHODS) * 2):
        for tenancy, method in product(NO_TENANCY, METHODS):
            for headers in (key(wire), {"Origin": ORIGIN}):
                url = filled(template.replace("{app_id}", tenancy), wire)
                answer = await wire.send(method, url, headers=headers)
                assert answer.status == 403, (method, tenancy)
                if method != "HEAD":
                    judge(answer)
                    assert answer.json["_tag"] == "@error/Forbidden"


async def test_a_tenancy_that_is_not_there(broker: Started, wire: Wire) -> None:
    """Every route, and the same tag."""
    nobody = Wire(wire.session, wire.url, "x" * 24, wire.key)
    for routes, code in ((sorted(KEYED), "invalid_access_token"), (sorted(PAGES), "app_not_found")):
        for method, template in routes:
            answer = await nobody.send(method, filled(template, nobody), headers=key(wire))
            judge(answer)
            assert (answer.status, answer.json["_tag"]) == (403, "@error/Forbidden"), (
                method,
                template,
            )
            assert lines(broker, code=code, status=403, method=method)


async def test_paths_of_others_are_no_tenancies(broker: Started, wire: Wire) -> None:
    """Whatever else answers below the root: a path there that looks like one of Passlock's stays
    what it was, in the shape of its owner.
    """
    ours = {template for _, template in (*KEYED, *PAGES, *KEY_SETS, *ICONS)}
    resources = application(broker.parts, management=True, browser=True).router.resources()
    others = {
        resource.canonical.split("/")[1] for resource in resources if resource.canonical not in ours
    }
    assert {"v1", "hanko", "propelauth", "health", "sdk"} <= others
    for first in sorted({*others, "metrics", COOKIE_PATH.strip("/"), "aaguid", ".well-known"}):
        for template in sorted({t for t in ours if t.startswith("/{app_id}/")}):
            answer = await wire.send("GET", filled(template.replace("{app_id}", first), wire))
            assert answer.status == 404, (first, template)
            owner = {"aaguid": "_tag", "hanko": "title", "propelauth": "type"}.get(first, "code")
            assert owner in answer.json, (first, template)


# -- pages -----------------------------------------------------------------------------------------


async def test_passlocks_pages_and_their_origins(broker: Started, wire: Wire) -> None:
    """A registered one is echoed, never with credentials; none passes; any other is refused before
    the body is looked at.
    """
    for method, template in sorted(PAGES):
        url = filled(template, wire)
        answer = await wire.send(method, url, data=b"{", headers={"Origin": ORIGIN})
        assert (answer.headers["Access-Control-Allow-Origin"], answer.headers["Vary"]) == (
            ORIGIN,
            "Origin",
        )
        assert "Access-Control-Allow-Credentials" not in answer.headers
        if method == "OPTIONS":
            assert (answer.status, answer.headers["Access-Control-Allow-Headers"]) == (
                204,
                "content-type",
            )
        answer = await wire.send(method, url, data=b"{")
        assert not [name for name in answer.headers if name == "Access-Control-Allow-Origin"]
        for stranger in ("https://evil.example", "null"):
            if method == "OPTIONS":
                continue
            with refused(broker, "operation_not_allowed", "origin"):
                answer = await wire.send(method, url, data=b"{", headers={"Origin": stranger})
            judge(answer)
            assert (answer.status, answer.json["_tag"]) == (403, "@error/Forbidden")


async def test_a_key_changes_nothing_on_a_page(wire: Wire) -> None:
    for template, body in sorted(POSTS.items()):
        first = await wire.send("POST", filled(template, wire), json=body)
        same_answer(
            first, await wire.send("POST", filled(template, wire), json=body, headers=key(wire))
        )


async def test_callers_without_a_key_learn_nothing(
    wire: Wire, open_app: OpenApp, device: Authenticator
) -> None:
    """An app with a user and a passkey, and an empty one, answer a page's guesses with the same
    bytes.
    """
    empty, passkey_id = await open_app(), await Passlock(wire).user("ann", device)
    for template, body in sorted(POSTS.items()):
        guess = body | {"allowCredentials": [passkey_id], "userId": "ann"}
        same_answer(
            await wire.send("POST", filled(template, wire), json=guess),
            await empty.send("POST", filled(template, empty), json=guess),
        )


# -- input -----------------------------------------------------------------------------------------


async def told(broker: Started, answer: Answer, what: object) -> None:
    """Fail unless it is a clear refusal, or an answer that has nothing to refuse."""
    assert answer.status < 500, (what, answer.body)
    if answer.status >= 400:
        judge(answer)


@pytest.mark.parametrize(("method", "template"), BODIED)
async def test_keyed_bodies_that_can_not_be_used(
    broker: Started, wire: Wire, method: str, template: str
) -> None:
    url, good = filled(template, wire), KEYED[method, template] or {}
    for body in BODIES:
        answer = await wire.send(method, url, data=body, headers=key(wire))
        await told(broker, answer, body)
        if body or method != "DELETE":
            assert answer.status == 400, body
    more = (
        "displayName",
        "rpName",
        "allowCredentials",
        "excludeCredentials",
        "discoverable",
        "timeout",
        "passkeyIds",
    )
    for name in (*good, *more):
        for value in VALUES:
            answer = await wire.send(method, url, json=good | {name: value}, headers=key(wire))
            await told(broker, answer, (name, value))
    assert not lines(broker, status=500)


@pytest.mark.parametrize("template", [t for t in sorted(POSTS) if t.startswith("/v2/")])
async def test_bodies_of_pages_that_can_not_be_used(
    broker: Started, wire: Wire, template: str
) -> None:
    url, good = filled(template, wire), POSTS[template]
    for body in BODIES:
        answer = await wire.send("POST", url, data=body)
        judge(answer)
        assert answer.status == 400, body
    for name in (*good, "username", "allowCredentials", "userVerification", "mediation"):
        for value in VALUES:
            answer = await wire.send("POST", url, json=good | {name: value})
            await told(broker, answer, (name, value))
    assert not lines(broker, status=500)


async def test_odd_places_in_a_path(broker: Started, wire: Wire) -> None:
    odd = (
        "%00",
        "%ff",
        "%2f",
        "%25",
        "..%2f",
        "x" * 3000,
        "%F0%9F%94%91",
        "a,b",
        "'",
        "%22",
        "pbn_" + "a" * 43,
    )
    templates = [
        (m, t) for m, t in (*sorted(KEYED), *sorted(PAGES)) if t.count("{") == 2 and m != "OPTIONS"
    ]
    assert len(templates) > 15
    for method, template in templates:
        for value in odd:
            path = template.replace("{app_id}", wire.app_id)
            path = path[: path.index("{")] + value + path[path.index("}") + 1 :]
            answer = await wire.send(
                method, wire.url + path, json={"userId": "ann"}, headers=key(wire)
            )
            await told(broker, answer, (method, path))
    assert not lines(broker, status=500)
    for method, body in (("PATCH", {"username": "ann"}), ("DELETE", None)):
        path = f"{Passlock(wire).base}/users/a%00b/passkeys/"
        await told(
            broker, await wire.send(method, path, json=body, headers=key(wire)), (method, path)
        )
        assert lines(broker, method=method, status=400, code="invalid_request")


async def test_any_content_type_is_read_as_json(wire: Wire, device: Authenticator) -> None:
    token = await Passlock(wire).authorize_registration("ann")
    url = Passlock(wire).base + "/passkey/registration/options"
    for content_type in ("application/json; charset=utf-8", "text/plain"):
        answer = await wire.send(
            "POST", url, json={"registrationToken": token}, headers={"Content-Type": content_type}
        )
        assert (answer.status, answer.headers["Content-Type"]) == (200, "application/json")


# -- two ports -------------------------------------------------------------------------------------


async def test_passlock_with_a_management_port(
    start_broker: Starter, session: Any, device: Authenticator
) -> None:
    """Keys work on one port, pages on the other, the key set on both, and a whole sign-in goes over
    both.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    started = await start_broker(management_port=port)
    public = await Wire.open(started.service, session)
    management = Wire(session, f"http://127.0.0.1:{port}", public.app_id, public.key)
    for routes, wrong in ((sorted(KEYED), public), (sorted(PAGES | ICONS), management)):
        for method, template in routes:
            answer = await wrong.send(method, filled(template, wrong), headers=key(public))
            assert (answer.status, answer.json["_tag"]) in (
                (404, "@error/NotFound"),
                (405, "@error/BadRequest"),  # where the other port's routes have another method
            ), (method, template)
            judge(answer)
    for _, path in KEY_SETS:
        first = await public.send("GET", public.url + path)
        assert first.status == 200
        assert first.json == (await management.send("GET", management.url + path)).json
    backend, page = Passlock(management), Passlock(public)
    token = {"registrationToken": await backend.authorize_registration("ann")}
    done = await page.run("registration", token, device)
    assert (await backend.exchange(done["code"]))["userId"] == "ann"

"""Two readers of a refusal: a person at a page, who is told what to do, and the operator, who is
told what to set.

Every refusal that a policy causes names the policy key in the request's log line and to a keyed
caller; no answer without a key names a policy, a command or a setting.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import broker as package
from broker import errors
from broker.app import application
from broker.ceremony.reasons import REASONS, REMEDIES, Reason, refuse
from broker.dialects import policy_keys
from broker.errors import Refusal, TooManyRequests
from broker.model import Policy
from tests.conftest import OpenApp, Started, Starter
from tests.support.authenticator import Authenticator, Authority, Misbehaviour
from tests.support.hanko import Hanko
from tests.support.passlock import Passlock
from tests.support.signals import lines
from tests.support.wire import ORIGIN, Answer, Wire

KEYS = {key.name for key in policy_keys()}
# What only an operator can do something with. Two keys are names of fields of requests too.
_FIELDS = {"authenticator_attachment", "user_verification"}
FOR_OPERATORS = re.compile(
    r"\bpolic(?:y|ies)\b|\bbroker (?:app|key|user|passkey|migrate|events|serve|dev)\b"
    r"|`|BROKER_|(?<![\w-])--[a-z]|\b(?:"
    + "|".join(key for key in sorted(KEYS - _FIELDS) if "_" in key)
    + r")\b"
)
# Refusals that no page meets: the command line's, and what a keyed caller asked for in a wrong
# form.
NO_PAGE = {"InvalidSetting", "SettingsFault", "Conflict"}
ROOT = Authority()


@dataclass(frozen=True, slots=True)
class Case:
    """A ceremony that a policy refuses: `how` the device answers."""

    reason: str
    keys: tuple[str, ...]  # of the policy, that the hint names
    kind: str = "authenticate"
    policy: Policy = field(default_factory=Policy)
    how: Misbehaviour = field(default_factory=Misbehaviour)


DIRECT = {"attestation": "direct", "attestation_roots": (ROOT.pem,)}
CASES = [
    Case("cross_origin", ("allow_cross_origin",), how={"cross_origin": True}),
    Case(
        "top_origin",
        ("top_origins",),
        policy=Policy(allow_cross_origin=True),
        how={"cross_origin": True, "top_origin": "https://elsewhere.example"},
    ),
    Case("user_verification", ("user_verification",), how={"uv": False}),
    Case("user_verification", ("user_verification",), "register", how={"uv": False}),
    Case("algorithm", ("algorithms",), "register", how={"algorithm": -35}),
    Case(
        "attachment",
        ("authenticator_attachment",),
        "register",
        Policy(authenticator_attachment="cross-platform"),
        {"answer": {"authenticatorAttachment": "platform"}},
    ),
    Case("counter", ("counter",), how={"counter": 0}),
    Case(
        "attestation_missing",
        ("attestation_required",),
        "register",
        Policy(attestation="direct", attestation_required="any"),
    ),
    Case(
        "attestation_unverified",
        ("attestation_required",),
        "register",
        Policy(**DIRECT, attestation_required="verified"),  # type: ignore[arg-type]
        {"attestation": "packed-self"},
    ),
    Case(
        "attestation_trust",
        ("attestation_roots",),
        "register",
        Policy(**DIRECT),  # type: ignore[arg-type]
        {"attestation": "packed"},
    ),
]


def told(broker: Started, reason: str, keys: tuple[str, ...]) -> str:
    """The hint of the last request line with this reason, which names these keys and how to set
    them.
    """
    hint = str(lines(broker, reason=reason)[-1]["hint"])
    for key in keys:
        assert key in KEYS
        assert f"policy {key} " in hint
        assert f"`broker app update --app A --set {key}=" in hint
    return hint


def plain(answer: Answer) -> None:
    """Fail unless the answer is for a person."""
    assert answer.status >= 400
    assert not FOR_OPERATORS.search(answer.body.decode()), answer.body


# -- ceremonies ------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.kind}-{case.reason}")
async def test_a_policy_that_refuses_a_ceremony_is_named(
    broker: Started, open_app: OpenApp, device: Authenticator, case: Case
) -> None:
    wire = await open_app(Policy() if case.kind == "register" else case.policy)
    await wire.user("ann", device)
    await wire.authenticate(None, device, counter=9)
    app = await broker.parts.directory.app(wire.app_id)
    if case.kind == "register":
        wire = await open_app(case.policy)
    app = await broker.parts.directory.app(wire.app_id)
    assert app.policy == case.policy
    device = device if case.kind == "authenticate" else Authenticator()
    make: Callable[..., Any] = getattr(device, case.kind)

    opened = (
        wire.open_registration("ann")
        if case.kind == "register"
        else wire.open_authentication("ann")
    )
    transaction = await opened
    handle, options = await wire.begin(case.kind, transaction)
    response = make(options, ORIGIN, **case.how)
    at_page = await wire.finish(case.kind, handle, response, transaction)
    plain(at_page)
    assert told(broker, case.reason, case.keys)

    body = {"external_id": "ann", **({"user_name": "ann"} if case.kind == "register" else {})}
    options = (await wire.keyed("POST", f"/{case.kind}/start", body)).json["options"]
    credential = make(options, ORIGIN, **case.how)
    answer = await wire.keyed(
        "POST", f"/{case.kind}/finish", {"external_id": "ann", "credential": credential}
    )
    assert answer.json["error"] == f"{at_page.json['error']} {told(broker, case.reason, case.keys)}"


async def test_limits_name_their_policy(
    broker: Started, open_app: OpenApp, device: Authenticator
) -> None:
    wire = await open_app(Policy(max_passkeys=1, discoverable_limit=1))
    transaction = await wire.open_registration("ann")
    await wire.user("ann", device)
    answer = await wire.page(
        "/register/transactions/webauthn/start", {"transaction_id": transaction}
    )
    plain(answer)
    hint = told(broker, "too_many_passkeys", ("max_passkeys",))
    keyed = await wire.keyed("POST", "/register/start", {"external_id": "ann", "user_name": "ann"})
    assert keyed.json["error"] == f"{answer.json['error']} {hint}"
    await wire.begin("authenticate", None)
    plain(await wire.page("/authenticate/transactions/webauthn/start", {}))
    assert told(broker, "discoverable_limit", ("discoverable_limit",))


async def test_what_is_not_live_or_not_open_names_its_policy(
    broker: Started, open_app: OpenApp, device: Authenticator
) -> None:
    wire = await open_app(Policy(live_at="redemption"))
    await wire.register(await wire.open_registration("ann"), device)
    handle, options = await wire.begin("authenticate", None)
    plain(await wire.finish("authenticate", handle, device.authenticate(options, ORIGIN)))
    assert told(broker, "not_live", ("live_at",))
    for page in (Passlock(wire), Passlock(wire, "")):
        plain(await page.page("/passkey/registration/options", {"username": "ann"}))
        assert told(broker, "not_open", ("passlock_open_registration",))


async def test_an_origin_that_is_not_registered_is_told_to_each_in_turn(
    broker: Started, wire: Wire, device: Authenticator
) -> None:
    """No policy but a list: the hint has the command that adds to it, and holds nothing of the
    request.
    """
    elsewhere = "https://elsewhere.example"
    await wire.user("ann", device)
    plain(await wire.page("/authenticate/transactions/webauthn/start", {}, origin=elsewhere))
    handle, options = await wire.begin("authenticate", await wire.open_authentication("ann"))
    plain(await wire.finish("authenticate", handle, device.authenticate(options, elsewhere)))
    options = await Hanko(wire).begin()
    plain(await Hanko(wire).page("/login/finalize", device.authenticate(options, elsewhere)))
    found = lines(broker, reason="origin")
    assert len(found) == 3
    for line in found:
        assert "`broker app update --app A --add-origin ORIGIN`" in line["hint"]
        assert elsewhere not in line["hint"]


# -- every route -----------------------------------------------------------------------------------


async def test_a_hint_reaches_no_answer_without_a_key(
    broker: Started, wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever route: the refusal comes before a key was accepted, and its hint is in the log
    alone.
    """

    async def full(*_: object) -> None:
        raise TooManyRequests(hint="A hint of the `broker`.")

    for look_up in ("app", "authorise", "owner"):
        monkeypatch.setattr(broker.parts.directory, look_up, full)
    routes = application(broker.parts, management=True, browser=True).router.routes()
    asked = 0
    for route in routes:
        assert route.resource is not None
        path = re.sub(r"\{\w+\}", "x" * 24, route.resource.canonical)
        if route.method == "*" or "{app_id}" not in route.resource.canonical:
            continue
        for headers in ({}, {"Authorization": f"Bearer {wire.key}", "apiKey": wire.key}):
            before = len(lines(broker, hint="A hint of the `broker`."))
            answer = await wire.send(route.method, wire.url + path, headers=headers)
            assert b"hint" not in answer.body, route
            asked += len(lines(broker, hint="A hint of the `broker`.")) - before
    assert asked > 100


# -- every sentence --------------------------------------------------------------------------------


def _calls() -> Iterator[tuple[str, str, ast.Call]]:
    """Every call in the broker's code by a name: file, name, call."""
    folder = Path(package.__file__).parent
    for file in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                yield str(file.relative_to(folder)), node.func.id, node


def _texts(node: ast.AST) -> str:
    """The literal text within an expression."""
    found = [
        n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)
    ]
    return " ".join(found)


def _refusals(of: type[Refusal] = Refusal) -> Iterator[type[Refusal]]:
    for kind in of.__subclasses__():
        yield kind
        yield from _refusals(kind)


def test_no_sentence_is_for_operators() -> None:
    """Neither a default nor what is said in its place: a command, a policy or a setting belongs in
    the hint.
    """
    kinds = {kind.__name__: kind for kind in _refusals()}
    assert len(kinds) > 25
    for name, kind in kinds.items():
        if kind.__module__ == errors.__name__ and name not in NO_PAGE:
            assert not FOR_OPERATORS.search(kind.default), name
    seen = 0
    for file, name, call in _calls():
        if (
            name in kinds
            and name not in NO_PAGE
            and call.args
            and not file.startswith(("cli/", "demo/"))
        ):
            seen += 1
            assert not FOR_OPERATORS.search(_texts(call.args[0])), (file, ast.unparse(call))
    assert seen > 80


def test_every_hint_about_a_policy_names_a_key() -> None:
    """The keys are the policy's, and each that decides whether a request passes has a hint."""
    hinted = set()
    for file, name, call in _calls():
        if name == "policy_hint":
            key = call.args[0]
            assert isinstance(key, ast.Constant), (file, ast.unparse(call))
            assert key.value in KEYS
            hinted.add(key.value)
    # These change what is asked for, or how long something lives, and refuse nothing by themselves.
    silent = {
        "attestation",
        "hints",
        "transaction_life",
        "ceremony_life",
        "nonce_life",
        "allow_weaker",
        "decoys",
        "hanko_algorithm",
    }
    named = {key for key in KEYS if any(f"{key};" in hint for hint in REMEDIES.values())}
    assert hinted | named | silent == KEYS
    assert not hinted & silent


def test_reasons_that_a_policy_gives_have_a_cause() -> None:
    assert set(REMEDIES) <= set(REASONS)
    assert {reason for reason, about in REASONS.items() if "policy" in about} <= set(REMEDIES)


@pytest.mark.parametrize("reason", REASONS)
def test_a_person_is_told_what_to_do(reason: Reason) -> None:
    """After a semicolon; the detail is for the other reader."""
    refusal = refuse(reason, "A detail.")
    what_to_do = refusal.sentence.partition("; ")[2]
    assert re.match(r"(?:try|use|open|set up|choose|sign in) ", what_to_do), refusal.sentence
    assert not FOR_OPERATORS.search(refusal.sentence)
    assert "A detail." not in refusal.sentence
    assert refusal.hint is not None
    assert refusal.hint.startswith("A detail.")


# -- the documentation -----------------------------------------------------------------------------


async def test_flex_refusals_link_to_their_documentation(start_broker: Starter, wire: Wire) -> None:
    """Where the operator names a page; no vendor's shape has a field for it."""
    docs = "https://docs.example.org/refusals"
    linked, plain = await start_broker(docs_url=docs), await start_broker()
    of_flex = [("GET", f"/v1/apps/{wire.app_id}/users"), ("GET", "/nowhere"), ("PUT", "/v1/apps")]
    of_flex.append(("POST", f"/v1/apps/{wire.app_id}/authenticate/transactions/webauthn/finish"))
    for method, path in of_flex:
        answer = await wire.send(method, linked.url + path)
        assert answer.json["doc"] == f"{docs}#{answer.code}"
        assert "doc" not in (await wire.send(method, plain.url + path)).json
    vendors = [
        ("POST", f"/hanko/{wire.app_id}/credentials"),
        ("GET", f"/v2/{wire.app_id}/passkeys"),
        ("POST", f"/propelauth/api/backend/v1/passkeys/{wire.app_id}"),
    ]
    for method, path in vendors:
        answer = await wire.send(method, linked.url + path)
        assert answer.status >= 400
        assert docs not in answer.body.decode()

"""`passkey.js` in a real Chromium with a virtual authenticator, against a scripted server of the
wire contract.

The server stands in for the broker, never for the page's code or the browser. It answers start with
real options and keeps what arrives; `webauthn` judges the answers, so the wire form is right when a
test is green. Where a test needs time to pass, the page's long timers are held and rung by hand.
"""

from __future__ import annotations

import json
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from webauthn import verify_authentication_response, verify_registration_response
from webauthn.helpers import base64url_to_bytes

from tests.browser.chromium import Answer, Authenticator, Chromium, Page, wait_until

SDK = Path(__file__).parents[2] / "broker" / "sdk" / "passkey.js"
PAGES = Path(__file__).parent / "pages"
LIFE = 300_000  # ms, of a challenge
RENEWAL = 240_000  # ms, when the page asks for the next one

REGISTER = "register/transactions/webauthn/"
AUTHENTICATE = "authenticate/transactions/webauthn/"

# Timers of a second and more wait to be rung; the request limit of 15 s too.
HELD_TIMERS = """
  window.timers = new Map();
  const [set, clear] = [window.setTimeout.bind(window), window.clearTimeout.bind(window)];
  window.setTimeout = (f, ms, ...rest) => {
    if (!(ms >= 1000)) return set(f, ms, ...rest);
    const id = set(() => {}, 0);
    timers.set(id, { f, ms });
    return id;
  };
  window.clearTimeout = (id) => (timers.delete(id), clear(id));
  window.waiting = (ms) => [...timers.values()].filter((timer) => timer.ms === ms).length;
  window.ring = (ms) => {
    const [id, { f }] = [...timers].find(([, timer]) => timer.ms === ms);
    timers.delete(id);
    f();
  };
"""

Reply = tuple[int, Any]  # status, and a JSON value or the body's bytes


@dataclass(eq=False)
class Post:
    """One request that reached the API; `body` is parsed."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]


@dataclass
class ScriptedBroker:
    """Serves the fixture page, the SDK and the four browser routes of app "APP".

    `replies[path]` holds what to say next there; without any, start gives options and finish a
    nonce. After `hold(step)`, answers to that step wait for `release`.
    """

    origin: str = ""
    life: int | None = LIFE
    posts: list[Post] = field(default_factory=list)
    options: list[dict[str, Any]] = field(default_factory=list)  # as offered
    creation: dict[str, Any] = field(default_factory=dict)  # changes to creation options
    request: dict[str, Any] = field(default_factory=dict)  # changes to request options
    replies: defaultdict[str, deque[Reply]] = field(default_factory=lambda: defaultdict(deque))
    held: str | None = None
    go: threading.Event = field(default_factory=threading.Event)

    def hold(self, step: str) -> None:
        self.held = step
        self.go.clear()

    def release(self) -> None:
        self.held = None
        self.go.set()

    def to(self, path: str) -> list[Post]:
        return [post for post in self.posts if post.path.endswith(path)]

    def answer(self, path: str, headers: dict[str, str], body: dict[str, Any]) -> Reply:
        route = path.partition("/v1/apps/APP/")[2]
        self.posts.append(Post(path, headers, body))
        if self.held and path.endswith(self.held):
            self.go.wait(30)
        if self.replies[route]:
            return self.replies[route].popleft()
        number = len(self.posts)
        if route.endswith("finish"):
            return 200, {"nonce": f"pbn_{number}"}
        challenge = f"challenge_{number:032}"
        if route.startswith("register"):
            options: dict[str, Any] = {
                "rp": {"id": "localhost", "name": "Fixture"},
                "user": {"id": "dXNlci1oYW5kbGU", "name": "ada", "displayName": "Ada L."},
                "challenge": challenge,
                "pubKeyCredParams": [{"type": "public-key", "alg": -7}],
                "authenticatorSelection": {
                    "residentKey": "required",
                    "userVerification": "required",
                },
                "hints": ["client-device"],
                **self.creation,
            }
        else:
            options = {"rpId": "localhost", "challenge": challenge, "userVerification": "required"}
            options |= self.request
        if self.life is not None:
            options["timeout"] = self.life
        self.options.append(options)
        return 200, {
            "handshake": {"id": f"pbh_{number}", "challenge": {"publicKey": options}},
            "transaction_id": body.get("transaction_id", ""),
        }


@pytest.fixture
def broker() -> Iterator[ScriptedBroker]:
    scripted = ScriptedBroker()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            if self.path == "/sdk/passkey.js":
                self._send(200, SDK.read_bytes(), "text/javascript")
            elif self.path == "/passkeys.html":
                self._send(200, (PAGES / "passkeys.html").read_bytes(), "text/html")
            else:
                self._send(204, b"", "text/plain")

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, said = scripted.answer(self.path, dict(self.headers), body)
            content = said if isinstance(said, bytes) else json.dumps(said).encode()
            self._send(status, content, "application/json")

        def _send(self, status: int, content: bytes, kind: str) -> None:
            try:
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)
            except ConnectionError:  # the page ended its request, as some tests want
                self.close_connection = True

        def log_message(self, format: str, *args: Any) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    scripted.origin = f"http://localhost:{server.server_port}"
    yield scripted
    scripted.release()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def device(page: Page) -> Authenticator:
    return page.authenticator()


def visit(page: Page, broker: ScriptedBroker, *scripts: str) -> None:
    """Open the fixture page, `scripts` running before its own."""
    for script in scripts:
        page.before_scripts(f"{{{script}}}")
    page.goto(broker.origin + "/passkeys.html")
    page.wait_until("window.ready")


def told(page: Page, call: str) -> dict[str, Any]:
    """What the page learns from `passkeys.<call>`."""
    answer: dict[str, Any] = page.js(f"told(passkeys.{call})")
    assert "nonce" in answer or answer.pop("proper") is True
    return answer


def begin(page: Page, name: str, call: str) -> None:
    """Start `passkeys.<call>` and let it run; `outcome` waits for it."""
    page.js(f"void (window.{name} = told(passkeys.{call}))")


def outcome(page: Page, name: str) -> dict[str, Any]:
    answer: dict[str, Any] = page.js(f"window.{name}")
    return answer


def verify_registration(broker: ScriptedBroker, post: Post) -> bytes:
    """Judge a registration as a relying party would; return the public key."""
    return verify_registration_response(
        credential=post.body["handshake_response"],
        expected_challenge=base64url_to_bytes(broker.options[-1]["challenge"]),
        expected_rp_id="localhost",
        expected_origin=broker.origin,
        require_user_verification=True,
    ).credential_public_key


def verify_authentication(broker: ScriptedBroker, post: Post, public_key: bytes) -> None:
    assert (
        base64url_to_bytes(post.body["handshake_response"]["response"]["userHandle"])
        == b"user-handle"
    )
    verify_authentication_response(
        credential=post.body["handshake_response"],
        expected_challenge=base64url_to_bytes(broker.options[-1]["challenge"]),
        expected_rp_id="localhost",
        expected_origin=broker.origin,
        credential_public_key=public_key,
        credential_current_sign_count=0,
        require_user_verification=True,
    )


WITHOUT_PLATFORM_JSON = {
    "platform": "",
    "missing": """
      delete PublicKeyCredential.parseCreationOptionsFromJSON;
      delete PublicKeyCredential.parseRequestOptionsFromJSON;
      delete PublicKeyCredential.prototype.toJSON;
    """,
    "refusing": """
      const refuse = () => { throw new DOMException("Not here", "NotSupportedError") };
      PublicKeyCredential.parseCreationOptionsFromJSON = refuse;
      PublicKeyCredential.parseRequestOptionsFromJSON = refuse;
      PublicKeyCredential.prototype.toJSON = refuse;
    """,
}


@pytest.mark.parametrize("script", WITHOUT_PLATFORM_JSON.values(), ids=WITHOUT_PLATFORM_JSON.keys())
def test_register_and_authenticate(
    page: Page, broker: ScriptedBroker, device: Authenticator, script: str
) -> None:
    """Both verbs, their four requests, and answers that a relying party verifies; with and without
    the platform's JSON.
    """
    broker.creation = {
        "excludeCredentials": [{"type": "public-key", "id": "AQIDBA", "transports": ["usb"]}]
    }
    visit(page, broker, script)
    assert told(page, "register('pbt_r')") == {"nonce": "pbn_2"}
    start, finish = broker.posts
    assert (start.path, start.body) == (
        f"/v1/apps/APP/{REGISTER}start",
        {"transaction_id": "pbt_r"},
    )
    assert start.headers["Content-Type"] == "application/json"
    assert finish.path == f"/v1/apps/APP/{REGISTER}finish"
    assert {k: v for k, v in finish.body.items() if k != "handshake_response"} == {
        "handshake_id": "pbh_1",
        "transaction_id": "pbt_r",
    }
    sent = finish.body["handshake_response"]
    assert (sent["type"], sent["response"]["transports"]) == ("public-key", ["internal"])
    assert sent["authenticatorAttachment"] == "platform"
    public_key = verify_registration(broker, finish)
    assert device.events[0][0] == "added"

    broker.request = {
        "allowCredentials": [{"type": "public-key", "id": sent["id"], "transports": ["internal"]}]
    }
    assert told(page, "authenticate({transactionId: 'pbt_a'})") == {"nonce": "pbn_4"}
    start, finish = broker.posts[2:]
    assert (start.path, start.body) == (
        f"/v1/apps/APP/{AUTHENTICATE}start",
        {"transaction_id": "pbt_a"},
    )
    assert finish.path == f"/v1/apps/APP/{AUTHENTICATE}finish"
    assert (finish.body["handshake_id"], finish.body["transaction_id"]) == ("pbh_3", "pbt_a")
    assert finish.body["handshake_response"]["id"] == sent["id"]
    verify_authentication(broker, finish, public_key)

    broker.request = {}
    for call in ("authenticate()", "authenticate({conditional: true})"):
        assert "nonce" in told(page, call)
        start, finish = broker.posts[-2:]
        assert start.body == {}
        assert "transaction_id" not in finish.body
        verify_authentication(broker, finish, public_key)


@pytest.mark.parametrize("attachment", ["platform", "cross-platform", "any"])
def test_attachment_is_the_servers_to_apply(
    page: Page, broker: ScriptedBroker, device: Authenticator, attachment: str
) -> None:
    visit(page, broker)
    assert "nonce" in told(page, f"register('pbt_r', {{authenticatorAttachment: '{attachment}'}})")
    assert broker.posts[0].body == {
        "transaction_id": "pbt_r",
        "authenticator_attachment": attachment,
    }


@pytest.mark.parametrize("base", ["location.origin + '/'", "''", "'/'"])
def test_base_url_and_app_id(
    page: Page, broker: ScriptedBroker, device: Authenticator, base: str
) -> None:
    visit(page, broker)
    page.js("document.cookie = 'session=secret'")
    assert "nonce" in page.js(f"told(new sdk.Passkeys({base}, 'APP').register('pbt_r'))")
    assert [post.path for post in broker.posts] == [
        f"/v1/apps/APP/{REGISTER}{s}" for s in ("start", "finish")
    ]
    assert all("Cookie" not in post.headers for post in broker.posts)
    page.js(f"told(new sdk.Passkeys({base}, 'a/b').authenticate())")
    assert broker.posts[2].path == f"/v1/apps/a%2Fb/{AUTHENTICATE}start"


SERVER_ERRORS: list[tuple[int, Any, dict[str, Any]]] = [
    (
        404,
        {"code": "transaction_not_found", "error": "Ask for a new one."},
        {
            "code": "refused",
            "refusal": "transaction_not_found",
            "status": 404,
            "message": "Ask for a new one.",
        },
    ),
    (429, {"code": "too_many_requests", "error": "Wait."}, {"code": "refused", "status": 429}),
    (
        503,
        {"code": "service_unavailable", "error": "Briefly.", "retry": "backend"},
        {
            "code": "unavailable",
            "refusal": "service_unavailable",
            "status": 503,
            "retry": "backend",
        },
    ),
    (503, {"code": "service_unavailable", "error": "Briefly.", "retry": "page"}, {"retry": "page"}),
    (502, b"<html>Bad Gateway", {"code": "unavailable", "status": 502}),
    (
        404,
        b"<html>Not Found",
        {"code": "refused", "status": 404, "message": "The request was refused."},
    ),
    (200, b"<html>Welcome", {"code": "unavailable", "status": 200}),
    (200, {}, {"code": "unavailable"}),
]


@pytest.mark.parametrize("step", ["start", "finish"])
@pytest.mark.parametrize(("status", "body", "error"), SERVER_ERRORS, ids=lambda v: str(v)[:32])
def test_what_the_server_says(
    page: Page,
    broker: ScriptedBroker,
    device: Authenticator,
    step: str,
    status: int,
    body: Any,
    error: dict[str, Any],
) -> None:
    """Each error of the server at each step, as the page sees it; and nothing is sent again."""
    visit(page, broker)
    broker.replies[REGISTER + step].append((status, body))
    seen = told(page, "register('pbt_r')")
    assert error.items() <= seen.items()
    assert seen["message"]
    assert [post.path.rpartition("/")[2] for post in broker.posts] == ["start", "finish"][
        : 1 + (step == "finish")
    ]


def test_offline_is_network(page: Page, broker: ScriptedBroker, device: Authenticator) -> None:
    visit(page, broker)
    page.offline()
    seen = told(page, "register('pbt_r')")
    assert (seen["code"], seen["cause"]) == ("network", "TypeError")
    page.offline(False)
    assert "nonce" in told(page, "register('pbt_r')")


def test_a_redirect_is_not_followed(
    page: Page, broker: ScriptedBroker, device: Authenticator
) -> None:
    """An answer of the authenticator goes to the broker and nowhere else."""
    visit(page, broker)
    elsewhere = broker.origin + "/elsewhere"
    page.intercept(
        "*/webauthn/finish", lambda request: Answer(307, headers={"Location": elsewhere})
    )
    assert told(page, "register('pbt_r')")["code"] == "network"
    assert [post.path.rpartition("/")[2] for post in broker.posts] == ["start"]


def test_an_answer_that_takes_too_long_is_network(
    page: Page, broker: ScriptedBroker, device: Authenticator
) -> None:
    visit(page, broker, HELD_TIMERS)
    broker.hold("start")
    begin(page, "slow", "register('pbt_r')")
    wait_until(lambda: broker.posts, "start")
    page.js("ring(15000)")
    seen = outcome(page, "slow")
    assert (seen["code"], seen["cause"]) == ("network", "TimeoutError")
    broker.release()
    assert "nonce" in told(page, "register('pbt_r')")
    assert page.js("timers.size") == 0


def test_cancelled(page: Page, broker: ScriptedBroker, device: Authenticator) -> None:
    """The person closes the prompt (or fails verification): no finish, and the next try works."""
    visit(page, broker)
    device.verified(False)
    for call in ("register('pbt_r')", "authenticate()"):
        seen = told(page, call)
        assert (seen["code"], seen["cause"]) == ("cancelled", "NotAllowedError")
    assert broker.to("finish") == []
    device.verified(True)
    assert "nonce" in told(page, "register('pbt_r')")


def test_already_registered(page: Page, broker: ScriptedBroker, device: Authenticator) -> None:
    visit(page, broker)
    told(page, "register('pbt_r')")
    made = broker.to("finish")[0].body["handshake_response"]["id"]
    broker.creation = {"excludeCredentials": [{"type": "public-key", "id": made}]}
    seen = told(page, "register('pbt_r')")
    assert (seen["code"], seen["cause"]) == ("already_registered", "InvalidStateError")
    assert len(broker.to("finish")) == 1


@pytest.mark.parametrize(
    ("changes", "code", "cause"),
    [
        ({"rp": {"id": "example.com", "name": "Elsewhere"}}, "wrong_domain", "SecurityError"),
        ({"challenge": "***"}, "unsupported", "InvalidCharacterError"),
    ],
)
def test_options_that_the_browser_cannot_use(
    page: Page,
    broker: ScriptedBroker,
    device: Authenticator,
    changes: dict[str, Any],
    code: str,
    cause: str,
) -> None:
    visit(page, broker)
    broker.creation = changes
    seen = told(page, "register('pbt_r')")
    assert (seen["code"], seen["cause"]) == (code, cause)
    assert broker.to("finish") == []


PLATFORM_ERRORS = [
    ("create", "AbortError", "aborted"),
    ("create", "NotSupportedError", "not_supported_by_device"),
    ("create", "ConstraintError", "not_supported_by_device"),
    ("create", "TypeError", "unsupported"),
    ("create", "UnknownError", "cancelled"),
    ("get", "NotReadableError", "cancelled"),
    ("get", "OperationError", "cancelled"),
    ("get", "InvalidStateError", "cancelled"),
    ("get", "SecurityError", "wrong_domain"),
    ("get", "NotSupportedError", "not_supported_by_device"),
]


@pytest.mark.parametrize(("verb", "name", "code"), PLATFORM_ERRORS)
def test_platform_errors(
    page: Page, broker: ScriptedBroker, verb: str, name: str, code: str
) -> None:
    visit(
        page,
        broker,
        f'navigator.credentials.{verb} = () => Promise.reject(new DOMException("Said so", "{name}"));',
    )
    seen = told(page, "register('pbt_r')" if verb == "create" else "authenticate()")
    assert (seen["code"], seen["cause"]) == (code, name)


@pytest.mark.parametrize(("answer", "code"), [("null", "cancelled"), ("{}", "unsupported")])
def test_platform_that_answers_without_a_credential(
    page: Page, broker: ScriptedBroker, answer: str, code: str
) -> None:
    visit(page, broker, f"navigator.credentials.get = () => Promise.resolve({answer});")
    assert told(page, "authenticate()")["code"] == code
    assert broker.to("finish") == []


def test_our_own_json_of_a_stand_ins_credential(page: Page, broker: ScriptedBroker) -> None:
    """No toJSON, every kind of byte, no user handle: base64url without padding, and what is absent
    stays absent.
    """
    stand_in = """
      const bytes = (...values) => new Uint8Array(values).buffer;
      const response = {clientDataJSON: bytes(251, 255, 254, 255), authenticatorData: bytes(0), signature: bytes(1, 2, 3),
                        userHandle: null};
      const credential = {id: "-__-_w", rawId: bytes(251, 255, 254, 255), type: "public-key", response};
      navigator.credentials.get = () => Promise.resolve(credential);
    """
    visit(page, broker, stand_in)
    assert "nonce" in told(page, "authenticate()")
    assert broker.to("finish")[0].body["handshake_response"] == {
        "id": "-__-_w",
        "rawId": "-__-_w",
        "type": "public-key",
        "clientExtensionResults": {},
        "response": {"clientDataJSON": "-__-_w", "authenticatorData": "AA", "signature": "AQID"},
    }


@pytest.mark.parametrize(
    "call", ["register('pbt_r')", "authenticate()", "authenticate({conditional: true})"]
)
def test_without_webauthn(page: Page, broker: ScriptedBroker, call: str) -> None:
    """Said before anything is asked of the server."""
    visit(page, broker, "delete window.PublicKeyCredential;")
    assert told(page, call)["code"] == "unsupported"
    assert page.js("Promise.all([passkeys.canRegister(), passkeys.canAutofill()])") == [
        False,
        False,
    ]
    assert broker.posts == []


NO_TEXTS = ["undefined", "null", "''", "0", "7", "true", "{}", "['pbt_x']", "new String('pbt_x')"]
MEANT_BUT_MISSING = [f"register({value})" for value in NO_TEXTS]
MEANT_BUT_MISSING += [
    f"authenticate({{transactionId: {value}{more}}})"
    for value in NO_TEXTS
    for more in ("", ", conditional: true")
]
MEANT_BUT_MISSING += [f"authenticate({{bindingChallenge: {value}}})" for value in NO_TEXTS]
MEANT_BUT_MISSING += [
    "authenticate({transactionId: 'pbt_x', bindingChallenge: 'c'})",
    "register()",
    "register({transactionId: 'pbt_x'})",
    "authenticate('pbt_x')",  # the way of register
    "authenticate('')",
    "authenticate(null)",
    "authenticate({transaction_id: 'pbt_x'})",
    "authenticate({transaction: undefined})",
    "authenticate(Object.create({transactionId: undefined}))",
]


def test_a_transaction_that_was_meant_and_is_missing_signs_nobody_in(
    page: Page, broker: ScriptedBroker, device: Authenticator
) -> None:
    """With a passkey at hand, so that a nameless sign-in would succeed. A running ceremony is none
    of its business.
    """
    visit(page, broker, HELD_TIMERS)
    told(page, "register('pbt_r')")
    device.present(False)
    begin(page, "autofill", "authenticate({conditional: true})")
    wait_until(lambda: broker.to(AUTHENTICATE + "start"), "start of autofill")
    page.wait_until(f"waiting({RENEWAL}) === 1")
    before = len(broker.posts)
    for call in MEANT_BUT_MISSING:
        seen = told(page, call)
        assert (seen["code"], seen["cause"]) == ("invalid_argument", "TypeError"), call
        assert "status" not in seen, call
        assert "pbt_x" not in seen["message"], call
    assert len(broker.posts) == before
    assert (
        page.js("Promise.race([autofill.then(() => 'ended'), Promise.resolve('runs')])") == "runs"
    )


@pytest.mark.parametrize("more", ["", ", conditional: true"], ids=["modal", "autofill"])
def test_a_binding_challenge_is_passed_on(
    page: Page, broker: ScriptedBroker, device: Authenticator, more: str
) -> None:
    visit(page, broker)
    told(page, "register('pbt_r')")
    assert "nonce" in told(page, f"authenticate({{bindingChallenge: 'made-up'{more}}})")
    start, finish = broker.posts[-2:]
    assert start.body == {"binding_challenge": "made-up"}
    assert "binding_challenge" not in finish.body


@pytest.mark.parametrize(
    "call",
    [
        "authenticate()",
        "authenticate(undefined)",
        "authenticate({})",
        "authenticate({signal: undefined})",
    ],
)
def test_a_nameless_sign_in_is_asked_for_by_leaving_the_transaction_out(
    page: Page, broker: ScriptedBroker, device: Authenticator, call: str
) -> None:
    visit(page, broker)
    told(page, "register('pbt_r')")
    assert "nonce" in told(page, call)
    assert [post.body.get("transaction_id") for post in broker.posts[2:]] == [None, None]


@pytest.mark.parametrize(
    "call",
    [
        "applySignals()",
        "applySignals('delete')",
        "applySignals('delete', '')",
        "applySignals('remove', 'x')",
    ],
)
def test_signals_without_a_kind_or_a_ticket(page: Page, broker: ScriptedBroker, call: str) -> None:
    visit(page, broker)
    assert told(page, call)["code"] == "invalid_argument"
    assert broker.posts == []


CAPABILITIES = [
    ("getClientCapabilities = async () => ({conditionalGet: true})", True),
    ("getClientCapabilities = async () => ({conditionalGet: false})", False),
    (
        "getClientCapabilities = async () => ({}); isConditionalMediationAvailable = async () => true",
        True,
    ),
    (
        "getClientCapabilities = async () => ({}); isConditionalMediationAvailable = async () => false",
        False,
    ),
    ("getClientCapabilities = undefined; isConditionalMediationAvailable = async () => true", True),
    ("getClientCapabilities = undefined; isConditionalMediationAvailable = undefined", False),
    ("getClientCapabilities = async () => { throw new Error('no') }", False),
]


@pytest.mark.parametrize(("script", "can"), CAPABILITIES)
def test_can_autofill(page: Page, broker: ScriptedBroker, script: str, can: bool) -> None:
    visit(page, broker, "; ".join("PublicKeyCredential." + part for part in script.split("; ")))
    assert page.js("Promise.all([passkeys.canRegister(), passkeys.canAutofill()])") == [True, can]
    if not can:
        assert told(page, "authenticate({conditional: true})")["code"] == "unsupported"
        assert broker.posts == []


def test_this_browser_can(page: Page, broker: ScriptedBroker, device: Authenticator) -> None:
    visit(page, broker)
    assert page.js("Promise.all([passkeys.canRegister(), passkeys.canAutofill()])") == [True, True]
    told_by_the_browser = page.js("PublicKeyCredential.getClientCapabilities()")
    assert page.js("passkeys.capabilities()") == told_by_the_browser
    assert told_by_the_browser["conditionalCreate"]
    assert told_by_the_browser["immediateGet"]
    assert broker.posts == []


SIGNALS_HERE = {
    "signalAllAcceptedCredentials": True,
    "signalCurrentUserDetails": True,
    "signalUnknownCredential": True,
}


@pytest.mark.parametrize(
    ("script", "capabilities"),
    [
        (
            "PublicKeyCredential.getClientCapabilities = undefined;",
            {
                "conditionalGet": True,
                "userVerifyingPlatformAuthenticator": True,
                **SIGNALS_HERE,
            },
        ),
        (
            "PublicKeyCredential.getClientCapabilities = async () => ({immediateGet: false});"
            "PublicKeyCredential.isConditionalMediationAvailable = undefined;"
            "delete PublicKeyCredential.signalUnknownCredential;",
            {
                "immediateGet": False,
                "userVerifyingPlatformAuthenticator": True,
                **SIGNALS_HERE,
                "signalUnknownCredential": False,
            },
        ),
        ("PublicKeyCredential.getClientCapabilities = async () => { throw new Error('no') };", {}),
        ("delete window.PublicKeyCredential;", {}),
    ],
    ids=["older", "silent on some", "throwing", "without WebAuthn"],
)
def test_capabilities_of_other_browsers(
    page: Page,
    broker: ScriptedBroker,
    device: Authenticator,
    script: str,
    capabilities: dict[str, bool],
) -> None:
    """The older methods stand in; a name that nothing tells of is absent, which means unknown."""
    visit(page, broker, script)
    assert page.js("passkeys.capabilities()") == capabilities
    assert broker.posts == []


def test_a_page_without_https_is_at_the_wrong_domain(broker: ScriptedBroker) -> None:
    """A browser hides WebAuthn there, as one without WebAuthn does; the page can be mended."""
    port = broker.origin.rpartition(":")[2]
    rule = f"--host-resolver-rules=MAP plain.example 127.0.0.1:{port} , MAP * ~NOTFOUND"
    with Chromium((rule,)) as browser, browser.page() as page:
        page.goto("http://plain.example/passkeys.html")
        page.wait_until("window.ready")
        assert page.js("window.PublicKeyCredential === undefined")
        for call in ("register('pbt_r')", "authenticate()", "authenticate({conditional: true})"):
            assert told(page, call)["code"] == "wrong_domain"
    assert broker.posts == []


# Conditional create, immediate mediation, the field of autofill


# What the page hands to the platform, and the platform's answer to a create without its mediation:
# the virtual authenticator has no password manager that would make a passkey without a prompt.
HANDED = """
  window.handed = [];
  for (const verb of ["create", "get"]) {
    const own = navigator.credentials[verb].bind(navigator.credentials);
    navigator.credentials[verb] = (options) => {
      const { publicKey, signal, ...how } = options;
      handed.push([verb, how]);
      return own(window.prompting ? { publicKey, signal } : options);
    };
  }
"""


def test_register_without_a_prompt(
    page: Page, broker: ScriptedBroker, device: Authenticator
) -> None:
    """The browser is asked for a conditional create; what it makes goes to the broker as always."""
    visit(page, broker, HANDED)
    page.js("window.prompting = true")
    assert told(page, "register('pbt_r', {autoRegister: true})") == {"nonce": "pbn_2"}
    assert page.js("handed") == [["create", {"mediation": "conditional"}]]
    verify_registration(broker, broker.posts[1])
    assert "nonce" in told(page, "register('pbt_r', {autoRegister: false})")
    assert page.js("handed")[1:] == [["create", {}]]


def test_register_without_a_prompt_where_the_browser_decides_against_it(
    page: Page, broker: ScriptedBroker, device: Authenticator
) -> None:
    """This Chromium itself: nobody signed in with a saved password, so no passkey is made."""
    broker.life = 100
    visit(page, broker)
    seen = told(page, "register('pbt_r', {autoRegister: true})")
    assert (seen["code"], seen["cause"]) == ("cancelled", "NotAllowedError")
    assert device.credentials() == []
    assert broker.to("finish") == []


def test_an_immediate_sign_in(page: Page, broker: ScriptedBroker, device: Authenticator) -> None:
    """A passkey at hand signs in. Without one the browser says so at once, where a prompt would
    wait for another device.
    """
    visit(page, broker, HANDED)
    told(page, "register('pbt_r')")
    public_key = verify_registration(broker, broker.to("finish")[0])
    assert "nonce" in told(page, "authenticate({immediate: true})")
    assert page.js("handed")[1:] == [["get", {"uiMode": "immediate"}]]
    assert broker.to(AUTHENTICATE + "start")[0].body == {}
    verify_authentication(broker, broker.posts[-1], public_key)
    device.forget()
    seen = told(page, "authenticate({immediate: true})")
    assert (seen["code"], seen["cause"]) == ("cancelled", "NotAllowedError")
    assert len(broker.to(AUTHENTICATE + "finish")) == 1


@pytest.mark.parametrize(
    ("call", "gesture"),
    [
        ("authenticate({immediate: true, transactionId: 'pbt_a'})", True),
        ("authenticate({immediate: true, conditional: true})", True),
        ("authenticate({immediate: true})", False),
    ],
    ids=["named", "conditional", "without activation"],
)
def test_what_no_browser_does_immediately(
    page: Page, broker: ScriptedBroker, device: Authenticator, call: str, gesture: bool
) -> None:
    """Refused by us, with its reason and before any request: a browser says only that the prompt
    was cancelled.
    """
    page.goto(broker.origin + "/passkeys.html")
    wait_until(lambda: page.js("window.ready", gesture=False), "the page")  # no activation
    seen = page.js(f"told(passkeys.{call})", gesture=gesture)
    assert (seen["code"], seen["cause"]) == ("invalid_argument", "TypeError")
    assert seen["message"].startswith("authenticate: immediate ")
    assert broker.posts == []


LACKING = [
    ("register('pbt_r', {autoRegister: true})", "conditionalCreate"),
    ("authenticate({immediate: true})", "immediateGet"),
]


@pytest.mark.parametrize(("call", "capability"), LACKING)
@pytest.mark.parametrize(
    "can", ["undefined", "async () => ({CAPABILITY: false})", "async () => ({})"]
)
def test_a_browser_that_lacks_the_capability_is_not_asked(
    page: Page, broker: ScriptedBroker, device: Authenticator, call: str, capability: str, can: str
) -> None:
    """A browser ignores what it doesn't know, and would prompt."""
    script = can.replace("CAPABILITY", capability)
    visit(page, broker, HANDED + f"PublicKeyCredential.getClientCapabilities = {script};")
    seen = told(page, call)
    assert seen["code"] == "unsupported"
    assert capability in seen["message"]
    assert (broker.posts, page.js("handed")) == ([], [])


@pytest.mark.parametrize(
    ("autocomplete", "warnings"),
    [
        ("username webauthn", 0),
        ("section-a username WebAuthn", 0),
        ("username", 1),
        ("webauthn-x", 1),
    ],
)
def test_autofill_without_a_field_is_warned_of_once(
    page: Page, broker: ScriptedBroker, device: Authenticator, autocomplete: str, warnings: int
) -> None:
    visit(page, broker)
    page.js(f"document.querySelector('input').autocomplete = '{autocomplete}'")
    told(page, "register('pbt_r')")
    told(page, "authenticate()")
    start = "warning: authenticate({ conditional: true }) "

    def ours() -> list[str]:
        return [line for line in page.console if line.startswith(start)]

    assert ours() == []
    for _ in range(2):
        assert "nonce" in told(page, "authenticate({conditional: true})")
    assert len(ours()) == warnings
    assert all('<input autocomplete="username webauthn">' in line for line in ours())


# One ceremony at a time


def pending_autofill(
    page: Page, broker: ScriptedBroker, device: Authenticator, name: str = "autofill"
) -> None:
    """Make a passkey, then leave a conditional ceremony waiting for a choice that nobody makes."""
    if not device.credentials():
        told(page, "register('pbt_r')")
    device.present(False)
    before = len(broker.to(AUTHENTICATE + "start"))
    begin(page, name, "authenticate({conditional: true})")
    wait_until(lambda: len(broker.to(AUTHENTICATE + "start")) > before, "start of autofill")
    page.wait_until(f"waiting({RENEWAL}) === 1")


def somebody_comes(
    broker: ScriptedBroker, device: Authenticator, act: Callable[[], object]
) -> None:
    """Do `act`, which ends the waiting prompt and asks the server for another; from that one on,
    somebody touches the device.

    The server holds its answer meanwhile, so the old prompt can't profit.
    """
    before = len(broker.to("start"))
    broker.hold("start")
    act()
    wait_until(lambda: len(broker.to("start")) > before, "start of another prompt")
    device.present(True)
    broker.release()


def test_starting_one_ends_the_last_and_autofill_works_again(
    page: Page, broker: ScriptedBroker, device: Authenticator
) -> None:
    visit(page, broker, HELD_TIMERS)
    pending_autofill(page, broker, device)
    somebody_comes(
        broker, device, lambda: begin(page, "modal", "authenticate({transactionId: 'pbt_a'})")
    )
    assert "nonce" in outcome(page, "modal")
    assert outcome(page, "autofill")["code"] == "aborted"
    pending_autofill(page, broker, device, "again")
    page.js(
        "void (window.passkeys = new sdk.Passkeys('', 'APP'))"
    )  # another instance, the same page
    somebody_comes(broker, device, lambda: begin(page, "register", "register('pbt_2')"))
    assert "nonce" in outcome(page, "register")
    seen = outcome(page, "again")
    assert (seen["code"], seen["cause"]) == ("aborted", "AbortError")
    assert "nonce" in told(page, "authenticate({conditional: true})")
    assert page.js("timers.size") == 0


def test_the_callers_signal(page: Page, broker: ScriptedBroker, device: Authenticator) -> None:
    visit(page, broker, HELD_TIMERS)
    told(page, "register('pbt_r')")
    device.present(False)
    page.js("void (window.mine = new AbortController())")
    begin(page, "modal", "authenticate({signal: mine.signal})")
    wait_until(lambda: len(broker.to(AUTHENTICATE + "start")) == 1, "start")
    seen = told(page, "authenticate({signal: AbortSignal.abort(new TypeError('before it began'))})")
    assert (seen["code"], seen["cause"]) == ("aborted", "TypeError")
    assert len(broker.to("start")) == 2, "an aborted call asked the server"
    assert page.js("Promise.race([modal.then(() => 'ended'), Promise.resolve('runs')])") == "runs"
    page.js("mine.abort(new RangeError('enough'))")
    seen = outcome(page, "modal")
    assert (seen["code"], seen["cause"]) == ("aborted", "RangeError")
    device.present(True)
    assert "nonce" in told(page, "authenticate({signal: new AbortController().signal})")


@pytest.mark.parametrize("step", ["start", "finish"])
def test_ending_a_ceremony_that_waits_for_the_server(
    page: Page, broker: ScriptedBroker, device: Authenticator, step: str
) -> None:
    visit(page, broker)
    broker.hold(step)
    begin(page, "first", "register('pbt_1')")
    wait_until(lambda: broker.to(step), step)
    begin(page, "second", "register('pbt_2')")
    assert outcome(page, "first")["code"] == "aborted"
    broker.release()
    assert "nonce" in outcome(page, "second")
    assert [post.body["transaction_id"] for post in broker.to(step)] == ["pbt_1", "pbt_2"]


def test_a_stand_in_that_ignores_the_signal_is_left_behind(
    page: Page, broker: ScriptedBroker
) -> None:
    """Password managers replace navigator.credentials; the ended ceremony still ends."""
    visit(
        page,
        broker,
        "navigator.credentials.get = () => (window.asked = true, new Promise(() => {}));",
    )
    begin(page, "stuck", "authenticate()")
    page.wait_until("window.asked")
    begin(page, "next", "authenticate()")
    assert outcome(page, "stuck")["code"] == "aborted"
    assert page.js("Promise.race([next.then(() => 'ended'), Promise.resolve('runs')])") == "runs"


# A page that stays open


def test_autofill_gets_a_fresh_challenge_before_the_old_one_dies(
    page: Page, broker: ScriptedBroker, device: Authenticator
) -> None:
    """Two renewals, then a choice: the newest challenge is answered under its own handshake, and
    the page noticed nothing.
    """
    visit(page, broker, HELD_TIMERS)
    told(page, "register('pbt_r')")
    public_key = verify_registration(broker, broker.to("finish")[0])
    pending_autofill(page, broker, device)
    page.js(f"ring({RENEWAL})")
    wait_until(lambda: len(broker.to(AUTHENTICATE + "start")) == 2, "first renewal")
    page.wait_until(f"waiting({RENEWAL}) === 1")
    somebody_comes(broker, device, lambda: page.js(f"ring({RENEWAL})"))
    assert "nonce" in outcome(page, "autofill")
    starts, finish = broker.to(AUTHENTICATE + "start"), broker.to(AUTHENTICATE + "finish")
    assert [post.body for post in starts] == [{}] * 3
    assert len(finish) == 1
    assert finish[0].body["handshake_id"] == f"pbh_{broker.posts.index(starts[2]) + 1}"
    verify_authentication(broker, finish[0], public_key)
    assert page.js("timers.size") == 0


def test_renewal_waits_until_somebody_sees_the_page(
    page: Page, broker: ScriptedBroker, device: Authenticator
) -> None:
    visit(page, broker, HELD_TIMERS)
    pending_autofill(page, broker, device)
    show = (
        "Object.defineProperty(document, 'visibilityState', {{value: '{}', configurable: true}});"
        "document.dispatchEvent(new Event('visibilitychange'))"
    )
    page.js(show.format("hidden"))
    page.js(f"ring({RENEWAL})")
    page.js(
        "fetch('/nothing')"
    )  # had a renewal been under way, its request would have gone before this one
    assert len(broker.to(AUTHENTICATE + "start")) == 1
    somebody_comes(broker, device, lambda: page.js(show.format("visible")))
    assert "nonce" in outcome(page, "autofill")
    assert len(broker.to(AUTHENTICATE + "start")) == 2


@pytest.mark.parametrize(
    "reply", [(503, {"code": "service_unavailable"}), (429, {"code": "too_many_requests"})]
)
def test_renewal_outlives_a_server_in_trouble(
    page: Page, broker: ScriptedBroker, device: Authenticator, reply: Reply
) -> None:
    visit(page, broker, HELD_TIMERS)
    pending_autofill(page, broker, device)
    broker.replies[AUTHENTICATE + "start"].append(reply)
    page.js(f"ring({RENEWAL})")
    page.wait_until("waiting(10000) === 1")
    somebody_comes(broker, device, lambda: page.js("ring(10000)"))
    assert "nonce" in outcome(page, "autofill")
    assert len(broker.to(AUTHENTICATE + "start")) == 3


def test_renewal_ends_where_the_server_says_no(
    page: Page, broker: ScriptedBroker, device: Authenticator
) -> None:
    """The transaction has ended, so there is nothing to renew."""
    visit(page, broker, HELD_TIMERS)
    pending_autofill(page, broker, device)
    broker.replies[AUTHENTICATE + "start"].append(
        (404, {"code": "transaction_not_found", "error": "Gone."})
    )
    page.js(f"ring({RENEWAL})")
    seen = outcome(page, "autofill")
    assert (seen["code"], seen["refusal"]) == ("refused", "transaction_not_found")
    assert page.js("timers.size") == 0


def test_autofill_that_cannot_begin_says_so(
    page: Page, broker: ScriptedBroker, device: Authenticator
) -> None:
    visit(page, broker)
    broker.replies[AUTHENTICATE + "start"].append(
        (503, {"code": "service_unavailable", "error": "Briefly."})
    )
    assert told(page, "authenticate({conditional: true})")["code"] == "unavailable"
    assert len(broker.posts) == 1


def test_life_of_a_challenge_without_timeout(
    page: Page, broker: ScriptedBroker, device: Authenticator
) -> None:
    broker.life = None
    visit(page, broker, HELD_TIMERS)
    pending_autofill(page, broker, device)  # waits for a timer of four fifths of five minutes
    somebody_comes(broker, device, lambda: page.js(f"ring({RENEWAL})"))
    assert "nonce" in outcome(page, "autofill")


# The Signal API


def refused_with_signal(credential_id: str, rp_id: str = "localhost") -> Reply:
    signal = {"type": "unknown_credential", "rp_id": rp_id, "credential_id": credential_id}
    return 401, {"code": "discoverable_login_failed", "error": "Unknown.", "signal": signal}


def test_signal_of_an_unknown_passkey_reaches_the_authenticator(
    page: Page, broker: ScriptedBroker, device: Authenticator
) -> None:
    visit(page, broker)
    told(page, "register('pbt_r')")
    made = broker.to("finish")[0].body["handshake_response"]["id"]
    broker.replies[AUTHENTICATE + "finish"].append(refused_with_signal(made))
    seen = told(page, "authenticate()")
    assert (seen["code"], seen["refusal"], seen["status"]) == (
        "refused",
        "discoverable_login_failed",
        401,
    )
    device.wait_event("deleted")
    assert device.credentials() == []


@pytest.mark.parametrize(
    ("script", "rp_id"),
    [
        ("delete PublicKeyCredential.signalUnknownCredential;", "localhost"),
        (
            "PublicKeyCredential.signalUnknownCredential = () => { throw new Error('no') };",
            "localhost",
        ),
        ("", "example.com"),
    ],
    ids=["missing", "throwing", "foreign RP ID"],
)
def test_signal_that_cannot_be_given_changes_nothing(
    page: Page, broker: ScriptedBroker, device: Authenticator, script: str, rp_id: str
) -> None:
    visit(page, broker, script)
    told(page, "register('pbt_r')")
    made = broker.to("finish")[0].body["handshake_response"]["id"]
    broker.replies[AUTHENTICATE + "finish"].append(refused_with_signal(made, rp_id))
    assert told(page, "authenticate()")["code"] == "refused"
    assert len(device.credentials()) == 1
    assert "nonce" in told(page, "authenticate()")


EXCHANGE = "signals/exchange"
# Beside the platform's own methods: what the page hands to them. A call that is `deaf` is refused.
METHODS = {
    "update": "signalCurrentUserDetails",
    "delete": "signalUnknownCredential",
    "prune": "signalAllAcceptedCredentials",
}
SEEN = """
  window.seen = [];
  for (const name of ["signalCurrentUserDetails", "signalUnknownCredential", "signalAllAcceptedCredentials"]) {
    const own = PublicKeyCredential[name].bind(PublicKeyCredential);
    PublicKeyCredential[name] = (call) => (seen.push([name, call]), call.deaf ? Promise.reject(new TypeError()) : own(call));
  }
"""


def test_signals_that_the_backend_prepared(
    page: Page, broker: ScriptedBroker, device: Authenticator
) -> None:
    """Each kind reaches its method, the authenticator does as it is told, and what it doesn't take
    is counted.
    """
    visit(page, broker, SEEN)
    told(page, "register('pbt_r')")
    made = broker.to("finish")[0].body["handshake_response"]["id"]
    user = {"rpId": "localhost", "userId": "dXNlci1oYW5kbGU"}
    calls: dict[str, list[dict[str, Any]]] = {
        "update": [{**user, "name": "ada@example.com", "displayName": "Ada"}],
        "prune": [{**user, "allAcceptedCredentialIds": [made]}],
        "delete": [{"deaf": True}, {"rpId": "localhost", "credentialId": made}],
    }
    for kind, said in calls.items():
        broker.replies[EXCHANGE].append((200, {"calls": said}))
        failed = sum("deaf" in call for call in said)
        assert told(page, f"applySignals('{kind}', 'pbs_{kind}')") == {
            "nonce": {"supported": True, "applied": len(said) - failed, "failed": failed}
        }
        assert broker.to(EXCHANGE)[-1].body == {"kind": kind, "ticket": f"pbs_{kind}"}
        assert page.js("window.seen.splice(0)") == [[METHODS[kind], call] for call in said]
        if kind == "prune":
            assert [c["userName"] for c in device.credentials()] == ["ada@example.com"]
    device.wait_event("deleted")
    assert device.credentials() == []


def test_signals_that_can_not_be_exchanged(
    page: Page, broker: ScriptedBroker, device: Authenticator
) -> None:
    """The codes are those of ceremonies, and a ceremony that runs goes on."""
    visit(page, broker)
    broker.replies[EXCHANGE].append((404, {"code": "ticket_not_found", "error": "Unknown."}))
    seen = told(page, "applySignals('prune', 'pbs_x')")
    assert (seen["code"], seen["refusal"], seen["status"]) == ("refused", "ticket_not_found", 404)
    broker.replies[EXCHANGE] += [
        (503, {"code": "service_unavailable", "error": "Briefly."}),
        (200, {}),
    ]
    for _ in range(2):
        assert told(page, "applySignals('prune', 'pbs_x')")["code"] == "unavailable"
    assert (
        told(page, "applySignals('prune', 'pbs_x', {signal: AbortSignal.abort()})")["code"]
        == "aborted"
    )
    page.js("window.fetch = () => Promise.reject(new TypeError('offline'))")
    assert told(page, "applySignals('prune', 'pbs_x')")["code"] == "network"
    assert len(broker.to(EXCHANGE)) == 3


def test_a_browser_without_the_method_spends_no_ticket(page: Page, broker: ScriptedBroker) -> None:
    for script in (
        f"delete PublicKeyCredential.{METHODS['update']};",
        "delete window.PublicKeyCredential;",
    ):
        visit(page, broker, script)
        assert told(page, "applySignals('update', 'pbs_x')") == {
            "nonce": {"supported": False, "applied": 0, "failed": 0}
        }
    assert broker.posts == []

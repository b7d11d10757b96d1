"""A real Chromium over a pipe: pages, input, requests and virtual authenticators, with the standard
library only.

Theory of operation. `Chromium` starts one browser whose DevTools protocol runs over two inherited
pipes (descriptors 3 and 4; messages are JSON ended by a NUL byte), so there is no port to guess and
the browser ends when this process does. One thread reads; a call waits for the answer with its
number, an event goes to the page whose session it names. Every wait has a deadline, and a wait that
ends without success raises with what the page showed, so a failure explains itself.

Nothing leaves loopback: a resolver rule makes every name but `localhost` unknown. WebAuthn needs a
page on `http://localhost:PORT`; an IP address is no valid RP ID.

A `Page` lives in a browser context of its own: cookies, storage and virtual authenticators of one
test are not another's. Elements are named as people name them: `button("Sign in")`,
`textbox("Name")` ask the browser's accessibility tree, a plain string is a CSS selector. Clicks and
keys are real input events, sent only when the element is visible, enabled and uncovered.

All calls block. An asyncio test that also runs a server in its event loop calls them through
`asyncio.to_thread`.

    with Chromium() as browser, browser.page() as page:
        device = page.authenticator()
        page.goto("http://localhost:1234/")
        page.fill(textbox("Name"), "ada")
        page.click(button("Create a passkey"))
        page.wait_for_text("Welcome")
        assert len(device.credentials()) == 1

Facts of the virtual authenticator that surprise: it keeps at most three discoverable passkeys that
pages made (clear it, or take a fresh page); a conditional get resolves at once when a passkey
matches and is refused at once when none does, so switch presence off to keep one pending; switching
presence on does not release a request that already waits.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import queue
import re
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from tests.support import parts

DEADLINE = 30.0  # seconds; for a wait that a page should end within milliseconds
POLL = 0.02  # seconds between two looks at the page

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE localhost , EXCLUDE 127.0.0.1 , EXCLUDE *.localhost",
)

T = TypeVar("T")


class ProtocolError(Exception):
    """The browser refused a command, or is gone."""


class ScriptError(Exception):
    """A script of ours threw in the page; the message is the browser's description of what it
    threw.
    """


class TooLate(AssertionError):
    """What was waited for did not happen before the deadline."""


@dataclass(frozen=True, slots=True)
class Named:
    """An element by ARIA role and accessible name, both as the browser computes them. The name
    matches whole.
    """

    role: str
    name: str


Locator = str | Named  # a string is a CSS selector


def button(name: str) -> Named:
    return Named("button", name)


def link(name: str) -> Named:
    return Named("link", name)


def textbox(name: str) -> Named:
    return Named("textbox", name)


@dataclass(slots=True)
class Request:
    """One request that a page sent. Filled in as the answer arrives; `failure` is the browser's
    word, like "net::ERR_FAILED".
    """

    id: str
    method: str
    url: str
    type: str  # "Document", "Script", "Fetch", "Preflight", …
    headers: dict[str, str]
    body: str | None
    status: int | None = None
    answer_headers: dict[str, str] = field(default_factory=dict)
    failure: str | None = None
    finished: bool = False  # the page has read the whole answer


@dataclass(frozen=True, slots=True)
class Answer:
    """What an interceptor says instead of the server."""

    status: int
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)


Interceptor = Callable[[Request], Answer | None]


def wait_until(look: Callable[[], T | None], what: str, deadline: float = DEADLINE) -> T:
    """Call `look` until it answers something true, and return that.

    Raises:
        TooLate: nothing true within `deadline` seconds; the message begins with `what`.
    """
    end = time.monotonic() + deadline
    while True:
        if value := look():
            return value
        if time.monotonic() > end:
            raise TooLate(f"{what}: not within {deadline} s")
        time.sleep(POLL)  # between two looks


class Chromium:
    """One browser process. Close it, or use it as a context manager."""

    def __init__(self, flags: Sequence[str] = ()) -> None:
        """Start the browser with `FLAGS` and `flags` (for an option given twice, the later one
        counts).
        """
        binary = parts.chromium()
        self.news = threading.Condition()  # notified at every event
        self._profile = tempfile.mkdtemp(prefix="chromium-")
        self._lock = threading.Lock()
        self._count = 0
        self._waits: dict[int, queue.SimpleQueue[dict[str, Any]]] = {}
        self._sessions: dict[str, Callable[[str, dict[str, Any]], None]] = {}
        self._gone = False
        commands, self._commands = _pipe("wb")
        answers, self._answers = _pipe("rb")
        argv = [
            binary,
            *FLAGS,
            *flags,
            "--user-data-dir=" + self._profile,
            "--remote-debugging-pipe",
        ]
        self._pid = os.posix_spawn(
            argv[0],
            [*argv, "about:blank"],
            os.environ,
            setpgroup=0,  # a group of its own: the program on PATH may be a wrapper round the browser
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
                (
                    os.POSIX_SPAWN_OPEN,
                    2,
                    self._profile + "/stderr",
                    os.O_WRONLY | os.O_CREAT,
                    0o600,
                ),
                (os.POSIX_SPAWN_DUP2, commands, 3),
                (os.POSIX_SPAWN_DUP2, answers, 4),
            ],
        )
        os.close(commands)
        os.close(answers)
        self._reader = threading.Thread(target=self._read, name="chromium", daemon=True)
        self._reader.start()
        try:
            self.version: str = self.send("Browser.getVersion", timeout=30)["product"]
        except ProtocolError as error:
            stderr = Path(self._profile, "stderr").read_text(errors="replace")
            self.close()
            raise ProtocolError(f"{argv[0]} did not start: {stderr.strip() or error}") from None

    def page(self) -> Page:
        """A new page in a browser context of its own, with WebAuthn under the test's control (no
        authenticator yet).
        """
        context = self.send("Target.createBrowserContext")["browserContextId"]
        return Page(self, context, owner=True)

    def send(
        self, method: str, session: str | None = None, timeout: float = DEADLINE, **params: Any
    ) -> dict[str, Any]:
        """Call a DevTools method and return its result.

        Raises:
            ProtocolError: the browser refused it or ended.
            TooLate: no answer within `timeout` seconds.
        """
        wait: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        number = self._post(method, session, params, wait)
        try:
            answer = wait.get(timeout=timeout)
        except queue.Empty:
            self._waits.pop(number, None)
            raise TooLate(f"{method}: no answer within {timeout} s") from None
        if "error" in answer:
            raise ProtocolError(f"{method}: {answer['error']['message']}")
        result: dict[str, Any] = answer["result"]
        return result

    def post(self, method: str, session: str | None = None, **params: Any) -> None:
        """Call a DevTools method without waiting; for code that runs in the reading thread."""
        self._post(method, session, params, queue.SimpleQueue())

    def _post(
        self,
        method: str,
        session: str | None,
        params: dict[str, Any],
        wait: queue.SimpleQueue[dict[str, Any]],
    ) -> int:
        with self._lock:
            if self._gone:
                raise ProtocolError(f"{method}: the browser has ended")
            self._count += 1
            self._waits[self._count] = wait
            message = {"id": self._count, "method": method, "params": params}
            if session:
                message["sessionId"] = session
            try:
                self._commands.write(json.dumps(message).encode() + b"\0")
                self._commands.flush()
            except BrokenPipeError:
                raise ProtocolError(f"{method}: the browser has ended") from None
            return self._count

    def listen(self, session: str, handler: Callable[[str, dict[str, Any]], None] | None) -> None:
        """Send the session's events to `handler` (in the reading thread, `news` held); None ends
        that.
        """
        if handler:
            self._sessions[session] = handler
        else:
            self._sessions.pop(session, None)

    def _read(self) -> None:
        pending = b""
        while chunk := os.read(self._answers.fileno(), 1 << 16):
            *messages, pending = (pending + chunk).split(b"\0")
            for message in map(json.loads, messages):
                if "id" in message:
                    if wait := self._waits.pop(message["id"], None):
                        wait.put(message)
                elif handler := self._sessions.get(message.get("sessionId", "")):
                    with self.news:
                        handler(message["method"], message["params"])
                        self.news.notify_all()
        with self._lock:
            self._gone = True
            for wait in self._waits.values():
                wait.put({"error": {"message": "the browser has ended"}})
            self._waits.clear()

    def close(self) -> None:
        """End the browser, wait for it, and remove its profile."""
        with contextlib.suppress(ProtocolError, TooLate):
            self.send("Browser.close", timeout=5)
        try:
            wait_until(self._ended, "the browser's end")
        except TooLate:
            os.killpg(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)
        self._reader.join(DEADLINE)
        with contextlib.suppress(BrokenPipeError):
            self._commands.close()
        self._answers.close()
        shutil.rmtree(self._profile, ignore_errors=True)

    def _ended(self) -> bool:
        return os.waitpid(self._pid, os.WNOHANG)[0] == self._pid

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class Page:
    """One tab. Its lists (`console`, `errors`, `requests`, `dialogs`) grow while it lives and are
    never cleared by it.
    """

    def __init__(self, browser: Chromium, context: str, *, owner: bool) -> None:
        self.browser = browser
        self.console: list[str] = []  # "level: text", console calls and the browser's own log
        self.errors: list[str] = []  # uncaught exceptions and unhandled rejections
        self.requests: list[Request] = []
        self.dialogs: list[
            str
        ] = []  # texts of alert, confirm and prompt; `accept_dialogs` answers them
        self.accept_dialogs = True
        self.context = context
        self._owner = owner
        self._loads: list[str] = []
        self._authenticators: dict[str, Authenticator] = {}
        self._interceptors: list[tuple[str, Interceptor]] = []
        target = browser.send("Target.createTarget", url="about:blank", browserContextId=context)[
            "targetId"
        ]
        self._target: str = target
        self._session: str = browser.send("Target.attachToTarget", targetId=target, flatten=True)[
            "sessionId"
        ]
        browser.listen(self._session, self._event)
        for domain in ("Page", "Runtime", "Network", "Log", "DOM", "Accessibility"):
            self.send(domain + ".enable")
        self.send("Page.setLifecycleEventsEnabled", enabled=True)
        self.send("Emulation.setFocusEmulationEnabled", enabled=True)
        self.send("WebAuthn.enable", enableUI=False)

    def another(self) -> Page:
        """A second tab in the same browser context: same cookies and storage, its own
        authenticators.
        """
        return Page(self.browser, self.context, owner=False)

    def send(self, method: str, timeout: float = DEADLINE, **params: Any) -> dict[str, Any]:
        """Call a DevTools method on this page."""
        return self.browser.send(method, self._session, timeout, **params)

    def close(self) -> None:
        """Close the tab, and with the first tab of a context the context."""
        self.browser.listen(self._session, None)
        if self._owner:
            self.browser.send("Target.disposeBrowserContext", browserContextId=self.context)
        else:
            self.browser.send("Target.closeTarget", targetId=self._target)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # Documents and scripts

    def goto(self, url: str) -> None:
        """Open `url` and wait for its load event.

        Raises:
            ProtocolError: the document could not be fetched.
        """
        answer = self.send("Page.navigate", url=url)
        if "errorText" in answer:
            raise ProtocolError(f"{url}: {answer['errorText']}")
        if loader := answer.get("loaderId"):  # absent when only the fragment changed
            self._await(lambda: loader in self._loads, f"load of {url}")

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Wait, at the end of the block, for the load of a document that the block caused (a link,
        a form, a script).
        """
        before = len(self._loads)
        yield
        self._await(lambda: len(self._loads) > before, "load of a new document")

    def reload(self) -> None:
        with self.loading():
            self.send("Page.reload")

    def before_scripts(self, source: str) -> None:
        """Run `source` in every document opened from now on, before the document's own scripts."""
        self.send("Page.addScriptToEvaluateOnNewDocument", source=source)

    @property
    def url(self) -> str:
        return str(self.js("location.href"))

    def js(self, expression: str, *, gesture: bool = True, timeout: float = DEADLINE) -> Any:
        """Evaluate an expression; a promise is awaited. The value must survive JSON. `gesture`:
        count as user activation.

        Raises:
            ScriptError: it threw or rejected.
        """
        answer = self.send(
            "Runtime.evaluate",
            timeout,
            expression=expression,
            awaitPromise=True,
            returnByValue=True,
            userGesture=gesture,
        )
        return _value(answer)

    def wait_until(self, expression: str, deadline: float = DEADLINE) -> Any:
        """Evaluate an expression until its value is truthy, across navigations, and return that."""
        return self._poll(lambda: self.js(expression), expression, deadline)

    # Elements

    def text(self, locator: Locator = "body") -> str:
        """The visible text of the one element that `locator` names, as `innerText` has it."""
        return str(self._call(self._one(locator), "function () { return this.innerText }"))

    def attribute(self, locator: Locator, name: str) -> str | None:
        value: str | None = self._call(
            self._one(locator), f"function () {{ return this.getAttribute({json.dumps(name)}) }}"
        )
        return value

    def count(self, locator: Locator) -> int:
        """How many visible elements there are now."""
        return len(self._objects(locator))

    def wait_for(self, locator: Locator, deadline: float = DEADLINE) -> None:
        """Wait until at least one such element is visible."""
        self._poll(lambda: self.count(locator), f"{locator}", deadline)

    def wait_gone(self, locator: Locator, deadline: float = DEADLINE) -> None:
        """Wait until no such element is visible."""
        self._poll(lambda: self.count(locator) == 0, f"end of {locator}", deadline)

    def wait_for_text(
        self, text: str | re.Pattern[str], within: Locator = "body", deadline: float = DEADLINE
    ) -> str:
        """Wait until the element's visible text contains `text` (or the pattern matches in it);
        return the whole text.
        """

        def look() -> str | None:
            if not self.count(within):
                return None
            shown = self.text(within)
            found = text in shown if isinstance(text, str) else text.search(shown)
            return shown if found else None

        return self._poll(look, f"text {text!r} in {within}", deadline)

    def focused(self) -> Named:
        """Role and accessible name of what has the keyboard focus."""
        found = self.send("Runtime.evaluate", expression="document.activeElement")["result"][
            "objectId"
        ]
        node = self.send("Accessibility.getPartialAXTree", objectId=found, fetchRelatives=False)[
            "nodes"
        ][0]
        return Named(*(str(node.get(key, {}).get("value", "")) for key in ("role", "name")))

    # Input

    def click(self, locator: Locator, deadline: float = DEADLINE) -> None:
        """Press and release the left mouse button on the element, once it is visible, enabled and
        uncovered.
        """
        said = "absent"

        def look() -> tuple[float, float] | None:
            nonlocal said
            objects = self._objects(locator)
            if len(objects) != 1:
                said = f"{len(objects)} such elements" if objects else "absent or not visible"
                return None
            at = self._call(objects[0], _POINT)
            if isinstance(at, str):
                said = at
                return None
            return at["x"], at["y"]

        try:
            x, y = self._poll(look, f"click on {locator}", deadline)
        except TooLate as error:
            raise TooLate(f"{error}\nlast seen: {said}") from None
        self.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def fill(self, locator: Locator, text: str) -> None:
        """Click into a text field and replace what it holds."""
        self.click(locator)
        self._call(self._one(locator), "function () { this.select() }")
        if text:
            self.send("Input.insertText", text=text)
        else:
            self.press("Delete")

    def press(self, key: str, *, shift: bool = False) -> None:
        """Press and release one key of `KEYS` on what has the focus."""
        code, text = KEYS[key]
        common: dict[str, Any] = {
            "key": key if key != "Space" else " ",
            "code": key,
            "windowsVirtualKeyCode": code,
        }
        common["modifiers"] = 8 if shift else 0
        if text:
            self.send("Input.dispatchKeyEvent", type="keyDown", text=text, **common)
        else:
            self.send("Input.dispatchKeyEvent", type="rawKeyDown", **common)
        self.send("Input.dispatchKeyEvent", type="keyUp", **common)

    # Looks

    def view(
        self, width: int = 1280, height: int = 800, *, dark: bool = False, **media: str
    ) -> None:
        """Set the viewport in CSS pixels, the colour scheme, and further media features
        (`prefers_reduced_motion="reduce"`).
        """
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        features += [
            {"name": name.replace("_", "-"), "value": value} for name, value in media.items()
        ]
        self.send("Emulation.setEmulatedMedia", features=features)

    # Network

    def sent(self, path: str, method: str = "POST") -> list[Request]:
        """The requests so far with this method whose URL's path ends with `path`."""
        return [
            r for r in self.requests if r.method == method and r.url.split("?")[0].endswith(path)
        ]

    def wait_sent(
        self, path: str, count: int = 1, method: str = "POST", deadline: float = DEADLINE
    ) -> Request:
        """Wait until `count` such requests were answered or failed; return the last of them."""

        def done() -> list[Request]:
            return [r for r in self.sent(path, method) if r.status is not None or r.failure]

        self._await(lambda: len(done()) >= count, f"{count} x {method} {path}", deadline)
        return done()[count - 1]

    def cookies(self) -> list[dict[str, Any]]:
        """The cookies that the page's URL gets, HttpOnly ones included, with the protocol's
        keys.
        """
        cookies: list[dict[str, Any]] = self.send("Network.getCookies")["cookies"]
        return cookies

    def offline(self, offline: bool = True) -> None:
        """Cut the page from the network (each fetch fails), or join it again. Chromium answers
        before its network does as told, so a fetch is waited for that sees it."""
        self.send(
            "Network.emulateNetworkConditions",
            offline=offline,
            latency=0,
            downloadThroughput=-1,
            uploadThroughput=-1,
        )
        tried = "fetch(location.href, {cache: 'no-store'}).then(() => false, () => true)"
        self.wait_until(f"{tried}.then((failed) => failed === {json.dumps(offline)})")

    def intercept(self, pattern: str, interceptor: Interceptor) -> None:
        """Ask `interceptor` about requests whose URL matches `pattern` (`*` and `?`); None lets one
        pass.

        It runs in the reading thread: it must not call this page. The last one added for a URL
        wins.
        """
        self._interceptors.insert(0, (pattern, interceptor))
        self.send("Fetch.enable", patterns=[{"urlPattern": p} for p, _ in self._interceptors])

    # Authenticators

    def authenticator(self, **options: Any) -> Authenticator:
        """Plug in a virtual authenticator: by default a platform one that keeps passkeys, verifies
        the user and says yes.

        `options` are those of `WebAuthn.addVirtualAuthenticator`, like `transport="usb"`,
        `hasUserVerification=False`, `defaultBackupEligibility=True`. It belongs to the tab and
        survives navigation.
        """
        chosen: dict[str, Any] = {
            "protocol": "ctap2",
            "ctap2Version": "ctap2_1",
            "transport": "internal",
            "hasResidentKey": True,
            "hasUserVerification": True,
            "isUserVerified": True,
            "automaticPresenceSimulation": True,
        } | options
        number = self.send("WebAuthn.addVirtualAuthenticator", options=chosen)["authenticatorId"]
        self._authenticators[number] = Authenticator(self, number)
        return self._authenticators[number]

    # Inside

    def _await(self, happened: Callable[[], bool], what: str, deadline: float = DEADLINE) -> None:
        with self.browser.news:
            done = self.browser.news.wait_for(happened, deadline)
        if not done:
            raise TooLate(f"{what}: not within {deadline} s\n{self._state()}")

    def _poll(self, look: Callable[[], T | None], what: str, deadline: float) -> T:
        def steady() -> T | None:
            try:
                return look()
            except ProtocolError as error:
                if re.search(
                    r"context|node|object", str(error), re.I
                ):  # the document changed under us
                    return None
                raise

        try:
            return wait_until(steady, what, deadline)
        except TooLate as error:
            raise TooLate(f"{error}\n{self._state()}") from None

    def _state(self) -> str:
        try:
            shown = self.js("location.href + '\\n' + document.body?.innerText", timeout=5)
        except (ProtocolError, ScriptError, TooLate) as error:
            shown = f"(no answer from the page: {error})"
        return "\n".join([f"page: {shown}", *self.console[-20:], *self.errors[-5:]])

    def _one(self, locator: Locator) -> str:
        objects = self._objects(locator)
        if len(objects) != 1:
            raise AssertionError(f"{locator}: {len(objects)} such elements\n{self._state()}")
        return objects[0]

    def _objects(self, locator: Locator) -> list[str]:
        """Handles of the visible elements."""
        if isinstance(locator, Named):
            root = self.send("DOM.getDocument", depth=0)["root"]["backendNodeId"]
            nodes = self.send(
                "Accessibility.queryAXTree",
                backendNodeId=root,
                role=locator.role,
                accessibleName=locator.name,
            )["nodes"]
            found = [
                self.send("DOM.resolveNode", backendNodeId=node["backendDOMNodeId"])["object"][
                    "objectId"
                ]
                for node in nodes
                if not node["ignored"] and "backendDOMNodeId" in node
            ]
        else:
            query = f"[...document.querySelectorAll({json.dumps(locator)})]"
            answer = self.send("Runtime.evaluate", expression=query)
            if "exceptionDetails" in answer:
                _value(answer)
            handle = answer["result"]["objectId"]
            properties = self.send("Runtime.getProperties", objectId=handle, ownProperties=True)[
                "result"
            ]
            found = [p["value"]["objectId"] for p in properties if p["name"].isdigit()]
        return [
            handle
            for handle in found
            if self._call(
                handle, "function () { return this.checkVisibility({visibilityProperty: true}) }"
            )
        ]

    def _call(self, handle: str, function: str) -> Any:
        return _value(
            self.send(
                "Runtime.callFunctionOn",
                objectId=handle,
                functionDeclaration=function,
                returnByValue=True,
                awaitPromise=True,
            )
        )

    def _event(self, method: str, params: dict[str, Any]) -> None:
        domain = method.partition(".")[0]
        if domain == "Network":
            self._network(method, params)
        elif domain == "WebAuthn":
            if device := self._authenticators.get(params["authenticatorId"]):
                kind = method.removeprefix("WebAuthn.credential").lower()
                device.events.append((kind, params.get("credential") or params))
        elif method == "Page.lifecycleEvent":
            if params["name"] == "load" and params["frameId"] == self._target:
                self._loads.append(params["loaderId"])
        elif method == "Page.javascriptDialogOpening":
            self.dialogs.append(params["message"])
            self.browser.post(
                "Page.handleJavaScriptDialog", self._session, accept=self.accept_dialogs
            )
        elif method == "Runtime.consoleAPICalled":
            said = " ".join(str(a.get("value", a.get("description", ""))) for a in params["args"])
            self.console.append(f"{params['type']}: {said}")
        elif method == "Log.entryAdded":
            entry = params["entry"]
            self.console.append(
                f"{entry['level']}: {entry['text']} {entry.get('url', '')}".rstrip()
            )
        elif method == "Runtime.exceptionThrown":
            self.errors.append(_described(params["exceptionDetails"]))
        elif method == "Fetch.requestPaused":
            self._paused(params)

    def _network(self, method: str, params: dict[str, Any]) -> None:
        number = str(params.get("requestId", ""))
        if method == "Network.requestWillBeSent":
            if redirect := params.get("redirectResponse"):
                self._answered(number, redirect)
            self.requests.append(_request(number, params["request"], params.get("type", "")))
        elif method == "Network.responseReceived":
            self._answered(number, params["response"])
        elif method == "Network.loadingFinished":
            for request in self._last(number):
                request.finished = True
        elif method == "Network.loadingFailed":
            for request in self._last(number):
                request.failure = params["errorText"]

    def _answered(self, number: str, response: dict[str, Any]) -> None:
        for request in self._last(number):
            request.status, request.answer_headers = response["status"], response["headers"]

    def _last(self, number: str) -> list[Request]:
        """The newest request with this id (redirects keep theirs), or nothing where it began before
        us.
        """
        return [request for request in self.requests if request.id == number][-1:]

    def _paused(self, params: dict[str, Any]) -> None:
        request = _request(params["requestId"], params["request"], params["resourceType"])
        for pattern, interceptor in self._interceptors:
            if not re.fullmatch(
                re.escape(pattern).replace(r"\*", ".*").replace(r"\?", "."), request.url
            ):
                continue
            if answer := interceptor(request):
                self.browser.post(
                    "Fetch.fulfillRequest",
                    self._session,
                    requestId=request.id,
                    responseCode=answer.status,
                    responseHeaders=[{"name": k, "value": v} for k, v in answer.headers.items()],
                    body=base64.b64encode(answer.body).decode(),
                )
                return
            break
        self.browser.post("Fetch.continueRequest", self._session, requestId=request.id)


class Authenticator:
    """A virtual authenticator in a page. `events` holds ("added" | "asserted" | "updated" |
    "deleted", details) in order.
    """

    def __init__(self, page: Page, number: str) -> None:
        self._page = page
        self._number = number
        self.events: list[tuple[str, dict[str, Any]]] = []

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """Call a method of the WebAuthn domain on this authenticator."""
        return self._page.send("WebAuthn." + method, authenticatorId=self._number, **params)

    def present(self, present: bool) -> None:
        """Whether somebody touches it. With nobody there, a ceremony stays pending until its
        timeout or abort.
        """
        self.send("setAutomaticPresenceSimulation", enabled=present)

    def verified(self, verified: bool) -> None:
        """Whether its user verification succeeds. Where it fails, the page gets NotAllowedError, as
        from a cancelled prompt.
        """
        self.send("setUserVerified", isUserVerified=verified)

    def misbehave(
        self, *, bogus_signature: bool = False, bad_uv: bool = False, bad_up: bool = False
    ) -> None:
        """Answer with a wrong signature, or with the UV or UP flag cleared; without arguments,
        behave again.
        """
        self.send(
            "setResponseOverrideBits",
            isBogusSignature=bogus_signature,
            isBadUV=bad_uv,
            isBadUP=bad_up,
        )

    def credentials(self) -> list[dict[str, Any]]:
        """Its passkeys: credentialId (standard base64), rpId, userHandle, userName,
        userDisplayName, signCount, privateKey, …
        """
        credentials: list[dict[str, Any]] = self.send("getCredentials")["credentials"]
        return credentials

    def add(self, credential: Mapping[str, Any]) -> None:
        """Give it a passkey, as `credentials` of another one returned it. Not limited to three."""
        self.send("addCredential", credential=dict(credential))

    def set(self, credential_id: str, **properties: Any) -> None:
        """Change a passkey: signCount, backupEligibility, backupState. `signCount=1` makes it look
        like a clone.
        """
        self.send("setCredentialProperties", credentialId=credential_id, **properties)

    def forget(self, credential_id: str | None = None) -> None:
        """Remove one passkey, or all of them."""
        if credential_id is None:
            self.send("clearCredentials")
        else:
            self.send("removeCredential", credentialId=credential_id)

    def unplug(self) -> None:
        self.send("removeVirtualAuthenticator")

    def wait_event(self, kind: str, count: int = 1, deadline: float = DEADLINE) -> dict[str, Any]:
        """Wait until `count` events of this kind came; return the details of the last of them."""

        def of_kind() -> list[dict[str, Any]]:
            return [details for k, details in self.events if k == kind]

        news = self._page.browser.news
        with news:
            if not news.wait_for(lambda: len(of_kind()) >= count, deadline):
                raise TooLate(
                    f"{count} x credential {kind}: not within {deadline} s; came {self.events}"
                )
        return of_kind()[count - 1]


# Key name -> (Windows virtual key code, the text it types).
KEYS: dict[str, tuple[int, str]] = {
    "Enter": (13, "\r"),
    "Tab": (9, ""),
    "Escape": (27, ""),
    "Space": (32, " "),
    "Backspace": (8, ""),
    "Delete": (46, ""),
    "Home": (36, ""),
    "End": (35, ""),
    "ArrowLeft": (37, ""),
    "ArrowUp": (38, ""),
    "ArrowRight": (39, ""),
    "ArrowDown": (40, ""),
}

_POINT = """function () {
  if (this.matches(":disabled")) return "disabled";
  this.scrollIntoView({block: "center", inline: "nearest", behavior: "instant"});
  const box = this.getClientRects()[0];
  if (!box || !box.width || !box.height) return "without size";
  const x = box.left + box.width / 2, y = box.top + box.height / 2;
  const hit = document.elementFromPoint(x, y);
  if (hit && (this.contains(hit) || hit.closest("label")?.control === this)) return {x, y};
  return hit ? "covered by " + hit.outerHTML.slice(0, 80) : "outside the viewport";
}"""


def _pipe(mode: str) -> tuple[int, Any]:
    """The child's end (above the descriptors 3 and 4 that it will be copied to) and a file of
    ours.
    """
    read, write = os.pipe()
    theirs, ours = (read, write) if mode == "wb" else (write, read)
    high = fcntl.fcntl(theirs, fcntl.F_DUPFD_CLOEXEC, 10)
    os.close(theirs)
    return high, os.fdopen(ours, mode)


def _request(number: str, request: dict[str, Any], kind: str) -> Request:
    return Request(
        number, request["method"], request["url"], kind, request["headers"], request.get("postData")
    )


def _value(answer: dict[str, Any]) -> Any:
    if details := answer.get("exceptionDetails"):
        raise ScriptError(_described(details))
    return answer["result"].get("value")


def _described(details: dict[str, Any]) -> str:
    exception = details.get("exception", {})
    return str(exception.get("description") or exception.get("value") or details["text"])

"""Recorded calls: one HTTP request each, and the steps of a ceremony made of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import aiohttp
import orjson

from tests.chaos.deployment import Door
from tests.chaos.dialects import App, Dialect, Purpose, Request
from tests.chaos.history import Recorder, Type, mark
from tests.support.authenticator import unb64

TIMEOUT = 8.0  # seconds that a caller waits for an answer
_UNKNOWN = {408, 502, 503, 504}  # statuses that leave the outcome open


class Outcome(NamedTuple):
    """How a call ended, and its body where that is JSON."""

    type: Type
    body: Any

    @property
    def ok(self) -> bool:
        return self.type == "ok"


class Ceremony(NamedTuple):
    """A begun ceremony. `mark` names it in the history."""

    app: App
    user: str
    dialect: Dialect
    purpose: Purpose
    transaction: str
    handle: str
    options: dict[str, Any]

    @property
    def mark(self) -> str:
        return mark(self.options["challenge"])


class Proof(NamedTuple):
    """A nonce, and what it stands for."""

    app: App
    user: str
    dialect: Dialect
    purpose: Purpose
    credential: str
    nonce: str


class Finished(NamedTuple):
    """A finish: whether it succeeded, and its nonce where the dialect gives one."""

    ok: bool
    proof: Proof | None = None


@dataclass(eq=False, slots=True)
class Caller:
    """Makes calls, through HAProxy (`door`) unless `via` is a broker's."""

    door: Door
    recorder: Recorder
    session: aiohttp.ClientSession
    _free: list[int] = field(default_factory=list)
    _made: int = 0

    async def call(
        self,
        f: str,
        app: App,
        request: Request,
        told: Callable[[Any], dict[str, Any]] = lambda _: {},
        *,
        via: Door | None = None,
        repeat: str = "",
        **value: Any,
    ) -> Outcome:
        """Make a call and record it. `told` reads what the history keeps of a success. `repeat` is
        the call's Idempotency-Key.
        """
        door = via or self.door
        process = self._free.pop() if self._free else self.new_process()
        value = {"app": app.id, **value, **({"via": via.name} if via else {})}
        headers = request.headers(app)
        if repeat:
            value["repeat"] = mark(repeat)
            headers["Idempotency-Key"] = repeat
        self.recorder.write(process, "invoke", f, value)
        kind: Type = "info"
        result: dict[str, Any] = {"fault": "cancelled"}
        body: Any = None
        try:
            async with self.session.request(
                request.method,
                (door.keyed if request.auth else door.pages) + request.path,
                data=None if request.body is None else orjson.dumps(request.body),
                headers=headers,
            ) as response:
                status, raw = response.status, await response.read()
            with contextlib.suppress(orjson.JSONDecodeError):
                body = orjson.loads(raw)
            kind, result = _judged(status, body, told)
            if kind != "ok":
                result["request"] = response.headers.get("X-Request-Id", "")
                result["server"] = response.headers.get("X-Server", "")  # by HAProxy
        except (aiohttp.ClientError, TimeoutError, OSError) as fault:
            result = {"fault": type(fault).__name__}
        finally:
            self.recorder.write(process, kind, f, result)
            if kind != "info":  # a process whose call has no known end makes no other
                self._free.append(process)
        return Outcome(kind, body)

    def new_process(self) -> int:
        self._made += 1
        return self._made

    async def open(
        self, app: App, user: str, dialect: Dialect, purpose: Purpose, *, repeat: str = ""
    ) -> str | None:
        """The transaction; "" in a dialect that has none, None after a failure."""
        request = dialect.open(app, purpose, user)
        if request is None:
            return ""
        outcome = await self.call(
            "open",
            app,
            request,
            lambda body: {"transaction": mark(dialect.opened(body))},
            repeat=repeat,
            user=user,
            purpose=purpose,
            dialect=dialect.name,
        )
        return dialect.opened(outcome.body) if outcome.ok else None

    async def begin(
        self,
        app: App,
        user: str,
        dialect: Dialect,
        purpose: Purpose,
        transaction: str,
        *,
        via: Door | None = None,
    ) -> Ceremony | None:
        """A pending ceremony, of the transaction where the dialect has one."""
        outcome = await self.call(
            "begin",
            app,
            dialect.begin(app, purpose, user, transaction),
            lambda body: {"ceremony": mark(dialect.begun(body).options["challenge"])},
            via=via,
            user=user,
            purpose=purpose,
            dialect=dialect.name,
            **({"transaction": mark(transaction)} if transaction else {}),
        )
        if not outcome.ok:
            return None
        return Ceremony(app, user, dialect, purpose, transaction, *dialect.begun(outcome.body))

    async def start(
        self, app: App, user: str, dialect: Dialect, purpose: Purpose
    ) -> Ceremony | None:
        """Open and begin."""
        transaction = await self.open(app, user, dialect, purpose)
        if transaction is None:
            return None
        return await self.begin(app, user, dialect, purpose, transaction)

    async def finish(
        self,
        ceremony: Ceremony,
        answer: dict[str, Any],
        *,
        right: bool = True,
        door: Dialect | None = None,
        via: Door | None = None,
    ) -> Finished:
        """Send an answer to the ceremony's own dialect, or to another one (`door`). `right`: the
        answer is one that the broker must take.
        """
        by = door or ceremony.dialect
        value: dict[str, Any] = {
            "user": ceremony.user,
            "purpose": ceremony.purpose,
            "dialect": by.name,
            "opener": ceremony.dialect.name,
            "ceremony": ceremony.mark,
            "credential": answer["id"],
            "right": right,
        }
        if ceremony.transaction:
            value["transaction"] = mark(ceremony.transaction)
        if ceremony.purpose == "authenticate":
            data = unb64(answer["response"]["authenticatorData"])
            value["counter"] = int.from_bytes(data[33:37], "big")

        def told(body: Any) -> dict[str, Any]:
            proof = by.proof(body)
            return {**by.claims(body), **({"nonce": mark(proof)} if proof else {})}

        request = by.finish(ceremony.app, ceremony.purpose, ceremony.user, ceremony.handle, answer)
        outcome = await self.call("finish", ceremony.app, request, told, via=via, **value)
        nonce = by.proof(outcome.body) if outcome.ok else ""
        if not nonce:
            return Finished(outcome.ok)
        app, user, purpose = ceremony.app, ceremony.user, ceremony.purpose
        return Finished(True, Proof(app, user, by, purpose, answer["id"], nonce))

    async def redeem(self, proof: Proof, *, via: Door | None = None, repeat: str = "") -> Outcome:
        return await self.call(
            "redeem",
            proof.app,
            proof.dialect.redeem(proof.app, proof.nonce),
            proof.dialect.receipt,
            via=via,
            repeat=repeat,
            user=proof.user,
            purpose=proof.purpose,
            dialect=proof.dialect.name,
            credential=proof.credential,
            nonce=mark(proof.nonce),
        )


def _judged(
    status: int, body: Any, told: Callable[[Any], dict[str, Any]]
) -> tuple[Type, dict[str, Any]]:
    if status < 300:
        try:
            return "ok", told(body)
        except (LookupError, TypeError, AttributeError, ValueError):
            return "fail", {"status": status, "code": "malformed success"}
    code = ""
    if isinstance(body, dict):
        parts = [body.get(name) for name in ("code", "_tag", "type", "title", "details")]
        code = " ".join(part for part in parts if isinstance(part, str))
    return "info" if status in _UNKNOWN else "fail", {"status": status, "code": code}

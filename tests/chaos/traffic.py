"""Traffic: many tasks that register, sign in through every dialect, send finishes and redemptions
twice, revoke, cancel and rotate keys.

The traffic judges nothing. It goes on after every answer, and the checker reads the history.
`stock` prepares values that a scenario lets `race` while a fault happens.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import aiohttp

from broker.errors import Unavailable
from tests.chaos import dialects
from tests.chaos.caller import TIMEOUT, Caller, Ceremony, Finished, Proof
from tests.chaos.deployment import Deployment, Door
from tests.chaos.dialects import DIALECTS, App, Dialect
from tests.chaos.history import Recorder, mark
from tests.support.authenticator import Authenticator
from tests.support.wire import ORIGIN, RP_ID

T = TypeVar("T")
Answered = tuple[Ceremony, dict[str, Any]]
FLEX, DISCOVERABLE, HANKO, PASSLOCK, PROPELAUTH = DIALECTS
_KEYS_SETTLE = 1.2  # seconds after which every instance knows of a revoked key
_AT_ONCE = 12  # calls at the same time while a stock is prepared


@dataclass(eq=False, slots=True)
class Passkey:
    """A passkey whose registration was acknowledged. `lock` orders its sign-ins, because its
    counter must rise.
    """

    app: App
    user: str
    device: Authenticator
    credential: str
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    revoked: bool = False


@dataclass(eq=False, slots=True)
class Traffic:
    """The traffic on a deployment. `chance` decides what each task does."""

    deployment: Deployment
    recorder: Recorder
    chance: random.Random
    caller: Caller
    apps: list[App] = field(default_factory=list)
    passkeys: list[Passkey] = field(default_factory=list)
    _users: int = 0
    _going: bool = True

    async def make_apps(self, count: int = 2) -> None:
        for _ in range(count):
            directory = self.deployment.operator.directory
            app, key = await directory.create_app("Example", RP_ID, (ORIGIN,))
            self.apps.append(App(app.id, key))

    def new_user(self) -> str:
        self._users += 1
        return f"user-{self._users}"

    def new_repeat(self) -> str:
        """A new Idempotency-Key."""
        return f"{self.chance.getrandbits(128):x}"

    def new_device(self) -> Authenticator:
        """An authenticator. Half of them count; a counter alone would refuse a repeated answer."""
        return Authenticator(counts=self.chance.random() < 0.5)

    # -- parts of what people do -------------------------------------------------------------------

    async def register(
        self, app: App, user: str, dialect: Dialect
    ) -> tuple[Passkey | None, Finished]:
        """Register a passkey; sometimes the finish is sent twice at the same time."""
        ceremony = await self.caller.start(app, user, dialect, "register")
        if ceremony is None:
            return None, Finished(False)
        device = self.new_device()
        answer = device.register(ceremony.options, ORIGIN)
        finished = await self.finish_twice(ceremony, answer)
        if not finished.ok:
            return None, finished
        made = Passkey(app, user, device, answer["id"])
        self.passkeys.append(made)
        return made, finished

    async def finish_twice(
        self, ceremony: Ceremony, answer: dict[str, Any], likely: float = 0.25
    ) -> Finished:
        """Finish, and with this likelihood send the same finish at the same time."""
        times = 2 if self.chance.random() < likely else 1
        seen = await asyncio.gather(*(self.caller.finish(ceremony, answer) for _ in range(times)))
        return max(seen, key=lambda finished: finished.ok)

    async def sign_in(self, passkey: Passkey, dialect: Dialect) -> Finished:
        async with passkey.lock:
            ceremony = await self.caller.start(passkey.app, passkey.user, dialect, "authenticate")
            if ceremony is None:
                return Finished(False)
            answer = passkey.device.authenticate(ceremony.options, ORIGIN)
            return await self.finish_twice(ceremony, answer)

    async def redeem_twice(self, proof: Proof) -> None:
        """Redeem, in half of the cases twice at the same time, in some once more afterwards; in
        half of the cases all but the last with one Idempotency-Key.
        """
        repeat = self.new_repeat() if self.chance.random() < 0.5 else ""
        times = 2 if self.chance.random() < 0.5 else 1
        await asyncio.gather(*(self.caller.redeem(proof, repeat=repeat) for _ in range(times)))
        if repeat:
            await self.caller.redeem(proof, repeat=repeat)
        if self.chance.random() < 0.3:
            await self.caller.redeem(proof)

    def any_passkey(self) -> Passkey | None:
        live = [passkey for passkey in self.passkeys if not passkey.revoked]
        return self.chance.choice(live) if live else None

    # -- what people do ----------------------------------------------------------------------------

    async def enrol(self) -> None:
        """A new user registers, and the backend redeems."""
        app, dialect = self.chance.choice(self.apps), self.chance.choice(DIALECTS)
        _, finished = await self.register(app, self.new_user(), dialect)
        if finished.proof:
            await self.redeem_twice(finished.proof)

    async def log_in(self) -> None:
        """A user signs in, and the backend redeems."""
        passkey = self.any_passkey()
        if passkey is None:
            return await self.enrol()
        finished = await self.sign_in(passkey, self.chance.choice(DIALECTS))
        if finished.proof:
            await self.redeem_twice(finished.proof)

    async def try_again(self) -> None:
        """A wrong signature is sent, and then the right one for the same ceremony."""
        passkey = self.any_passkey()
        if passkey is None:
            return
        async with passkey.lock:
            dialect = self.chance.choice((FLEX, HANKO, PASSLOCK))
            ceremony = await self.caller.start(passkey.app, passkey.user, dialect, "authenticate")
            if ceremony is None:
                return
            answer = passkey.device.authenticate(ceremony.options, ORIGIN)
            other = passkey.device.authenticate(ceremony.options, ORIGIN, signature=b"wrong")
            await self.caller.finish(ceremony, other, right=False)
            await self.caller.finish(ceremony, answer)

    async def enter_elsewhere(self) -> None:
        """A ceremony of one dialect is finished through another one's door."""
        passkey = self.any_passkey()
        if passkey is None:
            return
        opener, door = self.chance.choice(
            ((DISCOVERABLE, PASSLOCK), (FLEX, PASSLOCK), (PASSLOCK, FLEX))
        )
        async with passkey.lock:
            ceremony = await self.caller.start(passkey.app, passkey.user, opener, "authenticate")
            if ceremony is None:
                return
            answer = passkey.device.authenticate(ceremony.options, ORIGIN)
            await self.caller.finish(ceremony, answer, right=False, door=door)

    async def two_pages(self) -> None:
        """Two pages register on one transaction: the second begins while the first finishes."""
        app, user = self.chance.choice(self.apps), self.new_user()
        transaction = await self.caller.open(app, user, FLEX, "register")
        if transaction is None:
            return

        async def page(pause: float) -> None:
            await asyncio.sleep(pause)
            ceremony = await self.caller.begin(app, user, FLEX, "register", transaction)
            if ceremony is None:
                return
            device = self.new_device()
            answer = device.register(ceremony.options, ORIGIN)
            if (await self.caller.finish(ceremony, answer)).ok:
                self.passkeys.append(Passkey(app, user, device, answer["id"]))

        await asyncio.gather(*(page(self.chance.random() * 0.03) for _ in range(4)))

    async def try_afterwards(
        self, passkey: Passkey, waiting: Ceremony | None, finished: Finished
    ) -> None:
        """Finish a sign-in that waits, and redeem the nonce of an earlier one."""
        if waiting is not None:
            answer = passkey.device.authenticate(waiting.options, ORIGIN)
            await self.caller.finish(waiting, answer)
        if finished.proof:
            await self.caller.redeem(finished.proof)

    async def revoke(self) -> None:
        """A passkey is revoked while a ceremony waits and a nonce is not redeemed; both are tried
        afterwards.
        """
        app, user = self.chance.choice(self.apps), self.new_user()
        passkey, _ = await self.register(app, user, self.chance.choice(DIALECTS))
        if passkey is None:
            return
        passkey.revoked = True
        finished = await self.sign_in(passkey, FLEX)
        waiting = await self.caller.start(app, user, FLEX, "authenticate")
        request = dialects.revoke(app, passkey.credential)
        await self.caller.call("revoke", app, request, user=user, credential=passkey.credential)
        await self.try_afterwards(passkey, waiting, finished)

    async def revoke_all(self) -> None:
        """All passkeys of a user are revoked while a registration waits, which is tried
        afterwards.
        """
        app, user = self.chance.choice(self.apps), self.new_user()
        passkey, finished = await self.register(app, user, self.chance.choice(DIALECTS))
        if passkey is None:
            return
        passkey.revoked = True
        waiting = await self.caller.start(app, user, FLEX, "register")
        await self.caller.call("revoke_all", app, dialects.revoke_all(user), user=user)
        if waiting is not None:
            device = self.new_device()
            answer = device.register(waiting.options, ORIGIN)
            await self.caller.finish(waiting, answer)
        if finished.proof:
            await self.caller.redeem(finished.proof)

    async def disable(self) -> None:
        """A user is disabled while a ceremony waits and a nonce is not redeemed; both are tried
        afterwards, and the user signs in when enabled again.
        """
        app, user = self.chance.choice(self.apps), self.new_user()
        passkey, _ = await self.register(app, user, self.chance.choice(DIALECTS))
        if passkey is None:
            return
        passkey.revoked = True
        finished = await self.sign_in(passkey, FLEX)
        waiting = await self.caller.start(app, user, FLEX, "authenticate")
        read = dialects.passkeys_of(app, user)
        found = await self.caller.call("keyed", app, read, key=mark(app.key))
        if not found.ok:
            return
        user_id = found.body["passkeys"][0]["user_id"]
        await self.caller.call("disable", app, dialects.disable(app, user_id), user=user)
        await self.try_afterwards(passkey, waiting, finished)
        await self.sign_in(passkey, self.chance.choice(DIALECTS))
        enable = dialects.disable(app, user_id, disabled=False)
        enabled = await self.caller.call("enable", app, enable, user=user)
        if enabled.ok:
            passkey.revoked = False
            await self.sign_in(passkey, FLEX)

    async def open_again(self) -> None:
        """A backend opens a transaction several times with one Idempotency-Key, and a page
        registers on it.
        """
        app, user, repeat = self.chance.choice(self.apps), self.new_user(), self.new_repeat()
        opened = [
            await self.caller.open(app, user, FLEX, "register", repeat=repeat) for _ in range(3)
        ]
        if opened[-1] is None:
            return
        ceremony = await self.caller.begin(app, user, FLEX, "register", opened[-1])
        if ceremony is not None:
            device = self.new_device()
            answer = device.register(ceremony.options, ORIGIN)
            if (await self.caller.finish(ceremony, answer)).ok:
                self.passkeys.append(Passkey(app, user, device, answer["id"]))

    async def cancel(self) -> None:
        """A transaction is cancelled, and begun and finished afterwards."""
        app, user = self.chance.choice(self.apps), self.new_user()
        transaction = await self.caller.open(app, user, FLEX, "register")
        if transaction is None:
            return
        ceremony = await self.caller.begin(app, user, FLEX, "register", transaction)
        request = dialects.cancel(app, transaction)
        await self.caller.call("cancel", app, request, user=user, transaction=mark(transaction))
        if ceremony is not None:
            answer = self.new_device().register(ceremony.options, ORIGIN)
            await self.caller.finish(ceremony, answer)

    async def rotate(self) -> None:
        """A new key of an app is used, revoked, and used again when every instance must know."""
        app = self.chance.choice(self.apps)
        directory = self.deployment.operator.directory
        try:
            made, key = await directory.create_key(app.id, "rotated")
            with_key = App(app.id, key)
            read = dialects.show_app(with_key)
            await self.caller.call("keyed", with_key, read, key=mark(key))
            await directory.revoke_key(app.id, made.id)
        except (Unavailable, OSError):
            return  # the harness's own access to Postgres suffers the same faults
        self.recorder.fault("key revoked", key=mark(key))
        await asyncio.sleep(_KEYS_SETTLE)
        await self.caller.call("keyed", with_key, read, key=mark(key))

    # -- tasks -------------------------------------------------------------------------------------

    async def _person(self) -> None:
        things: tuple[tuple[Callable[[], Awaitable[None]], int], ...] = (
            (self.enrol, 9),
            (self.log_in, 24),
            (self.try_again, 2),
            (self.enter_elsewhere, 2),
            (self.two_pages, 2),
            (self.revoke, 3),
            (self.revoke_all, 2),
            (self.disable, 2),
            (self.open_again, 2),
            (self.cancel, 1),
            (self.rotate, 1),
        )
        verbs, weights = zip(*things, strict=True)
        while self._going:
            (verb,) = self.chance.choices(verbs, weights)
            await verb()
            await asyncio.sleep(self.chance.random() * 0.1)  # a person thinks

    @contextlib.asynccontextmanager
    async def people(self, count: int) -> AsyncIterator[None]:
        """Inside, this many tasks make traffic; at the end each completes what it does."""
        self._going = True
        tasks = [asyncio.create_task(self._person()) for _ in range(count)]
        try:
            yield
        finally:
            self._going = False
            await asyncio.gather(*tasks)

    # -- stocks ------------------------------------------------------------------------------------

    async def stock(self, count: int) -> tuple[list[Proof], list[Answered]]:
        """Nonces that are not redeemed, and answered ceremonies that are not finished: half of
        `count` each, with passkeys of new users.
        """

        async def register() -> Passkey | None:
            for _attempt in range(3):  # a busy machine makes HAProxy take brokers for down
                app, dialect = self.chance.choice(self.apps), self.chance.choice(DIALECTS)
                made, _ = await self.register(app, self.new_user(), dialect)
                if made is not None:
                    return made
                await asyncio.sleep(1.0)
            return None

        async def sign_in(passkey: Passkey) -> Proof | None:
            return (await self.sign_in(passkey, self.chance.choice((FLEX, HANKO, PASSLOCK)))).proof

        async def begin(passkey: Passkey) -> Answered | None:
            dialect = self.chance.choice(DIALECTS)
            begun = await self.caller.start(passkey.app, passkey.user, dialect, "authenticate")
            return begun and (begun, passkey.device.authenticate(begun.options, ORIGIN))

        nonces: list[Proof] = []
        ceremonies: list[Answered] = []
        for _attempt in range(5):
            made = [passkey for passkey in await at_once([register] * count) if passkey]
            half = len(made) // 2
            proofs = await at_once([partial(sign_in, passkey) for passkey in made[:half]])
            answered = await at_once([partial(begin, passkey) for passkey in made[half:]])
            nonces += [proof for proof in proofs if proof]
            ceremonies += [answer for answer in answered if answer]
            if len(nonces) + len(ceremonies) > 0.5 * count:
                return nonces, ceremonies
            await asyncio.sleep(2.0)  # until a busy machine has time
        raise AssertionError("nothing is wrong, and most calls fail")

    async def race(
        self,
        proofs: Sequence[Proof],
        ceremonies: Sequence[Answered],
        seconds: float,
        vias: Sequence[Door | None] = (None,),
    ) -> None:
        """Redeem each nonce and finish each ceremony twice, at chosen moments of these seconds.
        `vias`: the brokers that get the calls, HAProxy without any.
        """

        calls: list[Callable[[], Awaitable[object]]] = []
        for number in range(2):
            via = vias[number % len(vias)]
            calls += [partial(self.caller.redeem, proof, via=via) for proof in proofs]
            calls += [partial(self.caller.finish, *answered, via=via) for answered in ceremonies]

        async def later(verb: Callable[[], Awaitable[object]]) -> None:
            await asyncio.sleep(self.chance.random() * seconds)
            await verb()

        await asyncio.gather(*map(later, calls))


async def at_once(verbs: Sequence[Callable[[], Awaitable[T]]]) -> list[T]:
    """Run these, a few at the same time."""
    room = asyncio.Semaphore(_AT_ONCE)

    async def one(verb: Callable[[], Awaitable[T]]) -> T:
        async with room:
            return await verb()

    return list(await asyncio.gather(*map(one, verbs)))


@contextlib.asynccontextmanager
async def traffic_on(
    deployment: Deployment, recorder: Recorder, seed: int
) -> AsyncIterator[Traffic]:
    """Traffic with apps of its own."""
    connector = aiohttp.TCPConnector(limit=0, ssl=deployment.balancer.trust)
    timeout = aiohttp.ClientTimeout(total=TIMEOUT)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        caller = Caller(deployment.door, recorder, session)
        made = Traffic(deployment, recorder, random.Random(seed), caller)
        await made.make_apps()
        yield made

"""Group commit (`broker.durable.group_commit`) with statements that a test holds and answers: who
goes with whom, and who is told what.

What the two real statements make of it is asked in tests/stores/test_sign_ins.py.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import asyncpg
import pytest

from broker.durable.group_commit import (
    _LANES,
    _MOST,
    NEEDS_OWN_STATEMENT,
    GroupCommit,
    OwnStatement,
)
from broker.errors import Unavailable
from broker.telemetry import CONTEXT, Context, Metrics, context
from tests.support.servers import eventually

LONG = 60.0  # seconds, a limit that no test waits for


@dataclass
class Statement:
    """One statement under way."""

    asked: list[str]
    alone: bool
    of: Context
    answers: asyncio.Future[Sequence[str | OwnStatement]]

    def done(self, *answers: str | OwnStatement) -> None:
        """Answer it; by default each caller gets what they asked, with an exclamation mark."""
        self.answers.set_result(answers or [f"{asked}!" for asked in self.asked])

    def fail(self, fault: Exception) -> None:
        self.answers.set_exception(fault)


@dataclass
class Scene:
    """`statements` in the order of their beginnings. The row that is asked about is what stands
    before a slash.
    """

    statements: list[Statement] = field(default_factory=list)
    metrics: Metrics = field(default_factory=Metrics)

    def __post_init__(self) -> None:
        self.commit = GroupCommit(
            "test",
            self._work,
            timeout=LONG,
            metrics=self.metrics,
            key=lambda asked: asked.partition("/")[0],
        )

    async def _work(self, asked: Sequence[str], alone: bool) -> Sequence[str | OwnStatement]:
        answers: asyncio.Future[Sequence[str | OwnStatement]] = (
            asyncio.get_running_loop().create_future()
        )
        self.statements.append(Statement(list(asked), alone, context(), answers))
        return await answers

    def ask(self, asked: str, limit: float = LONG) -> asyncio.Task[str]:
        """A caller, whose request may take so long."""

        async def caller() -> str:
            CONTEXT.set(Context("", "browser", deadline=time.monotonic() + limit))
            return await self.commit.submit(asked)

        return asyncio.create_task(caller())

    def keep_waiting(self) -> None:
        """Let a statement under way hold back the next for as long as it takes."""
        self.commit._policy._patience = LONG

    async def began(self, number: int) -> Statement:
        """The statement of this number, counted from 1, as soon as it is under way."""
        await eventually(lambda: len(self.statements) >= number, f"{number} statements began")
        return self.statements[number - 1]

    @property
    def failures(self) -> float:
        return sum(number for (number,) in self.metrics.store_failures.values.values())


@pytest.fixture
def scene() -> Scene:
    return Scene()


async def turns(number: int = 5) -> None:
    """A few turns of the loop, in which what is due would begin."""
    for _ in range(number):
        await asyncio.sleep(0)


# -- who goes with whom ----------------------------------------------------------------------------


async def test_those_of_one_turn_go_together(scene: Scene) -> None:
    callers = [scene.ask(asked) for asked in "abcde"]
    statement = await scene.began(1)
    assert (statement.asked, statement.alone) == (list("abcde"), False)
    assert not any(caller.done() for caller in callers)
    statement.done()
    assert await asyncio.gather(*callers) == ["a!", "b!", "c!", "d!", "e!"]
    assert len(scene.statements) == 1


async def test_who_comes_meanwhile_gathers_for_the_next(scene: Scene) -> None:
    scene.keep_waiting()
    first = scene.ask("a")
    one = await scene.began(1)
    later = [scene.ask(asked) for asked in "bcd"]
    await turns(1)
    one.done()
    two = await scene.began(2)
    assert two.asked == list("bcd")
    assert await first == "a!"
    two.done()
    assert await asyncio.gather(*later) == ["b!", "c!", "d!"]


async def test_who_comes_after_a_crowd_waits_for_no_clock(scene: Scene) -> None:
    """The first statement ends while others gather, and takes them along; whoever comes then meets
    nothing under way.
    """
    first = scene.ask("a")
    one = await scene.began(1)
    crowd = [scene.ask(asked) for asked in "bcd"]
    one.done()
    (await scene.began(2)).done()
    assert await asyncio.gather(first, *crowd) == ["a!", "b!", "c!", "d!"]
    await turns()
    last = scene.ask("e")
    await scene.began(3)
    assert [s.asked for s in scene.statements] == [["a"], ["b", "c", "d"], ["e"]]
    scene.statements[-1].done()
    assert await last == "e!"


async def test_two_about_one_row_never_share_a_statement(scene: Scene) -> None:
    callers = [scene.ask(asked) for asked in ("a/1", "b/1", "a/2", "a/3", "b/2")]
    for expected in [["a/1", "b/1"], ["a/2", "b/2"], ["a/3"]]:
        statement = await scene.began(len([s for s in scene.statements if s.answers.done()]) + 1)
        assert statement.asked == expected
        statement.done()
        await turns()
    assert await asyncio.gather(*callers) == ["a/1!", "b/1!", "a/2!", "a/3!", "b/2!"]


async def test_a_statement_has_64_callers_at_most(scene: Scene) -> None:
    """Those who are left don't wait for its end: it may never come. Nor does the second about one
    row.
    """
    asked = [f"{number}" for number in range(2 * _MOST + 1)] + ["0/again"]
    callers = [scene.ask(one) for one in asked]
    last = await scene.began(3)
    assert [len(s.asked) for s in scene.statements] == [_MOST, _MOST, 2]
    assert last.asked == asked[-2:]
    assert not any(s.answers.done() for s in scene.statements), "all three are under way"
    for statement in scene.statements:
        statement.done()
    assert await asyncio.gather(*callers) == [f"{one}!" for one in asked]


async def test_a_statement_that_takes_long_does_not_hold_up_the_next(scene: Scene) -> None:
    """A few are under way at once, no more; then the end of any of them lets the next begin."""
    callers = []
    for number in range(1, _LANES + 1):
        callers.append(scene.ask(str(number)))
        assert (await scene.began(number)).asked == [str(number)]
    late = [scene.ask("late"), scene.ask("later")]
    await turns(1)
    assert len(scene.commit._running) == _LANES
    scene.statements[1].done()
    last = await scene.began(_LANES + 1)
    assert last.asked == ["late", "later"]
    assert [caller.done() for caller in callers] == [False, True, False, False]
    for statement in scene.statements:
        if not statement.answers.done():
            statement.done()
    assert await asyncio.gather(*callers, *late) == ["1!", "2!", "3!", "4!", "late!", "later!"]
    assert scene.commit._running == set()


# -- who gives up ----------------------------------------------------------------------------------


async def test_who_gave_up_before_is_left_out(scene: Scene) -> None:
    scene.keep_waiting()
    first = scene.ask("a")
    one = await scene.began(1)
    gone, late, there = scene.ask("gone"), scene.ask("late", 0.0), scene.ask("there")
    await turns(1)
    gone.cancel()
    with pytest.raises(Unavailable):
        await late
    one.done()
    two = await scene.began(2)
    assert two.asked == ["there"]
    two.done()
    assert (await first, await there) == ("a!", "there!")
    assert gone.cancelled()
    assert (len(scene.statements), scene.failures) == (2, 1)


async def test_nothing_is_asked_when_everybody_gave_up(scene: Scene) -> None:
    caller = scene.ask("a")
    await turns(1)
    caller.cancel()
    await turns()
    assert scene.statements == []
    again = scene.ask("b")
    (await scene.began(1)).done()
    assert await again == "b!"


async def test_each_waits_within_their_own_limit(scene: Scene) -> None:
    """Who gives up while the statement is under way is told that nobody knows; the others are
    answered; the late answer goes nowhere.
    """
    hurried, cancelled, patient = scene.ask("a", 0.01), scene.ask("b"), scene.ask("c")
    statement = await scene.began(1)
    assert statement.asked == ["a", "b", "c"]
    with pytest.raises(Unavailable) as refusal:
        await hurried
    assert refusal.value.reason == "postgres"
    cancelled.cancel()
    await turns()
    assert cancelled.cancelled()
    assert not patient.done()
    statement.done()
    assert await patient == "c!"
    assert scene.failures == 1


async def test_who_gives_up_gets_no_statement_of_their_own(scene: Scene) -> None:
    gone, there = scene.ask("gone"), scene.ask("there")
    statement = await scene.began(1)
    gone.cancel()
    await turns()
    statement.done(NEEDS_OWN_STATEMENT, NEEDS_OWN_STATEMENT)
    alone = await scene.began(2)
    assert (alone.asked, alone.alone) == (["there"], True)
    alone.done()
    assert await there == "there!"
    assert len(scene.statements) == 2


# -- who is alone ----------------------------------------------------------------------------------


async def test_who_is_alone_holds_up_nobody(scene: Scene) -> None:
    held, quick = scene.ask("held"), scene.ask("quick")
    (await scene.began(1)).done(NEEDS_OWN_STATEMENT, "quick!")
    assert await quick == "quick!"
    alone = await scene.began(2)
    assert (alone.asked, alone.alone) == (["held"], True)
    for number in range(3, 3 + 2 * _LANES):
        other = scene.ask(str(number))
        statement = await scene.began(number)
        assert (statement.asked, statement.alone) == ([str(number)], False)
        statement.done()
        assert await other == f"{number}!"
    assert not held.done()
    alone.done("held at last")
    assert await held == "held at last"
    assert scene.commit._own == set()


async def test_a_fault_of_one_who_is_alone_is_theirs(scene: Scene) -> None:
    fault = asyncpg.UniqueViolationError("mine")
    held, other = scene.ask("a"), scene.ask("b")
    (await scene.began(1)).done(NEEDS_OWN_STATEMENT, NEEDS_OWN_STATEMENT)
    await scene.began(3)
    for statement in scene.statements[1:]:
        if statement.asked == ["a"]:
            statement.fail(fault)
        else:
            statement.done()
    with pytest.raises(asyncpg.UniqueViolationError):
        await held
    assert await other == "b!"
    assert len(scene.statements) == 3, "nothing was sent a third time"


# -- faults ----------------------------------------------------------------------------------------


def unavailable(cause: Exception) -> Unavailable:
    """As `Postgres.run` raises it."""
    fault = Unavailable(reason="postgres")
    fault.__cause__ = cause
    return fault


@pytest.mark.parametrize(
    "fault",
    [
        asyncpg.UniqueViolationError("x"),
        asyncpg.UntranslatableCharacterError("x"),  # what a NUL in JSON is to the server
        asyncpg.DataError("x"),  # what asyncpg raises for a value that it can't encode, too
        unavailable(asyncpg.DeadlockDetectedError("x")),
        unavailable(asyncpg.SerializationError("x")),
    ],
    ids=lambda fault: type(fault.__cause__ or fault).__name__,
)
async def test_what_was_refused_whole_is_done_for_each_alone(
    scene: Scene, fault: Exception
) -> None:
    """Only who caused it is refused."""
    callers = {asked: scene.ask(asked) for asked in ("good", "bad", "fine")}
    (await scene.began(1)).fail(fault)
    await scene.began(4)
    assert [(s.asked, s.alone) for s in scene.statements[1:]] == [
        ([asked], True) for asked in callers
    ]
    for statement in scene.statements[1:]:
        if statement.asked == ["bad"]:
            statement.fail(fault)
        else:
            statement.done()
    assert await callers["good"] == "good!"
    assert await callers["fine"] == "fine!"
    with pytest.raises(type(fault)):
        await callers["bad"]
    await turns()
    assert len(scene.statements) == 4


@pytest.mark.parametrize(
    "fault",
    [
        unavailable(asyncpg.ConnectionDoesNotExistError("x")),
        unavailable(ConnectionResetError()),
        unavailable(TimeoutError()),
        unavailable(asyncpg.InterfaceError("x")),
        unavailable(asyncpg.QueryCanceledError("x")),
        unavailable(asyncpg.AdminShutdownError("x")),
    ],
    ids=lambda fault: type(fault.__cause__).__name__,
)
async def test_what_may_have_been_done_is_not_sent_again(scene: Scene, fault: Exception) -> None:
    """Each caller is told so, by an exception of their own: one that is raised grows a trace."""
    callers = [scene.ask(asked) for asked in "abc"]
    (await scene.began(1)).fail(fault)
    told = await asyncio.gather(*callers, return_exceptions=True)
    assert [(type(one), getattr(one, "reason", "")) for one in told] == [
        (Unavailable, "postgres")
    ] * 3
    assert len({id(one) for one in told}) == 3
    assert all(isinstance(one, Unavailable) and one.__cause__ is fault for one in told)
    await turns()
    assert len(scene.statements) == 1
    again = scene.ask("d")
    (await scene.began(2)).done()
    assert await again == "d!"


async def test_a_defect_reaches_each_caller(scene: Scene) -> None:
    callers = [scene.ask(asked) for asked in "ab"]
    (await scene.began(1)).fail(KeyError("of ours"))
    for caller in callers:
        with pytest.raises(KeyError):
            await caller
    assert len(scene.statements) == 1


async def test_faults_that_nobody_waits_for_are_not_told(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    callers = [scene.ask(asked) for asked in "ab"]
    statement = await scene.began(1)
    callers[0].cancel()
    await turns()
    statement.fail(unavailable(TimeoutError()))
    with pytest.raises(Unavailable):
        await callers[1]
    del callers, statement
    scene.statements.clear()
    gc.collect()
    assert caplog.records == []


# -- whose it is -----------------------------------------------------------------------------------


async def test_a_statement_is_in_nobodys_context(scene: Scene) -> None:
    """However it begins: by a caller, by the end of another, by patience, alone. Its limit is the
    store's, not the first caller's.
    """
    CONTEXT.set(Context("first-caller", "key:theirs", deadline=time.monotonic() + 5))
    callers = [scene.ask("a")]
    await scene.began(1)
    callers.append(scene.ask("by patience"))
    await scene.began(2)
    for _ in range(_LANES - 2):
        callers.append(scene.ask(f"{len(callers)}"))
        await scene.began(len(callers))
    callers.append(scene.ask("by an end"))
    await turns(1)
    scene.statements[0].done(NEEDS_OWN_STATEMENT)
    await scene.began(_LANES + 2)
    assert scene.statements[-1].alone or scene.statements[-2].alone
    assert {(s.of.actor, s.of.request_id, s.of.deadline) for s in scene.statements} == {
        ("broker", "", None)
    }
    for statement in scene.statements[1:]:
        statement.done()
    assert await asyncio.gather(*callers) == ["a!", "by patience!", "2!", "3!", "by an end!"]


# -- the end ---------------------------------------------------------------------------------------


def test_the_loop_ends_while_callers_wait(caplog: pytest.LogCaptureFixture) -> None:
    """Those in a statement, those in one of their own, and those who gather: all end with it, and
    nothing is said of it.
    """

    async def begin() -> list[asyncio.Task[str]]:
        scene = Scene()
        callers = [scene.ask("alone"), scene.ask("with")]
        (await scene.began(1)).done(NEEDS_OWN_STATEMENT, "with!")
        await scene.began(2)
        callers += [scene.ask("under way")]
        await scene.began(3)
        callers += [scene.ask("gathers")]
        await turns(2)
        return callers

    callers = asyncio.run(begin())
    assert [caller.cancelled() for caller in callers] == [True, False, True, True]
    gc.collect()
    assert caplog.records == []

"""Who waits for whom, and for how many turns of the loop (`broker.gathering`)."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import pytest

from broker.gathering import LONE, TURNS, Gathering
from broker.telemetry import CONTEXT, Context


@dataclass
class Scene:
    """A queue, and what went out of it: when, counted in turns of the loop from the first who came,
    and who.
    """

    queue: list[str] = field(default_factory=list)
    under_way: list[str] = field(default_factory=list)
    went: list[tuple[int, list[str]]] = field(default_factory=list)
    turn: int = 0

    def __post_init__(self) -> None:
        self.gathering = Gathering(self.queue, self.under_way, self._go)

    def _go(self) -> None:
        self.went.append((self.turn, self.queue.copy()))
        self.queue.clear()

    def come(self, *names: str) -> None:
        for name in names:
            self.queue.append(name)
            self.gathering.come()

    async def play(self, *turns: str, more: int = TURNS + 2) -> list[tuple[int, list[str]]]:
        """Let those whose names are in `turns` come, a text a turn, then nobody for `more` turns;
        what went out since.
        """
        self.went.clear()
        for self.turn, names in enumerate((*turns, *[""] * more)):
            self.come(*names)
            await asyncio.sleep(0)
        return self.went.copy()


@pytest.fixture
def scene() -> Scene:
    return Scene()


async def test_who_is_alone_waits_for_nobody(scene: Scene) -> None:
    assert await scene.play("a") == [(0, ["a"])]
    assert await scene.play("b") == [(0, ["b"])]


async def _is_alone_for_long(scene: Scene) -> None:
    for _ in range(LONE):
        assert await scene.play("a") == [(0, ["a"])]


async def test_who_is_alone_for_long_does_not_wait_for_a_turn_either(scene: Scene) -> None:
    for _ in range(LONE):
        scene.come("a")
        assert scene.queue == ["a"], "it may be the first of many"
        await scene.play()
    scene.come("a")
    assert scene.queue == []
    assert await scene.play("bc") == [(0, ["b"]), (0, ["c"])], "nobody knew of c"


async def test_who_comes_while_another_is_under_way_ends_that(scene: Scene) -> None:
    """Else two callers, each of whom goes at once, would never share a message."""
    await _is_alone_for_long(scene)
    scene.under_way.append("a")
    scene.come("b")
    assert scene.queue == ["b"], "it waits for a turn"
    assert await scene.play("c") == [(1, ["b", "c"])]
    scene.under_way.clear()
    assert await scene.play("bc") == [(1, ["b", "c"])], "and so do the next two"


async def test_a_crowd_ends_that_as_well(scene: Scene) -> None:
    for _ in range(LONE - 1):
        await scene.play("a")
    await scene.play("ab")
    await scene.play("a")
    scene.come("a")
    assert scene.queue == ["a"]
    await scene.play()


async def test_those_of_one_turn_wait_one_more_for_others(scene: Scene) -> None:
    assert await scene.play("abc") == [(1, ["a", "b", "c"])]


async def test_as_long_as_each_turn_brings_somebody_nobody_goes(scene: Scene) -> None:
    assert await scene.play("ab", "c", "de", "f") == [(4, list("abcdef"))]


async def test_nobody_waits_for_more_than_so_many_turns(scene: Scene) -> None:
    (first, names), *_ = await scene.play("ab", *["x"] * (TURNS + 5))
    assert first == TURNS - 1
    assert len(names) == TURNS + 1


async def test_a_few_wait_for_as_many_as_went_last_time(scene: Scene) -> None:
    await scene.play("abcd")
    assert await scene.play("a", "", "b", "", "cd") == [(5, list("abcd"))]


async def test_a_few_wait_on_as_long_as_somebody_comes_now_and_then(scene: Scene) -> None:
    pause = [""] * (TURNS - 2)
    await scene.play("abcd")
    assert await scene.play("a", *pause, "b", *pause, "cd") == [(2 * TURNS - 1, list("abcd"))]
    assert await scene.play("a", *pause, "b", *pause, "", "", "cd") == [
        (2 * TURNS - 1, list("ab")),
        (2 * TURNS + 1, list("cd")),
    ]


async def test_a_crowd_that_has_gone_home_is_waited_for_once(scene: Scene) -> None:
    await scene.play("abcd")
    assert await scene.play("a") == [(TURNS - 1, ["a"])]
    assert await scene.play("b") == [(0, ["b"])]


async def test_a_queue_that_somebody_else_emptied_does_not_go(scene: Scene) -> None:
    await scene.play("abcd")
    scene.come("a")
    scene.queue.clear()
    assert await scene.play("") == []
    assert await scene.play("b", more=TURNS) == [(TURNS - 1, ["b"])], (
        "and says nothing of the next crowd"
    )


async def test_what_a_go_leaves_in_the_queue_is_its_own_matter() -> None:
    """It knows what it waits for. Who comes later brings it along."""
    queue: list[str] = []
    went: list[list[str]] = []
    gathering = Gathering(queue, (), lambda: went.append(queue.copy()))
    for name in "ab":
        queue.append(name)
        gathering.come()
        for _ in range(TURNS + 2):
            await asyncio.sleep(0)
    assert went == [["a"], ["a", "b"]]


async def test_it_goes_out_in_nobodys_context() -> None:
    """The deadline of whoever came first is not the others'. Nor does it where nobody waits."""
    seen: list[object] = []
    gathering = Gathering(["a"], (), lambda: seen.append(CONTEXT.get(None)))
    CONTEXT.set(Context(request_id="first", actor="browser", deadline=0.0))
    for times in range(1, LONE + 1):
        gathering.come()
        await asyncio.sleep(0)
        assert seen == [None] * times
    gathering.come()
    assert seen == [None] * (LONE + 1), "at once"

"""When a queue of commands is flushed (`broker.batching`)."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import pytest

from broker import batching
from broker.batching import FlushPolicy
from broker.telemetry import CONTEXT, Context
from tests.support.servers import eventually

PATIENCE = 0.02  # seconds


@dataclass
class Scene:
    """A queue, what is under way, and what was flushed."""

    patience: float = 0.0
    queue: list[str] = field(default_factory=list)
    under_way: list[str] = field(default_factory=list)
    flushed: list[list[str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.policy = FlushPolicy(self.queue, self.under_way, self._flush, patience=self.patience)

    def _flush(self) -> None:
        self.flushed.append(self.queue.copy())
        self.under_way.extend(self.queue)
        self.queue.clear()

    def add(self, *names: str) -> None:
        for name in names:
            self.queue.append(name)
            self.policy.schedule()

    def end(self) -> None:
        """Everything under way is answered."""
        self.under_way.clear()
        self.policy.ended()


async def iterations(number: int = 2) -> None:
    """So many iterations of the event loop."""
    for _ in range(number):
        await asyncio.sleep(0)


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """A queue shorter than the last batch waits for as long as it takes."""
    monkeypatch.setattr(batching, "QUIET", 60.0)


@pytest.fixture
def patient() -> Scene:
    """A scene whose batches wait for the one under way."""
    return Scene(patience=60.0)


async def test_commands_of_one_iteration_are_flushed_together_in_the_next() -> None:
    scene = Scene()
    scene.add("a", "b")
    assert scene.flushed == []
    await iterations(2)
    assert scene.flushed == [["a", "b"]]
    await iterations()
    assert scene.flushed == [["a", "b"]], "nothing is flushed without a command"


@pytest.mark.usefixtures("quiet")
async def test_a_queue_as_long_as_the_last_batch_waits_while_commands_come() -> None:
    scene = Scene()
    for names in ("ab", "c", "d"):
        scene.add(*names)
        await iterations(1)
        assert scene.flushed == []
    await iterations(1)
    assert scene.flushed == [["a", "b", "c", "d"]]


@pytest.mark.usefixtures("quiet")
async def test_a_shorter_queue_waits_until_it_is_as_long_as_the_last_batch() -> None:
    scene = Scene()
    scene.add(*"abc")
    await iterations(2)
    scene.add("d")
    await iterations(20)
    scene.add("e")
    await iterations(20)
    assert scene.flushed == [["a", "b", "c"]]
    scene.add("f")
    await iterations(2)
    assert scene.flushed == [["a", "b", "c"], ["d", "e", "f"]]


async def test_a_shorter_queue_waits_no_longer_than_quiet() -> None:
    scene = Scene()
    scene.add(*"abc")
    await iterations(2)
    scene.add("d")
    await eventually(lambda: len(scene.flushed) == 2, "a flush without a further command")
    assert scene.flushed[1] == ["d"]
    scene.add("e")
    await iterations(1)
    assert scene.flushed[2] == ["e"], "a lone caller waits for one iteration"


async def test_a_queue_that_was_emptied_says_nothing_of_the_next_batch() -> None:
    scene = Scene()
    scene.add(*"abc")
    await iterations(2)
    scene.add("d")
    scene.queue.clear()
    await eventually(lambda: len(scene.flushed) == 2, "a flush of what is left")
    assert scene.flushed[1] == []
    scene.add("e")
    await iterations(5)
    assert len(scene.flushed) == 2, "the last batch had three"


async def test_a_queue_that_grows_is_not_flushed_by_its_timer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(batching, "QUIET", 0.05)
    monkeypatch.setattr(batching, "LONGEST", 60.0)
    scene = Scene()
    scene.add(*"abcd")
    await iterations(2)
    for name in "ef":
        scene.add(name)
        await asyncio.sleep(0.03)
    assert len(scene.flushed) == 1, "within the first 0.05 s a second command has come"
    await eventually(lambda: len(scene.flushed) == 2, "a flush without a further command")
    assert scene.flushed[1] == ["e", "f"]


async def test_a_steady_flow_does_not_keep_a_queue_as_long_as_a_burst(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(batching, "QUIET", 0.0)
    monkeypatch.setattr(batching, "LONGEST", 0.0)
    scene = Scene()
    scene.add(*"a" * 1000)
    await iterations(2)
    while len(scene.flushed) == 1:
        scene.add("b")
        await iterations(1)
    assert len(scene.flushed[1]) < 10


async def test_without_patience_a_batch_under_way_delays_nothing() -> None:
    scene = Scene()
    for name in "abc":
        scene.add(name)
        await iterations(1)
    assert scene.flushed == [["a"], ["b"], ["c"]]
    assert scene.under_way == ["a", "b", "c"]


async def test_commands_wait_for_the_end_of_the_batch_under_way(patient: Scene) -> None:
    patient.add("a")
    await iterations()
    patient.add("b")
    await iterations(10)
    patient.add("c")
    assert patient.flushed == [["a"]]
    patient.end()
    await iterations(1)
    assert patient.flushed == [["a"], ["b", "c"]]


async def test_an_end_without_a_queue_flushes_nothing(patient: Scene) -> None:
    patient.add("a")
    await iterations()
    patient.end()
    await iterations()
    assert patient.flushed == [["a"]]
    patient.add("b")
    await iterations(1)
    assert patient.flushed == [["a"], ["b"]], "a lone caller waits for no clock"


async def test_a_batch_that_hangs_delays_the_next_one_alone() -> None:
    """Beside it others begin and end; each end lets the next begin."""
    scene = Scene(patience=60.0)
    scene.add("hangs")
    await iterations()
    scene.policy.ended()  # of another, that had begun before
    for name in "abc":
        scene.add(name)
        await iterations()
        assert scene.flushed[-1] == [name]
        scene.add("meanwhile")
        await iterations()
        assert scene.flushed[-1] == [name], "it waits for the latest batch"
        scene.policy.ended()
        await iterations(1)
        assert scene.flushed[-1] == ["meanwhile"]
        scene.policy.ended()
    assert scene.under_way[0] == "hangs"


async def test_no_command_waits_longer_than_the_patience() -> None:
    scene = Scene(PATIENCE)
    loop = asyncio.get_running_loop()
    scene.add("a")
    await iterations()
    began = loop.time()
    scene.add("b")
    await eventually(lambda: len(scene.flushed) == 2, "the second batch")
    assert loop.time() - began >= PATIENCE / 2
    assert scene.under_way == ["a", "b"], "nothing has ended"


async def test_what_a_flush_leaves_in_the_queue_is_flushed_again() -> None:
    """A flush may leave what has to go with a later batch."""
    queue, under_way = ["a", "b", "c"], list[str]()
    flushed: list[str] = []

    def flush() -> None:
        flushed.append(queue[0])
        under_way.append(queue.pop(0))

    policy = FlushPolicy(queue, under_way, flush, patience=PATIENCE)
    policy.schedule()
    await eventually(lambda: not queue, "all three")
    assert flushed == ["a", "b", "c"]


async def test_a_flush_runs_in_an_empty_context() -> None:
    """The deadline of the first caller is not the others'."""
    seen: list[object] = []
    queue, under_way = ["a"], ["z"]

    def flush() -> None:
        seen.append(CONTEXT.get(None))
        queue.clear()

    CONTEXT.set(Context(request_id="first", actor="browser", deadline=0.0))
    policy = FlushPolicy(queue, under_way, flush, patience=PATIENCE)
    for _ in range(2):  # at the next iteration, then by the clock
        queue[:] = ["a"]
        policy.schedule()
        await eventually(lambda: not queue, "a flush")
    queue[:] = ["a"]
    policy.schedule()
    policy.ended()  # by the end of a batch
    await eventually(lambda: not queue, "a flush")
    assert seen == [None] * 3

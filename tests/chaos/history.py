"""Histories: every call of the traffic and every fault, as JSON lines in Jepsen's form.

    {"index": 4, "process": 7, "time": 1204, "type": "invoke", "f": "redeem", "value": {…}}
    {"index": 9, "process": 7, "time": 3310, "type": "ok",     "f": "redeem", "value": {…}}

`time` is in microseconds since the run began. A call ends as

    ok     the broker said that it was done
    fail   the broker refused: nothing was done for this caller
    info   unknown: no answer, or an answer that leaves the outcome open (502, 503, 504, 408)

A process makes one call at a time. Faults are calls of process -1 ("nemesis"), of type `info`, and
so are the states of the one-time store's servers, `f` "terms" (`tests.chaos.terms`). The last line,
`f` "final", holds the rows of Postgres at the end. One-time values stand in a history as digests
(`mark`).
"""

from __future__ import annotations

import hashlib
import itertools
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal, Self

import orjson

Type = Literal["ok", "fail", "info"]
NEMESIS = -1


def mark(secret: str | bytes) -> str:
    """The name of a one-time value in a history."""
    raw = secret if isinstance(secret, bytes) else secret.encode()
    return hashlib.sha256(raw).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Call:
    """A call: what it asked (`value`), when, and how it ended (`result`). Times in seconds."""

    process: int
    f: str
    value: dict[str, Any]
    invoked: float
    completed: float
    type: Type
    result: dict[str, Any]

    @property
    def ok(self) -> bool:
        return self.type == "ok"

    def get(self, name: str) -> Any:
        """A member of the result, else of what was asked."""
        return self.result.get(name, self.value.get(name))


@dataclass(frozen=True, slots=True)
class History:
    """The calls in the order of their completion, the faults, the states of the one-time store's
    servers, and the final rows of Postgres.
    """

    calls: tuple[Call, ...]
    faults: tuple[Call, ...]
    terms: tuple[Call, ...]
    final: dict[str, list[dict[str, Any]]]
    _by_name: dict[str, list[Call]] = field(init=False, default_factory=lambda: defaultdict(list))

    def __post_init__(self) -> None:
        for call in self.calls:
            self._by_name[call.f].append(call)

    def of(self, *names: str) -> Iterator[Call]:
        """The calls of these kinds, one kind after another."""
        return itertools.chain.from_iterable(self._by_name[name] for name in names)


def load(lines: Iterable[str | bytes]) -> History:
    """The history of a file's lines. A call without an end, as of a run that was killed, is
    `info`.
    """
    open_: dict[int, dict[str, Any]] = {}
    calls: list[Call] = []
    faults: list[Call] = []
    terms: list[Call] = []
    final: dict[str, list[dict[str, Any]]] = {}
    at = 0.0
    for line in lines:
        entry = orjson.loads(line)
        at = entry["time"] / 1e6
        f, value, process = entry["f"], entry["value"], entry["process"]
        if f == "final":
            final = value
        elif process == NEMESIS:
            notes = terms if f == "terms" else faults
            notes.append(Call(process, f, value, at, at, "info", {}))
        elif entry["type"] == "invoke":
            open_[process] = entry
        else:
            asked = open_.pop(process)
            began = asked["time"] / 1e6
            calls.append(Call(process, f, asked["value"], began, at, entry["type"], value))
    for process, asked in open_.items():
        began = asked["time"] / 1e6
        calls.append(Call(process, asked["f"], asked["value"], began, at, "info", {}))
    return History(tuple(calls), tuple(faults), tuple(terms), final)


def read(path: Path) -> History:
    with path.open("rb") as file:
        return load(file)


@dataclass(slots=True)
class Recorder:
    """Writes a history."""

    path: Path
    _began: float = field(default_factory=time.monotonic)
    _index: Iterator[int] = field(default_factory=itertools.count)
    _file: BinaryIO = field(init=False)

    def __post_init__(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("wb")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        fault: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._file.close()

    def write(self, process: int, kind: str, f: str, value: dict[str, Any]) -> None:
        """Append one entry."""
        entry = {
            "index": next(self._index),
            "process": process,
            "time": int((time.monotonic() - self._began) * 1e6),
            "type": kind,
            "f": f,
            "value": value,
        }
        self._file.write(orjson.dumps(entry) + b"\n")

    def terms(self, state: dict[str, Any], *, earlier: float) -> None:
        """Note the state of the store's servers, which has changed (`tests.chaos.terms`)."""
        self.write(NEMESIS, "info", "terms", {**state, "earlier": round(earlier, 6)})

    def fault(self, name: str, **value: Any) -> None:
        """Note a fault, or its end. `ends_values`: one-time values from before may be dead now,
        though no term has changed. `loses_events`: an event may not be written.
        """
        self.write(NEMESIS, "info", name, value)

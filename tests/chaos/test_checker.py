"""The checker is tested by doctored histories: each breaks one promise, and one breaks none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest

from tests.chaos.checker import judge
from tests.chaos.history import History, load
from tests.chaos.mutants import MUTANTS, copied
from tests.chaos.report import summary, timeline

APP, USER = "app", "ann"
SIGN_IN = {
    "app": APP,
    "user": USER,
    "purpose": "authenticate",
    "dialect": "flex",
    "opener": "flex",
    "credential": "cred",
    "right": True,
}


class Doctor:
    """Writes a history call by call; each call takes 2 ms unless `until` is given."""

    def __init__(self) -> None:
        self.lines: list[tuple[int, bytes]] = []
        self.now, self.process = 0, 0

    def call(
        self,
        f: str,
        value: dict[str, Any],
        result: dict[str, Any] | None = None,
        *,
        type: str = "ok",
        at: int | None = None,
        until: int | None = None,
    ) -> None:
        """Times in ms."""
        begin = self.now + 1 if at is None else at
        end = begin + 2 if until is None else until
        self.now, self.process = max(self.now, end), self.process + 1
        self._write(begin, "invoke", f, value)
        self._write(end, type, f, result or {})

    def _write(self, at: int, kind: str, f: str, value: dict[str, Any]) -> None:
        entry = {"process": self.process, "time": at * 1000, "type": kind, "f": f, "value": value}
        self.lines.append((at, orjson.dumps(entry)))

    def fault(self, name: str, **value: Any) -> None:
        entry = {"process": -1, "time": self.now * 1000, "type": "info", "f": name, "value": value}
        self.lines.append((self.now, orjson.dumps(entry)))

    def final(self, **row: Any) -> None:
        credentials = [{"app": APP, "credential": "cred", "counter": 2, **row}]
        entry = {
            "process": -1,
            "time": (self.now + 1) * 1000,
            "type": "info",
            "f": "final",
            "value": {"credentials": credentials, "replays": [{"app": APP, "replays": 1}]},
        }
        self.lines.append((self.now + 1, orjson.dumps(entry)))

    def history(self) -> History:
        return load(line for _, line in sorted(self.lines, key=lambda pair: pair[0]))

    # -- steps -------------------------------------------------------------------------------------

    def register(self) -> None:
        value = {**SIGN_IN, "purpose": "register", "ceremony": "r", "transaction": "tr"}
        self.call("open", {**value}, {"transaction": "tr"})
        self.call("begin", {**value}, {"ceremony": "r"})
        self.call("finish", value, {"nonce": "nr"})

    def sign_in(self, number: int = 1, **changes: Any) -> None:
        """Open, begin, finish."""
        names = {"ceremony": f"c{number}", "transaction": f"t{number}", "counter": number}
        value = {**SIGN_IN, **names, **changes}
        self.call("open", {**SIGN_IN}, {"transaction": f"t{number}"})
        self.call("begin", {**SIGN_IN, "transaction": f"t{number}"}, {"ceremony": f"c{number}"})
        self.call("finish", value, {"nonce": f"n{number}"})

    def redeem(self, number: int = 1, *, type: str = "ok", **result: Any) -> None:
        value = {**SIGN_IN, "nonce": f"n{number}"}
        told = {"user": USER, "credential": "cred"} if type == "ok" else {"status": 401}
        self.call("redeem", value, {**told, **result}, type=type)


def sound(doctor: Doctor) -> None:
    """Registers, signs in twice, redeems, redeems again in vain."""
    doctor.register()
    doctor.sign_in(1)
    doctor.redeem(1)
    doctor.redeem(1, type="fail")
    doctor.sign_in(2)
    doctor.redeem(2)


def nonce_twice(doctor: Doctor) -> None:
    doctor.redeem(2)


def ceremony_twice(doctor: Doctor) -> None:
    doctor.call("finish", {**SIGN_IN, "ceremony": "c2", "counter": 3}, {"nonce": "n3"})


def transaction_twice(doctor: Doctor) -> None:
    value = {**SIGN_IN, "ceremony": "c3", "transaction": "t2", "counter": 3}
    doctor.call("begin", {**SIGN_IN, "transaction": "t2"}, {"ceremony": "c3"})
    doctor.call("finish", value, {"nonce": "n3"})


def tried_again(doctor: Doctor) -> None:
    doctor.call("begin", {**SIGN_IN}, {"ceremony": "c3"})
    value = {**SIGN_IN, "ceremony": "c3", "counter": 3}
    doctor.call("finish", {**value, "right": False}, {"status": 401}, type="fail")
    doctor.call("finish", value, {"nonce": "n3"})


def refused_and_stored(doctor: Doctor) -> None:
    value = {**SIGN_IN, "purpose": "register", "credential": "other", "right": False}
    doctor.call("finish", {**value, "ceremony": "c3"}, {"status": 404}, type="fail")
    doctor.final(credential="other")


def other_door(doctor: Doctor) -> None:
    value = {**SIGN_IN, "ceremony": "c3", "counter": 3, "dialect": "passlock"}
    doctor.call("finish", value, {"nonce": "n3"})


def wrong_answer(doctor: Doctor) -> None:
    value = {**SIGN_IN, "ceremony": "c3", "counter": 3, "right": False}
    doctor.call("finish", value, {"nonce": "n3"})


def registration_lost(doctor: Doctor) -> None:
    doctor.final(credential="other")


def sign_in_lost(doctor: Doctor) -> None:
    doctor.call("final sign-in", {"credential": "cred"}, {"done": False})


def counter_back(doctor: Doctor) -> None:
    value = {**SIGN_IN, "ceremony": "c3", "counter": 1}
    doctor.call("finish", value, {"nonce": "n3"})


def counter_lost(doctor: Doctor) -> None:
    doctor.final(counter=1)


def after_revocation(doctor: Doctor) -> None:
    doctor.call("revoke", {"app": APP, "user": USER, "credential": "cred"})
    value = {**SIGN_IN, "ceremony": "c3", "counter": 3}
    doctor.call("finish", value, {"nonce": "n3"})


def registered_before_revocation(doctor: Doctor) -> None:
    value = {**SIGN_IN, "purpose": "register", "ceremony": "r2", "transaction": "tr2"}
    doctor.call("open", {**value}, {"transaction": "tr2"})
    doctor.call("revoke_all", {"app": APP, "user": USER})
    doctor.call("finish", {**value, "credential": "other"}, {"nonce": "nr2"})


def key_lives(doctor: Doctor) -> None:
    doctor.fault("key revoked", key="k")
    doctor.call("keyed", {"app": APP, "key": "k"}, at=doctor.now + 1100)


def crossed(doctor: Doctor) -> None:
    doctor.sign_in(3)
    doctor.redeem(3, user="bob")


def one_nonce_for_two(doctor: Doctor) -> None:
    value = {**SIGN_IN, "ceremony": "c3", "counter": 3}
    doctor.call("finish", value, {"nonce": "n2"})


def defect(doctor: Doctor) -> None:
    doctor.call("keyed", {"app": APP, "key": "k"}, {"status": 500}, type="fail")


def refused_without_cause(doctor: Doctor) -> None:
    doctor.sign_in(3)
    doctor.redeem(3, type="fail")


def failed_though_up(doctor: Doctor) -> None:
    doctor.fault("broker killed")
    at = doctor.now + 100
    doctor.call("keyed", {"app": APP, "key": "k"}, {"status": 503}, type="info", at=at)


DOCTORED: dict[Callable[[Doctor], None], str] = {
    nonce_twice: "bought once",
    ceremony_twice: "bought once",
    transaction_twice: "bought once",
    tried_again: "refused once",
    refused_and_stored: "refused writes nothing",
    other_door: "own door",
    wrong_answer: "right answers only",
    registration_lost: "registrations stay",
    sign_in_lost: "registrations sign in",
    counter_back: "counters rise",
    counter_lost: "counters rise",
    after_revocation: "revoked is final",
    registered_before_revocation: "revoked is final",
    key_lives: "keys are revoked",
    crossed: "no crossing",
    one_nonce_for_two: "no crossing",
    defect: "no faults",
    refused_without_cause: "refused for a reason",
    failed_though_up: "only those in flight",
}


def test_a_sound_history_breaks_nothing() -> None:
    doctor = Doctor()
    sound(doctor)
    doctor.final()
    assert judge(doctor.history()) == []


@pytest.mark.parametrize("doctored", DOCTORED, ids=lambda doctored: doctored.__name__)
def test_a_doctored_history_breaks_its_rule(
    doctored: Callable[[Doctor], None], tmp_path: Path
) -> None:
    doctor = Doctor()
    sound(doctor)
    doctored(doctor)
    history = doctor.history()
    violations = judge(history)
    assert DOCTORED[doctored] in {violation.rule for violation in violations}
    assert f"x {DOCTORED[doctored]}" in summary(history, violations)
    timeline(history, violations, tmp_path / "page.html")
    assert DOCTORED[doctored] in (tmp_path / "page.html").read_text()


def test_replays_without_an_event_are_found() -> None:
    doctor = Doctor()
    sound(doctor)
    doctor.final()
    history = doctor.history()
    history.final["replays"] = [{"app": "another", "replays": 1}]
    assert [violation.rule for violation in judge(history)] == ["replays are events"]


def test_values_that_a_fault_ended_may_be_refused() -> None:
    """Until all is well again, and not afterwards."""
    for late, rules in ((False, []), (True, ["refused for a reason"])):
        doctor = Doctor()
        sound(doctor)
        doctor.fault("primary killed", ends_values=True)
        doctor.sign_in(3)
        if not late:
            doctor.redeem(3, type="fail")
        doctor.now += 1
        doctor.fault("healed")
        doctor.sign_in(4)
        doctor.redeem(4, type="fail" if late else "ok")
        assert [violation.rule for violation in judge(doctor.history())] == rules


def test_a_call_of_unknown_outcome_buys_nothing_and_explains_a_refusal() -> None:
    doctor = Doctor()
    doctor.sign_in(1)
    doctor.redeem(1, type="info")
    doctor.redeem(1, type="fail")
    assert judge(doctor.history()) == []


@pytest.mark.parametrize("name", MUTANTS)
def test_each_mutant_still_applies(name: str) -> None:
    """Every edit finds its text once, and the copy compiles."""
    with copied(MUTANTS[name]) as tree:
        for edit in MUTANTS[name].edits:
            compile((tree / edit.path).read_text(), edit.path, "exec")

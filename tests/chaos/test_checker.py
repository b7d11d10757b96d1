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

    def terms(self, *terms: str, silent: bool = False, earlier: int = 200, **state: Any) -> None:
        """The state of the servers: primaries with these terms, of which the first may be silent,
        and a replica.
        """
        servers: list[dict[str, Any]] = [{"role": "master", "term": term} for term in terms]
        servers.append({"role": "slave", "term": "other"})
        if silent:
            servers[0]["silent"] = True
        state = {"shards": 1, "servers": servers, "earlier": earlier / 1000, **state}
        self.fault("terms", **state)

    def final(self, **row: Any) -> None:
        credentials = [{"app": APP, "credential": "cred", "counter": 2, **row}]
        entry = {
            "process": -1,
            "time": (self.now + 1) * 1000,
            "type": "info",
            "f": "final",
            "value": {"credentials": credentials, "replays": [{"app": APP, "request": "second"}]},
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

    def redeem(
        self, number: int | str = 1, *, type: str = "ok", repeat: str = "", **result: Any
    ) -> None:
        value = {**SIGN_IN, "nonce": f"n{number}", **({"repeat": repeat} if repeat else {})}
        told = (
            {"user": USER, "credential": "cred"}
            if type == "ok"
            else {"status": 401, "request": "second"}
        )
        self.call("redeem", value, {**told, **result}, type=type)


def sound(doctor: Doctor) -> None:
    """Registers, signs in twice, redeems, redeems again in vain; repeats an open and a
    redemption.
    """
    doctor.call("open", {**SIGN_IN, "repeat": "o"}, {"transaction": "t0"})
    doctor.call("open", {**SIGN_IN, "repeat": "o"}, {"transaction": "t0"})
    doctor.register()
    doctor.sign_in(1)
    doctor.redeem(1)
    doctor.redeem(1, type="fail")
    doctor.sign_in(2)
    doctor.redeem(2)
    doctor.redeem("r", repeat="r")
    doctor.redeem("r", repeat="r")


def nonce_twice(doctor: Doctor) -> None:
    doctor.redeem(2)


def nonce_by_two_keys(doctor: Doctor) -> None:
    doctor.redeem("r", repeat="s")


def nonce_again_without_the_key(doctor: Doctor) -> None:
    doctor.redeem("r")


def repeated_in_vain(doctor: Doctor) -> None:
    doctor.redeem("r", repeat="r", type="fail")


def repeated_with_another_answer(doctor: Doctor) -> None:
    doctor.call("open", {**SIGN_IN, "repeat": "o"}, {"transaction": "t5"})


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


def disabled(doctor: Doctor) -> None:
    doctor.call("disable", {"app": APP, "user": USER})


def begun_before_disabled(doctor: Doctor) -> None:
    doctor.call("begin", {**SIGN_IN}, {"ceremony": "c3"})
    disabled(doctor)
    doctor.call("enable", {"app": APP, "user": USER})
    doctor.call("finish", {**SIGN_IN, "ceremony": "c3", "counter": 3}, {"nonce": "n3"})


def redeemed_after_disabled(doctor: Doctor) -> None:
    doctor.sign_in(3)
    disabled(doctor)
    doctor.redeem(3)


def signs_in_while_disabled(doctor: Doctor) -> None:
    disabled(doctor)
    doctor.sign_in(3)
    doctor.call("enable", {"app": APP, "user": USER})


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


def refused_with_the_next_counter(doctor: Doctor) -> None:
    doctor.call("begin", {**SIGN_IN}, {"ceremony": "c3"})
    value = {**SIGN_IN, "ceremony": "c3", "counter": 3}
    doctor.call("finish", value, {"status": 401}, type="fail")
    doctor.sign_in(4)


def refused_without_cause(doctor: Doctor) -> None:
    doctor.sign_in(3)
    doctor.redeem(3, type="fail")


def failed_though_up(doctor: Doctor) -> None:
    doctor.fault("broker killed", broker=0)
    failed(doctor, "broker-1", at=doctor.now + 100)


def failed_at_another_broker(doctor: Doctor) -> None:
    doctor.fault("broker killed", broker=0)
    failed(doctor, "broker-2", at=doctor.now - 1)


def failed_while_one_was_restarted(doctor: Doctor) -> None:
    doctor.fault("broker terminated", broker=0)
    failed(doctor, "broker-1", at=doctor.now - 1)


def failed_before_another_fault(doctor: Doctor) -> None:
    failed_though_up(doctor)
    doctor.fault("healed")
    doctor.fault("primary killed")


def failed_while_a_store_was_slow(doctor: Doctor) -> None:
    doctor.fault("broker terminated", broker=0)
    failed(doctor, "broker-2", at=doctor.now + 1, took=1000, request="id")


def failed(doctor: Doctor, server: str, *, at: int, took: int = 10, **result: str) -> None:
    """A call that HAProxy gave to this broker, whose answer has an id of the request."""
    value = {"app": APP, "key": "k"}
    result |= {"server": server}
    doctor.call("keyed", value, result, type="info", at=at, until=at + took)


DOCTORED: dict[Callable[[Doctor], None], str] = {
    nonce_twice: "bought once",
    nonce_by_two_keys: "bought once",
    nonce_again_without_the_key: "bought once",
    repeated_in_vain: "repeats agree",
    repeated_with_another_answer: "repeats agree",
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
    begun_before_disabled: "disabled is final",
    redeemed_after_disabled: "disabled is final",
    signs_in_while_disabled: "disabled is final",
    key_lives: "keys are revoked",
    crossed: "no crossing",
    one_nonce_for_two: "no crossing",
    defect: "no faults",
    refused_with_the_next_counter: "refused for a reason",
    refused_without_cause: "refused for a reason",
    failed_though_up: "only those in flight",
    failed_at_another_broker: "only those in flight",
    failed_while_one_was_restarted: "only those in flight",
    failed_before_another_fault: "only those in flight",
    failed_while_a_store_was_slow: "only those in flight",
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


def test_a_user_who_is_enabled_again_signs_in() -> None:
    doctor = Doctor()
    sound(doctor)
    disabled(doctor)
    doctor.redeem(2, type="fail")
    doctor.call("enable", {"app": APP, "user": USER})
    doctor.sign_in(3)
    doctor.redeem(3)
    assert judge(doctor.history()) == []


def test_a_call_in_flight_at_a_broker_that_is_killed_may_fail() -> None:
    doctor = Doctor()
    sound(doctor)
    doctor.fault("broker killed", broker=0)
    failed(doctor, "broker-1", at=doctor.now - 1)
    doctor.fault("healed")
    doctor.fault("primary killed")
    failed(doctor, "broker-2", at=doctor.now + 1)
    assert judge(doctor.history()) == []


@pytest.mark.parametrize(
    ("took", "result", "rules"),
    [
        (1000, {"request": "id"}, []),
        (100, {"request": "id"}, ["only those in flight"]),
        (1000, {}, ["only those in flight"]),
    ],
)
def test_among_several_faults_a_broker_may_wait_in_vain_for_a_slow_store(
    took: int, result: dict[str, str], rules: list[str]
) -> None:
    doctor = Doctor()
    sound(doctor)
    doctor.fault("broker terminated", broker=0)
    failed(doctor, "broker-2", at=doctor.now + 1, took=took, **result)
    doctor.fault("healed")
    doctor.fault("primary killed")
    assert [violation.rule for violation in judge(doctor.history())] == rules


def test_calls_before_a_broker_is_restarted_and_those_that_the_next_fault_met_may_fail() -> None:
    doctor = Doctor()
    sound(doctor)
    failed(doctor, "", at=doctor.now + 1)
    doctor.now += 1
    doctor.fault("broker terminated", broker=0)
    at = doctor.now + 1
    doctor.now += 5
    doctor.fault("healed")
    doctor.fault("Postgres stopped")
    failed(doctor, "broker-2", at=at, request="id")
    assert judge(doctor.history()) == []


def test_each_replay_without_an_event_of_its_own_is_found() -> None:
    doctor = Doctor()
    sound(doctor)
    doctor.redeem(2, type="fail", request="third")
    doctor.final()
    found = judge(doctor.history())
    assert [(violation.rule, violation.calls[1].result["request"]) for violation in found] == [
        ("replays are events", "third")
    ]


def redeemed_in_vain(
    before: Callable[[Doctor], None], between: Callable[[Doctor], None]
) -> list[str]:
    """The rules that a history breaks in which a nonce is refused, with these states of the servers
    before it was made and until it is redeemed. All is settled again 10 s later.
    """
    doctor = Doctor()
    sound(doctor)
    before(doctor)
    doctor.now += 10_000
    doctor.sign_in(3)
    doctor.now += 10_000
    between(doctor)
    doctor.now += 10_000
    doctor.redeem(3, type="fail")
    doctor.now += 10_000
    doctor.terms("z")
    return [violation.rule for violation in judge(doctor.history())]


UNEXPLAINED = ["refused for a reason"]


def in_cluster(first: str, second: str, *slots: list[list[str]], **more: Any) -> dict[str, Any]:
    """The state of two masters with these terms and slots."""
    pairs = zip((first, second), slots, strict=True)
    servers = [{"role": "master", "term": t, "slots": s, "migrations": []} for t, s in pairs]
    servers[0] |= more
    return {"shards": 2, "servers": servers}


LOW, HIGH = [["0", "99"]], [["100", "199"]]


@pytest.mark.parametrize(
    ("before", "between", "rules"),
    [
        (lambda d: d.terms("a"), lambda d: None, UNEXPLAINED),
        (lambda d: d.terms("a"), lambda d: d.terms("b"), []),
        (lambda d: d.terms("a"), lambda d: d.terms("a", leads=[0, None, 0]), UNEXPLAINED),
        (lambda d: d.terms("a"), lambda d: d.terms("a", leads=[0, 1, 0]), []),
        (lambda d: d.terms("a"), lambda d: (d.terms("a", silent=True), d.terms("a")), UNEXPLAINED),
        (lambda d: d.terms("a", "b"), lambda d: None, []),
        (lambda d: (d.terms("a"), d.terms("b")), lambda d: None, UNEXPLAINED),
        (
            lambda d: d.terms(**in_cluster("a", "b", LOW, HIGH)),
            lambda d: d.terms(**in_cluster("a", "b", LOW, HIGH, epoch=9)),
            UNEXPLAINED,
        ),
        (
            lambda d: d.terms(**in_cluster("a", "b", LOW, HIGH)),
            lambda d: d.terms(**in_cluster("a", "c", LOW, HIGH)),
            [],
        ),
        (
            lambda d: d.terms(**in_cluster("a", "b", LOW, HIGH)),
            lambda d: d.terms(**in_cluster("a", "b", HIGH, LOW)),
            [],
        ),
        (
            lambda d: d.terms(**in_cluster("a", "b", LOW, HIGH, migrations=[{"slot": "7"}])),
            lambda d: None,
            [],
        ),
    ],
    ids=(
        "no-change",
        "another-term",
        "a-sentinel-that-does-not-answer",
        "a-sentinel-that-names-a-replica",
        "a-primary-that-does-not-answer",
        "two-primaries",
        "a-change-before-the-value",
        "another-epoch-alone",
        "another-master",
        "slots-moved",
        "slots-being-moved",
    ),
)
def test_a_refusal_is_explained_by_a_change_of_term_alone(
    before: Callable[[Doctor], None], between: Callable[[Doctor], None], rules: list[str]
) -> None:
    assert redeemed_in_vain(before, between) == rules


@pytest.mark.parametrize(
    ("silent", "earlier", "rules"),
    [(False, 200, UNEXPLAINED), (False, 11_000, []), (True, 200, [])],
)
def test_a_change_of_term_lies_between_two_samples(
    silent: bool, earlier: int, rules: list[str]
) -> None:
    """It was seen after the refusal. It came at most `earlier` ms before, or in a silence."""
    doctor = Doctor()
    sound(doctor)
    doctor.terms("a")
    doctor.sign_in(3)
    doctor.terms("a", silent=silent)
    doctor.redeem(3, type="fail")
    doctor.now += 10_000
    doctor.terms("b", earlier=earlier)
    assert [violation.rule for violation in judge(doctor.history())] == rules


@pytest.mark.parametrize(
    ("code", "primaries", "rules"),
    [
        ("webauthn_login_failed", "ab", ["refused once"]),
        ("transaction_not_found", "ab", []),
        ("transaction_not_found", "a", []),
        ("unauthorized", "ab", []),
        ("unauthorized", "a", ["refused once"]),
    ],
)
def test_a_ceremony_that_is_unknown_at_one_primary_may_succeed_at_the_other(
    code: str, primaries: str, rules: list[str]
) -> None:
    """An answer of the form that tells of a judgement spends it at every one."""
    doctor = Doctor()
    sound(doctor)
    doctor.terms(*primaries)
    doctor.call("begin", {**SIGN_IN}, {"ceremony": "c3"})
    value = {**SIGN_IN, "ceremony": "c3", "counter": 3}
    doctor.call("finish", {**value, "right": False}, {"status": 400, "code": code}, type="fail")
    doctor.call("finish", value, {"nonce": "n3"})
    assert [violation.rule for violation in judge(doctor.history())] == rules
    doctor.call("finish", {**value, "counter": 4}, {"nonce": "n4"})
    assert {violation.rule for violation in judge(doctor.history())} == {"bought once", *rules}


def test_values_that_a_fault_ended_may_be_refused() -> None:
    """Until all is well again, and not afterwards."""
    for late, rules in ((False, []), (True, ["refused for a reason"])):
        doctor = Doctor()
        sound(doctor)
        doctor.fault("FLUSHALL", ends_values=True)
        doctor.sign_in(3)
        if not late:
            doctor.redeem(3, type="fail")
        doctor.now += 1
        doctor.fault("healed")
        doctor.sign_in(4)
        doctor.redeem(4, type="fail" if late else "ok")
        assert [violation.rule for violation in judge(doctor.history())] == rules


def test_an_answer_that_another_one_overtook_may_be_refused() -> None:
    doctor = Doctor()
    sound(doctor)
    doctor.call("begin", {**SIGN_IN}, {"ceremony": "c3"})
    doctor.sign_in(4)
    value = {**SIGN_IN, "ceremony": "c3", "counter": 3}
    doctor.call("finish", value, {"status": 401}, type="fail")
    assert judge(doctor.history()) == []


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

"""Checker: judges a history by the broker's promises. A pure function.

`judge(history)` returns the violations. Each rule below is a generator that cites the promise. A
call whose outcome is unknown (`info`) is never counted for or against the broker, except that what
it may have spent explains a later refusal.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from math import inf
from typing import Any, NamedTuple

from broker.broker.limited_events import LIMIT
from tests.chaos.history import Call, History

NONCE_LIFE = 60.0  # seconds; the policy's default
CEREMONY_LIFE = 300.0
REPEAT_LIFE = 60.0
KEYS_SETTLE = 1.0  # promise 13
STORE_WAITS = 0.8  # of the broker's limit of 1 s: a caller may join a wait that has begun
TERM_SETTLES = 1.5  # seconds in which a broker may stamp values with an earlier term, or learn one
_ENDS_AVAILABILITY = ("broker killed", "broker terminated")


class Violation(NamedTuple):
    """A broken promise: the rule, what happened, and the calls that show it."""

    rule: str
    text: str
    calls: tuple[Call, ...]


Rule = Callable[[History], Iterator[Violation]]


def judge(history: History) -> list[Violation]:
    """Every violation, in the order of the rules."""
    return [violation for rule in RULES for violation in rule(history)]


def _by(calls: Iterable[Call], *names: str) -> dict[tuple[Any, ...], list[Call]]:
    """Calls by these members; a call that lacks one is left out."""
    found: dict[tuple[Any, ...], list[Call]] = defaultdict(list)
    for call in calls:
        key = tuple(call.get(name) for name in names)
        if None not in key:
            found[key].append(call)
    return found


# -- at most once ----------------------------------------------------------------------------------


def bought_once(history: History) -> Iterator[Violation]:
    """Promises 1 and 2: of any number of takes of a nonce, a ceremony or a transaction, one
    succeeds. Takes with one Idempotency-Key count as one.
    """
    for f, name in (("redeem", "nonce"), ("finish", "ceremony"), ("finish", "transaction")):
        for calls in _by(history.of(f), name).values():
            bought = [call for call in calls if call.ok]
            if len(bought) > 1 and not _is_one(bought):
                yield Violation("bought once", f"{name} bought {len(bought)} times", tuple(bought))


def _is_one(calls: Sequence[Call]) -> bool:
    """True if all calls have the same Idempotency-Key."""
    return len({call.value.get("repeat", call.process) for call in calls}) == 1


def repeats_agree(history: History) -> Iterator[Violation]:
    """Promise 8: for a minute, a call that is repeated with its Idempotency-Key gets the answer of
    the first success. A change of term may have taken what it needs.
    """
    windows = _ended_values(history)
    for calls in _by(history.of("open", "redeem"), "app", "repeat").values():
        first = min((c for c in calls if c.ok), key=lambda c: c.completed, default=None)
        for call in calls:
            if (
                first is None
                or call.type == "info"
                or call.invoked < first.completed
                or call.completed - first.invoked > REPEAT_LIFE
                or _revocations(history, call)
                or _of_user(history, call, "disable")
                or any(b <= call.completed and first.invoked <= e for b, e in windows)
            ):
                continue
            if not call.ok or call.result != first.result:
                yield Violation("repeats agree", "a repeated call has another end", (first, call))


def refused_once(history: History) -> Iterator[Violation]:
    """Promise 1, "on success and on failure": a ceremony whose answer was refused is spent. Where
    the ceremony is unknown, no answer was judged.
    """
    windows = _ended_values(history)
    for calls in _by(history.of("finish"), "ceremony").values():
        refused = [
            call
            for call in calls
            if call.type == "fail"
            and call.result.get("status") != 429  # which spends nothing
            and call.result.get("code") != "transaction_not_found"
            and not call.value["right"]
            and call.value["opener"] == call.value["dialect"]
            and (
                call.result.get("code") == "webauthn_login_failed"
                or not any(b <= call.completed and call.invoked <= e for b, e in windows)
            )
        ]
        for call in calls:
            before = [other for other in refused if other.completed < call.invoked]
            if call.ok and before:
                yield Violation(
                    "refused once", "a ceremony succeeded after a refusal", (before[0], call)
                )


def refused_writes_nothing(history: History) -> Iterator[Violation]:
    """One transaction, one success: a finish that was refused has stored no passkey."""
    stored = {row["credential"] for row in history.final.get("credentials", [])}
    registrations = (c for c in history.of("finish") if c.value["purpose"] == "register")
    for calls in _by(registrations, "credential").values():
        if calls[0].value["credential"] in stored and all(c.type == "fail" for c in calls):
            yield Violation("refused writes nothing", "a refused passkey is stored", tuple(calls))


def own_door(history: History) -> Iterator[Violation]:
    """A ceremony is finished by its opener."""
    for call in history.of("finish"):
        # The native API opens discoverable ceremonies too.
        opener, dialect = call.value["opener"], call.value["dialect"]
        if call.ok and opener != dialect:
            yield Violation("own door", f"{dialect} finished a ceremony of {opener}", (call,))


def right_answers_only(history: History) -> Iterator[Violation]:
    """An answer with a wrong signature never succeeds."""
    for call in history.of("finish"):
        if call.ok and not call.value["right"] and call.value["opener"] == call.value["dialect"]:
            yield Violation("right answers only", "a wrong answer succeeded", (call,))


# -- nothing lost ----------------------------------------------------------------------------------


def registrations_stay(history: History) -> Iterator[Violation]:
    """Promise 16: every acknowledged registration is in Postgres, unless it was revoked."""
    if not history.final:
        return
    stored = {(row["app"], row["credential"]) for row in history.final["credentials"]}
    for call in history.of("finish"):
        if not call.ok or call.value["purpose"] != "register" or _revocations(history, call):
            continue
        if (call.value["app"], call.value["credential"]) not in stored:
            yield Violation("registrations stay", "an acknowledged passkey is lost", (call,))


def registrations_sign_in(history: History) -> Iterator[Violation]:
    """Promise 16: when all is well again, every acknowledged registration signs in."""
    for call in history.of("final sign-in"):
        if not call.result.get("done"):
            yield Violation("registrations sign in", "a stored passkey does not sign in", (call,))


def counters_rise(history: History) -> Iterator[Violation]:
    """An acknowledged sign-in has a higher counter than each that was acknowledged before, and
    Postgres has the highest.
    """
    final = {
        (row["app"], row["credential"]): row["counter"]
        for row in history.final.get("credentials", [])
    }
    sign_ins = (c for c in history.of("finish") if c.ok and c.value.get("counter"))
    for key, calls in _by(sign_ins, "app", "credential").items():
        highest: Call | None = None
        for call in sorted(calls, key=lambda call: call.completed):
            earlier = highest if highest and highest.completed < call.invoked else None
            if earlier and call.value["counter"] <= earlier.value["counter"]:
                yield Violation("counters rise", "a counter went back", (earlier, call))
            if highest is None or call.value["counter"] > highest.value["counter"]:
                highest = call
        if (
            highest is not None
            and final.get(key, highest.value["counter"]) < highest.value["counter"]
        ):
            yield Violation("counters rise", "Postgres has an older counter", (highest,))


# -- revocation ------------------------------------------------------------------------------------


def _revocations(history: History, call: Call) -> list[Call]:
    """The revocations that may concern this call's passkey."""
    app, user, credential = (call.value.get(n) for n in ("app", "user", "credential"))
    return [
        other
        for other in history.of("revoke", "revoke_all")
        if other.value["app"] == app
        and other.value["user"] == user
        and other.value.get("credential", credential) == credential
    ]


def revoked_is_final(history: History) -> Iterator[Violation]:
    """Promise 18: after an answered revocation nothing begun before signs in or registers, and no
    nonce made before redeems. A registration that was opened after it is another matter.
    """
    opened = {
        key[0]: calls[0].invoked for key, calls in _by(history.of("open"), "transaction").items()
    } | {key[0]: calls[0].invoked for key, calls in _by(history.of("begin"), "ceremony").items()}
    registered = {
        (c.value["app"], c.value["credential"]): opened.get(
            c.value.get("transaction") or c.value["ceremony"], 0.0
        )
        for c in history.of("finish")
        if c.ok and c.value["purpose"] == "register"
    }
    for call in history.of("finish", "redeem"):
        if not call.ok:
            continue
        key = (call.value["app"], call.value["credential"])
        for revocation in _revocations(history, call):
            if not revocation.ok or revocation.completed >= call.invoked:
                continue
            if registered.get(key, 0.0) < revocation.completed:
                yield Violation(
                    "revoked is final", f"a {call.f} succeeded after the answer", (revocation, call)
                )


def disabled_is_final(history: History) -> Iterator[Violation]:
    """Promise 18: after a user was disabled nothing begun before signs in, registers or redeems,
    and nothing else does before the user is enabled.
    """
    begun = {
        name: {key[0]: calls[0].invoked for key, calls in _by(history.of(f), name).items()}
        for f, name in (("begin", "ceremony"), ("finish", "nonce"))
    }
    for call in history.of("finish", "redeem"):
        name = "ceremony" if call.f == "finish" else "nonce"
        since = begun[name].get(call.value[name], 0.0)
        for disabled in _of_user(history, call, "disable"):
            if not call.ok or not disabled.ok or call.invoked <= disabled.completed:
                continue
            enabled = [e for e in _of_user(history, call, "enable") if e.type != "fail"]
            if since < disabled.completed or all(call.completed < e.invoked for e in enabled):
                yield Violation(
                    "disabled is final", f"a {call.f} of a disabled user", (disabled, call)
                )


def _of_user(history: History, call: Call, *names: str) -> list[Call]:
    """The calls of these kinds that concern the user of this call."""
    app, user = call.value["app"], call.value.get("user")
    return [c for c in history.of(*names) if (c.value["app"], c.value["user"]) == (app, user)]


def keys_are_revoked(history: History) -> Iterator[Violation]:
    """Promise 13: a revoked key is refused on every instance within one second."""
    revoked = {f.value["key"]: f.completed for f in history.faults if f.f == "key revoked"}
    for call in history.of("keyed"):
        at = revoked.get(call.value["key"])
        if call.ok and at is not None and call.invoked > at + KEYS_SETTLE:
            yield Violation("keys are revoked", "a revoked key was accepted", (call,))


# -- right answers ---------------------------------------------------------------------------------


def no_crossing(history: History) -> Iterator[Violation]:
    """Promises 5 and 10: an answer is about the user, the passkey and the purpose that were
    asked.
    """
    for call in history.calls:
        for name in ("user", "credential", "purpose"):
            told = call.result.get(name)
            if call.ok and told is not None and told != call.value.get(name, told):
                yield Violation("no crossing", f"the answer has another {name}", (call,))
    for call in history.calls:
        if call.result.get("code") == "malformed success":
            yield Violation("no crossing", "a success lacks what it must have", (call,))
    for f, name in (("open", "transaction"), ("begin", "ceremony"), ("finish", "nonce")):
        for calls in _by((c for c in history.of(f) if c.ok), name).values():
            given = {call.process for call in calls}
            if len(calls) > 1 and name in calls[0].result and not _is_one(calls):
                yield Violation("no crossing", f"{len(given)} callers got one {name}", tuple(calls))


def no_faults(history: History) -> Iterator[Violation]:
    """Promise 17: never a 500."""
    for call in history.calls:
        if call.result.get("status") == 500:
            yield Violation("no faults", "the broker answered 500", (call,))


def refused_for_a_reason(history: History) -> Iterator[Violation]:
    """Every refusal has a cause in the history: the value was spent, replaced, cancelled or
    expired, its passkey revoked, its user disabled, the answer wrong or older than another one of
    the passkey, its term changed, or a fault ended values.
    """
    windows = _ended_values(history)
    begun = {key[0]: calls[0] for key, calls in _by(history.of("begin"), "ceremony").items()}
    opened = {key[0]: calls[0] for key, calls in _by(history.of("open"), "transaction").items()}
    minted = {key[0]: calls[0] for key, calls in _by(history.of("finish"), "nonce").items()}
    takes = {
        name: _by(history.of(f), name)
        for f, name in (("redeem", "nonce"), ("finish", "ceremony"), ("finish", "transaction"))
    }
    begins = _by(history.of("begin"), "transaction")
    replacing = _by(history.of("begin"), "app", "user", "dialect", "purpose")
    cancelled = _by(history.of("cancel"), "transaction")
    answers = _by((c for c in history.of("finish") if c.type != "fail"), "app", "credential")

    def tried_before(call: Call, name: str) -> bool:
        others = takes[name].get((call.value.get(name),), [])
        return any(o is not call and o.invoked < call.completed for o in others)

    def counted_back(call: Call) -> bool:
        others = answers.get((call.value["app"], call.value["credential"]), [])
        count = call.value.get("counter", 0)
        return any(o.value.get("counter", 0) > count and o.invoked < call.completed for o in others)

    def ended(call: Call, made: Call | None, life: float) -> bool:
        since = made.invoked if made else 0.0
        return call.completed - since > life or any(
            since <= end and begin <= call.completed for begin, end in windows
        )

    for call in history.calls:
        if call.type != "fail" or call.result.get("status") == 500:
            continue
        value, explained = call.value, bool(_revocations(history, call))
        explained |= any(d.invoked < call.completed for d in _of_user(history, call, "disable"))
        transaction = (value.get("transaction"),)
        if call.f == "redeem":
            made = minted.get(value["nonce"])
            explained |= tried_before(call, "nonce") or ended(call, made, NONCE_LIFE)
        elif call.f == "finish":
            made = begun.get(value["ceremony"])
            later = begins.get(transaction, []) + (
                replacing.get(tuple(value[n] for n in ("app", "user", "opener", "purpose")), [])
                if "transaction" not in value
                else []
            )
            explained |= (
                not value["right"]
                or counted_back(call)
                or tried_before(call, "ceremony")
                or tried_before(call, "transaction")
                or ended(call, made, CEREMONY_LIFE)
                or transaction in cancelled
                or any(_replaces(other, made, call) for other in later)
            )
        elif call.f == "begin":
            made = opened.get(value.get("transaction"))
            explained |= (
                tried_before(call, "transaction")
                or transaction in cancelled
                or (made is not None and ended(call, made, CEREMONY_LIFE))
            )
        elif call.f == "keyed":
            revoked = [f for f in history.faults if f.value.get("key") == value["key"]]
            explained |= any(fault.completed < call.completed for fault in revoked)
        if not explained:
            status, code = call.result.get("status"), call.result.get("code")
            yield Violation("refused for a reason", f"unexplained {status} {code!r}", (call,))


def _replaces(begin: Call, made: Call | None, finish: Call) -> bool:
    """True if this begin may have replaced the ceremony that was begun by `made`."""
    if begin is made or begin.type == "fail" or begin.invoked >= finish.completed:
        return False
    return made is None or begin.type == "info" or begin.completed > made.invoked


Window = tuple[float, float]


def _ended_values(history: History) -> list[Window]:
    """The times in which one-time values may have ended, by a change of term or by a fault."""
    return [*_unsettled(history), *_windows(history, "ends_values")]


def _windows(history: History, effect: str) -> list[Window]:
    """From each fault with this effect until all was well again."""
    found: list[Window] = []
    began: float | None = None
    for fault in history.faults:
        if fault.value.get(effect) and began is None:
            began = fault.completed
        elif fault.f == "healed" and began is not None:
            found.append((began, fault.completed))
            began = None
    return found if began is None else [*found, (began, inf)]


def _unsettled(history: History) -> list[Window]:
    """The times in which a value could meet another term than its own: a term or the owner of a
    slot changed, there were more primaries than shards or fewer, or brokers were led elsewhere.

    A change lies between two samples of its server, so a window begins with the last sample that
    was answered.
    """
    found: list[Window] = []
    began = silent = inf
    known: dict[int, Any] | None = None
    for note in history.terms:
        state, at = note.value, note.completed
        since = at - state["earlier"]
        if any(server.get("silent") for server in state["servers"]):
            silent = min(silent, since)
        primaries = {
            number: [server["term"], *map(server.get, ("slots", "migrations"))]
            for number, server in enumerate(state["servers"])
            if server.get("role") == "master" and server.get("slots") != []
        }
        settled = (
            len(primaries) == state["shards"]
            and set(state.get("leads", primaries)) <= {None, *primaries}
            and not any(server.get("migrations") for server in state["servers"])
        )
        if not settled or (known is not None and primaries != known):
            began = min(began, since, silent)
        if settled and began < inf:
            found.append((began, at + TERM_SETTLES))
            began = inf
        if not any(server.get("silent") for server in state["servers"]):
            silent = inf
        known = primaries
    return found if began == inf else [*found, (began, inf)]


# -- availability ----------------------------------------------------------------------------------


def only_those_in_flight(history: History) -> Iterator[Violation]:
    """Where only brokers were killed or restarted until all was well again: a call through HAProxy
    fails only if a broker had it at the moment at which that broker was killed.

    A run of several faults shares its machine with other work. There a broker may answer 503 after
    a wait for a slow store.
    """
    unsettled, episodes = _unsettled(history), list(_episodes(history))
    shared = sum(bool(faults) for faults, _ in episodes) > 1
    for faults, end in episodes:
        if not faults or any(f.f not in _ENDS_AVAILABILITY for f in faults):
            continue
        kills = [
            (f"broker-{fault.value['broker'] + 1}", fault.completed)
            for fault in faults
            if fault.f == "broker killed"
        ]
        for call in history.calls:
            within = faults[0].completed <= call.completed <= end
            if call.type != "info" or "via" in call.value or not within:
                continue
            if any(b <= call.completed and call.invoked <= e for b, e in unsettled):
                continue
            waited = call.completed - call.invoked >= STORE_WAITS
            if shared and waited and call.result.get("request"):
                continue
            had = call.result.get("server")
            if not any(had == s and call.invoked <= at <= call.completed for s, at in kills):
                yield Violation("only those in flight", f"{call.f} failed: {call.result}", (call,))


def _episodes(history: History) -> Iterator[tuple[list[Call], float]]:
    """The faults until all was well again, and that time."""
    faults: list[Call] = []
    for fault in history.faults:
        if fault.f == "healed":
            yield faults, fault.completed
            faults = []
        elif fault.f != "key revoked":
            faults.append(fault)
    yield faults, inf


# -- replays ---------------------------------------------------------------------------------------


def replays_are_events(history: History) -> Iterator[Violation]:
    """Promise 7: each redemption of a nonce after the successful one is an event of its own, where
    no change of term took the tombstone. Beyond the limit of events an app has fewer.
    """
    if "replays" not in history.final:
        return
    told = {row["request"] for row in history.final["replays"]}
    counts = Counter(row["app"] for row in history.final["replays"])
    windows = [*_ended_values(history), *_windows(history, "loses_events")]
    for calls in _by(history.of("redeem"), "nonce").values():
        first = next((call for call in calls if call.ok), None)
        for call in calls:
            if first is None or call.type != "fail" or call.invoked < first.completed:
                continue
            if "repeat" in call.value and _is_one((first, call)):
                continue
            if (
                call.result["request"] not in told
                and counts[call.value["app"]] < LIMIT
                and not any(b <= call.completed and first.invoked <= e for b, e in windows)
            ):
                yield Violation("replays are events", "a replay is no event", (first, call))


RULES: tuple[Rule, ...] = (
    bought_once,
    repeats_agree,
    refused_once,
    refused_writes_nothing,
    own_door,
    right_answers_only,
    registrations_stay,
    registrations_sign_in,
    counters_rise,
    revoked_is_final,
    disabled_is_final,
    keys_are_revoked,
    no_crossing,
    no_faults,
    refused_for_a_reason,
    only_those_in_flight,
    replays_are_events,
)

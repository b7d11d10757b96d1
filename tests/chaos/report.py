"""Reports of a history: a summary in text, and a timeline in HTML of the calls that broke a
promise.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from tests.chaos.checker import Violation
from tests.chaos.history import Call, History, read
from tests.support.parts import ROOT

FOLDER = ROOT / ".chaos"

_WIDTH, _ROW = 1400, 18
_COLOURS = {"ok": "#2b8a3e", "fail": "#868e96", "info": "#e67700"}
_LINKED = ("nonce", "ceremony", "transaction", "credential")


def report(path: Path, violations: Sequence[Violation]) -> bool:
    """Print what a history shows, and write the timeline of one that breaks a promise, beside it.
    True if it breaks none.
    """
    history = read(path)
    print(f"{path}\n{summary(history, violations)}", flush=True)
    if violations:
        page = path.with_suffix(".html")
        timeline(history, violations, page)
        print(f"Timeline: {page}", flush=True)
    return not violations


def summary(history: History, violations: Sequence[Violation]) -> str:
    """Counts of calls, faults and violations; the first violation of each rule in full."""
    lines = [f"{len(history.calls)} calls:"]
    counts = Counter((call.f, call.type) for call in history.calls)
    lines += [f"  {f} {kind}: {count}" for (f, kind), count in sorted(counts.items())]
    told = (fault for fault in history.faults if fault.f != "key revoked")
    notes = [(fault.completed, fault.f) for fault in told]
    notes += [(at, f"servers: {servers}") for at, servers in _changes(history)]
    lines += [f"{at:8.3f} s  {what}" for at, what in sorted(notes)]
    if not violations:
        return "\n".join([*lines, "No violation."])
    found = Counter((violation.rule, violation.text) for violation in violations)
    lines += [f"VIOLATION {count} x {rule}: {text}" for (rule, text), count in found.most_common()]
    seen: set[str] = set()
    for violation in violations:
        if violation.rule not in seen:
            seen.add(violation.rule)
            lines += [f"  {violation.rule}, for example:", *map(_line, violation.calls[:4])]
    return "\n".join(lines)


def _changes(history: History) -> Iterable[tuple[float, str]]:
    """The roles and terms of the one-time store's servers, whenever they changed."""
    known = ""
    for note in history.terms:
        words = (
            (
                state.get("role", "down"),
                state.get("term", ""),
                "silent" * state.get("silent", False),
            )
            for state in note.value["servers"]
        )
        told = ", ".join(" ".join(filter(None, each)) for each in words)
        if told != known:
            known = told
            yield note.completed, told


def _line(call: Call) -> str:
    return (
        f"    {call.invoked:.3f} to {call.completed:.3f} s  {call.f} {call.type}"
        f"  {call.value} -> {call.result}"
    )


def timeline(history: History, violations: Sequence[Violation], path: Path) -> None:
    """Write a page with a row for each call that shares a value with a violation."""
    marks = {
        (name, call.get(name))
        for violation in violations
        for call in violation.calls
        for name in _LINKED
        if call.get(name) is not None
    }
    shown = [c for c in history.calls if any((n, c.get(n)) in marks for n in _LINKED)]
    shown.sort(key=lambda call: (str(call.get("credential")), call.invoked))
    guilty = {id(call) for violation in violations for call in violation.calls}
    start = min((call.invoked for call in shown), default=0.0)
    end = max((call.completed for call in shown), default=1.0)
    scale = _WIDTH / max(end - start, 0.001)
    height = _ROW * (len(shown) + 2)

    def at(time: float) -> float:
        return (min(max(time, start), end) - start) * scale

    parts = [
        f'<line x1="{at(f.completed):.1f}" x2="{at(f.completed):.1f}" y1="0" y2="{height}"'
        f' stroke="#c92a2a" stroke-dasharray="3"/><text x="{at(f.completed):.1f}" y="12"'
        f' fill="#c92a2a">{escape(f.f)}</text>'
        for f in history.faults
        if f.f != "key revoked"
    ]
    for row, call in enumerate(shown, 2):
        x, width = at(call.invoked), max(3.0, at(call.completed) - at(call.invoked))
        edge = ' stroke="#c92a2a" stroke-width="2"' if id(call) in guilty else ""
        parts.append(
            f'<g><title>{escape(_line(call).strip())}</title><rect x="{x:.1f}" y="{row * _ROW}"'
            f' width="{width:.1f}" height="{_ROW - 4}" fill="{_COLOURS[call.type]}"{edge}/>'
            f'<text x="{x + width + 4:.1f}" y="{row * _ROW + 11}">{escape(_label(call))}</text></g>'
        )
    path.write_text(
        "<!doctype html><meta charset=utf-8><title>History</title>"
        "<style>body{font:12px sans-serif}text{font-size:11px}</style>"
        f"<p>{len(violations)} violations; green: ok, grey: refused, orange: unknown; a red edge"
        " marks a call of a violation. Point at a call for all that it says.</p>"
        f"<ol>{''.join(_items(violations))}</ol>"
        f'<svg width="{_WIDTH + 400}" height="{height}">{"".join(parts)}</svg>'
    )


def _items(violations: Iterable[Violation]) -> Iterable[str]:
    return (f"<li>{escape(f'{v.rule}: {v.text}')}</li>" for v in violations)


def _label(call: Call) -> str:
    door = call.value.get("via") or "HAProxy"
    status = call.result.get("status", "")
    return f"{call.f} {call.value.get('dialect', '')} {call.value.get('user', '')} {status} {door}"

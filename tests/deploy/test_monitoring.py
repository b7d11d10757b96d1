"""Alerts and dashboard: promtool judges the rules on made-up series, and each metric and label that
they name exists.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from broker.telemetry import Metrics
from tests.support.load_balancers import DEPLOY
from tests.support.parts import ROOT, program

ALERTS = DEPLOY / "prometheus" / "alerts.yaml"
DASHBOARD = DEPLOY / "grafana" / "dashboard.json"
RULES: list[dict[str, Any]] = [
    rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]
]
MINUTES = 75


def series(name: str, values: str, labels: str = "", instance: str = "a") -> dict[str, str]:
    """A series of one instance. `values` as promtool has them: start+step for each minute."""
    more = f",{labels}" if labels else ""
    return {f'{name}{{job="passkey-broker",instance="{instance}"{more}}}': f"{values}x{MINUTES}"}


def requests(ok: str, failed: str = "0+0") -> dict[str, str]:
    return series("broker_request_seconds_count", ok, 'route="/x",status="200"') | series(
        "broker_request_seconds_count", failed, 'route="/x",status="503"'
    )


def buckets(name: str, low: str, high: str, labels: str = "") -> dict[str, str]:
    """A histogram of two buckets: all of `low` up to 0.01, all of `high` up to 1."""
    more = f",{labels}" if labels else ""
    return (
        series(f"{name}_bucket", low, f'le="0.01"{more}')
        | series(f"{name}_bucket", high, f'le="1.0"{more}')
        | series(f"{name}_bucket", high, f'le="+Inf"{more}')
    )


def ceremonies(begun: str, ok: str, refused: str) -> dict[str, str]:
    name, kind = "broker_ceremonies_total", 'kind="authenticate"'
    return {
        **series(name, begun, f'{kind},step="begin",result="ok"'),
        **series(name, ok, f'{kind},step="finish",result="ok"'),
        **series(name, refused, f'{kind},step="finish",result="refused"'),
    }


HEALTHY: dict[str, str] = {
    **series("up", "1+0"),
    **series("up", "1+0", instance="b"),
    **series("process_start_time_seconds", "1000+0"),
    **series("broker_build_info", "1+0", 'version="1",python="3"'),
    **requests("0+6000", "0+6"),
    **buckets("broker_request_seconds", "0+6000", "0+6000", 'route="/x",status="200"'),
    **series("broker_request_seconds_count", "0+6000", 'route="/health/ready",status="503"'),
    **series("broker_request_seconds_count", "0+6000", 'route="/metrics",status="200"'),
    **buckets("broker_request_seconds", "0+0", "0+6000", 'route="/metrics",status="200"'),
    **buckets("broker_request_seconds", "0+0", "0+6000", 'route="/health/ready",status="503"'),
    **series("broker_ready", "1+0"),
    **series("broker_ready", f"_x{MINUTES - 3} 0+0", 'reason="redis"', instance="b"),
    **ceremonies("0+600", "0+540", "0+50"),
    **series("broker_redemptions_total", "0+600", 'result="ok"'),
    **series("broker_redemptions_total", "7+0", 'result="replayed"'),
    **series("broker_redemptions_total", "7+0.1", 'result="mismatch"'),
    **buckets("broker_redemption_age_fraction", "0+600", "0+600"),
    **series("broker_refusals_total", "0+30", 'code="too_many_requests",reason="address"'),
    **series("broker_refusals_total", "9+0", 'code="transaction_not_found",reason="term_over"'),
    **series("broker_redis_failures_total", "0+3", 'cause="connection"'),
    **series("broker_redis_failures_total", "4+0", 'cause="oom"'),
    **series("broker_redis_term_changes_total", "1+0.05"),
    **series("broker_store_failures_total", "0+3", 'store="postgres",operation="x"'),
    **series("broker_postgres_connections", "12+0", 'state="busy"'),
    **series("broker_postgres_connections", "4+0", 'state="idle"'),
    **series("broker_postgres_connections_limit", "16+0"),
    **series("process_cpu_seconds_total", "0+40"),
    **buckets("broker_loop_lag_seconds", "0+240", "0+240"),
    **series("process_open_fds", "700+0"),
    **series("process_max_fds", "1024+0"),
    **series("broker_events_lost_total", "3+0"),
    **series("broker_housekeeping_failures_total", "0+0.01", 'chore="events"'),
}
APPEARS = f"_x{MINUTES - 2} 1"
GONE = series("broker_ready", "_")
FIRING: list[tuple[str, dict[str, str]]] = [
    ("BrokerInstanceDown", series("up", "0+0")),
    ("BrokerNoneReady", series("broker_ready", "0+0", 'reason="postgres_not_migrated"') | GONE),
    ("BrokerNotReady", series("broker_ready", "0+0", 'reason="redis_term"', instance="b")),
    ("BrokerRestarts", series("process_start_time_seconds", "0+9")),
    ("BrokerReleasesDiffer", series("broker_build_info", "1+0", 'version="2",python="3"')),
    ("BrokerErrors", requests("0+6000", "0+70")),
    (
        "BrokerSlow",
        buckets("broker_request_seconds", "0+5000", "0+6000", 'route="/x",status="200"'),
    ),
    ("BrokerNobodySignsIn", ceremonies("0+600", "5+0", "0+0")),
    ("BrokerFinishesRefused", ceremonies("0+600", "0+300", "0+200")),
    ("BrokerNonceReplayed", series("broker_redemptions_total", "0+1", 'result="replayed"')),
    ("BrokerNonceReplayed", series("broker_redemptions_total", APPEARS, 'result="replayed"')),
    ("BrokerNonceOfAnother", series("broker_redemptions_total", "0+1", 'result="foreign"')),
    ("BrokerNoncesExpire", buckets("broker_redemption_age_fraction", "0+1", "0+600")),
    (
        "BrokerLimits",
        series("broker_refusals_total", "0+90", 'code="too_many_requests",reason="address"'),
    ),
    ("BrokerRedisFails", series("broker_redis_failures_total", "0+9", 'cause="connection"')),
    ("BrokerRedisFull", series("broker_redis_failures_total", APPEARS, 'cause="oom"')),
    (
        "BrokerPostgresFails",
        series("broker_store_failures_total", "0+9", 'store="postgres",operation="x"'),
    ),
    ("BrokerConnectionsUsedUp", series("broker_postgres_connections", "15+0", 'state="busy"')),
    (
        "BrokerSignInsEndedByFailover",
        series("broker_refusals_total", APPEARS, 'code="transaction_not_found",reason="term_over"'),
    ),
    ("BrokerTermsChange", series("broker_redis_term_changes_total", "0+0.1")),
    ("BrokerBusy", series("process_cpu_seconds_total", "0+55")),
    ("BrokerLoopLags", buckets("broker_loop_lag_seconds", "0+230", "0+240")),
    ("BrokerFiles", series("process_open_fds", "900+0")),
    ("BrokerEventsLost", series("broker_events_lost_total", "0+1")),
    ("BrokerCleanUpFails", series("broker_housekeeping_failures_total", "0+1", 'chore="events"')),
]


def judge(folder: Path, given: Mapping[str, str], firing: Mapping[str, str]) -> None:
    """Let promtool assert which alert fires for which job in the last minute. An alert on all has
    the job "".
    """
    samples = []
    for job, alert in firing.items():
        of = f', job="{job}"' if job else ""
        samples.append({"labels": f'{{alertname="{alert}"{of}}}', "value": 1})
    test = {
        "interval": "1m",
        "input_series": [{"series": k, "values": v} for k, v in given.items()],
        "promql_expr_test": [
            {
                "expr": 'group by (alertname, job) (ALERTS{alertstate="firing"})',
                "eval_time": f"{MINUTES}m",
                "exp_samples": samples,
            }
        ],
    }
    written = folder / "tests.yaml"
    document = {"rule_files": [str(ALERTS)], "evaluation_interval": "1m", "tests": [test]}
    written.write_text(yaml.safe_dump(document))
    argv = [program("promtool"), "test", "rules", str(written)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def of_job(job: str, given: Mapping[str, str]) -> dict[str, str]:
    return {name.replace('job="passkey-broker"', f'job="{job}"'): given[name] for name in given}


def test_each_alert_fires_in_its_case_and_none_in_a_healthy_hour(tmp_path: Path) -> None:
    """Each case is a job of its own: the healthy hour, but for the series of the case."""
    given = dict(HEALTHY)
    firing = {}
    for number, (alert, changed) in enumerate(FIRING):
        job = f"passkey-broker-{number}"
        given |= of_job(job, HEALTHY | changed)
        firing[job] = alert
    assert {*firing.values(), "BrokerGone"} == {rule["alert"] for rule in RULES}
    judge(tmp_path, given, firing)


def test_an_alert_fires_when_no_instance_answers(tmp_path: Path) -> None:
    judge(
        tmp_path, series("broker_build_info", "1+0", 'version="1",python="3"'), {"": "BrokerGone"}
    )


def test_an_alert_tells_what_it_means_and_what_to_do() -> None:
    for rule in RULES:
        assert rule["labels"]["severity"] in ("critical", "warning")
        for text in (rule["annotations"]["summary"], rule["annotations"]["description"]):
            assert text.endswith("."), rule["alert"]
            for kept in re.findall(r"\bby \(([^)]*)\)", rule["expr"]):
                named = set(re.findall(r"\$labels\.(\w+)", text))
                assert named <= set(kept.split(", ")), rule["alert"]


def labels_of_metrics() -> dict[str, set[str]]:
    """Every name that a scrape has, with its labels."""
    metrics = Metrics()
    declared = {each.family().name: each for each in metrics.tally._metrics}
    found: dict[str, set[str]] = {"up": set()}
    for metric in metrics.registry.collect():
        own = declared.get(metric.name)
        labels = set(own._labels) if own else {k for s in metric.samples for k in s.labels}
        match metric.type:
            case "counter":
                found[f"{metric.name}_total"] = labels
            case "histogram":
                found[f"{metric.name}_bucket"] = labels | {"le"}
                found |= {f"{metric.name}{end}": labels for end in ("_count", "_sum")}
            case _:
                found[metric.name] = labels
    return found


# Each query of the dashboard, by its panel, with the names that its legend shows.
TARGETS = [
    (f"{panel['title']} {target['refId']}", target["expr"], target["legendFormat"])
    for panel in json.loads(DASHBOARD.read_text())["panels"]
    for target in panel.get("targets", ())
]
QUERIES = [(rule["alert"], rule["expr"]) for rule in RULES]
QUERIES += [(panel, query) for panel, query, _ in TARGETS]
OF_PROMETHEUS = {"job", "instance", "alertname"}


def test_metrics_labels_and_values_exist() -> None:
    known = labels_of_metrics()
    sources = "\n".join(path.read_text() for path in (ROOT / "broker").rglob("*.py"))
    for where, query in QUERIES:
        named = re.findall(r"\b((?:broker|process|python)_\w+|up)\b(?:\{(.*?)\})?", query)
        assert named, where
        labels = set(OF_PROMETHEUS)
        for name, selector in named:
            assert name in known, where
            labels |= known[name]
            for label, value in re.findall(r'(\w+)(?:=~|!=|=)"(.*?)"', selector):
                assert label in known[name] | OF_PROMETHEUS, (where, name, label)
                if label not in {"job", "status"}:
                    told = [f'"{each}"' in sources for each in value.split("|")]
                    assert all(told), (where, value)
        for clause in re.findall(r"\b(?:by|ignoring|on) \(([^)]*)\)", query):
            assert set(clause.split(", ")) <= labels, (where, clause)

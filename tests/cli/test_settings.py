"""Settings from the environment: what each takes, that every fault is told at once, and that no
secret is told at all.
"""

from __future__ import annotations

import re
from dataclasses import fields
from ipaddress import ip_network
from pathlib import Path

import pytest

from broker.dialects import DIALECTS, load_settings
from broker.settings import PREFIX, Settings, SettingsFault

STORES = {
    "BROKER_DATABASE_URL": "postgresql://broker@db.example/broker",
    "BROKER_REDIS_URL": "redis://cache.example:6379/0",
}

S1 = "zq9w-" + "abcdefghijklmnopqrstuvwxyz0123456789"
S2 = "AbCdEfGhIjKlMnOpQrStUvWxYz/+9876"

GOOD: list[tuple[str, str, object]] = [
    (
        "database_url",
        "postgres://u:p%40ss@db.example:5433/name",
        "postgres://u:p%40ss@db.example:5433/name",
    ),
    (
        "database_url",
        "postgresql://u@a:1,b:2/x?sslmode=require",
        "postgresql://u@a:1,b:2/x?sslmode=require",
    ),
    (
        "database_url",
        "postgresql://u@a/x?sslmode=require&sslrootcert=/ca",
        "postgresql://u@a/x?sslmode=require&sslrootcert=/ca",
    ),
    ("database_url", "postgresql://u@[::1]:5432/x", "postgresql://u@[::1]:5432/x"),
    (
        "database_url",
        "postgresql://u@/x?host=%2Frun%2Fpg&port=1",
        "postgresql://u@/x?host=%2Frun%2Fpg&port=1",
    ),
    ("redis_url", "redis://localhost", "redis://localhost"),
    (
        "redis_url",
        "rediss://:p%2Fw@h:1/3?ssl_ca_certs=/ca",
        "rediss://:p%2Fw@h:1/3?ssl_ca_certs=/ca",
    ),
    ("redis_url", "unix:///run/valkey.sock?db=2", "unix:///run/valkey.sock?db=2"),
    ("redis_url", "redis+cluster://h:7000", "redis+cluster://h:7000"),
    ("redis_url", "redis+sentinel://a,b:2/main", "redis+sentinel://a,b:2/main"),
    (
        "redis_url",
        "rediss+sentinel://u:p@a/main?db=1&ssl_ca_certs=/ca&sentinel_tls=no&sentinel_password=q",
        "rediss+sentinel://u:p@a/main?db=1&ssl_ca_certs=/ca&sentinel_tls=no&sentinel_password=q",
    ),
    ("redis_url", "rediss+cluster://h:7000/", "rediss+cluster://h:7000/"),
    ("redis_url", "REDISS+Cluster://h:7000/", "rediss+cluster://h:7000/"),
    ("redis_url", "redis+cluster://u:p@a:1,b,c:2/", "redis+cluster://u:p@a:1,b,c:2/"),
    ("host", "0.0.0.0", "0.0.0.0"),
    ("host", "::", "::"),
    ("host", "node-1.example", "node-1.example"),
    ("port", "0", 0),
    ("port", "65535", 65535),
    ("management_port", "9090", 9090),
    ("metrics", "management", "management"),
    ("metrics", "public", "public"),
    ("event_retention_days", "0", 0),
    ("event_retention_days", "36500", 36_500),
    (
        "trusted_proxies",
        "10.0.0.0/8, 2001:db8::1,10.0.0.0/8",
        (ip_network("10.0.0.0/8"), ip_network("2001:db8::1/128")),
    ),
    ("trusted_proxies", "fc00::/7", (ip_network("fc00::/7"),)),
    ("proxy_protocol", "true", True),
    ("public_url", "https://passkeys.example.com/", "https://passkeys.example.com"),
    ("public_url", "http://localhost:8080/broker", "http://localhost:8080/broker"),
    ("docs_url", "https://docs.example.com/refusals/", "https://docs.example.com/refusals/"),
    ("app", "Bücher", "Bücher"),
    ("dialects", "flex", ("flex",)),
    ("dialects", "propelauth,flex,propelauth", ("propelauth", "flex")),
    ("secret_key", S1, (S1,)),
    ("secret_key", f"{S1},{S2},{S1}", (S1, S2)),
    ("receipt_token_life", "3600", 3600),
    ("hanko_token_life", "10", 10),
    ("hanko_token_life", "3600", 3600),
    ("passlock_token_life", "300", 300),
    ("passlock_code_life", "600", 600),
    ("store_timeout", "0.05", 0.05),
    ("store_timeout", "1.5", 1.5),
    ("database_connections", "1", 1),
    ("database_connections", "500", 500),
    ("redis_connections", "2000", 2000),
    ("one_time", "postgres", "postgres"),
    ("cache_seconds", "0", 0.0),
    ("cache_seconds", "1", 1.0),
    ("max_connections", "16", 16),
    ("max_requests", "1", 1),
    ("lame_duck_seconds", "0", 0.0),
    ("drain_seconds", "60", 60.0),
    ("log_level", "debug", "debug"),
    ("begin_rate", "600/min:300", "600/min:300"),
    ("begin_rate", "0", "0"),
    ("discoverable_rate", "7/min:1", "7/min:1"),
    ("keyed_rate", "1000/s:999999999", "1000/s:999999999"),
    ("unknown_finish_rate", "60000/min:2", "60000/min:2"),
    ("traces", "off", "off"),
    ("traces", "otlp", "otlp"),
]
BAD: list[tuple[str, str]] = [
    ("database_url", "mysql://h/x"),
    ("database_url", "db.example/x"),
    ("database_url", "postgresql://u:zq/9w@h/x"),
    ("database_url", "postgresql://u:12/zq9w@h/x"),
    ("database_url", "postgresql://u:zq#9w@h/x"),
    ("database_url", "postgresql://u:12#zq9w@h/x"),
    ("database_url", "postgresql://u:12?zq9w@h/x"),
    ("database_url", "postgresql://u:zq[9w@h/x"),
    ("database_url", "postgresql://u:zq9w℀@h/x"),
    ("database_url", "postgresql://u:zq9w@h:1x/x"),
    ("database_url", "postgresql://u:zq9w@h:0/x"),
    ("database_url", "postgresql://u:zq9w@h:65536/x"),
    ("database_url", "postgresql://u:zq9w@h/x?port=y"),
    ("database_url", "postgresql://u:zq9w@h/x?connect_timeout=10"),
    ("database_url", "postgresql://u:zq9w@h/x?sslmode=requre"),
    ("database_url", "postgresql://u@h/x?sslrootcert=zq9w"),
    ("database_url", "postgresql://u@h/x?sslmode=prefer&sslrootcert=zq9w"),
    ("database_url", "postgresql://u:zq9w@h/x\n"),
    ("database_url", "postgresql://u:zq 9w@h/x"),
    ("redis_url", "http://h"),
    ("redis_url", "redis://:zq/9w@h/0"),
    ("redis_url", "redis://h/zq9w"),
    ("redis_url", "redis://h/0?zq9w"),
    ("redis_url", "redis://h/0?socket_timeout=zq9w"),
    ("redis_url", "redis://h/0?ssl_ca_certs=/ca"),
    ("redis_url", "redis://h/?db=zq9w"),
    ("redis_url", "redis+cluster://h/1"),
    ("redis_url", "unix://"),
    ("redis_url", "redis://:zq9w@a:1,b:2"),
    ("redis_url", "rediss://a,b/0"),
    ("redis_url", "unix://a,b/run/valkey.sock"),
    ("redis_url", "redis+cluster://a:1,,b:2"),
    ("redis_url", "redis+sentinel://a:1,,b:2/main"),
    ("redis_url", "redis+sentinel://a:1/"),
    ("redis_url", "redis+sentinel://a:1/main?sentinel_tls=zq9w"),
    ("redis_url", "redis+sentinel://a:1/main?sentinel_db=1"),
    ("redis_url", "redis+sentinel://a:1/main?sentinel_ssl_ca_certs=zq9w"),
    ("redis_url", "rediss+sentinel://a:1/main?sentinel_tls=no&sentinel_ssl_ca_certs=zq9w"),
    ("redis_url", "redis+sentinel://a:1/main?sentinel_tls=yes&sentinel_tls=no"),
    ("redis_url", "rediss://h/0?ssl_cert_reqs=zq9w"),
    ("redis_url", "redis+cluster://a:1,b:zq9w"),
    ("host", "a..b"),
    ("host", "a b"),
    ("host", "bücher.example"),
    ("host", "x" * 64),
    ("port", "-1"),
    ("port", "65536"),
    ("port", "8080.0"),
    ("port", "٨٠"),
    ("port", "9" * 5000),
    ("management_port", "http"),
    ("metrics", "none"),
    ("event_retention_days", "36501"),
    ("event_retention_days", "-1"),
    ("trusted_proxies", "proxy.example"),
    ("trusted_proxies", "10.0.0.9/8"),
    ("trusted_proxies", "10.0.0.0/33"),
    ("trusted_proxies", "0.0.0.0/0"),
    ("trusted_proxies", "10.0.0.0/8,128.0.0.0/1"),
    ("trusted_proxies", "::/0"),
    ("proxy_protocol", "yes"),
    ("public_url", "passkeys.example.com"),
    ("public_url", "ftp://h"),
    ("public_url", "https://"),
    ("public_url", "https://u:zq9w@h"),
    ("public_url", "https://h/?q"),
    ("public_url", "https://h/#f"),
    ("public_url", "https://[h"),
    ("docs_url", "docs.example.com"),
    ("docs_url", "https://docs.example.com/#zq"),
    ("docs_url", "https://docs.example.com/ 9w"),
    ("app", "zq\n9w"),
    ("app", "x" * 129),
    ("dialects", "flex zq"),
    ("dialects", "flex,"),
    ("dialects", "Flex9w"),
    ("secret_key", "zq9w" + "abcdefghijklmnopqrstuvwxyz" + "1"),
    ("secret_key", "9w" * 32),
    ("secret_key", f"{S1},zq9w"),
    ("secret_key", f"{S1},"),
    ("secret_key", f"{S1} zq9w"),
    ("secret_key", S1 + "zq9w\n"),
    ("secret_key", S1 + "zq9wé"),
    ("receipt_token_life", "9"),
    ("hanko_token_life", "9"),
    ("hanko_token_life", "3601"),
    ("passlock_token_life", "5m"),
    ("passlock_code_life", "601"),
    ("store_timeout", "0.04"),
    ("store_timeout", "1.51"),
    ("store_timeout", "nan"),
    ("store_timeout", "inf"),
    ("store_timeout", "1e0"),
    ("database_connections", "0"),
    ("database_connections", "501"),
    ("redis_connections", "0"),
    ("one_time", "Term"),
    ("cache_seconds", "1.01"),
    ("cache_seconds", "-0.1"),
    ("max_connections", "15"),
    ("max_requests", "0"),
    ("lame_duck_seconds", "61"),
    ("drain_seconds", "61"),
    ("drain_seconds", "ten"),
    ("log_level", "INFO"),
    ("traces", "on"),
    *(
        (f"{name}_rate", text)
        for name in ("begin", "discoverable", "keyed", "unknown_finish")
        for text in ("default", "zq9w", "10/s", "10/s:0", "0/s:1", "1001/s:1", "1/s:1 ")
    ),
]


DECLARED = {setting.name: setting for dialect in DIALECTS for setting in dialect.settings}


def value_of(settings: Settings, name: str) -> object:
    return settings[DECLARED[name]] if name in DECLARED else getattr(settings, name)


def load(**changes: str) -> Settings:
    return load_settings(STORES | {PREFIX + name.upper(): value for name, value in changes.items()})


@pytest.mark.parametrize(("name", "text", "value"), GOOD)
def test_takes(name: str, text: str, value: object) -> None:
    loaded = value_of(load(**{name: text}), name)
    assert loaded == value
    assert type(loaded) is type(value)


@pytest.mark.parametrize(("name", "text"), BAD)
def test_refuses_with_a_sentence_that_quotes_nothing(name: str, text: str) -> None:
    with pytest.raises(SettingsFault) as caught:
        load(**{name: text})
    (sentence,) = caught.value.faults
    assert re.fullmatch(rf"BROKER_{name.upper()} (must be|has) [^\n]+\.", sentence)
    assert "zq" not in str(caught.value)
    assert "9w" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_the_tables_have_every_setting() -> None:
    names = {f.name for f in fields(Settings) if f.metadata} | DECLARED.keys()
    assert {name for name, *_ in GOOD} == names
    assert {name for name, _ in BAD} == names


def test_tells_every_fault_at_once() -> None:
    environment = {
        "BROKER_DATABASE_URL": "mysql://h",
        "BROKER_PORT": "x",
        "BROKER_LOG_LEVEL": "loud",
        "BROKER_PROT": "8080",
        "HOME": "elsewhere",
        "PORT": "not ours",
    }
    with pytest.raises(SettingsFault) as caught:
        Settings.load(environment)
    assert caught.value.faults == (
        "BROKER_DATABASE_URL must be a URL that begins with postgresql:// or postgres://.",
        "BROKER_PORT must be a whole number from 0 to 65535.",
        "BROKER_LOG_LEVEL must be one of debug, info, warning, error.",
        "BROKER_REDIS_URL is missing.",
        "BROKER_PROT is not a setting.",
    )


def test_an_unknown_variable_is_no_fault() -> None:
    """An older release meets a newer one's settings after a roll-back."""
    assert load(prot="8080", newer="x").unknown == ("BROKER_NEWER", "BROKER_PROT")
    assert load().unknown == ()


SERVICES = {  # https://kubernetes.io/docs/concepts/services-networking/service/#environment-variables
    f"{name}{end}": value
    for name in ("BROKER", "BROKER_MANAGEMENT")
    for end, value in {
        "_SERVICE_HOST": "10.0.0.11",
        "_SERVICE_PORT": "8080",
        "_SERVICE_PORT_HTTP": "8080",
        "_PORT": "tcp://10.0.0.11:8080",
        "_PORT_8080_TCP": "tcp://10.0.0.11:8080",
        "_PORT_8080_TCP_PROTO": "tcp",
        "_PORT_8080_TCP_PORT": "8080",
        "_PORT_8080_TCP_ADDR": "10.0.0.11",
    }.items()
}


def test_what_kubernetes_adds_for_a_service_is_ignored() -> None:
    assert load_settings(STORES | SERVICES) == load()
    with pytest.raises(SettingsFault, match="BROKER_PORT must be a whole number"):
        load(port="http://10.0.0.11:8080")


def test_only_what_is_needed_may_be_missing() -> None:
    with pytest.raises(SettingsFault) as caught:
        Settings.load({})
    assert caught.value.faults == (
        "BROKER_DATABASE_URL is missing.",
        "BROKER_REDIS_URL is missing.",
    )
    assert Settings.load({}, needed=()) == Settings()
    one = {"BROKER_DATABASE_URL": STORES["BROKER_DATABASE_URL"]}
    assert Settings.load(one, needed=("database_url",)).redis_url == ""


def test_a_secret_may_be_in_a_file(tmp_path: Path) -> None:
    files = {}
    for name, content in (STORES | {"BROKER_SECRET_KEY": f"{S1},{S2}"}).items():
        (tmp_path / name).write_text(f"{content}\n")
        files[f"{name}_FILE"] = str(tmp_path / name)
    assert load_settings(files | {"BROKER_PORT": "1"}) == load(secret_key=f"{S1},{S2}", port="1")
    assert load(secret_key_file="") == load()


def test_a_setting_that_is_no_secret_has_no_file() -> None:
    assert load(port_file="/dev/null").unknown == ("BROKER_PORT_FILE",)


def test_faults_of_a_secret_s_file_are_told_with_the_others(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("zq9w")
    (tmp_path / "empty").write_text("\n")
    environment = {
        "BROKER_DATABASE_URL_FILE": str(tmp_path / "empty"),
        "BROKER_REDIS_URL": STORES["BROKER_REDIS_URL"],
        "BROKER_REDIS_URL_FILE": str(tmp_path / "key"),
        "BROKER_SECRET_KEY_FILE": str(tmp_path / "absent"),
        "BROKER_PORT": "x",
    }
    with pytest.raises(SettingsFault) as caught:
        load_settings(environment)
    assert caught.value.faults == (
        "BROKER_DATABASE_URL_FILE names an empty file.",
        "BROKER_REDIS_URL_FILE and BROKER_REDIS_URL are both set; remove one.",
        "BROKER_SECRET_KEY_FILE can't be read (FileNotFoundError).",
        "BROKER_PORT must be a whole number from 0 to 65535.",
    )


def test_the_content_of_a_secret_s_file_is_not_quoted(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("zq9w")
    with pytest.raises(SettingsFault, match="BROKER_SECRET_KEY must be a random text") as caught:
        load(secret_key_file=str(tmp_path / "key"))
    assert "zq9w" not in str(caught.value)


def test_an_empty_value_is_the_default() -> None:
    assert load(port="", host="", log_level="", public_url="") == load()


def test_the_two_ports_differ() -> None:
    with pytest.raises(
        SettingsFault, match="BROKER_MANAGEMENT_PORT must not be the port of BROKER_PORT"
    ):
        load(port="9000", management_port="9000")
    with pytest.raises(SettingsFault, match="BROKER_MANAGEMENT_PORT"):
        load(management_port="8080")
    assert load(port="0", management_port="0").management_port == 0


def test_old_deployments_need_no_new_setting() -> None:
    """Two URLs have been enough from the start, and must stay so."""
    settings = Settings.load(STORES)
    assert (settings.host, settings.port, settings.management_port) == ("localhost", 8080, 0)
    assert (settings.metrics, settings.metrics_at) == ("management", "nowhere")


def test_repr_hides_secrets() -> None:
    settings = load(
        database_url="postgresql://u:zq9w@h/x", redis_url="redis://:zq9w@h", secret_key=f"{S2},{S1}"
    )
    assert "zq9w" not in repr(settings)
    assert "zq9w" not in str(settings)
    assert S2 not in repr(settings)
    assert "port=8080" in repr(settings)

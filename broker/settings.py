"""Environment to one frozen `Settings`.

Every setting begins with `BROKER_`; a new one has a default that keeps old deployments running. All
faults are found in one pass and reported together, because an operator who mends one at a time
restarts the service once per fault. Values that carry a secret (the URLs of the stores, the secret
key) are left out of `repr`, and no sentence quotes a value.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal
from urllib.parse import SplitResult, parse_qsl, urlsplit

PREFIX = "BROKER_"
TOKEN_LIFE_LIMIT = 3600  # seconds: no setting lets a signed token live longer


class SettingsFault(Exception):
    """One or more settings can't be used; `faults` has a sentence for each."""

    def __init__(self, faults: list[str]) -> None:
        self.faults = tuple(faults)
        super().__init__(" ".join(faults))


# What a store's driver does with an option it doesn't know is a fault at the first connection: too
# late, and quoting the URL.
_TARGET = frozenset(("host", "port", "dbname", "database", "user", "password", "passfile"))
_SSL = {"sslmode", "sslcert", "sslkey", "sslrootcert", "sslcrl", "sslpassword", "sslnegotiation"}
_SESSION = {"target_session_attrs", "search_path", "statement_timeout", "lock_timeout", "options"}
_POSTGRES = dict.fromkeys(("postgresql", "postgres"), _TARGET | _SSL | _SESSION)
_PLAIN = frozenset(("db", "username", "password"))
_TLS = _PLAIN | {
    "ssl_cert_reqs",
    "ssl_ca_certs",
    "ssl_certfile",
    "ssl_keyfile",
    "ssl_check_hostname",
}
_REDIS = {
    "redis": _PLAIN,
    "rediss": _TLS,
    "unix": _PLAIN,
    "redis+cluster": _PLAIN,
    "rediss+cluster": _TLS,
}
_ONE_HOST = frozenset(("redis", "rediss", "unix"))
_HOST_AND_PORT = re.compile(r"(?:\[[^\[\]@]+\]|[^\[\]:@]*)(?::([0-9]{1,5}))?")
_PATH = {
    "redis": re.compile(r"(/[0-9]{0,5})?"),
    "rediss": re.compile(r"(/[0-9]{0,5})?"),
    "redis+cluster": re.compile(r"/?"),  # a cluster has one database
    "rediss+cluster": re.compile(r"/?"),
    "unix": re.compile(r"/[^@]+"),
}
_ANY_PATH = re.compile(r"[^@]*")


def _url(example: str, options: Mapping[str, frozenset[str]]) -> Callable[[str], str]:
    """A store's URL; `options` maps schemes to what may stand behind the `?`.

    What is wrong is never quoted: after a bad escape any part of a URL may be a piece of the
    password.
    """

    def parse(text: str) -> str:
        try:
            parts = urlsplit(text)
            given = parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
        except ValueError:
            raise ValueError(malformed) from None
        if parts.scheme not in options:
            raise ValueError(
                f"must be a URL that begins with {' or '.join(s + '://' for s in options)}"
            )
        if not text.isprintable() or " " in text or "#" in text or not _target_is_sound(parts):
            raise ValueError(malformed)
        known = options[parts.scheme]
        if any(name not in known for name, _ in given):
            raise ValueError(f"has an option other than {', '.join(sorted(known))}")
        if parts.scheme in _ONE_HOST and "," in parts.netloc.rpartition("@")[2]:
            raise ValueError(
                "has several hosts, which only redis+cluster:// and rediss+cluster:// take"
            )
        if not all(
            re.fullmatch(r"[0-9]{1,5}", value) for name, value in given if name in ("port", "db")
        ):
            raise ValueError(malformed)
        return text

    malformed = f"must be a URL like {example}, with reserved characters of the password as %XX"
    return parse


def _target_is_sound(parts: SplitResult) -> bool:
    """Hosts, ports and path. An `@` behind the host is a password with an unescaped `/`."""
    given = parts.netloc.rpartition("@")[2].split(",")
    hosts = [_HOST_AND_PORT.fullmatch(host) for host in given]
    if len(given) > 1 and not all(given):
        return False
    return (
        all(host and 0 < int(host[1] or 1) <= 65535 for host in hosts)
        and _PATH.get(parts.scheme, _ANY_PATH).fullmatch(parts.path) is not None
    )


def _host(text: str) -> str:
    for name in text.split(","):
        labels = name.removesuffix(".").split(".")
        if not re.fullmatch(r"[A-Za-z0-9._:%-]+", name) or (
            ":" not in name and not all(1 <= len(label) <= 63 for label in labels)
        ):
            raise ValueError("must be a host name or an IP address, like localhost, 0.0.0.0 or ::")
    return text


def _public_url(text: str) -> str:
    if not _is_web_address(text):
        raise ValueError("must be the address callers use, like https://passkeys.example.com")
    return text.rstrip("/")


def _page(text: str) -> str:
    if not _is_web_address(text):
        raise ValueError("must be a page's address, like https://docs.example.com/troubleshooting")
    return text


def _is_web_address(text: str) -> bool:
    try:
        parts = urlsplit(text)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False
    return usable and text.isprintable() and not any(character in text for character in "@?# ")


def _text(text: str) -> str:
    if len(text) > 128 or not text.isprintable():
        raise ValueError("must be an app's id or name")
    return text


def _whole(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,9}", text) or not low <= int(text) <= high:
            raise ValueError(f"must be a whole number from {low} to {high}")
        return int(text)

    return parse


def _seconds(low: float, high: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", text) or not low <= float(text) <= high:
            raise ValueError(f"must be a number of seconds from {low:g} to {high:g}")
        return float(text)

    return parse


def _choice(*choices: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in choices:
            raise ValueError(f"must be one of {', '.join(choices)}")
        return text

    return parse


def _names(text: str) -> tuple[str, ...]:
    if not re.fullmatch(r"[a-z]{1,32}(,[a-z]{1,32})*", text):
        raise ValueError("must be names of dialects with commas between, like flex,propelauth")
    return tuple(dict.fromkeys(text.split(",")))


def _secrets(text: str) -> tuple[str, ...]:
    # Short ones can be guessed, and so can those that are one character over and over.
    given = text.split(",")
    if not all(
        re.fullmatch(r"[!-+\--~]{32,512}", secret) and len(set(secret)) > 7 for secret in given
    ):
        raise ValueError(
            "must be a random text of at least 32 characters, or several with commas between"
        )
    return tuple(dict.fromkeys(given))


def _setting(parse: Callable[[str], Any], default: Any, *, secret: bool = False) -> Any:
    return field(default=default, repr=not secret, metadata={"parse": parse})


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a process needs to know. Names in the environment: `BROKER_` and the field in
    capitals.
    """

    database_url: str = _setting(
        _url("postgresql://user:password@host:5432/name", _POSTGRES), "", secret=True
    )
    redis_url: str = _setting(_url("redis://user:password@host:6379/0", _REDIS), "", secret=True)
    host: str = _setting(_host, "localhost")
    port: int = _setting(_whole(0, 65535), 8080)
    management_port: int = _setting(_whole(0, 65535), 0)  # 0: keyed routes share `port`
    metrics: str = _setting(
        _choice("management", "public"), "management"
    )  # which port may serve them
    workers: int = _setting(_whole(1, 64), 1)  # processes of `serve`
    public_url: str = _setting(_public_url, "")
    docs_url: str = _setting(_page, "")  # the page of refusal codes
    app: str = _setting(_text, "")  # which commands of `broker` act on
    dialects: tuple[str, ...] = _setting(_names, ())  # which answer; none named: all
    secret_key: tuple[str, ...] = _setting(
        _secrets, (), secret=True
    )  # the first seals keys, all open them
    receipt_token_life: int = _setting(
        _whole(10, TOKEN_LIFE_LIMIT), 300
    )  # seconds; of a signed receipt
    hanko_token_life: int = _setting(_whole(10, TOKEN_LIFE_LIMIT), 300)  # seconds; the vendor's own
    passlock_token_life: int = _setting(
        _whole(10, TOKEN_LIFE_LIMIT), 300
    )  # seconds; the vendor states none
    passlock_code_life: int = _setting(_whole(10, 600), 300)  # seconds; the vendor's own
    store_timeout: float = _setting(_seconds(0.05, 1.5), 0.8)  # limit of one wait for a store
    database_connections: int = _setting(_whole(1, 500), 16)
    redis_connections: int = _setting(_whole(1, 2000), 64)  # without effect, of old deployments
    cache_seconds: float = _setting(
        _seconds(0, 1), 0.9
    )  # how long an app or a key may be remembered
    event_retention_days: int = _setting(_whole(0, 36_500), 90)  # 0: events stay for ever
    drain_seconds: float = _setting(_seconds(0, 60), 10)
    log_level: str = _setting(_choice("debug", "info", "warning", "error"), "info")

    @property
    def metrics_at(self) -> Literal["management", "public", "nowhere"]:
        """The port that serves `/metrics`. `public` is a port that pages reach, and counts only
        without a management port.
        """
        if self.management_port:
            return "management"
        return "public" if self.metrics == "public" else "nowhere"

    @classmethod
    def load(
        cls,
        environment: Mapping[str, str],
        *,
        needed: Sequence[str] = ("database_url", "redis_url"),
    ) -> Settings:
        """Read `environment`; the settings in `needed` must be there.

        Raises:
            SettingsFault: with a sentence for every missing, malformed or unknown `BROKER_`
                variable.
        """
        faults: list[str] = []
        values: dict[str, Any] = {}
        known = {PREFIX + f.name.upper(): f for f in fields(cls)}
        for name, text in environment.items():
            if not name.startswith(PREFIX):
                continue
            if name not in known:
                faults.append(f"{name} is not a setting.")
            elif text != "":
                try:
                    values[known[name].name] = known[name].metadata["parse"](text)
                except ValueError as fault:
                    faults.append(f"{name} {fault}.")
        for name in needed:
            if not values.get(name) and not any(
                f.startswith(PREFIX + name.upper()) for f in faults
            ):
                faults.append(f"{PREFIX}{name.upper()} is missing.")
        if faults:
            raise SettingsFault(faults)
        settings = cls(**values)
        if settings.management_port and settings.management_port == settings.port:
            raise SettingsFault(["BROKER_MANAGEMENT_PORT must not be the port of BROKER_PORT."])
        return settings

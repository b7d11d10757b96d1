"""Settings: the environment as one frozen object.

The name of every setting begins with `BROKER_`. A new setting has a default that keeps old
deployments running. A variable that names no setting is kept for a warning: an older release meets
the settings of a newer one after a roll-back. Variables that Kubernetes adds for a Service called
`broker` are ignored. All faults are found in one pass and reported together, because an operator
who mends one fault at a time restarts the service once per fault. `repr` omits values that carry a
secret (the URLs of the stores, the secret key), and no sentence quotes a value. A secret may be in
a file instead, which `BROKER_…_FILE` names: other processes can read an environment.

A setting of the core is a field of `Settings`. A setting of a dialect is a `Setting` in the
dialect's package.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from typing import Any, Generic, Literal, NamedTuple, TypeVar, cast, get_args
from urllib.parse import SplitResult, parse_qsl, urlsplit

from broker.model.values import SWITCH, choice, items, rate, whole

T = TypeVar("T")
OneTimeMode = Literal["term", "postgres"]  # what decides the take of a one-time value
PREFIX = "BROKER_"
_FILE = "_FILE"
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
_TLS_MODES = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")
_PLAIN = frozenset(("db", "username", "password"))
_TLS = _PLAIN | {
    "ssl_cert_reqs",
    "ssl_ca_certs",
    "ssl_certfile",
    "ssl_keyfile",
    "ssl_check_hostname",
}
_SENTINEL = {f"sentinel_{name}" for name in _TLS - {"db"}} | {"sentinel_tls"}
_REDIS = {
    "redis": _PLAIN,
    "rediss": _TLS,
    "unix": _PLAIN,
    "redis+cluster": _PLAIN,
    "rediss+cluster": _TLS,
    "redis+sentinel": _PLAIN | _SENTINEL,
    "rediss+sentinel": _TLS | _SENTINEL,
}
_ONE_HOST = frozenset(("redis", "rediss", "unix"))
_HOST_AND_PORT = re.compile(r"(?:\[[^\[\]@]+\]|[^\[\]:@]*)(?::([0-9]{1,5}))?")
_PATH = {
    "redis": re.compile(r"(/[0-9]{0,5})?"),
    "rediss": re.compile(r"(/[0-9]{0,5})?"),
    "redis+cluster": re.compile(r"/?"),  # a cluster has one database
    "rediss+cluster": re.compile(r"/?"),
    "redis+sentinel": re.compile(r"/[A-Za-z0-9._-]{1,128}"),  # the name of the primary
    "rediss+sentinel": re.compile(r"/[A-Za-z0-9._-]{1,128}"),
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
            raise ValueError(f"a URL that begins with {' or '.join(s + '://' for s in options)}")
        if not text.isprintable() or " " in text or "#" in text or not _target_is_sound(parts):
            raise ValueError(malformed)
        known = options[parts.scheme]
        if any(name not in known for name, _ in given):
            raise ValueError(f"a URL without an option other than {', '.join(sorted(known))}")
        if parts.scheme in _ONE_HOST and "," in parts.netloc.rpartition("@")[2]:
            raise ValueError(
                "a URL with one host; those of redis+sentinel:// and redis+cluster:// take several"
            )
        if len({name for name, _ in given}) < len(given):
            raise ValueError("a URL that names no option twice")
        if fault := _tls_fault(parts.scheme, dict(given)):
            raise ValueError(fault)
        numbers = [value for name, value in given if name in ("port", "db")]
        if not all(re.fullmatch(r"[0-9]{1,5}", number) for number in numbers):
            raise ValueError(malformed)
        return parts.scheme + text[len(parts.scheme) :]  # in lower case, as drivers want it

    malformed = f"a URL like {example}, with reserved characters of the password as %XX"
    return parse


def _tls_fault(scheme: str, given: Mapping[str, str]) -> str:
    """The requirement that a URL's TLS options break, as a noun phrase; "" if they break none. An
    option that has no effect would hide that the connection is not encrypted.
    """
    mode = given.get("sslmode", "prefer").replace("_", "-")  # asyncpg takes either
    if mode not in _TLS_MODES:
        return f"a URL whose sslmode is one of {', '.join(_TLS_MODES)}"
    if "sslrootcert" in given and mode in ("disable", "allow", "prefer"):
        return "a URL with sslmode=verify-full, or without sslrootcert"
    tls = given.get("sentinel_tls", "yes" if scheme == "rediss+sentinel" else "no")
    if tls not in ("yes", "no"):
        return "a URL whose sentinel_tls is yes or no"
    if tls == "no" and any(name.startswith("sentinel_ssl_") for name in given):
        return "a URL with sentinel_tls=yes, or without options that begin with sentinel_ssl_"
    checks = {given[name] for name in ("ssl_cert_reqs", "sentinel_ssl_cert_reqs") if name in given}
    if not checks <= {"required", "optional", "none"}:
        return "a URL whose ssl_cert_reqs is required, optional or none"
    return ""


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


# Environment variables that Kubernetes adds for a Service called `broker`, or `broker-…`:
# https://kubernetes.io/docs/concepts/services-networking/service/#environment-variables
_SERVICE = re.compile(
    r"BROKER_(\w+_)?(SERVICE_(HOST|PORT(_\w+)?)|PORT_[0-9]+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)"
)
_SERVICE_PORT = re.compile(r"(tcp|udp|sctp)://[^/@]+:[0-9]+")


def _is_of_kubernetes(variable: str, text: str) -> bool:
    return bool(
        _SERVICE.fullmatch(variable)
        or (variable.endswith("_PORT") and _SERVICE_PORT.fullmatch(text))
    )


def _host(text: str) -> str:
    for name in text.split(","):
        labels = name.removesuffix(".").split(".")
        if not re.fullmatch(r"[A-Za-z0-9._:%-]+", name) or (
            ":" not in name and not all(1 <= len(label) <= 63 for label in labels)
        ):
            raise ValueError("a host name or an IP address, like localhost, 0.0.0.0 or ::")
    return text


def _web_address(noun: str, end: str = "") -> Callable[[str], str]:
    """The address of a page or a service; a last character `end` is removed."""

    def parse(text: str) -> str:
        try:
            parts = urlsplit(text)
            usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:
            usable = False
        if not usable or not text.isprintable() or any(c in text for c in "@?# "):
            raise ValueError(noun)
        return text.rstrip(end)

    return parse


def _text(text: str) -> str:
    if len(text) > 128 or not text.isprintable():
        raise ValueError("an app's id or name")
    return text


def _seconds(low: float, high: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", text) or not low <= float(text) <= high:
            raise ValueError(f"a number of seconds from {low:g} to {high:g}")
        return float(text)

    return parse


def _names(text: str) -> tuple[str, ...]:
    if not re.fullmatch(r"[a-z]{1,32}(,[a-z]{1,32})*", text):
        raise ValueError("names of dialects with commas between, like flex,propelauth")
    return tuple(dict.fromkeys(text.split(",")))


_WIDEST = {4: 8, 6: 7}  # bits of the widest private networks: 10.0.0.0/8 and fc00::/7


def _networks(text: str) -> tuple[IPv4Network | IPv6Network, ...]:
    try:
        networks = tuple(dict.fromkeys(ip_network(item) for item in items(text)))
    except ValueError:
        raise ValueError(
            "networks with commas between, like 10.0.0.0/8,2001:db8::1, without host bits"
        ) from None
    if any(network.prefixlen < _WIDEST[network.version] for network in networks):
        raise ValueError(
            "networks of /8 or narrower (IPv6: /7), because a caller inside chooses its address;"
            " for a load balancer without a fixed address name its subnets, like 10.0.0.0/8"
        )
    return networks


def _secrets(text: str) -> tuple[str, ...]:
    # A short secret can be guessed, and so can a secret of few different characters.
    given = text.split(",")
    if not all(
        re.fullmatch(r"[!-+\--~]{32,512}", secret) and len(set(secret)) > 7 for secret in given
    ):
        raise ValueError("a random text of at least 32 characters, or several with commas between")
    return tuple(dict.fromkeys(given))


class Setting(NamedTuple, Generic[T]):
    """The declaration of one setting of a dialect. The parser raises ValueError with what it takes
    as a noun phrase.
    """

    name: str
    default: T
    parse: Callable[[str], T]
    meaning: str


def _setting(parse: Callable[[str], Any], default: Any, *, secret: bool = False) -> Any:
    """A field of `Settings` that is a setting of the core."""
    return field(default=default, repr=not secret, metadata={"parse": parse})


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The settings of a process. The name of a variable is `BROKER_` and the setting's name in
    capitals.
    """

    database_url: str = _setting(
        _url("postgresql://user:password@host:5432/name", _POSTGRES), "", secret=True
    )
    redis_url: str = _setting(_url("redis://user:password@host:6379/0", _REDIS), "", secret=True)
    host: str = _setting(_host, "localhost")
    port: int = _setting(whole(0, 65535), 8080)
    management_port: int = _setting(whole(0, 65535), 0)  # 0: keyed routes share `port`
    metrics: str = _setting(choice("management", "public"), "management")  # the port of /metrics
    # Networks of the proxies whose X-Forwarded-For or Forwarded header counts.
    trusted_proxies: tuple[IPv4Network | IPv6Network, ...] = _setting(_networks, ())
    proxy_protocol: bool = _setting(SWITCH, False)  # every connection to `port` begins with it
    public_url: str = _setting(
        _web_address("the address callers use, like https://passkeys.example.com", "/"), ""
    )
    docs_url: str = _setting(  # the page of refusal codes
        _web_address("a page's address, like https://docs.example.com/troubleshooting"), ""
    )
    app: str = _setting(_text, "")  # the app that commands of `broker` act on
    dialects: tuple[str, ...] = _setting(_names, ())  # those that answer; none named: all
    # The first seals keys, and all open them.
    secret_key: tuple[str, ...] = _setting(_secrets, (), secret=True)
    store_timeout: float = _setting(_seconds(0.05, 1.5), 0.8)  # limit of one wait for a store
    database_connections: int = _setting(whole(1, 500), 16)
    redis_connections: int = _setting(whole(1, 2000), 64)  # no effect: old deployments set it
    one_time: str = _setting(choice(*get_args(OneTimeMode)), "term")
    cache_seconds: float = _setting(_seconds(0, 1), 0.9)  # that an app or a key stays cached
    event_retention_days: int = _setting(whole(0, 36_500), 90)  # 0: events stay for ever
    max_connections: int = _setting(whole(16, 1_000_000), 4096)  # of one port
    max_requests: int = _setting(whole(1, 1_000_000), 2048)  # in flight, of one port
    lame_duck_seconds: float = _setting(_seconds(0, 60), 5)  # SIGTERM: serves on, not ready
    drain_seconds: float = _setting(_seconds(0, 60), 10)
    log_level: str = _setting(choice("debug", "info", "warning", "error"), "info")
    traces: str = _setting(choice("off", "otlp"), "off")  # otlp needs the extra `otel`
    # Rate limits (`broker.ephemeral.rate_limits`): requests, and how many at once; 0: no limit.
    begin_rate: str = _setting(rate, "600/min:300")
    discoverable_rate: str = _setting(rate, "600/min:300")
    keyed_rate: str = _setting(rate, "200/s:400")
    unknown_finish_rate: str = _setting(rate, "60/min:60")
    # The values of the dialects' settings. A setting that is missing has its default.
    declared: Mapping[str, object] = field(default_factory=dict, repr=False)
    unknown: tuple[str, ...] = ()  # names of variables that name no setting
    # The files of secrets, by the setting's name.
    files: Mapping[str, Path] = field(default_factory=dict, compare=False)

    def __getitem__(self, setting: Setting[T]) -> T:
        """The value of a dialect's setting."""
        return cast("T", self.declared.get(setting.name, setting.default))

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
        declared: Sequence[Setting[Any]] = (),
    ) -> Settings:
        """Read `environment`; the settings in `needed` must be there. `declared` are the settings
        of dialects.

        Raises:
            SettingsFault: with a sentence for every missing or malformed `BROKER_` variable, and
                then for every unknown one too.
        """
        faults: list[str] = []
        unknown: list[str] = []
        paths = {n: environment.get(PREFIX + n.upper() + _FILE) for n in _secret_names()}
        try:
            environment = with_secrets(environment)
        except SettingsFault as fault:
            faults += fault.faults
        values: dict[str, Any] = {}
        parsers = {f.name: f.metadata["parse"] for f in fields(cls) if f.metadata}
        parsers |= {setting.name: setting.parse for setting in declared}
        known = {PREFIX + name.upper(): name for name in parsers}
        files = {PREFIX + name.upper() + _FILE for name in paths}
        for variable, text in environment.items():
            if not variable.startswith(PREFIX) or _is_of_kubernetes(variable, text):
                continue
            if variable in files:
                continue
            if variable not in known:
                unknown.append(variable)
            elif text != "":
                try:
                    values[known[variable]] = parsers[known[variable]](text)
                except ValueError as fault:
                    faults.append(f"{variable} must be {fault}.")
        for name in needed:
            variable = PREFIX + name.upper()
            if not values.get(name) and not any(f.startswith(variable) for f in faults):
                faults.append(f"{variable} is missing.")
        if faults:  # an unknown variable may be the misspelt name of a missing one
            raise SettingsFault([*faults, *(f"{name} is not a setting." for name in unknown)])
        settings = cls(
            declared={s.name: values.pop(s.name) for s in declared if s.name in values},
            unknown=tuple(sorted(unknown)),
            files={name: Path(path) for name, path in paths.items() if path},
            **values,
        )
        if settings.management_port and settings.management_port == settings.port:
            raise SettingsFault(["BROKER_MANAGEMENT_PORT must not be the port of BROKER_PORT."])
        return settings


def _secret_names() -> list[str]:
    return [f.name for f in fields(Settings) if f.metadata and not f.repr]


def with_secrets(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment, with the content of each secret's file in place of the file's name.

    Raises:
        SettingsFault: a file can't be read, or a secret is also given by itself.
    """
    found, faults = dict(environment), []
    for name in _secret_names():
        variable = PREFIX + name.upper()
        path = found.pop(variable + _FILE, "")
        if path and found.get(variable):
            faults.append(f"{variable}{_FILE} and {variable} are both set; remove one.")
        elif path:
            try:
                found[variable] = _content(variable, Path(path))
            except SettingsFault as fault:
                faults += fault.faults
    if faults:
        raise SettingsFault(faults)
    return found


def _content(variable: str, path: Path) -> str:
    try:
        content = path.read_text("utf-8").strip()
    except (OSError, ValueError) as fault:
        raise SettingsFault(
            [f"{variable}{_FILE} can't be read ({type(fault).__name__})."]
        ) from None
    if not content:
        raise SettingsFault([f"{variable}{_FILE} names an empty file."])
    return content


class Secrets:
    """Rotation of secrets: the values in use, replaced while the process runs by what their files
    hold.

    Each new connection to a store takes its user and password from the file of the URL. The secret
    key is read again by `reload`. A file that can't be used leaves the value in use, and so does a
    URL of another server: a process with connections to two servers would find half of its values.
    """

    def __init__(self, settings: Settings, log: Callable[..., None]) -> None:
        self._values = {name: getattr(settings, name) for name in _secret_names()}
        self._parsers = {f.name: f.metadata["parse"] for f in fields(Settings) if f.metadata}
        self._files = settings.files
        self._log = log
        self._told: dict[str, str] = {}  # by setting, why its file does not count: logged once

    def database_url(self) -> str:
        """The URL for a new connection to Postgres."""
        return self._latest("database_url")

    def redis_url(self) -> str:
        """The URL for a new connection to Redis or a Sentinel."""
        return self._latest("redis_url")

    def secret_key(self) -> tuple[str, ...]:
        """The secrets of `BROKER_SECRET_KEY`: the first seals keys, and all open them."""
        keys: tuple[str, ...] = self._values["secret_key"]
        return keys

    def reload(self) -> None:
        """Read every file, and log the names of the settings that changed or need a restart."""
        self._told.clear()
        self._read(self._files, signalled=True)

    def _latest(self, name: str) -> str:
        if name in self._files:
            self._read([name])
        url: str = self._values[name]
        return url

    def _read(self, names: Iterable[str], *, signalled: bool = False) -> None:
        changed, restart = [], []
        for name in names:
            variable = PREFIX + name.upper()
            try:
                value = self._parsers[name](_content(variable, self._files[name]))
            except SettingsFault as fault:
                self._refuse(name, str(fault))
            except ValueError as fault:
                self._refuse(name, f"{variable} must be {fault}.")
            else:
                if _target(value) == _target(self._values[name]):
                    self._told.pop(name, None)
                    if value != self._values[name]:
                        self._values[name] = value
                        changed.append(variable)
                elif self._is_news(name, "restart"):
                    restart.append(variable)
        if changed or restart or signalled:
            self._log("settings_reloaded", changed=changed, restart=restart)

    def _refuse(self, name: str, sentence: str) -> None:
        if self._is_news(name, sentence):
            variable = PREFIX + name.upper()
            self._log("secret_refused", severity=logging.ERROR, variable=variable, cause=sentence)

    def _is_news(self, name: str, word: str) -> bool:
        before, self._told[name] = self._told.get(name), word
        return before != word


_CREDENTIALS = ("user", "username", "password", "sentinel_username", "sentinel_password")


def _target(value: str | tuple[str, ...]) -> object:
    """The parts of a store's URL that need a restart: all but the credentials, and the user where
    the URL names no database. None for another secret.
    """
    if isinstance(value, tuple):
        return None
    parts = urlsplit(value)
    given = dict(parse_qsl(parts.query))
    options = {name: text for name, text in given.items() if name not in _CREDENTIALS}
    database: object = parts.path
    if parts.scheme in _POSTGRES and not {"dbname", "database"} & given.keys():
        # Postgres takes the user's name for the database.
        database = parts.path.strip("/") or (parts.username, given.get("user"))
    return parts.scheme, parts.netloc.rpartition("@")[2], database, options

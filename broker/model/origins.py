"""Origins and domains, in the one canonical form in which they are compared: byte for byte, never
by a pattern.

A passkey belongs to a domain (the RP ID), and a browser says which origin asked. Both are settings
of the app, so whatever is wrong with one is an operator's `InvalidSetting`, found when it is stored
and not when a person signs in.
"""

from __future__ import annotations

import ipaddress
import re
import unicodedata
from urllib.parse import SplitResult, urlsplit

from broker.errors import InvalidSetting


def domain(text: str, what: str) -> str:
    """A lower-case domain name in ASCII form; `localhost` is one, an IP address is not (WebAuthn L3
    §5.1.3: "valid domain").

    The standard library knows IDNA 2003, browsers the newer UTS #46, and the two lead some names to
    different domains (`straße.de`). So only names that IDNA 2003 leaves as they are are converted;
    of others we take the ASCII form, which means one domain.
    """
    domain = unicodedata.normalize("NFC", text).lower()
    if not domain.isascii():
        try:
            ascii_form = domain.encode("idna").decode("ascii")
            same = ascii_form.encode("ascii").decode("idna") == domain
        except UnicodeError:
            same = False
        if not same:
            raise InvalidSetting(
                f"{what} {text!r} can't be converted safely; give its ASCII form (xn--…)."
            )
        domain = ascii_form
    # URL Standard §3.5 "ends in a number": such a host is an IPv4 address or nothing, also `127.1`
    # and `0x7f000001`.
    if _is_ipv6(domain) or re.fullmatch(r"[0-9]+|0x[0-9a-f]*", domain.rpartition(".")[2]):
        raise InvalidSetting(f"{what} {text!r} is an IP address; passkeys need a domain.")
    label = r"(?!-)[a-z0-9-]{1,63}(?<!-)"
    if len(domain) > 253 or not re.fullmatch(rf"{label}(\.{label})*", domain):
        raise InvalidSetting(f"{what} {text!r} is not a domain.")
    return domain


def _is_ipv6(text: str) -> bool:
    try:
        ipaddress.IPv6Address(text.strip("[]"))
    except ValueError:
        return False
    return True


# HTML Standard, "ascii serialization of an origin": a scheme, a host in ASCII and lower case, a
# port. Extensions and app shells have schemes of their own.
_PAGE_ORIGIN = re.compile(
    r"[a-z][a-z0-9+.-]{0,31}://(?:[a-z0-9._~%-]{1,253}|\[[0-9a-f:.]{2,45}\])(?::[0-9]{1,5})?\Z"
)


def page_origin(text: str) -> bool:
    """Whether `text` is an `Origin` as a browser writes it for a page that has one: never "null",
    and nothing that is not a bounded number of harmless ASCII characters."""
    return _PAGE_ORIGIN.match(text) is not None


def is_origin(text: str) -> bool:
    """Whether `text` has the form of a web origin, `scheme://host[:port]`, also where no passkey
    could be used.
    """
    return _origin_parts(text) is not None


def _origin_parts(text: str) -> tuple[SplitResult, str, int | None] | None:
    """An origin's parts, host and port. None: a path, a query, credentials, another scheme, no
    host.
    """
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:
        return None
    if (
        parts.scheme not in ("https", "http")
        or not parts.hostname
        or "@" in parts.netloc
        or parts.path not in ("", "/")
        or "?" in text
        or "#" in text
        or not text.isprintable()
    ):
        return None
    return parts, parts.hostname, port


def web_origin(text: str) -> str:
    """The canonical serialisation of a web origin: `https://host[:port]`, default port left out,
    host in lower case.

    Raises:
        InvalidSetting: not an origin (a path, a query, credentials), or plain http on anything but
            localhost.
    """
    found = _origin_parts(text)
    if found is None:
        raise InvalidSetting(f"{text!r} is not an origin like https://example.com.")
    parts, hostname, port = found
    host = domain(hostname, "The host")
    if parts.scheme == "http" and host != "localhost" and not host.endswith(".localhost"):
        raise InvalidSetting(f"{text} is plain http, which browsers allow on localhost only.")
    default = {"https": 443, "http": 80}[parts.scheme]
    return f"{parts.scheme}://{host}" + (f":{port}" if port is not None and port != default else "")

"""Load balancers as `deploy/` configures them, in front of brokers on loopback.

    with haproxy(tmp_path, pages=[8001, 8002, 8003], management=[9001, 9002, 9003]) as proxy:
        ...  # https://localhost:{proxy.pages}, https://localhost:{proxy.management}

The files of `deploy/` are used as they are; addresses come from the environment.
"""

from __future__ import annotations

import datetime
import getpass
import os
import socket
import ssl
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from string import Template

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tests.support.parts import ROOT, program
from tests.support.processes import free_port, until

DEPLOY = ROOT / "deploy"


@dataclass(frozen=True, slots=True)
class LoadBalancer:
    """A running load balancer, the variables of its file, and its log."""

    process: subprocess.Popen[bytes]
    given: Mapping[str, str]
    log: Path

    @property
    def pages(self) -> int:
        """The port for pages."""
        return self._port("PAGES_BIND")

    @property
    def management(self) -> int:
        """The port for keyed callers."""
        return self._port("MANAGEMENT_BIND")

    @property
    def metrics(self) -> int:
        """The port of HAProxy's own metrics."""
        return self._port("PROXY_METRICS_BIND")

    def _port(self, name: str) -> int:
        return int(self.given[name].rpartition(":")[2])

    @property
    def trust(self) -> ssl.SSLContext:
        """A client's TLS context that trusts the certificate of this load balancer only."""
        return ssl.create_default_context(cafile=self.given["TLS_CERTIFICATE"])

    def open(self) -> bool:
        """True if both ports accept connections."""
        assert self.process.poll() is None, self.log.read_text()
        for port in (self.pages, self.management):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) != 0:
                    return False
        return True


def certificate(home: Path) -> Path:
    """A PEM file with a certificate for localhost that signs itself, and its private key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    names = [x509.DNSName("localhost"), x509.IPAddress(ip_address("127.0.0.1"))]
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=7))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = home / "certificate.pem"
    path.write_bytes(
        made.public_bytes(serialization.Encoding.PEM)
        + key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return path


def variables(home: Path, *, pages: Sequence[int], management: Sequence[int]) -> dict[str, str]:
    """The variables of both files, for three brokers on these ports of loopback."""
    named = {
        f"{kind}_{number}": f"127.0.0.1:{port}"
        for kind, ports in (("PAGES", pages), ("MANAGEMENT", management))
        for number, port in enumerate(ports, 1)
    }
    return {
        **named,
        "TLS_CERTIFICATE": str(certificate(home)),
        "HOP": str(home),
        "PAGES_BIND": f"127.0.0.1:{free_port()}",
        "MANAGEMENT_BIND": f"127.0.0.1:{free_port()}",
        "PROXY_METRICS_BIND": f"127.0.0.1:{free_port()}",
        "CONNECTIONS": "2000",
        "PAGES_CONNECTIONS": "1000",
        "PROXY_USER": getpass.getuser(),
    }


@contextmanager
def haproxy(
    home: Path,
    configuration: Path = DEPLOY / "haproxy.cfg",
    changed: Mapping[str, str] | None = None,
    **ports: Sequence[int],
) -> Iterator[LoadBalancer]:
    """HAProxy with this file, in front of the `pages` and `management` ports. `changed` are other
    values for its variables.
    """
    argv = [program("haproxy"), "-f", str(configuration)]
    with _running(argv, variables(home, **ports) | dict(changed or {}), home) as running:
        yield running


@contextmanager
def nginx(
    home: Path, template: Path = DEPLOY / "nginx.conf", **ports: Sequence[int]
) -> Iterator[LoadBalancer]:
    """nginx with this file, in front of the `pages` and `management` ports."""
    given = variables(home, **ports)
    argv = [*nginx_command(home, given, template), "-g", "daemon off;"]
    with _running(argv, given, home) as running:
        yield running


def nginx_command(
    home: Path, given: Mapping[str, str], template: Path = DEPLOY / "nginx.conf"
) -> list[str]:
    """The command of an nginx whose file has the values `given`, as `envsubst` puts them in."""
    configuration = home / "nginx.conf"
    filled = Template(template.read_text()).safe_substitute(given)
    configuration.write_text(filled)
    return [program("nginx"), "-p", str(home), "-c", str(configuration)]


@contextmanager
def _running(argv: Sequence[str], given: Mapping[str, str], home: Path) -> Iterator[LoadBalancer]:
    log = home / "load-balancer.log"
    with log.open("wb") as written:
        process = subprocess.Popen(
            argv,
            env=os.environ | dict(given),
            stdin=subprocess.DEVNULL,
            stdout=written,
            stderr=written,
        )
    running = LoadBalancer(process, given, log)
    try:
        until(running.open, "the load balancer listens")
        yield running
    finally:
        process.terminate()
        process.wait(30)

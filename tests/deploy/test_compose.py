"""`deploy/compose.yaml`: its schema, and that the names in it lead somewhere. `test_stack` runs the
files that it names.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from broker.settings import Settings, with_secrets
from tests.support.load_balancers import DEPLOY
from tests.support.parts import ROOT

COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]


def _name(given: str | dict[str, str]) -> str:
    return given if isinstance(given, str) else given["source"]


def test_it_follows_the_compose_specification() -> None:
    check = Path(sys.executable).with_name("check-jsonschema")
    argv = [str(check), "--builtin-schema", "vendor.compose-spec", str(DEPLOY / "compose.yaml")]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_each_name_in_it_is_declared_and_used() -> None:
    used: dict[str, set[str]] = {kind: set() for kind in ("configs", "secrets", "networks")}
    volumes, awaited = set(), set()
    for service in SERVICES.values():
        for kind, names in used.items():
            names |= {_name(each) for each in service.get(kind, ())}
        volumes |= {each.partition(":")[0] for each in service.get("volumes", ())}
        awaited |= set(service.get("depends_on", ()))
    assert {kind: set(COMPOSE[kind]) for kind in used} == used
    assert set(COMPOSE["volumes"]) == volumes
    assert awaited <= set(SERVICES)
    for config in COMPOSE["configs"].values():
        assert (DEPLOY / config["file"]).is_file()
    built = SERVICES["broker-1"]["build"]
    assert (DEPLOY / built["context"] / built["dockerfile"]).is_file()
    assert (DEPLOY / built["context"]).resolve() == ROOT


def test_secrets_sh_makes_each_of_its_secrets(tmp_path: Path) -> None:
    folder = tmp_path / "secrets"
    subprocess.run(["sh", DEPLOY / "secrets.sh", folder], check=True)
    made = {f"secrets/{path.name}" for path in folder.iterdir()}
    of_the_operator = {"secrets/redis_password"}  # no container mounts it
    assert {secret["file"] for secret in COMPOSE["secrets"].values()} == made - of_the_operator
    assert made >= of_the_operator
    assert folder.stat().st_mode & 0o777 == 0o700
    again = subprocess.run(["sh", DEPLOY / "secrets.sh", folder], capture_output=True, check=False)
    assert again.returncode != 0
    names = ("database_url", "redis_url", "secret_key")
    files = {f"BROKER_{name.upper()}_FILE": str(folder / name) for name in names}
    loaded = Settings.load(with_secrets(files))
    assert loaded.database_url.startswith("postgresql://broker_service:")
    assert loaded.redis_url.startswith("redis+sentinel://broker:")


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_has_no_rights_that_it_does_not_need(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert "build" in service or service["user"] != "root"  # the image's own account
    assert re.search(r":[0-9]+\.[0-9]+|:[0-9]+-", service["image"])
    assert "privileged" not in service


@pytest.mark.parametrize("name", [name for name in SERVICES if name.startswith("broker-")])
def test_a_broker_s_variables_are_settings(name: str) -> None:
    given = {k: v for k, v in SERVICES[name]["environment"].items() if not k.endswith("_FILE")}
    given = {k: re.sub(r"\$\{\w+:-(.*?)\}", r"\1", v) for k, v in given.items()}
    assert Settings.load(given, needed=()).unknown == ()
    assert "BROKER_TRUSTED_PROXIES" in given


def test_the_grace_period_is_longer_than_the_end_of_a_broker() -> None:
    settings = Settings()
    period = int(SERVICES["broker-1"]["stop_grace_period"].removesuffix("s"))
    assert period > settings.lame_duck_seconds + settings.drain_seconds + 1


@pytest.mark.parametrize("name", [name for name in SERVICES if name.startswith("broker-")])
def test_up_waits_until_a_broker_is_ready(name: str) -> None:
    """By the command of the image, which `test_image` runs, at another path."""
    found = re.search(r"^HEALTHCHECK .*\n *CMD (.*)$", (DEPLOY / "Dockerfile").read_text(), re.M)
    assert found
    live: list[str] = json.loads(found[1])
    assert "/health/live" in live[-1]
    ready = [word.replace("/health/live", "/health/ready") for word in live]
    assert SERVICES[name]["healthcheck"]["test"] == ["CMD", *ready]


def test_only_haproxy_is_reachable_and_its_management_port_from_this_machine_alone() -> None:
    ports = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert set(ports) == {"haproxy"}
    public = [each for each in ports["haproxy"] if not each.startswith("127.0.0.1:")]
    environment = SERVICES["haproxy"]["environment"]
    assert [each.rpartition(":")[2] for each in public] == [environment["PAGES_BIND"].lstrip(":")]
    assert COMPOSE["networks"]["internal"]["internal"] is True


def test_the_page_on_secrets_names_each() -> None:
    page = (DEPLOY / "SECRETS.md").read_text()
    names = {Path(secret["file"]).name for secret in COMPOSE["secrets"].values()}
    assert [name for name in names if f"`{name}`" not in page] == []

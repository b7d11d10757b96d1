"""`deploy/kubernetes/`: Kubernetes' schemas, and names and labels that fit each other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from broker.cli import parser
from broker.settings import PREFIX, Settings
from tests.deploy.test_image import instructions
from tests.support.load_balancers import DEPLOY

FOLDER = DEPLOY / "kubernetes"
KUSTOMIZATION: dict[str, Any] = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())
MANIFESTS: list[dict[str, Any]] = [
    found
    for name in KUSTOMIZATION["resources"]
    for found in yaml.safe_load_all((FOLDER / name).read_text())
]
BY_KIND = {(each["kind"], each["metadata"]["name"]): each for each in MANIFESTS}
DEPLOYMENT = BY_KIND["Deployment", "passkey-broker"]
JOB = BY_KIND["Job", "passkey-broker-migrate"]
PODS = {"serve": DEPLOYMENT["spec"]["template"], "migrate": JOB["spec"]["template"]}
LABELS: dict[str, str] = PODS["serve"]["metadata"]["labels"]


def selectors() -> Iterator[tuple[str, dict[str, str]]]:
    """The selectors that must find the pods that serve."""
    for (kind, name), each in BY_KIND.items():
        match kind:
            case "Service":
                yield f"{kind}/{name}", each["spec"]["selector"]
            case "Deployment" | "PodDisruptionBudget":
                yield f"{kind}/{name}", each["spec"]["selector"]["matchLabels"]
            case "NetworkPolicy":
                yield f"{kind}/{name}", each["spec"]["podSelector"]["matchLabels"]
    spec = PODS["serve"]["spec"]
    (term,) = spec["affinity"]["podAntiAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
    yield "anti-affinity", term["podAffinityTerm"]["labelSelector"]["matchLabels"]
    (spread,) = spec["topologySpreadConstraints"]
    yield "spread", spread["labelSelector"]["matchLabels"]


def test_every_file_is_a_resource() -> None:
    files = {path.name for path in FOLDER.iterdir()} - {"kustomization.yaml"}
    assert files == set(KUSTOMIZATION["resources"])


@pytest.mark.parametrize(
    "kind_and_name", [key for key in BY_KIND if key[0] != "ServiceMonitor"], ids="/".join
)
def test_kubernetes_knows_each_field(kind_and_name: tuple[str, str]) -> None:
    import kubernetes_validate  # takes seconds, so not at collection by every worker

    version = kubernetes_validate.latest_version()
    kubernetes_validate.validate(BY_KIND[kind_and_name], version, strict=True)


@pytest.mark.parametrize(("where", "labels"), list(selectors()))
def test_a_selector_finds_the_pods(where: str, labels: dict[str, str]) -> None:
    assert labels.items() <= LABELS.items(), where


def test_pods_of_the_migration_get_no_request() -> None:
    labels = PODS["migrate"]["metadata"]["labels"]
    for where, selector in selectors():
        found = selector.items() <= labels.items()
        assert found is where.startswith("NetworkPolicy"), where


def test_prometheus_finds_the_management_service() -> None:
    monitor = BY_KIND["ServiceMonitor", "passkey-broker"]["spec"]
    wanted = monitor["selector"]["matchLabels"].items()
    services = [each for each in MANIFESTS if each["kind"] == "Service"]
    (found,) = [each for each in services if wanted <= each["metadata"]["labels"].items()]
    ports = [port["name"] for port in found["spec"]["ports"]]
    assert [each["port"] for each in monitor["endpoints"]] == ports == ["management"]


def test_the_autoscaler_scales_the_deployment() -> None:
    target = BY_KIND["HorizontalPodAutoscaler", "passkey-broker"]["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) in BY_KIND
    assert "replicas" not in DEPLOYMENT["spec"]


@pytest.mark.parametrize("pod", PODS)
def test_a_pod_has_the_image_s_account_and_writes_nothing(pod: str) -> None:
    spec = PODS[pod]["spec"]
    (container,) = spec["containers"]
    user, group = dict(instructions())["USER"].split(":")
    context = spec["securityContext"]
    assert (context["runAsUser"], context["runAsGroup"]) == (int(user), int(group))
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert spec["enableServiceLinks"] is False
    assert container["image"] == KUSTOMIZATION["images"][0]["name"]
    parser().parse_args(container["args"])


@pytest.mark.parametrize("pod", PODS)
def test_variables_are_settings_and_secrets_are_files(pod: str) -> None:
    spec = PODS[pod]["spec"]
    (container,) = spec["containers"]
    (mount,) = container["volumeMounts"]
    given = {each["name"]: each["value"] for each in container["env"]}
    literals = [each.partition("=") for each in KUSTOMIZATION["configMapGenerator"][0]["literals"]]
    given |= {name: value for name, _, value in literals}
    for name in [name for name in given if name.endswith("_FILE")]:
        assert given.pop(name) == f"{mount['mountPath']}/{name[len(PREFIX) : -5].lower()}"
    assert Settings.load(given, needed=()).unknown == ()
    assert [volume["name"] for volume in spec["volumes"]] == [mount["name"]]


def test_ports_are_the_image_s() -> None:
    (container,) = PODS["serve"]["spec"]["containers"]
    ports = {each["name"]: each["containerPort"] for each in container["ports"]}
    assert dict(instructions())["EXPOSE"] == " ".join(map(str, ports.values()))
    for each in MANIFESTS:
        if each["kind"] == "Service":
            assert {port["targetPort"] for port in each["spec"]["ports"]} <= ports.keys()


def test_the_grace_period_is_longer_than_the_end_of_a_broker() -> None:
    settings = Settings()
    period = PODS["serve"]["spec"]["terminationGracePeriodSeconds"]
    assert period > settings.lame_duck_seconds + settings.drain_seconds + 1
    probe = PODS["serve"]["spec"]["containers"][0]["readinessProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] <= settings.lame_duck_seconds

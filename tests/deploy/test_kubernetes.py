"""The Kubernetes manifests, rendered by kubectl, checked without a cluster: by the schemas, and against each other."""

import json
import os
import runpy
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from service.config import Settings

DOCKER = Path(__file__).parents[2] / "docker"
OVERLAYS = DOCKER / "kubernetes" / "overlays"
Manifests = dict[str, Any]
"""An overlay's objects by kind."""

pytestmark = pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
both_overlays = pytest.mark.parametrize("overlay", ["cpu", "gpu"])


@cache
def render(overlay: str) -> Manifests:
    return kustomize(OVERLAYS / overlay)


def with_components(folder: Path, overlay: str, *names: str) -> Manifests:
    """The overlay with these of docker/kubernetes/components, as an operator's own overlay adds them."""

    def relative(path: Path) -> str:
        return os.path.relpath(path, folder)

    kustomization = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": [relative(OVERLAYS / overlay)],
        "components": [relative(OVERLAYS.parent / "components" / name) for name in names],
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    return kustomize(folder)


def kustomize(folder: Path) -> Manifests:
    command = ["kubectl", "kustomize", str(folder)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {document["kind"]: document for document in yaml.safe_load_all(text)}


def pod(manifests: Manifests) -> Any:
    return manifests["Deployment"]["spec"]["template"]["spec"]


def container(manifests: Manifests) -> Any:
    [only] = pod(manifests)["containers"]
    return only


@both_overlays
@pytest.mark.parametrize("version", ["1.30", "1.37"])
def test_the_api_server_of_each_version_would_accept_every_field(overlay: str, version: str) -> None:
    for kind, manifest in render(overlay).items():
        if kind not in ("ServiceMonitor", "PrometheusRule"):  # custom resources: their schemas come with the operator
            kubernetes_validate.validate(manifest, version, strict=True)


def test_the_check_refuses_a_misspelt_field() -> None:
    manifest = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "a"}, "spec": {"port": []}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(manifest, "1.33", strict=True)


@both_overlays
def test_everything_that_is_needed_is_there(overlay: str) -> None:
    needed = {"Deployment", "HorizontalPodAutoscaler", "NetworkPolicy", "PodDisruptionBudget", "Service"}
    watched = {"ConfigMap", "PrometheusRule", "ServiceMonitor"}
    assert render(overlay).keys() == needed | watched


@both_overlays
def test_every_selector_finds_the_pods_and_every_port_name_exists(overlay: str) -> None:
    manifests = render(overlay)
    labels = {"app.kubernetes.io/name": "retinaserve"}
    specs = {kind: manifest["spec"] for kind, manifest in manifests.items() if "spec" in manifest}
    assert specs["Deployment"]["template"]["metadata"]["labels"] == labels
    assert specs["Service"]["selector"] == labels
    assert specs["NetworkPolicy"]["podSelector"] == {"matchLabels": labels}
    assert all(specs[kind]["selector"] == {"matchLabels": labels} for kind in ("Deployment", "PodDisruptionBudget"))
    assert specs["HorizontalPodAutoscaler"]["scaleTargetRef"]["name"] == manifests["Deployment"]["metadata"]["name"]
    # The monitor selects the Service, by the Service's own labels.
    assert specs["ServiceMonitor"]["selector"] == {"matchLabels": manifests["Service"]["metadata"]["labels"]}
    assert [port["name"] for port in container(manifests)["ports"]] == ["http"]
    assert specs["Service"]["ports"][0]["targetPort"] == specs["ServiceMonitor"]["endpoints"][0]["port"] == "http"


@both_overlays
def test_a_pod_outlives_its_drain_and_its_longest_request(overlay: str) -> None:
    settings = ("drain_delay_seconds", "upload_timeout_seconds", "request_timeout_seconds")
    longest = sum(Settings.model_fields[name].default for name in settings)
    assert pod(render(overlay))["terminationGracePeriodSeconds"] > longest


@both_overlays
def test_a_draining_pod_leaves_the_endpoints_before_it_stops_listening(overlay: str) -> None:
    probe = container(render(overlay))["readinessProbe"]
    noticed = probe["periodSeconds"] * probe["failureThreshold"]
    assert probe["httpGet"]["path"] == "/readyz"
    assert noticed < Settings.model_fields["drain_delay_seconds"].default


@both_overlays
def test_uploads_fit_the_scratch_space(overlay: str) -> None:
    [volume] = pod(render(overlay))["volumes"]
    size = int(volume["emptyDir"]["sizeLimit"].removesuffix("Mi")) * 1024 * 1024
    assert size >= Settings.model_fields["max_upload_bytes_in_flight"].default


@both_overlays
def test_the_container_may_do_nothing_but_serve(overlay: str) -> None:
    manifests = render(overlay)
    security = container(manifests)["securityContext"]
    assert pod(manifests)["securityContext"]["runAsNonRoot"] is True
    assert pod(manifests)["automountServiceAccountToken"] is False
    assert security["readOnlyRootFilesystem"] is True
    assert security["allowPrivilegeEscalation"] is False
    assert security["capabilities"] == {"drop": ["ALL"]}
    assert manifests["NetworkPolicy"]["spec"]["egress"] == []


@both_overlays
def test_every_environment_variable_is_a_setting(overlay: str) -> None:
    names = {variable["name"] for variable in container(render(overlay))["env"]}
    assert names <= {f"RETINASERVE_{field.upper()}" for field in Settings.model_fields}


def test_only_the_gpu_overlay_asks_for_a_gpu_and_insists_on_it() -> None:
    devices = {
        overlay: next(v["value"] for v in container(render(overlay))["env"] if v["name"] == "RETINASERVE_DEVICE")
        for overlay in ("cpu", "gpu")
    }
    assert devices == {"cpu": "cpu", "gpu": "cuda"}
    assert container(render("gpu"))["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert "nvidia.com/gpu" not in container(render("cpu"))["resources"]["limits"]


def test_the_rules_are_those_of_compose_and_promtool_takes_them(tmp_path: Path) -> None:
    manifest = render("cpu")["PrometheusRule"]
    made = runpy.run_path(str(DOCKER / "prometheus" / "kubernetes.py"))["render"]()
    again = "run: python docker/prometheus/kubernetes.py > docker/prometheus/kubernetes/rules.yaml"
    assert manifest["spec"] == made["spec"], again
    assert manifest["spec"]["groups"][1:] == yaml.safe_load((DOCKER / "prometheus" / "rules.yml").read_text())["groups"]
    if shutil.which("promtool"):
        (tmp_path / "rules.yml").write_text(yaml.safe_dump(manifest["spec"]))
        subprocess.run(["promtool", "check", "rules", str(tmp_path / "rules.yml")], check=True, capture_output=True)


def test_what_the_operator_and_grafana_look_for_is_labelled() -> None:
    manifests = render("gpu")
    for kind in ("ServiceMonitor", "PrometheusRule"):
        assert manifests[kind]["metadata"]["labels"]["release"] == "kube-prometheus-stack"
    dashboard = manifests["ConfigMap"]
    assert dashboard["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert json.loads(dashboard["data"]["retinaserve.json"])["uid"] == "retinaserve"


@both_overlays
def test_with_keys_and_a_model_the_pod_mounts_them_and_prometheus_shows_its_key(tmp_path: Path, overlay: str) -> None:
    manifests = with_components(tmp_path, overlay, "api-keys", "model")
    for kind in ("Deployment", "PodDisruptionBudget", "ConfigMap"):
        kubernetes_validate.validate(manifests[kind], "1.30", strict=True)
    mounts = {mount["name"]: mount["mountPath"] for mount in container(manifests)["volumeMounts"]}
    assert mounts == {"tmp": "/tmp", "keys": "/keys", "models": "/models"}
    assert {volume["name"] for volume in pod(manifests)["volumes"]} == mounts.keys()
    settings = {variable["name"]: variable["value"] for variable in container(manifests)["env"]}
    assert settings["RETINASERVE_API_KEYS_FILE"] == "/keys/api-keys"
    assert settings["RETINASERVE_MODEL"] == "/models/current.onnx"
    assert settings.keys() <= {f"RETINASERVE_{field.upper()}" for field in Settings.model_fields}
    [endpoint] = manifests["ServiceMonitor"]["spec"]["endpoints"]
    assert endpoint["authorization"]["credentials"] == {"name": "retinaserve-metrics-key", "key": "key"}


def test_a_broken_pod_does_not_stand_in_the_way_of_a_drain() -> None:
    assert render("cpu")["PodDisruptionBudget"]["spec"]["unhealthyPodEvictionPolicy"] == "AlwaysAllow"

"""The manifests for KServe, KEDA and KubeRay, checked without a cluster: by schemas, and against the service."""

import copy
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from service.config import Settings, parse_settings
from service.metrics import Metrics, Outcome
from tests.deploy.crd import KEPT, KUBERNETES, RESOURCES, Resource, cut_definition, faults, load
from tests.deploy.test_kubernetes import kustomize, render

WHOLE = Path(__file__).parents[3] / "shared" / "reference" / "crds"
"""The projects' whole definitions, where somebody put them beside the repository."""

RUNTIME = load(KUBERNETES / "kserve" / "serving-runtime.yaml")
INFERENCE_SERVICE = load(KUBERNETES / "kserve" / "inference-service.yaml")
SCALED_OBJECT = load(KUBERNETES / "keda" / "scaled-object.yaml")
RAY_SERVICE = load(KUBERNETES / "kuberay" / "ray-service.yaml")
RAY_CLUSTER = RAY_SERVICE["spec"]["rayClusterConfig"]
RAY_PODS = [group["template"]["spec"] for group in (RAY_CLUSTER["headGroupSpec"], *RAY_CLUSTER["workerGroupSpecs"])]
EXTERNAL = INFERENCE_SERVICE["spec"]["predictor"]["autoScaling"]["metrics"][0]["external"]
TRIGGER = SCALED_OBJECT["spec"]["triggers"][0]["metadata"]
QUERIES = {"KServe": EXTERNAL["metric"]["query"], "KEDA": TRIGGER["query"]}

each_resource = pytest.mark.parametrize("resource", RESOURCES, ids=lambda resource: resource.manifest.stem)
each_query = pytest.mark.parametrize("query", QUERIES.values(), ids=QUERIES)
needs_kubectl = pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")


def container() -> Any:
    [only] = RUNTIME["spec"]["containers"]
    return only


def settings() -> Settings:
    return parse_settings([argument.replace("{{.Name}}", "shapes") for argument in container()["args"]])


@each_resource
def test_the_definition_has_every_field_with_its_type(resource: Resource) -> None:
    assert faults(load(KEPT / resource.definition), load(resource.manifest)) == []


@each_resource
def test_the_kept_schema_is_cut_out_of_the_whole_definition(resource: Resource) -> None:
    if not (WHOLE / resource.definition).exists():
        pytest.skip(f"{resource.definition} is not in {WHOLE}")
    again = "run: python -m tests.deploy.crd FOLDER"
    assert load(KEPT / resource.definition) == cut_definition(WHOLE / resource.definition, load(resource.manifest)), (
        again
    )


@each_resource
def test_the_check_refuses_what_the_definition_refuses(resource: Resource) -> None:
    schema, manifest = load(KEPT / resource.definition), load(resource.manifest)
    for name in manifest["spec"]:
        misspelt = copy.deepcopy(manifest)
        misspelt["spec"][name + "s"] = misspelt["spec"].pop(name)
        assert faults(schema, misspelt), name
        other_type = copy.deepcopy(manifest)
        other_type["spec"][name] = None
        assert faults(schema, other_type), name


def test_kserve_starts_the_service_by_flags_that_it_has_on_the_port_that_is_declared() -> None:
    assert settings().model == Path("/mnt/models")
    assert settings().model_name == "shapes"
    assert container()["name"] == "kserve-container"
    assert [port["containerPort"] for port in container()["ports"]] == [settings().port]
    assert RUNTIME["spec"]["annotations"]["prometheus.kserve.io/port"] == str(settings().port)
    probes = [container()[name]["httpGet"] for name in ("startupProbe", "readinessProbe", "livenessProbe")]
    assert [(probe["path"], probe["port"]) for probe in probes] == [
        (path, settings().port) for path in ("/readyz", "/readyz", "/healthz")
    ]


def test_the_inference_service_finds_the_runtime() -> None:
    model = INFERENCE_SERVICE["spec"]["predictor"]["model"]
    assert model["runtime"] == RUNTIME["metadata"]["name"]
    assert [model["modelFormat"]["name"]] == [each["name"] for each in RUNTIME["spec"]["supportedModelFormats"]]
    assert [model["protocolVersion"]] == RUNTIME["spec"]["protocolVersions"]


def test_kserves_pod_gets_no_service_links_and_outlives_its_drain_and_its_longest_request() -> None:
    pod = INFERENCE_SERVICE["spec"]["predictor"]
    assert pod["enableServiceLinks"] is False
    longest = settings().drain_delay_seconds + settings().upload_timeout_seconds + settings().request_timeout_seconds
    assert pod["terminationGracePeriodSeconds"] > longest
    probe = container()["readinessProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] < settings().drain_delay_seconds


@needs_kubectl
def test_with_keda_no_other_autoscaler_is_left() -> None:
    manifests = kustomize(KUBERNETES / "keda")
    assert manifests.keys() == render("gpu").keys() - {"HorizontalPodAutoscaler"} | {"ScaledObject"}
    replaced = render("gpu")["HorizontalPodAutoscaler"]["spec"]
    spec = manifests["ScaledObject"]["spec"]
    assert spec["scaleTargetRef"] == replaced["scaleTargetRef"]
    assert (spec["minReplicaCount"], spec["maxReplicaCount"]) == (replaced["minReplicas"], replaced["maxReplicas"])
    assert manifests["Deployment"]["spec"]["template"]["spec"]["enableServiceLinks"] is False
    assert "replicas" not in manifests["Deployment"]["spec"]


@each_query
def test_a_query_names_metrics_and_outcomes_that_the_service_has(query: str) -> None:
    served = {sample.name for family in Metrics().registry.collect() for sample in family.samples}
    named = set(re.findall(r"retinaserve_\w+", query))
    assert named == {"retinaserve_queue_depth", "retinaserve_requests_total"} <= served
    assert set(re.findall(r'outcome="(\w+)"', query)) == {"overloaded"} <= set(get_args(Outcome))


@needs_promtool
@each_query
def test_what_waits_and_what_is_refused_count_over_all_replicas(query: str, tmp_path: Path) -> None:
    rule = {"record": "wanted", "expr": query}
    (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": [{"name": "scaling", "rules": [rule]}]}))
    pods = ['job="retinaserve", pod="shapes-predictor-a"', 'job="retinaserve", pod="shapes-predictor-b"']
    waiting = [{"series": f"retinaserve_queue_depth{{{pod}}}", "values": "8x12"} for pod in pods]
    refused = [
        {"series": f'retinaserve_requests_total{{{pod}, outcome="{outcome}"}}', "values": "0+15x12"}
        for pod in pods
        for outcome in ("overloaded", "ok")
    ]
    case = {
        "interval": "15s",
        "input_series": waiting + refused,
        "promql_expr_test": [
            {"expr": "wanted", "eval_time": "2m", "exp_samples": [{"labels": "wanted", "value": 8 + 8 + 1 + 1}]}
        ],
    }
    test = {"rule_files": ["rules.yml"], "evaluation_interval": "15s", "tests": [case]}
    (tmp_path / "test.yml").write_text(yaml.safe_dump(test))
    result = subprocess.run(["promtool", "test", "rules", "test.yml"], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_each_autoscaler_divides_by_the_same_share_of_a_queue() -> None:
    assert EXTERNAL["target"] == {"type": "Value", "value": TRIGGER["threshold"]}
    assert int(TRIGGER["threshold"]) < Settings.model_fields["queue_capacity"].default


@pytest.mark.parametrize("pod", RAY_PODS, ids=["head", "worker"])
def test_rays_pods_get_no_service_links_and_run_the_image_that_is_built_for_them(pod: Any) -> None:
    assert pod["enableServiceLinks"] is False
    image = (KUBERNETES / "kuberay" / "Dockerfile").read_text()
    assert "FROM ${RAY_IMAGE}\n" in image
    [version] = re.findall(r"ARG RAY_IMAGE=rayproject/ray:([\d.]+)-py\d+\n", image)
    assert RAY_CLUSTER["rayVersion"] == version
    assert [f"-t {container['image']} ." in image for container in pod["containers"]] == [True]


def test_a_worker_of_ray_holds_a_replica_and_outlives_its_longest_request() -> None:
    [group] = RAY_CLUSTER["workerGroupSpecs"]
    [application] = yaml.safe_load(RAY_SERVICE["spec"]["serveConfigV2"])["applications"]
    cores = application["args"]["num_cpus"]
    assert group["rayStartParams"]["num-cpus"] == str(cores)
    assert group["replicas"] == group["minReplicas"] == application["args"]["replicas"]
    assert group["maxReplicas"] >= 2 * group["replicas"], "a rollout starts as many again before it stops any"
    pod = group["template"]["spec"]
    [worker] = pod["containers"]
    assert int(worker["resources"]["requests"]["cpu"]) > cores
    defaults = {name: field.default for name, field in Settings.model_fields.items()}
    longest = defaults["upload_timeout_seconds"] + defaults["request_timeout_seconds"]
    assert pod["terminationGracePeriodSeconds"] > longest
    assert application["args"].keys() - defaults.keys() == {"replicas", "num_cpus"}
    assert application["args"]["model"].startswith(worker["volumeMounts"][0]["mountPath"])

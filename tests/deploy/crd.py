"""Schemas of the custom resources in docker/kubernetes, cut down to the fields that those manifests use.

The projects' own definitions are megabytes. `python -m tests.deploy.crd FOLDER` cuts them anew after a manifest got a
field. FOLDER holds keda-scaledobjects.yaml (kedacore/keda, config/crd/bases), kserve-servingruntimes.yaml and
kserve-inferenceservices.yaml (kserve/kserve, config/crd/full), and kuberay-rayservices.yaml (ray-project/kuberay,
helm-chart/kuberay-operator/crds, ray.io_rayservices.yaml).
"""

import sys
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from jsonschema import Draft202012Validator

KUBERNETES = Path(__file__).parents[2] / "docker" / "kubernetes"
KEPT = Path(__file__).parent / "crds"
LIMITS = {"pattern", "minimum", "maximum", "minLength", "maxLength", "minItems", "maxItems"}
KEYWORDS = {"type", "enum", "required", "anyOf", "oneOf", "allOf", "not"} | LIMITS
NOTICE = """\
# Cut by tests/deploy/crd.py from {source}, Copyright the {authors} Authors.
# Licensed under the Apache License 2.0 (the file LICENSE).
# Changed: descriptions and unused fields are left out; unknown fields are refused.
"""


class Resource(NamedTuple):
    manifest: Path
    definition: str
    """Name of the file with the project's definition, and of the kept one."""
    source: str
    authors: str


KEDA = ("kedacore/keda config/crd/bases", "KEDA")
KSERVE = ("kserve/kserve config/crd/full", "KServe")
KUBERAY = ("ray-project/kuberay helm-chart/kuberay-operator/crds", "KubeRay")
RESOURCES = (
    Resource(KUBERNETES / "keda" / "scaled-object.yaml", "keda-scaledobjects.yaml", *KEDA),
    Resource(KUBERNETES / "kserve" / "serving-runtime.yaml", "kserve-servingruntimes.yaml", *KSERVE),
    Resource(KUBERNETES / "kserve" / "inference-service.yaml", "kserve-inferenceservices.yaml", *KSERVE),
    Resource(KUBERNETES / "kuberay" / "ray-service.yaml", "kuberay-rayservices.yaml", *KUBERAY),
)


def load(path: Path) -> Any:
    return yaml.load(path.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def cut_definition(path: Path, manifest: Any) -> Any:
    """Cut the definition's schema of the manifest's version."""
    version = manifest["apiVersion"].partition("/")[2]
    [schema] = [each["schema"] for each in load(path)["spec"]["versions"] if each["name"] == version]
    return cut(schema["openAPIV3Schema"], [manifest])


def cut(schema: Any, values: list[Any]) -> Any:
    """Keep of a schema what these values use, and refuse every other field where the API server would prune it."""
    kept = {keyword: rule for keyword, rule in schema.items() if keyword in KEYWORDS}
    if "items" in schema:
        kept["items"] = cut(schema["items"], [item for value in values for item in value])
    if "additionalProperties" in schema:
        kept["additionalProperties"] = cut(
            schema["additionalProperties"], [v for value in values for v in value.values()]
        )
    if "properties" in schema:
        kept["properties"] = {
            name: cut(rule, [value[name] for value in values if name in value])
            for name, rule in schema["properties"].items()
            if any(name in value for value in values)
        }
        kept["additionalProperties"] = schema.get("x-kubernetes-preserve-unknown-fields", False)
    return kept


def faults(schema: Any, manifest: Any) -> list[str]:
    errors = Draft202012Validator(schema).iter_errors(manifest)
    return [f"{error.json_path}: {error.message}" for error in errors]


def main(folder: Path) -> None:
    for manifest, definition, source, authors in RESOURCES:
        text = yaml.safe_dump(cut_definition(folder / definition, load(manifest)), sort_keys=False, width=140)
        (KEPT / definition).write_text(NOTICE.format(source=source, authors=authors) + text)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

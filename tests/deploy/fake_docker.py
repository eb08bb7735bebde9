"""A stand-in for the `docker` command, as far as docker/roll.sh uses it: the project's containers in a JSON file.

`$FAKE_DOCKER` names the file: {"services": {name: replicas}, "images": {name: id}, "containers": [], "calls": []}; a
container is {"id", "service", "image", "state", "health"}. "broken": services whose new containers restart again and
again; "good": so many new containers start, and none after.
"""

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

FILE = Path(os.environ["FAKE_DOCKER"])
world: dict[str, Any] = json.loads(FILE.read_text())
containers: list[dict[str, str]] = world["containers"]


def image_of(service: str) -> str:
    return "retinaserve:cpu"


def find(identifier: str) -> dict[str, str]:
    return next(container for container in containers if container["id"] == identifier)


def up(service: str, number: int) -> int:
    """As `up --no-recreate --wait --scale`: adds what is missing, and fails unless all are healthy."""
    while sum(container["service"] == service for container in containers) < number:
        world["made"] = world.get("made", 0) + 1
        good = service not in world.get("broken", []) and world["made"] <= world.get("good", 1000)
        containers.append(
            {
                "id": f"new{world['made']}",
                "service": service,
                "image": world["images"][image_of(service)],
                "state": "running" if good else "restarting",
                "health": "healthy" if good else "starting",
            }
        )
    bad = [c for c in containers if c["service"] == service and c["health"] != "healthy"]
    for container in bad:
        print(f"container {container['id']} is unhealthy", file=sys.stderr)
    return 1 if bad else 0


def compose(arguments: list[str]) -> int:
    while arguments[0] == "-f":
        del arguments[:2]
    match arguments:
        case ["config", "--services"]:
            print("\n".join([*world["services"], "proxy", "prometheus", "grafana"]))
        case ["config", service]:
            print(f"services:\n  {service}:\n    deploy:\n      replicas: {world['services'][service]}")
        case ["ps", "--all", "--quiet", service]:
            print("\n".join(c["id"] for c in containers if c["service"] == service))
        case ["up", "--detach", "--no-deps", "--no-recreate", "--wait", "--wait-timeout", _, "--scale", scale, service]:
            return up(service, int(scale.removeprefix(f"{service}=")))
        case _:
            raise SystemExit(f"not faked: docker compose {arguments}")
    return 0


def docker(arguments: list[str]) -> int:
    match arguments:
        case ["compose", *rest]:
            return compose(rest)
        case ["inspect", "--format", template, identifier]:
            c = find(identifier)
            values = {
                ".Name": f"/{c['id']}",
                ".Image": c["image"],
                ".Config.Image": image_of(c["service"]),
                ".State.Status": c["state"],
                ".State.ExitCode": "0" if c["state"] == "running" else "2",
                ".RestartCount": "0" if c["state"] == "running" else "7",
            }
            template = template.replace("{{with .State.Health}}{{.Status}}{{end}}", c["health"])
            print(re.sub(r"{{(\S+)}}", lambda match: values[match[1]], template))
        case ["image", "inspect", "--format", "{{.Id}}", name]:
            print(world["images"][name])
        case ["tag", image, name]:
            world["images"][name] = image
        case ["logs", *_, identifier]:
            print(f"the log of {identifier}")
        case ["stop", identifier]:
            find(identifier)["state"] = "exited"
        case ["rm", "--force", identifier]:
            containers.remove(find(identifier))
        case _:
            raise SystemExit(f"not faked: docker {arguments}")
    return 0


world.setdefault("calls", []).append(sys.argv[1:])
code = docker(sys.argv[1:])
FILE.write_text(json.dumps(world))
sys.exit(code)

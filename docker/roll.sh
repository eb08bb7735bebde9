#!/usr/bin/env bash
# Replaces every replica by one of the present image and settings, one at a time, without losing a request.
#   docker/roll.sh [-f docker-compose.yml -f docker/cpu.yml]      (the arguments go to docker compose)
# Replicas are the containers of `service` and of service-1, service-2, … (docker/gpus.yml). While one is replaced there is one
# more, which on a GPU must fit beside the old one. Logs of what is removed go to $LOGS_DIR (logs/). The image that served
# before is tagged NAME-previous. Exit code 1: a new replica did not become healthy; it is gone, the old ones serve, and its last
# lines were shown.
set -euo pipefail
options=("$@")
logs=${LOGS_DIR:-logs}
wait_seconds=${WAIT_SECONDS:-300}

compose() { docker compose ${options[@]+"${options[@]}"} "$@"; }
containers() { compose ps --all --quiet "$1"; }
of() { docker inspect --format "$2" "$1"; } # CONTAINER TEMPLATE
name_of() { of "$1" '{{.Name}}' | tr -d /; }
is_healthy() { [[ $(of "$1" '{{.State.Status}} {{with .State.Health}}{{.Status}}{{end}}') == "running healthy" ]]; }
is_in() { [[ " ${*:2} " == *" $1 "* ]]; }

retire() { # CONTAINER: drains it, keeps its log, removes it
  mkdir -p "$logs"
  docker stop "$1" >/dev/null # drains: stop_grace_period is longer than the longest request
  docker logs "$1" >"$logs/$(date -u +%Y%m%dT%H%M%SZ)-$(name_of "$1").log" 2>&1
  docker rm --force "$1" >/dev/null
}

give_up() { # SERVICE BEFORE…: shows and removes what came after BEFORE, and leaves the rest serving
  local replica service=$1
  trap - INT TERM
  for replica in $(containers "$service"); do
    is_in "$replica" "${@:2}" && continue
    echo "roll.sh: the new replica $(name_of "$replica") is not healthy: $(of "$replica" \
      '{{.State.Status}}, exit code {{.State.ExitCode}}, restarted {{.RestartCount}} times'). Its last lines:" >&2
    docker logs --tail 10 "$replica" 2>&1 | sed 's/^/  /' >&2
    retire "$replica"
  done
  echo "roll.sh: $service was not rolled to its end. The replicas that were healthy go on serving; mend it and roll again." >&2
  exit 1
}

tag_previous() { # CONTAINER: its image keeps a name, if the name that it was made from says another one now
  local name image
  name=$(of "$1" '{{.Config.Image}}')
  image=$(of "$1" '{{.Image}}')
  [[ $(docker image inspect --format '{{.Id}}' "$name") == "$image" ]] || docker tag "$image" "$name-previous"
}

roll() { # SERVICE
  local service=$1 replica number old=() before after
  for replica in $(containers "$service"); do
    if is_healthy "$replica"; then
      old+=("$replica")
    else
      echo "$(name_of "$replica") does not serve: removed" >&2
      retire "$replica"
    fi
  done
  number=$(compose config "$service" | sed -n 's/^      replicas: *//p') # the setting REPLICAS; --scale may have made more
  ((number >= ${#old[@]})) || number=${#old[@]}
  for replica in ${old[@]+"${old[@]}"}; do tag_previous "$replica"; done
  for ((i = 0; i < number; i++)); do
    mapfile -t before < <(containers "$service")
    trap 'give_up "$service" ${before[@]+"${before[@]}"}' INT TERM
    compose up --detach --no-deps --no-recreate --wait --wait-timeout "$wait_seconds" \
      --scale "$service=$((${#before[@]} + 1))" "$service" || give_up "$service" ${before[@]+"${before[@]}"}
    trap - INT TERM
    ((i >= ${#old[@]})) || retire "${old[i]}"
  done
  mapfile -t after < <(containers "$service")
  ((${#after[@]} == number)) || { echo "roll.sh: $service has ${#after[@]} replicas, not $number" >&2; exit 1; }
  for replica in "${after[@]}"; do
    if is_in "$replica" ${old[@]+"${old[@]}"} || ! is_healthy "$replica"; then
      echo "roll.sh: $(name_of "$replica") is old or not healthy" >&2
      exit 1
    fi
  done
  echo "$service: $number new"
}

services=$(compose config --services | grep -E '^service(-[0-9]+)?$' | sort)
for service in $services; do roll "$service"; done

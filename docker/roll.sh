#!/bin/sh
# Replaces every replica of `service` by one of the present image and settings, one at a time, without losing a request.
#   docker/roll.sh [-f docker-compose.yml -f docker/cpu.yml]      (the arguments go to docker compose)
# While one is replaced there is one more, which on a GPU must fit beside the old one.
set -eu
old=$(docker compose "$@" ps --quiet service)
number=$(echo "$old" | wc -l)
for replica in $old; do
  docker compose "$@" up --detach --no-deps --no-recreate --wait --scale service=$((number + 1)) service
  docker stop "$replica" >/dev/null # drains: stop_grace_period is longer than the longest request
  docker rm "$replica" >/dev/null
done

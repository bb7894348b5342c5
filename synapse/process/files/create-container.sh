#!/bin/sh
# Has a stopped container ready: create-container NAME INPUTS [ARGUMENTS OF DOCKER CREATE]
# One that was made from the same inputs and was stopped properly is as good as a new one, and twice as soon there.
# Any other, such as one that still runs without its unit, makes room.
set -eu
name=$1 inputs=$2
shift 2

found=$(docker container inspect \
    --format '{{.State.Status}} {{index .Config.Labels "org.matrix.synapse.process.inputs"}}' "$name" 2>/dev/null) || found=
case $found in
"exited $inputs" | "created $inputs") exit ;;
?*) docker rm --force --volumes "$name" >/dev/null ;;
esac
docker create --name "$name" --label "org.matrix.synapse.process.inputs=$inputs" "$@" >/dev/null

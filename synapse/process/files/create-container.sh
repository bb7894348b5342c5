#!/bin/sh
# Creates a container that is not there yet: create-container NAME [ARGUMENTS OF DOCKER CREATE]
# One of that name that a crash left behind makes room. That is rare, so it is found out by being in the way.
set -eu
name=$1
shift

create() {
    docker create --name "$name" "$@" >/dev/null
}
create "$@" || { docker rm --force "$name" && create "$@"; }

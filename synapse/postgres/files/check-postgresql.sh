#!/bin/sh
# Has PostgreSQL read a candidate, alone, as its configuration: check-postgresql VERSION CANDIDATE
set -eu
version=$1 candidate=$2

directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
cp "$candidate" "$directory/postgresql.conf"
chown -R postgres "$directory"
runuser --user postgres -- "/usr/lib/postgresql/$version/bin/postgres" -D "$directory" -C max_connections >/dev/null

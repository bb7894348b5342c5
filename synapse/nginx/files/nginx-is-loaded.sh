#!/bin/sh
# Whether nginx runs with a configuration, and each gate is open to it:
# nginx-is-loaded STATUS_SOCKET DIGEST GATES_DIRECTORY NGINX_GROUP GATE...
set -eu
socket=$1 digest=$2 directory=$3 group=$4
shift 4

test "$(curl --silent --unix-socket "$socket" http://localhost/config)" = "$digest"
# Its exit status would say whether any of them is.
test "$(systemctl is-active "$@" | grep --count --line-regexp active)" = $#
test -z "$(find "$directory" -name '*.sock' ! -group "$group")"

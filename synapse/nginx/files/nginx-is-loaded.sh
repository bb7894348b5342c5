#!/bin/sh
# Whether nginx runs with a configuration, and each gate is open: nginx-is-loaded STATUS_SOCKET DIGEST GATE...
set -eu
socket=$1 digest=$2
shift 2

test "$(curl --silent --unix-socket "$socket" http://localhost/config)" = "$digest"
# Its exit status would say whether any of them is.
test "$(systemctl is-active "$@" | grep --count --line-regexp active)" = $#

#!/bin/sh
# Has nginx load its configuration, and the gate its sockets, and sees to it that they run with it:
# load-nginx [--check] STATUS_SOCKET DIGEST; with --check it only looks whether they do.
set -eu
only_check=
if test "$1" = --check; then
    only_check=yes
    shift
fi
socket=$1 digest=$2

loaded() {
    test "$(curl --silent --unix-socket "$socket" http://localhost/config)" = "$digest"
}

gate_is_open() {
    systemctl is-active --quiet synapse-gate.socket &&
        sed -n 's/^ListenStream=//p' /etc/systemd/system/synapse-gate.socket | while read -r path; do
            test -S "$path" || exit 1
        done
}

if test "$only_check"; then
    loaded && gate_is_open
    exit
fi

systemctl daemon-reload
gate_is_open || systemctl restart synapse-gate.socket
systemctl reload-or-restart nginx
deadline=$(($(date +%s) + 5))
until loaded; do
    if test "$(date +%s)" -ge "$deadline"; then
        # A reload goes on with the old configuration where it can't bind a new address beside an old one, such as
        # all addresses of a port that it had on one.
        systemctl restart nginx
        loaded
        exit
    fi
    sleep 0.05
done

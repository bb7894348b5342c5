#!/bin/sh
# Has nginx load its configuration, and sees to it that it runs with it: load-nginx STATUS_SOCKET DIGEST
set -eu
socket=$1 digest=$2

loaded() {
    test "$(curl --silent --unix-socket "$socket" http://localhost/config)" = "$digest"
}

systemctl daemon-reload
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

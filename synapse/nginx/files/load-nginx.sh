#!/bin/sh
# Has nginx load its configuration, opens the gates and no other, and sees to it that they run: load-nginx STATUS_SOCKET DIGEST GATE...
set -eu
gates=$(shift 2 && echo "$*")

loaded() {
    "$(dirname "$0")/nginx-is-loaded" "$@"
}

systemctl daemon-reload
# shellcheck disable=SC2086
systemctl start $gates
systemctl list-units --plain --no-legend 'synapse-gate@*.socket' | while read -r gate _; do
    case " $gates " in
    *" $gate "*) ;;
    *) systemctl stop "$gate" ;;
    esac
done
systemctl reload-or-restart nginx
deadline=$(($(date +%s) + 5))
until loaded "$@"; do
    if test "$(date +%s)" -ge "$deadline"; then
        # A reload goes on with the old configuration where it can't bind a new address beside an old one, such as
        # all addresses of a port that it had on one.
        systemctl restart nginx
        loaded "$@"
        exit
    fi
    sleep 0.05
done

#!/bin/sh
# Has nginx load its configuration, opens the gates and no other, and sees to it that they run: load-nginx STATUS_SOCKET DIGEST GATE...
set -eu
gates=$(shift 2 && echo "$*")

loaded() {
    "$(dirname "$0")/nginx-is-loaded" "$@"
}

# Those of the first list that are not in the second.
without() {
    for unit in $1; do
        case " $2 " in
        *" $unit "*) ;;
        *) echo "$unit" ;;
        esac
    done
}

# Whether systemd has read all that it has loaded of these as it is now. All gates come from the same files, so one is asked:
# main's, which is always there. Before release 256 systemd does not say so of a drop-in in a directory that is new:
# https://github.com/systemd/systemd/issues/31752
is_read() {
    read=$(systemctl show --property=NeedDaemonReload,DropInPaths nginx.service synapse-gate@matrix-synapse.socket \
        synapse-gate@matrix-synapse.service)
    case $read in
    *NeedDaemonReload=yes*) false ;;
    *nginx.service.d/matrix-synapse.conf*) ;;
    *) false ;;
    esac
}

# A socket that is open stays as it was made.
if systemctl show --property=NeedDaemonReload synapse-gate@matrix-synapse.socket | grep --quiet =yes; then
    systemctl stop 'synapse-gate@*.socket'
fi
is_read || systemctl daemon-reload
open=$(systemctl list-units --plain --no-legend --state=active 'synapse-gate@*.socket' | cut --delimiter=' ' --fields=1 | xargs)
without "$gates" "$open" | xargs --no-run-if-empty systemctl start
without "$open" "$gates" | xargs --no-run-if-empty systemctl stop
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

#!/bin/sh
# Has nginx load its configuration, opens the gates and no other, and sees to it that they run:
# load-nginx STATUS_SOCKET DIGEST GATES_DIRECTORY NGINX_GROUP GATE...
set -eu
directory=$3 group=$4
gates=$(shift 4 && echo "$*")

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

is_read || systemctl daemon-reload
open=$(systemctl list-units --plain --no-legend --state=active 'synapse-gate@*.socket' | cut --delimiter=' ' --fields=1 | xargs)
without "$gates" "$open" | xargs --no-run-if-empty systemctl start
without "$open" "$gates" | xargs --no-run-if-empty systemctl stop
# A socket that is open stays as it was made, and can't be opened anew while somebody passes.
find "$directory" -name '*.sock' ! -group "$group" -exec chgrp "$group" {} +
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

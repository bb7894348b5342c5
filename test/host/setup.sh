#!/bin/bash
# Makes a fresh Debian 12 or 13 machine ready for every target of the Makefile: packages, the
# virtual environment .venv, a Docker engine, and the images of the disposable host. What is there
# already costs nothing.
set -euo pipefail
cd "$(dirname "$0")/../.."

progress() { printf '[%6d s] %s\n' "$SECONDS" "$*" >&2; }

install_packages() {
    local wanted=(apparmor curl debootstrap iproute2 iptables mmdebstrap openssl python3-venv shellcheck zstd)
    local missing=() package
    # Docker may be there from elsewhere, and Debian's would take its place.
    command -v dockerd >/dev/null || wanted+=(docker.io)
    # Debian 13 has the client in a package of its own.
    command -v docker >/dev/null || grep -q '^VERSION_ID="12"' /etc/os-release || wanted+=(docker-cli)
    for package in "${wanted[@]}"; do
        dpkg-query -W -f '${db:Status-Abbrev}' "$package" 2>/dev/null | grep -q ^ii || missing+=("$package")
    done
    # Without lists apt knows no mirrors, and the images are made from the mirrors that it knows.
    if [[ ${#missing[@]} -gt 0 || ! $(apt-get indextargets 'Created-By: Packages') ]]; then
        progress "apt-get update"
        apt-get -qq update
    fi
    if [[ ${#missing[@]} -gt 0 ]]; then
        progress "installing ${missing[*]}"
        DEBIAN_FRONTEND=noninteractive apt-get -qq install --no-install-recommends \
            -o DPkg::Lock::Timeout=600 "${missing[@]}" >/dev/null
    fi
    command -v nginx >/dev/null || install_nginx
}

# The tests start an nginx of their own; the package's service must not take this machine's port 80.
install_nginx() {
    local policy=/usr/sbin/policy-rc.d
    progress "installing nginx-light"
    if [[ ! -e $policy ]]; then
        trap 'rm -f /usr/sbin/policy-rc.d' EXIT
        printf '#!/bin/sh\nexit 101\n' >$policy
        chmod +x $policy
    fi
    DEBIAN_FRONTEND=noninteractive apt-get -qq install --no-install-recommends \
        -o DPkg::Lock::Timeout=600 nginx-light >/dev/null
    systemctl --quiet disable nginx
    if [[ $(trap -p EXIT) ]]; then
        rm -f $policy
        trap - EXIT
    fi
}

make_venv() {
    local requirements=(test/requirements.txt test/host/images/host/requirements.txt) digest
    digest=$({ python3 --version; cat "${requirements[@]}"; } | sha256sum)
    [[ $(cat .venv/requirements.digest 2>/dev/null) == "$digest" ]] && return
    progress "making .venv"
    python3 -m venv .venv
    .venv/bin/pip install -qq --disable-pip-version-check --no-deps --requirement "${requirements[0]}"
    echo "$digest" >.venv/requirements.digest
}

mkdir -p .venv
exec 9>.venv/setup.lock
flock 9

install_packages
python3 test/host/host.py build 9>&- &
images=$!
make_venv
wait "$images"
progress "set up"

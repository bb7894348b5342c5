#!/bin/bash
# Makes a fresh Debian 12 or 13 machine ready for every target of the Makefile: packages, the
# virtual environment .venv, a Docker engine, and the images of the disposable host. What is there
# already costs nothing.
set -euo pipefail
cd "$(dirname "$0")/../.."

progress() { printf '[%6d s] %s\n' "$SECONDS" "$*" >&2; }

install_packages() {
    local wanted=(curl debootstrap docker.io iproute2 iptables mmdebstrap python3-venv shellcheck zstd) missing=() package
    # Debian 13 has the client in a package of its own.
    grep -q '^VERSION_ID="12"' /etc/os-release || wanted+=(docker-cli)
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

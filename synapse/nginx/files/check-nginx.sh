#!/bin/sh
# Has nginx test its whole configuration with a candidate in the place of one file: check-nginx FILE CANDIDATE
set -eu
file=$1 candidate=$2

copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
cp -a /etc/nginx/. "$copy"
cp "$candidate" "$copy/${file#/etc/nginx/}"
# nginx's own includes name /etc/nginx.
find "$copy" -type f -name '*.conf' -exec sed -i "s#/etc/nginx/#$copy/#g" {} +
nginx -t -q -c "$copy/nginx.conf"

#!/usr/bin/env bash
# Lays Debian's own Prometheus (prometheus, promtool) into FOLDER without installing it; needs no root where apt knows
# its packages.   fetch_prometheus.sh FOLDER
set -euo pipefail
mkdir -p "$1"
folder=$(cd "$1" && pwd)
[[ -x $folder/usr/bin/prometheus && -x $folder/usr/bin/promtool ]] && exit 0
command -v apt-get >/dev/null || { echo 'fetch_prometheus: needs Debian or a relative of it' >&2; exit 1; }
work=$(mktemp -d "$folder/.fetch.XXXXXX")
trap 'rm -rf "$work"' EXIT
cd "$work"
download() { apt-get -qq -o APT::Sandbox::User=root download prometheus >/dev/null 2>&1; }
download || { apt-get -qq update && download; } || { echo 'fetch_prometheus: apt has no package prometheus' >&2; exit 1; }
dpkg -x prometheus_*.deb unpacked
cp -r unpacked/usr "$folder/"

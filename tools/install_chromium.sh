#!/usr/bin/env bash
# Chromium for the tests of pictures, where it is missing and may be installed. Without it they are
# skipped on a developer's machine, and fail where CI is set.
set -euo pipefail

for name in chromium chromium-browser google-chrome; do
    if command -v "$name" >/dev/null; then
        exit 0
    fi
done
if [[ $(id -u) -ne 0 ]] || ! command -v apt-get >/dev/null; then
    echo "there is no Chromium, and it can't be installed from here: apt-get install chromium" >&2
    exit 0
fi
echo "installing chromium ..."
export DEBIAN_FRONTEND=noninteractive
apt-get -qq update >/dev/null
apt-get -qq install --no-install-recommends chromium fonts-liberation >/dev/null

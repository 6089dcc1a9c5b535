#!/bin/sh
# Sees to the programs listed in system.txt: installs the missing ones on a Debian-like
# machine as root, elsewhere names them and lets the tests go on without.
set -eu
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin
list=$(dirname "$0")/system.txt

# Packages of all listed commands that PATH does not have.
missing() {
    while read -r command package _; do
        case $command in '' | '#'*) continue ;; esac
        command -v "$command" >/dev/null 2>&1 || printf '%s ' "$package"
    done <"$list"
}

packages=$(missing)
[ -n "$packages" ] || exit 0

if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
    echo "installing system packages: $packages"
    export DEBIAN_FRONTEND=noninteractive
    # A stale package list is no reason to stop: the packages may be there all the same.
    apt-get update -qq </dev/null || echo "apt-get update failed; going on with the old lists" >&2
    # shellcheck disable=SC2086 # one word a package
    apt-get install -y -qq --no-install-recommends $packages </dev/null
    packages=$(missing)
    [ -n "$packages" ] || exit 0
fi

cat >&2 <<END

Missing on this machine (Debian's package names): $packages
Tests that need them are skipped. On Debian or Ubuntu:
    sudo apt-get install $packages

END

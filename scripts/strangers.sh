#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Install the programs that we did not write and test against.
#
# As root, or with a sudo that asks for no password, they come from Debian's packages; otherwise what is
# missing is named, and the tests that need it skip with that reason. It never fails the build, and is quick
# when all is there.
#
#   scripts/strangers.sh            install what is missing
#   scripts/strangers.sh --list     say what is here, install nothing
set -u

# program:package, in the order in which they are reported.
programs=(
    cryptsetup:cryptsetup-bin
    qemu-img:qemu-utils
    qemu-io:qemu-utils
    qemu-nbd:qemu-utils
    qemu-storage-daemon:qemu-utils # before QEMU 8 Debian had it in qemu-system-common
    nbdkit:nbdkit
    nbdinfo:libnbd-bin
    nbdcopy:libnbd-bin
    nbdfuse:libnbd-bin
    mkfs.ext4:e2fsprogs
    nbdsh:python3-libnbd # its module is for the system's own python3
    fio:fio
    openssl:openssl
    cc:gcc # optional: the batching load generator of the benchmarks
)
# The tools promise to behave like those of this QEMU; an older one is replaced where a backport is offered.
qemu_major_wanted=10

say() { printf 'strangers: %s\n' "$*"; }

have() { command -v "$1" >/dev/null 2>&1; }

qemu_major() {
    have qemu-img || { echo 0; return; }
    local version
    version=$(qemu-img --version 2>/dev/null | sed -n '1s/.*version \([0-9]*\).*/\1/p')
    echo "${version:-0}"
}

codename=$(. /etc/os-release 2>/dev/null && echo "${VERSION_CODENAME:-}")

# Debian 12 has QEMU 7.2, and 10.0 in its backports.
backports_help() { [ "$codename" = bookworm ]; }

missing_programs() {
    local entry
    for entry in "${programs[@]}"; do
        have "${entry%%:*}" || printf '%s\n' "$entry"
    done
}

# The packages to ask apt for, each once.
wanted_packages() {
    {
        missing_programs | sed 's/.*://'
        if [ "$(qemu_major)" -lt "$qemu_major_wanted" ] && backports_help; then
            echo qemu-utils
        fi
    } | sort -u
}

versions() {
    local entry name package seen=' '
    for entry in "${programs[@]}"; do
        name=${entry%%:*} package=${entry#*:}
        have "$name" || continue
        case $seen in *" $package "*) continue ;; esac
        seen="$seen$package "
        printf '%s %s, ' "$package" "$(dpkg-query -W -f '${Version}' "$package" 2>/dev/null || echo unknown)"
    done | sed 's/, $//'
}

report_and_leave() {
    local entry names=()
    for entry in $(missing_programs); do
        names+=("${entry%%:*} (apt package ${entry#*:})")
    done
    if [ "${#names[@]}" -gt 0 ]; then
        say "$1; tests that need these will skip:"
        printf '    %s\n' "${names[@]}"
    elif [ -n "$(wanted_packages)" ]; then
        say "$1; going on with QEMU $(qemu_major), tests are written for $qemu_major_wanted"
    fi
    exit 0
}

# Ask apt's own configuration for the mirror of this release, and add the backports of the same mirror.
add_backports() {
    local mirror targets list=/etc/apt/sources.list.d/bottomhalf-backports.sources
    backports_help || return 0
    local format='$(RELEASE) $(COMPONENT) $(REPO_URI)'
    targets=$(apt-get indextargets --format "$format" 'Created-By: Packages' 2>/dev/null)
    grep -q "^$codename-backports main " <<<"$targets" && return 0
    mirror=$(sed -n "s/^$codename main //p" <<<"$targets" | head -n 1)
    [ -n "$mirror" ] || return 0
    {
        printf 'Types: deb\nURIs: %s\nSuites: %s-backports\nComponents: main\n' "$mirror" "$codename"
        local keyring=/usr/share/keyrings/debian-archive-keyring.gpg
        [ -r "$keyring" ] && printf 'Signed-By: %s\n' "$keyring"
    } | $sudo tee "$list" >/dev/null
}

apt() {
    $sudo env DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=120 -o Acquire::Retries=2 \
        -o Acquire::http::Timeout=30 -o Dpkg::Use-Pty=0 "$@" >>"$log" 2>&1 </dev/null
}

install_packages() {
    local package options=(install -y --no-install-recommends)
    [ "$#" -gt 0 ] || return 0
    # One at a time only when all at once failed: a release may lack one of them.
    apt "${options[@]}" "$@" && return
    for package in "$@"; do
        apt "${options[@]}" "$package" || say "apt could not install $package"
    done
}

# QEMU comes from the backports where they have it; nothing else does.
install_qemu() {
    local package=$1
    if backports_help && apt-cache madison "$package" 2>/dev/null | grep -q "$codename-backports"; then
        apt install -y --no-install-recommends -t "$codename-backports" "$package" && return
    fi
    install_packages "$package"
}

if [ "${1:-}" = --list ]; then
    say "$(versions)"
    report_and_leave "not installed"
fi

packages=$(wanted_packages)
if [ -z "$packages" ]; then
    say "all here: $(versions)"
    exit 0
fi

have apt-get || report_and_leave "no apt-get here, install them by hand"
if [ "$(id -u)" = 0 ]; then
    sudo=
elif have sudo && sudo -n true 2>/dev/null; then
    sudo='sudo -n'
else
    report_and_leave "neither root nor a sudo without password"
fi

log=$(mktemp)
trap 'rm -f "$log"' EXIT
say "installing" $packages
add_backports
apt update || say "apt-get update failed, trying with the lists that are here"

others=()
for package in $packages; do
    if [ "$package" = qemu-utils ]; then
        install_qemu qemu-utils
        have qemu-storage-daemon || install_qemu qemu-system-common
    else
        others+=("$package")
    fi
done
install_packages "${others[@]}"

if [ -n "$(wanted_packages)" ]; then
    say "the end of what apt said:"
    tail -n 8 "$log" | sed 's/^/    /'
    report_and_leave "apt did not bring all"
fi
say "all here: $(versions)"

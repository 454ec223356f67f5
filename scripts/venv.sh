#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Make .venv with this package (editable), what its tests need, and pip. Works as root or not.
#
#   scripts/venv.sh [DIRECTORY]      PYTHON=... chooses the interpreter
set -eu

cd "$(dirname "$0")/.."
venv=${1:-.venv}

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

python=${PYTHON:-}
for candidate in $python python3 python3.13 python3.12 python3.11; do
    if new_enough "$candidate"; then
        python=$candidate
        break
    fi
    if [ -n "${PYTHON:-}" ]; then
        echo "venv: PYTHON=$PYTHON is not a Python of version 3.11 or newer" >&2
        exit 1
    fi
done
if [ -z "$python" ]; then
    echo "venv: no Python of version 3.11 or newer found; install one (on Debian: apt-get install python3)" \
        "or name it with PYTHON=..." >&2
    exit 1
fi

# Debian leaves ensurepip out of python3; without it a virtual environment has no pip.
if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    if [ "$(id -u)" = 0 ]; then
        sudo=
    elif command -v sudo >/dev/null && sudo -n true 2>/dev/null; then
        sudo='sudo -n'
    else
        sudo=no
    fi
    if [ "$sudo" != no ] && command -v apt-get >/dev/null; then
        echo "venv: $python cannot make virtual environments, installing python3-venv"
        $sudo apt-get -qq update || true
        $sudo env DEBIAN_FRONTEND=noninteractive \
            apt-get -qq install -y --no-install-recommends python3-venv || true
    fi
    if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
        echo "venv: $python cannot make virtual environments (it has no ensurepip)." >&2
        echo "venv: on Debian, 'apt-get install python3-venv' as root mends that; then run make again." >&2
        exit 1
    fi
fi

# A .venv whose interpreter is gone or too old is made anew.
if ! new_enough "$venv/bin/python"; then
    rm -rf "$venv"
    "$python" -m venv "$venv"
fi
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --editable '.[test]'

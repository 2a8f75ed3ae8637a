#!/bin/sh
# Look for what the build needs from the system, and get what is missing.
#
# As root on a Debian-like system the packages are installed; anywhere else the one command
# that installs them is printed, and the script fails. Usage: system_packages.sh PYTHON [browser]
set -eu

python=${1:?usage: system_packages.sh PYTHON [browser]}

fail() {
    printf 'promptkd set-up: %s\n' "$*" >&2
    exit 1
}

has() { command -v "$1" >/dev/null 2>&1; }

# What only the user can choose: an interpreter, a Rust toolchain, a C compiler.
has "$python" || fail "no '$python'; install Python 3.11 or newer, or say: make PYTHON=/path/to/python"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "'$python' is $("$python" -V 2>&1), but 3.11 or newer is needed; say: make PYTHON=/path/to/python"
has cargo || fail "no cargo; install a Rust toolchain (https://rustup.rs)"
has cc || has gcc || has clang || fail "no C compiler; install gcc or clang"

# What a package manager brings, under its names in apt, dnf and brew.
apt='' dnf='' brew=''
need() {
    apt="$apt $1" dnf="$dnf $2" brew="$brew $3"
}
has cmake || need cmake cmake cmake # builds libjpeg-turbo
case $(uname -m) in
x86_64 | amd64 | i?86) has nasm || need nasm nasm nasm ;; # assembles its SIMD code
esac
if [ "${2:-}" = browser ]; then # the slow tests open a page in one
    has chromium || has chromium-browser || has google-chrome || need chromium chromium chromium
fi
"$python" -c 'import ensurepip, venv' 2>/dev/null || need python3-venv python3-pip python
# `cargo test` links a test program with libpython.
"$python" - <<'PY' || need python3-dev python3-devel python
import os, sys, sysconfig
folder, library = sysconfig.get_config_vars("LIBDIR", "LDLIBRARY")
sys.exit(sys.platform.startswith("linux") and not os.path.exists(os.path.join(folder, library)))
PY

[ -n "$apt" ] || exit 0

if has apt-get; then
    if [ "$(id -u)" = 0 ]; then
        echo "promptkd set-up: installing$apt"
        export DEBIAN_FRONTEND=noninteractive
        apt-get update -q
        # shellcheck disable=SC2086  # one word a package
        apt-get install -y -q --no-install-recommends $apt
        exit 0
    fi
    fail "these are missing:$apt; run: sudo apt-get install -y$apt"
elif has dnf; then
    fail "these are missing:$dnf; run: sudo dnf install -y$dnf"
elif has brew; then
    fail "these are missing:$brew; run: brew install$brew"
fi
fail "install these first:$apt"

# Sourced by the scripts beside it: finds a Python, makes .venv, installs what is not installed yet.
# The product itself needs no shell; this only spares typing. On Windows: see CONTRIBUTING.md.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=$ROOT/.venv
export PIP_DISABLE_PIP_VERSION_CHECK=1

find_python() { # prints a Python >= 3.11 that can make environments
    local name
    for name in ${PYTHON:-} python3 python3.14 python3.13 python3.12 python3.11 python; do
        if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            if ! "$name" -c 'import venv, ensurepip' 2>/dev/null; then
                echo "$name cannot make environments: install its venv package (Debian: apt-get install python3-venv)" >&2
                return 1
            fi
            echo "$name"
            return 0
        fi
    done
    echo "Langmill needs Python 3.11 or newer, and found: $(python3 --version 2>&1 || echo none). Set PYTHON=/path/to/python3." >&2
    return 1
}

make_venv() { # .venv with pip, nothing installed
    [ -x "$VENV/bin/python" ] && "$VENV/bin/python" -c 'import pip' 2>/dev/null && return 0
    local python
    python=$(find_python) || return 1
    "$python" -m venv "$VENV"
}

setup() { # setup EXTRAS: install Langmill and its extras ("" for the core), once for each state of its requirements
    make_venv || exit 1
    local extras=$1 state stamp
    stamp=$VENV/.langmill-${extras//,/-}
    state=$(cat "$ROOT/pyproject.toml" "$ROOT/constraints.txt" | cksum; echo "$ROOT")
    [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$state" ] && return 0
    echo "installing Langmill${extras:+ with $extras} into .venv (about 1 GB the first time)" >&2
    (cd "$ROOT" && "$VENV/bin/python" -m pip install --quiet -c constraints.txt -e ".${extras:+[$extras]}") || {
        echo "the installation failed: the lines above say why" >&2
        exit 1
    }
    echo "$state" >"$stamp"
}

browser() { # for the tests of the chat page: Debian's Chromium, or Playwright's own where there is no apt
    local name
    for name in chromium chromium-browser google-chrome; do
        command -v "$name" >/dev/null && return 0
    done
    echo "installing Chromium for the tests of the chat page" >&2
    if command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
        apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium fonts-noto-cjk >/dev/null
    else
        "$VENV/bin/python" -m playwright install chromium
    fi || {
        echo "the tests of the chat page need a browser: install Chromium" >&2
        exit 1
    }
}

#!/usr/bin/env bash
# Print one working interpreter for each Python version given: `find_pythons.sh 3.10 3.11`.
# A pyenv shim may be on the PATH and refuse to run, so each candidate is tried; pyenv's own are looked at too.
set -euo pipefail
shopt -s nullglob

for version in "$@"; do
    for candidate in \
        "$(command -v "python$version" || true)" \
        "${PYENV_ROOT:-$HOME/.pyenv}/versions/$version".*/bin/"python$version"; do
        if [[ -n $candidate ]] && "$candidate" -c 'import venv, ensurepip' 2>/dev/null; then
            echo "$candidate"
            break
        fi
    done
done

#!/usr/bin/env bash
# Run the capture tests on every interpreter found, without torch: `test_pythons.sh 3.10 3.11 ...`.
# One environment each (.venv-py3.10 ...), kept for the next run.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

mapfile -t pythons < <(tools/find_pythons.sh "$@")
echo "found ${#pythons[@]} of $#: ${pythons[*]}"

failed=()
for python in "${pythons[@]}"; do
    version=${python##*/python}
    venv=.venv-py$version
    if [[ pyproject.toml -nt $venv/.stamp || constraints.txt -nt $venv/.stamp ]]; then
        [[ -x $venv/bin/python ]] || "$python" -m venv "$venv"
        "$venv/bin/python" -m pip install -qq --upgrade "pip>=25.1"
        "$venv/bin/python" -m pip install -qq -c constraints.txt --group capture
        touch "$venv/.stamp"
    fi
    echo "--- Python $version"
    "$venv/bin/python" -m pytest tests/capture -q -p no:cacheprovider || failed+=("$version")
done

if ((${#failed[@]})); then
    echo "tests/capture failed on Python: ${failed[*]}" >&2
    exit 1
fi

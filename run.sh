#!/bin/sh
# ./run.sh [ARGS]   set up .venv once, then train, analyse and report (weightdiff pipeline ARGS)
# ./run.sh test     set up .venv once, then lint, type-check and test
# WEIGHTDIFF_INDEX  another package index to install from;  PYTHON  another interpreter
set -eu
cd "$(dirname "$0")"

extra=png
[ "${1:-}" = test ] && extra=test
stamp=.venv/.installed-$extra
fresh() { [ -x .venv/bin/python ] && [ "$stamp" -nt pyproject.toml ] && [ "$stamp" -nt constraints.txt ]; }

if ! fresh; then
    python=${PYTHON:-python3}
    "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || {
        echo "run.sh: needs Python 3.11 to 3.13, found $("$python" -V 2>&1); set PYTHON" >&2; exit 1; }
    if ! "$python" -m venv .venv 2>/dev/null; then  # Debian without python3-venv: pip can make one
        "$python" -m pip --version >/dev/null 2>&1 || {
            echo "run.sh: $python has neither venv nor pip; install one of them" >&2; exit 1; }
        "$python" -m pip install -q --target .venv-bootstrap virtualenv
        PYTHONPATH=.venv-bootstrap "$python" -m virtualenv -q .venv && rm -rf .venv-bootstrap
    fi
    echo "run.sh: installing the packages into .venv (once, some minutes)" >&2
    .venv/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt \
        ${WEIGHTDIFF_INDEX:+--index-url "$WEIGHTDIFF_INDEX"} -e ".[$extra]"
    touch "$stamp"
fi

export PATH="$PWD/.venv/bin:$PATH" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
if [ "${1:-}" = test ]; then
    shift
    ruff format --check . && ruff check . && mypy && exec pytest -n "${WORKERS:-2}" --dist loadfile "$@"
fi
exec weightdiff pipeline "$@"

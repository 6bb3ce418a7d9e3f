#!/usr/bin/env bash
# Tests on other versions of torch, each in an environment of its own; at the end one line per version.
#   tools/test_versions.sh VERSION...      called by `make test-versions`; TESTS: what pytest runs
set -uo pipefail
cd "$(dirname "$0")/.." || exit
status=0
results=()

# Without setuptools: each version of torch has its own bounds for it.
make_environment() {
  mkdir -p "$2"
  sed "s/^torch==.*/torch==$1/; /^setuptools==/d" constraints.txt >"$2/constraints.txt"
  make "VENV=$2/venv" "CONSTRAINTS=$2/constraints.txt" "$2/venv/.dev"
}

run_tests() {
  echo "== torch $1"
  # shellcheck disable=SC2086  # TESTS is a list of words
  OMP_NUM_THREADS=1 "$2/venv/bin/python" -m pytest -n 2 --dist loadgroup $TESTS | tee "$2/tests.txt"
}

for version in "$@"; do
  folder=.venvs/torch-$version
  if ! make_environment "$version" "$folder"; then
    status=1
    results+=("torch $version: no environment could be made")
    continue
  fi
  run_tests "$version" "$folder" || status=1
  results+=("torch $version: $(tail -n 1 "$folder/tests.txt")")
done
echo
printf '%s\n' "${results[@]}"
exit $status

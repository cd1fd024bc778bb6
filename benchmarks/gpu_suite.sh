#!/usr/bin/env bash
# Tests and benchmarks on a machine that has a GPU, torch, triton and pytest, and no network. Run it from anywhere.
#
#   benchmarks/gpu_suite.sh --group tests|route_and_mix|all [--shard I/N] [--shards N] [--output DIR] [--wheels DIR] [--commit ID] [--smoke]
#
# A group is cut into N shards (default 4) that are stopped after 9 minutes at most. --shard runs one of them and leaves the report to
# you (python -m benchmarks.report); without it all run in turn. A shard whose result is in the output folder (default $OUT, else
# ./outputs) is skipped, so a run that was cut short goes on where it stopped.
# --wheels: a folder with wheels of Python packages the machine lacks (pytest-benchmark, say).
set -euo pipefail
cd "$(dirname "$0")/.."

group=all shard="" shards=4 output="${OUT:-outputs}" wheels="" smoke=() failed=0
while (($#)); do
    case "$1" in
        --group) group=$2; shift 2 ;;
        --shard) shard=${2%/*} shards=${2#*/}; shift 2 ;;
        --shards) shards=$2; shift 2 ;;
        --output) output=$2; shift 2 ;;
        --wheels) wheels=$2; shift 2 ;;
        --commit) export BENCHMARK_COMMIT=$2; shift 2 ;;
        --smoke) smoke=(--smoke); shift ;;
        *) echo "unknown argument: $1" >&2; sed -n 4p "$0" >&2; exit 2 ;;
    esac
done
case "$group" in tests | route_and_mix | all) ;; *) echo "--group is tests, route_and_mix or all, got $group" >&2; exit 2 ;; esac
mkdir -p "$output"
export PYTHONUNBUFFERED=1

install() {
    [[ -z $wheels ]] || python3 -m pip install --quiet --no-index --no-deps "$wheels"/*.whl
    python3 -m pip install --quiet --no-deps --no-build-isolation -e .
}

run_tests() {
    [[ ! -e $output/tests.passed ]] || { echo "tests: passed before"; return; }
    if timeout 530 python3 -m pytest tests/kernels tests/ops tests/properties tests/modules tests/models -q 2>&1 | tee "$output/tests.log"; then
        touch "$output/tests.passed"
    else
        failed=1
    fi
}

run_shard() { # op, index
    local result="$output/$1-$2of$shards.json"
    [[ ! -s $result ]] || { echo "$1 shard $2/$shards: done before"; return; }
    timeout 530 python3 -m pytest "benchmarks/test_$1.py" --benchmark-only --shard "$2/$shards" "${smoke[@]}" \
        --benchmark-columns=median,iqr,rounds --benchmark-json="$result.part" -q 2>&1 | tee -a "$output/$1.log" || failed=1
    # pytest writes the file at its end, without what failed; after a time-out there is none and the shard runs again next time
    if [[ -s $result.part ]]; then mv "$result.part" "$result"; fi
}

run_benchmarks() { # op
    local index
    for index in ${shard:-$(seq "$shards")}; do
        run_shard "$1" "$index"
    done
    if [[ -z $shard ]]; then python3 -m benchmarks.report "$output/$1"-*of*.json --output "$output/$1"; fi
}

install
if [[ $group == tests || $group == all ]]; then run_tests; fi
if [[ $group == route_and_mix || $group == all ]]; then run_benchmarks route_and_mix; fi
exit "$failed"

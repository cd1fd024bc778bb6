#!/usr/bin/env bash
# Tests and benchmarks on a machine that has a GPU, torch, triton and pytest, and no network. Run it from anywhere.
#
#   benchmarks/gpu_suite.sh --group GROUP [--shard I/N] [--shards N] [--output DIR] [--wheels DIR] [--commit ID] [--smoke]
#
# GROUP: tests, route_and_mix, prompt_attention, receptive_field_attention, window_prompt_attention, end_to_end,
# mope_baf or all.
# A group is cut into N shards (default: see below) that are stopped after 9 minutes at most. --shard runs one of them and leaves the
# report to you (python -m benchmarks.report); without it all run in turn. A shard whose result is in the output folder (default $OUT,
# else ./outputs) is skipped, so a run that was cut short goes on where it stopped.
# --wheels: a folder with wheels of Python packages the machine lacks (pytest-benchmark; xformers with nvidia-cuda-runtime-cu12; timm,
# transformers and peft with what they need: sizes and providers whose library is missing are skipped).
set -euo pipefail
cd "$(dirname "$0")/.."

# so many that a shard should take a quarter of its 9 minutes: each N-th test, or two sizes of a benchmark.
# Of attention each size compiles FlexAttention twice and Triton's kernels once, tens of seconds in all. Of whole models one size:
# about 36 measurements of 6 seconds, or five models compiled by Inductor; of MoPE-BAF one size and mode, 18 of 10 seconds or two compiled.
declare -A default_shards=([tests]=6 [route_and_mix]=4 [prompt_attention]=6 [receptive_field_attention]=4
    [window_prompt_attention]=6 [end_to_end]=29 [mope_baf]=13)
benchmarks=(route_and_mix prompt_attention receptive_field_attention window_prompt_attention end_to_end mope_baf)
group=all shard="" shards="" output="${OUT:-outputs}" wheels="" smoke=() failed=0
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
if [[ $group != all && -z ${default_shards[$group]:-} ]]; then
    echo "--group is tests, ${benchmarks[*]} or all, got $group" >&2
    exit 2
fi
mkdir -p "$output"
export PYTHONUNBUFFERED=1

install() {
    [[ -z $wheels ]] || python3 -m pip install --quiet --no-index --no-deps "$wheels"/*.whl
    python3 -m pip install --quiet --no-deps --no-build-isolation -e .
}

test_shard() { # index, count
    local passed="$output/tests-$1of$2.passed" chosen
    [[ ! -e $passed ]] || { echo "tests shard $1/$2: passed before"; return; }
    chosen=$(mktemp)
    python3 -m pytest tests/kernels tests/ops tests/properties tests/modules tests/models tests/encoders tests/analysis tests/test_*attention*.py \
        tests/test_receptive_field.py --collect-only -q | grep :: | awk -v i="$1" -v n="$2" 'NR % n == i % n' > "$chosen"
    if timeout 500 python3 -m pytest "@$chosen" -q 2>&1 | tee -a "$output/tests.log"; then touch "$passed"; else failed=1; fi
    rm "$chosen"
}

benchmark_shard() { # op, index, count
    local result="$output/$1-$2of$3.json"
    [[ ! -s $result ]] || { echo "$1 shard $2/$3: done before"; return; }
    timeout 530 python3 -m pytest "benchmarks/test_$1.py" --benchmark-only --shard "$2/$3" "${smoke[@]}" \
        --benchmark-columns=median,iqr,rounds --benchmark-json="$result.part" -q 2>&1 | tee -a "$output/$1.log" || failed=1
    # pytest writes the file at its end, with a note of what failed; after a time-out there is none and the shard runs again next time
    if [[ -s $result.part ]]; then mv "$result.part" "$result"; fi
}

run_group() { # name
    local count=${shards:-${default_shards[$1]}} index
    for index in ${shard:-$(seq "$count")}; do
        if [[ $1 == tests ]]; then test_shard "$index" "$count"; else benchmark_shard "$1" "$index" "$count"; fi
    done
    [[ -n $shard || $1 == tests ]] || python3 -m benchmarks.report "$output/$1"-*of*.json --output "$output"
}

install
if [[ $group == all ]]; then
    for name in tests "${benchmarks[@]}"; do run_group "$name"; done
else
    run_group "$group"
fi
exit "$failed"

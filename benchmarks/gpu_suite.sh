#!/usr/bin/env bash
# Tests and benchmarks on a machine that has a GPU, torch, triton and pytest, and no network. Run it from anywhere.
#
#   benchmarks/gpu_suite.sh [--wheels DIR] [--commit ID] [--output DIR] tests [I/N] | profiles | [GROUP...] [ARGUMENT...]
#
# tests: those that need a GPU or gain by one, or only each N-th, from the I-th; shards that passed are not run again.
# profiles: of ViT-B, BERT-B and Swin-B at two batch sizes; what is there is not made again.
# Else the arguments are those of python -m benchmarks.run: groups, --shards 1 for one of less than 9 minutes, -k, --smoke. Results stay
# in the output folder (default outputs/gpu), where the next call goes on; if OUT is set they are copied there too.
# --wheels: a folder with wheels of Python packages the machine lacks (pytest-benchmark, tqdm, matplotlib; xformers with nvidia-cuda-runtime-cu12; timm,
# transformers and peft with what they need: sizes and providers whose library is missing are skipped).
set -euo pipefail
cd "$(dirname "$0")/.."

output=outputs/gpu wheels=""
while [[ ${1:-} == --wheels || ${1:-} == --commit || ${1:-} == --output ]]; do
    case "$1" in
        --wheels) wheels=$2 ;;
        --commit) export BENCHMARK_COMMIT=$2 ;;
        --output) output=$2 ;;
    esac
    shift 2
done
mkdir -p "$output"
export PYTHONUNBUFFERED=1

copy_results() {
    if [[ -n ${OUT:-} ]]; then cp -r "$output"/. "$OUT"; fi
}
# a lease may end in the middle
while sleep 30; do copy_results; done &
trap "kill $!; copy_results" EXIT

[[ -z $wheels ]] || python3 -m pip install --quiet --no-index --no-deps "$wheels"/*.whl
python3 -m pip install --quiet --no-deps --no-build-isolation -e .

if [[ ${1:-} == profiles ]]; then
    for encoder in ViT-B/16 BERT-B Swin-B/224; do
        for batch in 64 16; do
            for mode in training inference; do
                made="$output/profiles/.$(tr -c 'A-Za-z0-9\n' - <<< "$encoder-$batch-$mode")"
                [[ ! -e $made ]] || continue
                if timeout 170 python3 -m benchmarks.profile_steps --encoder "$encoder" --batch "$batch" --mode "$mode" --output "$output/profiles"
                then touch "$made"; else echo "no profile of $encoder, B=$batch, $mode" >&2; fi
            done
        done
    done
    exit
fi
if [[ ${1:-} != tests ]]; then
    python3 -m benchmarks.run --output "$output" "$@"
    exit
fi
shard=${2:-1/1}
passed="$output/tests-${shard/\//of}.passed"
[[ ! -e $passed ]] || { echo "tests $shard: passed before"; exit; }
python3 -m pytest tests/kernels tests/ops tests/properties tests/modules tests/models tests/encoders tests/analysis tests/test_*attention*.py \
    tests/test_receptive_field.py --collect-only -q | grep :: | awk -v i="${shard%/*}" -v n="${shard#*/}" 'NR % n == i % n' > "$output/tests.txt"
timeout 540 python3 -m pytest "@$output/tests.txt" -q 2>&1 | tee -a "$output/tests.log"
touch "$passed"

#!/usr/bin/env bash
# What only an accelerator can tell, in ten minutes at most: no checkpoint and no dataset is needed.
#
#   tests/benchmarks/accelerator.sh OUTPUT [--small]
#
# One after the other, each within its own time, and whether or not the one before came to its end:
#
#   attention.jsonl       every way of attention at SAM ViT-H's and LLaMA-7B's shapes
#   packing.txt           READ-7B's gradients, questions behind their prefix against whole sequences
#   training_step.jsonl   READ-7B's updates: share of the peak, memory planned and measured, by what is recomputed
#   nano/                 the nano model taught further, and what it scores then
#
# --small tries the script out where there is no accelerator: small models, few updates, hours for nothing.
set -uo pipefail

case ${1:-} in
    '' | -h | --help)
        sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"
        exit
        ;;
esac
mkdir -p "$1" && out=$(cd "$1" && pwd) || exit 1
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 1
python=${PYTHON:-python3} failed=0 patience=1

attention=() packing=(--model read-7b --run --remat True --rounds 3) config=read_7b_reasonseg pictures=(1 4 8)
nano=(--config.optimizer.total_updates=2500 --config.masks_from=1200 --config.data.workers=8) scored=400
if [[ ${2:-} == --small ]]; then
    attention=(--scale 16 --rounds 2) packing=(--model small --run --rounds 2)
    config=read_7b_reasonseg:runlocal pictures=(2) patience=20
    nano=(--config.optimizer.total_updates=4 --config.masks_from=2 --config.optimizer.warmup_updates=1) scored=5
elif [[ -n ${2:-} ]]; then
    echo "there is no option $2, only --small" >&2
    exit 2
fi

# SECONDS FILE COMMAND...: its output goes to the screen and to the file
stage() {
    local seconds=$(($1 * patience)) file=$out/$2 began=$SECONDS status
    shift 2
    echo "== $(basename "$file"): $*" >&2
    timeout --preserve-status --signal=TERM --kill-after=30 "$seconds" "$@" | tee "$file"
    status=${PIPESTATUS[0]}
    if ((status != 0 && status != 75)); then # 75: told to stop, and saved
        failed=1
        echo "== ended with $status" >&2
    fi
    echo "== $((SECONDS - began)) s" >&2
}

stage 60 attention.jsonl "$python" -m tests.benchmarks.attention "${attention[@]}"
stage 100 packing.txt "$python" -m tests.benchmarks.packing "${packing[@]}"
stage 150 training_step.jsonl "$python" -m tests.benchmarks.training_step \
    --config "$config" --pictures "${pictures[@]}" --remat True dots --minutes 2
# told to stop, it saves what it has; merged and scored it is all the same
stage 180 nano.txt "$python" -m read_jax.cli train --config nano_continued --workdir "$out/nano/run" "${nano[@]}"
stage 30 nano_merge.txt "$python" -m read_jax.cli merge "$out/nano/run" --average --overwrite \
    --output "$out/nano/model"
stage 80 nano_scores.txt "$python" -m read_jax.cli evaluate "$out/nano/model" --dataset 'scenes|test' \
    --mode generate --limit "$scored" --overwrite --output "$out/nano/scores"
exit $failed

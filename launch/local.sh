#!/usr/bin/env bash
# Several processes on this machine as one job: for trying out what runs on several machines.
#
#   launch/local.sh [OPTIONS] N -- READ-JAX-ARGUMENTS
#   launch/local.sh --devices 4 2 -- train --config nano_scenes:runlocal --workdir runs/two
#
#   --devices D    simulated CPU devices in each process (default: what the machine has)
#   --restarts K   begin again, at most K times, when a process dies (default: 0)
#   --grace S      seconds that the others have to end by themselves then (default: 90)
#   --port P       where process 0 listens (default: a free one)
#   --dry-run      show the commands and run nothing
#
# Every line that process I says begins with [I]. SIGTERM and Ctrl-C are passed on, and the job saves and ends.
# The exit status is that of the first process that failed: 75 when the job was told to stop and has saved.
# $READ_JAX names the program when it is not `read-jax`.

# shellcheck source-path=SCRIPTDIR
. "$(dirname "$0")/common.sh"

devices='' restarts=0 grace=90 port=''
options 'devices restarts grace port' 'WORDS' "$@"
((${#words[@]} < 2)) || fail "write -- before the arguments of read-jax"
count=${words[0]:-}
positive N "$count"
require --restarts "$restarts" '[0-9]+' 'a number'
positive --grace "$grace"
[[ -z $devices ]] || positive --devices "$devices"
[[ -z $port ]] || positive --port "$port"
something_to_run
((BASH_VERSINFO[0] > 5 || (BASH_VERSINFO[0] == 5 && BASH_VERSINFO[1] >= 1))) || fail 'needs bash 5.1 or later'

read -r -a program <<< "${READ_JAX:-read-jax}"
if [[ -n $devices ]]; then
    export JAX_PLATFORMS=cpu
    # simulated devices share the cores, and wait long for one another
    export XLA_FLAGS="--xla_force_host_platform_device_count=$devices --xla_cpu_collective_call_terminate_timeout_seconds=600 ${XLA_FLAGS:-}"
fi

free_port() {
    python3 -c 'import socket; s = socket.socket(); s.bind(("localhost", 0)); print(s.getsockname()[1])'
}

told=false
pids=()
pass_on() {
    told=true
    kill -TERM "${pids[@]}" 2> /dev/null || true
}
trap pass_on TERM INT

# One try: start all processes and wait for them; sets `status`.
attempt() {
    local at=${port:-$(free_port)} i ended code deadline=0 left=$count
    pids=() status=0
    for ((i = 0; i < count; i++)); do
        local command=("${program[@]}" "$@" --coordinator "localhost:$at" --processes "$count" --process "$i")
        if $DRY_RUN; then
            show "${command[@]}"
            continue
        fi
        "${command[@]}" > >(sed -u "s/^/[$i] /") 2> >(sed -u "s/^/[$i] /" >&2) &
        pids+=($!)
    done
    $DRY_RUN && return
    while ((left > 0)); do
        ended='' code=0
        wait -n -p ended "${pids[@]}" || code=$?
        [[ -n ${ended:-} ]] || continue # a signal came
        left=$((left - 1))
        for i in "${!pids[@]}"; do
            if [[ ${pids[$i]} == "$ended" ]]; then
                unset "pids[$i]"
                break
            fi
        done
        if ((code != 0 && status == 0)); then
            status=$code
            ((code == 75)) || echo "$ME: process $i ended with status $code" >&2
            # nothing more comes of the others; those that hang are ended
            (sleep "$grace" && kill -KILL "${pids[@]}") > /dev/null 2>&1 & # holds no pipe of ours
            deadline=$!
        fi
    done
    ((deadline == 0)) || kill "$deadline" 2> /dev/null || true
}

for ((try = 0; ; try++)); do
    attempt "${arguments[@]}"
    case $status in
        0 | 1 | 2 | 75) exit "$status" ;; # done, told what is wrong, or told to stop
    esac
    if $told || ((try == restarts)); then exit "$status"; fi
    echo "$ME: beginning again ($((try + 1)) of $restarts)" >&2
done

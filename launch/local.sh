#!/usr/bin/env bash
# Several processes on this machine as one job: for trying out what runs on several machines.
#
#   launch/local.sh [OPTIONS] N -- READ-JAX-ARGUMENTS
#   launch/local.sh --devices 4 2 -- train --config nano_scenes:runlocal --workdir runs/two
#
#   --devices D    simulated CPU devices in each process (default: what the machine has)
#   --restarts K   begin again, at most K times, without --overwrite, when a process dies (default: 0)
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
if [[ -n $port ]]; then
    require --port "$port" '[1-9][0-9]{0,4}' 'a number from 1 to 65535'
    ((port <= 65535)) || fail "--port must be a number from 1 to 65535, not '$port'"
fi
something_to_run

read -r -a program <<< "${READ_JAX:-read-jax}"
if [[ -n $devices ]]; then
    # simulated devices share the cores, and wait long for one another
    flags="--xla_force_host_platform_device_count=$devices --xla_cpu_collective_call_terminate_timeout_seconds=600"
    program=(env JAX_PLATFORMS=cpu "XLA_FLAGS=$flags${XLA_FLAGS:+ $XLA_FLAGS}" "${program[@]}")
fi

free_port() {
    trap '' TERM INT
    python3 -c 'import socket; s = socket.socket(); s.bind(("localhost", 0)); print(s.getsockname()[1])'
}

# What process I says; Ctrl-C reaches this too, which must hear it out.
mark() {
    trap '' TERM INT
    exec sed -u "s/^/[$1] /"
}

told=0
trap 'told=$((told + 1))' TERM INT

# One try: start all processes and wait for them; sets `status`.
attempt() {
    local at=${port:-$(free_port)} i code passed_on=0 deadline=0 pids=()
    status=0
    for ((i = 0; i < count; i++)); do
        local command=("${program[@]}" "$@" --coordinator "localhost:$at" --processes "$count" --process "$i")
        if $DRY_RUN; then
            show "${command[@]}"
            continue
        fi
        "${command[@]}" > >(mark "$i") 2> >(mark "$i" >&2) &
        pids+=($!)
    done
    # looking at each in turn: `wait -n` loses those that end while a signal is handled
    while ((${#pids[@]} > 0)); do
        sleep 0.1 || true # Ctrl-C ends it
        if ((told > passed_on)); then
            passed_on=$told
            kill -TERM "${pids[@]}" 2> /dev/null || true
        fi
        if ((deadline > 0 && SECONDS > deadline)); then
            kill -KILL "${pids[@]}" 2> /dev/null || true
        fi
        for i in "${!pids[@]}"; do
            ! kill -0 "${pids[$i]}" 2> /dev/null || continue
            code=0
            wait "${pids[$i]}" || code=$?
            unset "pids[$i]"
            ((code != 0 && status == 0)) || continue
            status=$code
            ((code == 75)) || echo "$ME: process $i ended with status $code" >&2
            # nothing more comes of the others; those that hang are ended
            deadline=$((SECONDS + grace))
        done
    done
}

for ((try = 0; ; try++)); do
    attempt "${arguments[@]}"
    case $status in
        0 | 1 | 2 | 75) exit "$status" ;; # done, told what is wrong, or told to stop
    esac
    if ((told > 0 || try == restarts)); then exit "$status"; fi
    echo "$ME: beginning again ($((try + 1)) of $restarts)" >&2
    keep_what_is_done
done

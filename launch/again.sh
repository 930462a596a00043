#!/usr/bin/env bash
# Runs read-jax, and runs it again when it breaks.
#
#   launch/again.sh RESTARTS PROGRAM ARGUMENTS
#
# A run that ends well, is told to stop (status 75) or says what is wrong (status 1 or 2) is over. One that dies, or
# loses another process (status 69), is begun again, at most RESTARTS times, each after $PAUSE seconds (default: 30);
# but not when it broke three times in a row within ten minutes: another machine may have ended for good.
# From the second time on --overwrite is left out. SIGTERM and SIGINT are passed on, and end it.

# shellcheck source-path=SCRIPTDIR
. "$(dirname "$0")/common.sh"

[[ ${1:-} == -h || ${1:-} == --help ]] && help
[[ $# -ge 2 ]] || fail 'needs RESTARTS, a program and its arguments'
restarts=$1
shift
require RESTARTS "$restarts" '[0-9]+' 'a number'

child='' told=false interrupted=false quick=0
pass_on() {
    told=true interrupted=true
    [[ -z $child ]] || kill -TERM "$child" 2> /dev/null || true
}
trap pass_on TERM INT

for ((try = 0; ; try++)); do
    began=$SECONDS
    "$@" &
    child=$!
    ! $told || kill -TERM "$child" 2> /dev/null || true
    interrupted=true
    while $interrupted; do # a signal ends the waiting, not the run
        interrupted=false status=0
        wait "$child" || status=$?
    done
    case $status in
        0 | 1 | 2 | 75) exit "$status" ;;
    esac
    if $told || ((try == restarts)); then exit "$status"; fi
    if ((SECONDS - began > 600)); then quick=0; else quick=$((quick + 1)); fi
    if ((quick == 3)); then
        echo "$ME: ended with status $status, three times within ten minutes of its beginning: giving up; the reason may be in another machine's log" >&2
        exit "$status"
    fi
    echo "$ME: ended with status $status; beginning again ($((try + 1)) of $restarts)" >&2
    arguments=("$@")
    keep_what_is_done
    set -- "${arguments[@]}"
    child=''
    for ((second = 0; second < ${PAUSE:-30}; second++)); do
        $told && break
        sleep 1 || true # Ctrl-C ends it
    done
    ! $told || exit 75
done

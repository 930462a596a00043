#!/usr/bin/env bash
# What every machine of a pod runs: mounts the bucket, runs read-jax, and runs it again when the job breaks.
#
#   launch/worker.sh BUCKET RESTARTS READ-JAX-ARGUMENTS
#
# `launch/tpu.sh start` calls it. BUCKET is mounted at ~/bucket; "-" for none. A run that ends well, is told to
# stop (status 75) or says what is wrong (status 1 or 2) is over; one that dies, or loses another process, is
# begun again, at most RESTARTS times: all machines do so, and find one another again.

# shellcheck source-path=SCRIPTDIR
. "$(dirname "$0")/common.sh"

[[ ${1:-} == -h || ${1:-} == --help ]] && help
[[ $# -ge 3 ]] || fail 'needs BUCKET, RESTARTS and the arguments of read-jax'
bucket=$1 restarts=$2
shift 2
require RESTARTS "$restarts" '[0-9]+' 'a number'

if [[ $bucket != - ]] && ! mountpoint -q ~/bucket; then
    need gcsfuse 'see https://cloud.google.com/storage/docs/cloud-storage-fuse/install'
    mkdir -p ~/bucket
    # a checkpoint appears by renaming its folder
    gcsfuse --implicit-dirs --rename-dir-limit=200000 "$bucket" ~/bucket
fi

child=''
told=false
pass_on() {
    told=true
    [[ -z $child ]] || kill -TERM "$child" 2> /dev/null || true
}
trap pass_on TERM INT

for ((try = 0; ; try++)); do
    ~/read-jax-env/bin/read-jax "$@" --distributed &
    child=$!
    status=0
    wait "$child" || status=$?
    while kill -0 "$child" 2> /dev/null; do # a signal came while it was waited for
        status=0
        wait "$child" || status=$?
    done
    case $status in
        0 | 1 | 2 | 75) exit "$status" ;;
    esac
    if $told || ((try == restarts)); then exit "$status"; fi
    echo "$ME: ended with status $status; beginning again ($((try + 1)) of $restarts)" >&2
    sleep 30
done

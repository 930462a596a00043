#!/usr/bin/env bash
# What every machine of a pod runs: mounts the bucket, and runs read-jax through again.sh.
#
#   launch/worker.sh BUCKET RESTARTS READ-JAX-ARGUMENTS
#
# `launch/tpu.sh start` calls it. BUCKET is mounted at ~/bucket; "-" for none. When the job
# breaks, all machines begin again, at most RESTARTS times, and find one another again.

# shellcheck source-path=SCRIPTDIR
. "$(dirname "$0")/common.sh"

[[ ${1:-} == -h || ${1:-} == --help ]] && help
[[ $# -ge 3 ]] || fail 'needs BUCKET, RESTARTS and the arguments of read-jax'
bucket=$1 restarts=$2
shift 2
require RESTARTS "$restarts" '[0-9]+' 'a number'

if [[ $bucket != - ]] && mountpoint -q ~/bucket; then
    mounted=$(findmnt -n -o SOURCE ~/bucket)
    [[ $mounted == "$bucket" ]] || fail "the folder bucket here shows $mounted, not $bucket: fusermount -u it first"
elif [[ $bucket != - ]]; then
    need gcsfuse 'see https://cloud.google.com/storage/docs/cloud-storage-fuse/install'
    mkdir -p ~/bucket
    # a checkpoint appears by renaming its folder, and what one machine writes the others must see at once
    gcsfuse --implicit-dirs --rename-dir-limit=200000 --metadata-cache-ttl-secs=0 "$bucket" ~/bucket
fi

exec "$(dirname "$0")/again.sh" "$restarts" ~/read-jax-env/bin/read-jax "$@" --distributed

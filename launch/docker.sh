#!/usr/bin/env bash
# One machine with GPUs and Docker: one container, one process, all GPUs.
#
#   launch/docker.sh build                                the image, from this tree
#   launch/docker.sh start  --name NAME --data DIR --runs DIR [OPTIONS] -- READ-JAX-ARGUMENTS
#   launch/docker.sh watch  --name NAME                   what the run says, as it comes
#   launch/docker.sh status --name NAME
#   launch/docker.sh stop   --name NAME                   the run saves and ends
#   launch/docker.sh resume --name NAME                   the same again: it goes on from its last checkpoint
#   launch/docker.sh remove --name NAME                   the container; the folders stay
#
#   --name NAME      of the container
#   --data DIR       seen by the run as /data, which it cannot change: datasets and models
#   --runs DIR       seen by the run as /runs: its results lie here, there is nothing to fetch
#   --gpus WHICH     all, a number, or device=0,1 (default: all)
#   --image IMAGE    (default: read-jax)
#   --extra EXTRA    what is installed for: gpu, or none for the CPU (default: gpu)
#   --restarts K     begin again, at most K times, when the process dies (default: 20)
#   --dry-run        show the commands and run nothing
#
# `resume` runs what `start` was given; so --overwrite is refused there.
#
#   launch/docker.sh start --name a --data ~/data --runs ~/runs -- \
#       train --config read_7b_reasonseg --workdir /runs/a --config.data.data_dir=/data

# shellcheck source-path=SCRIPTDIR
. "$(dirname "$0")/common.sh"

here=$(cd "$(dirname "$0")" && pwd)
name='' data='' runs='' gpus=all image=read-jax extra=gpu restarts=20
[[ $# -gt 0 ]] || fail 'say what to do: build, start, watch, status, stop, resume or remove'
action=$1
shift
options 'name data runs gpus image extra restarts' '' "$@"

folder() {
    [[ -n $2 ]] || fail "$1 is missing: a folder"
    [[ -d $2 ]] || fail "$1: there is no folder $2"
    (cd "$2" && pwd)
}

start() {
    something_to_run
    nothing_to_overwrite
    require --gpus "$gpus" 'all|none|[0-9]+|device=[0-9]+(,[0-9]+)*' 'all, none, a number, or device=0,1'
    require --restarts "$restarts" '[0-9]+' 'a number'
    data=$(folder --data "$data")
    runs=$(folder --runs "$runs")
    local options=(--detach --name "$name" --entrypoint /launch/again.sh --stop-timeout 600 --shm-size 16g)
    options+=(--user "$(id -u):$(id -g)" --volume "$data:/data:ro" --volume "$runs:/runs")
    # docker reads a list of devices as CSV
    [[ $gpus == none ]] || options+=(--gpus "${gpus/#device=*/\"$gpus\"}")
    run docker run "${options[@]}" "$image" "$restarts" read-jax "$@"
}

[[ $action == -h || $action == --help ]] && help
require --image "$image" '[a-z0-9][a-z0-9._/:@-]*' 'the name of an image'
need docker 'see https://docs.docker.com/engine/install'
if [[ $action == build ]]; then
    require --extra "$extra" 'gpu|tpu|none' 'gpu, tpu or none'
    run docker build --file "$here/Dockerfile" --build-arg "EXTRA=$extra" --tag "$image" "$here/.."
    exit
fi
label --name "$name"
case $action in
    start) start "${arguments[@]}" ;;
    watch) run docker logs --follow --tail 50 "$name" ;;
    status) run docker ps --all --filter "name=^$name\$" ;;
    stop) run docker stop "$name" ;;
    resume) run docker start "$name" ;;
    remove) run docker rm "$name" ;;
    *) fail "there is no action $action: build, start, watch, status, stop, resume or remove" ;;
esac

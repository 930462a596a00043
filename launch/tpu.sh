#!/usr/bin/env bash
# Cloud TPUs: get them as a queued resource, run on all their machines, and give them back.
#
#   launch/tpu.sh create  --name NAME --zone ZONE --type v5litepod-16 [--slices N] [--spot]
#   launch/tpu.sh install --name NAME --zone ZONE
#   launch/tpu.sh start   --name NAME --zone ZONE [--bucket BUCKET] [--restarts K] -- READ-JAX-ARGUMENTS
#   launch/tpu.sh watch   --name NAME --zone ZONE        what the first machine says, as it comes
#   launch/tpu.sh status  --name NAME --zone ZONE
#   launch/tpu.sh stop    --name NAME --zone ZONE        the run saves and ends; the TPUs stay
#   launch/tpu.sh resume  --name NAME --zone ZONE --type TYPE [...] -- READ-JAX-ARGUMENTS
#   launch/tpu.sh fetch   --bucket BUCKET --from FOLDER --to DIR
#   launch/tpu.sh delete  --name NAME --zone ZONE        gives the TPUs back
#
#   --name NAME        of the queued resource
#   --zone ZONE        for example us-west4-a
#   --project PROJECT  (default: gcloud's own)
#   --type TYPE        for example v5litepod-16, v5p-32, v6e-16, v4-32
#   --runtime VERSION  of the machines' software (default: the one for the type)
#   --slices N         several of them, with the data centre's network between (default: 1)
#   --spot             cheaper, and taken away when others want them: then `resume`
#   --bucket BUCKET    mounted on every machine at ~/bucket: data, models and the run's folder belong there
#   --restarts K       begin again, at most K times, when a process dies (default: 20)
#   --dry-run          show the commands and run nothing
#
# `resume` gives back what was taken away, asks for the same again, installs, and starts; a run goes on from its
# last checkpoint in the bucket; so --overwrite is refused. Needs gcloud, logged in:
# https://cloud.google.com/sdk/docs/install

# shellcheck source-path=SCRIPTDIR
. "$(dirname "$0")/common.sh"

here=$(cd "$(dirname "$0")" && pwd)
name='' zone='' project='' type='' runtime='' slices=1 spot=false bucket='' restarts=20 from='' to=''
[[ $# -gt 0 ]] || fail 'say what to do: create, install, start, watch, status, stop, resume, fetch or delete'
action=$1
shift
options 'name zone project type runtime slices bucket restarts from to' 'spot' "$@"
bucket=${bucket#gs://}
[[ -z $bucket ]] || require --bucket "$bucket" '[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]' 'the name of a bucket, without folders'

common() {
    label --name "$name"
    require --zone "$zone" '[a-z]+-[a-z]+[0-9]+-[a-z]' 'a zone such as us-west4-a'
    project
    where=(--zone "$zone")
    [[ -z $project ]] || where+=(--project "$project")
    need gcloud 'see https://cloud.google.com/sdk/docs/install'
}

resources() {
    run gcloud compute tpus queued-resources "$@" "${where[@]}"
}

# The same command on every machine of every slice.
everywhere() {
    resources ssh "$name" --node all --worker all --command "$1"
}

# What each step needs is looked at before the first of them does anything.
can_create() {
    tpu --type "$type"
    positive --slices "$slices"
    [[ -z $runtime ]] || require --runtime "$runtime" '[a-z0-9][a-z0-9._-]*' 'the version of a TPU runtime'
}

can_install() {
    need git 'install it with your package manager'
    $DRY_RUN || git -C "$here/.." rev-parse --quiet --verify HEAD > /dev/null \
        || fail "$here/.. is no git repository: what is committed there is installed"
}

can_start() {
    something_to_run
    nothing_to_overwrite
    require --restarts "$restarts" '[0-9]+' 'a number'
}

create() {
    local options=(--accelerator-type "$type")
    if [[ -z $runtime ]]; then
        case $type in
            v4-*) runtime=tpu-ubuntu2204-base ;;
            v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
            v5p-*) runtime=v2-alpha-tpuv5 ;;
            v6e-*) runtime=v2-alpha-tpuv6e ;;
        esac
    fi
    options+=(--runtime-version "$runtime")
    if ((slices > 1)); then
        options+=(--node-count "$slices" --node-prefix "$name")
    else
        options+=(--node-id "$name")
    fi
    ! $spot || options+=(--spot)
    resources create "$name" "${options[@]}"
    local state=''
    until $DRY_RUN || [[ $state == ACTIVE ]]; do
        state=$(resources describe "$name" --format 'value(state.state)')
        [[ $state != FAILED && $state != SUSPENDED ]] || fail "the request ended as $state: launch/tpu.sh delete, and ask again"
        echo "$ME: $name is $state" >&2
        [[ $state == ACTIVE ]] || sleep 30
    done
}

install() {
    local archive
    archive=$(mktemp -d)/read-jax.tar.gz
    run git -C "$here/.." archive --format tar.gz --prefix read-jax/ --output "$archive" HEAD
    resources scp "$archive" "$name:read-jax.tar.gz" --node all --worker all
    rm -rf "$(dirname "$archive")"
    everywhere 'set -e
tar -xzf read-jax.tar.gz
# the machines come with an older Python than is needed
python3 -m pip install -q --user uv
[ -x read-jax-env/bin/python ] || python3 -m uv venv -q --python 3.12 read-jax-env
python3 -m uv pip install -q --python read-jax-env/bin/python "./read-jax[tpu,data]"
command -v gcsfuse > /dev/null || echo "gcsfuse is not installed here: --bucket needs it"'
}

start() {
    local command
    command=$(show read-jax/launch/worker.sh "${bucket:--}" "$restarts" "$@")
    everywhere "if [ -e read-jax.pid ] && kill -0 \$(cat read-jax.pid) 2> /dev/null; then echo 'a run is going on here: stop it first'; exit 1; fi
nohup setsid $command > read-jax.log 2>&1 < /dev/null & echo \$! > read-jax.pid"
}

case $action in
    -h | --help) help ;;
    create)
        common
        can_create
        create
        ;;
    install)
        common
        can_install
        install
        ;;
    start)
        common
        can_start
        start "${arguments[@]}"
        ;;
    watch) common && resources ssh "$name" --node 0 --worker 0 --command 'tail -n 50 -F read-jax.log' ;;
    status)
        common
        resources describe "$name" --format 'value(state.state)'
        everywhere 'tail -n 1 read-jax.log'
        ;;
    stop) common && everywhere 'xargs kill -TERM < read-jax.pid' ;;
    resume)
        common
        can_create
        can_install
        can_start
        resources delete "$name" --force --quiet || echo "$ME: there was no $name to give back" >&2
        create
        install
        start "${arguments[@]}"
        ;;
    fetch)
        [[ -n $bucket ]] || fail '--bucket is missing: where the run has its folder'
        require --from "$from" '[^/].*' 'a folder in the bucket'
        require --to "$to" '.+' 'a folder here'
        need gcloud 'see https://cloud.google.com/sdk/docs/install'
        run mkdir -p "$to"
        run gcloud storage rsync --recursive "gs://$bucket/$from" "$to"
        ;;
    delete) common && resources delete "$name" --force --quiet ;;
    *) fail "there is no action $action: create, install, start, watch, status, stop, resume, fetch or delete" ;;
esac

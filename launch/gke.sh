#!/usr/bin/env bash
# TPUs on Google Kubernetes Engine, with xpk (https://github.com/AI-Hypercomputer/xpk).
#
#   launch/gke.sh create --cluster C --zone ZONE --type v5litepod-16 [--slices N] [--spot]
#   launch/gke.sh mount  --cluster C --zone ZONE --bucket BUCKET    seen by every run as /bucket
#   launch/gke.sh start  --name NAME --cluster C --zone ZONE --type TYPE --image IMAGE [OPTIONS] -- READ-JAX-ARGUMENTS
#   launch/gke.sh watch  --name NAME         what the first process says, as it comes
#   launch/gke.sh status --cluster C --zone ZONE
#   launch/gke.sh stop   --name NAME --cluster C --zone ZONE        the run saves and ends
#   launch/gke.sh resume ...                 as start: a run goes on from its last checkpoint in the bucket
#   launch/gke.sh fetch  --bucket BUCKET --from FOLDER --to DIR
#   launch/gke.sh delete --cluster C --zone ZONE                    the cluster, with its TPUs
#
#   --name NAME        of the run
#   --zone ZONE, --project PROJECT
#   --type TYPE        for example v5litepod-16, v5p-32, v6e-16
#   --slices N         (default: 1)
#   --image IMAGE      where it was pushed to: launch/docker.sh build --extra tpu --image ..., then docker push
#   --restarts K       when a machine dies or is taken away (default: 20)
#   --dry-run          show the commands and run nothing
#
# A run that begins again is given the same arguments; so --overwrite is refused.

# shellcheck source-path=SCRIPTDIR
. "$(dirname "$0")/common.sh"

name='' cluster='' zone='' project='' type='' slices=1 spot=false image='' bucket='' restarts=20 from='' to=''
[[ $# -gt 0 ]] || fail 'say what to do: create, mount, start, watch, status, stop, resume, fetch or delete'
action=$1
shift
options 'name cluster zone project type slices image bucket restarts from to' 'spot' "$@"
bucket=${bucket#gs://}

on_cluster() {
    label --cluster "$cluster"
    require --zone "$zone" '[a-z]+-[a-z]+[0-9]+-[a-z]' 'a zone such as us-west4-a'
    project
    where=(--cluster "$cluster" --zone "$zone")
    [[ -z $project ]] || where+=(--project "$project")
    need xpk 'pip install xpk'
}

of_type() {
    tpu --type "$type"
    positive --slices "$slices"
    where+=(--tpu-type "$type" --num-slices "$slices")
}

start() {
    something_to_run
    nothing_to_overwrite
    label --name "$name"
    require --image "$image" '[a-z0-9][a-z0-9._/:@-]*' 'the name of an image that the cluster can get'
    require --restarts "$restarts" '[0-9]+' 'a number'
    on_cluster
    of_type
    # 75: told to stop, it has saved; 69 and 134: it lost another process; machines taken away come back
    run xpk workload create "${where[@]}" --workload "$name" --docker-image "$image" \
        --max-restarts "$restarts" --restart-on-exit-codes 75,69,134 --termination-grace-period-seconds 300 \
        --command "$(show read-jax "$@" --distributed)"
}

case $action in
    -h | --help) help ;;
    create)
        on_cluster
        of_type
        capacity=--on-demand
        ! $spot || capacity=--spot
        run xpk cluster create "${where[@]}" "$capacity" --enable-gcsfuse-csi-driver
        ;;
    mount)
        on_cluster
        require --bucket "$bucket" '[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]' 'the name of a bucket, without folders'
        run xpk storage attach "$bucket" "${where[@]}" --type gcsfuse --bucket "$bucket" \
            --mount-point /bucket --readonly false --auto-mount true --size 1000 \
            --mount-options implicit-dirs,rename-dir-limit=200000,metadata-cache:ttl-secs:0
        ;;
    start | resume) start "${arguments[@]}" ;;
    watch)
        label --name "$name"
        need kubectl 'gcloud components install kubectl'
        run kubectl logs --follow --tail 50 --selector "jobset.sigs.k8s.io/jobset-name=$name,batch.kubernetes.io/job-completion-index=0"
        ;;
    status) on_cluster && run xpk workload list "${where[@]}" ;;
    stop) label --name "$name" && on_cluster && run xpk workload delete "${where[@]}" --workload "$name" --force ;;
    fetch)
        require --bucket "$bucket" '[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]' 'the name of a bucket, without folders'
        require --from "$from" '[^/].*' 'a folder in the bucket'
        require --to "$to" '.+' 'a folder here'
        need gcloud 'see https://cloud.google.com/sdk/docs/install'
        run mkdir -p "$to"
        run gcloud storage rsync --recursive "gs://$bucket/$from" "$to"
        ;;
    delete) on_cluster && run xpk cluster delete "${where[@]}" --force ;;
    *) fail "there is no action $action: create, mount, start, watch, status, stop, resume, fetch or delete" ;;
esac

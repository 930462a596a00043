#!/usr/bin/env bash
# GPU nodes under Slurm: one process for every GPU, all of them one job.
#
#   launch/slurm.sh start  --name NAME --nodes N --gpus G [OPTIONS] -- READ-JAX-ARGUMENTS
#   launch/slurm.sh watch  --name NAME     what the job says, as it comes
#   launch/slurm.sh status --name NAME
#   launch/slurm.sh stop   --name NAME     the run saves and ends
#   launch/slurm.sh resume ...             as start: a run goes on in its folder
#   launch/slurm.sh fetch  --from FOLDER --to DIR    copies a run's folder, where the two are different disks
#
#   --name NAME         of the job
#   --nodes N           (default: 1)
#   --gpus G            on each node (default: 8)
#   --cpus C            for each GPU: its workers prepare the pictures (default: 12)
#   --time T            as Slurm has it, for example 24:00:00 (default: the partition's)
#   --partition P, --account A
#   --environment DIR   virtual environment with read-jax, on a disk that all nodes see (default: the active one)
#   --dry-run           show the commands and run nothing
#
# Two minutes before its time is over, or when it is preempted, the job is told, saves, and is queued again by
# itself. A job whose process dies is queued again by Slurm when a node fails; otherwise use `resume`. Every time it is
# given the same arguments; so --overwrite is refused.

# shellcheck source-path=SCRIPTDIR
. "$(dirname "$0")/common.sh"

name='' nodes=1 gpus=8 cpus=12 time='' partition='' account='' environment=${VIRTUAL_ENV:-} from='' to=''
[[ $# -gt 0 ]] || fail 'say what to do: start, watch, status, stop, resume or fetch'
action=$1
shift
options 'name nodes gpus cpus time partition account environment from to' '' "$@"

job_script() {
    cat << 'JOB'
#!/bin/bash
# The first argument is the virtual environment, the others are those of read-jax.
environment=$1
shift
again() {
    kill -TERM "$step" 2> /dev/null
    status=0
    wait "$step" || status=$?
    # 75: a training run has saved; 143: an evaluation, whose answers are kept as they come
    [[ $status != 75 && $status != 143 ]] || scontrol requeue "$SLURM_JOB_ID"
    exit "$status"
}
trap again USR1
# those that are told to stop end with a status of their own, and not all at once
srun --cpus-per-task "$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=0 --wait=120 "$environment/bin/read-jax" "$@" --distributed &
step=$!
trap 'kill -TERM "$step"' TERM
status=0
wait "$step" || status=$?
while kill -0 "$step" 2> /dev/null; do
    status=0
    wait "$step" || status=$?
done
exit "$status"
JOB
}

start() {
    something_to_run
    nothing_to_overwrite
    positive --nodes "$nodes"
    positive --gpus "$gpus"
    positive --cpus "$cpus"
    require --environment "$environment" '/.*' 'the full path of a virtual environment'
    [[ -z $partition ]] || require --partition "$partition" '[A-Za-z0-9_][A-Za-z0-9_.,+-]*' 'the name of a partition'
    [[ -z $account ]] || require --account "$account" '[A-Za-z0-9_][A-Za-z0-9_.:@+-]*' 'the name of an account'
    [[ -z $time ]] || require --time "$time" '[0-9]+(-[0-9]+)?(:[0-9]+){0,2}' 'a time such as 24:00:00'
    $DRY_RUN || [[ -x $environment/bin/read-jax ]] || fail "there is no read-jax in $environment"
    local options=(--job-name "$name" --nodes "$nodes" --ntasks-per-node "$gpus" --gpus-per-node "$gpus")
    options+=(--cpus-per-task "$cpus" --exclusive --requeue --open-mode append --output "$name.log")
    options+=(--signal B:USR1@120)
    [[ -z $time ]] || options+=(--time "$time")
    [[ -z $partition ]] || options+=(--partition "$partition")
    [[ -z $account ]] || options+=(--account "$account")
    if $DRY_RUN; then
        show sbatch "${options[@]}" /dev/stdin "$environment" "$@"
        job_script
        return
    fi
    job_script | sbatch "${options[@]}" /dev/stdin "$environment" "$@"
}

[[ $action == -h || $action == --help ]] && help
if [[ $action == fetch ]]; then
    require --from "$from" '.+' 'the folder of a run'
    require --to "$to" '.+' 'a folder here'
    need rsync 'install it with your package manager'
    run rsync --archive --info progress2 "$from/" "$to/"
    exit
fi
label --name "$name"
need sbatch 'run this on a machine of the cluster'
case $action in
    start | resume) start "${arguments[@]}" ;;
    watch) run tail -n 50 -F "$name.log" ;;
    status) run squeue --name "$name" ;;
    stop) run scancel --batch --signal TERM --name "$name" ;;
    *) fail "there is no action $action: start, watch, status, stop, resume or fetch" ;;
esac

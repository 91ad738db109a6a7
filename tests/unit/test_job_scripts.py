"""What the job scripts decide at their end, with stand-ins for schedulers and run: requeued, failed, or done."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ardtrain.config import parse_config
from ardtrain.launching.job import script_text

BASE = {
    "model_name_or_path": "base",
    "method": "lora",
    "data": {"train_file": "rows.jsonl"},
    "output_dir": "run",
    "max_steps": 9,
}


def tool(folder, name, text):
    path = folder / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)


@pytest.fixture
def slurm(tmp_path):
    """Starts the script with a run that is a line of shell; returns exit code, status, and whether it was requeued."""
    (tmp_path / "run" / "logs").mkdir(parents=True)

    def start(
        run, *, status="", queue="echo RUNNING", restarts=0, preempt="None", then=None, requeue="exit 0", **launcher
    ):
        if status:
            (tmp_path / "run" / "status").write_text(status + "\n")
        tool(tmp_path, "srun", f'cd {tmp_path}/run; [ "$2" = --ntasks=2 ] && what=preflight || what=train\n{run}')
        tool(tmp_path, "squeue", f'echo "$@" >> {tmp_path}/asked; {queue}')
        tool(tmp_path, "sleep", "[ $1 -lt 5 ] && exec /bin/sleep $1; exit 0")
        tool(
            tmp_path,
            "scontrol",
            f"""case $1 in
requeue) echo "$2" >> {tmp_path}/requeued; {requeue} ;;
hostnames | show) [ "$2" = job ] && echo "   PreemptTime={preempt}" || echo node1 ;;
esac""",
        )
        block = {"nodes": 2, "preflight": False} | launcher
        text = script_text("slurm", parse_config(BASE | {"launcher": block}), folder=tmp_path)
        (tmp_path / "job.sh").write_text(text)
        environ = os.environ | {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "SLURM_JOB_ID": "7",
                                "SLURM_JOB_NODELIST": "n", "SLURM_JOB_NUM_NODES": "2",
                                "SLURM_RESTART_COUNT": str(restarts)}  # fmt: skip
        job = subprocess.Popen(
            ["bash", tmp_path / "job.sh"], env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        if then is not None:
            wait_for(tmp_path / "run" / "up")
            job.send_signal(then)
        said = job.communicate(timeout=30)[0]
        requeued = tmp_path / "requeued"
        again = requeued.read_text().split() if requeued.exists() else []
        return job.returncode, (tmp_path / "run" / "status").read_text().strip(), again, said

    return start


def wait_for(path):
    end = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < end
        time.sleep(0.02)


PROGRESS = "echo checkpoint-5 > latest"


@pytest.mark.parametrize("run, expected", [
    ("echo finished 9 > status", (0, "finished 9", False)),
    ("echo requeue 5 > status", (0, "requeue 5", True)),
    ("echo requeue 5 > status; exit 143", (0, "requeue 5", True)),  # launchers change exit codes
    ("echo stopped 5 > status", (0, "stopped 5", False)),
    (f"echo stopped 5 > status; {PROGRESS}; exit 1", (1, "stopped 5", False)),  # a user's stop stands
    (f"echo failed 5 > status; {PROGRESS}; exit 1", (0, "failed 5", True)),
    ("echo failed 5 > status; exit 1", (1, "failed 5", False)),  # no progress: no endless loop
    (f"echo started 0 > status; {PROGRESS}; exit 137", (0, "started 0", True)),
    ("echo started 3 > status; exit 137", (137, "failed 3", False)),
    ("exit 2", (2, "failed 0", False)),
    (f"{PROGRESS}; echo finished 9 > status; exit 1", (1, "finished 9", False)),
])  # fmt: skip
def test_requeue_is_decided_by_what_the_run_wrote(slurm, run, expected):
    code, status, again, said = slurm(run)
    assert (code, status, bool(again)) == expected, said
    assert again in ([], ["7"])


@pytest.mark.parametrize(
    "earlier, left", [("finished 9", "finished 9"), ("stopped 4", "stopped 4"), ("requeue 4", "failed 4")]
)
def test_a_start_that_never_began_leaves_a_status_that_is_true(slurm, earlier, left):
    code, status, again, _ = slurm("exit 1", status=earlier)
    assert (code, status, again) == (1, left, [])


def test_the_cap_on_requeues_is_said(slurm):
    code, status, again, said = slurm("echo requeue 5 > status", restarts=3, max_requeues=3)
    assert (code, status, again) == (0, "requeue 5", [])
    assert "not requeued although it saved and stopped on a signal: launcher.max_requeues=3 is reached" in said


@pytest.mark.parametrize("state", ["COMPLETING", "CANCELLED"])
def test_a_cancelled_job_stays_cancelled(slurm, state):
    assert slurm("echo requeue 5 > status", queue=f"echo {state}")[2] == []


def test_a_busy_controller_is_asked_again_and_a_dead_one_is_said(slurm, tmp_path):
    code, _, again, said = slurm(
        "echo requeue 5 > status", queue="exit 1", requeue=f"[ $(wc -l < {tmp_path}/requeued) = 3 ]"
    )
    assert code == 0 and len(again) == 3, said
    (tmp_path / "requeued").unlink()
    code, _, again, said = slurm("echo requeue 5 > status", requeue="exit 1")
    assert code == 1 and len(again) == 5 and "it could not be requeued; `sbatch" in said


def test_a_preempted_job_that_could_not_save_comes_again(slurm):
    assert slurm("exit 143", preempt="2026-11-23T01:00:00")[2] == ["7"]
    code, status, again, said = slurm("exit 143", preempt="2026-11-23T01:00:00", preflight=True)
    assert again[-1] == "7" and "preflight failed" not in said
    assert slurm("exit 143", preempt="2026-11-23T01:00:00", max_requeues=0)[1] == "failed 0"


def test_a_failing_preflight_starts_nothing(slurm):
    code, status, again, said = slurm("[ $what = preflight ] && exit 1; echo finished 9 > status", preflight=True)
    assert (code, status, again) == (1, "failed 0", []) and "the preflight failed, nothing was started" in said
    assert slurm("[ $what = preflight ] && exit 0; echo finished 9 > status", preflight=True)[:2] == (0, "finished 9")


def test_the_early_signal_reaches_the_run_and_a_term_means_cancelled(slurm):
    run = "trap 'echo requeue 6 > status; exit 0' USR1; touch up; for i in {1..100}; do /bin/sleep 0.1; done"
    assert slurm(run, then=signal.SIGUSR1)[:3] == (0, "requeue 6", ["7"])


def test_a_cancelled_script_does_not_requeue(slurm):
    run = "touch up; /bin/sleep 1; echo requeue 6 > status"  # scancel signals run and shell
    assert slurm(run, then=signal.SIGTERM)[:3] == (0, "requeue 6", [])


@pytest.fixture
def pbs(tmp_path):
    """The same for the PBS script, whose launcher is a line of shell."""
    (tmp_path / "run").mkdir()
    (tmp_path / "nodes").write_text("node1\nnode1\nnode2\nnode2\n")

    def start(run, *, resubmitted=0, then=None, qsub="exit 0", **launcher):
        if resubmitted:
            (tmp_path / "run" / "resubmitted").write_text(f"{resubmitted}\n")
        tool(tmp_path, "deepspeed", f"cd {tmp_path}/run; {run}")
        tool(tmp_path, "qsub", f'echo "$@" >> {tmp_path}/submitted; {qsub}')
        block = {"nodes": 2, "preflight": False} | launcher
        text = script_text("pbs", parse_config(BASE | {"launcher": block}), folder=tmp_path, max_hours=1.0)
        (tmp_path / "job.sh").write_text(
            text.replace(str(Path(sys.executable).with_name("deepspeed")), f"{tmp_path}/bin/deepspeed")
        )
        root = str(Path(__file__).parents[2])
        environ = os.environ | {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "PBS_NODEFILE": f"{tmp_path}/nodes",
                                "PBS_JOBID": "12.server", "PYTHONPATH": root}  # fmt: skip
        job = subprocess.Popen(
            ["bash", tmp_path / "job.sh"], env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        if then is not None:
            wait_for(tmp_path / "run" / "up")
            job.send_signal(then)
        said = job.communicate(timeout=40)[0]
        return (
            job.returncode,
            (tmp_path / "run" / "status").read_text().strip(),
            (tmp_path / "submitted").exists(),
            said,
        )

    return start


@pytest.mark.parametrize("run, expected", [
    ("echo finished 9 > status", (0, "finished 9", False)),
    ("echo requeue 5 > status", (0, "requeue 5", True)),
    ("echo stopped 5 > status", (0, "stopped 5", False)),
    (f"echo failed 5 > status; {PROGRESS}", (1, "failed 5", True)),
    ("echo failed 5 > status", (1, "failed 5", False)),
    ("exit 0", (1, "failed 0", False)),
])  # fmt: skip
def test_pbs_submits_itself_again_by_what_the_run_wrote(pbs, tmp_path, run, expected):
    code, status, again, said = pbs(run)
    assert (code, status, again) == expected, said
    assert (tmp_path / "run" / "hostfile").read_text() == "node1 slots=2\nnode2 slots=2\n"


def test_pbs_cap_and_a_qsub_that_is_not_allowed_here(pbs):
    assert "launcher.max_requeues=2 is reached" in pbs("echo requeue 5 > status", resubmitted=2, max_requeues=2)[3]
    code, _, _, said = pbs("echo requeue 5 > status", qsub="exit 1")
    assert code == 1 and "on a login node `qsub" in said


def test_qdel_saves_and_does_not_come_again(pbs):
    waits = "for i in {1..100}; do [ -e STOP ] && break; /bin/sleep 0.1; done"
    run = f"touch up; {waits}; {PROGRESS}; echo stopped 6 > status"
    assert pbs(run, then=signal.SIGTERM)[:3] == (0, "stopped 6", False)

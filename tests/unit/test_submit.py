"""`ardtrain submit`: scripts as committed, shells that read them, every mistake named before anything is submitted."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from ardtrain.config import ConfigError, load_config, parse_config
from ardtrain.config.resuming import CHANGEABLE, ELSEWHERE, differences
from ardtrain.faults import write_status
from ardtrain.hostfile import Host
from ardtrain.launching import submit as submitting
from ardtrain.launching.job import ROUTES, Elements, exported_variables, script_text, walltime
from ardtrain.launching.submit import submit
from ardtrain.launching.supervise import supervise, write_env_file

GOLDENS = Path(__file__).parents[1] / "goldens" / "jobs"
BASE = {
    "model_name_or_path": "base",
    "method": "lora",
    "data": {"train_file": "rows.jsonl"},
    "output_dir": "runs/first",
    "max_steps": 10,
}
FULL = {
    "nodes": 2, "gpus_per_node": 8, "cpus_per_process": 12, "account": "abc123", "partition": "gpu",
    "time": "2-12:30:00", "directives": "--constraint=h100", "signal_seconds": 120, "max_requeues": 5,
    "singleton": True,
    "setup": ["module load cuda/12.8", "source env.sh"], "env": {"NCCL_IB_HCA": "mlx5", "GREETING": "it's a \"day\""},
    "command_prefix": "apptainer exec --nv image.sif", "python": "/shared/env/bin/python", "network_interface": "ib0",
    "hostfile": "hosts",
}  # fmt: skip
TWO = (Host("node1", 4), Host("node2", 4))


def config_of(**launcher):
    return parse_config(BASE | {"launcher": {"python": "/shared/env/bin/python"} | launcher})


def scripts():
    """Every golden: name and how it is made."""
    folder = Path("/shared/work")
    sweep = Path("/shared/work/runs/sweep")
    array = Elements(sweep, tuple(sweep / f"lora/seed-{seed}" for seed in range(3)), 2)
    for kind, launcher in (("plain", {}), ("full", FULL)):
        for route in ROUTES:
            hosts = TWO if route in ("hosts", "mpi") else ()
            more = {"hostfile": "hosts"} if hosts else {}
            if route in ("hosts", "pbs"):
                more["command_prefix"] = ""
            hours = 23.9167 if route == "pbs" else None
            config = config_of(**launcher | more)
            yield f"{route}-{kind}.sh", script_text(route, config, folder=folder, hosts=hosts, max_hours=hours)
    mpich = config_of(mpi="mpich", mpi_args="-iface ib0", hostfile="hosts", preflight=False)
    yield "mpi-mpich.sh", script_text("mpi", mpich, folder=folder, hosts=TWO)
    yield "slurm-array.sh", script_text("slurm", config_of(nodes=1), folder=folder, elements=array)


def normal(text):
    """Without the paths of this environment and checkout."""
    text = text.replace(sys.executable, "PYTHON")
    return text.replace(str(Path(submitting.__file__).parents[1]), "PACKAGE")


@pytest.mark.parametrize("name", [name for name, _ in scripts()])
def test_scripts_are_as_committed(name):
    text = normal(dict(scripts())[name])
    golden = GOLDENS / name
    if os.environ.get("ARDTRAIN_WRITE_GOLDENS"):
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(text)
    assert text == golden.read_text(), "to accept: ARDTRAIN_WRITE_GOLDENS=1 pytest tests/unit/test_submit.py"


def test_no_golden_is_left_over():
    assert {path.name for path in GOLDENS.iterdir()} == {name for name, _ in scripts()}


@pytest.mark.parametrize("name", [name for name, _ in scripts()])
def test_shells_read_the_scripts(name, tmp_path):
    path = tmp_path / name
    path.write_text(dict(scripts())[name])
    assert subprocess.run(["bash", "-n", path], capture_output=True, text=True).stderr == ""
    if shutil.which("shellcheck") is None:
        pytest.skip("needs shellcheck")
    done = subprocess.run(["shellcheck", "--exclude=SC1091", path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_walltimes():
    assert config_of(time="1-02:03:04").launcher.seconds == 93784
    assert walltime(93784) == "26:03:04"
    for wrong in ("tomorrow", "12", "1:2:3"):
        with pytest.raises(ConfigError, match=rf"launcher.time={wrong}"):
            config_of(time=wrong)
    with pytest.raises(ConfigError, match="shorter than twice signal_seconds=300"):
        config_of(time="00:09:59")


@pytest.mark.parametrize("launcher, text", [
    ({"gpus_per_node": 4, "processes_per_node": 8}, "processes_per_node=8 exceeds gpus_per_node=4"),
    ({"account": "a b"}, "account=a b holds a blank"),
    ({"setup": "a\nb"}, "setup holds a line break"),
    ({"env": {"A-B": "1"}}, "launcher.env"),
    ({"partion": "gpu"}, "did you mean launcher.partition"),
    ({"job_name": "a b"}, "launcher.job_name"),
])  # fmt: skip
def test_wrong_launcher_settings(launcher, text):
    with pytest.raises(ConfigError, match=text):
        config_of(**launcher)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a config, its data and a base's config."""
    from tests.tiny import save_tiny_llama

    monkeypatch.chdir(tmp_path)
    save_tiny_llama(tmp_path / "base")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (tmp_path / "hosts").write_text("node1 slots=2\nnode2 slots=2\n")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(BASE | {"launcher": {"hostfile": "hosts", "nodes": 2}}))
    return tmp_path


def program(folder, name, text):
    """A stand-in for a scheduler's command, in front of PATH."""
    path = folder / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)


@pytest.fixture
def schedulers(place, monkeypatch):
    program(place, "sbatch", f'echo "$@" > {place}/asked; echo "77;cluster"')
    program(place, "squeue", f"cat {place}/queue 2>/dev/null")
    program(place, "qsub", f'echo "$@" > {place}/asked; echo "78.server"')
    monkeypatch.setenv("PATH", f"{place}/bin:{os.environ['PATH']}")
    return place


def test_slurm_gets_the_script_and_one_config(schedulers, capsys):
    assert submit(["run.yaml", "--to", "slurm", "learning_rate=0.5"]) == 0
    said = capsys.readouterr().out
    run = schedulers / "runs/first"
    assert "job 77 submitted to slurm" in said and f"log:    {run}/logs/slurm-77.out" in said
    assert (schedulers / "asked").read_text() == f"--parsable {run}/job.sh\n"
    assert f'train "$run/run.yaml"' in (run / "job.sh").read_text()  # noqa: F541
    config = load_config(run / "run.yaml")
    assert config.learning_rate == 0.5 and config.resume_from_checkpoint == "auto"
    assert json.loads((run / "job.json").read_text())["job_id"] == "77"
    (schedulers / "queue").write_text("RUNNING\n")
    with pytest.raises(ConfigError, match="its job 77 is RUNNING; wait, or `ardtrain stop"):
        submit(["run.yaml", "--to=slurm"])


@pytest.mark.parametrize("route", ROUTES)
def test_a_rehearsal_is_a_job_in_a_folder_of_its_own(schedulers, route, capsys):
    assert submit(["run.yaml", "--rehearse", "--to", route, "--dry-run"]) == 0
    script = capsys.readouterr().out
    assert script.count('train "$run/run.yaml" --rehearse') >= 1
    assert script.count("--rehearse") == script.count('train "$run/run.yaml"')
    assert f'run="{schedulers}/runs/first/rehearsal"' in script
    if route == "slurm":
        assert submit(["run.yaml", "--to", "slurm", "--rehearse"]) == 0
        run = schedulers / "runs/first/rehearsal"
        assert load_config(run / "run.yaml").output_dir == "runs/first"
        assert (schedulers / "asked").read_text() == f"--parsable {run}/job.sh\n"
        assert [p.name for p in run.parent.iterdir()] == ["rehearsal"]


def test_without_a_config_the_default_is_taken(schedulers, monkeypatch):
    (schedulers / "run.yaml").rename("ardtrain.yaml")
    assert submit(["--to", "slurm", "learning_rate=0.5"]) == 0
    assert load_config("runs/first/run.yaml").learning_rate == 0.5
    (schedulers / "ardtrain.yaml").rename("other.yaml")
    monkeypatch.setenv("ARDTRAIN_CONFIG", "other.yaml")
    assert submit(["--to", "slurm", "learning_rate=0.25"]) == 0
    assert load_config("runs/first/run.yaml").learning_rate == 0.25


def test_pbs_stops_itself_before_the_walltime(schedulers, capsys):
    # An explicit null, as every resolved config has it, is no leave to run into the walltime.
    given = ["launcher.time=01:00:00", "launcher.signal_seconds=600", "max_hours=null"]
    assert submit(["run.yaml", "--to", "pbs", *given]) == 0
    assert load_config("runs/first/run.yaml").max_hours == pytest.approx(5 / 6, abs=1e-4)
    assert "job 78.server submitted to pbs" in capsys.readouterr().out


def test_pbs_refuses_a_limit_beyond_the_walltime(schedulers):
    with pytest.raises(ConfigError, match="max_hours=1 ends after launcher.time=01:00:00 less signal_seconds"):
        submit(["run.yaml", "--to", "pbs", "launcher.time=01:00:00", "max_hours=1"])


@pytest.mark.parametrize("given, ok", [("null", True), ("auto", True), ("runs/first/checkpoint-5", False)])
def test_a_job_resumes_from_the_newest_checkpoint(schedulers, given, ok):
    arguments = ["run.yaml", "--to", "slurm", f"resume_from_checkpoint={given}"]
    if ok:
        assert submit(arguments) == 0
        assert load_config("runs/first/run.yaml").resume_from_checkpoint == "auto"
    else:
        with pytest.raises(ConfigError, match="would be where each requeue starts from"):
            submit(arguments)


def test_a_run_that_lives_is_not_started_twice_whoever_started_it(schedulers):
    run = schedulers / "runs/first"
    run.mkdir(parents=True)
    write_status(run, "started", 3, host="elsewhere", pid=1, job_id="55")
    (schedulers / "queue").write_text("RUNNING\n")
    with pytest.raises(ConfigError, match=r"it is running, as its files say \(job 55, host elsewhere\)"):
        submit(["run.yaml", "--to", "slurm"])
    (schedulers / "queue").write_text("")  # Slurm has it no more: it died
    (run / "STOP").touch()
    assert submit(["run.yaml", "--to", "slurm"]) == 0
    assert not (run / "STOP").exists()


def test_dry_run_prints_the_script_and_writes_nothing(place, capsys):
    assert submit(["run.yaml", "--to", "slurm", "--dry-run"]) == 0
    assert capsys.readouterr().out.startswith("#!/bin/bash\n")
    assert not (place / "runs").exists()


@pytest.mark.parametrize("arguments, text", [
    (["run.yaml"], "--to= is no route; choose one of slurm, pbs, hosts, mpi"),
    (["run.yaml", "--to", "lsf"], "--to=lsf is no route"),
    (["--to", "slurm"], "no config: name one"),
    (["--to", "slurm", "r=4"], "no config: name one"),
    (["--array", "--to", "slurm"], "--array: which suite"),
    (["run.yaml", "--to", "pbs", "--array"], "arrays are built for slurm"),
    (["suite.yaml", "--to", "slurm", "--array", "--rehearse"], "rehearse one of the suite's runs by itself"),
    (["run.yaml", "--to", "slurm", "--at-a-time", "0"], "--at-a-time=0 must be"),
    (["absent.yaml", "--to", "slurm"], "absent.yaml cannot be read"),
    (["run.yaml", "--to", "hosts", "launcher.hostfile=null"], "needs launcher.hostfile"),
    (["run.yaml", "--to", "hosts", "launcher.hostfile=absent"], "absent cannot be read"),
    (["run.yaml", "--to", "hosts", "launcher.command_prefix=enroot"], "has no place with --to hosts"),
    (["run.yaml", "--to", "slurm", "output_dir=a;b"], "output_dir=.*a;b holds a character"),
    (["run.yaml", "--to", "slurm", "data.train_file=absent.jsonl"], "absent.jsonl is not there"),
])  # fmt: skip
def test_mistakes_of_the_command_line(schedulers, arguments, text):
    with pytest.raises(ConfigError, match=text):
        submit(arguments)
    assert not (schedulers / "asked").exists()


def test_unequal_slots_and_bad_lines_of_the_hostfile(place):
    (place / "hosts").write_text("node1 slots=2\nnode2 slots=3\n")
    with pytest.raises(ConfigError, match="give all slots=2"):
        submit(["run.yaml", "--to", "mpi"])
    (place / "hosts").write_text("node1 slots=2\nnode2 2\n")
    with pytest.raises(ConfigError, match="hosts:2: 'node2 2' is no host"):
        submit(["run.yaml", "--to", "hosts"])


def test_a_missing_scheduler_is_named(place, monkeypatch):
    monkeypatch.setenv("PATH", str(place))
    with pytest.raises(ConfigError, match="--to=slurm needs sbatch, which is not on PATH here"):
        submit(["run.yaml", "--to", "slurm"])


def test_a_schedulers_refusal_is_quoted(schedulers):
    program(schedulers, "sbatch", "echo 'invalid account' >&2; exit 1")
    with pytest.raises(ConfigError, match="sbatch refused .*: invalid account; correct"):
        submit(["run.yaml", "--to", "slurm"])


def test_a_walltime_below_two_checkpoints_is_refused_once_the_speed_is_known(schedulers):
    run = schedulers / "runs/first"
    run.mkdir(parents=True)
    steps = [{"step": s, "loss": 1.0, "elapsed_seconds": 4.0 * s} for s in (10, 20, 30)]
    after = [{"step": s, "loss": 1.0, "elapsed_seconds": 7.0 * (s - 30)} for s in (31, 32, 40)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in steps + after))
    write_status(run, "stopped", 40)
    arguments = ["run.yaml", "--to", "slurm", "launcher.time=01:00:00"]
    assert submit([*arguments, "save_steps=235"]) == 0
    with pytest.raises(ConfigError, match="holds less than two checkpoints: save_steps=240 take about 1680 s"):
        submit([*arguments, "save_steps=240"])


def test_what_changed_since_the_last_start_is_said_or_refused(schedulers, capsys):
    run = schedulers / "runs/first"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(yaml.safe_dump(BASE | {"learning_rate": 0.1, "global_batch_size": 4}))
    assert submit(["run.yaml", "--to", "slurm", "learning_rate=0.2"]) == 0
    assert "since the last start: learning_rate: 0.1 -> 0.2" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="lora_dropout: 0.0 -> 0.5: since the last start in runs/first"):
        submit(["run.yaml", "--to", "slurm", "lora_dropout=0.5"])


def test_every_setting_is_in_one_class_of_change():
    assert not set(CHANGEABLE) & set(ELSEWHERE)
    known = set(type(parse_config(BASE)).model_fields)
    assert set(CHANGEABLE) | set(ELSEWHERE) <= known
    before = parse_config(BASE | {"optimizer": {"eps": 1e-8}})
    taken, refused = differences(before, parse_config(BASE | {"optimizer": {"eps": 1e-6}, "max_steps": 20}))
    assert taken == ["max_steps: 10 -> 20"] and refused == ["optimizer.eps: 1e-08 -> 1e-06"]


def test_only_what_processes_need_goes_to_other_hosts():
    environ = {"NCCL_DEBUG": "INFO", "HF_TOKEN": "secret", "HF_HOME": "/h", "PATH": "/bin", "MINE": "1",
               "DISPLAY": ":0", "HF_LINES": "a\nb", "WANDB_API_KEY": "x"}  # fmt: skip
    assert exported_variables(environ, ("MINE",)) == {
        "HF_HOME": "/h",
        "MINE": "1",
        "NCCL_DEBUG": "INFO",
        "PATH": "/bin",
    }


def test_the_file_of_variables_has_no_blank_line_and_survives_double_quotes(tmp_path):
    write_env_file(tmp_path, {"NCCL_A": 'a "b" $HOME `id` \\', "DS_ENV_FILE": "x", "HF_EMPTY": ""})
    lines = (tmp_path / ".deepspeed_env").read_text().splitlines()
    assert lines == ["HF_EMPTY=", 'NCCL_A=a \\"b\\" \\$HOME \\`id\\` \\\\']
    value = lines[1].partition("=")[2]
    done = subprocess.run(["bash", "-c", f'export X="{value}"; printf %s "$X"'], capture_output=True, text=True)
    assert done.stdout == 'a "b" $HOME `id` \\'


def child(tmp_path, text):
    """A launcher to supervise, in shell."""
    return ["bash", "-c", f"cd {tmp_path}; {text}"]


@pytest.mark.parametrize("state, code, expected", [
    ("finished 5", 0, 0), ("stopped 5", 1, 0), ("requeue 5", 143, 0), ("failed 5", 0, 1), ("started 0", 0, 1),
])  # fmt: skip
def test_the_status_decides_not_the_exit_code(tmp_path, state, code, expected, capfd):
    assert supervise(tmp_path, child(tmp_path, f"echo {state} > status; exit {code}"), os.environ) == expected
    assert ("did not end well" in capfd.readouterr().err) == bool(expected)


def test_an_earlier_status_does_not_count_and_stays_if_nothing_began(tmp_path, capfd):
    (tmp_path / "status").write_text("finished 3\n")
    assert supervise(tmp_path, child(tmp_path, "exit 0"), os.environ) == 1
    assert "status is `starting`" in capfd.readouterr().err
    assert (tmp_path / "status").read_text() == "finished 3\n"
    (tmp_path / "status").write_text("requeue 7\n")
    assert supervise(tmp_path, child(tmp_path, "exit 0"), os.environ) == 1
    assert (tmp_path / "status").read_text() == "failed 7\n"  # nobody goes on with it


def test_a_signal_becomes_the_stop_file_and_the_launcher_is_left_alone(tmp_path):
    (tmp_path / "status").write_text("started 0\n")
    launcher = (
        "trap 'touch got-a-signal' TERM; touch up; while [ ! -e STOP ]; do sleep 0.1; done; sleep 0.5; "
        "echo stopped 4 > status"
    )
    command = ["-m", "ardtrain.launching.supervise", str(tmp_path), "--", *child(tmp_path, launcher)]
    guard = subprocess.Popen([sys.executable, *command])
    for _ in range(200):
        if (tmp_path / "up").exists():
            break
        with pytest.raises(subprocess.TimeoutExpired):
            guard.wait(0.1)
    guard.send_signal(signal.SIGTERM)
    assert guard.wait(20) == 0
    assert not (tmp_path / "got-a-signal").exists() and not (tmp_path / "STOP").exists()


def test_a_launcher_that_hangs_after_the_end_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr("ardtrain.launching.supervise.LINGER_SECONDS", 0.5)
    assert supervise(tmp_path, child(tmp_path, "echo finished 9 > status; sleep 300"), os.environ) == 0


def test_an_array_has_one_element_for_each_run_that_can_start(schedulers, capsys):
    suite = {
        "name": "s", "output_dir": "runs/sweep", "methods": {"lora": {"method": "lora"}}, "learning_rates": [0.1, 0.2],
        "seeds": [1, 2], "metric": "eval_loss", "reference": "lora",
        "base": {k: v for k, v in BASE.items() if k not in ("output_dir", "method")} | {"max_length": 64},
    }  # fmt: skip
    suite["base"]["data"] = {"train_file": "rows.jsonl", "eval_file": "rows.jsonl"}
    (schedulers / "suite.yaml").write_text(yaml.safe_dump(suite))
    assert submit(["--array", "suite.yaml", "--to", "slurm", "--at-a-time=2"]) == 0
    root = schedulers / "runs/sweep"
    script = (root / "job.sh").read_text()
    block = script[script.index("runs=(") : script.index("\n)\n") + 3]
    folders = [line.strip() for line in block.splitlines()[1:-1]]
    assert len(folders) == 4 and all((Path(folder) / "run.yaml").is_file() for folder in folders)
    assert "#SBATCH --array=0-3%2" in script and "%A_%a" in script
    assert "4 runs; when all have ended" in capsys.readouterr().out
    line = next(line for line in script.splitlines() if line.startswith("run="))
    environ = os.environ | {"SLURM_ARRAY_TASK_ID": "2"}
    one = subprocess.run(["bash", "-c", f'{block}{line}; echo "$run"'], env=environ, capture_output=True, text=True)
    assert one.stdout.strip() == folders[2]
    (schedulers / "queue").write_text("PENDING\n")
    with pytest.raises(ConfigError, match="its job 77 is PENDING"):  # it would share folders with the first
        submit(["--array", "suite.yaml", "--to", "slurm"])

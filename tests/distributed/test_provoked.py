"""One process goes wrong: all stop, say why, and exit with a code that is not 0."""

import os
import time

import pytest

from ardtrain.faults import host_name
from tests.distributed.processes import run_processes
from tests.runs import write_run

pytestmark = pytest.mark.distributed


def test_a_disagreement_stops_all_within_the_step_and_names_the_process(tmp_path):
    ended = run_processes(2, ["-m", "tests.distributed.provoked", "disagreement"], folder=tmp_path, timeout=120)
    assert ended.codes == [3, 3], ended.text()
    for output in ended.outputs:
        assert "STEP 3 step 3: processes [1] hold another rank plan than process 0" in output


def test_a_flipped_bit_is_found_at_the_next_comparison_and_named(tmp_path):
    ended = run_processes(2, ["-m", "tests.distributed.provoked", "drift"], folder=tmp_path, timeout=120)
    assert ended.codes == [3, 3], ended.text()
    for output in ended.outputs:
        assert "STEP 4 step 4: processes [1] hold another weights than process 0" in output, ended.text()


def test_a_process_that_raises_in_mid_forward_ends_all_with_its_traceback(tmp_path):
    config = write_run(tmp_path, deepspeed="zero3")
    failed_at = tmp_path / "failed_at"
    arguments = ["-m", "tests.distributed.provoked", "failure", str(config)]
    environment = {"FAILED_AT": str(failed_at), "ARDTRAIN_CACHE": str(tmp_path / "cache")}
    ended = run_processes(2, arguments, folder=tmp_path, timeout=180, environment=environment)
    seconds = time.time() - float(failed_at.read_text())
    assert all(code not in (0, -9) for code in ended.codes), ended.text()
    assert seconds < 20, f"{seconds:.0f} s\n{ended.text()}"
    log = tmp_path / "run" / "logs" / "process-0001.log"
    for text in (ended.outputs[0], log.read_text()):  # the console of process 0, and the log of process 1
        assert f"process 1 on {host_name()} failed (log: {log}):" in text, ended.text()
        assert "FloatingPointError: provoked in mid-forward" in text, ended.text()
    assert not [p for p in os.listdir(tmp_path / "run") if p.startswith(("checkpoint", "adapter"))]

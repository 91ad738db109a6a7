"""The frozen base with a second copy in each node (`zero_hpz_partition_size`)."""

import json

import pytest

from tests.distributed.processes import run_processes

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("count", [2, 4])
def test_hpz_gives_the_same_bits(tmp_path, count, record_run):
    """One node of two processes, and two: losses, ranks and weights are those without a second copy."""
    out = tmp_path / "out.json"
    ended = run_processes(count, ["-m", "tests.distributed.hpz", str(out)], folder=tmp_path, timeout=300)
    assert ended.codes == [0] * count, ended.text()
    result = json.loads(out.read_text())
    without, with_copy = result["without"], result["with"]
    assert (without["second_copies"], with_copy["second_copies"]) == ([False], [True])
    assert without["events"] >= 2
    for what in ("losses", "table", "weights", "events"):
        assert without[what] == with_copy[what], what
    settings = {"base_zero": 3, "features": ["zero_hpz_partition_size"], "resizes": without["events"]}
    record_run(method="elalora", processes=count, **settings)

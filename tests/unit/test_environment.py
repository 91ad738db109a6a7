import pytest

from ardtrain.environment import ProcessIdentity, discover, export, first_host

TORCH = {
    "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "node1", "MASTER_PORT": "29500",
}  # fmt: skip
SRUN = {
    "SLURM_JOB_ID": "20007", "SLURM_STEP_ID": "0", "SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1", "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_STEP_NODELIST": "node[1-2]",
}  # fmt: skip
OMPI = {
    "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}  # fmt: skip
PMI = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
BATCH_SHELL = {"SLURM_JOB_ID": "20007", "SLURM_PROCID": "0", "SLURM_NTASKS": "4"}


def test_single_process_when_nothing_is_said():
    assert discover({}) == ProcessIdentity(0, 1, 0, 1, "single", "127.0.0.1", None)


def test_torch_variables_are_taken_as_they_are():
    assert discover(TORCH) == ProcessIdentity(3, 4, 1, 2, "torch", "node1", 29500)


def test_deepspeed_launcher_says_local_size_in_its_own_word():
    environ = {name: value for name, value in TORCH.items() if name != "LOCAL_WORLD_SIZE"}
    assert discover(environ).local_world_size is None
    assert discover({**environ, "LOCAL_SIZE": "2"}).local_world_size == 2


def test_srun_task_finds_master_and_port_by_itself():
    assert discover(SRUN) == ProcessIdentity(3, 4, 1, 2, "srun", "node1", 20007)


def test_master_given_by_the_batch_script_wins():
    identity = discover({**SRUN, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "23456"})
    assert (identity.source, identity.master_addr, identity.master_port) == ("srun", "10.0.0.1", 23456)


def test_open_mpi_needs_a_master_over_several_hosts():
    identity = discover({**OMPI, "MASTER_ADDR": "node1", "PBS_JOBID": "12.server"})
    assert (identity.global_rank, identity.source) == (3, "Open MPI")
    assert 20000 <= identity.master_port < 40000
    with pytest.raises(ValueError, match="MASTER_ADDR is not set.*Open MPI.*-x MASTER_ADDR"):
        discover(OMPI)


def test_pmi_on_one_host_needs_none():
    assert discover(PMI) == ProcessIdentity(1, 2, 1, 2, "PMI", "127.0.0.1", 29500)


def test_order_is_torch_then_srun():
    assert discover({**SRUN, **TORCH}).source == "torch"
    assert discover({**SRUN, "PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1"}).source == "srun"


def test_mpirun_inside_an_allocation_overrules_the_step_of_its_daemons():
    daemons = {**SRUN, "SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_LOCALID": "0"}
    assert discover({**daemons, **OMPI, "MASTER_ADDR": "node1"}).source == "Open MPI"


def test_torchrun_once_per_srun_task_is_no_mix():
    torchrun = {**TORCH, "RANK": "3", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "LOCAL_RANK": "3"}
    agents = {**SRUN, "SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0"}
    assert discover({**agents, **torchrun}).world_size == 8


@pytest.mark.parametrize("missing", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_partial_torch_variables_are_refused(missing):
    environ = {name: value for name, value in TORCH.items() if name != missing}
    with pytest.raises(ValueError, match=f"but {missing} not: a launcher sets all five"):
        discover(environ)


def test_master_alone_is_no_identity():
    assert discover({"MASTER_ADDR": "node1", "MASTER_PORT": "1234"}).source == "single"


def test_allocation_without_srun_is_refused():
    for environ in (BATCH_SHELL, {**BATCH_SHELL, "SLURM_STEP_ID": "4294967290"}):
        with pytest.raises(ValueError, match="SLURM_NTASKS=4, but srun did not start this process"):
            discover(environ)
    assert discover({**BATCH_SHELL, **TORCH}).source == "torch"
    assert discover({**BATCH_SHELL, "SLURM_NTASKS": "1"}).source == "single"


def test_copies_under_srun_are_refused():
    alone = {**TORCH, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    with pytest.raises(ValueError, match="torch says process 0 of 1, but srun started 4 tasks: that would be 4"):
        discover({**SRUN, **alone})
    standalone = {**TORCH, "RANK": "0", "WORLD_SIZE": "8", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "8"}
    with pytest.raises(ValueError, match="process 0 of 8 on this host, but srun started 4 tasks"):
        discover({**SRUN, **standalone})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"RANK": "4"}, r"RANK=4 must lie in 0\.\.WORLD_SIZE-1"),
        ({"RANK": "three"}, "RANK='three' must be a whole number"),
        ({"LOCAL_RANK": "2"}, "LOCAL_RANK=2 must be below the 2 here"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT=70000 must lie in"),
    ],
)
def test_numbers_out_of_range_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        discover({**TORCH, **change})


def test_export_sets_all_five_and_keeps_what_is_there():
    environ = {**SRUN, "MASTER_ADDR": "10.0.0.1"}
    export(discover(environ), environ)
    assert [environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")] == [
        "3", "4", "1", "10.0.0.1", "20007",
    ]  # fmt: skip


def test_export_gives_a_single_process_a_free_port():
    environ = {}
    export(discover(environ), environ)
    assert environ["MASTER_ADDR"] == "127.0.0.1"
    assert 1024 <= int(environ["MASTER_PORT"]) < 65536
    assert discover(environ).source == "torch"


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [("gpu[07-09,12],login1", "gpu07"), ("node1", "node1"), ("a,b", "a"), ("r[1,3]-ib", "r1-ib")],
)
def test_first_host(nodelist, host):
    assert first_host(nodelist) == host

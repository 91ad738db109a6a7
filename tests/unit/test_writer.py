"""The background writer: many processes (threads here) write one checkpoint; whatever fails, a complete one is left."""

import errno
import json
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ardtrain import checkpoint
from ardtrain.checkpoint import Writer, finding, saving, strictjson, tensorfile
from ardtrain.checkpoint.format import named
from tests.checkpoints import IDENTITY, LOOP, assert_same, load, load_newest, random_snapshot, save, write_adapter
from tests.tiny import equal_bits


def start_all(writers, snapshot, layout, *, step, **others):
    """The main threads' part of a save, on all processes in turn."""
    attempt = writers[0].prepare(step)
    arguments = {"loop": LOOP, "identity": IDENTITY, "write_adapter": write_adapter} | others
    for writer in writers:
        writer.start(attempt, snapshot, layout, step=step, **arguments)
    return attempt


def save_all(run_dir, snapshot, layout, *, step, count=2, limit=None, part_seconds=60.0, **others):
    """One save of `count` processes; the texts of all of them."""
    writers = [
        Writer(run_dir, global_rank=i, world_size=count, limit=limit, part_seconds=part_seconds) for i in range(count)
    ]
    start_all(writers, snapshot, layout, step=step, **others)
    return [writer.wait() for writer in writers]


def names(run_dir):
    return sorted(os.listdir(run_dir))


def no_space(path="file"):
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


# ---- what is written ----


@pytest.mark.parametrize("count", [1, 2, 3, 8, 100])
def test_any_number_of_processes_writes_the_same_state(tmp_path, count):
    snapshot, layout = random_snapshot(seed=3)
    assert save_all(tmp_path, snapshot, layout, step=30, count=count) == [None] * count
    path = tmp_path / "checkpoint-30"
    assert names(tmp_path) == ["checkpoint-30", "latest"]
    loaded = load(path)
    assert_same(loaded.snapshot, snapshot)
    assert loaded.loop == LOOP
    assert loaded.manifest["world_size"] == count
    files = sorted((path / "state").glob("*.safetensors"))
    assert len(files) == min(count, len(files)) and (count > 8 or len(files) == count)
    assert [f.name for f in files] == [
        f"arena-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)
    ]
    tensors = {name: t for file in files for name, t in load_file(file).items()}  # the library's reading
    wanted = named(snapshot, layout)
    assert tensors.keys() == wanted.keys()
    assert all(equal_bits(tensors[name], wanted[name]) for name in wanted)


def test_parts_are_about_equal_in_bytes(tmp_path):
    snapshot, layout = random_snapshot(ranks=(6, 14, 4, 5))
    save_all(tmp_path, snapshot, layout, step=1, count=4)
    sizes = [len(torch.cat([t.reshape(-1).view(torch.uint8) for t in load_file(f).values()]))
             for f in sorted((tmp_path / "checkpoint-1/state").glob("*.safetensors"))]  # fmt: skip
    largest = max(t.numel() * t.element_size() for t in named(snapshot, layout).values())
    assert max(sizes) - min(sizes) <= 2 * largest


def test_files_have_the_users_permissions(tmp_path):
    snapshot, layout = random_snapshot()
    (tmp_path / "plain").write_text("")
    wanted = stat.S_IMODE((tmp_path / "plain").stat().st_mode)
    save_all(tmp_path, snapshot, layout, step=1)
    files = [p for p in (tmp_path / "checkpoint-1").rglob("*") if p.is_file()]
    assert len(files) == 5
    assert {stat.S_IMODE(p.stat().st_mode) for p in files} == {wanted}


def test_best_and_the_limit_are_kept_in_the_background(tmp_path):
    snapshot, layout = random_snapshot()
    for step in range(1, 6):
        assert save_all(tmp_path, snapshot, layout, step=step, limit=2, is_best=step == 2) == [None, None]
    assert (tmp_path / "best").read_text() == "checkpoint-2\n"
    assert (tmp_path / "latest").read_text() == "checkpoint-5\n"
    assert names(tmp_path) == ["best", "checkpoint-2", "checkpoint-4", "checkpoint-5", "latest"]


# ---- in the background ----


class Held:
    """Holds every sync of a part's file until `go`."""

    def __init__(self, monkeypatch):
        self.go, self.reached = threading.Event(), threading.Event()

        def write_tensors(path, tensors):
            self.reached.set()
            assert self.go.wait(60)
            return tensorfile.write_tensors(path, tensors)

        monkeypatch.setattr(saving, "write_tensors", write_tensors)


def test_the_loop_goes_on_while_it_writes(tmp_path, monkeypatch):
    held = Held(monkeypatch)
    snapshot, layout = random_snapshot()
    writers = [Writer(tmp_path, global_rank=i, world_size=2) for i in range(2)]
    loop = {"step": 30, "nested": {"cursor": 1}}
    start_all(writers, snapshot, layout, step=30, loop=loop)
    loop["nested"]["cursor"] = 2  # the loop's own values move on
    assert held.reached.wait(60)
    assert all(writer.busy for writer in writers)
    assert [writer.poll() for writer in writers] == [None, None]
    assert not (tmp_path / "checkpoint-30").exists() and not (tmp_path / "latest").exists()
    held.go.set()
    beats = []
    assert [writer.wait(lambda: beats.append(1)) for writer in writers] == [None, None]
    assert beats
    assert not any(writer.busy for writer in writers)
    assert writers[0].saved == tmp_path / "checkpoint-30" and writers[1].saved is None
    assert load(tmp_path / "checkpoint-30").loop == {"step": 30, "nested": {"cursor": 1}}


def test_a_second_save_waits_for_the_first(tmp_path, monkeypatch):
    held = Held(monkeypatch)
    snapshot, layout = random_snapshot()
    writer = Writer(tmp_path, global_rank=0, world_size=1)
    start_all([writer], snapshot, layout, step=1)
    assert held.reached.wait(60)
    second = threading.Thread(target=start_all, args=([writer], snapshot, layout), kwargs={"step": 2})
    second.start()
    second.join(0.3)
    assert second.is_alive() and len(names(tmp_path)) == 1  # no folder for it yet
    held.go.set()
    second.join(60)
    assert writer.wait() is None
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2", "latest"]


# ---- failures ----


@pytest.fixture
def standing(tmp_path):
    """A run folder with one complete checkpoint, and its snapshot."""
    snapshot, layout = random_snapshot(seed=1)
    save(tmp_path, snapshot, layout, step=10)
    return tmp_path, snapshot


def assert_unharmed(standing, *, step=20):
    """The earlier checkpoint is the last, nothing is left of the failed one, and the next save works."""
    run_dir, snapshot = standing
    assert names(run_dir) == ["checkpoint-10", "latest"]
    loaded, skipped = load_newest(run_dir)
    assert_same(loaded.snapshot, snapshot)
    assert skipped == []
    following, layout = random_snapshot(seed=2)
    assert save_all(run_dir, following, layout, step=step) == [None, None]
    assert_same(load_newest(run_dir)[0].snapshot, following)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EACCES, errno.EROFS, errno.EDQUOT])
@pytest.mark.parametrize("global_rank", [0, 1])
def test_an_error_in_one_part_ends_the_save_and_not_the_run(standing, monkeypatch, global_rank, number):
    def failing(path, tensors):
        if f"arena-0000{global_rank + 1}-of-00002" in path.name:
            path.write_bytes(b"half of it")
            raise OSError(number, os.strerror(number), str(path))
        return tensorfile.write_tensors(path, tensors)

    monkeypatch.setattr(saving, "write_tensors", failing)
    snapshot, layout = random_snapshot(seed=2)
    main, other = save_all(standing[0], snapshot, layout, step=20)
    assert "checkpoint-20 was not saved:" in main and os.strerror(number) in main
    assert main.endswith("; the run goes on, checkpoint-10 stays the last one")
    if global_rank == 1:
        assert "process 1 could not write its part:" in main
        assert other.startswith("process 1: its part of checkpoint-20 was not written:")
    monkeypatch.undo()
    assert_unharmed(standing)


def test_a_process_that_cannot_even_report_is_heard(standing, monkeypatch):
    def failing(path, *args, **kwargs):
        if threading.current_thread() is not writers_threads[0]:
            raise no_space(path)
        return inner(path, *args, **kwargs)

    inner, writers_threads = strictjson.write, []
    monkeypatch.setattr(strictjson, "write", failing)
    snapshot, layout = random_snapshot(seed=2)
    writers = [Writer(standing[0], global_rank=i, world_size=2) for i in range(2)]
    attempt = writers[0].prepare(20)
    for writer in writers:
        writer.start(attempt, snapshot, layout, step=20, loop=LOOP, identity=IDENTITY, write_adapter=write_adapter)
        writers_threads.append(writer._thread)
    texts = [writer.wait() for writer in writers]
    assert "process 1 could not write its part, nor say why: is the disk full?" in texts[0]
    assert "No space left on device" in texts[1]
    monkeypatch.undo()
    assert_unharmed(standing)


def test_a_killed_process_costs_one_save_after_the_time_limit(standing):
    snapshot, layout = random_snapshot(seed=2)
    writers = [Writer(standing[0], global_rank=i, world_size=3, part_seconds=0.4) for i in range(3)]
    attempt = writers[0].prepare(20)
    wanted = {"step": 20, "loop": LOOP, "identity": IDENTITY, "write_adapter": write_adapter}
    for writer in writers[:2]:
        writer.start(attempt, snapshot, layout, **wanted)
    begin = time.monotonic()
    text = writers[0].wait()
    assert 0.3 < time.monotonic() - begin < 30
    assert "checkpoint-20 was not saved: processes [2] did not write their parts within 0.4 s" in text
    assert writers[1].wait() is None  # its own part was right
    writers[2].start(attempt, snapshot, layout, **wanted)  # too late: the attempt is gone
    assert writers[2].wait() == "process 2: its part of checkpoint-20 was not written: process 0 had given it up"
    assert_unharmed(standing)


def test_a_late_process_does_not_get_into_the_next_attempt(standing):
    run_dir, _ = standing
    old, old_layout = random_snapshot(seed=2)
    late = Writer(run_dir, global_rank=1, world_size=2)
    writer = Writer(run_dir, global_rank=0, world_size=2, part_seconds=0.2)
    first = writer.prepare(20)
    wanted = {"step": 20, "loop": LOOP, "identity": IDENTITY, "write_adapter": write_adapter}
    writer.start(first, old, old_layout, **wanted)
    assert "did not write" in writer.wait()
    second = writer.prepare(20)
    assert first != second
    new, new_layout = random_snapshot(seed=3)
    late.start(first, old, old_layout, **wanted)
    assert late.wait() is not None
    writer.start(second, new, new_layout, **wanted)
    late.start(second, new, new_layout, **wanted)
    assert [writer.wait(), late.wait()] == [None, None]
    assert_same(load_newest(run_dir)[0].snapshot, new)
    assert names(run_dir) == ["checkpoint-10", "checkpoint-20", "latest"]


def test_a_number_that_is_not_finite_is_not_written(standing):
    for site, (part, name) in {0: ("lora_A", "s0.lora_A.master"), 3: ("lora_B", "s3.lora_B.master")}.items():
        snapshot, layout = random_snapshot()
        layout.site_rows(snapshot.full.master, site)[part][0, 0] = float("nan")
        texts = save_all(standing[0], snapshot, layout, step=20)
        assert f"step 20: {name} holds a number that is not finite; the checkpoint was not written" in texts[0]
        if site == 3:  # of the second part; an error of the first may end the save before the second begins
            assert name in texts[1]
    assert_unharmed(standing)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}, b"x"], ids=str)
def test_a_loop_value_that_json_lacks_is_not_written(standing, value):
    snapshot, layout = random_snapshot()
    texts = save_all(standing[0], snapshot, layout, step=20, loop={"best_loss": value})
    assert "checkpoint-20 was not saved: trainer.json: " in texts[0]
    assert_unharmed(standing)


@pytest.mark.parametrize("error", [ValueError("every site has rank 0"), SystemExit(3), MemoryError(), no_space()])
def test_an_adapter_that_cannot_be_written_fails_the_save(standing, error):
    def failing(folder):
        folder.mkdir()
        (folder / "half").write_text("x")
        raise error

    snapshot, layout = random_snapshot()
    texts = save_all(standing[0], snapshot, layout, step=20, write_adapter=failing)
    assert "checkpoint-20 was not saved: " in texts[0]
    assert saving.reason(error) in texts[0] and saving.reason(error)
    assert_unharmed(standing)


@pytest.mark.parametrize("odd", ["an empty file", "a name", "a link"])
def test_an_adapter_that_no_load_would_take_fails_the_save(standing, odd):
    def failing(folder):
        write_adapter(folder)
        if odd == "an empty file":
            (folder / "empty").touch()
        elif odd == "a name":
            (folder / "two words").write_text("x")
        else:
            (folder / "link").symlink_to("adapter_config.json")

    snapshot, layout = random_snapshot()
    texts = save_all(standing[0], snapshot, layout, step=20, write_adapter=failing)
    assert "checkpoint-20 was not saved: " in texts[0]
    assert_unharmed(standing)


@pytest.mark.parametrize("change", ["a byte", "a tensor", "shorter", "gone"])
def test_process_0_does_not_take_a_part_on_trust(standing, monkeypatch, change):
    inner = saving.report_part

    def report(building, global_rank, record, error=None):
        (file,) = (building / "state").glob("arena-00002*")
        content = bytearray(file.read_bytes())
        if change == "a byte":
            content[-1] ^= 1
        elif change == "a tensor":
            content = content.replace(b"s3.", b"s4.")
            record = tensorfile.FileRecord(len(content), tensorfile.hashlib.sha256(content).hexdigest())
        file.write_bytes(content[:-1] if change == "shorter" else content)
        if change == "gone":
            file.unlink()
        inner(building, global_rank, record, error)

    monkeypatch.setattr(saving, "report_part", report)
    snapshot, layout = random_snapshot()
    texts = save_all(standing[0], snapshot, layout, step=20)
    assert "checkpoint-20 was not saved: " in texts[0] and "arena-00002-of-00002.safetensors" in texts[0]
    monkeypatch.undo()
    assert_unharmed(standing)


@pytest.mark.parametrize("global_rank", [0, 1])
def test_a_disk_that_gives_back_other_bytes_is_found(standing, monkeypatch, global_rank):
    def failing(path, tensors):
        record = tensorfile.write_tensors(path, tensors)
        if f"arena-0000{global_rank + 1}" in path.name:
            with path.open("r+b") as file:
                file.seek(-3, os.SEEK_END)
                file.write(b"x")
        return record

    monkeypatch.setattr(saving, "write_tensors", failing)
    snapshot, layout = random_snapshot()
    texts = save_all(standing[0], snapshot, layout, step=20)
    assert "reads back other than written; is the disk full or failing?" in texts[0]
    monkeypatch.undo()
    assert_unharmed(standing)


def test_a_folder_that_cannot_be_made_costs_the_save_alone(standing, monkeypatch):
    run_dir, _ = standing
    inner = os.mkdir

    def refuse(path, *args, **kwargs):
        if ".checkpoint-" in str(path):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return inner(path, *args, **kwargs)

    monkeypatch.setattr(os, "mkdir", refuse)
    snapshot, layout = random_snapshot()
    writers = [Writer(run_dir, global_rank=i, world_size=2) for i in range(2)]
    attempt = start_all(writers, snapshot, layout, step=20)
    assert attempt == ""
    assert not any(writer.busy for writer in writers)
    assert "checkpoint-20 was not saved: Read-only file system: " in writers[0].poll()
    assert [writer.wait() for writer in writers] == [None, None]  # said once
    monkeypatch.undo()
    assert_unharmed(standing)


@pytest.mark.parametrize("pointer", ["latest", "best"])
def test_a_pointer_that_cannot_be_written_is_told_and_the_checkpoint_stands(standing, monkeypatch, pointer):
    run_dir, _ = standing

    def failing(path, text):
        if path.name == pointer:
            raise no_space(path)
        return inner(path, text)

    inner = finding.replace_file
    monkeypatch.setattr(finding, "replace_file", failing)
    snapshot, layout = random_snapshot(seed=2)
    texts = save_all(run_dir, snapshot, layout, step=20, is_best=True)
    assert texts[0].startswith(
        "checkpoint-20 was saved, but `latest`, `best` or save_total_limit could not follow (No "
    )
    assert_same(load(run_dir / "checkpoint-20").snapshot, snapshot)
    newest = "checkpoint-20" if pointer == "best" else "checkpoint-10"
    assert load_newest(run_dir)[0].path.name == newest


def test_errors_of_two_saves_are_both_told(tmp_path):
    snapshot, layout = random_snapshot()
    writer = Writer(tmp_path, global_rank=0, world_size=1)
    for step in (1, 2):
        start_all([writer], snapshot, layout, step=step, loop={"bad": float("nan")})
    first, second = writer.wait().split("\n")
    assert first.startswith("checkpoint-1 was not saved") and second.startswith("checkpoint-2 was not saved")
    assert first.endswith("there is none yet")
    assert writer.poll() is None


def test_the_save_survives_a_disk_that_is_full(tmp_path):
    """The kernel's own ENOSPC, on a file system of 200 KiB in a namespace of the test's own, where that is allowed."""
    code = f"""
import os, sys
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from pathlib import Path
from tests.checkpoints import *
from tests.unit.test_writer import save_all, names
run_dir = Path(sys.argv[1])
snapshot, layout = random_snapshot(seed=1)
save(run_dir, snapshot, layout, step=10)
space = os.statvfs(run_dir)
free = space.f_bavail * space.f_frsize
(run_dir / "filler").write_bytes(bytes(free - 20_000))
other, other_layout = random_snapshot(seed=2)
texts = save_all(run_dir, other, other_layout, step=20)
assert "checkpoint-20 was not saved: " in texts[0] and "No space left on device" in texts[0], texts
assert names(run_dir) == ["checkpoint-10", "filler", "latest"], names(run_dir)
assert_same(load_newest(run_dir)[0].snapshot, snapshot)
try:
    checkpoint.check_writable(run_dir, 100_000)
except checkpoint.CheckpointError as error:
    assert "free, one checkpoint takes about" in str(error)
else:
    raise AssertionError("no space, and nobody minded")
(run_dir / "filler").unlink()
assert save_all(run_dir, other, other_layout, step=20) == [None, None]
assert_same(load_newest(run_dir)[0].snapshot, other)
print("held")
"""
    mount = f'mount -t tmpfs -o size=200k,mode=700 none {tmp_path} && exec {sys.executable} -c "$CODE" {tmp_path}'
    result = subprocess.run(
        ["unshare", "--mount", "--map-root-user", "sh", "-c", mount],
        env=os.environ | {"CODE": code},
        capture_output=True,
        text=True,
        timeout=120,
    )
    if "unshare:" in result.stderr or "mount:" in result.stderr:
        pytest.skip(f"no file system of its own here: {result.stderr.strip()}")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "held"


# ---- crashes ----


def in_a_child(action):
    """Runs it in a forked process; the exit status. Whatever it leaves half done stays so."""
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            code = action()
        except BaseException:
            os.write(2, traceback.format_exc().encode())
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_file_size_limit_is_an_error_like_any_other(standing):
    """The kernel's own EFBIG in the middle of a part: nothing is patched."""
    run_dir, _ = standing
    snapshot, layout = random_snapshot(seed=2)

    def action():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        (text, _) = save_all(run_dir, snapshot, layout, step=20)
        return 0 if "checkpoint-20 was not saved: " in text and "File too large" in text else 1

    assert in_a_child(action) == 0
    assert_unharmed(standing)


CRASH = 77


class Crashing:
    """Ends this process just before its k-th effect on the disk, or in the middle of one that writes."""

    EVENTS = frozenset({"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate"})

    def __init__(self, at):
        self._left, self._lock = at, threading.Lock()
        sys.addaudithook(self._see)
        write_all = strictjson.write_all

        def crash_fsync(descriptor):
            self.effect()  # the end of a process loses nothing that was written, so there is nothing to wait for

        def crash_write(file, content):
            half = len(content) // 2
            write_all(file, memoryview(content)[:half])
            self.effect()
            write_all(file, memoryview(content)[half:])

        os.fsync, strictjson.write_all, tensorfile.write_all = crash_fsync, crash_write, crash_write

    def _see(self, event, arguments):
        writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT
        if event in self.EVENTS or (event == "open" and isinstance(arguments[2], int) and arguments[2] & writes):
            self.effect()

    def effect(self):
        with self._lock:
            self._left -= 1
            if self._left == 0:
                os._exit(CRASH)


def assert_survived(run_dir, snapshots):
    """Every name is of something complete, and `auto` finds the newest of what is there."""
    checkpoint.clean(run_dir)
    assert not [name for name in names(run_dir) if name.startswith(".")]
    for name in names(run_dir):
        if name.startswith("checkpoint-"):
            load(run_dir / name)
    for pointer in ("latest", "best"):
        assert (run_dir / checkpoint.pointed(run_dir, pointer)).is_dir()
    loaded, skipped = load_newest(run_dir)
    assert skipped == []
    assert any(equal_bits(loaded.snapshot.full.master, s.full.master) for s in snapshots)
    return loaded


@pytest.mark.parametrize(("count", "again"), [(2, False), (1, True)], ids=["a new step", "the same step again"])
def test_a_crash_at_any_moment_leaves_an_intact_checkpoint(tmp_path, count, again):
    before, layout = random_snapshot(seed=1)
    after, after_layout = random_snapshot(seed=2)
    last, last_layout = random_snapshot(seed=9)
    (tmp_path / "start").mkdir()
    for step in (5, 10):
        save(tmp_path / "start", before, layout, step=step)
    (tmp_path / "start" / "best").write_text("checkpoint-5\n")
    new = 10 if again else 20
    kept_old = took_new = moments = 0
    for at in range(1, 400):
        run_dir = tmp_path / str(at)
        shutil.copytree(tmp_path / "start", run_dir)

        def action(run_dir=run_dir, at=at):
            Crashing(at)
            texts = save_all(run_dir, after, after_layout, step=new, count=count, limit=2, is_best=True)
            return 0 if texts == [None] * count else 1

        status = in_a_child(action)
        assert status in (0, CRASH)
        loaded = assert_survived(run_dir, [before, after])
        if at % 8 == 0:  # the next save works
            assert save_all(run_dir, last, last_layout, step=40, limit=1) == [None, None]
            assert_same(load_newest(run_dir)[0].snapshot, last)
        took = equal_bits(loaded.snapshot.full.master, after.full.master)
        kept_old, took_new, moments = kept_old + (not took), took_new + took, moments + 1
        shutil.rmtree(run_dir)
        if status == 0:
            assert took
            break
    else:
        raise AssertionError("the save never ended")
    assert moments > 40 and kept_old > 30 and took_new >= 5


def test_everything_is_on_the_disk_before_its_name_counts(tmp_path, monkeypatch):
    """A power cut keeps what was synced: each file and folder before the rename, the run folder before `latest`."""
    snapshot, layout = random_snapshot()
    save(tmp_path, snapshot, layout, step=10)
    synced, order = {}, []
    sync, replace = os.fsync, os.replace

    def seen_fsync(descriptor):
        sync(descriptor)
        status = os.fstat(descriptor)
        synced[status.st_ino] = status.st_size
        order.append(("sync", status.st_ino))

    def seen_replace(source, target, **kwargs):
        order.append(("replace", os.path.basename(target)))
        if os.path.basename(target) == "checkpoint-20":
            inside = [source, *source.rglob("*")]
            assert len(inside) == 8  # itself, state, adapter, 2 parts, trainer.json, adapter_config.json, manifest.json
            assert all(synced[p.stat().st_ino] == p.stat().st_size or p.is_dir() for p in inside)
        replace(source, target, **kwargs)

    monkeypatch.setattr(os, "fsync", seen_fsync)
    monkeypatch.setattr(os, "replace", seen_replace)
    assert save_all(tmp_path, snapshot, layout, step=20) == [None, None]
    monkeypatch.undo()
    named_at = order.index(("replace", "checkpoint-20"))
    pointed_at = order.index(("replace", "latest"))
    folder = tmp_path.stat().st_ino
    assert ("sync", folder) in order[named_at:pointed_at]
    assert ("sync", folder) in order[pointed_at:]
    assert json.loads((tmp_path / "checkpoint-20" / "manifest.json").read_text())["step"] == 20

import re

import pytest

from ardtrain.config import ConfigError
from ardtrain.hostfile import (
    Host,
    expand_nodelist,
    from_nodefile,
    parse_hostfile,
    parse_hosts,
    read_hostfile,
    unequal_slots,
)

GOOD = """# our two big ones
node1 slots=8

  node-2.cluster_a\tslots=8   # the second
"""
HOSTS = (Host("node1", 8), Host("node-2.cluster_a", 8))


def test_hosts_comments_and_blank_lines():
    assert parse_hostfile(GOOD, "H") == HOSTS
    assert parse_hostfile(GOOD.replace("\n", "\r\n"), "H") == HOSTS


def test_deepspeed_reads_the_same(tmp_path):
    from deepspeed.launcher.runner import fetch_hostfile

    path = tmp_path / "hostfile"
    path.write_text(GOOD)
    assert read_hostfile(path) == HOSTS
    assert dict(fetch_hostfile(str(path))) == {host.name: host.slots for host in HOSTS}


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("node2", "H:2: 'node2' is no host; a line is `HOST slots=N`, N processes on it, for example `node2 slots=1`"),
        ("node2:4", "for example `node2 slots=4`"),
        ("node2 slots=", "for example `node2 slots=1`"),
        ("node2 slots=four", "for example `node2 slots=1`"),
        ("node2 slots=2 max_slots=4", "for example `node2 slots=2`"),
        ("me@node2 slots=2", "for example `node2 slots=2`"),
        ("-oProxyCommand=x slots=1", "is no host"),
        ("node2; slots=1", "is no host"),
        ("node2 slots=0", "H:2: 'node2 slots=0' has no process; give slots=1 or more"),
        ("node1 slots=1", "H:2: 'node1 slots=1' names node1 a second time (first in line 1); keep one line"),
    ],
)
def test_a_bad_line_is_told_with_its_number_and_the_remedy(line, text):
    with pytest.raises(ConfigError, match=re.escape(text)):
        parse_hostfile(f"node1 slots=1\n{line}\n", "H")


def test_all_bad_lines_at_once():
    with pytest.raises(ConfigError) as told:
        parse_hostfile("a\nb slots=1\nc slots=0\n", "H")
    assert [error.split(" ")[0] for error in told.value.errors] == ["H:1:", "H:3:"]


@pytest.mark.parametrize("text", ["", "\n\n# node1 slots=1\n"])
def test_no_host_is_a_mistake(text):
    with pytest.raises(ConfigError, match="^H names no host"):
        parse_hostfile(text, "H")


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match="hostfile=.*absent cannot be read .No such file"):
        read_hostfile(tmp_path / "absent")
    (tmp_path / "image").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read .no text"):
        read_hostfile(tmp_path / "image")


def test_list_of_the_command_line():
    assert parse_hosts("a, b,c", "--hosts") == (Host("a", 1), Host("b", 1), Host("c", 1))
    with pytest.raises(ConfigError, match="names a a second time"):
        parse_hosts("a,a", "--hosts")


def test_nodefile_counts_lines_of_a_host():
    assert from_nodefile("n2\nn2\nn1\nn2\nn1\n") == (Host("n2", 3), Host("n1", 2))
    for text in ("", "\n", "n1\nn1 slots=2\n"):
        with pytest.raises(ConfigError, match="PBS_NODEFILE: .*one host name a line"):
            from_nodefile(text)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("node1", ["node1"]),
        ("node[1-2]", ["node1", "node2"]),
        ("gpu[08-10,12],login1", ["gpu08", "gpu09", "gpu10", "gpu12", "login1"]),
        ("r[1-2]n[1,3]-ib", ["r1n1-ib", "r1n3-ib", "r2n1-ib", "r2n3-ib"]),
        ("a,b", ["a", "b"]),
    ],
)
def test_slurms_list_of_nodes(text, names):
    assert list(expand_nodelist(text)) == names


def test_unequal_slots_are_told():
    assert unequal_slots(HOSTS) is None
    assert unequal_slots((Host("a", 1),)) is None
    text = unequal_slots((Host("a", 4), Host("b", 2)))
    assert text is not None
    assert "a slots=4, b slots=2" in text and "give all slots=2" in text

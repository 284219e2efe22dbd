"""Hostfiles and filters against recorded cases; where DeepSpeed is careless, the difference has a name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from funczero.launch.hostfile import choose, parse_hostfile, read_hostfile

CASES = json.loads((Path(__file__).parent / "golden" / "hostfile.json").read_text())["cases"]
REFUSED_HERE = {  # DeepSpeed takes these
    "slots=4x is read as 4": lambda c: "slots=4x" in c["text"],
    "more nodes than hosts": lambda c: c["num_nodes"] > 2,
    "more slots than a host has": lambda c: c["num_gpus"] > 4,
}


def told(case):
    """The resources as recorded, or None for a refusal."""
    try:
        chosen = choose(
            parse_hostfile(case["text"]), case["include"], case["exclude"], case["num_nodes"], case["num_gpus"]
        )
    except ValueError:
        return None
    return [[host, list(slots)] for host, slots in chosen.items()]


def named(case):
    return [name for name, holds in REFUSED_HERE.items() if "resources" in case and holds(case)]


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_recorded_hostfiles(case):
    if named(case):
        assert told(case) is None
    elif "resources" in case:
        assert told(case) == case["resources"] and parse_hostfile(case["text"]) == case["slots"]
    else:
        assert told(case) is None


def test_every_named_difference_is_recorded():
    assert len(CASES) == 59 and sorted(name for case in CASES for name in named(case)) == sorted(REFUSED_HERE)


NAMES = st.from_regex(r"[a-z][a-z0-9.-]{0,8}", fullmatch=True)


@given(st.dictionaries(NAMES, st.integers(1, 8), min_size=1, max_size=6), st.data())
def test_include_and_exclude_are_complements(hosts, data):
    """Of any slots: included and excluded ones together are all, in the file's order."""
    pairs = [(host, slot) for host, slots in hosts.items() for slot in range(slots)]
    some = data.draw(st.lists(st.sampled_from(pairs), min_size=1))
    text = "@".join(f"{host}:{slot}" for host, slot in some)
    chosen, rest = choose(hosts, include=text), choose(hosts, exclude=text)
    both = [{(host, slot) for host, slots in part.items() for slot in slots} for part in (chosen, rest)]
    assert both[0] == set(some) and both[0] | both[1] == set(pairs) and not both[0] & both[1]
    assert list(chosen) == [host for host in hosts if host in chosen] and all(
        list(s) == sorted(s) for s in chosen.values()
    )


@given(st.dictionaries(NAMES, st.integers(0, 64), min_size=1, max_size=6))
def test_what_is_written_is_read(hosts):
    assert parse_hostfile("".join(f"{host} slots={slots}\n" for host, slots in hosts.items())) == hosts


def test_names_with_users_ports_and_colons():
    text = "root@gpu-1:2222 slots=1\n[fe80::1%eth0]:22 slots=1\nfe80::2 slots=1\na_b.c slots=1\n"
    hosts = parse_hostfile(text)
    assert list(hosts) == ["root@gpu-1:2222", "[fe80::1%eth0]:22", "fe80::2", "a_b.c"]
    assert choose(hosts, include="root@gpu-1:2222:0@a_b.c") == {"root@gpu-1:2222": (0,), "a_b.c": (0,)}


def test_a_named_file_that_is_missing_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="cannot be read"):
        read_hostfile(str(tmp_path / "none"))

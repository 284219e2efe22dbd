"""The virtual ranks on which wires are compared are the real ones, bit for bit; a wrong flag gets one sentence."""

from pathlib import Path

import pytest
from ends import line

import funczero as fz

EXPERIMENTS = Path(__file__).resolve().parents[1] / "experiments"


def differ(name, updates, text, seeds=(0,)):
    import virtual_ranks

    run = virtual_ranks.Run(2000, 1, 16, 3e-3)
    return virtual_ranks.differs(virtual_ranks.SETTINGS[name], run, seeds, updates, fz.data.load([text])[0])


def test_virtual_ranks_have_the_bits_of_real_ones(gpt, text):
    assert differ("int4 difference/int4 feedback", 3, text) is None


@pytest.mark.slow
def test_virtual_ranks_have_the_bits_of_real_ones_in_every_setting(gpt, text):
    import virtual_ranks

    for name in virtual_ranks.SETTINGS:
        assert differ(name, 20, text, (0, 1)) is None, name


@pytest.mark.slow
def test_other_forms_of_a_wire_are_seen(gpt, text, monkeypatch):
    import virtual_ranks

    name, right = "int8/int4", virtual_ranks.SETTINGS["int8/int4"]
    wrong = right._replace(across=right.across._replace(read=virtual_ranks.g8.read))
    monkeypatch.setitem(virtual_ranks.SETTINGS, name, wrong)
    assert differ(name, 2, text) == "parameters[0] of seed 0 on rank 0"


WRONG = {
    "--settings=int3": "--settings: 'int3' is none; write some of 'none', 'bf16/bf16', ",
    "--settings=none,none": "--settings names one twice; write each once",
    "--seeds=0,x": "--seeds=0,x are no seeds; write numbers from 0 on, as 0,1,2",
    "--updates=0": "--updates=0 and --check=0 leave nothing to do; write one of them",
}
QUICK = "--settings=int3"  # a process takes seconds to start


@pytest.mark.parametrize("flag", [f if f == QUICK else pytest.param(f, marks=pytest.mark.slow) for f in WRONG])
def test_a_wrong_flag_gets_one_sentence(ends, flag, tmp_path):
    (told,) = ends.run(tmp_path / "life", line(EXPERIMENTS / "zeropp_parity.py", flag, f"--out={tmp_path}"), short=True)
    assert told["code"] and told["err"].startswith(f"zeropp_parity: {WRONG[flag]}") and told["err"].count("\n") == 1

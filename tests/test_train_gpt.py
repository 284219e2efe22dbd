"""The training script from one command: same losses at every stage, one sentence for a wrong command line, and a clean
end by ctrl-c.
"""

import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from cover import EACH
from ends import line

EXPERIMENTS = Path(__file__).resolve().parents[1] / "experiments"
SMALL = ["--layers=2", "--width=32", "--heads=2", "--length=16", "--batch=8", "--warmup=2", "--eval_batches=2"]


def start(*flags):
    return subprocess.Popen(
        [sys.executable, EXPERIMENTS / "train_gpt.py", *SMALL, *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    out, err = process.communicate(timeout=90)
    return process.returncode, out, err


@EACH
def test_stages_train_alike_and_report(ends, text, tmp_path_factory, whole):
    """Ranks that somebody else has started; with `whole` at stage 0, and at stage 3 from one command."""
    flags = {
        stage: (
            f"--stage={stage}",
            "--steps=8",
            "--eval_every=4",
            "--sample=20",
            f"--data={text}",
            f"--out={text}/out{stage}",
        )
        for stage in (0, 3)
    }
    run = start(*flags[3]) if whole else None
    place = tmp_path_factory.mktemp("ranks")  # not among the texts that they read
    ours = 0 if whole else 3
    ranks = ends.run(place, line(EXPERIMENTS / "train_gpt.py", *SMALL, *flags[ours]), 2, limit=120.0, short=True)
    assert [rank["code"] for rank in ranks] == [0, 0], ranks
    ended, losses, sent = {ours: (0, ranks[0]["out"], ranks[0]["err"])}, {}, {}
    ended |= {3: finish(run)} if whole else {}
    for stage, (status, out, err) in ended.items():
        assert status == 0, err
        records = [json.loads(line) for line in (text / f"out{stage}" / "metrics.jsonl").read_text().splitlines()]
        updates, held_out = ([r for r in records if name in r] for name in ("loss", "held_out_bits_per_byte"))
        assert [r["step"] for r in updates] == list(range(1, 9)) and [r["step"] for r in held_out] == [0, 4, 8]
        assert (
            abs(held_out[0]["held_out_bits_per_byte"] - 8) < 0.2
            and held_out[2]["held_out_bits_per_byte"] < held_out[0]["held_out_bits_per_byte"]
        )
        assert all(math.isclose(r["bits_per_byte"], r["loss"] / math.log(2)) and r["ok"] for r in updates)
        assert out.count("single bytes") == 3 and (text / f"out{stage}" / "loss.png").stat().st_size > 1000
        losses[stage], sent[stage] = torch.tensor([r["loss"] for r in updates]), updates[-1]["bytes_sent"]
    torch.testing.assert_close(losses[ours], losses[3], rtol=1e-5, atol=1e-5)
    # a model that fits one message is gathered once and scattered once, which is what a sum over all ranks sends
    assert sent[3] == sent[ours] > 0


def test_a_wrong_command_line_ends_with_one_sentence(ends, tmp_path):
    wrong = {
        f"--data={tmp_path}/missing": f"train_gpt: data: there is no file or folder '{tmp_path}/missing'; give",
        "--batch=9": (
            "train_gpt: --batch=9 windows do not divide into 2 micro-batches (processes x --accumulate=1); write"
            " --batch=10"
        ),
    }
    for flag, sentence in wrong.items():
        script = line(EXPERIMENTS / "train_gpt.py", *SMALL, flag, f"--out={tmp_path}/out")
        (told,) = ends.run(tmp_path / flag.split("=")[0], script, short=True)
        assert told["code"] == 2 and not told["out"], told
        assert told["err"].startswith(sentence) and told["err"].count("\n") == 1


@pytest.mark.slow
def test_ctrl_c_ends_all_processes_without_a_trace(text):
    run = start("--steps=100000", f"--data={text}", f"--out={text}/out")
    metrics = text / "out" / "metrics.jsonl"
    until = time.time() + 60
    while not (metrics.exists() and metrics.stat().st_size) and time.time() < until:
        time.sleep(0.1)
    run.send_signal(signal.SIGINT)
    status, out, err = finish(run)  # stdout closes when the last process has ended
    assert status == 130 and not err and "Traceback" not in out


def test_gpt_starts_at_eight_bits_and_looks_only_back(gpt):
    params = gpt.init(0, gpt.Sizes(layers=3, width=32, heads=4))
    x = torch.randint(256, (4, 24), generator=torch.Generator().manual_seed(0))
    nll, tokens = gpt.loss_fn(params, {"x": x, "y": x.roll(-1, 1)}, heads=4)
    assert tokens == 96 and abs(nll / tokens / math.log(2) - 8) < 0.1
    changed = x.clone()
    changed[:, 12:] = 0
    before, after = (gpt.logits(params, tokens, heads=4) for tokens in (x, changed))
    assert before.shape == (4, 24, 256)
    torch.testing.assert_close(before[:, :12], after[:, :12])
    assert not torch.allclose(before[:, 12:], after[:, 12:])


def test_gpt_positions_are_relative(gpt):
    q, k = torch.randn(2, 8, generator=torch.Generator().manual_seed(0)).expand(10, 2, 8).unbind(1)
    angles = gpt.rotary(10, 8, torch.device("cpu"))
    scores = gpt.turn(q, angles) @ gpt.turn(k, angles).T
    for distance in range(-9, 10):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-4, atol=1e-5)


def test_gpt_samples_are_a_function_of_the_generator(gpt):
    params = gpt.init(0, gpt.Sizes(layers=1, width=16, heads=2))
    once, again, other = (
        gpt.sample(params, 2, b"def ", 20, 8, 1.0, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    )
    assert once == again != other and len(once) == 24 and once.startswith(b"def ")


def test_gpt_refuses_heads_that_do_not_fit(gpt):
    with pytest.raises(ValueError, match="width 10 over 3 heads .* write a width that is a multiple of 6"):
        gpt.init(0, gpt.Sizes(layers=1, width=10, heads=3))


def losses(out):
    """Every update's numbers that do not depend on time and world."""
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [[r[k] for k in ("step", "loss", "grad_norm", "lr", "ok")] for r in records if "loss" in r]


@pytest.mark.slow
def test_a_notice_ends_a_run_cleanly_and_it_goes_on_elsewhere_with_the_same_bits(text, tmp_path_factory):
    flags = ["--steps=24", "--eval_every=12", "--sample=0", f"--data={text}"]
    text = tmp_path_factory.mktemp("out")
    whole = start(*flags, "--accumulate=2", f"--out={text}/whole")
    run = start(*flags, "--accumulate=2", "--save_every=5", "--resume=auto", f"--out={text}/run")
    while not (text / "run" / "checkpoints" / "5").exists():
        assert run.poll() is None
        time.sleep(0.02)
    run.send_signal(signal.SIGTERM)
    status, out, err = finish(run)
    assert status == 0 and "stopped by SIGTERM after update" in out, (out, err)
    stopped = int(out.split("after update ")[1].split(";")[0])
    assert (text / "run" / "checkpoints" / str(stopped)).exists() and len(losses(text / "run")) == stopped
    status, out, err = finish(
        start(*flags, "--nproc=4", "--stage=1", "--save_every=5", "--resume=auto", f"--out={text}/run")
    )
    assert status == 0, err
    assert (
        finish(whole)[0] == 0 and losses(text / "run") == losses(text / "whole") and len(losses(text / "whole")) == 24
    )
    status, _, err = finish(start(*flags, "--save_every=5", f"--out={text}/run"))
    assert status == 2 and "holds checkpoints of another run" in err
    status, _, err = finish(start(*flags, "--resume=7", f"--out={text}/run"))
    assert status == 1 and "there is no checkpoint '7'" in err and "found complete: " in err

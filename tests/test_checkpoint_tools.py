"""inspect, verify, diff, export and import, as a new user types them; and a checkpoint of the first version, which
stays readable.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path

import checkpoints
import pytest
import torch
import zoo
from safetensors.torch import load_file, save_file
from torch import nn

import funczero as fz
from funczero.checkpoint import Checkpointer, CheckpointError
from funczero.checkpoint.export import export
from funczero.checkpoint.importing import import_weights
from funczero.checkpoint.tools import verify
from funczero.cli import main
from funczero.testing import tree_hash

GOLDEN = Path(__file__).parent / "golden" / "checkpoint"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Two checkpoints of the zoo's run."""
    directory = tmp_path_factory.mktemp("saved")
    step = checkpoints.make("0 grad acc ar", 1)
    state = step.init(zoo.params(), key=7)
    with Checkpointer(directory, step=step, config={"lr": 0.1}) as ck:
        for t in range(2):
            state = checkpoints.train(step, state, t, t + 1)
            ck.save(state, t + 1, client_state={"epoch": 3, "seen": torch.arange(4)}, metrics={"loss": 1.5})
    return directory, step, state


def run(capsys, *args):
    """(exit code, what was printed, what was complained about) of the command."""
    code = main(list(map(str, args)))
    return code, *capsys.readouterr()


def test_inspect_tells_all_without_reading_arrays(saved, capsys, tmp_path):
    directory, _, _ = saved
    shutil.copytree(directory / "2", tmp_path / "2")
    for data in tmp_path.rglob("d"):
        shutil.rmtree(data)  # the arrays themselves
    start = time.perf_counter()
    code, out, _ = run(capsys, "inspect", tmp_path / "2")
    assert code == 0 and time.perf_counter() - start < 5
    for text in (
        "step 2, 2 updates, commit 2, written by 1 ranks",
        "loss 1.5",
        "accumulate(8)",
        '"lr": 0.1',
        '"epoch": 3',
        "params/blocks/0/w",
        "float32",
        "[5, 7]",
        "140 bytes",
        "is params/norm",
    ):
        assert text in out, text
    assert run(capsys, "inspect", directory)[1].startswith(str(directory / "2"))
    code, _, err = run(capsys, "inspect", tmp_path / "none")
    assert code == 2 and "the folder does not exist" in err


def test_verify_reads_everything(saved, capsys, tmp_path):
    directory, _, _ = saved
    assert run(capsys, "verify", directory)[:2] == (0, f"{directory / '2'}: every leaf and file is as it was saved\n")
    shutil.copytree(directory / "2", tmp_path / "2")
    (tmp_path / "2" / "notes.txt").write_text("hello")
    code, out, _ = run(capsys, "verify", tmp_path / "2")
    assert code == 1 and out == "file 'notes.txt' does not belong to it\n"
    largest = max(
        (p for p in tmp_path.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size * ("ocdbt.process" in str(p))
    )
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    assert run(capsys, "verify", tmp_path / "2")[0] == 1


def test_diff_names_the_largest_difference_of_every_leaf(saved, capsys):
    directory, _, _ = saved
    assert run(capsys, "diff", directory / "2", directory / "2")[:2] == (0, "every leaf has the same bits\n")
    code, out, _ = run(capsys, "diff", directory / "1", directory / "2")
    assert (
        code == 1
        and "step: largest difference 1 (1 against 2), 1 of 1 values differ" in out
        and "params/embed: largest difference" in out
        and "key" not in out.split()
    )


def test_export_loads_strictly_with_tied_names(saved, capsys, tmp_path):
    directory, step, state = saved
    code, out, _ = run(capsys, "export", directory, tmp_path / "m.safetensors")
    assert code == 0 and "m.safetensors" in out
    whole = {path.replace("/", "."): x for path, x in fz.tree.paths(step.params(state))}
    got = load_file(tmp_path / "m.safetensors")
    assert got.keys() == whole.keys() and all(tree_hash(got[k]) == tree_hash(whole[k]) for k in whole)
    assert run(capsys, "export", directory, tmp_path / "m.safetensors")[0] == 2  # it is there already
    files = export(directory, tmp_path / "b.safetensors", "bfloat16", 300)
    index = json.loads((tmp_path / "b.safetensors.index.json").read_text())
    parts = [load_file(f) for f in files]
    assert (
        len(files) > 2
        and set().union(*parts) == whole.keys() == index["weight_map"].keys()
        and not list(tmp_path.glob("*.part"))
    )
    assert all(tree_hash(x) == tree_hash(whole[k].bfloat16()) for part in parts for k, x in part.items())
    for bad, why in (
        (("x.onnx",), "does not end in .safetensors"),
        (("x.safetensors", "complex"), "no dtype"),
        (("x.safetensors", "complex64"), "is no floating dtype"),
        (("x.safetensors", "float8_e4m3fnuz"), "no name for"),
    ):
        with pytest.raises((ValueError, CheckpointError), match=why):
            export(directory, tmp_path / bad[0], *bad[1:])


def test_weights_come_in_from_safetensors_and_go_out_into_a_module(tmp_path, capsys):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2, bias=False))
    save_file(module.state_dict(), tmp_path / "model.safetensors")
    assert run(capsys, "import", tmp_path / "model.safetensors", tmp_path / "ck")[0] == 0
    loss, params = fz.stateless(module, lambda model, x: (model(x).sum(), torch.tensor(1.0)))
    step = fz.train_step(fz.value_and_grad(loss), fz.adamw(0.1))
    got = Checkpointer(tmp_path / "ck").restore(like=(step, {k: v.detach().to("meta") for k, v in params.items()}))
    assert int(got.state.step) == 0 and tree_hash(step.params(got.state)) == tree_hash(
        {k: v.detach() for k, v in params.items()}
    )
    export(tmp_path / "ck", tmp_path / "out.safetensors")
    other = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2, bias=False))
    other.load_state_dict(load_file(tmp_path / "out.safetensors"), strict=True)
    assert tree_hash(other.state_dict()) == tree_hash(module.state_dict())
    for bad in ("nothing.safetensors", "ck/0/funczero.json", "."):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(CheckpointError, match="import"):
            import_weights(tmp_path / (bad if bad != "." else "empty"), tmp_path / "ck2")


def test_hugging_face_loads_an_export(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=16, n_positions=8)
    model = transformers.GPT2LMHeadModel(config).eval()
    save_file({k: v.contiguous().clone() for k, v in model.state_dict().items()}, tmp_path / "in.safetensors")
    import_weights(tmp_path / "in.safetensors", tmp_path / "ck")
    config.save_pretrained(tmp_path / "hf")
    export(tmp_path / "ck", tmp_path / "hf" / "model.safetensors", shard_size=2000)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    ids = torch.arange(8)[None]
    assert torch.equal(model(ids).logits, again(ids).logits)


def golden_step():
    """What the golden checkpoint was written by: on two ranks, after two updates."""
    shared = torch.arange(3.0)
    params = {
        "emb": torch.arange(15.0).view(5, 3) / 8,
        "blocks": [{"w.x": torch.ones(3, 3) / 4}, {"w.x": torch.full((3, 3), -0.5)}],
        "tied": shared,
        "norm": shared,
        "none": torch.zeros(0, 2),
    }
    grad = fz.value_and_grad(
        lambda p, b: (sum((x * x).sum() for x in fz.tree.leaves(p)) * b.sum(), b.sum()), batch=fz.P("data")
    )
    return (
        lambda world: fz.train_step(
            fz.shard("data", grad, fz.scale_loss(8.0, weight=4.0), fz.adamw(0.125)), mesh={"data": world}
        ),
        params,
    )


def write_golden(directory):
    """`run_world(2, write_golden, path)` wrote the files under tests/golden/checkpoint with version 0.1.0; they are
    never written again.
    """
    make, params = golden_step()
    step = make(2)
    state = step.init(params, key=3)
    for _ in range(2):
        state, _ = step(state, step.local_rows(torch.ones(4)))
    with Checkpointer(directory) as ck:
        ck.save(
            state, "two", client_state={"epoch": 1, "pair": (1, None), 5: torch.tensor([1, 2])}, metrics={"loss": 0.5}
        )
    return checkpoints.parts(state)


def test_a_checkpoint_of_the_first_version_stays_readable():
    make, params = golden_step()
    step = make(1)
    got = Checkpointer(GOLDEN).restore(like=(step, params))
    state = step.init(params, key=3)
    for _ in range(2):
        state, _ = step(state, torch.ones(4))
    rates = (  # leaves since 0.2
        "adamw/rates/lr = 0.125, adamw/rates/weight_decay = 0.01, adamw/rates/b1 = 0.9, adamw/rates/b2 = 0.999"
    )
    assert (
        got.notes == (f"the checkpoint says nothing of these rates, which come from the script: {rates}",)
        and got.metrics == {"loss": 0.5}
        and got.name == "two"
        and verify(GOLDEN) == []
    )
    assert repr(got.client_state) == repr({"epoch": 1, "pair": (1, None), 5: torch.tensor([1, 2])})
    for name, a in checkpoints.joined([checkpoints.parts(got.state)]).items():
        torch.testing.assert_close(a, checkpoints.joined([checkpoints.parts(state)])[name])


@pytest.mark.slow
def test_the_command_needs_no_distributed_and_no_jax(saved, tmp_path):
    import subprocess

    code = (
        f"import sys; from funczero.cli import main; main(['inspect', {str(saved[0])!r}]); main(['export',"
        f" {str(saved[0])!r}, {str(tmp_path / 'x.safetensors')!r}]); assert 'jax' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

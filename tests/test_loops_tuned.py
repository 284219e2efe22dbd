"""What else users ask of Hugging Face's Trainer: adapters, the best model, losses weighted by words, lengths."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from test_loops import furthest, start, told, truth

from funczero.checkpoint import manifest

MISSING = [n for n in ("transformers", "accelerate", "peft") if importlib.util.find_spec(n) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"{MISSING} are not installed")

STEPS_OF_8 = [0, 0, 1 / 2, 1, 5 / 6, 4 / 6]  # DeepSpeed's WarmupDecayLR begins with its least rate twice
STEPS_OF_4 = [0, 0, 1 / 2, 1]


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "world"), [(3, 2), (2, 2), (3, 1)])
def test_what_else_a_trainer_does(tmp_path, stage, world):
    folder = tmp_path / "ours"
    got = told(start("tuned", stage, folder, world), folder)
    truth()
    import peft
    import same
    from safetensors.torch import load_file
    from transformers import GPT2LMHeadModel

    # losses weighted by words, with accumulation, "auto" in every place; a callback ends it, and the best is loaded
    hand = lambda module, text, shares: [loss for loss, _ in same.updates(module.double(), text, shares)]
    assert furthest(got["best"], hand(same.model(), same.Text(32, uneven=True), STEPS_OF_8)) < 1e-6
    assert got["steps"] == 6 and len(got["evals"]) == 3
    assert got["best_eval"] == max(got["evals"]) != got["evals"][-1]

    # the model alone
    whole = same.model()
    assert furthest(got["only"], hand(whole, same.Text(16), STEPS_OF_4)) < 1e-6
    saved = folder / "only" / "checkpoint-4"
    assert not list(saved.glob("global_step*")) and not (saved / "latest").exists()
    alone = GPT2LMHeadModel.from_pretrained(saved)
    words = torch.tensor([[5, 6, 7, 8]])
    torch.testing.assert_close(alone(words).logits.double(), whole(words).logits, rtol=1e-4, atol=1e-5)

    # ranks that stop at different lengths
    longest = alone.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=6, do_sample=False, eos_token_id=None).tolist()
    assert got["generated"] == [[longest[0][: 5 + 4 * rank]] for rank in range(world)]

    # adapters alone are trained, saved and resumed, and PEFT reads them
    adapted = same.adapted(same.model())
    assert furthest(got["lora"], hand(adapted, same.Text(16), STEPS_OF_4)) < 1e-6
    assert got["again"] == got["lora"] and got["moved"] == [] and got["still"] == 29
    assert all("lora" in n for n in load_file(folder / "adapter" / "adapter_model.safetensors"))
    arrays = manifest.load(folder / "lora" / "checkpoint-2" / "global_step2").arrays
    assert all("lora" in n for n in arrays if n.startswith("params/"))
    ours = peft.PeftModel.from_pretrained(same.model(), folder / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(ours(words).logits, torch.tensor(got["logits"]), rtol=1e-5, atol=1e-6)

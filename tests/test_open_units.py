"""Never more than two blocks are gathered at once: models of several lists, as others wrote them."""

from __future__ import annotations

import weakref

import pytest
import torch
from cover import params as covered

import funczero as fz
from funczero import P
from funczero.core.link import Link
from funczero.gradients.ref import Ref
from funczero.testing import simulate

TWO = {"data": 2}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
TEXT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "vocab_size": 60}


def clip():
    """Two towers."""
    from transformers import CLIPConfig, CLIPModel

    text = TEXT | {"max_position_embeddings": 8, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=VISION, projection_dim=8))
    batch = {"input_ids": torch.arange(3, 27).view(4, 6), "pixel_values": torch.ones(4, 3, 8, 8)}
    return model, batch, lambda model, b: model(**b).logits_per_text


def poolformer():
    """A list of patch embeddings and a list of lists of blocks, in turns."""
    from transformers import PoolFormerConfig, PoolFormerForImageClassification

    config = PoolFormerConfig(hidden_sizes=[8, 8, 16, 16], depths=[2, 3, 2, 2], drop_path_rate=0.0, num_labels=3)
    return (
        PoolFormerForImageClassification(config),
        {"pixel_values": torch.ones(4, 3, 64, 64)},
        lambda m, b: m(**b).logits,
    )


def llava():
    """A tower of vision, of which the last block is not used, and a language model."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig, LlavaNextForConditionalGeneration

    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**VISION),
        text_config=LlamaConfig(**TEXT, num_key_value_heads=2),
        image_token_index=59,
        image_grid_pinpoints=[[8, 16], [16, 8]],
        image_seq_length=4,
    )
    batch = {
        "input_ids": torch.cat([torch.full((4, 10), 59), torch.arange(32).view(4, 8)], 1),
        "pixel_values": torch.ones(4, 3, 3, 8, 8),
        "image_sizes": torch.tensor([[8, 8]] * 4),
    }
    return LlavaNextForConditionalGeneration(config), batch, lambda model, b: model(**b).logits


def _blocks(model):
    return [b for m in model.modules() if isinstance(m, torch.nn.ModuleList) for b in m.children()]


MODELS = {f.__name__: f for f in (clip, poolformer, llava)}


def opened(model, batch, forward, remat, link):
    """The most messages that were open at once, as the tape counts, the most blocks and bytes that memory holds, and of
    how many lists they are.
    """
    loss_fn, params = fz.stateless(model, lambda m, b: (forward(m, b).square().sum(), torch.tensor(2.0)), remat=remat)
    tapes, alive, most = [], weakref.WeakSet(), [(0, 0)]

    def seen(params, b):
        tape = next(x.tape for x in params.values() if isinstance(x, Ref))
        landed = tape.gathers._landed

        def watched(message):
            buffers = landed(message)
            for u, buffer in zip(message.units, buffers, strict=True):
                if tape.whole.structure.units[u].seam:
                    alive.add(buffer.untyped_storage())
            most.append((len(alive), sum(x.nbytes() for x in alive)))
            return buffers

        tape.gathers._landed = watched
        tapes.append(tape)
        return loss_fn(params, b)

    grad = fz.value_and_grad(seen, batch=P("data"), units=loss_fn.units, trainable=loss_fn.trainable)
    step = fz.train_step(*fz.zero(grad, fz.sgd(0.1), stage=3), mesh={"data": -1}, link=link)
    state = step.init(params)
    for _ in range(3):
        state, _ = step(state, step.local_rows(batch))
    blocks, held = map(max, zip(*most, strict=True))
    return max(t.gathers.peak for t in tapes), blocks, held, len(loss_fn.units)


OPENED = ("clip", "none"), ("poolformer", "none"), ("llava", "none"), ("llava", "vision")


@pytest.mark.parametrize(
    ("name", "frozen", "form"), covered([(*one, form) for one in OPENED for form in ("keep", "remat")], by=1)
)
def test_two_blocks_at_most_are_open(name, frozen, form):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, batch, forward = MODELS[name]()
    for n, p in model.named_parameters():
        p.requires_grad_(frozen not in n)
    for counted, blocks, _, lists in simulate(TWO)(opened, model, batch, forward, form == "remat", Link(latency=0.0)):
        assert counted == 2 and blocks <= 2 and lists >= 2
    largest = max(sum(p.nbytes for p in b.parameters()) for b in _blocks(model))
    some = Link(latency=1.0, speed=largest)  # four blocks
    for counted, blocks, held, _ in simulate(TWO)(opened, model, batch, forward, form == "remat", some):
        assert counted == 2 and blocks > 2 and held <= 2 * 1.1 * some.together  # with padding

"""Models of Hugging Face of all kinds, tiny and unmodified: what each is built from, and what it is fed."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

import funczero as fz
from funczero import P
from funczero.core.rows import split
from funczero.testing import tree_hash

ROWS, LONG, VOCAB = 4, 8, 40
SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
SMALL |= {"vocab_size": VOCAB, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GQA = SMALL | {"num_key_value_heads": 1, "head_dim": 8}
IMAGE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 16}
IMAGE |= {"patch_size": 4, "num_labels": 3}
STAGES = {"depths": [1, 1, 2], "hidden_sizes": [8, 8, 16], "num_stages": 3, "num_labels": 3}


def _generator(t: int) -> torch.Generator:
    return torch.Generator().manual_seed(t)


def text(t: int) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(3, VOCAB, (ROWS, LONG), generator=_generator(t))}


def padded(t: int) -> dict[str, Tensor]:
    mask = (torch.arange(LONG) < torch.tensor([8, 5, 7, 3])[:, None]).long()
    return {**text(t), "attention_mask": mask}


def both(t: int) -> dict[str, Tensor]:
    return {**padded(t), "decoder_input_ids": text(t + 100)["input_ids"]}


def image(t: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(ROWS, 3, 16, 16, dtype=torch.float64, generator=_generator(t))}


def large_image(t: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(ROWS, 3, 32, 32, dtype=torch.float64, generator=_generator(t))}


def pairs(t: int) -> dict[str, Tensor]:
    return {**text(t), **image(t)}


def wave(t: int) -> dict[str, Tensor]:
    return {"input_values": torch.randn(ROWS, 400, dtype=torch.float64, generator=_generator(t))}


def mels(t: int) -> dict[str, Tensor]:
    features = torch.randn(ROWS, 8, 32, dtype=torch.float64, generator=_generator(t))
    return {"input_features": features, "decoder_input_ids": text(t)["input_ids"]}


class Model(NamedTuple):
    """A class of transformers with the arguments of its configuration, and what its forward is given."""

    kind: str
    name: str  # of the class
    config: dict[str, Any]
    feed: Callable[[int], dict[str, Tensor]]
    trains: bool = False  # also where dropout is off: its forward is another one in evaluation

    def make(self) -> torch.nn.Module:
        """The model in float64 with its dropout, in training."""
        import transformers as t

        cls: Any = getattr(t, self.name)
        config = cls.config_class(**self.config)
        config._experts_implementation = "eager"  # the other one multiplies no float64
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return cls(config).double().train()


EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
CONV = {"conv_dim": (8, 8), "conv_stride": (4, 4), "conv_kernel": (8, 4), "num_conv_pos_embeddings": 4}
CONV |= {"num_conv_pos_embedding_groups": 2, "mask_time_prob": 0.0, "layerdrop": 0.0}
SEQ = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2}
SEQ |= {
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "vocab_size": VOCAB,
    "max_position_embeddings": 32,
}
SEQ |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
STATES = {"hidden_size": 16, "state_size": 4, "num_hidden_layers": 3, "vocab_size": VOCAB, "time_step_rank": 2}
NEO = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "vocab_size": VOCAB, "max_position_embeddings": 32}
CLIPS = {"text_config": SMALL, "vision_config": IMAGE, "projection_dim": 8}

MODELS = {
    "gpt2": Model(
        "text",
        "GPT2LMHeadModel",
        {"n_embd": 16, "n_layer": 3, "n_head": 2, "vocab_size": VOCAB, "n_positions": 32},
        padded,
    ),
    "gpt_neo": Model(
        "text", "GPTNeoForCausalLM", NEO | {"attention_types": [[["global", "local"], 1]], "window_size": 4}, padded
    ),
    "gpt_neox": Model("text", "GPTNeoXForCausalLM", SMALL, padded),
    "opt": Model(
        "text",
        "OPTForCausalLM",
        {k: v for k, v in SMALL.items() if k != "intermediate_size"} | {"ffn_dim": 24, "word_embed_proj_dim": 16},
        padded,
    ),
    "bloom": Model(
        "text", "BloomForCausalLM", {"hidden_size": 16, "n_layer": 3, "n_head": 2, "vocab_size": VOCAB}, padded
    ),
    "falcon": Model("text", "FalconForCausalLM", SMALL, padded),
    "llama": Model("text", "LlamaForCausalLM", GQA, padded),
    "mistral": Model("text", "MistralForCausalLM", GQA | {"sliding_window": 4}, padded),
    "qwen2": Model("text", "Qwen2ForCausalLM", GQA, padded),
    "qwen3": Model("text", "Qwen3ForCausalLM", GQA, padded),
    "gemma2": Model("text", "Gemma2ForCausalLM", GQA | {"query_pre_attn_scalar": 8}, padded),
    "phi": Model("text", "PhiForCausalLM", SMALL, padded),
    "stablelm": Model("text", "StableLmForCausalLM", GQA, padded),
    "olmo2": Model("text", "Olmo2ForCausalLM", GQA, padded),
    "starcoder2": Model("text", "Starcoder2ForCausalLM", GQA, padded),
    "bert": Model("masked", "BertForMaskedLM", SMALL, padded),
    "roberta": Model("masked", "RobertaForMaskedLM", SMALL, padded),
    "distilbert": Model(
        "masked",
        "DistilBertForMaskedLM",
        {"dim": 16, "hidden_dim": 24, "n_layers": 3, "n_heads": 2, "vocab_size": VOCAB},
        padded,
    ),
    "electra": Model("masked", "ElectraForMaskedLM", SMALL | {"embedding_size": 8}, padded),
    "albert": Model("masked", "AlbertForMaskedLM", SMALL | {"embedding_size": 8}, padded),
    "deberta_v2": Model("masked", "DebertaV2ForMaskedLM", SMALL, padded),
    "t5": Model(
        "both ways",
        "T5ForConditionalGeneration",
        {
            "d_model": 16,
            "d_kv": 8,
            "d_ff": 24,
            "num_layers": 2,
            "num_heads": 2,
            "vocab_size": VOCAB,
            "decoder_start_token_id": 0,
        },
        both,
    ),
    "bart": Model("both ways", "BartForConditionalGeneration", SEQ, both),
    "marian": Model("both ways", "MarianMTModel", SEQ, both),
    "mixtral": Model("experts", "MixtralForCausalLM", GQA | {"num_local_experts": 4}, padded),
    "qwen3_moe": Model("experts", "Qwen3MoeForCausalLM", GQA | EXPERTS | {"decoder_sparse_step": 1}, padded),
    "olmoe": Model("experts", "OlmoeForCausalLM", SMALL | {"num_experts": 4, "num_experts_per_tok": 2}, padded),
    "mamba": Model("state space", "MambaForCausalLM", STATES, text),
    "mamba2": Model(
        "state space",
        "Mamba2ForCausalLM",
        {
            "hidden_size": 16,
            "state_size": 4,
            "num_hidden_layers": 3,
            "vocab_size": VOCAB,
            "num_heads": 4,
            "head_dim": 8,
            "n_groups": 1,
            "chunk_size": 4,
        },
        text,
    ),
    "rwkv": Model(
        "state space",
        "RwkvForCausalLM",
        {
            "hidden_size": 16,
            "num_hidden_layers": 3,
            "vocab_size": VOCAB,
            "attention_hidden_size": 16,
            "intermediate_size": 24,
            "use_cache": False,
        },
        text,
        True,
    ),
    "jamba": Model(
        "state space",
        "JambaForCausalLM",
        GQA | {
            "num_hidden_layers": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "num_experts": 2,
            "mamba_d_state": 4,
            "mamba_dt_rank": 2,
            "use_mamba_kernels": False,
        },
        padded,
    ),
    "vit": Model("vision", "ViTForImageClassification", IMAGE, image),
    "deit": Model("vision", "DeiTForImageClassification", IMAGE, image),
    "beit": Model("vision", "BeitForImageClassification", IMAGE, image),
    "dinov2": Model("vision", "Dinov2ForImageClassification", IMAGE, image),
    "swin": Model(
        "vision",
        "SwinForImageClassification",
        {
            "image_size": 16,
            "patch_size": 2,
            "embed_dim": 8,
            "depths": [2, 2],
            "num_heads": [2, 2],
            "window_size": 4,
            "num_labels": 3,
        },
        image,
    ),
    "convnext": Model(
        "vision", "ConvNextForImageClassification", STAGES | {"patch_size": 2, "drop_path_rate": 0.1}, image
    ),
    "poolformer": Model(
        "vision",
        "PoolFormerForImageClassification",
        {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 8, 16, 16], "num_labels": 3},
        large_image,
    ),
    "segformer": Model(
        "vision",
        "SegformerForImageClassification",
        {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 8, 16, 16], "num_attention_heads": [1, 1, 2, 2], "num_labels": 3},
        large_image,
    ),
    "resnet": Model(
        "batch norm",
        "ResNetForImageClassification",
        {
            "embedding_size": 8,
            "hidden_sizes": [8, 8, 16, 16],
            "depths": [1, 1, 1, 1],
            "layer_type": "basic",
            "num_labels": 3,
        },
        large_image,
        True,
    ),
    "mobilenet_v2": Model(
        "batch norm",
        "MobileNetV2ForImageClassification",
        {"depth_multiplier": 0.25, "num_labels": 3},
        large_image,
        True,
    ),
    "wav2vec2": Model(
        "speech", "Wav2Vec2ForCTC", {k: v for k, v in SMALL.items() if k != "max_position_embeddings"} | CONV, wave
    ),
    "hubert": Model(
        "speech", "HubertForCTC", {k: v for k, v in SMALL.items() if k != "max_position_embeddings"} | CONV, wave
    ),
    "whisper": Model(
        "speech",
        "WhisperForConditionalGeneration",
        SEQ | {"num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 16},
        mels,
    ),
    "clip": Model("contrastive", "CLIPModel", CLIPS, pairs),
    "siglip": Model("contrastive", "SiglipModel", {k: v for k, v in CLIPS.items() if k != "projection_dim"}, pairs),
}


def loss(model: torch.nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The sum of squares of what the model says first: logits, or a matrix of likenesses."""
    out = model(**batch)
    first = out.logits if "logits" in out else out.logits_per_image
    return first.square().sum() / first[0].numel(), torch.tensor(float(len(first)))


# --- the same updates with funczero and with plain torch --------------------------------------------------------------
MICROS, UPDATES = 2, 2


def trained(model: Model, stage: int, dropped: bool) -> Any:
    """As one rank: parameters and buffers after some updates.

    Args:
      dropped: with the model's dropout, rather than without.
    """
    module = model.make() if dropped else quiet(model)
    loss_fn, params = fz.stateless(module, loss)
    grad = fz.value_and_grad(loss_fn, batch=P("data"), trainable=loss_fn.trainable, rng=dropped)
    size = dist.get_world_size() if dist.is_initialized() else 1
    chain = fz.zero(grad, fz.sgd(0.05, momentum=0.9), stage=stage, accumulate=MICROS // size)
    step = fz.train_step(*chain, mesh={"data": -1}, policy="float64")
    state = step.init(params, key=3)
    for t in range(UPDATES):
        state, metrics = step(state, step.local_rows(model.feed(t)))
    assert bool(metrics.ok)
    return {**step.params(state), **(state.model_state or {})}


def quiet(model: Model) -> torch.nn.Module:
    """Without dropout; where it has batch norm, with its statistics."""
    module = model.make()
    if not model.trains:
        return module.eval()
    for m in module.modules():
        if isinstance(m, torch.nn.Dropout):
            m.p = 0.0
    return module


def plain(model: Model) -> dict[str, Tensor]:
    """The same updates with plain torch, in one process."""
    module = quiet(model)
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], 0.05, momentum=0.9)
    for t in range(UPDATES):
        optimizer.zero_grad()
        replicas = [deepcopy(module) for _ in range(MICROS)]  # each reads the same statistics
        for replica, micro in zip(replicas, split(model.feed(t), MICROS, "plain"), strict=True):
            (loss(replica, micro)[0] / ROWS).backward()
        for p, *copies in zip(module.parameters(), *(r.parameters() for r in replicas), strict=True):
            if p.requires_grad:
                p.grad = sum((c.grad for c in copies if c.grad is not None), torch.zeros_like(p))
        for b, *copies in zip(module.buffers(), *(r.buffers() for r in replicas), strict=True):
            if model.kind == "batch norm":
                b.copy_(sum(copies) / MICROS)
        optimizer.step()
    return {n: x.detach() for n, x in [*module.named_parameters(remove_duplicate=False), *module.named_buffers()]}


def results(name: str, stages: tuple[int, ...] = (0, 3)) -> dict[int, tuple[float, str]]:
    """As one rank, by stage: how far values are from plain torch, of the largest; the hash of what dropout made."""
    model, out = MODELS[name], {}
    want = plain(model)
    largest = max(float(x.abs().max()) for x in want.values() if x.is_floating_point() and x.numel())
    for stage in stages:
        found = trained(model, stage, dropped=False)
        far = max(float((x - want[n]).abs().max()) for n, x in found.items() if x.numel()) / largest
        out[stage] = far, tree_hash(trained(model, stage, dropped=True))
    return out

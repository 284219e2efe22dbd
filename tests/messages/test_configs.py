"""What a wrong ds_config.json is told: the key's path, the file's line, what is wrong, what to write instead; word for word."""

from __future__ import annotations

import json

import pytest
import torch

import funczero as fz
from funczero import deepspeed as ds
from funczero.cli import main

B = {"train_batch_size": 8}


def loss(params, batch):
    raise NotImplementedError


TRIAD = (
    "(train_batch_size={}, train_micro_batch_size_per_gpu={}, gradient_accumulation_steps={}, world size {}: the"
    " argument world)"
)

# config, world, message
SAYS = {
    "typo": ({**B, "gradient_cliping": 0.5}, 2, "config: gradient_cliping: there is no such key; write 'gradient_clipping'"),
    "typo inside": ({**B, "zero_optimization": {"stag": 2}}, 2, "config: zero_optimization.stag: there is no such key; write 'stage'"),
    "typo deep inside": (
        {**B, "zero_optimization": {"offload_param": {"pin_memry": True}}}, 2, "config: zero_optimization.offload_param.pin_memry: there is no such key; write 'pin_memory'",
    ),
    "typo of an option": (
        {**B, "optimizer": {"type": "Adam", "params": {"learning_rate": 1}}}, 2,
        "config: optimizer.params.learning_rate: there is no such key in optimizer.params; delete it, or write one of ",
    ),
    "in the wrong place": (
        {**B, "zero_optimization": {"gradient_clipping": 1.0}}, 2, "config: zero_optimization.gradient_clipping: there is no such key here; its place is gradient_clipping",
    ),
    "type": ({**B, "gradient_clipping": "1.0"}, 2, 'config: gradient_clipping: "1.0" is not a number; write a number; the default is 1.0'),
    "flag": ({**B, "fp16": {"enabled": 1}}, 2, "config: fp16.enabled: 1 is not true or false; write true or false; the default is false"),
    "fraction": ({**B, "steps_per_print": 2.5}, 2, "config: steps_per_print: 2.5 is not a whole number, or infinite for never; write a whole number, or infinite for never"),
    "zero": ({**B, "steps_per_print": 0}, 2, "config: steps_per_print: 0 is out of range; write at least 1"),
    "dotted": ({**B, "fp16.enabled": True}, 2, 'config: fp16.enabled: there is no such key; write blocks in blocks, {"fp16": {...}}'),
    "no block": ({**B, "fp16": True}, 2, "config: fp16: True is no block; write {...} with some of auto_cast, consecutive_hysteresis, enabled, "),
    "choice": ({**B, "gradient_allreduce_op": "max"}, 2, 'config: gradient_allreduce_op: "max" does not exist; write one of "mean", "sum"'),
    "two groups": (
        {**B, "optimizer": {"type": "Adam"}, "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": [0.1, 0.2]}}}, 2,
        "config: scheduler.type: WarmupLR: warmup_max_lr names 2 numbers, but there is one group of parameters; write one number, or one a group",
    ),
    "missing option": (
        {**B, "scheduler": {"type": "WarmupDecayLR", "params": {}}}, 2,
        "config: scheduler.params: 'total_num_steps' is missing, and WarmupDecayLR has no default for it; add 'total_num_steps'",
    ),
    "auto": (
        {**B, "gradient_clipping": "auto", "optimizer": {"type": "Adam", "params": {"lr": "auto"}}}, 2,
        'config: nobody filled in "auto" of gradient_clipping, optimizer.params.lr; write values, or hand them over as auto={\'gradient_clipping\': ...}',
    ),
    "both precisions": (
        {**B, "fp16": {"enabled": True}, "bf16": {"enabled": True}}, 2,
        'config: bf16.enabled: fp16 and bf16 are both enabled; write "enabled": false in one of them',
    ),
    "both spellings": (
        {**B, "zero_optimization": {"cpu_offload": False, "offload_optimizer": {"device": "none"}}}, 2,
        "config: zero_optimization.offload_optimizer.device: it says the same as zero_optimization.cpu_offload; delete one of the two",
    ),
    "sum at stage 3": (
        {**B, "gradient_allreduce_op": "sum", "zero_optimization": {"stage": 3}}, 4,
        'config: gradient_allreduce_op: "sum" is not defined at stage 3; write "mean" and a learning rate 4 times larger, or stage 2',
    ),
    "removed": ({**B, "amp": {"enabled": True}}, 2, "config: amp: it is switched on: DeepSpeed has removed this feature; delete the key"),
    "hpZ": (
        {**B, "train_batch_size": 9, "zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}, 3,
        "config: zero_optimization.zero_hpz_partition_size: groups of 2 ranks do not divide the world of 3; write a divisor of 3",
    ),
    "heads of Muon": (
        {**B, "optimizer": {"type": "Muon", "params": {"per_head_muon": True}}}, 2,
        "config: optimizer.params.per_head_muon: true would change the training: matrices are taken as they are; delete the key",
    ),
    "an implementation": (
        {**B, "optimizer": {"type": "FusedAdam"}}, 2,
        "config: optimizer.type: 'FusedAdam' is not here: it is the name of an implementation; write \"Adam\", which is AdamW, or \"AdamW\"",
    ),
    "lower case": ({**B, "optimizer": {"type": "sgd"}}, 2, "config: optimizer.type: there is no optimizer 'sgd'; write 'SGD'"),
    "schedule": (
        {**B, "scheduler": {"type": "warmuplr"}}, 2,
        "config: scheduler.type: there is no schedule 'warmuplr' that a file can describe; write 'WarmupLR'",
    ),
    "no optimizer": (B, 2, 'config: neither the config nor the call names an optimizer; add "optimizer": {"type": "Adam"}, or write optimizer=fz.adamw(...)'),
    "max_grad_norm": (
        {**B, "optimizer": {"type": "Adam", "params": {"max_grad_norm": 1}}}, 2,
        "config: optimizer.params.max_grad_norm: it is not the optimizer's; write gradient_clipping at the top level",
    ),
    "no triad": (
        {"gradient_accumulation_steps": 4}, 4,
        "config: train_batch_size: neither it nor train_micro_batch_size_per_gpu is there, and there is no default batch " + TRIAD.format("absent", "absent", 4, 4)
        + "; write train_micro_batch_size_per_gpu=1, or train_batch_size=16",
    ),
    "contradiction": (
        {"train_batch_size": 32, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2}, 2,
        "config: train_batch_size: 32 is not 4 * 2 * 2 = 16 " + TRIAD.format(32, 4, 2, 2) + "; write train_batch_size=16, or gradient_accumulation_steps=4",
    ),
    "indivisible": (
        {"train_batch_size": 33}, 4,
        "config: train_batch_size: 33 rows do not divide by 4 " + TRIAD.format(33, "absent", "absent", 4) + "; write train_batch_size=32, or train_batch_size=36",
    ),
    "world": (B, 0, "world: 0 is not a number of processes; write an int of at least 1"),
    "fp16 inputs": (
        {**B, "fp16": {"enabled": True, "auto_cast": True}, "optimizer": {"type": "Adam"}}, 2,
        "config: fp16.auto_cast: a loss function casts its own inputs; delete the key and write batch[...].half() in it",
    ),
    "momentum of torch's cycle": (
        {**B, "optimizer": {"type": "SGD"}, "scheduler": {"type": "OneCycleLR", "params": {"max_lr": 1.0, "total_steps": 9}}}, 2,
        "config: scheduler.type: from_torch: OneCycleLR would move the momentum too; write cycle_momentum=False, or one_cycle and one_cycle_momentum",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SAYS)
def test_a_wrong_config_is_told_in_one_sentence(name):
    config, world, said = SAYS[name]
    with pytest.raises(ds.ConfigError) as caught:
        fz.from_deepspeed(config, loss, world=world)
    text = str(caught.value)
    assert text.startswith(said) if said.endswith(" ") else text == said
    assert "\n" not in text


FILES = {
    "line": ('{\n  // one\n  "train_batch_size": 8,\n  "fp16": {\n    "enabld": true\n  }\n}', "c.json:5: fp16.enabld: there is no such key; write 'enabled'"),
    "twice": ('{\n  "train_batch_size": 8,\n  "fp16": {\n    "enabled": true,\n    "enabled": false\n  }\n}', "c.json:5: fp16.enabled: it stands twice, here and on line 4; delete one of the two"),
    "auto": ('{\n  "train_batch_size": "auto"\n}', 'c.json: nobody filled in "auto" of train_batch_size (line 2); write values, or hand them over as auto={\'train_batch_size\': ...}'),
    "syntax": ('{\n  "train_batch_size": [8,\n', "c.json:3: it does not parse: "),
    "a list": ("[1, 2]", "c.json: it holds a list, not keys and values; write {...}"),
    "empty": ("", "c.json: train_batch_size: neither it nor train_micro_batch_size_per_gpu is there"),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_wrong_file_is_told_its_line(tmp_path, name):
    text, said = FILES[name]
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(ds.ConfigError) as caught:
        ds.resolve(tmp_path / "c.json", 2)
    assert str(caught.value).startswith(said) and "\n" not in str(caught.value)


def test_a_file_that_is_not_there_is_named():
    for name in ("nope.json", "/nope/ds_config.json", ""):
        with pytest.raises(ds.ConfigError) as caught:
            ds.resolve(name, 2)
        assert str(caught.value) == f"{name}: there is no such file; write the path of a ds_config.json, or a dict"


def test_an_auto_for_a_key_that_does_not_exist_is_named():
    with pytest.raises(ds.ConfigError, match="auto: gradient_cliping: there is no such key; write 'gradient_clipping'"):
        ds.resolve(B, 2, {"gradient_cliping": 1.0})
    with pytest.raises(ds.ConfigError, match="auto: hidden_size: 7.5 is not a whole number"):
        ds.resolve(B, 2, {"hidden_size": 7.5})


def test_a_call_that_cannot_be_is_told():
    with pytest.raises(TypeError, match="a chain has one gradient; write from_deepspeed\\(config, loss_fn\\), or"):
        fz.from_deepspeed(B, world=1)
    warm = {**B, "scheduler": {"type": "WarmupCosineLR", "params": {"total_num_steps": 5}}}
    with pytest.raises(
        ds.ConfigError,
        match="scheduler.type: the optimizer of the call has its own rate; write optimizer=lambda lr: fz.adamw",
    ):
        fz.from_deepspeed(warm, loss, world=1, optimizer=fz.sgd(0.1))
    with pytest.raises(
        ds.ConfigError, match="it starts from the optimizer's lr, and there is none; add optimizer.params.lr"
    ):
        fz.from_deepspeed(warm, loss, world=1, optimizer=lambda lr: fz.sgd(lr))
    with pytest.raises(
        ds.ConfigError, match="optimizer= is a function of the learning rate, but the config gives none"
    ):
        fz.from_deepspeed(B, loss, world=1, optimizer=lambda lr: fz.sgd(lr))


# --- the command ------------------------------------------------------------------------------------------------------
CONFIG = {
    "train_batch_size": 64, "gradient_accumulation_steps": 4, "optimizer": {"type": "AdamW", "params": {"lr": "auto"}},
    "bf16": {"enabled": True}, "zero_optimization": {"stage": 2, "overlap_comm": True},
}  # fmt: skip


def test_the_command_resolves_and_compares(tmp_path, capsys):
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    a.write_text(json.dumps(CONFIG, indent=1))
    b.write_text(json.dumps({**CONFIG, "gradient_clipping": 0.5, "zero_optimization": {"stage": 3}}))
    auto = "--auto=optimizer.params.lr=3e-4"
    assert main(["config", "resolve", str(a), "--world=8", auto, "--parameters=1e6"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    for words in (
        "a.json on 8 ranks (the argument world)", "train_micro_batch_size_per_gpu 2 derived", "zero_optimization.stage 2 file, line", "optimizer.params.lr 0.0003 auto, line",
        "gradient_clipping 1.0 default", "64 rows an update = 2 a micro-batch * 4 micro-batches * 8 ranks", "shard('data', -> sum, sharded over ['data'], of 8 micro-batches",
        "accumulators (3 in float32, over 8 ranks) 1.5", "in all 7.0", "zero_optimization.overlap_comm = true changes nothing: it schedules the same values",
        "gradient_clipping is absent and so 1.0", "gradients are summed in float32 here, in bfloat16 there",
    ):  # fmt: skip
        assert words in out, words
    assert main(["config", "diff", str(a), str(b), "--world=8", auto]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "gradient_clipping: 1.0 (default) -> 0.5 (file)", "zero_optimization.stage: 2 (file) -> 3 (file)", "zero_optimization.overlap_comm: true (file) -> - (default)",
    ]  # fmt: skip
    assert main(["config", "diff", str(a), str(a), "--world=8", auto]) == 0
    assert main(["config", "resolve", str(a), "--world=8"]) == 2
    assert (
        capsys.readouterr().err
        == "funczero: a.json: nobody filled in \"auto\" of optimizer.params.lr (line 7); write values, or hand them"
        " over as auto={'optimizer.params.lr': ...}\n"
    )


def test_memory_is_what_a_state_holds(tmp_path):
    """Masters, views and moments of a real step, on one rank of one."""
    for stage in range(4):
        config = {
            "train_batch_size": 8,
            "bf16": {"enabled": True},
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            "optimizer": {"type": "Adam"},
        }
        chain, c = fz.from_deepspeed(config, loss, world=1)
        state = fz.train_step(*chain, **c.arguments).init({"w": torch.zeros(160)})
        held = {
            "masters": [state.params],
            "views": [state.views],
            "moments": [state.chain["adamw"].mu, state.chain["adamw"].nu],
        }
        from funczero.deepspeed.config.explain import memory

        said = {row.what: row.each for row in memory(c, ds.optimizer_of(c))}
        for what in ("masters", "moments"):
            assert sum(x.numel() * x.element_size() for x in fz.tree.tensors(held[what])) == said[what] * 160
        if state.views is not None:
            assert sum(x.numel() * x.element_size() for x in fz.tree.tensors(held["views"])) == said["views"] * 160

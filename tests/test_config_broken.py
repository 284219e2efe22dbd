"""A thousand generated broken configs: none is accepted, and each message has the key's path, its line and a remedy."""

from __future__ import annotations

import json
import random
import time
from copy import deepcopy

import pytest

import funczero as fz
from funczero import deepspeed as ds
from funczero.deepspeed.config.keys import ALIASES
from funczero.deepspeed.config.options import OPTIMIZERS, SCHEDULERS

COUNT, WORLD = 1000, 2
BASES = [
    {
        "train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "optimizer": {"type": "Adam", "params": {"lr": 0.00015}},
        "fp16": {"enabled": True},
        "zero_optimization": {"stage": 1},
    },
    {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 1.0,
        "steps_per_print": 10,
        "wall_clock_breakdown": False,
        "optimizer": {"type": "AdamW", "params": {"lr": 3e-4, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1}},
        "scheduler": {
            "type": "WarmupDecayLR",
            "params": {"total_num_steps": 100, "warmup_num_steps": 10, "warmup_max_lr": 3e-4, "warmup_type": "linear"},
        },
        "bf16": {"enabled": True},
        "communication_data_type": "bf16",
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {
            "stage": 2,
            "reduce_bucket_size": 5e8,
            "overlap_comm": True,
            "contiguous_gradients": True,
            "offload_optimizer": {"device": "none", "pin_memory": True},
        },
        "checkpoint": {"tag_validation": "Fail", "parallel_write": {"pipeline_stage": False}},
        "tensorboard": {"enabled": False, "output_path": "logs"},
    },
    {
        "train_batch_size": 32,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 4,
        "prescale_gradients": False,
        "gradient_allreduce_op": "mean",
        "optimizer": {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9, "nesterov": True}},
        "scheduler": {
            "type": "OneCycle",
            "params": {
                "cycle_min_lr": 1e-4,
                "cycle_max_lr": 1e-3,
                "cycle_first_step_size": 100,
                "cycle_momentum": False,
            },
        },
        "fp16": {"enabled": False, "loss_scale": 0, "initial_scale_power": 12, "hysteresis": 2, "min_loss_scale": 1},
        "zero_optimization": {
            "stage": 3,
            "stage3_max_live_parameters": 1e9,
            "stage3_param_persistence_threshold": 1e4,
            "sub_group_size": 1e9,
        },
        "activation_checkpointing": {"partition_activations": False, "profile": False},
        "timers": {"throughput": {"enabled": True}},
    },
    {
        "train_batch_size": 4,
        "optimizer": {"type": "RMSprop", "params": {"alpha": 0.9, "centered": True}},
        "scheduler": {"type": "StepLR", "params": {"step_size": 10, "gamma": 0.5}},
        "comms_logger": {"enabled": False, "prof_ops": []},
        "aio": {"block_size": 1048576, "queue_depth": 8},
        "flops_profiler": {"enabled": False, "module_depth": -1},
    },
]
WRONG = {
    "flag": ["yes", "true", 1, [], {}, None],
    "int": ["3", 2.5, True, [], {}, "many"],
    "every": ["3", 2.5, True, [], {}, "inf"],
    "number": ["0.1", True, [], {}, "1e-4x"],
    "text": [3, True, [], {}],
    "pair": [0.9, [0.9], ["a", "b"], [0.9, True], {}],
    "list": [3, "x", True],
    "rate": ["0.1", True, [0.1, 0.2], {}],
    "off": [True, {"enabled": True}, "on", 1],
}
PAIRS = [  # contradictions and values that fit nowhere: what to write, the path that the message names
    ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, "bf16.enabled"),
    ({"bf16": {"enabled": True}, "bfloat16": {"enabled": True}}, "bfloat16"),
    ({"zero_optimization": {"stage": 3}, "gradient_allreduce_op": "sum"}, "gradient_allreduce_op"),
    (
        {"bf16": {"enabled": True}, "fp16": {"enabled": False}, "data_types": {"param_dtype": "fp16"}},
        "data_types.param_dtype",
    ),
    (
        {"zero_optimization": {"stage": 2, "cpu_offload": False, "offload_optimizer": {"device": "none"}}},
        "zero_optimization.offload_optimizer.device",
    ),
    (
        {
            "zero_optimization": {
                "stage": 3,
                "param_persistence_threshold": 10,
                "stage3_param_persistence_threshold": 10,
            }
        },
        "zero_optimization.stage3_param_persistence_threshold",
    ),
    ({"data_parallel_size": 3}, "data_parallel_size"),
    ({"optimizer": {"type": "AdamW", "params": {"max_grad_norm": 1.0}}}, "optimizer.params.max_grad_norm"),
    (
        {
            "fp16": {"enabled": False},
            "bf16": {"enabled": False},
            "zero_optimization": {"stage": 3},
            "communication_data_type": "fp16",
        },
        "communication_data_type",
    ),
    (
        {"train_batch_size": 7, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2},
        "train_batch_size",
    ),
    ({"zero_optimization": {"stage": 5}}, "zero_optimization.stage"),
    ({"gradient_clipping": -1.0}, "gradient_clipping"),
    ({"scheduler": {"type": "WarmupLR", "params": {"warmup_type": "exp"}}}, "scheduler.params.warmup_type"),
    (
        {
            "scheduler": {"type": "OneCycleLR", "params": {"max_lr": 1.0, "total_steps": 10}},
            "optimizer": {"type": "SGD"},
        },
        "scheduler.type",
    ),
    ({"optimizer": {"type": "Adam", "params": {"betas": [0.9, 1.0]}}}, "optimizer.params.betas"),
]


def loss(params, batch):
    raise NotImplementedError


def places(config, prefix=""):
    """Every (path, block, key), blocks included, at any depth."""
    for key, x in config.items():
        yield f"{prefix}{key}", config, key
        if isinstance(x, dict):
            yield from places(x, f"{prefix}{key}.")


def kind(config, path):
    block, _, name = path.partition(".params.")
    if name:
        table = (
            (OPTIMIZERS | {"sgd": {}}).get(config[block]["type"].lower(), {})
            if block == "optimizer"
            else SCHEDULERS.get(config[block]["type"], {})
        )
        return (
            table[name].kind
            if name in table
            else {"nesterov": "flag", "centered": "flag", "step_size": None}.get(name, "number")
        )
    return ds.KEYS[path].kind if path in ds.KEYS else "block"


def typo(rng, config):
    path, block, key = rng.choice(list(places(config)))
    i = rng.randrange(len(key))
    new = rng.choice(
        [
            key[:i] + key[i + 1 :],
            key[:i] + key[i] + key[i:],
            key[:i] + rng.choice("xqz_") + key[i:],
            key[: i - 1] + key[i : i + 1] + key[i - 1 : i] + key[i + 1 :],
            key + "s",
        ]
    )
    own = f"{path.rpartition('.')[0]}.{new}".lstrip(".")
    if new in block or not new or own in ds.KEYS or own in ALIASES or own.startswith("_"):  # a comment is no typo
        return None
    for k in list(block):  # in its place
        block[new if k == key else k] = block.pop(k)
    return own, False


def wrong_type(rng, config):
    path, block, key = rng.choice([(p, b, k) for p, b, k in places(config) if kind(config, p) not in ("any", None)])
    of = kind(config, path)
    block[key] = rng.choice(WRONG[of] if of != "block" else [3, "x", [], 0.5])
    return None if unread(config, path) else (path, False)


def unread(config, path):
    """Is it a key of fp16 where that is off?"""
    return path.startswith("fp16.") and path != "fp16.enabled" and config["fp16"].get("enabled") is False


def missing(rng, config):
    gone = rng.choice(
        [
            "batch",
            "optimizer",
            "optimizer.type",
            "scheduler.type",
            "total_num_steps",
            "cycle_min_lr",
            "cycle_max_lr",
            "step_size",
        ]
    )
    if gone == "batch":
        for name in ("train_batch_size", "train_micro_batch_size_per_gpu"):
            config.pop(name, None)
        return "train_batch_size", True
    if gone == "optimizer":
        config.pop("optimizer")
        config.pop("scheduler", None)
        return "optimizer", True
    block, _, name = gone.partition(".")
    if name:
        return (block, True) if config.get(block, {}).pop(name, None) else None
    return ("scheduler.params", True) if config.get("scheduler", {}).get("params", {}).pop(gone, None) else None


def contradiction(rng, config):
    keys, path = rng.choice(PAIRS)
    if "scheduler" in config and ("optimizer" in keys or "scheduler" in keys):
        config.pop("scheduler")
    if path not in ("train_batch_size", "gradient_clipping"):
        config.pop("data_types", None), config.pop("communication_data_type", None)
    for name in ("fp16", "bf16", "zero_optimization"):
        if name in keys:
            config.pop(name, None)
    config |= deepcopy(keys)
    return path, path == "train_batch_size"


def unresolved(rng, config):
    path, block, key = rng.choice(
        [
            (p, b, k)
            for p, b, k in places(config)
            if kind(config, p) not in ("block", "any", "off") and not p.endswith(".type")
        ]
    )
    block[key] = "auto"
    return None if unread(config, path) else (path, False)


def duplicate(rng, config):
    path, block, key = rng.choice(list(places(config)))
    block[key + "\0twice"] = deepcopy(block[key])
    return path, False


KINDS = {
    "typo": typo,
    "type": wrong_type,
    "missing": missing,
    "duplicate": duplicate,
    "contradiction": contradiction,
    "unresolved auto": unresolved,
}


def broken(seed):
    """(kind, config, path that a message must name, whether it may stand anywhere) of one seed."""
    rng = random.Random(seed)
    while True:
        name, config = rng.choice(list(KINDS)), deepcopy(rng.choice(BASES))
        hit = KINDS[name](rng, config)
        if hit:
            return name, config, *hit


def text_of(config):
    """The file, and the line of every path; of a key that stands twice, the second."""
    lines = json.dumps(config, indent=2).replace("\\u0000twice", "").splitlines()
    out, stack = {}, []
    for number, line in enumerate(lines, 1):
        depth = (len(line) - len(line.lstrip())) // 2 - 1
        if line.lstrip().startswith('"') and ":" in line:
            stack[depth:] = [line.split('"')[1]]
            out[".".join(stack)] = number
    return "\n".join(lines), out


def test_the_bases_are_well(tmp_path):
    for base in BASES:
        assert len(fz.from_deepspeed(base, loss, world=WORLD)) == 2
        (tmp_path / "c.json").write_text(text_of(base)[0])
        assert ds.resolve(tmp_path / "c.json", WORLD).block("zero_optimization") == ds.resolve(base, WORLD).block(
            "zero_optimization"
        )


@pytest.mark.parametrize("part", range(4))
def test_no_broken_config_is_accepted(tmp_path, part):
    file, seen, slowest = tmp_path / "ds_config.json", dict.fromkeys(KINDS, 0), (0.0, "")
    for seed in range(part, COUNT, 4):
        name, config, path, anywhere = broken(seed)
        text, lines = text_of(config)
        file.write_text(text)
        start = time.perf_counter()
        with pytest.raises(ds.ConfigError) as caught:
            fz.from_deepspeed(file if seed % 3 or name == "duplicate" else config, loss, world=WORLD)
        slowest = max(slowest, (time.perf_counter() - start, str(caught.value)))
        said = str(caught.value)
        seen[name] += 1
        assert path in said and any(word in said for word in ("write", "delete", "add")) and "\n" not in said, (
            name,
            config,
            said,
        )
        if (seed % 3 or name == "duplicate") and not anywhere:
            assert said.startswith(f"ds_config.json:{lines.get(path)}: ") or f"(line {lines.get(path)})" in said, (
                name,
                text,
                said,
            )
    assert all(seen.values()) and sum(seen.values()) == COUNT // 4
    print(seen, slowest)


# --- bytes that no editor wrote ---------------------------------------------------------------------------------------
N = 20_000
DEEP = "it does not parse: blocks are nested more than 32 deep; write JSON (comments and trailing commas may stay)"
FILES = {  # text, what is said
    "keys that are escaped": (
        "{" + ",".join(f'"\\u0078{i}": 1' for i in range(N)) + "}",
        "c.json:1: x0: there is no such key in the top level; delete it, or write one of ",
    ),
    "keys that are not": (
        "{" + ",".join(f'"x{i}": 1' for i in range(N)) + "}",
        "c.json:1: x0: there is no such key in the top level; delete it, or write one of ",
    ),
    "the same key": (
        "{" + ",".join('"fp16": {}' for _ in range(N)) + "}",
        "c.json:1: fp16: it stands twice, here and on line 1; delete one of the two",
    ),
    "blocks in blocks": ('{"a":' * N + "1" + "}" * N, f"c.json:1: {DEEP}"),
    "blocks without an end": ('{"a":' * N, f"c.json:1: {DEEP}"),
    "lists in lists": ('{"a":' + "[" * N + "]" * N + "}", f"c.json:1: {DEEP}"),
    "a key without an end": (
        '{"' + "x" * 10**6 + '": 1}',
        "c.json:1: it does not parse: a key of 1000000 characters; write JSON",
    ),
    "a value without an end": (
        '{"a": n' + "," * 10**6,
        "c.json:1: it does not parse: a value without quotes of more than 4096 characters; write JSON",
    ),
    "digits without an end": (
        '{"train_batch_size": ' + "9" * 10**6 + "}",
        "c.json:1: it does not parse: a value without quotes of more than 4096 characters; write JSON",
    ),
    "many digits": ('{"train_batch_size": ' + "9" * 4000 + "}", "c.json:1: train_batch_size: 99999"),
    "an exponent": (
        '{"train_batch_size": 1e999}',
        "c.json:1: it does not parse: a number that is too large; write JSON",
    ),
    "comments without an end": (
        '{"train_batch_size": 8}' + "/* x" * 10**5,
        "c.json: it does not parse: it ends within a comment or a text; close it",
    ),
    "a text without an end": (
        "{a:\n'''" + "x" * 10**6,
        "c.json:2: it does not parse: Bad multiline string; write JSON",
    ),
    "texts on lines": ("{" + "a:'''x'''\n" * N + "}", "c.json:2: a: it stands twice"),
    "texts on a long line": (
        "{" + "".join(f"a{i}:'''x''' " for i in range(N)),
        "c.json:1: it does not parse: a text in three quotes behind more than 256 characters of its line",
    ),
    "more than a megabyte": (
        "{" + " " * (1 << 20) + "}",
        "c.json: it has more than 1048576 bytes, and no config is so long; write the path of a ds_config.json",
    ),
    "what a terminal obeys": (
        '{"train_batch_size": 8, "\\u001b]0;x\\u0007\\u202e\\ud800": 1}',
        "c.json:1: \\x1b]0;x\\x07\\u202e\\ud800: there is no such key",
    ),
    "a value that a terminal obeys": (
        '{"train_batch_size": "\\u001b[31m"}',
        'c.json:1: train_batch_size: "\\u001b[31m" is not a whole number',
    ),
    "what hjson places behind itself": ("{ab:'''x\n''' }", "c.json:1: ab: there is no such key"),
}


@pytest.mark.parametrize("name", FILES)
def test_whatever_the_bytes_it_is_one_short_sentence_at_once(tmp_path, name):
    text, said = FILES[name]
    (tmp_path / "c.json").write_text(text)
    start = time.process_time()
    with pytest.raises(ds.ConfigError) as caught:
        ds.resolve(tmp_path / "c.json", WORLD)
    assert time.process_time() - start < 4
    assert str(caught.value).startswith(said) and str(caught.value).isprintable() and len(str(caught.value)) <= 2000


def test_what_is_no_file_is_told(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00" * 10)
    for config, said in {
        tmp_path / "folder": "there is no such file",
        tmp_path / "binary": "binary: it is not text in UTF-8",
        "a\0b": "a\\x00b: there is no such file",
        "x" * 10**6: "xxx",
        "/dev/zero": "there is no such file",
        7: "config: int is no config; write the path of a ds_config.json, or a dict",
    }.items():
        with pytest.raises(ds.ConfigError, match=r"write the path of a ds_config\.json") as caught:
            ds.resolve(config, WORLD)
        assert said in str(caught.value) and len(str(caught.value)) < 600


def test_a_dict_that_holds_itself_is_told():
    mine = {"train_batch_size": 8}
    mine["amp"] = mine
    with pytest.raises(ds.ConfigError, match="config: its blocks are nested 32 deep, and no config is"):
        ds.resolve(mine, WORLD)


@pytest.mark.slow
def test_time_is_linear_in_bytes(tmp_path):
    """Four times as many keys take about four times as long; by the square they would take sixteen times."""
    took = {}
    for n in (10_000, 40_000):
        (tmp_path / "c.json").write_text("{" + ",".join(f'"\\u0078{i}": 1' for i in range(n)) + "}")
        times = []
        for _ in range(3):
            start = time.process_time()
            with pytest.raises(ds.ConfigError):
                ds.resolve(tmp_path / "c.json", WORLD)
            times.append(time.process_time() - start)
        took[n] = min(times)
    assert took[40_000] < 8 * took[10_000] + 0.1, took

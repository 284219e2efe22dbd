"""ds_config.json that nobody wrote by hand: as files, as base64, as dicts."""

from __future__ import annotations

import base64
import json
from pathlib import Path

from hostile import Case

import funczero as fz
from funczero import deepspeed as ds

N = 20_000
B = '"train_batch_size": 8'
TEXTS = {
    "escaped keys": "{" + ",".join(f'"\\u0078{i}": 1' for i in range(N)) + "}",
    "blocks in blocks": '{"a":' * N + "1" + "}" * N,
    "lists in lists": '{"a":' + "[" * N + "]" * N + "}",
    "braces alone": "{" * 10**6,
    "brackets alone": "[" * 10**6,
    "a key without an end": '{"' + "x" * 10**6 + '": 1}',
    "a long key above many": '{"' + "x" * 500_000 + '": {' + ",".join(f'"{i}":1' for i in range(40_000)) + "}}",
    "long keys in blocks": (
        '{"'
        + '": {"'.join(c * 250 for c in "abcdefghijklmnopqrstuvwxyz")
        + '": {'
        + ",".join(f'"{i}":1' for i in range(90_000))
        + "}" * 27
    ),
    "commas": '{"a": n' + "," * 10**6,
    "words": '{"a": ' + "x " * 500_000,
    "digits": '{"train_batch_size": ' + "9" * 10**6 + "}",
    "4000 digits": '{"train_batch_size": ' + "9" * 4000 + "}",
    "an exponent": '{"train_batch_size": 1e999999999}',
    "not a number": '{"train_batch_size": NaN}',
    "comments": "{" + "/* x */" * 150_000,
    "comments without an end": "{" + "/* x" * 250_000,
    "texts in three quotes": "{" + "".join(f"a{i}:'''x''' " for i in range(N)),
    "three quotes alone": "{a: " + "'''" * 300_000,
    "backslashes": '{"a": "' + "\\\\" * 500_000,
    "surrogates": '{"\\ud800": "\\udfff"}',
    "escape sequences": '{"\\u001b]0;x\\u0007": 1}',
    "NUL": '{"a\\u0000b": 1}',
    "an object of Python's": '{"__class__": "os.system", "__reduce__": ["touch pwned"]}',
    "a function": "{" + B + ', "optimizer": {"type": "__import__(\'os\').system(\'touch pwned\')"}}',
    "a scale_fn": (
        "{"
        + B
        + ', "optimizer": {"type": "Adam"}, "scheduler": {"type": "CyclicLR", "params": {"base_lr": 0.1, "max_lr": 1,'
        ' "cycle_momentum": false, "scale_fn": "os.system"}}}'
    ),
    "an optimizer's path": "{" + B + ', "optimizer": {"type": "../../../x"}}',
    "a scheduler of torch's": "{" + B + ', "optimizer": {"type": "Adam"}, "scheduler": {"type": "__init__"}}',
    "a rate": "{" + B + ', "optimizer": {"type": "Adam", "params": {"lr": 9e18}}}',
    "a batch": '{"train_batch_size": 9223372036854775808}',
    "steps": '{"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 999999999}',
    "milestones": (
        "{"
        + B
        + ', "optimizer": {"type": "Adam"}, "scheduler": {"type": "MultiStepLR", "params": {"milestones": ['
        + "1," * 200_000
        + '"x"]}}}'
    ),
    "a list as a batch": '{"train_batch_size": [' + "1," * 300_000 + "1]}",
    "a profile that writes": "{" + B + ', "flops_profiler": {"enabled": true, "output_file": "../beside/x"}}',
    "more than a megabyte": " " * (1 << 20) + "{}",
}


def loss(params, batch):
    raise NotImplementedError


def attempt(config) -> None:
    """What a training script does."""
    chain, resolved = fz.from_deepspeed(config, loss, world=2)
    fz.train_step(*chain, **resolved.arguments)


def file(text: str | bytes):
    def run(folder: Path) -> None:
        (folder / "c.json").write_bytes(text if isinstance(text, bytes) else text.encode(errors="surrogatepass"))
        attempt(folder / "c.json")

    return run


def itself(_: Path) -> None:
    mine: dict = {"train_batch_size": 8}
    mine["amp"] = mine
    attempt(mine)


OURS = (ds.ConfigError,)
CASES = [
    *(Case(name, file(text), OURS) for name, text in TEXTS.items()),
    Case("no text", file(b"\xff\xfe\x00" * 1000), OURS),
    Case("/dev/zero", lambda _: attempt("/dev/zero"), OURS),
    Case("/etc/passwd", lambda _: attempt("/etc/passwd"), OURS),
    Case("a path with NUL", lambda _: attempt("a\0b"), OURS),
    Case("a path without an end", lambda _: attempt("x" * 10**6), OURS),
    Case(
        "base64 of blocks in blocks", lambda _: attempt(base64.urlsafe_b64encode(('{"a":' * N).encode()).decode()), OURS
    ),
    Case("base64 without an end", lambda _: attempt("A" * (1 << 22)), OURS),
    Case("a dict that holds itself", itself, OURS),
    Case("an int of 5000 digits", lambda _: attempt({"train_batch_size": 10**5000}), OURS),
    Case(
        "a dict of a million keys",
        lambda _: attempt({"train_batch_size": 8} | json.loads("{" + ",".join(f'"{i}":1' for i in range(10**6)) + "}")),
        OURS,
    ),
]

"""A ds_config beside TrainingArguments: what fills "auto", and what may not differ, as Hugging Face's own integration
says.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from funczero.deepspeed.config.key import ConfigError
from funczero.deepspeed.config.reading import read
from funczero.deepspeed.config.resolve import resolve
from funczero.deepspeed.config.resolved import Config

SAME = (  # whether they are written or not
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping",
    "fp16.enabled", "bf16.enabled",
)  # fmt: skip
FILLED = ("scheduler.params.warmup_min_lr",)  # where a value of one's own need not be the arguments'


def from_arguments(args: Any, model: Any, updates: int) -> dict[str, Any]:
    """Values by dotted path for what says "auto".

    Args:
      args: TrainingArguments.
      model: whose config tells its width.
      updates: of the whole training.

    Source: transformers, integrations/deepspeed.py (HfTrainerDeepSpeedConfig).
    """
    micro, steps = args.per_device_train_batch_size, args.gradient_accumulation_steps
    found = {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": steps,
        "train_batch_size": args.world_size * micro * steps,
        "gradient_clipping": args.max_grad_norm,
        "optimizer.params.lr": args.learning_rate,
        "optimizer.params.betas": [args.adam_beta1, args.adam_beta2],
        "optimizer.params.eps": args.adam_epsilon,
        "optimizer.params.weight_decay": args.weight_decay,
        "scheduler.params.warmup_min_lr": 0,
        "scheduler.params.warmup_max_lr": args.learning_rate,
        "scheduler.params.warmup_num_steps": max(1, args.get_warmup_steps(updates)),
        "scheduler.params.total_num_steps": updates,
        "fp16.enabled": bool(args.fp16 or args.fp16_full_eval),
        "bf16.enabled": bool(args.bf16 or args.bf16_full_eval),
    }
    width = _width(getattr(model, "config", None))
    return found if width is None else found | {"hidden_size": width}


def _width(config: Any) -> int | None:
    for c in (config, getattr(config, "text_config", None)):
        if isinstance(one := getattr(c, "hidden_size", None), int):
            return one
        if several := getattr(c, "hidden_sizes", None):
            return int(max(several))
    return None


def config_of(page: Any, args: Any, model: Any, updates: int) -> Config:
    """A ds_config that agrees with TrainingArguments, resolved.

    Raises:
      ConfigError: a key says otherwise than the arguments, all of them named; or what `resolve` refuses.
    """
    given = from_arguments(args, model, updates)
    doc = read(page)
    odd = []
    for path, value in given.items():
        said = _at(doc.raw, path)
        own = isinstance(said, str) and said.lower() == "auto"
        if path not in FILLED and said is not None and not own and said != value:
            odd.append(f"{path}={said!r} where the arguments say {value!r}")
    if odd:
        raise ConfigError(f'{doc.name}: {"; ".join(odd)}; write "auto" there, or change the arguments')
    if _at(doc.raw, "scheduler.type") is not None and _at(doc.raw, "optimizer.type") is None:
        why = "a scheduler without an optimizer would meet the one of TrainingArguments, which has its own"
        raise ConfigError(f"{doc.name}: scheduler: {why}; add an optimizer, or delete the scheduler")
    config = resolve(page, args.world_size, given)
    for path in SAME:
        if config.value(path) != given[path]:
            why = f"it is not written, and means {config.value(path)!r} where the arguments say {given[path]!r}"
            raise ConfigError(f'{doc.name}: {path}: {why}; write "auto" there')
    return config


def _at(page: Any, path: str) -> Any:
    for name in path.split("."):
        page = page.get(name) if isinstance(page, Mapping) else None
    return page

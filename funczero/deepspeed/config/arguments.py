"""`deepspeed.add_config_arguments`: the two flags of a script."""

from __future__ import annotations

from argparse import ArgumentParser


def add_config_arguments(parser: ArgumentParser) -> ArgumentParser:
    """Adds --deepspeed (no effect by itself) and --deepspeed_config; --local_rank stays the script's.

    >>> add_config_arguments(ArgumentParser()).parse_args(["--deepspeed_config", "ds.json"]).deepspeed_config
    'ds.json'
    """
    group = parser.add_argument_group("DeepSpeed")
    group.add_argument("--deepspeed", action="store_true", help="no effect by itself: what initialize is given decides")
    group.add_argument("--deepspeed_config", type=str, default=None, help="a ds_config.json")
    group.add_argument("--deepscale", action="store_true", help="an old name of --deepspeed")
    group.add_argument("--deepscale_config", type=str, default=None, help="an old name of --deepspeed_config")
    return parser

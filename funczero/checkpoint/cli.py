"""`funczero inspect | verify | diff | export | import`."""

from __future__ import annotations

import argparse
from typing import Any

from funczero.checkpoint.error import CheckpointError

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "": 1}


def add(commands: Any) -> None:
    """The subcommands on checkpoints."""

    def command(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        p = commands.add_parser(name, help=text, description=text)
        p.set_defaults(run=lambda args: _told(run, args))
        return p

    one: dict[str, Any] = dict(metavar="CKPT", help="a checkpoint, or a folder of them: then its latest")
    command("inspect", _inspect, "a checkpoint's tree, step and client state, without reading an array").add_argument(
        "path", **one
    )
    command("verify", _verify, "read a checkpoint and say what is damaged").add_argument("path", **one)
    p = command("diff", _diff, "how two checkpoints differ, leaf by leaf")
    p.add_argument("a", **one)
    p.add_argument("b", **one)
    p = command("export", _export, "the parameters as safetensors")
    p.add_argument("path", **one)
    p.add_argument("out", metavar="OUT.safetensors")
    p.add_argument("--dtype", help="of floating values, as bfloat16; default: as they are")
    p.add_argument("--shard-size", "--shard_size", type=size, help="largest file, as 5GB; default: one file")
    p.add_argument("--overwrite", action="store_true", help="replace files that are there")
    p = command("import", _import, "a checkpoint of parameters from safetensors or a tree of stock orbax")
    p.add_argument(
        "source", metavar="SOURCE", help="a .safetensors file, its index, a folder of them, or an orbax tree"
    )
    p.add_argument("directory", metavar="DIRECTORY", help="the folder of checkpoints")
    p.add_argument("--name", default="0", help="of the new checkpoint")
    p.add_argument(
        "--zeros",
        action="store_true",
        help="chunks that an orbax tree lacks are zeros, as older versions of orbax left them out",
    )


def size(text: str) -> int:
    """Bytes from 5GB, 500MB, 1GiB or a number.

    >>> size("5GB"), size("1KiB"), size("12")
    (5000000000, 1024, 12)
    """
    number = text.rstrip("KMGiBkmgb")
    unit = text[len(number) :].strip().upper()
    try:
        out = int(float(number) * UNITS[unit])
    except (ValueError, KeyError):
        out = 0
    if out < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write 5GB, 500MB or a number of bytes")
    return out


def _told(run: Any, args: argparse.Namespace) -> int:
    try:
        return run(args)
    except BrokenPipeError:
        raise
    except (CheckpointError, OSError) as e:
        from funczero.checkpoint.tools import plain

        raise ValueError(plain(str(e))) from None


def _inspect(args: argparse.Namespace) -> int:
    from funczero.checkpoint.tools import inspect

    print(inspect(args.path))
    return 0


def _verify(args: argparse.Namespace) -> int:
    from funczero.checkpoint.tools import find, verify

    problems = verify(args.path)
    print("\n".join(problems) if problems else f"{find(args.path)}: every leaf and file is as it was saved")
    return 1 if problems else 0


def _diff(args: argparse.Namespace) -> int:
    from funczero.checkpoint.tools import diff

    lines = diff(args.a, args.b)
    print("\n".join(lines) if lines else "every leaf has the same bits")
    return 1 if lines else 0


def _export(args: argparse.Namespace) -> int:
    from funczero.checkpoint.export import export

    for file in export(args.path, args.out, args.dtype, args.shard_size, args.overwrite):
        print(f"{file}: {file.stat().st_size:,} bytes")
    return 0


def _import(args: argparse.Namespace) -> int:
    from funczero.checkpoint.export import import_weights

    print(f"{args.directory}/{import_weights(args.source, args.directory, args.name, args.zeros)}")
    return 0

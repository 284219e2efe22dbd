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
    p = command("export", _export, "the parameters as safetensors, for Hugging Face, for torch, as a DCP folder")
    p.add_argument("path", **one)
    p.add_argument("out", metavar="OUT", help="a file that ends in .safetensors, .pt, .pth or .bin; or a folder")
    p.add_argument("--format", choices=("safetensors", "huggingface", "dcp", "torch"), help="default: by OUT's end")
    p.add_argument("--config", metavar="FOLDER", help="of --format=huggingface: the model it began as, or config.json")
    p.add_argument("--dtype", help="of floating parameters, as bfloat16; default: as they are")
    p.add_argument("--exclude", metavar="REGEX", help="parameters that are left out, by key")
    p.add_argument("--tied", choices=("all", "first"), help="which names of a tied parameter have its values")
    p.add_argument("--moments", action="store_true", help="of dcp and torch: the optimizer's state by leaf, too")
    p.add_argument("--prefix", metavar="KEY", help="of dcp and torch: the key that the parameters lie under")
    p.add_argument("--shard-size", "--shard_size", type=size, help="largest file, as 5GB; default: one file")
    p.add_argument("--overwrite", action="store_true", help="replace files that are there")
    p = command("import", _import, "a checkpoint of what somebody else saved; nothing that is read is run")
    p.add_argument(
        "source",
        metavar="SOURCE",
        help=(
            "safetensors (a file, an index, a folder), a file of torch.save, a DCP folder, a folder of DeepSpeed's at"
            " ZeRO stages 1 to 3, or an orbax tree"
        ),
    )
    p.add_argument("directory", metavar="DIRECTORY", help="the folder of checkpoints")
    p.add_argument("--name", default="0", help="of the new checkpoint")
    p.add_argument("--dtype", help="of floating parameters, as float32; default: as they are")
    p.add_argument("--exclude", metavar="REGEX", help="leaves that are left out, by name")
    p.add_argument("--buffers", metavar="REGEX", help="leaves that are the model's own state, and no parameters")
    p.add_argument("--without-moments", "--without_moments", action="store_true", help="the parameters alone")
    p.add_argument("--optimizer", metavar="NAME", help="the transform that moments are for; default: by what there is")
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

    plain = args.path, args.out, args.dtype, args.shard_size, args.overwrite
    more = {k: getattr(args, k) for k in ("format", "config", "exclude", "tied", "moments", "prefix")}
    for file in export(*plain, **more):
        print(f"{file}: {file.stat().st_size:,} bytes" if file.is_file() else str(file))
    return 0


def _import(args: argparse.Namespace) -> int:
    from funczero.checkpoint.importing import import_weights

    more = {k: getattr(args, k) for k in ("dtype", "exclude", "buffers", "optimizer")}
    more["moments"] = not args.without_moments
    print(f"{args.directory}/{import_weights(args.source, args.directory, args.name, args.zeros, **more)}")
    return 0

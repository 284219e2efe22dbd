"""DeepSpeed's ZeRO checkpoints, stages 1 to 3, of any number of ranks: float32 masters, moments, frozen parameters and
buffers leaf by leaf, each put together from the ranks' flat partitions when it is read.

Facts: at stages 1 and 2 the ranks' partitions of a group, one after the other, are the group's parameters in the order
of `param_shapes`; padding is at its end. At stage 3 each parameter is cut into equal parts by itself, the last one
padded, and a rank's parts lie in the order of all groups, over flat tensors whose borders mean nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from math import ceil, prod
from pathlib import Path
from typing import Any, NamedTuple

import torch

from funczero.checkpoint import manifest
from funczero.checkpoint.error import CheckpointError
from funczero.checkpoint.formats.leaf import Found, Leaf, sizes
from funczero.checkpoint.formats.naming import Taken, moments, named
from funczero.checkpoint.formats.pickles import TORCH, Thing, things
from funczero.checkpoint.formats.torch_file import read as read_file
from funczero.checkpoint.names import escape

OPTIM = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt$")
MODEL = re.compile(r"zero_pp_rank_(\d+)_mp_rank_(\d+)_model_states\.pt$")
KNOWN = TORCH | things(
    "deepspeed.runtime.fp16.loss_scaler LossScaler",
    "deepspeed.runtime.fp16.loss_scaler DynamicLossScaler",
    "deepspeed.runtime.zero.config ZeroStageEnum",
    "deepspeed.utils.tensor_fragment fragment_address",
)
# of a model file, what is the engine's and not the client's
OWN = frozenset((
    "module", "buffer_names", "optimizer", "param_shapes", "frozen_param_shapes", "frozen_param_fragments",
    "shared_params", "lr_scheduler", "data_sampler", "random_ltd", "skipped_steps", "global_steps", "global_samples",
    "dp_world_size", "mp_world_size", "checkpoint_parallel_dimensions", "ds_config", "ds_version",
))  # fmt: skip


class Span(NamedTuple):
    """Neighbouring values of a flat leaf."""

    leaf: Leaf
    start: int
    stop: int


class Files(NamedTuple):
    """What the ranks wrote, in their order."""

    folder: Path
    stage: int
    models: list[dict[str, Any]]
    optims: list[dict[str, Any]]


def tag_of(source: Path) -> Path | None:
    """The folder of one save: this one, or what `latest` names in it; None where there is none of DeepSpeed's."""
    for folder in (source, source / _latest(source)) if source.is_dir() else ():
        if any(p.name.endswith("_model_states.pt") for p in folder.glob("*_model_states.pt")):
            return folder
    return None


def _latest(source: Path) -> str:
    try:
        name = manifest.content(source / "latest", 4096).decode().strip()
    except (OSError, UnicodeDecodeError):
        return "."
    return name if name and name == Path(name).name and name != ".." else "."


def read(folder: Path, want: Taken) -> Found:
    """The leaves of a save.

    Raises:
      CheckpointError: a rank's file is missing or malformed, or it is of a kind that is not read; by name.
    """
    files = _files(folder)
    first, where = files.models[0], str(folder)
    try:
        leaves: dict[str, Leaf] = {}
        buffers = list(map(str, first["buffer_names"]))
        own = want._replace(buffers="|".join(f"^{re.escape(b)}$" for b in buffers) or None)
        for key in buffers:
            if isinstance(x := first["module"].get(key), Leaf):
                leaves[named(key, x, own)] = x
        leaves |= {f"params/{escape(k)}": x for k, x in _frozen(files)}
        plain = want._replace(buffers=None)
        masters = dict(_flat(files, None))
        leaves |= {named(key, x, plain): x for key, x in masters.items()}
        notes: list[str] = []
        kept: dict[tuple[str, str], Any] = {}
        if want.moments:
            fields = sorted({f for optim in files.optims for state in _states(optim, files.stage) for f in state})
            for field in fields:
                kept |= {(k, field): x for k, x in _flat(files, field)}
        more, count = moments(kept, leaves, plain, where)
        ties = {f"params/{escape(b)}": f"params/{escape(a)}" for b, a in (first.get("shared_params") or {}).items()}
        ties = {b: ties.get(a, a) for b, a in ties.items() if b not in leaves}
        known = {k for k in (*buffers, *masters)} | {n for n in first.get("frozen_param_shapes") or {}}
        lost = [k for k in first["module"] if k not in known and f"params/{escape(k)}" not in ties]
        if files.stage < 3:  # frozen ones, of which stage 1 has no list
            leaves |= {named(k, first["module"][k], plain): first["module"][k] for k in lost}
            lost = []
        notes += [f"{', '.join(lost[:5])}: other names of parameters, of which the files do not say of which"] * bool(
            lost
        )
        scale = getattr(files.optims[0].get("loss_scaler"), "fields", {}).get("cur_scale", 1)
        notes += [f"its loss scale, {scale}, is not taken; begin with scale_loss(init={scale})"] * (scale != 1)
        steps, skipped = int(first["global_steps"]), int(first["skipped_steps"])
    except CheckpointError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError, RecursionError) as e:
        raise CheckpointError(
            f"import: {where!r} has not the form of DeepSpeed's checkpoints ({type(e).__name__}: {str(e)[:200]})"
        ) from None
    odd = next((b for b, a in ties.items() if a not in leaves), None)
    if odd is not None:
        raise CheckpointError(f"import: {odd!r} in {where!r} is tied to {ties[odd][:100]!r}, which is not there")
    client = {k: v for k, v in first.items() if k not in OWN and _is_plain(v)}
    notes += [f"client state left out: {k}" for k, v in first.items() if k not in OWN and not _is_plain(v)]
    return Found({**leaves, **more}, ties, steps, count or max(0, steps - skipped), client or None, tuple(notes))


def _is_plain(x: Any) -> bool:
    if isinstance(x, dict):
        return all(isinstance(k, (str, int)) and _is_plain(v) for k, v in x.items())
    if isinstance(x, (list, tuple)) and not isinstance(x, Leaf):
        return all(map(_is_plain, x))
    return x is None or type(x) in (str, int, float, bool)


def _files(folder: Path) -> Files:
    """Every rank's file, the number of ranks checked."""
    names = [p.name for p in folder.iterdir()]
    for odd, what in (("expp_rank", "experts of DeepSpeed's MoE"), ("layer_", "a pipeline's or experts' layers"),
                      ("offloaded_tensors", "tensors offloaded to NVMe")):  # fmt: skip
        if bad := next((n for n in sorted(names) if n.startswith(odd)), None):
            raise CheckpointError(f"import: {str(folder / bad)!r} holds {what}, which are not read")
    optims = {tuple(map(int, m.groups())): n for n in names if (m := OPTIM.search(n))}
    if not optims:
        raise CheckpointError(
            f"import: {str(folder)!r} has no *_optim_states.pt, so it is of ZeRO stage 0, of which only the model's own"
            " file is read; give that file, as .../mp_rank_00_model_states.pt"
        )
    if any(mp for _, mp in optims) or (folder / "mp_rank_01_model_states.pt").exists():
        raise CheckpointError(f"import: {str(folder)!r} is of a model cut over model-parallel ranks, which is not read")
    each = [_dict(folder / optims[at]) for at in sorted(optims)]
    states = [_inside(x, "optimizer_state_dict", folder) for x in each]
    stage, count = states[0].get("zero_stage"), states[0].get("partition_count")
    stage = stage.args[0] if isinstance(stage, Thing) and stage.args else stage
    counts = count if isinstance(count, list) else [count]
    if stage not in (1, 2, 3) or not counts or any(n != len(states) for n in counts):
        raise CheckpointError(
            f"import: {str(folder)!r} has the optimizer states of {len(states)} ranks, but was written at stage"
            f" {str(stage)[:20]} by {str(count)[:40]}; every rank's file is needed"
        )
    if [r for r, _ in sorted(optims)] != list(range(len(states))):
        raise CheckpointError(
            f"import: {str(folder)!r} lacks the optimizer states of a rank; it holds {sorted(optims)}"
        )
    models = (
        {int(m[1]): n for n in names if (m := MODEL.search(n))} if stage == 3 else {0: "mp_rank_00_model_states.pt"}
    )
    lost = next((r for r in range(len(states) if stage == 3 else 1) if r not in models), None)
    if lost is not None:
        raise CheckpointError(f"import: {str(folder)!r} lacks the model states of rank {lost}")
    found = [_dict(folder / models[r]) for r in sorted(models)][: len(states)]
    return Files(folder, int(stage), found, states)


def _dict(path: Path) -> dict[str, Any]:
    found = read_file(path, KNOWN)
    if not isinstance(found, dict):
        raise CheckpointError(f"import: {str(path)!r} holds no dict, as DeepSpeed's files do")
    return found


def _inside(x: dict[str, Any], key: str, folder: Path) -> dict[str, Any]:
    if not isinstance(x.get(key), dict):
        raise CheckpointError(f"import: a file of optimizer states in {str(folder)!r} has no {key!r}")
    return x[key]


def _states(optim: dict[str, Any], stage: int) -> list[dict[str, Any]]:
    """A rank's optimizer state by flat tensor, as one of a list of groups or as torch numbers them."""
    state = optim["optimizer_state_dict" if stage == 3 else "base_optimizer_state"]
    if isinstance(state, list):
        return state
    return [state["state"][i] for i in sorted(state["state"])]


def _flats(files: Files, rank: int, field: str | None) -> list[Any]:
    """A rank's flat tensors of masters, or of a field of the optimizer's state."""
    optim = files.optims[rank]
    if field is None:
        found = optim["fp32_flat_groups" if files.stage == 3 else "single_partition_of_fp32_groups"]
    else:
        found = [state[field] for state in _states(optim, files.stage)]
    return list(found)


def _flat(files: Files, field: str | None) -> Iterator[tuple[str, Any]]:
    """(key, leaf) of every trainable parameter; a field that is one number for a flat tensor is that number."""
    groups = [
        {str(k): sizes(v, str(k), str(files.folder)) for k, v in g.items()} for g in files.models[0]["param_shapes"]
    ]
    ranks = [_flats(files, r, field) for r in range(len(files.optims))]
    if all(not isinstance(x, Leaf) or x.shape == () for flats in ranks for x in flats):
        values = {int(x.read().item()) if isinstance(x, Leaf) else int(x) for flats in ranks for x in flats}
        if len(values) > 1:
            raise ValueError(f"{field!r} differs between groups or ranks")
        yield from ((key, n) for group in groups for key in group for n in values)
        return
    if any(not isinstance(x, Leaf) or len(x.shape) != 1 for flats in ranks for x in flats):
        raise ValueError(f"{field or 'masters'!r} are no flat tensors")
    file = str(files.folder)
    if files.stage == 3:
        at, size = 0, len(ranks)
        for key, shape in ((k, s) for group in groups for k, s in group.items()):
            n = ceil(prod(shape) / size)
            yield key, _joined([s for flats in ranks for s in _cut(flats, at, at + n, file, key)], shape, file)
            at += n
        return
    paddings = files.optims[0].get("param_alignment_paddings")
    for g, group in enumerate(groups):
        at, line = 0, [flats[g] for flats in ranks]
        for i, (key, shape) in enumerate(group.items()):
            yield key, _joined(_cut(line, at, at + prod(shape), file, key), shape, file)
            at += prod(shape) + (int(paddings[g][i]) if paddings else 0)


def _cut(line: list[Leaf], start: int, stop: int, file: str, key: str) -> list[Span]:
    """Values start to stop of flat tensors one after the other."""
    out, at = [], 0
    for x in line:
        a, b = max(start, at), min(stop, at + x.shape[0])
        if a < b:
            out.append(Span(x, a - at, b - at))
        at += x.shape[0]
    if at < stop:
        raise CheckpointError(f"import: the partitions in {file!r} end before {key[:200]!r}; a rank's file was cut")
    return out


def _joined(spans: list[Span], shape: tuple[int, ...], file: str) -> Leaf:
    """A leaf whose values lie in spans, one after the other; what is left of the last ones is padding."""
    dtype = spans[0].leaf.dtype if spans else torch.float32
    one = prod(shape[1:])

    def rows(a: int, b: int) -> torch.Tensor:
        low, high, at, found = a * one, b * one, 0, []
        for span in spans:
            n = span.stop - span.start
            x, y = max(low, at), min(high, at + n)
            if x < y:
                found.append(span.leaf.rows(span.start + x - at, span.start + y - at))
            at += n
        joined = torch.cat(found) if found else torch.empty(0, dtype=dtype)
        return joined.view((b - a, *shape[1:]) if shape else ())

    return Leaf(dtype, shape, rows, file)


def _frozen(files: Files) -> Iterator[tuple[str, Leaf]]:
    """(key, leaf) of parameters that were frozen: whole at stages 1 and 2, a part a rank at stage 3."""
    first, file = files.models[0], str(files.folder)
    for key, shape in (first.get("frozen_param_shapes") or {}).items():
        shape = sizes(shape, str(key), file)
        parts = [m["frozen_param_fragments"][key] for m in files.models]
        if files.stage < 3:
            if parts[0].shape != shape:
                raise ValueError(f"the frozen {str(key)[:200]!r} has another shape than it says")
            yield str(key), parts[0]
            continue
        n = ceil(prod(shape) / len(parts))
        yield str(key), _joined([s for x in parts for s in _cut([x], 0, min(n, x.shape[0]), file, key)], shape, file)

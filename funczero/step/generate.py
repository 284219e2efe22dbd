"""`generate`: text from the parameters of a state, at any stage, while a run goes on."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from funczero.comm.integers import sum_integers
from funczero.core import rng, tree
from funczero.core.number import kind
from funczero.core.number import whole as whole_number
from funczero.core.types import Grad, TrainState
from funczero.gradients.draws import KINDS, foreseen
from funczero.gradients.stateless import stateless
from funczero.gradients.tape import Tape
from funczero.layout.slots import Slots
from funczero.step.calls import recorded
from funczero.step.fits import at
from funczero.step.notices import say
from funczero.step.sampling import Draws, continued, sampling
from funczero.step.step import Step

WHOLE = 1 << 30  # bytes of parameters that are gathered once

Loop = Callable[[Any, Any], Any]  # (a model with its parameters, (prompts, keys of their rows, device)) -> the texts


def generate(
    step: Step,
    state: TrainState,
    model: nn.Module | Callable[..., Any],
    prompts: Any,
    key: int | Tensor | None = None,
    whole: int = WHOLE,
    **options: Any,
) -> Any:
    """What a model says after the prompts, with the parameters of a state; the state and the model stay as they are.

    A module that has a `generate` (transformers) runs its own loop, with its own options, cache and criteria. Any
    other module is called as model(tokens), and a function as model(params, tokens), by a plain loop that computes the
    whole text again for every token. Modules run as in evaluation.

    Law: the same tokens at every stage, and on any number of ranks as far as the model's logits of a row do not depend
    on the rows beside it. Draws belong to rows, and never to ranks.

    A collective: each rank gives its own prompts, of other lengths and in other number than the others, or none, and
    all return when the last one has its text. Parameters that rest in shards are gathered once where they are small,
    and else unit by unit in every forward, two at a time; which one is said. By units the ranks agree on every unit
    before it is gathered, so that one that has ended goes on to lend its part.

    Args:
      model: the module that fz.stateless was given, or a pure function with the parameters first.
      prompts: this rank's. For a `generate` of the model's own: input_ids, int64 [rows, time], or a mapping of its
        arguments. For the plain loop: int64 [rows, time], or a list of int64 [time] of any lengths. None, or no rows:
        none.
      key: of the draws. An int: rows are numbered through all ranks in their order, so that a list of prompts that is
        cut into neighbouring parts has the same text on any number of ranks. Or int64 [rows], one a prompt
        (fz.rng.row_keys). None: nothing may be drawn.
      whole: parameters of up to so many bytes, in the compute dtype, are gathered once; 0: none are.
      options: of the model's own generate; for the plain loop those of `sampling`, in transformers' names.

    Returns:
      what the model's generate returns; from the plain loop a list of int64 [time], each prompt with what follows it. A
      rank without prompts gets None, or an empty list.

    Raises:
      TypeError, ValueError: model, prompts, key or an option are none of these.
      RuntimeError: the model draws what no row's key accounts for, or writes into its parameters.

    >>> import torch, funczero as fz
    >>> logits = lambda params, tokens: params["table"][tokens]  # of the next token
    >>> step = fz.train_step(fz.value_and_grad(lambda p, b: (p["table"].sum(), torch.tensor(1.0))), fz.sgd(0.1))
    >>> state = step.init({"table": torch.eye(4).roll(1, 1)})
    >>> [x.tolist() for x in fz.generate(step, state, logits, torch.tensor([[0], [2]]), max_new_tokens=3)]
    [[0, 1, 2, 3], [2, 3, 0, 1]]
    """
    whole_number("generate", "whole", whole, low=0)
    loop = _theirs(options) if _own(model) else _plain(options)
    rows = _rows(model, prompts)
    _check_key(key, rows)

    def texts(state: TrainState) -> Any:
        g = step.running()
        step.fits.look(state)
        run, (views, words) = _bound(step, state, model, loop), _views(step, state, g, whole)
        if g.env.mesh.rank(tuple(g.env.mesh.axes))[0] == 0:
            say(step.fits.book.said, words)
        keys = _keys(key, rows, g)
        tape = Tape(views, (), g.env, False, False, at(state), conditional=True)
        with torch.inference_mode(False), torch.no_grad():
            rest = tape.open_rest()
            params = tape.whole.structure.unflatten(rest)
            out = run(params, (prompts, keys, tape.device)) if rows else None if _own(model) else []
            tape.left_alone(tape.tensors(rest), None)
            tape.end()
        return out

    return recorded("generate", texts, step.running)(state)


def _views(step: Step, state: TrainState, g: Grad, most: int) -> tuple[Slots, str]:
    """The parameters for a forward, whole or at rest, and what is said of them."""
    views = step.views(state)
    structure = views.where.structure
    size = sum(prod(leaf.shape) for leaf in structure.leaves) * views.buffers[0].itemsize
    if all(g.env.mesh.axes[a].size == 1 for a in views.where.axes):
        return views, ""
    blocks = {u.name for u in structure.units if u.seam}
    if size <= most or not blocks:
        why = f"up to whole={most} bytes" if size <= most else f"more than whole={most}, but the step has no units"
        return step.whole_views(state), f"generate: {size} bytes of parameters are gathered once ({why})"
    words = f"generate: {size} bytes of parameters are gathered by units, {len(blocks)} in every forward, two at a time"
    return views, f"{words} (more than whole={most} bytes)"


def _keys(key: int | Tensor | None, rows: int, g: Grad) -> Tensor | None:
    """A key a prompt, on the mesh's device. A collective where rows are numbered through all ranks."""
    mesh, axes = g.env.mesh, g.layout.batch
    if key is None or isinstance(key, Tensor):
        return None if key is None else key.to(mesh.device)
    index, size = mesh.rank(axes)
    counts = torch.zeros(size, dtype=torch.int64, device=mesh.device)
    counts[index] = rows
    before = int(sum_integers(counts, axes, mesh)[:index].sum())
    return rng.row_keys(key, rows, before).to(mesh.device)


def _check_key(key: Any, rows: int) -> None:
    if key is None or isinstance(key, int) and not isinstance(key, bool):
        return
    if not isinstance(key, Tensor):
        raise TypeError(f"generate: key is {kind(key)}; write an int, or int64 [rows] as of fz.rng.row_keys")
    if key.dtype != torch.int64 or key.shape != (rows,):
        why = f"key is {key.dtype} of shape {tuple(key.shape)}, but there are {rows} prompts"
        raise ValueError(f"generate: {why}; give int64 [{rows}], as of fz.rng.row_keys, or an int")


# --- the model --------------------------------------------------------------------------------------------------------
def _own(model: Any) -> bool:
    """Has the model a loop of its own?"""
    return isinstance(model, nn.Module) and callable(getattr(model, "generate", None))


def _bound(step: Step, state: TrainState, model: Any, loop: Loop) -> Callable[[Any, Any], Any]:
    """The loop as a function of (parameters, what it is given).

    Raises:
      TypeError, ValueError: the model is neither module nor function, or not the state's.
    """
    if not isinstance(model, nn.Module):
        if not callable(model):
            raise TypeError(f"generate: the model is {kind(model)}; give a module, or a function (params, tokens)")
        return lambda params, given: loop(partial(model, params), given)
    form = state.params.where.structure
    have = {path for path, _ in tree.paths(form.unflatten(range(len(form.leaves))))}
    odd = sorted(have ^ {n for n, _ in model.named_parameters(remove_duplicate=False)})
    if odd:
        whose = "module" if odd[0] in have else "state"
        raise ValueError(f"generate: the {whose} has no parameter {odd[0]!r}; give the module of fz.stateless's params")
    reading: Any = stateless(model, loop, units=step.source.units)[0]
    run: Callable[[Any, Any], Any] = reading.reading(state.model_state or {})
    return run


def _theirs(options: dict[str, Any]) -> Loop:
    """The model's own generate."""
    if options.get("synced_gpus") is not None:
        why = "ranks end together without it, and one without prompts would never answer it"
        raise ValueError(f"generate: synced_gpus={options['synced_gpus']!r} is not taken: {why}; leave it out")

    def loop(model: Any, given: Any) -> Any:
        prompts, keys, device = given
        named = prompts if isinstance(prompts, Mapping) else {"inputs": prompts}
        named = {n: x.to(device) if isinstance(x, Tensor) else x for n, x in named.items()}
        synced = {"synced_gpus": False} if hasattr(model, "generation_config") else {}
        model.eval()
        with foreseen(device, partial(_drew, keys is not None), KINDS), nullcontext() if keys is None else Draws(keys):
            return model.generate(**named, **synced, **options)

    return loop


def _plain(options: dict[str, Any]) -> Loop:
    """The plain loop of a module, or of a function with its parameters."""
    known = inspect.signature(sampling).parameters
    odd = next((n for n in options if n not in known), None)
    if odd is not None or "max_new_tokens" not in options:
        why = f"knows no option {odd!r}" if odd is not None else "needs max_new_tokens"
        raise TypeError(f"generate: the plain loop {why}; its options are {list(known)}")
    how = sampling(**options)

    def loop(model: Any, given: Any) -> Any:
        prompts, keys, device = given
        if isinstance(model, nn.Module):
            model.eval()
        with foreseen(device, partial(_drew, True), KINDS):
            return continued(model, [x.to(device) for x in prompts], how, keys)

    return loop


def _drew(has_key: bool, kind: str) -> RuntimeError:
    if not has_key:
        return RuntimeError(
            f"generate: the model draws from {kind}'s global generator, but no key says what; write key=0"
        )
    why = f"draws from {kind}'s global generator, and no row's key accounts for that"
    return RuntimeError(f"generate: the model {why}; of draws torch.multinomial of one token a row is taken alone")


def _rows(model: Any, prompts: Any) -> int:
    """How many prompts this rank has.

    Raises:
      TypeError, ValueError: they are no prompts of this model.
    """
    if prompts is None:
        return 0
    x = prompts
    if _own(model) and isinstance(prompts, Mapping):
        names = [n for n in ("input_ids", "inputs", getattr(model, "main_input_name", "")) if n in prompts]
        x = prompts[names[0]] if names else None
    if (
        isinstance(x, Tensor)
        and x.dim() > 1
        and (_own(model) or x.dtype == torch.int64 and x.dim() == 2 and x.shape[1])
    ):
        return len(x)
    if _own(model):
        raise TypeError(f"generate: prompts are {kind(x)}; give input_ids, int64 [rows, time], or a mapping with them")
    each = list(x) if isinstance(x, (list, tuple)) else [None]
    odd = next((i for i, p in enumerate(each) if not _tokens(p)), None)
    if odd is not None:
        what = f"prompt {odd} is {kind(each[odd])}" if isinstance(x, (list, tuple)) else f"prompts are {kind(x)}"
        raise TypeError(f"generate: {what}; give int64 [rows, time], or a list of int64 [time] with a token each")
    return len(each)


def _tokens(x: Any) -> bool:
    return isinstance(x, Tensor) and x.dtype == torch.int64 and x.dim() == 1 and len(x) > 0

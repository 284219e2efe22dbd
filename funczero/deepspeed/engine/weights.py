"""An engine's whole weights: the module's state_dict, out as a file or a dict, and in again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from funczero.deepspeed.engine import ranks
from funczero.deepspeed.engine.facts import Facts
from funczero.deepspeed.engine.held import filled_in
from funczero.deepspeed.engine.leaf import read_leaf
from funczero.deepspeed.engine.standing import Found
from funczero.deepspeed.engine.values import module_state
from funczero.deepspeed.engine.zero_init import close

GATHER = "zero_optimization.stage3_gather_16bit_weights_on_model_save"


class Weights(Facts):
    """save_16bit_model, module_state_dict and load_module_state_dict."""

    def save_16bit_model(
        self, save_dir: str | Path, save_filename: str = "pytorch_model.bin", exclude_frozen_parameters: bool = False
    ) -> bool:
        """The module's state_dict in the compute dtype as one file, by rank 0; all ranks call it.

        Args:
          save_filename: .safetensors, or anything else for torch.save.

        Raises:
          ValueError: at stage 3 without stage3_gather_16bit_weights_on_model_save, because the model is whole on every
            rank for a moment.
        """
        if self.zero_optimization_stage() == 3 and not self.config_.value(GATHER):
            raise ValueError(
                "save_16bit_model: at stage 3 it gathers the whole model on every rank; "
                f"allow that with {GATHER}: true, or write engine.save_checkpoint and `funczero export`"
            )
        whole = self.module_state_dict(exclude_frozen_parameters=exclude_frozen_parameters)
        if self.global_rank == 0:
            Path(save_dir).mkdir(parents=True, exist_ok=True)
            out = Path(save_dir, save_filename)
            values = {n: x.contiguous().cpu() for n, x in whole.items()}
            part = out.with_name(out.name + ".part")
            if out.suffix == ".safetensors":
                safetensors.torch.save_file({n: x.clone() for n, x in values.items()}, part, {"format": "pt"})
            else:
                torch.save(values, part)
            part.rename(out)
        ranks.gather_texts("")  # nobody goes on before the file is there
        return True

    save_fp16_model = save_16bit_model

    def zero_gather_16bit_weights_on_model_save(self) -> bool:
        """May the whole model be gathered at stage 3?"""
        return self.config_.value(GATHER)

    def _zero3_consolidated_16bit_state_dict(self, exclude_frozen_parameters: bool = False) -> dict[str, Tensor]:
        """The module's state_dict on rank 0's CPU and an empty dict elsewhere; a collective.

        The underscore is DeepSpeed's: Hugging Face calls this very name. DeepSpeed gives None elsewhere, in whose place
        save_pretrained asks the module, and that would be a collective of some ranks.

        Raises:
          ValueError: the config does not allow it.
        """
        if not self.config_.value(GATHER):
            raise ValueError(
                "Cannot get 16bit model weights: at stage 3 they are gathered whole on every rank; "
                f"allow that with {GATHER}: true"
            )
        whole = self.module_state_dict(exclude_frozen_parameters=exclude_frozen_parameters)
        return {n: x.cpu() for n, x in whole.items()} if self.global_rank == 0 else {}

    def module_state_dict(
        self,
        destination: Any = None,
        prefix: str = "",
        keep_vars: bool = False,
        exclude_frozen_parameters: bool = False,
    ) -> dict[str, Tensor]:
        """The module's state_dict, whole, in the compute dtype. A collective."""
        self.check_whole("engine.module_state_dict")
        out = {} if destination is None else destination
        whole = module_state(self.train_step, self._state, self.module)
        frozen = self.frozen_names() if exclude_frozen_parameters else []
        out.update({prefix + n: x for n, x in whole.items() if n not in frozen})
        return out

    def frozen_names(self) -> list[str]:
        """Of the parameters that need no gradient and that no group of the optimizer has."""
        groups = [] if self.optimizer is None else self.optimizer.param_groups
        trained = {id(p) for g in groups for p in g["params"]}
        return [n for n, p in self._holder.named.items() if not p.requires_grad and id(p) not in trained]

    def load_module_state_dict(
        self, state_dict: dict[str, Tensor], strict: bool = True, custom_load_fn: Any = None
    ) -> None:
        """Writes whole parameters into the masters, and buffers.

        Raises:
          KeyError: names differ, unless strict is False.
        """
        self.check_whole("engine.load_module_state_dict")
        named, buffers = self._holder.named, dict(self.module.named_buffers())
        odd = sorted((named.keys() | {n for n in buffers if n in state_dict}) ^ state_dict.keys())
        if strict and odd:
            raise KeyError(
                f"load_module_state_dict: {odd[0]!r} is only in "
                f"{'the state_dict' if odd[0] in state_dict else 'the module'}; "
                "write strict=False to pass over such names"
            )
        other = next((n for n, x in buffers.items() if n in state_dict and state_dict[n].shape != x.shape), None)
        if other is not None:
            raise ValueError(
                f"load_module_state_dict: buffer {other!r} has shape {tuple(buffers[other].shape)}, but the value has "
                f"{tuple(state_dict[other].shape)}; give one of the same shape"
            )
        self.write_parameters({n: state_dict[n] for n in named.keys() & state_dict.keys()})
        for n in buffers.keys() & state_dict.keys():
            buffers[n].copy_(state_dict[n])

    def masters(self) -> Iterator[tuple[str, Tensor]]:
        """Every master, whole, under its first name, one after another. A collective each."""
        structure = self._state.params.where.structure
        for leaf in structure.leaves:
            read = partial(read_leaf, self._state.params, leaf.path, self.live_mesh)
            value = self.together(f"engine.masters, {leaf.path!r}", read)
            assert value is not None
            yield leaf.path, value

    def names_of(self, values: Mapping[str, Found]) -> dict[str, Found]:
        """Values of leaves by their first name, under every name that the module has for them."""
        structure = self._state.params.where.structure
        numbers: dict[str, int] = structure.unflatten(range(len(structure.leaves)))
        return {n: values[structure.leaves[i].path] for n, i in numbers.items()}

    def give_back(self, cut: bool) -> None:
        """The module is its user's again, with the masters as ordinary parameters, and this engine is done with.

        A collective, leaf after leaf.

        Args:
          cut: parameters hold this rank's rows alone, as after zero.Init, until another engine takes them.
        """
        self.destroy()
        for name, value in self.masters():
            p: Any = self._holder.named[name]
            filled_in(p, value)
            del p.home
            p.__dict__.pop("part", None)
            if cut:
                close(p, name, value)

"""The engine's checkpoints: those of fz.Checkpointer, which any world and stage loads, with what a loop keeps beside its state."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from absl import logging
from torch import Tensor

from funczero.checkpoint import Checkpointer, CheckpointError
from funczero.core.types import TrainState
from funczero.deepspeed.engine import ranks
from funczero.deepspeed.engine.facts import Facts
from funczero.deepspeed.engine.leaf import write_leaf
from funczero.deepspeed.engine.values import module_state
from funczero.deepspeed.engine.window import taken
from funczero.deepspeed.optim.groups import KEY, scheduled

JOIN = 10.0  # seconds in which all ranks must come to a save or a load
COUNTS = "micro_steps", "global_samples", "_micro", "_backwards"  # of the loop, beside the state's own
THERE = "mp_rank_*_model_states.pt", "*zero_pp_rank_*_states.pt"  # DeepSpeed's own files


class Checkpoints(Facts):
    """An engine's save_checkpoint, load_checkpoint and their relatives."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._checkpointers = dict[str, Checkpointer]()

    def _checkpointer(self, directory: str | Path) -> Checkpointer:
        where = str(Path(directory).absolute())
        if where not in self._checkpointers:
            config = {p: v.value for p, v in self.config_.values.items() if v.origin != "default"}
            self._checkpointers[where] = Checkpointer(where, step=self.train_step, config=config, join=JOIN)
        return self._checkpointers[where]

    def save_checkpoint(
        self, save_dir: str | Path, tag: Any = None, client_state: Any = None, save_latest: bool = True, exclude_frozen_parameters: bool = False, client_sd: Any = None
    ) -> bool:  # fmt: skip
        """True once the checkpoint is committed; all ranks call it. Another world size and another stage load it.

        Args:
          tag: a name, as loss.item(); by default global_step<n>. Rank 0's counts; a checkpoint of that name is replaced.
          client_state: plain values, tensors and arrays of rank 0, which load_checkpoint returns; client_sd is another name of it.
          save_latest: write the tag into `latest`, which load_checkpoint reads.

        Raises:
          CheckpointError: a rank does not come within ten seconds, with its number.
        """
        if not save_dir:
            raise ValueError("save_checkpoint: save_dir is empty; name a folder that all ranks share")
        if exclude_frozen_parameters:
            raise ValueError("save_checkpoint: a checkpoint holds every parameter; leave exclude_frozen_parameters out")
        if client_state is not None and client_sd is not None:
            raise TypeError("save_checkpoint: client_state= and client_sd= are two names of one argument; give one of them")
        name = f"global_step{self.global_steps}" if tag is None else tag
        self._check_tag(name)
        ck = self._checkpointer(save_dir)
        ck.save(self.state, name, client_state={"client": client_sd if client_state is None else client_state, "engine": self._beside()}, overwrite=True)
        done = ck.wait()
        if save_latest and self.global_rank == 0:
            part = Path(save_dir, ".latest.part")
            part.write_text(str(done))
            part.rename(Path(save_dir, "latest"))
        return True

    def _check_tag(self, name: Any) -> None:
        if self.config_.value("checkpoint.tag_validation") == "fail":
            names = ranks.gather_texts(str(name))
            odd = next((r for r, other in enumerate(names) if other != names[0]), None)
            if odd is not None:
                raise ValueError(f"save_checkpoint: the tag is {names[0]!r} on rank 0 and {names[odd]!r} on rank {odd}; name it alike, or write tag_validation: Warn")

    def _beside(self) -> dict[str, Any]:
        """What a loop needs beside the state."""
        scheduler = self.lr_scheduler.state_dict() if self.client_lr_scheduler and hasattr(self.lr_scheduler, "state_dict") else None
        counts = {n: getattr(self, n) for n in COUNTS}
        return {"counts": counts, "k": self._k, "taken": self.micro_batches(), "lr_scheduler": scheduler, "buffers": dict(self.module.named_buffers())}

    def load_checkpoint(
        self,
        load_dir: str | Path | None,
        tag: Any = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        custom_load_fn: Any = None,
        missing_ok: bool = False,
    ) -> tuple[str | None, Any]:
        """(path, client_state) of what save_checkpoint wrote on any world and at any stage; all ranks call it.

        Args:
          load_dir: None: a fresh start, (None, {}).
          tag: by default what `latest` says.
          load_module_only: weights and buffers alone.
          missing_ok: an empty or missing folder is a fresh start, too.

        Raises:
          CheckpointError: there is none; it says what was found.
        """
        if custom_load_fn is not None:
            raise ValueError("load_checkpoint: there is nothing for custom_load_fn to load; write into the module with engine.load_module_state_dict(state_dict)")
        if load_dir is None:
            return None, {}
        ck, latest = self._checkpointer(load_dir), Path(load_dir, "latest")
        if missing_ok and not ck.names():
            if self.global_rank == 0:
                logging.warning("load_checkpoint: there is no checkpoint in %r; a fresh start", str(load_dir))
            return None, {}
        self._refuse_foreign(Path(load_dir))
        name = tag if tag is not None else latest.read_text().strip() if latest.is_file() else "latest"
        only = ("^params/",) if load_module_only else ("^params/", "^(step|updates|key)$") if not load_optimizer_states else ()
        if not only and not load_lr_scheduler_states:
            only = (rf"^(?!{KEY}/)",)
        found = ck.restore(name, like=self._state, strict=load_module_strict, only=only)
        client, beside = _split(found.client_state)
        self._restored(found.state, beside, load_module_only, load_lr_scheduler_states)
        return str(Path(load_dir, found.name)), client

    def _restored(self, state: TrainState, beside: dict[str, Any], module_only: bool, schedulers: bool) -> None:
        own = state.chain[KEY]
        if schedulers and self._rates and int(own["updates"]) != int(state.updates):  # of another chain, or without the optimizer's
            state = state._replace(chain={**state.chain, KEY: scheduled({**own, "updates": state.updates.cpu().clone()}, self._rates, state.updates.cpu())})
        buffers = dict(self.module.named_buffers())
        for name, x in beside.get("buffers", {}).items():
            if name in buffers:
                buffers[name].copy_(x)
        self.state, self.metrics, self._updated = state, None, False
        if module_only:
            return
        for name, n in beside.get("counts", {"micro_steps": int(state.step) * self._k}).items():
            setattr(self, name, n)  # one of COUNTS
        if taken(self._step, state) != beside.get("taken", 0):  # the open window was left out
            self.micro_steps, self._micro, self._backwards = self.micro_steps - self._micro, 0, 0
        if beside.get("k", self._k) != self._k:  # as many micro-batches as this world takes for the same updates
            self.micro_steps = int(state.step) * self._k + self._micro
        self._again = self._backwards > 0
        if schedulers and self.client_lr_scheduler and beside.get("lr_scheduler") is not None:
            self.lr_scheduler.load_state_dict(beside["lr_scheduler"])

    def _refuse_foreign(self, where: Path) -> None:
        theirs = next((p for pattern in THERE for p in (*where.glob(pattern), *where.glob(f"*/{pattern}"))), None)
        if theirs is not None:
            root = where.parent if theirs.parent == where else where
            raise CheckpointError(
                f"load_checkpoint: {str(theirs)!r} is DeepSpeed's, a pickle that is never opened here; convert it with `python {root}/zero_to_fp32.py {root} OUT --safe_serialization` "
                f"and `funczero import OUT NEW`, then load_checkpoint(NEW, load_module_only=True)"
            )

    def save_16bit_model(self, save_dir: str | Path, save_filename: str = "pytorch_model.bin", exclude_frozen_parameters: bool = False) -> bool:
        """The module's state_dict in the compute dtype as one file, by rank 0; all ranks call it.

        Args:
          save_filename: .safetensors, or anything else for torch.save.

        Raises:
          ValueError: at stage 3 without stage3_gather_16bit_weights_on_model_save, because the model is whole on every rank for a moment.
        """
        key = "zero_optimization.stage3_gather_16bit_weights_on_model_save"
        if self.zero_optimization_stage() == 3 and not self.config_.value(key):
            raise ValueError(f"save_16bit_model: at stage 3 it gathers the whole model on every rank; allow that with {key}: true, or write engine.save_checkpoint and `funczero export`")
        whole = module_state(self.train_step, self._state, self.module)
        frozen = {n for n, p in self._holder.named.items() if not p.requires_grad} if exclude_frozen_parameters else set()
        if self.global_rank == 0:
            Path(save_dir).mkdir(parents=True, exist_ok=True)
            out = Path(save_dir, save_filename)
            values = {n: x.contiguous().cpu() for n, x in whole.items() if n not in frozen}
            part = out.with_name(out.name + ".part")
            if out.suffix == ".safetensors":
                safetensors.torch.save_file({n: x.clone() for n, x in values.items()}, part, {"format": "pt"})
            else:
                torch.save(values, part)
            part.rename(out)
        ranks.gather_texts("")  # nobody goes on before the file is there
        return True

    save_fp16_model = save_16bit_model

    def module_state_dict(self, destination: Any = None, prefix: str = "", keep_vars: bool = False, exclude_frozen_parameters: bool = False) -> dict[str, Tensor]:
        """The module's state_dict, whole, in the compute dtype. A collective."""
        out = {} if destination is None else destination
        frozen = {n for n, p in self._holder.named.items() if not p.requires_grad} if exclude_frozen_parameters else set()
        out.update({prefix + n: x for n, x in module_state(self.train_step, self._state, self.module).items() if n not in frozen})
        return out

    def load_module_state_dict(self, state_dict: dict[str, Tensor], strict: bool = True, custom_load_fn: Any = None) -> None:
        """Writes whole parameters into the masters, and buffers.

        Raises:
          KeyError: names differ, unless strict is False.
        """
        named, buffers = self._holder.named, dict(self.module.named_buffers())
        odd = sorted((named.keys() | {n for n in buffers if n in state_dict}) ^ state_dict.keys())
        if strict and odd:
            raise KeyError(f"load_module_state_dict: {odd[0]!r} is only in {'the state_dict' if odd[0] in state_dict else 'the module'}; write strict=False to pass over such names")
        for n in named.keys() & state_dict.keys():
            write_leaf(self._state, n, state_dict[n])
        for n in buffers.keys() & state_dict.keys():
            buffers[n].copy_(state_dict[n])
        self.state = self._state


def _split(found: Any) -> tuple[Any, dict[str, Any]]:
    """The client's part and the engine's; a checkpoint of a plain chain has no engine's.

    Raises:
      CheckpointError: the engine's part holds what no engine wrote.
    """
    if isinstance(found, dict) and found.keys() == {"client", "engine"}:
        return ({} if found["client"] is None else found["client"]), _checked(found["engine"])
    return ({} if found is None else found), {}


def _checked(beside: Any) -> dict[str, Any]:
    count = lambda n: type(n) is int and 0 <= n < 1 << 63
    form = {"counts": dict, "k": int, "taken": int, "buffers": dict}
    wrong = "its form" if not isinstance(beside, dict) else next((k for k, kind in form.items() if k in beside and type(beside[k]) is not kind), None)
    if wrong is None:
        wrong = next((str(n) for n, x in beside.get("counts", {}).items() if n not in COUNTS or not count(x)), None)
    if wrong is None:
        wrong = next((str(n) for n, x in beside.get("buffers", {}).items() if not isinstance(x, Tensor)), None)
    if wrong is not None:
        raise CheckpointError(f"load_checkpoint: {wrong[:80]!r} in the engine's part of the checkpoint is nothing that an engine writes; it knows the counts {list(COUNTS)}")
    return beside

"""The engine's checkpoints: those of fz.Checkpointer, with what a loop keeps beside its state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from absl import logging

from funczero.checkpoint import Checkpointer, CheckpointError
from funczero.checkpoint.names import escape
from funczero.core.types import TrainState
from funczero.deepspeed.engine import ranks
from funczero.deepspeed.engine.beside import COUNTS, split
from funczero.deepspeed.engine.buffers import fitting
from funczero.deepspeed.engine.weights import Weights
from funczero.deepspeed.engine.window import taken
from funczero.deepspeed.optim.groups import KEY, scheduled

JOIN = 10.0  # seconds in which all ranks must come to a save or a load
THERE = "mp_rank_*_model_states.pt", "*zero_pp_rank_*_states.pt"  # DeepSpeed's own files


class Checkpoints(Weights):
    """An engine's save_checkpoint and load_checkpoint."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._checkpointers = dict[tuple[str, int], Checkpointer]()

    def _checkpointer(self, directory: str | Path) -> Checkpointer:
        where = str(Path(directory).absolute()), self._k
        if where not in self._checkpointers:
            config = {p: v.value for p, v in self.config_.values.items() if v.origin != "default"}
            self._checkpointers[where] = Checkpointer(where[0], step=self.train_step, config=config, join=JOIN)
        return self._checkpointers[where]

    def save_checkpoint(
        self,
        save_dir: str | Path,
        tag: Any = None,
        client_state: Any = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
        client_sd: Any = None,
    ) -> bool:
        """True once the checkpoint is committed; all ranks call it. Another world size and another stage load it.

        Args:
          tag: a name, as loss.item(), by default global_step<n>. Rank 0's counts. One of that name is replaced.
          client_state: plain values, tensors and arrays of rank 0, which load_checkpoint returns.
          client_sd: another name of client_state.
          exclude_frozen_parameters: leave out what needs no gradient and is not trained; load_module_strict=False
            loads such a checkpoint, and frozen parameters stay as they are.
          save_latest: write the tag into `latest`, which load_checkpoint reads.

        Raises:
          CheckpointError: a rank does not come within ten seconds, with its number.
        """
        if not save_dir:
            raise ValueError("save_checkpoint: save_dir is empty; name a folder that all ranks share")
        if client_state is not None and client_sd is not None:
            raise TypeError(
                "save_checkpoint: client_state= and client_sd= are two names of one argument; give one of them"
            )
        name = f"global_step{self.global_steps}" if tag is None else tag
        self._check_tag(name)
        ck = self._checkpointer(save_dir)
        client = client_sd if client_state is None else client_state
        without = [f"params/{escape(n)}" for n in self.frozen_names()] if exclude_frozen_parameters else []
        both = {"client": client, "engine": self._beside()}
        ck.save(self.state, name, client_state=both, overwrite=True, without=without)
        done = ck.wait()
        if str(done) != str(name) and self.config_.value("checkpoint.tag_validation") == "warn":
            what = "save_checkpoint: the tag is %r on rank %d, but rank 0's counts, which is %r"
            logging.warning(what, str(name), self.global_rank, str(done))
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
                raise ValueError(
                    f"save_checkpoint: the tag is {names[0]!r} on rank 0 and {names[odd]!r} on rank {odd}; "
                    "name it alike, or write tag_validation: Warn"
                )

    def _beside(self) -> dict[str, Any]:
        """What a loop needs beside the state."""
        kept = self.client_lr_scheduler and hasattr(self.lr_scheduler, "state_dict")
        counts = {n: int(x) for n in COUNTS if (x := getattr(self, n)) or n != "_waits"}
        return {
            "counts": counts,
            "k": self._k,
            "taken": self.window_length(),
            "lr_scheduler": self.lr_scheduler.state_dict() if kept else None,
            "frozen": self.frozen_names(),
            "buffers": dict(self.module.named_buffers(remove_duplicate=False)),
            "persistent": [n for n, _ in self.module.named_buffers(remove_duplicate=False) if self._lasts(n)],
        }

    def _lasts(self, name: str) -> bool:
        path, _, last = name.rpartition(".")
        return last not in self.module.get_submodule(path)._non_persistent_buffers_set

    def load_checkpoint(
        self,
        load_dir: str | Path | None,
        tag: Any = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        custom_load_fn: Any = None,
    ) -> tuple[str | None, Any]:
        """(path, client_state) of what save_checkpoint wrote on any world and at any stage; all ranks call it.

        Args:
          load_dir: one that holds nothing, or None: a fresh start, (None, None), with a warning.
          tag: by default what `latest` says.
          load_module_strict: False: parameters that the checkpoint lacks stay as they are, others are passed over.
          load_module_only: weights and buffers alone.

        Raises:
          CheckpointError: there is none of that tag, or it lacks parameters; it says what was found.
        """
        if custom_load_fn is not None:
            raise ValueError(
                "load_checkpoint: there is nothing for custom_load_fn to load; "
                "write into the module with engine.load_module_state_dict(state_dict)"
            )
        if load_dir is None or self._holds_nothing(load_dir, tag):
            if self.global_rank == 0:
                what = "there is no checkpoint in %r; training goes on from the weights that the module has"
                logging.warning("load_checkpoint: " + what, None if load_dir is None else str(load_dir))
            return None, None
        ck, latest = self._checkpointer(load_dir), Path(load_dir, "latest")
        name = tag if tag is not None else latest.read_text().strip() if latest.is_file() else "latest"
        only: tuple[str, ...] = ()
        if load_module_only:
            only = ("^params/",)
        elif not load_optimizer_states or self.optimizer is None:
            only = ("^params/", "^(step|updates|key)$")
        elif not load_lr_scheduler_states:
            only = (rf"^(?!{KEY}/)",)
        try:
            found = ck.restore(name, like=self._state, strict=load_module_strict, only=only)
        except CheckpointError as e:  # in the words of this call
            text = str(e).replace("rename=[(regex, replacement)] maps names, ", "")
            raise CheckpointError(text.replace("strict=False", "load_module_strict=False")) from e
        client, beside = split(found.client_state)
        buffers = fitting(self.module, beside, load_module_strict)
        self._restored(found.state, beside, buffers, load_module_only, load_lr_scheduler_states)
        return str(Path(load_dir, found.name)), client

    def _holds_nothing(self, directory: str | Path, tag: Any) -> bool:
        """Is it a folder without a checkpoint and without a word of one? A collective where no tag is asked for."""
        self._refuse_foreign(Path(directory))
        return tag is None and not Path(directory, "latest").is_file() and not self._checkpointer(directory).names()

    def _restored(
        self, state: TrainState, beside: dict[str, Any], buffers: dict[str, Any], module_only: bool, schedulers: bool
    ) -> None:
        groups, updates = state.chain[KEY], state.updates.cpu()
        if schedulers and self._rates and int(groups["updates"]) != int(updates):  # another chain's, or left out
            groups = scheduled({**groups, "updates": updates.clone()}, self._rates, updates)
            state = state._replace(chain={**state.chain, KEY: groups})
        self._left = "engine.load_checkpoint"  # until all of it is here
        own = dict(self.module.named_buffers(remove_duplicate=False))
        for name, x in buffers.items():
            own[name].copy_(x)
        self.state, self.metrics, self._updated, self._waits = state, None, False, False
        if not module_only:
            self._counted(state, beside)
            if schedulers and self.client_lr_scheduler and beside.get("lr_scheduler") is not None:
                self.lr_scheduler.load_state_dict(beside["lr_scheduler"])
        self._left = ""

    def _counted(self, state: TrainState, beside: dict[str, Any]) -> None:
        """The loop's counts, as they were saved or as they follow from the state."""
        for name, n in beside.get("counts", {"micro_steps": int(state.step) * self._k}).items():
            setattr(self, name, n)  # one of COUNTS
        if taken(self._step, state) != beside.get("taken", 0):  # the open window was left out
            self.micro_steps, self._micro, self._backwards = self.micro_steps - self._micro, 0, 0
        if beside.get("k", self._k) != self._k:  # as many micro-batches as this world takes for the same updates
            rows = self.config_.triad.micro * self.config_.world.size
            counted = "global_samples" in beside.get("counts", {})
            self.micro_steps = (self.global_samples // rows if counted else int(state.step) * self._k) + self._micro
        self._again = self._backwards > 0

    def _refuse_foreign(self, where: Path) -> None:
        theirs = next((p for pattern in THERE for p in (*where.glob(pattern), *where.glob(f"*/{pattern}"))), None)
        if theirs is not None:
            root = where.parent if theirs.parent == where else where
            raise CheckpointError(
                f"load_checkpoint: {str(theirs)!r} is DeepSpeed's, a pickle that is never opened here; "
                f"convert it with `python {root}/zero_to_fp32.py {root} OUT --safe_serialization` "
                "and `funczero import OUT NEW`, then load_checkpoint(NEW, load_module_only=True)"
            )

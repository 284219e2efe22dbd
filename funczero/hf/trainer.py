"""Hugging Face's Trainer whose training step is a pure chain.

The stock loop stays where it is: arguments, callbacks, logs, files. What computes is replaced at the places where it
asks for it: rows are dealt by the chain's order, an update is `step`, a checkpoint holds the sharded state.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.utils.memory import clear_device_cache
from torch.utils.data import DataLoader
from transformers.utils import logging

from funczero.hf import refusals
from funczero.hf.chain import built
from funczero.hf.evaluation import EvalRows
from funczero.hf.files import SCHEDULER, STATE, advance, check_finished, last_whole, put_schedule, unfinished
from funczero.hf.items import alone, batch_of, cast, items_of, normalised
from funczero.hf.rows import Micros, TrainRows, Window
from funczero.hf.run import Face, Run
from funczero.hf.zero import Zero

logger = logging.get_logger(__name__)


class Trainer(transformers.Trainer):
    """transformers.Trainer over one of funczero's chains: `Trainer(model, args, ..., zero=Zero(stage=3))`.

    Law: losses, norms and rates are those of the stock Trainer on one process with the same micro-batches, up to
    rounding; and with the same micro-batches an update, parameters are the same bits on 1, 2, 4, ... ranks (with
    sums="exact" on any number), at every stage, dropout included, and after a resume elsewhere.

    Nothing is wrapped: start it with torchrun, or with python alone. compute_loss, compute_loss_func, the dataset, the
    collate function, callbacks, create_optimizer, create_scheduler and get_*_dataloader are yours, as there. While it
    trains the model has no values (its parameters lie on meta, at every stage): `with trainer.whole():` shows them, and
    compute_loss, prediction_step and save_model find them. After it the model has them again.

    Args:
      args, kwargs: as transformers.Trainer's.
      zero: a Zero, or a ds_config (a dict or a path) whose "auto" is filled from TrainingArguments.

    Raises:
      ValueError, TypeError, RuntimeError: what is asked for and cannot be right, by name.
    """

    def __init__(self, *args: Any, zero: Zero | Mapping[str, Any] | str | Path | None = None, **kwargs: Any) -> None:
        refusals.check_version(transformers.Trainer)
        self.run: Run | None = None
        self._trained = False
        super().__init__(*args, **kwargs)
        refusals.check_arguments(self.args)
        refusals.check_model(self)
        refusals.check_methods(self, transformers.Trainer, Trainer)
        self.zero = Zero() if zero is None else zero
        if isinstance(self.zero, Zero):
            self.zero = self.zero.checked(self.args.world_size)
            refusals.check_given(self.args, self.zero.give_back)
        if self.optimizer is not None or self.optimizer_cls_and_kwargs is not None:
            refusals.check_one_optimizer(self.zero)

    # --- what is not used of Accelerate
    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        """Precision is the chain's."""
        return super()._build_accelerator_args(**kwargs) | {"mixed_precision": "no"}

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """torch's own, over all rows."""
        self.accelerator.prepare = _as_it_is
        try:
            return super()._get_dataloader(*args, **kwargs)
        finally:
            del self.accelerator.prepare

    def _move_model_to_device(self, model: Any, device: torch.device) -> None:
        """As the stock one; a model on meta stays there, until a checkpoint gives it values."""
        if not any(p.is_meta for p in model.parameters()):
            super()._move_model_to_device(model, device)

    def _wrap_model(self, model: Any, training: bool = True, dataloader: Any = None) -> Any:
        """The model itself; where the chain has its parameters, what computes with them."""
        return model if self.run is None else Face(self.run)

    # --- setting up
    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As transformers.Trainer's; of a folder of checkpoints the last one that is whole is taken.

        Raises:
          RuntimeError: it has trained before, and its moments are gone; or an error has ended that.
        """
        if self.run is not None and not self._trained and self.model_init is None:
            why = "an error has ended its training, and its model has no values any more"
            remedy = "make the model and a Trainer of it anew, and write resume_from_checkpoint=True"
            raise RuntimeError(f"hf.Trainer: {why}; {remedy}")
        if self._trained and self.model_init is None and not resume_from_checkpoint:
            why = "this Trainer has trained, and its moments are gone"
            raise RuntimeError(f"hf.Trainer: {why}; make a new one of its model, or write resume_from_checkpoint=True")
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_whole(self.args.output_dir or "")
        self.run = None
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def set_initial_training_values(self, args: Any, dataloader: Any) -> Any:
        """Of the rows as they are dealt."""
        rows: Any = self._train_rows(dataloader)
        return super().set_initial_training_values(args, rows)

    def _train_rows(self, loader: Any) -> TrainRows:
        if not isinstance(loader, DataLoader):
            why = f"get_train_dataloader returned a {type(loader).__name__}, and rows are dealt out of torch's"
            raise TypeError(f"hf.Trainer: {why}; return a torch.utils.data.DataLoader over all rows")
        by_length: Any = getattr(loader.batch_sampler, "sampler", None)
        if type(by_length).__name__ == "LengthGroupedSampler":  # its groups are of an update's rows
            by_length.batch_size = self._train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return TrainRows(Micros(loader, self._data_seed), self.args.world_size)

    @property
    def _data_seed(self) -> int:
        return self.args.seed if self.args.data_seed is None else self.args.data_seed

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        """The step and its first state, or a checkpoint's."""
        if self._created_lr_scheduler:
            self.lr_scheduler, self._created_lr_scheduler = None, False
        rows = self._train_rows(train_dataloader)
        parts = built(self, max_steps)
        refusals.check_device(self.args.device, parts.step.live_mesh.device)
        self.run = Run(parts, self.model, self.args.seed, resume_from_checkpoint)
        rows.deal = self.run.deal
        self.model_wrapped: Any = self.model
        if resume_from_checkpoint is not None:
            self._resumed(resume_from_checkpoint)
        for name in ("model", "optimizer", "lr_scheduler"):
            setattr(self.callback_handler, name, getattr(self, name))
        self.callback_handler.train_dataloader = rows
        return self.model, rows

    def _resumed(self, folder: str) -> None:
        """The schedule that is shown, where the state is; and both files of one moment."""
        assert self.run is not None
        calls, updates = int(self.run.state.step), int(self.run.state.updates)
        if calls != self.state.global_step:
            why = f"{STATE} says update {self.state.global_step}, and the state beside it {calls}"
            raise ValueError(f"hf.Trainer: {folder!r}: {why}; they are not of one checkpoint")
        put_schedule(folder, self.lr_scheduler, self.optimizer, updates)

    # --- the loop
    def _run_epoch(  # type: ignore[override]  # what it does not read is named, and not spelled
        self, model: Any, epoch: int, train_dataloader: Any, **named: Any
    ) -> None:
        """One pass over the rows: for each update its micro-batches, and the step.

        The arguments and the order of callbacks are the stock Trainer's.
        """
        resumed = named["resume_from_checkpoint"]
        after = {n: named[n] for n in ("trial", "ignore_keys_for_eval", "start_time")}
        first = 0
        if resumed is not None and epoch == named["epochs_trained"]:
            first = named["steps_trained_in_current_epoch"] // self.args.gradient_accumulation_steps
            self._load_rng_state(resumed)
        done, metrics, lr = first, None, None
        for window in train_dataloader.windows(epoch, first):
            self.control = self.callback_handler.on_step_begin(self.args, self.state, self.control)
            metrics, lr = self._one_update(window)
            if metrics is None:
                break
            done += 1
            self.state.global_step += 1
            self.state.epoch = epoch + train_dataloader.done(done, named["num_update_steps_per_epoch"])
            self.control = self.callback_handler.on_step_end(self.args, self.state, self.control)
            self._reported(metrics, model, epoch, after, lr)
            if self.control.should_epoch_stop or self.control.should_training_stop:
                break
        if not (train_dataloader.seen or first):
            logger.warning("hf.Trainer: the loader gave no micro-batch in epoch %d, so the training stops", epoch)
            self.control.should_training_stop = True
        self.control = self.callback_handler.on_epoch_end(self.args, self.state, self.control)
        self._reported(metrics, model, epoch, after, lr)

    def _reported(self, metrics: Any, model: Any, epoch: int, after: dict[str, Any], lr: float | None) -> None:
        norm = None if metrics is None else metrics.grad_norm
        self._maybe_log_save_evaluate(
            self._tr_loss, norm, model, after["trial"], epoch, after["ignore_keys_for_eval"], after["start_time"],
            learning_rate=lr,
        )  # fmt: skip

    def _one_update(self, window: Window) -> tuple[Any, float | None]:
        """The metrics of an update and its rate; None where a callback stopped it before its end."""
        run, real = self.run, [inputs for place, inputs in window.own if place.real]
        assert run is not None
        counted = [items_of(self, x) for x in real] or [items_of(self, window.own[0][1]) and 0]
        none = any(n is None for n in counted)
        items = run.items(None if none else sum(n for n in counted if n is not None), window.whole)
        share = self._share(items, window.micros)
        for i, (place, inputs) in enumerate(window.own):
            inputs = self._prepare_inputs(inputs)
            run.micro(place, batch_of(inputs, items, share), window.micros)
            shown = inputs if place.real else {k: x[:0] if _has_rows(x) else x for k, x in inputs.items()}
            every = self.args.torch_empty_cache_steps
            if every is not None and self.state.global_step % every == 0:
                clear_device_cache()
            self.current_flos += self.floating_point_ops(shown)
            self._track_num_input_tokens(shown)
            if i < len(window.own) - 1:
                self.control = self.callback_handler.on_substep_end(self.args, self.state, self.control)
                if self.control.should_epoch_stop or self.control.should_training_stop:
                    run.abandon()
                    return None, None
        self.control = self.callback_handler.on_pre_optimizer_step(self.args, self.state, self.control)
        metrics = run.update()
        self.control = self.callback_handler.on_optimizer_step(self.args, self.state, self.control)
        lr = self._get_learning_rate()
        if bool(metrics.ok):
            advance(self.lr_scheduler)
        self._add_loss(metrics.loss)
        return metrics, lr

    def _share(self, items: int | None, micros: int) -> int:
        if not normalised(self, items is not None):
            return 1
        if items is None and micros > 1:
            why = "the loss says that it is normalised over an update, but its batches have no labels to count"
            raise ValueError(f"hf.Trainer: {why}; write loss_is_scaled_for_ga = False, and return a mean")
        return micros

    def _add_loss(self, loss: Any) -> None:
        """As the stock Trainer: one that is not finite counts as the mean of those before."""
        if self.args.logging_nan_inf_filter and not bool(torch.isfinite(loss)):
            self._tr_loss += self._tr_loss / (1 + self.state.global_step - self._globalstep_last_logged)
        else:
            self._tr_loss += loss.to(self._tr_loss)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        """The model has its values again, before the best one is loaded and the last callbacks run."""
        self._trained = True
        if self.run is not None and getattr(self.zero, "give_back", True):
            self.run.give_back()
            self.run = None
        return super()._finalize_training(*args, **kwargs)

    # --- looks
    @contextmanager
    def whole(self, averaged: bool = False) -> Iterator[Any]:
        """The model with whole values, while the chain has its parameters; all ranks call it.

        Args:
          averaged: those of the running average (Zero(ema=...)).

        Raises:
          RuntimeError: there is no training under way whose average it could show.
        """
        if self.run is None:
            if averaged:
                raise RuntimeError("hf.Trainer.whole: the average is a training's, and none is under way; call it in a"
                                   " callback, or write Zero(give_back=False)")  # fmt: skip
            yield self.model
            return
        with self.run.showing(averaged):
            yield self.model

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> Any:
        """As the stock one, but every row counts once, and what looks at a batch's logits finds those of that batch
        alone, whatever the number of ranks.
        """
        if isinstance(dataloader, DataLoader):
            dataloader = EvalRows(dataloader, self.args.process_index, self.args.world_size, self._data_seed)
        rows, pad, gather = dataloader, self.accelerator.pad_across_processes, self.gather_function
        if isinstance(rows, EvalRows):
            joined: Any = lambda x: self.accelerator.gather(pad(x, dim=1, pad_index=-100))
            self.gather_function = lambda x: rows.gathered(x, joined)
            self.accelerator.pad_across_processes = _as_it_is  # not before preprocess_logits_for_metrics has seen it
        self._looks: dict[Any, Any] = {}
        try:
            return super().evaluation_loop(dataloader, *args, **kwargs)
        finally:
            self.accelerator.__dict__.pop("pad_across_processes", None)
            self.gather_function = gather
            del self._looks

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> Any:
        """As the stock one, with the values of now; a loss is that of its own batch."""
        stock = super().prediction_step
        ask = prediction_loss_only, None if ignore_keys is None else tuple(ignore_keys)

        def look(model: Any, inputs: Any) -> Any:
            with alone(self):
                return stock(model, inputs, prediction_loss_only, ignore_keys)

        if self.run is None:
            return look(model, inputs)
        if ask not in self._looks:
            self._looks[ask] = self.run.seen(look)
        return self._looks[ask](cast(self, self._prepare_inputs(inputs), self.run.compute))

    # --- files
    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Whole weights in the model's own layout, written by the main process; all ranks call it."""
        if _internal_call and output_dir and self.args.should_save:  # an older one's would call this one finished
            unfinished(output_dir)
        if self.run is None:
            super().save_model(output_dir, _internal_call)
            return
        with self.run.showing(where="host" if self.args.should_save else "nowhere"):
            super().save_model(output_dir, _internal_call)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """The sharded state, and the schedule as it is shown."""
        assert self.run is not None
        self.run.save(output_dir)
        if self.args.should_save:
            assert self.lr_scheduler is not None
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Nothing yet: the state is read when there is a chain."""
        check_finished(resume_from_checkpoint)


def _has_rows(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.dim() > 0


def _as_it_is(x: Any, **how: Any) -> Any:
    return x

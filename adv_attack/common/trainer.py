"""The Trainer under all trainers of this repository: exact steps on any number of processes, whole checkpoints."""

import itertools
import os

import torch
from torch.utils.data import SequentialSampler
from transformers import Trainer
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import get_last_checkpoint, rotate_checkpoints

from common.resuming import MANIFEST_FILE, on_rank_zero, seal
from models.bit_config import short_name
from models.errors import UserError


class ResumableTrainer(Trainer):
    """Trainer whose checkpoints are whole or not used, and whose evaluations leave the training as it was."""

    def train_or_load(self, folder):
        """Train from where `folder` says, save model and state, and return the metrics; none for a finished training,
        which is only loaded."""
        if folder.finished:
            self._load_from_checkpoint(folder.path)
            self.state = TrainerState.load_from_json(os.path.join(folder.path, "trainer_state.json"))
            return {}
        result = self.train(resume_from_checkpoint=folder.checkpoint)
        if self.state.global_step < self.state.max_steps:  # --enable_jit_checkpoint ends a training so
            where = f"step {self.state.global_step} of {self.state.max_steps}"
            raise UserError(f"stopped at {where}: the same command goes on from the last checkpoint")
        self.save_model()
        self.save_state()
        self.log_metrics("train", result.metrics)
        self.save_metrics("train", result.metrics)
        on_rank_zero(lambda: folder.finish(result.metrics))
        return result.metrics

    def _save(self, output_dir=None, state_dict=None):
        """Model and tokenizer, without upstream's training_args.bin: a pickle, which would hold the hub token."""
        for part in (self.model, self.processing_class) if self.args.should_save else ():
            part.save_pretrained(output_dir or self.args.output_dir)

    def _save_checkpoint(self, model, trial):
        """Upstream's, with the list of files written last, and old checkpoints deleted only then."""
        folder = os.path.join(self.args.output_dir, f"checkpoint-{self.state.global_step}")
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            if self.args.should_save and os.path.exists(manifest := os.path.join(folder, MANIFEST_FILE)):
                os.remove(manifest)  # of a damaged checkpoint, which is written anew
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()  # the random states of all ranks are there
        if self.args.should_save:
            seal(folder)
            rotate_checkpoints(self.args.output_dir, limit, self.state.best_model_checkpoint, use_mtime=True)

    def _run_epoch(self, *args, **kwargs):
        """Upstream resumes from its very last checkpoint with one step too many; here it ends at once."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def prediction_step(self, model, *args, **kwargs):
        """In float32 in a training with --bf16 or --fp16 too, as its checkpoint is evaluated later: without the
        autocast that accelerate puts around `forward`."""
        net = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        autocast = net.__dict__.pop("forward", None) if self.args.do_train else None
        try:
            return super().prediction_step(model, *args, **kwargs)
        finally:
            if autocast is not None:
                net.forward = autocast

    def evaluation_loop(self, *args, **kwargs):
        """A data loader draws from torch's generator; the dropout of the next training step must not depend on it."""
        with torch.random.fork_rng(devices=[]):
            return super().evaluation_loop(*args, **kwargs)


class StepMeanTrainer(ResumableTrainer):
    """Trainer whose optimizer step descends the mean loss of its samples: all micro-batches, all processes, each once.

    So N processes with batch b do what one does with batch N b, and k accumulated batches what one of k times the size
    does, at the ragged end of an epoch too. Losses and gradients are averaged over the processes, as DDP does.
    """

    loss_is_scaled_for_ga = True  # by the share of a micro-batch
    configs = ()

    def __init__(self, *, model, args, **kwargs):
        if len(model.config.lora_bank or ()) > 1:
            args.ddp_find_unused_parameters = True  # of the adapters a step uses some; checkpointing turns it off
        super().__init__(model=model, args=args, **kwargs)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of an optimizer step, each with its "share": its part of the samples of the step, times
        the processes.

        Accelerate hands every process full batches. Those that end an epoch it fills up with duplicates: of the last
        ones only the first samples, in the order of the ranks, are new.
        """
        batches = [dict(batch) for batch in itertools.islice(epoch_iterator, num_batches)]
        counts, world = [len(batch["input_ids"]) for batch in batches], self.args.world_size
        complete = self.args.dataloader_drop_last or self.args.train_sampling_strategy == "batch_rebalance"
        if batches and world > 1 and not complete and self.accelerator.gradient_state.end_of_dataloader:
            size = counts[-1]
            # Not gradient_state.remainder: a resumed epoch does not have it.
            new = len(self.train_dataset) % (size * world) or size * world
            counts[-1] = min(max(new - self.args.process_index * size, 0), size)
            # A process without a new sample computes a duplicate, whose share is 0.
            batches[-1] = {key: value[: max(counts[-1], 1)] for key, value in batches[-1].items()}
        total = sum(counts)
        if world > 1:
            total = self.accelerator.reduce(torch.tensor(float(total), device=device), "mean")
        for batch, count in zip(batches, counts, strict=True):
            batch["share"] = count / total
        return batches, None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = dict(inputs)
        share = inputs.pop("share", 1.0)  # evaluation has none
        loss, outputs = self.mean_loss(model, inputs)
        return (loss * share, outputs) if return_outputs else loss * share

    def mean_loss(self, model, inputs):
        """(mean loss of the samples of a micro-batch, outputs)."""
        return super().compute_loss(model, inputs, return_outputs=True)

    def stop_unless_finite(self, loss):
        """Raise before the optimizer step when the loss is NaN or infinite; what is on disk stays as it is."""
        if not torch.isfinite(loss):
            config = self.accelerator.unwrap_model(self.model).config.bit_config
            raise FloatingPointError(
                f"loss is {loss.item()} at step {self.state.global_step + 1} (bit config: {short_name(config)}); "
                f"last checkpoint: {get_last_checkpoint(self.args.output_dir) or 'none yet'}. Try a lower "
                "--learning_rate, or --bf16 instead of --fp16"
            )

    def get_train_dataloader(self):
        loader = super().get_train_dataloader()
        if not len(loader):
            raise UserError(
                f"--dataloader_drop_last: the {len(self.train_dataset)} training samples do not fill one batch of "
                f"{self.args.train_batch_size} on each of {self.args.world_size} processes"
            )
        return loader

    def _get_eval_sampler(self, eval_dataset):
        """In the order of the features, by which predictions are matched with questions: upstream groups by length."""
        return SequentialSampler(eval_dataset) if self.args.world_size == 1 else None

    def get_eval_dataloader(self, eval_dataset=None):
        """Without --dataloader_drop_last, which is about training: every sample is evaluated."""
        drop_last, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.args.dataloader_drop_last = drop_last

    def train(self, *args, **kwargs):
        """Refuses a --metric_for_best_model that no evaluation will have."""
        metric, metrics = self.args.metric_for_best_model, self.args.metrics
        known = [*metrics, *(f"{name}_{config}" for name in metrics for config, _ in self.configs)]
        if metric and metric.removeprefix("eval_") not in known:
            raise UserError(f"--metric_for_best_model {metric}: allowed are {', '.join(known)}")
        return super().train(*args, **kwargs)

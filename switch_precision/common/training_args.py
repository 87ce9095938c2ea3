"""The TrainingArguments of all scripts: what transformers would take and not do is done here, or refused."""

import logging
import os

import torch
import transformers

from models.errors import UserError

logger = logging.getLogger(__name__)
FULL_EVAL = ("bf16_full_eval", "fp16_full_eval")
FOLLOWING = ("reduce_lr_on_plateau", "greedy")  # schedulers that follow what an evaluation measures


class TrainingArguments(transformers.TrainingArguments):
    """transformers' TrainingArguments on the device that there is, with a default metric that the scripts have.

    A machine without accelerator runs on its CPU without being told (--use_cpu): several processes are one run there
    too (gloo), and --bf16 works. Raises UserError: half precision or an optimizer that the device does not have,
    processes that would not be one run, a best model among evaluations that never happen, an unknown metric.
    """

    metrics = ("f1", "exact_match", "loss")  # of an evaluation; the first one chooses the best model
    evaluates_in_float32 = True  # a model that trains in half precision (`trainer.prediction_step`)

    def __post_init__(self):
        if not torch.accelerator.is_available():
            self.use_cpu = True
        follows = self.lr_scheduler_type in FOLLOWING
        keeps = self.load_best_model_at_end or self.save_strategy == "best"
        if self.metric_for_best_model is None and (follows or keeps):
            self.metric_for_best_model = self.metrics[0]
        name = (self.metric_for_best_model or self.metrics[0]).removeprefix("eval_")
        if self.metric_for_best_model and self.greater_is_better is None:
            self.greater_is_better = not name.startswith("loss")  # that of a config too: loss_W4A4KV4
        super().__post_init__()
        if self.n_gpu > 1:  # upstream's nn.DataParallel knows nothing of codes, and would multiply the batch
            logger.warning(
                "%d GPUs, one process: it computes on the first; torchrun, as in *.sh, uses all", self.n_gpu
            )
            self._n_gpu = 1
        if "paged" in self.optim and self.device.type == "cpu":
            why = "paged optimizer states lie in memory that CUDA shares with the host"
            raise UserError(f"--optim {self.optim}: {why}; on a CPU pass --optim adamw_torch")
        too_late = self.eval_strategy == "steps" and 0 < self.max_steps < self.eval_steps
        if keeps and (self.eval_strategy == "no" or too_late):
            raise UserError(
                "--load_best_model_at_end and --save_strategy best choose among evaluations, and there is none before "
                "the end: pass --eval_strategy steps and --eval_steps, or --eval_strategy epoch"
            )
        if not any(name == metric or name.startswith(f"{metric}_") for metric in self.metrics):
            allowed = ", ".join(self.metrics)
            raise UserError(f"--metric_for_best_model {self.metric_for_best_model}: allowed are {allowed}")
        if follows:
            mode = "max" if self.greater_is_better else "min"
            self.lr_scheduler_kwargs = {"mode": mode} | (self.lr_scheduler_kwargs or {})
        for flag in ("fp16", "fp16_full_eval"):
            if getattr(self, flag) and self.device.type == "cpu":
                other = flag.replace("fp16", "bf16")
                raise UserError(f"--{flag}: a CPU does not compute in fp16; pass --{other}, or neither for float32")
        if (started := int(os.environ.get("WORLD_SIZE", "1"))) != self.world_size:
            raise UserError(f"{started} process(es) were started, but this run has {self.world_size}")

    @property
    def run_dtype(self):
        """What a run of these arguments computes in, for its record."""
        half = "bf16" if self.bf16 else "fp16" if self.fp16 else "fp32"
        full = next((flag for flag in FULL_EVAL if getattr(self, flag)), None)
        if not self.do_train:
            return full or half
        evaluates = self.do_eval or self.do_predict
        if full and evaluates:
            return f"{half}, after training {full}"
        return f"{half}, evaluated in fp32" if evaluates and self.evaluates_in_float32 and half != "fp32" else half

    def refuse_full_eval(self):
        """For scripts whose own evaluation knows --bf16 and --fp16 (autocast) alone."""
        self.evaluates_in_float32 = False
        for flag in FULL_EVAL:
            if getattr(self, flag):
                raise UserError(f"--{flag}: this script evaluates in float32 or under --bf16")


def refuse_processes():
    """For scripts without TrainingArguments, which are one process."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(f"this script is one process, not {os.environ['WORLD_SIZE']}: start it without torchrun")

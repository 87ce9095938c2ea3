"""A training and its output folder: one run at a time, its settings, its checkpoints, what a second call does.

    folder = OutputFolder(training_args, overwrite, run_settings(model_args, data_args, training_args))
    ...                                  # load tokenizer, model and data
    folder.start(model=..., train=...)   # checksums
    metrics = trainer.train_or_load(folder)

The same command given again resumes a killed training, to the same weights, and only loads a finished one. A folder
of another run is refused. Nothing is deleted without --overwrite_output_dir, but this module's own temporary files.
"""

import contextlib
import dataclasses
import fcntl
import json
import logging
import os
import re
import shutil
import socket

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import TrainingArguments

from common.checksums import file_checksum, json_checksum, model_checksum, tokenizer_checksum
from common.record import differences, load_state, surroundings, write_state
from common.training_args import FOLLOWING
from models.disk import sync
from models.errors import UserError

logger = logging.getLogger(__name__)
INCOMPLETE = "checkpoint-is-incomplete.txt"  # upstream's, of --enable_jit_checkpoint, until it is written
SETTINGS_FILE, MANIFEST_FILE, LOCK_FILE = "run_settings.json", "checkpoint_manifest.json", ".lock"
LEFT_OVER = re.compile(r"\.saving-\w{8}|.+\.(?:json|md|png)\.\d+\.tmp")  # of save_pretrained and of record.py
CHECKPOINT = re.compile(r"checkpoint-(\d+)")
START_OVER = "pass --overwrite_output_dir to start over"
# Everything that is not named here changes the weights that a training ends with, and is compared.
FREE = set(
    "model_name_or_path base_model_name_or_path tokenizer_name train_file validation_file from_peft "  # by checksum
    "cache_dir token record_file overwrite_cache overwrite_output_dir preprocessing_num_workers test_file "
    "max_predict_samples output_dir do_train do_eval do_predict resume_from_checkpoint use_cpu local_rank "
    "dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor "
    "dataloader_multiprocessing_context dataloader_in_order logging_strategy logging_steps logging_first_step "
    "log_on_each_node logging_nan_inf_filter include_num_input_tokens_seen log_level log_level_replica disable_tqdm "
    "report_to run_name project trackio_space_id trackio_bucket_id trackio_static_space_id save_only_model "
    "save_on_each_node save_total_limit enable_jit_checkpoint push_to_hub hub_token hub_private_repo hub_model_id "
    "hub_strategy hub_always_push hub_revision restore_callback_states_from_checkpoint ddp_backend ddp_timeout "
    "ddp_bucket_cap_mb debug skip_memory_metrics torch_empty_cache_steps per_device_eval_batch_size "
    "eval_accumulation_steps prediction_loss_only eval_on_start eval_do_concat_batches eval_use_gather_object "
    "include_for_metrics batch_eval_metrics".split()
)
# Changes the weights only where an evaluation chooses among checkpoints or steers the learning rate.
EVALUATION = set(
    "eval_strategy eval_steps eval_delay save_strategy save_steps metric_for_best_model greater_is_better "
    "max_eval_samples max_answer_length n_best_size eval_bit_widths eval_bit_configs stride bf16_full_eval "
    "fp16_full_eval null_score_diff_threshold".split()
)
LONGER = {"max_steps", "num_train_epochs"}  # may differ where a training goes on from another one's checkpoint
# What flags meant to runs that are older than they are.
YOUNGER = {"version_2_with_negative": False, "null_score_diff_threshold": 0.0}


def run_settings(*arguments):
    """{flag: value} of all that decides what a training ends with, in the form that JSON gives back.

    arguments: the dataclasses of the command line, a TrainingArguments among them.
    """
    values = {field.name: getattr(part, field.name) for part in arguments for field in dataclasses.fields(part)}
    training_args = next(part for part in arguments if isinstance(part, TrainingArguments))
    left_out = FREE | ({"num_train_epochs"} if training_args.max_steps > 0 else set())
    if not (training_args.load_best_model_at_end or training_args.lr_scheduler_type in FOLLOWING):
        left_out |= EVALUATION
    kept = {name: value for name, value in values.items() if name not in left_out}
    return json.loads(json.dumps({**kept, "world_size": training_args.world_size}, default=str))


def input_checksums(model, tokenizer, sources, configs=None):
    """What `OutputFolder.start` compares: the model at the start, its bits, the tokenizer, the data.

    sources: {split: {"sha256", ...}}; configs: the bit configs that are trained, where the model's own are not all.
    """
    return {
        "model": model_checksum(model),
        "bits": json_checksum(configs or model.config.bit_config),
        "tokenizer": tokenizer_checksum(tokenizer),
        **{split: source["sha256"] for split, source in sources.items() if split in ("train", "validation")},
    }


def output_dir_lock(folder, shared=False):
    """Keep other runs out of `folder` until the returned file is closed or the process ends, however it ends.

    Raises UserError: another process has it.
    """
    os.makedirs(folder, exist_ok=True)
    file = open(os.path.join(folder, LOCK_FILE), "a+", encoding="utf-8")
    try:
        # Of the process and not of the open file: a worker that was forked from a killed run does not hold it.
        fcntl.lockf(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        raise UserError(
            f"--output_dir {folder}: another run ({file.read().strip() or 'unknown process'}) is writing to it; wait "
            "for it, end it, or choose another --output_dir"
        ) from None
    except OSError as error:
        logger.warning("--output_dir %s: its file system has no locks (%s): keep other runs out of it", folder, error)
    if not shared:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
    return file


def run_lock(folder):
    """`output_dir_lock`, by rank 0 for all processes of the run; kept as long as the returned list lives."""
    held = []
    on_rank_zero(lambda: held.append(output_dir_lock(folder)))
    return held


def on_rank_zero(function):
    """function() of rank 0, on every rank. What it refuses ends all of them, with one message."""
    state, result = PartialState(), None
    if state.is_main_process:
        try:
            result = function(), None
        except (UserError, OSError) as error:
            result = None, error
    value, error = broadcast_object_list([result])[0]
    if error is not None:
        raise error if state.is_main_process else SystemExit(1)
    return value


def remove_left_overs(folder):
    """Remove what killed saves of ours left in an output folder and in its checkpoints."""
    checkpoints = [os.path.join(folder, name) for name in os.listdir(folder) if CHECKPOINT.fullmatch(name)]
    for place in [folder, *filter(os.path.isdir, checkpoints)]:
        for name in filter(LEFT_OVER.fullmatch, os.listdir(place)):
            path = os.path.join(place, name)
            shutil.rmtree(path) if os.path.isdir(path) else os.remove(path)


class OutputFolder:
    """The output folder of one run, kept for it until the object goes.

    `checkpoint`: what to resume from, or None. `finished`: the training is done, its model lies in the folder.
    overwrite: start over in a used folder, where `start` deletes the checkpoints; settings: of `run_settings`, not
    read without --do_train. Raises UserError: the folder is in use, holds something else or another run, or has
    nothing to resume from.
    """

    def __init__(self, training_args, overwrite, settings):
        self.path, self.overwrite, self.settings = training_args.output_dir, overwrite, settings
        self._settings_file = os.path.join(self.path, SETTINGS_FILE)
        self._weights_file = os.path.join(self.path, "model.safetensors")
        self.trains, self.world_size = training_args.do_train, training_args.world_size
        asked = training_args.resume_from_checkpoint
        self.asked = None if str(asked) in ("None", "True", "true", "False", "false") else asked
        self._lock, self._origin = None, {}
        self.checkpoint, self.finished, self.before = on_rank_zero(self._claim)
        if self._lock is None:  # every process of the run: one may outlive rank 0
            self._lock = output_dir_lock(self.path, shared=True)

    @property
    def continues(self):
        """What the run goes on from, for its record: None, a checkpoint, or "finished training"."""
        return "finished training" if self.finished else self.checkpoint and os.path.relpath(self.checkpoint)

    @property
    def trained_on(self):
        """For its record: {"parts": [{"from", "git", "device", ...} of each call of the training], "metrics"}."""
        if not self.trains or self.before is None:
            return None
        return {"parts": self.before.get("parts"), "metrics": self.before.get("train_metrics")}

    @property
    def weights_folder(self):
        """Folder of the weights that a training goes on from or has ended with; None at its start."""
        return self.path if self.finished else self.checkpoint

    def _claim(self):
        """(checkpoint, finished, settings of the run before), with the folder shared with the other processes."""
        self._lock = output_dir_lock(self.path)
        found = self._find_start()
        with contextlib.suppress(OSError):  # the same file: closing a second one would end the lock
            fcntl.lockf(self._lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return found

    def _find_start(self):
        if not self.trains:
            return None, False, None
        if self.asked and self.overwrite:
            raise UserError("--resume_from_checkpoint and --overwrite_output_dir contradict each other")
        before = None
        content = [name for name in os.listdir(self.path) if name != LOCK_FILE and not LEFT_OVER.fullmatch(name)]
        if content and not self.overwrite:
            before = self._read_settings(content)
            self._refuse_changes(before, self.settings)
        remove_left_overs(self.path)
        if self.asked and (fault := resume_fault(self.asked, self.world_size, sealed=False)):
            raise UserError(f"--resume_from_checkpoint {self.asked}: {fault}")
        if self.asked:
            self._origin = self._settings_of(self.asked)
            self._refuse_other_origin(self.settings)
        if self.asked or before is None:
            return self.asked, False, before
        if self._is_finished(before):
            logger.info("%s: the training is finished; nothing is trained", self.path)
            return None, True, before
        checkpoint = self._newest_checkpoint()
        logger.info("resuming from %s", checkpoint or "the start: no checkpoint was finished")
        return checkpoint, False, before

    def _read_settings(self, content):
        cure = f"{START_OVER}, or another --output_dir"
        if SETTINGS_FILE not in content:
            raise UserError(f"--output_dir {self.path} is not empty and holds no training of this script: {cure}")
        try:
            return load_state(self._settings_file)
        except UserError as error:
            raise UserError(f"{error}; this run cannot be told from another: {cure}") from None

    def _refuse_changes(self, before, now):
        if changed := differences({key: before.get(key, YOUNGER.get(key)) for key in now}, now):
            found = f"--output_dir {self.path} holds a run with other settings ({'; '.join(changed)})"
            raise UserError(f"{found}: {START_OVER}, or another --output_dir")

    def _settings_of(self, checkpoint):
        """Of the run that a checkpoint is of; {} where it has none."""
        path = os.path.join(os.path.dirname(os.path.abspath(checkpoint)), SETTINGS_FILE)
        return load_state(path) if os.path.isfile(path) else {}

    def _refuse_other_origin(self, now):
        before = {key: self._origin.get(key, YOUNGER.get(key)) for key in now.keys() - LONGER} if self._origin else {}
        if changed := differences(before, {key: now[key] for key in sorted(before)}):
            raise UserError(f"--resume_from_checkpoint {self.asked} is of other settings ({'; '.join(changed)})")

    def _is_finished(self, before):
        if not before.get("finished"):
            return False
        whole = os.path.isfile(self._weights_file) and file_checksum(self._weights_file) == before["finished"]
        if not whole:
            logger.warning("%s: missing or damaged, though the training is finished", self._weights_file)
        return whole

    def _newest_checkpoint(self):
        """The newest checkpoint that is whole, None where a killed run finished none."""
        steps = sorted(int(match[1]) for match in map(CHECKPOINT.fullmatch, os.listdir(self.path)) if match)
        faults = []
        for path in (os.path.join(self.path, f"checkpoint-{step}") for step in reversed(steps)):
            if (fault := resume_fault(path, self.world_size)) is None:
                return path
            logger.warning("%s is left out: %s", path, fault)
            if os.path.isfile(os.path.join(path, MANIFEST_FILE)):
                faults.append(f"{path}: {fault}")
        if faults:
            cure = f"{START_OVER}, which deletes them, or another --output_dir"
            raise UserError(f"no checkpoint to resume from ({'; '.join(faults)}): {cure}")
        return None

    def start(self, **inputs):
        """Refuse other inputs than those of the run before; else the run begins, and the folder is its own.

        inputs: of `input_checksums`.
        """
        on_rank_zero(lambda: self._start(inputs))

    def _start(self, inputs):
        if "eval_steps" not in self.settings:
            inputs.pop("validation", None)
        self._refuse_other_origin(inputs)
        part = {"from": self.checkpoint and os.path.relpath(self.checkpoint), **surroundings()}
        if self.before is not None:
            self._refuse_changes(self.before, inputs)
            if not self.finished:
                self.before.setdefault("parts", [None] if self.checkpoint else []).append(part)  # None: not noted
                write_state(self._settings_file, self.before)
            return
        for name in os.listdir(self.path) if self.overwrite else ():
            if CHECKPOINT.fullmatch(name):
                shutil.rmtree(os.path.join(self.path, name))
        self.before = {**self.settings, **inputs, "parts": [part]}
        write_state(self._settings_file, self.before)

    def finish(self, metrics):
        """The model that was saved in the folder is what the training ended with. metrics: of the training."""
        self.before["train_metrics"] = metrics
        self.before["finished"] = file_checksum(self._weights_file)
        write_state(self._settings_file, self.before)


def seal(checkpoint):
    """Bring a checkpoint to the disk, then write the list of its files with their checksums: it is whole from now."""
    files = {}
    for name in sorted(set(os.listdir(checkpoint)) - {INCOMPLETE}):
        path = os.path.join(checkpoint, name)
        sync(path)
        files[name] = file_checksum(path)
    write_state(os.path.join(checkpoint, MANIFEST_FILE), {"files": files})


def resume_fault(checkpoint, world_size, sealed=True):
    """Why a training of `world_size` processes cannot resume from a checkpoint; None where it can.

    Without `sealed`, a checkpoint of earlier versions of this code, which had no list of files, is taken as it is.
    """
    if not os.path.isdir(checkpoint):
        return "no such folder"
    states = ["rng_state.pth"] if world_size == 1 else [f"rng_state_{rank}.pth" for rank in range(world_size)]
    needed = ["config.json", "model.safetensors", "optimizer.pt", "scheduler.pt", *states, "trainer_state.json"]
    manifest = os.path.join(checkpoint, MANIFEST_FILE)
    if not os.path.exists(manifest):
        lacking = [name for name in needed if not os.path.isfile(os.path.join(checkpoint, name))]
        if sealed or lacking:
            return f"not written to its end ({', '.join(lacking) or MANIFEST_FILE} is missing)"
        return None
    try:
        files = load_state(manifest)["files"]
    except UserError as error:
        return str(error)
    if "optimizer.pt" not in files:
        return "it has no optimizer state (--save_only_model)"
    if lacking := [name for name in needed if name not in files]:
        return f"{', '.join(lacking)} is missing: it is of a run with another number of processes"
    for name, checksum in files.items():
        path = os.path.join(checkpoint, name)
        if not os.path.isfile(path):
            return f"{name} is missing"
        if file_checksum(path) != checksum:
            return f"{name} is damaged: not the bytes that were saved"
    return None

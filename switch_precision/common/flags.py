"""The door of all flags: from a command line or one JSON file, checked before anything is loaded."""

import json
import math
import os
import sys
import tempfile
from dataclasses import fields

from transformers import HfArgumentParser, TrainingArguments
from transformers.integrations import get_available_reporting_integrations

from common.training_args import refuse_processes
from models.bit_config import ALLOWED_BITS, ALLOWED_TEXT
from models.checkpoint_rules import QUANTIZERS
from models.errors import UserError
from models.nf4 import METHOD as NF4
from models.user_input import read_json, show

NAME_MAX = 255  # bytes of a file's name, on all common file systems
POSITIVE = (
    "max_seq_length n_best_size max_answer_length max_train_samples max_eval_samples max_predict_samples lora_r "
    "lora_alpha preprocessing_num_workers per_device_train_batch_size per_device_eval_batch_size num_train_epochs "
    "gradient_accumulation_steps eval_accumulation_steps average_bits weight_mb bitops average_a_bits average_kv_bits "
    "chunk_batches range_test_steps calibration_samples"
).split()
NOT_NEGATIVE = (
    "doc_stride num_bootstrap num_gradient_batches num_random refine_rounds learning_rate weight_decay max_grad_norm "
    "adam_epsilon warmup_steps dataloader_num_workers eval_delay range_test_threshold"
).split()
FRACTIONS = ("adam_beta1", "adam_beta2", "label_smoothing_factor")  # below 1
CHOICES = {
    "execution": ("integer", "fake"),
    "backward_dtype": ("fp32", "bf16"),
    "measure_split": ("validation", "train"),
    "quantizer": QUANTIZERS,
    "base_quantization": (NF4,),
}
WIDTHS = ("bit_widths", "eval_bit_widths", "fixed_bits")


def parse_args(*dataclass_types):
    """One instance of each dataclass, from the command line or from one JSON file. Raises UserError for any fault."""
    if not any(issubclass(kind, TrainingArguments) for kind in dataclass_types):
        refuse_processes()
    source, words = "", sys.argv[1:]
    if from_file := len(words) == 1 and words[0].endswith(".json"):
        source, words = f"{words[0]}: ", words_of(read_json(words[0]), words[0])
    parser = HfArgumentParser(dataclass_types, allow_abbrev=not from_file)

    def fail(message):
        raise UserError(message)

    parser.error = fail  # one line: argparse would print the usage of some two hundred flags before it
    try:
        groups = parser.parse_args_into_dataclasses(words)
        check_flags(*groups)
    except (ValueError, TypeError, ImportError) as error:  # of the flags themselves: nothing has run yet
        raise UserError(f"{source}{error}") from error
    return groups


def words_of(content, path):
    """The command line that says the same as a JSON file of flags; null is a flag's default."""
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object of flags and values, found {type(content).__name__}")
    words = []
    for key, value in content.items():
        if isinstance(value, list):
            words += [f"--{key}", *map(_word, value)]
        elif value is not None:
            words.append(f"--{key}={_word(value)}")
    return words


def _word(value):
    return value if isinstance(value, str) else json.dumps(value)


def check_flags(*groups):
    """Refuse numbers, choices, packages and output paths that cannot work. groups: dataclasses of flags."""
    flags = {field.name: (group, getattr(group, field.name)) for group in groups for field in fields(group)}
    for name, (group, value) in flags.items():
        if value is None:
            continue
        if isinstance(value, float) and not math.isfinite(value) and not (name == "max_grad_norm" and value > 0):
            refuse(name, value, "a number that is finite")
        if name in POSITIVE and value <= 0:
            refuse(name, value, "a number above 0")
        if name in NOT_NEGATIVE and value < 0:
            refuse(name, value, "0 or more")
        if name in FRACTIONS and not 0 <= value < 1:
            refuse(name, value, "0 or more, and below 1")
        if name == "max_steps" and isinstance(group, TrainingArguments) and value < 1 and value != -1:
            refuse(name, value, "1 or more, or -1 for --num_train_epochs")
        if name in ("seed", "data_seed") and not 0 <= value < 2**32:
            refuse(name, value, "0 to 2**32 - 1")
        if name in CHOICES and value not in CHOICES[name]:
            raise UserError(f"--{name} {value[:80]}: allowed are {', '.join(CHOICES[name])}")
        widths = (value if isinstance(value, list) else [value]) if name in WIDTHS else ()
        for bits in widths:
            if isinstance(bits, int) and bits not in ALLOWED_BITS:  # search.py's are names of configs
                shown = " ".join(map(str, widths))
                raise UserError(f"--{name} {shown}: {bits} is not a bit-width, allowed are {ALLOWED_TEXT}")
        if name == "report_to":
            installed = get_available_reporting_integrations()
            for tracker in set(value) - set(installed):
                refuse(name, tracker, f"none, or what is installed ({', '.join(installed) or 'nothing'})")
        if name == "output_dir" or (name in ("record_file", "output") and value):
            check_output(name, value, folder=name == "output_dir")
    if "doc_stride" in flags and flags["doc_stride"][1] >= flags["max_seq_length"][1]:
        refuse("doc_stride", flags["doc_stride"][1], f"less than --max_seq_length {flags['max_seq_length'][1]}")


def refuse(name, value, allowed):
    """Raise the error of a flag."""
    raise UserError(f"--{name} {value if isinstance(value, int | float) else show(value)}: must be {allowed}")


def check_output(name, path, folder=False):
    """Refuse an output path that cannot be written: a file for a folder, no permission, a name that is too long."""
    if not path or "\0" in path:
        refuse(name, path, "a path")
    if folder and os.path.lexists(path) and not os.path.isdir(path):
        raise UserError(f"--{name} {path}: is a file; allowed is a folder, there or not")
    if not folder and os.path.isdir(path):
        raise UserError(f"--{name} {path}: is a folder; allowed is a file")
    check_file_name(f"--{name}", path if folder else f"{path}.{os.getpid()}.tmp")
    there = path if folder else os.path.dirname(path) or "."
    while not os.path.lexists(there):
        there = os.path.dirname(there.rstrip(os.sep)) or "."
    try:
        with tempfile.TemporaryFile(dir=there):  # asks the file system itself: permission bits do not tell all
            pass
    except OSError as error:
        raise UserError(f"--{name} {path}: cannot be written there ({error.strerror}: {there})") from None


def check_file_name(what, path):
    """Refuse a path with a part that no file system takes."""
    if longest := [part for part in path.split(os.sep) if len(os.fsencode(part)) > NAME_MAX]:
        raise UserError(
            f"{what} {show(longest[0])}: a name of {len(os.fsencode(longest[0]))} bytes; allowed are {NAME_MAX}"
        )

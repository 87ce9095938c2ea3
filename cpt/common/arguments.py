"""Flags that several scripts have, each with its help text."""

import dataclasses


def option(default, text, **kwargs):
    """A dataclass field with a help text."""
    aliases = {"aliases": kwargs.pop("aliases")} if "aliases" in kwargs else {}
    factory = {"default_factory": lambda: default} if isinstance(default, list) else {"default": default}
    return dataclasses.field(**factory, metadata={"help": text.replace("%", "%%"), **aliases}, **kwargs)


EXECUTION = (
    "how layers with W and A of at most 8 bits compute: integer (int8 products) or fake (quantized values in float)"
)


@dataclasses.dataclass
class HubArguments:
    """Where a model and its tokenizer come from."""

    model_name_or_path: str = option("gpt2", "hub name or folder: stock GPT-2 weights, or a checkpoint of ours")
    base_model_name_or_path: str | None = option(None, "where the frozen base of an adapter checkpoint lies, if moved")
    tokenizer_name: str | None = option(None, "tokenizer, if it is not the model's")
    cache_dir: str | None = option(None, "cache of hub downloads")
    model_revision: str = option("main", "branch, tag or commit on the hub")
    token: str | None = option(None, "hub token (default: the one of `hf auth login`)")
    attn_implementation: str | None = option(None, "eager, sdpa or another attention of transformers")
    quantizer: str | None = option(
        None,
        "minmax (as published) or rotated (balanced rotation, which spreads outlier channels); default: that of the "
        "checkpoint, minmax for stock weights; rotated needs training data to calibrate where the checkpoint has none",
    )
    calibration_samples: int = option(256, "training windows that the rotated quantizer is calibrated on")


@dataclasses.dataclass
class ModelArguments(HubArguments):
    """A model that trains, with its adapters."""

    lora_r: int | None = option(None, "rank of the adapters (default: 8, or that of the checkpoint)")
    lora_alpha: int | None = option(None, "scaling is lora_alpha / lora_r (default: 16, or that of the checkpoint)")
    execution: str | None = option(None, f"{EXECUTION}; default: fake in training, integer in evaluation")
    backward_dtype: str = option("fp32", "backward products with frozen quantized weights: fp32 or bf16")


@dataclasses.dataclass
class CheckpointArguments(HubArguments):
    """A trained model that is evaluated."""

    model_name_or_path: str = dataclasses.field(kw_only=True, metadata={"help": "checkpoint, or stock GPT-2 weights"})
    execution: str = option("integer", f"{EXECUTION}; codes are the same, sums agree to float rounding")


@dataclasses.dataclass
class DataTrainingArguments:
    """The data, the features and the answers."""

    dataset_name: str | None = option(None, "hub data set in SQuAD's format, for example squad")
    dataset_config_name: str | None = option(None, "its configuration")
    train_file: str | None = option(None, "local training data: official nested SQuAD JSON, or flat rows")
    validation_file: str | None = option(None, "local validation data, same forms")
    test_file: str | None = option(None, "local data for --do_predict, same forms")
    overwrite_cache: bool = option(False, "build the features anew instead of taking them from the datasets cache")
    overwrite_output_dir: bool = option(False, "start over in a used --output_dir; deletes its checkpoints")
    preprocessing_num_workers: int | None = option(None, "processes that build the features")
    max_seq_length: int = option(786, "tokens of question, separator and context together; longer contexts are split")
    doc_stride: int = option(128, "tokens that two windows of a long context share")
    question_separator: str = option(
        "\\n", "text between question and context (backslash escapes are read: '\\n', '' for none)"
    )
    pad_to_max_length: bool = option(False, "pad to max_seq_length instead of the longest of the batch (same metrics)")
    max_train_samples: int | None = option(None, "use only so many training questions (quick tests)")
    max_eval_samples: int | None = option(None, "use only so many validation questions")
    max_predict_samples: int | None = option(None, "use only so many questions for --do_predict")
    n_best_size: int = option(20, "candidate answers kept in the n-best file")
    max_answer_length: int = option(30, "tokens of an answer, at most")
    version_2_with_negative: bool = option(False, "SQuAD v2: some questions have no answer (an empty list of answers)")
    null_score_diff_threshold: float = option(
        0.0, "v2: no answer where its score is greater than that of the best span by more than this"
    )
    record_file: str | None = option(None, "where the run's JSON record goes (default: record.json in --output_dir)")

    @property
    def null_threshold(self):
        """--null_score_diff_threshold, None for v1.1."""
        return self.null_score_diff_threshold if self.version_2_with_negative else None

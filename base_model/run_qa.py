#!/usr/bin/env python
"""Fine-tune and evaluate GPT-2 on SQuAD: full precision, LoRA, one static bit-width config, post-training.

    python run_qa.py --model_name_or_path gpt2 --dataset_name squad --do_train --do_eval --output_dir results/fp32
    bash train.sh --bit_widths 4          # LoRA at W4A4KV4, all GPUs, the published hyper-parameters
    bash train.sh --add_lora --base_quantization nf4                         # QLoRA
    MODEL=results/fp32 BIT_CONFIG=../configs/uniform_8.json bash eval.sh     # post-training quantization

What is trained: everything without --add_lora / --bit_widths / --bit_config; with one of them the adapters and the QA
head, on a frozen base. The flags are those of Hugging Face's question-answering example plus ours; `--help` lists
them, and one JSON file with the same keys may stand in their place. Data: SQuAD v1.1, or v2 under its flag.
"""

import dataclasses
import time

from transformers import set_seed

from common import arguments
from common.arguments import DataTrainingArguments, option
from common.data import load_features, set_qa_quantizer, trainer_arguments
from common.flags import parse_args
from common.loading import describe_model, load_tokenizer, open_model
from common.record import write_run_record
from common.resuming import OutputFolder, input_checksums, run_settings
from common.script import plain_errors, setup_logging
from common.training_args import TrainingArguments
from models.bit_config import short_name
from models.bitsandbytes_ptq import LABELS, METHODS, quantize_with_bitsandbytes
from models.errors import UserError
from models.modeling_gpt2_quant import QuantGPT2ForQuestionAnswering
from models.peft_adapter import start_lora
from trainer_qa import QuestionAnsweringTrainer


@dataclasses.dataclass
class ModelArguments(arguments.ModelArguments):
    """The model, its adapters and its bits."""

    add_lora: bool = option(False, "LoRA without quantized training: one shared adapter, which serves any bits later")
    from_peft: str | None = option(None, "folder of a peft adapter (LoRA) that the adapters and the head start from")
    bit_widths: list[int] | None = option(None, "static width of W, A and KV, trained with LoRA (here one: 2 to 8)")
    bit_config: str | None = option(
        None,
        'per-layer bits: JSON file (configs/README.md), "W4A8KV8", or a width as 8; training: static, with LoRA; '
        "evaluation: PTQ",
        aliases=["--sp_config_path"],
    )
    base_quantization: str | None = option(
        None, "nf4: training with --add_lora beside a frozen base in 4 bits (QLoRA); checkpoints remember it"
    )
    bitsandbytes: str | None = option(
        None, "evaluate with the linears quantized by bitsandbytes: 8bit or nf4", aliases=["--bnb"]
    )


def check_args(model_args, data_args, training_args):
    """Refuse what cannot work, before anything is loaded."""
    if not (training_args.do_train or training_args.do_eval or training_args.do_predict):
        raise UserError("nothing to do: pass --do_train, --do_eval or --do_predict")
    if model_args.bit_widths and model_args.bit_config:
        raise UserError("--bit_widths and --bit_config both say the bits: pass one of them")
    if model_args.bit_widths and len(model_args.bit_widths) > 1:
        raise UserError(
            f"--bit_widths {' '.join(map(str, model_args.bit_widths))}: base_model trains one static width; "
            "several at once are trained in switch_precision"
        )
    if model_args.from_peft and not (model_args.add_lora or model_args.bit_widths or model_args.bit_config):
        raise UserError(f"--from_peft {model_args.from_peft}: pass --add_lora, --bit_widths or --bit_config with it")
    if model_args.bitsandbytes not in (None, *METHODS):
        raise UserError(f"--bitsandbytes {model_args.bitsandbytes}: allowed are {', '.join(METHODS)}")
    ours = model_args.bit_widths or model_args.bit_config or model_args.quantizer
    if model_args.bitsandbytes and (training_args.do_train or ours):
        why = "is quantization after training: no --do_train, no bits and no --quantizer of ours"
        raise UserError(f"--bitsandbytes {why}")
    if model_args.base_quantization:
        flag = f"--base_quantization {model_args.base_quantization}"
        if not training_args.do_train:
            raise UserError(f"{flag} is for --do_train: checkpoints remember it; --bitsandbytes nf4 evaluates others")
        if model_args.bit_widths or model_args.bit_config or model_args.quantizer == "rotated":
            raise UserError(f"{flag} is the only quantization of a run: no bits, and no rotated quantizer")
        if not model_args.add_lora:
            raise UserError(f"{flag}: a base in 4 bits does not train; pass --add_lora")


def build_model(model_args, training, tokenizer):
    """The model with its adapters and bits set."""
    model = open_model(QuantGPT2ForQuestionAnswering, model_args, tokenizer, training)
    if model_args.from_peft and (model.config.lora_bank or not training):
        start_lora(model, ["shared"], model_args)  # to evaluate it; refuses a model that has adapters
    bits = model_args.bit_config
    if bits is None and model_args.bit_widths:
        bits = model_args.bit_widths[0]
    if bits is not None and (model.config.lora_bank or not training):
        model.set_bit_config(bits)
    elif bits is not None:
        with model.at_bits(bits) as resolved:
            widths = sorted({layer["w_bits"] for layer in resolved.values()})
        start_lora(model, widths, model_args)
        name = short_name(model.set_bit_config(bits))
        # one assignment, whatever widths its bank has: what run_qa_eval.py evaluates when it is not told
        model.config.trained_bit_configs = ["checkpoint" if name == "mixed" else name]
    elif model_args.add_lora and not model.config.lora_bank:
        start_lora(model, ["shared"], model_args)
    if model.config.lora_bank and not model.config.base_model_name_or_path:
        model.set_base(model_args.model_name_or_path)
    if model_args.base_quantization:
        model.quantize_base(model_args.base_quantization)
    model.set_execution(model_args.execution or ("fake" if training else "integer"), model_args.backward_dtype)
    return model


def main():
    start = time.time()
    model_args, data_args, training_args = parse_args(ModelArguments, DataTrainingArguments, TrainingArguments)
    setup_logging(training_args)
    check_args(model_args, data_args, training_args)
    settings = run_settings(model_args, data_args, training_args)
    folder = OutputFolder(training_args, data_args.overwrite_output_dir, settings)
    set_seed(training_args.seed)

    tokenizer = load_tokenizer(model_args)
    model = build_model(model_args, training_args.do_train, tokenizer)
    bits = describe_model(model)
    examples, features, sources = load_features(model, tokenizer, model_args, data_args, training_args)
    data = data_args, training_args, folder, examples.get("train")
    bits |= set_qa_quantizer(model, tokenizer, model_args, *data)
    if training_args.do_train:
        folder.start(**input_checksums(model, tokenizer, sources))
    elif model_args.bitsandbytes:
        quantize_with_bitsandbytes(model, model_args.bitsandbytes)
        bits = {"name": LABELS[model_args.bitsandbytes]}
    else:
        model.keep_only_codes([model.config.bit_config])

    trainer = QuestionAnsweringTrainer(
        **trainer_arguments(model, tokenizer, data_args, training_args, examples, features)
    )
    metrics = trainer.run(folder, examples, features)
    write_run_record(trainer, folder, model_args, data_args, start, bit_config=bits, metrics=metrics, data=sources)


if __name__ == "__main__":
    with plain_errors():
        main()

#!/usr/bin/env python
"""Tune the GPT-2 language model for one or several bit-widths on a text file; perplexity under any number of configs.

    python run_clm.py --model_name_or_path gpt2 --train_file train.txt --validation_file valid.txt --do_train \\
        --do_eval --bit_widths 4 8 --max_steps 1000 --learning_rate 3e-3 --output_dir results/clm
    python run_clm.py --model_name_or_path results/clm --validation_file valid.txt --do_eval \\
        --eval_bit_configs 8 W4A8KV8 ../configs/hybrid_25pct_4bit.json 4 --output_dir results/perplexity
    python run_clm.py --model_name_or_path gpt2 --train_file results/data/texts.jsonl --do_train --objective kd \\
        --train_all_weights --bit_configs W4A8KV4 --learning_rate 2e-5 --output_dir results/llm_qat

Training: one LoRA adapter per width in every linear, base and tied head frozen; --train_all_weights: no adapters, all
weights. Every step runs the same batch at the highest width, the ones between, random per-layer mixtures and the
lowest, and takes one optimizer step on the mean of their losses: cross-entropy, or distillation (--objective kd) from
the model before training at full precision. A killed run resumes when the same command is given again.
Perplexity: sliding windows of --block_size tokens; every token but the text's first is scored once.
"""

import copy
import dataclasses
import functools
import os
import time

import torch
from transformers import default_data_collator, set_seed

from common.arguments import option
from common.calibration import quantizer_label, set_quantizer
from common.checksums import file_checksum, model_checksum
from common.flags import parse_args
from common.loading import describe_model, load_tokenizer, open_model, resolve_configs, trained_configs
from common.record import relative_path, write_run_record, write_text_atomic
from common.resuming import OutputFolder, input_checksums, run_settings
from common.script import plain_errors, setup_logging
from common.step_configs import BankArguments, bit_configs_for_step, check_bank, note_targets, target_configs
from common.trainer import StepMeanTrainer
from common.training_args import TrainingArguments
from losses import next_token_loss, soft_cross_entropy, teacher_states
from models.errors import UserError
from models.modeling_gpt2_quant import QuantGPT2LMHeadModel
from models.quantization import FLOAT_BITS, QUANTIZED_BITS
from perplexity import calibration_blocks, perplexity_of_configs, read_tokens, table_lines

OBJECTIVES = ("ce", "kd")
NO_TEACHER = "a base in 4 bits is no full-precision teacher"


@dataclasses.dataclass
class ModelArguments(BankArguments):
    """The model, what of it is trained, and on what."""

    train_all_weights: bool = option(False, "train all weights at the bits that are given, without adapters")
    objective: str = option("ce", "ce: cross-entropy of the next token; kd: of the teacher's distribution (LLM-QAT)")
    teacher_name_or_path: str | None = option(
        None, "teacher of --objective kd, at 32 bits without adapters (default: --model_name_or_path)"
    )
    base_quantization: str | None = option(
        None, "nf4: training with --bit_widths 32 beside a frozen base in 4 bits (QLoRA); checkpoints remember it"
    )


@dataclasses.dataclass
class TextArguments:
    """The text and the perplexity."""

    train_file: str | None = option(
        None, "UTF-8 text, or .jsonl of generate_data.py, to train (and calibrate --quantizer rotated) on, in blocks"
    )
    validation_file: str | None = option(None, "UTF-8 text whose perplexity is measured")
    block_size: int = option(1024, "tokens of a block or window (at most the model's positions)")
    stride: int | None = option(None, "tokens that each further window scores (default: half of --block_size)")
    eval_bit_configs: list[str] | None = option(
        None, 'JSON files, short forms as W4A8KV8, widths as 8, "checkpoint" (default: what was trained)'
    )
    num_mixed_configs: int = option(1, "random per-layer assignments a step; 0 for uniform widths only")
    overwrite_output_dir: bool = option(False, "start over in a used --output_dir; deletes its checkpoints")
    record_file: str | None = option(None, "where the run's JSON record goes (default: record.json in --output_dir)")


def check_args(model_args, text_args, training_args):
    """Refuse what cannot work, before anything is loaded."""
    if not (training_args.do_train or training_args.do_eval or training_args.do_predict):
        raise UserError("nothing to do: pass --do_train or --do_eval")
    check_bank(model_args)
    if model_args.objective not in OBJECTIVES:
        raise UserError(f"--objective {model_args.objective}: allowed are {', '.join(OBJECTIVES)}")
    if model_args.teacher_name_or_path and model_args.objective != "kd":
        raise UserError("--teacher_name_or_path needs --objective kd")
    if model_args.base_quantization:
        flag = f"--base_quantization {model_args.base_quantization}"
        if not training_args.do_train:
            raise UserError(f"{flag} is for --do_train: a checkpoint remembers it")
        ours = model_args.bit_configs or not set(model_args.bit_widths) <= set(FLOAT_BITS)
        if ours or model_args.quantizer == "rotated":
            raise UserError(f"{flag} is the only quantization of a run: --bit_widths 32, and no rotated quantizer")
        if model_args.train_all_weights:
            raise UserError(f"{flag}: a base in 4 bits does not train: no --train_all_weights")
        if model_args.objective == "kd" and not model_args.teacher_name_or_path:
            raise UserError(f"{flag}: {NO_TEACHER}: pass --teacher_name_or_path")
    if training_args.fsdp or training_args.deepspeed:
        raise UserError("--fsdp and --deepspeed shard the model; here every process needs all of it")
    if training_args.do_predict or training_args.eval_strategy != "no":
        raise UserError("perplexity is measured once, by --do_eval: no --do_predict, no --eval_strategy")
    training_args.refuse_full_eval()
    for flag, file in {"do_train": "train_file", "do_eval": "validation_file"}.items():
        if getattr(training_args, flag) and not getattr(text_args, file):
            raise UserError(f"--{flag} needs --{file}")
    if text_args.num_mixed_configs < 0:
        raise UserError(f"--num_mixed_configs {text_args.num_mixed_configs}: must not be negative")
    if text_args.block_size < 2:
        raise UserError(f"--block_size {text_args.block_size}: at least 2 tokens, one to read and one to predict")
    if text_args.stride is not None and not 1 <= text_args.stride <= text_args.block_size:
        raise UserError(f"--stride {text_args.stride}: 1 to --block_size {text_args.block_size}")


class JointLMTrainer(StepMeanTrainer):
    """One optimizer step on the mean loss of all configs of the step; each is sent backward at once.

    Args:
        sampler: step -> [(name, resolved config)]; resting: the config that checkpoints are saved with.
        teacher: model to distil from, which may be the one that trains; None: cross-entropy.
    """

    def __init__(self, *args, sampler, resting, teacher=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.sampler, self.resting, self.passes = sampler, resting, 1
        self.teacher = teacher and teacher.to(self.args.device)  # no part of the model: train() does not reach it
        self.half = torch.bfloat16 if self.args.bf16 else torch.float32  # of the head, which works outside autocast
        self.teacher_head = teacher and self.teacher.lm_head.weight.detach().to(self.half)

    def training_step(self, model, inputs, num_items_in_batch=None):
        net, losses = self.accelerator.unwrap_model(model), []
        configs = self.sampler(self.state.global_step)
        self.passes, inputs = len(configs), self._prepare_inputs(inputs)
        if self.teacher is not None:
            inputs["teacher_hidden"] = teacher_states(self.teacher, inputs["input_ids"], self.half)
        for _, config in configs:
            net.set_bit_config(config)
            losses.append(super().training_step(model, dict(inputs)))
            self.stop_unless_finite(losses[-1])
        net.set_bit_config(self.resting)
        return torch.stack(losses).sum()

    def mean_loss(self, model, inputs):
        ids, head = inputs["input_ids"], self.accelerator.unwrap_model(model).lm_head.weight.to(self.half)
        # All of the model but the head, whose logits are never held as a whole, through the wrapper of processes.
        output = model(input_ids=ids, use_cache=False, output_hidden_states=True, logits_to_keep=1)
        hidden = output.hidden_states[-1].to(self.half)
        if self.teacher is None:
            return next_token_loss(hidden, head, ids) / self.passes, output
        teacher_hidden = inputs["teacher_hidden"].to(self.half).flatten(0, 1)
        loss = soft_cross_entropy(hidden.flatten(0, 1), head, teacher_hidden, self.teacher_head)
        return loss / self.passes, output


def build_model(model_args, training_args, tokenizer):
    """(model, [(name, resolved config)] to train, highest first; the bank is made for these if there is none)."""
    model, targets = open_model(QuantGPT2LMHeadModel, model_args, tokenizer, training_args.do_train), []
    if training_args.do_train:
        targets = target_configs(model_args, model.layer_shapes())
        if model_args.train_all_weights:
            prepare_all_weights(model, model_args.model_name_or_path, targets)
        elif not model.config.lora_bank:
            widths = {layer["w_bits"] for _, config in targets for layer in config.values()}
            model.add_lora(sorted(widths), model_args.lora_r, model_args.lora_alpha)
        if model_args.bit_configs or model_args.train_all_weights:
            note_targets(model, targets)
        for _, config in reversed(targets):
            model.set_bit_config(config)  # refuses what the bank of a checkpoint has no adapter for
        if model.config.lora_bank and not model.config.base_model_name_or_path:
            model.set_base(model_args.model_name_or_path)
        if model_args.base_quantization:
            model.quantize_base(model_args.base_quantization)
    execution = model_args.execution or ("fake" if training_args.do_train else "integer")
    model.set_execution(execution, model_args.backward_dtype)
    return model, targets


def prepare_all_weights(model, name, targets):
    """Have all weights of a model without adapters train at the configs `targets`."""
    if model.config.lora_bank:
        raise UserError(f"--train_all_weights: {name} has adapters on a frozen base: start from the base")
    config, layers = model.config, model.quant_layers().values()
    config.trained_weights = any(bits["w_bits"] in QUANTIZED_BITS for _, c in targets for bits in c.values())
    for layer in layers:
        layer.trained = config.trained_weights


def find_teacher(model, model_args, tokenizer, block_size):
    """What --objective kd distils from: a frozen copy of a model whose weights all train, the model itself where its
    base is frozen, or --teacher_name_or_path; None without distillation."""
    name = model_args.teacher_name_or_path
    if model_args.objective != "kd":
        return None
    if name is None and model.config.base_quantization:
        raise UserError(f"--objective kd: {NO_TEACHER}: pass --teacher_name_or_path")
    if name is None:
        return copy.deepcopy(model).requires_grad_(False) if model_args.train_all_weights else model
    own = {"base_model_name_or_path": None, "lora_r": None, "lora_alpha": None}
    options = dataclasses.replace(model_args, model_name_or_path=name, **own)
    teacher = open_model(QuantGPT2LMHeadModel, options, tokenizer, training=True).requires_grad_(False)
    vocabulary, positions = teacher.config.vocab_size, teacher.config.n_positions
    if vocabulary != model.config.vocab_size:
        found = f"a vocabulary of {vocabulary}, but that of the student is {model.config.vocab_size}"
        raise UserError(f"--teacher_name_or_path {name}: {found}")
    if teacher.config.base_quantization:
        raise UserError(f"--teacher_name_or_path {name}: {NO_TEACHER}")
    own = load_tokenizer(dataclasses.replace(options, tokenizer_name=None))
    if own.get_vocab() != tokenizer.get_vocab():
        raise UserError(f"--teacher_name_or_path {name}: its tokenizer has other tokens than that of the student")
    if positions < block_size:
        raise UserError(f"--teacher_name_or_path {name}: {positions} positions, fewer than a block of {block_size}")
    return teacher


def load_texts(text_args, training_args, tokenizer, block_size):
    """({split: tokens}, {split: source, tokens and checksum}) of the splits that the run reads."""
    files = {"train": text_args.train_file} if training_args.do_train else {}
    files |= {"validation": text_args.validation_file} if training_args.do_eval else {}
    texts, sources = {}, {}
    for split, file in files.items():
        texts[split] = read_tokens(file, tokenizer, block_size if split == "train" else 2)
        checksum = file_checksum(file)
        sources[split] = {"source": relative_path(file), "examples": len(texts[split]), "sha256": checksum}
    return texts, sources


def make_trainer(model, teacher, tokenizer, targets, train_blocks, model_args, text_args, training_args):
    passes = {"num_mixed_configs": text_args.num_mixed_configs, "sample_widths": max(len(targets) - 2, 0)}
    passes |= {"bit_widths": model_args.bit_widths, "explicit": targets if model_args.bit_configs else None}
    sampler = functools.partial(bit_configs_for_step, seed=training_args.seed, layers=model.layer_shapes(), **passes)
    return JointLMTrainer(
        model=model,
        args=training_args,
        train_dataset=[{"input_ids": block} for block in train_blocks],
        data_collator=default_data_collator,
        processing_class=tokenizer,
        sampler=sampler,
        teacher=teacher,
        resting=model.config.bit_config,
    )


def evaluate(model, configs, quantizer, tokens, block_size, stride, training_args):
    """Rows of the table of perplexities, which is printed and written to table.md."""
    half = torch.bfloat16 if training_args.bf16 else torch.float16 if training_args.fp16 else None
    sizes = block_size, stride, training_args.per_device_eval_batch_size
    rows = perplexity_of_configs(model, configs, quantizer_label(quantizer), tokens, *sizes, half)
    lines = table_lines(rows)
    print(*lines, sep="\n", flush=True)
    write_text_atomic(os.path.join(training_args.output_dir, "table.md"), "\n".join(lines) + "\n")
    return rows


def main():
    start = time.time()
    model_args, text_args, training_args = groups = parse_args(ModelArguments, TextArguments, TrainingArguments)
    setup_logging(training_args)
    check_args(model_args, text_args, training_args)
    folder = OutputFolder(training_args, text_args.overwrite_output_dir, run_settings(*groups))
    set_seed(training_args.seed)

    tokenizer = load_tokenizer(model_args)
    model, targets = build_model(model_args, training_args, tokenizer)
    configs = dict(targets)
    if text_args.eval_bit_configs or not targets:
        configs = resolve_configs(model, text_args.eval_bit_configs or trained_configs(model))
    block_size = min(text_args.block_size, model.config.n_positions)
    stride = min(text_args.stride or block_size // 2, block_size)
    teacher = find_teacher(model, model_args, tokenizer, block_size) if training_args.do_train else None
    texts, sources = load_texts(text_args, training_args, tokenizer, block_size)

    samples = block_size, model_args.calibration_samples, training_args.seed
    windows = functools.partial(calibration_blocks, text_args.train_file, tokenizer, *samples)

    quantizer = set_quantizer(model, model_args, training_args.seed, windows, folder.weights_folder)
    bits = describe_model(model) | quantizer
    if training_args.do_train:
        other = {"teacher": model_checksum(teacher)} if model_args.teacher_name_or_path else {}
        folder.start(**input_checksums(model, tokenizer, sources), **other)

    # consecutive, without the rest at the end of the text
    train_blocks = texts["train"].unfold(0, block_size, block_size) if training_args.do_train else []
    trainer = make_trainer(model, teacher, tokenizer, targets, train_blocks, model_args, text_args, training_args)
    metrics, rows = trainer.train_or_load(folder) if training_args.do_train else {}, []
    if not trainer.is_world_process_zero():
        return
    if training_args.do_eval:
        net = trainer.accelerator.unwrap_model(trainer.model).requires_grad_(False)  # codes of frozen weights are kept
        rows = evaluate(net, configs, quantizer, texts["validation"], block_size, stride, training_args)
        metrics = metrics | {f"eval_perplexity_{row['config']}": row["perplexity"] for row in rows}
    details = {"bit_config": bits, "metrics": metrics, "data": sources, "rows": rows}
    details |= {"bit_configs": {"trained": dict(targets), "evaluated": configs if rows else {}}}
    details |= {"text": {"unit": "tokens", "block_size": block_size, "stride": stride}}
    if training_args.do_train:
        trains = "all weights" if model_args.train_all_weights else "adapters"
        details |= {"training": {"trains": trains, "objective": model_args.objective}}
    write_run_record(trainer, folder, model_args, text_args, start, **details)


if __name__ == "__main__":
    with plain_errors():
        main()

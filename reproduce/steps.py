"""The steps of the protocol: one command each, whatever the scale.

{own} is the step's folder, {record} its record, {seed} its seed; {lora_fp32} is the folder of that step, and
{lora_fp32_record} its record. {work}, {model}, {classifier_model}, {train_file}, {validation_file} and {hybrid} stand
in the settings; {+name} are its flags of that name, nothing where it has none. An upper-case name is an environment
variable.
"""

DATA = "TRAIN_FILE={train_file} VALIDATION_FILE={validation_file} OUTPUT_DIR={own}"
END = "--seed {seed} --record_file {record}"


def pretrain(flags):
    return f"TOKENIZERS_PARALLELISM=true python3 reproduce/make_small_gpt2.py --output_dir {{own}} {flags} {END}"


def qa(script, model, *flags):
    return f"{DATA} MODEL={{{model}}} bash {script} {' '.join(flags)} {{+common}} {END}"


def train(folder, *flags):
    return qa(f"{folder}/train.sh", "model", "{+training}", *flags)


def post_training(bits, quantizer):
    return qa("base_model/eval.sh", "lora_fp32", f"--bit_config {bits}", f"--quantizer {quantizer}")


def served(training, widths, folder="switch_precision"):
    flag = "--eval_bit_widths" if folder == "cpt" else "--bit_configs"
    return qa(f"{folder}/eval.sh", training, flag, widths)


def adversarial(script, model, *flags):
    own = f"TRAIN_FILE= VALIDATION_FILE= OUTPUT_DIR={{own}} MODEL={{{model}}}"  # not SQuAD's files
    return f"{own} bash adv_attack/{script} {{+topics}} {' '.join(flags)} {END}"


def language_model(script, *flags):
    return f"{DATA} MODEL={{model}} bash language_model/{script} {' '.join(flags)} {{+common}} {END}"


def sized(size, script, *flags):
    """A command of language_model with a model of one of two sizes, pretrained here."""
    return language_model(script, *flags).replace("MODEL={model}", f"MODEL={{lm_pretrain_{size}}}")


def lm_training(trains, objective, text, quantizer, bits):
    """A training of language_model at one config. text: "text" or "generated"."""
    command = language_model(
        *("train.sh", f"--bit_configs {bits} --quantizer {quantizer} --objective {objective}"),
        *(["--train_all_weights"] if trains == "qat" else []),
        *("{+training}", "{+full}" if trains == "qat" else ""),
    )
    return command if text == "text" else command.replace("{train_file}", "{lm_generate}/texts.jsonl")


def pgd_matrix(training, *data):
    command = f"python3 adv_attack/pgd_matrix.py --model_name_or_path {{{training}}} {' '.join(data)}"
    return f"{command} {{+pgd}} --output_dir {{own}} {END}"


QUANTIZERS = ("minmax", "rotated")
SIZES = {"large": "W4A8KV8", "half": "W8A8KV8"}  # half of the blocks: as many bytes in the linears
LM_BITS = ("W4A8KV8", "W4A8KV4", "W4A4KV4")
POST_TRAINING = {bits: bits for bits in ("W8A8KV8", "W4A8KV8", "W4A4KV4")} | {"hybrid": "{hybrid}"}
ATTACKS = ("32", "8", "4", "random", "eot")
SERVED = "8 {hybrid} {search}/found.json W4A8KV8 4"
ON_TRAINING = "--measure_split train"
ATTACKED = "--attack_dirs " + " ".join(f"{{attack_{bits}}}" for bits in ATTACKS)
WORD_ATTACKS = {  # the most important word first, PWWS's order, and edited letters, of which few suffice
    "words": "--synonyms {synonyms}/synonyms.json",
    "pwws": "--synonyms {synonyms}/synonyms.json --order pwws",
    "letters": "--candidates characters --max_fraction 0.1",
}
ARMS = {  # of adversarial training: none, at one width, at random ones, updated at another of them or at the same
    "plain": "--pgd_steps 0 --precision_set 8",
    "8bit": "--precision_set 8",
    "rpt": "--precision_set 4 5 6 7 8",
    "rpt_same": "--precision_set 4 5 6 7 8 --attack_precision same",  # as published
}
DISTRACTORS = {"": "", "_control": "--control"}
DISTRACTED = "8 W4A8KV8 4 --random_precision 8 W4A8KV8 4"
SQUAD_VALIDATION = '--dataset_name squad ${VALIDATION_FILE:+--validation_file "$VALIDATION_FILE"}'

STEPS = {
    # a model to start from, where the hub's is not taken
    "pretrain": pretrain("{+pretraining}"),
    "lm_pretrain_large": pretrain("{+pretraining_large}"),
    "lm_pretrain_half": pretrain("{+pretraining_half}"),
    "split": "python3 reproduce/split_squad.py --train_file {TRAIN_FILE} --output_dir {own} --record_file {record}",
    "base": "TRAIN_FILE={split}/base.json VALIDATION_FILE={validation_file} OUTPUT_DIR={own} MODEL={pretrain} "
    f"bash base_model/train.sh {{+base}} {{+common}} {END}",
    # base_model: full fine-tuning, LoRA, post-training quantization, LoRA trained at one width
    "full_fp32": train("base_model", "{+full}"),
    "lora_fp32": train("base_model", "--add_lora"),
    **{
        f"ptq_{quantizer}_{name}": post_training(bits, quantizer)
        for quantizer in QUANTIZERS
        for name, bits in POST_TRAINING.items()
    },
    "outlier_channels": "TRAIN_FILE={train_file}; python3 report/outlier_channels.py --model_name_or_path {lora_fp32} "
    f'--dataset_name squad ${{TRAIN_FILE:+--train_file "$TRAIN_FILE"}} {{+common}} {END}',
    "bnb_8bit": qa("base_model/eval.sh", "lora_fp32", "--bitsandbytes 8bit"),
    "bnb_nf4": qa("base_model/eval.sh", "lora_fp32", "--bitsandbytes nf4"),
    **{
        f"static_w{bits}_{quantizer}": train(
            "base_model", f"--bit_widths {bits}", f"--quantizer {quantizer}", "{+static}"
        )
        for bits in (8, 4)
        for quantizer in QUANTIZERS
    },
    "static_w4_rotated_fake": train("base_model", "--bit_widths 4 --quantizer rotated"),
    # lora_fp32 has a newline between question and context
    **{
        f"separator_{name}": train("base_model", "--add_lora", f"--question_separator '{text}'")
        for name, text in {"none": "", "space": " "}.items()
    },
    # SQuAD v2, of a made file: questions of v1.1, and the same of paragraphs that do not answer them
    "lora_v2": " && ".join(
        f"python3 reproduce/make_squad_v2.py --input {{{source}}} --output {{own}}_{name}.json"
        for name, source in {"train": "train_file", "dev": "validation_file"}.items()
    )
    + " && TRAIN_FILE={own}_train.json VALIDATION_FILE={own}_dev.json OUTPUT_DIR={own} MODEL={model} "
    f"bash base_model/train.sh {{+training}} --add_lora --version_2_with_negative {{+v2}} {{+common}} {END}",
    # a base of 4-bit weights alone, activations and K/V in float: NF4 (QLoRA) and ours, at the steps of lora_fp32
    "qlora_nf4": train("base_model", "--add_lora", "--base_quantization nf4"),
    **{
        f"qlora_w4_{quantizer}": train("base_model", "--bit_config W4A16KV16", f"--quantizer {quantizer}")
        for quantizer in QUANTIZERS
    },
    # switch_precision: one model for 4 and 8 bits; which layers need 8 is measured on training questions
    "switch_train": train("switch_precision", "--bit_widths 4 8", "{+switch}"),
    "switch_minmax": train("switch_precision", "--bit_widths 4 8 --quantizer minmax --curriculum 0", "{+switch}"),
    "switch_sequential": train("switch_precision", "--bit_widths 4 8 --objective sequential {+sequential}"),
    "sensitivity": qa("switch_precision/sweep.sh", "switch_train", ON_TRAINING, "{+sensitivity}"),
    "search": "SENSITIVITY_FILE={sensitivity_record} "
    + qa("switch_precision/search.sh", "switch_train", ON_TRAINING, "{+search}"),
    "switch_eval": served("switch_train", SERVED),
    "switch_minmax_eval": served("switch_minmax", SERVED),
    "switch_sequential_eval": served("switch_sequential", SERVED),
    # the adapters of one config folded into its weights before they are quantized: answers before and after
    **{
        f"merge_{bits}": "VALIDATION_FILE={validation_file}; python3 switch_precision/export.py --merge "
        f"--model_name_or_path {{switch_train}} --bit_config {bits} --output_dir {{own}} {SQUAD_VALIDATION} "
        f"--max_eval_samples 100000 {{+merge}} {END}"
        for bits in (8, 4)
    },
    # cpt: one adapter for all widths, trained while the bits cycle from 4 to 8
    "cpt_train": train("cpt", "--quantizer rotated", "{+cpt}"),
    "cpt_minmax_train": train("cpt", "{+cpt}"),
    "cpt_eval": served("cpt_train", "8 7 6 5 4", "cpt"),
    "cpt_minmax_eval": served("cpt_minmax_train", "8 7 6 5 4", "cpt"),
    "range_test": train("cpt", "--precision_range_test", "{+cpt}"),
    # adv_attack: a topic classifier, attacked at several precisions; does a random precision at inference protect it?
    "topic_lora": adversarial("train.sh", "classifier_model", "--add_lora", "{+classifier}"),
    **{
        f"attack_{bits}": adversarial("attack.sh", "topic_lora", f"--attack_bits {bits}", "{+attack}")
        for bits in ATTACKS
    },
    # adv_attack: words of the texts replaced, by an attacker who sees probabilities alone
    "synonyms": 'python3 adv_attack/make_synonyms.py --wordnet "${WORDNET:-/usr/share/wordnet}" '
    "--output {own}/synonyms.json --record_file {record}",
    **{
        f"{name}_{quantizer}_{bits}": "python3 adv_attack/word_attack.py --model_name_or_path {topic_lora} {+topics} "
        f"{flags} --quantizer {quantizer} --attack_bits {bits} {{+words}} --output_dir {{own}} {END}"
        for name, flags in WORD_ATTACKS.items()
        for quantizer in QUANTIZERS
        for bits in (32, 8, 4, "random")
    },
    **{
        f"{name}_{quantizer}_eval": "python3 adv_attack/eval.py --model_name_or_path {topic_lora} --quantizer "
        f"{quantizer} --attack_dirs {{{name}_{quantizer}_32}} {{{name}_{quantizer}_8}} {{{name}_{quantizer}_4}} "
        "--eval_bits 32 8 4 --output_dir {own} --record_file {record}"
        for name in WORD_ATTACKS
        for quantizer in QUANTIZERS
    },
    **{
        f"words_{quantizer}_rpi": "python3 adv_attack/random_precision_inference.py --model_name_or_path {topic_lora} "
        f"--quantizer {quantizer} --attack_dirs {{words_{quantizer}_32}} {{words_{quantizer}_8}} "
        f"{{words_{quantizer}_4}} {{words_{quantizer}_random}} --precision_set 4 8 --output_dir {{own}} {END}"
        for quantizer in QUANTIZERS
    },
    "attack_eval": f"python3 adv_attack/eval.py --model_name_or_path {{topic_lora}} {ATTACKED} --output_dir {{own}} "
    "--record_file {record}",
    "attack_rpi": f"python3 adv_attack/random_precision_inference.py --model_name_or_path {{topic_lora}} {ATTACKED} "
    f"--precision_set 4 8 --bitsandbytes 8bit nf4 --output_dir {{own}} {END}",
    # adv_attack: a distractor at the end of every context of the questions, or a sentence about something else
    **{
        f"distract{name}": "python3 adv_attack/distractors.py --input {validation_file} --output {own}/dev.json "
        f"{flag} {END}"
        for name, flag in DISTRACTORS.items()
    },
    **{
        f"distract{name}_eval": served("switch_train", DISTRACTED).replace(
            "{validation_file}", f"{{distract{name}}}/dev.json"
        )
        for name in DISTRACTORS
    },
    "distract_paired": "python3 adv_attack/paired.py --evaluations plain={switch_eval} "
    f"control={{distract_control_eval}} distractor={{distract_eval}} --validation_file {{validation_file}} {END}",
    # language_model: LLM-QAT beside post-training quantization and the adapters
    "lm_generate": "python3 language_model/generate_data.py --model_name_or_path {model} --output_dir {own} "
    f"{{+generate}} {END}",
    **{
        f"lm_ptq_{quantizer}": language_model(
            "eval.sh", f"--eval_bit_configs {bits} {' '.join(LM_BITS)} --quantizer {quantizer}"
        )
        for quantizer, bits in {"minmax": "32 W8A8KV8", "rotated": "W8A8KV8"}.items()
    },
    **{
        f"lm_{trains}_{objective}_{text}_{quantizer}_{bits}": lm_training(trains, objective, text, quantizer, bits)
        for trains in ("qat", "bank")
        for objective, text in (("ce", "text"), ("kd", "text"), ("kd", "generated"))
        for quantizer in QUANTIZERS
        for bits in LM_BITS
    },
    # the same linears' bytes: 4-bit weights of a model or 8-bit ones of a model of half its blocks
    **{f"lm_size_{size}": sized(size, "eval.sh", f"--eval_bit_configs 32 {bits}") for size, bits in SIZES.items()},
    **{
        f"lm_size_{size}_qat": sized(
            size,
            f"train.sh --bit_configs {bits} --objective kd --train_all_weights",
            "{+training} {+full}",
        )
        for size, bits in SIZES.items()
    },
    # adv_attack: does it protect models that are trained adversarially? PGD on embeddings, classifier and questions
    **{
        f"adv_classification_{arm}": adversarial(
            "adv_train.sh", "topic_lora", "--task classification", "{+adv_classification}", flags
        )
        for arm, flags in ARMS.items()
    },
    **{
        f"adv_classification_{arm}_matrix": pgd_matrix(
            f"adv_classification_{arm}", "--task classification", "{+topics}"
        )
        for arm in ARMS
    },
    "adv_classification_rpt_rotated_matrix": pgd_matrix(
        "adv_classification_rpt", "--task classification --quantizer rotated", "{+topics}"
    ),
    **{
        f"adv_qa_{arm}": qa("adv_attack/adv_train.sh", "model", "--task qa", "{+adv_qa}", flags)
        for arm, flags in ARMS.items()
    },
    **{
        f"adv_qa_{arm}_matrix": "VALIDATION_FILE={validation_file}; "
        + pgd_matrix(f"adv_qa_{arm}", "--task qa", SQUAD_VALIDATION, "{+pgd_qa}")
        for arm in ARMS
    },
    # adv_attack: real tokens of the questions, or of a sentence after the context, chosen with gradients
    **{
        f"tokens_{surface}_{method}_{bits}": "VALIDATION_FILE={validation_file}; python3 adv_attack/token_attack.py "
        f"--task qa --surface {surface} --method {method} --attack_bits {bits} {SQUAD_VALIDATION} "
        f"{{+tokens}} {{+tokens_{surface}}} {{+tokens_{method}}} --output_dir {{own}} {END}"
        for surface in ("question", "distractor")
        for method in ("hotflip", "pgd")
        for bits in ("8", "4", "eot")
    },
}

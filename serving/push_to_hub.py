#!/usr/bin/env python
"""Upload a trained or exported folder to the hub, with a model card made from records: bits, data, EM/F1, commands.

    python serving/push_to_hub.py --folder switch_precision/results/export --repo_id me/gpt2-squad --license mit \\
        --record_files switch_precision/results/eval/record.json

--card_only writes the card alone. It becomes README.md of the folder; a file of that name that this script has not
written is left as it is, with an error. Only the files that open the model go up: no optimizer, no logs. HF_ENDPOINT
names another hub; HF_TOKEN or --token says who you are.
"""

import collections
import dataclasses
import os
import re
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(os.path.dirname(HERE), "base_model"))
from huggingface_hub import EvalResult, HfApi, ModelCardData  # noqa: E402
from huggingface_hub.errors import HFValidationError  # noqa: E402
from huggingface_hub.utils import validate_repo_id  # noqa: E402

from common.arguments import option  # noqa: E402
from common.flags import parse_args  # noqa: E402
from common.record import hide_tokens, write_text_atomic  # noqa: E402
from common.script import plain_errors  # noqa: E402
from common.statistics import markdown_table  # noqa: E402
from models.bit_config import short_name  # noqa: E402
from models.checkpoint import KNOWN_BASES, read_config  # noqa: E402
from models.errors import UserError  # noqa: E402
from models.user_input import read_json  # noqa: E402

MARK = "<!-- written by serving/push_to_hub.py -->"
FILES = ("config.json", "model.safetensors", "README.md", "export.json", "record.json", "generation_config.json")
FILES += ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json")
OPENED_BY = {  # by the class in config.json
    "QuantGPT2ForQuestionAnswering": "AutoModelForQuestionAnswering",
    "QuantGPT2LMHeadModel": "AutoModelForCausalLM",
    "QuantGPT2ForSequenceClassification": "AutoModelForSequenceClassification",
}
MEASURES = {"exact_match": "EM", "f1": "F1", "perplexity": "perplexity"}


@dataclasses.dataclass
class PushArguments:
    """What goes where."""

    folder: str = dataclasses.field(kw_only=True, metadata={"help": "a checkpoint of this repository"})
    repo_id: str = dataclasses.field(kw_only=True, metadata={"help": "OWNER/NAME on the hub; made if it is not there"})
    license: str = dataclasses.field(
        kw_only=True, metadata={"help": "of the weights, as the hub writes it: mit, other"}
    )
    record_files: list[str] | None = option(
        None, "records of evaluations of this model (default: record.json and export.json of the folder)"
    )
    private: bool = option(False, "a new repository is private")
    token: str | None = option(None, "of the hub (default: HF_TOKEN, or the one that was saved at login)")
    card_only: bool = option(False, "write README.md into the folder, upload nothing")


def check_args(args):
    """Config of the checkpoint. Raises UserError for what the hub or a stranger could not use."""
    try:
        validate_repo_id(args.repo_id)
    except HFValidationError as fault:
        raise UserError(f"--repo_id {args.repo_id}: {fault}") from None
    if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", args.license):
        raise UserError(f"--license {args.license}: allowed is an identifier of the hub: mit, apache-2.0, other")
    if not os.path.isfile(os.path.join(args.folder, "model.safetensors")):
        raise UserError(f"--folder {args.folder}: it has no model.safetensors")
    _, config, ours, _ = read_config(args.folder, {})
    if not ours:
        raise UserError(f"--folder {args.folder}: no checkpoint of this repository")
    if (kind := (config.get("architectures") or [None])[0]) not in OPENED_BY:
        raise UserError(f"{args.folder}/config.json: architectures: {kind}: allowed are {', '.join(OPENED_BY)}")
    base = config.get("base_model_name_or_path")
    if base and (os.path.isabs(base) or os.path.isdir(base)) and not config.get("exported_widths"):
        raise UserError(
            f"--folder {args.folder}: its base is the local folder {base}: upload what export.py makes of it"
        )
    card = os.path.join(args.folder, "README.md")
    if os.path.exists(card):
        with open(card, encoding="utf-8", errors="replace") as file:
            if MARK not in file.read():
                raise UserError(f"{card}: not written by this script: move it away first")
    return config


def read_records(args):
    """{path: record} of what the card is made from. Raises UserError: not readable, or no record."""
    paths = args.record_files
    if paths is None:
        found = [os.path.join(args.folder, name) for name in ("record.json", "export.json")]
        paths = [path for path in found if os.path.exists(path)]
    records = {path: read_json(path) for path in paths}
    for path, record in records.items():
        lacks = [key for key in ("command", "metrics", "data", "bit_config") if key not in record]
        if lacks:
            raise UserError(f"{path}: no record of a run: it has no {', '.join(lacks)}")
    return records


def results_of(record):
    """[{"config", measures, "n", "source"}] of a record: of an evaluation, a training or an export."""
    rows = [dict(row) for row in record.get("rows", [])]
    if "eval_exact_match" in record["metrics"]:
        row = {key: record["metrics"][f"eval_{key}"] for key in ("exact_match", "f1")}
        rows.append(row | {"config": record["bit_config"].get("name", "as saved")})
    if isinstance(changes := record.get("changed_answers"), dict):
        for name, change in changes.items():
            row = {key: change[key][1] for key in ("exact_match", "f1")}
            rows.append(row | {"config": name, "n": change["questions"]})
    data = record["data"].get("validation", {})
    known = {"source": data.get("source", "not known"), "n": data.get("examples", "")}
    return [known | row for row in rows]


def about_bits(config):
    """Two sentences: how the checkpoint opens, and what else it serves. config: of config.json."""
    resolved, widths = config.get("bit_config") or {}, config.get("exported_widths") or {}
    layers = collections.Counter(bits["w_bits"] for bits in resolved.values())
    opens = short_name(resolved) if resolved else "float32"
    if len(layers) > 1:
        opens += " (" + ", ".join(f"{number} linears at {bits} bits" for bits, number in sorted(layers.items())) + ")"
    if widths:
        found = sorted({width for served in widths.values() for width in served})
        also = f"It has weights at {', '.join(map(str, found))} bits and needs no float32 ones."
    else:
        also = f"Its adapters: {', '.join(map(str, config.get('lora_bank') or ['none']))}."
    return f"It opens as {opens}. {also}"


def card(args, config, records):
    """Text of README.md."""
    results = [row for record in records.values() for row in results_of(record)]
    measured = [key for key in MEASURES if any(key in row for row in results)]
    base = config.get("base_model_name_or_path")
    trained = {data["source"]: data for record in records.values() for data in record["data"].values()}
    facts = ModelCardData(
        license=args.license,
        base_model=base if base in KNOWN_BASES else None,
        datasets=[name for name in trained if name in ("squad", "squad_v2")] or None,
        tags=["gpt2", "quantization", "switchable-precision", "lora"],
        model_name=args.repo_id.partition("/")[2] or args.repo_id,
        eval_results=[
            EvalResult(
                task_type="text-generation" if key == "perplexity" else "question-answering",
                dataset_type=os.path.basename(row["source"]),
                dataset_name=f"{os.path.basename(row['source'])}, {row['n']} examples",
                metric_type=key,
                metric_name=f"{MEASURES[key]}, served as {row['config']}",
                metric_value=row[key],
            )
            for row in results
            for key in measured
            if key in row
        ]
        or None,
    )
    opener = OPENED_BY[config["architectures"][0]]
    lines = [
        "---",
        facts.to_yaml(),
        "---",
        MARK,
        f"# {facts.model_name}",
        "",
        f"GPT-2 of {config['n_layer']} blocks of {config['n_embd']} with a bit-width per layer and the quantizer "
        f"{config.get('quantizer', 'minmax')}. {about_bits(config)}",
        "",
        "## Measured",
        "",
    ]
    if results:
        cells = [
            [
                row["config"],
                *(f"{row[key]:.2f}" if key in row else "" for key in measured),
                str(row["n"]),
                row["source"],
            ]
            for row in results
        ]
        lines += markdown_table(["served as", *(MEASURES[key] for key in measured), "examples", "data"], cells)
    else:
        lines.append("Nothing: no record of an evaluation was given.")
    lines += ["", "## Data and commands", ""]
    lines += [
        f"- {data['source']}: {data['examples']} examples, sha256 `{data['sha256']}`" for data in trained.values()
    ]
    for record in records.values():
        commit = (record.get("git") or {}).get("commit") or "not known"
        lines.append(f"- commit `{commit}`, seed {record.get('seed')}:\n\n  ```\n  {record['command']}\n  ```")
    lines += [
        "",
        "## Use",
        "",
        "With `base_model/` of the repository that made it on `sys.path`:",
        "",
        "```python",
        "import models.modeling_gpt2_quant  # registers the class with AutoModel; no remote code",
        f"from transformers import {opener}",
        "",
        f'model = {opener}.from_pretrained("{args.repo_id}")',
        "```",
        "",
    ]
    return hide_tokens("\n".join(lines))


def upload(args, names):
    """The address of the commit that puts these files of the folder on the hub. Raises UserError with its answer."""
    hub = HfApi(token=args.token)
    try:
        hub.create_repo(args.repo_id, private=args.private, exist_ok=True)
        done = hub.upload_folder(
            repo_id=args.repo_id, folder_path=args.folder, allow_patterns=names, commit_message="Model and card"
        )
    except Exception as fault:  # of the network too, whose classes differ between versions of huggingface_hub
        raise UserError(hide_tokens(f"--repo_id {args.repo_id}: the hub said: {fault}".splitlines()[0])) from None
    return done.commit_url


def main():
    (args,) = parse_args(PushArguments)
    config = check_args(args)
    text = card(args, config, read_records(args))
    write_text_atomic(os.path.join(args.folder, "README.md"), text)
    names = [name for name in FILES if os.path.exists(os.path.join(args.folder, name))]
    total = sum(os.path.getsize(os.path.join(args.folder, name)) for name in names)
    print(f"{args.folder}: {', '.join(names)}; {total / 1e6:.1f} MB")
    if not args.card_only:
        print(f"uploaded: {upload(args, names)}")


if __name__ == "__main__":
    with plain_errors():
        main()

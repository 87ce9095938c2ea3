"""The quick start's generator, tiny model and report; the README's table against the committed records."""

import json
import pathlib
import re
import subprocess
import sys

import pytest
from transformers import AutoTokenizer, GPT2LMHeadModel

from common.squad_data import load_squad_json
from conftest import experiment, load_script

with experiment("quickstart"):
    import make_model

ROOT = pathlib.Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results" / "quickstart"


def run(script, *arguments):
    return subprocess.run(
        [sys.executable, ROOT / "quickstart" / script, *map(str, arguments)], capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quickstart") / "data"
    sizes = ("--train_paragraphs", 60, "--dev_paragraphs", 20, "--pretrain_documents", 300)
    for name in ("data", "again"):
        done = run("make_data.py", "--output_dir", folder.parent / name, *sizes)
        assert done.returncode == 0, done.stderr
    return folder


def test_data_is_squad_with_several_gold_answers_and_the_same_every_time(data):
    train, dev = load_squad_json(data / "train.json"), load_squad_json(data / "dev.json")
    assert len(train) == 240 and len(dev) == 80
    assert {len(row["answers"]["text"]) for row in train} == {1}
    assert max(len(row["answers"]["text"]) for row in dev) > 1
    for name in ("train.json", "dev.json", "pretrain.txt"):
        assert (data / name).read_bytes() == (data.parent / "again" / name).read_bytes()


def test_no_dev_paragraph_is_in_the_training_text(data):
    seen = (data / "pretrain.txt").read_text() + (data / "train.json").read_text()
    assert not any(row["context"] in seen for row in load_squad_json(data / "dev.json"))


def test_tiny_model_is_stock_gpt2_and_made_once(data):
    folder = data.parent / "model"
    arguments = ("--data_dir", data, "--output_dir", folder, "--max_steps", 2, "--n_embd", 64, "--n_layer", 1)
    first = run("make_model.py", *arguments)
    assert first.returncode == 0, first.stderr
    model, tokenizer = GPT2LMHeadModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.config.model_type == "gpt2" and len(tokenizer) == model.config.vocab_size
    assert "up to date" in run("make_model.py", *arguments).stdout


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--max_steps", 0), "--max_steps 0: must be at least 1"),
        (("--batch_size", -1), "--batch_size -1: must be at least 1"),
        (("--vocab_size", 9), "--vocab_size 9: must be at least 257"),
        (("--learning_rate", "nan"), "--learning_rate nan"),
        (("--output_dir", "/proc/nowhere"), "/proc/nowhere"),
    ],
)
def test_model_flags_that_cannot_work(flags, message, tmp_path, monkeypatch, capsys):
    (tmp_path / "a.txt").write_text("one\n\ntwo")
    words = ("--text_file", tmp_path / "a.txt", "--output_dir", tmp_path / "model", *flags)
    monkeypatch.setattr(sys, "argv", ["make_model.py", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        make_model.main()
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_documents_with_a_byte_order_mark_and_broken_ones(tmp_path):
    for name, text, expected in (("a.txt", "one\n\ntwo", ["one", "two"]), ("a.jsonl", '{"text": "one"}\n', ["one"])):
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        assert make_model.read_documents(tmp_path / name) == expected
    for text in ('{"text": 3}', '{"text": "\\ud800"}', "[" * 100_000, "3", '{"x": 1}', '{"text": ' + "9" * 5000, ""):
        (tmp_path / "a.jsonl").write_text(text)
        with pytest.raises(ValueError, match="a.jsonl"):
            make_model.read_documents(tmp_path / "a.jsonl")


def test_model_without_data_is_one_clear_error(tmp_path):
    done = run("make_model.py", "--data_dir", tmp_path, "--output_dir", tmp_path / "model")
    assert done.returncode == 2 and "run make_data.py" in done.stderr and "Traceback" not in done.stderr


def made_anew(script, words, pages, folder):
    """What the script makes of copies of these pages."""
    copies = [folder / page.replace("/", "_") for page in pages]
    for page, copy in zip(pages, copies, strict=True):
        copy.write_text((ROOT / page).read_text())
    done = run(script, *words, "--pages", *copies)
    assert done.returncode == 0, done.stderr
    return [copy.read_text() for copy in copies]


def test_tables_and_plot_of_the_quick_start_come_from_the_records(tmp_path):
    pages = ["quickstart/README.md"]
    texts = made_anew("report.py", ["--records", RESULTS, "--output_dir", tmp_path / "new"], pages, tmp_path)
    assert texts == [(ROOT / page).read_text() for page in pages], "quickstart/README.md says how"
    assert "quickstart table: begin" in texts[0]
    assert (tmp_path / "new" / "quickstart.png").is_file()


def test_table_of_the_language_model(tmp_path):
    def write(name, training, source, *rows):
        keys = ("config", "quantizer", "perplexity")
        record = {"data": {"train": {"source": source}}, "rows": [dict(zip(keys, row, strict=True)) for row in rows]}
        (tmp_path / f"lm_{name}.json").write_text(json.dumps(record | ({"training": training} if training else {})))

    write("ptq", None, "", ("W32A32KV32", "minmax", 50), ("W4A8KV4", "minmax", 90.126))
    for seed, found in enumerate((60, 62)):
        training = {"trains": "all weights", "objective": "kd"}
        write(f"qat_{seed}", training, "runs/texts.jsonl", ("W4A8KV4", "rotated (the checkpoint has minmax)", found))
    (tmp_path / "lm_generate.json").write_text('{"data": {"generated": {"source": "texts.jsonl"}}}')
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- language_model table: begin -->\n<!-- language_model table: end -->\nb\n")
    done = run("report.py", "--language_model", tmp_path, "--pages", page)
    assert done.returncode == 0, done.stderr
    assert page.read_text().splitlines()[2:7] == [
        "| perplexity; trained | on | text | quantizer | W32A32KV32 | W4A8KV4 | seeds |",
        "|---|---|---|---|---|---|---|",
        "| nothing (post-training) | - | - | - | 50.00 |  | 1 |",
        "| nothing (post-training) | - | - | minmax |  | 90.13 | 1 |",
        "| all weights | distillation | generated | rotated |  | 61.00 (60.00 - 62.00) | 2 |",
    ]


def test_table_of_two_sizes(tmp_path):
    for name, blocks, rows in (
        ("large", 8, {"W32A32KV32": (25.0, 50), "W4A8KV8": (3.2, 55)}),
        ("large_qat", 8, {"W4A8KV8": (3.2, 52)}),
        ("large_qat_43", 8, {"W4A8KV8": (3.2, 53)}),
        ("half", 4, {"W8A8KV8": (3.2, 60.126)}),
    ):
        record = {"bit_config": {"layers": dict.fromkeys(range(4 * blocks))}}
        record["rows"] = [{"config": c, "weight_mb": mb, "perplexity": value} for c, (mb, value) in rows.items()]
        (tmp_path / f"lm_size_{name}.json").write_text(
            json.dumps(record | ({"training": {}} if "qat" in name else {}))
        )
    done = run("report.py", "--sizes", tmp_path)
    assert done.stdout.splitlines()[2:] == [
        "| 8 | 25.00 | W32A32KV32 | - | 50.00 | 1 |",
        "| 8 | 3.20 | W4A8KV8 | - | 55.00 | 1 |",
        "| 4 | 3.20 | W8A8KV8 | - | 60.13 | 1 |",
        "| 8 | 3.20 | W4A8KV8 | distillation, all weights | 52.50 (52.00 - 53.00) | 2 |",
    ]


def test_the_plot_shows_both_scores_of_every_row(figures, tmp_path):
    rows = [("LoRA", "8", 51.5, 60.0), ("PTQ", "4", 3.0, 7.5)]
    load_script("quickstart/report.py").plot(rows, tmp_path / "scores.png")
    (axes,) = figures["scores"].axes
    assert [bar.get_width() for bars in axes.containers for bar in bars] == [51.5, 3.0, 60.0, 7.5]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["LoRA", "PTQ"]


GPU = ["gpu_bench_forward.json", "gpu_bench_step.json", "gpu_bench_step_joint.json"]


@pytest.mark.parametrize(
    ("script", "flag", "records", "page", "name"),
    [
        ("report.py", "--attack", ["adv_attack/plain_rpi.json"], "adv_attack/README.md", "attack"),
        ("report.py", "--benchmark", ["benchmark.json"], "benchmark/README.md", "benchmark"),
        ("report.py", "--steps", GPU, "benchmark/README.md", "steps"),
        ("seeds.py", "--summary", ["quickstart_seeds.json"], "switch_precision/README.md", "seeds"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_tables_come_from_their_records(script, flag, records, page, name, tmp_path):
    (text,) = made_anew(script, [flag, *(ROOT / "results" / record for record in records)], [page], tmp_path)
    assert f"<!-- {name} table: begin -->\n|" in text
    assert text == (ROOT / page).read_text(), "quickstart/README.md says how"


def test_paired_difference_is_a_t_interval():
    with experiment("quickstart"):
        from report import paired_difference
    assert paired_difference([2, 4, 6], [1, 2, 3]) == "+2.0 [-0.5, +4.5]"  # 2 +- 4.303 * 1 / sqrt(3)
    assert paired_difference([2], [1]) == "+1.0"


def test_report_without_records_is_one_clear_error(tmp_path):
    done = run("report.py", "--records", tmp_path, "--output_dir", tmp_path)
    assert done.returncode == 1 and "run bash quickstart/run.sh first" in done.stderr


def test_the_seeds_record_says_how_it_was_made(tmp_path):
    base = {"command": "python x.py", "git": {"commit": "1"}, "steps": 3, "data": {}}
    with experiment("quickstart"):
        import seeds
    floor = {"exact_match": [49.0, 51.0], "changed": 0.1, "variants": {}}
    configs = [seeds.FLOAT, *seeds.OPERANDS]
    rows = [{"config": config, "exact_match": 50.0, "noise_floor": floor} for config in configs]
    scored = base | {"rows": rows, "metrics": {}, "outliers": {"transformer.h.0.mlp.c_fc": 3.0}}
    trained = base | {"metrics": {"eval_exact_match": 40.0}}
    trainings = [method for method in seeds.METHODS if not method.startswith("ptq")]
    names = ["ptq_minmax", "ptq_rotated", "floor_minmax", "floor_rotated", "ptq_800", "eval_joint_800"]
    names += [f"eval_{method}" for method in trainings]
    records = {f"{name}_{factor}": scored for name in names for factor in seeds.ALL_FACTORS}
    records |= {f"{name}_{factor}": trained for name in ("lora", *trainings) for factor in seeds.ALL_FACTORS}
    random = {"mean_exact_match": 1.0, "std_exact_match": 1.0, "better_than_found": 0, "number": 1}
    bits = {"average_w_bits": 6.0, "average_a_bits": 5.5, "average_kv_bits": 5.0}
    rows = [{"config": "found", "exact_match": 50.0}, {"config": "first_last", "exact_match": 49.0}]
    found = base | {"rows": rows, "search": {"found": {"random": random, "average_bits": bits}}}
    records |= {f"{kind}_30": found for kind in seeds.SEARCHES}
    for name, record in records.items():
        (tmp_path / f"{name}_7.json").write_text(json.dumps(record))
    done = run("seeds.py", "--records", tmp_path, "--seeds", 7, "--output", tmp_path / "seeds.json")
    assert done.returncode == 0, done.stderr
    made = json.loads((tmp_path / "seeds.json").read_text())
    assert "seeds.py --records" in made["command"] and made["git"]["commit"] and made["versions"]["torch"]
    methods = made["methods"]["30"]
    assert methods["static_rotated"]["W4A4KV4"]["mean"] == 50 and methods["joint"]["W8A8KV8"]["mean"] == 50
    assert methods["joint"]["W8A8KV8"]["noise_floor"] == [2, 0.1]
    assert made["records"]["joint_30_7"]["command"] == "python x.py"
    assert made["curves"]["800"]["joint"]["W4A4KV4"]["mean"] == 50 and "1200" in made["curves"]
    assert made["searches"]["search_operands"]["7"]["baselines"] == {"first_last": 49.0}
    assert "| 7 | 6.00 / 5.50 / 5.00 | 50.0 | 1.0 (1.0) | 0 of 1 | 49.0 | - |" in done.stdout
    again = run("seeds.py", "--summary", tmp_path / "seeds.json")
    assert again.returncode == 0 and again.stdout in done.stdout


@pytest.mark.parametrize("path", sorted((ROOT / "results").rglob("*.json")), ids=lambda path: path.name)
def test_records_say_how_they_were_made(path):
    record = json.loads(path.read_text())
    assert record["command"] and record["git"]["commit"] and record["versions"]


ABSOLUTE = re.compile(r"""(?:(?<![\w.:/)\]-])/(?=[\w.])|file://|\b[A-Z]:\\\\)[^"]*""")


def test_records_carry_no_absolute_path():
    for path in (ROOT / "results").rglob("*.json"):
        assert not ABSOLUTE.findall(path.read_text()), path.name


@pytest.mark.parametrize(
    "text", ['"/data/x.json"', '"--output_dir=/data/x"', '"--dirs a /b/c d"', '"file:///x"', '"C:\\\\x"']
)
def test_an_absolute_path_is_seen_wherever_it_stands(text):
    assert ABSOLUTE.search(text) and not ABSOLUTE.search('"a/b ../c ./d https://host/x 3 / 4 W/A"')

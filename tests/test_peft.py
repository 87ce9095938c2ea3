"""Adapters in peft's files: what export.py writes opens in peft, and run_qa.py starts from what peft wrote."""

import json
import os
import re
import shutil
import sys
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2ForQuestionAnswering, GPT2ForSequenceClassification, GPT2LMHeadModel

from conftest import load_script
from models import modeling_gpt2_quant
from models.modeling_gpt2_quant import QuantGPT2ForQuestionAnswering

IDS = torch.arange(24).view(2, 12)


def make_checkpoint(folder, base, bank=(4, 8), head="QuantGPT2ForQuestionAnswering", **options):
    """Adapter checkpoint with B != 0, as run_qa.py leaves it."""
    torch.manual_seed(1)
    model = getattr(modeling_gpt2_quant, head).from_pretrained(base, **options)
    model.add_lora(bank, r=2, lora_alpha=6)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    model.set_base(base)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(f"{base}/{name}", folder)
    return model.eval()


@pytest.fixture
def export(monkeypatch):
    """export(*words): export.py in this process."""
    script = load_script("switch_precision/export.py")

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["export.py", *map(str, words)])
        script.main()

    return run


@pytest.fixture
def adapter(tiny_model, export, tmp_path):
    """(model with the bank 4 and 8, folder with its adapter 8 for peft)"""
    model = make_checkpoint(tmp_path / "checkpoint", tiny_model)
    export("--model_name_or_path", tmp_path / "checkpoint", "--peft", "8", "--output_dir", tmp_path / "peft")
    return model, tmp_path / "peft"


def outputs(model):
    with torch.no_grad():
        found = model(input_ids=IDS)
    return found.logits if "logits" in found else torch.stack([found.start_logits, found.end_logits])


def test_the_files_hold_one_adapter_and_the_head_by_the_names_of_the_stock_model(adapter):
    model, folder = adapter
    config, state = (
        json.loads((folder / "adapter_config.json").read_text()),
        load_file(folder / "adapter_model.safetensors"),
    )
    assert (config["peft_type"], config["r"], config["lora_alpha"], config["fan_in_fan_out"]) == ("LORA", 2, 6, True)
    assert config["modules_to_save"] == ["qa_outputs"] and config["bias"] == "none"
    expected = {f"base_model.model.qa_outputs.{kind}" for kind in ("weight", "bias")}
    for name, layer in model.quant_layers().items():
        expected |= {f"base_model.model.{name}.lora_{m}.weight" for m in "AB"}
        assert torch.equal(state[f"base_model.model.{name}.lora_B.weight"], layer.lora_B["8"].weight)
    assert set(state) == expected
    record = json.loads((folder / "export.json").read_text())
    size = sum((folder / name).stat().st_size for name in ("adapter_config.json", "adapter_model.safetensors"))
    assert record["bit_config"]["peft_adapter"] == "8" and record["metrics"]["all_files_bytes"] == size


@pytest.mark.parametrize(
    ("head", "bank"),
    [(GPT2ForQuestionAnswering, (4, 8)), (GPT2ForQuestionAnswering, ("shared",)), (GPT2LMHeadModel, (4, 8)),
     (GPT2ForSequenceClassification, (4, 8))],
    ids=["qa", "shared", "lm", "classification"],
)  # fmt: skip
def test_peft_opens_it_on_stock_gpt2_with_the_same_logits(head, bank, tiny_model, export, tmp_path):
    peft = pytest.importorskip("peft")
    options = {"num_labels": 3} if head is GPT2ForSequenceClassification else {}
    ours = make_checkpoint(tmp_path / "checkpoint", tiny_model, bank, f"Quant{head.__name__}", **options)
    words = ["--peft", bank[-1], "--head", f"Quant{head.__name__}", "--output_dir", tmp_path / "out"]
    export("--model_name_or_path", tmp_path / "checkpoint", *words)
    stock = head.from_pretrained(tiny_model, pad_token_id=0, **options)
    ours.config.pad_token_id = 0
    plain = outputs(stock.eval())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # of peft, about keys and orientations
        theirs = peft.PeftModel.from_pretrained(stock, tmp_path / "out").eval()
    with ours.quantization_off():
        expected = outputs(ours)
    torch.testing.assert_close(outputs(theirs), expected, rtol=0, atol=1e-5)
    assert not torch.allclose(plain, expected, atol=1e-3)


# ---- the way back


@pytest.fixture
def run_qa(monkeypatch, qa_words, tmp_path):
    """run_qa(folder, *flags): the model that its run_qa.py builds."""

    def run(folder, *flags, train=True):
        script = load_script(f"{folder}/run_qa.py")
        with monkeypatch.context() as patch:
            words = qa_words(*flags, out=tmp_path / "run", train=train)
            patch.setattr(sys, "argv", ["run_qa.py", *map(str, words)])
            built, build = [], script.build_model

            class Built(Exception):
                pass

            def stop(*args):
                built.append(build(*args))
                raise Built

            patch.setattr(script, "build_model", stop)
            with pytest.raises(Built):
                script.main()
        return built[0][0] if isinstance(built[0], tuple) else built[0]

    return run


@pytest.mark.parametrize(
    ("folder", "flags", "bank"),
    [
        ("base_model", ["--add_lora"], ["shared"]),
        ("base_model", ["--bit_widths", "4"], ["4"]),
        ("base_model", ["--bit_config", "W8A8KV8"], ["8"]),
        ("switch_precision", ["--bit_widths", "4", "8"], ["4", "8"]),
    ],
)
def test_training_starts_from_the_adapter(folder, flags, bank, adapter, run_qa):
    theirs, files = adapter
    model = run_qa(folder, "--from_peft", files, *flags)
    assert (model.config.lora_bank, model.config.lora_r, model.config.lora_alpha) == (bank, 2, 6)
    theirs.set_bit_config(8)
    with model.quantization_off(), theirs.quantization_off():
        for key in bank:
            model.set_bit_config(8 if key == "shared" else int(key))
            torch.testing.assert_close(outputs(model.eval()), outputs(theirs), rtol=0, atol=1e-6)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name, _ in model.named_parameters() if ".lora_" in name or name.startswith("qa_outputs")
    }


def test_questions_start_from_an_adapter_of_a_language_model(tiny_model, export, run_qa, tmp_path):
    theirs = make_checkpoint(tmp_path / "checkpoint", tiny_model, head="QuantGPT2LMHeadModel")
    words = ["--head", "QuantGPT2LMHeadModel", "--peft", "4", "--output_dir", tmp_path / "peft"]
    export("--model_name_or_path", tmp_path / "checkpoint", *words)
    model = run_qa("base_model", "--add_lora", "--from_peft", tmp_path / "peft")
    for name, layer in model.quant_layers().items():
        assert torch.equal(layer.lora_B["shared"].weight, theirs.quant_layers()[name].lora_B["4"].weight)


@pytest.mark.parametrize("folder", ["base_model", "switch_precision"])
def test_an_adapter_can_be_evaluated_at_bits(folder, adapter, run_qa):
    theirs, files = adapter
    flags = ["--bit_config", "8"] if folder == "base_model" else ["--bit_configs", "8"]
    model = run_qa(folder, "--from_peft", files, *flags, train=False)
    assert model.config.lora_bank == ["shared"]
    model.set_execution("fake")
    theirs.set_bit_config(8)
    torch.testing.assert_close(outputs(model.eval()), outputs(theirs))


def test_a_whole_training_from_an_adapter(adapter, qa_words, monkeypatch, tmp_path):
    _, files = adapter
    words = qa_words("--add_lora", "--from_peft", files, out=tmp_path / "run")
    monkeypatch.setattr(sys, "argv", ["run_qa.py", *map(str, words)])
    load_script("base_model/run_qa.py").main()
    trained = QuantGPT2ForQuestionAnswering.from_pretrained(tmp_path / "run")
    assert trained.config.lora_bank == ["shared"] and trained.config.lora_alpha == 6


def test_an_adapter_that_peft_wrote(tiny_model, run_qa, tmp_path):
    peft = pytest.importorskip("peft")
    stock = GPT2ForQuestionAnswering.from_pretrained(tiny_model)
    options = {"r": 4, "lora_alpha": 16, "target_modules": ["c_attn", "c_fc"], "init_lora_weights": False}
    theirs = peft.get_peft_model(
        stock, peft.LoraConfig(task_type="QUESTION_ANS", fan_in_fan_out=True, **options)
    ).eval()
    theirs.save_pretrained(tmp_path / "peft")
    model = run_qa("base_model", "--add_lora", "--from_peft", tmp_path / "peft", "--lora_r", 4)
    torch.testing.assert_close(outputs(model.eval()), outputs(theirs), rtol=0, atol=1e-5)


def edit(path, **keys):
    content = json.loads(path.read_text()) | keys
    path.write_text(json.dumps({key: value for key, value in content.items() if value != "REMOVED"}))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"peft_type": "IA3"}, '"peft_type" = "IA3": allowed is "LORA"'),
        ({"r": 0}, '"r" = 0: allowed is a whole number'),
        ({"r": "REMOVED"}, '"r" is missing: allowed is a whole number'),
        ({"lora_alpha": "x"}, '"lora_alpha" = "x": allowed is'),
        ({"bias": "all"}, '"bias" = "all": allowed is "none"'),
        ({"init_lora_weights": "pissa"}, '"init_lora_weights" = "pissa": allowed is'),
        ({"use_rslora": True}, '"use_rslora" = true: allowed is null or false'),
        ({"use_dora": True}, '"use_dora" = true'),
        ({"rank_pattern": {"c_attn": 4}}, '"rank_pattern" = {"c_attn": 4}'),
        ({"r": 3}, "is (2, 64): allowed is (3, 64)"),
    ],
)
def test_configs_of_other_adapters_are_refused(keys, message, adapter, run_qa):
    _, files = adapter
    edit(files / "adapter_config.json", **keys)
    with pytest.raises(ValueError, match=re.escape(message)):
        run_qa("base_model", "--add_lora", "--from_peft", files)


def other_half(state):
    del state["base_model.model.transformer.h.1.mlp.c_fc.lora_B.weight"]


def foreign(state):
    state["base_model.model.transformer.wte.weight"] = torch.zeros(3)


def infinite(state):
    state["base_model.model.qa_outputs.bias"][0] = torch.inf


def only_head(state):
    for name in [name for name in state if ".lora_" in name]:
        del state[name]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_half, 'c_fc.lora_A.weight" is there without "base_model.model.transformer.h.1.mlp.c_fc.lora_B.weight"'),
        (foreign, 'transformer.wte.weight" is no adapter of the four linears'),
        (infinite, 'qa_outputs.bias" is not finite'),
        (only_head, "no adapter in it"),
    ],
)
def test_faulty_tensors_are_refused(change, message, adapter, run_qa):
    _, files = adapter
    state = load_file(files / "adapter_model.safetensors")
    change(state)
    save_file(state, files / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=re.escape(message)):
        run_qa("base_model", "--add_lora", "--from_peft", files, "--base_model_name_or_path", tiny_name(files))


def tiny_name(files):
    return json.loads((files / "adapter_config.json").read_text())["base_model_name_or_path"]


def test_files_that_are_not_there_are_named(adapter, run_qa, tmp_path):
    _, files = adapter
    with pytest.raises(ValueError, match="--from_peft .*nowhere: no adapter_config.json in it"):
        run_qa("base_model", "--add_lora", "--from_peft", tmp_path / "nowhere")
    os.rename(files / "adapter_model.safetensors", files / "adapter_model.bin")
    with pytest.raises(ValueError, match="no adapter_model.safetensors in it .*is a pickle: not read"):
        run_qa("base_model", "--add_lora", "--from_peft", files)
    (files / "adapter_model.safetensors").write_bytes(b"x" * 20)
    with pytest.raises(ValueError, match="damaged or truncated"):
        run_qa("base_model", "--add_lora", "--from_peft", files)


@pytest.mark.parametrize("folder", ["base_model", "switch_precision"])
def test_rank_alpha_base_and_bank_are_checked(folder, adapter, run_qa, tmp_path):
    _, files = adapter
    words = [folder, *(["--add_lora"] if folder == "base_model" else []), "--from_peft", files]
    with pytest.raises(ValueError, match="--lora_r 8, but the adapter of --from_peft .* has 2"):
        run_qa(*words, "--lora_r", 8)
    with pytest.raises(ValueError, match="--lora_alpha 16, but the adapter of --from_peft .* has 6"):
        run_qa(*words, "--lora_alpha", 16)
    with pytest.raises(ValueError, match="--from_peft .*peft: .*checkpoint has adapters of its own"):
        run_qa(*words, "--model_name_or_path", tmp_path / "checkpoint")
    other = copy_of(tiny_name(files), tmp_path / "other")
    with pytest.raises(ValueError, match="the weights of .*other are not those of its base, .*model"):
        run_qa(*words, "--model_name_or_path", other)


def copy_of(base, folder, change=True):
    shutil.copytree(base, folder)
    state = load_file(folder / "model.safetensors")
    state["transformer.h.0.mlp.c_fc.bias"] += float(change)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_base_without_checksum_is_known_by_its_name(adapter, run_qa, tmp_path):
    _, files = adapter
    save_file(load_file(files / "adapter_model.safetensors"), files / "adapter_model.safetensors")
    words = ["base_model", "--add_lora", "--from_peft", files]
    run_qa(*words)
    moved = copy_of(tiny_name(files), tmp_path / "moved", change=False)
    with pytest.raises(ValueError, match="its base is .*, not .*moved; if they are the same weights, say so with"):
        run_qa(*words, "--model_name_or_path", moved)
    run_qa(*words, "--model_name_or_path", moved, "--base_model_name_or_path", moved)
    edit(files / "adapter_config.json", base_model_name_or_path=None)
    with pytest.raises(ValueError, match="its base is null, not .*"):
        run_qa(*words)


def test_everything_trained_takes_no_adapter(adapter, run_qa):
    with pytest.raises(ValueError, match="--from_peft .*: pass --add_lora, --bit_widths or --bit_config with it"):
        run_qa("base_model", "--from_peft", adapter[1])


def test_an_adapter_on_a_base_of_ours_is_not_for_peft(tiny_model, export, tmp_path):
    QuantGPT2ForQuestionAnswering.from_pretrained(tiny_model).save_pretrained(tmp_path / "base")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(f"{tiny_model}/{name}", tmp_path / "base")
    make_checkpoint(tmp_path / "checkpoint", str(tmp_path / "base"))
    with pytest.raises(ValueError, match="--peft 8: the base of .*checkpoint is no stock GPT-2, as peft needs"):
        export("--model_name_or_path", tmp_path / "checkpoint", "--peft", "8", "--output_dir", tmp_path / "out")
    with pytest.raises(ValueError, match="--peft 8: the base of .* is no stock GPT-2, as peft needs"):
        export("--model_name_or_path", tiny_model, "--peft", "8", "--output_dir", tmp_path / "out")
    assert not (tmp_path / "out").exists()

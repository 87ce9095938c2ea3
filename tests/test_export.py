"""The deployable form: what is in the file, what comes back, what is refused."""

import json
import os
import re
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from common.loading import load_tokenizer, open_model
from conftest import experiment
from models.bitsandbytes_ptq import quantize_with_bitsandbytes
from models.exported import save_exported, served_widths
from models.modeling_gpt2_quant import QuantGPT2ForQuestionAnswering, QuantGPT2LMHeadModel

HYBRID = {"default": 8, "transformer.h.1.*": 4}


@pytest.fixture
def model(tiny_model):
    """Adapters of 4 and 8 bits with B != 0."""
    torch.manual_seed(1)
    model = QuantGPT2ForQuestionAnswering.from_pretrained(tiny_model)
    model.add_lora([4, 8], r=2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    return model


def export(model, folder, *configs, **options):
    resolved = []
    for config in configs:
        with model.at_bits(config) as found:
            resolved.append(found)
    return save_exported(model, folder, served_widths(resolved), resolved[0], **options)


def logits(model, config=None):
    if config is not None:
        model.set_bit_config(config)
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        return model(input_ids=ids).start_logits


def test_same_logits_at_every_assignment_of_the_served_widths(model, tmp_path):
    export(model, tmp_path, 8, 4)
    exported = QuantGPT2ForQuestionAnswering.from_pretrained(tmp_path)
    assert torch.equal(logits(exported), logits(model, 8))
    for config in (4, HYBRID, "W4A8KV8", "W8A32KV32"):
        assert torch.equal(logits(exported, config), logits(model, config))
    assert not torch.equal(logits(model, 4), logits(model, 8))


def test_integer_execution_of_an_exported_model(model, tmp_path):
    export(model, tmp_path, HYBRID)
    exported = QuantGPT2ForQuestionAnswering.from_pretrained(tmp_path)
    exported.set_execution("integer")
    torch.testing.assert_close(logits(exported), logits(model, HYBRID), rtol=1e-4, atol=1e-5)


def test_embeddings_of_float16_come_back_rounded(tiny_model, tmp_path):
    model = QuantGPT2ForQuestionAnswering.from_pretrained(tiny_model)
    export(model, tmp_path, 8, embeddings_dtype=torch.float16)
    exported = QuantGPT2ForQuestionAnswering.from_pretrained(tmp_path)
    assert torch.equal(exported.transformer.wte.weight, model.transformer.wte.weight.half().float())
    assert not torch.equal(exported.transformer.wte.weight, model.transformer.wte.weight)


def test_the_file_holds_what_the_configs_need_and_no_float_weights(model, tmp_path):
    parts = export(model, tmp_path, HYBRID)
    state = load_file(tmp_path / "model.safetensors")
    for name, (out, inp) in model.layer_shapes().items():
        bits = 4 if ".h.1." in name else 8
        assert f"{name}.weight" not in state
        codes = {key: state[key] for key in state if key.startswith(f"{name}.codes.")}
        assert list(codes) == [f"{name}.codes.{bits}"]
        assert codes[f"{name}.codes.{bits}"].nbytes == out * inp * bits // 8
        assert state[f"{name}.scale.{bits}"].shape == (out, 1)
        assert f"{name}.lora_A.{bits}.weight" in state and f"{name}.lora_A.{12 - bits}.weight" not in state
    weights = sum(out * inp for out, inp in model.layer_shapes().values())
    assert parts["codes"] == weights * 6 // 8  # half of the blocks at 8, half at 4 bits
    assert parts["embeddings"] == 4 * (model.transformer.wte.weight.numel() + model.transformer.wpe.weight.numel())
    assert sum(parts.values()) == sum(tensor.nbytes for tensor in state.values())


def test_widths_that_were_left_out_are_refused(model, tmp_path):
    export(model, tmp_path, HYBRID)
    exported = QuantGPT2ForQuestionAnswering.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"transformer\.h\.0\.attn\.c_attn.*w_bits = 4"):
        exported.set_bit_config(4)
    with pytest.raises(ValueError, match="float weights were dropped"):
        exported.save_pretrained(tmp_path / "again")


def test_language_model_keeps_its_tied_head(tiny_model, tmp_path):
    model = QuantGPT2LMHeadModel.from_pretrained(tiny_model)
    export(model, tmp_path, 4)
    exported = QuantGPT2LMHeadModel.from_pretrained(tmp_path)
    ids = torch.arange(10).view(1, 10)
    model.set_bit_config(4)
    with torch.no_grad():
        assert torch.equal(exported(input_ids=ids).logits, model(input_ids=ids).logits)
    assert exported.lm_head.weight is exported.transformer.wte.weight


def test_an_exported_checkpoint_is_evaluated_but_not_trained(model, tiny_model, tmp_path):
    export(model, tmp_path, 8)
    hub = dict.fromkeys(("cache_dir", "token", "attn_implementation", "base_model_name_or_path"))
    args = SimpleNamespace(model_name_or_path=tmp_path, tokenizer_name=tiny_model, model_revision="main", **hub)
    tokenizer = load_tokenizer(args)
    assert torch.equal(logits(open_model(QuantGPT2ForQuestionAnswering, args, tokenizer)), logits(model, 8))
    with pytest.raises(ValueError, match="an exported checkpoint without float weights: .* train the checkpoint that"):
        open_model(QuantGPT2ForQuestionAnswering, args, tokenizer, training=True)


def test_bitsandbytes_needs_float_weights(model, tmp_path):
    export(model, tmp_path, 8)
    exported = QuantGPT2ForQuestionAnswering.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="an exported checkpoint has none"):
        quantize_with_bitsandbytes(exported, "8bit")


def test_float_layers_cannot_be_exported(model):
    with model.at_bits({"default": 8, "transformer.h.1.mlp.*": {"w_bits": 8}}) as fine:
        served_widths([fine])
    broken = {**fine, "transformer.h.1.mlp.c_fc": {"w_bits": 16, "a_bits": 8}}
    with pytest.raises(ValueError, match=r'"transformer\.h\.1\.mlp\.c_fc"\.w_bits = 16 .* 2 to 8 bits'):
        served_widths([fine, broken])


@pytest.mark.parametrize("fault", ["missing", "shape", "truncated"])
def test_a_damaged_file_is_refused(model, tmp_path, fault):
    export(model, tmp_path, 8)
    path, key = tmp_path / "model.safetensors", "transformer.h.0.mlp.c_fc.codes.8"
    state = load_file(path)
    if fault == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    else:
        state[key] = state[key][:-1].clone()
        if fault == "missing":
            del state[key]
        save_file(state, path)
    expected = {"missing": f'"{key}" is missing', "shape": f'"{key}" is int8', "truncated": "damaged or truncated"}[
        fault
    ]
    with pytest.raises(ValueError, match=expected):
        QuantGPT2ForQuestionAnswering.from_pretrained(tmp_path)


# ---- the script


@pytest.fixture
def checkpoint(model, tiny_model, tmp_path):
    """Adapter checkpoint as run_qa.py leaves it."""
    folder = tmp_path / "checkpoint"
    model.set_base(tiny_model)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if os.path.exists(f"{tiny_model}/{name}"):
            shutil.copy(f"{tiny_model}/{name}", folder)
    return folder


@pytest.fixture
def script(monkeypatch):
    """The script's main, in this process."""
    with experiment("switch_precision"):
        import export

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["export.py", *map(str, words)])
        export.main()

    return run


def test_script_writes_a_folder_that_opens_and_a_record(checkpoint, script, capsys, tmp_path):
    out = tmp_path / "out"
    script("--model_name_or_path", checkpoint, "--output_dir", out)
    record = json.loads((out / "export.json").read_text())
    size = sum(path.stat().st_size for path in out.iterdir() if path.name not in ("export.json", ".lock"))
    assert record["metrics"]["all_files_bytes"] == size and f"{size / 1e6:.3f} MB" in capsys.readouterr().out
    assert record["bit_config"]["exported_widths"]["transformer.h.0.attn.c_attn"] == [4, 8]
    exported = QuantGPT2ForQuestionAnswering.from_pretrained(out)
    assert exported.config.trained_bit_configs == ["8", "4"] and not exported.config.base_model_name_or_path
    assert not [path for path in out.iterdir() if path.name.startswith(".saving")]


def test_folder_of_another_run_is_refused_and_left_alone(checkpoint, script, hold, tmp_path):
    hold(tmp_path / "out")
    with pytest.raises(ValueError, match="another run .* is writing to it"):
        script("--model_name_or_path", checkpoint, "--output_dir", tmp_path / "out")
    assert os.listdir(tmp_path / "out") == [".lock"]


def test_script_measures_the_answers_that_change(checkpoint, script, capsys, squad_files, tmp_path):
    script("--model_name_or_path", checkpoint, "--output_dir", tmp_path / "plain")
    assert "not measured" in capsys.readouterr().out
    assert json.loads((tmp_path / "plain" / "export.json").read_text())["changed_answers"] == "not measured"
    for dtype in ("float32", "float16"):
        out = tmp_path / dtype
        flags = ("--bit_configs", "4", "8", "--embeddings", dtype)
        data = ("--validation_file", squad_files[1], "--max_seq_length", "64", "--doc_stride", "16")
        script("--model_name_or_path", checkpoint, "--output_dir", out, *flags, *data)
        record = json.loads((out / "export.json").read_text())
        changes = record["changed_answers"]
        assert list(changes) == ["W4A4KV4", "W8A8KV8"] and record["embeddings"] == dtype
        assert all(change["questions"] == 14 for change in changes.values())
        assert record["data"]["validation"]["examples"] == 14 and str(checkpoint).endswith(record["model"][-10:])
        if dtype == "float32":
            assert all(change["changed"] == 0 for change in changes.values())
        assert f"{changes['W4A4KV4']['changed']} of 14 answers differ" in capsys.readouterr().out
    sizes = [(tmp_path / dtype / "model.safetensors").stat().st_size for dtype in ("float32", "float16")]
    assert sizes[1] < sizes[0]


ROTATED = ("--quantizer", "rotated", "--calibration_samples", "16")


def test_script_exports_the_rotated_quantizer(checkpoint, script, squad_files, tmp_path):
    out = tmp_path / "out"
    data = ("--train_file", squad_files[0], "--validation_file", squad_files[1], "--max_seq_length", "64")
    script("--model_name_or_path", checkpoint, "--output_dir", out, *ROTATED, *data, "--doc_stride", "16")
    record = json.loads((out / "export.json").read_text())
    about = record["bit_config"]
    assert (about["quantizer"], about["checkpoint_quantizer"], about["calibration_windows"]) == (
        "rotated",
        "minmax",
        16,
    )
    assert all(change["changed"] == 0 for change in record["changed_answers"].values())
    exported = QuantGPT2ForQuestionAnswering.from_pretrained(out)
    expected = QuantGPT2ForQuestionAnswering.from_pretrained(checkpoint)
    plain = logits(expected, 4)
    expected.set_rotations(exported.rotations())
    for config in (8, 4, HYBRID):
        assert torch.equal(logits(exported, config), logits(expected, config))
    assert not torch.equal(plain, logits(expected, 4))


@pytest.mark.parametrize(("own", "asked"), [("minmax", "rotated"), ("rotated", "minmax")])
def test_an_exported_folder_has_one_quantizer(own, asked, checkpoint, script, squad_files, tmp_path):
    data = ("--train_file", squad_files[0], "--max_seq_length", "64", "--doc_stride", "16")
    out = tmp_path / "out"
    script("--model_name_or_path", checkpoint, "--output_dir", out, *ROTATED[2:], *data, "--quantizer", own)
    with experiment("switch_precision"):
        import run_qa_eval
    words = ["--model_name_or_path", out, "--validation_file", squad_files[1], "--output_dir", tmp_path / "eval"]
    words += ["--do_eval", "--use_cpu", "True", "--disable_tqdm", "True", *ROTATED[2:], *data]
    with pytest.MonkeyPatch.context() as patch:
        for flags in (["--quantizer", asked], ["--quantizer", asked, "--train_file", ""], []):
            patch.setattr(sys, "argv", ["run_qa_eval.py", *map(str, words), *flags])
            if flags:
                with pytest.raises(ValueError, match=f"^--quantizer {asked}: .*out is exported, .* {own} alone: exp"):
                    run_qa_eval.main()
            else:
                run_qa_eval.main()
    record = json.loads((tmp_path / "eval" / "record.json").read_text())
    assert record["bit_config"]["quantizer"] == record["bit_config"]["checkpoint_quantizer"] == own


def test_other_heads_are_exported_with_the_rotation_that_they_have(tiny_model, script, tmp_path):
    torch.manual_seed(0)
    model = QuantGPT2LMHeadModel.from_pretrained(tiny_model).requires_grad_(False)
    model.save_pretrained(tmp_path / "minmax")
    model.set_rotations({name: torch.randn(layer.in_features) for name, layer in model.quant_layers().items()})
    model.save_pretrained(tmp_path / "rotated")
    words = ["--tokenizer_name", tiny_model, "--head", "QuantGPT2LMHeadModel", "--bit_configs", "4"]
    script("--model_name_or_path", tmp_path / "rotated", "--output_dir", tmp_path / "out", *words)
    exported = QuantGPT2LMHeadModel.from_pretrained(tmp_path / "out")
    model.set_bit_config(4)
    ids = torch.arange(10).view(1, 10)
    with torch.no_grad():
        assert torch.equal(exported(input_ids=ids).logits, model(input_ids=ids).logits)
    with pytest.raises(ValueError, match="no rotation, and QuantGPT2LMHeadModel is calibrated where it is trained"):
        script("--model_name_or_path", tmp_path / "minmax", "--output_dir", tmp_path / "no", *words, *ROTATED)


def test_changed_answers_are_counted():
    with experiment("switch_precision"):
        from export import compare_answers
    before, after = {"a": "x", "b": "y", "c": "z"}, {"a": "x", "b": "", "c": "w"}
    scores = [{"W4": {"eval_exact_match": em, "eval_f1": em + 5}} for em in (50.0, 40.0)]
    found = compare_answers(({"W4": before}, scores[0], {}), ({"W4": after}, scores[1], {}))
    assert found == {"W4": {"questions": 3, "changed": 2, "exact_match": [50.0, 40.0], "f1": [55.0, 45.0]}}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "--output_dir is missing"),
        (("--output_dir", "OUT", "--embeddings", "int8"), "--embeddings int8: allowed are float32, float16"),
        (("--output_dir", "OUT", "--max_eval_samples", "0"), "--max_eval_samples 0: must be a number above 0"),
        (
            ("--output_dir", "OUT", "--head", "QuantGPT2LMHeadModel", "--dataset_name", "squad"),
            "answers are compared for question answering",
        ),
        (("--output_dir", "CHECKPOINT"), "is the checkpoint itself"),
        (("--output_dir", "OUT", "--head", "GPT2Model"), "--head GPT2Model: allowed are"),
        (("--output_dir", "OUT", "--bit_configs", "5"), "w_bits = 5"),
        (("--output_dir", "OUT", "--bit_configs", "none.json"), "none.json: no such bit-width config"),
        (("--output_dir", "USED"), "holds a checkpoint: pass --overwrite_output_dir"),
        (("--output_dir", "USED", "--peft", "8"), "holds a checkpoint: pass --overwrite_output_dir"),
        (
            ("--output_dir", "OUT", "--merge"),
            "--merge folds the adapters of one --bit_config, not of W8A8KV8, W4A4KV4",
        ),
        (("--output_dir", "OUT", "--merge", "--bit_config", "32"), "w_bits = 32"),
        (("--output_dir", "OUT", "--peft", "6"), "--peft 6: the checkpoint has the adapters 4, 8"),
        (("--output_dir", "OUT", "--peft", "8", "--merge"), "--merge: --peft writes one adapter in float"),
        (("--output_dir", "OUT", "--peft", "8", "--bit_configs", "4"), "--bit_configs: --peft writes one adapter"),
        (("--output_dir", "OUT", "--peft", "8", "--quantizer", "minmax"), "--quantizer: --peft writes one adapter"),
        (("--output_dir", "OUT", "--peft", "8", "--embeddings", "float16"), "--embeddings: --peft writes one adapter"),
        (("--output_dir", "OUT", "--peft", "8", "--validation_file", "x"), "--validation_file: --peft writes one"),
    ],
)
def test_script_refuses(checkpoint, script, tmp_path, flags, message):
    used = tmp_path / "used"
    used.mkdir()
    (used / "config.json").write_text("{}")
    places = {"CHECKPOINT": checkpoint, "OUT": tmp_path / "out", "USED": used}
    with pytest.raises((ValueError, OSError), match=re.escape(message)):
        script("--model_name_or_path", checkpoint, *(places.get(flag, flag) for flag in flags))
    assert not (tmp_path / "out").exists() and (used / "config.json").read_text() == "{}"


def test_the_rotated_quantizer_adds_its_vectors_to_an_export_and_nothing_else(model, tmp_path):
    layers = model.quant_layers()
    sizes = [export(model, tmp_path / "minmax", 8, 4)]
    model.set_rotations({name: torch.rand(layer.in_features) + 0.5 for name, layer in layers.items()})
    sizes.append(export(model, tmp_path / "rotated", 8, 4))
    vectors = sum(4 * layer.in_features for layer in layers.values())
    assert sizes[1] == sizes[0] | {"scales": sizes[0]["scales"] + vectors}
    exported = QuantGPT2ForQuestionAnswering.from_pretrained(tmp_path / "rotated")
    for config in (8, 4, HYBRID):
        assert torch.equal(logits(exported, config), logits(model, config))


# ---- one config, its adapters folded in


def folded(model, config):
    """The same model with the adapters of a config added to its weights, in float."""
    model.set_bit_config(config)
    plain = QuantGPT2ForQuestionAnswering.from_pretrained(model.config.base_model_name_or_path)
    plain.qa_outputs.load_state_dict(model.qa_outputs.state_dict())
    for name, layer in model.quant_layers().items():
        key = str(layer.w_bits)
        update = layer.lora_B[key].weight @ layer.lora_A[key].weight * model.config.lora_alpha / model.config.lora_r
        plain.quant_layers()[name].weight.data += update
    return plain.requires_grad_(False)


@pytest.mark.parametrize(("config", "quantizer"), [(4, "minmax"), (8, "rotated"), (HYBRID, "rotated")], ids=str)
def test_a_merged_export_quantizes_the_folded_weights(checkpoint, script, squad_files, tmp_path, config, quantizer):
    out, file = tmp_path / "out", tmp_path / "config.json"
    file.write_text(json.dumps(config if isinstance(config, dict) else {"default": config}))
    data = ("--train_file", squad_files[0], "--max_seq_length", "64", "--doc_stride", "16")
    words = ["--merge", "--bit_config", file, "--output_dir", out, "--quantizer", quantizer, *data, *ROTATED[2:]]
    script("--model_name_or_path", checkpoint, *words)
    exported = QuantGPT2ForQuestionAnswering.from_pretrained(out)
    assert exported.config.lora_bank is None and not any("lora" in name for name in exported.state_dict())
    assert json.loads((out / "export.json").read_text())["merged"] is True
    expected = folded(QuantGPT2ForQuestionAnswering.from_pretrained(checkpoint), config)
    float_logits = logits(expected)
    expected.set_rotations(exported.rotations())
    torch.testing.assert_close(logits(exported), logits(expected, config))
    unmerged = QuantGPT2ForQuestionAnswering.from_pretrained(checkpoint)
    unmerged.set_rotations(exported.rotations())
    assert not torch.allclose(logits(exported), logits(unmerged, config))
    with unmerged.quantization_off():
        torch.testing.assert_close(logits(unmerged), float_logits, rtol=1e-4, atol=1e-4)


def test_the_record_of_a_merged_export_has_scores_before_and_after(checkpoint, script, capsys, squad_files, tmp_path):
    out = tmp_path / "out"
    data = ("--validation_file", squad_files[1], "--max_seq_length", "64", "--doc_stride", "16")
    script("--model_name_or_path", checkpoint, "--merge", "--bit_config", "4", "--output_dir", out, *data)
    change = json.loads((out / "export.json").read_text())["changed_answers"]["W4A4KV4"]
    assert [len(change[key]) for key in ("exact_match", "f1")] == [2, 2] and change["questions"] == 14
    assert "F1 {:.2f} to {:.2f}".format(*change["f1"]) in capsys.readouterr().out
    model = QuantGPT2ForQuestionAnswering.from_pretrained(out)
    assert (model.config.trained_bit_configs, model.config.lora_r) == (["4"], 0)


def test_only_adapters_can_be_merged(tiny_model, script, tmp_path):
    with pytest.raises(ValueError, match="--merge: the checkpoint has no adapters to fold"):
        script("--model_name_or_path", tiny_model, "--merge", "--bit_config", "4", "--output_dir", tmp_path / "out")

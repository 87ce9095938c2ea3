"""Opening and saving checkpoints: faulty configs and weights, hub names, bases, checksums, races."""

import json
import math
import os
import shutil
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
)

from common.arguments import ModelArguments
from common.checksums import model_checksum
from common.loading import load_tokenizer, open_model
from models.errors import UserError
from models.exported import save_exported, served_widths
from models.modeling_gpt2_quant import (
    QuantGPT2ForQuestionAnswering,
    QuantGPT2ForSequenceClassification,
    QuantGPT2LMHeadModel,
)

KINDS = ("stock", "full", "adapters", "exported")
COMMIT, OTHER_COMMIT = "a" * 40, "b" * 40


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(24).view(2, 12)).start_logits


@pytest.fixture(scope="module")
def pristine(tiny_model, tmp_path_factory):
    """{kind: folder} of a stock model and our three kinds of checkpoint, with tokenizers."""
    root = tmp_path_factory.mktemp("checkpoints")
    folders = {kind: root / kind for kind in KINDS}
    shutil.copytree(tiny_model, folders["stock"])
    torch.manual_seed(3)
    model = QuantGPT2ForQuestionAnswering.from_pretrained(tiny_model)
    model.save_pretrained(folders["full"])
    model.add_lora([4, 8], r=4, lora_alpha=12)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    resolved = model.set_bit_config(8)
    save_exported(model, folders["exported"], served_widths([resolved, model.set_bit_config(4)]), resolved)
    model.set_base(str(folders["stock"]))
    model.set_bit_config(8)
    model.config.trained_bit_configs = ["8", "W4A4KV4"]
    model.save_pretrained(folders["adapters"])
    for kind in KINDS[1:]:
        for file in os.listdir(tiny_model):
            if file not in ("config.json", "model.safetensors"):
                shutil.copy(os.path.join(tiny_model, file), folders[kind])
    return folders


@pytest.fixture
def copies(pristine, tmp_path):
    """The same in folders of the test's own; the adapters keep the pristine base."""
    for kind, folder in pristine.items():
        shutil.copytree(folder, tmp_path / kind)
    return {kind: tmp_path / kind for kind in KINDS}


def opened(folder, **kwargs):
    torch.manual_seed(5)  # of the head that stock weights do not have
    return QuantGPT2ForQuestionAnswering.from_pretrained(folder, **kwargs)


def edit(folder, **changes):
    """Rewrite keys of config.json; ... removes one."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def opens_or_user_error(folder):
    """The message of the UserError; None if the model opens. Anything else is raised."""
    start = time.perf_counter()
    try:
        logits(opened(folder))
    except UserError as error:
        assert time.perf_counter() - start < 5
        return str(error)


# ---- config.json

HOSTILE = [
    *("x", "../../etc", "\x00\ud800", None, [], [None] * 3, {}, {"0": {}}, True),
    *(0, -1, 3, 10**12, 10**300, 0.5, math.nan),
]


FEW = ("x", None, {}, -1, math.nan)  # a kind each


@pytest.mark.parametrize(
    ("kind", "values"),
    [("adapters", FEW), ("exported", FEW), *(pytest.param(kind, HOSTILE, marks=pytest.mark.slow) for kind in KINDS)],
    ids=lambda value: value if isinstance(value, str) else f"{len(value)} values",
)
def test_any_value_of_any_key_opens_or_is_one_error(kind, values, copies):
    folder = copies[kind]
    before = (folder / "config.json").read_text()
    keys = {*json.loads(before), "auto_map", "dtype", "n_inner", "id2label", "label2id", "num_labels", "problem_type"}
    keys |= {"return_dict", "quantization_config", "hidden_size", "pruned_heads", "save_pretrained", "lora_bank"}
    for key in sorted(keys):
        for value in values:
            edit(folder, **{key: value})
            message = opens_or_user_error(folder)
            assert message is None or str(folder) in message, (key, value, message)
            (folder / "config.json").write_text(before)


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_that_are_not_those_of_the_weights_are_refused(kind, copies):
    before = (copies[kind] / "config.json").read_text()
    for key in ("n_layer", "n_embd", "n_positions", "vocab_size", "n_inner", "n_head"):
        for value in (1, 3, 1000, 4096, 10**12, ...) if key != "n_inner" else (1, 1000, 10**12):
            edit(copies[kind], **{key: value})
            if key == "n_head" and value == 1 and kind != "adapters":
                continue  # a possible model: nothing in the weights says otherwise
            with pytest.raises(UserError, match=f'"{key}"|n_embd'):
                opened(copies[kind])
            (copies[kind] / "config.json").write_text(before)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"gpt2"',
        b"\xff\xfe{}",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"n_layer": ' + b"9" * 10_000 + b"}",
        b'{"model_type": "gpt2", "model_type": "gpt2"}',
        b'{"model_type": NaN}',
        b'{"model_type": "bert"}',
        b'{"model_type": "gpt2"}',
        b" " * 9_000_000,
    ],
)
def test_a_config_that_is_none(content, copies):
    (copies["full"] / "config.json").write_bytes(content)
    assert "config.json" in opens_or_user_error(copies["full"])


def test_a_config_that_is_a_folder_and_one_with_a_byte_order_mark(copies):
    path = copies["full"] / "config.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert opens_or_user_error(copies["full"]) is None
    path.unlink()
    path.mkdir()
    assert "config.json" in opens_or_user_error(copies["full"])


def test_all_faults_are_listed_with_file_key_value_and_what_is_allowed(copies):
    edit(copies["adapters"], n_head=3, lora_r="x", lora_alpha=..., attn_pdrop=2, trained_weights=1)
    edit(copies["adapters"], base_checksum="00")
    with pytest.raises(UserError) as caught:
        opened(copies["adapters"])
    lines = str(caught.value).splitlines()
    assert all(line.startswith(str(copies["adapters"] / "config.json")) for line in lines)
    for part in ('"n_head" = 3: allowed', '"lora_r" = "x": allowed', '"lora_alpha" = missing', '"attn_pdrop" = 2'):
        assert any(part in line for line in lines), part
    assert any('"base_checksum" = "00": allowed is a sha256' in line for line in lines)
    assert any('"trained_weights" = 1: allowed is true, false' in line for line in lines)


@pytest.mark.parametrize("key", ["lora_r", "lora_alpha", "lora_bank"])
@pytest.mark.parametrize("kind", ["adapters", "exported"])
def test_adapters_are_never_switched_off(kind, key, copies):
    for value in (..., 0, None):
        edit(copies[kind], **{key: value})
        assert key in opens_or_user_error(copies[kind])


def test_code_in_a_checkpoint_is_never_run(copies):
    for folder in copies.values():
        (folder / "evil.py").write_text("raise SystemExit('it ran')")
        edit(folder, auto_map={"AutoConfig": "evil.Config", "AutoModel": "evil.Model", "AutoTokenizer": "evil.T"})
        tokens = folder / "tokenizer_config.json"
        auto = {"auto_map": {"AutoTokenizer": ["evil.T", "evil.T"]}}
        tokens.write_text(json.dumps(json.loads(tokens.read_text()) | auto))
        assert opens_or_user_error(folder) is None

        load_tokenizer(arguments(folder))


# ---- flags


def arguments(folder, **changes):
    names = ("cache_dir", "token", "attn_implementation", "base_model_name_or_path", "tokenizer_name")
    fields = dict.fromkeys((*names, "lora_r", "lora_alpha")) | {"model_revision": "main"}
    return SimpleNamespace(**fields | {"model_name_or_path": str(folder)} | changes)


def test_lora_flags_unlike_the_adapters_are_refused(pristine):
    assert (ModelArguments().lora_r, ModelArguments().lora_alpha) == (None, None)
    tokenizer = load_tokenizer(arguments(pristine["adapters"]))
    for flags in ({}, {"lora_r": 4, "lora_alpha": 12}):
        assert (
            open_model(
                QuantGPT2ForQuestionAnswering, arguments(pristine["adapters"], **flags), tokenizer
            ).config.lora_r
            == 4
        )
    with pytest.raises(ValueError, match="--lora_r 8, but the adapters of .* have lora_r 4"):
        open_model(QuantGPT2ForQuestionAnswering, arguments(pristine["adapters"], lora_r=8), tokenizer)
    with pytest.raises(ValueError, match="--lora_alpha 16, but the adapters of .* have lora_alpha 12"):
        open_model(QuantGPT2ForQuestionAnswering, arguments(pristine["exported"], lora_alpha=16), tokenizer)


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "tokenizer.json"])
def test_faulty_files_beside_the_tokenizer_are_one_error(file, copies):
    for content in ("{", '{"n_layer": "x"}', "[]", '{"model": {"type": "BPE"}}', '{"tokenizer_class": 5}'):
        (copies["full"] / file).write_text(content)
        try:
            load_tokenizer(arguments(copies["full"]))
        except (UserError, OSError) as error:
            assert str(copies["full"]) in str(error)


def test_an_attention_that_is_not_there(pristine):
    with pytest.raises(UserError, match="attn_implementation"):
        opened(pristine["full"], attn_implementation="nonsense")


# ---- dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16", torch.float16, "float32", None])
def test_dtype_is_what_the_config_says(dtype, pristine, tmp_path):
    wanted = {None: torch.float32, "float32": torch.float32, "bfloat16": torch.bfloat16}.get(dtype, dtype)
    for kind in KINDS:
        model = opened(pristine[kind], dtype=dtype)
        assert {p.dtype for p in model.parameters()} == {wanted} and model.config.dtype == wanted
        logits(model)
    stock = opened(pristine["stock"], dtype=dtype)
    assert torch.equal(stock.transformer.wte.weight, opened(pristine["stock"]).transformer.wte.weight.to(wanted))
    stock.save_pretrained(tmp_path)
    assert opened(tmp_path).dtype == torch.float32
    if wanted != torch.float32:
        with pytest.raises(UserError, match="in float32"):
            stock.set_base(str(pristine["stock"]))


def test_other_dtypes_and_unknown_options_are_refused(pristine):
    for dtype in ("int8", torch.int8, "auto"):
        with pytest.raises(UserError, match="dtype = .*: allowed are float32, float16, bfloat16"):
            opened(pristine["stock"], dtype=dtype)
    with pytest.raises(UserError, match="foo = 1: no option"):
        opened(pristine["stock"], foo=1)


# ---- weights


def rewrite(folder, sealed=False, **changes):
    """Replace tensors by what the functions make of them; the checksum goes, unless `sealed`."""
    path = folder / "model.safetensors"
    state = load_file(path)
    for name, change in changes.items():
        state[name] = change(state[name]).contiguous()
    save_file(state, path, metadata={"format": "pt"})
    if not sealed:
        edit(folder, weights_sha256=...)


def with_value(value):
    def change(tensor):
        tensor = tensor.clone()
        tensor.view(-1)[3] = value
        return tensor

    return change


TENSORS = {
    "stock": ("transformer.wte.weight", "transformer.h.1.attn.c_attn.weight"),
    "full": ("transformer.h.1.attn.c_attn.weight", "qa_outputs.bias", "transformer.ln_f.weight"),
    "adapters": ("transformer.h.1.mlp.c_proj.lora_A.4.weight", "qa_outputs.weight"),
    "exported": ("transformer.wpe.weight", "transformer.h.0.attn.c_attn.bias", "qa_outputs.weight"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_that_are_not_finite_or_not_float_are_refused(kind, copies, pristine):
    for name in TENSORS[kind]:
        for change in (
            lambda tensor: tensor.clone().fill_(math.nan),
            lambda tensor: tensor.clone().fill_(math.inf),
            lambda tensor: tensor.to(torch.int64),
            lambda tensor: tensor.to(torch.bool),
            lambda tensor: tensor.to(torch.complex64),
            lambda tensor: tensor.to(torch.float64),
            lambda tensor: tensor.to(torch.float8_e4m3fn),
            lambda tensor: tensor[:-1],
            lambda tensor: tensor[None],
            lambda tensor: tensor.new_zeros(0),
        ):
            rewrite(copies[kind], **{name: change})
            message = opens_or_user_error(copies[kind])
            assert message and str(copies[kind]) in message and name in message, message
            shutil.copy(pristine[kind] / "model.safetensors", copies[kind])
    for name in TENSORS[kind]:
        rewrite(copies[kind], **{name: lambda tensor: tensor.half()})
    opened(copies[kind])


C_FC = "transformer.h.0.mlp.c_fc"


@pytest.mark.parametrize(
    ("tensor", "change"),
    [
        ("scale.8", lambda t: t.half()),
        ("scale.8", lambda t: t.double()),
        ("scale.4", lambda t: t.bfloat16()),
        ("scale.8", with_value(math.nan)),
        ("scale.8", with_value(math.inf)),
        ("scale.8", with_value(3e38)),
        ("scale.8", with_value(-0.1)),
        ("scale.4", with_value(0.0)),
        ("scale.8", lambda t: t.view(-1)),
        ("codes.8", with_value(-128)),
        ("codes.4", with_value(0x18)),  # 1 and -8, which four bits hold and quantization never gives
        ("codes.8", lambda t: t.int()),
        ("codes.8", lambda t: t.float()),
        ("codes.4", lambda t: t.view(torch.int8)),
        ("codes.8", lambda t: t.t()),
        ("codes.8", lambda t: t[:0]),
    ],
)
def test_faulty_codes_and_scales_are_refused(tensor, change, copies):
    rewrite(copies["exported"], **{f"{C_FC}.{tensor}": change})
    message = opens_or_user_error(copies["exported"])
    assert f'"{C_FC}.{tensor}"' in message and str(copies["exported"] / "model.safetensors") in message


def test_codes_beyond_a_narrow_width_are_refused(tmp_path, pristine):
    model = opened(pristine["full"])
    resolved = model.set_bit_config(3)
    save_exported(model, tmp_path, served_widths([resolved]), resolved)
    rewrite(tmp_path, **{f"{C_FC}.codes.3": with_value(0x04)})
    assert f'"{C_FC}.codes.3" has codes from -3 to 4: allowed are -3 to 3' in opens_or_user_error(tmp_path)


def test_a_row_of_zeros_is_exported_and_comes_back(tmp_path, pristine):
    model = opened(pristine["full"])
    with torch.no_grad():
        model.get_submodule(C_FC).weight[3] = 0
    for bits in (8, 4):
        resolved = model.set_bit_config(bits)
        save_exported(model, tmp_path, served_widths([resolved]), resolved)
        assert torch.equal(logits(opened(tmp_path)), logits(model))


# ---- checksum


@pytest.mark.parametrize("kind", KINDS[1:])
def test_weights_of_another_checkpoint_are_refused_and_older_ones_open(kind, copies):
    name = TENSORS[kind][0]
    rewrite(copies[kind], sealed=True, **{name: lambda tensor: tensor * 1.01})
    assert "belong to different checkpoints" in opens_or_user_error(copies[kind])
    edit(copies[kind], weights_sha256=...)
    assert opens_or_user_error(copies[kind]) is None


@pytest.mark.parametrize("kind", ["full", "exported"])
def test_a_reader_during_saves_never_mixes_two_checkpoints(kind, copies, pristine):
    """Two states that differ in config and in weights are saved in turns, while another thread opens the folder."""
    folder, stop, model = copies[kind], threading.Event(), opened(pristine["full"])

    def save(number):
        with torch.no_grad():
            model.qa_outputs.bias.fill_(number)
        resolved = model.set_bit_config(8 if number else 4)
        if kind == "full":
            model.save_pretrained(folder)
        else:
            save_exported(model, folder, served_widths([resolved]), resolved)

    def keep_saving():
        number = 0
        while not stop.is_set():
            save(number)
            number = 1 - number

    save(0)
    writer = threading.Thread(target=keep_saving)
    writer.start()
    try:
        for _ in range(25):
            found = opened(folder)
            bits = found.config.bit_config[C_FC]["w_bits"]
            assert found.qa_outputs.bias.tolist() == [float(bits == 8)] * 2
    finally:
        stop.set()
        writer.join()
    assert not [name for name in os.listdir(folder) if name.startswith(".saving")]


def test_a_save_is_on_the_disk_before_it_replaces_anything(pristine, tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        original = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, f=original, n=name: (calls.append((n, *map(str, a))), f(*a))[1])
    opened(pristine["full"]).save_pretrained(tmp_path / "new")
    kinds = [call[0] for call in calls]
    replaced = [os.path.basename(call[2]) for call in calls if call[0] == "replace"]
    assert replaced[-1] == "config.json" and "model.safetensors" in replaced
    first, last = kinds.index("replace"), len(kinds) - 1 - kinds[::-1].index("replace")
    assert kinds[:first].count("fsync") > len(replaced) and kinds[last + 1 :] == ["fsync"]


# ---- hub


def to_hub(folder, cache, name, commit=COMMIT, ref="main"):
    """Put a folder into a hub cache, as a download leaves it."""
    repository = cache / f"models--{name.replace('/', '--')}"
    shutil.copytree(folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / ref).write_text(commit)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_opens_by_hub_name(kind, copies, tmp_path):
    cache = tmp_path / "hub"
    if kind == "adapters":
        model = opened(copies["stock"])
        model.add_lora([8])
        to_hub(copies["stock"], cache, "gpt2")
        based = opened("gpt2", cache_dir=cache)
        based.add_lora([8])
        based.set_base("gpt2")
        assert based.config.base_model_revision == COMMIT
        based.save_pretrained(copies[kind])
    to_hub(copies[kind], cache, "group/model", OTHER_COMMIT)
    found = opened("group/model", cache_dir=cache)
    assert torch.equal(logits(found), logits(opened(copies[kind], cache_dir=cache)))
    for revision in (OTHER_COMMIT, "main"):
        opened("group/model", cache_dir=cache, revision=revision)
    with pytest.raises(OSError):
        opened("group/model", cache_dir=cache, revision="no-such-branch")
    with pytest.raises(OSError):
        opened("group/other", cache_dir=cache)


def test_a_base_of_the_hub_is_opened_at_the_commit_of_the_training(copies, tmp_path):
    cache = tmp_path / "hub"
    to_hub(copies["stock"], cache, "gpt2")
    model = opened("gpt2", cache_dir=cache)
    model.add_lora([8])
    model.set_base("gpt2")
    model.save_pretrained(tmp_path / "own")
    other = GPT2LMHeadModel.from_pretrained(copies["stock"])
    with torch.no_grad():
        other.transformer.wte.weight.mul_(2)
    other.save_pretrained(tmp_path / "newer")
    to_hub(tmp_path / "newer", cache, "gpt2", OTHER_COMMIT)  # main moved on
    assert torch.equal(logits(opened(tmp_path / "own", cache_dir=cache)), logits(model))
    edit(tmp_path / "own", base_model_revision=OTHER_COMMIT)
    with pytest.raises(UserError, match="checksum .* adapters do not fit.*--base_model_name_or_path"):
        opened(tmp_path / "own", cache_dir=cache)


# ---- the base


def test_a_base_that_cannot_be_the_base_is_refused_with_the_flag(copies, tmp_path, monkeypatch):
    own = copies["adapters"]
    other = tmp_path / "other"
    model = QuantGPT2ForQuestionAnswering.from_pretrained(copies["stock"])
    with torch.no_grad():
        model.transformer.wte.weight.mul_(2)
    model.save_pretrained(other)
    chain = tmp_path / "chain"
    shutil.copytree(own, chain)
    (tmp_path / "empty").mkdir()
    bases = (own, f"{own}/.", other, chain, copies["exported"], tmp_path / "empty", "/etc", "/", "evil/model", "evil")
    for base in map(str, bases):
        edit(own, base_model_name_or_path=base)
        assert "--base_model_name_or_path" in opens_or_user_error(own), base
    (tmp_path / "gpt2").mkdir()
    monkeypatch.chdir(tmp_path)
    edit(own, base_model_name_or_path="gpt2")
    assert "there is a folder of that name" in opens_or_user_error(own)
    opened(own, base_model_name_or_path=copies["stock"])
    with pytest.raises(UserError, match="the checkpoint itself"):
        opened(own, base_model_name_or_path=own)


def test_a_base_is_never_downloaded_because_a_config_says_so(copies, tmp_path, monkeypatch):
    import models.checkpoint as module

    asked = []

    def record(name, file, **options):
        asked.append((str(name), options.get("local_files_only")))
        raise OSError("not there")

    monkeypatch.setattr(module, "cached_file", record)
    for name in ("gpt2", "evil/model"):
        edit(copies["adapters"], base_model_name_or_path=name)
        assert "--base_model_name_or_path" in opens_or_user_error(copies["adapters"])
    assert asked == [("gpt2", None), ("evil/model", True)]


def test_a_checkpoint_of_the_hub_does_not_open_a_folder_of_this_machine(copies, tmp_path):
    to_hub(copies["adapters"], tmp_path / "hub", "group/model")
    with pytest.raises(UserError, match="a folder of another machine.*--base_model_name_or_path"):
        opened("group/model", cache_dir=tmp_path / "hub")
    opened("group/model", cache_dir=tmp_path / "hub", base_model_name_or_path=copies["stock"])


def test_a_base_of_another_architecture_is_refused(copies):
    for key, value in {"n_head": 2, "activation_function": "relu", "layer_norm_epsilon": 0.1}.items():
        before = (copies["adapters"] / "config.json").read_text()
        edit(copies["adapters"], **{key: value})
        assert f'"{key}" = {json.dumps(value)}, but its base' in opens_or_user_error(copies["adapters"])
        (copies["adapters"] / "config.json").write_text(before)


def test_adapters_do_not_overwrite_the_base(copies):
    path = copies["adapters"] / "model.safetensors"
    save_file(load_file(path) | {"transformer.ln_f.weight": torch.ones(64)}, path)
    edit(copies["adapters"], weights_sha256=...)
    assert "belongs to the base" in opens_or_user_error(copies["adapters"])


# ---- stock weights


def test_stock_weights_in_several_files(copies, tmp_path):
    model = GPT2LMHeadModel.from_pretrained(copies["stock"])
    model.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert not (tmp_path / "shards" / "model.safetensors").exists()
    with torch.no_grad():
        found = QuantGPT2LMHeadModel.from_pretrained(tmp_path / "shards")(torch.arange(9)[None]).logits
        torch.testing.assert_close(found, model.eval()(torch.arange(9)[None]).logits, rtol=0, atol=1e-5)
    for content in ({}, {"weight_map": {}}, {"weight_map": {"a": "../x.safetensors"}}, {"weight_map": {"a": 5}}):
        (tmp_path / "shards" / "model.safetensors.index.json").write_text(json.dumps(content))
        assert "weight_map" in opens_or_user_error(tmp_path / "shards")


def test_bare_names_and_masks_of_the_hub_files_are_understood(copies, tmp_path):
    """gpt2 on the hub: no "transformer." before the names, and the causal masks among the tensors."""
    path = copies["stock"] / "model.safetensors"
    expected = QuantGPT2LMHeadModel.from_pretrained(copies["stock"])
    state = {name.removeprefix("transformer."): tensor for name, tensor in load_file(path).items()}
    state["h.0.attn.bias"] = torch.ones(1, 1, 128, 128, dtype=torch.bool)
    state["h.1.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(state, path)
    found = QuantGPT2LMHeadModel.from_pretrained(copies["stock"])
    assert found.base_checksum() == expected.base_checksum()


def test_classes_of_the_data_override_those_of_the_config(copies):
    model = QuantGPT2ForSequenceClassification.from_pretrained(copies["stock"], num_labels=4)
    assert model.score.out_features == 4 and len(model.config.id2label) == 4
    model.save_pretrained(copies["full"])
    again = QuantGPT2ForSequenceClassification.from_pretrained(copies["full"])
    assert again.config.num_labels == 4
    with pytest.raises(UserError, match="do not fit"):
        QuantGPT2ForSequenceClassification.from_pretrained(copies["full"], num_labels=3)


# ---- the rotated quantizer

ROTATED = KINDS[1:]
ROTATION = f"{C_FC}.rotation"


def random_rotations(model, seed=0):
    """{linear: d} of random signs and scales."""
    generator = torch.Generator().manual_seed(seed)
    rows = {name: torch.randn(n, generator=generator) for name, (_, n) in model.layer_shapes().items()}
    return {name: row.sign() * torch.exp(row.clamp(-1, 1)) for name, row in rows.items()}


@pytest.fixture(scope="module")
def rotated_originals(pristine, tmp_path_factory):
    """{kind: (folder, logits at 8 bits, at 4 bits, at 32 bits or None)} of our three kinds, rotated."""
    root = tmp_path_factory.mktemp("rotated")
    expected = {}
    for kind in ROTATED:
        model = opened(pristine["adapters" if kind != "full" else "full"])
        model.set_rotations(random_rotations(model))
        if kind == "exported":
            configs = [model.set_bit_config(8), model.set_bit_config(4)]
            save_exported(model, root / kind, served_widths(configs), configs[0])
        else:
            model.set_bit_config(8)
            model.save_pretrained(root / kind)
        expected[kind] = [logits_at(model, bits) for bits in ((8, 4, 32) if kind == "full" else (8, 4))]
    return root, expected


@pytest.fixture
def rotated(rotated_originals, tmp_path):
    """{kind: folder} of the test's own."""
    for kind in ROTATED:
        shutil.copytree(rotated_originals[0] / kind, tmp_path / f"rotated-{kind}")
    return {kind: tmp_path / f"rotated-{kind}" for kind in ROTATED}


def logits_at(model, bits):
    with model.at_bits(bits):
        return logits(model)


@pytest.mark.parametrize("kind", ROTATED)
def test_d_comes_back(kind, rotated, rotated_originals, pristine):
    model = opened(rotated[kind])
    assert model.config.quantizer == "rotated"
    wanted = random_rotations(model)
    assert all(torch.equal(d, wanted[name]) and d.dtype == torch.float32 for name, d in model.rotations().items())
    assert {name for name in load_file(rotated[kind] / "model.safetensors") if name.endswith(".rotation")} == {
        f"{name}.rotation" for name in wanted
    }
    for bits, expected in zip((8, 4, 32), rotated_originals[1][kind], strict=False):
        assert torch.equal(logits_at(model, bits), expected)
    assert not torch.equal(rotated_originals[1][kind][0], logits_at(opened(pristine[kind]), 8))
    again = opened(rotated[kind], dtype="bfloat16")
    assert again.dtype == torch.bfloat16 and all(torch.equal(d, wanted[name]) for name, d in again.rotations().items())
    logits(again)


def test_saved_again_it_is_the_same(rotated, rotated_originals, tmp_path):
    for kind in ("full", "adapters"):
        model = opened(rotated[kind])
        logits(model)
        model.save_pretrained(tmp_path / kind)
        assert torch.equal(logits_at(opened(tmp_path / kind), 4), rotated_originals[1][kind][1])
        model.set_rotations(None)
        model.save_pretrained(tmp_path / kind)
        found = opened(tmp_path / kind)
        assert found.config.quantizer == "minmax" and found.rotations() is None
        assert not [name for name in load_file(tmp_path / kind / "model.safetensors") if "rotation" in name]


def test_an_exported_rotated_folder_runs_on_integers(rotated, rotated_originals):
    model = opened(rotated["exported"])
    model.set_execution("integer")
    expected = rotated_originals[1]["exported"][0]
    assert (logits_at(model, 8) - expected).abs().median() < 1e-3 * expected.std()
    for asked in (None, random_rotations(model, seed=1)):
        with pytest.raises(UserError, match="of one quantizer"):
            model.set_rotations(asked)
    assert (logits_at(model, 8) - expected).abs().median() < 1e-3 * expected.std()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (with_value(0.0), "has entries that are 0 or not finite"),
        (with_value(math.nan), "has entries that are 0 or not finite"),
        (with_value(-math.inf), "has entries that are 0 or not finite"),
        (lambda t: t[:-1], "is float32 (63,): allowed is float32 (64,)"),
        (lambda t: t[None], "is float32 (1, 64): allowed is float32 (64,)"),
        (lambda t: t.new_zeros(0), "is float32 (0,): allowed is float32 (64,)"),
        (lambda t: t.half(), "is float16 (64,): allowed is float32 (64,)"),
        (lambda t: t.double(), "is float64 (64,): allowed is float32 (64,)"),
        (lambda t: t.to(torch.int64), "is int64 (64,): allowed is float32 (64,)"),
    ],
)
@pytest.mark.parametrize("kind", ROTATED)
def test_a_faulty_d_is_one_error(kind, change, told, rotated):
    rewrite(rotated[kind], **{ROTATION: change})
    path = rotated[kind] / "model.safetensors"
    assert opens_or_user_error(rotated[kind]) == f'{path}: "{ROTATION}" {told}'


@pytest.mark.parametrize("kind", ROTATED)
def test_d_and_the_quantizer_go_together(kind, rotated):
    path = rotated[kind] / "model.safetensors"
    before = (rotated[kind] / "config.json").read_text()
    for value in ("minmax", ...):
        edit(rotated[kind], quantizer=value)
        lines = opens_or_user_error(rotated[kind]).splitlines()
        assert len(lines) == 8 and f'{path}: "{ROTATION}" is there, but "quantizer" is "minmax"' in lines
    (rotated[kind] / "config.json").write_text(before)
    save_file({name: t for name, t in load_file(path).items() if name != ROTATION}, path)
    edit(rotated[kind], weights_sha256=...)
    assert opens_or_user_error(rotated[kind]) == f'{path}: "{ROTATION}" is missing, but "quantizer" is "rotated"'


@pytest.mark.parametrize("kind", ROTATED)
def test_a_faulty_quantizer_is_one_error(kind, rotated, copies):
    for folder in (rotated[kind], copies[kind]):
        for value in [*HOSTILE, "Rotated", "minmax "]:
            edit(folder, quantizer=value)
            if value is not None and value != value:  # NaN: no JSON
                assert "not valid JSON" in opens_or_user_error(folder)
                edit_text(folder, "NaN", '"minmax"')
                continue
            message = opens_or_user_error(folder)
            assert message.startswith(f'{folder / "config.json"}: "quantizer" = ') and "\n" not in message
            assert message.endswith('allowed is "minmax", "rotated"')


def edit_text(folder, old, new):
    path = folder / "config.json"
    path.write_text(path.read_text().replace(old, new))


@pytest.mark.parametrize("kind", ROTATED)
def test_a_minmax_checkpoint_that_says_rotated(kind, copies):
    edit(copies[kind], quantizer="rotated")
    lines = opens_or_user_error(copies[kind]).splitlines()
    assert len(lines) == 8
    assert f'"{ROTATION}" is missing, but "quantizer" is "rotated"' in lines[2]


@pytest.mark.parametrize("kind", KINDS)
def test_older_checkpoints_without_the_key_open(kind, copies, pristine):
    config = json.loads((pristine[kind] / "config.json").read_text())
    edit(copies[kind], quantizer=...)
    model = opened(copies[kind])
    assert model.config.quantizer == "minmax" and model.rotations() is None
    assert torch.equal(logits(model), logits(opened(pristine[kind]))), config


def test_stock_weights_know_no_rotation(copies):
    """A "quantizer" in a stock config.json is one of the keys that nobody reads."""
    edit(copies["stock"], quantizer="rotated")
    assert opened(copies["stock"]).config.quantizer == "minmax"
    path = copies["stock"] / "model.safetensors"
    save_file(load_file(path) | {ROTATION: torch.ones(64)}, path)
    assert f'"{ROTATION}" is there, but "quantizer" is "minmax"' in opens_or_user_error(copies["stock"])


@pytest.mark.parametrize(("n_embd", "n_head", "what"), [(24, 1, "this linear"), (96, 4, "the heads of K and V")])
def test_rows_that_cannot_be_rotated_are_one_error(n_embd, n_head, what, tmp_path):
    """Blocks of 8."""
    sizes = {"n_layer": 1, "n_embd": n_embd, "n_head": n_head, "n_positions": 16, "vocab_size": 50}
    model = QuantGPT2ForQuestionAnswering(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    linear = "transformer.h.0.attn.c_attn"
    with pytest.raises(UserError, match=f"^{linear}: {what}: rows of 24 .* needs a multiple of 16$"):
        model.set_rotations(random_rotations(model))
    model.save_pretrained(tmp_path)
    rotations = {f"{name}.rotation": d for name, d in random_rotations(model).items()}
    save_file(load_file(tmp_path / "model.safetensors") | rotations, tmp_path / "model.safetensors")
    edit(tmp_path, weights_sha256=..., quantizer="rotated")
    message = opens_or_user_error(tmp_path)
    assert message.startswith(f"{tmp_path / 'config.json'}: {linear}: {what}: rows of 24 have") and "16" in message
    assert "\n" not in message


def test_checksums_of_base_and_model(pristine):
    """d is no base weight: adapters of another d have the same base. It is part of what answers depend on."""
    model = opened(pristine["adapters"])
    base, plain = model.base_checksum(), model_checksum(model)
    found = []
    for seed in (0, 1):
        model.set_rotations(random_rotations(model, seed))
        assert model.base_checksum() == base == model.config.base_checksum
        found.append(model_checksum(model))
    model.set_rotations(random_rotations(model, 0))
    assert model_checksum(model) == found[0]
    model.set_rotations(None)
    assert model_checksum(model) == plain and len({plain, *found}) == 3


def test_a_rotated_full_checkpoint_is_a_base(rotated, tmp_path):
    """Its own d stays behind; that of the adapters counts."""
    model = opened(rotated["full"])
    model.add_lora([4, 8])
    model.set_base(str(rotated["full"]))
    model.set_rotations(random_rotations(model, seed=1))
    model.save_pretrained(tmp_path / "own")
    found = opened(tmp_path / "own")
    assert torch.equal(logits_at(found, 4), logits_at(model, 4))
    model.set_rotations(None)
    model.save_pretrained(tmp_path / "own")
    assert torch.equal(logits_at(opened(tmp_path / "own"), 4), logits_at(model, 4))


def test_every_class_comes_back_rotated(pristine, tmp_path):
    for kind in (QuantGPT2LMHeadModel, QuantGPT2ForSequenceClassification):
        model = kind.from_pretrained(pristine["stock"])
        model.set_rotations(random_rotations(model))
        model.set_bit_config(4)
        model.save_pretrained(tmp_path)
        ids = torch.arange(12)[None]
        with torch.no_grad():
            assert torch.equal(kind.from_pretrained(tmp_path)(ids).logits, model.eval()(ids).logits)


# ---- AutoModel


def test_auto_model_opens_checkpoints_of_every_head(tiny_model, tmp_path):
    heads = {
        AutoModelForQuestionAnswering: QuantGPT2ForQuestionAnswering,
        AutoModelForSequenceClassification: QuantGPT2ForSequenceClassification,
        AutoModelForCausalLM: QuantGPT2LMHeadModel,
    }
    for auto, cls in heads.items():
        saved = cls.from_pretrained(tiny_model)
        saved.add_lora([4, 8])
        saved.set_bit_config(4)
        saved.save_pretrained(tmp_path)
        opened = auto.from_pretrained(tmp_path, resid_pdrop=0.25, attn_implementation="eager", trust_remote_code=True)
        assert type(opened).__name__ == cls.__name__ and opened.config.lora_bank == ["4", "8"]
        assert (opened.config.resid_pdrop, opened.config._attn_implementation) == (0.25, "eager")
        assert opened.config.bit_config == saved.config.bit_config and saved.config.resid_pdrop != 0.25
        assert all(torch.equal(value, saved.state_dict()[name]) for name, value in opened.state_dict().items())
        assert auto.from_pretrained(tmp_path, dtype="bfloat16").dtype == torch.bfloat16
        with pytest.raises(ValueError, match="resid_pdrop = 2.0: a number, 0 to 1"):
            auto.from_pretrained(tmp_path, resid_pdrop=2.0)

"""Bit-width configs: what resolves to what, and every refusal with its message."""

import json
import pathlib
import time

import pytest

from models.bit_config import ALLOWED_BITS, config_name, describe_bit_config, has_kv, resolve_bit_config, short_name
from models.checkpoint_rules import linear_shapes
from models.errors import UserError
from models.modeling_gpt2_quant import QuantLinear
from models.quantization import FLOAT_BITS

CONFIGS = pathlib.Path(__file__).resolve().parents[1] / "configs"
SIZES = {"distilgpt2": (6, 768), "gpt2": (12, 768), "gpt2-medium": (24, 1024), "gpt2-large": (36, 1280),
         "gpt2-xl": (48, 1600)}  # fmt: skip


def shapes_of(blocks, width=64):
    return linear_shapes({"n_layer": blocks, "n_embd": width})


SHAPES = shapes_of(12, 768)
LAYERS = list(SHAPES)
C_ATTN, C_FC = "transformer.h.0.attn.c_attn", "transformer.h.0.mlp.c_fc"


def resolve(config):
    return resolve_bit_config(config, LAYERS)


def test_int_sets_everything_and_kv_only_where_it_is():
    for config in (4, {"default": 4}, "W4A4KV4", dict.fromkeys(LAYERS, 4)):
        resolved = resolve(config)
        assert list(resolved) == LAYERS
        for name, bits in resolved.items():
            assert bits == {"w_bits": 4, "a_bits": 4} | ({"kv_bits": 4} if has_kv(name) else {})
        assert short_name(resolved) == "W4A4KV4"


def test_later_keys_win_and_objects_leave_the_rest():
    resolved = resolve({"*.mlp.*": 6, "*.h.0.*": {"w_bits": 3}, C_ATTN: "W5A7", "default": "W8A8KV4"})
    assert resolved[C_ATTN] == {"w_bits": 5, "a_bits": 7, "kv_bits": 4}
    assert resolved[C_FC] == {"w_bits": 3, "a_bits": 6}
    assert resolved["transformer.h.1.attn.c_proj"] == {"w_bits": 8, "a_bits": 8}
    assert short_name(resolved) == "mixed"
    assert resolve(resolved) == resolved, "a resolved config is a config"


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.json")), ids=lambda path: path.stem)
def test_presets_resolve(path):
    resolved = resolve(str(path))
    assert list(resolved) == LAYERS and json.loads(path.read_text())["description"]
    assert resolve(path) == resolved


def test_published_hybrid():
    resolved = resolve(CONFIGS / "hybrid_25pct_4bit.json")
    low = {name for name, bits in resolved.items() if bits["w_bits"] == 4}
    published = {f"transformer.h.{i}.attn.c_proj" for i in range(4)}
    published |= {"transformer.h.9.mlp.c_fc", "transformer.h.9.mlp.c_proj"}
    published |= {n for n in LAYERS if n.startswith(("transformer.h.10.", "transformer.h.11."))}
    assert low == published and len(low) == 14
    description = describe_bit_config(resolved, SHAPES)
    assert description["average_w_bits"] == 7.0  # 25.0 % of the weights at 4 bits, 75.0 % at 8
    assert description["layers_per_w_bits"] == {"4": 14, "8": 34}


@pytest.mark.parametrize("model", SIZES)
@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.json")), ids=lambda path: path.stem)
def test_presets_mean_the_same_share_of_every_model_of_the_family(path, model):
    shapes = shapes_of(*SIZES[model])
    resolved, reference = resolve_bit_config(path, shapes), resolve(path)
    for kind in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
        found, expected = ([bits for n, bits in c.items() if n.endswith(kind)] for c in (resolved, reference))
        if len(found) % 12 == 0:  # the same bits in the same part of the blocks
            assert found == [bits for bits in expected for _ in range(len(found) // 12)]
        else:  # of 6: half as many, rounded
            counts = [sum(bits["w_bits"] == 4 for bits in config) for config in (found, expected)]
            assert abs(counts[0] - counts[1] / 2) <= 0.5, kind
    if len(shapes) % 48 == 0:
        averages = [describe_bit_config(c, s)["average_w_bits"] for c, s in ((resolved, shapes), (reference, SHAPES))]
        assert averages[0] == pytest.approx(averages[1])


@pytest.mark.parametrize(
    ("blocks", "file"), [(4, "quickstart/hybrid_4blocks.json"), (8, "reproduce/hybrid_8blocks.json")]
)
def test_hybrid_written_out_for_other_sizes_is_the_preset(blocks, file):
    shapes = shapes_of(blocks)
    assert resolve_bit_config(CONFIGS.parent / file, shapes) == resolve_bit_config(
        CONFIGS / "hybrid_25pct_4bit.json", shapes
    )


@pytest.mark.parametrize(
    ("percents", "blocks", "expected"),
    [("0%-33%", 12, range(4)), ("33%-100%", 12, range(4, 12)), ("83%-100%", 6, [5]), ("75%-100%", 48, range(36, 48)),
     ("0%-100%", 7, range(7)), ("0%-1%", 12, [0]), ("99%-100%", 12, [11]), ("50%-51%", 4, [2]), ("25%-50%", 2, [0]),
     ("75%-83%", 1, [0]), ("0%-50%", 3, [0]), ("50%-100%", 3, [1, 2])],
)  # fmt: skip
def test_a_block_range_is_rounded_to_whole_blocks_and_has_one_at_least(percents, blocks, expected):
    shapes = shapes_of(blocks)
    for key in (f"transformer.h.{{{percents}}}.mlp.*", f"*.{{{percents}}}.mlp.c_?*"):
        resolved = resolve_bit_config({"default": 8, key: 4}, shapes)
        low = {name for name, bits in resolved.items() if bits["w_bits"] == 4}
        assert low == {f"transformer.h.{block}.mlp.{name}" for block in expected for name in ("c_fc", "c_proj")}


def test_description_of_hand_counted_layers():
    shapes = {C_ATTN: (6, 2), C_FC: (8, 2)}
    resolved = resolve_bit_config({C_ATTN: "W4A8KV8", C_FC: 32}, shapes)
    assert describe_bit_config(resolved, shapes) == {
        "average_w_bits": (12 * 4 + 16 * 32) / 28,
        "weight_bytes": 6 * 1 + 6 * 4 + 16 * 4,
        "bitops_per_token": 12 * 4 * 8 + 16 * 32 * 32,
        "layers_per_w_bits": {"4": 1, "32": 1},
    }


def test_weight_bytes_are_those_that_a_model_holds():
    for bits in ALLOWED_BITS:
        layer = QuantLinear(7, 5).requires_grad_(False)
        layer.w_bits = bits
        held = [layer.weight] if bits in FLOAT_BITS else layer.stored_codes([bits])[bits]
        resolved = {"mlp": {"w_bits": bits, "a_bits": 8}}
        assert describe_bit_config(resolved, {"mlp": (5, 7)})["weight_bytes"] == sum(tensor.nbytes for tensor in held)


BAD = [
    ({"default": 1}, '"default": 1 is not a bit-width: allowed is an int, 2 to 8, 16 or 32'),
    ({"default": 9}, "9 is not a bit-width"),
    ({"default": 12}, "12 is not a bit-width"),
    ({"default": -4}, "-4 is not a bit-width"),
    ({"default": "8"}, '"8" is not a bit-width'),
    ({"default": 4.5}, "4.5 is not a bit-width"),
    ({"default": True}, "true is not a bit-width"),
    ({"default": [4]}, "[4] is not a bit-width"),
    ({"default": "W4A9KV8"}, "a_bits = 9 is not a bit-width"),
    ({"default": {"w_bits": "4"}}, 'w_bits = "4" is not a bit-width'),
    ({"default": 8, C_FC: {"bits": 4}}, f'"{C_FC}": unknown field "bits": allowed are w_bits, a_bits, kv_bits'),
    ({"default": 8, C_FC: {}}, "an empty object sets nothing"),
    ({"default": 8, "description": 3}, '"description" = 3: allowed is a string'),
    (
        {"default": 8, "transformer.h.0.atn.c_proj": 4},
        '"transformer.h.0.atn.c_proj" matches no layer (the model has blocks 0-11); '
        'did you mean "transformer.h.0.attn.c_proj"?',
    ),
    ({"default": 8, "transformer.h.12.*": 4}, '"transformer.h.12.*" matches no layer'),
    *(
        ({"default": 8, key: 4}, f'"{key}" matches no layer: allowed is {{FROM%-TO%}} in place of a block\'s number')
        for key in (
            "transformer.h.{50%-20%}.*",
            "transformer.h.{0%-101%}.*",
            "transformer.h.{50%-50%}.*",
            "transformer.h.{25%}.*",
            "transformer.h.{0.5%-1%}.*",
            "transformer.h.[0%-33%].*",
            "*.{0-3}.*",
        )
    ),
    (
        {"default": 8, "transformer.h.{0%-33%}.atn.*": 4},
        'atn.*" matches no layer (the model has blocks 0-11); did you',
    ),
    ({"default": 8, "*.{0%-50%}.{50%-100%}.*": 4}, '"*.{0%-50%}.{50%-100%}.*" matches no layer'),
    ({"*.attn.*": 8}, f'"{C_FC}" and 23 more: nothing sets w_bits'),
    ({"default": {"w_bits": 4, "a_bits": 8}}, f'"{C_ATTN}" and 11 more: nothing sets kv_bits'),
    ({name: 8 for name in LAYERS[1:]}, f'"{C_ATTN}": nothing sets w_bits'),
    ({"default": 8, C_FC: {"kv_bits": 4}}, f'"{C_FC}": kv_bits on a layer without K and V'),
    ({"default": 8, C_FC: "W4A8KV4"}, f'"{C_FC}": kv_bits on a layer without K and V'),
]


@pytest.mark.parametrize(("config", "message"), BAD, ids=[message[:40] for _, message in BAD])
def test_refusals_name_file_key_value_and_what_is_allowed(config, message, tmp_path):
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError) as caught:
        resolve(path)
    assert f"{path}: " in str(caught.value) and message in str(caught.value)


def test_all_faults_are_reported_at_once(tmp_path):
    path = tmp_path / "bad.json"
    path.write_text(json.dumps({"default": 9, "nope": 4, C_FC: {"bits": 4}}))
    with pytest.raises(ValueError) as caught:
        resolve(path)
    assert str(caught.value).count(str(path)) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"default": 8, "default": 4}', 'duplicate key "default"'),
        (f'{{"default": 8, "{C_FC}": {{"w_bits": 4, "w_bits": 8}}}}', 'duplicate key "w_bits"'),
        ('{"default": 8', "not valid JSON"),
        ("", "not valid JSON"),
        ("[8]", "expected a JSON object"),
        ("8", "expected a JSON object"),
    ],
)
def test_refused_files(text, message, tmp_path):
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(ValueError) as caught:
        resolve(path)
    assert str(path) in str(caught.value) and message in str(caught.value)


def test_missing_file():
    with pytest.raises(FileNotFoundError, match="nowhere.json: no such bit-width config"):
        resolve("nowhere.json")


# ---- whatever is typed: one UserError, at once, in a few lines


def refusal(config):
    """The message of a config that is refused within a second or two and not echoed."""
    start = time.process_time()
    with pytest.raises((UserError, FileNotFoundError)) as caught:
        resolve(config)
    message = str(caught.value)
    assert time.process_time() - start < 3
    assert len(message.splitlines()) <= 22 and max(map(len, message.splitlines())) < 500
    return message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"default": ' + "[" * 100_000, "nested too deeply"),
        ('{"default": ' + "[" * 900 + "]" * 900 + "}", "is not a bit-width"),
        ('{"a": ' * 100_000, "nested too deeply"),
        ('{"default": ' + "9" * 5000 + "}", "not valid JSON"),
        ('{"default": ' + "9" * 4000 + "}", "is not a bit-width"),
        ('{"default": NaN}', "NaN is no number"),
        ('{"default": -Infinity}', "-Infinity is no number"),
        ('{"default": 4.0}', "4.0 is not a bit-width"),
        ('{"default": ""}', '"" is not a bit-width'),
        ('{"default": "W04A08"}', '"W04A08" is not a bit-width'),
        ('{"default": "W٤A٨"}', "is not a bit-width"),
        ('{"default": "' + "x" * 10**7 + '"}', '"xxxxx'),
        ('{"default": [' + "1," * 10**6 + "1]}", "[1, 1, 1"),
        ('{"default": 8, "' + "*a" * 10**6 + '": 4}', "longer than 100 characters"),
        ('{"default": 8, "' + "[" * 20_000 + '": 4}', "longer than 100 characters"),
        ('{"default": 8, "*[!": 4, "[]": 4}', '"[]" matches no layer'),
        ('{"default": 8, "": 4}', '"" matches no layer'),
        ('{"default": 8, "a\\n\\u001b[31m": 4}', '"a\\n\\u001b[31m" matches no layer'),
        ('{"default": 8, "\\ud800": "\\ud800"}', '"\\ud800" matches no layer'),
        (json.dumps({f"*layer{i}[ab]*": 4 for i in range(10_000)}), "found 10000 keys"),
        (json.dumps({f"layer{i}": 4 for i in range(900)}), "... and 880 more"),
        (json.dumps({"default": 8} | {f"*{{0%-50%}}*{i}[ab]*": 4 for i in range(1000)}), "... and 980 more"),
        (json.dumps({"default": {f"f{i}": 4 for i in range(10_000)}}), 'unknown field "f0" and 9999 more'),
        ("{" + ",".join(f'"k{i % 5000}": 4' for i in range(100_000)) + "}", "and 4995 more: keep one of them"),
        ('"W4A8"', "expected a JSON object"),
        ("NaN", "NaN is no number"),
    ],
    ids=range(26),
)
def test_files_of_any_kind_are_refused_at_once(text, message, tmp_path):
    path = tmp_path / "bad.json"
    path.write_text(text, encoding="utf-8")
    found = refusal(path)
    assert message in found and str(path) in found


@pytest.mark.parametrize(
    "config",
    ["W٤A٨", "W04A08", "W4A8KV08", "٨", "²", "08", "-4", " 8", "8.0", "8" * 100_000, "W" + "8" * 100_000 + "A8", "",
     "a\0b", ".", b"8", {4, 8}, {0: 4}, {"default": 8, 1: 4}, {"default": b"8"}, {"default": {1: 4}}, None, 8.0, True,
     10**5000, float("nan"), [8], {"default": 10**5000}, {"default": {8}}],
    ids=range(28),
)  # fmt: skip
def test_what_is_no_config_is_refused(config):
    refusal(config)


def test_a_width_as_text_is_the_width(tmp_path, monkeypatch):
    assert resolve("8") == resolve(8) and resolve("32") == resolve(32)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "8").write_text('{"default": 4}')
    assert resolve("8") == resolve(8), "a width is no file name"
    for bits in ("0", "9", "12"):
        with pytest.raises(ValueError, match=f"{bits} is not a bit-width"):
            resolve(bits)


def test_byte_order_mark_is_no_part_of_a_config(tmp_path):
    (tmp_path / "a.json").write_text('{"default": 8}', encoding="utf-8-sig")
    assert resolve(tmp_path / "a.json") == resolve(8)


def test_names_of_configs():
    assert config_name("8") == "W8A8KV8" and config_name("W4A8") == "W4A8"
    assert config_name("configs/hybrid.v2.json") == "hybrid.v2" and config_name("W04A08") == "W04A08"

"""configs/show.py: the tables, the numbers, the differences, the picture, and what is refused."""

import json
import re
import sys

import pytest

from conftest import ROOT, load_script

HYBRID = str(ROOT / "configs" / "hybrid_25pct_4bit.json")
show = load_script("configs/show.py")


@pytest.fixture
def run(monkeypatch, capsys):
    """run(*words): what is printed."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["show.py", *map(str, words)])
        show.main()
        return capsys.readouterr().out

    return call


def rows(text):
    """{block: its cells} of the first table of a text."""
    return {int(line.split()[0]): line.split()[1:] for line in text.split("\n\n")[0].splitlines()[2:]}


def test_a_table_of_blocks_by_layer_types_with_its_numbers(run):
    text = run(HYBRID)
    assert "\033" not in text, "no colours in a pipe"
    table = rows(text)
    assert list(table) == list(range(12))
    assert table[0] == ["W8A8KV8", "W4A4", "W8A8", "W8A8"] and table[11] == ["W4A4KV4", "W4A4", "W4A4", "W4A4"]
    assert re.search(r"average weight bits +7\.000\n", text)
    weights, scales = 12 * 768 * 768 * 12, 4 * 12 * 768 * 9
    assert f"{(weights * 0.75 + weights * 0.25 / 2 + scales) / 1e6:.3f}" in text
    assert f"{(weights * 0.75 * 64 + weights * 0.25 * 16) / 1e9:.3f}" in text


@pytest.mark.parametrize(
    ("model", "blocks", "width"),
    [("distilgpt2", 6, 768), ("openai-community/gpt2-medium", 24, 1024), ("gpt2-large", 36, 1280),
     ("gpt2-xl", 48, 1600)],
)  # fmt: skip
def test_the_family_is_known_without_a_network(model, blocks, width, run, monkeypatch):
    monkeypatch.setattr(show, "read_config", None)
    text = run("8", "--model", model)
    megabytes = blocks * (12 * width**2 + 4 * 9 * width) / 1e6  # codes of a byte and scales
    assert len(rows(text)) == blocks and f"{megabytes:.3f}" in text and re.search(r"bits +8\.000", text)


def test_of_a_folder_only_the_config_is_read(run, tmp_path):
    config = {"model_type": "gpt2", "vocab_size": 9, "n_positions": 9, "n_embd": 64, "n_layer": 3, "n_head": 4}
    (tmp_path / "config.json").write_text(json.dumps(config | {"n_inner": 128}))
    text = run("W4A8KV8", "--model", tmp_path)
    assert len(rows(text)) == 3 and f"{3 * (4 * 64 * 64 + 2 * 64 * 128) / 2 / 1e6 + 3 * 4 * 448 / 1e6:.3f}" in text


def test_two_configs_are_compared_layer_by_layer_and_field_by_field(run, tmp_path):
    other = json.loads((ROOT / "configs" / "hybrid_25pct_4bit.json").read_text())
    other |= {"transformer.h.[25].mlp.c_fc": {"a_bits": 6}, "transformer.h.11.attn.c_attn": "W4A4KV8"}
    (tmp_path / "other.json").write_text(json.dumps(other))
    text = run(HYBRID, tmp_path / "other.json")
    first, second = text.split("\n\n")[:2]
    assert "*" not in first and second.count("*") == 3 and "W8A6*" in second
    assert text.endswith(
        "3 of 48 linears differ:\n  attn.c_attn of block 11: kv_bits 4 to 8\n  mlp.c_fc of block 2, 5: a_bits 8 to 6\n"
    )
    assert re.search(r"average weight bits +7\.000 +7\.000 +\+0\.000", text)
    assert "0 of 48 linears differ\n" in run("8", "W8A8KV8")


def test_spans():
    assert show.spans([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8" and show.spans([3]) == "3"


def test_files_of_one_name_are_told_apart_by_their_paths(run, tmp_path):
    for folder, bits in (("a", 8), ("b", 4)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "c.json").write_text(f'{{"default": {bits}}}')
    text = run(tmp_path / "a" / "c.json", tmp_path / "b" / "c.json")
    assert f"{tmp_path}/b/c.json, gpt2" in text and "48 of 48 linears differ" in text


def test_colours_are_for_a_terminal(run, monkeypatch):
    monkeypatch.setattr(show.sys.stdout, "isatty", lambda: True)
    text = run("4")
    assert text.count("\033[30;48;5;215m") == 48 == text.count("\033[0m")
    assert len({len(re.sub(r"\033\[[\d;]*m", "", line)) for line in text.splitlines()[2:14]}) == 1


def test_the_picture_shows_the_same_and_frames_what_differs(run, figures, tmp_path):
    run(HYBRID, "8", "--png", tmp_path / "out" / "both.png")
    figure = figures["both"]
    assert (tmp_path / "out" / "both.png").stat().st_size > 10_000
    first, second = figure.axes
    texts = [[text.get_text() for text in axes.texts] for axes in (first, second)]
    assert [found.count("W4A4") + found.count("W4A4KV4") for found in texts] == [14, 0]
    assert [len(axes.patches) for axes in (first, second)] == [0, 14]
    assert first.get_title() == "hybrid_25pct_4bit: 7.00 bits, 74.65 MB, 4.42e9 BitOPs a token"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["8", "4", "6"], "3 configs: allowed are one, or two"),
        (["9"], "9 is not a bit-width"),
        (["none.json"], "none.json: no such bit-width config"),
        (["8", "--model", "FOLDER"], "config.json: no such file"),
        (["8", "--png", "FOLDER"], "--png .*: is a folder; allowed is a file"),
        ([HYBRID, "--model", "OTHER"], "model_type is 'bert'"),
    ],
)
def test_refusals(words, message, run, tmp_path):
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "empty").mkdir()
    places = {"FOLDER": tmp_path / "empty", "OTHER": tmp_path / "bert"}
    with pytest.raises((ValueError, OSError), match=message):
        run(*(places.get(word, word) for word in words))
    assert not list((tmp_path / "empty").iterdir())

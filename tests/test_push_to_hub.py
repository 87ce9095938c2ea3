"""serving/push_to_hub.py: the model card, and the upload to a hub on this machine that writes into a folder."""

import base64
import http.server
import json
import sys
import threading

import pytest
import torch
from huggingface_hub import ModelCard, constants
from safetensors.torch import load_file

from conftest import load_script
from models.exported import save_exported, served_widths
from models.modeling_gpt2_quant import QuantGPT2ForQuestionAnswering, QuantGPT2LMHeadModel

ROW = {"config": "W8A8KV8", "exact_match": 61.25, "f1": 70.5}
RECORD = {
    "command": "python run_qa_eval.py --token hf_abcdefghijklmnopqrstuvwxyz",
    "git": {"commit": "f" * 40},
    "seed": 7,
    "metrics": {},
    "bit_config": {},
    "data": {"validation": {"source": "squad", "examples": 800, "sha256": "a" * 64}},
    "rows": [ROW, ROW | {"config": "W4A4KV4", "exact_match": 55.0}],
}


@pytest.fixture(scope="module")
def folder(tiny_model, tmp_path_factory):
    """An exported checkpoint, with files that are nobody's business."""
    out = tmp_path_factory.mktemp("exported")
    model = QuantGPT2ForQuestionAnswering.from_pretrained(tiny_model)
    with model.at_bits(8) as eight, model.at_bits(4) as four:
        save_exported(model, out, served_widths([eight, four]), eight)
    (out / "checkpoint-1").mkdir()
    (out / "checkpoint-1" / "optimizer.pt").write_text("not to go up")
    (out / "notes.txt").write_text("nor this")
    (out / "eval.json").write_text(json.dumps(RECORD))
    return out


@pytest.fixture
def hub(tmp_path):
    """(address, folder, calls): what uploads of small files ask of a hub; writes what is committed into a folder."""
    store, seen = tmp_path / "hub", []

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            seen.append((self.path, self.headers.get("Authorization")))
            status, answer = 200, {}
            if self.path == "/api/repos/create":
                asked = json.loads(body)
                answer = {"url": f"http://{self.headers['Host']}/{asked['organization']}/{asked['name']}"}
                status, answer = (403, {"error": "not yours"}) if asked["organization"] == "them" else (200, answer)
            elif "/preupload/" in self.path:
                files = [
                    {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for file in json.loads(body)["files"]
                ]
                answer = {"files": files}
            elif "/commit/" in self.path:
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        path = store / line["value"]["path"]
                        path.parent.mkdir(parents=True, exist_ok=True)
                        path.write_bytes(base64.b64decode(line["value"]["content"]))
                answer = {
                    "success": True,
                    "commitUrl": "https://huggingface.co/me/tiny/commit/1",
                    "commitOid": "1",
                    "pullRequestUrl": None,
                }
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", store, seen
    server.shutdown()


@pytest.fixture
def push(monkeypatch, capfd):
    """push(folder, *words, endpoint=...): (the error without "error: ", or None; what was printed)."""
    script = load_script("serving/push_to_hub.py")

    def call(folder, *words, endpoint="http://127.0.0.1:9"):
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        given = {"--folder": folder, "--license": "mit", "--repo_id": "me/tiny"}
        given |= dict(zip(words[::2], words[1::2], strict=True))
        flat = [str(word) for pair in given.items() for word in pair]
        monkeypatch.setattr(sys, "argv", ["serving/push_to_hub.py", *flat])
        try:
            script.main()
        except (script.UserError, OSError) as error:
            return str(error), ""
        return None, capfd.readouterr().out

    return call


def test_what_goes_up_opens_again_and_its_card_says_what_was_measured(folder, hub, push):
    address, store, seen = hub
    fault, told = push(folder, "--record_files", folder / "eval.json", "--token", "hf_me", endpoint=address)
    assert fault is None and "uploaded: https://huggingface.co/me/tiny/commit/1" in told
    assert {path.name for path in store.iterdir()} == {"README.md", "config.json", "model.safetensors"}
    assert {token for _, token in seen} == {"Bearer hf_me"}
    sent, kept = load_file(store / "model.safetensors"), load_file(folder / "model.safetensors")
    assert sent.keys() == kept.keys() and all(torch.equal(sent[name], kept[name]) for name in kept)
    assert QuantGPT2ForQuestionAnswering.from_pretrained(store).set_bit_config(4)

    card = ModelCard.load(store / "README.md")
    assert card.data.license == "mit" and card.data.datasets == ["squad"]
    found = {(one.dataset_name, one.metric_name): one.metric_value for one in card.data.eval_results}
    assert found["squad, 800 examples", "EM, served as W8A8KV8"] == 61.25
    assert found["squad, 800 examples", "F1, served as W4A4KV4"] == 70.5
    for text in (
        "opens as W8A8KV8",
        "weights at 4, 8 bits",
        "| W4A4KV4",
        "55.00",
        "run_qa_eval.py",
        "a" * 64,
        "f" * 40,
    ):
        assert text in card.text
    assert "hf_" not in (store / "README.md").read_text(), "no token"


def test_a_card_alone_and_one_that_is_not_ours(folder, push):
    for _ in range(2):  # our own is written anew
        assert push(folder, "--card_only", "true")[0] is None
        assert "Nothing: no record" in (folder / "README.md").read_text()
    (folder / "README.md").write_text("mine")
    assert push(folder, "--card_only", "true")[0].startswith(f"{folder}/README.md: not written by this script")
    assert (folder / "README.md").read_text() == "mine"
    (folder / "README.md").unlink()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--license", "my licence"], "--license my licence: allowed is an identifier of the hub"),
        (["--repo_id", "a/b/c"], "--repo_id a/b/c: "),
        (["--record_files", "none.json"], "[Errno 2] No such file or directory: 'none.json'"),
        (["--record_files", "other.json"], "other.json: no record of a run: it has no command"),
        (["--folder", "nowhere"], "--folder nowhere: it has no model.safetensors"),
        (["--repo_id", "me/tiny"], "--repo_id me/tiny: the hub said: "),
        (["--repo_id", "them/tiny"], "--repo_id them/tiny: the hub said: 403"),
    ],
)
def test_refusals(words, message, folder, hub, push, monkeypatch, tmp_path):
    (tmp_path / "other.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    fault, _ = push(folder, *words, **({"endpoint": hub[0]} if "them/tiny" in words else {}))
    assert fault.startswith(message) and "\n" not in fault


def test_models_that_would_not_open_elsewhere_are_refused(tiny_model, push, tmp_path):
    assert f"--folder {tiny_model}: no checkpoint of this repository" in push(tiny_model)[0]
    model = QuantGPT2ForQuestionAnswering.from_pretrained(tiny_model)
    model.add_lora([8], r=2)
    model.set_base(tiny_model)
    model.save_pretrained(tmp_path)
    assert f"its base is the local folder {tiny_model}" in push(tmp_path, "--card_only", "true")[0]
    assert not (tmp_path / "README.md").exists()
    config = json.loads((tmp_path / "config.json").read_text())
    for changed, message in (
        ({"base_model_name_or_path": "/gone/base"}, "its base is the local folder /gone/base"),
        ({"architectures": ["Other"]}, "architectures: Other: allowed are QuantGPT2ForQuestionAnswering"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | changed))
        assert message in push(tmp_path, "--card_only", "true")[0]


def test_the_card_of_a_language_model_opens_one(tiny_model, push, tmp_path):
    QuantGPT2LMHeadModel.from_pretrained(tiny_model).save_pretrained(tmp_path)
    assert push(tmp_path, "--card_only", "true")[0] is None
    assert 'AutoModelForCausalLM.from_pretrained("me/tiny")' in (tmp_path / "README.md").read_text()

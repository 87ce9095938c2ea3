"""serving/: answers in memory, the HTTP server under concurrent requests with mixed bits."""

import asyncio
import concurrent.futures
import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("httpx2")
from fastapi.testclient import TestClient  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

from conftest import NAMES, ROOT, THINGS, experiment, load_script  # noqa: E402

with experiment("base_model"):  # modules of their own, whatever other tests have imported under these names
    serve, answering = load_script("serving/serve.py"), load_script("serving/answering.py")
CONTEXT = " ".join(f"{name} has the {thing}." for name, thing in zip(NAMES, THINGS))
PAIRS = [(f"Who has the {thing}?", CONTEXT[:length]) for thing in THINGS for length in (60, 90, len(CONTEXT))]


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture(scope="module")
def model(tiny_model):
    """A bank of two adapters that differ, on integers."""
    import torch

    torch.manual_seed(0)
    model = serve.QuantGPT2ForQuestionAnswering.from_pretrained(tiny_model)
    model.add_lora([4, 8])
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.set_execution("integer")
    return model.eval()


def test_another_quantizer_than_the_checkpoints_is_refused(tiny_model, tokenizer):
    arguments = serve.CheckpointArguments(model_name_or_path=str(tiny_model), quantizer="rotated")
    with pytest.raises(serve.UserError, match=f"--quantizer rotated: {tiny_model} is served with its own, minmax"):
        serve.open_served(serve.QuantGPT2ForQuestionAnswering, arguments, tokenizer)


@pytest.fixture
def served(model, tokenizer):
    names = serve.resolve_configs(model, ["8", "4"])
    return serve.Served(model, names, lambda net, jobs, kind: serve.answers(net, tokenizer, jobs), 16)


@pytest.fixture
def client(served):
    with TestClient(serve.make_app(served)) as client:
        yield client


def test_answer_is_a_slice_of_the_text_with_its_candidates(model, tokenizer):
    before = model.config.bit_config
    found = answering.answer(model, tokenizer, *PAIRS[2], bits=4)
    assert found["text"] in CONTEXT and found["candidates"][0]["text"] == found["text"]
    assert sum(one["probability"] for one in found["candidates"]) == pytest.approx(1)
    assert model.config.bit_config == before != model.set_bit_config(4)
    model.set_bit_config(before)
    long = answering.answer(model, tokenizer, PAIRS[2][0], CONTEXT, max_seq_length=24, doc_stride=4)
    assert long["text"] in CONTEXT


@pytest.mark.parametrize(("pair", "message"), [(("", "a"), "question is blank"), (("a", "  "), "context is blank")])
def test_blank_texts_are_refused(model, tokenizer, pair, message):
    with pytest.raises(ValueError, match=message):
        serve.answers(model, tokenizer, [PAIRS[0], pair])


def test_answers_of_a_batch_are_those_of_single_pairs(model, tokenizer):
    with model.at_bits(8):
        together = serve.answers(model, tokenizer, PAIRS)
        for pair, found in zip(PAIRS, together, strict=True):
            (alone,) = serve.answers(model, tokenizer, [pair])
            assert alone["text"] == found["text"]
            assert alone["probability"] == pytest.approx(found["probability"], rel=1e-3)


def test_fifty_concurrent_requests_with_mixed_bits(client, model, tokenizer):
    requests = [(pair, bits) for bits in ("W8A8KV8", "W4A4KV4", "W4A8KV8") for pair in PAIRS][:50]

    def ask(request):
        (question, context), bits = request
        reply = client.post("/answer", json={"question": question, "context": context, "bits": bits})
        assert reply.status_code == 200, reply.text
        return reply.json()

    with concurrent.futures.ThreadPoolExecutor(50) as pool:
        found = list(pool.map(ask, requests))
    texts = set()
    for (pair, bits), reply in zip(requests, found, strict=True):
        with model.at_bits(bits):
            (alone,) = serve.answers(model, tokenizer, [pair])
        assert (reply["text"], reply["config"]) == (alone["text"], bits)
        texts.add((pair, reply["text"]))
    assert max(reply["batch"] for reply in found) > 1 and len(texts) > len(PAIRS)  # the bits matter


def test_names_health_and_page(client):
    configs = client.get("/configs").json()
    assert [config["name"] for config in configs] == ["W8A8KV8", "W4A4KV4"]
    assert configs[0]["weight_bytes"] > configs[1]["weight_bytes"] and configs[1]["average_w_bits"] == 4
    assert client.get("/health").json() == {"status": "ok", "waiting": 0, "generates": False}
    assert "One model, several bit-widths" in client.get("/").text
    default = client.post("/answer", json={"question": PAIRS[0][0], "context": CONTEXT})
    assert default.json()["config"] == "W8A8KV8"
    custom = client.post("/answer", json={"question": "Who?", "context": CONTEXT, "bits": {"default": 8, "*fc": 4}})
    assert custom.json()["config"] == "custom"


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"question": "Who?"}, 422, "context"),
        ({"question": "", "context": "a"}, 422, "question"),
        ({"question": "  ", "context": "a"}, 422, "the question is blank"),
        ({"question": "Who? " * 390, "context": "a"}, 422, "question and separator take"),
        ({"question": "Who?", "context": "a", "bit": 8}, 422, "Extra inputs"),
        ({"question": "Who?", "context": "a", "bits": 8.5}, 422, "bits"),
        ({"question": "Who?", "context": "a", "bits": True}, 422, "bits"),
        ({"question": "Who?", "context": "a", "bits": 9}, 422, "9 is not a bit-width"),
        ({"question": "Who?", "context": "a", "bits": 5}, 422, "the LoRA bank has only"),
        ({"question": "Who?", "context": "a", "bits": "README.md"}, 422, "allowed are W8A8KV8, W4A4KV4, a width"),
        ({"question": "Who?", "context": "a", "bits": {"transformer.h.7.*": 4}}, 422, "transformer.h.7"),
        ({"question": "Who?", "context": "a" * 200_001}, 422, "at most 200000"),
        ({"question": "Who?", "context": "a" * 1_100_000}, 413, "more than 1000000 bytes"),
    ],
)
def test_bad_requests(client, body, status, message):
    reply = client.post("/answer", json=body)
    assert reply.status_code == status and message in json.dumps(reply.json())


def test_generate_needs_a_language_model(client):
    reply = client.post("/generate", json={"text": "Ada"})
    assert reply.status_code == 404 and "--language_model" in reply.json()["detail"]


def test_generate(served, tiny_model):
    model_args = serve.CheckpointArguments(model_name_or_path=tiny_model)
    args = serve.ServingArguments(language_model=tiny_model)
    with TestClient(serve.make_app(served, serve.load_texts(model_args, args))) as client:
        body = {"text": "Ada has", "max_new_tokens": 5, "bits": 8}
        first, second = (client.post("/generate", json=body).json() for _ in range(2))
        assert first["text"] == second["text"] and first["text"].startswith("Ada has")
        long = client.post("/generate", json=body | {"max_new_tokens": 500})
        assert long.status_code == 422 and "positions" in long.json()["detail"]


def test_one_faulty_request_of_a_batch_fails_alone(served):
    async def both():
        worker = asyncio.create_task(served.work())
        jobs = [served("8", PAIRS[0]), served("8", (" ", CONTEXT))]
        found = await asyncio.gather(*jobs, return_exceptions=True)
        worker.cancel()
        return found

    served.queue = asyncio.Queue()
    good, bad = asyncio.run(both())
    assert good["text"] and isinstance(bad, ValueError)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--max_batch", "0"], "--max_batch 0: 1 to"),
        (["--model_name_or_path", "missing"], "huggingface.co"),
        (["--bit_configs", "9"], "9 is not a bit-width"),
        (["--max_seq_length", "16", "--doc_stride", "15"], "allowed: more than --doc_stride 15. Raise"),
    ],
)
def test_server_refuses(words, message, tiny_model, monkeypatch):
    words = words if "--model_name_or_path" in words else ["--model_name_or_path", str(tiny_model), *words]
    monkeypatch.setattr(sys, "argv", ["serve.py", *words])
    with pytest.raises(SystemExit) as stop, serve.plain_errors():
        serve.main()
    assert str(stop.value).startswith("error: ") and message in str(stop.value)


def test_a_mistake_is_one_line_without_a_traceback(tiny_model):
    script = os.path.join(ROOT, "serving", "serve.py")
    command = [sys.executable, script, "--model_name_or_path", tiny_model, "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "error: --port 0: 1 to 65535" in done.stderr and "Traceback" not in done.stderr

#!/usr/bin/env python
"""Serve a checkpoint over HTTP, with bits per request: questions, and text where a language model is given.

    pip install -r requirements-extra.txt
    python serving/serve.py --model_name_or_path switch_precision/results/train
    python serving/serve.py --model_name_or_path switch_precision/results/export --bit_configs 8 4 \\
        --language_model language_model/results/clm

    POST /answer    {"question", "context", "bits"}            -> {"text", "probability", "candidates", "config", "ms"}
    POST /generate  {"text", "bits", "max_new_tokens"}         -> {"text", "new_tokens_of_batch", "config", "ms"}
    GET  /configs   names, average bits and sizes;  /health;  / is a page to try it

"bits" is a name of /configs, a width as 8, W4A8KV8, or an object as in configs/*.json; without it, the first of
/configs. Requests at equal bits that wait together go through the model as one batch. It listens on this machine alone
unless --host says otherwise, and has no passwords.
"""

import asyncio
import contextlib
import dataclasses
import json
import os
import sys
import time
import types

import torch
import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import FileResponse, JSONResponse
from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr

HERE = os.path.dirname(os.path.abspath(__file__))
LANGUAGE_MODEL = os.path.join(os.path.dirname(HERE), "language_model")
sys.path[:0] = [HERE]
from answering import answers  # noqa: E402 - puts base_model in front

sys.path.append(LANGUAGE_MODEL)
import models  # noqa: E402

models.__path__.append(os.path.join(LANGUAGE_MODEL, "models"))  # its KV cache, which base_model has no use for
from common.arguments import CheckpointArguments, option  # noqa: E402
from common.flags import parse_args  # noqa: E402
from common.loading import load_model, load_tokenizer, resolve_configs, trained_configs  # noqa: E402
from common.script import plain_errors, setup_logging  # noqa: E402
from generate import GenerationArguments, generate  # noqa: E402
from models.bit_config import SHORT_FORM, WIDTH, config_name, describe_bit_config, resolve_bit_config  # noqa: E402
from models.errors import UserError  # noqa: E402
from models.modeling_gpt2_quant import QuantGPT2ForQuestionAnswering, QuantGPT2LMHeadModel  # noqa: E402

MAX_BODY = 1_000_000  # bytes
Bits = StrictInt | StrictStr | dict | None


@dataclasses.dataclass
class ServingArguments:
    """What is served, and where."""

    bit_configs: list[str] | None = option(None, "configs to offer by name (default: what the checkpoint serves)")
    language_model: str | None = option(None, "checkpoint or stock GPT-2 for /generate")
    host: str = option("127.0.0.1", "address to listen on; 0.0.0.0: reachable from other machines")
    port: int = option(8000, "port to listen on")
    max_batch: int = option(16, "requests that go through the model together, at most")
    question_separator: str = option("\\n", "text between question and context, as in training")
    max_seq_length: int = option(384, "tokens of a window")
    doc_stride: int = option(128, "tokens that two windows of a long context share")


class Question(BaseModel):
    model_config = ConfigDict(extra="forbid")
    question: StrictStr = Field(min_length=1, max_length=2_000)
    context: StrictStr = Field(min_length=1, max_length=200_000)
    bits: Bits = None


class Prompt(BaseModel):
    model_config = ConfigDict(extra="forbid")
    text: StrictStr = Field(min_length=1, max_length=20_000)
    bits: Bits = None
    max_new_tokens: StrictInt = Field(default=32, ge=1, le=1_000)


class Served:
    """A model that one task runs, batch after batch, each at its bits.

    run(model, [job], kind) -> [result], under the bits of the batch; jobs of one kind and equal bits share a batch.
    names: {name: resolved config} that requests may name; the first is the default.
    """

    def __init__(self, model, names, run, max_batch):
        self.model, self.names, self.run, self.max_batch = model, names, run, max_batch
        self.queue = asyncio.Queue()

    def resolve(self, bits):
        """(name, resolved config) of a request's bits. Raises UserError in the words of the config reader."""
        if bits is None:
            return next(iter(self.names.items()))
        if isinstance(bits, str) and bits in self.names:
            return bits, self.names[bits]
        bits = str(bits) if isinstance(bits, int) else bits
        if isinstance(bits, str) and not (WIDTH.fullmatch(bits) or SHORT_FORM.fullmatch(bits)):  # never a file
            allowed = f"{', '.join(self.names)}, a width as 8, W4A8KV8, or an object"
            raise UserError(f"bits {bits!r:.80}: allowed are {allowed}")
        name = "custom" if isinstance(bits, dict) else config_name(bits)
        return name, resolve_bit_config(bits, self.model.quant_layers())

    async def __call__(self, bits, job, kind=None):
        """A job's result, with the name of its config and the milliseconds of its batch."""
        name, config = self.resolve(bits)
        future = asyncio.get_running_loop().create_future()
        await self.queue.put((json.dumps([config, kind]), config, kind, job, future))
        return {"config": name} | await future

    async def work(self):
        """Serve for ever. All that waits is taken at once and grouped by bits."""
        while True:
            waiting = [await self.queue.get()]
            while not self.queue.empty():
                waiting.append(self.queue.get_nowait())
            groups = {}
            for key, *rest in waiting:
                groups.setdefault(key, []).append(rest)
            for group in groups.values():
                for first in range(0, len(group), self.max_batch):
                    await self._serve(group[first : first + self.max_batch])

    async def _serve(self, batch):
        """Answer one batch. What is wrong with one request is said to that one alone."""
        start, (config, kind, _, _) = time.perf_counter(), batch[0]
        futures, found = [future for *_, future in batch], None
        try:
            found = await asyncio.to_thread(self._run, config, kind, [job for _, _, job, _ in batch])
        except UserError as error:
            if len(batch) > 1:
                for one in batch:
                    await self._serve([one])
                return
            failure = error
        except Exception as error:  # noqa: BLE001 - goes to whoever asked, as a 500
            failure = error
        ms = 1000 * (time.perf_counter() - start)
        for number, future in enumerate(futures):
            if future.done():  # the request was given up
                continue
            if found is None:
                future.set_exception(failure)
            else:
                future.set_result(found[number] | {"ms": round(ms, 2), "batch": len(batch)})

    def _run(self, config, kind, jobs):
        with self.model.at_bits(config):
            return self.run(self.model, jobs, kind)


class LimitedBody:
    """ASGI middleware: 413 for a body over MAX_BODY, whatever its header says."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        taken = 0

        async def limited():
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > MAX_BODY:
                raise HTTPException(413, f"the body has more than {MAX_BODY} bytes")
            return message

        await self.app(scope, limited, send)


def make_app(questions, texts=None):
    """The application. questions, texts: a `Served` each; texts None: /generate is a 404."""

    @contextlib.asynccontextmanager
    async def lifespan(app):
        tasks = [asyncio.create_task(served.work()) for served in (questions, texts) if served]
        yield
        for task in tasks:
            task.cancel()

    app = FastAPI(title="switchable GPT-2", lifespan=lifespan)
    app.add_middleware(LimitedBody)

    @app.exception_handler(UserError)
    async def refuse(request: Request, error: UserError):
        return JSONResponse({"detail": str(error)}, status_code=422)

    @app.get("/", include_in_schema=False)
    def page():
        return FileResponse(os.path.join(HERE, "index.html"))

    @app.get("/health")
    def health():
        return {"status": "ok", "waiting": questions.queue.qsize(), "generates": texts is not None}

    @app.get("/configs")
    def configs():
        shapes = questions.model.layer_shapes()
        sizes = {name: describe_bit_config(config, shapes) for name, config in questions.names.items()}
        return [
            {"name": name, "average_w_bits": size["average_w_bits"], "weight_bytes": size["weight_bytes"]}
            for name, size in sizes.items()
        ]

    @app.post("/answer")
    async def answer(request: Question):
        return await questions(request.bits, (request.question, request.context))

    @app.post("/generate")
    async def continue_text(request: Prompt):
        if texts is None:
            return JSONResponse({"detail": "/generate: the server was started without --language_model"}, 404)
        return await texts(request.bits, request.text, request.max_new_tokens)

    return app


def open_served(model_class, model_args, tokenizer):
    """The model on the GPU, if there is one. Raises UserError: a --quantizer that is not the checkpoint's."""
    model = load_model(model_class, model_args, tokenizer)
    if model_args.quantizer not in (None, own := model.config.quantizer):
        name = model_args.model_name_or_path
        raise UserError(f"--quantizer {model_args.quantizer}: {name} is served with its own, {own}")
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def load_questions(model_args, args):
    """`Served` of the question-answering checkpoint."""
    tokenizer = load_tokenizer(model_args)
    model = open_served(QuantGPT2ForQuestionAnswering, model_args, tokenizer)
    names = resolve_configs(model, args.bit_configs or trained_configs(model))
    for config in names.values():
        with model.at_bits(config):  # refuses what the checkpoint has no adapter for
            pass
    options = {
        "max_seq_length": args.max_seq_length,
        "doc_stride": args.doc_stride,
        "separator": args.question_separator.encode("latin-1", "backslashreplace").decode("unicode_escape"),
    }

    def run(model, jobs, kind):
        return answers(model, tokenizer, jobs, **options)

    run(model, [("Who?", "Ada.")], None)  # refuses windows that are too small, and makes ready
    return Served(model, names, run, args.max_batch)


def load_texts(model_args, args):
    """`Served` of the language model, None without one."""
    if not args.language_model:
        return None
    model_args = dataclasses.replace(model_args, model_name_or_path=args.language_model, tokenizer_name=None)
    tokenizer = load_tokenizer(model_args)
    model = open_served(QuantGPT2LMHeadModel, model_args, tokenizer)

    def run(model, jobs, kind):
        texts, measured = generate(model, tokenizer, jobs, GenerationArguments(max_new_tokens=kind))
        return [{"text": text, "new_tokens_of_batch": measured["new_tokens"]} for text in texts]

    return Served(model, resolve_configs(model, trained_configs(model)), run, args.max_batch)


def main():
    model_args, args = parse_args(CheckpointArguments, ServingArguments)
    setup_logging(types.SimpleNamespace(process_index=0))
    for flag, low, high in (("port", 1, 65_535), ("max_batch", 1, 1_024)):
        if not low <= getattr(args, flag) <= high:
            raise UserError(f"--{flag} {getattr(args, flag)}: {low} to {high}")
    app = make_app(load_questions(model_args, args), load_texts(model_args, args))
    uvicorn.run(app, host=args.host, port=args.port, log_level="warning")


if __name__ == "__main__":
    with plain_errors():
        main()

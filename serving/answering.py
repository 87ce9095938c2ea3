"""Answers to questions about a text, from a model in memory: `answer`, and `answers` for several at once.

    import sys; sys.path.insert(0, "base_model"); sys.path.insert(0, "serving")
    import models.modeling_gpt2_quant  # AutoModel now opens checkpoints of this repository
    from transformers import AutoModelForQuestionAnswering, AutoTokenizer
    from answering import answer

    model = AutoModelForQuestionAnswering.from_pretrained("switch_precision/results/train")
    tokenizer = AutoTokenizer.from_pretrained("switch_precision/results/train")
    answer(model, tokenizer, "Who has the kite?", "Ada has the drum. Ben has the kite.", bits=8)["text"]

It stands where transformers' question-answering pipeline stood before version 5.
"""

import os
import sys

import torch
from torch.nn.utils.rnn import pad_sequence

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if os.path.join(ROOT, "base_model") not in sys.path:
    sys.path.insert(0, os.path.join(ROOT, "base_model"))
from models.errors import UserError  # noqa: E402
from utils_qa import postprocess_qa_predictions, prepare_validation_features  # noqa: E402

WINDOWS_AT_ONCE = 16


def answer(model, tokenizer, question, context, bits=None, **options):
    """The best answer, {"text", "probability", "start_logit", "end_logit", "candidates": [the same of the n best]}.

    bits: a bit config as `set_bit_config` takes it, for this call alone; None: the model's present one. options: of
    `answers`. Raises UserError: a blank question or text, a question that leaves no room for the text, bits that the
    model does not serve.
    """
    with model.at_bits(bits if bits is not None else model.config.bit_config):
        return answers(model, tokenizer, [(question, context)], **options)[0]


@torch.no_grad()
def answers(
    model, tokenizer, pairs, n_best=5, max_answer_length=30, max_seq_length=384, doc_stride=None, separator="\n"
):
    """One result a (question, context) of `pairs`, as of `answer`, under the model's present bits.

    n_best: candidates a question; max_answer_length: tokens; max_seq_length: tokens of a window, doc_stride: those
    that two windows of a long text share (None: a third of a window); separator: between question and text, as in
    training. Windows of all pairs go through the model together, padded to the longest: each answer is that of its
    pair alone.
    """
    for number, pair in enumerate(pairs):
        for name, text in zip(("question", "context"), pair, strict=True):
            if not text.strip():
                raise UserError(f"pair {number}: the {name} is blank")
    ids = [str(number) for number in range(len(pairs))]
    questions, contexts = map(list, zip(*pairs, strict=True))
    length = min(max_seq_length, model.config.n_positions)
    stride = length // 3 if doc_stride is None else doc_stride
    rows = {"id": ids, "question": questions, "context": contexts}
    features = prepare_validation_features(rows, tokenizer, length, stride, separator)
    model.eval()
    longest = max(features["length"])
    logits = torch.full((2, len(features["length"]), longest), -torch.inf)
    for first in range(0, len(features["length"]), WINDOWS_AT_ONCE):
        batch = slice(first, first + WINDOWS_AT_ONCE)
        inputs = {  # padded with zeros on the right, where no token before them sees anything
            key: pad_sequence([torch.tensor(row) for row in features[key][batch]], batch_first=True).to(model.device)
            for key in ("input_ids", "attention_mask")
        }
        output = model(**inputs)
        width = inputs["input_ids"].shape[1]
        logits[0, batch, :width], logits[1, batch, :width] = output.start_logits.cpu(), output.end_logits.cpu()
    columns = {key: features[key] for key in ("example_id", "offset_mapping")}
    texts, candidates = postprocess_qa_predictions(rows, columns, tuple(logits.numpy()), n_best, max_answer_length)
    nothing = {"probability": 0.0, "start_logit": None, "end_logit": None}
    return [
        (candidates[key][0] if candidates[key] else nothing) | {"text": texts[key], "candidates": candidates[key]}
        for key in ids
    ]

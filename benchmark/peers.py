"""The peers of benchmark.py: how each is built, and the memory it takes.

Ours ("fake", "integer") run the checkpoint at a bit config with the adapters of its bank. The
others carry the same base and head without adapters, which is in their favour: "fp32" and "bf16" are transformers'
GPT-2 as shipped; torchao and onnxruntime quantize that model (without its KV cache, which nothing reads);
bitsandbytes' layers sit in this repository's GPT-2, which is faster than the stock one outside the linears.
"""

import importlib
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from safetensors.torch import save
from torch import nn
from transformers import GPT2Config, GPT2ForQuestionAnswering
from transformers.pytorch_utils import Conv1D

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, os.path.join(ROOT, "base_model"))
from common.loading import resolve_configs, trained_configs  # noqa: E402
from models.bitsandbytes_ptq import quantize_with_bitsandbytes  # noqa: E402
from models.errors import UserError  # noqa: E402
from models.exported import exported_state, served_widths  # noqa: E402
from models.fast.integer import unpack_int4  # noqa: E402
from models.modeling_gpt2_quant import QuantGPT2ForQuestionAnswering  # noqa: E402
from models.quantization import dequantize  # noqa: E402

REFERENCE = "fp32"
OTHERS = {  # {name: (label, packages)}
    "fp32": ("transformers float32", ()),
    "bf16": ("transformers bfloat16", ()),
    "bnb_int8": ("bitsandbytes int8", ("bitsandbytes",)),
    "bnb_nf4": ("bitsandbytes nf4", ("bitsandbytes",)),
    "torchao": ("torchao int8 dynamic", ("torchao",)),
    "torchao_compiled": ("torchao int8 dynamic, torch.compile", ("torchao",)),
    "onnxruntime": ("onnxruntime int8 dynamic", ("onnxruntime", "onnx", "onnxscript")),
}
OURS = {  # {name: (label, options of set_execution)}
    "fake": ("ours, fake quantization", {"execution": "fake"}),
    "integer": ("ours, integer", {"execution": "integer"}),
}
TRAINING = {  # one step of adapters and head
    "fp32": ("float32 + LoRA, nothing quantized", {"execution": "fake"}),
    **OURS,
    "integer_bf16": ("ours, integer, bf16 backward", {"execution": "integer", "backward_dtype": "bf16"}),
}
COMPILED = ("torchao_compiled",)  # by torch.compile


@dataclass
class Peer:
    """What benchmark.py runs and measures.

    run(ids): one forward, or one training step; ids: (batch, length) int64. prepare(): makes a model that peers share
    ready, untimed. linear_bytes(): memory of the linears' weights. stored_bytes(): size of a file with all that
    serving the peer needs.
    """

    run: Callable
    linear_bytes: Callable
    stored_bytes: Callable
    prepare: Callable = lambda: None


def names_of(training):
    """Peers of the benchmark of a forward, or of a training step."""
    return list(TRAINING if training else OTHERS | OURS)


def label_of(name, training):
    return (TRAINING if training else OTHERS | OURS)[name][0]


def packages_of(name):
    """Packages that this peer needs besides torch and transformers."""
    return OTHERS.get(name, ("", ()))[1]


def runs_configs(name, training):
    """Whether this peer runs at bit configs: ours do."""
    return name != REFERENCE if training else name in OURS


def why_missing(name, device):
    """Why this peer cannot run here, in words; None if it can. Imports its packages."""
    packages = packages_of(name)
    if name == "onnxruntime" and device == "cuda":
        return "measured on CPUs only"
    try:
        for package in packages:
            importlib.import_module(package)
    except ImportError as error:
        return f"not installed (pip install {' '.join(packages)}): {error}".partition("\n")[0]
    return None


def load(args):
    """(model, {name: resolved config}): the checkpoint; with random weights, and for training without a bank of its
    own, it gets an adapter per width of the configs.
    """
    if args.random_weights:
        torch.manual_seed(args.seed)
        config = GPT2Config()
        try:
            if args.config_overrides:
                config.update_from_string(args.config_overrides)
        except ValueError as error:
            raise UserError(
                f"--config_overrides {args.config_overrides}: expected fields of GPT2Config as n_layer=24,n_embd=1024 "
                f"({error})"
            ) from None
        model = QuantGPT2ForQuestionAnswering(config).eval()
    else:
        model = QuantGPT2ForQuestionAnswering.from_pretrained(
            args.model_name_or_path, base_model_name_or_path=args.base_model_name_or_path
        )
    has_bank = bool(model.config.lora_bank)
    saved = trained_configs(model) if has_bank or model.config.exported_widths else ["8"]
    configs = resolve_configs(model, args.bit_configs or saved)
    if not has_bank and (args.random_weights or args.training):
        model.add_lora(sorted({bits["w_bits"] for resolved in configs.values() for bits in resolved.values()}))
    if not args.training:
        model.requires_grad_(False)  # only of frozen weights codes are kept from one forward to the next
    return model.to(args.device), configs


def build(name, model, resolved, args):
    """The peer of this name. model: of `load`; ours run this very model, the others are made from its base and head;
    resolved: the bit config of ours; args: of benchmark.py, with `onnx_file` as `export_onnx` wrote it."""
    if args.training:
        return _training(name, model, resolved)
    if name in OURS:
        return _ours(model, resolved, OURS[name][1])
    if name == "onnxruntime":
        return _onnxruntime(args.onnx_file, args.threads)
    other = without_adapters(model) if name.startswith("bnb_") else stock_gpt2(model)
    if name == "bf16":
        other.bfloat16()
    elif name.startswith("bnb_"):
        quantize_with_bitsandbytes(other, "8bit" if name == "bnb_int8" else "nf4")
    elif name.startswith("torchao"):
        _quantize_with_torchao(other)
    run = torch.compile(other, dynamic=False) if name in COMPILED else other
    layers = tuple(f"{layer}." for layer in model.quant_layers())

    def linear_bytes():
        tensors = plain_tensors(other.state_dict()).items()
        return sum(t.nbytes for key, t in tensors if key.startswith(layers) and not key.endswith(".bias"))

    return Peer(lambda ids: run(input_ids=ids), linear_bytes, lambda: stored_size(other.state_dict()))


def _float_state(model):
    """The float32 state of a quantized model without its adapters; an exported one has codes only."""
    state = {name: value for name, value in model.state_dict().items() if ".lora_" not in name}
    for name, layer in model.quant_layers().items():
        if layer.weight is None:
            codes, scale = max(layer.stored_codes().items())[1]
            codes = unpack_int4(codes, layer.in_features) if codes.dtype == torch.uint8 else codes
            state[f"{name}.weight"] = dequantize(codes, scale)
    return state


def _stock_config(model):
    fields = set(GPT2Config().to_dict()) - {"model_type", "architectures", "use_cache"}
    return GPT2Config(**{key: value for key, value in model.config.to_dict().items() if key in fields})


def without_adapters(model):
    """A quantized model of the same base and head, without a bank, at 32 bits."""
    other = QuantGPT2ForQuestionAnswering(_stock_config(model)).to(model.device).eval()
    other.load_state_dict(_float_state(model))
    return other


def stock_gpt2(model):
    """The same base and head as transformers' own GPT-2, float32."""
    state, layers = _float_state(model), model.quant_layers()
    state = {name: v.t() if name.removesuffix(".weight") in layers else v for name, v in state.items()}
    stock = GPT2ForQuestionAnswering(_stock_config(model)).to(model.device).eval()
    stock.load_state_dict(state)
    return stock


def _ours(model, resolved, options):
    def prepare():
        model.eval()
        model.set_bit_config(resolved)
        model.set_execution(**options)

    def stored_bytes():
        integer = options["execution"] == "integer"
        return exported_size(model, [resolved]) if integer else stored_size(model.state_dict())

    return Peer(lambda ids: model(input_ids=ids), model.quantized_bytes, stored_bytes, prepare)


def _training(name, model, resolved):
    if name == REFERENCE:
        r, alpha = model.config.lora_r, model.config.lora_alpha
        model = without_adapters(model)
        model.add_lora([32], r, alpha)
        resolved = model.config.bit_config
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)

    def prepare():
        model.train()
        model.set_bit_config(resolved)
        model.set_execution(**TRAINING[name][1])

    def step(ids):
        answer = ids[:, 0] % ids.shape[1]  # any position
        model(input_ids=ids, start_positions=answer, end_positions=answer).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return Peer(step, model.quantized_bytes, lambda: stored_size(model.state_dict()), prepare)


def _quantize_with_torchao(stock):
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    stock.config.use_cache = False
    for name, conv in [(n, m) for n, m in stock.named_modules() if isinstance(m, Conv1D)]:
        linear = nn.Linear(*conv.weight.shape, device=conv.weight.device)
        linear.weight, linear.bias = nn.Parameter(conv.weight.detach().t().contiguous()), conv.bias
        stock.set_submodule(name, linear)
    stock.requires_grad_(False)
    quantize_(stock.transformer, Int8DynamicActivationInt8WeightConfig())


def export_onnx(model, path):
    """Write the base and head of `model` as ONNX with int8 weights, one scale per output channel, into `path`."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    stock = stock_gpt2(model)
    stock.config.use_cache = False

    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = stock

        def forward(self, input_ids):
            output = self.model(input_ids=input_ids)
            return output.start_logits, output.end_logits

    shape = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=model.config.n_positions)}
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    ids = torch.zeros((2, 16), dtype=torch.long)  # neither is 1: sizes of 1 are taken as fixed
    floats, options = f"{path}.fp32", {"dynamo": True, "external_data": False, "verbose": False}
    torch.onnx.export(Logits().eval(), (ids,), floats, dynamic_shapes=(shape,), **options)
    options = {"per_channel": True, "op_types_to_quantize": ["MatMul", "Gemm"]}
    quantize_dynamic(floats, path, weight_type=QuantType.QInt8, **options)
    os.remove(floats)


def _onnxruntime(path, threads):
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.force_spinning_stop", "1")  # or its threads disturb the next peer
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def linear_bytes():
        weights = onnx.load(path).graph.initializer
        return sum(len(w.raw_data) for w in weights if w.data_type == onnx.TensorProto.INT8 and len(w.dims) == 2)

    return Peer(lambda ids: session.run(None, {"input_ids": ids.numpy()}), linear_bytes, lambda: os.path.getsize(path))


def plain_tensors(tensors):
    """Tensor subclasses (torchao's) taken apart: {name: tensor} -> {name: plain tensor}."""
    found = {}
    for name, tensor in tensors.items():
        if hasattr(tensor, "__tensor_flatten__"):
            parts = tensor.__tensor_flatten__()[0]
            found |= plain_tensors({f"{name}.{part}": getattr(tensor, part) for part in parts})
        elif isinstance(tensor, torch.Tensor):
            found[name] = tensor
    return found


def stored_size(tensors):
    """Bytes of a safetensors file with these tensors."""
    return len(save({name: tensor.detach().contiguous() for name, tensor in plain_tensors(tensors).items()}))


def exported_size(model, configs):
    """Bytes of the checkpoint that serves these configs, as export.py writes it, or in float32 where one of them has
    linears in float."""
    try:
        return stored_size(exported_state(model, served_widths(configs))[0])
    except ValueError:
        return stored_size(model.state_dict())

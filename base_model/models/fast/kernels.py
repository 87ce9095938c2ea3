"""kernels.c for Python: what a CPU computes around the integer products, with each tensor read once.

The file is compiled when it is first needed (half a second, once a process). Where that fails, and for tensors that
are not float32 on a CPU, integer.py and torch's own operators compute the same in more passes.
"""

import ctypes
import functools
import logging
import os
import platform
import shutil
import subprocess
import tempfile

import torch

from ..quantization import QUANTIZED_BITS

logger = logging.getLogger(__name__)
SOURCE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "kernels.c")
FLAGS = ["-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-fno-strict-aliasing"]
HEAD, BLOCK = 64, 4  # as in kernels.c
POINTER, LONG, FLOAT, INT = ctypes.c_void_p, ctypes.c_long, ctypes.c_float, ctypes.c_int
SIGNATURES = {
    "quantize_rows": [POINTER, LONG, LONG, LONG, FLOAT, POINTER, POINTER, POINTER, LONG, FLOAT, POINTER, INT],
    "finish_rows": [POINTER, LONG, LONG, *[POINTER] * 5, LONG, FLOAT, POINTER, LONG, INT],
    "gelu_rows": [POINTER, LONG, LONG, LONG, POINTER, INT],
    "attend": [*[POINTER] * 6, LONG, LONG, LONG, FLOAT, POINTER, POINTER, LONG, INT],
}


@functools.cache
def compiled():
    """The compiled kernels, or None where no C compiler builds them; the log then says why, once."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or "cc"
    width = ["-mprefer-vector-width=512"] if platform.machine() == "x86_64" else []
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "kernels.so")
            command = [*compiler.split(), *FLAGS, *width, "-shared", "-fPIC", SOURCE, "-o", path, "-lm"]
            subprocess.run(command, check=True, capture_output=True, text=True)
            found = ctypes.CDLL(path)
    except (OSError, subprocess.CalledProcessError) as error:
        failed = isinstance(error, subprocess.CalledProcessError)
        reason = error.stderr.strip().partition("\n")[0] or f"exit status {error.returncode}" if failed else error
        logger.warning("no compiled kernels, so integer execution takes longer: %s, kernels.c: %s", compiler, reason)
        return None
    for name, signature in SIGNATURES.items():
        getattr(found, name).argtypes, getattr(found, name).restype = signature, None
    return found


def can_take(*tensors):
    """Whether the kernels compute on these: float32, on a CPU, last axis adjacent, no gradient, no autocast."""
    return (
        all(x.dtype == torch.float32 and x.device.type == "cpu" and x.stride(-1) == 1 for x in tensors)
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and compiled() is not None
    )


def _qmax(bits):
    return 2 ** (bits - 1) - 1


def quantize_rows(x, bits, lora_A=None, scaling=1.0):
    """As `integer.quantize_rows`."""
    rows, n = x.shape
    codes, scale = x.new_empty((rows, n), dtype=torch.int8), x.new_empty(rows, 1)
    r = 0 if lora_A is None else len(lora_A)
    low_rank = x.new_empty(rows, r)
    compiled().quantize_rows(
        *(x.data_ptr(), rows, n, x.stride(0), _qmax(bits), codes.data_ptr(), scale.data_ptr()),
        *(lora_A.data_ptr() if r else None, r, scaling, low_rank.data_ptr(), torch.get_num_threads()),
    )
    return codes, scale, low_rank


def finish_rows(acc, row_scale, column_scale, bias, low_rank, lora_Bt, kv_bits, out):
    """As `integer.finish_rows`."""
    kv_qmax = _qmax(kv_bits) if kv_bits in QUANTIZED_BITS else 0
    r = low_rank.shape[1]
    compiled().finish_rows(
        *(acc.data_ptr(), *acc.shape, row_scale.data_ptr(), column_scale.data_ptr(), bias.data_ptr()),
        *(low_rank.data_ptr(), lora_Bt.data_ptr() if r else None, r, kv_qmax, out.data_ptr(), out.stride(0)),
        torch.get_num_threads(),
    )


def gelu(x):
    """GPT-2's tanh GELU. x: (rows, n)."""
    out = x.new_empty(x.shape)
    compiled().gelu_rows(x.data_ptr(), *x.shape, x.stride(0), out.data_ptr(), torch.get_num_threads())
    return out


def causal_attention(query, key, value, scaling):
    """softmax(scaling * q k^T) v, token i seeing tokens 0..i.

    Args:
        query, key, value: (batch, heads, seq, 64).
    Returns:
        (batch, seq, heads, 64).
    """
    batch, heads, length, _ = query.shape
    padded, threads = -(-length // HEAD) * HEAD, torch.get_num_threads()
    out, scratch = query.new_empty(batch, length, heads, HEAD), query.new_empty(threads, HEAD + BLOCK, padded)
    inputs = ((x.data_ptr(), (LONG * 3)(*x.stride()[:3])) for x in (query, key, value))
    compiled().attend(
        *(part for pair in inputs for part in pair),
        *(batch, heads, length, scaling, out.data_ptr(), scratch.data_ptr(), padded, threads),
    )
    return out

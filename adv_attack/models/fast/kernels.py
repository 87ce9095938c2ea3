"""kernels.c and attention.c for Python: what a CPU computes around the integer products, each tensor read once.

They are compiled when they are first needed (half a second, once a process). Where that fails, and for tensors that
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

logger = logging.getLogger(__name__)
FOLDER = os.path.dirname(os.path.abspath(__file__))
SOURCES = [os.path.join(FOLDER, name) for name in ("kernels.c", "attention.c")]
FLAGS = ["-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-fno-strict-aliasing"]
HEAD_SIZE, CHUNK, BLOCK = 64, 64, 4  # as in vectors.h and attention.c
LONG, FLOAT, INT = ctypes.c_long, ctypes.c_float, ctypes.c_int


class Pointer:
    """Argument type of a C function that gets the data of a tensor; None is NULL."""

    @staticmethod
    def from_param(tensor):
        return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


STRIDES = ctypes.POINTER(LONG)
LORA = [Pointer, LONG, FLOAT, Pointer]
SIGNATURES = {
    "hadamard_rows": [Pointer, LONG, LONG, LONG, LONG, Pointer, Pointer, Pointer, INT],
    "quantize_rows": [Pointer, LONG, LONG, LONG, FLOAT, Pointer, LONG, Pointer, Pointer, Pointer, *LORA, INT],
    "finish_rows": [Pointer, LONG, LONG, *[Pointer] * 5, LONG, FLOAT, LONG, Pointer, LONG, INT],
    "gelu_rows": [Pointer, LONG, LONG, LONG, Pointer, INT],
    "attend": [*[Pointer, STRIDES] * 3, LONG, LONG, LONG, FLOAT, Pointer, Pointer, LONG, INT],
}


@functools.cache
def compiled():
    """The compiled kernels, or None where no C compiler builds them; the log then says why, once."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or "cc"
    width = ["-mprefer-vector-width=512"] if platform.machine() == "x86_64" else []
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "kernels.so")
            command = [*compiler.split(), *FLAGS, *width, "-shared", "-fPIC", *SOURCES, "-o", path, "-lm"]
            subprocess.run(command, check=True, capture_output=True, text=True)
            found = ctypes.CDLL(path)
    except (OSError, subprocess.CalledProcessError) as error:
        failed = isinstance(error, subprocess.CalledProcessError)
        reason = error.stderr.strip().partition("\n")[0] or f"exit status {error.returncode}" if failed else error
        logger.warning("no compiled kernels, so integer execution and rotation take longer: %s: %s", compiler, reason)
        return None
    for name, signature in SIGNATURES.items():
        getattr(found, name).argtypes, getattr(found, name).restype = signature, None
    return found


def can_take(*tensors, autocast=False):
    """Whether the kernels compute on these: float32, on a CPU, last axis adjacent, no gradient.

    Not where autocast is on, which would round elsewhere; with autocast=True also there: for what stays float32 in it.
    """
    return (
        all(x.dtype == torch.float32 and x.device.type == "cpu" and x.stride(-1) == 1 for x in tensors)
        and not torch.is_grad_enabled()
        and (autocast or not torch.is_autocast_enabled("cpu"))
        and not torch.compiler.is_compiling()
        and compiled() is not None
    )


def _qmax(bits):
    return 2 ** (bits - 1) - 1


def hadamard(x, block, before=None, after=None):
    """As `rotation.hadamard`. x: (rows, n) float32."""
    (rows, n), out, threads = x.shape, x.new_empty(x.shape), torch.get_num_threads()
    compiled().hadamard_rows(x, rows, n, x.stride(0), block, before, after, out, threads)
    return out


def quantize_rows(x, bits, lora_A=None, scaling=1.0, factors=None, block=1):
    """As `integer.quantize_rows`."""
    (rows, n), r = x.shape, 0 if lora_A is None else len(lora_A)
    codes, scale = x.new_empty((rows, n), dtype=torch.int8), x.new_empty(rows, 1)
    low_rank, threads = x.new_empty(rows, r), torch.get_num_threads()
    rotated = None if factors is None else x.new_empty(threads, n)
    rotation, lora = (factors, block, rotated), (lora_A, r, scaling, low_rank)
    compiled().quantize_rows(x, rows, n, x.stride(0), _qmax(bits), *rotation, codes, scale, *lora, threads)
    return codes, scale, low_rank


def finish_rows(acc, row_scales, column_scale, bias, low_rank, lora_Bt, kv_bits, head_size, out):
    """As `integer.finish_rows`."""
    (rows, n), r, threads = acc.shape, low_rank.shape[1], torch.get_num_threads()
    kv = _qmax(kv_bits) if kv_bits is not None and kv_bits <= 8 else 0, head_size or 0
    compiled().finish_rows(
        acc, rows, n, row_scales, column_scale, bias, low_rank, lora_Bt, r, *kv, out, out.stride(0), threads
    )


def gelu(x):
    """GPT-2's tanh GELU. x: (rows, n)."""
    out = x.new_empty(x.shape)
    compiled().gelu_rows(x, len(x), x.shape[1], x.stride(0), out, torch.get_num_threads())
    return out


def causal_attention(query, key, value, scaling):
    """softmax(scaling * q k^T) v, token i seeing 0..i. Three (batch, heads, seq, 64) -> (batch, seq, heads, 64)."""
    batch, heads, seq, _ = query.shape
    padded, threads = -(-seq // CHUNK) * CHUNK, torch.get_num_threads()
    out, scratch = query.new_empty(batch, seq, heads, HEAD_SIZE), query.new_empty(threads, HEAD_SIZE + BLOCK, padded)
    q_strides, k_strides, v_strides = ((LONG * 3)(*x.stride()[:3]) for x in (query, key, value))
    compiled().attend(
        query, q_strides, key, k_strides, value, v_strides, batch, heads, seq, scaling, out, scratch, padded, threads
    )
    return out

"""The usage examples of the Punica operations in LoRAX's reference page, run as they stand there."""

import math

import torch
from op_cases import int32, make_adapters, make_cache, randn
from punica_kernels import reference
from tolerances import assert_close

BATCH_DECODE = """
import punica_kernels

# Batched decode attention with paged KV cache
punica_kernels.batch_decode(o, q, kv_ptrs, kv_indptr, last_page_offset,
                            tmpbuf, num_layers, layer_idx, num_kv_heads, page_size)
"""
DISPATCH_BGMV = """
import punica_kernels

# Apply LoRA adapters via BGMV (one adapter per token)
punica_kernels.dispatch_bgmv(y, x, w_ptr, indices, layer_idx, scale=1.0)
"""
SGMV_CUTLASS = """
import punica_kernels

# Apply LoRA adapters via SGMV (variable-length segments)
tmp_size = punica_kernels.sgmv_cutlass_tmp_size(num_adapters)
punica_kernels.sgmv_cutlass(y, x, w_ptr, s_start, s_end, tmp, layer_idx)
"""
RMS_NORM = """
import punica_kernels

# Fused RMS normalization
punica_kernels.rms_norm(output, input, weight, epsilon=1e-6)
"""


def test_batch_decode(device):
    cache = make_cache([37, 16, 1], 2, 16, 64, torch.float16, device)
    q = randn(3, 8, 64, dtype=torch.float16, device=device)
    exact = torch.zeros(3, 8, 64, dtype=torch.float64, device=device)
    reference.batch_decode(exact, q, *cache.tables, None, *cache.scalars)
    given = {"o": torch.full_like(q, math.nan), "q": q}
    given |= dict(zip(("kv_ptrs", "kv_indptr", "last_page_offset"), cache.tables, strict=True))
    given["tmpbuf"] = torch.empty(64 << 20, dtype=torch.uint8, device=device)  # "at least 64 MB"
    given |= dict(zip(("num_layers", "layer_idx", "num_kv_heads", "page_size"), cache.scalars, strict=True))
    exec(BATCH_DECODE, given)
    assert_close(given["o"], exact)


def test_dispatch_bgmv(device):
    adapters = make_adapters(4, 16, 64, torch.bfloat16, device)
    given = {
        "y": torch.zeros(6, 16, dtype=torch.bfloat16, device=device),
        "x": randn(6, 64, dtype=torch.bfloat16, device=device),
        "w_ptr": adapters.w_ptr,
        "indices": torch.tensor([3, 0, 0, 2, -1, 1], device=device),
        "layer_idx": 1,
    }
    exact = given["y"].double()
    reference.dispatch_bgmv(exact, given["x"], adapters.w_ptr, given["indices"], 1, 1.0)
    exec(DISPATCH_BGMV, given)
    assert_close(given["y"], exact)


def test_sgmv_cutlass(device):
    adapters = make_adapters(3, 16, 64, torch.bfloat16, device)
    given = {
        "num_adapters": 3,
        "y": torch.zeros(9, 64, dtype=torch.bfloat16, device=device),
        "x": randn(9, 16, dtype=torch.bfloat16, device=device),
        "w_ptr": adapters.w_ptr,
        "s_start": int32([0, 2, 7], device),
        "s_end": int32([2, 7, 9], device),
        "layer_idx": 1,
    }
    exact = given["y"].double()
    reference.sgmv_cutlass(exact, given["x"], adapters.w_ptr, given["s_start"], given["s_end"], None, 1)
    first, second = SGMV_CUTLASS.rsplit("\n", 2)[:2]
    exec(first, given)
    assert isinstance(given["tmp_size"], int)
    given["tmp"] = torch.empty(given["tmp_size"], dtype=torch.uint8, device=device)
    exec(second, given)
    assert_close(given["y"], exact)


def test_rms_norm(device):
    given = {
        "input": randn(5, 576, dtype=torch.float16, device=device),
        "weight": randn(576, dtype=torch.float16, device=device, seed=1),
    }
    given["output"] = torch.empty_like(given["input"])
    exact = torch.empty(5, 576, dtype=torch.float64, device=device)
    reference.rms_norm(exact, given["input"], given["weight"], 1e-6)
    exec(RMS_NORM, given)
    assert_close(given["output"], exact)

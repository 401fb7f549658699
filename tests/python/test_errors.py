"""Every argument of every operation, wrong in every way that the contract names.

A call must raise RuntimeError with the operation, the argument, what was expected and what came, and must not have
written a byte; through the function and through torch's dispatcher alike.
"""

import ctypes
import dataclasses
import functools
import inspect
import itertools
import math
import re
from collections.abc import Callable
from typing import Any

import punica_kernels as pk
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import int32, make_adapters, make_cache, make_lora, public, randn
from torch import Tensor

DTYPE = torch.bfloat16
KEEP_ALIVE = []  # memory behind addresses, for as long as the tests run


def attention_arguments(decode: bool, device: str = "cpu") -> dict[str, Any]:
    cache = make_cache([9, 4, 0], 2, 4, 8, DTYPE, device, layers=3, layer=1)
    KEEP_ALIVE.append(cache)
    rows = 3 if decode else 8
    arguments = {
        "o": torch.zeros(rows, 4, 8, dtype=DTYPE, device=device),
        "q": randn(rows, 4, 8, dtype=DTYPE, device=device),
    }
    if not decode:
        arguments["qo_indptr"] = int32([0, 5, 7, 8], device)
    arguments |= dict(zip(("kv_ptrs", "kv_indptr", "last_page_offset"), cache.tables, strict=True))
    arguments["tmpbuf"] = None
    arguments |= dict(zip(("num_layers", "layer_idx", "num_kv_heads", "page_size"), cache.scalars, strict=True))
    arguments |= {"sm_scale": None, "rope_theta": None, "rope_scale": 1.0, "window_left": -1, "logits_soft_cap": 0.0}
    return arguments | {"lse": torch.zeros(rows, 4, device=device)}


def kv_arguments(append: bool, device: str = "cpu") -> dict[str, Any]:
    cache = make_cache([9, 4, 0], 2, 4, 8, DTYPE, device, layers=3, layer=1)
    KEEP_ALIVE.append(cache)
    rows = 3 if append else 8
    arguments = dict(zip(("kv_ptrs", "kv_indptr", "last_page_offset"), cache.tables, strict=True))
    arguments |= {name: randn(rows, 2, 8, dtype=DTYPE, device=device) for name in ("k", "v")}
    if not append:
        arguments["seqlen_indptr"] = int32([0, 5, 7, 8], device)
    return arguments | dict(zip(("num_layers", "layer_idx", "num_kv_heads", "page_size"), cache.scalars, strict=True))


def bgmv_arguments(device: str = "cpu") -> dict[str, Any]:
    adapters = make_adapters(3, 16, 8, DTYPE, device)
    KEEP_ALIVE.append(adapters)
    return {
        "y": torch.zeros(4, 16, dtype=DTYPE, device=device), "x": randn(4, 8, dtype=DTYPE, device=device),
        "w_ptr": adapters.w_ptr, "indices": torch.tensor([0, 2, -1, 1], device=device), "layer_idx": 1, "scale": 0.5,
    }  # fmt: skip


def sgmv_arguments(device: str = "cpu") -> dict[str, Any]:
    adapters = make_adapters(3, 16, 8, DTYPE, device)
    KEEP_ALIVE.append(adapters)
    return {
        "y": torch.zeros(9, 16, dtype=DTYPE, device=device), "x": randn(9, 8, dtype=DTYPE, device=device),
        "w_ptr": adapters.w_ptr, "s_start": int32([0, 4, 4], device), "s_end": int32([4, 4, 9], device),
        "tmp": torch.zeros(4096, dtype=torch.uint8, device=device), "layer_idx": 1,
    }  # fmt: skip


def add_lora_arguments(device: str = "cpu") -> dict[str, Any]:
    lora = make_lora([[4, 0, 3], [2, 5, 8]], 8, [0, 6, 16], DTYPE, device, scales=[0.5, 1.0, -2.0])
    KEEP_ALIVE.append(lora)
    return {
        "y": torch.zeros(4, 16, dtype=DTYPE, device=device), "x": randn(4, 8, dtype=DTYPE, device=device),
        "a_ptr": lora.a_ptr, "b_ptr": lora.b_ptr, "ranks": lora.ranks, "scales": lora.scales,
        "order": int32([3, 0, 2, 1, -1], device), "segment_adapter": int32([-1, 0, 2, -1], device),
        "segment_start": int32([0, 1, 3, 4, 0], device), "counts": int32([3, 3], device), "layer_idx": 1,
        "slice_offsets": [0, 6, 16], "a_layer_stride": None, "b_layer_stride": None, "b_row_stride": None,
        "max_rank": 512,
    }  # fmt: skip


def update_arguments(device: str = "cpu") -> dict[str, Any]:
    def empty(n):
        return torch.full((n,), -7, dtype=torch.int32, device=device)

    return {
        "indices": torch.tensor([2, 0, -1, 2], device=device), "num_adapters": 3, "batch_indices": empty(6),
        "order": empty(6), "segment_adapter": empty(4), "segment_start": empty(5), "counts": empty(2),
    }  # fmt: skip


def norm_arguments(device: str = "cpu") -> dict[str, Any]:
    return {
        "output": torch.zeros(3, 16, dtype=DTYPE, device=device), "input": randn(3, 16, dtype=DTYPE, device=device),
        "weight": randn(16, dtype=DTYPE, device=device), "epsilon": 1e-5,
        "residual": randn(3, 16, dtype=DTYPE, device=device, seed=1),
    }  # fmt: skip


# Of a device, "cpu" where none is named.
VALID: dict[str, Callable[..., dict[str, Any]]] = {
    "batch_prefill": functools.partial(attention_arguments, False),
    "batch_decode": functools.partial(attention_arguments, True),
    "init_kv": functools.partial(kv_arguments, False),
    "append_kv": functools.partial(kv_arguments, True),
    "dispatch_bgmv": bgmv_arguments,
    "sgmv_shrink": sgmv_arguments,
    "sgmv_cutlass": sgmv_arguments,
    "add_lora": add_lora_arguments,
    "update_lora_batch": update_arguments,
    "rms_norm": norm_arguments,
}
TENSORS = {op: [name for name, value in make().items() if isinstance(value, Tensor)] for op, make in VALID.items()}
TENSORS["batch_prefill"].append("tmpbuf")
TENSORS["batch_decode"].append("tmpbuf")
WRITTEN = {
    "batch_prefill": ["o", "lse", "tmpbuf"], "batch_decode": ["o", "lse", "tmpbuf"], "init_kv": [], "append_kv": [],
    "dispatch_bgmv": ["y"], "sgmv_shrink": ["y", "tmp"], "sgmv_cutlass": ["y", "tmp"],
    "add_lora": ["y"],
    "update_lora_batch": ["batch_indices", "order", "segment_adapter", "segment_start", "counts"],
    "rms_norm": ["output", "residual"],
}  # fmt: skip
STRIDED = {"o", "q", "k", "v", "y", "x", "output", "input", "residual"}  # their rows may lie apart
WORKSPACES = {"tmp", "tmpbuf"}


def same_bits(a: Tensor) -> bytes:
    """Of all of the tensor's storage; nothing where there is no memory."""
    if a.layout is not torch.strided or a.device.type != "cpu" or a.is_quantized or not a.untyped_storage().nbytes():
        return b""
    storage = a.untyped_storage()
    return ctypes.string_at(storage.data_ptr(), storage.nbytes())


def ways(op: str):
    yield public(op)
    yield getattr(torch.ops.punica_kernels, op)


def assert_refused(op: str, arguments: dict[str, Any], *words: str, error=RuntimeError, prefix=True) -> None:
    caches = [kept.memory for kept in KEEP_ALIVE if hasattr(kept, "memory")]
    watched = [value for value in arguments.values() if isinstance(value, Tensor)] + caches[-1:]
    before = [same_bits(tensor) for tensor in watched]
    for way in ways(op):
        with pytest.raises(error) as caught:
            way(**arguments)
        message = str(caught.value)
        if prefix:
            assert message.startswith(f"punica_kernels.{op}: "), message
        for word in words:
            assert re.search(rf"(?<!\w){re.escape(word)}(?!\w)", message), f"{word!r} is not in {message!r}"
        assert "\n" not in message or not prefix
    assert [same_bits(tensor) for tensor in watched] == before


@dataclasses.dataclass
class Wrong:
    op: str
    argument: str
    what: str
    change: Callable[[dict[str, Any]], Any]  # of the valid arguments, to the wrong value
    words: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.op}-{self.argument}-{self.what}"


def without_memory(tensor: Tensor) -> Tensor:
    tensor = tensor.clone()
    tensor.untyped_storage().resize_(0)
    return tensor


def misaligned(tensor: Tensor) -> Tensor:
    data = bytearray(tensor.nbytes + tensor.itemsize)
    KEEP_ALIVE.append(data)
    address = ctypes.addressof(ctypes.c_char.from_buffer(data))
    offset = 1 + (-address) % tensor.itemsize if (-address) % tensor.itemsize else 1
    view = torch.frombuffer(data, dtype=tensor.dtype, count=tensor.numel(), offset=offset).view(tensor.shape)
    assert view.data_ptr() % tensor.itemsize
    return view.copy_(tensor)


def spread_last(tensor: Tensor) -> Tensor:
    """The same shape and values; the last dimension is not dense."""
    wide = tensor.new_zeros(*tensor.shape[:-1], 2 * tensor.shape[-1])
    return wide[..., ::2].copy_(tensor)


def overlapping_rows(tensor: Tensor) -> Tensor:
    return tensor.new_zeros(tensor.numel() * 2).as_strided(tensor.shape, (1, *tensor.stride()[1:]))


def swapped_inner(tensor: Tensor) -> Tensor:
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def spread_rows(tensor: Tensor) -> Tensor:
    return torch.cat((tensor, tensor), dim=-1)[..., : tensor.shape[-1]]


FREE_DTYPE = {("update_lora_batch", "indices")}  # both kinds of integers
# Those that say what the others must be, and those with a bound only.
FREE_EXTENT = {
    ("add_lora", "a_ptr", 0), ("add_lora", "a_ptr", 1), ("add_lora", "order", 0), ("add_lora", "segment_adapter", 0),
    ("update_lora_batch", "indices", 0), ("update_lora_batch", "order", 0), ("update_lora_batch", "segment_adapter", 0),
}  # fmt: skip


def tensor_cases():
    for op, names in TENSORS.items():
        for name in names:

            def of(change, name=name):
                return lambda arguments: change(arguments[name])

            if name == "tmpbuf":
                given = torch.zeros(1 << 20, dtype=torch.uint8)
                yield Wrong(op, name, "dtype", lambda a, g=given: g.view(torch.int8), ("uint8", "int8"))
                yield Wrong(op, name, "rank", lambda a, g=given: g.view(2, -1), ("shape",))
                yield Wrong(op, name, "stride", lambda a, g=given: g[::2], ("contiguous",))
                yield Wrong(op, name, "device", lambda a, g=given: g.to("meta"), ("cpu", "meta"))
                yield Wrong(op, name, "null", lambda a, g=given: without_memory(g), ("null",))
                continue
            for dtype in (torch.float64, torch.int16, torch.complex64, torch.bool, torch.float8_e4m3fn):
                yield Wrong(op, name, f"dtype {dtype}", of(lambda t, dtype=dtype: t.to(dtype)), ("got",))
            valid = VALID[op]()[name]
            other = {DTYPE: torch.float16, torch.int64: torch.int32, torch.int32: torch.int64}.get(valid.dtype)
            if (
                other is not None and name not in ("y", "q", "k", "output") and (op, name) not in FREE_DTYPE
            ):  # those four say what T is
                yield Wrong(op, name, "dtype", of(lambda t, other=other: t.to(other)), (str(other)[6:], "got"))
            yield Wrong(op, name, "rank more", of(lambda t: t.unsqueeze(0)), ("shape", "got"))
            yield Wrong(
                op,
                name,
                "rank less",
                of(lambda t: t.flatten()[0]),
                (
                    "shape",
                    "got [",
                ),
            )
            yield Wrong(op, name, "rank 5", of(lambda t: t.view(*[1] * (5 - t.dim()), *t.shape)), ("shape", "got"))
            for dim in range(valid.dim()):
                free = {
                    ("q", 0), ("q", 1), ("k", 0), ("kv_ptrs", 0), ("y", 0), ("y", 1), ("x", 1), ("output", 0),
                    ("output", 1), ("w_ptr", 0), ("tmp", 0), ("last_page_offset", 0), ("q", 2), ("k", 2),
                }  # fmt: skip
                if (name, dim) not in free and (op, name, dim) not in FREE_EXTENT:
                    length = valid.shape[dim]
                    yield Wrong(
                        op, name, f"extent {dim} short", of(lambda t, d=dim: t.narrow(d, 0, t.shape[d] - 1)),
                        ("shape", f"{length}", f"{length - 1}"),
                    )  # fmt: skip
                    yield Wrong(
                        op, name, f"extent {dim} long", of(lambda t, d=dim: torch.cat((t, t), d)),
                        ("shape", f"{length}", f"{2 * length}"),
                    )  # fmt: skip
            yield Wrong(op, name, "last stride", of(spread_last), ("strides",))
            if name in STRIDED:
                yield Wrong(op, name, "overlapping rows", of(overlapping_rows), ("strides",))
                yield Wrong(
                    op, name, "expanded rows", of(lambda t: t[:1].clone().expand(t.shape)), ("strides",)
                )  # fmt: skip
                if valid.dim() == 3:
                    yield Wrong(op, name, "inner stride", of(swapped_inner), ("strides",))
            elif valid.dim() > 1:
                yield Wrong(op, name, "row stride", of(spread_rows), ("contiguous", "strides"))
            yield Wrong(op, name, "device", of(lambda t: t.to("meta")), ("meta", "cpu"))
            yield Wrong(op, name, "null", of(without_memory), ("null",))
            if valid.itemsize > 1:
                yield Wrong(op, name, "alignment", of(misaligned), ("aligned", f"{valid.itemsize} bytes"))
            yield Wrong(op, name, "sparse", of(lambda t: t.to_sparse()), ("sparse_coo",))


SCALARS = {
    "layer_idx": [-1], "num_layers": [0, -3], "num_kv_heads": [0, -2], "page_size": [0, -1],
    "sm_scale": [math.nan, math.inf], "rope_theta": [0.0, -1.0, math.nan, math.inf],
    "rope_scale": [0.0, -2.0, math.nan, math.inf], "window_left": [-2], "logits_soft_cap": [-1.0, math.nan, math.inf],
    "scale": [math.nan, -math.inf, 1e300], "epsilon": [-1e-6, math.nan, math.inf],
    "slice_offsets": [None, [], [0, 16], [0, 6, 17], [7, 6, 16], [-1, 6, 16], [0, 6, 16, 16], list(range(40))],
    "a_layer_stride": [-1], "b_layer_stride": [-1], "b_row_stride": [-1], "max_rank": [0, -1],
    "num_adapters": [-1, 2**31],
}  # fmt: skip


def scalar_cases():
    for op, make in VALID.items():
        for name in make():
            if name in TENSORS[op]:
                continue
            wrong = list(SCALARS[name])
            if name == "layer_idx" and not op.endswith(("gmv", "shrink", "cutlass", "lora")):
                wrong += [3, 2**40]  # num_layers is 3; LoRA knows no upper bound
            for bad in wrong:
                # No page can have 0 heads, so k and v cannot be right either: whichever is named first.
                argument = "" if name == "num_kv_heads" and op.endswith("kv") else name
                yield Wrong(op, name, f"{bad}", lambda a, bad=bad: bad, (argument,) if argument else ())
        if "num_kv_heads" in make():
            yield Wrong(op, "num_kv_heads", "3", lambda a: 3, ("3",))
            yield Wrong(op, "page_size", "2**60", lambda a: 2**60, ("page_size", "2^63"))
            yield Wrong(op, "num_layers", "2**62", lambda a: 2**62, ("num_layers", "2^63"))
        else:
            if "layer_idx" in make():
                yield Wrong(op, "layer_idx", "2**62", lambda a: 2**62, ("layer_idx", "2^63"))


def changed(name: str, index: int, value: int):
    def change(arguments):
        tensor = arguments[name].clone()
        tensor[index] = value
        return tensor

    return change


def contents_cases():
    for op in ("batch_prefill", "batch_decode", "init_kv", "append_kv"):  # sequences of 3, 1 and 0 pages of 4 tokens
        for index, value, words in [
            (0, -1, ("kv_indptr[0]",)), (1, 0, ("kv_indptr[1]",)), (3, 6, ("kv_indptr[3]", "len(kv_ptrs)")),
            (3, 4, ("kv_indptr[3]",)), (3, 2**31 - 1, ("kv_indptr[3]",)),
        ]:  # fmt: skip
            if (index, value) == (3, 6):
                value = 7
            yield Wrong(op, "kv_indptr", f"[{index}] = {value}", changed("kv_indptr", index, value), words)
        for index, value in [(0, 0), (0, 5), (1, -1), (1, 2**31 - 1)]:
            words = (f"last_page_offset[{index}]", "[1, 4] (page_size)", str(value))
            yield Wrong(
                op, "last_page_offset", f"[{index}] = {value}", changed("last_page_offset", index, value), words
            )
        last = 3  # the page that holds the newest token of sequence 0: every op looks at that one
        yield Wrong(op, "kv_ptrs", "null page", changed("kv_ptrs", last, 0), (f"kv_ptrs[{last}]", "null"))
        yield Wrong(
            op, "kv_ptrs", "page not aligned", changed("kv_ptrs", last, 8), (f"kv_ptrs[{last}]", "16 bytes", "8")
        )
    for op, name in (("batch_prefill", "qo_indptr"), ("init_kv", "seqlen_indptr")):
        for index, value in [(0, -1), (1, -4), (2, 4), (3, 9), (3, 2**31 - 1)]:
            yield Wrong(op, name, f"[{index}] = {value}", changed(name, index, value), (f"{name}[{index}]",))
    yield Wrong(
        "init_kv",
        "seqlen_indptr",
        "longer than kv_len",
        lambda a: int32([0, 3, 8, 8], str(a["k"].device)),
        ("seqlen_indptr", "4", "5"),
    )
    yield Wrong("dispatch_bgmv", "indices", "index", changed("indices", 1, 3), ("indices[1]", "len(w_ptr)", "3"))
    yield Wrong("dispatch_bgmv", "w_ptr", "null", changed("w_ptr", 2, 0), ("w_ptr[2]", "null"))
    yield Wrong("dispatch_bgmv", "w_ptr", "alignment", changed("w_ptr", 2, 1001), ("w_ptr[2]", "2 bytes", "1001"))
    for op in ("sgmv_shrink", "sgmv_cutlass"):
        yield Wrong(op, "w_ptr", "null", changed("w_ptr", 2, 0), ("w_ptr[2]", "null"))
        yield Wrong(op, "w_ptr", "alignment", changed("w_ptr", 0, 1001), ("w_ptr[0]", "2 bytes", "1001"))
        yield Wrong(op, "s_start", "negative", changed("s_start", 0, -1), ("s_start[0]", "-1"))
        yield Wrong(op, "s_start", "behind the rows", changed("s_start", 2, 10), ("s_start[2]", "10"))
        yield Wrong(op, "s_start", "overlap", changed("s_start", 2, 3), ("s_start", "segments 0 and 2", "overlap", "3"))
        yield Wrong(op, "s_start", "backwards", changed("s_start", 1, 5), ("s_end[1]", "4"))
        yield Wrong(op, "s_end", "behind the rows", changed("s_end", 2, 10), ("s_end[2]", "10"))
        yield Wrong(op, "s_end", "backwards", changed("s_end", 1, 3), ("s_end[1]", "3"))
        yield Wrong(op, "s_end", "overlap", changed("s_end", 0, 5), ("segments 0 and 2", "overlap"))

    yield Wrong("update_lora_batch", "indices", "index", changed("indices", 3, 3), ("indices[3]", "num_adapters", "3"))
    op = "add_lora"
    for index, value, words in [
        (1, 4, ("order[1]", "rows of y", "4")), (2, 2**31 - 1, ("order[2]", "rows of y")),
        (2, 0, ("order[2]", "row 0 a second time")), (3, -1, ("order[3]", "-1")),
    ]:  # fmt: skip
        yield Wrong(op, "order", f"[{index}] = {value}", changed("order", index, value), words)
    yield Wrong(
        op, "segment_adapter", "adapter", changed("segment_adapter", 2, 3), ("segment_adapter[2]", "num_adapters", "3")
    )
    for index, value in [(1, -1), (2, 0), (2, 6), (3, 1), (3, 6), (3, 2**31 - 1)]:
        yield Wrong(op, "segment_start", f"[{index}] = {value}", changed("segment_start", index, value))
    for index, value in [((0, 0), -1), ((1, 2), 513), ((0, 2), 2**31 - 1)]:
        entry = f"ranks[{3 * index[0] + index[1]}]"
        yield Wrong(op, "ranks", f"{index} = {value}", changed("ranks", index, value), (entry, "max_rank", str(value)))
    for name in ("a_ptr", "b_ptr"):
        yield Wrong(op, name, "alignment", changed(name, (1, 2), 1001), (f"{name}[5]", "2 bytes", "1001"))
    yield Wrong(op, "max_rank", "below a rank", lambda a: 7, ("ranks[5]", "max_rank", "8"))
    yield Wrong(op, "b_row_stride", "below a rank", lambda a: 7, ("ranks[5]", "b_row_stride", "8"))


@pytest.mark.parametrize("op", VALID)
def test_the_valid_call_is_valid(op):
    for way in ways(op):
        assert way(**VALID[op]()) is None


def cases():
    return itertools.chain(tensor_cases(), scalar_cases(), contents_cases())


@pytest.mark.parametrize("wrong", list(cases()), ids=str)
def test_refused(wrong):
    arguments = VALID[wrong.op]()
    arguments[wrong.argument] = wrong.change(arguments)
    words = wrong.words
    # The argument's name must be in the message, unless which of two that must agree is wrong only the caller knows.
    two_sided = (
        wrong.what.startswith(("extent 0", "overlap", "backwards"))
        or (wrong.argument == "num_kv_heads" and wrong.op.endswith("kv"))
    )  # fmt: skip
    if not two_sided and not any(wrong.argument in word for word in words):
        words = (*words, wrong.argument)
    assert_refused(wrong.op, arguments, *words)


def test_every_argument_has_cases():
    seen = {(wrong.op, wrong.argument) for wrong in cases()}
    for op in VALID:
        for name in inspect.signature(public(op)).parameters:
            assert (op, name) in seen or name == "indicies", f"{op}: {name} is not tested"


@pytest.mark.parametrize(("op", "argument", "shape"), [
    ("batch_prefill", "q", (8, 3, 8)), ("batch_decode", "q", (3, 3, 8)),  # heads that num_kv_heads does not divide
    ("batch_prefill", "q", (8, 4, 7)), ("batch_decode", "q", (3, 4, 258)), ("batch_decode", "q", (3, 4, 0)),
    ("init_kv", "k", (8, 2, 7)), ("append_kv", "k", (3, 2, 258)),
])  # fmt: skip
def test_shapes_that_no_kernel_has(op, argument, shape):
    arguments = VALID[op]()
    for name in ("q", "o") if argument == "q" else ("k", "v"):
        arguments[name] = torch.zeros(shape, dtype=DTYPE)
    arguments["lse"] = torch.zeros(shape[:2])
    if argument == "k":
        del arguments["lse"]
    assert_refused(op, arguments, "num_kv_heads" if shape[1] == 3 else argument)


@pytest.mark.parametrize("op", VALID)
def test_overlap(op):
    """No output may share a byte with another tensor; rms_norm in place aside, which test_norm covers."""
    names = [name for name in TENSORS[op] if name not in WORKSPACES]
    for written in WRITTEN[op]:
        for other in names:
            if other == written:
                continue
            arguments = VALID[op]()
            if written in WORKSPACES:
                # Both in one buffer, the workspace behind the other's first byte.
                target = arguments[other]
                buffer = torch.zeros(target.nbytes + (1 << 20), dtype=torch.uint8)
                arguments[other] = buffer[: target.nbytes].view(target.dtype).view(target.shape).copy_(target)
                arguments[written] = buffer[target.nbytes - 1 :]
            else:
                a, b = arguments[written], arguments[other]
                start = a.nbytes - (a.nbytes % 8 or 8)  # they share the last bytes of `written`
                buffer = torch.zeros(a.nbytes + b.nbytes + 8, dtype=torch.uint8)
                arguments[written] = buffer[: a.nbytes].view(a.dtype).view(a.shape).copy_(a)
                arguments[other] = buffer[start : start + b.nbytes].view(b.dtype).view(b.shape).copy_(b)
            assert_refused(op, arguments, written, other, "overlap")


def test_overlap_is_exact():
    """Interleaved column slices do not overlap, one column more does."""
    wide = torch.zeros(9, 40, dtype=DTYPE)
    for op in ("sgmv_shrink", "sgmv_cutlass"):
        arguments = sgmv_arguments() | {"y": wide[:, 4:20], "x": wide[:, 20:28]}
        public(op)(**arguments)
        assert_refused(op, arguments | {"x": wide[:, 19:27]}, "y", "x", "overlap")
        assert_refused(op, arguments | {"x": wide[:, 0:8]}, "y", "x", "overlap")
        # Other strides in the same memory: rows of 8 in what y's rows leave free, and then one that is not free.
        flat = wide.flatten()
        public(op)(**arguments | {"x": flat.as_strided((9, 8), (40, 1), 28)})
        assert_refused(op, arguments | {"x": flat.as_strided((9, 8), (8, 1), 0)}, "overlap")
    x = torch.zeros(4, 16, dtype=DTYPE)
    weight = torch.ones(8, dtype=DTYPE)
    assert_refused("rms_norm", {"output": x[:, :8], "input": x[:, 4:12], "weight": weight, "epsilon": 0.0}, "overlap")
    shifted = {"output": x.view(8, 8)[1:5], "input": x.view(8, 8)[:4], "weight": weight, "epsilon": 0.0}
    assert_refused("rms_norm", shifted, "output", "input", "overlap")


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.data())
def test_overlap_of_any_two_views(data):
    """Refused exactly where some element of y is an element of x."""
    rows = data.draw(st.integers(1, 6))
    memory = torch.arange(200, dtype=torch.float32)
    views = []
    for _ in range(2):
        width = data.draw(st.integers(1, 9))
        stride = data.draw(st.integers(width, 15))
        offset = data.draw(st.integers(0, 200 - (rows - 1) * stride - width))
        views.append(memory.as_strided((rows, width), (stride, 1), offset))
    shared = set(views[0].flatten().tolist()) & set(views[1].flatten().tolist())
    arguments = {
        "y": views[0], "x": views[1], "w_ptr": torch.zeros(1, dtype=torch.int64),
        "indices": torch.full((rows,), -1), "layer_idx": 0, "scale": 1.0,
    }  # fmt: skip
    if shared:
        with pytest.raises(RuntimeError, match="y and x must not overlap"):
            pk.dispatch_bgmv(**arguments)
    else:
        pk.dispatch_bgmv(**arguments)


def test_workspace_too_small_names_the_bytes():
    for segments in (1, 3):
        needed = pk.sgmv_cutlass_tmp_size(segments)
        arguments = sgmv_arguments()
        for name in ("w_ptr", "s_start", "s_end"):
            arguments[name] = arguments[name][:segments].clone()
        arguments["tmp"] = torch.zeros(needed, dtype=torch.uint8)
        pk.sgmv_cutlass(**arguments)
        arguments["tmp"] = torch.zeros(needed - 1, dtype=torch.uint8)
        assert_refused("sgmv_cutlass", arguments, "tmp", f"{needed} bytes", f"got {needed - 1}")
    for op in ("batch_prefill", "batch_decode"):
        for options in ({}, {"rope_theta": 1e4}):
            arguments = VALID[op]() | options | {"tmpbuf": torch.zeros(0, dtype=torch.uint8)}
            try:
                public(op)(**arguments)
            except RuntimeError as error:
                needed = int(re.search(r"tmpbuf must have at least (\d+) bytes, got 0", str(error)).group(1))
                arguments["tmpbuf"] = torch.zeros(needed - 1, dtype=torch.uint8)
                assert_refused(op, arguments, "tmpbuf", f"{needed} bytes", f"got {needed - 1}")
                public(op)(**arguments | {"tmpbuf": torch.zeros(needed, dtype=torch.uint8)})
    with pytest.raises(RuntimeError, match=r"punica_kernels.sgmv_cutlass_tmp_size: num_segments .* got -1"):
        pk.sgmv_cutlass_tmp_size(-1)


@pytest.mark.parametrize("op", VALID)
def test_requires_grad(op):
    for name in TENSORS[op]:
        arguments = VALID[op]()
        if arguments[name] is None or not arguments[name].is_floating_point():
            continue
        arguments[name] = arguments[name].requires_grad_()
        assert_refused(op, arguments, name, "no backward; use torch.no_grad()")
        with torch.no_grad():
            public(op)(**arguments)


@pytest.mark.parametrize("op", VALID)
def test_lazy_views(op):
    for name in TENSORS[op]:
        arguments = VALID[op]()
        if arguments[name] is None or not arguments[name].is_floating_point():
            continue
        single = {n: v.float() if isinstance(v, Tensor) and v.is_floating_point() else v for n, v in arguments.items()}
        single[name] = torch.complex(single[name], single[name]).conj().imag
        assert single[name].is_neg()
        assert_refused(op, single, name, "negative")
        arguments[name] = torch.complex(single[name], single[name]).conj()
        assert_refused(op, arguments, name)
        # The same memory as the plain tensor, with the same strides.
        arguments = VALID[op]()
        arguments[name] = torch._neg_view(arguments[name])
        assert_refused(op, arguments, name, "negative")


@pytest.mark.parametrize("op", VALID)
def test_wrong_python_types(op):
    for name, value in VALID[op]().items():
        if name in ("tmp", "tmpbuf", "lse", "residual", "sm_scale", "rope_theta") or name.endswith("_stride"):
            bad = ["text"]
        elif name == "slice_offsets":
            bad = ["text", 3, [0, "text", 16], [0, 6.5, 16]]
        elif op == "add_lora" and name == "counts":
            bad = ["text", [1.0]]
        elif isinstance(value, Tensor):
            bad = [None, [1.0], 3]
        else:
            bad = [None, "text", 1.5 if isinstance(value, int) else []]
        for wrong in bad:
            arguments = VALID[op]() | {name: wrong}
            assert_refused(op, arguments, error=(RuntimeError, TypeError), prefix=False)
    with pytest.raises(TypeError):
        public(op)()


def test_the_two_spellings():
    arguments = bgmv_arguments()
    arguments["indicies"] = arguments.pop("indices")
    pk.dispatch_bgmv(**arguments)
    assert arguments["y"].abs().sum() > 0
    with pytest.raises(TypeError, match="indicies"):
        pk.dispatch_bgmv(**arguments, indices=arguments["indicies"])
    del arguments["indicies"]
    with pytest.raises(TypeError, match="indices"):
        pk.dispatch_bgmv(**arguments)


@pytest.mark.parametrize("op", VALID)
def test_meta(op):
    """On meta alone nothing happens."""
    arguments = {n: v.to("meta") if isinstance(v, Tensor) else v for n, v in VALID[op]().items()}
    for way in ways(op):
        assert way(**arguments) is None

"""dispatch_bgmv, sgmv_shrink and sgmv_cutlass at one layer, and all LoRA of a layer beside PEFT's mixed batch."""

from collections.abc import Iterator
from itertools import pairwise

import punica_kernels as pk
import torch
import torch.nn.functional as F
from harness import Work, check_close
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

DTYPE = torch.bfloat16
RTOL = 1.6e-2  # of bfloat16: docs/architecture.md
RTOL_RIVAL = 4 * RTOL  # torch and PEFT round what we keep in float32 on the way


def addresses(tensors: list[Tensor]) -> Tensor:
    return torch.tensor([tensor.data_ptr() for tensor in tensors])


def random(*shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape) * scale).to(DTYPE)


def bgmv(name: str, h_in: int, h_out: int, num_adapters: int, rotation: int) -> Work:
    """One row each for `num_adapters` adapters; the layers of the adapters are the sets that the benchmark rotates."""
    num_layers = -(-rotation // (num_adapters * h_in * h_out * DTYPE.itemsize))
    weights = [random(num_layers, h_out, h_in, scale=h_in**-0.5) for _ in range(num_adapters)]
    stacked = torch.stack(weights, dim=1)  # [L, adapters, h_out, h_in]: the layout that suits torch
    x = random(num_layers, num_adapters, h_in)
    y = random(num_layers, num_adapters, h_out)
    w_ptr = addresses(weights)
    indices = torch.randperm(num_adapters)
    adapter_of_row = indices.tolist()

    def ours(i: int, y: Tensor = y) -> None:
        pk.dispatch_bgmv(y[i], x[i], w_ptr, indices, i, 1.0)

    def gather_bmm(i: int, y: Tensor = y) -> None:
        y[i] += torch.bmm(stacked[i].index_select(0, indices), x[i].unsqueeze(2)).squeeze(2)

    def loop(i: int, y: Tensor = y) -> None:
        y_i, x_i, w_i = y[i], x[i], stacked[i]
        for row, adapter in enumerate(adapter_of_row):
            y_i[row : row + 1].addmm_(x_i[row : row + 1], w_i[adapter].t())

    rivals = {"torch: index_select + bmm": gather_bmm, "torch: loop of matmuls": loop}

    def check() -> None:
        for i in (0, num_layers - 1):
            exact = y.double()
            pk.reference.dispatch_bgmv(exact[i], x[i], w_ptr, indices, i, 1.0)
            for label, variant in {"ours": ours, **rivals}.items():
                got = y.clone()
                variant(i, got)
                check_close(f"{name}, {label}", got[i], exact[i], RTOL if variant is ours else RTOL_RIVAL)

    return Work(
        name=name,
        ours=ours,
        rivals=rivals,
        num_sets=num_layers,
        bytes=(num_adapters * (h_in * h_out + h_in + 2 * h_out)) * DTYPE.itemsize,
        flop=2 * num_adapters * h_in * h_out,
        goal=0.7,
        check=check,
        keep=weights,
    )


def sgmv(name: str, d_in: int, d_out: int, num_segments: int, length: int, rotation: int) -> Work:
    """Equal segments, each of an adapter of its own: shrink (weights [d_out, d_in]) or expand ([d_in, d_out])."""
    shrink = d_out < d_in
    rows = num_segments * length
    weight_bytes = num_segments * d_in * d_out * DTYPE.itemsize
    row_bytes = rows * (d_in + d_out) * DTYPE.itemsize
    num_sets = -(-rotation // (weight_bytes + row_bytes))
    shape = (d_out, d_in) if shrink else (d_in, d_out)
    weights = [random(num_sets, *shape, scale=d_in**-0.5) for _ in range(num_segments)]
    stacked = torch.stack(weights, dim=1)  # [L, segments, ...]
    x, y = random(num_sets, rows, d_in), random(num_sets, rows, d_out)
    w_ptr = addresses(weights)
    starts = torch.arange(0, rows, length, dtype=torch.int32)
    ends = starts + length
    segments = torch.arange(num_segments)
    tmp = torch.empty(pk.sgmv_cutlass_tmp_size(num_segments), dtype=torch.uint8)
    call = pk.sgmv_shrink if shrink else pk.sgmv_cutlass
    reference = pk.reference.sgmv_shrink if shrink else pk.reference.sgmv_cutlass

    def matrix(w: Tensor) -> Tensor:
        return w.transpose(-1, -2) if shrink else w

    def ours(i: int, y: Tensor = y) -> None:
        call(y[i], x[i], w_ptr, starts, ends, tmp, i)

    def bmm(i: int, y: Tensor = y) -> None:
        chosen = stacked[i].index_select(0, segments)
        y_i = y[i].view(num_segments, length, d_out)
        torch.baddbmm(y_i, x[i].view(num_segments, length, d_in), matrix(chosen), out=y_i)

    def loop(i: int, y: Tensor = y) -> None:
        y_i, x_i, w_i = y[i], x[i], stacked[i]
        for segment in range(num_segments):
            rows_of = slice(segment * length, (segment + 1) * length)
            y_i[rows_of].addmm_(x_i[rows_of], matrix(w_i[segment]))

    rivals = {"torch: index_select + bmm": bmm, "torch: loop of matmuls": loop}

    def check() -> None:
        for i in (0, num_sets - 1):
            exact = y[i].double()
            reference(exact, x[i], w_ptr, starts, ends, None, i)
            for label, variant in {"ours": ours, **rivals}.items():
                got = y.clone()
                variant(i, got)
                check_close(f"{name}, {label}", got[i], exact, RTOL if variant is ours else RTOL_RIVAL)

    return Work(
        name=name,
        ours=ours,
        rivals=rivals,
        num_sets=num_sets,
        bytes=weight_bytes + rows * (d_in + 2 * d_out) * DTYPE.itemsize,
        flop=2 * rows * d_in * d_out,
        goal=0.5,
        check=check,
        keep=weights,
    )


# ---- All LoRA of one layer, adapters of different ranks -------------------------------------------------------------

# Llama-3-8B.
MODULES = {
    "q_proj": (4096, 4096),
    "k_proj": (4096, 1024),
    "v_proj": (4096, 1024),
    "o_proj": (4096, 4096),
    "gate_proj": (4096, 14336),
    "up_proj": (4096, 14336),
    "down_proj": (14336, 4096),
}
RANKS = (8, 8, 16, 16, 32, 32, 64, 64)  # one adapter each


class GivenOutput(nn.Module):
    """In the place of a base layer: returns a tensor that is there already, at no cost."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.output: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor | None:
        return self.output


class MixedBatch:
    """The seven modules of a layer with eight adapters; rows of a batch belong to one each, or to none.

    PEFT runs its own `LoraLayer.forward(x, adapter_names=...)` on its own modules. Their base layer is a GivenOutput,
    so that only LoRA is left in its time: splitting the batch, two products an adapter, scaling, adding. Both sides use
    the same memory for A, and the same numbers for B. Ours is what `punica generate` calls: a pair of calls a rank.
    """

    def __init__(self, rotation: int):
        total = sum(RANKS) * sum(a + b for a, b in MODULES.values()) * DTYPE.itemsize
        self.num_sets = max(2, -(-rotation // total))
        self.names = [f"rank{rank}_{i}" for i, rank in enumerate(RANKS)]
        self.weight_bytes = total
        self.layers = self._peft_modules()
        self.a: dict[str, list[Tensor]] = {}
        self.b: dict[str, list[Tensor]] = {}
        self.b_transposed: dict[str, list[Tensor]] = {}
        for module in MODULES:
            for store, side in ((self.a, "lora_A"), (self.b, "lora_B")):
                store[module] = []
                for name in self.names:
                    parts = [getattr(self.layers[i][module], side)[name] for i in range(self.num_sets)]
                    block = torch.stack([random(*part.weight.shape, scale=0.1) for part in parts])
                    for part, weight in zip(parts, block, strict=True):
                        part.weight = nn.Parameter(weight, requires_grad=False)
                    store[module].append(block)
            self.b_transposed[module] = [b.transpose(1, 2).contiguous() for b in self.b[module]]

    def _peft_modules(self) -> list[dict[str, nn.Module]]:
        with torch.device("meta"):
            linears = {m: nn.Linear(h_in, h_out, bias=False, dtype=DTYPE) for m, (h_in, h_out) in MODULES.items()}
        layers = []
        for _ in range(self.num_sets):
            model = nn.ModuleDict(dict(linears))
            configs = [LoraConfig(r=r, lora_alpha=r, target_modules=list(MODULES)) for r in RANKS]  # scale 1
            wrapped = get_peft_model(model, configs[0], adapter_name=self.names[0])
            for name, config in zip(self.names[1:], configs[1:], strict=True):
                wrapped.add_adapter(name, config)
            wrapped.eval()
            for module, (h_in, h_out) in MODULES.items():
                model[module].base_layer = GivenOutput(h_in, h_out)
            layers.append({module: model[module] for module in MODULES})
        return layers

    def work(self, name: str, adapter_ids: list[int], length: int) -> Work:
        """A batch of requests of `length` new tokens each; an id of -1 has no adapter. Length 1 is decode."""
        decode = length == 1
        rows = len(adapter_ids) * length
        peft_names = [self.names[i] if i >= 0 else "__base__" for i in adapter_ids]
        x = {module: random(rows, h_in) for module, (h_in, _) in MODULES.items()}
        y = {module: random(rows, h_out) for module, (_, h_out) in MODULES.items()}
        row_ids = torch.tensor(adapter_ids).repeat_interleave(length)
        bounds = torch.arange(0, rows + 1, length).tolist()
        segments = [(i, start, end) for i, (start, end) in zip(adapter_ids, pairwise(bounds), strict=True) if i >= 0]

        def groups() -> Iterator[tuple[int, list[int]]]:
            for rank in sorted({RANKS[i] for i in adapter_ids if i >= 0}):
                yield rank, [i for i in range(len(RANKS)) if RANKS[i] == rank]

        bgmv_calls, sgmv_calls = {}, {}
        for module in MODULES:
            bgmv_calls[module], sgmv_calls[module] = [], []
            for rank, members in groups():
                a, b = (addresses(side[module]) for side in (self.a, self.b))
                indices = torch.where(torch.isin(row_ids, torch.tensor(members)), row_ids, -1)
                bgmv_calls[module].append((rank, a, b, indices))
                mine = [segment for segment in segments if segment[0] in members]
                ids, starts, ends = (torch.tensor(column) for column in zip(*mine, strict=True))
                call = (rank, a[ids], addresses(self.b_transposed[module])[ids], starts.int(), ends.int())
                sgmv_calls[module].append(call)
        tmp = torch.empty(pk.sgmv_cutlass_tmp_size(len(segments)), dtype=torch.uint8)

        def ours(i: int, y: dict[str, Tensor] = y) -> None:
            for module in MODULES:
                x_m, y_m = x[module], y[module]
                if decode:
                    for rank, a, b, indices in bgmv_calls[module]:
                        v = x_m.new_zeros(rows, rank)
                        pk.dispatch_bgmv(v, x_m, a, indices, i, 1.0)
                        pk.dispatch_bgmv(y_m, v, b, indices, i, 1.0)
                else:
                    for rank, a, b, starts, ends in sgmv_calls[module]:
                        v = x_m.new_zeros(rows, rank)
                        pk.sgmv_shrink(v, x_m, a, starts, ends, tmp, i)
                        pk.sgmv_cutlass(y_m, v, b, starts, ends, tmp, i)

        def peft(i: int, y: dict[str, Tensor] = y) -> None:
            for module, layer in self.layers[i].items():
                layer.base_layer.output = y[module].view(len(adapter_ids), length, -1)
                layer(x[module].view(len(adapter_ids), length, -1), adapter_names=peft_names)

        rows_of = {i: (row_ids == i).nonzero().squeeze(1) for i in sorted(set(adapter_ids)) if i >= 0}

        def loop(i: int, y: dict[str, Tensor] = y) -> None:
            for module in MODULES:
                for adapter, chosen in rows_of.items():
                    v = F.linear(x[module].index_select(0, chosen), self.a[module][adapter][i])
                    y[module].index_add_(0, chosen, F.linear(v, self.b[module][adapter][i]))

        rivals = {"PEFT mixed batch": peft, "torch: loop of matmuls": loop}

        def check() -> None:
            i = self.num_sets - 1
            exact = {module: y[module].double() for module in MODULES}
            for module in MODULES:
                for adapter, chosen in rows_of.items():
                    v = x[module][chosen].double() @ self.a[module][adapter][i].double().T
                    exact[module][chosen] += v @ self.b[module][adapter][i].double().T
            for label, variant in {"ours": ours, **rivals}.items():
                got = {module: y[module].clone() for module in MODULES}
                variant(i, got)
                for module in MODULES:  # between shrink and expand v is rounded to bfloat16, by all of them
                    check_close(f"{name}, {label}, {module}", got[module], exact[module], RTOL_RIVAL)

        widths = sum(a + b for a, b in MODULES.values())
        weight_bytes = sum(RANKS[i] for i in rows_of) * widths * DTYPE.itemsize
        with_adapter = sum(i >= 0 for i in row_ids.tolist())
        io_bytes = with_adapter * sum(h_in + 2 * h_out for h_in, h_out in MODULES.values()) * DTYPE.itemsize
        return Work(
            name=name,
            ours=ours,
            rivals=rivals,
            num_sets=self.num_sets,
            bytes=weight_bytes + io_bytes,
            flop=2 * sum(RANKS[i] for i in row_ids.tolist() if i >= 0) * widths,
            times=("PEFT mixed batch", 3.0),
            check=check,
            keep=self,
        )


def works(rotation: int) -> Iterator[Work]:
    yield bgmv("BGMV shrink, 64 adapters", 4096, 16, 64, rotation)
    yield bgmv("BGMV expand, 64 adapters", 16, 4096, 64, rotation)
    yield sgmv("SGMV shrink, 8 x 64 tokens", 4096, 16, 8, 64, rotation)
    yield sgmv("SGMV expand, 8 x 64 tokens", 16, 4096, 8, 64, rotation)


def mixed_works(rotation: int) -> Iterator[Work]:
    batch = MixedBatch(rotation)
    order = torch.randperm(36).tolist()
    decode = ([*range(8)] * 4 + [-1] * 4, 32 + 4)
    yield batch.work(f"decode, {decode[1]} requests", [decode[0][i] for i in order], 1)
    yield batch.work("prefill, 9 requests x 64 tokens", [3, 0, 6, -1, 1, 7, 4, 2, 5], 64)

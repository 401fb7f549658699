"""The LoRA operations at one layer, and all LoRA of a layer beside PEFT's mixed batch."""

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


def add_lora(name: str, h_in: int, widths: tuple[int, ...], ranks: list[int], length: int, rotation: int) -> Work:
    """`length` rows for each of len(ranks) adapters, in any order; y is made of slices that read the same x."""
    num_adapters, rows, width = len(ranks), len(ranks) * length, sum(widths)
    weight_bytes = sum(ranks) * (len(widths) * h_in + width) * DTYPE.itemsize
    num_sets = -(-rotation // (weight_bytes + rows * (h_in + width) * DTYPE.itemsize))
    a = [[random(num_sets, r, h_in, scale=h_in**-0.5) for r in ranks] for _ in widths]
    b = [[random(num_sets, h_out, r, scale=r**-0.5) for r in ranks] for h_out in widths]
    a_ptr, b_ptr = (torch.stack([addresses(row) for row in side]) for side in (a, b))
    rank_table, scales = torch.tensor(ranks, dtype=torch.int32), torch.ones(num_adapters)
    adapter_of_row = torch.arange(num_adapters).repeat_interleave(length)[torch.randperm(rows)]
    batch = pk.LoraBatch(adapter_of_row, num_adapters)
    offsets = [0, *torch.tensor(widths).cumsum(0).tolist()]
    columns = [slice(start, end) for start, end in pairwise(offsets)]
    x, y = random(num_sets, rows, h_in), random(num_sets, rows, width)

    def ours(i: int, y: Tensor = y) -> None:
        pk.add_lora(y[i], x[i], a_ptr, b_ptr, rank_table, scales, batch, i, offsets)

    of_rank = {r: torch.where(rank_table[adapter_of_row] == r, adapter_of_row, -1) for r in sorted(set(ranks))}

    def two_calls(i: int, y: Tensor = y) -> None:
        for rank, indices in of_rank.items():
            for s, part in enumerate(columns):
                v = x.new_zeros(rows, rank)
                pk.dispatch_bgmv(v, x[i], a_ptr[s], indices, i, 1.0)
                pk.dispatch_bgmv(y[i][:, part], v, b_ptr[s], indices, i, 1.0)

    rows_of = [(adapter_of_row == adapter).nonzero().squeeze(1) for adapter in range(num_adapters)]

    def loop(i: int, y: Tensor = y) -> None:
        for adapter, chosen in enumerate(rows_of):
            x_i = x[i].index_select(0, chosen)
            for s, part in enumerate(columns):
                v = F.linear(x_i, a[s][adapter][i])
                y[i][:, part].index_add_(0, chosen, F.linear(v, b[s][adapter][i]))

    rivals = {"our dispatch_bgmv, two a rank and slice": two_calls, "torch: loop of matmuls": loop}

    def check() -> None:
        for i in (0, num_sets - 1):
            exact = y[i].double()
            pk.reference.add_lora(exact, x[i], a_ptr, b_ptr, rank_table, scales, batch, i, offsets)
            for label, variant in {"ours": ours, **rivals}.items():
                got = y.clone()
                variant(i, got)
                check_close(f"{name}, {label}", got[i], exact, RTOL if variant is ours else RTOL_RIVAL)

    return Work(
        name=name,
        ours=ours,
        rivals=rivals,
        num_sets=num_sets,
        bytes=weight_bytes + rows * (h_in + 2 * width) * DTYPE.itemsize,
        flop=2 * length * sum(ranks) * (len(widths) * h_in + width),
        check=check,
        keep=(a, b),
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
# Those that read the same input, whose outputs lie side by side.
PROJECTIONS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
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
    the same memory for A and for B. Ours is what `punica generate` calls: add_lora, four times a layer.
    """

    def __init__(self, rotation: int):
        total = sum(RANKS) * sum(a + b for a, b in MODULES.values()) * DTYPE.itemsize
        self.num_sets = max(2, -(-rotation // total))
        self.names = [f"rank{rank}_{i}" for i, rank in enumerate(RANKS)]
        self.weight_bytes = total
        self.layers = self._peft_modules()
        self.a: dict[str, list[Tensor]] = {}
        self.b: dict[str, list[Tensor]] = {}
        for module in MODULES:
            for store, side in ((self.a, "lora_A"), (self.b, "lora_B")):
                store[module] = []
                for name in self.names:
                    parts = [getattr(self.layers[i][module], side)[name] for i in range(self.num_sets)]
                    block = torch.stack([random(*part.weight.shape, scale=0.1) for part in parts])
                    for part, weight in zip(parts, block, strict=True):
                        part.weight = nn.Parameter(weight, requires_grad=False)
                    store[module].append(block)

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
        rows = len(adapter_ids) * length
        peft_names = [self.names[i] if i >= 0 else "__base__" for i in adapter_ids]
        x: dict[str, Tensor] = {}
        calls = []
        for modules in PROJECTIONS:
            shared = random(rows, MODULES[modules[0]][0])
            offsets = [0, *torch.tensor([MODULES[module][1] for module in modules]).cumsum(0).tolist()]
            tables = [torch.stack([addresses(side[module]) for module in modules]) for side in (self.a, self.b)]
            calls.append((modules, shared, tables, offsets))
            x |= dict.fromkeys(modules, shared)
        row_ids = torch.tensor(adapter_ids).repeat_interleave(length)
        batch = pk.LoraBatch(row_ids, len(RANKS))
        ranks, scales = torch.tensor(RANKS, dtype=torch.int32), torch.ones(len(RANKS))

        def outputs() -> dict[str, Tensor]:
            """For each module a part of its projection's output, which is the first one's base."""
            found = {}
            for modules, _, _, offsets in calls:
                wide = random(rows, offsets[-1])
                found |= {m: wide[:, start:end] for m, (start, end) in zip(modules, pairwise(offsets), strict=True)}
            return found

        def copies(of: dict[str, Tensor]) -> dict[str, Tensor]:
            found = outputs()
            for module, tensor in found.items():
                tensor.copy_(of[module])
            return found

        def wide(of: dict[str, Tensor], module: str) -> Tensor:
            base = of[module]._base
            assert base is not None
            return base

        y = outputs()

        def ours(i: int, y: dict[str, Tensor] = y) -> None:
            for modules, shared, (a_ptr, b_ptr), offsets in calls:
                pk.add_lora(wide(y, modules[0]), shared, a_ptr, b_ptr, ranks, scales, batch, i, offsets)

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
                got = copies(y)
                variant(i, got)
                rtol = RTOL if variant is ours else RTOL_RIVAL  # v is rounded to bfloat16, by the rivals
                for module in MODULES:
                    check_close(f"{name}, {label}, {module}", got[module], exact[module], rtol)

        widths = sum(a + b for a, b in MODULES.values())
        weight_bytes = sum(RANKS[i] for i in rows_of) * widths * DTYPE.itemsize
        with_adapter = sum(i >= 0 for i in row_ids.tolist())
        inputs = sum(MODULES[modules[0]][0] for modules in PROJECTIONS)  # each once, whoever shares it
        io_bytes = with_adapter * (inputs + 2 * sum(h_out for _, h_out in MODULES.values())) * DTYPE.itemsize
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
    yield add_lora("add_lora, 64 adapters", 4096, (4096,), [16] * 64, 1, rotation)
    yield add_lora("add_lora, 64 adapters, ranks 8 to 64", 4096, (4096,), [8, 16, 32, 64] * 16, 1, rotation)
    yield add_lora("add_lora, 64 adapters, q, k and v", 4096, (4096, 1024, 1024), [16] * 64, 1, rotation)
    yield add_lora("add_lora, 8 x 64 tokens", 4096, (4096,), [16] * 8, 64, rotation)


def mixed_works(rotation: int) -> Iterator[Work]:
    batch = MixedBatch(rotation)
    order = torch.randperm(36).tolist()
    decode = ([*range(8)] * 4 + [-1] * 4, 32 + 4)
    yield batch.work(f"decode, {decode[1]} requests", [decode[0][i] for i in order], 1)
    yield batch.work("prefill, 9 requests x 64 tokens", [3, 0, 6, -1, 1, 7, 4, 2, 5], 64)

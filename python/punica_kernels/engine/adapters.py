"""PEFT LoRA adapters in the layouts of the kernels, and the calls that add them to a batch of mixed adapters.

A kernel call serves any number of adapters, but of one rank. So the adapters of a module are grouped by rank, and each
group costs one pair of calls (shrink to the rank, expand to the output) in which the rows of the others are skipped.
"""

import itertools
import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

import punica_kernels as pk

from .checkpoint import MODULES, ModelConfig, first_line, read_json
from .errors import EngineError

NO_ADAPTER = -1

# Settings of a LoraConfig that this loader applies, and those that only matter in training or describe the file. Any
# other one must be off: it would change what the adapter computes.
APPLIED = {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "bias", "init_lora_weights", "peft_type"}
HARMLESS = {
    *("auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "task_type", "peft_version"),
    *("lora_dropout", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "megatron_core"),
    *("qalora_group_size", "loftq_config", "runtime_config", "ensure_weight_tying", "eva_config"),
}
# Ways to start training that leave the base weights alone; the others ("pissa", "olora", "loftq", ...) move part of
# them into the adapter, which then belongs to a changed base model.
KEEPS_BASE = (True, False, "gaussian", "orthogonal", "eva")

TENSOR_NAME = re.compile(
    rf"base_model\.model\.model\.layers\.(\d+)\.(?:self_attn|mlp)\.({'|'.join(MODULES)})\.lora_([AB])\.weight"
)


@dataclass(frozen=True)
class LoraWeights:
    """One adapter on one module, all layers; a layer that the adapter leaves alone holds zeros, which add nothing.

    The scale alpha / r is part of B: sgmv takes no scale, and dispatch_bgmv takes one for all adapters of a call. B is
    kept twice because its two users read it in different orders.
    """

    rank: int
    a: Tensor  # [L, r, h_in]: dispatch_bgmv and sgmv_shrink
    b: Tensor  # [L, h_out, r]: dispatch_bgmv
    b_transposed: Tensor  # [L, r, h_out]: sgmv_cutlass


def load_adapter(
    name: str, path: Path, config: ModelConfig, dtype: torch.dtype, device: torch.device
) -> dict[str, LoraWeights]:
    """The weights of a PEFT adapter folder by module; EngineError for what is broken or cannot be represented."""
    where = f"adapter {name} ({path})"
    if not path.is_dir():
        raise EngineError(f"{where}: no such folder")
    peft = read_json(path / "adapter_config.json")
    check_settings(where, peft)
    pairs = read_pairs(where, path, config)

    weights = {}
    for module in MODULES:
        layers = pairs.get(module, {})
        if not layers:
            continue
        h_out, h_in = config.module_shape(module)
        # rank_pattern may give layers different ranks; they share one block of the largest, filled up with zeros.
        rank = max(len(pair["A"]) for pair in layers.values())
        a = torch.zeros(config.num_layers, rank, h_in)
        b = torch.zeros(config.num_layers, h_out, rank)
        for layer, pair in layers.items():
            if set(pair) != {"A", "B"}:
                raise EngineError(f"{where}: layer {layer} {module} has no lora_{'B' if 'A' in pair else 'A'}")
            r = len(pair["A"])
            if pair["A"].shape != (r, h_in) or pair["B"].shape != (h_out, r):
                raise EngineError(
                    f"{where}: made for another model: {module} maps {pair['A'].shape[1]} to {len(pair['B'])} "
                    f"features with rank {r}, the model's {h_in} to {h_out}"
                )
            key = f"model.layers.{layer}.{'mlp' if module in MODULES[4:] else 'self_attn'}.{module}"
            if r != pattern_value(peft.get("rank_pattern"), key, peft["r"]):
                raise EngineError(f"{where}: {key} has rank {r}, adapter_config.json says otherwise")
            alpha = pattern_value(peft.get("alpha_pattern"), key, peft["lora_alpha"])
            a[layer, :r] = pair["A"]
            b[layer, :, :r] = pair["B"].float() * (alpha / (r**0.5 if peft.get("use_rslora") else r))
        a, b = a.to(device, dtype), b.to(device, dtype)
        weights[module] = LoraWeights(rank, a, b, b.transpose(1, 2).contiguous())
    return weights


def check_settings(where: str, peft: Any) -> None:
    if not isinstance(peft, dict) or not isinstance(peft.get("r"), int) or "lora_alpha" not in peft:
        raise EngineError(f"{where}: adapter_config.json has no r or lora_alpha")
    for setting, off in (("peft_type", "LORA"), ("bias", "none")):
        if peft.get(setting, off) != off:
            raise EngineError(f"{where}: {setting} = {peft[setting]!r} is not supported")
    if peft.get("init_lora_weights", True) not in KEEPS_BASE:
        raise EngineError(f"{where}: init_lora_weights = {peft['init_lora_weights']!r} changes the base model")
    for setting, value in peft.items():
        if value and setting not in APPLIED | HARMLESS:
            raise EngineError(f"{where}: {setting} = {json.dumps(value)} is not supported")


def read_pairs(where: str, path: Path, config: ModelConfig) -> dict[str, dict[int, dict[str, Tensor]]]:
    """module -> layer -> {"A": [r, h_in], "B": [h_out, r]}, as stored."""
    file = path / "adapter_model.safetensors"
    if not file.is_file():
        raise EngineError(f"{where}: no adapter_model.safetensors")
    pairs: dict[str, dict[int, dict[str, Tensor]]] = {}
    tensors: Any
    try:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a mapping)
                match = TENSOR_NAME.fullmatch(name)
                if not match:
                    raise EngineError(f"{where}: tensor {name} is not LoRA on one of {', '.join(MODULES)}")
                layer, module, side = int(match[1]), match[2], match[3]
                if layer >= config.num_layers:
                    raise EngineError(f"{where}: made for another model: layer {layer} of {config.num_layers}")
                pairs.setdefault(module, {}).setdefault(layer, {})[side] = tensors.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise EngineError(f"{where}: {first_line(error)}") from error
    if not pairs:
        raise EngineError(f"{where}: adapter_model.safetensors holds no tensors")
    return pairs


def pattern_value(pattern: dict[str, Any] | None, key: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that matches the end of the module's name, from a dot on."""
    for expression, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({expression})$", key):
            return value
    return default


@dataclass(frozen=True)
class RankGroup:
    """The adapters of one rank on one module: tables of addresses by adapter id, 0 for the others."""

    rank: int
    members: frozenset[int]
    a: Tensor  # int64 [num_adapters]
    b: Tensor
    b_transposed: Tensor


class Adapters:
    """The loaded adapters. An id is a position in `names`; NO_ADAPTER serves the base model."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device):
        self.config, self.dtype, self.device = config, dtype, device
        self.names: list[str] = []
        self.weights: list[dict[str, LoraWeights]] = []
        self.groups: dict[str, list[RankGroup]] = {}
        self.seconds = 0.0  # in LoRA calls; on CUDA that is the time to launch them

    def load(self, name: str, path: Path) -> None:
        if name in self.names:
            raise EngineError(f"adapter {name} is given twice")
        self.weights.append(load_adapter(name, path, self.config, self.dtype, self.device))
        self.names.append(name)
        self.groups = {module: self._group(module) for module in MODULES}

    def id(self, name: str | None) -> int:
        if name is None:
            return NO_ADAPTER
        if name not in self.names:
            raise EngineError(f"no adapter named {name!r} ({', '.join(self.names) or 'none'} loaded)")
        return self.names.index(name)

    def _group(self, module: str) -> list[RankGroup]:
        groups = []
        for rank in sorted({weights[module].rank for weights in self.weights if module in weights}):
            chosen = [w[module] if module in w and w[module].rank == rank else None for w in self.weights]
            members = frozenset(i for i, weights in enumerate(chosen) if weights)
            a, b, b_transposed = (
                torch.tensor([getattr(w, field).data_ptr() if w else 0 for w in chosen], device=self.device)
                for field in ("a", "b", "b_transposed")
            )
            groups.append(RankGroup(rank, members, a, b, b_transposed))
        return groups


class DecodeLora:
    """LoRA for a batch of one token a sequence: dispatch_bgmv finds each row's adapter by its index.

    With a `capacity`, for a batch of so many rows whose adapters set() changes in place: the calls of every loaded
    adapter are made then, whoever is in the batch.
    """

    def __init__(self, adapters: Adapters, ids: Sequence[int], capacity: int | None = None):
        self.adapters = adapters
        self.calls: dict[str, list[tuple[RankGroup, Tensor]]] = {module: [] for module in MODULES}
        used = [
            (module, group)
            for module, groups in adapters.groups.items()
            for group in groups
            if capacity is not None or not group.members.isdisjoint(ids)
        ]
        # Modules that the same adapters use with the same rank share one row of indices.
        members = list(dict.fromkeys(group.members for _, group in used))
        shape = (len(members), len(ids) if capacity is None else capacity)
        self.table = torch.full(shape, NO_ADAPTER, dtype=torch.int64, device=adapters.device)
        self.indices = dict(zip(members, self.table, strict=True))
        for module, group in used:
            self.calls[module].append((group, self.indices[group.members]))
        self.set(ids)

    def set(self, ids: Sequence[int]) -> None:
        """The adapter of each row; rows behind the last one have none."""
        rest = [NO_ADAPTER] * (self.table.shape[1] - len(ids))
        rows = [[id if id in members else NO_ADAPTER for id in ids] + rest for members in self.indices]
        if rows:
            self.table.copy_(torch.tensor(rows, dtype=torch.int64))

    def apply(self, module: str, layer: int, x: Tensor, y: Tensor) -> None:
        """y += B A x for the rows whose adapter has this module. x [B, h_in], y [B, h_out], which may be a slice."""
        start = time.perf_counter()
        for group, indices in self.calls[module]:
            v = x.new_zeros(len(x), group.rank)
            pk.dispatch_bgmv(v, x, group.a, indices, layer, 1.0)
            pk.dispatch_bgmv(y, v, group.b, indices, layer, 1.0)
        self.adapters.seconds += time.perf_counter() - start


class PrefillLora:
    """LoRA for whole prompts: neighbouring prompts of one adapter form a segment, whose weights are read once."""

    def __init__(self, adapters: Adapters, ids: Sequence[int], lengths: Sequence[int]):
        self.adapters = adapters
        self.calls: dict[str, list[tuple[int, Tensor, Tensor, Tensor, Tensor]]] = {module: [] for module in MODULES}
        segments, end = [], 0
        for id, run in itertools.groupby(zip(ids, lengths, strict=True), key=lambda pair: pair[0]):
            start, end = end, end + sum(length for _, length in run)
            segments.append((id, start, end))
        device = adapters.device
        tables: dict[frozenset[int], tuple[Tensor, Tensor, Tensor]] = {}
        for module, groups in adapters.groups.items():
            for group in groups:
                if group.members.isdisjoint(ids):
                    continue
                if group.members not in tables:
                    mine = [segment for segment in segments if segment[0] in group.members]
                    segment_ids, starts, ends = (list(column) for column in zip(*mine, strict=True))
                    tables[group.members] = (
                        torch.tensor(segment_ids, device=device),
                        torch.tensor(starts, dtype=torch.int32, device=device),
                        torch.tensor(ends, dtype=torch.int32, device=device),
                    )
                chosen, s_start, s_end = tables[group.members]
                call = (group.rank, group.a[chosen], group.b_transposed[chosen], s_start, s_end)
                self.calls[module].append(call)
        self.tmp = torch.empty(pk.sgmv_cutlass_tmp_size(len(segments)), dtype=torch.uint8, device=device)

    def apply(self, module: str, layer: int, x: Tensor, y: Tensor) -> None:
        """y += B A x for the rows whose adapter has this module. x [rows, h_in], y [rows, h_out] or a slice."""
        start = time.perf_counter()
        for rank, a, b_transposed, s_start, s_end in self.calls[module]:
            v = x.new_zeros(len(x), rank)
            pk.sgmv_shrink(v, x, a, s_start, s_end, self.tmp, layer)
            pk.sgmv_cutlass(y, v, b_transposed, s_start, s_end, self.tmp, layer)
        self.adapters.seconds += time.perf_counter() - start

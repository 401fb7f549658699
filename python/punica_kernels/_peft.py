"""PEFT's adapter folders: what they say, and whether `y += scale * B (A x)` is all of it."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Settings of a LoraConfig that are applied here, and those that only matter in training or describe the file. Any other
# one must be off: it would change what the adapter computes.
APPLIED = {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "bias", "init_lora_weights", "peft_type"}
HARMLESS = {
    *("auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "task_type", "peft_version"),
    *("lora_dropout", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "megatron_core"),
    *("qalora_group_size", "loftq_config", "runtime_config", "ensure_weight_tying", "eva_config"),
}
# Ways to start training that leave the base weights alone; the others ("pissa", "olora", "loftq", ...) move part of
# them into the adapter, which then belongs to a changed base model.
KEEPS_BASE = (True, False, "gaussian", "orthogonal", "eva")


class AdapterError(ValueError):
    """One line that says what is wrong with an adapter, or what about it cannot be represented."""


@dataclass(frozen=True)
class LoraWeights:
    """One adapter on one module, all layers. A layer that the adapter leaves alone holds zeros, which add nothing."""

    a: Tensor  # [L, r, h_in]
    b: Tensor  # [L, h_out, r]
    scale: float

    @property
    def rank(self) -> int:
        return self.a.shape[1]


def read_adapter(
    name: str, path: Path, shapes: Mapping[str, tuple[int, int]], num_layers: int, layers: str = "model.layers"
) -> dict[str, LoraWeights]:
    """The weights of a PEFT adapter folder by module, in host memory.

    `shapes` has (h_out, h_in) of the modules that an adapter may have, by their path inside a layer, say
    "self_attn.q_proj"; `layers` is the path of the list of layers.
    """
    where = f"adapter {name} ({path})"
    if not path.is_dir():
        raise AdapterError(f"{where}: no such folder")
    peft = _read_json(path / "adapter_config.json")
    _check_settings(where, peft)
    pairs = _read_pairs(where, path, shapes, num_layers, layers)
    return {
        module: _join_layers(where, peft, module, shapes[module], pairs[module], num_layers, layers)
        for module in shapes
        if module in pairs
    }


def _join_layers(
    where: str,
    peft: dict[str, Any],
    module: str,
    shape: tuple[int, int],
    pairs: dict[int, dict[str, Tensor]],
    num_layers: int,
    layers: str,
) -> LoraWeights:
    h_out, h_in = shape
    short = module.rpartition(".")[2]
    scales = {}
    for layer, pair in pairs.items():
        if set(pair) != {"A", "B"}:
            raise AdapterError(f"{where}: layer {layer} {short} has no lora_{'B' if 'A' in pair else 'A'}")
        for side, tensor in pair.items():
            if tensor.dim() != 2:
                raise AdapterError(f"{where}: layer {layer} {short}: lora_{side} has shape {tuple(tensor.shape)}")
        r = len(pair["A"])
        if pair["A"].shape != (r, h_in) or pair["B"].shape != (h_out, r):
            raise AdapterError(
                f"{where}: made for another model: {short} maps {pair['A'].shape[1]} to {len(pair['B'])} "
                f"features with rank {r}, the model's {h_in} to {h_out}"
            )
        key = f"{layers}.{layer}.{module}"
        if r != _pattern_value(peft.get("rank_pattern"), key, peft["r"]):
            raise AdapterError(f"{where}: {key} has rank {r}, adapter_config.json says otherwise")
        if r < 1:
            raise AdapterError(f"{where}: {key} has rank 0")
        alpha = _pattern_value(peft.get("alpha_pattern"), key, peft["lora_alpha"])
        scales[layer] = alpha / (r**0.5 if peft.get("use_rslora") else r)
    # One scale for all layers: weights whose layers share it, nearly all, stay what the file holds, bit for bit.
    scale = max(scales.values(), key=abs)
    first = next(iter(pairs.values()))
    same = all(value == scale for value in scales.values())
    # rank_pattern may give layers different ranks; they share one block of the largest, filled up with zeros.
    rank = max(len(pair["A"]) for pair in pairs.values())
    a = torch.zeros(num_layers, rank, h_in, dtype=first["A"].dtype)
    b = torch.zeros(num_layers, h_out, rank, dtype=first["B"].dtype if same else torch.float32)
    for layer, pair in pairs.items():
        r = len(pair["A"])
        a[layer, :r] = pair["A"]
        b[layer, :, :r] = pair["B"] if same else pair["B"].float() * (scales[layer] / scale)
    return LoraWeights(a, b, scale)


def _check_settings(where: str, peft: Any) -> None:
    if not isinstance(peft, dict) or not isinstance(peft.get("r"), int) or "lora_alpha" not in peft:
        raise AdapterError(f"{where}: adapter_config.json has no r or lora_alpha")
    if not _is_number(peft["lora_alpha"]):
        raise AdapterError(f"{where}: lora_alpha = {json.dumps(peft['lora_alpha'])} is not a number")
    for setting in ("rank_pattern", "alpha_pattern"):
        _check_pattern(where, setting, peft.get(setting) or {})
    for setting, off in (("peft_type", "LORA"), ("bias", "none")):
        if peft.get(setting, off) != off:
            raise AdapterError(f"{where}: {setting} = {peft[setting]!r} is not supported")
    if peft.get("init_lora_weights", True) not in KEEPS_BASE:
        raise AdapterError(f"{where}: init_lora_weights = {peft['init_lora_weights']!r} changes the base model")
    for setting, value in peft.items():
        if value and setting not in APPLIED | HARMLESS:
            raise AdapterError(f"{where}: {setting} = {json.dumps(value)} is not supported")


def _check_pattern(where: str, setting: str, pattern: Any) -> None:
    if not isinstance(pattern, dict) or not all(map(_is_number, pattern.values())):
        raise AdapterError(f"{where}: {setting} = {json.dumps(pattern)} does not map patterns to numbers")
    try:
        for expression in pattern:
            re.compile(expression)
    except re.error as error:
        raise AdapterError(f"{where}: {setting}: {error.pattern!r} is not a pattern ({error})") from error


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _read_pairs(
    where: str, path: Path, shapes: Mapping[str, tuple[int, int]], num_layers: int, layers: str
) -> dict[str, dict[int, dict[str, Tensor]]]:
    """module -> layer -> {"A": [r, h_in], "B": [h_out, r]}, as stored."""
    # Here, because only who reads adapters needs the package.
    from safetensors import SafetensorError, safe_open

    file = path / "adapter_model.safetensors"
    if not file.is_file():
        raise AdapterError(f"{where}: no adapter_model.safetensors")
    modules = "|".join(map(re.escape, shapes))
    tensor_name = re.compile(rf"base_model\.model\.{re.escape(layers)}\.(\d+)\.({modules})\.lora_([AB])\.weight")
    pairs: dict[str, dict[int, dict[str, Tensor]]] = {}
    tensors: Any
    try:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a mapping)
                match = tensor_name.fullmatch(name)
                if not match:
                    known = ", ".join(module.rpartition(".")[2] for module in shapes)
                    raise AdapterError(f"{where}: tensor {name} is not LoRA on one of {known}")
                layer, module, side = int(match[1]), match[2], match[3]
                if layer >= num_layers:
                    raise AdapterError(f"{where}: made for another model: layer {layer} of {num_layers}")
                pairs.setdefault(module, {}).setdefault(layer, {})[side] = tensors.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{where}: {_first_line(error)}") from error
    if not pairs:
        raise AdapterError(f"{where}: adapter_model.safetensors holds no tensors")
    return pairs


def _pattern_value(pattern: dict[str, Any] | None, key: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that matches the end of the module's name, from a dot on."""
    for expression, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({expression})$", key):
            return value
    return default


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise AdapterError(f"{path}: {error.strerror or _first_line(error)}") from error
    except ValueError as error:
        raise AdapterError(f"{path}: not valid JSON ({_first_line(error)})") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]

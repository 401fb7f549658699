"""Checkpoints of the Llama family: a Hugging Face folder, or a GGUF file that is converted once and kept.

A checkpoint is taken whole or not at all: every setting that changes the arithmetic is applied or refused by name, and
a tensor that nothing reads is an error, for a model that ignores one is a different model.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import EngineError

# Architecture -> the linear layers that carry a bias whatever the config says.
FAMILIES: dict[str, frozenset[str]] = {
    "llama": frozenset(),
    "mistral": frozenset(),
    "qwen2": frozenset({"q_proj", "k_proj", "v_proj"}),
}
ATTENTION_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_MODULES = ("gate_proj", "up_proj", "down_proj")
MODULES = ATTENTION_MODULES + MLP_MODULES

# The angles of the other kinds ("dynamic", "longrope") depend on how long the sequence has become, so keys that are
# already rotated and cached would have to change.
ROPE_TYPES = ("default", "linear", "llama3", "yarn")

# Settings of related architectures, with the values that mean "off".
REFUSED_SETTINGS: dict[str, tuple[Any, ...]] = {
    "quantization_config": (None,),
    "attn_logit_softcapping": (None, 0),
    "final_logit_softcapping": (None, 0),
    "partial_rotary_factor": (None, 1),
    "embedding_multiplier": (None, 1),
    "attention_multiplier": (None,),
    "residual_multiplier": (None, 1),
    "logits_scaling": (None, 1),
    "logit_scale": (None, 1),
    "num_local_experts": (None, 0, 1),
    "num_experts": (None, 0, 1),
    "rope_interleaved": (None, False),
    "clip_qkv": (None,),
    "use_qk_norm": (None, False),
}

# What Transformers reads from a GGUF file of these architectures; it would drop anything else without a word.
GGUF_SETTINGS = {
    *("vocab_size", "context_length", "block_count", "embedding_length", "feed_forward_length"),
    *("attention.head_count", "attention.head_count_kv", "attention.layer_norm_rms_epsilon"),
    *("attention.key_length", "attention.value_length", "rope.dimension_count", "rope.freq_base"),
}


@dataclass(frozen=True)
class ModelConfig:
    """What the forward pass needs to know. window_left has one entry a layer (-1: no sliding window)."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_positions: int
    tied_embeddings: bool
    biases: frozenset[str]
    window_left: tuple[int, ...]
    inv_freq: Tensor  # [head_dim / 2] float32
    rope_attention_scaling: float

    def module_shape(self, module: str) -> tuple[int, int]:
        """(h_out, h_in) of one of the seven linear layers."""
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return {
            "q_proj": (q, self.hidden_size),
            "k_proj": (kv, self.hidden_size),
            "v_proj": (kv, self.hidden_size),
            "o_proj": (self.hidden_size, q),
            "gate_proj": (self.intermediate_size, self.hidden_size),
            "up_proj": (self.intermediate_size, self.hidden_size),
            "down_proj": (self.hidden_size, self.intermediate_size),
        }[module]


@dataclass(frozen=True)
class Checkpoint:
    folder: Path
    config: ModelConfig
    tokenizer: Any
    stop_tokens: frozenset[int]


def open_checkpoint(path: str | os.PathLike[str], dtype: torch.dtype) -> Checkpoint:
    """Open a Hugging Face folder or a GGUF file; raises EngineError for anything that cannot be served exactly."""
    folder = Path(path).expanduser()
    if not folder.exists():
        raise EngineError(f"{folder}: no such file or folder")
    if folder.is_file():
        if folder.suffix.lower() != ".gguf":
            raise EngineError(f"{folder}: expected a Hugging Face folder or a .gguf file")
        folder = convert_gguf(folder, dtype)
    raw = read_json(folder / "config.json")
    if raw.get("model_type") not in FAMILIES:
        raise EngineError(f"{folder}: architecture {raw.get('model_type')!r} is not one of {', '.join(FAMILIES)}")
    for architecture in raw.get("architectures") or []:
        if not architecture.endswith("ForCausalLM"):
            raise EngineError(f"{folder}: {architecture} does not generate text; expected a model for causal LM")

    from transformers import AutoConfig, AutoTokenizer  # seconds to import: only once the path has proved good

    try:
        config = AutoConfig.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # Transformers raises whatever the file provokes
        raise EngineError(f"{folder}: {first_line(error)}") from error
    return Checkpoint(folder, model_config(config, folder), tokenizer, stop_tokens(folder, config, tokenizer))


def model_config(config: Any, folder: Path) -> ModelConfig:
    """The part of a Transformers config that the forward pass applies; refuses the rest by name."""
    for setting, off in REFUSED_SETTINGS.items():
        if getattr(config, setting, None) not in off:
            raise EngineError(f"{folder}: {setting} = {getattr(config, setting)} is not supported")
    if config.hidden_act != "silu":
        raise EngineError(f"{folder}: hidden_act = {config.hidden_act!r} is not supported (silu is)")
    if config.num_attention_heads % config.num_key_value_heads:
        raise EngineError(f"{folder}: {config.num_attention_heads} heads do not divide over the KV heads")

    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    inv_freq, attention_scaling = rope_frequencies(config, head_dim, folder)
    biases = set(FAMILIES[config.model_type])
    biases |= set(ATTENTION_MODULES if getattr(config, "attention_bias", False) else ())
    biases |= set(MLP_MODULES if getattr(config, "mlp_bias", False) else ())

    # A window of W keys includes the query's own; window_left counts those before it.
    window = getattr(config, "sliding_window", None)
    if window is not None and config.model_type == "llama":
        raise EngineError(f"{folder}: sliding_window = {window} is not a setting of the llama architecture")
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    if unknown := set(kinds) - {"sliding_attention", "full_attention"}:
        raise EngineError(f"{folder}: layer type {unknown.pop()!r} is not supported")
    window_left = tuple(window - 1 if window and kind == "sliding_attention" else -1 for kind in kinds)

    return ModelConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        rms_norm_eps=config.rms_norm_eps,
        max_positions=config.max_position_embeddings,
        tied_embeddings=bool(config.tie_word_embeddings),
        biases=frozenset(biases),
        window_left=window_left,
        inv_freq=inv_freq,
        rope_attention_scaling=attention_scaling,
    )


def rope_frequencies(config: Any, head_dim: int, folder: Path) -> tuple[Tensor, float]:
    """Inverse frequencies [head_dim / 2] and the factor on cos and sin, by the formulas of Transformers itself."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = config.rope_parameters
    rope_type = parameters.get("rope_type", "default")
    if rope_type not in ROPE_TYPES:
        raise EngineError(f"{folder}: rope type {rope_type!r} is not supported ({', '.join(ROPE_TYPES)} are)")
    if parameters.get("partial_rotary_factor", 1) != 1:
        raise EngineError(f"{folder}: partial_rotary_factor = {parameters['partial_rotary_factor']} is not supported")
    if rope_type != "default":
        inv_freq, attention_scaling = ROPE_INIT_FUNCTIONS[rope_type](config, torch.device("cpu"))
        return inv_freq, float(attention_scaling)
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float) / head_dim
    return 1.0 / (parameters["rope_theta"] ** exponent), 1.0


def stop_tokens(folder: Path, config: Any, tokenizer: Any) -> frozenset[int]:
    """End-of-text tokens, from generation_config.json, else the config, else the tokenizer.

    The tokenizer comes last because the one that is rebuilt from a GGUF file may name the wrong special token.
    """
    path = folder / "generation_config.json"
    for eos in (
        read_json(path).get("eos_token_id") if path.exists() else None,
        config.eos_token_id,
        tokenizer.eos_token_id,
    ):
        if eos is not None:
            return frozenset(eos if isinstance(eos, list) else [eos])
    return frozenset()


class Weights:
    """The tensors of a folder, each to be taken once."""

    def __init__(self, folder: Path):
        self.folder = folder
        index = folder / "model.safetensors.index.json"
        names = sorted(set(read_json(index)["weight_map"].values())) if index.exists() else ["model.safetensors"]
        self.where: dict[str, Any] = {}  # tensor -> the open file that holds it
        for name in names:
            if not (folder / name).is_file():
                raise EngineError(f"{folder / name}: no such file (weights are read from safetensors only)")
            try:
                file: Any = safe_open(folder / name, framework="pt")
            except (SafetensorError, OSError) as error:
                raise EngineError(f"{folder / name}: {first_line(error)}") from error
            self.where.update(dict.fromkeys(file.keys(), file))

    def take(self, name: str, *shape: int) -> Tensor:
        if name not in self.where:
            raise EngineError(f"{self.folder}: tensor {name} is missing")
        tensor: Tensor = self.where.pop(name).get_tensor(name)
        if tensor.shape != shape or tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            found = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
            raise EngineError(f"{self.folder}: tensor {name} is {found}, expected {list(shape)} of a floating type")
        return tensor

    def finish(self, unused: tuple[str, ...] = ()) -> None:
        """Every tensor must have been taken; older checkpoints also store the rotary frequencies, which are derived."""
        for name in sorted(self.where):
            if name not in unused and not name.endswith("rotary_emb.inv_freq"):
                raise EngineError(f"{self.folder}: tensor {name} is not part of this architecture")


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "punica_kernels"


def convert_gguf(path: Path, dtype: torch.dtype) -> Path:
    """The folder in the user's cache that holds `path`, dequantised to `dtype`; made on the first call.

    The key is the file's identity (path, size, time of modification). The folder is renamed into place when it is
    complete, so that an interrupted conversion leaves nothing behind that looks finished.
    """
    status = path.stat()
    identity = f"{path.resolve()}|{status.st_size}|{status.st_mtime_ns}|{dtype}|1"
    target = cache_folder() / f"{path.stem}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
    if target.is_dir():
        return target

    settings = dict(gguf_settings(path))
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=target.parent))
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, quantization_config=GgufConfig(dequantize=True), dtype=dtype
        )
        if model.config.model_type == "mistral":
            model.config.sliding_window = None  # the file names none, and the class has a default
        config = model.config
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        if settings.get("attention.key_length", head_dim) != head_dim:
            raise EngineError(f"{path}: attention.key_length differs from the {head_dim} dimensions that rope turns")
        model.save_pretrained(partial)
        AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(partial)
        try:
            partial.rename(target)
        except OSError:
            if not target.is_dir():  # otherwise another process has just finished the same conversion
                raise
    except EngineError:
        raise
    except Exception as error:
        raise EngineError(f"{path}: {first_line(error)}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def gguf_settings(path: Path) -> Iterator[tuple[str, Any]]:
    """The architecture's settings; refuses by name what the conversion would lose."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        architecture = reader.fields["general.architecture"].contents()
    except Exception as error:
        raise EngineError(f"{path}: not a readable GGUF file ({first_line(error)})") from error
    if architecture not in FAMILIES:
        raise EngineError(f"{path}: architecture {architecture!r} is not one of {', '.join(FAMILIES)}")
    for key, field in reader.fields.items():
        setting = key.removeprefix(f"{architecture}.")
        if setting == key:
            continue
        if setting not in GGUF_SETTINGS:
            raise EngineError(f"{path}: {key} = {field.contents()} is not supported; use the Hugging Face checkpoint")
        yield setting, field.contents()
    for tensor in reader.tensors:
        if tensor.name.startswith("rope_"):
            raise EngineError(f"{path}: tensor {tensor.name} is not supported; use the Hugging Face checkpoint")


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise EngineError(f"{path}: {error.strerror or first_line(error)}") from error
    except ValueError as error:
        raise EngineError(f"{path}: not valid JSON ({first_line(error)})") from error


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]

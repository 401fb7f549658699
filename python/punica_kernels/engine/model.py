"""The forward pass of a Llama-family model over one batch, with punica_kernels for everything but the dense products.

The residual stream is updated inside rms_norm: each half of a layer hands its output on as `delta`, and the next norm
adds it to the stream and normalises the sum in one pass over the memory.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

import punica_kernels as pk

from .adapters import Lora
from .checkpoint import ModelConfig
from .kv_cache import PageTable


@dataclass(frozen=True)
class Batch:
    """Tokens of B sequences, one after another. The page table already counts them."""

    tokens: Tensor  # int64 [rows]
    positions: Tensor  # int64 [rows]
    pages: PageTable
    lora: Lora
    qo_indptr: Tensor | None = None  # int32 [B + 1]: rows of each sequence; None: one each (decode)


@dataclass(frozen=True)
class Linear:
    weight: Tensor  # [h_out, h_in]
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


@dataclass(frozen=True)
class Layer:
    input_norm: Tensor
    qkv_proj: Linear  # q, k and v read the same input: one product, and k and v are slices that the kernels take as is
    o_proj: Linear
    post_attention_norm: Tensor
    gate_up_proj: Linear
    down_proj: Linear


class TensorSource(Protocol):
    """Where weights come from: checkpoint.Weights, for one."""

    def take(self, name: str, *shape: int) -> Tensor:
        """The tensor of this name; it must have that shape."""

    def finish(self, unused: tuple[str, ...] = ()) -> None:
        """Called when all has been taken but what is `unused`."""


class Llama:
    def __init__(
        self,
        config: ModelConfig,
        weights: TensorSource,
        dtype: torch.dtype,
        device: torch.device,
        progress: Callable[[str], None] = lambda message: None,
    ):
        self.config, self.dtype, self.device = config, dtype, device

        def take(name: str, *shape: int) -> Tensor:
            return weights.take(name, *shape).to(device, dtype)

        def linear(prefix: str, *modules: str) -> Linear:
            shapes = [config.module_shape(module) for module in modules]
            weight = [take(f"{prefix}.{m}.weight", *shape) for m, shape in zip(modules, shapes, strict=True)]
            if config.biases.isdisjoint(modules):
                return Linear(torch.cat(weight), None)
            bias = [take(f"{prefix}.{m}.bias", shape[0]) for m, shape in zip(modules, shapes, strict=True)]
            return Linear(torch.cat(weight), torch.cat(bias))

        self.layers = []
        for i in range(config.num_layers):
            progress(f"weights: layer {i + 1} of {config.num_layers}")
            prefix = f"model.layers.{i}"
            layer = Layer(
                input_norm=take(f"{prefix}.input_layernorm.weight", config.hidden_size),
                qkv_proj=linear(f"{prefix}.self_attn", "q_proj", "k_proj", "v_proj"),
                o_proj=linear(f"{prefix}.self_attn", "o_proj"),
                post_attention_norm=take(f"{prefix}.post_attention_layernorm.weight", config.hidden_size),
                gate_up_proj=linear(f"{prefix}.mlp", "gate_proj", "up_proj"),
                down_proj=linear(f"{prefix}.mlp", "down_proj"),
            )
            self.layers.append(layer)
        self.norm = take("model.norm.weight", config.hidden_size)
        self.embed_tokens = take("model.embed_tokens.weight", config.vocab_size, config.hidden_size)
        tied = config.tied_embeddings
        self.lm_head = self.embed_tokens if tied else take("lm_head.weight", config.vocab_size, config.hidden_size)
        weights.finish(unused=("lm_head.weight",) if tied else ())
        self.cos, self.sin = rope_table(config, device)

    @torch.inference_mode()
    def forward(self, batch: Batch) -> Tensor:
        """Logits [B, vocab] of each sequence's last row, float32. Keys and values of all rows go into their pages."""
        config, pages = self.config, batch.pages
        num_q, num_kv = config.num_heads, config.num_kv_heads
        q_size = num_q * config.head_dim
        cos, sin = self.cos[batch.positions, None], self.sin[batch.positions, None]
        lora = batch.lora.apply

        residual = F.embedding(batch.tokens, self.embed_tokens)
        hidden = torch.empty_like(residual)
        attended = residual.new_empty(len(residual), num_q, config.head_dim)
        delta = torch.zeros_like(residual)  # nothing to add before the first layer
        for i, layer in enumerate(self.layers):
            pk.rms_norm(hidden, delta, layer.input_norm, config.rms_norm_eps, residual=residual)
            qkv = layer.qkv_proj(hidden)
            lora("qkv_proj", i, hidden, qkv)
            heads = qkv.view(len(qkv), -1, config.head_dim)
            q, k, v = heads[:, :num_q], heads[:, num_q : num_q + num_kv], heads[:, num_q + num_kv :]
            # Rotated here and not in the kernels: the cache then holds keys for every kind of rope scaling.
            rotate(heads[:, : num_q + num_kv], cos, sin)
            table = (pages.kv_ptrs, pages.kv_indptr, pages.last_page_offset)
            sizes = (config.num_layers, i, num_kv, pages.page_size)
            window = config.window_left[i]
            if batch.qo_indptr is None:
                pk.append_kv(*table, k, v, *sizes)
                pk.batch_decode(attended, q, *table, None, *sizes, window_left=window)
            else:
                pk.init_kv(*table, k, v, batch.qo_indptr, *sizes)
                pk.batch_prefill(attended, q, batch.qo_indptr, *table, None, *sizes, window_left=window)
            flat = attended.view(len(attended), q_size)
            delta = layer.o_proj(flat)
            lora("o_proj", i, flat, delta)

            pk.rms_norm(hidden, delta, layer.post_attention_norm, config.rms_norm_eps, residual=residual)
            gate_up = layer.gate_up_proj(hidden)
            lora("gate_up_proj", i, hidden, gate_up)
            gate, up = gate_up[:, : config.intermediate_size], gate_up[:, config.intermediate_size :]
            activated = F.silu(gate).mul_(up)
            delta = layer.down_proj(activated)
            lora("down_proj", i, activated, delta)
        if batch.qo_indptr is not None:
            last = batch.qo_indptr[1:].long() - 1
            residual, delta = residual[last], delta[last]
        hidden = torch.empty_like(residual)
        pk.rms_norm(hidden, delta, self.norm, config.rms_norm_eps, residual=residual)
        return F.linear(hidden, self.lm_head).float()


def rope_table(config: ModelConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin of every position, [max_positions, head_dim / 2] float32."""
    angle = torch.arange(config.max_positions, dtype=torch.float)[:, None] * config.inv_freq
    return (
        (angle.cos() * config.rope_attention_scaling).to(device),
        (angle.sin() * config.rope_attention_scaling).to(device),
    )


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotate x [rows, heads, D] in place, element d with d + D/2, in float32 with one rounding at the end."""
    half = x.shape[-1] // 2
    first, second = x[..., :half].float(), x[..., half:].float()
    turned = first * cos - second * sin, second * cos + first * sin  # both before the first write: float() may alias x
    x[..., :half], x[..., half:] = turned

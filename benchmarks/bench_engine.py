"""Serves a model of Llama-3-8B's shape, with random weights and random adapters, on a CUDA device.

    python benchmarks/bench_engine.py [--batch N] [--adapters N] [--rank R] [--prompt-tokens N] [--max-tokens N]

Prints tokens per second of prefill and of decode: without adapters, with one adapter for each request in turn; under
CUDA graphs and without them; and checks that both generate the same tokens. Writes
engine_cuda.json into benchmarks/results. The weights are random, so the texts mean nothing; the work is that of the
real model.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import punica_kernels as pk
import results_form
import torch
from punica_kernels.engine import Engine, SamplingParams
from punica_kernels.engine.adapters import Adapters
from punica_kernels.engine.checkpoint import MODULES, ModelConfig
from punica_kernels.engine.graph import DecodeGraphs
from punica_kernels.engine.kv_cache import KvCache
from punica_kernels.engine.model import Llama
from torch import Tensor

LLAMA3_8B = ModelConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    rms_norm_eps=1e-5,
    max_positions=8192,
    tied_embeddings=False,
    biases=frozenset(),
    window_left=(-1,) * 32,
    inv_freq=500000.0 ** (-torch.arange(0, 128, 2) / 128),
    rope_attention_scaling=1.0,
)
DTYPE = torch.bfloat16


class RandomWeights:
    """In the place of a checkpoint: each matrix keeps the scale of what it multiplies."""

    def take(self, name: str, *shape: int) -> Tensor:
        if len(shape) == 1:
            return torch.ones(shape, dtype=DTYPE, device="cuda")
        return torch.empty(shape, dtype=DTYPE, device="cuda").normal_(std=shape[1] ** -0.5)

    def finish(self, unused: tuple[str, ...] = ()) -> None:
        pass


class NoText:
    """In the place of a tokenizer."""

    def decode(self, tokens: list[int], **_: Any) -> str:
        return ""


def random_adapter(config: ModelConfig, rank: int) -> dict[str, pk.LoraWeights]:
    weights = {}
    for module in MODULES:
        h_out, h_in = config.module_shape(module)
        a = torch.empty(config.num_layers, rank, h_in, dtype=DTYPE, device="cuda").normal_(std=h_in**-0.5)
        b = torch.empty(config.num_layers, h_out, rank, dtype=DTYPE, device="cuda").normal_(std=0.3 * rank**-0.5)
        weights[module] = pk.LoraWeights(a, b, 1.0)
    return weights


def serve(engine: Engine, prompts: list[list[int]], names: list[str | None], max_tokens: int) -> list[list[int]]:
    requests = [
        engine.add(prompt, name, SamplingParams(max_tokens=max_tokens))
        for prompt, name in zip(prompts, names, strict=True)
    ]
    for _ in engine.run():
        pass
    return [request.tokens for request in requests]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--adapters", type=int, default=16)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()

    torch.manual_seed(0)
    device = torch.device("cuda")
    model = Llama(LLAMA3_8B, RandomWeights(), DTYPE, device)
    adapters = Adapters(LLAMA3_8B, DTYPE, device, args.adapters)
    for i in range(args.adapters):
        adapters.load_weights(f"random{i}", random_adapter(LLAMA3_8B, args.rank))
    pages = args.batch * -(-(args.prompt_tokens + args.max_tokens) // 16)
    cache = KvCache(LLAMA3_8B, pages, 16, DTYPE, device)
    prompts = torch.randint(LLAMA3_8B.vocab_size, (args.batch, args.prompt_tokens)).tolist()
    some: list[str | None] = [adapters.names[i % args.adapters] for i in range(args.batch)]

    rows = []
    tokens: dict[str, list[list[int]]] = {}
    for graphs in (True, False):
        for label, names in (("no adapters", [None] * args.batch), (f"{args.adapters} adapters", some)):
            work = f"{label}, {'CUDA graphs' if graphs else 'single launches'}"
            warm: DecodeGraphs | None = None
            for attempt in range(2):  # the first one captures, and initialises libraries
                engine = Engine(model, adapters, cache, NoText(), frozenset(), cuda_graphs=graphs)
                if attempt == 1:
                    engine.graphs = warm
                tokens[work] = serve(engine, prompts, names, args.max_tokens)
                warm = engine.graphs
            s = engine.statistics
            rows.append(
                {
                    "work": work,
                    "unit": "ms a decode step",
                    "ours": 1e3 * s.decode_seconds / s.decode_steps,
                    "floor": None,
                    "goal": None,
                    "rivals": {},
                    "decode_tokens_per_second": args.batch * s.decode_steps / s.decode_seconds,
                    "prefill_tokens_per_second": s.prompt_tokens / s.prefill_seconds,
                }
            )
            print({key: value for key, value in rows[-1].items() if value not in (None, {})}, flush=True)
    batched = tokens[f"{args.adapters} adapters, CUDA graphs"]
    unchanged = batched == tokens[f"{args.adapters} adapters, single launches"]
    changed_by_adapters = sum(a != b for a, b in zip(batched, tokens["no adapters, CUDA graphs"], strict=True))
    print(f"graphs and single launches generate the same tokens: {unchanged}")
    print(f"requests whose tokens an adapter changed: {changed_by_adapters} of {args.batch}")
    result = {
        **results_form.head(
            " ".join(["python", "benchmarks/bench_engine.py", *sys.argv[1:]]),
            torch.cuda.get_device_name(),
            {"torch": torch.__version__},
        ),
        "settings": {key: value for key, value in vars(args).items() if key != "output"},
        "graphs_equal_single_launches": unchanged,
        "changed_by_adapters": changed_by_adapters,
        "rows": rows,
    }
    results_form.write(args.output / "engine_cuda.json", result)
    return 0 if unchanged else 1


if __name__ == "__main__":
    sys.exit(main())

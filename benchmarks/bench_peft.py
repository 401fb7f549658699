"""Transformers' `generate` with a mixed batch of LoRA adapters: PEFT alone, and with `punica_kernels.peft.accelerate`.

    python benchmarks/bench_peft.py [--device cuda] [--shape llama-1b] [--batch 16] [--adapters 8] [--rounds 5]

Random weights of a known shape, one adapter a sample in turn, LoRA on all linear layers. Three models share the
weights: the base model without PEFT, the PeftModel, and an accelerated copy of it. In every round each generates, in
turns; a step's time is the median of the steps of a round, a figure the median of the rounds. LoRA's overhead is the
time of a model with adapters less that of the base model in the same round. All of it twice: with adapters of the base
model's type, and in float32, as PEFT loads them on a bfloat16 base.

On a machine that others use too, --threads 1 --processor-time counts the process's own time of the processor.

Before anything is timed the logits of both ways are compared. Writes peft_<device>.json and peft_<device>.md.
"""

import argparse
import copy
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import punica_kernels as pk
import punica_kernels.peft
import results_form
import torch
import transformers
from harness import device_name

SHAPES: dict[str, dict[str, Any]] = {
    "llama-1b": {
        "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True,
    },
    "smollm2-135m": {
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
    },
    "tiny": {
        "vocab_size": 300, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3,
        "num_attention_heads": 6, "num_key_value_heads": 2,
    },
}  # fmt: skip
GOAL = 3  # times less overhead than PEFT's


def base_model(shape: str, dtype: torch.dtype, device: str) -> Any:
    config = transformers.AutoConfig.for_model(
        "llama", **SHAPES[shape], max_position_embeddings=2048, bos_token_id=None, eos_token_id=None
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval()


def sharing(model: Any) -> Any:
    """A copy of the modules over the same parameters."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def with_adapters(model: Any, count: int, rank: int, float32: bool) -> Any:
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", init_lora_weights=False)
    with torch.device(model.device):
        wrapped = peft.get_peft_model(model, config, "adapter0", autocast_adapter_dtype=float32)
        for i in range(1, count):
            wrapped.add_adapter(f"adapter{i}", config, autocast_adapter_dtype=float32)
    wrapped.requires_grad_(False)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.mul_(0.3)
    return wrapped.eval()


class Stopwatch:
    """Seconds of the prefill, and of every step after it, of one `generate`."""

    def __init__(self, device: str, processor_time: bool):
        self.synchronize: Callable[[], Any] = torch.cuda.synchronize if device == "cuda" else lambda: None
        self.now = time.process_time if processor_time else time.perf_counter
        self.stamps: list[float] = []

    def stamp(self, *_: Any) -> None:
        self.synchronize()
        self.stamps.append(self.now())

    def __call__(self, model: Any, **arguments: Any) -> tuple[float, float]:
        self.stamps = []
        inner = model.get_base_model() if isinstance(model, peft.PeftModel) else model
        handle = inner.register_forward_pre_hook(self.stamp)
        self.stamp()
        model.generate(**arguments)
        handle.remove()
        # What comes before the first forward, PEFT's preparation for one, belongs to the prefill.
        steps = [later - earlier for earlier, later in zip(self.stamps[2:], self.stamps[3:], strict=False)]
        return self.stamps[2] - self.stamps[0], statistics.median(steps)


def compare(peft_model: Any, ours: Any, ids: torch.Tensor, names: list[str]) -> dict[str, float]:
    """The largest difference of the logits, of the largest; the share of positions with the same best token."""
    theirs = peft_model(ids, adapter_names=names).logits.float()
    mine = ours(ids, adapter_names=names).logits.float()
    base = ours(ids, adapter_names=["__base__"] * len(names)).logits.float()
    scale = theirs.abs().max()
    difference = float((mine - theirs).abs().max() / scale)
    effect = float((base - theirs).abs().max() / scale)
    if not difference < 0.05 < effect:
        raise AssertionError(f"logits: {difference:.3g} apart where the adapters change {effect:.3g}")
    same = float((mine.argmax(-1) == theirs.argmax(-1)).float().mean())
    return {"logits_difference": difference, "adapters_change": effect, "same_best_token": same}


def progress(what: str, start: float = time.perf_counter()) -> None:
    print(f"{time.perf_counter() - start:6.1f} s  {what}", file=sys.stderr, flush=True)


def measure(args: argparse.Namespace, float32: bool) -> tuple[list[dict[str, Any]], dict[str, float]]:
    base = base_model(args.shape, args.dtype, args.device)
    progress("base model")
    theirs = with_adapters(sharing(base), args.adapters, args.rank, float32)
    ours = pk.peft.accelerate(sharing(theirs))
    progress("adapters")
    names = [f"adapter{i % args.adapters}" for i in range(args.batch)]
    ids = torch.randint(1, SHAPES[args.shape]["vocab_size"], (args.batch, args.prompt_tokens), device=args.device)
    agreement = compare(theirs, ours, ids, names)
    progress("logits compared")

    arguments = {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": args.new_tokens,
        "min_new_tokens": args.new_tokens, "do_sample": False, "pad_token_id": 0,
    }  # fmt: skip
    mixed = arguments | {"adapter_names": names}
    variants: dict[str, tuple[Any, dict[str, Any]]] = {
        "base": (base, arguments), "ours": (ours, mixed), "PEFT": (theirs, mixed), "again": (ours, mixed)
    }  # fmt: skip
    watch = Stopwatch(args.device, args.processor_time)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
    for name in ("base", "ours", "PEFT"):
        watch(variants[name][0], **variants[name][1] | {"max_new_tokens": 4, "min_new_tokens": 4})
    for attempt in range(args.rounds):
        for name in list(variants) if attempt % 2 == 0 else reversed(variants):
            model, more = variants[name]
            seconds[name].append(watch(model, **more))
        progress(f"round {attempt + 1}")

    what = f"{args.adapters} adapters of rank {args.rank}, {'float32' if float32 else str(args.dtype)[6:]}"
    rows = []
    for part, label in ((1, "decode step"), (0, f"prefill of {args.prompt_tokens} tokens each")):
        times = {name: 1e3 * statistics.median(pair[part] for pair in seconds[name]) for name in variants}
        over = {}
        for name in ("ours", "PEFT", "again"):
            rounds = zip(seconds[name], seconds["base"], strict=True)
            over[name] = 1e3 * statistics.median(pair[part] - base_pair[part] for pair, base_pair in rounds)
        rows.append(
            {
                "work": f"{label}, {args.batch} samples, {what}",
                "unit": "ms",
                "ours": times["ours"],
                "again": times["again"],
                "floor": times["base"],  # the base model without LoRA
                "goal": times["base"] + over["PEFT"] / GOAL,
                "rivals": {"PEFT": times["PEFT"]},
                "overhead": over,
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows, agreement


def markdown(result: dict[str, Any]) -> str:
    settings = result["settings"]
    of_what = f" of processor time, {settings['threads']} thread" if settings["processor_time"] == "True" else ""
    lines = [
        "# Mixed batches of PEFT\n",
        f"`{result['command']}`, {result['device']}, {result['date']}; "
        + ", ".join(f"{name} {version}" for name, version in result["versions"].items())
        + f". A Llama of shape {settings['shape']} with random weights, {settings['dtype']}, LoRA on all linear layers"
        f"; Transformers' `generate`. Milliseconds{of_what}; overhead is over the base model without PEFT.\n",
        "| | base model | PEFT | accelerated | PEFT's overhead | ours | times less |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in result["rows"]:
        over = row["overhead"]
        less = f"{over['PEFT'] / over['ours']:.1f}" if over["ours"] > 0 else "–"
        lines.append(
            f"| {row['work']} | {row['floor']:.1f} | {row['rivals']['PEFT']:.1f} | {row['ours']:.1f} "
            f"| {over['PEFT']:.1f} | **{over['ours']:.1f}** (again: {over['again']:.1f}) | {less} |"
        )
    lines.append("\nBefore the timing, logits of the prefill, accelerated against PEFT:\n")
    for adapters, found in result["agreement"].items():
        lines.append(
            f"- adapters in {adapters}: {found['logits_difference']:.2g} of the largest logit apart at most (the "
            f"adapters change it by {found['adapters_change']:.2g}), the same best token at "
            f"{100 * found['same_best_token']:.2f}% of the positions"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", choices=list(SHAPES), help="default: llama-1b on CUDA, smollm2-135m on the CPU")
    parser.add_argument("--dtype", type=lambda name: getattr(torch, name), default=torch.bfloat16)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=17)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="of torch, on the CPU")
    parser.add_argument("--processor-time", action="store_true", help="the process's own, for a machine that is shared")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    args.shape = args.shape or {"cuda": "llama-1b", "cpu": "smollm2-135m"}[args.device]
    if args.threads:
        torch.set_num_threads(args.threads)
    args.threads = torch.get_num_threads()
    transformers.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", module="peft")

    rows, agreement = [], {}
    with torch.no_grad():
        for float32 in (False, True):
            more, found = measure(args, float32)
            rows += more
            agreement["float32" if float32 else str(args.dtype)[6:]] = found
            print(found, flush=True)
    result = {
        **results_form.head(
            " ".join(["python benchmarks/bench_peft.py", *results_form.given(sys.argv[1:])]),
            torch.cuda.get_device_name() if args.device == "cuda" else device_name(),
            {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__},
        ),
        "settings": {key: str(value) for key, value in vars(args).items() if key != "output"},
        "agreement": agreement,
        "rows": rows,
    }
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / f"peft_{args.device}.md").write_text(markdown(result))
    results_form.write(args.output / f"peft_{args.device}.json", result)
    return 0


if __name__ == "__main__":
    sys.exit(main())

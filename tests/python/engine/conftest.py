"""Tiny random checkpoints and adapters, written by Transformers and PEFT, and a way to look at the engine's logits."""

import pytest
import torch
from punica_kernels.engine import Engine, SamplingParams

SIZES = {
    "vocab_size": 300,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.15,  # large enough for attention to be far from uniform
    "bos_token_id": None,
    "eos_token_id": 299,
}


def tiny_tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: i for i, symbol in enumerate(alphabet)} | {"<end>": 299}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


@pytest.fixture(scope="session")
def make_model(tmp_path_factory):
    """make_model(model_type, **config) -> folder. The same arguments give the same folder."""
    folders = {}

    def make(model_type="llama", max_shard_size="5GB", **changes):
        key = repr((model_type, max_shard_size, sorted(changes.items())))
        if key not in folders:
            from transformers import AutoConfig, AutoModelForCausalLM

            torch.manual_seed(len(folders))
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **SIZES | changes))
            for name, parameter in model.named_parameters():
                if name.endswith(("bias", "norm.weight")):  # which Transformers starts at 0 and 1
                    parameter.data += torch.randn_like(parameter) * 0.2
            folders[key] = tmp_path_factory.mktemp(model_type)
            model.save_pretrained(folders[key], max_shard_size=max_shard_size)
            tiny_tokenizer().save_pretrained(folders[key])
        return folders[key]

    return make


@pytest.fixture(scope="session")
def make_adapter(tmp_path_factory):
    """make_adapter(model folder, **LoraConfig) -> folder of a PEFT adapter with random weights."""

    def make(folder, seed=0, **settings):
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        torch.manual_seed(seed)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LoraConfig(**settings))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(0, 0.1)
        target = tmp_path_factory.mktemp("adapter")
        model.save_pretrained(target)
        return target

    return make


@pytest.fixture(scope="session")
def fresh():
    """fresh(engine, **options) -> an engine over the same model, adapters and pool, with no requests yet."""

    def make(engine, **options):
        return Engine(
            engine.model, engine.adapters, engine.cache, engine.tokenizer, stop_tokens=engine.stop_tokens, **options
        )

    return make


@pytest.fixture(scope="session")
def teacher_forced():
    """teacher_forced(engine, [(prompt, adapter, continuation)]) -> logits of every step, [steps, vocab] for each.

    The engine runs as always, all requests in one batch; only its choice of tokens is replaced by the given ones.
    """

    def run(engine, cases):
        params = [SamplingParams(max_tokens=len(continuation)) for _, _, continuation in cases]
        requests = [engine.add(list(case[0]), case[1], p) for case, p in zip(cases, params, strict=True)]
        forced = {request.index: list(case[2]) for request, case in zip(requests, cases, strict=True)}
        logits = {request.index: [] for request in requests}

        def choose(batch, rows):
            for request, row in zip(batch, rows, strict=True):
                logits[request.index].append(row.clone())
            return [forced[request.index][len(request.tokens)] for request in batch]

        engine.choose, engine.stop_tokens = choose, frozenset()
        for _ in engine.run():
            pass
        return [torch.stack(logits[request.index]) for request in requests]

    return run


@pytest.fixture(scope="session")
def greedy():
    """greedy(engine, [(prompt, adapter)], max_tokens) -> (tokens, gap between the two best logits at every step)."""

    def run(engine, cases, max_tokens=12):
        engine.stop_tokens = frozenset()
        gaps = {}
        choose = type(engine).choose

        def record(batch, rows):
            best = rows.topk(2, dim=1).values
            for request, (first, second) in zip(batch, best.tolist(), strict=True):
                gaps.setdefault(request.index, []).append((first - second, abs(first)))
            return choose(engine, batch, rows)

        engine.choose = record
        requests = [engine.add(list(p), adapter, SamplingParams(max_tokens=max_tokens)) for p, adapter in cases]
        for _ in engine.run():
            pass
        return [(request.tokens, gaps[request.index]) for request in requests]

    return run

"""vLLM itself, serving: with our wrapper, against its own, and against PEFT."""

import os
import re

import pytest
from conftest import first_difference

NEW = 24


def assert_ours(log, layers):
    assert re.search(r"punica_kernels [\d.]+: LoRA on its kernels \(CPU, \w+\)", log)
    assert "Using PunicaKernelsWrapperCPU" in log
    assert f"the LoRA of {layers} layers is computed by punica_kernels" in log
    assert "stays with vLLM" not in log


@pytest.fixture(scope="module")
def ours(smollm2, adapters, demo, run_engine):
    """Three slots for four adapters: they leave and come back while the eight requests run. Then more of that."""
    haiku = [[tokens, "haiku"] for tokens, name in demo if name == "haiku"]
    pirate = [[tokens, "pirate"] for tokens, name in demo if name == "pirate"]
    steps = [
        {"generate": demo, "max_tokens": NEW},
        {"remove": "haiku"},
        {"generate": pirate, "max_tokens": NEW},
        {"add": "haiku", "id": 1, "path": adapters["haiku"]},
        {"generate": haiku + pirate, "max_tokens": NEW},
        # The same adapter for vLLM, in the same slot, with other weights of a smaller rank, and back.
        {"add": "haiku", "id": 1, "path": adapters["pirate"], "inplace": True},
        {"generate": [[pirate[0][0], "haiku"]], "max_tokens": NEW},
        {"add": "haiku", "id": 1, "path": adapters["haiku"], "inplace": True},
        {"generate": haiku, "max_tokens": NEW},
    ]
    return run_engine(smollm2, adapters, steps, max_loras=3, max_cpu_loras=4, dtype="bfloat16")


def test_same_texts_as_vllms_own_wrapper(smollm2, adapters, demo, run_engine, ours, tokenizer):
    results, log = ours
    # vLLM's own wrapper gives rows of no adapter that of the last slot (index -1): so one slot more, which stays empty.
    theirs, their_log = run_engine(
        smollm2, adapters, [{"generate": demo, "max_tokens": NEW}], {"PUNICA_VLLM": "0"}, max_loras=5, dtype="bfloat16"
    )
    assert_ours(log, layers=122)
    assert "PUNICA_VLLM=0, LoRA stays with vLLM's own kernels" in their_log
    assert "Using PunicaWrapperCPU" in their_log
    for (_, name), a, b in zip(demo, results[0], theirs[0], strict=True):
        print(f"{name}: {tokenizer.decode(a['tokens'])!r}")
        difference = first_difference(a, b)
        assert difference is None, (
            f"{name}: {tokenizer.decode(a['tokens'])!r}, {tokenizer.decode(b['tokens'])!r}: {difference}"
        )
    # And the adapters do what they were trained for.
    texts = [tokenizer.decode(result["tokens"]) for result in results[0]]
    for (_, name), text in zip(demo, texts, strict=True):
        start = {"pirate": "Arr", "sql": "SELECT ", "json": '{"answer": ', "haiku": "The light", None: "A volcano is"}
        assert text.startswith(start[name]), (name, text)


def test_adapters_come_and_go(demo, ours, tokenizer):
    results, _ = ours
    first = {name: result for (_, name), result in reversed(list(zip(demo, results[0], strict=True)))}

    def same(result, expected):
        difference = first_difference(result, expected)
        assert difference is None, f"{tokenizer.decode(result['tokens'])!r}: {difference}"

    pirates = [result for (_, name), result in zip(demo, results[0], strict=True) if name == "pirate"]
    for result, expected in zip(results[1], pirates, strict=True):
        same(result, expected)
    for result, expected in zip(results[2], [first["haiku"], *pirates], strict=True):
        same(result, expected)
    same(results[3][0], pirates[0])
    same(results[4][0], first["haiku"])


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="a core for each worker")
@pytest.mark.parametrize("fully_sharded", [False, True])
def test_tensor_parallel(fully_sharded, random_llama, random_work, run_engine):
    folder, adapters = random_llama
    work, expected = random_work
    results, log = run_engine(
        folder, adapters, [{"generate": work, "max_tokens": 12}], {"VLLM_CPU_OMP_THREADS_BIND": "0|1"},
        max_loras=4, max_lora_rank=16, tensor_parallel_size=2, fully_sharded_loras=fully_sharded, dtype="float32",
        skip_tokenizer_init=True,
    )  # fmt: skip
    assert_ours(log, layers=14)
    assert log.count("LoRA on its kernels") == 2  # in each of the workers
    assert [result["tokens"] for result in results[0]] == expected

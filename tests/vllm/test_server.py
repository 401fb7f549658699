"""The OpenAI-compatible server with the real client: four adapters stream at once, one comes and goes meanwhile."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from conftest import EXAMPLES, environment

PROMPTS = json.loads((EXAMPLES / "demo_prompts.json").read_text())


@contextlib.contextmanager
def serving(model, adapters, log):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, str(Path(__file__).with_name("serve_script.py")), "serve", str(model),
        "--served-model-name", "smollm2",
        "--host", "127.0.0.1", "--port", str(port), "--enable-lora", "--max-loras", "5", "--max-cpu-loras", "5",
        "--max-lora-rank", "32", "--enforce-eager", "--max-model-len", "256", "--max-num-seqs", "8",
        "--max-num-batched-tokens", "256", "--lora-modules", *(f"{name}={path}" for name, path in adapters.items()),
    ]  # fmt: skip
    with log.open("w") as out:
        server = subprocess.Popen(
            command, env=environment(VLLM_ALLOW_RUNTIME_LORA_UPDATING="1"), stdout=out, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
    try:
        url = f"http://127.0.0.1:{port}"
        for _ in range(600):
            assert server.poll() is None, log.read_text()[-6000:]
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                urllib.request.urlopen(f"{url}/health", timeout=5)
                break
            time.sleep(1)
        yield url
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)


async def stream(client, model, prompt):
    """The text, and the time at which each piece of it came."""
    pieces, times = [], []
    chunks = await client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": prompt}], temperature=0, max_tokens=24, stream=True
    )
    async for chunk in chunks:
        if chunk.choices and chunk.choices[0].delta.content:
            pieces.append(chunk.choices[0].delta.content)
            times.append(time.monotonic())
    return "".join(pieces), times


def post(url, **content):
    request = urllib.request.Request(url, json.dumps(content).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        return answer.status


async def talk(url, adapters):
    from openai import AsyncOpenAI, NotFoundError

    client = AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=600)
    assert {"smollm2", *adapters} <= {model.id async for model in client.models.list()}
    chosen = {item["adapter"] or "smollm2": item["prompt"] for item in reversed(PROMPTS)}
    assert set(chosen) == {"smollm2", *adapters}
    streams = {name: asyncio.create_task(stream(client, name, prompt)) for name, prompt in chosen.items()}
    # A fifth adapter is loaded while they stream, answers, and is unloaded.
    load = asyncio.to_thread(post, f"{url}/v1/load_lora_adapter", lora_name="sailor", lora_path=adapters["pirate"])
    assert await load == 200
    sailor = await stream(client, "sailor", chosen["pirate"])
    answers = {name: await task for name, task in streams.items()}
    assert await asyncio.to_thread(post, f"{url}/v1/unload_lora_adapter", lora_name="sailor") == 200
    with pytest.raises(NotFoundError):
        await stream(client, "sailor", chosen["pirate"])
    return answers, sailor


def test_the_real_client_streams_from_four_adapters_at_once(smollm2, adapters, tmp_path):
    log = tmp_path / "server.log"
    with serving(smollm2, adapters, log) as url:
        answers, (sailor, _) = asyncio.run(talk(url, adapters))
    assert "Using PunicaKernelsWrapperCPU" in log.read_text()
    for name, (text, _) in answers.items():
        print(f"{name}: {text!r}")
    start = {"pirate": "Arr", "sql": "SELECT ", "json": '{"answer": ', "haiku": "The light", "smollm2": "A volcano is"}
    for name, (text, times) in answers.items():
        assert text.startswith(start[name]), (name, text)
        assert len(times) > 3  # in pieces
    assert sailor[:40] == answers["pirate"][0][:40]
    # All at once: every stream began before the first one ended.
    assert max(times[0] for _, times in answers.values()) < min(times[-1] for _, times in answers.values())

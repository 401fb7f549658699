"""Runs one vLLM engine in a process of its own: `python engine_script.py JOB RESULT`, two JSON files.

The job: `settings` for vllm.LLM, and `steps`, done one after another in the same engine:
    {"generate": [[token ids, adapter or null], ...], "max_tokens": n}    one batch, greedy
    {"add": name, "id": n, "path": folder, "inplace": bool}               loads an adapter now
    {"remove": name}
An adapter of a request is a name that the job's `adapters` has a folder for; vLLM loads it when it is first asked for.
The result has for each generate step, and each request of it, the tokens and the log probabilities of the best few.
"""

import json
import sys
from pathlib import Path


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    llm = LLM(**job["settings"])
    requests = {name: LoRARequest(name, number, path) for number, (name, path) in enumerate(job["adapters"].items(), 1)}
    results = []
    for step in job["steps"]:
        if "add" in step:
            request = LoRARequest(step["add"], step["id"], step["path"], load_inplace=step.get("inplace", False))
            assert llm.llm_engine.add_lora(request)
            requests[step["add"]] = LoRARequest(step["add"], step["id"], step["path"])
        elif "remove" in step:
            assert llm.llm_engine.remove_lora(requests[step["remove"]].lora_int_id)
        else:
            outputs = llm.generate(
                [{"prompt_token_ids": tokens} for tokens, _ in step["generate"]],
                SamplingParams(temperature=0, max_tokens=step["max_tokens"], logprobs=3, detokenize=False),
                lora_request=[None if name is None else requests[name] for _, name in step["generate"]],
                use_tqdm=False,
            )
            results.append([
                {
                    "tokens": list(output.outputs[0].token_ids),
                    "best": [
                        {token: entry.logprob for token, entry in entries.items()}
                        for entries in output.outputs[0].logprobs
                    ],
                }
                for output in outputs
            ])  # fmt: skip
    Path(sys.argv[2]).write_text(json.dumps({"results": results}))


if __name__ == "__main__":
    main()

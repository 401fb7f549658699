"""Runs the CUDA test programs' small sizes under compute-sanitizer, on both code paths, in parts beside each other.

    python tests/cpp/cuda/sanitize.py DIRECTORY_OF_THE_PROGRAMS [--programs bgmv sgmv] [--tools racecheck] [--jobs 6]

A line for each program, path and tool says how many of its parts ended without a finding, which had one, and which did
not end in time: those were not checked. Exits with 1 unless all parts of all ended without a finding.
"""

import argparse
import collections
import concurrent.futures
import os
import pathlib
import shutil
import subprocess
import sys
import time

PROGRAMS = ("norm", "attention", "bgmv", "sgmv")
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
PARTS = {"norm": 1, "attention": 12, "bgmv": 8, "sgmv": 8}


def find_sanitizer():
    found = shutil.which("compute-sanitizer")
    if found is None and (home := os.environ.get("CUDA_HOME", "/usr/local/cuda")):
        found = shutil.which("compute-sanitizer", path=f"{home}/bin")
    if found is None:
        sys.exit("compute-sanitizer is neither on PATH nor in CUDA_HOME/bin")
    return found


def run(job, sanitizer, directory, seconds):
    program, arch, tool, part, parts = job
    environment = {**os.environ, "PUNICA_CUDA_ARCH": arch, "PUNICA_TEST_PART": f"{part}/{parts}"}
    command = [
        sanitizer,
        "--tool",
        tool,
        "--error-exitcode",
        "9",
        str(directory / f"punica_cuda_{program}_test"),
        "quick",
    ]
    began = time.monotonic()
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return job, "timeout", seconds, ""
    text = done.stdout + done.stderr
    # What no device ran has not been checked; what the tool did not summarise neither.
    clean = done.returncode == 0 and "SUMMARY" in text
    return job, "clean" if clean else "finding", time.monotonic() - began, text


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=pathlib.Path)
    parser.add_argument("--programs", nargs="+", choices=PROGRAMS, default=PROGRAMS)
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=TOOLS)
    parser.add_argument("--archs", nargs="+", default=("sm_90", "sm_80"))
    parser.add_argument("--jobs", type=int, default=6, help="programs at once")
    parser.add_argument("--seconds", type=float, default=120, help="time limit of a part")
    parser.add_argument("--split", type=int, default=1, help="this many times as many parts")
    parser.add_argument("--first", type=int, help="of each only this many parts")
    arguments = parser.parse_args()
    sanitizer = find_sanitizer()
    jobs = [
        (program, arch, tool, part, PARTS[program] * arguments.split)
        for program in arguments.programs
        for tool in arguments.tools
        for arch in arguments.archs
        for part in range(min(arguments.first or 10**9, PARTS[program] * arguments.split))
    ]
    results = collections.defaultdict(lambda: collections.defaultdict(list))
    with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
        for job, verdict, seconds, text in pool.map(
            lambda job: run(job, sanitizer, arguments.directory, arguments.seconds), jobs
        ):
            program, arch, tool, part, parts = job
            results[program, arch, tool, parts][verdict].append((part, seconds))
            if verdict == "finding":
                print(f"{program} {arch} {tool} part {part}/{parts}:\n{text[:3000]}\n...{text[-500:]}", flush=True)
    for (program, arch, tool, parts), verdicts in results.items():
        longest = max(seconds for done in verdicts.values() for _, seconds in done)
        bad = "".join(
            f", {verdict} in parts {[p for p, _ in verdicts[verdict]]}"
            for verdict in ("finding", "timeout")
            if verdicts[verdict]
        )
        print(f"{program} {arch} {tool}: {len(verdicts['clean'])} of {parts} parts clean{bad}; longest {longest:.0f} s")
    everything = all(len(verdicts["clean"]) == key[3] for key, verdicts in results.items())
    sys.exit(0 if everything else 1)


if __name__ == "__main__":
    main()

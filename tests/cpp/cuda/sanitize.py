"""Runs the CUDA test programs' small suites under compute-sanitizer, on both code paths, in parts beside each other.

    python tests/cpp/cuda/sanitize.py DIRECTORY_OF_THE_PROGRAMS [--programs bgmv sgmv] [--tools racecheck] [--jobs 16]

The small suites launch every kernel that the whole suites launch, with few and small shapes: about 90 seconds for all
on 16 cores and an H200. Prints what was found, how many kernels ran, and a table that says for each program, path and
tool how many parts ended without a finding, which had one, and which did not end in time: those were not checked.
Exits with 1 unless all parts of all ended without a finding.
"""

import argparse
import collections
import concurrent.futures
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

TOOLS = ("racecheck", "initcheck", "memcheck", "synccheck")
# Parts of about 30 seconds, of which some 5 are the start; the tools that take longest first.
PARTS = {
    "racecheck": {"sgmv sm_90": 8, "sgmv sm_80": 2, "attention": 4, "bgmv sm_90": 2},
    "initcheck": {"sgmv sm_90": 3, "attention": 2},
    "memcheck": {"sgmv sm_90": 3, "attention": 2},
    "synccheck": {"sgmv sm_90": 2, "attention": 2},
}
# The kernels of the tests themselves need no check; but initcheck must see what they write.
OURS = ["--kernel-name", "kernel_substring=6punica4cuda"]
OPTIONS = {
    "memcheck": OURS,
    "racecheck": [*OURS, "--racecheck-num-workers", "2"],
    "initcheck": [],
    "synccheck": OURS,
}
NOTHING = {"racecheck": "RACECHECK SUMMARY: 0 hazards"}


def parts_of(tool, program, arch):
    return PARTS[tool].get(f"{program} {arch}", PARTS[tool].get(program, 1))


def find_sanitizer():
    found = shutil.which("compute-sanitizer")
    if found is None and (home := os.environ.get("CUDA_HOME", "/usr/local/cuda")):
        found = shutil.which("compute-sanitizer", path=f"{home}/bin")
    if found is None:
        sys.exit("compute-sanitizer is neither on PATH nor in CUDA_HOME/bin")
    return found


def run(job, sanitizer, directory, seconds, deadline, kernels):
    program, arch, tool, part, parts = job
    environment = {
        **os.environ,
        "PUNICA_CUDA_ARCH": arch,
        "PUNICA_TEST_PART": f"{part}/{parts}",
        "PUNICA_TEST_GARBAGE": "1" if tool == "memcheck" else "0",
        "PUNICA_TEST_KERNELS": str(kernels / f"{program}.{arch}.{tool}.{part}"),
    }
    command = [sanitizer, "--tool", tool, *OPTIONS[tool], "--error-exitcode", "9"]
    command += [str(directory / f"punica_cuda_{program}_test"), "small"]
    began = time.monotonic()
    seconds = min(seconds, deadline - began)
    if seconds < 1:
        return job, "timeout", 0.0, ""
    # A session of its own: the tool starts the program, and both must end.
    process = subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        text, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        text, _ = process.communicate()
        return job, "timeout", seconds, text
    # What no device ran has not been checked; what the tool did not summarise, or says that it could not follow,
    # neither.
    nothing = NOTHING.get(tool, "ERROR SUMMARY: 0 errors") in text and "= Warning" not in text
    return job, "clean" if process.returncode == 0 and nothing else "finding", time.monotonic() - began, text


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=pathlib.Path)
    parser.add_argument("--programs", nargs="+", help="default: all that are there")
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=TOOLS)
    parser.add_argument("--archs", nargs="+", default=("sm_90", "sm_80"))
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="programs at once")
    parser.add_argument("--seconds", type=float, default=300, help="time limit of a part")
    parser.add_argument("--total", type=float, default=3600, help="time limit of all")
    parser.add_argument("--split", type=int, default=1, help="this many times as many parts")
    parser.add_argument("--progress", action="store_true", help="a line for each part")
    parser.add_argument("--output", type=pathlib.Path, help="a folder for the whole output of each part")
    arguments = parser.parse_args()
    found = [
        path.name.removeprefix("punica_cuda_").removesuffix("_test")
        for path in arguments.directory.glob("punica_cuda_*_test")
    ]
    # Those of many parts first.
    programs = arguments.programs or sorted(found, key=lambda name: -parts_of("racecheck", name, "sm_90"))
    sanitizer = find_sanitizer()
    version = subprocess.run([sanitizer, "--version"], capture_output=True, text=True, check=True).stdout
    jobs = [
        (program, arch, tool, part, parts_of(tool, program, arch) * arguments.split)
        for tool in arguments.tools
        for program in programs
        for arch in arguments.archs
        for part in range(parts_of(tool, program, arch) * arguments.split)
    ]
    began = time.monotonic()
    results = collections.defaultdict(lambda: collections.defaultdict(list))
    with (
        tempfile.TemporaryDirectory() as kernels,
        concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool,
    ):
        kernels = pathlib.Path(kernels)
        limits = arguments.seconds, began + arguments.total
        running = [pool.submit(run, job, sanitizer, arguments.directory, *limits, kernels) for job in jobs]
        for done in concurrent.futures.as_completed(running):
            (program, arch, tool, part, parts), verdict, seconds, text = done.result()
            results[program, arch, tool][verdict].append((part, seconds))
            if arguments.progress:
                print(f"{program} {arch} {tool} {part}/{parts}: {verdict}, {seconds:.1f} s", flush=True)
            if arguments.output:
                (arguments.output / f"{program}.{arch}.{tool}.{part}.txt").write_text(text)
            if verdict == "finding":
                print(f"{program} {arch} {tool} part {part}/{parts}:\n{text[:2000]}\n...{text[-500:]}", flush=True)
        launched = collections.defaultdict(set)
        for path in kernels.iterdir():
            program, arch, tool, _ = path.name.split(".")
            launched[program, arch, tool] |= set(path.read_text().split())

    print(re.search(r"Version.*", version)[0])
    print(f"| program, path | kernels | {' | '.join(arguments.tools)} |")
    print("| --- " * (2 + len(arguments.tools)) + "|")
    everything = True
    for program in programs:
        for arch in arguments.archs:
            cells = []
            for tool in arguments.tools:
                verdicts = results[program, arch, tool]
                parts = parts_of(tool, program, arch) * arguments.split
                longest = max(seconds for done in verdicts.values() for _, seconds in done)
                bad = "".join(
                    f", {verdict} in {[p for p, _ in sorted(verdicts[verdict])]}"
                    for verdict in ("finding", "timeout")
                    if verdicts[verdict]
                )
                cells.append(f"{len(verdicts['clean'])} of {parts} clean{bad} ({longest:.0f} s)")
                everything = everything and len(verdicts["clean"]) == parts
            count = {len(launched[program, arch, tool]) for tool in arguments.tools}
            print(f"| {program}, {arch} | {' or '.join(map(str, sorted(count)))} | {' | '.join(cells)} |")
    print(f"{time.monotonic() - began:.0f} s")
    sys.exit(0 if everything else 1)


if __name__ == "__main__":
    main()

"""Runs the CUDA test programs' small suites under compute-sanitizer, on both code paths, as many at once as there are
cores.

    python tests/cpp/cuda/sanitize.py DIRECTORY_OF_THE_PROGRAMS [--programs bgmv sgmv] [--tools racecheck] [--jobs 16]

A suite is run by one process after the other or several beside each other, which share its cases (part.h): none waits
for another, and the start, which costs more than most cases, is paid once a process. Towards the end of the time
(--total) a process takes no more cases and the tool sums up what it saw. With --state the cases that ended without a
finding are kept in a folder, and a later call with the same programs runs the others.

A case counts as clean only if its process passed and the tool summarised it with no error, hazard or warning. Prints
what was found, and a table that says for each program, path and tool how many cases were clean, had a finding in their
process, or were not run, and how many of the kernels that there are were launched. Exits with 1 unless that is all
cases of all, and all kernels.
"""

import argparse
import dataclasses
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
PATHS = {"sm_80": "4ArchE0E", "sm_90": "4ArchE1E"}  # in the names of its kernels
# The kernels of the tests themselves need no check; but initcheck must see what they write.
OURS = ["--kernel-name", "kernel_substring=6punica4cuda"]
OPTIONS = {
    "memcheck": OURS,
    "racecheck": [*OURS, "--racecheck-num-workers", "2"],
    "initcheck": [],
    "synccheck": OURS,
}
NOTHING = {"racecheck": "RACECHECK SUMMARY: 0 hazards"}
MOST = 1 << 14  # Cases::kMost in part.h
CLEAN = 255
START = 6  # seconds that a process takes before its first case, about


@dataclasses.dataclass
class Suite:
    program: str
    arch: str
    tool: str
    queue: pathlib.Path
    total: int
    workers: list = dataclasses.field(default_factory=list)

    @property
    def name(self):
        return f"{self.program}.{self.arch}.{self.tool}"

    def taken(self):
        return self.total - self.queue.read_bytes()[: self.total].count(0)

    def running(self):
        return [worker for worker in self.workers if worker.verdict is None]

    # Seconds that those who are at it still need, as far as one can say.
    def expected(self, now):
        taken = sum(len(worker.cases()) for worker in self.workers)
        spent = sum(max(0.0, (worker.ended or now) - worker.began - START) for worker in self.workers)
        remaining = self.total - self.taken()
        return remaining * (spent / taken if taken else 1.0) / max(1, len(self.running()))


@dataclasses.dataclass
class Worker:
    number: int
    log: pathlib.Path
    process: subprocess.Popen
    began: float
    verdict: str = None
    ended: float = None

    def text(self):
        return self.log.read_text(errors="replace")

    # What it ran: (seconds since its start, number, name).
    def cases(self):
        found = re.findall(r"^ *([0-9.]+) case (\d+): (.*)$", self.text(), re.MULTILINE)
        return [(float(seconds), int(number), name) for seconds, number, name in found]


def find_sanitizer():
    found = shutil.which("compute-sanitizer")
    if found is None and (home := os.environ.get("CUDA_HOME", "/usr/local/cuda")):
        found = shutil.which("compute-sanitizer", path=f"{home}/bin")
    if found is None:
        sys.exit("compute-sanitizer is neither on PATH nor in CUDA_HOME/bin")
    return found


class Sanitizer:
    def __init__(self, arguments, state, output):
        self.path = find_sanitizer()
        self.arguments = arguments
        self.output = output
        self.began = time.monotonic()
        self.end = self.began + arguments.total
        self.suites = self.count(state)

    def program(self, name):
        return str(self.arguments.directory / f"punica_cuda_{name}_test")

    def environment(self, suite, worker, seconds):
        return {
            **os.environ,
            "PUNICA_CUDA_ARCH": suite.arch,
            "PUNICA_TEST_QUEUE": str(suite.queue),
            "PUNICA_TEST_WORKER": str(worker),
            "PUNICA_TEST_SECONDS": str(seconds),
            "PUNICA_TEST_BEGAN": str(time.time()),
            "PUNICA_TEST_VERBOSE": "1",
            "PUNICA_TEST_GARBAGE": "1" if suite.tool == "memcheck" else "0",
            "PUNICA_TEST_KERNELS": str(self.output / f"{suite.name}.{worker}.launched"),
        }

    # How many cases each suite has: without the tool, and no case is run.
    def count(self, state):
        arguments = self.arguments
        suites = [
            Suite(program, arch, tool, state / f"{program}.{arch}.{tool}.queue", 0)
            for tool in arguments.tools
            for program in arguments.programs
            for arch in arguments.archs
        ]
        counting = []
        for suite in suites:
            old = suite.queue.read_bytes() if suite.queue.exists() else b""
            suite.queue.write_bytes(bytes(MOST + 4))
            process = subprocess.Popen(
                [self.program(suite.program), "small"],
                env=self.environment(suite, 254, 0),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            counting.append((suite, old, process))
            if len(counting) >= arguments.jobs:
                self.counted(*counting.pop(0))
        for one in counting:
            self.counted(*one)
        return suites

    def counted(self, suite, old, process):
        text, _ = process.communicate()
        now = suite.queue.read_bytes()
        suite.total = int.from_bytes(now[MOST:], "little")
        if process.returncode != 0 or suite.total == 0:
            sys.exit(f"{suite.name} cannot be counted (exit code {process.returncode}):\n{text}")
        if old[MOST:] == now[MOST:]:
            kept = bytes(CLEAN if byte == CLEAN else 0 for byte in old[:MOST])
            suite.queue.write_bytes(kept + now[MOST:])

    def start(self, suite):
        number = len(suite.workers) + 1
        # What takes a case at the end of that has a while to end by itself.
        seconds = max(min(self.end - time.monotonic() - self.arguments.margin, self.arguments.slice), 0)
        command = [self.path, "--tool", suite.tool, *OPTIONS[suite.tool], "--error-exitcode", "9"]
        command += [self.program(suite.program), "small"]
        log = self.output / f"{suite.name}.{number}.txt"
        with log.open("w") as file:
            # A session of its own: the tool starts the program, and both must end.
            process = subprocess.Popen(
                command,
                env=self.environment(suite, number, seconds),
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        suite.workers.append(Worker(number, log, process, time.monotonic()))

    # The suite that most needs a process (another one); None if that would not help.
    def next_suite(self):
        now = time.monotonic()
        if now + self.arguments.margin + START > self.end:
            return None
        for suite in self.suites:
            if not suite.workers and suite.taken() < suite.total:
                return suite
        slow = [
            (suite.expected(now), suite)
            for suite in self.suites
            if len(suite.workers) < 250 and suite.taken() < suite.total
        ]
        expected, suite = max(slow, key=lambda pair: pair[0], default=(0, None))
        return suite if expected > START or (suite and not suite.running()) else None

    def ended(self, suite, worker, late):
        code = worker.process.poll()
        if code is None and not late:
            return False
        if code is None:
            os.killpg(worker.process.pid, signal.SIGKILL)
            worker.process.wait()
        worker.ended = time.monotonic()
        text = worker.text()
        nothing = NOTHING.get(suite.tool, "ERROR SUMMARY: 0 errors") in text and "= Warning" not in text
        if code is None:
            worker.verdict = "killed"
        elif code == 0 and not worker.cases():
            worker.verdict = "idle"
        else:
            worker.verdict = "clean" if code == 0 and nothing else "finding"
        if worker.verdict == "clean":
            with suite.queue.open("r+b") as file:
                for _, number, _ in worker.cases():
                    file.seek(number)
                    file.write(bytes([CLEAN]))
        if self.arguments.progress or worker.verdict in ("finding", "killed"):
            print(
                f"{suite.name} process {worker.number}: {worker.verdict}, {len(worker.cases())} cases, "
                f"{worker.ended - worker.began:.1f} s",
                flush=True,
            )
        if worker.verdict == "finding":
            print(f"{text[:2000]}\n...{text[-500:]}", flush=True)
        return True

    def run(self):
        while True:
            late = time.monotonic() > self.end
            running = 0
            for suite in self.suites:
                for worker in suite.running():
                    running += not self.ended(suite, worker, late)
            while running < self.arguments.jobs and (suite := self.next_suite()) is not None:
                self.start(suite)
                running += 1
            if running == 0:
                return
            time.sleep(0.2)

    # The table; whether all is clean.
    def report(self):
        arguments = self.arguments
        print(f"| program, path | kernels | {' | '.join(arguments.tools)} |")
        print("| --- " * (2 + len(arguments.tools)) + "|")
        everything = True
        for program in arguments.programs:
            for arch in arguments.archs:
                cells, launched, there = [], set(), set()
                for tool in arguments.tools:
                    (suite,) = (s for s in self.suites if (s.program, s.arch, s.tool) == (program, arch, tool))
                    clean = suite.queue.read_bytes()[: suite.total].count(CLEAN)
                    cell = f"{clean} of {suite.total} clean"
                    for verdict in ("finding", "killed"):
                        bad = [len(worker.cases()) for worker in suite.workers if worker.verdict == verdict]
                        cell += f", {verdict} among {sum(bad)}" if bad else ""
                    spent = sum(worker.ended - worker.began for worker in suite.workers)
                    cells.append(f"{cell} ({spent:.0f} s)")
                    everything = everything and clean == suite.total
                    # Of earlier calls too.
                    known = suite.queue.with_suffix(".kernels")
                    names = set(known.read_text().split()) if known.exists() else set()
                    for path in self.output.glob(f"{suite.name}.*.launched"):
                        names |= set(path.read_text().split())
                    known.write_text("\n".join(sorted(names)))
                    launched |= {name for name in names if name[0] != "-"}
                    there |= {name.removeprefix("-") for name in names if PATHS[arch] in name}
                everything = everything and launched == there
                print(f"| {program}, {arch} | {len(launched)} of {len(there)} | {' | '.join(cells)} |")
        print(f"{time.monotonic() - self.began:.0f} s")
        return everything

    # Where the time went: processes' starts, and the slowest cases.
    def times(self):
        for suite in self.suites:
            starts, cases = [], []
            for worker in suite.workers:
                ran = worker.cases()
                if not ran:
                    continue
                starts.append(round(ran[0][0], 1))
                ends = [seconds for seconds, _, _ in ran[1:]] + [worker.ended - worker.began]
                cases += [(end - begin, name) for (begin, _, name), end in zip(ran, ends, strict=True)]
            cases.sort(reverse=True)
            if starts:
                print(f"{suite.name}: starts {starts}, cases {sum(seconds for seconds, _ in cases):.1f} s")
            for seconds, name in cases[:3]:
                print(f"    {seconds:.1f} s {name}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=lambda text: pathlib.Path(text).resolve())
    parser.add_argument("--programs", nargs="+", help="default: all that are there")
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=TOOLS)
    parser.add_argument("--archs", nargs="+", choices=PATHS, default=("sm_90", "sm_80"))
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at once")
    parser.add_argument("--total", type=float, default=3600, help="time limit, in seconds")
    parser.add_argument("--margin", type=float, default=20, help="seconds before that in which no case is begun")
    parser.add_argument("--slice", type=float, default=1e6, help="seconds in which a process may begin cases")
    parser.add_argument("--progress", action="store_true", help="a line for each process")
    parser.add_argument("--times", action="store_true", help="say where the time went")
    parser.add_argument("--output", type=pathlib.Path, help="a folder for the whole output of each process")
    parser.add_argument("--state", type=pathlib.Path, help="a folder that says which cases were clean, to go on there")
    arguments = parser.parse_args()
    arguments.programs = arguments.programs or sorted(
        path.name.removeprefix("punica_cuda_").removesuffix("_test")
        for path in arguments.directory.glob("punica_cuda_*_test")
    )
    with tempfile.TemporaryDirectory() as folder:
        state = arguments.state or pathlib.Path(folder)
        output = arguments.output or pathlib.Path(folder)
        for path in (state, output):
            path.mkdir(parents=True, exist_ok=True)
        sanitizer = Sanitizer(arguments, state, output)
        sanitizer.run()
        version = subprocess.run([sanitizer.path, "--version"], capture_output=True, text=True, check=True).stdout
        print(re.search(r"Version.*", version)[0])
        everything = sanitizer.report()
        if arguments.times:
            sanitizer.times()
    sys.exit(0 if everything else 1)


if __name__ == "__main__":
    main()

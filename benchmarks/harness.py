"""How the CPU benchmark measures: interleaved repeats, in rounds that count only while the machine is quiet.

A work is one call of one operation with everything that it needs. In every round the machine's floors, our call and
each rival are measured one after another, so that all of them see the same conditions. A call's figure is the median
over the rounds of the median within a round. Its share of the floor is the median over the rounds of the share within a
round, for the machine's bandwidth may double from one round to the next; the floor given is that share of our time.
Inputs rotate over several times the last-level cache: nothing is found in a cache that a server with one layer after
another would not find there.
"""

import json
import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
BUILD = HERE.parent / "build" / "benchmarks"

ROUNDS = 9  # that count
MAX_ROUNDS = 40  # tried, before the noisy ones are taken too
MAX_FOREIGN_LOAD = 0.04  # of all cores, by other processes, in a round that counts
SECONDS_A_VARIANT = 0.06  # of calls in a round, at least MIN_CALLS
MIN_CALLS = 5


@dataclass
class Work:
    """One call of ours and what it is held against. `ours` and the rivals take the number of a set of inputs."""

    name: str
    ours: Callable[[int], Any]
    rivals: dict[str, Callable[[int], Any]] = field(default_factory=dict)
    num_sets: int = 1
    bytes: int = 0  # that have to be read or written at least once
    flop: int = 0
    goal: float | None = None  # of the floor's rate
    times: tuple[str, float] | None = None  # goal: so many times as fast as that rival
    check: Callable[[], None] = lambda: None  # raises if ours or a rival computes something else
    keep: object = None  # what the calls know only by address


@dataclass
class Floor:
    """Rates of the machine, per second."""

    read: float
    update: float
    peak: float

    def seconds(self, work: Work) -> float:
        """The least time that the work can take: its bytes at the streaming rate, or its flop at the peak."""
        return max(work.bytes / self.read, work.flop / self.peak)


@dataclass
class Measured:
    """Seconds a call. `again` are two runs of the same thing (ours): how far they differ is the noise."""

    ours: float
    again: float
    floor: float
    rivals: dict[str, float]
    quiet_rounds: int
    rounds: int

    @property
    def share(self) -> float:
        """Of the floor's rate, what ours reaches."""
        return self.floor / self.ours

    @property
    def spread(self) -> float:
        return abs(self.again - self.ours) / self.ours


def last_level_cache() -> int:
    """Bytes of the largest cache, from sysfs; 32 MiB where there is none."""
    sizes = []
    for size in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = size.read_text().strip()
        sizes.append(int(text[:-1]) << {"K": 10, "M": 20}[text[-1]])
    return max(sizes, default=32 << 20)


def rotation_bytes() -> int:
    """What inputs, and the floor's buffer, rotate over: four times all last-level caches there may be.

    A virtual machine shows one cache that all its cores share, wherever the hypervisor has put them. On the two cores
    that this was written on they had one each: in 4 x 32 MiB two threads read 118 GB/s, twice what one thread reads in
    64 MiB (58) and not in 1 GiB (42), so a third of the "streaming" came from the caches. Hence one a core there.
    """
    info = Path("/proc/cpuinfo")
    virtual = info.exists() and " hypervisor" in info.read_text()
    return 4 * last_level_cache() * (torch.get_num_threads() if virtual else 1)


def device_name() -> str:
    info = Path("/proc/cpuinfo")
    fields = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line) if info.exists() else {}
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    name = fields.get("model name", "unknown CPU")
    if "cpu family" in fields:
        name += f" (family {fields['cpu family']}, model {fields.get('model', '?')})"
    return f"{name}, {os.cpu_count()} cores, {last_level_cache() >> 20} MiB last-level cache"


class FloorProcess:
    """benchmarks/cpp/cpu_floor.cc, compiled here and now, and kept running to be asked again and again."""

    def __init__(self, isa: str, num_threads: int, nbytes: int):
        source, program = HERE / "cpp" / "cpu_floor.cc", BUILD / "cpu_floor"
        if not program.exists() or program.stat().st_mtime < source.stat().st_mtime:
            compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
            if compiler is None:
                raise RuntimeError("the machine's floors are measured by a C++ program: no compiler was found")
            BUILD.mkdir(parents=True, exist_ok=True)
            command = [compiler, "-std=c++20", "-O3", "-pthread", str(source), "-o", str(program)]
            subprocess.run(command, check=True)
        options = ["--isa", isa, "--threads", str(num_threads), "--bytes", str(nbytes), "--serve"]
        self.process = subprocess.Popen([str(program), *options], stdin=-1, stdout=-1, text=True)
        self.first = self._read()

    def _read(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"cpu_floor ended with status {self.process.wait()}")
        return json.loads(line)

    def measure(self) -> Floor:
        time.sleep(0.02)  # OpenMP's threads spin for a while after their last region
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return floor_of(self._read())

    def cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def floor_of(answer: dict[str, Any]) -> Floor:
    return Floor(*(answer[kind]["giga_per_second"] * 1e9 for kind in ("read", "update", "peak")))


class QuietCheck:
    """The share of the machine that others used since the last question, from /proc/stat; time stolen counts too."""

    def __init__(self, floor: FloorProcess):
        self.floor = floor
        self.last = self._now()

    def _now(self) -> tuple[float, float]:
        tick = os.sysconf("SC_CLK_TCK")
        user, nice, system, idle, iowait, irq, softirq, steal, *_ = (
            int(word) / tick for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
        )
        used = user + nice + system + irq + softirq + steal
        mine = sum(os.times()[:2]) + self.floor.cpu_seconds()
        return used - mine, used + idle + iowait

    def foreign_load(self) -> float:
        (others, total), now = self.last, self._now()
        self.last = now
        return max(0.0, now[0] - others) / max(now[1] - total, 1e-9)


def time_calls(call: Callable[[int], Any], first_set: int, num_sets: int, num_calls: int) -> float:
    """The median of single calls, in seconds."""
    clock, seconds = time.perf_counter, []
    for i in range(first_set, first_set + num_calls):
        number = i % num_sets
        start = clock()
        call(number)
        seconds.append(clock() - start)
    return statistics.median(seconds)


def measure(work: Work, floor: FloorProcess, rounds: int = ROUNDS, max_rounds: int = MAX_ROUNDS) -> Measured:
    work.check()
    variants = {"ours": work.ours, **work.rivals, "again": work.ours}
    calls, cursor = {}, dict.fromkeys(variants, 0)
    for name, variant in variants.items():
        variant(0)  # warm: lazy initialisation, memory of the allocator
        start = time.perf_counter()
        variant(1 % work.num_sets)
        once = time.perf_counter() - start
        calls[name] = min(max(MIN_CALLS, int(SECONDS_A_VARIANT / max(once, 1e-6))), max(4 * work.num_sets, 200))

    results: list[tuple[float, Floor, dict[str, float]]] = []
    quiet = QuietCheck(floor)
    for attempt in range(max(rounds, max_rounds)):
        machine = floor.measure()
        times = {}
        for name in list(variants) if attempt % 2 == 0 else reversed(variants):
            times[name] = time_calls(variants[name], cursor[name], work.num_sets, calls[name])
            cursor[name] = (cursor[name] + calls[name]) % work.num_sets
        results.append((quiet.foreign_load(), machine, times))
        if sum(load <= MAX_FOREIGN_LOAD for load, *_ in results) >= rounds:
            break
    results.sort(key=lambda result: result[0])  # where too few rounds were quiet: the quietest
    chosen = results[:rounds]

    medians = {name: statistics.median(times[name] for *_, times in chosen) for name in variants}
    share = statistics.median(machine.seconds(work) / times["ours"] for _, machine, times in chosen)
    return Measured(
        ours=medians["ours"],
        again=medians["again"],
        floor=share * medians["ours"],
        rivals={name: medians[name] for name in work.rivals},
        quiet_rounds=sum(load <= MAX_FOREIGN_LOAD for load, *_ in results),
        rounds=len(results),
    )


def check_close(what: str, ours: torch.Tensor, exact: torch.Tensor, rtol: float) -> None:
    """|ours - exact| <= rtol * |exact| + rtol / 16 * max |exact| of the row; exact is float64."""
    exact = exact.double()
    limit = rtol * exact.abs() + rtol / 16 * exact.flatten(1).abs().amax(1).view(-1, *[1] * (exact.dim() - 1))
    worst = ((ours.double() - exact).abs() / limit.clamp_min(1e-30)).max().item()
    if not worst <= 1:
        raise AssertionError(f"{what}: {worst:.2f} times the tolerance away from the reference")

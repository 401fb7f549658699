// What this machine can do at best, measured: the floors that the CPU benchmark compares the kernels with.
//
//   read     bytes/s at which all threads together stream through memory that is in no cache, best of many loops:
//            vector width, number of streams a thread, distance of the software prefetch, size of the memory pages
//   update   the same for x = f(x) in place; the bytes read and the bytes written both count
//   peak     flop/s of the dot product that the chosen instruction set is best at, from registers
//
//   cpu_floor --threads 2 --bytes 134217728 --isa avx512_bf16 [--passes 5] [--rounds 4] [--list] [--serve]
//
// Prints one line of JSON. --bytes is the size of the buffer, all of which every pass reads: give several times the
// last-level cache. With --serve it then measures the best loops again for every line that it reads, and prints
// another: bandwidth can differ by a factor of two from one minute to the next (where a hypervisor puts the virtual
// cores, what the neighbours do), so a floor is worth something only next to the measurement that it is held against.
// Nothing here uses the library. Vectors are those of GCC and Clang, so the file compiles anywhere.
#include <sched.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#define FLOOR_AVX2 __attribute__((target("avx2,fma")))
#define FLOOR_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl")))
#define FLOOR_AVX512_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))
#endif

namespace {

using Clock = std::chrono::steady_clock;
using Bytes16 = uint64_t __attribute__((vector_size(16)));
using Bytes32 = uint64_t __attribute__((vector_size(32)));
using Bytes64 = uint64_t __attribute__((vector_size(64)));
using Float4 = float __attribute__((vector_size(16)));
using Float8 = float __attribute__((vector_size(32)));
using Float16 = float __attribute__((vector_size(64)));

std::atomic<uint64_t> g_sink;

// ---- Threads that wait by spinning, so that waking them costs no system call --------------------------------------

// Moves the calling thread to the index-th core that the process may use. Left to itself the scheduler puts two
// spinning threads on one core now and then, and leaves them there.
void pin(int index) {
#if defined(__linux__)
  static const cpu_set_t allowed = [] {
    cpu_set_t cpus;
    CPU_ZERO(&cpus);
    sched_getaffinity(0, sizeof(cpus), &cpus);
    return cpus;
  }();
  const int count = CPU_COUNT(&allowed);
  for (int cpu = 0, skip = count > 0 ? index % count : 0; count > 0 && cpu < CPU_SETSIZE; ++cpu) {
    if (!CPU_ISSET(cpu, &allowed) || skip-- > 0) continue;
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(cpu, &one);
    sched_setaffinity(0, sizeof(one), &one);
    return;
  }
#endif
}

class Team {
 public:
  explicit Team(int size) : size_(size) {
    pin(0);
    for (int i = 1; i < size; ++i) {
      threads_.emplace_back([this, i] {
        pin(i);
        loop(i);
      });
    }
  }
  ~Team() {
    stop_ = true;
    ++generation_;
    for (auto& thread : threads_) thread.join();
  }
  // Runs work(thread) on every thread, the caller's included; returns the seconds it took.
  double run(const std::function<void(int)>& work) {
    work_ = &work;
    running_ = size_ - 1;
    const auto start = Clock::now();
    ++generation_;
    work(0);
    while (running_.load(std::memory_order_acquire) != 0) {
    }
    return std::chrono::duration<double>(Clock::now() - start).count();
  }
  int size() const { return size_; }

 private:
  void loop(int index) {
    for (int seen = 0;;) {
      while (generation_.load(std::memory_order_acquire) == seen) {
      }
      ++seen;
      if (stop_) return;
      (*work_)(index);
      running_.fetch_sub(1, std::memory_order_release);
    }
  }

  int size_;
  const std::function<void(int)>* work_ = nullptr;
  std::atomic<int> generation_{0};
  std::atomic<int> running_{0};
  std::atomic<bool> stop_{false};
  std::vector<std::thread> threads_;
};

// ---- Streaming --------------------------------------------------------------------------------------------------

// Reads `streams` ranges of `bytes` each, side by side, a block of 1 KiB of each in turn. Several loads are in flight
// whatever the loop; what differs is how well the hardware prefetchers follow.
template <class V>
inline __attribute__((always_inline)) uint64_t read_ranges(const char* data, size_t bytes, int streams, int prefetch) {
  constexpr size_t kBlock = 1024;
  V sum[4] = {};
  for (size_t at = 0; at < bytes; at += kBlock) {
    for (int s = 0; s < streams; ++s) {
      const char* block = data + s * bytes + at;
      if (prefetch > 0) {
        for (size_t line = 0; line < kBlock; line += 64) __builtin_prefetch(block + prefetch + line, 0, 3);
      }
#pragma GCC unroll 4
      for (size_t i = 0; i < kBlock; i += 4 * sizeof(V)) {
        const V* v = reinterpret_cast<const V*>(block + i);
        sum[0] ^= v[0];
        sum[1] ^= v[1];
        sum[2] ^= v[2];
        sum[3] ^= v[3];
      }
    }
  }
  const V all = sum[0] ^ sum[1] ^ sum[2] ^ sum[3];
  return all[0] ^ all[1];
}

template <class V>
inline __attribute__((always_inline)) void update_range(char* data, size_t bytes, int prefetch) {
  for (size_t at = 0; at < bytes; at += 4 * sizeof(V)) {
    if (prefetch > 0) __builtin_prefetch(data + at + prefetch, 1, 3);
    V* v = reinterpret_cast<V*>(data + at);
    for (int i = 0; i < 4; ++i) v[i] = ~v[i];
  }
}

struct Width {
  const char* name;
  uint64_t (*read)(const char*, size_t, int, int);
  void (*update)(char*, size_t, int);
};

// NOLINTBEGIN(bugprone-macro-parentheses): an attribute cannot stand in parentheses.
#define FLOOR_DEFINE_WIDTH(suffix, attribute, V)                                                \
  attribute uint64_t read_##suffix(const char* data, size_t bytes, int streams, int prefetch) { \
    return read_ranges<V>(data, bytes, streams, prefetch);                                      \
  }                                                                                             \
  attribute void update_##suffix(char* data, size_t bytes, int prefetch) { update_range<V>(data, bytes, prefetch); }
// NOLINTEND(bugprone-macro-parentheses)
FLOOR_DEFINE_WIDTH(128, , Bytes16)
#if defined(__x86_64__)
FLOOR_DEFINE_WIDTH(256, FLOOR_AVX2, Bytes32)
FLOOR_DEFINE_WIDTH(512, FLOOR_AVX512, Bytes64)
#endif

std::vector<Width> widths() {
  std::vector<Width> result = {{"128-bit loads", read_128, update_128}};
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2")) result.push_back({"256-bit loads", read_256, update_256});
  if (__builtin_cpu_supports("avx512bw")) result.push_back({"512-bit loads", read_512, update_512});
#endif
  return result;
}

// ---- Dot products from registers ----------------------------------------------------------------------------------

constexpr int kAccumulators = 12;  // covers latency x throughput of every unit known, and leaves room for operands
constexpr int64_t kSteps = 200'000;

template <class V>
inline __attribute__((always_inline)) float fma_steps(float seed) {
  const V a = V{} + 0.5f, b = V{} + seed;
  V sum[kAccumulators];
  for (V& s : sum) s = b;
  for (int64_t step = 0; step < kSteps; ++step) {
#pragma GCC unroll 12
    for (V& s : sum) s = s * a + b;  // nothing of it is the same in the next step
  }
  V all = V{};
  for (V& s : sum) all += s;
  return all[0];
}

struct Peak {
  const char* isa;
  const char* instruction;
  double flop;  // of one call
  float (*run)(float);
};

float peak_128(float seed) { return fma_steps<Float4>(seed); }
#if defined(__x86_64__)
FLOOR_AVX2 float peak_avx2(float seed) { return fma_steps<Float8>(seed); }
FLOOR_AVX512 float peak_avx512(float seed) { return fma_steps<Float16>(seed); }
FLOOR_AVX512_BF16 float peak_avx512_bf16(float seed) {
  __m512 sum[kAccumulators];
  for (__m512& s : sum) s = _mm512_set1_ps(seed);
  const __m512bh a = _mm512_cvtne2ps_pbh(_mm512_set1_ps(seed), _mm512_set1_ps(seed)), b = a;
  for (int64_t step = 0; step < kSteps; ++step) {
#pragma GCC unroll 12
    for (__m512& s : sum) s = _mm512_dpbf16_ps(s, a, b);
  }
  Float16 all = {};
  for (__m512& s : sum) all += reinterpret_cast<Float16>(s);
  return all[0];
}
#endif

bool find_peak(const std::string& isa, Peak* peak) {
  constexpr double kFlopALane = 2.0 * kAccumulators * kSteps;
#if defined(__x86_64__)
  // Without native bfloat16 the operands are widened by shifts outside the innermost loop: the peak is that of f32.
  const Peak all[] = {{"avx512_bf16", "bf16 dot product, 512 bits (vdpbf16ps)", 32 * kFlopALane, peak_avx512_bf16},
                      {"avx512", "f32 multiply-add, 512 bits", 16 * kFlopALane, peak_avx512},
                      {"avx2", "f32 multiply-add, 256 bits", 8 * kFlopALane, peak_avx2},
                      {"baseline", "f32 multiply and add, 128 bits", 4 * kFlopALane, peak_128}};
#else
  const Peak all[] = {{"neon", "f32 multiply-add, 128 bits", 4 * kFlopALane, peak_128},
                      {"baseline", "f32 multiply-add, 128 bits", 4 * kFlopALane, peak_128}};
#endif
  for (const Peak& p : all) {
    if (isa == p.isa) {
      *peak = p;
      return true;
    }
  }
  return false;
}

// ---- Measuring ----------------------------------------------------------------------------------------------------

struct Options {
  int threads = 1;
  size_t bytes = size_t{128} << 20;
  int passes = 5;
  int rounds = 4;
  bool list = false;
  bool serve = false;
  std::string isa;
};

// One way to do one kind of work. Its rate is that of the best round; a round is the lower quartile of the times of its
// passes: what interrupts a thread only ever makes a pass longer, and a floor that is too easy helps nobody. Rounds lie
// apart in time, so that what else happens on the machine for a while does not decide.
struct Candidate {
  const char* kind;
  std::string name;
  double units;  // of one pass: bytes or flop
  std::function<void(int thread)> work;
  double rate = 0;
};

// Memory in the pages asked for, written once so that every page is there.
char* allocate(size_t bytes, bool huge_pages) {
  const size_t huge = size_t{2} << 20;
  char* data = static_cast<char*>(std::aligned_alloc(huge, (bytes + huge) / huge * huge));
  if (data == nullptr) return nullptr;
#if defined(MADV_HUGEPAGE)
  madvise(data, bytes, huge_pages ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
#endif
  std::memset(data, 1, bytes);
  return data;
}

bool add_memory(const Options& options, bool huge_pages, std::vector<Candidate>* candidates) {
  constexpr int kMaxStreams = 8;
  const size_t share = options.bytes / options.threads / (kMaxStreams * 4096) * (kMaxStreams * 4096);
  const double bytes = static_cast<double>(share) * options.threads;
  char* data = allocate(share * options.threads, huge_pages);  // in use until the process ends
  if (data == nullptr) return false;
  for (const Width& width : widths()) {
    for (const int prefetch : {0, 1024, 4096}) {
      const std::string name = std::string(width.name) + ", prefetch " + std::to_string(prefetch) + " bytes ahead, " +
                               (huge_pages ? "2 MiB pages" : "4 KiB pages");
      for (const int streams : {1, 2, 4, 8}) {
        candidates->push_back(
            {"read", name + ", " + std::to_string(streams) + " streams a thread", bytes,
             [=](int thread) { g_sink += width.read(data + thread * share, share / streams, streams, prefetch); }});
      }
      candidates->push_back(
          {"update", name, 2 * bytes, [=](int thread) { width.update(data + thread * share, share, prefetch); }});
    }
  }
  return true;
}

// Sorts what it has measured: the best of each kind come first.
void measure(const Options& options, int rounds, std::vector<Candidate>* candidates) {
  Team team(options.threads);
  for (Candidate& candidate : *candidates) candidate.rate = 0;
  for (int round = 0; round < rounds; ++round) {
    for (Candidate& candidate : *candidates) {
      std::vector<double> seconds;
      seconds.reserve(options.passes);
      for (int pass = 0; pass < options.passes; ++pass) seconds.push_back(team.run(candidate.work));
      std::nth_element(seconds.begin(), seconds.begin() + options.passes / 4, seconds.end());
      candidate.rate = std::max(candidate.rate, candidate.units / seconds[options.passes / 4]);
    }
  }
  std::stable_sort(candidates->begin(), candidates->end(), [](const Candidate& a, const Candidate& b) {
    const int order = std::strcmp(a.kind, b.kind);
    return order != 0 ? order < 0 : a.rate > b.rate;
  });
}

void print(const Options& options, const std::vector<Candidate>& candidates) {
  std::printf("{\"threads\": %d, \"bytes\": %zu", options.threads, options.bytes);
  const char* kind = "";
  for (const Candidate& c : candidates) {
    if (options.list) std::fprintf(stderr, "%-6s %8.2f G/s  %s\n", c.kind, c.rate * 1e-9, c.name.c_str());
    if (std::strcmp(c.kind, kind) == 0) continue;
    kind = c.kind;
    std::printf(", \"%s\": {\"giga_per_second\": %.3f, \"how\": \"%s\"}", kind, c.rate * 1e-9, c.name.c_str());
  }
  std::printf("}\n");
  std::fflush(stdout);
}

// The best few of each kind.
std::vector<Candidate> shortlist(const std::vector<Candidate>& sorted) {
  constexpr int kKeep = 4;
  std::vector<Candidate> result;
  for (const Candidate& c : sorted) {
    const auto same = [&](const Candidate& other) { return std::strcmp(other.kind, c.kind) == 0; };
    if (std::count_if(result.begin(), result.end(), same) < kKeep) result.push_back(c);
  }
  return result;
}

// What is no number counts as one.
int at_least_one(const char* text) {
  return static_cast<int>(std::clamp<int64_t>(std::strtoll(text, nullptr, 10), 1, 1 << 20));
}

}  // namespace

int main(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string key = argv[i];
    if (key == "--list" || key == "--serve") {
      (key == "--list" ? options.list : options.serve) = true;
      continue;
    }
    if (i + 1 == argc) {
      std::fprintf(stderr, "cpu_floor: %s needs a value\n", key.c_str());
      return 2;
    }
    const char* value = argv[++i];
    if (key == "--threads") {
      options.threads = at_least_one(value);
    } else if (key == "--bytes") {
      options.bytes = std::strtoull(value, nullptr, 10);
    } else if (key == "--passes") {
      options.passes = at_least_one(value);
    } else if (key == "--rounds") {
      options.rounds = at_least_one(value);
    } else if (key == "--isa") {
      options.isa = value;
    } else {
      std::fprintf(stderr, "cpu_floor: unknown option %s\n", key.c_str());
      return 2;
    }
  }
  Peak peak;
  if (!find_peak(options.isa, &peak)) {
    std::fprintf(stderr, "cpu_floor: --isa '%s' is not known here\n", options.isa.c_str());
    return 2;
  }

  std::vector<Candidate> candidates;
  if (!add_memory(options, true, &candidates) || !add_memory(options, false, &candidates)) {
    std::fprintf(stderr, "cpu_floor: no memory for %zu bytes\n", options.bytes);
    return 1;
  }
  candidates.push_back({"peak", peak.instruction, peak.flop * options.threads,
                        [&](int) { g_sink += static_cast<uint64_t>(peak.run(1e-3f)); }});
  measure(options, options.rounds, &candidates);
  print(options, candidates);
  if (!options.serve) return 0;
  candidates = shortlist(candidates);
  for (int c; (c = std::getchar()) != EOF;) {
    if (c != '\n') continue;
    measure(options, 1, &candidates);
    print(options, candidates);
  }
  return 0;
}

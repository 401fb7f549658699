// sgmv of the CUDA backend against a naive product in float64 on the device, over awkward sizes: both layouts, both
// directions, all types, segments of many lengths with gaps between them. What must not be read is NaN: the rest of
// wider rows, rows of no segment, other layers, what lies around weights. What must not be written is compared
// afterwards. Beyond that the bits of a row must be the same in any segment, alone, at any alignment and with early
// reads.
//
//   PUNICA_CUDA_ARCH=sm_80|sm_90 sgmv_test [small]
//
// small: for compute-sanitizer, as few and as small cases as launch every kernel.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "tests/cpp/cuda/sgmv_tester.cuh"

namespace {

// Of all combinations of sizes around every limit that there is, lengths and numbers of segments, alignments and early
// reads, as few and as small ones as launch every kernel that any of them does.
template <class T>
void run_small(Tester<T>& tester, KernelCover& cover, int64_t* shapes, int64_t* failed) {
  using Small = typename Tester<T>::Small;
  std::vector<Small> cases;
  const auto add = [&](SgmvWeights layout, int64_t d_in, int64_t d_out) {
    // Many segments, most of them empty: the numbers alone decide which kernel runs.
    const std::vector<int> few = {1, 17, 0, 65}, one = {70};
    std::vector<int> many(40, 0), more(130, 0);
    for (std::vector<int>* lengths : {&many, &more}) (*lengths)[1] = 1, (*lengths)[7] = 17, (*lengths)[33] = 65;
    for (int kind = 0; kind < (with_garbage() ? 12 : 6); ++kind) {
      const int shift = kind % 3 == 2 ? 4 : kind % 3;
      const bool early = kind / 3 & 1, garbage = kind / 6;
      for (const int rows : {8, 100, 300, 600, 2000, 6600, 13000}) {
        if (rows * d_out > int64_t{4} << 20) continue;
        if (rows == 8) {
          cases.push_back({layout, d_in, d_out, {2, 3}, 8, shift, early, garbage});
          continue;
        }
        for (const std::vector<int>& lengths : {few, one, many, more}) {
          cases.push_back({layout, d_in, d_out, lengths, rows, shift, early, garbage});
        }
      }
    }
  };
  for (const SgmvWeights layout : {SgmvWeights::kOutIn, SgmvWeights::kInOut}) {
    for (const int64_t d_in : {1,   8,   15,  16,  17,  24,  32,  33,   40,   64,   65,   100,  128,
                               129, 136, 255, 256, 257, 300, 776, 1024, 2048, 4096, 8192, 16400}) {
      for (const int64_t d_out :
           {1, 8, 15, 16, 17, 24, 32, 33, 40, 64, 65, 72, 128, 130, 200, 256, 512, 520, 2048, 4104, 14344}) {
        if (d_in * d_out <= int64_t{2} << 20) add(layout, d_in, d_out);
      }
    }
  }
  std::stable_sort(cases.begin(), cases.end(), [](const Small& a, const Small& b) { return a.cost() < b.cost(); });
  for (const Small& c : cases) {
    if (!cover.needs(tester.kernels(c),
                     {c.garbage ? "garbage" : "shifted by " + std::to_string(c.shift), c.garbage ? "garbage"
                                                                                       : c.early ? "early"
                                                                                                 : "in order"})) {
      continue;
    }
    *failed += !tester.run_small(c);
    ++*shapes;
  }
  std::fflush(stdout);
}

}  // namespace

int main(int argc, char** argv) {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::printf("skipped: no CUDA device\n");
    return 77;
  }
  g_small = argc > 1 && std::strcmp(argv[1], "small") == 0;
  const int64_t sizes[] = {1, 2, 7, 8, 16, 17, 64, 100, 128, 512, 576, 3424, 4096, 4099};
  const auto begin = std::chrono::steady_clock::now();
  const auto seconds = [&] { return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count(); };
  int64_t shapes = 0, failed = 0;
  Tester<__half> half(DType::kFloat16, "float16");
  Tester<__nv_bfloat16> bfloat16(DType::kBFloat16, "bfloat16");
  Tester<float> single(DType::kFloat32, "float32");
  const auto finish = [&] {
    Cases::get().finish();
    if (Cases::get().idle()) return 0;
    punica::cuda::Arch arch = {};
    if (!punica::cuda::active_arch(0, &arch).ok() || !launched_only(arch)) {
      std::printf("FAIL the kernels that ran are not those of the path\n");
      ++failed;
    }
    std::printf("%s: %lld shapes, %lld calls, %lld shapes failed, %.1f s\n", punica::cuda::arch_name(arch),
                static_cast<long long>(shapes),
                static_cast<long long>(half.calls() + bfloat16.calls() + single.calls()),
                static_cast<long long>(failed), seconds());
    return failed == 0 ? 0 : 1;
  };
  if (g_small) {
    g_blocks = 32, g_guard = 0;
    KernelCover cover;
    run_small(half, cover, &shapes, &failed);
    run_small(bfloat16, cover, &shapes, &failed);
    run_small(single, cover, &shapes, &failed);
    return finish();
  }
  for (const SgmvWeights layout : {SgmvWeights::kOutIn, SgmvWeights::kInOut}) {
    for (const int64_t d_in : sizes) {
      for (const int64_t d_out : sizes) {
        failed += !half.run(layout, d_in, d_out);
        failed += !bfloat16.run(layout, d_in, d_out);
        failed += !single.run(layout, d_in, d_out);
        shapes += 3;
      }
      std::fflush(stdout);
    }
  }
  // Other shares of a long d_in among blocks.
  for (const SgmvWeights layout : {SgmvWeights::kOutIn, SgmvWeights::kInOut}) {
    for (const auto [d_in, d_out] :
         {std::pair{256, 1}, {300, 33}, {776, 24}, {8192, 16}, {8200, 72}, {14336, 200}, {16400, 16}, {16400, 40}}) {
      failed += !half.run(layout, d_in, d_out);
      failed += !bfloat16.run(layout, d_in, d_out);
      shapes += 2;
    }
  }
  // More rows than there are blocks at once, in the tiles that long segments are cut into.
  for (const SgmvWeights layout : {SgmvWeights::kOutIn, SgmvWeights::kInOut}) {
    for (const int64_t d_out : {16, 40, 64, 200}) {
      failed += !bfloat16.run(layout, 1024, d_out, {4500, 70, 1, 3000, 64});
      ++shapes;
    }
  }
  // Tiles of 64 to 192 rows, with one to eight blocks to a tile.
  for (const SgmvWeights layout : {SgmvWeights::kOutIn, SgmvWeights::kInOut}) {
    for (const auto [d_in, d_out] :
         {std::pair{4096, 24}, {4096, 64}, {4096, 128}, {4104, 200}, {16400, 72}, {520, 512}}) {
      failed += !bfloat16.run(layout, d_in, d_out, {900, 700, 20, 333});
      failed += !half.run(layout, d_in, d_out, {64, 70, 192, 0, 65, 130});
      shapes += 2;
    }
  }
  // More segments than a warp has lanes, long ones and empty ones.
  std::vector<int> some;
  for (int i = 0; i < 75; ++i) some.push_back(i % 7 == 3 ? 0 : 17 + i * 13 % 90);
  for (const auto [d_in, d_out] : {std::pair{4096, 16}, {4096, 5}, {2056, 16}, {520, 40}}) {
    failed += !bfloat16.run(SgmvWeights::kOutIn, d_in, d_out, some);
    failed += !half.run(SgmvWeights::kOutIn, d_in, d_out, some);
    shapes += 2;
  }
  // More segments than a block looks at in one round.
  std::vector<int> many;
  for (int i = 0; i < 2600; ++i) many.push_back(i % 5 == 0 ? 0 : i % 97 == 1 ? 70 : 1);
  for (const SgmvWeights layout : {SgmvWeights::kOutIn, SgmvWeights::kInOut}) {
    failed += !bfloat16.run(layout, 1024, 16, many);
    failed += !half.run(layout, 1024, 48, many);
    failed += !bfloat16.run(layout, 16, 520, many);
    failed += !single.run(layout, 64, 16, many);
    shapes += 4;
  }
  // Short segments of more columns than blocks at once: a block takes several strips of them.
  std::vector<int> few;
  for (int i = 0; i < 75; ++i) few.push_back(i % 9 == 4 ? 0 : i % 11 == 3 ? 20 : 1 + i % 3);
  for (const SgmvWeights layout : {SgmvWeights::kOutIn, SgmvWeights::kInOut}) {
    for (const int64_t d_in : {5, 13, 16, 24, 33, 100, 128}) {
      failed += !bfloat16.run(layout, d_in, 3000, few);
      failed += !half.run(layout, d_in, 3003, few);
      shapes += 2;
    }
  }
  for (const SgmvWeights layout : {SgmvWeights::kOutIn, SgmvWeights::kInOut}) {
    // A large y has a kernel of its own where d_in is small.
    for (const int64_t d_in : {8, 16, 24, 64, 100, 128}) {
      failed += !bfloat16.run(layout, d_in, 14344);
      ++shapes;
    }
    failed += !half.run(layout, 40, 14344);
    failed += !bfloat16.run(layout, 16, 4096, many);
    shapes += 2;
    // Long sums have tiles of other sizes for long, short and few segments.
    failed += !bfloat16.run(layout, 520, 7168, {700, 300, 20, 128});
    failed += !half.run(layout, 264, 4096, {700, 300, 20, 128});
    failed += !bfloat16.run(layout, 256, 1032, std::vector<int>(40, 33));
    failed += !bfloat16.run(layout, 136, 4096, many);
    failed += !half.run(layout, 136, 520, {3, 1, 70});
    shapes += 5;
  }
  return finish();
}

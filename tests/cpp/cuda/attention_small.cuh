// The suite of attention_test.cu for compute-sanitizer: few and small cases, but of all kinds, for every kernel.
#pragma once

#include "launches.h"

namespace {

// append_kv with malformed tables: nothing outside is touched.
void test_hostile_append(DType dtype) {
  if (!in_part()) return;
  announce("hostile append_kv");
  const Case c = {dtype, 2, 4, 64, 8};
  const Cache cache(c, {300, 40, 17, 600, 9});
  const int32_t many = std::numeric_limits<int32_t>::max(), few = std::numeric_limits<int32_t>::min();
  const Tables tables(cache.addresses, {few, many, 2, 1, 70, many}, {8, many, 0, -1, few});
  Rows k(dtype, 5, 2, 64), v(dtype, 5, 2, 64);
  k.randomize();
  v.randomize();
  AppendKvParams p;
  p.kv = tables.kv(c);
  p.k = k.view();
  p.v = v.view();
  run(cuda::append_kv(p, {}), "hostile append_kv");
  EXPECT(cache.pool.guards_intact(), "hostile append_kv");
}

// The kernels of a write, of tensors like those of test_writes.
std::vector<std::string> write_kernels(const Case& c, bool append, int64_t padding, int64_t offset) {
  const int64_t row = c.kv_heads * c.dim, item = static_cast<int64_t>(dtype_size(c.dtype));
  const auto table = [](DType dtype, int64_t count) {
    return TensorView{nowhere(), dtype, {DeviceType::kCuda, 0}, 1, {count}, {1}};
  };
  PagedKv kv;
  kv.kv_ptrs = table(DType::kInt64, 20);
  kv.kv_indptr = table(DType::kInt32, 7);
  kv.last_page_offset = table(DType::kInt32, 6);
  kv.num_layers = kLayers, kv.layer_idx = kLayer, kv.num_kv_heads = c.kv_heads, kv.page_size = c.page_size;
  const auto rows = [&](int64_t count, int64_t stride) {
    return TensorView{nowhere(offset * item),     c.dtype,           {DeviceType::kCuda, 0}, 3,
                      {count, c.kv_heads, c.dim}, {stride, c.dim, 1}};
  };
  const LaunchRecorder recorder;
  if (append) {
    AppendKvParams p;
    p.kv = kv, p.k = rows(6, row + padding), p.v = rows(6, row + 2 * padding);
    if (const Status status = cuda::append_kv(p, {}); !status.ok()) fail(status.message());
  } else {
    InitKvParams p;
    p.kv = kv, p.k = rows(70, row + padding), p.v = rows(70, row + 2 * padding);
    p.seqlen_indptr = table(DType::kInt32, 7);
    if (const Status status = cuda::init_kv(p, {}); !status.ok()) fail(status.message());
  }
  return recorder.kernels();
}

// The kernels of a call of `rows` queries, with a workspace and without.
template <class Params, class Call>
std::vector<std::string> attention_kernels(const Case& c, const std::vector<int64_t>& kv_len, int64_t rows, Call call) {
  const auto tensor = [&](DType dtype, std::vector<int64_t> shape) {
    TensorView v = {nowhere(), dtype, {DeviceType::kCuda, 0}, static_cast<int>(shape.size()), {}, {}};
    int64_t stride = 1;
    for (size_t i = shape.size(); i-- > 0;) v.shape[i] = shape[i], v.stride[i] = stride, stride *= shape[i];
    return v;
  };
  int64_t pages = 0;
  for (const int64_t length : kv_len) pages += (length + c.page_size - 1) / c.page_size;
  const int64_t batch = static_cast<int64_t>(kv_len.size());
  Params p;
  p.kv.kv_ptrs = tensor(DType::kInt64, {pages});
  p.kv.kv_indptr = tensor(DType::kInt32, {batch + 1});
  p.kv.last_page_offset = tensor(DType::kInt32, {batch});
  p.kv.num_layers = kLayers, p.kv.layer_idx = kLayer, p.kv.num_kv_heads = c.kv_heads, p.kv.page_size = c.page_size;
  p.o = p.q = tensor(c.dtype, {rows, c.kv_heads * c.group, c.dim});
  p.sm_scale = c.sm_scale, p.rope_theta = c.theta, p.rope_scale = c.rope_scale;
  p.window_left = c.window, p.logits_soft_cap = c.cap;
  const LaunchRecorder recorder;
  for (const bool workspace : {false, true}) {
    if (workspace) p.tmpbuf = tensor(DType::kUInt8, {cuda::workspace_bytes(p)});
    // Some have to have one.
    if (const Status status = call(p); !status.ok() && workspace) fail(c.name() + ": " + status.message());
  }
  return recorder.kernels();
}

std::vector<std::string> features(const Case& c) {
  std::vector<std::string> names = {c.page_size % 16 == 0 ? "page of tiles" : "odd page"};
  if (c.theta) names.push_back("rope");
  if (c.window >= 0) names.push_back("window");
  if (c.cap > 0) names.push_back("cap");
  return names;
}

// Few and small cases, of all kinds and for every kernel.
void test_small() {
  std::vector<Case> cases;
  for (const DType t : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    for (const int64_t dim : {2, 30, 64, 66, 80, 96, 112, 128, 160, 254, 256}) {
      for (const int64_t group : {1, 3, 8, 9, 17}) {
        for (const int64_t page_size : {1, 5, 16, 64}) {
          cases.push_back({t, 1, group, dim, page_size});
          cases.push_back({t, 1, group, dim, page_size, 1e4, 4.0});
          cases.push_back({t, 2, group, dim, page_size, std::nullopt, 1.0, 20});
          cases.push_back({t, 1, group, dim, page_size, std::nullopt, 1.0, -1, 5.0, 2.0 / std::sqrt(dim)});
          cases.push_back({t, 1, group, dim, page_size, 5e5, 1.0, 15, 20.0});
        }
      }
    }
  }
  const auto cost = [](const Case& c) { return c.kv_heads * (c.group + 3) * c.dim; };
  std::stable_sort(cases.begin(), cases.end(), [&](const Case& a, const Case& b) { return cost(a) < cost(b); });
  const std::vector<int64_t> decoded = {1, 0, 257, 16};
  // Beyond a split of prefill too, which are items of their own if there is a workspace.
  // More than one tile of keys: they have 128 where head dims are 64 and 128, and fewer elsewhere.
  const std::vector<int64_t> prefilled = {17, 5, 3, 0, 130}, queries = {5, 0, 7, 2, 129};
  const std::vector<int64_t> shorter = {17, 5, 3, 0, 70}, fewer = {5, 0, 7, 2, 66};
  const std::vector<int64_t> long_prefilled = {2100, 40}, long_queries = {3, 20};
  KernelCover decode, prefill, long_prefill;
  for (const Case& c : cases) {
    if (decode.needs(attention_kernels<BatchDecodeParams>(
                         c, decoded, 4, [](const BatchDecodeParams& p) { return cuda::batch_decode(p, {}); }),
                     features(c))) {
      test_decode(c, decoded);
    }
    const auto run_prefill = [](BatchPrefillParams p) {
      p.qo_indptr = p.kv.kv_indptr;
      return cuda::batch_prefill(p, {});
    };
    const bool wide = c.dim == 64 || c.dim == 128;
    const std::vector<int64_t>&kv_len = wide ? prefilled : shorter, &q_len = wide ? queries : fewer;
    if (prefill.needs(attention_kernels<BatchPrefillParams>(c, kv_len, wide ? 148 : 85, run_prefill), features(c))) {
      test_prefill(c, kv_len, q_len);
    }
    if (c.page_size == 16 &&
        long_prefill.needs(attention_kernels<BatchPrefillParams>(c, long_prefilled, 28, run_prefill), {"long"})) {
      test_prefill(c, long_prefilled, long_queries);
    }
  }
  KernelCover writes;
  for (const DType t : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    for (const int64_t dim : {2, 6, 7, 80, 128, 254}) {
      for (const int64_t page_size : {1, 3, 16}) {
        for (const int64_t padding : {0, 1, 2, 8}) {
          const Case c = {t, padding == 8 ? 9 : 2, 1, dim, page_size};
          for (const bool append : {false, true}) {
            std::vector<std::string> kernels = write_kernels(c, append, padding, padding == 1);
            if (!writes.needs(kernels, {append ? "append" : "init", page_size == 16 ? "page" : "odd page",
                                        padding == 2 ? "early" : "in order"})) {
              continue;
            }
            const std::vector<int64_t> kv_len = {20, 3, 0, 70, 2, 5};
            const std::vector<int64_t> lengths =
                append ? std::vector<int64_t>(6, 1) : std::vector<int64_t>{20, 2, 4, 40, 0, 5};
            test_writes(c, kv_len, lengths, append, padding, padding == 1, padding == 2);
          }
        }
      }
    }
    if (t == DType::kFloat16 || !with_garbage()) continue;
    test_hostile_tables(t);
    test_hostile_prefill(t);
    test_hostile_append(t);
  }
  test_chunks({DType::kBFloat16, 2, 4, 64, 16}, 40);
  test_counted_items();
  test_merge_launches();
}

int run_small_suite() {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::printf("skipped: no CUDA device\n");
    return 77;
  }
  small_suite = true;
  test_small();
  Cases::get().finish();
  if (Cases::get().idle()) return 0;
  cuda::Arch arch = {};
  if (!cuda::active_arch(0, &arch).ok() || !launched_only(arch)) fail("the kernels that ran are not those of the path");
  std::printf("%s: worst error / tolerance: output %.3f, lse %.3f; %d failures\n", cuda::arch_name(arch), worst_output,
              worst_lse, failures);
  return failures == 0 ? 0 : 1;
}

}  // namespace

// batch_decode, batch_prefill, init_kv and append_kv of the CUDA backend against plain double precision: a program of
// its own, so that it runs under compute-sanitizer without Python. Exits with 1 if anything is wrong.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <numeric>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "punica/cuda.h"
#include "src/cuda/backend.h"

namespace {

using namespace punica;

int failures = 0;
double worst_output = 0, worst_lse = 0;  // error / tolerance
std::string worst_case;
std::mt19937 random_bits(7);

void fail(const std::string& what) {
  if (++failures <= 40) std::printf("FAILED: %s\n", what.c_str());
}
#define EXPECT(condition, what)                                  \
  do {                                                           \
    if (!(condition)) fail(std::string(what) + ": " #condition); \
  } while (0)

void run(const Status& status, const std::string& what) {
  if (!status.ok()) {
    std::printf("FAILED: %s: %s\n", what.c_str(), status.message().c_str());
    std::exit(1);
  }
  const cudaError_t error = cudaDeviceSynchronize();
  if (error != cudaSuccess) {
    std::printf("FAILED: %s: %s\n", what.c_str(), cudaGetErrorString(error));
    std::exit(1);
  }
}

// Memory that host and device see, with a guard of 0xA5 bytes on either side.
class Buffer {
 public:
  static constexpr int64_t kGuard = 4096;
  explicit Buffer(int64_t bytes, int64_t shift = 0) : bytes_(bytes), shift_(shift) {
    if (cudaMallocManaged(&base_, static_cast<size_t>(bytes + shift + 2 * kGuard)) != cudaSuccess) {
      std::printf("FAILED: no memory\n");
      std::exit(1);
    }
    std::memset(base_, 0xA5, static_cast<size_t>(bytes + shift + 2 * kGuard));
  }
  ~Buffer() { cudaFree(base_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  unsigned char* data() const { return base_ + kGuard + shift_; }
  int64_t bytes() const { return bytes_; }
  bool guards_intact() const {
    for (int64_t i = 0; i < kGuard + shift_; ++i) {
      if (base_[i] != 0xA5) return false;
    }
    for (int64_t i = 0; i < kGuard; ++i) {
      if (data()[bytes_ + i] != 0xA5) return false;
    }
    return true;
  }

 private:
  unsigned char* base_ = nullptr;
  int64_t bytes_, shift_;
};

double get(const unsigned char* at, DType dtype) {
  if (dtype == DType::kFloat32) return *reinterpret_cast<const float*>(at);
  if (dtype == DType::kFloat16) return __half2float(*reinterpret_cast<const __half*>(at));
  return __bfloat162float(*reinterpret_cast<const __nv_bfloat16*>(at));
}
void set(unsigned char* at, DType dtype, double value) {
  if (dtype == DType::kFloat32) {
    *reinterpret_cast<float*>(at) = static_cast<float>(value);
  } else if (dtype == DType::kFloat16) {
    *reinterpret_cast<__half*>(at) = __float2half_rn(static_cast<float>(value));
  } else {
    *reinterpret_cast<__nv_bfloat16*>(at) = __float2bfloat16_rn(static_cast<float>(value));
  }
}
double normal() {
  static std::normal_distribution<double> distribution;
  return distribution(random_bits);
}

// Rows [rows, heads, dim], `padding` elements apart, `offset` elements behind an aligned address.
struct Rows {
  DType dtype;
  int64_t item, rows, heads, dim, stride;
  Buffer buffer;
  Rows(DType type, int64_t num_rows, int64_t num_heads, int64_t head_dim, int64_t padding = 0, int64_t offset = 0)
      : dtype(type),
        item(static_cast<int64_t>(dtype_size(type))),
        rows(num_rows),
        heads(num_heads),
        dim(head_dim),
        stride(num_heads * head_dim + padding),
        buffer(std::max<int64_t>(num_rows, 1) * stride * item, offset * item) {}
  unsigned char* at(int64_t row, int64_t head = 0, int64_t d = 0) const {
    return buffer.data() + (row * stride + head * dim + d) * item;
  }
  void randomize(double scale = 1.0) {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t i = 0; i < heads * dim; ++i) set(at(r) + i * item, dtype, scale * normal());
    }
  }
  int64_t row_bytes() const { return heads * dim * item; }
  bool same(int64_t row, const Rows& other, int64_t other_row) const {
    return std::memcmp(at(row), other.at(other_row), static_cast<size_t>(row_bytes())) == 0;
  }
  bool untouched(int64_t row) const {
    for (int64_t i = 0; i < row_bytes(); ++i) {
      if (at(row)[i] != 0xA5) return false;
    }
    return true;
  }
  bool padding_intact() const {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t i = row_bytes(); i < stride * item; ++i) {
        if (at(r)[i] != 0xA5) return false;
      }
    }
    return buffer.guards_intact();
  }
  TensorView view() const {
    return {buffer.data(), dtype, {DeviceType::kCuda, 0}, 3, {rows, heads, dim}, {stride, dim, 1}};
  }
};

template <class T>
struct Table {
  Buffer buffer;
  int64_t count;
  explicit Table(const std::vector<T>& values)
      : buffer(static_cast<int64_t>(values.size() * sizeof(T))), count(static_cast<int64_t>(values.size())) {
    std::memcpy(buffer.data(), values.data(), values.size() * sizeof(T));
  }
  TensorView view() const {
    return {buffer.data(), sizeof(T) == 8 ? DType::kInt64 : DType::kInt32, {DeviceType::kCuda, 0}, 1, {count}, {1}};
  }
};

struct Case {
  DType dtype;
  int64_t kv_heads, group, dim, page_size;
  std::optional<double> theta = {};
  double rope_scale = 1.0;
  int64_t window = -1;
  double cap = 0;
  std::optional<double> sm_scale = {};
  std::string name() const {
    return std::string(dtype == DType::kFloat32   ? "f32"
                       : dtype == DType::kFloat16 ? "f16"
                                                  : "bf16") +
           " N " + std::to_string(kv_heads) + " group " + std::to_string(group) + " D " + std::to_string(dim) + " P " +
           std::to_string(page_size) + (theta ? " rope" : "") + " window " + std::to_string(window) + " cap " +
           std::to_string(cap);
  }
};

constexpr int64_t kLayers = 2, kLayer = 1;

// A cache whose pages lie in a shuffled pool full of NaN; tokens below kv_len are random. The page after the last one
// of each sequence belongs to another.
struct Cache {
  const Case c;
  int64_t item, page_bytes;
  std::vector<int64_t> kv_len;
  std::vector<int64_t> addresses;
  std::vector<int32_t> indptr = {0}, last;
  Buffer pool;

  Cache(const Case& a_case, std::vector<int64_t> lengths)
      : c(a_case),
        item(static_cast<int64_t>(dtype_size(c.dtype))),
        page_bytes((kLayers * 2 * c.kv_heads * c.page_size * c.dim * item + 15) / 16 * 16),
        kv_len(lengths),
        pool(std::max<int64_t>(1, num_pages(lengths)) * page_bytes) {
    std::memset(pool.data(), 0xFF, static_cast<size_t>(pool.bytes()));
    std::vector<int64_t> order(static_cast<size_t>(num_pages(lengths)));
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), random_bits);
    for (const int64_t page : order) addresses.push_back(reinterpret_cast<int64_t>(pool.data() + page * page_bytes));
    for (const int64_t length : kv_len) {
      const int64_t pages = (length + c.page_size - 1) / c.page_size;
      indptr.push_back(indptr.back() + static_cast<int32_t>(pages));
      last.push_back(pages == 0 ? -3 : static_cast<int32_t>(length - (pages - 1) * c.page_size));
    }
  }
  int64_t num_pages(const std::vector<int64_t>& lengths) const {
    int64_t pages = 0;
    for (const int64_t length : lengths) pages += (length + c.page_size - 1) / c.page_size;
    return pages;
  }
  unsigned char* at(int64_t i, int64_t t, int64_t part, int64_t head, int64_t d = 0, int64_t layer = kLayer) const {
    const int64_t page = addresses[static_cast<size_t>(indptr[static_cast<size_t>(i)] + t / c.page_size)];
    return reinterpret_cast<unsigned char*>(page) +
           (((layer * 2 + part) * c.kv_heads + head) * c.page_size * c.dim + t % c.page_size * c.dim + d) * item;
  }
  void randomize() {
    for (size_t i = 0; i < kv_len.size(); ++i) {
      for (int64_t t = 0; t < kv_len[i]; ++t) {
        for (int64_t part = 0; part < 2; ++part) {
          for (int64_t head = 0; head < c.kv_heads; ++head) {
            for (int64_t d = 0; d < c.dim; ++d) set(at(static_cast<int64_t>(i), t, part, head, d), c.dtype, normal());
          }
        }
      }
    }
  }
};

struct Tables {
  Table<int64_t> ptrs;
  Table<int32_t> indptr, last;
  explicit Tables(const Cache& cache) : ptrs(cache.addresses), indptr(cache.indptr), last(cache.last) {}
  Tables(const std::vector<int64_t>& p, const std::vector<int32_t>& i, const std::vector<int32_t>& l)
      : ptrs(p), indptr(i), last(l) {}
  PagedKv kv(const Case& c) const {
    PagedKv kv;
    kv.kv_ptrs = ptrs.view();
    kv.kv_indptr = indptr.view();
    kv.last_page_offset = last.view();
    kv.num_layers = kLayers;
    kv.layer_idx = kLayer;
    kv.num_kv_heads = c.kv_heads;
    kv.page_size = c.page_size;
    return kv;
  }
};

template <class Params>
Params make_params(const Case& c, const Tables& tables, const Rows& o, const Rows& q, const Buffer* lse) {
  Params p;
  p.kv = tables.kv(c);
  p.o = o.view();
  p.q = q.view();
  if (lse != nullptr) {
    p.lse = {lse->data(), DType::kFloat32, {DeviceType::kCuda, 0}, 2, {q.rows, q.heads}, {q.heads, 1}};
  }
  p.sm_scale = c.sm_scale;
  p.rope_theta = c.theta;
  p.rope_scale = c.rope_scale;
  p.window_left = c.window;
  p.logits_soft_cap = c.cap;
  return p;
}

TensorView workspace(const Buffer& buffer) {
  return {buffer.data(), DType::kUInt8, {DeviceType::kCuda, 0}, 1, {buffer.bytes()}, {1}};
}

void rotate(std::vector<double>& x, double position, const Case& c) {
  const size_t half = x.size() / 2;
  for (size_t d = 0; d < half; ++d) {
    const double exponent = -2.0 * static_cast<double>(d) / static_cast<double>(x.size());
    const double angle = position / c.rope_scale * std::pow(*c.theta, exponent);
    const double a = x[d], b = x[d + half], cosine = std::cos(angle), sine = std::sin(angle);
    x[d] = a * cosine - b * sine;
    x[d + half] = b * cosine + a * sine;
  }
}

// One row of q at `position` of sequence i (keys by `key_at(t, part, head)`), all heads: is row r of o (and lse) right?
template <class KeyAt>
void check_row(const Case& c, KeyAt key_at, int64_t position, const Rows& q, const Rows& o, const Buffer* lse,
               int64_t row, const std::string& what) {
  const int64_t heads = c.kv_heads * c.group;
  const int64_t begin = c.window < 0 || c.window >= position ? 0 : position - c.window;
  const double scale = c.sm_scale.value_or(1.0 / std::sqrt(static_cast<double>(c.dim)));
  std::vector<double> exact(static_cast<size_t>(heads * c.dim)), terms(exact.size());
  for (int64_t head = 0; head < heads; ++head) {
    double log_sum = -INFINITY;
    if (position >= 0) {
      std::vector<double> query(static_cast<size_t>(c.dim)), scores, key(query.size());
      for (int64_t d = 0; d < c.dim; ++d) query[static_cast<size_t>(d)] = get(q.at(row, head, d), c.dtype);
      if (c.theta) rotate(query, static_cast<double>(position), c);
      double top = -INFINITY, sum = 0;
      for (int64_t t = begin; t <= position; ++t) {
        const unsigned char* from = key_at(t, 0, head / c.group);
        for (int64_t d = 0; d < c.dim; ++d) key[static_cast<size_t>(d)] = get(from + d * q.item, c.dtype);
        if (c.theta) rotate(key, static_cast<double>(t), c);
        double s = scale * std::inner_product(query.begin(), query.end(), key.begin(), 0.0);
        if (c.cap > 0) s = c.cap * std::tanh(s / c.cap);
        scores.push_back(s);
        top = std::max(top, s);
      }
      for (double& s : scores) sum += s = std::exp(s - top);
      log_sum = (top + std::log(sum)) / std::log(2.0);
      for (int64_t t = begin; t <= position; ++t) {
        const unsigned char* from = key_at(t, 1, head / c.group);
        const double p = scores[static_cast<size_t>(t - begin)] / sum;
        for (int64_t d = 0; d < c.dim; ++d) {
          const double v = get(from + d * q.item, c.dtype);
          exact[static_cast<size_t>(head * c.dim + d)] += p * v;
          terms[static_cast<size_t>(head * c.dim + d)] += p * std::abs(v);
        }
      }
    }
    if (lse != nullptr) {
      const double got = reinterpret_cast<const float*>(lse->data())[row * heads + head];
      if (std::isinf(log_sum)) {
        EXPECT(got == -INFINITY, what + " lse of a row that sees nothing");
      } else {
        const double error = std::abs(got - log_sum) / (2e-5 * std::max(1.0, std::abs(log_sum)));
        worst_lse = std::max(worst_lse, error);
        if (!(error <= 1)) fail(what + " lse: got " + std::to_string(got) + ", exact " + std::to_string(log_sum));
      }
    }
  }
  const double rtol = c.dtype == DType::kFloat32 ? 2e-6 : c.dtype == DType::kFloat16 ? 2e-3 : 1.6e-2;
  double largest = 0;
  for (const double value : exact) largest = std::max(largest, std::abs(value));
  for (size_t i = 0; i < exact.size(); ++i) {
    const double got = get(o.at(row) + static_cast<int64_t>(i) * o.item, c.dtype);
    const double tolerance = rtol * std::abs(exact[i]) + rtol / 16 * largest + 4 * 0x1p-24 * terms[i];
    const double error = std::abs(got - exact[i]);
    if (position >= 0 && error > worst_output * tolerance) {
      worst_output = error / tolerance;
      worst_case = what + " element " + std::to_string(i) + " exact " + std::to_string(exact[i]);
    }
    if (!(error <= tolerance)) {
      fail(what + " row " + std::to_string(row) + " element " + std::to_string(i) + ": got " + std::to_string(got) +
           ", exact " + std::to_string(exact[i]));
      return;
    }
  }
}

void test_prefill(const Case& c, const std::vector<int64_t>& kv_len, const std::vector<int64_t>& q_len) {
  const std::string what = "prefill " + c.name();
  Cache cache(c, kv_len);
  cache.randomize();
  const Tables tables(cache);
  std::vector<int32_t> qo = {2};  // rows 0 and 1 belong to nobody
  for (const int64_t n : q_len) qo.push_back(qo.back() + static_cast<int32_t>(n));
  const int64_t rows = qo.back() + 3;
  const Table<int32_t> indptr(qo);
  Rows q(c.dtype, rows, c.kv_heads * c.group, c.dim, 5, 1), o(c.dtype, rows, c.kv_heads * c.group, c.dim, 3, 1);
  q.randomize();
  const Buffer lse(rows * q.heads * 4);
  auto p = make_params<BatchPrefillParams>(c, tables, o, q, &lse);
  p.qo_indptr = indptr.view();
  const Buffer tmpbuf(cuda::workspace_bytes(p), 1);
  p.tmpbuf = workspace(tmpbuf);
  run(cuda::batch_prefill(p, {}), what);
  for (size_t i = 0; i < kv_len.size(); ++i) {
    for (int64_t row = qo[i]; row < qo[i + 1]; ++row) {
      const auto key_at = [&](int64_t t, int64_t part, int64_t head) {
        return cache.at(static_cast<int64_t>(i), t, part, head);
      };
      const int64_t position = kv_len[i] == 0 ? -1 : kv_len[i] - qo[i + 1] + row;
      check_row(c, key_at, position, q, o, &lse, row, what + " sequence " + std::to_string(i));
    }
  }
  for (const int64_t row : {int64_t{0}, int64_t{1}, rows - 1}) EXPECT(o.untouched(row), what);
  EXPECT(o.padding_intact() && lse.guards_intact() && tmpbuf.guards_intact() && cache.pool.guards_intact(), what);
}

void test_decode(const Case& c, const std::vector<int64_t>& kv_len) {
  const std::string what = "decode " + c.name();
  Cache cache(c, kv_len);
  cache.randomize();
  const Tables tables(cache);
  const int64_t batch = static_cast<int64_t>(kv_len.size());
  Rows q(c.dtype, batch, c.kv_heads * c.group, c.dim, 8), o(c.dtype, batch, c.kv_heads * c.group, c.dim, 1);
  q.randomize();
  const Buffer lse(batch * q.heads * 4);
  auto p = make_params<BatchDecodeParams>(c, tables, o, q, &lse);
  const Buffer tmpbuf(cuda::workspace_bytes(p), 1);
  p.tmpbuf = workspace(tmpbuf);
  run(cuda::batch_decode(p, {}), what);
  for (int64_t i = 0; i < batch; ++i) {
    const auto key_at = [&](int64_t t, int64_t part, int64_t head) { return cache.at(i, t, part, head); };
    check_row(c, key_at, kv_len[static_cast<size_t>(i)] - 1, q, o, &lse, i, what + " sequence " + std::to_string(i));
  }
  EXPECT(o.padding_intact() && lse.guards_intact() && tmpbuf.guards_intact(), what);

  // The same bits without a workspace, from prefill with one query a sequence, and alone.
  Rows again(c.dtype, batch, q.heads, c.dim);
  p.o = again.view();
  p.tmpbuf = {};
  Context early;
  early.early_reads = true;
  run(cuda::batch_decode(p, early), what);
  for (int64_t i = 0; i < batch; ++i) EXPECT(again.same(i, o, i), what + " without a workspace");
  std::vector<int32_t> qo(static_cast<size_t>(batch + 1));
  std::iota(qo.begin(), qo.end(), 0);
  const Table<int32_t> indptr(qo);
  Rows prefilled(c.dtype, batch, q.heads, c.dim);
  auto prefill = make_params<BatchPrefillParams>(c, tables, prefilled, q, nullptr);
  prefill.qo_indptr = indptr.view();
  run(cuda::batch_prefill(prefill, {}), what);
  for (int64_t i = 0; i < batch; ++i) EXPECT(prefilled.same(i, o, i), what + " by prefill");
  for (int64_t i = 0; i < batch; ++i) {
    const size_t s = static_cast<size_t>(i);
    const Tables alone(cache.addresses, {cache.indptr[s], cache.indptr[s + 1]}, {cache.last[s]});
    Rows one_q(c.dtype, 1, q.heads, c.dim), one_o(c.dtype, 1, q.heads, c.dim);
    std::memcpy(one_q.at(0), q.at(i), static_cast<size_t>(q.row_bytes()));
    auto one = make_params<BatchDecodeParams>(c, alone, one_o, one_q, nullptr);
    const Buffer one_tmpbuf(cuda::workspace_bytes(one));
    one.tmpbuf = workspace(one_tmpbuf);
    run(cuda::batch_decode(one, {}), what);
    EXPECT(one_o.same(0, o, i), what + " alone");
  }
}

// Every query has the same bits in whatever chunk it comes.
void test_chunks(const Case& c, int64_t length) {
  const std::string what = "chunks " + c.name();
  Cache cache(c, {length});
  cache.randomize();
  Rows q(c.dtype, length, c.kv_heads * c.group, c.dim), whole(c.dtype, length, q.heads, c.dim);
  q.randomize();
  const auto chunk = [&](int64_t first, int64_t last, const Rows& o) {
    const int64_t pages = (last + c.page_size - 1) / c.page_size;
    const Tables tables(cache.addresses, {0, static_cast<int32_t>(pages)},
                        {static_cast<int32_t>(last - (pages - 1) * c.page_size)});
    const Table<int32_t> indptr({0, static_cast<int32_t>(last - first)});
    auto p = make_params<BatchPrefillParams>(c, tables, o, q, nullptr);
    p.q.data = q.at(first);
    p.q.shape[0] = p.o.shape[0] = last - first;
    p.qo_indptr = indptr.view();
    run(cuda::batch_prefill(p, {}), what);
  };
  chunk(0, length, whole);
  for (const int64_t size : {int64_t{1}, int64_t{4}, int64_t{17}, int64_t{100}}) {
    for (int64_t first = size == 1 ? length - 9 : 0; first < length; first += size) {
      const int64_t last = std::min(first + size, length);
      Rows part(c.dtype, last - first, q.heads, c.dim);
      chunk(first, last, part);
      for (int64_t row = first; row < last; ++row) EXPECT(part.same(row - first, whole, row), what);
    }
  }
}

// Positions up to 2^20, all of whose pages are the same memory.
void test_far_positions(DType dtype) {
  const Case c = {dtype, 1, 2, 64, 128, 5e5, 1.0, 40};
  Cache cache(c, {128});
  cache.randomize();
  const int64_t length = int64_t{1} << 20;
  const Tables tables(std::vector<int64_t>(static_cast<size_t>(length / 128), cache.addresses[0]),
                      {0, static_cast<int32_t>(length / 128)}, {128});
  Rows q(dtype, 1, 2, 64), o(dtype, 1, 2, 64);
  q.randomize();
  const Buffer lse(8);
  auto p = make_params<BatchDecodeParams>(c, tables, o, q, &lse);
  const Buffer tmpbuf(cuda::workspace_bytes(p));
  p.tmpbuf = workspace(tmpbuf);
  run(cuda::batch_decode(p, {}), "far positions");
  const auto key_at = [&](int64_t t, int64_t part, int64_t head) { return cache.at(0, t % 128, part, head); };
  check_row(c, key_at, length - 1, q, o, &lse, 0, "far positions");
}

// Malformed tables: nothing outside is touched, and sequences whose own entries are well have the right results.
void test_hostile_tables(DType dtype) {
  const Case c = {dtype, 2, 4, 64, 8};
  Cache cache(c, {300, 40, 17, 600, 9});
  cache.randomize();
  const int32_t many = std::numeric_limits<int32_t>::max(), few = std::numeric_limits<int32_t>::min();
  Rows q(dtype, 5, 8, 64), o(dtype, 5, 8, 64), good(dtype, 5, 8, 64);
  q.randomize();
  const Tables tables(cache);
  auto p = make_params<BatchDecodeParams>(c, tables, good, q, nullptr);
  const Buffer tmpbuf(cuda::workspace_bytes(p));
  p.tmpbuf = workspace(tmpbuf);
  run(cuda::batch_decode(p, {}), "hostile");
  const std::vector<int32_t>&ip = cache.indptr, &last = cache.last;
  const auto decode = [&](const std::vector<int32_t>& indptr, const std::vector<int32_t>& offsets,
                          const std::vector<int>& same, const std::vector<int>& empty) {
    const Tables bad(cache.addresses, indptr, offsets);
    p.kv = bad.kv(c);
    p.o = o.view();
    run(cuda::batch_decode(p, {}), "hostile decode");
    for (const int i : same) EXPECT(o.same(i, good, i), "hostile decode, sequence " + std::to_string(i));
    for (const int i : empty) {
      for (int64_t j = 0; j < 8 * 64; ++j) {
        if (get(o.at(i) + j * o.item, dtype) != 0) {
          fail("hostile decode: sequence " + std::to_string(i) + " is not empty");
          break;
        }
      }
    }
    EXPECT(o.padding_intact() && tmpbuf.guards_intact(), "hostile decode");
  };
  decode(ip, {last[0], 0, 9, last[3], few}, {0, 3}, {1, 2, 4});
  decode({ip[0], ip[1], few, many, ip[4], ip[5]}, last, {0, 4}, {1, 3});
  decode({many, few, ip[2], ip[3], ip[4], ip[5]}, last, {2, 3, 4}, {0});
  decode({few, many, few, many, few, many}, {8, 8, 8, 8, 8}, {}, {1, 3});  // more splits than the workspace has

  const std::vector<int32_t> lengths[] = {{0, 2, 2, 4, 5, 5}, {0, many, few, 3, 1, 5}, {few, few, many, many, 2, 9}};
  for (const auto& qo : lengths) {
    const Table<int32_t> indptr(qo);
    for (const bool bad_pages : {false, true}) {
      const Tables bad(cache.addresses, bad_pages ? std::vector<int32_t>{3, many, few, 2, 70, few} : ip,
                       bad_pages ? std::vector<int32_t>{8, 8, many, 0, -1} : last);
      Rows out(dtype, 5, 8, 64, 2);
      auto prefill = make_params<BatchPrefillParams>(c, bad, out, q, nullptr);
      prefill.qo_indptr = indptr.view();
      run(cuda::batch_prefill(prefill, {}), "hostile prefill");
      EXPECT(out.padding_intact(), "hostile prefill");
      if (bad_pages) continue;
      Rows k(dtype, 5, 2, 64), v(dtype, 5, 2, 64);
      k.randomize();
      v.randomize();
      InitKvParams init;
      init.kv = bad.kv(c);
      init.k = k.view();
      init.v = v.view();
      init.seqlen_indptr = indptr.view();
      run(cuda::init_kv(init, {}), "hostile init_kv");
      EXPECT(cache.pool.guards_intact(), "hostile init_kv");
    }
  }
}

// init_kv (and append_kv, where every length is 1) against copies on the host, byte for byte of the whole pool.
void test_writes(const Case& c, const std::vector<int64_t>& kv_len, const std::vector<int64_t>& lengths, bool append,
                 int64_t padding, int64_t offset, bool early_reads) {
  const std::string what = std::string(append ? "append_kv " : "init_kv ") + c.name();
  Cache cache(c, kv_len);
  cache.randomize();
  const Tables tables(cache);
  std::vector<int32_t> indptr = {append ? 0 : 1};
  for (const int64_t n : lengths) indptr.push_back(indptr.back() + static_cast<int32_t>(n));
  const int64_t rows = indptr.back() + (append ? 0 : 2);
  Rows k(c.dtype, rows, c.kv_heads, c.dim, padding, offset), v(c.dtype, rows, c.kv_heads, c.dim, 2 * padding, offset);
  k.randomize();
  v.randomize();
  const std::vector<unsigned char> before(cache.pool.data(), cache.pool.data() + cache.pool.bytes());
  for (size_t i = 0; i < kv_len.size(); ++i) {
    for (int64_t row = indptr[i]; row < indptr[i + 1]; ++row) {
      const int64_t t = kv_len[i] - indptr[i + 1] + row;
      if (t < 0) continue;
      for (int64_t head = 0; head < c.kv_heads; ++head) {
        std::memcpy(cache.at(static_cast<int64_t>(i), t, 0, head), k.at(row, head),
                    static_cast<size_t>(c.dim * k.item));
        std::memcpy(cache.at(static_cast<int64_t>(i), t, 1, head), v.at(row, head),
                    static_cast<size_t>(c.dim * k.item));
      }
    }
  }
  const std::vector<unsigned char> want(cache.pool.data(), cache.pool.data() + cache.pool.bytes());
  std::memcpy(cache.pool.data(), before.data(), before.size());
  const Table<int32_t> seqlen_indptr(indptr);
  Context context;
  context.early_reads = early_reads;
  if (append) {
    AppendKvParams p;
    p.kv = tables.kv(c);
    p.k = k.view();
    p.v = v.view();
    run(cuda::append_kv(p, context), what);
  } else {
    InitKvParams p;
    p.kv = tables.kv(c);
    p.k = k.view();
    p.v = v.view();
    p.seqlen_indptr = seqlen_indptr.view();
    run(cuda::init_kv(p, context), what);
  }
  EXPECT(std::memcmp(cache.pool.data(), want.data(), want.size()) == 0, what);
  EXPECT(cache.pool.guards_intact() && k.padding_intact() && v.padding_intact(), what);
}

}  // namespace

int main(int argc, char**) {
  const bool small = argc > 1;  // any argument: small sizes, for compute-sanitizer
  constexpr DType kTypes[] = {DType::kFloat32, DType::kFloat16, DType::kBFloat16};
  std::vector<Case> cases;
  for (const DType t : kTypes) {
    const std::vector<Case> some = {
        {t, 2, 1, 2, 1},
        {t, 1, 3, 6, 3},
        {t, 2, 4, 64, 16},
        {t, 1, 7, 80, 8},
        {t, 2, 3, 96, 16},
        {t, 2, 4, 128, 16},
        {t, 1, 16, 128, 64},
        {t, 1, 19, 66, 128},
        {t, 1, 4, 256, 16},
        {t, 1, 3, 254, 5},
        {t, 2, 4, 128, 16, 5e5},
        {t, 1, 3, 30, 4, 1e4, 4.0},
        {t, 1, 2, 256, 16, 1e4, 0.01},
        {t, 2, 4, 64, 16, std::nullopt, 1.0, 0},
        {t, 2, 4, 64, 16, std::nullopt, 1.0, 100},
        {t, 1, 4, 64, 8, std::nullopt, 1.0, -1, 5.0, 0.5},
        {t, 2, 3, 18, 6, 5e5, 2.0, 9, 20.0, 0.2},
        {t, 1, 5, 160, 3, 1e4, 1.0, 300, 30.0},
    };
    cases.insert(cases.end(), some.begin(), some.end());
  }
  for (const Case& c : cases) {
    if (small) {
      test_prefill(c, {17, 5, 3, 0, 70}, {5, 0, 7, 2, 21});
      test_decode(c, {1, 70, 0, 300, 64});
      continue;
    }
    // Whole prompts, chunks behind a past, nothing, no keys, more queries than keys, and many sequences.
    std::vector<int64_t> kv_len = {130, 5, 200, 37, 1, 0, 3, 300}, q_len = {130, 0, 64, 5, 1, 3, 7, 17};
    test_prefill(c, kv_len, q_len);
    std::vector<int64_t> lengths = {1500, 1, 0, 64, 255, 256, 257, 513};
    test_decode(c, lengths);
  }
  for (const DType t : kTypes) {
    test_chunks({t, 2, 4, 64, 16}, small ? 40 : 600);
    test_chunks({t, 1, 3, 80, 5, 1e4}, small ? 40 : 310);
    test_chunks({t, 1, 7, 256, 16, std::nullopt, 1.0, 70}, small ? 40 : 310);
    test_far_positions(t);
    test_hostile_tables(t);
    // Many short sequences: more than one step of the scan over them.
    test_decode({t, 1, 2, 32, 4}, std::vector<int64_t>(small ? 3 : 300, 7));
    test_prefill({t, 1, 2, 32, 4}, std::vector<int64_t>(small ? 3 : 300, 7), std::vector<int64_t>(small ? 3 : 300, 3));
    for (const int64_t dim : {2, 6, 80, 128, 254}) {
      for (const int64_t page_size : {1, 3, 16, 128}) {
        for (const int64_t padding : {0, 1, 2, 8}) {
          const Case c = {t, padding == 8 && page_size < 128 ? 9 : 2, 1, dim, page_size};
          test_writes(c, {20, 3, 0, 70, 2, 5}, {20, 2, 4, 40, 0, 9}, false, padding, padding == 1, padding == 2);
          test_writes(c, {20, 3, 0, 70, 2, 1}, {1, 1, 1, 1, 1, 1}, true, padding, padding == 1, padding == 2);
        }
      }
    }
    test_writes({t, 1, 1, 64, 16}, std::vector<int64_t>(400, 30), std::vector<int64_t>(400, 29), false, 0, 0, false);
  }
  std::printf("%s: worst error / tolerance: output %.3f (%s), lse %.3f; %d failures\n",
              cuda::last_arch() == nullptr ? "nothing ran" : cuda::last_arch(), worst_output, worst_case.c_str(),
              worst_lse, failures);
  return failures == 0 && cuda::last_arch() != nullptr ? 0 : 1;
}

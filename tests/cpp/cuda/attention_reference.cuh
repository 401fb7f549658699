// What attention_test.cu is made of: guarded memory that host and device see, a paged cache full of NaN where no token
// is, and one row of attention in plain double precision.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <numeric>
#include <optional>
#include <random>
#include <set>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "punica/cuda.h"
#include "src/cuda/backend.h"
#include "tests/cpp/cuda/launches.h"

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

void check_cuda(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::printf("FAILED: %s\n", cudaGetErrorString(error));
  std::exit(1);
}

// Memory of the host and as much of the device, with a guard of 0xA5 bytes on either side. RUN copies all of them to
// the device before a call, and back afterwards; but scratch memory, which holds nothing before the call (and which
// initcheck is to know as that), keeps to itself, guards apart. For memcheck, which sees what lies outside allocations,
// the device has no guards.
bool small_suite = false;  // few and small cases, for compute-sanitizer

class Buffer {
 public:
  static constexpr int64_t kGuard = 4096;
  explicit Buffer(int64_t bytes, int64_t shift = 0, bool scratch = false)
      : bytes_(bytes), shift_(shift), scratch_(scratch), host_(static_cast<size_t>(bytes + shift + 2 * kGuard), 0xA5) {
    check_cuda(cudaMalloc(&device_, std::max<int64_t>(static_cast<int64_t>(host_.size()) - 2 * hidden_, 1)));
    all().insert(this);
  }
  ~Buffer() {
    all().erase(this);
    cudaFree(device_);
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  unsigned char* data() const { return const_cast<unsigned char*>(host_.data()) + kGuard + shift_; }
  // Where the device has what lies at `at` in data().
  unsigned char* device(const unsigned char* at) const { return device_ + (at - host_.data()) - hidden_; }
  unsigned char* device() const { return device(data()); }
  int64_t bytes() const { return bytes_; }
  bool guards_intact() const {
    for (int64_t i = 0; i < kGuard + shift_; ++i) {
      if (host_[static_cast<size_t>(i)] != 0xA5) return false;
    }
    for (int64_t i = 0; i < kGuard; ++i) {
      if (data()[bytes_ + i] != 0xA5) return false;
    }
    return true;
  }

  // By way of pinned memory: the host waits once, not for each copy, which takes long where processes share the device.
  static void upload_all() {
    if (on_device) return;
    unsigned char* pinned = reserve_pinned();
    each_part([&](unsigned char* host, unsigned char* device, int64_t bytes) {
      std::memcpy(pinned, host, static_cast<size_t>(bytes));
      check_cuda(cudaMemcpyAsync(device, pinned, static_cast<size_t>(bytes), cudaMemcpyHostToDevice));
      pinned += bytes;
    });
    on_device = true;
  }
  static void download_all() {
    if (!on_device) return;
    unsigned char *const begin = reserve_pinned(), *pinned = begin;
    each_part([&](unsigned char*, unsigned char* device, int64_t bytes) {
      check_cuda(cudaMemcpyAsync(pinned, device, static_cast<size_t>(bytes), cudaMemcpyDeviceToHost));
      pinned += bytes;
    });
    check_cuda(cudaDeviceSynchronize());
    pinned = begin;
    each_part([&](unsigned char* host, unsigned char*, int64_t bytes) {
      std::memcpy(host, pinned, static_cast<size_t>(bytes));
      pinned += bytes;
    });
    on_device = false;
  }

 private:
  inline static bool on_device = false;  // between the first launch of a call and run()
  static std::set<Buffer*>& all() {
    static std::set<Buffer*> buffers;
    return buffers;
  }
  // Calls body(host, device, bytes) for what is copied.
  template <class Body>
  static void each_part(Body body) {
    for (Buffer* buffer : all()) {
      const int64_t size = static_cast<int64_t>(buffer->host_.size()), hidden = buffer->hidden_;
      const auto part = [&](int64_t begin, int64_t end) {
        if (end > begin) body(buffer->host_.data() + begin, buffer->device_ + begin - hidden, end - begin);
      };
      if (!buffer->scratch_) {
        part(hidden, size - hidden);
      } else {
        part(hidden, kGuard);
        part(size - kGuard, size - hidden);
      }
    }
  }
  // As much as all parts take. Nothing is in flight.
  static unsigned char* reserve_pinned() {
    static unsigned char* memory = nullptr;
    static int64_t size = 0;
    int64_t wanted = 0;
    each_part([&](unsigned char*, unsigned char*, int64_t bytes) { wanted += bytes; });
    if (wanted > size) {
      check_cuda(cudaFreeHost(memory));
      size = 2 * wanted;
      check_cuda(cudaMallocHost(&memory, static_cast<size_t>(size)));
    }
    return memory;
  }

  const int64_t bytes_, shift_, hidden_ = small_suite ? kGuard : 0;  // of either guard, what the device does not have
  const bool scratch_;
  std::vector<unsigned char> host_;
  unsigned char* device_ = nullptr;
};

// The end of a call of the library, whose launches came after Buffer::upload_all() (set_before_launch).
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
  Buffer::download_all();
}

const bool before_launch_is_set = [] {
  set_before_launch(Buffer::upload_all);
  return true;
}();

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
// So many normal numbers in a row, from anywhere in a table of them: each anew takes most of a large case's time.
const unsigned char* normals(DType dtype, int64_t count) {
  constexpr int64_t kTable = int64_t{1} << 18;
  static std::vector<unsigned char> tables[3];
  std::vector<unsigned char>& table = tables[dtype == DType::kFloat32 ? 0 : dtype == DType::kFloat16 ? 1 : 2];
  const int64_t item = static_cast<int64_t>(dtype_size(dtype));
  if (table.empty()) {
    table.resize(static_cast<size_t>(kTable * item));
    for (int64_t i = 0; i < kTable; ++i) set(table.data() + i * item, dtype, normal());
  }
  return table.data() + static_cast<int64_t>(random_bits() % static_cast<uint32_t>(kTable - count)) * item;
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
  void randomize() {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t h = 0; h < heads; ++h) std::memcpy(at(r, h), normals(dtype, dim), static_cast<size_t>(dim * item));
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
  TensorView view(int64_t first = 0, int64_t last = -1) const {
    const int64_t count = (last < 0 ? rows : last) - first;
    return {buffer.device(at(first)), dtype, {DeviceType::kCuda, 0}, 3, {count, heads, dim}, {stride, dim, 1}};
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
    return {buffer.device(), sizeof(T) == 8 ? DType::kInt64 : DType::kInt32, {DeviceType::kCuda, 0}, 1, {count}, {1}};
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
  std::vector<int64_t> addresses;  // of pages, on the device
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
    for (const int64_t page : order) addresses.push_back(reinterpret_cast<int64_t>(pool.device() + page * page_bytes));
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
    return pool.data() + (page - reinterpret_cast<int64_t>(pool.device())) +
           (((layer * 2 + part) * c.kv_heads + head) * c.page_size * c.dim + t % c.page_size * c.dim + d) * item;
  }
  void randomize() {
    for (size_t i = 0; i < kv_len.size(); ++i) {
      for (int64_t t = 0; t < kv_len[i]; ++t) {
        for (int64_t part = 0; part < 2; ++part) {
          for (int64_t head = 0; head < c.kv_heads; ++head) {
            std::memcpy(at(static_cast<int64_t>(i), t, part, head), normals(c.dtype, c.dim),
                        static_cast<size_t>(c.dim * item));
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
    p.lse = {lse->device(), DType::kFloat32, {DeviceType::kCuda, 0}, 2, {q.rows, q.heads}, {q.heads, 1}};
  }
  p.sm_scale = c.sm_scale;
  p.rope_theta = c.theta;
  p.rope_scale = c.rope_scale;
  p.window_left = c.window;
  p.logits_soft_cap = c.cap;
  return p;
}

TensorView workspace(const Buffer& buffer) {
  return {buffer.device(), DType::kUInt8, {DeviceType::kCuda, 0}, 1, {buffer.bytes()}, {1}};
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

// A sequence's keys, rotated if the case says so, and values in double precision. Each is made when it is first asked
// for: it serves all rows, and all heads of a group.
class Tokens {
 public:
  using Place = std::function<const unsigned char*(int64_t t, int64_t part, int64_t head)>;
  Tokens(const Case& a_case, Place place) : c_(a_case), place_(std::move(place)) {}

  const std::vector<double>& get(int64_t t, int64_t part, int64_t head) {
    std::vector<double>& token = tokens_[(t * 2 + part) * c_.kv_heads + head];
    if (token.empty()) {
      const unsigned char* const from = place_(t, part, head);
      const int64_t item = static_cast<int64_t>(dtype_size(c_.dtype));
      for (int64_t d = 0; d < c_.dim; ++d) token.push_back(::get(from + d * item, c_.dtype));
      if (part == 0 && c_.theta) rotate(token, static_cast<double>(t), c_);
    }
    return token;
  }

 private:
  const Case c_;
  const Place place_;
  std::unordered_map<int64_t, std::vector<double>> tokens_;
};

// One row of q at `position` of a sequence, all heads: is row r of o (and lse) right?
void check_row(const Case& c, Tokens& tokens, int64_t position, const Rows& q, const Rows& o, const Buffer* lse,
               int64_t row, const std::string& what) {
  const int64_t heads = c.kv_heads * c.group;
  const int64_t begin = c.window < 0 || c.window >= position ? 0 : position - c.window;
  const double scale = c.sm_scale.value_or(1.0 / std::sqrt(static_cast<double>(c.dim)));
  std::vector<double> exact(static_cast<size_t>(heads * c.dim)), terms(exact.size());
  // Tensor cores: weights and rotated q and k are rounded to the type.
  const double unit = c.dtype == DType::kFloat32 ? 0 : c.dtype == DType::kFloat16 ? 0x1p-11 : 0x1p-8;
  std::vector<double> rounding(static_cast<size_t>(heads), unit + 4 * 0x1p-24);
  std::vector<double> lse_rounding(static_cast<size_t>(heads), 0.0);
  for (int64_t head = 0; head < heads; ++head) {
    double log_sum = -INFINITY;
    if (position >= 0) {
      std::vector<double> query(static_cast<size_t>(c.dim)), scores;
      for (int64_t d = 0; d < c.dim; ++d) query[static_cast<size_t>(d)] = get(q.at(row, head, d), c.dtype);
      if (c.theta) rotate(query, static_cast<double>(position), c);
      double top = -INFINITY, sum = 0, largest_product = 0;
      for (int64_t t = begin; t <= position; ++t) {
        const std::vector<double>& key = tokens.get(t, 0, head / c.group);
        double s = scale * std::inner_product(query.begin(), query.end(), key.begin(), 0.0), products = 0;
        for (size_t d = 0; d < key.size(); ++d) products += std::abs(query[d] * key[d]);
        largest_product = std::max(largest_product, std::abs(scale) * products);
        if (c.cap > 0) s = c.cap * std::tanh(s / c.cap);
        scores.push_back(s);
        top = std::max(top, s);
      }
      for (double& s : scores) sum += s = std::exp(s - top);
      if (unit == 0) {
        // A score is a sum too, off by 4 * 2^-24 of its |terms|; a cap is computed in float32 itself. So each weight is
        // off by a factor of at most exp(2 * shift). Beside tensor cores' rounding that is nothing.
        const double shift = 4 * 0x1p-24 * (largest_product + c.cap);
        rounding[static_cast<size_t>(head)] += std::exp(2 * shift) - 1;
      } else if (c.theta) {
        const double shift = 2.1 * unit * largest_product;  // of a score
        rounding[static_cast<size_t>(head)] += std::exp(2 * shift) - 1;
        lse_rounding[static_cast<size_t>(head)] = shift / std::log(2.0);
      }
      log_sum = (top + std::log(sum)) / std::log(2.0);
      for (int64_t t = begin; t <= position; ++t) {
        const std::vector<double>& value = tokens.get(t, 1, head / c.group);
        const double p = scores[static_cast<size_t>(t - begin)] / sum;
        for (size_t d = 0; d < value.size(); ++d) {
          exact[static_cast<size_t>(head * c.dim) + d] += p * value[d];
          terms[static_cast<size_t>(head * c.dim) + d] += p * std::abs(value[d]);
        }
      }
    }
    if (lse != nullptr) {
      const double got = reinterpret_cast<const float*>(lse->data())[row * heads + head];
      if (std::isinf(log_sum)) {
        EXPECT(got == -INFINITY, what + " lse of a row that sees nothing");
      } else {
        const double error = std::abs(got - log_sum) /
                             (2e-5 * std::max(1.0, std::abs(log_sum)) + lse_rounding[static_cast<size_t>(head)]);
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
    const double tolerance =
        rtol * std::abs(exact[i]) + rtol / 16 * largest + rounding[i / static_cast<size_t>(c.dim)] * terms[i];
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

}  // namespace

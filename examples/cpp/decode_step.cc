// One decode step of a one-layer model for three requests, two of them with a LoRA adapter on the query projection,
// with the C++ core alone: no torch, no Python.
//
//   rms_norm -> projections (+ LoRA: dispatch_bgmv twice) -> append_kv -> batch_decode
//
// Each request's past lies in pages of a pool, written by init_kv. The result is compared with a plain double-precision
// computation that knows nothing of pages or batches; the program returns 1 if they differ.
#include <algorithm>
#include <cinttypes>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <initializer_list>
#include <numeric>
#include <random>
#include <vector>

#include "punica/attention.h"
#include "punica/kv_cache.h"
#include "punica/lora.h"
#include "punica/norm.h"

namespace {

constexpr int64_t kHidden = 64;
constexpr int64_t kQueryHeads = 4;
constexpr int64_t kKvHeads = 2;
constexpr int64_t kHeadDim = 16;
constexpr int64_t kPageSize = 4;
constexpr int64_t kRank = 8;
constexpr float kLoraScale = 2.0f;
constexpr float kEpsilon = 1e-6f;

const std::vector<int64_t> kPastTokens = {3, 8, 13};  // of each request, before this step
const std::vector<int64_t> kAdapters = {0, 1, -1};    // of each request; -1: none

std::mt19937 random_bits(7);

std::vector<float> random_floats(int64_t count, float scale) {
  std::normal_distribution<float> normal(0.0f, scale);
  std::vector<float> values(count);
  for (float& value : values) value = normal(random_bits);
  return values;
}

punica::DType dtype_of(float) { return punica::DType::kFloat32; }
punica::DType dtype_of(int32_t) { return punica::DType::kInt32; }
punica::DType dtype_of(int64_t) { return punica::DType::kInt64; }

// A dense tensor over memory that a vector owns.
template <class T>
punica::TensorView view(const std::vector<T>& values, std::initializer_list<int64_t> shape) {
  punica::TensorView tensor;
  tensor.data = const_cast<T*>(values.data());
  tensor.dtype = dtype_of(T());
  tensor.rank = static_cast<int32_t>(shape.size());
  std::copy(shape.begin(), shape.end(), tensor.shape);
  int64_t stride = 1;
  for (int i = tensor.rank - 1; i >= 0; --i) {
    tensor.stride[i] = stride;
    stride *= tensor.shape[i];
  }
  return tensor;
}

bool succeeded(const punica::Status& status) {
  if (!status.ok()) std::fprintf(stderr, "%s\n", status.message().c_str());
  return status.ok();
}

// y [rows, h_out] = x [rows, h_in] @ w.T, w [h_out, h_in]. The base model's projections are not punica's business.
std::vector<float> project(const std::vector<float>& w, const std::vector<float>& x, int64_t h_out, int64_t h_in) {
  const int64_t rows = static_cast<int64_t>(x.size()) / h_in;
  std::vector<float> y(rows * h_out);
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t i = 0; i < h_out; ++i) {
      y[row * h_out + i] = std::inner_product(&w[i * h_in], &w[i * h_in] + h_in, &x[row * h_in], 0.0f);
    }
  }
  return y;
}

struct Adapter {
  std::vector<float> a = random_floats(kRank * kHidden, 0.1f);                 // [1, rank, hidden]
  std::vector<float> b = random_floats(kQueryHeads * kHeadDim * kRank, 0.1f);  // [1, query heads * head_dim, rank]
};

struct Model {
  std::vector<float> norm_weight = random_floats(kHidden, 1.0f);
  std::vector<float> w_q = random_floats(kQueryHeads * kHeadDim * kHidden, 0.2f);
  std::vector<float> w_k = random_floats(kKvHeads * kHeadDim * kHidden, 0.2f);
  std::vector<float> w_v = random_floats(kKvHeads * kHeadDim * kHidden, 0.2f);
  Adapter adapters[2];
};

// What the step computes for one request whose whole history (the new token last) is `tokens` [length, hidden].
std::vector<double> expected(const Model& model, const std::vector<float>& tokens, int64_t adapter) {
  const auto matvec = [](const std::vector<float>& w, const std::vector<double>& x, int64_t h_out) {
    std::vector<double> y(h_out);
    const int64_t h_in = static_cast<int64_t>(x.size());
    for (int64_t i = 0; i < h_out; ++i) y[i] = std::inner_product(x.begin(), x.end(), &w[i * h_in], 0.0);
    return y;
  };
  const int64_t length = static_cast<int64_t>(tokens.size()) / kHidden;
  std::vector<std::vector<double>> keys, values;
  std::vector<double> query;
  for (int64_t t = 0; t < length; ++t) {
    std::vector<double> x(&tokens[t * kHidden], &tokens[t * kHidden] + kHidden);
    const double mean = std::inner_product(x.begin(), x.end(), x.begin(), 0.0) / kHidden;
    for (int64_t i = 0; i < kHidden; ++i) x[i] *= model.norm_weight[i] / std::sqrt(mean + kEpsilon);
    keys.push_back(matvec(model.w_k, x, kKvHeads * kHeadDim));
    values.push_back(matvec(model.w_v, x, kKvHeads * kHeadDim));
    query = matvec(model.w_q, x, kQueryHeads * kHeadDim);
    if (adapter >= 0) {
      const Adapter& lora = model.adapters[adapter];
      const std::vector<double> delta = matvec(lora.b, matvec(lora.a, x, kRank), kQueryHeads * kHeadDim);
      for (size_t i = 0; i < query.size(); ++i) query[i] += kLoraScale * delta[i];
    }
  }
  std::vector<double> output(kQueryHeads * kHeadDim, 0.0);
  for (int64_t head = 0; head < kQueryHeads; ++head) {
    const int64_t kv = head / (kQueryHeads / kKvHeads) * kHeadDim;
    const double* q = &query[head * kHeadDim];
    std::vector<double> weights(length);
    double sum = 0.0;
    for (int64_t t = 0; t < length; ++t) {
      weights[t] = std::exp(std::inner_product(q, q + kHeadDim, &keys[t][kv], 0.0) / std::sqrt(double{kHeadDim}));
      sum += weights[t];
    }
    for (int64_t t = 0; t < length; ++t) {
      for (int64_t d = 0; d < kHeadDim; ++d) output[head * kHeadDim + d] += weights[t] / sum * values[t][kv + d];
    }
  }
  return output;
}

std::vector<float> normalised(const Model& model, const std::vector<float>& x, bool& ok) {
  const int64_t rows = static_cast<int64_t>(x.size()) / kHidden;
  std::vector<float> y(x.size());
  punica::RmsNormParams norm;
  norm.output = view(y, {rows, kHidden});
  norm.input = view(x, {rows, kHidden});
  norm.weight = view(model.norm_weight, {kHidden});
  norm.epsilon = kEpsilon;
  ok = ok && succeeded(punica::rms_norm(norm, {}));
  return y;
}

}  // namespace

int main() {
  const Model model;
  const punica::Context context;
  const int64_t batch = static_cast<int64_t>(kPastTokens.size());
  bool ok = true;

  // The pool of pages, and the table that says which page belongs to whom. Pages are handed out from the back, to show
  // that their order in memory does not matter.
  std::vector<int32_t> kv_indptr = {0}, last_page_offset, seqlen_indptr = {0};
  for (const int64_t past : kPastTokens) {
    const int64_t length = past + 1;  // with room for the token of this step
    const int64_t pages = (length + kPageSize - 1) / kPageSize;
    kv_indptr.push_back(static_cast<int32_t>(kv_indptr.back() + pages));
    last_page_offset.push_back(static_cast<int32_t>(length - (pages - 1) * kPageSize));
    seqlen_indptr.push_back(static_cast<int32_t>(seqlen_indptr.back() + length));
  }
  const int64_t num_pages = kv_indptr.back();
  const int64_t page_floats = punica::PageShape{1, kKvHeads, kPageSize, kHeadDim}.num_elements();
  // One page more than needed leaves room to align the first; page_floats is a multiple of the alignment.
  std::vector<float> pool((num_pages + 1) * page_floats);
  const auto alignment = static_cast<uintptr_t>(punica::kPageAlignment);
  const uintptr_t first_page = (reinterpret_cast<uintptr_t>(pool.data()) + alignment - 1) / alignment * alignment;
  std::vector<int64_t> kv_ptrs;
  for (int64_t page = num_pages - 1; page >= 0; --page) {
    kv_ptrs.push_back(static_cast<int64_t>(first_page + page * page_floats * sizeof(float)));
  }
  punica::PagedKv kv;
  kv.kv_ptrs = view(kv_ptrs, {num_pages});
  kv.kv_indptr = view(kv_indptr, {batch + 1});
  kv.last_page_offset = view(last_page_offset, {batch});
  kv.num_layers = 1;
  kv.num_kv_heads = kKvHeads;
  kv.page_size = kPageSize;

  // Prefill: keys and values of all tokens of every request. The newest token's are overwritten with NaN first, so that
  // only append_kv, below, can make the result right.
  const int64_t num_tokens = seqlen_indptr.back();
  const std::vector<float> tokens = random_floats(num_tokens * kHidden, 1.0f);
  const std::vector<float> normed_tokens = normalised(model, tokens, ok);
  std::vector<float> k = project(model.w_k, normed_tokens, kKvHeads * kHeadDim, kHidden);
  std::vector<float> v = project(model.w_v, normed_tokens, kKvHeads * kHeadDim, kHidden);
  std::vector<float> newest;
  for (int64_t i = 0; i < batch; ++i) {
    const int64_t last = seqlen_indptr[i + 1] - 1;
    newest.insert(newest.end(), &tokens[last * kHidden], &tokens[last * kHidden] + kHidden);
    std::fill_n(&k[last * kKvHeads * kHeadDim], kKvHeads * kHeadDim, NAN);
    std::fill_n(&v[last * kKvHeads * kHeadDim], kKvHeads * kHeadDim, NAN);
  }
  punica::InitKvParams init;
  init.kv = kv;
  init.k = view(k, {num_tokens, kKvHeads, kHeadDim});
  init.v = view(v, {num_tokens, kKvHeads, kHeadDim});
  init.seqlen_indptr = view(seqlen_indptr, {batch + 1});
  ok = ok && succeeded(punica::init_kv(init, context));

  // The decode step: one new token a request.
  const std::vector<float> x = normalised(model, newest, ok);
  std::vector<float> q = project(model.w_q, x, kQueryHeads * kHeadDim, kHidden);

  // LoRA: two products whose weights differ from row to row. `low_rank` starts at zero, for both add to their output.
  std::vector<int64_t> a_ptrs, b_ptrs;
  for (const Adapter& adapter : model.adapters) {
    a_ptrs.push_back(reinterpret_cast<int64_t>(adapter.a.data()));
    b_ptrs.push_back(reinterpret_cast<int64_t>(adapter.b.data()));
  }
  std::vector<float> low_rank(batch * kRank, 0.0f);
  punica::BgmvParams shrink;
  shrink.y = view(low_rank, {batch, kRank});
  shrink.x = view(x, {batch, kHidden});
  shrink.w_ptr = view(a_ptrs, {2});
  shrink.indices = view(kAdapters, {batch});
  punica::BgmvParams expand;
  expand.y = view(q, {batch, kQueryHeads * kHeadDim});
  expand.x = view(low_rank, {batch, kRank});
  expand.w_ptr = view(b_ptrs, {2});
  expand.indices = view(kAdapters, {batch});
  expand.scale = kLoraScale;
  ok = ok && succeeded(punica::dispatch_bgmv(shrink, context)) && succeeded(punica::dispatch_bgmv(expand, context));

  const std::vector<float> new_k = project(model.w_k, x, kKvHeads * kHeadDim, kHidden);
  const std::vector<float> new_v = project(model.w_v, x, kKvHeads * kHeadDim, kHidden);
  punica::AppendKvParams append;
  append.kv = kv;
  append.k = view(new_k, {batch, kKvHeads, kHeadDim});
  append.v = view(new_v, {batch, kKvHeads, kHeadDim});
  ok = ok && succeeded(punica::append_kv(append, context));

  std::vector<float> output(batch * kQueryHeads * kHeadDim);
  punica::BatchDecodeParams decode;
  decode.kv = kv;
  decode.o = view(output, {batch, kQueryHeads, kHeadDim});
  decode.q = view(q, {batch, kQueryHeads, kHeadDim});
  ok = ok && succeeded(punica::batch_decode(decode, context));
  if (!ok) return 1;

  std::printf("request  tokens  adapter  output[0..3]                             largest error\n");
  for (int64_t i = 0; i < batch; ++i) {
    const std::vector<float> history(&tokens[seqlen_indptr[i] * kHidden],
                                     &tokens[(seqlen_indptr[i + 1] - 1) * kHidden] + kHidden);
    const std::vector<double> want = expected(model, history, kAdapters[i]);
    const float* got = &output[i * kQueryHeads * kHeadDim];
    double error = 0.0;
    double largest = 0.0;
    for (size_t j = 0; j < want.size(); ++j) {
      const double difference = std::abs(got[j] - want[j]);
      error = std::max(error, std::isnan(difference) ? INFINITY : difference);
      largest = std::max(largest, std::abs(want[j]));
    }
    std::printf("%7" PRId64 " %7" PRId64 " %8" PRId64 "  %8.4f %9.4f %9.4f %9.4f  %13.1e\n", i, kPastTokens[i] + 1,
                kAdapters[i], got[0], got[1], got[2], got[3], error);
    ok = ok && error <= 1e-5 * largest;
  }
  std::printf(ok ? "equal to the plain computation within 1e-5\n" : "WRONG\n");
  return ok ? 0 : 1;
}

// The nine operations in plain double precision, one element at a time: what the kernels are compared with. Each
// function gives the exact row that a kernel rounds once; nothing here is fast, and nothing is shared with the kernels.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <vector>

#include "test_util.h"

namespace punica::testing {

// y + scale * W x, W [h_out, h_in] (or its transpose [h_in, h_out]) the given layer's matrix as rows of `weights`.
inline ExactRow lora_row(const std::vector<double>& y, const std::vector<double>& x, const Tensor& weights,
                         int64_t layer, bool transposed, double scale) {
  const auto h_out = static_cast<int64_t>(y.size());
  const auto h_in = static_cast<int64_t>(x.size());
  ExactRow exact{y, std::vector<double>(y.size())};
  for (int64_t i = 0; i < h_out; ++i) {
    double terms = 0.0;
    double sum = 0.0;
    for (int64_t j = 0; j < h_in; ++j) {
      const double w = weights.get(layer, transposed ? j * h_out + i : i * h_in + j);
      sum += w * x[j];
      terms += std::abs(w * x[j]);
    }
    exact.value[i] += scale * sum;
    exact.sum_of_terms[i] = std::abs(scale) * terms + std::abs(y[i]);
  }
  return exact;
}

// x * rsqrt(mean(x^2) + epsilon) * weight.
inline ExactRow rms_norm_row(const std::vector<double>& x, const std::vector<double>& weight, double epsilon) {
  double sum = 0.0;
  for (const double value : x) sum += value * value;
  const double factor = 1.0 / std::sqrt(sum / static_cast<double>(x.size()) + epsilon);
  ExactRow exact{x, {}};
  for (size_t i = 0; i < x.size(); ++i) exact.value[i] *= factor * weight[i];
  return exact;
}

// Pages of one cache, [L, 2, N, P, D] each, placed in memory of their own, and the tables.
struct Cache {
  DType dtype;
  int64_t num_layers, num_kv_heads, page_size, head_dim;
  std::vector<std::vector<Tensor>> pages;  // of each sequence
  std::vector<int64_t> kv_len;             // of each sequence; 0: no pages
  std::vector<int64_t> kv_ptrs;
  std::vector<int32_t> kv_indptr, last_page_offset;

  Cache(DType type, int64_t layers, int64_t heads, int64_t tokens_a_page, int64_t dim, std::vector<int64_t> lengths);
  // Every element that belongs to a token, of every layer; the rest of the last pages stays NaN.
  void randomize(std::mt19937& random);
  // Places of token `position` in sequence i: the row `0` of a page tensor is flat.
  int64_t offset(int64_t position, int64_t layer, int part, int64_t head) const {
    return (((layer * 2 + part) * num_kv_heads + head) * page_size + position % page_size) * head_dim;
  }
  const Tensor& page(int64_t i, int64_t position) const { return pages[i][position / page_size]; }
};

struct AttentionOptions {
  std::optional<double> sm_scale, rope_theta;
  double rope_scale = 1.0;
  int64_t window_left = -1;
  double logits_soft_cap = 0.0;
};

// Llama's halves: pairs (d, d + D/2) turned by position / rope_scale * theta^(-2 d / D).
inline void rotate(double* x, int64_t head_dim, double position, double theta, double rope_scale) {
  const int64_t half = head_dim / 2;
  for (int64_t d = 0; d < half; ++d) {
    const double angle =
        position / rope_scale * std::pow(theta, -2.0 * static_cast<double>(d) / static_cast<double>(head_dim));
    const double a = x[d];
    const double b = x[d + half];
    x[d] = a * std::cos(angle) - b * std::sin(angle);
    x[d + half] = b * std::cos(angle) + a * std::sin(angle);
  }
}

struct ExactAttention {
  ExactRow o;               // [H * D]
  std::vector<double> lse;  // [H], base 2
};

// The query of sequence i at `position`, q [H * D].
inline ExactAttention attention_row(const Cache& cache, int64_t i, int64_t layer, int64_t position,
                                    std::vector<double> q, const AttentionOptions& options) {
  const int64_t dim = cache.head_dim;
  const int64_t num_heads = static_cast<int64_t>(q.size()) / dim;
  const int64_t group = num_heads / cache.num_kv_heads;
  const double scale = options.sm_scale.value_or(1.0 / std::sqrt(static_cast<double>(dim)));
  const int64_t first = options.window_left < 0 ? 0 : std::max<int64_t>(0, position - options.window_left);
  ExactAttention exact{{std::vector<double>(q.size()), std::vector<double>(q.size())},
                       std::vector<double>(num_heads, -INFINITY)};
  if (position < first || cache.kv_len[i] == 0) return exact;
  for (int64_t head = 0; head < num_heads; ++head) {
    double* query = &q[head * dim];
    if (options.rope_theta) {
      rotate(query, dim, static_cast<double>(position), *options.rope_theta, options.rope_scale);
    }
    std::vector<double> scores;
    for (int64_t t = first; t <= position; ++t) {
      std::vector<double> key(dim);
      for (int64_t d = 0; d < dim; ++d) {
        key[d] = cache.page(i, t).get(0, cache.offset(t, layer, 0, head / group) + d);
      }
      if (options.rope_theta) {
        rotate(key.data(), dim, static_cast<double>(t), *options.rope_theta, options.rope_scale);
      }
      double score = 0.0;
      for (int64_t d = 0; d < dim; ++d) score += query[d] * key[d];
      score *= scale;
      const double cap = options.logits_soft_cap;
      scores.push_back(cap > 0.0 ? cap * std::tanh(score / cap) : score);
    }
    const double largest = *std::max_element(scores.begin(), scores.end());
    double sum = 0.0;
    for (const double score : scores) sum += std::exp(score - largest);
    exact.lse[head] = (largest + std::log(sum)) / std::log(2.0);
    for (int64_t t = first; t <= position; ++t) {
      const double p = std::exp(scores[t - first] - largest) / sum;
      for (int64_t d = 0; d < dim; ++d) {
        const double v = cache.page(i, t).get(0, cache.offset(t, layer, 1, head / group) + d);
        exact.o.value[head * dim + d] += p * v;
        exact.o.sum_of_terms[head * dim + d] += p * std::abs(v);
      }
    }
  }
  return exact;
}

}  // namespace punica::testing

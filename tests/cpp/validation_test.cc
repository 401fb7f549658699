// Every broken call is refused by name, and writes nothing. Each test starts from a valid call, breaks one thing, and
// expects the message to name the operation and what was broken.
#include <cmath>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "punica/attention.h"
#include "punica/kv_cache.h"
#include "punica/lora.h"
#include "punica/norm.h"
#include "reference.h"
#include "test_util.h"

namespace punica::testing {
namespace {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr double kInf = std::numeric_limits<double>::infinity();

template <class Params>
struct Break {
  const char* word;  // must be in the message, beside the operation's name
  std::function<void(Params&)> apply;
};

::testing::AssertionResult refused(const Status& status, const std::string& op, const std::string& word) {
  if (status.ok()) return ::testing::AssertionFailure() << op << " accepted a broken " << word;
  if (status.code() != StatusCode::kInvalidArgument) {
    return ::testing::AssertionFailure() << "wrong kind of error: " << status.message();
  }
  if (!status.message().starts_with(op + ": ")) {
    return ::testing::AssertionFailure() << "does not name the operation: " << status.message();
  }
  if (status.message().find(word) == std::string::npos) {
    return ::testing::AssertionFailure() << "does not name " << word << ": " << status.message();
  }
  return ::testing::AssertionSuccess();
}

// What is wrong with a tensor argument whatever the operation: `tensor` gives it in the params.
template <class Params>
std::vector<Break<Params>> broken_tensor(const char* name, TensorView& (*tensor)(Params&)) {
  return {
      {name, [=](Params& p) { tensor(p).dtype = DType::kInt8; }},
      {name, [=](Params& p) { tensor(p).dtype = DType::kFloat64; }},
      {name, [=](Params& p) { tensor(p).device = {DeviceType::kCuda, 0}; }},
      {name, [=](Params& p) { tensor(p).device = {DeviceType::kOther, 0}; }},
      {name, [=](Params& p) { tensor(p).rank = -1; }},
      {name, [=](Params& p) { tensor(p).rank += 1; }},
      {name, [=](Params& p) { tensor(p).rank -= 1; }},
      {name, [=](Params& p) { tensor(p).stride[tensor(p).rank - 1] = 2; }},
      {name, [=](Params& p) { tensor(p).data = nullptr; }},
      {name, [=](Params& p) { tensor(p).data = tensor(p).template as<char>() + 1; }},
  };
}

template <class Params>
void expect_all_refused(const std::string& op, const Params& valid, Status (*run)(const Params&, const Context&),
                        const std::vector<Break<Params>>& breaks, const std::vector<Tensor>& outputs) {
  std::vector<Tensor> before;
  for (const Tensor& output : outputs) before.push_back(output.clone());
  for (size_t i = 0; i < breaks.size(); ++i) {
    Params broken = valid;
    breaks[i].apply(broken);
    EXPECT_TRUE(refused(run(broken, {}), op, breaks[i].word)) << "number " << i << " (" << breaks[i].word << ")";
  }
  for (size_t i = 0; i < outputs.size(); ++i) EXPECT_TRUE(outputs[i].same_bits(before[i])) << "an output was written";
  EXPECT_TRUE(succeeded(run(valid, {})));  // so that the test did start from a valid call
}

// A dense tensor of another head_dim over the same memory.
void set_head_dim(TensorView& tensor, int64_t head_dim) {
  tensor.shape[2] = head_dim;
  tensor.stride[1] = head_dim;
  tensor.stride[0] = tensor.shape[1] * head_dim;
}

template <class Params>
void append(std::vector<Break<Params>>& all, const std::vector<Break<Params>>& more) {
  all.insert(all.end(), more.begin(), more.end());
}

TEST(Validation, Bgmv) {
  std::mt19937 random(41);
  Tensor y(DType::kFloat16, {3, 8});
  Tensor x(DType::kFloat16, {3, 6});
  Tensor w(DType::kFloat16, {1, 48});
  y.randomize(random);
  x.randomize(random);
  w.randomize(random);
  const Tensor w_ptr = Tensor::int64({w.address(), w.address()});
  const Tensor indices = Tensor::int64({0, 1, -1});
  const Tensor too_large = Tensor::int64({0, 2, -1});
  const Tensor null = Tensor::int64({w.address(), 0});
  const Tensor odd = Tensor::int64({w.address() + 1, w.address()});
  BgmvParams p;
  p.y = y.view();
  p.x = x.view();
  p.w_ptr = w_ptr.view();
  p.indices = indices.view();
  using P = BgmvParams;
  std::vector<Break<P>> breaks = {
      {"x", [](P& q) { q.x.shape[0] = 2; }},
      {"indices", [](P& q) { q.indices.shape[0] = 2; }},
      {"x", [](P& q) { q.x.dtype = DType::kBFloat16; }},
      {"y", [](P& q) { q.y.stride[0] = 7; }},
      {"layer_idx", [](P& q) { q.layer_idx = -1; }},
      {"layer_idx", [](P& q) { q.layer_idx = std::numeric_limits<int64_t>::max(); }},
      {"scale", [](P& q) { q.scale = static_cast<float>(kNan); }},
      {"scale", [](P& q) { q.scale = static_cast<float>(kInf); }},
      {"overlap", [](P& q) { q.x.data = q.y.data; }},
      {"indices[1]", [&](P& q) { q.indices = too_large.view(); }},
      {"w_ptr[1]", [&](P& q) { q.w_ptr = null.view(); }},
      {"w_ptr[0]", [&](P& q) { q.w_ptr = odd.view(); }},
  };
  append(breaks, broken_tensor<P>("y", [](P& q) -> TensorView& { return q.y; }));
  append(breaks, broken_tensor<P>("x", [](P& q) -> TensorView& { return q.x; }));
  append(breaks, broken_tensor<P>("w_ptr", [](P& q) -> TensorView& { return q.w_ptr; }));
  append(breaks, broken_tensor<P>("indices", [](P& q) -> TensorView& { return q.indices; }));
  expect_all_refused<P>("dispatch_bgmv", p, dispatch_bgmv, breaks, {y});
}

void check_sgmv(SgmvWeights order, const std::string& op) {
  std::mt19937 random(42);
  Tensor y(DType::kBFloat16, {9, 8});
  Tensor x(DType::kBFloat16, {9, 6});
  Tensor w(DType::kBFloat16, {1, 48});
  y.randomize(random);
  x.randomize(random);
  w.randomize(random);
  const Tensor w_ptr = Tensor::int64({w.address(), w.address()});
  const Tensor s_start = Tensor::int32({0, 4});
  const Tensor s_end = Tensor::int32({4, 9});
  const Tensor backwards = Tensor::int32({4, 3});
  const Tensor beyond = Tensor::int32({4, 10});
  const Tensor negative = Tensor::int32({-1, 4});
  const Tensor overlapping = Tensor::int32({0, 3});
  const Tensor null = Tensor::int64({w.address(), 0});
  const Tensor odd = Tensor::int64({w.address() + 1, w.address()});
  const Tensor tmp(DType::kUInt8, {sgmv_cutlass_tmp_size(2)});
  SgmvParams p;
  p.weights = order;
  p.y = y.view();
  p.x = x.view();
  p.w_ptr = w_ptr.view();
  p.s_start = s_start.view();
  p.s_end = s_end.view();
  p.tmp = tmp.view();
  using P = SgmvParams;
  std::vector<Break<P>> breaks = {
      {"x", [](P& q) { q.x.shape[0] = 8; }},
      {"s_start", [](P& q) { q.s_start.shape[0] = 1; }},
      {"s_end", [](P& q) { q.s_end.shape[0] = 1; }},
      {"layer_idx", [](P& q) { q.layer_idx = -1; }},
      {"overlap", [](P& q) { q.x.data = q.y.data; }},
      {"tmp", [](P& q) { q.tmp.dtype = DType::kFloat32; }},
      {"tmp", [](P& q) { q.tmp.device = {DeviceType::kCuda, 0}; }},
      {"tmp", [](P& q) { q.tmp.data = nullptr; }},
      {"s_end[1]", [&](P& q) { q.s_end = backwards.view(); }},
      {"s_end[1]", [&](P& q) { q.s_end = beyond.view(); }},
      {"s_start[0]", [&](P& q) { q.s_start = negative.view(); }},
      {"overlap", [&](P& q) { q.s_start = overlapping.view(); }},
      {"w_ptr[1]", [&](P& q) { q.w_ptr = null.view(); }},
      {"w_ptr[0]", [&](P& q) { q.w_ptr = odd.view(); }},
  };
  if (order == SgmvWeights::kInOut) breaks.push_back({"tmp", [](P& q) { q.tmp.shape[0] -= 1; }});
  append(breaks, broken_tensor<P>("y", [](P& q) -> TensorView& { return q.y; }));
  append(breaks, broken_tensor<P>("x", [](P& q) -> TensorView& { return q.x; }));
  append(breaks, broken_tensor<P>("w_ptr", [](P& q) -> TensorView& { return q.w_ptr; }));
  append(breaks, broken_tensor<P>("s_start", [](P& q) -> TensorView& { return q.s_start; }));
  append(breaks, broken_tensor<P>("s_end", [](P& q) -> TensorView& { return q.s_end; }));
  expect_all_refused<P>(op, p, sgmv, breaks, {y});

  // An empty segment may lie anywhere, and have no weights: callers fill tables of a fixed size up with -1, -1.
  const Tensor padded_start = Tensor::int32({-1, 4});
  const Tensor padded_end = Tensor::int32({-1, 9});
  const Tensor padded_ptr = Tensor::int64({0, w.address()});
  p.s_start = padded_start.view();
  p.s_end = padded_end.view();
  p.w_ptr = padded_ptr.view();
  EXPECT_TRUE(succeeded(sgmv(p, {})));
}

TEST(Validation, SgmvShrink) { check_sgmv(SgmvWeights::kOutIn, "sgmv_shrink"); }
TEST(Validation, SgmvCutlass) { check_sgmv(SgmvWeights::kInOut, "sgmv_cutlass"); }

// Breaks that both attention operations and both cache writes share.
template <class P>
std::vector<Break<P>> broken_cache(const Tensor& misaligned, const Tensor& null) {
  std::vector<Break<P>> breaks = {
      {"layer_idx", [](P& q) { q.kv.layer_idx = -1; }},
      {"layer_idx", [](P& q) { q.kv.layer_idx = q.kv.num_layers; }},
      {"num_layers", [](P& q) { q.kv.num_layers = 0; }},
      {"num_kv_heads", [](P& q) { q.kv.num_kv_heads = 0; }},
      {"num_kv_heads", [](P& q) { q.kv.num_kv_heads = 3; }},
      {"page_size", [](P& q) { q.kv.page_size = 0; }},
      {"page", [](P& q) { q.kv.page_size = std::numeric_limits<int64_t>::max() / 4; }},
      {"last_page_offset[0]", [](P& q) { q.kv.page_size -= 1; }},
      {"kv_indptr", [](P& q) { q.kv.kv_indptr.shape[0] -= 1; }},
      {"kv_ptrs", [](P& q) { q.kv.kv_ptrs.shape[0] -= 1; }},
      {"kv_ptrs", [&misaligned](P& q) { q.kv.kv_ptrs = misaligned.view(); }},
      {"kv_ptrs", [&null](P& q) { q.kv.kv_ptrs = null.view(); }},
  };
  append(breaks, broken_tensor<P>("kv_ptrs", [](P& q) -> TensorView& { return q.kv.kv_ptrs; }));
  append(breaks, broken_tensor<P>("kv_indptr", [](P& q) -> TensorView& { return q.kv.kv_indptr; }));
  append(breaks, broken_tensor<P>("last_page_offset", [](P& q) -> TensorView& { return q.kv.last_page_offset; }));
  return breaks;
}

// Two sequences, of one whole page (so that a smaller page_size breaks it) and of three.
struct Fixture {
  Cache cache{DType::kFloat32, 2, 2, 4, 8, {4, 10}};
  Tensor kv_ptrs, kv_indptr, last_page_offset, misaligned, null, descending;
  PagedKv kv;

  Fixture()
      : kv_ptrs(Tensor::int64(cache.kv_ptrs)),
        kv_indptr(Tensor::int32(cache.kv_indptr)),
        last_page_offset(Tensor::int32(cache.last_page_offset)),
        misaligned(kv_ptrs.clone()),
        null(kv_ptrs.clone()),
        descending(Tensor::int32({2, 1, 4})) {
    std::mt19937 random(43);
    cache.randomize(random);
    static_cast<int64_t*>(misaligned.data())[3] += 8;  // the last page: every operation looks at it
    static_cast<int64_t*>(null.data())[3] = 0;
    kv.kv_ptrs = kv_ptrs.view();
    kv.kv_indptr = kv_indptr.view();
    kv.last_page_offset = last_page_offset.view();
    kv.num_layers = 2;
    kv.num_kv_heads = 2;
    kv.page_size = 4;
  }
  std::vector<Tensor> pages() const {
    std::vector<Tensor> all = cache.pages[0];
    all.insert(all.end(), cache.pages[1].begin(), cache.pages[1].end());
    return all;
  }
};

template <class P>
std::vector<Break<P>> broken_attention(const Fixture& f) {
  std::vector<Break<P>> breaks = broken_cache<P>(f.misaligned, f.null);
  append(breaks, {
                     {"kv_indptr[1]", [&f](P& q) { q.kv.kv_indptr = f.descending.view(); }},
                     {"o", [](P& q) { q.o.shape[2] = 6; }},
                     {"o", [](P& q) { q.o.dtype = DType::kFloat16; }},
                     {"head_dim", [](P& q) { set_head_dim(q.q, 7), set_head_dim(q.o, 7); }},
                     {"head_dim", [](P& q) { set_head_dim(q.q, 258), set_head_dim(q.o, 258); }},
                     {"lse", [](P& q) { q.lse.dtype = DType::kFloat16; }},
                     {"lse", [](P& q) { q.lse.shape[1] = 3; }},
                     {"lse", [](P& q) { q.lse.data = nullptr; }},
                     {"sm_scale", [](P& q) { q.sm_scale = kNan; }},
                     {"rope_theta", [](P& q) { q.rope_theta = 0.0; }},
                     {"rope_theta", [](P& q) { q.rope_theta = -1e4; }},
                     {"rope_theta", [](P& q) { q.rope_theta = kInf; }},
                     {"rope_scale", [](P& q) { q.rope_scale = 0.0; }},
                     {"rope_scale", [](P& q) { q.rope_scale = kNan; }},
                     {"window_left", [](P& q) { q.window_left = -2; }},
                     {"logits_soft_cap", [](P& q) { q.logits_soft_cap = -1.0; }},
                     {"logits_soft_cap", [](P& q) { q.logits_soft_cap = kInf; }},
                     {"tmpbuf", [](P& q) { q.tmpbuf.dtype = DType::kFloat32; }},
                     {"overlap", [](P& q) { q.o.data = q.q.data; }},
                 });
  append(breaks, broken_tensor<P>("o", [](P& q) -> TensorView& { return q.o; }));
  append(breaks, broken_tensor<P>("q", [](P& q) -> TensorView& { return q.q; }));
  return breaks;
}

TEST(Validation, BatchDecode) {
  std::mt19937 random(44);
  const Fixture f;
  Tensor q(DType::kFloat32, {2, 4, 8});
  Tensor o(DType::kFloat32, {2, 4, 8});
  q.randomize(random);
  o.fill(5.0);
  const Tensor lse(DType::kFloat32, {2, 4});
  const Tensor tmpbuf(DType::kUInt8, {4096});
  using P = BatchDecodeParams;
  P p;
  p.kv = f.kv;
  p.o = o.view();
  p.q = q.view();
  p.lse = lse.view();
  p.tmpbuf = tmpbuf.view();
  ASSERT_LE(workspace_bytes(p), 4096);
  std::vector<Break<P>> breaks = broken_attention<P>(f);
  // B is the rows of q here.
  breaks.push_back({"last_page_offset", [](P& b) { b.kv.last_page_offset.shape[0] = 1; }});
  breaks.push_back({"o", [](P& b) { b.o.shape[0] = 1; }});
  expect_all_refused<P>("batch_decode", p, batch_decode, breaks, {o, lse});
}

TEST(Validation, BatchPrefill) {
  std::mt19937 random(45);
  const Fixture f;
  Tensor q(DType::kFloat32, {7, 4, 8});
  Tensor o(DType::kFloat32, {7, 4, 8});
  q.randomize(random);
  o.fill(5.0);
  const Tensor lse(DType::kFloat32, {7, 4});
  const Tensor tmpbuf(DType::kUInt8, {1 << 20});
  const Tensor qo_indptr = Tensor::int32({0, 2, 7});
  const Tensor beyond = Tensor::int32({0, 2, 8});
  const Tensor descending = Tensor::int32({0, 2, 1});
  const Tensor negative = Tensor::int32({-1, 2, 7});
  using P = BatchPrefillParams;
  P p;
  p.kv = f.kv;
  p.o = o.view();
  p.q = q.view();
  p.lse = lse.view();
  p.tmpbuf = tmpbuf.view();
  p.qo_indptr = qo_indptr.view();
  ASSERT_LE(workspace_bytes(p), 1 << 20);
  std::vector<Break<P>> breaks = broken_attention<P>(f);
  append(breaks, {
                     {"qo_indptr", [](P& b) { b.qo_indptr.shape[0] = 2; }},
                     {"qo_indptr[2]", [&](P& b) { b.qo_indptr = beyond.view(); }},
                     {"qo_indptr[2]", [&](P& b) { b.qo_indptr = descending.view(); }},
                     {"qo_indptr[0]", [&](P& b) { b.qo_indptr = negative.view(); }},
                 });
  append(breaks, broken_tensor<P>("qo_indptr", [](P& b) -> TensorView& { return b.qo_indptr; }));
  expect_all_refused<P>("batch_prefill", p, batch_prefill, breaks, {o, lse});
}

// A workspace that is too small: the message says how many bytes it takes.
TEST(Validation, WorkspaceSizes) {
  const Tensor none(DType::kUInt8, {0});
  const Fixture f;
  const Tensor q(DType::kFloat32, {2, 4, 8});
  const Tensor o(DType::kFloat32, {2, 4, 8});
  const Tensor qo_indptr = Tensor::int32({0, 1, 2});
  const auto check = [](const Status& status, const std::string& op, const char* name, int64_t bytes) {
    if (bytes == 0) {
      EXPECT_TRUE(succeeded(status));
      return;
    }
    EXPECT_TRUE(refused(status, op, name));
    EXPECT_TRUE(refused(status, op, std::to_string(bytes)));
  };
  BatchDecodeParams decode;
  decode.kv = f.kv;
  decode.o = o.view();
  decode.q = q.view();
  decode.tmpbuf = none.view();
  check(batch_decode(decode, {}), "batch_decode", "tmpbuf", workspace_bytes(decode));
  BatchPrefillParams prefill;
  static_cast<AttentionParams&>(prefill) = decode;
  prefill.qo_indptr = qo_indptr.view();
  check(batch_prefill(prefill, {}), "batch_prefill", "tmpbuf", workspace_bytes(prefill));
  SgmvParams cutlass;
  cutlass.weights = SgmvWeights::kInOut;
  const Tensor y(DType::kFloat32, {2, 8});
  const Tensor x(DType::kFloat32, {2, 8});
  const Tensor empty64 = Tensor::int64({});
  const Tensor empty32 = Tensor::int32({});
  cutlass.y = y.view();
  cutlass.x = x.view();
  cutlass.w_ptr = empty64.view();
  cutlass.s_start = cutlass.s_end = empty32.view();
  cutlass.tmp = none.view();
  EXPECT_GE(sgmv_cutlass_tmp_size(0), 1);
  check(sgmv(cutlass, {}), "sgmv_cutlass", "tmp", sgmv_cutlass_tmp_size(0));
}

TEST(Validation, InitKv) {
  std::mt19937 random(46);
  const Fixture f;
  Tensor k(DType::kFloat32, {9, 2, 8});
  Tensor v(DType::kFloat32, {9, 2, 8});
  k.randomize(random);
  v.randomize(random);
  const Tensor indptr = Tensor::int32({0, 4, 9});
  const Tensor beyond = Tensor::int32({0, 4, 10});
  const Tensor descending = Tensor::int32({0, 4, 3});
  const Tensor too_long = Tensor::int32({0, 5, 9});  // sequence 0 has room for 4
  using P = InitKvParams;
  P p;
  p.kv = f.kv;
  p.k = k.view();
  p.v = v.view();
  p.seqlen_indptr = indptr.view();
  std::vector<Break<P>> breaks = broken_cache<P>(f.misaligned, f.null);
  append(breaks, {
                     {"v", [](P& q) { q.v.shape[0] = 8; }},
                     {"v", [](P& q) { q.v.shape[2] = 6; }},
                     {"v", [](P& q) { q.v.dtype = DType::kFloat16; }},
                     {"head_dim", [](P& q) { set_head_dim(q.k, 7), set_head_dim(q.v, 7); }},
                     {"seqlen_indptr", [](P& q) { q.seqlen_indptr.shape[0] = 2; }},
                     {"seqlen_indptr[2]", [&](P& q) { q.seqlen_indptr = beyond.view(); }},
                     {"seqlen_indptr[2]", [&](P& q) { q.seqlen_indptr = descending.view(); }},
                     {"kv_len", [&](P& q) { q.seqlen_indptr = too_long.view(); }},
                 });
  append(breaks, broken_tensor<P>("k", [](P& q) -> TensorView& { return q.k; }));
  append(breaks, broken_tensor<P>("v", [](P& q) -> TensorView& { return q.v; }));
  append(breaks, broken_tensor<P>("seqlen_indptr", [](P& q) -> TensorView& { return q.seqlen_indptr; }));
  expect_all_refused<P>("init_kv", p, init_kv, breaks, f.pages());
}

TEST(Validation, AppendKv) {
  std::mt19937 random(47);
  const Fixture f;
  Tensor k(DType::kFloat32, {2, 2, 8});
  Tensor v(DType::kFloat32, {2, 2, 8});
  k.randomize(random);
  v.randomize(random);
  using P = AppendKvParams;
  P p;
  p.kv = f.kv;
  p.k = k.view();
  p.v = v.view();
  std::vector<Break<P>> breaks = broken_cache<P>(f.misaligned, f.null);
  breaks.push_back({"v", [](P& q) { q.v.shape[0] = 1; }});
  breaks.push_back({"last_page_offset", [](P& q) { q.kv.last_page_offset.shape[0] = 1; }});
  append(breaks, broken_tensor<P>("k", [](P& q) -> TensorView& { return q.k; }));
  append(breaks, broken_tensor<P>("v", [](P& q) -> TensorView& { return q.v; }));
  expect_all_refused<P>("append_kv", p, append_kv, breaks, f.pages());
}

TEST(Validation, RmsNorm) {
  std::mt19937 random(48);
  Tensor output(DType::kFloat16, {3, 8});
  Tensor input(DType::kFloat16, {3, 8});
  Tensor weight(DType::kFloat16, {8});
  Tensor residual(DType::kFloat16, {3, 8});
  input.randomize(random);
  weight.randomize(random);
  residual.randomize(random);
  using P = RmsNormParams;
  P p;
  p.output = output.view();
  p.input = input.view();
  p.weight = weight.view();
  p.residual = residual.view();
  std::vector<Break<P>> breaks = {
      {"input", [](P& q) { q.input.shape[0] = 2; }},
      {"input", [](P& q) { q.input.shape[1] = 7; }},
      {"weight", [](P& q) { q.weight.shape[0] = 7; }},
      {"weight", [](P& q) { q.weight.dtype = DType::kFloat32; }},
      {"residual", [](P& q) { q.residual.shape[0] = 2; }},
      {"residual", [](P& q) { q.residual.dtype = DType::kBFloat16; }},
      {"residual", [](P& q) { q.residual.data = nullptr; }},
      {"residual", [](P& q) { q.residual.device = {DeviceType::kCuda, 0}; }},
      {"epsilon", [](P& q) { q.epsilon = -1e-6f; }},
      {"epsilon", [](P& q) { q.epsilon = static_cast<float>(kNan); }},
      {"overlap", [](P& q) { q.weight.data = q.output.data; }},
      {"overlap", [](P& q) { q.residual.data = q.output.data; }},
      {"overlap", [](P& q) { q.input.data = q.output.as<uint16_t>() + 8; }},
  };
  append(breaks, broken_tensor<P>("output", [](P& q) -> TensorView& { return q.output; }));
  append(breaks, broken_tensor<P>("input", [](P& q) -> TensorView& { return q.input; }));
  append(breaks, broken_tensor<P>("weight", [](P& q) -> TensorView& { return q.weight; }));
  expect_all_refused<P>("rms_norm", p, rms_norm, breaks, {output, residual});
}

}  // namespace
}  // namespace punica::testing

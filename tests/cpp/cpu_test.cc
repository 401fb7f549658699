// The CPU backend's instruction sets and threads.
#include "punica/cpu.h"

#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <functional>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "punica/attention.h"
#include "punica/kv_cache.h"
#include "punica/lora.h"
#include "punica/norm.h"
#include "reference.h"
#include "test_util.h"

namespace punica::testing {
namespace {

std::string isa_in_use() {
  cpu::Isa isa;
  EXPECT_TRUE(succeeded(cpu::active_isa(&isa)));
  return cpu::isa_name(isa);
}

// All operations on one set of tensors, large enough to be worth several threads.
class Workload {
 public:
  explicit Workload(DType dtype, unsigned seed = 51)
      : random_(seed),
        cache_(dtype, 1, 2, 16, 64, {300, 17, 450}),
        kv_ptrs_(Tensor::int64(cache_.kv_ptrs)),
        kv_indptr_(Tensor::int32(cache_.kv_indptr)),
        offsets_(Tensor::int32(cache_.last_page_offset)),
        qo_indptr_(Tensor::int32({0, 40, 57, 130})),
        query_indices_(Tensor::int64({0, 1, 0, 1})),
        s_start_(Tensor::int32({0, 50})),
        s_end_(Tensor::int32({50, 130})),
        weights_(dtype, {2, 512 * 256}),
        decode_o_(dtype, {3, 4, 64}),
        prefill_o_(dtype, {130, 4, 64}),
        bgmv_y_(dtype, {4, 512}),
        shrink_y_(dtype, {130, 256}),
        cutlass_y_(dtype, {130, 512}),
        norm_y_(dtype, {130, 512}),
        decode_q_(dtype, {3, 4, 64}),
        prefill_q_(dtype, {130, 4, 64}),
        k_(dtype, {130, 2, 64}),
        v_(dtype, {130, 2, 64}),
        narrow_(dtype, {130, 256}),
        wide_(dtype, {130, 512}),
        norm_weight_(dtype, {512}) {
    cache_.randomize(random_);
    for (Tensor* tensor : {&weights_, &decode_q_, &prefill_q_, &k_, &v_, &narrow_, &wide_, &norm_weight_}) {
      tensor->randomize(random_, 0.5);
    }
    w_ptr_.push_back(Tensor::int64({weights_.address(), weights_.address() + weights_.columns() * item(dtype)}));
  }

  // The name of the operation, and one call of it.
  std::vector<std::pair<std::string, std::function<Status(const Context&)>>> operations() {
    return {
        {"dispatch_bgmv",
         [this](const Context& context) {
           BgmvParams p;
           p.y = bgmv_y_.view();
           p.x = narrow_.view();
           p.x.shape[0] = 4;
           p.w_ptr = w_ptr_[0].view();
           p.indices = query_indices_.view();
           return dispatch_bgmv(p, context);
         }},
        {"sgmv_shrink", [this](const Context& context) { return run_sgmv(SgmvWeights::kOutIn, context); }},
        {"sgmv_cutlass", [this](const Context& context) { return run_sgmv(SgmvWeights::kInOut, context); }},
        {"init_kv",
         [this](const Context& context) {
           InitKvParams p;
           p.kv = kv();
           p.k = k_.view();
           p.v = v_.view();
           p.seqlen_indptr = qo_indptr_.view();
           return init_kv(p, context);
         }},
        {"append_kv",
         [this](const Context& context) {
           AppendKvParams p;
           p.kv = kv();
           p.k = k_.view();
           p.v = v_.view();
           p.k.shape[0] = p.v.shape[0] = 3;
           return append_kv(p, context);
         }},
        {"batch_prefill",
         [this](const Context& context) {
           BatchPrefillParams p;
           p.kv = kv();
           p.o = prefill_o_.view();
           p.q = prefill_q_.view();
           p.qo_indptr = qo_indptr_.view();
           return batch_prefill(p, context);
         }},
        {"batch_decode",
         [this](const Context& context) {
           BatchDecodeParams p;
           p.kv = kv();
           p.o = decode_o_.view();
           p.q = decode_q_.view();
           return batch_decode(p, context);
         }},
        {"rms_norm",
         [this](const Context& context) {
           RmsNormParams p;
           p.output = norm_y_.view();
           p.input = wide_.view();
           p.weight = norm_weight_.view();
           return rms_norm(p, context);
         }},
    };
  }

  void run_all(const Context& context) {
    for (const auto& [name, run] : operations()) EXPECT_TRUE(succeeded(run(context))) << name;
  }

  bool same_results(const Workload& other) const {
    bool same = decode_o_.same_bits(other.decode_o_) && prefill_o_.same_bits(other.prefill_o_) &&
                bgmv_y_.same_bits(other.bgmv_y_) && shrink_y_.same_bits(other.shrink_y_) &&
                cutlass_y_.same_bits(other.cutlass_y_) && norm_y_.same_bits(other.norm_y_);
    for (size_t i = 0; i < cache_.pages.size(); ++i) {
      for (size_t page = 0; page < cache_.pages[i].size(); ++page) {
        same = same && cache_.pages[i][page].same_bits(other.cache_.pages[i][page]);
      }
    }
    return same;
  }

 private:
  static int64_t item(DType dtype) { return static_cast<int64_t>(dtype_size(dtype)); }

  Status run_sgmv(SgmvWeights order, const Context& context) {
    const bool shrink = order == SgmvWeights::kOutIn;
    SgmvParams p;
    p.weights = order;
    p.y = (shrink ? shrink_y_ : cutlass_y_).view();
    p.x = (shrink ? wide_ : narrow_).view();
    p.w_ptr = w_ptr_[0].view();
    p.s_start = s_start_.view();
    p.s_end = s_end_.view();
    return sgmv(p, context);
  }

  PagedKv kv() const {
    PagedKv kv;
    kv.kv_ptrs = kv_ptrs_.view();
    kv.kv_indptr = kv_indptr_.view();
    kv.last_page_offset = offsets_.view();
    kv.num_layers = 1;
    kv.num_kv_heads = 2;
    kv.page_size = 16;
    return kv;
  }

  std::mt19937 random_;
  Cache cache_;
  Tensor kv_ptrs_, kv_indptr_, offsets_, qo_indptr_, query_indices_, s_start_, s_end_;
  Tensor weights_;  // two adapters
  Tensor decode_o_, prefill_o_, bgmv_y_, shrink_y_, cutlass_y_, norm_y_;
  Tensor decode_q_, prefill_q_, k_, v_, narrow_, wide_, norm_weight_;
  std::vector<Tensor> w_ptr_;
};

// The set that PUNICA_ISA asks for is in use, and every kernel says that it was compiled for it. (Not the writes into
// the cache: they move bytes with memcpy.)
TEST(Isa, TheForcedOneRuns) {
  const char* forced = std::getenv("PUNICA_ISA");
  const std::string expected = forced != nullptr && *forced != '\0' ? forced : isa_in_use();
  EXPECT_EQ(isa_in_use(), expected);
  for (const DType dtype : kFloatTypes) {
    Workload workload(dtype);
    for (const auto& [name, run] : workload.operations()) {
      if (name == "init_kv" || name == "append_kv") continue;
      // On a thread of its own: what an operation before it left behind is not there.
      std::thread([&run = run, &name = name, &expected] {
        EXPECT_EQ(cpu::last_isa(), nullptr);
        EXPECT_TRUE(succeeded(run(threads(1)))) << name;
        const char* last = cpu::last_isa();
        EXPECT_EQ(last == nullptr ? "none" : std::string(last), expected) << name;
      }).join();
    }
  }
}

TEST(Threads, NumberDoesNotChangeBits) {
  for (const DType dtype : kFloatTypes) {
    Workload one(dtype);
    one.run_all(threads(1));
    for (const int count : {2, 3, 8}) {
      Workload many(dtype);
      many.run_all(threads(count));
      EXPECT_TRUE(many.same_results(one)) << dtype_name(dtype) << " with " << count << " threads";
    }
  }
}

TEST(Threads, SeveralCallersAtOnce) {
  Workload expected(DType::kFloat32);
  expected.run_all(threads(1));
  std::vector<std::thread> callers;
  std::vector<Workload> results;
  for (int i = 0; i < 4; ++i) results.emplace_back(DType::kFloat32);
  // A copy would share its tensors' memory, but not the parameters: those are made per call.
  for (Workload& result : results) callers.emplace_back([&result] { result.run_all(threads(2)); });
  for (std::thread& caller : callers) caller.join();
  for (const Workload& result : results) EXPECT_TRUE(result.same_results(expected));
}

#if !defined(__SANITIZE_THREAD__)  // ThreadSanitizer does not support threads in the child of a threaded process
TEST(Threads, WorkAfterFork) {
  Workload expected(DType::kFloat32);
  expected.run_all(threads(2));
  const pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    alarm(60);  // a pool that waits for threads that fork did not copy would hang
    Workload workload(DType::kFloat32);
    workload.run_all(threads(2));
    _exit(workload.same_results(expected) ? 0 : 1);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  Workload again(DType::kFloat32);
  again.run_all(threads(2));
  EXPECT_TRUE(again.same_results(expected));
}
#endif

}  // namespace
}  // namespace punica::testing

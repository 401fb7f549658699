// The page arithmetic that host and device code share, and the status type.
#include "punica/paged_kv.h"

#include <gtest/gtest.h>

#include <limits>

#include "punica/status.h"
#include "test_util.h"

namespace punica::testing {
namespace {

// Usable at compile time, as device code and static checks want.
static_assert(token_place(33, 16).page == 2 && token_place(33, 16).slot == 1);
static_assert(PageShape{2, 3, 16, 64}.num_elements() == 2 * 2 * 3 * 16 * 64);

TEST(PagedKv, OffsetsCoverThePageOnce) {
  const PageShape page{3, 2, 5, 4};
  int64_t next = 0;
  for (int64_t layer = 0; layer < page.num_layers; ++layer) {
    for (const KvPart part : {KvPart::kKey, KvPart::kValue}) {
      for (int64_t head = 0; head < page.num_kv_heads; ++head) {
        EXPECT_EQ(page.head_offset(layer, part, head), next);
        next += page.page_size * page.head_dim;
      }
    }
  }
  EXPECT_EQ(page.num_elements(), next);
}

TEST(PagedKv, OffsetsAre64Bit) {
  const PageShape page{200, 128, 4096, 256};
  EXPECT_EQ(page.num_elements(), int64_t{200} * 2 * 128 * 4096 * 256);
  EXPECT_GT(page.head_offset(199, KvPart::kValue, 127), std::numeric_limits<int32_t>::max());
}

void expect_sequence(const SequencePages& got, int64_t first_page, int64_t num_pages, int64_t kv_len) {
  EXPECT_EQ(got.first_page, first_page);
  EXPECT_EQ(got.num_pages, num_pages);
  EXPECT_EQ(got.kv_len, kv_len);
}

TEST(PagedKv, SequencePages) {
  expect_sequence(sequence_pages(3, 5, 4, 9, 16), 3, 2, 20);
  expect_sequence(sequence_pages(3, 5, 16, 9, 16), 3, 2, 32);
  expect_sequence(sequence_pages(0, 1, 1, 1, 1), 0, 1, 1);
  expect_sequence(sequence_pages(4, 4, 3, 9, 16), 0, 0, 0);  // no pages, whatever the offset says
}

TEST(PagedKv, MalformedSequencesAreEmptyOrClamped) {
  expect_sequence(sequence_pages(5, 3, 4, 9, 16), 0, 0, 0);
  expect_sequence(sequence_pages(3, 5, 0, 9, 16), 0, 0, 0);
  expect_sequence(sequence_pages(3, 5, -1, 9, 16), 0, 0, 0);
  expect_sequence(sequence_pages(3, 5, 17, 9, 16), 0, 0, 0);
  expect_sequence(sequence_pages(-4, 2, 3, 9, 16), 0, 2, 19);
  expect_sequence(sequence_pages(7, 100, 3, 9, 16), 7, 2, 19);
  expect_sequence(sequence_pages(50, 100, 3, 9, 16), 0, 0, 0);
  expect_sequence(sequence_pages(-100, -50, 3, 9, 16), 0, 0, 0);
  const int64_t large = std::numeric_limits<int32_t>::max();
  expect_sequence(sequence_pages(-large, large, 1, 2, large), 0, 2, large + 1);
}

TEST(PagedKv, ReadsTheTables) {
  const Tensor ptrs = Tensor::int64({16, 32, 48});
  const Tensor indptr = Tensor::int32({0, 2, 2, 3});
  const Tensor offsets = Tensor::int32({3, 9, 4});
  PagedKv kv;
  kv.kv_ptrs = ptrs.view();
  kv.kv_indptr = indptr.view();
  kv.last_page_offset = offsets.view();
  kv.page_size = 4;
  EXPECT_EQ(kv.num_sequences(), 3);
  expect_sequence(kv.sequence(0), 0, 2, 7);
  expect_sequence(kv.sequence(1), 0, 0, 0);
  expect_sequence(kv.sequence(2), 2, 1, 4);
}

TEST(Status, CarriesItsError) {
  EXPECT_TRUE(Status().ok());
  EXPECT_EQ(Status().code(), StatusCode::kOk);
  EXPECT_EQ(Status().message(), "");
  const Status error = Status::invalid_argument("no");
  const Status copy = error;  // NOLINT(performance-unnecessary-copy-initialization)
  EXPECT_FALSE(copy.ok());
  EXPECT_EQ(copy.code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(copy.message(), "no");
}

// The conversions that the other tests stand on, at the edges.
TEST(TestUtil, Conversions) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const auto half = static_cast<uint16_t>(bits);
    if ((half & 0x7C00) == 0x7C00 && (half & 0x3FF) != 0) continue;  // NaN
    ASSERT_EQ(float_to_half(half_to_float(half)), half);
  }
  EXPECT_EQ(half_to_float(0x3C00), 1.0f);
  EXPECT_EQ(half_to_float(0x0001), 0x1p-24f);
  EXPECT_EQ(float_to_half(65519.0f), 0x7BFF);
  EXPECT_EQ(float_to_half(65520.0f), 0x7C00);
  EXPECT_EQ(float_to_half(0x1p-25f), 0x0000);         // a tie goes to even
  EXPECT_EQ(float_to_half(0x1.8p-24f), 0x0002);       // likewise
  EXPECT_EQ(float_to_half(1.0f + 0x1p-11f), 0x3C00);  // likewise
  EXPECT_EQ(float_to_bfloat(1.0f), 0x3F80);
  EXPECT_EQ(float_to_bfloat(1.0f + 0x1p-8f), 0x3F80);
  EXPECT_EQ(float_to_bfloat(1.0f + 0x1.8p-7f), 0x3F82);
  EXPECT_EQ(bfloat_to_float(0xC000), -2.0f);
}

}  // namespace
}  // namespace punica::testing

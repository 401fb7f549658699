// batch_decode, batch_prefill, init_kv and append_kv of the CUDA backend against plain double precision: a program of
// its own, so that it runs under compute-sanitizer without Python. Exits with 1 if anything is wrong. Over 600 lines,
// in one file: its parts share the making of caches, tables and references.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <numeric>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "attention_reference.cuh"
#include "punica/cuda.h"
#include "src/cuda/attention/decode.h"
#include "src/cuda/backend.h"
#include "tests/cpp/cuda/part.h"

namespace {

// Compares every `every`-th row: with rotation the reference takes minutes for a long prompt of many heads.
void test_prefill(const Case& c, const std::vector<int64_t>& kv_len, const std::vector<int64_t>& q_len,
                  int64_t every = 1) {
  if (!in_part()) return;
  const std::string what = "prefill " + c.name();
  announce(what);
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
  const Buffer tmpbuf(cuda::workspace_bytes(p), 1, true);
  p.tmpbuf = workspace(tmpbuf);
  run(cuda::batch_prefill(p, {}), what);
  for (size_t i = 0; i < kv_len.size(); ++i) {
    Tokens tokens(
        c, [&, i](int64_t t, int64_t part, int64_t head) { return cache.at(static_cast<int64_t>(i), t, part, head); });
    for (int64_t row = qo[i]; row < qo[i + 1]; row += every) {
      const int64_t position = kv_len[i] == 0 ? -1 : kv_len[i] - qo[i + 1] + row;
      check_row(c, tokens, position, q, o, &lse, row, what + " sequence " + std::to_string(i));
    }
  }
  for (const int64_t row : {int64_t{0}, int64_t{1}, rows - 1}) EXPECT(o.untouched(row), what);
  EXPECT(o.padding_intact() && lse.guards_intact() && tmpbuf.guards_intact() && cache.pool.guards_intact(), what);

  // Dense and aligned rows, which have ways of their own: the same bits.
  if (c.dim % 8 != 0) return;
  Rows dense_q(c.dtype, rows, q.heads, c.dim), dense_o(c.dtype, rows, q.heads, c.dim);
  for (int64_t row = 0; row < rows; ++row) {
    std::memcpy(dense_q.at(row), q.at(row), static_cast<size_t>(q.row_bytes()));
  }
  p.q = dense_q.view();
  p.o = dense_o.view();
  run(cuda::batch_prefill(p, {}), what);
  for (int64_t row = 0; row < rows; ++row) {
    EXPECT(row < 2 || row >= qo.back() ? dense_o.untouched(row) : dense_o.same(row, o, row), what + ", aligned");
  }
  EXPECT(dense_o.padding_intact() && tmpbuf.guards_intact() && cache.pool.guards_intact(), what + ", aligned");
}

// Gives all sets of counters (decode_arrive.cuh) to workspaces that are none. New ones get none from here on.
void use_up_counters() {
  for (int64_t i = 0; cuda::decode_counters(nowhere(i * 1024)) >= 0; ++i) {
    if (i > 2 * cuda::kDecodeCounterSets) return fail("counters without end");
  }
}

// `counted`: by blocks that arrive at counters, where the kernels do so.
void test_decode(const Case& c, const std::vector<int64_t>& kv_len, bool counted = true) {
  if (!in_part()) return;
  const std::string what = "decode " + c.name() + (counted ? "" : " without counters");
  announce(what);
  if (!counted) use_up_counters();
  Cache cache(c, kv_len);
  cache.randomize();
  const Tables tables(cache);
  const int64_t batch = static_cast<int64_t>(kv_len.size());
  // Queries that are aligned to 16 bytes, as nearly all are, and some that are not.
  const int64_t shift = c.page_size == 100 ? 1 : 0;
  Rows q(c.dtype, batch, c.kv_heads * c.group, c.dim, 8 - 3 * shift, shift);
  Rows o(c.dtype, batch, c.kv_heads * c.group, c.dim, 1);
  q.randomize();
  const Buffer lse(batch * q.heads * 4);
  auto p = make_params<BatchDecodeParams>(c, tables, o, q, &lse);
  // A workspace that was at the same address may have counters.
  const Buffer tmpbuf(cuda::workspace_bytes(p), counted ? 1 : 33, true);
  p.tmpbuf = workspace(tmpbuf);
  run(cuda::batch_decode(p, {}), what);
  for (int64_t i = 0; i < batch; ++i) {
    Tokens tokens(c, [&, i](int64_t t, int64_t part, int64_t head) { return cache.at(i, t, part, head); });
    check_row(c, tokens, kv_len[static_cast<size_t>(i)] - 1, q, o, &lse, i, what + " sequence " + std::to_string(i));
  }
  EXPECT(o.padding_intact() && lse.guards_intact() && tmpbuf.guards_intact(), what);

  // The same bits without a workspace and alone. From prefill with one query a sequence, the same bits where one kernel
  // serves both, and otherwise within the tolerance.
  Rows again(c.dtype, batch, q.heads, c.dim);
  p.o = again.view();
  p.tmpbuf = {};
  Context early;
  early.early_reads = true;
  run(cuda::batch_decode(p, early), what);
  for (int64_t i = 0; i < batch; ++i) EXPECT(again.same(i, o, i), what + " without a workspace");
  if (small_suite) return;
  p.tmpbuf = workspace(tmpbuf);
  run(cuda::batch_decode(p, early), what);
  for (int64_t i = 0; i < batch; ++i) EXPECT(again.same(i, o, i), what + " with early reads");
  std::vector<int32_t> qo(static_cast<size_t>(batch + 1));
  std::iota(qo.begin(), qo.end(), 0);
  const Table<int32_t> indptr(qo);
  Rows prefilled(c.dtype, batch, q.heads, c.dim);
  auto prefill = make_params<BatchPrefillParams>(c, tables, prefilled, q, nullptr);
  prefill.qo_indptr = indptr.view();
  const Buffer prefill_tmpbuf(cuda::workspace_bytes(prefill), 1);
  prefill.tmpbuf = workspace(prefill_tmpbuf);
  run(cuda::batch_prefill(prefill, {}), what);
  const bool one_kernel = c.dtype == DType::kFloat32;  // both by the general kernel
  for (int64_t i = 0; i < batch; ++i) {
    Tokens tokens(c, [&, i](int64_t t, int64_t part, int64_t head) { return cache.at(i, t, part, head); });
    if (one_kernel) EXPECT(prefilled.same(i, o, i), what + " by prefill");
    check_row(c, tokens, kv_len[static_cast<size_t>(i)] - 1, q, prefilled, nullptr, i, what + " by prefill");
  }
  for (int64_t i = 0; i < batch; ++i) {
    const size_t s = static_cast<size_t>(i);
    const Tables alone(cache.addresses, {cache.indptr[s], cache.indptr[s + 1]}, {cache.last[s]});
    Rows one_q(c.dtype, 1, q.heads, c.dim), one_o(c.dtype, 1, q.heads, c.dim);
    std::memcpy(one_q.at(0), q.at(i), static_cast<size_t>(q.row_bytes()));
    auto one = make_params<BatchDecodeParams>(c, alone, one_o, one_q, nullptr);
    const Buffer one_tmpbuf(cuda::workspace_bytes(one), 0, true);
    one.tmpbuf = workspace(one_tmpbuf);
    run(cuda::batch_decode(one, {}), what);
    EXPECT(one_o.same(0, o, i), what + " alone");
  }
}

// Every query has the same bits in whatever chunk it comes; those before the last `tail` are not asked again.
void test_chunks(const Case& c, int64_t length, int64_t tail = std::numeric_limits<int64_t>::max()) {
  if (!in_part()) return;
  const std::string what = "chunks " + c.name();
  announce(what);
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
    p.q = q.view(first, last);
    p.o = o.view(0, last - first);
    p.qo_indptr = indptr.view();
    // Short chunks of long contexts take another way to the same bits.
    const Buffer tmpbuf(cuda::workspace_bytes(p), 1, true);
    if (tmpbuf.bytes() > 0) p.tmpbuf = workspace(tmpbuf);
    run(cuda::batch_prefill(p, {}), what);
    EXPECT(tmpbuf.guards_intact(), what);
  };
  chunk(0, length, whole);
  // Of a long prompt, chunks at its ends and at splits: each costs a call.
  const auto matters = [&](int64_t first) {
    const int64_t split = first % 2048;
    return length <= 1000 || first < 120 || length - first <= 120 || split < 60 || split >= 2048 - 60;
  };
  for (const int64_t size : {int64_t{1}, int64_t{4}, int64_t{17}, int64_t{100}}) {
    for (int64_t first = size == 1 ? length - 9 : std::max<int64_t>(length - tail, 0); first < length; first += size) {
      if (!matters(first)) continue;
      const int64_t last = std::min(first + size, length);
      Rows part(c.dtype, last - first, q.heads, c.dim);
      chunk(first, last, part);
      for (int64_t row = first; row < last; ++row) EXPECT(part.same(row - first, whole, row), what);
    }
  }
}

// Shapes of the prefill by warp products: each padded head dim at, below and above its multiple of 8, rotated or not,
// more than one split (in one block, and in blocks of their own), windows, a cap, a negative scale, unaligned rows.
void test_prefill_mma(bool small) {
  const std::vector<int64_t> kv_len = {130, 5, 200, 37, 1, 0, 3, 300}, q_len = {130, 0, 64, 5, 1, 3, 7, 17};
  for (const DType t : {DType::kFloat16, DType::kBFloat16}) {
    for (const int64_t dim : {2, 16, 62, 64, 72, 80, 96, 104, 128, 130, 192, 200, 250, 256}) {
      for (const double theta : {0.0, 1e4}) {
        const std::optional<double> rope = theta > 0 ? std::optional<double>(theta) : std::nullopt;
        if (small) {
          test_prefill({t, 2, 3, dim, 7, rope}, {17, 70, 0}, {17, 3, 2});
          continue;
        }
        test_prefill({t, 2, 3, dim, 16, rope}, kv_len, q_len);
        test_prefill({t, 1, 8, dim, 1, rope, 4.0, 40}, kv_len, q_len);
        test_prefill({t, 1, 2, dim, 100, rope, 1.0, -1, 20.0, -0.2}, kv_len, q_len);
        test_prefill({t, 1, 1, dim, 16, rope, 1.0, 2200}, {4500, 2049}, {30, 9});
        if (dim % 16 == 0) test_chunks({t, 1, 4, dim, 16, rope}, 2300, 60);
        test_chunks({t, 1, 3, dim, 5, rope}, 150);
      }
    }
    // Items for every block, so that splits stay together.
    if (!small) test_prefill({t, 16, 4, 64, 16, 1e4}, {2500, 2200}, {300, 300}, 23);
  }
}

// The first call of a thread, which has no context yet: the same bits.
void test_new_thread(int64_t dim) {
  if (!in_part()) return;
  const Case c = {DType::kBFloat16, 2, 4, dim, 16};
  const std::string what = "a new thread " + c.name();
  announce(what);
  Cache cache(c, {70});
  cache.randomize();
  const Tables tables(cache);
  const Table<int32_t> indptr({0, 70});
  Rows q(c.dtype, 70, 8, dim), o(c.dtype, 70, 8, dim), by_thread(c.dtype, 70, 8, dim);
  q.randomize();
  auto p = make_params<BatchPrefillParams>(c, tables, o, q, nullptr);
  p.qo_indptr = indptr.view();
  const Buffer tmpbuf(cuda::workspace_bytes(p), 1, true);
  if (tmpbuf.bytes() > 0) p.tmpbuf = workspace(tmpbuf);
  run(cuda::batch_prefill(p, {}), what);
  p.o = by_thread.view();
  Buffer::upload_all();
  Status status;
  std::thread([&] { static_cast<void>(status = cuda::batch_prefill(p, {})); }).join();
  run(status, what);
  for (int64_t row = 0; row < 70; ++row) EXPECT(by_thread.same(row, o, row), what);
}

// Positions up to 2^20, all of whose pages are the same memory.
void test_far_positions(DType dtype) {
  if (!in_part()) return;
  announce("far positions");
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
  const Buffer tmpbuf(cuda::workspace_bytes(p), 0, true);
  p.tmpbuf = workspace(tmpbuf);
  run(cuda::batch_decode(p, {}), "far positions");
  Tokens tokens(c, [&](int64_t t, int64_t part, int64_t head) { return cache.at(0, t % 128, part, head); });
  check_row(c, tokens, length - 1, q, o, &lse, 0, "far positions");
}

// Malformed tables: nothing outside is touched, and sequences whose own entries are well have the right results.
void test_hostile_tables(DType dtype) {
  if (!in_part()) return;
  announce("hostile decode");
  const Case c = {dtype, 2, 4, 64, 8};
  Cache cache(c, {300, 40, 17, 600, 9});
  cache.randomize();
  const int32_t many = std::numeric_limits<int32_t>::max(), few = std::numeric_limits<int32_t>::min();
  Rows q(dtype, 5, 8, 64), o(dtype, 5, 8, 64), good(dtype, 5, 8, 64);
  q.randomize();
  const Tables tables(cache);
  auto p = make_params<BatchDecodeParams>(c, tables, good, q, nullptr);
  const Buffer tmpbuf(cuda::workspace_bytes(p), 0, true);
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
}

void test_hostile_prefill(DType dtype) {
  if (!in_part()) return;
  announce("hostile prefill and init_kv");
  const Case c = {dtype, 2, 4, 64, 8};
  Cache cache(c, {300, 40, 17, 600, 9});
  cache.randomize();
  const int32_t many = std::numeric_limits<int32_t>::max(), few = std::numeric_limits<int32_t>::min();
  Rows q(dtype, 5, 8, 64);
  q.randomize();
  const std::vector<int32_t>&ip = cache.indptr, &last = cache.last;
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
  if (!in_part()) return;
  const std::string what = std::string(append ? "append_kv " : "init_kv ") + c.name();
  announce(what);
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

// The fast decode: head dims, groups up to more than one tile of heads, pages of any size, ends of tiles and splits,
// more sequences than a block has threads, windows, caps, rotation, by themselves and together.
void test_fast_decode(bool small) {
  for (const DType t : {DType::kFloat16, DType::kBFloat16}) {
    std::vector<int64_t> lengths = {1, 15, 16, 17, 0, 63, 64, 65, 255, 256, 257, 0, 0, 513, 1300};
    if (small) lengths = {1, 0, 257, 16};
    for (const int64_t dim : {64, 96, 128, 256}) {
      for (const int64_t group : {1, 2, 3, 5, 7, 8, 9, 12, 16, 17, 33}) {
        if ((small || dim == 96 || dim == 256) && group != 1 && group != 7 && group != 17) continue;
        test_decode({t, group > 8 ? 1 : 2, group, dim, 16}, lengths);
      }
      for (const int64_t page_size : {1, 3, 8, 32, 64, 100, 128}) {
        if ((small || dim == 96) && page_size != 1 && page_size != 100) continue;
        test_decode({t, 2, 4, dim, page_size}, lengths);
      }
      test_decode({t, 1, 5, dim, 16, 1e4}, lengths);
      test_decode({t, 2, 9, dim, 1, 5e5, 8.0}, lengths);
      test_decode({t, 2, 8, dim, 7, std::nullopt, 1.0, 0}, lengths);
      test_decode({t, 1, 8, dim, 7, std::nullopt, 1.0, 255}, lengths);
      test_decode({t, 1, 3, dim, 16, std::nullopt, 1.0, 256}, lengths);
      test_decode({t, 2, 3, dim, 16, std::nullopt, 1.0, 700}, lengths);
      test_decode({t, 2, 4, dim, 16, std::nullopt, 1.0, -1, 5.0, 0.5}, lengths);
      test_decode({t, 1, 6, dim, 5, 1e4, 1.0, 300, 30.0}, lengths);
    }
    test_decode({t, 3, 3, 64, 16}, std::vector<int64_t>(small ? 3 : 140, 270));
    test_decode({t, 8, 4, 128, 16}, std::vector<int64_t>(small ? 2 : 20, 800));
  }
}

// A call guesses from the one before with the same workspace where its blocks start. Tables that are as they were, and
// ones of which all or some of the guess is wrong: the same bits as without a workspace, where nothing is guessed.
void test_decode_guesses(const Case& c, int64_t batch, int64_t length) {
  if (!in_part()) return;
  const std::string what = "decode guesses " + c.name() + " batch " + std::to_string(batch);
  announce(what);
  Cache cache(c, std::vector<int64_t>(static_cast<size_t>(batch), length));
  cache.randomize();
  struct Call {
    std::vector<int64_t> ptrs;
    std::vector<int32_t> indptr, last;
  };
  const Call as_is = {cache.addresses, cache.indptr, cache.last};
  Call behind = as_is;  // entries of the table that no sequence has, before the first
  behind.ptrs.insert(behind.ptrs.begin(), {as_is.ptrs[1], as_is.ptrs[0], as_is.ptrs[2]});
  for (int32_t& at : behind.indptr) at += 3;
  Call shorter = as_is;  // the first sequence by a page: those behind begin elsewhere
  shorter.ptrs.erase(shorter.ptrs.begin());
  for (size_t i = 1; i < shorter.indptr.size(); ++i) --shorter.indptr[i];
  Call fewer_splits = as_is;  // of the last sequence alone
  fewer_splits.indptr.back() -= static_cast<int32_t>(256 / c.page_size);
  Call half = as_is;  // as many tokens
  half.indptr.resize(static_cast<size_t>((batch + 1) / 2 + 1));
  half.last.resize(static_cast<size_t>((batch + 1) / 2));
  Call empty = as_is;
  empty.last[0] = 0;
  Rows q(c.dtype, batch, c.kv_heads * c.group, c.dim);
  q.randomize();
  const Tables most(behind.ptrs, behind.indptr, behind.last);
  const auto params = make_params<BatchDecodeParams>(c, most, q, q, nullptr);
  const Buffer tmpbuf(cuda::workspace_bytes(params), 0, true);
  for (const Call& call : {as_is, behind, shorter, as_is, half, fewer_splits, as_is, empty, behind}) {
    const Tables tables(call.ptrs, call.indptr, call.last);
    const int64_t rows = static_cast<int64_t>(call.last.size());
    Rows expected(c.dtype, rows, q.heads, c.dim);
    auto p = make_params<BatchDecodeParams>(c, tables, expected, q, nullptr);
    p.q = q.view(0, rows);
    run(cuda::batch_decode(p, {}), what);
    p.tmpbuf = workspace(tmpbuf);
    for (int turn = 0; turn < 3; ++turn) {
      Rows o(c.dtype, rows, q.heads, c.dim);
      p.o = o.view();
      run(cuda::batch_decode(p, {}), what);
      for (int64_t i = 0; i < rows; ++i) EXPECT(o.same(i, expected, i), what + " sequence " + std::to_string(i));
    }
  }
  EXPECT(tmpbuf.guards_intact() && cache.pool.guards_intact(), what);
}

// Queries that many blocks of the fast decode have parts of: equal shares and unequal ones, groups of one split and of
// more, several queries to merge for a block, and the same workspace again and again, whose counters have to be zero
// each time.
void test_decode_merges(bool small) {
  std::vector<int64_t> lengths = {9000, 300, 5000, 1, 0, 257, 20000, 2048};
  if (small) lengths = {1300, 1};
  for (const DType t : {DType::kFloat16, DType::kBFloat16}) {
    test_decode({t, 8, 4, 128, 16}, {small ? 600 : 4096});
    if (small) continue;
    test_decode({t, 8, 4, 128, 16}, {4097});
    test_decode({t, 8, 1, 128, 16}, {32768});
    test_decode({t, 8, 3, 128, 16, std::nullopt, 1.0, 3000}, {9000, 100, 5000});
    test_decode({t, 8, 2, 128, 1}, lengths);
    test_decode({t, 5, 9, 64, 16}, lengths);
    test_decode({t, 4, 17, 96, 32}, {5000, 700, 3});
    test_decode({t, 17, 1, 64, 16, 1e4}, {6000, 3000, 1, 9000});
    test_decode({t, 4, 2, 256, 16}, {9000, 4000});
    test_decode({t, 1, 8, 128, 16}, {20000, 300});
    test_decode({t, 8, 1, 64, 16}, std::vector<int64_t>(33, 2048));  // 8 splits a block of a device with 132
    test_decode({t, 8, 1, 64, 16}, std::vector<int64_t>(35, 1500));
    test_decode({t, 8, 1, 64, 16}, std::vector<int64_t>(9, 1024));
    // A part of several sequences a block, one after the other: all blocks as many, the last ones fewer.
    test_decode({t, 8, 4, 128, 16}, std::vector<int64_t>(128, 300));
    test_decode({t, 8, 4, 128, 16}, std::vector<int64_t>(127, 280));
    test_decode({t, 2, 17, 128, 16}, std::vector<int64_t>(130, 100));
    // Without the room for a table of all sequences in shared memory; alike and not.
    test_decode({t, 1, 1, 64, 16}, std::vector<int64_t>(1300, 20));
    std::vector<int64_t> unlike(1300, 20);
    unlike[700] = 600;
    test_decode({t, 1, 1, 64, 16}, unlike);
  }
  for (const DType t : {DType::kFloat16, DType::kBFloat16}) {
    test_decode_guesses({t, 8, 4, 128, 16}, 1, small ? 600 : 4090);
    test_decode_guesses({t, 8, 1, 64, 16}, 3, small ? 300 : 1500);
    test_decode_guesses({t, 4, 2, 128, 16, std::nullopt, 1.0, 300}, 3, 700);
    if (!small) test_decode_guesses({t, 2, 9, 128, 16, 1e4}, 40, 600);
    if (!small) test_decode_guesses({t, 8, 1, 64, 16}, 300, 270);
  }
  if (!in_part()) return;
  announce("decode again");
  const Case c = {DType::kBFloat16, 8, 4, 128, 16};
  const std::vector<int64_t> some = {small ? 600 : 7000, 300, small ? 300 : 2000};
  Cache cache(c, some);
  cache.randomize();
  const Tables tables(cache);
  Rows q(c.dtype, 3, 32, c.dim), first(c.dtype, 3, 32, c.dim);
  q.randomize();
  auto p = make_params<BatchDecodeParams>(c, tables, first, q, nullptr);
  const Buffer tmpbuf(cuda::workspace_bytes(p), 0, true);
  p.tmpbuf = workspace(tmpbuf);
  run(cuda::batch_decode(p, {}), "decode again");
  for (int turn = 0; turn < (small ? 2 : 50); ++turn) {
    Rows again(c.dtype, 3, 32, c.dim);
    p.o = again.view();
    Context context;
    context.early_reads = turn % 2 != 0;
    run(cuda::batch_decode(p, context), "decode again");
    for (int64_t i = 0; i < 3; ++i) EXPECT(again.same(i, first, i), "decode again");
  }
}

// The fast prefill: groups, page sizes, contexts beyond a split, windows, caps, few rows, many sequences.
void test_fast_prefill(bool small) {
  for (const DType t : {DType::kFloat16, DType::kBFloat16}) {
    for (const int64_t dim : {64, 128}) {
      for (const int64_t page_size : {1, 5, 8, 32, 96, 128, 256}) {
        test_prefill({t, 2, page_size == 5 ? 5 : 1, dim, page_size}, {129, 128, 20}, {129, 127, 20});
      }
      const std::vector<int64_t> kv_len = {130, 5, 200, 37, 1, 0, 3, 300}, q_len = {130, 0, 64, 5, 1, 3, 7, 17};
      for (const int64_t group : {1, 4, 7, 16}) test_prefill({t, 2, group, dim, 16}, kv_len, q_len);
      test_prefill({t, 2, 4, dim, 16, std::nullopt, 1.0, 0}, kv_len, q_len);
      test_prefill({t, 2, 4, dim, 16, std::nullopt, 1.0, 100}, kv_len, q_len);
      test_prefill({t, 1, 4, dim, 8, std::nullopt, 1.0, -1, 5.0, 0.5}, kv_len, q_len);
      // Rotated in shared memory; with long prompts, keys ahead.
      for (const int64_t group : {1, 4, 7}) test_prefill({t, 2, group, dim, 16, 1e4}, kv_len, q_len, 3);
      test_prefill({t, 1, 2, dim, 5, 1e4, 4.0, 40}, {330, 290}, {330, 290}, 7);
      if (small) continue;
      test_prefill({t, 2, 4, dim, 16, 1e4}, {700, 930}, {700, 930}, 13);
      test_prefill({t, 1, 3, dim, 48, 1e4}, {2300, 4097}, {30, 4}, 5);
      test_prefill({t, 1, 4, dim, 16, 5e5, 8.0, 2200}, {4700}, {600}, 17);
      // Scores so large that the greatest one keeps growing by more than what weights allow.
      test_prefill({t, 2, 4, dim, 16, std::nullopt, 1.0, -1, 0.0, 4.0}, {2100, 700, 5000}, {60, 300, 40});
      test_prefill({t, 2, 4, dim, 16}, {2100, 2048, 5000, 2049}, {60, 40, 33, 1});
      test_prefill({t, 1, 3, dim, 48}, {2300, 4097}, {30, 4});
      test_prefill({t, 1, 2, dim, 1, std::nullopt, 1.0, 2200}, {2300, 4700}, {30, 300});
      test_prefill({t, 1, 2, dim, 16}, std::vector<int64_t>(300, 70), std::vector<int64_t>(300, 60));
      test_prefill({t, 1, 2, dim, 16}, std::vector<int64_t>(70, 7), std::vector<int64_t>(70, 3));
    }
    test_chunks({t, 2, 4, 64, 16}, small ? 40 : 600);
    test_chunks({t, 1, 4, 128, 16, 1e4}, small ? 40 : 600);
    if (!small) {
      test_chunks({t, 1, 4, 64, 16, 1e4, 1.0, 500}, 1300, 200);
      test_chunks({t, 1, 4, 128, 16, std::nullopt, 1.0, -1, 0.0, 3.0}, 2500, 300);
      test_chunks({t, 1, 4, 128, 16}, 4200, 300);
      test_chunks({t, 1, 4, 64, 16, std::nullopt, 1.0, 700, 20.0, 0.3}, 2500, 700);
    }
    test_hostile_prefill(t);
  }
}

// Queries that a launch of its own merges: where they are few, and where the workspace has no counters. The last cases
// of a suite: others would have no counters behind them.
void test_merge_launches() {
  for (const DType t : {DType::kFloat16, DType::kBFloat16}) {
    for (const int64_t dim : {64, 96, 128, 256}) {
      test_decode({t, 1, 3, dim, 16}, {600});
      test_decode({t, 9, 8, dim, 16}, {270, 300}, false);
    }
  }
}

// So many sequences, most of them empty, that blocks take items from a counter.
void test_counted_items() {
  std::vector<int64_t> kv_len(300, 0), q_len(300, 0);
  kv_len[0] = 5, kv_len[130] = 70, kv_len[299] = 200;
  q_len[0] = 3, q_len[1] = 2, q_len[130] = 70, q_len[299] = 20;
  for (const DType t : {DType::kFloat16, DType::kBFloat16}) {
    for (const int64_t dim : {64, 96, 128}) test_prefill({t, 1, 2, dim, 16}, kv_len, q_len);
    test_prefill({t, 1, 2, 80, 16, 1e4}, kv_len, q_len);
  }
}

int report() {
  Cases::get().finish();
  std::printf("%s: worst error / tolerance: output %.3f (%s), lse %.3f; %d failures\n",
              cuda::last_arch() == nullptr ? "nothing ran" : cuda::last_arch(), worst_output, worst_case.c_str(),
              worst_lse, failures);
  return failures == 0 && cuda::last_arch() != nullptr ? 0 : 1;
}

}  // namespace

#include "attention_small.cuh"

int main(int argc, char** argv) {
  if (argc > 1 && std::string(argv[1]) == "small") return run_small_suite();  // for compute-sanitizer
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::printf("skipped: no CUDA device\n");
    return 77;
  }
  // Any argument: small sizes, for compute-sanitizer; but "fast": the fast decode alone; "prefill": the prefill by
  // warpgroup products alone; "mma": that by warp products alone; "small-fast", "small-mma": both.
  const std::string argument = argc > 1 ? argv[1] : "";
  const bool small = argc > 1 && argument != "fast" && argument != "prefill" && argument != "mma";
  const bool fast_alone = argument == "fast" || argument == "small-fast", prefill_alone = argument == "prefill";
  const bool mma_alone = argument == "mma" || argument == "small-mma";
  if (!fast_alone && !mma_alone) test_fast_prefill(small);
  if (prefill_alone) return report();
  if (!mma_alone) test_decode_merges(small);
  if (!mma_alone) test_fast_decode(small);
  if (!fast_alone) test_prefill_mma(small);
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
  if (fast_alone || mma_alone) cases.clear();
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
  if (!fast_alone && !mma_alone) {
    test_counted_items();
    for (const int64_t dim : {64, 96, 128}) test_new_thread(dim);
  }
  for (const DType t : kTypes) {
    if (fast_alone || mma_alone) break;
    if (t == DType::kFloat32) test_chunks({t, 2, 4, 64, 16}, small ? 40 : 600);
    if (!small) test_prefill({t, 1, 3, 96, 48}, {2300, 4097}, {30, 4});
    test_chunks({t, 1, 3, 80, 5, 1e4}, small ? 40 : 310);
    test_chunks({t, 1, 7, 256, 16, std::nullopt, 1.0, 70}, small ? 40 : 310);
    test_far_positions(t);
    test_hostile_tables(t);
    test_hostile_prefill(t);
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
  if (!mma_alone) test_merge_launches();
  return report();
}

// Which splits a block of the fast decode takes, in which order, and where their tokens lie.
#pragma once

#include <cstdint>

#include "src/cuda/attention/args.cuh"
#include "src/cuda/attention/decode.h"
#include "src/cuda/attention/decode_tile.cuh"
#include "src/cuda/common/device.cuh"

namespace punica::cuda {

template <Arch kArch, int kDim, int kColumns, bool kRope>
struct DecodeShape {
  static constexpr int kWarps = kArch == Arch::kSm80 && kDim > 128 ? 2 : 4;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kTiles = kSplitTokens / (kTileTokens * kWarps);  // of a warp in a split
  static constexpr int kHeads = 8 * kColumns;
  static constexpr int kBlocks = kArch == Arch::kSm90 && kDim > 128 ? 1 : 2;  // a multiprocessor, to aim at

  static constexpr int kTileBytes = kTileTokens * kDim * 2;  // of keys; values follow
  static constexpr int kStateBytes = kWarps * kHeads * 8;
  static constexpr int kNoteBytes = 320;  // what decode_arrive.cuh notes of queries that other blocks have parts of
  static constexpr int kQueryBytes = kHeads * kDim * 2;  // of a query, of which there are two
  static constexpr int kAngleBytes = kRope ? kTileTokens * ((kDim / 4 + 7) / 8 * 8) * 16 : 0;
  // Of the sm_80 path, what devices of any 8.x or later have.
  static constexpr int kShared = kArch == Arch::kSm80 ? 99 << 10 : ((228 << 10) / kBlocks - (1 << 10));
  // The sums of all warps, all dims at a time where that takes no tile from the rings, else 64. The row length sends
  // lanes of four heads to different banks.
  static constexpr int sum_bytes(int dims) { return kWarps * kHeads * (dims + 4) * 4; }
  // 128 KiB under way on a multiprocessor: more made decode slower, by 1% at 192 KiB.
  static constexpr int kAim = ((128 << 10) / kBlocks + kWarps * kTileBytes) / (kWarps * 2 * kTileBytes);
  static constexpr int stages(int dims) {
    const int room = (kShared - sum_bytes(dims) - kStateBytes - kNoteBytes - kAngleBytes - 2 * kQueryBytes) /
                     (kWarps * 2 * kTileBytes);
    const int aim = kAim < 2 ? 2 : (kAim > 4 ? 4 : kAim);
    return room < aim ? room : aim;
  }
  static constexpr int kSumDims = stages(kDim) == stages(64) ? kDim : 64;
  static constexpr int kSumRow = kSumDims + 4, kSumBytes = sum_bytes(kSumDims);
  static constexpr int kStages = stages(kSumDims);
  static constexpr int kRingBytes = kStages * 2 * kTileBytes;  // of a warp
  static constexpr int kSharedBytes =
      kWarps * kRingBytes + kSumBytes + kStateBytes + kNoteBytes + kAngleBytes + 2 * kQueryBytes;
  // More than a multiprocessor has for kBlocks + 1: where another block finds room, those of the next call, which start
  // early, spread unevenly.
  static constexpr int kLeastBytes = kArch == Arch::kSm90 ? (228 << 10) / (kBlocks + 1) : 0;
  static constexpr int kLaunchBytes = kSharedBytes < kLeastBytes ? kLeastBytes : kSharedBytes;
  static_assert(kStages >= 2 && kStages <= kTiles);
  static_assert(kHeads * kSumRow * 4 >= kDim / 2 * 8);  // a warp's part also holds the angles of its queries
};

// Positions and counts of splits have 32 bits: decode_serves() sees to it. Long integers take several times as long,
// and the way to the first copy is short. For the same reason kernel parameters are passed on by reference alone: a
// reference that is kept in a structure makes the compiler load them from memory, one after the other.
struct DecodePages {
  int32_t first_page, kv_len;
};

// What the tables say of a sequence. Loaded long before it is looked at: looking waits for the load.
struct DecodeTables {
  int32_t begin, end, last;

  // Zeros behind the last sequence.
  __device__ __forceinline__ static DecodeTables load(const AttentionArgs& args, int32_t sequence) {
    DecodeTables tables = {0, 0, 0};
    if (sequence < static_cast<int32_t>(args.num_sequences)) {
      tables.begin = load_word(args.kv_indptr + sequence);
      tables.end = load_word(args.kv_indptr + sequence + 1);
      tables.last = load_word(args.last_page_offset + sequence);
    }
    return tables;
  }
  // In this order, all of them before the first use: the compiler would look at one before it asks for the next.
  __device__ __forceinline__ static int32_t load_word(const int32_t* from) {
    int32_t word;
    asm volatile("ld.global.b32 %0, [%1];" : "=r"(word) : "l"(from));
    return word;
  }
  // sequence_pages() for sizes of 32 bits.
  __device__ __forceinline__ DecodePages pages(const AttentionArgs& args) const {
    const int32_t limit = static_cast<int32_t>(args.num_page_ptrs), page_size = static_cast<int32_t>(args.page_size);
    const int32_t first = min(max(begin, 0), limit), behind = min(max(end, 0), limit);
    if (behind <= first || last < 1 || last > page_size) return {0, 0};
    return {first, (behind - first - 1) * page_size + last};
  }
};

// A split of the walk, the same in all threads.
struct DecodeSplit {
  int32_t sequence, kv_len, first_page;
  int32_t slot;             // of the query's first split in the workspace
  int32_t index, count;     // this split of the query's
  int32_t group, in_group;  // splits of a group, this one of its group
  int32_t base;             // position of the split's first token
  int32_t part;
  int32_t begin, end;  // tokens that the query sees, from `base`; none where the walk has ended
  bool valid;
};

// Goes over the splits of a block in order.
struct DecodeWalk {
  int32_t each, more;  // shares of the blocks (DecodePiece)
  int32_t left;        // splits that this block has still to take
  int32_t group_bits;
  bool whole;          // no room for partial results: queries are taken whole, by the block where they begin
  bool whole_queries;  // shares are whole queries
  bool one_part;       // of one part (DecodeShare)
  DecodeSplit at;
  DecodeTables next;  // of the sequence after

  // First key that the query sees. The launcher has made the window a positive number of 32 bits.
  __device__ __forceinline__ static int32_t first_key(const AttentionArgs& args, int32_t kv_len) {
    return max(kv_len - 1 - static_cast<int32_t>(args.window_left), 0);
  }
  // Of a part.
  __device__ __forceinline__ static int32_t kv_head(const AttentionArgs& args, int32_t part) {
    return args.head_tiles == 1 ? part : part / args.head_tiles;
  }
  __device__ __forceinline__ static int32_t num_splits(const AttentionArgs& args, int32_t kv_len) {
    constexpr uint32_t kTokens = kSplitTokens;
    return static_cast<int32_t>(static_cast<uint32_t>(max(kv_len - 1, 0)) / kTokens -
                                static_cast<uint32_t>(first_key(args, kv_len)) / kTokens + 1);
  }

  // Before the first advance().
  __device__ __forceinline__ void look_ahead(const AttentionArgs& args) {
    next = DecodeTables::load(args, at.sequence + 1);
  }
  __device__ __forceinline__ void place(const AttentionArgs& args) {
    const int32_t first = first_key(args, at.kv_len);
    at.base = static_cast<int32_t>(static_cast<uint32_t>(first) / kSplitTokens + at.index) * kSplitTokens;
    at.valid = left > 0 || (whole && at.index > 0);
    at.begin = at.valid ? max(first - at.base, 0) : 0;
    at.end = at.valid ? min(at.kv_len - at.base, kSplitTokens) : 0;
  }
  __device__ __forceinline__ void take(const AttentionArgs& args, const DecodePages& pages) {
    at.kv_len = pages.kv_len;
    at.first_page = pages.first_page;
    at.count = num_splits(args, pages.kv_len);
    at.group = (at.count + (1 << group_bits) - 1) >> group_bits;
  }
  __device__ __forceinline__ void advance(const AttentionArgs& args) {
    if (!at.valid) return;
    --left;
    if (++at.in_group == at.group) at.in_group = 0;
    if (++at.index == at.count) {
      at.index = at.in_group = 0;
      if (one_part || ++at.part == args.num_kv_heads * args.head_tiles) {
        if (!one_part) at.part = 0;
        at.slot += at.count;
        ++at.sequence;
        take(args, next.pages(args));
        look_ahead(args);
      }
    }
    place(args);
  }
};

// a / b, where inverse is approximately 1 / b: a third of the time that a division takes, most of which others wait
// for. kSmall: a is below kSmallDividend, so that (a + 1/2) / b is further from whole numbers than the error is.
inline constexpr uint32_t kSmallDividend = 1u << 20;

template <bool kSmall = false>
__device__ __forceinline__ uint32_t quotient(uint32_t a, uint32_t b, float inverse) {
  if constexpr (kSmall) return __float2uint_rz(__fmul_rn(__fadd_rn(__uint2float_rn(a), 0.5f), inverse));
  if (a >= 1u << 22) return a / b;
  const uint32_t guess = __float2uint_rz(__fmul_rn(__uint2float_rn(a), inverse));  // off by one at most
  const int32_t rest = static_cast<int32_t>(a - guess * b);
  return rest < 0 ? guess - 1 : (rest >= static_cast<int32_t>(b) ? guess + 1 : guess);
}
__device__ __forceinline__ float approximate_inverse(uint32_t b) {
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(__uint2float_rn(b)));
  return inverse;
}

// How many splits this block takes, and from which one on, counted over the whole batch.
struct DecodeShare {
  int32_t each, more, first, count;
  bool whole_queries;  // no query is in two blocks
  // The block takes one part of some sequences, one after the other: other blocks read the other heads of the same
  // pages at the same time, which memory does 1% quicker.
  bool one_part;
};

template <bool kSmall>
__device__ __forceinline__ DecodeShare share_of_block(uint32_t all, uint32_t longest, bool alike, int32_t group_bits,
                                                      uint32_t parts, uint32_t num_sequences, float inverse_blocks,
                                                      float inverse_parts) {
  // Quotients side by side, though not all of them are needed.
  const uint32_t group = (longest + (1 << group_bits) - 1) >> group_bits;
  const float inverse_longest = approximate_inverse(longest), inverse_group = approximate_inverse(group);
  uint32_t each = quotient<kSmall>(all, gridDim.x, inverse_blocks), more = all - each * gridDim.x;
  const uint32_t most = quotient<kSmall>(all + all / 16, gridDim.x, inverse_blocks);
  // All queries have as many splits. Shares of whole queries, or else of whole groups, leave less to merge, where that
  // leaves few blocks without work.
  const uint32_t least = each + (more > 0 ? 1 : 0);
  const uint32_t queries = quotient<kSmall>(least + longest - 1, longest, inverse_longest);
  const uint32_t by_queries = queries * longest;
  const uint32_t by_groups = quotient<kSmall>(least + group - 1, group, inverse_group) * group;
  const bool whole_queries = alike && by_queries <= most;
  if (whole_queries || (alike && by_groups <= most)) {
    each = whole_queries ? by_queries : by_groups;
    more = 0;
  }
  if (whole_queries && parts > 1) {
    const uint32_t rounds = quotient<kSmall>(num_sequences + queries - 1, queries, approximate_inverse(queries));
    if (rounds * parts <= gridDim.x) {
      const uint32_t round = quotient<kSmall>(blockIdx.x, parts, inverse_parts), part = blockIdx.x - round * parts;
      const uint32_t sequence = round * queries, left = sequence < num_sequences ? num_sequences - sequence : 0;
      const uint32_t first = (sequence * parts + part) * longest, count = min(left, queries) * longest;
      return {static_cast<int32_t>(each), 0, static_cast<int32_t>(first), static_cast<int32_t>(count), true, true};
    }
  }
  const uint32_t worker = blockIdx.x, first = min(each * worker + min(worker, more), all);
  const uint32_t count = min(all - first, each + (worker < more ? 1u : 0u));
  return {static_cast<int32_t>(each),
          static_cast<int32_t>(more),
          static_cast<int32_t>(first),
          static_cast<int32_t>(count),
          whole_queries,
          false};
}

// What find_share() needs besides the tables, known before they may be read.
struct DecodeScan {
  float inverse_blocks, inverse_parts;
  int32_t many;        // sequences of a thread
  int32_t begin, end;  // this thread's

  template <int kThreads>
  __device__ __forceinline__ static DecodeScan prepare(const AttentionArgs& args) {
    const int32_t num_sequences = static_cast<int32_t>(args.num_sequences);
    DecodeScan scan;
    scan.inverse_blocks = approximate_inverse(gridDim.x);
    scan.inverse_parts = approximate_inverse(args.num_kv_heads * args.head_tiles);
    // Every thread counts the splits of some consecutive sequences: one trip to memory. A warp suffices for 32, so then
    // each of them does it by itself, and each lane for the only one.
    const bool alone = num_sequences <= 32, only = num_sequences == 1;
    scan.many = alone ? 1 : (num_sequences + kThreads - 1) / kThreads;
    scan.begin =
        only ? 0 : min(scan.many * static_cast<int32_t>(alone ? threadIdx.x % 32 : threadIdx.x), num_sequences);
    scan.end = min(scan.begin + scan.many, num_sequences);
    return scan;
  }
};

// What decode_kernel found in the tables of the last call with the same workspace: layers of a model, and most steps,
// are alike. All that follows from it is computed while the kernels ahead are waited for; the tables are read then, and
// whether it was right is seen in them. 0 where queries had unlike numbers of splits.
struct alignas(8) DecodeHint {
  int32_t splits;  // of each query
  int32_t pages;   // of the first sequence
};

// Where the block starts if the hint is right.
struct DecodeGuess {
  DecodeShare share;
  int32_t splits;  // of each query; 0: there is no guess
  int32_t sequence, part, index, in_group, group;
  int32_t first_page, base;  // of the sequence, of the split

  __device__ __forceinline__ static DecodeGuess make(const AttentionArgs& args, DecodeHint hint, int32_t group_bits,
                                                     const DecodeScan& scan) {
    const uint32_t parts = args.num_kv_heads * args.head_tiles,
                   num_sequences = static_cast<uint32_t>(args.num_sequences);
    const uint32_t splits = hint.splits, total = splits * num_sequences, all = total * parts;
    DecodeGuess guess = {};
    if (splits == 0 || args.num_page_ptrs == 0 ||
        static_cast<uint64_t>(splits) * num_sequences * parts >= kSmallDividend / 2 || total > args.num_slots) {
      return guess;
    }
    guess.share = share_of_block<true>(all, splits, true, group_bits, parts, num_sequences, scan.inverse_blocks,
                                       scan.inverse_parts);
    if (guess.share.count == 0) return guess;
    guess.splits = splits;
    const uint32_t first = guess.share.first, of_sequence = splits * parts;
    guess.group = (splits + (1 << group_bits) - 1) >> group_bits;
    guess.sequence = quotient<true>(first, of_sequence, approximate_inverse(of_sequence));
    const uint32_t local = first - guess.sequence * of_sequence;
    guess.part = quotient<true>(local, splits, approximate_inverse(splits));
    guess.index = local - guess.part * splits;
    guess.in_group =
        guess.index - quotient<true>(guess.index, guess.group, approximate_inverse(guess.group)) * guess.group;
    guess.first_page = guess.sequence * hint.pages;
    guess.base = guess.index * kSplitTokens;
    return guess;
  }
};

// The share of this block: which split of which sequence is its first one. All threads call it; `first_tables` are
// those of scan.begin, `scratch` holds kThreads / 8 + 4 values, `table` kTable sequences. Thread 0 gets the hint for
// the next call.
template <int kThreads, int kTable>
__device__ __forceinline__ DecodeWalk find_share(const AttentionArgs& args, int group_bits, const DecodeScan& scan,
                                                 const DecodeGuess& guess, const DecodeTables& first_tables,
                                                 int32_t* scratch, DecodePages* table, DecodeHint* hint) {
  constexpr int kWarps = kThreads / 32;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int32_t parts = args.num_kv_heads * args.head_tiles, num_sequences = static_cast<int32_t>(args.num_sequences);
  const bool alone = num_sequences <= 32, only = num_sequences == 1, tabled = num_sequences <= kTable;
  int32_t splits = 0, longest = 0, shortest = INT32_MAX;
  DecodePages found = {0, 0};
#pragma unroll 1
  for (int32_t i = scan.begin; i < scan.end; ++i) {
    const DecodeTables tables = i == scan.begin ? first_tables : DecodeTables::load(args, i);
    found = tables.pages(args);
    const int32_t here = DecodeWalk::num_splits(args, found.kv_len);
    splits += here;
    longest = max(longest, here);
    shortest = min(shortest, here);
    if (!alone && tabled) table[i] = found;
  }
  if (!only) {
    longest = __reduce_max_sync(0xffffffffu, longest);
    shortest = __reduce_min_sync(0xffffffffu, shortest);
  }
  if (!alone) {
    if (lane == 0) {
      scratch[warp] = longest;
      scratch[kWarps + warp] = shortest;
    }
    __syncthreads();
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      longest = max(longest, scratch[w]);
      shortest = min(shortest, scratch[kWarps + w]);
    }
  }
  const bool alike = longest == shortest;  // as many splits in all queries
  int32_t before = scan.begin * longest, total = num_sequences * longest;
  if (!alike) {
    before = splits;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const int32_t other = __shfl_up_sync(0xffffffffu, before, distance);
      if (lane >= distance) before += other;
    }
    total = __shfl_sync(0xffffffffu, before, 31);
    before -= splits;
    if (!alone) {
      if (lane == 31) scratch[2 * kWarps + warp] = total;
      __syncthreads();
      total = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        if (w < warp) before += scratch[2 * kWarps + w];
        total += scratch[2 * kWarps + w];
      }
    }
  }
  *hint = {alike ? longest : 0, first_tables.end - first_tables.begin};
  DecodeWalk walk;
  walk.group_bits = group_bits;
  walk.whole = total > args.num_slots;
  if (alike && longest == guess.splits && (alone || tabled)) {
    walk.each = guess.share.each;
    walk.more = guess.share.more;
    walk.left = guess.share.count;
    walk.whole_queries = guess.share.whole_queries;
    walk.one_part = guess.share.one_part;
    if (!alone) {
      found = table[guess.sequence];
    } else if (!only) {
      found.first_page = __shfl_sync(0xffffffffu, found.first_page, guess.sequence);
      found.kv_len = __shfl_sync(0xffffffffu, found.kv_len, guess.sequence);
    }
    walk.at.sequence = guess.sequence;
    walk.at.slot = guess.sequence * longest;
    walk.at.part = guess.part;
    walk.at.index = guess.index;
    walk.at.in_group = guess.in_group;
    walk.at.kv_len = found.kv_len;
    walk.at.first_page = found.first_page;
    walk.at.count = longest;
    walk.at.group = guess.group;
    walk.place(args);
    return walk;
  }
  const uint32_t all = static_cast<uint32_t>(total) * static_cast<uint32_t>(parts);
  const bool small = all < kSmallDividend / 2;  // so is all that is divided here
  const DecodeShare share = small ? share_of_block<true>(all, longest, alike, group_bits, parts, num_sequences,
                                                         scan.inverse_blocks, scan.inverse_parts)
                                  : share_of_block<false>(all, longest, alike, group_bits, parts, num_sequences,
                                                          scan.inverse_blocks, scan.inverse_parts);
  walk.each = share.each;
  walk.more = share.more;
  walk.left = share.count;
  walk.whole_queries = share.whole_queries;
  walk.one_part = share.one_part;
  const bool valid = walk.left > 0;
  const int32_t first = valid ? share.first : 0;
  int32_t sequence = 0, slot = 0;
  if (only) {
  } else if (alike && (alone || tabled)) {
    const uint32_t of_sequence = longest * parts;
    const float inverse = approximate_inverse(of_sequence);
    sequence = small ? quotient<true>(first, of_sequence, inverse) : first / of_sequence;
    slot = sequence * longest;
    if (alone) {
      found.first_page = __shfl_sync(0xffffffffu, found.first_page, sequence);
      found.kv_len = __shfl_sync(0xffffffffu, found.kv_len, sequence);
    } else {
      found = table[sequence];
    }
  } else {
    const bool here = first >= before * parts && first < (before + splits) * parts;
    if (alone) {
      sequence = __ffs(__ballot_sync(0xffffffffu, here)) - 1;
      slot = __shfl_sync(0xffffffffu, before, sequence);
      found.first_page = __shfl_sync(0xffffffffu, found.first_page, sequence);
      found.kv_len = __shfl_sync(0xffffffffu, found.kv_len, sequence);
    } else {
      int32_t* const place = scratch + 4 * kWarps;
      if (here) {
        int32_t its_slot = before, i = scan.begin;
        if (scan.many > 1) {
#pragma unroll 1
          for (;; ++i) {
            const DecodeTables tables = DecodeTables::load(args, i);
            found = tables.pages(args);
            const int32_t its = DecodeWalk::num_splits(args, found.kv_len);
            if (first < (its_slot + its) * parts) break;
            its_slot += its;
          }
        }
        place[0] = i;
        place[1] = its_slot;
        place[2] = found.first_page;
        place[3] = found.kv_len;
      }
      __syncthreads();
      sequence = place[0];
      slot = place[1];
      found = {place[2], place[3]};
    }
  }
  walk.at.sequence = sequence;
  walk.at.slot = slot;
  walk.take(args, found);
  const uint32_t count = walk.at.count, group = walk.at.group, local = first - slot * parts;
  const float inverse_count = approximate_inverse(count), inverse_group = approximate_inverse(group);
  if (small) {
    walk.at.part = static_cast<int32_t>(quotient<true>(local, count, inverse_count));
    walk.at.index = local - walk.at.part * count;
    walk.at.in_group = walk.at.index - quotient<true>(walk.at.index, group, inverse_group) * group;
  } else {
    walk.at.part = local / count;
    walk.at.index = local - walk.at.part * count;
    walk.at.in_group = walk.at.index % group;
  }
  if (walk.whole && valid && walk.at.index > 0) [[unlikely]] {
    // The block before takes this query to its end.
    walk.at.valid = true;
    walk.left -= walk.at.count - walk.at.index - 1;
    walk.at.index = walk.at.count - 1;
    walk.look_ahead(args);
    walk.advance(args);
  }
  walk.place(args);
  return walk;
}

// Addresses of this lane's tokens of a split: number k is token lane % 16 of the warp's tile 2k + lane / 16.
template <class Shape>
struct DecodeAddresses {
  static constexpr int kCount = Shape::kTiles / 2;
  int64_t page[kCount];  // the page's address, then the key's; 0 where the query does not see the token
  uint32_t slot[kCount];

  __device__ __forceinline__ static int token(int k) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    return ((2 * k + lane / 16) * Shape::kWarps + warp) * kTileTokens + lane % 16;
  }
  // page_shift: of a page size that is a power of two, or negative.
  __device__ __forceinline__ void fetch(const AttentionArgs& args, const DecodeSplit& split, int page_shift) {
    if (page_shift >= 0) {
      fetch(args, split, [&](uint32_t position) { return position >> page_shift; });
    } else {
      const uint32_t page_size = static_cast<uint32_t>(args.page_size);
      fetch(args, split, [&](uint32_t position) { return position / page_size; });
    }
  }
  template <class PageOf>
  __device__ __forceinline__ void fetch(const AttentionArgs& args, const DecodeSplit& split, PageOf page_of) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      page[k] = 0;
      slot[k] = 0;
      if (token(k) < split.begin || token(k) >= split.end) continue;
      const uint32_t position = split.base + token(k), number = page_of(position);
      slot[k] = position - number * static_cast<uint32_t>(args.page_size);
      page[k] = args.kv_ptrs[split.first_page + number];
    }
  }
  // Where the pages of the guess are in the table, and how far in them the keys are.
  struct Guess {
    const int64_t* page[kCount];
    int64_t offset[kCount];

    template <int kDim>
    __device__ __forceinline__ static Guess make(const AttentionArgs& args, const DecodeGuess& split, int page_shift) {
      const uint32_t page_size = static_cast<uint32_t>(args.page_size);
      const int64_t of_part = args.key_bytes + DecodeWalk::kv_head(args, split.part) * args.head_bytes;
      Guess guess;
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
        const uint32_t position = split.base + token(k);
        const uint32_t number = page_shift >= 0 ? position >> page_shift : position / page_size;
        // Never behind the table, and no other entry if the guess is right.
        const uint32_t last = static_cast<uint32_t>(args.num_page_ptrs) - 1;
        guess.page[k] = args.kv_ptrs + min(split.first_page + number, last);
        guess.offset[k] = of_part + static_cast<int64_t>(position - number * page_size) * (kDim * 2);
        asm volatile("" : "+l"(guess.page[k]), "+l"(guess.offset[k]));  // now, and not after the wait
      }
      return guess;
    }
  };
  __device__ __forceinline__ void fetch(const Guess& guess) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      asm volatile("ld.global.b64 %0, [%1];" : "=l"(page[k]) : "l"(guess.page[k]));
    }
  }
  // The guess was right: what finish() does.
  __device__ __forceinline__ void finish(const Guess& guess, const DecodeSplit& split) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      page[k] = token(k) >= split.begin && token(k) < split.end ? page[k] + guess.offset[k] : 0;
    }
  }
  template <int kDim>
  __device__ __forceinline__ void finish(const AttentionArgs& args, int32_t part) {
    const int64_t offset = args.key_bytes + DecodeWalk::kv_head(args, part) * args.head_bytes;
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      if (page[k] != 0) page[k] += offset + static_cast<int64_t>(slot[k]) * (kDim * 2);
    }
  }
  // The address of this lane's token where the tile's are. The compiler may not see that this is a choice from an
  // array, which it would keep in local memory: the stores to that, some a split, made decode 6% slower.
  __device__ __forceinline__ int64_t of_tile(int tile) const {
    int64_t address = page[0];
    asm("" : "+l"(address));
#pragma unroll
    for (int k = 1; k < kCount; ++k) {
      int64_t other = page[k];
      asm("" : "+l"(other));
      address = tile / 2 == k ? other : address;
    }
    return address;
  }
};

}  // namespace punica::cuda

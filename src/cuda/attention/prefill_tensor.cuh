// batch_prefill of float16 and bfloat16 on sm_90 with head dims 64 and 128: tensor copies and warpgroup products.
//
// A block stays on its multiprocessor and takes one item after another: 128 rows (192 with D = 64), pairs (query, head
// of the group), of one sequence and one KV head. One warp finds the items, up to three have the copy engine bring
// queries, and keys and values in tiles of 128 tokens, two tiles of each ahead; two or three warpgroups take 64 of the
// rows each, and the copy engine takes their output. While a
// warpgroup computes the weights of a tile, its products of the tile before run, and those of the other warpgroups.
//
// Pages lie anywhere, so there is one tensor map for all of memory: {elements of a row, rows of a page, address / 16 in
// two digits}. A box is 64 elements of as many rows as lie together in a page and in a tile.
//
// The arithmetic of a row knows of no other row: tiles and splits (kPrefillSplitTokens) are counted from position 0, a
// split starts from nothing, splits are merged from left to right, and a tile that a row does not see changes no bit.
#pragma once

#include "src/cuda/attention/prefill_copy.cuh"
#include "src/cuda/attention/prefill_find.cuh"
#include "src/cuda/attention/prefill_multiply.cuh"

namespace punica::cuda {

// Grid: as many blocks as multiprocessors, or items if they are fewer.
template <Arch kArch, class T, int kDim, bool kRope>
__global__ void __launch_bounds__(kPrefillThreads<kDim>, 1)
    prefill_kernel(const __grid_constant__ AttentionArgs args, const __grid_constant__ PrefillMaps maps,
                   const __grid_constant__ PrefillCall call,
                   const __grid_constant__ std::conditional_t<kRope, RopeTable, NoRope> rope) {
  static_assert(kArch == Arch::kSm90);
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) unsigned char prefill_shared[];
  PrefillShared<kDim>& shared = *reinterpret_cast<PrefillShared<kDim>*>(prefill_shared);
  launch_dependents<kArch>();
  if (threadIdx.x == 128) {
    hopper::prefetch_map(&maps.memory);
    if (call.copy_q) hopper::prefetch_map(&maps.queries);
  }
  if (threadIdx.x == 0) {
    const int copy_warps = min(kCopyWarps, kPrefillKeys / call.box_rows);
    for (int i = 0; i < kPrefillStages; ++i) {
      hopper::barrier_init(shared_address(&shared.key_full[i]), 1);
      hopper::barrier_init(shared_address(&shared.value_full[i]), 1);
      hopper::barrier_init(shared_address(&shared.key_empty[i]), 4 * kPrefillGroups<kDim>);
      hopper::barrier_init(shared_address(&shared.value_empty[i]), 4 * kPrefillGroups<kDim>);
    }
    for (int i = 0; i < kPrefillGroups<kDim>; ++i) {
      hopper::barrier_init(shared_address(&shared.query_full[i]), 1);
      hopper::barrier_init(shared_address(&shared.query_empty[i]), 4);
    }
    for (int i = 0; i < kItemsAhead; ++i) {
      // Every thread that writes or reads an item arrives by itself: racecheck sees no order where one lane arrives for
      // its warp.
      hopper::barrier_init(shared_address(&shared.item_full[i]), 32);
      hopper::barrier_init(shared_address(&shared.item_empty[i]), 128 * kPrefillGroups<kDim> + 32 * copy_warps);
    }
    hopper::barrier_init_fence();
  }
  if constexpr (kRope) {
    for (int d = threadIdx.x; d < kDim / 2; d += kPrefillThreads<kDim>) shared.turns[d] = rope.turns[d];
  }
  __syncthreads();
  grid_dependency_wait<kArch>();
  // Together what the block was launched with: 168 a thread, or 128 with three groups that multiply.
  if (threadIdx.x < 128) {
    hopper::lower_registers<kPrefillGroups<kDim> == 2 ? 56 : 32>();
    if (threadIdx.x < 32 * kCopyWarps) {
      prefill::copy_items<kDim, kRope>(args, maps, call, shared);
    } else {
      prefill::find_items<kDim>(args, call, shared);
    }
  } else {
    hopper::raise_registers<kPrefillGroups<kDim> == 2 ? 224 : 160>();
    prefill::Consumer<T, kDim, kRope>(args, call, maps.outputs, shared).run();
  }
#endif
}

// The second half where splits were items of their own: a warp merges the partial results of a query and a head, from
// left to right. Grid: (rows of q, blocks that share the heads).
inline constexpr int kPrefillMergeThreads = 128;

template <Arch kArch, class T, int kDim>
__global__ void __launch_bounds__(kPrefillMergeThreads)
    prefill_merge_kernel(const __grid_constant__ AttentionArgs args) {
  if constexpr (kCompiled<kArch>) {
    // Partial results whose loads are under way at once. The code is run once a block: less of it is quicker.
    constexpr int kColumns = kDim / 32, kBatch = 16;
    launch_dependents<kArch>();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    if (lane < args.num_sequences) {
      prefetch_line(args.kv_indptr + lane);
      prefetch_line(args.qo_indptr + lane);
      prefetch_line(args.last_page_offset + lane);
    }
    const bool aligned = reinterpret_cast<uint64_t>(args.o) % 8 == 0 && args.o_stride % 4 == 0;
    grid_dependency_wait<kArch>();
    const int row = blockIdx.x;
    // Every warp by itself: the sequence of the row, the last one that claims it, and the slots before that. Positions
    // and rows have 32 bits (serves_prefill).
    int row_begin = -1, queries = 0, kv_len = 0;
    int64_t slots_before = 0, slots = 0;
#pragma unroll 1
    for (int64_t base = 0; base < args.num_sequences; base += 32) {
      const int64_t i = base + lane;
      int begin = 0, count = 0, length = 0;
      int64_t its = 0;
      if (i < args.num_sequences) {
        const AttentionArgs::Entry entry = args.entry(i);
        begin = static_cast<int>(entry.row_begin);
        count = static_cast<int>(entry.num_queries);
        length = static_cast<int>(entry.pages.kv_len);
        its = count * prefill_splits(length);
      }
      int64_t end = its;
      if (args.num_sequences > 1) {
#pragma unroll
        for (int distance = 1; distance < 32; distance *= 2) {
          const int64_t other = __shfl_up_sync(~0u, end, distance);
          if (lane >= distance) end += other;
        }
      }
      const uint32_t claims = __ballot_sync(~0u, row >= begin && row < begin + count);
      if (claims != 0) {
        const int owner = 31 - __clz(claims);
        row_begin = __shfl_sync(~0u, begin, owner);
        queries = __shfl_sync(~0u, count, owner);
        kv_len = __shfl_sync(~0u, length, owner);
        slots_before = slots + __shfl_sync(~0u, end - its, owner);
      }
      slots += __shfl_sync(~0u, end, args.num_sequences > 1 ? 31 : 0);
    }
    if (slots > args.num_slots || row_begin < 0) return;
    const int splits = static_cast<int>(prefill_splits(kv_len));
    if (splits == 1) return;
    const int query = row - row_begin, position = kv_len - queries + query;
    const int begin = position < 0 ? 0 : static_cast<int>(args.first_key(position)) / kPrefillSplitTokens;
    const int end = position < 0 ? 0 : position / kPrefillSplitTokens + 1;
    const int64_t first_slot = slots_before + int64_t{query} * splits + begin;
    const int64_t stride = args.num_heads();  // from slot to slot
    constexpr int kWarps = kPrefillMergeThreads / 32;
#pragma unroll 1
    for (int64_t head = int64_t{blockIdx.y} * kWarps + warp; head < args.num_heads();
         head += int64_t{gridDim.y} * kWarps) {
      const int64_t first = first_slot * stride + head;
      const float* const from = args.partial_sums + first * kDim + lane * kColumns;
      float maximum = minus_infinity(), weight = 0.0f, sums[kColumns] = {};
#pragma unroll 1
      for (int base = 0; base < end - begin; base += kBatch) {
        const int count = min(end - begin - base, kBatch);
        Vec<float, kColumns> parts[kBatch];
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          parts[i] = load<float, kColumns>(from + (base + min(i, count - 1)) * (stride * kDim));
        }
        // RowState::merge() of the parts in their order, the factors found a part a lane. Parts that saw nothing, where
        // anything may lie, are left out; before the first other one there are zeros.
        const float2 state =
            lane < count ? args.partial_states[first + (base + lane) * stride] : make_float2(minus_infinity(), 0.0f);
        const bool seen = state.y != 0.0f;
        float top = seen ? state.x : minus_infinity();
#pragma unroll
        for (int distance = 1; distance < kBatch; distance *= 2) {
          const float other = __shfl_up_sync(~0u, top, distance);
          if (lane >= distance) top = fmaxf(other, top);
        }
        top = fmaxf(maximum, top);
        float before = __shfl_up_sync(~0u, top, 1);
        if (lane == 0) before = maximum;
        const float decay = exp2_fast(__fsub_rn(before, finite_or_zero(top)));
        const float its_decay = exp2_fast(__fsub_rn(state.x, finite_or_zero(top)));
        const uint32_t all_seen = __ballot_sync(~0u, seen);
        maximum = __shfl_sync(~0u, top, kBatch - 1);
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          const float d = __shfl_sync(~0u, decay, i), e = __shfl_sync(~0u, its_decay, i);
          const float w = __shfl_sync(~0u, state.y, i);
          if ((all_seen >> i & 1) == 0) continue;
          weight = __fmaf_rn(w, e, __fmul_rn(weight, d));
#pragma unroll
          for (int c = 0; c < kColumns; ++c) sums[c] = __fmaf_rn(parts[i].values[c], e, __fmul_rn(sums[c], d));
        }
      }
      const float inverse = position < 0 ? 0.0f : inverse_weight(weight);
      Vec<T, kColumns> out;
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        out.values[c] = from_float<T>(position < 0 ? 0.0f : __fadd_rn(__fmul_rn(sums[c], inverse), 0.0f));
      }
      T* const to = static_cast<T*>(args.o) + row * args.o_stride + head * kDim + lane * kColumns;
      if (aligned) {
        store(to, out);
      } else {
#pragma unroll
        for (int c = 0; c < kColumns; ++c) to[c] = out.values[c];
      }
      if (args.lse != nullptr && lane == 0) {
        args.lse[row * args.num_heads() + head] = position < 0 ? minus_infinity() : __fadd_rn(maximum, log2f(weight));
      }
    }
  }
}

}  // namespace punica::cuda

// What the kernels of dispatch_bgmv on sm_90 share: which rows a block serves, barriers that count bytes, bulk copies.
//
// A block moves 16 or 32 KiB of weights, so that those of two kernels of a chain are resident together. These take
// little time to come: what it does besides must be few instructions. So one warp finds the rows for all.
#pragma once

#include "src/cuda/lora/bgmv_common.cuh"

namespace punica::cuda::bgmv {

inline constexpr int kBulkThreads = 128;
inline constexpr int kBulkWarps = kBulkThreads / 32;

// ---- Rows that share an adapter: find_group() for one warp ---------------------------------------------------------

inline constexpr int kMaxGroupRows = 64;  // of the kernels that take more than kGroupRows, those one after the other

struct BulkGroup {
  int64_t weights;              // address of the adapter
  int count;                    // 0: the block has nothing to do
  int part;                     // of the outputs, see find_group_in(): 0, or 1 for the block of the group's second row
  int64_t rows[kMaxGroupRows];  // of the columns below count
};

// Block `x` of those along the rows of a launch looks at the row b of the batch. Where there is one adapter the blocks
// of a run are numbered by groups instead, so that no block is started in vain: `before` rows of the run are those of
// earlier blocks.
struct BlockRow {
  int64_t b;  // if all rows of the run have the adapter
  int before;

  __device__ __forceinline__ BlockRow(const BgmvArgs& args, unsigned x) : b(args.first_row + x), before(0) {
    if (args.one_adapter) {
      // Powers of two: a division is dear where nothing else is left to do.
      const unsigned groups = kScanRows >> __popc(args.group_rows - 1);
      before = static_cast<int>(x & (groups - 1)) * args.group_rows;
      b = args.first_row + ((static_cast<int64_t>(x) * args.group_rows) & ~int64_t{kScanRows - 1}) + before;
    }
  }
};

// An entry of a table. Asked for where this stands, before what follows asks for more.
__device__ __forceinline__ int64_t load_entry(const int64_t* from) {
  int64_t entry;
  asm volatile("ld.global.b64 %0, [%1];" : "=l"(entry) : "l"(from));
  return entry;
}

// The adapter of row b alone, by every thread for itself: nothing to share, no barrier to wait for.
struct RowEntries {
  int64_t index, address;

  __device__ __forceinline__ void load(const BgmvArgs& args, int64_t b) {
    index = load_entry(args.indices + b);
    if (args.one_adapter) address = load_entry(args.w_ptr);
  }
  // False where the index names none.
  __device__ __forceinline__ bool find(const BgmvArgs& args, int64_t* weights) {
    if (args.one_adapter) {
      *weights = address;
      return index == 0;
    }
    if (index < 0 || index >= args.num_adapters) return false;
    *weights = load_entry(args.w_ptr + index);
    return true;
  }
};

// Which of `count` rows from b on have the one adapter that there is (or of one row, any), a bit each; by every warp
// for itself.
template <class Meanwhile>
__device__ __forceinline__ uint64_t find_rows(const BgmvArgs& args, int64_t b, int count, int64_t* weights,
                                              Meanwhile meanwhile) {
  if (args.group_rows == 1) {
    RowEntries entries;
    entries.load(args, b);
    meanwhile();
    return entries.find(args, weights) ? 1 : 0;
  }
  const int lane = threadIdx.x % 32;
  int64_t low = -1, high = -1;
  if (lane < count) low = load_entry(args.indices + b + lane);
  *weights = load_entry(args.w_ptr);
  if (lane + 32 < count) high = load_entry(args.indices + b + 32 + lane);
  meanwhile();
  const uint64_t valid = __ballot_sync(0xffffffffu, low == 0);
  return valid | static_cast<uint64_t>(__ballot_sync(0xffffffffu, high == 0)) << 32;
}

// The group among the first 32 * kWords rows of the run, all there are. By the whole of one warp. kParts: 2 where the
// block of the group's second row takes a part of the work too.
template <int kWords, int kParts, class Start>
__device__ __forceinline__ void find_group_in(const BgmvArgs& args, const BlockRow& block, int64_t run, int n,
                                              BulkGroup* group, Start start) {
  const int lane = threadIdx.x % 32;
  const int64_t* const indices = args.indices + run;
  const int64_t index = args.one_adapter ? 0 : args.indices[block.b];
  int64_t mine[kWords], addresses[kWords];
  // The first addresses come along with the indices, so that the one that is needed, if it is among them, takes no
  // second wait for memory.
#pragma unroll
  for (int i = 0; i < kWords; ++i) addresses[i] = 32 * i + lane < args.num_adapters ? args.w_ptr[32 * i + lane] : 0;
#pragma unroll
  for (int i = 0; i < kWords; ++i) mine[i] = 32 * i + lane < n ? indices[32 * i + lane] : -1;
  int count = 0;
  if (index >= 0 && index < args.num_adapters) {
    int64_t weights;
    if (index < 32 * kWords) {
      const int at = static_cast<int>(index);
      // By masks: of a choice the compiler would make an array in local memory.
      int64_t chosen = addresses[0];
      if constexpr (kWords > 1) {
        chosen = 0;
#pragma unroll
        for (int i = 0; i < kWords; ++i) chosen |= addresses[i] & -static_cast<int64_t>(at / 32 == i);
      }
      weights = __shfl_sync(0xffffffffu, chosen, at % 32);
    } else {
      weights = args.w_ptr[index];
    }
    uint32_t votes[kWords];
    int total = 0, before = block.before;
    // How many rows of the adapter come before the block's.
    const int me = args.one_adapter ? 0 : static_cast<int>(block.b - run);
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      votes[i] = __ballot_sync(0xffffffffu, mine[i] == index);
      const uint32_t earlier = me >= 32 * (i + 1) ? ~uint32_t{0} : me <= 32 * i ? 0 : (uint32_t{1} << (me % 32)) - 1;
      before += __popc(votes[i] & earlier);
      total += __popc(votes[i]);
    }
    const int part = before & (args.group_rows - 1);
    if (part < kParts && before < total) {
      start(weights);
      before -= part;
      count = min(total - before, args.group_rows);
      int column = -before;  // of the first row of the word
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        const int own = column + __popc(votes[i] & ((uint32_t{1} << lane) - 1));
        if (mine[i] == index && own >= 0 && own < count) group->rows[own] = run + 32 * i + lane;
        column += __popc(votes[i]);
      }
      if (lane == 0) {
        group->weights = weights;
        group->part = part;
      }
    }
  }
  if (lane == 0) group->count = count;
  __syncwarp();
}

// By the whole of one warp; groups have up to args.group_rows rows, a power of two. On return the warp sees `group`.
// `start` is called by the warp with the address of the adapter as soon as it is known that the block has work.
template <int kParts, class Start>
__device__ __forceinline__ void find_group_by_warp(const BgmvArgs& args, const BlockRow& block, BulkGroup* group,
                                                   Start start) {
  const int64_t run = block.b & ~int64_t{kScanRows - 1};
  const int n = static_cast<int>(min(args.batch - run, static_cast<int64_t>(kScanRows)));
  if (n <= 32) {
    find_group_in<1, kParts>(args, block, run, n, group, start);
  } else if (n <= 64) {
    find_group_in<2, kParts>(args, block, run, n, group, start);
  } else {
    find_group_in<4, kParts>(args, block, run, n, group, start);
  }
}

template <int kParts>
__device__ __forceinline__ void find_group_by_warp(const BgmvArgs& args, const BlockRow& block, BulkGroup* group) {
  find_group_by_warp<kParts>(args, block, group, [](int64_t) {});
}

// ---- A product that starts from zero -------------------------------------------------------------------------------

// d = a @ b, otherwise mma_m16n8k16.
template <class T>
__device__ __forceinline__ void mma_from_zero(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                              uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%10, %10, %10, %10};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "f"(0.0f));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%10, %10, %10, %10};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "f"(0.0f));
  }
}

// step_product() of four words that starts from zero, one product after the other.
template <class T>
__device__ __forceinline__ void step_product_from_zero(float (&d)[4], const Words<4>& upper, const Words<4>& lower,
                                                       const Words<4>& x) {
  mma_from_zero<T>(d, upper.values[0], lower.values[0], upper.values[1], lower.values[1], x.values[0], x.values[1]);
  const uint32_t a[4] = {upper.values[2], lower.values[2], upper.values[3], lower.values[3]};
  const uint32_t b[2] = {x.values[2], x.values[3]};
  mma_m16n8k16<T>(d, a, b);
}

// A step of two outputs, upper and lower; from the diagonals of the product a lane takes what is its own.
template <class T>
__device__ __forceinline__ void add_diagonals(float& upper_sum, float& lower_sum, const Words<4>& upper,
                                              const Words<4>& lower, const Words<4>& x, unsigned g) {
  float product[4];
  step_product_from_zero<T>(product, upper, lower, x);
  upper_sum += g % 2 != 0 ? product[1] : product[0];
  lower_sum += g % 2 != 0 ? product[3] : product[2];
}

// ---- Barriers in shared memory: an arrival says how many bytes to wait for -----------------------------------------

__device__ __forceinline__ void barrier_init(uint64_t* barrier, int arrivals) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
#endif
}

// After the barriers' initialisation, by the thread that did it: for the copy engine and the cluster's other blocks.
__device__ __forceinline__ void barrier_init_fence() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// Between what threads of the block do in shared memory and a copy engine's writes to the same place.
__device__ __forceinline__ void proxy_fence() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

__device__ __forceinline__ void barrier_expect(uint64_t* barrier, int bytes) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
#endif
}

// Waits for the end of a phase; what arrived in it is seen: from the copy engine, or from the cluster.
template <bool kCluster>
__device__ __forceinline__ void barrier_wait(uint64_t* barrier, int parity) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  uint32_t done;
  do {
    if constexpr (kCluster) {
      asm volatile(
          "{\n.reg .pred p;\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
          "selp.b32 %0, 1, 0, p;\n}"
          : "=r"(done)
          : "r"(shared_address(barrier)), "r"(parity)
          : "memory");
    } else {
      asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.b32 %0, 1, 0, p;\n}"
                   : "=r"(done)
                   : "r"(shared_address(barrier)), "r"(parity)
                   : "memory");
    }
  } while (done == 0);
#endif
}

// ---- Copies -------------------------------------------------------------------------------------------------------

// `to`, `from` and `bytes` are multiples of 16.
__device__ __forceinline__ void bulk_copy(void* to, const void* from, int bytes, uint64_t* barrier) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(to)),
               "l"(from), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
#endif
}

// A run of bytes with the alignment of an element. It lies in shared memory with the same offset from a multiple of 16
// as in global memory: what is whole there comes by bulk copy, the edges element by element.
struct Run {
  const unsigned char* from;
  int shift;  // offset from a multiple of 16
  int head;   // bytes before the whole pieces
  int whole;
  int tail;  // bytes after them

  __device__ __forceinline__ Run(const void* start, int bytes) : from(static_cast<const unsigned char*>(start)) {
    shift = static_cast<int>(reinterpret_cast<uintptr_t>(start) & 15);
    head = min((16 - shift) & 15, bytes);
    whole = (bytes - head) & ~15;
    tail = bytes - head - whole;
  }

  // `image` is a multiple of 16; byte 0 of the run comes to image + shift.
  __device__ __forceinline__ void copy_whole(unsigned char* image, uint64_t* barrier) const {
    if (whole > 0) bulk_copy(image + shift + head, from + head, whole, barrier);
  }

  // By eight threads, i = 0..7.
  __device__ __forceinline__ void copy_edges(unsigned char* image, int i) const {
    const auto copy = [&](int at) {
      *reinterpret_cast<uint16_t*>(image + shift + at) = *reinterpret_cast<const uint16_t*>(from + at);
    };
    if (2 * i < head) copy(2 * i);
    if (2 * i < tail) copy(head + whole + 2 * i);
  }
};

// kCount words of shared memory, zeros from element `count` on. kAligned: to their own size, and `count` is a multiple
// of 2 * kCount or below 0. Otherwise up to 4 bytes beyond are read.
template <int kCount, bool kAligned>
__device__ __forceinline__ Words<kCount> read_image(const unsigned char* from, int count) {
  Words<kCount> r = {};
  if constexpr (kAligned) {
    if (count > 0) r = *reinterpret_cast<const Words<kCount>*>(from);
  } else {
    const uint32_t odd = reinterpret_cast<uintptr_t>(from) & 2;
    const uint32_t* words = reinterpret_cast<const uint32_t*>(from - odd);
    uint32_t next = words[0];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const uint32_t word = next;
      next = words[i + 1];
      r.values[i] = __funnelshift_r(word, next, odd * 8);
      if (2 * i >= count) r.values[i] = 0;
      if (2 * i + 1 == count) r.values[i] &= 0xffffu;
    }
  }
  return r;
}

// kCount words of x, zeros from element `count` on.
template <int kCount, bool kAligned, class T>
__device__ __forceinline__ Words<kCount> load_x(const T* from, int count) {
  Words<kCount> r = {};
  if constexpr (kAligned && kCount == 4) {
    r = load_if(count > 0, from);
  } else if constexpr (kAligned) {
    if (count > 0) r = *reinterpret_cast<const Words<kCount>*>(from);
  } else {
    const uint16_t* elements = reinterpret_cast<const uint16_t*>(from);
#pragma unroll
    for (int i = 0; i < 2 * kCount; ++i) {
      if (i < count) r.values[i / 2] |= static_cast<uint32_t>(elements[i]) << (16 * (i % 2));
    }
  }
  return r;
}

__device__ __forceinline__ uint16_t bits_of(__half value) { return __half_as_ushort(value); }
__device__ __forceinline__ uint16_t bits_of(__nv_bfloat16 value) { return __bfloat16_as_ushort(value); }

template <class T>
__device__ __forceinline__ T bits_as(uint16_t bits) {
  if constexpr (std::is_same_v<T, __half>) {
    return __ushort_as_half(bits);
  } else {
    return __ushort_as_bfloat16(bits);
  }
}

// Eight elements, in words, to which as many sums times the scale are added.
template <class T>
__device__ __forceinline__ Words<4> add_sums(const BgmvArgs& args, const Words<4>& before, const float* sums) {
  const float4 low = *reinterpret_cast<const float4*>(sums), high = *reinterpret_cast<const float4*>(sums + 4);
  const float v[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
  Words<4> after;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    uint32_t word = 0;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const T value = bits_as<T>(static_cast<uint16_t>(before.values[i] >> (16 * e)));
      const T sum = from_float<T>(fmaf(args.scale, v[2 * i + e], to_float(value)));
      word |= static_cast<uint32_t>(bits_of(sum)) << (16 * e);
    }
    after.values[i] = word;
  }
  return after;
}

}  // namespace punica::cuda::bgmv

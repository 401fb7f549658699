// What the kernels of dispatch_bgmv share: their arguments, which batch rows a block serves, loads of operands.
#pragma once

#include <cstdint>

#include "src/cuda/common/device.cuh"
#include "src/cuda/common/mma.cuh"

namespace punica::cuda::bgmv {

struct BgmvArgs {
  void* y;
  const void* x;
  const int64_t* w_ptr;
  const int64_t* indices;
  int64_t y_stride, x_stride;  // elements
  int64_t layer_offset;        // elements before the layer in an adapter
  int64_t num_adapters;
  int64_t first_row, batch;  // this launch serves rows [first_row, batch); first_row is a multiple of kScanRows
  int h_in, h_out;
  float scale;
  bool early_reads;
  bool vectors;      // x, and W where its address is aligned, can be read by the widest loads of the kernel; short K on
                     // sm_80: and y two elements at a time
  bool wide_y;       // kernels that read y in pieces: y consists of whole, aligned pieces of 16 bytes
  bool one_adapter;  // sm_90: there is no other, see BlockRow
  int first_tile;    // of h_out, at blockIdx.y = 0
  int group_rows;    // sm_90: rows of a group, at most; a power of two
  int k_warp_bits;   // long K on sm_90: log2 of the warps that share K
  int resident;      // long K on sm_90: steps of a warp whose weights are in shared memory at a time
  int steps;         // long K: steps of a warp; bgmv_panel: row tiles of a chunk
  int team;          // float32: threads that share a row of W
};

// ---- Rows that share an adapter ------------------------------------------------------------------------------------

// Rows are grouped within aligned runs of this many, so that a block looks at a bounded number of indices, one a
// thread. A group that goes on in the next run reads its weights again, from L2.
inline constexpr int kScanRows = 128;
// Rows of a group, the columns of a tensor-core product.
inline constexpr int kGroupRows = 8;

struct Group {
  int count = 1;    // rows, 1..kGroupRows
  int64_t row = 0;  // that of column lane / 4 (below count)
  int64_t weights;  // address of the adapter
};

__device__ __forceinline__ int nth_set_bit(uint32_t word, int n) {
  int at = 0;
#pragma unroll
  for (int width = 16; width > 0; width /= 2) {
    const int ones = __popc((word >> at) & ((1u << width) - 1));
    if (n >= ones) {
      n -= ones;
      at += width;
    }
  }
  return at;
}

// The block of row b serves b and the next rows of the same adapter, up to kGroupRows, if the rows of this adapter
// before b are whole groups; otherwise, and where the index names no adapter, the answer is false and the block has
// nothing to do. Which rows a group consists of never changes their bits. Called by all threads, at least kScanRows.
__device__ __forceinline__ bool find_group(const BgmvArgs& args, int64_t b, Group* group) {
  __shared__ uint32_t matches[kScanRows / 32];
  const int tid = threadIdx.x, lane = tid % 32;
  const int64_t run = b - b % kScanRows;
  const int n = static_cast<int>(min(args.batch - run, static_cast<int64_t>(kScanRows)));
  // Two loads in flight together; the address that follows is fetched while the votes are counted.
  const int64_t mine = tid < n ? args.indices[run + tid] : -1;
  const int64_t index = args.indices[b];
  if (index < 0 || index >= args.num_adapters) return false;
  group->weights = args.w_ptr[index];
  group->row = b;
  if (n == 1) return true;
  if (tid < kScanRows) {
    const uint32_t votes = __ballot_sync(0xffffffffu, mine == index);
    if (lane == 0) matches[tid / 32] = votes;
  }
  __syncthreads();
  const int me = static_cast<int>(b - run);
  int before = 0, total = 0;
#pragma unroll
  for (int i = 0; i < kScanRows / 32; ++i) {
    const uint32_t word = matches[i];
    const uint32_t earlier = me >= 32 * (i + 1) ? 0xffffffffu : me <= 32 * i ? 0u : (1u << (me % 32)) - 1;
    before += __popc(word & earlier);
    total += __popc(word);
  }
  if (before % kGroupRows != 0) return false;
  group->count = min(total - before, kGroupRows);
  if (group->count > 1) {
    int n_th = before + lane / 4;
    uint32_t word = 0;
    int base = -1;
#pragma unroll
    for (int i = 0; i < kScanRows / 32; ++i) {
      const uint32_t candidate = matches[i];
      const int ones = __popc(candidate);
      if (base < 0 && n_th < ones) {
        base = 32 * i;
        word = candidate;
      }
      if (base < 0) n_th -= ones;
    }
    if (lane / 4 < group->count) group->row = run + base + nth_set_bit(word, n_th);
  }
  return true;
}

// ---- Operands ------------------------------------------------------------------------------------------------------

template <int kCount>
struct alignas(4 * kCount) Words {
  uint32_t values[kCount];
};

// Aligned 16 bytes, or zeros. One predicated instruction: a branch a load would end the run of loads in flight.
// Not the read-only path: what is read may have been written by the kernel that this one waited for.
__device__ __forceinline__ Words<4> load_if(bool valid, const void* from) {
  Words<4> r;
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %5, 0;\nmov.b32 %0, 0;\nmov.b32 %1, 0;\nmov.b32 %2, 0;\nmov.b32 %3, 0;\n"
      "@p ld.global.v4.u32 {%0, %1, %2, %3}, [%4];\n}"
      : "=&r"(r.values[0]), "=&r"(r.values[1]), "=&r"(r.values[2]), "=&r"(r.values[3])
      : "l"(from), "r"(static_cast<int>(valid)));
  return r;
}

// A 16-bit element, or zero. Predicated too: of several in a row each would wait for the one before.
__device__ __forceinline__ uint32_t load_element_if(bool valid, const void* from) {
  uint32_t r;
  asm volatile(
      "{\n.reg .pred p;\n.reg .b16 h;\nsetp.ne.b32 p, %2, 0;\nmov.b16 h, 0;\n@p ld.global.b16 h, [%1];\n"
      "cvt.u32.u16 %0, h;\n}"
      : "=r"(r)
      : "l"(from), "r"(static_cast<int>(valid)));
  return r;
}

// Starts a copy of kCount aligned words, or zeros, into the thread's own place in shared memory, so that loads in
// flight take no registers. Nobody else reads that place: waiting for one's own copies is all the ordering there is.
template <int kCount>
__device__ __forceinline__ void start_copy(Words<kCount>* to, const void* from, bool valid) {
  const auto shared = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  const int bytes = valid ? 4 * kCount : 0;
  if constexpr (kCount == 4) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(from), "r"(bytes) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(shared), "l"(from), "r"(bytes) : "memory");
  }
}

// The same of 16 bytes, by addresses in shared memory, and the read of them behind the wait.
__device__ __forceinline__ void copy_piece(uint32_t to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
__device__ __forceinline__ Words<4> read_piece(uint32_t from) {
  Words<4> r;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(r.values[0]), "=r"(r.values[1]), "=r"(r.values[2]), "=r"(r.values[3])
               : "r"(from)
               : "memory");
  return r;
}

// Reads a thread's own place. The order of these among each other and the copies stays as written.
template <int kCount>
__device__ __forceinline__ Words<kCount> read_copy(const Words<kCount>* from) {
  const auto shared = static_cast<uint32_t>(__cvta_generic_to_shared(from));
  Words<kCount> r;
  if constexpr (kCount == 4) {
    asm volatile("ld.volatile.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r.values[0]), "=r"(r.values[1]), "=r"(r.values[2]), "=r"(r.values[3])
                 : "r"(shared)
                 : "memory");
  } else {
    asm volatile("ld.volatile.shared.v2.u32 {%0, %1}, [%2];"
                 : "=r"(r.values[0]), "=r"(r.values[1])
                 : "r"(shared)
                 : "memory");
  }
  return r;
}

// Zeros from 16-bit element `count` on.
template <int kCount>
__device__ __forceinline__ void clear_from(int count, Words<kCount>& words) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (2 * i >= count) words.values[i] = 0;
    if (2 * i + 1 == count) words.values[i] &= 0xffffu;
  }
}

// The words that begin `shift` bytes, fewer than 16 and an even number, after those of `low`.
template <int kCount>
__device__ __forceinline__ Words<kCount> shift_pieces(const Words<4>& low, const Words<4>& high, uint32_t shift) {
  uint32_t v[8];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    v[i] = low.values[i];
    v[i + 4] = high.values[i];
  }
#pragma unroll
  for (int i = 0; i < 6; ++i) v[i] = (shift & 8) != 0 ? v[i + 2] : v[i];
#pragma unroll
  for (int i = 0; i < 5; ++i) v[i] = (shift & 4) != 0 ? v[i + 1] : v[i];
  Words<kCount> r;
#pragma unroll
  for (int i = 0; i < kCount; ++i) r.values[i] = __funnelshift_r(v[i], v[i + 1], (shift & 2) * 8);
  return r;
}

// kCount words from anywhere: `count` 16-bit elements, then zeros. start() asks for the aligned 16-byte windows that
// hold them, where these lie in [begin, end); finish() shifts them into place, or reads single elements. Nothing
// outside is touched.
template <int kCount>
class Unaligned {
 public:
  __device__ __forceinline__ void start(const void* from, int count, const void* begin, const void* end) {
    from_ = static_cast<const uint16_t*>(from);
    count_ = max(min(count, 2 * kCount), 0);
    const uintptr_t address = reinterpret_cast<uintptr_t>(from);
    const uintptr_t window = address & ~uintptr_t{15};
    shift_ = address & 15;
    const bool two = shift_ + 2 * count_ > 16;
    whole_ =
        window >= reinterpret_cast<uintptr_t>(begin) && window + (two ? 32 : 16) <= reinterpret_cast<uintptr_t>(end);
    low_ = load_if(whole_ && count_ > 0, reinterpret_cast<const void*>(window));
    high_ = load_if(whole_ && count_ > 0 && two, reinterpret_cast<const void*>(window + 16));
  }

  __device__ __forceinline__ Words<kCount> finish() const {
    Words<kCount> r = {};
    if (whole_) {
      r = shift_pieces<kCount>(low_, high_, shift_);
      clear_from(count_, r);
    } else {
#pragma unroll
      for (int i = 0; i < 2 * kCount; ++i) r.values[i / 2] |= load_element_if(i < count_, from_ + i) << (16 * (i % 2));
    }
    return r;
  }

 private:
  const uint16_t* from_;
  int count_;
  uint32_t shift_;
  bool whole_;
  Words<4> low_, high_;
};

// ---- Tensor-core steps ---------------------------------------------------------------------------------------------
//
// A step multiplies 16 rows of W with up to 8 rows of x over 2 * kCount * 4 elements of K (kCount words a lane). The
// lanes hold what they read: lane (g, t) = (lane / 4, lane % 4) the 2 * kCount elements from 2 * kCount * t on, of W's
// rows g and g + 8 of the tile and of the x of column g. Words 2i, 2i + 1 are product i. So K is permuted, in both
// operands alike, and no operand passes through shared memory. What lies beyond h_in is zero in both operands.

// Product i goes to sum[i % kSums], so that two products need not wait for each other.
template <class T, int kCount, int kSums>
__device__ __forceinline__ void step_product(float (&sum)[kSums][4], const Words<kCount>& upper,
                                             const Words<kCount>& lower, const Words<kCount>& x) {
#pragma unroll
  for (int i = 0; i < kCount / 2; ++i) {
    const uint32_t a[4] = {upper.values[2 * i], lower.values[2 * i], upper.values[2 * i + 1], lower.values[2 * i + 1]};
    const uint32_t b[2] = {x.values[2 * i], x.values[2 * i + 1]};
    mma_m16n8k16<T>(sum[i % kSums], a, b);
  }
}

// Fragments of products of 16 outputs (m) with 8 columns (n), to rows of columns that lie kPitch apart. Lane (g, t).
template <int kPitch, int kOut, int kRow>
__device__ __forceinline__ void store_fragments(const float (&sum)[kOut][kRow][4], float* to, int first_row, int g,
                                                int t) {
#pragma unroll
  for (int m = 0; m < kOut; ++m) {
#pragma unroll
    for (int n = 0; n < kRow; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        to[(first_row + 8 * n + 2 * t + e % 2) * kPitch + 16 * m + g + e / 2 * 8] = sum[m][n][e];
      }
    }
  }
}

}  // namespace punica::cuda::bgmv

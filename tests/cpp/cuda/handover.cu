// An item written to shared memory by one warp and read by others, handed over under two mbarriers ("full" and
// "empty"), as warp-specialised kernels do it: is racecheck right about it? Each bit of kMode adds something; the ones
// named broken are races, which the tool should find, all others are ordered by release and acquire.
//
//   nvcc -std=c++20 -O3 -lineinfo -arch=sm_90a handover.cu -o handover && compute-sanitizer --tool racecheck ./handover
//   1
#include <cstdint>
#include <cstdio>
#include <cstdlib>

enum Mode : int {
  kOwner = 1,          // a lane that changes writes the item, __syncwarp(), lane 0 arrives
  kCopyWarps = 2,      // three more warps of the producer's warpgroup read too; the producer reads its own items
  kLookahead = 4,      // consumers read item n + 1 before they give item n back
  kBrokenWrite = 8,    // broken: arrives first, writes afterwards
  kBrokenRead = 16,    // broken: gives back first, reads afterwards
  kWarpRelease = 32,   // consumers give back once a warp, after __syncwarp()
  kSetRegisters = 64,  // setmaxnreg in both branches
  kSelf = 128,         // the lane that writes arrives by itself
  kAll = 256,          // every lane of the producer arrives
};

__device__ uint32_t address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }
__device__ void init(uint64_t* b, int n) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address(b)), "r"(n) : "memory");
}
__device__ void arrive(uint64_t* b) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address(b)) : "memory");
}
__device__ void wait(uint64_t* b, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@done bra finished;\nbra "
      "again;\nfinished:\n}" ::"r"(address(b)),
      "r"(parity)
      : "memory");
}

struct Item {
  long long a, b, c;
  int rows, last;
};

template <int kMode>
__global__ void __launch_bounds__(384, 1) handover(long long* out, int count) {
  __shared__ Item items[2];
  __shared__ uint64_t full[2], empty[2];
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; ++i) {
      init(&full[i], kMode & kAll ? 32 : 1);
      init(&empty[i], (kMode & kWarpRelease ? 8 : 256) + (kMode & kCopyWarps ? 3 : 0));
    }
  }
  __syncthreads();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  long long sum = 0;
  if (threadIdx.x < 128) {
    if (kMode & kSetRegisters) asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
    if (warp == 0) {
      for (uint32_t n = 0;; ++n) {
        Item& item = items[n % 2];
        wait(&empty[n % 2], (n / 2 & 1) ^ 1);
        if (kMode & kBrokenWrite) {
          if (lane == 0) arrive(&full[n % 2]);
          __nanosleep(2000);
        }
        if (lane == (kMode & kOwner ? (n + 5) % 32 : 0)) {
          item.a = n;
          item.b = 2 * n;
          item.c = 3 * n;
          item.rows = n;
          item.last = n + 1 == count;
        }
        if (kMode & kOwner) __syncwarp();
        if (!(kMode & kBrokenWrite)) {
          // kSelf: the lane that wrote arrives; kAll: all lanes do.
          if ((kMode & kAll) || lane == (kMode & kSelf ? (n + 5) % 32 : 0)) arrive(&full[n % 2]);
        }
        __syncwarp();
        if (kMode & kCopyWarps) {
          sum += item.a + item.b + item.c + item.rows;
          __syncwarp();
        }
        if (n + 1 == count) break;
      }
    } else if (kMode & kCopyWarps) {
      for (uint32_t n = 0;; ++n) {
        const Item& item = items[n % 2];
        wait(&full[n % 2], n / 2 & 1);
        sum += item.a + item.b + item.c + item.rows;
        const bool last = item.last;
        __syncwarp();
        if (lane == 0) arrive(&empty[n % 2]);
        if (last) break;
      }
    }
  } else {
    if (kMode & kSetRegisters) asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
    wait(&full[0], 0);
    for (uint32_t n = 0;; ++n) {
      const Item& item = items[n % 2];
      if (kMode & kBrokenRead) {
        arrive(&empty[n % 2]);
        __nanosleep(2000);
      }
      const bool last = item.last;
      sum += item.a + item.b + item.c + item.rows;
      if (!last && (kMode & kLookahead)) {
        wait(&full[(n + 1) % 2], (n + 1) / 2 & 1);
        sum += items[(n + 1) % 2].a;
      }
      if (!(kMode & kBrokenRead)) {
        if (kMode & kWarpRelease) {
          __syncwarp();
          if (lane == 0) arrive(&empty[n % 2]);
        } else {
          arrive(&empty[n % 2]);
        }
      }
      if (last) break;
      if (!(kMode & kLookahead)) wait(&full[(n + 1) % 2], (n + 1) / 2 & 1);
    }
  }
  out[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}

template <int kMode>
void run(long long* out) {
  handover<kMode><<<2, 384>>>(out, 7);
  const cudaError_t error = cudaDeviceSynchronize();
  static long long host[768];
  cudaMemcpy(host, out, sizeof(host), cudaMemcpyDeviceToHost);
  std::printf("mode %d: %s, consumer %lld\n", kMode, cudaGetErrorString(error), host[200]);
  std::fflush(stdout);
}

int main(int argc, char** argv) {
  const int mode = argc > 1 ? atoi(argv[1]) : 0;
  long long* out;
  cudaMalloc(&out, 768 * 8);
  switch (mode) {
    case 0:
      run<0>(out);
      break;
    case 1:
      run<1>(out);
      break;
    case 2:
      run<2>(out);
      break;
    case 4:
      run<4>(out);
      break;
    case 32:
      run<32>(out);
      break;
    case 64:
      run<64>(out);
      break;
    case 6:
      run<6>(out);
      break;
    case 38:
      run<38>(out);
      break;
    case 7:
      run<7>(out);
      break;
    case 8:
      run<8>(out);
      break;
    case 16:
      run<16>(out);
      break;
    case 129:
      run<129>(out);
      break;
    case 257:
      run<257>(out);
      break;
  }
  return 0;
}

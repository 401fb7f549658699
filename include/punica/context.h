// How and where a call runs. Nothing in it changes a result.
#pragma once

namespace punica {

struct Context {
  // CUDA: the cudaStream_t that the work goes to.
  void* stream = nullptr;
  // CPU: at most this many threads; 0 takes PUNICA_NUM_THREADS, or else the CPUs that the process may use.
  int num_threads = 0;
  // CUDA: check the contents of index and pointer tensors, which synchronises. The CPU backend always checks them.
  bool check_contents = false;
  // CUDA: where it is given, set to true if check_contents was asked for but the stream is being captured, so that the
  // contents were not checked.
  bool* checks_skipped = nullptr;
  // CUDA: the caller promises that no kernel in flight writes weights, tables or old KV tokens, so that their loads may
  // be issued before the kernels ahead in the stream have ended (programmatic dependent launch).
  bool early_reads = false;
};

}  // namespace punica

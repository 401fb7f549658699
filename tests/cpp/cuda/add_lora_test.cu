// add_lora on a CUDA device against a float64 reference: slices, mixed ranks, padded slots, layers, alignments, rows
// and slices without work, what one rounding of v to the data type would lose; a row alone against the same row in
// every batch, bit for bit; tables of garbage; what may be read before the kernel ahead has ended. Runs the path that
// PUNICA_CUDA_ARCH names. Exits with 1 on failure, with 77 where there is no device.
#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

#include "tests/cpp/cuda/add_lora_tester.cuh"

namespace {

// The same bits whatever the alignment.
template <class T>
void alignment_case(int64_t h_in, int64_t h_out, int rank) {
  if (!in_part()) return;
  constexpr int64_t kRows = 11;
  g_case = "alignment " + std::to_string(h_in) + " " + std::to_string(h_out) + " " + std::to_string(rank);
  announce(g_case);
  Random random{99};
  std::vector<T> a(rank * h_in), b(h_out * rank), x(kRows * h_in), y(kRows * h_out), first;
  for (std::vector<T>* all : {&a, &b, &x, &y}) {
    for (T& v : *all) v = from<T>(random.value());
  }
  for (int offset = 0; offset < 9; ++offset) {
    const auto shifted = [&](const std::vector<T>& v, int by) {
      std::vector<T> r(by);
      r.insert(r.end(), v.begin(), v.end());
      r.resize(r.size() + 8);
      return r;
    };
    const int of_a = offset, of_b = offset == 2 ? 0 : offset, of_x = offset == 3 ? 0 : offset,
              of_y = offset == 5 ? 0 : offset;
    OnDevice<T> ad(shifted(a, of_a)), bd(shifted(b, of_b)), xd(shifted(x, of_x)), yd(shifted(y, of_y));
    OnDevice<int64_t> a_ptr({reinterpret_cast<int64_t>(ad.data + of_a)}),
        b_ptr({reinterpret_cast<int64_t>(bd.data + of_b)});
    OnDevice<int32_t> ranks({rank});
    OnDevice<float> scales({0.5f});
    const Batch batch(std::vector<int>(kRows, 0));
    const OnDevice<int32_t> order(batch.order), adapter(batch.adapter), start(batch.start);
    punica::AddLoraParams p;
    p.y = view(yd.data + of_y, kDType<T>, {kRows, h_out});
    p.x = view(xd.data + of_x, kDType<T>, {kRows, h_in});
    p.a_ptr = view(a_ptr.data, DType::kInt64, {1, 1});
    p.b_ptr = view(b_ptr.data, DType::kInt64, {1, 1});
    p.ranks = view(ranks.data, DType::kInt32, {1});
    p.scales = view(scales.data, DType::kFloat32, {1});
    p.batch.order = view(order.data, DType::kInt32, {kRows});
    p.batch.segment_adapter = view(adapter.data, DType::kInt32, {1});
    p.batch.segment_start = view(start.data, DType::kInt32, {2});
    p.slice_offsets[1] = h_out;
    const punica::Status status = punica::cuda::add_lora(p, {});
    if (!status.ok()) fail("alignment: " + status.message());
    must(cudaDeviceSynchronize());
    std::vector<T> got = yd.get();
    got = std::vector<T>(got.begin() + of_y, got.begin() + of_y + y.size());
    ++g_checks;
    if (offset == 0) {
      first = got;
    } else if (std::memcmp(first.data(), got.data(), got.size() * sizeof(T)) != 0) {
      fail(std::string("alignment changes bits: ") + punica::dtype_name(kDType<T>) + " " + g_case + " offset " +
           std::to_string(offset));
    }
  }
}

// Tables that hold anything: nothing outside of y's rows may change (and, under compute-sanitizer, be read).
template <class T>
void garbage_case(int turn) {
  if (!in_part()) return;
  g_case = "garbage " + std::to_string(turn);
  announce(g_case);
  Random random{static_cast<uint64_t>(turn) * 77 + 5};
  const int64_t rows = 1 + random.next() % (turn % 4 == 3 ? 200 : 40), capacity = rows + random.next() % 9, h_in = 96,
                width = 80;
  const int64_t segments = turn % 3 == 0 ? 200 : 1 + random.next() % 40, adapters = 3;
  const auto any = [&] {
    const uint32_t kind = random.next() % 8;
    return kind < 5    ? static_cast<int32_t>(random.next() % 12)
           : kind == 5 ? -static_cast<int32_t>(random.next() % 5)
                       : static_cast<int32_t>(random.next());
  };
  std::vector<int32_t> order(capacity), adapter(segments), start(segments + 1), ranks(adapters);
  for (std::vector<int32_t>* all : {&order, &adapter, &start, &ranks}) {
    for (int32_t& v : *all) v = any();
  }
  OnDevice<int32_t> od(order), ad(adapter), sd(start), rd(ranks);
  OnDevice<float> scales(std::vector<float>(adapters, 1.0f));
  const OnDevice<T> weights(std::vector<T>(16 * 96, from<T>(1.0f)));
  OnDevice<int64_t> ptr(std::vector<int64_t>(adapters, reinterpret_cast<int64_t>(weights.data)));
  const int64_t guard = 64;
  const std::vector<T> before((rows + 2) * width + 2 * guard, from<T>(1.0f));
  OnDevice<T> xd(std::vector<T>(rows * h_in, from<T>(1.0f))), yd(before);
  punica::AddLoraParams p;
  p.y = view(yd.data + guard, kDType<T>, {rows, width});
  p.x = view(xd.data, kDType<T>, {rows, h_in});
  p.a_ptr = p.b_ptr = view(ptr.data, DType::kInt64, {1, adapters});
  p.ranks = view(rd.data, DType::kInt32, {adapters});
  p.scales = view(scales.data, DType::kFloat32, {adapters});
  p.batch.order = view(od.data, DType::kInt32, {capacity});
  p.batch.segment_adapter = view(ad.data, DType::kInt32, {segments});
  p.batch.segment_start = view(sd.data, DType::kInt32, {segments + 1});
  p.slice_offsets[1] = width;
  p.max_rank = 12;
  p.a_layer_stride = p.b_layer_stride = 0;
  const punica::Status status = punica::cuda::add_lora(p, {});
  if (!status.ok()) fail("garbage: " + status.message());
  must(cudaDeviceSynchronize());
  const std::vector<T> after = yd.get();
  ++g_checks;
  for (size_t i = 0; i < after.size(); ++i) {
    const bool inside = static_cast<int64_t>(i) >= guard && static_cast<int64_t>(i) < guard + rows * width;
    if (!inside && std::memcmp(&after[i], &before[i], sizeof(T)) != 0) {
      fail(g_case + ": wrote behind y");
      break;
    }
  }
}

// ---- What may be read before the kernel ahead has ended -------------------------------------------------------------

// Lets its dependents start at once and writes late.
__global__ void late_writer(float* to, float to_value, uint16_t* bits, size_t count, uint16_t word) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
  const long long begin = clock64();
  while (clock64() - begin < 60000) {
  }
  for (size_t i = threadIdx.x; i < count; i += blockDim.x) {
    if (to != nullptr) to[i] = to_value;
    if (bits != nullptr) bits[i] = word;
  }
}

// Everything is one; `what` is written by the kernel ahead.
// `adapters`, all with the same weights, take turns.
void ordering_case(const char* what, bool early_reads, int64_t rows, int adapters) {
  if (!in_part()) return;
  using T = __nv_bfloat16;
  g_case = std::string("order ") + what;
  announce(g_case);
  const int64_t h_in = 256, width = 128;
  const int rank = 16;
  const auto ones = [](size_t count, float v) { return std::vector<T>(count, from<T>(v)); };
  OnDevice<T> a(ones(rank * h_in, 1)), b(ones(width * rank, 1)), x(ones(rows * h_in, 1)), y(ones(rows * width, 1));
  OnDevice<int64_t> a_ptr(std::vector<int64_t>(adapters, reinterpret_cast<int64_t>(a.data)));
  OnDevice<int64_t> b_ptr(std::vector<int64_t>(adapters, reinterpret_cast<int64_t>(b.data)));
  OnDevice<int32_t> ranks(std::vector<int32_t>(adapters, rank));
  OnDevice<float> scales(std::vector<float>(adapters, 1.0f));
  std::vector<int> of_row(rows);
  for (int64_t t = 0; t < rows; ++t) of_row[t] = static_cast<int>(t % adapters);
  const Batch batch(of_row);
  const auto segments = static_cast<int64_t>(batch.adapter.size());
  const OnDevice<int32_t> order(batch.order), adapter(batch.adapter), start(batch.start);
  punica::AddLoraParams p;
  p.y = view(y.data, kDType<T>, {rows, width});
  p.x = view(x.data, kDType<T>, {rows, h_in});
  p.a_ptr = view(a_ptr.data, DType::kInt64, {1, adapters});
  p.b_ptr = view(b_ptr.data, DType::kInt64, {1, adapters});
  p.ranks = view(ranks.data, DType::kInt32, {adapters});
  p.scales = view(scales.data, DType::kFloat32, {adapters});
  p.batch.order = view(order.data, DType::kInt32, {rows});
  p.batch.segment_adapter = view(adapter.data, DType::kInt32, {segments});
  p.batch.segment_start = view(start.data, DType::kInt32, {segments + 1});
  p.slice_offsets[1] = width;
  p.max_rank = rank;
  punica::Context context;
  cudaStream_t stream;
  must(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  context.stream = stream;
  context.early_reads = early_reads;
  const std::string which = what;
  const auto written = [&](OnDevice<T>& t) {
    late_writer<<<1, 256, 0, stream>>>(nullptr, 0, reinterpret_cast<uint16_t*>(t.data), t.count, 0x4000);  // 2.0
  };
  if (which == "x") written(x);
  if (which == "y") written(y);
  if (which == "A") written(a);
  if (which == "B") written(b);
  if (which == "scale") late_writer<<<1, 256, 0, stream>>>(scales.data, 2.0f, nullptr, scales.count, 0);
  const punica::Status status = punica::cuda::add_lora(p, context);
  if (!status.ok()) fail(g_case + ": " + status.message());
  must(cudaStreamSynchronize(stream));
  must(cudaStreamDestroy(stream));
  const float product = 256.0f * 16.0f;
  const float fresh = which == "y" ? product + 2 : 2 * product + 1, stale = product + 1;
  const bool late = early_reads && (which == "A" || which == "B" || which == "scale");
  // Only code made for sm_90 lets dependents start before its end.
  cudaFuncAttributes writer;
  must(cudaFuncGetAttributes(&writer, late_writer));
  const bool sm90 = punica::cuda::last_arch() != nullptr && std::string(punica::cuda::last_arch()) == "sm_90" &&
                    writer.ptxVersion >= 90;
  const float expected = value(from<T>(late && sm90 ? stale : fresh));
  // Early reads allow B to be read early; how much of it is asked for by then depends on the team.
  const float also = late && which == "B" && adapters > 1 ? value(from<T>(fresh)) : expected;
  ++g_checks;
  for (const T& got : y.get()) {
    if (value(got) != expected && value(got) != also) {
      fail(g_case + (early_reads ? " with" : " without") + " early reads: " + std::to_string(value(got)) +
           ", expected " + std::to_string(expected));
      break;
    }
  }
}

// Few and many segments of many rows.
template <class T>
void many_rows(const std::vector<int>& y_pads, Random& random) {
  for (const int64_t many : {600, 1500, 4100}) {
    Case c = {};
    c.rows = many;
    c.h_in = 512;
    c.offsets = {0, 640};
    for (const int count : {1, 5, 200, 900}) {
      c.ranks.assign(count, count == 5 ? 64 : 16);
      c.pattern = count == 200 ? 3 : 0;
      for (const int pad : y_pads) {
        c.y_pad = pad;
        run_case<T>(c, random);
      }
    }
  }
}

KernelCover g_cover;

// For compute-sanitizer: of all combinations of sizes around the limits between kernels, ranks, slices, alignments and
// early reads, as few and as small ones as launch every kernel that any of them does.
template <class T>
void run_small() {
  const std::vector<int> some_ranks[] = {{16, 8, 1}, {16, 16}, {8}, {17, 40, 0}, {32, 32}, {24, 64, 16}, {100, 8}};
  std::vector<Case> cases;
  for (const int64_t rows : {1, 9, 40, 130, 450, 4100}) {
    for (const int64_t h_in : {7, 64, 136, 520, 4104, 4160}) {
      for (const std::vector<int>& ranks : some_ranks) {
        // Long sums take long under a tool: only for the kernels that have their own.
        if (h_in > 4096 && ranks[0] != 8 && !((rows == 1 || rows == 4100) && ranks[0] == 24)) continue;
        for (int kind = 0; kind < 32; ++kind) {
          Case c = {};
          c.rows = rows, c.h_in = h_in, c.ranks = ranks;
          c.offsets = kind & 1 ? std::vector<int64_t>{0, 40, 104, 112} : std::vector<int64_t>{8, 80};
          c.y_pad = static_cast<int>((8 - c.width() % 8) % 8);
          c.early_reads = kind & 2;
          if (kind & 4) c.offset = 1, c.x_pad = 3, c.y_pad += 1;
          if (kind & 8) c.padded = 104, c.x_pad += 8, c.y_pad += 8, c.spare = 3;
          if (kind & 16) c.rank_turn = 1, c.pattern = 3, c.null_address = ranks.size() > 2;
          c.few = rows > 40;
          cases.push_back(c);
        }
      }
    }
  }
  const auto cost = [](const Case& c) {
    const int64_t all = c.h_in + c.width() + c.y_pad, done = std::min<int64_t>(c.rows, 20);
    return done * c.largest_rank() * all + (c.rows + int64_t{c.slices()} * c.largest_rank() * 2) * all;
  };
  std::stable_sort(cases.begin(), cases.end(), [&](const Case& a, const Case& b) { return cost(a) < cost(b); });
  Random random{7};
  for (const Case& c : cases) {
    std::vector<std::string> kernels;
    {
      const LaunchRecorder recorder;
      auto p = params_of<T>(c, static_cast<T*>(nowhere()) + c.offset, static_cast<T*>(nowhere()) + c.offset, c.rows,
                            nowhere(), nowhere(), nowhere(), nowhere());
      const int64_t segments = std::min<int64_t>(c.rows, static_cast<int64_t>(c.ranks.size()) + c.few) + c.spare;
      p.batch.order = view(nowhere(), DType::kInt32, {c.rows + c.spare});
      p.batch.segment_adapter = view(nowhere(), DType::kInt32, {segments});
      p.batch.segment_start = view(nowhere(), DType::kInt32, {segments + 1});
      punica::Context context;
      context.early_reads = c.early_reads;
      if (const punica::Status status = punica::cuda::add_lora(p, context); !status.ok()) fail(status.message());
      kernels = recorder.kernels();
    }
    if (g_cover.needs(kernels, {c.early_reads ? "early" : "in order", c.offset ? "unaligned" : "aligned",
                                c.padded ? "padded" : "dense", c.rank_turn ? "turned" : "straight",
                                c.slices() > 1 ? "slices" : "a slice", "rank " + std::to_string(c.ranks[0]),
                                c.rows > 1 ? "rows" : "a row"})) {
      run_case<T>(c, random);
    }
  }
  for (int i = 0; with_garbage() && i < 10; ++i) garbage_case<T>(i);
}

template <class T>
void run_all() {
  if (g_small) return run_small<T>();
  Random random{11};
  const std::vector<int> mixed = {8, 16, 32, 64, 1, 17, 40, 0}, even = {16, 16, 16, 16, 16};
  const int64_t rows[] = {1, 2, 7, 8, 9, 16, 17, 33, 64, 65, 128, 129, 300};
  int turn = 0;
  for (const int64_t h_in : {1, 7, 64, 100, 1024, 4096, 4099, 14336}) {
    for (const int rank : {1, 8, 16, 17, 32, 33, 64, 100, 128, 512}) {
      if (h_in * rank > 1100000) continue;
      const int64_t width = turn % 4 == 0 ? 4096 : turn % 4 == 1 ? 72 : turn % 4 == 2 ? 1000 : 333;
      for (size_t i = 0; i < std::size(rows); ++i) {
        if ((i + turn) % (h_in * rank > 70000 ? 13 : 5) != 0) continue;
        const int kind = (turn + static_cast<int>(i)) % 6;
        Case c = {};
        c.rows = rows[i];
        c.h_in = h_in;
        c.offsets = {kind == 2 ? 8 : kind == 4 ? 3 : 0};
        c.offsets.push_back(c.offsets[0] + width);
        c.ranks = {rank, rank, rank};
        c.x_pad = kind == 1 ? 8 : kind == 3 ? 1 : 0;
        c.y_pad = kind == 1 ? static_cast<int>(8 - (width + 3) % 8) : kind == 3 ? 2 : 0;
        c.offset = kind == 5 ? 1 : kind == 4 ? 4 : 0;
        c.pattern = kind % 4;
        c.spare = kind == 2 ? 3 : 0;
        c.early_reads = turn % 2 == 0;
        c.max_rank = kind == 0 ? 512 : 0;
        run_case<T>(c, random);
      }
      ++turn;
    }
  }
  // Mixed ranks, slices, padded slots, ranks by slice, addresses of none.
  for (size_t i = 0; i < std::size(rows); ++i) {
    const bool odd = i % 2 != 0;
    Case c = {};
    c.rows = rows[i];
    c.h_in = odd ? 1024 : 4096;
    c.offsets = {0, 512, 640, 768};
    c.ranks = mixed;
    c.rank_turn = odd ? 1 : 0;
    c.pattern = odd ? 0 : 3;
    c.spare = odd ? 9 : 0;
    c.early_reads = odd;
    c.null_address = true;
    run_case<T>(c, random);
    c.padded = 64;
    c.pattern = 1;
    run_case<T>(c, random);
    c.padded = 68;
    c.offsets = {5, 5, 105, 400};
    c.y_pad = 5;
    run_case<T>(c, random);
    // An adapter a row, and one for all.
    c = {};
    c.rows = rows[i];
    c.h_in = 320;
    c.offsets = {0, 256};
    c.ranks.assign(rows[i], odd ? 16 : 24);
    c.pattern = 1;
    run_case<T>(c, random);
    c.pattern = 2;
    c.ranks.resize(1);
    run_case<T>(c, random);
  }
  // Ranks that are whole pieces of 16 bytes but no whole tiles, in slots of 64; more than one piece of K a leaf with an
  // adapter a row, on both sides of what chooses how many blocks share a tile.
  for (const int rank : {8, 16, 24, 40, 48, 56}) {
    Case c = {};
    c.rows = 11;
    c.h_in = 1032;
    c.offsets = {0, 200, 264};
    c.ranks = {rank, 16, rank};
    c.padded = 64;
    c.max_rank = 64;
    c.early_reads = rank % 16 == 0;
    run_case<T>(c, random);
  }
  for (const int64_t distinct : {33, 130}) {
    Case c = {};
    c.rows = distinct;
    c.h_in = 4160;
    c.offsets = {0, 32};
    if (distinct > 128) c.offsets = {0, 32, 40};
    c.ranks.assign(distinct, 16);
    c.pattern = 1;
    run_case<T>(c, random);
  }
  many_rows<T>({0}, random);
  for (const int v : {1, 2}) {
    for (const int64_t h_in : {512, 4096}) {
      Case c = {};
      c.rows = 9;
      c.h_in = h_in;
      c.offsets = {0, 100};
      c.ranks = {16, 8, 64};
      c.values = v;
      run_case<T>(c, random);
    }
  }
  const int shapes[][3] = {{64, 64, 16}, {4096, 128, 16}, {512, 100, 8}, {136, 72, 40}, {100, 33, 17}, {256, 130, 128}};
  for (const auto& s : shapes) alignment_case<T>(s[0], s[1], s[2]);
  for (int i = 0; i < 40; ++i) garbage_case<T>(i);
}

// Slices that turn with the case, in rows of y that start at multiples of 16 bytes.
void set_aligned_columns(Case* c, int turn) {
  c->offsets = turn % 3 == 0   ? std::vector<int64_t>{0, 1024}
               : turn % 3 == 1 ? std::vector<int64_t>{8, 520, 648, 712}
                               : std::vector<int64_t>{0, 72, 1000};
  c->y_pad = static_cast<int>((8 - (c->offsets.back() + 3) % 8) % 8);
}

// Many rows, everything aligned to 16 bytes or not.
template <class T>
void run_many() {
  Random random{13};
  if (g_small) return;
  many_rows<T>({0, 5}, random);
  // Rows of y are aligned from here on: a width of 3 modulo 8.
  int turn = 0;
  for (const int64_t h_in : {64, 1032, 4096, 6152}) {
    for (const std::vector<int>& ranks :
         {std::vector<int>{16, 16, 16}, {8}, {32, 32}, {64, 64, 64, 64, 64}, {8, 16, 32, 64, 1, 17, 40, 0}}) {
      Case c = {};
      c.rows = turn % 2 == 0 ? 2100 : 1100;
      c.h_in = h_in;
      set_aligned_columns(&c, turn);
      c.ranks = ranks;
      c.rank_turn = turn % 2;
      c.pattern = turn % 4;
      c.padded = turn % 4 == 1 ? 64 : turn % 7 == 6 ? 68 : 0;
      c.early_reads = turn % 2 == 1;
      c.null_address = ranks.size() > 2 && turn % 5 == 4;
      c.spare = turn % 3;
      run_case<T>(c, random);
      if (c.rows > 2000) {
        c.pattern = 4;
        run_case<T>(c, random);
      }
      ++turn;
    }
  }
  // From 3072 rows on x is asked for early.
  for (const int turn : {0, 1, 2, 3}) {
    Case c = {};
    c.rows = 3072 + 67 * turn;
    c.h_in = turn % 2 == 0 ? 200 : 4168;
    c.offsets = {0, 72};
    c.y_pad = 5;
    c.ranks = {turn < 2 ? 16 : 64, 8};
    c.pattern = turn + 1;
    c.early_reads = turn % 3 == 0;
    run_case<T>(c, random);
  }
  for (const int v : {1, 2}) {
    Case c = {};
    c.rows = 2100;
    c.h_in = v == 1 ? 512 : 4096;
    c.offsets = {0, 64};
    c.y_pad = 5;
    c.ranks = {16, 8, 64};
    c.values = v;
    run_case<T>(c, random);
  }
}

// Few rows an adapter, x and y aligned to 16 bytes: the plain way, with weights that are aligned or not.
template <class T>
void run_few() {
  Random random{17};
  int turn = 0;
  for (const int64_t h_in : {8, 64, 1032, 4096, 6152}) {
    for (const std::vector<int>& ranks :
         {std::vector<int>{16, 16, 16}, {8}, {32, 32}, {64, 64, 64, 64, 64}, {8, 16, 32, 64, 1, 17, 40, 0}, {}}) {
      if (g_small && h_in > 100) continue;
      const int64_t rows[] = {1, 5, 16, 37, 64, 130};
      for (int i = turn % 3; i < 6; i += 3) {
        if (g_small && rows[i] > 40) continue;
        Case c = {};
        c.rows = rows[i];
        c.h_in = h_in;
        set_aligned_columns(&c, turn);
        c.ranks = ranks;
        if (ranks.empty()) c.ranks.assign(rows[i], turn % 2 == 0 ? 16 : 24);  // an adapter a row
        c.rank_turn = turn / 2 % 2;
        c.pattern = ranks.empty() ? 1 : (turn + i) % 4;
        c.padded = turn % 4 == 1 ? 64 : turn % 7 == 6 ? 68 : 0;
        c.early_reads = (turn + i) % 2 == 1;
        c.null_address = ranks.size() > 2 && turn % 5 == 4;
        // Many segments that no row is in: there may be far more tiles than there are, which the device finds out.
        c.spare = turn % 3 == 2 ? 60 : turn % 3;
        c.max_rank = turn % 5 == 0 ? 64 : 0;
        run_case<T>(c, random);
        ++turn;
      }
    }
  }
  // Adapters whose numbers are not those of their segments, or beyond them all.
  for (const int64_t segments : {40, 100, 250}) {
    Case c = {};
    c.rows = segments;
    c.h_in = 64;
    set_aligned_columns(&c, turn++);
    c.ranks.assign(400, segments == 40 ? 8 : 16);
    c.pattern = 3;
    c.early_reads = segments == 100;
    run_case<T>(c, random);
  }
}

}  // namespace

int main(int argc, char**) {
  g_small = argc > 1;  // any argument
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::printf("skipped: no CUDA device\n");
    return 77;
  }
  must(cudaSetDevice(0));
  punica::cuda::Arch arch;
  if (const punica::Status status = punica::cuda::active_arch(0, &arch); !status.ok()) {
    std::printf("FAILED: %s\n", status.message().c_str());
    return 1;
  }
  const auto section = [](const char* what, auto run) {
    const int before = g_checks;
    run();
    std::printf("%s: %d checks, %d failures so far\n", what, g_checks - before, g_failures);
    std::fflush(stdout);
  };
  section("bfloat16, few rows an adapter", run_few<__nv_bfloat16>);
  section("float16, few rows an adapter", run_few<__half>);
  section("bfloat16, many rows", run_many<__nv_bfloat16>);
  section("float16, many rows", run_many<__half>);
  section("bfloat16", run_all<__nv_bfloat16>);
  section("float16", run_all<__half>);
  section("float32", run_all<float>);
  section("order", [] {
    if (g_small) return;  // a tool lets no kernel start before the one ahead has ended
    for (const char* what : {"x", "y", "A", "B", "scale"}) {
      for (const bool early : {false, true}) {
        ordering_case(what, early, 5, 1);
        ordering_case(what, early, 130, 65);
      }
    }
  });
  Cases::get().finish();
  if (Cases::get().idle()) return 0;
  if (!launched_only(arch)) {
    fail("the kernels that ran are not those of " + std::string(punica::cuda::arch_name(arch)));
  }
  std::printf("%s: %d checks, %d failures\n", punica::cuda::arch_name(arch), g_checks, g_failures);
  return g_failures == 0 && g_checks > 0 ? 0 : 1;
}

// y = x W^T in int8, for CPUs: f32[N, I] rows are rounded to int8 with a step of their own, multiplied
// with int8 weights [O, I] that have one scale an output, and scaled back: f32[N, O].
//
// Bit for bit what `layers._quantized_linear` computes through XLA: sums of integers are exact in any
// order, and the few operations on floats are the same. Only the speed differs: a few rows take what
// reading the weight takes. Outputs are shared out in chunks that fit a core's second-level cache; each
// is multiplied by up to eight rows at a time, whose sums stay in registers.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include <immintrin.h>

#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;

constexpr float kSteps = 127, kStep = 1 / kSteps;
constexpr int64_t kChunkBytes = 256 * 1024;
constexpr int64_t kMinChunkBytes = 32 * 1024;
constexpr int64_t kChunksPerThread = 4;
constexpr int64_t kAhead = 4096;  // bytes of the weight that are asked for before they are read

// What a processor offers: `Row`, how it wants a row's steps; `kLane`, how many steps it multiplies at
// once (rows are padded with `Prepared(0)` to multiples of it); `Add`, sums + row * weight; and the
// sums over the lanes of four vectors. Where `kBiased`, steps are stored plus 128.

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)

using Row = uint8_t;  // vpdpbusd multiplies unsigned by signed bytes
using Vector = __m512i;
constexpr int64_t kLane = 64;
constexpr bool kBiased = true;

inline Row Prepared(int8_t step) { return static_cast<uint8_t>(step) ^ 0x80; }
inline Vector Zero() { return _mm512_setzero_si512(); }
inline Vector Bias() { return _mm512_set1_epi8(static_cast<char>(0x80)); }
inline Vector LoadRow(const Row* from) { return _mm512_loadu_si512(from); }
inline Vector LoadWeight(const int8_t* from) { return _mm512_loadu_si512(from); }
inline Vector Add(Vector sums, Vector row, Vector w) { return _mm512_dpbusd_epi32(sums, row, w); }

inline __m128i SumLanes(Vector a, Vector b, Vector c, Vector d) {
  const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
  const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
  const __m512i all = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
  const __m256i half =
      _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
  return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}

#else  // AVX2

using Row = int16_t;  // vpmaddwd multiplies 16 bits and adds pairs, which never overflows here
using Vector = __m256i;
constexpr int64_t kLane = 16;
constexpr bool kBiased = false;

inline Row Prepared(int8_t step) { return step; }
inline Vector Zero() { return _mm256_setzero_si256(); }
inline Vector Bias() { return Zero(); }
inline Vector LoadRow(const Row* from) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
}
inline Vector LoadWeight(const int8_t* from) {
  return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
inline Vector Add(Vector sums, Vector row, Vector w) {
  return _mm256_add_epi32(sums, _mm256_madd_epi16(row, w));
}

inline __m128i SumLanes(Vector a, Vector b, Vector c, Vector d) {
  const __m256i ab = _mm256_add_epi32(_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b));
  const __m256i cd = _mm256_add_epi32(_mm256_unpacklo_epi32(c, d), _mm256_unpackhi_epi32(c, d));
  const __m256i all = _mm256_add_epi32(_mm256_unpacklo_epi64(ab, cd), _mm256_unpackhi_epi64(ab, cd));
  return _mm_add_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
}

#endif

struct Shape {
  int64_t rows, width, outputs;
  int64_t padded() const { return (width + kLane - 1) / kLane * kLane; }
};

// Rounds a row to whole multiples of its step, which is returned: `quantization.quantize_rows`.
float Quantize(const float* x, int64_t width, Row* row) {
  // As integers, magnitudes have the order of floats, and one that is not a number is the largest.
  int32_t bits = 0;
  for (int64_t i = 0; i < width; ++i) {
    int32_t of_one;
    std::memcpy(&of_one, x + i, sizeof of_one);
    bits = std::max(bits, of_one & 0x7fffffff);
  }
  float largest;
  std::memcpy(&largest, &bits, sizeof largest);
  const float per_step = kSteps / std::max(largest, std::numeric_limits<float>::min());
  for (int64_t i = 0; i < width; ++i) {
    const float rounded = std::rint(x[i] * per_step);
    // Of what is not a number nothing, beyond the ends the ends, as XLA converts.
    const float inside = std::min(127.0f, std::max(-128.0f, rounded));
    row[i] = Prepared(rounded == rounded ? static_cast<int8_t>(static_cast<int32_t>(inside)) : 0);
  }
  return largest * kStep;
}

// One output of R rows. The loops over rows are unrolled, so that the sums are registers.
template <int R>
void Output(const Shape& shape, const Row* rows, const float* steps, const int8_t* weight, float scale,
            float* y) {
  constexpr int kSums = (R / 4 + 1) * 4;  // the rows', the weight's own, and zeros up to a multiple
  Vector sums[kSums];
#pragma GCC unroll 12
  for (int r = 0; r < kSums; ++r) sums[r] = Zero();
  const int64_t padded = shape.padded();
  int64_t i = 0;
  const auto add = [&](Vector w) __attribute__((always_inline)) {
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) sums[r] = Add(sums[r], LoadRow(rows + r * padded + i), w);
    if (kBiased) sums[R] = Add(sums[R], Bias(), w);
  };
  for (; i + kLane <= shape.width; i += kLane) {
    __builtin_prefetch(weight + i + kAhead);
    add(LoadWeight(weight + i));
  }
  if (i < shape.width) {
    alignas(64) int8_t rest[kLane] = {};
    std::memcpy(rest, weight + i, shape.width - i);
    add(LoadWeight(rest));
  }
  alignas(16) int32_t totals[kSums];
#pragma GCC unroll 12
  for (int r = 0; r < kSums; r += 4) {
    _mm_store_si128(reinterpret_cast<__m128i*>(totals + r),
                    SumLanes(sums[r], sums[r + 1], sums[r + 2], sums[r + 3]));
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
    const uint32_t sum = static_cast<uint32_t>(totals[r]) - static_cast<uint32_t>(totals[R]);
    y[r * shape.outputs] = static_cast<float>(static_cast<int32_t>(sum)) * (steps[r] * scale);
  }
}

template <int R>
void Outputs(const Shape& shape, const Row* rows, const float* steps, const int8_t* weight,
             const float* scale, float* y, int64_t count) {
  for (int64_t o = 0; o < count; ++o) {
    Output<R>(shape, rows, steps, weight + o * shape.width, scale[o], y + o);
  }
}

using OutputsFn = decltype(&Outputs<1>);
constexpr int64_t kMaxRows = 8;  // at a time
constexpr OutputsFn kOutputs[kMaxRows + 1] = {
    nullptr,    Outputs<1>, Outputs<2>, Outputs<3>, Outputs<4>,
    Outputs<5>, Outputs<6>, Outputs<7>, Outputs<8>};

// Runs chunks on all threads, this one included; one that comes late finds nothing left to do, but
// still looks into what they share.
template <typename Run>
void InParallel(ffi::ThreadPool& pool, int64_t chunks, Run run) {
  struct Shared {
    Run run;
    int64_t chunks;
    std::atomic<int64_t> next{0}, done{0};

    void Work() {
      for (;;) {
        const int64_t chunk = next.fetch_add(1, std::memory_order_relaxed);
        if (chunk >= chunks) return;
        run(chunk);
        done.fetch_add(1, std::memory_order_release);
      }
    }
  };
  const std::shared_ptr<Shared> shared(new Shared{std::move(run), chunks});
  for (int64_t other = 1; other < std::min(pool.num_threads(), chunks); ++other) {
    pool.Schedule([shared] { shared->Work(); });
  }
  shared->Work();
  while (shared->done.load(std::memory_order_acquire) < chunks) std::this_thread::yield();
}

// How many of `count` parts of so many bytes make a chunk.
int64_t PerChunk(const ffi::ThreadPool& pool, int64_t count, int64_t bytes) {
  const int64_t threads = std::max<int64_t>(1, pool.num_threads());
  return std::max<int64_t>(1, std::clamp(count * bytes / (threads * kChunksPerThread),
                                         kMinChunkBytes, kChunkBytes) /
                                  std::max<int64_t>(1, bytes));
}

using Floats = ffi::Buffer<ffi::F32, 2>;
using Weights = ffi::Buffer<ffi::S8, 2>;
using Sums = ffi::Buffer<ffi::S32, 2>;
using FloatVector = ffi::Buffer<ffi::F32, 1>;

ffi::Error Int8Linear(ffi::ThreadPool pool, Floats x, Weights weight, FloatVector scale,
                      ffi::Result<Floats> y) {
  const Shape shape{x.dimensions()[0], x.dimensions()[1], weight.dimensions()[0]};
  if (weight.dimensions()[1] != shape.width || scale.dimensions()[0] != shape.outputs ||
      y->dimensions()[0] != shape.rows || y->dimensions()[1] != shape.outputs) {
    return ffi::Error::InvalidArgument("int8 linear: shapes do not fit one another");
  }
  std::vector<Row> rows(shape.rows * shape.padded(), Prepared(0));
  std::vector<float> steps(shape.rows);
  for (int64_t r = 0; r < shape.rows; ++r) {
    steps[r] = Quantize(x.typed_data() + r * shape.width, shape.width,
                        rows.data() + r * shape.padded());
  }
  const int64_t per_chunk = PerChunk(pool, shape.outputs, shape.width);
  const auto run = [=, rows = rows.data(), steps = steps.data(), weight = weight.typed_data(),
                    scale = scale.typed_data(), y = y->typed_data()](int64_t chunk) {
    const int64_t first = chunk * per_chunk, count = std::min(per_chunk, shape.outputs - first);
    for (int64_t r = 0; r < shape.rows; r += kMaxRows) {
      kOutputs[std::min(kMaxRows, shape.rows - r)](
          shape, rows + r * shape.padded(), steps + r, weight + first * shape.width, scale + first,
          y + r * shape.outputs + first, count);
    }
  };
  InParallel(pool, (shape.outputs + per_chunk - 1) / per_chunk, run);
  return ffi::Error::Success();
}

// What follows sums that were taken elsewhere, so that no compiler fuses it with what comes after.
ffi::Error Int8Rescale(ffi::ThreadPool pool, Sums sums, FloatVector steps, FloatVector scale,
                       ffi::Result<Floats> y) {
  const int64_t rows = sums.dimensions()[0], outputs = sums.dimensions()[1];
  if (steps.dimensions()[0] != rows || scale.dimensions()[0] != outputs ||
      y->dimensions()[0] != rows || y->dimensions()[1] != outputs) {
    return ffi::Error::InvalidArgument("int8 rescale: shapes do not fit one another");
  }
  const int64_t per_chunk = PerChunk(pool, rows, outputs * sizeof(float));
  const auto run = [=, sums = sums.typed_data(), steps = steps.typed_data(),
                    scale = scale.typed_data(), y = y->typed_data()](int64_t chunk) {
    const int64_t end = std::min(rows, (chunk + 1) * per_chunk);
    for (int64_t r = chunk * per_chunk; r < end; ++r) {
      for (int64_t o = 0; o < outputs; ++o) {
        y[r * outputs + o] = static_cast<float>(sums[r * outputs + o]) * (steps[r] * scale[o]);
      }
    }
  };
  InParallel(pool, (rows + per_chunk - 1) / per_chunk, run);
  return ffi::Error::Success();
}

}  // namespace

// What the compiler's idea of this processor came to: how many products an instruction makes.
extern "C" const int32_t jaxspec_int8_lane = kLane;

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxspec_int8_linear, Int8Linear,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()
                                  .Arg<Weights>()
                                  .Arg<FloatVector>()
                                  .Ret<Floats>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxspec_int8_rescale, Int8Rescale,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Sums>()
                                  .Arg<FloatVector>()
                                  .Arg<FloatVector>()
                                  .Ret<Floats>());

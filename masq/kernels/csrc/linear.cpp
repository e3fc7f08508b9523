// Integer linears on x86: smooth and quantize rows, multiply codes exactly, scale and add. Loaded by masq/kernels/cpu.py.
//
// Shapes: M rows, K input channels, N output channels; KB = ceil(K / 64) blocks of input channels, panels of 32 outputs.
//
// Activations   [ceil(M / 16)][KB][16 rows][64] int8: AMX tiles; a row of a block is 64 consecutive bytes.
// 8-bit weights [panel][KB][2][16][16][4] int8: two tiles of 16 outputs; line r holds inputs 4r to 4r + 3 of each output.
// 4-bit weights [panel][KB][16][16][4] uint8: the same two tiles, the first in the low halves, the second in the high ones.
//               Codes are multiplied as 16 w, which the high half of a byte is without a shift; results are divided by 16,
//               which is exact.
//
// Every path computes the same integers. What follows is float32, in a fixed order and without fused multiply-add.

#include <math.h>
#include <stdlib.h>

#include "common.h"

#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

// A low-rank term U L2 of some rows, in bfloat16; L2 lies in tiles by panel, a panel belongs to one part of the outputs.
struct LowRank {
  const uint16_t* u;       // [count, width]: the columns of every part, side by side
  const int64_t* rows;     // [count]
  int64_t count, width;
  const uint16_t* tiles;   // [sum over panels of slices][2][16][16][2]: 32 ranks of 32 outputs
  const int64_t* starts;   // by panel: its first slice in tiles
  const int32_t* part_of;  // by panel
  const int32_t* columns;  // by part: its first column of u, and the width after the last
  const int32_t* firsts;   // by part: its first slice of a row's tiles, and their number after the last
  int64_t parts;
};

constexpr int kMaxLowRank = 4;
constexpr int64_t kSlice = 32;
constexpr int64_t kManyRows = 8;  // From here on AVX512 multiplies codes that were made unsigned beforehand.

// U in tiles [row tile][slice][16][32], and which row tiles have any of its rows.
struct LowRankRows {
  uint8_t* tiles = nullptr;
  uint8_t* present = nullptr;
};

struct Product {
  const int8_t* a;
  const float* a_scale;
  const uint8_t* w;
  const float* w_scale;
  const int32_t* offset;  // 128 times the sum of a column's codes, as they are multiplied.
  Bias bias;
  Addend addend;
  void* out;
  int out_dtype;
  int64_t m, n, k;
  int four_bits;
  int isa;
  const LowRank* low;
  LowRankRows low_rows[kMaxLowRank];
  int lows;

  int64_t blocks() const { return (k + kBlock - 1) / kBlock; }
  int64_t panel_bytes() const { return blocks() * kTileBytes * (four_bits ? 1 : 2); }
};

// ---- what a row is: read as it is, under RMSNorm, or SiLU of it times another ----

enum Kind { kPlain = 0, kNorm = 1, kGate = 2 };

struct Source {
  int kind;
  const void* x;
  int dtype;
  int64_t stride;        // Elements between rows of x
  const void* other;     // kGate: what SiLU(x) is multiplied by, in the dtype of x
  int64_t other_stride;
  const void* gamma;     // kNorm: [K]
  int gamma_dtype;
  float eps;             // kNorm: added to the mean of squares

  static constexpr int64_t size_of(int dtype) { return dtype == kFloat ? 4 : 2; }
  const void* line(int64_t row) const { return (const char*)x + row * stride * size_of(dtype); }
  const void* other_line(int64_t row) const { return (const char*)other + row * other_stride * size_of(dtype); }
};

void make_row_scalar(const Source& source, int64_t row, int64_t k, float* made) {
  const void *from = source.line(row), *other = source.other_line(row);
  float squares = 0;
  for (int64_t j = 0; j < k; ++j) {
    float value = load(from, j, source.dtype);
    if (source.kind == kGate) {
      float small = expf(-fabsf(value));  // Never above one, whatever the sign.
      value = value * (value >= 0 ? 1.0f : small) / (1.0f + small) * load(other, j, source.dtype);
    }
    squares += value * value;
    made[j] = value;
  }
  if (source.kind != kNorm) return;
  const float factor = 1.0f / sqrtf(squares / (float)k + source.eps);
  for (int64_t j = 0; j < k; ++j) {
    made[j] = made[j] * factor * load(source.gamma, j, source.gamma_dtype);
  }
}

// exp of numbers that are not positive: x = n ln 2 + r, and the series of exp(r) to the seventh power, whose rest is below
// 2^-27; NaN stays NaN.
AVX512_TARGET inline __m512 exp16(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-104.0f), x);
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
  // ln 2 in two parts: n times the first is exact.
  __m512 r = _mm512_sub_ps(x, _mm512_mul_ps(n, _mm512_set1_ps(0.693359375f)));
  r = _mm512_sub_ps(r, _mm512_mul_ps(n, _mm512_set1_ps(-2.12194440e-4f)));
  const float terms[7] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
  __m512 sum = _mm512_set1_ps(1.0f / 5040);
  for (float term : terms)
    sum = _mm512_add_ps(_mm512_mul_ps(sum, r), _mm512_set1_ps(term));
  return _mm512_scalef_ps(sum, n);
}

AVX512_TARGET inline __m512 gated16(__m512 gate, __m512 up) {
  const __m512 one = _mm512_set1_ps(1.0f), small = exp16(_mm512_sub_ps(_mm512_setzero_ps(), _mm512_abs_ps(gate)));
  const __m512 top = _mm512_mask_mov_ps(small, _mm512_cmp_ps_mask(gate, _mm512_setzero_ps(), _CMP_GE_OQ), one);
  return _mm512_mul_ps(_mm512_div_ps(_mm512_mul_ps(gate, top), _mm512_add_ps(one, small)), up);
}

AVX512_TARGET void make_row_avx512(const Source& source, int64_t row, int64_t k, float* made) {
  const void *from = source.line(row), *other = source.other_line(row);
  __m512 squares = _mm512_setzero_ps();
  for (int64_t j = 0; j < k; j += 16) {
    const __mmask16 mask = k - j >= 16 ? 0xffff : (__mmask16)((1u << (k - j)) - 1);
    __m512 value = load16(from, j, source.dtype, mask);
    if (source.kind == kGate) value = gated16(value, load16(other, j, source.dtype, mask));
    squares = _mm512_add_ps(squares, _mm512_mul_ps(value, value));
    _mm512_mask_storeu_ps(made + j, mask, value);
  }
  if (source.kind != kNorm) return;
  const float mean = _mm512_reduce_add_ps(squares) / (float)k;
  const __m512 factor = _mm512_set1_ps(1.0f / sqrtf(mean + source.eps));
  for (int64_t j = 0; j < k; j += 16) {
    const __mmask16 mask = k - j >= 16 ? 0xffff : (__mmask16)((1u << (k - j)) - 1);
    const __m512 scaled = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, made + j), factor);
    _mm512_mask_storeu_ps(made + j, mask, _mm512_mul_ps(scaled, load16(source.gamma, j, source.gamma_dtype, mask)));
  }
}

// ---- smoothing and quantization of one row ----

struct Rows {
  const float* inverse;         // [U, K] or null
  const int64_t* which;         // [M], row of inverse, or null for the first
  const uint16_t* centre;       // bfloat16 [C, K] or null
  const int64_t* which_centre;  // [M], row of centre, or null for the first
  int64_t m, k;
  int qmax;
  float divisor;  // Largest magnitude over scale: qmax, or more where ranges are cut off.
  int8_t* codes;
  float* scale;
  const int32_t* places;  // [M], where among the taken rows a row goes, -1 for nowhere; null where none is taken
  void* taken;            // Smoothed rows in the dtype in which they came

  const float* factors(int64_t row) const { return inverse ? inverse + (which ? which[row] : 0) * k : nullptr; }
  const uint16_t* centre_of(int64_t row) const {
    return centre ? centre + (which_centre ? which_centre[row] : 0) * k : nullptr;
  }
  int8_t* block(int64_t row, int64_t b) const {
    int64_t blocks = (k + kBlock - 1) / kBlock;
    return codes + ((row / kTileRows) * blocks + b) * kTileBytes + (row % kTileRows) * kBlock;
  }
};

// The scale of a row whose largest magnitude has these bits. Integers order like the floats, NaN above infinity.
inline float scale_of(uint32_t largest, float divisor) {
  float scale = bits_to_float(largest) / divisor;
  return scale < 1.17549435e-38f ? 1.0f : scale;
}

inline bool is_finite(float value) { return (float_to_bits(value) & 0x7f800000u) != 0x7f800000u; }

void quantize_row_scalar(const Rows& rows, const void* line, int dtype, int64_t row, float* smoothed) {
  const float* factors = rows.factors(row);
  const uint16_t* centre = rows.centre_of(row);
  uint32_t largest = 0;
  for (int64_t j = 0; j < rows.k; ++j) {
    float value = load(line, j, dtype);
    if (centre) value -= load(centre, j, kBfloat);
    if (factors) value *= factors[j];
    smoothed[j] = value;
    uint32_t magnitude = float_to_bits(value) & 0x7fffffffu;
    if (magnitude > largest) largest = magnitude;
  }
  float scale = scale_of(largest, rows.divisor);
  rows.scale[row] = scale;
  bool fine = is_finite(scale);
  for (int64_t j = 0; j < rows.k; j += kBlock) {
    int8_t* to = rows.block(row, j / kBlock);
    for (int64_t i = 0; i < kBlock; ++i) {
      // The compiler's rintf rounds half to even.
      float code = fine && j + i < rows.k ? __builtin_rintf(smoothed[j + i] / scale) : 0;
      to[i] = (int8_t)(code > rows.qmax ? rows.qmax : code < -rows.qmax ? -rows.qmax : code);
    }
  }
}

// A row less its centre, times its factors, in float32, padded with zeros to whole blocks; returns the bits of the largest
// magnitude.
template <int DTYPE, int SMOOTH, int CENTRE>
AVX512_TARGET uint32_t smooth_row_avx512(const Rows& rows, const void* line, int64_t row, float* smoothed) {
  const float* factors = rows.factors(row);
  const uint16_t* centre = rows.centre_of(row);
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  __m512i largest = _mm512_setzero_si512();
  const int64_t whole = rows.k / 16 * 16;
  for (int64_t j = 0; j < whole; j += 16) {
    __m512 value = load16(line, j, DTYPE, 0xffff);
    if (CENTRE) value = _mm512_sub_ps(value, load16(centre, j, kBfloat, 0xffff));
    if (SMOOTH) value = _mm512_mul_ps(value, _mm512_loadu_ps(factors + j));
    _mm512_storeu_ps(smoothed + j, value);
    largest = _mm512_max_epi32(largest, _mm512_and_si512(_mm512_castps_si512(value), magnitude));
  }
  for (int64_t j = whole; j < (rows.k + kBlock - 1) / kBlock * kBlock; j += 16) {
    __mmask16 mask = j < rows.k ? (__mmask16)((1u << (rows.k - j)) - 1) : 0;
    __m512 value = load16(line, j, DTYPE, mask);
    if (CENTRE) value = _mm512_sub_ps(value, load16(centre, j, kBfloat, mask));
    if (SMOOTH) value = _mm512_mul_ps(value, _mm512_maskz_loadu_ps(mask, factors + j));
    _mm512_storeu_ps(smoothed + j, value);
    largest = _mm512_max_epi32(largest, _mm512_and_si512(_mm512_castps_si512(value), magnitude));
  }
  return (uint32_t)_mm512_reduce_max_epi32(largest);
}

template <int DTYPE>
AVX512_TARGET uint32_t smooth_row_avx512(const Rows& rows, const void* line, int64_t row, float* smoothed) {
  if (rows.centre && rows.inverse) return smooth_row_avx512<DTYPE, 1, 1>(rows, line, row, smoothed);
  if (rows.centre) return smooth_row_avx512<DTYPE, 0, 1>(rows, line, row, smoothed);
  if (rows.inverse) return smooth_row_avx512<DTYPE, 1, 0>(rows, line, row, smoothed);
  return smooth_row_avx512<DTYPE, 0, 0>(rows, line, row, smoothed);
}

AVX512_TARGET uint32_t smooth_row_avx512(const Rows& rows, const void* line, int dtype, int64_t row, float* smoothed) {
  switch (dtype) {
    case kFloat: return smooth_row_avx512<kFloat>(rows, line, row, smoothed);
    case kBfloat: return smooth_row_avx512<kBfloat>(rows, line, row, smoothed);
    default: return smooth_row_avx512<kHalf>(rows, line, row, smoothed);
  }
}

AVX512_TARGET void quantize_row_avx512(const Rows& rows, const void* line, int dtype, int64_t row, float* smoothed) {
  const float scale = scale_of(smooth_row_avx512(rows, line, dtype, row, smoothed), rows.divisor);
  rows.scale[row] = scale;
  const bool fine = is_finite(scale);
  // Adding 1.5 * 2^23 rounds half to even and leaves the integer in the lowest bits.
  const __m512 shift = _mm512_set1_ps(12582912.0f), close = _mm512_set1_ps(0.4999f);
  const __m512 divisor = _mm512_set1_ps(scale), inverse = _mm512_set1_ps(1.0f / scale);
  const __m512 highest = _mm512_set1_ps(12582912.0f + rows.qmax), lowest = _mm512_set1_ps(12582912.0f - rows.qmax);
  const bool clipped = rows.divisor > (float)rows.qmax;
  int8_t* to = rows.block(row, 0);
  for (int64_t j = 0; j < rows.k; j += kBlock, to += kTileBytes) {
    if (!fine) {
      memset(to, 0, kBlock);
      continue;
    }
    __m512 shifted[4];
    __mmask16 unsure = 0;
    for (int i = 0; i < 4; ++i) {
      const __m512 quotient = _mm512_mul_ps(_mm512_loadu_ps(smoothed + j + 16 * i), inverse);
      shifted[i] = _mm512_add_ps(quotient, shift);
      const __m512 rest = _mm512_sub_ps(quotient, _mm512_sub_ps(shifted[i], shift));
      unsure |= _mm512_cmp_ps_mask(_mm512_abs_ps(rest), close, _CMP_NLT_UQ);
    }
    // The product is within 2^-15 of the quotient: only near the middle of two codes may the two round apart.
    if (__builtin_expect(unsure, 0))
      for (int i = 0; i < 4; ++i)
        shifted[i] = _mm512_add_ps(_mm512_div_ps(_mm512_loadu_ps(smoothed + j + 16 * i), divisor), shift);
    if (clipped)
      for (int i = 0; i < 4; ++i) shifted[i] = _mm512_min_ps(_mm512_max_ps(shifted[i], lowest), highest);
    for (int i = 0; i < 4; ++i)
      _mm_storeu_si128((__m128i*)(to + 16 * i), _mm512_cvtepi32_epi8(_mm512_castps_si512(shifted[i])));
  }
}

AVX512_TARGET void round_row_avx512(const float* values, void* out, int64_t from, int64_t k, int dtype) {
  for (int64_t j = 0; j < k; j += 16) {
    __mmask16 mask = k - j >= 16 ? 0xffff : (__mmask16)((1u << (k - j)) - 1);
    store16(out, from + j, dtype, mask, _mm512_loadu_ps(values + j));
  }
}

void quantize_rows(const Source& source, const Rows& rows, int isa, int threads) {
  const int64_t blocks = (rows.k + kBlock - 1) / kBlock;
  if (rows.m > kFewRows && rows.m % kTileRows) {  // Tiles read whole lines; few rows never go through tiles.
    int64_t tile = rows.m / kTileRows, used = rows.m % kTileRows;
    for (int64_t b = 0; b < blocks; ++b)
      memset(rows.codes + (tile * blocks + b) * kTileBytes + used * kBlock, 0, (kTileRows - used) * kBlock);
  }
  if (rows.m * rows.k < kParallelWork) threads = 1;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    float* smoothed = new float[2 * blocks * kBlock];
    float* made = smoothed + blocks * kBlock;
    const bool plain = source.kind == kPlain;
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows.m; ++row) {
      if (!plain && isa >= kVnni) make_row_avx512(source, row, rows.k, made);
      else if (!plain) make_row_scalar(source, row, rows.k, made);
      const void* line = plain ? source.line(row) : made;
      const int dtype = plain ? source.dtype : kFloat;
      if (isa >= kVnni) quantize_row_avx512(rows, line, dtype, row, smoothed);
      else quantize_row_scalar(rows, line, dtype, row, smoothed);
      if (!rows.places || rows.places[row] < 0) continue;
      const int64_t to = rows.places[row] * rows.k;
      if (isa >= kVnni) round_row_avx512(smoothed, rows.taken, to, rows.k, source.dtype);
      else for (int64_t j = 0; j < rows.k; ++j) store(rows.taken, to + j, source.dtype, smoothed[j]);
    }
    delete[] smoothed;
  }
}

// AVX512 alone.
void smooth_rows(const Source& source, const Rows& rows, void* out, int threads) {
  if (rows.m * rows.k < kParallelWork) threads = 1;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    float* smoothed = new float[(rows.k + kBlock - 1) / kBlock * kBlock];
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows.m; ++row) {
      smooth_row_avx512(rows, source.line(row), source.dtype, row, smoothed);
      round_row_avx512(smoothed, out, row * rows.k, rows.k, source.dtype);
    }
    delete[] smoothed;
  }
}

// ---- products of one panel of 32 outputs: int32 sums [rows][32] ----

inline int weight_at(const uint8_t* panel, int four_bits, int64_t b, int64_t input, int64_t output) {
  int64_t tile = output / 16, at = (input / 4) * 64 + (output % 16) * 4 + input % 4;
  if (!four_bits) return (int8_t)panel[(b * 2 + tile) * kTileBytes + at];
  uint8_t byte = panel[b * kTileBytes + at];
  return (int8_t)(tile ? byte & 0xf0 : byte << 4);
}

void panel_scalar(const Product& p, const uint8_t* panel, int64_t first, int64_t rows, int32_t* sums) {
  for (int64_t i = 0; i < rows * kPanel; ++i) sums[i] = 0;
  for (int64_t b = 0; b < p.blocks(); ++b)
    for (int64_t input = 0; input < kBlock; ++input)
      for (int64_t output = 0; output < kPanel; ++output) {
        int w = weight_at(panel, p.four_bits, b, input, output);
        for (int64_t row = 0; row < rows; ++row) {
          int64_t m = first + row;
          const int8_t* a = p.a + ((m / kTileRows) * p.blocks() + b) * kTileBytes + (m % kTileRows) * kBlock;
          sums[row * kPanel + output] += a[input] * w;
        }
      }
}

// Codes widened to 16 bits: pairs of products cannot saturate, as they would with unsigned 8-bit operands.
AVX2_TARGET void panel_avx2(const Product& p, const uint8_t* panel, int64_t first, int64_t rows, int32_t* sums) {
  const __m256i high = _mm256_set1_epi8((char)0xf0);
  for (int64_t row = 0; row < rows; ++row) {
    int64_t m = first + row;
    const int8_t* a = p.a + (m / kTileRows) * p.blocks() * kTileBytes + (m % kTileRows) * kBlock;
    __m256i sum[8];  // Two partial sums for each of 32 outputs, four outputs a register.
    for (auto& one : sum) one = _mm256_setzero_si256();
    for (int64_t b = 0; b < p.blocks(); ++b)
      for (int64_t r = 0; r < 16; ++r) {
        int32_t four;
        memcpy(&four, a + b * kTileBytes + 4 * r, 4);
        const __m256i x = _mm256_broadcastq_epi64(_mm_cvtepi8_epi16(_mm_cvtsi32_si128(four)));
        for (int half = 0; half < 2; ++half) {  // Outputs 0-7 and 8-15 of both tiles.
          __m256i tiles[2];
          if (p.four_bits) {
            __m256i packed = _mm256_loadu_si256((const __m256i*)(panel + b * kTileBytes + r * 64 + half * 32));
            tiles[0] = _mm256_and_si256(_mm256_slli_epi16(packed, 4), high);
            tiles[1] = _mm256_and_si256(packed, high);
          } else {
            for (int t = 0; t < 2; ++t)
              tiles[t] = _mm256_loadu_si256((const __m256i*)(panel + (b * 2 + t) * kTileBytes + r * 64 + half * 32));
          }
          for (int t = 0; t < 2; ++t)
            for (int q = 0; q < 2; ++q) {
              __m128i bytes = q ? _mm256_extracti128_si256(tiles[t], 1) : _mm256_castsi256_si128(tiles[t]);
              __m256i& to = sum[t * 4 + half * 2 + q];
              to = _mm256_add_epi32(to, _mm256_madd_epi16(_mm256_cvtepi8_epi16(bytes), x));
            }
        }
      }
    for (int i = 0; i < 8; ++i) {
      int32_t parts[8];
      _mm256_storeu_si256((__m256i*)parts, sum[i]);
      for (int j = 0; j < 4; ++j) sums[row * kPanel + i * 4 + j] = parts[2 * j] + parts[2 * j + 1];
    }
  }
}

// Codes of some rows with 128 added, in the layout of activations from the tile of the first row on; null where they are
// made while they are read, which few rows can afford.
struct Unsigned {
  const uint8_t* codes;
  int64_t first;
};

AVX512_TARGET void make_unsigned(const Product& p, int64_t first, int64_t rows, uint8_t* to) {
  const __m512i sign = _mm512_set1_epi8((char)0x80);
  const int8_t* from = p.a + first / kTileRows * p.blocks() * kTileBytes;
  const int64_t bytes = (rows + kTileRows - 1) / kTileRows * p.blocks() * kTileBytes;
  for (int64_t i = 0; i < bytes; i += 64)
    _mm512_storeu_si512(to + i, _mm512_xor_si512(_mm512_loadu_si512(from + i), sign));
}

template <int FOUR>
AVX512_TARGET inline void load_weights(const uint8_t* line, __m512i& low, __m512i& top) {
  if (FOUR) {
    const __m512i packed = _mm512_loadu_si512(line), high = _mm512_set1_epi8((char)0xf0);
    low = _mm512_and_si512(_mm512_slli_epi16(packed, 4), high);
    top = _mm512_and_si512(packed, high);
  } else {
    low = _mm512_loadu_si512(line);
    top = _mm512_loadu_si512(line + kTileBytes);
  }
}

// What the excess of unsigned activations added to the sums of 16 outputs is taken away. Sums wrap around; so does this,
// and what remains is small enough to be right.
AVX512_TARGET inline void store_sums(const Product& p, const uint8_t* panel, int t, __m512i total, int32_t* sums) {
  const int32_t* offset = p.offset + (panel - p.w) / p.panel_bytes() * kPanel;
  _mm512_storeu_si512(sums + 16 * t, _mm512_sub_epi32(total, _mm512_loadu_si512(offset + 16 * t)));
}

// Eight rows of one tile, codes made unsigned: a weight is read once for all of them, and one address serves the rows.
template <int FOUR>
AVX512_TARGET void eight_rows_vnni(const Product& p, const uint8_t* panel, const uint8_t* codes, int32_t* sums) {
  __m512i sum[8][2];
  for (auto& one : sum) one[0] = one[1] = _mm512_setzero_si512();
  for (int64_t b = 0; b < p.blocks(); ++b, codes += kTileBytes) {
    const uint8_t* w = panel + b * kTileBytes * (FOUR ? 1 : 2);
#pragma GCC unroll 16
    for (int r = 0; r < 16; ++r) {
      __m512i low, top;
      load_weights<FOUR>(w + r * 64, low, top);
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) {
        int32_t four;
        memcpy(&four, codes + i * kBlock + 4 * r, 4);
        const __m512i x = _mm512_set1_epi32(four);
        sum[i][0] = _mm512_dpbusd_epi32(sum[i][0], x, low);
        sum[i][1] = _mm512_dpbusd_epi32(sum[i][1], x, top);
      }
    }
  }
  for (int i = 0; i < 8; ++i)
    for (int t = 0; t < 2; ++t) store_sums(p, panel, t, sum[i][t], sums + i * kPanel);
}

// R rows at once; unsigned activations (a + 128), whose excess the offset of the column takes away again.
template <int R, int FOUR>
AVX512_TARGET void rows_vnni(const Product& p, const uint8_t* panel, int64_t first, int32_t* sums) {
  constexpr int kChains = R == 1 ? 4 : (R == 2 ? 2 : 1);  // Enough sums in flight to hide the latency of one.
  const int8_t* a[R];
  for (int i = 0; i < R; ++i) {
    int64_t m = first + i;
    a[i] = p.a + (m / kTileRows) * p.blocks() * kTileBytes + (m % kTileRows) * kBlock;
  }
  __m512i sum[R][2][kChains];
  for (int i = 0; i < R; ++i)
    for (int t = 0; t < 2; ++t)
      for (int c = 0; c < kChains; ++c) sum[i][t][c] = _mm512_setzero_si512();
  for (int64_t b = 0; b < p.blocks(); ++b) {
    const uint8_t* w = panel + b * kTileBytes * (FOUR ? 1 : 2);
#pragma GCC unroll 16
    for (int r = 0; r < 16; ++r) {
      __m512i low, top;
      _mm_prefetch((const char*)(w + r * 64 + kAhead), _MM_HINT_T1);
      load_weights<FOUR>(w + r * 64, low, top);
      for (int i = 0; i < R; ++i) {
        uint32_t four;
        memcpy(&four, a[i] + b * kTileBytes + 4 * r, 4);
        const __m512i x = _mm512_set1_epi32((int)(four ^ 0x80808080u));
        sum[i][0][r % kChains] = _mm512_dpbusd_epi32(sum[i][0][r % kChains], x, low);
        sum[i][1][r % kChains] = _mm512_dpbusd_epi32(sum[i][1][r % kChains], x, top);
      }
    }
  }
  for (int i = 0; i < R; ++i)
    for (int t = 0; t < 2; ++t) {
      __m512i total = sum[i][t][0];
      for (int c = 1; c < kChains; ++c) total = _mm512_add_epi32(total, sum[i][t][c]);
      store_sums(p, panel, t, total, sums + i * kPanel);
    }
}

template <int FOUR>
void panel_vnni(const Product& p, const uint8_t* panel, int64_t first, int64_t rows, const Unsigned& made, int32_t* sums) {
  int64_t row = 0;
  for (; made.codes && row + 8 <= rows; row += 8) {
    const int64_t m = first - made.first + row;
    const uint8_t* codes = made.codes + m / kTileRows * p.blocks() * kTileBytes + m % kTileRows * kBlock;
    eight_rows_vnni<FOUR>(p, panel, codes, sums + row * kPanel);
  }
  for (; row + 4 <= rows; row += 4) rows_vnni<4, FOUR>(p, panel, first + row, sums + row * kPanel);
  switch (rows - row) {
    case 3: rows_vnni<3, FOUR>(p, panel, first + row, sums + row * kPanel); break;
    case 2: rows_vnni<2, FOUR>(p, panel, first + row, sums + row * kPanel); break;
    case 1: rows_vnni<1, FOUR>(p, panel, first + row, sums + row * kPanel); break;
    default: break;
  }
}

AMX_TARGET inline void unpack(const uint8_t* packed, uint8_t* tiles) {
  const __m512i high = _mm512_set1_epi8((char)0xf0);
  for (int r = 0; r < 16; ++r) {
    __m512i line = _mm512_loadu_si512(packed + r * 64);
    _mm512_store_si512(tiles + r * 64, _mm512_and_si512(_mm512_slli_epi16(line, 4), high));
    _mm512_store_si512(tiles + kTileBytes + r * 64, _mm512_and_si512(line, high));
  }
}

// Sums of 16 rows (or 32, in PAIRS) over some blocks, added to what is there unless these are the first blocks.
template <int PAIRS>
AMX_TARGET inline void tiles_amx(const int8_t* a, int64_t a_step, const uint8_t* w, int64_t blocks, bool first, int32_t* sums) {
  constexpr int kStride = kPanel * 4;
  int32_t* below = sums + kTileRows * kPanel;
  if (first) {
    _tile_zero(0);
    _tile_zero(1);
    if (PAIRS) {
      _tile_zero(2);
      _tile_zero(3);
    }
  } else {
    _tile_loadd(0, sums, kStride);
    _tile_loadd(1, sums + 16, kStride);
    if (PAIRS) {
      _tile_loadd(2, below, kStride);
      _tile_loadd(3, below + 16, kStride);
    }
  }
  for (int64_t b = 0; b < blocks; ++b) {
    _tile_loadd(4, a + b * kTileBytes, kBlock);
    _tile_loadd(6, w + 2 * b * kTileBytes, kBlock);
    _tile_loadd(7, w + (2 * b + 1) * kTileBytes, kBlock);
    _tile_dpbssd(0, 4, 6);
    _tile_dpbssd(1, 4, 7);
    if (PAIRS) {
      _tile_loadd(5, a + a_step + b * kTileBytes, kBlock);
      _tile_dpbssd(2, 5, 6);
      _tile_dpbssd(3, 5, 7);
    }
  }
  _tile_stored(0, sums, kStride);
  _tile_stored(1, sums + 16, kStride);
  if (PAIRS) {
    _tile_stored(2, below, kStride);
    _tile_stored(3, below + 16, kStride);
  }
}

// Sums over blocks from `from` to `to`, added to what is there unless these are the first.
AMX_TARGET void panel_amx(const Product& p, const uint8_t* panel, int64_t first, int64_t rows, int64_t from, int64_t to,
                          int32_t* sums, uint8_t* unpacked) {
  const int64_t step = p.blocks() * kTileBytes;
  const int8_t* a = p.a + first / kTileRows * step;
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
  for (int64_t begin = from; begin < to; begin += kChunkBlocks) {
    int64_t count = to - begin < kChunkBlocks ? to - begin : kChunkBlocks;
    const uint8_t* w = panel + 2 * begin * kTileBytes;
    if (p.four_bits) {
      for (int64_t b = 0; b < count; ++b) unpack(panel + (begin + b) * kTileBytes, unpacked + 2 * b * kTileBytes);
      w = unpacked;
    }
    int64_t tile = 0;
    for (; tile + 2 <= tiles; tile += 2)
      tiles_amx<1>(a + tile * step + begin * kTileBytes, step, w, count, begin == 0, sums + tile * kTileRows * kPanel);
    if (tile < tiles)
      tiles_amx<0>(a + tile * step + begin * kTileBytes, step, w, count, begin == 0, sums + tile * kTileRows * kPanel);
  }
}

// ---- low-rank terms of one panel: float sums [rows][32], of the row tiles that have any ----

void spread_rows(const LowRank& low, int64_t m, LowRankRows& to) {
  const int64_t row_tiles = (m + kTileRows - 1) / kTileRows, slices = low.firsts[low.parts];
  to.tiles = (uint8_t*)calloc((size_t)(row_tiles * slices * kTileBytes), 1);
  to.present = (uint8_t*)calloc((size_t)row_tiles, 1);
  if (!to.tiles || !to.present) __builtin_trap();
  for (int64_t i = 0; i < low.count; ++i) {
    const int64_t row = low.rows[i], tile = row / kTileRows;
    to.present[tile] = 1;
    for (int64_t part = 0; part < low.parts; ++part)
      for (int64_t s = low.firsts[part]; s < low.firsts[part + 1]; ++s) {
        int64_t column = low.columns[part] + (s - low.firsts[part]) * kSlice, width = low.columns[part + 1] - column;
        memcpy(to.tiles + (tile * slices + s) * kTileBytes + (row % kTileRows) * kBlock, low.u + i * low.width + column,
               2 * (width < kSlice ? width : kSlice));
      }
  }
}

// What one modality adds to a row tile of a panel: tiles of its rows and of its factors, and how many of each.
struct Term {
  const uint8_t *u, *w;
  int64_t count;
};

inline Term term_of(const Product& p, int l, int64_t panel, int64_t tile) {
  const LowRank& low = p.low[l];
  const int64_t part = low.part_of[panel], begin = low.firsts[part];
  return {p.low_rows[l].tiles + (tile * low.firsts[low.parts] + begin) * kTileBytes,
          (const uint8_t*)low.tiles + low.starts[panel] * 2 * kTileBytes, low.firsts[part + 1] - begin};
}

// Sums of the terms of all modalities; any[t] says whether row tile t has one.
AMX_TARGET void panel_low_rank(const Product& p, int64_t panel, int64_t first, int64_t rows, float* sums, uint8_t* any) {
  for (int64_t t = 0; t < (rows + kTileRows - 1) / kTileRows; ++t) {
    const int64_t tile = first / kTileRows + t;
    any[t] = 0;
    for (int l = 0; l < p.lows; ++l) {
      if (!p.low_rows[l].present[tile]) continue;
      if (!any[t]) {
        _tile_zero(0);
        _tile_zero(1);
      }
      any[t] = 1;
      const Term term = term_of(p, l, panel, tile);
      for (int64_t s = 0; s < term.count; ++s) {
        _tile_loadd(4, term.u + s * kTileBytes, kBlock);
        _tile_loadd(6, term.w + 2 * s * kTileBytes, kBlock);
        _tile_loadd(7, term.w + (2 * s + 1) * kTileBytes, kBlock);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
      }
    }
    if (any[t]) {
      _tile_stored(0, sums + t * kTileRows * kPanel, kPanel * 4);
      _tile_stored(1, sums + t * kTileRows * kPanel + 16, kPanel * 4);
    }
  }
}

// The same without AMX.
BF16_TARGET void panel_low_rank_bf16(const Product& p, int64_t panel, int64_t first, int64_t rows, float* sums, uint8_t* any) {
  for (int64_t t = 0; t < (rows + kTileRows - 1) / kTileRows; ++t) {
    const int64_t tile = first / kTileRows + t;
    float* to = sums + t * kTileRows * kPanel;
    any[t] = 0;
    for (int l = 0; l < p.lows; ++l) {
      if (!p.low_rows[l].present[tile]) continue;
      const Term term = term_of(p, l, panel, tile);
      for (int64_t half = 0; half < 2; ++half)
        eight_rows_bf16(term.u + half * 8 * kBlock, term.w, term.count, !any[t], to + half * 8 * kPanel);
      any[t] = 1;
    }
  }
}

// ---- scaling, adding, rounding ----

void finish_scalar(const Product& p, int64_t column, int64_t first, int64_t rows, const int32_t* sums) {
  int64_t width = p.n - column < kPanel ? p.n - column : kPanel;
  for (int64_t row = 0; row < rows; ++row) {
    int64_t m = first + row;
    const float* bias = p.bias.of(m, p.n);
    for (int64_t j = 0; j < width; ++j) {
      int32_t sum = p.four_bits ? sums[row * kPanel + j] / 16 : sums[row * kPanel + j];
      float value = (float)sum * p.a_scale[m];
      value *= p.w_scale[column + j];
      if (p.addend.places && p.addend.places[m] >= 0) value += added(p.addend, p.addend.places[m], column + j);
      if (bias) value += bias[column + j];
      store(p.out, m * p.n + column + j, p.out_dtype, value);
    }
  }
}

AVX512_TARGET void finish_avx512(const Product& p, int64_t column, int64_t first, int64_t rows, const int32_t* sums,
                                 const float* low, const uint8_t* any) {
  for (int64_t j = 0; j < kPanel && column + j < p.n; j += 16) {
    int64_t width = p.n - column - j;
    __mmask16 mask = width >= 16 ? 0xffff : (__mmask16)((1u << width) - 1);
    __m512 scale = _mm512_maskz_loadu_ps(mask, p.w_scale + column + j);
    for (int64_t row = 0; row < rows; ++row) {
      int64_t m = first + row;
      const float* bias = p.bias.of(m, p.n);
      __m512i sum = _mm512_loadu_si512(sums + row * kPanel + j);
      if (p.four_bits) sum = _mm512_srai_epi32(sum, 4);
      __m512 value = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), _mm512_set1_ps(p.a_scale[m]));
      value = _mm512_mul_ps(value, scale);
      if (any && any[row / kTileRows]) value = _mm512_add_ps(value, _mm512_loadu_ps(low + row * kPanel + j));
      if (p.addend.places && p.addend.places[m] >= 0)
        value = _mm512_add_ps(value, added16(p.addend, p.addend.places[m], column + j, mask));
      if (bias) value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(mask, bias + column + j));
      store16(p.out, m * p.n + column + j, p.out_dtype, mask, value);
    }
  }
}

// Without tiles.
void sum_panel(const Product& p, const uint8_t* panel, int64_t first, int64_t rows, const Unsigned& codes, int32_t* sums) {
  if (p.isa >= kVnni && p.four_bits) panel_vnni<1>(p, panel, first, rows, codes, sums);
  else if (p.isa >= kVnni) panel_vnni<0>(p, panel, first, rows, codes, sums);
  else if (p.isa == kAvx2) panel_avx2(p, panel, first, rows, sums);
  else panel_scalar(p, panel, first, rows, sums);
}

void finish_panel(const Product& p, int64_t index, int64_t first, int64_t rows, const int32_t* sums, float* low, uint8_t* any,
                  bool tiles) {
  if (p.lows && tiles) panel_low_rank(p, index, first, rows, low, any);
  else if (p.lows) panel_low_rank_bf16(p, index, first, rows, low, any);
  if (p.isa >= kVnni) finish_avx512(p, index * kPanel, first, rows, sums, low, p.lows ? any : nullptr);
  else finish_scalar(p, index * kPanel, first, rows, sums);
}

// How the codes are cut so that those in use stay in the second cache: so many rows, so many blocks of inputs. Tiles are
// added to sums of earlier blocks, which is cheaper than to read the weight again for other rows; the others take whole rows.
struct Cut {
  int64_t rows, blocks;
};

Cut cut_of(const Product& p, bool tiles) {
  const int64_t blocks = p.blocks();
  int64_t rows = kRowBytes / (blocks * kBlock) / 32 * 32;
  if (rows >= kMaxRows || !tiles) return {rows < 64 ? 64 : (rows > kMaxRows ? kMaxRows : rows), blocks};
  rows = p.m < kMaxRows ? (p.m + kTileRows - 1) / kTileRows * kTileRows : kMaxRows;
  const int64_t parts = (rows * blocks * kBlock + kRowBytes - 1) / kRowBytes;
  return {rows, (blocks + parts - 1) / parts};
}

void multiply(Product& p, int threads) {
  const int64_t panels = (p.n + kPanel - 1) / kPanel, blocks = p.blocks();
  const bool tiles = p.isa == kAmx && (p.m > kFewRows || p.lows);
  for (int l = 0; l < p.lows; ++l) spread_rows(p.low[l], p.m, p.low_rows[l]);
  const Cut cut = cut_of(p, tiles);
  const int64_t together = cut.rows;
  // Sums of every panel, kept from some blocks to the next.
  int32_t* kept = cut.blocks < blocks ? (int32_t*)_mm_malloc(panels * together * kPanel * 4, 64) : nullptr;
  if (cut.blocks < blocks && !kept) __builtin_trap();
  if (p.m * p.k * p.n < kParallelWork * 16) threads = 1;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    alignas(64) uint8_t unpacked[kChunkBlocks * 2 * kTileBytes];
    alignas(64) int32_t own[kMaxRows * kPanel];
    alignas(64) float low[kMaxRows * kPanel];
    uint8_t any[kMaxRows / kTileRows] = {};
    // Of many rows on AVX512: their codes as unsigned ones, once for all panels.
    const bool many = !tiles && p.isa >= kVnni && p.m >= kManyRows;
    uint8_t* made = many ? (uint8_t*)_mm_malloc(((together < p.m ? together : p.m) + kTileRows) * p.blocks() * kBlock, 64) : nullptr;
    if (tiles) open_tiles();
    for (int64_t first = 0; first < p.m; first += together) {
      int64_t rows = p.m - first < together ? p.m - first : together;
      if (made) make_unsigned(p, first, rows, made);
      const Unsigned codes{made, first};
      for (int64_t begin = 0, end; begin < blocks; begin = end) {
        end = begin + cut.blocks < blocks ? begin + cut.blocks : blocks;
        // A panel stays with its thread.
#pragma omp for schedule(static) nowait
        for (int64_t index = 0; index < panels; ++index) {
          const uint8_t* panel = p.w + index * p.panel_bytes();
          int32_t* sums = kept ? kept + index * together * kPanel : own;
          if (tiles) panel_amx(p, panel, first, rows, begin, end, sums, unpacked);
          else sum_panel(p, panel, first, rows, codes, sums);
          if (end == blocks) finish_panel(p, index, first, rows, sums, low, any, tiles);
        }
      }
    }
    if (tiles) close_tiles();
    if (made) _mm_free(made);
  }
  if (kept) _mm_free(kept);
  for (int l = 0; l < p.lows; ++l) {
    free(p.low_rows[l].tiles);
    free(p.low_rows[l].present);
  }
}

}  // namespace

extern "C" {

// The best instruction set that this processor and this system offer, a number of Isa.
int masq_best_isa() {
  __builtin_cpu_init();
  bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (!__builtin_cpu_supports("avx2")) return kScalar;
  if (!avx512 || !__builtin_cpu_supports("avx512vnni")) return kAvx2;
#ifdef __linux__
  unsigned eax = 7, ebx = 0, ecx = 0, edx = 0;
  __asm__("cpuid" : "+a"(eax), "=b"(ebx), "+c"(ecx), "=d"(edx));
  // AMX tiles and int8; the system must grant the tile state (ARCH_REQ_XCOMP_PERM, XTILEDATA).
  if ((edx >> 24 & 1) && (edx >> 25 & 1) && syscall(SYS_arch_prctl, 0x1023, 18) == 0) return kAmx;
#endif
  return __builtin_cpu_supports("avx512bf16") ? kBf16 : kVnni;
}

// Bytes of the codes of m rows.
int64_t masq_code_bytes(int64_t m, int64_t k) {
  return (m + kTileRows - 1) / kTileRows * ((k + kBlock - 1) / kBlock) * kTileBytes;
}

void masq_quantize(const void* x, int dtype, const float* inverse, const int64_t* which, const uint16_t* centre,
                   const int64_t* which_centre, int64_t m, int64_t k, int qmax, float divisor, int8_t* codes,
                   float* scale, const int32_t* places, void* taken, int isa, int threads) {
  const Rows rows{inverse, which, centre, which_centre, m, k, qmax, divisor, codes, scale, places, taken};
  quantize_rows(Source{kPlain, x, dtype, k, nullptr, 0, nullptr, 0, 0}, rows, isa, threads);
}

// Rows under RMSNorm.
void masq_quantize_norm(const void* x, int dtype, const void* gamma, int gamma_dtype, float eps, const float* inverse,
                        const int64_t* which, const uint16_t* centre, const int64_t* which_centre, int64_t m, int64_t k,
                        int qmax, float divisor, int8_t* codes, float* scale, const int32_t* places, void* taken, int isa,
                        int threads) {
  const Rows rows{inverse, which, centre, which_centre, m, k, qmax, divisor, codes, scale, places, taken};
  quantize_rows(Source{kNorm, x, dtype, k, nullptr, 0, gamma, gamma_dtype, eps}, rows, isa, threads);
}

// SiLU(gate) * up, rows of each so many elements apart.
void masq_quantize_gate(const void* gate, const void* up, int dtype, int64_t gate_stride, int64_t up_stride,
                        const float* inverse, const int64_t* which, const uint16_t* centre, const int64_t* which_centre,
                        int64_t m, int64_t k, int qmax, float divisor, int8_t* codes, float* scale,
                        const int32_t* places, void* taken, int isa, int threads) {
  const Rows rows{inverse, which, centre, which_centre, m, k, qmax, divisor, codes, scale, places, taken};
  const Source source{kGate, gate, dtype, gate_stride, up, up_stride, nullptr, 0, 0};
  quantize_rows(source, rows, isa, threads);
}

// Smoothed rows in their own dtype; AVX512 alone.
void masq_smooth(const void* x, int dtype, const float* inverse, const int64_t* which, const uint16_t* centre,
                 const int64_t* which_centre, int64_t m, int64_t k, void* out, int threads) {
  const Rows rows{inverse, which, centre, which_centre, m, k, 1, 1.0f, nullptr, nullptr, nullptr, nullptr};
  smooth_rows(Source{kPlain, x, dtype, k, nullptr, 0, nullptr, 0, 0}, rows, out, threads);
}

void masq_gemm(const int8_t* codes, const float* a_scale, const uint8_t* w, const float* w_scale, const int32_t* offset,
               const float* bias, const int64_t* which_bias, const int32_t* places, const void* const* addends,
               const int64_t* starts, int parts, int addend_dtype, void* out, int out_dtype, int64_t m, int64_t n, int64_t k, int four_bits, int isa, int threads,
               const void* low, int lows) {
  Addend addend{places, addends, starts, parts, addend_dtype};
  Product p{codes, a_scale, w, w_scale, offset, Bias{bias, which_bias}, addend, out, out_dtype, m, n, k, four_bits, isa, (const LowRank*)low, {}, lows};
  multiply(p, threads);
}
}

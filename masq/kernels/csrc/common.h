// What the kernels share: instruction sets, numbers of 16 bits, tiles.

#ifndef MASQ_COMMON_H
#define MASQ_COMMON_H

#include <immintrin.h>
#include <stdint.h>
#include <string.h>
namespace {

// What is added to some rows: by row its place, -1 for none; values of consecutive parts of the outputs, each [n, width].
struct Addend {
  const int32_t* places;  // or null
  const void* const* values;
  const int64_t* starts;  // First output of each part, and the number of outputs after the last.
  int parts, dtype;
};

// One for all rows, or several [C, n] and by row which.
struct Bias {
  const float* values;   // or null
  const int64_t* which;  // or null for the first

  const float* of(int64_t row, int64_t n) const { return values ? values + (which ? which[row] : 0) * n : nullptr; }
};

enum Isa { kScalar = 0, kAvx2 = 1, kVnni = 2, kBf16 = 3, kAmx = 4 };
enum Dtype { kFloat = 0, kBfloat = 1, kHalf = 2 };

constexpr int64_t kTileRows = 16, kBlock = 64, kPanel = 32, kTileBytes = kTileRows * kBlock;
constexpr int64_t kChunkBlocks = 16;    // Blocks of a panel that are unpacked at a time: 32 KiB, which the first cache holds.
constexpr int64_t kMaxRows = 256;       // Rows whose sums are kept at a time.
constexpr int64_t kRowBytes = 3 << 19;  // Codes of rows that are kept at a time: three quarters of a second cache of 2 MiB.
constexpr int64_t kFewRows = 4;         // Up to here a product is bound by reading the weight: no tiles, no unpacked copy.
constexpr int64_t kAhead = 4096;        // Bytes by which reading a weight once runs ahead: into the next page.
constexpr int64_t kParallelWork = 1 << 15;

#define AVX2_TARGET __attribute__((target("avx2,f16c")))
#define AVX512_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c")))
#define BF16_TARGET __attribute__((target("avx512bf16,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c")))
#define AMX_TARGET __attribute__((target("amx-tile,amx-int8,amx-bf16,avx512bf16,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c")))

// ---- numbers of 16 bits ----

inline float bits_to_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

inline uint16_t to_bfloat(float value) {
  uint32_t bits = float_to_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
  return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

inline float half_to_float(uint16_t half) {
  uint32_t sign = (uint32_t)(half & 0x8000u) << 16, exponent = (half >> 10) & 31, fraction = half & 0x3ffu;
  if (exponent == 31) return bits_to_float(sign | 0x7f800000u | fraction << 13);
  if (exponent == 0) {
    float value = (float)fraction * 5.9604644775390625e-08f;  // 2^-24
    return sign ? -value : value;
  }
  return bits_to_float(sign | (exponent + 112) << 23 | fraction << 13);
}

inline uint16_t to_half(float value) {
  uint32_t bits = float_to_bits(value), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return (uint16_t)(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return (uint16_t)(sign | 0x7c00u);  // rounds to infinity
  if (magnitude < 0x38800000u) {                                    // subnormal: adding 0.5 rounds at 2^-24
    uint32_t rounded = float_to_bits(bits_to_float(magnitude) + 0.5f) - float_to_bits(0.5f);
    return (uint16_t)(sign | rounded);
  }
  uint32_t odd = magnitude >> 13 & 1;
  return (uint16_t)(sign | (magnitude + 0xc8000fffu + odd) >> 13);
}

inline float load(const void* from, int64_t index, int dtype) {
  if (dtype == kFloat) return ((const float*)from)[index];
  uint16_t raw = ((const uint16_t*)from)[index];
  return dtype == kBfloat ? bits_to_float((uint32_t)raw << 16) : half_to_float(raw);
}

inline void store(void* to, int64_t index, int dtype, float value) {
  if (dtype == kFloat) ((float*)to)[index] = value;
  else ((uint16_t*)to)[index] = dtype == kBfloat ? to_bfloat(value) : to_half(value);
}

AVX512_TARGET inline __m512 load16(const void* from, int64_t index, int dtype, __mmask16 mask) {
  if (dtype == kFloat) return _mm512_maskz_loadu_ps(mask, (const float*)from + index);
  __m256i raw = _mm256_maskz_loadu_epi16(mask, (const uint16_t*)from + index);
  if (dtype == kBfloat) return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
  return _mm512_cvtph_ps(raw);
}

inline int part_of(const Addend& addend, int64_t column) {
  int part = 0;
  while (part + 1 < addend.parts && column >= addend.starts[part + 1]) ++part;
  return part;
}

inline float added(const Addend& addend, int64_t place, int64_t column) {
  int part = part_of(addend, column);
  int64_t start = addend.starts[part], width = addend.starts[part + 1] - start;
  return load(addend.values[part], place * width + column - start, addend.dtype);
}

// Sixteen of them from a column on, those in the mask.
AVX512_TARGET inline __m512 added16(const Addend& addend, int64_t place, int64_t column, __mmask16 mask) {
  int part = part_of(addend, column);
  int64_t start = addend.starts[part], end = addend.starts[part + 1];
  if (column + 16 <= end || part + 1 == addend.parts)
    return load16(addend.values[part], place * (end - start) + column - start, addend.dtype, mask);
  alignas(64) float values[16] = {};  // Two parts meet within them.
  for (int i = 0; i < 16; ++i)
    if (mask >> i & 1) values[i] = added(addend, place, column + i);
  return _mm512_load_ps(values);
}

AVX512_TARGET inline void store16(void* to, int64_t index, int dtype, __mmask16 mask, __m512 value) {
  if (dtype == kFloat) {
    _mm512_mask_storeu_ps((float*)to + index, mask, value);
    return;
  }
  __m256i raw;
  if (dtype == kBfloat) {
    __m512i bits = _mm512_castps_si512(value);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    rounded = _mm512_mask_mov_epi32(_mm512_srli_epi32(rounded, 16), nan, _mm512_set1_epi32(0x7fc0));
    raw = _mm512_cvtepi32_epi16(rounded);
  } else {
    raw = _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  _mm256_mask_storeu_epi16((uint16_t*)to + index, mask, raw);
}

// ---- tiles of AMX: 16 lines of 64 bytes ----

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

AMX_TARGET void open_tiles() {
  TileConfig config;
  for (int tile = 0; tile < 8; ++tile) {
    config.bytes[tile] = kBlock;
    config.rows[tile] = kTileRows;
  }
  // The intrinsic names only the first bytes as read; a compiler may leave the others unwritten.
  __asm__ volatile("" : : "r"(&config) : "memory");
  _tile_loadconfig(&config);
}

AMX_TARGET void close_tiles() { _tile_release(); }

// Without AMX: eight rows of a tile in bfloat16 times two tiles of pairs a slice, added to what is there unless `first`.
// Rows lie kBlock apart, slices of them kTileBytes; sums of 32 outputs kPanel apart.
BF16_TARGET inline void eight_rows_bf16(const uint8_t* a, const uint8_t* w, int64_t slices, bool first, float* sums) {
  __m512 sum[8][2];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i)
    for (int t = 0; t < 2; ++t) sum[i][t] = first ? _mm512_setzero_ps() : _mm512_loadu_ps(sums + i * kPanel + 16 * t);
  for (int64_t s = 0; s < slices; ++s, a += kTileBytes, w += 2 * kTileBytes) {
#pragma GCC unroll 16
    for (int r = 0; r < 16; ++r) {
      const __m512bh low = (__m512bh)_mm512_loadu_si512(w + r * kBlock);
      const __m512bh top = (__m512bh)_mm512_loadu_si512(w + kTileBytes + r * kBlock);
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) {
        int32_t two;
        memcpy(&two, a + i * kBlock + 4 * r, 4);
        const __m512bh x = (__m512bh)_mm512_set1_epi32(two);
        sum[i][0] = _mm512_dpbf16_ps(sum[i][0], x, low);
        sum[i][1] = _mm512_dpbf16_ps(sum[i][1], x, top);
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i)
    for (int t = 0; t < 2; ++t) _mm512_storeu_ps(sums + i * kPanel + 16 * t, sum[i][t]);
}

}  // namespace

#endif

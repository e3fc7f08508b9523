// Linears with 4-bit weights and float inputs on x86 with AVX512. Loaded by masq/kernels/cpu.py.
//
// Shapes: M rows, K inputs, N outputs, G groups of inputs, strips of 16 outputs (their number even, rounded up).
//
// Weights [strip][ceil(K / 32) * 4][16] uint32: a word holds eight consecutive inputs of one output, the first lowest.
// Scales and zero points [strip][G][16] float; a group is a multiple of 32 inputs, or all of them.
//
// Few rows, and rows in float32 or float16: float32 throughout, a group's sum scaled once. Many rows in bfloat16 on AMX:
// weights are dequantized in float32 and rounded to bfloat16, products are summed in float32.

#include "common.h"

namespace {

constexpr int64_t kStrip = 16, kSlice = 32, kLines = 4;  // A slice of inputs is four lines of 16 words.
constexpr int64_t kChunkSlices = 16;                     // Slices of two strips that are unpacked at a time: 32 KiB.
constexpr int64_t kFewFloatRows = 4;

struct FloatProduct {
  const void* x;
  int x_dtype;
  const uint32_t* w;
  const float* scale;
  const float* zero;  // or null
  int64_t group, groups;
  const float* bias;
  const int32_t* addend_of;
  const void* addend;
  int addend_dtype;
  void* out;
  int out_dtype;
  int64_t m, n, k;
  int is_signed, isa;

  int64_t slices() const { return (k + kSlice - 1) / kSlice; }
  const uint32_t* strip(int64_t index) const { return w + index * slices() * kLines * kStrip; }
  const float* scales(int64_t index) const { return scale + index * groups * kStrip; }
  const float* zeros(int64_t index) const { return zero ? zero + index * groups * kStrip : nullptr; }
};

AVX512_TARGET inline __m512 code_values(int is_signed) {
  alignas(64) float values[16];
  for (int i = 0; i < 16; ++i) values[i] = (float)(is_signed && i > 7 ? i - 16 : i);
  return _mm512_load_ps(values);
}

// R rows (float32, padded with zeros to whole slices; seen: their sums over each group) times one strip: sums of 16
// outputs, rows kPanel apart.
template <int R>
AVX512_TARGET void strip_float(const FloatProduct& p, int64_t index, const float* x, const float* seen, float* sums) {
  constexpr int kChains = R == 1 ? 4 : 2;  // Enough sums in flight to hide the latency of one.
  const int64_t x_step = p.slices() * kSlice;
  const __m512 values = code_values(p.is_signed);
  const uint32_t* w = p.strip(index);
  const float *scales = p.scales(index), *zeros = p.zeros(index);
  __m512 total[R];
  for (int i = 0; i < R; ++i) total[i] = _mm512_setzero_ps();
  const int64_t last = p.slices() * kSlice;
  for (int64_t g = 0; g < p.groups; ++g) {
    const int64_t begin = g * p.group, end = g + 1 == p.groups ? last : begin + p.group;
    __m512 sum[R][kChains];
    for (int i = 0; i < R; ++i)
      for (int c = 0; c < kChains; ++c) sum[i][c] = _mm512_setzero_ps();
    for (int64_t k = begin; k < end; k += 8) {
      _mm_prefetch((const char*)(w + k / 8 * kStrip) + kAhead, _MM_HINT_T1);
      __m512i words = _mm512_loadu_si512(w + k / 8 * kStrip);
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j) {
        // The low four bits of a lane choose among sixteen values.
        __m512 value = _mm512_permutexvar_ps(_mm512_srli_epi32(words, 4 * j), values);
        for (int i = 0; i < R; ++i)
          sum[i][j % kChains] = _mm512_fmadd_ps(value, _mm512_set1_ps(x[i * x_step + k + j]), sum[i][j % kChains]);
      }
    }
    const __m512 scale = _mm512_loadu_ps(scales + g * kStrip);
    for (int i = 0; i < R; ++i) {
      __m512 whole = sum[i][0];
      for (int c = 1; c < kChains; ++c) whole = _mm512_add_ps(whole, sum[i][c]);
      if (zeros) whole = _mm512_fnmadd_ps(_mm512_loadu_ps(zeros + g * kStrip), _mm512_set1_ps(seen[i * p.groups + g]), whole);
      total[i] = _mm512_fmadd_ps(whole, scale, total[i]);
    }
  }
  for (int i = 0; i < R; ++i) _mm512_storeu_ps(sums + i * kPanel, total[i]);
}

// Weights of 16 outputs and 32 inputs as a tile of bfloat16: line r holds inputs 2r and 2r + 1 of each output.
AMX_TARGET inline void unpack_slice(const uint32_t* words, __m512 values, __m512 scale, __m512 shift, uint8_t* tile) {
  alignas(64) static const uint16_t kInterleave[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                       8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i order = _mm512_load_si512(kInterleave);
  for (int line = 0; line < kLines; ++line) {
    __m512i eight = _mm512_loadu_si512(words + line * kStrip);
#pragma GCC unroll 4
    for (int pair = 0; pair < 4; ++pair) {
      __m512 low = _mm512_permutexvar_ps(_mm512_srli_epi32(eight, 8 * pair), values);
      __m512 top = _mm512_permutexvar_ps(_mm512_srli_epi32(eight, 8 * pair + 4), values);
      low = _mm512_fmadd_ps(low, scale, shift);
      top = _mm512_fmadd_ps(top, scale, shift);
      __m512i both = (__m512i)_mm512_cvtne2ps_pbh(top, low);
      _mm512_store_si512(tile + (line * 4 + pair) * kBlock, _mm512_permutexvar_epi16(order, both));
    }
  }
}

template <int PAIRS>
AMX_TARGET inline void tiles_bf16(const uint8_t* a, int64_t a_step, const uint8_t* w, int64_t slices, bool first, float* sums) {
  constexpr int kStride = kPanel * 4;
  float* below = sums + kTileRows * kPanel;
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
  for (int64_t s = 0; s < slices; ++s) {
    _tile_loadd(4, a + s * kTileBytes, kBlock);
    _tile_loadd(6, w + 2 * s * kTileBytes, kBlock);
    _tile_loadd(7, w + (2 * s + 1) * kTileBytes, kBlock);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if (PAIRS) {
      _tile_loadd(5, a + a_step + s * kTileBytes, kBlock);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, sums, kStride);
  _tile_stored(1, sums + 16, kStride);
  if (PAIRS) {
    _tile_stored(2, below, kStride);
    _tile_stored(3, below + 16, kStride);
  }
}

AMX_TARGET void panel_bf16(const FloatProduct& p, int64_t panel, const uint8_t* a, int64_t rows, float* sums, uint8_t* unpacked) {
  const __m512 values = code_values(p.is_signed);
  const int64_t slices = p.slices(), step = slices * kTileBytes, tiles = (rows + kTileRows - 1) / kTileRows;
  for (int64_t begin = 0; begin < slices; begin += kChunkSlices) {
    int64_t count = slices - begin < kChunkSlices ? slices - begin : kChunkSlices;
    for (int64_t s = 0; s < count; ++s)
      for (int64_t half = 0; half < 2; ++half) {
        int64_t index = 2 * panel + half, g = (begin + s) * kSlice / p.group;
        if (g >= p.groups) g = p.groups - 1;
        const __m512 scale = _mm512_loadu_ps(p.scales(index) + g * kStrip);
        __m512 shift = _mm512_setzero_ps();  // A zero point moves every value of its group alike.
        if (p.zero) shift = _mm512_fnmadd_ps(_mm512_loadu_ps(p.zeros(index) + g * kStrip), scale, shift);
        unpack_slice(p.strip(index) + (begin + s) * kLines * kStrip, values, scale, shift,
                     unpacked + (2 * s + half) * kTileBytes);
      }
    int64_t tile = 0;
    for (; tile + 2 <= tiles; tile += 2)
      tiles_bf16<1>(a + tile * step + begin * kTileBytes, step, unpacked, count, begin == 0, sums + tile * kTileRows * kPanel);
    if (tile < tiles)
      tiles_bf16<0>(a + tile * step + begin * kTileBytes, step, unpacked, count, begin == 0, sums + tile * kTileRows * kPanel);
  }
}

AVX512_TARGET void finish_float(const FloatProduct& p, int64_t column, int64_t first, int64_t rows, const float* sums) {
  for (int64_t j = 0; j < kPanel && column + j < p.n; j += 16) {
    int64_t width = p.n - column - j;
    __mmask16 mask = width >= 16 ? 0xffff : (__mmask16)((1u << width) - 1);
    for (int64_t row = 0; row < rows; ++row) {
      int64_t m = first + row;
      __m512 value = _mm512_loadu_ps(sums + row * kPanel + j);
      if (p.addend_of && p.addend_of[m] >= 0)
        value = _mm512_add_ps(value, load16(p.addend, (int64_t)p.addend_of[m] * p.n + column + j, p.addend_dtype, mask));
      if (p.bias) value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(mask, p.bias + column + j));
      store16(p.out, m * p.n + column + j, p.out_dtype, mask, value);
    }
  }
}

void few_rows(const FloatProduct& p, int threads) {
  const int64_t panels = (p.n + kPanel - 1) / kPanel, padded = p.slices() * kSlice;
  float* x = new float[p.m * padded];
  for (int64_t row = 0; row < p.m; ++row)
    for (int64_t k = 0; k < padded; ++k) x[row * padded + k] = k < p.k ? load(p.x, row * p.k + k, p.x_dtype) : 0;
  float* seen = new float[p.m * p.groups]();
  for (int64_t row = 0; row < p.m; ++row)
    for (int64_t k = 0; k < p.k; ++k) seen[row * p.groups + k / p.group] += x[row * padded + k];
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t panel = 0; panel < panels; ++panel)
    for (int64_t first = 0; first < p.m; first += kFewFloatRows) {
      alignas(64) float sums[kFewFloatRows * kPanel];
      int64_t rows = p.m - first < kFewFloatRows ? p.m - first : kFewFloatRows;
      for (int64_t half = 0; half < 2; ++half) {
        const float *from = x + first * padded, *own = seen + first * p.groups;
        float* to = sums + half * kStrip;
        switch (rows) {
          case 4: strip_float<4>(p, 2 * panel + half, from, own, to); break;
          case 3: strip_float<3>(p, 2 * panel + half, from, own, to); break;
          case 2: strip_float<2>(p, 2 * panel + half, from, own, to); break;
          default: strip_float<1>(p, 2 * panel + half, from, own, to); break;
        }
      }
      finish_float(p, panel * kPanel, first, rows, sums);
    }
  delete[] x;
  delete[] seen;
}

void many_rows(const FloatProduct& p, int threads) {
  const int64_t panels = (p.n + kPanel - 1) / kPanel, slices = p.slices(), tiles = (p.m + kTileRows - 1) / kTileRows;
  uint8_t* a = (uint8_t*)__builtin_malloc((size_t)(tiles * slices * kTileBytes));
  if (!a) __builtin_trap();
  int64_t together = kRowBytes / (slices * kBlock) / 32 * 32;
  together = together < 64 ? 64 : (together > kMaxRows ? kMaxRows : together);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for schedule(static)
    for (int64_t row = 0; row < tiles * kTileRows; ++row)
      for (int64_t s = 0; s < slices; ++s) {
        uint8_t* to = a + ((row / kTileRows) * slices + s) * kTileBytes + (row % kTileRows) * kBlock;
        int64_t width = row < p.m ? (p.k - s * kSlice < kSlice ? p.k - s * kSlice : kSlice) : 0;
        if (width) memcpy(to, (const uint16_t*)p.x + row * p.k + s * kSlice, width * 2);
        if (width < kSlice) memset(to + width * 2, 0, (kSlice - width) * 2);
      }
    alignas(64) uint8_t unpacked[kChunkSlices * 2 * kTileBytes];
    alignas(64) float sums[kMaxRows * kPanel];
    open_tiles();
    for (int64_t first = 0; first < p.m; first += together) {
      int64_t rows = p.m - first < together ? p.m - first : together;
#pragma omp for schedule(static) nowait
      for (int64_t panel = 0; panel < panels; ++panel) {
        panel_bf16(p, panel, a + first / kTileRows * slices * kTileBytes, rows, sums, unpacked);
        finish_float(p, panel * kPanel, first, rows, sums);
      }
    }
    close_tiles();
  }
  __builtin_free(a);
}

}  // namespace

extern "C" void masq_gemm_w4a16(const void* x, int x_dtype, const uint32_t* w, const float* scale, const float* zero,
                                int64_t group, int64_t groups, const float* bias, const int32_t* addend_of,
                                const void* addend, int addend_dtype, void* out, int out_dtype, int64_t m, int64_t n,
                                int64_t k, int is_signed, int isa, int threads) {
  FloatProduct p{x,   x_dtype,   w, scale, zero, group, groups,    bias, addend_of, addend, addend_dtype,
                 out, out_dtype, m, n,     k,    is_signed, isa};
  if (p.isa == kAmx && p.x_dtype == kBfloat && p.m > kFewFloatRows) many_rows(p, threads);
  else if (p.m) few_rows(p, threads);
}

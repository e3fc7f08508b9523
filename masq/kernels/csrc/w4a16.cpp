// Linears with 4-bit weights and float inputs on x86 with AVX512. Loaded by masq/kernels/cpu.py.
//
// Shapes: M rows, K inputs, N outputs, G groups of inputs, strips of 16 outputs (their number even, rounded up).
//
// Weights [strip][ceil(K / 32) * 4][16] uint32: a word holds eight consecutive inputs of one output, the first lowest.
// Scales [strip][G][16] float, zero points [strip][G][16] uint8; a group is a multiple of 32 inputs, or all of them.
//
// Few rows, and rows in float32 or float16: float32 throughout, a group's sum scaled once. More rows in bfloat16 on AMX or
// AVX512-BF16: the same from codes in bfloat16, which are exact; but many rows and several groups (see exact()): weights are dequantized in
// float32 and rounded to bfloat16, products are summed in float32.

#include "common.h"

namespace {

constexpr int64_t kStrip = 16, kSlice = 32, kLines = 4;  // A slice of inputs is four lines of 16 words.
constexpr int64_t kChunkSlices = 8;                      // Slices of two strips that are unpacked at a time: 16 KiB.
constexpr int64_t kRowsTogether = 512, kPanelsTogether = 8;  // Their sums and a chunk of the rows lie in the second cache.
constexpr int64_t kFewFloatRows = 4;   // Rows that are multiplied while a weight is read once.
constexpr int64_t kFewBfloatRows = 2;  // Up to here tiles are slower, and without AMX up to the next.
constexpr int64_t kFewPairedRows = 8;

struct FloatProduct {
  const void* x;
  int x_dtype;
  const uint32_t* w;
  const float* scale;
  const uint8_t* zero;  // or null
  int64_t group, groups;
  Bias bias;
  Addend addend;
  void* out;
  int out_dtype;
  int64_t m, n, k;
  int is_signed, isa;

  int64_t slices() const { return (k + kSlice - 1) / kSlice; }
  const uint32_t* strip(int64_t index) const { return w + index * slices() * kLines * kStrip; }
  const float* scales(int64_t index) const { return scale + index * groups * kStrip; }
  const uint8_t* zeros(int64_t index) const { return zero ? zero + index * groups * kStrip : nullptr; }
  int64_t begin(int64_t g) const { return g < groups ? g * group / kSlice : slices(); }  // First slice of a group.
  // Whether codes are multiplied as they are. Each group is then summed and scaled by itself, which of half as many rows as
  // a group has inputs costs less than to dequantize the weights.
  bool exact() const { return groups == 1 || 2 * m <= group; }
};

// Memory that is given back when it goes out of scope.
template <typename T>
struct Buffer {
  T* data;
  explicit Buffer(int64_t size) : data((T*)_mm_malloc((size_t)size * sizeof(T) + 64, 64)) {
    if (!data) __builtin_trap();
  }
  ~Buffer() { _mm_free(data); }
  Buffer(const Buffer&) = delete;
};

AVX512_TARGET inline __m512 code_values(int is_signed) {
  alignas(64) float values[16];
  for (int i = 0; i < 16; ++i) values[i] = (float)(is_signed && i > 7 ? i - 16 : i);
  return _mm512_load_ps(values);
}

AVX512_TARGET inline __m512 bytes16(const uint8_t* from) {
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)from)));
}

// R rows (float32, padded with zeros to whole slices; seen: their sums over each group) times one strip: sums of 16
// outputs, rows kPanel apart.
template <int R>
AVX512_TARGET void strip_float(const FloatProduct& p, int64_t index, const float* x, const float* seen, float* sums) {
  constexpr int kChains = R == 1 ? 4 : 2;  // Enough sums in flight to hide the latency of one.
  const int64_t x_step = p.slices() * kSlice;
  const __m512 values = code_values(p.is_signed);
  const uint32_t* w = p.strip(index);
  const float* scales = p.scales(index);
  const uint8_t* zeros = p.zeros(index);
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
      if (zeros) whole = _mm512_fnmadd_ps(bytes16(zeros + g * kStrip), _mm512_set1_ps(seen[i * p.groups + g]), whole);
      total[i] = _mm512_fmadd_ps(whole, scale, total[i]);
    }
  }
  for (int i = 0; i < R; ++i) _mm512_storeu_ps(sums + i * kPanel, total[i]);
}

AVX512_TARGET void finish_float(const FloatProduct& p, int64_t column, int64_t first, int64_t rows, const float* sums) {
  for (int64_t j = 0; j < kPanel && column + j < p.n; j += 16) {
    int64_t width = p.n - column - j;
    __mmask16 mask = width >= 16 ? 0xffff : (__mmask16)((1u << width) - 1);
    for (int64_t row = 0; row < rows; ++row) {
      int64_t m = first + row;
      const float* bias = p.bias.of(m, p.n);
      __m512 value = _mm512_loadu_ps(sums + row * kPanel + j);
      if (p.addend.places && p.addend.places[m] >= 0)
        value = _mm512_add_ps(value, added16(p.addend, p.addend.places[m], column + j, mask));
      if (bias) value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(mask, bias + column + j));
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

// ---- many rows in bfloat16, on AMX or AVX512-BF16 ----

// One row in the order in which 16-bit halves of a word give its codes, inputs 0 4 1 5 2 6 3 7 of each eight, a slice every
// kTileBytes; and the sum of each group.
BF16_TARGET void order_row(const FloatProduct& p, int64_t row, uint8_t* to, float* seen) {
  alignas(64) uint16_t order[32], ones[32];
  for (int i = 0; i < 32; ++i) {
    order[i] = (uint16_t)(i / 8 * 8 + i % 8 / 2 + i % 2 * 4);
    ones[i] = 0x3f80;
  }
  const __m512i places = _mm512_load_si512(order);
  const __m512bh one = (__m512bh)_mm512_load_si512(ones);
  for (int64_t g = 0; g < p.groups; ++g) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t s = p.begin(g); s < p.begin(g + 1); ++s) {
      const int64_t width = p.k - s * kSlice;
      const __mmask32 mask = width >= kSlice ? 0xffffffffu : (1u << width) - 1;
      const __m512i values = _mm512_maskz_loadu_epi16(mask, (const uint16_t*)p.x + row * p.k + s * kSlice);
      _mm512_storeu_si512(to + s * kTileBytes, _mm512_permutexvar_epi16(places, values));
      sum = _mm512_dpbf16_ps(sum, (__m512bh)values, one);
    }
    seen[g] = _mm512_reduce_add_ps(sum);
  }
}

// A slice of a strip as a tile of codes, which bfloat16 holds exactly: line r holds a pair of inputs of each output.
BF16_TARGET inline void unpack_codes(const uint32_t* words, __m512i codes, uint8_t* tile) {
  for (int line = 0; line < kLines; ++line) {
    const __m512i eight = _mm512_loadu_si512(words + line * kStrip);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j)
      _mm512_store_si512(tile + (line * 4 + j) * kBlock, _mm512_permutexvar_epi16(_mm512_srli_epi16(eight, 4 * j), codes));
  }
}

// The same of weights, rounded to bfloat16.
BF16_TARGET inline void unpack_weights(const uint32_t* words, __m512 values, __m512 scale, __m512 zero, uint8_t* tile) {
  alignas(64) static const uint16_t kInterleave[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                       8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i order = _mm512_load_si512(kInterleave);
  for (int line = 0; line < kLines; ++line) {
    const __m512i eight = _mm512_loadu_si512(words + line * kStrip);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      __m512 low = _mm512_permutexvar_ps(_mm512_srli_epi32(eight, 4 * j), values);
      __m512 top = _mm512_permutexvar_ps(_mm512_srli_epi32(eight, 4 * j + 16), values);
      low = _mm512_mul_ps(_mm512_sub_ps(low, zero), scale);
      top = _mm512_mul_ps(_mm512_sub_ps(top, zero), scale);
      const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(top, low);
      _mm512_store_si512(tile + (line * 4 + j) * kBlock, _mm512_permutexvar_epi16(order, both));
    }
  }
}

// Some slices of a panel as pairs of tiles, of codes or of weights.
BF16_TARGET void unpack_panel(const FloatProduct& p, int64_t panel, int64_t begin, int64_t end, uint8_t* tiles) {
  alignas(64) uint16_t table[32];
  // Twice, so that the fifth bit of an index means nothing.
  for (int i = 0; i < 32; ++i) table[i] = to_bfloat((float)(p.is_signed && i % 16 > 7 ? i % 16 - 16 : i % 16));
  const __m512i codes = _mm512_load_si512(table);
  const __m512 values = code_values(p.is_signed);
  for (int64_t s = begin; s < end; ++s)
    for (int64_t strip = 2 * panel; strip < 2 * panel + 2; ++strip, tiles += kTileBytes) {
      const uint32_t* words = p.strip(strip) + s * kLines * kStrip;
      if (p.exact()) {
        unpack_codes(words, codes, tiles);
        continue;
      }
      const int64_t at = s * kSlice / p.group * kStrip;
      const __m512 zero = p.zero ? bytes16(p.zeros(strip) + at) : _mm512_setzero_ps();
      unpack_weights(words, values, _mm512_loadu_ps(p.scales(strip) + at), zero, tiles);
    }
}

// Sums of 16 rows (or 32, in PAIRS) over some slices, added to what is there unless these are the first.
template <int PAIRS>
AMX_TARGET void tiles_bf16(const uint8_t* a, int64_t a_step, const uint8_t* w, int64_t slices, bool first, float* sums) {
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

// Sums of codes over one group, scaled and added to the totals of a panel.
AVX512_TARGET void fold(const FloatProduct& p, int64_t panel, int64_t g, int64_t rows, const float* seen, const float* sums,
                        float* totals) {
  for (int64_t h = 0; h < 2; ++h) {
    const __m512 scale = _mm512_loadu_ps(p.scales(2 * panel + h) + g * kStrip);
    const __m512 zero = p.zero ? bytes16(p.zeros(2 * panel + h) + g * kStrip) : _mm512_setzero_ps();
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t at = row * kPanel + h * kStrip;
      __m512 sum = _mm512_fnmadd_ps(zero, _mm512_set1_ps(seen[row * p.groups + g]), _mm512_loadu_ps(sums + at));
      sum = _mm512_mul_ps(sum, scale);
      if (g) sum = _mm512_add_ps(sum, _mm512_loadu_ps(totals + at));
      _mm512_storeu_ps(totals + at, sum);
    }
  }
}

// Rows in tiles, and the memory of one thread.
struct Many {
  const uint8_t* a;
  const float* seen;
  uint8_t* unpacked;
  float *sums, *totals;
};

// Panels from `panel` to `last` of rows from `first` on. Inputs are cut into chunks outside, so that their part of the rows
// stays in the second cache for every panel, and a chunk of a panel in the first one for every row.
BF16_TARGET void span_rows(const FloatProduct& p, const Many& many, int64_t panel, int64_t last, int64_t first, int64_t rows) {
  const int64_t slices = p.slices(), step = slices * kTileBytes, tiles = (rows + kTileRows - 1) / kTileRows;
  const int64_t apart = tiles * kTileRows * kPanel;
  int64_t end;
  for (int64_t begin = 0; begin < slices; begin = end) {
    end = begin + kChunkSlices < slices ? begin + kChunkSlices : slices;
    const int64_t g = begin * kSlice / p.group;  // Of a chunk of codes; it ends with its group at the latest.
    if (p.exact() && end > p.begin(g + 1)) end = p.begin(g + 1);
    const bool starts = begin == (p.exact() ? p.begin(g) : 0);
    for (int64_t i = 0; panel + i < last; ++i) {
      unpack_panel(p, panel + i, begin, end, many.unpacked);
      const uint8_t* from = many.a + first / kTileRows * step + begin * kTileBytes;
      float* sums = many.sums + i * apart;
      int64_t tile = 0;
      for (int64_t half = 0; p.isa != kAmx && half * 8 < rows; ++half)
        eight_rows_bf16(from + half / 2 * step + half % 2 * 8 * kBlock, many.unpacked, end - begin, starts, sums + half * 8 * kPanel);
      if (p.isa != kAmx) tile = tiles;
      for (; tile + 2 <= tiles; tile += 2)
        tiles_bf16<1>(from + tile * step, step, many.unpacked, end - begin, starts, sums + tile * kTileRows * kPanel);
      if (tile < tiles)
        tiles_bf16<0>(from + tile * step, step, many.unpacked, end - begin, starts, sums + tile * kTileRows * kPanel);
      if (p.exact() && end == p.begin(g + 1))
        fold(p, panel + i, g, rows, many.seen + first * p.groups, sums, many.totals + i * apart);
    }
  }
  for (int64_t i = 0; panel + i < last; ++i)
    finish_float(p, (panel + i) * kPanel, first, rows, (p.exact() ? many.totals : many.sums) + i * apart);
}

void many_rows(const FloatProduct& p, int threads) {
  const int64_t slices = p.slices(), tiles = (p.m + kTileRows - 1) / kTileRows, panels = (p.n + kPanel - 1) / kPanel;
  // Spans of panels, as many for each thread, and as equal as can be.
  const int64_t spans = (panels + kPanelsTogether * threads - 1) / (kPanelsTogether * threads) * threads;
  const int64_t together = p.m < kRowsTogether ? tiles * kTileRows : kRowsTogether;
  Buffer<uint8_t> a(tiles * slices * kTileBytes);
  Buffer<float> seen(p.m * p.groups);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for schedule(static)
    for (int64_t row = 0; row < tiles * kTileRows; ++row) {
      uint8_t* to = a.data + row / kTileRows * slices * kTileBytes + row % kTileRows * kBlock;
      if (row < p.m) order_row(p, row, to, seen.data + row * p.groups);
      else for (int64_t s = 0; s < slices; ++s) memset(to + s * kTileBytes, 0, kBlock);
    }
    Buffer<uint8_t> unpacked(kChunkSlices * 2 * kTileBytes);
    Buffer<float> sums(kPanelsTogether * together * kPanel), totals(kPanelsTogether * together * kPanel);
    const Many many{a.data, seen.data, unpacked.data, sums.data, totals.data};
    if (p.isa == kAmx) open_tiles();
    for (int64_t first = 0; first < p.m; first += kRowsTogether) {
      const int64_t rows = p.m - first < kRowsTogether ? p.m - first : kRowsTogether;
#pragma omp for schedule(static) nowait
      for (int64_t span = 0; span < spans; ++span)
        span_rows(p, many, panels * span / spans, panels * (span + 1) / spans, first, rows);
    }
    if (p.isa == kAmx) close_tiles();
  }
}

}  // namespace

extern "C" void masq_gemm_w4a16(const void* x, int x_dtype, const uint32_t* w, const float* scale, const uint8_t* zero,
                                int64_t group, int64_t groups, const float* bias, const int64_t* which_bias,
                                const int32_t* places, const void* const* addends, const int64_t* starts, int parts,
                                int addend_dtype, void* out, int out_dtype, int64_t m, int64_t n, int64_t k, int is_signed, int isa,
                                int threads) {
  Addend addend{places, addends, starts, parts, addend_dtype};
  const Bias biases{bias, which_bias};
  FloatProduct p{x, x_dtype, w, scale, zero, group, groups, biases, addend, out, out_dtype, m, n, k, is_signed, isa};
  const int64_t few = p.isa == kAmx ? kFewBfloatRows : kFewPairedRows;
  if (p.isa >= kBf16 && p.x_dtype == kBfloat && p.m > few) many_rows(p, threads);
  else if (p.m) few_rows(p, threads);
}

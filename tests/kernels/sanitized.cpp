// All kernels on awkward shapes, in buffers of exactly their size: for the sanitizers, which see every access outside.
// Every instruction set must also give the results of the plain one.

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <vector>

extern "C" {
int masq_best_isa();
int64_t masq_code_bytes(int64_t, int64_t);
void masq_quantize(const void*, int, const float*, const int64_t*, const uint16_t*, const int64_t*, int64_t, int64_t, int,
                   float, int8_t*, float*, const int32_t*, void*, int, int);
void masq_quantize_norm(const void*, int, const void*, int, float, const float*, const int64_t*, const uint16_t*,
                        const int64_t*, int64_t, int64_t, int, float, int8_t*, float*, const int32_t*, void*, int, int);
void masq_quantize_gate(const void*, const void*, int, int64_t, int64_t, const float*, const int64_t*, const uint16_t*,
                        const int64_t*, int64_t, int64_t, int, float, int8_t*, float*, const int32_t*, void*, int, int);
void masq_smooth(const void*, int, const float*, const int64_t*, const uint16_t*, const int64_t*, int64_t, int64_t, void*,
                 int);
void masq_gemm(const int8_t*, const float*, const uint8_t*, const float*, const int32_t*, const float*, const int64_t*,
               const int32_t*, const void* const*, const int64_t*, int, int, void*, int, int64_t, int64_t, int64_t, int, int, int,
               const void*, int);
void masq_gemm_w4a16(const void*, int, const uint32_t*, const float*, const uint8_t*, int64_t, int64_t, const float*,
                     const int64_t*, const int32_t*, const void* const*, const int64_t*, int, int, void*, int, int64_t,
                     int64_t, int64_t, int, int, int);
}

static uint32_t state = 1;
static uint32_t next() { return state = state * 1664525u + 1013904223u; }
static float real() { return (float)(int32_t)next() / 2147483648.0f; }

template <class T>
static T* exactly(int64_t count) {  // its own heap block: a byte beyond it is an error
  return (T*)malloc(count > 0 ? count * sizeof(T) : 1);
}

struct LowRank {
  const uint16_t* u;
  const int64_t* rows;
  int64_t count, width;
  const uint16_t* tiles;
  const int64_t* starts;
  const int32_t *part_of, *columns, *firsts;
  int64_t parts;
};

// Every other row corrected, with a rank that fills no slice.
static void corrected(const int8_t* codes, const float* scale, const uint8_t* w, const float* w_scale, const int32_t* offset,
                      int64_t m, int64_t n, int64_t k, int four, int threads) {
  const int64_t rank = 35, slices = 2, panels = (n + 31) / 32, count = (m + 1) / 2;
  uint16_t *u = exactly<uint16_t>(count * rank), *tiles = exactly<uint16_t>(panels * slices * 1024);
  int64_t *rows = exactly<int64_t>(count), *starts = exactly<int64_t>(panels);
  int32_t* part_of = exactly<int32_t>(panels);
  for (int64_t i = 0; i < count * rank; ++i) u[i] = (uint16_t)(0x3f00 + (next() >> 25));
  for (int64_t i = 0; i < panels * slices * 1024; ++i) tiles[i] = (uint16_t)(0x3f00 + (next() >> 25));
  for (int64_t i = 0; i < count; ++i) rows[i] = 2 * i;
  for (int64_t i = 0; i < panels; ++i) starts[i] = i * slices, part_of[i] = 0;
  const int32_t columns[2] = {0, (int32_t)rank}, firsts[2] = {0, (int32_t)slices};
  LowRank low{u, rows, count, rank, tiles, starts, part_of, columns, firsts, 1};
  float* y = exactly<float>(m * n);
  masq_gemm(codes, scale, w, w_scale, offset, nullptr, nullptr, nullptr, nullptr, nullptr, 0, 0, y, 0, m, n, k, four, 3, threads,
            &low, 1);
  free(u), free(tiles), free(rows), free(starts), free(part_of), free(y);
}

// Rows as they are, out of a norm, and out of a gate that stands beside its factor in one matrix; every third one taken,
// the last first. Returns whether another than the plain instruction set takes other numbers of rows as they are.
static int made(const void* x, int dtype, const float* inverse, const int64_t* which, const uint16_t* centre, int64_t m,
                int64_t k, int8_t* codes, float* scale, int isa, int threads) {
  const int64_t size = dtype == 0 ? 4 : 2, half = k / 2, count = (m + 2) / 3;
  int32_t* places = exactly<int32_t>(m);
  char *taken = exactly<char>(count * k * size), *wanted = exactly<char>(count * k * size), *gamma = exactly<char>(k * size);
  for (int64_t i = 0; i < m; ++i) places[i] = i % 3 ? -1 : (int32_t)(count - 1 - i / 3);
  memcpy(gamma, x, m ? k * size : 0);
  masq_quantize(x, dtype, inverse, which, centre, which, m, k, 127, 127.0f, codes, scale, places, wanted, 0, 1);
  masq_quantize(x, dtype, inverse, which, centre, which, m, k, 127, 127.0f, codes, scale, places, taken, isa, threads);
  const int bad = memcmp(wanted, taken, count * k * size) != 0;
  masq_quantize_norm(x, dtype, gamma, dtype, 1e-6f, inverse, which, centre, which, m, k, 127, 127.0f, codes, scale, places,
                     taken, isa, threads);
  masq_quantize_norm(x, dtype, gamma, dtype, 1e-6f, nullptr, nullptr, nullptr, nullptr, m, k, 127, 127.0f, codes, scale,
                     nullptr, nullptr, isa, threads);
  if (half)
    masq_quantize_gate(x, (const char*)x + half * size, dtype, k, k, nullptr, nullptr, nullptr, nullptr, m, half, 127, 127.0f,
                       codes, scale, places, taken, isa, threads);
  free(places), free(taken), free(wanted), free(gamma);
  return bad;
}

static int integers(int64_t m, int64_t n, int64_t k, int four, int dtype) {
  int64_t blocks = (k + 63) / 64, panels = (n + 31) / 32, bytes = panels * blocks * 1024 * (four ? 1 : 2);
  uint8_t* w = exactly<uint8_t>(bytes);
  for (int64_t i = 0; i < bytes; ++i) w[i] = (uint8_t)(next() >> 24);
  float *w_scale = exactly<float>(n), *bias = exactly<float>(2 * n), *inverse = exactly<float>(2 * k);
  uint16_t* centre = exactly<uint16_t>(2 * k);
  int32_t* offset = exactly<int32_t>(panels * 32);
  int64_t* which = exactly<int64_t>(m);
  int32_t* places = exactly<int32_t>(m);
  const int64_t first = n / 3, starts[3] = {0, first, n};
  uint16_t *left = exactly<uint16_t>(m * first), *right = exactly<uint16_t>(m * (n - first));
  const void* parts[2] = {left, right};
  for (int64_t i = 0; i < n; ++i) w_scale[i] = real();
  for (int64_t i = 0; i < 2 * n; ++i) bias[i] = real();
  for (int64_t i = 0; i < 2 * k; ++i) inverse[i] = real() + 1.5f, centre[i] = (uint16_t)(0x3f00 + (next() >> 25));
  for (int64_t i = 0; i < m; ++i) which[i] = i % 2, places[i] = i % 3 ? (int32_t)i : -1;
  for (int64_t i = 0; i < m * first; ++i) left[i] = (uint16_t)(0x3f00 + (next() >> 25));
  for (int64_t i = 0; i < m * (n - first); ++i) right[i] = (uint16_t)(0x3f00 + (next() >> 25));
  for (int64_t p = 0; p < panels; ++p)
    for (int64_t j = 0; j < 32; ++j) {
      uint32_t sum = 0;
      for (int64_t b = 0; b < blocks; ++b)
        for (int64_t i = 0; i < 64; ++i) {
          int64_t at = i / 4 * 64 + j % 16 * 4 + i % 4;
          uint8_t byte = four ? w[(p * blocks + b) * 1024 + at] : w[((p * blocks + b) * 2 + j / 16) * 1024 + at];
          int8_t value = four ? (int8_t)(j < 16 ? byte << 4 : byte & 0xf0) : (int8_t)byte;
          sum += 128u * (uint32_t)(int32_t)value;
        }
      memcpy(offset + p * 32 + j, &sum, 4);
    }
  void* x = dtype == 0 ? (void*)exactly<float>(m * k) : (void*)exactly<uint16_t>(m * k);
  for (int64_t i = 0; i < m * k; ++i) {
    if (dtype == 0) ((float*)x)[i] = real() * 9;
    else ((uint16_t*)x)[i] = (uint16_t)(0x3000 + (next() >> 20) % 0x800);
  }
  int bad = 0;
  float* wanted = nullptr;
  for (int isa = 0; isa <= masq_best_isa(); ++isa)
    for (int threads = 1; threads <= 2; ++threads) {
      int8_t* codes = exactly<int8_t>(masq_code_bytes(m, k));
      float *scale = exactly<float>(m), *y = exactly<float>(m * n);
      uint16_t* half = exactly<uint16_t>(m * n);
      masq_quantize(x, dtype, inverse, which, centre, which, m, k, 7, m % 2 ? 8.0f : 7.0f, codes, scale, nullptr, nullptr, isa,
                    threads);
      masq_gemm(codes, scale, w, w_scale, offset, bias, which, places, parts, starts, 2, 1, y, 0, m, n, k, four, isa, threads,
                nullptr, 0);
      masq_gemm(codes, scale, w, w_scale, offset, nullptr, nullptr, nullptr, nullptr, nullptr, 0, 0, half, 2, m, n, k, four, isa,
                threads, nullptr, 0);
      bad |= made(x, dtype, inverse, which, centre, m, k, codes, scale, isa, threads);
      if (isa >= 3) corrected(codes, scale, w, w_scale, offset, m, n, k, four, threads);
      if (wanted && memcmp(wanted, y, m * n * sizeof(float))) bad = 1;
      if (!wanted) wanted = y;
      else free(y);
      free(codes), free(scale), free(half);
    }
  free(wanted), free(x), free(w), free(w_scale), free(bias), free(inverse), free(centre), free(offset), free(which), free(places), free(left), free(right);
  if (bad) printf("integers differ at %ld x %ld x %ld, %d\n", (long)m, (long)n, (long)k, four);
  return bad;
}

static int floats(int64_t m, int64_t n, int64_t k, int64_t group, int dtype) {
  int64_t slices = (k + 31) / 32, strips = (n + 31) / 32 * 2, groups = group ? k / group : 1, count = strips * slices * 64;
  uint32_t* w = exactly<uint32_t>(count);
  for (int64_t i = 0; i < count; ++i) w[i] = next();
  float* scale = exactly<float>(strips * groups * 16);
  uint8_t* zero = exactly<uint8_t>(strips * groups * 16);
  for (int64_t i = 0; i < strips * groups * 16; ++i) scale[i] = real(), zero[i] = (uint8_t)(next() >> 28);
  uint16_t *x = exactly<uint16_t>(m * k), *smoothed = exactly<uint16_t>(m * k);
  float* inverse = exactly<float>(k);
  uint16_t* centre = exactly<uint16_t>(k);
  for (int64_t i = 0; i < k; ++i) inverse[i] = 0.5f, centre[i] = 0x3c00;
  for (int64_t i = 0; i < m * k; ++i) x[i] = (uint16_t)(0x3c00 + (next() >> 24));
  float* y = exactly<float>(m * n);
  int bad = 0;
  for (int isa = 2; isa <= masq_best_isa(); ++isa)
    for (int threads = 1; threads <= 2; ++threads) {
      masq_smooth(x, dtype, inverse, nullptr, nullptr, nullptr, m, k, smoothed, threads);
      masq_smooth(x, dtype, inverse, nullptr, centre, nullptr, m, k, smoothed, threads);
      masq_gemm_w4a16(smoothed, dtype, w, scale, zero, group ? group : slices * 32, groups, nullptr, nullptr, nullptr, nullptr,
                      nullptr, 0, 0, y, 0, m, n, k, 0, isa, threads);
      for (int64_t i = 0; i < m * n; ++i) bad |= !isfinite(y[i]);
    }
  free(w), free(scale), free(zero), free(x), free(smoothed), free(inverse), free(centre), free(y);
  return bad;
}

int main() {
  const int64_t shapes[][3] = {{1, 1, 1},    {1, 33, 65},  {3, 31, 63},   {4, 32, 64},   {5, 17, 130},
                               {16, 15, 64}, {17, 47, 65}, {33, 70, 200}, {129, 33, 96}, {260, 40, 1100}};
  int bad = 0;
  for (const auto& s : shapes) {
    for (int four = 0; four < 2; ++four)
      for (int dtype = 0; dtype < 3; ++dtype) bad |= integers(s[0], s[1], s[2], four, dtype);
    for (int dtype = 1; dtype < 3; ++dtype) {
      bad |= floats(s[0], s[1], s[2], 0, dtype);
      bad |= floats(s[0], s[1], (s[2] + 63) / 64 * 64, 32, dtype);
    }
  }
  bad |= integers(65, 31, 24200, 1, 1);  // More codes than are kept at a time.
  printf(bad ? "bad\n" : "fine\n");
  return bad;
}

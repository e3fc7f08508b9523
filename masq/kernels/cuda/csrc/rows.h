// Centre, smooth and quantize: one program takes a row, twice, the second time from a cache. Eight codes make a word.

#ifndef MASQ_CUDA_ROWS_H
#define MASQ_CUDA_ROWS_H

#include "layout.h"
#include "numbers.h"

constexpr int kRowThreads = 256, kRowShared = (kRowThreads / kWarp + 1) * 4;
constexpr float kSmallestScale = 1.1754943508222875e-38f;  // 2^-126, see masq.numerics.affine
constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: added to a small number it leaves the nearest integer in the last bits

// The line of a table that a row has.
MASQ_DEVICE int64_t line_of(const int64_t* lines, int64_t row) { return lines == nullptr ? 0 : lines[row]; }

// Eight smoothed numbers from an input on; zeros behind the end of the row.
MASQ_DEVICE void load_eight(float (&values)[8], const Rows& given, int64_t row, int64_t first) {
  int64_t at = row * given.inputs + first;
  // Rows of a multiple of eight inputs start at a multiple of 16 bytes, as entry.h has checked.
  bool whole = given.inputs % 8 == 0 && first < given.inputs;
  if (whole && given.type == kFloat32) {
    Four low = ((const Four*)((const float*)given.x + at))[0], high = ((const Four*)((const float*)given.x + at))[1];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      values[i] = bits_to_number(low.words[i]);
      values[i + 4] = bits_to_number(high.words[i]);
    }
  } else if (whole) {
    Four words = *(const Four*)((const uint16_t*)given.x + at);
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] = from_bits16((uint16_t)(words.words[i / 2] >> (i % 2 * 16)), given.type);
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] = first + i < given.inputs ? load_number(given.x, at + i, given.type) : 0.0f;
  }
  if (given.centre != nullptr) {
    const uint16_t* centre = given.centre + line_of(given.centres, row) * given.inputs + first;
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (first + i < given.inputs) values[i] -= from_bits16(centre[i], kBfloat16);
  }
  if (given.inverse != nullptr) {
    const float* inverse = given.inverse + line_of(given.vectors, row) * given.inputs + first;
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (first + i < given.inputs) values[i] *= inverse[i];
  }
}

// The largest number of all threads. As integers the bits of magnitudes are in their order, and NaN is above all.
MASQ_DEVICE uint32_t max_of_program(uint32_t value) {
  uint32_t* shared = (uint32_t*)shared_memory();
  int warps = num_threads() / kWarp, thread = thread_index();
  value = max_of_warp(value);
  if (thread % kWarp == 0) shared[thread / kWarp] = value;
  sync_threads();
  for (int warp = 0; warp < warps; ++warp) value = shared[warp] > value ? shared[warp] : value;
  return value;
}

MASQ_KERNEL(kRowThreads, 1) quantize_row(const Rows given) {
  int64_t row = program_index(), words = given.line / 4;
  int64_t place = given.places == nullptr ? -1 : given.places[row];
  float values[8];
  uint32_t highest = 0;
  for (int64_t word = thread_index(); word < words; word += num_threads()) {
    load_eight(values, given, row, word * 8);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      uint32_t magnitude = number_to_bits(values[i]) & 0x7fffffffu;
      highest = magnitude > highest ? magnitude : highest;
    }
  }
  float scale = bits_to_number(max_of_program(highest)) / given.divisor;
  if (scale < kSmallestScale) scale = 1.0f;
  if (thread_index() == 0) given.scales[row] = scale;
  for (int64_t word = thread_index(); word < words; word += num_threads()) {
    load_eight(values, given, row, word * 8);
    if (place >= 0) {
#pragma unroll
      for (int i = 0; i < 8; i += 2)
        if (word * 8 + i < given.inputs)
          store_two(given.taken, place, word * 8 + i, given.inputs, given.type, {values[i], values[i + 1]});
    }
    uint32_t codes = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float code = values[i] / scale;
      code = code > given.qmax ? given.qmax : code < -given.qmax ? -given.qmax : code;
      codes |= (number_to_bits(code + kMagic) & 15u) << (4 * i);
    }
    ((uint32_t*)(given.codes + row * given.line))[word] = codes;
  }
}

#endif

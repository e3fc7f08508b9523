// Numbers of 16 and 32 bits in memory, by the type that is known when a kernel runs.

#ifndef MASQ_CUDA_NUMBERS_H
#define MASQ_CUDA_NUMBERS_H

#include "arguments.h"

struct alignas(16) Four {
  uint32_t words[4];
};

struct alignas(8) Two {
  uint32_t words[2];
};

MASQ_DEVICE float from_bits16(uint16_t bits, int type) {
  return type == kBfloat16 ? bits_to_number((uint32_t)bits << 16) : float16_to_number(bits);
}

MASQ_DEVICE uint16_t to_bits16(float value, int type) {
  return type == kBfloat16 ? number_to_bfloat16(value) : number_to_float16(value);
}

MASQ_DEVICE float load_number(const void* from, int64_t index, int type) {
  return type == kFloat32 ? ((const float*)from)[index] : from_bits16(((const uint16_t*)from)[index], type);
}

// Two neighbours of a row of so many: at once where both are there and every pair is aligned.
MASQ_DEVICE void store_two(void* to, int64_t row, int64_t column, int64_t columns, int type, const float (&values)[2]) {
  int64_t at = row * columns + column;
  bool both = column + 1 < columns, aligned = both && columns % 2 == 0;
  if (type == kFloat32) {
    if (aligned) {
      *(Two*)((float*)to + at) = {{number_to_bits(values[0]), number_to_bits(values[1])}};
    } else {
      ((float*)to)[at] = values[0];
      if (both) ((float*)to)[at + 1] = values[1];
    }
    return;
  }
  uint16_t first = to_bits16(values[0], type), second = to_bits16(values[1], type);
  if (aligned) {
    *(uint32_t*)((uint16_t*)to + at) = (uint32_t)second << 16 | first;
  } else {
    ((uint16_t*)to)[at] = first;
    if (both) ((uint16_t*)to)[at + 1] = second;
  }
}

#endif

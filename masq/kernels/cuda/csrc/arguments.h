// What the kernels are given; masq/kernels/cuda/launch.py mirrors it field by field.

#ifndef MASQ_CUDA_ARGUMENTS_H
#define MASQ_CUDA_ARGUMENTS_H

#include <stdint.h>

enum NumberType { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2 };
constexpr int kMaxTerms = 4;

// N rows of I inputs to be smoothed and quantized, lines of codes padded with zeros.
struct Rows {
  const void* x;           // [N, I]
  const float* inverse;    // [U, I], or null
  const int64_t* vectors;  // [N], which of U; null for the first
  const uint16_t* centre;  // bfloat16 [C, I], or null
  const int64_t* centres;  // [N], which of C; null for the first
  const int32_t* places;   // [N], where among the taken rows a row goes, -1 for nowhere; null where none is taken
  uint8_t* codes;          // [N, line]
  float* scales;           // [N]
  void* taken;             // [n, I], smoothed rows in the type of x
  int64_t rows, inputs, line;
  int32_t type, qmax;
  float divisor;  // Largest magnitude over scale: qmax, or more where ranges are cut off.
};

// A low-rank correction of some rows: u[place] times the transposed right is added.
struct Term {
  const uint16_t* u;      // bfloat16 [n, width]
  const int32_t* places;  // [N], the row of u that corrects a row, -1 for none
  const void* right;      // [O, depth], bfloat16, or int8 if coded
  const int32_t* parts;   // [num_parts, 4]: first output, end, first column of u, how many
  int64_t width, depth;   // these, columns and how many are multiples of kRanks
  int32_t num_parts, coded;
};

// Y [N, O] of codes x [N, line] and w [O, line], lines a multiple of 64 bytes and 16-byte aligned.
struct Product {
  const uint8_t* x;
  const uint8_t* w;
  const float* x_scale;         // [N]
  const float* w_scale;         // [O]
  const float* bias;            // [O], or null
  const void* added;            // [n, O], or null
  const int32_t* added_places;  // [N]
  void* y;                      // [N, O]
  int32_t* sums;                // [slices, N, O] if there are several slices of K
  int64_t rows, outputs, line;
  int32_t added_type, type, slices, num_terms;
  Term terms[kMaxTerms];
};

#endif

// What the library offers to ctypes. Every function returns 0 or the number of an error, see masq_cuda_error.

#ifndef MASQ_CUDA_ENTRY_H
#define MASQ_CUDA_ENTRY_H

#include "product.h"
#include "rows.h"

#ifndef MASQ_KEY
#define MASQ_KEY "none"
#endif

constexpr int kMisaligned = -1, kUnknownTile = -2;

// masq/kernels/cuda/tiles.py names them by their index and says when each is taken.
#define MASQ_TILES(act)            \
  act(0, Tile<16, 64, 1, 4, 6, 3>) \
  act(1, Tile<64, 64, 2, 2, 4, 3>) \
  act(2, Tile<128, 128, 2, 4, 3, 2>) \
  act(3, Tile<128, 256, 2, 4, 4, 1>)

inline bool aligned16(const void* pointer) { return (uintptr_t)pointer % 16 == 0; }

template <class T>
int multiply_with(const Product& given, void* stream) {
  int64_t programs = (given.rows + T::kRows - 1) / T::kRows * ((given.outputs + T::kOutputs - 1) / T::kOutputs);
  int failed = launch(&multiply_tile<T>, programs, given.slices, T::kThreads, T::kShared, stream, given);
  if (failed || given.slices == 1) return failed;
  int64_t pairs = given.rows * ((given.outputs + 1) / 2);
  return launch(&combine_slices, (pairs + kCombineThreads - 1) / kCombineThreads, 1, kCombineThreads, 0, stream, given);
}

extern "C" {

// Of the sources and flags that the library was built from.
const char* masq_cuda_key() { return MASQ_KEY; }

const char* masq_cuda_error(int error) {
  if (error == kMisaligned) return "tensors do not begin at a multiple of 16 bytes";
  if (error == kUnknownTile) return "no tile has this number";
  return error_text(error);
}

// Rows, outputs, threads and bytes of shared memory of a tile.
int masq_cuda_tile(int tile, int32_t* four) {
  switch (tile) {
#define MASQ_DESCRIBE(index, ...)                                                        \
  case index: {                                                                          \
    using T = __VA_ARGS__;                                                               \
    four[0] = T::kRows, four[1] = T::kOutputs, four[2] = T::kThreads, four[3] = T::kShared; \
    return 0;                                                                            \
  }
    MASQ_TILES(MASQ_DESCRIBE)
  }
  return kUnknownTile;
}

int masq_cuda_quantize(const Rows* given, int device, void* stream) {
  if (!aligned16(given->x) && given->inputs % 8 == 0) return kMisaligned;
  int failed = use_device(device);
  if (failed || given->rows == 0) return failed;
  int64_t warps = (given->line / 4 + kWarp - 1) / kWarp;
  int threads = warps * kWarp < kRowThreads ? (int)warps * kWarp : kRowThreads;
  return launch(&quantize_row, given->rows, 1, threads, kRowShared, stream, *given);
}

int masq_cuda_multiply(const Product* given, int tile, int device, void* stream) {
  if (!aligned16(given->x) || !aligned16(given->w)) return kMisaligned;
  int failed = use_device(device);
  if (failed || given->rows == 0 || given->outputs == 0) return failed;
  switch (tile) {
#define MASQ_MULTIPLY(index, ...) \
  case index:                     \
    return multiply_with<__VA_ARGS__>(*given, stream);
    MASQ_TILES(MASQ_MULTIPLY)
  }
  return kUnknownTile;
}
}

#endif

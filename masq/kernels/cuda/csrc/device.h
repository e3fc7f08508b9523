// What a thread of a GPU can do, in PTX where C++ has no word for it. The emulator of the tests defines the same names.

#ifndef MASQ_CUDA_DEVICE_H
#define MASQ_CUDA_DEVICE_H

#include <cuda_runtime.h>
#include <stdint.h>

#define MASQ_DEVICE __device__ __forceinline__
#define MASQ_KERNEL(threads, resident) __global__ void __launch_bounds__(threads, resident)

MASQ_DEVICE int thread_index() { return (int)threadIdx.x; }
MASQ_DEVICE int num_threads() { return (int)blockDim.x; }
MASQ_DEVICE int64_t program_index() { return blockIdx.x; }
MASQ_DEVICE int slice_index() { return (int)blockIdx.y; }

MASQ_DEVICE uint8_t* shared_memory() {
  extern __shared__ __align__(128) uint8_t masq_shared[];
  return masq_shared;
}

MASQ_DEVICE void sync_threads() { __syncthreads(); }

// Whether any thread of the program says so; all of them wait for it.
MASQ_DEVICE bool any_thread(bool said) { return __syncthreads_or(said) != 0; }

MASQ_DEVICE uint32_t max_of_warp(uint32_t value) { return __reduce_max_sync(0xffffffffu, value); }

MASQ_DEVICE uint32_t shared_address(const void* pointer) { return (uint32_t)__cvta_generic_to_shared(pointer); }

// 16 bytes from global to shared memory, past the registers and the first cache.
MASQ_DEVICE void copy_async(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
}

MASQ_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until at most so many of the last groups of copies of this thread are under way.
template <int PENDING>
MASQ_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Four 8 x 16-byte matrices: lane i gives the address of line i % 8 of matrix i / 8, and gets word i % 4 of line i / 4.
MASQ_DEVICE void load_matrices(uint32_t (&to)[4], const void* from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(from))
               : "memory");
}

// 16 x 64 codes times 64 x 8 codes, added to int32.
MASQ_DEVICE void multiply_add(int32_t (&sums)[4], const uint32_t (&left)[4], const uint32_t (&right)[2]) {
  asm("mma.sync.aligned.m16n8k64.row.col.s32.s4.s4.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
      : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right[0]), "r"(right[1]));
}

// 16 x 16 bfloat16 times 16 x 8, added to float32.
MASQ_DEVICE void multiply_add(float (&sums)[4], const uint32_t (&left)[4], const uint32_t (&right)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right[0]), "r"(right[1]));
}

MASQ_DEVICE float bits_to_number(uint32_t bits) { return __uint_as_float(bits); }
MASQ_DEVICE uint32_t number_to_bits(float value) { return __float_as_uint(value); }

MASQ_DEVICE uint16_t number_to_bfloat16(float value) {
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}

MASQ_DEVICE uint16_t number_to_float16(float value) {
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}

MASQ_DEVICE float float16_to_number(uint16_t bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}

// Run a kernel on a stream of the current device; 0, or the number of an error.
template <class Arguments>
int launch(void (*kernel)(Arguments), int64_t programs, int slices, int threads, int shared, void* stream,
           const Arguments& given) {
  if (programs > INT32_MAX) return cudaErrorInvalidConfiguration;
  if (shared > 48 * 1024) {
    cudaError_t refused = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    if (refused != cudaSuccess) return refused;
  }
  kernel<<<dim3((unsigned)programs, (unsigned)slices), threads, shared, (cudaStream_t)stream>>>(given);
  return cudaGetLastError();
}

inline int use_device(int device) { return cudaSetDevice(device); }
inline const char* error_text(int error) { return cudaGetErrorString((cudaError_t)error); }

#endif

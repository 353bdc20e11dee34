#pragma once

// What the attention kernels need of the device, one function per instruction. A test gives the
// same functions for the CPU (cuda/tests/attention_emulator.hpp), where the kernels' own source
// runs. Shared memory is addressed in bytes of its own window, as the instructions do. No header of
// CUDA is needed, so that NVRTC can compile the kernels anywhere.

#if defined(PIPELIVE_EMULATED)
#include "attention_emulator.hpp"
#else

#define PIPELIVE_DEVICE __device__ __forceinline__

namespace pipelive::cuda::attention {

struct Float16 {
  unsigned short bits;
};
struct BFloat16 {
  unsigned short bits;
};
/// Aligned, so that one access moves it.
struct alignas(16) Vector {
  unsigned x, y, z, w;
};

PIPELIVE_DEVICE int thread_id() {
  return static_cast<int>(threadIdx.x);
}
PIPELIVE_DEVICE int block_x() {
  return static_cast<int>(blockIdx.x);
}

/// The start of the dynamic shared memory.
PIPELIVE_DEVICE unsigned shared_base() {
  extern __shared__ __align__(128) unsigned char memory[];
  return static_cast<unsigned>(__cvta_generic_to_shared(memory));
}
template <typename T>
PIPELIVE_DEVICE T* shared_pointer(unsigned address) {
  extern __shared__ __align__(128) unsigned char memory[];
  return reinterpret_cast<T*>(memory + (address - shared_base()));
}

PIPELIVE_DEVICE void sync_block() {
  __syncthreads();
}
PIPELIVE_DEVICE void sync_warp() {
  __syncwarp();
}
PIPELIVE_DEVICE bool any_in_warp(bool value) {
  return __any_sync(0xffffffffu, value) != 0;
}
PIPELIVE_DEVICE float shuffle_xor(float value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}
PIPELIVE_DEVICE float shuffle(float value, int lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}
PIPELIVE_DEVICE long long shuffle(long long value, int lane) {
  const int low = __shfl_sync(0xffffffffu, static_cast<int>(value), lane);
  const int high = __shfl_sync(0xffffffffu, static_cast<int>(value >> 32), lane);
  return (static_cast<long long>(high) << 32) | static_cast<unsigned>(low);
}

// One rounding each, whatever the compiler would like to contract.
PIPELIVE_DEVICE float fma_rn(float a, float b, float c) {
  return __fmaf_rn(a, b, c);
}
PIPELIVE_DEVICE float mul_rn(float a, float b) {
  return __fmul_rn(a, b);
}
PIPELIVE_DEVICE float add_rn(float a, float b) {
  return __fadd_rn(a, b);
}
PIPELIVE_DEVICE float tanh_of(float x) {
  return tanhf(x);
}
PIPELIVE_DEVICE float log_of(float x) {
  return logf(x);
}
PIPELIVE_DEVICE float not_a_number() {
  return __int_as_float(0x7fffffff);
}
PIPELIVE_DEVICE float max_of(float a, float b) {
  return fmaxf(a, b);
}

/// 16 bytes from global to shared memory, both aligned to 16; complete after a cp_async_wait.
PIPELIVE_DEVICE void cp_async(unsigned shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(global) : "memory");
}
/// Ends a group of this thread's copies.
PIPELIVE_DEVICE void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
/// Waits until at most `pending` of this thread's newest groups are not complete.
PIPELIVE_DEVICE void cp_async_wait(int pending) {
  switch (pending) {
    case 0:
      asm volatile("cp.async.wait_group 0;" ::: "memory");
      break;
    case 1:
      asm volatile("cp.async.wait_group 1;" ::: "memory");
      break;
    default:
      asm volatile("cp.async.wait_group 2;" ::: "memory");
      break;
  }
}
PIPELIVE_DEVICE void store_shared(unsigned shared, Vector value) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(shared), "r"(value.x), "r"(value.y),
               "r"(value.z), "r"(value.w)
               : "memory");
}
PIPELIVE_DEVICE Vector load_shared(unsigned shared) {
  Vector v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(shared)
               : "memory");
  return v;
}

/// Four 8x8 matrices of 16-bit elements; lane 8 * i + r gives the address of row r of matrix i, and
/// receives of matrix i row lane / 4, columns 2 * (lane % 4) and the next, in out[i].
PIPELIVE_DEVICE void load_matrix(unsigned (&out)[4], unsigned shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared)
               : "memory");
}
/// The same of the transposed matrices.
PIPELIVE_DEVICE void load_matrix_transposed(unsigned (&out)[4], unsigned shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared)
               : "memory");
}
/// Transposes an 8x8 matrix of 16-bit elements that lies over the warp as load_matrix lays it.
PIPELIVE_DEVICE unsigned transpose_matrix(unsigned value) {
  unsigned out;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(value));
  return out;
}

/// c += a * b, a of 16 x 16, b of 16 x 8 and c of 16 x 8 elements. With g = lane / 4 and
/// q = 2 * (lane % 4): a[0..3] hold rows g, g + 8, g, g + 8 at columns q, q, q + 8, q + 8 (and the
/// next one); b[0..1] rows q and q + 8 (and the next one) at column g; c[0..1] row g at columns q
/// and q + 1, c[2..3] row g + 8.
PIPELIVE_DEVICE void multiply_add(Float16, float (&c)[4], const unsigned (&a)[4], unsigned b0,
                                  unsigned b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
PIPELIVE_DEVICE void multiply_add(BFloat16, float (&c)[4], const unsigned (&a)[4], unsigned b0,
                                  unsigned b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/// Two floats rounded to nearest even, `low` in the lower half.
PIPELIVE_DEVICE unsigned pack(Float16, float low, float high) {
  unsigned out;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  return out;
}
PIPELIVE_DEVICE unsigned pack(BFloat16, float low, float high) {
  unsigned out;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  return out;
}
PIPELIVE_DEVICE float widen(Float16 value) {
  float out;
  asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(value.bits));
  return out;
}
PIPELIVE_DEVICE float widen(BFloat16 value) {
  return __uint_as_float(static_cast<unsigned>(value.bits) << 16);
}
PIPELIVE_DEVICE float widen(float value) {
  return value;
}
PIPELIVE_DEVICE float float_of_bits(unsigned bits) {
  return __uint_as_float(bits);
}
PIPELIVE_DEVICE unsigned bits_of_float(float value) {
  return __float_as_uint(value);
}

PIPELIVE_DEVICE void atomic_min(unsigned long long* address, unsigned long long value) {
  atomicMin(address, value);
}
PIPELIVE_DEVICE void atomic_add(unsigned long long* address, unsigned long long value) {
  atomicAdd(address, value);
}

}  // namespace pipelive::cuda::attention
#endif

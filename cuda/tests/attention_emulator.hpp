#pragma once

// Runs the attention kernels' own source on the CPU: the functions of
// cuda/src/attention_device.cuh, each thread of a block on a stack of its own. Warp-wide and
// block-wide operations wait until all their threads have come. What a thread stores to shared
// memory 16 bytes at a time, and what it copies there, is poison to everyone until the thread has
// waited for the copy and then come to a barrier of its warp or block. Threads run in an order that
// a test chooses.

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

#define PIPELIVE_DEVICE inline

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

namespace emulator {

enum class Order { forward, backward, random };

struct Options {
  unsigned grid = 1;
  unsigned shared_bytes = 0;
  Order order = Order::forward;
  std::uint64_t seed = 0;
  /// Whether 16 bytes of global memory may be read by a copy.
  std::function<bool(const void*)> may_copy;
};

/// Runs every block, one after the other. Returns what went wrong: a deadlock, threads of a warp in
/// different operations, an address out of range or not aligned; empty if nothing did.
std::string run(const Options& options, const std::function<void()>& kernel);

/// Reports an error of the running thread, which does not go on.
[[noreturn]] void fail(const std::string& what);

int thread_id();
int block_x();
unsigned shared_base();
void* shared_pointer(unsigned address, std::size_t bytes, std::size_t alignment);

void sync_block();
void sync_warp();
/// 16 bytes to shared memory, to be read behind the next barrier.
void write_shared(unsigned shared, Vector value);
/// All lanes of the warp bring `bytes` of input and take as many; the last to come runs `work`,
/// which sees inputs and outputs of the 32 lanes one after the other.
void together(const char* operation, const void* in, void* out, std::size_t in_bytes,
              std::size_t out_bytes,
              const std::function<void(const std::byte* in, std::byte* out)>& work);

void cp_async(unsigned shared, const void* global);
void cp_async_commit();
void cp_async_wait(int pending);

float half_to_float(unsigned short bits);
unsigned short float_to_half(float value);
unsigned short float_to_bfloat16(float value);

}  // namespace emulator

using emulator::block_x;
using emulator::cp_async;
using emulator::cp_async_commit;
using emulator::cp_async_wait;
using emulator::shared_base;
using emulator::sync_block;
using emulator::thread_id;

template <typename T>
T* shared_pointer(unsigned address) {
  return static_cast<T*>(emulator::shared_pointer(address, sizeof(T), alignof(T)));
}

void sync_warp();
bool any_in_warp(bool value);
float shuffle_xor(float value, int mask);
float shuffle(float value, int lane);
long long shuffle(long long value, int lane);

inline float fma_rn(float a, float b, float c) {
  return std::fma(a, b, c);
}
inline float mul_rn(float a, float b) {
  return a * b;
}
inline float add_rn(float a, float b) {
  return a + b;
}
inline float tanh_of(float x) {
  return std::tanh(x);
}
inline float log_of(float x) {
  return std::log(x);
}
inline float not_a_number() {
  return std::nanf("");
}
inline float max_of(float a, float b) {
  return std::fmax(a, b);
}

void store_shared(unsigned shared, Vector value);
Vector load_shared(unsigned shared);
void load_matrix(unsigned (&out)[4], unsigned shared);
void load_matrix_transposed(unsigned (&out)[4], unsigned shared);
unsigned transpose_matrix(unsigned value);
void multiply_add(Float16, float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1);
void multiply_add(BFloat16, float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1);

unsigned pack(Float16, float low, float high);
unsigned pack(BFloat16, float low, float high);
float widen(Float16 value);
float widen(BFloat16 value);
inline float widen(float value) {
  return value;
}
float float_of_bits(unsigned bits);
unsigned bits_of_float(float value);

void atomic_min(unsigned long long* address, unsigned long long value);
void atomic_add(unsigned long long* address, unsigned long long value);

}  // namespace pipelive::cuda::attention

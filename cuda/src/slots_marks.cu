// Takes marks of written slots and makes ranges of them.
#include "pipelive/cuda/mark_math.hpp"

namespace pipelive::cuda {
namespace {

/// The sum over the thread block, in every thread. Every thread calls it.
template <typename Number>
__device__ __forceinline__ Number sum_over_block(Number value) {
  __shared__ Number sums[kMarkThreads / 32];
  for (int lanes = 16; lanes != 0; lanes /= 2) value += __shfl_xor_sync(0xFFFFFFFFU, value, lanes);
  __syncthreads();  // the last call's readers are done
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = value;
  __syncthreads();
  Number all = 0;
  for (u32 i = 0; i < kMarkThreads / 32; ++i) all += sums[i];
  return all;
}

/// The sum over the threads before this one. Every thread calls it.
__device__ __forceinline__ u32 sum_before(u32 value) {
  __shared__ u32 sums[kMarkThreads / 32];
  const u32 lane = threadIdx.x % 32;
  u32 until = value;  // this thread's included
  for (u32 step = 1; step < 32; step *= 2) {
    const u32 below = __shfl_up_sync(0xFFFFFFFFU, until, step);
    if (lane >= step) until += below;
  }
  __syncthreads();
  if (lane == 31) sums[threadIdx.x / 32] = until;
  __syncthreads();
  u32 before = until - value;
  for (u32 i = 0; i < threadIdx.x / 32; ++i) before += sums[i];
  return before;
}

}  // namespace
}  // namespace pipelive::cuda

extern "C" __global__ void __launch_bounds__(pipelive::cuda::kMarkThreads)
    pipelive_marks_take(const pipelive::cuda::MarkTakeArgs args) {
  using namespace pipelive::cuda;
  __shared__ u32 last_words[kMarkThreads];
  const u64 index = static_cast<u64>(blockIdx.x) * kChunkWords + threadIdx.x * kMarkWords;
  MarkWindow window;
  window.quad = take_words(args.sets, index);
  at_address<MarkQuad>(args.taken)[index / kMarkWords] = window.quad;
  last_words[threadIdx.x] = window.quad.word[kMarkWords - 1];
  __syncthreads();
  // Runs are counted as if they broke at the chunk's borders.
  window.carry = threadIdx.x > 0 ? last_words[threadIdx.x - 1] >> 31 : 0;
  window.next = 0;
  const u32 runs = sum_over_block(count_begins(window));
  const u32 first = __syncthreads_or(threadIdx.x == 0 && (window.quad.word[0] & 1U) != 0);
  if (threadIdx.x == kMarkThreads - 1) {
    at_address<u32>(args.chunks)[blockIdx.x] =
        chunk_summary(runs, first != 0 ? 1 : 0, window.quad.word[kMarkWords - 1] >> 31);
  }
}

extern "C" __global__ void __launch_bounds__(pipelive::cuda::kMarkThreads)
    pipelive_marks_fold(const pipelive::cuda::MarkFoldArgs args) {
  using namespace pipelive::cuda;
  const u64 index = static_cast<u64>(blockIdx.x) * kChunkWords + threadIdx.x * kMarkWords;
  const MarkQuad more = take_words(args.sets, index);
  MarkQuad* into = at_address<MarkQuad>(args.sets.words) +
                   (args.into * args.sets.set_words + index) / kMarkWords;
  MarkQuad all = *into;
  u32 fresh = 0;
  for (u32 w = 0; w < kMarkWords; ++w) {
    fresh += count_ones(more.word[w] & ~all.word[w]);
    all.word[w] |= more.word[w];
  }
  if (fresh != 0) *into = all;
  fresh = sum_over_block(fresh);
  if (threadIdx.x == 0 && fresh != 0)
    atomicAdd(at_address<u64>(args.fresh), static_cast<u64>(fresh));
}

extern "C" __global__ void __launch_bounds__(pipelive::cuda::kMarkThreads)
    pipelive_marks_emit(const pipelive::cuda::MarkEmitArgs args) {
  using namespace pipelive::cuda;
  const u32* chunks = at_address<const u32>(args.chunks);
  const u32 chunk = blockIdx.x;
  const bool is_last = chunk + 1 == args.num_chunks;
  if (chunks[chunk] == 0 && !is_last) return;  // the whole thread block
  // Ranges that begin, and that end, in the chunks before this one.
  u64 begins = 0;
  u64 ends = 0;
  for (u32 c = threadIdx.x; c < chunk; c += kMarkThreads) {
    begins += begins_in_chunk(chunks[c], c > 0 ? chunks[c - 1] : 0);
    ends += ends_in_chunk(chunks[c], chunks[c + 1]);
  }
  begins = sum_over_block(begins);
  ends = sum_over_block(ends);
  const u64 words = static_cast<u64>(args.num_chunks) * kChunkWords;
  const u64 index = static_cast<u64>(chunk) * kChunkWords + threadIdx.x * kMarkWords;
  const MarkWindow window = window_of(at_address<const u32>(args.taken), index, words);
  // Neither number of a chunk passes 2^14, so two of them share a word.
  const u32 here = count_begins(window) | (count_ends(window) << 16);
  const u32 before = sum_before(here);
  emit_runs(window, index, begins + (before & 0xFFFFU), ends + (before >> 16),
            at_address<u64>(args.ranges), args.most);
  if (is_last && threadIdx.x == kMarkThreads - 1) {
    *at_address<u64>(args.total) = begins + ((before + here) & 0xFFFFU);
  }
}

#pragma once

#include "pipelive/cuda/portable.hpp"
#include "pipelive/cuda/slot_math.hpp"

/// Many short copies in one launch, each block of threads making one of them.
namespace pipelive::cuda {

inline constexpr u32 kCopyManyThreads = 256;
/// Longer copies are cut into pieces of so many bytes, so that the blocks have alike much to do.
inline constexpr u32 kCopyManyBytes = 64 << 10;

/// Addresses are multiples of 16.
struct CopyEntry {
  u64 to;
  u64 from;
  u32 vectors;  ///< of 16 bytes
  u32 padding;
};

struct CopyManyArgs {
  u64 entries;  ///< CopyEntry[], one for each block of threads
};

/// The part of one thread.
PIPELIVE_HD void copy_entry(const CopyManyArgs& args, u32 block, u32 thread) {
  const CopyEntry entry = at_address<const CopyEntry>(args.entries)[block];
  const Vector16* __restrict__ from = at_address<const Vector16>(entry.from);
  Vector16* __restrict__ to = at_address<Vector16>(entry.to);
  u32 i = thread;
  // Several loads are under way before the first of their stores.
  for (; i + 3 * kCopyManyThreads < entry.vectors; i += 4 * kCopyManyThreads) {
    const Vector16 a = from[i];
    const Vector16 b = from[i + kCopyManyThreads];
    const Vector16 c = from[i + 2 * kCopyManyThreads];
    const Vector16 d = from[i + 3 * kCopyManyThreads];
    to[i] = a;
    to[i + kCopyManyThreads] = b;
    to[i + 2 * kCopyManyThreads] = c;
    to[i + 3 * kCopyManyThreads] = d;
  }
  for (; i < entry.vectors; i += kCopyManyThreads) to[i] = from[i];
}

}  // namespace pipelive::cuda

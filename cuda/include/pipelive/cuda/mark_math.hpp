#pragma once

#include "pipelive/cuda/portable.hpp"

/// Marks of written slots in device memory: bits in *sets*, one set per step in flight, so that the
/// marks of a step which has not completed are never taken with those of one that has. A set is
/// padded to whole chunks; bit i of word w stands for slot 32 * w + i.
namespace pipelive::cuda {

inline constexpr u32 kMarkThreads = 256;
inline constexpr u32 kMarkWords = 4;  ///< words of one thread, loaded at once
inline constexpr u32 kChunkWords = kMarkThreads * kMarkWords;  ///< of one thread block
inline constexpr u32 kMaxMarkSets = 64;

/// Words of one set.
PIPELIVE_HD constexpr u64 mark_words(u64 num_slots) {
  const u64 words = (num_slots + 31) / 32;
  return (words + kChunkWords - 1) / kChunkWords * kChunkWords;
}

struct alignas(16) MarkQuad {
  u32 word[kMarkWords];
};

/// The marks of `count` sets, taken together.
struct MarkSets {
  u64 words;      ///< address of set 0; the others follow
  u64 set_words;  ///< mark_words(num_slots)
  u32 count;
  u32 ids[kMaxMarkSets];
};

/// The kernel that takes sets: they are empty afterwards, and their union is in `taken`.
struct MarkTakeArgs {
  MarkSets sets;
  u64 taken;   ///< u32[set_words]
  u64 chunks;  ///< u32[set_words / kChunkWords]: a chunk_summary each
};

/// The kernel that adds sets to another one and empties them.
struct MarkFoldArgs {
  MarkSets sets;
  u32 into;
  u32 padding;
  u64 fresh;  ///< u64: the slots that were not marked in `into` are added to it
};

/// The kernel that writes the ranges of what was taken.
struct MarkEmitArgs {
  u64 taken;
  u64 chunks;
  u64 total;   ///< u64: the number of ranges, written whether or not they fit
  u64 ranges;  ///< u64[2 * most]: first slot, and the slot behind the last
  u64 most;
  u32 num_chunks;
  u32 padding;
};

/// The union of the sets' words that one thread looks at; the sets' words become 0. `index` is that
/// of its first word. Up to four sets are loaded before the first is stored to, so that their loads
/// are under way at a time; a set that stands there twice counts once.
PIPELIVE_HD MarkQuad take_words(const MarkSets& sets, u64 index) {
  constexpr u32 kAtOnce = 4;
  MarkQuad* const all_sets = at_address<MarkQuad>(sets.words) + index / kMarkWords;
  const u64 stride = sets.set_words / kMarkWords;
  MarkQuad all = {{0, 0, 0, 0}};
  for (u32 first = 0; first < sets.count; first += kAtOnce) {
    MarkQuad found[kAtOnce] = {};
    PIPELIVE_UNROLL
    for (u32 i = 0; i < kAtOnce; ++i) {
      if (first + i < sets.count) found[i] = all_sets[sets.ids[first + i] * stride];
    }
    PIPELIVE_UNROLL
    for (u32 i = 0; i < kAtOnce; ++i) {
      u32 any = 0;
      PIPELIVE_UNROLL
      for (u32 w = 0; w < kMarkWords; ++w) {
        all.word[w] |= found[i].word[w];
        any |= found[i].word[w];
      }
      if (any != 0) all_sets[sets.ids[first + i] * stride] = MarkQuad{{0, 0, 0, 0}};
    }
  }
  return all;
}

/// Bits at which a run of ones begins; `carry` is 1 where the slot before the word is marked.
PIPELIVE_HD constexpr u32 run_begins(u32 word, u32 carry) {
  return word & ~((word << 1) | carry);
}
/// Bits at which a run ends; `next` is 1 where the slot behind the word is marked.
PIPELIVE_HD constexpr u32 run_ends(u32 word, u32 next) {
  return word & ~((word >> 1) | (next << 31));
}

/// What other chunks need to know of one: its runs, if runs broke at its borders (at most 2^14),
/// and whether its first and last slot are marked.
PIPELIVE_HD constexpr u32 chunk_summary(u32 runs, u32 first, u32 last) {
  return (runs << 2) | (first << 1) | last;
}
PIPELIVE_HD constexpr u32 chunk_runs(u32 summary) {
  return summary >> 2;
}
PIPELIVE_HD constexpr u32 chunk_first(u32 summary) {
  return (summary >> 1) & 1U;
}
PIPELIVE_HD constexpr u32 chunk_last(u32 summary) {
  return summary & 1U;
}
/// Runs that begin in a chunk, given the summary of the one before it (0 for none).
PIPELIVE_HD constexpr u32 begins_in_chunk(u32 summary, u32 before) {
  return chunk_runs(summary) - (chunk_first(summary) & chunk_last(before));
}
/// Runs that end in a chunk, given the summary of the one behind it (0 for none).
PIPELIVE_HD constexpr u32 ends_in_chunk(u32 summary, u32 behind) {
  return chunk_runs(summary) - (chunk_last(summary) & chunk_first(behind));
}

/// The words of one thread with the bits next to them.
struct MarkWindow {
  MarkQuad quad;
  u32 carry;  ///< 1 where the slot before them is marked
  u32 next;   ///< 1 where the slot behind them is
};

PIPELIVE_HD u32 carry_into(const MarkWindow& window, u32 w) {
  return w == 0 ? window.carry : window.quad.word[w - 1] >> 31;
}
PIPELIVE_HD u32 next_after(const MarkWindow& window, u32 w) {
  return w + 1 == kMarkWords ? window.next : window.quad.word[w + 1] & 1U;
}
PIPELIVE_HD u32 count_begins(const MarkWindow& window) {
  u32 count = 0;
  for (u32 w = 0; w < kMarkWords; ++w) {
    count += count_ones(run_begins(window.quad.word[w], carry_into(window, w)));
  }
  return count;
}
PIPELIVE_HD u32 count_ends(const MarkWindow& window) {
  u32 count = 0;
  for (u32 w = 0; w < kMarkWords; ++w) {
    count += count_ones(run_ends(window.quad.word[w], next_after(window, w)));
  }
  return count;
}

/// The window of the words from `index` on, of all `words` that were taken.
PIPELIVE_HD MarkWindow window_of(const u32* taken, u64 index, u64 words) {
  MarkWindow window;
  window.quad = *reinterpret_cast<const MarkQuad*>(taken + index);
  window.carry = index > 0 ? taken[index - 1] >> 31 : 0;
  window.next = index + kMarkWords < words ? taken[index + kMarkWords] & 1U : 0;
  return window;
}

/// Writes what begins and ends in a window: the first of them is begin number `begin` and end
/// number `end` of all. What is beyond `most` is not written.
PIPELIVE_HD void emit_runs(const MarkWindow& window, u64 index, u64 begin, u64 end, u64* ranges,
                           u64 most) {
  for (u32 w = 0; w < kMarkWords; ++w) {
    const u64 slot = (index + w) * 32;
    for (u32 left = run_begins(window.quad.word[w], carry_into(window, w)); left != 0;
         left &= left - 1, ++begin) {
      if (begin < most) ranges[2 * begin] = slot + count_trailing_zeros(left);
    }
    for (u32 left = run_ends(window.quad.word[w], next_after(window, w)); left != 0;
         left &= left - 1, ++end) {
      if (end < most) ranges[2 * end + 1] = slot + count_trailing_zeros(left) + 1;
    }
  }
}

}  // namespace pipelive::cuda

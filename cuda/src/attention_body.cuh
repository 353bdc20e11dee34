#pragma once

#include "attention_device.cuh"
#include "attention_scalar.cuh"
#include "attention_tensor.cuh"
#include "pipelive/cuda/attention_plan.hpp"

namespace pipelive::cuda::attention {

/// Rounds four neighbouring elements of an output row to its type.
PIPELIVE_DEVICE void store_four(float* to, const float (&v)[4], bool aligned) {
  if (aligned) {
    *reinterpret_cast<Vector*>(to) = {bits_of_float(v[0]), bits_of_float(v[1]), bits_of_float(v[2]),
                                      bits_of_float(v[3])};
  } else {
    for (int i = 0; i < 4; ++i) to[i] = v[i];
  }
}
template <typename T>
PIPELIVE_DEVICE void store_four(T* to, const float (&v)[4], bool aligned) {
  const unsigned low = pack(T{}, v[0], v[1]);
  const unsigned high = pack(T{}, v[2], v[3]);
  if (aligned) {
    reinterpret_cast<unsigned*>(to)[0] = low;
    reinterpret_cast<unsigned*>(to)[1] = high;
  } else {
    to[0].bits = static_cast<unsigned short>(low);
    to[1].bits = static_cast<unsigned short>(low >> 16);
    to[2].bits = static_cast<unsigned short>(high);
    to[3].bits = static_cast<unsigned short>(high >> 16);
  }
}

PIPELIVE_DEVICE float log_sum_exp(float max, float sum) {
  constexpr float kLn2 = 0.69314718055994531f;
  return fma_rn(max, kLn2, log_of(sum));
}

/// One thread block's work: a tile of query rows of one sequence over one KV head, and a run of the
/// splits of its KV. Splits come out one after the other; where the block has all of them it folds
/// them in order and writes the result, else it leaves each for `finish`, which folds them in the
/// same order with the same arithmetic.
template <typename Math>
class Block {
 public:
  PIPELIVE_DEVICE explicit Block(const Params& p)
      : p_(p),
        shared_(shared_of(Math::kTensor, Math::kDim, Math::kRows, Math::kItemBytes, p.stages)),
        thread_(thread_id()),
        warp_(thread_id() / 32),
        kv_head_(block_x() / (p.slots * p.runs)) {}

  PIPELIVE_DEVICE void run() {
    // Late tiles of a prompt attend to most: they go first.
    const int slot = p_.slots - 1 - block_x() % (p_.slots * p_.runs) / p_.runs;
    const int run = block_x() % p_.runs;
    if (!tile_of(p_, slot, &tile_)) return;
    const int position = tile_.sequence.len - tile_.sequence.count;
#pragma unroll 1
    for (int row = tile_.row_begin; row < tile_.row_end;) {
      const Pass pass = pass_at(row, tile_.row_end, p_.group, position, p_.window);
      row = pass.row_end;
      const SplitRange splits = run_of(run, p_.runs, pass.num_splits);
      if (splits.begin == splits.end) continue;
      attend(pass, splits);
    }
  }

 private:
  PIPELIVE_DEVICE const typename Math::Query* query_row(int row) const {
    if (row >= tile_.row_end) return nullptr;
    return static_cast<const typename Math::Query*>(p_.query) +
           (tile_.sequence.start + row / p_.group) * p_.query_token_stride +
           (kv_head_ * p_.group + row % p_.group) * p_.query_head_stride;
  }

  PIPELIVE_DEVICE float* stat(int which) const {
    return shared_pointer<float>(shared_base() + static_cast<unsigned>(shared_.stats)) +
           which * Math::kRows;
  }
  PIPELIVE_DEVICE int* row_end() const { return reinterpret_cast<int*>(stat(kRowEnd)); }

  PIPELIVE_DEVICE void attend(const Pass& pass, const SplitRange& splits) {
    const int first_split = pass.first_split + splits.begin;
    const int last_split = pass.first_split + splits.end;
    const int begin = max(pass.kv_begin, first_split * pass.split_len);
    // The last split's end may lie beyond the largest int.
    const int end = last_split - 1 == pass.last_position / pass.split_len
                        ? pass.kv_end
                        : last_split * pass.split_len;
    const int first_tile = begin / Math::kTokens;
    int tile = first_tile + (warp_ - first_tile % kWarps + kWarps) % kWarps;
    typename Math::KVLoader loader(p_, tile_.seq, kv_head_, p_.head_dim * Math::kItemBytes, tile,
                                   begin, end);
    const unsigned stages =
        shared_base() + static_cast<unsigned>(warp_ * p_.stages * shared_.stage_bytes);
#pragma unroll 1
    for (int stage = 0; stage < p_.stages - 1; ++stage) {
      loader.issue(stages + static_cast<unsigned>(stage * shared_.stage_bytes));
    }
    // Behind the first copies, which are under way while these loads are waited for.
    if (!query_loaded_) {
      math_.load_query(p_, shared_, tile_.row_end - tile_.row_begin,
                       [this](int r) { return query_row(tile_.row_begin + r); });
      query_loaded_ = true;
    }
    for (int r = thread_; r < Math::kRows; r += kThreads) {
      const int row = tile_.row_begin + r;
      const bool mine = row >= pass.row_begin && row < pass.row_end;
      row_end()[r] =
          mine ? pass.first_position + (row / p_.group - pass.row_begin / p_.group) + 1 : 0;
    }
    sync_block();

    Scores scores;
    scores.scale = p_.score_scale;
    scores.cap = p_.cap_scale;
    scores.window = p_.window;
    scores.unmasked_begin = p_.window > 0 ? max(0, pass.last_position - p_.window + 1) : 0;
    scores.unmasked_end = pass.first_position + 1;
    const bool direct = is_direct(p_.runs, pass.num_splits);
    int fill = p_.stages - 1;
    int use = 0;
#pragma unroll 1
    for (int split = first_split; split < last_split; ++split) {
      const int split_end = split == last_split - 1 ? end : (split + 1) * pass.split_len;
      math_.reset();
#pragma unroll 1
      for (; tile * Math::kTokens < split_end; tile += kWarps) {
        // Each lane waits for its own copies; the barrier makes them visible to the others, and
        // says that the stage of the tile before may be written again.
        if (p_.stages > 1) cp_async_wait(p_.stages - 2);
        sync_warp();
        loader.issue(stages + static_cast<unsigned>(fill * shared_.stage_bytes));
        if (p_.stages == 1) {
          cp_async_wait(0);
          sync_warp();
        }
        math_.add_tile(stages + static_cast<unsigned>(use * shared_.stage_bytes),
                       tile * Math::kTokens, scores, row_end());
        fill = fill + 1 == p_.stages ? 0 : fill + 1;
        use = use + 1 == p_.stages ? 0 : use + 1;
      }
      combine_warps(split == first_split);
      if (!direct) {
        store_partial(pass, split);
      } else {
        fold_part(pass, split == first_split, split == last_split - 1);
      }
      sync_block();  // before anyone overwrites statistics or results of this split
    }
    // Nothing is on its way any more when the stages are used again; nor when the block ends.
    cp_async_wait(0);
    sync_warp();
  }

  /// Adds the warps' results up, in their order, to a split's result in shared memory.
  PIPELIVE_DEVICE void combine_warps(bool first) {
    math_.store_stats(stat(kWarpMax + warp_), stat(kWarpSum + warp_));
    sync_block();
    if (thread_ < Math::kRows) {
      const int r = thread_;
      const float most = max_of_warps(r);
      const float base = finite_max(most);
      float sum = 0.0f;
      for (int w = 0; w < kWarps; ++w) {
        sum = fma_rn(exp2_fast(stat(kWarpMax + w)[r] - base), stat(kWarpSum + w)[r], sum);
      }
      stat(kPartMax)[r] = most;
      stat(kPartSum)[r] = sum;
      const Fold fold = fold_of(first ? minus_infinity() : stat(kTotalMax)[r], most);
      stat(kFoldTotal)[r] = fold.total;
      stat(kFoldPart)[r] = fold.part;
      stat(kTotalSum)[r] = add_sums(fold, first ? 0.0f : stat(kTotalSum)[r], sum);
      stat(kTotalMax)[r] = fold.max;
    }
    float* const part = shared_pointer<float>(shared_base() + static_cast<unsigned>(shared_.part));
#pragma unroll 1
    for (int turn = 0; turn < kWarps; ++turn) {
      if (turn == warp_) {
        math_.store(part, shared_.stride, turn > 0, [this](int r) {
          return exp2_fast(stat(kWarpMax + warp_)[r] - finite_max(max_of_warps(r)));
        });
      }
      sync_block();
    }
  }

  PIPELIVE_DEVICE float max_of_warps(int row) const {
    float most = stat(kWarpMax)[row];
    for (int w = 1; w < kWarps; ++w) most = max_of(most, stat(kWarpMax + w)[row]);
    return most;
  }

  PIPELIVE_DEVICE static float add_sums(const Fold& fold, float total, float part) {
    return fma_rn(fold.part, part, mul_rn(fold.total, total));
  }

  /// Calls f(row of the tile, first of four head dims), for the rows of the pass.
  template <typename F>
  PIPELIVE_DEVICE void for_quads(const Pass& pass, F f) const {
    constexpr int kQuads = Math::kDim / 4;
    const int begin = pass.row_begin - tile_.row_begin;
    const int count = (pass.row_end - pass.row_begin) * kQuads;
#pragma unroll 1
    for (int i = thread_; i < count; i += kThreads) {
      const int dim = i % kQuads * 4;
      if (dim < p_.head_dim) f(begin + i / kQuads, dim);
    }
  }

  PIPELIVE_DEVICE int token_of(int r) const {
    return tile_.sequence.start + (tile_.row_begin + r) / p_.group;
  }
  PIPELIVE_DEVICE int head_of(int r) const {
    return kv_head_ * p_.group + (tile_.row_begin + r) % p_.group;
  }

  PIPELIVE_DEVICE void store_partial(const Pass& pass, int split) const {
    const long long rows = static_cast<long long>(p_.tokens) * p_.q_heads;
    const float* const part =
        shared_pointer<float>(shared_base() + static_cast<unsigned>(shared_.part));
    for_quads(pass, [&](int r, int dim) {
      const long long row =
          split * rows + static_cast<long long>(token_of(r)) * p_.q_heads + head_of(r);
      const Vector* const from = reinterpret_cast<const Vector*>(part + r * shared_.stride + dim);
      *reinterpret_cast<Vector*>(p_.partial + row * p_.head_dim + dim) = *from;
      if (dim == 0) {
        p_.partial_stats[2 * row] = stat(kPartMax)[r];
        p_.partial_stats[2 * row + 1] = stat(kPartSum)[r];
      }
    });
  }

  PIPELIVE_DEVICE void fold_part(const Pass& pass, bool first, bool last) const {
    const unsigned base = shared_base();
    const float* const part = shared_pointer<float>(base + static_cast<unsigned>(shared_.part));
    float* const total = shared_pointer<float>(base + static_cast<unsigned>(shared_.total));
    for_quads(pass, [&](int r, int dim) {
      const int at = r * shared_.stride + dim;
      float v[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float before = first ? 0.0f : total[at + i];
        v[i] = fma_rn(stat(kFoldPart)[r], part[at + i], mul_rn(stat(kFoldTotal)[r], before));
      }
      if (!last) {
#pragma unroll
        for (int i = 0; i < 4; ++i) total[at + i] = v[i];
        return;
      }
      const float sum = stat(kTotalSum)[r];
      const float scale = 1.0f / sum;
#pragma unroll
      for (int i = 0; i < 4; ++i) v[i] = mul_rn(v[i], scale);
      auto* const out = static_cast<typename Math::Query*>(p_.out) +
                        token_of(r) * p_.out_token_stride + head_of(r) * p_.out_head_stride;
      store_four(out + dim, v, p_.out_aligned);
      if (dim == 0 && p_.lse != nullptr) {
        p_.lse[static_cast<long long>(token_of(r)) * p_.q_heads + head_of(r)] =
            log_sum_exp(stat(kTotalMax)[r], sum);
      }
    });
  }

  PIPELIVE_DEVICE static int max(int a, int b) { return a > b ? a : b; }

  const Params& p_;
  const Shared shared_;
  const int thread_;
  const int warp_;
  const int kv_head_;
  Tile tile_;
  bool query_loaded_ = false;
  Math math_;
};

/// What a row becomes to which no block wrote.
template <typename Out>
PIPELIVE_DEVICE void fill_row(const Params& p, int token, int head, float fill) {
  const int lane = thread_id() % 32;
  const float v[4] = {fill, fill, fill, fill};
  for (int dim = lane * 4; dim < p.head_dim; dim += 128) {
    store_four(
        static_cast<Out*>(p.out) + token * p.out_token_stride + head * p.out_head_stride + dim, v,
        p.out_aligned);
  }
  if (lane == 0 && p.lse != nullptr) {
    p.lse[static_cast<long long>(token) * p.q_heads + head] =
        fill == 0.0f ? minus_infinity() : fill;
  }
}

/// One warp per query row, see finish_rows: folds what several blocks left of it, in order; rows of
/// empty sequences and behind the last become 0, rows of a sequence whose numbers contradict each
/// other NaN.
template <typename Out>
PIPELIVE_DEVICE void finish(const Params& p) {
  constexpr int kMost = kMaxHeadDim / 128;
  const int lane = thread_id() % 32;
  const long long row = static_cast<long long>(block_x()) * kWarps + thread_id() / 32;
  if (row >= finish_rows(p.tokens, p.q_heads, p.runs)) return;
  const int token = static_cast<int>(p.runs == 1 ? row : row / p.q_heads);
  const int head = static_cast<int>(p.runs == 1 ? 0 : row % p.q_heads);
  const int seq = sequence_of_token(p, token);
  float fill = 0.0f;
  if (seq >= 0) {
    const Sequence s = read_sequence(p, seq);
    const bool mine = token >= s.start && token - s.start < s.count;
    if (s.state == Sequence::kInvalid || !mine) fill = not_a_number();
    if (s.state == Sequence::kValid && mine) {
      if (p.runs == 1) return;  // every block wrote its result
      const int local = (token - s.start) * p.group + head % p.group;
      const int tile_begin = local / p.tile_rows * p.tile_rows;
      const int rows = s.count * p.group;
      const int tile_end = rows - tile_begin < p.tile_rows ? rows : tile_begin + p.tile_rows;
      Pass pass = pass_at(tile_begin, tile_end, p.group, s.len - s.count, p.window);
      while (pass.row_end <= local) {
        pass = pass_at(pass.row_end, tile_end, p.group, s.len - s.count, p.window);
      }
      if (is_direct(p.runs, pass.num_splits)) return;
      pass = pass_at(local, local + 1, p.group, s.len - s.count, p.window);

      // Lane i has the numbers of split i.
      const long long stride = static_cast<long long>(p.tokens) * p.q_heads;
      float max = minus_infinity();
      float sum = 0.0f;
      if (lane < pass.num_splits) {
        const float* const at = p.partial_stats + 2 * ((pass.first_split + lane) * stride + row);
        max = at[0];
        sum = at[1];
      }
      float acc[kMost][4] = {};
      float total_max = minus_infinity();
      float total_sum = 0.0f;
      // The loads of several splits are under way at a time; they are folded one after the other.
      constexpr int kAhead = 4;
#pragma unroll 1
      for (int first = 0; first < pass.num_splits; first += kAhead) {
        Vector parts[kAhead][kMost] = {};
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
          const float* const part =
              p.partial + ((pass.first_split + first + i) * stride + row) * p.head_dim;
#pragma unroll
          for (int d = 0; d < kMost; ++d) {
            const int dim = d * 128 + lane * 4;
            if (first + i < pass.num_splits && dim < p.head_dim) {
              parts[i][d] = *reinterpret_cast<const Vector*>(part + dim);
            }
          }
        }
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
          if (first + i >= pass.num_splits) break;
          const Fold fold = fold_of(total_max, shuffle(max, first + i));
          total_max = fold.max;
          total_sum = fma_rn(fold.part, shuffle(sum, first + i), mul_rn(fold.total, total_sum));
#pragma unroll
          for (int d = 0; d < kMost; ++d) {
            const Vector v = parts[i][d];
            const unsigned words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              acc[d][j] = fma_rn(fold.part, float_of_bits(words[j]), mul_rn(fold.total, acc[d][j]));
            }
          }
        }
      }
      const float scale = 1.0f / total_sum;
#pragma unroll
      for (int d = 0; d < kMost; ++d) {
        const int dim = d * 128 + lane * 4;
        if (dim >= p.head_dim) continue;
#pragma unroll
        for (int j = 0; j < 4; ++j) acc[d][j] = mul_rn(acc[d][j], scale);
        store_four(
            static_cast<Out*>(p.out) + token * p.out_token_stride + head * p.out_head_stride + dim,
            acc[d], p.out_aligned);
      }
      if (lane == 0 && p.lse != nullptr) p.lse[row] = log_sum_exp(total_max, total_sum);
      return;
    }
  }
  if (p.runs == 1) {
    for (int each = 0; each < p.q_heads; ++each) fill_row<Out>(p, token, each, fill);
  } else {
    fill_row<Out>(p, token, head, fill);
  }
}

/// One block per sequence: counts the table entries that attention would look up and that name no
/// block of [0, resident), and notes the first; a sequence whose numbers contradict each other
/// counts as entry 2^32 - 1 of its row.
PIPELIVE_DEVICE void check_tables(const CheckParams& check) {
  const Params& p = check.params;
  unsigned long long* const report = check.report;
  const int seq = block_x();
  const Sequence s = read_sequence(p, seq);
  const unsigned long long row = static_cast<unsigned long long>(seq) << 32;
  if (s.state == Sequence::kInvalid && thread_id() == 0) {
    atomic_add(report, 1);
    atomic_min(report + 1, row | 0xffffffffu);
  }
  if (s.state != Sequence::kValid) return;
  const Pass pass = pass_at(0, s.count * p.group, p.group, s.len - s.count, p.window);
  const int begin = pass.kv_begin / p.block_size;
  const int end = (s.len - 1) / p.block_size + 1;
  for (int i = begin + thread_id(); i < end; i += kThreads) {
    int id = p.tables[seq * p.table_stride + i];
    if (p.block_map != nullptr) id = id >= 0 && id < p.map_length ? p.block_map[id] : -1;
    if (id >= 0 && id < check.resident) continue;
    atomic_add(report, 1);
    atomic_min(report + 1, row | static_cast<unsigned>(i));
  }
}

}  // namespace pipelive::cuda::attention

#pragma once

#include "attention_device.cuh"
#include "attention_loader.cuh"
#include "pipelive/cuda/attention_plan.hpp"

namespace pipelive::cuda::attention {

/// What a tile's scores are masked by and scaled with.
struct Scores {
  float scale;
  float cap;  // 0: none
  int window;
  /// Tiles of tokens inside of [unmasked_begin, unmasked_end) are attended to by every row.
  int unmasked_begin;
  int unmasked_end;

  /// In units of log2.
  PIPELIVE_DEVICE float operator()(float dot) const {
    const float score = mul_rn(dot, scale);
    return cap > 0.0f ? mul_rn(cap, tanh_of(score)) : score;
  }
  PIPELIVE_DEVICE bool attends(int token, int row_end) const {
    return token < row_end && (window == 0 || token >= row_end - window);
  }
};

/// A warp's part of attention on tensor cores, for 16-bit KV and queries: scores are K times Q
/// transposed, and results V transposed times P transposed, so that query rows are columns (eight
/// to a tile) and tokens and head dims fill the 16 rows. A row's result depends on neither the
/// other rows nor on which column it is.
template <typename T, int kHeadDim, int kColumnTiles>
class TensorMath {
 public:
  static constexpr bool kTensor = true;
  static constexpr int kDim = kHeadDim;
  static constexpr int kRows = 8 * kColumnTiles;
  static constexpr int kTokens = kTensorTile;
  static constexpr int kItemBytes = 2;
  static_assert(kDim % 16 == 0 && kDim <= kMaxHeadDim);
  using Query = T;
  using KVLoader = Loader<kDim * 2, kTokens>;

  /// Takes a tile's query rows: all threads of the block call it, and synchronise before they use
  /// the result. `row(r)` is where row r of the tile lies, or null where there is none.
  template <typename RowOf>
  PIPELIVE_DEVICE void load_query(const Params& p, const Shared& shared, int rows, RowOf row) {
    active_ = (rows + 7) / 8;
    lane_ = thread_id() % 32;
    if constexpr (kInRegisters) {
      const T* const from = row(lane_ / 4);
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int dim = k * 16 + half * 8 + lane_ % 4 * 2;
          unsigned pair = 0;
          if (from != nullptr && dim < p.head_dim) pair = load_pair(from + dim, p.query_aligned);
          query_[k][half] = pair;
        }
      }
    } else {
      query_address_ = shared_base() + static_cast<unsigned>(shared.query);
#pragma unroll 1
      for (int i = thread_id(); i < kRows * kChunks; i += kThreads) {
        const int r = i / kChunks;
        const int chunk = i % kChunks;
        const T* const from = row(r);
        Vector value{0, 0, 0, 0};
        if (from != nullptr && chunk * 8 < p.head_dim) {
          const T* const at = from + chunk * 8;
          value.x = load_pair(at, p.query_aligned);
          value.y = load_pair(at + 2, p.query_aligned);
          value.z = load_pair(at + 4, p.query_aligned);
          value.w = load_pair(at + 6, p.query_aligned);
        }
        store_shared(query_address_ + (r * kChunks + swizzle(chunk, r, kChunks)) * 16, value);
      }
    }
  }

  PIPELIVE_DEVICE void reset() {
#pragma unroll
    for (int n = 0; n < kColumnTiles; ++n) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        max_[n][j] = minus_infinity();
        sum_[n][j] = 0.0f;
      }
#pragma unroll
      for (int d = 0; d < kSteps; ++d) {
#pragma unroll
        for (int i = 0; i < 4; ++i) acc_[d][n][i] = 0.0f;
      }
    }
  }

  /// Adds the tile of tokens from `token` on whose K and V lie at `stage`. `row_end` is the block's
  /// array of that name.
  PIPELIVE_DEVICE void add_tile(unsigned stage, int token, const Scores& scores,
                                const int* row_end) {
    float s[kColumnTiles][4];
    multiply_keys(stage, s);
#pragma unroll
    for (int n = 0; n < kColumnTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) s[n][i] = mul_rn(s[n][i], scores.scale);
    }
    if (scores.cap > 0.0f) {
#pragma unroll
      for (int n = 0; n < kColumnTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) s[n][i] = mul_rn(scores.cap, tanh_of(s[n][i]));
      }
    }
    if (token < scores.unmasked_begin || token + kTokens > scores.unmasked_end) {
#pragma unroll
      for (int n = 0; n < kColumnTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int end = row_end[n * 8 + lane_ % 4 * 2 + i % 2];
          if (!scores.attends(token + lane_ / 4 + i / 2 * 8, end)) s[n][i] = minus_infinity();
        }
      }
    }
    unsigned weights[kColumnTiles][2];
    soften(s, weights);
    if (kColumnTiles == 1 || active_ == kColumnTiles) {
      multiply_values<true>(stage + KVLoader::kHalfBytes, weights);
    } else {
      multiply_values<false>(stage + KVLoader::kHalfBytes, weights);
    }
  }

  /// The rows' maxima and sums over all of this warp's tokens, to statistics arrays of the block.
  PIPELIVE_DEVICE void store_stats(float* max, float* sum) {
#pragma unroll
    for (int n = 0; n < kColumnTiles; ++n) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float total = sum_[n][j];
        total = add_rn(total, shuffle_xor(total, 4));
        total = add_rn(total, shuffle_xor(total, 8));
        total = add_rn(total, shuffle_xor(total, 16));
        if (lane_ / 4 == 0) {
          max[n * 8 + lane_ * 2 + j] = max_[n][j];
          sum[n * 8 + lane_ * 2 + j] = total;
        }
      }
    }
  }

  /// Adds `factor(row)` times the warp's result to `part`, or sets it.
  template <typename Factor>
  PIPELIVE_DEVICE void store(float* part, int stride, bool add, Factor factor) const {
#pragma unroll
    for (int n = 0; n < kColumnTiles; ++n) {
      if (!used(n)) continue;
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int row = n * 8 + lane_ % 4 * 2 + j;
        const float f = factor(row);
        float* const to = part + row * stride + lane_ / 4;
#pragma unroll
        for (int d = 0; d < kSteps; ++d) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int dim = d * 16 + half * 8;
            const float value = acc_[d][n][half * 2 + j];
            to[dim] = fma_rn(f, value, add ? to[dim] : 0.0f);
          }
        }
      }
    }
  }

 private:
  /// The first column tile always is: said here so that a compiler does not predicate it.
  PIPELIVE_DEVICE bool used(int n) const { return n == 0 || n < active_; }
  static constexpr int kSteps = kDim / 16;
  static constexpr int kChunks = KVLoader::kChunks;
  static constexpr bool kInRegisters = kColumnTiles == 1;

  PIPELIVE_DEVICE static unsigned load_pair(const T* at, bool aligned) {
    if (aligned) return *reinterpret_cast<const unsigned*>(at);
    return at[0].bits | static_cast<unsigned>(at[1].bits) << 16;
  }

  PIPELIVE_DEVICE void multiply_keys(unsigned keys, float (&s)[kColumnTiles][4]) const {
#pragma unroll
    for (int n = 0; n < kColumnTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) s[n][i] = 0.0f;
    }
    // Matrices: tokens 0 and 8 of the first eight dims, then of the next eight.
    const int row = lane_ % 16;
    const unsigned base = keys + row * kChunks * 16;
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      unsigned a[4];
      load_matrix(a, base + swizzle(2 * k + lane_ / 16, row, kChunks) * 16);
      if constexpr (kInRegisters) {
        multiply_add(T{}, s[0], a, query_[k][0], query_[k][1]);
      } else {
        // Matrices: two halves of the dims of eight rows, then of the next eight.
#pragma unroll
        for (int n = 0; n < kColumnTiles; n += 2) {
          if (!used(n)) continue;
          const int r = n * 8 + lane_ / 16 * 8 + lane_ % 8;
          const int chunk = 2 * k + lane_ / 8 % 2;
          unsigned b[4];
          load_matrix(b, query_address_ + (r * kChunks + swizzle(chunk, r, kChunks)) * 16);
          multiply_add(T{}, s[n], a, b[0], b[1]);
          multiply_add(T{}, s[n + 1], a, b[2], b[3]);
        }
      }
    }
  }

  /// Turns scores into weights, already transposed, and takes maxima and sums along.
  PIPELIVE_DEVICE void soften(const float (&s)[kColumnTiles][4],
                              unsigned (&weights)[kColumnTiles][2]) {
    bool changed = false;
    float factors[kColumnTiles][2];
#pragma unroll
    for (int n = 0; n < kColumnTiles; ++n) {
      if (!used(n)) {
        factors[n][0] = factors[n][1] = 1.0f;
        weights[n][0] = weights[n][1] = 0;
        continue;
      }
      float p[4];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float most = max_of(s[n][j], s[n][j + 2]);
        most = max_of(most, shuffle_xor(most, 4));
        most = max_of(most, shuffle_xor(most, 8));
        most = max_of(most, shuffle_xor(most, 16));
        most = max_of(most, max_[n][j]);
        const float base = finite_max(most);
        factors[n][j] = exp2_fast(max_[n][j] - base);
        changed |= most != max_[n][j];
        max_[n][j] = most;
        p[j] = exp2_fast(s[n][j] - base);
        p[j + 2] = exp2_fast(s[n][j + 2] - base);
        sum_[n][j] = fma_rn(sum_[n][j], factors[n][j], add_rn(p[j], p[j + 2]));
      }
      // Rows of the matrix are tokens; transposed they are what multiply_add takes as b.
      weights[n][0] = transpose_matrix(pack(T{}, p[0], p[1]));
      weights[n][1] = transpose_matrix(pack(T{}, p[2], p[3]));
    }
    if (!any_in_warp(changed)) return;
#pragma unroll
    for (int d = 0; d < kSteps; ++d) {
#pragma unroll
      for (int n = 0; n < kColumnTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) acc_[d][n][i] = mul_rn(acc_[d][n][i], factors[n][i % 2]);
      }
    }
  }

  /// kAll: every column tile is used, and none is asked about between the products.
  template <bool kAll>
  PIPELIVE_DEVICE void multiply_values(unsigned values,
                                       const unsigned (&weights)[kColumnTiles][2]) {
    // Matrices: two halves of the dims of tokens 0 to 7, then of tokens 8 to 15.
    const int row = lane_ % 8 + lane_ / 16 * 8;
    const unsigned base = values + row * kChunks * 16;
#pragma unroll
    for (int d = 0; d < kSteps; ++d) {
      unsigned a[4];
      load_matrix_transposed(a, base + swizzle(2 * d + lane_ / 8 % 2, row, kChunks) * 16);
#pragma unroll
      for (int n = 0; n < kColumnTiles; ++n) {
        if (kAll || used(n)) multiply_add(T{}, acc_[d][n], a, weights[n][0], weights[n][1]);
      }
    }
  }

  float acc_[kSteps][kColumnTiles][4];
  float max_[kColumnTiles][2];
  float sum_[kColumnTiles][2];
  unsigned query_[kInRegisters ? kSteps : 1][2];
  unsigned query_address_ = 0;
  int active_ = 0;
  int lane_ = 0;
};

}  // namespace pipelive::cuda::attention

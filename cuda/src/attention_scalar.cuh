#pragma once

#include "attention_device.cuh"
#include "attention_loader.cuh"
#include "attention_tensor.cuh"
#include "pipelive/cuda/attention_plan.hpp"

namespace pipelive::cuda::attention {

/// A warp's part of attention in float32 arithmetic, for float32 queries over KV of any type: what
/// tensor cores would round is kept. Eight query rows and eight tokens at a time.
template <typename T, int kHeadDim>
class ScalarMath {
 public:
  static constexpr bool kTensor = false;
  static constexpr int kDim = kHeadDim;
  static constexpr int kRows = 8;
  static constexpr int kTokens = kScalarTile;
  static constexpr int kItemBytes = sizeof(T);
  static_assert(kDim % 32 == 0 && kDim <= kMaxHeadDim);
  using Query = float;
  using KVLoader = Loader<kDim * kItemBytes, kTokens>;

  /// As TensorMath's.
  template <typename RowOf>
  PIPELIVE_DEVICE void load_query(const Params& p, const Shared& shared, int /*rows*/, RowOf row) {
    lane_ = thread_id() % 32;
    const unsigned base = shared_base();
    query_ = shared_pointer<float>(base + static_cast<unsigned>(shared.query));
    float* const scratch = shared_pointer<float>(base + static_cast<unsigned>(shared.weights)) +
                           thread_id() / 32 * (kTokens + 1) * kRows;
    weights_ = scratch;
    factors_ = scratch + kTokens * kRows;
    for (int i = thread_id(); i < kRows * kDim; i += kThreads) {
      const int r = i / kDim;
      const int dim = i % kDim;
      const float* const from = row(r);
      query_[r * kQueryStride + dim] = from != nullptr && dim < p.head_dim ? from[dim] : 0.0f;
    }
  }

  PIPELIVE_DEVICE void reset() {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      max_[j] = minus_infinity();
      sum_[j] = 0.0f;
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int d = 0; d < kDims; ++d) acc_[r][d] = 0.0f;
    }
  }

  PIPELIVE_DEVICE void add_tile(unsigned stage, int token, const Scores& scores,
                                const int* row_end) {
    // This lane's token and its two rows.
    const int t = lane_ % kTokens;
    const int first = lane_ / kTokens * 2;
    float s[2];
    multiply_keys(stage, t, first, s);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      s[j] = scores(s[j]);
      if (!scores.attends(token + t, row_end[first + j])) s[j] = minus_infinity();
      float most = s[j];
      most = max_of(most, shuffle_xor(most, 1));
      most = max_of(most, shuffle_xor(most, 2));
      most = max_of(most, shuffle_xor(most, 4));
      most = max_of(most, max_[j]);
      const float base = finite_max(most);
      const float factor = exp2_fast(max_[j] - base);
      const float weight = exp2_fast(s[j] - base);
      max_[j] = most;
      sum_[j] = fma_rn(sum_[j], factor, weight);
      weights_[t * kRows + first + j] = weight;
      if (t == 0) factors_[first + j] = factor;
    }
    sync_warp();
    multiply_values(stage + KVLoader::kHalfBytes);
    sync_warp();
  }

  PIPELIVE_DEVICE void store_stats(float* max, float* sum) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      float total = sum_[j];
      total = add_rn(total, shuffle_xor(total, 1));
      total = add_rn(total, shuffle_xor(total, 2));
      total = add_rn(total, shuffle_xor(total, 4));
      if (lane_ % kTokens == 0) {
        max[lane_ / kTokens * 2 + j] = max_[j];
        sum[lane_ / kTokens * 2 + j] = total;
      }
    }
  }

  template <typename Factor>
  PIPELIVE_DEVICE void store(float* part, int stride, bool add, Factor factor) const {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float f = factor(r);
#pragma unroll
      for (int d = 0; d < kDims; ++d) {
        float* const to = part + r * stride + d * 32 + lane_;
        *to = fma_rn(f, acc_[r][d], add ? *to : 0.0f);
      }
    }
  }

 private:
  static constexpr int kChunks = KVLoader::kChunks;
  static constexpr int kPerChunk = 16 / kItemBytes;
  static constexpr int kDims = kDim / 32;  // of each lane
  static constexpr int kQueryStride = kDim + 4;

  PIPELIVE_DEVICE static void widen_chunk(Vector v, float (&out)[kPerChunk]) {
    const unsigned words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (kItemBytes == 4) {
        out[i] = float_of_bits(words[i]);
      } else {
        out[2 * i] = widen(T{static_cast<unsigned short>(words[i])});
        out[2 * i + 1] = widen(T{static_cast<unsigned short>(words[i] >> 16)});
      }
    }
  }

  PIPELIVE_DEVICE void multiply_keys(unsigned keys, int t, int first, float (&s)[2]) const {
    // Four sums each, added up in one order at the end.
    float sums[2][4] = {};
#pragma unroll 4
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      float key[kPerChunk];
      widen_chunk(load_shared(keys + (t * kChunks + swizzle(chunk, t, kChunks)) * 16), key);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float* const q = query_ + (first + j) * kQueryStride + chunk * kPerChunk;
#pragma unroll
        for (int i = 0; i < kPerChunk; ++i) {
          sums[j][i % 4] = fma_rn(q[i], key[i], sums[j][i % 4]);
        }
      }
    }
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      s[j] = add_rn(add_rn(sums[j][0], sums[j][1]), add_rn(sums[j][2], sums[j][3]));
    }
  }

  PIPELIVE_DEVICE void multiply_values(unsigned values) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float factor = factors_[r];
#pragma unroll
      for (int d = 0; d < kDims; ++d) acc_[r][d] = mul_rn(acc_[r][d], factor);
    }
#pragma unroll 2
    for (int t = 0; t < kTokens; ++t) {
      float value[kDims];
#pragma unroll
      for (int d = 0; d < kDims; ++d) {
        const int dim = d * 32 + lane_;
        const int chunk = swizzle(dim / kPerChunk, t, kChunks);
        value[d] = widen(
            *shared_pointer<T>(values + (t * kChunks + chunk) * 16 + dim % kPerChunk * kItemBytes));
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const float weight = weights_[t * kRows + r];
        // A token that a row does not attend to must not matter to it, be its values NaN.
        if (weight == 0.0f) continue;
#pragma unroll
        for (int d = 0; d < kDims; ++d) acc_[r][d] = fma_rn(weight, value[d], acc_[r][d]);
      }
    }
  }

  float acc_[kRows][kDims];
  float max_[2];
  float sum_[2];
  float* query_ = nullptr;
  float* weights_ = nullptr;  // [kTokens][kRows] of this warp
  float* factors_ = nullptr;  // [kRows]
  int lane_ = 0;
};

}  // namespace pipelive::cuda::attention

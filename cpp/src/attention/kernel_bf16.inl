// attend for bfloat16 queries over bfloat16 KV with an instruction that multiplies pairs. Needs
// kernel_body.inl, dot_pairs(sum, a, b) and to_bf16(V). Two tokens' values are interleaved in
// registers, so the accumulators hold the dimensions of 32 in the order of the unpack instructions
// until the end of the split.

constexpr std::uint16_t kZeroRow[attention_detail::kMaxHeadDim] = {};

inline __m512i load_pairs(const std::uint16_t* p, __mmask32 mask) {
  return _mm512_maskz_loadu_epi16(mask, p);
}
inline __mmask32 mask_of(int left) {
  return left >= 32 ? ~__mmask32{0} : (__mmask32{1} << left) - 1;
}

template <int R>
inline void qk_pairs(const std::uint16_t* query, const std::uint16_t* const* keys, int head_dim,
                     float* scores) {
  V acc[R][4];
  for (int r = 0; r < R; ++r) {
    for (int t = 0; t < 4; ++t) acc[r][t] = zero();
  }
  for (int d = 0; d < head_dim; d += 32) {
    const __mmask32 mask = mask_of(head_dim - d);
    __m512i key[4];
    for (int t = 0; t < 4; ++t) key[t] = load_pairs(keys[t] + d, mask);
    for (int r = 0; r < R; ++r) {
      const __m512i q = _mm512_loadu_si512(query + r * attention_detail::kMaxHeadDim + d);
      for (int t = 0; t < 4; ++t) acc[r][t] = dot_pairs(acc[r][t], q, key[t]);
    }
  }
  if constexpr (R == 4) {
    reduce4x4(acc, scores, kTile);
  } else {
    for (int r = 0; r < R; ++r) reduce4(acc[r], scores + r * kTile);
  }
}

/// Weights are pairs of bfloat16, [rows, kTile / 2]; the values of tokens outside [begin, end) are
/// not read.
template <int R, int N>
inline void pv_pairs(const std::uint32_t* weights, const float* alpha,
                     const std::uint16_t* const* values, int begin, int end, int d, int head_dim,
                     float* acc, int stride, const Ahead& ahead) {
  V sum[R][2 * N];
  for (int r = 0; r < R; ++r) {
    const V a = set1(alpha[r]);
    for (int n = 0; n < 2 * N; ++n) sum[r][n] = mul(loadf(acc + r * stride + d + n * kWidth), a);
  }
  for (int t = begin & ~1; t < end; t += 2) {
    if (ahead.count > 0) {
      ahead.fetch(t, 2 * d, 64 * N);
      ahead.fetch(t + 1, 2 * d, 64 * N);
    }
    const std::uint16_t* const first = t < begin ? kZeroRow : values[t];
    const std::uint16_t* const second = t + 1 < end ? values[t + 1] : kZeroRow;
    __m512i pairs[2 * N];
    for (int n = 0; n < N; ++n) {
      const __mmask32 mask = mask_of(head_dim - d - 32 * n);
      const __m512i a = load_pairs(first + d + 32 * n, mask);
      const __m512i b = load_pairs(second + d + 32 * n, mask);
      pairs[2 * n] = _mm512_unpacklo_epi16(a, b);
      pairs[2 * n + 1] = _mm512_unpackhi_epi16(a, b);
    }
    for (int r = 0; r < R; ++r) {
      const __m512i w = _mm512_set1_epi32(static_cast<int>(weights[r * (kTile / 2) + t / 2]));
      for (int n = 0; n < 2 * N; ++n) sum[r][n] = dot_pairs(sum[r][n], pairs[n], w);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int n = 0; n < 2 * N; ++n) storef(acc + r * stride + d + n * kWidth, sum[r][n]);
  }
}

template <int R>
inline void pv_pairs_dims(const std::uint32_t* weights, const float* alpha,
                          const std::uint16_t* const* values, int begin, int end, int head_dim,
                          float* acc, int stride, const Ahead& ahead) {
  int d = 0;
  for (; d + 32 < head_dim; d += 64) {
    pv_pairs<R, 2>(weights, alpha, values, begin, end, d, head_dim, acc, stride, ahead);
  }
  if (d < head_dim)
    pv_pairs<R, 1>(weights, alpha, values, begin, end, d, head_dim, acc, stride, ahead);
}

inline void pv_pairs_rows(const std::uint32_t* weights, const float* alpha, int rows,
                          const std::uint16_t* const* values, int begin, int end, int head_dim,
                          float* acc, int stride, const Ahead& ahead) {
  const Ahead none;
  int r = 0;
  for (; r + 4 <= rows; r += 4) {
    pv_pairs_dims<4>(weights + r * (kTile / 2), alpha + r, values, begin, end, head_dim,
                     acc + r * stride, stride, r == 0 ? ahead : none);
  }
  for (; r < rows; ++r) {
    pv_pairs_dims<1>(weights + r * (kTile / 2), alpha + r, values, begin, end, head_dim,
                     acc + r * stride, stride, r == 0 ? ahead : none);
  }
}

/// Undoes the order that the unpack instructions leave in groups of 32 dimensions.
inline void restore_order(float* row, int stride) {
  const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i second =
      _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
  for (int d = 0; d < stride; d += 32) {
    const V low = loadf(row + d);
    const V high = loadf(row + d + 16);
    storef(row + d, _mm512_permutex2var_ps(low, first, high));
    storef(row + d + 16, _mm512_permutex2var_ps(low, second, high));
  }
}

void attend_brain(const SplitArgs& a) {
  if (a.query_bf16 == nullptr) {
    attend<Brain>(a);
    return;
  }
  Scratch s = carve(a);
  reset(a, s);
  const int stride = padded_dim(a.head_dim);
  const int bytes = a.head_dim * 2;
  // The scratch for widened rows is free here: [rows, kTile / 2] pairs fit for kMaxRows rows.
  std::uint32_t* const weights = reinterpret_cast<std::uint32_t*>(s.wide);
  int side = 0;
  int tile = a.kv_begin / kTile * kTile;
  {
    const int end = a.kv_end < tile + kTile ? a.kv_end : tile + kTile;
    locate(a, a.kv_begin, end, s.keys[0] + (a.kv_begin - tile));
  }
  for (; tile < a.kv_end; tile += kTile, side ^= 1) {
    const int begin = a.kv_begin > tile ? a.kv_begin - tile : 0;
    const int end = a.kv_end < tile + kTile ? a.kv_end - tile : kTile;
    const unsigned char** keys = s.keys[side];
    for (int t = begin & ~3; t < begin; ++t) keys[t] = keys[begin];
    for (int t = end; t < ((end + 3) & ~3); ++t) keys[t] = keys[end - 1];
    const int next = tile + kTile;
    int next_count = a.prefetch_end - next;
    if (next_count > kTile) next_count = kTile;
    if (next_count > 0) locate(a, next, next + next_count, s.keys[side ^ 1]);
    const Ahead ahead_keys{s.keys[side ^ 1], 0, next_count};
    Ahead ahead_values{s.keys[side ^ 1], a.value_offset, next_count};

    for (int t = begin & ~3; t < end; t += 4) {
      for (int i = t; i < t + 4; ++i) ahead_keys.fetch(i, 0, bytes);
      const std::uint16_t* const* four = reinterpret_cast<const std::uint16_t* const*>(keys + t);
      int r = 0;
      for (; r + 4 <= a.rows; r += 4) {
        qk_pairs<4>(a.query_bf16 + r * attention_detail::kMaxHeadDim, four, a.head_dim,
                    s.scores + r * kTile + t);
      }
      for (; r < a.rows; ++r) {
        qk_pairs<1>(a.query_bf16 + r * attention_detail::kMaxHeadDim, four, a.head_dim,
                    s.scores + r * kTile + t);
      }
    }

    for (int r = 0; r < a.rows; ++r) {
      softmax_row(a, s, r, clip_begin(a, r, tile, begin), clip_end(a, r, tile, end));
      const float* row = s.scores + r * kTile;
      for (int i = 0; i < 2; ++i) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(weights + r * (kTile / 2) + 8 * i),
                            to_bf16(loadf(row + 16 * i)));
      }
    }

    const std::uint16_t* values[kTile];
    for (int t = begin; t < end; ++t) {
      values[t] = reinterpret_cast<const std::uint16_t*>(keys[t] + a.value_offset);
    }
    for (int r = 0; r < a.rows;) {
      const int from = clip_begin(a, r, tile, begin);
      const int to = clip_end(a, r, tile, end);
      int last = r + 1;
      while (last < a.rows && clip_begin(a, last, tile, begin) == from &&
             clip_end(a, last, tile, end) == to) {
        ++last;
      }
      if (from < to) {
        pv_pairs_rows(weights + r * (kTile / 2), s.alpha + r, last - r, values, from, to,
                      a.head_dim, a.acc + r * stride, stride, ahead_values);
        ahead_values.count = 0;
      }
      r = last;
    }
  }
  finish_sums(a, s);
  for (int r = 0; r < a.rows; ++r) restore_order(a.acc + r * stride, stride);
}

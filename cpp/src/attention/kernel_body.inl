// The kernels over an ISA's vector type. Included inside an anonymous namespace by each kernel
// file, after it has defined:
//   V, kWidth                      a vector of kWidth floats
//   kQkRows, kPvRows               register tiles: rows by 4 keys, rows by 4 vectors of values
//   zero, set1, loadf, storef, add, sub, mul, divide, fma, vmin, vmax, vabs, select_less,
//   horizontal_max, horizontal_sum, exponent_bits, load(const E*), load_half(const E*), reduce4,
//   reduce4x4
// vmin and vmax return their second operand where either is NaN, so that a NaN is never swallowed.
// Every sum has one order, whatever the register tile, so a row's bits do not depend on its
// company.

constexpr float kInfinity = __builtin_inff();
constexpr int kTile = attention_detail::kTile;
constexpr int kPad = attention_detail::kPad;
using attention_detail::Kernels;
using attention_detail::SplitArgs;

inline int padded_dim(int head_dim) {
  return (head_dim + kPad - 1) / kPad * kPad;
}

/// 2^x, relative error 1e-7; exactly 1 at 0 and exactly 0 from -127 down.
inline V exp2_of(V x) {
  x = vmax(set1(-127.0f), vmin(set1(127.0f), x));
  const V magic = set1(12582912.0f);  // adding it leaves round(x) in the low bits of the mantissa
  const V biased = add(x, magic);
  const V f = sub(x, sub(biased, magic));
  V p = set1(0.00015461447765119374f);
  p = fma(p, f, set1(0.0013390866806730628f));
  p = fma(p, f, set1(0.009618056938052177f));
  p = fma(p, f, set1(0.055503569543361664f));
  p = fma(p, f, set1(0.24022650718688965f));
  p = fma(p, f, set1(0.6931471824645996f));
  p = fma(p, f, set1(1.0f));
  return mul(p, exponent_bits(biased));
}

inline V tanh_of(V x) {
  const V magnitude = vmin(set1(10.0f), vabs(x));
  const V e = exp2_of(mul(magnitude, set1(2.8853900817779268f)));
  const V large = sub(set1(1.0f), divide(set1(2.0f), add(e, set1(1.0f))));
  const V z = mul(x, x);
  V p = set1(-0.006053691729903221f);
  p = fma(p, z, set1(0.020968182012438774f));
  p = fma(p, z, set1(-0.053844988346099854f));
  p = fma(p, z, set1(0.13332733511924744f));
  p = fma(p, z, set1(-0.333333283662796f));
  const V small = fma(mul(p, z), x, x);
  const V signed_large = select_less(x, zero(), sub(zero(), large), large);
  return select_less(magnitude, set1(0.625f), small, signed_large);
}

inline float exp2_of(float x) {
  float lanes[kWidth];
  storef(lanes, exp2_of(set1(x)));
  return lanes[0];
}

/// Addresses of the keys at positions [begin, end).
inline void locate(const SplitArgs& a, int begin, int end, const unsigned char** out) {
  int index = begin / a.block_size;
  int offset = begin - index * a.block_size;
  while (begin < end) {
    std::int64_t block = a.blocks[index++];
    if (a.block_map != nullptr) block = a.block_map[block];
    const unsigned char* key = a.base + block * a.block_bytes + offset * a.token_bytes;
    int count = a.block_size - offset;
    if (count > end - begin) count = end - begin;
    begin += count;
    offset = 0;
    for (; count > 0; --count, key += a.token_bytes) *out++ = key;
  }
}

/// scores[r][t] = query[r] . key[t] for R rows and 4 keys.
template <int R, class E>
inline void qk(const float* query, int stride, const E* const* keys, int head_dim, float* scores) {
  const E* const k0 = keys[0];
  const E* const k1 = keys[1];
  const E* const k2 = keys[2];
  const E* const k3 = keys[3];
  V acc[R][4];
  for (int r = 0; r < R; ++r) {
    for (int t = 0; t < 4; ++t) acc[r][t] = zero();
  }
  int d = 0;
  for (; d + kWidth <= head_dim; d += kWidth) {
    const V key0 = load(k0 + d);
    const V key1 = load(k1 + d);
    const V key2 = load(k2 + d);
    const V key3 = load(k3 + d);
    for (int r = 0; r < R; ++r) {
      const V q = loadf(query + r * stride + d);
      acc[r][0] = fma(q, key0, acc[r][0]);
      acc[r][1] = fma(q, key1, acc[r][1]);
      acc[r][2] = fma(q, key2, acc[r][2]);
      acc[r][3] = fma(q, key3, acc[r][3]);
    }
  }
  if (d < head_dim) {
    const V key0 = load_half(k0 + d);
    const V key1 = load_half(k1 + d);
    const V key2 = load_half(k2 + d);
    const V key3 = load_half(k3 + d);
    for (int r = 0; r < R; ++r) {
      const V q = loadf(query + r * stride + d);
      acc[r][0] = fma(q, key0, acc[r][0]);
      acc[r][1] = fma(q, key1, acc[r][1]);
      acc[r][2] = fma(q, key2, acc[r][2]);
      acc[r][3] = fma(q, key3, acc[r][3]);
    }
  }
  if constexpr (R == 4) {
    reduce4x4(acc, scores, kTile);
  } else {
    for (int r = 0; r < R; ++r) reduce4(acc[r], scores + r * kTile);
  }
}

template <class E>
inline void qk_rows(const float* query, int stride, int rows, const E* const* keys, int head_dim,
                    float* scores) {
  int r = 0;
  for (; r + kQkRows <= rows; r += kQkRows) {
    qk<kQkRows>(query + r * stride, stride, keys, head_dim, scores + r * kTile);
  }
  if constexpr (kQkRows > 2) {
    if (r + 2 <= rows) {
      qk<2>(query + r * stride, stride, keys, head_dim, scores + r * kTile);
      r += 2;
    }
  }
  for (; r < rows; ++r) qk<1>(query + r * stride, stride, keys, head_dim, scores + r * kTile);
}

/// The tokens of the next tile, to be brought nearer while this one is worked on. Requests are
/// spread over the work: a burst of them would wait for each other, and memory idle afterwards.
struct Ahead {
  const unsigned char* const* tokens = nullptr;
  std::int64_t offset = 0;
  int count = 0;

  // GCC takes a function that only prefetches for one without effect and drops calls to it.
  __attribute__((always_inline)) void fetch(int token, int begin, int bytes) const {
    if (token >= count) return;
    const unsigned char* const at = tokens[token] + offset + begin;
    for (int i = 0; i < bytes; i += 64) __builtin_prefetch(at + i, 0, 2);
  }
};

/// acc[r][0 .. N vectors) = acc * alpha[r] + sum over t of p[r][t] * value[t], tokens [begin, end).
template <int R, int N, bool Half, class E>
inline void pv(const float* p, const float* alpha, const E* const* values, int begin, int end,
               int d, float* acc, int stride, const Ahead& ahead) {
  V sum[R][N];
  for (int r = 0; r < R; ++r) {
    const V a = set1(alpha[r]);
    for (int n = 0; n < N; ++n) sum[r][n] = mul(loadf(acc + r * stride + d + n * kWidth), a);
  }
  constexpr int kBytes = N * kWidth * static_cast<int>(sizeof(E));
  for (int t = begin; t < end; ++t) {
    if (ahead.count > 0) ahead.fetch(t, d * static_cast<int>(sizeof(E)), kBytes);
    V value[N];
    for (int n = 0; n < N; ++n) {
      value[n] = Half ? load_half(values[t] + d + n * kWidth) : load(values[t] + d + n * kWidth);
    }
    for (int r = 0; r < R; ++r) {
      const V weight = set1(p[r * kTile + t]);
      for (int n = 0; n < N; ++n) sum[r][n] = fma(weight, value[n], sum[r][n]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int n = 0; n < N; ++n) storef(acc + r * stride + d + n * kWidth, sum[r][n]);
  }
}

/// One range of dimensions for all rows: its part of the values stays in the nearest cache.
template <int N, bool Half, class E>
inline void pv_chunk(const float* p, const float* alpha, int rows, const E* const* values,
                     int begin, int end, int d, float* acc, int stride, const Ahead& ahead) {
  const Ahead none;
  int r = 0;
  for (; r + kPvRows <= rows; r += kPvRows) {
    pv<kPvRows, N, Half>(p + r * kTile, alpha + r, values, begin, end, d, acc + r * stride, stride,
                         r == 0 ? ahead : none);
  }
  if constexpr (kPvRows > 2) {
    if (r + 2 <= rows) {
      pv<2, N, Half>(p + r * kTile, alpha + r, values, begin, end, d, acc + r * stride, stride,
                     r == 0 ? ahead : none);
      r += 2;
    }
  }
  for (; r < rows; ++r) {
    pv<1, N, Half>(p + r * kTile, alpha + r, values, begin, end, d, acc + r * stride, stride,
                   r == 0 ? ahead : none);
  }
}

template <class E>
inline void pv_rows(const float* p, const float* alpha, int rows, const E* const* values, int begin,
                    int end, int head_dim, float* acc, int stride, const Ahead& ahead) {
  int d = 0;
  if (rows == 1) {  // more vectors, so that enough sums are under way
    for (; d + 8 * kWidth <= head_dim; d += 8 * kWidth) {
      pv<1, 8, false>(p, alpha, values, begin, end, d, acc, stride, ahead);
    }
  }
  for (; d + 4 * kWidth <= head_dim; d += 4 * kWidth) {
    pv_chunk<4, false>(p, alpha, rows, values, begin, end, d, acc, stride, ahead);
  }
  for (; d + kWidth <= head_dim; d += kWidth) {
    pv_chunk<1, false>(p, alpha, rows, values, begin, end, d, acc, stride, ahead);
  }
  if (d < head_dim) pv_chunk<1, true>(p, alpha, rows, values, begin, end, d, acc, stride, ahead);
}

/// What the tiles of one split share.
struct Scratch {
  float* scores;  // [rows, kTile]; after the softmax the weights
  float* sums;    // [rows, kPad]: the sum of weights, by lane
  float* alpha;   // [rows]: what this tile's maximum does to what was summed before
  float* wide;    // [kTile, padded head_dim]: keys, then values of a tile as floats
  const unsigned char* keys[2][kTile];
};

inline Scratch carve(const SplitArgs& a) {
  Scratch s;
  s.scores = a.scratch;
  s.sums = s.scores + a.rows * kTile;
  s.alpha = s.sums + a.rows * kPad;
  s.wide = s.alpha + padded_dim(a.rows);
  return s;
}

inline void reset(const SplitArgs& a, const Scratch& s) {
  const int stride = padded_dim(a.head_dim);
  for (int i = 0; i < a.rows * stride; i += kWidth) storef(a.acc + i, zero());
  for (int i = 0; i < a.rows * kPad; i += kWidth) storef(s.sums + i, zero());
  for (int r = 0; r < a.rows; ++r) a.max[r] = -kInfinity;
}

/// Turns row r's scores of positions [from, to) of the tile into weights, the rest into zeros, and
/// brings the row's maximum, sum and alpha up to date. An empty range changes nothing.
inline void softmax_row(const SplitArgs& a, const Scratch& s, int r, int from, int to) {
  float* scores = s.scores + r * kTile;
  if (from >= to) {
    s.alpha[r] = 1.0f;
    return;
  }
  const V scale = set1(a.score_scale);
  V x[kTile / kWidth];
  if (a.cap_scale == 0.0f) {
    for (int i = 0; i < kTile / kWidth; ++i) x[i] = mul(loadf(scores + i * kWidth), scale);
  } else {
    const V cap = set1(a.cap_scale);
    for (int i = 0; i < kTile / kWidth; ++i) {
      x[i] = mul(tanh_of(mul(loadf(scores + i * kWidth), scale)), cap);
    }
  }
  if (from > 0 || to < kTile) {
    for (int i = 0; i < kTile / kWidth; ++i) storef(scores + i * kWidth, x[i]);
    for (int t = 0; t < from; ++t) scores[t] = -kInfinity;
    for (int t = to; t < kTile; ++t) scores[t] = -kInfinity;
    for (int i = 0; i < kTile / kWidth; ++i) x[i] = loadf(scores + i * kWidth);
  }
  V most = x[0];
  for (int i = 1; i < kTile / kWidth; ++i) most = vmax(most, x[i]);
  const float before = a.max[r];
  const float tile_max = horizontal_max(most);
  const float now = tile_max > before ? tile_max : before;
  const float alpha = now == before ? 1.0f : exp2_of(before - now);
  const V shift = set1(now);
  V sum = mul(loadf(s.sums + r * kPad), set1(alpha));
  for (int i = 0; i < kTile / kWidth; ++i) {
    const V weight = exp2_of(sub(x[i], shift));
    storef(scores + i * kWidth, weight);
    sum = add(sum, weight);
  }
  storef(s.sums + r * kPad, sum);
  s.alpha[r] = alpha;
  a.max[r] = now;
}

inline void finish_sums(const SplitArgs& a, const Scratch& s) {
  for (int r = 0; r < a.rows; ++r) a.sum[r] = horizontal_sum(loadf(s.sums + r * kPad));
}

/// The part of a tile that one row attends to.
inline int clip_begin(const SplitArgs& a, int r, int tile, int begin) {
  const int from = a.row_begin[r] - tile;
  return from > begin ? from : begin;
}
inline int clip_end(const SplitArgs& a, int r, int tile, int end) {
  const int to = a.row_end[r] - tile;
  return to < end ? to : end;
}

template <class E>
inline void widen_row(const E* from, float* to, int head_dim) {
  int d = 0;
  for (; d + kWidth <= head_dim; d += kWidth) storef(to + d, load(from + d));
  if (d < head_dim) storef(to + d, load_half(from + d));
}

template <class E>
void attend(const SplitArgs& a) {
  Scratch s = carve(a);
  reset(a, s);
  const int stride = padded_dim(a.head_dim);
  const int bytes = a.head_dim * static_cast<int>(sizeof(E));
  // With many rows each element is converted once, not once per group of rows.
  const bool widened = sizeof(E) != sizeof(float) && a.rows > 2 * kQkRows;
  int side = 0;
  int tile = a.kv_begin / kTile * kTile;
  {
    const int begin = a.kv_begin;
    const int end = a.kv_end < tile + kTile ? a.kv_end : tile + kTile;
    locate(a, begin, end, s.keys[0] + (begin - tile));
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
      if (widened) {
        const float* wide[4];
        for (int i = 0; i < 4; ++i) {
          float* to = s.wide + i * stride;
          widen_row(reinterpret_cast<const E*>(keys[t + i]), to, a.head_dim);
          wide[i] = to;
        }
        qk_rows(a.query, stride, a.rows, wide, a.head_dim, s.scores + t);
      } else {
        qk_rows(a.query, stride, a.rows, reinterpret_cast<const E* const*>(keys + t), a.head_dim,
                s.scores + t);
      }
    }

    for (int r = 0; r < a.rows; ++r) {
      softmax_row(a, s, r, clip_begin(a, r, tile, begin), clip_end(a, r, tile, end));
    }

    const void* values[kTile];
    if (widened) {
      for (int t = begin; t < end; ++t) {
        float* to = s.wide + t * stride;
        widen_row(reinterpret_cast<const E*>(keys[t] + a.value_offset), to, a.head_dim);
        values[t] = to;
        ahead_values.fetch(t, 0, bytes);
      }
      ahead_values.count = 0;
    } else {
      for (int t = begin; t < end; ++t) values[t] = keys[t] + a.value_offset;
    }
    const auto weigh = [&](int r, int count, int from, int to) {
      float* acc = a.acc + r * stride;
      const float* p = s.scores + r * kTile;
      if (widened) {
        pv_rows(p, s.alpha + r, count, reinterpret_cast<const float* const*>(values), from, to,
                a.head_dim, acc, stride, ahead_values);
      } else {
        pv_rows(p, s.alpha + r, count, reinterpret_cast<const E* const*>(values), from, to,
                a.head_dim, acc, stride, ahead_values);
      }
    };
    // Rows that attend to the same part of the tile go together; the others one run of equal ranges
    // at a time, so that no row ever multiplies a value it does not attend to.
    for (int r = 0; r < a.rows;) {
      const int from = clip_begin(a, r, tile, begin);
      const int to = clip_end(a, r, tile, end);
      int last = r + 1;
      while (last < a.rows && clip_begin(a, last, tile, begin) == from &&
             clip_end(a, last, tile, end) == to) {
        ++last;
      }
      if (from < to) weigh(r, last - r, from, to);
      ahead_values.count = 0;
      r = last;
    }
  }
  finish_sums(a, s);
}

void fold(int rows, int stride, float* acc, float* max, float* sum, const float* part_acc,
          const float* part_max, const float* part_sum) {
  for (int r = 0; r < rows; ++r) {
    if (part_sum[r] == 0.0f) continue;  // this row attends to nothing in that split
    const float now = part_max[r] > max[r] ? part_max[r] : max[r];
    // The first split that counts is taken as it is: 0 * x would turn an infinity into NaN.
    const float mine = sum[r] == 0.0f ? 0.0f : exp2_of(max[r] - now);
    const float theirs = exp2_of(part_max[r] - now);
    const V a = set1(mine);
    const V b = set1(theirs);
    for (int d = 0; d < stride; d += kWidth) {
      const V add_in = mul(loadf(part_acc + r * stride + d), b);
      storef(acc + r * stride + d, fma(loadf(acc + r * stride + d), a, add_in));
    }
    sum[r] = sum[r] * mine + part_sum[r] * theirs;
    max[r] = now;
  }
}

template <class E>
void widen(const void* from, float* to, int count, int padded) {
  const E* source = static_cast<const E*>(from);
  widen_row(source, to, count);
  for (int d = count; d < padded; ++d) to[d] = 0.0f;
}

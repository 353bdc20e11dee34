#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <vector>

#include "dispatch.hpp"
#include "pipelive/attention/thread_pool.hpp"

namespace pipelive {
namespace {

using attention_detail::Kernels;
using attention_detail::kMaxHeadDim;
using attention_detail::kPad;
using attention_detail::kTile;
using attention_detail::Plan;
using attention_detail::RowTile;
using attention_detail::SplitArgs;

// Less work than this is done before a sleeping worker would have begun.
constexpr std::int64_t kInlineBytes = 256 << 10;
constexpr std::int64_t kInlineProducts = 1 << 20;
// Partial results of splits take at most this much.
constexpr std::size_t kMostPartialFloats = std::size_t{64} << 20;

constexpr std::size_t padded(std::size_t n) {
  return (n + kPad - 1) / kPad * kPad;
}

struct FreeAligned {
  void operator()(float* p) const noexcept { ::operator delete[](p, std::align_val_t{64}); }
};
using Floats = std::unique_ptr<float[], FreeAligned>;

Floats allocate(std::size_t count) {
  return Floats(static_cast<float*>(::operator new[](count * sizeof(float), std::align_val_t{64})));
}

/// What one row tile needs; `acc`, `max` and `sum` hold a split's result.
struct Partial {
  float* acc;
  float* max;
  float* sum;
};

struct Sizes {
  std::size_t rows;
  std::size_t dim;
  [[nodiscard]] std::size_t partial() const { return rows * dim + 2 * padded(rows); }
  [[nodiscard]] std::size_t query_bf16() const { return rows * kMaxHeadDim / 2; }
  [[nodiscard]] std::size_t scratch() const {
    return rows * (kTile + kPad) + padded(rows) + kTile * dim;
  }
  [[nodiscard]] std::size_t worker() const {
    return rows * dim + query_bf16() + scratch() + 2 * padded(rows) + 2 * partial();
  }
  [[nodiscard]] Partial partial_at(float* p) const {
    return {p, p + rows * dim, p + rows * dim + padded(rows)};
  }
};

/// Scratch of the calling thread, kept between calls.
float* thread_scratch(std::size_t count) {
  thread_local Floats memory;
  thread_local std::size_t size = 0;
  if (size < count) {
    memory.reset();
    size = 0;
    memory = allocate(count);
    size = count;
  }
  return memory.get();
}

class Run {
 public:
  Run(const AttentionArgs& args, const Kernels& kernels, const Plan& plan)
      : args_(args), kernels_(kernels), plan_(plan) {
    int most = 1;
    for (const RowTile& tile : plan.tiles) most = std::max(most, tile.rows);
    sizes_ = {static_cast<std::size_t>(most), padded(static_cast<std::size_t>(args.kv.head_dim))};
    constexpr double kLog2E = 1.4426950408889634;
    const bool cap = args.soft_cap > 0;
    score_scale_ = static_cast<float>(cap ? args.scale / args.soft_cap : args.scale * kLog2E);
    cap_scale_ = static_cast<float>(cap ? args.soft_cap * kLog2E : 0.0);
  }

  void execute() {
    const auto heads = static_cast<std::size_t>(args_.kv.kv_heads);
    const std::size_t items = plan_.tiles.size() * heads;
    const unsigned limit = args_.threads == 0 ? ThreadPool::hardware_threads() : args_.threads;
    const bool small = plan_.kv_bytes < kInlineBytes && plan_.products < kInlineProducts;
    if (limit == 1 || small) {
      for (std::size_t item = 0; item < items; ++item) whole(item);
      return;
    }
    if (items < std::size_t{4} * limit && split(limit)) return;
    ThreadPool::process().run(limit, items, [this](std::size_t item) { whole(item); });
  }

 private:
  struct Piece {
    std::size_t item;
    std::int64_t split;
  };

  /// An item: one row tile and one KV head, all of its splits one after the other.
  void whole(std::size_t item) const {
    const RowTile& tile = tile_of(item);
    float* const memory = thread_scratch(sizes_.worker());
    const Partial total = sizes_.partial_at(memory);
    const Partial part = sizes_.partial_at(memory + sizes_.partial());
    for (std::int64_t i = 0; i < tile.splits(); ++i) {
      attend(item, i, i == 0 ? total : part, memory, i == 0);
      if (i > 0) fold(tile, total, part);
    }
    finish(item, total);
  }

  /// Every split is an item of its own; whoever finishes the last one of a tile and head folds
  /// them, in order. False where no tile has two splits, or there is no room for their results.
  bool split(unsigned threads) {
    const auto heads = static_cast<std::size_t>(args_.kv.kv_heads);
    std::vector<Piece> pieces;
    std::vector<std::size_t> first_piece;
    std::vector<std::atomic<std::int64_t>> left(plan_.tiles.size() * heads);
    bool worth_it = false;
    for (std::size_t item = 0; item < left.size(); ++item) {
      const std::int64_t splits = tile_of(item).splits();
      worth_it |= splits > 1;
      first_piece.push_back(pieces.size());
      left[item].store(splits, std::memory_order_relaxed);
      for (std::int64_t i = 0; i < splits; ++i) pieces.push_back({item, i});
    }
    const std::size_t floats = pieces.size() * sizes_.partial();
    if (!worth_it || floats > kMostPartialFloats) return false;
    const Floats results = allocate(floats);
    const auto result_of = [&](std::size_t piece) {
      return sizes_.partial_at(results.get() + piece * sizes_.partial());
    };
    ThreadPool::process().run(threads, pieces.size(), [&](std::size_t index) {
      const auto [item, i] = pieces[index];
      attend(item, i, result_of(index), thread_scratch(sizes_.worker()), true);
      if (left[item].fetch_sub(1, std::memory_order_acq_rel) != 1) return;
      const RowTile& tile = tile_of(item);
      const Partial total = result_of(first_piece[item]);
      for (std::int64_t k = 1; k < tile.splits(); ++k) {
        fold(tile, total, result_of(first_piece[item] + static_cast<std::size_t>(k)));
      }
      finish(item, total);
    });
    return true;
  }

  [[nodiscard]] const RowTile& tile_of(std::size_t item) const {
    return plan_.tiles[item / static_cast<std::size_t>(args_.kv.kv_heads)];
  }
  [[nodiscard]] std::int64_t kv_head_of(std::size_t item) const {
    return static_cast<std::int64_t>(item % static_cast<std::size_t>(args_.kv.kv_heads));
  }

  /// Calls f(row of the tile, query token, query head).
  template <class F>
  void for_rows(std::size_t item, F&& f) const {
    const RowTile& tile = tile_of(item);
    for (int r = 0; r < tile.rows; ++r) {
      const std::int64_t row = tile.first_row + r;
      f(static_cast<std::size_t>(r), tile.first_token + row / plan_.group,
        kv_head_of(item) * plan_.group + row % plan_.group);
    }
  }

  void attend(std::size_t item, std::int64_t index, const Partial& result, float* memory,
              bool load_query) const {
    const RowTile& tile = tile_of(item);
    const KVView& kv = args_.kv;
    const auto bytes = static_cast<std::int64_t>(size_of(kv.dtype));
    float* at = memory + 2 * sizes_.partial();
    float* const query = at;
    at += sizes_.rows * sizes_.dim;
    auto* const query_bf16 = reinterpret_cast<std::uint16_t*>(at);
    at += sizes_.query_bf16();
    float* const scratch = at;
    at += sizes_.scratch();
    auto* const row_begin = reinterpret_cast<std::int32_t*>(at);
    auto* const row_end = reinterpret_cast<std::int32_t*>(at + padded(sizes_.rows));
    const bool pairs = kernels_.wants_bf16_query && kv.dtype == DType::bfloat16 &&
                       args_.query.dtype == DType::bfloat16;
    if (load_query) load_rows(item, query, pairs ? query_bf16 : nullptr, row_begin, row_end);

    const std::int64_t split = tile.first_split() + index;
    SplitArgs split_args{};
    split_args.base =
        reinterpret_cast<const unsigned char*>(kv.base) + kv_head_of(item) * kv.head_stride * bytes;
    split_args.block_bytes = kv.block_stride * bytes;
    split_args.token_bytes = kv.token_stride * bytes;
    split_args.value_offset = kv.kv_stride * bytes;
    split_args.blocks = args_.block_tables + tile.seq * args_.table_stride;
    split_args.block_map = args_.block_map.empty() ? nullptr : args_.block_map.data();
    split_args.block_size = static_cast<int>(kv.block_size);
    split_args.head_dim = static_cast<int>(kv.head_dim);
    split_args.rows = tile.rows;
    split_args.row_begin = row_begin;
    split_args.row_end = row_end;
    split_args.kv_begin = static_cast<int>(std::max(tile.kv_begin, split * tile.split_len));
    split_args.kv_end = static_cast<int>(std::min(tile.kv_end, (split + 1) * tile.split_len));
    split_args.prefetch_end = static_cast<int>(tile.kv_end);
    split_args.score_scale = score_scale_;
    split_args.cap_scale = cap_scale_;
    split_args.query = query;
    split_args.query_bf16 = pairs ? query_bf16 : nullptr;
    split_args.acc = result.acc;
    split_args.max = result.max;
    split_args.sum = result.sum;
    split_args.scratch = scratch;
    kernels_.attend[static_cast<int>(kv.dtype)](split_args);
  }

  void load_rows(std::size_t item, float* query, std::uint16_t* query_bf16, std::int32_t* row_begin,
                 std::int32_t* row_end) const {
    const RowTile& tile = tile_of(item);
    const int dim = static_cast<int>(args_.kv.head_dim);
    const auto widen = kernels_.widen[static_cast<int>(args_.query.dtype)];
    for_rows(item, [&](std::size_t r, std::int64_t token, std::int64_t head) {
      const std::byte* const from = args_.query.at(token, head);
      if (query_bf16 != nullptr) {
        std::uint16_t* const to = query_bf16 + r * kMaxHeadDim;
        std::memcpy(to, from, static_cast<std::size_t>(dim) * 2);
        std::fill(to + dim, to + kMaxHeadDim, std::uint16_t{0});
      } else {
        widen(from, query + r * sizes_.dim, dim, static_cast<int>(sizes_.dim));
      }
      const std::int64_t position = tile.position + token - tile.first_token;
      row_end[r] = static_cast<std::int32_t>(position + 1);
      row_begin[r] =
          args_.window == 0
              ? 0
              : static_cast<std::int32_t>(std::max<std::int64_t>(0, position - args_.window + 1));
    });
  }

  void fold(const RowTile& tile, const Partial& total, const Partial& part) const {
    kernels_.fold(tile.rows, static_cast<int>(sizes_.dim), total.acc, total.max, total.sum,
                  part.acc, part.max, part.sum);
  }

  void finish(std::size_t item, const Partial& total) const {
    const auto narrow = kernels_.narrow[static_cast<int>(args_.query.dtype)];
    for_rows(item, [&](std::size_t r, std::int64_t token, std::int64_t head) {
      narrow(total.acc + r * sizes_.dim, 1.0f / total.sum[r], args_.out.at(token, head),
             static_cast<int>(args_.kv.head_dim));
      if (args_.lse != nullptr) {
        constexpr double kLn2 = 0.6931471805599453;
        const double lse = kLn2 * total.max[r] + std::log(static_cast<double>(total.sum[r]));
        args_.lse[token * args_.query.heads + head] = static_cast<float>(lse);
      }
    });
  }

  const AttentionArgs& args_;
  const Kernels& kernels_;
  const Plan& plan_;
  Sizes sizes_{};
  float score_scale_ = 0;
  float cap_scale_ = 0;
};

}  // namespace

void paged_attention(const AttentionArgs& args) {
  const Kernels& kernels = attention_detail::kernels_of(args.isa);
  const Plan plan = attention_detail::make_plan(args);
  if (args.kv.require_resident && !plan.blocks.empty()) args.kv.require_resident(plan.blocks);
  const auto row_bytes = static_cast<std::size_t>(args.out.head_dim) * size_of(args.out.dtype);
  for (const std::int64_t token : plan.zero_tokens) {
    for (std::int64_t head = 0; head < args.out.heads; ++head) {
      std::memset(args.out.at(token, head), 0, row_bytes);
      if (args.lse != nullptr) {
        args.lse[token * args.out.heads + head] = -std::numeric_limits<float>::infinity();
      }
    }
  }
  if (!plan.tiles.empty()) Run(args, kernels, plan).execute();
}

}  // namespace pipelive

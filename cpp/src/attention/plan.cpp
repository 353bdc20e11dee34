#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

#include "dispatch.hpp"

namespace pipelive::attention_detail {
namespace {

// A split is long enough that its start-up does not show and short enough that one long sequence
// keeps many threads busy; beyond kMostSplits of them they grow instead.
constexpr std::int64_t kSplitLen = 512;
constexpr std::int64_t kMostSplits = 32;
// Rows that share one reading of K and V where a sequence has many.
constexpr std::int64_t kTileRows = 64;

void require(bool ok, const char* name, const std::string& value, const std::string& expected) {
  if (!ok) refuse(name, value, expected);
}

/// Checks the sequence's block ids in [begin, end) of its table's row and notes the physical ones.
void note_blocks(const AttentionArgs& args, std::int64_t seq, std::int64_t begin, std::int64_t end,
                 std::vector<std::int32_t>& blocks) {
  const std::int32_t* const row = args.block_tables + seq * args.table_stride;
  const bool mapped = !args.block_map.empty();
  const auto ids = mapped ? static_cast<std::int64_t>(args.block_map.size()) : args.kv.num_blocks;
  for (std::int64_t i = begin; i < end; ++i) {
    std::int32_t id = row[i];
    if (id < 0 || id >= ids) {
      refuse("block_tables[" + std::to_string(seq) + ", " + std::to_string(i) + "]",
             std::to_string(id), "0 to " + std::to_string(ids - 1));
    }
    if (mapped) {
      const std::int32_t physical = args.block_map[static_cast<std::size_t>(id)];
      if (physical < 0 || physical >= args.kv.num_blocks) {
        refuse("block_map[" + std::to_string(id) + "]", std::to_string(physical),
               "0 to " + std::to_string(args.kv.num_blocks - 1));
      }
      id = physical;
    }
    blocks.push_back(id);
  }
}

}  // namespace

std::int64_t split_len_at(std::int64_t position) noexcept {
  std::int64_t length = kSplitLen;
  while (position >= length * kMostSplits) length *= 2;
  return length;
}

Plan make_plan(const AttentionArgs& args) {
  validate_layout(args);
  Plan plan;
  plan.group = args.query.heads / args.kv.kv_heads;
  const std::int64_t block_size = args.kv.block_size;
  const std::int64_t tokens = args.query.tokens;
  const std::int64_t window =
      args.window == 0 ? std::numeric_limits<std::int32_t>::max() : args.window;
  std::int64_t next_token = 0;
  if (args.query_start != nullptr && args.query_start[0] != 0) {
    refuse("query_start[0]", std::to_string(args.query_start[0]), "0");
  }
  for (std::int64_t seq = 0; seq < args.num_seqs; ++seq) {
    const std::string index = "[" + std::to_string(seq) + "]";
    const std::int64_t len = args.seq_lens[seq];
    const std::int64_t first_token = next_token;
    next_token = args.query_start == nullptr ? next_token + 1 : args.query_start[seq + 1];
    if (next_token < first_token || next_token > tokens) {
      if (args.query_start == nullptr) {
        refuse("seq_lens: number of sequences", std::to_string(args.num_seqs),
               "at most query's " + std::to_string(tokens) + " tokens, without query_start");
      }
      refuse("query_start[" + std::to_string(seq + 1) + "]", std::to_string(next_token),
             std::to_string(first_token) + " to " + std::to_string(tokens));
    }
    const std::int64_t count = next_token - first_token;
    if (len < 0 || len > args.table_width * block_size) {
      refuse("seq_lens" + index, std::to_string(len),
             "0 to " + std::to_string(args.table_width * block_size) +
                 ", what a row of block_tables holds");
    }
    if (len == 0) {
      for (std::int64_t t = first_token; t < next_token; ++t) plan.zero_tokens.push_back(t);
      continue;
    }
    if (count == 0) continue;
    if (count > len) {
      refuse("seq_lens" + index, std::to_string(len),
             "0 or at least the sequence's " + std::to_string(count) + " query tokens");
    }
    const std::int64_t position = len - count;
    const std::int64_t begin = std::max<std::int64_t>(0, position - window + 1);
    note_blocks(args, seq, begin / block_size, (len + block_size - 1) / block_size, plan.blocks);

    const std::int64_t rows = count * plan.group;
    for (std::int64_t row = 0; row < rows;) {
      const std::int64_t at = position + row / plan.group;
      RowTile tile;
      tile.seq = seq;
      tile.first_row = row;
      tile.first_token = first_token;
      tile.position = position;
      tile.split_len = split_len_at(at);
      std::int64_t most = count == 1 ? kMaxRows : kTileRows;
      // Whole groups where they fit, so that all heads of a token share its tile.
      if (plan.group <= most) most = most / plan.group * plan.group;
      std::int64_t end = std::min(rows, row + most);
      // All rows of a tile have one split length; it changes at token boundaries.
      const std::int64_t longest = tile.split_len * kMostSplits;
      end = std::min(end, (longest - position) * plan.group);
      tile.rows = static_cast<int>(end - row);
      tile.kv_begin = std::max<std::int64_t>(0, at - window + 1);
      tile.kv_end = position + (end - 1) / plan.group + 1;
      plan.kv_bytes += tile.kv_end - tile.kv_begin;
      plan.products += tile.rows * (tile.kv_end - tile.kv_begin);
      plan.tiles.push_back(tile);
      row = end;
    }
  }
  for (std::int64_t t = next_token; t < tokens; ++t) plan.zero_tokens.push_back(t);
  plan.kv_bytes *=
      2 * args.kv.kv_heads * args.kv.head_dim * static_cast<std::int64_t>(size_of(args.kv.dtype));
  plan.products *= args.kv.kv_heads * args.kv.head_dim;
  std::ranges::stable_sort(plan.tiles, std::ranges::greater{}, [](const RowTile& tile) {
    return tile.rows * (tile.kv_end - tile.kv_begin);
  });
  return plan;
}

}  // namespace pipelive::attention_detail

namespace pipelive {

using attention_detail::range_of;
using attention_detail::refuse;
using attention_detail::require;
using attention_detail::validate_tokens;

void validate_layout(const AttentionArgs& args) {
  args.kv.validate(false);
  validate_tokens(args.query, "query", args.kv);
  const TokenView& q = args.query;
  const TokenView& out = args.out;
  if (q.heads % args.kv.kv_heads != 0) {
    refuse("query: number of heads", std::to_string(q.heads),
           "a multiple of kv's " + std::to_string(args.kv.kv_heads));
  }
  validate_tokens(out, "out", args.kv);
  if (out.tokens != q.tokens || out.heads != q.heads) {
    refuse("out: shape",
           "[" + std::to_string(out.tokens) + ", " + std::to_string(out.heads) + ", " +
               std::to_string(out.head_dim) + "]",
           "that of query, [" + std::to_string(q.tokens) + ", " + std::to_string(q.heads) + ", " +
               std::to_string(q.head_dim) + "]");
  }
  if (out.dtype != q.dtype) {
    refuse("out: dtype", std::string(to_string(out.dtype)),
           std::string(to_string(q.dtype)) + " as in query");
  }
  const bool heads_inside = out.head_stride <= out.token_stride;
  const std::int64_t inner = heads_inside ? out.head_stride : out.token_stride;
  const std::int64_t inner_length = heads_inside ? out.heads : out.tokens;
  const std::int64_t outer = heads_inside ? out.token_stride : out.head_stride;
  const std::int64_t outer_length = heads_inside ? out.tokens : out.heads;
  const std::int64_t inner_extent =
      inner_length > 1 ? inner * (inner_length - 1) + out.head_dim : out.head_dim;
  if ((inner_length > 1 && inner < out.head_dim) || (outer_length > 1 && outer < inner_extent)) {
    refuse("out: strides",
           "[" + std::to_string(out.token_stride) + ", " + std::to_string(out.head_stride) + "]",
           "strides with which no two elements share an address");
  }
  const bool same =
      out.data == q.data && out.token_stride == q.token_stride && out.head_stride == q.head_stride;
  if (!same && range_of(out).overlaps(range_of(q))) {
    refuse("out", "memory that overlaps query", "memory of its own or exactly query's");
  }
  if (range_of(out).overlaps(range_of(args.kv))) {
    refuse("out", "memory that overlaps kv", "memory of its own");
  }
  require(std::isfinite(args.scale) && std::isfinite(static_cast<float>(args.scale)), "scale",
          std::to_string(args.scale), "a finite number");
  require(std::isfinite(args.soft_cap) && args.soft_cap >= 0 && args.soft_cap <= 1e6, "soft_cap",
          std::to_string(args.soft_cap), "0 (none) to 1e6");
  require(args.soft_cap == 0 || args.soft_cap >= 1e-6, "soft_cap", std::to_string(args.soft_cap),
          "0 (none) or at least 1e-6");
  require(args.window >= 0, "window", std::to_string(args.window), "0 (none) or more");
  require(args.threads <= 1024, "threads", std::to_string(args.threads), "0 (all) to 1024");
  require(args.num_seqs >= 0 && args.num_seqs <= std::numeric_limits<std::int32_t>::max(),
          "seq_lens: number of sequences", std::to_string(args.num_seqs), "0 to 2^31 - 1");
  require(args.table_width >= 0, "block_tables: width", std::to_string(args.table_width),
          "0 or more");
  const bool tables = args.block_tables != nullptr || args.table_width == 0;
  if (args.num_seqs > 0) {
    require(tables, "block_tables", "a null pointer", "memory");
    require(args.seq_lens != nullptr, "seq_lens", "a null pointer", "memory");
  }
}

void validate(const AttentionArgs& args) {
  const attention_detail::Plan plan = attention_detail::make_plan(args);
  if (args.kv.require_resident && !plan.blocks.empty()) args.kv.require_resident(plan.blocks);
}

}  // namespace pipelive

#include "pipelive/cuda/attention.hpp"

#include <algorithm>
#include <array>
#include <limits>

#include "pipelive/base/error.hpp"
#include "pipelive/cuda/scope.hpp"

namespace pipelive::cuda {
namespace {

using attention::Params;
using attention::Shared;

// Thread blocks that a device should have to choose from, per multiprocessor.
constexpr std::int64_t kBlocksPerMultiprocessor = 16;
// What a multiprocessor keeps of its shared memory for each block.
constexpr int kReservedBytes = 1 << 10;
// Splits of a large batch are not worth more memory than this; its blocks are many anyway.
constexpr std::int64_t kMostWorkspace = std::int64_t{256} << 20;

constexpr std::array<int, 6> kTensorDims{64, 80, 96, 128, 192, 256};
constexpr std::array<int, 3> kScalarDims{64, 128, 256};

[[noreturn]] void refuse(const std::string& name, const std::string& value,
                         const std::string& expected) {
  throw Error(ErrorCode::invalid_argument, name + " is " + value + ", expected " + expected);
}

const char* short_name(DType dtype) {
  switch (dtype) {
    case DType::float32:
      return "f32";
    case DType::float16:
      return "f16";
    case DType::bfloat16:
      return "bf16";
  }
  return "";
}

void require_aligned(const KVView& kv) {
  constexpr std::int64_t kBytes = 16;
  const auto item = static_cast<std::int64_t>(size_of(kv.dtype));
  if (reinterpret_cast<std::uintptr_t>(kv.base) % kBytes != 0) {
    refuse("kv", "memory that is not aligned to 16 bytes", "an address that is a multiple of 16");
  }
  const auto stride = [&](const char* name, std::int64_t value, std::int64_t length) {
    if (length > 1 && value * item % kBytes != 0) {
      refuse(std::string("kv: ") + name + " stride", std::to_string(value),
             "a multiple of " + std::to_string(kBytes / item) + " elements (16 bytes) on a GPU");
    }
  };
  stride("block", kv.block_stride, kv.num_blocks);
  stride("head", kv.head_stride, kv.kv_heads);
  stride("kv", kv.kv_stride, 2);
  stride("token", kv.token_stride, kv.block_size);
}

bool aligned(const TokenView& view, std::int64_t bytes) {
  const auto item = static_cast<std::int64_t>(size_of(view.dtype));
  return reinterpret_cast<std::uintptr_t>(view.data) % static_cast<std::uintptr_t>(bytes) == 0 &&
         view.token_stride * item % bytes == 0 && view.head_stride * item % bytes == 0;
}

template <std::size_t kCount>
int instance_for(std::int64_t head_dim, const std::array<int, kCount>& dims) {
  return *std::ranges::lower_bound(dims, static_cast<int>(head_dim));
}

/// The depth of the copy pipeline: two blocks to a multiprocessor if that leaves them two stages
/// each, else one. Even a single stage works; 0: not even that fits.
int stages_for(bool tensor, int dim, int rows, int item, const DeviceLimits& limits) {
  for (const int blocks : {2, 1}) {
    const int most = std::min(limits.shared_bytes_per_block,
                              limits.shared_bytes_per_multiprocessor / blocks - kReservedBytes);
    for (int stages = attention::kMaxStages; stages >= (blocks == 2 ? 2 : 1); --stages) {
      if (attention::shared_of(tensor, dim, rows, item, stages).bytes <= most) return stages;
    }
  }
  return 0;
}

}  // namespace

AttentionLaunch plan_attention(const AttentionArgs& args, const DeviceLimits& limits) {
  validate_layout(args);
  const KVView& kv = args.kv;
  const TokenView& query = args.query;
  require_aligned(kv);
  const auto item = static_cast<std::int64_t>(size_of(kv.dtype));
  const std::int64_t rows = query.tokens * query.heads;
  if (rows > std::numeric_limits<std::int32_t>::max()) {
    refuse("query: tokens times heads", std::to_string(rows), "less than 2^31 on a GPU");
  }
  if (args.query_start == nullptr && args.num_seqs > query.tokens) {
    refuse("seq_lens: number of sequences", std::to_string(args.num_seqs),
           "at most query's " + std::to_string(query.tokens) + " tokens, without query_start");
  }
  if (args.table_width > std::numeric_limits<std::int32_t>::max()) {
    refuse("block_tables: width", std::to_string(args.table_width), "less than 2^31");
  }

  AttentionLaunch launch;
  Params& p = launch.params;
  p = Params{};
  p.query = query.data;
  p.kv = reinterpret_cast<const char*>(kv.base);
  p.out = args.out.data;
  p.lse = args.lse;
  p.tables = args.block_tables;
  p.seq_lens = args.seq_lens;
  p.query_start = args.query_start;
  p.block_map = args.block_map.empty() ? nullptr : args.block_map.data();
  p.query_token_stride = query.token_stride;
  p.query_head_stride = query.head_stride;
  p.out_token_stride = args.out.token_stride;
  p.out_head_stride = args.out.head_stride;
  p.block_stride = kv.block_stride * item;
  p.head_stride = kv.head_stride * item;
  p.kv_stride = kv.kv_stride * item;
  p.token_stride = kv.token_stride * item;
  p.table_stride = args.table_stride;
  p.num_seqs = static_cast<int>(args.num_seqs);
  p.tokens = static_cast<int>(query.tokens);
  p.q_heads = static_cast<int>(query.heads);
  p.group = static_cast<int>(query.heads / kv.kv_heads);
  p.head_dim = static_cast<int>(kv.head_dim);
  p.block_size = static_cast<int>(kv.block_size);
  p.num_blocks = static_cast<int>(kv.num_blocks);
  p.table_width = static_cast<int>(args.table_width);
  p.map_length = static_cast<int>(
      std::min<std::size_t>(args.block_map.size(), std::numeric_limits<std::int32_t>::max()));
  // A window longer than any sequence is none.
  p.window =
      args.window > std::numeric_limits<std::int32_t>::max() ? 0 : static_cast<int>(args.window);
  constexpr double kLog2E = 1.4426950408889634;
  const bool cap = args.soft_cap > 0;
  p.score_scale = static_cast<float>(cap ? args.scale / args.soft_cap : args.scale * kLog2E);
  p.cap_scale = static_cast<float>(cap ? args.soft_cap * kLog2E : 0.0);
  p.query_aligned = aligned(query, 4) ? 1 : 0;
  p.out_aligned = aligned(args.out, args.out.dtype == DType::float32 ? 16 : 4) ? 1 : 0;

  // Tensor cores take 16-bit queries; a float32 query keeps its precision.
  const bool tensor = query.dtype != DType::float32;
  const int dim =
      tensor ? instance_for(kv.head_dim, kTensorDims) : instance_for(kv.head_dim, kScalarDims);
  p.tile_rows = 8;
  const std::int64_t per_seq = args.query_start == nullptr || args.num_seqs == 0
                                   ? p.group
                                   : (query.tokens * p.group + args.num_seqs - 1) / args.num_seqs;
  if (tensor && per_seq > 8) p.tile_rows = dim <= 128 ? 32 : 16;
  p.stages = stages_for(tensor, dim, p.tile_rows, static_cast<int>(item), limits);
  if (p.stages == 0) {
    p.tile_rows = 8;
    p.stages = stages_for(tensor, dim, p.tile_rows, static_cast<int>(item), limits);
  }
  if (p.stages == 0) {
    refuse("kv: head_dim", std::to_string(kv.head_dim),
           "one for which the device's " + std::to_string(limits.shared_bytes_per_block) +
               " bytes of shared memory suffice");
  }
  launch.shared_bytes = static_cast<unsigned>(
      attention::shared_of(tensor, dim, p.tile_rows, static_cast<int>(item), p.stages).bytes);

  // Without sequences nothing may be read, since not even lengths are there: `finish` alone runs,
  // and writes the zeros.
  const std::int64_t slots = p.num_seqs == 0
                                 ? 0
                                 : attention::slots_for(p.num_seqs, p.tokens, p.group, p.tile_rows,
                                                        args.query_start == nullptr);
  const std::int64_t splits =
      std::max(1, attention::most_splits(static_cast<std::int64_t>(p.table_width) * p.block_size));
  const std::int64_t in_window =
      p.window == 0 ? splits : std::min<std::int64_t>(splits, p.window / attention::kSplitLen + 2);
  const std::int64_t blocks = std::max<std::int64_t>(1, slots * kv.kv_heads);
  const std::int64_t wanted = kBlocksPerMultiprocessor * limits.multiprocessors;
  std::int64_t runs = std::clamp<std::int64_t>((wanted + blocks - 1) / blocks, 1, in_window);
  const std::int64_t workspace =
      splits * rows * (kv.head_dim + 2) * static_cast<std::int64_t>(sizeof(float));
  if (workspace > kMostWorkspace || slots == 0) runs = 1;
  if (slots * runs * kv.kv_heads > std::numeric_limits<std::int32_t>::max()) {
    refuse("query: number of tokens", std::to_string(query.tokens), "fewer in one call");
  }
  p.slots = static_cast<int>(slots);
  p.runs = static_cast<int>(runs);
  if (runs > 1) launch.workspace_bytes = static_cast<std::size_t>(workspace);

  const std::string dims = std::to_string(dim);
  const std::string q = short_name(query.dtype);
  launch.file = {"attention_" + q, {"PIPELIVE_HEAD_DIM=" + dims}};
  launch.kernel = "pipelive_attention_" + q +
                  (tensor ? "" : std::string("_") + short_name(kv.dtype)) + "_d" + dims + "_r" +
                  std::to_string(p.tile_rows);
  launch.finish_file = {"attention_finish", {}};
  launch.finish_kernel = "pipelive_attention_finish_" + q;
  if (query.tokens > 0) {
    launch.finish_grid = static_cast<unsigned>(
        (attention::finish_rows(p.tokens, p.q_heads, p.runs) + attention::kWarps - 1) /
        attention::kWarps);
    launch.grid = static_cast<unsigned>(slots * runs * kv.kv_heads);
  }
  return launch;
}

void paged_attention(Kernels& kernels, const AttentionArgs& args, std::byte* workspace,
                     std::size_t workspace_bytes, StreamHandle stream) {
  AttentionLaunch launch = plan_attention(args, kernels.limits());
  if (workspace_bytes < launch.workspace_bytes ||
      (launch.workspace_bytes > 0 && workspace == nullptr)) {
    refuse("workspace", std::to_string(workspace == nullptr ? 0 : workspace_bytes) + " bytes",
           std::to_string(launch.workspace_bytes) + " or more");
  }
  if (reinterpret_cast<std::uintptr_t>(workspace) % 16 != 0) {
    refuse("workspace", "memory that is not aligned to 16 bytes",
           "an address that is a multiple of 16");
  }
  if (launch.finish_grid == 0) return;
  Params& p = launch.params;
  if (p.runs > 1) {
    // Head dims are multiples of 8, so that the statistics behind them are aligned too.
    const std::size_t rows =
        static_cast<std::size_t>(p.tokens) * static_cast<std::size_t>(p.q_heads);
    const std::size_t splits =
        launch.workspace_bytes / sizeof(float) / rows / (static_cast<std::size_t>(p.head_dim) + 2);
    p.partial = reinterpret_cast<float*>(workspace);
    p.partial_stats = p.partial + splits * rows * static_cast<std::size_t>(p.head_dim);
  }
  const Driver& driver = kernels.driver();
  const CallScope scope(*kernels.context());
  // Both are found before the first is launched: one alone would leave half a result.
  const FunctionHandle finish = kernels.function(launch.finish_file, launch.finish_kernel, 0);
  std::array<void*, 1> parameters{&p};
  if (launch.grid > 0) {
    const FunctionHandle attend = kernels.function(launch.file, launch.kernel, launch.shared_bytes);
    driver.check(
        driver.api().launch_kernel(attend, launch.grid, 1, 1, attention::kThreads, 1, 1,
                                   launch.shared_bytes, stream, parameters.data(), nullptr),
        "cuLaunchKernel(" + launch.kernel + ")");
  }
  driver.check(driver.api().launch_kernel(finish, launch.finish_grid, 1, 1, attention::kThreads, 1,
                                          1, 0, stream, parameters.data(), nullptr),
               "cuLaunchKernel(" + launch.finish_kernel + ")");
}

void check_tables(Kernels& kernels, const AttentionArgs& args, std::int64_t resident,
                  std::uint64_t* report, StreamHandle stream) {
  AttentionLaunch launch = plan_attention(args, kernels.limits());
  if (resident < 0 || resident > args.kv.num_blocks) {
    refuse("resident", std::to_string(resident), "0 to " + std::to_string(args.kv.num_blocks));
  }
  if (report == nullptr) refuse("report", "a null pointer", "two 64-bit numbers of the device");
  if (args.num_seqs == 0) return;
  static_assert(sizeof(*report) == sizeof(unsigned long long));
  attention::CheckParams check{launch.params, reinterpret_cast<unsigned long long*>(report),
                               static_cast<int>(resident)};
  std::array<void*, 1> parameters{&check};
  const Driver& driver = kernels.driver();
  const CallScope scope(*kernels.context());
  const FunctionHandle kernel = kernels.function(launch.finish_file, "pipelive_attention_check", 0);
  driver.check(
      driver.api().launch_kernel(kernel, static_cast<unsigned>(args.num_seqs), 1, 1,
                                 attention::kThreads, 1, 1, 0, stream, parameters.data(), nullptr),
      "cuLaunchKernel(pipelive_attention_check)");
}

}  // namespace pipelive::cuda

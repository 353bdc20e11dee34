#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "pipelive/attention/attention.hpp"
#include "pipelive/cuda/attention_plan.hpp"
#include "pipelive/cuda/kernels.hpp"

namespace pipelive::cuda {

/// One call of paged attention, laid out for a device. It depends on shapes, strides and alignment
/// alone, never on lengths or block ids, so that a captured graph stays right when those change.
struct AttentionLaunch {
  attention::Params params;  ///< all but the workspace
  KernelFile file;
  std::string kernel;
  unsigned grid = 0;  ///< 0: the kernel is left out
  unsigned shared_bytes = 0;
  KernelFile finish_file;
  std::string finish_kernel;
  unsigned finish_grid = 0;  ///< 0: nothing to do at all
  std::size_t workspace_bytes = 0;
};

/// Lays a call out. `args` is what pipelive::paged_attention takes, with addresses of the device
/// everywhere; `args.threads`, `args.isa` and `args.kv.require_resident` are not looked at.
///
/// Throws Error(invalid_argument) as validate_layout does, and where a row of KV does not begin at
/// a multiple of 16 bytes, where tokens times heads are 2^31 or more, or where the device has too
/// little shared memory.
[[nodiscard]] AttentionLaunch plan_attention(const AttentionArgs& args, const DeviceLimits& limits);

/// Paged attention on a GPU, in the order of `stream` (null: the legacy default stream): two kernel
/// launches, no allocation, no synchronisation; may be captured into a graph once it has been
/// called before with the same dtypes and head dim. Semantics are those of
/// pipelive::paged_attention: a token's bits depend on its query, its KV and its position alone.
/// Two things differ:
///  - 16-bit queries go through tensor cores, so that a NaN or an infinity among the values of a
///    later token can reach earlier rows of the same chunk;
///  - `args` is checked by shape only. Tables, lengths and `query_start` are on the device, and it
///  is
///    the caller's duty that they are right and that the blocks to be read are mapped. Where
///    lengths contradict each other, or an id lies outside of [0, num_blocks), rows become NaN and
///    nothing outside of the tables and `kv` is read; check_tables says where.
///
/// `workspace` is plan_attention(...).workspace_bytes bytes of the device, aligned to 16, which no
/// other work may use until this call's has run; null where that is 0.
void paged_attention(Kernels& kernels, const AttentionArgs& args, std::byte* workspace,
                     std::size_t workspace_bytes, StreamHandle stream);

/// For debugging: looks at every table entry that paged_attention would follow. On the stream, adds
/// to report[0] how many lead to no block in [0, resident), and lowers report[1] to the smallest
/// `seq << 32 | index` among them; index 2^32 - 1 says that the sequence's lengths are wrong.
/// `report` is two 64-bit numbers of the device, set to 0 and all ones beforehand.
void check_tables(Kernels& kernels, const AttentionArgs& args, std::int64_t resident,
                  std::uint64_t* report, StreamHandle stream);

}  // namespace pipelive::cuda

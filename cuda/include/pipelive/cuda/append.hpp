#pragma once

#include <cstdint>
#include <memory>

#include "pipelive/attention/kv_view.hpp"
#include "pipelive/cuda/device_marks.hpp"
#include "pipelive/cuda/slot_kernels.hpp"
#include "pipelive/kv/layer_view.hpp"

namespace pipelive::cuda {

/// Writes the keys and values of tokens to their slots, as append of the attention layer does, for
/// memory on a GPU: token i goes to slot `slots[i]` (device memory, int64), -1 skips it. The launch
/// is given to `stream` and not waited for; it may be captured into a CUDA graph.
///
/// With `marks` the slots are marked in the same launch, for the step that DirtyTracker::mark was
/// last called for in that stream. The marks of a step stand for all its layers: give them with the
/// first layer's append only.
///
/// Differences from the host: a slot that is out of range is found on the device, where nothing can
/// be thrown; it is skipped, and counted by DeviceMarks::skipped_slots. Which blocks are mapped is
/// not looked at, so that a captured launch goes on working when the pool has grown. Of two tokens
/// with one slot either may stay, or a mixture.
///
/// Throws Error(invalid_argument) where shapes do not agree, or `key` or `value` overlaps `kv`, and
/// Error(device). `kernels` must stay loaded until the launch has run, in a graph too.
void append(const SlotKernels& kernels, const KVView& kv, const TokenView& key,
            const TokenView& value, DevicePointer slots, std::int64_t num_slots,
            StreamHandle stream, const DeviceMarks* marks = nullptr);

/// The same for a layer of a pool, whose memory is not taken away before `stream` has passed the
/// launch. `stream_owner` is kept for as long as the pool may ask about the stream.
void append(const SlotKernels& kernels, const LayerView& layer, const TokenView& key,
            const TokenView& value, DevicePointer slots, std::int64_t num_slots,
            StreamHandle stream, const DeviceMarks* marks = nullptr,
            const std::shared_ptr<void>& stream_owner = nullptr);

}  // namespace pipelive::cuda

#pragma once

#include <pybind11/pybind11.h>

#include <memory>

#include "pipelive/cuda/device.hpp"
#include "pipelive/cuda/device_marks.hpp"
#include "pipelive/kv/layer_view.hpp"
#include "pipelive/transport/slot_copier.hpp"

namespace pipelive::bindings {

/// The context that memory of GPU `ordinal` lives in. `device`, where it is a CUDA device, says
/// with which driver; else it is the system's.
[[nodiscard]] std::shared_ptr<const cuda::PrimaryContext> cuda_context(const Device* device,
                                                                       int ordinal);
/// The same for a layer's memory, which lies on a GPU.
[[nodiscard]] std::shared_ptr<const cuda::PrimaryContext> cuda_context(const LayerView& layer);

/// What packs the slots of a layer, for the device that it lies on; empty for the host.
[[nodiscard]] std::shared_ptr<SlotCopier> copier_for(const LayerView& layer);

/// Appends where `kv` (a LayerView, or a tensor of five axes) lies on a GPU; false, and nothing is
/// done, where it does not. `stream` is None for CUDA's default stream, `marks` a DeviceMarks or
/// None. `ordered`: key, value and slots are what `stream` finds done, as its library orders it;
/// else they are asked to be.
bool append_on_gpu(pybind11::handle kv, pybind11::handle key, pybind11::handle value,
                   pybind11::handle slots, pybind11::handle stream, pybind11::handle marks,
                   bool ordered);

}  // namespace pipelive::bindings

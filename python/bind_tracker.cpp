#include <pybind11/stl.h>

#include <memory>
#include <optional>

#include "bindings.hpp"
#include "cuda_layers.hpp"
#include "int64_array.hpp"
#include "pipelive/cuda/device_marks.hpp"
#include "pipelive/cuda/slot_copier.hpp"
#include "pipelive/kv/block_allocator.hpp"
#include "pipelive/tracker/dirty_tracker.hpp"
#include "pipelive/tracker/slot_ranges.hpp"
#include "stream_arg.hpp"

namespace py = pybind11;

namespace pipelive::bindings {
namespace {

static_assert(sizeof(SlotRange) == 2 * sizeof(std::uint64_t));

// Below this many elements a call takes microseconds; giving the GIL away and waiting to get it
// back would cost a decode step more than the call itself.
constexpr std::size_t kShortCall = 4096;

template <typename Call>
auto release_gil_for(std::size_t elements, Call&& call) {
  std::optional<py::gil_scoped_release> released;
  if (elements > kShortCall) released.emplace();
  return call();
}

using ReleaseGil = py::call_guard<py::gil_scoped_release>;
using SharedRanges = std::shared_ptr<const std::vector<SlotRange>>;

/// Ranges as uint64 [n, 2] (begin, count); the array keeps the vector alive.
py::array to_array(const SharedRanges& ranges) {
  auto owner = std::make_unique<SharedRanges>(ranges);
  const py::capsule capsule(owner.get(),
                            [](void* pointer) { delete static_cast<SharedRanges*>(pointer); });
  (void)owner.release();
  return py::array_t<std::uint64_t>({static_cast<py::ssize_t>(ranges->size()), py::ssize_t{2}},
                                    reinterpret_cast<const std::uint64_t*>(ranges->data()),
                                    capsule);
}

py::array to_array(std::vector<SlotRange>&& ranges) {
  return to_array(std::make_shared<const std::vector<SlotRange>>(std::move(ranges)));
}

py::array to_array(const std::vector<std::int64_t>& values) {
  return py::array_t<std::int64_t>(static_cast<py::ssize_t>(values.size()), values.data());
}

/// Integers [n, 2] as (begin, count), copied.
std::vector<SlotRange> to_ranges(const py::object& object, const char* name) {
  const py::array array = as_host_array(object, name);
  if (array.ndim() != 2 || array.shape(1) != 2) {
    if (array.size() == 0) return {};
    throw Error(ErrorCode::invalid_argument, std::string(name) + " has the shape " +
                                                 py::str(array.attr("shape")).cast<std::string>() +
                                                 ", expected [n, 2]");
  }
  const char kind = array.dtype().kind();
  if (array.size() > 0 && kind != 'i' && kind != 'u') {
    throw Error(ErrorCode::invalid_argument, std::string(name) + " has the dtype " +
                                                 py::str(array.dtype()).cast<std::string>() +
                                                 ", expected uint64");
  }
  const auto rows = static_cast<std::size_t>(array.shape(0));
  std::vector<SlotRange> ranges(rows);
  if (kind == 'u') {
    const auto values =
        py::array_t<std::uint64_t, py::array::c_style | py::array::forcecast>::ensure(array);
    if (!values) throw py::error_already_set();
    for (std::size_t i = 0; i < rows; ++i) {
      ranges[i] = {values.data()[2 * i], values.data()[2 * i + 1]};
    }
    return ranges;
  }
  const auto values =
      py::array_t<std::int64_t, py::array::c_style | py::array::forcecast>::ensure(array);
  if (!values) throw py::error_already_set();
  for (std::size_t i = 0; i < rows; ++i) {
    const std::int64_t begin = values.data()[2 * i];
    const std::int64_t count = values.data()[2 * i + 1];
    if (begin < 0 || count < 0) {
      throw Error(ErrorCode::invalid_argument, std::string(name) + "[" + std::to_string(i) +
                                                   "] is (begin " + std::to_string(begin) +
                                                   ", count " + std::to_string(count) +
                                                   "), expected no negative number");
    }
    ranges[i] = {static_cast<std::uint64_t>(begin), static_cast<std::uint64_t>(count)};
  }
  return ranges;
}

py::tuple collect(DirtyTracker& tracker) {
  Collected collected;
  {
    const py::gil_scoped_release released;
    collected = tracker.collect();
  }
  SharedRanges ranges;
  try {
    ranges = std::make_shared<const std::vector<SlotRange>>(std::move(collected.ranges));
    return py::make_tuple(to_array(ranges), collected.through_seq, collected.num_slots,
                          collected.generation, collected.open_externals);
  } catch (...) {
    tracker.restore(ranges ? *ranges : collected.ranges);  // no write is lost for want of an object
    throw;
  }
}

/// Refuses None: any stream put in its place would be unordered with the step's appends, which go
/// to their library's current one, and what they mark would be lost without a word.
Stream step_stream(const py::object& stream) {
  if (stream.is_none()) {
    throw py::type_error(
        "stream is None, expected the stream of the step's appends: a stream of torch or cupy, or "
        "its handle");
  }
  return stream_from(stream, "stream");
}

Deadline deadline_of(double timeout) {
  return Deadline::after_seconds(timeout > 0 ? std::min(timeout, 3e9) : 0.0);
}

void bind_device_marks(py::module_& m) {
  py::class_<cuda::DeviceMarks, std::shared_ptr<cuda::DeviceMarks>>(m, "DeviceMarks")
      .def(py::init([](const std::shared_ptr<cuda::CudaDevice>& device, std::uint64_t num_slots,
                       unsigned steps) {
             const py::gil_scoped_release released;
             return std::make_shared<cuda::DeviceMarks>(cuda::SlotKernels::of(device->context()),
                                                        num_slots, steps);
           }),
           py::arg("device"), py::arg("num_slots"), py::arg("steps"))
      .def("skipped_slots", &cuda::DeviceMarks::skipped_slots,
           py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("num_slots", &cuda::DeviceMarks::num_slots)
      .def_property_readonly("memory_bytes", &cuda::DeviceMarks::memory_bytes);
}

void bind_dirty_tracker(py::module_& m) {
  // Shared: a write-through sends from it in a thread of its own.
  py::class_<DirtyTracker, std::shared_ptr<DirtyTracker>>(m, "DirtyTracker")
      .def(py::init([](std::uint64_t num_slots, std::int64_t next_seq,
                       std::shared_ptr<cuda::DeviceMarks> marks) {
             return std::make_shared<DirtyTracker>(num_slots, next_seq, std::move(marks));
           }),
           py::arg("num_slots"), py::arg("next_seq"), py::arg("marks") = py::none())
      .def(
          "mark",
          [](DirtyTracker& self, std::int64_t seq, const py::object& stream) {
            const Stream chosen = step_stream(stream);
            const py::gil_scoped_release released;
            self.mark(seq, chosen);
          },
          py::arg("seq"), py::arg("stream"))
      .def(
          "seal_after",
          [](DirtyTracker& self, std::int64_t seq, const py::object& stream) {
            const Stream chosen = step_stream(stream);
            const py::gil_scoped_release released;
            if (!self.marks()) {
              throw Error(ErrorCode::invalid_argument,
                          "stream is given, but the tracker was made without a device");
            }
            self.seal(seq, self.marks()->record(chosen));
          },
          py::arg("seq"), py::arg("stream"))
      .def(
          "wait_sealed",
          [](DirtyTracker& self, std::int64_t seq, double timeout) {
            self.wait_sealed(seq, deadline_of(timeout));
          },
          py::arg("seq"), py::arg("timeout"), py::call_guard<py::gil_scoped_release>())
      .def("open", &DirtyTracker::open)
      .def("record",
           [](DirtyTracker& self, std::int64_t seq, const py::object& object) {
             const Int64Array slots(object, "slots");
             release_gil_for(slots.values().size(), [&] { self.record(seq, slots.values()); });
           })
      .def("record_ranges",
           [](DirtyTracker& self, std::int64_t seq, const py::object& object) {
             const std::vector<SlotRange> ranges = to_ranges(object, "ranges");
             release_gil_for(ranges.size(), [&] { self.record_ranges(seq, ranges); });
           })
      .def("record_blocks",
           [](DirtyTracker& self, std::int64_t seq, const py::object& object,
              std::uint32_t block_size) {
             const Int64Array ids(object, "ids");
             release_gil_for(ids.values().size(),
                             [&] { self.record_blocks(seq, ids.values(), block_size); });
           })
      // A seal may fold a long log into the marks.
      .def("seal", py::overload_cast<std::int64_t>(&DirtyTracker::seal),
           py::call_guard<py::gil_scoped_release>())
      .def("record_external",
           [](DirtyTracker& self, const py::object& object) {
             const Int64Array slots(object, "slots");
             return release_gil_for(slots.values().size(),
                                    [&] { return self.record_external(slots.values()); });
           })
      .def("record_external_ranges",
           [](DirtyTracker& self, const py::object& object) {
             const std::vector<SlotRange> ranges = to_ranges(object, "ranges");
             return release_gil_for(ranges.size(),
                                    [&] { return self.record_external_ranges(ranges); });
           })
      .def("record_external_blocks",
           [](DirtyTracker& self, const py::object& object, std::uint32_t block_size) {
             const Int64Array ids(object, "ids");
             return release_gil_for(ids.values().size(), [&] {
               return self.record_external_blocks(ids.values(), block_size);
             });
           })
      .def("seal_external", &DirtyTracker::seal_external, py::call_guard<py::gil_scoped_release>())
      .def("collect", &collect)
      .def("restore",
           [](DirtyTracker& self, const py::object& object) {
             const std::vector<SlotRange> ranges = to_ranges(object, "ranges");
             const py::gil_scoped_release released;
             self.restore(ranges);
           })
      .def("hold_from", &DirtyTracker::hold_from, py::call_guard<py::gil_scoped_release>())
      .def("release_hold", &DirtyTracker::release_hold, py::call_guard<py::gil_scoped_release>())
      .def("reset", &DirtyTracker::reset, py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("num_slots", &DirtyTracker::num_slots)
      .def_property_readonly("next_seq", &DirtyTracker::next_seq)
      // These ask a device's events, and pending_slots runs kernels, where there is one.
      .def_property_readonly("sealed_through",
                             py::cpp_function(&DirtyTracker::sealed_through, ReleaseGil()))
      .def_property_readonly("pending_slots",
                             py::cpp_function(&DirtyTracker::pending_slots, ReleaseGil()))
      .def_property_readonly("open_steps",
                             py::cpp_function(&DirtyTracker::open_steps, ReleaseGil()))
      .def_property_readonly("open_externals", &DirtyTracker::open_externals)
      .def_property_readonly("memory_bytes", &DirtyTracker::memory_bytes);
}

void bind_slot_ranges(py::module_& m) {
  m.def("merge_ranges", [](const py::object& object) {
    std::vector<SlotRange> ranges = to_ranges(object, "ranges");
    return to_array(release_gil_for(ranges.size(), [&] { return merge_ranges(ranges); }));
  });
  m.def("ranges_of_blocks", [](const py::object& object, std::uint32_t block_size) {
    const Int64Array ids(object, "ids");
    return to_array(release_gil_for(ids.values().size(),
                                    [&] { return ranges_of_blocks(ids.values(), block_size); }));
  });
  m.def("intersect_ranges", [](const py::object& first, const py::object& second) {
    const std::vector<SlotRange> a = to_ranges(first, "a");
    const std::vector<SlotRange> b = to_ranges(second, "b");
    return to_array(release_gil_for(a.size() + b.size(), [&] { return intersect_ranges(a, b); }));
  });
  m.def("blocks_touched", [](const py::object& object, std::uint32_t block_size) {
    const std::vector<SlotRange> ranges = to_ranges(object, "ranges");
    std::vector<std::int64_t> ids;
    {
      const py::gil_scoped_release released;  // a short list may cover many blocks
      ids = blocks_touched(ranges, block_size);
    }
    return to_array(ids);
  });
}

py::dict to_dict(const std::vector<IdMove>& moves) {
  py::dict result;
  for (const IdMove& move : moves) result[py::int_(move.from)] = move.to;
  return result;
}

void bind_block_allocator(py::module_& m) {
  py::class_<BlockAllocator>(m, "BlockAllocator")
      .def(py::init<std::int64_t, std::int64_t>(), py::arg("max_blocks"), py::arg("capacity"))
      .def("allocate", &BlockAllocator::allocate, py::call_guard<py::gil_scoped_release>())
      // The ids are copied: they are read twice, and must not change in between.
      .def("share",
           [](BlockAllocator& self, const py::object& object) {
             const std::vector<std::int64_t> ids = Int64Array(object, "ids").copy();
             release_gil_for(ids.size(), [&] { self.share(ids); });
           })
      .def("release",
           [](BlockAllocator& self, const py::object& object,
              std::optional<std::int64_t> after_seq) {
             const std::vector<std::int64_t> ids = Int64Array(object, "ids").copy();
             release_gil_for(ids.size(), [&] { self.release(ids, after_seq); });
           })
      .def("retire", &BlockAllocator::retire)
      .def("writable",
           [](BlockAllocator& self, std::int64_t id) {
             const BlockAllocator::Writable writable = self.writable(id);
             return py::make_tuple(writable.id, writable.copy_from);
           })
      .def("generation", &BlockAllocator::generation)
      .def("refcount", &BlockAllocator::refcount)
      .def("live", &BlockAllocator::live, py::call_guard<py::gil_scoped_release>())
      .def("quarantined", &BlockAllocator::quarantined, py::call_guard<py::gil_scoped_release>())
      .def("raise_capacity", &BlockAllocator::raise_capacity,
           py::call_guard<py::gil_scoped_release>())
      .def("plan_shrink",
           [](BlockAllocator& self, std::int64_t capacity) {
             std::vector<IdMove> moves;
             {
               const py::gil_scoped_release released;
               moves = self.plan_shrink(capacity);
             }
             try {
               return to_dict(moves);
             } catch (...) {
               self.cancel_shrink();
               throw;
             }
           })
      .def("apply_shrink",
           [](BlockAllocator& self, std::int64_t capacity, const py::dict& moves,
              std::optional<std::int64_t> after_seq) {
             std::vector<IdMove> list;
             list.reserve(moves.size());
             for (const auto& [from, to] : moves) {
               list.push_back({from.cast<std::int64_t>(), to.cast<std::int64_t>()});
             }
             const py::gil_scoped_release released;
             self.apply_shrink(capacity, list, after_seq);
           })
      .def("cancel_shrink", &BlockAllocator::cancel_shrink,
           py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("num_free", &BlockAllocator::num_free)
      .def_property_readonly("num_live", &BlockAllocator::num_live)
      .def_property_readonly("num_quarantined", &BlockAllocator::num_quarantined)
      .def_property_readonly("capacity", &BlockAllocator::capacity)
      .def_property_readonly("max_blocks", &BlockAllocator::max_blocks)
      .def_property_readonly("planned_capacity", &BlockAllocator::planned_capacity);
}

}  // namespace

void bind_tracker(py::module_& m) {
  bind_device_marks(m);
  bind_dirty_tracker(m);
  bind_slot_ranges(m);
  bind_block_allocator(m);
}

}  // namespace pipelive::bindings

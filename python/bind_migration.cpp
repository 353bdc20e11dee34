#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "bindings.hpp"
#include "cuda_layers.hpp"
#include "pipelive/base/error.hpp"
#include "pipelive/kv/layer_view.hpp"
#include "pipelive/migration/convergence.hpp"
#include "pipelive/migration/patch_receiver.hpp"
#include "pipelive/migration/patch_sender.hpp"
#include "pipelive/migration/write_through.hpp"
#include "tensor_view.hpp"

namespace py = pybind11;

namespace pipelive::bindings {
namespace {

using Release = py::call_guard<py::gil_scoped_release>;

PatchLayers layers_of(const KVSpec& spec, const std::map<std::uint32_t, LayerView>& views) {
  std::vector<PatchLayer> layers;
  // One copier for all; each view is checked to lie on its kind of device.
  const std::shared_ptr<SlotCopier> copier =
      views.empty() ? nullptr : copier_for(views.begin()->second);
  for (const auto& [layer, view] : views) {
    if (view.layer() != layer) {
      throw Error(ErrorCode::invalid_argument, "layers[" + std::to_string(layer) +
                                                   "] is the view of layer " +
                                                   std::to_string(view.layer()));
    }
    if (view.device_index() != views.begin()->second.device_index()) {
      throw Error(ErrorCode::invalid_argument,
                  "layers[" + std::to_string(layer) +
                      "] lies on another device than the first; a session's lie on one");
    }
    layers.push_back(PatchLayer::of(view, copier));
  }
  return {spec, std::move(layers)};
}

// Payloads go straight from the channel's staging only where it lies on the layers' own device.
void check_device(const Channel& channel, const std::map<std::uint32_t, LayerView>& views) {
  const Device* const device = channel.bulk_device();
  if (device == nullptr || views.empty()) return;
  const LayerView& view = views.begin()->second;
  if (device->info().kind == view.device_kind() && device->info().index != view.device_index()) {
    throw Error(ErrorCode::invalid_argument, "the channel is for " + device->info().name +
                                                 ", the layers lie on device " +
                                                 std::to_string(view.device_index()));
  }
}

DeviceKind where_of(const TensorView& view) {
  if (view.on_cpu()) return DeviceKind::host;
  if (view.device().type != dlpack::kCuda) view.require_cpu();
  return DeviceKind::cuda;
}

// A contiguous uint64 array of shape [n, 2] is laid out as SlotRanges are.
static_assert(sizeof(SlotRange) == 16);
std::span<const SlotRange> ranges_of(const TensorView& view) {
  const std::int64_t shape[] = {-1, 2};
  view.require_shape(shape);
  if (view.num_elements() == 0) return {};  // whose strides mean nothing
  const std::span<std::uint64_t> flat = view.flat<std::uint64_t>(dtypes::uint64);
  return {reinterpret_cast<const SlotRange*>(flat.data()), flat.size() / 2};
}

Deadline deadline_of(double timeout) {
  // NaN becomes 0; a century stands for longer waits, which the clock could not count.
  return Deadline::after_seconds(timeout > 0 ? std::min(timeout, 3e9) : 0.0);
}

/// Packs and unpacks slots of layers outside of a session; for benchmarks and tests.
class BoundCopier {
 public:
  BoundCopier(const KVSpec& spec, const std::map<std::uint32_t, LayerView>& views)
      : layers_(layers_of(spec, views)) {}

  std::uint32_t gather(const py::object& ranges, const py::object& out, bool checksum,
                       double timeout) {
    const TensorView view = TensorView::borrow(ranges, "ranges");
    const TensorView packed = TensorView::borrow(out, "out");
    packed.require_writable();
    const std::vector<LayerSlots> slots = slots_of(ranges_of(view));
    const Packed place{packed.data(), bytes_of(packed), kind_of(packed)};
    const py::gil_scoped_release release;
    const std::vector<Residency::Use> uses = use();
    return layers_.copier().gather(slots, place, checksum, 0, deadline_of(timeout));
  }
  void scatter(const py::object& ranges, const py::object& data, double timeout) {
    const TensorView view = TensorView::borrow(ranges, "ranges");
    const TensorView packed = TensorView::borrow(data, "data");
    const std::vector<LayerSlots> slots = slots_of(ranges_of(view));
    const ConstPacked place{packed.data(), bytes_of(packed), kind_of(packed)};
    const py::gil_scoped_release release;
    const std::vector<Residency::Use> uses = use();
    layers_.copier().scatter(slots, place, deadline_of(timeout));
    layers_.copier().finish(deadline_of(timeout));
  }
  std::vector<std::uint32_t> digest(const py::object& ranges, double timeout) {
    const TensorView view = TensorView::borrow(ranges, "ranges");
    const std::vector<LayerSlots> slots = slots_of(ranges_of(view));
    const py::gil_scoped_release release;
    const std::vector<Residency::Use> uses = use();
    std::vector<std::uint32_t> sums;
    for (const LayerSlots& layer : slots) {
      sums.push_back(layers_.copier().digest(layer, 0, deadline_of(timeout)));
    }
    return sums;
  }

 private:
  static std::size_t bytes_of(const TensorView& view) {
    if (view.num_elements() == 0) return 0;
    view.require_contiguous();
    return view.num_bytes();
  }
  static DeviceKind kind_of(const TensorView& view) {
    return view.device().type == dlpack::kCuda ? DeviceKind::cuda : DeviceKind::host;
  }
  std::vector<LayerSlots> slots_of(std::span<const SlotRange> ranges) const {
    std::vector<LayerSlots> slots;
    for (const PatchLayer& layer : layers_.all()) {
      slots.push_back({&layer.layout, layer.memory, ranges});
    }
    return slots;
  }
  // Every block that has addresses must be mapped: what the ranges name is not looked at.
  std::vector<Residency::Use> use() const {
    std::vector<Residency::Use> uses = layers_.use();
    if (layers_.resident_blocks() != layers_.max_blocks()) {
      throw Error(ErrorCode::not_resident, "some blocks of the layers are not mapped");
    }
    return uses;
  }

  PatchLayers layers_;
};

void bind_copier(py::module_& m) {
  py::class_<BoundCopier>(m, "SlotCopier")
      .def(py::init<const KVSpec&, const std::map<std::uint32_t, LayerView>&>(), py::arg("spec"),
           py::arg("layers"))
      .def("gather", &BoundCopier::gather, py::arg("ranges"), py::arg("out"),
           py::arg("checksum") = true, py::arg("timeout") = 60.0)
      .def("scatter", &BoundCopier::scatter, py::arg("ranges"), py::arg("data"),
           py::arg("timeout") = 60.0)
      .def("digest", &BoundCopier::digest, py::arg("ranges"), py::arg("timeout") = 60.0);
}

void bind_sender(py::module_& m) {
  py::class_<PatchSender, std::shared_ptr<PatchSender>>(m, "PatchSender")
      .def(py::init([](std::shared_ptr<Channel> channel, const KVSpec& spec,
                       const std::map<std::uint32_t, LayerView>& views, std::uint64_t epoch,
                       std::size_t max_message_bytes, double rate_limit, bool checksum) {
             check_device(*channel, views);
             PatchSender::Options options;
             options.epoch = epoch;
             options.max_message_bytes = max_message_bytes;
             options.rate_limit = rate_limit;
             options.checksum = checksum;
             return std::make_shared<PatchSender>(std::move(channel), layers_of(spec, views),
                                                  options);
           }),
           py::arg("channel"), py::arg("spec"), py::arg("layers"), py::arg("epoch"),
           py::arg("max_message_bytes"), py::arg("rate_limit"), py::arg("checksum"))
      .def(
          "send_round",
          [](PatchSender& sender, std::uint64_t round, std::int64_t through_seq,
             const py::object& ranges, const std::vector<std::uint32_t>& layers, double timeout) {
            const TensorView view = TensorView::borrow(ranges, "ranges");
            const std::span<const SlotRange> slots = ranges_of(view);
            RoundStats stats;
            {
              const py::gil_scoped_release release;
              stats = sender.send_round(round, through_seq, slots, layers, deadline_of(timeout));
            }
            return py::make_tuple(stats.records, stats.messages, stats.bytes, stats.slots,
                                  stats.skipped_slots, stats.busy_seconds);
          },
          py::arg("round"), py::arg("through_seq"), py::arg("ranges"), py::arg("layers"),
          py::arg("timeout"))
      .def(
          "wait_applied",
          [](PatchSender& sender, std::int64_t seq, double timeout) {
            sender.wait_applied(seq, deadline_of(timeout));
          },
          py::arg("through_seq"), py::arg("timeout"), Release())
      .def("applied_through", &PatchSender::applied_through, Release())
      .def("failed", &PatchSender::failed, Release())
      .def(
          "verify",
          [](PatchSender& sender, const py::object& ranges, double timeout) {
            const TensorView view = TensorView::borrow(ranges, "ranges");
            const std::span<const SlotRange> slots = ranges_of(view);
            const py::gil_scoped_release release;
            return sender.verify(slots, deadline_of(timeout));
          },
          py::arg("ranges"), py::arg("timeout"))
      .def(
          "send_region",
          [](PatchSender& sender, std::uint64_t id, const py::object& data, double timeout) {
            const TensorView view = TensorView::borrow(data, "data");
            const DeviceKind where = where_of(view);
            if (view.num_elements() != 0) view.require_contiguous();
            const py::gil_scoped_release release;
            sender.send_region(id, {view.data(), view.num_bytes()}, deadline_of(timeout), where);
          },
          py::arg("region"), py::arg("data"), py::arg("timeout"))
      .def(
          "finish",
          [](PatchSender& sender, double timeout) { sender.finish(deadline_of(timeout)); },
          py::arg("timeout"), Release())
      .def("set_rate_limit", &PatchSender::set_rate_limit, py::arg("bytes_per_second"), Release())
      .def("cancel", &PatchSender::cancel, Release());
}

void bind_receiver(py::module_& m) {
  py::class_<PatchReceiver, std::shared_ptr<PatchReceiver>>(m, "PatchReceiver")
      .def(py::init([](std::shared_ptr<Channel> channel, const KVSpec& spec,
                       const std::map<std::uint32_t, LayerView>& views, std::uint64_t epoch,
                       const std::map<std::uint64_t, py::object>& regions,
                       std::optional<bool> checksum) {
             std::vector<PatchRegion> places;
             for (const auto& [id, object] : regions) {
               const std::string name = "regions[" + std::to_string(id) + "]";
               auto view = std::make_shared<TensorView>(TensorView::borrow(object, name.c_str()));
               const DeviceKind where = where_of(*view);
               if (view->num_elements() != 0) view->require_contiguous();
               view->require_writable();
               const std::span<std::byte> bytes(view->data(), view->num_bytes());
               places.push_back({id, bytes, std::move(view), where});
             }
             check_device(*channel, views);
             PatchReceiver::Options options;
             options.epoch = epoch;
             options.checksum = checksum;
             return std::make_shared<PatchReceiver>(std::move(channel), layers_of(spec, views),
                                                    options, std::move(places));
           }),
           py::arg("channel"), py::arg("spec"), py::arg("layers"), py::arg("epoch"),
           py::arg("regions"), py::arg("checksum"))
      .def(
          "run",
          [](PatchReceiver& receiver, double timeout, std::optional<std::uint64_t> rounds) {
            return receiver.run(deadline_of(timeout),
                                rounds.value_or(PatchReceiver::kUntilFinished));
          },
          py::arg("timeout"), py::arg("rounds"), Release())
      .def("applied_through", &PatchReceiver::applied_through, Release())
      .def("rounds_applied", &PatchReceiver::rounds_applied, Release())
      .def(
          "wait_applied",
          [](PatchReceiver& receiver, std::int64_t seq, double timeout,
             std::optional<std::uint32_t> layer) {
            receiver.wait_applied(seq, deadline_of(timeout), layer);
          },
          py::arg("through_seq"), py::arg("timeout"), py::arg("layer"), Release())
      .def(
          "wait_region",
          [](PatchReceiver& receiver, std::uint64_t id, double timeout) {
            receiver.wait_region(id, deadline_of(timeout));
          },
          py::arg("region"), py::arg("timeout"), Release())
      .def("set_capacity", &PatchReceiver::set_capacity, py::arg("blocks"), py::arg("resize_seq"),
           Release())
      .def("cancel", &PatchReceiver::cancel, Release())
      .def("stats", [](const PatchReceiver& receiver) {
        const ReceiverStats stats = receiver.stats();
        py::dict dict;
        dict["messages"] = stats.messages;
        dict["records"] = stats.records;
        dict["slots"] = stats.slots;
        dict["overtaken_slots"] = stats.overtaken_slots;
        dict["dropped_slots"] = stats.dropped_slots;
        dict["duplicates"] = stats.duplicates;
        dict["bytes"] = stats.bytes;
        dict["rounds"] = stats.rounds;
        dict["busy_seconds"] = stats.busy_seconds;
        return dict;
      });
}

py::list sent_steps(const WriteThrough& self, std::uint64_t first) {
  py::list list;
  for (const SentStep& step : self.sent(first)) {
    list.append(py::make_tuple(step.round, step.through_seq, step.slots, step.records, step.bytes,
                               step.start_ns, step.end_ns, step.busy_seconds, step.lag_steps));
  }
  return list;
}

void bind_write_through(py::module_& m) {
  py::class_<WriteThrough>(m, "WriteThrough")
      .def(py::init([](std::shared_ptr<DirtyTracker> tracker,
                       std::vector<std::shared_ptr<PatchSender>> senders, std::int64_t sent_through,
                       std::uint64_t first_round, bool keep_ranges, double message_seconds) {
             return std::make_unique<WriteThrough>(
                 std::move(tracker), std::move(senders),
                 WriteThrough::Options{sent_through, first_round, keep_ranges, message_seconds});
           }),
           py::arg("tracker"), py::arg("senders"), py::arg("sent_through"), py::arg("first_round"),
           py::arg("keep_ranges"), py::arg("message_seconds"))
      .def(
          "run", [](WriteThrough& self, double timeout) { return self.run(deadline_of(timeout)); },
          py::arg("timeout"), Release())
      .def("resume", &WriteThrough::resume, py::arg("place"), py::arg("sender"),
           py::arg("rounds_applied"), Release())
      .def("end_after", &WriteThrough::end_after, py::arg("seq"), Release())
      .def("cancel", &WriteThrough::cancel, Release())
      .def("sent_through", &WriteThrough::sent_through)
      .def("bytes_sent", &WriteThrough::bytes_sent)
      .def("sent", &sent_steps, py::arg("first"))
      .def("ranges", [](const WriteThrough& self) {
        const std::vector<SlotRange> ranges = self.ranges();
        py::array_t<std::uint64_t> array({static_cast<py::ssize_t>(ranges.size()), py::ssize_t{2}});
        std::copy(ranges.begin(), ranges.end(), reinterpret_cast<SlotRange*>(array.mutable_data()));
        return array;
      });
}

}  // namespace

void bind_migration(py::module_& m) {
  bind_copier(m);
  bind_sender(m);
  bind_receiver(m);
  bind_write_through(m);
  py::class_<BandwidthEstimate>(m, "BandwidthEstimate")
      .def(py::init([](double fixed_seconds, double record_seconds, double decay,
                       double initial_bytes_per_second) {
             return BandwidthEstimate(
                 {fixed_seconds, record_seconds, decay, initial_bytes_per_second});
           }),
           py::arg("fixed_seconds"), py::arg("record_seconds"), py::arg("decay"),
           py::arg("initial_bytes_per_second"))
      .def("observe", &BandwidthEstimate::observe, py::arg("bytes"), py::arg("records"),
           py::arg("seconds"))
      .def("predict", &BandwidthEstimate::predict, py::arg("bytes"), py::arg("records"))
      .def_property_readonly("bytes_per_second", &BandwidthEstimate::bytes_per_second);
}

}  // namespace pipelive::bindings

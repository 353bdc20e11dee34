#include <algorithm>
#include <memory>
#include <string>
#include <utility>

#include "bindings.hpp"
#include "pipelive/base/error.hpp"
#include "pipelive/transport/channel.hpp"
#include "pipelive/transport/checksum.hpp"
#include "pipelive/transport/shm_channel.hpp"
#include "pipelive/transport/tcp_channel.hpp"
#include "tensor_view.hpp"

namespace py = pybind11;

namespace pipelive::bindings {
namespace {

using Release = py::call_guard<py::gil_scoped_release>;

Deadline deadline_of(double timeout) {
  return Deadline::after_seconds(timeout > 0 ? std::min(timeout, 3e9) : 0.0);
}

std::span<const std::byte> bytes_of(const TensorView& view) {
  view.require_cpu();
  view.require_contiguous();
  return {view.data(), view.num_bytes()};
}

py::dict stats_of(const Channel& channel) {
  const ChannelStats stats = channel.stats();
  py::dict dict;
  dict["messages_sent"] = stats.messages_sent;
  dict["bytes_sent"] = stats.bytes_sent;
  dict["messages_received"] = stats.messages_received;
  dict["bytes_received"] = stats.bytes_received;
  return dict;
}

}  // namespace

void bind_transport(py::module_& m) {
  m.def(
      "crc32c",
      [](const py::object& data, std::uint32_t seed) {
        const TensorView view = TensorView::borrow(data, "data");
        const std::span<const std::byte> bytes = bytes_of(view);
        const py::gil_scoped_release release;
        return crc32c(bytes, seed);
      },
      py::arg("data"), py::arg("seed") = 0);

  py::class_<Channel, std::shared_ptr<Channel>>(m, "Channel")
      .def_property_readonly("kind", [](const Channel& c) { return std::string(c.kind()); })
      .def_property_readonly("max_message_bytes", &Channel::max_message_bytes)
      .def("cancel", &Channel::cancel, Release())
      .def("close", &Channel::close, Release())
      .def("stats", &stats_of)
      .def(
          "send",
          [](Channel& channel, const py::object& data, double timeout) {
            const TensorView view = TensorView::borrow(data, "data");
            const std::span<const std::byte> bytes = bytes_of(view);
            const py::gil_scoped_release release;
            send(channel, bytes, deadline_of(timeout));
          },
          py::arg("data"), py::arg("timeout"))
      .def(
          "receive",
          [](Channel& channel, double timeout) {
            std::span<const std::byte> message;
            {
              const py::gil_scoped_release release;
              message = channel.receive(deadline_of(timeout));
            }
            py::bytes copy(reinterpret_cast<const char*>(message.data()), message.size());
            const py::gil_scoped_release release;
            channel.release();
            return copy;
          },
          py::arg("timeout"));

  // The descriptors are taken over in any case: where the constructor throws, they are closed.
  m.def(
      "tcp_channel",
      [](int socket, std::size_t max_message_bytes, std::size_t progress_bytes,
         double progress_window) -> std::shared_ptr<Channel> {
        TcpOptions options;
        options.max_message_bytes = max_message_bytes;
        options.progress_bytes = progress_bytes;
        options.progress_window =
            std::chrono::nanoseconds(static_cast<long long>(progress_window * 1e9));
        return std::make_shared<TcpChannel>(UniqueFd(socket), options);
      },
      py::arg("socket"), py::arg("max_message_bytes"), py::arg("progress_bytes"),
      py::arg("progress_window"));
  m.def(
      "shm_channel",
      [](int socket, int memory, int side) -> std::shared_ptr<Channel> {
        return std::make_shared<ShmChannel>(UniqueFd(socket), UniqueFd(memory), side);
      },
      py::arg("socket"), py::arg("memory"), py::arg("side"), Release());
  m.def(
      "shm_memory",
      [](std::size_t ring_bytes) { return ShmChannel::create_memory(ring_bytes).release(); },
      py::arg("ring_bytes"), Release());
  m.attr("SHM_RING_BYTES") = ShmChannel::kDefaultRingBytes;
}

}  // namespace pipelive::bindings

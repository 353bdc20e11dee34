#include <poll.h>
#include <pybind11/stl.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "bindings.hpp"
#include "pipelive/base/error.hpp"
#include "pipelive/cuda/device.hpp"
#include "pipelive/cuda/device_turn.hpp"
#include "pipelive/cuda/nccl_channel.hpp"
#include "pipelive/cuda/scope.hpp"
#include "pipelive/cuda/stream.hpp"
#include "pipelive/transport/channel.hpp"
#include "pipelive/transport/checksum.hpp"
#include "pipelive/transport/peer_channel.hpp"
#include "pipelive/transport/shm_channel.hpp"
#include "pipelive/transport/tcp_channel.hpp"
#include "tensor_view.hpp"

namespace py = pybind11;

namespace pipelive::bindings {
namespace {

using Release = py::call_guard<py::gil_scoped_release>;

// An object whose end may wait, for a thread or for a device: where it is Python that lets the last
// reference go, the other threads of Python go on meanwhile.
template <typename T, typename... Arguments>
std::shared_ptr<T> made(Arguments&&... arguments) {
  return {new T(std::forward<Arguments>(arguments)...), [](T* object) {
            if (Py_IsInitialized() != 0 && PyGILState_Check() != 0) {
              const py::gil_scoped_release release;
              delete object;
            } else {
              delete object;
            }
          }};
}

// Whether the peer has said something over a socket, or hung up, which it does not do while all is
// well. Nothing is read.
cuda::NcclComm::Gone watch(int fd) {
  if (fd < 0) return nullptr;
  // A descriptor of its own: what watches may outlive the caller.
  const auto own = std::make_shared<UniqueFd>(dup(fd));
  if (own->get() < 0) throw_errno("dup", errno);
  return [own] {
    pollfd asked{own->get(), POLLIN | POLLRDHUP, 0};
    return poll(&asked, 1, 0) > 0;
  };
}

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

// Where a device's copies run: a stream of their own, and a thread in its context.
struct Lane {
  Stream stream;
  std::shared_ptr<const void> owner;
};
Lane lane_of(const std::shared_ptr<Device>& device) {
  const auto cuda_device = std::dynamic_pointer_cast<cuda::CudaDevice>(device);
  if (!cuda_device) return {};
  const auto stream = std::make_shared<cuda::OwnStream>(cuda_device->context());
  return {stream->stream(), stream};
}

std::shared_ptr<cuda::NcclIssuer> issuer_of(const std::shared_ptr<Device>& device) {
  const auto cuda_device = std::dynamic_pointer_cast<cuda::CudaDevice>(device);
  cuda::NcclIssuer::Enter enter;
  if (cuda_device) {
    enter = [cuda_device]() -> std::shared_ptr<void> {
      return std::make_shared<cuda::CallScope>(*cuda_device->context());
    };
  }
  return cuda::NcclIssuer::of(device->info().name, enter);
}

cuda::NcclUniqueId id_from(const py::bytes& bytes) {
  const std::string text = bytes;
  cuda::NcclUniqueId id{};
  if (text.size() != sizeof id.internal) {
    throw Error(ErrorCode::invalid_argument, "unique_id has " + std::to_string(text.size()) +
                                                 " bytes, expected " +
                                                 std::to_string(sizeof id.internal));
  }
  std::memcpy(id.internal, text.data(), text.size());
  return id;
}

std::span<const std::byte> bytes_of(const std::string& bytes) {
  return std::as_bytes(std::span(bytes));
}

void bind_staging(py::module_& m) {
  // The descriptor that export returns belongs to the caller.
  py::class_<Staging, std::shared_ptr<Staging>>(m, "Staging")
      .def(py::init(
               [](std::shared_ptr<Device> device, std::size_t piece_bytes, std::uint32_t pieces) {
                 const py::gil_scoped_release release;
                 return made<Staging>(std::move(device), StagingShape{piece_bytes, pieces});
               }),
           py::arg("device"), py::arg("piece_bytes"), py::arg("pieces"))
      .def_property_readonly("piece_bytes", [](const Staging& s) { return s.shape().piece_bytes; })
      .def_property_readonly("pieces", [](const Staging& s) { return s.shape().pieces; })
      .def(
          "piece",
          [](const Staging& s, std::uint32_t index) {
            if (index >= s.shape().pieces) {
              throw Error(ErrorCode::invalid_argument, "piece is " + std::to_string(index) +
                                                           ", there are " +
                                                           std::to_string(s.shape().pieces));
            }
            return reinterpret_cast<std::uintptr_t>(s.piece(index));
          },
          py::arg("index"))
      .def(
          "put_sample",
          [](Staging& staging, const std::string& sample, double timeout) {
            Lane lane = lane_of(staging.device());
            staging.put_sample(bytes_of(sample), lane.stream, std::move(lane.owner),
                               deadline_of(timeout));
          },
          py::arg("sample"), py::arg("timeout"), Release())
      .def("export_memory", [](const Staging& staging) {
        ExportedPages exported = staging.export_memory();
        return py::make_tuple(exported.fd.release(), exported.offset, exported.bytes);
      });
  // The descriptor is taken over in any case.
  py::class_<PeerStaging, std::shared_ptr<PeerStaging>>(m, "PeerStaging")
      .def(py::init([](const std::shared_ptr<Device>& device, int fd, std::uint64_t offset,
                       std::size_t nbytes, std::size_t piece_bytes, std::uint32_t pieces) {
             const py::gil_scoped_release release;
             const ExportedPages exported{UniqueFd(fd), offset, nbytes};
             return made<PeerStaging>(device, exported, StagingShape{piece_bytes, pieces});
           }),
           py::arg("device"), py::arg("fd"), py::arg("offset"), py::arg("nbytes"),
           py::arg("piece_bytes"), py::arg("pieces"))
      .def(
          "has_sample",
          [](const PeerStaging& staging, const std::string& sample, double timeout) {
            Lane lane = lane_of(staging.device());
            return staging.has_sample(bytes_of(sample), lane.stream, std::move(lane.owner),
                                      deadline_of(timeout));
          },
          py::arg("sample"), py::arg("timeout"), Release())
      .def_property_readonly("writable", &PeerStaging::writable);
  m.def(
      "p2p_channel",
      [](std::shared_ptr<Channel> base, const std::shared_ptr<Device>& device,
         std::shared_ptr<Staging> own,
         std::shared_ptr<PeerStaging> peer) -> std::shared_ptr<Channel> {
        Lane lane = lane_of(device);
        PeerChannel::Options options;
        options.device = device;
        options.stream = lane.stream;
        options.stream_owner = std::move(lane.owner);
        options.own = std::move(own);
        options.peer = std::move(peer);
        return made<PeerChannel>(std::move(base), std::move(options));
      },
      py::arg("base"), py::arg("device"), py::arg("own"), py::arg("peer"), Release());
}

void bind_nccl(py::module_& m) {
  using cuda::NcclComm;
  m.def(
      "nccl_probe",
      [](const std::vector<std::string>& candidates) {
        cuda::NcclProbe probe;
        {
          const py::gil_scoped_release release;
          probe = cuda::probe_nccl(candidates);
        }
        return py::make_tuple(probe.version.value_or(0),
                              probe.version ? cuda::nccl_version_text(*probe.version) : "",
                              probe.path, probe.launch_order, probe.multi_rank_gpu, probe.problem);
      },
      py::arg("candidates"));
  m.def(
      "nccl_unique_id",
      [](const std::vector<std::string>& candidates) {
        cuda::NcclUniqueId id{};
        {
          const py::gil_scoped_release release;
          id = cuda::Nccl::open(candidates)->unique_id();
        }
        return py::bytes(id.internal, sizeof id.internal);
      },
      py::arg("candidates"));
  py::class_<NcclComm, std::shared_ptr<NcclComm>>(m, "NcclComm")
      .def(py::init([](const std::vector<std::string>& candidates,
                       const std::shared_ptr<Device>& device, const py::bytes& unique_id, int rank,
                       int ranks, double timeout, int watch_fd) {
             const cuda::NcclUniqueId id = id_from(unique_id);
             const py::gil_scoped_release release;
             Lane lane = lane_of(device);
             NcclComm::Place place;
             place.nccl = cuda::Nccl::open(candidates);
             place.issuer = issuer_of(device);
             place.device = device;
             place.stream = lane.stream;
             place.stream_owner = std::move(lane.owner);
             place.turn = cuda::DeviceTurn::of(device->info().name);
             std::shared_ptr<cuda::NcclIssuer> issuer = place.issuer;
             try {
               return made<NcclComm>(std::move(place), id, rank, ranks, deadline_of(timeout),
                                     watch(watch_fd));
             } catch (const Error&) {
               // The end of what was begun may take seconds, which who falls back does not have.
               std::thread([last = std::move(issuer)]() mutable { last.reset(); }).detach();
               throw;
             }
           }),
           py::arg("candidates"), py::arg("device"), py::arg("unique_id"), py::arg("rank"),
           py::arg("ranks"), py::arg("timeout"), py::arg("watch_fd") = -1)
      .def(
          "exchange",
          [](NcclComm& comm, std::uintptr_t out, std::uintptr_t in, std::size_t nbytes, int peer,
             double timeout) {
            comm.exchange(reinterpret_cast<const std::byte*>(out), reinterpret_cast<std::byte*>(in),
                          nbytes, peer, deadline_of(timeout));
          },
          py::arg("out"), py::arg("into"), py::arg("nbytes"), py::arg("peer"), py::arg("timeout"),
          Release())
      // Both ways at once, over the staging that will be used: NCCL connects at the first transfer.
      .def(
          "exchange_staging",
          [](NcclComm& comm, const std::shared_ptr<Staging>& out,
             const std::shared_ptr<Staging>& in, int peer, double timeout, int watch_fd) {
            constexpr std::size_t kBytes = 4096;
            const auto keep =
                std::make_shared<std::pair<std::shared_ptr<Staging>, std::shared_ptr<Staging>>>(out,
                                                                                                in);
            comm.exchange(out->piece(0), in->piece(0), kBytes, peer, deadline_of(timeout), keep,
                          watch(watch_fd));
          },
          py::arg("out"), py::arg("into"), py::arg("peer"), py::arg("timeout"), py::arg("watch_fd"),
          Release())
      .def("abort", &NcclComm::abort, Release());
  m.def(
      "nccl_channel",
      [](std::shared_ptr<Channel> base, std::shared_ptr<NcclComm> comm,
         std::shared_ptr<Staging> out, std::shared_ptr<Staging> in,
         double transfer_limit) -> std::shared_ptr<Channel> {
        cuda::NcclChannel::Options options;
        options.turn = cuda::DeviceTurn::of(comm->device()->info().name);
        options.comm = std::move(comm);
        options.out = std::move(out);
        options.in = std::move(in);
        options.transfer_limit =
            std::chrono::nanoseconds(static_cast<long long>(transfer_limit * 1e9));
        return made<cuda::NcclChannel>(std::move(base), std::move(options));
      },
      py::arg("base"), py::arg("comm"), py::arg("out"), py::arg("into"), py::arg("transfer_limit"),
      Release());

  py::class_<cuda::DeviceTurn, std::shared_ptr<cuda::DeviceTurn>>(m, "DeviceTurn")
      .def(py::init([](const std::string& device) { return cuda::DeviceTurn::of(device); }),
           py::arg("device"))
      .def("try_take", &cuda::DeviceTurn::try_take, py::arg("holder"), Release())
      .def(
          "take",
          [](cuda::DeviceTurn& turn, std::string holder, double timeout) {
            turn.take(std::move(holder), deadline_of(timeout));
          },
          py::arg("holder"), py::arg("timeout"), Release())
      .def("give", &cuda::DeviceTurn::give, Release())
      .def_property_readonly("holder", &cuda::DeviceTurn::holder);
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
      .def_property_readonly("max_bulk_bytes", &Channel::max_bulk_bytes)
      // One message with a few bytes beside it, so that what is set up by the first use (NCCL's
      // connections) is there before it matters. The one end sends, the other receives.
      .def(
          "warm_up",
          [](Channel& channel, bool sends, double timeout) {
            const Deadline deadline = deadline_of(timeout);
            if (sends) {
              constexpr std::size_t kBytes = 4096;
              channel.acquire(1, deadline)[0] = std::byte{0};
              static_cast<void>(channel.acquire_bulk(kBytes, deadline));
              channel.submit(1, deadline, kBytes);
            } else {
              static_cast<void>(channel.receive(deadline));
              channel.release();
            }
          },
          py::arg("sends"), py::arg("timeout"), Release())
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
        return made<TcpChannel>(UniqueFd(socket), options);
      },
      py::arg("socket"), py::arg("max_message_bytes"), py::arg("progress_bytes"),
      py::arg("progress_window"));
  m.def(
      "shm_channel",
      [](int socket, int memory, int side) -> std::shared_ptr<Channel> {
        return made<ShmChannel>(UniqueFd(socket), UniqueFd(memory), side);
      },
      py::arg("socket"), py::arg("memory"), py::arg("side"), Release());
  m.def(
      "shm_memory",
      [](std::size_t ring_bytes) { return ShmChannel::create_memory(ring_bytes).release(); },
      py::arg("ring_bytes"), Release());
  m.attr("SHM_RING_BYTES") = ShmChannel::kDefaultRingBytes;
  m.attr("STAGING_PIECE_BYTES") = StagingShape{}.piece_bytes;
  m.attr("STAGING_PIECES") = StagingShape{}.pieces;
  bind_staging(m);
  bind_nccl(m);
  m.def(
      "device_identity",
      [](const std::shared_ptr<Device>& device) -> py::tuple {
        // The same for all processes that use the same GPU, whatever number they give it.
        const auto cuda_device = std::dynamic_pointer_cast<cuda::CudaDevice>(device);
        if (!cuda_device) return py::make_tuple(device->info().name, std::string(), true);
        cuda::Uuid uuid{};
        cuda_device->driver().check(
            cuda_device->driver().api().device_get_uuid(&uuid, cuda_device->context()->device()),
            "cuDeviceGetUuid");
        std::string text;
        constexpr char kDigits[] = "0123456789abcdef";
        for (const unsigned char byte : uuid.bytes) {
          text += kDigits[byte >> 4];
          text += kDigits[byte & 15];
        }
        return py::make_tuple(device->info().name, text, cuda_device->exportable());
      },
      py::arg("device"));
}

}  // namespace pipelive::bindings

#include "pipelive/cuda/slot_copier.hpp"

#include <algorithm>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "device_crc.hpp"
#include "pipelive/base/error.hpp"
#include "pipelive/cuda/event_pool.hpp"
#include "pipelive/cuda/pinned_buffer.hpp"
#include "pipelive/cuda/scope.hpp"
#include "pipelive/cuda/slot_plan.hpp"
#include "pipelive/cuda/stream.hpp"
#include "pipelive/transport/checksum.hpp"
#include "slot_wait.hpp"

namespace pipelive::cuda {
namespace {

constexpr std::size_t kLaneUnit = std::size_t{64} << 10;
constexpr std::size_t kMostLaneBytes = std::size_t{1} << 30;
constexpr std::size_t kFirstTableBytes = std::size_t{1} << 20;

}  // namespace

class CudaSlotCopier::Impl {
 public:
  Impl(std::shared_ptr<const SlotKernels> kernels, const Options& options)
      : kernels_(std::move(kernels)), options_(options) {
    if (options.lane_bytes < kLaneUnit || options.lane_bytes % kLaneUnit != 0 ||
        options.lane_bytes > kMostLaneBytes) {
      throw Error(ErrorCode::invalid_argument, "lane_bytes is " +
                                                   std::to_string(options.lane_bytes) +
                                                   ", expected a multiple of 65536 up to 2^30");
    }
    if (options.lanes < 1 || options.lanes > 64) {
      throw Error(ErrorCode::invalid_argument,
                  "lanes is " + std::to_string(options.lanes) + ", expected 1 to 64");
    }
    const CallScope scope(context());
    try {
      stream_ = std::make_unique<OwnStream>(kernels_->context());
      events_ = std::make_shared<EventPool>(kernels_->context());
      for (unsigned i = 0; i < options.lanes; ++i) {
        lanes_.emplace_back(driver(), options.lane_bytes);
      }
      tables_ = std::make_unique<Tables>(driver(), kFirstTableBytes);
      crc_ = std::make_unique<DeviceCrc>(kernels_);
    } catch (...) {
      drop_buffers();  // while the context is current
      throw;
    }
  }

  ~Impl() {
    try {
      const CallScope scope(context());
      driver().api().stream_synchronize(stream_->handle());
      drop_buffers();
    } catch (const Error&) {
      // The context is gone, and what was in it.
    }
  }
  Impl(const Impl&) = delete;
  Impl& operator=(const Impl&) = delete;

  std::uint32_t gather(std::span<const LayerSlots> slots, Packed out, bool checksum,
                       std::uint32_t seed, Deadline deadline) {
    if (out.where == DeviceKind::cuda) {
      const auto target = reinterpret_cast<DevicePointer>(out.data);
      gather_async(slots, target, out.bytes, deadline);
      if (checksum) return crc(target, out.bytes, seed, deadline);
      finish(deadline);
      return seed;
    }
    const CallScope scope(context());
    const SlotPlan plan = make_plan(slots, out.bytes, 0);
    if (plan.bytes == 0) return seed;
    return settled([&] {
      const SlotTable table = upload(plan, deadline);
      std::uint64_t asked = 0;
      std::uint64_t done = 0;
      for (std::size_t lane = 0; done < plan.bytes; lane = (lane + 1) % lanes_.size()) {
        // As many pieces under way as there are lanes, then the oldest is taken.
        for (; asked < plan.bytes && asked - done < lanes_.size() * options_.lane_bytes;
             asked += options_.lane_bytes) {
          Lane& next = lanes_[asked / options_.lane_bytes % lanes_.size()];
          fetch(plan, table, next, asked, std::min(plan.bytes, asked + options_.lane_bytes),
                deadline);
        }
        const std::size_t bytes = std::min<std::uint64_t>(options_.lane_bytes, plan.bytes - done);
        Lane& ready = lanes_[lane];
        await(ready.busy, deadline, "gathering slots");
        const std::span<const std::byte> piece(ready.pinned->data(), bytes);
        if (checksum) {
          seed = crc32c_copy(out.data + done, piece, seed);
        } else {
          std::memcpy(out.data + done, piece.data(), bytes);
        }
        done += bytes;
      }
      return seed;
    });
  }

  void scatter(std::span<const LayerSlots> slots, ConstPacked in, Deadline deadline) {
    const auto source = reinterpret_cast<DevicePointer>(in.data);
    const bool on_device = in.where == DeviceKind::cuda;
    const CallScope scope(context());
    scatter_plan(make_plan(slots, in.bytes, on_device ? source : 0), in, deadline);
  }

  void scatter_part(const BlockLayout& layout, const LayerMemory& memory, SlotRange range,
                    ConstPacked in, SlotRange part, Deadline deadline) {
    const LayerSlots slots{&layout, memory, {&range, 1}};
    const bool on_device = in.where == DeviceKind::cuda;
    const CallScope scope(context());
    SlotPlan plan =
        plan_slots_part(slots, part, on_device ? reinterpret_cast<std::uintptr_t>(in.data) : 0);
    check_size(plan, in.bytes);
    scatter_plan(plan, in, deadline);
  }

  std::uint32_t digest(const LayerSlots& slots, std::uint32_t seed, Deadline deadline) {
    const CallScope scope(context());
    // By the kernel alone: nothing has to leave the device.
    const SlotPlan plan = plan_slots({&slots, 1}, ~std::size_t{0}, false, 0);
    if (plan.bytes == 0) return seed;
    return settled([&] {
      const SlotTable table = upload(plan, deadline);
      Lane& lane = lanes_.front();
      await(lane.busy, deadline, "earlier copies of slots");
      for (std::uint64_t done = 0; done < plan.bytes; done += options_.lane_bytes) {
        const std::uint64_t end = std::min(plan.bytes, done + options_.lane_bytes);
        launch(plan, table, true, lane.device->pointer(), done, end);
        seed = sum(lane.device->pointer(), end - done, seed, deadline);
      }
      return seed;
    });
  }

  void gather_async(std::span<const LayerSlots> slots, DevicePointer out, std::size_t bytes,
                    Deadline deadline) {
    const CallScope scope(context());
    const SlotPlan plan = make_plan(slots, bytes, out);
    if (plan.bytes == 0) return;
    settled([&] {
      const SlotTable table = upload(plan, deadline);
      for (const SlotPlan::Part& part : plan.parts) {
        if (part.address == 0) {
          launch(plan, table, true, out + part.begin, part.begin, part.end);
        } else {
          copy_direct(part, part.begin, part.end, out, 0, true, kMemoryTypeDevice);
        }
      }
      note_last();
    });
  }

  void scatter_async(std::span<const LayerSlots> slots, DevicePointer in, std::size_t bytes,
                     Deadline deadline) {
    scatter(slots, {reinterpret_cast<const std::byte*>(in), bytes, DeviceKind::cuda}, deadline);
  }

  std::uint32_t crc(DevicePointer bytes, std::size_t size, std::uint32_t seed, Deadline deadline) {
    if (size == 0) return seed;
    const CallScope scope(context());
    return settled([&] { return sum(bytes, size, seed, deadline); });
  }

  void copy(Packed out, ConstPacked in, Deadline deadline) {
    if (out.bytes != in.bytes) {
      throw Error(ErrorCode::invalid_argument, "copy of " + std::to_string(in.bytes) +
                                                   " bytes to a place of " +
                                                   std::to_string(out.bytes));
    }
    if (in.bytes == 0) return;
    const CallScope scope(context());
    settled([&] {
      driver().check(driver().api().memcpy_async(reinterpret_cast<DevicePointer>(out.data),
                                                 reinterpret_cast<DevicePointer>(in.data), in.bytes,
                                                 stream_->handle()),
                     "cuMemcpyAsync");
      last_ = events_->record(stream_->handle());
      await(last_, deadline, "copying bytes");
      return true;
    });
  }

  void finish(Deadline deadline) { await(last_, deadline, "copying slots"); }

  void wait_for(EventHandle event) {
    const CallScope scope(context());
    driver().check(driver().api().stream_wait_event(stream_->handle(), event, 0),
                   "cuStreamWaitEvent");
  }

  [[nodiscard]] StreamHandle stream() const noexcept { return stream_->handle(); }
  [[nodiscard]] bool idle() const noexcept {
    try {
      const CallScope scope(context());
      return driver().api().stream_query(stream_->handle()) != kNotReady;
    } catch (const Error&) {
      return true;  // the context is gone, and what ran in it
    }
  }
  [[nodiscard]] const PrimaryContext& context() const noexcept { return *kernels_->context(); }

 private:
  // A piece on its way between device and host.
  struct Lane {
    Lane(const Driver& driver, std::size_t bytes)
        : pinned(std::make_unique<PinnedBuffer>(driver, bytes)),
          device(std::make_unique<DeviceBuffer>(driver, bytes)) {}
    std::unique_ptr<PinnedBuffer> pinned;
    std::unique_ptr<DeviceBuffer> device;
    std::shared_ptr<Event> busy;  // behind the last use; null: none since the last wait
  };
  struct Tables {
    Tables(const Driver& driver, std::size_t bytes) : host(driver, bytes), device(driver, bytes) {}
    PinnedBuffer host;
    DeviceBuffer device;
  };

  [[nodiscard]] const Driver& driver() const noexcept { return context().driver(); }

  void drop_buffers() noexcept {
    lanes_.clear();
    tables_.reset();
    crc_.reset();
  }

  static void check_size(const SlotPlan& plan, std::size_t bytes) {
    if (plan.bytes == bytes) return;
    throw Error(ErrorCode::invalid_argument, "the packed buffer has " + std::to_string(bytes) +
                                                 " bytes, expected " + std::to_string(plan.bytes));
  }

  [[nodiscard]] SlotPlan make_plan(std::span<const LayerSlots> slots, std::size_t bytes,
                                   DevicePointer packed) const {
    // Copies within a device that are strided may be refused by the driver, so not those.
    SlotPlan plan = plan_slots(slots, options_.direct_bytes, packed == 0, packed);
    check_size(plan, bytes);
    return plan;
  }

  // Runs `work`. Where it fails half-way, what it has given to the stream is waited for: no event
  // stands behind it, and buffers will be used again.
  template <typename Work>
  auto settled(const Work& work) -> decltype(work()) {
    try {
      return work();
    } catch (const Error& error) {
      // After a timeout the stream may never come to an end. Its events are waited for before
      // buffers are used again; the slots' own memory is kept by who asks idle().
      if (error.code() != ErrorCode::timeout) {
        driver().api().stream_synchronize(stream_->handle());
      }
      throw;
    }
  }

  void await(std::shared_ptr<Event>& event, Deadline deadline, const char* what) {
    if (!event) return;
    wait_briefly(*event, deadline, what);
    event.reset();
  }

  void note_last() {
    last_ = events_->record(stream_->handle());
    table_use_ = last_;
  }

  // Brings the plan's tables to the device, once those of the call before are not used any more.
  SlotTable upload(const SlotPlan& plan, Deadline deadline) {
    await(table_use_, deadline, "earlier copies of slots");
    const std::size_t bytes = plan.table_bytes();
    if (bytes > tables_->host.bytes()) {
      const std::size_t more = std::max(bytes, 2 * tables_->host.bytes());
      tables_ = std::make_unique<Tables>(driver(), more);
    }
    const SlotTable table = plan.write_tables(tables_->host.data(), tables_->device.pointer());
    if (bytes != 0) {
      driver().check(driver().api().memcpy_to_device_async(
                         tables_->device.pointer(), tables_->host.data(), bytes, stream_->handle()),
                     "cuMemcpyHtoDAsync");
    }
    // Should the call fail before it notes its end: at least this copy is waited for.
    table_use_ = events_->record(stream_->handle());
    return table;
  }

  // The packed bytes [begin, end), of which the first lies at `packed`.
  void launch(const SlotPlan& plan, const SlotTable& table, bool gather, DevicePointer packed,
              std::uint64_t begin, std::uint64_t end) {
    const unsigned vector = plan.shape.vector_bytes;
    const SlotCopyArgs args{table, packed, begin / vector, end / vector};
    kernels_->launch(gather ? kernels_->gather(vector) : kernels_->scatter(vector),
                     gather ? "pipelive_gather" : "pipelive_scatter",
                     (args.end - args.begin + kCopyTile - 1) / kCopyTile, kCopyThreads,
                     stream_->handle(), args);
  }

  // By the copy engine, between memory and the packed bytes; packed byte `origin` lies at `packed`.
  void copy_direct(const SlotPlan::Part& part, std::uint64_t begin, std::uint64_t end,
                   DevicePointer packed, std::uint64_t origin, bool gather, int packed_type) {
    for (const DirectCopy& copy : direct_copies(part, begin, end)) {
      const DevicePointer place = packed + (copy.packed - origin);
      Copy2D all;
      // Both fields are set, so that only the type says which is used.
      all.source_type = gather ? static_cast<int>(kMemoryTypeDevice) : packed_type;
      all.source_device = gather ? copy.address : place;
      all.source_pitch = gather ? copy.pitch : copy.row;
      all.target_type = gather ? packed_type : static_cast<int>(kMemoryTypeDevice);
      all.target_device = gather ? place : copy.address;
      all.target_pitch = gather ? copy.row : copy.pitch;
      if (packed_type == static_cast<int>(kMemoryTypeHost)) {
        if (gather) {
          all.target_host = reinterpret_cast<void*>(place);
        } else {
          all.source_host = reinterpret_cast<const void*>(place);
        }
      }
      all.width_bytes = copy.row;
      all.height = copy.rows;
      if (copy.rows > 1) {
        driver().check(driver().api().memcpy_2d_async(&all, stream_->handle()), "cuMemcpy2DAsync");
      } else {
        driver().check(driver().api().memcpy_async(all.target_device, all.source_device, copy.row,
                                                   stream_->handle()),
                       "cuMemcpyAsync");
      }
    }
  }

  // Starts to bring the packed bytes [begin, end) into a lane's pinned buffer.
  void fetch(const SlotPlan& plan, const SlotTable& table, Lane& lane, std::uint64_t begin,
             std::uint64_t end, Deadline deadline) {
    await(lane.busy, deadline, "earlier copies of slots");
    for (const SlotPlan::Part& part : plan.parts) {
      const std::uint64_t first = std::max(begin, part.begin);
      const std::uint64_t last = std::min(end, part.end);
      if (first >= last) continue;
      if (part.address != 0) {
        copy_direct(part, first, last, reinterpret_cast<DevicePointer>(lane.pinned->data()), begin,
                    true, kMemoryTypeHost);
        continue;
      }
      const DevicePointer staged = lane.device->pointer() + (first - begin);
      launch(plan, table, true, staged, first, last);
      driver().check(driver().api().memcpy_to_host_async(lane.pinned->data() + (first - begin),
                                                         staged, last - first, stream_->handle()),
                     "cuMemcpyDtoHAsync");
    }
    lane.busy = events_->record(stream_->handle());
    table_use_ = lane.busy;
  }

  void scatter_plan(const SlotPlan& plan, ConstPacked in, Deadline deadline) {
    if (plan.bytes == 0) return;
    settled([&] {
      const SlotTable table = upload(plan, deadline);
      if (in.where == DeviceKind::cuda) {
        const auto source = reinterpret_cast<DevicePointer>(in.data);
        for (const SlotPlan::Part& part : plan.parts) {
          if (part.address == 0) {
            launch(plan, table, false, source + part.begin, part.begin, part.end);
          } else {
            copy_direct(part, part.begin, part.end, source, 0, false, kMemoryTypeDevice);
          }
        }
      } else {
        for (std::uint64_t begin = 0; begin < plan.bytes; begin += options_.lane_bytes) {
          Lane& lane = lanes_[begin / options_.lane_bytes % lanes_.size()];
          send(plan, table, lane, in.data, begin, std::min(plan.bytes, begin + options_.lane_bytes),
               deadline);
        }
      }
      note_last();
    });
  }

  // Starts to bring the packed bytes [begin, end) to their places.
  void send(const SlotPlan& plan, const SlotTable& table, Lane& lane, const std::byte* packed,
            std::uint64_t begin, std::uint64_t end, Deadline deadline) {
    await(lane.busy, deadline, "earlier copies of slots");
    std::memcpy(lane.pinned->data(), packed + begin, end - begin);
    for (const SlotPlan::Part& part : plan.parts) {
      const std::uint64_t first = std::max(begin, part.begin);
      const std::uint64_t last = std::min(end, part.end);
      if (first >= last) continue;
      if (part.address != 0) {
        copy_direct(part, first, last, reinterpret_cast<DevicePointer>(lane.pinned->data()), begin,
                    false, kMemoryTypeHost);
        continue;
      }
      const DevicePointer staged = lane.device->pointer() + (first - begin);
      driver().check(
          driver().api().memcpy_to_device_async(staged, lane.pinned->data() + (first - begin),
                                                last - first, stream_->handle()),
          "cuMemcpyHtoDAsync");
      launch(plan, table, false, staged, first, last);
    }
    lane.busy = events_->record(stream_->handle());
  }

  std::uint32_t sum(DevicePointer bytes, std::size_t size, std::uint32_t seed, Deadline deadline) {
    while (size != 0) {
      const CrcArgs piece = crc_->start(bytes, size, stream_->handle());
      note_last();
      await(last_, deadline, "summing slots");
      seed = crc_->join(piece, seed);
      bytes += piece.size;
      size -= piece.size;
    }
    return seed;
  }

  const std::shared_ptr<const SlotKernels> kernels_;
  const Options options_;
  std::shared_ptr<EventPool> events_;
  std::unique_ptr<OwnStream> stream_;
  std::vector<Lane> lanes_;
  std::unique_ptr<Tables> tables_;
  std::unique_ptr<DeviceCrc> crc_;
  std::shared_ptr<Event> table_use_;  // behind the last use of the tables
  std::shared_ptr<Event> last_;       // behind everything that was given to the stream
};

CudaSlotCopier::CudaSlotCopier(std::shared_ptr<const PrimaryContext> context)
    : CudaSlotCopier(std::move(context), Options()) {}
CudaSlotCopier::CudaSlotCopier(std::shared_ptr<const PrimaryContext> context,
                               const Options& options)
    : CudaSlotCopier(SlotKernels::of(context), options) {}
CudaSlotCopier::CudaSlotCopier(std::shared_ptr<const SlotKernels> kernels, const Options& options)
    : impl_(std::make_unique<Impl>(std::move(kernels), options)) {}
CudaSlotCopier::~CudaSlotCopier() = default;

std::uint32_t CudaSlotCopier::gather(std::span<const LayerSlots> slots, Packed out, bool checksum,
                                     std::uint32_t seed, Deadline deadline) {
  return impl_->gather(slots, out, checksum, seed, deadline);
}
void CudaSlotCopier::scatter(std::span<const LayerSlots> slots, ConstPacked in, Deadline deadline) {
  impl_->scatter(slots, in, deadline);
}
void CudaSlotCopier::scatter_part(const BlockLayout& layout, const LayerMemory& memory,
                                  SlotRange range, ConstPacked in, SlotRange part,
                                  Deadline deadline) {
  impl_->scatter_part(layout, memory, range, in, part, deadline);
}
std::uint32_t CudaSlotCopier::digest(const LayerSlots& slots, std::uint32_t seed,
                                     Deadline deadline) {
  return impl_->digest(slots, seed, deadline);
}
void CudaSlotCopier::finish(Deadline deadline) {
  impl_->finish(deadline);
}
void CudaSlotCopier::gather_async(std::span<const LayerSlots> slots, DevicePointer out,
                                  std::size_t bytes, Deadline deadline) {
  impl_->gather_async(slots, out, bytes, deadline);
}
void CudaSlotCopier::scatter_async(std::span<const LayerSlots> slots, DevicePointer in,
                                   std::size_t bytes, Deadline deadline) {
  impl_->scatter_async(slots, in, bytes, deadline);
}
std::uint32_t CudaSlotCopier::crc(DevicePointer bytes, std::size_t size, std::uint32_t seed,
                                  Deadline deadline) {
  return impl_->crc(bytes, size, seed, deadline);
}
std::uint32_t CudaSlotCopier::crc(ConstPacked bytes, std::uint32_t seed, Deadline deadline) {
  if (bytes.where == DeviceKind::host) return SlotCopier::crc(bytes, seed, deadline);
  return impl_->crc(reinterpret_cast<DevicePointer>(bytes.data), bytes.bytes, seed, deadline);
}
void CudaSlotCopier::copy(Packed out, ConstPacked in, Deadline deadline) {
  impl_->copy(out, in, deadline);
}
std::optional<Stream> CudaSlotCopier::work_stream() const noexcept {
  return Stream{impl_->stream()};
}
bool CudaSlotCopier::idle() const noexcept {
  return impl_->idle();
}
StreamHandle CudaSlotCopier::stream() const noexcept {
  return impl_->stream();
}
void CudaSlotCopier::wait_for(EventHandle event) {
  impl_->wait_for(event);
}
const PrimaryContext& CudaSlotCopier::context() const noexcept {
  return impl_->context();
}

}  // namespace pipelive::cuda

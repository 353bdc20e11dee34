// The stand-in for libcuda: plain memory, pinned memory and virtual memory management.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cstdlib>
#include <cstring>

#include "fake_driver.hpp"
#include "fake_state.hpp"

namespace pipelive::cuda {
namespace fake {
namespace {

void* host(DevicePointer pointer) {
  return reinterpret_cast<void*>(pointer);
}

bool aligned(std::uint64_t value) {
  return value % state().granularity == 0;
}

Reservation* reservation_of(DevicePointer pointer, std::size_t bytes) {
  auto above = state().reservations.upper_bound(pointer);
  if (above == state().reservations.begin()) return nullptr;
  --above;
  const DevicePointer offset = pointer - above->first;
  if (offset >= above->second.bytes || bytes > above->second.bytes - offset) return nullptr;
  return &above->second;
}

template <typename Blocks>
const std::size_t* block_of(const Blocks& blocks, DevicePointer pointer, std::size_t bytes) {
  auto above = blocks.upper_bound(pointer);
  if (above == blocks.begin()) return nullptr;
  --above;
  const DevicePointer offset = pointer - above->first;
  return offset < above->second && bytes <= above->second - offset ? &above->second : nullptr;
}

/// Puts an inaccessible mapping over the range: it stays reserved.
void cover(DevicePointer pointer, std::size_t bytes) {
  ::mmap(host(pointer), bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED,
         -1, 0);
}

/// The mapping that begins at `pointer` and those that follow it without a gap, if they are exactly
/// the range; an empty result otherwise.
std::vector<std::map<DevicePointer, Mapping>::iterator> whole_mappings(Reservation& reservation,
                                                                       DevicePointer pointer,
                                                                       std::size_t bytes) {
  std::vector<std::map<DevicePointer, Mapping>::iterator> found;
  DevicePointer end = pointer;
  auto at = reservation.mappings.find(pointer);
  for (; at != reservation.mappings.end() && at->first == end && end < pointer + bytes; ++at) {
    found.push_back(at);
    end += at->second.bytes;
  }
  if (end != pointer + bytes) found.clear();
  return found;
}

bool valid(const AllocationProperties& properties) {
  return properties.type == MemoryAllocationType::pinned &&
         properties.location.type == MemoryLocationType::device && properties.location.id >= 0 &&
         properties.location.id < state().device_count &&
         (properties.handle_types == ShareableHandleType::none ||
          properties.handle_types == ShareableHandleType::posix_fd) &&
         properties.flags.compression_type == 0 && properties.flags.usage == 0;
}

// Handles are numbers that look like nothing in particular, as the driver's are.
AllocationHandle new_handle(std::shared_ptr<Allocation> allocation) {
  const AllocationHandle handle = 0xC0DE'0000'0000'0000 + 0x9E37'79B9 * ++state().next_handle;
  ++allocation->handles;
  state().handles[handle] = std::move(allocation);
  return handle;
}

}  // namespace

Allocation::~Allocation() {
  if (fd >= 0) ::close(fd);
}

bool is_device_address(DevicePointer pointer) {
  return reservation_of(pointer, 0) != nullptr || block_of(state().buffers, pointer, 0) != nullptr;
}

bool device_memory(DevicePointer pointer, std::size_t bytes, bool write) {
  if (block_of(state().buffers, pointer, bytes) != nullptr) return true;
  Reservation* reservation = reservation_of(pointer, bytes);
  if (reservation == nullptr) return false;
  DevicePointer end = pointer;
  auto at = reservation->mappings.upper_bound(pointer);
  if (at == reservation->mappings.begin()) return false;
  for (--at; at != reservation->mappings.end() && end < pointer + bytes; ++at) {
    const Mapping& mapping = at->second;
    if (at->first > end || end >= at->first + mapping.bytes) return false;
    if (mapping.access == MemoryAccess::none) return false;
    if (write && mapping.access != MemoryAccess::read_write) return false;
    end = at->first + mapping.bytes;
  }
  return end >= pointer + bytes;
}

std::size_t used_bytes(int device) {
  std::set<const Allocation*> counted;
  std::size_t bytes = 0;
  const auto add = [&](const Allocation& allocation) {
    if (allocation.device == device && !allocation.imported && counted.insert(&allocation).second) {
      bytes += allocation.bytes;
    }
  };
  for (const auto& [handle, allocation] : state().handles) add(*allocation);
  for (const auto& [start, reservation] : state().reservations) {
    for (const auto& [at, mapping] : reservation.mappings) add(*mapping.allocation);
  }
  for (const auto& [start, size] : state().buffers) bytes += size;
  return bytes;
}

void note_used(int device) {
  std::size_t& most = state().most_used[device];
  most = std::max(most, used_bytes(device));
}

void release_all_memory() {
  State& s = state();
  for (const auto& [start, reservation] : s.reservations) ::munmap(host(start), reservation.bytes);
  for (const auto& [start, bytes] : s.buffers) std::free(host(start));
  for (const auto& [start, bytes] : s.pinned) {
    if (bytes > 0) std::free(reinterpret_cast<void*>(start));
  }
  s.reservations.clear();
  s.buffers.clear();
  s.pinned.clear();
  s.handles.clear();
}

}  // namespace fake

using fake::Allocation;
using fake::enter;
using fake::enter_context;
using fake::host;
using fake::Mapping;
using fake::mistake;
using fake::Reservation;
using fake::state;
using Lock = std::lock_guard<std::recursive_mutex>;

FAKE_EXPORT Result cuMemAlloc_v2(DevicePointer* pointer, std::size_t bytes) {
  const Lock lock(state().mutex);
  if (const Result result = enter_context("cuMemAlloc")) return result;
  if (bytes == 0) return kInvalidValue;
  constexpr std::size_t kAlignment = 512;
  if (bytes > state().total_bytes - fake::used_bytes(fake::current_device())) return kOutOfMemory;
  void* memory = std::aligned_alloc(kAlignment, (bytes + kAlignment - 1) / kAlignment * kAlignment);
  if (memory == nullptr) return kOutOfMemory;
  std::memset(memory, kFakePoison, bytes);
  *pointer = reinterpret_cast<std::uintptr_t>(memory);
  state().buffers[*pointer] = bytes;
  fake::note_used(fake::current_device());
  return kSuccess;
}

FAKE_EXPORT Result cuMemFree_v2(DevicePointer pointer) {
  const Lock lock(state().mutex);
  if (const Result result = enter_context("cuMemFree")) return result;
  if (state().buffers.erase(pointer) == 0) {
    mistake("cuMemFree of what was not allocated");
    return kInvalidValue;
  }
  std::free(host(pointer));
  return kSuccess;
}

FAKE_EXPORT Result cuMemGetInfo_v2(std::size_t* free, std::size_t* total) {
  const Lock lock(state().mutex);
  if (const Result result = enter_context("cuMemGetInfo")) return result;
  *total = state().total_bytes;
  *free = *total - fake::used_bytes(fake::current_device());
  return kSuccess;
}

FAKE_EXPORT Result cuMemGetAddressRange_v2(DevicePointer* base, std::size_t* bytes,
                                           DevicePointer pointer) {
  const Lock lock(state().mutex);
  for (const auto& [start, size] : state().buffers) {
    if (pointer >= start && pointer < start + size) {
      if (base != nullptr) *base = start;
      if (bytes != nullptr) *bytes = size;
      return kSuccess;
    }
  }
  return kNotFound;
}

FAKE_EXPORT Result cuPointerGetAttribute(void* value, PointerAttribute attribute,
                                         DevicePointer pointer) {
  const Lock lock(state().mutex);
  const bool device = fake::is_device_address(pointer);
  const bool pinned = fake::block_of(state().pinned, pointer, 0) != nullptr;
  if (!device && !pinned) return kInvalidValue;
  switch (attribute) {
    case PointerAttribute::memory_type:
      *static_cast<unsigned*>(value) = device ? kMemoryTypeDevice : kMemoryTypeHost;
      return kSuccess;
    case PointerAttribute::device_ordinal:
      *static_cast<int*>(value) = 0;
      return kSuccess;
    case PointerAttribute::device_pointer:
      *static_cast<DevicePointer*>(value) = pointer;
      return kSuccess;
    case PointerAttribute::mapped:
      *static_cast<int*>(value) = fake::device_memory(pointer, 1, false) ? 1 : 0;
      return kSuccess;
    case PointerAttribute::is_managed:
      *static_cast<int*>(value) = 0;
      return kSuccess;
    case PointerAttribute::is_legacy_ipc_capable:
      *static_cast<int*>(value) = state().buffers.contains(pointer) ? 1 : 0;
      return kSuccess;
    default:
      return kNotSupported;
  }
}

FAKE_EXPORT Result cuMemHostAlloc(void** pointer, std::size_t bytes, unsigned flags) {
  const Lock lock(state().mutex);
  if (const Result result = enter_context("cuMemHostAlloc")) return result;
  if (bytes == 0 || flags > 7) return kInvalidValue;
  constexpr std::size_t kAlignment = 4096;
  *pointer = std::aligned_alloc(kAlignment, (bytes + kAlignment - 1) / kAlignment * kAlignment);
  if (*pointer == nullptr) return kOutOfMemory;
  state().pinned[reinterpret_cast<std::uintptr_t>(*pointer)] = bytes;
  return kSuccess;
}

FAKE_EXPORT Result cuMemFreeHost(void* pointer) {
  const Lock lock(state().mutex);
  if (const Result result = enter_context("cuMemFreeHost")) return result;
  if (state().pinned.erase(reinterpret_cast<std::uintptr_t>(pointer)) == 0) {
    mistake("cuMemFreeHost of what was not allocated");
    return kInvalidValue;
  }
  std::free(pointer);
  return kSuccess;
}

// Registered memory is kept with size 0: it is not ours to free.
FAKE_EXPORT Result cuMemHostRegister_v2(void* pointer, std::size_t bytes, unsigned /*flags*/) {
  const Lock lock(state().mutex);
  if (const Result result = enter_context("cuMemHostRegister")) return result;
  if (pointer == nullptr || bytes == 0) return kInvalidValue;
  return state().pinned.emplace(reinterpret_cast<std::uintptr_t>(pointer), 0).second
             ? kSuccess
             : kHostMemoryAlreadyRegistered;
}

FAKE_EXPORT Result cuMemHostUnregister(void* pointer) {
  const Lock lock(state().mutex);
  if (const Result result = enter_context("cuMemHostUnregister")) return result;
  if (state().pinned.erase(reinterpret_cast<std::uintptr_t>(pointer)) == 0) {
    mistake("cuMemHostUnregister of what was not registered");
    return kHostMemoryNotRegistered;
  }
  return kSuccess;
}

FAKE_EXPORT Result cuMemHostGetDevicePointer_v2(DevicePointer* device, void* pointer,
                                                unsigned flags) {
  *device = reinterpret_cast<std::uintptr_t>(pointer);
  return flags == 0 ? kSuccess : kInvalidValue;
}

FAKE_EXPORT Result cuMemAddressReserve(DevicePointer* pointer, std::size_t bytes,
                                       std::size_t alignment, DevicePointer hint,
                                       unsigned long long flags) {
  const Lock lock(state().mutex);
  if (const Result result = enter_context("cuMemAddressReserve")) return result;
  if (bytes == 0 || !fake::aligned(bytes) || hint != 0 || flags != 0 ||
      (alignment != 0 && !std::has_single_bit(alignment))) {
    return kInvalidValue;
  }
  alignment = std::max(alignment, state().granularity);
  // Too much is mapped and the ends are given back, which is how one gets an alignment from mmap.
  void* raw = ::mmap(nullptr, bytes + alignment, PROT_NONE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (raw == MAP_FAILED) return kOutOfMemory;
  const auto first = reinterpret_cast<std::uintptr_t>(raw);
  const std::uintptr_t start = (first + alignment - 1) / alignment * alignment;
  if (start > first) ::munmap(raw, start - first);
  if (first + alignment > start) ::munmap(host(start + bytes), first + alignment - start);
  state().reservations[start].bytes = bytes;
  *pointer = start;
  return kSuccess;
}

FAKE_EXPORT Result cuMemAddressFree(DevicePointer pointer, std::size_t bytes) {
  const Lock lock(state().mutex);
  if (const Result result = enter_context("cuMemAddressFree")) return result;
  const auto found = state().reservations.find(pointer);
  if (found == state().reservations.end() || found->second.bytes != bytes) {
    mistake("cuMemAddressFree of what was not reserved so");
    return kInvalidValue;
  }
  if (!found->second.mappings.empty()) {
    mistake("cuMemAddressFree while something is mapped");
    return kInvalidValue;
  }
  ::munmap(host(pointer), bytes);
  state().reservations.erase(found);
  return kSuccess;
}

FAKE_EXPORT Result cuMemGetAllocationGranularity(std::size_t* bytes,
                                                 const AllocationProperties* properties,
                                                 Granularity /*option*/) {
  const Lock lock(state().mutex);
  if (!fake::valid(*properties)) return kInvalidValue;
  *bytes = state().granularity;
  return kSuccess;
}

FAKE_EXPORT Result cuMemCreate(AllocationHandle* handle, std::size_t bytes,
                               const AllocationProperties* properties, unsigned long long flags) {
  const Lock lock(state().mutex);
  if (const Result result = enter_context("cuMemCreate")) return result;
  if (bytes == 0 || !fake::aligned(bytes) || flags != 0 || !fake::valid(*properties)) {
    return kInvalidValue;
  }
  if (bytes > state().total_bytes - fake::used_bytes(properties->location.id)) return kOutOfMemory;
  auto allocation = std::make_shared<Allocation>();
  allocation->fd = ::memfd_create("fake_cuda", MFD_CLOEXEC);
  if (allocation->fd < 0 || ::ftruncate(allocation->fd, static_cast<off_t>(bytes)) != 0) {
    return kOutOfMemory;
  }
  void* window = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, allocation->fd, 0);
  if (window == MAP_FAILED) return kOutOfMemory;
  std::memset(window, kFakePoison, bytes);
  ::munmap(window, bytes);
  allocation->bytes = bytes;
  allocation->device = properties->location.id;
  allocation->exportable = properties->handle_types == ShareableHandleType::posix_fd;
  *handle = fake::new_handle(std::move(allocation));
  fake::note_used(properties->location.id);
  return kSuccess;
}

FAKE_EXPORT Result cuMemRelease(AllocationHandle handle) {
  const Lock lock(state().mutex);
  if (const Result result = enter_context("cuMemRelease")) return result;
  const auto found = state().handles.find(handle);
  if (found == state().handles.end()) {
    mistake("cuMemRelease of a handle that does not exist");
    return kInvalidValue;
  }
  // The driver allows this and frees the memory later; ours never should.
  if (found->second->mappings > 0) mistake("cuMemRelease while the memory is mapped");
  --found->second->handles;
  state().handles.erase(found);
  return kSuccess;
}

FAKE_EXPORT Result cuMemRetainAllocationHandle(AllocationHandle* handle, void* address) {
  const Lock lock(state().mutex);
  if (const Result result = enter_context("cuMemRetainAllocationHandle")) return result;
  const auto pointer = reinterpret_cast<DevicePointer>(address);
  Reservation* reservation = fake::reservation_of(pointer, 1);
  if (reservation == nullptr) return kInvalidValue;
  for (const auto& [start, mapping] : reservation->mappings) {
    if (pointer >= start && pointer < start + mapping.bytes) {
      *handle = fake::new_handle(mapping.allocation);
      return kSuccess;
    }
  }
  return kInvalidValue;
}

FAKE_EXPORT Result cuMemMap(DevicePointer pointer, std::size_t bytes, std::size_t offset,
                            AllocationHandle handle, unsigned long long flags) {
  const Lock lock(state().mutex);
  if (const Result result = enter_context("cuMemMap")) return result;
  const auto found = state().handles.find(handle);
  if (found == state().handles.end() || flags != 0 || offset != 0 || bytes == 0 ||
      !fake::aligned(pointer) || !fake::aligned(bytes) || bytes > found->second->bytes) {
    return kInvalidValue;
  }
  Reservation* reservation = fake::reservation_of(pointer, bytes);
  if (reservation == nullptr) {
    mistake("cuMemMap of addresses that are not reserved");
    return kInvalidValue;
  }
  for (const auto& [start, mapping] : reservation->mappings) {
    if (start < pointer + bytes && pointer < start + mapping.bytes) {
      mistake("cuMemMap over a mapping");
      return kInvalidValue;
    }
  }
  if (::mmap(host(pointer), bytes, PROT_NONE, MAP_SHARED | MAP_FIXED, found->second->fd, 0) ==
      MAP_FAILED) {
    return kOutOfMemory;
  }
  ++found->second->mappings;
  reservation->mappings[pointer] = {bytes, found->second, MemoryAccess::none};
  return kSuccess;
}

FAKE_EXPORT Result cuMemUnmap(DevicePointer pointer, std::size_t bytes) {
  const Lock lock(state().mutex);
  if (const Result result = enter_context("cuMemUnmap")) return result;
  Reservation* reservation = fake::reservation_of(pointer, bytes);
  const auto mappings = reservation == nullptr
                            ? std::vector<std::map<DevicePointer, Mapping>::iterator>{}
                            : fake::whole_mappings(*reservation, pointer, bytes);
  if (mappings.empty()) {
    mistake("cuMemUnmap of what is not whole mappings");
    return kInvalidValue;
  }
  fake::cover(pointer, bytes);
  for (const auto& mapping : mappings) {
    --mapping->second.allocation->mappings;
    reservation->mappings.erase(mapping);
  }
  return kSuccess;
}

FAKE_EXPORT Result cuMemSetAccess(DevicePointer pointer, std::size_t bytes,
                                  const AccessDescriptor* descriptors, std::size_t count) {
  const Lock lock(state().mutex);
  if (const Result result = enter_context("cuMemSetAccess")) return result;
  Reservation* reservation = fake::reservation_of(pointer, bytes);
  const auto mappings = reservation == nullptr
                            ? std::vector<std::map<DevicePointer, Mapping>::iterator>{}
                            : fake::whole_mappings(*reservation, pointer, bytes);
  if (mappings.empty() || count != 1 || descriptors == nullptr ||
      descriptors->location.type != MemoryLocationType::device || descriptors->location.id < 0 ||
      descriptors->location.id >= state().device_count) {
    mistake("cuMemSetAccess of what is not whole mappings, or for no device");
    return kInvalidValue;
  }
  const MemoryAccess access = descriptors->access;
  const int protection = access == MemoryAccess::read_write ? PROT_READ | PROT_WRITE
                         : access == MemoryAccess::read     ? PROT_READ
                                                            : PROT_NONE;
  if (::mprotect(host(pointer), bytes, protection) != 0) return kOutOfMemory;
  for (const auto& mapping : mappings) mapping->second.access = access;
  return kSuccess;
}

FAKE_EXPORT Result cuMemExportToShareableHandle(void* shareable, AllocationHandle handle,
                                                ShareableHandleType type,
                                                unsigned long long flags) {
  const Lock lock(state().mutex);
  if (const Result result = enter_context("cuMemExportToShareableHandle")) return result;
  const auto found = state().handles.find(handle);
  if (found == state().handles.end() || type != ShareableHandleType::posix_fd || flags != 0 ||
      !found->second->exportable) {
    return kInvalidValue;
  }
  *static_cast<int*>(shareable) = ::dup(found->second->fd);
  return kSuccess;
}

FAKE_EXPORT Result cuMemImportFromShareableHandle(AllocationHandle* handle, void* shareable,
                                                  ShareableHandleType type) {
  const Lock lock(state().mutex);
  if (const Result result = enter_context("cuMemImportFromShareableHandle")) return result;
  const int fd = static_cast<int>(reinterpret_cast<std::intptr_t>(shareable));
  struct stat status{};
  if (type != ShareableHandleType::posix_fd || ::fstat(fd, &status) != 0 ||
      !fake::aligned(static_cast<std::uint64_t>(status.st_size)) || status.st_size == 0) {
    return kInvalidValue;
  }
  auto allocation = std::make_shared<Allocation>();
  allocation->fd = state().import_other ? ::memfd_create("other", MFD_CLOEXEC) : ::dup(fd);
  allocation->bytes = static_cast<std::size_t>(status.st_size);
  if (state().import_other && ::ftruncate(allocation->fd, status.st_size) != 0) {
    return kOutOfMemory;
  }
  allocation->imported = true;
  allocation->exportable = true;
  *handle = fake::new_handle(std::move(allocation));
  return kSuccess;
}

// Of the older kind of sharing, which the fake has not.
FAKE_EXPORT Result cuIpcGetMemHandle(IpcMemoryHandle* /*handle*/, DevicePointer /*pointer*/) {
  return kNotSupported;
}
FAKE_EXPORT Result cuIpcOpenMemHandle_v2(DevicePointer* /*pointer*/, IpcMemoryHandle /*handle*/,
                                         unsigned /*flags*/) {
  return kNotSupported;
}
FAKE_EXPORT Result cuIpcCloseMemHandle(DevicePointer /*pointer*/) {
  return kNotSupported;
}
FAKE_EXPORT Result cuIpcGetEventHandle(IpcEventHandle* /*handle*/, EventHandle /*event*/) {
  return kNotSupported;
}
FAKE_EXPORT Result cuIpcOpenEventHandle(EventHandle* /*event*/, IpcEventHandle /*handle*/) {
  return kNotSupported;
}

}  // namespace pipelive::cuda

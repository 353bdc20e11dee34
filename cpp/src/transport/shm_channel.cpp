#include "pipelive/transport/shm_channel.hpp"

#include <fcntl.h>
#include <linux/futex.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <ctime>
#include <limits>
#include <string>

#include "pipelive/base/error.hpp"

namespace pipelive {

// Everything two processes share besides the rings' bytes. Counters grow for ever and never wrap.
struct ShmRing {
  alignas(64) std::atomic<std::uint64_t> head{0};
  std::atomic<std::uint32_t> data_signal{0};  // futex: bumped when head moves
  alignas(64) std::atomic<std::uint64_t> tail{0};
  std::atomic<std::uint32_t> space_signal{0};  // futex: bumped when tail moves
  alignas(64) std::atomic<std::uint32_t> consumer_waits{0};
  alignas(64) std::atomic<std::uint32_t> producer_waits{0};
};

struct ShmControl {
  alignas(64) std::atomic<std::uint32_t> state[2];  // of each side; see kOpen and the others
  ShmRing ring[2];                                  // ring[s] carries what side s sends
};

namespace {

static_assert(std::atomic<std::uint64_t>::is_always_lock_free &&
              sizeof(std::atomic<std::uint32_t>) == 4);

constexpr std::size_t kControlBytes = 4096;
static_assert(sizeof(ShmControl) <= kControlBytes);
constexpr std::size_t kFrameHeader = 64;
constexpr std::uint32_t kOpen = 0;
constexpr std::uint32_t kClosed = 1;
constexpr std::uint32_t kCancelled = 2;
constexpr int kSpins = 256;
constexpr std::chrono::nanoseconds kSlice = std::chrono::milliseconds(10);
constexpr int kSeals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;

// Written before each message; the complement tells a length from stray bytes.
struct Frame {
  std::uint64_t bytes = 0;
  std::uint64_t complement = 0;
};

std::uint64_t framed(std::size_t bytes) {
  return kFrameHeader + (bytes + kFrameHeader - 1) / kFrameHeader * kFrameHeader;
}

void futex_wait(std::atomic<std::uint32_t>& word, std::uint32_t expected,
                std::chrono::nanoseconds most) noexcept {
  timespec time{};
  time.tv_sec = static_cast<time_t>(most.count() / 1'000'000'000);
  time.tv_nsec = static_cast<long>(most.count() % 1'000'000'000);
  // Every outcome (woken, value changed, timed out, interrupted) is answered by looking again.
  syscall(SYS_futex, reinterpret_cast<std::uint32_t*>(&word), FUTEX_WAIT, expected, &time, nullptr,
          0);
}

void futex_wake(std::atomic<std::uint32_t>& word) noexcept {
  syscall(SYS_futex, reinterpret_cast<std::uint32_t*>(&word), FUTEX_WAKE,
          std::numeric_limits<int>::max(), nullptr, nullptr, 0);
}

// Tells the other end that a counter has moved. The order (counter, signal, flag) against the
// waiter's (flag, counter, sleep on the signal's old value) leaves no wake-up lost.
void announce(std::atomic<std::uint32_t>& signal, std::atomic<std::uint32_t>& waits) noexcept {
  signal.fetch_add(1, std::memory_order_seq_cst);
  if (waits.load(std::memory_order_seq_cst) != 0) futex_wake(signal);
}

void relax() noexcept {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

}  // namespace

UniqueFd ShmChannel::create_memory(std::size_t ring_bytes) {
  constexpr std::size_t kLargest = std::size_t{1} << 40;
  if (ring_bytes == 0 || ring_bytes > kLargest) {
    throw Error(ErrorCode::invalid_argument, "ring_bytes is " + std::to_string(ring_bytes) +
                                                 ", expected 1 to " + std::to_string(kLargest));
  }
  const std::size_t page = kControlBytes;
  const std::size_t ring = (ring_bytes + page - 1) / page * page;
  UniqueFd memory(memfd_create("pipelive-channel", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (!memory.valid()) throw_errno("memfd_create", errno);
  if (ftruncate(memory.get(), static_cast<off_t>(kControlBytes + 2 * ring)) != 0) {
    throw_errno("ftruncate of a channel's memfd", errno);
  }
  if (fcntl(memory.get(), F_ADD_SEALS, kSeals) != 0) throw_errno("fcntl(F_ADD_SEALS)", errno);
  return memory;
}

ShmChannel::ShmChannel(UniqueFd socket, UniqueFd memory, int side)
    : socket_(std::move(socket)), side_(side) {
  if (side != 0 && side != 1) {
    throw Error(ErrorCode::invalid_argument,
                "side is " + std::to_string(side) + ", expected 0 or 1");
  }
  const int seals = fcntl(memory.get(), F_GET_SEALS);
  struct stat status{};
  if (seals < 0 || fstat(memory.get(), &status) != 0) {
    throw Error(ErrorCode::protocol, "the channel's memory is not a memfd that can be sealed");
  }
  if ((seals & kSeals) != kSeals) {
    throw Error(ErrorCode::protocol,
                "the channel's memory carries the seals " + std::to_string(seals) + ", expected " +
                    std::to_string(kSeals) + ": it could be cut short while mapped");
  }
  const auto size = static_cast<std::size_t>(status.st_size);
  if (size < 3 * kControlBytes || (size - kControlBytes) % (2 * kControlBytes) != 0) {
    throw Error(ErrorCode::protocol, "the channel's memory has " + std::to_string(size) +
                                         " bytes, which is not a page and two rings");
  }
  ring_bytes_ = (size - kControlBytes) / 2;
  mapping_bytes_ = kControlBytes + 4 * ring_bytes_;
  void* const reserved =
      mmap(nullptr, mapping_bytes_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (reserved == MAP_FAILED) throw_errno("mmap of a channel's addresses", errno);
  mapping_ = static_cast<std::byte*>(reserved);
  const auto place = [&](std::size_t at, std::size_t bytes, std::size_t offset) {
    if (mmap(mapping_ + at, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, memory.get(),
             static_cast<off_t>(offset)) == MAP_FAILED) {
      const int error = errno;
      munmap(mapping_, mapping_bytes_);
      throw_errno("mmap of a channel's memfd", error);
    }
  };
  place(0, kControlBytes, 0);
  std::byte* rings[2] = {};
  for (std::size_t s = 0; s < 2; ++s) {
    const std::size_t at = kControlBytes + 2 * s * ring_bytes_;
    place(at, ring_bytes_, kControlBytes + s * ring_bytes_);
    place(at + ring_bytes_, ring_bytes_, kControlBytes + s * ring_bytes_);
    rings[s] = mapping_ + at;
  }
  // A fresh memfd is all zeros, which is the initial state of every field.
  control_ = reinterpret_cast<ShmControl*>(mapping_);
  out_ = rings[side_];
  in_ = rings[1 - side_];
}

ShmChannel::~ShmChannel() {
  close();
  munmap(mapping_, mapping_bytes_);
}

std::size_t ShmChannel::max_message_bytes() const noexcept {
  return ring_bytes_ - kFrameHeader;
}

void ShmChannel::check_local() const {
  switch (local_.load(std::memory_order_acquire)) {
    case Local::open:
      return;
    case Local::closed:
      throw Error(ErrorCode::closed, "the shm channel was closed here");
    case Local::cancelled:
      throw Error(ErrorCode::cancelled, "the shm channel was cancelled");
  }
}

bool ShmChannel::socket_is_dead() {
  pollfd poller{socket_.get(), POLLIN | POLLRDHUP, 0};
  const int ready = poll(&poller, 1, 0);
  if (ready <= 0) return false;
  if ((poller.revents & (POLLHUP | POLLERR | POLLNVAL | POLLRDHUP)) != 0) return true;
  std::byte stray{};
  const ssize_t got = recv(socket_.get(), &stray, 1, MSG_PEEK | MSG_DONTWAIT);
  if (got > 0) {
    throw Error(ErrorCode::protocol,
                "the peer of a shm channel wrote to the socket, which only tells that it lives");
  }
  return got == 0;
}

void ShmChannel::check_peer() {
  const std::uint32_t state = control_->state[1 - side_].load(std::memory_order_acquire);
  if (state == kCancelled) {
    throw Error(ErrorCode::closed, "the peer of the shm channel cancelled it");
  }
  if (state != kOpen || socket_is_dead()) {
    throw Error(ErrorCode::closed, state == kClosed ? "the peer closed the shm channel"
                                                    : "the peer of the shm channel has gone");
  }
}

template <typename Ready>
bool ShmChannel::wait(std::atomic<std::uint32_t>& signal, std::atomic<std::uint32_t>& waiting,
                      Deadline deadline, const Ready& ready) {
  if (ready()) return true;
  if (!deadline.passed()) {
    for (int spin = 0; spin < kSpins; ++spin) {
      relax();
      if (ready()) return true;
    }
  }
  struct Waiting {
    std::atomic<std::uint32_t>& flag;
    ~Waiting() { flag.store(0, std::memory_order_relaxed); }
  } guard{waiting};
  bool slept = false;
  while (true) {
    const std::uint32_t before = signal.load(std::memory_order_acquire);
    waiting.store(1, std::memory_order_seq_cst);
    std::atomic_thread_fence(std::memory_order_seq_cst);
    check_local();
    if (ready()) return true;
    const bool peer_closed = control_->state[1 - side_].load(std::memory_order_acquire) != kOpen;
    if (slept || peer_closed) {
      try {
        check_peer();
      } catch (const Error& error) {
        // What it published before it went is still there to be read.
        const bool gone = error.code() == ErrorCode::closed;
        if (gone && control_->state[1 - side_].load() != kCancelled && ready()) return true;
        throw;
      }
    }
    const std::chrono::nanoseconds left = deadline.remaining();
    if (left <= std::chrono::nanoseconds::zero()) return false;
    futex_wait(signal, before, std::min(left, kSlice));
    slept = true;
  }
}

std::span<std::byte> ShmChannel::do_acquire(std::size_t bytes, Deadline deadline) {
  check_local();
  const std::uint64_t need = framed(bytes);
  ShmRing& ring = control_->ring[side_];
  const auto room = [&] {
    if (ring_bytes_ - (head_ - seen_tail_) >= need) return true;
    const std::uint64_t tail = ring.tail.load(std::memory_order_acquire);
    if (tail < seen_tail_ || tail > head_) {
      throw Error(ErrorCode::protocol,
                  "the peer of a shm channel says it has read up to byte " + std::to_string(tail) +
                      ", expected " + std::to_string(seen_tail_) + " to " + std::to_string(head_));
    }
    seen_tail_ = tail;
    return ring_bytes_ - (head_ - seen_tail_) >= need;
  };
  if (control_->state[1 - side_].load(std::memory_order_acquire) != kOpen) check_peer();
  if (!wait(ring.space_signal, ring.producer_waits, deadline, room)) {
    throw Error(ErrorCode::timeout, "acquire of " + std::to_string(bytes) +
                                        " bytes on a shm channel: the peer made no room before "
                                        "the deadline");
  }
  return {out_ + head_ % ring_bytes_ + kFrameHeader, bytes};
}

void ShmChannel::do_submit(std::size_t bytes, std::size_t /*bulk_bytes*/, Deadline /*deadline*/) {
  // Against cancel(): when that has returned, nothing may be published any more.
  const std::lock_guard lock(submit_mutex_);
  check_local();
  if (control_->state[1 - side_].load(std::memory_order_acquire) != kOpen) check_peer();
  const Frame frame{bytes, ~static_cast<std::uint64_t>(bytes)};
  std::memcpy(out_ + head_ % ring_bytes_, &frame, sizeof frame);
  head_ += framed(bytes);
  ShmRing& ring = control_->ring[side_];
  ring.head.store(head_, std::memory_order_seq_cst);
  announce(ring.data_signal, ring.consumer_waits);
}

std::optional<std::span<const std::byte>> ShmChannel::do_receive(Deadline deadline) {
  check_local();
  ShmRing& ring = control_->ring[1 - side_];
  const auto more = [&] {
    if (seen_head_ != tail_) return true;
    const std::uint64_t head = ring.head.load(std::memory_order_acquire);
    if (head < seen_head_ || head - tail_ > ring_bytes_ || head % kFrameHeader != 0) {
      throw Error(ErrorCode::protocol, "the peer of a shm channel says it has written up to byte " +
                                           std::to_string(head) + ", read are " +
                                           std::to_string(tail_) + " and the ring has " +
                                           std::to_string(ring_bytes_));
    }
    seen_head_ = head;
    return seen_head_ != tail_;
  };
  if (control_->state[1 - side_].load(std::memory_order_acquire) == kCancelled) check_peer();
  if (!wait(ring.data_signal, ring.consumer_waits, deadline, more)) return std::nullopt;
  check_local();
  const std::byte* const at = in_ + tail_ % ring_bytes_;
  Frame frame;
  std::memcpy(&frame, at, sizeof frame);
  const std::uint64_t available = seen_head_ - tail_;
  if (frame.complement != ~frame.bytes || frame.bytes == 0 ||
      frame.bytes > available - kFrameHeader || framed(frame.bytes) > available) {
    throw Error(ErrorCode::protocol, "a frame of a shm channel claims " +
                                         std::to_string(frame.bytes) + " bytes; " +
                                         std::to_string(available) + " are there");
  }
  frame_ = framed(frame.bytes);
  return std::span<const std::byte>{at + kFrameHeader, frame.bytes};
}

void ShmChannel::do_release() {
  tail_ += frame_;
  frame_ = 0;
  ShmRing& ring = control_->ring[1 - side_];
  ring.tail.store(tail_, std::memory_order_seq_cst);
  announce(ring.space_signal, ring.producer_waits);
}

void ShmChannel::end(Local state) noexcept {
  const std::lock_guard lock(submit_mutex_);
  Local expected = Local::open;
  if (!local_.compare_exchange_strong(expected, state)) {
    // A closed channel can still be cancelled; nothing undoes a cancel.
    if (state != Local::cancelled || expected == Local::cancelled) return;
    local_.store(state);
  }
  control_->state[side_].store(state == Local::cancelled ? kCancelled : kClosed,
                               std::memory_order_seq_cst);
  for (ShmRing& ring : control_->ring) {
    ring.data_signal.fetch_add(1, std::memory_order_seq_cst);
    ring.space_signal.fetch_add(1, std::memory_order_seq_cst);
    futex_wake(ring.data_signal);
    futex_wake(ring.space_signal);
  }
  shutdown(socket_.get(), SHUT_RDWR);
}

void ShmChannel::cancel() noexcept {
  end(Local::cancelled);
}
void ShmChannel::close() noexcept {
  end(Local::closed);
}

}  // namespace pipelive

#include "pipelive/cuda/nccl_comm.hpp"

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <optional>
#include <string>
#include <utility>

namespace pipelive::cuda {
namespace {

// What a caller grants beyond its deadline so that the abort comes through.
constexpr std::chrono::seconds kAbortPatience{3};
// After an abort the kernels end by themselves; no longer than this their memory is waited for.
constexpr std::chrono::seconds kDrainPatience{2};
// A peer that has completed its half may go before this end's half is complete.
constexpr std::chrono::seconds kGoneGrace{1};

}  // namespace

// Shared by the object and its jobs. `comm` belongs to the issuing thread alone.
struct NcclComm::State {
  Place place;
  NcclCommHandle comm = nullptr;
  std::atomic<bool> abort_asked{false};

  std::mutex mutex;  // guards all below
  std::condition_variable changed;
  bool ready = false;
  std::optional<Error> failure;

  void fail(const Error& error) {
    const std::lock_guard lock(mutex);
    if (!failure) failure = error;
    changed.notify_all();
  }
  void check() {
    const std::lock_guard lock(mutex);
    if (failure) throw Error(*failure);
  }
  // In the issuing thread.
  void abort_comm() noexcept {
    if (comm == nullptr) return;
    // Its result says nothing that could be acted upon; the handle is gone either way.
    static_cast<void>(place.nccl->api().comm_abort(comm));
    comm = nullptr;
  }
};

class NcclComm::AbortJob final : public NcclIssuer::Job {
 public:
  explicit AbortJob(std::shared_ptr<State> state) : state_(std::move(state)) {}
  bool step() noexcept override {
    state_->abort_comm();
    return true;
  }

 private:
  std::shared_ptr<State> state_;
};

class NcclComm::InitJob final : public NcclIssuer::Job {
 public:
  InitJob(std::shared_ptr<State> state, const NcclUniqueId& id, int rank, int ranks,
          Deadline deadline)
      : state_(std::move(state)), id_(id), rank_(rank), ranks_(ranks), deadline_(deadline) {}

  bool step() noexcept override {
    const Nccl& nccl = *state_->place.nccl;
    const std::string name =
        "NCCL communicator, rank " + std::to_string(rank_) + " of " + std::to_string(ranks_) + ": ";
    try {
      NcclResult result = kNcclSuccess;
      if (!started_) {
        started_ = true;
        NcclConfig config;
        result = nccl.api().comm_init_rank_config(&state_->comm, ranks_, id_, rank_, &config);
        nccl.check(result, "ncclCommInitRankConfig");
      }
      if (state_->abort_asked.load()) {
        throw Error(ErrorCode::cancelled, "aborted while it came up");
      }
      nccl.check(nccl.api().comm_get_async_error(state_->comm, &result), "ncclCommGetAsyncError");
      nccl.check(result, "ncclCommInitRankConfig", state_->comm);
      if (result == kNcclInProgress) {
        if (!deadline_.passed()) return false;
        throw Error(ErrorCode::timeout,
                    "it did not come up before the deadline; is every rank "
                    "there, and can they reach each other?");
      }
      const std::lock_guard lock(state_->mutex);
      state_->ready = true;
      state_->changed.notify_all();
      return true;
    } catch (const Error& error) {
      state_->abort_comm();
      state_->fail(Error(error.code(), name + error.what()));
    } catch (const std::exception& error) {
      state_->abort_comm();
      state_->fail(Error(ErrorCode::out_of_memory, name + error.what()));
    }
    return true;
  }

 private:
  std::shared_ptr<State> state_;
  NcclUniqueId id_;
  int rank_;
  int ranks_;
  Deadline deadline_;
  bool started_ = false;
};

class NcclComm::TransferJob final : public NcclIssuer::Job {
 public:
  TransferJob(std::shared_ptr<State> state, const std::byte* out, std::byte* in, std::size_t bytes,
              int peer, Deadline deadline, std::shared_ptr<const void> keep, Gone gone)
      : state_(std::move(state)),
        out_(out),
        in_(in),
        bytes_(bytes),
        peer_(peer),
        deadline_(deadline),
        keep_(std::move(keep)),
        gone_(std::move(gone)) {}

  bool step() noexcept override {
    try {
      if (drain_until_) return drained();
      if (!issued_) {
        issue();
        issued_ = true;
      }
      if (!completed()) return false;
      finish(std::nullopt);
      return true;
    } catch (const Error& error) {
      return give_up(Error(error.code(), name() + error.what()));
    } catch (const std::exception& error) {
      return give_up(Error(ErrorCode::out_of_memory, name() + error.what()));
    }
  }

  // Guarded by the state's mutex.
  bool done = false;

  [[nodiscard]] std::string name() const {
    return std::string("NCCL transfer (") + (out_ != nullptr ? "send" : "") +
           (out_ != nullptr && in_ != nullptr ? ", " : "") + (in_ != nullptr ? "receive" : "") +
           " of " + std::to_string(bytes_) + " bytes, rank " + std::to_string(peer_) + "): ";
  }

 private:
  void issue() {
    if (state_->abort_asked.load())
      throw Error(ErrorCode::cancelled, "the communicator was aborted");
    state_->check();
    const Nccl& nccl = *state_->place.nccl;
    const NcclApi& api = nccl.api();
    void* const stream = state_->place.stream.handle;
    const bool group = out_ != nullptr && in_ != nullptr;
    if (group) nccl.check(api.group_start(), "ncclGroupStart");
    NcclResult result = kNcclSuccess;
    std::string_view call = "ncclSend";
    if (out_ != nullptr) result = api.send(out_, bytes_, kNcclUint8, peer_, state_->comm, stream);
    if (in_ != nullptr && (result == kNcclSuccess || result == kNcclInProgress)) {
      call = "ncclRecv";
      result = api.recv(in_, bytes_, kNcclUint8, peer_, state_->comm, stream);
    }
    // A group that was opened is closed whatever happened inside.
    const NcclResult end = group ? api.group_end() : kNcclSuccess;
    nccl.check(result, call, state_->comm);
    nccl.check(end, "ncclGroupEnd", state_->comm);
  }

  bool completed() {
    if (state_->abort_asked.load())
      throw Error(ErrorCode::cancelled, "the communicator was aborted");
    const Nccl& nccl = *state_->place.nccl;
    NcclResult result = kNcclSuccess;
    nccl.check(nccl.api().comm_get_async_error(state_->comm, &result), "ncclCommGetAsyncError");
    nccl.check(result, "asynchronous error", state_->comm);
    if (result == kNcclSuccess) {
      // Only now is it in the stream.
      if (!event_) event_ = state_->place.device->record(state_->place.stream);
      if (event_->done()) return true;
    }
    if (gone_ && !gone_at_ && gone_()) gone_at_ = Deadline::after(kGoneGrace);
    if (gone_at_ && gone_at_->passed()) {
      throw Error(ErrorCode::closed, "the peer has gone");
    }
    if (deadline_.passed()) {
      throw Error(ErrorCode::timeout,
                  std::string("not complete at the deadline (") +
                      (event_ ? "it waits on the device" : "NCCL has not launched it") +
                      "); NCCL work issued in another order at the two ends waits for ever");
    }
    return false;
  }

  bool give_up(const Error& error) noexcept {
    state_->fail(error);
    const bool was_up = state_->comm != nullptr;
    state_->abort_comm();
    if (!was_up || !issued_) {
      finish(error);
      return true;
    }
    failure_ = error;
    drain_until_ = Deadline::after(kDrainPatience);
    return drained();
  }

  // The aborted kernels end by themselves; until then they may touch the memory.
  bool drained() noexcept {
    bool over = drain_until_->passed();
    try {
      if (!event_) event_ = state_->place.device->record(state_->place.stream);
      over = event_->done() || over;
    } catch (const std::exception&) {
      over = true;  // nothing runs on a device that has failed
    }
    if (over) finish(failure_);
    return over;
  }

  void finish(std::optional<Error> failure) noexcept {
    const std::lock_guard lock(state_->mutex);
    if (failure && !state_->failure) state_->failure = std::move(failure);
    done = true;
    state_->changed.notify_all();
  }

  std::shared_ptr<State> state_;
  const std::byte* out_;
  std::byte* in_;
  std::size_t bytes_;
  int peer_;
  Deadline deadline_;
  std::shared_ptr<const void> keep_;
  Gone gone_;
  bool issued_ = false;
  std::shared_ptr<Event> event_;
  std::optional<Deadline> gone_at_;
  std::optional<Deadline> drain_until_;
  std::optional<Error> failure_;
};

NcclComm::NcclComm(Place place, const NcclUniqueId& id, int rank, int ranks, Deadline deadline)
    : rank_(rank), ranks_(ranks), state_(std::make_shared<State>()) {
  if (ranks < 1 || rank < 0 || rank >= ranks) {
    throw Error(ErrorCode::invalid_argument,
                "rank is " + std::to_string(rank) + " of " + std::to_string(ranks) + " ranks");
  }
  issuer_ = std::move(place.issuer);
  state_->place = std::move(place);
  issuer_->add(std::make_shared<InitJob>(state_, id, rank, ranks, deadline));
  std::unique_lock lock(state_->mutex);
  const auto until = deadline.at() + kAbortPatience;
  if (!state_->changed.wait_until(lock, until, [&] { return state_->ready || state_->failure; })) {
    state_->abort_asked.store(true);
    throw Error(ErrorCode::timeout, "NCCL communicator: the issuing thread did not come back " +
                                        std::string("from NCCL before the deadline"));
  }
  if (state_->failure) throw Error(*state_->failure);
}

NcclComm::~NcclComm() {
  abort();
}

const std::shared_ptr<Device>& NcclComm::device() const noexcept {
  return state_->place.device;
}
Stream NcclComm::stream() const noexcept {
  return state_->place.stream;
}

void NcclComm::abort() noexcept {
  if (state_->abort_asked.exchange(true)) return;
  state_->fail(Error(ErrorCode::cancelled, "the NCCL communicator was aborted"));
  // Behind a transfer under way, which sees the flag first and aborts by itself.
  issuer_->add(std::make_shared<AbortJob>(state_));
}

void NcclComm::transfer(const std::byte* out, std::byte* in, std::size_t bytes, int peer,
                        Deadline deadline, std::shared_ptr<const void> keep, Gone gone) {
  if (peer < 0 || peer >= ranks_) {
    throw Error(ErrorCode::invalid_argument, "peer is " + std::to_string(peer) + ", there are " +
                                                 std::to_string(ranks_) + " ranks");
  }
  state_->check();
  const auto job = std::make_shared<TransferJob>(state_, out, in, bytes, peer, deadline,
                                                 std::move(keep), std::move(gone));
  issuer_->add(job);
  std::unique_lock lock(state_->mutex);
  const auto until = deadline.at() + kAbortPatience + kDrainPatience;
  if (!state_->changed.wait_until(lock, until, [&] { return job->done; })) {
    const Error error(ErrorCode::timeout,
                      job->name() + "NCCL did not come back from an abort; it is left behind");
    if (!state_->failure) state_->failure = error;
    throw error;
  }
  if (state_->failure) throw Error(*state_->failure);
}

void NcclComm::send(const std::byte* data, std::size_t bytes, int peer, Deadline deadline,
                    std::shared_ptr<const void> keep, Gone gone) {
  transfer(data, nullptr, bytes, peer, deadline, std::move(keep), std::move(gone));
}

void NcclComm::receive(std::byte* data, std::size_t bytes, int peer, Deadline deadline,
                       std::shared_ptr<const void> keep, Gone gone) {
  transfer(nullptr, data, bytes, peer, deadline, std::move(keep), std::move(gone));
}

void NcclComm::exchange(const std::byte* out, std::byte* in, std::size_t bytes, int peer,
                        Deadline deadline) {
  transfer(out, in, bytes, peer, deadline, nullptr, nullptr);
}

}  // namespace pipelive::cuda

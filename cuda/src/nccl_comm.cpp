#include "pipelive/cuda/nccl_comm.hpp"

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <utility>

namespace pipelive::cuda {
namespace {

using std::chrono::microseconds;

// What a caller grants beyond its deadline: the issuing thread may be inside of NCCL.
constexpr std::chrono::seconds kIssuerPatience{5};
// A peer that has completed its half may go before this end's half is complete.
constexpr std::chrono::seconds kGoneGrace{1};
// An end that came up first says so at once; one that failed does, too.
constexpr std::chrono::seconds kUpGrace{3};
// For the device's turn, to end a communicator that is idle.
constexpr std::chrono::seconds kTurnPatience{3};
// Where a look is not urgent.
constexpr microseconds kSlowPause{1000};

}  // namespace

// Shared by the object, its jobs and the threads that NCCL may block.
struct NcclComm::State {
  Place place;
  NcclIssuer::Enter enter;
  NcclCommHandle comm = nullptr;  // of the issuing thread alone
  std::atomic<bool> abort_asked{false};
  // NCCL has nothing of it any more: no memory, no thread, no kernel.
  std::atomic<bool> gone{true};

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

  // In a thread that may block. What is under way is what others wait for: it is ended at once. A
  // communicator that is idle is ended with the turn in hand, where that can be had: what it waits
  // for is then nothing of NCCL's.
  void abort_comm(NcclCommHandle handle, bool idle) noexcept {
    bool turn = false;
    if (idle && place.turn) {
      const Deadline patience = Deadline::after(kTurnPatience);
      try {
        while (!(turn = place.turn->try_take("an NCCL communicator that ends")) &&
               !patience.passed()) {
          std::this_thread::sleep_for(kSlowPause);
        }
      } catch (const std::exception&) {
        // Out of memory for a name: without the turn, then.
      }
    }
    // Its result says nothing that could be acted upon; the handle is gone either way.
    static_cast<void>(place.nccl->api().comm_abort(handle));
    if (turn) place.turn->give();
    gone.store(true);
  }
  // In the issuing thread, which does not wait for it; `gone` tells.
  static void let_go(const std::shared_ptr<State>& state, bool idle) noexcept {
    if (state->comm == nullptr) return;
    NcclIssuer::apart(state->enter, [state, handle = std::exchange(state->comm, nullptr), idle] {
      state->abort_comm(handle, idle);
    });
  }
};

class NcclComm::AbortJob final : public NcclIssuer::Job {
 public:
  explicit AbortJob(std::shared_ptr<State> state) : state_(std::move(state)) {}
  bool step() noexcept override {
    State::let_go(state_, true);
    return state_->gone.load();
  }
  [[nodiscard]] microseconds pause() const noexcept override { return kSlowPause; }

 private:
  std::shared_ptr<State> state_;
};

class NcclComm::InitJob final : public NcclIssuer::Job {
 public:
  InitJob(std::shared_ptr<State> state, const NcclUniqueId& id, int rank, int ranks,
          Deadline deadline, Gone gone)
      : state_(std::move(state)),
        id_(id),
        rank_(rank),
        ranks_(ranks),
        deadline_(deadline),
        gone_(std::move(gone)) {}

  bool step() noexcept override {
    if (failed_) return state_->gone.load();
    const std::string name =
        "NCCL communicator, rank " + std::to_string(rank_) + " of " + std::to_string(ranks_) + ": ";
    try {
      if (!is_up()) return false;
      const std::lock_guard lock(state_->mutex);
      state_->ready = true;
      state_->changed.notify_all();
      return true;
    } catch (const Error& error) {
      return give_up(Error(error.code(), name + error.what()));
    } catch (const std::exception& error) {
      return give_up(Error(ErrorCode::out_of_memory, name + error.what()));
    }
  }
  [[nodiscard]] microseconds pause() const noexcept override { return kSlowPause; }

 private:
  // Of the first call, which blocks.
  struct Start {
    std::mutex mutex;
    bool returned = false;
    bool abandoned = false;  // nobody looks any more: what it has made is aborted at once
    NcclResult result = kNcclSuccess;
    NcclCommHandle comm = nullptr;
  };

  void begin() {
    start_ = std::make_shared<Start>();
    state_->gone.store(false);
    NcclIssuer::apart(
        state_->enter, [state = state_, start = start_, id = id_, rank = rank_, ranks = ranks_] {
          NcclConfig config;
          NcclCommHandle comm = nullptr;
          const NcclResult result =
              state->place.nccl->api().comm_init_rank_config(&comm, ranks, id, rank, &config);
          {
            const std::lock_guard lock(start->mutex);
            start->returned = true;
            start->result = result;
            start->comm = comm;
            if (comm == nullptr) state->gone.store(true);
            if (comm == nullptr || !start->abandoned) return;
          }
          state->abort_comm(comm, true);
        });
  }

  bool is_up() {
    const Nccl& nccl = *state_->place.nccl;
    if (!start_) begin();
    NcclResult result = kNcclInProgress;
    if (!begun_) {
      const std::lock_guard lock(start_->mutex);
      if (start_->returned) {
        begun_ = true;
        state_->comm = std::exchange(start_->comm, nullptr);
      }
    }
    if (begun_) nccl.check(start_->result, "ncclCommInitRankConfig", state_->comm);
    if (state_->abort_asked.load()) throw Error(ErrorCode::cancelled, "aborted while it came up");
    if (begun_) {
      nccl.check(nccl.api().comm_get_async_error(state_->comm, &result), "ncclCommGetAsyncError");
      nccl.check(result, "ncclCommInitRankConfig", state_->comm);
      if (result != kNcclInProgress) return true;
    }
    if (gone_ && !gone_at_ && gone_()) gone_at_ = Deadline::after(kUpGrace);
    if (gone_at_ && gone_at_->passed()) {
      throw Error(ErrorCode::closed, "the other end has gone, or has given it up");
    }
    if (!deadline_.passed()) return false;
    throw Error(ErrorCode::timeout,
                begun_ ? "it did not come up before the deadline; is every rank there, and can "
                         "they reach each other?"
                       : "NCCL did not begin before the deadline; it waits for what runs on the "
                         "device");
  }

  bool give_up(const Error& error) noexcept {
    failed_ = true;
    if (start_) {
      const std::lock_guard lock(start_->mutex);
      start_->abandoned = true;
      if (!begun_ && start_->returned) state_->comm = std::exchange(start_->comm, nullptr);
    }
    State::let_go(state_, true);
    state_->fail(error);
    return state_->gone.load();
  }

  std::shared_ptr<State> state_;
  NcclUniqueId id_;
  int rank_;
  int ranks_;
  Deadline deadline_;
  Gone gone_;
  std::optional<Deadline> gone_at_;
  std::shared_ptr<Start> start_;
  bool begun_ = false;
  bool failed_ = false;
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
      if (failed_) return drained();
      if (!issued_) {
        issue();
        issued_ = true;
      }
      if (!completed()) return false;
      tell();
      return true;
    } catch (const Error& error) {
      return give_up(Error(error.code(), name() + error.what()));
    } catch (const std::exception& error) {
      return give_up(Error(ErrorCode::out_of_memory, name() + error.what()));
    }
  }

  [[nodiscard]] microseconds pause() const noexcept override {
    return failed_ ? kSlowPause : Job::pause();
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
    begun_ = true;
    if (group) nccl.check_transfer(api.group_start(), "ncclGroupStart");
    NcclResult result = kNcclSuccess;
    std::string_view call = "ncclSend";
    if (out_ != nullptr) result = api.send(out_, bytes_, kNcclUint8, peer_, state_->comm, stream);
    if (in_ != nullptr && (result == kNcclSuccess || result == kNcclInProgress)) {
      call = "ncclRecv";
      result = api.recv(in_, bytes_, kNcclUint8, peer_, state_->comm, stream);
    }
    // A group that was opened is closed whatever happened inside.
    const NcclResult end = group ? api.group_end() : kNcclSuccess;
    nccl.check_transfer(result, call, state_->comm);
    nccl.check_transfer(end, "ncclGroupEnd", state_->comm);
  }

  bool completed() {
    if (state_->abort_asked.load())
      throw Error(ErrorCode::cancelled, "the communicator was aborted");
    state_->check();  // another transfer's failure has ended the communicator
    const Nccl& nccl = *state_->place.nccl;
    NcclResult result = kNcclSuccess;
    nccl.check_transfer(nccl.api().comm_get_async_error(state_->comm, &result),
                        "ncclCommGetAsyncError");
    nccl.check_transfer(result, "asynchronous error", state_->comm);
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

  // The caller is told now; the job goes on, and holds the memory, until NCCL has let go.
  bool give_up(const Error& error) noexcept {
    state_->fail(error);
    failed_ = true;
    tell();
    State::let_go(state_, !begun_);
    return drained();
  }

  bool drained() noexcept {
    if (!begun_) return true;
    if (!state_->gone.load()) return false;
    try {
      // Aborted kernels end by themselves, but only the stream says when.
      if (!drained_) drained_ = state_->place.device->record(state_->place.stream);
      return drained_->done();
    } catch (const std::exception&) {
      return true;  // nothing runs on a device that has failed
    }
  }

  void tell() noexcept {
    const std::lock_guard lock(state_->mutex);
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
  bool begun_ = false;   // something of it may be in the stream
  bool issued_ = false;  // all of it is
  bool failed_ = false;
  std::shared_ptr<Event> event_;
  std::shared_ptr<Event> drained_;
  std::optional<Deadline> gone_at_;
};

NcclComm::NcclComm(Place place, const NcclUniqueId& id, int rank, int ranks, Deadline deadline,
                   Gone gone)
    : rank_(rank), ranks_(ranks), state_(std::make_shared<State>()) {
  if (ranks < 1 || rank < 0 || rank >= ranks) {
    throw Error(ErrorCode::invalid_argument,
                "rank is " + std::to_string(rank) + " of " + std::to_string(ranks) + " ranks");
  }
  issuer_ = std::move(place.issuer);
  state_->enter = issuer_->enter();
  state_->place = std::move(place);
  issuer_->add(std::make_shared<InitJob>(state_, id, rank, ranks, deadline, std::move(gone)));
  std::unique_lock lock(state_->mutex);
  const auto until = deadline.at() + kIssuerPatience;
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
  const auto until = deadline.at() + kIssuerPatience;
  if (!state_->changed.wait_until(lock, until, [&] { return job->done; })) {
    const Error error(ErrorCode::timeout,
                      job->name() + "the issuing thread did not come back from NCCL");
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
                        Deadline deadline, std::shared_ptr<const void> keep, Gone gone) {
  transfer(out, in, bytes, peer, deadline, std::move(keep), std::move(gone));
}

}  // namespace pipelive::cuda

#pragma once

#include <functional>
#include <memory>

#include "pipelive/base/deadline.hpp"
#include "pipelive/base/error.hpp"
#include "pipelive/cuda/device_turn.hpp"
#include "pipelive/cuda/nccl.hpp"
#include "pipelive/cuda/nccl_issuer.hpp"
#include "pipelive/device/device.hpp"

namespace pipelive::cuda {

/// A non-blocking communicator of our own. The device's issuing thread alone issues on it and polls
/// it; the first and the last call, which block, come from threads of their own (NcclIssuer). The
/// threads that use it only wait, with a deadline.
///
/// The first error, deadline or abort ends it for good: it is aborted, which also ends what is
/// under way on the device, and every later call throws the same error. Who used it is told at
/// once; NCCL may take longer to let go, since it waits for all that runs on the device.
class NcclComm {
 public:
  struct Place {
    std::shared_ptr<const Nccl> nccl;
    std::shared_ptr<NcclIssuer> issuer;
    std::shared_ptr<Device> device;
    Stream stream;                             ///< of the transfers
    std::shared_ptr<const void> stream_owner;  ///< kept while anything may be under way
    /// Of the device. It is tried for to end a communicator that is idle; null for none.
    std::shared_ptr<DeviceTurn> turn;
  };
  /// Asked now and then while something is under way; true once the peer is known to have gone, or
  /// to have given up.
  using Gone = std::function<bool()>;

  /// Comes up together with the other ranks, or throws Error(timeout), Error(device), or, some
  /// seconds after `gone` first said so, Error(closed). Takes from tenths of a second to tens of
  /// seconds: not for the stop window.
  NcclComm(Place place, const NcclUniqueId& id, int rank, int ranks, Deadline deadline,
           Gone gone = nullptr);
  /// Aborts; what was completed is not touched by that.
  ~NcclComm();
  NcclComm(const NcclComm&) = delete;
  NcclComm& operator=(const NcclComm&) = delete;

  [[nodiscard]] int rank() const noexcept { return rank_; }
  [[nodiscard]] int ranks() const noexcept { return ranks_; }
  [[nodiscard]] const std::shared_ptr<Device>& device() const noexcept;
  [[nodiscard]] Stream stream() const noexcept;

  /// Sends to `peer`, or receives from it; returns when the device has done it. `keep` is held
  /// until nothing is under way any more, also if that is long after an error. Throws
  /// Error(timeout), Error(closed) where `gone` said so or NCCL lost the connection,
  /// Error(cancelled) after abort(), Error(device).
  void send(const std::byte* data, std::size_t bytes, int peer, Deadline deadline,
            std::shared_ptr<const void> keep = nullptr, Gone gone = nullptr);
  void receive(std::byte* data, std::size_t bytes, int peer, Deadline deadline,
               std::shared_ptr<const void> keep = nullptr, Gone gone = nullptr);
  /// Both at once, in one group.
  void exchange(const std::byte* out, std::byte* in, std::size_t bytes, int peer, Deadline deadline,
                std::shared_ptr<const void> keep = nullptr, Gone gone = nullptr);

  /// Ends it, from any thread, without waiting for NCCL.
  void abort() noexcept;

 private:
  struct State;
  class InitJob;
  class TransferJob;
  class AbortJob;

  void transfer(const std::byte* out, std::byte* in, std::size_t bytes, int peer, Deadline deadline,
                std::shared_ptr<const void> keep, Gone gone);

  int rank_;
  int ranks_;
  std::shared_ptr<NcclIssuer> issuer_;  // not in the state, whose last user may be its thread
  std::shared_ptr<State> state_;        // jobs that outlive this object share it
};

}  // namespace pipelive::cuda

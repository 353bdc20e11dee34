#pragma once

#include <chrono>
#include <condition_variable>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

namespace pipelive::cuda {

/// The one thread of a device that issues and polls NCCL work for us. Jobs are stepped in turn and
/// never block, so a communicator that takes seconds to come up does not hold back another's
/// transfer.
///
/// Two calls block also where a communicator is a non-blocking one, until all kernels that run on
/// the device have ended: the first of initialising (it allocates), and ncclCommAbort (it frees,
/// and joins NCCL's threads). Those go to `apart`, since what runs may be a transfer that only this
/// thread can end.
class NcclIssuer {
 public:
  class Job {
   public:
    virtual ~Job() = default;
    /// One look at the state of things, without waiting; true once there is nothing more to do.
    /// Must not throw.
    [[nodiscard]] virtual bool step() noexcept = 0;
    /// How long the next look may wait; the default is about what a look costs.
    [[nodiscard]] virtual std::chrono::microseconds pause() const noexcept {
      return std::chrono::microseconds(20);
    }
  };
  /// Called in the thread before anything else; what it returns is kept as long as the thread runs.
  /// Makes the device's context current.
  using Enter = std::function<std::shared_ptr<void>()>;

  /// The issuer of a device ("cuda:0"), made with `enter` where there is none yet.
  [[nodiscard]] static std::shared_ptr<NcclIssuer> of(const std::string& device,
                                                      const Enter& enter);

  explicit NcclIssuer(Enter enter);
  /// Waits for the jobs that are left; a thread that NCCL does not give back is left behind.
  ~NcclIssuer();
  NcclIssuer(const NcclIssuer&) = delete;
  NcclIssuer& operator=(const NcclIssuer&) = delete;

  /// Steps the job until it is done.
  void add(std::shared_ptr<Job> job);

  [[nodiscard]] const Enter& enter() const noexcept { return enter_; }
  /// Runs `work`, which may block and must not throw, in a thread of its own that is set up by
  /// `enter`. Nobody waits for the thread, so `work` holds whatever it uses.
  static void apart(const Enter& enter, std::function<void()> work);

 private:
  // What the thread works on; it may outlive this object.
  struct Shared {
    std::mutex mutex;
    std::condition_variable changed;
    std::vector<std::shared_ptr<Job>> added;
    std::exception_ptr failure;
    bool ready = false;
    bool stopping = false;
    bool ended = false;
  };
  static void run(Shared& shared, const Enter& enter);

  Enter enter_;
  std::shared_ptr<Shared> shared_;
  std::thread thread_;
};

}  // namespace pipelive::cuda

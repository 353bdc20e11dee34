#pragma once

#include <condition_variable>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

namespace pipelive::cuda {

/// The one thread of a device that calls NCCL for us: initialises, issues, polls and aborts. Jobs
/// are stepped in turn and never block, so a communicator that takes seconds to come up does not
/// hold back another's transfer.
class NcclIssuer {
 public:
  class Job {
   public:
    virtual ~Job() = default;
    /// One look at the state of things, without waiting; true once there is nothing more to do.
    /// Must not throw.
    [[nodiscard]] virtual bool step() noexcept = 0;
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

  /// Steps the job until it is done; throws what `enter` threw.
  void add(std::shared_ptr<Job> job);

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

  std::shared_ptr<Shared> shared_;
  std::thread thread_;
};

}  // namespace pipelive::cuda

#include "pipelive/cuda/nccl_issuer.hpp"

#include <chrono>
#include <map>
#include <utility>

namespace pipelive::cuda {
namespace {

// Between two looks at jobs that are under way; about what a look costs.
constexpr std::chrono::microseconds kPause{20};
constexpr std::chrono::seconds kEndPatience{5};

}  // namespace

std::shared_ptr<NcclIssuer> NcclIssuer::of(const std::string& device, const Enter& enter) {
  static std::mutex* const mutex = new std::mutex();
  static auto* const issuers = new std::map<std::string, std::weak_ptr<NcclIssuer>>();
  const std::lock_guard lock(*mutex);
  std::weak_ptr<NcclIssuer>& known = (*issuers)[device];
  std::shared_ptr<NcclIssuer> issuer = known.lock();
  if (!issuer) {
    issuer = std::make_shared<NcclIssuer>(enter);
    known = issuer;
  }
  return issuer;
}

NcclIssuer::NcclIssuer(Enter enter) : shared_(std::make_shared<Shared>()) {
  thread_ = std::thread([shared = shared_, enter = std::move(enter)] { run(*shared, enter); });
  std::unique_lock lock(shared_->mutex);
  shared_->changed.wait(lock, [&] { return shared_->ready; });
  if (shared_->failure) {
    lock.unlock();
    thread_.join();
    std::rethrow_exception(shared_->failure);
  }
}

NcclIssuer::~NcclIssuer() {
  bool ended = false;
  {
    std::unique_lock lock(shared_->mutex);
    shared_->stopping = true;
    shared_->changed.notify_all();
    ended = shared_->changed.wait_for(lock, kEndPatience, [&] { return shared_->ended; });
  }
  if (ended) {
    thread_.join();
  } else {
    thread_.detach();
  }
}

void NcclIssuer::add(std::shared_ptr<Job> job) {
  const std::lock_guard lock(shared_->mutex);
  shared_->added.push_back(std::move(job));
  shared_->changed.notify_all();
}

void NcclIssuer::run(Shared& shared, const Enter& enter) {
  std::shared_ptr<void> kept;
  try {
    if (enter) kept = enter();
  } catch (...) {
    shared.failure = std::current_exception();
  }
  std::vector<std::shared_ptr<Job>> jobs;
  std::unique_lock lock(shared.mutex);
  shared.ready = true;
  shared.changed.notify_all();
  while (!shared.failure) {
    for (std::shared_ptr<Job>& job : shared.added) jobs.push_back(std::move(job));
    shared.added.clear();
    if (jobs.empty()) {
      if (shared.stopping) break;
      shared.changed.wait(lock);
      continue;
    }
    lock.unlock();
    std::erase_if(jobs, [](const std::shared_ptr<Job>& job) { return job->step(); });
    lock.lock();
    if (!jobs.empty() && shared.added.empty()) shared.changed.wait_for(lock, kPause);
  }
  lock.unlock();
  kept.reset();
  lock.lock();
  shared.ended = true;
  shared.changed.notify_all();
}

}  // namespace pipelive::cuda

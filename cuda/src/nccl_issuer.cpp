#include "pipelive/cuda/nccl_issuer.hpp"

#include <algorithm>
#include <map>
#include <utility>

namespace pipelive::cuda {
namespace {

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

NcclIssuer::NcclIssuer(Enter enter)
    : enter_(std::move(enter)), shared_(std::make_shared<Shared>()) {
  thread_ = std::thread([shared = shared_, enter = enter_] { run(*shared, enter); });
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

void NcclIssuer::apart(const Enter& enter, std::function<void()> work) {
  try {
    std::thread([enter, work]() mutable {
      std::shared_ptr<void> kept;
      try {
        if (enter) kept = enter();
      } catch (const std::exception&) {
        // The device is broken; NCCL is told all the same, it has threads and sockets to end.
      }
      work();
      work = nullptr;  // what it holds may need the scope to be given back
    }).detach();
    return;
  } catch (const std::exception&) {
    // No thread is to be had: better in this one than not at all.
  }
  work();
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
    if (jobs.empty() || !shared.added.empty()) continue;
    std::chrono::microseconds pause = jobs.front()->pause();
    for (const std::shared_ptr<Job>& job : jobs) pause = std::min(pause, job->pause());
    shared.changed.wait_for(lock, pause);
  }
  lock.unlock();
  kept.reset();
  lock.lock();
  shared.ended = true;
  shared.changed.notify_all();
}

}  // namespace pipelive::cuda

// Copiers that are kept for the next session: their buffers and streams take long to make.
#include <map>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "pipelive/cuda/slot_copier.hpp"

namespace pipelive::cuda {
namespace {

// By the driver's context, which the copiers hold. Never destroyed, as the driver may be gone when
// a process ends.
struct Store {
  static constexpr std::size_t kMost = 4;  // of one context: two sessions in either direction
  std::mutex mutex;
  std::map<ContextHandle, std::vector<std::unique_ptr<CudaSlotCopier>>> copiers;
  // Given back with work under way, after a timeout. To destroy one would wait for that work.
  std::vector<std::unique_ptr<CudaSlotCopier>> busy;

  // With the mutex held. What there is no room for goes into `excess`.
  void keep(std::unique_ptr<CudaSlotCopier> copier,
            std::vector<std::unique_ptr<CudaSlotCopier>>& excess) {
    const auto kept = copiers.find(copier->context().handle());
    const bool room = kept != copiers.end() && kept->second.size() < kMost;
    (room ? kept->second : excess).push_back(std::move(copier));
  }
  void keep_idle(std::vector<std::unique_ptr<CudaSlotCopier>>& excess) {
    for (std::size_t i = 0; i < busy.size();) {
      if (!busy[i]->idle()) {
        ++i;
        continue;
      }
      keep(std::move(busy[i]), excess);
      busy.erase(busy.begin() + static_cast<std::ptrdiff_t>(i));
    }
  }
};
Store& store() {
  static auto& instance = *new Store;
  return instance;
}

}  // namespace

std::shared_ptr<CudaSlotCopier> CudaSlotCopier::lend(
    const std::shared_ptr<const PrimaryContext>& context) {
  std::unique_ptr<CudaSlotCopier> copier;
  std::vector<std::unique_ptr<CudaSlotCopier>> excess;  // destroyed without the lock
  {
    const std::lock_guard lock(store().mutex);
    auto& kept = store().copiers[context->handle()];
    kept.reserve(Store::kMost);  // so that giving back cannot fail
    store().keep_idle(excess);
    if (!kept.empty()) {
      copier = std::move(kept.back());
      kept.pop_back();
    }
  }
  if (!copier) copier = std::make_unique<CudaSlotCopier>(context);
  return {copier.release(), [](CudaSlotCopier* lent) {
            std::vector<std::unique_ptr<CudaSlotCopier>> surplus;
            const std::lock_guard lock(store().mutex);
            store().keep_idle(surplus);
            if (lent->idle()) {
              store().keep(std::unique_ptr<CudaSlotCopier>(lent), surplus);
            } else {
              store().busy.emplace_back(lent);
            }
          }};
}

void CudaSlotCopier::forget() {
  const std::lock_guard lock(store().mutex);
  store().copiers.clear();
  store().busy.clear();
}

}  // namespace pipelive::cuda

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
};
Store& store() {
  static auto& instance = *new Store;
  return instance;
}

}  // namespace

std::shared_ptr<CudaSlotCopier> CudaSlotCopier::lend(
    const std::shared_ptr<const PrimaryContext>& context) {
  std::unique_ptr<CudaSlotCopier> copier;
  {
    const std::lock_guard lock(store().mutex);
    auto& kept = store().copiers[context->handle()];
    kept.reserve(Store::kMost);  // so that giving back cannot fail
    if (!kept.empty()) {
      copier = std::move(kept.back());
      kept.pop_back();
    }
  }
  if (!copier) copier = std::make_unique<CudaSlotCopier>(context);
  return {copier.release(), [](CudaSlotCopier* lent) {
            std::unique_ptr<CudaSlotCopier> back(lent);
            const std::lock_guard lock(store().mutex);
            const auto kept = store().copiers.find(back->context().handle());
            if (kept == store().copiers.end() || kept->second.size() == Store::kMost) return;
            kept->second.push_back(std::move(back));
          }};
}

void CudaSlotCopier::forget() {
  const std::lock_guard lock(store().mutex);
  store().copiers.clear();
}

}  // namespace pipelive::cuda

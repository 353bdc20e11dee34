#include "pipelive/migration/convergence.hpp"

#include <algorithm>
#include <cmath>
#include <string>

#include "pipelive/base/error.hpp"

namespace pipelive {
namespace {

void check(const char* name, double value, bool valid, const char* expected) {
  if (!valid || !std::isfinite(value)) {
    throw Error(ErrorCode::invalid_argument,
                std::string(name) + " is " + std::to_string(value) + ", expected " + expected);
  }
}

}  // namespace

BandwidthEstimate::BandwidthEstimate(const Options& options) : options_(options) {
  check("fixed_seconds", options.fixed_seconds, options.fixed_seconds >= 0, "0 or more");
  check("record_seconds", options.record_seconds, options.record_seconds >= 0, "0 or more");
  check("decay", options.decay, options.decay >= 0 && options.decay < 1, "0 to below 1");
  check("initial_bytes_per_second", options.initial_bytes_per_second,
        options.initial_bytes_per_second > 0, "more than 0");
}

void BandwidthEstimate::observe(std::uint64_t bytes, std::uint64_t records, double busy_seconds) {
  check("busy_seconds", busy_seconds, busy_seconds >= 0, "0 or more");
  if (bytes == 0) return;
  // The records never explain all of the time: at least a tenth of it is the bytes'.
  const double records_take =
      std::min(0.9 * busy_seconds, static_cast<double>(records) * options_.record_seconds);
  bytes_ = options_.decay * bytes_ + static_cast<double>(bytes);
  seconds_ = options_.decay * seconds_ + std::max(1e-9, busy_seconds - records_take);
}

double BandwidthEstimate::bytes_per_second() const noexcept {
  return bytes_ > 0 ? bytes_ / seconds_ : options_.initial_bytes_per_second;
}

double BandwidthEstimate::predict(std::uint64_t bytes, std::uint64_t records) const noexcept {
  return options_.fixed_seconds + static_cast<double>(bytes) / bytes_per_second() +
         static_cast<double>(records) * options_.record_seconds;
}

}  // namespace pipelive

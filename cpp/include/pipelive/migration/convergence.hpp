#pragma once

#include <cstdint>

namespace pipelive {

/// How long a patch would take, from how long the ones before took.
///
/// `predict = fixed + bytes / bandwidth + records * record_cost`. The bandwidth comes from busy
/// time only (not from waiting for a rate cap or for an acknowledgement), less what the records
/// cost, as a ratio of two decayed sums: a round counts by its bytes, so a small one, whose time is
/// mostly overhead, does not pull the estimate.
class BandwidthEstimate {
 public:
  struct Options {
    double fixed_seconds = 0.001;    ///< one message there, its acknowledgement back, the switch
    double record_seconds = 0.5e-6;  ///< cost of one record beyond its bytes
    double decay = 0.7;              ///< weight of the rounds before, 0 to below 1
    double initial_bytes_per_second = 0.5e9;  ///< assumed until something was observed
  };

  BandwidthEstimate() : BandwidthEstimate(Options{}) {}
  /// Throws Error(invalid_argument) naming the option that is out of range.
  explicit BandwidthEstimate(const Options& options);

  /// One round: what it carried and how long it was busy. Rounds without bytes are ignored. Throws
  /// Error(invalid_argument) where `busy_seconds` is negative or not a number.
  void observe(std::uint64_t bytes, std::uint64_t records, double busy_seconds);

  [[nodiscard]] double bytes_per_second() const noexcept;
  /// Seconds that sending this much and seeing it applied would take.
  [[nodiscard]] double predict(std::uint64_t bytes, std::uint64_t records) const noexcept;

 private:
  Options options_;
  double bytes_ = 0.0;
  double seconds_ = 0.0;
};

}  // namespace pipelive

#pragma once

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <random>
#include <stdexcept>
#include <thread>
#include <utility>
#include <vector>

/// What the machine's memory can do, measured in the run whose figures are compared with it: a
/// figure without its limit says little, and a limit from another hour may have had other
/// neighbours.
///
/// All rates are bytes per second of useful data, the best of several rounds. A copy's bytes count
/// once, though it reads and writes them. Call these outside a benchmark's timing loop.
namespace pipelive::bench {

inline constexpr std::size_t kLimitBytes = std::size_t{256} << 20;  ///< well above any cache
inline constexpr int kLimitRounds = 5;

namespace detail {

/// Runs body(thread) in `threads` threads at once and returns the seconds of the best of `rounds`.
template <typename Body>
double best_seconds(int threads, int rounds, Body&& body) {
  if (threads < 1) throw std::invalid_argument("threads must be at least 1");
  double best = 1e30;
  for (int round = 0; round < rounds; ++round) {
    const auto begin = std::chrono::steady_clock::now();
    {
      std::vector<std::jthread> others;
      for (int i = 1; i < threads; ++i) others.emplace_back([&body, i] { body(i); });
      body(0);
    }
    const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - begin;
    best = std::min(best, taken.count());
  }
  return best;
}

/// The `index`th of `parts` equal parts of [0, count).
inline std::pair<std::size_t, std::size_t> part(std::size_t count, int parts, int index) {
  const auto n = static_cast<std::size_t>(parts);
  const auto i = static_cast<std::size_t>(index);
  return {count * i / n, count * (i + 1) / n};
}

// The widest loads that the processor has, as the kernels measured against this use them too.
#if defined(__x86_64__) && defined(__GNUC__)
#define PIPELIVE_BENCH_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define PIPELIVE_BENCH_CLONES
#endif

/// Sums runs of `run` words at `offsets`, in vectors and two chains, so that loads and not
/// additions set the pace.
PIPELIVE_BENCH_CLONES inline std::uint64_t sum_runs(const std::uint64_t* words,
                                                    const std::size_t* offsets, std::size_t count,
                                                    std::size_t run) {
  // Plain arrays of lanes are spilled between runs, which then costs more than the memory does.
  typedef std::uint64_t Vector __attribute__((vector_size(64)));
  constexpr std::size_t kLanes = sizeof(Vector) / sizeof(std::uint64_t);
  Vector even{};
  Vector odd{};
  std::uint64_t total = 0;
  for (std::size_t r = 0; r < count; ++r) {
    const std::uint64_t* begin = words + offsets[r];
    std::size_t i = 0;
    for (; i + 2 * kLanes <= run; i += 2 * kLanes) {
      Vector first;
      Vector second;
      std::memcpy(&first, begin + i, sizeof first);
      std::memcpy(&second, begin + i + kLanes, sizeof second);
      even += first;
      odd += second;
    }
    for (; i < run; ++i) total += begin[i];
  }
  even += odd;
  for (std::size_t lane = 0; lane < kLanes; ++lane) total += even[lane];
  return total;
}

/// Keeps a result alive without storing it anywhere that costs time.
inline void keep(std::uint64_t value) {
  asm volatile("" : : "r"(value) : "memory");
}

inline std::vector<std::uint64_t> words(std::size_t bytes) {
  std::vector<std::uint64_t> result(bytes / sizeof(std::uint64_t));
  std::iota(result.begin(), result.end(), std::uint64_t{1});  // touched, so that pages are there
  return result;
}

}  // namespace detail

/// memcpy of large arrays.
inline double copy_bandwidth(int threads = 1, std::size_t bytes = kLimitBytes) {
  const std::vector<std::uint64_t> source = detail::words(bytes);
  std::vector<std::uint64_t> target = detail::words(bytes);
  const double seconds = detail::best_seconds(threads, kLimitRounds, [&](int thread) {
    const auto [begin, end] = detail::part(source.size(), threads, thread);
    std::memcpy(target.data() + begin, source.data() + begin, (end - begin) * sizeof source[0]);
  });
  detail::keep(target[target.size() / 2]);
  return static_cast<double>(source.size() * sizeof source[0]) / seconds;
}

/// Reading a large array in order.
inline double read_bandwidth(int threads = 1, std::size_t bytes = kLimitBytes) {
  const std::vector<std::uint64_t> source = detail::words(bytes);
  const double seconds = detail::best_seconds(threads, kLimitRounds, [&](int thread) {
    const auto [begin, end] = detail::part(source.size(), threads, thread);
    detail::keep(detail::sum_runs(source.data(), &begin, 1, end - begin));
  });
  return static_cast<double>(source.size() * sizeof source[0]) / seconds;
}

namespace detail {

/// Runs of `run_bytes` out of `words`, each once, in random order: offsets in words.
inline std::vector<std::size_t> shuffled_runs(std::size_t words, std::size_t run_words) {
  if (run_words == 0 || words < run_words) {
    throw std::invalid_argument("run_bytes must be at least 8 and at most bytes");
  }
  std::vector<std::size_t> offsets(words / run_words);
  for (std::size_t i = 0; i < offsets.size(); ++i) offsets[i] = i * run_words;
  std::mt19937_64 random(7);
  std::shuffle(offsets.begin(), offsets.end(), random);
  return offsets;
}

}  // namespace detail

/// Reading runs of `run_bytes` (a multiple of 8) that lie in random order: the limit of attention
/// over scattered blocks.
inline double random_read_bandwidth(std::size_t run_bytes, int threads = 1,
                                    std::size_t bytes = kLimitBytes) {
  const std::vector<std::uint64_t> source = detail::words(bytes);
  const std::size_t run = run_bytes / sizeof(std::uint64_t);
  const std::vector<std::size_t> offsets = detail::shuffled_runs(source.size(), run);
  const double seconds = detail::best_seconds(threads, kLimitRounds, [&](int thread) {
    const auto [begin, end] = detail::part(offsets.size(), threads, thread);
    detail::keep(detail::sum_runs(source.data(), offsets.data() + begin, end - begin, run));
  });
  return static_cast<double>(offsets.size() * run * sizeof(std::uint64_t)) / seconds;
}

/// Copying runs of `run_bytes` (a multiple of 8) from random places into a small buffer that is
/// used again and again: the limit of gathering slots into a message.
inline double random_gather_bandwidth(std::size_t run_bytes, int threads = 1,
                                      std::size_t bytes = kLimitBytes,
                                      std::size_t buffer_bytes = std::size_t{1} << 20) {
  const std::vector<std::uint64_t> source = detail::words(bytes);
  const std::size_t run = run_bytes / sizeof(std::uint64_t);
  const std::vector<std::size_t> offsets = detail::shuffled_runs(source.size(), run);
  const std::size_t room = std::max(buffer_bytes / sizeof(std::uint64_t), run);
  std::vector<std::vector<std::uint64_t>> buffers(static_cast<std::size_t>(std::max(threads, 1)),
                                                  detail::words(room * sizeof(std::uint64_t)));
  const double seconds = detail::best_seconds(threads, kLimitRounds, [&](int thread) {
    const auto [begin, end] = detail::part(offsets.size(), threads, thread);
    std::uint64_t* buffer = buffers[static_cast<std::size_t>(thread)].data();
    std::size_t filled = 0;
    for (std::size_t i = begin; i < end; ++i) {
      if (filled + run > room) filled = 0;
      std::memcpy(buffer + filled, source.data() + offsets[i], run * sizeof(std::uint64_t));
      filled += run;
    }
    detail::keep(buffer[0]);
  });
  return static_cast<double>(offsets.size() * run * sizeof(std::uint64_t)) / seconds;
}

}  // namespace pipelive::bench

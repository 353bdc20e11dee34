#include "attention_cases.hpp"

#include <dlfcn.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>

namespace pipelive::cuda {
namespace {

using attention::Params;

constexpr double kInfinity = std::numeric_limits<double>::infinity();

}  // namespace

Numbers::Numbers(DType dtype, std::size_t count)
    : dtype_(dtype), count_(count), memory_(count * size_of(dtype) + 64) {
  offset_ = (64 - reinterpret_cast<std::uintptr_t>(memory_.data()) % 64) % 64;
}
std::byte* Numbers::data() const {
  return const_cast<std::byte*>(memory_.data()) + offset_;
}
float Numbers::get(std::size_t i) const {
  if (dtype_ == DType::float32) return reinterpret_cast<const float*>(data())[i];
  const auto bits = reinterpret_cast<const unsigned short*>(data())[i];
  return dtype_ == DType::float16 ? widen(attention::Float16{bits})
                                  : widen(attention::BFloat16{bits});
}
void Numbers::set(std::size_t i, float value) {
  if (dtype_ == DType::float32) {
    reinterpret_cast<float*>(data())[i] = value;
  } else {
    reinterpret_cast<unsigned short*>(data())[i] =
        dtype_ == DType::float16 ? attention::emulator::float_to_half(value)
                                 : attention::emulator::float_to_bfloat16(value);
  }
}
void Numbers::fill(float value) {
  for (std::size_t i = 0; i < count_; ++i) set(i, value);
}

Batch::Batch(const Problem& given) : problem(given) {
  const Problem& p = problem;
  std::mt19937 random(p.seed);
  std::normal_distribution<float> normal;
  const auto seqs = p.seq_lens.size();
  std::vector<int> counts;
  for (const int len : p.seq_lens) counts.push_back((len + p.block_size - 1) / p.block_size);
  const int num_blocks = std::accumulate(counts.begin(), counts.end(), 0) + 3;
  const int width = *std::max_element(counts.begin(), counts.end()) + 1;

  const std::int64_t heads = p.kv_heads;
  const std::int64_t size = p.block_size;
  const std::int64_t dim = p.head_dim;
  if (p.order == "hnd") {
    strides_[0] = heads * 2 * size * dim;
    strides_[1] = 2 * size * dim;
    strides_[2] = size * dim;
    strides_[3] = dim;
  } else if (p.order == "nhd") {
    strides_[0] = heads * 2 * size * dim;
    strides_[1] = dim;
    strides_[2] = size * heads * dim;
    strides_[3] = heads * dim;
  } else {
    strides_[0] = heads * size * dim;
    strides_[1] = dim;
    strides_[2] = num_blocks * heads * size * dim;
    strides_[3] = heads * dim;
  }
  kv = Numbers(p.dtype, static_cast<std::size_t>(num_blocks * heads * 2 * size * dim));
  kv.fill(std::nanf(""));

  std::vector<int> ids(static_cast<std::size_t>(num_blocks));
  std::iota(ids.begin(), ids.end(), 0);
  std::shuffle(ids.begin(), ids.end(), random);
  tables.assign(seqs * static_cast<std::size_t>(width), -7);
  blocks_.resize(seqs);
  std::size_t taken = 0;
  starts.push_back(0);
  for (std::size_t s = 0; s < seqs; ++s) {
    const int len = p.seq_lens[s];
    const int first = p.window > 0 ? std::max(0, len - p.query_lens[s] - p.window + 1) : 0;
    for (int b = 0; b < counts[s]; ++b) blocks_[s].push_back(ids[taken++]);
    for (int t = first; t < len; ++t) {
      const int block = blocks_[s][static_cast<std::size_t>(t / p.block_size)];
      tables[s * static_cast<std::size_t>(width) + static_cast<std::size_t>(t / p.block_size)] =
          block;
      for (int h = 0; h < p.kv_heads; ++h) {
        for (int d = 0; d < p.head_dim; ++d) {
          kv.set(kv_index(block, h, 0, t % p.block_size, d),
                 normal(random) * static_cast<float>(p.magnitude));
          kv.set(kv_index(block, h, 1, t % p.block_size, d), normal(random));
        }
      }
    }
    lens.push_back(len);
    starts.push_back(starts.back() + p.query_lens[s]);
  }
  if (p.block_map) {
    map.assign(static_cast<std::size_t>(2 * num_blocks), -1);
    for (int i = 0; i < num_blocks; ++i) {
      map[static_cast<std::size_t>(2 * num_blocks - 1 - i)] = i;
    }
    for (auto& id : tables) {
      if (id >= 0) id = 2 * num_blocks - 1 - id;
    }
  }
  const int tokens = starts.back() + p.trailing_tokens;
  const DType query_dtype = p.query_dtype.value_or(p.dtype);
  const auto elements = static_cast<std::size_t>(tokens * p.q_heads * p.head_dim);
  query = Numbers(query_dtype, elements);
  out = Numbers(query_dtype, elements);
  for (std::size_t i = 0; i < elements; ++i) query.set(i, normal(random));
  out.fill(7.0f);
  lse.assign(static_cast<std::size_t>(tokens * p.q_heads), 7.0f);

  args_.kv.base = kv.data();
  args_.kv.dtype = p.dtype;
  args_.kv.num_blocks = num_blocks;
  args_.kv.kv_heads = p.kv_heads;
  args_.kv.block_size = p.block_size;
  args_.kv.head_dim = p.head_dim;
  args_.kv.block_stride = strides_[0];
  args_.kv.head_stride = strides_[1];
  args_.kv.kv_stride = strides_[2];
  args_.kv.token_stride = strides_[3];
  args_.query.data = query.data();
  args_.query.dtype = query_dtype;
  args_.query.tokens = tokens;
  args_.query.heads = p.q_heads;
  args_.query.head_dim = p.head_dim;
  args_.query.token_stride = p.q_heads * p.head_dim;
  args_.query.head_stride = p.head_dim;
  args_.out = args_.query;
  args_.out.data = out.data();
  args_.lse = lse.data();
  args_.num_seqs = static_cast<std::int64_t>(seqs);
  args_.block_tables = tables.data();
  args_.table_width = width;
  args_.table_stride = width;
  args_.seq_lens = lens.data();
  args_.query_start = p.one_token_each ? nullptr : starts.data();
  args_.block_map = map;
  args_.scale = 1.0 / std::sqrt(static_cast<double>(p.head_dim));
  args_.window = p.window;
  args_.soft_cap = p.soft_cap;
}

std::size_t Batch::kv_index(int block, int head, int side, int offset, int dim) const {
  return static_cast<std::size_t>(block * strides_[0] + head * strides_[1] + side * strides_[2] +
                                  offset * strides_[3] + dim);
}

std::string Batch::emulate(attention::emulator::Order order, int runs, int stages) {
  AttentionLaunch launch = plan_attention(args_, problem.limits);
  Params& p = launch.params;
  const auto splits = static_cast<std::size_t>(attention::kMaxSplits);
  const auto rows = static_cast<std::size_t>(p.tokens * p.q_heads);
  if (runs > 0) {
    launch.grid = launch.grid / static_cast<unsigned>(p.runs) * static_cast<unsigned>(runs);
    p.runs = runs;
    launch.finish_grid = static_cast<unsigned>(
        (attention::finish_rows(p.tokens, p.q_heads, runs) + attention::kWarps - 1) /
        attention::kWarps);
  }
  if (stages > 0) {
    const bool tensor = args_.query.dtype != DType::float32;
    const int dim = std::stoi(launch.kernel.substr(launch.kernel.find("_d") + 2));
    p.stages = stages;
    launch.shared_bytes = static_cast<unsigned>(
        attention::shared_of(tensor, dim, p.tile_rows, static_cast<int>(size_of(args_.kv.dtype)),
                             stages)
            .bytes);
  }
  // Poison, so that what no block wrote would show.
  const std::size_t head_dim = static_cast<std::size_t>(p.head_dim);
  std::vector<float> partial(splits * rows * head_dim, std::nanf(""));
  std::vector<float> stats(splits * rows * 2, std::nanf(""));
  p.partial = partial.data();
  p.partial_stats = stats.data();

  // Rows of tokens that some query row attends to, and nothing else.
  std::vector<std::pair<const std::byte*, const std::byte*>> allowed;
  const auto item = size_of(problem.dtype);
  for (std::size_t s = 0; s < problem.seq_lens.size(); ++s) {
    const int len = problem.seq_lens[s];
    if (problem.query_lens[s] == 0) continue;
    const int first =
        problem.window > 0 ? std::max(0, len - problem.query_lens[s] - problem.window + 1) : 0;
    for (int t = first; t < len; ++t) {
      for (int h = 0; h < problem.kv_heads; ++h) {
        for (int side = 0; side < 2; ++side) {
          const std::byte* const row =
              kv.data() + kv_index(blocks_[s][static_cast<std::size_t>(t / problem.block_size)], h,
                                   side, t % problem.block_size, 0) *
                              item;
          allowed.emplace_back(row, row + head_dim * item);
        }
      }
    }
  }
  std::ranges::sort(allowed);

  attention::emulator::Options options;
  options.grid = launch.grid;
  options.shared_bytes = launch.shared_bytes;
  options.order = order;
  options.seed = problem.seed;
  options.may_copy = [&](const void* address) {
    const auto* const at = static_cast<const std::byte*>(address);
    auto after = std::ranges::upper_bound(allowed, at, {}, [](const auto& r) { return r.first; });
    return after != allowed.begin() && at + 16 <= std::prev(after)->second;
  };
  const auto find = [](const std::string& name) {
    return reinterpret_cast<void (*)(Params)>(dlsym(RTLD_DEFAULT, name.c_str()));
  };
  const auto kernel = find(launch.kernel);
  if (kernel == nullptr) return launch.kernel + " is not there";
  std::string problem_found = attention::emulator::run(options, [&] { kernel(p); });
  if (!problem_found.empty()) return problem_found;
  const auto finish = find(launch.finish_kernel);
  if (finish == nullptr) return launch.finish_kernel + " is not there";
  options.grid = launch.finish_grid;
  options.shared_bytes = 0;
  return attention::emulator::run(options, [&] { finish(p); });
}

void Batch::reference() {
  const Problem& p = problem;
  expected.assign(query.size(), 0.0);
  expected_lse.assign(lse.size(), -kInfinity);
  const int group = p.q_heads / p.kv_heads;
  for (std::size_t s = 0; s < p.seq_lens.size(); ++s) {
    const int len = p.seq_lens[s];
    if (len == 0) continue;
    for (int q = 0; q < p.query_lens[s]; ++q) {
      const int position = len - p.query_lens[s] + q;
      const int first = p.window > 0 ? std::max(0, position - p.window + 1) : 0;
      for (int h = 0; h < p.q_heads; ++h) {
        const auto row = static_cast<std::size_t>((starts[s] + q) * p.q_heads + h);
        const std::size_t at = row * static_cast<std::size_t>(p.head_dim);
        std::vector<double> scores;
        for (int t = first; t <= position; ++t) {
          const int block = blocks_[s][static_cast<std::size_t>(t / p.block_size)];
          double score = 0;
          for (int d = 0; d < p.head_dim; ++d) {
            score += static_cast<double>(query.get(at + static_cast<std::size_t>(d))) *
                     kv.get(kv_index(block, h / group, 0, t % p.block_size, d));
          }
          score *= args_.scale;
          if (p.soft_cap > 0) score = p.soft_cap * std::tanh(score / p.soft_cap);
          scores.push_back(score);
        }
        const double most = *std::ranges::max_element(scores);
        double sum = 0;
        for (const double score : scores) sum += std::exp(score - most);
        expected_lse[row] = most + std::log(sum);
        for (int t = first; t <= position; ++t) {
          const int block = blocks_[s][static_cast<std::size_t>(t / p.block_size)];
          const double weight = std::exp(scores[static_cast<std::size_t>(t - first)] - most) / sum;
          for (int d = 0; d < p.head_dim; ++d) {
            expected[at + static_cast<std::size_t>(d)] +=
                weight * kv.get(kv_index(block, h / group, 1, t % p.block_size, d));
          }
        }
      }
    }
  }
}

double Batch::error() const {
  double most = 0;
  for (std::size_t i = 0; i < out.size(); ++i) {
    const double off = std::abs(out.get(i) - expected[i]) / std::max(1.0, std::abs(expected[i]));
    if (!(off <= most)) most = std::isnan(off) ? kInfinity : off;
  }
  return most;
}

double Batch::lse_error() const {
  double most = 0;
  for (std::size_t i = 0; i < lse.size(); ++i) {
    if (std::isinf(expected_lse[i])) {
      if (static_cast<double>(lse[i]) != expected_lse[i]) return kInfinity;
      continue;
    }
    const double off = std::abs(static_cast<double>(lse[i]) - expected_lse[i]) /
                       std::max(1.0, std::abs(expected_lse[i]));
    if (!(off <= most)) most = std::isnan(off) ? kInfinity : off;
  }
  return most;
}

}  // namespace pipelive::cuda

#include "attention_emulator.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <deque>
#include <memory>
#include <random>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace pipelive::cuda::attention {
namespace emulator {
namespace {

constexpr int kThreads = 128;
constexpr int kLanes = 32;
constexpr std::size_t kStackBytes = 64 << 10;
constexpr unsigned kSharedBase = 1024;

// Switching stacks. swapcontext would do, but makes two system calls each time.
#if defined(__x86_64__)
using Context = void*;
extern "C" void pipelive_emulator_switch(Context* from, Context to);
__asm__(
    ".pushsection .text\n"
    ".globl pipelive_emulator_switch\n"
    ".hidden pipelive_emulator_switch\n"
    "pipelive_emulator_switch:\n"
    "  pushq %rbp\n  pushq %rbx\n  pushq %r12\n  pushq %r13\n  pushq %r14\n  pushq %r15\n"
    "  movq %rsp, (%rdi)\n"
    "  movq %rsi, %rsp\n"
    "  popq %r15\n  popq %r14\n  popq %r13\n  popq %r12\n  popq %rbx\n  popq %rbp\n"
    "  ret\n"
    ".popsection\n");
void switch_to(Context& from, Context& to) {
  pipelive_emulator_switch(&from, to);
}
void make_context(Context& context, std::byte* stack, void (*entry)()) {
  auto top = reinterpret_cast<std::uintptr_t>(stack + kStackBytes) & ~std::uintptr_t{15};
  auto* words = reinterpret_cast<void**>(top);
  // Where `ret` goes; a called function finds its stack 8 off a multiple of 16.
  *--words = nullptr;
  *--words = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--words = nullptr;
  context = words;
}
#else
using Context = ucontext_t;
void switch_to(Context& from, Context& to) {
  swapcontext(&from, &to);
}
void make_context(Context& context, std::byte* stack, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = kStackBytes;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
}
#endif

struct Copy {
  unsigned shared;
  const void* global;
};

/// 16 bytes that a thread wrote, and that no other may rely on yet.
struct Written {
  unsigned shared;
  Vector bytes;
};

struct Thread {
  Context context{};
  std::unique_ptr<std::byte[]> stack{new std::byte[kStackBytes]};
  std::vector<Copy> open;                ///< of the group that is not committed
  std::deque<std::vector<Copy>> groups;  ///< committed, oldest first
  std::vector<Written> written;          ///< since its last barrier
  bool done = false;
};

struct Warp {
  int arrived = 0;
  const char* operation = nullptr;
  std::size_t in_bytes = 0;
  std::array<std::byte, kLanes * 64> in{};
  std::array<std::byte, kLanes * 64> out{};
};

/// Memory whose end is the end of a page, with nothing behind it.
class Guarded {
 public:
  explicit Guarded(std::size_t bytes) : bytes_(bytes) {
    const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    mapped_ = (bytes + page - 1) / page * page + page;
    memory_ = static_cast<std::byte*>(
        mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    mprotect(memory_ + mapped_ - page, page, PROT_NONE);
    begin_ = memory_ + mapped_ - page - bytes;
  }
  ~Guarded() { munmap(memory_, mapped_); }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  [[nodiscard]] std::byte* begin() const { return begin_; }
  [[nodiscard]] std::size_t bytes() const { return bytes_; }

 private:
  std::size_t bytes_;
  std::size_t mapped_ = 0;
  std::byte* memory_ = nullptr;
  std::byte* begin_ = nullptr;
};

struct Machine {
  const Options* options = nullptr;
  const std::function<void()>* kernel = nullptr;
  std::vector<Thread> threads{kThreads};
  std::array<Warp, kThreads / kLanes> warps;
  int at_barrier = 0;
  std::vector<int> ready;
  Context scheduler{};
  int current = 0;
  unsigned x = 0;
  std::unique_ptr<Guarded> shared;
  std::string error;
  std::mt19937_64 random;

  Thread& thread() { return threads[static_cast<std::size_t>(current)]; }
  Warp& warp() { return warps[static_cast<std::size_t>(current / kLanes)]; }
  void pause() { switch_to(thread().context, scheduler); }
};

Machine* machine = nullptr;

void thread_main() {
  (*machine->kernel)();
  machine->thread().done = true;
  machine->pause();
}

void run_block(Machine& m) {
  std::memset(m.shared->begin(), 0xFF, m.shared->bytes());
  m.ready.clear();
  m.at_barrier = 0;
  for (Warp& warp : m.warps) warp.arrived = 0;
  for (int i = 0; i < kThreads; ++i) {
    Thread& thread = m.threads[static_cast<std::size_t>(i)];
    thread.done = false;
    thread.open.clear();
    thread.groups.clear();
    thread.written.clear();
    make_context(thread.context, thread.stack.get(), &thread_main);
    m.ready.push_back(i);
  }
  int running = kThreads;
  while (running > 0 && m.error.empty()) {
    if (m.ready.empty()) {
      m.error = "deadlock: " + std::to_string(running) + " threads wait, " +
                std::to_string(m.at_barrier) + " of them at the block's barrier";
      return;
    }
    std::size_t pick = 0;
    if (m.options->order == Order::backward) pick = m.ready.size() - 1;
    if (m.options->order == Order::random) pick = m.random() % m.ready.size();
    m.current = m.ready[pick];
    m.ready.erase(m.ready.begin() + static_cast<std::ptrdiff_t>(pick));
    switch_to(m.scheduler, m.thread().context);
    if (m.thread().done) {
      --running;
      if (!m.thread().groups.empty()) {
        for (const auto& group : m.thread().groups) {
          if (!group.empty()) m.error = "a thread ended with copies on their way";
        }
      }
    }
  }
}

}  // namespace

std::string run(const Options& options, const std::function<void()>& kernel) {
  Machine m;
  m.options = &options;
  m.kernel = &kernel;
  m.shared = std::make_unique<Guarded>(std::max(16U, options.shared_bytes));
  m.random.seed(options.seed);
  machine = &m;
  for (m.x = 0; m.x < options.grid; ++m.x) {
    run_block(m);
    if (!m.error.empty()) {
      machine = nullptr;
      return "block " + std::to_string(m.x) + " thread " + std::to_string(m.current) + ": " +
             m.error;
    }
  }
  machine = nullptr;
  return "";
}

void fail(const std::string& what) {
  if (machine->error.empty()) machine->error = what;
  for (;;) machine->pause();
}

int thread_id() {
  return machine->current;
}
int block_x() {
  return static_cast<int>(machine->x);
}
unsigned shared_base() {
  return kSharedBase;
}

void* shared_pointer(unsigned address, std::size_t bytes, std::size_t alignment) {
  const std::size_t size = machine->shared->bytes();
  if (address < kSharedBase || address - kSharedBase > size ||
      size - (address - kSharedBase) < bytes) {
    fail("shared address " + std::to_string(static_cast<long>(address) - long{kSharedBase}) +
         " of " + std::to_string(bytes) + " bytes is out of range");
  }
  if ((address - kSharedBase) % alignment != 0) {
    fail("shared address " + std::to_string(address - kSharedBase) + " is not aligned to " +
         std::to_string(alignment));
  }
  return machine->shared->begin() + (address - kSharedBase);
}

namespace {

/// What some threads wrote before a barrier becomes visible, now that all of them have come to it.
void show_written(int first, int count) {
  for (int i = first; i < first + count; ++i) {
    Thread& thread = machine->threads[static_cast<std::size_t>(i)];
    for (const Written& each : thread.written) {
      std::memcpy(shared_pointer(each.shared, 16, 16), &each.bytes, 16);
    }
    thread.written.clear();
  }
}

}  // namespace

void sync_warp() {
  together("sync_warp", nullptr, nullptr, 0, 0, [](const std::byte*, std::byte*) {
    show_written(machine->current / kLanes * kLanes, kLanes);
  });
}

void write_shared(unsigned shared, Vector value) {
  // Poison, so that whoever reads it without a barrier in between computes nonsense.
  std::memset(shared_pointer(shared, 16, 16), 0xFF, 16);
  machine->thread().written.push_back({shared, value});
}

void sync_block() {
  Machine& m = *machine;
  if (++m.at_barrier < kThreads) {
    m.pause();
    return;
  }
  show_written(0, kThreads);
  m.at_barrier = 0;
  for (int i = 0; i < kThreads; ++i) {
    if (i != m.current) m.ready.push_back(i);
  }
  // The last to come waits as well, so that any other may go first.
  m.ready.push_back(m.current);
  m.pause();
}

void together(const char* operation, const void* in, void* out, std::size_t in_bytes,
              std::size_t out_bytes,
              const std::function<void(const std::byte*, std::byte*)>& work) {
  Machine& m = *machine;
  Warp& warp = m.warp();
  const auto lane = static_cast<std::size_t>(m.current % kLanes);
  if (warp.arrived == 0) {
    warp.operation = operation;
    warp.in_bytes = in_bytes;
  } else if (std::strcmp(warp.operation, operation) != 0 || warp.in_bytes != in_bytes) {
    fail(std::string("is at ") + operation + ", another lane of its warp at " + warp.operation);
  }
  if (in_bytes > 0) std::memcpy(warp.in.data() + lane * in_bytes, in, in_bytes);
  if (++warp.arrived < kLanes) {
    m.pause();
  } else {
    warp.arrived = 0;
    work(warp.in.data(), warp.out.data());
    const int first = m.current / kLanes * kLanes;
    for (int i = first; i < first + kLanes; ++i) {
      if (i != m.current) m.ready.push_back(i);
    }
  }
  if (out_bytes > 0) {
    std::memcpy(out, machine->warp().out.data() + lane * out_bytes, out_bytes);
  }
}

void cp_async(unsigned shared, const void* global) {
  void* const to = shared_pointer(shared, 16, 16);
  if (reinterpret_cast<std::uintptr_t>(global) % 16 != 0) fail("a copy's source is not aligned");
  if (machine->options->may_copy && !machine->options->may_copy(global)) {
    fail("a copy reads what it must not");
  }
  std::memset(to, 0xFF, 16);
  machine->thread().open.push_back({shared, global});
}

void cp_async_commit() {
  machine->thread().groups.push_back(std::move(machine->thread().open));
  machine->thread().open.clear();
}

void cp_async_wait(int pending) {
  auto& groups = machine->thread().groups;
  while (groups.size() > static_cast<std::size_t>(pending)) {
    for (const Copy& copy : groups.front()) {
      Vector value;
      std::memcpy(&value, copy.global, 16);
      machine->thread().written.push_back({copy.shared, value});
    }
    groups.pop_front();
  }
}

}  // namespace emulator

namespace {

using emulator::together;

template <typename T>
const T* lanes(const std::byte* in) {
  return reinterpret_cast<const T*>(in);
}

struct Shuffle {
  long long value;
  int lane;
};

long long shuffle_bits(const char* name, long long value, int from) {
  const Shuffle in{value, from};
  long long out = 0;
  together(name, &in, &out, sizeof in, sizeof out, [](const std::byte* ins, std::byte* outs) {
    for (int i = 0; i < 32; ++i) {
      const Shuffle& mine = lanes<Shuffle>(ins)[i];
      reinterpret_cast<long long*>(outs)[i] = lanes<Shuffle>(ins)[mine.lane & 31].value;
    }
  });
  return out;
}

struct Four {
  unsigned v[4];
};

void matrices(const char* name, unsigned (&out)[4], unsigned shared, bool transposed) {
  together(name, &shared, out, sizeof shared, sizeof(Four),
           [transposed](const std::byte* ins, std::byte* outs) {
             for (int matrix = 0; matrix < 4; ++matrix) {
               unsigned short rows[8][8];
               for (int r = 0; r < 8; ++r) {
                 const unsigned address = lanes<unsigned>(ins)[matrix * 8 + r];
                 std::memcpy(rows[r], emulator::shared_pointer(address, 16, 16), 16);
               }
               for (int lane = 0; lane < 32; ++lane) {
                 const int row = lane / 4;
                 const int column = lane % 4 * 2;
                 const unsigned low = transposed ? rows[column][row] : rows[row][column];
                 const unsigned high = transposed ? rows[column + 1][row] : rows[row][column + 1];
                 reinterpret_cast<Four*>(outs)[lane].v[matrix] = low | high << 16;
               }
             }
           });
}

struct Operands {
  unsigned a[4];
  unsigned b[2];
  float c[4];
};

template <typename T>
void multiply(const char* name, float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  Operands in{};
  std::copy_n(a, 4, in.a);
  in.b[0] = b0;
  in.b[1] = b1;
  std::copy_n(c, 4, in.c);
  together(name, &in, c, sizeof in, sizeof c, [](const std::byte* ins, std::byte* outs) {
    const auto half = [](unsigned word, int which) {
      return static_cast<double>(widen(T{static_cast<unsigned short>(word >> (16 * which))}));
    };
    double a_full[16][16];
    double b_full[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      const Operands& o = lanes<Operands>(ins)[lane];
      const int g = lane / 4;
      const int q = lane % 4 * 2;
      for (int i = 0; i < 2; ++i) {
        a_full[g][q + i] = half(o.a[0], i);
        a_full[g + 8][q + i] = half(o.a[1], i);
        a_full[g][q + 8 + i] = half(o.a[2], i);
        a_full[g + 8][q + 8 + i] = half(o.a[3], i);
        b_full[q + i][g] = half(o.b[0], i);
        b_full[q + 8 + i][g] = half(o.b[1], i);
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      const Operands& o = lanes<Operands>(ins)[lane];
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8;
        const int column = lane % 4 * 2 + i % 2;
        double sum = o.c[i];
        for (int k = 0; k < 16; ++k) sum += a_full[row][k] * b_full[k][column];
        reinterpret_cast<float*>(outs)[lane * 4 + i] = static_cast<float>(sum);
      }
    }
  });
}

}  // namespace

void sync_warp() {
  emulator::sync_warp();
}
bool any_in_warp(bool value) {
  const int in = value ? 1 : 0;
  int out = 0;
  together("any", &in, &out, sizeof in, sizeof out, [](const std::byte* ins, std::byte* outs) {
    int any = 0;
    for (int i = 0; i < 32; ++i) any |= lanes<int>(ins)[i];
    for (int i = 0; i < 32; ++i) reinterpret_cast<int*>(outs)[i] = any;
  });
  return out != 0;
}
float shuffle_xor(float value, int mask) {
  return float_of_bits(static_cast<unsigned>(
      shuffle_bits("shuffle_xor", bits_of_float(value), emulator::thread_id() % 32 ^ mask)));
}
float shuffle(float value, int lane) {
  return float_of_bits(
      static_cast<unsigned>(shuffle_bits("shuffle float", bits_of_float(value), lane)));
}
long long shuffle(long long value, int lane) {
  return shuffle_bits("shuffle", value, lane);
}

void store_shared(unsigned shared, Vector value) {
  emulator::write_shared(shared, value);
}
Vector load_shared(unsigned shared) {
  Vector value;
  std::memcpy(&value, emulator::shared_pointer(shared, 16, 16), 16);
  return value;
}
void load_matrix(unsigned (&out)[4], unsigned shared) {
  matrices("ldmatrix", out, shared, false);
}
void load_matrix_transposed(unsigned (&out)[4], unsigned shared) {
  matrices("ldmatrix.trans", out, shared, true);
}
unsigned transpose_matrix(unsigned value) {
  unsigned out = 0;
  together("movmatrix", &value, &out, sizeof value, sizeof out,
           [](const std::byte* ins, std::byte* outs) {
             const auto at = [ins](int row, int column) {
               const unsigned word = lanes<unsigned>(ins)[row * 4 + column / 2];
               return word >> (16 * (column % 2)) & 0xFFFFu;
             };
             for (int lane = 0; lane < 32; ++lane) {
               const int row = lane / 4;
               const int column = lane % 4 * 2;
               reinterpret_cast<unsigned*>(outs)[lane] = at(column, row) | at(column + 1, row)
                                                                               << 16;
             }
           });
  return out;
}
void multiply_add(Float16, float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  multiply<Float16>("mma f16", c, a, b0, b1);
}
void multiply_add(BFloat16, float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  multiply<BFloat16>("mma bf16", c, a, b0, b1);
}

void atomic_min(unsigned long long* address, unsigned long long value) {
  *address = std::min(*address, value);
}
void atomic_add(unsigned long long* address, unsigned long long value) {
  *address += value;
}

}  // namespace pipelive::cuda::attention

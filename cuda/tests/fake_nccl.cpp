// A stand-in for libnccl.so.2, opened the same way. It checks what it is given and in which order,
// and moves bytes between threads or processes through files in a directory that the unique id
// names. Written against nccl.h's documentation, with its own types, so that a mistake in
// nccl_api.hpp shows.
//
// As on a device, the operations of one issuing thread run one after the other in the order of
// their issue, and a send completes only when it has been received: communicators that are issued
// in opposite orders at two ranks stall.
//
// As with the real one, a communicator is no longer in progress once its operation is in the
// stream, some polls after the issue; when the bytes have moved, only the stream says: of the fake
// driver, or one of the fake's own. Until then a receive buffer holds nothing of use, and a send
// buffer is read at the end. Without a stream to ask, in progress means until the end.
#include <dlfcn.h>
#include <link.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <climits>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <fstream>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#define FAKE_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

enum Result {
  success = 0,
  system_error = 2,
  invalid_argument = 4,
  invalid_usage = 5,
  remote_error = 6,
  in_progress = 7,
};

struct UniqueId {
  char internal[128];
};

// ncclConfig_v22700, longer than what a caller of 2.18 passes.
struct Config {
  std::size_t size;
  unsigned magic;
  unsigned version;
  int blocking;
  int cga_cluster_size;
  int min_ctas;
  int max_ctas;
  const char* net_name;
  int split_share;
  int traffic_class;
  const char* comm_name;
  int collnet_enable;
  int cta_policy;
  int shrink_share;
  int nvls_ctas;
};

#ifndef PIPELIVE_FAKE_NCCL_VERSION
#define PIPELIVE_FAKE_NCCL_VERSION 22703
#endif

struct Operation {
  bool is_send = false;
  std::byte* data = nullptr;
  std::size_t bytes = 0;
  int peer = 0;
  std::uint64_t number = 0;
  bool launched = false;
  bool written = false;
  struct Comm* comm = nullptr;
  void* stream = nullptr;
  std::uint64_t ticket = 0;
  // Of the operation's place in a stream of the fake driver, which outlives the queue's.
  std::shared_ptr<bool> done = std::make_shared<bool>(false);
};

struct Comm {
  std::string directory;
  int rank = 0;
  int ranks = 0;
  int device = -1;        // that the thread which made it had entered
  std::thread::id owner;  // the one that issues and polls: whoever does first
  bool ending = false;
  bool up = false;
  int error = success;
  std::size_t pending = 0;  // not complete
  int polls = 0;            // until what was issued last is in the stream
  std::map<int, std::uint64_t> sent;
  std::map<int, std::uint64_t> received;
};

struct World {
  std::mutex mutex;
  std::condition_variable changed;
  std::set<Comm*> comms;
  // Of each issuing thread, in the order of issue.
  std::map<std::thread::id, std::deque<Operation>> queues;
  std::map<std::thread::id, int> groups;
  std::uint64_t tickets = 0;
  std::map<std::string, int> settings;
  std::map<std::string, int> counts;
  std::string last_error;
};

// Stands for cudaSetDevice; -1 where nothing was entered.
thread_local int entered = -1;

World& world() {
  static World* const instance = [] {
    auto* made = new World();
    // "stall=1,version=23004", for processes that a test starts.
    const char* text = std::getenv("PIPELIVE_FAKE_NCCL_SETTINGS");
    const std::string all = text != nullptr ? text : "";
    for (std::size_t at = 0; at < all.size();) {
      const std::size_t end = std::min(all.find(',', at), all.size());
      const std::string one = all.substr(at, end - at);
      const std::size_t equal = one.find('=');
      if (equal != std::string::npos) {
        made->settings[one.substr(0, equal)] = std::atoi(one.c_str() + equal + 1);
      }
      at = end + 1;
    }
    return made;
  }();
  return *instance;
}

// World's mutex is held in all of the following.

Result violation(World& w, const std::string& what) {
  w.counts["violations"] += 1;
  w.last_error = "fake NCCL: " + what;
  std::fprintf(stderr, "%s\n", w.last_error.c_str());
  return invalid_usage;
}

bool exists(const std::string& path) {
  struct stat status{};
  return stat(path.c_str(), &status) == 0;
}

void write_file(const std::string& path, const std::byte* data, std::size_t bytes) {
  const std::string part = path + ".part" + std::to_string(getpid());
  {
    std::ofstream file(part, std::ios::binary);
    file.write(reinterpret_cast<const char*>(data), static_cast<std::streamsize>(bytes));
  }
  std::rename(part.c_str(), path.c_str());
}

Comm* known(World& w, void* handle, const char* call, Result& result) {
  auto* const comm = static_cast<Comm*>(handle);
  if (!w.comms.contains(comm) || comm->ending) {
    result = violation(w, std::string(call) + " on a communicator that is not there");
    return nullptr;
  }
  if (comm->device != entered) {
    result = violation(w, std::string(call) + " on another device than the communicator's");
  }
  return comm;
}

// For the calls that one thread has to make.
Comm* owned(World& w, void* handle, const char* call, Result& result) {
  Comm* const comm = known(w, handle, call, result);
  if (comm == nullptr) return nullptr;
  if (comm->owner == std::thread::id{}) comm->owner = std::this_thread::get_id();
  if (comm->owner != std::this_thread::get_id()) {
    result = violation(w, std::string(call) + " from another thread than the one that polls");
  }
  return comm;
}

// What cudaFree, cudaFreeHost and cudaHostAlloc do: they wait for all that runs on the device.
void wait_for_device(World& w, std::unique_lock<std::mutex>& lock, const Comm* self, int device,
                     const char* call) {
  const auto busy = [&] {
    return device >= 0 && std::any_of(w.comms.begin(), w.comms.end(), [&](const Comm* other) {
             return other != self && other->device == device && other->pending != 0;
           });
  };
  // Bounded, so that a deadlock fails a test instead of hanging it.
  if (!w.changed.wait_for(lock, std::chrono::seconds(10), [&] { return !busy(); })) {
    violation(w, std::string(call) + " waited for the device for ever");
  }
}

// One step of the oldest operation of this thread; true where it is complete.
bool advance(World& w, Operation& op) {
  if (!op.launched || w.settings["stall"] != 0) return false;
  Comm& comm = *op.comm;
  const int from = op.is_send ? comm.rank : op.peer;
  const int to = op.is_send ? op.peer : comm.rank;
  const std::string path = comm.directory + "/" + std::to_string(from) + "-" + std::to_string(to) +
                           "-" + std::to_string(op.number);
  if (op.is_send) {
    if (!op.written) {
      if (!exists(path + ".ready")) return false;
      std::remove((path + ".ready").c_str());
      write_file(path, op.data, op.bytes);
      op.written = true;
    }
    if (!exists(path + ".done")) return false;
    std::remove((path + ".done").c_str());
    return true;
  }
  if (!op.written) {
    write_file(path + ".ready", nullptr, 0);
    op.written = true;
  }
  struct stat status{};
  if (stat(path.c_str(), &status) != 0) return false;
  if (static_cast<std::size_t>(status.st_size) != op.bytes) {
    violation(w, "a send of " + std::to_string(status.st_size) + " bytes meets a receive of " +
                     std::to_string(op.bytes));
    comm.error = remote_error;
    return true;
  }
  std::ifstream file(path, std::ios::binary);
  file.read(reinterpret_cast<char*>(op.data), static_cast<std::streamsize>(op.bytes));
  std::remove(path.c_str());
  write_file(path + ".done", nullptr, 0);
  return true;
}

void progress(World& w, std::deque<Operation>& queue) {
  // The two halves of a group run at once.
  for (std::size_t i = 0; i < queue.size() && i < 2;) {
    const bool alone = i == 0 || queue[0].comm == queue[i].comm;
    if (alone && advance(w, queue[i])) {
      queue[i].comm->pending -= 1;
      *queue[i].done = true;
      queue.erase(queue.begin() + static_cast<std::ptrdiff_t>(i));
      w.counts["operations"] += 1;
      w.changed.notify_all();
    } else {
      ++i;
    }
  }
}

void progress(World& w) {
  for (auto& [thread, queue] : w.queues) progress(w, queue);
}

// The fake driver's way to put work into a stream, where it is loaded.
using Submit = int(void* stream, int (*work)(void*), void* data);
Submit* driver_submit() {
  static Submit* const found = [] {
    std::string path;
    dl_iterate_phdr(
        [](dl_phdr_info* info, std::size_t, void* into) {
          const std::string name = info->dlpi_name;
          if (name.find("libpipelive_fake_driver.so") == std::string::npos) return 0;
          *static_cast<std::string*>(into) = name;
          return 1;
        },
        &path);
    void* const library = path.empty() ? nullptr : dlopen(path.c_str(), RTLD_NOW | RTLD_NOLOAD);
    return library == nullptr ? nullptr
                              : reinterpret_cast<Submit*>(dlsym(library, "fake_driver_submit"));
  }();
  return found;
}

// Streams of the fake's own; their number is their handle. Below those of a driver.
constexpr std::uintptr_t kMostOwnStreams = 4096;
bool is_own(const void* stream) {
  const auto number = reinterpret_cast<std::uintptr_t>(stream);
  return number != 0 && number < kMostOwnStreams;
}

// What waits in a stream of the fake driver for an operation.
int operation_is_done(void* data) {
  World& w = world();
  const auto* const done = static_cast<std::shared_ptr<bool>*>(data);
  bool over = false;
  {
    const std::lock_guard lock(w.mutex);
    progress(w);
    over = **done;
  }
  if (over) delete done;
  return over ? 1 : 0;
}

int issue(bool is_send, void* data, std::size_t count, int type, int peer, void* handle,
          void* stream) {
  World& w = world();
  const std::lock_guard lock(w.mutex);
  Result result = success;
  Comm* const comm = owned(w, handle, is_send ? "ncclSend" : "ncclRecv", result);
  if (comm == nullptr || result != success) return result;
  const int group = w.groups[comm->owner];
  if (!comm->up) return violation(w, "a transfer before the communicator is up");
  if (comm->error != success) return violation(w, "a transfer after an error");
  if (comm->polls != 0 && group == 0) {
    return violation(w, "a transfer while the communicator is in progress");
  }
  if (data == nullptr || count == 0 || type != 1 || peer < 0 || peer >= comm->ranks) {
    violation(w, "a transfer with wrong arguments");
    return invalid_argument;
  }
  if (w.settings["fail_issue"] != 0) return system_error;
  Operation op;
  op.is_send = is_send;
  op.data = static_cast<std::byte*>(data);
  op.bytes = count;
  op.peer = peer;
  op.number = is_send ? comm->sent[peer]++ : comm->received[peer]++;
  op.comm = comm;
  op.stream = stream;
  op.ticket = ++w.tickets;
  if (!is_send) std::memset(data, 0xee, count);
  comm->pending += 1;
  comm->polls = 2;
  w.queues[comm->owner].push_back(op);
  // Either may come back while the work is on its way into the stream.
  return group != 0 || op.ticket % 2 == 0 ? success : in_progress;
}

}  // namespace

// -- what tests set and read ------------------------------------------------------------------

/// stall, stall_init, fail_init, fail_issue, async_error (a result), version;
/// fail_init_rank and fail_first_rank: a rank, counted from 1, that fails to come up, or at its
/// first operation; hold_abort: while set, ncclCommAbort does not return.
FAKE_EXPORT void fake_nccl_set(const char* name, int value) {
  World& w = world();
  const std::lock_guard lock(w.mutex);
  w.settings[name] = value;
  w.changed.notify_all();
}

/// The calling thread works on that device from now on; -1: on none that is known.
FAKE_EXPORT void fake_nccl_enter(int device) {
  entered = device;
}

/// violations, operations, made, aborting, aborted; alive, pending.
FAKE_EXPORT int fake_nccl_count(const char* name) {
  World& w = world();
  const std::lock_guard lock(w.mutex);
  if (std::string(name) == "alive") return static_cast<int>(w.comms.size());
  if (std::string(name) == "pending") {
    std::size_t all = 0;
    for (const Comm* comm : w.comms) all += comm->pending;
    return static_cast<int>(all);
  }
  return w.counts[name];
}

/// A stream of the fake's own.
FAKE_EXPORT void* fake_nccl_stream() {
  static std::atomic<std::uintptr_t> next{1};
  return reinterpret_cast<void*>(next++ % kMostOwnStreams);
}

/// Marks the end of what such a stream has been given so far, and whether that is done.
FAKE_EXPORT std::uint64_t fake_nccl_record(void* /*stream*/) {
  World& w = world();
  const std::lock_guard lock(w.mutex);
  return w.tickets;
}
FAKE_EXPORT int fake_nccl_done(void* stream, std::uint64_t ticket) {
  World& w = world();
  const std::lock_guard lock(w.mutex);
  progress(w);
  for (const auto& [thread, queue] : w.queues) {
    for (const Operation& op : queue) {
      if (op.stream == stream && op.ticket <= ticket) return 0;
    }
  }
  return 1;
}

// -- the API ------------------------------------------------------------------------------------

FAKE_EXPORT int ncclGetVersion(int* version) {
  World& w = world();
  const std::lock_guard lock(w.mutex);
  const int set = w.settings["version"];
  *version = set != 0 ? set : PIPELIVE_FAKE_NCCL_VERSION;
  return success;
}

FAKE_EXPORT const char* ncclGetErrorString(int result) {
  switch (result) {
    case success:
      return "no error";
    case system_error:
      return "unhandled system error";
    case invalid_usage:
      return "invalid usage";
    case remote_error:
      return "remote process exited or there was a network error";
    case in_progress:
      return "NCCL operation in progress";
    default:
      return "some error";
  }
}

FAKE_EXPORT const char* ncclGetLastError(void*) {
  World& w = world();
  const std::lock_guard lock(w.mutex);
  return w.last_error.c_str();
}

FAKE_EXPORT int ncclGetUniqueId(UniqueId* id) {
  const char* base = std::getenv("TMPDIR");
  std::string path = std::string(base != nullptr ? base : "/tmp") + "/fake-nccl-XXXXXX";
  if (mkdtemp(path.data()) == nullptr || path.size() >= sizeof id->internal) return system_error;
  std::memset(id, 0, sizeof *id);
  std::memcpy(id->internal, path.data(), path.size());
  return success;
}

FAKE_EXPORT int ncclCommInitRankConfig(Comm** comm, int ranks, UniqueId id, int rank,
                                       Config* given) {
  World& w = world();
  std::unique_lock lock(w.mutex);
  *comm = nullptr;
  Config config{};
  config.comm_name = nullptr;
  const std::size_t size = given != nullptr ? given->size : 0;
  if (size < offsetof(Config, net_name) || size > 4096) {
    violation(w, "a config of " + std::to_string(size) + " bytes");
    return invalid_argument;
  }
  std::memcpy(&config, given, std::min(size, sizeof config));
  if (config.magic != 0xcafebeefU) {
    violation(w, "a config that was not initialised");
    return invalid_argument;
  }
  if (config.version < 21400 || config.version > 22703 + 10000) violation(w, "config version");
  if (config.blocking != 0) violation(w, "a communicator that blocks");
  for (const int field : {config.cga_cluster_size, config.split_share}) {
    if (field != INT_MIN) violation(w, "a config field that should be undefined");
  }
  if (config.min_ctas < 1 || config.max_ctas < config.min_ctas || config.max_ctas > 64) {
    violation(w, "CTAs that are not 1 <= least <= most <= 64");
  }
  if (rank < 0 || rank >= ranks) return invalid_argument;
  wait_for_device(w, lock, nullptr, entered, "ncclCommInitRankConfig");
  if (w.settings["fail_init"] != 0 || w.settings["fail_init_rank"] == rank + 1) {
    return system_error;
  }
  auto* const made = new Comm();
  made->directory = id.internal;
  made->rank = rank;
  made->ranks = ranks;
  made->device = entered;
  write_file(made->directory + "/rank-" + std::to_string(rank), nullptr, 0);
  w.comms.insert(made);
  w.counts["made"] += 1;
  *comm = made;
  return in_progress;
}

FAKE_EXPORT int ncclCommGetAsyncError(void* handle, int* state) {
  World& w = world();
  std::unique_lock lock(w.mutex);
  Result result = success;
  Comm* const comm = owned(w, handle, "ncclCommGetAsyncError", result);
  if (comm == nullptr) return result;
  if (!comm->up) {
    bool all = w.settings["stall_init"] == 0;
    for (int rank = 0; rank < comm->ranks; ++rank) {
      all = all && exists(comm->directory + "/rank-" + std::to_string(rank));
    }
    comm->up = all;
    *state = all ? success : in_progress;
    return success;
  }
  if (w.settings["async_error"] != 0 && comm->pending != 0) {
    comm->error = w.settings["async_error"];
  }
  // The connection to a peer is made by the first transfer, so only that shows what is wrong.
  if (w.settings["fail_first_rank"] == comm->rank + 1 && comm->pending != 0) {
    comm->error = system_error;
  }
  if (comm->error != success) {
    *state = comm->error;
    return success;
  }
  // Copies of the shared flags, as the driver is asked without the lock: it asks back.
  std::vector<std::pair<void*, std::shared_ptr<bool>>> launched;
  const auto waits = [&] {
    const auto& queue = w.queues[comm->owner];
    return std::any_of(queue.begin(), queue.end(), [&](const Operation& op) {
      const bool asked = is_own(op.stream) || (op.stream != nullptr && driver_submit() != nullptr);
      return op.comm == comm && !asked;
    });
  };
  if (comm->polls != 0 && --comm->polls == 0) {
    for (Operation& op : w.queues[comm->owner]) {
      if (op.comm != comm || std::exchange(op.launched, true)) continue;
      if (op.stream != nullptr && !is_own(op.stream) && driver_submit() != nullptr) {
        launched.emplace_back(op.stream, op.done);
      }
    }
  }
  if (waits()) {
    progress(w);
    if (waits()) comm->polls = std::max(comm->polls, 1);
  }
  *state = comm->error != success ? comm->error : comm->polls != 0 ? in_progress : success;
  lock.unlock();
  for (auto& [stream, done] : launched) {
    driver_submit()(stream, &operation_is_done, new std::shared_ptr<bool>(std::move(done)));
  }
  return success;
}

#ifndef PIPELIVE_FAKE_WITHOUT_ABORT
FAKE_EXPORT int ncclCommAbort(void* handle) {
  World& w = world();
  std::unique_lock lock(w.mutex);
  Result result = success;
  Comm* const comm = known(w, handle, "ncclCommAbort", result);
  if (comm == nullptr) return result;
  comm->ending = true;
  for (auto& [thread, queue] : w.queues) {
    std::erase_if(queue, [&](const Operation& op) {
      if (op.comm != comm) return false;
      *op.done = true;  // its kernel ends
      return true;
    });
  }
  comm->pending = 0;
  w.counts["aborting"] += 1;
  w.changed.notify_all();
  wait_for_device(w, lock, comm, comm->device, "ncclCommAbort");
  w.changed.wait_for(lock, std::chrono::seconds(10), [&] { return w.settings["hold_abort"] == 0; });
  w.comms.erase(comm);
  w.counts["aborted"] += 1;
  delete comm;
  w.changed.notify_all();
  return success;
}
#endif

FAKE_EXPORT int ncclSend(const void* data, std::size_t count, int type, int peer, void* comm,
                         void* stream) {
  return issue(true, const_cast<void*>(data), count, type, peer, comm, stream);
}

FAKE_EXPORT int ncclRecv(void* data, std::size_t count, int type, int peer, void* comm,
                         void* stream) {
  return issue(false, data, count, type, peer, comm, stream);
}

FAKE_EXPORT int ncclGroupStart() {
  World& w = world();
  const std::lock_guard lock(w.mutex);
  w.groups[std::this_thread::get_id()] += 1;
  return success;
}

FAKE_EXPORT int ncclGroupEnd() {
  World& w = world();
  const std::lock_guard lock(w.mutex);
  int& group = w.groups[std::this_thread::get_id()];
  if (group == 0) return violation(w, "ncclGroupEnd without ncclGroupStart");
  group -= 1;
  return in_progress;
}

// mbarriers and the copies of the tensor memory accelerator. A copy is carried out as late as it may be.
#include <algorithm>
#include <map>

#include "machine.h"

namespace hopper {
namespace {
struct Mbarrier {
  int number, count, pending;
  int64_t bytes = 0;  // expected less arrived
  uint32_t phase = 0;
  Sum sum;
  Clock done_seen, done_fenced;
  uint32_t copies = 0;  // ever begun
};
std::map<void*, Mbarrier> mbarriers;

struct Load {
  CUtensorMap map;
  Mbarrier* mbarrier;
  char* shared;
  int at[5];
  uint32_t step;
};
std::vector<Load> loads;

struct Store {
  CUtensorMap map;
  const char* shared;
  int at[5];
  Stamp stamp;
};
struct Stores {
  std::vector<std::vector<Store>> groups;
  std::vector<Store> open;
  uint32_t begun = 0, finished = 0;
};
std::map<int, Stores> stores;  // by thread

struct Copy {  // cp.async
  void* shared;
  const void* global;
  int bytes;
};
std::map<int, std::vector<std::vector<Copy>>> copies;  // by thread: its groups, of which the last is open

Mbarrier& find(void* at) {
  auto found = mbarriers.find(at);
  if (found == mbarriers.end()) fail("an mbarrier is used before it is initialised");
  return found->second;
}
std::string name(const Mbarrier& m) { return "mbarrier " + std::to_string(m.number); }

void wake_waiting(const Mbarrier& m) {
  for (auto& t : threads)
    if (t.blocked && t.wait.object == &m) wake(t);
}

void settle(Mbarrier& m) {
  if (m.pending || m.bytes) return;
  m.phase ^= 1;
  m.pending = m.count;
  m.sum.resize(current->now.seen->size());
  m.done_seen = std::make_shared<const Steps>(m.sum.seen);
  m.done_fenced = std::make_shared<const Steps>(m.sum.fenced);
  wake_waiting(m);
}

// Calls each(shared, global or null, bytes) for every run of 16 bytes of the box.
template <class Each> void tile(const CUtensorMap& map, const char* shared, const int* at, Each each) {
  uint64_t item = map.strides[0], row = map.box[0] * item, rows = 1;
  for (uint32_t d = 1; d < map.rank; ++d) rows *= map.box[d];
  if (shared_address(shared) % 128) fail("a TMA copy's shared address is not aligned to 128 bytes");
  if (map.swizzle && row > (16u << map.swizzle)) fail("a TMA copy's rows are wider than its swizzle");
  for (uint64_t r = 0; r < rows; ++r) {
    uint64_t rest = r;
    int64_t offset = 0;
    bool inside = true;
    for (uint32_t d = 1; d < map.rank; ++d) {
      int64_t i = at[d] + int64_t(rest % map.box[d]);
      rest /= map.box[d];
      inside &= 0 <= i && i < int64_t(map.dims[d]);
      offset += i * map.strides[d];
    }
    for (uint64_t b = 0; b < row; b += 16) {
      uint64_t to = shared_address(shared) + r * row + b;
      to ^= (to >> 7 & ((1u << map.swizzle) - 1)) << 4;
      int64_t i = at[0] + int64_t(b / item);
      bool here = inside && 0 <= i && i < int64_t(map.dims[0]);
      auto moved = const_cast<char*>(shared) + (to - shared_address(shared));
      each(moved, here ? map.base + offset + i * item : nullptr, std::min<uint64_t>(16, row - b));
    }
  }
}

uint64_t box_bytes(const CUtensorMap& map) {
  uint64_t bytes = map.strides[0];
  for (uint32_t d = 0; d < map.rank; ++d) bytes *= map.box[d];
  return bytes;
}

void carry_out(const Store& s) {
  tile(s.map, s.shared, s.at, [&](char* shared, char* global, size_t bytes) {
    if (!global) return;
    access(global, bytes, ASYNC_WRITE, s.stamp, nullptr);
    memcpy(global, shared, bytes);
  });
}
}  // namespace

std::string mbarrier_state(const void* at) {
  auto& m = *static_cast<const Mbarrier*>(at);
  return name(m) + " (" + std::to_string(m.pending) + " arrivals and " + std::to_string(m.bytes) + " bytes to come)";
}

void reset_copies() { mbarriers.clear(), loads.clear(), stores.clear(), copies.clear(); }

void check_copies_done() {
  if (!loads.empty()) fail("a CTA ends while a TMA load is under way");
  for (auto& [thread, groups] : copies)
    if (!groups.empty() && !(groups.size() == 1 && groups[0].empty())) fail("a CTA ends while cp.async is under way");
  for (auto& [thread, s] : stores)
    if (!s.open.empty() || !s.groups.empty()) fail("a CTA ends while a TMA store reads its shared memory");
}

// The thread writes when it issues, and again when it waits: what others do in between is a race.
void copy_async(void* shared, const void* global, int bytes) {
  if (!in_shared(shared, bytes)) fail("cp.async writes outside shared memory");
  access(shared, bytes, WRITE, current->now, __builtin_return_address(0));
  memset(shared, 0xff, bytes);
  auto& groups = copies[current->id];
  if (groups.empty()) groups.emplace_back();
  groups.back().push_back({shared, global, bytes});
}

void copy_commit() { copies[current->id].resize(std::max<size_t>(1, copies[current->id].size()) + 1); }

void copy_wait(int left) {
  auto& groups = copies[current->id];
  for (; int(groups.size()) > left + 1; groups.erase(groups.begin()))
    for (auto& c : groups.front()) {
      access(c.shared, c.bytes, WRITE, current->now, __builtin_return_address(0));
      if (c.global) access(c.global, c.bytes, READ, current->now, __builtin_return_address(0));
      c.global ? memcpy(c.shared, c.global, c.bytes) : memset(c.shared, 0, c.bytes);
    }
}

void mbarrier_init(void* at, uint32_t count) {
  int number = mbarriers.size();
  if (auto found = mbarriers.find(at); found != mbarriers.end()) number = found->second.number;
  mbarriers[at] = Mbarrier{.number = number, .count = int(count), .pending = int(count)};
}

void mbarrier_wait(void* at, uint32_t parity) {
  Mbarrier& m = find(at);
  while (m.phase == (parity & 1))
    block({.kind = Wait::MBARRIER, .object = &m, .number = int(parity & 1)});
  if (m.done_seen) acquire(current->now, m.done_seen, m.done_fenced);
}

void mbarrier_arrive(void* at) {
  Mbarrier& m = find(at);
  if (!m.pending) fail("more arrivals at " + name(m) + " than it counts");
  m.sum.add(current->now);
  ++current->now.step;
  --m.pending;
  settle(m);
}

void mbarrier_expect(void* at, uint32_t bytes) { find(at).bytes += bytes; }

void tma_load(const CUtensorMap& map, void* mbarrier, void* shared, const int* at) {
  Mbarrier& m = find(mbarrier);
  Load load{map, &m, static_cast<char*>(shared), {}, ++m.copies};
  std::copy(at, at + map.rank, load.at);
  Stamp as = handed(current->now, agent_of_mbarrier(m.number), load.step);
  tile(map, load.shared, load.at, [&](char* to, char*, size_t bytes) {
    if (!in_shared(to, bytes)) fail("a TMA load writes outside shared memory");
    access(to, bytes, ASYNC_WRITE, as, __builtin_return_address(0));
    memset(to, 0xff, bytes);
  });
  ++current->now.step;
  loads.push_back(load);
}

bool complete_a_copy(uint32_t choice) {
  if (loads.empty()) return false;
  auto chosen = loads.begin() + choice % loads.size();
  Load load = *chosen;
  loads.erase(chosen);
  tile(load.map, load.shared, load.at, [&](char* to, char* from, size_t bytes) {
    if (from && !in_arena(from, bytes)) fail("a TMA load reads outside its tensor");
    from ? memcpy(to, from, bytes) : memset(to, 0, bytes);
  });
  Mbarrier& m = *load.mbarrier;
  m.bytes -= box_bytes(load.map);
  m.sum.resize(threads[0].now.seen->size());
  auto& step = m.sum.seen[agent_of_mbarrier(m.number)];
  step = std::max(step, load.step);
  settle(m);
  return true;
}

void tma_store(const CUtensorMap& map, const void* shared, const int* at) {
  Stores& mine = stores[current->id];
  Stamp as = handed(current->now, agent_of_stores(current->id), mine.begun + 1);
  Store store{map, static_cast<const char*>(shared), {}, as};
  std::copy(at, at + map.rank, store.at);
  tile(map, store.shared, store.at, [&](char* from, char*, size_t bytes) {
    if (!in_shared(from, bytes)) fail("a TMA store reads outside shared memory");
    access(from, bytes, ASYNC_READ, store.stamp, __builtin_return_address(0));
  });
  ++current->now.step;
  mine.open.push_back(store);
}

void tma_commit() {
  Stores& mine = stores[current->id];
  mine.groups.push_back(std::move(mine.open));
  mine.open.clear();
  ++mine.begun;
}

void tma_wait(int groups) {
  Stores& mine = stores[current->id];
  while (int(mine.groups.size()) > groups) {
    ++mine.finished;
    for (auto& s : mine.groups.front()) carry_out(s);
    mine.groups.erase(mine.groups.begin());
  }
  learn(current->now, agent_of_stores(current->id), mine.finished);
}
}  // namespace hopper

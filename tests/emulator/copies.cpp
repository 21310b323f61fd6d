// mbarriers and the copies of the tensor memory accelerator. A copy is carried out as late as it may be.
#include <algorithm>
#include <map>

#include "machine.h"

namespace hopper {
namespace {
struct Mbarrier {
  int number, count, pending;
  uint32_t owner, made, fenced = 0;  // who initialised it; at which of its steps it did, and fenced that (0: not yet)
  int64_t bytes = 0;  // expected less arrived
  uint32_t phase = 0;
  Sum sum;
  Known done;  // with the last phase
  uint32_t copies = 0;  // ever begun
};
std::map<void*, Mbarrier> mbarriers;

struct Box {  // what a copy of the tensor memory accelerator moves
  CUtensorMap map;
  char* shared;
  int at[5];
  Box(const CUtensorMap& map, const void* shared, const int* at)
      : map(map), shared(static_cast<char*>(const_cast<void*>(shared))) {
    std::copy(at, at + map.rank, this->at);
  }
};

struct Load {
  Box box;
  Mbarrier* mbarrier;
  uint32_t step;
};
std::vector<Load> loads;

struct Stores {
  std::vector<std::vector<Box>> groups;  // committed, of which no wait has said yet that they read their tile
  std::vector<Box> open;
  uint32_t committed = 0;
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
  if (found == mbarriers.end() || !current->now.sees(found->second.owner, found->second.made))
    fail(thread_name(current->id) + " uses an mbarrier before it knows that it is initialised");
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
  m.done = m.sum.known();
  wake_waiting(m);
}

constexpr size_t RUN = 16;  // bytes; all copies are of whole ones

// Calls each(shared, global or null) for every run of the box.
template <class Each> void tile(const Box& box, Each each) {
  const CUtensorMap& map = box.map;
  uint64_t item = map.strides[0], row = map.box[0] * item, rows = 1, begin = shared_address(box.shared);
  for (uint32_t d = 1; d < map.rank; ++d) rows *= map.box[d];
  uint64_t unit = item == 1 ? RUN : 128;  // bytes without a tensor map may stand at any run
  if (begin % unit) fail("a TMA copy's shared address is not aligned to " + std::to_string(unit) + " bytes");
  if (row % RUN || reinterpret_cast<uintptr_t>(map.base) % RUN) fail("a TMA copy takes whole 16 bytes");
  if (map.swizzle && row > (16u << map.swizzle)) fail("a TMA copy's rows are wider than its swizzle");
  for (uint64_t r = 0; r < rows; ++r) {
    uint64_t rest = r;
    int64_t offset = 0;
    bool inside = true;
    for (uint32_t d = 1; d < map.rank; ++d) {
      int64_t i = box.at[d] + int64_t(rest % map.box[d]);
      rest /= map.box[d];
      inside &= 0 <= i && i < int64_t(map.dims[d]);
      offset += i * map.strides[d];
    }
    for (uint64_t b = 0; b < row; b += RUN) {
      uint64_t to = begin + r * row + b;
      to ^= (to >> 7 & ((1u << map.swizzle) - 1)) << 4;
      int64_t i = box.at[0] + int64_t(b / item);
      bool here = inside && 0 <= i && i < int64_t(map.dims[0]);
      each(box.shared + (to - begin), here ? map.base + offset + i * item : nullptr);
    }
  }
}

uint64_t bytes_of(const CUtensorMap& map) {
  uint64_t bytes = map.strides[0];
  for (uint32_t d = 0; d < map.rank; ++d) bytes *= map.box[d];
  return bytes;
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
  auto found = mbarriers.find(at);
  int number = found == mbarriers.end() ? mbarriers.size() : found->second.number;
  mbarriers[at] = {number, int(count), int(count), uint32_t(current->id), current->now.step};
}

void fence_mbarriers() {
  for (auto& [at, m] : mbarriers)
    if (m.owner == uint32_t(current->id)) m.fenced = current->now.step;
}

void mbarrier_wait(void* at, uint32_t parity) {
  Mbarrier& m = find(at);
  while (m.phase == (parity & 1))
    block({.kind = Wait::MBARRIER, .object = &m, .number = int(parity & 1)});
  if (m.done.seen) acquire(current->now, m.done);
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

// A copy's accesses are noted when it is issued: from then until somebody learns that it is complete they may happen.
void tma_load(const CUtensorMap& map, void* mbarrier, void* shared, const int* at) {
  Mbarrier& m = find(mbarrier);
  const Stamp& now = current->now;
  if (!(m.fenced && now.sees(m.owner, m.fenced)) && !now.sees_fenced(m.owner, m.made))
    fail("no fence.mbarrier_init: " + thread_name(current->id) + " issues a TMA load to " + name(m));
  Load load{{map, shared, at}, &m, ++m.copies};
  Stamp stamp = handed(now, agent(LOADS, m.number), load.step);
  auto pc = __builtin_return_address(0);
  tile(load.box, [&](char* to, char* from) {
    if (from) access(from, RUN, ASYNC_READ, stamp, pc);
    access(to, RUN, ASYNC_WRITE, stamp, pc);
    memset(to, 0xff, RUN);
  });
  ++current->now.step;
  loads.push_back(load);
}

bool complete_a_copy(uint32_t choice) {
  if (loads.empty()) return false;
  auto chosen = loads.begin() + choice % loads.size();
  Load load = *chosen;
  loads.erase(chosen);
  tile(load.box, [](char* to, char* from) { from ? memcpy(to, from, RUN) : memset(to, 0, RUN); });
  Mbarrier& m = *load.mbarrier;
  m.bytes -= bytes_of(load.box.map);
  auto& step = m.sum.seen[agent(LOADS, m.number)];
  step = std::max(step, load.step);
  settle(m);
  return true;
}

// Reading the tile and writing the tensor are two agents' work: a wait for the first says nothing of the second.
void tma_store(const CUtensorMap& map, const void* shared, const int* at) {
  Stores& mine = stores[current->id];
  Box box(map, shared, at);
  Stamp reads = handed(current->now, agent(STORE_READS, current->id / 32), mine.committed + 1);
  Stamp writes = handed(current->now, agent(STORE_WRITES, current->id / 32), mine.committed + 1);
  auto pc = __builtin_return_address(0);
  tile(box, [&](char* from, char* to) {
    access(from, RUN, ASYNC_READ, reads, pc);
    if (to) access(to, RUN, ASYNC_WRITE, writes, pc);
  });
  ++current->now.step;
  mine.open.push_back(box);
}

void tma_commit() {
  Stores& mine = stores[current->id];
  mine.groups.push_back(std::move(mine.open));
  mine.open.clear();
  ++mine.committed;
}

void tma_wait(uint32_t left, bool only_read) {
  Stores& mine = stores[current->id];
  for (; mine.groups.size() > left; mine.groups.erase(mine.groups.begin()))
    for (auto& box : mine.groups.front())
      tile(box, [](char* from, char* to) { if (to) memcpy(to, from, RUN); });
  uint32_t done = mine.committed - std::min(left, mine.committed);
  learn(current->now, agent(STORE_READS, current->id / 32), done);
  if (!only_read) learn(current->now, agent(STORE_WRITES, current->id / 32), done);
}
}  // namespace hopper

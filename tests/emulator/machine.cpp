// Threads as fibers, barriers, warp collectives, the register pool, and the launch.
#include "machine.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <map>
#include <random>

uint3 threadIdx, blockIdx;

namespace hopper {
char* dynamic_shared;

constexpr size_t STACK = 256 << 10;
constexpr int MAX_REPORTS = 20, NAMED_BARRIERS = 16;
constexpr uint32_t OF_A_KIND = 32;  // agents; a CTA has at most 32 warps

std::vector<Thread> threads;
Thread* current;
uint32_t cta;

namespace {
jmp_buf scheduler, aborted;
std::vector<int> runnable;
std::mt19937 luck;
bool random_order;
std::string* reports;
int reported;
char* stacks;
size_t stacks_bytes;
void (*entry)(char** const*);
char** const* entry_parameters;

struct Named {
  int expected = 0;
  std::vector<int> waiting;
  Sum sum;
};
Named named[NAMED_BARRIERS];

struct Group {
  const void* arguments[128];
  const char* what = nullptr;
  int arrived = 0;
};
std::vector<Group> warps, warpgroups;
int free_registers;

void start() {
  entry(entry_parameters);
  current->done = true;
  _longjmp(scheduler, 1);
}

void resume(Thread& thread) {
  if (_setjmp(scheduler)) return;
  current = &thread;
  threadIdx = {unsigned(thread.id), 0, 0};
  _longjmp(thread.context, 1);
}

void create(Thread& thread) {
  static ucontext_t made, back;
  getcontext(&made);
  made.uc_stack.ss_sp = thread.stack;
  made.uc_stack.ss_size = STACK;
  made.uc_link = nullptr;
  static Thread* fresh;
  fresh = &thread;
  makecontext(&made, +[] {
    Thread* mine = fresh;
    if (!_setjmp(mine->context)) swapcontext(&made, &back);  // the first time: only there to be resumed
    start();
  }, 0);
  swapcontext(&back, &made);
}

std::string describe(const Wait& w) {
  switch (w.kind) {
    case Wait::BARRIER: return "barrier " + std::to_string(w.number);
    case Wait::GROUP: return std::string(w.name) + (w.number == 32 ? " of their warp" : " of their warpgroup");
    case Wait::REGISTERS:
      return std::to_string(w.number) + " more registers, " + std::to_string(free_registers) + " free";
    default: return mbarrier_state(w.object) + ", parity " + std::to_string(w.number);
  }
}

std::string blocked_threads() {
  std::map<std::string, std::vector<int>> by;
  for (auto& t : threads)
    if (!t.done) by[describe(t.wait)].push_back(t.id);
  std::string text;
  for (auto& [waits, ids] : by)
    text += "; " + std::to_string(ids.size()) + " threads from " + std::to_string(ids[0]) + " wait for " + waits;
  return text;
}
}  // namespace

void report(const std::string& message) {
  if (reported++ < MAX_REPORTS) *reports += message + "\n";
}
void fail(const std::string& message) {
  reported = std::min(reported, MAX_REPORTS - 1);
  report(message);
  _longjmp(aborted, 1);
}
void block(const Wait& wait) {
  current->blocked = true;
  current->wait = wait;
  Thread* mine = current;
  if (!_setjmp(mine->context)) _longjmp(scheduler, 1);
}
void wake(Thread& thread) {
  thread.blocked = false;
  runnable.push_back(thread.id);
}

uint32_t agent(Agent kind, uint32_t number) {
  if (number >= OF_A_KIND) fail("more mbarriers than the emulator has agents for");
  return threads.size() + kind * OF_A_KIND + number;
}
std::string thread_name(uint32_t who) {
  static const char* agents[] = {"wgmma of warpgroup ", "the read of a TMA store of warp ",
                                 "the write of a TMA store of warp ", "a TMA load to mbarrier "};
  if (who < threads.size()) return "thread " + std::to_string(who);
  who -= threads.size();
  return agents[who / OF_A_KIND] + std::to_string(who % OF_A_KIND);
}

size_t clock_size() { return threads.size() + (LOADS + 1) * OF_A_KIND; }

void Sum::add(const Stamp& s) {
  auto raise = [](Steps& to, Clock& last, const Clock& from) {
    if (last == from) return;
    for (size_t i = 0; i < to.size(); ++i) to[i] = std::max(to[i], (*from)[i]);
    last = from;
  };
  raise(seen, last.seen, s.seen), raise(fenced, last.fenced, s.fenced);
  seen[s.who] = std::max(seen[s.who], s.step);
  fenced[s.who] = std::max(fenced[s.who], s.fenced_step);
}

namespace {
struct Joined {  // remembers the last: a warpgroup's threads often join alike
  Clock left, right, both;
  Clock operator()(const Clock& a, const Clock& b) {
    if (a == b) return a;
    if (left != a || right != b) {
      Steps sum(*a);
      for (size_t i = 0; i < sum.size(); ++i) sum[i] = std::max(sum[i], (*b)[i]);
      left = a, right = b, both = std::make_shared<const Steps>(std::move(sum));
    }
    return both;
  }
};
}  // namespace

void acquire(Stamp& s, const Known& known) {
  static Joined join_seen, join_fenced;
  s.seen = join_seen(s.seen, known.seen);
  s.fenced_step = std::max(s.fenced_step, (*known.fenced)[s.who]);
  s.fenced = join_fenced(s.fenced, known.fenced);
}
void learn(Stamp& s, uint32_t agent, uint32_t step) {
  if ((*s.seen)[agent] >= step) return;
  static Clock before, after;
  static uint32_t what[2];
  if (before != s.seen || what[0] != agent || what[1] != step) {
    Steps more(*s.seen);
    more[agent] = step;
    before = s.seen, after = std::make_shared<const Steps>(std::move(more)), what[0] = agent, what[1] = step;
  }
  s.seen = after;
}

Stamp handed(const Stamp& s, uint32_t agent, uint32_t step) {
  Steps seen(*s.seen), fenced(*s.fenced);
  seen[s.who] = s.step, fenced[s.who] = s.fenced_step;
  auto share = [](Steps& steps) { return std::make_shared<const Steps>(std::move(steps)); };
  return {{share(seen), share(fenced)}, agent, step, 0};
}

void fence_proxy() {
  Stamp& s = current->now;
  s.fenced = s.seen, s.fenced_step = s.step++;
}

void barrier(int id, int count) {
  if (id < 0 || id >= NAMED_BARRIERS) fail("barrier " + std::to_string(id) + " does not exist");
  if (count == 0)  // all that have not ended
    count = std::count_if(threads.begin(), threads.end(), [](Thread& t) { return !t.done; });
  Named& b = named[id];
  if (b.waiting.empty()) b.expected = count;
  if (b.expected != count || count % 32)
    fail("barrier " + std::to_string(id) + " is waited at for " + std::to_string(count) + " and for " +
         std::to_string(b.expected) + " threads");
  b.sum.add(current->now);
  ++current->now.step;
  b.waiting.push_back(current->id);
  if (int(b.waiting.size()) < count)
    return block({.kind = Wait::BARRIER, .number = id});
  Known known = b.sum.known();
  auto together = std::move(b.waiting);
  b = Named();
  for (int i : together) {
    acquire(threads[i].now, known);
    if (i != current->id) wake(threads[i]);
  }
}

// All threads of the warp (size 32) or warpgroup (128) come with an argument; the last runs it for them all.
void collective(int size, const void* argument, const char* what, void (*run)(const void* const*)) {
  int number = current->id / size;
  Group& group = (size == 32 ? warps : warpgroups)[number];
  if (group.arrived && group.what != what)
    fail("warp " + std::to_string(current->id / 32) + " diverges: " + group.what + " and " + what);
  group.what = what;
  group.arguments[current->id % size] = argument;
  if (++group.arrived < size) return block({.kind = Wait::GROUP, .name = what, .number = size});
  group.arrived = 0;
  run(group.arguments);
  for (int i = size * number; i < size * (number + 1); ++i)
    if (i != current->id) wake(threads[i]);
}

bool elect() {
  collective(32, nullptr, "elect.sync", [](const void* const*) {});
  return current->id % 32 == 0;
}

uint32_t shuffle_xor(uint32_t value, int mask) {
  struct {
    uint32_t in, out;
    int mask;
  } mine = {value, 0, mask};
  collective(32, &mine, "shfl.sync.bfly", [](const void* const* all) {
    auto at = [&](int i) { return static_cast<decltype(&mine)>(const_cast<void*>(all[i])); };
    for (int i = 0; i < 32; ++i) at(i)->out = at(i ^ at(i)->mask)->in;
  });
  return mine.out;
}

void set_registers(int count) {
  if (count < 24 || count > 256 || count % 8) fail("setmaxnreg cannot ask for " + std::to_string(count) + " registers");
  int more = count - current->registers;
  while (more > free_registers) block({.kind = Wait::REGISTERS, .number = more});
  free_registers -= more;
  current->registers = count;
  if (more < 0)
    for (auto& t : threads)
      if (t.blocked && t.wait.kind == Wait::REGISTERS) wake(t);
}

void check_aligned(const void* at, int bytes) {
  if (reinterpret_cast<uintptr_t>(at) % bytes) fail("a vector of atomics is misaligned");
}

float atomic_add(float* at, float value) {
  access(at, 4, ATOMIC, current->now, __builtin_return_address(0));
  float before = *at;
  *at += value;
  return before;
}
int atomic_add(int* at, int value) {
  access(at, 4, ATOMIC, current->now, __builtin_return_address(0));
  int before = *at;
  *at += value;
  return before;
}

namespace {
void run_cta(int count, int launch_registers, uint32_t seed) {
  threads.clear();
  threads.resize(count);
  warps.assign(count / 32, Group()), warpgroups.assign(count / 128 + 1, Group());
  for (auto& b : named) b = Named();
  free_registers = 0;
  luck.seed(seed);
  random_order = seed != 0;
  reset_copies(), reset_products();
  Clock nothing = std::make_shared<const Steps>(clock_size());
  runnable.clear();
  for (int i = 0; i < count; ++i) {
    Thread& t = threads[i];
    t.id = i, t.stack = stacks + i * STACK, t.registers = launch_registers;
    t.now = {{nothing, nothing}, uint32_t(i), 1, 0};
    create(t);
    runnable.push_back(i);
  }
  size_t at = 0;
  while (true) {
    if (at == runnable.size()) {
      runnable.clear(), at = 0;
      if (complete_a_copy(random_order ? luck() : 0)) continue;
      break;
    }
    if (random_order) {
      std::swap(runnable[at], runnable[at + luck() % (runnable.size() - at)]);
      if (luck() % 64 == 0) complete_a_copy(luck());
    }
    Thread& t = threads[runnable[at++]];
    if (!t.done && !t.blocked) resume(t);
  }
  if (std::any_of(threads.begin(), threads.end(), [](Thread& t) { return !t.done; }))
    fail("deadlock in CTA " + std::to_string(cta - 1) + blocked_threads());
  check_copies_done(), check_products_done();
  end_shadow();
}
}  // namespace
}  // namespace hopper

extern "C" {
// Runs the grid, one CTA after another; returns how many faults it met, of which the first are told in text.
int hopper_launch(char** const* parameters, const int* grid, int threads, size_t shared_bytes, int registers,
                  char* arena, size_t arena_bytes, uint32_t seed, char* text, size_t text_bytes) {
  using namespace hopper;
  std::string told;
  reports = &told, reported = 0;
  entry = hopper_entry, entry_parameters = parameters;
  stacks_bytes = threads * STACK;
  stacks = static_cast<char*>(
      mmap(nullptr, stacks_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  auto shared = static_cast<char*>(aligned_alloc(1 << 18, 1 << 18));
  dynamic_shared = shared;
  if (!_setjmp(aborted)) {
    if (threads % 32 || shared_bytes > 227 << 10) fail("a launch that no SM takes");
    cta = 0;
    for (int z = 0; z < grid[2]; ++z)
      for (int y = 0; y < grid[1]; ++y)
        for (int x = 0; x < grid[0]; ++x) {
          blockIdx = {unsigned(x), unsigned(y), unsigned(z)};
          ++cta;
          memset(shared, 0xff, 1 << 18);
          reset_shadow(shared, shared_bytes, arena, arena_bytes);
          run_cta(threads, registers, seed ? seed + cta : 0);
        }
  }
  free_shadow();
  free(shared);
  munmap(stacks, stacks_bytes);
  snprintf(text, text_bytes, "%s", told.c_str());
  return reported;
}
}

namespace hopper {
bool on_a_stack(const void* at) { return size_t(static_cast<const char*>(at) - stacks) < stacks_bytes; }
uint64_t shared_address(const void* at) { return static_cast<const char*>(at) - dynamic_shared; }
}  // namespace hopper

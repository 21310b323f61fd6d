// What every access of shared and global memory may and may not do: bounds, alignment, races, proxies.
// The compiler calls __tsan_* before each access of the kernel; this is what stands there in place of its own runtime.
#include <link.h>

#include <algorithm>
#include <set>
#include <tuple>
#include <unordered_map>

#include "machine.h"

namespace hopper {
bool on_a_stack(const void* at);

namespace {
struct Read {  // or an atomic addition
  uint32_t who : 31, atomic : 1;
  uint32_t step;
};
struct Cell {  // two bytes of memory
  uint32_t cta = 0, step = 0, pc = 0;  // of the last write; pc from the start of the library
  uint16_t writer = 0;
  bool written : 1 = false, by_copy : 1 = false, atomic : 1 = false;
  bool more : 1 = false;  // reads beside the first are in `others`
  bool read : 1 = false;
  Read first{};
};
std::unordered_map<const Cell*, std::vector<Read>> others;

void forget_reads(Cell& cell) {
  if (cell.more) others.erase(&cell);
  cell.read = cell.more = false;
}

// Calls each(read) until it returns false; whether it never did.
template <class Each> bool all_reads(Cell& cell, Each each) {
  if (!cell.read) return true;
  if (!each(cell.first)) return false;
  if (cell.more)
    for (auto& r : others[&cell])
      if (!each(r)) return false;
  return true;
}

void add_read(Cell& cell, Read read) {
  bool fresh = all_reads(cell, [&](Read& r) {
    if (r.who != read.who || r.atomic != read.atomic) return true;
    r.step = read.step;
    return false;
  });
  if (!fresh) return;
  if (!cell.read) {
    cell.read = true, cell.first = read;
  } else {
    cell.more = true;
    others[&cell].push_back(read);
  }
}

struct Region {
  char* begin = nullptr;
  size_t bytes = 0;
  const char* name = nullptr;
  std::vector<Cell> cells;
  size_t offset(const void* at) const { return static_cast<const char*>(at) - begin; }
};
Region shared{.name = "shared memory"}, arena{.name = "global memory"};
struct Buffer {
  size_t begin, end;
};
std::vector<Buffer> buffers;  // of the arena
std::pair<const char*, const char*> image;

struct Complaint {
  std::string what, message;
  uint32_t pc, other_pc;
};
// Threads may write one value to one place: a race of two writes is told only if the second, which comes next, changes
// what is there.
struct Suspicion {
  const char* at;
  uint16_t before;
  Complaint complaint;
};
std::vector<Suspicion> suspicions;
std::set<std::tuple<std::string, uint32_t, uint32_t>> told;  // each once for a pair of places in the source

void tell(const Complaint& c) {
  if (told.emplace(c.what, c.pc, c.other_pc).second) report(c.message);
}

void settle_suspicions() {
  for (auto& s : suspicions)
    if (memcmp(s.at, &s.before, 2)) tell(s.complaint);
  suspicions.clear();
}

uint32_t place(const void* pc) { return pc ? static_cast<const char*>(pc) - image.first : 0; }

Complaint complaint(const char* what, const Region& region, const void* at, Access kind, const Stamp& stamp,
                    const void* pc, const Cell* cell, uint32_t other) {
  static const char* kinds[] = {"reads", "writes", "adds to", "reads", "writes"};
  size_t other_pc = cell ? cell->pc : 0;
  char text[400];
  int n = snprintf(text, sizeof text, "%s: %s %s %s+%zu @%zx", what, thread_name(stamp.who).c_str(), kinds[kind],
                   region.name, region.offset(at), size_t(place(pc)));
  if (cell) n += snprintf(text + n, sizeof text - n, ", after %s @%zx", thread_name(other).c_str(), other_pc);
  snprintf(text + n, sizeof text - n, ", CTA %u", cta - 1);
  return {what, text, place(pc), uint32_t(other_pc)};
}

// Whether the access was in order.
bool check(Region& region, Cell& cell, const void* at, Access kind, const Stamp& s, const void* pc) {
  bool reads = kind == READ || kind == ASYNC_READ, asynchronous = kind == ASYNC_READ || kind == ASYNC_WRITE;
  bool global = &region == &arena;
  if (cell.cta != cta) {
    if (global) {
      bool conflict = cell.written ? !(kind == ATOMIC && cell.atomic) : cell.read && !reads && kind != ATOMIC;
      if (conflict) {
        uint32_t other = cell.written ? cell.writer : cell.first.who;
        tell(complaint("race between CTAs", region, at, kind, s, pc, &cell, other));
        return false;
      }
    } else {
      cell.written = false;
    }
    forget_reads(cell);
    cell.cta = cta;
  }
  if (!global && reads && !cell.written) {
    tell(complaint("uninitialised", region, at, kind, s, pc, nullptr, 0));
    return false;
  }
  if (cell.written && !(kind == ATOMIC && cell.atomic)) {
    if (!s.sees(cell.writer, cell.step)) {
      Complaint race = complaint("race", region, at, kind, s, pc, &cell, cell.writer);
      if (kind != WRITE || cell.by_copy) {
        tell(race);
        return false;
      }
      uint16_t before;
      memcpy(&before, at, 2);
      suspicions.push_back({static_cast<const char*>(at), before, race});
    }
    // The fence that tl:: has, fence.proxy.async.shared::cta, says nothing of global memory.
    if (asynchronous && !cell.by_copy && (global || !s.sees_fenced(cell.writer, cell.step))) {
      tell(complaint("no fence.proxy.async", region, at, kind, s, pc, &cell, cell.writer));
      return false;
    }
  }
  return all_reads(cell, [&](Read& r) {
    if ((reads ? !r.atomic : kind == ATOMIC && r.atomic) || s.sees(r.who, r.step)) return true;
    tell(complaint(r.atomic ? "race" : "race with a read", region, at, kind, s, pc, &cell, r.who));
    return false;
  });
}

void note(Cell& cell, Access kind, const Stamp& s, const void* pc) {
  if (kind == WRITE || kind == ASYNC_WRITE) {
    cell.written = true, cell.by_copy = kind == ASYNC_WRITE, cell.atomic = false;
    cell.writer = s.who, cell.step = s.step, cell.pc = place(pc);
    forget_reads(cell);
    return;
  }
  if (kind == ATOMIC && !cell.written) cell.written = cell.atomic = true, cell.writer = s.who, cell.step = s.step;
  add_read(cell, {s.who, kind == ATOMIC, s.step});
}

bool inside(const Region& region, size_t offset, size_t bytes) {
  if (&region == &shared) return offset + bytes <= shared.bytes;
  auto after = [](size_t x, const Buffer& b) { return x < b.begin; };
  auto found = std::upper_bound(buffers.begin(), buffers.end(), offset, after);
  return found != buffers.begin() && offset + bytes <= found[-1].end;
}
}  // namespace

void access(const void* at, size_t bytes, Access kind, const Stamp& stamp, const void* pc) {
  settle_suspicions();
  Region& region = shared.offset(at) < shared.bytes ? shared : arena;
  size_t offset = region.offset(at);
  if (!inside(region, offset, bytes)) {
    std::string where = "nowhere";
    if (offset < region.bytes) where = "at " + std::string(region.name) + "+" + std::to_string(offset);
    bool reads = kind == READ || kind == ASYNC_READ;
    fail("out of bounds: " + thread_name(stamp.who) + (reads ? " reads " : " writes ") + std::to_string(bytes) +
         " bytes " + where + ", CTA " + std::to_string(cta - 1));
  }
  if (kind <= ATOMIC && reinterpret_cast<uintptr_t>(at) % bytes)
    tell(complaint("misaligned", region, at, kind, stamp, pc, nullptr, 0));
  bool fine = true;
  for (size_t i = offset / 2; i < (offset + bytes + 1) / 2; ++i) {
    Cell& cell = region.cells[i];
    if (fine) fine = check(region, cell, region.begin + 2 * i, kind, stamp, pc);
    note(cell, kind, stamp, pc);
  }
}

void end_shadow() { settle_suspicions(); }

void free_shadow() {  // each kernel's library has its own
  shared.cells = {}, arena.cells = {};
  told.clear(), others.clear(), suspicions.clear();
}

void reset_shadow(char* at, size_t bytes, char* global, size_t global_bytes) {
  shared.begin = at, shared.bytes = bytes;
  shared.cells.resize(bytes / 2);
  if (cta == 1) {
    arena.begin = global, arena.bytes = global_bytes;
    arena.cells.assign(global_bytes / 2, Cell());
    dl_iterate_phdr([](dl_phdr_info* info, size_t, void*) {
      auto base = reinterpret_cast<const char*>(info->dlpi_addr);
      const char* end = base;
      for (int i = 0; i < info->dlpi_phnum; ++i)
        if (info->dlpi_phdr[i].p_type == PT_LOAD)
          end = std::max(end, base + info->dlpi_phdr[i].p_vaddr + info->dlpi_phdr[i].p_memsz);
      auto here = reinterpret_cast<const char*>(&image);
      if (base <= here && here < end) image = {base, end};
      return 0;
    }, nullptr);
  }
}
}  // namespace hopper

extern "C" void hopper_buffers(const size_t* bounds, int count) {
  hopper::buffers.clear();
  for (int i = 0; i < count; ++i) hopper::buffers.push_back({bounds[2 * i], bounds[2 * i + 1]});
}

static inline void seen(void* at, size_t bytes, hopper::Access kind, const void* pc) {
  if (hopper::on_a_stack(at)) return;
  auto p = static_cast<const char*>(at);
  if (hopper::image.first <= p && p < hopper::image.second) return;
  hopper::access(at, bytes, kind, hopper::current->now, pc);
}

#define HOOK(n)                                                                                               \
  void __tsan_read##n(void* p) { seen(p, n, hopper::READ, __builtin_return_address(0)); }                     \
  void __tsan_write##n(void* p) { seen(p, n, hopper::WRITE, __builtin_return_address(0)); }                   \
  void __tsan_unaligned_read##n(void* p) { seen(p, n, hopper::READ, __builtin_return_address(0)); }           \
  void __tsan_unaligned_write##n(void* p) { seen(p, n, hopper::WRITE, __builtin_return_address(0)); }
extern "C" {
HOOK(1)
HOOK(2)
HOOK(4)
HOOK(8)
HOOK(16)
void __tsan_read_range(void* p, size_t n) { seen(p, n, hopper::READ, __builtin_return_address(0)); }
void __tsan_write_range(void* p, size_t n) { seen(p, n, hopper::WRITE, __builtin_return_address(0)); }
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
}

// One CTA on the host: its threads, what they wait for, and what each may take as having happened.
#pragma once
#include <csetjmp>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "hopper.h"

namespace hopper {

// A vector clock has an entry for each thread and for each agent (the asynchronous units): the last of its steps that
// is known to have happened. Clocks are shared and never changed; a thread's own step stands beside its clock.
using Steps = std::vector<uint32_t>;
using Clock = std::shared_ptr<const Steps>;

struct Known {  // what may be taken as having happened, and as visible to the asynchronous proxy
  Clock seen, fenced;
};

struct Stamp : Known {  // of an operation: what is known, to whom, and at which of its own steps
  uint32_t who, step, fenced_step;
  bool sees(uint32_t other, uint32_t at) const { return other == who ? at <= step : at <= (*seen)[other]; }
  bool sees_fenced(uint32_t other, uint32_t at) const {
    return other == who ? at <= fenced_step : at <= (*fenced)[other];
  }
};

size_t clock_size();

struct Sum {  // what those who arrive at a barrier know together
  Steps seen = Steps(clock_size()), fenced = Steps(clock_size());
  Known last;  // of the last who came: many share theirs
  void add(const Stamp& stamp);
  Known known() const { return {std::make_shared<const Steps>(seen), std::make_shared<const Steps>(fenced)}; }
};

struct Wait {  // for what a blocked thread waits
  enum Kind { BARRIER, GROUP, REGISTERS, MBARRIER } kind;
  const void* object = nullptr;
  const char* name = nullptr;  // of the group's instruction
  int number = 0;              // the barrier's, threads of the group, or how many registers; an mbarrier's parity
};

struct Thread {
  jmp_buf context;
  char* stack;
  int id;
  bool done = false, blocked = false;
  Wait wait;
  Stamp now;
  int registers = 0;
  struct Issued {
    Product product;
    Stamp stamp;
  };
  std::vector<Issued> products;  // wgmma issued and not waited for, in order
  std::vector<int> groups;       // sizes of its committed groups
  int open_products = 0;         // issued since the last commit
  bool products_fenced = false;
  uint32_t product_steps = 0;    // groups committed ever
};

// The asynchronous units: wgmma of a warpgroup, the two ends of a warp's TMA stores, the TMA loads to an mbarrier.
enum Agent { WGMMA, STORE_READS, STORE_WRITES, LOADS };

enum Access : uint8_t { READ, WRITE, ATOMIC, ASYNC_READ, ASYNC_WRITE };

extern std::vector<Thread> threads;
extern Thread* current;
extern char* dynamic_shared;
extern uint32_t cta;  // 1 + its place in the launch

// machine.cpp
[[noreturn]] void fail(const std::string& message);   // ends the launch
void report(const std::string& message);              // notes a fault and goes on
void block(const Wait& wait);                         // until someone calls wake
void wake(Thread& thread);
uint32_t agent(Agent kind, uint32_t number);
void acquire(Stamp& stamp, const Known& known);
void learn(Stamp& stamp, uint32_t agent, uint32_t step);
Stamp handed(const Stamp& issuer, uint32_t agent, uint32_t step);  // to an agent, which knows what its issuer knows
void collective(int size, const void* argument, const char* what, void (*run)(const void* const* arguments));
std::string thread_name(uint32_t who);

// shadow.cpp
void access(const void* at, size_t bytes, Access kind, const Stamp& stamp, const void* pc);
void reset_shadow(char* shared, size_t shared_bytes, char* arena, size_t arena_bytes);
void end_shadow();
void free_shadow();

// copies.cpp, products.cpp
void reset_products();
void check_products_done();
std::string mbarrier_state(const void* at);
bool complete_a_copy(uint32_t choice);  // false if none is under way
void reset_copies();
void check_copies_done();
}  // namespace hopper

// Tensor cores: ldmatrix, stmatrix, mma.sync, and wgmma, which is carried out as late as it may be: when it is waited
// for. Until then its accumulators hold NaN.
#include <algorithm>
#include <map>

#include "machine.h"

namespace hopper {
namespace {
float decode(Type type, uint16_t bits) {
  if (type == BF16) {
    bfloat16_t x;
    x.bits = bits;
    return x;
  }
  half_t x;
  x.bits = bits;
  return x;
}

struct Matrices {  // an argument of ldmatrix or stmatrix: one lane's row and its elements of each 8 x 8 matrix
  const void* row;
  uint16_t* elements;
  int count;
  bool transposed;
};

// Moves all elements: lane 8 * i + r holds the address of row r of matrix i.
template <class Move> void each_element(const void* const* all, Move move) {
  for (int lane = 0; lane < 32; ++lane) {
    auto& mine = *static_cast<const Matrices*>(all[lane]);
    for (int i = 0; i < 2 * mine.count; ++i) {
      int row = lane / 4, column = lane % 4 * 2 + i % 2;
      if (mine.transposed) std::swap(row, column);
      auto start = static_cast<const Matrices*>(all[i / 2 * 8 + row])->row;
      move(mine.elements[i], static_cast<uint16_t*>(const_cast<void*>(start))[column]);
    }
  }
}
}  // namespace

void load_matrix(const void* row, void* out, int count, bool transposed) {
  Matrices mine{row, static_cast<uint16_t*>(out), count, transposed};
  if (current->id % 32 < 8 * count) access(row, 16, READ, current->now, __builtin_return_address(0));
  collective(32, &mine, "ldmatrix", [](const void* const* all) {
    each_element(all, [](uint16_t& element, uint16_t& place) { element = place; });
  });
}

void store_matrix(const void* row, const uint32_t* values, int count, bool transposed) {
  uint16_t elements[8];
  memcpy(elements, values, 4 * count);
  Matrices mine{row, elements, count, transposed};
  if (current->id % 32 < 8 * count) access(row, 16, WRITE, current->now, __builtin_return_address(0));
  collective(32, &mine, "stmatrix", [](const void* const* all) {
    each_element(all, [](uint16_t& element, uint16_t& place) { place = element; });
  });
}

namespace {
struct Mma {
  Type type;
  float* d;
  const uint32_t *a, *b;
};
float half_of(Type type, const uint32_t* registers, int i) { return decode(type, registers[i / 2] >> 16 * (i % 2)); }
}  // namespace

void mma(Type type, float* d, const uint32_t* a, const uint32_t* b) {
  Mma mine{type, d, a, b};
  collective(32, &mine, "mma.sync", [](const void* const* all) {
    float A[16][16], B[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      auto& m = *static_cast<const Mma*>(all[lane]);
      int group = lane / 4, pair = lane % 4 * 2;
      for (int i = 0; i < 8; ++i)  // registers: rows +0, +8, then columns +8
        A[group + 8 * (i / 2 % 2)][pair + i % 2 + 8 * (i / 4)] = half_of(m.type, m.a, i);
      for (int i = 0; i < 4; ++i) B[pair + i % 2 + 8 * (i / 2)][group] = half_of(m.type, m.b, i);
    }
    for (int lane = 0; lane < 32; ++lane) {
      auto& m = *static_cast<const Mma*>(all[lane]);
      for (int i = 0; i < 4; ++i) {
        int row = lane / 4 + 8 * (i / 2), column = lane % 4 * 2 + i % 2;
        float sum = 0;
        for (int k = 0; k < 16; ++k) sum += A[row][k] * B[k][column];
        m.d[i] += sum;
      }
    }
  });
}

namespace {
// Shared address of eight elements that lie together: of row `mn` at k..k+7, or of k at mn..mn+7 if transposed.
uint32_t operand(uint64_t descriptor, bool transposed, int mn, int k) {
  uint32_t start = (descriptor & 0x3fff) << 4, swizzle = descriptor >> 62;
  uint32_t leading = (descriptor >> 16 & 0x3fff) << 4, stride = (descriptor >> 32 & 0x3fff) << 4;
  uint32_t log2 = swizzle ? 4 - swizzle : 0;  // of the swizzle's span in 16 bytes; the field says 1 for 128 bytes
  uint32_t at;
  if (transposed) {  // atoms of `span` elements of mn by 8 of k
    uint32_t span = 8u << log2;
    at = mn % span * 2 + k % 8 * (span * 2);
    at += swizzle ? mn / span * leading + k / 8 * stride : mn / span * stride + k / 8 * leading;
  } else {
    at = mn / 8 * stride + mn % 8 * (16u << log2) + k / 8 * (swizzle ? 16 : leading);
  }
  at += start;
  return at ^ (at >> 7 & ((1u << log2) - 1)) << 4;
}

bool alike(const Product& a, const Product& b) {
  return a.type == b.type && a.N == b.N && a.a_transposed == b.a_transposed && a.b_transposed == b.b_transposed &&
         a.accumulates == b.accumulates && a.a_descriptor == b.a_descriptor && a.b_descriptor == b.b_descriptor &&
         !a.a == !b.a;
}

std::map<float*, std::vector<float>> held;  // accumulators of what is under way, by their address

uint16_t* shared_at(uint32_t address) {
  return reinterpret_cast<uint16_t*>(dynamic_shared + address);
}

void carry_out(int group, size_t which, uint32_t step) {
  int first = 128 * group;
  const Product& p = threads[first].products[which].product;
  for (int i = first; i < first + 128; ++i)
    if (!alike(p, threads[i].products[which].product))
      fail("the threads of warpgroup " + std::to_string(group) + " multiply different tiles");
  auto read = [&](uint32_t address, int from_warp, int to_warp) {
    for (int w = from_warp; w < to_warp; ++w) {
      Stamp as = threads[first + 32 * w].products[which].stamp;
      as.step = step;
      access(shared_at(address), 16, ASYNC_READ, as, nullptr);
    }
    return shared_at(address);
  };
  float A[64][16];
  std::vector<float> B(16 * p.N);
  if (p.a) {
    for (int t = 0; t < 128; ++t) {
      auto registers = threads[first + t].products[which].product.a;
      for (int i = 0; i < 8; ++i)
        A[t / 32 * 16 + t % 32 / 4 + 8 * (i / 2 % 2)][t % 4 * 2 + i % 2 + 8 * (i / 4)] = half_of(p.type, registers, i);
    }
  } else if (p.a_transposed) {
    for (int k = 0; k < 16; ++k)
      for (int m = 0; m < 64; m += 8) {
        auto eight = read(operand(p.a_descriptor, true, m, k), m / 16, m / 16 + 1);
        for (int i = 0; i < 8; ++i) A[m + i][k] = decode(p.type, eight[i]);
      }
  } else {
    for (int m = 0; m < 64; ++m)
      for (int k = 0; k < 16; k += 8) {
        auto eight = read(operand(p.a_descriptor, false, m, k), m / 16, m / 16 + 1);
        for (int i = 0; i < 8; ++i) A[m][k + i] = decode(p.type, eight[i]);
      }
  }
  for (int n = 0; n < p.N; n += p.b_transposed ? 8 : 1)
    for (int k = 0; k < 16; k += p.b_transposed ? 1 : 8) {
      auto eight = read(operand(p.b_descriptor, p.b_transposed, n, k), 0, 4);
      for (int i = 0; i < 8; ++i)
        B[(k + (p.b_transposed ? 0 : i)) * p.N + n + (p.b_transposed ? i : 0)] = decode(p.type, eight[i]);
    }
  std::vector<float> sums(64 * p.N);
  for (int m = 0; m < 64; ++m)
    for (int k = 0; k < 16; ++k)
      for (int n = 0; n < p.N; ++n) sums[m * p.N + n] += A[m][k] * B[k * p.N + n];
  for (int t = 0; t < 128; ++t) {
    auto& d = held.at(threads[first + t].products[which].product.d);
    for (int i = 0; i < p.N / 2; ++i) {
      int row = t / 32 * 16 + t % 32 / 4 + 8 * (i / 2 % 2), column = i / 4 * 8 + t % 4 * 2 + i % 2;
      d[i] = (p.accumulates ? d[i] : 0) + sums[row * p.N + column];
    }
  }
}
}  // namespace

void wgmma_fence() { current->products_fenced = true; }

void wgmma(const Product& product) {
  if (!current->products_fenced) fail("wgmma without wgmma.fence");
  bool first = current->id % 32 == 0;  // of its warp: it speaks for all
  Stamp stamp = first ? handed(current->now, agent(WGMMA, current->id / 128), 0) : Stamp();
  current->products.push_back({product, stamp});
  ++current->open_products;
  auto [entry, fresh] = held.try_emplace(product.d, product.d, product.d + product.N / 2);
  if (!fresh && int(entry->second.size()) != product.N / 2)
    fail("two wgmma under way share part of their accumulators");
  std::fill_n(product.d, product.N / 2, NAN);
}

void wgmma_commit() {
  current->groups.push_back(current->open_products);
  current->open_products = 0;
  current->products_fenced = false;
  ++current->product_steps;
  ++current->now.step;
}

// Carries out all but the last `left` groups of the warpgroup's wgmma.
void wgmma_wait(int left) {
  collective(128, &left, "wgmma.wait_group", [](const void* const* all) {
    int group = current->id / 128, first = 128 * group;
    Thread& lead = threads[first];
    while (int(lead.groups.size()) > *static_cast<const int*>(all[0])) {
      int size = lead.groups[0];
      uint32_t step = lead.product_steps - lead.groups.size() + 1;
      for (int i = first; i < first + 128; ++i)
        if (threads[i].groups.size() != lead.groups.size() || threads[i].groups[0] != size)
          fail("the threads of warpgroup " + std::to_string(group) + " committed different wgmma");
      for (int i = 0; i < size; ++i) carry_out(group, i, step);
      for (int i = first; i < first + 128; ++i) {
        Thread& t = threads[i];
        for (int j = 0; j < size; ++j) {
          float* d = t.products[j].product.d;
          auto later = [&](const Thread::Issued& x) { return x.product.d == d; };
          auto done = held.find(d);
          if (done == held.end() || std::any_of(t.products.begin() + size, t.products.end(), later)) continue;
          std::copy(done->second.begin(), done->second.end(), d);
          held.erase(done);
        }
        t.products.erase(t.products.begin(), t.products.begin() + size);
        t.groups.erase(t.groups.begin());
        learn(t.now, agent(WGMMA, group), step);
      }
    }
  });
}

void check_products_done() {
  if (!held.empty()) fail("a CTA ends while wgmma is under way");
}
void reset_products() { held.clear(); }
}  // namespace hopper

// The vocabulary of the CUDA source that TileLang generates for sm_90a, for a C++ compiler: types, intrinsics and tl::.
// What threads do together is the runtime's (namespace hopper); the rest is here.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#define __global__
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ static  // of one CTA at a time; only mbarriers stand in it
#define CUDART_INF_F __builtin_inff()

using uchar = unsigned char;
struct uint3 {
  unsigned x, y, z;
};
extern uint3 threadIdx, blockIdx;

#define VECTORS(T, name, size)                            \
  struct alignas(size) name##1 { T x; };                  \
  struct alignas(2 * size) name##2 { T x, y; };           \
  struct alignas(4 * size > 16 ? 16 : 4 * size) name##4 { T x, y, z, w; }; \
  inline name##1 make_##name##1(T x) { return {x}; }      \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; } \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
VECTORS(int, int, 4)
VECTORS(unsigned, uint, 4)
VECTORS(float, float, 4)
VECTORS(unsigned short, ushort, 2)
VECTORS(int64_t, longlong, 8)
#undef VECTORS

template <class T> T max(T a, T b) { return a < b ? b : a; }
template <class T> T min(T a, T b) { return b < a ? b : a; }
inline float max(float a, float b) { return fmaxf(a, b); }
inline float min(float a, float b) { return fminf(a, b); }

// 16-bit floats round to nearest even.
struct bfloat16_t {
  uint16_t bits;
  bfloat16_t() = default;
  bfloat16_t(float value) {
    uint32_t u;
    memcpy(&u, &value, 4);
    bits = value != value ? 0x7fff : (u + 0x7fff + (u >> 16 & 1)) >> 16;
  }
  operator float() const {
    uint32_t u = uint32_t(bits) << 16;
    float value;
    memcpy(&value, &u, 4);
    return value;
  }
};
struct half_t {
  uint16_t bits;
  half_t() = default;
  half_t(float value) {
    _Float16 rounded = value;
    memcpy(&bits, &rounded, 2);
  }
  operator float() const {
    _Float16 value;
    memcpy(&value, &bits, 2);
    return value;
  }
};
struct __nv_bfloat162 {
  bfloat16_t x, y;
};
struct __half2 {
  half_t x, y;
};
using half2 = __half2;
inline __nv_bfloat162 __float22bfloat162_rn(float2 v) { return {v.x, v.y}; }
inline float2 __bfloat1622float2(__nv_bfloat162 v) { return {v.x, v.y}; }
inline __half2 __float22half2_rn(float2 v) { return {v.x, v.y}; }
inline float2 __half22float2(__half2 v) { return {v.x, v.y}; }
template <class T> unsigned __pack_half2(T x, T y) { return unsigned(y.bits) << 16 | x.bits; }
template <class T> unsigned __pack_nv_bfloat162(T x, T y) { return __pack_half2(x, y); }

// As cuTensorMapEncodeTiled was told; swizzle: log2 of the span in 16 bytes (0 none, 1: 32, 2: 64, 3: 128 bytes).
struct CUtensorMap {
  char* base;
  uint64_t dims[5], strides[5];  // elements; bytes, of which the first is an element's
  uint32_t box[5], rank, swizzle;
};

namespace hopper {  // the runtime: each returns when its thread may go on
void barrier(int id, int threads);
bool elect();
uint32_t shuffle_xor(uint32_t value, int mask);
void load_matrix(const void* row, void* out, int count, bool transposed);
void store_matrix(const void* row, const uint32_t* values, int count, bool transposed);
void set_registers(int count);
void fence_proxy();

void mbarrier_init(void* at, uint32_t count);
void fence_mbarriers();
void mbarrier_wait(void* at, uint32_t parity);
void mbarrier_arrive(void* at);
void mbarrier_expect(void* at, uint32_t bytes);
void tma_load(const CUtensorMap& map, void* mbarrier, void* shared, const int* at);
void tma_store(const CUtensorMap& map, const void* shared, const int* at);
void tma_commit();
void tma_wait(uint32_t left, bool only_read);

void copy_async(void* shared, const void* global, int bytes);  // from nowhere: zeros
void copy_commit();
void copy_wait(int left);

enum Type { BF16, F16 };
struct Product {  // D[M, N] += A[M, 16] B[16, N], float32 accumulators; A from registers if a is given
  Type type;
  int N;
  bool a_transposed, b_transposed, accumulates;
  uint64_t a_descriptor, b_descriptor;
  const uint32_t* a;
  float* d;
};
void mma(Type type, float* d, const uint32_t* a, const uint32_t* b);
void wgmma(const Product& product);
void wgmma_fence();
void wgmma_commit();
void wgmma_wait(int left);

float atomic_add(float* at, float value);
int atomic_add(int* at, int value);
uint64_t shared_address(const void* pointer);
void check_aligned(const void* pointer, int bytes);
}  // namespace hopper

inline void __syncthreads() { hopper::barrier(0, 0); }

struct Barrier {
  uint64_t state;
  void init(uint32_t count) { hopper::mbarrier_init(this, count); }
  void wait(uint32_t parity) { hopper::mbarrier_wait(this, parity); }
  void arrive() { hopper::mbarrier_arrive(this); }
  void expect_transaction(uint32_t bytes) { hopper::mbarrier_expect(this, bytes); }
  void arrive_and_expect_tx(uint32_t bytes) { expect_transaction(bytes), arrive(); }
};

inline void AtomicAdd(float* at, float value) { hopper::atomic_add(at, value); }
inline void AtomicAdd(int* at, int value) { hopper::atomic_add(at, value); }
inline int AtomicAddRet(int* at, int value) { return hopper::atomic_add(at, value); }
template <int count> void add_vector(float* at, const float* v) {
  hopper::check_aligned(at, 4 * count);
  for (int i = 0; i < count; ++i) AtomicAdd(at + i, v[i]);
}
inline void AtomicAddx2(float* at, const float* v) { add_vector<2>(at, v); }
inline void AtomicAddx2(float* at, float2 v) { add_vector<2>(at, &v.x); }
inline void AtomicAddx4(float* at, const float* v) { add_vector<4>(at, v); }
inline void AtomicAddx4(float* at, float4 v) { add_vector<4>(at, &v.x); }

namespace tl {
using hopper::wgmma_commit;
enum class DataType { kFloat16, kBFloat16, kFloat32 };
constexpr hopper::Type type_of(DataType t) { return t == DataType::kBFloat16 ? hopper::BF16 : hopper::F16; }

inline void __sync_thread_partial(int id, int threads) { hopper::barrier(id, threads); }
inline void fence_proxy_async() { hopper::fence_proxy(); }
inline void fence_barrier_init() { hopper::fence_mbarriers(); }
template <class T> void prefetch_tma_descriptor(const T&) {}
template <class T> void warpgroup_fence_operand(T*, int) {}
inline void warpgroup_arrive() { hopper::wgmma_fence(); }
inline void warpgroup_commit_batch() { hopper::wgmma_commit(); }
template <int groups> void warpgroup_wait() { hopper::wgmma_wait(groups); }
template <int groups> void wait_wgmma() { hopper::wgmma_wait(groups); }
template <int count> void warpgroup_reg_alloc() { hopper::set_registers(count); }
template <int count> void warpgroup_reg_dealloc() { hopper::set_registers(count); }

// One thread of each group of warps; of the CTA if extent is 0.
template <int extent> bool tl_shuffle_elect() {
  constexpr unsigned warps = (extent + 31) / 32;
  bool elected = hopper::elect();
  return elected && (extent == 0 ? threadIdx.x / 32 == 0 : threadIdx.x / 32 % (warps ? warps : 1) == 0);
}

template <class... At> void tma_load(const CUtensorMap& map, Barrier& full, const void* shared, At... at) {
  int coordinates[] = {at...};
  hopper::tma_load(map, &full, const_cast<void*>(shared), coordinates);
}
template <class... At> void tma_store(const CUtensorMap& map, const void* shared, At... at) {
  int coordinates[] = {at...};
  hopper::tma_store(map, shared, coordinates);
}
inline CUtensorMap run_of_bytes(const void* global, uint32_t bytes) {  // of a copy without a tensor map
  return {static_cast<char*>(const_cast<void*>(global)), {bytes}, {1}, {bytes}, 1, 0};
}
inline void tma_load(void* shared, const void* global, Barrier& full, uint32_t bytes) {
  tma_load(run_of_bytes(global, bytes), full, shared, 0);
}
inline void tma_store(void* global, void* shared, uint32_t bytes) { tma_store(run_of_bytes(global, bytes), shared, 0); }
template <int bytes> void cp_async_gs(void* shared, const void* global) { hopper::copy_async(shared, global, bytes); }
template <int bytes> void cp_async_gs_conditional(void* shared, const void* global, bool wanted) {
  hopper::copy_async(shared, wanted ? global : nullptr, bytes);
}
inline void cp_async_commit() { hopper::copy_commit(); }
template <int groups> void cp_async_wait() { hopper::copy_wait(groups); }
inline void tma_store_arrive() { hopper::tma_commit(); }
template <int left, bool only_read = true> void tma_store_wait() { hopper::tma_wait(left, only_read); }

#define LDMATRIX(n)                                                                                       \
  inline void ptx_ldmatrix_x##n(const void* row, void* out) { hopper::load_matrix(row, out, n, false); }  \
  inline void ptx_ldmatrix_x##n##_trans(const void* row, void* out) { hopper::load_matrix(row, out, n, true); }
LDMATRIX(1)
LDMATRIX(2)
LDMATRIX(4)
#undef LDMATRIX
template <bool transposed, class... Values> void stmatrix(const void* row, Values... v) {
  uint32_t values[] = {uint32_t(v)...};
  hopper::store_matrix(row, values, sizeof...(v), transposed);
}
#define STMATRIX(n)                                                                               \
  template <class... V> void ptx_stmatrix_m8n8_x##n(const void* row, V... v) { stmatrix<false>(row, v...); } \
  template <class... V> void ptx_stmatrix_m8n8_x##n##_trans(const void* row, V... v) { stmatrix<true>(row, v...); }
STMATRIX(1)
STMATRIX(2)
STMATRIX(4)
#undef STMATRIX

template <DataType A, DataType B, DataType C, int M, int N, int K, bool a_transposed, bool b_transposed>
void mma_sync(float* d, const unsigned* a, const unsigned* b) {
  static_assert(A == B && C == DataType::kFloat32 && M == 16 && N == 8 && K == 16 && !a_transposed && b_transposed);
  hopper::mma(type_of(A), d, a, b);
}

union GmmaDescriptor {
  uint64_t whole = 0;
  uint32_t half[2];
  operator uint64_t() const { return whole; }
  template <class T> GmmaDescriptor operator+(T units) const {
    GmmaDescriptor moved = *this;
    moved.half[0] += uint32_t(units);
    return moved;
  }
};
// Bits: 0 start, 16 leading and 32 stride offset, each 14 bits of 16 bytes; 62 swizzle.
template <int swizzle, int leading, int stride> void initialize_wgmma_descriptor(GmmaDescriptor& made, const void* at) {
  made.whole = hopper::shared_address(at) >> 4 & 0x3fff;
  made.whole |= uint64_t(leading & 0x3fff) << 16 | uint64_t(stride & 0x3fff) << 32 | uint64_t(swizzle) << 62;
}
template <class T> void increase_descriptor_offset(GmmaDescriptor& descriptor, T bytes) {
  descriptor.half[0] += bytes >> 4;
}

template <DataType A, DataType B, DataType C, int M, int N, int K, bool ta, bool tb, int sa, int sb>
void wgmma_ss(uint64_t a, uint64_t b, uint32_t* d, bool accumulates) {
  static_assert(A == B && C == DataType::kFloat32 && M == 64 && K == 16 && sa == 1 && sb == 1);
  hopper::wgmma({type_of(A), N, ta, tb, accumulates, a, b, nullptr, reinterpret_cast<float*>(d)});
}
template <DataType A, DataType B, DataType C, int M, int N, int K, bool ta, bool tb, int sa, int sb>
void wgmma_rs(const uint32_t* a, uint64_t b, uint32_t* d, bool accumulates) {
  static_assert(A == B && C == DataType::kFloat32 && M == 64 && K == 16 && !ta && sa == 1 && sb == 1);
  hopper::wgmma({type_of(A), N, ta, tb, accumulates, 0, b, a, reinterpret_cast<float*>(d)});
}

struct SumOp {
  template <class T> T operator()(T x, T y) { return x + y; }
};
struct MaxOp {
  template <class T> T operator()(T x, T y) { return max(x, y); }
};
struct MinOp {
  template <class T> T operator()(T x, T y) { return min(x, y); }
};
struct BitOrOp {
  template <class T> T operator()(T x, T y) { return x | y; }
};
struct SyncThreadsBarrier {
  template <int> static void sync() { __syncthreads(); }
};
template <int threads> struct NamedBarrier {
  template <int id> static void sync() { hopper::barrier(id, threads); }
};

template <class T> T shfl_xor_sync(unsigned, T value, int mask) {
  static_assert(sizeof(T) == 4);
  uint32_t bits;
  memcpy(&bits, &value, 4);
  bits = hopper::shuffle_xor(bits, mask);
  memcpy(&value, &bits, 4);
  return value;
}

// A butterfly over `threads` threads that are `scale` apart: across warps through `buffer`, within one by shuffles.
template <class Op, int threads, int scale, int first = 0, class Sync = SyncThreadsBarrier, int batch = 1,
          int stride = 0>
struct AllReduce {
  template <class T> static T run(T x, T* buffer = nullptr) {
    run_batch<1>(&x, buffer);
    return x;
  }
  template <int count = batch, class T> static void run_batch(T* x, T* buffer = nullptr) {
    int mine = int(threadIdx.x) - first;
    for (int distance = threads / 2; distance >= scale; distance /= 2) {
      if (distance < 32) {
        for (int i = 0; i < count; ++i) x[i] = Op()(x[i], shfl_xor_sync(~0u, x[i], distance));
        continue;
      }
      Sync::template sync<1>();
      for (int i = 0; i < count; ++i) buffer[mine + i * stride] = x[i];
      Sync::template sync<2>();
      for (int i = 0; i < count; ++i) x[i] = Op()(x[i], buffer[(mine ^ distance) + i * stride]);
    }
  }
};
}  // namespace tl

extern "C" void hopper_entry(char** const* parameters);  // calls the kernel

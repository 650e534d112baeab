// The fused CPU code: Cauchy sums (sums.h), powers of structured matrices (powers.h) and what is made of them, responses
// (response.h) and the maps of a chunk (maps.h), the chunked scan (scan.h), the step (step.h), steps of different
// times (discretize.h, varying.h). What the processor has: processor.h.
//
// base.cpp, v3.cpp and v4.cpp each compile all of it for one instruction set, with vectors of S4_BYTES, to a library of
// its own. A plain C interface on raw pointers, so that building needs neither torch nor Python and no ABI ties the
// result to a version of either. What is not of the interface is in an unnamed namespace: no library sees another's.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#define INLINE inline __attribute__((always_inline))

namespace {

// The thread pool that torch computes with: GOMP_parallel(body, data, threads, flags), or nullptr for threads of our
// own. They would have to wait for a core until torch's have done spinning, in which those wait for their next work.
std::atomic<void (*)(void (*)(void*), void*, unsigned, unsigned)> pool{nullptr};

// While one lives, denormal numbers are 0 on this thread: each would cost some 100 cycles, and what decays is full of
// them. The processor drops them at the end of the range, so that a signal of any scale keeps its digits.
class WithoutDenormals {
#if defined(__x86_64__)
    const unsigned before = __builtin_ia32_stmxcsr();

  public:
    WithoutDenormals() { __builtin_ia32_ldmxcsr(before | 0x8040); }  // results, and what is read
    ~WithoutDenormals() { __builtin_ia32_ldmxcsr(before); }
#elif defined(__aarch64__)
    uint64_t before;

  public:
    WithoutDenormals() {
        asm volatile("mrs %0, fpcr" : "=r"(before));
        asm volatile("msr fpcr, %0" : : "r"(before | 1 << 24) : "memory");
    }
    ~WithoutDenormals() { asm volatile("msr fpcr, %0" : : "r"(before) : "memory"); }
#else
  public:
    WithoutDenormals() {}  // without one, the compiler would warn of an unused variable
#endif
};

// Runs task(i) for i in [0, count) on up to `threads` threads; 0, or 1 if memory ran out and results are incomplete.
template <class Task>
int parallel(int64_t count, int threads, const Task& task) {
    std::atomic<int64_t> next{0};
    std::atomic<int> failed{0};
    auto work = [&] {
        const WithoutDenormals here;
        try {
            for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) task(i);
        } catch (...) {  // nothing may leave a thread, or this library
            failed = 1, next = count;
        }
    };
    const int64_t team = std::min<int64_t>(threads, count);
    if (const auto shared = pool.load(); shared && team > 1) {
        // All of the pool, as torch asks for it: a smaller team ends the threads that the next larger one starts anew.
        shared([](void* data) { (*static_cast<decltype(work)*>(data))(); }, &work, unsigned(threads), 0);
        return failed;
    }
    std::vector<std::thread> helpers;
    try {
        helpers.reserve(std::max<int64_t>(team, 1));
        for (int64_t t = 1; t < team; ++t) helpers.emplace_back(work);
    } catch (...) {  // fewer threads than asked for do all the work
    }
    work();
    for (auto& helper : helpers) helper.join();
    return failed;
}

// What Python hands over: addresses and sizes, each taken in their order.
struct Arguments {
    const int64_t *addresses, *sizes;

    template <class T>
    operator T*() { return reinterpret_cast<T*>(*addresses++); }
    operator int64_t() { return *sizes++; }
};

template <class T, int Bytes>
struct Vector {
    typedef T type __attribute__((vector_size(Bytes)));
};
template <class T>
using Vec = typename Vector<T, S4_BYTES>::type;
template <class T>
constexpr int64_t kLanes = S4_BYTES / sizeof(T);

template <class T>
Vec<T> load(const T* from) {
    Vec<T> value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

template <class T>
void store(T* to, Vec<T> value) {
    std::memcpy(to, &value, sizeof value);
}

// Halves added up, until a number is left: one by one each number would wait for the sum of those before.
template <class T, class V>
INLINE T total(V value) {
    if constexpr (sizeof(V) == sizeof(T)) {
        return value[0];
    } else {
        typename Vector<T, sizeof(V) / 2>::type low, high;
        std::memcpy(&low, &value, sizeof low);
        std::memcpy(&high, reinterpret_cast<const char*>(&value) + sizeof low, sizeof high);
        return total<T>(low + high);
    }
}

#include "sums.h"
#include "matrix.h"
#include "powers.h"
#include "response.h"
#include "maps.h"
#include "scan.h"
#include "step.h"
#include "discretize.h"
#include "varying.h"
#include "processor.h"

}  // namespace

#define ENTRY(name, T, suffix)                                                                                         \
    extern "C" int s4_##name##_##suffix(const int64_t* values, int tensors, int threads) {                             \
        return name<T>({values, values + tensors}, threads);                                                           \
    }

ENTRY(cauchy, float, c64)
ENTRY(cauchy, double, c128)
ENTRY(cauchy_backward, float, c64)
ENTRY(cauchy_backward, double, c128)
ENTRY(response, float, f32)
ENTRY(response, double, f64)
ENTRY(response_backward, float, f32)
ENTRY(response_backward, double, f64)
ENTRY(maps, float, f32)
ENTRY(maps, double, f64)
ENTRY(maps_backward, float, f32)
ENTRY(maps_backward, double, f64)
ENTRY(scan, float, f32)
ENTRY(scan, double, f64)
ENTRY(scan_backward, float, f32)
ENTRY(scan_backward, double, f64)
ENTRY(step, float, f32)
ENTRY(step, double, f64)
ENTRY(varying, float, f32)
ENTRY(varying, double, f64)
ENTRY(varying_backward, float, f32)
ENTRY(varying_backward, double, f64)

// The version of these functions: __init__.py calls them only if it is of the same.
extern "C" int s4_interface() { return 6; }

// The instruction set that this is compiled for, and the best that there is code for and this processor has.
extern "C" const char* s4_level() { return S4_LEVEL; }
extern "C" const char* s4_processor() { return processor(); }

// Sets the pool, that of the OpenMP runtime which the process already has: this library links none.
extern "C" void s4_pool(void (*gomp_parallel)(void (*)(void*), void*, unsigned, unsigned)) { pool = gomp_parallel; }

// Whether `count` blocks of memory hold the same bytes as the next `count`.
extern "C" int s4_same(const void* const* blocks, const int64_t* sizes, int64_t count) {
    for (int64_t i = 0; i < count; ++i)
        if (std::memcmp(blocks[i], blocks[count + i], sizes[i])) return 0;
    return 1;
}

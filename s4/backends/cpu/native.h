// The fused CPU code: Cauchy and Vandermonde sums (_cpu_sums.h), powers of structured matrices (_cpu_krylov.h), the
// chunked scan (_cpu_scan.h), the step (_cpu_step.h).
//
// A plain C interface on raw pointers, so that building needs neither torch nor Python and no ABI ties the result to a
// version of either. One binary holds the code for several instruction sets; `s4_level` names the best that runs here.

#include <algorithm>
#include <atomic>
#include <cfloat>
#include <cmath>
#include <complex>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <thread>
#include <type_traits>
#include <vector>

#define INLINE inline __attribute__((always_inline))

namespace {

// The thread pool that torch computes with: GOMP_parallel(body, data, threads, flags), or nullptr for threads of our
// own. They would have to wait for a core until torch's have done spinning, in which those wait for their next work.
std::atomic<void (*)(void (*)(void*), void*, unsigned, unsigned)> pool{nullptr};

// Runs task(i) for i in [0, count) on up to `threads` threads; 0, or 1 if memory ran out and results are incomplete.
template <class Task>
int parallel(int64_t count, int threads, const Task& task) {
    std::atomic<int64_t> next{0};
    std::atomic<int> failed{0};
    auto work = [&] {
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

}  // namespace

#define S4_LEVEL base
#define S4_BYTES 16
#include "_cpu_level.h"

#if defined(__x86_64__) && !defined(__clang__) && __GNUC__ >= 12
#define S4_X86_LEVELS

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
#define S4_LEVEL v3
#define S4_BYTES 32
#include "_cpu_level.h"
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,prefer-vector-width=512")
#define S4_LEVEL v4
#define S4_BYTES 64
#include "_cpu_level.h"
#pragma GCC pop_options
#endif

extern "C" const char* s4_level() {
#ifdef S4_X86_LEVELS
    if (__builtin_cpu_supports("x86-64-v4")) return "v4";
    if (__builtin_cpu_supports("x86-64-v3")) return "v3";
#endif
    return "base";
}

// Of these functions, as _cpu.py calls them.
extern "C" int s4_interface() { return 3; }

// Sets the pool, that of the OpenMP runtime which the process already has: this library links none.
extern "C" void s4_pool(void (*gomp_parallel)(void (*)(void*), void*, unsigned, unsigned)) { pool = gomp_parallel; }

// Whether `count` blocks of memory hold the same bytes as the next `count`.
extern "C" int s4_same(const void* const* blocks, const int64_t* sizes, int64_t count) {
    for (int64_t i = 0; i < count; ++i)
        if (std::memcmp(blocks[i], blocks[count + i], sizes[i])) return 0;
    return 1;
}

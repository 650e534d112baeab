// All fused code, compiled by _cpu.cpp once for each instruction set: in namespace S4_LEVEL, with vectors of S4_BYTES,
// and entry points of the C interface that end in the level's name.

#define S4_JOIN_(name, level) name##_##level
#define S4_JOIN(name, level) S4_JOIN_(name, level)
#define ENTRY(name) extern "C" int S4_JOIN(name, S4_LEVEL)

namespace S4_LEVEL {

template <class T, int Bytes>
struct Vector {
    typedef T type __attribute__((vector_size(Bytes)));
};
template <class T>
using Vec = typename Vector<T, S4_BYTES>::type;
template <class T>
constexpr int64_t kLanes = S4_BYTES / sizeof(T);

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

#include "_cpu_sums.h"
#include "_cpu_matrix.h"
#include "_cpu_krylov.h"
#include "_cpu_scan.h"
#include "_cpu_step.h"

}  // namespace S4_LEVEL

#undef ENTRY
#undef S4_JOIN
#undef S4_JOIN_
#undef S4_LEVEL
#undef S4_BYTES

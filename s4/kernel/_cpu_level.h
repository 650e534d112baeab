// All fused code, compiled by _cpu.cpp once for each instruction set: in namespace S4_LEVEL, with vectors of S4_BYTES,
// and entry points of the C interface that end in the level's name.

#define S4_JOIN_(name, level) name##_##level
#define S4_JOIN(name, level) S4_JOIN_(name, level)
#define ENTRY(name) extern "C" int S4_JOIN(name, S4_LEVEL)

namespace S4_LEVEL {

template <class T>
struct Vector;
template <>
struct Vector<float> {
    typedef float type __attribute__((vector_size(S4_BYTES)));
};
template <>
struct Vector<double> {
    typedef double type __attribute__((vector_size(S4_BYTES)));
};
template <class T>
using Vec = typename Vector<T>::type;
template <class T>
constexpr int64_t kLanes = S4_BYTES / sizeof(T);

template <class T>
INLINE T total(Vec<T> value) {
    T sum = 0;
    for (int64_t i = 0; i < kLanes<T>; ++i) sum += value[i];
    return sum;
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

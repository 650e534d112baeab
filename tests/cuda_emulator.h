// Runs CUDA kernels on the CPU, one block at a time, each of its threads as a fiber: enough of the language for
// s4/backends/cuda/kernels.cu, which is compiled after this header as plain C++.
//
// Fibers run one after the other from barrier to barrier, in an order that changes at every barrier and with `seed`:
// what depends on the order lacks a barrier. Shared memory keeps what the block before, or the kernel before, left.

#include <math.h>
#include <ucontext.h>

#include <cstdint>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __launch_bounds__(...)
#define __shared__ static

struct Dim {
    unsigned x;
};
static Dim threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

struct Fiber {
    ucontext_t context;
    std::vector<char> stack;
    bool done;
};
static ucontext_t scheduler;
static std::vector<Fiber> fibers;
static unsigned running;
static void (*body)();

static void enter() {
    body();
    fibers[running].done = true;
}

static void barrier() {
    swapcontext(&fibers[running].context, &scheduler);
    threadIdx.x = running;
}

// False if some threads of the block wait at a barrier that others never reach.
static bool run_block(uint64_t& seed) {
    const unsigned count = blockDim.x;
    for (auto& fiber : fibers) {
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.data();
        fiber.context.uc_stack.ss_size = fiber.stack.size();
        fiber.context.uc_link = &scheduler;
        fiber.done = false;
        makecontext(&fiber.context, enter, 0);
    }
    for (;;) {
        seed = seed * 6364136223846793005u + 1442695040888963407u;
        const unsigned start = unsigned(seed >> 33) % count, step = seed >> 63 ? 1 : count - 1;
        unsigned ended = 0;
        for (unsigned i = 0; i < count; ++i) {
            running = threadIdx.x = unsigned((start + uint64_t(i) * step) % count);
            swapcontext(&scheduler, &fibers[running].context);
            ended += fibers[running].done;
        }
        if (ended == count) return true;
        if (ended) return false;
    }
}

template <size_t... I>
void call(void* kernel, const int64_t* arguments, std::index_sequence<I...>) {
    ((void (*)(decltype((void)I, int64_t())...))kernel)(arguments[I]...);
}

static void* kernel;
static const int64_t* arguments;

template <size_t N>
void bind() {
    body = [] { call(kernel, arguments, std::make_index_sequence<N>()); };
}

template <size_t... N>
void choose(size_t count, std::index_sequence<N...>) {
    ((N == count ? bind<N>() : void()), ...);
}

}  // namespace emulator

static void __syncthreads() { emulator::barrier(); }

// Runs a kernel whose arguments are all pointers or 64-bit integers, which this machine passes alike.
extern "C" int emulate(void* kernel, int64_t blocks, int64_t threads, const int64_t* arguments, int64_t count,
                       uint64_t seed) {
    emulator::kernel = kernel, emulator::arguments = arguments;
    emulator::choose(count, std::make_index_sequence<20>());
    gridDim.x = unsigned(blocks), blockDim.x = unsigned(threads);
    emulator::fibers.resize(threads);
    for (auto& fiber : emulator::fibers) fiber.stack.resize(1 << 16);
    for (int64_t block = 0; block < blocks; ++block) {
        blockIdx.x = unsigned(block);
        if (!emulator::run_block(seed)) return 1;
    }
    return 0;
}

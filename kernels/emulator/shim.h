// The part of CUDA C++ that kernels use, for a C++20 compiler on the host.
//
// Each CUDA thread is a fiber; the Rust side (src/driver/emulator) switches between them where they wait for each other.
// What CUDA leaves undefined is, as far as it can be seen, reported as a fault of the kernel: see faults.cu.
// `__shared__` is left undefined on purpose: SHARED_ARRAY and DYNAMIC_SHARED (common/kernel.cuh) take its place.
#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <atomic>
#include <bit>
#include <type_traits>
#include <utility>
#include <vector>

#include "emulator/types.h"

#define __global__
#define __device__
#define __host__
#define __constant__ const
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __grid_constant__

// ---- What the Rust side keeps for each block and thread. Layouts: src/driver/emulator/abi.rs.

struct gridgrad_block {
    uint3 index;
    dim3 threads;
    dim3 blocks;
    unsigned char* dynamic_shared;
    void* runner;
    unsigned long long run;  // a number of its own for every block of every launch
};

struct gridgrad_thread {
    uint3 index;
    unsigned lane;
    unsigned phase;           // which of two exchange buffers the next collective of the whole warp takes
    unsigned char* exchange;  // three buffers of emulator::exchange_bytes
    gridgrad_block* block;
    const char* file;  // where the thread last waited
    unsigned line;
};

struct gridgrad_kernel {
    const char* name;
    void (*invoke)(void* const* arguments);
    unsigned parameter_count;
    const unsigned* parameter_bytes;
};

extern "C" {
extern __thread gridgrad_thread* gridgrad_current __attribute__((tls_model("initial-exec")));
// Waits for the whole block. Returns how many of its threads came with a true predicate.
unsigned gridgrad_wait_block(gridgrad_thread* thread, unsigned predicate, const char* file, unsigned line);
// Waits for the lanes in `mask`.
void gridgrad_wait_warp(gridgrad_thread* thread, unsigned mask, const char* file, unsigned line);
void* gridgrad_static_shared(gridgrad_thread* thread, const void* declaration, size_t bytes, size_t alignment);
// Reports a fault of the running thread, and never returns.
[[noreturn]] void gridgrad_fault(gridgrad_thread* thread, const char* reason, const char* file, unsigned line);
}

#define threadIdx (gridgrad_current->index)
#define blockIdx (gridgrad_current->block->index)
#define blockDim (gridgrad_current->block->threads)
#define gridDim (gridgrad_current->block->blocks)
static constexpr int warpSize = 32;

// The place of a call, for reports: the default argument of every function that waits.
#define EMULATOR_PLACE const char *file = __builtin_FILE(), unsigned line = __builtin_LINE()

namespace emulator {

// ---- Kernel tables

template <auto kernel> struct Invoker;
template <class... Parameters, void (*kernel)(Parameters...)> struct Invoker<kernel> {
    static constexpr unsigned count = sizeof...(Parameters);
    static constexpr unsigned bytes[count + 1] = {sizeof(Parameters)..., 0};

    static void invoke(void* const* arguments) { unpack(arguments, std::index_sequence_for<Parameters...>()); }

    template <size_t... i> static void unpack([[maybe_unused]] void* const* arguments, std::index_sequence<i...>) {
        kernel(*static_cast<Parameters*>(arguments[i])...);
    }
};

template <auto kernel> constexpr gridgrad_kernel describe(const char* name) {
    return {name, &Invoker<kernel>::invoke, Invoker<kernel>::count, Invoker<kernel>::bytes};
}

// ---- Shared memory

inline void* static_shared(const void* declaration, size_t bytes, size_t alignment) {
    return gridgrad_static_shared(gridgrad_current, declaration, bytes, alignment);
}

// ---- Warp collectives

static constexpr unsigned lane_bytes = 256;
static constexpr unsigned exchange_bytes = 32 * lane_bytes;

// The lane of the running thread in its warp.
inline unsigned lane() { return gridgrad_current->lane; }

// Waits until every lane in `mask` waits here with the same mask.
inline void warp_rendezvous(unsigned mask, EMULATOR_PLACE) { gridgrad_wait_warp(gridgrad_current, mask, file, line); }

// Deposits `mine`, and returns the values of all 32 lanes once all of them have come. The pointer is good until the
// lane's next collective. Two buffers in turn make one rendezvous enough: no lane can come to the collective after the
// next before every lane has come to the next, and so has read its values here.
template <class T> const T* warp_gather(const T& mine, EMULATOR_PLACE) {
    static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= lane_bytes);
    gridgrad_thread* thread = gridgrad_current;
    T* values = reinterpret_cast<T*>(thread->exchange + thread->phase * exchange_bytes);
    thread->phase ^= 1;
    memcpy(static_cast<void*>(values + thread->lane), &mine, sizeof(T));
    gridgrad_wait_warp(thread, 0xffffffffu, file, line);
    return values;
}

// Deposits `mine`, waits for the lanes of `mask`, and returns `read(values)`. Groups smaller than a warp may be at
// different collectives at once; they share a third buffer, and wait a second time before it is used again.
template <class T, class Read> auto exchange(unsigned mask, const T& mine, Read read, const char* file, unsigned line) {
    if (mask == 0xffffffffu) return read(warp_gather(mine, file, line));
    static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= lane_bytes);
    gridgrad_thread* thread = gridgrad_current;
    unsigned char* slots = thread->exchange + 2 * exchange_bytes;
    // A slot of its own size for every lane: another group may exchange another type at the same time.
    memcpy(slots + thread->lane * lane_bytes, &mine, sizeof(T));
    gridgrad_wait_warp(thread, mask, file, line);
    T values[32];
    for (unsigned i = 0; i < 32; i++) memcpy(static_cast<void*>(values + i), slots + i * lane_bytes, sizeof(T));
    auto result = read(static_cast<const T*>(values));
    gridgrad_wait_warp(thread, mask, file, line);
    return result;
}

template <class T> T shuffle(unsigned mask, const T& mine, unsigned source, const char* file, unsigned line) {
    if (!(mask >> source & 1)) gridgrad_fault(gridgrad_current, "shuffle from a lane outside its mask", file, line);
    return exchange(mask, mine, [=](const T* values) { return values[source]; }, file, line);
}

inline unsigned ballot(unsigned mask, bool predicate, const char* file, unsigned line) {
    return exchange(
        mask, static_cast<unsigned char>(predicate),
        [=](const unsigned char* values) {
            unsigned bits = 0;
            for (unsigned i = 0; i < 32; i++) bits |= (mask >> i & 1 & values[i]) << i;
            return bits;
        },
        file, line);
}

}  // namespace emulator

inline void __syncthreads(EMULATOR_PLACE) { gridgrad_wait_block(gridgrad_current, 0, file, line); }
inline int __syncthreads_count(int predicate, EMULATOR_PLACE) {
    return static_cast<int>(gridgrad_wait_block(gridgrad_current, predicate != 0, file, line));
}
inline int __syncthreads_or(int predicate, EMULATOR_PLACE) {
    return gridgrad_wait_block(gridgrad_current, predicate != 0, file, line) != 0;
}
inline int __syncthreads_and(int predicate, EMULATOR_PLACE) {
    return gridgrad_wait_block(gridgrad_current, predicate == 0, file, line) == 0;
}
inline void __syncwarp(unsigned mask = 0xffffffffu, EMULATOR_PLACE) { emulator::warp_rendezvous(mask, file, line); }
inline void __threadfence() { std::atomic_thread_fence(std::memory_order_seq_cst); }
inline void __threadfence_block() { std::atomic_signal_fence(std::memory_order_seq_cst); }

// Shuffles within segments of `width` lanes, a power of two. A source outside the segment gives the lane's own value, as
// on a GPU; only __shfl_xor_sync may reach down into an earlier segment.
template <class T> T __shfl_sync(unsigned mask, T value, int source, int width = 32, EMULATOR_PLACE) {
    unsigned first = emulator::lane() & ~static_cast<unsigned>(width - 1);
    return emulator::shuffle(mask, value, first | (static_cast<unsigned>(source) & (width - 1)), file, line);
}
template <class T> T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, EMULATOR_PLACE) {
    unsigned lane = emulator::lane(), in_segment = lane & (width - 1);
    return emulator::shuffle(mask, value, in_segment >= delta ? lane - delta : lane, file, line);
}
template <class T> T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, EMULATOR_PLACE) {
    unsigned lane = emulator::lane(), in_segment = lane & (width - 1);
    return emulator::shuffle(mask, value, delta < width - in_segment ? lane + delta : lane, file, line);
}
template <class T> T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, EMULATOR_PLACE) {
    unsigned lane = emulator::lane(), last = lane | (width - 1), source = (lane ^ static_cast<unsigned>(bits)) & 31;
    return emulator::shuffle(mask, value, source <= last ? source : lane, file, line);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, EMULATOR_PLACE) {
    return emulator::ballot(mask, predicate != 0, file, line);
}
inline int __any_sync(unsigned mask, int predicate, EMULATOR_PLACE) {
    return emulator::ballot(mask, predicate != 0, file, line) != 0;
}
inline int __all_sync(unsigned mask, int predicate, EMULATOR_PLACE) {
    return emulator::ballot(mask, predicate != 0, file, line) == mask;
}

// Blocks run on several processor threads at once. There are no floating-point atomics: their sums would depend on order.
inline int atomicAdd(int* address, int value) { return std::atomic_ref<int>(*address).fetch_add(value); }
inline unsigned atomicAdd(unsigned* address, unsigned value) {
    return std::atomic_ref<unsigned>(*address).fetch_add(value);
}
inline unsigned long long atomicAdd(unsigned long long* address, unsigned long long value) {
    return std::atomic_ref<unsigned long long>(*address).fetch_add(value);
}

template <class T> T __ldg(const T* address) { return *address; }

#include "emulator/math.h"

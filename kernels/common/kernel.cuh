// The include of every kernel file. The same source is compiled by nvcc for GPUs and by a C++20 compiler for the
// emulator; what differs between the two is behind the names of this file.
//
//     #include "common/kernel.cuh"
//
//     template <class T> __device__ void scale(T* output, const T* input, u32 count) { ... }
//
//     #define SCALE(suffix, T) extern "C" __global__ void __launch_bounds__(256)
//         scale_##suffix(T* output, const T* input, u32 count) { scale(output, input, count); }
//     FOR_EACH_FLOAT(SCALE)
//
//     KERNELS(scale, KERNEL_FLOATS(scale))
#pragma once

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#else
#include "emulator/shim.h"
#endif

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using i32 = int;
using u64 = unsigned long long;
using i64 = long long;
using f32 = float;
using bf16 = __nv_bfloat16;
using f16 = __half;

// Shapes and strides as kernel parameters, by value. The Rust side passes `[T; N]`.
template <class T, int N> struct Array {
    T v[N];
    __host__ __device__ __forceinline__ constexpr const T& operator[](int i) const { return v[i]; }
    __host__ __device__ __forceinline__ constexpr T& operator[](int i) { return v[i]; }
};

// SHARED_ARRAY(float, tile, [64][65]): static shared memory, aligned to 16 bytes or to what SHARED_ARRAY_ALIGNED says.
// DYNAMIC_SHARED(name): `unsigned char* name`, the block's dynamic shared memory, aligned to 128 bytes.
#if defined(__CUDACC__)
#define SHARED_ARRAY_ALIGNED(alignment, type, name, ...) \
    __shared__ __align__(alignment)                      \
    type name __VA_ARGS__
#define DYNAMIC_SHARED(name)                                                  \
    extern __shared__ __align__(128) unsigned char gridgrad_dynamic_shared[]; \
    unsigned char* name = gridgrad_dynamic_shared
#else
#define SHARED_ARRAY_ALIGNED(alignment, type, name, ...) \
    typedef type name##_array __VA_ARGS__;               \
    static const char name##_declaration = 0;            \
    name##_array& name =                                 \
        *static_cast<name##_array*>(emulator::static_shared(&name##_declaration, sizeof(name##_array), alignment))
#define DYNAMIC_SHARED(name) unsigned char* name = gridgrad_current->block->dynamic_shared
#endif
#define SHARED_ARRAY(type, name, ...) SHARED_ARRAY_ALIGNED(16, type, name, __VA_ARGS__)

// One definition for each dtype: X(suffix, type).
#define FOR_EACH_FLOAT(X) X(f32, f32) X(bf16, bf16) X(f16, f16)
#define FOR_F32_AND_BF16(X) X(f32, f32) X(bf16, bf16)

// KERNELS(module, KERNEL(name), ...) ends a kernel file; `module` is the file's stem. On the host it defines the table
// by which the emulator finds, checks and calls the kernels.
#if defined(__CUDACC__)
#define KERNELS(module, ...)
#else
#define KERNEL(name) emulator::describe<&name>(#name)
#define KERNELS(module, ...)                                                       \
    extern "C" const gridgrad_kernel* gridgrad_kernels_##module(unsigned* count) { \
        static const gridgrad_kernel table[] = {__VA_ARGS__};                      \
        *count = sizeof table / sizeof *table;                                     \
        return table;                                                              \
    }
#endif
#define KERNEL_FLOATS(name) KERNEL(name##_f32), KERNEL(name##_bf16), KERNEL(name##_f16)
#define KERNEL_F32_AND_BF16(name) KERNEL(name##_f32), KERNEL(name##_bf16)

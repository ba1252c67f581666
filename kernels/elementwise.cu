// One value in, one value out.
//
//   cast: y_i = x_i in another type; floating point rounds to nearest even, integers truncate and saturate, NaN is 0
//   fill: y_i = value
//
// Tiling: casts between floating-point types and from pixels have a thread for each 8 elements, fills for each 16 bytes,
// other casts for each element; the grid strides over what is left.
// Bytes: each value is read once and written once. Bound by memory.

#include "common/kernel.cuh"

#include "common/index.cuh"
#include "common/vector.cuh"

constexpr u32 THREADS = 256;

template <class T> struct Tag {};

template <class S> __device__ S cast_to(double value, Tag<S>) { return from_float<S>(float(value)); }
__device__ inline i64 cast_to(double value, Tag<i64>) {
    if (!(value > -9.2233720368547758e18)) {
        return value != value ? 0 : -9223372036854775807ll - 1;
    }
    return value < 9.2233720368547758e18 ? i64(value) : 9223372036854775807ll;
}
__device__ inline u8 cast_to(double value, Tag<u8>) { return value > 0 ? value < 255 ? u8(value) : u8(255) : u8(0); }

// f64 holds every value of every type but large i64, which round as they do on the processor.
template <class S> __device__ double widen(S value) { return double(to_float(value)); }
template <> __device__ inline double widen(i64 value) { return double(value); }
template <> __device__ inline double widen(u8 value) { return double(value); }

template <class T> inline constexpr bool IS_FLOAT = std::is_same_v<T, float> || sizeof(T) == 2;

template <class D, class S> __device__ __forceinline__ void cast(D* output, const S* input, u64 elements) {
    // f32 holds every value of these inputs.
    if constexpr (IS_FLOAT<D> && sizeof(S) < 8) {
        constexpr int V = 8;
        for (u64 i = grid_thread() * V; i < elements; i += grid_threads() * V) {
            float values[V];
            load_as_float_tail(values, input + i, i64(elements - i), 0.0f);
            store_from_float_tail(output + i, values, i64(elements - i));
        }
    } else {
        for (u64 i = grid_thread(); i < elements; i += grid_threads()) {
            output[i] = cast_to(widen(input[i]), Tag<D>());
        }
    }
}

template <class T> __device__ __forceinline__ void fill(T* output, double value, u64 elements) {
    constexpr int V = WIDEST<T>;
    Vector<T, V> values;
#pragma unroll
    for (int j = 0; j < V; ++j) values[j] = cast_to(value, Tag<T>());
    for (u64 i = grid_thread() * V; i < elements; i += grid_threads() * V) {
        store_tail(output + i, values, i64(elements - i));
    }
}

#define CAST(from, S, to, D)                                          \
    extern "C" __global__ void __launch_bounds__(THREADS)             \
        cast_##from##_##to(D* output, const S* input, u64 elements) { \
        cast<D, S>(output, input, elements);                          \
    }
#define FILL(suffix, T)                                                                                          \
    extern "C" __global__ void __launch_bounds__(THREADS) fill_##suffix(T* output, double value, u64 elements) { \
        fill<T>(output, value, elements);                                                                        \
    }

CAST(f32, float, bf16, bf16)
CAST(f32, float, f16, f16)
CAST(f32, float, i64, i64)
CAST(f32, float, u8, u8)
CAST(bf16, bf16, f32, float)
CAST(bf16, bf16, f16, f16)
CAST(bf16, bf16, i64, i64)
CAST(bf16, bf16, u8, u8)
CAST(f16, f16, f32, float)
CAST(f16, f16, bf16, bf16)
CAST(f16, f16, i64, i64)
CAST(f16, f16, u8, u8)
CAST(i64, i64, f32, float)
CAST(i64, i64, bf16, bf16)
CAST(i64, i64, f16, f16)
CAST(i64, i64, u8, u8)
CAST(u8, u8, f32, float)
CAST(u8, u8, bf16, bf16)
CAST(u8, u8, f16, f16)
CAST(u8, u8, i64, i64)
FILL(f32, float)
FILL(bf16, bf16)
FILL(f16, f16)
FILL(i64, i64)
FILL(u8, u8)

KERNELS(elementwise, KERNEL(cast_f32_bf16), KERNEL(cast_f32_f16), KERNEL(cast_f32_i64), KERNEL(cast_f32_u8),
        KERNEL(cast_bf16_f32), KERNEL(cast_bf16_f16), KERNEL(cast_bf16_i64), KERNEL(cast_bf16_u8), KERNEL(cast_f16_f32),
        KERNEL(cast_f16_bf16), KERNEL(cast_f16_i64), KERNEL(cast_f16_u8), KERNEL(cast_i64_f32), KERNEL(cast_i64_bf16),
        KERNEL(cast_i64_f16), KERNEL(cast_i64_u8), KERNEL(cast_u8_f32), KERNEL(cast_u8_bf16), KERNEL(cast_u8_f16),
        KERNEL(cast_u8_i64), KERNEL(fill_f32), KERNEL(fill_bf16), KERNEL(fill_f16), KERNEL(fill_i64), KERNEL(fill_u8))

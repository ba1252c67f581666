// Functions of two values with NumPy's broadcasting, and the selection between two values by a mask.
//
//   binary: y_i = f(a_l(i), b_r(i)), where l and r add up steps along axes, 0 along those where an operand is stretched
//   select: y_i = no_i where mask_i = 0, else yes_i
//
// Tiling: a thread for each 16 bytes of the output where rows are a multiple of that (always for equal shapes and for
// scalars), else for each element. Along the innermost axis an operand either advances or stands still.
// Bytes: each output element is written once, each operand's elements are read from device memory about once; a
// stretched operand's come from the caches after that. 1 FLOP per element: bound by memory.
//
// The output may be an operand of the same shape: a thread reads what it overwrites before.

#include "common/kernel.cuh"

#include "common/strided.cuh"
#include "common/vector.cuh"

constexpr u32 THREADS = 256;

// As `Binary` of src/ops/elementwise/mod.rs.
enum class Binary : u32 { Add, Sub, Mul, Div, Maximum, Minimum, Greater, Equal };

// A NaN on either side stays.
__device__ __forceinline__ float maximum(float a, float b) { return a < b || b != b ? b : a; }
__device__ __forceinline__ float minimum(float a, float b) { return a > b || b != b ? b : a; }

template <class T> struct Operand {
    const T* values;
    const Axes& steps;
};

template <int V, class T>
__device__ __forceinline__ void load_or_repeat(float (&values)[V], const T* from, bool advances, i64 count) {
    if (advances) return load_as_float_tail(values, from, count, 1.0f);
    const float value = to_float(*from);
#pragma unroll
    for (int j = 0; j < V; ++j) values[j] = value;
}

template <int V> __device__ __forceinline__ void apply(Binary function, float (&left)[V], const float (&right)[V]) {
    const auto each = [&](auto f) {
#pragma unroll
        for (int i = 0; i < V; ++i) left[i] = f(left[i], right[i]);
    };
    switch (function) {
        case Binary::Add:
            return each([](float a, float b) { return a + b; });
        case Binary::Sub:
            return each([](float a, float b) { return a - b; });
        case Binary::Mul:
            return each([](float a, float b) { return a * b; });
        case Binary::Div:
            return each([](float a, float b) { return a / b; });
        case Binary::Maximum:
            return each([](float a, float b) { return maximum(a, b); });
        case Binary::Minimum:
            return each([](float a, float b) { return minimum(a, b); });
        case Binary::Greater:
            return each([](float a, float b) { return a > b ? 1.0f : 0.0f; });
        case Binary::Equal:
            return each([](float a, float b) { return a == b ? 1.0f : 0.0f; });
    }
}

template <int V, class T>
__device__ __forceinline__ void binary(T* output, const Operand<T>& left, const Operand<T>& right, u64 elements,
                                       Binary function, u32 rank, const Axes& extents) {
    const bool left_advances = rank == 0 || left.steps[int(rank) - 1] != 0;
    const bool right_advances = rank == 0 || right.steps[int(rank) - 1] != 0;
    for (u64 i = grid_thread() * V; i < elements; i += grid_threads() * V) {
        u64 at_left = 0, at_right = 0;
        for_each_position(i, rank, extents, [&](int axis, u64 position) {
            at_left += position * left.steps[axis];
            at_right += position * right.steps[axis];
        });
        float a[V], b[V];
        load_or_repeat(a, left.values + at_left, left_advances, i64(elements - i));
        load_or_repeat(b, right.values + at_right, right_advances, i64(elements - i));
        apply(function, a, b);
        store_from_float_tail(output + i, a, i64(elements - i));
    }
}

template <class T>
__device__ __forceinline__ void select(T* output, const T* mask, const T* yes, const T* no, u64 elements) {
    constexpr int V = WIDEST<T>;
    for (u64 i = grid_thread() * V; i < elements; i += grid_threads() * V) {
        const i64 count = i64(elements - i);
        float chosen[V], a[V], b[V];
        load_as_float_tail(chosen, mask + i, count, 0.0f);
        load_as_float_tail(a, yes + i, count, 0.0f);
        load_as_float_tail(b, no + i, count, 0.0f);
#pragma unroll
        for (int j = 0; j < V; ++j) a[j] = chosen[j] == 0 ? b[j] : a[j];
        store_from_float_tail(output + i, a, count);
    }
}

// `wide`: rows are a multiple of 16 bytes, or there is only one.
#define INSTANCE(suffix, T)                                                                                       \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                         \
        binary_##suffix(T* output, const T* left, const T* right, u64 elements, u32 function, u32 wide, u32 rank, \
                        const __grid_constant__ Axes extents, const __grid_constant__ Axes left_steps,            \
                        const __grid_constant__ Axes right_steps) {                                               \
        const Operand<T> a{left, left_steps}, b{right, right_steps};                                              \
        if (wide) {                                                                                               \
            binary<WIDEST<T>>(output, a, b, elements, Binary(function), rank, extents);                           \
        } else {                                                                                                  \
            binary<1>(output, a, b, elements, Binary(function), rank, extents);                                   \
        }                                                                                                         \
    }                                                                                                             \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                         \
        select_##suffix(T* output, const T* mask, const T* yes, const T* no, u64 elements) {                      \
        select(output, mask, yes, no, elements);                                                                  \
    }
FOR_EACH_FLOAT(INSTANCE)

KERNELS(binary, KERNEL_FLOATS(binary), KERNEL_FLOATS(select))

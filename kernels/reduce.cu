// Sums, maxima and arg-maxima of (outer, count, inner) over the middle axis.
//
//   sum: y_oi = factor sum_c x_oci          max: y_oi = max_c x_oci, NaN where there is one
//   argmax (inner = 1): the first c at which x_oc is largest, or is NaN
//
// Long reductions are cut into `splits` chunks, whose results (outer, splits, inner) are f32; a second launch reduces
// those. The host chooses the cuts from the shape alone, and threads combine in a fixed tree: the same bits on every run
// and every device.
//
// Tiling: rows (inner = 1): a power of two of lanes, at most a warp, for each chunk of a row, by loads of 16 bytes where
// rows are a multiple of that. columns: a block for (split, tile of inner), 8 threads of 4 columns by 32 rows, or 32
// threads of one column by 8 rows where inner is no multiple of 4; then a tree over the rows in shared memory.
// Bytes: each input element is read once. 1 FLOP per element: bound by memory.

#include "common/kernel.cuh"

#include "common/reduce.cuh"
#include "common/strided.cuh"
#include "common/vector.cuh"

constexpr u32 THREADS = 256;

// As `kind` of src/ops/reduce/gpu.rs: what the output is made of, which differs from the input for partial results.
enum class Kind : u32 { F32, Bf16, F16 };

__device__ __forceinline__ void store_as(void* output, Kind kind, u64 at, float value) {
    switch (kind) {
        case Kind::F32:
            static_cast<float*>(output)[at] = value;
            return;
        case Kind::Bf16:
            static_cast<bf16*>(output)[at] = from_float<bf16>(value);
            return;
        case Kind::F16:
            static_cast<f16*>(output)[at] = from_float<f16>(value);
            return;
    }
}

// Over each `lanes` neighbouring lanes, a power of two. All 32 lanes of the warp take part.
template <class Operation> __device__ __forceinline__ float reduce_lanes(float value, u32 lanes, Operation operation) {
    for (u32 mask = lanes / 2; mask > 0; mask /= 2) value = operation(value, shuffle_xor(value, mask));
    return value;
}

// One lane's share of a part of a row: elements first + lane V, first + (lane + lanes) V, …, in V running results.
template <int V, class T, class Operation>
__device__ __forceinline__ float share_of_row(const T* row, u64 first, u64 end, u32 lane, u32 lanes, float identity,
                                              Operation operation) {
    float results[V];
#pragma unroll
    for (int j = 0; j < V; ++j) results[j] = identity;
#pragma unroll 4
    for (u64 i = first + lane * V; i < end; i += lanes * V) {
        float values[V];
        load_as_float(values, row + i);
#pragma unroll
        for (int j = 0; j < V; ++j) results[j] = operation(results[j], values[j]);
    }
#pragma unroll
    for (int width = V / 2; width > 0; width /= 2) {
#pragma unroll
        for (int j = 0; j < width; ++j) results[j] = operation(results[j], results[j + width]);
    }
    return results[0];
}

template <class T, class Operation>
__device__ __forceinline__ void reduce_rows(void* output, Kind kind, const T* input, u64 outer, u64 count, u64 splits,
                                            u64 chunk, u32 lanes, float factor, float identity, Operation operation) {
    constexpr int V = WIDEST<T>;
    const u32 groups = blockDim.x / lanes, lane = threadIdx.x % lanes;
    const u64 items = outer * splits;
    for (u64 first = u64(blockIdx.x) * groups; first < items; first += u64(gridDim.x) * groups) {
        const u64 item = first + threadIdx.x / lanes;
        float value = identity;
        if (item < items) {
            const Division at = divide(item, splits);
            const T* row = input + at.quotient * count;
            const u64 begin = at.remainder * chunk, end = begin + chunk < count ? begin + chunk : count;
            value = count % V == 0 ? share_of_row<V>(row, begin, end, lane, lanes, identity, operation)
                                   : share_of_row<1>(row, begin, end, lane, lanes, identity, operation);
        }
        value = reduce_lanes(value, lanes, operation);
        if (item < items && lane == 0) store_as(output, kind, item, value * factor);
    }
}

template <int V, class T, class Operation>
__device__ __forceinline__ void reduce_columns(void* output, Kind kind, const T* input, u64 outer, u64 count, u64 inner,
                                               u64 splits, u64 chunk, float factor, float identity, Operation operation,
                                               float* scratch) {
    constexpr u32 X = V == 1 ? 32 : 8, Y = THREADS / X;
    const u32 x = threadIdx.x % X, y = threadIdx.x / X;
    const u64 tiles = divide_up<u64>(inner, X * V);
    for (u64 item = blockIdx.x; item < outer * splits * tiles; item += gridDim.x) {
        const Division by_tile = divide(item, tiles), by_split = divide(by_tile.quotient, splits);
        const u64 column = (by_tile.remainder * X + x) * V;
        const u64 begin = by_split.remainder * chunk, end = begin + chunk < count ? begin + chunk : count;
        float results[V];
#pragma unroll
        for (int j = 0; j < V; ++j) results[j] = identity;
        if (column < inner) {
            const T* from = input + by_split.quotient * count * inner + column;
#pragma unroll 4
            for (u64 row = begin + y; row < end; row += Y) {
                float values[V];
                load_as_float(values, from + row * inner);
#pragma unroll
                for (int j = 0; j < V; ++j) results[j] = operation(results[j], values[j]);
            }
        }
        // Each level reads the upper half of what the last one left, and leaves its own in the lower half.
#pragma unroll
        for (int j = 0; j < V; ++j) scratch[j * THREADS + threadIdx.x] = results[j];
        __syncthreads();
        for (u32 half = Y / 2; half > 0; half /= 2) {
            if (y < half) {
#pragma unroll
                for (int j = 0; j < V; ++j) {
                    float& own = scratch[j * THREADS + threadIdx.x];
                    own = results[j] = operation(results[j], scratch[j * THREADS + threadIdx.x + half * X]);
                }
            }
            __syncthreads();
        }
        if (y == 0 && column < inner) {
#pragma unroll
            for (int j = 0; j < V; ++j) {
                store_as(output, kind, by_tile.quotient * inner + column + j, results[j] * factor);
            }
        }
    }
}

template <class T, class Operation>
__device__ __forceinline__ void reduce_columns(void* output, Kind kind, const T* input, u64 outer, u64 count, u64 inner,
                                               u64 splits, u64 chunk, float factor, float identity,
                                               Operation operation) {
    SHARED_ARRAY(float, scratch, [4 * THREADS]);
    if (inner % 4 == 0) {
        reduce_columns<4>(output, kind, input, outer, count, inner, splits, chunk, factor, identity, operation,
                          scratch);
    } else {
        reduce_columns<1>(output, kind, input, outer, count, inner, splits, chunk, factor, identity, operation,
                          scratch);
    }
}

// A warp for each row.
template <class T> __device__ __forceinline__ void argmax_rows(i64* output, const T* input, u64 rows, u32 count) {
    constexpr u32 ROWS = THREADS / 32;
    const u32 lane = threadIdx.x % 32;
    for (u64 row = u64(blockIdx.x) * ROWS + threadIdx.x / 32; row < rows; row += u64(gridDim.x) * ROWS) {
        // A lane without elements loses every tie.
        Indexed<float> best{-INFINITY, 0xFFFFFFFFu};
        for (u32 i = lane; i < count; i += 32) {
            best = Argmax{}(best, Indexed<float>{to_float(input[row * count + i]), i});
        }
        best = warp_reduce(best, Argmax{});
        if (lane == 0) output[row] = best.index;
    }
}

#define REDUCTION(name, suffix, T, identity, Operation)                                                               \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                             \
        name##_rows_##suffix(void* output, u32 kind, const T* input, u64 outer, u64 count, u64 splits, u64 chunk,     \
                             u32 lanes, float factor) {                                                               \
        reduce_rows(output, Kind(kind), input, outer, count, splits, chunk, lanes, factor, identity, Operation{});    \
    }                                                                                                                 \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                             \
        name##_columns_##suffix(void* output, u32 kind, const T* input, u64 outer, u64 count, u64 inner, u64 splits,  \
                                u64 chunk, float factor) {                                                            \
        reduce_columns(output, Kind(kind), input, outer, count, inner, splits, chunk, factor, identity, Operation{}); \
    }
#define INSTANCE(suffix, T)                                                 \
    REDUCTION(sum, suffix, T, 0.0f, Sum)                                    \
    REDUCTION(max, suffix, T, -INFINITY, Max)                               \
    extern "C" __global__ void __launch_bounds__(THREADS)                   \
        argmax_##suffix(i64* output, const T* input, u64 rows, u32 count) { \
        argmax_rows(output, input, rows, count);                            \
    }
FOR_EACH_FLOAT(INSTANCE)

KERNELS(reduce, KERNEL_FLOATS(sum_rows), KERNEL_FLOATS(sum_columns), KERNEL_FLOATS(max_rows),
        KERNEL_FLOATS(max_columns), KERNEL_FLOATS(argmax))

// Rows that groups of threads share, and columns that slices of a block share. Sums run in an order that depends on the
// geometry alone.
#pragma once
#include "common/reduce.cuh"
#include "common/vector.cuh"

// Two sums that are taken together.
struct Pair {
    float a, b;
    __device__ __forceinline__ Pair operator+(const Pair& other) const { return {a + other.a, b + other.b}; }
};

// Over a group of `lanes` neighbouring threads, a power of two. A group of more than 32 is the whole block; below, all
// lanes of the warp take part, those without a row too. `scratch` holds REDUCTION_SCRATCH values.
template <class T, class Operation>
__device__ __forceinline__ T group_reduce(T value, T identity, Operation operation, u32 lanes, T* scratch) {
    if (lanes > 32) return block_reduce(value, identity, operation, scratch);
    for (u32 mask = lanes / 2; mask > 0; mask /= 2) {
        const T other = shuffle_xor(value, mask);
        value = (lane() & mask) == 0 ? operation(value, other) : operation(other, value);
    }
    return value;
}

template <class T> __device__ __forceinline__ T group_sum(T value, u32 lanes, T* scratch) {
    return group_reduce(value, T{}, Sum{}, lanes, scratch);
}

// Which rows a group takes: all groups of a block stay in the loop together, since they meet in reductions.
//
//   for (RowWalk walk(rows, lanes); walk.more(); walk.next()) if (walk.valid()) … walk.row() …
struct RowWalk {
    u64 rows, first;
    u32 group, groups;

    __device__ __forceinline__ RowWalk(u64 rows, u32 lanes)
        : rows(rows), group(threadIdx.x / lanes), groups(blockDim.x / lanes) {
        first = u64(blockIdx.x) * groups;
    }
    __device__ __forceinline__ bool more() const { return first < rows; }
    __device__ __forceinline__ void next() { first += u64(gridDim.x) * groups; }
    __device__ __forceinline__ u64 row() const { return first + group; }
    __device__ __forceinline__ bool valid() const { return row() < rows; }
};

// Blocks of blockDim.x columns and blockDim.y slices of rows, a power of two: over the slices, for N values of each
// thread. Slice 0 gets the result. `scratch` holds N values for each thread.
template <class T, int N, class Operation>
__device__ __forceinline__ void reduce_slices(T (&values)[N], Operation operation, T* scratch) {
    const u32 threads = blockDim.x * blockDim.y, self = threadIdx.y * blockDim.x + threadIdx.x;
    __syncthreads();  // an earlier reduction may still be reading
#pragma unroll
    for (int n = 0; n < N; ++n) scratch[n * threads + self] = values[n];
    for (u32 half = blockDim.y / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.y < half) {
#pragma unroll
            for (int n = 0; n < N; ++n) {
                values[n] = operation(values[n], scratch[n * threads + self + half * blockDim.x]);
                scratch[n * threads + self] = values[n];
            }
        }
    }
}

// Over `parts` rows of partial results, `stride` values apart, for the thread's column; `value` is the identity before.
// Slice 0 gets the result. `scratch` holds a value for each thread.
template <class T, class Operation>
__device__ __forceinline__ void reduce_parts(T& value, const T* partials, u32 parts, u64 stride, bool valid,
                                             Operation operation, T* scratch) {
    T values[1] = {value};
    for (u32 part = threadIdx.y; valid && part < parts; part += blockDim.y) {
        values[0] = operation(values[0], partials[part * stride]);
    }
    reduce_slices(values, operation, scratch);
    value = values[0];
}

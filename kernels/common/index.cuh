// Where a thread is: in its warp, its block and the grid.
#pragma once
#include "common/kernel.cuh"

// Index of the thread in its block, x fastest, as warps are cut from it.
__device__ __forceinline__ u32 linear_thread() {
    return threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
}

__device__ __forceinline__ u32 block_threads() { return blockDim.x * blockDim.y * blockDim.z; }

__device__ __forceinline__ u32 lane() { return linear_thread() % 32; }

__device__ __forceinline__ u32 warp() { return linear_thread() / 32; }

// For loops over n elements on a grid of one dimension that stays the same size however large n is:
//   for (u64 i = grid_thread(); i < n; i += grid_threads())
__device__ __forceinline__ u64 grid_thread() { return u64(blockIdx.x) * blockDim.x + threadIdx.x; }

__device__ __forceinline__ u64 grid_threads() { return u64(gridDim.x) * blockDim.x; }

#ifdef __CUDACC__
// An address in shared memory as PTX takes it.
__device__ __forceinline__ u32 shared_address(const void* pointer) {
    return static_cast<u32>(__cvta_generic_to_shared(pointer));
}
#endif

template <class Integer> __host__ __device__ constexpr Integer divide_up(Integer n, Integer by) {
    return (n + by - 1) / by;
}

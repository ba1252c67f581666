// Planted faults, for the emulator's self-test: one kernel for each thing that it must catch. Never compiled for a GPU.

#include "common/kernel.cuh"

// ---- Healthy

// output[block] = Σ input[block · count ..], by warp shuffles and one barrier.
extern "C" __global__ void healthy_sum(float* output, const float* input, u32 count) {
    SHARED_ARRAY(float, partial, [32]);
    const float* mine = input + static_cast<size_t>(blockIdx.x) * count;
    float sum = 0;
    for (u32 i = threadIdx.x; i < count; i += blockDim.x) sum += mine[i];
    for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_down_sync(0xffffffffu, sum, offset);
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x < 32) {
        sum = threadIdx.x < blockDim.x / 32 ? partial[threadIdx.x] : 0;
        for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
        if (threadIdx.x == 0) output[blockIdx.x] = sum;
    }
}

// Every collective, and every geometry variable; output has 8 values for each thread.
extern "C" __global__ void healthy_collectives(u32* output) {
    u32 thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
    u32 block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
    u32 lane = thread % 32;
    u32* mine = output + (static_cast<size_t>(block) * blockDim.x * blockDim.y * blockDim.z + thread) * 8;
    mine[0] = __shfl_sync(0xffffffffu, lane, 3, 8);
    mine[1] = __shfl_up_sync(0xffffffffu, lane, 2, 16);
    mine[2] = __ballot_sync(0xffffffffu, lane % 3 == 0);
    mine[3] = static_cast<u32>(__syncthreads_count(lane < 5));
    // Halves of the warp at different collectives, as many times as they like.
    if (lane < 16) {
        u64 wide = lane;
        for (u32 i = 0; i < 3; i++) wide += __shfl_xor_sync(0x0000ffffu, wide, 1);
        mine[4] = static_cast<u32>(wide);
    } else {
        mine[4] = static_cast<u32>(__any_sync(0xffff0000u, lane == 20)) +
                  static_cast<u32>(__all_sync(0xffff0000u, lane > 16));
    }
    __syncwarp();
    mine[5] = static_cast<u32>(__syncthreads_or(thread == 7)) * 2 + static_cast<u32>(__syncthreads_and(thread != 7));
    mine[6] = emulator::warp_gather(lane * lane)[31 - lane];
    mine[7] = block;
}

extern "C" __global__ void empty_kernel() {}

// Parameters of every kind, to compare with what Rust passes.
extern "C" __global__ void parameters(u32* output, u32 a, Array<u32, 3> b, double c, i32 d) {
    output[0] = a;
    for (int i = 0; i < 3; i++) output[1 + i] = b[i];
    output[4] = static_cast<u32>(c);
    output[5] = static_cast<u32>(d);
}

// 16-bit floats: the bits of each value of `input`, rounded, and that read back.
extern "C" __global__ void conversions(u32* bits, float* back, const float* input, u32 count) {
    u32 i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    bf16 b = __float2bfloat16_rn(input[i]);
    f16 h = __float2half_rn(input[i]);
    bits[i] = static_cast<u32>(__bfloat16_as_ushort(b)) << 16 | __half_as_ushort(h);
    back[2 * i] = __bfloat162float(b);
    back[2 * i + 1] = __half2float(h);
}

// ---- Faulty

// The barrier between writing and reading is missing: what is read depends on the order of the fibers.
extern "C" __global__ void missing_barrier(float* output) {
    SHARED_ARRAY(float, tile, [64]);
    tile[threadIdx.x] = static_cast<float>(threadIdx.x);
    output[threadIdx.x] = tile[63 - threadIdx.x];
}

extern "C" __global__ void divergent_barrier() {
    if (threadIdx.x < 40) {
        __syncthreads();
    } else {
        __syncwarp(0xffffff00u);
        emulator::warp_rendezvous(0xffffffffu);
    }
}

extern "C" __global__ void early_exit() {
    if (blockIdx.x == 1 && threadIdx.x == 5) return;
    __syncthreads();
}

extern "C" __global__ void missing_lane(u32* output) {
    if (threadIdx.x == 9) return;
    output[threadIdx.x] = __shfl_xor_sync(0xffffffffu, threadIdx.x, 1);
}

extern "C" __global__ void not_in_mask() {
    if (threadIdx.x == 3) __syncwarp(0x1u);
}

extern "C" __global__ void misaligned(float4* output, const float* input) {
    if (threadIdx.x == 2) *output = *reinterpret_cast<const float4*>(input + 1);
}

extern "C" __global__ void shared_index(float* output, u32 column) {
    SHARED_ARRAY(float, tile, [4][65]);
    tile[threadIdx.x % 4][threadIdx.x == 17 ? column : 0] = 1;
    __syncthreads();
    output[threadIdx.x] = tile[0][0];
}

extern "C" __global__ void dynamic_overrun(u32 bytes) {
    DYNAMIC_SHARED(buffer);
    if (threadIdx.x == 1) *static_cast<volatile unsigned char*>(buffer + bytes) = 1;
}

extern "C" __global__ void dynamic_underrun() {
    DYNAMIC_SHARED(buffer);
    *static_cast<volatile unsigned char*>(buffer - 1) = 1;
}

extern "C" __global__ void static_limit() {
    SHARED_ARRAY(float, first, [40000]);
    SHARED_ARRAY(float, second, [40000]);
    first[threadIdx.x] = second[threadIdx.x];
}

extern "C" __global__ void global_write(float* buffer, i64 index) {
    __syncthreads();
    if (blockIdx.x == 2 && threadIdx.x == 33) buffer[index] = 1;
}

extern "C" __global__ void global_read(float* output, const float* buffer, i64 index) {
    if (threadIdx.x == 33) *output = buffer[index];
}

extern "C" __global__ void unwritten_shared(float* output) {
    SHARED_ARRAY(float, tile, [32]);
    if (threadIdx.x != 4) tile[threadIdx.x] = 0;
    __syncthreads();
    output[threadIdx.x] = tile[threadIdx.x];
}

// Frames of at least 1 KiB each, until the stack is full.
__device__ __noinline__ u32 recurse(volatile u32* above, u32 depth) {
    volatile u32 frame[256];
    frame[depth % 256] = above[0] + depth;
    return depth == 0 ? frame[0] : recurse(frame, depth - 1) + frame[1];
}
extern "C" __global__ void stack_overflow(u32* output, u32 depth) {
    volatile u32 first = 0;
    *output = recurse(&first, depth);
}

extern "C" __global__ void divide(i32* output, i32 by) { *output = 7 / by; }

KERNELS(faults, KERNEL(healthy_sum), KERNEL(healthy_collectives), KERNEL(empty_kernel), KERNEL(parameters),
        KERNEL(conversions), KERNEL(missing_barrier), KERNEL(divergent_barrier), KERNEL(early_exit),
        KERNEL(missing_lane), KERNEL(not_in_mask), KERNEL(misaligned), KERNEL(shared_index), KERNEL(dynamic_overrun),
        KERNEL(dynamic_underrun), KERNEL(static_limit), KERNEL(global_write), KERNEL(global_read),
        KERNEL(unwritten_shared), KERNEL(stack_overflow), KERNEL(divide))

// Largest values over windows of channels-last maps, forward and backward. Averages are in resample.cu.
//
//   max       y(b, o, c) = max over h in window o of x(b, h, c), with p(b, o, c) the first place of it in its image
//   scatter   x(b, h, c) = sum over windows o that hold h with p(b, o, c) = h of y(b, o, c)
//   gather    y(b, o, c) = x(b, p(b, o, c), c), the transpose of scatter
//
// NaN is larger than any number, and a later NaN larger than an earlier one. Scatter gathers from the windows that hold
// a position, in their order.
//
// Tiling: a thread for one position of the result and RUN neighbouring channels, 16 bytes where their number allows;
// neighbouring threads take neighbouring channels, so that every access of a warp is contiguous.
// Bytes: both maps once from device memory, and 4 per window and channel for places; what windows share comes from the
// caches. One comparison or FLOP per position of a window: bound by memory.

#include "common/kernel.cuh"

#include "common/divisor.cuh"
#include "common/index.cuh"
#include "common/vector.cuh"

// Windows along one axis.
struct Axis {
    u32 extent, count, kernel, stride, padding;

    // The positions [first, end) of a window.
    __device__ __forceinline__ void window(u32 index, u32& first, u32& end) const {
        const u32 start = index * stride, last = start + kernel;
        first = start > padding ? start - padding : 0;
        end = last < padding + extent ? last - padding : extent;
    }

    // The windows [first, end) that hold a position.
    __device__ __forceinline__ void holders(u32 position, u32& first, u32& end) const {
        const u32 place = position + padding;
        first = place < kernel ? 0 : (place - kernel) / stride + 1;
        end = place / stride + 1;
        if (end > count) end = count;
    }
};

// As `Extents` in src/ops/pool/gpu.rs.
struct Pool {
    u32 batch, channels;
    Axis vertical, horizontal;
};

// Calls `f(image, y, x, channel, element)` for each position of a (height, width) result and run of channels, `element`
// the first of the result's that it owns.
template <u32 RUN, class F>
__device__ __forceinline__ void for_each_run(const Pool& pool, u32 height, u32 width, F f) {
    const u32 runs = pool.channels / RUN;
    const u64 items = u64(pool.batch) * height * width * runs;
    const Divisor by_width(width > 0 ? width : 1), by_height(height > 0 ? height : 1);
    for (u64 item = grid_thread(); item < items; item += grid_threads()) {
        const u32 position = u32(item / runs), channel = u32(item - u64(position) * runs) * RUN;
        u32 y, x;
        const u32 image = by_height.divide(by_width.divide(position, x), y);
        f(image, y, x, channel, u64(position) * pool.channels + channel);
    }
}

template <u32 RUN, class T>
__device__ __forceinline__ void max_pool(T* output, u32* places, const T* input, const Pool& pool) {
    const Axis &vertical = pool.vertical, &horizontal = pool.horizontal;
    for_each_run<RUN>(pool, vertical.count, horizontal.count, [&](u32 image, u32 y, u32 x, u32 channel, u64 element) {
        u32 top, bottom, left, right;
        vertical.window(y, top, bottom);
        horizontal.window(x, left, right);
        const u64 first = u64(image) * vertical.extent * horizontal.extent;
        float best[RUN];
        Vector < u32, RUN<4 ? RUN : 4> chosen[divide_up(RUN, 4u)];
        for (u32 row = top; row < bottom; ++row) {
            for (u32 column = left; column < right; ++column) {
                const u32 place = row * horizontal.extent + column;
                float values[RUN];
                load_as_float(values, input + (first + place) * pool.channels + channel);
                const bool begin = row == top && column == left;
#pragma unroll
                for (u32 i = 0; i < RUN; ++i) {
                    if (begin || values[i] > best[i] || values[i] != values[i]) {
                        best[i] = values[i];
                        chosen[i / 4][i % 4] = place;
                    }
                }
            }
        }
        store_from_float(output + element, best);
#pragma unroll
        for (u32 i = 0; i < RUN; i += 4) store(places + element + i, chosen[i / 4]);
    });
}

// Only derivatives of derivatives come here: a channel for each thread.
template <class T>
__device__ __forceinline__ void max_pool_gather(T* output, const T* input, const u32* places, const Pool& pool) {
    const Axis &vertical = pool.vertical, &horizontal = pool.horizontal;
    for_each_run<1>(pool, vertical.count, horizontal.count, [&](u32 image, u32, u32, u32 channel, u64 element) {
        const u64 position = u64(image) * vertical.extent * horizontal.extent + places[element];
        output[element] = input[position * pool.channels + channel];
    });
}

template <u32 RUN, class T>
__device__ __forceinline__ void max_pool_scatter(T* output, const T* input, const u32* places, const Pool& pool) {
    const Axis &vertical = pool.vertical, &horizontal = pool.horizontal;
    for_each_run<RUN>(pool, vertical.extent, horizontal.extent, [&](u32 image, u32 y, u32 x, u32 channel, u64 element) {
        u32 top, bottom, left, right;
        vertical.holders(y, top, bottom);
        horizontal.holders(x, left, right);
        const u32 place = y * horizontal.extent + x;
        float sums[RUN] = {};
        for (u32 row = top; row < bottom; ++row) {
            for (u32 column = left; column < right; ++column) {
                const u64 window = (u64(image) * vertical.count + row) * horizontal.count + column;
                const u64 from = window * pool.channels + channel;
                float values[RUN];
                load_as_float(values, input + from);
#pragma unroll
                for (u32 i = 0; i < RUN; i += 4) {
                    constexpr u32 WIDTH = RUN < 4 ? RUN : 4;
                    const Vector<u32, WIDTH> chosen = load<WIDTH>(places + from + i);
#pragma unroll
                    for (u32 j = 0; j < WIDTH; ++j) sums[i + j] += chosen[j] == place ? values[i + j] : 0.0f;
                }
            }
        }
        store_from_float(output + element, sums);
    });
}

#define POOL(instance, T, RUN)                                                                 \
    extern "C" __global__ void __launch_bounds__(256)                                          \
        max_pool_##instance(T* output, u32* places, const T* input, Pool pool) {               \
        max_pool<RUN>(output, places, input, pool);                                            \
    }                                                                                          \
    extern "C" __global__ void __launch_bounds__(256)                                          \
        max_pool_scatter_##instance(T* output, const T* input, const u32* places, Pool pool) { \
        max_pool_scatter<RUN>(output, input, places, pool);                                    \
    }
POOL(f32, f32, 4)
POOL(f32_scalar, f32, 1)
POOL(bf16, bf16, 8)
POOL(bf16_scalar, bf16, 1)
POOL(f16, f16, 8)
POOL(f16_scalar, f16, 1)

#define GATHER(suffix, T)                                                                   \
    extern "C" __global__ void __launch_bounds__(256)                                       \
        max_pool_gather_##suffix(T* output, const T* input, const u32* places, Pool pool) { \
        max_pool_gather(output, input, places, pool);                                       \
    }
FOR_EACH_FLOAT(GATHER)

#define KERNEL_POOL(name) \
    KERNEL_FLOATS(name), KERNEL(name##_f32_scalar), KERNEL(name##_bf16_scalar), KERNEL(name##_f16_scalar)
KERNELS(pool, KERNEL_POOL(max_pool), KERNEL_FLOATS(max_pool_gather), KERNEL_POOL(max_pool_scatter))

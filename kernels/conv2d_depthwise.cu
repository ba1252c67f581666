// Depthwise convolutions of channels-last maps: every channel by itself.
//
//   forward          y(b, o, c) = bias(c) + sum over taps i of x(b, h(o, i), c) w(c, i)
//   input gradient   x(b, h, c) = bias(c) + sum over taps i of y(b, o, c) w(c, i), h(o, i) = h
//   weight gradient  w(c, i) = sum over images b and output positions o of y(b, o, c) x(b, h(o, i), c)
//
// with h(o, i) of common/convolution.cuh, zeros outside of the map. The weight comes packed as (tap, channel).
//
// Tiling: a thread takes RUN neighbouring channels, 16 bytes where their number allows. In the two gathering passes it
// takes one position of the result; neighbouring threads take neighbouring channels, so that every access of a warp is
// contiguous, and what neighbouring windows share comes from the caches. In the weight gradient a block has 32 runs of
// channels, up to 4 neighbouring taps of a line and a share of the positions: 8 lines of threads take every 8th
// position, and are added in order. The parts are written as f32, (part, tap, channel), and `conv2d_sum` adds them in
// order.
// Bytes: maps once from device memory, 2 taps values per element from the caches (weight gradient: 1 + 1/4 per tap).
// FLOPs: 2 taps per element: bound by memory.

#include "common/kernel.cuh"

#include "common/convolution.cuh"

constexpr u32 LANES = 32, LINES = 8;

// Where along one axis a position and a tap meet the source: at (position * scale + offset + tap * step) / by, if that
// is whole and inside.
struct DepthwiseAxis {
    i32 scale, offset, step;
    Divisor by;
    u32 extent;

    __device__ __forceinline__ DepthwiseAxis(const Convolution& c, int axis, bool gradient)
        : scale(gradient ? 1 : i32(c.stride[axis])),
          offset(gradient ? i32(c.padding[axis]) : -i32(c.padding[axis])),
          step(gradient ? -i32(c.dilation[axis]) : i32(c.dilation[axis])),
          by(gradient ? c.stride[axis] : 1),
          extent(gradient ? c.output[axis] : c.input[axis]) {}

    __device__ __forceinline__ bool find(u32 position, u32 tap, u32& source) const {
        const i32 place = i32(position) * scale + offset + i32(tap) * step;
        u32 remainder;
        source = by.divide(u32(place), remainder);
        return place >= 0 && remainder == 0 && source < extent;
    }
};

template <int RUN, class T>
__device__ __forceinline__ void depthwise_gather(T* output, const T* source, const T* weight, const T* bias,
                                                 const Convolution& c, bool gradient) {
    const DepthwiseAxis vertical(c, 0, gradient), horizontal(c, 1, gradient);
    const u32 height = gradient ? c.input[0] : c.output[0], width = gradient ? c.input[1] : c.output[1];
    const u32 channels = c.in_channels, runs = channels / RUN;
    const Divisor by_width(width), by_height(height);
    const u64 items = u64(c.batch) * height * width * runs;
    for (u64 item = grid_thread(); item < items; item += grid_threads()) {
        const u32 position = u32(item / runs), channel = u32(item - u64(position) * runs) * RUN;
        u32 y, x, source_y, source_x;
        const u32 image = by_height.divide(by_width.divide(position, x), y);
        float sums[RUN];
        if (bias != nullptr) {
            load_as_float(sums, bias + channel);
        } else {
#pragma unroll
            for (float& sum : sums) sum = 0;
        }
        for (u32 i = 0; i < c.kernel[0]; ++i) {
            if (!vertical.find(y, i, source_y)) continue;
            const u32 line = (image * vertical.extent + source_y) * horizontal.extent;
            for (u32 j = 0; j < c.kernel[1]; ++j) {
                if (!horizontal.find(x, j, source_x)) continue;
                float values[RUN], factors[RUN];
                load_as_float(values, source + u64(line + source_x) * channels + channel);
                load_as_float(factors, weight + u64(i * c.kernel[1] + j) * channels + channel);
#pragma unroll
                for (int e = 0; e < RUN; ++e) sums[e] = fmaf(values[e], factors[e], sums[e]);
            }
        }
        store_from_float(output + u64(position) * channels + channel, sums);
    }
}

// Blocks count channels fastest, then quads of taps along a line, then lines of taps, then parts.
template <int RUN, class T>
__device__ __forceinline__ void depthwise_weight(float* partial, const T* input, const T* gradient,
                                                 const Convolution& c, u32 part_positions) {
    constexpr u32 TAPS = 4;
    SHARED_ARRAY(float, scratch, [LINES][LANES][RUN]);
    u32 index = blockIdx.x;
    const auto next = [&](u32 extent) {
        const u32 at = index % extent;
        index /= extent;
        return at;
    };
    const u32 channels = c.in_channels, kernel_width = c.kernel[1];
    const u32 channel = (next(divide_up(channels, RUN * LANES)) * LANES + threadIdx.x) * RUN;
    const u32 first_tap = next(divide_up(kernel_width, TAPS)) * TAPS, line_of_taps = next(c.kernel[0]), part = index;
    const u32 positions = c.batch * c.output[0] * c.output[1], first = part * part_positions;
    const u32 end = positions - first < part_positions ? positions : first + part_positions;
    const DepthwiseAxis vertical(c, 0, false), horizontal(c, 1, false);
    const Divisor by_width(c.output[1] > 0 ? c.output[1] : 1), by_height(c.output[0] > 0 ? c.output[0] : 1);

    float sums[TAPS][RUN] = {};
    for (u32 position = first + threadIdx.y; channel < channels && position < end; position += LINES) {
        u32 y, x, source_y, source_x;
        const u32 image = by_height.divide(by_width.divide(position, x), y);
        if (!vertical.find(y, line_of_taps, source_y)) continue;
        const u32 line = (image * c.input[0] + source_y) * c.input[1];
        float gradients[RUN];
        load_as_float(gradients, gradient + u64(position) * channels + channel);
#pragma unroll
        for (u32 tap = 0; tap < TAPS; ++tap) {
            if (first_tap + tap >= kernel_width || !horizontal.find(x, first_tap + tap, source_x)) continue;
            float values[RUN];
            load_as_float(values, input + u64(line + source_x) * channels + channel);
#pragma unroll
            for (int e = 0; e < RUN; ++e) sums[tap][e] = fmaf(values[e], gradients[e], sums[tap][e]);
        }
    }
    float* to = partial + (u64(part) * c.taps() + line_of_taps * kernel_width + first_tap) * channels + channel;
#pragma unroll
    for (u32 tap = 0; tap < TAPS; ++tap) {
        store_from_float(scratch[threadIdx.y][threadIdx.x], sums[tap]);
        __syncthreads();
        if (threadIdx.y == 0 && channel < channels && first_tap + tap < kernel_width) {
#pragma unroll
            for (u32 line = 1; line < LINES; ++line) {
                float others[RUN];
                load_as_float(others, static_cast<const float*>(scratch[line][threadIdx.x]));
#pragma unroll
                for (int e = 0; e < RUN; ++e) sums[tap][e] += others[e];
            }
            store_from_float(to + tap * channels, sums[tap]);
        }
        __syncthreads();
    }
}

#define DEPTHWISE(instance, T, RUN)                                                                          \
    extern "C" __global__ void __launch_bounds__(256) conv2d_depthwise_##instance(                           \
        T* output, const T* source, const T* weight, const T* bias, Convolution convolution, u32 gradient) { \
        depthwise_gather<RUN>(output, source, weight, bias, convolution, gradient != 0);                     \
    }                                                                                                        \
    extern "C" __global__ void __launch_bounds__(LANES* LINES) conv2d_depthwise_weight_##instance(           \
        float* partial, const T* input, const T* gradient, Convolution convolution, u32 part_positions) {    \
        depthwise_weight<RUN>(partial, input, gradient, convolution, part_positions);                        \
    }
DEPTHWISE(f32, f32, 4)
DEPTHWISE(f32_scalar, f32, 1)
DEPTHWISE(bf16, bf16, 8)
DEPTHWISE(bf16_scalar, bf16, 1)
DEPTHWISE(f16, f16, 8)
DEPTHWISE(f16_scalar, f16, 1)

#define KERNEL_DEPTHWISE(name) \
    KERNEL_FLOATS(name), KERNEL(name##_f32_scalar), KERNEL(name##_bf16_scalar), KERNEL(name##_f16_scalar)
KERNELS(conv2d_depthwise, KERNEL_DEPTHWISE(conv2d_depthwise), KERNEL_DEPTHWISE(conv2d_depthwise_weight))

// Convolutions of channels-last maps as matrix products: which input position an output position and a tap of the
// kernel meet in, and the operands that are read by it.
//
// Along one axis, output position o and tap i meet input position
//
//     h = o stride - padding + i dilation,
//
// so the forward pass gathers from h for each o. The input gradient gathers from o for each h, and only taps with
// (h + padding - i dilation) mod stride = 0 have one. Positions h with the same remainder of h + padding by the stride,
// a phase, have the same taps: i, i + p, i + 2p, … with p = stride / gcd(stride, dilation). Within a phase o is an
// affine function of the number of the position and the number of the tap, as h is in the forward pass. No product with
// a zero between strides is ever formed.
#pragma once
#include "common/divisor.cuh"
#include "common/tile.cuh"

// Extents of a convolution. Pairs are (vertical, horizontal). As `shape` in src/ops/conv2d/gpu.rs.
struct Convolution {
    u32 batch, input[2], output[2], in_channels, out_channels, kernel[2], stride[2], padding[2], dilation[2], groups;

    __device__ __forceinline__ u32 taps() const { return kernel[0] * kernel[1]; }
    __device__ __forceinline__ u32 group_inputs() const { return in_channels / groups; }
    __device__ __forceinline__ u32 group_outputs() const { return out_channels / groups; }
};

// One axis of a gathering pass: number n of the positions of a phase, first + n * spacing, reads for its tap number t,
// tap + t * period of the kernel's, the source position n * scale + offset + t * step.
struct GatherAxis {
    u32 first, spacing, positions, tap, period, taps;
    i32 scale, offset, step;
};

__device__ __forceinline__ u32 greatest_common_divisor(u32 a, u32 b) {
    while (b != 0) {
        const u32 remainder = a % b;
        a = b;
        b = remainder;
    }
    return a;
}

// The forward pass: one phase, of all positions and taps.
__device__ __forceinline__ GatherAxis forward_axis(const Convolution& c, int axis) {
    return {
        0, 1, c.output[axis], 0, 1, c.kernel[axis], i32(c.stride[axis]), -i32(c.padding[axis]), i32(c.dilation[axis])};
}

// The phase of the input gradient that begins with position `first`, below the stride and the input's extent.
__device__ __forceinline__ GatherAxis gradient_axis(const Convolution& c, int axis, u32 first) {
    const u32 stride = c.stride[axis], dilation = c.dilation[axis], kernel = c.kernel[axis];
    const u32 period = stride / greatest_common_divisor(stride, dilation);
    const u32 start = first + c.padding[axis], most = period < kernel ? period : kernel;
    u32 tap = 0;
    while (tap < most && (u64(tap) * dilation) % stride != start % stride) ++tap;
    const u32 taps = tap < most ? (kernel - 1 - tap) / period + 1 : 0;
    const i32 offset = taps > 0 ? (i32(start) - i32(tap * dilation)) / i32(stride) : 0;
    return {first, stride, (c.input[axis] - 1 - first) / stride + 1, tap, period, taps,
            1,     offset, -i32(period * dilation / stride)};
}

// Elements of a line of `channels` in a map or weight whose groups begin at multiples of `run` elements.
__device__ __forceinline__ u32 padded(u32 channels, u32 run) { return divide_up(channels, run) * run; }

// Both axes of a gathering pass.
struct Gather {
    GatherAxis y, x;
    u32 channels;  // of the source, of one group
    Divisor by_channels, by_taps, by_width, by_height;

    __device__ __forceinline__ Gather(const GatherAxis& vertical, const GatherAxis& horizontal, u32 source_channels)
        : y(vertical),
          x(horizontal),
          channels(source_channels),
          by_channels(source_channels),
          by_taps(x.taps > 0 ? x.taps : 1),
          by_width(x.positions > 0 ? x.positions : 1),
          by_height(y.positions > 0 ? y.positions : 1) {}

    // Terms of each sum.
    __device__ __forceinline__ u32 depth() const { return y.taps * x.taps * channels; }

    // The image of a row, and its position in the phase.
    __device__ __forceinline__ u32 position(u32 row, u32& py, u32& px) const {
        return by_height.divide(by_width.divide(row, px), py);
    }

    // The taps of a term, and its channel.
    __device__ __forceinline__ void term(u32 k, u32& ty, u32& tx, u32& channel) const {
        ty = by_taps.divide(by_channels.divide(k, channel), tx);
    }
};

// Where the patch of a row begins: the source's lines before its image, and the source position that offset 0 is.
struct alignas(16) Anchor {
    u32 lines;
    i32 y, x;
    u32 target;  // the position of the result, over all images
};

// Farther outside of a map than taps reach back: no map has positions from 2^30 on.
constexpr i32 NOWHERE = -(1 << 30);

// The channels-last map that a gathering pass reads, from the group's first channel on.
template <class T> struct Map {
    const T* data;
    u32 height, width, stride;  // elements from a position to the next

    // The channels at a position, or nothing outside of the map.
    __device__ __forceinline__ Run<T> at(u32 lines, i32 y, i32 x, u32 channel, u32 channels) const {
        if (u32(y) >= height || u32(x) >= width) return {data, 0};
        return {data + u64((lines + u32(y)) * width + u32(x)) * stride + channel, channels - channel};
    }
};

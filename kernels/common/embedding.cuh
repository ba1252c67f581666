// Cross-scale embeddings as matrix products: which pixels the windows of an output position hold, and which outputs'
// windows hold a pixel.
//
// Window i has `side` s_i = stride + 2 padding_i pixels a side. Along one axis its tap t of output o lies on pixel
//
//     h = o stride - padding + t.
//
// Pixels of one channels-last row are contiguous, so a row of a window, s_i C elements, is one run of memory. Terms of
// the forward pass are therefore ordered (ty, tx, channel), and its divisions concern rows of windows, not channels.
// The pixels with equal h mod stride, a phase, have the same taps t = (h + padding) mod stride + m stride, m = 0, 1, …,
// of the outputs o = (h + padding) / stride - m: the input gradient gathers over m, and no product is with a zero.
#pragma once
#include "common/divisor.cuh"
#include "common/tile.cuh"

constexpr u32 MOST_KERNELS = 16;

// A tensor of each kernel.
template <class T> struct PerKernel {
    T* tensors[MOST_KERNELS];

    // Chosen by comparisons: pointers among the parameters that are indexed would first be copied to the stack.
    __device__ __forceinline__ T* operator[](u32 kernel) const {
        T* tensor = tensors[0];
#pragma unroll
        for (u32 i = 1; i < MOST_KERNELS; ++i) tensor = kernel == i ? tensors[i] : tensor;
        return tensor;
    }
};

// One of an embedding's convolutions.
struct Scale {
    u32 number, side, out, first, padding;
    u32 depth;   // terms of each sum
    u32 pitch;   // elements from an output channel's packed weight to the next
    u64 packed;  // elements before its packed weight
};

// Extents of an embedding; the kernels are ordered from the largest to the smallest, so that long work starts first.
// As `description` in src/ops/cross_scale_embedding/gpu.rs.
struct Embedding {
    u32 batch, height, width, channels, stride, out_channels, kernels;
    u32 sides[MOST_KERNELS], outs[MOST_KERNELS];
    u32 firsts[MOST_KERNELS];  // first output channel

    __device__ __forceinline__ u32 rows() const { return height / stride; }
    __device__ __forceinline__ u32 columns() const { return width / stride; }
    __device__ __forceinline__ u32 positions() const { return batch * rows() * columns(); }
    __device__ __forceinline__ u32 depth(u32 kernel) const { return sides[kernel] * sides[kernel] * channels; }
    // Rows of packed weights begin at 16 bytes.
    __device__ __forceinline__ u32 pitch(u32 kernel) const { return divide_up(depth(kernel), 8u) * 8; }

    // Elements of the packed weights of the first `count` kernels.
    __device__ __forceinline__ u64 packed(u32 count) const {
        u64 elements = 0;
        for (u32 i = 0; i < count; ++i) elements += u64(outs[i]) * pitch(i);
        return elements;
    }

    __device__ __forceinline__ Scale scale(u32 i) const {
        return {i, sides[i], outs[i], firsts[i], (sides[i] - stride) / 2, depth(i), pitch(i), packed(i)};
    }

    // The kernel that piece `piece` of all kernels' work belongs to, where kernel i has `pieces(i)` of them; `piece`
    // becomes its number among those. The number of kernels where there are fewer pieces.
    template <class Pieces> __device__ __forceinline__ u32 find(u32& piece, Pieces pieces) const {
        u32 i = 0;
        for (; i < kernels; ++i) {
            const u32 count = pieces(i);
            if (piece < count) break;
            piece -= count;
        }
        return i;
    }
};

// The taps of one axis of a phase.
struct PhaseAxis {
    u32 tap, taps;  // the first, and how many there are
    u32 output;     // which output the phase's first pixel meets in the first tap

    __device__ __forceinline__ PhaseAxis(u32 phase, u32 stride, const Scale& scale)
        : tap((phase + scale.padding) % stride),
          taps(divide_up(scale.side - tap, stride)),
          output((phase + scale.padding) / stride) {}
};

// Terms (tap of the phase, output channel) of one kernel's share of the input gradient.
struct PhaseTerms {
    PhaseAxis y, x;
    u32 depth;
    Divisor by_out, by_taps;

    __device__ __forceinline__ PhaseTerms(const PhaseAxis& y, const PhaseAxis& x, u32 out)
        : y(y), x(x), depth(y.taps * x.taps * out), by_out(out > 0 ? out : 1), by_taps(x.taps) {}

    __device__ __forceinline__ void term(u32 k, u32& ty, u32& tx, u32& channel) const {
        ty = by_taps.divide(by_out.divide(k, channel), tx);
    }
};

// Output gradients as the matrix (pixel of the phase, term). RUN divides every kernel's number of channels.
template <class T, u32 RUN_> struct GradientsByPixel {
    using Element = T;
    static constexpr bool ALONG_K = true;
    static constexpr u32 RUN = RUN_;

    const PhaseTerms& terms;
    const T* gradient;  // from the kernel's first channel on
    u32 pixels, rows, columns, out_channels;
    Divisor by_width, by_height;

    __device__ __forceinline__ Run<T> operator()(u32 pixel, u32 k) const {
        u32 px, py, ty, tx, channel;
        const u32 image = by_height.divide(by_width.divide(pixel, px), py);
        terms.term(k, ty, tx, channel);
        // Above and left of the map these wrap around, to beyond its end.
        const u32 y = terms.y.output + py - ty, x = terms.x.output + px - tx;
        if (pixel >= pixels || k >= terms.depth || y >= rows || x >= columns) return {gradient, 0};
        return {gradient + ((u64(image) * rows + y) * columns + x) * out_channels + channel, RUN};
    }
};

// The packed weight as the matrix (input channel, term). RUN divides the number of input channels.
template <class T, u32 RUN_> struct WeightByChannel {
    using Element = T;
    static constexpr bool ALONG_K = false;
    static constexpr u32 RUN = RUN_;

    const PhaseTerms& terms;
    const T* packed;  // the kernel's
    u32 channels, side, stride, pitch;

    __device__ __forceinline__ Run<T> operator()(u32 channel, u32 k) const {
        u32 ty, tx, out;
        terms.term(k, ty, tx, out);
        if (channel >= channels || k >= terms.depth) return {packed, 0};
        const u32 tap = (terms.y.tap + ty * stride) * side + terms.x.tap + tx * stride;
        return {packed + u64(out) * pitch + u64(tap) * channels + channel, RUN};
    }
};

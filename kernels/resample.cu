// Interpolation and average pooling: maps resampled along each axis by itself, and their transposes.
//
//   y[b, p, q, c] = sum over i, j of V(p, i) H(q, j) x[b, i, j, c]
//
// V and H are sparse matrices. Their entries follow from a rule in integers, so that nothing is read but the map:
//   nearest:   1 at i = floor(o I / O), for an output extent O and an input extent I
//   linear, cubic:  around the place a of output o among the inputs, ((2 o + 1) I - O) / (2 O), or o (I - 1) / (O - 1)
//              with aligned corners: whole and remainder of an integer division; positions beyond the border repeat it
//   windows:   1 / (positions that count) for each position of window o, which begins at o stride - padding
//   adaptive:  the same for the window from floor(o I / O) to ceil((o + 1) I / O)
// The transpose gathers, too: input i is read by few outputs next to each other, whose range the rule gives as well.
//
// Tiling: a thread for 16 bytes of channels of an output pixel, or for one value where the channels are no multiple of
// that; the grid strides over what is left. Neighbouring pixels read the same lines from the caches.
// Bytes: the map once in, once out. FLOPs: 2 per value and entry, up to 4 x 4 entries for cubic interpolation.

#include "common/kernel.cuh"

#include "common/index.cuh"
#include "common/vector.cuh"

namespace {

constexpr u32 THREADS = 256;

// As `Rule` in src/ops/resample/gpu.rs.
enum Kind : u32 { NEAREST, LINEAR, CUBIC, WINDOWS, ADAPTIVE };

// One axis, from `input` to `output` positions, fewer than 2^30; where `transposed`, the map is read along the outputs.
struct Axis {
    u32 kind, input, output, transposed;
    u32 align_corners;                         // of LINEAR and CUBIC
    u32 kernel, stride, padding, include_pad;  // of WINDOWS

    __device__ __forceinline__ u32 extent() const { return transposed ? input : output; }
    __device__ __forceinline__ u32 read_extent() const { return transposed ? output : input; }
};

// Positions from `first` on.
struct Range {
    u32 first, count;
};

// What an output position reads: the positions around `whole`, by the `fraction` beyond it; of averages, those from
// `whole` up to `end`, each with the weight `fraction`.
struct Place {
    i32 whole;
    float fraction;
    i32 end;
};

__device__ __forceinline__ u32 clamp(i32 position, u32 extent) {
    return position < 0 ? 0 : position < i32(extent) ? position : extent - 1;
}

// Both ends included, and moved onto the axis.
__device__ __forceinline__ Range between(i32 first, i32 last, u32 extent) {
    const u32 low = clamp(first, extent);
    return {low, clamp(last, extent) - low + 1};
}

__device__ inline Place average(u64 begin, u64 end, u64 counted) {
    return {i32(begin), 1.0f / float(counted), i32(end)};
}

__device__ inline Place window(const Axis& axis, u64 o) {
    const u64 padding = axis.padding, begin = o * axis.stride;
    const u64 padded = axis.input + 2 * padding;
    const u64 end = begin + axis.kernel < padded ? begin + axis.kernel : padded;
    const u64 inside_begin = (begin > padding ? begin : padding) - padding;
    const u64 unbounded = (end > padding ? end : padding) - padding;
    const u64 inside_end = unbounded < axis.input ? unbounded : axis.input;
    return average(inside_begin, inside_end, axis.include_pad ? end - begin : inside_end - inside_begin);
}

// For LINEAR and CUBIC. One input position is added before the division, and taken away after: places begin at -1/2.
__device__ inline Place between_pixels(const Axis& axis, u64 o) {
    const u64 input = axis.input, output = axis.output;
    u64 numerator = (2 * o + 1) * input + output, denominator = 2 * output;
    if (axis.align_corners) {
        denominator = output > 1 ? output - 1 : 1;
        numerator = (output > 1 ? o * (input - 1) : 0) + denominator;
    }
    const u64 quotient = numerator / denominator;
    const Place place{i32(quotient) - 1, float(numerator - quotient * denominator) / float(denominator), 0};
    return axis.kind == LINEAR && place.whole < 0 ? Place{0, 0.0f, 0} : place;
}

__device__ inline Place place_of(const Axis& axis, u32 o) {
    const u64 input = axis.input, output = axis.output;
    switch (axis.kind) {
        case NEAREST:
            return {i32(o * input / output), 1.0f, 0};
        case WINDOWS:
            return window(axis, o);
        case ADAPTIVE: {
            const u64 begin = o * input / output, end = divide_up((u64(o) + 1) * input, output);
            return average(begin, end, end - begin);
        }
        default:
            return between_pixels(axis, o);
    }
}

// Cubic convolution with a = -3/4 at distance x (Keys 1981, equation 4).
__device__ inline float cubic(float x) {
    constexpr float A = -0.75f;
    x = fabsf(x);
    if (x <= 1) return ((A + 2) * x - (A + 3)) * x * x + 1;
    return x < 2 ? ((A * x - 5 * A) * x + 8 * A) * x - 4 * A : 0;
}

// The entry of input i for the output at `place`. Taps that meet at the border are added before they are multiplied.
__device__ inline float weight(const Axis& axis, const Place& place, u32 i) {
    float sum = 0;
    switch (axis.kind) {
        case NEAREST:
            return u32(place.whole) == i ? 1.0f : 0.0f;
        case LINEAR:
            if (clamp(place.whole, axis.input) == i) sum += 1 - place.fraction;
            if (clamp(place.whole + 1, axis.input) == i) sum += place.fraction;
            return sum;
        case CUBIC:
#pragma unroll
            for (int tap = -1; tap <= 2; ++tap) {
                if (clamp(place.whole + tap, axis.input) == i) sum += cubic(place.fraction - float(tap));
            }
            return sum;
        default:
            return i32(i) >= place.whole && i32(i) < place.end ? place.fraction : 0.0f;
    }
}

// The inputs that the output at `place` may read.
__device__ inline Range inputs_of(const Axis& axis, const Place& place) {
    switch (axis.kind) {
        case NEAREST:
            return {u32(place.whole), 1};
        case LINEAR:
            return between(place.whole, place.whole + 1, axis.input);
        case CUBIC:
            return between(place.whole - 1, place.whole + 2, axis.input);
        default:
            return {u32(place.whole), place.end > place.whole ? u32(place.end - place.whole) : 0};
    }
}

// Outputs whose place is less than `reach` from input i.
__device__ inline Range outputs_around(const Axis& axis, i64 i, i64 reach) {
    i64 per_input = 2 * i64(axis.output), per_output = 2 * i64(axis.input), shift = i64(axis.output) - axis.input;
    if (axis.align_corners) {
        if (axis.input == 1 || axis.output == 1) return {0, axis.output};
        per_input = i64(axis.output) - 1, per_output = i64(axis.input) - 1, shift = 0;
    }
    // Output o is at (o per_output - shift) / per_input.
    const i64 low = (i - reach) * per_input + shift, high = (i + reach) * per_input + shift;
    const u64 last = u64(high < 0 ? 0 : high) / u64(per_output);
    return between(low < 0 ? 0 : i32(u64(low) / u64(per_output)) + 1, i32(last < axis.output ? last : axis.output),
                   axis.output);
}

// The outputs that may read input i.
__device__ inline Range outputs_of(const Axis& axis, u64 i) {
    const u64 input = axis.input, output = axis.output;
    switch (axis.kind) {
        case LINEAR:
            return outputs_around(axis, i64(i), 1);
        case CUBIC:
            return outputs_around(axis, i64(i), 2);
        case NEAREST: {
            const u64 first = divide_up(i * output, input);
            return {u32(first), u32(divide_up((i + 1) * output, input) - first)};
        }
        case WINDOWS: {
            const u64 at = i + axis.padding, last = at / axis.stride;
            const u64 first = at < axis.kernel ? 0 : (at - axis.kernel) / axis.stride + 1;
            const u64 end = last + 1 < output ? last + 1 : output;
            return {u32(first), first < end ? u32(end - first) : 0};
        }
        default: {
            const u64 first = i * output / input;
            return {u32(first), u32(((i + 1) * output - 1) / input - first + 1)};
        }
    }
}

// What one position of the result reads along an axis.
struct Reads {
    const Axis& axis;
    u32 position;
    Place place;
    Range range;

    __device__ __forceinline__ Reads(const Axis& axis, u32 position)
        : axis(axis),
          position(position),
          place(axis.transposed ? Place{} : place_of(axis, position)),
          range(axis.transposed ? outputs_of(axis, position) : inputs_of(axis, place)) {}

    __device__ __forceinline__ float weight_of(u32 other) const {
        return axis.transposed ? weight(axis, place_of(axis, other), position) : weight(axis, place, other);
    }
};

// N values of one pixel for each thread. Entries of 0 are not read: what they would meet may be infinite.
template <int N, class T>
__device__ void resample(T* output, const T* input, u64 batch, u64 channels, const Axis& vertical,
                         const Axis& horizontal) {
    const u64 groups = channels / N, columns = horizontal.extent(), lines = vertical.extent();
    for (u64 at = grid_thread(); at < batch * lines * columns * groups; at += grid_threads()) {
        const u64 pixel = at / groups, line = pixel / columns, image = line / lines;
        const Reads down(vertical, u32(line - image * lines)), across(horizontal, u32(pixel - line * columns));
        const T* source =
            input + image * vertical.read_extent() * horizontal.read_extent() * channels + (at - pixel * groups) * N;
        float sums[N] = {};
        for (u32 y = down.range.first; y < down.range.first + down.range.count; ++y) {
            const float line_weight = down.weight_of(y);
            if (line_weight == 0) continue;
            for (u32 x = across.range.first; x < across.range.first + across.range.count; ++x) {
                const float pixel_weight = line_weight * across.weight_of(x);
                if (pixel_weight == 0) continue;
                float values[N];
                load_as_float(values, source + (u64(y) * horizontal.read_extent() + x) * channels);
#pragma unroll
                for (int i = 0; i < N; ++i) sums[i] += pixel_weight * values[i];
            }
        }
        store_from_float(output + at * N, sums);
    }
}

}  // namespace

// Two blocks for each multiprocessor: with more, registers would not last over the divisions of 64 bits.
#define INSTANCE(suffix, T)                                                                                     \
    extern "C" __global__ void __launch_bounds__(THREADS, 2)                                                    \
        resample_##suffix(T* output, const T* input, u64 batch, u64 channels, Axis vertical, Axis horizontal) { \
        if (channels % WIDEST<T> == 0) {                                                                        \
            resample<WIDEST<T>>(output, input, batch, channels, vertical, horizontal);                          \
        } else {                                                                                                \
            resample<1>(output, input, batch, channels, vertical, horizontal);                                  \
        }                                                                                                       \
    }
FOR_EACH_FLOAT(INSTANCE)

KERNELS(resample, KERNEL_FLOATS(resample))

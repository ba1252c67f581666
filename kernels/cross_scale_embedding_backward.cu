// Cross-scale embedding, gradient of the input. With windows and phases as in common/embedding.cuh and dy the output's
// gradient:
//
//   dx(b, h, c) = sum over kernels i, taps t of h's phase and channels f of dy(b, o_i(h, t), first_i + f) w_i(f, c, t)
//
// Images as they are stored are written as normalised channels-last pixels for the weights' gradient
// (cross_scale_embedding_weight.cu); the input's is scaled and placed as they are.
//
// Tiling: a block for 128 pixels of a phase by the columns of a tile of input channels, the kernels one after the other
// in the same sums. RUN divides what both operands are read along. 3 input channels fill 3 of 32 columns: a stem's
// images rarely need a gradient. One launch for all kernels. FLOPs: those of the forward pass.
// Bytes from device memory: dy, the weights and dx once.
//
// tensor cores: cross_scale_embedding_input_gradient_bf16, cross_scale_embedding_input_gradient_f16

#include "common/kernel.cuh"

#include "common/embedding_tile.cuh"
#include "common/gemm.cuh"

// Every kernel's weight (out, channel, ty, tx) as (out, ty, tx, channel). A kernel for each blockIdx.y.
template <class T>
__device__ void turn_weights(T* turned, const PerKernel<const T>& weights, const Embedding& e) {
    const Scale scale = e.scale(blockIdx.y);
    const T* weight = weights[blockIdx.y];
    const u32 taps = scale.side * scale.side;
    turned += scale.packed;
    for (u64 i = grid_thread(); i < u64(scale.out) * scale.depth; i += grid_threads()) {
        const u32 out = u32(i / scale.depth), term = u32(i % scale.depth);
        const u32 tap = term / e.channels, channel = term % e.channels;
        turned[u64(out) * scale.pitch + term] = weight[(u64(out) * e.channels + channel) * taps + tap];
    }
}

// The pixels' values, channels last.
template <class T>
__device__ void normalise(T* values, const void* input, const Embedding& e, const Pixels& p) {
    const u64 elements = u64(e.batch) * e.height * e.width * e.channels;
    for (u64 i = grid_thread(); i < elements; i += grid_threads()) {
        const u64 pixel = i / e.channels, line = pixel / e.width;
        values[i] = from_float<T>(pixel_value<T>(input, e, p, u32(line / e.height), u32(line % e.height),
                                                 u32(pixel % e.width), u32(i % e.channels)));
    }
}

// Blocks count column tiles fastest, then row tiles (as many as the first phase has), then phases.
template <class Tile, class T, u32 RUN>
__device__ __forceinline__ void input_gradient(T* input_gradient, const T* gradient, const T* packed,
                                               const Embedding& e, const Pixels& p, void* shared) {
    u32 index = blockIdx.x;
    const auto next = [&](u32 extent) {
        const u32 at = index % extent;
        index /= extent;
        return at;
    };
    const u32 column = next(divide_up(e.channels, Tile::N)) * Tile::N;
    const u32 most = e.batch * divide_up(e.height, e.stride) * divide_up(e.width, e.stride);
    const u32 row = next(divide_up(most, Tile::M)) * Tile::M;
    const u32 phase_x = next(e.stride), phase_y = index;
    const u32 height = divide_up(e.height - phase_y, e.stride), width = divide_up(e.width - phase_x, e.stride);
    const u32 pixels = e.batch * height * width;
    if (row >= pixels) return;

    const Divisor by_width(width), by_height(height);
    Tile tile;
    tile.clear();
#pragma unroll 1
    for (u32 i = 0; i < e.kernels; ++i) {
        const Scale scale = e.scale(i);
        const PhaseTerms terms({phase_y, e.stride, scale}, {phase_x, e.stride, scale}, scale.out);
        const GradientsByPixel<T, RUN> gradients{terms,       gradient + scale.first, pixels,   e.rows(),
                                                 e.columns(), e.out_channels,         by_width, by_height};
        const WeightByChannel<T, RUN == WIDEST<T> ? RUN : 1> weight{
            terms, packed + scale.packed, e.channels, scale.side, e.stride, scale.pitch};
        tile.accumulate(gradients, weight, row, column, 0, terms.depth, shared);
    }

    const bool aligned = e.channels % 2 == 0 && !p.channels_first;
    const u64 plane = p.plane(e);
    tile.for_each_pair(row, column, [&](u32 pixel, u32 channel, float first, float second) {
        if (pixel >= pixels || channel >= e.channels) return;
        u32 px, py;
        const u32 image = by_height.divide(by_width.divide(pixel, px), py);
        const u32 y = phase_y + py * e.stride, x = phase_x + px * e.stride;
        T* to = input_gradient + p.place(e, image, y, x, 0) + channel * plane;
        const bool both = channel + 1 < e.channels;
        const float pair[2] = {p.scaled ? first * p.scale[channel] : first,
                               p.scaled && both ? second * p.scale[channel + 1] : second};
        if (aligned) {
            store_from_float(to, pair);
        } else {
            to[0] = from_float<T>(pair[0]);
            if (both) to[plane] = from_float<T>(pair[1]);
        }
    });
}

#define ELEMENTWISE(suffix, T)                                                                                       \
    extern "C" __global__ void __launch_bounds__(256)                                                                \
        cross_scale_embedding_turn_weights_##suffix(T* turned, PerKernel<const T> weights, Embedding embedding) {    \
        turn_weights<T>(turned, weights, embedding);                                                                 \
    }                                                                                                                \
    extern "C" __global__ void __launch_bounds__(256)                                                                \
        cross_scale_embedding_normalise_##suffix(T* values, const void* input, Embedding embedding, Pixels pixels) { \
        normalise<T>(values, input, embedding, pixels);                                                              \
    }
FOR_EACH_FLOAT(ELEMENTWISE)

// Columns of a tile as in src/ops/cross_scale_embedding/gpu.rs.
#define INPUT_GRADIENT(instance, T, RUN, ...)                                                             \
    extern "C" __global__ void __launch_bounds__(128, 2) cross_scale_embedding_input_gradient_##instance( \
        T* gradient_of_input, const T* gradient, const T* packed, Embedding embedding, Pixels pixels) {   \
        using Tile = __VA_ARGS__;                                                                         \
        static_assert(Tile::THREADS == 128 && Tile::M == 128);                                            \
        SHARED_ARRAY_ALIGNED(128, unsigned char, shared, [Tile::SHARED_BYTES]);                           \
        input_gradient<Tile, T, RUN>(gradient_of_input, gradient, packed, embedding, pixels, shared);     \
    }
#define HALF(suffix, T)                                                        \
    INPUT_GRADIENT(suffix##_vector, T, 8, TensorTile<T, 128, 64, 32, 2, 2, 3>) \
    INPUT_GRADIENT(suffix##_scalar, T, 1, TensorTile<T, 128, 32, 32, 4, 1, 3>)
INPUT_GRADIENT(f32, float, 1, SimtTile<128, 32, 8, 8, 4, 4>)
HALF(bf16, bf16)
HALF(f16, f16)

KERNELS(cross_scale_embedding_backward, KERNEL_FLOATS(cross_scale_embedding_turn_weights),
        KERNEL_FLOATS(cross_scale_embedding_normalise), KERNEL(cross_scale_embedding_input_gradient_f32),
        KERNEL(cross_scale_embedding_input_gradient_bf16_vector),
        KERNEL(cross_scale_embedding_input_gradient_bf16_scalar),
        KERNEL(cross_scale_embedding_input_gradient_f16_vector),
        KERNEL(cross_scale_embedding_input_gradient_f16_scalar))

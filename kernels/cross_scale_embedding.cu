// Cross-scale embedding, forward: convolutions of one stride with concentric windows, side by side in the channels.
//
//   y(b, o, first_i + f) = bias_i(f) + sum over taps t of kernel i and channels c of x(b, h_i(o, t), c) w_i(f, c, t)
//
// with h_i of common/embedding.cuh and zeros outside of the map. One launch for all kernels: an implicit matrix product
// (position, term) by (term, channel) for each, windows read where they lie in the image, the weight packed beforehand as
// (channel, ty, tx, c), so that terms follow each other in memory in both operands.
//
// Tiling: a block of 4 warps for 128 positions by the columns of a tile and all terms of one kernel:
//   vector  64 columns, 32 terms at a time, operands in runs of 16 bytes (merging: 96 channels and more)
//   pair    32 columns, 32 terms, windows in runs of 4 bytes (a stem of 3 channels)
//   scalar  the same element by element: whatever the extents
//   f32     32 columns, 8 terms, by fused multiply-adds
// bf16 and f16 run on tensor cores. A stem of kernels 4, 8, 16, 32 with 48, 24, 12, 12 channels fills 48, 24, 12, 12 of
// 64, 32, 32, 32 columns: 40 % of the products are useful.
// FLOPs: 2 positions sum_i s_i^2 C out_i: 106 kFLOP for each position of that stem.
// Bytes from device memory: the image, the weights and the result once; from the caches every window of every tile.
//
// tensor cores: cross_scale_embedding_forward_bf16, cross_scale_embedding_forward_f16

#include "common/kernel.cuh"

#include "common/embedding.cuh"
#include "common/gemm.cuh"

// Packs every kernel's weight (out, channel, ty, tx) as (out, ty, tx, channel). A kernel for each blockIdx.y.
template <class T>
__device__ void pack_weights(T* packed, const PerKernel<const T>& weights, const Embedding& e) {
    const Scale scale = e.scale(blockIdx.y);
    const T* weight = weights[blockIdx.y];
    const u32 taps = scale.side * scale.side;
    packed += scale.packed;
    for (u64 i = grid_thread(); i < u64(scale.out) * scale.depth; i += grid_threads()) {
        const u32 out = u32(i / scale.depth), term = u32(i % scale.depth);
        const u32 tap = term / e.channels, channel = term % e.channels;
        packed[u64(out) * scale.pitch + term] = weight[(u64(out) * e.channels + channel) * taps + tap];
    }
}

template <class Tile, class T, u32 RUN>
__device__ __forceinline__ void forward(T* output, const T* input, const T* packed, const PerKernel<const T>& biases,
                                        const Embedding& e, void* shared) {
    u32 column = blockIdx.y;
    const u32 number = e.find(column, [&](u32 i) { return divide_up(e.outs[i], Tile::N); });
    const Scale scale = e.scale(number);
    const u32 row = blockIdx.x * Tile::M;
    column *= Tile::N;

    const Windows<T, RUN> windows(input, e, scale);
    const MatrixSource<T, true, WIDEST<T>> weight{packed + scale.packed, scale.out, scale.depth, scale.pitch};
    Tile tile;
    tile.clear();
    tile.accumulate(windows, weight, row, column, 0, scale.depth, shared);

    const T* bias = biases[number];
    const bool aligned = scale.first % 2 == 0 && e.out_channels % 2 == 0;
    tile.for_each_pair(row, column, [&](u32 position, u32 out, float first, float second) {
        if (position >= windows.positions || out >= scale.out) return;
        const bool both = out + 1 < scale.out;
        const float pair[2] = {first + to_float(bias[out]), both ? second + to_float(bias[out + 1]) : 0};
        T* to = output + u64(position) * e.out_channels + scale.first + out;
        if (aligned) {
            store_from_float_tail(to, pair, both ? 2 : 1);
        } else {
            to[0] = from_float<T>(pair[0]);
            if (both) to[1] = from_float<T>(pair[1]);
        }
    });
}

#define PACK(suffix, T)                                                                                   \
    extern "C" __global__ void __launch_bounds__(256)                                                     \
        cross_scale_embedding_pack_##suffix(T* packed, PerKernel<const T> weights, Embedding embedding) { \
        pack_weights<T>(packed, weights, embedding);                                                      \
    }
FOR_EACH_FLOAT(PACK)

// Columns of a tile as in src/ops/cross_scale_embedding/gpu.rs.
#define FORWARD(instance, T, RUN, ...)                                                                \
    extern "C" __global__ void __launch_bounds__(128, 2) cross_scale_embedding_forward_##instance(    \
        T* output, const T* input, const T* packed, PerKernel<const T> biases, Embedding embedding) { \
        using Tile = __VA_ARGS__;                                                                     \
        static_assert(Tile::THREADS == 128 && Tile::M == 128);                                        \
        SHARED_ARRAY_ALIGNED(128, unsigned char, shared, [Tile::SHARED_BYTES]);                       \
        forward<Tile, T, RUN>(output, input, packed, biases, embedding, shared);                      \
    }
#define FORWARD_HALF(suffix, T)                                         \
    FORWARD(suffix##_vector, T, 8, TensorTile<T, 128, 64, 32, 2, 2, 3>) \
    FORWARD(suffix##_pair, T, 2, TensorTile<T, 128, 32, 32, 4, 1, 3>)   \
    FORWARD(suffix##_scalar, T, 1, TensorTile<T, 128, 32, 32, 4, 1, 3>)
FORWARD(f32, float, 1, SimtTile<128, 32, 8, 8, 4, 4>)
FORWARD_HALF(bf16, bf16)
FORWARD_HALF(f16, f16)

#define KERNEL_RUNS(name) KERNEL(name##_vector), KERNEL(name##_pair), KERNEL(name##_scalar)
KERNELS(cross_scale_embedding, KERNEL_FLOATS(cross_scale_embedding_pack), KERNEL(cross_scale_embedding_forward_f32),
        KERNEL_RUNS(cross_scale_embedding_forward_bf16), KERNEL_RUNS(cross_scale_embedding_forward_f16))

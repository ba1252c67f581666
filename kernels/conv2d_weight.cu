// The weight gradient of convolutions of channels-last maps, and the small kernels around their weights.
//
//   w(f, c, i) = sum over images b and output positions o of y(b, o, f) x(b, h(o, i), c)
//
// with h(o, i) of common/convolution.cuh. A matrix product: rows are features f, columns (tap, channel), terms
// positions (b, o). Channels-last maps lie along rows and columns of it, so both operands are read across terms.
//
// Tiling: a block computes a tile of one group over a share of the terms, and writes it as partial sums in f32, (part,
// feature, tap, channel). `conv2d_sum` adds the parts in order and turns them to (feature, channel, tap). bf16 and f16
// on tensor cores, 64 by 128 sums of a block, 32 terms at a time in 3 stages; f32 by fused multiply-adds, 64 by 64
// sums, 16 terms at a time.
// Bytes: a step over the tile's terms reads (rows + columns) terms; the partial sums are written and read once.
// FLOPs: 2 rows columns terms.
//
// Along y the grid counts models: tensors with a leading model axis, whose partial sums are (part, model, …). A part has
// the same number of positions for every model, so that positions of zeros behind a model's own change no bit of it.
//
// tensor cores: conv2d_weight_bf16, conv2d_weight_f16

#include "common/kernel.cuh"

#include "common/convolution.cuh"
#include "common/gemm.cuh"

// The patches (term, position): here lines are the terms of the forward pass, and k counts its rows.
template <class T, u32 RUN_> struct PatchesAcross {
    using Element = T;
    static constexpr bool ALONG_K = false;
    static constexpr u32 RUN = RUN_;

    const Gather& gather;
    Map<T> map;
    u32 columns, positions;

    __device__ __forceinline__ Run<T> operator()(u32 column, u32 position) const {
        u32 py, px, ty, tx, channel;
        const u32 image = gather.position(position, py, px);
        gather.term(column, ty, tx, channel);
        const i32 y = i32(py) * gather.y.scale + gather.y.offset + i32(ty) * gather.y.step;
        const i32 x = i32(px) * gather.x.scale + gather.x.offset + i32(tx) * gather.x.step;
        if (column >= columns || position >= positions) return {map.data, 0};
        return map.at(image * map.height, y, x, channel, gather.channels);
    }
};

// Blocks count row tiles fastest, then column tiles, then groups, then parts. A part is `part_positions` positions.
template <class Tile, class T, u32 RUN>
__device__ __forceinline__ void weight_gradient(float* partial, const T* input, const T* gradient, const Convolution& c,
                                                u32 part_positions, void* shared) {
    const u32 features = padded(c.group_outputs(), RUN), channels = padded(c.group_inputs(), RUN);
    u32 index = blockIdx.x;
    const auto next = [&](u32 extent) {
        const u32 at = index % extent;
        index /= extent;
        return at;
    };
    const Gather gather(forward_axis(c, 0), forward_axis(c, 1), channels);
    const u32 columns = gather.depth(), positions = c.batch * c.output[0] * c.output[1];
    const u32 row = next(divide_up(features, Tile::M)) * Tile::M;
    const u32 column = next(divide_up(columns, Tile::N)) * Tile::N;
    const u32 group = next(c.groups), part = index;
    const u32 first = part * part_positions;
    const u32 end = positions - first < part_positions ? positions : first + part_positions;
    const u32 model = blockIdx.y;
    input += model * (u64(c.batch) * c.input[0] * c.input[1] * channels * c.groups);
    gradient += model * (u64(positions) * features * c.groups);

    const MatrixSource<T, false, RUN> outputs{gradient + group * features, features, positions, features * c.groups};
    const Map<T> map{input + group * channels, c.input[0], c.input[1], channels * c.groups};
    const PatchesAcross<T, RUN> patches{gather, map, columns, positions};
    Tile tile;
    tile.clear();
    tile.accumulate(outputs, patches, row, column, first, end, shared);

    // Features and channels that are padding are left out when the parts are added.
    float* sums = partial + ((u64(part) * gridDim.y + model) * c.groups + group) * features * columns;
    tile.for_each_pair(row, column, [&](u32 row, u32 column, float first, float second) {
        if (row >= features || column >= columns) return;
        const float pair[2] = {first, second};  // the number of columns is a multiple of RUN
        store_from_float(sums + u64(row) * columns + column, pair);
    });
}

// Rows, columns and terms as in `WEIGHT_TILES` of src/ops/conv2d/gpu.rs.
#define WEIGHT(instance, T, RUN, threads, ...)                                                            \
    extern "C" __global__ void __launch_bounds__(threads) conv2d_weight_##instance(                       \
        float* partial, const T* input, const T* gradient, Convolution convolution, u32 part_positions) { \
        using Tile = __VA_ARGS__;                                                                         \
        static_assert(Tile::THREADS == threads);                                                          \
        SHARED_ARRAY_ALIGNED(128, unsigned char, shared, [Tile::SHARED_BYTES]);                           \
        weight_gradient<Tile, T, RUN>(partial, input, gradient, convolution, part_positions, shared);     \
    }
WEIGHT(f32, float, 4, 128, SimtTile<64, 64, 16, 4, 8, 3>)
WEIGHT(bf16, bf16, 8, 128, TensorTile<bf16, 64, 128, 32, 1, 4, 3>)
WEIGHT(f16, f16, 8, 128, TensorTile<f16, 64, 128, 32, 1, 4, 3>)

// A weight in another order of its axes, the sum of `parts` of them: the element (i, j, k, l) of `extents` from the
// place with `strides`, zero for l from `valid` on. Parts are `part` elements apart. A thread for each element.
template <class T, class S>
__device__ __forceinline__ void sum_permuted(T* output, const S* input, const Array<u32, 4>& extents,
                                             const Array<u32, 4>& strides, u32 valid, u32 parts, u64 part) {
    const u64 elements = u64(extents[0]) * extents[1] * extents[2] * extents[3];
    for (u64 element = grid_thread(); element < elements; element += grid_threads()) {
        const u32 l = element % extents[3];
        u64 rest = element / extents[3];
        u64 from = u64(l) * strides[3];
#pragma unroll
        for (int axis = 2; axis >= 0; --axis) {
            from += rest % extents[axis] * strides[axis];
            rest /= extents[axis];
        }
        // From 0, so that a sum of -0 and a part of zeros is what it is without that part.
        float sum = 0;
        for (u32 i = 0; l < valid && i < parts; ++i) sum += to_float(input[i * part + from]);
        output[element] = from_float<T>(sum);
    }
}

// Rows of `channels` elements with zeros behind them, up to a multiple of RUN. A thread for each RUN elements.
template <int RUN, class T>
__device__ __forceinline__ void pad_channels(T* output, const T* input, u64 rows, u32 channels) {
    const u32 runs = divide_up(channels, u32(RUN));
    for (u64 i = grid_thread(); i < rows * runs; i += grid_threads()) {
        const u64 row = i / runs;
        const u32 channel = u32(i - row * runs) * RUN;
        Vector<T, RUN> run;
#pragma unroll
        for (int j = 0; j < RUN; ++j) {
            run[j] = channel + j < channels ? input[row * channels + channel + j] : from_float<T>(0);
        }
        store(output + i * RUN, run);
    }
}

#define PERMUTE(suffix, T)                                                                                         \
    extern "C" __global__ void __launch_bounds__(256)                                                              \
        conv2d_pack_##suffix(T* output, const T* input, Array<u32, 4> extents, Array<u32, 4> strides, u32 valid) { \
        sum_permuted(output, input, extents, strides, valid, 1, 0);                                                \
    }                                                                                                              \
    extern "C" __global__ void __launch_bounds__(256) conv2d_sum_##suffix(                                         \
        T* output, const float* input, Array<u32, 4> extents, Array<u32, 4> strides, u32 parts, u64 part) {        \
        sum_permuted(output, input, extents, strides, extents[3], parts, part);                                    \
    }                                                                                                              \
    extern "C" __global__ void __launch_bounds__(256)                                                              \
        conv2d_pad_##suffix(T* output, const T* input, u64 rows, u32 channels) {                                   \
        pad_channels<WIDEST<T>>(output, input, rows, channels);                                                    \
    }
FOR_EACH_FLOAT(PERMUTE)

KERNELS(conv2d_weight, KERNEL_FLOATS(conv2d_weight), KERNEL_FLOATS(conv2d_pad), KERNEL_FLOATS(conv2d_pack),
        KERNEL_FLOATS(conv2d_sum))

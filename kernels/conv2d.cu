// Convolutions of channels-last maps and their input gradient, as matrix products that read their patches where they
// lie.
//
//   forward         y(b, o, f) = bias(f) + sum over taps i and channels c of x(b, h(o, i), c) w(f, c, i)
//   input gradient  x(b, h, c) = bias(c) + sum over taps i and features f of y(b, o, f) w(f, c, i), h(o, i) = h
//
// with h(o, i) of common/convolution.cuh, zeros outside of the map, and channels and features of the same group. Both
// are a gathering pass: rows are positions (b, y, x), terms (tap, source channel), columns the target's channels. The
// weight comes packed as (column, tap, source channel), so that terms follow each other in memory in both operands.
//
// Tiling: a block computes a tile of rows by columns of one group and phase. Neighbouring blocks share their rows, as
// the weight is the smaller operand. bf16 and f16 on tensor cores, 128 by 128 or 128 by 64 sums of a block, 32 terms at
// a time in 3 stages; f32 by fused multiply-adds, 128 by 64 sums, 16 terms at a time. What the rows of a tile begin
// with is computed once, into shared memory. For tensor cores the source's channels in a group are a multiple of 8,
// padded with zeros where they are not by nature, so that every copy is of 16 bytes.
// Bytes: a step over the tile's terms reads (rows + columns) terms, mostly from the second-level cache: each input
// element is in as many patches as the kernel has taps. From device memory: the maps and the weight about once.
// FLOPs: 2 rows columns terms.
//
// Along y the grid counts models: tensors with a leading model axis, a convolution for each (common/convolution.cuh).
//
// tensor cores: conv2d_gather_bf16, conv2d_gather_f16

#include "common/kernel.cuh"

#include "common/convolution.cuh"
#include "common/gemm.cuh"

// What a block computes.
struct Work {
    u32 group, row, column;
    GatherAxis y, x;
};

// Blocks count column tiles fastest, then row tiles, then phases, then groups.
__device__ __forceinline__ Work work(const Convolution& c, bool gradient, u32 columns, u32 tile_rows,
                                     u32 tile_columns) {
    u32 index = blockIdx.x;
    const auto next = [&](u32 extent) {
        const u32 at = index % extent;
        index /= extent;
        return at;
    };
    Work work;
    work.column = next(divide_up(columns, tile_columns)) * tile_columns;
    if (gradient) {
        // The first phase has the most positions.
        const u32 most = divide_up(c.input[0], c.stride[0]) * divide_up(c.input[1], c.stride[1]);
        work.row = next(divide_up(c.batch * most, tile_rows)) * tile_rows;
        work.x = gradient_axis(c, 1, next(c.stride[1] < c.input[1] ? c.stride[1] : c.input[1]));
        work.y = gradient_axis(c, 0, next(c.stride[0] < c.input[0] ? c.stride[0] : c.input[0]));
    } else {
        work.row = next(divide_up(c.batch * c.output[0] * c.output[1], tile_rows)) * tile_rows;
        work.x = forward_axis(c, 1);
        work.y = forward_axis(c, 0);
    }
    work.group = index;
    return work;
}

// The patches (row, term), in memory along the term.
template <class T, u32 RUN_> struct Patches {
    using Element = T;
    static constexpr bool ALONG_K = true;
    static constexpr u32 RUN = RUN_;

    const Gather& gather;
    Map<T> map;
    const Anchor* anchors;  // of the tile's rows, in shared memory
    u32 first_row, depth;

    __device__ __forceinline__ Run<T> operator()(u32 row, u32 k) const {
        u32 ty, tx, channel;
        gather.term(k, ty, tx, channel);
        const uint4 words = *reinterpret_cast<const uint4*>(anchors + (row - first_row));
        const i32 y = i32(words.y) + i32(ty) * gather.y.step, x = i32(words.z) + i32(tx) * gather.x.step;
        if (k >= depth) return {map.data, 0};
        return map.at(words.x, y, x, channel, gather.channels);
    }
};

// The weight (column, term), packed as (column, tap, channel) with all taps of the kernel.
template <class T, u32 RUN_> struct PackedWeight {
    using Element = T;
    static constexpr bool ALONG_K = true;
    static constexpr u32 RUN = RUN_;

    const Gather& gather;
    const T* data;
    u32 columns, depth, kernel_width, stride;  // elements from a column to the next

    __device__ __forceinline__ Run<T> operator()(u32 column, u32 k) const {
        u32 ty, tx, channel;
        gather.term(k, ty, tx, channel);
        if (column >= columns || k >= depth) return {data, 0};
        const u32 tap = (gather.y.tap + ty * gather.y.period) * kernel_width + gather.x.tap + tx * gather.x.period;
        return {data + u64(column) * stride + tap * gather.channels + channel, gather.channels - channel};
    }
};

// Where the rows of the block's tile begin, and where their results belong.
template <u32 ROWS, u32 THREADS>
__device__ __forceinline__ void fill_anchors(Anchor* anchors, const Gather& gather, u32 first_row, u32 rows,
                                             u32 source_height, u32 height, u32 width) {
    for (u32 i = threadIdx.x; i < ROWS; i += THREADS) {
        u32 py, px;
        const u32 image = gather.position(first_row + i, py, px);
        const u32 line = image * height + gather.y.first + py * gather.y.spacing;
        Anchor anchor;
        anchor.lines = image * source_height;
        anchor.y = first_row + i < rows ? i32(py) * gather.y.scale + gather.y.offset : NOWHERE;
        anchor.x = i32(px) * gather.x.scale + gather.x.offset;
        anchor.target = line * width + gather.x.first + px * gather.x.spacing;
        anchors[i] = anchor;
    }
    __syncthreads();
}

// Rounds and stores two neighbours, of which the second may be beyond the last column.
template <class T>
__device__ __forceinline__ void store_pair(T* to, float first, float second, bool both, bool aligned) {
    if (both && aligned) {
        const float pair[2] = {first, second};
        store_from_float(to, pair);
    } else {
        to[0] = from_float<T>(first);
        if (both) to[1] = from_float<T>(second);
    }
}

// RUN elements of the source's channels are read at once.
template <class Tile, class T, u32 RUN>
__device__ __forceinline__ void gather(T* output, const T* source, const T* weight, const T* bias, const Convolution& c,
                                       bool gradient) {
    const u32 columns = gradient ? c.group_inputs() : c.group_outputs();
    const u32 channels = padded(gradient ? c.group_outputs() : c.group_inputs(), RUN);
    const Work block = work(c, gradient, columns, Tile::M, Tile::N);
    const u32 rows = c.batch * block.y.positions * block.x.positions;
    if (block.row >= rows) return;

    const u32 source_height = gradient ? c.output[0] : c.input[0], source_width = gradient ? c.output[1] : c.input[1];
    const u32 height = gradient ? c.input[0] : c.output[0], width = gradient ? c.input[1] : c.output[1];
    const u32 model = blockIdx.y;
    source += model * (u64(c.batch) * source_height * source_width * channels * c.groups);
    output += model * (u64(c.batch) * height * width * columns * c.groups);
    weight += model * (u64(c.groups) * columns * c.taps() * channels);
    if (bias != nullptr) bias += model * (columns * c.groups);

    DYNAMIC_SHARED(shared);
    Anchor* anchors = reinterpret_cast<Anchor*>(shared);
    const Gather gather(block.y, block.x, channels);
    fill_anchors<Tile::M, Tile::THREADS>(anchors, gather, block.row, rows, source_height, height, width);

    const u32 depth = gather.depth(), column_stride = c.taps() * channels;
    const Map<T> map{source + block.group * channels, source_height, source_width, channels * c.groups};
    const Patches<T, RUN> patches{gather, map, anchors, block.row, depth};
    const PackedWeight<T, RUN> packed{
        gather, weight + u64(block.group) * columns * column_stride, columns, depth, c.kernel[1], column_stride};
    Tile tile;
    tile.clear();
    tile.accumulate(patches, packed, block.row, block.column, 0, depth, shared + Tile::M * sizeof(Anchor));

    tile.for_each_pair(block.row, block.column, [&](u32 row, u32 column, float first, float second) {
        if (row >= rows || column >= columns) return;
        const bool both = column + 1 < columns;
        const u32 channel = block.group * columns + column;
        if (bias != nullptr) {
            first += to_float(bias[channel]);
            if (both) second += to_float(bias[channel + 1]);
        }
        T* to = output + u64(anchors[row - block.row].target) * (columns * c.groups) + channel;
        store_pair(to, first, second, both, columns % 2 == 0);
    });
}

// As `TILES` of src/ops/conv2d/gpu.rs says. `blocks` at once in a multiprocessor are what the registers are shared by.
#define GATHER(instance, T, RUN, threads, blocks, ...)                                                       \
    extern "C" __global__ void __launch_bounds__(threads, blocks) conv2d_gather_##instance(                  \
        T* output, const T* source, const T* weight, const T* bias, Convolution convolution, u32 gradient) { \
        using Tile = __VA_ARGS__;                                                                            \
        static_assert(Tile::THREADS == threads);                                                             \
        gather<Tile, T, RUN>(output, source, weight, bias, convolution, gradient != 0);                      \
    }
GATHER(f32, float, 1, 128, 2, SimtTile<128, 64, 16, 8, 8, 3>)
GATHER(bf16, bf16, 8, 256, 2, TensorTile<bf16, 128, 128, 32, 2, 4, 3>)
GATHER(bf16_narrow, bf16, 8, 128, 4, TensorTile<bf16, 128, 64, 32, 2, 2, 3>)
GATHER(f16, f16, 8, 256, 2, TensorTile<f16, 128, 128, 32, 2, 4, 3>)
GATHER(f16_narrow, f16, 8, 128, 4, TensorTile<f16, 128, 64, 32, 2, 2, 3>)

KERNELS(conv2d, KERNEL(conv2d_gather_f32), KERNEL(conv2d_gather_bf16), KERNEL(conv2d_gather_bf16_narrow),
        KERNEL(conv2d_gather_f16), KERNEL(conv2d_gather_f16_narrow))

// Linear classifiers of the features of many blocks, which lie side by side in a row, forward and backward. For block l
// with features z (rows, F_l), weight W (classes, F_l), bias b, and n rows:
//
//   x = z W^T + b      loss_l = 1/n sum_i (ln sum_k exp(x_ik) - x_i,y_i) + penalty / 2 |W|^2
//   correct_l = rows whose label is the first of the largest x_ik
//   D = (softmax(x) - indicator of the label) dloss_l / n      dW = D^T z + penalty dloss_l W      db = sum_i D_i
//
// A row whose label is not a class makes loss and gradient of all blocks NaN, and is not correct.
//
// Tiling: each kernel takes all blocks in one launch. logits and weight: 64 by 64 tiles of the main loops of
// common/gemm.cuh (f32 by FMAs, bf16 and f16 on tensor cores), blockIdx.z the block of features; rows of 16 bytes where
// all widths allow, else element by element. losses: a warp per row of logits, in pieces of ROWS_OF_PIECE rows whose sums
// (f64) `finish` adds in order, with the squares of the weights. weight splits rows into parts whose sums `weight_sum`
// adds in order. Logits are kept in f32 for the backward; D is rounded to the dtype of the features.
// FLOPs: 2 n K F forward, as many backward, all blocks together F. Bytes: logits n F + K F values from memory (times
// K / 64 and n / 64 from L2), 4 n K written per block; losses and differences read them again.
// ResNet-56's 28 blocks (F = 1008), 10 classes, n = 50,000, f32: 1.0 GFLOP (0.02 ms at 60 TFLOP/s if tiles were full; 10
// of 64 columns are) and 202 MB of features, 47 us at 4.3 TB/s: bound by memory. ResNet-50's 16 blocks (F = 15,104),
// 1000 classes, n = 256, bf16: 7.7 GFLOP, 10 us at 790 TFLOP/s; 38 MB, 9 us, and 16 MB of logits: bound by both.
// tensor cores: linear_probe_logits_wide_bf16, linear_probe_logits_wide_f16, linear_probe_logits_narrow_bf16, linear_probe_logits_narrow_f16, linear_probe_weight_wide_bf16, linear_probe_weight_wide_f16, linear_probe_weight_narrow_bf16, linear_probe_weight_narrow_f16

#include "common/kernel.cuh"

#include "common/gemm.cuh"
#include "common/reduce.cuh"

namespace {

constexpr u32 THREADS = 256;
constexpr u32 WARPS = THREADS / 32;
// As in src/ops/linear_probe/gpu.rs.
constexpr u32 MOST = 512;
constexpr u32 TILE = 64;
constexpr u32 ROWS_OF_PIECE = 1024;

template <class T> struct Tiles {
    using Wide = TensorTile<T, TILE, TILE, 32, 2, 2, 3>;
    using Narrow = TensorTile<T, TILE, TILE, 16, 2, 2, 3>;
};
template <> struct Tiles<float> {
    using Wide = SimtTile<TILE, TILE, 16, 8, 4, 3>;
    using Narrow = SimtTile<TILE, TILE, 8, 8, 4, 3>;
};

// As `Description` in src/ops/linear_probe/gpu.rs.
struct Extents {
    u32 rows, features, classes, blocks;
};

// First features of the blocks, and the number of all after the last one.
using Offsets = Array<u32, MOST + 1>;

// logits: (blocks, rows, classes)
template <class Tile, u32 RUN, class T>
__device__ __forceinline__ void logits(float* output, const T* features, const T* weight, const T* bias,
                                       const Extents& all, u32 first, u32 width) {
    SHARED_ARRAY(unsigned char, shared, [Tile::SHARED_BYTES]);
    const u32 across = divide_up(all.classes, TILE);
    const u32 row = blockIdx.x / across * TILE, column = blockIdx.x % across * TILE, block = blockIdx.z;
    const MatrixSource<T, true, RUN> a{features + first, all.rows, width, all.features};
    const MatrixSource<T, true, RUN> b{weight + first, all.classes, width, all.features};
    Tile tile;
    tile.clear();
    tile.accumulate(a, b, row, column, 0, width, shared);
    output += u64(block) * all.rows * all.classes;
    tile.for_each_pair(row, column, [&](u32 i, u32 k, float left, float right) {
        if (i >= all.rows) return;
        const T* own = bias + u64(block) * all.classes;
        if (k < all.classes) output[u64(i) * all.classes + k] = left + to_float(own[k]);
        if (k + 1 < all.classes) output[u64(i) * all.classes + k + 1] = right + to_float(own[k + 1]);
    });
}

// The part blockIdx.y of the rows, of `depth` each. partials: (parts, classes, features)
template <class Tile, u32 RUN, class T>
__device__ __forceinline__ void weight_partials(float* partials, const T* differences, const T* features,
                                                const Extents& all, u32 depth, u32 first, u32 width) {
    SHARED_ARRAY(unsigned char, shared, [Tile::SHARED_BYTES]);
    if (width == 0) return;
    const u32 across = divide_up(width, TILE);
    const u32 row = blockIdx.x / across * TILE, column = blockIdx.x % across * TILE;
    if (row >= all.classes) return;
    const u32 begin = blockIdx.y * depth, end = all.rows - begin < depth ? all.rows : begin + depth;
    const MatrixSource<T, false, RUN> a{differences + u64(blockIdx.z) * all.rows * all.classes, all.classes, all.rows,
                                        all.classes};
    const MatrixSource<T, false, RUN> b{features + first, width, all.rows, all.features};
    Tile tile;
    tile.clear();
    tile.accumulate(a, b, row, column, begin, end, shared);
    partials += u64(blockIdx.y) * all.classes * all.features + first;
    tile.for_each_pair(row, column, [&](u32 k, u32 f, float left, float right) {
        if (k >= all.classes) return;
        if (f < width) partials[u64(k) * all.features + f] = left;
        if (f + 1 < width) partials[u64(k) * all.features + f + 1] = right;
    });
}

// Losses of some rows, and how many of them are correct.
struct Total {
    double loss;
    u64 correct;
    __device__ __forceinline__ Total operator+(const Total& other) const {
        return {loss + other.loss, correct + other.correct};
    }
};

// The largest logit of a row and where it is, and ln of the sum of exponentials less that, by a warp.
struct Row {
    Indexed<float> largest;
    float log_sum;

    __device__ __forceinline__ Row(const float* logits, u32 classes) {
        largest = {-INFINITY, 0xFFFFFFFFu};
        for (u32 k = lane(); k < classes; k += 32) largest = Argmax{}(largest, {logits[k], k});
        largest = warp_reduce(largest, Argmax{});
        float sum = 0;
        for (u32 k = lane(); k < classes; k += 32) sum += expf(logits[k] - largest.value);
        log_sum = logf(warp_sum(sum));
    }
};

template <class T>
__device__ __forceinline__ void differences(T* output, const float* logits, const i64* labels, const T* grad,
                                            const Extents& all) {
    const u64 count = u64(all.blocks) * all.rows;
    for (u64 at = grid_thread() / 32; at < count; at += grid_threads() / 32) {
        const float* own = logits + at * all.classes;
        const Row row(own, all.classes);
        const i64 label = labels[at % all.rows];
        const bool valid = label >= 0 && label < all.classes;
        const float factor = valid ? to_float(grad[at / all.rows]) / float(all.rows) : NAN;
        for (u32 k = lane(); k < all.classes; k += 32) {
            const float share = expf(own[k] - row.largest.value - row.log_sum) - float(label == i64(k));
            output[at * all.classes + k] = from_float<T>(share * factor);
        }
    }
}

template <class T>
__device__ __forceinline__ void finish(T* loss, i64* correct, const Total* totals, const T* weight, const Extents& all,
                                       u32 pieces, float penalty, u32 first, u32 width) {
    SHARED_ARRAY(Total, scratch, [REDUCTION_SCRATCH]);
    SHARED_ARRAY(double, squares_scratch, [REDUCTION_SCRATCH]);
    Total total = {};
    for (u32 piece = threadIdx.x; piece < pieces; piece += THREADS) {
        total = total + totals[u64(blockIdx.x) * pieces + piece];
    }
    total = block_reduce(total, Total{}, Sum{}, scratch);
    double squares = 0;
    for (u64 i = threadIdx.x; penalty != 0 && i < u64(all.classes) * width; i += THREADS) {
        const double value = double(to_float(weight[i / width * all.features + first + i % width]));
        squares += value * value;
    }
    squares = block_sum(squares, squares_scratch);
    if (threadIdx.x > 0) return;
    loss[blockIdx.x] = from_float<T>(float(total.loss / all.rows + 0.5 * double(penalty) * squares));
    correct[blockIdx.x] = i64(total.correct);
}

template <class T>
__device__ __forceinline__ void weight_sum(T* gradient, const float* partials, const T* weight, const T* grad,
                                           const Extents& all, u32 parts, float penalty, u32 block, u32 first,
                                           u32 width) {
    const u64 elements = u64(all.classes) * all.features;
    const float factor = penalty == 0 ? 0 : penalty * to_float(grad[block]);
    for (u64 i = grid_thread(); i < u64(all.classes) * width; i += grid_threads()) {
        const u64 at = i / width * all.features + first + i % width;
        float sum = penalty == 0 ? 0 : factor * to_float(weight[at]);
        for (u32 part = 0; part < parts; ++part) sum += partials[part * elements + at];
        gradient[at] = from_float<T>(sum);
    }
}

}  // namespace

// A block for each piece of rows (x) of each block of features (y). totals: (blocks, pieces)
extern "C" __global__ void __launch_bounds__(THREADS)
    linear_probe_losses(Total* totals, const float* logits, const i64* labels, Extents all) {
    SHARED_ARRAY(Total, scratch, [WARPS]);
    const u32 first = blockIdx.x * ROWS_OF_PIECE;
    const u32 end = all.rows - first < ROWS_OF_PIECE ? all.rows : first + ROWS_OF_PIECE;
    Total total = {};
    for (u32 i = first + warp(); i < end; i += WARPS) {
        const float* own = logits + (u64(blockIdx.y) * all.rows + i) * all.classes;
        const Row row(own, all.classes);
        const i64 label = labels[i];
        const bool valid = label >= 0 && label < all.classes;
        const float loss = valid ? row.log_sum - (own[label] - row.largest.value) : NAN;
        total = total + Total{loss, valid && row.largest.index == u32(label)};
    }
    if (lane() == 0) scratch[warp()] = total;
    __syncthreads();
    if (threadIdx.x > 0) return;
    for (u32 i = 1; i < WARPS; ++i) total = total + scratch[i];
    totals[u64(blockIdx.y) * gridDim.x + blockIdx.x] = total;
}

#define BLOCK(number) offsets[int(number)], offsets[int(number) + 1] - offsets[int(number)]
#define PRODUCTS(form, Form, RUN, suffix, T)                                                                         \
    extern "C" __global__ void __launch_bounds__(Tiles<T>::Form::THREADS)                                            \
        linear_probe_logits_##form##_##suffix(float* output, const T* features, const T* weight, const T* bias,      \
                                              Extents all, const __grid_constant__ Offsets offsets) {                \
        logits<Tiles<T>::Form, RUN>(output, features, weight, bias, all, BLOCK(blockIdx.z));                         \
    }                                                                                                                \
    extern "C" __global__ void __launch_bounds__(Tiles<T>::Form::THREADS)                                            \
        linear_probe_weight_##form##_##suffix(float* partials, const T* differences, const T* features, Extents all, \
                                              u32 depth, const __grid_constant__ Offsets offsets) {                  \
        weight_partials<Tiles<T>::Form, RUN>(partials, differences, features, all, depth, BLOCK(blockIdx.z));        \
    }
#define INSTANCE(suffix, T)                                                                                        \
    PRODUCTS(wide, Wide, u32(WIDEST<T>), suffix, T)                                                                \
    PRODUCTS(narrow, Narrow, 1, suffix, T)                                                                         \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                          \
        linear_probe_finish_##suffix(T* loss, i64* correct, const Total* totals, const T* weight, Extents all,     \
                                     u32 pieces, float penalty, const __grid_constant__ Offsets offsets) {         \
        finish(loss, correct, totals, weight, all, pieces, penalty, BLOCK(blockIdx.x));                            \
    }                                                                                                              \
    extern "C" __global__ void __launch_bounds__(THREADS, 6) linear_probe_differences_##suffix(                    \
        T* output, const float* logits, const i64* labels, const T* grad, Extents all) {                           \
        differences(output, logits, labels, grad, all);                                                            \
    }                                                                                                              \
    extern "C" __global__ void __launch_bounds__(THREADS) linear_probe_weight_sum_##suffix(                        \
        T* gradient, const float* partials, const T* weight, const T* grad, Extents all, u32 parts, float penalty, \
        const __grid_constant__ Offsets offsets) {                                                                 \
        weight_sum(gradient, partials, weight, grad, all, parts, penalty, blockIdx.y, BLOCK(blockIdx.y));          \
    }
FOR_EACH_FLOAT(INSTANCE)

KERNELS(linear_probe, KERNEL(linear_probe_losses), KERNEL_FLOATS(linear_probe_logits_wide),
        KERNEL_FLOATS(linear_probe_logits_narrow), KERNEL_FLOATS(linear_probe_weight_wide),
        KERNEL_FLOATS(linear_probe_weight_narrow), KERNEL_FLOATS(linear_probe_finish),
        KERNEL_FLOATS(linear_probe_differences), KERNEL_FLOATS(linear_probe_weight_sum))

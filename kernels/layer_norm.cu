// Layer normalisation over the last axis, forward and backward.
//
//   y_i = x̂_i w_i + b_i with x̂_i = (x_i - mean x) / sqrt(var x + eps)
//   g_i = dy_i w_i,  dx_i = (g_i - mean g - x̂_i mean(g x̂)) / sqrt(var x + eps)
//   dw = sum over rows of dy x̂,  db = sum over rows of dy
//
// Saved for each row: center, offset and rstd, with x̂ = (x - center) rstd + offset. The center is the mean rounded to
// f32; offset makes up for the rounding, which counts where the mean is much larger than the deviation. Mean and
// variance take two passes over the row, the second around the center, so nothing cancels.
//
// Tiling: a group of 1 to 512 threads, a power of two, for each row, which it holds in registers between the passes:
// 32 values for each thread forward, 16 each of x and dy backward. Up to 32 threads it is part of a warp and needs no
// block barrier. Rows of a width that 16 bytes do not divide, or wider than 8192, are read again from the caches
// instead. Backward, a block adds up dw and db of its rows in registers (of rows not held: tiles of 32 columns, see
// parameter_gradients); `finish` adds the blocks' sums in order.
// Bytes: 2 values per element forward, 3 backward, each from device memory once. About 8 FLOPs per element forward, 15
// backward: bound by memory.

#include "common/kernel.cuh"

#include "common/rows.cuh"

namespace {

// Values of a row that a thread holds.
constexpr u32 HELD_FORWARD = 32, HELD_BACKWARD = 16;
constexpr u32 THREADS = 256, MOST_THREADS = 512;
// Tiles that sum over rows.
constexpr u32 COLUMNS = 32, SLICES = 8;

// A row of a width that V divides in the registers of its group. Chunk c of a lane begins at (c * lanes + lane) * V.
template <class T, u32 HELD> struct HeldRow {
    static constexpr int V = WIDEST<T>, CHUNKS = HELD / V;
    Vector<T, V> chunks[CHUNKS];

    // body(c, at) for each chunk of this lane, `at` its first column.
    template <class Body> static __device__ __forceinline__ void each(u32 width, u32 lanes, Body body) {
        const u32 lane = threadIdx.x % lanes;
#pragma unroll
        for (int c = 0; c < CHUNKS; ++c) {
            const u32 at = (c * lanes + lane) * V;
            if (at < width) body(c, at);
        }
    }
    __device__ __forceinline__ void begin(const T* row, u32 width, u32 lanes) {
        each(width, lanes, [&](int c, u32 at) { chunks[c] = ::load<V, Reuse::Once>(row + at); });
    }
    __device__ __forceinline__ void read(float (&values)[V], int c, u32) const {
#pragma unroll
        for (int i = 0; i < V; ++i) values[i] = to_float(chunks[c][i]);
    }
};

// Any row, read again in every pass.
template <class T> struct StreamedRow {
    static constexpr int V = 1, CHUNKS = 1;
    const T* row;

    template <class Body> static __device__ __forceinline__ void each(u32 width, u32 lanes, Body body) {
        for (u32 at = threadIdx.x % lanes; at < width; at += lanes) body(0, at);
    }
    __device__ __forceinline__ void begin(const T* from, u32, u32) { row = from; }
    __device__ __forceinline__ void read(float (&values)[1], int, u32 at) const { values[0] = to_float(row[at]); }
};

struct Statistics {
    float center, offset, rstd;
    __device__ __forceinline__ float normalise(float x) const { return fmaf(x - center, rstd, offset); }
};

template <class Row>
__device__ __forceinline__ Statistics row_statistics(const Row& x, u32 extent, u32 width, u32 lanes, float eps,
                                                     Pair* scratch) {
    constexpr int V = Row::V;
    const float scale = 1.0f / width;
    float sum = 0;
    Row::each(extent, lanes, [&](int c, u32 at) {
        float values[V];
        x.read(values, c, at);
#pragma unroll
        for (int i = 0; i < V; ++i) sum += values[i];
    });
    const float center = group_sum(sum, lanes, reinterpret_cast<float*>(scratch)) * scale;
    Pair around = {};
    Row::each(extent, lanes, [&](int c, u32 at) {
        float values[V];
        x.read(values, c, at);
#pragma unroll
        for (int i = 0; i < V; ++i) {
            const float distance = values[i] - center;
            around.a += distance;
            around.b = fmaf(distance, distance, around.b);
        }
    });
    around = group_sum(around, lanes, scratch);
    const float residue = around.a * scale;
    float variance = around.b * scale - residue * residue;
    // Rounding must not turn the variance of a constant row negative; a NaN stays.
    if (variance < 0) variance = 0;
    const float rstd = 1.0f / sqrtf(variance + eps);
    return {center, -residue * rstd, rstd};
}

template <class Row, class T>
__device__ __forceinline__ void forward(T* output, Statistics* statistics, const T* input, const T* weight,
                                        const T* bias, u64 rows, u32 width, u32 lanes, float eps) {
    constexpr int V = Row::V;
    SHARED_ARRAY(Pair, scratch, [REDUCTION_SCRATCH]);
    for (RowWalk walk(rows, lanes); walk.more(); walk.next()) {
        const u64 start = walk.row() * width;
        const u32 extent = walk.valid() ? width : 0;
        Row x;
        x.begin(input + start, extent, lanes);
        const Statistics row = row_statistics(x, extent, width, lanes, eps, scratch);
        if (walk.valid() && threadIdx.x % lanes == 0) statistics[walk.row()] = row;
        Row::each(extent, lanes, [&](int c, u32 at) {
            float values[V], weights[V], biases[V];
            x.read(values, c, at);
            load_as_float(weights, weight + at);
            load_as_float(biases, bias + at);
#pragma unroll
            for (int i = 0; i < V; ++i) values[i] = fmaf(row.normalise(values[i]), weights[i], biases[i]);
            store_from_float(output + start + at, values);
        });
    }
}

// The sums of all groups of a block, in order, to `partial` (width).
template <class Row>
__device__ __forceinline__ void store_sums(float* partial, const float (&sums)[Row::CHUNKS][Row::V], u32 width,
                                           u32 lanes, float* scratch) {
    const u32 groups = blockDim.x / lanes;
    // The rows of all groups together are no wider than THREADS * HELD_BACKWARD, unless there is one.
    float* own = groups > 1 ? scratch + threadIdx.x / lanes * width : partial;
    __syncthreads();
    Row::each(width, lanes, [&](int c, u32 at) {
#pragma unroll
        for (int i = 0; i < Row::V; ++i) own[at + i] = sums[c][i];
    });
    if (groups == 1) return;
    __syncthreads();
    for (u32 column = threadIdx.x; column < width; column += blockDim.x) {
        float sum = 0;
        for (u32 group = 0; group < groups; ++group) sum += scratch[group * width + column];
        partial[column] = sum;
    }
}

// partials (blocks, 2, width): dw and db of each block's rows; for held rows alone. It and input_gradient may be null.
template <class Row, class T>
__device__ __forceinline__ void backward(T* input_gradient, float* partials, const T* input, const T* output_gradient,
                                         const T* weight, const Statistics* statistics, u64 rows, u32 width,
                                         u32 lanes) {
    constexpr int V = Row::V;
    constexpr bool HELD = V > 1;
    SHARED_ARRAY(Pair, scratch, [REDUCTION_SCRATCH]);
    const float scale = 1.0f / width;
    float dw[Row::CHUNKS][V] = {}, db[Row::CHUNKS][V] = {};
    for (RowWalk walk(rows, lanes); walk.more(); walk.next()) {
        const u64 start = walk.row() * width;
        const u32 extent = walk.valid() ? width : 0;
        Row x, dy;
        x.begin(input + start, extent, lanes);
        dy.begin(output_gradient + start, extent, lanes);
        const Statistics row = walk.valid() ? statistics[walk.row()] : Statistics{};
        Pair sums = {};
        Row::each(extent, lanes, [&](int c, u32 at) {
            float values[V], gradients[V], weights[V];
            x.read(values, c, at);
            dy.read(gradients, c, at);
            load_as_float(weights, weight + at);
#pragma unroll
            for (int i = 0; i < V; ++i) {
                const float normalised = row.normalise(values[i]), gamma = gradients[i] * weights[i];
                sums.a += gamma;
                sums.b = fmaf(gamma, normalised, sums.b);
                if constexpr (HELD) {
                    dw[c][i] = fmaf(gradients[i], normalised, dw[c][i]);
                    db[c][i] += gradients[i];
                }
            }
        });
        if (input_gradient == nullptr) continue;
        sums = group_sum(sums, lanes, scratch);
        const float mean = sums.a * scale, product = sums.b * scale;
        Row::each(extent, lanes, [&](int c, u32 at) {
            float values[V], gradients[V], weights[V];
            x.read(values, c, at);
            dy.read(gradients, c, at);
            load_as_float(weights, weight + at);
#pragma unroll
            for (int i = 0; i < V; ++i) {
                const float free = fmaf(gradients[i], weights[i], -mean);
                values[i] = row.rstd * fmaf(-row.normalise(values[i]), product, free);
            }
            store_from_float(input_gradient + start + at, values);
        });
    }
    if constexpr (HELD) {
        if (partials == nullptr) return;
        SHARED_ARRAY(float, columns, [THREADS * HELD_BACKWARD]);
        float* partial = partials + u64(blockIdx.x) * 2 * width;
        store_sums<Row>(partial, dw, width, lanes, columns);
        store_sums<Row>(partial + width, db, width, lanes, columns);
    }
}

// dw and db for rows that are not held: block (x, y) takes COLUMNS columns of part y of the rows.
template <class T>
__device__ __forceinline__ void parameter_gradients(float* partials, const T* input, const T* output_gradient,
                                                    const Statistics* statistics, u64 rows, u32 width,
                                                    u64 rows_per_part) {
    SHARED_ARRAY(Pair, scratch, [COLUMNS * SLICES]);
    const u32 column = blockIdx.x * COLUMNS + threadIdx.x;
    const u64 begin = blockIdx.y * rows_per_part;
    const u64 end = begin + rows_per_part < rows ? begin + rows_per_part : rows;
    Pair sums[1] = {};
    for (u64 row = begin + threadIdx.y; column < width && row < end; row += SLICES) {
        const float gradient = to_float(output_gradient[row * width + column]);
        const float normalised = statistics[row].normalise(to_float(input[row * width + column]));
        sums[0] = {fmaf(gradient, normalised, sums[0].a), sums[0].b + gradient};
    }
    reduce_slices(sums, Sum{}, scratch);
    if (threadIdx.y == 0 && column < width) {
        float* partial = partials + u64(blockIdx.y) * 2 * width + column;
        partial[0] = sums[0].a;
        partial[width] = sums[0].b;
    }
}

// The sums of `parts` partials; zero where there is none.
template <class T>
__device__ __forceinline__ void finish(T* weight_gradient, T* bias_gradient, const float* partials, u32 parts,
                                       u32 width) {
    SHARED_ARRAY(float, scratch, [COLUMNS * SLICES]);
    const u64 column = u64(blockIdx.x) * COLUMNS + threadIdx.x;
    const bool valid = column < 2ull * width;
    float sum = 0;
    reduce_parts(sum, partials + column, parts, 2ull * width, valid, Sum{}, scratch);
    if (threadIdx.y == 0 && valid) {
        T* to = column < width ? weight_gradient + column : bias_gradient + (column - width);
        *to = from_float<T>(sum);
    }
}

}  // namespace

#define FORWARD(name, T, Row)                                                                                        \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                            \
        name(T* output, Statistics* statistics, const T* input, const T* weight, const T* bias, u64 rows, u32 width, \
             u32 lanes, float eps) {                                                                                 \
        forward<Row>(output, statistics, input, weight, bias, rows, width, lanes, eps);                              \
    }
#define BACKWARD(name, T, Row)                                                                                   \
    extern "C" __global__ void __launch_bounds__(MOST_THREADS)                                                   \
        name(T* input_gradient, float* partials, const T* input, const T* output_gradient, const T* weight,      \
             const Statistics* statistics, u64 rows, u32 width, u32 lanes) {                                     \
        backward<Row>(input_gradient, partials, input, output_gradient, weight, statistics, rows, width, lanes); \
    }
#define INSTANCES(suffix, T)                                                                                          \
    using HeldForward_##suffix = HeldRow<T, HELD_FORWARD>;                                                            \
    using HeldBackward_##suffix = HeldRow<T, HELD_BACKWARD>;                                                          \
    FORWARD(layer_norm_forward_##suffix, T, HeldForward_##suffix)                                                     \
    FORWARD(layer_norm_forward_streamed_##suffix, T, StreamedRow<T>)                                                  \
    BACKWARD(layer_norm_backward_##suffix, T, HeldBackward_##suffix)                                                  \
    BACKWARD(layer_norm_backward_streamed_##suffix, T, StreamedRow<T>)                                                \
    extern "C" __global__ void __launch_bounds__(COLUMNS* SLICES) layer_norm_parameter_gradients_##suffix(            \
        float* partials, const T* input, const T* output_gradient, const Statistics* statistics, u64 rows, u32 width, \
        u64 rows_per_part) {                                                                                          \
        parameter_gradients(partials, input, output_gradient, statistics, rows, width, rows_per_part);                \
    }                                                                                                                 \
    extern "C" __global__ void __launch_bounds__(COLUMNS* SLICES) layer_norm_finish_##suffix(                         \
        T* weight_gradient, T* bias_gradient, const float* partials, u32 parts, u32 width) {                          \
        finish(weight_gradient, bias_gradient, partials, parts, width);                                               \
    }
FOR_EACH_FLOAT(INSTANCES)

KERNELS(layer_norm, KERNEL_FLOATS(layer_norm_forward), KERNEL_FLOATS(layer_norm_forward_streamed),
        KERNEL_FLOATS(layer_norm_backward), KERNEL_FLOATS(layer_norm_backward_streamed),
        KERNEL_FLOATS(layer_norm_parameter_gradients), KERNEL_FLOATS(layer_norm_finish))

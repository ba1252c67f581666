// Means of maps over p by p cells, for many maps in one launch, and the same fused with the end of a residual block.
// Cell a of p along an extent H reaches from floor(a H / p) to ceil((a + 1) H / p); cells overlap where p does not
// divide H.
//
//   pooled_features  g[n, (a p + b) C + c] = mean over cell (a, b) of x[n, c]        all maps in one row of g, in order
//   add_relu_gap     y = relu(x + r), and g of y, in the pass that writes y
//   backward         dx = sum over the cells of a position of dg / size of the cell; fused: (dy + that) where y > 0
//
// Tiling: forward a block for (map, image, cell, tile of channels): up to 32 lanes of 16 bytes of channels by slices of
// positions, as many as 256 threads give; slices are added in a fixed tree, in f32. A position that cells share is read
// by each, and y written by the first. Maps whose channels are no multiple of 16 bytes are read one by one. Backward a
// thread for 16 bytes of channels of a position.
// Bytes: every value of a map once, features 4 bytes each; fused 3 values per element. FLOPs: 1 per element, fused 3.
// All 16 blocks of ResNet-50 at batch 256 in bf16, 5.5 M values per image: 2.8 GB, 0.66 ms at 4.3 TB/s; fused 8.5 GB,
// 2.0 ms, where add, relu and pooling one by one take 17 GB. Bound by memory from a few hundred blocks on; with fewer
// (few images of few channels) by the latency of a block's loads.

#include "common/kernel.cuh"

#include "common/index.cuh"
#include "common/vector.cuh"

namespace {

constexpr u32 THREADS = 256;
// As in src/ops/pooled_features/gpu.rs.
constexpr u32 MOST = 512;

using Addresses = Array<u64, MOST>;
using Numbers = Array<u32, MOST>;

struct Map {
    u32 height, width, channels;
};

// Cells along an extent, and what they hold.
struct Cells {
    u32 extent, cells;
    __device__ __forceinline__ u32 begin(u32 cell) const { return u32(u64(cell) * extent / cells); }
    __device__ __forceinline__ u32 end(u32 cell) const { return u32((u64(cell + 1) * extent + cells - 1) / cells); }
    // Cells that hold a position.
    __device__ __forceinline__ u32 first_with(u32 at) const { return u32(u64(at) * cells / extent); }
    __device__ __forceinline__ u32 last_with(u32 at) const { return u32((u64(at + 1) * cells - 1) / extent); }
};

// What one block pools: a cell of an image, and the channels from `channel` on.
struct Task {
    u64 image;
    u32 row, column, channel;
};

template <int N> __device__ __forceinline__ u32 lanes_of(u32 channels) {
    u32 lanes = 1;
    while (lanes < 32 && lanes * N < channels) lanes *= 2;
    return lanes;
}

// A NaN stays.
__device__ __forceinline__ float relu(float x) { return x <= 0 ? 0 : x; }

// features: those of the map in the image's row. With FUSED, `output` takes relu(map + residual).
template <int N, bool FUSED, class T>
__device__ __forceinline__ void pool(float* features, T* output, const T* map, const T* residual, const Map& shape,
                                     u32 cells, const Task& task, float* scratch) {
    const Cells down{shape.height, cells}, across{shape.width, cells};
    const u32 top = down.begin(task.row), left = across.begin(task.column);
    const u32 rows = down.end(task.row) - top, columns = across.end(task.column) - left;
    const u32 lanes = lanes_of<N>(shape.channels), slices = THREADS / lanes, slice = threadIdx.x / lanes;
    const u32 channel = task.channel + threadIdx.x % lanes * N;
    const bool inside = channel < shape.channels;
    float sums[N] = {};
#pragma unroll 4
    for (u32 at = slice; inside && at < rows * columns; at += slices) {
        const u32 row = top + at / columns, column = left + at % columns;
        const u64 from = ((task.image * shape.height + row) * shape.width + column) * shape.channels + channel;
        float values[N];
        load_as_float<N, FUSED ? Reuse::Once : Reuse::Often>(values, map + from);
        if constexpr (FUSED) {
            float others[N];
            load_as_float<N, Reuse::Once>(others, residual + from);
#pragma unroll
            for (int i = 0; i < N; ++i) values[i] = to_float(from_float<T>(relu(values[i] + others[i])));
            if (down.first_with(row) == task.row && across.first_with(column) == task.column) {
                store_from_float(output + from, values);
            }
        }
#pragma unroll
        for (int i = 0; i < N; ++i) sums[i] += values[i];
    }
#pragma unroll
    for (int i = 0; i < N; ++i) scratch[i * THREADS + threadIdx.x] = sums[i];
    for (u32 half = slices / 2; half > 0; half /= 2) {
        __syncthreads();
        if (slice >= half) continue;
#pragma unroll
        for (int i = 0; i < N; ++i) {
            sums[i] += scratch[i * THREADS + threadIdx.x + half * lanes];
            scratch[i * THREADS + threadIdx.x] = sums[i];
        }
    }
    if (!inside || slice > 0) return;
#pragma unroll
    for (int i = 0; i < N; ++i) {
        features[(task.row * cells + task.column) * shape.channels + channel + i] = sums[i] / float(rows * columns);
    }
}

// The block's task among those of a map, if it has one: images, cells, tiles of channels, the last of these fastest.
template <int N> __device__ __forceinline__ bool find_task(Task& task, const Map& shape, u32 batch, u32 cells) {
    const u32 tile = lanes_of<N>(shape.channels) * N, tiles = divide_up(shape.channels, tile);
    if (blockIdx.x >= u64(batch) * cells * cells * tiles) return false;
    const u32 cell = blockIdx.x / tiles % (cells * cells);
    task = {blockIdx.x / tiles / (cells * cells), cell / cells, cell % cells, blockIdx.x % tiles * tile};
    return true;
}

template <int N, bool FUSED, class T>
__device__ __forceinline__ void forward(float* features, T* output, const T* map, const T* residual, const Map& shape,
                                        u32 batch, u32 cells, u32 pitch, float* scratch) {
    Task task;
    if (!find_task<N>(task, shape, batch, cells)) return;
    pool<N, FUSED>(features + task.image * pitch, output, map, residual, shape, cells, task, scratch);
}

// What reaches the gradient of N channels of a position from the features.
template <int N>
__device__ __forceinline__ void spread(float (&values)[N], const float* features, const Map& shape, u32 cells, u32 row,
                                       u32 column, u32 channel) {
    const Cells down{shape.height, cells}, across{shape.width, cells};
#pragma unroll 1
    for (u32 a = down.first_with(row); a <= down.last_with(row); ++a) {
#pragma unroll 1
        for (u32 b = across.first_with(column); b <= across.last_with(column); ++b) {
            const float size = float((down.end(a) - down.begin(a)) * (across.end(b) - across.begin(b)));
#pragma unroll
            for (int i = 0; i < N; ++i) values[i] += features[(a * cells + b) * shape.channels + channel + i] / size;
        }
    }
}

// `features`, the gradient of a map's features in rows of `pitch`, and `grad`, that of y, may be null; `y` is that of
// the fused form.
template <int N, bool FUSED, class T>
__device__ __forceinline__ void backward(T* gradient, const float* features, const T* grad, const T* y,
                                         const Map& shape, u32 batch, u32 cells, u32 pitch) {
    const u32 groups = shape.channels / N;
    const u64 positions = u64(batch) * shape.height * shape.width;
    for (u64 at = grid_thread(); at < positions * groups; at += grid_threads()) {
        const u64 line = at / groups / shape.width;
        const u32 channel = u32(at % groups) * N, column = u32(at / groups % shape.width);
        float values[N] = {};
        if (FUSED && grad != nullptr) load_as_float(values, grad + at * N);
        if (features != nullptr) {
            spread(values, features + line / shape.height * pitch, shape, cells, u32(line % shape.height), column,
                   channel);
        }
        if constexpr (FUSED) {
            float outputs[N];
            load_as_float(outputs, y + at * N);
#pragma unroll
            for (int i = 0; i < N; ++i) values[i] = outputs[i] > 0 ? values[i] : 0;
        }
        store_from_float(gradient + at * N, values);
    }
}

}  // namespace

// A map for each blockIdx.y; `first` is the number of its first feature.
#define GROUPED(suffix, T)                                                                                   \
    extern "C" __global__ void __launch_bounds__(THREADS) pooled_features_forward_##suffix(                  \
        float* features, u32 batch, u32 cells, u32 pitch, const __grid_constant__ Addresses maps,            \
        const __grid_constant__ Numbers heights, const __grid_constant__ Numbers widths,                     \
        const __grid_constant__ Numbers channels, const __grid_constant__ Numbers first) {                   \
        SHARED_ARRAY(float, scratch, [WIDEST<T> * THREADS]);                                                 \
        const int number = int(blockIdx.y);                                                                  \
        const Map shape{heights[number], widths[number], channels[number]};                                  \
        const T* map = reinterpret_cast<const T*>(maps[number]);                                             \
        float* own = features + first[number];                                                               \
        if (shape.channels % WIDEST<T> == 0) {                                                               \
            forward<WIDEST<T>, false, T>(own, nullptr, map, nullptr, shape, batch, cells, pitch, scratch);   \
        } else {                                                                                             \
            forward<1, false, T>(own, nullptr, map, nullptr, shape, batch, cells, pitch, scratch);           \
        }                                                                                                    \
    }                                                                                                        \
    extern "C" __global__ void __launch_bounds__(THREADS) pooled_features_backward_##suffix(                 \
        const float* features, u32 batch, u32 cells, u32 pitch, const __grid_constant__ Addresses gradients, \
        const __grid_constant__ Numbers heights, const __grid_constant__ Numbers widths,                     \
        const __grid_constant__ Numbers channels, const __grid_constant__ Numbers first) {                   \
        const int number = int(blockIdx.y);                                                                  \
        const Map shape{heights[number], widths[number], channels[number]};                                  \
        T* gradient = reinterpret_cast<T*>(gradients[number]);                                               \
        const float* own = features + first[number];                                                         \
        if (shape.channels % WIDEST<T> == 0) {                                                               \
            backward<WIDEST<T>, false, T>(gradient, own, nullptr, nullptr, shape, batch, cells, pitch);      \
        } else {                                                                                             \
            backward<1, false, T>(gradient, own, nullptr, nullptr, shape, batch, cells, pitch);              \
        }                                                                                                    \
    }
#define FUSED_FORM(suffix, T)                                                                                 \
    extern "C" __global__ void __launch_bounds__(THREADS, 4) add_relu_gap_forward_##suffix(                   \
        T* output, float* features, const T* input, const T* residual, u32 batch, u32 cells, Map shape) {     \
        SHARED_ARRAY(float, scratch, [WIDEST<T> * THREADS]);                                                  \
        const u32 pitch = cells * cells * shape.channels;                                                     \
        if (shape.channels % WIDEST<T> == 0) {                                                                \
            forward<WIDEST<T>, true>(features, output, input, residual, shape, batch, cells, pitch, scratch); \
        } else {                                                                                              \
            forward<1, true>(features, output, input, residual, shape, batch, cells, pitch, scratch);         \
        }                                                                                                     \
    }                                                                                                         \
    extern "C" __global__ void __launch_bounds__(THREADS) add_relu_gap_backward_##suffix(                     \
        T* gradient, const float* features, const T* grad, const T* y, u32 batch, u32 cells, Map shape) {     \
        const u32 pitch = cells * cells * shape.channels;                                                     \
        if (shape.channels % WIDEST<T> == 0) {                                                                \
            backward<WIDEST<T>, true>(gradient, features, grad, y, shape, batch, cells, pitch);               \
        } else {                                                                                              \
            backward<1, true>(gradient, features, grad, y, shape, batch, cells, pitch);                       \
        }                                                                                                     \
    }
FOR_EACH_FLOAT(GROUPED)
FOR_EACH_FLOAT(FUSED_FORM)

KERNELS(pooled_features, KERNEL_FLOATS(pooled_features_forward), KERNEL_FLOATS(pooled_features_backward),
        KERNEL_FLOATS(add_relu_gap_forward), KERNEL_FLOATS(add_relu_gap_backward))

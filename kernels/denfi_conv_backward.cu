// Backward of kernels/denfi_conv.cu. With g the gradient of y, and (i0, j0) the whole, (fr, fc) the fractional part of a
// tap's place:
//
//   dx[p]  = sum over (cell, tap) that read p of bilinear weight w[c, tap] g[cell]
//   dw[c, tap] = sum over cells of g bilinear(x, row, column)
//   d row    = sum_c g w ((1 - fc) (x10 - x00) + fc (x11 - x01)) / cell height, and d column likewise
//   gU = d column cos + d row sin                gV = d row cos - d column sin
//   dt += gU (1 + scale b) / 2   db -= gU (1 - scale b) / 2   dl += gV (1 + scale a) / 2   dr -= gV (1 - scale a) / 2
//   dtheta += d row (cos U - sin V) - d column (sin U + cos V)
//
// dx without atomics: `keys` names each tap by its upper left neighbour (i0, j0), rows and columns from -1 on; the stable
// sort of kernels/gather.cu brings the taps of a neighbour together in order; a cell's gradient then is the sum of four
// segments: those named by itself, by the cell before it, above it, and above that. So 9 keys per cell are sorted, not 36.
//
// Tiling. keys: a thread per tap. input_gradient: as the forward, a thread for 16 bytes of channels of a cell. weight:
// blocks of 32 groups of channels by 8 slices of cells over a run of cells; 9 sums for each channel in registers, slices
// added in a fixed tree, runs in order by `weight_sum`. boundary: a warp per cell, lanes across channels.
// Bytes per cell: input_gradient reads C values of g (36 times, from the caches) and writes C; keys and the sort move
// 9 (12 + 20 passes); weight and boundary read x as the forward does, and g. FLOPs per cell and channel: 108, 90, 145.
// A map of 200 by 176 with 512 channels, batch 8, bf16: input_gradient 577 MB, 134 us at 4.3 TB/s, keys and three passes
// of the sort 0.18 GB, 42 us; weight and boundary each 577 MB, 134 us. As the forward, reads from L1 and L2 bind.

#include "common/kernel.cuh"

#include "common/boundary.cuh"
#include "common/rows.cuh"

namespace {

constexpr u32 THREADS = 256;
// As in src/ops/denfi/gpu.rs.
constexpr u32 CELLS = 32;
constexpr u32 CHANNELS = 256;
constexpr u32 WEIGHT_LANES = 32;
constexpr u32 WEIGHT_SLICES = 8;
// Channels of a thread of the weight's gradient, where their number is a multiple.
constexpr int WEIGHT_GROUP = 4;

// Fractional parts of a tap's place.
struct Parts {
    float row, column;
};

template <int N, class T>
__device__ __forceinline__ void input_gradient(T* gradient, const T* grad, const T* weight, const Parts* parts,
                                               const u32* readers, const u32* starts, const BoundaryMap& map,
                                               float (&weights)[TAPS][CHANNELS]) {
    const u32 channel = blockIdx.y * CHANNELS;
    const u32 count = map.channels - channel < CHANNELS ? map.channels - channel : CHANNELS, groups = count / N;
    for (u32 i = threadIdx.x; i < count * TAPS; i += THREADS) {
        weights[i % TAPS][i / TAPS] = to_float(weight[u64(channel) * TAPS + i]);
    }
    __syncthreads();
    for (u32 item = threadIdx.x; item < CELLS * groups; item += THREADS) {
        const u64 cell = u64(blockIdx.x) * CELLS + item / groups;
        if (cell >= map.cells()) break;
        const u32 within = item % groups * N, pixel = u32(cell % map.cells_of_image());
        const u64 line = u64(map.width) + 1;
        const u64 own =
            (cell / map.cells_of_image() * (map.height + 1) + pixel / map.width + 1) * line + pixel % map.width + 1;
        float sums[N] = {};
#pragma unroll 1
        for (u32 neighbour = 0; neighbour < 4; ++neighbour) {
            const u64 key = own - neighbour / 2 * line - neighbour % 2;
            for (u32 at = starts[key]; at < starts[key + 1]; ++at) {
                const u32 reader = readers[at], tap = reader % TAPS;
                const Point point{0, 0, parts[reader].row, parts[reader].column};
                const float factor = point.weight(neighbour);
                if (factor == 0) continue;
                float values[N];
                load_as_float(values, grad + u64(reader / TAPS) * map.channels + channel + within);
#pragma unroll
                for (int i = 0; i < N; ++i) sums[i] = fmaf(factor * weights[tap][within + i], values[i], sums[i]);
            }
        }
        store_from_float(gradient + cell * map.channels + channel + within, sums);
    }
}

// What a block of `weight_partials` keeps in shared memory.
struct Stage {
    Neighbours neighbours[CELLS * TAPS];
    Boundary boundaries[CELLS];
    float scratch[WEIGHT_GROUP * THREADS];
};

// partials: (gridDim.x, taps, channels)
template <int N, class T>
__device__ __forceinline__ void weight_partials(float* partials, const T* input, const RegressionMap<T>& raw,
                                                const T* grad, u64 cells_per_block, const BoundaryMap& map,
                                                Stage& stage) {
    const u32 channel = (blockIdx.y * WEIGHT_LANES + threadIdx.x) * N;
    const u64 first = blockIdx.x * cells_per_block, all = map.cells();
    const u64 end = all - first < cells_per_block ? all : first + cells_per_block;
    float sums[TAPS][N] = {};
    for (u64 tile = first; tile < end; tile += CELLS) {
        __syncthreads();  // the last tile may still be read
        stage_neighbours<CELLS>(stage.neighbours, stage.boundaries, raw, tile, map);
        __syncthreads();
        for (u32 i = threadIdx.y; channel < map.channels && i < CELLS && tile + i < end; i += WEIGHT_SLICES) {
            const u64 cell = tile + i;
            const T* image = input + cell / map.cells_of_image() * map.cells_of_image() * map.channels + channel;
            float gradient[N];
            load_as_float(gradient, grad + cell * map.channels + channel);
#pragma unroll
            for (u32 tap = 0; tap < TAPS; ++tap) {
                float values[N];
                sample(values, image, stage.neighbours[i * TAPS + tap], map.channels);
#pragma unroll
                for (int n = 0; n < N; ++n) sums[tap][n] = fmaf(gradient[n], values[n], sums[tap][n]);
            }
        }
    }
    // One copy of the code for all taps: the next one's sums always move to the front.
#pragma unroll 1
    for (u32 tap = 0; tap < TAPS; ++tap) {
        reduce_slices(sums[0], Sum{}, stage.scratch);
        if (threadIdx.y == 0 && channel < map.channels) {
            store_from_float(partials + (u64(blockIdx.x) * TAPS + tap) * map.channels + channel, sums[0]);
        }
#pragma unroll
        for (u32 i = 0; i + 1 < TAPS; ++i) {
#pragma unroll
            for (int n = 0; n < N; ++n) sums[i][n] = sums[i + 1][n];
        }
    }
}

// Sums over channels of g w times the derivative of the sample by row and by column, this lane's share.
template <int N, class T>
__device__ __forceinline__ Parts slopes(const T* image, const T* grad, const T* weight, const Point& point,
                                        const BoundaryMap& map) {
    const bool has[4] = {point.has(0, map.height, map.width), point.has(1, map.height, map.width),
                         point.has(2, map.height, map.width), point.has(3, map.height, map.width)};
    Parts sums = {};
    for (u32 channel = lane() * N; channel < map.channels; channel += 32 * N) {
        float x[4][N] = {}, g[N];
        load_as_float(g, grad + channel);
#pragma unroll
        for (u32 n = 0; n < 4; ++n) {
            if (has[n]) load_as_float(x[n], image + u64(point.pixel(n, map.width)) * map.channels + channel);
        }
#pragma unroll
        for (int i = 0; i < N; ++i) {
            const float factor = g[i] * to_float(weight[u64(channel + i) * TAPS]);
            const float left = x[2][i] - x[0][i], right = x[3][i] - x[1][i];
            const float upper = x[1][i] - x[0][i], lower = x[3][i] - x[2][i];
            sums.row += factor * fmaf(point.column_part, right - left, left);
            sums.column += factor * fmaf(point.row_part, lower - upper, upper);
        }
    }
    return sums;
}

// A row of the regression map's gradient, by a warp.
template <int N, class T>
__device__ __forceinline__ void boundary_gradient(void* gradient, const T* input, const RegressionMap<T>& raw,
                                                  const T* weight, const T* grad, u64 cell, const BoundaryMap& map) {
    const Boundary b = decode(raw, cell, map);
    const T* image = input + cell / map.cells_of_image() * map.cells_of_image() * map.channels;
    float left = 0, front = 0, right = 0, rear = 0, theta = 0;
#pragma unroll 1
    for (u32 tap = 0; tap < TAPS; ++tap) {
        const Point point = point_of_tap(b, cell, tap, map);
        if (point.row == OUTSIDE) continue;
        const Parts slope = slopes<N>(image, grad + cell * map.channels, weight + tap, point, map);
        const float down = slope.row * map.rows_per_metre, across = slope.column * map.columns_per_metre;
        const float u = across * b.cosine + down * b.sine, v = down * b.cosine - across * b.sine;
        const float alpha = map.scale * (float(tap / 3) - 1), beta = map.scale * (float(tap % 3) - 1);
        const Offset offset = offset_of_tap(b, tap, map.scale);
        front += u * 0.5f * (1 + beta);
        rear -= u * 0.5f * (1 - beta);
        left += v * 0.5f * (1 + alpha);
        right -= v * 0.5f * (1 - alpha);
        theta += down * (b.cosine * offset.u - b.sine * offset.v) - across * (b.sine * offset.u + b.cosine * offset.v);
    }
    left = warp_sum(left) * b.left;
    front = warp_sum(front) * b.front;
    right = warp_sum(right) * b.right;
    rear = warp_sum(rear) * b.rear;
    theta = warp_sum(theta) * 3.14159265358979f / map.bins;
    const u64 first = cell * map.outputs();
    const u32 residual = 4 + map.bins + best_bin(raw, first + 4, map.bins);
    for (u32 i = lane(); i < map.outputs(); i += 32) {
        float value = i == 0 ? left : i == 1 ? front : i == 2 ? right : i == 3 ? rear : i == residual ? theta : 0;
        // Where the clamps hold, nothing comes through.
        const float limit = i < 4 ? 7.0f : 1.0f;
        if ((i < 4 || map.clamp_residual) && fabsf(raw(first + i)) > limit) value = 0;
        if (map.wide) {
            static_cast<float*>(gradient)[first + i] = value;
        } else {
            static_cast<T*>(gradient)[first + i] = from_float<T>(value);
        }
    }
}

}  // namespace

// Upper left neighbours as numbers, the last one for taps outside of the map, and the fractional parts.
#define KEYS(suffix, T)                                                                             \
    extern "C" __global__ void __launch_bounds__(THREADS)                                           \
        denfi_conv_keys_##suffix(u32* keys, Parts* parts, const void* raw, BoundaryMap map) {       \
        const RegressionMap<T> source{raw, map.wide};                                               \
        const u64 lines = u64(map.height) + 1, columns = u64(map.width) + 1;                        \
        for (u64 at = grid_thread(); at < map.cells() * TAPS; at += grid_threads()) {               \
            const u64 cell = at / TAPS, image = cell / map.cells_of_image();                        \
            const Point point = point_of_tap(decode(source, cell, map), cell, u32(at % TAPS), map); \
            const u64 key = (image * lines + u64(point.row + 1)) * columns + u64(point.column + 1); \
            keys[at] = u32(point.row == OUTSIDE ? map.batch * lines * columns : key);               \
            parts[at] = {point.row_part, point.column_part};                                        \
        }                                                                                           \
    }
#define INPUT(suffix, T)                                                                                    \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                   \
        denfi_conv_input_gradient_##suffix(T* gradient, const T* grad, const T* weight, const Parts* parts, \
                                           const u32* readers, const u32* starts, BoundaryMap map) {        \
        SHARED_ARRAY(float, weights, [TAPS][CHANNELS]);                                                     \
        if (map.channels % WIDEST<T> == 0) {                                                                \
            input_gradient<WIDEST<T>>(gradient, grad, weight, parts, readers, starts, map, weights);        \
        } else {                                                                                            \
            input_gradient<1>(gradient, grad, weight, parts, readers, starts, map, weights);                \
        }                                                                                                   \
    }
#define WEIGHT(suffix, T)                                                                                        \
    extern "C" __global__ void __launch_bounds__(THREADS, 3) denfi_conv_weight_partials_##suffix(                \
        float* partials, const T* input, const void* raw, const T* grad, u64 cells_per_block, BoundaryMap map) { \
        SHARED_ARRAY(Stage, stage, [1]);                                                                         \
        const RegressionMap<T> source{raw, map.wide};                                                            \
        if (map.channels % WEIGHT_GROUP == 0) {                                                                  \
            weight_partials<WEIGHT_GROUP>(partials, input, source, grad, cells_per_block, map, *stage);          \
        } else {                                                                                                 \
            weight_partials<1>(partials, input, source, grad, cells_per_block, map, *stage);                     \
        }                                                                                                        \
    }                                                                                                            \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                        \
        denfi_conv_weight_sum_##suffix(T* gradient, const float* partials, u32 blocks, u32 channels) {           \
        const u64 elements = u64(channels) * TAPS;                                                               \
        for (u64 i = grid_thread(); i < elements; i += grid_threads()) {                                         \
            float sum = 0;                                                                                       \
            for (u32 block = 0; block < blocks; ++block) sum += partials[block * elements + i];                  \
            gradient[i % channels * TAPS + i / channels] = from_float<T>(sum);                                   \
        }                                                                                                        \
    }
#define BOUNDARY(suffix, T)                                                                                 \
    extern "C" __global__ void __launch_bounds__(THREADS) denfi_conv_boundary_gradient_##suffix(            \
        void* gradient, const T* input, const void* raw, const T* weight, const T* grad, BoundaryMap map) { \
        const RegressionMap<T> source{raw, map.wide};                                                       \
        for (u64 cell = grid_thread() / 32; cell < map.cells(); cell += grid_threads() / 32) {              \
            if (map.channels % WIDEST<T> == 0) {                                                            \
                boundary_gradient<WIDEST<T>>(gradient, input, source, weight, grad, cell, map);             \
            } else {                                                                                        \
                boundary_gradient<1>(gradient, input, source, weight, grad, cell, map);                     \
            }                                                                                               \
        }                                                                                                   \
    }
FOR_EACH_FLOAT(KEYS)
FOR_EACH_FLOAT(INPUT)
FOR_EACH_FLOAT(WEIGHT)
FOR_EACH_FLOAT(BOUNDARY)

KERNELS(denfi_conv_backward, KERNEL_FLOATS(denfi_conv_keys), KERNEL_FLOATS(denfi_conv_input_gradient),
        KERNEL_FLOATS(denfi_conv_weight_partials), KERNEL_FLOATS(denfi_conv_weight_sum),
        KERNEL_FLOATS(denfi_conv_boundary_gradient))

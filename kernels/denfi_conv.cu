// Boundary-tap depthwise convolution. Each cell has a box around it, given by a regression map; the nine taps of a
// 3 by 3 kernel read the corners, the middles of the edges and the centre of that box. With a, b in {-1, 0, 1}:
//
//   l, t, r, b = exp(clamp(raw, -7, 7))    theta = 2 pi (k + residual_k / 2) / bins, k the first of the largest scores
//   U = (t - b) / 2 + scale b (t + b) / 2  V = (l - r) / 2 + scale a (l + r) / 2
//   row = i + (sin U + cos V) / cell height   column = j + (cos U - sin V) / cell width
//   y[c] = sum over a, b of w[c, a, b] bilinear(x[c], row, column)
//
// A tap that is not in (-1, height) by (-1, width) reads 0; so do those of its four neighbours outside of the map.
//
// Tiling: a block for CELLS cells and CHANNELS channels. It decodes its cells once, keeps 4 places and 4 weights of each
// tap in shared memory (288 bytes per cell) beside the kernel as f32, and then takes 16 bytes of channels of a cell per
// thread, neighbours in channels side by side: each of the 36 reads of a cell is coalesced. Offsets, samples and sums
// never reach device memory. Where channels are no multiple of 16 bytes, a thread takes one.
// Bytes per cell: C values read once from device memory (36 times from the caches) and written once, 4 + 2 bins read.
// FLOPs: 90 per cell and channel. A map of 200 by 176 with 512 channels, batch 8, bf16: 577 MB, 134 us at 4.3 TB/s, if
// the neighbours of all cells stay in the L2 cache; 13 GFLOP of f32 FMAs, 0.2 of that time. The reads from the caches,
// 10 GB, take longer than either: bound by L1 and L2.

#include "common/kernel.cuh"

#include "common/boundary.cuh"

namespace {

constexpr u32 THREADS = 256;
// As in src/ops/denfi/gpu.rs.
constexpr u32 CELLS = 32;
constexpr u32 CHANNELS = 256;

// What a block keeps in shared memory.
struct Stage {
    Neighbours neighbours[CELLS * TAPS];
    Boundary boundaries[CELLS];
    float weights[TAPS][CHANNELS];
};

template <int N, class T>
__device__ __forceinline__ void forward(T* output, const T* input, const RegressionMap<T>& raw, const T* weight,
                                        const BoundaryMap& map, Stage& stage) {
    const u32 channel = blockIdx.y * CHANNELS;
    const u32 count = map.channels - channel < CHANNELS ? map.channels - channel : CHANNELS, groups = count / N;
    const u64 first = u64(blockIdx.x) * CELLS;
    for (u32 i = threadIdx.x; i < count * TAPS; i += THREADS) {
        stage.weights[i % TAPS][i / TAPS] = to_float(weight[u64(channel) * TAPS + i]);
    }
    stage_neighbours<CELLS>(stage.neighbours, stage.boundaries, raw, first, map);
    __syncthreads();
    for (u32 item = threadIdx.x; item < CELLS * groups; item += THREADS) {
        const u64 cell = first + item / groups;
        const u32 within = item % groups * N;
        if (cell >= map.cells()) break;
        const T* image = input + cell / map.cells_of_image() * map.cells_of_image() * map.channels + channel + within;
        float sums[N] = {};
#pragma unroll 3
        for (u32 tap = 0; tap < TAPS; ++tap) {
            float values[N];
            sample(values, image, stage.neighbours[item / groups * TAPS + tap], map.channels);
#pragma unroll
            for (int i = 0; i < N; ++i) sums[i] = fmaf(stage.weights[tap][within + i], values[i], sums[i]);
        }
        store_from_float(output + cell * map.channels + channel + within, sums);
    }
}

}  // namespace

#define INSTANCE(suffix, T)                                                                                         \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                           \
        denfi_conv_forward_##suffix(T* output, const T* input, const void* raw, const T* weight, BoundaryMap map) { \
        SHARED_ARRAY(Stage, stage, [1]);                                                                            \
        if (map.channels % WIDEST<T> == 0) {                                                                        \
            forward<WIDEST<T>>(output, input, RegressionMap<T>{raw, map.wide}, weight, map, *stage);                \
        } else {                                                                                                    \
            forward<1>(output, input, RegressionMap<T>{raw, map.wide}, weight, map, *stage);                        \
        }                                                                                                           \
    }
FOR_EACH_FLOAT(INSTANCE)

KERNELS(denfi_conv, KERNEL_FLOATS(denfi_conv_forward))

// Values of bytes, by a table for each channel: images as they are stored become normalised numbers.
//
//   y(i) = table(i mod channels, x(i))
//
// Tiling: a block of 256 threads holds the table in shared memory and strides over tiles of 4096 bytes. A thread takes
// 16 bytes of a tile in parts of as many as one store of 16 bytes holds values of, 8 in half precision and 4 in f32.
// The parts of neighbouring threads are neighbours, so that the loads and the stores of a warp are each one run of
// memory; all parts are loaded before the first is looked up. Which channel a part begins with is carried from one to
// the next without a division. There are at most as many blocks as the multiprocessors hold at once, since each reads
// the table.
// Bytes: 1 read and one value written per element, and the table. FLOPs: none. Bound by memory: the 32 lookups of a
// warp take one access of shared memory where its bytes are alike, about 3.5 where they are random.

#include "common/kernel.cuh"

#include "common/index.cuh"
#include "common/vector.cuh"

namespace {

// As in src/ops/look_up_bytes/gpu.rs.
constexpr u32 THREADS = 256;
constexpr int BYTES_PER_THREAD = 16;
constexpr u32 TILE = THREADS * BYTES_PER_THREAD;
constexpr u32 ROW = 256;

// A channel `by` further on; both are below `channels`.
__device__ __forceinline__ u32 advance(u32 channel, u32 by, u32 channels) {
    channel += by;
    return channel < channels ? channel : channel - channels;
}

template <class T>
__device__ void look_up_bytes(T* output, const u8* bytes, const T* table, u64 elements, u32 channels) {
    constexpr int N = WIDEST<T>, PARTS = BYTES_PER_THREAD / N;
    DYNAMIC_SHARED(shared);
    T* rows = reinterpret_cast<T*>(shared);
    for (u32 i = threadIdx.x * N; i < channels * ROW; i += THREADS * N) store(rows + i, load<N>(table + i));
    __syncthreads();

    const u32 to_next_part = THREADS * N % channels;
    const u32 to_next_tile = u32(u64(gridDim.x - 1) * TILE % channels);
    u64 first = u64(blockIdx.x) * TILE + threadIdx.x * N;
    u32 channel = u32(first % channels);
    for (; first < elements; first += u64(gridDim.x) * TILE) {
        Vector<u8, N> parts[PARTS];
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
            const u64 at = first + part * THREADS * N;
            parts[part] = load_tail<N>(bytes + at, i64(elements - at), u8(0));
        }
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
            const u64 at = first + part * THREADS * N;
            Vector<T, N> values;
            u32 own = channel;
#pragma unroll
            for (int i = 0; i < N; ++i) {
                values[i] = rows[own * ROW + parts[part][i]];
                own = advance(own, 1, channels);
            }
            store_tail(output + at, values, i64(elements - at));
            channel = advance(channel, to_next_part, channels);
        }
        channel = advance(channel, to_next_tile, channels);
    }
}

}  // namespace

#define INSTANCE(suffix, T)                                                                              \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                \
        look_up_bytes_##suffix(T* output, const u8* bytes, const T* table, u64 elements, u32 channels) { \
        look_up_bytes(output, bytes, table, elements, channels);                                         \
    }
FOR_EACH_FLOAT(INSTANCE)

KERNELS(look_up_bytes, KERNEL_FLOATS(look_up_bytes))

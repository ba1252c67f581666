// Reading by index, and adding by index. Tensors are (outer, axis, inner).
//
//   rows:      y[o, r, j] = x[o, index[r], j]          transpose:  x[o, s, j] += sum of y[o, r, j] with index[r] = s
//   elements:  y[o, r, j] = x[o, index[o, r, j], j]    transpose:  the same, with each element as a row of its own
//
// An index outside of the axis cannot stop the host without a wait: rows that are read there are NaN, and so is every
// sum of a scatter that has one.
//
// The sums are in the order of the readers r and without atomics: the readers are sorted by what they name, which makes
// those of a row a segment, and segments are summed. Sorting is a radix sort, 8 bits at a time from the lowest, each
// pass stable: blocks count the digits of their tiles, counts become offsets, blocks place their tiles in order. A
// segment that crosses the borders of tiles of SEGMENT_TILE readers is summed tile by tile first, so that few rows with
// many readers keep the machine as busy as many rows with few.
//
// Tiling: for gathers and sums a thread for 16 bytes of a row, or for one value where rows are no multiple of that; the
// grid strides over what is left. For the sort, blocks of 256 threads and tiles of SORT_TILE keys.
// Bytes: a gather reads and writes each value once, a scatter reads each value once and writes each sum once; a pass of
// the sort moves 20 bytes per index. FLOPs: one per value of a scatter. Bound by memory.

#include "common/kernel.cuh"

#include "common/index.cuh"
#include "common/reduce.cuh"
#include "common/vector.cuh"

namespace {

constexpr u32 THREADS = 256;
constexpr u32 WARPS = THREADS / 32;
// As in src/ops/gather/gpu.rs.
constexpr u32 SORT_TILE = 4 * THREADS;
constexpr u32 DIGITS = 256;
constexpr u32 SEGMENT_TILE = 64;
static_assert(DIGITS == THREADS);

// outer, source and result positions of the axis, inner.
struct Extents {
    u64 outer, source, result, inner;
};

template <class T> __device__ T not_a_number() { return from_float<T>(NAN); }

__device__ inline bool inside(i64 index, u64 extent) { return u64(index) < extent; }

template <int N, class T>
__device__ void gather_rows(T* output, const T* source, const i64* indices, const Extents& extents) {
    const u64 groups = extents.inner / N;
    for (u64 at = grid_thread(); at < extents.outer * extents.result * groups; at += grid_threads()) {
        const u64 row = at / groups, outer = row / extents.result;
        const i64 index = indices[row - outer * extents.result];
        Vector<T, N> values;
        if (inside(index, extents.source)) {
            values = load<N>(source + ((outer * extents.source + u64(index)) * groups + (at - row * groups)) * N);
        } else {
#pragma unroll
            for (int i = 0; i < N; ++i) values[i] = not_a_number<T>();
        }
        store(output + at * N, values);
    }
}

template <class T>
__device__ void gather_elements(T* output, const T* source, const i64* indices, const Extents& extents) {
    const u64 part = extents.result * extents.inner;
    for (u64 at = grid_thread(); at < extents.outer * part; at += grid_threads()) {
        const u64 outer = at / part;
        const i64 index = indices[at];
        output[at] = inside(index, extents.source)
                         ? source[(outer * extents.source + u64(index)) * extents.inner + at % extents.inner]
                         : not_a_number<T>();
    }
}

// The position among `rows` that each reader names; `rows` where that is outside.
__device__ inline u32 key_of(i64 index, u64 reader, const Extents& extents, u64 rows, bool elements) {
    if (!inside(index, extents.source)) return u32(rows);
    if (!elements) return u32(index);
    const u64 outer = reader / (extents.result * extents.inner);
    return u32((outer * extents.source + u64(index)) * extents.inner + reader % extents.inner);
}

// Which lanes of the warp hold the same digit; lanes without a key belong to none.
__device__ inline u32 lanes_with(u32 digit, bool present) {
    u32 same = __ballot_sync(0xFFFFFFFFu, present);
#pragma unroll
    for (u32 bit = 1; bit < DIGITS; bit *= 2) {
        const u32 set = __ballot_sync(0xFFFFFFFFu, (digit & bit) != 0);
        same &= digit & bit ? set : ~set;
    }
    return same;
}

// The sum over the threads before this one, and over all of them into `total`.
__device__ inline u32 exclusive_scan(u32 value, u32* warp_totals, u32& total) {
    u32 inclusive = value;
#pragma unroll
    for (u32 distance = 1; distance < 32; distance *= 2) {
        const u32 before = __shfl_up_sync(0xFFFFFFFFu, inclusive, distance);
        if (lane() >= distance) inclusive += before;
    }
    __syncthreads();  // an earlier scan may still be reading
    if (lane() == 31) warp_totals[warp()] = inclusive;
    __syncthreads();
    u32 before = 0;
    total = 0;
#pragma unroll
    for (u32 w = 0; w < WARPS; ++w) {
        before += w < warp() ? warp_totals[w] : 0;
        total += warp_totals[w];
    }
    return before + inclusive - value;
}

template <int N, class T>
__device__ void add_values(float (&sums)[N], const T* values, const u32* readers, u64 begin, u64 end, u64 inner) {
    for (u64 i = begin; i < end; ++i) {
        float row[N];
        load_as_float(row, values + readers[i] * inner);
#pragma unroll
        for (int j = 0; j < N; ++j) sums[j] += row[j];
    }
}

// What a tile adds to a segment that it shares with the tiles before it (head) or only with those after it (tail).
// partials: (outer, tiles, 2, inner)
template <int N, class T>
__device__ void segment_partials(float* partials, const T* values, const u32* keys, const u32* readers,
                                 const u32* starts, const Extents& extents) {
    const u64 groups = extents.inner / N, tiles = divide_up<u64>(extents.result, SEGMENT_TILE);
    for (u64 at = grid_thread(); at < extents.outer * tiles * groups; at += grid_threads()) {
        const u64 column = at % groups * N, outer = at / groups / tiles, tile = at / groups % tiles;
        const u64 begin = tile * SEGMENT_TILE;
        const u64 end = begin + SEGMENT_TILE < extents.result ? begin + SEGMENT_TILE : extents.result;
        const T* source = values + outer * extents.result * extents.inner + column;
        float* partial = partials + at / groups * 2 * extents.inner + column;
        const u32 first = keys[begin], last = keys[end - 1];
        if (starts[first] < begin) {
            const u64 segment_end = starts[first + 1];
            float sums[N] = {};
            add_values(sums, source, readers, begin, segment_end < end ? segment_end : end, extents.inner);
            store_from_float(partial, sums);
        }
        if (starts[last] >= begin && starts[last + 1] > end) {
            float sums[N] = {};
            add_values(sums, source, readers, starts[last], end, extents.inner);
            store_from_float(partial + extents.inner, sums);
        }
    }
}

// Each row of the source: `base`, or 0, and the rows of `values` that name it.
template <int N, class T>
__device__ void segment_sums(T* output, const T* base, const T* values, const float* partials, const u32* readers,
                             const u32* starts, const Extents& extents) {
    const u64 groups = extents.inner / N, tiles = divide_up<u64>(extents.result, SEGMENT_TILE);
    const bool all_inside = starts[extents.source] == extents.result;
    for (u64 at = grid_thread(); at < extents.outer * extents.source * groups; at += grid_threads()) {
        const u64 column = at % groups * N, row = at / groups, outer = row / extents.source;
        const u64 begin = starts[row - outer * extents.source], end = starts[row - outer * extents.source + 1];
        float sums[N] = {};
        if (base != nullptr) load_as_float(sums, base + at * N);
        if (begin / SEGMENT_TILE == (end - (end > begin)) / SEGMENT_TILE) {
            const T* source = values + outer * extents.result * extents.inner + column;
            add_values(sums, source, readers, begin, end, extents.inner);
        } else {
            const float* partial = partials + outer * tiles * 2 * extents.inner + column;
            for (u64 tile = begin / SEGMENT_TILE; tile <= (end - 1) / SEGMENT_TILE; ++tile) {
                const bool tail = tile * SEGMENT_TILE <= begin;
                float part[N];
                load_as_float(part, partial + (tile * 2 + tail) * extents.inner);
#pragma unroll
                for (int j = 0; j < N; ++j) sums[j] += part[j];
            }
        }
#pragma unroll
        for (int j = 0; j < N; ++j) sums[j] = all_inside ? sums[j] : NAN;
        store_from_float(output + at * N, sums);
    }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(THREADS)
    gather_keys(u32* keys, const i64* indices, u64 count, Extents extents, u64 rows, u32 elements) {
    for (u64 reader = grid_thread(); reader < count; reader += grid_threads()) {
        keys[reader] = key_of(indices[reader], reader, extents, rows, elements);
    }
}

// counts (digits, tiles): keys of each tile with each digit.
extern "C" __global__ void __launch_bounds__(THREADS)
    gather_sort_count(u32* counts, const u32* keys, u64 count, u32 shift) {
    SHARED_ARRAY(u32, digits, [DIGITS]);
    digits[threadIdx.x] = 0;
    __syncthreads();
    const u64 first = u64(blockIdx.x) * SORT_TILE;
    for (u64 i = first + threadIdx.x; i < first + SORT_TILE && i < count; i += THREADS) {
        atomicAdd(&digits[keys[i] >> shift & (DIGITS - 1)], 1u);
    }
    __syncthreads();
    counts[u64(threadIdx.x) * gridDim.x + blockIdx.x] = digits[threadIdx.x];
}

// A block for each digit: its counts become the number of keys in the tiles before, and `totals` all of its keys.
extern "C" __global__ void __launch_bounds__(THREADS) gather_sort_scan(u32* counts, u32* totals, u64 tiles) {
    SHARED_ARRAY(u32, warp_totals, [WARPS]);
    u32* row = counts + blockIdx.x * tiles;
    u32 before = 0;
    for (u64 first = 0; first < tiles; first += THREADS) {
        const u64 tile = first + threadIdx.x;
        u32 total;
        const u32 offset = exclusive_scan(tile < tiles ? row[tile] : 0, warp_totals, total);
        if (tile < tiles) row[tile] = before + offset;
        before += total;
    }
    if (threadIdx.x == 0) totals[blockIdx.x] = before;
}

// Moves each key behind the keys with a smaller digit and those before it with the same. In the first pass the readers,
// then null, are in order.
extern "C" __global__ void __launch_bounds__(THREADS)
    gather_sort_place(u32* sorted_keys, u32* sorted_readers, const u32* keys, const u32* readers, const u32* counts,
                      const u32* totals, u64 count, u32 shift) {
    SHARED_ARRAY(u32, warp_totals, [WARPS]);
    SHARED_ARRAY(u32, offsets, [WARPS][DIGITS]);
    u32 all;
    const u32 digit_of_thread = threadIdx.x;
    u32 next = exclusive_scan(totals[digit_of_thread], warp_totals, all) +
               counts[u64(digit_of_thread) * gridDim.x + blockIdx.x];
    const u64 first = u64(blockIdx.x) * SORT_TILE;
    for (u64 round = first; round < first + SORT_TILE && round < count; round += THREADS) {
        const u64 i = round + threadIdx.x;
        const bool present = i < count;
        const u32 key = present ? keys[i] : 0, digit = key >> shift & (DIGITS - 1);
        const u32 same = lanes_with(digit, present), before = __popc(same & ((1u << lane()) - 1));
#pragma unroll
        for (u32 w = 0; w < WARPS; ++w) offsets[w][threadIdx.x] = 0;
        __syncthreads();
        if (present && before == 0) offsets[warp()][digit] = __popc(same);
        __syncthreads();
#pragma unroll
        for (u32 w = 0; w < WARPS; ++w) {
            const u32 keys_of_warp = offsets[w][digit_of_thread];
            offsets[w][digit_of_thread] = next;
            next += keys_of_warp;
        }
        __syncthreads();
        if (present) {
            const u32 to = offsets[warp()][digit] + before;
            sorted_keys[to] = key;
            sorted_readers[to] = readers != nullptr ? readers[i] : u32(i);
        }
        __syncthreads();
    }
}

// starts[k]: how many of the sorted keys are smaller than k, for k up to rows + 1.
extern "C" __global__ void __launch_bounds__(THREADS)
    gather_starts(u32* starts, const u32* sorted_keys, u64 count, u64 rows) {
    for (u64 key = grid_thread(); key < rows + 2; key += grid_threads()) {
        u64 low = 0, high = count;
        while (low < high) {
            const u64 middle = (low + high) / 2;
            if (sorted_keys[middle] < key) {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        starts[key] = u32(low);
    }
}

#define INSTANCE(suffix, T)                                                                                          \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                            \
        gather_rows_##suffix(T* output, const T* source, const i64* indices, Extents extents) {                      \
        if (extents.inner % WIDEST<T> == 0) {                                                                        \
            gather_rows<WIDEST<T>>(output, source, indices, extents);                                                \
        } else {                                                                                                     \
            gather_rows<1>(output, source, indices, extents);                                                        \
        }                                                                                                            \
    }                                                                                                                \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                            \
        gather_elements_##suffix(T* output, const T* source, const i64* indices, Extents extents) {                  \
        gather_elements<T>(output, source, indices, extents);                                                        \
    }                                                                                                                \
    extern "C" __global__ void __launch_bounds__(THREADS) gather_segment_partials_##suffix(                          \
        float* partials, const T* values, const u32* keys, const u32* readers, const u32* starts, Extents extents) { \
        if (extents.inner % WIDEST<T> == 0) {                                                                        \
            segment_partials<WIDEST<T>>(partials, values, keys, readers, starts, extents);                           \
        } else {                                                                                                     \
            segment_partials<1>(partials, values, keys, readers, starts, extents);                                   \
        }                                                                                                            \
    }                                                                                                                \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                            \
        gather_segment_sums_##suffix(T* output, const T* base, const T* values, const float* partials,               \
                                     const u32* readers, const u32* starts, Extents extents) {                       \
        if (extents.inner % WIDEST<T> == 0) {                                                                        \
            segment_sums<WIDEST<T>>(output, base, values, partials, readers, starts, extents);                       \
        } else {                                                                                                     \
            segment_sums<1>(output, base, values, partials, readers, starts, extents);                               \
        }                                                                                                            \
    }
FOR_EACH_FLOAT(INSTANCE)

KERNELS(gather, KERNEL_FLOATS(gather_rows), KERNEL_FLOATS(gather_elements), KERNEL(gather_keys),
        KERNEL(gather_sort_count), KERNEL(gather_sort_scan), KERNEL(gather_sort_place), KERNEL(gather_starts),
        KERNEL_FLOATS(gather_segment_partials), KERNEL_FLOATS(gather_segment_sums))

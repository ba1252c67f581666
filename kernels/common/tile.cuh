// Tiles of a matrix in shared memory, and their way there.
#pragma once
#include "common/async_copy.cuh"
#include "common/vector.cuh"

// LINES lines of LENGTH elements. A line is cut into chunks of 16 bytes, and chunk c of a line stands where chunk
// c XOR (a function of the line) would, so that the 8 chunks of equal number in 8 lines one after the other (what
// ldmatrix reads) lie in different banks, and so do the chunks of one line (what a copy writes):
//
//   bytes of a line    32            64            128 and more
//   XOR with           line / 4 % 2  line / 2 % 4  line % 8
template <class T, u32 LINES, u32 LENGTH> struct SharedTile {
    static constexpr u32 CHUNK = 16 / sizeof(T);   // elements of a chunk
    static constexpr u32 CHUNKS = LENGTH / CHUNK;  // chunks of a line
    static constexpr u32 SIZE = LINES * LENGTH;    // elements
    static_assert(CHUNKS >= 2 && (CHUNKS & (CHUNKS - 1)) == 0, "a line is 32, 64, 128 … bytes");

    // First element of a chunk.
    static __device__ __forceinline__ u32 offset(u32 line, u32 chunk) {
        constexpr u32 CYCLE = CHUNKS < 8 ? CHUNKS : 8;
        return (line * CHUNKS + (chunk ^ (line / (8 / CYCLE) % CYCLE))) * CHUNK;
    }
};

// Elements that follow each other in memory: `valid` of them, from `first`; those after them count as zeros.
template <class T> struct Run {
    const T* first;
    u32 valid;
};

// A source is what a matrix product reads an operand from: A by (row, k), B by (column, k), called (line, k) here.
//
//   using Element = …;                            f32, bf16 or f16
//   static constexpr bool ALONG_K;                neighbours in memory are neighbours in k, not lines
//   static constexpr u32 RUN;                     elements that may be read at once
//   Run<Element> operator()(u32 line, u32 k);     the elements from (line, k) on, along k or along lines
//
// It is asked at multiples of RUN along its memory, where `first` must be a multiple of RUN elements unless nothing is
// valid, and for any line and k of the tiles, those beyond the matrix too, where nothing is valid. RUN is 1, 2, 4 … up
// to 16 bytes; 16 bytes give the fastest copies.

// A matrix as it lies in memory.
template <class T, bool ALONG_K_, u32 RUN_> struct MatrixSource {
    using Element = T;
    static constexpr bool ALONG_K = ALONG_K_;
    static constexpr u32 RUN = RUN_;

    const T* data;
    u32 lines, depth;
    // Elements from a line to the next where memory is along k, else from a k to the next.
    u64 stride;

    __device__ __forceinline__ Run<T> operator()(u32 line, u32 k) const {
        const bool inside = line < lines && k < depth;
        if constexpr (ALONG_K) {
            return {data + line * stride + k, inside ? depth - k : 0};
        } else {
            return {data + k * stride + line, inside ? lines - line : 0};
        }
    }
};

// The tile that `load_tile` fills: memory stays contiguous along what it is contiguous along.
template <class Source, u32 LINES, u32 DEPTH>
using TileOf = SharedTile<typename Source::Element, Source::ALONG_K ? LINES : DEPTH, Source::ALONG_K ? DEPTH : LINES>;

// Begins to copy a tile of LINES by DEPTH elements from (line, k) on, zeros where the source has none, by THREADS
// threads. Complete after `async_commit`, `async_wait` and a barrier.
template <u32 LINES, u32 DEPTH, u32 THREADS, class Source>
__device__ __forceinline__ void load_tile(typename Source::Element* tile, const Source& source, u32 line, u32 k) {
    using T = typename Source::Element;
    using Tile = TileOf<Source, LINES, DEPTH>;
    constexpr u32 CHUNK = Tile::CHUNK, TOTAL = Tile::SIZE / CHUNK, RUN = Source::RUN < CHUNK ? Source::RUN : CHUNK;
    static_assert(TOTAL % THREADS == 0, "every thread copies the same number of chunks");
    // Element by element a chunk is long enough as it is.
    constexpr bool COPIED = RUN * sizeof(T) >= 4;
#pragma unroll(COPIED ? TOTAL / THREADS : 1)
    for (u32 copied = 0; copied < TOTAL; copied += THREADS) {
        const u32 index = copied + linear_thread();
        const u32 across = index / Tile::CHUNKS, chunk = index % Tile::CHUNKS;
        T* to = tile + Tile::offset(across, chunk);
        const auto run_at = [&](u32 i) {
            const u32 along = chunk * CHUNK + i;
            return Source::ALONG_K ? source(line + across, k + along) : source(line + along, k + across);
        };
        if constexpr (COPIED) {
#pragma unroll
            for (u32 i = 0; i < CHUNK; i += RUN) {
                const Run<T> run = run_at(i);
                async_copy<RUN * sizeof(T)>(to + i, run.first, (run.valid < RUN ? run.valid : RUN) * sizeof(T));
            }
        } else {
            Vector<T, CHUNK> elements;
#pragma unroll
            for (u32 i = 0; i < CHUNK; ++i) {
                const Run<T> run = run_at(i);
                elements[i] = run.valid > 0 ? *run.first : from_float<T>(0);
            }
            store(to, elements);
        }
    }
}

// The main loops of matrix products: a block computes a tile of C (m, n) = A (m, k) B (k, n) from two sources (see
// tile.cuh), so that products, convolutions and embeddings differ in their addresses alone.
//
//   TensorTile  bf16 or f16 on tensor cores, sums in f32. Per step of K: (M + N) K elements from memory, 2 M N K FLOPs.
//   SimtTile    f32 by fused multiply-adds, each sum in the order of k: the same bits whatever the tile.
//
// Both keep STAGES tiles of each operand in shared memory: one in use, the others on their way.
//
//   using Tile = TensorTile<bf16, 128, 128, 32, 2, 4, 3>;
//   SHARED_ARRAY(...) or dynamic memory: Tile::SHARED_BYTES bytes, a multiple of 16
//   Tile tile;
//   tile.clear();
//   tile.accumulate(a, b, row, column, 0, depth, shared);
//   tile.for_each_pair(row, column, [&](u32 row, u32 column, float first, float second) { … });
#pragma once
#include "common/mma.cuh"
#include "common/tile.cuh"

// Fragment A (16, 16) of a tile in shared memory, from (row, k) on.
template <class Source, u32 LINES, u32 DEPTH>
__device__ __forceinline__ void load_fragment_a(u32 (&a)[4], const typename Source::Element* tile, u32 row, u32 k) {
    using Tile = TileOf<Source, LINES, DEPTH>;
    if constexpr (Source::ALONG_K) {
        ldmatrix_x4(a, tile + Tile::offset(row + lane() % 16, k / 8 + lane() / 16));
    } else {
        ldmatrix_x4_transposed(a, tile + Tile::offset(k + lane() / 16 * 8 + lane() % 8, row / 8 + lane() / 8 % 2));
    }
}

// Fragments B (16, 8) of columns `column` to + 7 in b[0..2] and + 8 to + 15 in b[2..4].
template <class Source, u32 LINES, u32 DEPTH>
__device__ __forceinline__ void load_fragments_b(u32 (&b)[4], const typename Source::Element* tile, u32 column, u32 k) {
    using Tile = TileOf<Source, LINES, DEPTH>;
    if constexpr (Source::ALONG_K) {
        ldmatrix_x4(b, tile + Tile::offset(column + lane() / 16 * 8 + lane() % 8, k / 8 + lane() / 8 % 2));
    } else {
        ldmatrix_x4_transposed(b, tile + Tile::offset(k + lane() % 16, column / 8 + lane() / 16));
    }
}

// The loop that both tiles share. `fetch(stage, k)` begins the copies of a stage, `multiply(stage)` uses it.
template <u32 DEPTH, u32 STAGES, class Fetch, class Multiply>
__device__ __forceinline__ void pipeline(u32 first, u32 end, Fetch fetch, Multiply multiply) {
    static_assert(STAGES >= 2);
    u32 next = first, stage_in = 0, stage_out = 0;
    const auto fetch_next = [&] {
        if (next < end) fetch(stage_in, next);
        async_commit();  // an empty group at the end, so that groups can be counted
        next += DEPTH;
        stage_in = stage_in + 1 == STAGES ? 0 : stage_in + 1;
    };
#pragma unroll 1
    for (u32 stage = 0; stage < STAGES - 1; ++stage) fetch_next();
#pragma unroll 1
    for (u32 k = first; k < end; k += DEPTH) {
        async_wait<STAGES - 2>();
        __syncthreads();  // this stage is there for all, and none still reads the one that is fetched next
        fetch_next();
        multiply(stage_out);
        stage_out = stage_out + 1 == STAGES ? 0 : stage_out + 1;
    }
    async_wait<0>();
    __syncthreads();  // the caller may use the memory for something else
}

// M by N sums of a block of WARPS_M by WARPS_N warps, K products at a time.
template <class T, u32 M_, u32 N_, u32 K_, u32 WARPS_M, u32 WARPS_N, u32 STAGES> struct TensorTile {
    using Element = T;
    static constexpr u32 M = M_, N = N_, K = K_, THREADS = 32 * WARPS_M * WARPS_N;
    static constexpr u32 STAGE = (M + N) * K;  // elements of a stage
    static constexpr u32 SHARED_BYTES = STAGES * STAGE * sizeof(T);
    static constexpr u32 ROWS = M / WARPS_M, COLUMNS = N / WARPS_N;  // of a warp
    static_assert(ROWS % 16 == 0 && COLUMNS % 16 == 0 && K % 16 == 0);

    float sums[ROWS / 16][COLUMNS / 8][4];

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (auto& row : sums) {
#pragma unroll
            for (auto& fragment : row) fragment[0] = fragment[1] = fragment[2] = fragment[3] = 0;
        }
    }

    // Adds the products of k in [first, end) for the rows of `a` from `row` and of `b` from `column` on. `end - first`
    // is a multiple of K, or `end` the depth of both sources.
    template <class A, class B>
    __device__ __forceinline__ void accumulate(const A& a, const B& b, u32 row, u32 column, u32 first, u32 end,
                                               void* shared) {
        T* stages = static_cast<T*>(shared);
        pipeline<K, STAGES>(
            first, end,
            [&](u32 stage, u32 k) {
                load_tile<M, K, THREADS>(stages + stage * STAGE, a, row, k);
                load_tile<N, K, THREADS>(stages + stage * STAGE + M * K, b, column, k);
            },
            [&](u32 stage) { multiply<A, B>(stages + stage * STAGE, stages + stage * STAGE + M * K); });
    }

    // Calls `f(row, column, first, second)` for all sums of this thread, neighbours in a row by two. `column` is even
    // relative to the tile's. Bounds are the caller's affair.
    template <class F> __device__ __forceinline__ void for_each_pair(u32 row, u32 column, F f) const {
        row += warp_row() + lane() / 4;
        column += warp_column() + lane() % 4 * 2;
#pragma unroll
        for (u32 i = 0; i < ROWS / 16; ++i) {
#pragma unroll
            for (u32 j = 0; j < COLUMNS / 8; ++j) {
                f(row + i * 16, column + j * 8, sums[i][j][0], sums[i][j][1]);
                f(row + i * 16 + 8, column + j * 8, sums[i][j][2], sums[i][j][3]);
            }
        }
    }

  private:
    static __device__ __forceinline__ u32 warp_row() { return warp() / WARPS_N * ROWS; }
    static __device__ __forceinline__ u32 warp_column() { return warp() % WARPS_N * COLUMNS; }

    template <class A, class B> __device__ __forceinline__ void multiply(const T* tile_a, const T* tile_b) {
#pragma unroll
        for (u32 k = 0; k < K; k += 16) {
            u32 a[ROWS / 16][4], b[COLUMNS / 16][4];
#pragma unroll
            for (u32 i = 0; i < ROWS / 16; ++i) load_fragment_a<A, M, K>(a[i], tile_a, warp_row() + i * 16, k);
#pragma unroll
            for (u32 j = 0; j < COLUMNS / 16; ++j) load_fragments_b<B, N, K>(b[j], tile_b, warp_column() + j * 16, k);
#pragma unroll
            for (u32 i = 0; i < ROWS / 16; ++i) {
#pragma unroll
                for (u32 j = 0; j < COLUMNS / 8; ++j) {
                    const u32 column[2] = {b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]};
                    mma_m16n8k16<T>(sums[i][j], a[i], column);
                }
            }
        }
    }
};

// M by N sums in f32, TM by TN of each thread in squares of 4 by 4, K products at a time.
template <u32 M_, u32 N_, u32 K_, u32 TM, u32 TN, u32 STAGES> struct SimtTile {
    using Element = float;
    static constexpr u32 M = M_, N = N_, K = K_, THREADS = M / TM * (N / TN);
    static constexpr u32 STAGE = (M + 4 + N + 4) * K;  // elements of a stage
    static constexpr u32 SHARED_BYTES = STAGES * STAGE * sizeof(float);
    static constexpr u32 DOWN = M / TM, ACROSS = N / TN;  // threads
    static_assert(TM % 4 == 0 && TN % 4 == 0 && K % 8 == 0 && DOWN % 4 == 0 && ACROSS % 8 == 0);

    float sums[TM][TN];

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (auto& row : sums) {
#pragma unroll
            for (float& sum : row) sum = 0;
        }
    }

    // As TensorTile's.
    template <class A, class B>
    __device__ __forceinline__ void accumulate(const A& a, const B& b, u32 row, u32 column, u32 first, u32 end,
                                               void* shared) {
        float* stages = static_cast<float*>(shared);
        pipeline<K, STAGES>(
            first, end,
            [&](u32 stage, u32 k) {
                load_by_k<M>(stages + stage * STAGE, a, row, k);
                load_by_k<N>(stages + stage * STAGE + (M + 4) * K, b, column, k);
            },
            [&](u32 stage) { multiply(stages + stage * STAGE, stages + stage * STAGE + (M + 4) * K); });
    }

    // As TensorTile's.
    template <class F> __device__ __forceinline__ void for_each_pair(u32 row, u32 column, F f) const {
        row += thread_row();
        column += thread_column();
#pragma unroll
        for (u32 i = 0; i < TM; ++i) {
#pragma unroll
            for (u32 j = 0; j < TN; j += 2) {
                f(row + i / 4 * (DOWN * 4) + i % 4, column + j / 4 * (ACROSS * 4) + j % 4, sums[i][j], sums[i][j + 1]);
            }
        }
    }

  private:
    // A warp is 4 threads down and 8 across: it reads 16 rows of A and 32 columns of B at once, each in one go.
    static __device__ __forceinline__ u32 thread_row() { return (warp() / (ACROSS / 8) * 4 + lane() / 8) * 4; }
    static __device__ __forceinline__ u32 thread_column() { return (warp() % (ACROSS / 8) * 8 + lane() % 8) * 4; }

    // A tile as lines of equal k, 4 elements apart. Memory along k is turned element by element: a warp copies 8
    // neighbours of 4 lines, whole 32-byte sectors from memory and 32 different banks to.
    template <u32 LINES, class Source>
    static __device__ __forceinline__ void load_by_k(float* tile, const Source& source, u32 line, u32 k) {
        constexpr u32 PITCH = LINES + 4, RUN = Source::ALONG_K ? 1 : Source::RUN < 4 ? Source::RUN : 4;
        constexpr u32 TOTAL = LINES * K / RUN;
        static_assert(TOTAL % THREADS == 0, "every thread copies the same number of runs");
#pragma unroll
        for (u32 copied = 0; copied < TOTAL; copied += THREADS) {
            const u32 index = copied + linear_thread();
            const u32 i = Source::ALONG_K ? index / 8 % LINES : index % (LINES / RUN) * RUN;
            const u32 depth = Source::ALONG_K ? index / 8 / LINES * 8 + index % 8 : index / (LINES / RUN);
            const Run<float> run = source(line + i, k + depth);
            async_copy<RUN * 4>(tile + depth * PITCH + i, run.first, (run.valid < RUN ? run.valid : RUN) * 4);
        }
    }

    __device__ __forceinline__ void multiply(const float* tile_a, const float* tile_b) {
#pragma unroll
        for (u32 k = 0; k < K; ++k) {
            float a[TM], b[TN];
            load_four_by_four<DOWN>(a, tile_a + k * (M + 4) + thread_row());
            load_four_by_four<ACROSS>(b, tile_b + k * (N + 4) + thread_column());
#pragma unroll
            for (u32 i = 0; i < TM; ++i) {
#pragma unroll
                for (u32 j = 0; j < TN; ++j) sums[i][j] = fmaf(a[i], b[j], sums[i][j]);
            }
        }
    }

    template <u32 GROUPS, u32 COUNT>
    static __device__ __forceinline__ void load_four_by_four(float (&values)[COUNT], const float* from) {
#pragma unroll
        for (u32 i = 0; i < COUNT; i += 4) {
            const Vector<float, 4> four = load<4>(from + i * GROUPS);
#pragma unroll
            for (u32 j = 0; j < 4; ++j) values[i + j] = four[j];
        }
    }
};

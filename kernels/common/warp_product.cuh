// Products of one warp: 16 rows of sums, with operands in shared tiles (tile.cuh) or in registers. bf16 and f16 go to
// tensor cores, f32 to fused multiply-adds; the sums lie in registers in the same places for all:
//
//   sums[n]: with g = lane / 4 and t = lane % 4,   [0], [1]  row g,     columns 8n + 2t, 8n + 2t + 1
//                                                  [2], [3]  row g + 8, the same columns
//
// Counts (`columns`, `depth`) are the same for all lanes; tiles are readable, and finite where it matters, up to the
// next multiple of 16.
#pragma once
#include "common/mma.cuh"
#include "common/reduce.cuh"
#include "common/tile.cuh"

template <u32 N> __device__ __forceinline__ void clear(float (&sums)[N][4]) {
#pragma unroll
    for (auto& fragment : sums) fragment[0] = fragment[1] = fragment[2] = fragment[3] = 0;
}

namespace warp_product {

// The lane, read anew: what is computed from it stays where it is written. The compiler would else compute the
// addresses of every product before the loops around them, and run out of registers.
__device__ __forceinline__ u32 fresh_lane() {
#ifdef __CUDACC__
    u32 value;
    asm volatile("mov.u32 %0, %%laneid;" : "=r"(value));
    return value;
#else
    return lane();
#endif
}

// The same value, as if computed here: sums with it are not kept in registers from before the loops around them.
__device__ __forceinline__ u64 fresh(u64 value) {
#ifdef __CUDACC__
    asm volatile("" : "+l"(value));
#endif
    return value;
}

// Both columns' products of a pair of B fragments; the second only where it is wanted.
template <class T> __device__ __forceinline__ void multiply_pair(float (&first)[4], float (&second)[4],
                                                                 const u32 (&a)[4], const u32 (&b)[4], bool both) {
    const u32 left[2] = {b[0], b[1]}, right[2] = {b[2], b[3]};
    mma_m16n8k16<T>(first, a, left);
    if (both) mma_m16n8k16<T>(second, a, right);
}

// sums += (a_low, a_high)ᵀ times two columns of B.
__device__ __forceinline__ void multiply_outer(float (&sums)[4], float a_low, float a_high, float b0, float b1) {
    sums[0] = fmaf(a_low, b0, sums[0]);
    sums[1] = fmaf(a_low, b1, sums[1]);
    sums[2] = fmaf(a_high, b0, sums[2]);
    sums[3] = fmaf(a_high, b1, sums[3]);
}

}  // namespace warp_product

// sums += A Bᵀ: A the rows from `row` on of tile `a`, B the first `columns` rows of tile `b`, both of D elements.
template <class T, u32 D, u32 N>
__device__ __forceinline__ void multiply_by_transposed(float (&sums)[N][4], const T* a, u32 row, const T* b,
                                                       u32 columns) {
    using Tile = SharedTile<T, 16, D>;
    const u32 lane = warp_product::fresh_lane();
    if constexpr (sizeof(T) == 2) {
#pragma unroll 2
        for (u32 k = 0; k < D / 16; ++k) {
            u32 left[4], right[4];
            ldmatrix_x4(left, a + Tile::offset(row + lane % 16, k * 2 + lane / 16));
#pragma unroll
            for (u32 n = 0; n < N; n += 2) {
                if (n * 8 >= columns) continue;
                ldmatrix_x4(right, b + Tile::offset(n * 8 + lane / 16 * 8 + lane % 8, k * 2 + lane / 8 % 2));
                warp_product::multiply_pair<T>(sums[n], sums[n + 1], left, right, n * 8 + 8 < columns);
            }
        }
    } else {
        const u32 g = lane / 4, t = lane % 4;
#pragma unroll 1
        for (u32 k = 0; k < D / 4; ++k) {
            const Vector<float, 4> low = load<4>(a + Tile::offset(row + g, k));
            const Vector<float, 4> high = load<4>(a + Tile::offset(row + g + 8, k));
#pragma unroll
            for (u32 n = 0; n < N; ++n) {
                if (n * 8 >= columns) continue;
                const Vector<float, 4> b0 = load<4>(b + Tile::offset(n * 8 + 2 * t, k));
                const Vector<float, 4> b1 = load<4>(b + Tile::offset(n * 8 + 2 * t + 1, k));
#pragma unroll
                for (u32 i = 0; i < 4; ++i) warp_product::multiply_outer(sums[n], low[i], high[i], b0[i], b1[i]);
            }
        }
    }
}

// sums += A B: A (16, 8 N) as sums of an earlier product, rounded to T; B the first `depth` rows of tile `b`, its
// columns from `column` on.
template <class T, u32 D, u32 N, u32 C>
__device__ __forceinline__ void multiply_registers(float (&sums)[C][4], const float (&a)[N][4], const T* b, u32 column,
                                                   u32 depth) {
    using Tile = SharedTile<T, 16, D>;
    const u32 lane = warp_product::fresh_lane();
    if constexpr (sizeof(T) == 2) {
#pragma unroll
        for (u32 n = 0; n < N; n += 2) {
            if (n * 8 >= depth) continue;
            const u32 left[4] = {pack<T>(a[n][0], a[n][1]), pack<T>(a[n][2], a[n][3]),
                                 pack<T>(a[n + 1][0], a[n + 1][1]), pack<T>(a[n + 1][2], a[n + 1][3])};
#pragma unroll
            for (u32 c = 0; c < C; c += 2) {
                u32 right[4];
                ldmatrix_x4_transposed(right, b + Tile::offset(n * 8 + lane % 16, column / 8 + c + lane / 16));
                warp_product::multiply_pair<T>(sums[c], sums[c + 1], left, right, true);
            }
        }
    } else {
        const u32 quad = lane / 4 * 4, t = lane % 4;
#pragma unroll
        for (u32 n = 0; n < N; ++n) {
            if (n * 8 >= depth) continue;
#pragma unroll 1
            for (u32 owner = 0; owner < 4; ++owner) {
#pragma unroll
                for (u32 i = 0; i < 2; ++i) {
                    const float low = __shfl_sync(0xFFFFFFFFu, a[n][i], quad + owner);
                    const float high = __shfl_sync(0xFFFFFFFFu, a[n][2 + i], quad + owner);
#pragma unroll
                    for (u32 c = 0; c < C; ++c) {
                        const u32 at = column + c * 8 + 2 * t;
                        const Vector<float, 2> pair = load<2>(b + Tile::offset(n * 8 + owner * 2 + i, at / 4) + at % 4);
                        warp_product::multiply_outer(sums[c], low, high, pair[0], pair[1]);
                    }
                }
            }
        }
    }
}

// sums += A B: A the 16 rows from `row` on of tile `a` (LENGTH to a line), B the first `depth` rows of tile `b`, its
// columns from `column` on.
template <class T, u32 D, u32 LENGTH, u32 C>
__device__ __forceinline__ void multiply_rows(float (&sums)[C][4], const T* a, u32 row, const T* b, u32 column,
                                              u32 depth) {
    using Left = SharedTile<T, 16, LENGTH>;
    using Right = SharedTile<T, 16, D>;
    const u32 lane = warp_product::fresh_lane();
    if constexpr (sizeof(T) == 2) {
#pragma unroll 1
        for (u32 k = 0; k < depth; k += 16) {
            u32 left[4], right[4];
            ldmatrix_x4(left, a + Left::offset(row + lane % 16, k / 8 + lane / 16));
#pragma unroll
            for (u32 c = 0; c < C; c += 2) {
                ldmatrix_x4_transposed(right, b + Right::offset(k + lane % 16, column / 8 + c + lane / 16));
                warp_product::multiply_pair<T>(sums[c], sums[c + 1], left, right, true);
            }
        }
    } else {
        const u32 g = lane / 4, t = lane % 4;
#pragma unroll 1
        for (u32 k = 0; k < depth; k += 4) {
            const Vector<float, 4> low = load<4>(a + Left::offset(row + g, k / 4));
            const Vector<float, 4> high = load<4>(a + Left::offset(row + g + 8, k / 4));
#pragma unroll
            for (u32 i = 0; i < 4; ++i) {
#pragma unroll
                for (u32 c = 0; c < C; ++c) {
                    const u32 at = column + c * 8 + 2 * t;
                    const Vector<float, 2> pair = load<2>(b + Right::offset(k + i, at / 4) + at % 4);
                    warp_product::multiply_outer(sums[c], low[i], high[i], pair[0], pair[1]);
                }
            }
        }
    }
}

// sums += Aᵀ B: A the columns from `row` on of tile `a` (LENGTH to a line), B all D columns of tile `b`; `depth` lines
// of each.
template <class T, u32 D, u32 LENGTH, u32 C>
__device__ __forceinline__ void multiply_transposed(float (&sums)[C][4], const T* a, u32 row, const T* b, u32 depth) {
    using Left = SharedTile<T, 16, LENGTH>;
    using Right = SharedTile<T, 16, D>;
    const u32 lane = warp_product::fresh_lane();
    if constexpr (sizeof(T) == 2) {
#pragma unroll 1
        for (u32 k = 0; k < depth; k += 16) {
            u32 left[4], right[4];
            const u32 line = k + lane / 16 * 8 + lane % 8;
            ldmatrix_x4_transposed(left, a + Left::offset(line, row / 8 + lane / 8 % 2));
#pragma unroll
            for (u32 c = 0; c < C; c += 2) {
                ldmatrix_x4_transposed(right, b + Right::offset(k + lane % 16, c + lane / 16));
                warp_product::multiply_pair<T>(sums[c], sums[c + 1], left, right, true);
            }
        }
    } else {
        const u32 low = row + lane / 4, high = low + 8, t = lane % 4;
#pragma unroll 1
        for (u32 k = 0; k < depth; ++k) {
            const float a_low = a[Left::offset(k, low / 4) + low % 4], a_high = a[Left::offset(k, high / 4) + high % 4];
#pragma unroll
            for (u32 c = 0; c < C; ++c) {
                const u32 at = c * 8 + 2 * t;
                const Vector<float, 2> pair = load<2>(b + Right::offset(k, at / 4) + at % 4);
                warp_product::multiply_outer(sums[c], a_low, a_high, pair[0], pair[1]);
            }
        }
    }
}

// Rounds sums to T and stores them to the 16 lines from `row` on of a tile, its columns from `column` on.
template <class T, u32 LENGTH, u32 N>
__device__ __forceinline__ void store_sums(T* tile, u32 row, u32 column, const float (&sums)[N][4]) {
    using Tile = SharedTile<T, 16, LENGTH>;
    const u32 lane = warp_product::fresh_lane();
#pragma unroll
    for (u32 n = 0; n < N; ++n) {
        const u32 at = column + n * 8 + lane % 4 * 2;
#pragma unroll
        for (u32 half = 0; half < 2; ++half) {
            const float pair[2] = {sums[n][half * 2], sums[n][half * 2 + 1]};
            store_from_float(tile + Tile::offset(row + lane / 4 + half * 8, at / Tile::CHUNK) + at % Tile::CHUNK, pair);
        }
    }
}

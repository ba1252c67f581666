// Tensor-core products of one warp, and the loads that feed them. All 32 lanes take part in every call.
//
// Fragments: which elements of a tile lie in which lane's registers. With g = lane / 4 and t = lane % 4, a register of
// two 16-bit elements holds the named one in its low and its right (A) or lower (B) neighbour in its high half:
//
//   m16n8k16   A (16, 16)                      B (16, 8)              C, D (16, 8), f32
//   a[0]  row g,     columns 2t, 2t+1     b[0]  rows 2t, 2t+1   c[0], c[1]  row g,     columns 2t, 2t+1
//   a[1]  row g + 8, columns 2t, 2t+1           column g        c[2], c[3]  row g + 8, columns 2t, 2t+1
//   a[2]  row g,     columns 2t+8, 2t+9   b[1]  rows 2t+8, 2t+9
//   a[3]  row g + 8, columns 2t+8, 2t+9         column g
//
//   m16n8k8    A (16, 8), tf32                 B (8, 8), tf32         C, D as above
//   a[0]  row g,     column t             b[0]  row t,     column g
//   a[1]  row g + 8, column t             b[1]  row t + 4, column g
//   a[2]  row g,     column t + 4
//   a[3]  row g + 8, column t + 4
//
//   ldmatrix   8 rows of 16 bytes per 8x8 matrix of 16-bit elements; lanes 8i to 8i + 7 bring the row addresses of
//              matrix i. Register i of a lane: row g, columns 2t, 2t+1 of matrix i. Transposed: rows 2t, 2t+1 of
//              column g.
//
// The emulator adds the products in f32, one after the other in the order of k, to c. Tensor cores round otherwise.
#pragma once
#include "common/convert.cuh"
#include "common/index.cuh"

#ifndef __CUDACC__
namespace mma_detail {

// The operand registers of one lane.
struct Operands {
    u32 a[4], b[2];
};

template <class T> inline float half_of(u32 pair, u32 high) {
    return high ? unpack_high<T>(pair) : unpack_low<T>(pair);
}

// One lane's share of D = A B + C, DEPTH columns of A. `element_a(lanes, row, k)` finds an element of A.
template <u32 DEPTH, class ElementA, class ElementB>
inline void multiply(float (&sums)[4], const u32 (&a)[4], const u32 (&b)[2], ElementA element_a, ElementB element_b) {
    const Operands mine{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
    const Operands* lanes = emulator::warp_gather(mine);
    for (u32 i = 0; i < 4; ++i) {
        const u32 row = lane() / 4 + i / 2 * 8, column = lane() % 4 * 2 + i % 2;
        for (u32 k = 0; k < DEPTH; ++k) {
            sums[i] = fmaf(element_a(lanes, row, k), element_b(lanes, k, column), sums[i]);
        }
    }
}

// The 16 bytes at each lane's address, of the first `COUNT` lanes. Lanes read before they meet, so that what a lane
// writes after the instruction is not seen in it.
struct alignas(16) Row {
    u16 elements[8];
};

template <u32 COUNT> inline const Row* gather_rows(const void* row) {
    Row mine{};
    if (lane() < COUNT) mine = bits_as<Row>(*static_cast<const uint4*>(row));
    return emulator::warp_gather(mine);
}

template <u32 MATRICES, bool TRANSPOSED> inline void load_matrices(u32 (&registers)[MATRICES], const void* row) {
    const Row* rows = gather_rows<MATRICES * 8>(row);
    const u32 group = lane() / 4, pair = lane() % 4 * 2;
    for (u32 i = 0; i < MATRICES; ++i) {
        const Row* matrix = rows + i * 8;
        const u16 low = TRANSPOSED ? matrix[pair].elements[group] : matrix[group].elements[pair];
        const u16 high = TRANSPOSED ? matrix[pair + 1].elements[group] : matrix[group].elements[pair + 1];
        registers[i] = u32(low) | u32(high) << 16;
    }
}

}  // namespace mma_detail
#endif

// sums += A B for tiles of T = bf16 or f16, (16, 16) by (16, 8).
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&sums)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, f16>);
#ifdef __CUDACC__
#define MMA_M16N8K16(type)                                                         \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type            \
                 ".f32 "                                                           \
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
                 : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])      \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
    if constexpr (std::is_same_v<T, bf16>) {
        MMA_M16N8K16("bf16");
    } else {
        MMA_M16N8K16("f16");
    }
#undef MMA_M16N8K16
#else
    using mma_detail::Operands;
    mma_detail::multiply<16>(
        sums, a, b,
        [](const Operands* lanes, u32 row, u32 k) {
            const u32 pair = lanes[row % 8 * 4 + k % 8 / 2].a[row / 8 + k / 8 * 2];
            return mma_detail::half_of<T>(pair, k % 2);
        },
        [](const Operands* lanes, u32 k, u32 column) {
            return mma_detail::half_of<T>(lanes[column * 4 + k % 8 / 2].b[k / 8], k % 2);
        });
#endif
}

// The bits of `value` rounded to tf32: 10 bits of mantissa, ties away from zero.
__device__ __forceinline__ u32 to_tf32(float value) {
#ifdef __CUDACC__
    u32 bits;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
    return bits;
#else
    const u32 bits = bits_as<u32>(value);
    const bool finite = (bits & 0x7F800000u) != 0x7F800000u;
    return finite ? (bits + 0x1000u) & ~0x1FFFu : bits;
#endif
}

// sums += A B for tiles of tf32, (16, 8) by (8, 8); operands from `to_tf32`.
__device__ __forceinline__ void mma_m16n8k8(float (&sums)[4], const u32 (&a)[4], const u32 (&b)[2]) {
#ifdef __CUDACC__
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    using mma_detail::Operands;
    mma_detail::multiply<8>(
        sums, a, b,
        [](const Operands* lanes, u32 row, u32 k) {
            return bits_as<float>(lanes[row % 8 * 4 + k % 4].a[row / 8 + k / 4 * 2] & ~0x1FFFu);
        },
        [](const Operands* lanes, u32 k, u32 column) {
            return bits_as<float>(lanes[column * 4 + k % 4].b[k / 4] & ~0x1FFFu);
        });
#endif
}

// Four 8x8 matrices from shared memory; `row` is this lane's row address, a multiple of 16 bytes.
__device__ __forceinline__ void ldmatrix_x4(u32 (&registers)[4], const void* row) {
#ifdef __CUDACC__
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
                 : "r"(shared_address(row))
                 : "memory");
#else
    mma_detail::load_matrices<4, false>(registers, row);
#endif
}

// The same, each matrix transposed.
__device__ __forceinline__ void ldmatrix_x4_transposed(u32 (&registers)[4], const void* row) {
#ifdef __CUDACC__
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
                 : "r"(shared_address(row))
                 : "memory");
#else
    mma_detail::load_matrices<4, true>(registers, row);
#endif
}

// Two 8x8 matrices; the addresses of lanes 0 to 15 count.
__device__ __forceinline__ void ldmatrix_x2(u32 (&registers)[2], const void* row) {
#ifdef __CUDACC__
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(registers[0]), "=r"(registers[1])
                 : "r"(shared_address(row))
                 : "memory");
#else
    mma_detail::load_matrices<2, false>(registers, row);
#endif
}

// The same, each matrix transposed.
__device__ __forceinline__ void ldmatrix_x2_transposed(u32 (&registers)[2], const void* row) {
#ifdef __CUDACC__
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(registers[0]), "=r"(registers[1])
                 : "r"(shared_address(row))
                 : "memory");
#else
    mma_detail::load_matrices<2, true>(registers, row);
#endif
}

// Transposes an 8x8 matrix of 16-bit elements that lies in registers as `ldmatrix` leaves it.
__device__ __forceinline__ u32 movmatrix_transposed(u32 pair) {
#ifdef __CUDACC__
    u32 transposed;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(pair));
    return transposed;
#else
    const u32* lanes = emulator::warp_gather(pair);
    const u32 column = lane() / 4, row = lane() % 4 * 2;
    const auto element = [&](u32 row) { return lanes[row * 4 + column / 2] >> (column % 2 * 16) & 0xFFFFu; };
    return element(row) | element(row + 1) << 16;
#endif
}

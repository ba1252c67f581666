// Every wrapper of common/, for tests that compare it with plain arithmetic. Never compiled for a GPU.

#include "common/gemm.cuh"
#include "common/philox.cuh"
#include "common/reduce.cuh"

// ---- Tensor-core products and loads: blocks of one warp

// d = a b + c for a (16, 16), b (16, 8), c (16, 8), all f32 and row-major; a and b are rounded to T.
template <class T> __device__ void multiply_tiles(float* d, const float* a, const float* b, const float* c) {
    const u32 g = lane() / 4, t = lane() % 4;
    u32 fragment_a[4], fragment_b[2];
    for (u32 i = 0; i < 4; ++i) {
        const float* from = a + (g + i % 2 * 8) * 16 + t * 2 + i / 2 * 8;
        fragment_a[i] = pack<T>(from[0], from[1]);
    }
    for (u32 i = 0; i < 2; ++i) {
        const float* from = b + (t * 2 + i * 8) * 8 + g;
        fragment_b[i] = pack<T>(from[0], from[8]);
    }
    float sums[4];
    for (u32 i = 0; i < 4; ++i) sums[i] = c[(g + i / 2 * 8) * 8 + t * 2 + i % 2];
    mma_m16n8k16<T>(sums, fragment_a, fragment_b);
    for (u32 i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + t * 2 + i % 2] = sums[i];
}

extern "C" __global__ void mma_bf16(float* d, const float* a, const float* b, const float* c) {
    multiply_tiles<bf16>(d, a, b, c);
}
extern "C" __global__ void mma_f16(float* d, const float* a, const float* b, const float* c) {
    multiply_tiles<f16>(d, a, b, c);
}

// d = a b + c for a (16, 8), b (8, 8), c (16, 8).
extern "C" __global__ void mma_tf32(float* d, const float* a, const float* b, const float* c) {
    const u32 g = lane() / 4, t = lane() % 4;
    u32 fragment_a[4], fragment_b[2];
    for (u32 i = 0; i < 4; ++i) fragment_a[i] = to_tf32(a[(g + i % 2 * 8) * 8 + t + i / 2 * 4]);
    for (u32 i = 0; i < 2; ++i) fragment_b[i] = to_tf32(b[(t + i * 4) * 8 + g]);
    float sums[4];
    for (u32 i = 0; i < 4; ++i) sums[i] = c[(g + i / 2 * 8) * 8 + t * 2 + i % 2];
    mma_m16n8k8(sums, fragment_a, fragment_b);
    for (u32 i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + t * 2 + i % 2] = sums[i];
}

// The registers (13, 32 lanes) that the loads of 8 by 8 matrices leave: x4, x4 transposed, x2, x2 transposed, and the
// first register of x4 transposed in registers. `matrices` is (4, 8, 8).
extern "C" __global__ void matrix_loads(u32* registers, const u16* matrices) {
    SHARED_ARRAY(u16, rows, [32][8]);
    store(rows[lane()], load<8>(matrices + lane() * 8));
    __syncwarp();
    u32 four[4], four_transposed[4], two[2], two_transposed[2];
    ldmatrix_x4(four, rows[lane()]);
    ldmatrix_x4_transposed(four_transposed, rows[lane()]);
    // Lanes 16 and up bring no addresses.
    const u16* row = lane() < 16 ? rows[lane()] : nullptr;
    ldmatrix_x2(two, row);
    ldmatrix_x2_transposed(two_transposed, row);
    // What a lane writes now, no other may see in its registers.
    rows[lane()][0] = 0xFFFF;
    for (u32 i = 0; i < 4; ++i) {
        registers[i * 32 + lane()] = four[i];
        registers[(4 + i) * 32 + lane()] = four_transposed[i];
    }
    for (u32 i = 0; i < 2; ++i) {
        registers[(8 + i) * 32 + lane()] = two[i];
        registers[(10 + i) * 32 + lane()] = two_transposed[i];
    }
    registers[12 * 32 + lane()] = movmatrix_transposed(four[0]);
}

// ---- Reductions: one value of `input` for each thread, 11 of `output`

extern "C" __global__ void reductions(float* output, const float* input) {
    SHARED_ARRAY(float, floats, [REDUCTION_SCRATCH]);
    SHARED_ARRAY(double, doubles, [REDUCTION_SCRATCH]);
    SHARED_ARRAY(Moments, moments, [REDUCTION_SCRATCH]);
    SHARED_ARRAY(CompensatedSum, compensated, [REDUCTION_SCRATCH]);
    const float value = input[linear_thread()];
    float* mine = output + linear_thread() * 11;
    mine[0] = warp_sum(value);
    mine[1] = warp_sum<4>(value);
    mine[2] = warp_max<16>(value);
    const Indexed<float> largest = warp_argmax(value, linear_thread());
    mine[3] = largest.value;
    mine[4] = static_cast<float>(largest.index);
    mine[5] = block_sum(value, floats);
    mine[6] = block_max(value, -INFINITY, floats);
    mine[7] = static_cast<float>(block_sum(static_cast<double>(value), doubles));
    Moments sample{};
    // Samples of different sizes, empty ones among them.
    for (u32 i = 0; i < linear_thread() % 3; ++i) sample.add(value + static_cast<float>(i));
    sample = block_moments(sample, moments);
    mine[8] = sample.mean;
    mine[9] = sample.variance();
    CompensatedSum sum{};
    sum.add(1e8f * static_cast<float>(linear_thread() % 2 == 0 ? 1 : -1));
    sum.add(value);
    mine[10] = block_sum(sum, compensated);
}

// ---- Random numbers

extern "C" __global__ void random_numbers(u32* bits, float* uniform, RandomStream stream, u64 first, u32 count) {
    const Philox generator = stream.resolve();
    for (u64 i = grid_thread(); i < count; i += grid_threads()) {
        bits[i] = generator.bits(first + i);
        uniform[i] = generator.uniform(first + i);
    }
}

// ---- Vectors: every thread moves 8 elements of its own, the last fewer

// doubled = 2 input + 1, by eights; copied = input, by twos.
template <class T> __device__ void move_vectors(T* doubled, T* copied, const T* input, i64 count) {
    const i64 first = i64(grid_thread()) * 8, left = count - first;
    if (left <= 0) return;
    float values[8];
    load_as_float_tail(values, input + first, left, -1.0f);
    for (float& value : values) value = value * 2 + 1;
    store_from_float_tail(doubled + first, values, left);
    for (int i = 0; i < 8; i += 2) {
        const Vector<T, 2> piece = load_tail<2>(input + first + i, left - i, T(0.0f));
        store_tail(copied + first + i, piece, left - i);
    }
}
#define VECTORS(suffix, T)                                                                          \
    extern "C" __global__ void vectors_##suffix(T* doubled, T* copied, const T* input, u64 count) { \
        move_vectors(doubled, copied, input, i64(count));                                           \
    }
FOR_EACH_FLOAT(VECTORS)

// ---- Asynchronous copies: one warp

// Groups of 16, 8 and 4 bytes for each lane, the first two cut to `valid` bytes; each is read as soon as it may be.
// `output` is (3, 32, 4) words.
extern "C" __global__ void async_copies(u32* output, const u32* input, u32 valid) {
    SHARED_ARRAY(u32, words, [3][32][4]);
    for (u32 i = 0; i < 4; ++i) words[1][lane()][i] = words[2][lane()][i] = 7;
    async_copy<16>(words[0][lane()], valid ? input + lane() * 4 : nullptr, valid);
    async_commit();
    async_copy<8>(words[1][lane()], input + lane() * 4, valid < 8 ? valid : 8);
    async_commit();
    async_copy<4>(&words[2][lane()][1], input + lane() * 4 + 1);
    async_commit();
    const u32 neighbour = (lane() + 1) % 32;
    async_wait<2>();
    __syncwarp();
    for (u32 i = 0; i < 4; ++i) output[lane() * 4 + i] = words[0][neighbour][i];
    async_wait<1>();
    __syncwarp();
    for (u32 i = 0; i < 4; ++i) output[128 + lane() * 4 + i] = words[1][neighbour][i];
    async_wait<0>();
    __syncwarp();
    for (u32 i = 0; i < 4; ++i) output[256 + lane() * 4 + i] = words[2][neighbour][i];
}

// One wait too few: the second group is read while it is under way.
extern "C" __global__ void async_copy_unwaited(u32* output, const u32* input) {
    SHARED_ARRAY(u32, words, [2][32]);
    async_copy<4>(&words[0][lane()], input + lane());
    async_commit();
    async_copy<4>(&words[1][lane()], input + lane());
    async_commit();
    async_wait<1>();
    output[lane()] = words[0][lane()];
    output[32 + lane()] = words[1][lane()];
}

extern "C" __global__ void async_copy_misaligned(const u32* input) {
    SHARED_ARRAY(u32, words, [32][4]);
    async_copy<16>(words[lane()], input + lane() * 4 + (lane() == 5 ? 1 : 0));
    async_wait<0>();
}

// ---- The main loops: c (m, n) += in two parts of k, [0, split) and [split, k); `split` is a multiple of the tile's K.

template <class Tile, bool A_ALONG_K, bool B_ALONG_K, u32 RUN>
__device__ void product(float* c, const typename Tile::Element* a, const typename Tile::Element* b, Array<u32, 3> mnk,
                        u32 split, u32 stride_a, u32 stride_b) {
    using T = typename Tile::Element;
    DYNAMIC_SHARED(shared);
    const u32 m = mnk[0], n = mnk[1], k = mnk[2];
    const u32 row = blockIdx.y * Tile::M, column = blockIdx.x * Tile::N;
    const MatrixSource<T, A_ALONG_K, RUN> source_a{a, m, k, stride_a};
    const MatrixSource<T, B_ALONG_K, RUN> source_b{b, n, k, stride_b};
    Tile tile;
    tile.clear();
    tile.accumulate(source_a, source_b, row, column, 0, split, shared);
    tile.accumulate(source_a, source_b, row, column, split, k, shared);
    tile.for_each_pair(row, column, [&](u32 row, u32 column, float first, float second) {
        if (row < m && column < n) c[u64(row) * n + column] = first;
        if (row < m && column + 1 < n) c[u64(row) * n + column + 1] = second;
    });
}

using TensorSmall = TensorTile<bf16, 32, 32, 32, 2, 2, 3>;
using TensorMiddle = TensorTile<f16, 64, 64, 32, 2, 2, 2>;
using TensorLarge = TensorTile<bf16, 128, 128, 32, 2, 4, 3>;
using TensorDeep = TensorTile<bf16, 64, 32, 64, 4, 1, 4>;
using SimtSmall = SimtTile<32, 32, 16, 4, 4, 3>;
using SimtMiddle = SimtTile<64, 64, 16, 8, 4, 2>;
using SimtLarge = SimtTile<128, 128, 8, 8, 8, 3>;

#define PRODUCT(name, Tile, A_ALONG_K, B_ALONG_K, RUN)                                                             \
    extern "C" __global__ void __launch_bounds__(Tile::THREADS)                                                    \
        name(float* c, const Tile::Element* a, const Tile::Element* b, Array<u32, 3> mnk, u32 split, u32 stride_a, \
             u32 stride_b) {                                                                                       \
        product<Tile, A_ALONG_K, B_ALONG_K, RUN>(c, a, b, mnk, split, stride_a, stride_b);                         \
    }
// The suffix says what memory is contiguous along: k or the rows of A, k or the columns of B.
#define PRODUCT_LAYOUTS(name, Tile, RUN)       \
    PRODUCT(name##_kk, Tile, true, true, RUN)  \
    PRODUCT(name##_kn, Tile, true, false, RUN) \
    PRODUCT(name##_mk, Tile, false, true, RUN) \
    PRODUCT(name##_mn, Tile, false, false, RUN)
#define KERNEL_LAYOUTS(name) KERNEL(name##_kk), KERNEL(name##_kn), KERNEL(name##_mk), KERNEL(name##_mn)

PRODUCT_LAYOUTS(tensor_small_run8, TensorSmall, 8)
PRODUCT_LAYOUTS(tensor_small_run1, TensorSmall, 1)
PRODUCT_LAYOUTS(tensor_middle_run2, TensorMiddle, 2)
PRODUCT(tensor_large_run8_kn, TensorLarge, true, false, 8)
PRODUCT_LAYOUTS(tensor_deep_run4, TensorDeep, 4)
PRODUCT_LAYOUTS(simt_small_run1, SimtSmall, 1)
PRODUCT_LAYOUTS(simt_middle_run4, SimtMiddle, 4)
PRODUCT(simt_large_run4_kn, SimtLarge, true, false, 4)

KERNELS(primitives, KERNEL(mma_bf16), KERNEL(mma_f16), KERNEL(mma_tf32), KERNEL(matrix_loads), KERNEL(reductions),
        KERNEL(random_numbers), KERNEL_FLOATS(vectors), KERNEL(async_copies), KERNEL(async_copy_unwaited),
        KERNEL(async_copy_misaligned), KERNEL_LAYOUTS(tensor_small_run8), KERNEL_LAYOUTS(tensor_small_run1),
        KERNEL_LAYOUTS(tensor_middle_run2), KERNEL(tensor_large_run8_kn), KERNEL_LAYOUTS(tensor_deep_run4),
        KERNEL_LAYOUTS(simt_small_run1), KERNEL_LAYOUTS(simt_middle_run4), KERNEL(simt_large_run4_kn))

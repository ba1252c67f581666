// Matrix products C (m, n) = A (m, k) B (k, n), batched, with broadcast batches.
//
//   layouts  nn: A (m, k), B (k, n)    nt: A (m, k), B (n, k)    tn: A (k, m), B (k, n)
//   A stored (k, m) by B stored (n, k) is the transpose of an nn product, stored so: the strides of C are arguments.
//
// Tiling (common/gemm.cuh, common/product.cuh): a block for each tile of C.
//   large   128 by 128, 256 threads; rows of the operands in runs of 16 bytes
//   small   64 by 64, 128 threads, for products with few tiles; the same
//   scalar  the small tile, element by element, for rows that are not multiples of 16 bytes
// bf16 and f16 run on tensor cores with sums in f32; f32 in fused multiply-adds, one for each term in the order of k.
// Where C has fewer tiles than the device has multiprocessors and k is large (weight gradients), k is split: each part
// stores its sums in f32, and matmul_split_sum adds them in order. Only nt, the layout of linear layers, has the
// bias and the GELU behind it.
//
// FLOPs: 2 m n k. Bytes of the large tile in bf16: m n k / 32 from the L2 cache, C once.
// tensor cores: matmul_large_nn_bf16, matmul_large_nt_bf16, matmul_large_tn_bf16, matmul_large_nn_f16, matmul_large_nt_f16, matmul_large_tn_f16, matmul_small_nn_bf16, matmul_small_nt_bf16, matmul_small_tn_bf16, matmul_small_nn_f16, matmul_small_nt_f16, matmul_small_tn_f16, matmul_scalar_nn_bf16, matmul_scalar_nt_bf16, matmul_scalar_tn_bf16, matmul_scalar_nn_f16, matmul_scalar_nt_f16, matmul_scalar_tn_f16

#include "common/kernel.cuh"

#include "common/product.cuh"

template <class T> struct Tiles {
    using Large = TensorTile<T, 128, 128, 32, 2, 4, 3>;
    using Small = TensorTile<T, 64, 64, 32, 2, 2, 4>;
    using Scalar = TensorTile<T, 64, 64, 16, 2, 2, 3>;
};
template <> struct Tiles<float> {
    using Large = SimtTile<128, 128, 8, 8, 8, 4>;
    using Small = SimtTile<64, 64, 16, 8, 4, 3>;
    using Scalar = SimtTile<64, 64, 8, 8, 4, 3>;
};

// output += the parts' sums in order, from `partials` (parts, elements); C has n columns.
template <class T>
__device__ void split_sum(const Store<T>& store, const float* partials, u32 parts, u64 elements, u32 n) {
    for (u64 i = grid_thread(); i < elements; i += grid_threads()) {
        float sum = 0;
#pragma unroll 4
        for (u32 part = 0; part < parts; ++part) sum += partials[part * elements + i];
        float sums[1] = {sum};
        store.template operator()<true>(i, 1, u32(i % n), 1, false, sums);
    }
}

// Of the large tile on tensor cores two blocks fit a multiprocessor, but for tn, whose addresses take more registers.
template <class T, class Tile, bool A_ALONG_K>
constexpr int BLOCKS = Tile::M == 128 && sizeof(T) == 2 && A_ALONG_K ? 2 : 1;

#define PRODUCT(tile, Tile, layout, A_ALONG_K, B_ALONG_K, RUN, FUSED, suffix, T)                                     \
    extern "C" __global__ void __launch_bounds__(Tiles<T>::Tile::THREADS, (BLOCKS<T, Tiles<T>::Tile, A_ALONG_K>))    \
        matmul_##tile##_##layout##_##suffix(T* output, T* auxiliary, const T* bias, u32 activate, float* partials,   \
                                            const T* a, const T* b, u32 m, u32 n, u32 k, u32 depth, u64 row_stride,  \
                                            u64 column_stride, u32 batches, Array<u32, BATCH_AXES> extents,          \
                                            Array<u64, BATCH_AXES> strides_a, Array<u64, BATCH_AXES> strides_b) {    \
        Product<T>{                                                                                                  \
            {output, auxiliary, bias, activate}, partials, a, b, m, n, k, depth, row_stride, column_stride, batches, \
            {extents, strides_a, strides_b}}                                                                         \
            .template run<Tiles<T>::Tile, A_ALONG_K, B_ALONG_K, RUN, FUSED>();                                       \
    }
#define LAYOUTS(tile, Tile, RUN, suffix, T)                     \
    PRODUCT(tile, Tile, nn, true, false, RUN, false, suffix, T) \
    PRODUCT(tile, Tile, nt, true, true, RUN, true, suffix, T)   \
    PRODUCT(tile, Tile, tn, false, false, RUN, false, suffix, T)
#define INSTANCE(suffix, T)                                                                                            \
    LAYOUTS(large, Large, WIDEST<T>, suffix, T)                                                                        \
    LAYOUTS(small, Small, WIDEST<T>, suffix, T)                                                                        \
    LAYOUTS(scalar, Scalar, 1, suffix, T)                                                                              \
    extern "C" __global__ void __launch_bounds__(256) matmul_split_sum_##suffix(                                       \
        T* output, T* auxiliary, const T* bias, u32 activate, const float* partials, u32 parts, u64 elements, u32 n) { \
        split_sum(Store<T>{output, auxiliary, bias, activate}, partials, parts, elements, n);                          \
    }
FOR_EACH_FLOAT(INSTANCE)

#define KERNEL_LAYOUTS(tile) \
    KERNEL_FLOATS(matmul_##tile##_nn), KERNEL_FLOATS(matmul_##tile##_nt), KERNEL_FLOATS(matmul_##tile##_tn)
KERNELS(matmul, KERNEL_LAYOUTS(large), KERNEL_LAYOUTS(small), KERNEL_LAYOUTS(scalar), KERNEL_FLOATS(matmul_split_sum))

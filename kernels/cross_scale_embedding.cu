// Cross-scale embedding, forward: convolutions of one stride with concentric windows, side by side in the channels, from
// images as they are stored, with the layer norm that follows.
//
//   y(b, o, first_i + f) = bias_i(f) + sum over taps t of kernel i and channels c of x(b, h_i(o, t), c) w_i(f, c, t)
//
// with h_i of common/embedding.cuh, x the normalised pixel and zero outside of the map; then, where a norm is given,
// (y - mean y) / sqrt(var y + eps) over the channels, times weight, plus bias.
//
// Tiling: a block of 8 warps for up to 128 groups of positions stages the pixels under all of their windows once, in the
// dtype of the products, and multiplies every kernel's windows where they lie there (common/embedding_tile.cuh). A warp
// takes 64 groups by up to 32 columns; pieces of the large kernels are shared by 4 warps, a quarter of the steps each,
// whose sums are added in order; of the others each warp takes one. With more than 16 channels the pixels come in slices
// of 64 bytes, one in use while the next is on its way, and a block computes pieces of all kernels, one for each of its
// 4 columns of warps. Weights are packed beforehand as fragments, which lanes read from the caches as they need them. bf16
// and f16 run on tensor cores, f32 by fused multiply-adds.
//
// The stem of CrossFormer-S (224 x 224 x 3, stride 4; 48, 24, 12, 12 channels of windows 4, 8, 16, 32) in bf16: groups of 2
// positions; of the products 82 % are useful, kernels 16 and 32 filling 3 tiles of columns with both positions, and 112
// of the 128 groups are: 72 % together.
// FLOPs: 2 positions sum_i s_i^2 C out_i: 106 kFLOP for each position of that stem.
// Bytes: the image, the weights and the result once; from the second-level cache the packed weights for each block
// (258 kB for that stem), and the image under the borders of windows again.
// On an H200 at batch 256: 85 GFLOP, 108 us at 790 TFLOP/s; 77 MB of bf16 images (39 MB of u8) and 154 MB of result,
// 54 us (45 us) at 4.3 TB/s: bound by the tensor cores.
// The layer norm inside saves 308 MB there in inference, a write and a read of the embedding, and 154 MB in training,
// where the embedding is kept for the gradient. Its gradient is layer_norm.cu's: within the weights' gradient it would be
// computed again for every tile of terms. Where a block does not have all channels of a position, the norm is its own
// kernel.
//
// tensor cores: cross_scale_embedding_forward_bf16, cross_scale_embedding_forward_f16

#include "common/kernel.cuh"

#include "common/embedding_tile.cuh"
#include "common/reduce.cuh"

namespace {

// Warps that share rows, and the 16-row fragments of a warp.
constexpr u32 WARPS_ACROSS = 4, DOWN = 4, MOST_TILES = 4;

// Where element (term, column) of a step's tile of 8 columns stands among a fragment's elements, so that a lane finds
// what it needs side by side.
template <class T> __device__ __forceinline__ void fragment_element(u32 at, u32& term, u32& column) {
    if constexpr (sizeof(T) == 2) {
        const u32 of_lane = at % 4, lane = at / 4;
        term = lane % 4 * 2 + of_lane % 2 + of_lane / 2 * 8;
        column = lane / 4;
    } else {
        term = at / 16 * 2 + at / 2 % 2;
        column = at / 4 % 4 * 2 + at % 2;
    }
}

// Packs the weights of all kernels, (out, channel, ty, tx) each, as fragments: pieces one after the other, of each the
// slices of channels, the steps and the tiles of columns. Zeros where a run has more than the window.
template <class T>
__device__ void pack_weights(T* packed, u64 elements, const PerKernel<const T>& weights, const Embedding& e,
                             const Tiling& t) {
    constexpr u32 CHUNK = 16 / sizeof(T);
    for (u64 i = grid_thread(); i < elements; i += grid_threads()) {
        const u64 fragment = i / FRAGMENT;
        u32 term, column;
        fragment_element<T>(u32(i % FRAGMENT), term, column);
        T value = from_float<T>(0);
        for_each_strip<T>(e, t, [&](const Piece& strip, u32 pieces) {
            const u64 inside = fragment - strip.fragments, size = u64(t.channel_slices) * strip.steps * strip.tiles;
            if (inside >= pieces * size) return false;
            const u32 of_piece = u32(inside % size), slice_step = of_piece / strip.tiles;
            column += (u32(inside / size) * strip.tiles + of_piece % strip.tiles) * 8;
            term += slice_step % strip.steps * STEP;
            const u32 ty = term / CHUNK / strip.row_chunks, position = column / strip.out;
            // Wraps around in front of the window.
            const u32 along =
                term - ty * strip.row_chunks * CHUNK - strip.front - position * e.stride * t.slice_channels;
            const u32 tx = along / t.slice_channels;
            const u32 channel = slice_step / strip.steps * t.slice_channels + along % t.slice_channels;
            if (column < strip.columns && ty < strip.side && tx < strip.side && channel < e.channels) {
                const u64 plane = u64(column % strip.out) * e.channels + channel;
                value = weights[strip.kernel][(plane * strip.side + ty) * strip.side + tx];
            }
            return true;
        });
        packed[i] = value;
    }
}

// What a warp multiplies: groups in fragments of 16 by the columns of a piece.
template <class T> struct Sums {
    static constexpr bool TENSOR = sizeof(T) == 2;
    static constexpr u32 CHUNK = 16 / sizeof(T), STEP_CHUNKS = STEP / CHUNK;
    // Groups whose windows a lane addresses: row lane % 16 of each fragment for ldmatrix, else rows g and g + 8.
    static constexpr u32 BASES = TENSOR ? DOWN : 2 * DOWN;

    float sums[DOWN][MOST_TILES][4];
    u32 bases[BASES];  // chunks

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (auto& row : sums) {
#pragma unroll
            for (auto& fragment : row) fragment[0] = fragment[1] = fragment[2] = fragment[3] = 0;
        }
    }

    // The next tile of the first row, and the next row, become the first.
    __device__ __forceinline__ void next_tile() {
#pragma unroll
        for (u32 j = 0; j + 1 < MOST_TILES; ++j) copy(sums[0][j], sums[0][j + 1]);
    }
    __device__ __forceinline__ void next_row() {
#pragma unroll
        for (u32 i = 0; i + 1 < DOWN; ++i) {
#pragma unroll
            for (u32 j = 0; j < MOST_TILES; ++j) copy(sums[i][j], sums[i + 1][j]);
        }
    }
    static __device__ __forceinline__ void copy(float (&to)[4], const float (&from)[4]) {
#pragma unroll
        for (u32 k = 0; k < 4; ++k) to[k] = from[k];
    }

    // Adds the products of `steps` steps from `first` on, of windows whose first row begins at chunk `start`.
    template <u32 TILES>
    __device__ __forceinline__ void accumulate(const T* tile, const Tiling& t, const Piece& piece, u32 start,
                                               const T* packed, u32 first, u32 steps) {
        const u32 row_chunks = piece.row_chunks, pitch = t.pitch, swizzle = t.swizzle;
        const u32 chunk = first * STEP_CHUNKS + (TENSOR ? lane() / 16 : 0);
        u32 row = chunk / row_chunks, across = chunk % row_chunks;
        const u32 last = piece.side;
        const auto next = [&](u32 by) {  // where the chunk is, and on
            const u32 at = row < last ? start + row * pitch + across : start;
            for (across += by; across >= row_chunks; across -= row_chunks) ++row;
            return at;
        };
        const auto from = [&](u32 i, u32 at) {
            const u32 chunk = bases[i] + at;
            return tile + (chunk ^ (chunk >> 3 & swizzle)) * CHUNK;
        };
        packed += TENSOR ? lane() * 4 : lane() % 4 * 4;
        if constexpr (TENSOR) {
            Vector<T, 4> ahead[TILES];
#pragma unroll
            for (u32 j = 0; j < TILES; ++j) ahead[j] = load<4>(packed + j * FRAGMENT);
#pragma unroll 1
            for (; steps > 0; --steps) {
                u32 a[DOWN][4], b[TILES][2];
                const u32 at = next(2);
#pragma unroll
                for (u32 j = 0; j < TILES; ++j) memcpy(b[j], &ahead[j], 8);
                packed += steps > 1 ? TILES * FRAGMENT : 0;
#pragma unroll
                for (u32 j = 0; j < TILES; ++j) ahead[j] = load<4>(packed + j * FRAGMENT);
#pragma unroll
                for (u32 i = 0; i < DOWN; ++i) ldmatrix_x4(a[i], from(i, at));
#pragma unroll
                for (u32 i = 0; i < DOWN; ++i) {
#pragma unroll
                    for (u32 j = 0; j < TILES; ++j) mma_m16n8k16<T>(sums[i][j], a[i], b[j]);
                }
            }
        } else {
#pragma unroll 1
            for (u32 part = 0; part < steps * STEP_CHUNKS; ++part) {
                const u32 at = next(1);
                const T* of_step = packed + part / STEP_CHUNKS * TILES * FRAGMENT + part % STEP_CHUNKS * 32;
#pragma unroll 1
                for (u32 k = 0; k < CHUNK; k += 2) {
                    Vector<T, 4> b[TILES];
#pragma unroll
                    for (u32 j = 0; j < TILES; ++j) b[j] = load<4>(of_step + j * FRAGMENT + k * 8);
#pragma unroll
                    for (u32 i = 0; i < BASES; ++i) {
                        const Vector<T, 2> a = load<2>(from(i, at) + k);
#pragma unroll
                        for (u32 j = 0; j < TILES; ++j) {
                            float* to = sums[i / 2][j] + i % 2 * 2;
                            to[0] = fmaf(a[1], b[j][2], fmaf(a[0], b[j][0], to[0]));
                            to[1] = fmaf(a[1], b[j][3], fmaf(a[0], b[j][1], to[1]));
                        }
                    }
                }
            }
        }
    }
};

// The layer norm that follows; `weight` is null where none does. `statistics` as in layer_norm.cu, or null.
template <class T> struct Norm {
    T* output;
    float* statistics;
    const T *weight, *bias;
    float eps;
};

template <class T> struct Forward {
    static constexpr u32 CHUNK = 16 / sizeof(T);

    T* output;
    const void* input;
    const T* packed;
    const PerKernel<const T>& biases;
    const Embedding& e;
    const Tiling& t;
    const Pixels& p;
    const TilePlace& at;
    unsigned char* shared;  // one tile, or two by turns; then what warps exchange

    static __device__ __forceinline__ u32 warp_down() { return warp() / WARPS_ACROSS; }
    // Turned in the second half, so that each of a multiprocessor's four parts has warps of every size of kernel.
    static __device__ __forceinline__ u32 warp_across() { return (warp() + warp_down() * 2) % WARPS_ACROSS; }

    __device__ __forceinline__ T* tile(u32 slice) const {
        return reinterpret_cast<T*>(shared) + (slice % 2) * t.tile_chunks() * CHUNK;
    }

    __device__ __forceinline__ void stage(u32 slice) const {
        const u32 first_row = slice % t.bands * t.band;
        stage_pixels<T, TILE_THREADS>(tile(slice), input, e, t, p, at, slice / t.bands, first_row, t.tile_rows);
    }

    // Adds a slice's products: those of the rows of the kernel's windows that the band has.
    __device__ __forceinline__ void accumulate(Sums<T>& product, const Piece& piece, u32 slice, bool split) const {
        constexpr u32 STEP_CHUNKS = Sums<T>::STEP_CHUNKS;
        const u32 band = slice % t.bands * t.band;
        const u32 top = max(piece.inset, band), bottom = min(piece.inset + piece.side, band + t.band);
        if (top >= bottom) return;
        // With more bands than one, every row of a window is a number of whole steps.
        u32 first = (top - piece.inset) * piece.row_chunks / STEP_CHUNKS;
        u32 steps = divide_up((bottom - piece.inset) * piece.row_chunks, STEP_CHUNKS) - first;
        if (split) {
            const u32 begin = steps * warp_across() / WARPS_ACROSS;
            steps = steps * (warp_across() + 1) / WARPS_ACROSS - begin;
            first += begin;
        }
        if (steps == 0) return;
        const u32 start = piece.start + (piece.inset - band) * t.pitch;
        const u64 fragment = piece.fragments + (u64(slice / t.bands) * piece.steps + first) * piece.tiles;
        const T *from = packed + fragment * FRAGMENT, *staged = tile(slice);
        switch (piece.tiles) {
            case 1:
                product.template accumulate<1>(staged, t, piece, start, from, first, steps);
                break;
            case 2:
                product.template accumulate<2>(staged, t, piece, start, from, first, steps);
                break;
            case 3:
                product.template accumulate<3>(staged, t, piece, start, from, first, steps);
                break;
            default:
                product.template accumulate<4>(staged, t, piece, start, from, first, steps);
        }
    }

    // Stores a piece's sums, a row of fragments at a time; those of a `split` piece are first added up, in the order of the
    // warps side by side. One copy of the code serves all fragments: the next always moves to the front.
    __device__ __forceinline__ void store(Sums<T>& product, const Piece& piece, bool split) const {
#pragma unroll 1
        for (u32 i = 0; i < DOWN; ++i) {
            u32 j = 0, end = piece.tiles;
            if (split) {
                exchange(product, piece);
                j = warp_across();
                end = min(end, j + 1);
            }
#pragma unroll 1
            for (; j < end; ++j) {
                store(piece, i, j, product.sums[0][0]);
                product.next_tile();
            }
            product.next_row();
        }
    }

    // Adds the warps' parts of the first row's tile of the warp's own number.
    __device__ __forceinline__ void exchange(Sums<T>& product, const Piece& piece) const {
        float* scratch = reinterpret_cast<float*>(shared) + t.tile_chunks() * 4;
        scratch += warp_down() * WARPS_ACROSS * MOST_TILES * 128 + lane() * 4;
        __syncthreads();
#pragma unroll
        for (u32 j = 0; j < MOST_TILES; ++j) {
            float* to = scratch + (warp_across() * MOST_TILES + j) * 128;
            if (j < piece.tiles) ::store(to, bits_as<Vector<float, 4>>(product.sums[0][j]));
        }
        __syncthreads();
        if (warp_across() >= piece.tiles) return;
        float sums[4] = {};
#pragma unroll
        for (u32 part = 0; part < WARPS_ACROSS; ++part) {
            const Vector<float, 4> more = load<4>(scratch + (part * MOST_TILES + warp_across()) * 128);
#pragma unroll
            for (u32 k = 0; k < 4; ++k) sums[k] += more[k];
        }
#pragma unroll
        for (u32 k = 0; k < 4; ++k) product.sums[0][0][k] = sums[k];
    }

    // Stores a fragment, of row `i` and tile `j`.
    __device__ __forceinline__ void store(const Piece& piece, u32 i, u32 j, const float (&sums)[4]) const {
        const u32 column = piece.column + j * 8 + lane() % 4 * 2;
        const T* bias = biases[piece.kernel];
        const bool even = piece.out % 2 == 0 && piece.first % 2 == 0 && e.out_channels % 2 == 0;
        float first = sums[0], second = sums[1];
#pragma unroll 1
        for (u32 half = 0; half < 2; ++half) {
            const Group group(e, t, at, warp_down() * 64 + i * 16 + half * 8 + lane() / 4);
            const auto place = [&](u32 column, bool& valid) {
                const u64 position = group.position(e, t, at, piece.position + column / piece.out, valid);
                valid = valid && column < piece.columns;
                return output + position * e.out_channels + piece.first + column % piece.out;
            };
            const auto biased = [&](u32 column, float sum) { return sum + to_float(bias[column % piece.out]); };
            bool valid;
            T* to = place(column, valid);
            if (even) {
                const float pair[2] = {valid ? biased(column, first) : 0, valid ? biased(column + 1, second) : 0};
                if (valid) store_from_float(to, pair);
            } else {
                if (valid) *to = from_float<T>(biased(column, first));
                to = place(column + 1, valid);
                if (valid) *to = from_float<T>(biased(column + 1, second));
            }
            first = sums[2];
            second = sums[3];
        }
    }

    // Normalises the block's positions, a warp for each, from what the block has stored just before.
    __device__ __forceinline__ void normalise(const Norm<T>& norm) const {
        __syncthreads();
        const u32 width = e.out_channels;
        const float scale = 1.0f / width;
#pragma unroll 1
        for (u32 i = warp(); i < t.groups() * t.group; i += TILE_WARPS) {
            bool valid;
            const u64 position = Group(e, t, at, i / t.group).position(e, t, at, i % t.group, valid);
            if (!valid) continue;
            const T* from = output + position * width;
            float sum = 0, distances = 0, squares = 0;
            for (u32 c = lane(); c < width; c += 32) sum += to_float(from[c]);
            const float center = warp_sum(sum) * scale;
            for (u32 c = lane(); c < width; c += 32) {
                const float distance = to_float(from[c]) - center;
                distances += distance;
                squares = fmaf(distance, distance, squares);
            }
            const float residue = warp_sum(distances) * scale, square = warp_sum(squares) * scale;
            float variance = square - residue * residue;
            // Rounding must not turn the variance of a constant row negative; a NaN stays.
            if (variance < 0) variance = 0;
            const float rstd = 1.0f / sqrtf(variance + norm.eps), offset = -residue * rstd;
            if (norm.statistics != nullptr && lane() < 3) {
                norm.statistics[position * 3 + lane()] = lane() == 0 ? center : lane() == 1 ? offset : rstd;
            }
            for (u32 c = lane(); c < width; c += 32) {
                const float normalised = fmaf(to_float(from[c]) - center, rstd, offset);
                norm.output[position * width + c] =
                    from_float<T>(fmaf(normalised, to_float(norm.weight[c]), to_float(norm.bias[c])));
            }
        }
    }

    __device__ __forceinline__ void run(Piece& piece, const Norm<T>& norm) const {
        const u32 slices = t.slices();
        // A block that stages more slices than one does so for one round alone.
        const u32 first = slices == 1 ? 0 : blockIdx.y, end = slices == 1 ? t.split + t.rounds : first + 1;
        u32 staged = 0;
        Sums<T> product;
#pragma unroll
        for (u32 i = 0; i < Sums<T>::BASES; ++i) {
            const u32 row = Sums<T>::TENSOR ? i * 16 + lane() % 16 : i * 8 + lane() / 4;
            product.bases[i] = Group(e, t, at, warp_down() * 64 + row).template chunk<T>(e, t);
        }
#pragma unroll 1
        for (u32 number = first; number < end; ++number) {
            const bool split = number < t.split;
            // The others' order is that of their kernels: a block has some of all.
            const u32 wanted = split ? number : number + warp_across() * t.rounds;
            product.clear();
#pragma unroll 1
            for (u32 slice = 0; slice < slices; ++slice) {
                // A slice is in use while the next is on its way.
#pragma unroll 1
                for (; staged <= min(slice + 1, slices); ++staged) {
                    if (staged < slices) stage(staged);
                    async_commit();
                }
                if (slice == 0) {
                    __syncwarp();
                    if (lane() == 0) find_piece<T>(piece, e, t, wanted);
                    __syncwarp();
                }
                if (number == first) {
                    async_wait<1>();
                    __syncthreads();
                }
                if (piece.tiles > 0) accumulate(product, piece, slice, split);
                if (slices > 1) __syncthreads();
            }
            store(product, piece, split);
        }
        if (norm.weight != nullptr) normalise(norm);
    }
};

}  // namespace

#define FORWARD(suffix, T)                                                                                            \
    extern "C" __global__ void __launch_bounds__(256) cross_scale_embedding_pack_##suffix(                            \
        T* packed, u64 elements, PerKernel<const T> weights, Embedding embedding, Tiling tiling) {                    \
        pack_weights<T>(packed, elements, weights, embedding, tiling);                                                \
    }                                                                                                                 \
    extern "C" __global__ void __launch_bounds__(TILE_THREADS, sizeof(T) == 2 ? 2 : 1)                                \
        cross_scale_embedding_forward_##suffix(T* output, const void* input, const T* packed,                         \
                                               PerKernel<const T> biases, Embedding embedding, Tiling tiling,         \
                                               Pixels pixels, T* normalised, float* statistics, const T* norm_weight, \
                                               const T* norm_bias, float eps) {                                       \
        DYNAMIC_SHARED(shared);                                                                                       \
        const TilePlace at(embedding, tiling, blockIdx.x);                                                            \
        const Forward<T> forward{output, input, packed, biases, embedding, tiling, pixels, at, shared};               \
        SHARED_ARRAY(Piece, pieces, [TILE_WARPS]);                                                                    \
        forward.run(pieces[warp()], {normalised, statistics, norm_weight, norm_bias, eps});                           \
    }
FOR_EACH_FLOAT(FORWARD)

KERNELS(cross_scale_embedding, KERNEL_FLOATS(cross_scale_embedding_pack), KERNEL_FLOATS(cross_scale_embedding_forward))

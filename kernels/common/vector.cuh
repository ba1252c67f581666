// Several neighbouring elements moved by one load or store.
#pragma once
#include "common/convert.cuh"

// N elements that lie at a multiple of their size, so that one access of at most 16 bytes moves them.
template <class T, int N> struct alignas(sizeof(T) * N) Vector {
    static_assert(N > 0 && (N & (N - 1)) == 0 && sizeof(T) * N <= 16, "one access moves 1, 2, 4, 8 or 16 bytes");
    T v[N];
    __device__ __forceinline__ T& operator[](int i) { return v[i]; }
    __device__ __forceinline__ const T& operator[](int i) const { return v[i]; }
};

// As many T as one access can hold.
template <class T> inline constexpr int WIDEST = 16 / sizeof(T);

// Whether the caches should keep what is accessed. `Once` is for data that nothing reads again soon.
enum class Reuse { Often, Once };

namespace vector_detail {
template <int BYTES> struct Word;
template <> struct Word<1> {
    using Type = unsigned char;
};
template <> struct Word<2> {
    using Type = unsigned short;
};
template <> struct Word<4> {
    using Type = u32;
};
template <> struct Word<8> {
    using Type = uint2;
};
template <> struct Word<16> {
    using Type = uint4;
};
}  // namespace vector_detail

// N elements from `from`, which is a multiple of their size. Global or shared memory; `Reuse::Once` only global.
template <int N, Reuse REUSE = Reuse::Often, class T> __device__ __forceinline__ Vector<T, N> load(const T* from) {
    using Word = typename vector_detail::Word<sizeof(T) * N>::Type;
    const Word* word = reinterpret_cast<const Word*>(from);
#ifdef __CUDACC__
    if constexpr (REUSE == Reuse::Once) return bits_as<Vector<T, N>>(__ldcs(word));
#endif
    return bits_as<Vector<T, N>>(*word);
}

// Stores N elements at `to`, which is a multiple of their size.
template <Reuse REUSE = Reuse::Often, class T, int N>
__device__ __forceinline__ void store(T* to, const Vector<T, N>& vector) {
    using Word = typename vector_detail::Word<sizeof(T) * N>::Type;
    Word* word = reinterpret_cast<Word*>(to);
#ifdef __CUDACC__
    if constexpr (REUSE == Reuse::Once) {
        __stcs(word, bits_as<Word>(vector));
        return;
    }
#endif
    *word = bits_as<Word>(vector);
}

// The first `count` of N elements, the others `fill`. Aligned as `load` where all N are there, else element by element.
template <int N, class T> __device__ __forceinline__ Vector<T, N> load_tail(const T* from, i64 count, T fill) {
    if (count >= N) return load<N>(from);
    Vector<T, N> vector;
#pragma unroll
    for (int i = 0; i < N; ++i) vector[i] = i < count ? from[i] : fill;
    return vector;
}

// Stores the first `count` of N elements.
template <class T, int N> __device__ __forceinline__ void store_tail(T* to, const Vector<T, N>& vector, i64 count) {
    if (count >= N) return store(to, vector);
#pragma unroll
    for (int i = 0; i < N; ++i) {
        if (i < count) to[i] = vector[i];
    }
}

// N elements as f32, by as few accesses as 16 bytes allow. `from` is a multiple of an access.
template <int N, Reuse REUSE = Reuse::Often, class T>
__device__ __forceinline__ void load_as_float(float (&values)[N], const T* from) {
    constexpr int WIDTH = N < WIDEST<T> ? N : WIDEST<T>;
#pragma unroll
    for (int first = 0; first < N; first += WIDTH) {
        const Vector<T, WIDTH> vector = load<WIDTH, REUSE>(from + first);
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) values[first + i] = to_float(vector[i]);
    }
}

// Rounds N values to T and stores them, as `load_as_float` loads.
template <int N, Reuse REUSE = Reuse::Often, class T>
__device__ __forceinline__ void store_from_float(T* to, const float (&values)[N]) {
    constexpr int WIDTH = N < WIDEST<T> ? N : WIDEST<T>;
#pragma unroll
    for (int first = 0; first < N; first += WIDTH) {
        Vector<T, WIDTH> vector;
        if constexpr (sizeof(T) == 2 && WIDTH > 1) {
#pragma unroll
            for (int i = 0; i < WIDTH; i += 2) {
                const u32 pair = pack<T>(values[first + i], values[first + i + 1]);
                memcpy(&vector.v[i], &pair, 4);
            }
        } else {
#pragma unroll
            for (int i = 0; i < WIDTH; ++i) vector[i] = from_float<T>(values[first + i]);
        }
        store<REUSE>(to + first, vector);
    }
}

// The first `count` of N elements as f32, the others `fill`.
template <int N, class T>
__device__ __forceinline__ void load_as_float_tail(float (&values)[N], const T* from, i64 count, float fill) {
    if (count >= N) return load_as_float(values, from);
#pragma unroll
    for (int i = 0; i < N; ++i) values[i] = i < count ? to_float(from[i]) : fill;
}

// Rounds and stores the first `count` of N values.
template <int N, class T>
__device__ __forceinline__ void store_from_float_tail(T* to, const float (&values)[N], i64 count) {
    if (count >= N) return store_from_float(to, values);
#pragma unroll
    for (int i = 0; i < N; ++i) {
        if (i < count) to[i] = from_float<T>(values[i]);
    }
}

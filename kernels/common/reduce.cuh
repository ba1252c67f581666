// Reductions over warps and blocks. Every thread gets the result; the order of the operations depends on the block's
// size alone, so the bits are the same on every run.
#pragma once
#include "common/convert.cuh"
#include "common/index.cuh"

struct Sum {
    template <class T> __device__ __forceinline__ T operator()(T a, T b) const { return a + b; }
};

// The larger; NaN where either is.
struct Max {
    template <class T> __device__ __forceinline__ T operator()(T a, T b) const { return a > b || a != a ? a : b; }
};

// A value and where it stands.
template <class T> struct Indexed {
    T value;
    u32 index;
};

// The larger value (a NaN is larger than all), of equal ones the first.
struct Argmax {
    template <class T> __device__ __forceinline__ Indexed<T> operator()(Indexed<T> a, Indexed<T> b) const {
        const bool a_is_nan = a.value != a.value, b_is_nan = b.value != b.value;
        const bool tie = a.value == b.value || (a_is_nan && b_is_nan);
        const bool a_wins = tie ? a.index < b.index : a_is_nan || (!b_is_nan && a.value > b.value);
        return a_wins ? a : b;
    }
};

// The value of the lane whose index differs in the bits of `mask`. All 32 lanes take part.
template <class T> __device__ __forceinline__ T shuffle_xor(T value, u32 mask) {
#ifdef __CUDACC__
    static_assert(sizeof(T) % 4 == 0);
    u32 words[sizeof(T) / 4];
    memcpy(words, &value, sizeof(T));
#pragma unroll
    for (u32& word : words) word = __shfl_xor_sync(0xFFFFFFFFu, word, mask);
    memcpy(&value, words, sizeof(T));
    return value;
#else
    return emulator::warp_gather(value)[lane() ^ mask];
#endif
}

// Over each WIDTH neighbouring lanes, a power of two. All 32 lanes of the warp take part.
template <int WIDTH = 32, class T, class Operation>
__device__ __forceinline__ T warp_reduce(T value, Operation operation) {
    static_assert(WIDTH >= 1 && WIDTH <= 32 && (WIDTH & (WIDTH - 1)) == 0);
#pragma unroll
    for (u32 mask = WIDTH / 2; mask > 0; mask /= 2) {
        const T other = shuffle_xor(value, mask);
        // Lower lanes first, so that all lanes compute the same even where the operation does not commute.
        value = (lane() & mask) == 0 ? operation(value, other) : operation(other, value);
    }
    return value;
}

template <int WIDTH = 32, class T> __device__ __forceinline__ T warp_sum(T value) {
    return warp_reduce<WIDTH>(value, Sum{});
}

template <int WIDTH = 32, class T> __device__ __forceinline__ T warp_max(T value) {
    return warp_reduce<WIDTH>(value, Max{});
}

template <int WIDTH = 32, class T> __device__ __forceinline__ Indexed<T> warp_argmax(T value, u32 index) {
    return warp_reduce<WIDTH>(Indexed<T>{value, index}, Argmax{});
}

// Values of `scratch` that a block reduction needs, in shared memory: one for each warp.
inline constexpr int REDUCTION_SCRATCH = 32;

// Over a block of any multiple of 32 threads. All of them take part; `scratch` may be used again at once.
template <class T, class Operation>
__device__ __forceinline__ T block_reduce(T value, T identity, Operation operation, T* scratch) {
    value = warp_reduce(value, operation);
    __syncthreads();  // an earlier reduction may still be reading
    if (lane() == 0) scratch[warp()] = value;
    __syncthreads();
    return warp_reduce(lane() < block_threads() / 32 ? scratch[lane()] : identity, operation);
}

template <class T> __device__ __forceinline__ T block_sum(T value, T* scratch) {
    return block_reduce(value, T(0), Sum{}, scratch);
}

template <class T> __device__ __forceinline__ T block_max(T value, T lowest, T* scratch) {
    return block_reduce(value, lowest, Max{}, scratch);
}

// Count, mean and sum of squared deviations of a sample. No difference of large squares is ever formed (Welford 1962;
// the combination of two samples is Chan, Golub and LeVeque's, 1979).
// Begin with `Moments{}`, the empty sample.
struct Moments {
    float count, mean, deviations;

    __device__ __forceinline__ void add(float value) {
        count += 1;
        const float delta = value - mean;
        mean += delta / count;
        deviations += delta * (value - mean);
    }

    // Divided by the count. 0 of an empty sample.
    __device__ __forceinline__ float variance() const { return count > 0 ? deviations / count : 0; }
};

struct CombineMoments {
    __device__ __forceinline__ Moments operator()(const Moments& a, const Moments& b) const {
        const float count = a.count + b.count;
        if (count == 0) return a;
        const float delta = b.mean - a.mean, share = b.count / count;
        return {count, a.mean + delta * share, a.deviations + b.deviations + delta * delta * a.count * share};
    }
};

template <int WIDTH = 32> __device__ __forceinline__ Moments warp_moments(Moments moments) {
    return warp_reduce<WIDTH>(moments, CombineMoments{});
}

__device__ __forceinline__ Moments block_moments(Moments moments, Moments* scratch) {
    return block_reduce(moments, Moments{}, CombineMoments{}, scratch);
}

// A sum in f32 that carries what its roundings lost (Neumaier 1974): nearly the accuracy of f64 at f32's speed.
// Begin with `CompensatedSum{}`.
struct CompensatedSum {
    float sum, lost;

    __device__ __forceinline__ void add(float value) {
        const float next = sum + value;
        lost += fabsf(sum) >= fabsf(value) ? (sum - next) + value : (value - next) + sum;
        sum = next;
    }

    __device__ __forceinline__ float value() const { return sum + lost; }
};

struct CombineCompensated {
    __device__ __forceinline__ CompensatedSum operator()(CompensatedSum a, const CompensatedSum& b) const {
        a.add(b.sum);
        a.lost += b.lost;
        return a;
    }
};

__device__ __forceinline__ float block_sum(CompensatedSum sum, CompensatedSum* scratch) {
    return block_reduce(sum, CompensatedSum{}, CombineCompensated{}, scratch).value();
}

// Normalisation and reductions. Separate because their threads add up what others hold: all sums go
// in an order that follows from the sizes alone. Means first, then squares of what is left.
#include "common.cuh"

// How many neighbouring channels a thread takes where rows are so divisible.
#define WIDE 4

typedef struct GroupNormArguments {
    const T *x;      // (batch, pixels, channels), dense
    const T *weight; // (channels)
    const T *bias;   // (channels)
    T *y;            // as x
    float *partials; // (batch, groups, chunks, 2): mean, sum of squares; unused by `group_norm`
    float *stats;    // (batch, groups, 2): mean, 1 / deviation; unused by `group_norm`
    long long pixels;
    int batch, channels, groups; // groups divides channels
    int chunk;                   // pixels for a block of group_norm_partials
    int chunks;                  // ⌈pixels / chunk⌉
    int silu;                    // 1: x · sigmoid(x) follows
    double eps;
} GroupNormArguments;

DEVICE float normalised(float x, float mean, float scale, T weight, T bias, int with_silu) {
    float y = (x - mean) * scale * get(weight) + get(bias);
    return with_silu ? silu(y) : y;
}

// All of it in one launch, quick for few pixels (up to 32×32, say).
// grid (groups, batch), block 256.
KERNEL(group_norm, 256, GroupNormArguments) {
    int size = a.channels / a.groups, first = (int)blockIdx.x * size;
    long long count = a.pixels * size;
    long long start = (long long)blockIdx.y * a.pixels * a.channels + first;
    const T *x = a.x + start;
    T *y = a.y + start;
    float sum = 0.0f;
    for (long long i = threadIdx.x; i < count; i += blockDim.x) {
        long long pixel = quotient(i, size);
        sum += get(x[pixel * a.channels + (i - pixel * size)]);
    }
    float mean = block_sum(sum) / (float)count, squares = 0.0f;
    for (long long i = threadIdx.x; i < count; i += blockDim.x) {
        long long pixel = quotient(i, size);
        float rest = get(x[pixel * a.channels + (i - pixel * size)]) - mean;
        squares += rest * rest;
    }
    float scale = 1.0f / sqrtf(block_sum(squares) / (float)count + (float)a.eps);
    for (long long i = threadIdx.x; i < count; i += blockDim.x) {
        long long pixel = quotient(i, size);
        int channel = (int)(i - pixel * size);
        T weight = a.weight[first + channel], bias = a.bias[first + channel];
        long long at = pixel * a.channels + channel;
        y[at] = put(normalised(get(x[at]), mean, scale, weight, bias, a.silu));
    }
}

// Adds up a chunk's values per channel (less the group's mean, and squared, if `means`) into
// `sums` (lines, channels); each line of threads takes every lines-th pixel.
DEVICE void sum_chunk(const T *x, int pixels, int channels, int size, int width, int lines,
                      const float *means, float *sums) {
    int columns = channels / width, together = (int)blockDim.x / lines;
    int line = (int)threadIdx.x / together, column = (int)threadIdx.x % together;
    for (; line < lines && column < columns; column += together) {
        float sum[WIDE], mean[WIDE], value[WIDE];
        for (int j = 0; j < width; j++) {
            sum[j] = 0.0f;
            mean[j] = means ? means[(column * width + j) / size] : 0.0f;
        }
        const T *at = x + (long long)line * channels + column * width;
        for (int pixel = line; pixel < pixels; pixel += lines, at += (long long)lines * channels) {
            if (width == WIDE) {
                get4(at, value);
            } else {
                value[0] = get(at[0]);
            }
            UNROLL
            for (int j = 0; j < WIDE; j++) {
                if (j < width) {
                    float rest = value[j] - mean[j];
                    sum[j] += means ? rest * rest : rest;
                }
            }
        }
        for (int j = 0; j < width; j++) {
            sums[line * channels + column * width + j] = sum[j];
        }
    }
}

// One chunk of the image, all of its groups.
DEVICE void chunk_partials(const GroupNormArguments *a, const T *x, int pixels, float *sums,
                           int width) {
    int size = a->channels / a->groups, lines = (int)blockDim.x / (a->channels / width);
    lines = lines < 1 ? 1 : lines;
    float *means = sums + lines * a->channels, count = (float)pixels * (float)size;
    float *partials = a->partials +
                      (((long long)blockIdx.y * a->groups) * a->chunks + blockIdx.x) * 2;
    for (int pass = 0; pass < 2; pass++) {
        sum_chunk(x, pixels, a->channels, size, width, lines, pass ? means : 0, sums);
        __syncthreads();
        for (int group = (int)threadIdx.x; group < a->groups; group += (int)blockDim.x) {
            float sum = 0.0f;
            for (int line = 0; line < lines; line++) {
                for (int j = 0; j < size; j++) {
                    sum += sums[line * a->channels + group * size + j];
                }
            }
            if (!pass) {
                means[group] = sum / count;
            }
            partials[(long long)group * a->chunks * 2 + pass] = pass ? sum : sum / count;
        }
        __syncthreads();
    }
}

// First of three launches for many pixels: per chunk and group the mean and the sum of squares.
// grid (chunks, batch), block 256,
// shared bytes 4 · (max(channels, 1024) + groups). A chunk of max(1, 16384 / channels) pixels stays
// in the L1 cache for its second pass.
KERNEL(group_norm_partials, 256, GroupNormArguments) {
    DYNAMIC_SHARED(float, sums);
    long long start = (long long)blockIdx.x * a.chunk;
    int pixels = (int)(a.pixels - start < a.chunk ? a.pixels - start : a.chunk);
    const T *x = a.x + ((long long)blockIdx.y * a.pixels + start) * a.channels;
    if (a.channels % WIDE == 0 && aligned(a.x, 16)) {
        chunk_partials(&a, x, pixels, sums, WIDE);
    } else {
        chunk_partials(&a, x, pixels, sums, 1);
    }
}

// Second: joins the chunks. grid (groups, batch), block 128.
KERNEL(group_norm_combine, 128, GroupNormArguments) {
    long long which = (long long)blockIdx.y * a.groups + blockIdx.x;
    const float *partials = a.partials + which * a.chunks * 2;
    float size = (float)(a.channels / a.groups), total = size * (float)a.pixels, sum = 0.0f;
    for (int i = (int)threadIdx.x; i < a.chunks; i += (int)blockDim.x) {
        long long left = a.pixels - (long long)i * a.chunk;
        sum += partials[2 * i] * (size * (float)(left < a.chunk ? left : a.chunk) / total);
    }
    float mean = block_sum(sum), squares = 0.0f;
    for (int i = (int)threadIdx.x; i < a.chunks; i += (int)blockDim.x) {
        long long left = a.pixels - (long long)i * a.chunk;
        float rest = partials[2 * i] - mean;
        squares += partials[2 * i + 1] +
                   rest * rest * (size * (float)(left < a.chunk ? left : a.chunk));
    }
    squares = block_sum(squares);
    if (threadIdx.x == 0) {
        a.stats[which * 2] = mean;
        a.stats[which * 2 + 1] = 1.0f / sqrtf(squares / total + (float)a.eps);
    }
}

// Third: applies them. grid (any, batch), block 256; good is min(⌈pixels · channels / 1024⌉,
// 16 · multiprocessors).
KERNEL(group_norm_apply, 256, GroupNormArguments) {
    long long count = a.pixels * a.channels, start = (long long)blockIdx.y * count;
    const T *x = a.x + start;
    T *y = a.y + start;
    const float *stats = a.stats + (long long)blockIdx.y * a.groups * 2;
    int size = a.channels / a.groups;
    if (a.channels % WIDE == 0 && aligned(a.x, 16) && aligned(a.y, 16)) {
        for (long long i = first_element(); i < count / WIDE; i += element_step()) {
            int channel = (int)(i * WIDE - quotient(i * WIDE, a.channels) * a.channels);
            float four[WIDE];
            get4(x + i * WIDE, four);
            UNROLL
            for (int j = 0; j < WIDE; j++) {
                const float *stat = stats + (channel + j) / size * 2;
                four[j] = normalised(four[j], stat[0], stat[1], a.weight[channel + j],
                                     a.bias[channel + j], a.silu);
            }
            put4(y + i * WIDE, four);
        }
        return;
    }
    for (long long i = first_element(); i < count; i += element_step()) {
        int channel = (int)(i - quotient(i, a.channels) * a.channels);
        const float *stat = stats + channel / size * 2;
        T weight = a.weight[channel], bias = a.bias[channel];
        y[i] = put(normalised(get(x[i]), stat[0], stat[1], weight, bias, a.silu));
    }
}

typedef struct LayerNormArguments {
    const T *x;      // (rows, size), dense
    const T *weight; // (size)
    const T *bias;   // (size)
    T *y;            // as x
    long long rows;
    int size;
    double eps;
} LayerNormArguments;

// Up to WIDE values of a row from `at` on, as f32; zeros beyond its end.
DEVICE void part_of_row(const T *x, int at, int size, int dense, float *four) {
    if (dense) {
        get4(x + at, four);
        return;
    }
    UNROLL
    for (int j = 0; j < WIDE; j++) {
        four[j] = at + j < size ? get(x[at + j]) : 0.0f;
    }
}

// A warp for each row. grid (⌈rows / 8⌉), block 256.
KERNEL(layer_norm, 256, LayerNormArguments) {
    long long row = (long long)blockIdx.x * 8 + threadIdx.x / 32;
    int lane = (int)threadIdx.x % 32;
    if (row >= a.rows) {
        return;
    }
    const T *x = a.x + row * a.size;
    T *y = a.y + row * a.size;
    int dense = a.size % WIDE == 0 && aligned(a.x, 16) && aligned(a.y, 16);
    float four[WIDE], sum = 0.0f, squares = 0.0f;
    for (int i = lane * WIDE; i < a.size; i += 32 * WIDE) {
        part_of_row(x, i, a.size, dense, four);
        sum += (four[0] + four[1]) + (four[2] + four[3]);
    }
    float mean = warp_sum(sum) / (float)a.size;
    for (int i = lane * WIDE; i < a.size; i += 32 * WIDE) {
        part_of_row(x, i, a.size, dense, four);
        UNROLL
        for (int j = 0; j < WIDE; j++) {
            float rest = i + j < a.size ? four[j] - mean : 0.0f;
            squares += rest * rest;
        }
    }
    float scale = 1.0f / sqrtf(warp_sum(squares) / (float)a.size + (float)a.eps);
    for (int i = lane * WIDE; i < a.size; i += 32 * WIDE) {
        part_of_row(x, i, a.size, dense, four);
        UNROLL
        for (int j = 0; j < WIDE; j++) {
            if (i + j < a.size) {
                four[j] = normalised(four[j], mean, scale, a.weight[i + j], a.bias[i + j], 0);
                if (!dense) {
                    y[i + j] = put(four[j]);
                }
            }
        }
        if (dense) {
            put4(y + i, four);
        }
    }
}

typedef struct ReduceArguments {
    const T *x; // (rows, size), dense
    T *y;       // (rows)
    long long rows;
    long long size;
    int op; // sum 0, min 1, max 2
} ReduceArguments;

// What is left of two values; NaN of either is lost in minima and maxima, as on the CPU.
DEVICE float joined(int op, float x, float y) {
    switch (op) {
    case 0: return x + y;
    case 1: return y < x ? y : x;
    default: return y > x ? y : x;
    }
}

DEVICE float nothing_yet(int op) { return op == 0 ? 0.0f : (op == 1 ? INFINITE : -INFINITE); }

DEVICE float warp_joined(int op, float value) {
    UNROLL
    for (int lane = 16; lane > 0; lane /= 2) {
        value = joined(op, value, __shfl_xor_sync(FULL_WARP, value, lane));
    }
    return value;
}

// Over the last dimension, a warp for each row. grid (⌈rows / 8⌉), block 256.
KERNEL(reduce, 256, ReduceArguments) {
    long long row = (long long)blockIdx.x * 8 + threadIdx.x / 32;
    if (row >= a.rows) {
        return;
    }
    float value = nothing_yet(a.op);
    for (long long i = threadIdx.x % 32; i < a.size; i += 32) {
        value = joined(a.op, value, get(a.x[row * a.size + i]));
    }
    value = warp_joined(a.op, value);
    if (threadIdx.x % 32 == 0) {
        a.y[row] = put(value);
    }
}

// The same, a block for each row: for few and long ones. grid (rows), block 1024.
KERNEL(reduce_long, 1024, ReduceArguments) {
    SHARED float parts[32];
    const T *x = a.x + (long long)blockIdx.x * a.size;
    float value = nothing_yet(a.op);
    for (long long i = threadIdx.x; i < a.size; i += blockDim.x) {
        value = joined(a.op, value, get(x[i]));
    }
    value = warp_joined(a.op, value);
    if (threadIdx.x % 32 == 0) {
        parts[threadIdx.x / 32] = value;
    }
    __syncthreads();
    if (threadIdx.x < 32) {
        value = threadIdx.x < blockDim.x / 32 ? parts[threadIdx.x] : nothing_yet(a.op);
        value = warp_joined(a.op, value);
        if (threadIdx.x == 0) {
            a.y[blockIdx.x] = put(value);
        }
    }
}

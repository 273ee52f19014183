// Attention without a matrix of queries × keys: with tensor cores for heads of up to 160 numbers
// (flash.cuh), and in f32 arithmetic for any head of up to 512. Separate because both keep a
// running softmax per query.
//
// attention_48, _64, _80, _128 and _160 exist in the f16 build, and in the bf16 build since sm_80.
// They take heads of up to so many numbers, a multiple of 8: choose the smallest that fits. All
// else is attention_general's: f32, bf16 before sm_80, larger or odd heads. y lies on a multiple of
// 4 bytes; they are quick where the operands lie on multiples of 16 and all strides are multiples
// of 8.
#include "heads.cuh"

#if TENSOR

#define PART(name) name##_48
#define DIM 48
#define KEYS 64
#include "flash.cuh"
#undef PART
#undef DIM
#undef KEYS

#define PART(name) name##_64
#define DIM 64
#define KEYS 64
#include "flash.cuh"
#undef PART
#undef DIM
#undef KEYS

#define PART(name) name##_80
#define DIM 80
#define KEYS 64
#include "flash.cuh"
#undef PART
#undef DIM
#undef KEYS

#define PART(name) name##_128
#define DIM 128
#define KEYS 32
#include "flash.cuh"
#undef PART
#undef DIM
#undef KEYS

#define PART(name) name##_160
#define DIM 160
#define KEYS 32
#include "flash.cuh"

// grid (⌈queries / 64⌉, heads, batch), block 128, no dynamic shared memory.
KERNEL(attention_48, 128, AttentionArguments) { attend_48(&a); }
KERNEL(attention_64, 128, AttentionArguments) { attend_64(&a); }
KERNEL(attention_80, 128, AttentionArguments) { attend_80(&a); }
KERNEL(attention_128, 128, AttentionArguments) { attend_128(&a); }
KERNEL(attention_160, 128, AttentionArguments) { attend_160(&a); }

#endif

// attention_general: a block has 32 queries, a tile 32 keys.
#define QUERIES 32
#define LARGEST 512
#define SLICE 32 // numbers of a head that lie in shared memory at once, for scores
#define WIDTH 64 // and for values
#define NARROW (SLICE + 1)

// Numbers `column`… of 32 rows of a head, as f32; zeros beyond the ends.
DEVICE void load_slice(const T *rows, long long stride, int first, int end, int column, int width,
                       int pitch, int head_dim, float *slice) {
    for (int i = (int)threadIdx.x; i < 32 * width; i += 256) {
        int row = i / width, at = column + i % width;
        int inside = first + row < end && at < head_dim;
        slice[row * pitch + i % width] = inside ? get(rows[(first + row) * stride + at]) : 0.0f;
    }
}

typedef struct Head {
    const T *query;
    const T *key;
    const T *value;
} Head;

// Scores of the block's queries and a tile's keys into `scores`, times the scale and log₂ e. Each
// thread has two queries and two keys.
DEVICE void score_general(const AttentionArguments *a, const Head *head, int first, int start,
                          float *queries, float *keys, float *scores) {
    int down = (int)threadIdx.x / 16, across = (int)threadIdx.x % 16;
    float sums[2][2] = {{0.0f, 0.0f}, {0.0f, 0.0f}};
    for (int column = 0; column < a->head_dim; column += SLICE) {
        load_slice(head->query, a->query_row_stride, first, a->queries, column, SLICE, NARROW,
                   a->head_dim, queries);
        load_slice(head->key, a->key_row_stride, start, a->keys, column, SLICE, NARROW, a->head_dim,
                   keys);
        __syncthreads();
        UNROLL
        for (int k = 0; k < SLICE; k++) {
            UNROLL
            for (int i = 0; i < 4; i++) {
                sums[i / 2][i % 2] += queries[(down + i / 2 * 16) * NARROW + k] *
                                      keys[(across + i % 2 * 16) * NARROW + k];
            }
        }
        __syncthreads();
    }
    UNROLL
    for (int i = 0; i < 4; i++) {
        int query = down + i / 2 * 16, key = across + i % 2 * 16;
        int seen = start + key < a->keys && !(a->causal && start + key > first + query);
        scores[query * NARROW + key] =
            seen ? sums[i / 2][i % 2] * (a->scale * LOG2_E) : -INFINITE;
    }
    __syncthreads();
}

// Weights of a tile's keys for the query that eight threads share; gives what earlier sums must be
// multiplied with.
DEVICE float weigh_general(float *scores, float *maximum, float *total) {
    float before = *maximum, most = before, sum = 0.0f;
    float *row = scores + (int)threadIdx.x / 8 * NARROW + (int)threadIdx.x % 8 * 4;
    for (int j = 0; j < 4; j++) {
        most = fmaxf(most, row[j]);
    }
    for (int lane = 1; lane < 8; lane *= 2) {
        most = fmaxf(most, __shfl_xor_sync(FULL_WARP, most, lane));
    }
    for (int j = 0; j < 4; j++) {
        row[j] = exp2f(row[j] - most);
        sum += row[j];
    }
    for (int lane = 1; lane < 8; lane *= 2) {
        sum += __shfl_xor_sync(FULL_WARP, sum, lane);
    }
    float correction = exp2f(before - most);
    *maximum = most;
    *total = *total * correction + sum;
    return correction;
}

// Correct for any head of 1 to 512 numbers, in f32 arithmetic.
// grid (⌈queries / 32⌉, heads, batch), block 256, no dynamic shared memory.
KERNEL(attention_general, 256, AttentionArguments) {
    SHARED float queries[QUERIES * NARROW];
    SHARED float keys[32 * NARROW];
    SHARED float scores[QUERIES * NARROW];
    SHARED float values[32 * WIDTH];
    int first = (int)blockIdx.x * QUERIES, at = (int)blockIdx.y * a.head_dim;
    int end = keys_before(&a, first + QUERIES);
    // Eight threads share a query; of each 64 numbers of the head they have four and four.
    int query = (int)threadIdx.x / 8, column = (int)threadIdx.x % 8 * 4;
    Head head;
    head.query = a.query + blockIdx.z * a.query_batch_stride + at;
    head.key = a.key + blockIdx.z * a.key_batch_stride + at;
    head.value = a.value + blockIdx.z * a.value_batch_stride + at;
    float sums[LARGEST / WIDTH][8], maximum = -INFINITE, total = 0.0f;
    UNROLL
    for (int i = 0; i < LARGEST / 8; i++) {
        sums[i / 8][i % 8] = 0.0f;
    }
    for (int start = 0; start < end; start += 32) {
        score_general(&a, &head, first, start, queries, keys, scores);
        float correction = weigh_general(scores, &maximum, &total);
        UNROLL
        for (int part = 0; part < LARGEST / WIDTH; part++) {
            if (part * WIDTH < a.head_dim) {
                __syncthreads();
                load_slice(head.value, a.value_row_stride, start, a.keys, part * WIDTH, WIDTH,
                           WIDTH, a.head_dim, values);
                __syncthreads();
                UNROLL
                for (int i = 0; i < 8; i++) {
                    sums[part][i] *= correction;
                }
                for (int key = 0; key < 32; key++) {
                    float weight = scores[query * NARROW + key];
                    const float *value = values + key * WIDTH + column;
                    UNROLL
                    for (int i = 0; i < 8; i++) {
                        sums[part][i] += weight * value[i / 4 * 32 + i % 4];
                    }
                }
            }
        }
        __syncthreads();
    }
    if (first + query < a.queries) {
        long long row = (long long)blockIdx.z * a.queries + first + query;
        T *y = a.y + row * a.heads * a.head_dim + at;
        UNROLL
        for (int i = 0; i < LARGEST / 8; i++) {
            int to = i / 8 * WIDTH + column + i % 8 / 4 * 32 + i % 4;
            if (to < a.head_dim) {
                y[to] = put(sums[i / 8][i % 8] / total);
            }
        }
    }
}

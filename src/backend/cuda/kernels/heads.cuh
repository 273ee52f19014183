// The operands of attention. Separate because kernels with and without tensor cores share them.
#ifndef HEADS_CUH
#define HEADS_CUH

#include "tensor.cuh"

typedef struct AttentionArguments {
    const T *query; // row r of image b begins at b · batch_stride + r · row_stride, in elements;
    const T *key;   // heads lie side by side in a row
    const T *value;
    T *y; // (batch, queries, heads · head_dim), dense
    long long query_batch_stride, query_row_stride;
    long long key_batch_stride, key_row_stride;
    long long value_batch_stride, value_row_stride;
    int batch, heads, head_dim, queries, keys; // keys > 0
    int causal;                                // 1: a query sees only keys up to its own index
    float scale;                               // multiplies the scores
} AttentionArguments;

#define LOG2_E 1.44269504088896340736f

// How many keys the queries before `end` look at.
DEVICE int keys_before(const AttentionArguments *a, int end) {
    return a->causal && end < a->keys ? end : a->keys;
}

#endif

// Attention on tensor cores for heads of up to DIM numbers, a multiple of 16. Separate because it
// is included once per DIM, with KEYS (keys in a tile: 32 or 64) and PART(name).
//
// Four warps have 16 queries each. Their fragments stay in registers; tiles of keys and values lie
// in shared memory twice, so that the next ones arrive while these are worked on. The maximum and
// the sum of each row are corrected from tile to tile: the scores are never stored.
#define PITCH (DIM + 8)

// Rows `first`… of a head, `count` of them, zeros beyond `end` and beyond head_dim.
DEVICE void PART(load)(const T *rows, long long stride, int first, int end, int count,
                       int head_dim, T *tile) {
    int quick = head_dim % 8 == 0 && stride % 8 == 0 && aligned(rows, 16);
    for (int chunk = (int)threadIdx.x; chunk < count * (DIM / 8); chunk += 128) {
        int row = chunk / (DIM / 8), column = chunk % (DIM / 8) * 8;
        T *to = tile + row * PITCH + column;
        const T *from = rows + (first + row) * stride + column;
        if (quick) {
            int real = first + row < end && column < head_dim;
            copy16(to, real ? from : rows, real);
        } else {
            KEEP_LOOP
            for (int j = 0; j < 8; j++) {
                to[j] = first + row < end && column + j < head_dim ? from[j] : (T)0;
            }
        }
    }
}

// Scores of this warp's 16 queries and the tile's keys, times the scale and log₂ e.
DEVICE void PART(score)(const AttentionArguments *a, unsigned (*queries)[4], const T *keys,
                        int first_key, int query, float (*scores)[4]) {
    int lane = (int)threadIdx.x % 32;
    const T *key = keys + (lane / 16 * 8 + lane % 8) * PITCH + lane / 8 % 2 * 8;
    UNROLL
    for (int j = 0; j < KEYS / 8; j += 2) {
        UNROLL
        for (int i = 0; i < 8; i++) {
            scores[j + i / 4][i % 4] = 0.0f;
        }
        UNROLL
        for (int k = 0; k < DIM / 16; k++) {
            unsigned b[4];
            load_matrices(b, key + j * 8 * PITCH + k * 16);
            multiply_add(scores[j], queries[k], b);
            multiply_add(scores[j + 1], queries[k], b + 2);
        }
    }
    float scale = a->scale * LOG2_E;
    UNROLL
    for (int i = 0; i < KEYS / 2; i++) {
        int at = first_key + i / 4 * 8 + lane % 4 * 2 + i % 2;
        int seen = at < a->keys && !(a->causal && at > query + i % 4 / 2 * 8);
        scores[i / 4][i % 4] = seen ? scores[i / 4][i % 4] * scale : -INFINITE;
    }
}

// Scores become weights: 2^(score − maximum). Rows are those of lane / 4 and 8 further.
DEVICE void PART(weigh)(float (*scores)[4], float (*sums)[4], float *maxima, float *totals) {
    UNROLL
    for (int half = 0; half < 2; half++) {
        float maximum = maxima[half], total = 0.0f;
        UNROLL
        for (int j = 0; j < KEYS / 8; j++) {
            maximum = fmaxf(maximum, fmaxf(scores[j][half * 2], scores[j][half * 2 + 1]));
        }
        maximum = fmaxf(maximum, __shfl_xor_sync(FULL_WARP, maximum, 1));
        maximum = fmaxf(maximum, __shfl_xor_sync(FULL_WARP, maximum, 2));
        float correction = exp2f(maxima[half] - maximum);
        maxima[half] = maximum;
        UNROLL
        for (int j = 0; j < KEYS / 8; j++) {
            UNROLL
            for (int i = 0; i < 2; i++) {
                float weight = exp2f(scores[j][half * 2 + i] - maximum);
                scores[j][half * 2 + i] = weight;
                total += weight;
            }
        }
        totals[half] = totals[half] * correction + total;
        UNROLL
        for (int j = 0; j < DIM / 8; j++) {
            sums[j][half * 2] *= correction;
            sums[j][half * 2 + 1] *= correction;
        }
    }
}

// Adds the values of the tile, weighted. What a product gives has the layout that the next takes.
DEVICE void PART(gather)(float (*weights)[4], const T *values, float (*sums)[4]) {
    int lane = (int)threadIdx.x % 32;
    const T *value = values + (lane / 8 % 2 * 8 + lane % 8) * PITCH + lane / 16 * 8;
    UNROLL
    for (int k = 0; k < KEYS / 16; k++) {
        unsigned a[4];
        UNROLL
        for (int i = 0; i < 4; i++) {
            const float *pair = weights[2 * k + i / 2] + i % 2 * 2;
            a[i] = pair_of(pair[0], pair[1]);
        }
        UNROLL
        for (int j = 0; j < DIM / 8; j += 2) {
            unsigned b[4];
            load_transposed(b, value + k * 16 * PITCH + j * 8);
            multiply_add(sums[j], a, b);
            multiply_add(sums[j + 1], a, b + 2);
        }
    }
}

DEVICE void PART(write)(const AttentionArguments *a, int query, float (*sums)[4],
                        const float *totals) {
    int lane = (int)threadIdx.x % 32, inner = a->heads * a->head_dim;
    UNROLL
    for (int half = 0; half < 2; half++) {
        float total = totals[half];
        total += __shfl_xor_sync(FULL_WARP, total, 1);
        total += __shfl_xor_sync(FULL_WARP, total, 2);
        float factor = 1.0f / total;
        int row = query + half * 8;
        T *y = a->y + ((long long)blockIdx.z * a->queries + row) * inner +
               (int)blockIdx.y * a->head_dim;
        UNROLL
        for (int j = 0; j < DIM / 8; j++) {
            int column = j * 8 + lane % 4 * 2;
            if (row < a->queries && column < a->head_dim) {
                // head_dim is a multiple of 8, so that both exist.
                *(unsigned *)(y + column) =
                    pair_of(sums[j][half * 2] * factor, sums[j][half * 2 + 1] * factor);
            }
        }
    }
}

DEVICE void PART(attend)(const AttentionArguments *a) {
    SHARED T keys[2 * KEYS * PITCH];
    SHARED T values[2 * KEYS * PITCH];
    int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32, first = (int)blockIdx.x * 64;
    int at = (int)blockIdx.y * a->head_dim, end = keys_before(a, first + 64);
    const T *query = a->query + blockIdx.z * a->query_batch_stride + at;
    const T *key = a->key + blockIdx.z * a->key_batch_stride + at;
    const T *value = a->value + blockIdx.z * a->value_batch_stride + at;
    unsigned queries[DIM / 16][4];
    float sums[DIM / 8][4], maxima[2] = {-INFINITE, -INFINITE}, totals[2] = {0.0f, 0.0f};
    UNROLL
    for (int i = 0; i < DIM / 2; i++) {
        sums[i / 4][i % 4] = 0.0f;
    }
    // The queries pass through the place of the keys.
    PART(load)(query, a->query_row_stride, first, a->queries, 64, a->head_dim, keys);
    copies_begun();
    copies_done(0);
    __syncthreads();
    UNROLL
    for (int k = 0; k < DIM / 16; k++) {
        load_matrices(queries[k], keys + (warp * 16 + lane % 16) * PITCH + lane / 16 * 8 + k * 16);
    }
    __syncthreads();
    PART(load)(key, a->key_row_stride, 0, end, KEYS, a->head_dim, keys);
    PART(load)(value, a->value_row_stride, 0, end, KEYS, a->head_dim, values);
    copies_begun();
    for (int start = 0, odd = 0; start < end; start += KEYS, odd ^= 1) {
        int next = start + KEYS, place = odd * KEYS * PITCH, other = (odd ^ 1) * KEYS * PITCH;
        if (next < end) {
            PART(load)(key, a->key_row_stride, next, end, KEYS, a->head_dim, keys + other);
            PART(load)(value, a->value_row_stride, next, end, KEYS, a->head_dim, values + other);
            copies_begun();
        }
        copies_done(next < end);
        __syncthreads();
        float scores[KEYS / 8][4];
        PART(score)(a, queries, keys + place, start, first + warp * 16 + lane / 4, scores);
        PART(weigh)(scores, sums, maxima, totals);
        PART(gather)(scores, values + place, sums);
        __syncthreads();
    }
    PART(write)(a, first + warp * 16 + lane / 4, sums, totals);
}

#undef PITCH

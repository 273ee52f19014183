// A convolution on tensor cores, one tile of the result for a block. Separate because it is
// included once per tile size: TILE (rows and columns; it has 2 · TILE threads), WARP_ROWS (rows of
// a warp's part; its columns are always 32), WARPS_DOWN, and PART(name), which makes names differ.
//
// Tiles of the implicit matrix and of the weight, 32 columns each, lie in shared memory three
// times: while one pair is multiplied, the next two arrive. A row is 64 bytes, 4 chunks, which
// change places from row to row: so the 8 rows that ldmatrix takes at once lie in different banks.
#define FRAGMENTS (WARP_ROWS / 16)
#define STAGES 3

// Copies this thread's part of the next columns, and moves on.
DEVICE void PART(load)(const Conv2dArguments *a, Loader *loader, T *rows, T *weights) {
    int first = (int)threadIdx.x / 4, place = ((int)threadIdx.x % 4 ^ (first / 2 % 4)) * CHUNK;
    UNROLL
    for (int i = 0; i < 2; i++) {
        int at = (first + i * (TILE / 2)) * STEP + place;
        const T *pixel = loader->pixels[i], *weight = loader->weights[i];
        if (loader->dense) {
            int inside = loader->column < loader->columns;
            int sees = inside && pixel != 0, weighs = inside && weight != 0;
            copy16(rows + at, sees ? pixel + loader->tap.channel : a->x, sees);
            copy16(weights + at, weighs ? weight + loader->column : a->weight, weighs);
        } else {
            KEEP_LOOP
            for (int j = 0; j < CHUNK; j++) {
                int column = loader->column + j, inside = column < loader->columns;
                rows[at + j] = put(inside ? window_at(a, loader->targets[i], column) : 0.0f);
                weights[at + j] = inside && weight ? weight[column] : (T)0;
            }
        }
    }
    move_on(a, loader);
}

DEVICE void PART(multiply)(float (*sums)[4][4], const T *rows, const T *weights) {
    int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32;
    const T *row = rows + (warp % WARPS_DOWN * WARP_ROWS + lane % 16) * STEP;
    const T *weight = weights + (warp / WARPS_DOWN * 32 + lane / 16 * 8 + lane % 8) * STEP;
    UNROLL
    for (int k = 0; k < STEP / CHUNK; k += 2) {
        unsigned a[FRAGMENTS][4], b[2][4];
        UNROLL
        for (int i = 0; i < FRAGMENTS; i++) {
            load_matrices(a[i], row + i * 16 * STEP + ((k + lane / 16) ^ (lane / 2 % 4)) * CHUNK);
        }
        UNROLL
        for (int j = 0; j < 2; j++) {
            int chunk = (k + lane / 8 % 2) ^ (lane / 2 % 4);
            load_matrices(b[j], weight + j * 16 * STEP + chunk * CHUNK);
        }
        UNROLL
        for (int i = 0; i < FRAGMENTS; i++) {
            UNROLL
            for (int j = 0; j < 4; j++) {
                multiply_add(sums[i][j], a[i], b[j / 2] + j % 2 * 2);
            }
        }
    }
}

DEVICE void PART(write)(const Conv2dArguments *a, float (*sums)[4][4]) {
    int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32;
    long long rows = (long long)a->batch * a->out_h * a->out_w;
    long long first = (long long)blockIdx.x * TILE + warp % WARPS_DOWN * WARP_ROWS + lane / 4;
    int left = (int)blockIdx.y * TILE + warp / WARPS_DOWN * 32 + lane % 4 * 2;
    UNROLL
    for (int i = 0; i < FRAGMENTS * 2; i++) {
        UNROLL
        for (int j = 0; j < 4; j++) {
            long long row = first + i * 8;
            int column = left + j * 8;
            const float *pair = sums[i / 2][j] + i % 2 * 2;
            if (row < rows && column < a->out) {
                write_pair(a, row, column, pair[0], pair[1]);
            }
        }
    }
}

DEVICE void PART(convolve)(const Conv2dArguments *a) {
    SHARED T rows[STAGES][TILE * STEP];
    SHARED T weights[STAGES][TILE * STEP];
    float sums[FRAGMENTS][4][4];
    UNROLL
    for (int i = 0; i < FRAGMENTS * 16; i++) {
        sums[i / 16][i / 4 % 4][i % 4] = 0.0f;
    }
    Range range = part_of(a);
    Loader loader;
    begin(a, TILE, range.first * STEP, &loader);
    UNROLL
    for (int step = 0; step < STAGES - 1; step++) {
        if (step < range.count) {
            PART(load)(a, &loader, rows[step], weights[step]);
        }
        copies_begun();
    }
    int stage = 0, free = STAGES - 1;
    for (int step = 0; step < range.count; step++) {
        copies_done(1);
        // Now all see this step's numbers, and nobody needs those of the step before.
        __syncthreads();
        if (step + STAGES - 1 < range.count) {
            PART(load)(a, &loader, rows[free], weights[free]);
        }
        copies_begun();
        PART(multiply)(sums, rows[stage], weights[stage]);
        free = stage;
        stage = stage + 1 == STAGES ? 0 : stage + 1;
    }
    PART(write)(a, sums);
}

#undef FRAGMENTS
#undef STAGES

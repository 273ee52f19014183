// A convolution without tensor cores, in f32, one tile of the result for a block. Separate because
// it is included once per tile size, as tensor_tile.cuh, with TILE and PART(name). Each thread has
// 8 rows and TILE / 16 columns of the tile in registers.
//
// 16 columns of the implicit matrix and of the weight lie in shared memory twice, transposed: while
// one pair is multiplied, the next is on its way in registers.
#define PITCH (TILE + 4)
#define COLUMNS (TILE / 16)

// What has left device memory but not yet reached shared memory.
typedef struct PART(Chunks) {
    float rows[2][CHUNK], weights[2][CHUNK];
} PART(Chunks);

// Reads this thread's part of the next columns into registers, and moves on.
DEVICE void PART(fetch)(const Conv2dArguments *a, Loader *loader, PART(Chunks) * chunks) {
    UNROLL
    for (int i = 0; i < 2; i++) {
        const T *pixel = loader->pixels[i], *weight = loader->weights[i];
        UNROLL
        for (int j = 0; j < CHUNK; j++) {
            int column = loader->column + j, inside = column < loader->columns;
            chunks->rows[i][j] = chunks->weights[i][j] = 0.0f;
            if (inside && !loader->dense) {
                chunks->rows[i][j] = window_at(a, loader->targets[i], column);
                chunks->weights[i][j] = weight ? get(weight[column]) : 0.0f;
            }
        }
        if (loader->dense && loader->column < loader->columns) {
            if (pixel) {
                get4(pixel + loader->tap.channel, chunks->rows[i]);
            }
            if (weight) {
                get4(weight + loader->column, chunks->weights[i]);
            }
        }
    }
    move_on(a, loader);
}

DEVICE void PART(store)(const PART(Chunks) * chunks, float *rows, float *weights) {
    UNROLL
    for (int i = 0; i < 2; i++) {
        int row = (int)threadIdx.x / 4 + i * (TILE / 2);
        UNROLL
        for (int j = 0; j < CHUNK; j++) {
            int at = ((int)threadIdx.x % 4 * CHUNK + j) * PITCH + row;
            rows[at] = chunks->rows[i][j];
            weights[at] = chunks->weights[i][j];
        }
    }
}

DEVICE void PART(four)(float *to, const float *from) {
    float4 four = *(const float4 *)from;
    to[0] = four.x;
    to[1] = four.y;
    to[2] = four.z;
    to[3] = four.w;
}

DEVICE void PART(multiply)(float (*sums)[COLUMNS], const float *rows, const float *weights) {
    int down = (int)threadIdx.x / 16 * 8, across = (int)threadIdx.x % 16 * 4;
    UNROLL
    for (int k = 0; k < STEP; k++) {
        float row[8], weight[COLUMNS];
        UNROLL
        for (int i = 0; i < 8; i += 4) {
            PART(four)(row + i, rows + k * PITCH + down + i);
        }
        UNROLL
        for (int j = 0; j < COLUMNS; j += 4) {
            PART(four)(weight + j, weights + k * PITCH + j * 16 + across);
        }
        UNROLL
        for (int i = 0; i < 8; i++) {
            UNROLL
            for (int j = 0; j < COLUMNS; j++) {
                sums[i][j] += row[i] * weight[j];
            }
        }
    }
}

DEVICE void PART(write)(const Conv2dArguments *a, float (*sums)[COLUMNS]) {
    int down = (int)threadIdx.x / 16 * 8, across = (int)threadIdx.x % 16 * 4;
    long long rows = (long long)a->batch * a->out_h * a->out_w;
    UNROLL
    for (int i = 0; i < 8; i++) {
        UNROLL
        for (int j = 0; j < COLUMNS; j += 2) {
            long long row = (long long)blockIdx.x * TILE + down + i;
            int column = (int)blockIdx.y * TILE + j / 4 * 64 + across + j % 4;
            if (row < rows && column < a->out) {
                write_pair(a, row, column, sums[i][j], sums[i][j + 1]);
            }
        }
    }
}

DEVICE void PART(convolve)(const Conv2dArguments *a) {
    SHARED float rows[2][STEP * PITCH];
    SHARED float weights[2][STEP * PITCH];
    float sums[8][COLUMNS];
    UNROLL
    for (int i = 0; i < 8 * COLUMNS; i++) {
        sums[i / COLUMNS][i % COLUMNS] = 0.0f;
    }
    Range range = part_of(a);
    Loader loader;
    PART(Chunks) chunks;
    begin(a, TILE, range.first * STEP, &loader);
    PART(fetch)(a, &loader, &chunks);
    PART(store)(&chunks, rows[0], weights[0]);
    __syncthreads();
    for (int step = 0; step < range.count; step++) {
        int more = step + 1 < range.count, other = (step + 1) % 2;
        if (more) {
            PART(fetch)(a, &loader, &chunks);
        }
        PART(multiply)(sums, rows[step % 2], weights[step % 2]);
        if (more) {
            PART(store)(&chunks, rows[other], weights[other]);
        }
        __syncthreads();
    }
    PART(write)(a, sums);
}

#undef PITCH
#undef COLUMNS

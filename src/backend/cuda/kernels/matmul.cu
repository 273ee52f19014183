// Products of matrices as candle's traits ask for them. Separate from conv2d.cu because either
// operand may lie in memory in any way; models use it rarely, so that one simple form is enough.
#include "common.cuh"

typedef struct MatmulArguments {
    const T *left;
    const T *right;
    T *y;            // (batch, m, n), dense
    View left_view;  // (batch, m, k), any strides
    View right_view; // (batch, k, n), any strides
} MatmulArguments;

#define TILE 32
#define PITCH (TILE + 1)

// A tile of one operand's matrix, zeros beyond its ends; threads that follow each other read along
// the dimension whose elements lie closer.
DEVICE void load_matrix(const T *x, const View *view, int row, int column, float *tile) {
    long long down = view->strides[1], across = view->strides[2];
    const T *start = x + view->offset + blockIdx.z * view->strides[0];
    int turned = down < across;
    for (int i = (int)threadIdx.x; i < TILE * TILE; i += 256) {
        int r = turned ? i % TILE : i / TILE, c = turned ? i / TILE : i % TILE;
        int inside = row + r < view->dims[1] && column + c < view->dims[2];
        long long place = (row + r) * down + (column + c) * across;
        tile[r * PITCH + c] = inside ? get(start[place]) : 0.0f;
    }
}

// y = left · right, in f32 arithmetic: sums of 32 products are added up.
// grid (⌈n / 32⌉, ⌈m / 32⌉, batch), block 256, no dynamic shared memory.
KERNEL(matmul, 256, MatmulArguments) {
    SHARED float lefts[TILE * PITCH];
    SHARED float rights[TILE * PITCH];
    int top = (int)blockIdx.y * TILE, first = (int)blockIdx.x * TILE;
    int row = (int)threadIdx.x / TILE, column = (int)threadIdx.x % TILE;
    float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    for (int start = 0; start < a.left_view.dims[2]; start += TILE) {
        load_matrix(a.left, &a.left_view, top, start, lefts);
        load_matrix(a.right, &a.right_view, start, first, rights);
        __syncthreads();
        float parts[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        UNROLL
        for (int k = 0; k < TILE; k++) {
            UNROLL
            for (int i = 0; i < 4; i++) {
                parts[i] += lefts[(row + i * 8) * PITCH + k] * rights[k * PITCH + column];
            }
        }
        UNROLL
        for (int i = 0; i < 4; i++) {
            sums[i] += parts[i];
        }
        __syncthreads();
    }
    int m = a.left_view.dims[1], n = a.right_view.dims[2];
    UNROLL
    for (int i = 0; i < 4; i++) {
        int at = top + row + i * 8;
        if (at < m && first + column < n) {
            a.y[((long long)blockIdx.z * m + at) * n + first + column] = put(sums[i]);
        }
    }
}

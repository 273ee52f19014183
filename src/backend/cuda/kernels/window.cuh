// Where a convolution's window looks: rows of an implicit matrix (output pixels × taps · channels)
// that is never stored. Separate from the tiles because both kinds of arithmetic read it.
#ifndef WINDOW_CUH
#define WINDOW_CUH

#include "tensor.cuh"

typedef struct Conv2dArguments {
    const T *x;        // (batch, height, width, channels), dense
    const T *weight;   // (out, kernel_h, kernel_w, channels), dense
    const T *bias;     // (out), or null
    const T *residual; // as y, or null: added after the activation
    T *y;              // (batch, out_h, out_w, out), dense
    float *partials;   // (splits, rows of y, out), or null where splits is 1
    int batch, height, width, channels;
    int out, kernel_h, kernel_w;
    int stride, padding;
    int up_h, up_w;   // the size that x is enlarged to before the window, or both 0
    int out_h, out_w; // of y; batch · out_h · out_w < 2^31
    int activation;   // identity 0, silu 1, quick_gelu 2, gelu (erf) 3
    int splits;       // parts of the sum that blocks of their own add up: grid.z
} Conv2dArguments;

// Elements that a thread copies at once, and columns of the implicit matrix in a step: 4 threads
// share a row.
#if TENSOR
#define CHUNK 8
#else
#define CHUNK 4
#endif
#define STEP (4 * CHUNK)

// One output pixel of the tile.
typedef struct Target {
    const T *image; // null beyond the last pixel
    int y, x;       // of the window's first tap, in the enlarged image; may be negative
} Target;

DEVICE Target target_of(const Conv2dArguments *a, long long index) {
    Target target;
    target.image = 0;
    target.y = target.x = 0;
    if (index < (long long)a->batch * a->out_h * a->out_w) {
        int line = (int)index / a->out_w, image = line / a->out_h;
        target.image = a->x + (long long)image * a->height * a->width * a->channels;
        target.y = (line - image * a->out_h) * a->stride - a->padding;
        target.x = ((int)index - line * a->out_w) * a->stride - a->padding;
    }
    return target;
}

// What a tap of the window sees: the first channel of a pixel, or null in the padding.
DEVICE const T *pixel_of(const Conv2dArguments *a, Target target, int tap_y, int tap_x) {
    int enlarged = a->up_h > 0;
    int y = target.y + tap_y, x = target.x + tap_x;
    int height = enlarged ? a->up_h : a->height, width = enlarged ? a->up_w : a->width;
    if (!target.image || tap_y >= a->kernel_h || y < 0 || x < 0 || y >= height || x >= width) {
        return 0;
    }
    if (enlarged) {
        y = (int)((unsigned)y * (unsigned)a->height / (unsigned)height);
        x = (int)((unsigned)x * (unsigned)a->width / (unsigned)width);
    }
    return target.image + ((long long)y * a->width + x) * a->channels;
}

// A column of the implicit matrix.
typedef struct Tap {
    int y, x, channel;
} Tap;

DEVICE Tap tap_of(const Conv2dArguments *a, int column) {
    Tap tap;
    int index = column / a->channels;
    tap.channel = column - index * a->channels;
    tap.y = index / a->kernel_w;
    tap.x = index - tap.y * a->kernel_w;
    return tap;
}

// The tap `STEP` columns further, without a division; 1 if it sees other pixels.
DEVICE int next_tap(const Conv2dArguments *a, Tap *tap) {
    int moved = 0;
    tap->channel += STEP;
    while (tap->channel >= a->channels) {
        tap->channel -= a->channels;
        tap->x++;
        if (tap->x == a->kernel_w) {
            tap->x = 0;
            tap->y++;
        }
        moved = 1;
    }
    return moved;
}

// One element of the implicit matrix.
DEVICE float window_at(const Conv2dArguments *a, Target target, int column) {
    Tap tap = tap_of(a, column);
    const T *pixel = pixel_of(a, target, tap.y, tap.x);
    return pixel ? get(pixel[tap.channel]) : 0.0f;
}

// Whether chunks of a row are neighbours in memory and lie on addresses that can be read at once.
DEVICE int chunks_lie_dense(const Conv2dArguments *a) {
    int bytes = CHUNK * (int)sizeof(T);
    return a->channels % CHUNK == 0 && aligned(a->x, bytes) && aligned(a->weight, bytes);
}

// What a thread copies from: two rows of the tile of each operand, a chunk of each in every step.
typedef struct Loader {
    Target targets[2];
    const T *pixels[2]; // what the tap sees, or null
    const T *weights[2];
    Tap tap;
    int column, columns, dense;
} Loader;

DEVICE void look(const Conv2dArguments *a, Loader *loader) {
    UNROLL
    for (int i = 0; i < 2; i++) {
        loader->pixels[i] = pixel_of(a, loader->targets[i], loader->tap.y, loader->tap.x);
    }
}

// From column `first` on, for a tile of so many rows, which is half the threads.
DEVICE void begin(const Conv2dArguments *a, int tile, int first, Loader *loader) {
    loader->column = first + (int)threadIdx.x % 4 * CHUNK;
    loader->columns = a->kernel_h * a->kernel_w * a->channels;
    loader->dense = chunks_lie_dense(a);
    loader->tap = tap_of(a, loader->column);
    UNROLL
    for (int i = 0; i < 2; i++) {
        int row = (int)threadIdx.x / 4 + i * (tile / 2);
        int out = (int)blockIdx.y * tile + row;
        loader->targets[i] = target_of(a, (long long)blockIdx.x * tile + row);
        loader->weights[i] = out < a->out ? a->weight + (long long)out * loader->columns : 0;
    }
    look(a, loader);
}

DEVICE void move_on(const Conv2dArguments *a, Loader *loader) {
    loader->column += STEP;
    if (loader->dense && next_tap(a, &loader->tap)) {
        look(a, loader);
    }
}

// The steps of this block's part of the sum.
typedef struct Range {
    int first, count;
} Range;

DEVICE Range part_of(const Conv2dArguments *a) {
    int steps = (a->kernel_h * a->kernel_w * a->channels + STEP - 1) / STEP;
    int each = (steps + a->splits - 1) / a->splits;
    Range range;
    range.first = (int)blockIdx.z * each;
    range.count = steps - range.first < each ? steps - range.first : each;
    range.first = range.count > 0 ? range.first : 0;
    range.count = range.count > 0 ? range.count : 0;
    return range;
}

// Bias, activation and residual.
DEVICE float finished(const Conv2dArguments *a, long long at, int column, float sum) {
    sum = activate(a->bias ? sum + get(a->bias[column]) : sum, a->activation);
    return a->residual ? sum + get(a->residual[at]) : sum;
}

// Two neighbours of a row of y, or of a part of their sums. `column` is even.
DEVICE void write_pair(const Conv2dArguments *a, long long row, int column, float first,
                       float second) {
    long long at = row * a->out + column;
    int both = column + 1 < a->out;
    if (a->partials) {
        long long rows = (long long)a->batch * a->out_h * a->out_w;
        float *partials = a->partials + blockIdx.z * rows * a->out + at;
        partials[0] = first;
        if (both) {
            partials[1] = second;
        }
        return;
    }
    first = finished(a, at, column, first);
    second = both ? finished(a, at + 1, column + 1, second) : 0.0f;
#if TENSOR
    if (both && a->out % 2 == 0 && aligned(a->y, 4)) {
        *(unsigned *)(a->y + at) = pair_of(first, second);
        return;
    }
#endif
    a->y[at] = put(first);
    if (both) {
        a->y[at + 1] = put(second);
    }
}

#endif

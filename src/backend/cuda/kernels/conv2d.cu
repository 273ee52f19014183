// Convolutions, and linear layers as those of a 1×1 window over one pixel. Separate because of the
// two tile sizes, whose text is in tensor_tile.cuh (f16, and bf16 since sm_80) and plain_tile.cuh.
//
// A linear layer of (rows, in) with a weight (out, in) is batch = rows, height = width = kernel_h =
// kernel_w = stride = out_h = out_w = 1, padding = up_h = up_w = 0, channels = in. It runs the very
// same loop: a window of one tap moves along the channels only.
//
// Quick where channels is a multiple of 8 (f32: 4) and x and the weight lie on multiples of 16
// bytes; any other size is right, element by element. y = activation(window · weight + bias) +
// residual, in f32, rounded once.
//
// Where even small tiles are few, and the sum is long, it can be split: grid.z = splits blocks add
// up parts of it into `partials`, and conv2d_join adds those in order. Equal numbers of splits give
// equal bits, whatever the tile and the batch.
#include "window.cuh"

#define PART(name) name##_large
#define TILE 128
#define WARP_ROWS 64
#define WARPS_DOWN 2
#if TENSOR
#include "tensor_tile.cuh"
#else
#include "plain_tile.cuh"
#endif
#undef PART
#undef TILE
#undef WARP_ROWS
#undef WARPS_DOWN

#define PART(name) name##_small
#define TILE 64
#define WARP_ROWS 32
#define WARPS_DOWN 2
#if TENSOR
#include "tensor_tile.cuh"
#else
#include "plain_tile.cuh"
#endif

// Tiles of 128×128 of the result (output pixels × out), for large problems.
// grid (⌈batch · out_h · out_w / 128⌉, ⌈out / 128⌉, splits), block 256, no dynamic shared memory.
KERNEL(conv2d_large, 256, Conv2dArguments) { convolve_large(&a); }

// Tiles of 64×64, where those of 128×128 would be fewer than the multiprocessors, or out ≤ 64.
// grid (⌈batch · out_h · out_w / 64⌉, ⌈out / 64⌉, splits), block 128, no dynamic shared memory.
KERNEL(conv2d_small, 128, Conv2dArguments) { convolve_small(&a); }

// After either of them where partials is not null: y from the parts, with the same argument.
// grid any, block up to 256: min(⌈batch · out_h · out_w · out / 256⌉, 16 · multiprocessors) blocks.
KERNEL(conv2d_join, 256, Conv2dArguments) {
    long long count = (long long)a.batch * a.out_h * a.out_w * a.out;
    for (long long i = first_element(); i < count; i += element_step()) {
        float sum = 0.0f;
        for (int part = 0; part < a.splits; part++) {
            sum += a.partials[part * count + i];
        }
        a.y[i] = put(finished(&a, i, (int)(i % a.out), sum));
    }
}

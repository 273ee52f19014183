// Kernels that look at one place at a time. Separate because none of them needs its neighbours: any
// grid.x and block.x (≤ 256) are right for all of them, without shared memory. A grid of
// min(⌈n / 1024⌉, 16 · multiprocessors) blocks of 256 threads is a good choice.
#include "common.cuh"

enum Unary {
    EXP = 0, LOG, SIN, COS, ABS, NEG, RECIP, SQR, SQRT, GELU_TANH, GELU_ERF, ERF, RELU, SILU_ONLY,
    TANH, FLOOR, CEIL, ROUND, SIGN
};

DEVICE float unary_of(int op, float x) {
    switch (op) {
    case EXP: return expf(x);
    case LOG: return logf(x);
    case SIN: return sinf(x);
    case COS: return cosf(x);
    case ABS: return fabsf(x);
    case NEG: return -x;
    case RECIP: return 1.0f / x;
    case SQR: return x * x;
    case SQRT: return sqrtf(x);
    case GELU_TANH: return gelu_tanh(x);
    case GELU_ERF: return gelu_erf(x);
    case ERF: return erff(x);
    case RELU: return x < 0.0f ? 0.0f : x;
    case SILU_ONLY: return silu(x);
    case TANH: return tanhf(x);
    case FLOOR: return floorf(x);
    case CEIL: return ceilf(x);
    case ROUND: return roundf(x);
    default: return (float)(x > 0.0f) - (float)(x < 0.0f);
    }
}

enum Binary { ADD = 0, SUB, MUL, DIV, MAXIMUM, MINIMUM };

DEVICE float binary_of(int op, float x, float y) {
    switch (op) {
    case ADD: return x + y;
    case SUB: return x - y;
    case MUL: return x * y;
    case DIV: return x / y;
    case MAXIMUM: return x < y ? y : x;
    default: return x > y ? y : x;
    }
}

// Where the four at this index begins, of a view that fours_of gave `fours` for.
DEVICE long long four_at(const View *view, int fours, long long index) {
    return fours == 2 ? view->offset + index : view_place(view, index);
}

typedef struct UnaryArguments {
    const T *x;
    T *y; // dense
    View x_view;
    long long n;
    int op; // exp log sin cos abs neg recip sqr sqrt gelu(tanh) gelu_erf erf relu silu tanh floor
            // ceil round sign, from 0
} UnaryArguments;

// y = op(x). Geometry: see the top.
KERNEL(unary, 256, UnaryArguments) {
    long long i = first_element(), done = 0;
    int fours = fours_of(&a.x_view, a.x);
    if (fours && aligned(a.y, 4 * (int)sizeof(T))) {
        done = a.n / 4 * 4;
        for (; i * 4 < done; i += element_step()) {
            float four[4];
            get4(a.x + four_at(&a.x_view, fours, i * 4), four);
            UNROLL
            for (int j = 0; j < 4; j++) {
                four[j] = unary_of(a.op, four[j]);
            }
            put4(a.y + i * 4, four);
        }
        i = done + first_element();
    }
    for (; i < a.n; i += element_step()) {
        a.y[i] = put(unary_of(a.op, get(a.x[view_place(&a.x_view, i)])));
    }
}

typedef struct AffineArguments {
    const T *x;
    T *y; // dense
    View x_view;
    long long n;
    double mul, add;
} AffineArguments;

// y = x · mul + add, with both as f32. Geometry: see the top.
KERNEL(affine, 256, AffineArguments) {
    float mul = (float)a.mul, add = (float)a.add;
    for (long long i = first_element(); i < a.n; i += element_step()) {
        a.y[i] = put(get(a.x[view_place(&a.x_view, i)]) * mul + add);
    }
}

typedef struct BinaryArguments {
    const T *left;
    const T *right;
    T *y; // dense
    View left_view;
    View right_view;
    long long n;
    int op; // add sub mul div maximum minimum, from 0
} BinaryArguments;

// y = left op right; of equal dims, strides of 0 broadcast. maximum and minimum give the left
// operand where they cannot compare, as candle. Geometry: see the top.
KERNEL(binary, 256, BinaryArguments) {
    long long i = first_element();
    int left = fours_of(&a.left_view, a.left), right = fours_of(&a.right_view, a.right);
    if (left && right && aligned(a.y, 4 * (int)sizeof(T))) {
        long long done = a.n / 4 * 4;
        for (; i * 4 < done; i += element_step()) {
            float four[4], others[4];
            get4(a.left + four_at(&a.left_view, left, i * 4), four);
            get4(a.right + four_at(&a.right_view, right, i * 4), others);
            UNROLL
            for (int j = 0; j < 4; j++) {
                four[j] = binary_of(a.op, four[j], others[j]);
            }
            put4(a.y + i * 4, four);
        }
        i = done + first_element();
    }
    for (; i < a.n; i += element_step()) {
        float x = get(a.left[view_place(&a.left_view, i)]);
        float y = get(a.right[view_place(&a.right_view, i)]);
        a.y[i] = put(binary_of(a.op, x, y));
    }
}

#define TERMS 8

typedef struct CombinationArguments {
    T *y; // dense, in row-major order of the views' dims
    const T *x[TERMS];
    View views[TERMS];
    double coefficients[TERMS];
    long long n;
    int terms; // 1 to 8
} CombinationArguments;

// y = Σ coefficients[t] · x[t], summed in f64 in this order and rounded once. For results in
// another order than row-major the host permutes all views alike. Geometry: see the top.
KERNEL(linear_combination, 256, CombinationArguments) {
    for (long long i = first_element(); i < a.n; i += element_step()) {
        double sum = 0.0;
        UNROLL
        for (int term = 0; term < TERMS; term++) {
            if (term < a.terms) {
                const T *x = a.x[term];
                double value = (double)get(x[view_place(&a.views[term], i)]);
#ifdef __CUDACC_RTC__
                // The product is rounded too, as on the CPU.
                sum = __dadd_rn(sum, __dmul_rn(a.coefficients[term], value));
#else
                sum += a.coefficients[term] * value;
#endif
            }
        }
        a.y[i] = put_double(sum);
    }
}

typedef struct GegluArguments {
    const T *x; // (rows, 2 · size), dense
    T *y;       // (rows, size), dense
    long long rows;
    int size;
} GegluArguments;

// y = value · gelu_erf(gate), the halves of each row of x. Geometry: see the top.
KERNEL(geglu, 256, GegluArguments) {
    long long n = a.rows * a.size, i = first_element();
    if (a.size % 4 == 0 && aligned(a.x, 16) && aligned(a.y, 16)) {
        for (; i * 4 < n; i += element_step()) {
            long long row = quotient(i * 4, a.size), column = i * 4 - row * a.size;
            const T *x = a.x + row * 2 * a.size + column;
            float value[4], gate[4];
            get4(x, value);
            get4(x + a.size, gate);
            for (int j = 0; j < 4; j++) {
                value[j] *= gelu_erf(gate[j]);
            }
            put4(a.y + i * 4, value);
        }
        return;
    }
    for (; i < n; i += element_step()) {
        long long row = quotient(i, a.size), column = i - row * a.size;
        const T *x = a.x + row * 2 * a.size + column;
        a.y[i] = put(get(x[0]) * gelu_erf(get(x[a.size])));
    }
}

typedef struct PixelsArguments {
    const T *x;
    unsigned char *y; // (batch, height, width, 3), dense
    View x_view;      // (batch, 3, height, width), all four dims unmerged
} PixelsArguments;

// y = x/2 + 0.5, clamped to 0..1, times 255, rounded half to even. Geometry: see the top.
KERNEL(pixels, 256, PixelsArguments) {
    long long height = a.x_view.dims[2], width = a.x_view.dims[3];
    long long n = a.x_view.dims[0] * height * width * 3;
    const long long *strides = a.x_view.strides;
    for (long long i = first_element(); i < n; i += element_step()) {
        long long pixel = quotient(i, 3), channel = i - pixel * 3;
        long long line = quotient(pixel, width), image = quotient(line, height);
        long long place = a.x_view.offset + image * strides[0] + channel * strides[1];
        place += (line - image * height) * strides[2] + (pixel - line * width) * strides[3];
        float x = get(a.x[place]) / 2.0f + 0.5f;
        x = x < 0.0f ? 0.0f : (x > 1.0f ? 1.0f : x);
        // A NaN is black, as where Rust converts it.
        a.y[i] = (unsigned char)(x == x ? rintf(x * 255.0f) : 0.0f);
    }
}

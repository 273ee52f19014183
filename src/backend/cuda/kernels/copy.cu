// Kernels that move numbers without computing with them: copies of views, other number types,
// chosen rows, constants. Separate because the size of an element says enough for most of them. Any
// grid.x and block.x (≤ 256) are right, without shared memory, as in element.cu.
#include "common.cuh"

typedef struct CopyArguments {
    const void *source;
    void *target;
    View source_view;
    View target_view; // of the same dims, in the same order
    long long n;
} CopyArguments;

// Whether rows of both views lie dense and can be copied by 16 bytes: then how many such pieces
// each has, else 0.
DEVICE int pieces_of_row(const CopyArguments *a, int bytes) {
    const View *from = &a->source_view, *to = &a->target_view;
    int rank = from->rank, per_piece = 16 / bytes;
    if (rank == 0 || !aligned(a->source, 16) || !aligned(a->target, 16)) {
        return 0;
    }
    int last = from->dims[rank - 1], fits = last % per_piece == 0;
    fits = fits && from->strides[rank - 1] == 1 && to->strides[rank - 1] == 1;
    fits = fits && from->offset % per_piece == 0 && to->offset % per_piece == 0;
    UNROLL
    for (int d = 0; d < RANK_LIMIT; d++) {
        if (d < rank - 1) {
            fits = fits && from->strides[d] % per_piece == 0 && to->strides[d] % per_piece == 0;
        }
    }
    return fits ? last / per_piece : 0;
}

// copy_view_1, _2, _4, _8, by the bytes of an element (at source and target, aligned to it): copies
// in the logical order of the dims. Contiguous copies, each operand of a concatenation (the target
// is a narrowed view) and permuted ones. Rows that lie dense in both go by 16 bytes.
#define COPY_VIEW(bytes, Element)                                                                  \
    KERNEL(copy_view_##bytes, 256, CopyArguments) {                                                \
        int pieces = pieces_of_row(&a, bytes);                                                     \
        if (pieces > 0) {                                                                          \
            long long count = a.n / (16 / bytes);                                                  \
            for (long long i = first_element(); i < count; i += element_step()) {                  \
                long long row = quotient(i, pieces), at = (i - row * pieces) * (16 / bytes);       \
                const Element *from = (const Element *)a.source + at;                              \
                Element *to = (Element *)a.target + at;                                            \
                from += place_within(&a.source_view, a.source_view.rank - 1, row);                 \
                to += place_within(&a.target_view, a.target_view.rank - 1, row);                   \
                *(uint4 *)to = *(const uint4 *)from;                                               \
            }                                                                                      \
            return;                                                                                \
        }                                                                                          \
        for (long long i = first_element(); i < a.n; i += element_step()) {                        \
            ((Element *)a.target)[view_place(&a.target_view, i)] =                                 \
                ((const Element *)a.source)[view_place(&a.source_view, i)];                        \
        }                                                                                          \
    }

COPY_VIEW(1, unsigned char)
COPY_VIEW(2, unsigned short)
COPY_VIEW(4, unsigned)
COPY_VIEW(8, unsigned long long)

typedef struct FillArguments {
    void *y;
    View y_view;
    long long n;
    unsigned long long bits; // of one element, the lowest bytes
} FillArguments;

// fill_1, _2, _4, _8, by the bytes of an element: every element of the view becomes `bits`. The
// host rounds the number, so that one kernel serves all types.
#define FILL(bytes, Element)                                                                       \
    KERNEL(fill_##bytes, 256, FillArguments) {                                                     \
        for (long long i = first_element(); i < a.n; i += element_step()) {                        \
            ((Element *)a.y)[view_place(&a.y_view, i)] = (Element)a.bits;                          \
        }                                                                                          \
    }

FILL(1, unsigned char)
FILL(2, unsigned short)
FILL(4, unsigned)
FILL(8, unsigned long long)

enum Type { F32 = 0, F16, BF16, U8, U32, I64 };

typedef struct CastArguments {
    const void *x;
    void *y; // dense
    View x_view;
    long long n;
    int from, to; // f32 f16 bf16 u8 u32 i64, from 0
} CastArguments;

DEVICE long long integer_of(const void *x, int type, long long place) {
    switch (type) {
    case U8: return ((const unsigned char *)x)[place];
    case U32: return ((const unsigned *)x)[place];
    default: return ((const long long *)x)[place];
    }
}

DEVICE float float_at(const void *x, int type, long long place) {
    switch (type) {
    case F32: return ((const float *)x)[place];
    case F16: return float_of_half(((const unsigned short *)x)[place]);
    default: return float_of_bfloat(((const unsigned short *)x)[place]);
    }
}

// Towards zero; what does not fit becomes the nearest that does, NaN becomes 0.
DEVICE long long saturated(float x, int type) {
    if (!(x == x)) {
        return 0;
    }
    switch (type) {
    case U8: return x <= 0.0f ? 0 : (x >= 255.0f ? 255 : (long long)x);
    case U32: return x <= 0.0f ? 0 : (x >= 4294967296.0f ? 4294967295LL : (long long)x);
    default:
        if (x >= 9223372036854775808.0f) {
            return 0x7fffffffffffffffLL;
        }
        return x <= -9223372036854775808.0f ? -0x7fffffffffffffffLL - 1 : (long long)x;
    }
}

// y = x as another type, as Rust's `as`: floats round to nearest even (integers by way of f32),
// floats become integers towards zero and saturate, integers lose their upper bits. The same in the
// builds of all dtypes.
KERNEL(cast, 256, CastArguments) {
    for (long long i = first_element(); i < a.n; i += element_step()) {
        long long place = view_place(&a.x_view, i), integer = 0;
        float number = 0.0f;
        if (a.from >= U8) {
            integer = integer_of(a.x, a.from, place);
            number = (float)integer;
        } else {
            number = float_at(a.x, a.from, place);
            integer = a.to >= U8 ? saturated(number, a.to) : 0;
        }
        switch (a.to) {
        case F32: ((float *)a.y)[i] = number; break;
        case F16: ((unsigned short *)a.y)[i] = half_of_float(number); break;
        case BF16: ((unsigned short *)a.y)[i] = bfloat_of_float(number); break;
        case U8: ((unsigned char *)a.y)[i] = (unsigned char)integer; break;
        case U32: ((unsigned *)a.y)[i] = (unsigned)integer; break;
        default: ((long long *)a.y)[i] = integer; break;
        }
    }
}

typedef struct SelectArguments {
    const void *x;
    const void *ids; // dense
    void *y;         // dense, of x's dims with `count` at `dim`
    int *fault;      // becomes 1 if an id is out of range; may be null
    View x_view;     // with the dims unmerged at `dim`
    long long count; // of ids
    int dim;
    int id_type; // u8 3, u32 4, i64 5
} SelectArguments;

// index_select_1, _2, _4, _8, by the bytes of an element: y[…, j, …] = x[…, ids[j], …]. Where an id
// is out of range, zeros. The number of elements is count · Π of the other dims.
#define INDEX_SELECT(bytes, Element)                                                               \
    KERNEL(index_select_##bytes, 256, SelectArguments) {                                           \
        long long before = 1, after = 1;                                                           \
        UNROLL                                                                                     \
        for (int d = 0; d < RANK_LIMIT; d++) {                                                     \
            before *= d < a.dim ? a.x_view.dims[d] : 1;                                            \
            after *= d > a.dim && d < a.x_view.rank ? a.x_view.dims[d] : 1;                        \
        }                                                                                          \
        long long n = before * a.count * after, size = a.x_view.dims[a.dim];                       \
        for (long long i = first_element(); i < n; i += element_step()) {                          \
            long long row = quotient(i, after), outer = quotient(row, a.count);                    \
            long long id = integer_of(a.ids, a.id_type, row - outer * a.count);                    \
            Element value = 0;                                                                     \
            if (id >= 0 && id < size) {                                                            \
                long long at = (outer * size + id) * after + (i - row * after);                    \
                value = ((const Element *)a.x)[view_place(&a.x_view, at)];                         \
            } else if (a.fault) {                                                                  \
                *a.fault = 1;                                                                      \
            }                                                                                      \
            ((Element *)a.y)[i] = value;                                                           \
        }                                                                                          \
    }

INDEX_SELECT(1, unsigned char)
INDEX_SELECT(2, unsigned short)
INDEX_SELECT(4, unsigned)
INDEX_SELECT(8, unsigned long long)

// A stand-in for cuBLASLt: products of `float` matrices stored by columns, as the library's documentation defines them.
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { OK = 0, INVALID_VALUE = 7, NOT_SUPPORTED = 15, FLOAT = 0, COMPUTE_32F = 68, TF32 = 77 };

typedef struct { int type; unsigned long long rows, columns; long long leading; int batch; long long stride; } layout;
typedef struct { int compute, transposed[2], epilogue; const float *bias; } operation;
typedef struct { unsigned long long workspace; unsigned scheme, alignment[4]; } preference;
typedef struct { unsigned long long data[8]; } algorithm;
typedef struct { algorithm algo; size_t workspace; int state; float waves; int reserved[4]; } result;

static int asked, computed;
static preference last;

// For the tests: how often the heuristic was asked, and with which compute type the last product was made.
int stand_in_asked(void) { return asked; }
int stand_in_compute(void) { return computed; }
unsigned stand_in_alignment(int operand) { return last.alignment[operand]; }
unsigned stand_in_scheme(void) { return last.scheme; }

int cublasLtCreate(void **handle) { *handle = &asked; return OK; }
int cublasLtDestroy(void *handle) { return OK; }

int cublasLtMatrixLayoutCreate(layout **made, int type, unsigned long long rows, unsigned long long columns,
                               long long leading) {
    *made = malloc(sizeof **made);
    **made = (layout){type, rows, columns, leading, 1, 0};
    return OK;
}
int cublasLtMatrixLayoutDestroy(layout *made) { free(made); return OK; }
int cublasLtMatrixLayoutSetAttribute(layout *of, int attribute, const void *value, size_t size) {
    if (attribute == 5 && size == 4) { of->batch = *(int *)value; return OK; }
    if (attribute == 6 && size == 8) { of->stride = *(long long *)value; return OK; }
    return INVALID_VALUE;
}

int cublasLtMatmulDescCreate(operation **made, int compute, int scale) {
    *made = calloc(1, sizeof **made);
    (*made)->compute = compute;
    (*made)->epilogue = 1;
    return scale == FLOAT ? OK : INVALID_VALUE;
}
int cublasLtMatmulDescDestroy(operation *made) { free(made); return OK; }
int cublasLtMatmulDescSetAttribute(operation *of, int attribute, const void *value, size_t size) {
    switch (attribute) {
    case 3: case 4: if (size != 4) return INVALID_VALUE; of->transposed[attribute - 3] = *(int *)value; return OK;
    case 7: if (size != 4) return INVALID_VALUE; of->epilogue = *(int *)value; return OK;
    case 8: if (size != 8) return INVALID_VALUE; of->bias = *(const float **)value; return OK;
    default: return INVALID_VALUE;
    }
}

int cublasLtMatmulPreferenceCreate(preference **made) { *made = calloc(1, sizeof **made); return OK; }
int cublasLtMatmulPreferenceDestroy(preference *made) { free(made); return OK; }
int cublasLtMatmulPreferenceSetAttribute(preference *of, int attribute, const void *value, size_t size) {
    if (attribute == 1 && size == 8) { of->workspace = *(unsigned long long *)value; return OK; }
    if (attribute == 3 && size == 4) { of->scheme = *(unsigned *)value; return OK; }
    if (attribute >= 5 && attribute <= 8 && size == 4) { of->alignment[attribute - 5] = *(unsigned *)value; return OK; }
    return INVALID_VALUE;
}

int cublasLtMatmulAlgoGetHeuristic(void *handle, operation *of, layout *a, layout *b, layout *c, layout *d,
                                   preference *wanted, int most, result *found, int *count) {
    asked++;
    last = *wanted;
    *count = 0;
    if (a->type != FLOAT || b->type != FLOAT || c->type != FLOAT) return NOT_SUPPORTED;
    if (of->epilogue == 4 && !of->bias) return INVALID_VALUE;
    *count = 1;
    memset(found, 0, sizeof *found);
    found->algo.data[0] = 42;
    return OK;
}

int cublasLtMatmul(void *handle, operation *of, const float *alpha, const float *a, layout *at, const float *b,
                   layout *bt, const float *beta, const float *c, layout *ct, float *d, layout *dt, algorithm *algo,
                   void *workspace, size_t workspace_bytes, void *stream) {
    computed = of->compute;
    unsigned long long terms = of->transposed[0] ? at->rows : at->columns;
    int fits = (of->transposed[0] ? at->columns : at->rows) == dt->rows &&
               (of->transposed[1] ? bt->rows : bt->columns) == dt->columns &&
               (of->transposed[1] ? bt->columns : bt->rows) == terms && at->batch == dt->batch && bt->batch == dt->batch;
    if (!fits || !workspace || algo->data[0] != 42 || !stream) return INVALID_VALUE;
    for (int i = 0; i < dt->batch; i++, a += at->stride, b += bt->stride, d += dt->stride)
        for (size_t column = 0; column < dt->columns; column++)
            for (size_t row = 0; row < dt->rows; row++) {
                float sum = of->epilogue == 4 ? of->bias[row] : 0;
                for (size_t j = 0; j < terms; j++)
                    sum += *alpha * a[of->transposed[0] ? row * at->leading + j : j * at->leading + row] *
                           b[of->transposed[1] ? j * bt->leading + column : column * bt->leading + j];
                d[column * dt->leading + row] = sum;
            }
    return OK;
}

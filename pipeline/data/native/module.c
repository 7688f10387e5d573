/* The Python side: buffers in, pixels and statuses out, without the interpreter's lock while pixels are made. */
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "jpeg.h"
#include "resize.h"
#include "transcode.h"

/* ---- random crops ---- */

/* Number `place` of the stream that `key` begins, in [0, 1): splitmix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number
   generators", 2014). `pipeline.data.augment.draws` is the same in Python. */
static double draw(uint64_t key, uint64_t place) {
    uint64_t value = key + (place + 1) * UINT64_C(0x9E3779B97F4A7C15);
    value = (value ^ value >> 30) * UINT64_C(0xBF58476D1CE4E5B9);
    value = (value ^ value >> 27) * UINT64_C(0x94D049BB133111EB);
    return (double)((value ^ value >> 31) >> 11) * 0x1p-53;
}

/* `pipeline.data.augment.random_box`, number by number. */
static struct box random_box(uint64_t key, int height, int width, double smallest) {
    const double low = log(3.0 / 4.0), high = log(4.0 / 3.0);
    for (uint64_t attempt = 0; attempt < 10; attempt++) {
        double area = (double)height * width * (smallest + draw(key, 4 * attempt + 1) * (1 - smallest));
        double ratio = exp(low + draw(key, 4 * attempt + 2) * (high - low));
        double wide = rint(sqrt(area * ratio)), tall = rint(sqrt(area / ratio));
        if (0 < wide && wide <= width && 0 < tall && tall <= height) {
            int top = (int)(draw(key, 4 * attempt + 3) * (height - tall + 1));
            int left = (int)(draw(key, 4 * attempt + 4) * (width - wide + 1));
            return (struct box){top, left, (int)tall, (int)wide};
        }
    }
    double ratio = (double)width / height;
    ratio = ratio < 3.0 / 4.0 ? 3.0 / 4.0 : ratio > 4.0 / 3.0 ? 4.0 / 3.0 : ratio;
    double wide = rint(height * ratio), tall = rint(width / ratio);
    int box_width = wide < 1 ? 1 : wide < width ? (int)wide : width;
    int box_height = tall < 1 ? 1 : tall < height ? (int)tall : height;
    return (struct box){(height - box_height) / 2, (width - box_width) / 2, box_height, box_width};
}

static enum status crop_at_random(const uint8_t *jpeg, size_t size, uint64_t key, double smallest, double flip,
                                  const struct target *target, struct scratch *scratch, uint8_t *out) {
    struct header header;
    enum status status = read_header(jpeg, size, &header);
    if (status != DECODED) return status;
    int height, width;
    upright_size(&header, &height, &width);
    struct box box = random_box(key, height, width, smallest);
    struct target own = *target;
    own.mirrored = draw(key, 0) < flip;
    return decode_crop(jpeg, size, &header, &box, &own, scratch, out);
}

static enum status read_whole(int file, uint8_t *bytes, size_t size, off_t offset) {
    while (size) {
        ssize_t got = pread(file, bytes, size, offset);
        if (got < 0 && errno == EINTR) continue;
        if (got <= 0) return CUT_SHORT;
        bytes += got;
        size -= (size_t)got;
        offset += got;
    }
    return DECODED;
}

/* ---- scratch that is used again: it holds Huffman tables, and fresh memory costs a fault for each page ---- */

/* Those that nobody uses, under the interpreter's lock: as many as ever were used at once. */
#define MOST_IDLE 64
#define MOST_KEPT ((size_t)16 << 20) /* bytes in each; a huge image needs more, and seldom comes */
static struct scratch *idle[MOST_IDLE];
static int num_idle;

static struct scratch *borrow_scratch(void) { return num_idle ? idle[--num_idle] : calloc(1, sizeof(struct scratch)); }

static void return_scratch(struct scratch *scratch) {
    shrink_scratch(scratch, num_idle < MOST_IDLE ? MOST_KEPT : 0);
    if (num_idle < MOST_IDLE)
        idle[num_idle++] = scratch;
    else
        free(scratch);
}

/* ---- Python ---- */

static int has_room(const Py_buffer *out, Py_ssize_t number, const struct target *target) {
    return target->height > 0 && target->width > 0 && (!number || out->len / 3 / target->height / number >= target->width);
}

/* How the crop of one image is drawn, where no box is given. */
struct draws {
    unsigned long long key;
    double smallest, flip;
};

static PyObject *crop_one(Py_buffer *jpeg, const struct box *box, const struct draws *draws, struct target *target, Py_buffer *out) {
    enum status status = DECODED;
    int fits = has_room(out, 1, target);
    struct scratch *scratch = fits ? borrow_scratch() : NULL;
    if (scratch) {
        Py_BEGIN_ALLOW_THREADS;
        size_t size = (size_t)jpeg->len;
        struct header header;
        if (!box)
            status = crop_at_random(jpeg->buf, size, draws->key, draws->smallest, draws->flip, target, scratch, out->buf);
        else if ((status = read_header(jpeg->buf, size, &header)) == DECODED)
            status = decode_crop(jpeg->buf, size, &header, box, target, scratch, out->buf);
        Py_END_ALLOW_THREADS;
        return_scratch(scratch);
    }
    PyBuffer_Release(jpeg);
    PyBuffer_Release(out);
    if (!fits) return PyErr_Format(PyExc_ValueError, "no room for the pixels");
    return scratch ? PyLong_FromLong(status) : PyErr_NoMemory();
}

static PyObject *py_crop(PyObject *self, PyObject *args) {
    (void)self;
    Py_buffer jpeg, out;
    struct box box;
    struct target target;
    unsigned long long max_pixels;
    if (!PyArg_ParseTuple(args, "y*(iiii)pKiiw*", &jpeg, &box.top, &box.left, &box.height, &box.width, &target.mirrored,
                          &max_pixels, &target.height, &target.width, &out))
        return NULL;
    target.max_pixels = max_pixels;
    return crop_one(&jpeg, &box, NULL, &target, &out);
}

static PyObject *py_random_crop(PyObject *self, PyObject *args) {
    (void)self;
    Py_buffer jpeg, out;
    struct draws draws;
    struct target target;
    unsigned long long max_pixels;
    if (!PyArg_ParseTuple(args, "y*KddKiiw*", &jpeg, &draws.key, &draws.smallest, &draws.flip, &max_pixels, &target.height,
                          &target.width, &out))
        return NULL;
    target.mirrored = 0;
    target.max_pixels = max_pixels;
    return crop_one(&jpeg, NULL, &draws, &target, &out);
}

/* Where an encoded image lies, what its crop is drawn by, and where the pixels go: `pipeline.data.native.SAMPLE`. */
struct sample {
    int64_t offset, size;
    uint64_t key;
    int32_t file, row;
};

struct batch {
    Py_buffer given, out, statuses;
    struct sample *samples; /* a copy of what was given: it stays as it was checked, whoever writes there meanwhile */
    double smallest, flip;
    struct target target;
};

static int rows_fit(const struct batch *batch, Py_ssize_t number) {
    const struct sample *samples = batch->samples;
    Py_ssize_t num_rows = 0;
    for (Py_ssize_t i = 0; i < number; i++) {
        if (samples[i].row < 0 || samples[i].size < 0) return 0;
        if (samples[i].row >= num_rows) num_rows = samples[i].row + (Py_ssize_t)1;
    }
    return has_room(&batch->out, num_rows, &batch->target);
}

static void read_batch(struct batch *batch, Py_ssize_t number, struct scratch *scratch) {
    size_t each = 3 * (size_t)batch->target.height * (size_t)batch->target.width;
    for (Py_ssize_t i = 0; i < number; i++) {
        const struct sample *sample = &batch->samples[i];
        size_t size = (size_t)sample->size;
        uint8_t *bytes = room(&scratch->encoded, size + 1), *out = (uint8_t *)batch->out.buf + each * (size_t)sample->row;
        enum status status = bytes ? read_whole(sample->file, bytes, size, sample->offset) : NO_MEMORY;
        if (status == DECODED)
            status = crop_at_random(bytes, size, sample->key, batch->smallest, batch->flip, &batch->target, scratch, out);
        ((int32_t *)batch->statuses.buf)[i] = (int32_t)status;
    }
}

static PyObject *py_read_crops(PyObject *self, PyObject *args) {
    (void)self;
    struct batch batch;
    unsigned long long max_pixels;
    memset(&batch, 0, sizeof batch);
    if (!PyArg_ParseTuple(args, "y*ddKiiw*w*", &batch.given, &batch.smallest, &batch.flip, &max_pixels, &batch.target.height,
                          &batch.target.width, &batch.out, &batch.statuses))
        return NULL;
    batch.target.max_pixels = max_pixels;
    Py_ssize_t size = batch.given.len, number = size / (Py_ssize_t)sizeof(struct sample);
    batch.samples = malloc((size_t)size + 1);
    if (batch.samples) memcpy(batch.samples, batch.given.buf, (size_t)size);
    int fits = batch.samples && size == (Py_ssize_t)sizeof(struct sample) * number &&
               batch.statuses.len == (Py_ssize_t)sizeof(int32_t) * number && rows_fit(&batch, number);
    struct scratch *scratch = fits ? borrow_scratch() : NULL;
    if (scratch) {
        Py_BEGIN_ALLOW_THREADS;
        read_batch(&batch, number, scratch);
        Py_END_ALLOW_THREADS;
        return_scratch(scratch);
    }
    Py_buffer *all[] = {&batch.given, &batch.out, &batch.statuses};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) PyBuffer_Release(all[i]);
    int is_copied = batch.samples != NULL;
    free(batch.samples);
    if (!is_copied) return PyErr_NoMemory();
    if (!fits) return PyErr_Format(PyExc_ValueError, "the buffers of %zd samples do not fit together", number);
    if (!scratch) return PyErr_NoMemory();
    Py_RETURN_NONE;
}

static PyObject *py_random_box(PyObject *self, PyObject *args) {
    (void)self;
    unsigned long long key;
    int height, width;
    double smallest;
    if (!PyArg_ParseTuple(args, "Kiid", &key, &height, &width, &smallest)) return NULL;
    struct box box = random_box(key, height, width, smallest);
    return Py_BuildValue("iiii", box.top, box.left, box.height, box.width);
}

static PyObject *py_with_restarts(PyObject *self, PyObject *args) {
    (void)self;
    Py_buffer jpeg;
    unsigned interval;
    unsigned long long max_pixels;
    if (!PyArg_ParseTuple(args, "y*IK", &jpeg, &interval, &max_pixels)) return NULL;
    uint8_t *out = NULL;
    size_t size = 0;
    char reason[MAX_REASON] = "a restart interval has 1 to 65535 MCUs";
    Py_BEGIN_ALLOW_THREADS;
    if (interval >= 1 && interval <= 65535) add_restarts(jpeg.buf, (size_t)jpeg.len, interval, max_pixels, &out, &size, reason);
    Py_END_ALLOW_THREADS;
    PyBuffer_Release(&jpeg);
    PyObject *result = out ? PyBytes_FromStringAndSize((const char *)out, (Py_ssize_t)size) : NULL;
    free(out);
    return out ? result : PyErr_Format(PyExc_ValueError, "%s", reason);
}

static PyObject *py_use_avx2(PyObject *self, PyObject *args) {
    (void)self;
    int wanted;
    if (!PyArg_ParseTuple(args, "p", &wanted)) return NULL;
    use_avx2(wanted);
    return PyBool_FromLong(uses_avx2());
}

static PyObject *py_uses_avx2(PyObject *self, PyObject *args) {
    (void)self;
    (void)args;
    return PyBool_FromLong(uses_avx2());
}

static PyObject *py_read_codes_by(PyObject *self, PyObject *args) {
    (void)self;
    int readers;
    if (!PyArg_ParseTuple(args, "i", &readers)) return NULL;
    read_codes_by((enum readers)readers);
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"crop", py_crop, METH_VARARGS, "crop(jpeg, box, mirrored, max_pixels, height, width, out) -> status"},
    {"random_crop", py_random_crop, METH_VARARGS,
     "random_crop(jpeg, key, smallest, flip, max_pixels, height, width, out) -> status"},
    {"read_crops", py_read_crops, METH_VARARGS,
     "read_crops(samples, smallest, flip, max_pixels, height, width, out, statuses)"},
    {"random_box", py_random_box, METH_VARARGS, "random_box(key, height, width, smallest) -> (top, left, height, width)"},
    {"with_restarts", py_with_restarts, METH_VARARGS, "with_restarts(jpeg, interval, max_pixels) -> jpeg"},
    {"read_codes_by", py_read_codes_by, METH_VARARGS, "read_codes_by(0: both, 1: only we, 2: only libjpeg)"},
    {"use_avx2", py_use_avx2, METH_VARARGS, "use_avx2(wanted) -> whether it is used"},
    {"uses_avx2", py_uses_avx2, METH_NOARGS, "uses_avx2() -> whether it is used"},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_jpeg", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__jpeg(void) {
    uses_avx2(); /* found out once, before there are threads */
    return PyModule_Create(&definition);
}

/* Kernel launches whose parameters are ready but for the addresses.

   A Packet holds what cuLaunchKernelEx wants: the kernel, its grid, and an image of all its parameters. Of the image, a few places differ from one
   call to the next: pointers, and the addresses inside of tensor maps. run() copies the image to its own stack, writes the addresses there, and
   launches; the packet itself never changes, so that any number of threads may start it at once.

   What must be known of a tensor is asked by DLPack's exchange of C functions, which PyTorch offers: a tenth of a microsecond for shape, strides,
   type, device and address together. describe() makes the key of a class of calls of it, and run() the addresses.

   The driver is opened when it is first needed: where there is none, packets can be made, and started into a list (record()).

   Sources: CUDA driver API, cuLaunchKernelEx, cuTensorMapEncodeTiled, cuTensorMapReplaceAddress, cuFuncGetParamInfo; DLPack 1.3,
   DLPackExchangeAPI. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <ATen/dlpack.h>
#include <cuda.h>
#include <dlfcn.h>
#include <string.h>

#define MAP_BYTES sizeof(CUtensorMap)
#define MOST_IMAGE_BYTES 4096  /* what a kernel's parameters may take */
#define MOST_PARAMETERS 256
#define MOST_ADDRESSES 64
#define MOST_DESCRIBED 12 /* tensors */
#define MOST_DIMS 8

typedef CUresult (*launch_t)(const CUlaunchConfig *, CUfunction, void **, void **);
typedef CUresult (*encode_t)(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *, const cuuint64_t *, const cuuint64_t *, const cuuint32_t *,
                             const cuuint32_t *, CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
typedef CUresult (*replace_t)(CUtensorMap *, void *);
typedef CUresult (*parameter_t)(CUfunction, size_t, size_t *, size_t *);
typedef CUresult (*text_t)(CUresult, const char **);

static struct {
  launch_t launch;
  encode_t encode;
  replace_t replace;
  parameter_t parameter;
  text_t text;
} driver;

static PyObject *recorder = NULL; /* a list: launches are written there instead of being made */

static int open_driver(void) {
  if (driver.launch) return 0;
  void *library = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_GLOBAL);
  if (!library) {
    PyErr_SetString(PyExc_RuntimeError, "the CUDA driver, libcuda.so.1, cannot be opened");
    return -1;
  }
  driver.encode = (encode_t)dlsym(library, "cuTensorMapEncodeTiled");
  driver.replace = (replace_t)dlsym(library, "cuTensorMapReplaceAddress");
  driver.parameter = (parameter_t)dlsym(library, "cuFuncGetParamInfo");
  driver.text = (text_t)dlsym(library, "cuGetErrorString");
  launch_t launch = (launch_t)dlsym(library, "cuLaunchKernelEx");
  if (!driver.encode || !driver.replace || !driver.parameter || !driver.text || !launch) {
    PyErr_SetString(PyExc_RuntimeError, "the CUDA driver is older than 12.4");
    return -1;
  }
  driver.launch = launch; /* last: whoever sees it sees the others */
  return 0;
}

static PyObject *failed(const char *what, CUresult result) {
  const char *text = NULL;
  driver.text(result, &text);
  return PyErr_Format(PyExc_RuntimeError, "%s: %s (CUDA error %d)", what, text ? text : "unknown", (int)result);
}

typedef struct {
  int source, is_map;
  uint32_t at;
  int64_t delta;
} Slot;

typedef struct {
  PyObject_HEAD
  CUfunction function;
  unsigned grid[3], threads, shared;
  int parameters, slots;
  Py_ssize_t bytes;
  uint32_t offset[MOST_PARAMETERS];
  Slot *slot;
  char *image;
} Packet;

static void packet_free(Packet *packet) {
  PyMem_Free(packet->slot);
  PyMem_Free(packet->image);
  Py_TYPE(packet)->tp_free((PyObject *)packet);
}

/* Packet(function, grid, threads, shared, image, offsets, slots): slots are (source, at, delta, is_map). */
static PyObject *packet_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
  unsigned long long function;
  unsigned x, y, z, threads, shared;
  const char *image;
  Py_ssize_t bytes;
  PyObject *offsets, *slots;
  if (!PyArg_ParseTuple(args, "K(III)IIy#O!O!", &function, &x, &y, &z, &threads, &shared, &image, &bytes, &PyTuple_Type, &offsets, &PyTuple_Type,
                        &slots))
    return NULL;
  Py_ssize_t parameters = PyTuple_GET_SIZE(offsets), count = PyTuple_GET_SIZE(slots);
  if (bytes > MOST_IMAGE_BYTES || parameters > MOST_PARAMETERS) {
    return PyErr_Format(PyExc_ValueError, "a packet takes %d parameters of %d bytes; got %zd of %zd", MOST_PARAMETERS, MOST_IMAGE_BYTES, parameters,
                        bytes);
  }
  Packet *packet = (Packet *)type->tp_alloc(type, 0);
  if (!packet) return NULL;
  packet->function = (CUfunction)(uintptr_t)function;
  packet->grid[0] = x, packet->grid[1] = y, packet->grid[2] = z;
  packet->threads = threads, packet->shared = shared;
  packet->parameters = (int)parameters, packet->slots = (int)count, packet->bytes = bytes;
  packet->slot = PyMem_Calloc(count + 1, sizeof(Slot));
  packet->image = PyMem_Malloc(bytes + 1);
  if (!packet->slot || !packet->image) {
    Py_DECREF(packet);
    return PyErr_NoMemory();
  }
  memcpy(packet->image, image, bytes);
  for (Py_ssize_t i = 0; i < parameters; i++) {
    long at = PyLong_AsLong(PyTuple_GET_ITEM(offsets, i));
    if (at < 0 || at >= bytes) goto outside;
    packet->offset[i] = (uint32_t)at;
  }
  for (Py_ssize_t i = 0; i < count; i++) {
    Slot *slot = &packet->slot[i];
    if (!PyArg_ParseTuple(PyTuple_GET_ITEM(slots, i), "iILp", &slot->source, &slot->at, &slot->delta, &slot->is_map)) {
      Py_DECREF(packet);
      return NULL;
    }
    if (slot->source < 0 || slot->at + (slot->is_map ? MAP_BYTES : sizeof(uint64_t)) > (size_t)bytes) goto outside;
  }
  return (PyObject *)packet;
outside:
  Py_DECREF(packet);
  if (!PyErr_Occurred()) PyErr_SetString(PyExc_ValueError, "a parameter lies outside of the image");
  return NULL;
}

static PyTypeObject PacketType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "flashlib_packets.Packet",
    .tp_basicsize = sizeof(Packet),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_new = packet_new,
    .tp_dealloc = (destructor)packet_free,
    .tp_doc = "One kernel launch, ready but for the addresses.",
};

static int note(Packet *packet, const char *image, unsigned long long stream) {
  PyObject *entry = Py_BuildValue("(K(III)IIKy#)", (unsigned long long)(uintptr_t)packet->function, packet->grid[0], packet->grid[1], packet->grid[2],
                                  packet->threads, packet->shared, stream, image, packet->bytes);
  int failed = !entry || PyList_Append(recorder, entry);
  Py_XDECREF(entry);
  return failed;
}

static int launch(Packet *packet, const unsigned long long *address, unsigned long long stream) {
  _Alignas(128) char image[MOST_IMAGE_BYTES];
  void *parameters[MOST_PARAMETERS];
  memcpy(image, packet->image, packet->bytes);
  for (int i = 0; i < packet->slots; i++) {
    Slot *slot = &packet->slot[i];
    uint64_t to = address[slot->source] + slot->delta;
    if (slot->is_map && !recorder) {
      CUresult result = driver.replace((CUtensorMap *)(image + slot->at), (void *)(uintptr_t)to);
      if (result != CUDA_SUCCESS) return failed("an address in a tensor map", result), -1;
    } else {
      memcpy(image + slot->at, &to, sizeof to);
    }
  }
  if (recorder) return note(packet, image, stream);
  for (int i = 0; i < packet->parameters; i++) parameters[i] = image + packet->offset[i];
  CUlaunchConfig config = {
      .gridDimX = packet->grid[0], .gridDimY = packet->grid[1], .gridDimZ = packet->grid[2],
      .blockDimX = packet->threads, .blockDimY = 1, .blockDimZ = 1,
      .sharedMemBytes = packet->shared, .hStream = (CUstream)(uintptr_t)stream,
  };
  CUresult result;
  Py_BEGIN_ALLOW_THREADS;
  result = driver.launch(&config, packet->function, parameters, NULL);
  Py_END_ALLOW_THREADS;
  if (result != CUDA_SUCCESS) return failed("a kernel launch", result), -1;
  return 0;
}

static PyObject *start_packets(PyObject *packets, const unsigned long long *address, Py_ssize_t sources, unsigned long long stream) {
  if (!recorder && open_driver()) return NULL;
  Py_ssize_t count = PyTuple_GET_SIZE(packets);
  for (Py_ssize_t i = 0; i < count; i++) {
    PyObject *packet = PyTuple_GET_ITEM(packets, i);
    if (!PyObject_TypeCheck(packet, &PacketType)) return PyErr_Format(PyExc_TypeError, "not a packet");
    for (int s = 0; s < ((Packet *)packet)->slots; s++)
      if (((Packet *)packet)->slot[s].source >= sources) return PyErr_Format(PyExc_ValueError, "an address is missing");
    if (launch((Packet *)packet, address, stream)) return NULL;
  }
  Py_RETURN_NONE;
}

static struct {
  DLPackDLTensorFromPyObjectNoSync look;
  PyObject *empty_strided, *keywords;
} torch;

/* use_torch(torch.Tensor.__dlpack_c_exchange_api__, torch.empty_strided): before describe() and run(). */
static PyObject *use_torch(PyObject *self, PyObject *args) {
  PyObject *capsule, *empty_strided;
  if (!PyArg_ParseTuple(args, "OO", &capsule, &empty_strided)) return NULL;
  const DLPackExchangeAPI *api = PyCapsule_GetPointer(capsule, "dlpack_exchange_api");
  if (!api) return NULL;
  if (api->header.version.major != DLPACK_MAJOR_VERSION || !api->dltensor_from_py_object_no_sync) {
    return PyErr_Format(PyExc_RuntimeError, "this PyTorch exchanges tensors by version %u of DLPack; expected %d", api->header.version.major,
                        DLPACK_MAJOR_VERSION);
  }
  PyObject *keywords = Py_BuildValue("(ss)", "dtype", "device");
  if (!keywords) return NULL;
  torch.keywords = keywords;
  torch.empty_strided = Py_NewRef(empty_strided);
  torch.look = api->dltensor_from_py_object_no_sync;
  Py_RETURN_NONE;
}

static unsigned long long address_of(const DLTensor *x) { return (unsigned long long)(uintptr_t)x->data + x->byte_offset; }

/* describe(tensors, n): shapes, strides, types and devices of a tuple of tensors, as bytes, of the first n without their last size but one, the
   length of [B, H, S, D], and without strides; None where one has none of these, as a sparse one, or does not begin at a multiple of 16 bytes. */
static PyObject *describe(PyObject *self, PyObject *const *args, Py_ssize_t nargs) {
  int64_t found[MOST_DESCRIBED * (3 + 2 * MOST_DIMS)];
  if (nargs != 2 || !torch.look || !PyTuple_Check(args[0])) {
    return PyErr_Format(PyExc_TypeError, "describe takes a tuple and a number, after use_torch");
  }
  PyObject *tensors = args[0];
  Py_ssize_t count = PyTuple_GET_SIZE(tensors), without = PyLong_AsSsize_t(args[1]);
  if (PyErr_Occurred()) return NULL;
  if (count > MOST_DESCRIBED) Py_RETURN_NONE;
  int64_t *at = found;
  for (Py_ssize_t i = 0; i < count; i++) {
    DLTensor x;
    if (torch.look(PyTuple_GET_ITEM(tensors, i), &x)) {
      PyErr_Clear(); /* whoever checks the arguments says what is wrong with it */
      Py_RETURN_NONE;
    }
    if (address_of(&x) & 15 || x.ndim > MOST_DIMS) Py_RETURN_NONE;
    *at++ = (int64_t)x.device.device_type << 32 | (uint32_t)x.device.device_id;
    *at++ = (int64_t)x.dtype.code << 32 | x.dtype.bits << 16 | x.dtype.lanes;
    *at++ = x.ndim;
    memcpy(at, x.shape, x.ndim * sizeof *at), at += x.ndim;
    if (i < without) {
      if (x.ndim > 1) at[-2] = 0;
      continue;
    }
    memcpy(at, x.strides, x.ndim * sizeof *at), at += x.ndim;
  }
  return PyBytes_FromStringAndSize((char *)found, (char *)at - (char *)found);
}

/* run(packets, results, stream, inputs, wanted, unread, scratch, counters): start packets, whose addresses are those of the inputs, of the results, and
   the last two. Results are (shape, strides, dtype, device); the first so many wanted ones are allocated and returned in a list, the others
   have the address `unread`. */
static PyObject *run(PyObject *self, PyObject *const *args, Py_ssize_t count) {
  if (count != 8 || !torch.look || !PyTuple_Check(args[0]) || !PyTuple_Check(args[1]) || !PyTuple_Check(args[3])) {
    return PyErr_Format(PyExc_TypeError, "run takes packets, results, a stream, inputs, and four numbers, after use_torch");
  }
  unsigned long long address[MOST_ADDRESSES], stream = PyLong_AsUnsignedLongLong(args[2]);
  Py_ssize_t inputs = PyTuple_GET_SIZE(args[3]), results = PyTuple_GET_SIZE(args[1]), wanted = PyLong_AsSsize_t(args[4]);
  unsigned long long unread = PyLong_AsUnsignedLongLong(args[5]), scratch = PyLong_AsUnsignedLongLong(args[6]);
  unsigned long long counters = PyLong_AsUnsignedLongLong(args[7]);
  if (PyErr_Occurred()) return NULL;
  if (inputs + results + 2 > MOST_ADDRESSES || wanted > results) return PyErr_Format(PyExc_ValueError, "too many tensors");
  DLTensor x;
  Py_ssize_t at = 0;
  for (Py_ssize_t i = 0; i < inputs; i++) {
    if (torch.look(PyTuple_GET_ITEM(args[3], i), &x)) return NULL;
    address[at++] = address_of(&x);
  }
  PyObject *made = PyList_New(wanted);
  if (!made) return NULL;
  for (Py_ssize_t i = 0; i < results; i++) {
    if (i >= wanted) {
      address[at++] = unread;
      continue;
    }
    PyObject *form = PyTuple_GET_ITEM(args[1], i);
    PyObject *result = PyObject_Vectorcall(torch.empty_strided, ((PyTupleObject *)form)->ob_item, 2, torch.keywords);
    if (!result) goto failed;
    PyList_SET_ITEM(made, i, result);
    if (torch.look(result, &x)) goto failed;
    address[at++] = address_of(&x);
  }
  address[at++] = scratch;
  address[at++] = counters;
  PyObject *started = start_packets(args[0], address, at, stream);
  if (!started) goto failed;
  Py_DECREF(started);
  return made;
failed:
  Py_DECREF(made);
  return NULL;
}

/* encode(element_type, element_bytes, swizzle, shape, strides, block): a tensor map of any address. Innermost dimension last; strides in elements. */
static PyObject *encode(PyObject *self, PyObject *args) {
  int element_type, element_bytes, swizzle;
  PyObject *shape, *strides, *block;
  if (!PyArg_ParseTuple(args, "iiiO!O!O!", &element_type, &element_bytes, &swizzle, &PyTuple_Type, &shape, &PyTuple_Type, &strides, &PyTuple_Type,
                        &block))
    return NULL;
  Py_ssize_t rank = PyTuple_GET_SIZE(shape);
  if (rank < 1 || rank > 5 || PyTuple_GET_SIZE(strides) != rank || PyTuple_GET_SIZE(block) != rank) {
    return PyErr_Format(PyExc_ValueError, "shape, strides and block must have one rank, 1 to 5");
  }
  CUtensorMap map;
  memset(&map, 0, sizeof map);
  cuuint64_t sizes[5], steps[5];
  cuuint32_t boxes[5], ones[5] = {1, 1, 1, 1, 1};
  for (Py_ssize_t i = 0; i < rank; i++) {
    sizes[rank - 1 - i] = PyLong_AsUnsignedLongLong(PyTuple_GET_ITEM(shape, i));
    boxes[rank - 1 - i] = (cuuint32_t)PyLong_AsUnsignedLong(PyTuple_GET_ITEM(block, i));
    if (i + 1 < rank) steps[rank - 2 - i] = element_bytes * PyLong_AsUnsignedLongLong(PyTuple_GET_ITEM(strides, i));
  }
  if (PyErr_Occurred()) return NULL;
  if (recorder) { /* no driver: what would be encoded, readable */
    memcpy((char *)&map + 8, sizes, 8 * rank);
    memcpy((char *)&map + 48, steps, 8 * (rank - 1));
    memcpy((char *)&map + 80, boxes, 4 * rank);
  } else {
    if (open_driver()) return NULL;
    CUresult result = driver.encode(&map, element_type, (cuuint32_t)rank, (void *)(uintptr_t)(1 << 20), sizes, steps, boxes, ones,
                                    CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                                    CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (result != CUDA_SUCCESS) return failed("a tensor map", result);
  }
  return PyBytes_FromStringAndSize((char *)&map, sizeof map);
}

/* parameter_sizes(function): what the kernel itself says of its parameters, in bytes. */
static PyObject *parameter_sizes(PyObject *self, PyObject *function) {
  unsigned long long handle = PyLong_AsUnsignedLongLong(function);
  if (PyErr_Occurred() || open_driver()) return NULL;
  PyObject *sizes = PyList_New(0);
  size_t offset, size;
  for (size_t i = 0; sizes && driver.parameter((CUfunction)(uintptr_t)handle, i, &offset, &size) == CUDA_SUCCESS; i++) {
    PyObject *bytes = PyLong_FromSize_t(size);
    if (!bytes || PyList_Append(sizes, bytes)) Py_CLEAR(sizes);
    Py_XDECREF(bytes);
  }
  return sizes;
}

/* record(list): write launches there instead of making them; None ends it. */
static PyObject *record(PyObject *self, PyObject *list) {
  if (list != Py_None && !PyList_Check(list)) return PyErr_Format(PyExc_TypeError, "record takes a list or None");
  Py_XDECREF(recorder);
  recorder = list == Py_None ? NULL : Py_NewRef(list);
  Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"use_torch", use_torch, METH_VARARGS, "use_torch(exchange, empty_strided)"},
    {"describe", (PyCFunction)(void (*)(void))describe, METH_FASTCALL, "describe(tensors, n) -> bytes or None"},
    {"run", (PyCFunction)(void (*)(void))run, METH_FASTCALL, "run(packets, results, stream, inputs, wanted, unread, scratch, counters) -> list"},
    {"encode", encode, METH_VARARGS, "encode(element_type, element_bytes, swizzle, shape, strides, block) -> bytes"},
    {"parameter_sizes", parameter_sizes, METH_O, "parameter_sizes(function) -> list of bytes per parameter"},
    {"record", record, METH_O, "record(list or None)"},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "flashlib_packets", NULL, -1, methods};

PyMODINIT_FUNC PyInit_flashlib_packets(void) {
  if (PyType_Ready(&PacketType) < 0) return NULL;
  PyObject *made = PyModule_Create(&module);
  if (made && PyModule_AddObjectRef(made, "Packet", (PyObject *)&PacketType)) Py_CLEAR(made);
  return made;
}

// The functions of Python's stable ABI that shortcuts (shortcut.h) call.
//
// Declared here and not included from Python.h, and weak: the library is built without Python's headers and loads into
// any Python from 3.10 on, and into a process without Python, where they are null.
#pragma once

#include <cstddef>

extern "C" {

struct PyObject;
using PyFastFunction = PyObject* (*)(PyObject* self, PyObject* const* args, std::ptrdiff_t count);

struct PyMethodDef {
  const char* name;
  PyFastFunction function;
  int flags;
  const char* doc;
};
inline constexpr int kPyMethFastcall = 0x80;  // METH_FASTCALL

#pragma GCC visibility push(default)
#define PUNICA_PYTHON __attribute__((weak))
PUNICA_PYTHON PyObject* PyCFunction_NewEx(PyMethodDef* method, PyObject* self, PyObject* module);
PUNICA_PYTHON void* PyCapsule_GetPointer(PyObject* capsule, const char* name);
PUNICA_PYTHON PyObject* PyDict_GetItemWithError(PyObject* dictionary, PyObject* key);  // a borrowed reference
PUNICA_PYTHON void PyErr_Clear();
PUNICA_PYTHON PyObject* PyErr_Occurred();
PUNICA_PYTHON void PyErr_SetString(PyObject* type, const char* message);
PUNICA_PYTHON double PyFloat_AsDouble(PyObject* value);
PUNICA_PYTHON long long PyLong_AsLongLong(PyObject* value);                     // NOLINT(google-runtime-int)
PUNICA_PYTHON PyObject* PyObject_CallFunctionObjArgs(PyObject* function, ...);  // the last argument is null
PUNICA_PYTHON PyObject* PyObject_Type(PyObject* object);
PUNICA_PYTHON PyObject* PySequence_GetItem(PyObject* sequence, std::ptrdiff_t i);  // a new reference
PUNICA_PYTHON std::ptrdiff_t PySequence_Size(PyObject* sequence);
PUNICA_PYTHON PyObject* PyTuple_GetItem(PyObject* tuple, std::ptrdiff_t i);
PUNICA_PYTHON PyObject* PyTuple_New(std::ptrdiff_t size);
PUNICA_PYTHON int PyTuple_SetItem(PyObject* tuple, std::ptrdiff_t i, PyObject* item);  // takes the reference
PUNICA_PYTHON void Py_DecRef(PyObject* object);
PUNICA_PYTHON void Py_IncRef(PyObject* object);
#undef PUNICA_PYTHON
#pragma GCC visibility pop

}  // extern "C"

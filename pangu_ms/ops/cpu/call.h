// What MindSpore hands to a compiled operator, and the shapes it asks for beforehand.
#pragma once
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <vector>

// One launch: inputs, then outputs. Scalar arguments are inputs without dimensions.
struct Call {
    int count;
    void** data;
    int* ndims;
    int64_t** shapes;
    const char** dtypes;

    float* floats(int i) const { return static_cast<float*>(data[i]); }
    const int32_t* ints(int i) const { return static_cast<const int32_t*>(data[i]); }
    const bool* bools(int i) const { return static_cast<const bool*>(data[i]); }
    float real(int i) const { return *static_cast<const float*>(data[i]); }
    int64_t whole(int i) const { return *static_cast<const int64_t*>(data[i]); }
    int64_t dim(int i, int axis) const { return shapes[i][axis < 0 ? ndims[i] + axis : axis]; }
    int64_t size(int i) const {
        int64_t n = 1;
        for (int a = 0; a < ndims[i]; a++) n *= shapes[i][a];
        return n;
    }
    bool known_dtypes(const char* name) const {  // float16 or float64 would be read as garbage
        for (int i = 0; i < count; i++) {
            bool known = false;
            for (const char* dtype : {"float32", "int32", "int64", "bool"}) known |= !strcmp(dtypes[i], dtype);
            if (known) continue;
            fprintf(stderr, "pangu_ms: %s was given %s (argument %d): it takes float32; compute in float32, or set "
                    "PANGU_MS_COMPILED_OPS=0\n", name, dtypes[i], i);
            return false;
        }
        return true;
    }
};

using Shape = std::vector<int64_t>;

// Defines the entry `Name(const Call& call)` that MindSpore finds by its name; nonzero fails the graph. What the thread
// that calls it throws is said on stderr.
#define OPERATOR(Name)                                                                                        \
    static void Name##_run(const Call& call);                                                                 \
    extern "C" int Name(int count, void** data, int* ndims, int64_t** shapes, const char** dtypes, void*, void*) { \
        Call call{count, data, ndims, shapes, dtypes};                                                        \
        if (!call.known_dtypes(#Name)) return 1;                                                                \
        try {                                                                                                 \
            Name##_run(call);                                                                                 \
        } catch (const std::exception& error) {                                                               \
            fprintf(stderr, "pangu_ms: %s: %s\n", #Name, error.what());                                       \
            return 1;                                                                                         \
        }                                                                                                     \
        return 0;                                                                                             \
    }                                                                                                         \
    static void Name##_run(const Call& call)

// Shapes of the outputs from those of the inputs; -1 stands for a dimension that is not known yet. Scalar inputs are
// not among them, which therefore come last.
#define ONE_SHAPE(Name) extern "C" Shape Name##InferShape(int* ndims, int64_t** shapes, void*)
#define MANY_SHAPES(Name) extern "C" std::vector<Shape> Name##InferShape(int* ndims, int64_t** shapes, void*)

inline Shape shape_of(int i, int* ndims, int64_t** shapes) { return Shape(shapes[i], shapes[i] + ndims[i]); }

// A gradient has the shapes of the arguments that it is for.
#define SHAPES_OF(Name, ...)                                                          \
    MANY_SHAPES(Name) {                                                               \
        std::vector<Shape> found;                                                     \
        for (int i : {__VA_ARGS__}) found.push_back(shape_of(i, ndims, shapes));      \
        return found;                                                                 \
    }

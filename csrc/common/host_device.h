// SPHINX_HD marks arithmetic that both halves share, so that it is tested without a GPU.
#pragma once

#ifdef __CUDACC__
#define SPHINX_HD __host__ __device__ __forceinline__
#else
#define SPHINX_HD inline __attribute__((always_inline))
#endif

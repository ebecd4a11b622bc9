"""Can kernels be compiled here, with what the image has and no network?

Triton compiles a stub of C against Python.h for every kernel, inductor C++ with OpenMP on a CPU,
and FlashInfer CUDA with nvcc from CUDA_HOME. Each of these ways is taken once, with a small source
of the same kind; no GPU is needed, since nothing of it is run. SGLang compiles C++20 of its own at
its first start, which a host compiler can refuse that takes all others (g++ 12 of Debian 12 does):
of that a real source is compiled.
"""

from __future__ import annotations

import os
import subprocess
import sysconfig
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from rollout.environment import Finding, Findings, ending, printable

_STUB = """
#include <Python.h>
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "stub", NULL, -1, NULL};
PyMODINIT_FUNC PyInit_stub(void) { return PyModule_Create(&module); }
"""
_LOOP = """
#include <bit>
#include <vector>
#include <omp.h>
extern "C" int total(int n) {
    int sum = 0;
    #pragma omp parallel for reduction(+ : sum)
    for (int i = 0; i < n; i++) sum += std::bit_ceil(static_cast<unsigned>(i));
    return sum + omp_get_max_threads();
}
"""
# The headers that FlashInfer's kernels include from outside of its own wheel.
_KERNEL = """
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp8.h>
#include <cublasLt.h>
#include <cub/cub.cuh>
#include <cuda/std/functional>
#include <curand_kernel.h>
__global__ void sum(const __nv_bfloat16* values, float* result) {
    using Reduce = cub::BlockReduce<float, 128>;
    __shared__ typename Reduce::TempStorage storage;
    const float total = Reduce(storage).Sum(__bfloat162float(values[threadIdx.x]));
    if (threadIdx.x == 0) *result = total;
}
extern "C" int run(const void* values, void* result) {
    CUdevice device;
    sum<<<1, 128>>>(static_cast<const __nv_bfloat16*>(values), static_cast<float*>(result));
    return cuDeviceGet(&device, 0) + cudaGetLastError();
}
"""


# What SGLang compiles for the activation of every dense model, as tvm_ffi puts it together.
_SGLANG = """
#include <tvm/ffi/function.h>
#include <sglang/activation.cuh>
TVM_FFI_DLL_EXPORT_TYPED_FUNC(run, (ActivationKernel<bf16_t, true>::run_activation));
"""


class Way(NamedTuple):
    """A compiler as one of the libraries calls it: who, the source, its name, and the command."""

    who: str
    source: str
    name: str
    argv: tuple[str, ...]


def ways(environ: Mapping[str, str], site: Path) -> list[Way]:
    """The ways of compiling that this image has; nvcc's where CUDA_HOME is set.

    ``site`` is where its distributions are installed.
    """
    python = f"-I{sysconfig.get_path('include')}"
    shared = ("-shared", "-fPIC", "-o", "out.so")
    found = [
        Way("Triton", _STUB, "stub.c", ("cc", "-O1", python, *shared, "stub.c")),
        Way("inductor", _LOOP, "loop.cpp", ("g++", "-std=c++20", "-fopenmp", *shared, "loop.cpp")),
    ]
    home = environ.get("CUDA_HOME")
    if home:
        nvcc = (
            *(f"{home}/bin/nvcc", "-std=c++17", "-gencode=arch=compute_90a,code=sm_90a"),
            *("-isystem", f"{home}/include", "-isystem", f"{home}/include/cccl"),
            *("-shared", "-Xcompiler", "-fPIC", "-cudart", "none"),
            *("-o", "out.so", "kernel.cu", f"-L{home}/lib64", f"-L{home}/lib64/stubs"),
            *("-lcudart", "-lcuda"),
        )
        found.append(Way("FlashInfer", _KERNEL, "kernel.cu", nvcc))
    own = site / "sglang" / "jit_kernel"
    source = own / "csrc" / "elementwise" / "activation.cuh"
    if home and source.exists():
        own_nvcc = (
            *(f"{home}/bin/nvcc", "-std=c++20", "-gencode=arch=compute_90,code=sm_90"),
            *("-DSGL_CUDA_ARCH=900", "--expt-relaxed-constexpr", f"-I{own / 'include'}"),
            *(f"-I{site / 'tvm_ffi' / 'include'}", "-shared", "-Xcompiler", "-fPIC"),
            *("-cudart", "none", "-o", "out.so", "sglang.cu"),
        )
        text = _SGLANG.replace("<sglang/activation.cuh>", f'"{source}"')
        found.append(Way("SGLang", text, "sglang.cu", own_nvcc))
    return found


def compilers(environ: Mapping[str, str] = os.environ) -> Findings:
    """Each way of compiling makes a shared object; metrics name the ways."""
    problems = []
    chosen = ways(environ, Path(sysconfig.get_path("purelib")))
    for way in chosen:
        with tempfile.TemporaryDirectory(prefix="rollout-compile-") as folder:
            failure = _failure(way, Path(folder), environ)
        if failure:
            what = f"cannot be compiled as {way.who} compiles: {printable(failure)}"
            problems.append(Finding(way.name, "compile", what))
    return Findings(tuple(problems), {"ways": len(chosen), "as": ",".join(w.who for w in chosen)})


def _failure(way: Way, folder: Path, environ: Mapping[str, str]) -> str:
    """Why nothing came out; empty if a shared object did."""
    (folder / way.name).write_text(way.source, encoding="ascii")
    try:
        done = subprocess.run(
            way.argv,
            cwd=folder,
            env={**environ, "TMPDIR": str(folder)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=600,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{way.argv[0]}: {error}"
    if done.returncode:
        text = done.stderr.decode("utf-8", "replace")
        # Compilers end by saying that they end; the cause is the first line that calls itself one.
        causes = [line for line in text.splitlines() if "error" in line.lower()]
        return ending(done.returncode, causes[0] if causes else text)
    return "" if (folder / "out.so").exists() else f"{way.argv[0]} left no file"

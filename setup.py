"""The native decoder, where there are a C compiler and libjpeg-turbo; without them everything else is built all the same."""

from setuptools import Extension, setup

HERE = "pipeline/data/native"
decoder = Extension(
    "pipeline.data.native._jpeg",
    [f"{HERE}/{name}.c" for name in ("module", "jpeg", "entropy", "resize", "transcode")],
    depends=[f"{HERE}/{name}.h" for name in ("jpeg", "entropy", "resize", "transcode")],
    libraries=["jpeg"],
    # The numbers of a crop are those that Python computes: no multiplication is fused with an addition.
    extra_compile_args=["-std=c11", "-O3", "-g0", "-ffp-contract=off", "-Wall", "-Wextra"],
    py_limited_api=True,
    optional=True,
)
setup(ext_modules=[decoder], options={"bdist_wheel": {"py_limited_api": "cp311"}})

"""Kernels written in Triton for NVIDIA GPUs from compute capability 8.0 on; nothing here is imported before it is used.

``kernel`` is what ``masq.kernels`` registers. ``ops`` holds the launches as operations of torch, ``device_*`` the code
that Triton compiles, ``tiles`` the table of tile sizes, ``layout`` how weights and factors lie in memory.

No figure in these files was measured on a GPU: tile sizes are chosen by what the compiler reports (registers, spills,
shared memory, instructions).
"""

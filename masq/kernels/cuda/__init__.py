"""Kernels in C++ for the int4 tensor cores of NVIDIA GPUs: W4A4; nothing here is imported before it is used.

``kernel`` is what ``masq.kernels`` registers, ``build`` compiles ``csrc`` when it is first needed, ``launch`` calls the
library, ``tiles`` says which tile multiplies what. Compute capabilities 8.0 to 8.9 have the instruction
(mma.m16n8k64 of 4-bit codes); later ones compute the same by other instructions, exactly and slowly.

Nothing in these files was run or measured on a GPU: the sources run in an emulator of a program of threads
(``tests/kernels/emulated.h``), and what the compiler makes of them is held to limits.
"""

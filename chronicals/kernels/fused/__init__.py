"""The Triton side of each op, in a file of the op's name: same signatures, same meaning as in the package above.

Its modules import triton at their top, so nothing may import them where triton may be missing: `kernels/ops.py:fused`
does, when it is called.
"""

"""INT8 on the GPU: CUTLASS products and convolutions, Triton operators between them, one torch operator name for each.

Layout of every integer tensor:

- An activation is int8 u = clip(round(x / s) + zero, low, high): the plan's integer q minus half the grid, so that it fits.
- Images are [B, H, W, C]. Where a convolution pads, the border is in the buffer and holds `zero`, the integer that stands
  for 0: hardware copies pad with the integer 0, which is wrong wherever zero ≠ 0. No convolution pads then.
- A weight is int8 w = q_w - z_w - o with the smallest offset o per output channel that makes it fit (0 if symmetric).

From Σ (u - zero)·(w + o) = Σ u·w - zero·Σ w + o·Σ u - zero·o·n (n terms) the product in real numbers is

    out[m, c] = scale[c]·Σ u·w + shift[c] + offset[c]·Σ u,   scale = s·s_w·a₂,   offset = scale·o,
    shift = bias + b₂ - scale·zero·(Σ w + o·n)

with a₂, b₂ the correction of the executed step: exact integers, then one multiply-add. `offset` and its sums Σ u are left
out where o is 0. A residual, or the product of the other half behind a concat, is added in the same epilogue.

Which kernel multiplies (`variants` lists CUTLASS's; where there is none Triton runs, slower, and `cachequant.report` names
the layers whose channels or weights are the reason):

    product                               sm90 (9.0)        sm80 (8.0 and newer, but 9.0)
    linear to float16, bfloat16, int8     CUTLASS           CUTLASS
    linear + tanh GELU to int8            CUTLASS           Triton, activation included
    linear + exact GELU or GEGLU to int8  Triton            Triton
    convolution to float16, bfloat16      CUTLASS           CUTLASS, but Triton for asymmetric weights
    convolution to int8                   Triton            Triton
    anything to float32                   Triton            Triton

CUTLASS needs input channels in multiples of 16, output channels of 8 (16 for int8). No layer asks for a convolution to int8:
its output goes through a norm or a residual, and the operator there makes the integers. A kernel that fails for a shape is
left out, and plain torch (`plain`) computes what none runs.
"""

"""Kernels for GPUs, shipped as ``kdfast.kernels``. All but ``cluster`` need Triton, and are imported when an op asks.

What an op launches, one file each:

* ``dense``, ``sparse``: the row ops ``dense_rows`` and ``sparse_rows`` with their gradients, and ``scale``: ``scale_``.
* ``select_threshold``, ``select_top``: the columns that a cache keeps of a row.
* ``decode_blocks``, ``decode_rows``: packed labels decoded where they lie.
* ``cluster``: the row ops again, by the CUDA kernels of ``csrc/cuda``, which read a row once.

What the row ops are made of, from the bottom up:

* ``rowmath``: the divergences' formulas, and how a kernel computes each. A new divergence is written here alone.
* ``rows``: a row in memory, its tiles and its coefficients.
* ``softmax``: running softmaxes, their temperatures and their merging.
* ``targets``: cross-entropy, smoothing and z-loss.
* ``statistics``: the first sweep over a row. ``sweeps``: the later ones, for values and gradients.
* ``entries``: a sparse row's entries.

What others share: ``select_row`` (selection), ``packed_bits`` (decoding), ``launch`` (tiles, programs and arguments of
the row ops), and ``variant``, a form of a kernel that the tests compile without a GPU.
"""

"""The operations that S4 is made of: each file has one, as anyone can read it and as torch sees it.

- `cauchy`: sums over poles.
- `response`: C A^l X.
- `maps`: the linear maps of a chunk of steps; `scan`: these over all chunks; `chunks`: states within them.
- `step`: one step; `varying`: steps of different times.
- `convolve`: convolutions by FFT.

Such a file holds the plain definition, then the operator of torch.library with its gradient. Who else
computes an operation stands in `s4.backends`, and `dispatch` picks one of them. `segments` lays out sequences
with resets, `kept` keeps what was computed from parameters, `ranks` hands states from process to process, and
`flops` counts.
"""

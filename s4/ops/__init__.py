"""The operations that S4 is made of: each file has one, as anyone can read it and as torch sees it.

`cauchy`, sums over poles; `response`, C A^l X; `maps` of a chunk; `scan` over chunks; `step`; `convolve`.
A file holds the plain definition, the operator of torch.library with its gradient, and nothing else; who
else computes an operation stands in `s4.backends`, and `dispatch` picks.
"""

"""The Triton kernels of `__init__.py`, the only module that imports this one.

Complex numbers are interleaved (re, im) and arithmetic is real, in the precision of the arrays. Shapes: v
(G, q, n), z (1 or G, l), w (G, n), sums (G, q, l), all contiguous and none of them empty. A program takes Q
rows of q, POLES of n and BLOCK nodes, in tiles with nodes along the threads, so that sums over rows or poles
stay within a thread. Padding repeats the last node, pole or row: it never meets a pole that the arrays do not
meet. Offsets are 64-bit. Sizes are not specialised on: a new length compiles nothing.

Cost below is in instructions of the float pipe (H100: 17e12 a second in float64, 33e12 in float32), of one
node and one pole. It is arithmetic, not measured.
"""

from typing import no_type_check  # the shape checks of the tests leave annotations of Triton alone

import triton
import triton.language as tl

_SIZES = ["groups", "rows", "poles", "nodes", "z_step", "splits"]


@triton.jit
@no_type_check
def _pair(x, y, p, q):
    """s, d, e and |z-w|^-2, |z-conj w|^-2: 1/(z-w) = (s - i d) ia and 1/(z-conj w) = (s - i e) ib.

    8 instructions and two divisions of about 10 each. In double precision, one division and 3 products serve
    both; in single, a product of squares could leave the range. Differences come first, as
    z^2 - 2 z Re w + |w|^2 loses digits near a pole.
    """
    s = x - p
    d = y - q
    e = y + q
    a = s * s + d * d
    b = s * s + e * e
    if a.dtype == tl.float64:
        inverse = 1.0 / (a * b)
        return s, d, e, inverse * b, inverse * a
    else:
        return s, d, e, 1.0 / a, 1.0 / b


@triton.jit
@no_type_check
def _sums(s, d, e, ia, ib):
    """P = 1/(z-w) + 1/(z-conj w) and M = i (1/(z-w) - 1/(z-conj w)): v = a + i b contributes a P + b M.

    8 instructions."""
    return s * (ia + ib), -(d * ia + e * ib), d * ia - e * ib, s * (ia - ib)


@triton.jit
@no_type_check
def _squares(s, d, e, ia, ib):
    """E = 1/(z-w)^2 + 1/(z-conj w)^2 and O = i (1/(z-w)^2 - 1/(z-conj w)^2): 18 instructions."""
    u = ia * ia
    v = ib * ib
    u_re = (s - d) * (s + d) * u
    v_re = (s - e) * (s + e) * v
    u_im = -2 * s * d * u
    v_im = -2 * s * e * v
    return u_re + v_re, u_im + v_im, v_im - u_im, u_re - v_re


@triton.jit
@no_type_check
def _store(place, re, im, mask):
    """Both parts side by side: memory sees whole sectors."""
    part = tl.arange(0, 2)[None, None, :]
    tl.store(place[:, :, None] + part, tl.join(re, im), mask[:, :, None])


@triton.jit(do_not_specialize=_SIZES)
@no_type_check
def cauchy(v, z, w, out, rows, poles, nodes, z_step, Q: tl.constexpr, BLOCK: tl.constexpr):
    """Sums of Q rows at BLOCK nodes; z_step is 0 for common nodes, else `nodes`.

    17 instructions and the division for all rows and 4 a row, 43 at Q = 4 in float64: (G, n, l) =
    (512, 32, 8193) takes 0.34 ms, and 268 MB of sums 0.08 ms at 3.3 TB/s. So nodes and sums stay in
    registers, 2 + 2 Q a node, and w and v, the same for all threads, come from the first-level cache, 2 + 2 Q
    a pole.
    """
    node_blocks = tl.cdiv(nodes, BLOCK)
    block = tl.program_id(0) % node_blocks
    rest = tl.program_id(0) // node_blocks
    row_blocks = tl.cdiv(rows, Q)
    group = (rest // row_blocks).to(tl.int64)
    row = (rest % row_blocks).to(tl.int64) * Q + tl.arange(0, Q)
    node = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    z += 2 * (group * z_step + tl.minimum(node, nodes - 1))
    x = tl.load(z)
    y = tl.load(z + 1)
    v += 2 * poles * (group * rows + tl.minimum(row, rows - 1))
    w += 2 * poles * group
    re = tl.zeros([Q, BLOCK], x.dtype)
    im = tl.zeros([Q, BLOCK], x.dtype)
    for n in range(poles):
        s, d, e, ia, ib = _pair(x, y, tl.load(w + 2 * n), tl.load(w + 2 * n + 1))
        p_re, p_im, m_re, m_im = _sums(s, d, e, ia, ib)
        a = tl.load(v + 2 * n)[:, None]
        b = tl.load(v + 2 * n + 1)[:, None]
        re = re + a * p_re[None, :] + b * m_re[None, :]
        im = im + a * p_im[None, :] + b * m_im[None, :]
    place = out + 2 * ((group * rows + row)[:, None] * nodes + node[None, :])
    _store(place, re, im, (row < rows)[:, None] & (node < nodes)[None, :])


@triton.jit(do_not_specialize=_SIZES)
@no_type_check
def cauchy_backward(
    grad, v, z, w, grad_v, grad_w, groups, rows, poles, nodes, z_step, splits,
    Q: tl.constexpr, POLES: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Gradients (splits, G, q, n) of v and (splits, row blocks, G, n) of w, to be added up.

    With T1 = sum of a conj(grad) and T2 = sum of b conj(grad) over rows, that of w is Re(T1 E + T2 O) +
    i Re(T1 O - T2 E), and that of v is Re(conj(grad) P) + i Re(conj(grad) M). A program adds up every node
    block of its split, elementwise, and only then across threads: no atomic, the same bits every time.

    44 instructions and the division for all rows and 8 a row, 86 at Q = 4 in float64: (512, 32, 8193) takes
    0.68 ms. The gradient of the sums, 268 MB, is read n / POLES times, mostly from the second-level cache:
    with 2 poles 4.3 GB or 0.8 ms. More do not fit: sums alone take 2 Q + 2 numbers a pole in every thread.
    """
    pole_blocks = tl.cdiv(poles, POLES)
    row_blocks = tl.cdiv(rows, Q)
    rest = tl.program_id(0)
    split = rest % splits
    rest = rest // splits
    pole = (rest % pole_blocks).to(tl.int64) * POLES + tl.arange(0, POLES)
    rest = rest // pole_blocks
    row_block = (rest % row_blocks).to(tl.int64)
    group = (rest // row_blocks).to(tl.int64)
    row = row_block * Q + tl.arange(0, Q)
    own_pole = tl.minimum(pole, poles - 1)
    own_row = group * rows + tl.minimum(row, rows - 1)
    w += 2 * (group * poles + own_pole)
    p = tl.load(w)[:, None]
    q = tl.load(w + 1)[:, None]
    v += 2 * (own_row[:, None] * poles + own_pole[None, :])
    a = tl.load(v)[:, :, None]
    b = tl.load(v + 1)[:, :, None]
    z += 2 * group * z_step
    grad += 2 * own_row[:, None] * nodes
    v_re = tl.zeros([Q, POLES, BLOCK], p.dtype)
    v_im = tl.zeros([Q, POLES, BLOCK], p.dtype)
    w_re = tl.zeros([POLES, BLOCK], p.dtype)
    w_im = tl.zeros([POLES, BLOCK], p.dtype)
    for block in range(split, tl.cdiv(nodes, BLOCK), splits):
        node = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        valid = (row < rows)[:, None] & (node < nodes)[None, :]
        node = tl.minimum(node, nodes - 1)
        g_re = tl.load(grad + 2 * node[None, :], valid, 0.0)[:, None, :]
        g_im = tl.load(grad + 2 * node[None, :] + 1, valid, 0.0)[:, None, :]
        s, d, e, ia, ib = _pair(tl.load(z + 2 * node)[None, :], tl.load(z + 2 * node + 1)[None, :], p, q)
        p_re, p_im, m_re, m_im = _sums(s, d, e, ia, ib)
        v_re = v_re + g_re * p_re[None] + g_im * p_im[None]
        v_im = v_im + g_re * m_re[None] + g_im * m_im[None]
        e_re, e_im, o_re, o_im = _squares(s, d, e, ia, ib)
        ar = tl.sum(a * g_re, 0)
        ai = tl.sum(a * g_im, 0)
        br = tl.sum(b * g_re, 0)
        bi = tl.sum(b * g_im, 0)
        w_re = w_re + ar * e_re + ai * e_im + br * o_re + bi * o_im
        w_im = w_im + ar * o_re + ai * o_im - br * e_re - bi * e_im
    own = (row < rows)[:, None] & (pole < poles)[None, :]
    part = tl.cast(split, tl.int64) * groups + group
    place = grad_v + 2 * ((part * rows + row)[:, None] * poles + pole[None, :])
    _store(place, tl.sum(v_re, 2), tl.sum(v_im, 2), own)
    part = (tl.cast(split, tl.int64) * row_blocks + row_block) * groups + group
    place = grad_w + 2 * (part * poles + pole)
    tl.store(place, tl.sum(w_re, 1), pole < poles)
    tl.store(place + 1, tl.sum(w_im, 1), pole < poles)


@triton.jit(do_not_specialize=_SIZES)
@no_type_check
def cauchy_backward_nodes(
    grad, v, z, w, grad_z, rows, poles, nodes, z_step, Q: tl.constexpr, BLOCK: tl.constexpr
):
    """Gradient (G, l) of the nodes, -conj(sum over n of T1 E + T2 O), at BLOCK nodes of a group.

    36 instructions and the division, and 4 a row: 62 at Q = 4 in float64, 0.49 ms for (512, 32, 8193), beside
    0.1 ms to read the gradient of the sums once.
    """
    node_blocks = tl.cdiv(nodes, BLOCK)
    block = tl.program_id(0) % node_blocks
    group = (tl.program_id(0) // node_blocks).to(tl.int64)
    node = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    own_node = tl.minimum(node, nodes - 1)
    z += 2 * (group * z_step + own_node)
    x = tl.load(z)
    y = tl.load(z + 1)
    w += 2 * poles * group
    re = tl.zeros([BLOCK], x.dtype)
    im = tl.zeros([BLOCK], x.dtype)
    for row_block in range(tl.cdiv(rows, Q)):
        row = tl.cast(row_block, tl.int64) * Q + tl.arange(0, Q)
        own_row = group * rows + tl.minimum(row, rows - 1)
        valid = (row < rows)[:, None] & (node < nodes)[None, :]
        place = grad + 2 * (own_row[:, None] * nodes + own_node[None, :])
        g_re = tl.load(place, valid, 0.0)
        g_im = tl.load(place + 1, valid, 0.0)
        for n in range(poles):
            s, d, e, ia, ib = _pair(x, y, tl.load(w + 2 * n), tl.load(w + 2 * n + 1))
            e_re, e_im, o_re, o_im = _squares(s, d, e, ia, ib)
            a = tl.load(v + 2 * (own_row * poles + n))[:, None]
            b = tl.load(v + 2 * (own_row * poles + n) + 1)[:, None]
            ar = tl.sum(a * g_re, 0)
            ai = tl.sum(a * g_im, 0)
            br = tl.sum(b * g_re, 0)
            bi = tl.sum(b * g_im, 0)
            re = re - ar * e_re - ai * e_im - br * o_re - bi * o_im
            im = im + ar * e_im - ai * e_re + br * o_im - bi * o_re
    place = grad_z + 2 * (group * nodes + node)
    tl.store(place, re, node < nodes)
    tl.store(place + 1, im, node < nodes)

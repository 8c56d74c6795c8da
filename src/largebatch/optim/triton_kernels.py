"""The Triton kernels: a pass over all layers each, the rules as in `reference`, and the norms on the way.

A program takes one chunk of one layer; which, it finds in a table on the device. Where `TRITON_INTERPRET=1` when this
file is imported, Triton interprets the kernels on the CPU instead of compiling them: slowly, for tests.
"""

import triton
import triton.language as tl

# A layer is a row of int64: where its tensors are, how many elements they have, where its chunks begin; what rounds its
# state (`precision.Origin`); the row of its numbers, and its place among the layers of the step.
WIDTH = tl.constexpr(13)
X, ROUNDED, G, STATE0, STATE1, COUNT, FIRST_CHUNK = map(tl.constexpr, range(7))
SEED, START, RUN, SKIP, HYPER, OWNER = map(tl.constexpr, range(7, 13))

# The numbers of a step are a row of float64, named as in `lamb.Hyper`, `lars.Hyper` and `norms.Ratio`.
NUMBERS = (
    *("t", "rate", "keep", "beta1", "beta2", "eps", "weight_decay", "maximize"),
    *("m_scale", "g_scale", "v_scale", "g_sq_scale", "momentum", "nesterov"),
    *("adapt", "shrink", "eps_of_ratio", "decay", "coefficient", "low", "high", "lower", "upper"),
    *("grad_scale", "found_inf"),
)
NUM_NUMBERS = tl.constexpr(len(NUMBERS))
T, RATE, KEEP, BETA1, BETA2, EPS, WEIGHT_DECAY, MAXIMIZE = map(tl.constexpr, range(8))
M_SCALE, G_SCALE, V_SCALE, G_SQ_SCALE, MOMENTUM, NESTEROV = map(tl.constexpr, range(8, 14))
ADAPT, SHRINK, EPS_OF_RATIO, DECAY, COEFFICIENT, LOW, HIGH, LOWER, UPPER = map(tl.constexpr, range(14, 23))
GRAD_SCALE, FOUND_INF = map(tl.constexpr, range(23, 25))


@triton.jit
def column(rows, layer, name: tl.constexpr):
    return tl.load(rows + layer * WIDTH + name)


@triton.jit
def number(hypers, h, name: tl.constexpr):
    return tl.load(hypers + h * NUM_NUMBERS + name)


# ---- elements ----


@triton.jit
def located(address, dtype: tl.constexpr, aligned: tl.constexpr):
    """Return an address as a pointer, of which the compiler may know that 16 bytes at once can be read there."""
    pointer = address.to(tl.pointer_type(dtype))
    if aligned:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def read(pointer, index, inside, masked: tl.constexpr, compute: tl.constexpr):
    if masked:
        value = tl.load(pointer + index, mask=inside, other=0)
    else:
        value = tl.load(pointer + index)
    return value.to(compute)


@triton.jit
def store(pointer, index, inside, masked: tl.constexpr, value):
    if masked:
        tl.store(pointer + index, value, mask=inside)
    else:
        tl.store(pointer + index, value)


@triton.jit
def narrowed(value, dtype: tl.constexpr):
    """Round to the nearest, ties to even: what `to` does for bfloat16 too, but not in the interpreter."""
    if dtype == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
        value = tl.where((bits & 0x7F800000) == 0x7F800000, value, nearest)
    return value.to(dtype)


@triton.jit
def write(pointer, index, inside, masked: tl.constexpr, value):
    """Store weights; what float16 cannot hold becomes its largest number."""
    dtype: tl.constexpr = pointer.dtype.element_ty
    if dtype == tl.float16:
        value = tl.minimum(tl.maximum(value, -65504.0), 65504.0)
    store(pointer, index, inside, masked, narrowed(value, dtype))


@triton.jit
def mix(h):
    """As `precision.mix`."""
    h = h ^ (h >> 16)
    h = h * 0x7FEB352D
    h = h ^ (h >> 15)
    h = h * 0x846CA68B
    return h ^ (h >> 16)


@triton.jit
def noise_of(place, seed, state: tl.constexpr):
    """As `precision.noise`."""
    h = place * 0x9E3779B1 + seed
    h = (h ^ (h >> 13)) * 0x846CA68B
    return h >> 16 if state else h & 0xFFFF


@triton.jit
def write_state(pointer, index, inside, masked: tl.constexpr, value, state: tl.constexpr, seed, origin):
    """Store a state, which bfloat16 rounds by chance as `precision.store` does; return what it became."""
    dtype: tl.constexpr = pointer.dtype.element_ty
    if dtype == tl.bfloat16:
        start, run, skip = origin
        place = index + start
        if skip != 0:  # a division of 64 bits for each element costs more than all else
            place += (index // run) * skip
        noise = noise_of(place.to(tl.uint32), seed, state)
        bits = value.to(tl.uint32, bitcast=True)
        rounded = ((bits + noise) & 0xFFFF0000).to(tl.float32, bitcast=True)
        value = tl.where((bits & 0x7F800000) == 0x7F800000, value, rounded)
    store(pointer, index, inside, masked, narrowed(value, dtype))
    return narrowed(value, dtype).to(value.dtype)


@triton.jit
def measured(total, value, norm: tl.constexpr):
    if norm == "l2":
        return total + value * value
    if norm == "l1":
        return total + tl.abs(value)
    return tl.maximum(total, tl.abs(value), propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def joined(values, norm: tl.constexpr):
    if norm == "linf":
        broken = tl.sum((values != values).to(tl.int32), axis=0) > 0
        return tl.where(broken, float("nan"), tl.max(values, axis=0))
    return tl.sum(values, axis=0)


# ---- the rules ----


@triton.jit
def usable(g):
    """Return g with 0 where its square is not finite, and where that was."""
    square = g * g
    broken = (square - square) != 0  # inf - inf and NaN are not 0
    return tl.where(broken, 0.0, g), broken


@triton.jit
def numbers_of_u(hypers, h, rule: tl.constexpr, compute: tl.constexpr):
    decay = number(hypers, h, WEIGHT_DECAY).to(compute)
    if rule == "lamb":
        m_scale, g_scale = number(hypers, h, M_SCALE).to(compute), number(hypers, h, G_SCALE).to(compute)
        v_scale, g_sq_scale = number(hypers, h, V_SCALE).to(compute), number(hypers, h, G_SQ_SCALE).to(compute)
        return m_scale, g_scale, v_scale, g_sq_scale, number(hypers, h, EPS).to(compute), decay
    else:  # noqa: RET505, Triton would see two types of tuples returned
        momentum = number(hypers, h, MOMENTUM)
        return momentum.to(compute), (1 - momentum).to(compute), decay, number(hypers, h, NESTEROV) != 0


@triton.jit
def lamb_u(x, g, m, v, numbers):
    m_scale, g_scale, v_scale, g_sq_scale, eps, decay = numbers
    m_hat = m_scale * m + g_scale * g
    v_hat = v_scale * v + g_sq_scale * (g * g)
    # In float32 `tl.sqrt` is an approximation that takes subnormal numbers for 0.
    root = tl.sqrt_rn(v_hat) if v_hat.dtype == tl.float32 else tl.sqrt(v_hat)
    return m_hat / (root + eps) + decay * x


@triton.jit
def lars_average(x, g, m, numbers):
    momentum, rest, decay, _ = numbers
    return momentum * m + rest * (g + decay * x)


@triton.jit
def factor_of_g(hypers, h, compute: tl.constexpr):
    """What turns a gradient as it comes into one to descend along."""
    return ((1 - 2 * number(hypers, h, MAXIMIZE)) / number(hypers, h, GRAD_SCALE)).to(compute)


# ---- the passes ----


@triton.jit
def direct_block(
    at, index, inside, totals, factor, numbers, averages, seed, origin,
    rule: tl.constexpr, norm: tl.constexpr, compute: tl.constexpr, masked: tl.constexpr,
):  # fmt: skip
    x_at, g_at, m_at, v_at = at
    x_total, u_total = totals
    x = read(x_at, index, inside, masked, compute)
    g, broken = usable(factor * read(g_at, index, inside, masked, compute))
    if rule == "lamb":
        beta1, rest1, beta2, rest2 = averages
        m = beta1 * read(m_at, index, inside, masked, compute) + rest1 * g
        v = beta2 * read(v_at, index, inside, masked, compute) + rest2 * (g * g)
        m = write_state(m_at, index, inside, masked, m, 0, seed, origin)
        v = write_state(v_at, index, inside, masked, v, 1, seed, origin)
        u = lamb_u(x, g, m, v, numbers)
    elif rule == "lars":
        m = lars_average(x, g, read(m_at, index, inside, masked, compute), numbers)
        m = write_state(m_at, index, inside, masked, m, 0, seed, origin)
        u = tl.where(numbers[3], lars_average(x, g, m, numbers), m)
    else:
        u = g  # ‖g‖ is what enters the ratio, and the momentum waits for it
    if masked:
        u = tl.where(inside, u, 0.0)
    return measured(x_total, x, norm), measured(u_total, tl.where(broken, float("nan"), u), norm)


@triton.jit
def direct_chunk(
    chunk, rows, chunks, hypers, shares, num_chunks,
    rule: tl.constexpr, norm: tl.constexpr, x_type: tl.constexpr, g_type: tl.constexpr, state_type: tl.constexpr,
    compute: tl.constexpr, aligned: tl.constexpr, size: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Advance the state and leave the chunk's share of the norms of x and u in ``shares``, [2, chunks]."""
    layer = tl.load(chunks + chunk).to(tl.int64)
    at = (
        located(column(rows, layer, X), x_type, aligned),
        located(column(rows, layer, G), g_type, aligned),
        located(column(rows, layer, STATE0), state_type, aligned),
        located(column(rows, layer, STATE1), state_type, aligned),
    )
    origin = column(rows, layer, START), column(rows, layer, RUN), column(rows, layer, SKIP)
    begin = (chunk - column(rows, layer, FIRST_CHUNK)).to(tl.int64) * size
    h = column(rows, layer, HYPER)
    end = tl.where(number(hypers, h, FOUND_INF) == 0, tl.minimum(begin + size, column(rows, layer, COUNT)), begin)

    factor = factor_of_g(hypers, h, compute)
    numbers = numbers_of_u(hypers, h, rule, compute)
    beta1, beta2 = number(hypers, h, BETA1), number(hypers, h, BETA2)
    averages = beta1.to(compute), (1 - beta1).to(compute), beta2.to(compute), (1 - beta2).to(compute)
    seed = mix(mix(number(hypers, h, T).to(tl.int64).to(tl.uint32)) + column(rows, layer, SEED).to(tl.uint32))

    totals = tl.zeros((block,), compute), tl.zeros((block,), compute)
    for offset in range(0, size, block):
        first = begin + offset
        index = first + tl.arange(0, block).to(tl.int64)
        inside = index < end
        if first + block <= end:
            totals = direct_block(
                at, index, inside, totals, factor, numbers, averages, seed, origin, rule, norm, compute, False
            )
        elif first < end:
            totals = direct_block(
                at, index, inside, totals, factor, numbers, averages, seed, origin, rule, norm, compute, True
            )
    tl.store(shares + chunk, joined(totals[0], norm))
    tl.store(shares + num_chunks + chunk, joined(totals[1], norm))


@triton.jit
def joined_shares(shares, num, norm: tl.constexpr, block: tl.constexpr, dtype: tl.constexpr):
    """Join ``num`` shares in their order."""
    total = tl.zeros((block,), dtype)
    offset = num * 0
    while offset < num:  # a range would fail in the interpreter of Triton 3.6 under NumPy 2.4
        index = offset + tl.arange(0, block)
        share = tl.load(shares + index, mask=index < num, other=0).to(dtype)
        total = tl.maximum(total, share, propagate_nan=tl.PropagateNan.ALL) if norm == "linf" else total + share
        offset += block
    return joined(total, norm)


@triton.jit
def settle_layer(
    layer, rows, hypers, shares, num_chunks, totals, ratios, num_layers,
    norm: tl.constexpr, size: tl.constexpr, block: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Join the shares of a layer into ``totals``, [2, layers], and make its ratio, as `norms.trust_ratio` does."""
    h, owner = column(rows, layer, HYPER), column(rows, layer, OWNER)
    num = (column(rows, layer, COUNT) + size - 1) // size
    shares += column(rows, layer, FIRST_CHUNK)
    x_norm = joined_shares(shares, num, norm, block, dtype)
    u_norm = joined_shares(shares + num_chunks, num, norm, block, dtype)
    u_norm = tl.where(number(hypers, h, FOUND_INF) == 0, u_norm, float("nan"))
    tl.store(totals + owner, x_norm)
    tl.store(totals + num_layers + owner, u_norm)

    if norm == "l2":
        x_norm, u_norm = tl.sqrt(x_norm), tl.sqrt(u_norm)
    z = number(hypers, h, SHRINK).to(dtype) * x_norm
    divisor = u_norm + number(hypers, h, EPS_OF_RATIO).to(dtype) + number(hypers, h, DECAY).to(dtype) * z
    phi = tl.minimum(tl.maximum(z, number(hypers, h, LOW).to(dtype)), number(hypers, h, HIGH).to(dtype))
    plain = (z == 0) | (u_norm == 0) | (number(hypers, h, ADAPT) == 0)
    ratio = number(hypers, h, COEFFICIENT).to(dtype) * phi / tl.where(plain, 1.0, divisor)
    ratio = tl.minimum(tl.maximum(ratio, number(hypers, h, LOWER).to(dtype)), number(hypers, h, UPPER).to(dtype))
    ratio = tl.where(plain, 1.0, ratio)
    stays = ((u_norm - u_norm) != 0) | ((ratio - ratio) != 0)  # inf - inf and NaN are not 0
    tl.store(ratios + owner, tl.where(stays, float("nan"), ratio))


@triton.jit
def descend_block(
    at, rounded_at, index, inside, factor, numbers, step,
    rule: tl.constexpr, compute: tl.constexpr, masked: tl.constexpr, rounds: tl.constexpr, reads_g: tl.constexpr,
):  # fmt: skip
    x_at, g_at, m_at, v_at = at
    keep, rate, ratio = step
    x = read(x_at, index, inside, masked, compute)
    m = read(m_at, index, inside, masked, compute)
    g = x
    if reads_g:
        g, _ = usable(factor * read(g_at, index, inside, masked, compute))
    if rule == "lamb":
        v = read(v_at, index, inside, masked, compute)
        x = keep * x - rate * (ratio * lamb_u(x, g, m, v, numbers))
    elif rule == "lars":
        x = x - rate * (ratio * tl.where(numbers[3], lars_average(x, g, m, numbers), m))
    else:
        momentum, _, decay, nesterov = numbers
        scaled = ratio * (g + decay * x)
        m = momentum * m + scaled
        x = x - rate * tl.where(nesterov, scaled + momentum * m, m)
        store(m_at, index, inside, masked, narrowed(m, m_at.dtype.element_ty))
    write(x_at, index, inside, masked, x)
    if rounds:
        write(rounded_at, index, inside, masked, x)


@triton.jit
def descend_chunk(
    chunk, rows, chunks, hypers, ratios,
    rule: tl.constexpr, x_type: tl.constexpr, g_type: tl.constexpr, state_type: tl.constexpr, compute: tl.constexpr,
    rounded_type: tl.constexpr, aligned: tl.constexpr, size: tl.constexpr, block: tl.constexpr, reads_g: tl.constexpr,
    rounds: tl.constexpr,
):  # fmt: skip
    """Form u again and move x along it, unless the layer's ratio is NaN; a master copy is rounded on the way."""
    layer = tl.load(chunks + chunk).to(tl.int64)
    ratio = tl.load(ratios + column(rows, layer, OWNER))
    at = (
        located(column(rows, layer, X), x_type, aligned),
        located(column(rows, layer, G), g_type, aligned),
        located(column(rows, layer, STATE0), state_type, aligned),
        located(column(rows, layer, STATE1), state_type, aligned),
    )
    rounded_at = located(column(rows, layer, ROUNDED), rounded_type, aligned)
    begin = (chunk - column(rows, layer, FIRST_CHUNK)).to(tl.int64) * size
    end = tl.where(ratio == ratio, tl.minimum(begin + size, column(rows, layer, COUNT)), begin)

    h = column(rows, layer, HYPER)
    factor = factor_of_g(hypers, h, compute)
    numbers = numbers_of_u(hypers, h, rule, compute)
    step = number(hypers, h, KEEP).to(compute), number(hypers, h, RATE).to(compute), ratio.to(compute)
    for offset in range(0, size, block):
        first = begin + offset
        index = first + tl.arange(0, block).to(tl.int64)
        inside = index < end
        if first + block <= end:
            descend_block(at, rounded_at, index, inside, factor, numbers, step, rule, compute, False, rounds, reads_g)
        elif first < end:
            descend_block(at, rounded_at, index, inside, factor, numbers, step, rule, compute, True, rounds, reads_g)


# ---- three launches: a pass over all layers each ----


@triton.jit
def direct(
    rows, chunks, hypers, shares, num_chunks,
    rule: tl.constexpr, norm: tl.constexpr, x_type: tl.constexpr, g_type: tl.constexpr, state_type: tl.constexpr,
    compute: tl.constexpr, aligned: tl.constexpr, size: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    direct_chunk(
        tl.program_id(0), rows, chunks, hypers, shares, num_chunks,
        rule, norm, x_type, g_type, state_type, compute, aligned, size, block,
    )  # fmt: skip


@triton.jit
def settle(
    rows, hypers, shares, num_chunks, totals, ratios, num_layers,
    norm: tl.constexpr, size: tl.constexpr, block: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    layer = tl.program_id(0).to(tl.int64)
    settle_layer(layer, rows, hypers, shares, num_chunks, totals, ratios, num_layers, norm, size, block, dtype)


@triton.jit
def descend(
    rows, chunks, hypers, ratios, num_chunks,
    rule: tl.constexpr, x_type: tl.constexpr, g_type: tl.constexpr, state_type: tl.constexpr, compute: tl.constexpr,
    rounded_type: tl.constexpr, aligned: tl.constexpr, size: tl.constexpr, block: tl.constexpr, reads_g: tl.constexpr,
    rounds: tl.constexpr,
):  # fmt: skip
    descend_chunk(
        num_chunks - 1 - tl.program_id(0), rows, chunks, hypers, ratios,
        rule, x_type, g_type, state_type, compute, rounded_type, aligned, size, block, reads_g, rounds,
    )  # fmt: skip


# ---- one launch: both passes over a layer while it is in cache ----


@triton.jit
def whole(
    rows, chunks, tasks, hypers, shares, totals, ratios, counters, num_chunks, num_layers, num_tasks,
    rule: tl.constexpr, norm: tl.constexpr, x_type: tl.constexpr, g_type: tl.constexpr, state_type: tl.constexpr,
    compute: tl.constexpr, total_type: tl.constexpr, rounded_type: tl.constexpr, aligned: tl.constexpr,
    size: tl.constexpr, block: tl.constexpr, shares_block: tl.constexpr, reads_g: tl.constexpr, rounds: tl.constexpr,
):  # fmt: skip
    """Take tasks until none is left: the first pass over a chunk, 2 * chunk, or the second, 2 * chunk + 1.

    Tasks are drawn in their order, and one waits only for tasks before it, so that whatever waits, something moves.
    ``counters`` begin as 0. The first is the number of tasks drawn; after it, each layer has the number of chunks that
    have been through the first pass, plus one when its ratio is there, which is for the last of them to make.
    """
    task = tl.atomic_add(counters, 1)
    while task < num_tasks:
        what = tl.load(tasks + task)
        chunk = what // 2
        layer = tl.load(chunks + chunk).to(tl.int64)
        done = counters + 1 + layer
        num = ((column(rows, layer, COUNT) + size - 1) // size).to(tl.int32)
        if what % 2 == 0:
            direct_chunk(
                chunk, rows, chunks, hypers, shares, num_chunks,
                rule, norm, x_type, g_type, state_type, compute, aligned, size, block,
            )  # fmt: skip
            tl.debug_barrier()  # what all threads wrote comes before the count
            if tl.atomic_add(done, 1, sem="acq_rel") == num - 1:
                tl.debug_barrier()
                settle_layer(
                    layer, rows, hypers, shares, num_chunks, totals, ratios, num_layers,
                    norm, size, shares_block, total_type,
                )  # fmt: skip
                tl.debug_barrier()
                tl.atomic_add(done, 1, sem="release")
        else:
            while tl.atomic_add(done, 0, sem="acquire") <= num:
                pass
            tl.debug_barrier()
            descend_chunk(
                chunk, rows, chunks, hypers, ratios,
                rule, x_type, g_type, state_type, compute, rounded_type, aligned, size, block, reads_g, rounds,
            )  # fmt: skip
        task = tl.atomic_add(counters, 1)

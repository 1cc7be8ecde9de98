"""The row step of the triton backend: one kernel serves all divergences, whose formulas are handed to it.

One program works on one row of logits, and sweeps over the vocabulary in blocks:

    1  to sum both log-partition functions, both entropies, and in the KL family the KLs themselves
    2  to sum the value and the slopes where these need normalised log-probabilities (not in the KL family,
       unless entries are clipped or left out)
    3  to write the gradient weight * (slope - p * sum(slope)) / temperature in place of the student's logits

Sums are kept per lane in a shifted online form: with m the running maximum and u = z - m, every sum over
e^u f(u) is rescaled when m moves. Gradients are stored in the dtype that the next matrix products want; where
that is narrower than the logits' float32 they fill the first half of the logits' own row. The next blocks are
on their way while one is worked on: what a block's gradient overwrites has been read before.
"""
import os

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

import losses

FLOOR, MASKED, CLAMP = map(tl.constexpr, (losses.FLOOR, losses.MASKED, losses.CLAMP))
BLOCK, WARPS, STAGES = 1024, 4, 3       # entries per step of a sweep, warps per program, steps in flight

if os.environ.get("TRITON_INTERPRET") == "1":
    @triton.jit
    def fast_log(x):
        return tl.log(x)
else:
    @triton.jit
    def fast_log(x):
        """Return the GPU's own logarithm, off by at most 2^-22 for x about 1 (the interpreter has none)."""
        return libdevice.fast_logf(x)


# ---- the formulas of losses.py; a and b are the knob -------------------------------------------------------
FORMULAS = {}       # name -> compiled formula


def formula(function):
    """Compile a formula, and make it known by its name."""
    FORMULAS[function.__name__] = triton.jit(function)
    return FORMULAS[function.__name__]


@formula
def fkl(lp, lq, p, q, a, b):
    return q * (lq - lp), -q


@formula
def rkl(lp, lq, p, q, a, b):
    value = p * (lp - lq)
    return value, value + p


@formula
def jsd(lp, lq, p, q, a, b):
    above_q, above_p = log_mixture_gaps(a, lq, lp)
    pull = (1 - a) * p * above_p
    return a * q * above_q + pull, pull


@formula
def jeffreys(lp, lq, p, q, a, b):
    ratio = lp - lq
    return (p - q) * ratio, p * ratio + (p - q)


@formula
def skew_fkl(lp, lq, p, q, a, b):
    above_q, _ = log_mixture_gaps(a, lq, lp)
    return q * above_q, (a - 1) * p * tl.exp(above_q)


@formula
def skew_rkl(lp, lq, p, q, a, b):
    above_p, _ = log_mixture_gaps(a, lp, lq)
    value = p * above_p
    return value, value + p - a * p * tl.exp(above_p)


@formula
def todi(lp, lq, p, q, a, b):
    ratio = lp - lq
    forward = tl.sigmoid(-a * ratio)
    return ((1 - forward) * p - forward * q) * ratio, (1 - forward) * p * (ratio + 1) - forward * q


@formula
def power(lp, lq, p, q, a, b):
    r = tl.exp(tl.minimum(lq + a * (lq - lp), CLAMP))
    return (r - q) / (a * (a + 1)), -r / (a + 1)


@formula
def alpha_beta(lp, lq, p, q, a, b):
    r = tl.exp(tl.minimum(a * lq + b * lp, CLAMP))
    q_ab, p_ab = tl.exp((a + b) * lq), tl.exp((a + b) * lp)
    return (a * q_ab + b * p_ab - (a + b) * r) / (a * b * (a + b)), (p_ab - r) / a


@formula
def tvd(lp, lq, p, q, a, b):
    return 0.5 * tl.abs(p - q), 0.5 * tl.where(p > q, p, tl.where(p < q, -p, 0.0))


@triton.jit
def log_mixture_gaps(a, x, y):
    """Return x - log m and y - log m for m = a e^x + (1 - a) e^y, exact where x and y nearly agree."""
    ratio = y - x
    less = tl.exp(-tl.abs(ratio))                       # the smaller of both over the larger
    log = fast_log(tl.where(ratio > 0, a * less + (1 - a), a + (1 - a) * less))
    return -tl.maximum(ratio, 0.0) - log, tl.minimum(ratio, 0.0) - log


KL_FAMILY = {"fkl": (True, False), "rkl": (False, True), "jeffreys": (True, True)}    # KL(q || p), KL(p || q)


# ---- the kernel --------------------------------------------------------------------------------------------

@triton.jit
def seen(x, softcap, per_temperature):
    """Return a logit as the loss sees it: capped, floored, over the temperature. A NaN stays one."""
    if softcap is not None:
        x = softcap * (2 * tl.sigmoid(2 * x / softcap) - 1)     # tanh(y) = 2 sigmoid(2 y) - 1
    return tl.maximum(x, FLOOR, propagate_nan=tl.PropagateNan.ALL) * per_temperature


@triton.jit
def logits(ptr, columns, V, stride, softcap, per_temperature):
    """Return a block of a row. Its padding up to the stride is read too, in whole, aligned vectors."""
    x = tl.load(ptr + columns, mask=columns < stride, other=0.0).to(tl.float32)
    return tl.where(columns < V, seen(x, softcap, per_temperature), MASKED)


@triton.jit
def shifted(x, m):
    """Return the new maximum, old minus new, u = x - new, e^u, and the factor that rescales older sums."""
    new = tl.maximum(m, tl.max(x, 0))
    u = x - new
    return new, m - new, u, tl.exp(u), tl.exp(m - new)


@triton.jit
def counts(z, t, least_z, least_t, UNION: tl.constexpr):
    """Return which entries are in the support. The top k of one model: every logit of the other is enough."""
    return ((z >= least_z) | (t >= least_t)) if UNION else ((z >= least_z) & (t >= least_t))


@triton.jit
def clipped(value, slope, clip):
    """Return the value, at most clip, and its slope, 0 where it is cut off: losses.clipped."""
    if clip is not None:
        slope = tl.where(value > clip, 0.0, slope)
        value = tl.minimum(value, clip)
    return value, slope


@triton.jit
def terms(z, t, w, columns, V, least_z, least_t, m_z, norm_z, m_w, norm_w, a, b, mass_slope, clip,
          FORMULA: tl.constexpr, UNION: tl.constexpr, FORM: tl.constexpr):
    """Return the value, the slope, p, lp and whether the entry counts; p and lp are among those that do."""
    keep = columns < V
    if FORM != "full":
        keep = keep & counts(z, t, least_z, least_t, UNION)
    if FORM == "renorm":
        z, w = tl.where(keep, z, MASKED), tl.where(keep, w, MASKED)
    lp, lq = z - m_z - norm_z, w - m_w - norm_w
    p = tl.exp(lp)
    value, slope = FORMULA(lp, lq, p, tl.exp(lq), a, b)
    if FORM == "sg":
        slope -= mass_slope * p
    value, slope = clipped(value, slope, clip)
    return tl.where(keep, value, 0.0), tl.where(keep, slope, 0.0), p, lp, keep


@triton.jit
def row_kernel(z_ptr, w_ptr, dz_ptr, weight_ptr, label_ptr, label_weight_ptr, least_z_ptr, least_t_ptr,
               value_ptr, entropy_s_ptr, entropy_t_ptr, top1_agree_ptr, logprob_s_ptr, logprob_t_ptr,
               stride, dz_stride, V, softcap_s, softcap_t, per_temperature, target_a, target_b, a, b,
               mass_slope, clip, FORMULA: tl.constexpr, FORWARD: tl.constexpr, REVERSE: tl.constexpr,
               MIX: tl.constexpr, UNION: tl.constexpr, FORM: tl.constexpr, BLOCK: tl.constexpr,
               STAGES: tl.constexpr):
    """Do the row step on one row.

    A pointer may be None: without w there is no teacher, without dz no gradient is wanted, without least_z
    (the student's smallest logit that counts) or least_t (the teacher's) every one does; labels and their
    weights may be absent. clip may be None, too.
    """
    TEACHER: tl.constexpr = w_ptr is not None
    KL: tl.constexpr = (FORWARD or REVERSE) and FORM == "full" and clip is None
    PART: tl.constexpr = FORM == "renorm" or FORM == "tail"
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    zeros, lowest = tl.zeros([BLOCK], tl.float32), tl.full([], MASKED, tl.float32)
    z_ptr += row * stride
    m_z, Z_z, E_z = lowest, zeros, zeros                # maximum, sum e^u, sum e^u u
    least_z, least_t = float("-inf"), float("-inf")
    if TEACHER:
        w_ptr += row * stride
        m_w, Z_w, E_w = lowest, zeros, zeros
        D_pq, D_qp = zeros, zeros                       # sum e^(u_z) (u_z - u_w), sum e^(u_w) (u_w - u_z)
        agree = tl.zeros([BLOCK], tl.int32)
        if least_z_ptr is not None:
            least_z = seen(tl.load(least_z_ptr + row), softcap_s, per_temperature)
        if least_t_ptr is not None:
            least_t = seen(tl.load(least_t_ptr + row), softcap_t, per_temperature)
        if PART:                                        # the entries that count (renorm) or the others (tail)
            m_z_part, Z_z_part, m_w_part, Z_w_part = lowest, zeros, lowest, zeros

    for first in tl.range(0, V, BLOCK, num_stages=STAGES):
        columns = first + lanes
        z = logits(z_ptr, columns, V, stride, softcap_s, per_temperature)
        if TEACHER:                                     # loaded before the first reduction waits
            t = logits(w_ptr, columns, V, stride, softcap_t, per_temperature)
        m_z, moved_z, u_z, e_z, shrink_z = shifted(z, m_z)
        E_z = shrink_z * (E_z + Z_z * moved_z) + e_z * u_z
        if TEACHER:
            w = target_a * t + target_b * z if MIX else t
            m_w, moved_w, u_w, e_w, shrink_w = shifted(w, m_w)
            E_w = shrink_w * (E_w + Z_w * moved_w) + e_w * u_w
            if KL:
                if REVERSE:
                    D_pq = shrink_z * (D_pq + Z_z * (moved_z - moved_w)) + e_z * (u_z - u_w)
                if FORWARD:
                    D_qp = shrink_w * (D_qp + Z_w * (moved_w - moved_z)) + e_w * (u_w - u_z)
            Z_w = shrink_w * Z_w + e_w
            agree = tl.where((moved_z < 0) | (moved_w < 0), 0, agree) | ((u_z == 0) & (u_w == 0)).to(tl.int32)
            if PART:
                part = (counts(z, t, least_z, least_t, UNION) == (FORM == "renorm")) & (columns < V)
                m_z_part, _, _, e, shrink = shifted(tl.where(part, z, MASKED), m_z_part)
                Z_z_part = shrink * Z_z_part + e
                m_w_part, _, _, e, shrink = shifted(tl.where(part, w, MASKED), m_w_part)
                Z_w_part = shrink * Z_w_part + e
        Z_z = shrink_z * Z_z + e_z

    sum_z = tl.sum(Z_z, 0)
    log_z = tl.log(sum_z)
    tl.store(entropy_s_ptr + row, log_z - tl.sum(E_z, 0) / sum_z)
    if label_ptr is not None:
        label = tl.load(label_ptr + row)
        z_label = seen(tl.load(z_ptr + label), softcap_s, per_temperature)
        tl.store(logprob_s_ptr + row, z_label - m_z - log_z)
    if TEACHER:
        sum_w = tl.sum(Z_w, 0)
        log_w = tl.log(sum_w)
        broken = 0.0 * (log_z + log_w)                  # NaN if a logit is: maxima and selects hide it
        tl.store(entropy_t_ptr + row, log_w - tl.sum(E_w, 0) / sum_w)
        tl.store(top1_agree_ptr + row, tl.max(agree, 0).to(tl.float32))
        if label_ptr is not None:
            w_label = seen(tl.load(w_ptr + label), softcap_t, per_temperature)
            if MIX:
                w_label = target_a * w_label + target_b * z_label
            tl.store(logprob_t_ptr + row, w_label - m_w - log_w)
        if FORM == "renorm":
            m_p, norm_p = m_z_part, tl.log(tl.sum(Z_z_part, 0))
            m_w, norm_q = m_w_part, tl.log(tl.sum(Z_w_part, 0))
        else:
            m_p, norm_p, norm_q = m_z, log_z, log_w
        if KL:
            value, slope = 0.0, 0.0
            if REVERSE:
                KL_pq = tl.sum(D_pq, 0) / sum_z - tl.log(sum_z / sum_w)
                value += KL_pq
                slope += KL_pq + 1
            if FORWARD:
                value += tl.sum(D_qp, 0) / sum_w - tl.log(sum_w / sum_z)
                slope -= 1
        else:
            values, slopes = zeros, zeros
            for first in tl.range(0, V, BLOCK, num_stages=STAGES):
                columns = first + lanes
                z = logits(z_ptr, columns, V, stride, softcap_s, per_temperature)
                t = logits(w_ptr, columns, V, stride, softcap_t, per_temperature)
                w = target_a * t + target_b * z if MIX else t
                g, s, _, _, _ = terms(z, t, w, columns, V, least_z, least_t, m_p, norm_p, m_w, norm_q, a, b,
                                      mass_slope, clip, FORMULA, UNION, FORM)
                values += g
                slopes += s
            value, slope = tl.sum(values, 0), tl.sum(slopes, 0)
            if FORM == "tail":                          # the others are one more entry
                lp_tail = m_z_part - m_z + tl.log(tl.sum(Z_z_part, 0)) - log_z
                lq_tail = m_w_part - m_w + tl.log(tl.sum(Z_w_part, 0)) - log_w
                g, slope_tail = FORMULA(lp_tail, lq_tail, tl.exp(lp_tail), tl.exp(lq_tail), a, b)
                g, slope_tail = clipped(g, slope_tail, clip)
                value += g
                slope += slope_tail
        tl.store(value_ptr + row, value + broken)

    if dz_ptr is not None:
        dz_ptr += row * dz_stride
        if TEACHER:
            weight = tl.load(weight_ptr + row) + broken
        if label_weight_ptr is not None:
            label_weight = tl.load(label_weight_ptr + row)
        for first in tl.range(0, V, BLOCK, num_stages=STAGES):
            columns = first + lanes
            z = logits(z_ptr, columns, V, stride, softcap_s, per_temperature)
            dz = zeros
            if TEACHER:
                t = logits(w_ptr, columns, V, stride, softcap_t, per_temperature)
                w = target_a * t + target_b * z if MIX else t
                _, s, p, lp, keep = terms(z, t, w, columns, V, least_z, least_t, m_p, norm_p, m_w, norm_q,
                                          a, b, mass_slope, clip, FORMULA, UNION, FORM)
                if FORM == "tail":
                    s = tl.where(keep, s, slope_tail * tl.exp(tl.minimum(lp - lp_tail, 0.0)))
                dz = weight * (s - p * slope)
            if label_weight_ptr is not None:
                dz += label_weight * (tl.exp(z - m_z - log_z) - tl.where(columns == label, 1.0, 0.0))
            dz *= per_temperature
            if softcap_s is not None:
                bent = tl.where(columns < V, z / (softcap_s * per_temperature), 0.0)
                dz *= 1 - bent * bent
            tl.debug_barrier()                          # narrower gradients overwrite other lanes' logits
            tl.store(dz_ptr + columns, dz.to(dz_ptr.dtype.element_ty), mask=columns < stride)


def fill(z_CV, w_CV, weight, labels, label_weight, stats, spec, grad, dtype):
    """Do what rows_torch.fill does, in one kernel. Both logits are float32 buffers of the same row stride."""
    (C, columns), V = z_CV.shape, spec.vocab
    dz_CV = z_CV if dtype == z_CV.dtype else z_CV.view(dtype)[:, :columns]
    whose, _, form = spec.support.partition("_")
    least = [x_CV[:, :V].topk(min(spec.top_k, V), sorted=False).values.amin(-1) if form and whose != other
             else None for x_CV, other in ((z_CV, "teacher"), (w_CV, "student"))]
    name, knob = spec.divergence or "fkl", spec.knob
    a, b = knob if isinstance(knob, tuple) else (knob or 0.0, 0.0)
    forward, reverse = KL_FAMILY.get(name, (False, False))
    arrays = map(stats.get, ("value", "entropy_s", "entropy_t", "top1_agree", "logprob_s", "logprob_t"))
    with torch.cuda.device_of(z_CV):
        row_kernel[(C,)](
            z_CV, w_CV, dz_CV if grad else None, weight, labels, label_weight, *least, *arrays,
            z_CV.stride(0), dz_CV.stride(0), V, spec.softcap_s, spec.softcap_t, 1 / spec.temperature,
            *map(float, spec.target), float(a), float(b),
            losses.mass_slope(name, knob) if form == "sg" else 0.0, spec.entry_clip,
            FORMULA=FORMULAS[name], FORWARD=forward, REVERSE=reverse, MIX=tuple(spec.target) != (1.0, 0.0),
            UNION=whose == "union", FORM=form or "full",
            BLOCK=min(BLOCK, triton.next_power_of_2(V)), STAGES=STAGES, num_warps=WARPS)
    return dz_CV if grad else None


@triton.jit
def scale_kernel(x_ptr, factor_ptr, count, programs, BLOCK: tl.constexpr):
    """Multiply `count` numbers by a factor that is on the GPU."""
    factor = tl.load(factor_ptr).to(tl.float32)
    if factor != 1:                                     # usually it is 1: a launch then, but no pass
        for first in range(tl.program_id(0).to(tl.int64) * BLOCK, count, programs * BLOCK):
            at = first + tl.arange(0, BLOCK)
            x = tl.load(x_ptr + at, mask=at < count).to(tl.float32)
            tl.store(x_ptr + at, (x * factor).to(x_ptr.dtype.element_ty), mask=at < count)


def scale(gradient, factor):
    """Do what rows_torch.scale does to a contiguous tensor. The host does not wait for the factor."""
    programs = min(1024, triton.cdiv(gradient.numel(), 1024)) or 1
    with torch.cuda.device_of(gradient):
        scale_kernel[(programs,)](gradient, factor, gradient.numel(), programs, BLOCK=1024)

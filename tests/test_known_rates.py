"""The table of analytic rates: every row derived symbolically, then recovered by observables and
reader.
"""

from __future__ import annotations

import pytest
import sympy as sp

from ddc.slt.known_rates import (
    KnownRate,
    known_rates,
    leaking,
    local_slope,
    normal_inputs,
    output_moment,
)
from ddc.slt.known_rates import orthogonal_inputs as signs

CASES = known_rates()
t, x, s = sp.symbols("t x s", positive=True)
#: Moments of a standard normal variable, by power.
NORMAL = {n: sp.factorial2(n - 1) if n % 2 == 0 else 0 for n in range(2, 200)}


def normal_mean(polynomial: sp.Expr) -> sp.Expr:
    """Expectation of a polynomial in x for a standard normal x."""
    terms = sp.Poly(sp.expand(polynomial), x).terms()
    return sum(c * (1 if not power else NORMAL[power]) for (power,), c in terms)


def leading(expression: sp.Expr) -> tuple[sp.Expr, sp.Expr]:
    """(exponent, coefficient) of the leading power of t as t -> 0."""
    exponent = sp.limit(t * sp.diff(expression, t) / expression, t, 0)
    return exponent, sp.limit(expression / t**exponent, t, 0)


def chain_moment(step, count: int) -> sp.Expr:
    """Second moment of a scalar chain, its activations replaced by their leading Taylor terms."""
    h = x
    for _ in range(count):
        h = sp.expand(step(h))
    return normal_mean(h**2)


def dead_moments(powers: list[sp.Expr], layer: int) -> tuple[sp.Expr, sp.Expr]:
    """Smallest eigenvalues of the two moments of a deep linear chain, from its matrices."""
    maps = [sp.diag(1, 1, t**p) for p in powers]
    forward, backward = sp.eye(3), sp.eye(3)
    for matrix in maps[: layer - 1]:
        forward = matrix * forward
    for matrix in maps[layer:]:
        backward = matrix * backward
    return (forward * forward.T)[2, 2], (backward.T * backward)[2, 2]


def silu(h: sp.Expr) -> sp.Expr:
    """Leading term of h·sigmoid(h): its Taylor series begins h/2."""
    assert sp.series(s / (1 + sp.exp(-s)), s, 0, 2).removeO() == s / 2
    return h / 2


EQUAL, UNEQUAL = (
    [sp.Integer(1)] * 4,
    [sp.Rational(1, 2), sp.Integer(1), sp.Integer(2), sp.Rational(3, 2)],
)


def derived(case: KnownRate) -> tuple[sp.Expr, sp.Expr | None]:
    """Exponent and coefficient of a case, derived symbolically without the code under test."""
    number = next((int(word) for word in case.name.replace(",", "").split() if word.isdigit()), 0)
    match case.row:
        case "deep linear, backward moment":
            return leading(dead_moments(EQUAL, number)[1])
        case "deep linear, forward moment":
            return leading(dead_moments(EQUAL, number)[0])
        case "product of the two (A–G duality)":
            return leading(sp.prod(dead_moments(EQUAL, number)))
        case "weights t^p, backward moment":
            return leading(dead_moments(UNEQUAL, number)[1])
        case "log det⁺ of the forward moment":
            matrix = sp.diag(*[1] * (5 - number), *[t] * number) ** 2
            return leading((matrix * matrix.T).det())
        case "ReLU chain":  # half of the inputs pass, the rest are 0
            return leading(normal_mean((t**number * x) ** 2) / 2)
        case "smooth activation":
            function = {
                "tanh": sp.tanh(s),
                "GELU": s * (1 + sp.erf(s / sp.sqrt(2))) / 2,
                "SiLU": s / (1 + sp.exp(-s)),
            }[case.name.split(",")[0]]
            assert function.subs(s, 0) == 0
            slope = sp.diff(function, s).subs(s, 0)
            return leading(chain_moment(lambda h: slope * t * h, 3))
        case "SwiGLU block":
            exponent, _ = leading(chain_moment(lambda h: t * silu(t * h) * t * h, 1))
            return exponent, None  # E[x^4]/4 with the probe's own fourth moment: tested below
        case "SwiGLU chain":
            return leading(chain_moment(lambda h: t * silu(t * h) * t * h, number))
        case "every layer residual":
            return leading(chain_moment(lambda h: h + t * h, 4))
        case "residual block":
            skipped = int(case.name.split()[3])
            return leading(normal_mean((t * (1 + t**skipped) * t ** (4 - skipped) * x) ** 2))
        case "attention, value-output route":  # an average over tokens commutes with both maps
            return leading((t * t) ** (2 * number))[0], None
        case "scale-free norm":
            h, eps = t**2 * x, sp.Rational(1, 10**6) if "eps" in case.name else 0
            return leading(((t**3 * h / sp.sqrt(h**2 + eps)) ** 2).subs(x, 1))  # inputs are signs
        case "norm-free":
            return leading(normal_mean((t**5 * x) ** 2))
        case "quotient of the scalar chain":
            weights = sp.symbols(f"w:{number}")
            gradient = sp.Matrix([sp.diff(sp.prod(weights), w) for w in weights]).subs(
                dict.fromkeys(weights, t)
            )
            return leading((gradient.T * sp.ones(number, 1))[0] ** 2 / number)
        case "rotated dead direction under ReLU":
            u = sp.Matrix(
                [sp.Rational(3, 5), sp.Rational(4, 5) * (-1 if "mixed" in case.name else 1)]
            )
            v = sp.Matrix([-u[1], u[0]])
            halves = [sp.Matrix([sp.Max(0, sign * entry) for entry in u]) for sign in (1, -1)]
            # per unit of the live input, at t = 0
            amplitudes = [abs((v.T * half)[0]) for half in halves]
            if "mixed" in case.name:
                assert amplitudes == [sp.Rational(12, 25)] * 2
                return sp.Integer(0), None
            assert amplitudes == [0, 0]
            # relu is the identity where the live input outweighs t: amplitude t
            return (
                sp.Integer(2),
                None,
            )
        case "leak floor":
            return leading(sp.Rational(1, 10**6) + t**2)
    raise AssertionError(f"no derivation of {case.row}")


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.row}: {case.name}")
def test_the_row_is_derived_and_recovered(case: KnownRate) -> None:
    exponent, coefficient = derived(case)
    assert float(exponent) == pytest.approx(case.exponent)
    if coefficient is not None and case.coefficient is not None:
        assert float(coefficient) == pytest.approx(case.coefficient, rel=1e-12)
    rate = case.recover()
    if case.refusal:
        assert rate.verdict == case.refusal
    else:
        assert rate.read
        assert rate.fit is not None
        assert rate.fit.slope == pytest.approx(case.exponent, abs=0.02)
        assert rate.checkpoints == 24
    if case.coefficient is not None:
        assert case.recovered_coefficient() == pytest.approx(case.coefficient, rel=1e-3)


def test_every_row_of_the_table_has_a_case() -> None:
    assert len({case.row for case in CASES}) == 17


def test_the_swiglu_coefficient_is_a_quarter_of_the_fourth_moment() -> None:
    assert sp.limit(chain_moment(lambda h: t * silu(t * h) * t * h, 1) / t**6, t, 0) == sp.Rational(
        NORMAL[4], 4
    )
    case = next(case for case in CASES if case.row == "SwiGLU block")
    assert case.coefficient == pytest.approx(0.75, rel=0.01)  # 2,000 strata cut the tails
    assert float(normal_inputs().square().mean()) == pytest.approx(1, rel=1e-12)


def test_half_the_slope_where_the_leak_is_as_large_as_what_dies() -> None:
    floor, gain, power = sp.Rational(1, 100), 3, sp.Rational(5, 2)
    moment = floor + gain * t**power
    crossing = (floor / gain) ** (1 / power)
    assert sp.simplify((t * sp.diff(moment, t) / moment).subs(t, crossing)) == power / 2

    def measured(size: float) -> float:
        return output_moment(lambda w: leaking(0.01, 3.0, 2.5, w), signs(2), None, size)

    assert local_slope(measured, float(crossing)) == pytest.approx(1.25, abs=1e-6)

"""DDCAdam as docs/method.md states it, unit by unit, in loops: slow, obvious, and independent of
the batched code.

It shares with the package only the declarations of the gauges. Projection, retraction, dressing and
averaging are done one after the other, as written, in float64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ddc.gauges import Chain, Gauge, Rescale, Rotation, Shift


class Adam:
    """Textbook Adam on one tensor, its second moment averaged over given groups of row (or column)
    indices.
    """

    def __init__(self, betas: tuple[float, float], eps: float) -> None:
        self.betas, self.eps, self.t = betas, eps, 0
        self.m: Tensor | float = 0.0
        self.v: Tensor | float = 0.0

    def __call__(self, x: Tensor, groups: list[tuple[int, list[int]]] = ()) -> Tensor:
        b1, b2 = self.betas
        self.t += 1
        square = x.clone() ** 2
        for axis, indices in groups:
            square.movedim(axis, 0)[indices] = square.movedim(axis, 0)[indices].mean(0)
        self.m = b1 * self.m + (1 - b1) * x
        self.v = b2 * self.v + (1 - b2) * square
        return (self.m / (1 - b1**self.t)) / ((self.v / (1 - b2**self.t)).sqrt() + self.eps)


class ReferenceDDCAdam:
    def __init__(
        self,
        params: dict[str, Tensor],
        gauges: list[Gauge],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        radial_rate: float = 1.0,
        vertical: str = "freeze",
        step_scale: str = "init",
        retract: bool = True,
    ) -> None:
        self.params, self.lr, self.weight_decay = params, lr, weight_decay
        self.radial_rate, self.vertical, self.step_scale, self.retract = (
            radial_rate,
            vertical,
            step_scale,
            retract,
        )
        self.rescales = [g for g in gauges if isinstance(g, Rescale)]
        self.centred = {n for g in gauges if isinstance(g, Shift) for n in g.parameters}
        self.groups: dict[str, list[tuple[int, list[int]]]] = {}
        for gauge in gauges:
            if isinstance(gauge, Rotation):
                for name, axis, index in gauge.slots:
                    for group in index.reshape(-1, index.shape[2]).tolist():
                        self.groups.setdefault(name, []).append((axis, group))
        self.adam = {name: Adam(betas, eps) for name in params}
        self.radial = {
            (id(g), u): Adam(betas, eps) for g in self.rescales for u in range(g.units(params))
        }
        self.vertical_adam = {key: Adam(betas, eps) for key in self.radial}

    def step(self) -> None:
        grads = {n: p.grad.clone() for n, p in self.params.items()}
        before = {n: p.detach().clone() for n, p in self.params.items()}
        plus_of = {a.parameter: (g, a.axis) for g in self.rescales for a in g.plus}
        minus_of = {a.parameter: (g, a.axis) for g in self.rescales for a in g.minus}
        dressed = {n for n in plus_of if n in minus_of}

        # weights and gradients in the coordinates in which they are decomposed; the gauge's own
        # sides first
        work, work_grad, mean = {}, {}, {}
        old_norm: dict[tuple[int, int], Tensor] = {}
        order = self._order(plus_of, minus_of)
        for name in [n for g in order for n in (a.parameter for a in g.plus + g.minus)] + list(
            self.params
        ):
            if name in work:
                continue
            w, g = before[name].clone(), grads[name].clone()
            if name in self.centred:
                mean[name] = w.mean(0, keepdim=True)
                w, g = w - mean[name], g - g.mean(0, keepdim=True)
            if name in dressed:
                gauge, axis = minus_of[name]
                for u in range(w.shape[axis]):
                    factor = self._norm(gauge.plus, u, work) ** gauge.degree
                    w.movedim(axis, 0)[u] *= factor
                    g.movedim(axis, 0)[u] /= factor
            work[name], work_grad[name] = w, g
        for gauge in order:
            for u in range(gauge.units(self.params)):
                old_norm[id(gauge), u] = self._norm(gauge.plus, u, work)

        # tangential inputs and Adam directions of every parameter
        direction = {}
        for name, w in work.items():
            x = work_grad[name].clone()
            if name in plus_of or name in minus_of:
                gauge, axis = plus_of.get(name) or minus_of[name]
                side = self._side(gauge, name, dressed)
                for u in range(w.shape[axis]):
                    rho = self._norm(side, u, work)
                    ghat = self._inner(side, u, work_grad, work)
                    x.movedim(axis, 0)[u] = rho * (
                        work_grad[name].movedim(axis, 0)[u] - ghat / rho**2 * w.movedim(axis, 0)[u]
                    )
            u_all = self.adam[name](x, self.groups.get(name, []))
            if name in self.centred:
                u_all = u_all - u_all.mean(0, keepdim=True)
            direction[name] = u_all

        new = {n: w.clone() for n, w in work.items()}
        for gauge in order:
            k = gauge.degree
            minus = tuple(a for a in gauge.minus if a.parameter not in dressed)
            own_dressed = tuple(a for a in gauge.minus if a.parameter in dressed)
            for unit in range(gauge.units(self.params)):
                change_plus = change_minus = 0.0
                if minus:
                    ghat_plus = self._inner(gauge.plus, unit, work_grad, work)
                    ghat_plus = ghat_plus - k * self._inner(own_dressed, unit, grads, before)
                    ghat_minus = self._inner(minus, unit, work_grad, work)
                    size = math.sqrt(1 + k * k)
                    rate = self.lr * self.radial_rate
                    du = -rate * self.radial[id(gauge), unit]((k * ghat_plus + ghat_minus) / size)
                    dv = torch.zeros(())
                    if self.vertical == "adam":
                        dv = -rate * self.vertical_adam[id(gauge), unit](
                            (ghat_plus - k * ghat_minus) / size
                        )
                    if self.vertical == "balance":
                        coordinate = (
                            self._norm(gauge.plus, unit, work).log()
                            - k * self._norm(minus, unit, work).log()
                        )
                        dv = -rate * coordinate / size
                    change_plus, change_minus = (k * du + dv) / size, (du - k * dv) / size
                for side, change in ((gauge.plus, change_plus), (minus, change_minus)):
                    if side:
                        self._move(side, unit, work, direction, new, float(change))

        # undress with the new factors, un-centre, decay
        for name, p in self.params.items():
            w = new[name].clone()
            if name not in plus_of and name not in minus_of:
                decayed = work[name] * (1 - self.lr * self.weight_decay) - self.lr * direction[name]
                w = decayed + mean.get(name, 0.0)
            else:
                if name in dressed:
                    gauge, axis = minus_of[name]
                    for u in range(w.shape[axis]):
                        w.movedim(axis, 0)[u] /= self._norm(gauge.plus, u, new) ** gauge.degree
                w = w * (1 - self.lr * self.weight_decay) + mean.get(name, 0.0)
            p.data.copy_(w)

    def _move(self, side, unit, work, direction, new, change) -> None:
        rho = self._norm(side, unit, work)
        entries = sum(self._slice(work, a, unit).numel() for a in side)
        if entries == 1:
            for a in side:
                self._slice(new, a, unit).mul_(math.exp(change))
            return
        matrices = [work[a.parameter] for a in side if work[a.parameter].ndim == 2]
        fan_in = matrices[0].shape[1] if matrices else entries
        s = math.sqrt(fan_in) * rho / math.sqrt(entries) if self.step_scale == "init" else rho
        overlap = self._inner(side, unit, direction, work) / rho**2
        turned = [
            self._slice(work, a, unit)
            - self.lr * s * (self._slice(direction, a, unit) - overlap * self._slice(work, a, unit))
            for a in side
        ]
        length = torch.stack([t.square().sum() for t in turned]).sum().sqrt()
        factor = math.exp(change) * (rho / length if self.retract else 1.0)
        for a, t in zip(side, turned, strict=True):
            new[a.parameter].movedim(a.axis, 0)[unit] = factor * t

    def _order(self, plus_of, minus_of):
        order, todo = [], list(self.rescales)
        while todo:
            for gauge in todo:
                dressers = [minus_of[a.parameter][0] for a in gauge.plus if a.parameter in minus_of]
                if all(d in order for d in dressers):
                    order.append(gauge)
                    todo.remove(gauge)
                    break
        return order

    @staticmethod
    def _side(gauge, name, dressed):
        if name in {a.parameter for a in gauge.plus}:
            return gauge.plus
        return tuple(a for a in gauge.minus if a.parameter not in dressed)

    @staticmethod
    def _slice(tensors, axis, unit):
        return tensors[axis.parameter].movedim(axis.axis, 0)[unit]

    def _inner(self, side, unit, a, b):
        terms = [(self._slice(a, axis, unit) * self._slice(b, axis, unit)).sum() for axis in side]
        return torch.stack(terms).sum() if terms else torch.zeros((), dtype=torch.float64)

    def _norm(self, side, unit, tensors):
        return self._inner(side, unit, tensors, tensors).sqrt()


class ReferencePaperStep:
    """The step of the paper's companion, in the order in which its machine-checked model states it,
    block by block.

    Source: repository DeadDirections/DeadDirections, ``DdcAdamEquivariance.lean``. Per block: decay
    first, W := δ W, which all that follows reads; ĝ = <g, W>; Adam's input ρ (g - ĝ W / ρ²); u
    projected again; then W := e^(Δ log ρ) W - η ρ u. A block is a matrix (with its bias) on one
    side of a ReLU or gated rescale, a layer of a chain, or channel j of a norm scale: (γ_j, β_j)
    against column j of its readers. Ours, since the model leaves it open: a reader that is a block
    of another gauge is first multiplied by the sizes of its channels; degrees other than 1;
    ``balance``, as a motion along the gauge of all that the step makes of a block.

    Args:
        decays: λ by name.
    """

    def __init__(
        self,
        params: dict[str, Tensor],
        gauges: list[Gauge],
        lr: float,
        decays: dict[str, float],
        vertical: str,
    ) -> None:
        self.params, self.lr, self.decays, self.vertical = params, lr, decays, vertical
        self.channels = [g for g in gauges if isinstance(g, Rescale) and g.kind == "norm_scale"]
        self.pairs = [g for g in gauges if isinstance(g, Rescale) and g.kind != "norm_scale"]
        self.chains = [g for g in gauges if isinstance(g, Chain)]
        self.centred = {n for g in gauges if isinstance(g, Shift) for n in g.parameters}
        self.turned: dict[str, list[tuple[int, list[int]]]] = {}
        for gauge in gauges:
            for name, axis, index in gauge.slots if isinstance(gauge, Rotation) else ():
                turned = self.turned.setdefault(name, [])
                turned.extend((axis, each) for each in index.reshape(-1, index.shape[2]).tolist())
        self.adams: dict[object, Adam] = {}

    def adam(self, key: object, x: Tensor) -> Tensor:
        return self.adams.setdefault(key, Adam((0.9, 0.999), 1e-8))(x, self.turned.get(key, []))

    def scalar_adam(self, key: object, x: float) -> float:
        return float(self.adam(key, torch.tensor(x, dtype=torch.float64)))

    def step(self) -> None:
        self.w, self.g, means = {}, {}, {}
        for name, p in self.params.items():
            w, g = p.detach().clone(), p.grad.clone()
            if name in self.centred:
                means[name] = w.mean(0)
                w, g = w - means[name], g - g.mean(0)
            self.w[name], self.g[name] = (1 - self.lr * self.decays[name]) * w, g
        shrunk, raw = (
            {n: w.clone() for n, w in self.w.items()},
            {n: g.clone() for n, g in self.g.items()},
        )

        in_pairs = {name for gauge in self.pairs for name in gauge.parameters}
        sizes = {}
        for gauge in self.channels:
            for j in range(len(self.w[gauge.plus[0].parameter])):
                sizes[gauge, j] = torch.stack([self.w[name][j] for name, *_ in gauge.plus]).norm()
                for name, *_ in gauge.minus:
                    if name in in_pairs:
                        self.w[name][:, j] *= sizes[gauge, j]
                        self.g[name][:, j] /= sizes[gauge, j]

        # what each block consists of: a parameter and an index into it
        blocks: list[tuple[object, list[tuple[list, list]], list[float]]] = []
        for gauge in (*self.pairs, *self.chains):
            chain = isinstance(gauge, Chain)
            names = (
                [[n] for n in gauge.weights]
                if chain
                else [[n for n, *_ in s] for s in (gauge.plus, gauge.minus)]
            )
            blocks.append(
                (gauge, [[(name, ...) for name in side] for side in names], [0.0] * len(names))
            )
        for gauge in self.channels:
            for j in range(len(self.w[gauge.plus[0].parameter])):
                plus = [(name, j) for name, *_ in gauge.plus]
                minus = [
                    (name, (slice(None), j)) for name, *_ in gauge.minus if name not in in_pairs
                ]
                # is undressed by the new γ_j, so that a move of γ_j leaves it as it is
                felt = sum(
                    float((raw[n][:, j] * shrunk[n][:, j]).sum())
                    for n, *_ in gauge.minus
                    if n in in_pairs
                )
                blocks.append(((gauge, j), [plus, minus], [gauge.degree * felt, 0.0]))

        directions = {}
        for _, sides, _ in blocks:
            for side in sides:
                rho, ghat = (
                    self.inner(side, self.w, self.w).sqrt(),
                    self.inner(side, self.g, self.w),
                )
                for name, at in side:
                    x = directions.setdefault(name, torch.zeros_like(self.w[name]))
                    x[at] = rho * (self.g[name][at] - ghat / rho**2 * self.w[name][at])
        for name in self.params:
            u = self.adam(name, directions.get(name, self.g[name]))
            directions[name] = u - u.mean(0) if name in self.centred else u

        # AdamW where there is no block
        new = {name: w - self.lr * directions[name] for name, w in self.w.items()}
        for key, sides, felt in blocks:
            changes, relaxed = self.log_changes(key, sides, felt)
            for side, change, relax in zip(sides, changes, relaxed, strict=True):
                entries = sum(self.w[name][at].numel() for name, at in side)
                if not entries:
                    continue
                rho2, overlap = (
                    self.inner(side, self.w, self.w),
                    self.inner(side, directions, self.w),
                )
                for name, at in side:
                    w, u = (
                        self.w[name][at],
                        directions[name][at] - overlap / rho2 * self.w[name][at],
                    )
                    u = torch.zeros_like(u) if entries == 1 else u
                    new[name][at] = (
                        math.exp(change) * w - math.exp(relax) * self.lr * rho2.sqrt() * u
                    )

        for gauge in self.channels:
            for name, *_ in gauge.minus:
                for j in range(len(new[gauge.plus[0].parameter])) if name in in_pairs else ():
                    new[name][:, j] /= torch.stack([new[n][j] for n, *_ in gauge.plus]).norm()
        for name, p in self.params.items():
            p.data.copy_(new[name] + means.get(name, 0.0))

    def log_changes(
        self, key: object, sides: list, felt: list[float]
    ) -> tuple[list[float], list[float]]:
        """Of each side: Δ log ρ, and how much of it balances."""
        ghats = [
            float(self.inner(side, self.g, self.w)) - f for side, f in zip(sides, felt, strict=True)
        ]
        logs = [
            0.5 * math.log(float(self.inner(side, self.w, self.w))) if side else 0.0
            for side in sides
        ]
        if not all(sides):  # all readers are blocks elsewhere
            return [0.0, 0.0], [0.0, 0.0]
        if isinstance(key, Chain):
            return self.log_changes_of_chain(key, ghats, logs)
        k = key.degree if isinstance(key, Rescale) else 1
        norm = math.sqrt(1 + k * k)
        radial = -self.lr * self.scalar_adam((key, "U"), (k * ghats[0] + ghats[1]) / norm)
        vertical = 0.0
        if self.vertical == "adam":
            vertical = -self.lr * self.scalar_adam((key, "V"), (ghats[0] - k * ghats[1]) / norm)
        if self.vertical == "balance":
            vertical = -self.lr * (logs[0] - k * logs[1]) / norm
        along = [vertical / norm, -k * vertical / norm]
        changes = [k * radial / norm + along[0], radial / norm + along[1]]
        return changes, along if self.vertical == "balance" else [0.0, 0.0]

    def log_changes_of_chain(
        self, key: Chain, ghats: list[float], logs: list[float]
    ) -> tuple[list[float], list[float]]:
        count = len(ghats)
        shared = (
            -self.lr
            * self.scalar_adam((key, "U"), sum(ghats) / math.sqrt(count))
            / math.sqrt(count)
        )
        along = [0.0] * count
        if self.vertical == "adam":
            steps = [
                self.scalar_adam((key, i), ghat - sum(ghats) / count)
                for i, ghat in enumerate(ghats)
            ]
            along = [-self.lr * (step - sum(steps) / count) for step in steps]
        if self.vertical == "balance":
            along = [-self.lr * (log - sum(logs) / count) for log in logs]
        return [shared + each for each in along], (
            along if self.vertical == "balance" else [0.0] * count
        )

    def inner(self, side: list, a: dict[str, Tensor], b: dict[str, Tensor]) -> Tensor:
        return sum(
            ((a[name][at] * b[name][at]).sum() for name, at in side), torch.zeros(()).double()
        )

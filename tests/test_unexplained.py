"""What ``docs/complete.md`` says of directions that no gauge explains: with them, orbits are as
large as the kernel.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ddc import find_gauges
from ddc.gauges.base import named_parameters
from ddc.gauges.certificate import Jacobian, rank, tangents_of
from ddc.models import DeepMLP, DeepMLPConfig

Tangents = dict[str, Tensor]


def flat(model: nn.Module, moved: Tangents) -> Tensor:
    """One tangent in the order of all parameters."""
    parts = [
        moved.get(name, torch.zeros_like(p)).flatten()
        for name, p in named_parameters(model).items()
    ]
    return torch.cat(parts).detach()


def explained(jacobian: Jacobian, tangents: Tensor, more: list[Tangents]) -> tuple[int, float]:
    """The rank of the orbit with more tangents, and how much these change what the loss sees."""
    others = torch.stack([flat(jacobian.model, each) for each in more])
    others = others / others.norm(dim=1, keepdim=True)
    largest = torch.linalg.svdvals(jacobian.triangle)[0]
    changes = (jacobian.triangle @ others.T).norm(dim=0) / largest
    return rank(torch.cat([tangents, others])), float(changes.max())


class NormedAttention(nn.Module):
    """Two heads of attention whose queries and keys pass a LayerNorm, as those of timm's ViT do."""

    def __init__(self, width: int = 6, head: int = 4) -> None:
        super().__init__()
        self.queries, self.keys = (nn.Linear(width, 2 * head) for _ in range(2))
        self.q_norm, self.k_norm = (nn.LayerNorm(head) for _ in range(2))
        self.values = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        queries, keys = (
            norm(each(x).unflatten(-1, (2, -1)).transpose(1, 2))
            for norm, each in ((self.q_norm, self.queries), (self.k_norm, self.keys))
        )
        weights = (queries @ keys.mT / 2).softmax(-1)
        return (weights @ self.values(x)[:, None]).transpose(1, 2).flatten(2)


def test_a_layer_norm_of_queries_and_keys_leaves_a_shift_and_an_isospectral_flow() -> None:
    torch.manual_seed(0)
    model, inputs = NormedAttention(), (torch.randn(4, 5, 6),)
    gauges = find_gauges(model, inputs=inputs, kinds="complete", loss="other")
    jacobian = Jacobian.of(model, inputs, centred=False)
    certificate = jacobian.certificate(gauges)
    assert certificate.unexplained == 2
    p = {name: each.detach() for name, each in named_parameters(jacobian.model).items()}
    of_query, of_key = p["q_norm.weight"], p["k_norm.weight"]
    # normed keys sum to zero
    shift = {"q_norm.bias": 1 / of_key}
    # m moves to other roots of p + c, and a rotation of the hyperplane follows its eigenvectors
    m, size = of_query * of_key, len(of_key)
    flow = torch.stack([1 / (m[i] - m[torch.arange(size) != i]).prod() for i in range(size)])
    basis = torch.linalg.qr(torch.cat([torch.ones(size, 1).double(), torch.eye(size)[:, 1:]], 1)).Q
    basis = basis[:, 1:]
    values, vectors = torch.linalg.eigh(basis.T @ torch.diag(m) @ basis)
    change = vectors.T @ basis.T @ torch.diag(flow) @ basis @ vectors
    assert float(change.diagonal().abs().max()) < 1e-10 * float(change.abs().max())  # isospectral
    apart = values - values[:, None] + torch.eye(size - 1)
    turn = basis @ vectors @ (change / apart * (1 - torch.eye(size - 1))) @ vectors.T @ basis.T
    turned = {
        "q_norm.weight": flow / of_key,
        # queries and keys turn in the hyperplane, head by head
        **{
            f"{side}.{kind}": torch.cat([turn @ half for half in p[f"{side}.{kind}"].chunk(2)])
            for side in ("queries", "keys")
            for kind in ("weight", "bias")
        },
        # what the shift of queries meets turns with the keys
        "q_norm.bias": (turn @ (of_key * p["q_norm.bias"])) / of_key,
    }
    tangents = tangents_of(gauges, named_parameters(jacobian.model))
    reached, change_seen = explained(jacobian, tangents, [shift, turned])
    assert change_seen < 1e-9
    assert reached == certificate.kernel


@pytest.mark.parametrize("seed", [0, 1])
def test_the_halves_of_a_table_move_apart(seed: int) -> None:
    torch.manual_seed(0)
    model = DeepMLP(DeepMLPConfig(depth=2, width=8), 11, 11)
    inputs = (torch.cartesian_prod(torch.arange(11), torch.arange(11)),)
    gauges = find_gauges(model, inputs=inputs, kinds="complete", loss="cross_entropy")
    jacobian = Jacobian.of(model, inputs, seed=seed)
    certificate = jacobian.certificate(gauges)
    assert certificate.unexplained == 8
    moved = torch.zeros(8, 22, 8, dtype=torch.float64)
    for i in range(8):
        moved[i, :11, i], moved[i, 11:, i] = 1, -1
    tangents = tangents_of(gauges, named_parameters(jacobian.model))
    reached, change = explained(jacobian, tangents, [{"embedding.weight": each} for each in moved])
    assert change < 1e-9
    assert reached == certificate.orbit + 8


class Residual(nn.Module):
    """A stem and a residual block as those of a ResNet."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.stem, self.first, self.second = (
            nn.Conv2d(channels, width, 3, padding=1, bias=False) for channels in (1, width, width)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(3))
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norms[0](self.stem(x)).relu()
        inner = self.norms[1](self.first(x)).relu()
        return self.head((x + self.norms[2](self.second(inner))).relu().mean((2, 3)))


def test_in_evaluation_a_batch_norm_is_one_more_linear_map() -> None:
    torch.manual_seed(0)
    model, inputs = Residual(), (torch.randn(8, 1, 6, 6),)
    gauges = find_gauges(model, inputs=inputs, kinds="complete", loss="cross_entropy")
    missing = {
        training: Jacobian.of(model.train(training), inputs).certificate(gauges).unexplained
        for training in (True, False)
    }
    # in evaluation each filter's scale goes against its norm
    assert missing == {True: 0, False: 9}

"""Small random networks: clean ones whose gauges are known, and twists on them that may mislead
``find_gauges``.

A network is described by words (:class:`Network`), each one spelling of one part, from
``BLOCK_WORDS`` and ``NETWORK_WORDS``. Of *clean* words all gauges must be found. *Twists*, which
real models have, change what is true or how it is written. :func:`random_network` puts one to four
of them on a clean network; :func:`simplest` takes away what a failure does not need; the ``repr``
gives only words that are not the plain ones. :func:`build` makes the module
(``tests/random_parts.py``).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.random_parts import (
    CONTEXT,
    EXAMPLE,
    FEATURES,
    VOCABULARY_SIZE,
    NetworkModule,
    begin,
    operate,
    wrapped,
)


class Words(NamedTuple):
    """The spellings of a part; the first clean one is the plain one."""

    clean: tuple[str, ...]
    twists: tuple[str, ...]


def split(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split("|"))


def words(clean: str, twists: str) -> Words:
    return Words(split(clean), split(twists))


BLOCK_WORDS = {
    "norm": words(
        "nn.LayerNorm | nn.RMSNorm | F.layer_norm | weight times rms | no norm",
        "F.layer_norm, weight + 1 | F.layer_norm, scale is a buffer | F.layer_norm, shift is a"
        " buffer | F.layer_norm, no affine | F.layer_norm, weight is bias too | rms, 1 + weight |"
        " rms, exp weight | rms, float32, scale after the cast | rms, float32, scale before the"
        " cast | rms, scale twice | rms, scale and its square | rms, shift before scale | rms,"
        " shift is a buffer | rms, scale is a buffer | rms, two scales | rms, large eps, then again"
        " | rms of the scaled | layer norm by hand | layer norm by hand, addcmul | modulated by the"
        " input | nn.GroupNorm | nn.BatchNorm1d | tanh",
    ),
    "norm_use": words(
        "before",
        "after | returned | residual of the norm | gates the block | added to the block | kept as"
        " an attribute | its mean kept as a loss | read by a later block | dropout after | times a"
        " constant | times a parameter | times a buffer | plus a parameter | plus positions | to"
        " float32 | rolled | concatenated with the input | reshaped into more positions | read in"
        " training only | its scale is a loss",
    ),
    "linear": words(
        "nn.Linear | no bias | F.linear | Conv1D",
        "x @ weight | x @ weight.T | addmm | einsum | tensordot | 1x1 convolution | bias is a"
        " buffer | bias is scaled | bias is shared | bias before the weight | weight norm |"
        " spectral norm | pruned | weight times a constant | weight times a parameter | low rank |"
        " low rank added | standardised weight | cosine | a part of the weight | weight is a buffer"
        " | two maps added | in two halves | x and x reversed | float32 | rounded weight | weight"
        " clipped in place | batched weight",
    ),
    "mixer": words(
        "none | attention",
        "nn.MultiheadAttention | nn.MultiheadAttention, weights returned | nn.MultiheadAttention,"
        " add_bias_kv | nn.MultiheadAttention, add_zero_attn | nn.MultiheadAttention, padding mask"
        " | nn.TransformerEncoderLayer | nn.TransformerEncoderLayer, norm first | convolution |"
        " mean of positions | cumulative gate | nn.GRU",
    ),
    "projection": words(
        "separate | packed, chunked | grouped queries",
        "packed, heads first | packed, interleaved | multi-query | one map for all keys and values,"
        " shared by layers | key map shared by layers | value map shared by layers | keys are"
        " values | queries are keys | values from the input | keys from the residual stream |"
        " learned queries | keys and values of the first layer's input | a learned key is appended"
        " | value bias is a buffer | lengthened keys",
    ),
    "position": words(
        "none | causal | rope, half | rope, interleaved | rope, partial",
        "rope, complex | rope beyond the example | rope on queries only | rope on values | rope,"
        " scaled | rope, learned | rope, two-dimensional | alibi | learned bias | sliding window |"
        " sliding window beyond the example | relative to queries | relative to keys | mask from"
        " keys | mask from values | mask from the input | queries scaled by position | queries"
        " scaled beyond the example | learned position in keys | learned position in values",
    ),
    "qk": words(
        "none",
        "RMSNorm | LayerNorm | RMSNorm over heads | unit length | scale of heads | scale of entries"
        " | constant in place of 1/sqrt | relu | clamp | dropout",
    ),
    "product": words(
        "sdpa",
        "sdpa, enable_gqa | sdpa, dropout | softmax by hand | softmax by hand, float32 | softmax by"
        " hand, einsum | softmax, heads in the batch | sdpa, heads in the batch | sdpa, positions"
        " in the batch | scores soft-capped | scores returned | sigmoid | linear attention | sink |"
        " talking heads | difference of two",
    ),
    "after": words(
        "none",
        "gate of entries | gate of heads | gate of heads by view | scale of heads | scale of"
        " entries | norm of heads | relu | values added | values of the first layer | values of the"
        " first layer, learned share | values returned | keys returned | queries returned | cache |"
        " keys of the first layer | heads returned | dropout | two outputs | half of the heads |"
        " loss of the keys | values by position | heads permuted | heads averaged | values clamped",
    ),
    "mlp": words(
        "up and down | gated | none",
        "gated, packed | gated, packed, interleaved | gated, product of two maps | gate used"
        " elsewhere | value used elsewhere | gate in training only | up twice | three maps |"
        " residual within | down is up transposed | up and down are one | experts | experts, best"
        " two | experts by index | experts, stacked | two readers | halves to two maps | a half"
        " untouched | shared with another block | bottleneck | activation after | activation after,"
        " no residual",
    ),
    "activation": words(
        "relu | relu squared | leaky relu | gelu | silu",
        "relu6 | relu in place | clamp_min | maximum | where | abs | square | cube of relu | prelu"
        " | prelu of units | learned relu | rrelu | celu | sqrt of relu | threshold | shifted relu"
        " | relu of the negative | crelu | maxout | softmax | normalised | hardshrink | identity |"
        " sign | glu",
    ),
    "between": words(
        "none",
        "dropout | alpha dropout | clamp | parameter added | parameter times | constant added |"
        " constant times | nn.LayerNorm | nn.BatchNorm1d | rms without scale | noise in training |"
        " mean kept as a loss | kept as an attribute | returned | detached | read by a probe in"
        " training | shifted by a position | convolution over positions | sum of units |"
        " checkpointed",
    ),
    "residual": words(
        "added",
        "none | scaled by a parameter | scaled by entries | parallel | stochastic depth | divided"
        " by sqrt 2",
    ),
}

NETWORK_WORDS = {
    "inputs": words(
        "floats | tokens",
        "tokens and positions | tokens, two tables | tokens, max_norm | tokens, padding | tokens,"
        " scaled | tokens, normalised | one-hot | tokens and mask | tokens and floats | keyword"
        " arguments | a list | a mapping | vectors | images | embeddings out of a parameter",
    ),
    "norm": BLOCK_WORDS["norm"],
    "norm_use": words(
        "before",
        "returned | times a parameter | its mean kept as a loss | read in training only | dropout"
        " after",
    ),
    "head": words(
        "nn.Linear | no bias",
        "tied | x @ weight | soft-capped | scaled | temperature | log_softmax | classes first |"
        " masked | last position | mean after the head | mean before the head | one output | two"
        " towers | similarity | regression | several labels | a mapping | ModelOutput | hidden"
        " states too | logits twice | largest logit too | probabilities too | z-loss | two heads |"
        " two heads, joined | head used twice | auxiliary head | auxiliary head in training |"
        " auxiliary head kept as a loss | labels | features | nothing else | bias is a buffer |"
        " bias shared with another | weight norm | weight decay kept as a loss | mixture of"
        " softmaxes | linear without norm | predictions first | bias added after | in groups",
    ),
    "wrapper": words(
        "none",
        "called module | called module, with a head | called module, with a penalty |"
        " nn.DataParallel | nn.Sequential | called _orig_mod | two networks added | applied twice |"
        " in a list | hook that scales | hook that adds the norm | hook before | no parameters |"
        " all frozen | complex buffer | complex parameter | integer buffer | unused parameter |"
        " parameter in a ParameterList | condition on values | condition on length | calls itself |"
        " meta device | bfloat16 | state in a buffer | autocast | no_grad part",
    ),
    "start": Words(
        split("as made | everything random | vectors at zero | outputs at zero | norms at one"), ()
    ),
    "asked": words("neurons", "layers"),
    "mode": words(
        "training | evaluation",
        "mixed",
    ),
}

SURGERIES = split(
    "tied | frozen | is a buffer | parametrized by + 1/2 | parametrized by a mask | weight norm |"
    " returned by a hook | scaled by a hook | wrapped as module | registered twice | its square is"
    " a loss | its square is an output | copied to a buffer | one norm for two"
)


def _described(self: Any) -> str:
    """Only the words that are not the plain ones."""
    words = [
        f"{each.name}={getattr(self, each.name)!r}"
        for each in fields(self)
        if getattr(self, each.name) != each.default
    ]
    return f"{type(self).__name__}({', '.join(words)})"


@dataclass(frozen=True, repr=False)
class Block:
    """The words of a block: a mixer of positions and an MLP, each behind a norm."""

    norm: str = "nn.LayerNorm"
    norm_use: str = "before"
    linear: str = "nn.Linear"
    mixer: str = "none"
    projection: str = "separate"
    position: str = "none"
    qk: str = "none"
    product: str = "sdpa"
    after: str = "none"
    mlp: str = "up and down"
    activation: str = "relu"
    between: str = "none"
    residual: str = "added"

    __repr__ = _described


@dataclass(frozen=True, repr=False)
class Network:
    """The words of a network.

    Attributes:
        width, seed: of the residual stream, and of all random numbers that its making takes.
        surgeries: what is done to it when it is made: a word of ``SURGERIES``, and at which of its
            modules or parameters, counted round and round.
    """

    width: int = 8
    blocks: tuple[Block, ...] = (Block(),)
    inputs: str = "floats"
    norm: str = "nn.LayerNorm"
    norm_use: str = "before"
    head: str = "nn.Linear"
    wrapper: str = "none"
    start: str = "as made"
    asked: str = "neurons"
    mode: str = "training"
    surgeries: tuple[tuple[str, int], ...] = ()
    seed: int = 0

    __repr__ = _described

    @property
    def heads(self) -> int:
        return 2 if self.width > 4 else 1

    @property
    def words(self) -> list[str]:
        """All words that are not clean, as ``part: word``."""
        found = [f"surgery: {word}" for word, _ in self.surgeries]
        for spec, vocabulary in [
            (self, NETWORK_WORDS),
            *((block, BLOCK_WORDS) for block in self.blocks),
        ]:
            found += [
                f"{part}: {w}"
                for part, words in vocabulary.items()
                if (w := getattr(spec, part)) in words.twists
            ]
        return found


# ----------------------------------------------------------------------------------------------
# generator

ATTENTION_PARTS = ("projection", "position", "qk", "product", "after")
MLP_PARTS = ("activation", "between")
#: Ends of words that say something of several blocks, and are put into all.
OF_SEVERAL = (
    "shared by layers",
    "of the first layer",
    "first layer's input",
    "learned share",
    "later block",
    "another block",
)


@dataclass(frozen=True)
class Twist:
    """A word that is put into a network, at the block ``index`` if its part belongs to one; or a
    surgery.
    """

    part: str
    word: str
    index: int = 0

    def apply(self, network: Network) -> Network:
        if self.part == "surgery":
            return replace(network, surgeries=(*network.surgeries, (self.word, self.index)))
        if not self.part.startswith("block "):
            return replace(network, **{self.part: self.word})
        part = self.part.removeprefix("block ")
        if self.word.endswith(OF_SEVERAL):
            blocks = network.blocks * (2 if len(network.blocks) == 1 else 1)
            return replace(network, blocks=tuple(self._apply_to(block, part) for block in blocks))
        at = self.index % len(network.blocks)
        changed = self._apply_to(network.blocks[at], part)
        return replace(network, blocks=(*network.blocks[:at], changed, *network.blocks[at + 1 :]))

    def _apply_to(self, block: Block, part: str) -> Block:
        block = replace(block, **{part: self.word})
        if part in ATTENTION_PARTS and block.mixer == "none":
            block = replace(block, mixer="attention")
        if part in MLP_PARTS and block.mlp == "none":
            block = replace(block, mlp="up and down")
        if (
            part in ("norm", "norm_use", "linear", "residual")
            and block.mixer == block.mlp == "none"
        ):
            block = replace(block, mlp="up and down")
        return block


#: Every twist that there is.
TWISTS = tuple(
    [Twist(f"block {part}", word) for part, words in BLOCK_WORDS.items() for word in words.twists]
    + [Twist(part, word) for part, words in NETWORK_WORDS.items() for word in words.twists]
    + [Twist("surgery", word) for word in SURGERIES]
)


def clean_network(seed: int) -> Network:
    """A random network of clean words alone; of what a block has not there are no words."""
    choice = random.Random(seed).choice

    def block() -> Block:
        mixer, mlp = choice(BLOCK_WORDS["mixer"].clean), choice(BLOCK_WORDS["mlp"].clean)
        without = (
            ATTENTION_PARTS * (mixer == "none") + MLP_PARTS * (mlp == "none") + ("mixer", "mlp")
        )
        others = {
            part: choice(words.clean) for part, words in BLOCK_WORDS.items() if part not in without
        }
        return Block(mixer=mixer, mlp=mlp, **others)

    blocks = tuple(block() for _ in range(choice((1, 1, 2, 3))))
    others = {part: choice(words.clean) for part, words in NETWORK_WORDS.items()}
    return Network(width=choice((4, 8, 12, 16)), blocks=blocks, **others, seed=seed)


def random_network(seed: int) -> Network:
    """A random clean network with one to four twists; all twists are as likely."""
    network, generator = clean_network(seed), random.Random(f"twists {seed}")
    for twist in generator.choices(TWISTS, k=generator.choice((1, 1, 2, 2, 3, 4))):
        network = replace(twist, index=generator.randrange(12)).apply(network)
    return network


#: Strategies. Hypothesis would draw the first words far oftener than the last, and repeat itself:
#: so it draws seeds, and what fails is made simple by :func:`simplest`.
SEEDS = st.integers(0, 2**32 - 1)
networks, clean_networks = SEEDS.map(random_network), SEEDS.map(clean_network)


def simplest(network: Network, fails: Callable[[Network], bool]) -> Network:
    """A network that still fails, and does not if one more of its words is made plain or a block is
    left out.
    """
    while (simpler := next(filter(fails, simpler_than(network)), None)) is not None:
        network = simpler
    return network


def simpler_than(network: Network) -> Iterator[Network]:
    """Networks that differ from one in a single word, block or surgery less."""
    surgeries, blocks = network.surgeries, network.blocks
    yield from (
        replace(network, surgeries=surgeries[:i] + surgeries[i + 1 :])
        for i in range(len(surgeries))
    )
    if len(blocks) > 1:
        yield from (
            replace(network, blocks=blocks[:i] + blocks[i + 1 :]) for i in range(len(blocks))
        )
    plain = {
        each.name: each.default
        for each in fields(network)
        if each.name not in ("blocks", "surgeries")
    }
    yield from (
        replace(network, **{part: word})
        for part, word in plain.items()
        if getattr(network, part) != word
    )
    for i, block in enumerate(blocks):
        for each in fields(block):
            if getattr(block, each.name) != each.default:
                simpler = replace(block, **{each.name: each.default})
                yield replace(network, blocks=(*blocks[:i], simpler, *blocks[i + 1 :]))


def expected(network: Network) -> dict[str, int]:
    """How many gauges of each kind a clean network has."""
    assert not network.words, f"not clean: {network.words}"
    count = dict.fromkeys(
        (
            "logit_shift",
            "relu_rescale",
            "gated_rescale",
            "norm_scale",
            "value_rotation",
            "qk_rotation",
        ),
        0,
    )
    count["logit_shift"] += 1
    count["norm_scale"] += network.norm != "no norm"
    for block in network.blocks:
        attends = block.mixer == "attention"
        homogeneous = block.activation in ("relu", "relu squared", "leaky relu")
        count["norm_scale"] += (block.norm != "no norm") * (attends + (block.mlp != "none"))
        count["relu_rescale"] += block.mlp == "up and down" and homogeneous
        count["gated_rescale"] += block.mlp == "gated"
        count["value_rotation"] += attends
        partial = block.position == "rope, partial" and network.width // network.heads > 2
        count["qk_rotation"] += attends * (1 + partial)
    return {kind: number for kind, number in count.items() if number}


# ----------------------------------------------------------------------------------------------
# making


#: Words with which a network may be refused as a whole.
MAY_BE_REFUSED = split(
    "wrapper: condition on values | wrapper: meta device | wrapper: no parameters | wrapper: in a"
    " list | mlp: experts by index"
)
#: Heads whose first output is not logits under softmax cross-entropy, and what ``find_gauges`` is
#: told of the loss.
NOT_SOFTMAX = {
    "one output": None,
    "two towers": None,
    "similarity": None,
    "several labels": None,
    "labels": None,
    "regression": "other",
    "features": "other",
    "nothing else": "other",
}


def make_inputs(how: str, generator: torch.Generator, length: int, dtype: torch.dtype) -> Any:
    """Random inputs for a network, a tuple or a mapping of keywords; a batch of three."""

    def floats() -> Tensor:
        return torch.randn(3, length, FEATURES, generator=generator, dtype=torch.float64).to(dtype)

    tokens = torch.randint(VOCABULARY_SIZE, (3, length), generator=generator)
    match how:
        case "floats":
            return (floats(),)
        case "vectors":
            return (floats()[:, 0],)
        case "images":
            return (
                torch.randn(3, 2, 4, length // 4 * 2, generator=generator, dtype=torch.float64).to(
                    dtype
                ),
            )
        case "a list":
            return ([floats(), floats()],)
        case "a mapping":
            return ({"tokens": tokens},)
        case "tokens and mask":
            return tokens, torch.arange(length).expand(3, length) < (
                length if length == EXAMPLE else length - 1
            )
        case "tokens and floats":
            return tokens, floats()
        case "keyword arguments":
            return {"other": floats(), "x": tokens}
    return (tokens,)


@dataclass(frozen=True)
class Built:
    """A network and what belongs to it.

    Attributes:
        model: as a user would give it to ``find_gauges``.
        inputs: an example for it, a tuple or a mapping of keywords.
        fresh: makes other inputs in float64, from a seed.
        softmax: whether its first output is logits under softmax cross-entropy.
        per_layer: what ``find_gauges`` is asked for.
        loss: what ``find_gauges`` is told of the loss where the model does not say: "other", or
            None.
        tolerance: the largest relative change of outputs that is rounding.
    """

    model: nn.Module
    inputs: Any
    fresh: Callable[[int], Any]
    softmax: bool
    per_layer: bool
    loss: str | None
    tolerance: float


def build(network: Network) -> Built:
    """Make a network; the same words and seed make the same."""
    if network.inputs == "vectors":  # there are no positions to mix
        network = replace(
            network, blocks=tuple(replace(block, mixer="none") for block in network.blocks)
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(network.seed)
        model: nn.Module = NetworkModule(network)
        for word, index in network.surgeries:
            operate(model, word, index)
        model = wrapped(model, network)
        begin(model, network.start)
    model.train(network.mode != "evaluation")
    if network.mode == "mixed":
        for i, module in enumerate(model.modules()):
            module.training = i % 3 != 1
    generator = torch.Generator().manual_seed(network.seed)
    inputs = make_inputs(network.inputs, generator, EXAMPLE, torch.float32)
    if network.wrapper == "bfloat16":
        model, inputs = model.to(torch.bfloat16), cast(inputs, torch.bfloat16)
    elif network.wrapper == "meta device":
        model, inputs = model.to("meta"), cast(inputs, "meta")

    def fresh(seed: int) -> Any:
        length = (EXAMPLE, CONTEXT - 3, CONTEXT)[seed % 3]
        return make_inputs(
            network.inputs, torch.Generator().manual_seed(1000 + seed), length, torch.float64
        )

    low = any("float32" in word for word in network.words)
    softmax = network.head not in NOT_SOFTMAX and network.wrapper != "called _orig_mod"
    return Built(
        model,
        inputs,
        fresh,
        softmax,
        network.asked == "layers",
        NOT_SOFTMAX.get(network.head),
        1e-3 if low else 1e-8,
    )


def cast(inputs: Any, to: Any) -> Any:
    """Inputs with their floating-point tensors in another type, or all on another device."""

    def each(x: Any) -> Any:
        return x.to(to) if isinstance(x, Tensor) and (to == "meta" or x.is_floating_point()) else x

    return torch.utils._pytree.tree_map(each, inputs)

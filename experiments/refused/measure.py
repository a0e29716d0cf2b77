"""Configurations that are refused, with what is said of them (``docs/refused.md``)."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence

from ddc.training.compose import compose_config
from ddc.training.records import write_atomically
from ddc.training.setup import prepare
from experiments.protocols import ROOT

GPT, VIT, MLP = "model=gpt", "model=vit data=mnist_5k", "model=deep_mlp data=modular"
LLAMA = "model=causal_lm"
#: Overrides by what is wrong with them. The defaults are a GPT on Shakespeare, DDCAdam, and all
#: gauges that there are.
REFUSED = {
    "Keys that do not exist, and values of another type": (
        "training.epochs=3",
        "+training.epochs=3",
        "optimizer=adamw optimizer.radial_rate=0.1",
        "optimizer=sgd",
        "optimizer.name=adamw",
        "slt=false",
        "training.steps=many",
        "training.steps=1.5",
        "model.heads=null",
        "optimizer.betas=[0.9]",
    ),
    "Values out of range": (
        "training.steps=0",
        "optimizer.lr=nan",
        "optimizer.lr=inf",
        "training.warmup=0.9 training.decay=0.2",
        "training.threads=100000",
        "training.accumulation=3",
        "training.accuracy_levels=[95]",
        "seed=-1",
        "name=a/b",
        "slt.readings=5",
        "model.norm=batch",
        "gauges.granularity=layer",
        "optimizer.canonicalise=often",
        "optimizer.decay_on=vectors",
        "start.spread=9",
    ),
    "Sizes that do not fit together": (
        "model.heads=3",
        "model.kv_heads=3",
        "model.width=12",
        "model.width=24 model.positions=partial_rope",
        "model.heads=128",
        f"{MLP} model.depth=3 model.residual=true",
        f"{VIT} model.patch=5",
        f"{MLP} training.batch_size=5000",
        "data.train_tokens=100",
        f"{MLP} data.prime=15",
        f"{LLAMA} model.options.hidden_size=130",
        f"{LLAMA} model.architecture=gpt2",
    ),
    "Gauges that the model does not have": (
        f"{MLP} gauges=value_rotation",
        f"{MLP} gauges=[logit_shift,qk_rotation]",
        f"{MLP} gauges=norm_scale",
        "gauges=chained_rescale model.bias=true",
        f"{VIT} gauges=chained_rescale",
        f"{MLP} gauges=chained_rescale model.depth=4 model.residual=true",
        "gauges=relu_rescale",
        "gauges=gated_rescale model.mlp=relu",
        f"{VIT} gauges=relu_rescale model.mlp=gelu",
        "gauges=qk_rotation model.qk_norm=true",
        "gauges=logit_shift model.tied_head=true",
        "gauges=stream_scale",
        f"{MLP} gauges=[relu_rescale,chained_rescale]",
    ),
    "Parts that are not for each other": (
        "model=vit",
        "model=deep_mlp data=shakespeare",
        "training.batch_size=null",
        f"{VIT} optimizer=ddcmuon optimizer.per_head=true",
        "optimizer=ddcmuon gauges.granularity=block model.bias=true",
        "optimizer=ddcadam_paper optimizer.retract=true",
        "optimizer.canonicalise=start gauges=none",
        "training.weights=float8 launcher=torchrun launcher.parallel=fsdp",
        f"{VIT} optimizer=adamw optimizer.base_width=64",
        "launcher.parallel=fsdp",
        "launcher=torchrun launcher.parallel=tcp",
    ),
    "Data": (
        "data=file",
        "data=file data.path=/no/such/file",
        "data.name=webtext",
        "data.tokenizer=/no/such/tokenizer",
        f"{VIT} data.train_images=100000",
    ),
}  # fmt: skip
TEXT = """# Configurations that are refused

Every key of a configuration has a type, and is checked before data are read; what depends on the
data is checked before anything is trained or written. `train.py` ends with `error: ` and one line
that names the key. Some of what it says, by overrides of the defaults; a test composes random
configurations and finds that each one trains or is refused like these. Made by `make refused`
(`experiments/refused/measure.py`).

Beside these: `training.device=cuda` and a `training.precision` other than float32 are refused on a
machine without a GPU; data sets of the Hugging Face hub are, where it cannot be reached; a run that
memory does not hold ends with the keys that would make it smaller; and a checkpoint of another
architecture is not loaded, neither to go on with a run (`training.resume=never` starts it over) nor
by the scripts that read a run or a pruned model: the message has the first parameter that differs.
"""


def refusal(overrides: str) -> str:
    """What is said of a configuration.

    Raises:
        RuntimeError: nothing, it is a valid one.
    """
    try:
        prepare(compose_config(shlex.split(overrides)))
    except ValueError as error:
        return str(error)
    raise RuntimeError(f"{overrides} is not refused")


def page() -> str:
    """The page of the documentation."""
    parts = [TEXT]
    for title, cases in REFUSED.items():
        rows = [f"| `{overrides}` | {refusal(overrides)} |" for overrides in cases]
        parts.append(
            "\n".join([f"## {title}", "", "| overrides | message |", "| --- | --- |", *rows, ""])
        )
    return "\n".join(parts)


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the page."""
    argparse.ArgumentParser(description=__doc__).parse_args(arguments)
    path = ROOT / "docs/refused.md"
    write_atomically(path, page().encode())
    print(path)


if __name__ == "__main__":
    main()

"""The architectures of transformers and timm, each in a small configuration, with examples of its
inputs.

Those of transformers are the classes of its auto-model mappings, built from their default configs
narrowed to two layers (:func:`ddc.gauges.twin.narrow_config`); those of timm are one or more small
members of each of its modules. The named models of the tests, which were picked by hand, come
first. How small is a :class:`Scale`.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ddc.compatibility import provide_torchvision_operators
from ddc.gauges import certificate
from ddc.gauges.base import first_line
from ddc.gauges.twin import TWIN, Narrow, narrow_config
from tests.zoo import ZOO

provide_torchvision_operators()

import timm  # noqa: E402
import transformers  # noqa: E402
from timm.models._registry import _model_to_module  # noqa: E402
from transformers.models.auto import modeling_auto  # noqa: E402
from transformers.models.auto.configuration_auto import CONFIG_MAPPING  # noqa: E402

from experiments.zoo.arguments import MEANINGS, meaning, narrow_arguments  # noqa: E402

transformers.logging.set_verbosity_error()


@dataclass(frozen=True)
class Scale:
    """How small a model is made, and its inputs.

    Attributes:
        sizes: of a config of transformers.
        layers, vocabulary: what is kept of those.
        labels: classes.
        largest: a model of more parameters, though narrowed, is left out.
        batch: how many texts or images an example has.
        arguments: width to which the arguments of timm's models are narrowed; None takes its small
            members as they are, with what of :data:`SMALLER` they take.
    """

    sizes: Narrow
    layers: int
    vocabulary: int
    labels: int
    largest: int
    batch: int
    arguments: int | None = None


#: As gauges are looked for and tried.
USUAL = Scale(TWIN, layers=2, vocabulary=160, labels=5, largest=30_000_000, batch=2)
_NARROW = Scale(
    Narrow(8, 2, 4, 2, widest=4, positions=16, patch=4, channels=1, bands=8),
    layers=2,
    vocabulary=32,
    labels=11,
    largest=certificate.LARGEST,
    batch=8,
    arguments=8,
)
_BY_RATIO = replace(_NARROW, sizes=replace(_NARROW.sizes, widest=None))
_OTHER_IMAGES = replace(_BY_RATIO, sizes=replace(_BY_RATIO.sizes, patch=None, channels=None))
_LONG_HEADS = replace(_NARROW, sizes=replace(_NARROW.sizes, head_width=8))
#: The least eps of a norm there: a smaller one breaks what holds at 0 by less than float64 sees.
EPS = 1e-5
#: As small as a certificate needs, by library, with more tokens than the width and more
#: log-probabilities in an example than are drawn combinations of. The first is taken that builds
#: and computes: with two layers and maps of least width, or of their usual ratio to the stream, or
#: with one layer; then what is less narrow.
NARROWEST: dict[str, tuple[Scale, ...]] = {
    "transformers": (
        _NARROW,
        _BY_RATIO,
        replace(_NARROW, layers=1),
        replace(_BY_RATIO, layers=1),
        replace(_BY_RATIO, sizes=replace(_BY_RATIO.sizes, positions=None)),
        _OTHER_IMAGES,
        replace(_OTHER_IMAGES, layers=1),
        _LONG_HEADS,
        replace(_LONG_HEADS, layers=1),
        replace(_LONG_HEADS, sizes=replace(_LONG_HEADS.sizes, width=16, head_width=16), layers=1),
        replace(_BY_RATIO, sizes=replace(_BY_RATIO.sizes, width=16, heads=4, multiple=4)),
        replace(_BY_RATIO, sizes=Narrow(16, 2, 8, 8, patch=4)),
    ),
    "timm": tuple(replace(_NARROW, arguments=width) for width in (8, 4, 2)),
}
Inputs = Mapping[str, Any] | tuple[Tensor, ...]
#: Tasks of transformers' auto-models, in the order of the table.
TASKS = {
    "causal language": "CAUSAL_LM",
    "masked language": "MASKED_LM",
    "sequence to sequence": "SEQ_TO_SEQ_CAUSAL_LM",
    "sequence classification": "SEQUENCE_CLASSIFICATION",
    "image classification": "IMAGE_CLASSIFICATION",
    "image segmentation": "SEMANTIC_SEGMENTATION",
    "video classification": "VIDEO_CLASSIFICATION",
    "image and text": "IMAGE_TEXT_TO_TEXT",
    "two towers": "ZERO_SHOT_IMAGE_CLASSIFICATION",
    "text encoder": "TEXT_ENCODING",
    "audio classification": "AUDIO_CLASSIFICATION",
    "speech recognition": "CTC",
    "speech to text": "SPEECH_SEQ_2_SEQ",
}
#: What a config has whose model is made of stages, each of fewer places.
STAGES = ("depths", "num_blocks", "num_encoder_blocks", "layer_depths", "stage_repeats")
#: What some default configs leave open.
OPTIONS: dict[str, dict[str, Any]] = {
    "ReformerModelWithLMHead": {"is_decoder": True, "axial_pos_embds": False},
    "reformer": {"axial_pos_embds": False},
    "nemotron": {"num_key_value_heads": 8},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "efficientnet": {"width_coefficient": 0.5, "depth_coefficient": 0.3},
    "lfm2_moe": {
        "num_hidden_layers": 2,
        "layer_types": ["conv", "full_attention"],
        "num_dense_layers": 1,
    },
    "xmod": {"default_language": "en_XX"},
    "esm": {"vocab_size": 33},
    "wav2vec2-bert": {"vocab_size": 33},
    "wav2vec2-conformer": {"vocab_size": 33},
}
#: Members of timm's modules that differ in norms, gates, positions, attention.
OF_TIMM = """
    vit_tiny_patch16_224 vit_base_patch16_clip_quickgelu_224 vit_base_patch16_rope_224
    vit_wee_patch16_reg1_gap_256 vit_medium_patch16_gap_240 vit_little_patch16_reg4_gap_256
    vit_so150m_patch16_reg4_map_256 vit_base_patch16_xp_224 vit_small_patch16_36x1_224
    vit_small_patch16_18x2_224 vit_small_patch16_rope_mixed_224 vit_small_patch16_dinov3
    deit_tiny_distilled_patch16_224 deit3_small_patch16_224 beit_base_patch16_224
    beitv2_base_patch16_224
    eva02_tiny_patch14_224 eva02_base_patch14_224 eva_giant_patch14_224 aimv2_large_patch14_224
    convnext_atto
    convnext_atto_ols convnextv2_atto resnet18 resnet50 resnext50_32x4d seresnet50 wide_resnet50_2
    mixer_s16_224
    gmlp_ti16_224 resmlp_12_224 gmixer_12_224 vgg11 vgg11_bn efficientnet_b0 mobilenetv2_100
    mobilenetv3_small_100 mnasnet_100 tf_efficientnetv2_s mobilenetv4_conv_small
    mobilenetv4_hybrid_medium
    poolformer_s12 poolformerv2_s12 caformer_s18 convformer_s18 maxvit_nano_rw_256
    coatnet_nano_rw_224
    swin_tiny_patch4_window7_224 swinv2_tiny_window8_256 swinv2_cr_tiny_224 xcit_nano_12_p16_224
    volo_d1_224
    vit_relpos_small_patch16_224 vit_relpos_medium_patch16_rpn_224 vit_srelpos_small_patch16_224
    samvit_base_patch16 mobilevit_xxs mobilevitv2_050 halonet26t lambda_resnet26t botnet26t_256
    repvgg_a0
    gcresnet33ts regnetx_002 regnety_002 nfnet_l0 dm_nfnet_f0 naflexvit_base_patch16_gap
    vit_pwee_patch16_reg1_gap_256
    levit_128s hrnet_w18_small densenet121 dla46x_c sam2_hiera_tiny legacy_seresnet18
    twins_svt_small resnest14d
    tresnet_m test_resnet test_nfnet test_convnext test_maxvit test_vit test_vit_relpos test_byobnet
    test_efficientnet
"""


@dataclass(frozen=True)
class Made:
    """A small model, an example of its inputs for the tracing, and other, longer inputs for the
    check.

    Attributes:
        draw: draws inputs as large as the example anew, with ordinary tokens alone.
    """

    model: nn.Module
    example: Inputs
    others: Inputs
    draw: Callable[[torch.Generator], Inputs] | None = None


@dataclass(frozen=True)
class Architecture:
    """One model of a library.

    Attributes:
        library: transformers or timm; named for the models of the tests.
        family: the task of transformers, or the module of timm.
        name: of the class, or of timm's model, or in the tests.
        make: builds it, of a scale if one is given (those of the tests know none). Raises whatever
            the library does where it cannot.
    """

    library: str
    family: str
    name: str
    make: Callable[..., Made]

    @property
    def names(self) -> dict[str, str]:
        """What records call it."""
        return {"library": self.library, "family": self.family, "model": self.name}


class TooLargeError(ValueError):
    """A model is too large, though small of its kind."""

    def __init__(self, size: int, where: str) -> None:
        super().__init__(f"it has {size:,} parameters even where {where}")
        self.size = size


def narrowest(architecture: Architecture) -> Made:
    """The model in the first of its :data:`NARROWEST` in which it is small enough and computes.

    Raises:
        ValueError: there is none; the message is a reason in words.
    """
    reasons: list[Exception] = []
    for scale in NARROWEST[architecture.library]:
        torch.manual_seed(0)
        try:
            made = architecture.make(scale)
        except Exception as error:  # whatever a library raises
            reasons.append(error)
            continue
        for module in made.model.modules():
            for name in ("eps", "variance_epsilon"):
                if type(value := getattr(module, name, None)) is float:
                    setattr(module, name, max(value, EPS))
        return replace(made, model=made.model.eval())
    sizes = [each.size for each in reasons if isinstance(each, TooLargeError)]
    least = f"{min(sizes):,} parameters where it is narrowest" if sizes else first_line(reasons[0])
    raise ValueError(f"no narrow form: {least}")


def architectures() -> list[Architecture]:
    """All of them, each class once."""
    return [*named(), *of_transformers(), *of_timm()]


def named() -> Iterator[Architecture]:
    """The models of the tests."""
    for name in ZOO:
        yield Architecture("named", "named", name, partial(make_named, name))


def make_named(name: str, scale: Scale = USUAL) -> Made:
    """A model of the tests, which has one size."""
    if scale != USUAL:
        raise ValueError("it is made by hand, of one size")
    model, inputs = ZOO[name]()
    return Made(model, inputs, inputs)


# ----------------------------------------------------------------------------------------------
# transformers


def of_transformers() -> Iterator[Architecture]:
    """The classes of the auto-model mappings, by task."""
    seen: set[str] = set()
    for task, mapping in TASKS.items():
        for kind, classes in getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES").items():
            for name in (classes,) if isinstance(classes, str) else classes:
                if name not in seen:
                    seen.add(name)
                    yield Architecture(
                        "transformers", task, name, partial(make_of_transformers, kind, name)
                    )


def make_of_transformers(kind: str, name: str, scale: Scale = USUAL) -> Made:
    """The class ``name`` built from the default config of its ``kind``, narrowed, or as it is where
    that is small.

    Raises:
        ValueError: what it takes is not known here, or it is large however narrow.
    """
    config = CONFIG_MAPPING[kind](**OPTIONS.get(name, OPTIONS.get(kind, {})))
    made = getattr(transformers, name)
    try:
        return _made(made, small(config, scale), scale)
    except Exception as error:
        for other in (
            lambda: small(config.get_text_config(decoder=True), scale),
            lambda: small(config, scale, narrow=False),
        ):
            with contextlib.suppress(Exception):
                return _made(made, other(), scale)
        raise error


def _made(made: Any, config: Any, scale: Scale) -> Made:
    """The model of a config with inputs on which it computes."""
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in made(copy.deepcopy(config)).parameters())
    if size > scale.largest:
        raise TooLargeError(size, "its config is narrowed")
    model = made(config).eval()
    # where positions are cut, examples are
    lengths = (7, 19) if scale.sizes.positions is None else (6, 10)
    example, others = (inputs_of(model, length, i, scale) for i, length in enumerate(lengths))
    with torch.no_grad():
        model(**example)
        model(**others)

    def draw(generator: torch.Generator) -> Inputs:
        seed = int(torch.randint(2**31, (), generator=generator))
        return inputs_of(model, lengths[0], seed, scale)

    return Made(model, example, others, draw)


def small(config: Any, scale: Scale = USUAL, narrow: bool = True) -> Any:
    """A config narrowed, without dropout, with small images."""
    config = (
        narrow_config(config, scale.layers, scale.vocabulary, scale.sizes)
        if narrow
        else copy.deepcopy(config)
    )
    config.num_labels = scale.labels
    if scale != USUAL:  # the kernel that takes all experts at once asks for more width
        config._experts_implementation = "batched_mm"
    for each in parts(config):
        for key, value in list(vars(each).items()):
            if type(value) is float and (
                "drop" in key or re.fullmatch(r"mask_(time|feature)_prob", key)
            ):
                setattr(each, key, 0.0)
            elif key == "use_cache":
                each.use_cache = False
            elif key == "pad_token_id" and value is None:
                each.pad_token_id = 0
            elif key == "head_dim" and value is None:
                each.head_dim = each.hidden_size // each.num_attention_heads
            elif key == "image_size":
                side = image_size(each, scale)
                each.image_size = (
                    type(value)((side, side)) if isinstance(value, list | tuple) else side
                )
            elif key == "max_source_positions" and type(value) is int:
                each.max_source_positions = 32
    return config


def image_size(config: Any, scale: Scale = USUAL) -> int:
    """Four patches or more a side."""
    patch = getattr(config, "patch_size", None)
    if scale.sizes.patch is not None and any(hasattr(config, name) for name in STAGES):
        return 64  # so that the last stage sees several places
    least = min(8, scale.sizes.patch or 8)
    return 4 * patch if isinstance(patch, int) and patch >= least else 64


def parts(config: Any) -> Iterator[Any]:
    """A config and those that it holds."""
    yield config
    for value in list(vars(config).values()):
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            yield from parts(value)


def inputs_of(model: Any, length: int, seed: int, scale: Scale = USUAL) -> dict[str, Any]:
    """Inputs at random, by the name of what the class takes first.

    Raises:
        ValueError: what it takes is not known here.
    """
    generator = torch.Generator().manual_seed(seed)
    config, main = model.config, model.main_input_name
    every = list(parts(config))
    special = {
        value
        for each in every
        for key, value in vars(each).items()
        if re.search(r"token_(id|index)$", key) and type(value) is int
    }
    ordinary = torch.tensor(
        [token for token in range(3, scale.vocabulary - 1) if token not in special]
    )

    def tokens() -> Tensor:
        vocabulary = min(
            (n for each in every if (n := vars(each).get("vocab_size"))), default=scale.vocabulary
        )
        usable = ordinary[ordinary < vocabulary]
        return usable[torch.randint(len(usable), (scale.batch, length), generator=generator)]

    def first(name: str, default: Any) -> Any:
        return next(
            (value for each in every if (value := getattr(each, name, None)) is not None), default
        )

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    inputs: dict[str, Any]
    match main:
        case "input_ids":
            inputs = {"input_ids": tokens()}
        case "pixel_values" | "pixel_values_videos":
            inputs = {main: pixels(first, random, scale.batch)}
        case "input_values" if mel := first("num_mel_bins", 0):
            inputs = {"input_values": random(scale.batch, first("max_length", 0), mel)}
        case "input_values":
            inputs = {"input_values": random(scale.batch, 1200 + 400 * (length > 7))}
        case "input_features" if (long := first("max_source_positions", 0)) and (
            mel := first("num_mel_bins", 0)
        ):
            inputs = {"input_features": random(scale.batch, mel, 2 * long)}
        case "input_features":
            names = (
                "feature_projection_input_dim",
                "input_feat_per_channel",
                "input_dim",
                "num_mel_bins",
            )
            width = next((size for name in names if (size := first(name, 0))), 80)
            inputs = {"input_features": random(scale.batch, 4 * length, width)}
        case _:
            raise ValueError(f"no example of {main} is made here")
    if {"input_ids", "pixel_values"} <= inspect.signature(
        model.forward
    ).parameters.keys() and model.base_model is model:
        inputs = {
            "input_ids": tokens(),
            "pixel_values": pixels(first, random, scale.batch),
        }  # two towers
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = tokens()
    return inputs


def pixels(first: Callable[[str, Any], Any], random: Callable[..., Tensor], batch: int) -> Tensor:
    """Images, or videos where a model takes frames."""
    size = first("image_size", 64)
    height, width = (size, size) if isinstance(size, int) else size
    frames = first("num_frames", None) or first("frames_per_clip", None)
    return random(batch, *((frames,) if frames else ()), first("num_channels", 3), height, width)


# ----------------------------------------------------------------------------------------------
# timm

#: Parts of names, from small members of a module to larger ones.
SMALL = re.compile(
    r"test_|atto|femto|pico|nano|xxtiny|xtiny|tiny|_ti|xxs|_xs|small|_s|mini|_050|_b0|_m0|_m1|_t0|18|26|_002|_h"
)
#: What makes some of them smaller still, each where it is taken.
SMALLER: tuple[Mapping[str, Any], ...] = (
    {"img_size": 64},
    {"depth": 2},
    {"num_blocks": 2},
    {"depths": (1, 1, 1, 1)},
    {"embed_dim": 32, "num_heads": 4},
    {"dims": (16, 24, 32, 48)},
    {"channels": (16, 24, 32, 48)},
    {"layers": (1, 1, 1, 1)},
    {"drop_path_rate": 0.0},
    {"drop_rate": 0.0},
)


def of_timm() -> Iterator[Architecture]:
    """Members of each module: those of :data:`OF_TIMM`, or else the smallest, as far as names
    say.
    """
    modules: dict[str, list[str]] = {}
    for name in timm.list_models():
        modules.setdefault(_model_to_module[name], []).append(name)
    for module, names in sorted(modules.items()):
        smallest = min(names, key=lambda name: (_rank(name), len(name), name))
        for name in [name for name in OF_TIMM.split() if name in names] or [smallest]:
            yield Architecture("timm", module, name, partial(make_of_timm, name))


def _rank(name: str) -> int:
    found = SMALL.search(name)
    return SMALL.pattern.split("|").index(found.group()) if found else 99


def make_of_timm(name: str, scale: Scale = USUAL) -> Made:
    """A model of timm on small images: with whatever of :data:`SMALLER` it takes and still
    computes, or with all arguments narrowed.
    """
    if scale.arguments is not None:
        return _narrow_of_timm(name, scale.arguments, scale)
    options: dict[str, Any] = {"num_classes": scale.labels}
    side = next((side for side in (64, 128) if _computes(name, options, side)), None)
    for option in SMALLER:
        if _computes(name, {**options, **option}, side):
            options |= option
    return _images(timm.create_model(name, **options), options, side, scale)


def _narrow_of_timm(name: str, width: int, scale: Scale) -> Made:
    """One with its arguments, and those of its parts, narrowed as far as it then computes."""
    options: dict[str, Any] = {"num_classes": scale.labels, "in_chans": 1}
    with (
        narrow_arguments(width) as names,
        contextlib.suppress(Exception),  # whatever comes of all of them, they have names
        torch.device("meta"),
    ):
        timm.create_model(name, **options)
    # of one size all through, patches may be few; stages are to see several places in the last
    sides = (16, 32, 64, 128, None) if "patch_size" in names else (64, 128, None)

    def found(only: Sequence[str]) -> tuple[dict[str, Any], int | None] | None:
        """Options and side with which it computes."""
        with narrow_arguments(width, only):
            for side in sides:
                for sized in ({} if side is None else {"img_size": side}, {}):
                    if _computes(name, options | sized, side):
                        return options | sized, side
        return None

    kept, ways = list(names), found(list(names))
    if ways is None:  # not all of them: as many as go together, depths and heads first
        kept = []
        for each in sorted(names, key=lambda each: [*MEANINGS].index(meaning(each) or "width")):
            if more := found([*kept, each]):
                kept, ways = [*kept, each], more
    if ways is None:
        raise ValueError("it does not compute with its arguments narrowed")
    with narrow_arguments(width, kept):
        made = _images(timm.create_model(name, **ways[0]), *ways, scale)
    with torch.no_grad():
        made.model.eval()(*made.example)  # the meta device does not see every empty weight
    return made


def _images(model: nn.Module, options: Mapping[str, Any], side: int | None, scale: Scale) -> Made:
    """A model of timm, with images at random."""
    if (size := sum(parameter.numel() for parameter in model.parameters())) > scale.largest:
        raise TooLargeError(size, "it is small")
    shape = _shape(model, options, side, scale.batch)
    example, others = (
        torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)
    )
    return Made(model, (example,), (others,))


def _shape(
    model: Any, options: Mapping[str, Any], side: int | None, batch: int = 2
) -> tuple[int, ...]:
    """Of some images: as large as the model is built for, or else of this side, or of its usual
    size.
    """
    channels, height, width = model.default_cfg["input_size"]
    side = options.get("img_size", side)
    return batch, options.get("in_chans", channels), side or height, side or width


def _computes(name: str, options: Mapping[str, Any], side: int | None) -> bool:
    """Whether a model of timm is built and computes, on the meta device."""
    try:
        with torch.device("meta"), torch.no_grad():
            model = timm.create_model(name, **options).eval()
            model(torch.empty(_shape(model, options, side)))
    except Exception:
        return False
    return True

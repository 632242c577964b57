"""What has been published of CSP networks against their baselines, claim by claim. Rows of `compare --paper`.

README: the table of the authors' repository, CrossStagePartialNetworks. Its "#Parameter" counts the weights of
convolutions alone, its BFLOPs are two for each MAC of a convolution, at 256 px. Paper: arXiv 1911.11929; its rows on
PeleeNet and DenseNet are those of 224 px networks. Changes are in percent of the baseline.

Darknet's ResNet-50 and ResNeXt-50, the README's baselines, have no projection shortcuts (22.73 and 22.19 million
weights); those that are known from PyTorch have them (25.56 and 25.03 million parameters). A change against the former
is measured against the figure that the README prints.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

__all__ = ["CLAIMS", "TIMM", "Claim", "Subject"]

Subject = Literal["conv weights", "BFLOPs", "parameters", "top-1", "time"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """One published number.

    Attributes:
        pair: heading under which it is printed.
        text: what is claimed.
        source: who says so.
        subject: what the number is of. In millions for weights and parameters, in billions for BFLOPs, in percent for
            top-1 accuracy and for changes.
        network: registry name of what is measured; empty where nothing can be.
        baseline: registry name; not empty: the number is the change from it to `network`.
        baseline_figure: published value that takes the place of a baseline which the registry does not have.
        published: the number.
        tolerance: how far the measured one may be from it: half of its last digit, or one percent for a reading.
        bound: "about": as much; "at-most": that much or less, for claims such as "20 % less"; "at-least": that much or
            more, for claims such as "4 % slower".
        size_px: side of the square input.
        device: of a time: the devices that it is claimed for; empty for any.
        regime: of a time: the one that it was published of, as `cspdeploy.pipeline.regimes` names it; empty where the
            claim names none, and so must hold in every one.
        least_batch: of a time: images a call from which on the claim is judged. One that was published of a large batch
            says nothing of a call that waits for launches.
        unmeasurable: why it cannot be measured; empty where it can. What `network` gives is shown all the same.
        reading: the layers of `network` were never published, it is a reading of the paper's text. Another number than
            the published one then speaks against the reading as much as against the claim.
        remark: what the reader must know of it.
    """

    pair: str
    text: str
    source: str
    subject: Subject
    published: float
    tolerance: float
    network: str = ""
    baseline: str = ""
    baseline_figure: float | None = None
    bound: Literal["about", "at-most", "at-least"] = "about"
    size_px: int = 256
    device: str = ""
    regime: str = ""
    least_batch: int = 1
    unmeasurable: str = ""
    reading: bool = False
    remark: str = ""

    @property
    def is_change(self) -> bool:
        """Whether the number is a change in percent."""
        return bool(self.baseline) or self.baseline_figure is not None


README = "authors' README"
PAPER = "paper"
ARTICLE = "web articles"
TIMM = "timm's benchmarks"
LAST_DIGIT = 0.005  # of figures printed with two decimals
WHOLE_PERCENT = 0.5
READING = 1.0
NO_DATA = "needs the authors' weights and the ImageNet validation images"
EAGER_AMP = "torch-cuda eager fp16"
"""The regime here that is nearest to the one of timm's figures, which are of automatic mixed precision."""
TIMM_REGIME = "published at batch 1024 under autocast; here weights in FP16"
LOADED_BATCH = 32
"""Images a call at which a GPU is busy rather than waiting for launches. timm's figures are of 1024, which tells the
same of both networks: neither waits."""


def _count(pair: str, network: str, subject: Subject, published: float, **fields: object) -> Claim:
    claim = Claim(
        pair=pair, text=f"{subject} of {network}", source=README, subject=subject, published=published,
        tolerance=LAST_DIGIT, network=network,
    )  # fmt: skip
    return dataclasses.replace(claim, **fields)  # type: ignore[arg-type]


def _change(pair: str, network: str, published: float, **fields: object) -> Claim:
    claim = Claim(
        pair=pair, text=f"{network} computes {-published:g} % less", source=README, subject="BFLOPs",
        published=published, tolerance=WHOLE_PERCENT, network=network,
    )  # fmt: skip
    return dataclasses.replace(claim, **fields)  # type: ignore[arg-type]


def _headline(pair: str, network: str, **fields: object) -> Claim:
    return _change(
        pair, network, -20.0, text="20 % less computation (headline)", source=f"{PAPER}, abstract",
        bound="at-most", **fields,
    )  # fmt: skip


def _top1(pair: str, csp: float, baseline: float, source: str = README) -> Claim:
    return Claim(
        pair=pair, text=f"top-1 {csp:g} % against {baseline:g} %", source=source, subject="top-1",
        published=round(csp - baseline, 3), tolerance=0.05, unmeasurable=NO_DATA,
    )  # fmt: skip


def _timm(pair: str, network: str, baseline: str, *, published: float, text: str, **fields: object) -> Claim:
    """Of the tables in timm's repository, results/benchmark-infer-*, at 256 px; a range by its lesser end.

    Their column infer_batch_size says 1024 in every row that is used here.
    """
    claim = Claim(
        pair=pair, text=text, source=TIMM, subject="time", published=published, tolerance=WHOLE_PERCENT,
        network=network, baseline=baseline, device="cuda", regime=EAGER_AMP, least_batch=LOADED_BATCH,
    )  # fmt: skip
    claim = dataclasses.replace(claim, **fields)  # type: ignore[arg-type]
    return dataclasses.replace(claim, remark="; ".join(filter(None, (TIMM_REGIME, claim.remark))))


def _not_the_split(saving: str, elsewhere: str) -> str:
    """Of a network whose last transition works on the pooled map, where its baseline's works on the whole one."""
    return (
        f"{saving} comes from pooling before the last transition, not from the split: {elsewhere}, and the plain "
        "network could pool first too"
    )


DARKNET = "CSPDarknet53 against Darknet53"
RESNET = "CSPResNet-50 against ResNet-50"
RESNEXT = "CSPResNeXt-50 against ResNeXt-50"
DENSENET = "CSPDenseNet-201 against DenseNet-201"
PELEENET = "CSPPeleeNet against PeleeNet"

_DARKNET = (
    _count(DARKNET, "csdarknet53", "conv weights", 27.61),
    _count(DARKNET, "csdarknet53", "BFLOPs", 13.07),
    _count(DARKNET, "darknet53", "conv weights", 41.57),
    _count(DARKNET, "darknet53", "BFLOPs", 18.57),
    _change(DARKNET, "csdarknet53", -30.0, baseline="darknet53"),
    _headline(DARKNET, "csdarknet53", baseline="darknet53"),
    _top1(DARKNET, 77.2, 77.2),
    Claim(
        pair=DARKNET, text="less computation, so faster", source=ARTICLE, subject="time", published=0.0,
        tolerance=WHOLE_PERCENT, bound="at-most", network="cspdarknet53", baseline="darknet53",
        remark="published timings at 256 px say slower: Darknet on an RTX 2070 101 against 113 images a second, "
        "PyTorch eager with FP16 in NCHW on RTX 3090 to 5090 by 4 to 18 %; it has a third more activations to move",
    ),
    _timm(
        DARKNET, "cspdarknet53", "darknet53", published=4.0, bound="at-least",
        text="4 to 18 % more time on a GPU, eager AMP in NCHW",
        remark="of four GPUs, RTX 3090 to RTX Pro 6000; with torch.compile 6 to 28 % more, "
        "eager in NHWC 18 to 38 % more",
    ),
)  # fmt: skip

_NO_PROJECTION = (
    "baseline as printed in the README: Darknet's ResNet-50 without projection shortcuts, 22.73M weights, its "
    "classifier after the pool; against the repository's own cfg, 10.00 BFLOPs, it is 10.3 % less"
)
_RESNET = (
    _count(RESNET, "csresnet50", "conv weights", 21.57),
    _count(RESNET, "csresnet50", "BFLOPs", 8.97),
    _change(RESNET, "csresnet50", -8.0, baseline_figure=9.74, remark=_NO_PROJECTION),
    _headline(RESNET, "csresnet50", baseline_figure=9.74, remark=_NO_PROJECTION),
    _change(
        RESNET, "csresnet50", -10.0, baseline_figure=9.74, bound="at-most", text="at least 10 % less computation",
        source=f"{PAPER}, section 4.3", remark=_NO_PROJECTION,
    ),
    _change(
        RESNET, "cspresnet50", -12.0, baseline="resnet50", text="12 % fewer FLOPs, top-1 above 76 %",
        source=ARTICLE,
        remark="in no published table: -7.9 % against Darknet's ResNet-50, -15.4 % against the one with projection "
        "shortcuts, 25.56M parameters, which is the baseline here",
    ),
    _top1(RESNET, 76.6, 75.8),
    Claim(
        pair=RESNET, text="18 % less time on a GPU", source=ARTICLE, subject="time", published=-18.0,
        tolerance=WHOLE_PERCENT, bound="at-most", network="cspresnet50", baseline="resnet50", device="cuda",
        remark="published timings at 256 px: 18 to 24 % less in PyTorch eager with FP16 in NCHW alone; 2 % less when "
        "compiled, 1 to 3 % less in NHWC",
    ),
    _timm(
        RESNET, "cspresnet50", "resnet50", published=-18.0, bound="at-most",
        text="18 to 24 % less time on a GPU, eager AMP in NCHW",
        remark="of four GPUs, RTX 3090 to RTX Pro 6000, resnet50 interpolated between 224 and 288 px; with "
        "torch.compile 1.6 to 2.3 % less, eager in NHWC 1 to 3 % less",
    ),
)  # fmt: skip

_NO_PROJECTION_X = (
    "baseline as printed in the README: Darknet's ResNeXt-50 without projection shortcuts, 22.19M weights"
)
_RESNEXT = (
    _count(RESNEXT, "csresnext50", "conv weights", 20.50),
    _count(RESNEXT, "csresnext50", "BFLOPs", 7.93),
    _change(RESNEXT, "csresnext50", -22.0, baseline_figure=10.11, remark=_NO_PROJECTION_X),
    _headline(RESNEXT, "csresnext50", baseline_figure=10.11, remark=_NO_PROJECTION_X),
    _top1(RESNEXT, 77.9, 77.8),
    _timm(
        RESNEXT,
        "cspresnext50",
        "resnext50_32x4d",
        published=-18.0,
        bound="at-most",
        text="18 to 23 % less time on a GPU, eager AMP in NCHW",
        remark="of four GPUs, RTX 3090 to RTX Pro 6000, resnext50_32x4d interpolated between 224 and 288 px; with "
        "torch.compile 2 to 6 % less, eager in NHWC 4 % less",
    ),
)

# With the pool after the last transition, as in the plain networks: 8.1717 and 1.1235 BFLOPs; see nets/densenet.py.
_POOL_DENSENET = _not_the_split("half of it", "with the pool after it cspdensenet201 would compute 4.8 % less")
_POOL_PELEENET = _not_the_split(
    "all of it", "with the pool after it csppeleenet would cost 1.123 BFLOPs, 10.6 % more than peleenet"
)
_POOL_FIRST = _not_the_split("two thirds of it", "with the pool after it the network would compute 10.4 % less")
_POOL_GAMMA25 = _not_the_split("all of it", "with the pool after it the network would compute 22.4 % more")

_NO_ELASTIC = "the published networks have Elastic blocks as well, whose layers were not published"
_DENSENET = (
    _change(
        DENSENET, "cspdensenet201", -19.0, text="7.13 BFLOPs for 8.77, with Elastic",
        baseline="densenet201", size_px=224, unmeasurable=_NO_ELASTIC, reading=True,
        remark=f"measured without Elastic; {_POOL_DENSENET}",
    ),
    _headline(
        DENSENET, "cspdensenet201", baseline="densenet201", size_px=224, reading=True, remark=_POOL_DENSENET,
    ),
    _top1(DENSENET, 77.9, 77.9),
)  # fmt: skip


def _ablation(text: str, network: str, published: float, *, remark: str = "") -> Claim:
    return _change(
        PELEENET, network, published, text=text, source=f"{PAPER}, section 4.2",
        baseline="peleenet", size_px=224, tolerance=READING, reading=True, remark=remark,
    )  # fmt: skip


_PELEENET = (
    _count(PELEENET, "peleenet", "BFLOPs", 1.017, size_px=224, tolerance=0.01, reading=True, source=PAPER),
    _count(PELEENET, "csppeleenet", "conv weights", 2.83, size_px=224, tolerance=0.028, reading=True),
    _count(PELEENET, "csppeleenet", "BFLOPs", 0.888, size_px=224, tolerance=0.009, reading=True, remark=_POOL_PELEENET),
    _ablation("both transitions", "csppeleenet", -13.0, remark=_POOL_PELEENET),
    _ablation("fusion last", "csppeleenet_fusion_last", -21.0),
    _ablation("fusion first", "csppeleenet_fusion_first", -26.0, remark=_POOL_FIRST),
    _ablation("gamma 0.25", "csppeleenet_gamma25", -3.0, remark=_POOL_GAMMA25),
    _ablation("gamma 0.25, fusion last", "csppeleenet_gamma25_fusion_last", -11.0),
    _headline(
        PELEENET, "csppeleenet", baseline="peleenet", size_px=224,
        remark=f"the paper's own row says 13 % less as well; {_POOL_PELEENET}",
    ),
    _top1(PELEENET, 70.9, 70.7, PAPER),
)  # fmt: skip

CLAIMS: tuple[Claim, ...] = (*_DARKNET, *_RESNET, *_RESNEXT, *_DENSENET, *_PELEENET)

"""The 1000 classes of ImageNet-1k in the two orders that networks give them in.

"wnid": sorted by WordNet id, "tench" first. All PyTorch checkpoints, and every ImageNet network of the registry.
"devkit": as the ILSVRC 2012 development kit numbers them, "kit fox" first. Darknet's networks.

No class has the same place in both, so a network that is read with the wrong one is wrong for every image.
"""

# The data lie in imagenet.tsv: ids and names from the wheel of timm 1.0.31 (Apache-2.0), whose names are WordNet 3.0's
# (its licence stands in the file), the devkit's order, 1000 integers, from Debian's package darknet (public domain
# upstream, "GPL-3+ or MIT or WTFPL" in the package). To make it again:
#     pip download --no-deps timm && unzip timm-*.whl 'timm/data/_info/*'
#     apt-get download darknet && dpkg -x darknet_*.deb .
#     lemmas = dict(line.rstrip().split("\t") for line in open("timm/data/_info/imagenet_synset_to_lemma.txt"))
#     devkit = open("usr/share/darknet/data/imagenet.labels.list").read().split()[:1000]
#     lines = [f"{wnid}\t{devkit.index(wnid)}\t{lemmas[wnid]}" for wnid in sorted(devkit)]
# By hand: the two synsets that are both called just "crane" say in brackets which one they are.

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Literal

__all__ = [
    "NUM_IMAGENET_CLASSES",
    "ClassOrder",
    "imagenet_labels",
    "imagenet_wnids",
    "recognise_order",
    "wnid_from_devkit",
]

ClassOrder = Literal["wnid", "devkit"]

NUM_IMAGENET_CLASSES = 1000
DATA_FILE = "imagenet.tsv"

# A list in one order matches the other at no place, but for a few names that two classes share ("crane", "maillot").
# What is between is how many names of a list are spelled as WordNet spells them: nearly all in every list seen.
MIN_MATCHING = NUM_IMAGENET_CLASSES // 2


@dataclass(frozen=True, slots=True)
class _Class:
    wnid: str
    devkit_index: int
    names: tuple[str, ...]


@functools.cache
def _classes() -> tuple[_Class, ...]:
    """Sorted by WordNet id."""
    text = resources.files(__package__).joinpath(DATA_FILE).read_text(encoding="utf-8")
    rows = (line.split("\t") for line in text.splitlines() if not line.startswith("#"))
    return tuple(_Class(wnid, int(place), tuple(names.split(", "))) for wnid, place, names in rows)


@functools.cache
def _ordered(order: ClassOrder) -> tuple[_Class, ...]:
    return _classes() if order == "wnid" else tuple(sorted(_classes(), key=lambda one: one.devkit_index))


def imagenet_wnids(order: ClassOrder) -> tuple[str, ...]:
    """WordNet ids such as "n01440764", one for each class."""
    return tuple(one.wnid for one in _ordered(order))


def imagenet_labels(order: ClassOrder) -> tuple[str, ...]:
    """Names such as "tench", one for each class, no two alike.

    The first name of the synset; all of them where another class has the same first name.
    """
    firsts = Counter(one.names[0] for one in _classes())
    return tuple(one.names[0] if firsts[one.names[0]] == 1 else ", ".join(one.names) for one in _ordered(order))


def wnid_from_devkit() -> tuple[int, ...]:
    """The permutation `p` with `labels_wnid[i] == labels_devkit[p[i]]`.

    The rows of a classifier in Darknet's order, taken in the order of `p`, are those of a PyTorch checkpoint.
    """
    return tuple(one.devkit_index for one in _classes())


def recognise_order(names: Sequence[str]) -> ClassOrder | None:
    """In which order a list of ImageNet classes is, told from their WordNet ids or their names.

    Case, underscores and which of a synset's names is given do not matter, and some names may be others.

    Args:
        names: the lines of a labels file.

    Returns:
        None where they are not 1000, or not these classes in one of the two orders.
    """
    if len(names) != NUM_IMAGENET_CLASSES:
        return None
    given = [_words(name) for name in names]
    orders: tuple[ClassOrder, ...] = ("wnid", "devkit")
    for order in orders:
        known = (_spellings(one) for one in _ordered(order))
        if sum(name in spellings for name, spellings in zip(given, known, strict=True)) >= MIN_MATCHING:
            return order
    return None


def _spellings(one: _Class) -> set[str]:
    return {_words(name) for name in (one.wnid, *one.names, ", ".join(one.names))}


def _words(name: str) -> str:
    return re.sub(r"[\W_]+", " ", name).strip().lower()

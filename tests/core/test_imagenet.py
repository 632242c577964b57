from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest

import cspdeploy
from cspdeploy.core.imagenet import (
    MIN_MATCHING,
    NUM_IMAGENET_CLASSES,
    ClassOrder,
    imagenet_labels,
    imagenet_wnids,
    recognise_order,
    wnid_from_devkit,
)

ORDERS: tuple[ClassOrder, ...] = ("wnid", "devkit")
ROOT = Path(cspdeploy.__file__).parents[1]
DARKNET = ROOT.parent / "shared" / "data" / "darknet"

needs_darknet_lists = pytest.mark.skipif(
    not (DARKNET / "imagenet.labels.list").is_file(), reason="the lists of Darknet are not here"
)


@pytest.mark.parametrize("order", ORDERS)
def test_thousand_classes_that_differ(order: ClassOrder) -> None:
    for names in (imagenet_wnids(order), imagenet_labels(order)):
        assert len(names) == len(set(names)) == NUM_IMAGENET_CLASSES == 1000
        assert all(name == name.strip() != "" and "\t" not in name for name in names)


def test_orders_are_of_the_same_classes_and_coincide_nowhere() -> None:
    for one, other in (
        (imagenet_wnids("wnid"), imagenet_wnids("devkit")),
        (imagenet_labels("wnid"), imagenet_labels("devkit")),
    ):
        assert set(one) == set(other)
        assert not any(a == b for a, b in zip(one, other, strict=True))


def test_wnid_order_is_sorted() -> None:
    assert list(imagenet_wnids("wnid")) == sorted(imagenet_wnids("devkit"))


@pytest.mark.parametrize(
    ("order", "index", "wnid", "label"),
    [
        ("wnid", 0, "n01440764", "tench"),
        ("wnid", 134, "n02012849", "crane (bird)"),
        ("wnid", 207, "n02099601", "golden retriever"),
        ("wnid", 517, "n03126707", "crane (machine)"),
        ("wnid", 638, "n03710637", "maillot"),
        ("wnid", 639, "n03710721", "maillot, tank suit"),
        ("wnid", 999, "n15075141", "toilet tissue"),
        ("devkit", 0, "n02119789", "kit fox"),
        ("devkit", 1, "n02100735", "English setter"),
    ],
)
def test_known_places(order: ClassOrder, index: int, wnid: str, label: str) -> None:
    assert (imagenet_wnids(order)[index], imagenet_labels(order)[index]) == (wnid, label)


def test_permutation_takes_devkit_rows_to_the_order_of_wordnet_ids() -> None:
    permutation = wnid_from_devkit()
    assert sorted(permutation) == list(range(NUM_IMAGENET_CLASSES))
    devkit = imagenet_labels("devkit")
    assert tuple(devkit[place] for place in permutation) == imagenet_labels("wnid")
    # The inverse would be another one: taking it by mistake must show.
    assert tuple(imagenet_labels("wnid")[place] for place in permutation) != devkit


@needs_darknet_lists
def test_devkit_order_is_that_of_darknet() -> None:
    lists = {name: (DARKNET / f"imagenet.{name}.list").read_text().splitlines() for name in ("labels", "shortnames")}
    assert imagenet_wnids("devkit") == tuple(lists["labels"][:NUM_IMAGENET_CLASSES])
    short = lists["shortnames"][:NUM_IMAGENET_CLASSES]
    differing = [(a, b) for a, b in zip(imagenet_labels("devkit"), short, strict=True) if a != b]
    assert {a for a, _ in differing} <= {"crane (bird)", "crane (machine)", "maillot, tank suit"}, differing
    assert recognise_order(short) == "devkit"
    assert recognise_order(lists["labels"][:NUM_IMAGENET_CLASSES]) == "devkit"


# --- whose order is it? ---


@pytest.mark.parametrize("order", ORDERS)
def test_own_lists_are_recognised(order: ClassOrder) -> None:
    assert recognise_order(imagenet_wnids(order)) == order
    assert recognise_order(imagenet_labels(order)) == order


@pytest.mark.parametrize("order", ORDERS)
def test_other_spellings_are_recognised(order: ClassOrder) -> None:
    labels = imagenet_labels(order)
    assert recognise_order([label.replace(" ", "_") for label in labels]) == order
    assert recognise_order([f" {label.upper()}\r" for label in labels]) == order
    assert recognise_order([wnid.upper() for wnid in imagenet_wnids(order)]) == order


@pytest.mark.parametrize("order", ORDERS)
def test_some_names_may_be_others(order: ClassOrder) -> None:
    names = list(imagenet_labels(order))
    for index in random.Random(0).sample(range(len(names)), MIN_MATCHING):
        names[index] = f"my own name {index}"
    assert recognise_order(names) == order
    names[names.index(next(name for name in names if not name.startswith("my own")))] = "one more"
    assert recognise_order(names) is None


def test_other_lists_are_of_no_order() -> None:
    names = list(imagenet_labels("wnid"))
    assert recognise_order(names[1:]) is None
    assert recognise_order([*names, "background"]) is None
    assert recognise_order(names[1:] + names[:1]) is None, "shifted by one, as lists with a background class are"
    assert recognise_order(sorted(names)) is None
    assert recognise_order([f"class {index}" for index in range(NUM_IMAGENET_CLASSES)]) is None
    assert recognise_order([]) is None


def test_nothing_is_read_before_it_is_asked_for() -> None:
    code = "import cspdeploy.core.imagenet as m; print(m._classes.cache_info().currsize, m.imagenet_labels('wnid')[0])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "tench"]

"""test_all.py: every core piece against an independent truth, every script as its user runs it.

    make test                       # or: python -m pytest -q test_all.py

Reference numbers of the authors' release and of the panoptic API are looked for in $LDMSEG_SHARED (default ../shared);
tests that need them are skipped where they are absent. A few of those numbers stand in this file, so that every clone
checks them.
"""

import functools
import io
import json
import multiprocessing
import os
import pickle
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import types
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

import ae
import data
import diffusion
import inpaint
import pq
import sample

HERE = Path(__file__).parent
SHARED = Path(os.environ.get("LDMSEG_SHARED", HERE.parent / "shared"))
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))


def reference(name):
    path = SHARED / "reference" / name
    if not path.exists():
        pytest.skip(f"no reference numbers at {path} (set LDMSEG_SHARED)")
    return path


TINY_AE = [
    "--model",
    "small",
    "--data",
    "shapes",
    "--size",
    "32",
    "--num_ids",
    "8",
    "--width",
    "32",
    "--batch_size",
    "4",
    "--eval_images",
    "4",
    "--num_workers",
    "0",
    "--warmup",
    "2",
    "--log_every",
    "1",
    "--device",
    "cpu",
]
TINY_LDM = [
    "--model",
    "small",
    "--data",
    "shapes",
    "--channels",
    "16",
    "--batch_size",
    "4",
    "--eval_images",
    "4",
    "--steps",
    "2",
    "--num_workers",
    "0",
    "--warmup",
    "2",
    "--log_every",
    "1",
    "--device",
    "cpu",
]


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """Both stages, a few iterations each, through the scripts' own main: the folder with ae.pt and ldm.pt."""
    out = tmp_path_factory.mktemp("trained")
    ae.main(TINY_AE + ["--iters", "3", "--out", str(out)])
    diffusion.main(TINY_LDM + ["--iters", "3", "--out", str(out)])
    return out


@pytest.fixture(scope="session")
def labelled(tmp_path_factory, trained):
    """The same with a classifier that was trained for a few iterations: the folder with its ldm.pt."""
    out = tmp_path_factory.mktemp("labelled")
    diffusion.main(
        TINY_LDM
        + ["--ae", str(trained / "ae.pt"), "--classes", "with", "--iters", "3", "--out", str(out)]
    )
    return out


def one_line_error(capsys, main, argv, *words):
    """The command must end with exit code 2 and one line on stderr that holds all the words."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(argv)
    err = [
        l for l in capsys.readouterr().err.strip().splitlines() if not re.search(r"\d+%\|", l)
    ]  # beside progress bars
    assert stop.value.code == 2 and len(err) == 1 and "Traceback" not in err[0], err
    assert all(w in err[0] for w in words), err


# ------------------------------------------------------------------------------------------------------ data.py


def test_scenes_are_reproducible_and_splits_differ():
    a, b = data.Shapes("train2017", 48, seed=3), data.Shapes("train2017", 48, seed=3)
    for i in (0, 7, 1000):
        assert np.array_equal(a[i]["image"], b[i]["image"]) and np.array_equal(
            a[i]["ids"], b[i]["ids"]
        )
    pixels = lambda s: {s[i]["ids"].tobytes() + s[i]["image"].tobytes() for i in range(100)}
    assert not pixels(a) & pixels(data.Shapes("val2017", 48, seed=3))
    assert not pixels(a) & pixels(data.Shapes("train2017", 48, seed=4))
    assert len(pixels(a)) == 100


def test_scenes_hold_what_they_promise():
    kinds, counts = set(), set()
    for i in range(200):
        s = data.Shapes("train2017")[i]
        assert (
            s["image"].shape == (64, 64, 3) and s["image"].dtype == np.uint8 and s["ids"].min() == 1
        )
        listed = {g["id"]: g for g in s["segments_info"]}
        known, areas = np.unique(s["ids"], return_counts=True)
        assert set(known.tolist()) == set(listed) and all(
            listed[k]["area"] == a for k, a in zip(known.tolist(), areas)
        )
        assert areas.min() >= 64 * 64 // 60
        kinds |= {g["category_id"] for g in s["segments_info"]}
        counts.add(len(known))
    assert kinds == {1, 2, 3, 4, 5} and counts == {2, 3, 4}


def test_training_sample_depends_on_its_number_only():
    a = data.Training(data.Shapes("train2017", 32), 32, 16, seed=1)
    b = data.Training(data.Shapes("train2017", 32), 32, 16, seed=1)
    b[5], b[77]
    for n in (3, 600):
        for x, y in zip(a[n], b[n]):
            assert np.array_equal(x, y) and x.dtype == np.uint8
    ids = np.stack([a[n][1] for n in range(300)])
    assert set(np.unique(ids).tolist()) == set(range(1, 16))  # every id is used, and none is void
    assert not np.array_equal(
        a[3][1], data.Training(data.Shapes("train2017", 32), 32, 16, seed=2)[3][1]
    )


def test_training_hands_over_the_class_of_each_id():
    source = data.Shapes("train2017", 32)
    for n in range(50):
        plain, sample_ = data.Training(source, 32, 16, flip=False, min_area=30)[n], source[n]
        image, ids, classes = data.Training(source, 32, 16, flip=False, min_area=30, classes=True)[
            n
        ]
        assert (
            np.array_equal(image, plain[0])
            and np.array_equal(ids, plain[1])
            and classes.shape == (16,)
            and classes[0] == -1
        )
        for s in sample_["segments_info"]:
            new = set(ids[sample_["ids"] == s["id"]].tolist())
            assert len(new) == 1 and (
                new == {0} if s["area"] < 30 else int(classes[new.pop()]) == s["category_id"] - 1
            )
        assert set(np.flatnonzero(classes >= 0).tolist()) == set(ids.ravel().tolist()) - {0}


def test_flip_turns_image_and_ids_together():
    source = [
        {
            "image": np.arange(16, dtype=np.uint8)[None, :, None].repeat(16, 0).repeat(3, 2),
            "ids": np.repeat(np.arange(1, 5), 4)[None].repeat(16, 0).astype(np.int32),
            "segments_info": [{"id": i, "category_id": 1} for i in range(1, 5)],
        }
    ]

    class Source(list):
        endless, sample = False, lambda self, index, side: self[index]

    flips = set()
    for n in range(20):
        image, ids = data.Training(Source(source), 16, 8, seed=n)[0]
        order = image[0, 0].tolist()
        flips.add(order[0] > order[-1])
        groups = [
            set(
                ids[:, np.argwhere(np.isin(order, range(4 * k, 4 * k + 4)))[:, 0]]
                .flatten()
                .tolist()
            )
            for k in range(4)
        ]
        assert all(len(g) == 1 for g in groups) and len(set.union(*groups)) == 4
    assert flips == {True, False}


def test_relabel_voids_small_and_crowd_and_keeps_the_largest(capsys):
    ids = np.zeros((40, 40), np.int32)
    segments = []
    for k in range(10):  # areas 4, 8, .., 40
        ids[k, : 4 * (k + 1)] = 1000 * k + 70000
        segments.append({"id": 1000 * k + 70000, "category_id": 1, "iscrowd": int(k == 9)})
    rng = np.random.default_rng(0)
    new = data.relabel(ids, segments, 16, rng, min_area=10)
    assert not new[[0, 1, 9]].any() and len(set(new[new > 0])) == 7 and new.max() < 16
    for k in range(2, 9):
        assert len(set(new[k, : 4 * (k + 1)])) == 1
    data.say_once.cache_clear()
    few = data.relabel(ids, segments, 4, rng)
    assert [bool(few[k, 0]) for k in range(10)] == [False] * 6 + [True] * 3 + [False]
    data.relabel(ids, segments, 4, rng)
    assert capsys.readouterr().err.count("more segments than N - 1 = 3") == 1


def test_resize_ids_is_pillows_nearest():
    rng = np.random.default_rng(0)
    for shape, target in (
        ((37, 53), (64, 64)),
        ((480, 640), (512, 512)),
        ((640, 427), (64, 32)),
        ((5, 1), (16, 16)),
    ):
        ids = rng.integers(0, 1 << 24, shape).astype(np.int32)
        pillow = np.asarray(Image.fromarray(ids).resize(target[::-1], Image.NEAREST))
        assert (data.resize_ids(ids, *target) == pillow).mean() > 0.999


@pytest.mark.parametrize("cell", [1, 5])
def test_relabel_equals_a_lookup_of_each_pixel(cell):
    """Runs of equal ids are looked up, not pixels; cell 1 is noise, where every run is about a pixel long."""
    rng = np.random.default_rng(cell)
    for k in range(20):
        ids = (
            rng.choice(rng.integers(0, 1 << 24, 12), (30 // cell, 40 // cell))
            .repeat(cell, 0)
            .repeat(cell, 1)
            .astype(np.int32)
        )
        value, length = data.runs(ids)
        assert (
            np.array_equal(np.repeat(value, length), ids.ravel())
            and (value[1:] != value[:-1]).all()
        )
        segments = [
            {"id": int(i), "iscrowd": int(rng.random() < 0.2)}
            for i in rng.permutation(np.unique(ids))[1:]
        ]  # one is not listed
        found = data.relabel(ids, segments, 8, np.random.default_rng(k), min_area=80)
        kept = [s["id"] for s in segments if not s["iscrowd"] and (ids == s["id"]).sum() >= 80]
        kept = kept if len(kept) < 8 else sorted(kept, key=lambda i: -(ids == i).sum())[:7]
        new = dict(zip(kept, np.random.default_rng(k).permutation(7) + 1))
        assert (
            np.array_equal(found, np.vectorize(lambda i: new.get(i, 0))(ids))
            and found.dtype == np.uint8
        )


def test_training_without_images_gives_the_same_ids(tmp_path):
    write_panoptic(tmp_path)
    for source in (data.open_data(str(tmp_path), "val2017"), data.Shapes("train2017", 32)):
        both, alone = (data.Training(source, 24, 8, images=images) for images in (True, False))
        assert all(
            np.array_equal(both[n][1], alone[n][1]) and alone[n][0].size == 0 for n in range(12)
        )
    (tmp_path / "val2017" / "002.png").unlink()  # it is not decoded, but has to be there
    alone = data.Training(data.open_data(str(tmp_path), "val2017"), 24, 8, images=False)
    [alone[n] for n in range(3)]
    assert list(alone.broken) == [False, True, False]


def test_a_training_image_is_pillows_own_resizing(tmp_path):
    truth = write_panoptic(tmp_path, count=1)
    image, ids = data.Training(data.open_data(str(tmp_path), "val2017"), 24, 8, flip=False)[0]
    expected = np.asarray(Image.fromarray(truth[1][0]).resize((24, 24), Image.BICUBIC))
    assert np.array_equal(image.transpose(1, 2, 0), expected)
    assert np.array_equal(
        ids > 0,
        np.asarray(Image.fromarray(truth[1][1].astype(np.int32)).resize((24, 24), Image.NEAREST))
        > 0,
    )


@pytest.mark.parametrize("encoding", data.ENCODINGS)
@pytest.mark.parametrize("num_ids", [4, 16, 128])
def test_encodings_tell_all_ids_apart(encoding, num_ids):
    ids = torch.arange(num_ids, dtype=torch.uint8).view(1, 1, num_ids)
    x = data.encode_ids(ids, num_ids, encoding)
    assert x.shape == (1, data.id_channels(encoding, num_ids), 1, num_ids) and x.abs().max() <= 1
    assert not x[..., 0].any() and torch.pdist(x[0, :, 0].T).min() > 1e-3
    if encoding == "bits":  # bit k of the id, as -1 or +1
        bits = [
            [2 * (i >> k & 1) - 1 for k in range(num_ids.bit_length() - 1)]
            for i in range(1, num_ids)
        ]
        assert x[0, :, 0, 1:].T.tolist() == bits


def test_ranks_and_pieces_share_the_global_batch():
    dataset = data.Training(data.Shapes("train2017", 16), 16, 8)
    whole = [ids for _, ids in data.training_batches(dataset, 2, 4, 8)]
    parts = [list(data.training_batches(dataset, 2, 4, 8, rank, 2, accum=2)) for rank in range(2)]
    for it in range(2):
        pieces = [parts[rank][2 * it + k][1] for rank in range(2) for k in range(2)]
        assert torch.equal(torch.cat(pieces), whole[it])
    workers = [ids for _, ids in data.training_batches(dataset, 2, 4, 8, num_workers=2)]
    assert all(torch.equal(a, b) for a, b in zip(whole, workers))
    seen = [
        s["image_id"]
        for r in range(3)
        for batch in data.evaluation_batches(
            data.Evaluation(data.Shapes("v", 16, length=10)), 2, r, 3
        )
        for s in batch
    ]
    assert sorted(seen) == list(range(10))


def write_panoptic(
    root, split="val2017", pngs="panoptic_{}", sub="", suffix=".png", count=3, size=(40, 30)
):
    """A little dataset in COCO panoptic layout; returns its samples by image id."""
    rng = np.random.default_rng(0)
    folder = root / pngs.format(split)
    for d in (root / "annotations", folder, root / split / sub):
        d.mkdir(parents=True, exist_ok=True)
    images, annotations, truth = [], [], {}
    for i in range(1, count + 1):
        ids = rng.choice([0, 7, 300, 70000], (3, 4)).repeat(size[1] // 3, 0).repeat(size[0] // 4, 1)
        ids[0, :3] = [7, 300, 70000]
        picture = rng.integers(0, 255, (*ids.shape, 3), np.uint8)
        Image.fromarray(picture).save(root / split / sub / f"{i:03d}.png")
        data.write_id_png(folder / f"{i:03d}{suffix}", ids)
        images.append(
            {"id": i, "file_name": f"{i:03d}.png", "width": ids.shape[1], "height": ids.shape[0]}
        )
        segments = [
            {"id": s, "category_id": c, "iscrowd": 0, "area": int((ids == s).sum())}
            for s, c in ((7, 1), (300, 2), (70000, 1))
        ]
        annotations.append(
            {"image_id": i, "file_name": f"{i:03d}{suffix}", "segments_info": segments}
        )
        truth[i] = (picture, ids)
    categories = [{"id": 1, "name": "cat", "isthing": 1}, {"id": 2, "name": "sky", "isthing": 0}]
    path = root / "annotations" / f"panoptic_{split}.json"
    path.write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": categories})
    )
    return truth


@pytest.mark.parametrize(
    "layout",
    [
        {},
        {"pngs": "annotations/panoptic_{}"},
        {"sub": "frankfurt", "suffix": "_gtFine_panoptic.png"},
    ],
)
def test_panoptic_layouts(tmp_path, layout):
    truth = write_panoptic(tmp_path, **layout)
    if layout.get("sub"):  # as Cityscapes' own converter names images in its JSON
        path = tmp_path / "annotations" / "panoptic_val2017.json"
        path.write_text(
            re.sub(r'"(\d{3})\.png"', r'"city_\1_gtFine_leftImg8bit.png"', path.read_text())
        )
        for f in (tmp_path / "val2017" / "frankfurt").iterdir():
            f.rename(f.with_name(f"city_{f.stem}_leftImg8bit.png"))
    source = data.open_data(str(tmp_path), "val2017")
    assert len(source) == 3 and source.layout == "panoptic"
    for sample_ in (source[i] for i in range(3)):
        image, ids = truth[sample_["image_id"]]
        assert np.array_equal(sample_["image"], image) and np.array_equal(sample_["ids"], ids)


@pytest.mark.parametrize("shape", [(1, 1), (7, 30), (64, 50)])
def test_rle_equals_pycocotools(shape):
    from pycocotools import mask as coco_mask

    rng = np.random.default_rng(0)
    for density in (0, 0.02, 0.5, 0.98, 1):
        mask = rng.random(shape) < density
        rle = coco_mask.encode(np.asfortranarray(mask, np.uint8))
        assert np.array_equal(
            data.decode_segmentation(
                {"size": list(shape), "counts": rle["counts"].decode()}, shape
            ),
            mask,
        )


def write_instances(root, split="val2017"):
    from pycocotools import mask as coco_mask

    (root / "annotations").mkdir(parents=True, exist_ok=True)
    (root / split).mkdir(exist_ok=True)
    Image.new("L", (20, 20), 90).save(root / split / "a.png")
    box = np.zeros((20, 20), np.uint8)
    box[4:8, 4:8] = 1
    rle = coco_mask.encode(np.asfortranarray(box))
    crowd = np.zeros((20, 20), np.uint8)
    crowd[15:, 15:] = 1
    counts = [
        int(c)
        for c in np.diff(np.flatnonzero(np.diff(np.concatenate([[2], crowd.T.ravel(), [2]]))))
    ]
    annotations = [
        {
            "id": 1,
            "image_id": 5,
            "category_id": 3,
            "iscrowd": 0,
            "segmentation": {"size": [20, 20], "counts": rle["counts"].decode()},
        },
        {
            "id": 2,
            "image_id": 5,
            "category_id": 4,
            "iscrowd": 0,
            "segmentation": [[2, 2, 12, 2, 12, 12, 2, 12]],
        },
        {
            "id": 3,
            "image_id": 5,
            "category_id": 3,
            "iscrowd": 1,
            "segmentation": {"size": [20, 20], "counts": counts},
        },
    ]
    content = {
        "images": [{"id": 5, "file_name": "a.png", "width": 20, "height": 20}],
        "annotations": annotations,
        "categories": [{"id": 3, "name": "x"}, {"id": 4, "name": "y"}],
    }
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


def test_instances_layout(tmp_path):
    write_instances(tmp_path)
    s = data.open_data(str(tmp_path), "val2017")[0]
    by_category = {g["category_id"]: g["id"] for g in s["segments_info"]}
    assert set(by_category) == {3, 4, 5}  # 5 is the background's own category
    assert (s["ids"][4:8, 4:8] == by_category[3]).all()  # the smaller instance is on top
    assert s["ids"][3, 3] == by_category[4] and (s["ids"] == by_category[4]).sum() == 100 - 16
    assert not s["ids"][15:, 15:].any() and s["ids"][0, 0] == by_category[5]
    void = data.open_data(str(tmp_path), "val2017", background="void")[0]
    assert void["ids"][0, 0] == 0 and len(void["segments_info"]) == 2


def test_panoptic_wins_where_both_layouts_exist(tmp_path, capsys):
    write_panoptic(tmp_path)
    write_instances(tmp_path)
    assert data.open_data(str(tmp_path), "val2017").layout == "panoptic"
    assert "using the panoptic one" in capsys.readouterr().out


def test_images_of_crowd_alone_are_left_out(tmp_path):
    write_panoptic(tmp_path)
    path = tmp_path / "annotations" / "panoptic_val2017.json"
    content = json.loads(path.read_text())
    for s in content["annotations"][1]["segments_info"]:
        s["iscrowd"] = 1
    path.write_text(json.dumps(content))
    assert [data.open_data(str(tmp_path), "val2017")[i]["image_id"] for i in range(2)] == [1, 3]


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1", "I;16", "F"])
def test_images_of_every_mode_are_read(tmp_path, mode):
    values = np.linspace(0, 1, 64 * 48).reshape(48, 64)
    if mode == "I;16":
        image = Image.fromarray((values * 65535).astype(np.uint16))
    elif mode == "F":
        image = Image.fromarray(values.astype(np.float32) * 255)
    else:
        image = (
            Image.fromarray((values * 255).astype(np.uint8))
            .convert("RGB" if mode == "CMYK" else mode if mode not in ("LA",) else "LA")
            .convert(mode)
        )
    path = tmp_path / ("x.tif" if mode in ("CMYK", "F") else "x.png")
    image.save(path)
    array = data.read_image(path)
    assert (
        array.shape == (48, 64, 3)
        and array.dtype == np.uint8
        and array[-1, -1].min() > 200
        and array[0, 0].max() < 60
    )


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "1", "L", "LA", "I", "I;16", "F"])
def test_id_pngs_of_every_mode_are_read(tmp_path, mode):
    ids = np.arange(12).reshape(3, 4) % (2 if mode == "1" else 12) + (
        70_000 if mode in ("RGB", "RGBA", "I", "F") else 0
    )
    rgb = np.stack([ids & 255, ids >> 8 & 255, ids >> 16], -1).astype(np.uint8)
    image = {
        "RGB": lambda: Image.fromarray(rgb),
        "RGBA": lambda: Image.fromarray(np.dstack([rgb, rgb[..., :1]])),
        "1": lambda: Image.fromarray(ids > 0),
        "I": lambda: Image.fromarray(ids.astype(np.int32)),
        "I;16": lambda: Image.fromarray(ids.astype(np.uint16)),
        "F": lambda: Image.fromarray(ids.astype(np.float32)),
    }.get(mode, lambda: Image.fromarray(ids.astype(np.uint8)).convert(mode))()
    image.save(tmp_path / "x.tif")
    assert (
        image.mode == mode
        and np.array_equal(data.read_id_png(tmp_path / "x.tif"), ids)
        and np.array_equal(pq._ids(tmp_path, "x.tif") & 0xFFFFFF, ids)
    )
    if mode in ("I", "F"):
        Image.fromarray((ids + (1 << 24)).astype(np.int32)).save(tmp_path / "x.tif")
        for read in (data.read_id_png, lambda path: pq._ids(tmp_path, path.name)):
            with pytest.raises(ValueError, match="x.tif"):
                read(tmp_path / "x.tif")


def test_exif_rotation_is_applied(tmp_path):
    image = Image.new("RGB", (40, 20))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "x.jpg", exif=exif)
    assert data.read_image(tmp_path / "x.jpg", upright=True).shape == (40, 20, 3)


def write_odd_panoptic(root):
    """A dataset of one image of each odd kind; returns the sizes of its images."""
    exif = Image.new("RGB", (1, 1)).getexif()
    exif[0x0112] = 6  # masks are in the file's own orientation: datasets don't rotate
    deep, clear = np.arange(800, dtype=np.uint16).reshape(20, 40) * 80, Image.new("P", (40, 20))
    clear.putpalette([200, 0, 0] * 256)
    clear.info["transparency"] = 0
    odd = {
        "turned.jpg": Image.new("RGB", (40, 20)),
        "cmyk.jpg": Image.new("CMYK", (9, 7)),
        "grey.jpg": Image.new("L", (9, 7)),
        "palette.gif": clear,
        "deep.png": Image.fromarray(deep),
        "alpha.webp": Image.new("RGBA", (9, 7)),
        "dot.png": Image.new("1", (1, 1)),
        "wide.png": Image.new("RGB", (20_000, 2)),
        "high.png": Image.fromarray(np.zeros((20_000, 1), np.uint16)),
    }
    for d in ("annotations", "panoptic_val2017", "val2017"):
        (root / d).mkdir(parents=True, exist_ok=True)
    content = {"images": [], "annotations": [], "categories": [{"id": 1}]}
    for i, (name, image) in enumerate(odd.items()):
        image.save(root / "val2017" / name, **({"exif": exif} if name == "turned.jpg" else {}))
        data.write_id_png(
            root / "panoptic_val2017" / f"{name}.png", np.full(image.size[::-1], 70_000 + i)
        )
        content["images"].append({"id": name, "file_name": name})
        content["annotations"].append(
            {
                "image_id": name,
                "file_name": f"{name}.png",
                "segments_info": [{"id": 70_000 + i, "category_id": 1}],
            }
        )
    (root / "annotations" / "panoptic_val2017.json").write_text(json.dumps(content))
    return {name: image.size for name, image in odd.items()}


def test_odd_images_train_and_evaluate(tmp_path):
    sizes = write_odd_panoptic(tmp_path)
    source = data.open_data(str(tmp_path), "val2017")
    assert {
        s["file_name"]: s["image"].shape[1::-1] for s in data.Evaluation(source)
    } == sizes and len(sizes) == 9
    for n in range(9):
        image, ids = data.Training(source, 16, 8, min_area=0)[n]
        assert (
            image.shape == (3, 16, 16)
            and ids.shape == (16, 16)
            and (ids == ids[0, 0]).all()
            and ids[0, 0] > 0
        )


def write_bomb(path, width, height):
    """The head of a PNG without any pixels: whoever decodes it fails in another way than who looks at its size."""
    head = b"IHDR" + width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + b"\0\0\0\r"
        + head
        + zlib.crc32(head).to_bytes(4, "big")
        + b"\0\0\0\0IDAT\x35\xaf\x06\x1e"
    )


def test_image_bombs_are_refused_before_decoding(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200_000_000)
    for width, height, word in (
        (10_000, 20_000, "not a readable"),
        (10_001, 20_000, "--max_pixels"),
        (60_000, 60_000, "--max_pixels"),
    ):
        write_bomb(
            tmp_path / "bomb.png", width, height
        )  # below the limit, at which Pillow itself would warn or raise, it is a broken file
        for read in (data.read_image, data.read_id_png):
            with pytest.raises(data.BadInput, match=f"bomb.png.*{word}"):
                read(tmp_path / "bomb.png")
    write_panoptic(tmp_path)
    flags = ["--data", str(tmp_path), "--split", "val2017", "--out", str(tmp_path)]
    data.main(flags + ["--max_pixels", "1200"])
    one_line_error(
        capsys, data.main, flags + ["--max_pixels", "1199"], ".png", "1,199 pixels", "--max_pixels"
    )
    flags = [
        f
        for k in ("gt", "pred")
        for f in (
            f"--{k}",
            str(tmp_path / "annotations/panoptic_val2017.json"),
            f"--{k}_dir",
            str(tmp_path / "panoptic_val2017"),
        )
    ]
    pq.main(flags + ["--max_pixels", "1200"])
    one_line_error(capsys, pq.main, flags + ["--max_pixels", "1199"], "001.png", "--max_pixels")


def test_only_formats_without_programs_in_them_are_opened(tmp_path):
    (tmp_path / "x.jpg").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    )
    assert Image.open(tmp_path / "x.jpg").format == "EPS"  # Pillow would hand it to Ghostscript
    with pytest.raises(data.BadInput, match="x.jpg: not a readable image"):
        data.read_image(tmp_path / "x.jpg")


# -------------------------------------------------------------------------------------------------------- pq.py


def brute_force_pq(images):
    """PQ of (gt, gt_segments, pred, pred_segments), one category, written with sets of pixels."""
    iou, tp, fp, fn = 0.0, 0, 0, 0
    for gt, gt_segments, pred, pred_segments in images:
        cells = lambda m, i: set(map(tuple, np.argwhere(m == i).tolist()))
        truth = {s["id"]: cells(gt, s["id"]) for s in gt_segments}
        found = {s["id"]: cells(pred, s["id"]) for s in pred_segments}
        crowd = [s["id"] for s in gt_segments if s["iscrowd"]]
        void, hit_g, hit_p = cells(gt, 0), set(), set()
        for g in truth:
            for p in found:
                score = len(truth[g] & found[p]) / len((truth[g] | found[p]) - (found[p] & void))
                if g not in crowd and score > 0.5:
                    iou, tp = iou + score, tp + 1
                    hit_g.add(g), hit_p.add(p)
        fn += len(set(truth) - hit_g - set(crowd))
        for p in set(found) - hit_p:
            ignored = len(found[p] & void) + (len(found[p] & truth[crowd[-1]]) if crowd else 0)
            fp += ignored / len(found[p]) <= 0.5
    return iou / max(tp + fp / 2 + fn / 2, 1e-9), tp, fp, fn


def random_pair(rng):
    """A random truth, and a prediction that partly agrees with it."""
    gt = rng.integers(0, 6, (4, 4)).repeat(5, 0).repeat(5, 1) * 1001
    pred = np.roll(gt, rng.integers(0, 4, 2), (0, 1)) + 3
    pred[rng.random(pred.shape) < 0.1] = 0
    pred[:6, :6] = 9_000_000
    segments = lambda m: [{"id": int(i), "category_id": 1, "iscrowd": 0} for i in np.unique(m) if i]
    truth = segments(gt)
    for s in truth[-1:]:
        s["iscrowd"] = int(rng.random() < 0.5)
    return gt, truth, pred, segments(pred)


def test_pq_equals_brute_force():
    rng = np.random.default_rng(0)
    images = [random_pair(rng) for _ in range(40)]
    quality = pq.PanopticQuality()
    for image in images:
        quality.update(*image)
    expected, tp, fp, fn = brute_force_pq(images)
    assert (
        abs(quality.result()["All"]["pq"] - expected) < 1e-12
        and quality.counts.tolist() == [[tp, fp, fn]]
        and tp > 20
        and fp > 20
        and fn > 20
    )


def test_pq_accumulators_add_up_and_missing_predictions_count():
    rng = np.random.default_rng(1)
    images = [random_pair(rng) for _ in range(10)]
    whole, halves = pq.PanopticQuality(), [pq.PanopticQuality(), pq.PanopticQuality()]
    for k, image in enumerate(images):
        whole.update(*image)
        halves[k % 2].update(*image)
    both = pq.PanopticQuality()
    both.state = halves[0].state + halves[1].state
    assert both.result()["All"] == pytest.approx(whole.result()["All"]) and np.array_equal(
        both.counts, whole.counts
    )
    before = whole.counts.copy()
    whole.missed([{"id": 1, "iscrowd": 0}, {"id": 2, "iscrowd": 1}, {"id": 3}])
    assert (whole.counts - before).tolist() == [[0, 0, 2]]


def test_pq_of_noise_equals_brute_force():
    """Ids that change from pixel to pixel, negative and large ones too."""
    rng = np.random.default_rng(2)
    segments = lambda m: [{"id": int(i), "category_id": 1, "iscrowd": 0} for i in np.unique(m) if i]
    for _ in range(10):
        gt = rng.choice([0, -5, 3, 2**40], (9, 11), p=[0.1, 0.1, 0.2, 0.6])
        pred = np.where(rng.random(gt.shape) < 0.8, gt, 7)
        quality = pq.PanopticQuality()
        quality.update(gt, segments(gt), pred, segments(pred))
        expected, tp, fp, fn = brute_force_pq([(gt, segments(gt), pred, segments(pred))])
        assert abs(
            quality.result()["All"]["pq"] - expected
        ) < 1e-12 and quality.counts.tolist() == [[tp, fp, fn]]


def test_pq_is_the_same_over_any_number_of_processes(tmp_path, capsys):
    truth = write_panoptic(tmp_path, count=10)
    path, folder, found = (
        tmp_path / "annotations" / "panoptic_val2017.json",
        str(tmp_path / "panoptic_val2017"),
        tmp_path / "found",
    )
    found.mkdir()
    content = json.loads(path.read_text())
    for i, (_, ids) in truth.items():
        data.write_id_png(found / f"{i:03d}.png", np.roll(ids, i, 1))
    del content["annotations"][3]  # an image without a prediction
    (tmp_path / "found.json").write_text(json.dumps(content))
    results = [
        pq.evaluate(path, tmp_path / "found.json", folder, None, processes=n) for n in (1, 2, 5)
    ]
    assert results[0] == results[1] == results[2] and 0 < results[0]["All"]["pq"] < 1
    quality = pq.PanopticQuality(content["categories"])
    for a in json.loads(path.read_text())["annotations"]:
        ids = truth[a["image_id"]][1]
        (
            quality.missed(a["segments_info"])
            if a["image_id"] == 4
            else quality.update(
                ids, a["segments_info"], np.roll(ids, a["image_id"], 1), a["segments_info"]
            )
        )
    assert all(
        abs(quality.result()["All"][k] - results[0]["All"][k]) < 1e-12 for k in ("pq", "sq", "rq")
    )
    (found / "007.png").unlink()  # a bad file is one line from any process
    one_line_error(
        capsys,
        pq.main,
        [
            "--gt",
            str(path),
            "--gt_dir",
            folder,
            "--pred",
            str(tmp_path / "found.json"),
            "--processes",
            "3",
        ],
        "007.png",
    )


def test_pq_by_hand():
    gt = np.array([[1, 1, 1, 1], [2, 2, 0, 0]])
    pred = np.array([[5, 5, 5, 0], [6, 7, 7, 7]])
    segments = lambda ids, cats: [{"id": i, "category_id": c} for i, c in zip(ids, cats)]
    quality = pq.PanopticQuality([{"id": 1, "isthing": 1}, {"id": 2, "isthing": 0}])
    quality.update(gt, segments([1, 2], [1, 2]), pred, segments([5, 6, 7], [1, 2, 2]))
    # 5 covers 3 of 4 px of 1: IoU 0.75. 6 and 2: IoU 1/2, no match. 7 lies with 2 of 3 px on void: ignored.
    assert quality.counts.tolist() == [[1, 0, 0], [0, 1, 1]]
    r = quality.result()
    assert (
        r["Things"] == {"pq": 0.75, "sq": 0.75, "rq": 1.0, "n": 1.0}
        and r["All"]["pq"] == 0.375
        and r["Stuff"]["pq"] == 0
    )


def test_pq_command_equals_the_panoptic_api(tmp_path, capsys):
    root = reference("pq")
    pq.main(
        [
            "--gt",
            str(root / "gt.json"),
            "--pred",
            str(root / "pred.json"),
            "--json",
            str(tmp_path / "r.json"),
        ]
    )
    found, expected = json.loads((tmp_path / "r.json").read_text()), json.loads(
        (root / "expected.json").read_text()
    )

    def compare(a, b):
        assert a.keys() == b.keys()
        for k in b:
            (
                compare(a[k], b[k])
                if isinstance(b[k], dict)
                else pytest.approx(b[k], abs=1e-12) == a[k] or pytest.fail(k)
            )

    compare(found, expected)
    assert "23.9   69.8   34.1" in capsys.readouterr().out


# -------------------------------------------------------------------------------------------------------- ae.py


def test_points_are_the_most_uncertain_ones():
    torch.manual_seed(0)
    drawn = {}

    def uncertainty(points):  # most uncertain at x = 0.5
        drawn["all"] = points
        return -(points[..., 0] - 0.5).abs()

    points = ae.uncertain_points(uncertainty, 3, 400, "cpu")
    assert (
        points.shape == (3, 400, 2)
        and drawn["all"].shape == (3, 1200, 2)
        and 0 <= points.min()
        and points.max() <= 1
    )
    for b in range(3):
        expected = sorted(drawn["all"][b].tolist(), key=lambda p: abs(p[0] - 0.5))[:300]
        assert sorted(map(tuple, points[b, :300].tolist())) == sorted(map(tuple, expected))
    assert (points[:, 300:, 0] - 0.5).abs().mean() == pytest.approx(
        0.25, abs=0.03
    )  # the rest is uniform


def test_mask_at_equals_sampling_the_full_masks():
    torch.manual_seed(0)
    ids = torch.randint(0, 4, (2, 9, 13), dtype=torch.uint8)
    image_of, id_of = ae.segments_of(ids, 4)
    assert list(zip(image_of.tolist(), id_of.tolist())) == [
        (b, i) for b in range(2) for i in (1, 2, 3)
    ]
    points = torch.rand(len(id_of), 50, 2)
    masks = torch.stack([(ids[b] == i).float() for b, i in zip(image_of, id_of)])[:, None]
    assert torch.allclose(
        ae.mask_at(ids, image_of, id_of, points), ae.sample_at(masks, points)[:, 0], atol=1e-5
    )


def test_losses_at_all_pixel_centres_equal_the_dense_losses():
    torch.manual_seed(0)
    ids = torch.randint(0, 5, (2, 8, 8), dtype=torch.uint8)
    logits = torch.randn(2, 8, 8, 8)
    y, x = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
    centres = torch.stack([x, y], -1).reshape(1, 64, 2).add(0.5).div(8)
    image_of, id_of = ae.segments_of(ids, 8)
    ce, n_ce, mask, n_mask = ae.segmentation_losses(
        logits, ids, centres.expand(2, -1, -1), centres.expand(len(id_of), -1, -1)
    )
    assert n_ce == (ids > 0).sum() and n_mask == len(id_of)
    assert torch.allclose(
        ce, F.cross_entropy(logits, ids.long(), ignore_index=0, reduction="sum"), rtol=1e-4
    )
    total = 0
    for b, i in zip(image_of, id_of):
        m, l = (ids[b] == i).float(), logits[b, i]
        p = l.sigmoid()
        total += (
            F.binary_cross_entropy_with_logits(l, m)
            + 1
            - (2 * (p * m).sum() + 1) / (p.sum() + m.sum() + 1)
        )
    assert torch.allclose(mask, total, rtol=1e-4)


def test_losses_equal_the_reference():
    ref = np.load(reference("loss_parity.npz"))
    t = lambda k: torch.from_numpy(ref[k])
    ce, n_ce, mask, n_mask = ae.segmentation_losses(
        t("logits"), t("targets"), t("ce_points"), t("mask_points")
    )
    assert (
        abs(ce / n_ce - float(ref["ce"])) < 1e-5
        and abs(mask / n_mask - float(ref["mask_bce_plus_dice"])) < 1e-5
    )
    torch.manual_seed(0)
    draws = []
    for _ in range(60):
        ce, n_ce, mask, n_mask = ae.segmentation_losses(
            t("logits"), t("targets"), *ae.draw_points(t("logits"), t("targets"), 256)
        )
        draws.append((float(ce / n_ce), float(mask / n_mask)))
    for values, (mean, std), n in zip(
        zip(*draws), (ref["ce_importance_mean_std"], ref["mask_importance_mean_std"]), (200, 60)
    ):
        assert abs(np.mean(values) - mean) < 3 * std * (1 / n + 1 / len(values)) ** 0.5


def test_the_authors_autoencoder_gives_the_authors_numbers():
    """Their file through our loading path: latents, log-variances, logits to 1e-4, and the ids wherever they are that sure."""
    ref, model = np.load(reference("ae_parity.npz")), ae.load_autoencoder(
        reference("ae_official_format.pt")
    )
    assert (model.num_ids, model.factor, model.encoding, model.trained_with["size"]) == (
        128,
        8,
        "bits",
        512,
    )
    with torch.no_grad():
        mean, logvar = model.encode(torch.from_numpy(ref["ids"]))
        logits = model.decode(mean)
    full = F.interpolate(logits, scale_factor=2, mode="bilinear", align_corners=False)
    for ours, theirs in (
        (mean, "latent_mean"),
        (logvar, "latent_logvar"),
        (logits[:, :8], "logits_quarter_top"),
        (full[:, :, 32, 48], "logits_full_at_32_48"),
    ):
        assert (
            ours.shape == ref[theirs].shape
            and (ours - torch.from_numpy(ref[theirs])).abs().max() < 1e-4
        )
    first, second = full.topk(2, dim=1).values.unbind(1)
    sure = (first - second > 1e-4).numpy()
    found = np.stack([ae.postprocess(l, *ref["ids"].shape[1:], threshold=0) for l in logits])
    assert sure.mean() > 0.99 and np.array_equal(found[sure], ref["argmax_full"][sure])


def test_autoencoder_has_the_papers_shape():
    model = ae.Autoencoder()
    assert sum(p.numel() for p in model.parameters()) == 2_023_208
    mean, logvar = model.encode(torch.randint(0, 128, (1, 64, 96)))
    assert mean.shape == logvar.shape == (1, 4, 8, 12) and model.decode(mean).shape == (
        1,
        128,
        32,
        48,
    )
    shallower = ae.Autoencoder(16, "onehot", factor=4, width=64)
    assert shallower(torch.randint(0, 16, (2, 32, 32)))[0].shape == (2, 16, 32, 32)


def test_channel_norm_is_layernorm_over_channels():
    torch.manual_seed(0)
    norm, x = ae.ChannelNorm(6), torch.randn(2, 6, 3, 5)
    torch.nn.init.normal_(norm.weight)
    mean, var = x.mean(1, keepdim=True), x.var(1, keepdim=True, unbiased=False)
    expected = (x - mean) / (var + norm.eps).sqrt() * norm.weight.view(
        1, -1, 1, 1
    ) + norm.bias.view(1, -1, 1, 1)
    assert torch.allclose(norm(x), expected, atol=1e-5)


def test_kl_equals_torchs():
    mean, logvar = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(
        normal(mean, (logvar / 2).exp()), normal(0, 1)
    ).sum()
    assert torch.allclose(ae.kl_loss(mean, logvar), expected, rtol=1e-4)


def test_postprocess_thresholds_and_drops_small_segments():
    logits = torch.zeros(4, 8, 8)
    logits[1, :, :4], logits[2, :, 4:], logits[3, 0, 7] = 9, 9, 20
    logits[:, 4, 0] = 0  # an undecided pixel
    found = ae.postprocess(logits, 8, 8, min_area=2)
    assert (
        found[4, 0] == 0
        and found[0, 7] == 0
        and (found == 1).sum() == 31
        and (found == 2).sum() == 31
    )
    assert ae.postprocess(logits, 8, 8)[0, 7] == 3
    assert ae.postprocess(logits, 24, 16).shape == (24, 16)


def test_postprocess_in_strips_equals_the_whole(monkeypatch):
    for shape, (height, width) in (
        ((16, 16, 16), (90, 4500)),
        ((128, 9, 7), (1300, 600)),
        ((4, 8, 8), (5, 3)),
        ((4, 2, 2), (1, 1)),
    ):
        logits = torch.randn(shape, generator=torch.Generator().manual_seed(height)) * 3
        big = F.interpolate(
            logits[None], size=(height, width), mode="bilinear", align_corners=False
        )[0]
        probability, ids = big.softmax(0).max(0)
        first, second = big.topk(2, dim=0).values
        certain = (
            (first - second > 1e-4) & ((probability - 0.5).abs() > 1e-5)
        ).numpy()  # elsewhere rounding may decide
        whole = ids.masked_fill(probability < 0.5, 0).numpy()
        monkeypatch.setattr(
            torch.Tensor,
            "split",
            lambda x, n: [x[i : i + max(1, n // 97)] for i in range(0, len(x), max(1, n // 97))],
        )
        found = ae.postprocess(logits, height, width)
        monkeypatch.undo()
        assert (
            found.dtype == np.int32
            and np.array_equal(found[certain], whole[certain])
            and certain.mean() > 0.99
        )


def gradients(module, run):
    module.zero_grad()
    run()
    return torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])


def read_log(folder):
    return [json.loads(l) for l in open(folder / "log.jsonl")]


def test_two_accumulation_steps_give_the_gradient_of_the_whole_batch(tmp_path):
    """Counts differ between the halves (void), so this fails where each piece is normalised by its own count."""
    torch.manual_seed(0)
    model = ae.Autoencoder(8, factor=4, width=32)
    ids = torch.randint(0, 8, (4, 16, 16), dtype=torch.uint8)
    ids[:2, 4:] = 0
    noise = torch.randn(4, 4, 4, 4)
    ce_points = torch.rand(4, 64, 2)
    image_of, _ = ae.segments_of(ids, 8)
    mask_points = torch.rand(len(image_of), 64, 2)

    def loss(rows, counts=None):
        sums = ae.segmentation_losses(
            model(ids[rows], noise[rows])[0],
            ids[rows],
            ce_points[rows],
            mask_points[torch.isin(image_of, rows)],
        )
        counts = counts or (sums[1], sums[3])
        return sums[0] / counts[0] + sums[2] / counts[1], (sums[1], sums[3])

    everything, first, second = torch.arange(4), torch.arange(2), torch.arange(2, 4)
    whole = gradients(model, lambda: loss(everything)[0].backward())
    counts = loss(everything)[1]
    assert (
        loss(first)[1][0] + loss(second)[1][0] == counts[0]
        and loss(first)[1][0] != loss(second)[1][0]
    )
    pieces = gradients(
        model, lambda: [loss(rows, counts)[0].backward() for rows in (first, second)]
    )
    assert torch.allclose(whole, pieces, atol=1e-6)


def test_ae_learns_and_its_log_and_pictures_are_there(tmp_path):
    ae.main(
        TINY_AE
        + [
            "--iters",
            "60",
            "--lr",
            "3e-3",
            "--out",
            str(tmp_path),
            "--json",
            str(tmp_path / "r.json"),
        ]
    )
    entries = [e for e in read_log(tmp_path) if "iteration" in e]
    losses = [e["loss"] for e in entries if "loss" in e]
    assert len(losses) == 60 and np.mean(losses[-10:]) < 0.92 * np.mean(losses[:10])
    assert {"iteration", "loss", "lr", "images_per_second"} <= entries[0].keys() and any(
        "val_pq" in e for e in entries
    )
    for name in ("ae.pt", "ae_best.pt", "ae_state.pt", "ae.png", "ae_loss.png"):
        assert (tmp_path / name).stat().st_size > 500
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["images"] == 4 and 0 <= result["pq"] <= 100


def test_ae_compares_encodings_kl_weights_and_architectures(tmp_path, capsys):
    """One command trains each value alike: as if it had been run alone."""
    flags = TINY_AE + ["--iters", "2"]
    ae.main(
        flags
        + ["--encoding", "bits", "rgb", "--out", str(tmp_path), "--json", str(tmp_path / "r.json")]
    )
    lines = capsys.readouterr().out.splitlines()
    header = next(i for i, l in enumerate(lines) if l.split()[:2] == ["encoding", "pq"])
    assert [l.split()[0] for l in lines[header + 1 :]] == ["bits", "rgb"]
    figures = json.loads((tmp_path / "r.json").read_text())["by_encoding"]
    assert {"pq", "sq", "rq", "latent_std", "latent_max"} <= figures["rgb"].keys()
    ae.main(flags + ["--encoding", "rgb", "--out", str(tmp_path / "alone")])
    a, b = (ae.load_autoencoder(tmp_path / n / "ae.pt") for n in ("alone", "encoding_rgb"))
    assert a.encoding == b.encoding == "rgb" and all(
        torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters())
    )
    assert ae.load_autoencoder(tmp_path / "encoding_bits" / "ae.pt").encoding == "bits"
    ae.main(
        flags
        + [
            "--lr",
            "1e-2",
            "--clip",
            "100",
            "--kl",
            "0",
            "0.1",
            "10",
            "--out",
            str(tmp_path),
            "--json",
            str(tmp_path / "r.json"),
        ]
    )
    figures = json.loads((tmp_path / "r.json").read_text())["by_kl"]
    assert (
        list(figures) == ["0.0", "0.1", "10.0"]
        and len({row["latent_std"] for row in figures.values()}) == 3
        and (tmp_path / "kl.png").exists()
    )
    ae.main(
        flags
        + [
            "--iters",
            "0",
            "--arch",
            "shallow",
            "sd_vae",
            "--out",
            str(tmp_path),
            "--json",
            str(tmp_path / "r.json"),
        ]
    )
    figures = json.loads((tmp_path / "r.json").read_text())["by_arch"]
    for arch, model in (("shallow", ae.Autoencoder), ("sd_vae", ae.SDAutoencoder)):
        assert (
            figures[arch]["parameters_millions"]
            == sum(p.numel() for p in model(8, factor=4, width=32).parameters()) / 1e6
        )
    one_line_error(
        capsys,
        ae.main,
        flags + ["--encoding", "bits", "rgb", "--kl", "0", "1", "--out", str(tmp_path)],
        "--encoding and --kl",
    )


def leaves(value):
    """All tensors in nested dicts and lists."""
    if torch.is_tensor(value):
        return [value]
    values = (
        value.values()
        if isinstance(value, dict)
        else value if isinstance(value, (list, tuple)) else ()
    )
    return [t for v in values for t in leaves(v)]


@pytest.mark.parametrize("stage", ["ae", "ldm"])
def test_two_processes_train_like_one(tmp_path, trained, stage, monkeypatch):
    """torchrun with two processes ends at the weights of one process with two accumulation steps.

    Random draws are per process, so points, noise and timesteps are made the same by replacing them with functions of
    the data, in a script that both runs use."""
    main = {"ae": "ae", "ldm": "diffusion"}[stage]
    script = tmp_path / "run.py"
    script.write_text(f"""
import sys; sys.path.insert(0, {str(HERE)!r})
import torch, ae, diffusion
torch.set_num_threads(1)
normal = torch.randn
def first(size):                                           # the draw of one sample, given to all of the batch
    size = size[0] if isinstance(size[0], tuple) else size
    return normal(size[1:], generator=torch.Generator().manual_seed(5))[None].expand(size).clone()
torch.randn = lambda *size, generator=None, device=None: normal(*size, generator=generator) if generator else first(size)
torch.rand = lambda *size, device=None: first(size).sigmoid()
torch.randn_like = lambda x: first(tuple(x.shape))
torch.randint = lambda low, high, size, device=None: torch.full(size, 400)
torch.nn.Dropout.forward = lambda self, x: x
{main}.main(sys.argv[1:])
""")
    flags = {
        "ae": TINY_AE,
        "ldm": TINY_LDM + ["--ae", str(trained / "ae.pt"), "--classes", "with"],
    }[stage] + ["--iters", "2", "--warmup", "1"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = lambda *cmd: subprocess.run(
        [sys.executable, *cmd], env=env, capture_output=True, text=True, timeout=240
    )
    one = run(str(script), *flags, "--accum", "2", "--out", str(tmp_path / "one"))
    assert one.returncode == 0, one.stderr[-2000:]
    two = run(
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        str(script),
        *flags,
        "--out",
        str(tmp_path / "two"),
    )
    assert two.returncode == 0, two.stderr[-2000:]
    a, b = (
        torch.load(tmp_path / n / f"{stage}_state.pt", weights_only=True) for n in ("one", "two")
    )
    keys = (
        ["weights"] if stage == "ae" else ["unet", "average"]
    )  # the average has the classifier's weights too
    # Adam's first moment is the gradient, up to a factor: compare that, and the weights
    moments = [[s["exp_avg"] for s in x["optimizer"]["state"].values()] for x in (a, b)]
    assert max((x - y).abs().max() / x.abs().max().clamp(min=1e-4) for x, y in zip(*moments)) < 2e-3
    assert all(
        torch.allclose(x, y, atol=2e-3)
        for x, y in zip(leaves([a[k] for k in keys]), leaves([b[k] for k in keys]))
    )
    assert len(read_log(tmp_path / "one")) == len(read_log(tmp_path / "two"))  # rank 0 alone writes


# ------------------------------------------------------------------------------------------------- diffusion.py


def test_schedule_in_numbers():
    """A few of the authors' numbers, so that a clone without the reference files checks them too."""
    ddim = diffusion.DDIM()
    ab = ddim.alphas_cumprod
    assert ab[[0, 250, 500, 999]].tolist() == pytest.approx(
        [0.99915, 0.6737923, 0.2763326, 0.00466009], rel=1e-4
    )
    assert ddim.timesteps(10) == [
        999,
        899,
        799,
        699,
        599,
        499,
        399,
        299,
        199,
        99,
    ] and ddim.timesteps(1000) == list(range(999, -1, -1))
    assert ddim.timesteps(1) == [999] and len(set(ddim.timesteps(30))) == 30
    linear, snr, balanced = (ddim.loss_weights(kind) for kind in ("linear", "snr", "balanced"))
    ratio = ddim.alphas_cumprod / (1 - ddim.alphas_cumprod)
    assert balanced.mean() == pytest.approx(1) and torch.allclose(
        balanced[900] / balanced[100], (ratio[100] / ratio[900]).sqrt()
    )
    assert linear[[0, 124, 249, 250, 999]].tolist() == pytest.approx([0.004, 0.5, 1, 1, 1])
    assert (
        (linear.diff() >= 0).all()
        and snr[999] == 1
        and float(snr[0]) == pytest.approx(2 * (1 - 0.99915) / 0.99915, rel=1e-3)
    )
    for steps in (0, 1001):
        with pytest.raises(data.BadInput, match="--steps"):
            ddim.timesteps(steps)


def test_ddim_equals_the_reference():
    ref = np.load(reference("ddim_parity.npz"))
    t = lambda k: torch.from_numpy(ref[k])
    ddim, close = diffusion.DDIM(), lambda a, b: torch.allclose(a, b, rtol=1e-5, atol=1e-5)
    assert close(ddim.alphas_cumprod, t("alphas_cumprod")) and close(
        ddim.loss_weights("snr"), t("loss_weight_max_clamp_snr_2")
    )
    assert close(ddim.loss_weights("snr", 5), t("loss_weight_max_clamp_snr_5"))
    assert all(ddim.timesteps(n) == ref[f"timesteps_{n}"].tolist() for n in (10, 20, 50))
    assert close(
        ddim.add_noise(t("add_noise_x0"), t("add_noise_eps"), t("add_noise_t")), t("add_noise_out")
    )
    assert close(
        ddim.remove_noise(t("add_noise_x0"), t("add_noise_eps"), t("add_noise_t")),
        t("remove_noise_out"),
    )
    z, timesteps = t("ddim_x_T"), ddim.timesteps(10)
    for i, (j, j_prev) in enumerate(zip(timesteps, timesteps[1:] + [-1])):
        z0 = ddim.remove_noise(z, t("ddim_eps")[i], j)
        z = ddim.step(z, z0, j, j_prev)
        assert close(z0, t("ddim_pred_x0")[i]) and close(z, t("ddim_prev_sample")[i])


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v"])
def test_ddim_equals_diffusers(prediction):
    from diffusers import DDIMScheduler

    theirs = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        timestep_spacing="trailing",
        prediction_type={"v": "v_prediction"}.get(prediction, prediction),
    )
    theirs.set_timesteps(25)
    ours = diffusion.DDIM(prediction)
    timesteps = ours.timesteps(25)
    assert timesteps == theirs.timesteps.tolist()
    torch.manual_seed(0)
    a = b = torch.randn(2, 4, 8, 8)
    for j, j_prev in zip(timesteps, timesteps[1:] + [-1]):
        output = torch.randn(2, 4, 8, 8)
        a = ours.step(a, ours.remove_noise(a, output, j), j, j_prev)
        b = theirs.step(output, j, b).prev_sample
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v"])
def test_a_perfect_network_denoises_to_the_latent(prediction):
    ddim = diffusion.DDIM(prediction)
    z, eps, j = (
        torch.randn(5, 4, 8, 8),
        torch.randn(5, 4, 8, 8),
        torch.tensor([0, 10, 500, 900, 999]),
    )
    assert torch.allclose(
        ddim.remove_noise(ddim.add_noise(z, eps, j), ddim.target(z, eps, j), j), z, atol=1e-3
    )


@pytest.fixture(scope="session")
def sd_folder(tmp_path_factory):
    """A narrow Stable Diffusion: the real classes and layout of files, few channels, random weights."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    folder = tmp_path_factory.mktemp("sd")
    torch.manual_seed(0)
    UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 32, 64, 64),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=16,
    ).save_pretrained(folder / "unet")
    AutoencoderKL(
        block_out_channels=(16, 16, 32, 32),
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=64,
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
    ).save_pretrained(folder / "vae")
    return folder


def test_grown_conv_in_starts_as_the_pretrained_unet(sd_folder):
    pretrained, _ = diffusion.load_sd(str(sd_folder))
    grown = diffusion.grow_conv_in(pretrained, 12).eval()
    assert grown.conv_in.weight.shape == (32, 12, 3, 3) and not any(
        ".attn2." in k or ".norm2." in k and "transformer" in k for k in grown.state_dict()
    )
    assert (
        torch.equal(grown.conv_in.weight[:, :4], pretrained.conv_in.weight)
        and not grown.conv_in.weight[:, 4:].any()
    )
    z, other = torch.randn(1, 4, 8, 8), torch.randn(1, 8, 8, 8)
    with torch.no_grad():
        a = grown(torch.cat([z, other], 1), 500, encoder_hidden_states=None).sample
        # an independent way to bypass cross-attention: its output projection put to zero
        for name, p in pretrained.named_parameters():
            if ".attn2.to_out." in name:
                p.zero_()
        b = pretrained.eval()(z, 500, encoder_hidden_states=torch.zeros(1, 1, 16)).sample
    assert torch.allclose(a, b, atol=1e-4)


def test_sd_model_trains_samples_and_needs_no_download_afterwards(tmp_path, sd_folder, monkeypatch):
    ae.main(
        [
            "--data",
            "shapes",
            "--size",
            "64",
            "--num_ids",
            "16",
            "--width",
            "32",
            "--factor",
            "8",
            "--iters",
            "1",
            "--batch_size",
            "2",
            "--eval_images",
            "2",
            "--num_workers",
            "0",
            "--out",
            str(tmp_path),
            "--device",
            "cpu",
        ]
    )
    before = diffusion.load_sd(str(sd_folder))[0].time_embedding.linear_1.weight.clone()
    diffusion.main(
        [
            "--data",
            "shapes",
            "--sd",
            str(sd_folder),
            "--iters",
            "2",
            "--warmup",
            "1",
            "--batch_size",
            "2",
            "--eval_images",
            "2",
            "--steps",
            "2",
            "--num_workers",
            "0",
            "--out",
            str(tmp_path),
            "--device",
            "cpu",
        ]
    )

    def no_download(*args, **kwargs):
        raise AssertionError("sampling must not load Stable Diffusion again")

    monkeypatch.setattr(diffusion, "load_sd", no_download)
    model = sample.load(tmp_path / "ldm.pt")
    assert (
        model.scale == 0.18215
        and model.unet.config.in_channels == 12
        and model.settings["min_area"] == 8
    )
    assert torch.equal(model.unet.time_embedding.linear_1.weight, before)  # frozen
    ids, segments_info = sample.segment(model, Image.new("RGB", (50, 40), "red"), steps=2)
    assert (
        ids.shape == (40, 50)
        and ids.dtype == np.int32
        and sum(s["area"] for s in segments_info) == (ids > 0).sum()
    )


def test_sd_vae_is_stable_diffusions_between_new_ends(sd_folder):
    """Against diffusers' own encode and decode, with only the first and the last layer exchanged."""
    vae = ae.load_sd(str(sd_folder), "vae").eval()
    model, ids = ae.SDAutoencoder(16, vae=ae.load_sd(str(sd_folder), "vae")).eval(), torch.randint(
        0, 16, (2, 32, 32)
    )
    assert (model.factor, model.width) == (8, 32)
    vae.encoder.conv_in, vae.decoder.conv_out = model.encoder[0].conv_in, model.decoder[1].conv_out
    with torch.no_grad():
        theirs = vae.encode(data.encode_ids(ids, 16)).latent_dist
        mean, logvar = model.encode(ids)
        assert (
            mean.shape == (2, 4, 4, 4)
            and torch.allclose(mean, theirs.mean)
            and torch.allclose(logvar, theirs.logvar)
        )
        logits = model.decode(mean)
        assert logits.shape == (2, 16, 32, 32) and torch.allclose(logits, vae.decode(mean).sample)
    again = ae.from_settings(
        json.loads(json.dumps(model.settings))
    )  # settings are plain, and make the same model
    again.load_state_dict(model.state_dict())
    assert isinstance(again, ae.SDAutoencoder) and again.settings["num_ids"] == 16


def test_sd_vae_learns():
    """A batch learnt by heart with the same losses: gradients reach all of it, the new ends too."""
    torch.manual_seed(0)
    model, ids = ae.SDAutoencoder(8, factor=4, width=32), torch.randint(
        1, 8, (2, 2, 2)
    ).repeat_interleave(8, 1).repeat_interleave(8, 2)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=3e-3), []
    for _ in range(40):
        logits = model(ids)[0]
        ce, n_ce, mask, n_mask = ae.segmentation_losses(
            logits, ids, *ae.draw_points(logits, ids, 64)
        )
        losses.append(ce / n_ce + mask / n_mask)
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0] and all(
        p.grad.any() for k, p in model.named_parameters() if "to_k.bias" not in k
    )  # which softmax ignores


@pytest.mark.parametrize("model", ["sd", "small"])
def test_sd_vae_serves_every_script(tmp_path, sd_folder, monkeypatch, capsys, model):
    flags = [
        "--model",
        model,
        "--data",
        "shapes",
        "--size",
        "32",
        "--batch_size",
        "2",
        "--eval_images",
        "2",
        "--num_workers",
        "0",
        "--warmup",
        "1",
        "--device",
        "cpu",
        "--out",
        str(tmp_path),
    ] + ["--sd", str(sd_folder)] * (model == "sd")
    ae.main(flags + ["--arch", "sd_vae", "--num_ids", "8", "--width", "32", "--iters", "2"])
    assert "sd_vae" in capsys.readouterr().out
    diffusion.main(flags + ["--channels", "16", "--iters", "1", "--steps", "1"])

    def no_download(*args, **kwargs):
        raise AssertionError("nothing may be downloaded for a checkpoint")

    monkeypatch.setattr(ae, "load_sd", no_download)
    one_line_error(
        capsys,
        ae.main,
        flags + ["--ckpt", str(tmp_path / "ae.pt"), "--arch", "shallow"],
        "--arch shallow",
        "sd_vae",
    )
    ae.main(flags + ["--ckpt", str(tmp_path / "ae.pt"), "--iters", "0"])
    sampling = [
        "--ckpt",
        str(tmp_path / "ldm.pt"),
        "--limit",
        "2",
        "--steps",
        "1",
        "--num_workers",
        "0",
        "--device",
        "cpu",
        "--out",
        str(tmp_path),
        "--json",
        str(tmp_path / "r.json"),
    ]
    sample.main(sampling)
    inpaint.main(sampling + ["--drop", "0"])
    assert json.loads((tmp_path / "r.json").read_text())["pq"] == 100  # all is given: all is kept
    assert isinstance(sample.load(tmp_path / "ldm.pt").autoencoder, ae.SDAutoencoder)


def save_like_the_release(path, **content):
    """A checkpoint with a pickled settings object, whose class (EasyDict, in theirs) is gone when the file is read."""

    class EasyDict(dict):
        def __init__(self, **entries):
            super().__init__(entries)
            self.__dict__.update(entries)

    EasyDict.__module__, EasyDict.__qualname__ = "easydict", "EasyDict"
    sys.modules["easydict"] = types.ModuleType("easydict")
    sys.modules["easydict"].EasyDict = EasyDict
    try:
        settings = EasyDict(base=1, vae_model_kwargs=EasyDict(scaling_factor=0.25, num_latents=2))
        torch.save(
            {"step": 7, "epoch": 0, "opt": None, "scaler": None, "p": settings, **content}, path
        )
    finally:
        del sys.modules["easydict"]
    return path


def narrow_release():
    """What the authors' diffusion checkpoint holds, with few channels and random weights."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    unet = diffusion.build_unet(
        dict(
            in_channels=12,
            block_out_channels=(32, 32, 64, 64),
            layers_per_block=1,
            attention_head_dim=8,
        )
    )
    vae = AutoencoderKL(
        block_out_channels=(32, 32, 64),
        layers_per_block=2,
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
    )
    image = {k: v for k, v in vae.state_dict().items() if not k.startswith("decoder.")}
    return {
        "vae_image": image,
        "vae_semseg": ae.Autoencoder(16, factor=4, width=32).state_dict(),
        "unet": unet.state_dict(),
        "ema": {},
    }


@pytest.mark.parametrize("old_names", [True, False])
def test_the_authors_diffusion_checkpoint_loads_samples_and_trains(tmp_path, old_names):
    """Random weights in the release's layout: each tensor arrives (a strict load), and every script takes the file."""
    assert "easydict" not in sys.modules
    content, names = narrow_release(), {
        "to_q": "query",
        "to_k": "key",
        "to_v": "value",
        "to_out.0": "proj_attn",
    }
    image = dict(content["vae_image"])
    for new, old in names.items() if old_names else ():  # those of diffusers 0.16
        content["vae_image"] = {
            k.replace(f"attentions.0.{new}.", f"attentions.0.{old}."): v
            for k, v in content["vae_image"].items()
        }
    assert old_names == any(".query." in k for k in content["vae_image"])
    path = save_like_the_release(tmp_path / "ldmseg.pt", **content)
    model = sample.load(path)
    ours = model.state_dict()
    arrived = {
        "autoencoder": content["vae_semseg"],
        "unet": content["unet"],
        "image_encoder": {k: v for k, v in image.items() if not k.startswith("post_quant_conv.")},
    }
    expected = {f"{part}.{k}": v for part, tensors in arrived.items() for k, v in tensors.items()}
    assert expected.keys() == ours.keys() and all(
        torch.equal(ours[k], v) for k, v in expected.items()
    )
    s = model.settings
    assert (s["size"], s["min_area"], s["prediction"], s["self_cond"], model.scale) == (
        512,
        512,
        "epsilon",
        True,
        0.25,
    )
    assert model.unet.config.attention_head_dim == 8 and not model.training
    if not old_names:
        return  # the scripts below need to see one of the two

    Image.new("RGB", (60, 40), "navy").save(tmp_path / "x.png")
    given = np.zeros((40, 60), np.int32)
    given[:, :30] = 7
    data.write_id_png(tmp_path / "m.png", given)
    flags = [
        "--ckpt",
        str(path),
        "--size",
        "32",
        "--min_area",
        "0",
        "--threshold",
        "0",
        "--device",
        "cpu",
        "--out",
        str(tmp_path / "o"),
    ]
    sample.main(flags + ["--images", str(tmp_path / "x.png"), "--steps", "2"])
    assert (data.read_id_png(tmp_path / "o" / "predictions" / "x.png") > 0).mean() > 0.9
    inpaint.main(
        flags
        + ["--image", str(tmp_path / "x.png"), "--mask", str(tmp_path / "m.png"), "--steps", "2"]
    )
    completed = data.read_id_png(tmp_path / "o" / "x_completed.png")
    assert (completed[:, :30] == 7).all() and (completed > 0).mean() > 0.9
    diffusion.main(
        [
            "--ckpt",
            str(path),
            "--data",
            "shapes",
            "--size",
            "32",
            "--iters",
            "1",
            "--batch_size",
            "2",
            "--eval_images",
            "2",
            "--steps",
            "1",
            "--num_workers",
            "0",
            "--device",
            "cpu",
            "--out",
            str(tmp_path / "o"),
        ]
    )
    assert sample.load(tmp_path / "o" / "ldm.pt").scale == 0.25


def test_the_authors_autoencoder_checkpoint_is_known_by_its_content(tmp_path, sd_folder):
    model = ae.Autoencoder(16, "positional", factor=8, width=64)
    path = save_like_the_release(
        tmp_path / "a.pt", vae={f"module.{k}": v for k, v in model.state_dict().items()}
    )
    loaded = ae.load_autoencoder(path)
    assert loaded.settings == model.settings and not loaded.training
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values())
    )
    flags = [
        "--data",
        "shapes",
        "--size",
        "32",
        "--iters",
        "1",
        "--batch_size",
        "2",
        "--eval_images",
        "2",
        "--num_workers",
        "0",
        "--device",
        "cpu",
        "--out",
        str(tmp_path),
    ]
    ae.main(flags + ["--ckpt", str(path)])
    diffusion.main(flags + ["--ae", str(path), "--sd", str(sd_folder), "--steps", "1"])
    assert sample.load(tmp_path / "ldm.pt").settings["autoencoder"] == model.settings


def test_a_checkpoint_runs_nothing_even_in_the_releases_layout(tmp_path, capsys):
    """A pickle that calls a function when it is read: refused, or loaded with the call left out; never run."""
    weights = ae.Autoencoder(8, factor=4, width=32).state_dict()
    for n, (function, *arguments) in enumerate(
        [
            (os.system, f"touch {tmp_path / 'ran'}"),
            (subprocess.getoutput, f"touch {tmp_path / 'ran'}"),
            (open, str(tmp_path / "ran"), "w"),
            (eval, f"open({str(tmp_path / 'ran')!r}, 'w')"),
        ]
    ):

        class Bomb:
            def __reduce__(self):
                return function, tuple(arguments)

        path = tmp_path / f"{n}.pt"
        for content in (
            {"vae": weights, "p": Bomb()},
            {"vae": {**weights, "x": Bomb()}, "p": None},
        ):
            torch.save(content, path)
            if function is os.system:
                with pytest.raises(data.BadInput, match="0.pt: not a readable checkpoint"):
                    ae.load_autoencoder(path)
            else:
                assert ae.load_autoencoder(path).num_ids == 8
    assert not (tmp_path / "ran").exists()


def test_files_that_only_resemble_the_release(tmp_path, capsys):
    weights, content = ae.Autoencoder(8, factor=4, width=32).state_dict(), narrow_release()
    whole = save_like_the_release(tmp_path / "whole.pt", vae=weights).read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    torch.save({"vae": weights}, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    save_like_the_release(
        tmp_path / "less.pt", vae={k: v for k, v in weights.items() if k != "encoder.3.bias"}
    )
    save_like_the_release(
        tmp_path / "odd.pt", vae={"encoder.0.weight": weights["encoder.0.weight"]}
    )
    save_like_the_release(tmp_path / "none.pt", vae=None)
    save_like_the_release(tmp_path / "foreign.pt", model=weights)
    save_like_the_release(tmp_path / "ldm.pt", **content)
    for name, words in (
        ("cut.pt", ["not a readable"]),
        ("legacy.pt", ["not a readable"]),
        ("less.pt", ["don't fit", "encoder.3.bias"]),
        ("odd.pt", ["don't fit", "decoder.0.weight"]),
        ("none.pt", ["don't fit"]),
        ("foreign.pt", ["not a readable"]),
    ):
        one_line_error(
            capsys,
            ae.main,
            TINY_AE + ["--ckpt", str(tmp_path / name), "--out", str(tmp_path)],
            name,
            *words,
        )
    save_like_the_release(
        tmp_path / "less.pt",
        **{**content, "unet": {k: v for k, v in content["unet"].items() if k != "conv_out.bias"}},
    )
    save_like_the_release(tmp_path / "part.pt", vae_semseg=weights)
    for name, words in (
        ("less.pt", ["conv_out.bias"]),
        ("part.pt", ["don't fit", "unet"]),
        ("whole.pt", ["'ae'", "'ldm'"]),
    ):
        one_line_error(
            capsys,
            sample.main,
            ["--ckpt", str(tmp_path / name), "--out", str(tmp_path)],
            name,
            *words,
        )


def test_stage_2_checkpoints_hold_stage_1(tmp_path, trained):
    save_like_the_release(tmp_path / "release.pt", **narrow_release())
    for ldm, same in (
        (trained / "ldm.pt", ae.load_autoencoder(trained / "ae.pt")),
        (tmp_path / "release.pt", None),
    ):
        alone, inside = ae.load_autoencoder(ldm), diffusion.load_ldm(ldm).autoencoder
        assert all(
            torch.equal(a, b)
            for m in (inside, same or inside)
            for a, b in zip(alone.parameters(), m.parameters())
        )


def test_drop_input_teaches_only_the_encoder(tmp_path, trained, capsys):
    ids = torch.randint(1, 8, (6, 32, 32))
    dropped = ae.drop_input(ids)
    assert (
        ((dropped == ids) | (dropped == 0)).all()
        and (dropped == 0).any()
        and (dropped == ids).any()
        and (ids > 0).all()
    )
    flags = TINY_AE + ["--lr", "3e-3", "--log_every", "5", "--out", str(tmp_path)]
    ae.main(flags + ["--ckpt", str(trained / "ldm.pt"), "--drop_input", "--iters", "60"])
    losses = [e["loss"] for e in ae.read_log(tmp_path / "log.jsonl", "ae") if "loss" in e]
    assert losses[-1] < 0.8 * max(losses[:3])
    before, after = ae.load_autoencoder(trained / "ldm.pt"), ae.load_autoencoder(tmp_path / "ae.pt")
    assert all(
        torch.equal(a, b) for a, b in zip(before.decoder.parameters(), after.decoder.parameters())
    )
    assert not any(
        torch.equal(a, b) for a, b in zip(before.encoder.parameters(), after.encoder.parameters())
    )
    one_line_error(capsys, ae.main, flags + ["--drop_input"], "--ckpt")
    # inpaint.py reads the given part with it, and refuses an autoencoder of another model
    base = [
        "--ckpt",
        str(trained / "ldm.pt"),
        "--limit",
        "2",
        "--steps",
        "2",
        "--num_workers",
        "0",
        "--out",
        str(tmp_path),
        "--threshold",
        "0",
        "--min_area",
        "0",
    ]
    for block, same in ("8", True), (
        "2",
        False,
    ):  # it reads the cells of which only a part is given
        made = []
        for extra in ([], ["--ae", str(tmp_path / "ae.pt")]):
            inpaint.main(
                base
                + ["--valid", "0.05", "--block", block, "--json", str(tmp_path / "r.json"), *extra]
            )
            made.append((tmp_path / "inpaint.png").read_bytes())
        assert (made[0] == made[1]) == same
    ae.main(TINY_AE + ["--iters", "1", "--out", str(tmp_path / "other")])
    one_line_error(
        capsys, inpaint.main, base + ["--ae", str(tmp_path / "other" / "ae.pt")], "--ae", "decoder"
    )


def tiny_ldm(trained, **settings):
    model = sample.load(trained / "ldm.pt")
    model.settings.update(settings)
    return model


def test_loss_leaves_void_cells_out_and_weights_timesteps(trained):
    model = tiny_ldm(trained)
    torch.manual_seed(0)
    images, ids = torch.randint(0, 255, (2, 3, 32, 32), dtype=torch.uint8), torch.randint(
        1, 8, (2, 32, 32), dtype=torch.uint8
    )
    eps, j = torch.randn(2, 4, 8, 8), torch.tensor([100, 700])
    weights = model.ddim.loss_weights("linear")
    with torch.no_grad():
        assert (
            model(images, torch.zeros_like(ids), eps, j, weights, torch.ones(2, dtype=torch.bool))
            == 0
        )
        ids[:, 1:4, 1:4] = 0  # not the top-left pixel of the cell: still counts
        none = torch.zeros(2, dtype=torch.bool)
        whole = model(images, ids, eps, j, torch.ones(1000), none)
        z, latent = model.encode(ids), model.encode_image(images)
        error = (
            model.denoise(model.ddim.add_noise(z, eps, j), latent, torch.zeros_like(z), j) - eps
        ) ** 2
        assert torch.allclose(whole, error.mean(), rtol=1e-4)
        expected = (error.mean((1, 2, 3)) * torch.tensor([weights[100], weights[700]])).mean()
        assert torch.allclose(model(images, ids, eps, j, weights, none), expected, rtol=1e-4)
        assert not torch.allclose(
            model(images, ids, eps, j, torch.ones(1000), ~none), whole, rtol=1e-6
        )


def test_diffusion_learns(tmp_path, trained, capsys):
    diffusion.main(
        TINY_LDM
        + [
            "--ae",
            str(trained / "ae.pt"),
            "--iters",
            "80",
            "--eval_every",
            "1000",
            "--out",
            str(tmp_path),
        ]
    )
    losses = [e["loss"] for e in read_log(tmp_path) if "loss" in e]
    assert re.search(r"training took \d+\.\d+ s per image", capsys.readouterr().out)
    assert len(losses) == 80 and np.mean(losses[-10:]) < 0.8 * np.mean(losses[:10])
    assert all(
        (tmp_path / n).stat().st_size > 500
        for n in ("ldm.pt", "ldm_best.pt", "ldm_state.pt", "ldm.png", "ldm_loss.png")
    )


def test_diffusion_compares_ablations(tmp_path, trained, capsys):
    flags = TINY_LDM + [
        "--iters",
        "4",
        "--ae",
        str(trained / "ae.pt"),
        "--out",
        str(tmp_path),
        "--json",
        str(tmp_path / "r.json"),
    ]
    diffusion.main(flags + ["--loss_weight", "snr", "none"])
    assert list(json.loads((tmp_path / "r.json").read_text())["by_loss_weight"]) == ["snr", "none"]
    state = [
        torch.load(tmp_path / f"loss_weight_{w}" / "ldm_state.pt", weights_only=True)
        for w in ("snr", "none")
    ]
    assert state[0]["losses"] == state[1]["losses"] == [] and not all(
        torch.equal(a, b) for a, b in zip(leaves(state[0]["unet"]), leaves(state[1]["unet"]))
    )
    diffusion.main(flags + ["--latent_scale", "1", "0.18215"])
    scales = [
        torch.load(tmp_path / f"latent_scale_{w}" / "ldm.pt", weights_only=True)["settings"][
            "latent_scale"
        ]
        for w in (1.0, 0.18215)
    ]
    assert scales == [1, 0.18215] and (tmp_path / "latent_scale.png").exists()
    one_line_error(
        capsys,
        diffusion.main,
        flags + ["--self_cond", "0", "1", "--latent_scale", "1", "2"],
        "--latent_scale and --self_cond",
    )


def test_saved_weights_are_the_average(tmp_path, trained):
    diffusion.main(
        TINY_LDM
        + ["--ae", str(trained / "ae.pt"), "--iters", "4", "--ema", "0.9", "--out", str(tmp_path)]
    )
    state, saved = torch.load(tmp_path / "ldm_state.pt", weights_only=True), sample.load(
        tmp_path / "ldm.pt"
    )
    average = leaves(state["average"])
    assert (
        all(torch.equal(a, p) for a, p in zip(average, saved.unet.parameters()))
        and len(average) > 50
    )
    assert not all(torch.equal(a, p) for a, p in zip(average, state["unet"].values()))


def test_export_is_half_precision_and_samples(tmp_path, trained):
    diffusion.main(
        TINY_LDM
        + [
            "--ckpt",
            str(trained / "ldm.pt"),
            "--iters",
            "0",
            "--export",
            str(tmp_path / "half.pt"),
            "--out",
            str(tmp_path),
        ]
    )
    assert (tmp_path / "half.pt").stat().st_size < 0.6 * (trained / "ldm.pt").stat().st_size
    a, b = sample.load(tmp_path / "half.pt"), sample.load(trained / "ldm.pt")
    z = torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        assert torch.allclose(a.decode(z), b.decode(z), atol=0.05)
    assert not (tmp_path / "ldm_state.pt").exists()


def test_a_run_goes_on_as_its_checkpoint_was_trained(tmp_path, trained):
    own = ["--iters", "0", "--out", str(tmp_path)]
    diffusion.main(
        TINY_LDM
        + own
        + [
            "--ae",
            str(trained / "ae.pt"),
            "--self_cond",
            "0",
            "--connected",
            "--export",
            str(tmp_path / "a.pt"),
        ]
    )
    for flags, self_cond, connected in ((), False, True), (
        ("--self_cond", "0.5", "--no-connected"),
        True,
        False,
    ):
        diffusion.main(
            TINY_LDM
            + own
            + ["--ckpt", str(tmp_path / "a.pt"), "--export", str(tmp_path / "b.pt"), *flags]
        )
        settings = sample.load(tmp_path / "b.pt").settings
        assert (settings["self_cond"], settings["connected"]) == (self_cond, connected)


def test_segment_means_equal_means_over_masks(monkeypatch):
    torch.manual_seed(0)
    x, ids = torch.randn(2, 3, 4, 5), torch.randint(0, 6, (2, 12, 10))
    means, full = diffusion.segment_means(x, ids, 8), F.interpolate(
        x, size=(12, 10), mode="nearest"
    )
    for b in range(2):
        for i in range(6):
            assert torch.allclose(means[b, i], full[b][:, ids[b] == i].mean(1), atol=1e-5)
    assert not means[:, 6:].any() and diffusion.segment_means(x, ids[:, :1, :1], 8).isfinite().all()
    monkeypatch.setattr(diffusion, "MOST_SHARES", 1)  # some at a time
    assert torch.allclose(diffusion.segment_means(x, ids, 8), means, atol=1e-6)


@pytest.mark.parametrize("at_a_time", [1, 2, 99])
def test_labels_are_those_of_the_mean_and_stuff_of_one_category_is_one_segment(
    at_a_time, monkeypatch
):
    monkeypatch.setattr(diffusion, "MOST_SHARES", 32 * at_a_time)
    classifier = diffusion.Classifier(
        [{"id": 10, "name": "car", "isthing": 1}, {"id": 20, "name": "sky", "isthing": 0}], "small"
    )
    ids = np.repeat([[0, 7, 7, 300, 70000, 70000, 5, 5]], 4, 0).astype(np.int32)
    logits = torch.tensor([[2.0, 2, 0, 0, 2, 2, 0, 0], [3.0, 0, 0, 2, 0, 1, 3, 1]])[:, None].expand(
        2, 4, 8
    )
    same, segments = classifier.label(logits, ids, merge=False)
    labels = {s["id"]: (s["category_id"], s["area"], s["score"]) for s in segments}
    share = lambda d: round(1 / (1 + np.exp(-d)), 4)
    assert same is ids and labels == {
        5: (20, 8, share(2)),
        7: (10, 8, share(1)),
        300: (20, 4, share(2)),
        70000: (10, 8, share(1.5)),
    }
    merged, segments = classifier.label(logits, ids)
    assert {s["id"]: (s["category_id"], s["area"]) for s in segments} == {
        5: (20, 12),
        7: (10, 8),
        70000: (10, 8),
    }
    assert np.array_equal(merged, np.where(ids == 300, 5, ids)) and merged.dtype == np.int32
    assert classifier.label(logits, np.zeros((3, 3), np.int32))[1] == []


def test_classifier_learns_while_the_rest_is_frozen(tmp_path, trained):
    flags = [
        "--ckpt",
        str(trained / "ldm.pt"),
        "--classes",
        "only",
        "--batch_size",
        "8",
        "--lr",
        "3e-3",
        "--iters",
        "80",
        "--eval_every",
        "1000",
    ]
    diffusion.main(
        TINY_LDM + flags + ["--out", str(tmp_path), "--export", str(tmp_path / "half.pt")]
    )
    losses = [e["loss"] for e in read_log(tmp_path) if "loss" in e]
    assert len(losses) == 80 and np.mean(losses[-10:]) < 1.4  # guessing by frequency: 1.56
    before, after = sample.load(trained / "ldm.pt"), sample.load(tmp_path / "ldm.pt")
    assert before.classifier is None and all(
        torch.equal(v, after.state_dict()[k]) for k, v in before.state_dict().items()
    )
    scenes, half = [data.Shapes("v", 32)[n] for n in range(32)], sample.load(tmp_path / "half.pt")
    labels = lambda model: np.array(
        [
            g["category_id"]
            for _, info in sample.label_batch(
                model, [s["image"] for s in scenes], [s["ids"] for s in scenes], merge=False
            )
            for g in info
        ]
    )
    assert (labels(after) == labels(half)).mean() > 0.9 and len(set(labels(after))) > 2


def test_sds_classifier_is_deeplabv3_and_takes_torchvisions_weights(tmp_path):
    from torchvision.models import resnet50
    from torchvision.models.segmentation.deeplabv3 import DeepLabHead

    pretrained = resnet50()
    torch.save(pretrained.state_dict(), tmp_path / "resnet.pt")
    args = SimpleNamespace(model="sd", resnet=str(tmp_path / "resnet.pt"))
    classifier = diffusion.new_classifier(
        args, [{"id": i, "name": str(i), "isthing": 1} for i in range(7)]
    ).eval()
    assert torch.equal(
        classifier.backbone.layer4[2].conv3.weight, pretrained.layer4[2].conv3.weight
    )
    assert [p.shape for p in classifier.head.parameters()] == [
        p.shape for p in DeepLabHead(2048, 7).parameters()
    ]
    with torch.no_grad():
        assert classifier.logits(torch.zeros(1, 3, 64, 48, dtype=torch.uint8)).shape == (1, 7, 8, 6)
    for name in ("nowhere.pt", __file__):
        with pytest.raises(data.BadInput, match="--resnet"):
            diffusion.new_classifier(
                SimpleNamespace(model="sd", resnet=str(name)),
                [{"id": 1, "name": "x", "isthing": 1}],
            )


def test_an_image_gets_the_same_mask_in_any_batch(trained):
    model = tiny_ldm(trained, min_area=0)
    images = [s["image"] for s in (data.Shapes("v", 32)[i] for i in range(3))]
    together = sample.segment_batch(model, images, ["a", "b", "c"], steps=3, threshold=0)
    alone = sample.segment_batch(model, images[1:2], ["b"], steps=3, threshold=0)[0]
    other = sample.segment_batch(model, images[1:2], ["b"], steps=3, seed=1, threshold=0)[0]
    assert (together[1] == alone).mean() > 0.99 and (other != alone).any()


# ---------------------------------------------------------------------------------------- sample.py, inpaint.py


def test_crops_turns_and_jitter_keep_image_and_ids_together():
    class Source(list):
        categories, endless = [{"id": 1, "name": "x", "isthing": 1}], False

        def sample(self, index, side=None):
            return {**self[index], "image": self[index]["image"] if side != 0 else None}

    ids = np.add.outer(10 * (np.arange(40) // 8), np.arange(30) // 6).astype(
        np.int32
    )  # 25 segments, 1 of them 0
    image = np.repeat(np.uint8(5 * ids + 20)[..., None], 3, 2)
    source = Source(
        [
            {
                "image": image,
                "ids": ids,
                "segments_info": [{"id": int(i), "category_id": 1} for i in np.unique(ids) if i],
                "image_id": 1,
                "file_name": "x",
            }
        ]
    )
    seen = set()
    for n in range(40):
        x, y = data.Training(source, 16, 32, seed=3, min_area=0, crop=16, turns=True)[n]
        assert x.shape == (3, 16, 16) and y.shape == (16, 16) and len(np.unique(y)) > 1
        assert len(np.unique(np.stack([x[0], y]).reshape(2, -1), axis=1).T) == len(
            np.unique(y)
        )  # one color an id: they moved together
        seen.add(tuple(x[0, ::15, ::15].flatten().tolist()))
        blind = data.Training(
            source, 16, 32, seed=3, min_area=0, crop=16, turns=True, images=False
        )[n]
        assert np.array_equal(blind[1], y) and not len(blind[0])
        bright, same = data.Training(
            source, 16, 32, seed=3, min_area=0, crop=16, turns=True, jitter=0.5
        )[n]
        assert np.array_equal(same, y) and (x.std() == 0 or not np.array_equal(bright, x))
    assert len(seen) > 30
    part = data.crop_sample(source[0], 50, np.random.default_rng(0))  # larger than the picture
    assert (
        part["ids"].shape == (50, 50)
        and np.array_equal(part["ids"][:40, :30], ids)
        and not part["ids"][40:].any()
        and not part["ids"][:, 30:].any()
    )
    assert part["image"].shape == (50, 50, 3) and (part["image"][45, :30] == image[39]).all()
    part = data.crop_sample(source[0], 9, np.random.default_rng(0))
    assert {s["id"]: s["area"] for s in part["segments_info"]} == {
        int(i): int((part["ids"] == i).sum()) for i in np.unique(part["ids"]) if i
    }


@pytest.mark.parametrize("shape", [(100, 70), (64, 64), (20, 90), (10, 12)])
def test_tiles_of_the_truth_are_joined_to_the_truth(shape):
    rng = np.random.default_rng(0)
    truth = np.full(shape, 1, np.int32)  # background and blobs, some larger than a tile
    for i, (y, x, r) in enumerate(
        [(15, 15, 9), (60, 40, 30), (15, 45, 12), (90, 10, 8), (5, 80, 5)]
    ):
        yy, xx = np.indices(shape)
        truth[(yy - y) ** 2 + (xx - x) ** 2 < r * r] = i + 2
    corners = sample.tile_corners(*shape, 32, 0.25)
    covered = np.zeros([max(n, 32) for n in shape])
    for top, left in corners:
        covered[top : top + 32, left : left + 32] += 1
    assert covered.all()
    tiles = []
    for part in sample.cut(truth, 32, corners):
        new = rng.permutation(40) + 1  # every tile has its own ids
        tiles.append((new[part].astype(np.int32), part / np.float32(10)))
    ids, certainty = sample.stitch(tiles, corners, shape)
    assert ids.shape == shape and len({(a, b) for a, b in zip(ids.ravel(), truth.ravel())}) == len(
        np.unique(truth)
    ) == len(np.unique(ids))
    assert sorted(np.unique(ids)) == list(range(1, len(np.unique(ids)) + 1)) and np.allclose(
        certainty, truth / 10
    )
    # ids that mean the same everywhere stay as they are, also where tiles disagree; void stays void
    shared = [
        (np.where(part == 2, 0, part), sure)
        for part, (_, sure) in zip(sample.cut(truth, 32, corners), tiles)
    ]
    assert np.array_equal(
        sample.stitch(shared, corners, shape, shared=9)[0], np.where(truth == 2, 0, truth)
    )
    swapped = [
        (np.where(part == 1, 3, 1), sure) if n % 2 else t
        for n, ((part, sure), t) in enumerate(zip(shared, shared))
    ]
    assert set(np.unique(sample.stitch(swapped, corners, shape, shared=9)[0])) <= {
        0,
        1,
        2,
        3,
        4,
        5,
        6,
    }


def test_a_model_of_crops_segments_pictures_of_any_size_in_tiles(tmp_path, trained, capsys):
    model = tiny_ldm(trained, min_area=0, crop=24)
    image = data.Shapes("v", 60)[0]["image"][:50]
    ids, certainty = sample.predict(model, [image, image[:10, :8]], ["a", "b"], steps=2)[0]
    assert (
        ids.shape == certainty.shape == (50, 60) and 0 <= certainty.min() and certainty.max() <= 1
    )
    one = image[:24, :24]  # a picture of one tile: the same as that tile alone
    tile = diffusion.predict(model, [one], ["a at (0, 0)"], 2)[0]
    found = sample.predict(model, [one], ["a"], 2)[0]
    assert np.array_equal(tile[1], found[1]) and len(
        {(a, b) for a, b in zip(tile[0].ravel(), found[0].ravel())}
    ) == len(np.unique(tile[0]))
    # training with --crop writes it to the checkpoint, and both scripts follow
    write_instances(tmp_path)
    out = tmp_path / "out"
    flags = [
        "--data",
        str(tmp_path),
        "--train_split",
        "val2017",
        "--crop",
        "12",
        "--turns",
        "--iters",
        "2",
        "--out",
        str(out),
    ]
    ae.main([f for f in TINY_AE if f not in ("--data", "shapes")] + flags)
    diffusion.main(
        [f for f in TINY_LDM if f not in ("--data", "shapes")]
        + [f for f in flags if f not in ("--crop", "12")]
        + ["--jitter", "0.2"]
    )
    assert (
        sample.load(out / "ldm.pt").settings["crop"]
        == 12
        == ae.load_autoencoder(out / "ae.pt").trained_with["crop"]
    )
    common = [
        "--ckpt",
        str(out / "ldm.pt"),
        "--steps",
        "2",
        "--device",
        "cpu",
        "--num_workers",
        "0",
        "--out",
        str(out),
        "--json",
        str(out / "x.json"),
    ]
    capsys.readouterr()
    for main, flags in (
        (sample.main, ["--trajectory"]),
        (sample.main, ["--crop", "0"]),
        (sample.main, ["--seeds", "0", "1"]),
        (inpaint.main, []),
        (inpaint.main, ["--click", "1"]),
    ):
        main(common + flags)
        assert {"pq", "sq", "rq", "ap50", "pq_with_background"} <= json.loads(
            (out / "x.json").read_text()
        ).keys()
        assert "AP50" in capsys.readouterr().out
    Image.fromarray(image).save(tmp_path / "photo.png")
    sample.main(common + ["--images", str(tmp_path / "photo.png"), "--trajectory"])
    assert Image.open(out / "predictions" / "photo.png").size == (60, 50)
    # more given ids than the model's N, and large ones: all of them stay
    given = np.zeros((50, 60), np.int32)
    given[::5, ::5] = 16_000_000 + np.arange(120).reshape(10, 12)
    data.write_id_png(tmp_path / "part.png", given)
    inpaint.main(
        common + ["--image", str(tmp_path / "photo.png"), "--mask", str(tmp_path / "part.png")]
    )
    done = data.read_id_png(out / "photo_completed.png")
    assert done.shape == given.shape and np.array_equal(done[given > 0], given[given > 0])


def test_connected_equals_flooding():
    def flood(ids):
        parts, todo = np.zeros(ids.shape, int), set(zip(*np.nonzero(ids)))
        while todo:
            front, number = [todo.pop()], parts.max() + 1
            while front:
                y, x = front.pop()
                parts[y, x] = number
                for place in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                    if place in todo and ids[place] == ids[y, x]:
                        todo.remove(place)
                        front.append(place)
        return parts

    for n, shape in enumerate([(40, 50), (64, 64), (1, 9), (9, 1), (1, 1)]):
        ids = np.random.default_rng(n).integers(0, 3, shape)
        parts, found = flood(ids), ae.connected(ids)
        if ids.any():
            parts[ids == np.bincount(ids[ids > 0]).argmax()] = (
                parts.max() + 1
            )  # the largest stays whole
            parts = np.unique(parts, return_inverse=True)[1].reshape(shape) + (ids > 0).all()
        assert (
            len(set(zip(parts.ravel(), found.ravel())))
            == len(np.unique(parts))
            == len(np.unique(found))
        )
        assert (
            found.dtype == np.int32
            and np.array_equal(found == 0, ids == 0)
            and found.max() == parts.max()
        )


def test_sets_are_mixed_in_turns_and_named(tmp_path, capsys):
    write_instances(tmp_path)
    both = data.open_training(
        ["shapes", str(tmp_path)], ["train2017", "val2017"], 16, 8, seed=2, min_area=0
    )
    apart = [
        data.open_training([name], [split], 16, 8, seed=2, min_area=0)
        for name, split in (("shapes", "train2017"), (str(tmp_path), "val2017"))
    ]
    for n in range(8):
        assert all(np.array_equal(a, b) for a, b in zip(both[n], apart[n % 2][n // 2]))
    flags = TINY_AE + [
        "--data",
        "shapes",
        str(tmp_path),
        "--iters",
        "2",
        "--out",
        str(tmp_path / "o"),
    ]
    ae.main(flags + ["--train_split", "train2017", "val2017"])
    assert f"shapes + {tmp_path}" in capsys.readouterr().out
    assert ae.load_autoencoder(tmp_path / "o" / "ae.pt").trained_with["data"] == "shapes"
    diffusion.main(
        [f for f in TINY_LDM if f not in ("--data", "shapes")]
        + [
            "--data",
            str(tmp_path),
            "shapes",
            "--train_split",
            "val2017",
            "--val_split",
            "val2017",
            "--iters",
            "1",
            "--connected",
            "--out",
            str(tmp_path / "o"),
        ]
    )
    model = sample.load(tmp_path / "o" / "ldm.pt")
    assert model.settings["data"] == str(tmp_path) and model.settings["connected"] is True
    image = [data.Shapes("v", 32)[0]["image"]]
    parts, _ = diffusion.predict(model, image, ["a"], 1)[0]
    model.settings["connected"] = False
    whole, _ = diffusion.predict(model, image, ["a"], 1)[0]
    assert np.array_equal(parts, ae.connected(whole))
    for bad in (
        ["--train_split", "a", "b", "c"],
        ["--train_split", "train2017", "val2017", "--data", "shapes"],
    ):
        with pytest.raises(SystemExit) as stop:
            ae.main(flags + bad)
        assert stop.value.code == 2 and "--train_split" in capsys.readouterr().err


def test_cached_latents_train_as_the_images_do(tmp_path, trained, capsys):
    break_panoptic(tmp_path)
    flags = [f for f in TINY_LDM if f not in ("--data", "shapes")] + [
        "--data",
        str(tmp_path),
        "--train_split",
        "val2017",
        "--val_split",
        "val2017",
        "--ae",
        str(trained / "ae.pt"),
        "--iters",
        "3",
        "--min_segment",
        "0",
        "--eval_images",
        "8",
    ]
    cache = ["--cache_latents", str(tmp_path / "cache")]
    diffusion.main(flags + ["--out", str(tmp_path / "plain")])
    capsys.readouterr()
    diffusion.main(flags + cache + ["--out", str(tmp_path / "cached")])
    assert "5 of 8 images left out, others" in capsys.readouterr().out
    plain, cached = (
        [e["loss"] for e in ae.read_log(tmp_path / d / "log.jsonl", "ldm") if "loss" in e]
        for d in ("plain", "cached")
    )
    assert (
        cached == pytest.approx(plain, rel=1e-3) and len(plain) == 3
    )  # the rounding to half precision; another image would show
    file, state = sorted((tmp_path / "cache").glob("*.npy"), key=lambda p: "state" in p.name)
    assert np.load(state).tolist() == [2] * 5 + [1] * 3
    good = np.load(file)
    source = data.open_data(str(tmp_path), "val2017")
    image = diffusion.network_input([source[6]["image"]], 32, "cpu")
    model = sample.load(tmp_path / "cached" / "ldm.pt")
    for k, x in enumerate((image, image.flip(-1))):
        assert torch.equal(torch.from_numpy(good[k, 6]), model.encode_image(x)[0].half())
    # killed on the way: what was not done is done, what was done stays
    half_done = np.load(file, mmap_mode="r+")
    half_done[:, 5] = 7
    half_done[:, 7] = 7
    marks = np.load(state, mmap_mode="r+")
    marks[7] = 0
    half_done.flush(), marks.flush()
    data.memory_map.cache_clear()
    diffusion.main(flags + cache + ["--out", str(tmp_path / "again"), "--num_workers", "1"])
    assert (
        np.array_equal(np.load(file)[:, 7], good[:, 7])
        and (np.load(file)[:, 5] == 7).all()
        and np.load(state)[7] == 1
    )
    # a file that was cut short, or another size: made anew
    file.write_bytes(file.read_bytes()[:1000])
    data.memory_map.cache_clear()
    diffusion.main(flags + cache + ["--out", str(tmp_path / "again")])
    assert np.array_equal(np.load(file), good)
    diffusion.main(flags + cache + ["--out", str(tmp_path / "again"), "--size", "48"])
    assert len(list((tmp_path / "cache").iterdir())) == 4
    for bad in (
        ["--crop", "16"],
        ["--turns"],
        ["--jitter", "0.1"],
        ["--classes", "with"],
        ["--data", "shapes"],
    ):
        with pytest.raises(SystemExit) as stop:
            diffusion.main(flags + cache + bad)
        assert stop.value.code == 2 and "--cache_latents" in capsys.readouterr().err


@pytest.mark.parametrize("arch", [ae.Autoencoder, ae.SDAutoencoder])
@pytest.mark.parametrize("factor", [4, 8])
def test_gradient_checkpointing_of_stage_1_gives_the_same_gradients(arch, factor):
    torch.manual_seed(0)
    model, ids, ran = arch(16, factor=factor, width=64), torch.randint(0, 16, (2, 64, 64)), []
    for name, layer in model.named_modules():
        if isinstance(layer, (torch.nn.GroupNorm, ae.Double)):
            layer.register_forward_hook(lambda *_, name=name: ran.append(name))

    def gradients():
        """The gradients of a step."""
        logits, mean, _ = model(ids, torch.zeros(2, 4, 64 // factor, 64 // factor))
        loss = logits.logsumexp(1).mean() + mean.square().mean()
        return torch.autograd.grad(
            loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True
        )

    before, once = gradients(), set(ran)
    assert len(ran) == len(once) > 2
    model.enable_gradient_checkpointing()
    ran.clear()
    after = gradients()
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(before, after)) and any(
        g is not None and g.any() for g in after
    )
    again = [name for name in once if ran.count(name) == 2]
    assert (
        all("norm" in n or n in ("encoder.13", "encoder.10", "decoder.8") for n in again)
        and len(again) > 1
    )  # but no Double: it ends a stage


def test_doubling_is_a_transposed_convolution():
    torch.manual_seed(0)
    ours, x = ae.Double(6, 5, 2, stride=2), torch.randn(3, 6, 4, 7)
    torch.testing.assert_close(
        ours(x), F.conv_transpose2d(x, ours.weight, ours.bias, stride=2), rtol=1e-5, atol=1e-6
    )


def test_steps_are_timed_beside_their_alternatives(tmp_path, capsys, monkeypatch):
    timed = data.side_by_side
    monkeypatch.setattr(
        data, "side_by_side", lambda functions, rounds, device: timed(functions, 1, device)
    )
    monkeypatch.setattr(
        ae.Meter, "limit_gigabytes", lambda self: 0.1
    )  # growth ends where memory would not do
    common = [
        "--bench",
        "--model",
        "small",
        "--size",
        "16",
        "--batch_size",
        "2",
        "--device",
        "cpu",
        "--json",
        str(tmp_path / "x.json"),
        "--out",
        str(tmp_path),
    ]
    ae.main(common)
    figures, printed = json.loads((tmp_path / "x.json").read_text()), capsys.readouterr().out
    ours, thrifty, plain = (
        figures["loss"][k] for k in ("without", "with --gradient_checkpointing", "straightforward")
    )
    assert (
        ours == thrifty == pytest.approx(plain, rel=1e-5) and ours > 1
    )  # all forms give the same value
    assert (
        figures["seconds"].keys() == figures["loss"].keys()
        and figures["tflops"] > 0 < figures["matmul_tflops"]
    )
    assert "batch 2: left out, it would take some" in printed and list(figures["by_batch"]) == ["1"]
    diffusion.main(common + ["--size", "32", "--self_cond", "1"])
    figures, printed = json.loads((tmp_path / "x.json").read_text()), capsys.readouterr().out
    assert {"UNet alone", "step, image latents cached", "step, images encoded"} <= figures[
        "seconds"
    ].keys() and "left out" in printed
    assert "self-conditioning on 100%" in printed and set(figures["passes"]) == {
        "channels_last",
        "contiguous",
        "channels_last, bf16",
    }
    for main, bad in (
        (ae.main, ["--size", "30"]),
        (diffusion.main, ["--size", "48"]),
        (ae.main, ["--kl", "0", "1"]),
        (diffusion.main, ["--crop", "99999"]),
    ):
        with pytest.raises(SystemExit) as stop:
            main(common + bad)
        assert stop.value.code == 2 and bad[0] in capsys.readouterr().err


def test_compiling_changes_no_mask_and_happens_once(tmp_path, trained, monkeypatch):
    from torch._dynamo.utils import counters

    compiled = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, mode: compiled(self, backend="eager")
    )  # traced, but no C++ compiler
    flags = [
        "--ckpt",
        str(trained / "ldm.pt"),
        "--limit",
        "4",
        "--steps",
        "5",
        "--device",
        "cpu",
        "--num_workers",
        "0",
        "--out",
        str(tmp_path),
    ]
    counters.clear()
    for name, more in (("plain", []), ("compiled", ["--compile"])):
        sample.main(flags + more + ["--json", str(tmp_path / name)])
        shutil.copy(tmp_path / "sample.png", tmp_path / f"{name}.png")
    assert (tmp_path / "plain.png").read_bytes() == (tmp_path / "compiled.png").read_bytes()
    assert 0 < counters["stats"]["unique_graphs"] < 4  # not one for every timestep
    plain, same = (
        json.loads((tmp_path / name).read_text())["pq"] for name in ("plain", "compiled")
    )
    assert plain == same


def test_running_out_of_memory_is_one_line(trained, tmp_path, capsys, monkeypatch):
    def full(*_):
        """What CUDA says when a model does not fit."""
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(diffusion.LDM, "sample", full)
    one_line_error(
        capsys,
        sample.main,
        [
            "--ckpt",
            str(trained / "ldm.pt"),
            "--limit",
            "2",
            "--num_workers",
            "0",
            "--device",
            "cpu",
            "--out",
            str(tmp_path),
        ],
        "out of memory",
        "--batch_size",
    )
    monkeypatch.setattr(
        diffusion.LDM, "sample", lambda *_: 1 / 0
    )  # a mistake of ours keeps its traceback
    with pytest.raises(ZeroDivisionError):
        sample.main(
            [
                "--ckpt",
                str(trained / "ldm.pt"),
                "--limit",
                "2",
                "--num_workers",
                "0",
                "--device",
                "cpu",
                "--out",
                str(tmp_path),
            ]
        )


def test_growth_is_foreseen_along_a_line(capsys, monkeypatch):
    """14 GB that are there anyway and 0.3 GB a sample, with 24 GB in all, of which nine tenths are used: batches up to 16 fit, and of 32 it is known that they would not."""
    meter, now = ae.Meter(torch.device("cpu")), [14.0]
    monkeypatch.setattr(meter, "reset", lambda: now.__setitem__(0, 14.0))
    monkeypatch.setattr(meter, "gigabytes", lambda: now[0])
    monkeypatch.setattr(meter, "limit_gigabytes", lambda: 24.0)
    step = lambda batch: now.__setitem__(0, 14 + 0.3 * batch)
    grown = meter.growth("batch", {b: (b, lambda b=b: b) for b in (1, 2, 4, 8, 16, 32, 64)}, step)
    assert {k: v["gigabytes"] for k, v in grown.items()} == pytest.approx(
        {str(b): 14 + 0.3 * b for b in (1, 2, 4, 8, 16)}
    )
    assert "batch 32: left out, it would take some 24 GB" in capsys.readouterr().out
    meter = ae.Meter(torch.device("cpu"))  # the real one, where the system can tell
    meter.reset()
    before, block = meter.gigabytes(), np.ones(1 << 27, np.uint8)
    assert meter.gigabytes() - before > 0.1 and meter.limit_gigabytes() > 0.1
    del block
    meter.reset()
    assert sys.platform != "linux" or meter.gigabytes() < before + 0.1


def test_votes_join_samples_by_majority(trained):
    truth = np.ones((8, 8), np.int32)  # background, two touching objects, one more
    truth[1:4, 1:3], truth[1:4, 3:5], truth[6:, 6:] = 2, 3, 4
    merged, lost, shifted = (truth.copy() for _ in range(3))
    merged[truth == 3], lost[truth == 4] = 2, 1
    shifted[4, 1:3] = 2
    renamed = np.array([0, 7, 5, 2, 3], np.int32)[shifted]  # each sample has ids of its own
    sure = [np.full((8, 8), c, np.float32) for c in (0.9, 0.6, 0.3)]
    ids, certainty = sample.consensus(
        list(zip((merged, lost, renamed), sure))
    )  # each is wrong elsewhere, two are right everywhere
    assert (
        ids.dtype == np.int32
        and len(np.unique(np.stack([ids, truth]).reshape(2, -1), axis=1).T)
        == len(np.unique(ids))
        == 4
    )
    assert (
        np.allclose(certainty[truth == 3], 0.45)
        and np.allclose(certainty[truth == 4], 0.6)
        and np.allclose(certainty[0], 0.6)
    )

    ids, _ = sample.consensus(
        [(np.where(m == 4, 0, m), sure[0]) for m in (truth, truth)] + [(truth, sure[0])]
    )
    assert (ids[truth == 4] == 0).all() and (
        ids[truth != 4] > 0
    ).all()  # most samples see nothing there
    ids, _ = sample.consensus([(truth, sure[0]), (np.where(truth == 4, 0, truth), sure[0])])
    assert (ids > 0).all()  # void loses a tie

    disjoint = [
        np.zeros((8, 8), np.int32) for _ in range(2)
    ]  # id 6 is one object though its parts never overlap
    disjoint[0][:2], disjoint[1][4:6] = 6, 6
    ids, _ = sample.consensus(
        [(np.where(truth == 2, 9, m), sure[0]) for m in disjoint], shared=[0, 6]
    )
    assert (
        set(np.unique(ids)) == {0, 6, 7}
        and (ids[truth == 2] == 7).all()
        and (ids[5] == 6).all()
        and (ids[6:] == 0).all()
    )

    model, image = tiny_ldm(trained, min_area=0), data.Shapes("v", 32)[0]["image"]
    once, thrice = (sample.predict(model, [image], ["a"], 2, votes=k)[0] for k in (1, 3))
    each = [diffusion.predict(model, [image], [key], 2)[0] for key in ("a", "a vote 1", "a vote 2")]
    assert (
        np.array_equal(once[0], each[0][0])
        and np.array_equal(thrice[0], sample.consensus(each)[0])
        and (each[0][0] != each[1][0]).any()
    )


def test_instances_count_alone_where_the_rest_is_one_background():
    truth = np.ones((10, 10), np.int32)
    truth[:4, :4], truth[6:, 6:] = 2, 3
    sample_ = {
        "ids": truth,
        "file_name": "x",
        "background_id": 9,
        "segments_info": [
            {"id": 1, "category_id": 9},
            {"id": 2, "category_id": 5},
            {"id": 3, "category_id": 5},
        ],
    }
    found = np.full((10, 10), 7, np.int32)  # the background: left out
    found[:4, :3], found[8:, 8:], found[0, 9] = (
        4,
        5,
        6,
    )  # IoU 0.75; IoU 0.25; on the background alone
    score = ae.Score()
    score.update(sample_, found)
    figures = score.result()
    assert figures["ap50"] == pytest.approx(1 / (1 + 2 + 1)) and figures["pq"] == pytest.approx(
        0.75 / (1 + 0.5 * 2 + 0.5 * 1)
    )
    both = 68 - 1
    assert figures["pq_with_background"] == pytest.approx(
        (0.75 + both / (68 + 4 + 12)) / (2 + 0.5 * 2 + 0.5 * 1)
    )
    del sample_["background_id"]
    score = ae.Score()
    score.update(sample_, found)
    assert (
        score.result().keys() == {"pq", "sq", "rq"}
        and score.result()["pq"] == figures["pq_with_background"]
    )


def test_a_click_is_a_disc_inside_its_segment():
    ids = np.zeros((20, 20), np.int32)
    ids[2:13, 2:13], ids[15:17, 3:19] = 1, 2
    given = inpaint.discs(ids, [1, 2, 3], 3)
    y, x = np.nonzero(given & (ids == 1))
    assert (
        given.sum() == (given & (ids > 0)).sum() and len(y) == 29 and (y.mean(), x.mean()) == (7, 7)
    )
    assert (given & (ids == 2)).sum() == 12 and not inpaint.discs(ids, [1], 3)[15:].any()


def test_sampling_a_model_that_knows_the_answer(trained):
    """With the network replaced by the true noise, Algorithm 2 ends at the latent, and Algorithm 3 too."""
    model = tiny_ldm(trained)
    z = torch.randn(2, 4, 8, 8)
    model.denoise = (
        lambda zj, image_latent, self_cond, j: (zj - model.ddim.scales(j, z)[0] * z)
        / model.ddim.scales(j, z)[1]
    )
    latent, noise = torch.zeros(2, 48, 8, 8), torch.randn(2, 4, 8, 8)
    for steps in (1, 5):
        trace = []
        assert (
            torch.allclose(model.sample(latent, noise, steps, trace=trace), z, atol=1e-2)
            and len(trace) == steps
        )
    M = torch.zeros(2, 1, 8, 8)
    M[:, :, :4] = 1
    assert torch.allclose(
        inpaint.inpaint(model, latent, z, M, noise, torch.randn_like(z), 5), z, atol=1e-2
    )


def test_inpainting_holds_the_given_cells(trained):
    model = tiny_ldm(trained)
    z_known, noise, seen = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8), []
    original = model.denoise

    def spy(zj, image_latent, self_cond, j):
        seen.append((j, zj.clone(), self_cond.clone()))
        return original(zj, image_latent, self_cond, j)

    model.denoise, M, eps0 = spy, torch.zeros(1, 1, 8, 8), torch.randn(1, 4, 8, 8)
    M[..., :3] = 1
    z0 = inpaint.inpaint(model, torch.zeros(1, 48, 8, 8), z_known, M, noise, eps0, 4)
    assert torch.equal(z0[..., :3], z_known[..., :3]) and not torch.allclose(
        z0[..., 3:], z_known[..., 3:]
    )
    for j, zj, self_cond in seen:
        assert torch.allclose(zj[..., :3], model.ddim.add_noise(z_known, eps0, j)[..., :3])
    assert not seen[0][2].any() and torch.equal(seen[1][2][..., :3], z_known[..., :3])


def test_renoise_draws_new_noise_at_every_step(trained):
    """Without it the step is DDIM's; with it the sample is z^0 noised anew, the same for an image in any batch."""
    model, fresh = tiny_ldm(trained, min_area=0), diffusion.fresh_noise(
        0, ["a", "b"], (4, 8, 8), "cpu"
    )
    assert torch.equal(fresh(99), fresh(99)) and not torch.equal(fresh(99), fresh(199))
    z, z0 = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    assert torch.equal(
        model.ddim.step(z, z0, 199, 99, fresh(199)), model.ddim.add_noise(z0, fresh(199), 99)
    )
    images = [s["image"] for s in (data.Shapes("v", 32)[i] for i in range(2))]
    run = lambda chosen, renoise: sample.segment_batch(
        model, [images[i] for i in chosen], chosen, steps=3, threshold=0, renoise=renoise
    )
    assert (run([0, 1], True)[1] == run([1], True)[0]).mean() > 0.99 and (
        run([1], True)[0] != run([1], False)[0]
    ).any()


def test_votes_of_completions_keep_the_given_ids(trained, monkeypatch):
    model, scene, calls, draw = (
        tiny_ldm(trained, min_area=0),
        data.Shapes("v", 32)[0],
        [],
        inpaint.complete_tiles,
    )
    monkeypatch.setattr(
        inpaint,
        "complete_tiles",
        lambda *args: calls.append((args[3], draw(*args))) or calls[-1][1],
    )
    given = np.zeros((32, 32), np.int32)
    given[:8, :8], given[20:, 4:12] = 3, 5
    ids = inpaint.complete(model, [scene["image"]], [given], ["x"], 2, threshold=0, votes=3)[0]
    assert [c[0] for c in calls] == [["x"], ["x vote 1"], ["x vote 2"]] and (
        ids[given > 0] == given[given > 0]
    ).all()
    each = np.stack([found[0][0] for _, found in calls])
    for i in (3, 5):  # a given id means the same in all samples
        assert (ids[(each == i).sum(0) >= 2] == i).all()
    assert all(i in (0, 3, 5) or i > 5 for i in np.unique(ids))


def test_drop_blocks():
    rng = np.random.default_rng(0)
    given = inpaint.drop_blocks(64, 0.3, 8, rng)
    cells = given.reshape(8, 8, 8, 8).transpose(0, 2, 1, 3).reshape(64, 64)
    assert ((cells.mean(1) == 0) | (cells.mean(1) == 1)).all()
    assert np.mean(
        [inpaint.drop_blocks(64, 0.3, 4, rng).mean() for _ in range(200)]
    ) == pytest.approx(0.7, abs=0.02)
    assert (
        inpaint.drop_blocks(50, 0.0, 8, rng).all()
        and not inpaint.drop_blocks(50, 1.0, 8, rng).any()
    )


def test_sample_evaluates_and_writes_json(tmp_path, trained, capsys):
    sample.main(
        [
            "--ckpt",
            str(trained / "ldm.pt"),
            "--limit",
            "5",
            "--steps",
            "2",
            "3",
            "--batch_size",
            "2",
            "--num_workers",
            "0",
            "--out",
            str(tmp_path),
            "--json",
            str(tmp_path / "r.json"),
            "--device",
            "cpu",
        ]
    )
    result = json.loads((tmp_path / "r.json").read_text())
    assert (
        result["images"] == 5
        and {"pq", "sq", "rq", "seconds_per_image"} <= result.keys()
        and set(result["by_steps"]) == {"2", "3"}
    )
    assert (
        (tmp_path / "sample.png").exists()
        and (tmp_path / "sample_steps.png").exists()
        and "PQ" in capsys.readouterr().out
    )


def from_scenes(root, scenes, count, split="val2017"):
    """The first of some scenes as a folder in COCO panoptic layout."""
    for d in ("annotations", split, f"panoptic_{split}"):
        (root / d).mkdir(parents=True)
    content = {"images": [], "annotations": [], "categories": scenes.categories}
    for i in range(count):
        s, name = scenes[i], f"{i:03d}.png"
        Image.fromarray(s["image"]).save(root / split / name)
        data.write_id_png(root / f"panoptic_{split}" / name, s["ids"])
        content["images"].append({"id": i, "file_name": name})
        content["annotations"].append(
            {"image_id": i, "file_name": name, "segments_info": s["segments_info"]}
        )
    (root / "annotations" / f"panoptic_{split}.json").write_text(json.dumps(content))


def test_classes_are_evaluated_and_written(tmp_path, labelled, capsys):
    """Figures of evaluation, predictions.json and pq.py agree on the same scenes, which stand in a folder as a user's would."""
    from_scenes(tmp_path / "d", data.Shapes("val2017", 32), 4)
    flags = [
        "--ckpt",
        str(labelled / "ldm.pt"),
        "--steps",
        "2",
        "--threshold",
        "0",
        "--min_area",
        "0",
        "--num_workers",
        "0",
        "--device",
        "cpu",
    ]
    sample.main(
        flags
        + [
            "--data",
            str(tmp_path / "d"),
            "--out",
            str(tmp_path),
            "--json",
            str(tmp_path / "r.json"),
        ]
    )
    result, printed = json.loads((tmp_path / "r.json").read_text()), capsys.readouterr().out
    assert (
        {"pq_classes", "pq_things", "pq_stuff", "label_accuracy"} <= result.keys()
        and "Stuff" in printed
        and "labelled rightly" in printed
    )
    sample.main(flags + ["--images", str(tmp_path / "d" / "val2017"), "--out", str(tmp_path / "o")])
    content = json.loads((tmp_path / "o" / "predictions.json").read_text())
    segments = [s for a in content["annotations"] for s in a["segments_info"]]
    assert (
        [c["name"] for c in content["categories"]] == list(data.KINDS)
        and all(0.2 < s["score"] <= 1 for s in segments)
        and len(segments) > 3
    )
    for a in content["annotations"]:
        assert sum(s["category_id"] == 1 for s in a["segments_info"]) <= 1  # background is stuff
    truth = tmp_path / "d" / "annotations" / "panoptic_val2017.json"
    pq.main(
        [
            "--gt",
            str(truth),
            "--gt_dir",
            str(tmp_path / "d" / "panoptic_val2017"),
            "--pred",
            str(tmp_path / "o" / "predictions.json"),
        ]
    )
    assert "Stuff" in capsys.readouterr().out
    ids, info = sample.segment(
        sample.load(labelled / "ldm.pt"),
        Image.open(tmp_path / "d" / "val2017" / "001.png"),
        steps=2,
        threshold=0,
    )
    assert {s["category_id"] for s in info} <= {1, 2, 3, 4, 5} and {s["id"] for s in info} == set(
        np.unique(ids).tolist()
    ) - {0}
    write_panoptic(tmp_path / "other")  # cat and sky: not what the classifier knows
    data.say_once.cache_clear()
    sample.main(
        flags
        + [
            "--data",
            str(tmp_path / "other"),
            "--out",
            str(tmp_path),
            "--json",
            str(tmp_path / "r.json"),
        ]
    )
    assert (
        "pq_classes" not in json.loads((tmp_path / "r.json").read_text())
        and "class-agnostic PQ only" in capsys.readouterr().err
    )


def test_two_processes_evaluate_like_one(tmp_path, trained):
    """Five images over two ranks: each is counted once, and the figures are those of one process."""
    flags = [
        str(HERE / "sample.py"),
        "--ckpt",
        str(trained / "ldm.pt"),
        "--limit",
        "5",
        "--steps",
        "2",
        "--num_workers",
        "0",
        "--device",
        "cpu",
        "--threshold",
        "0",
        "--min_area",
        "0",
        "--out",
        str(tmp_path),
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    for name, launcher in (
        ("one", []),
        ("two", ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]),
    ):
        done = subprocess.run(
            [sys.executable, *launcher, *flags, "--json", str(tmp_path / name)],
            env=env,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0 and done.stdout.count("PQ") == 1, done.stderr[-2000:]
    one, two = (json.loads((tmp_path / n).read_text()) for n in ("one", "two"))
    assert one["images"] == two["images"] == 5 and all(
        one[k] == pytest.approx(two[k], abs=1e-6) for k in ("pq", "sq", "rq")
    )


def test_sample_segments_any_pictures_and_pq_reads_them_back(tmp_path, trained, capsys):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    Image.new("L", (33, 21), 99).save(pictures / "000042.png")
    Image.new("RGBA", (1, 1)).save(pictures / "dot.webp")
    Image.new("P", (200, 30)).save(pictures / "wide.gif")
    Image.fromarray(np.arange(400, dtype=np.uint16).reshape(20, 20) * 99).save(
        pictures / "deep.tif"
    )
    (pictures / "notes.txt").write_text("not a picture")
    sample.main(
        [
            "--ckpt",
            str(trained / "ldm.pt"),
            "--images",
            str(pictures),
            "--steps",
            "2",
            "--out",
            str(tmp_path / "o"),
            "--threshold",
            "0",
            "--min_area",
            "0",
            "--device",
            "cpu",
        ]
    )
    content = json.loads((tmp_path / "o" / "predictions.json").read_text())
    assert {a["image_id"] for a in content["annotations"]} == {
        42,
        "dot",
        "wide",
        "deep",
    } and content["categories"][0]["name"] == "object"
    for a in content["annotations"]:
        ids = data.read_id_png(tmp_path / "o" / "predictions" / a["file_name"])
        assert {s["id"]: s["area"] for s in a["segments_info"]} == {
            int(i): int((ids == i).sum()) for i in np.unique(ids) if i
        }
        assert (tmp_path / "o" / "overlays" / a["file_name"]).exists()
    assert data.read_id_png(tmp_path / "o" / "predictions" / "wide.png").shape == (30, 200)
    truth = tmp_path / "o" / "predictions.json"
    capsys.readouterr()
    pq.main(["--gt", str(truth), "--pred", str(truth), "--class_agnostic"])
    assert "100.0  100.0  100.0" in capsys.readouterr().out


def test_untrained_models_are_timed(tmp_path, capsys):
    sample.main(
        [
            "--bench",
            "small",
            "--size",
            "32",
            "--steps",
            "1",
            "3",
            "--batch_size",
            "2",
            "--device",
            "cpu",
            "--out",
            str(tmp_path),
            "--json",
            str(tmp_path / "b.json"),
        ]
    )
    figures = json.loads((tmp_path / "b.json").read_text())
    assert figures["by_steps"].keys() == {"1", "3"} and all(
        figures[k] > 0 for k in ("image_encoder", "unet_step", "decoder", "postprocess")
    )
    assert all(row["in_all"] > row["sampling"] > 0 for row in figures["by_steps"].values())
    assert (
        figures["tflops"] > 0
        and "64" in figures["by_batch"]
        and set(figures["by_size"]) == {"16", "32", "64"}
    )
    with torch.device(
        "meta"
    ):  # Stable Diffusion 1.4 by its architecture: the paper's 860 M, 84 M of them the VAE's
        unet, vae = ae.load_sd("none", "unet"), ae.load_sd("none", "vae")
    assert [sum(p.numel() for p in m.parameters()) for m in (unet, vae)] == [
        859_520_964,
        83_653_863,
    ]


def test_sample_evaluates_a_cityscapes_folder(tmp_path, trained, capsys):
    """Names as cityscapesScripts' createPanopticImgs.py writes them: city folders, _gtFine_ in the JSON alone."""
    write_panoptic(tmp_path / "c", "val", sub="frankfurt", suffix="_gtFine_panoptic.png")
    path = tmp_path / "c" / "annotations" / "panoptic_val.json"
    path.write_text(
        re.sub(
            r'"file_name": "(\d+).png"',
            r'"file_name": "\1_gtFine_leftImg8bit.png"',
            path.read_text(),
        )
    )
    for image in (tmp_path / "c" / "val" / "frankfurt").iterdir():
        image.rename(image.with_name(image.stem + "_leftImg8bit.png"))
    sample.main(
        [
            "--ckpt",
            str(trained / "ldm.pt"),
            "--data",
            str(tmp_path / "c"),
            "--split",
            "val",
            "--steps",
            "1",
            "--num_workers",
            "0",
            "--out",
            str(tmp_path),
            "--json",
            str(tmp_path / "r.json"),
        ]
    )
    assert json.loads((tmp_path / "r.json").read_text())["images"] == 3


def test_agreement_by_hand():
    a = np.array([[1, 1, 2, 2]])
    assert np.array_equal(
        sample.agreement([a, a * 3, 7 - a]), np.ones((1, 4))
    )  # other ids, the same segments
    b = np.array([[5, 5, 5, 0]])
    assert np.allclose(
        sample.agreement([a, b]), [[2 / 3, 2 / 3, 1 / 4, 0]]
    )  # void agrees with nothing
    assert np.allclose(
        sample.agreement([a, a, b]), (1 + 2 * np.array([[2 / 3, 2 / 3, 1 / 4, 0]])) / 3
    )


def test_seeds_are_compared_and_the_trajectory_is_drawn(tmp_path, trained, capsys):
    flags = [
        "--ckpt",
        str(trained / "ldm.pt"),
        "--limit",
        "3",
        "--steps",
        "4",
        "--num_workers",
        "0",
        "--device",
        "cpu",
        "--out",
        str(tmp_path),
    ]
    sample.main(
        flags
        + [
            "--seeds",
            "0",
            "7",
            "--trajectory",
            "--threshold",
            "0",
            "--min_area",
            "0",
            "--json",
            str(tmp_path / "s.json"),
        ]
    )
    result = json.loads((tmp_path / "s.json").read_text())
    assert (
        set(result["by_seed"]) == {"0", "7"}
        and 0 <= result["agreement"] <= 1
        and result["images"] == 3
    )
    with Image.open(tmp_path / "seeds.png") as sheet, Image.open(
        tmp_path / "trajectory.gif"
    ) as movie:
        assert (
            sheet.size == (3 * 164, 18 + 6 * 164)
            and movie.n_frames == 4
            and movie.size == (2 * 164, 3 * 164)
        )
    one_line_error(capsys, sample.main, flags + ["--seeds", "1", "1"], "--seeds")
    # pictures of any size take part as well
    (tmp_path / "in").mkdir()
    for name, shape in ("wide", (40, 90, 3)), ("tall", (90, 40, 3)):
        Image.fromarray(np.arange(40 * 90 * 3, dtype=np.uint8).reshape(shape)).save(
            tmp_path / "in" / f"{name}.png"
        )
    (tmp_path / "in" / "broken.png").write_bytes(b"nothing")
    one_line_error(
        capsys, sample.main, flags + ["--images", str(tmp_path / "in"), "--trajectory"], "1 of 3"
    )
    with Image.open(tmp_path / "trajectory.gif") as movie, Image.open(
        tmp_path / "sample.png"
    ) as sheet:
        assert movie.size == (2 * 164, 2 * 164) and sheet.size == (3 * 260, 18 + 2 * 260)


def test_what_works_in_one_process_refuses_more(tmp_path, trained, capsys, monkeypatch):
    monkeypatch.setattr(ae, "setup", lambda args: (torch.device("cpu"), 0, 2))
    for main, flags in (
        (inpaint.main, ["--ckpt", str(trained / "ldm.pt")]),
        (sample.main, ["--bench", "small"]),
        (ae.main, ["--bench"]),
        (sample.main, ["--ckpt", str(trained / "ldm.pt"), "--seeds", "0", "1"]),
    ):
        one_line_error(capsys, main, flags + ["--out", str(tmp_path)], "without torchrun")


def test_inpaint_evaluates_drops_and_sweeps(tmp_path, trained, capsys):
    flags = [
        "--ckpt",
        str(trained / "ldm.pt"),
        "--limit",
        "3",
        "--steps",
        "2",
        "--num_workers",
        "0",
        "--out",
        str(tmp_path),
        "--json",
        str(tmp_path / "r.json"),
        "--device",
        "cpu",
    ]
    inpaint.main(flags + ["--drop", "0", "--block", "8"])
    result = json.loads((tmp_path / "r.json").read_text())
    assert (
        result["pq"] == result["pq_input"] == 100
        and result["images"] == 3
        and (tmp_path / "inpaint.png").exists()
    )  # all given: all kept
    inpaint.main(flags + ["--drop", "0.5", "--block", "8"])
    assert json.loads((tmp_path / "r.json").read_text())["pq_input"] < 100
    inpaint.main(flags + ["--sweep"])
    result = json.loads((tmp_path / "r.json").read_text())
    assert (
        result["blocks"] == [1, 2, 4, 8]
        and len(result["pq_by_drop"]) == 5
        and (tmp_path / "inpaint_sweep.png").exists()
    )


def test_inpainting_a_users_mask_keeps_its_ids_and_pixels(tmp_path, trained):
    given = np.zeros((40, 60), np.int32)
    given[5:20, 5:30], given[25:, 40:] = 900_001, 3
    Image.new("RGB", (60, 40), "navy").save(tmp_path / "x.png")
    data.write_id_png(tmp_path / "m.png", given)
    inpaint.main(
        [
            "--ckpt",
            str(trained / "ldm.pt"),
            "--image",
            str(tmp_path / "x.png"),
            "--mask",
            str(tmp_path / "m.png"),
            "--steps",
            "2",
            "--threshold",
            "0",
            "--min_area",
            "0",
            "--out",
            str(tmp_path / "o"),
            "--device",
            "cpu",
        ]
    )
    ids = data.read_id_png(tmp_path / "o" / "x_completed.png")
    assert np.array_equal(ids[given > 0], given[given > 0]) and (ids > 0).mean() > 0.5
    listed = json.loads((tmp_path / "o" / "x_completed.json").read_text())["segments_info"]
    assert {s["id"] for s in listed} == set(np.unique(ids).tolist()) - {0} and {900_001, 3} <= {
        s["id"] for s in listed
    }


def test_without_a_checkpoint_the_shipped_weights_are_used(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if not (HERE / "assets" / "shapes.pt").exists():
        pytest.fail("assets/shapes.pt is not there")
    sample.main(
        [
            "--limit",
            "16",
            "--steps",
            "10",
            "--num_workers",
            "0",
            "--out",
            str(tmp_path),
            "--json",
            str(tmp_path / "r.json"),
        ]
    )
    assert "shapes.pt" in capsys.readouterr().err
    assert json.loads((tmp_path / "r.json").read_text())["pq"] > 50


def test_the_shipped_nuclei_weights_find_nuclei_in_a_picture_of_any_size(tmp_path):
    picture, places = Image.new("RGB", (110, 90), (12, 12, 12)), (
        (25, 25, 10),
        (70, 30, 9),
        (50, 65, 11),
        (95, 70, 8),
    )
    for x, y, r in places:
        ImageDraw.Draw(picture).ellipse((x - r, y - r, x + r, y + r), fill=(150, 150, 150))
    picture.save(tmp_path / "tile.png")
    sample.main(
        [
            "--ckpt",
            str(HERE / "assets" / "nuclei.pt"),
            "--images",
            str(tmp_path / "tile.png"),
            "--steps",
            "10",
            "--votes",
            "4",
            "--renoise",
            "--num_workers",
            "0",
            "--device",
            "cpu",
            "--out",
            str(tmp_path),
        ]
    )
    ids = data.read_id_png(tmp_path / "predictions" / "tile.png")
    own = [
        (ids == ids[y, x]).sum() / (3.14 * r * r)
        for x, y, r in places
        if ids[y, x] not in (0, ids[2, 2])
    ]
    assert (
        ids.shape == (90, 110)
        and sum(0.6 < area < 1.6 for area in own) >= 3
        and ids[2, 2] == ids[85, 105] != 0
    )


# ------------------------------------------------------------------------- what a training on a shared machine meets

FORK = multiprocessing.get_context(
    "forkserver"
)  # children that have imported everything: a training starts in no time
FORK.set_forkserver_preload(["inpaint", "torch.testing"])
START_METHOD = (
    "fork"
    if sys.platform == "linux" and sys.version_info < (3, 14)
    else multiprocessing.get_start_method()
)
KILLS = int(os.environ.get("LDMSEG_KILLS", 3))


def child(module, argv, env, limit):
    os.environ.update(env)
    multiprocessing.set_start_method(
        START_METHOD, force=True
    )  # as in a process that the shell started
    torch.set_num_threads(1)
    if limit:  # a full disk: no file grows beyond so many bytes
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    sys.stderr = open(Path(argv[argv.index("--out") + 1]) / "stderr", "w")
    {"ae": ae, "ldm": diffusion}[module].main(argv)


def start_training(stage, argv, out, world=1, limit=0):
    """Start a training of `world` processes in the background."""
    out.mkdir(exist_ok=True)
    with socket.socket() as s:
        s.bind(("localhost", 0))
        env = (
            {
                "WORLD_SIZE": str(world),
                "MASTER_ADDR": "localhost",
                "MASTER_PORT": str(s.getsockname()[1]),
            }
            if world > 1
            else {}
        )
    ranks = [
        FORK.Process(
            target=child,
            args=(
                stage,
                argv + ["--out", str(out)],
                {**env, "RANK": str(r), "LOCAL_RANK": str(r)},
                limit,
            ),
        )
        for r in range(world)
    ]
    for p in ranks:
        p.start()
    return ranks


def finish(ranks, seconds=120):
    """Wait for a training: the exit codes of its processes."""
    for p in ranks:
        p.join(seconds)
        assert p.exitcode is not None, "the training hangs"
    return [p.exitcode for p in ranks]


def same_run(stage, a, b):
    """Weights, average, optimiser and losses of two runs are the same to the bit."""
    one, two = (torch.load(folder / f"{stage}_state.pt", weights_only=True) for folder in (a, b))
    assert one["iteration"] == two["iteration"]
    pick = lambda s: [
        v
        for k in ("weights", "unet", "classifier", "average", "optimizer")
        if k in s
        for v in leaves(s[k])
    ]
    assert len(pick(one)) == len(pick(two)) > 10 and all(
        torch.equal(x, y) for x, y in zip(pick(one), pick(two))
    )
    losses = [
        [
            (e["iteration"], e["loss"])
            for e in ae.read_log(folder / "log.jsonl", stage)
            if "loss" in e
        ]
        for folder in (a, b)
    ]
    assert losses[0] == losses[1] and len(losses[0]) > 2


@pytest.mark.parametrize(
    "stage, world", [("ae", 1), ("ae", 2), ("ldm", 1), ("ldm", 2), ("classifier", 1)]
)
def test_a_killed_training_resumes_to_the_same_bits(tmp_path, trained, stage, world):
    """SIGKILL at random moments, every third one while a file is being written; `make test-long` tries more often."""
    flags = {
        "ae": TINY_AE,
        "ldm": TINY_LDM + ["--ae", str(trained / "ae.pt")],
        "classifier": TINY_LDM + ["--ckpt", str(trained / "ldm.pt"), "--classes", "only"],
    }[stage]
    if stage == "ae":  # five files, so that kills come in mid-epoch
        write_panoptic(tmp_path / "data", count=5, size=(32, 30))
        flags = flags + [
            "--data",
            str(tmp_path / "data"),
            "--train_split",
            "val2017",
            "--val_split",
            "val2017",
        ]
    stage = stage.replace("classifier", "ldm")
    flags = flags + [
        "--iters",
        "9",
        "--save_every",
        "1",
        "--log_every",
        "3",
        "--eval_every",
        "5",
        "--num_workers",
        "1",
    ]
    start_training(stage, ["--help"], tmp_path / "warm")[
        0
    ].join()  # the imports are not part of the span
    began = time.time()
    assert finish(start_training(stage, flags, tmp_path / "whole", world)) == [0] * world
    span, rng, hits = time.time() - began, np.random.default_rng((world, len(stage))), 0
    cut, resume = tmp_path / "cut", lambda: (
        ["--resume"] if (cut / f"{stage}_state.pt").exists() else []
    )
    for kill in range(KILLS):
        ranks, until = (
            start_training(stage, flags + resume(), cut, world),
            time.time() + rng.uniform(0.1, 1) * span,
        )
        while (kill % 3 == 0 or time.time() < until) and all(p.is_alive() for p in ranks):
            if kill % 3 == 0 and any(cut.glob("*.tmp")):
                hits += 1
                break
            time.sleep(0.0002)
        for p in ranks:
            p.kill()
        finish(ranks)
    assert hits  # one was killed within the write
    assert finish(start_training(stage, flags + resume(), cut, world)) == [0] * world
    same_run(stage, tmp_path / "whole", cut)
    if stage == "ldm":
        assert diffusion.load_ldm(cut / "ldm.pt")


@pytest.mark.parametrize(
    "stage, world, number",
    [("ae", 1, signal.SIGTERM), ("ldm", 1, signal.SIGUSR1), ("ldm", 2, signal.SIGINT)],
)
def test_a_signal_saves_and_ends_the_training(tmp_path, trained, stage, world, number):
    flags = {"ae": TINY_AE, "ldm": TINY_LDM + ["--ae", str(trained / "ae.pt")]}[stage] + [
        "--schedule",
        "constant",
    ]
    cut = tmp_path / "cut"
    ranks = start_training(stage, flags + ["--iters", "100000"], cut, world)
    while not (cut / "log.jsonl").exists() or len((cut / "log.jsonl").read_text().splitlines()) < 3:
        assert all(p.is_alive() for p in ranks)
        time.sleep(0.01)
    os.kill(ranks[-1].pid, number)  # one process: the others must hear of it
    assert finish(ranks) == [128 + number] * world
    assert "Traceback" not in (cut / "stderr").read_text()
    last = torch.load(cut / f"{stage}_state.pt", weights_only=True)["iteration"]
    assert (
        finish(start_training(stage, flags + ["--iters", str(last + 2), "--resume"], cut, world))
        == [0] * world
    )
    assert (
        finish(start_training(stage, flags + ["--iters", str(last + 2)], tmp_path / "whole", world))
        == [0] * world
    )
    same_run(stage, tmp_path / "whole", cut)


@pytest.mark.parametrize(
    "kind, share", [("limit", 0.1), ("limit", 0.6), ("tmpfs", 0.6), ("tmpfs", 0.95)]
)
def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, kind, share):
    out = tmp_path / "out"
    flags = TINY_AE + ["--eval_every", "1000", "--save_every", "2"]
    assert finish(start_training("ae", flags + ["--iters", "2"], out)) == [0]
    for name in ("ae.png", "ae_loss.png"):
        (out / name).unlink()
    state = out / "ae_state.pt"
    before, size = state.read_bytes(), state.stat().st_size
    if kind == "limit":
        codes = finish(
            start_training("ae", flags + ["--iters", "8", "--resume"], out, limit=int(size * share))
        )
    else:
        disk = tmp_path / "disk"
        disk.mkdir()
        used = sum(-(-f.stat().st_size // 4096) * 4096 for f in out.iterdir())
        mount = [
            "mount",
            "-t",
            "tmpfs",
            "-o",
            f"size={used + int(size * share) // 4096 * 4096}",
            "tmpfs",
            str(disk),
        ]
        if subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("mounting a small disk needs rights that are not given here")
        try:
            shutil.copytree(out, disk, dirs_exist_ok=True)
            codes = finish(start_training("ae", flags + ["--iters", "8", "--resume"], disk))
            shutil.copytree(disk, out, dirs_exist_ok=True)
        finally:
            subprocess.run(["umount", str(disk)], check=True)
    error = [l for l in (out / "stderr").read_text().splitlines() if "error" in l]
    assert (
        codes == [2]
        and len(error) == 1
        and "unharmed" in error[0]
        and "Traceback" not in (out / "stderr").read_text()
    )
    assert state.read_bytes() == before and not list(out.glob("*.tmp"))
    assert finish(start_training("ae", flags + ["--iters", "8", "--resume"], out)) == [0]


def test_resume_refuses_another_run(tmp_path, trained, capsys):
    for stage, main, flags in (("ae", ae.main, TINY_AE), ("ldm", diffusion.main, TINY_LDM)):
        shutil.copytree(trained, tmp_path / stage)
        flags = flags + ["--out", str(tmp_path / stage), "--resume", "--iters", "4"]
        one_line_error(capsys, main, flags + ["--lr", "0.5"], "--resume", "--lr", "0.5")
        one_line_error(capsys, main, flags + ["--seed", "9"], "--seed 0")
        (tmp_path / stage / f"{stage}_state.pt").unlink()
        one_line_error(capsys, main, flags, f"{stage}_state.pt")


def test_steps_without_a_finite_gradient_are_left_out(tmp_path, trained, capsys, monkeypatch):
    # one such step: weights, moments and step counts stay as they were, and the count tells
    model = torch.nn.Linear(3, 1)
    optimizer, skipped = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True), torch.zeros(2)
    scaler = torch.amp.GradScaler("cpu", enabled=False)

    def step(factor):
        (model(torch.ones(2, 3)).sum() * factor).backward()
        ae.guarded_step(
            optimizer, scaler, torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0), skipped
        )
        return [t.clone() for t in (*model.parameters(), *leaves(optimizer.state_dict()["state"]))]

    before, bad, after = step(1.0), step(float("nan")), step(2.0)
    assert all(torch.equal(x, y) for x, y in zip(before, bad)) and not any(
        torch.equal(x, y) for x, y in zip(before, after)
    )
    assert skipped.tolist() == [1, 0]
    step(float("inf")), step(float("nan"))
    assert skipped.tolist() == [3, 2]

    # many in a row: the run ends with one line, its last good state intact
    monkeypatch.setattr(ae, "MAX_SKIPPED", 3)
    losses, forward = ae.segmentation_losses, diffusion.LDM.forward
    monkeypatch.setattr(
        ae,
        "segmentation_losses",
        lambda *a: tuple(x * float("nan") if i == 0 else x for i, x in enumerate(losses(*a))),
    )
    monkeypatch.setattr(diffusion.LDM, "forward", lambda *a: forward(*a) * float("inf"))
    for stage, main, flags in (("ae", ae.main, TINY_AE), ("ldm", diffusion.main, TINY_LDM)):
        shutil.copytree(trained, tmp_path / stage)
        one_line_error(
            capsys,
            main,
            flags + ["--out", str(tmp_path / stage), "--resume", "--iters", "20"],
            "finite",
            "3 of 6 iterations",
            "--lr",
        )
        a, b = (
            torch.load(folder / f"{stage}_state.pt", weights_only=True)
            for folder in (trained, tmp_path / stage)
        )
        assert all(torch.equal(x, y) for x, y in zip(leaves(a), leaves(b)))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_both_stages_train_and_resume_in_half_precision(tmp_path, precision):
    """fp16 with its gradient scaler, which starts too high: it must come down, and its scale must survive a resume."""
    for stage, main, flags in (("ae", ae.main, TINY_AE), ("ldm", diffusion.main, TINY_LDM)):
        flags = flags + ["--precision", precision, "--out", str(tmp_path), "--schedule", "constant"]
        main(flags + ["--iters", "6"])
        before = torch.load(tmp_path / f"{stage}_state.pt", weights_only=True)
        assert bool(before["scaler"]) == (precision == "fp16") and before["skipped"][1] < 6
        main(flags + ["--iters", "8", "--resume"])
        losses = [e["loss"] for e in ae.read_log(tmp_path / "log.jsonl", stage) if "loss" in e]
        assert len(losses) == 8 and all(np.isfinite(losses))


@pytest.mark.parametrize("segments", [0, 1, 127])
def test_losses_of_maps_with_no_one_and_most_segments(segments, trained):
    ids = (
        torch.arange(1, 257).reshape(1, 16, 16).clamp(max=127)
        if segments == 127
        else torch.full((1, 16, 16), min(segments, 1))
    )
    ids = torch.cat([ids, torch.zeros_like(ids)])  # and an image that is all void
    model = ae.Autoencoder(128, factor=4, width=32)
    logits, mean, logvar = model(ids)
    ce, n_ce, mask, n_mask = ae.segmentation_losses(logits, ids, *ae.draw_points(logits, ids, 64))
    assert n_mask == segments and (n_ce > 0) == (segments > 0) and torch.isfinite(ce + mask)
    (ce / n_ce.clamp(min=1) + mask / max(n_mask, 1)).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert segments or not any(p.grad.any() for p in model.decoder.parameters())
    ldm = diffusion.load_ldm(trained / "ldm.pt")
    y = ids.clamp(max=7).repeat(1, 2, 2)
    loss = ldm(
        torch.zeros(2, 3, 32, 32, dtype=torch.uint8),
        y,
        torch.randn(2, 4, 8, 8),
        torch.tensor([5, 900]),
        torch.ones(1000),
        torch.tensor([True, False]),
    )
    assert torch.isfinite(loss) and (loss > 0) == (segments > 0)


# ----------------------------------------------------------------------------------------- the command line as such


@pytest.mark.parametrize("script", ["data", "pq", "ae", "diffusion", "sample", "inpaint"])
def test_help_and_unknown_flag_from_the_shell(script):
    run = lambda *flags: subprocess.run(
        [sys.executable, "-X", "importtime", str(HERE / f"{script}.py"), *flags],
        capture_output=True,
        text=True,
    )
    help_ = run("--help")
    assert (
        help_.returncode == 0
        and f"python {script}.py" in help_.stdout
        and "Traceback" not in help_.stderr
    )
    assert "numpy" in help_.stderr and "torch" not in help_.stderr  # torch takes seconds to import
    wrong = run("--no_such_flag", *(["--gt", "x", "--pred", "x"] if script == "pq" else []))
    said = [line for line in wrong.stderr.splitlines() if not line.startswith("import time:")]
    assert (
        wrong.returncode == 2
        and len(said) == 1
        and "--no_such_flag" in said[0]
        and "torch" not in wrong.stderr
    )


def test_benches_run_through(capsys):
    result = data.bench(sizes=(16,), count=1, rounds=1)
    assert set(result) == {16} and all(result[16][k] > 0 for k in ("Pillow", "sample", "ids only"))
    result = pq.bench(2, cases=[(32, 24, 3)], images=8, rounds=1)
    assert {"32 x 24, 3 segments", "files", "files, 1 processes", "files, 2 processes"} == set(
        result
    ) and "%" in capsys.readouterr().out


def test_data_command_draws_a_sheet(tmp_path):
    data.main(["--data", "shapes", "--out", str(tmp_path), "--json", str(tmp_path / "r.json")])
    assert (tmp_path / "data.png").exists() and json.loads((tmp_path / "r.json").read_text())[
        "categories"
    ] == 5


def test_bad_data_folders(tmp_path, capsys):
    bad = lambda *words: one_line_error(
        capsys,
        ae.main,
        [
            "--model",
            "small",
            "--num_workers",
            "1",
            "--iters",
            "1",
            "--batch_size",
            "4",
            "--train_split",
            "val2017",
            "--out",
            str(tmp_path / "o"),
            "--device",
            "cpu",
            "--data",
            str(tmp_path / "d"),
        ],
        *words,
    )
    bad("no such folder")
    (tmp_path / "d").mkdir()
    bad("panoptic_val2017.json")
    (tmp_path / "d" / "annotations").mkdir()
    path = tmp_path / "d" / "annotations" / "panoptic_val2017.json"
    for text, word in (
        ("{", "not JSON"),
        ("[1, 2]", "not a COCO file"),
        ('{"images": 3}', "not a COCO file"),
        ('{"images": [], "annotations": [], "categories": []}', "val2017"),
    ):
        path.write_text(text)
        bad(word)
    write_panoptic(
        tmp_path / "d", count=1
    )  # nothing but broken images ends the training, single ones do not: see below
    png, image = (
        tmp_path / "d" / "panoptic_val2017" / "001.png",
        tmp_path / "d" / "val2017" / "001.png",
    )
    keep_png, keep_image = png.read_bytes(), image.read_bytes()
    data.write_id_png(png, np.full((30, 40), 12345))
    bad("001.png", "12345")
    data.write_id_png(png, np.full((3, 4), 7))
    bad("001.png", "4 x 3")
    png.unlink()
    bad("001.png")
    png.write_bytes(keep_png)
    image.write_bytes(keep_image[:200])
    bad("001.png", "not a readable image")
    image.unlink()
    bad("001.png", "no such image")
    assert not (tmp_path / "o" / "ae.pt").exists()


def break_panoptic(root):
    """Eight images of which five are broken, each in a way of its own: kind -> name of the image in what --check prints."""
    write_panoptic(root, count=8)
    images, pngs, path = (
        root / "val2017",
        root / "panoptic_val2017",
        root / "annotations" / "panoptic_val2017.json",
    )
    (images / "001.png").unlink()
    (images / "002.png").write_bytes((images / "002.png").read_bytes()[:300])
    data.write_id_png(pngs / "003.png", np.full((3, 4), 7))
    ids = np.where(data.read_id_png(pngs / "004.png") == 7, 9, 0)
    data.write_id_png(
        pngs / "004.png", ids
    )  # an id that is not listed, and two listed ones that are not there
    (pngs / "005.png").unlink()
    data.write_id_png(pngs / "006.png", np.zeros((30, 40)))
    content = json.loads(path.read_text())
    content["images"][6]["width"] = 41
    path.write_text(json.dumps(content))
    return [
        "missing image: 001.png",
        "undecodable image: 002.png",
        "size mismatch: 003.png",
        "id not in the JSON: 004.png",
        "id not in the PNG: 004.png",
        "missing id PNG: 005.png",
        "empty map: 006.png",
        "id not in the PNG: 006.png",
        "id not in the PNG: 003.png",
        "size mismatch: 007.png",
        "empty map: 004.png",
    ]


@pytest.mark.parametrize("workers", ["0", "2"])
def test_check_names_everything_that_is_broken(tmp_path, capsys, workers):
    write_panoptic(tmp_path)
    write_panoptic(tmp_path, split="train2017", count=2)
    flags = [
        "--check",
        str(tmp_path),
        "--out",
        str(tmp_path),
        "--num_workers",
        workers,
        "--json",
        str(tmp_path / "r.json"),
    ]
    data.main(flags)
    assert "nothing is broken" in capsys.readouterr().out and json.loads(
        (tmp_path / "r.json").read_text()
    ) == {"images": 5, "faults": {}}
    expected = break_panoptic(tmp_path)
    with pytest.raises(SystemExit) as stop:
        data.main(flags)
    out = capsys.readouterr().out
    found = [
        f"{l.partition(': ')[0]}: {re.search('00[0-9].png', l)[0]}"
        for l in out.splitlines()
        if ".png" in l
    ]
    assert (
        stop.value.code == 1
        and sorted(found) == sorted(expected)
        and "id not in the PNG 3" in out.splitlines()[-1]
    )
    assert json.loads((tmp_path / "r.json").read_text())["faults"]["size mismatch"] == 2
    data.main(flags + ["--split", "train2017"])  # the other split is sound, unless N is small
    with pytest.raises(SystemExit) as stop:
        data.main(flags + ["--split", "train2017", "--num_ids", "3"])
    assert stop.value.code == 1 and "too many segments 2" in capsys.readouterr().out
    (tmp_path / "val2017").rename(tmp_path / "elsewhere")
    one_line_error(capsys, data.main, flags, "val2017/")
    one_line_error(
        capsys,
        data.main,
        ["--check", str(tmp_path / "val"), "--out", str(tmp_path)],
        "--check",
        "annotations",
    )


def test_check_of_instances(tmp_path, capsys):
    write_instances(tmp_path)
    flags = ["--check", str(tmp_path), "--out", str(tmp_path), "--num_workers", "0"]
    data.main(flags)
    path = tmp_path / "annotations" / "instances_val2017.json"
    good = path.read_text()
    for old, new, kind in (
        ("[20, 20]", "[20, 21]", "size mismatch"),
        ('"width": 20', '"width": 19', "size mismatch"),
        ("[[2, 2, 12", "[[2, 12", "bad segmentation"),
    ):
        path.write_text(good.replace(old, new, 1))
        with pytest.raises(SystemExit):
            data.main(flags)
        assert f"{kind} 1" in capsys.readouterr().out
    (tmp_path / "val2017" / "a.png").unlink()
    with pytest.raises(SystemExit):
        data.main(flags)
    assert "missing image 1" in capsys.readouterr().out


def test_broken_images_are_left_out_of_training_and_evaluation(tmp_path, capsys):
    break_panoptic(tmp_path)
    source = data.open_data(str(tmp_path), "val2017")
    a, b = (data.Training(source, 16, 8, seed=1, min_area=0) for _ in range(2))
    b[7]
    assert (
        all(np.array_equal(x, y) for n in range(20) for x, y in zip(a[n], b[n]))
        and list(a.broken) == [True] * 5 + [False] * 3
    )
    c = data.Training(source, 16, 8, seed=1, min_area=0)
    drawn = [ids for _, ids in data.training_batches(c, 0, 5, 4, num_workers=2)]
    assert np.array_equal(torch.cat(drawn), [a[n][1] for n in range(20)]) and list(
        a.broken
    ) == list(
        c.broken
    )  # workers tell too
    seen = [
        s["image_id"]
        for r in range(2)
        for batch in data.evaluation_batches(data.Evaluation(source), 2, r, 2)
        for s in batch
    ]
    assert sorted(seen) == [6, 7, 8]
    capsys.readouterr()
    ae.main(
        [
            "--model",
            "small",
            "--num_workers",
            "1",
            "--iters",
            "4",
            "--batch_size",
            "4",
            "--size",
            "16",
            "--width",
            "32",
            "--num_ids",
            "8",
            "--out",
            str(tmp_path / "o"),
            "--train_split",
            "val2017",
            "--device",
            "cpu",
            "--data",
            str(tmp_path),
        ]
    )
    out, err = capsys.readouterr()
    assert "4 of 8 images left out, others" in out and all(
        f"{i:03}.png" in out for i in (1, 3, 4, 5)
    )  # stage 1 does not decode 002
    assert "5 of 8 images left out of the evaluation" in err


def set_in(*keys_and_value):
    """A function that sets content[key1][key2]... to a value."""
    *keys, last, value = keys_and_value

    def change(content):
        for k in keys:
            content = content[k]
        content[last] = value

    return change


@pytest.mark.parametrize(
    "where, value, word",
    [
        ("segment id", 2**24, "16777216"),
        ("segment id", -1, "-1"),
        ("segment id", 0, "0"),
        ("segment id", 7.0, "7.0"),
        ("segment id", True, "True"),
        ("segment id", None, "None"),
        ("segment id", [7], "list"),
        ("segment id", 300, "twice"),
        ("segment category_id", {}, "category_id"),
        ("segment iscrowd", "0", "iscrowd"),
        ("segment area", -5, "area"),
        ("segment", 3, "segment"),
        ("segments_info", None, "segments_info"),
        ("annotation", "x", "object"),
        ("annotation image_id", [1], "image_id"),
        ("annotation image_id", 2, "2"),
        ("annotation image_id", None, "image_id"),
        ("annotation file_name", "/etc/001.png", "/etc/001.png"),
        ("annotation file_name", "a/../001.png", ".."),
        ("annotation file_name", "..\\001.png", ".."),
        ("annotation file_name", "C:\\001.png", "C:"),
        ("annotation file_name", 5, "5"),
        ("annotation file_name", "a\nb", "file_name"),
        ("annotation file_name", "", "file_name"),
        ("image id", 1.5, "1.5"),
        ("image id", 2, "twice"),
        ("image id", False, "False"),
        ("image file_name", "../001.png", ".."),
        ("image file_name", None, "file_name"),
        ("image width", -40, "-40"),
        ("image height", 0, "height"),
        ("image height", 30.5, "30.5"),
        ("image", [], "object"),
        ("category id", "1", "categor"),
        ("category id", 2, "2"),
        ("annotation text", float("nan"), "NaN"),
        ("annotation text", float("-inf"), "Infinity"),
        ("raw", b'{"a":' * 100_000, "JSON"),
        ("raw", b"\xff\xfe{", "JSON"),
        ("raw", b'{"images": 9e999999}', "not a COCO"),
        ("raw", b"9" * 5000, "JSON"),
        ("raw", b"null", "not a COCO"),
    ],
)
def test_absurd_json_is_one_line(tmp_path, capsys, where, value, word):
    write_panoptic(tmp_path)
    path, folder = tmp_path / "annotations" / "panoptic_val2017.json", str(
        tmp_path / "panoptic_val2017"
    )
    content, (kind, *key) = json.loads(path.read_text()), where.split()
    place = {
        "segment": ("annotations", 0, "segments_info", 0),
        "segments_info": ("annotations", 0, "segments_info"),
        "annotation": ("annotations", 0),
        "image": ("images", 0),
        "category": ("categories", 0),
        "raw": (),
    }[kind]
    if kind != "raw":
        set_in(*place, *key, value)(content)
    good = path.read_bytes()
    path.write_bytes(value if kind == "raw" else json.dumps(content).encode())
    one_line_error(
        capsys,
        data.main,
        ["--data", str(tmp_path), "--split", "val2017", "--out", str(tmp_path / "o")],
        path.name,
        word,
    )
    if kind != "image" and where != "segment area":  # which pq.py does not look at
        (tmp_path / "good.json").write_bytes(good)
        one_line_error(
            capsys,
            pq.main,
            [
                "--gt",
                str(path),
                "--gt_dir",
                folder,
                "--pred",
                str(tmp_path / "good.json"),
                "--pred_dir",
                folder,
            ],
            path.name,
            word,
        )


@pytest.mark.parametrize(
    "segmentation, word",
    [
        ({"size": [20, 20], "counts": [5]}, "add up"),
        ({"size": [20, 20], "counts": [-5, 405]}, "add up"),
        ({"size": [20, 20], "counts": [0, 2**62, 2**62]}, "add up"),
        ({"size": [10**6, 10**6], "counts": [0, 10**12]}, "20 x 20"),
        ({"size": [20, 20], "counts": "zzz"}, "7"),
        ({"size": [20, 20]}, "counts"),
        ([[1e9, 0, 0, 1e9, 5, 5]], "far outside"),
        ([[0, 0, 20, 20] * 500], "too long"),
        ([[float("inf")] * 6], "JSON"),
        ([[1, 2, 3, 4]], "7"),
        ([[1, 2, 3, 4, 5, 6, 7]], "7"),
        ([["a"] * 6], "7"),
        ([], "7"),
    ],
)
def test_malformed_segmentations_never_reach_c(tmp_path, segmentation, word):
    """Some of these crash pycocotools or make it return uninitialised memory."""
    write_instances(tmp_path)
    path = tmp_path / "annotations" / "instances_val2017.json"
    content = json.loads(path.read_text())
    content["annotations"][0].update(id=7, segmentation=segmentation)
    path.write_text(json.dumps(content))
    with pytest.raises(data.BadInput, match=f"instances_val2017.json.*{word}"):
        data.open_data(str(tmp_path), "val2017")[0]


def test_bad_checkpoints(tmp_path, trained, capsys):
    cut = tmp_path / "cut.pt"
    cut.write_bytes((trained / "ldm.pt").read_bytes()[:5000])

    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    torch.save({"kind": "ldm", "x": Bomb()}, tmp_path / "bomb.pt")
    torch.save({"weights": 1}, tmp_path / "foreign.pt")
    other = torch.load(trained / "ldm.pt", weights_only=True)
    other["settings"]["autoencoder"]["width"] = 64
    torch.save(other, tmp_path / "other.pt")
    for name, word in (
        ("cut.pt", "not a readable checkpoint"),
        ("bomb.pt", "not a readable checkpoint"),
        ("foreign.pt", "no checkpoint of this project"),
        ("other.pt", "don't fit"),
        ("absent.pt", "no such checkpoint"),
        (str(trained / "ae.pt"), "'ae'"),
    ):
        for main in (sample.main, inpaint.main):
            one_line_error(
                capsys,
                main,
                ["--ckpt", str(tmp_path / name), "--device", "cpu", "--out", str(tmp_path)],
                Path(name).name,
                word,
            )
    assert not (tmp_path / "executed").exists()
    one_line_error(
        capsys,
        diffusion.main,
        TINY_LDM
        + [
            "--ae",
            str(trained / "ae.pt"),
            "--channels",
            "32",
            "--resume",
            "--iters",
            "4",
            "--out",
            str(trained),
        ],
        "--resume",
    )
    one_line_error(
        capsys, ae.main, TINY_AE + ["--width", "64", "--resume", "--out", str(trained)], "--resume"
    )


@pytest.mark.parametrize(
    "main, flags, word",
    [
        (sample.main, ["--steps", "0"], "--steps"),
        (sample.main, ["--steps", "1001"], "--steps"),
        (sample.main, ["--steps", "x"], "--steps"),
        (sample.main, ["--images", "nowhere.jpg"], "nowhere.jpg"),
        (sample.main, ["--data", "nowhere"], "nowhere"),
        (sample.main, ["--size", "30"], "--size"),
        (sample.main, ["--device", "tpu"], "--device"),
        (sample.main, ["--threshold", "2"], "--threshold"),
        (sample.main, ["--limit", "0"], "--limit"),
        (inpaint.main, ["--drop", "1.5"], "--drop"),
        (inpaint.main, ["--drop", "nan"], "--drop"),
        (inpaint.main, ["--block", "0"], "--block"),
        (inpaint.main, ["--block", "4096"], "--block"),
        (inpaint.main, ["--valid", "-1"], "--valid"),
        (inpaint.main, ["--image", "x.png"], "--mask"),
        (inpaint.main, ["--steps", "5000"], "--steps"),
        (ae.main, ["--num_ids", "100"], "--num_ids"),
        (ae.main, ["--lr", "-1"], "--lr"),
        (ae.main, ["--size", "65"], "--size"),
        (ae.main, ["--batch_size", "3", "--accum", "2"], "--batch_size"),
        (ae.main, ["--encoding", "x"], "--encoding"),
        (diffusion.main, ["--ae", "nowhere.pt"], "nowhere.pt"),
        (diffusion.main, ["--steps", "1001"], "--steps"),
        (diffusion.main, ["--prediction", "x"], "--prediction"),
        (diffusion.main, ["--classes", "only"], "--ckpt"),
        (diffusion.main, ["--classes", "with", "--batch_size", "1"], "--batch_size"),
        (data.main, ["--data", "nowhere"], "nowhere"),
        (sample.main, ["--json", "."], "--json"),
        (data.main, ["--seed", "-1"], "--seed"),
        (inpaint.main, ["--out", __file__], "test_all.py"),
        (sample.main, ["--steps", "5", "10", "--images", __file__], "--steps"),
        (sample.main, ["--images", __file__], "test_all.py"),
        (sample.main, ["--bench", "small", "--size", "30"], "--size"),
    ],
)
def test_bad_flags(tmp_path, trained, capsys, main, flags, word):
    ckpt = ["--ckpt", str(trained / "ldm.pt")] if main in (sample.main, inpaint.main) else []
    base = [] if main is data.main else ckpt or ["--model", "small", "--data", "shapes"]
    one_line_error(capsys, main, base + ["--out", str(tmp_path), *flags], word)


def test_diffusion_without_coco_says_how_to_get_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    one_line_error(capsys, diffusion.main, [], "data/coco", "--model small --data shapes")
    one_line_error(capsys, ae.main, [], "data/coco", "--model small --data shapes")


def test_bad_pictures_and_masks(tmp_path, trained, capsys):
    ckpt = [
        "--ckpt",
        str(trained / "ldm.pt"),
        "--steps",
        "1",
        "--out",
        str(tmp_path / "o"),
        "--device",
        "cpu",
    ]
    good, bad = tmp_path / "in" / "good.png", tmp_path / "in" / "bad.jpg"
    good.parent.mkdir()
    Image.new("RGB", (20, 20)).save(good)
    bad.write_bytes(b"\xff\xd8nothing")
    one_line_error(capsys, sample.main, ckpt + ["--images", str(good.parent)], "bad.jpg", "1 of 2")
    assert [
        a["image_id"]
        for a in json.loads((tmp_path / "o" / "predictions.json").read_text())["annotations"]
    ] == [
        "good"
    ]  # the good one is not lost
    Image.new("RGB", (20, 20)).save(tmp_path / "in" / "good.bmp")
    one_line_error(capsys, sample.main, ckpt + ["--images", str(good.parent)], "good.bmp", "rename")
    for name in ("7.png", "007.png"):  # in COCO's convention both are image 7
        (tmp_path / "seven").mkdir(exist_ok=True)
        Image.new("RGB", (20, 20)).save(tmp_path / "seven" / name)
    one_line_error(
        capsys, sample.main, ckpt + ["--images", str(tmp_path / "seven")], "007.png", "rename"
    )
    data.write_id_png(tmp_path / "small.png", np.ones((10, 20)))
    data.write_id_png(tmp_path / "many.png", np.arange(400).reshape(20, 20))
    one_line_error(
        capsys,
        inpaint.main,
        ckpt + ["--image", str(good), "--mask", str(tmp_path / "small.png")],
        "small.png",
        "20 x 10",
    )
    one_line_error(
        capsys,
        inpaint.main,
        ckpt + ["--image", str(good), "--mask", str(tmp_path / "many.png")],
        "399 ids",
    )
    one_line_error(
        capsys, inpaint.main, ckpt + ["--image", str(good), "--mask", str(bad)], "bad.jpg"
    )


def test_bad_pq_input(tmp_path, capsys):
    write_panoptic(tmp_path)
    gt, folder = tmp_path / "annotations" / "panoptic_val2017.json", str(
        tmp_path / "panoptic_val2017"
    )
    flags = ["--gt", str(gt), "--gt_dir", folder]
    pq.main(flags + ["--pred", str(gt), "--pred_dir", folder])
    assert "100.0" in capsys.readouterr().out
    one_line_error(capsys, pq.main, flags + ["--pred", str(tmp_path / "none.json")], "none.json")
    one_line_error(capsys, pq.main, flags + ["--pred", str(gt)], "001.png")  # PNG folder not there
    one_line_error(capsys, pq.main, ["--gt", str(gt)], "--pred")
    content = json.loads(gt.read_text())

    def bad(change, *words):
        wrong = json.loads(json.dumps(content))
        change(wrong["annotations"][0]["segments_info"])
        (tmp_path / "wrong.json").write_text(json.dumps(wrong))
        one_line_error(
            capsys,
            pq.main,
            flags + ["--pred", str(tmp_path / "wrong.json"), "--pred_dir", folder],
            "image 1",
            *words,
        )

    bad(lambda s: s.pop(), "does not list")
    bad(lambda s: s.append({"id": 5, "category_id": 1}), "segment 5", "no pixel")
    bad(lambda s: s.append(dict(s[0])), "twice")
    bad(lambda s: s[0].update(category_id=99), "category 99")
    (tmp_path / "wrong.json").write_text("[]")
    one_line_error(capsys, pq.main, flags + ["--pred", str(tmp_path / "wrong.json")], "wrong.json")


# ------------------------------------------------------------------------------------------- fuzzing

MAINS = {
    "data": data.main,
    "pq": pq.main,
    "ae": ae.main,
    "diffusion": diffusion.main,
    "sample": sample.main,
    "inpaint": inpaint.main,
}


def bad_arguments():
    """Command lines that no file can make right: script, flags, and what the message must name."""
    everywhere = [
        ("--seed", "-1"),
        ("--seed", "1.5"),
        ("--seed", "x"),
        ("--size", "0"),
        ("--size", "-64"),
        ("--size", "big"),
        ("--background", "sky"),
        ("--max_pixels", "0"),
        ("--json", "."),
        ("--out", __file__),
        ("--data", "no/such/folder"),
        ("--no_such_flag",),
    ]
    network = [
        ("--batch_size", "0"),
        ("--batch_size", "1e3"),
        ("--num_workers", "-1"),
        ("--device", "warp9"),
        ("--precision", "fp12"),
        ("--size", "31"),
    ]
    training = [
        ("--lr", "-1"),
        ("--lr", "nan"),
        ("--lr", "inf"),
        ("--lr", "fast"),
        ("--iters", "-5"),
        ("--iters", "2.5"),
        ("--warmup", "-1"),
        ("--schedule", "step"),
        ("--model", "large"),
        ("--weight_decay", "-0.1"),
        ("--accum", "0"),
        ("--accum", "3"),
        ("--clip", "-1"),
        ("--ckpt", "no/such.pt"),
        ("--log_every", "0"),
        ("--save_every", "0"),
        ("--eval_every", "-1"),
        ("--eval_images", "0"),
        ("--min_segment", "-1"),
        ("--resume",),
    ]
    sampling = [
        ("--ckpt", "no/such.pt"),
        ("--ckpt", "."),
        ("--steps", "0"),
        ("--steps", "1001"),
        ("--steps", "ten"),
        ("--threshold", "1.01"),
        ("--threshold", "nan"),
        ("--min_area", "-1"),
        ("--limit", "0"),
        ("--split", "no/../split", "--data", "FOLDER"),
    ]
    own = {
        "data": [
            ("--limit", "0"),
            ("--split", "absent", "--data", "FOLDER"),
            ("--check", "no/such/folder"),
            ("--check", "."),
        ],
        "ae": [
            ("--num_ids", "100"),
            ("--num_ids", "0"),
            ("--factor", "3"),
            ("--width", "7"),
            ("--points", "0"),
            ("--encoding", "gray"),
            ("--kl", "-1"),
            ("--kl", "nan"),
            ("--drop_input",),
        ],
        "diffusion": [
            ("--ae", "no/such.pt"),
            ("--channels", "17"),
            ("--prediction", "noise"),
            ("--loss_weight", "p2"),
            ("--latent_scale", "-1"),
            ("--self_cond", "1.5"),
            ("--ema", "-0.5"),
            ("--steps", "0"),
            ("--steps", "1001"),
            ("--classes", "only"),
            ("--classes", "no"),
        ],
        "sample": [
            ("--images", "no/such.jpg"),
            ("--images", "EMPTY"),
            ("--seeds", "3"),
            ("--seeds", "3", "3"),
            ("--seeds", "0", "1", "--images", "PHOTO"),
            ("--steps", "5", "10", "--images", "PHOTO"),
        ],
        "inpaint": [
            ("--drop", "1.5"),
            ("--drop", "-0.1"),
            ("--drop", "nan"),
            ("--block", "0"),
            ("--block", "4096"),
            ("--valid", "2"),
            ("--image", "PHOTO"),
            ("--mask", "MASK"),
            ("--image", "no/such.jpg", "--mask", "MASK"),
            ("--ae", "no/such.pt"),
        ],
    }
    for script in ("data", "ae", "diffusion", "sample", "inpaint"):
        flags = (
            everywhere
            + network * (script != "data")
            + training * (script in ("ae", "diffusion"))
            + sampling * (script in ("sample", "inpaint"))
        )
        yield from ((script, f, f[0]) for f in flags + own[script])
    yield from (
        ("pq", f, word)
        for f, word in [
            ((), "--gt"),
            (("--gt", "GT"), "--pred"),
            (("--gt", "no/gt.json", "--pred", "PRED"), "no/gt.json"),
            (("--gt", "GT", "--pred", "."), "."),
            (("--gt", "GT", "--pred", "PRED", "--gt_dir", "no/such"), "no/such"),
            (("--gt", "GT", "--pred", "PRED", "--frobnicate"), "--frobnicate"),
        ]
    )


def bad_checkpoints(ckpt, kind):
    """Broken, foreign and hostile versions of a checkpoint: name and bytes."""
    whole, content = ckpt.read_bytes(), torch.load(ckpt, weights_only=True)
    for share in (0, 0.01, 0.3, 0.7, 0.999):
        yield f"cut at {share}", whole[: int(share * len(whole))]
    yield "zeros", bytes(len(whole))
    yield "text", b"not a checkpoint"
    yield "noise", np.random.default_rng(0).bytes(5000)

    def stored(value):
        buffer = io.BytesIO()
        torch.save(value, buffer)
        return buffer.getvalue()

    class Bomb:
        def __reduce__(self):
            return os.mkdir, ("exploded",)

    yield "bomb", stored({**content, "more": Bomb()})
    yield "bare bomb", pickle.dumps(Bomb())
    yield "a list", stored([1, 2])
    yield "another kind", stored({**content, "kind": "cake"})
    for key in [k for k in ae.ENTRIES[kind]]:
        yield f"without {key}", stored({k: v for k, v in content.items() if k != key})
        yield f"{key} is 7", stored({**content, key: 7})
    yield "a weight too few", stored(
        {**content, "weights": dict(list(content["weights"].items())[1:])}
    )
    yield "weights of another shape", stored(
        {**content, "weights": {k: v.flatten()[:1] for k, v in content["weights"].items()}}
    )
    huge = {
        "ae": {"autoencoder": {**content.get("autoencoder", {}), "width": 1 << 20}},
        "ldm": {
            "settings": {
                **content["settings"],
                "unet": {
                    **content["settings"].get("unet", {}),
                    "block_out_channels": [1 << 20] * 3,
                },
            }
        },
    }[kind]
    yield "sizes beyond memory", stored({**content, **huge})


def bad_json(good):
    """Broken versions of a COCO panoptic JSON: name and text."""
    yield from {
        "empty": "",
        "no JSON": "{",
        "a number": "7",
        "null": "null",
        "a list": "[]",
        "nesting": "[" * 100_000,
        "bytes": "\udcff\udcfe",
    }.items()

    def change(path, value):
        copy = json.loads(json.dumps(good))
        *way, last = path
        place = functools.reduce(lambda x, k: x[k], way, copy)
        place[last] = value
        return json.dumps(copy)

    annotation, segment = ("annotations", 0), ("annotations", 0, "segments_info", 0)
    for path, values in {
        ("annotations",): [None, 3, {}],
        annotation: [None, 5, {}],
        (*annotation, "image_id"): [None, [1]],
        (*annotation, "file_name"): [None, 4, "../a.png", "/etc/passwd"],
        (*annotation, "segments_info"): [None, "x", [3]],
        (*segment, "id"): [None, "1", -1, 1.5, 1 << 24, True, float("nan")],
    }.items():
        for value in values:
            yield f"{path[-1]} is {value!r}", change(path, value)
    yield "a segment twice", change(
        (*annotation, "segments_info"), good["annotations"][0]["segments_info"] * 2
    )


def bad_pictures(good):
    """Broken picture files: name and bytes."""
    whole = good.read_bytes()
    write_bomb(good.with_suffix(".bomb"), 60_000, 60_000)
    yield from {
        "empty": b"",
        "text": b"hello",
        "cut": whole[: len(whole) // 2],
        "header alone": whole[:30],
        "bomb": good.with_suffix(".bomb").read_bytes(),
        "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        "noise": np.random.default_rng(0).bytes(500),
    }.items()


def snapshot(folder):
    return {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_fuzz(tmp_path, trained, capsys, monkeypatch):
    """Over 250 bad inputs to the six command lines: exit code 2, one line that names the culprit, no traceback, no file changed."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "folder"
    write_panoptic(folder)
    places = {
        "FOLDER": folder,
        "EMPTY": tmp_path / "empty",
        "PHOTO": tmp_path / "photo.png",
        "MASK": tmp_path / "mask.png",
    }
    places["EMPTY"].mkdir()
    Image.fromarray(np.random.default_rng(1).integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(
        places["PHOTO"]
    )
    data.write_id_png(places["MASK"], np.ones((40, 40), np.int32))
    places["GT"] = places["PRED"] = folder / "annotations" / "panoptic_val2017.json"
    good = json.loads(places["GT"].read_text())
    out = tmp_path / "out"
    shutil.copytree(trained, out)
    (out / "predictions").mkdir()
    base = {
        "data": [],
        "pq": [],
        "ae": TINY_AE + ["--iters", "1"],
        "diffusion": TINY_LDM + ["--iters", "1", "--ae", str(trained / "ae.pt")],
        "sample": [
            "--ckpt",
            str(trained / "ldm.pt"),
            "--data",
            "shapes",
            "--limit",
            "1",
            "--steps",
            "1",
            "--num_workers",
            "0",
        ],
    }
    base["inpaint"], tried, wrong = base["sample"], 0, []

    def refused(script, flags, word):
        nonlocal tried
        tried += 1
        argv = (
            base[script]
            + (["--out", str(out)] if script != "pq" else [])
            + [str(places.get(f, f)) for f in flags]
        )
        culprits = [
            str(places.get(w, w)) for w in (word, *flags)
        ]  # the flag, or what was given to it
        before, code = snapshot(tmp_path), None
        capsys.readouterr()
        try:
            MAINS[script](argv)
        except SystemExit as stop:
            code = stop.code
        except Exception as error:
            code = repr(error)
        lines = [
            l for l in capsys.readouterr().err.strip().splitlines() if not re.search(r"\d+%\|", l)
        ]  # beside progress bars
        if (
            code != 2
            or len(lines) != 1
            or not any(c in lines[0] for c in culprits)
            or snapshot(tmp_path) != before
        ):
            wrong.append((argv, code, lines))

    for script, flags, word in bad_arguments():
        refused(
            script,
            [f for f in flags if f != "--resume"]
            + (["--resume", "--seed", "5"] if "--resume" in flags else []),
            word,
        )
    for kind, users in {
        "ae": [("ae", "--ckpt"), ("diffusion", "--ae"), ("inpaint", "--ae")],
        "ldm": [("sample", "--ckpt"), ("inpaint", "--ckpt"), ("diffusion", "--ckpt")],
    }.items():
        for i, (name, content) in enumerate(bad_checkpoints(trained / f"{kind}.pt", kind)):
            file = tmp_path / f"{name.replace(' ', '_')}.pt"
            file.write_bytes(content)
            script, flag = users[i % 3]
            refused(script, [flag, file], file.name)
            file.unlink()
    for name, text in bad_json(good):
        for script, flags in [
            ("data", ["--data", "FOLDER", "--split", "broken"]),
            ("pq", ["--gt", "BROKEN", "--pred", "PRED", "--gt_dir", folder / "panoptic_val2017"]),
            (
                "pq",
                [
                    "--gt",
                    "GT",
                    "--pred",
                    "BROKEN",
                    "--pred_dir",
                    folder / "panoptic_val2017",
                    "--gt_dir",
                    folder / "panoptic_val2017",
                ],
            ),
        ]:
            places["BROKEN"] = folder / "annotations" / "panoptic_broken.json"
            places["BROKEN"].write_text(text, errors="surrogateescape")
            refused(script, flags, "panoptic_broken.json")
    places["BROKEN"].unlink()
    for name, content in bad_pictures(places["PHOTO"]):
        file = tmp_path / "broken.png"
        file.write_bytes(content)
        refused("inpaint", ["--image", file, "--mask", "MASK"], "broken.png")
        refused("inpaint", ["--image", "PHOTO", "--mask", file], "broken.png")
        file.unlink()
    assert not wrong, "\n".join(map(str, wrong))
    assert tried > 250 and not (tmp_path / "exploded").exists()

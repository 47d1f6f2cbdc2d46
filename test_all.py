"""test_all.py: every core piece against an independent truth, and every script as its
user runs it.

    make test                      # or: python -m pytest -q test_all.py
    python test_all.py bench       # times of the parts, each beside a yardstick
    python test_all.py pipeline    # draw assets/pipeline.png, the picture of the method

Reference numbers of the authors' release and of the panoptic API are looked for in
$LDMSEG_SHARED (default: ../shared). Tests that need them are skipped where they are
absent.
"""

import ast
import contextlib
import dataclasses
import functools
import importlib.util
import io
import json
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import socket
import struct
import sys
import tempfile
import time
import tracemalloc
import zlib
from argparse import Namespace
from pathlib import Path
from unittest import mock

import data  # before torch: it sets what PyTorch reads on import
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin, TiffImagePlugin
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

import ae
import diffusion
import inpaint
import pq
import sample
from data import BadInput

HERE = Path(__file__).parent
SHAPES = HERE / "assets" / "shapes.pt"
SHARED = Path(os.environ.get("LDMSEG_SHARED", HERE.parent / "shared"))
MODULES = (data, pq, ae, diffusion, sample, inpaint)
SCRIPTS = {module.__name__: module for module in MODULES}

# Trainings of the tests are tiny. What has no flag is set in the tables of --model
# small, here, so that it holds in the processes that tests start, too.
ae.SMALL.update(width=32, eval_images=3, save_every=2)
diffusion.SMALL.update(eval_images=3, save_every=2, steps=2)
diffusion.small_unet_config = functools.partial(
    diffusion.small_unet_config, channels=16
)
TINY = "--batch_size 4 --iters 3 --num_workers 0 --device cpu"
TINY_AE = f"ae {TINY} --model small --data shapes --size 32 --num_ids 8"
TINY_LDM = f"diffusion {TINY}"
STAGES = {"ae": TINY_AE, "ldm": TINY_LDM}

torch.set_num_threads(1)  # two that wait for a busy core are a hundred times slower
close = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5)
exact = functools.partial(torch.testing.assert_close, rtol=0, atol=0)
near = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=1e-3)


# ---------------------------------------------------------------------------- helpers
@pytest.fixture(autouse=True)
def afresh(tmp_path, monkeypatch):
    """Each test begins in an empty folder, and notes are said again."""
    monkeypatch.chdir(tmp_path)
    data.say_once.cache_clear()
    data.files_by_name.cache_clear()


def bad_input(match):
    """A context in which a BadInput must be raised whose text matches."""
    return pytest.raises(BadInput, match=match)


def reference(name):
    """A file of reference numbers; where it is absent, the test is skipped."""
    path = SHARED / "reference" / name
    if not path.exists():
        pytest.skip(f"no reference numbers at {path} (set LDMSEG_SHARED)")
    return path


def numbers(name):
    """A reference .npz as a namespace of tensors."""
    tensors = {}
    for key, array in np.load(reference(name)).items():
        if key != "images":
            tensors[key] = torch.from_numpy(array)
    return Namespace(**tensors)


def run(command, *more):
    """Run a script's main: its name and flags as one types them, and paths."""
    script, *flags = command.split()
    SCRIPTS[script].main([*flags, *map(str, more)])


def shell(capsys, command, *more):
    """Run a command: its exit code, what it printed, and lines on stderr.

    Progress bars are left out.
    """
    capsys.readouterr()
    data.say_once.cache_clear()
    code = 0
    try:
        run(command, *more)
    except SystemExit as stop:
        code = int(stop.code)
    out, err = capsys.readouterr()
    lines = []
    for line in re.split("[\n\r]|\x1b\\[A", err):  # a bar also moves the cursor up
        if line.strip() and "image/s" not in line and "s/image" not in line:
            lines.append(line.strip())
    return code, out, lines


def refused(capsys, command, *more):
    """The line on stderr with which a command must end, with exit code 2.

    What stands before it may only be notes.
    """
    code, _, lines = shell(capsys, command, *more)
    assert code == 2, lines
    *notes, line = lines
    assert all(note.startswith(("note: ", "stage ")) for note in notes), notes
    script = command.split()[0]
    assert line.startswith(f"{script}.py: error: "), lines
    return line


def read(path):
    """A JSON file, or the lines of a log."""
    text = Path(path).read_text()
    if Path(path).suffix == ".jsonl":
        return [json.loads(line) for line in text.splitlines()]
    return json.loads(text)


def same_partition(a, b):
    """Whether two id maps show the same segments under any ids."""
    pairs = np.unique(np.stack([a.ravel(), b.ravel()]), axis=1).shape[1]
    return pairs == len(np.unique(a)) == len(np.unique(b))


def row(digits):
    """An id map of one row."""
    return np.array([[*map(int, digits)]], np.int32)


def scenes(count, size=32):
    """Held-out scenes."""
    shapes = data.Shapes("v", size)
    return [shapes[n] for n in range(count)]


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """Both stages, trained for three iterations: the folder of their files."""
    out = tmp_path_factory.mktemp("trained")
    run(TINY_AE, "--out", out)
    run(TINY_LDM, "--out", out)
    return out


@pytest.fixture
def tiny(trained):
    """The model of these trainings, afresh."""
    return sample.load(trained / "ldm.pt")


@pytest.fixture
def shipped():
    """The weights that come with the project."""
    return sample.load(SHAPES)


@pytest.fixture
def photo(tmp_path):
    """A picture, photo.png, and beside it part.png, a partial mask of it."""
    Image.fromarray(scenes(1, 60)[0]["image"][:40]).save(tmp_path / "photo.png")
    given = np.zeros((40, 60), np.int32)
    given[5:20, 5:30] = 900_001
    data.write_id_png(tmp_path / "part.png", given)
    return tmp_path / "photo.png"


# What `write_coco` writes of each picture, whose number stands for #, for the layouts
# instances and panoptic alike.
IMAGE = '{"id": #, "file_name": "#.png", "width": 64, "height": 48}'
SQUARE = "[[8, 8, 32, 8, 32, 32, 8, 32]]"
SEGMENTS = '[{"id": 70000, "category_id": 1}, {"id": 300, "category_id": 2}]'
ANNOTATION = (
    '{"id": #, "image_id": #, "category_id": 1, "segmentation": SQUARE, '
    '"file_name": "#.png", "segments_info": SEGMENTS}'
)
ANNOTATION = ANNOTATION.replace("SQUARE", SQUARE).replace("SEGMENTS", SEGMENTS)
CATEGORIES = (
    '[{"id": 1, "name": "cat", "isthing": 1}, {"id": 2, "name": "sky", "isthing": 0}]'
)
# By layout: the ids in samples of the square and of what is around it.
IDS = {"panoptic": (70_000, 300), "instances": (2, 1)}


def square(inside, outside=0):
    """The truth of every picture."""
    ids = np.full((48, 64), outside, np.int32)
    ids[8:32, 8:32] = inside
    return ids


def pixels_of(number):
    """The pixels of a picture."""
    return np.random.default_rng(number).integers(0, 255, (48, 64, 3), np.uint8)


def write_coco(root, kind="panoptic", old="", new="", count=1):
    """Write a folder in COCO layout, of pictures 1.png, 2.png, ...: the JSON's path.

    The text `old` of the JSON becomes `new`.
    """
    images = []
    annotations = []
    for i in range(1, count + 1):
        ids = square(70_000, 300)
        data.write(f"{root}/val/{i}.png", Image.fromarray(pixels_of(i)))
        data.write_id_png(f"{root}/annotations/panoptic_val/{i}.png", ids)
        images.append(IMAGE.replace("#", str(i)))
        annotations.append(ANNOTATION.replace("#", str(i)))
    text = '{"images": [%s], "annotations": [%s], "categories": %s}'
    text = text % (", ".join(images), ", ".join(annotations), CATEGORIES)
    assert old in text
    if old:
        text = text.replace(old, new)
    path = Path(f"{root}/annotations/{kind}_val.json")
    path.write_text(text, errors="surrogateescape")
    return path


# ---------------------------------------------------------------------- built-in scenes
def test_scenes_are_those_of_the_first_version():
    """The two numbers were taken from the first version of the code."""
    shapes = data.Shapes("val2017", 48, seed=2)
    weights = np.arange(48 * 48 * 3) % 251
    crc = 0
    total = 0
    for n in range(40):
        scene = shapes[n]
        categories = bytes(s["category_id"] for s in scene["segments_info"])
        crc = zlib.crc32(scene["ids"].tobytes() + categories, crc)
        total += scene["image"].ravel().astype(int) @ weights
    assert crc == 3823813632
    assert total == pytest.approx(4377767331, rel=3e-6)  # sines may differ


def test_no_shape_of_a_scene_is_almost_hidden():
    shapes = data.Shapes("val2017", 48, seed=2)
    for n in range(40):
        scene = shapes[n]
        areas = np.bincount(scene["ids"].ravel())[1:].tolist()
        assert [s["area"] for s in scene["segments_info"]] == areas
        assert min(areas) >= 48 * 48 // 60


def test_splits_and_seeds_have_scenes_of_their_own():
    splits = [("train", 1), ("train", 2), ("val", 1), ("train", 1)]
    images = [data.Shapes(split, seed=seed)[7]["image"] for split, seed in splits]
    assert len({image.tobytes() for image in images}) == 3


def test_segments_info_of_scenes_is_plain_json():
    for n in range(8):
        segments = data.Shapes("v")[n]["segments_info"]
        assert json.loads(json.dumps(segments)) == segments


# ------------------------------------------------------------- what a training is given
class Grey(data.Shapes):
    """Scenes whose grey value is 50 times the id."""

    def __getitem__(self, index):
        scene = super().__getitem__(index)
        grey = (50 * scene["ids"]).astype(np.uint8)
        return {**scene, "image": grey[..., None].repeat(3, 2)}


class Blind(Grey):
    """The same scenes without pictures, as stage 1 reads them."""

    def __getitem__(self, index):
        return {**super().__getitem__(index), "image": None}


def test_a_training_sample_follows_from_its_number():
    """Whatever was drawn before, and whether or not pictures are read."""
    training = data.TrainingSet(Grey("train"), size=32, num_ids=16, seed=1)
    other = data.TrainingSet(Grey("train"), size=32, num_ids=16, seed=1)
    blind = data.TrainingSet(Blind("train"), size=32, num_ids=16, seed=1)
    for n in range(20):
        found = training[n]
        other[n + 7]
        exact(other[n], found)
        del found["image"]
        exact(blind[n], found)


def test_ids_picture_and_classes_of_a_training_sample_belong_together():
    source = Grey("train")
    training = data.TrainingSet(source, size=32, num_ids=16, seed=1)
    for n in range(60):
        found = training[n]
        grey_of = {}
        for i in found["ids"].unique().tolist():
            grey = found["image"][0][found["ids"] == i].float().median()
            grey_of[i] = 50 * round(grey.item() / 50)  # edges are blurred
        segments = source[n]["segments_info"]
        assert sorted(grey_of.values()) == [50 * s["id"] for s in segments]
        for i, grey in grey_of.items():
            [category] = [s["category_id"] for s in segments if 50 * s["id"] == grey]
            assert found["classes"][i] == category - 1  # the place in the list
        assert (found["classes"] >= 0).sum() == len(grey_of)


def test_half_of_the_training_samples_are_flipped_and_their_ids_are_random():
    source = data.Shapes("train", 32)
    training = data.TrainingSet(source, size=32, num_ids=16)
    flipped = 0
    names = set()
    for n in range(60):
        ids = training[n]["ids"].numpy()
        truth = source[n]["ids"]
        straight = same_partition(ids, truth)
        assert straight or same_partition(ids[:, ::-1], truth)
        flipped += not straight
        names.update(np.unique(ids).tolist())
    assert 15 < flipped < 45
    assert names == set(range(1, 16))


def test_changed_samples_are_changed_in_all_their_parts():
    """Crops, colours, turns: each segment keeps one grey value, and `given` its ids."""
    training = data.TrainingSet(Grey("train"), size=32, num_ids=16, seed=1)
    changed = data.Augmented(training, crop=32, augment=0.5, given=1.0)
    for n in range(40):
        found = changed[n]
        exact(changed[n], found)
        ids = found["ids"].numpy()
        given = found["given"].numpy()
        assert np.array_equal(given, np.where(given > 0, ids, 0))
        grey = found["image"][0].numpy().astype(int)
        around = np.pad(ids, 1, mode="edge")
        inside = (around[:-2, 1:-1] == ids) & (around[2:, 1:-1] == ids)
        inside &= (around[1:-1, :-2] == ids) & (around[1:-1, 2:] == ids)
        for s in data.describe(ids):
            own = grey[(ids == s["id"]) & inside]  # edges are blurred
            alike = abs(own - np.median(own)) < 4
            assert s["area"] < 100 or alike.mean() > 0.5
    plain = data.Augmented(training)
    exact(plain[3], training[3])


def test_a_crop_is_a_part_of_the_picture_and_repeats_its_edge_beyond_it():
    scene = Grey("train", 40)[0]
    for side in (24, 60):
        found = data.crop_sample(scene, side, np.random.default_rng(0))
        assert found["ids"].shape == (side, side)
        assert np.array_equal(found["image"][..., 0], 50 * found["ids"])
        counted = data.areas(found["ids"])
        assert {s["id"]: s["area"] for s in found["segments_info"]} == counted
        if side == 60:
            assert np.array_equal(found["ids"][:40, :40], scene["ids"])
            assert (found["ids"][40:] == found["ids"][39]).all()
    assert scene["image"].shape == (40, 40, 3)  # the sample itself is unharmed


def test_a_crop_shows_the_segment_that_it_is_asked_for():
    scene = Grey("train", 64)[0]
    ids = np.zeros((64, 64), np.int32)
    ids[60, 3] = 2
    scene = {**scene, "ids": ids, "segments_info": data.describe(ids)}
    corners = set()
    for seed in range(1000):
        rng = np.random.default_rng(seed)
        found = data.crop_sample(scene, 8, rng, segment=2)["ids"]
        assert found.shape == (8, 8)
        corners.add(tuple(np.argwhere(found == 2)[0].tolist()))
    # it can be anywhere in the crop that the picture's edges allow
    assert corners == {(y, x) for y in range(4, 8) for x in range(4)}


def test_half_of_the_training_crops_hold_a_random_segment():
    """The only segment is a pixel, which few uniform crops hold; a crowd is no aim."""
    ids = np.zeros((64, 64), np.int32)
    ids[40, 30] = 2
    ids[:8, :8] = 3
    scene = {**Grey("train", 64)[0], "ids": ids, "segments_info": data.describe(ids)}
    scene["segments_info"][1]["iscrowd"] = 1
    source = mock.MagicMock(endless=True, categories=[], background_id=None)
    source.__getitem__.return_value = scene
    training = data.TrainingSet(source, 8, num_ids=8, min_area=1)
    crops = data.Augmented(training, crop=8)
    shown = sum(int((crops[n]["ids"] > 0).any()) for n in range(200))
    assert 80 < shown < 125  # half of them, and a few of the others


def test_training_crops_aim_at_objects_that_touch():
    ids = np.ones((64, 64), np.int32)  # the background
    ids[10, 30] = 2  # alone
    ids[50, 30:32] = 3, 4
    ids[30, 5:7] = 5, 6  # 6 is a crowd, so that 5 counts as alone
    scene = {**Grey("train", 64)[0], "ids": ids, "segments_info": data.describe(ids)}
    scene["segments_info"][0]["category_id"] = 9
    scene["segments_info"][5]["iscrowd"] = 1
    objects = [s["id"] for s in data.objects_of(scene, background_id=9)]
    assert objects == [2, 3, 4, 5]
    assert len(data.objects_of(scene, background_id=None)) == 5
    assert data.touching(ids, objects) == [3, 4]
    assert data.touching(ids.T, [1, 2]) == [1, 2]
    assert data.touching(ids, []) == []

    source = mock.MagicMock(endless=True, categories=[{"id": 1}], background_id=9)
    source.__getitem__.return_value = scene
    training = data.TrainingSet(source, 8, num_ids=8, min_area=1)
    aims = []
    with mock.patch.object(data, "crop_sample", wraps=data.crop_sample) as crop_sample:
        crops = data.Augmented(training, crop=8)
        for n in range(100):
            crops[n]
            aims.append(crop_sample.call_args.kwargs["segment"])
    assert 30 < aims.count(None) < 70
    assert set(aims) == {None, 3, 4}


def test_tiles_are_twice_as_long_as_a_typical_object():
    assert data.tile_side([900] * 5, crop=48) == 60
    # nine pieces, as large as one object together, do not change that
    assert data.tile_side([900] * 5 + [100] * 9, crop=48) == 60
    assert data.tile_side([], crop=48) == 48
    assert data.tile_side([1], crop=48) == 24
    assert data.tile_side([10**6], crop=48) == 192


def test_crops_of_instances_are_as_large_as_their_tiles():
    ids = np.ones((64, 64), np.int32)
    ids[:12, :12] = 2  # tiles of 24 px
    ids[20:60, :] = 3  # a crowd
    scene = {**Grey("train", 64)[0], "ids": ids, "segments_info": data.describe(ids)}
    scene["segments_info"][0]["category_id"] = 9
    scene["segments_info"][2]["iscrowd"] = 1
    assert data.own_crop(scene, 16, background_id=9) == 24
    assert data.own_crop(scene, 16, background_id=None) == 16

    source = mock.MagicMock(endless=True, categories=[{"id": 1}], background_id=9)
    source.__getitem__.return_value = scene
    assert data.Crops(source, 16)[0]["ids"].shape == (24, 24)
    training = data.TrainingSet(source, 8, num_ids=8, min_area=1)
    with mock.patch.object(data, "crop_sample", wraps=data.crop_sample) as crop_sample:
        sides = []
        for augment in (0, 0.5):
            crops = data.Augmented(training, crop=16, augment=augment)
            for n in range(100):
                crops[n]
                sides.append(crop_sample.call_args.args[1])
        source.background_id = None  # panoptic data: the side is that of the flag
        for n in range(10):
            data.Augmented(training, crop=16)[n]
            assert crop_sample.call_args.args[1] == 16
    assert set(sides[:100]) == {16, 24}
    assert 70 < sides[:100].count(24) < 90
    assert 10 <= min(sides[100:]) < 14
    assert 28 < max(sides[100:]) <= 34


def test_evaluation_looks_at_the_same_crops_each_time():
    held_out = data.HeldOut(data.Crops(data.Shapes("v", 48), 16), limit=3)
    assert len(held_out) == 3
    for first, second in zip(held_out, held_out, strict=True):
        assert first["ids"].shape == (16, 16)
        assert np.array_equal(first["ids"], second["ids"])
        assert np.array_equal(first["image"], second["image"])


def test_the_nearest_pixel_is_taken_when_ids_are_resized():
    ids = np.arange(480 * 640, dtype=np.int32).reshape(480, 640)
    rows = ((np.arange(512) + 0.5) * 480 / 512).astype(int)
    columns = ((np.arange(256) + 0.5) * 640 / 256).astype(int)
    found = data.resize_ids(ids, 512, 256)
    assert (found == ids[np.ix_(rows, columns)]).mean() > 0.999  # all but ties


def test_pictures_are_resized_almost_as_by_pillow():
    image = data.Shapes("v", 640)[0]["image"][:480]
    found = data.resize_image(image, 256)
    assert found.shape == (3, 256, 256)
    pillow = np.asarray(Image.fromarray(image).resize((256, 256), Image.BICUBIC))
    difference = abs(found.permute(1, 2, 0).numpy().astype(int) - pillow)
    assert difference.max() <= 8
    assert (difference > 1).mean() < 0.001


def test_relabel_equals_a_lookup_of_each_pixel(capsys):
    """Crowds, small and unlisted segments become void; of too many the largest stay."""
    rng = np.random.default_rng(0)
    for cell in [1, 5] * 10:
        ids = rng.integers(1, 13, (30 // cell, 40 // cell)) << 20
        ids = ids.repeat(cell, 0).repeat(cell, 1)
        area = {i: int((ids == i).sum()) for i in range(1 << 20, 10 << 20, 1 << 20)}
        segments = data.describe(ids)[:11]  # the twelfth is not listed
        for s in segments:
            s["iscrowd"] = int(s["id"] > 9 << 20)
        largest = sorted(area, key=area.get, reverse=True)[:7]
        kept = {i for i in largest if area[i] >= 60}
        found, new_id = data.relabel(ids, segments, 8, rng, min_area=60)
        assert set(new_id) == kept
        assert len(set(new_id.values())) == len(kept)
        assert set(new_id.values()) <= set(range(1, 8))
        assert np.array_equal(found, np.vectorize(lambda i: new_id.get(i, 0))(ids))
    assert capsys.readouterr().err.count("more than N - 1 = 7 segments") == 1


def test_processes_share_the_batch_in_pieces(monkeypatch):
    """An iteration sees the same samples with any number of processes and pieces."""
    training = data.TrainingSet(data.Shapes("train", 16), size=16, num_ids=8)
    args = Namespace(batch_size=8, num_workers=0, device="cpu")
    loaded = Namespace(batch_size=8, num_workers=1, device="cpu")
    [whole] = data.training_batches(training, [5], loaded)
    parts = []
    monkeypatch.setattr(data, "WORLD", 2)
    for rank in range(2):
        monkeypatch.setattr(data, "RANK", rank)
        parts += data.training_batches(training, [5], args, pieces=2)
    assert torch.equal(torch.cat([p["ids"] for p in parts]), whole["ids"])
    args.batch_size = 10
    with bad_input("--batch_size 10: must be a multiple of 4"):
        data.training_batches(training, [5], args, pieces=2)


def test_an_epoch_shows_each_picture_once_in_a_new_order():
    class Numbers:
        """A source whose samples are their numbers."""

        endless = False

        def __len__(self):
            return 10

        def __getitem__(self, index):
            return index

    training = data.TrainingSet(Numbers(), size=16, num_ids=8)
    epochs = [[training.read(n) for n in range(k, k + 10)] for k in (0, 10, 20)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(10))
    assert epochs[0] != epochs[1] != epochs[2]


def test_samples_are_loaded_by_the_processors_that_this_process_may_use(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5, 7}, raising=False)
    assert data.default_workers() == 2
    monkeypatch.delattr(os, "sched_getaffinity")
    assert data.default_workers() == 8


# ------------------------------------------------------------------- reading pictures
def test_pictures_of_every_mode_are_read_and_transparency_is_white():
    ramp = Image.linear_gradient("L")
    modes = ["L", "LA", "P", "RGB", "RGBA", "CMYK", "1", "I;16", "I", "F"]
    for mode in modes:
        ramp.convert(mode).save("x.tif")
        array = data.read_image("x.tif")
        assert array.shape == (256, 256, 3), mode
        assert array.dtype == np.uint8
        assert array[-1].min() > 200, mode
        assert array[0].max() < 60, mode
    ramp.convert("RGB").convert("YCbCr").save("x.jpg")  # as JPEG stores colours
    assert data.read_image("x.jpg")[-1].min() > 200
    Image.new("RGBA", (9, 7)).save("x.tif")
    assert (data.read_image("x.tif") == 255).all()


def png_chunk(name, content):
    """A chunk of a PNG, as bytes."""
    check = struct.pack(">I", zlib.crc32(name + content))
    return struct.pack(">I", len(content)) + name + content + check


def write_png16(path, array, kind, exif=b""):
    """Write H x W x C uint16 as a PNG; kind: 2 RGB, 4 grey and alpha, 6 RGBA.

    Pillow cannot write these.
    """
    height, width, _ = array.shape
    head = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    rows = b"".join(b"\0" + line.astype(">u2").tobytes() for line in array)
    chunks = png_chunk(b"IHDR", head)
    if exif:
        chunks += png_chunk(b"eXIf", exif)
    chunks += png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b"")
    Path(path).write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)


def write_tiff(path, array, compression=1, planar=1, order="<"):
    """Write H x W x C numbers as a TIFF; compression: 1 none, 8 deflate.

    planar 2: the colours one after the other. Pillow cannot write these.
    """
    height, width, channels = array.shape
    separate = channels == 3 and planar == 2
    pixels = array.transpose(2, 0, 1) if planar == 2 else array
    pixels = pixels.astype(array.dtype.newbyteorder(order)).tobytes()
    if compression == 8:
        pixels = zlib.compress(pixels)
    third = len(pixels) // 3
    tags = {
        256: width,
        257: height,
        258: (8 * array.itemsize,) * channels,  # bits
        259: compression,
        262: 2 if channels == 3 else 1,  # RGB or grey
        273: (0, third, 2 * third) if separate else (0,),  # where pixels begin
        277: channels,
        278: height,  # rows a strip
        279: (third,) * 3 if separate else len(pixels),  # bytes a strip
        284: planar,
    }
    mark = b"II*\0" if order == "<" else b"MM\0*"
    directory = TiffImagePlugin.ImageFileDirectory_v2(ifh=mark + b"\0\0\0\0")
    for tag, value in tags.items():
        directory[tag] = value
    with open(path, "wb") as file:
        directory.save(file)
        file.write(pixels)


def looks_like(path, expected):
    """Whether a picture is read as these values of 0..255, but for rounding."""
    found = data.read_image(path)
    return found.shape == (48, 64, 3) and np.abs(found - expected).max() < 2


SCENE = np.linspace(0, 1, 3072).reshape(48, 64)
SPANS = [
    (0, 327, "u2"),
    (0, 4095, "u2"),
    (0, 65535, "u2"),
    (0, 70_000, "i4"),
    (0, 1, "f4"),
    (32768, 1400, "u2"),  # Hounsfield units with an offset
    (1000, 300, "u2"),
    (-1000, 1400, "i4"),
]


@pytest.mark.parametrize("low, span, kind", SPANS)
def test_a_grey_scene_looks_alike_at_any_depth_and_offset(low, span, kind):
    Image.fromarray((low + span * SCENE).astype(kind)).save("x.tif")
    assert looks_like("x.tif", 255 * SCENE[..., None])


def test_unsigned_numbers_of_32_bits_are_read():
    """Pillow makes negative numbers of the large ones."""
    write_tiff("x.tif", (SCENE[..., None] * 4e9).astype(np.uint32))
    assert looks_like("x.tif", 255 * SCENE[..., None])


@pytest.mark.parametrize("most", [1023, 4095, 65535])
def test_colours_of_16_bits_look_as_with_8(most):
    """Of these Pillow reads the high byte alone."""
    colours = np.dstack([SCENE, SCENE**2, SCENE[::-1]])
    deep = (colours * most).astype(np.uint16)
    for form in ({}, {"compression": 8}, {"order": ">"}):
        write_tiff("x.tif", deep, **form)
        assert looks_like("x.tif", 255 * colours)
    write_png16("x.png", deep, kind=2)
    assert looks_like("x.png", 255 * colours)
    opaque = np.full((48, 64, 1), 65535)
    write_png16("x.png", np.dstack([deep, opaque]), kind=6)
    assert looks_like("x.png", 255 * colours)
    write_png16("x.png", np.dstack([deep[..., :1], opaque]), kind=4)
    assert looks_like("x.png", 255 * SCENE[..., None])


def test_deep_colour_is_turned_and_separate_planes_are_refused():
    deep = pixels_of(1).astype(np.uint16) << 8
    exif = Image.Exif()
    exif[0x0112] = 6
    write_png16("x.png", deep, kind=2, exif=exif.tobytes()[6:])
    assert data.read_image("x.png").shape == (64, 48, 3)
    assert data.read_image("x.png", (64, 48)).shape == (48, 64, 3)
    write_tiff("x.tif", deep, planar=2)
    with bad_input("x.tif: is a TIFF of separate planes"):
        data.read_image("x.tif")
    write_tiff("x.tif", pixels_of(1), planar=2)
    assert np.array_equal(data.read_image("x.tif"), pixels_of(1))


def test_hot_pixels_do_not_darken_a_deep_picture_and_nan_is_dark():
    ramp = np.linspace(0, 1, 90_000, dtype=np.float32).reshape(300, 300)
    broken = ramp.copy()
    broken[7, 3:6] = (1000, np.inf, np.nan)
    found = data.stretch(broken)
    assert found[7, 3:6].tolist() == [255, 255, 0]
    found[7, 3:6] = 255 * ramp[7, 3:6]
    assert np.abs(found - 255 * ramp).max() < 2
    assert not data.stretch(np.full((4, 4), np.nan)).any()
    spot = np.where(np.arange(40_000) == 9, 5.0, 1.0)
    assert np.flatnonzero(data.stretch(spot)).tolist() == [9]


def test_what_people_leave_in_a_file_does_not_hide_its_picture(capsys):
    """Alpha that is 0 everywhere, a workflow of 2 MB, an empty first page."""
    pixels = pixels_of(1)
    hidden = np.dstack([pixels, np.zeros((48, 64), np.uint8)])
    Image.fromarray(hidden).save("alpha.png")
    text = PngImagePlugin.PngInfo()
    text.add_text("workflow", "x" * 2_000_000, zip=True)
    Image.fromarray(pixels).save("text.png", pnginfo=text)
    pages = [Image.fromarray(page) for page in (0 * pixels, pixels, pixels[:9])]
    pages[0].save("pages.tif", save_all=True, append_images=pages[1:])
    for name in ("alpha.png", "text.png", "pages.tif"):
        assert np.array_equal(data.read_image(name), pixels), name
    assert "page 1 is empty, page 2 is read" in capsys.readouterr().err
    pages[0].save("pages.tif", save_all=True, append_images=pages[:1])
    assert not data.read_image("pages.tif").any()


@pytest.mark.parametrize("kind", IDS)
def test_a_picture_is_turned_as_its_exif_and_its_annotation_say(tmp_path, kind):
    """EXIF rotation is applied unless only the unrotated picture has the right size."""
    write_coco(tmp_path, kind)
    for orientation, quarters in ((3, 2), (6, 1), (8, 3)):
        exif = Image.Exif()
        exif[0x0112] = orientation
        stored = np.rot90(pixels_of(1), quarters)
        Image.fromarray(stored).save("val/1.png", exif=exif)
        found = data.open_data(tmp_path, "val")[0]["image"]
        assert np.array_equal(found, pixels_of(1))
        if quarters != 2:
            assert np.array_equal(data.read_image("val/1.png", (48, 64)), stored)


def test_id_pngs_of_every_mode_are_read():
    small = np.arange(12, dtype=np.uint8).reshape(3, 4)
    large = small + np.int32(70_000)
    data.write_id_png("x.png", large)
    rgb = Image.open("x.png")
    assert np.array_equal(np.asarray(rgb) @ [1, 256, 65536], large)
    images = [(large, rgb.convert("RGBA")), (large, Image.fromarray(large))]
    for mode in ("L", "LA", "I;16", "F"):
        images.append((small, Image.fromarray(small).convert(mode)))
    for ids, image in images:
        image.save("x.tif")
        assert np.array_equal(data.read_id_png("x.tif"), ids), image.mode


def test_ids_are_whole_numbers_of_three_bytes():
    small = np.arange(12, dtype=np.int32).reshape(3, 4)
    large = small + 70_000
    broken = [large << 8, -large, np.float32(small + 0.5), np.float32(small * np.nan)]
    for ids in broken:
        Image.fromarray(ids).save("x.tif")
        with bad_input("x.tif"):
            data.read_id_png("x.tif")
    write_png16("x.png", np.ones((3, 4, 3), np.uint16), kind=2)
    with bad_input("x.png: has colours of 16 bits"):
        data.read_id_png("x.png")


def test_the_colours_of_a_palette_are_ids_if_all_are_listed():
    palette = Image.new("P", (4, 3), 1)
    palette.putpalette([7, 0, 0, 9, 0, 0])
    palette.save("x.png")
    for listed, i in (([9], 9), ([1], 1), ([1, 9], 9), ((), 1)):
        assert (data.read_id_png("x.png", listed) == i).all(), listed


READERS = [data.read_image, data.read_id_png]


@pytest.mark.parametrize("reader", READERS)
def test_bombs_broken_files_and_other_formats_are_refused_by_name(reader):
    side = struct.pack(">I", 60_000)
    head = png_chunk(b"IHDR", side + side + b"\x08\2\0\0\0")
    bomb = b"\x89PNG\r\n\x1a\n" + head + b"\0\0\0\0IDAT"
    xbm = b"#define x_width 8\n#define x_height 1\nstatic char x_bits[] = {\n0x00};"
    for content, word in ((bomb, "Bomb"), (xbm, "not a"), (b"", "not a")):
        Path("x.jpg").write_bytes(content)
        with bad_input(f"x.jpg: .*{word}"):
            reader("x.jpg")


@pytest.mark.parametrize(
    "reader", [*READERS, functools.partial(data.read_coco, panoptic=True)]
)
def test_only_regular_files_are_read(tmp_path, reader):
    """A pipe or a device might never end."""
    os.mkfifo("pipe.png")
    for path in ("pipe.png", "/dev/zero", tmp_path):
        with bad_input(f"^{path}: is not a regular file"):
            reader(path)
    with bad_input("absent.png: no such"):
        reader("absent.png")


def check_mask(image, form="PNG"):
    """Save a mask as people do, and check it."""
    image.save("mask.png", form)
    data.check_mask("mask.png", data.read_id_png("mask.png"))


def test_a_picture_of_a_mask_is_no_mask():
    """JPEG and soft edges invent ids; white paper is an id like any other."""
    big = np.zeros((512, 512, 3), np.uint8)
    y, x = np.mgrid[:512, :512]
    big[np.hypot(y - 150, x - 150) < 40] = (255, 0, 0)
    big[np.hypot(y - 360, x - 340) < 40] = (0, 0, 255)
    big = Image.fromarray(big)
    hard = big.resize((64, 64), Image.NEAREST)
    soft = big.resize((64, 64), Image.LANCZOS)
    check_mask(hard)
    check_mask(hard.convert("P"))
    thin_strokes = np.diag(np.arange(16, dtype=np.uint8))
    check_mask(Image.fromarray(thin_strokes))
    for image, form in ((soft, "PNG"), (soft.convert("L"), "PNG"), (hard, "JPEG")):
        with bad_input("mask.png: .* ids cover no square of 2 x 2 pixels"):
            check_mask(image, form)
    paper = np.asarray(hard).copy()
    paper[(paper == 0).all(2)] = 255
    with bad_input("mask.png: white is an id"):
        check_mask(Image.fromarray(paper))


# -------------------------------------------------------------- folders in COCO layout
# Each: a text of the JSON | what people have there | a file or folder | where it lies
LAYOUTS = [
    '{"images" | {"images" | val | images/val',
    '{"images" | \ufeff{"images" | val | val',
    '"image_id": 1 | "image_id": "1" | annotations/panoptic_val | panoptic_val',
    r'"1.png", "width" | "x\\1.png", "width" | val/1.png | val/x/1.png',
    r'"1.png", "width" | "val\\1.png", "width" | val | val',
    # Cityscapes
    '"1.png", "width" | "a_gtFine_b.png", "width" | val/1.png | val/bonn/a_b.png',
    # Label Studio
    '"1.png", "width" | "images/0123abcd-a.png", "width" | val/1.png | val/a.png',
    '"1.png", "width" | "/data/upload/5/a.png", "width" | val/1.png | pics/1/a.png',
    '"1.png", "width" | "../../9.png", "width" | val/1.png | val/x/9.png',
    f"{SQUARE} | {SQUARE[1:-1]} | val | val",
]


@pytest.mark.parametrize("kind", IDS)
@pytest.mark.parametrize("case", LAYOUTS)
def test_a_folder_is_read_as_people_have_it(tmp_path, kind, case):
    old, new, here, there = case.split(" | ")
    write_coco(tmp_path, kind, old, new=new)
    shutil.copytree("val", "images/other")
    Path(there).parent.mkdir(exist_ok=True, parents=True)
    Path(here).rename(there)
    if there.startswith("pics"):
        Path("val").rmdir()
    [found] = data.open_data(tmp_path, "val")
    assert np.array_equal(found["image"], pixels_of(1))
    assert np.array_equal(found["ids"], square(*IDS[kind]))
    area = {s["id"]: s["area"] for s in found["segments_info"]}
    inside, outside = IDS[kind]
    assert area == {inside: 576, outside: 48 * 64 - 576}


def test_roboflow_has_its_json_beside_the_pictures(tmp_path):
    path = write_coco(tmp_path, "instances")
    path.rename("val/_annotations.coco.json")
    [found] = data.open_data(tmp_path, "val")
    assert np.array_equal(found["image"], pixels_of(1))


@pytest.mark.parametrize("kind", IDS)
def test_a_sample_holds_plain_numbers_and_stage_1_decodes_no_pictures(tmp_path, kind):
    write_coco(tmp_path, kind)
    source = data.open_data(tmp_path, "val", images=False)
    with mock.patch.object(data, "read_image", side_effect=AssertionError):
        [found] = source
    assert found["image"] is None
    assert found["ids"].dtype == np.int32
    assert (found["image_id"], found["file_name"]) == (1, "1.png")
    assert found["faults"] == []
    assert source.crowds == 0
    assert not source.endless
    background = 3 if kind == "instances" else None
    assert source.background_id == found["background_id"] == background
    for s in found["segments_info"]:
        assert s.keys() == {"id", "category_id", "iscrowd", "area"}
    segments = found["segments_info"]
    assert json.loads(json.dumps(segments)) == segments
    for c in source.categories:
        assert c.keys() == {"id", "name", "isthing"}


def test_a_file_is_where_its_path_leads_else_where_its_name_is_unique(tmp_path):
    root = tmp_path / "data"
    for name in ("a/1.png", "b/1.png", "c/2.png", ".hidden/7.png", "c/._8.png"):
        (root / name).parent.mkdir(exist_ok=True, parents=True)
        (root / name).touch()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "4.png").touch()
    (root / "linked").symlink_to(elsewhere)
    (root / "again").symlink_to(elsewhere)  # the same file: still one
    (root / "c" / "loop").symlink_to(root)
    (tmp_path / "3.png").touch()  # outside
    places = {
        "a/1.png": "a/1.png",
        r"b\1.png": "b/1.png",
        "x/2.png": "c/2.png",
        r"C:\2.png": "c/2.png",
        "0123abcd-2.png": "c/2.png",
    }
    for name, place in places.items():
        assert data.find_file(name, [root], "here") == root / place
    found = data.find_file("4.png", [root], "here")
    assert found.samefile(elsewhere / "4.png")
    wrong = ["1.png", "../3.png", str(tmp_path / "3.png"), "", None, "a" * 5000, "\0"]
    for name in [*wrong, "\ud800", "7.png", "._8.png", "g123abcd-2.png"]:
        with bad_input(f"^here: .* leads to (0|2) files below {root}"):
            data.find_file(name, [root], "here")


@pytest.mark.parametrize("kind", IDS)
def test_a_missing_picture_is_neither_another_splits_nor_a_mask(tmp_path, kind):
    write_coco(tmp_path, kind)
    Path("val/1.png").rename("val/2.png")
    Image.fromarray(pixels_of(2)).save("1.jpg")
    os.mkdir("train")
    Image.fromarray(pixels_of(2)).save("train/1.png")
    with bad_input(
        "image 1: '1.png' leads to 0 files below .*val.* none from .*images"
    ):
        data.open_data(tmp_path, "val")[0]
    shutil.rmtree("train")
    shutil.rmtree("val")
    with bad_input("image 1: '1.png' leads to 0 files below"):
        data.open_data(tmp_path, "val")[0]


def test_a_split_that_is_not_there_is_said_beside_those_that_are(tmp_path):
    write_coco(tmp_path)
    searched = "no annotations/instances_train.json or train/_annotations.coco.json; "
    there = "the JSONs there are annotations/panoptic_val.json; .*--train"
    with bad_input(searched + there):
        data.open_data(tmp_path, "train")
    with bad_input("nowhere: no .*--model small --data shapes"):
        data.open_data("nowhere", "train")


def test_masks_equal_pycocotools():
    for density in (0, 0.02, 0.5, 1):
        mask = np.random.default_rng(0).random((64, 50)) < density
        text = coco_mask.encode(np.asfortranarray(mask, np.uint8))["counts"].decode()
        for counts in (text, data.rle_counts(text.encode())):
            outline = {"size": [64, 50], "counts": counts}
            runs = data.outline_runs(outline, height=64, width=50)
            inside = np.repeat(np.arange(len(runs)) % 2, runs)
            assert np.array_equal(inside, mask.T.ravel())


BAD_OUTLINES = """null [] [[]] [[8,8,20,20]] 5 "x" [["a","a","a","a","a","a"]]
[[1e9,1,1,1,1,9]] {} [[NaN,1,1,1,1,9]] {"size":[48,64]}
{"size":[48,64],"counts":"~~~"} {"counts":[3072]}
{"size":[64,48],"counts":[3072]} {"size":[48,64],"counts":[3071]}
{"size":[48,64],"counts":"\u20ac"} {"size":[48,64],"counts":[-1,3073]}
{"size":[48,64],"counts":"oooooooooo"} {"size":5,"counts":[3072]}"""


@pytest.mark.parametrize("outline", BAD_OUTLINES.split())
def test_an_object_without_a_usable_outline_is_left_out_and_named(
    tmp_path, capsys, outline
):
    broken = '"annotations": [{"id": 9, "image_id": 1, "segmentation": %s}, ' % outline
    write_coco(tmp_path, "instances", '"annotations": [', new=broken)
    source = data.open_data(tmp_path, "val")
    found = data.check(source, size=32, num_ids=16)
    out, err = capsys.readouterr()
    assert "1.png: object 9 has no usable outline" in found["faults"][0]
    assert found["faults"][0] in out
    assert np.array_equal(source[0]["ids"] == 2, square(1))
    notes = [line for line in err.splitlines() if line.startswith("note: ")]
    assert len(notes) == 1
    assert "without a usable outline are left out" in notes[0]


def test_a_thousand_objects_are_painted_from_large_to_small_in_little_memory(tmp_path):
    """Crowds lie beneath all others. A mask of each would take 720 MB."""
    boxes = np.random.default_rng(0).integers(32, 400, (1000, 4)).tolist()
    objects = []
    for x, y, w, h in boxes:
        rectangle = [x, y, x + w, y, x + w, y + h, x, y + h]
        o = {"segmentation": [rectangle, *json.loads(SQUARE)], "category_id": x}
        objects.append({**o, "iscrowd": int(w % 5 == 0)})
    write_coco(tmp_path, "instances")
    folder = data.open_data(tmp_path, "val")
    tracemalloc.start()
    ids, segments, _ = folder.paint(objects, 900, height=800)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50e6  # bytes
    truth = np.zeros((800, 900), int)
    for x, y, w, h in sorted(boxes, key=lambda b: (b[2] % 5 > 0, -b[2] * b[3])):
        truth[y : y + h, x : x + w] = x
        truth[8:32, 8:32] = x
    category = {s["id"]: s["category_id"] for s in segments}
    category[1] = 0  # the background
    assert np.array_equal(np.vectorize(category.get)(ids), truth)


@pytest.mark.parametrize("size", ["0", "null", "64.0"])
def test_a_picture_tells_its_size_where_the_json_does_not(tmp_path, size):
    height = 48.0 if size == "64.0" else size
    new = f'"width": {size}, "height": {height}'
    write_coco(tmp_path, "instances", '"width": 64, "height": 48', new=new)
    [found] = data.open_data(tmp_path, "val", images=False)
    assert np.array_equal(found["ids"], square(2, 1))


@pytest.mark.parametrize("width", ["1000000000", "65", "-64", '"64"', "1e99", "NaN"])
def test_nothing_is_painted_at_a_size_that_the_picture_has_not(tmp_path, width):
    write_coco(tmp_path, "instances", '"width": 64', new=f'"width": {width}')
    for images in (True, False):
        source = data.open_data(tmp_path, "val", images=images)
        with mock.patch.object(source, "paint", side_effect=AssertionError):
            with bad_input(r"1.png: is \(64, 48\) pixels, its annotation says"):
                source[0]


@pytest.mark.parametrize("kind", IDS)
def test_crowds_alone_are_said_and_read_as_objects_when_asked(tmp_path, capsys, kind):
    """CVAT writes each painted mask as a crowd."""
    new = '"iscrowd": "1", "category_id"'
    path = write_coco(tmp_path, kind, '"category_id"', new=new)
    with bad_input("no image has an object that is not a crowd; --keep_crowds"):
        data.open_data(tmp_path, "val")
    line = refused(capsys, "data --data . --split val")
    assert "no image has an object that is not a crowd" in line
    source = data.open_data(tmp_path, "val", keep_crowds=True)
    assert source.crowds == 0
    assert np.array_equal(source[0]["ids"], square(*IDS[kind]))
    assert not any(s["iscrowd"] for s in source[0]["segments_info"])
    # one of them becomes an object, or a further one does
    content = json.loads(path.read_text())
    annotations = content["annotations"]
    if kind == "panoptic":
        annotations[0]["segments_info"][0]["iscrowd"] = 0
    else:
        annotations.append({**annotations[0], "iscrowd": 0})
    path.write_text(json.dumps(content))
    source = data.open_data(tmp_path, "val")
    assert source.crowds == 1
    data.check(source, size=32, num_ids=16)
    out = capsys.readouterr().out
    assert "1 objects are crowds (iscrowd 1) and not trained on; --keep_crowds" in out


def test_pq_of_crowds_alone_has_no_figures(tmp_path, capsys):
    new = '"iscrowd": true, "category_id"'
    path = write_coco(tmp_path, "panoptic", '"category_id"', new=new)
    _, out, _ = shell(capsys, f"pq --gt {path} --pred {path} --json r.json")
    assert "All - - - 0 Things - - - 0 Stuff - - - 0" in " ".join(out.split())
    assert read("r.json")["All"]["pq"] is None


def test_pictures_without_objects_count(tmp_path):
    write_coco(tmp_path, "instances", '"image_id": 2', new='"image_id": 1', count=2)
    assert (data.open_data(tmp_path, "val")[1]["ids"] == 1).all()
    write_coco(tmp_path, "instances", '"image_id"', new='"image_id": 7, "x"')
    with bad_input("no image has an object that is not a crowd$"):
        data.open_data(tmp_path, "val")


ISTHING = [
    ("null", 1),
    ('"False"', 0),
    ("0", 0),
    ('"0"', 0),
    ("false", 0),
    ("true", 1),
    ('"True"', 1),
]


@pytest.mark.parametrize("value, thing", ISTHING)
def test_a_category_is_a_thing_unless_it_says_no(tmp_path, value, thing):
    path = write_coco(tmp_path, "panoptic", '"isthing": 1', new=f'"isthing": {value}')
    assert data.open_data(tmp_path, "val").categories[0]["isthing"] == thing
    assert pq.score_files(path, path)["Things"]["n"] == thing


# Each: a text of the JSON | what stands there | ids of the categories, the background's
# last
CATEGORY_IDS = [
    '"id": 1, "name": "cat" | "id": 1, "supercategory": "s", "name": "cat" | 1 2 3',
    '"category_id": 1 | "category_id": 3 | 1 2 3',
    '"category_id": 1 | "category_id": "1" | 1 2 3',
    '"category_id": 1 | "category_id": null | 1 2 3',
    '"category_id": 1 | "x": 3 | 1 2 3',
    '{"id": 2, "name": "sky", "isthing": 0} | {"id": 0, "name": "sky"} | 1 0 2',
    '"categories": | "x": | 1',
]


@pytest.mark.parametrize("case", CATEGORY_IDS)
def test_no_object_has_the_category_of_the_background(tmp_path, case):
    """An object of a category that is not listed is an object, and a fault."""
    old, new, ids = case.split(" | ")
    write_coco(tmp_path, "instances", old, new=new)
    source = data.open_data(tmp_path, "val")
    assert [c["id"] for c in source.categories] == [int(i) for i in ids.split()]
    background, thing = source[0]["segments_info"]
    assert background["category_id"] == source.background_id
    assert thing["category_id"] != source.background_id
    listed = "supercategory" in new or '"id": 0' in new
    assert thing["category_id"] == (1 if listed else None)
    faults = data.check(source, size=32, num_ids=16)["faults"]
    if listed:
        assert faults == []
    else:
        [fault] = faults
        assert "1 objects are of category" in fault
        assert "does not list" in fault
    score = pq.Score()
    score.update(source[0], source[0]["ids"])
    assert score.result()["ap50"] == 100


def reopened(root, kind, old, new, count=1):
    """A data folder written anew, with a text of its JSON replaced, and opened."""
    shutil.rmtree(root / "annotations", ignore_errors=True)
    write_coco(root, kind, old, new=new, count=count)
    return data.open_data(root, "val")


@pytest.mark.parametrize("kind", IDS)
def test_an_image_id_for_one_file_is_one_picture_and_for_two_is_refused(tmp_path, kind):
    image = '{"id": 1, "file_name": "1.png", "width": 64, "height": 48}'
    assert len(reopened(tmp_path, kind, image, f"{image}, {image}")) == 1
    with bad_input("'1.png' and '2.png' have the same id 1: give each its own"):
        old, new = '"id": 2, "file_name"', '"id": 1, "file_name"'
        reopened(tmp_path, kind, old, new, count=2)


def test_a_file_in_two_entries_is_one_picture_with_the_objects_of_both(tmp_path):
    old, new = '"2.png", "width"', '"1.png", "width"'
    source = reopened(tmp_path, "instances", old, new, count=2)
    assert len(source) == 1
    _, _, objects = json.loads(source.items[0])
    assert len(objects) == 2


def test_two_panoptic_annotations_of_an_image_are_refused(tmp_path):
    """Each is a complete one, so that they cannot be joined."""
    old, new = '"image_id": 2', '"image_id": "1"'
    with bad_input("image 1 has two annotations"):
        reopened(tmp_path, "panoptic", old, new, count=2)


def test_a_segment_is_listed_in_one_category(tmp_path):
    segment = '{"id": 300, "category_id": 2}'
    again = f"{segment}, {segment}"
    [found] = reopened(tmp_path, "panoptic", segment, again)
    assert sorted(s["id"] for s in found["segments_info"]) == [300, 70_000]
    otherwise = segment + ', {"id": 300, "category_id": 1}'
    with bad_input("image 1: lists segment 300 in several categories"):
        reopened(tmp_path, "panoptic", segment, otherwise)[0]


def test_a_segment_without_a_pixel_is_left_out(tmp_path):
    segment = '{"id": 300, "category_id": 2}'
    more = segment + ', {"id": 5, "category_id": 1}'
    [found] = reopened(tmp_path, "panoptic", segment, more)
    assert found["faults"] == ["segment 5 has no pixel"]
    assert sorted(s["id"] for s in found["segments_info"]) == [300, 70_000]


BROKEN = [
    "1.png: not a readable picture",
    "'2.png'",
    "3.png: is (32, 24) pixels, its annotation says (64, 48)",
    "'4.png'",
    "5.png holds id 7,",
    "says (64, 9)",
    "7.png: segment 70000 has no pixel",
    "8 images, 7 faults",
]


def test_broken_pictures_are_named_and_the_next_takes_their_place(tmp_path, capsys):
    folder = write_coco(tmp_path, count=8).parent / "panoptic_val"
    os.truncate("val/1.png", 500)
    os.remove("val/2.png")
    data.write("val/3.png", Image.new("RGB", (32, 24)))
    os.remove(folder / "4.png")
    data.write_id_png(folder / "5.png", square(7, 300))
    data.write_id_png(folder / "6.png", square(300)[:9])
    data.write_id_png(folder / "7.png", square(0, 300))
    training = data.TrainingSet(data.open_data(tmp_path, "val"), size=16, num_ids=8)
    assert all(training[n]["ids"].any() for n in range(24))
    assert capsys.readouterr().err.count("the next picture takes its place") == 6
    code, out, _ = shell(capsys, "data --check --split val --data .")
    assert code == 1
    for words in BROKEN:
        assert words in out
    found = read("out/check.json")
    assert found["images"] == 8
    assert len(found["faults"]) == 7
    shutil.rmtree("val")
    with bad_input("none of the other 7 pictures can be used either"):
        data.TrainingSet(data.open_data(tmp_path, "val"), size=16, num_ids=8)[0]


def test_evaluation_leaves_broken_pictures_out_and_ends_if_all_are(tmp_path, capsys):
    write_coco(tmp_path, count=3)
    os.remove("val/2.png")
    held_out = data.HeldOut(data.open_data(tmp_path, "val"))
    assert [s["image_id"] for s in held_out] == [1, 3]
    assert "note: left out: " in capsys.readouterr().err
    assert [len(batch) for batch in held_out.batches(2)] == [2]
    shutil.rmtree("val")
    data.files_by_name.cache_clear()
    with bad_input("none of the 3 pictures can be used"):
        list(held_out.batches(2))
    with bad_input("none of the 3 pictures can be used"):
        held_out.check()


def test_data_draws_a_sheet(tmp_path):
    write_coco(tmp_path, count=2)
    run("data --data . --split val")
    run("data --data shapes --out scenes")
    for path in ("out/data.png", "scenes/data.png"):
        assert Image.open(path).width > 300


# ---------------------------------------------------------- what a training can reach
class Pieces:
    """Pictures of 40 x 64 px in random squares, the first of them the background."""

    categories = CATEGORIES
    unlisted = {}
    crowds = 0
    images = False

    def __init__(self, background_id=None):
        self.background_id = background_id

    def __len__(self):
        return 6

    def __getitem__(self, index):
        rng = np.random.default_rng(index)
        ids = np.ones((40, 64), np.int32)
        for i in range(2, 30):
            y, x = rng.integers(0, 56, 2)
            side = rng.integers(2, 16)
            ids[y : y + side, x : x + side] = i
        ids[rng.random(ids.shape) < 0.02] = 0
        segments = data.describe(ids)
        segments[0]["category_id"] = 2
        for s in segments:
            s["iscrowd"] = int(s["id"] == 5)
        return {
            "ids": ids,
            "segments_info": segments,
            "image": None,
            "image_id": index,
            "file_name": f"{index}.png",
            "background_id": self.background_id,
        }


@pytest.mark.parametrize("background", [None, 2])
@pytest.mark.parametrize("crop", [0, 24])
def test_the_ceiling_is_what_pq_says_of_perfect_logits(background, crop):
    source = Pieces(background)
    figures = data.perfect_network(source, size=32, num_ids=16, crop=crop, factor=8)
    score = pq.Score()
    for n in range(len(source)):
        scene = source[n]
        rng = np.random.default_rng((0, n))
        if crop:
            scene = data.crop_sample(scene, crop, rng)
        ids, _ = data.relabel(scene["ids"], scene["segments_info"], 16, rng)
        at_size = data.resize_ids(ids, 32, 32)
        cells = torch.tensor(data.resize_ids(at_size, 16, 16))
        logits = (cells == torch.arange(16)[:, None, None]).float()
        found, _ = ae.likeliest(logits, *ids.shape)
        sure = np.ones(found.shape)
        score.update(scene, ae.void_uncertain(found, sure, figures["min_area"]))
    expected = score.result()
    # Small pieces that a square cuts off segments become void only in this test.
    tolerance = 2 if crop else 0.5
    assert figures["pq"] == pytest.approx(expected["pq"], abs=tolerance)
    assert ("ap50" in figures) == (background is not None)
    if background is not None:
        assert figures["ap50"] == pytest.approx(expected["ap50"], abs=tolerance)
    assert 5 < figures["pq"] < 95


def test_the_least_area_of_instances_keeps_99_of_100_segments():
    """Elsewhere it is the paper's."""
    source = Pieces(background_id=2)
    trips = data.round_trips(source, size=64, num_ids=64, factor=4)
    least = data.least_area(source, 64, num_ids=64, factor=4)
    found = trips[trips[:, 0] > 0.5, 1]
    assert (found >= least).mean() >= 0.99 > (found > least).mean()
    assert data.least_area(data.Shapes("v", 64), 64, num_ids=16, factor=4) is None


def test_check_tells_what_can_be_reached(capsys, monkeypatch):
    monkeypatch.setattr(data, "COUNT", 64)
    found = data.check(data.Shapes("v", 64), size=64, num_ids=16)
    out = capsys.readouterr().out
    assert found["pq"] > 90
    assert "64 images, 0 faults" in out
    assert "objects a picture: median 3, most 4" in out
    assert out.splitlines()[-1].startswith("suggestion: --size 64 --num_ids 16 (")


def test_check_suggests_tiles_for_instances_that_are_small(capsys):
    """Twice as long as the object that holds the median of all object pixels."""
    data.check(Pieces(background_id=2), size=32, num_ids=16)
    sides = []
    for n in range(len(Pieces())):
        picture = Pieces()[n]
        pixels = []  # for each pixel of an object, the area of the object
        for s in picture["segments_info"]:
            if s["category_id"] == 1 and not s["iscrowd"]:
                pixels += [s["area"]] * s["area"]
        sides.append(2 * np.sqrt(np.median(pixels)))
    expected = round(np.median(sides))
    assert 10 < expected < 30
    *_, suggestion = capsys.readouterr().out.splitlines()
    assert f" --crop {expected} " in suggestion
    data.check(Pieces(), size=32, num_ids=16)  # a scene is understood as a whole
    assert "--crop" not in capsys.readouterr().out.splitlines()[-1]


def test_a_training_that_cannot_do_well_says_so(capsys):
    args = Namespace(size=32, crop=0)
    data.warn_of_ceiling(Pieces(2), args, 4, factor=8)
    line = "with N = 4 and crops of 0 px a perfect network reaches AP50"
    assert line in capsys.readouterr().err
    data.warn_of_ceiling(data.Shapes("v"), Namespace(size=64, crop=0), 16, factor=4)
    assert not capsys.readouterr().err


def test_the_defaults_of_small_are_too_small_for_nuclei():
    folder = reference("../data/nuclei")
    source = data.open_data(folder, "train", images=False)
    small = data.perfect_network(source, 64, num_ids=16, factor=4, limit=48)
    large = data.perfect_network(source, 128, num_ids=128, factor=4, limit=48)
    assert small["ap50"] < 65
    assert large["ap50"] > 93


# ------------------------------------------------------------------------------- pq.py
def brute_force(gt, truth, pred, found, every_crowd):
    """Sum of IoU, TP, FP, FN of an image, by category, with a mask of each segment."""
    sums = np.zeros((3, 4))
    matched = set()
    for p in found:
        inside = pred == p["id"]
        excusing = [0]  # ids of the truth on which a wrong prediction is not counted
        for t in truth:
            if t["category_id"] != p["category_id"]:
                continue
            mask = gt == t["id"]
            union = (mask | inside) & ~(inside & (gt == 0))
            iou = (mask & inside).sum() / union.sum()
            if t["iscrowd"]:
                # the panoptic API knows only the last crowd of a category
                excusing = [*excusing, t["id"]] if every_crowd else [0, t["id"]]
            elif iou > 0.5:
                sums[t["category_id"]] += (iou, 1, 0, 0)
                matched |= {("truth", t["id"]), ("found", p["id"])}
        excused = np.isin(gt[inside], excusing).mean() > 0.5
        if ("found", p["id"]) not in matched and not excused:
            sums[p["category_id"], 2] += 1
    for t in truth:
        if ("truth", t["id"]) not in matched and not t["iscrowd"]:
            sums[t["category_id"], 3] += 1
    return sums


@pytest.mark.parametrize("kinds", [1, 3])
def test_pq_equals_brute_force(kinds):
    rng = np.random.default_rng(0)
    categories = [{"id": k} for k in range(kinds)]
    quality = pq.PanopticQuality(categories if kinds > 1 else None)
    expected = np.zeros((3, 4))
    for _ in range(60):
        gt = rng.integers(0, 6, (4, 4)).repeat(5, 0).repeat(5, 1) * 1001
        pred = np.roll(gt, rng.integers(0, 4, 2), (0, 1)) + 3
        pred[rng.random(pred.shape) < 0.1] = 0
        truth = data.describe(gt)
        found = data.describe(pred)
        for s in truth + found:
            s["category_id"] = s["id"] % 17 % kinds
            s["iscrowd"] = rng.random() < 0.3
        quality.update(gt, truth, pred, found)
        expected += brute_force(gt, truth, pred, found, every_crowd=kinds == 1)
    assert np.allclose(quality.sums, expected[:kinds])
    assert quality.sums.min() > 3  # all cases occurred


def test_the_pq_command_equals_the_panoptic_api(tmp_path):
    root = reference("pq")
    result = tmp_path / "r.json"
    run("pq --gt", root / "gt.json", "--pred", root / "pred.json", "--json", result)
    found = read(result)
    expected = read(root / "expected.json")
    found_classes = found.pop("per_class")
    expected_classes = expected.pop("per_class")
    for name, figures in expected.items():
        assert found[name] == pytest.approx(figures, abs=1e-12)
    for name, figures in expected_classes.items():
        assert found_classes[name] == pytest.approx(figures, abs=1e-12)


def test_images_are_paired_by_id_as_text(tmp_path, capsys):
    """What lacks a prediction is missed. A predicted PNG may have a palette."""
    gt = write_coco(tmp_path / "gt", count=40)
    old, new = '"image_id": 9', '"image_id": "9"'
    pred = write_coco(tmp_path / "pred", "panoptic", old, new=new, count=39)
    folder = pred.parent / "panoptic_val"
    data.write_id_png(folder / "1.png", square(300, 70_000))  # categories exchanged
    palette = folder / "2.png"
    Image.open(palette).quantize(4).save(palette)
    assert pq.score_files(gt, pred)["All"]["pq"] == 38 / 39.5
    line = "40 images in the truth, 39 in the prediction, 39 in both"
    assert line in capsys.readouterr().err


def test_crowds_are_ignored_in_any_order():
    gt = np.repeat([1, 2, 3], 20)[None].repeat(40, 0)
    pred = np.where(np.arange(40)[:, None] < 4, 0, gt)
    segments = data.describe(gt)
    truth = [{**s, "iscrowd": int(s["id"] < 3)} for s in segments]
    for order in (truth, truth[::-1]):
        quality = pq.PanopticQuality()
        quality.update(gt, order, pred, segments)
        assert quality.result()["All"]["pq"] == pytest.approx(0.9)


def test_a_predicted_segment_without_pixels_is_ignored():
    """A file may list it; it is no false positive, with classes or without."""
    ids = row("1122")
    truth = data.describe(ids)
    found = [*data.describe(ids), {"id": 9, "category_id": 1}]
    for categories in (None, pq.OBJECT):
        quality = pq.PanopticQuality(categories)
        quality.update(ids, truth, ids, found)
        assert quality.sums.tolist() == [[2, 2, 0, 0]]


@pytest.mark.parametrize("count", [10_000, 20_000])
def test_many_segments_need_little_memory(count):
    ids = (np.arange(count) + 1).reshape(100, -1).repeat(3, 0).repeat(3, 1)
    segments = data.describe(ids)
    pred = np.where(np.eye(*ids.shape), 0, ids)
    quality = pq.PanopticQuality()
    tracemalloc.start()
    quality.update(ids, segments, pred, segments)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6  # bytes
    assert np.allclose(quality.sums, [count - 100 / 3, count, 0, 0])


def test_instances_are_scored_alone():
    """The background is matched with the others, and counted by no figure."""
    truth = np.ones((10, 10), np.int32)
    truth[:4, :4] = 2
    truth[6:, 6:] = 3
    found = np.full((10, 10), 7)
    found[:4, :3] = 4  # IoU 0.75
    found[8:, 8:] = 5  # IoU 0.25
    found[0, 9] = 6  # on the background
    segments = data.describe(truth)
    segments[0]["category_id"] = 9
    scene = {"ids": truth, "segments_info": segments, "file_name": "x"}
    scene["background_id"] = 9
    score = pq.Score()
    score.update(scene, found)
    expected = {"pq": 75 / 2.5, "sq": 75, "rq": 100 / 2.5, "ap50": 25}
    expected.update(merged=0, missed=50)  # 5 holds a quarter of its instance
    assert score.result() == pytest.approx(expected)
    score.instances.quality.sums[0] = 0  # as if no instance were there, and none found
    assert score.result()["ap50"] is None


def test_merged_and_missed_instances_are_counted():
    """Three of five instances lie in one segment, one in void; crowds do not count."""
    truth = np.zeros((6, 10), np.int32)
    truth[:5] = np.arange(10) // 2 + 1
    truth[5, :4] = 7
    truth[5, 4:] = 6
    found = np.zeros((6, 10), np.int32)
    found[5] = 3
    found[:5, :6] = 1
    found[:5, 8:] = 2
    segments = data.describe(truth)
    for s in segments:
        s["category_id"] = 9 if s["id"] == 6 else 1
        s["iscrowd"] = int(s["id"] == 7)
    scene = {"ids": truth, "segments_info": segments, "file_name": "x"}
    scene["background_id"] = 9
    score = pq.Score()
    score.update(scene, found)
    figures = score.result()
    assert (figures["merged"], figures["missed"]) == (60, 20)


def test_a_score_of_scenes_is_class_agnostic_pq_in_percent():
    [scene] = scenes(1)
    score = pq.Score()
    score.update(scene, scene["ids"] + 100)
    assert score.result() == {"pq": 100, "sq": 100, "rq": 100}


# ---------------------------------------------- errors of the command line, in one line
# Each: command | a text of the JSON | what stands there instead | words of the line ...
# DATA and PQ are commands with that JSON.
WRONG = r"""data --seed -1 | | | --seed
data --seed x | | | --seed
data --no_such 1 | | | --no_such
data --split | | | --split
DATA --split absent | | | instances_absent.json
data --data nowhere | | | nowhere | --model small --data shapes
data --check --data nowhere | | | nowhere
data --data shapes --out /dev/null/x | | | /dev/null
PQ --json . | | | can't be written
pq --gt x | | | --pred
pq --gt x --pred x | | | x: no such COCO JSON
DATA | {"images" | [{"images" | panoptic_val.json: not a readable COCO JSON
DATA | "categories": [ | "categories": [7, | panoptic_val.json: not a readable COCO JSON
DATA | cat | \udcff | panoptic_val.json
DATA | {"images": | NESTED | panoptic_val.json
DATA | {"id": 2, | {"x": 2, | panoptic_val.json: not a readable COCO JSON
PQ | "annotations": [ | "annotations": [7, | panoptic_val.json: not a readable COCO JSON
PQ | "segments_info": [ | "segments_info": [5, | 1: not a readable list of segments
PQ | "segments_info" | "x" | image 1: not a readable list of segments
PQ | 300 | -300 | image 1 | holds id 300, which the JSON does not list
PQ | 300 | "300" | image 1: not a readable list of segments
PQ | 300 | 0 | image 1: not a readable list of segments
PQ | 300 | 70000 | image 1: lists segment 70000 in several categories
PQ | "category_id": 2 | "category_id": [] | image 1: not a readable list of segments
PQ | "category_id": 2 | "category_id": 99 | image 1: the truth does not list category 99
PQ | "image_id": 1 | "image_id": "x_1" | image_id is 1 in | x_1 in
PQ | "1.png", "segments_info" | "9.png", "segments_info" | image 1 | 9.png"""


@pytest.mark.parametrize("case", WRONG.splitlines())
def test_what_is_wrong_is_said_in_one_line(capsys, case):
    command, old, new, *words = [part.strip() for part in case.split("|")]
    new = new.replace("NESTED", "[" * 99_999).replace(r"\udcff", "\udcff")
    gt = write_coco("gt")
    pred = write_coco("pred", "panoptic", old, new=new)
    command = command.replace("DATA", "data --data pred --split val")
    command = command.replace("PQ", f"pq --gt {gt} --pred {pred}")
    line = refused(capsys, command)
    assert all(word in line for word in words), line


@pytest.mark.parametrize("text", ["", " "])
def test_an_empty_name_is_refused(capsys, text):
    """It is an unset variable of a shell, and would mean another folder."""
    assert "--out" in refused(capsys, "ae --out", text)
    assert "--out" in refused(capsys, "sample --out", text)
    assert "--images" in refused(capsys, "sample --images", text)


def test_a_device_that_is_not_there_is_refused_with_the_reason(capsys):
    assert "must be cuda, mps, cpu or auto" in refused(capsys, "sample --device meta")
    line = refused(capsys, "sample --device nowhere")
    assert "--device nowhere: not available here" in line
    if not torch.cuda.is_available():
        line = refused(capsys, f"sample --ckpt {SHAPES} --device cuda")
        assert data.why_no_gpu() in line
        with bad_input("--device cuda"):
            sample.load(SHAPES, device="cuda")


def test_a_gpu_that_is_there_and_not_usable_is_said(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    exists = os.path.exists
    driver = lambda path: path == "/dev/nvidiactl" or exists(path)
    monkeypatch.setattr(os.path, "exists", driver)
    assert data.choose_device("auto") == torch.device("cpu")
    assert "note: on the CPU: PyTorch can't use the GPU (" in capsys.readouterr().err


def test_ctrl_c_ends_with_one_line(capsys, monkeypatch):
    monkeypatch.setattr(data, "open_data", mock.Mock(side_effect=KeyboardInterrupt))
    code, _, lines = shell(capsys, "data --data shapes")
    assert code == 130
    [line] = lines
    assert line.startswith("data.py: error: interrupted")


SHORTAGES = [
    (MemoryError(), "out of memory: lower --micro_batch"),
    (torch.OutOfMemoryError("CUDA out of memory"), "out of memory"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out of memory"),
    (RuntimeError("DataLoader worker killed by Bus error"), "--shm-size or --ipc=host"),
    (OSError("Too many open files"), "ulimit -n"),
]


@pytest.mark.parametrize("error, words", SHORTAGES)
def test_what_the_machine_lacks_is_said_in_one_line(capsys, monkeypatch, error, words):
    monkeypatch.setattr(data, "open_data", mock.Mock(side_effect=error))
    assert words in refused(capsys, "data --data shapes")


def test_other_errors_show_where_they_come_from(monkeypatch):
    monkeypatch.setattr(data, "open_data", mock.Mock(side_effect=RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        run("data --data shapes")


def settings_of(module):
    """The dataclass of what a script can be told."""
    own = {data: data.LookSettings, pq: pq.PQSettings}
    return own[module] if module in own else module.Settings


def test_help_shows_every_flag_with_its_meaning(capsys):
    for script, module in SCRIPTS.items():
        code, out, _ = shell(capsys, f"{script} --help")
        assert code == 0
        assert f"python {script}.py" in out  # the docstring's examples
        for field in dataclasses.fields(settings_of(module)):
            if field.metadata:
                assert f"--{field.name} " in out


def test_rank_counts_only_under_torchrun(monkeypatch):
    """Some machines set RANK for purposes of their own."""
    for name in ("MASTER_ADDR", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "1")
    assert imported_afresh(data).RANK == 0
    assert imported_afresh(data).WORLD == 1
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert imported_afresh(data).RANK == 1
    assert imported_afresh(data).WORLD == 2


def imported_afresh(module):
    """The module once more, as if it had not been imported."""
    spec = importlib.util.spec_from_file_location("afresh", module.__file__)
    again = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(again)
    return again


def test_nothing_depends_on_assert():
    """`python -O` removes it."""
    for module in MODULES:
        tree = ast.parse(Path(module.__file__).read_text())
        assert not any(isinstance(node, ast.Assert) for node in ast.walk(tree))


# ----------------------------------------------------------------------------- settings
def settings_by(module, *flags):
    """The settings of a training with these flags."""
    flags = [str(f) for f in flags]
    return data.configure(module.Settings, module.SMALL, "", flags)


def rewrite(path, **settings):
    """Change the settings that a file stores."""
    content = torch.load(path)
    content["settings"].update(settings)
    torch.save(content, path)


def test_a_setting_that_is_not_typed_is_that_of_the_model_or_the_papers():
    paper = settings_by(ae)
    assert (paper.size, paper.num_ids, paper.batch_size) == (512, 128, 16)
    small = settings_by(ae, "--model", "small")
    for name, value in ae.SMALL.items():
        assert getattr(small, name) == value
    assert small.warmup == paper.warmup  # what the table does not say
    typed = settings_by(ae, "--model", "small", "--num_ids", "32", "--iters", "7")
    assert (typed.num_ids, typed.iters, typed.size) == (32, 7, 64)


def test_a_checkpoint_says_what_the_network_is_and_which_data_it_is_for(trained):
    stage1 = trained / "ae.pt"
    for module, start in ((ae, stage1), (diffusion, stage1)):
        found = settings_by(module, "--ckpt", start)
        assert (found.model, found.data, found.size) == ("small", "shapes", 32)
    assert settings_by(ae, "--ckpt", stage1).num_ids == 8
    assert settings_by(diffusion, "--out", trained).data == "shapes"  # ae.pt in --out
    stage2 = trained / "ldm.pt"
    found = settings_by(diffusion, "--ckpt", stage2, "--data", "mine")
    assert (found.data, found.latent_scale) == ("mine", 0.36)


HOW_TO_TRAIN = {
    "lr": 7.0,
    "iters": 7,
    "distill": 7,
    "given": 0.7,
    "augment": 0.7,
    "batch_size": 7,
    "micro_batch": 7,
    "loss_weight": "snr",
    "ema": 0.7,
    "warmup": 7,
    "kl": 7.0,
}


@pytest.mark.parametrize("stage, module", [("ae", ae), ("ldm", diffusion)])
def test_nothing_about_how_to_train_comes_from_a_checkpoint(
    tmp_path, trained, stage, module
):
    path = shutil.copy(trained / f"{stage}.pt", tmp_path)
    assert not HOW_TO_TRAIN.keys() & torch.load(path)["settings"].keys()
    before = dataclasses.asdict(settings_by(module, "--ckpt", path))
    rewrite(path, **HOW_TO_TRAIN)
    assert dataclasses.asdict(settings_by(module, "--ckpt", path)) == before


@pytest.mark.parametrize("stage, module", [("ae", ae), ("ldm", diffusion)])
def test_a_resumed_run_keeps_its_settings_and_may_change_a_few(trained, stage, module):
    """Those that say how fast it goes and where; what is typed decides."""
    state = torch.load(trained / f"{stage}_state.pt")["settings"]
    found = settings_by(module, "--resume", "--out", trained)
    assert (found.iters, found.batch_size, found.lr) == (3, 4, module.SMALL["lr"])
    assert dataclasses.asdict(found) == {**state, "resume": True, "out": str(trained)}
    flags = ("--iters", "9", "--lr", "0.5", "--num_workers", "1")
    found = settings_by(module, "--resume", "--out", trained, *flags)
    assert (found.iters, found.lr, found.num_workers) == (9, 0.5, 1)
    assert found.seed == state["seed"]


CONTRADICTIONS = [
    ("ae", "--num_ids 16", "ae.pt"),
    ("ae", "--vae none", "ae.pt"),
    ("ae", "--encoding rgb", "ae.pt"),
    ("ae", "--model sd", "ae.pt"),
    ("diffusion", "--latent_scale 1", "ldm.pt"),
    ("diffusion", "--model none", "ldm.pt"),
]


@pytest.mark.parametrize("script, flags, file", CONTRADICTIONS)
def test_a_flag_that_contradicts_the_checkpoint_is_refused(
    trained, capsys, script, flags, file
):
    command = f"{script} --iters 0 --num_workers 0 --device cpu {flags} --out ."
    line = refused(capsys, f"{command} --ckpt", trained / file)
    assert flags in line
    assert f"{file} was made with" in line


@pytest.mark.parametrize("script", ["ae", "diffusion"])
@pytest.mark.parametrize("flag", ["--seed 5", "--crop 8", "--train_split x"])
def test_a_flag_that_contradicts_the_run_is_refused(trained, capsys, script, flag):
    line = refused(capsys, f"{script} --resume {flag} --out", trained)
    assert f"{flag}: " in line
    assert "_state.pt was made with" in line


def test_a_setting_of_another_type_is_refused_by_name(tmp_path, trained, capsys):
    for stage, script in (("ae", "ae"), ("ldm", "diffusion")):
        path = shutil.copy(trained / f"{stage}.pt", tmp_path)
        rewrite(path, size="64")
        line = refused(capsys, f"{script} --ckpt", path)
        assert "its setting size is '64'" in line
    path = shutil.copy(trained / "ldm.pt", tmp_path)
    rewrite(path, postprocess="connected")  # of an earlier version
    line = refused(capsys, "sample --limit 1 --ckpt", path)
    assert "its setting postprocess is 'connected'" in line


@pytest.mark.parametrize("script, stage", [("ae", "ae"), ("diffusion", "ldm")])
def test_settings_that_this_version_does_not_know_are_refused(
    tmp_path, trained, capsys, script, stage
):
    """A run of a version that had another setting can't be resumed."""
    for name in (f"{stage}.pt", f"{stage}_state.pt"):
        shutil.copy(trained / name, tmp_path)
    rewrite(tmp_path / f"{stage}_state.pt", unheard_of=3)
    line = refused(capsys, f"{script} --resume --out", tmp_path)
    assert "unheard_of" in line


def test_stage_2_without_stage_1_says_to_run_it(capsys):
    line = refused(capsys, "diffusion --model small --data shapes")
    assert "ae.pt: not there; train stage 1 first" in line


def test_batch_norm_needs_two_images_on_each_device(trained, capsys):
    for flag in ("--batch_size 1", "--micro_batch 1"):
        command = f"{TINY_LDM} --classes {flag} --out out --ckpt"
        line = refused(capsys, command, trained / "ldm.pt")
        assert "batch norm needs at least two images" in line


def test_the_paper_is_the_default():
    """What goes beyond it is off, and stage 2's values are those of section 4.1."""
    paper = {f.name: f.default for f in dataclasses.fields(diffusion.Settings)}
    assert (paper["iters"], paper["batch_size"], paper["lr"]) == (50_000, 256, 1e-4)
    assert (paper["scheduler"], paper["loss_weight"]) == ("ddim", "linear")
    beyond = ("given", "distill", "augment", "crop", "ema")
    assert not any(paper[name] for name in beyond)


# ------------------------------------------------------------- checkpoints, files, logs
class Bomb:
    """Pickles as a call."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


BOMBS = [
    (os.mkdir, "ran"),
    (os.system, "mkdir ran"),
    (exec, "open('ran', 'w')"),
    (eval, "[].no_such"),
]


@pytest.mark.parametrize("function, argument", BOMBS)
def test_reading_a_checkpoint_executes_nothing(function, argument):
    bomb = Bomb(function, (argument,))
    weights = ae.Autoencoder(8).state_dict()
    layouts = [{"kind": "ae", "p": bomb}, [bomb], {"vae": weights, "p": bomb}]
    for content in layouts:
        torch.save(content, "x.pt")
        with contextlib.suppress(BadInput):
            content = data.load("x.pt")
            assert content["kind"] in ("ae", "release_ae")
        with contextlib.suppress(BadInput):
            ae.load_autoencoder("x.pt")
    assert os.listdir() == ["x.pt"]


def test_a_checkpoint_is_whole_and_of_the_kind_that_is_asked_for():
    data.write("x.pt", {"kind": "ae"})
    with bad_input("x.pt: must be a checkpoint of kind ldm, is 'ae'"):
        data.load("x.pt", ["ldm"])
    os.truncate("x.pt", 300)
    with bad_input("x.pt: not a readable checkpoint"):
        data.load("x.pt", ["ldm"])


FULL_DISK = [OSError(28, "No space left"), RuntimeError("write failed")]


@pytest.mark.parametrize("error", FULL_DISK)
def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch, error):
    path = tmp_path / "x"
    path.write_text("old")
    monkeypatch.setattr(os, "replace", mock.Mock(side_effect=error))
    with bad_input("x: can't be written .* unharmed"):
        data.write(path, {})
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["x"]


def test_figures_become_json_without_help():
    """A NumPy number would fail; what has no value is null."""
    for content in ({"pq": None}, {"n": int(np.int64(3))}):
        data.write("x.json", content)
        assert read("x.json") == content
    with pytest.raises(TypeError):
        data.write("x.json", {"n": np.int64(3)})
    [scene] = scenes(1)
    score = pq.Score()
    score.update(scene, scene["ids"])
    quality = pq.PanopticQuality()
    truth = (scene["ids"], scene["segments_info"])
    quality.update(*truth, *truth)
    plain = [score.result(), quality.result(), data.describe(scene["ids"])]
    assert json.loads(json.dumps(plain)) == plain


def test_an_average_follows_the_weights_and_can_stand_in_for_them():
    weight = torch.nn.Parameter(torch.zeros(1))
    average = data.Average([weight], decay=0.9)
    expected = 0.0
    for iteration in range(200):
        with torch.no_grad():
            weight += 1
        average.update(iteration)
        decay = min(0.9, (1 + iteration) / (10 + iteration))
        expected = decay * expected + (1 - decay) * (iteration + 1)
    with average.in_place():
        assert weight.item() == pytest.approx(expected, rel=1e-5)
    assert weight.item() == 200


def test_the_learning_rate_warms_up_and_falls():
    args = Namespace(lr=2.0, iters=1000, warmup=200, schedule="cosine")
    rates = [data.learning_rate(it, args) for it in range(1000)]
    assert rates[0] == pytest.approx(0.01, rel=1e-3)
    assert rates[199] == pytest.approx(1.8, abs=0.02)
    assert rates[999] == pytest.approx(0.02, rel=1e-2)  # 1% of the peak
    args.schedule = "constant"
    assert data.learning_rate(500, args) == 2.0


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_a_run_of_one_iteration_learns(schedule):
    args = Namespace(lr=2.0, iters=1, warmup=200, schedule=schedule)
    assert data.learning_rate(0, args) == 2.0


def test_no_iteration_draws_what_another_one_drew(monkeypatch):
    """Nor with another seed or on another rank. On a CPU 32 bits of a seed count."""
    args = Namespace(batch_size=1, iters=1)
    drawn = []
    for seed in (0, 1, 1 << 20, 1 << 31):
        for rank in (0, 1):
            args.seed = seed
            monkeypatch.setattr(data, "RANK", rank)
            a_run = data.Run.__new__(data.Run)
            a_run.args = args
            for stride in (1, 1 << 20, 1 << 32):
                a_run.left = range(stride, 3 * stride, stride)
                for _ in a_run.iterations():
                    drawn.append(torch.rand(2).tolist())
    assert len(set(map(tuple, drawn))) == len(drawn)


def new_run(out, **settings):
    """A Run of a layer with one weight, by which its parts can be tested alone."""
    layer = torch.nn.Linear(1, 1, bias=False)
    args = ae.Settings(out=str(out), **settings)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    average = data.Average([], 0)
    return data.Run(args, layer, optimizer=optimizer, scaler=scaler, average=average)


def test_twenty_gradients_in_a_row_that_are_not_finite_end_a_run(tmp_path):
    a_run = new_run(tmp_path)
    finite = torch.tensor(1.0)
    for wrong in (torch.tensor(torch.nan), torch.tensor(torch.inf)):
        for _ in range(19):
            assert not a_run.may_step(wrong)
        assert a_run.may_step(finite)
    for _ in range(19):
        a_run.may_step(wrong)
    with bad_input("the gradient has not been finite for 20 iterations"):
        a_run.may_step(wrong)


def test_a_new_run_removes_the_state_of_an_older_one(tmp_path):
    """Otherwise --resume would go on with the older one before the first save."""
    data.write(tmp_path / "ae_state.pt", {"kind": "ae_state"})
    data.write(tmp_path / "ae_log.jsonl", "{}\n")
    new_run(tmp_path, iters=0)  # an evaluation leaves it
    assert (tmp_path / "ae_state.pt").exists()
    new_run(tmp_path, iters=5)
    assert not (tmp_path / "ae_state.pt").exists()
    assert read(tmp_path / "ae_log.jsonl") == []


def test_a_resumed_run_mends_its_log(tmp_path):
    """What came after the saved state is logged again; a killed run may cut a line."""
    a_run = new_run(tmp_path, iters=50)
    a_run.bar = mock.Mock()
    a_run.log(20, loss=1.0)
    a_run.save(20, {})
    a_run.log(40, loss=torch.tensor(2.0))
    with open(tmp_path / "ae_log.jsonl", "a") as file:
        file.write('{"iteration": 20, "val')
    resumed = new_run(tmp_path, iters=50, resume=True)
    assert resumed.left == range(20, 50)
    assert read(tmp_path / "ae_log.jsonl") == [{"iteration": 20, "loss": 1.0}]


# ------------------------------------------------------------- stage 1: the autoencoder
@pytest.mark.parametrize("encoding", ae.ENCODINGS)
def test_encodings_tell_ids_apart_and_void_is_zero(encoding):
    for num_ids in (4, 16, 128):
        model = ae.Autoencoder(num_ids, encoding, factor=4, width=32)
        x = model.network_input(torch.arange(num_ids).view(1, 1, -1))[0, :, 0]
        assert len(x.T.unique(dim=0)) == num_ids
        assert not x[:, 0].any()
        assert x.abs().max() <= 1


def test_autoencoder_has_the_papers_size():
    assert sum(p.numel() for p in ae.Autoencoder().parameters()) == 2_023_208


def test_the_authors_autoencoder_gives_the_authors_numbers():
    ref = numbers("ae_parity.npz")
    model = ae.load_autoencoder(reference("ae_official_format.pt"))
    with torch.no_grad():
        mean, logvar = model.encode(ref.ids)
        logits = model.decode(mean)
    near(mean, ref.latent_mean)
    near(logvar, ref.latent_logvar)
    near(logits[:, :8], ref.logits_quarter_top)
    height, width = ref.ids.shape[1:]
    found = np.stack([ae.likeliest(own, height, width)[0] for own in logits])
    assert (found == ref.argmax_full.numpy()).mean() > 0.999  # all but ties


def test_points_are_the_most_uncertain():
    """Between a cell of logit +1 and one of -1 lies the boundary, at 0."""
    logits = torch.zeros(1, 2, 8, 8)
    logits[:, 1, :, :4] = 1
    logits[:, 1, :, 4:] = -1
    of_ce = ae.uncertain_points(logits, ae.ce_uncertainty, 400)
    of_mask = ae.uncertain_points(logits[:, 1:], ae.mask_uncertainty, 400)
    for points in (of_ce, of_mask):
        assert points.shape == (1, 400, 2)
        at_the_boundary = (points[0, :, 0] - 0.5).abs() < 1 / 16
        assert at_the_boundary[:300].sum() > 100  # of about 150 that were drawn
        assert at_the_boundary[300:].sum() < 30  # of 100 uniform ones


def losses_at(logits, ids, ce_points, mask_points):
    """L_ce and L_mask at given points, with the numbers that they are divided by."""
    image, own = ae.present_segments(ids, logits.shape[1])
    masks = ids[image] == own[:, None, None]
    ce = ae.ce_loss(logits, ids, ce_points)
    mask = ae.mask_loss(logits[image, own], masks, mask_points)
    return ce, mask


def test_losses_at_all_pixel_centres_equal_the_dense_losses():
    """Cross-entropy leaves void out. BCE and Dice count it as outside of a segment."""
    ids = torch.randint(0, 5, (2, 8, 8), dtype=torch.uint8)
    logits = torch.randn(2, 8, 8, 8)
    places = (torch.arange(8) + 0.5) / 8
    centres = torch.cartesian_prod(places, places).flip(1).expand(8, 64, 2)
    (ce, ce_count), (mask, mask_count) = losses_at(logits, ids, centres[:2], centres)
    assert ce_count == (ids > 0).sum()
    assert mask_count == 8  # four segments in each of two maps
    dense = F.cross_entropy(logits, ids.long(), ignore_index=0, reduction="sum")
    close(ce, dense)
    total = 0
    for b, i in np.ndindex(2, 4):
        truth = (ids[b] == i + 1).float()
        p = logits[b, i + 1].sigmoid()
        dice = 1 - (2 * (p * truth).sum() + 1) / ((p + truth).sum() + 1)
        total += F.binary_cross_entropy(p, truth) + dice
    close(mask, total)


def test_losses_equal_the_authors():
    ref = numbers("loss_parity.npz")
    torch.manual_seed(0)

    def means(losses):
        """Both losses, each divided by its number."""
        return torch.stack([total / count for total, count in losses])

    at_theirs = losses_at(ref.logits, ref.targets, ref.ce_points, ref.mask_points)
    close(means(at_theirs), torch.stack([ref.ce, ref.mask_bce_plus_dice]))
    draws = []
    for _ in range(40):
        losses = ae.reconstruction_losses(ref.logits, ref.targets, 256)
        draws.append(means(losses))
    theirs = torch.stack([ref.ce_importance_mean_std, ref.mask_importance_mean_std])
    off = torch.stack(draws).mean(0) - theirs[:, 0]
    assert (off.abs() < 0.8 * theirs[:, 1]).all()


def test_maps_without_segments_have_no_loss():
    ids = torch.zeros(2, 8, 8, dtype=torch.uint8)
    logits = torch.randn(2, 4, 8, 8)
    for total, count in ae.reconstruction_losses(logits, ids, 16):
        assert total == count == 0


def test_kl_equals_torchs():
    mean, logvar = torch.randn(2, 2, 4, 3, 3)
    normal = torch.distributions.Normal
    theirs = torch.distributions.kl_divergence(
        normal(mean, (logvar / 2).exp()), normal(0, 1)
    )
    close(ae.kl_loss(mean, logvar), theirs.sum() / 2)


# ------------------------------------------------------------ from logits to segments
def test_likeliest_ids_are_those_of_a_softmax_over_all():
    """It goes through 16 ids at a time, which is to make no difference."""
    logits = 3 * torch.randn(37, 9, 7)
    large = F.interpolate(logits[None], (30, 41), mode="bilinear")[0]
    probability, best = large.softmax(0).max(0)
    ids, sure = ae.likeliest(logits, 30, 41)
    close(torch.from_numpy(sure), probability)
    assert (ids == best.numpy()).mean() > 0.999


def test_uncertain_pixels_and_small_segments_become_void():
    ids = row("111122233")
    probability = np.ones(9)
    probability[0] = 0.4
    found = ae.void_uncertain(ids, probability, min_area=3)
    assert np.array_equal(found, row("011122200"))
    found = ae.void_uncertain(ids, probability, min_area=4, threshold=0.3)
    assert np.array_equal(found, row("111100000"))


@pytest.mark.parametrize("side, least", [(512, 512), (640, 512), (64, 8)])
def test_the_least_area_is_the_papers_or_a_512th_of_a_small_picture(side, least):
    ids = np.ones((side, side), np.int32)
    sure = np.ones(ids.shape)
    ids.flat[: least - 1] = 2
    assert set(ae.void_uncertain(ids, sure).flat) == {0, 1}
    ids.flat[:least] = 2
    assert set(ae.void_uncertain(ids, sure).flat) == {1, 2}


def test_parts_that_do_not_touch_become_segments():
    ids = np.array([[1, 1, 2, 1], [0, 1, 2, 2], [3, 0, 1, 2], [3, 3, 1, 0]])
    pieces = np.array([[1, 1, 2, 3], [0, 1, 2, 2], [4, 0, 5, 2], [4, 4, 5, 0]])
    on_a_background = np.pad(ids, 2, constant_values=9)
    expected = np.pad(pieces, 2, constant_values=9)
    found = ae.connected(on_a_background, background=9)
    assert same_partition(found, expected)
    assert found[0, 0] == 9  # the background keeps its id,
    found = ae.connected(ids, background=1)  # and stays whole in any number of parts
    assert np.array_equal(found == 1, ids == 1)


# --------------------------------------------------------------- stage 2: the scheduler
def test_ddim_equals_the_reference():
    ref = numbers("ddim_parity.npz")
    ddim = diffusion.DDIM()
    close(ddim.alphas_cumprod, ref.alphas_cumprod)
    close(ddim.loss_weights("snr"), ref.loss_weight_max_clamp_snr_2)
    assert [j for j, _ in ddim.timesteps(50)] == ref.timesteps_50.tolist()
    noisy = (ref.add_noise_x0, ref.add_noise_eps, ref.add_noise_t)
    close(ddim.add_noise(*noisy), ref.add_noise_out)
    close(ddim.remove_noise(*noisy), ref.remove_noise_out)
    z = ref.ddim_x_T
    timesteps = [*ref.timesteps_10.tolist(), -1]
    for i, eps in enumerate(ref.ddim_eps):
        j, j_prev = timesteps[i : i + 2]
        z0 = ddim.remove_noise(z, eps, j)
        z = ddim.step(z, z0, j, j_prev)
        close(z0, ref.ddim_pred_x0[i])
        close(z, ref.ddim_prev_sample[i])


def test_loss_weights_and_timesteps_in_numbers():
    ddim = diffusion.DDIM()
    linear = ddim.loss_weights("linear")
    near(linear[[0, 124, 249, 999]], torch.tensor([0.004, 0.5, 1, 1]))
    assert (ddim.loss_weights("none") == 1).all()
    assert ddim.timesteps(4) == [(999, 749), (749, 499), (499, 249), (249, -1)]
    assert ddim.timesteps(1) == [(999, -1)]
    assert diffusion.ReleaseDDIM().timesteps(30)[0] == (989, 956)
    for scheduler in (ddim, diffusion.ReleaseDDIM()):
        with bad_input("--steps 1001: must be in 1..1000"):
            scheduler.timesteps(1001)


DIFFUSERS = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "timestep_spacing": "trailing",
}


@pytest.mark.parametrize("name", ["ddim", "ddim-v"])
def test_schedulers_equal_diffusers(name):
    """With ddim-v the network estimates v, and sampling begins with pure noise."""
    if name == "ddim":
        theirs = DDIMScheduler(**DIFFUSERS)
    else:
        more = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
        theirs = DDIMScheduler(**DIFFUSERS, **more)
    theirs.set_timesteps(25)
    ours = diffusion.SCHEDULERS[name]()
    close(ours.alphas_cumprod, theirs.alphas_cumprod)
    assert [j for j, _ in ours.timesteps(25)] == theirs.timesteps.tolist()
    z = torch.randn(2, 4, 8, 8)
    their_z = z
    for j, j_prev in ours.timesteps(25):
        output = torch.randn_like(z)
        z = ours.step(z, ours.remove_noise(z, output, j), j, j_prev)
        their_z = theirs.step(output, j, their_z).prev_sample
        close(z, their_z, atol=1e-4 * float(their_z.abs().max()))
    eps = torch.randn_like(z)
    j = torch.tensor([3, 700])
    close(ours.add_noise(z, eps, j), theirs.add_noise(z, eps, j))
    if name == "ddim-v":
        close(ours.target(z, eps, j), theirs.get_velocity(z, eps, j))


def test_the_last_timestep_of_v_is_pure_noise():
    ddim = diffusion.VDDIM()
    assert ddim.alphas_cumprod[-1] == 0
    close(ddim.alphas_cumprod[0], diffusion.DDIM().alphas_cumprod[0])
    z, eps = torch.randn(2, 1, 4, 2, 2)
    exact(ddim.add_noise(z, eps, ddim.T - 1), eps)
    # the network's output is then -z, and tells z without dividing by 0
    exact(ddim.target(z, eps, ddim.T - 1), -z)
    exact(ddim.remove_noise(eps, -z, ddim.T - 1), z)


# ------------------------------------------------------------ stage 2: Algorithms 1, 2
@pytest.mark.parametrize("scheduler", [diffusion.DDIM, diffusion.VDDIM])
def test_a_perfect_network_denoises_to_the_latent(tiny, scheduler):
    """In any number of steps, by Algorithm 2 and by Algorithm 3."""
    tiny.ddim = scheduler()
    z, first_noise, second_noise = torch.randn(3, 2, 4, 8, 8)
    noise = (first_noise, second_noise)

    def perfect(zj, condition, self_cond, j):
        """The target itself; self_cond is the estimate of the step before."""
        assert j == 999 or torch.allclose(self_cond, z, atol=1e-2)
        a, b = tiny.ddim.scales(j, zj)
        return tiny.ddim.target(z, (zj - a * z) / b, j)

    tiny.denoise = perfect
    M = z.sign().relu()
    for steps in (3, 1):
        close(tiny.sample(z, first_noise, steps), z, atol=1e-2)
        close(inpaint.inpaint(tiny, z, z, M, noise, steps), z, atol=1e-2)


def spy(model):
    """A list of the arguments of all calls of a model's network from now on."""
    seen = []
    denoise = model.denoise

    def noting(*arguments):
        seen.append(arguments)
        return denoise(*arguments)

    model.denoise = noting
    return seen


def test_loss_is_that_of_algorithm_1(tiny):
    """Void cells are left out, timesteps weighted, half of the samples conditioned."""
    ids = torch.randint(1, 8, (2, 32, 32))
    ids[:, :8] = 0
    ids[:, 9:12, 1:4] = 0  # not the top left pixel of a cell, so that it counts
    batch = {"ids": ids, "image": torch.randint(0, 255, (2, 3, 32, 32)).byte()}
    eps = torch.randn(2, 4, 8, 8)
    j = torch.tensor([700, 100])
    tiny.loss_weights = tiny.ddim.loss_weights("linear")
    tiny.self_cond_share = 0.5
    seen = spy(tiny)
    with torch.no_grad():
        loss = tiny(batch, eps, j)
        assert len(seen) == 2
        zj, condition, self_cond, _ = seen[-1]
        z = tiny.encode(ids)
        close(zj, tiny.ddim.add_noise(z, eps, j))
        close(condition, tiny.encode_image(batch["image"]))
        first = tiny.denoise(zj, condition, torch.zeros_like(z), j)
        estimate = tiny.ddim.remove_noise(zj, first, j)
        close(self_cond[0], estimate[0])
        assert not self_cond[1].any()
        output = tiny.denoise(zj, condition, self_cond, j)
    error = (output - tiny.ddim.target(z, eps, j)).square()
    error[:, :, :2] = 0
    weights = torch.tensor([1, 0.404])
    close(loss, (error.mean((1, 2, 3)) * weights).mean())


def test_algorithm_1_draws_noise_and_all_timesteps(tiny):
    ids = torch.zeros(4000, 32, 32, dtype=torch.uint8)
    eps, j = tiny.draw(ids)
    assert eps.shape == (4000, 4, 8, 8)
    assert eps.std().item() == pytest.approx(1, abs=0.01)
    assert 0 <= j.min() < 10 and 990 <= j.max() < 1000


def test_sampling_shows_its_estimates(tiny):
    condition = torch.randn(1, 48, 8, 8)
    noise = torch.randn(1, 4, 8, 8)
    trace = []
    z0 = tiny.sample(condition, noise, 3, trace=trace)
    assert len(trace) == 3
    exact(trace[-1], z0)


@pytest.mark.parametrize("place", [2, 4])
def test_grown_conv_in_begins_as_the_pretrained_unet(place):
    """The new channels, from `place` on, make no difference at first."""
    config = diffusion.small_unet_config(4, 8, channels=16)
    pretrained = UNet2DConditionModel(**config).eval()
    grown = diffusion.grow_conv_in(pretrained, 8, place).eval()
    assert not any(".attn2." in name for name in grown.state_dict())
    # the pretrained one with cross-attention that gives zeros
    for name, p in pretrained.named_parameters():
        if ".attn2.to_out." in name:
            torch.nn.init.zeros_(p)
    x = torch.randn(1, 12, 8, 8)
    old = torch.cat([x[:, :place], x[:, place + 8 :]], dim=1)
    text = torch.zeros(1, 1, 8)
    with torch.no_grad():
        theirs = pretrained(old, 500, encoder_hidden_states=text).sample
        ours = grown(x, 500, encoder_hidden_states=None).sample
    close(ours, theirs, atol=1e-4)


NARROW_VAE = {
    "block_out_channels": [8, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "norm_num_groups": 4,
}


def test_images_are_encoded_eight_at_a_time_as_all_at_once():
    """Of all that a GPU holds, the encoder of a photograph needs most memory."""
    encoder = diffusion.SDEncoder(**NARROW_VAE)
    images = torch.randint(0, 256, (19, 3, 16, 16)).byte()
    counts = []
    encoder.register_forward_pre_hook(lambda _, inputs: counts.append(len(inputs[0])))
    with torch.no_grad():
        whole = encoder(images.float() / 127.5 - 1)
        parts = diffusion.LDM.encode_image(Namespace(image_encoder=encoder), images)
    close(parts, whole)
    assert counts == [19, 8, 8, 3]


def test_what_is_frozen_stays_in_evaluation_mode(tiny):
    """The statistics of a batch norm in an image encoder would go on running."""
    encoder = torch.nn.Sequential(torch.nn.BatchNorm2d(3))
    encoder.config = {}
    encoder.channels = 3
    settings = tiny.settings
    model = diffusion.LDM(tiny.autoencoder, encoder, tiny.unet, settings)
    model.train()
    model.encode_image(torch.randint(0, 255, (2, 3, 8, 8)).byte())
    assert encoder[0].num_batches_tracked == 0
    assert not encoder[0].running_mean.any()
    assert model.unet.training
    assert not model.autoencoder.training


def test_norm_layers_do_not_decay(tiny):
    others, norms = diffusion.decay_groups(tiny)
    assert norms["weight_decay"] == 0
    own = [p for p in tiny.parameters() if p.requires_grad]
    assert len(others["params"]) + len(norms["params"]) == len(own)
    assert all(p.ndim == 1 for p in norms["params"])


def test_a_picture_gets_the_same_mask_in_any_batch(tiny):
    """The noise belongs to the seed and the image_id."""
    pair = scenes(2)
    renamed = {**pair[1], "image_id": "other"}
    [_, (_, together)] = diffusion.sample_maps(tiny, pair, steps=2, seed=0)
    [(_, alone)] = diffusion.sample_maps(tiny, pair[1:], steps=2, seed=0)
    assert np.allclose(together, alone, atol=1e-4)
    [(_, other)] = diffusion.sample_maps(tiny, [renamed], steps=2, seed=0)
    assert not np.allclose(alone, other, atol=1e-4)
    [(_, other)] = diffusion.sample_maps(tiny, pair[1:], steps=2, seed=1)
    assert not np.allclose(alone, other, atol=1e-4)


# ------------------------------------------------- beyond the paper: few passes, told
def plain_names(logits, ids):
    """`name_by_noise` of a batch at once, from logits B x N x S x S: old id -> new id.

    From the largest to the smallest segment, each takes the likeliest free id. What is
    shown only where nothing is known comes last.
    """
    chances = logits.log_softmax(1)
    maps = []
    for own, y in zip(chances, ids):
        names = {0: 0}
        area = data.areas(y.numpy())
        means = {i: own[:, y == i].mean(1) for i in area}
        wanted = {int(scores[1:].argmax()) + 1 for scores in means.values()}
        elsewhere = set(own.argmax(0)[y == 0].tolist()) - wanted
        for i in sorted(area, key=area.get, reverse=True):
            scores = means[i]
            scores[list(elsewhere)] -= 1e6
            scores[list(names.values())] = -torch.inf
            names[i] = int(scores.argmax())
        maps.append([[names[i] for i in line] for line in y.tolist()])
    return torch.tensor(maps, dtype=ids.dtype)


def with_logits(model, logits):
    """Let a model's samples decode to these logits."""
    model.sample = mock.Mock(return_value=None)
    model.decode = mock.Mock(return_value=logits)
    return model


def test_the_noise_names_segments_as_the_plain_form_does(tiny):
    """One picture at a time needs no B x N x S^2 tensor, and gives the same."""
    tables = [np.random.default_rng(n).permutation(7) + 1 for n in range(3)]
    ids = [np.append(0, t)[s["ids"]] for t, s in zip(tables, scenes(3))]
    ids = torch.from_numpy(np.stack(ids)).byte()
    ids[:, :4] = 0  # void stays void
    logits = torch.randn(3, 8, 32, 32)
    model = with_logits(tiny, logits)
    found = diffusion.name_by_noise(model, ids, None, noise=None, passes=1)
    assert torch.equal(found, plain_names(logits, ids))
    assert found.dtype == ids.dtype
    for new, old in zip(found.numpy(), ids.numpy()):
        assert same_partition(new, old)  # one-to-one


def test_the_noise_names_a_segment_that_the_sample_merged():
    """The larger part keeps the sample's id; the other gets its likeliest free one."""
    ids = torch.tensor([[1, 1, 1, 2, 2]])[None].byte()
    logits = torch.zeros(1, 8, 1, 5)
    logits[:, 5] = 9  # the sample shows one segment, 5
    logits[:, 3, :, 3:] = 6  # where 2 is, 3 comes next
    model = with_logits(mock.Mock(), logits)
    found = diffusion.name_by_noise(model, ids, None, noise=None, passes=1)
    assert found.tolist() == [[[5, 5, 5, 3, 3]]]


def test_the_noise_keeps_the_ids_of_what_is_not_given():
    """A merged part of a partial map does not take the id that the rest needs."""
    ids = torch.tensor([[1, 1, 1, 2, 2, 0, 0]])[None].byte()
    logits = torch.zeros(1, 8, 1, 7)
    logits[:, 5, :, :5] = 9  # where 1 and 2 are given the sample shows 5,
    logits[:, 3, :, 5:] = 9  # elsewhere 3,
    logits[:, 3, :, 3:5] = 6  # which comes next where 2 is, before 6
    logits[:, 6, :, 3:5] = 4
    model = with_logits(mock.Mock(), logits)
    found = diffusion.name_by_noise(model, ids, None, noise=None, passes=1)
    assert found.tolist() == [[[5, 5, 5, 6, 6, 0, 0]]]


def test_the_noise_names_instances_apart_only_from_what_is_near():
    """Of three objects that the sample shows as 5, two are near each other."""
    ids = torch.ones(8, 32).byte()  # the background
    ids[2:6, 2:6] = 2
    ids[2:6, 6:9] = 3
    ids[2:6, 24:27] = 4
    chances = torch.full((8, 8, 32), -9.0)
    chances[5] = 0  # the sample shows one segment, 5,
    chances[6] = -4  # and 6 comes next
    name = diffusion.names_of(ids, chances, fixed=1, near=4)
    assert name.tolist() == [0, 1, 5, 6, 5, 0, 0, 0]
    name = diffusion.names_of(ids, chances)  # the background is the largest segment
    assert sorted(name[1:5].tolist()[:2]) == [5, 6]
    assert len(set(name[1:5].tolist())) == 4


def test_cells_where_objects_meet_count_more(tiny):
    ids = torch.ones(2, 32, 32).byte()  # 8 x 8 cells of background
    ids[0, 12:16, 12:16] = 2  # the cell at (3, 3)
    ids[0, 12:16, 20:24] = 3  # the cell at (3, 5)
    ids[0, 0, 0] = 0
    expected = torch.ones(2, 1, 8, 8)
    expected[0, 0, 2:5, 4] = 5  # between the two
    expected[0, 0, 0, 0] = 0  # void
    assert torch.equal(diffusion.instance_weights(tiny, ids), expected)
    assert tiny.cell_weights(ids).sum() == 127  # of panoptic maps: but for void, alike


def test_the_background_of_instances_has_one_id_in_training(tmp_path):
    """All others keep their pixels and categories, and no object has that id."""
    write_coco(tmp_path, "instances")
    source = data.open_data(tmp_path, "val")
    background = len(source.categories) - 1
    training = data.TrainingSet(source, 32, num_ids=8)
    for n in range(12):
        before = training[n]
        sample = data.Augmented(training, background=True)[n]
        ids = sample["ids"].flatten().long()
        assert same_partition(sample["ids"].numpy(), before["ids"].numpy())
        assert sample["classes"][1] == background
        assert torch.equal(
            sample["classes"][ids], before["classes"][before["ids"].flatten().long()]
        )
        assert (sample["classes"] == background).sum() == 1

    alone = {"ids": torch.tensor([[1, 1, 4, 0]]).byte(), "classes": torch.arange(8)}
    alone["classes"][alone["classes"] == background] = -1
    found = data.name_background(alone, source)["ids"].flatten().tolist()
    assert found[0] == found[1] not in (0, 1, 4)
    assert found[2:] == [4, 0]


def test_few_passes_shows_pure_noise_and_renames_what_is_given(tiny):
    ids = torch.tensor(np.stack([s["ids"] for s in scenes(8)])).byte()
    given = torch.where(torch.rand(8, 32, 32) < 0.5, ids, 0)
    images = torch.zeros(8, 3, 32, 32, dtype=torch.uint8)
    batch = {"ids": ids, "given": given, "image": images}
    eps, j = tiny.draw(ids)
    j = j.clamp(max=998)
    found, timesteps = diffusion.few_passes(tiny, batch, eps=eps, j=j, passes=1)
    condition = tiny.encode_image(images)
    expected = diffusion.name_by_noise(tiny, ids, condition, noise=eps, passes=1)
    assert torch.equal(found["ids"], expected)
    assert torch.equal(found["given"], torch.where(given > 0, expected, 0))
    assert torch.equal(timesteps[:4], j[:4])
    assert timesteps[4:].tolist() == [999] * 4
    one = {"ids": ids[:1], "image": images[:1]}
    _, timesteps = diffusion.few_passes(tiny, one, eps=eps[:1], j=j[:1], passes=1)
    assert torch.equal(timesteps, j[:1])  # a micro-batch of one sees all timesteps
    assert batch["ids"] is ids  # the batch itself is unharmed


def test_a_told_model_begins_as_the_untold_one(tiny):
    """What is given has four more channels of conv_in, whose weights begin at zero."""
    told = diffusion.tell_given(tiny).eval()
    assert told.settings["told"] and not tiny.settings["told"]
    assert told.unet.config.in_channels == tiny.unet.config.in_channels + 4
    ids = torch.randint(0, 8, (2, 32, 32)).byte()
    images = torch.randint(0, 255, (2, 3, 32, 32)).byte()
    batch = {"image": images, "ids": ids.clamp(min=1)}
    eps, j = tiny.draw(ids)
    with torch.no_grad():
        told_condition = told.condition({**batch, "given": ids})
        before = tiny.sample(tiny.condition(batch), eps, 2)
        after = told.sample(told_condition, eps, 2)
        close(after, before, atol=1e-4)
        close(told(batch, eps, j), tiny(batch, eps, j), atol=1e-4)
    assert diffusion.tell_given(told) is told


def test_what_is_known_is_zero_in_cells_without_a_given_pixel(tiny):
    told = diffusion.tell_given(tiny)
    given = torch.zeros(1, 32, 32, dtype=torch.uint8)
    given[0, 5, 9] = 3  # a single pixel of the cell (1, 2)
    images = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    with torch.no_grad():
        condition = told.condition({"image": images, "given": given})
        nothing = told.condition({"image": images})
        latent = told.encode(given)
    assert not nothing[:, 48:].any()
    exact(condition[:, :48], nothing[:, :48])
    known = condition[:, 48:]
    assert known.abs().sum(1)[0].nonzero().tolist() == [[1, 2]]
    exact(known[0, :, 1, 2], latent[0, :, 1, 2])


# ---------------------------------------------------------- the authors' checkpoints
@pytest.mark.parametrize("name", ["selfcond", "plain8"])
def test_the_authors_diffusion_checkpoints_give_the_authors_numbers(name):
    path = reference(f"ldm_official_{name}.pt")
    ref = numbers(f"ldm_{name}_parity.npz")
    model = sample.load(path)
    content = data.load(path, ["release_ldm"])
    arrived = {v.numpy().tobytes() for v in model.state_dict().values()}
    for part in ("vae_image", "vae_semseg", "unet"):
        for key, v in content[part].items():
            unused = key.startswith("post_quant_conv.")
            assert v.numpy().tobytes() in arrived or unused
    images = []
    for number in (12280, 14226):
        photo = reference(f"../data/coco16/val2017/0000000{number}.jpg")
        images.append(data.read_image(photo))
    trace = []
    with torch.no_grad():
        # Their picture is resized by Pillow. Ours differs by a few grey levels.
        size = model.settings["size"]
        pillow = Image.fromarray(images[0]).resize((size, size), Image.BICUBIC)
        resized = torch.tensor(np.asarray(pillow)).permute(2, 0, 1)[None]
        latent = model.condition({"image": resized})
        close(latent, ref.image_latent[:1], atol=0.05)  # JPEG decoders differ
        ours = model.condition(diffusion.batch_of(model, [{"image": images[0]}]))
        assert (ours - latent).abs().mean() < 0.05 * latent.abs().mean()
        model.sample(ref.image_latent[:1], ref.noise[:1], 10, trace=trace)
        logits = model.decode(trace[-1])[:, :4, ::4, ::4]
    near(trace[0], ref.z0_first[:1])
    near(trace[-1], ref.z0_last[:1])
    near(logits, ref.logits_quarter_top[:1])
    # ids_0, ids_1: 0 = void, else channel + 1; channel 0 is void
    field = F.interpolate(ref.field, (256, 256), mode="bilinear")
    for logits, theirs in zip(field, (ref.ids_0, ref.ids_1)):
        found = ae.void_uncertain(*diffusion.to_ids(model, logits, *theirs.shape))
        assert np.array_equal(found, (theirs - 1).clamp(min=0))


def test_the_authors_settings_are_honoured_or_refused_by_name(monkeypatch):
    path = reference("ldm_official_plain8.pt")
    content = data.load(path, ["release_ldm"])

    def told(**settings):
        """Their checkpoint with other settings."""
        changed = {**content, "p": {"model_kwargs": settings}}
        monkeypatch.setattr(data, "load", lambda *_: changed)
        return diffusion.load_model(path)

    model = told(
        size=64, scaling_factor=0.5, image_scaling_factor=0.25, beta_start=0.001
    )
    assert model.settings["size"] == 64
    assert model.scale == 0.5
    assert model.image_encoder.scale == 0.25
    assert model.ddim.alphas_cumprod[0] == pytest.approx(0.999)
    for key in diffusion.RELEASE:
        with bad_input(f"its setting {key} is 'unheard of'"):
            told(**{key: "unheard of"})
    content["unet"]["down_blocks.0.attn2.to_q"] = torch.zeros(1)
    with bad_input("fit its settings"):  # it kept its cross-attention
        told()


@pytest.mark.parametrize("authors", [False, True])
def test_every_script_takes_shipped_weights_and_the_authors(
    tmp_path, photo, monkeypatch, authors
):
    monkeypatch.setattr(data, "COUNT", 1)  # scenes to evaluate on
    sample_maps = diffusion.sample_maps
    in_one_step = lambda model, samples, steps, seed: sample_maps(
        model, samples, steps=1, seed=seed
    )
    monkeypatch.setattr(diffusion, "sample_maps", in_one_step)
    ckpt = reference("ldm_official_selfcond.pt") if authors else SHAPES
    base = ["--ckpt", ckpt, "--out", tmp_path]
    run("sample --steps 1 --images", photo, *base)
    assert data.read_id_png("predictions/photo.png").shape == (40, 60)
    mask = tmp_path / "part.png"
    run("inpaint --steps 1 --image", photo, "--mask", mask, *base)
    given = data.read_id_png(mask)
    completed = data.read_id_png("photo_completed.png")
    assert np.array_equal(completed[given > 0], given[given > 0])
    assert read("inpaint.json")["given"] == 1
    run("diffusion --data shapes --iters 1 --batch_size 1 --num_workers 0", *base)
    again = sample.load("ldm.pt").settings["postprocess"]
    assert again == ("release" if authors else "paper")


# ------------------------------------------------------------- README's recipe as printed
def readme_blocks():
    """README's code blocks: lists of lines without their indentation."""
    blocks = [[]]
    for line in (HERE / "README.md").read_text().splitlines():
        if line.startswith("    "):
            blocks[-1].append(line[4:])
        elif line.strip():
            blocks.append([])
    return [block for block in blocks if block]


def readme_split():
    """The Python program with which README splits an export."""
    for block in readme_blocks():
        if "python - <<'END'" in block:
            begin = block.index("python - <<'END'") + 1
            return "\n".join(block[begin : block.index("END")])


def readme_commands(script, words):
    """README's commands that call a script and hold all of some words, as lists."""
    lines = "\n".join("\n".join(block) for block in readme_blocks())
    lines = lines.replace("\\\n", " ").splitlines()
    commands = [shlex.split(line, comments=True) for line in lines]
    found = []
    for command in commands:
        if command[:2] == ["python", f"{script}.py"] and set(words) <= set(command):
            found.append(command[2:])
    return found


def write_export(root, tool, count=12):
    """An annotation tool's "COCO" export of some pictures, as it lies on the disk."""
    images = []
    objects = []
    for i in range(1, count + 1):
        name = f"{i}.png"
        picture = Image.fromarray(pixels_of(i))
        listed = {"CVAT": name, "Label Studio": f"images/0a1b2c3d-{name}"}.get(
            tool, name
        )
        folder = {"CVAT": "images/default", "Label Studio": "images"}.get(tool, "train")
        if tool == "Roboflow" and i % 4 == 0:
            folder = "valid"
        data.write(root / folder / name, picture)
        size = {"width": 64, "height": 48}
        images.append({"id": i, "file_name": listed, "folder": folder, **size})
        outline = json.loads(SQUARE)
        objects.append(
            {"id": i, "image_id": i, "category_id": 1, "segmentation": outline}
        )
    content = {"images": images, "annotations": objects, "categories": [{"id": 1}]}
    if tool == "Roboflow":
        for split in ("train", "valid"):
            own = [image for image in images if image["folder"] == split]
            of_split = {**content, "images": own}
            data.write(root / split / "_annotations.coco.json", of_split)
    elif tool == "CVAT":
        data.write(root / "annotations" / "instances_default.json", content)
    else:
        data.write(root / "result.json", content)


@pytest.mark.parametrize("tool", ["CVAT", "Label Studio", "Roboflow"])
def test_readmes_recipe_for_own_data_works_as_printed(tmp_path, monkeypatch, tool):
    """Export, split, check, both trainings, evaluation; the trainings are tiny."""
    monkeypatch.chdir(tmp_path)
    write_export(tmp_path / "mine", tool)
    val = "valid" if tool == "Roboflow" else "val"
    if tool != "Roboflow":
        exec(readme_split(), {})
    checks = readme_commands("data", ["mine", "--split", "train"])
    assert len(checks) == 2
    for command in checks:
        with contextlib.suppress(SystemExit):
            data.main(command)
    assert read("out/check.json")["faults"] == [] and Path("out/data.png").exists()
    [stage1] = readme_commands("ae", ["mine", "--model"])
    stage1 = [val if word == "val" else word for word in stage1]
    ae.main([*stage1, "--iters", "1", "--num_workers", "0", "--batch_size", "2"])
    [stage2] = readme_commands("diffusion", ["own"])[:1]
    diffusion.main([*stage2, "--iters", "1", "--num_workers", "0", "--batch_size", "2"])
    evaluation, _ = readme_commands("sample", ["own/ldm.pt"])
    sample.main([*evaluation, "--steps", "1"])
    assert read("out/sample.json")["images"] == 3 - (tool != "Roboflow")


# ---------------------------------------------------------------- labels (Table 2)
CLASSES = [
    {"id": 10, "name": "thing", "isthing": 1},
    {"id": 20, "name": "stuff", "isthing": 0},
]


def test_a_label_is_what_most_pixels_have_and_stuff_is_one_segment(tiny):
    ids = row("0777388855")
    second = torch.from_numpy(row("1001100111")).float()  # where stuff is likelier
    logits = torch.stack([1 - second, second])[None]
    image = np.zeros((1, 10, 3), np.uint8)
    tiny.classifier = Namespace(categories=CLASSES, logits=lambda images: logits)
    labelled, found = diffusion.label(tiny, image, ids, merge=False)
    assert np.array_equal(labelled, ids)
    found = {s["id"]: (s["category_id"], s["score"]) for s in found}
    assert found == {3: (20, 1), 5: (20, 1), 7: (10, 0.6667), 8: (10, 0.6667)}
    merged, segments = diffusion.label(tiny, image, ids)
    assert np.array_equal(merged, row("0777388833"))
    assert json.loads(json.dumps(segments)) == segments


def test_the_classifier_sees_instances_at_the_scale_of_their_tiles(tiny):
    ids = np.ones((30, 30), np.int32)
    ids[5:15, 5:15] = 2  # tiles of 20 px, which become 32 px
    seen = []

    def logits(images):
        seen.append(images.shape[-1])
        return torch.rand(1, 2, 8, 8)

    tiny.classifier = Namespace(categories=CLASSES, logits=logits)
    image = np.zeros((30, 30, 3), np.uint8)
    for crop, postprocess in [(0, "paper"), (16, "paper"), (16, "instances")]:
        tiny.settings.update(crop=crop, postprocess=postprocess)
        diffusion.label(tiny, image, ids)
    assert tiny.settings["size"] == 32
    assert seen == [32, 60, 48]


def test_without_a_classifier_every_segment_is_an_object(tiny):
    ids = row("0777355")
    found, segments = diffusion.label(tiny, np.zeros((1, 7, 3), np.uint8), ids)
    assert found is ids
    assert segments == data.describe(ids)


def test_the_loss_of_the_classifier_is_that_of_cells_with_a_category():
    classifier = diffusion.Classifier(CLASSES, "small").eval()
    ids = torch.randint(0, 5, (2, 32, 32))
    classes = torch.tensor([[-1, 0, 1, 1, -1], [-1, 1, 1, 0, 0]])
    images = torch.rand(2, 3, 32, 32) * 255
    batch = {"ids": ids, "classes": classes, "image": images}
    chances = classifier.logits(images).softmax(1)
    own = []
    for b, y, x in np.ndindex(2, 8, 8):
        k = classes[b, ids[b, 4 * y, 4 * x]]
        if k >= 0:
            own.append(chances[b, k, y, x])
    close(classifier(batch), -torch.stack(own).log().mean())


def test_training_on_with_other_categories_drops_the_classifier(shipped, capsys):
    args = Namespace(classes=False, model="small", batch_size=4, micro_batch=4)
    own = shipped.settings["categories"]
    source = Namespace(categories=own[::-1])
    diffusion.prepare_classifier(shipped, args, source)
    assert shipped.classifier is not None
    assert source.categories == own  # in the order of the classifier's outputs
    assert not any(p.requires_grad for p in shipped.classifier.parameters())
    source = Namespace(categories=CLASSES)
    diffusion.prepare_classifier(shipped, args, source)
    assert shipped.classifier is None
    assert "categories" not in shipped.settings
    assert "knows other categories: dropped" in capsys.readouterr().err


# ---------------------------------------------------------------- seeds, tiles
def test_agreement_by_hand():
    a = row("1122")
    b = row("5550")
    shared = np.array([2 / 3, 2 / 3, 1 / 4, 0])  # void agrees with nothing
    assert np.allclose(sample.agreement([a, a, b]), (1 + 2 * shared) / 3)


def test_ious_by_hand():
    """Of ids of any size; nothing is as long as the largest id."""
    found = sample.ious(row("00112"), row("30332"))
    assert found == [(0, 0, 1 / 2), (0, 3, 1 / 4), (1, 3, 2 / 3), (2, 2, 1)]
    large = row("0123") * 500_000_000
    tracemalloc.start()
    agreed = sample.agreement([large, large])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert agreed.tolist() == [[0, 1, 1, 1]]
    assert peak < 1e6  # bytes


@pytest.mark.parametrize("shape", [(100, 70), (10, 12, 3), (64, 64), (33, 8), (1, 1)])
def test_tiles_cover_a_picture_and_continue_its_edge(shape):
    array = np.random.default_rng(0).integers(0, 255, shape, np.uint8)
    covered = np.zeros(shape[:2], int)
    for (top, left), tile in sample.cut(array, 32).items():
        rows = np.arange(top, top + 32).clip(max=shape[0] - 1)
        columns = np.arange(left, left + 32).clip(max=shape[1] - 1)
        assert np.array_equal(tile, array[rows][:, columns])
        covered[top : top + 32, left : left + 32] += 1
    assert covered.all()
    for axis in (0, 1):
        starts = sorted({place[axis] for place in sample.cut(array, 32)})
        assert starts == [0] or max(np.diff(starts)) <= 24  # an overlap of a quarter
    [whole] = sample.cut(array, 0).values()
    assert whole is array


def test_tiles_are_samples_with_their_part_of_what_is_given():
    image = np.random.default_rng(0).integers(0, 255, (50, 40, 3), np.uint8)
    given = np.arange(2000, dtype=np.int32).reshape(50, 40)
    told = {"image": image, "image_id": 7, "given": given}
    untold = {"image": image, "image_id": "b"}
    tiles = sample.tiles_of([told, untold], [32, 32])
    assert len(tiles) == 8
    assert len({tile["image_id"] for tile in tiles}) == 8
    assert [tile["image_id"] for tile in tiles[::4]] == [7, "b"]
    assert tiles[1]["image_id"] == "7 at (0, 8)"
    assert [tile["picture"] for tile in tiles] == [0] * 4 + [1] * 4
    for tile in tiles:
        top, left = tile["place"]
        assert np.array_equal(tile["image"], image[top : top + 32, left : left + 32])
        assert ("given" in tile) == (tile["picture"] == 0)
        if "given" in tile:
            assert np.array_equal(
                tile["given"], given[top : top + 32, left : left + 32]
            )


def with_ids_of_its_own(part, rng):
    """A part of a map, its segments (0 = void) in random ids, which may be large."""
    known, place = np.unique(part, return_inverse=True)
    new = rng.choice(data.MAX_ID, len(known), replace=False) + 1
    new[known == 0] = 0
    return new[place].reshape(part.shape)


def tiles_of_a_truth(truth, side):
    """The tiles of a map as a perfect model finds them, each with ids of its own."""
    rng = np.random.default_rng(0)
    return {
        place: (with_ids_of_its_own(part, rng), (part / 9).astype(np.float32))
        for place, part in sample.cut(truth, side).items()
    }


def cells(side):
    """A square map of many ellipses on one background, like a picture of nuclei."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[-12:13, -12:13]
    truth = np.ones((side, side), np.int32)
    for top in range(0, side - 27, 28):
        for left in range(0, side - 27, 28):
            tall, wide = rng.uniform(4, 12, 2)
            down, right = rng.integers(0, 3, 2)
            box = truth[top + down :, left + right :][:25, :25]
            box[(y / tall) ** 2 + (x / wide) ** 2 < 1] = truth.max() + 1
    return truth


SIZES = [(100, 70), (64, 64), (10, 12), (33, 32), (20, 150), (200, 31), (128, 128)]


@pytest.mark.parametrize("shape", SIZES)
def test_tiles_of_the_truth_are_stitched_to_the_truth(shape):
    small = Image.fromarray(scenes(1, 64)[0]["ids"])
    truth = np.asarray(small.resize(shape[::-1], Image.NEAREST))
    ids, certainty = sample.stitch(tiles_of_a_truth(truth, 32), shape)
    assert same_partition(ids, truth)
    assert np.allclose(certainty, truth / 9)
    assert ids.dtype == np.int32
    assert certainty.dtype == np.float32


@pytest.mark.parametrize("side", [32, 40, 48, 64, 300])
def test_many_cells_on_one_background_are_stitched_to_the_truth(side):
    truth = cells(260)
    ids, _ = sample.stitch(tiles_of_a_truth(truth, side), truth.shape)
    assert same_partition(ids, truth)


def slow_stitch(tiles, shape):
    """The ids of `stitch`, by its rules alone: each join rewrites the whole map."""
    whole = np.full(shape, -1)
    used = 0  # the newest id; none is ever used twice
    backgrounds = set()
    for (top, left), (ids, _) in tiles.items():
        before = whole[top : top + ids.shape[0], left : left + ids.shape[1]]
        ids = ids[: before.shape[0], : before.shape[1]]
        seen = before >= 0
        pairs = []  # (IoU, segment, earlier segment), the best first
        for i in np.unique(ids[ids > 0]):
            for k in np.unique(before[before > 0]):
                both = (ids == i) & (before == k)
                either = ((ids == i) & seen) | (before == k)
                pairs.append((-both.sum() / either.sum(), i, k))
        name_of = {}
        for iou, i, k in sorted(pairs):
            if -iou > 0.3 and i not in name_of and k not in name_of.values():
                name_of[i] = k
        named = np.zeros(before.shape, int)
        for i in np.unique(ids[ids > 0]):
            if i not in name_of:
                used += 1
                name_of[i] = used
            named[ids == i] = name_of[i]
        if named.any():
            largest = np.bincount(named[named > 0]).argmax()
            for k in backgrounds:
                covered = named[before == k] == largest
                if k != largest and 2 * covered.sum() > covered.size:
                    old, new = sorted([k, largest])
                    whole[whole == new] = old
                    named[named == new] = old
                    largest = old
            backgrounds = backgrounds | {largest}
        rows = seen[:, -1].sum() // 2
        columns = seen[-1].sum() // 2
        before[rows:, columns:] = named[rows:, columns:]
    return whole


def random_tiles(rng):
    """Tiles that agree only in part and hold void, and the shape of their picture."""
    shape = tuple(rng.integers(5, 40, 2).tolist())
    side = int(rng.integers(4, 16))
    count = int(rng.integers(2, 6))  # ids, among them void
    grain = int(rng.integers(1, 5))
    blocks = rng.integers(0, count, shape).repeat(grain, 0).repeat(grain, 1)
    tiles = {}
    for place, part in sample.cut(blocks[: shape[0], : shape[1]], side).items():
        wrong = rng.random(part.shape) < rng.choice([0, 0.1, 0.4])
        part = np.where(wrong, rng.integers(0, count, part.shape), part)
        tiles[place] = with_ids_of_its_own(part, rng), part / 9
    return tiles, shape


def test_random_tiles_are_stitched_as_by_a_slow_reference():
    rng = np.random.default_rng(0)
    for _ in range(100):
        tiles, shape = random_tiles(rng)
        ids, _ = sample.stitch(tiles, shape)
        assert same_partition(ids, slow_stitch(tiles, shape))


def test_pieces_of_a_background_are_one_but_a_void_tile_takes_none():
    sure = np.ones((8, 8))
    ids = np.ones((8, 8), np.int32)
    ids[2:5, 2:5] = 2
    tiles = {(0, 0): (ids, sure), (0, 6): (0 * ids, sure), (6, 0): (ids, sure)}
    found, certainty = sample.stitch(tiles, (14, 14))
    assert found[0, 0] == found[13, 0] > 0
    assert not found[:6, 8:].any()
    assert len({found[0, 0], found[3, 3], found[9, 3]}) == 3
    assert not found[8:, 8:].any() and not certainty[8:, 8:].any()  # where no tile is


def test_a_background_that_was_in_two_pieces_becomes_one_everywhere():
    """A tile below shows that what two tiles above had as two segments is one."""
    sure = np.ones((4, 8))
    wall = row("11155222")  # two backgrounds, and a wall between them
    parted = wall.repeat(4, 0)
    below = parted.copy()
    below[parted == 2] = 1
    tiles = {
        (0, 0): (parted[:, :4], sure[:, :4]),
        (0, 4): (parted[:, 4:], sure[:, 4:]),
        (2, 0): (below, sure),
    }
    found, _ = sample.stitch(tiles, (6, 8))
    assert len({found[0, 0], found[0, 7], found[5, 0], found[5, 7]}) == 1
    assert found[0, 3] != found[0, 0]


def test_a_background_that_is_told_is_one_in_all_tiles():
    """Two halves of a picture that no tile sees together, and an object that would be
    the largest segment of its tile."""
    sure = np.ones((4, 4))
    wall = row("11555511").repeat(4, 0)
    object_above = np.where(row("1111").repeat(4, 0) * [[0], [1], [1], [1]], 7, 1)
    tiles = {
        (0, 0): (wall[:, :4], sure),
        (0, 4): (wall[:, 4:], sure),
        (4, 0): (object_above, sure),
    }
    found, _ = sample.stitch(tiles, (8, 8), background=1)
    assert (found[:4, [0, 1, 6, 7]] == 1).all() and (found[4, :4] == 1).all()
    assert len({found[0, 2], found[0, 5], found[5, 0]} - {0, 1}) == 3
    found, _ = sample.stitch(tiles, (8, 8))
    assert found[0, 0] != found[0, 7]  # nothing tells that they are one


def test_a_single_tile_is_returned_as_it_is():
    ids = row("90550").repeat(5, 0)
    certainty = np.full((5, 5), 0.5, np.float32)
    found, sure = sample.stitch({(0, 0): (ids, certainty)}, (3, 4))
    assert np.array_equal(found, ids[:3, :4])
    assert np.array_equal(sure, certainty[:3, :4])


def elements(value):
    """How many elements an array or a number has."""
    return value.size if isinstance(value, np.ndarray) else 1


class Touched(np.ndarray):
    """An array that counts the elements which NumPy reads or writes in it."""

    count = 0

    def __array_ufunc__(self, ufunc, method, *inputs, out=(), **kwargs):
        Touched.count += max(map(elements, inputs))
        if out:
            kwargs["out"] = tuple(np.asarray(array) for array in out)
        return getattr(ufunc, method)(*map(np.asarray, inputs), **kwargs)

    def __array_function__(self, function, types, args, kwargs):
        Touched.count += max(map(elements, args))
        return super().__array_function__(function, types, args, kwargs)

    def __getitem__(self, key):
        part = super().__getitem__(key)
        Touched.count += elements(part)
        return part

    def __setitem__(self, key, value):
        Touched.count += elements(value)
        super().__setitem__(key, value)


def work_per_pixel(side):
    """How often `stitch` touches a pixel of its map, and Python lines per tile."""
    truth = cells(side)
    tiles = tiles_of_a_truth(truth, 48)
    full = np.full
    lines = 0

    def count_lines(frame, event, argument):
        nonlocal lines
        lines += event == "line"
        return count_lines

    counted = lambda *args, **kwargs: full(*args, **kwargs).view(Touched)
    Touched.count = 0
    with mock.patch.object(np, "full", counted):
        sys.settrace(count_lines)
        try:
            sample.stitch(tiles, truth.shape)
        finally:
            sys.settrace(None)
    return Touched.count / truth.size, lines / len(tiles)


def test_the_work_of_joining_grows_as_the_pixels_do():
    """A form that looks at the whole map, or all earlier tiles, per tile fails."""
    touched, lines = work_per_pixel(132)
    assert 1 < touched < 20  # by this the count is seen to work
    touched_4, lines_4 = work_per_pixel(516)  # 16 times as many tiles
    assert touched_4 < 1.5 * touched
    assert lines_4 < 1.5 * lines


def test_pictures_are_sampled_in_batches_of_tiles_and_joined_one_by_one():
    truths = [cells(60), cells(100), cells(30)]
    pictures = [
        {"image": np.dstack([truth] * 3).astype(np.uint8), "image_id": n}
        for n, truth in enumerate(truths)
    ]
    model = Namespace(settings={"crop": 40, "postprocess": "paper"})
    batches = []
    rng = np.random.default_rng(0)

    def draw(drawing_model, tiles):
        """What a perfect model would find: here, ids are colours."""
        assert drawing_model is model
        batches.append(len(tiles))
        maps = [tile["image"][..., 0].astype(np.int32) for tile in tiles]
        return [(with_ids_of_its_own(ids, rng), ids / 9) for ids in maps]

    found = sample.sample_in_tiles(model, pictures, draw, batch_size=7)
    assert not batches
    assert same_partition(next(found)[0], truths[0])
    assert batches == [7]  # the four tiles of the first picture, and three of the next
    for truth, (ids, certainty) in zip(truths[1:], found, strict=True):
        assert same_partition(ids, truth)
        assert np.allclose(certainty, truth / 9)
    assert batches == [7, 7]  # 4, 9 and 1 tiles

    model.settings["crop"] = 0  # the model was trained on whole pictures
    for truth, (ids, _) in zip(
        truths, sample.sample_in_tiles(model, pictures, draw, 2)
    ):
        assert same_partition(ids, truth)


def test_each_picture_of_instances_is_cut_into_tiles_of_its_own_side():
    """The first look is in tiles of the crop's side; a perfect model finds the rest."""
    large = np.ones((100, 100), np.int32)
    large[10:50, 10:50] = 2
    large[55:95, 50:90] = 3
    small = np.ones((100, 100), np.int32)
    small[10:24, 20:34] = 5
    empty = np.ones((100, 100), np.int32)
    wide = np.ones((100, 100), np.int32)
    wide[10:90, 10:90] = 4  # its tile is larger than the picture
    truths = [large, small, empty, wide]
    pictures = [
        {"image": np.dstack([truth] * 3).astype(np.uint8), "image_id": n}
        for n, truth in enumerate(truths)
    ]
    model = Namespace(settings={"crop": 50, "postprocess": "instances"})
    sides = []

    def draw(drawing_model, tiles):
        sides.extend((tile["picture"], len(tile["image"])) for tile in tiles)
        maps = [tile["image"][..., 0].astype(np.int32) for tile in tiles]
        return [(ids, np.ones(ids.shape)) for ids in maps]

    found = list(sample.sample_in_tiles(model, pictures, draw, batch_size=5))
    for truth, (ids, _) in zip(truths, found, strict=True):
        assert same_partition(ids, truth)
        assert (ids[truth == 1] == 1).all()
    first, then = sides[: 4 * 9], sides[4 * 9 :]
    assert set(first) == {(0, 50), (1, 50), (2, 50), (3, 50)}
    assert set(then) == {(0, 80), (1, 28), (2, 50), (3, 160)}
    assert then.count((3, 160)) == 1


# ------------------------------------------------------------------------- pictures
# How colours look with each kind of colour blindness, as a matrix on linear RGB
# (Machado et al. 2009, severity 1).
VISION = {
    "normal": np.eye(3),
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
}
RGB_TO_XYZ = [
    [0.4124564, 0.3575761, 0.1804375],
    [0.2126729, 0.7151522, 0.0721750],
    [0.0193339, 0.1191920, 0.9503041],
]
D65 = [0.95047, 1.0, 1.08883]


def cielab(colors, vision):
    """sRGB colours (P x 3, 0..255) in CIELAB (P x 3), as somebody sees them."""
    share = np.array(colors) / 255
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    seen = (linear @ np.transpose(vision)).clip(0, 1)
    xyz = seen @ np.transpose(RGB_TO_XYZ) / D65
    f = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    x, y, z = f.T
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=1)


@pytest.mark.parametrize("kind", VISION)
def test_palette_is_told_apart(kind):
    """Of the first 15 colours, void and the background, each pair is 20 apart."""
    colors = [*data.PALETTE[1:16], data.VOID, data.BACKGROUND]
    lab = cielab(colors, VISION[kind])
    distances = np.linalg.norm(lab[:, None] - lab, axis=-1)
    assert distances[np.triu_indices(17, k=1)].min() >= 20
    assert data.PALETTE.shape == (256, 3) and data.PALETTE.dtype == np.uint8
    assert len(np.unique(data.PALETTE, axis=0)) == 256


def test_colorize_and_overlay():
    """Void is dark, the background grey, ids beyond 255 have a colour too."""
    ids = np.array([[0, 1, 7], [255, 256, 9_000_000]])
    drawn = data.colorize(ids, background=7)
    assert drawn.dtype == np.uint8 and drawn.shape == (2, 3, 3)
    assert drawn[0].tolist() == [
        list(data.VOID),
        data.PALETTE[1].tolist(),
        list(data.BACKGROUND),
    ]
    assert drawn[1, 1].tolist() == data.PALETTE[1].tolist()
    # ids as a batch holds them
    assert (data.colorize(ids[0].astype(np.uint8), background=7) == drawn[0]).all()

    ids = np.repeat([0, 7, 3], 4)[None].repeat(8, axis=0)  # three bars
    for brightness in (0, 100, 255):
        image = np.full((8, 12, 3), brightness, np.uint8)
        mixed = data.overlay(image, ids, background=7)
        assert mixed[4, 2].max() < mixed[4, 6].min()  # void is darker
        assert np.ptp(mixed[4, 6]) == 0  # grey
        assert (mixed == 255).all(-1).any(0).tolist() == [
            c in (4, 8) for c in range(12)
        ]


def test_colors_like():
    """Segments take the ids of the true ones that they match, one to one."""
    truth = np.kron([[1, 2, 3], [1, 2, 300], [0, 5, 5]], np.ones((8, 8), int))
    swap = np.random.default_rng(0).permutation(127) + 1
    pred = np.where(truth > 0, swap[truth % 127], 0)
    assert (data.colors_like(pred, truth) == truth).all()

    split = pred.copy()
    split[:6, :8] = 99  # 6 of 16 rows of segment 1: its larger part keeps the colour
    split[16:, :8] = 98  # a segment where nothing is true
    like = data.colors_like(split, truth)
    assert (like[6:16, :8] == 1).all() and (like[:, 8:] == truth[:, 8:]).all()
    new = {like[0, 0], like[20, 0]}
    used = data.palette_index(truth)
    assert (
        len(new) == 2 and not np.isin(data.palette_index(np.array([*new])), used).any()
    )
    assert like.dtype == np.int32
    # 99 matches segment 1, but not while 1 is a given id; then it gets a new colour
    swapped = np.select([truth == 1, truth == 2], [99, 98], truth)
    like = data.colors_like(swapped, truth, fixed=[1, 3])
    assert like[0, 0] not in used and (like[:16, 8:] == truth[:16, 8:]).all()
    nothing = np.zeros_like(truth)
    assert (data.colors_like(nothing, truth) == 0).all()
    assert len(np.unique(data.colors_like(truth, nothing))) == 6


def test_renumber():
    """The largest segments come first; several maps are renamed alike."""
    truth = np.array([[70000, 70000, 70000, 9], [4, 4, 0, 9], [2, 2, 2, 2]])
    given = np.where(truth == 9, 9, 0)
    other = np.where(truth == 9, 55, truth)
    maps = data.renumber(truth, given, other, background=2)
    assert maps[0].tolist() == [[1, 1, 1, 4], [3, 3, 0, 4], [2, 2, 2, 2]]
    assert (maps[1] == np.where(truth == 9, 4, 0)).all()
    assert (maps[2] == np.where(truth == 9, 5, maps[0])).all()


def test_overlay_completion():
    """Given ids look alike in both pictures; only added ones are hatched."""
    completed = np.array([1, 2, 0, 3]).repeat(16)[None].repeat(64, axis=0)
    given = np.where(np.arange(64)[:, None] < 32, completed, 0)
    given[completed == 3] = 0
    image = np.full((64, 64, 3), 90, np.uint8)
    before, after = data.overlay_completion(image, given, completed, background=1)
    assert (before[:32, :48] == after[:32, :48]).all()
    assert (after == data.overlay(image, completed, background=1))[:, :48].all()
    added = after[:, 49:]
    for shade in (0, 255):
        marked = (added == shade).all(-1)
        assert 0.1 < marked.mean() < 0.25 and marked.any(1).all()


def test_the_background_is_grey_on_a_sheet_and_segments_have_the_true_colours():
    """Predicted segments, in any ids, are drawn as the true ones that they match."""
    [scene] = scenes(1)
    ids = scene["ids"]
    shuffled = (ids * 5) % 7
    _, [image, pixels, sure, truth] = data.comparison(scene, shuffled, shuffled)
    assert np.array_equal(image, scene["image"])
    assert np.array_equal(pixels, truth)
    assert np.array_equal(sure, truth)
    grey = np.ptp(truth, axis=-1) == 0
    outlines = (truth == 255).all(-1)
    assert np.array_equal(grey & ~outlines, (ids == 1) & ~outlines)


def page_of(*sizes, rows=1):
    """A sheet of rows of random pictures of these sizes, and the pictures."""
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 256, (*size, 3), np.uint8) for size in sizes]
    captions = [f"picture {k}" for k in range(len(arrays))]
    data.sheet("page.png", [("a.jpg", arrays)] * rows, captions)
    return np.asarray(Image.open("page.png")), arrays


def bottom_left(page, height, width):
    """The picture of the last row and first column."""
    gap = data.GAP
    return page[-gap - height : -gap, gap : gap + width]


def test_a_sheet_enlarges_small_pictures_and_keeps_photographs():
    """By whole factors, so that each pixel stays a sharp square; sizes may mix."""
    page, [scene] = page_of((64, 64))
    assert (bottom_left(page, 192, 192) == scene.repeat(3, 0).repeat(3, 1)).all()
    page, [photograph, _] = page_of((480, 640), (64, 64))
    assert (bottom_left(page, 480, 640) == photograph).all()
    page, _ = page_of((900, 1200), (1200, 900), (30, 200))
    assert page.shape[1] == 640 + 480 + 200 + 4 * data.GAP
    page, _ = page_of(*[(480, 640)] * 10)
    assert 2300 < page.shape[1] <= data.MAX_PAGE


def test_a_sheet_has_a_line_of_text_above_each_row():
    one, _ = page_of((64, 64), (50, 20))
    three, _ = page_of((64, 64), (50, 20), rows=3)
    a_row = (len(three) - len(one)) / 2
    assert a_row >= 192 + data.GAP + 14
    data.sheet("empty.png", [], ["image", "truth"])
    assert Image.open("empty.png").width > 0


def test_the_picture_of_the_method_can_be_drawn():
    draw_pipeline("pipeline.png")
    page = Image.open("pipeline.png")
    assert page.width == 1600
    assert page.getpixel((0, 0)) == (255, 255, 255)


# ---------------------------------------------------------------- completion (3.3)
def test_algorithm_3_holds_the_given_cells(tiny):
    known, first_noise, eps0 = torch.randn(3, 1, 4, 8, 8)
    M = (torch.rand(1, 1, 8, 8) > 0.5).float()
    condition = torch.zeros(1, 48, 8, 8)
    seen = spy(tiny)
    z0 = inpaint.inpaint(tiny, condition, known, M, (first_noise, eps0), 3)
    assert len(seen) == 3
    for zj, _, self_cond, j in seen:
        close(M * zj, M * tiny.ddim.add_noise(known, eps0, j))
    close(M * z0, M * known)
    close(M * self_cond, M * known)
    assert not torch.allclose(z0, known)


def test_a_cell_counts_as_given_if_half_of_its_pixels_are(tiny):
    given = torch.zeros(1, 32, 32)
    given[0, :2, :4] = 3  # half of the cell (0, 0)
    given[0, 4:6, 4:7] = 3  # less of the cell (1, 1)
    M = inpaint.given_cells(tiny, given)
    assert M.shape == (1, 1, 8, 8)
    assert M.nonzero().tolist() == [[0, 0, 0, 0]]


def test_algorithm_3_gives_ids_back_by_content(tiny):
    """A given id returns only where the network's output has its random name."""
    given = np.zeros((32, 32), np.int32)
    given[:2, :8] = 900
    given[:2, 8:16] = 70_000
    picture = {**scenes(1)[0], "given": given}
    num_ids = tiny.autoencoder.num_ids
    y, name_of = inpaint.random_names(tiny, picture, seed=0)
    assert name_of.keys() == {900, 70_000}
    assert np.array_equal(y, np.vectorize({0: 0, **name_of}.get)(given))
    free = next(n for n in range(1, num_ids) if n not in name_of.values())
    # The output has one given name on the left, the other nowhere, and a new segment on
    # the right; it may well say otherwise where something is given.
    output = np.full((32, 32), free)
    output[:, :16] = name_of[900]
    shown = (output, np.ones(output.shape, np.float32))
    with mock.patch.object(diffusion, "to_ids", lambda *_: shown):
        [(ids, _)] = inpaint.complete_maps(tiny, [picture], steps=1, seed=0)
    assert np.array_equal(ids[given > 0], given[given > 0])
    unknown = given == 0
    assert (ids[:, :16][unknown[:, :16]] == 900).all()
    added = np.unique(ids[:, 16:])
    assert len(added) == 1
    assert added[0] not in (0, 900, 70_000)


def test_a_model_that_was_not_told_completes_by_algorithm_3(tiny, shipped):
    args = Namespace(steps=1, seed=0)
    names = list(inpaint.methods_of(tiny, args))
    assert names == ["Algorithm 3", "sampled and renamed", "input as it is"]
    names = list(inpaint.methods_of(shipped, args))
    assert names[:2] == ["Algorithm 3", "given part told"]


METHODS = [inpaint.complete_maps, inpaint.told_maps, inpaint.renamed_maps]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("crop", [0, 24])
def test_completion_keeps_given_ids_and_pixels(shipped, method, crop):
    """Also in tiles, and where more ids are given than the model has."""
    given = np.zeros((50, 60), np.int32)
    given[:9, :20] = 3
    given[30:, 40:] = data.MAX_ID
    given[::5, ::7] = 1000 + np.arange(90).reshape(10, 9)
    shipped.settings["crop"] = crop
    picture = {"image": scenes(1, 60)[0]["image"][:50], "image_id": 0, "given": given}
    [done] = inpaint.complete(shipped, [picture], method=method, steps=2, seed=0)
    assert np.array_equal(done[given > 0], given[given > 0])
    assert done.min() >= 0
    assert done.max() == data.MAX_ID
    assert done.dtype == np.int32


def test_segments_get_the_given_id_that_they_cover_most_or_an_unused_one():
    found = row("1111222333305")
    given = row("0055050880500")
    done = inpaint.name_by_cover(found, given)
    assert np.array_equal(done[:, :12], row("555555588880"))
    assert done[0, 12] not in (0, 5, 8)
    assert done.dtype == np.int32


def test_the_background_of_instances_keeps_its_id_in_completion(tiny):
    """Whatever is clicked on in it, and also where no part of it is given."""
    tiny.settings["postprocess"] = "instances"
    given = row("1170033000").repeat(4, 0)
    given[given == 7] = 70_000
    picture = {"given": given, "image_id": 0}
    for seed in range(9):
        y, name_of = inpaint.random_names(tiny, picture, seed)
        assert y.dtype == np.uint8
        assert same_partition(y, given)
        assert all((y[given == i] == name_of[i]).all() for i in (1, 3, 70_000))
        assert name_of[1] == 1

    found = row("1111144555").repeat(4, 0)
    done = inpaint.name_by_cover(found, given, background=1)
    assert np.array_equal(done, row("1111133222").repeat(4, 0))
    done = inpaint.name_by_cover(found, np.where(given == 1, 0, given), background=1)
    assert np.array_equal(done, row("1111133222").repeat(4, 0))


def test_instances_are_completed_in_tiles_of_their_own_side():
    truth = np.ones((60, 60), np.int32)
    truth[4:18, 4:18] = 30  # tiles of 28 px
    truth[30:44, 18:32] = 40
    given = np.where(np.arange(60) % 20 < 8, truth, 0)
    image = np.dstack([truth] * 3).astype(np.uint8)
    model = Namespace(settings={"crop": 48, "postprocess": "instances"})
    seen = set()

    def draw(drawing_model, tiles):
        """What a perfect model would find: here, ids are colours."""
        seen.update(tile["given"].shape for tile in tiles)
        maps = [tile["image"][..., 0] // 10 + 1 for tile in tiles]
        return [(ids.astype(np.int32), np.ones(ids.shape)) for ids in maps]

    samples = [{"image": image, "given": given, "image_id": 0}]
    [(ids, _)] = inpaint.complete_in_tiles(model, samples, draw)
    assert np.array_equal(ids, truth)
    assert seen == {(48, 48), (28, 28)}


def test_a_given_pixel_that_strays_into_a_neighbour_does_not_name_it():
    found = row("1" * 30 + "2" * 30)
    given = row("0" * 29 + "7" * 29 + "00")
    done = inpaint.name_by_cover(found, given)
    assert np.array_equal(done, row("1" * 30 + "7" * 30))


def test_a_stroke_gives_an_object_its_id(shipped):
    """Three pixels wide, across each object: most objects get their ids back."""
    rows = np.arange(64)[:, None]
    right = []
    for scene in scenes(16, 64):
        ids = scene["ids"]
        given = np.zeros_like(ids)
        objects = range(2, ids.max() + 1)
        for i in objects:
            middle = np.median(np.nonzero(ids == i)[0])
            given[(ids == i) & (abs(rows - middle) < 2)] = 1000 * i
        picture = {**scene, "given": given}
        method = inpaint.told_maps
        [done] = inpaint.complete(shipped, [picture], method=method, steps=6, seed=0)
        assert np.array_equal(done[given > 0], given[given > 0])
        right += [(done[ids == i] == 1000 * i).mean() > 0.5 for i in objects]
    assert np.mean(right) > 0.8


def test_dropped_blocks_are_blocks_and_their_share_is_what_was_asked_for():
    kept = data.drop_blocks(64, drop=0.3, block=8, rng=np.random.default_rng(0))
    blocks = kept.reshape(8, 8, 8, 8)
    assert (blocks == blocks[:, :1, :, :1]).all()
    total = 0
    for seed in range(50):
        kept = data.drop_blocks(60, drop=0.3, block=8, rng=np.random.default_rng(seed))
        assert kept.shape == (60, 60)
        total += kept.mean() / 50
    assert total == pytest.approx(0.7, abs=0.02)


def test_a_dropped_part_is_known_elsewhere_and_crowds_are_unknown():
    [scene] = scenes(1)
    scene["segments_info"][0]["iscrowd"] = 1
    settings = {"size": 32, "crop": 0}
    given = inpaint.drop_part(scene, settings, drop=0.5, block=4, seed=0)
    assert set(np.unique(given)) == {0, *np.unique(scene["ids"])} - {1}
    assert (given[given > 0] == scene["ids"][given > 0]).all()
    nothing_dropped = inpaint.drop_part(scene, settings, drop=0, block=4, seed=0)
    crowd = scene["ids"] == 1
    assert np.array_equal(nothing_dropped, np.where(crowd, 0, scene["ids"]))


def test_a_click_is_a_disc_in_the_middle_of_each_thing():
    ids = np.ones((20, 30), np.int32)
    ids[5:14, 5:14] = 2
    segments = data.describe(ids)
    segments[0]["category_id"] = 7
    scene = {"ids": ids, "segments_info": segments}
    given = inpaint.click_part(scene, radius=2, stuff=[7])
    y, x = np.mgrid[:20, :30]
    disc = np.hypot(y - 9, x - 9) <= 2
    assert np.array_equal(given, np.where(disc, 2, 0))


def test_id_accuracy_by_hand():
    """Of pixels that were not given, of segments that were: the share that is right."""
    accuracy = inpaint.IdAccuracy()
    assert accuracy.result() is None
    truth = row("11122333")
    given = row("10002000")
    accuracy.update(row("11922222"), given, truth)
    assert accuracy.result() == pytest.approx(100 * 2 / 3)


# -------------------------------------------------------------------- the trainings
# Processes of the tests begin as copies of one that has imported everything.
multiprocessing.get_context("forkserver").set_forkserver_preload(["test_all"])


def child(rank, prepare, command, more, world, port):
    """A script's main as one of the processes of torchrun. prepare: run before it."""
    os.environ["RANK"] = str(rank)
    os.environ["WORLD_SIZE"] = str(world)
    os.environ["MASTER_ADDR"] = "localhost"
    os.environ["MASTER_PORT"] = str(port)
    data.RANK = rank  # these are read on import
    data.WORLD = world
    prepare()
    run(command, *more)


def launch(prepare, command, *more, world=1):
    """A script's main in processes of their own."""
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    arguments = (prepare, command, [str(m) for m in more], world, port)
    with mock.patch.dict(os.environ, PYTHONPATH=str(HERE)):  # where test_all lies
        torch.multiprocessing.start_processes(
            child, arguments, world, start_method="forkserver"
        )


def killed_while_it_saves():
    """SIGKILL when the fifth file is about to take its place: the second state.

    Before it come the empty log, weights and state, and the second weights.
    """
    replace = os.replace
    calls = []

    def count(*paths):
        """os.replace, four times."""
        calls.append(paths)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*paths)

    os.replace = count


@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_run_resumes_to_the_same_bits(tmp_path, trained, stage):
    shutil.copy(trained / "ae.pt", tmp_path)
    name = f"{stage}_state.pt"
    with pytest.raises(Exception, match="SIGKILL"):
        launch(killed_while_it_saves, STAGES[stage], "--out", tmp_path)
    assert torch.load(tmp_path / name)["iteration"] == 2
    script = STAGES[stage].split()[0]
    run(f"{script} --resume --out", tmp_path)
    whole = torch.load(trained / name)
    resumed = torch.load(tmp_path / name)
    exact(resumed["model"], whole["model"])
    exact(resumed["average"], whole["average"])
    exact(resumed["optimizer"]["state"], whole["optimizer"]["state"])
    assert read(f"{stage}_log.jsonl") == read(trained / f"{stage}_log.jsonl")


def same_draws_and_gradients_are_kept():
    """What is drawn for one sample is drawn for all, so that two processes draw like
    one, and each step's gradients are kept in gradients-ITERATION.pt, before clipping.
    """
    normal = torch.randn

    def first(*size, generator=None, device=None):
        """One draw for all samples, but for those that belong to a picture."""
        if generator is not None:
            return normal(*size, generator=generator)
        one = normal(size[1:], generator=torch.Generator().manual_seed(5))
        return one.expand(size).clone()

    torch.randn = first
    torch.randn_like = lambda x: first(*x.shape)
    torch.rand = lambda *size, device=None: first(*size).sigmoid()
    torch.randint = lambda low, high, size, device=None: torch.full(size, 400)
    diffusion.SMALL["self_cond_share"] = (
        1.0  # all samples: half of each piece is not half
    )

    clip = torch.nn.utils.clip_grad_norm_
    steps = []

    def keeping(weights, largest):
        """clip_grad_norm_, and the gradients before it."""
        steps.append([w.grad.clone() for w in weights if w.grad is not None])
        data.write(f"gradients-{len(steps)}.pt", steps[-1])
        return clip(weights, largest)

    torch.nn.utils.clip_grad_norm_ = keeping


@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_train_and_evaluate_like_one(tmp_path, monkeypatch, stage):
    """The gradients themselves are equal, with two micro-batches in each process (stage
    2), and so are the loss that is logged and what an evaluation gives.
    """
    script = STAGES[stage].split()[0]
    command = f"{script} {TINY} --lr 1e-4 --ckpt {SHAPES} --out ."
    logs = []
    gradients = []
    for world in (1, 2):
        folder = tmp_path / str(world)
        folder.mkdir()
        monkeypatch.chdir(folder)
        more = []
        if stage == "ldm" and world == 2:
            more = ["--micro_batch", 1]  # two in each process
        launch(same_draws_and_gradients_are_kept, command, *more, world=world)
        gradients.append([torch.load(f"gradients-{n}.pt") for n in (1, 2, 3)])
        logs.append(read(f"{stage}_log.jsonl"))
    for one, two in zip(*gradients, strict=True):
        largest = max(float(g.abs().max()) for g in one)
        for a, b in zip(one, two, strict=True):
            assert (a - b).abs().max() < 1e-4 * largest
    (_, trained_1, evaluated_1), (_, trained_2, evaluated_2) = logs
    assert trained_1["loss"] == pytest.approx(trained_2["loss"], rel=1e-4)
    assert trained_1["grad_norm"] == pytest.approx(trained_2["grad_norm"], rel=1e-3)
    assert 30 < evaluated_1["val_pq"] == pytest.approx(evaluated_2["val_pq"], abs=1)


def test_a_training_writes_what_comes_of_it(trained):
    for stage in STAGES:
        log = read(trained / f"{stage}_log.jsonl")
        keys = [list(entry) for entry in log]
        figures = ["iteration", "loss", "grad_norm", "lr"]
        evaluated = ["iteration", "val_pq"]
        assert keys == [evaluated, figures, evaluated]
        assert [entry["iteration"] for entry in log] == [2, 3, 3]
        found = read(trained / f"{stage}.json")
        assert found.keys() == {"images", "pq", "sq", "rq"}
        assert found["images"] == 3
        assert Image.open(trained / f"{stage}.png").width > 300


def test_the_weights_that_are_kept_are_the_average(trained):
    model = sample.load(trained / "ldm.pt")
    state = torch.load(trained / "ldm_state.pt")
    saved = []
    for group in diffusion.decay_groups(model):
        saved += [p.detach() for p in group["params"]]
    exact(saved, state["average"])
    last = state["model"]["unet.conv_in.weight"]
    assert not torch.equal(model.unet.conv_in.weight, last)


@pytest.mark.parametrize("stage", STAGES)
def test_both_stages_learn_in_bf16(tmp_path, trained, stage):
    command = f"{STAGES[stage]} --lr 0.01 --precision bf16 --iters"
    if stage == "ae":
        command += " 160"
    else:
        shutil.copy(trained / "ae.pt", tmp_path)
        command += " 60 --given 0.5 --augment 0.1"
    with mock.patch.dict(SCRIPTS[command.split()[0]].SMALL, save_every=1000):
        run(command, "--out", tmp_path)
    [before] = [e["loss"] for e in read(trained / f"{stage}_log.jsonl") if "loss" in e]
    log = read(tmp_path / f"{stage}_log.jsonl")
    after = [entry["loss"] for entry in log if "loss" in entry]
    assert np.mean(after[-3:]) < 0.9 * before


def test_gradients_that_are_not_finite_are_skipped_and_end_the_run(capsys, monkeypatch):
    """Twenty in a row. What was saved is that of the last good iteration."""
    kl_loss = ae.kl_loss
    calls = []

    def broken(mean, logvar):
        """KL of the first four iterations, then nothing finite."""
        calls.append(mean)
        loss = kl_loss(mean, logvar)
        return loss if len(calls) <= 4 else loss * torch.nan

    monkeypatch.setattr(ae, "kl_loss", broken)
    save = data.Run.save
    saved = {}

    def keeping(self, done, settings):
        """Run.save, and a copy of the weights."""
        saved[done] = [w.detach().clone() for w in self.model.parameters()]
        save(self, done, settings)

    monkeypatch.setattr(data.Run, "save", keeping)
    line = refused(capsys, f"{TINY_AE} --iters 40 --out out")
    assert "has not been finite for 20 iterations" in line
    assert len(calls) == 24
    assert not any(torch.equal(a, b) for a, b in zip(saved[2], saved[4]))
    exact(saved[22], saved[4])
    model = ae.load_autoencoder("out/ae.pt")
    exact(list(model.parameters()), saved[4])
    monkeypatch.setattr(ae, "kl_loss", kl_loss)
    run("ae --resume --iters 24 --out out")
    assert torch.load("out/ae_state.pt")["iteration"] == 24


def test_an_evaluation_that_fails_loses_nothing(capsys, monkeypatch, trained):
    shutil.copy(trained / "ae.pt", ".")
    for stage, command in STAGES.items():
        module = SCRIPTS[command.split()[0]]
        failing = mock.Mock(side_effect=BadInput("failed"))
        monkeypatch.setattr(module, "evaluate", failing)
        assert "failed" in refused(capsys, f"{command} --out .")
        assert torch.load(f"{stage}_state.pt")["iteration"] == 2
        assert data.load(f"{stage}.pt")["kind"] == stage


@pytest.mark.parametrize("stage", STAGES)
def test_a_held_out_picture_is_tried_before_the_first_iteration(
    tmp_path, trained, capsys, stage
):
    """Else a broken split would only be noticed when the first iterations are done."""
    shutil.copy(trained / "ae.pt", tmp_path)
    path = write_coco(tmp_path, count=2)
    path.with_name("panoptic_broken.json").write_text(path.read_text())
    command = f"{STAGES[stage]} --data . --train_split val --val_split broken --out ."
    line = refused(capsys, command)
    assert "none of the 2 pictures can be used" in line
    assert not Path(f"{stage}_log.jsonl").exists()


def test_stable_diffusions_vae_serves_as_stage_1(tmp_path):
    """A narrow one, from a folder; its checkpoint is read back."""
    config = {**NARROW_VAE, "block_out_channels": [8, 16, 32]}
    config["down_block_types"] = ["DownEncoderBlock2D"] * 3
    config["up_block_types"] = ["UpDecoderBlock2D"] * 3
    AutoencoderKL(**config).save_pretrained(tmp_path / "vae")
    command = f"{TINY_AE} --iters 1 --encoding rgb --kl 0.1 --precision fp16 --vae ."
    run(command, "--out", "out")
    model = ae.load_autoencoder("out/ae.pt")
    assert isinstance(model, ae.SDAutoencoder)
    assert (model.encoding, model.num_ids, model.factor) == ("rgb", 8, 4)
    run(f"ae {TINY} --iters 0 --out again --ckpt out/ae.pt")
    assert read("again/ae.json").keys() == {"images", "pq", "sq", "rq"}


def test_the_paper_model_is_built_from_untrained_twins():
    """--model none has Stable Diffusion's classes and sizes; here they are narrow."""
    narrow_unet = diffusion.small_unet_config(4, 8, channels=16)
    unet = UNet2DConditionModel(**narrow_unet)
    vae = AutoencoderKL(**NARROW_VAE)
    autoencoder = ae.Autoencoder(8, factor=2, width=32)
    args = settings_by_default(diffusion, model="none", size=32)
    networks = {UNet2DConditionModel: unet, AutoencoderKL: vae}
    with mock.patch.object(
        ae, "load_sd", lambda name, network, part: networks[network]
    ):
        with mock.patch.object(ae, "load_autoencoder", lambda path: autoencoder):
            with mock.patch.object(
                diffusion, "read_checkpoint", lambda path: {"kind": "ae"}
            ):
                model = diffusion.new_model(args)
    assert model.unet.config.in_channels == 12  # z^j, image_latent, self_cond
    diffusion.prepare(model, args, data.Shapes("v"))
    assert model.self_cond_share == 1.0
    assert not any(p.requires_grad for p in model.unet.time_embedding.parameters())
    batch = {"ids": torch.ones(2, 32, 32).byte()}
    batch["image"] = torch.zeros(2, 3, 32, 32).byte()
    eps = torch.randn(2, 4, 16, 16)
    model.train()(batch, eps, torch.tensor([3, 700])).backward()
    assert model.unet.conv_in.weight.grad.any()


def settings_by_default(module, **settings):
    """A training's settings without a command line."""
    args = module.Settings(**settings)
    args.start = lambda: "ae.pt"
    return args


def test_the_classifier_trains_while_the_rest_is_frozen(tmp_path, trained):
    """Few passes afterwards keep it; and its truth is listed by id, so that with
    --classes ids must not be renamed.
    """
    base = ["--out", tmp_path, "--ckpt"]
    run(f"{TINY_LDM} --classes", *base, trained / "ldm.pt")
    before = sample.load(trained / "ldm.pt").state_dict()
    after = sample.load("ldm.pt").state_dict()
    exact({name: after[name] for name in before}, before)
    run("sample --limit 2 --steps 1", *base, "ldm.pt")
    assert {"pq_classes", "pq_things", "pq_stuff"} <= read("sample.json").keys()
    run(f"{TINY_LDM} --distill 1 --iters 1", *base, "ldm.pt")
    assert sample.load("ldm.pt").classifier is not None
    assert sample.load("ldm.pt").settings["scheduler"] == "ddim-v"
    with mock.patch.object(diffusion, "name_by_noise", None):
        run(f"{TINY_LDM} --classes --distill 1 --iters 1", *base, "ldm.pt")


def test_evaluation_sees_micro_batches(trained, monkeypatch):
    sizes = []
    sample_maps = diffusion.sample_maps

    def counting(model, samples, **more):
        """sample_maps, and how many pictures it was given."""
        sizes.append(len(samples))
        return sample_maps(model, samples, **more)

    monkeypatch.setattr(diffusion, "sample_maps", counting)
    run(f"{TINY_LDM} --iters 0 --micro_batch 2 --out . --ckpt", trained / "ldm.pt")
    assert sizes == [2, 1]


def test_instances_are_trained_to_be_in_one_piece(tmp_path, trained):
    """A training on object outlines notes it in the checkpoint, with the least area."""
    shutil.copy(trained / "ae.pt", tmp_path)
    write_coco(tmp_path, "instances", count=2)
    command = f"{TINY_LDM} --data . --train_split val --val_split val --out ."
    weights = mock.Mock(wraps=diffusion.instance_weights)
    names = mock.Mock(wraps=diffusion.names_of)
    with mock.patch.object(diffusion, "instance_weights", weights):
        with mock.patch.object(diffusion, "names_of", names):
            run(f"{command} --crop 32 --iters 1 --distill 1")
    assert weights.called
    assert {call.args[2:] for call in names.mock_calls} == {(1, 4)}  # fixed, near
    model = sample.load("ldm.pt")
    assert model.settings["postprocess"] == "instances"
    assert 1 <= model.settings["min_area"] <= 512
    assert model.settings["crop"] == 32
    assert read("ldm.json").keys() == {
        "images",
        "pq",
        "sq",
        "rq",
        "ap50",
        "merged",
        "missed",
    }
    run("sample --ckpt ldm.pt --steps 1 --limit 1 --out out")
    assert "ap50" in read("out/sample.json")
    run("sample --ckpt ldm.pt --steps 1 --images val/1.png --min_score 1 --out out")
    [found] = read("out/predictions.json")["annotations"]
    assert found["segments_info"] == []
    run("sample --ckpt ldm.pt --steps 2 --images val/1.png --trajectory --out out")
    assert Image.open("out/trajectory.png").width > 200
    run("inpaint --ckpt ldm.pt --steps 1 --limit 1 --click 4 --out out")

    content = torch.load("ldm.pt")
    content["settings"]["min_score"] = 0.9
    torch.save(content, "ldm.pt")
    run(f"{TINY_LDM} --ckpt ldm.pt --data shapes --iters 1 --out scenes")
    settings = sample.load("scenes/ldm.pt").settings
    assert settings["postprocess"] == "paper"
    assert settings["min_score"] == 0
    assert settings["min_area"] is None


# -------------------------------------------------- sample.py and inpaint.py, as used
def test_sample_segments_a_folder_and_pq_reads_it_back(tmp_path, capsys):
    """What can't be read is named at the end, when all others are written."""
    odd = os.fsdecode(b"\xff")  # a name that is not UTF-8
    folder = tmp_path / "in"
    (folder / "sub.png").mkdir(parents=True)
    for name in ("000042.png", "b.png", "b.bmp", "c.jfif", f"{odd}.png"):
        Image.fromarray(scenes(1)[0]["image"]).save(folder / name)
    for name in ("broken.jpg", "notes.txt", ".hidden.png"):
        (folder / name).write_bytes(b"nothing")
    command = f"sample --ckpt {SHAPES} --steps 2 --out out --images in"
    line = refused(capsys, command)
    assert "1 pictures left out, the first: " in line and "broken.jpg" in line
    found = read("out/predictions.json")
    ids_of = {e["file_name"]: e["image_id"] for e in found["annotations"]}
    # b.bmp comes first and gets its stem, b.png its whole name
    names = {"000042.png", "b.png", "b.png.png", "c.png", f"{odd}.png"}
    assert ids_of.keys() == names
    assert ids_of["000042.png"] == 42
    assert len(set(ids_of.values())) == 5
    assert all(type(image_id) is int for image_id in ids_of.values())
    for entry in found["annotations"]:
        ids = data.read_id_png(f"out/predictions/{entry['file_name']}")
        area = {s["id"]: s["area"] for s in entry["segments_info"]}
        assert area == data.areas(ids)
        for s in entry["segments_info"]:
            rows, columns = np.nonzero(ids == s["id"])
            size = [np.ptp(columns) + 1, np.ptp(rows) + 1]
            assert s["bbox"] == [columns.min(), rows.min(), *size]
    file = tmp_path / "out" / "predictions.json"
    _, out, _ = shell(capsys, "pq --class_agnostic --gt", file, "--pred", file)
    assert out.count("100.0") == 3


def test_comparing_seeds_names_what_is_broken(tmp_path, capsys):
    Image.fromarray(scenes(1)[0]["image"]).save("good.png")
    Path("broken.jpg").write_bytes(b"nothing")
    command = f"sample --ckpt {SHAPES} --steps 1 --seeds 0 1 --images good.png"
    run(command)
    assert 0 <= read("out/sample.json")["agreement"] <= 1
    assert "broken.jpg" in refused(capsys, f"{command} broken.jpg")


def test_instances_are_read_by_coco_and_as_data(tmp_path):
    """instances.json opens in pycocotools, and gives the same objects as data."""
    (tmp_path / "mine" / "images").mkdir(parents=True)
    pictures = scenes(3, 64)
    for n, scene in enumerate(pictures):
        Image.fromarray(scene["image"]).save(f"mine/images/{n + 7:03}.png")
    run(f"sample --ckpt {SHAPES} --steps 4 --out out --images mine/images")
    coco = COCO("out/instances.json")
    assert sorted(coco.getImgIds()) == [7, 8, 9]
    stuff = {c["id"] for c in coco.dataset["categories"] if not c["isthing"]}
    panoptic = read("out/predictions.json")["annotations"]
    shutil.copytree("out", "copy")
    data.write("mine/annotations/instances_x.json", read("out/instances.json"))
    source = data.open_data("mine", "x")
    assert len(source) == 3
    for entry, found in zip(panoptic, source, strict=True):
        ids = data.read_id_png(f"out/predictions/{entry['file_name']}")
        things = [s for s in entry["segments_info"] if s["category_id"] not in stuff]
        annotations = coco.loadAnns(coco.getAnnIds(imgIds=entry["image_id"]))
        assert [a["bbox"] for a in annotations] == [s["bbox"] for s in things]
        assert [a["area"] for a in annotations] == [s["area"] for s in things]
        assert all(0 <= a["score"] <= 1 for a in annotations)
        for s, annotation in zip(things, annotations):
            assert np.array_equal(coco.annToMask(annotation), ids == s["id"])
        objects = np.where(np.isin(ids, [s["id"] for s in things]), ids, 0)
        assert same_partition(found["ids"], objects)
    assert len({a["id"] for a in coco.dataset["annotations"]}) == len(coco.anns) > 3


def test_a_second_run_leaves_no_picture_of_the_first(tmp_path):
    for name in ("a", "b"):
        Image.fromarray(scenes(1)[0]["image"]).save(f"{name}.png")
    command = f"sample --ckpt {SHAPES} --steps 1 --out out --images"
    run(command, "a.png", "b.png")
    Path("out/predictions/own.png").touch()  # a file that is not of the first run
    run(command, "b.png")
    assert sorted(os.listdir("out/predictions")) == ["b.png", "own.png"]
    assert sorted(os.listdir("out/overlays")) == ["b.png"]


def test_pictures_are_given_one_by_one_or_by_folder(tmp_path, capsys):
    (tmp_path / "more" / "sub").mkdir(parents=True)
    for path in ("7.png", "more/7.jpg", "more/x.png", "more/sub/y.png"):
        Image.fromarray(scenes(1)[0]["image"]).save(path)
    pictures = sample.Pictures(["7.png", "more"])
    assert list(pictures.files) == ["7", "7.jpg", "x"]
    ids = [pictures[n]["image_id"] for n in range(3)]
    assert ids[0] == 7
    assert len(set(ids)) == 3
    assert "more/sub: pictures in sub-folders are not" in capsys.readouterr().err
    with bad_input("--images absent.jpg: no such file"):
        sample.Pictures(["7.png", "absent.jpg"])
    with bad_input("--images more/sub/none: no such file"):
        sample.Pictures(["more/sub/none"])
    os.mkdir("empty")
    with bad_input("--images empty: no picture there"):
        sample.Pictures(["empty"])


def test_segment_takes_a_path_an_array_or_a_picture(shipped, photo):
    picture = Image.open(photo)
    ids, segments = sample.segment(shipped, str(photo), steps=1)
    assert ids.shape == (40, 60) and ids.dtype == np.int32
    assert {s["id"]: s["area"] for s in segments} == data.areas(ids)
    assert json.loads(json.dumps(segments)) == segments
    for image in (photo, picture, np.asarray(picture), picture.convert("RGBA")):
        again, _ = sample.segment(shipped, image, steps=1)
        assert np.array_equal(again, ids)
    other, _ = sample.segment(shipped, photo, steps=1, seed=1)
    assert not np.array_equal(other, ids)


def test_segments_of_a_low_mean_probability_become_void(shipped, monkeypatch):
    ids = row("0011122255")
    probability = np.array([[9, 9, 9, 9, 9, 9, 6, 9, 8, 8]]) / 10
    found = sample.doubt(ids, probability, 0.81)
    expected = np.where(np.isin(ids, [2, 5]), 0, probability)
    assert np.array_equal(found, expected)
    assert np.array_equal(
        sample.doubt(ids, probability, 0.79)[0, 5:], probability[0, 5:]
    )

    picture = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    samples = [{"image": picture, "image_id": 0}]
    for crop in (0, 48):
        monkeypatch.setitem(shipped.settings, "crop", crop)
        monkeypatch.setitem(shipped.settings, "min_score", 0.0)
        [(ids, p)] = sample.sample_batch(shipped, samples, 1, 0, 4)
        scores = {i: p[ids == i].mean() for i in data.areas(ids)}
        least = float(np.median(list(scores.values()))) + 1e-6
        monkeypatch.setitem(shipped.settings, "min_score", least)
        [(again, p)] = sample.sample_batch(shipped, samples, 1, 0, 4)
        assert np.array_equal(again, ids)
        dropped = [i for i in scores if not p[ids == i].any()]
        assert dropped == [i for i in scores if scores[i] < least]
        assert 0 < len(dropped) <= len(scores)


def test_the_shipped_weights_are_found_from_any_folder(capsys):
    """Where no checkpoints/ldm.pt is, they are the default."""
    assert sample.load().settings["size"] == 64
    assert "using the shipped shapes.pt" in capsys.readouterr().err
    assert sample.load("assets/shapes.pt").settings["size"] == 64
    with bad_input("assets/absent.pt: no such checkpoint"):
        sample.load("assets/absent.pt")


def test_sample_compares_steps_and_seeds(trained):
    command = f"sample --ckpt {trained}/ldm.pt --limit 3 --out ."
    run(f"{command} --steps 1 2 --trajectory")
    figures = read("sample.json")
    assert figures["by_steps"].keys() == {"1", "2"}
    assert figures["images"] == 3
    assert {"pq", "sq", "rq"} <= figures.keys()
    run(f"{command} --steps 1 --seeds 0 7")
    assert 0 <= read("sample.json")["agreement"] <= 1
    for name in ("sample", "trajectory", "seeds"):
        assert Image.open(f"{name}.png").width > 300


def test_more_seeds_than_one_are_needed_to_compare(capsys):
    for seeds in ("3", "3 3"):
        assert "--seeds: give two or more" in refused(capsys, f"sample --seeds {seeds}")


def test_inpaint_drops_clicks_and_makes_a_table(trained):
    command = f"inpaint --ckpt {trained}/ldm.pt --limit 2 --steps 1 --out ."
    run(f"{command} --drop 0 0.5 --block 8 16")
    table = read("inpaint.json")
    assert len(table) == 4
    for title, figures in table.items():
        assert set(figures) == {"Algorithm 3", "sampled and renamed", "input as it is"}
        for row_of_table in figures.values():
            assert row_of_table.keys() == {"pq", "sq", "rq", "id_accuracy"}
            if "drop 0 " in title or "drop 0.0 " in title:
                assert row_of_table["pq"] == 100  # all is given
    run(f"{command} --click 2")
    [figures] = read("inpaint.json").values()
    assert figures["Algorithm 3"]["pq"] < 100
    assert Image.open("inpaint.png").width > 300


def test_a_mask_of_ones_own_is_completed_as_well_as_the_checkpoint_can(photo):
    """--paper is Algorithm 3; else the given part is told, if it was trained for it."""
    command = f"inpaint --ckpt {SHAPES} --steps 2 --out . --mask part.png --image"
    called = []
    complete = inpaint.complete

    def noting(*arguments, method, **more):
        """complete, and by which method."""
        called.append(method)
        return complete(*arguments, method=method, **more)

    with mock.patch.object(inpaint, "complete", noting):
        run(command, photo)
        run(f"{command} {photo} --paper")
    assert called == [inpaint.told_maps, inpaint.complete_maps]
    found = read("inpaint.json")
    assert found["given"] == 1
    assert found["added"] == len(found["segments_info"]) - 1


def test_a_mask_of_another_size_or_without_a_picture_is_refused(photo, capsys):
    data.write_id_png("small.png", np.ones((9, 9), np.int32))
    command = f"inpaint --ckpt {SHAPES}"
    line = refused(capsys, f"{command} --mask small.png --image", photo)
    assert "--mask small.png: is (9, 9) pixels, the image (40, 60)" in line
    line = refused(capsys, f"{command} --image", photo)
    assert "--image and --mask belong together" in line
    assert "--paper is for a mask of your own" in refused(capsys, f"{command} --paper")


def test_scripts_that_run_in_one_process_say_so(capsys, monkeypatch):
    monkeypatch.setattr(data, "WORLD", 2)
    assert "start it without torchrun" in refused(capsys, "inpaint")
    assert "torchrun only evaluates" in refused(capsys, "sample --images x.jpg")


def test_the_shipped_weights_keep_their_figures():
    run("sample --limit 32 --steps 10 --out .")
    assert read("sample.json")["pq"] > 70
    with mock.patch.dict(ae.SMALL, eval_images=32):
        run(f"ae --iters 0 --num_workers 0 --out . --ckpt {SHAPES}")
    assert read("ae.json")["pq"] > 95
    run("inpaint --limit 16 --out .")
    [figures] = read("inpaint.json").values()
    assert figures["given part told"]["pq"] > 80
    assert figures["given part told"]["id_accuracy"] > 80


# ------------------------------------------------------------------------- bad input
def bad_flags(module):
    """Flags of a script, as it defines them, with values that can't be."""
    paths = ("data", "ckpt", "images", "image", "mask", "device")
    for field in dataclasses.fields(settings_of(module)):
        kind = field.metadata.get("kind", bool)
        if kind is bool:
            continue
        if kind is data.nonempty:
            values = ["", "no/such"] if field.name in paths else [""]
        else:
            values = ["x", "-1", "nan", "1e999"]
        for value in values:
            yield f"--{field.name}", value


def bad_checkpoints(good):
    """Broken and foreign versions of a checkpoint, as bytes."""
    whole = good.read_bytes()
    for share in (0, 0.01, 0.5, 0.999):
        yield whole[: int(share * len(whole))]
    yield bytes(999)
    yield b"text"
    content = torch.load(good)
    wrong = [[1, 2], *({key: value} for key, value in content.items())]
    # What is not enabled on a CPU is not looked at, and an iteration may be any number.
    for key in content.keys() - {"iteration", "scaler"}:
        wrong += [{**content, key: 7}, {**content, key: None}]
    for value in wrong:
        file = io.BytesIO()
        torch.save(value, file)
        yield file.getvalue()


USES = [
    ("ae", "ae", TINY_AE),
    ("diffusion", "ldm", TINY_LDM),
    ("sample", "ldm", "sample --limit 1 --steps 1"),
    ("inpaint", "ldm", "inpaint --limit 1 --steps 1"),
]


@pytest.mark.parametrize("script, stage, command", USES)
def test_bad_input_is_one_line_and_harms_nothing(
    tmp_path, trained, capsys, photo, script, stage, command
):
    out = tmp_path / "out"
    shutil.copytree(trained, out)
    bad = tmp_path / "bad.pt"
    bad.write_bytes(b"text")
    module = SCRIPTS[script]
    good = trained / f"{stage}.pt"
    for flag in bad_flags(module):
        refused(capsys, command, "--out", out, "--ckpt", good, *flag)
    if script == "inpaint":
        flags = ["--image", photo, "--mask", bad]
        refused(capsys, command, "--out", out, "--ckpt", good, *flags)
    for content in bad_checkpoints(good):
        bad.write_bytes(content)
        refused(capsys, command, "--out", out, "--ckpt", bad)
    if script in ("ae", "diffusion"):
        state = f"{stage}_state.pt"
        for content in bad_checkpoints(trained / state):
            (out / state).write_bytes(content)
            refused(capsys, f"{script} --resume", "--out", out)
        shutil.copy(trained / state, out)
    for file in out.rglob("*"):
        assert file.read_bytes() == (trained / file.name).read_bytes()


# ------------------------------------------------- what goes beyond the paper can go
TABLES = ("SCHEDULERS", "POSTPROCESS")  # where it is attached


def beyond_the_paper(module):
    """Names that a script defines under its banners `beyond the paper`."""
    lines = Path(module.__file__).read_text().splitlines()
    beyond = False
    names = []
    for line in lines:
        if re.match("# [-=]{9}", line):
            beyond = "beyond the paper" in line
        elif found := re.match(r"(?:class |def )?(\w+)(?:\(|:| =)", line):
            if beyond and found[1] not in TABLES and found[1] != "if":
                names.append(found[1])
    return names


def test_the_paper_works_without_what_goes_beyond_it(tiny, monkeypatch):
    """Algorithms 1 to 3, both losses, training samples and PQ."""
    removed = []
    for module in MODULES:
        for name in beyond_the_paper(module):
            if name not in ("PQSettings", "LookSettings", "main"):
                monkeypatch.delattr(module, name)
                removed.append(name)
    expected = "Augmented Instances connected VDDIM ToldLDM name_by_noise stitch"
    assert set(f"{expected} from_release told_maps".split()) <= set(removed)

    training = data.TrainingSet(data.Shapes("train", 32), size=32, num_ids=8)
    args = Namespace(batch_size=4, num_workers=0, device="cpu")
    [batch] = data.training_batches(training, [0], args)

    autoencoder = ae.Autoencoder(8, factor=4, width=32)
    logits, mean, logvar = autoencoder(batch["ids"])
    for total, count in ae.reconstruction_losses(logits, batch["ids"], 16):
        assert total > 0 and count > 0

    model = diffusion.LDM(
        autoencoder, diffusion.Pixels(4), tiny.unet, {**tiny.settings, **PAPER}
    )
    model.loss_weights = model.ddim.loss_weights("linear")
    model(batch, *model.draw(batch["ids"])).backward()
    [scene] = scenes(1)
    [(ids, probability)] = diffusion.sample_maps(model.eval(), [scene], steps=2, seed=0)
    found = ae.void_uncertain(ids, probability)
    quality = pq.PanopticQuality()
    quality.update(scene["ids"], scene["segments_info"], found, data.describe(found))
    assert quality.result()["All"]["n"] == 1

    given = np.where(np.arange(32) < 16, scene["ids"], 0)
    picture = {**scene, "given": given}
    method = inpaint.complete_maps
    [done] = inpaint.complete(model, [picture], method=method, steps=2, seed=0)
    assert np.array_equal(done[given > 0], given[given > 0])


PAPER = {"scheduler": "ddim", "postprocess": "paper", "told": False, "crop": 0}


# ----------------------------------------------------------- picture of the method
FINE = 2  # the page is drawn this many times larger, then shrunk, for smooth edges
INK = "#333333"
PALE = "#f4f6f8"
TRAINED = "#d9741f"
FIXED = "#4f76a3"
LATENT = "B x 4 x 64 x 64"
PIPELINE_SCENE = 3  # its shapes lie apart and are easy to make out

# Corners of the networks' shapes, from the centre, in half widths and half heights.
NARROWING = [(-1, -1), (1, -0.6), (1, 0.6), (-1, 1)]
WIDENING = [(-1, -0.6), (1, -1), (1, 1), (-1, 0.6)]
HOURGLASS = [(-1, -1), (0, -0.6), (1, -1), (1, 1), (0, 0.6), (-1, 1)]


def write_text(draw, x, y, label, size=22, color=INK, anchor="middle"):
    """Write one line whose middle is at height y; what follows ^ is raised.

    `anchor` says which part of the line is at x: its start, middle or end.
    """
    pieces = re.split(r"\^(\w+)", label)  # every second piece is raised
    full = ImageFont.load_default(size=size * FINE)
    small = ImageFont.load_default(size=int(0.7 * size * FINE))
    fonts = [small if k % 2 else full for k in range(len(pieces))]
    lengths = [font.getlength(piece) for font, piece in zip(fonts, pieces)]
    share = {"start": 0, "middle": 0.5, "end": 1}[anchor]
    left = x * FINE - share * sum(lengths)
    for k, (font, piece) in enumerate(zip(fonts, pieces)):
        height = y - 0.35 * size if k % 2 else y
        draw.text((left, height * FINE), piece, color, font=font, anchor="lm")
        left += lengths[k]


def scaled(points):
    """Points of the page as a flat list for Pillow."""
    return [coordinate * FINE for point in points for coordinate in point]


def draw_arrow(draw, *points):
    """Draw an arrow along straight lines through some points."""
    (x0, y0), (x1, y1) = points[-2:]
    length = np.hypot(x1 - x0, y1 - y0)
    dx = (x1 - x0) / length
    dy = (y1 - y0) / length
    base = (x1 - 12 * dx, y1 - 12 * dy)
    draw.line(scaled([*points[:-1], base]), INK, 3 * FINE, joint="curve")
    left = (base[0] - 7 * dy, base[1] + 7 * dx)
    right = (base[0] + 7 * dy, base[1] - 7 * dx)
    draw.polygon(scaled([left, right, (x1, y1)]), INK)


def draw_tensor(page, x, y, name, shape, array, side=64, planes=4):
    """Draw a stack of planes around (x, y), `array` in front; below, name and shape."""
    draw = ImageDraw.Draw(page)
    shift = 4 * (planes - 1) / 2
    front = Image.fromarray(array).resize([side * FINE] * 2, Image.Resampling.NEAREST)
    for plane in range(planes):
        left = x - side / 2 + shift - 4 * plane
        top = y - side / 2 - shift + 4 * plane
        corners = scaled([(left - 1, top - 1), (left + side, top + side)])
        draw.rectangle(corners, "#dfe5ec", INK, FINE)
    page.paste(front, (int(left * FINE), int(top * FINE)))
    write_text(draw, x, y + 73, name, size=24)
    write_text(draw, x, y + 101, shape, size=20, color="#666666")


def draw_network(draw, x, y, label, corners, color):
    """Draw a network as a filled shape around (x, y), with lines of text on it."""
    draw.polygon(scaled([(x + 66 * u, y + 52 * v) for u, v in corners]), color)
    lines = label.split("\n")
    for k, line in enumerate(lines):
        height = y + 24 * (k - (len(lines) - 1) / 2)
        write_text(draw, x, height, line, color="white")


def draw_step(draw, x, y, label, half_width):
    """Draw a computation without weights as a white box around (x, y)."""
    lines = label.split("\n")
    half_height = 14 * len(lines) + 10
    corners = scaled(
        [(x - half_width, y - half_height), (x + half_width, y + half_height)]
    )
    draw.rounded_rectangle(corners, 10 * FINE, "white", INK, 2 * FINE)
    for k, line in enumerate(lines):
        write_text(draw, x, y + 28 * (k - (len(lines) - 1) / 2), line, size=20)


def draw_panel(draw, top, bottom, title, note):
    """Draw the ground of one part of the method, its title and a remark."""
    corners = scaled([(16, top), (1584, bottom)])
    draw.rounded_rectangle(corners, 14 * FINE, PALE)
    write_text(draw, 36, top + 28, title, size=28, anchor="start")
    write_text(draw, 1564, top + 28, note, size=21, color="#666666", anchor="end")


def in_cells(values):
    """Mean of 256 x 256 values in each of 16 x 16 cells, of mean 0 and deviation 1."""
    cells = values.reshape(16, 16, 16, 16).mean((1, 3))
    return (cells - cells.mean()) / cells.std()


def as_grey(values):
    """Values of about -2..2 as grey levels (uint8)."""
    return (128 + 55 * values).clip(0, 255).astype(np.uint8)


def pipeline_pictures():
    """Arrays to show on the pipeline's tensors, made from a built-in scene."""
    scene = data.Shapes("pipeline", 256)[PIPELINE_SCENE]
    ids = scene["ids"]
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(16, 16))
    latent = in_cells(ids)
    cells = rng.random((8, 8)) < 0.35
    kept = cells.repeat(32, 0).repeat(32, 1)
    given = np.where(kept, ids, 0)
    known = np.where(cells.repeat(2, 0).repeat(2, 1), latent, 0)
    return {
        "image": scene["image"],
        "ids": data.colorize(ids, background=1),
        "given": data.colorize(given, background=1),
        "bit": np.where(ids & 1, 255, 0).astype(np.uint8),
        "image_latent": as_grey(in_cells(scene["image"][..., 1])),
        "latent": as_grey(latent),
        "known": as_grey(known),
        "noise": as_grey(noise),
        "noised": as_grey(0.6 * latent + 0.8 * noise),
        "logits": np.where(ids == 2, 230, 60).astype(np.uint8),
    }


def draw_stage1(page, y, pictures):
    """Draw how the autoencoder turns ids into a latent and back, in a row at y."""
    draw = ImageDraw.Draw(page)
    draw_tensor(
        page, 130, y, "id map", "B x 512 x 512", pictures["ids"], side=96, planes=1
    )
    shape = "B x 7 x 512 x 512"
    draw_tensor(page, 365, y, "bits", shape, pictures["bit"], side=84, planes=7)
    draw_network(draw, 575, y, "encoder", NARROWING, TRAINED)
    draw_tensor(page, 765, y, "z", LATENT, pictures["latent"])
    draw_network(draw, 955, y, "decoder", WIDENING, TRAINED)
    shape = "B x 128 x 256 x 256"
    draw_tensor(page, 1180, y, "logits", shape, pictures["logits"], side=76, planes=9)
    shape = "B x 512 x 512"
    draw_tensor(page, 1470, y, "id map", shape, pictures["ids"], side=96, planes=1)
    draw_arrow(draw, (186, y), (300, y))
    draw_arrow(draw, (428, y), (502, y))
    draw_arrow(draw, (648, y), (714, y))
    draw_arrow(draw, (814, y), (882, y))
    draw_arrow(draw, (1028, y), (1114, y))
    draw_arrow(draw, (1246, y), (1414, y))
    write_text(draw, 1328, y - 42, "upsample,", size=20)
    write_text(draw, 1328, y - 18, "argmax", size=20)


def draw_stage2(page, y, pictures):
    """Draw how the UNet learns to find noise, in three rows, the middle one at y."""
    draw = ImageDraw.Draw(page)
    above = y - 185
    below = y + 180
    shape = "B x 3 x 512 x 512"
    draw_tensor(page, 130, above, "image", shape, pictures["image"], side=96, planes=1)
    draw_network(draw, 340, above, "SD VAE\nencoder", NARROWING, FIXED)
    draw_tensor(page, 810, above, "image_latent", LATENT, pictures["image_latent"])
    shape = "B x 512 x 512"
    draw_tensor(page, 130, y, "id map", shape, pictures["ids"], side=96, planes=1)
    draw_network(draw, 340, y, "stage 1\nencoder", NARROWING, FIXED)
    draw_tensor(page, 530, y, "z", LATENT, pictures["latent"])
    draw_tensor(page, 810, y, "z^j", LATENT, pictures["noised"])
    draw_tensor(page, 810, below, "self_cond", LATENT, pictures["latent"])
    shape = "B x 12 x 64 x 64"
    draw_tensor(page, 1040, y, "concat", shape, pictures["noised"], planes=12)
    draw_network(draw, 1240, y, "UNet(j)", HOURGLASS, TRAINED)
    draw_tensor(page, 1450, y, "eps_theta", LATENT, pictures["noise"])
    draw_step(
        draw, 1450, above + 25, "loss (eq. 4):\nw_j (eps - eps_theta)^2", half_width=114
    )

    draw_arrow(draw, (186, above), (267, above))
    draw_arrow(draw, (413, above), (759, above))
    draw_arrow(draw, (186, y), (267, y))
    draw_arrow(draw, (413, y), (479, y))
    draw_arrow(draw, (579, y), (759, y))
    write_text(draw, 668, y - 42, "add noise eps", size=20)
    write_text(draw, 668, y - 18, "at timestep j", size=20)
    draw_arrow(draw, (860, above), (1040, above), (1040, y - 64))
    draw_arrow(draw, (860, y), (976, y))
    draw_arrow(draw, (860, below - 18), (1040, below - 18), (1040, y + 122))
    draw_arrow(draw, (1106, y), (1167, y))
    draw_arrow(draw, (1313, y), (1399, y))
    draw_arrow(draw, (1450, y - 46), (1450, above + 66))
    draw_arrow(draw, (1450, y + 122), (1450, below + 22), (860, below + 22))
    label = "z^0 of a first pass, or zeros"
    write_text(draw, 1255, below + 2, label, size=20)


def draw_loop(draw, start, end, y, label):
    """Draw an arrow from a step back to an earlier one, below the row at y."""
    low = y + 96
    draw_arrow(draw, (start, y + 52), (start, low), (end, low), (end, y + 54))
    write_text(draw, (start + end) / 2, low + 20, label, size=20)


def draw_sampling(page, y, pictures):
    """Draw Algorithm 2, in a row at height y."""
    draw = ImageDraw.Draw(page)
    draw_tensor(page, 130, y, "noise z", LATENT, pictures["noise"])
    draw_network(draw, 400, y, "UNet(j)", HOURGLASS, FIXED)
    draw_step(draw, 620, y, "DDIM step\nto the next j", half_width=80)
    draw_tensor(page, 850, y, "z^0", LATENT, pictures["latent"])
    draw_network(draw, 1040, y, "stage 1\ndecoder", WIDENING, FIXED)
    shape = "B x 128 x 256 x 256"
    draw_tensor(page, 1250, y, "logits", shape, pictures["logits"], side=76, planes=9)
    shape = "B x 512 x 512"
    draw_tensor(page, 1480, y, "id map", shape, pictures["ids"], side=96, planes=1)
    draw_arrow(draw, (180, y), (327, y))
    draw_arrow(draw, (473, y), (538, y))
    draw_arrow(draw, (702, y), (799, y))
    draw_arrow(draw, (899, y), (967, y))
    draw_arrow(draw, (1113, y), (1186, y))
    draw_arrow(draw, (1316, y), (1424, y))
    write_text(draw, 400, y - 96, f"image_latent  {LATENT}", size=20)
    draw_arrow(draw, (400, y - 82), (400, y - 36))
    draw_loop(draw, 620, 400, y, "next step: z and self_cond = z^0")


def draw_inpainting(page, y, pictures):
    """Draw Algorithm 3, in a row at height y."""
    draw = ImageDraw.Draw(page)
    shape = "B x 512 x 512"
    given = pictures["given"]
    draw_tensor(page, 130, y, "partial id map", shape, given, side=96, planes=1)
    draw_network(draw, 330, y, "stage 1\nencoder", NARROWING, FIXED)
    draw_tensor(page, 520, y, "z_known", LATENT, pictures["known"])
    draw_step(draw, 745, y, "z = M z_known^j\n+ (1 - M) z", half_width=92)
    draw_network(draw, 970, y, "UNet(j)", HOURGLASS, FIXED)
    draw_step(draw, 1145, y, "DDIM\nstep", half_width=46)
    draw_network(draw, 1310, y, "stage 1\ndecoder", WIDENING, FIXED)
    draw_tensor(page, 1490, y, "id map", shape, pictures["ids"], side=96, planes=1)
    draw_arrow(draw, (186, y), (257, y))
    draw_arrow(draw, (403, y), (469, y))
    draw_arrow(draw, (570, y), (651, y))
    draw_arrow(draw, (839, y), (897, y))
    draw_arrow(draw, (1043, y), (1097, y))
    draw_arrow(draw, (1193, y), (1237, y))
    draw_arrow(draw, (1383, y), (1434, y))
    write_text(draw, 700, y - 96, "noise z, mask M  B x 1 x 64 x 64", size=20)
    draw_arrow(draw, (745, y - 82), (745, y - 40))
    write_text(draw, 1060, y - 96, f"image_latent  {LATENT}", size=20)
    draw_arrow(draw, (970, y - 82), (970, y - 36))
    draw_loop(
        draw,
        1145,
        745,
        y,
        "next step: z and self_cond = z^0, where z^0 = z_known if M = 1",
    )


def draw_pipeline(path):
    """Draw the method with its tensors' shapes in the paper's setting, 1600 px wide."""
    page = Image.new("RGB", (1600 * FINE, 1590 * FINE), "white")
    draw = ImageDraw.Draw(page)
    pictures = pipeline_pictures()

    note = "loss (eq. 2) on the logits: cross-entropy, and BCE + Dice for each segment"
    draw_panel(draw, 16, 256, "Stage 1: the autoencoder (ae.py)", note)
    draw_stage1(page, 126, pictures)

    note = "the UNet learns to find the noise in a latent, given the image"
    draw_panel(draw, 272, 872, "Stage 2: diffusion (diffusion.py)", note)
    draw_stage2(page, 566, pictures)

    note = "Algorithm 2: from noise to all masks at once, in 10 to 50 steps"
    draw_panel(draw, 888, 1202, "Sampling (sample.py)", note)
    draw_sampling(page, 1052, pictures)

    note = "Algorithm 3: cells of the latent that are given are held in every step"
    draw_panel(draw, 1218, 1532, "Inpainting (inpaint.py)", note)
    draw_inpainting(page, 1382, pictures)

    legend = [
        (36, TRAINED, "trained in this stage"),
        (316, FIXED, "fixed in this stage"),
    ]
    for left, color, label in legend:
        draw.rectangle(scaled([(left, 1550), (left + 28, 1572)]), color)
        write_text(draw, left + 40, 1561, label, size=20, anchor="start")
    sizes = "B: batch size; up to 127 segments (7 bits) and void; T = 1000 timesteps"
    write_text(draw, 1564, 1561, sizes, size=20, color="#666666", anchor="end")
    data.write(path, page.reduce(FINE))


# ------------------------------------------------------------------------------ speed
def side_by_side(functions, rounds=5):
    """Time {name: function} in turn, so that all see the machine in the same state.

    Prints the median (CPU time; on a GPU the clock's) and the median speed, where the
    first function's is 1.
    """
    gpu = torch.cuda.is_available()
    clock = time.perf_counter if gpu else time.process_time
    times = np.zeros((len(functions), rounds + 1))  # of which the first is the warm-up
    for n in range(rounds + 1):
        for k, function in enumerate(functions.values()):
            began = clock()
            function()
            if gpu:
                torch.cuda.synchronize()
            times[k, n] = 1000 * (clock() - began)
    times = times[:, 1:]
    for name, own in zip(functions, times):
        speed = np.median(times[0] / own)
        print(f"{name:>32}{np.median(own):10.2f} ms   x {speed:.2f}")


def blobs(count, seed):
    """A 640 x 480 map of segments with wavy outlines and ids as COCO has them."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:480, :640].astype(np.float32)
    wavy_y = y + 6 * np.sin(x / 17) + 3 * np.sin(x / 5)
    wavy_x = x + 6 * np.sin(wavy_y / 13)
    centres = rng.random((count, 2)) * (480, 640)
    distances = [(wavy_y - a) ** 2 + (wavy_x - b) ** 2 for a, b in centres]
    ids = rng.choice(data.MAX_ID, count, replace=False).astype(np.int32) + 1
    return ids[np.argmin(distances, axis=0)]


def bench_pq():
    """PQ of an image, beside the least that it takes: counting pairs of ids."""
    quality = pq.PanopticQuality()
    maps = [(blobs(n, seed=0), blobs(n, seed=1)) for n in (5, 20, 60, 120)]
    cells = np.arange(1, 10001).reshape(100, 100).repeat(3, 0).repeat(3, 1)
    maps.append((cells, np.roll(cells, 1)))
    for truth, found in maps:
        truth_segments = data.describe(truth)
        found_segments = data.describe(found)

        def unique():
            """Count pairs of ids by sorting them all."""
            pairs = truth.astype(np.int64) << 24 | found
            return np.unique(pairs, return_counts=True)

        def update():
            """The whole of it."""
            quality.update(truth, truth_segments, found, found_segments)

        name = f"np.unique, {len(truth_segments)} segments"
        side_by_side({name: unique, "PQ": update}, rounds=25)
    tracemalloc.start()
    update()
    print(f"its memory: {tracemalloc.get_traced_memory()[1] / 1e6:.1f} MB")
    tracemalloc.stop()


def bench_samples(device):
    """Training samples, beside Pillow's reading and resizing: batches by size."""
    batches = {}
    args = Namespace(batch_size=16, num_workers=0, device="cpu")
    with tempfile.TemporaryDirectory() as root:
        picture = f"{root}/0.jpg"
        png = f"{root}/0.png"
        ids = blobs(30, seed=0)
        Image.fromarray(data.Shapes("", 640)[0]["image"][:480]).save(picture)
        data.write_id_png(png, ids)
        info = {"id": 0, "file_name": "0.jpg"}
        entry = {"image_id": 0, "file_name": "0.png"}
        entry["segments_info"] = data.describe(ids)
        content = {"images": [info], "annotations": [entry]}
        content["categories"] = [{"id": 1}]
        data.write(f"{root}/annotations/panoptic_train.json", content)
        source = data.open_data(root, "train")
        for size, num_ids in ((256, 128), (64, 16), (512, 128)):
            training = data.TrainingSet(source, size, num_ids=num_ids)

            def pillow():
                """Both files, read and resized."""
                return [Image.open(f).resize((size, size)) for f in (picture, png)]

            def read_sample():
                """A training sample of them."""
                return training[0]

            parts = {f"Pillow, {size} px": pillow, "sample": read_sample}
            side_by_side(parts, rounds=25)
            [batch] = data.training_batches(training, [0], args)
            batches[size] = {key: v.to(device) for key, v in batch.items()}
    return batches


def plain_norm(x):
    """LayerNorm2d, untrained, written out: B x C x H x W -> B x C x H x W."""
    x = x - x.mean(1, keepdim=True)
    return x / (x.square().mean(1, keepdim=True) + 1e-6).sqrt()


def bench_stage1(device, ids):
    """A step, beside the straightforward one: one segment's mask after the other."""
    plain = ae.Autoencoder()
    plain.decoder[3].forward = plain_norm
    plain.decoder[6].forward = plain_norm
    model = ae.Autoencoder()
    for module in (plain, model):
        module.to(device, memory_format=torch.channels_last)

    def straightforward():
        """Each segment's full mask on its own."""
        logits, _, _ = plain(ids)
        points = ae.uncertain_points(logits, ae.ce_uncertainty, 12544)
        loss, _ = ae.ce_loss(logits, ids, points)
        for b, i in zip(*ae.present_segments(ids, 128)):
            own = logits[b, i][None]
            points = ae.uncertain_points(own[:, None], ae.mask_uncertainty, 12544)
            mask = (ids[b] == i)[None]
            segment_loss, _ = ae.mask_loss(own, mask, points)
            loss = loss + segment_loss
        loss.backward()

    def step():
        """As ae.py does it."""
        logits, _, _ = model(ids)
        (ce, _), (mask, _) = ae.reconstruction_losses(logits, ids, 12544)
        (ce + mask).backward()

    side_by_side({"stage 1, straightforward": straightforward, "step": step}, rounds=1)


def bench_stage2(device, batch):
    """A step, beside its passes of the UNet, and what sampling consists of."""
    unet = diffusion.build_unet(diffusion.small_unet_config(56, 16, channels=48))
    settings = {**diffusion.DEFAULTS, "size": 64, "latent_scale": 1.0}
    autoencoder = ae.Autoencoder(16, factor=4, width=64)
    model = diffusion.LDM(autoencoder, diffusion.Pixels(4), unet, settings)
    model.to(device, memory_format=torch.channels_last)
    model.self_cond_share = 0.5
    with torch.no_grad():
        z = model.encode(batch["ids"])
        condition = model.condition(batch)
        logits = model.decode(z)
    j = torch.arange(16).to(device) * 60

    def passes():
        """Those of a step: half of the samples condition themselves."""
        with torch.no_grad():
            model.denoise(z[:8], condition[:8], z[:8], j[:8])
        model.denoise(z, condition, z, j).mean().backward()

    def step():
        """As diffusion.py does it."""
        model(batch, z, j).backward()

    def sampling():
        """A pass of sampling."""
        with torch.no_grad():
            model.denoise(z, condition, z, j)

    def decoder():
        """From latents to logits."""
        with torch.no_grad():
            model.decode(z)

    def post_processing():
        """From the logits of one photograph to its segments."""
        ae.void_uncertain(*ae.likeliest(logits[0], 480, 640), 512)

    side_by_side({"stage 2, passes of the UNet": passes, "step": step})
    parts = {"sampling 16, UNet": sampling}
    parts["image encoder"] = lambda: model.encode_image(batch["image"])
    parts["decoder"] = decoder
    parts["post-processing of 1"] = post_processing
    side_by_side(parts)


def bench_stitch():
    """The joining of tiles: one should take as long in any picture."""
    for side in (512, 1024, 2048):
        truth = cells(side)
        tiles = tiles_of_a_truth(truth, 48)
        began = time.process_time()
        sample.stitch(tiles, truth.shape)
        spent = 1000 * (time.process_time() - began)
        name = f"joining {len(tiles)} tiles, {side} px"
        print(f"{name:>32}{spent:10.2f} ms   {spent / len(tiles):.2f} a tile")


def bench():
    """Time what a user waits for."""
    device = data.choose_device("auto")
    torch.manual_seed(0)
    bench_pq()
    batches = bench_samples(device)
    bench_stage1(device, batches[512]["ids"][:2])
    bench_stage2(device, batches[64])
    bench_stitch()


COMMANDS = {
    "bench": bench,
    "pipeline": lambda: draw_pipeline(HERE / "assets" / "pipeline.png"),
}

if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in COMMANDS:
        hint = "python test_all.py bench or pipeline; python -m pytest -q test_all.py"
        raise SystemExit(hint)
    COMMANDS[sys.argv[1]]()

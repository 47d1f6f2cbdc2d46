"""test_all.py: every core piece against an independent truth, every script as its user runs it.

    make test                      # or: python -m pytest -q test_all.py
    python test_all.py bench       # times of the parts, each beside a yardstick

Reference numbers of the authors' release and of the panoptic API are looked for in $LDMSEG_SHARED
(default: ../shared); tests that need them are skipped where they are absent."""

from argparse import Namespace
from pathlib import Path
from unittest import mock
import contextlib
import functools
import io
import json
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
import tracemalloc
import zlib

from PIL import Image
import numpy as np
from pycocotools import mask as coco_mask
import pytest
import torch
import torch.nn.functional as F

import ae
import data
import diffusion
import inpaint
import pq
import sample

HERE = Path(__file__).parent
SHAPES = HERE / "assets" / "shapes.pt"
SHARED = Path(os.environ.get("LDMSEG_SHARED", HERE.parent / "shared"))
SCRIPTS = {module.__name__: module for module in (ae, diffusion, sample, inpaint)}
TINY = "--model small --data shapes --size 32 --batch_size 4 --eval_images 2 --num_workers 0"
TINY += " --device cpu --iters 3 --save_every 2"
TINY_AE = TINY + " --num_ids 8 --width 32"
ARGS = dict(steps=6, seed=0, votes=2, batch_size=4)
torch.set_num_threads(1)  # two that wait for a busy core are a hundred times slower
close = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5)
exact = functools.partial(close, rtol=0, atol=0)
near = functools.partial(close, atol=1e-3)
bad_input = functools.partial(pytest.raises, data.BadInput)


def reference(name):
    """A file of reference numbers; where it is absent, the test is skipped."""
    path = SHARED / "reference" / name
    if not path.exists():
        pytest.skip(f"no reference numbers at {path} (set LDMSEG_SHARED)")
    return path


def numbers(name):
    """A reference .npz as tensors."""
    arrays = np.load(reference(name))
    return Namespace(**{k: torch.from_numpy(v) for k, v in arrays.items() if k != "images"})


def run(main, flags, *more):
    """A script's main with flags as one would type them, and some that are paths."""
    main([*flags.split(), *map(str, more)])


def refused(capsys, main, *flags):
    """The one line on stderr with which a script must end, with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        run(main, "", *flags)
    said = [l for l in capsys.readouterr().err.splitlines() if l.strip() and "%|" not in l]
    [line] = [l for l in said if not l.startswith("note: ")]
    return line


def read(path):
    """A JSON file, or the lines of a log."""
    text = Path(path).read_text()
    return [json.loads(l) for l in text.splitlines()] if "jsonl" in str(path) else json.loads(text)


def same_partition(a, b):
    """Whether two id maps show the same segments under any ids."""
    pairs = np.unique(np.stack([a.ravel(), b.ravel()]), axis=1).shape[1]
    return pairs == len(np.unique(a)) == len(np.unique(b))


def row(digits):
    """An id map of one row."""
    return np.array([[*map(int, digits)]], np.int32)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """Both stages, a few iterations each, by the scripts' own main: the folder of their files."""
    out = tmp_path_factory.mktemp("trained")
    run(ae.main, TINY_AE, "--out", out, "--json", out / "ae.json")
    run(diffusion.main, TINY, "--out", out, "--json", out / "ldm.json")
    return out


@pytest.fixture
def tiny(trained):
    """The trained model, afresh."""
    return sample.load(trained / "ldm.pt")


@pytest.fixture
def shipped():
    """The weights that come with the project."""
    return sample.load(SHAPES)


def scenes(count, size=32):
    """Held-out scenes."""
    return [data.Shapes("v", size)[n] for n in range(count)]


def shell(capsys, command):
    """Run a command line: exit code, what it printed, lines on stderr other than progress bars."""
    script, *argv = command.split()
    capsys.readouterr()
    data.say_once.cache_clear()
    try:
        code = sys.modules[script].main(argv)
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    return code, out, [line for line in err.splitlines() if line.strip() and "%|" not in line]


def shell_refuses(capsys, command, *words):
    """A command line must end with exit code 2 and one line on stderr that holds all the words."""
    code, _, lines = shell(capsys, command)
    assert code == 2 and len(lines) == 1 and ".py: error: " in lines[0], lines
    assert all(word in lines[0] for word in words), lines


# What `write_coco` writes of each picture, for the layouts instances and panoptic alike.
IMAGE = '{"id": #, "file_name": "#.png", "width": 64, "height": 48}'
SQUARE = "[[8, 8, 32, 8, 32, 32, 8, 32]]"
ANNOTATION = (
    '{"id": #, "image_id": #, "category_id": 1, "segmentation": %s, "file_name": "#.png", '
    '"segments_info": [{"id": 70000, "category_id": 1}, {"id": 300, "category_id": 2}]}'
) % SQUARE
CATEGORIES = '[{"id": 1, "name": "cat", "isthing": 1}, {"id": 2, "name": "sky", "isthing": 0}]'
IDS = {"panoptic": (70_000, 300), "instances": (2, 1)}  # of the square, and of what is around it


def square(inside, outside=0):
    """The truth of every picture."""
    ids = np.full((48, 64), outside, np.int32)
    ids[8:32, 8:32] = inside
    return ids


def pixels_of(number):
    """The pixels of a picture."""
    return np.random.default_rng(number).integers(0, 255, (48, 64, 3), np.uint8)


def write_coco(root, kind="panoptic", old="", new="", count=1):
    """A folder in COCO layout of pictures 1.png, 2.png, ...; the text `old` of its JSON becomes
    `new`. Returns the JSON's path."""
    numbers = range(1, count + 1)
    for i in numbers:
        data.write(f"{root}/val/{i}.png", Image.fromarray(pixels_of(i)))
        data.write_id_png(f"{root}/annotations/panoptic_val/{i}.png", square(70_000, 300))
    lists = (", ".join(text.replace("#", str(i)) for i in numbers) for text in (IMAGE, ANNOTATION))
    text = '{"images": [%s], "annotations": [%s], "categories": %s}' % (*lists, CATEGORIES)
    assert old in text
    path = Path(f"{root}/annotations/{kind}_val.json")
    path.write_text(text.replace(old, new) if old else text, errors="surrogateescape")
    return path


# ------------------------------------------------------------------------------------------ scenes


def test_scenes_are_those_of_the_first_version_and_hold_what_they_promise():
    """The two numbers were taken from the code before it was rewritten."""
    crc, total = 0, 0
    for scene in map(data.Shapes("val2017", 48, seed=2).__getitem__, range(40)):
        areas, segments = np.bincount(scene["ids"].ravel())[1:].tolist(), scene["segments_info"]
        assert [s["area"] for s in segments] == areas and min(areas) >= 48 * 48 // 60
        crc = zlib.crc32(scene["ids"].tobytes() + bytes(s["category_id"] for s in segments), crc)
        total += scene["image"].ravel().astype(int) @ (np.arange(48 * 48 * 3) % 251)
    assert crc == 3823813632 and total == pytest.approx(4377767331, rel=3e-6)  # sines may differ
    splits = ("train", 1), ("train", 2), ("val", 1), ("train", 1)
    assert len({data.Shapes(s, seed=k)[7]["image"].tobytes() for s, k in splits}) == 3


# ------------------------------------------------------------------------ what the network is given


class Grey(data.Shapes):
    """Scenes whose grey value is 50 times the id."""

    def __getitem__(self, index):
        scene = super().__getitem__(index)
        return scene | {"image": np.repeat(np.uint8(50 * scene["ids"])[..., None], 3, 2)}


def test_a_training_sample_depends_on_its_number_and_its_parts_move_together():
    scenes, corners = Grey("train"), set()
    first, again, blind, bright = (
        data.Training(scenes, 32, 16, seed=1, crop=32, **more)
        for more in ({}, {}, {"images": False}, {"augment": 0.5, "given": 1.0})
    )
    for n in range(60):
        x, changed, _ = first[n], bright[n], again[n + 7]
        np.testing.assert_equal(again[n], x)
        np.testing.assert_equal({**blind[n], "image": x["image"]}, x)
        ids, grey, seen = changed["ids"], changed["image"][0].astype(int), x["ids"] > 0
        given = changed["given"] > 0
        assert np.array_equal(changed["given"], ids * given)
        for s in data.describe(ids):
            own = grey[ids == s["id"]]  # of one grey, but for the blurred edge
            assert s["area"] < 100 or (abs(own - np.median(own)) < 4).mean() > 0.5
        middle = ((i, np.median(x["image"][0][x["ids"] == i])) for i in np.unique(x["ids"][seen]))
        pairs = {(50 * round(grey / 50), i) for i, grey in middle}  # edges are blurred
        assert len(pairs) == len(dict(pairs)) == len({i for _, i in pairs})
        kind = {50 * s["id"]: s["category_id"] for s in scenes[n]["segments_info"]}
        assert all(x["classes"][i] == kind[grey] - 1 for grey, i in pairs)
        corners.add(x["image"][0, ::31, ::31].tobytes())
    assert len(corners) > 15


def test_ids_are_resized_as_by_pillow():
    ids = np.arange(480 * 640, dtype=np.int32).reshape(480, 640)
    pillow = np.asarray(Image.fromarray(ids).resize((256, 512), Image.NEAREST))
    assert (data.resize_ids(ids, 512, 256) == pillow).mean() > 0.999


def test_relabel_equals_a_lookup_of_each_pixel(capsys):
    """Crowds, small and unlisted segments become void; of too many the largest stay."""
    data.say_once.cache_clear()
    rng = np.random.default_rng(0)
    for cell in [1, 5] * 10:
        ids = rng.integers(1, 13, (30 // cell, 40 // cell)).repeat(cell, 0).repeat(cell, 1) << 20
        area = {i << 20: (ids == i << 20).sum() for i in range(1, 10)}
        segments = data.describe(ids)[:11]  # 12 is unlisted
        segments = [s | {"iscrowd": s["id"] > 9 << 20} for s in segments]
        kept = [i for i in sorted(area, key=lambda i: -area[i])[:7] if area[i] >= 60]
        found, new = data.relabel(ids, segments, 8, rng, min_area=60)
        assert {i for i in new if new[i]} == set(kept) and len({new[i] for i in kept}) == len(kept)
        assert np.array_equal(found, np.vectorize(lambda i: new.get(i, 0))(ids))
    assert capsys.readouterr().err.count("more than N - 1 = 7 segments") == 1


def test_ranks_share_the_global_batch_in_pieces(monkeypatch):
    dataset, pieces = data.Training(data.Shapes("train", 16), 16, 8), []
    (whole,) = data.training_batches(dataset, [5], Namespace(batch_size=8, num_workers=1))
    monkeypatch.setattr(data, "WORLD", 2)
    for rank in range(2):
        monkeypatch.setattr(data, "RANK", rank)
        pieces += data.training_batches(dataset, [5], Namespace(batch_size=8, num_workers=0), 2)
    assert torch.equal(torch.cat([p["ids"] for p in pieces]), whole["ids"])


# --------------------------------------------------------------------------------- reading pictures


def test_pictures_of_every_mode_are_read_and_transparency_is_white(tmp_path):
    path, ramp = f"{tmp_path}/x.tif", Image.linear_gradient("L")
    for mode in ("L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "1", "I;16", "I", "F"):
        ramp.convert(mode).save(path)
        array = data.read_image(path)
        assert array.shape == (256, 256, 3) and array.dtype == np.uint8
        assert array[-1].min() > 200 and array[0].max() < 60, mode
    Image.new("RGBA", (9, 7)).save(path)
    assert (data.read_image(path) == 255).all()


def test_one_scene_looks_alike_at_any_depth(tmp_path):
    scene, path = np.linspace(0, 1, 3072).reshape(48, 64), f"{tmp_path}/x.tif"
    for high, kind in ((327, "u2"), (4095, "u2"), (65535, "u2"), (70_000, "i4"), (1, "f4")):
        Image.fromarray((scene * high).astype(kind)).save(path)
        assert np.abs(data.read_image(path) - 255 * scene[..., None]).max() < 2


@pytest.mark.parametrize("kind", IDS)
def test_a_picture_is_turned_as_its_exif_and_its_annotation_say(tmp_path, kind):
    write_coco(tmp_path, kind)
    path, exif = f"{tmp_path}/val/1.png", Image.Exif()
    for exif[0x0112], quarters in ((3, 2), (6, 1), (8, 3)):
        stored = np.rot90(pixels_of(1), quarters)
        Image.fromarray(stored).save(path, exif=exif)
        assert np.array_equal(data.open_data(tmp_path, "val")[0]["image"], pixels_of(1))
        if quarters != 2:
            assert np.array_equal(data.read_image(path, (48, 64)), stored)


def test_id_pngs_of_every_mode_are_read(tmp_path):
    path, small = f"{tmp_path}/x.tif", np.arange(12, dtype=np.uint8).reshape(3, 4)
    large = small + np.int32(70_000)
    data.write_id_png(path, large)
    rgb = Image.open(path)
    assert np.array_equal(np.asarray(rgb) @ [1, 256, 65536], large)
    images = [(large, rgb.convert("RGBA")), (large, Image.fromarray(large))]
    images += [(small, Image.fromarray(small).convert(mode)) for mode in ("L", "LA", "I;16", "F")]
    for ids, image in images:
        image.save(path)
        assert np.array_equal(data.read_id_png(path), ids), image.mode
    for wrong in (large << 8, -large):
        Image.fromarray(wrong).save(path)
        with pytest.raises(data.BadInput, match="x.tif"):
            data.read_id_png(path)
    palette = Image.new("P", (4, 3), 1)
    palette.putpalette([7, 0, 0, 9, 0, 0])
    palette.save(path)
    for listed, i in (([9], 9), ([1], 1), ([1, 9], 9), ((), 1)):
        assert (data.read_id_png(path, listed) == i).all(), listed


def test_bombs_broken_files_and_formats_beyond_the_list_are_refused_by_name(tmp_path):
    path, head = tmp_path / "x.jpg", b"IHDR" + b"\0\0\xea\x60" * 2 + b"\x08\2\0\0\0"
    bomb = (
        b"\x89PNG\r\n\x1a\n\0\0\0\r" + head + zlib.crc32(head).to_bytes(4, "big") + b"\0\0\0\0IDAT"
    )
    other = b"#define x_width 8\n#define x_height 1\nstatic char x_bits[] = {\n0x00};"  # an XBM
    for content, word in ((bomb, "Bomb"), (other, "not a"), (b"", "not a")):
        path.write_bytes(content)
        for read in (data.read_image, data.read_id_png):
            with pytest.raises(data.BadInput, match=f"x.jpg: .*{word}"):
                read(path)


def test_a_folder_of_pictures_as_a_computer_leaves_it(tmp_path, capsys):
    for name in ("a.png", "b.jfif", "caf\udce9.PNG", "._a.png", "Thumbs.db"):
        (tmp_path / name).touch()
    os.mkdir(f"{tmp_path}/more.png")
    assert {name for name, _ in sample.Pictures(tmp_path).files} == {"a", "b", "caf\udce9"}
    shell_refuses(capsys, "data --data caf\udce9", r"caf\udce9")


# --------------------------------------------------------------------------- folders in COCO layout


@pytest.mark.parametrize("kind", IDS)
@pytest.mark.parametrize(
    "case",
    [  # a text of the JSON | what people have there | a file or folder | where they have it
        '{"images" | {"images" | val | images/val',
        '{"images" | \ufeff{"images" | val | val',
        '"image_id": 1 | "image_id": "1" | annotations/panoptic_val | panoptic_val',
        r'"1.png", "width" | "x\\1.png", "width" | val/1.png | val/x/1.png',
        r'"1.png", "width" | "val\\1.png", "width" | val | val',
        '"1.png", "width" | "a_gtFine_b.png", "width" | val/1.png | val/bonn/a_b.png',  # Cityscapes
        f"{SQUARE} | {SQUARE[1:-1]} | val | val",
    ],
)
def test_a_folder_is_read_as_people_have_it(tmp_path, kind, case):
    old, new, here, there = case.split(" | ")
    write_coco(tmp_path, kind, old, new)
    shutil.copytree(tmp_path / "val", tmp_path / "images" / "other")
    (tmp_path / there).parent.mkdir(exist_ok=True)
    (tmp_path / here).rename(tmp_path / there)
    (found,) = data.open_data(tmp_path, "val")
    assert np.array_equal(found["image"], pixels_of(1))
    assert np.array_equal(found["ids"], square(*IDS[kind]))
    areas = {s["id"]: s["area"] for s in found["segments_info"]}
    assert areas == dict(zip(IDS[kind], (576, 48 * 64 - 576)))


def test_a_file_is_where_its_path_leads_else_where_its_name_is_unique(tmp_path):
    for name in ("a/1.png", "b/1.png", "c/2.png"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    places = {
        "a/1.png": "a/1.png",
        r"b\1.png": "b/1.png",
        "x/2.png": "c/2.png",
        r"C:\2.png": "c/2.png",
    }
    for name, place in places.items():
        assert data.find_file(name, [tmp_path], "here") == tmp_path / place
    (tmp_path.parent / "3.png").touch()
    for name in (
        "1.png",
        "../3.png",
        str(tmp_path.parent / "3.png"),
        "",
        None,
        "a" * 5000,
        "\0",
        "\ud800",
    ):
        with bad_input(match="^here: .* leads to (0|2) files below"):
            data.find_file(name, [tmp_path], "here")


def test_masks_equal_pycocotools():
    for density in (0, 0.02, 0.5, 1):
        mask = np.random.default_rng(0).random((64, 50)) < density
        text = coco_mask.encode(np.asfortranarray(mask, np.uint8))["counts"].decode()
        for counts in (text, data.rle_counts(text.encode())):
            runs = data.outline_runs({"size": [64, 50], "counts": counts}, 64, 50)
            assert np.array_equal(np.repeat(np.arange(len(runs)) % 2, runs), mask.T.ravel())


BAD_OUTLINES = """null [] [[]] [[8,8,20,20]] 5 "x" [["a","a","a","a","a","a"]] [[1e9,1,1,1,1,9]] {}
[[NaN,1,1,1,1,9]] {"size":[48,64]} {"size":[48,64],"counts":"~~~"} {"counts":[3072]}
{"size":[64,48],"counts":[3072]} {"size":[48,64],"counts":[3071]} {"size":[48,64],"counts":"\u20ac"}
{"size":[48,64],"counts":[-1,3073]} {"size":[48,64],"counts":"oooooooooo"}
{"size":5,"counts":[3072]}"""


@pytest.mark.parametrize("outline", BAD_OUTLINES.split())
def test_an_object_without_a_usable_outline_is_left_out_and_named(tmp_path, capsys, outline):
    bad = '"annotations": [{"id": 9, "image_id": 1, "segmentation": %s}, ' % outline
    write_coco(tmp_path, "instances", '"annotations": [', bad)
    code, out, lines = shell(capsys, f"data --check --split val --data {tmp_path}")
    assert code == 1 and "1.png: object 9 has no usable outline" in out
    assert (
        np.array_equal(data.open_data(tmp_path, "val")[0]["ids"] == 2, square(1))
        and len(lines) == 1
    )


def test_a_thousand_objects_are_painted_from_large_to_small_in_little_memory(tmp_path):
    boxes, objects = np.random.default_rng(0).integers(32, 400, (1000, 4)).tolist(), []
    for x, y, w, h in boxes:
        outline = [[x, y, x + w, y, x + w, y + h, x, y + h], *json.loads(SQUARE)]
        objects.append({"segmentation": outline, "iscrowd": w % 5 == 0, "category_id": x})
    write_coco(tmp_path, "instances")
    folder, truth = data.open_data(tmp_path, "val"), np.zeros((800, 900), int)
    tracemalloc.start()
    ids, segments, _ = folder.paint(objects, 900, 800)
    assert tracemalloc.get_traced_memory()[1] < 50e6  # a mask of each: 720e6
    tracemalloc.stop()
    for x, y, w, h in sorted(boxes, key=lambda b: (b[2] % 5 > 0, -b[2] * b[3])):
        truth[y : y + h, x : x + w] = truth[8:32, 8:32] = x
    category = {s["id"]: s["category_id"] for s in segments} | {1: 0}  # the background
    assert np.array_equal(np.vectorize(category.get)(ids), truth)


def test_pictures_without_objects_count_and_crowds_alone_are_said(tmp_path, capsys):
    write_coco(tmp_path, "instances", '"image_id": 2', '"image_id": 1', count=2)
    assert (data.open_data(tmp_path, "val")[1]["ids"] == 1).all()
    for new in ('"iscrowd": "1", "image_id"', '"image_id": 7, "x"'):  # or of another picture
        write_coco(tmp_path, "instances", '"image_id"', new)
        code, _, lines = shell(capsys, f"data --check --split val --data {tmp_path}")
        assert code == 2 and "no image has an object that is not a crowd" in lines[0]
    path = write_coco(tmp_path, "panoptic", '"category_id"', '"iscrowd": true, "category_id"')
    code, _, lines = shell(capsys, f"data --data {tmp_path} --split val")
    assert code == 2 and "no image has an object that is not a crowd" in lines[-1]
    out = shell(capsys, f"pq --gt {path} --pred {path} --json {tmp_path}/r.json")[1]
    assert "All - - - 0 Things - - - 0 Stuff - - - 0" in " ".join(out.split())
    assert '"pq": null' in open(f"{tmp_path}/r.json").read()


@pytest.mark.parametrize("case", 'null 1,"False" 0,0 0,"0" 0,false 0,true 1,"True" 1'.split(","))
def test_a_category_is_a_thing_unless_it_says_no(tmp_path, case):
    value, things = case.split()
    path = write_coco(tmp_path, "panoptic", '"isthing": 1', f'"isthing": {value}')
    assert data.open_data(tmp_path, "val").categories[0]["isthing"] == int(things)
    assert pq.evaluate(path, path)["Things"]["n"] == int(things)


def test_broken_pictures_are_named_once_and_the_next_takes_their_place(tmp_path, capsys):
    folder = write_coco(tmp_path, count=8).parent / "panoptic_val"
    os.truncate(f"{tmp_path}/val/1.png", 500)
    os.remove(f"{tmp_path}/val/2.png")
    data.write(f"{tmp_path}/val/3.png", Image.new("RGB", (32, 24)))
    os.remove(f"{folder}/4.png")
    for name, ids in ((5, square(7, 300)), (6, square(300)[:9]), (7, square(0, 300))):
        data.write_id_png(f"{folder}/{name}.png", ids)
    dataset = data.Training(data.open_data(tmp_path, "val"), 16, 8)
    assert all(dataset[n]["ids"].any() for n in range(24))
    assert capsys.readouterr().err.count("the next one takes its place") == 6
    code, out, _ = shell(capsys, f"data --check --split val --data {tmp_path}")
    words = """1.png: not a readable picture|'2.png'|'4.png'|5.png holds id 7,|
        3.png: is (32, 24) pixels, its annotation says (64, 48)|says (64, 9)|
        7.png: segment 70000 has no pixel|8 images, 7 faults"""
    assert code == 1 and all(word.strip() in out for word in words.split("|"))
    shutil.rmtree(f"{tmp_path}/val")
    with pytest.raises(data.BadInput, match="nor can any other of the 8 images"):
        data.Training(data.open_data(tmp_path, "val"), 16, 8)[0]


# ---------------------------------------------------------------------------------------- pq.py


def brute_force(gt, truth, pred, found, every_crowd):
    """By category: sum of IoU, TP, FP, FN of an image, with a mask of each segment."""
    state, hits = np.zeros((3, 4)), []
    for p in found:
        inside, crowds = pred == p["id"], [0]
        for t in truth:
            if t["category_id"] == p["category_id"]:
                mask = gt == t["id"]
                iou = (mask & inside).sum() / ((mask | inside) & ~(inside & (gt == 0))).sum()
                if t["iscrowd"]:
                    crowds = [0, *crowds * every_crowd, t["id"]]  # the panoptic API: the last one
                elif iou > 0.5:
                    state[t["category_id"]] += iou, 1, 0, 0
                    hits += [t["id"], p["id"]]
        ignored = np.isin(gt[inside], crowds).mean() > 0.5
        state[p["category_id"], 2] += p["id"] not in hits and not ignored
    for t in truth:
        state[t["category_id"], 3] += not t["iscrowd"] and t["id"] not in hits
    return state


@pytest.mark.parametrize("kinds", [1, 3])
def test_pq_equals_brute_force(kinds):
    rng, expected = np.random.default_rng(0), np.zeros((3, 4))
    quality = pq.PanopticQuality([{"id": k} for k in range(kinds)] if kinds > 1 else None)
    for _ in range(60):
        gt = rng.integers(0, 6, (4, 4)).repeat(5, 0).repeat(5, 1) * 1001
        pred = np.roll(gt, rng.integers(0, 4, 2), (0, 1)) + 3
        pred[rng.random(pred.shape) < 0.1] = 0
        truth, found = data.describe(gt), data.describe(pred)
        for s in truth + found:
            s |= {"category_id": s["id"] % 17 % kinds, "iscrowd": rng.random() < 0.3}
        quality.update(gt, truth, pred, found)
        expected += brute_force(gt, truth, pred, found, kinds == 1)
    assert np.allclose(quality.state, expected[:kinds]) and quality.state.min() > 3


def test_the_pq_command_equals_the_panoptic_api(tmp_path, capsys):
    root = reference("pq")
    shell(capsys, f"pq --gt {root}/gt.json --pred {root}/pred.json --json {tmp_path}/r.json")
    found, expected = (json.load(open(f"{p}.json")) for p in (tmp_path / "r", root / "expected"))
    each, true = found.pop("per_class"), expected.pop("per_class")
    for name, figures in {**expected, **true}.items():
        assert {**found, **each}[name] == pytest.approx(figures, abs=1e-12)


def test_images_are_paired_by_id_as_text(tmp_path, capsys):
    gt = write_coco(tmp_path / "gt", count=40)
    pred = write_coco(tmp_path / "pred", "panoptic", '"image_id": 9', '"image_id": "9"', count=39)
    data.write_id_png(f"{pred.parent}/panoptic_val/1.png", square(300, 70_000))
    palette = f"{pred.parent}/panoptic_val/2.png"
    Image.open(palette).quantize(4).save(palette)
    assert pq.evaluate(gt, pred)["All"]["pq"] == 38 / 39.5
    assert "40 images in the truth, 39 in the prediction, 39 in both" in capsys.readouterr().err


def test_crowds_are_ignored_in_any_order():
    gt = np.repeat([1, 2, 3], 20)[None].repeat(40, 0)
    pred, truth = np.where(np.arange(40)[:, None] < 4, 0, gt), data.describe(gt)
    for order in (truth, truth[::-1]):
        quality = pq.PanopticQuality()
        quality.update(gt, [{**s, "iscrowd": s["id"] < 3} for s in order], pred, truth)
        assert quality.result()["All"]["pq"] == pytest.approx(0.9)


@pytest.mark.parametrize("count", [10_000, 20_000])
def test_many_segments_need_little_memory(count):
    ids = (np.arange(count) + 1).reshape(100, -1).repeat(3, 0).repeat(3, 1)
    quality, segments = pq.PanopticQuality(), data.describe(ids)
    tracemalloc.start()
    quality.update(ids, segments, np.where(np.eye(*ids.shape), 0, ids), segments)
    assert tracemalloc.get_traced_memory()[1] < 100e6
    tracemalloc.stop()
    assert np.allclose(quality.state, [count - 100 / 3, count, 0, 0])


def test_instances_are_scored_alone():
    truth, found = np.ones((10, 10), np.int32), np.full((10, 10), 7)
    truth[:4, :4], truth[6:, 6:] = 2, 3
    found[:4, :3], found[8:, 8:], found[0, 9] = 4, 5, 6  # IoU 0.75; IoU 0.25; on the background
    scene, score = {
        "ids": truth,
        "segments_info": data.describe(truth),
        "file_name": "x",
    }, pq.Score()
    scene["segments_info"][0]["category_id"] = scene["background_id"] = 9
    score.update(scene, found)
    expected = {"pq": 75 / 2.5, "sq": 75, "rq": 100 / 2.5, "ap50": 25}
    assert score.result() == pytest.approx(expected)
    score.alone.state[0] = 0  # as if no instance were there, and none found
    assert score.result()["ap50"] is None


# --------------------------------------------------------------------------- what all scripts share

WRONG = """data --seed -1 | | | --seed
data --seed x | | | --seed
data --no_such 1 | | | --no_such
DATA --split absent | | | instances_absent.json
data --data nowhere | | | nowhere | --model small --data shapes
data --check --data nowhere | | | nowhere
data --data shapes --json . | | | can't be written
data --data shapes --out /dev/null/x | | | /dev/null
pq --gt x | | | --pred
pq --gt x --pred x | | | x: no such COCO JSON
DATA | {"images" | [{"images" | panoptic_val.json: not a readable COCO JSON
DATA | "categories": [ | "categories": [7, | panoptic_val.json: not a readable COCO JSON
DATA | cat | \udcff | panoptic_val.json
DATA | {"images": | NESTED | panoptic_val.json
DATA | {"id": 2, | {"x": 2, | panoptic_val.json: not a readable COCO JSON
PQ | "annotations": [ | "annotations": [7, | panoptic_val.json: not a readable COCO JSON
PQ | "segments_info": [ | "segments_info": [5, | image 1: not a readable list of segments
PQ | "segments_info" | "x" | image 1: not a readable list of segments
PQ | 300 | -300 | image 1 | holds id 300, which the JSON does not list
PQ | 300 | "300" | image 1: not a readable list of segments
PQ | 300 | 0 | image 1: not a readable list of segments
PQ | 300 | 70000 | image 1: not a readable list of segments of different ids
PQ | "category_id": 2 | "category_id": [] | image 1: not a readable list of segments
PQ | "category_id": 2 | "category_id": 99 | image 1: the truth does not list category 99
PQ | "image_id": 1 | "image_id": "x_1" | image_id is 1 in | x_1 in
PQ | "1.png", "segments_info" | "9.png", "segments_info" | image 1 | 9.png"""


@pytest.mark.parametrize("case", WRONG.splitlines())
def test_what_is_wrong_is_said_in_one_line(tmp_path, capsys, monkeypatch, case):
    """Each: command | a text of the JSON | what stands there instead | words of the error | ..."""
    command, old, new, *words = (part.strip() for part in case.split("|"))
    monkeypatch.chdir(tmp_path)
    gt, pred = write_coco("gt"), write_coco(
        "pred", "panoptic", old, new.replace("NESTED", "[" * 99_999)
    )
    command = command.replace("DATA", "data --data pred --split val")
    shell_refuses(capsys, command.replace("PQ", f"pq --gt {gt} --pred {pred}"), *words)


class Bomb:
    """Pickles as a call."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "function, argument", [(os.mkdir, "ran"), (os.system, "mkdir ran"), (exec, "open('ran', 'w')")]
)
def test_reading_a_checkpoint_executes_nothing(tmp_path, monkeypatch, function, argument):
    monkeypatch.chdir(tmp_path)
    bomb = Bomb(function, (argument,))
    for content in ({"kind": "ae", "x": bomb}, [bomb], {"vae": 1, "x": bomb}):
        torch.save(content, "x.pt")
        with contextlib.suppress(data.BadInput):  # the settings are left out
            assert data.load("x.pt", ["ae", "release_ae"]).get("vae", 1) == 1
    assert os.listdir() == ["x.pt"]


def test_a_checkpoint_is_whole_and_of_the_kind_that_is_asked_for(tmp_path):
    path = f"{tmp_path}/x.pt"
    data.write(path, {"kind": "ae"})
    for size, word in (
        (None, "must be of kind ldm, is .ae"),
        (300, "not a readable checkpoint"),
    ):
        os.truncate(path, size or os.path.getsize(path))
        with pytest.raises(data.BadInput, match=f"x.pt: {word}"):
            data.load(path, ["ldm"])


@pytest.mark.parametrize("error", [OSError(28, "No space left"), RuntimeError("write failed")])
def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch, error):
    path = tmp_path / "x"
    path.write_text("old")
    monkeypatch.setattr(os, "replace", mock.Mock(side_effect=error))
    with pytest.raises(data.BadInput, match="x: can't be written .* unharmed"):
        data.write(path, {})
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["x"]


# ------------------------------------------------------------------------------ stage 1: the model


@pytest.mark.parametrize("encoding", ae.ENCODINGS)
def test_encodings_tell_ids_apart(encoding):
    for num_ids in (4, 16, 128):
        x = ae.encode_ids(torch.arange(num_ids).view(1, 1, -1), num_ids, encoding)[0, :, 0]
        assert len(x.T.unique(dim=0)) == num_ids and not x[:, 0].any()


def test_autoencoder_has_the_papers_size():
    assert sum(p.numel() for p in ae.Autoencoder().parameters()) == 2_023_208


def test_the_authors_autoencoder_gives_the_authors_numbers():
    ref = numbers("ae_parity.npz")
    model = ae.load_autoencoder(reference("ae_official_format.pt"))
    with torch.no_grad():
        mean, logvar = model.encode(ref.ids)
        logits = model.decode(mean)
    near((mean, logvar), (ref.latent_mean, ref.latent_logvar))
    near(logits[:, :8], ref.logits_quarter_top)
    found = np.stack([ae.argmax(l, *ref.ids.shape[1:])[0] for l in logits])
    assert (found == ref.argmax_full.numpy()).mean() > 0.999  # all but ties


# ----------------------------------------------------------------------------- stage 1: its losses


def test_points_are_the_most_uncertain():
    """Between a cell of logit +1 and one of -1 lies the boundary, at 0."""
    logits, ids = torch.zeros(1, 2, 8, 8), torch.ones(1, 8, 8, dtype=torch.long)
    logits[:, 1, :, :4], logits[:, 1, :, 4:] = 1, -1
    for points in ae.draw_points(logits, ids, 400):
        at_it = (points[0, :, 0] - 0.5).abs() < 1 / 16
        assert at_it[:300].sum() > 100 and at_it[300:].sum() < 30  # of 150 drawn; of 100 uniform


def test_losses_at_all_pixel_centres_equal_the_dense_losses():
    ids, logits = torch.randint(0, 5, (2, 8, 8), dtype=torch.uint8), torch.randn(2, 8, 8, 8)
    places = torch.arange(8).add(0.5).div(8)
    centres = torch.cartesian_prod(places, places).flip(1).expand(8, 64, 2)
    ce, mask, counts = ae.segmentation_losses(logits, ids, centres[:2], centres)
    assert counts.tolist() == [(ids > 0).sum(), 8]
    close(ce, F.cross_entropy(logits, ids.long(), ignore_index=0, reduction="sum"))
    total = 0
    for b, i in np.ndindex(2, 4):
        m, p = (ids[b] == i + 1).float(), logits[b, i + 1].sigmoid()
        total += F.binary_cross_entropy(p, m) + 1 - (2 * (p * m).sum() + 1) / ((p + m).sum() + 1)
    close(mask, total)


def test_losses_equal_the_reference():
    ref = numbers("loss_parity.npz")
    torch.manual_seed(0)

    def losses(*points):
        ce, mask, counts = ae.segmentation_losses(ref.logits, ref.targets, *points)
        return torch.stack([ce, mask]) / counts

    close(losses(ref.ce_points, ref.mask_points), torch.stack([ref.ce, ref.mask_bce_plus_dice]))
    draws = [losses(*ae.draw_points(ref.logits, ref.targets, 256)) for _ in range(40)]
    theirs = torch.stack([ref.ce_importance_mean_std, ref.mask_importance_mean_std])
    assert ((torch.stack(draws).mean(0) - theirs[:, 0]).abs() < 0.8 * theirs[:, 1]).all()


def test_kl_equals_torchs():
    mean, logvar = torch.randn(2, 2, 4, 3, 3)
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mean, (logvar / 2).exp()), normal(0, 1))
    close(ae.kl_loss(mean, logvar), expected.sum() / 2)


# -------------------------------------------------------------------- from logits to a segmentation


def test_argmax_equals_softmax_of_the_whole():
    logits = 3 * torch.randn(37, 9, 7)  # 16 ids at a time
    big = F.interpolate(logits[None], (30, 41), mode="bilinear", align_corners=False)
    certainty, best = big[0].softmax(0).max(0)
    ids, sure = ae.argmax(logits, 30, 41)
    close(torch.from_numpy(sure), certainty)
    assert (ids == best.numpy()).mean() > 0.999


def test_uncertain_pixels_and_small_segments_become_void():
    ids, certainty = row("111122233"), np.ones(9)
    certainty[0] = 0.4
    assert np.array_equal(ae.keep(ids, certainty, 3), row("011122200"))
    assert np.array_equal(ae.keep(ids, certainty, 4, 0.3), row("111100000"))
    for side, least in ((512, 512), (640, 512), (64, 8)):  # the default
        ids = np.ones((side, side), np.int32)
        ids.flat[: least - 1] = 2
        assert set(ae.keep(ids, ids).flat) == {0, 1}
        ids.flat[:least] = 2
        assert set(ae.keep(ids, ids).flat) == {1, 2}


def test_parts_that_do_not_touch_become_segments():
    ids = np.array([[1, 1, 2, 1], [0, 1, 2, 2], [3, 0, 1, 2], [3, 3, 1, 0]])
    pieces = np.array([[1, 1, 2, 3], [0, 1, 2, 2], [4, 0, 5, 2], [4, 4, 5, 0]])
    assert same_partition(
        ae.connected(np.pad(ids, 2, constant_values=9)), np.pad(pieces, 2, constant_values=9)
    )
    assert same_partition(ae.connected(ids), ids)  # the largest stays whole


# ------------------------------------------------------------------------------ stage 2: diffusion


def test_ddim_equals_the_reference():
    ref, ddim = numbers("ddim_parity.npz"), diffusion.DDIM()
    close(ddim.alphas_cumprod, ref.alphas_cumprod)
    close(ddim.loss_weights("snr"), ref.loss_weight_max_clamp_snr_2)
    assert [j for j, _ in ddim.timesteps(50)] == ref.timesteps_50.tolist()
    noisy = ref.add_noise_x0, ref.add_noise_eps, ref.add_noise_t
    close(ddim.add_noise(*noisy), ref.add_noise_out)
    close(ddim.remove_noise(*noisy), ref.remove_noise_out)
    z, steps = ref.ddim_x_T, ref.timesteps_10.tolist() + [-1]
    for i, eps in enumerate(ref.ddim_eps):
        z0 = ddim.remove_noise(z, eps, steps[i])
        z = ddim.step(z, z0, steps[i], steps[i + 1])
        close(z0, ref.ddim_pred_x0[i])
        close(z, ref.ddim_prev_sample[i])


def test_schedules_in_numbers():
    linear = diffusion.DDIM().loss_weights("linear")
    near(linear[[0, 124, 999]], torch.tensor([0.004, 0.5, 1]))
    assert diffusion.DDIM(release=True).timesteps(30)[:1] == [(989, 956)]
    with bad_input(match="--steps"):
        diffusion.DDIM().timesteps(1001)


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_ddim_equals_diffusers(prediction):
    from diffusers import DDIMScheduler

    theirs = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        timestep_spacing="trailing",
        prediction_type=prediction.replace("v", "v_prediction"),
    )
    theirs.set_timesteps(25)
    ours = diffusion.DDIM(prediction)
    assert [j for j, _ in ours.timesteps(25)] == theirs.timesteps.tolist()
    a = b = torch.randn(2, 4, 8, 8)
    for j, j_prev in ours.timesteps(25):
        output = torch.randn_like(a)
        a = ours.step(a, ours.remove_noise(a, output, j), j, j_prev)
        b = theirs.step(output, j, b).prev_sample
        close(a, b, atol=1e-4 * float(b.abs().max()))


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_a_perfect_network_denoises_to_the_latent(tiny, prediction):
    tiny.ddim.prediction = prediction
    z, *noise = torch.randn(3, 2, 4, 8, 8)

    def perfect(zj, image_latent, self_cond, j):
        assert j == 999 or torch.allclose(self_cond, z, atol=1e-2)  # the last estimate
        a, b = tiny.ddim.scales(j, zj)
        return tiny.ddim.target(z, (zj - a * z) / b, j)

    tiny.denoise = perfect
    for steps in (3, 1):
        close(tiny.sample(z, noise[0], steps), z, atol=1e-2)
        close(inpaint.inpaint(tiny, z, z, z.sign().relu(), noise, steps), z, atol=1e-2)


def test_grown_conv_in_starts_as_the_pretrained_unet():
    from diffusers import UNet2DConditionModel

    config = diffusion.small_unet_config(4, 8, 16)
    pretrained = UNet2DConditionModel(**config).eval()
    grown = diffusion.grow_conv_in(pretrained, 12).eval()
    assert not any(".attn2." in name for name in grown.state_dict())
    for name, p in pretrained.named_parameters():  # another way to pass by cross-attention
        if ".attn2.to_out." in name:
            torch.nn.init.zeros_(p)
    x = torch.randn(1, 12, 8, 8)
    with torch.no_grad():
        theirs = pretrained(x[:, :4], 500, encoder_hidden_states=torch.zeros(1, 1, 8)).sample
        close(grown(x, 500, encoder_hidden_states=None).sample, theirs, atol=1e-4)


def spy(model):
    """The arguments of all calls of a model's network from now on."""
    seen, denoise = [], model.denoise
    model.denoise = lambda *args: seen.append(args) or denoise(*args)
    return seen


def test_loss_is_that_of_algorithm_1(tiny):
    """Void cells are left out, timesteps weighted, half of the samples self-conditioned."""
    ids = torch.randint(1, 8, (2, 32, 32))
    ids[:, :8] = ids[:, 9:12, 1:4] = 0  # a cell is void where its top left pixel is
    batch = dict(ids=ids, given=0 * ids, image=torch.zeros(2, 3, 32, 32))
    eps, j, seen = torch.randn(2, 4, 8, 8), torch.tensor([100, 700]), spy(tiny)
    with torch.no_grad():
        loss = tiny(batch, eps, j, tiny.ddim.loss_weights("linear"), j > 500)
        z, (zj, image_latent, self_cond, _) = tiny.encode(ids), seen[-1]
        close(zj, tiny.ddim.add_noise(z, eps, j))
        first = tiny.denoise(zj, image_latent, 0 * z, j)
        close(self_cond, tiny.ddim.remove_noise(zj, first, j) * (j > 500).view(2, 1, 1, 1))
        error = (tiny.denoise(zj, image_latent, self_cond, j) - tiny.ddim.target(z, eps, j)) ** 2
    error[:, :, :2] = 0
    close(loss, (error.mean((1, 2, 3)) * torch.tensor([0.404, 1])).mean())


# ---------------------------------------------------------------------- the authors' checkpoints


@pytest.mark.parametrize("name", ["selfcond", "plain8"])
def test_the_authors_diffusion_checkpoints_give_the_authors_numbers(name):
    path, ref = reference(f"ldm_official_{name}.pt"), numbers(f"ldm_{name}_parity.npz")
    model, content = sample.load(path), data.load(path, ["release_ldm"])
    arrived = {v.numpy().tobytes() for v in model.state_dict().values()}
    for part in ("vae_image", "vae_semseg", "unet"):
        for key, v in content[part].items():
            assert v.numpy().tobytes() in arrived or key.startswith("post_quant_conv.")
    photos, trace = [f"../data/coco16/val2017/0000000{n}.jpg" for n in (12280, 14226)], []
    images = [data.read_image(reference(photo)) for photo in photos]
    with torch.no_grad():
        latent, _ = model.inputs([{"image": images[0], "image_id": 0}], 0)
        close(latent, ref.image_latent[:1], atol=0.05)  # JPEG decoders differ
        model.sample(ref.image_latent[:1], ref.noise[:1], 10, trace=trace)
        logits = model.decode(trace[-1])[:, :4, ::4, ::4]
    theirs = ref.z0_first[:1], ref.z0_last[:1], ref.logits_quarter_top[:1]
    near((trace[0], trace[-1], logits), theirs)
    # ids_0, ids_1: 0 = void, else channel + 1; channel 0 is void
    field = F.interpolate(ref.field, (256, 256), mode="bilinear", align_corners=False)
    for logits, image, theirs in zip(field, images, (ref.ids_0, ref.ids_1)):
        found = diffusion.segments(model, logits, *theirs.shape)
        found = ae.keep(*found)
        assert np.array_equal(found, (theirs - 1).clamp(min=0))


def test_the_authors_settings_are_honoured_or_refused_by_name(monkeypatch):
    path = reference("ldm_official_plain8.pt")
    content = data.load(path, ["release_ldm"])

    def told(**settings):
        changed = {**content, "p": {"model_kwargs": settings}}
        monkeypatch.setattr(data, "load", lambda *_: changed)
        return diffusion.load_ldm(path)

    more = dict(size=64, scaling_factor=0.5, image_scaling_factor=0.25, beta_start=0.001)
    model = told(**more)
    found = model.settings["size"], model.scale, model.image_encoder.scale
    assert found == (64, 0.5, 0.25) and model.ddim.alphas_cumprod[0] == pytest.approx(0.999)
    for key in diffusion.RELEASE:
        with bad_input(match=key):
            told(**{key: "unheard of"})
    content["unet"]["down_blocks.0.attn2.to_q"] = torch.zeros(1)
    with bad_input(match="fit its settings"):  # it kept its cross-attention
        told()


@pytest.mark.parametrize("authors", [False, True])
def test_every_script_takes_shipped_weights_and_the_authors(tmp_path, photo, authors):
    ckpt = reference("ldm_official_selfcond.pt") if authors else SHAPES
    base = ["--ckpt", ckpt, "--out", tmp_path, "--json", tmp_path / "r.json"]
    run(sample.main, "--steps 1", *base, "--images", photo)
    assert data.read_id_png(tmp_path / "predictions" / "photo.png").shape == (40, 60)
    run(inpaint.main, "--steps 1", *base, "--image", photo, "--mask", tmp_path / "part.png")
    done, given = (data.read_id_png(tmp_path / n) for n in ("photo_completed.png", "part.png"))
    assert np.array_equal(done[given > 0], given[given > 0]) and read(base[-1])["given"] == 1
    run(diffusion.main, "--data shapes --size 64 --iters 1 --batch_size 2 --eval_images 2", *base)
    again = sample.load(tmp_path / "ldm.pt").settings["postprocess"]
    assert again == ("release" if authors else "paper")


def test_a_checkpoint_executes_nothing(tmp_path):
    path, weights = tmp_path / "x.pt", ae.Autoencoder(8).state_dict()
    for function, argument in ((os.mkdir, str(tmp_path / "ran")), (eval, "[].no_such")):
        bomb = type("Bomb", (), {"__reduce__": lambda self: (function, (argument,))})()
        for layout in ({"kind": "ae"}, {"vae": weights}):
            torch.save({**layout, "p": bomb}, path)
            with contextlib.suppress(data.BadInput):
                ae.load_autoencoder(path)
    assert not (tmp_path / "ran").exists()


# ---------------------------------------------------------------------- classes, ids, tiles, votes


CLASSES = [{"id": 10, "isthing": 1}, {"id": 20, "isthing": 0}]


def test_a_label_is_what_most_pixels_have_and_stuff_is_one_segment(tiny):
    ids, second = row("0777388855"), torch.from_numpy(row("1001100111")).float()  # likelier there
    logits, image = torch.stack([1 - second, second])[None], np.zeros((1, 10, 3), np.uint8)
    tiny.classifier = Namespace(categories=CLASSES, logits=lambda images: logits)
    _, found = tiny.label(image, ids, merge=False)
    found = {s["id"]: (s["category_id"], s["score"]) for s in found}
    assert found == {3: (20, 1), 5: (20, 1), 7: (10, 0.6667), 8: (10, 0.6667)}
    assert np.array_equal(tiny.label(image, ids)[0], row("0777388833"))


def test_the_loss_of_the_classifier_is_that_of_cells_with_a_category():
    classifier, ids = diffusion.Classifier(CLASSES, "small"), torch.randint(0, 5, (2, 32, 32))
    classes = torch.tensor([[-1, 0, 1, 1, -1], [-1, 1, 1, 0, 0]])
    batch = {"ids": ids, "classes": classes, "image": torch.rand(2, 3, 32, 32) * 255}
    logits = classifier.eval().logits(batch["image"])
    cells = [(b, y, x) for b, y, x in np.ndindex(2, 8, 8) if classes[b, ids[b, 4 * y, 4 * x]] >= 0]
    chances = logits.softmax(1)
    own = [chances[b, classes[b, ids[b, 4 * y, 4 * x]], y, x] for b, y, x in cells]
    close(classifier(batch), -torch.stack(own).log().mean())


def test_rename_is_one_to_one_by_overlap():
    # 1 takes 7 before 2, which takes 3; what was 3 meets nothing, and its own id is taken
    found = diffusion.rename(row("11112223350"), row("77737730059"))
    assert np.array_equal(found, row("77773331150"))


def test_the_noise_chooses_the_ids_of_a_map(tiny):
    ids = torch.from_numpy(np.stack([s["ids"] for s in scenes(2)])).byte() + 252  # N = 256
    tiny.likeliest = lambda z0: ids % 7 + 1  # a sample that shows the truth in other ids
    noise, x = torch.randn(2, 4, 8, 8), torch.zeros(2, 48, 8, 8)
    exact(diffusion.noise_chooses(tiny, ids, x, noise, 1), (ids % 7 + 1).long())


@pytest.mark.parametrize("shape", [(100, 70), (64, 64), (10, 12)])
def test_tiles_of_the_truth_are_stitched_to_the_truth(shape):
    big, rng = Image.fromarray(scenes(1, 64)[0]["ids"]), np.random.default_rng(0)
    truth = np.asarray(big.resize(shape[::-1], Image.NEAREST))
    tiles = sample.cut(truth, 32)  # each with ids of its own
    tiles = {place: (rng.permutation(40)[part] + 1, part / 9) for place, part in tiles.items()}
    ids, certainty = sample.stitch(tiles, shape)
    assert same_partition(ids, truth) and np.allclose(certainty, truth / 9)


def test_pieces_of_a_background_are_one_but_a_void_tile_takes_none():
    sure, ids = np.ones((8, 8)), np.ones((8, 8), np.int32)
    ids[2:5, 2:5] = 2
    tiles = {(0, 0): (ids, sure), (0, 6): (0 * ids, sure), (6, 0): (ids, sure)}
    found, _ = sample.stitch(tiles, (14, 14))
    assert found[0, 0] == found[13, 0] > 0 and not found[:6, 8:].any()
    assert len({found[0, 0], found[3, 3], found[9, 3]}) == 3


def test_votes_join_samples_by_majority():
    truth, void = row("1111112233444"), row("1111112233000")
    merged, lost, moved = row("1111112222333"), row("1111112233111"), row("7777755522333")
    ids, certainty = sample.consensus([(merged, truth), (lost, 2 * truth), (moved, 4 * truth)])
    assert same_partition(ids, truth)
    assert np.allclose((certainty / truth)[0, [0, 5, 8, 10]], [7 / 3, 1.5, 3, 2.5])
    assert sample.consensus([(truth, truth), (void, truth)])[0].all()  # void loses a tie


def test_agreement_by_hand():
    a, b = row("1122"), row("5550")
    shared = np.array([2 / 3, 2 / 3, 1 / 4, 0])  # void agrees with nothing
    assert np.allclose(sample.agreement([a, a, b]), (1 + 2 * shared) / 3)


def test_an_image_gets_the_same_mask_in_any_batch(tiny):
    pair, args = scenes(2), Namespace(steps=2, seed=0)
    _, (_, together) = diffusion.predict(tiny, pair, args)
    renamed = pair[1] | {"image_id": "other"}
    [(_, alone)], [(_, other)] = (diffusion.predict(tiny, [s], args) for s in (pair[1], renamed))
    assert np.allclose(together, alone, atol=1e-4) and not np.allclose(alone, other, atol=1e-4)


# --------------------------------------------------------------------------------------- completion


def test_algorithm_3_holds_the_given_cells(tiny):
    known, *noise = torch.randn(3, 1, 4, 8, 8)
    M, seen = (torch.rand(1, 1, 8, 8) > 0.5).float(), spy(tiny)
    z0 = inpaint.inpaint(tiny, torch.zeros(1, 48, 8, 8), known, M, noise, 3)
    for zj, _, self_cond, j in seen:
        close(M * zj, M * tiny.ddim.add_noise(known, noise[1], j))
    close((M * z0, M * self_cond), (M * known, M * known))
    assert not torch.allclose(z0, known)


@pytest.mark.parametrize("paper", [False, True])
def test_completion_in_tiles_keeps_given_ids_and_pixels(shipped, paper):
    image, given = scenes(1, 60)[0]["image"][:50], np.zeros((50, 60), np.int32)
    given[:9, :20], given[30:, 40:] = 3, data.MAX_ID
    given[::5, ::7] = 1000 + np.arange(90).reshape(10, 9)  # more ids than the model's N
    args, shipped.settings["crop"] = Namespace(**ARGS, paper=paper), 24
    [done] = inpaint.complete_batch(shipped, [{"image": image, "image_id": 0}], [given], args)
    assert np.array_equal(done[given > 0], given[given > 0])
    assert 0 <= done.min() <= done.max() == data.MAX_ID


def test_found_segments_get_the_given_id_that_they_cover_most_or_an_unused_one():
    found, given = row("1111222333305"), row("0055050880500")
    done = inpaint.renamed((found, np.ones((1, 13))), given, 0)
    assert np.array_equal(done, row("5555555888506")) and done.dtype == np.int32
    found, given = row("1" * 30 + "2" * 30), row("0" * 29 + "7" * 29 + "00")  # one pixel strays
    done = inpaint.renamed((found, np.ones((1, 60))), given, 0)
    assert np.array_equal(done, row("1" * 29 + "7" * 31))


def test_a_stroke_gives_an_object_its_id(shipped):
    rows, right = np.arange(64)[:, None], []
    for scene in scenes(16, 64):
        ids, y = scene["ids"], 0 * scene["ids"]
        for i in range(2, ids.max() + 1):  # 3 px wide, across each object
            middle = np.median(np.nonzero(ids == i)[0])
            y[(ids == i) & (abs(rows - middle) < 2)] = 1000 * i
        args = Namespace(**ARGS, paper=False)
        [done] = inpaint.complete_batch(shipped, [scene], [y], args)
        assert np.array_equal(done[y > 0], y[y > 0])
        right += [(done == 1000 * i)[ids == i].mean() > 0.5 for i in range(2, ids.max() + 1)]
    assert np.mean(right) > 0.8


# ---------------------------------------------------------------------------------- the trainings

# children that have imported everything
multiprocessing.get_context("forkserver").set_forkserver_preload(["inpaint"])


def child(rank, setup, script, argv, world, port):
    """A script's main as one of the processes of torchrun."""
    os.environ |= dict(RANK=str(rank), WORLD_SIZE=str(world), MASTER_PORT=str(port))
    data.RANK, data.WORLD = rank, world  # read on import
    setup()
    SCRIPTS[script].main(argv)


def launch(setup, script, argv, world=1):
    """A script's main in processes of their own."""
    os.environ["MASTER_ADDR"] = "localhost"
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    args = setup, script, [str(a) for a in argv], world, port
    torch.multiprocessing.start_processes(child, args, world, start_method="forkserver")


def killed_while_it_saves():
    """SIGKILL at the fourth file that takes its place: the second state."""
    replace, calls = os.replace, []

    def count(*paths):
        calls.append(paths)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*paths)

    os.replace = count


def same_draws():
    """What is drawn for one sample is drawn for all, so that two processes draw like one."""
    normal = torch.randn

    def first(*size, generator=None, device=None):
        if generator:
            return normal(*size, generator=generator)
        one = normal(size[1:], generator=torch.Generator().manual_seed(5))
        return one.expand(size).clone()

    torch.randn, torch.randn_like = first, lambda x: first(*x.shape)
    torch.rand = lambda *size, device=None: first(*size).sigmoid()
    torch.randint = lambda low, high, size, device=None: torch.full(size, 400)


STAGES = [("ae", "ae", TINY_AE), ("diffusion", "ldm", TINY)]


@pytest.mark.parametrize("script, stage, flags", STAGES)
def test_a_killed_run_resumes_to_the_same_bits(tmp_path, trained, script, stage, flags):
    shutil.copy(trained / "ae.pt", tmp_path)
    argv, name = [*flags.split(), "--out", tmp_path], f"{stage}_state.pt"
    with pytest.raises(Exception, match="SIGKILL"):
        launch(killed_while_it_saves, script, argv)
    run(SCRIPTS[script].main, "--resume", "--out", tmp_path)
    a, b = (torch.load(folder / name) for folder in (trained, tmp_path))
    exact(a["model"], b["model"])
    exact((a["average"], a["adamw"]["state"]), (b["average"], b["adamw"]["state"]))


@pytest.mark.parametrize("script, stage, flags", STAGES)
def test_two_processes_train_and_evaluate_like_one(tmp_path, script, stage, flags):
    moments, pqs = [], []
    for world in (1, 2):
        flags, out = f"{TINY} --size 64 --eval_images 3 --ckpt {SHAPES} --out", tmp_path / str(
            world
        )
        launch(same_draws, script, [*flags.split(), out], world)
        state = torch.load(out / f"{stage}_state.pt")["adamw"]["state"]
        moments.append([s["exp_avg"] for s in state.values()])  # gradients, in effect
        pqs.append(read(out / f"{stage}_log.jsonl")[-1]["val_pq"])
    for a, b in zip(*moments):
        close(a, b, atol=2e-3 * max(float(a.abs().max()), 1e-4))
    assert 0.3 < pqs[0] == pytest.approx(pqs[1], abs=0.01)


def test_steps_without_a_finite_gradient_are_skipped(tmp_path):
    layer = torch.nn.Linear(3, 1)
    args = Namespace(lr=0.2, weight_decay=0, ema=0.9, precision="fp32", schedule="constant")
    args.iters, args.batch_size, args.clip, args.save_every = 1000, 1, 1, 1000
    args.out, args.resume, before = tmp_path, False, layer.weight.clone()
    run = data.Run("ae", args, layer, [{"params": [*layer.parameters()]}], {}, None)
    for factor, moved in ((1, 0.1), (np.nan, 0.1), (np.inf, 0.1), (1, 0.2)):
        loss = factor * layer(torch.ones(2, 3)).sum()
        loss.backward()
        run.step(100, loss)
        close(layer.weight, before - moved)  # Adam's steps, half warmed up


def test_a_training_writes_what_comes_of_it(trained):
    for stage in ("ae", "ldm"):
        log, figures = read(trained / f"{stage}_log.jsonl"), read(trained / f"{stage}.json")
        assert [entry["iteration"] for entry in log] == [0, 2, 3, 3]
        assert figures.keys() == {"images", "pq", "sq", "rq"}
    model, state = sample.load(trained / "ldm.pt"), torch.load(trained / "ldm_state.pt")
    saved = [p.detach() for group in diffusion.decay_groups(model) for p in group["params"]]
    exact(saved, state["average"])  # ldm.pt holds the average
    assert not torch.equal(model.unet.conv_in.weight, state["model"]["unet.conv_in.weight"])


@pytest.mark.parametrize("script, stage, flags", STAGES)
def test_both_stages_learn_in_bf16(tmp_path, trained, script, stage, flags):
    flags += " --iters 200 --lr 0.1 --precision bf16 --save_every 199"
    flags += f" --ae {trained / 'ae.pt'} --given 0.5 --augment 0.1" * (stage == "ldm")
    run(SCRIPTS[script].main, flags, "--out", tmp_path)
    logs = (read(folder / f"{stage}_log.jsonl") for folder in (trained, tmp_path))
    before, after = ([e["loss"] for e in log if "loss" in e] for log in logs)
    assert np.mean(after[-5:]) < 0.9 * before[0]


def test_stable_diffusions_vae_serves_as_stage_1(tmp_path):
    narrow = ae.vae_config([8, 16, 32], norm_num_groups=4)
    diffusion.AutoencoderKL(**narrow).save_pretrained(tmp_path / "vae")
    flags = " --iters 1 --arch sd_vae --encoding rgb --kl 0.1 --precision fp16 --sd"
    run(ae.main, TINY_AE + flags, tmp_path, "--out", tmp_path)
    run(ae.main, TINY + " --iters 0 --out", tmp_path, "--ckpt", tmp_path / "ae.pt")


def test_the_classifier_trains_while_the_rest_is_frozen(tmp_path, trained):
    base = ["--out", tmp_path, "--json", tmp_path / "r.json", "--ckpt"]
    run(diffusion.main, TINY + " --classes", *base, trained / "ldm.pt")
    before, after = (sample.load(f / "ldm.pt").state_dict() for f in (trained, tmp_path))
    exact({k: after[k] for k in before}, before)
    run(sample.main, "--limit 2 --steps 1", *base, tmp_path / "ldm.pt")
    assert {"pq_classes", "pq_things", "pq_stuff"} <= read(base[3]).keys()
    run(diffusion.main, TINY + " --distill 1", *base, tmp_path / "ldm.pt")
    assert sample.load(tmp_path / "ldm.pt").classifier
    with mock.patch.object(diffusion, "noise_chooses", None):  # its truth is listed by id
        run(diffusion.main, TINY + " --classes", *base, tmp_path / "ldm.pt")


def test_validation_sees_micro_batches(tmp_path, trained, monkeypatch):
    sizes, predict = [], diffusion.predict

    def counted(model, samples, args):
        sizes.append(len(samples))
        return predict(model, samples, args)

    monkeypatch.setattr(diffusion, "predict", counted)
    flags = TINY + " --iters 0 --eval_images 3 --micro_batch 2 --ckpt"
    run(diffusion.main, flags, trained / "ldm.pt", "--out", tmp_path)
    assert sizes == [2, 1]


# --------------------------------------------------------------- sample.py and inpaint.py as used


@pytest.fixture
def photo(tmp_path):
    """A picture, photo.png, and part.png, a partial mask of it."""
    Image.fromarray(scenes(1, 60)[0]["image"][:40]).save(tmp_path / "photo.png")
    given = np.zeros((40, 60), np.int32)
    given[5:20, 5:30] = 900_001
    data.write_id_png(tmp_path / "part.png", given)
    return tmp_path / "photo.png"


def test_sample_segments_a_folder_and_pq_reads_it_back(tmp_path, capsys):
    folder, odd = tmp_path / "in", os.fsdecode(b"\xff")  # a name that is not UTF-8
    (folder / "sub.png").mkdir(parents=True)
    for name in ("000042.png", "b.png", "b.bmp", "c.jfif", f"{odd}.png"):
        Image.fromarray(scenes(1)[0]["image"]).save(folder / name)
    for name in ("broken.jpg", "notes.txt", ".hidden.png"):
        (folder / name).write_bytes(b"nothing")
    base, file = ["--ckpt", SHAPES, "--steps", 2, "--out", tmp_path], tmp_path / "predictions.json"
    assert "broken.jpg" in refused(capsys, sample.main, "--images", folder, "--seeds", 0, 1, *base)
    assert "broken.jpg" in refused(capsys, sample.main, "--images", folder, *base)
    entries = {e["image_id"]: e for e in read(file)["annotations"]}
    assert entries.keys() == {42, "b", "b.png", "c", odd}
    for e in entries.values():
        ids = data.read_id_png(tmp_path / "predictions" / e["file_name"])
        assert sum(s["area"] for s in e["segments_info"]) == (ids > 0).sum() > 0
    run(pq.main, "--class_agnostic", "--gt", file, "--pred", file)
    assert capsys.readouterr().out.count("100.0") == 3


def test_sample_compares_steps_and_seeds(tmp_path, trained):
    base = ["--ckpt", trained / "ldm.pt", "--out", tmp_path, "--json", tmp_path / "r.json"]
    run(sample.main, "--limit 3 --steps 1 2 --trajectory", *base)
    figures = read(base[-1])
    assert figures["by_steps"].keys() == {"1", "2"} and figures["images"] == 3
    assert {"pq", "sq", "rq"} <= figures.keys()
    run(sample.main, "--limit 3 --steps 1 --seeds 0 7 --paper --votes 2", *base)
    assert 0 <= read(base[-1])["agreement"] <= 1
    for name in "trajectory seeds sample sample_steps".split():
        assert (tmp_path / f"{name}.png").exists()


def test_inpaint_drops_clicks_and_sweeps(tmp_path, trained):
    base = ["--ckpt", trained / "ldm.pt", "--out", tmp_path, "--json", tmp_path / "r.json"]
    for flags, all_given in (("--drop 0", True), ("--click 2 --paper", False)):
        run(inpaint.main, "--limit 2 --steps 1 " + flags, *base)
        for name in ("completion", "renamed"):
            assert (read(base[-1])[name]["pq"] == 100) == all_given
    run(inpaint.main, "--limit 1 --steps 1 --sweep", *base)
    assert len(read(base[-1])) == 20 and (tmp_path / "inpaint_sweep.png").exists()


def test_the_shipped_weights_keep_their_figures(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # no checkpoints/ldm.pt there
    run(sample.main, "--limit 32 --steps 10 --out . --json s.json")
    assert read("s.json")["pq"] > 70
    flags = " --model small --data shapes --iters 0 --eval_images 32 --num_workers 0 --out ."
    run(ae.main, flags + " --json a.json --ckpt", SHAPES)
    assert read("a.json")["pq"] > 95
    run(inpaint.main, "--limit 16 --out . --json i.json")
    found = read("i.json")["completion"]
    assert min(found["pq"], found["id_accuracy"]) > 80


# ---------------------------------------------------------------------------------------- bad input


def bad_flags(script):
    """Flags of a script, as it defines them, with values that can't be."""
    kinds, paths = {}, "--data --ckpt --images --image --mask --device".split()

    def note(parser, name, kind, *_, **more):
        kinds[name] = kind

    with mock.patch.object(data.Parser, "flag", note), contextlib.suppress(AttributeError):
        SCRIPTS[script].main([])
    for name, kind in kinds.items():
        values = ["no/such"] * (name in paths) if kind is str else ["x", "-1", "nan", "1e999"]
        yield from ([name, value] for value in values if kind is not bool)


def bad_checkpoints(good):
    """Broken and foreign versions of a checkpoint, as bytes."""
    whole, content = good.read_bytes(), torch.load(good)
    yield from (whole[: int(share * len(whole))] for share in (0, 0.01, 0.5, 0.999))
    yield from (bytes(999), b"text")
    wrong = [[1, 2], *({key: value} for key, value in content.items())]
    wrong += [{**content, key: v} for key in content.keys() - {"iteration"} for v in (7, None)]
    for value in wrong:
        torch.save(value, file := io.BytesIO())
        yield file.getvalue()


@pytest.mark.parametrize("script, stage", [*zip(SCRIPTS, ("ae", "ldm", "ldm", "ldm"))])
def test_bad_input_is_one_line_and_harms_nothing(tmp_path, trained, capsys, photo, script, stage):
    out, bad, state = (
        shutil.copytree(trained, tmp_path / "out"),
        tmp_path / "bad.pt",
        f"{stage}_state.pt",
    )
    base = {"ae": TINY_AE, "diffusion": TINY}.get(script, "--limit 1 --steps 1").split()
    refuse = functools.partial(refused, capsys, SCRIPTS[script].main, "--out", out)
    ckpt = [*base, "--ckpt", trained / f"{stage}.pt"]
    for flags in [*bad_flags(script), ["--ckpt", bad], ["--image", photo, "--mask", bad]]:
        refuse(*ckpt, *flags)
    for content in bad_checkpoints(ckpt[-1]):
        bad.write_bytes(content)
        refuse(*base, "--ckpt", bad)
    for content in bad_checkpoints(trained / state) if "--iters" in base else ():
        (out / state).write_bytes(content)
        refuse("--resume")
    shutil.copy(trained / state, out)
    for file in out.rglob("*"):
        assert file.read_bytes() == (trained / file.name).read_bytes()


# ------------------------------------------------------------------------------------------- speed


def side_by_side(functions, rounds=5):
    """Time {name: function} in turn, so that all see the machine in the same state. Prints the median
    (CPU time; on a GPU the clock's) and the median speed, the first function's being 1."""
    gpu, times = torch.cuda.is_available(), []
    clock = time.perf_counter if gpu else time.process_time
    for _ in range(rounds + 1):  # the first round is the warm-up
        for function in functions.values():
            began = clock()
            function()
            torch.cuda.synchronize() if gpu else None
            times.append(1000 * (clock() - began))
    times = np.reshape(times, (rounds + 1, -1))[1:].T
    for name, own in zip(functions, times):
        print(f"{name:>32}{np.median(own):10.2f} ms   x {np.median(times[0] / own):.2f}")


def blobs(count, seed):
    """A 640 x 480 map of `count` segments with wavy outlines and ids as COCO has them."""
    rng, (y, x) = np.random.default_rng(seed), np.mgrid[:480, :640].astype(np.float32)
    y, x = y + 6 * np.sin(x / 17) + 3 * np.sin(x / 5), x + 6 * np.sin(y / 13)
    distances = [(y - 480 * a) ** 2 + (x - 640 * b) ** 2 for a, b in rng.random((count, 2))]
    return rng.choice(data.MAX_ID, count, False).astype(np.int32)[np.argmin(distances, 0)] + 1


def plain_norm(x):
    """LayerNorm2d, untrained, written out: B x C x H x W -> B x C x H x W."""
    x = x - x.mean(1, True)
    return x / (x.square().mean(1, True) + 1e-6).sqrt()


def stage1_step(net, ids, plain):
    """Forward, losses, backward. plain: each segment's full mask on its own, one after the other."""
    logits = net(ids)[0]
    ce, mask = ae.draw_points(logits, ids, 12544)
    losses = ae.segmentation_losses(logits, ids, ce, mask[:, : 1 if plain else None])
    losses = list(losses[: 1 if plain else 2])
    for b, i, points in zip(*ae.segments_of(ids, 128), mask) if plain else ():
        inputs = logits[b, None], (ids[b] * (ids[b] == i))[None], ce[:1, :1], points[None]
        losses.append(ae.segmentation_losses(*inputs)[1])
    sum(losses).backward()


def bench():
    """Time what a user waits for."""
    args = Namespace(device="auto", seed=0, precision="fp32", batch_size=16, num_workers=0)
    device, _ = data.setup(args)
    quality, ids, batches = pq.PanopticQuality(), blobs(30, 0), []
    cells = np.arange(1, 10001).reshape(100, 100).repeat(3, 0).repeat(3, 1)
    maps = [(blobs(n, 0), blobs(n, 1)) for n in (5, 20, 60, 120)]
    for a, b in [*maps, (cells, np.roll(cells, 1))]:
        pair = a, data.describe(a), b, data.describe(b)
        unique = lambda: np.unique(a.astype(np.int64) << 24 | b, return_counts=True)
        update = lambda: quality.update(*pair)
        side_by_side({f"np.unique, {len(pair[1])} segments": unique, "PQ": update}, 25)
    tracemalloc.start()
    update()
    print(f"its memory: {tracemalloc.get_traced_memory()[1] / 1e6:.1f} MB")
    tracemalloc.stop()

    with tempfile.TemporaryDirectory() as root:
        files = f"{root}/0.jpg", f"{root}/0.png"
        Image.fromarray(data.Shapes("", 640)[0]["image"][:480]).save(files[0])
        data.write_id_png(files[1], ids)
        entry = {"image_id": 0, "file_name": "0.png", "segments_info": data.describe(ids)}
        content = {"annotations": [entry], "categories": [{"id": 1}]}
        content["images"] = [{"id": 0, "file_name": "0.jpg"}]
        data.write(f"{root}/annotations/panoptic_train.json", content)
        for size, num_ids in ((256, 128), (64, 16), (512, 128)):
            stream = data.Training(data.Folder(root, "train"), size, num_ids)
            pillow = lambda: [Image.open(f).resize((size, size)) for f in files]
            side_by_side({f"Pillow, {size} px": pillow, "sample": lambda: stream[0]}, 25)
            batch = next(iter(data.training_batches(stream, [0], args)))
            batches.append({k: v.to(device) for k, v in batch.items()})

    plain, net, small = ae.Autoencoder(), ae.Autoencoder(), ae.Autoencoder(16, "bits", 4, 64)
    unet = diffusion.build_unet(diffusion.small_unet_config(56, 16))
    settings = diffusion.MODELS["small"] | {"latent_scale": 1}
    model = diffusion.LDM(small, diffusion.Pixels(4), unet, settings)
    for module in (net, plain, model):
        module.to(device, memory_format=torch.channels_last)
    plain.decoder[3].forward = plain.decoder[6].forward = plain_norm
    ids, batch = batches[2]["ids"][:2], batches[1]
    straight = lambda: stage1_step(plain, ids, True)
    step = lambda: stage1_step(net, ids, False)
    side_by_side({"stage 1, straightforward": straight, "step": step}, 1)

    z, x = model.encode(batch["ids"]), model.encode_image(batch["image"])
    j, weights = torch.arange(16).to(device) * 60, torch.ones(1000).to(device)

    def passes():
        """Those of a step: half of the samples condition themselves."""
        with torch.no_grad():
            model.denoise(z[:8], x[:8], z[:8], j[:8])
        model.denoise(z, x, z, j).mean().backward()

    step = lambda: model(batch, z, j, weights, j < 480).backward()
    side_by_side({"stage 2, passes of the UNet": passes, "step": step})
    with torch.no_grad():
        logits = model.decode(z)
        parts = {
            "sampling 16, UNet": lambda: model.denoise(z, x, z, j),
            "image encoder": lambda: model.encode_image(batch["image"]),
            "decoder": lambda: model.decode(z),
            "post-processing of 1": lambda: ae.keep(*ae.argmax(logits[0], 480, 640), 512),
        }
        side_by_side(parts)


if __name__ == "__main__":
    if sys.argv[1:] != ["bench"]:
        raise SystemExit("python test_all.py bench, or: python -m pytest -q test_all.py")
    bench()

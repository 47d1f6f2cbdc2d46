"""test_all.py: every core piece against an independent truth, every script as its user runs it.

    make test                       # or: python -m pytest -q test_all.py

Reference numbers of the authors' release and of the panoptic API are looked for in $LDMSEG_SHARED (default ../shared);
tests that need them are skipped where they are absent. A few of those numbers stand in this file, so that every clone
checks them.
"""
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import ae
import data
import diffusion
import inpaint
import pq
import sample

HERE = Path(__file__).parent
SHARED = Path(os.environ.get("LDMSEG_SHARED", HERE.parent / "shared"))
torch.set_num_threads(2)


def reference(name):
    path = SHARED / "reference" / name
    if not path.exists():
        pytest.skip(f"no reference numbers at {path} (set LDMSEG_SHARED)")
    return path


TINY_AE = ["--model", "small", "--data", "shapes", "--size", "32", "--num_ids", "8", "--width", "32", "--batch_size", "4",
           "--eval_images", "4", "--num_workers", "0", "--warmup", "2", "--log_every", "1", "--device", "cpu"]
TINY_LDM = ["--model", "small", "--data", "shapes", "--channels", "16", "--batch_size", "4", "--eval_images", "4", "--steps", "2",
            "--num_workers", "0", "--warmup", "2", "--log_every", "1", "--device", "cpu"]


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """Both stages, a few iterations each, through the scripts' own main: the folder with ae.pt and ldm.pt."""
    out = tmp_path_factory.mktemp("trained")
    ae.main(TINY_AE + ["--iters", "3", "--out", str(out)])
    diffusion.main(TINY_LDM + ["--iters", "3", "--out", str(out)])
    return out


def one_line_error(capsys, main, argv, *words):
    """The command must end with exit code 2 and one line on stderr that holds all the words."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(argv)
    err = [l for l in capsys.readouterr().err.strip().splitlines() if not l.startswith("no checkpoints/")]
    assert stop.value.code == 2 and len(err) == 1 and "Traceback" not in err[0], err
    assert all(w in err[0] for w in words), err


# ------------------------------------------------------------------------------------------------------ data.py


def test_scenes_are_reproducible_and_splits_differ():
    a, b = data.Shapes("train2017", 48, seed=3), data.Shapes("train2017", 48, seed=3)
    for i in (0, 7, 1000):
        assert np.array_equal(a[i]["image"], b[i]["image"]) and np.array_equal(a[i]["ids"], b[i]["ids"])
    pixels = lambda s: {s[i]["ids"].tobytes() + s[i]["image"].tobytes() for i in range(100)}
    assert not pixels(a) & pixels(data.Shapes("val2017", 48, seed=3))
    assert not pixels(a) & pixels(data.Shapes("train2017", 48, seed=4))
    assert len(pixels(a)) == 100


def test_scenes_hold_what_they_promise():
    kinds, counts = set(), set()
    for i in range(200):
        s = data.Shapes("train2017")[i]
        assert s["image"].shape == (64, 64, 3) and s["image"].dtype == np.uint8 and s["ids"].min() == 1
        listed = {g["id"]: g for g in s["segments_info"]}
        known, areas = np.unique(s["ids"], return_counts=True)
        assert set(known.tolist()) == set(listed) and all(listed[k]["area"] == a for k, a in zip(known.tolist(), areas))
        assert areas.min() >= 64 * 64 // 80
        kinds |= {g["category_id"] for g in s["segments_info"]}
        counts.add(len(known))
    assert kinds == {1, 2, 3, 4, 5} and counts == {2, 3, 4, 5}


def test_training_sample_depends_on_its_number_only():
    a = data.Training(data.Shapes("train2017", 32), 32, 16, seed=1)
    b = data.Training(data.Shapes("train2017", 32), 32, 16, seed=1)
    b[5], b[77]
    for n in (3, 600):
        for x, y in zip(a[n], b[n]):
            assert torch.equal(x, y) and x.dtype == torch.uint8
    ids = torch.stack([a[n][1] for n in range(300)])
    assert set(ids.unique().tolist()) == set(range(1, 16))  # every id is used, and none is void
    assert not torch.equal(a[3][1], data.Training(data.Shapes("train2017", 32), 32, 16, seed=2)[3][1])


def test_flip_turns_image_and_ids_together():
    source = [{"image": np.arange(16, dtype=np.uint8)[None, :, None].repeat(16, 0).repeat(3, 2),
               "ids": np.repeat(np.arange(1, 5), 4)[None].repeat(16, 0).astype(np.int32),
               "segments_info": [{"id": i, "category_id": 1} for i in range(1, 5)]}]
    class Source(list):
        endless = False
    flips = set()
    for n in range(20):
        image, ids = data.Training(Source(source), 16, 8, seed=n)[0]
        order = image[0, 0].tolist()
        flips.add(order[0] > order[-1])
        groups = [set(ids[:, np.argwhere(np.isin(order, range(4 * k, 4 * k + 4)))[:, 0]].flatten().tolist()) for k in range(4)]
        assert all(len(g) == 1 for g in groups) and len(set.union(*groups)) == 4
    assert flips == {True, False}


def test_relabel_voids_small_and_crowd_and_keeps_the_largest(capsys):
    ids = np.zeros((40, 40), np.int32)
    segments = []
    for k in range(10):                                    # areas 4, 8, .., 40
        ids[k, :4 * (k + 1)] = 1000 * k + 70000
        segments.append({"id": 1000 * k + 70000, "category_id": 1, "iscrowd": int(k == 9)})
    rng = np.random.default_rng(0)
    new = data.relabel(ids, segments, 16, rng, min_area=10)
    assert not new[[0, 1, 9]].any() and len(set(new[new > 0])) == 7 and new.max() < 16
    for k in range(2, 9):
        assert len(set(new[k, :4 * (k + 1)])) == 1
    data.say_once.cache_clear()
    few = data.relabel(ids, segments, 4, rng)
    assert [bool(few[k, 0]) for k in range(10)] == [False] * 6 + [True] * 3 + [False]
    data.relabel(ids, segments, 4, rng)
    assert capsys.readouterr().err.count("more segments than N - 1 = 3") == 1


def test_resize_ids_is_pillows_nearest():
    rng = np.random.default_rng(0)
    for shape, target in (((37, 53), (64, 64)), ((480, 640), (512, 512)), ((640, 427), (64, 32)), ((5, 1), (16, 16))):
        ids = rng.integers(0, 1 << 24, shape).astype(np.int32)
        pillow = np.asarray(Image.fromarray(ids).resize(target[::-1], Image.NEAREST))
        assert (data.resize_ids(ids, *target) == pillow).mean() > 0.999


@pytest.mark.parametrize("encoding", data.ENCODINGS)
@pytest.mark.parametrize("num_ids", [4, 16, 128])
def test_encodings_tell_all_ids_apart(encoding, num_ids):
    ids = torch.arange(num_ids, dtype=torch.uint8).view(1, 1, num_ids)
    x = data.encode_ids(ids, num_ids, encoding)
    assert x.shape == (1, data.id_channels(encoding, num_ids), 1, num_ids) and x.abs().max() <= 1
    assert not x[..., 0].any() and torch.pdist(x[0, :, 0].T).min() > 1e-3
    if encoding == "bits":                                 # bit k of the id, as -1 or +1
        bits = [[2 * (i >> k & 1) - 1 for k in range(num_ids.bit_length() - 1)] for i in range(1, num_ids)]
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
    seen = [s["image_id"] for r in range(3) for batch in data.evaluation_batches(data.Evaluation(data.Shapes("v", 16, length=10), 16), 2, r, 3) for s in batch]
    assert sorted(seen) == list(range(10))


def write_panoptic(root, split="val2017", pngs="panoptic_{}", sub="", suffix=".png", count=3, size=(40, 30)):
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
        images.append({"id": i, "file_name": f"{i:03d}.png", "width": ids.shape[1], "height": ids.shape[0]})
        segments = [{"id": s, "category_id": c, "iscrowd": 0, "area": int((ids == s).sum())} for s, c in ((7, 1), (300, 2), (70000, 1))]
        annotations.append({"image_id": i, "file_name": f"{i:03d}{suffix}", "segments_info": segments})
        truth[i] = (picture, ids)
    categories = [{"id": 1, "name": "cat", "isthing": 1}, {"id": 2, "name": "sky", "isthing": 0}]
    path = root / "annotations" / f"panoptic_{split}.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return truth


@pytest.mark.parametrize("layout", [{}, {"pngs": "annotations/panoptic_{}"}, {"sub": "frankfurt", "suffix": "_gtFine_panoptic.png"}])
def test_panoptic_layouts(tmp_path, layout):
    truth = write_panoptic(tmp_path, **layout)
    source = data.open_data(str(tmp_path), "val2017")
    assert len(source) == 3 and source.layout == "panoptic"
    for sample_ in (source[i] for i in range(3)):
        image, ids = truth[sample_["image_id"]]
        assert np.array_equal(sample_["image"], image) and np.array_equal(sample_["ids"], ids)


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
    counts = [int(c) for c in np.diff(np.flatnonzero(np.diff(np.concatenate([[2], crowd.T.ravel(), [2]]))))]
    annotations = [
        {"id": 1, "image_id": 5, "category_id": 3, "iscrowd": 0, "segmentation": {"size": [20, 20], "counts": rle["counts"].decode()}},
        {"id": 2, "image_id": 5, "category_id": 4, "iscrowd": 0, "segmentation": [[2, 2, 12, 2, 12, 12, 2, 12]]},
        {"id": 3, "image_id": 5, "category_id": 3, "iscrowd": 1, "segmentation": {"size": [20, 20], "counts": counts}}]
    content = {"images": [{"id": 5, "file_name": "a.png", "width": 20, "height": 20}], "annotations": annotations,
               "categories": [{"id": 3, "name": "x"}, {"id": 4, "name": "y"}]}
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


def test_instances_layout(tmp_path):
    write_instances(tmp_path)
    s = data.open_data(str(tmp_path), "val2017")[0]
    by_category = {g["category_id"]: g["id"] for g in s["segments_info"]}
    assert set(by_category) == {3, 4, 5}                                   # 5 is the background's own category
    assert (s["ids"][4:8, 4:8] == by_category[3]).all()                    # the smaller instance is on top
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
        image = Image.fromarray((values * 255).astype(np.uint8)).convert("RGB" if mode == "CMYK" else mode if mode not in ("LA",) else "LA").convert(mode)
    path = tmp_path / ("x.tif" if mode in ("CMYK", "F") else "x.png")
    image.save(path)
    array = data.read_image(path)
    assert array.shape == (48, 64, 3) and array.dtype == np.uint8 and array[-1, -1].min() > 200 and array[0, 0].max() < 60


def test_exif_rotation_is_applied(tmp_path):
    image = Image.new("RGB", (40, 20))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "x.jpg", exif=exif)
    assert data.read_image(tmp_path / "x.jpg", upright=True).shape == (40, 20, 3)


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
    assert abs(quality.result()["All"]["pq"] - expected) < 1e-12 and quality.counts.tolist() == [[tp, fp, fn]] and tp > 20 and fp > 20 and fn > 20


def test_pq_accumulators_add_up_and_missing_predictions_count():
    rng = np.random.default_rng(1)
    images = [random_pair(rng) for _ in range(10)]
    whole, halves = pq.PanopticQuality(), [pq.PanopticQuality(), pq.PanopticQuality()]
    for k, image in enumerate(images):
        whole.update(*image)
        halves[k % 2].update(*image)
    both = pq.PanopticQuality()
    both.state = halves[0].state + halves[1].state
    assert both.result() == pytest.approx(whole.result()) and np.array_equal(both.counts, whole.counts)
    before = whole.counts.copy()
    whole.missed([{"id": 1, "iscrowd": 0}, {"id": 2, "iscrowd": 1}, {"id": 3}])
    assert (whole.counts - before).tolist() == [[0, 0, 2]]


def test_pq_by_hand():
    gt = np.array([[1, 1, 1, 1], [2, 2, 0, 0]])
    pred = np.array([[5, 5, 5, 0], [6, 7, 7, 7]])
    segments = lambda ids, cats: [{"id": i, "category_id": c} for i, c in zip(ids, cats)]
    quality = pq.PanopticQuality([{"id": 1, "isthing": 1}, {"id": 2, "isthing": 0}])
    quality.update(gt, segments([1, 2], [1, 2]), pred, segments([5, 6, 7], [1, 2, 2]))
    # 5 covers 3 of 4 px of 1: IoU 0.75. 6 and 2: IoU 1/2, no match. 7 lies with 2 of 3 px on void: ignored.
    assert quality.counts.tolist() == [[1, 0, 0], [0, 1, 1]]
    r = quality.result()
    assert r["Things"] == {"pq": 0.75, "sq": 0.75, "rq": 1.0, "n": 1.0} and r["All"]["pq"] == 0.375 and r["Stuff"]["pq"] == 0


def test_pq_command_equals_the_panoptic_api(tmp_path, capsys):
    root = reference("pq")
    pq.main(["--gt", str(root / "gt.json"), "--pred", str(root / "pred.json"), "--json", str(tmp_path / "r.json")])
    found, expected = json.loads((tmp_path / "r.json").read_text()), json.loads((root / "expected.json").read_text())
    def compare(a, b):
        assert a.keys() == b.keys()
        for k in b:
            compare(a[k], b[k]) if isinstance(b[k], dict) else pytest.approx(b[k], abs=1e-12) == a[k] or pytest.fail(k)
    compare(found, expected)
    assert "23.9   69.8   34.1" in capsys.readouterr().out


# -------------------------------------------------------------------------------------------------------- ae.py


def test_points_are_the_most_uncertain_ones():
    torch.manual_seed(0)
    drawn = {}
    def uncertainty(points):                               # most uncertain at x = 0.5
        drawn["all"] = points
        return -(points[..., 0] - 0.5).abs()
    points = ae.uncertain_points(uncertainty, 3, 400, "cpu")
    assert points.shape == (3, 400, 2) and drawn["all"].shape == (3, 1200, 2) and 0 <= points.min() and points.max() <= 1
    for b in range(3):
        expected = sorted(drawn["all"][b].tolist(), key=lambda p: abs(p[0] - 0.5))[:300]
        assert sorted(map(tuple, points[b, :300].tolist())) == sorted(map(tuple, expected))
    assert (points[:, 300:, 0] - 0.5).abs().mean() == pytest.approx(0.25, abs=0.03)    # the rest is uniform


def test_mask_at_equals_sampling_the_full_masks():
    torch.manual_seed(0)
    ids = torch.randint(0, 4, (2, 9, 13), dtype=torch.uint8)
    image_of, id_of = ae.segments_of(ids, 4)
    assert list(zip(image_of.tolist(), id_of.tolist())) == [(b, i) for b in range(2) for i in (1, 2, 3)]
    points = torch.rand(len(id_of), 50, 2)
    masks = torch.stack([(ids[b] == i).float() for b, i in zip(image_of, id_of)])[:, None]
    assert torch.allclose(ae.mask_at(ids, image_of, id_of, points), ae.sample_at(masks, points)[:, 0], atol=1e-5)


def test_losses_at_all_pixel_centres_equal_the_dense_losses():
    torch.manual_seed(0)
    ids = torch.randint(0, 5, (2, 8, 8), dtype=torch.uint8)
    logits = torch.randn(2, 8, 8, 8)
    y, x = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
    centres = torch.stack([x, y], -1).reshape(1, 64, 2).add(0.5).div(8)
    image_of, id_of = ae.segments_of(ids, 8)
    ce, n_ce, mask, n_mask = ae.segmentation_losses(logits, ids, centres.expand(2, -1, -1), centres.expand(len(id_of), -1, -1))
    assert n_ce == (ids > 0).sum() and n_mask == len(id_of)
    assert torch.allclose(ce, F.cross_entropy(logits, ids.long(), ignore_index=0, reduction="sum"), rtol=1e-4)
    total = 0
    for b, i in zip(image_of, id_of):
        m, l = (ids[b] == i).float(), logits[b, i]
        p = l.sigmoid()
        total += F.binary_cross_entropy_with_logits(l, m) + 1 - (2 * (p * m).sum() + 1) / (p.sum() + m.sum() + 1)
    assert torch.allclose(mask, total, rtol=1e-4)


def test_losses_equal_the_reference():
    ref = np.load(reference("loss_parity.npz"))
    t = lambda k: torch.from_numpy(ref[k])
    ce, n_ce, mask, n_mask = ae.segmentation_losses(t("logits"), t("targets"), t("ce_points"), t("mask_points"))
    assert abs(ce / n_ce - float(ref["ce"])) < 1e-5 and abs(mask / n_mask - float(ref["mask_bce_plus_dice"])) < 1e-5
    torch.manual_seed(0)
    draws = []
    for _ in range(60):
        ce, n_ce, mask, n_mask = ae.segmentation_losses(t("logits"), t("targets"), *ae.draw_points(t("logits"), t("targets"), 256))
        draws.append((float(ce / n_ce), float(mask / n_mask)))
    for values, (mean, std), n in zip(zip(*draws), (ref["ce_importance_mean_std"], ref["mask_importance_mean_std"]), (200, 60)):
        assert abs(np.mean(values) - mean) < 3 * std * (1 / n + 1 / len(values)) ** 0.5


def test_autoencoder_has_the_papers_shape():
    model = ae.Autoencoder()
    assert sum(p.numel() for p in model.parameters()) == 2_023_208
    mean, logvar = model.encode(torch.randint(0, 128, (1, 64, 96)))
    assert mean.shape == logvar.shape == (1, 4, 8, 12) and model.decode(mean).shape == (1, 128, 32, 48)
    shallower = ae.Autoencoder(16, "onehot", factor=4, width=64)
    assert shallower(torch.randint(0, 16, (2, 32, 32)))[0].shape == (2, 16, 32, 32)


def test_channel_norm_is_layernorm_over_channels():
    torch.manual_seed(0)
    norm, x = ae.ChannelNorm(6), torch.randn(2, 6, 3, 5)
    torch.nn.init.normal_(norm.weight)
    mean, var = x.mean(1, keepdim=True), x.var(1, keepdim=True, unbiased=False)
    expected = (x - mean) / (var + norm.eps).sqrt() * norm.weight.view(1, -1, 1, 1) + norm.bias.view(1, -1, 1, 1)
    assert torch.allclose(norm(x), expected, atol=1e-5)


def test_kl_equals_torchs():
    mean, logvar = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mean, (logvar / 2).exp()), normal(0, 1)).sum()
    assert torch.allclose(ae.kl_loss(mean, logvar), expected, rtol=1e-4)


def test_postprocess_thresholds_and_drops_small_segments():
    logits = torch.zeros(4, 8, 8)
    logits[1, :, :4], logits[2, :, 4:], logits[3, 0, 7] = 9, 9, 20
    logits[:, 4, 0] = 0                                    # an undecided pixel
    found = ae.postprocess(logits, 8, 8, min_area=2)
    assert found[4, 0] == 0 and found[0, 7] == 0 and (found == 1).sum() == 31 and (found == 2).sum() == 31
    assert ae.postprocess(logits, 8, 8)[0, 7] == 3
    assert ae.postprocess(logits, 24, 16).shape == (24, 16)


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
        sums = ae.segmentation_losses(model(ids[rows], noise[rows])[0], ids[rows], ce_points[rows], mask_points[torch.isin(image_of, rows)])
        counts = counts or (sums[1], sums[3])
        return sums[0] / counts[0] + sums[2] / counts[1], (sums[1], sums[3])
    everything, first, second = torch.arange(4), torch.arange(2), torch.arange(2, 4)
    whole = gradients(model, lambda: loss(everything)[0].backward())
    counts = loss(everything)[1]
    assert loss(first)[1][0] + loss(second)[1][0] == counts[0] and loss(first)[1][0] != loss(second)[1][0]
    pieces = gradients(model, lambda: [loss(rows, counts)[0].backward() for rows in (first, second)])
    assert torch.allclose(whole, pieces, atol=1e-6)


def test_ae_learns_and_its_log_and_pictures_are_there(tmp_path):
    ae.main(TINY_AE + ["--iters", "60", "--lr", "3e-3", "--out", str(tmp_path), "--json", str(tmp_path / "r.json")])
    entries = read_log(tmp_path)
    losses = [e["loss"] for e in entries if "loss" in e]
    assert len(losses) == 60 and np.mean(losses[-10:]) < 0.8 * np.mean(losses[:10])
    assert {"iteration", "loss", "lr", "images_per_second"} <= entries[0].keys() and any("val_pq" in e for e in entries)
    for name in ("ae.pt", "ae_best.pt", "ae_state.pt", "ae.png", "ae_loss.png"):
        assert (tmp_path / name).stat().st_size > 500
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["images"] == 4 and 0 <= result["pq"] <= 100


@pytest.mark.parametrize("stage", ["ae", "ldm"])
def test_resume_gives_the_same_weights_as_one_run(tmp_path, trained, stage):
    main, flags = {"ae": (ae.main, TINY_AE), "ldm": (diffusion.main, TINY_LDM + ["--ae", str(trained / "ae.pt")])}[stage]
    flags = flags + ["--save_every", "2"]
    main(flags + ["--iters", "4", "--out", str(tmp_path / "whole")])
    state = tmp_path / "whole" / f"{stage}_state.pt"

    # stop after two of the four iterations: the run itself, cut off by an exception in its third
    calls, original = [], ae.seed_iteration
    def interrupted(seed, it, rank):
        if it == 2 and not calls.append(it) and len(calls) == 1:
            raise KeyboardInterrupt
        original(seed, it, rank)
    ae.seed_iteration = interrupted
    try:
        with pytest.raises(KeyboardInterrupt):
            main(flags + ["--iters", "4", "--out", str(tmp_path / "cut")])
    finally:
        ae.seed_iteration = original
    assert torch.load(tmp_path / "cut" / f"{stage}_state.pt", weights_only=True)["iteration"] == 2
    main(flags + ["--iters", "4", "--out", str(tmp_path / "cut"), "--resume"])
    a, b = (torch.load(p, weights_only=True) for p in (state, tmp_path / "cut" / f"{stage}_state.pt"))
    flat = lambda s: [v for k in ("weights", "unet", "average", "optimizer") if k in s for v in leaves(s[k])]
    assert len(flat(a)) == len(flat(b)) > 10 and all(torch.equal(x, y) for x, y in zip(flat(a), flat(b)))


def leaves(value):
    """All tensors in nested dicts and lists."""
    if torch.is_tensor(value):
        return [value]
    values = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
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
def same(shape, lead):                                     # every sample of a batch gets the same draw
    g = torch.Generator().manual_seed(5)
    return lambda *size, **kw: torch.randn(size[0][1:] if isinstance(size[0], tuple) else size[1:], generator=g.manual_seed(5))[None].expand(size[0] if isinstance(size[0], tuple) else size).clone()
torch.rand = lambda *size, device=None: torch.randn(size[1:], generator=torch.Generator().manual_seed(5)).sigmoid()[None].expand(size).clone()
torch.randn = (lambda original: lambda *size, generator=None, device=None: original(*size, generator=generator) if generator else
               original((size[0] if isinstance(size[0], tuple) else size)[1:], generator=torch.Generator().manual_seed(6))[None].expand(size[0] if isinstance(size[0], tuple) else size).clone())(torch.randn)
torch.randn_like = lambda x: torch.randn(tuple(x.shape))
torch.randint = lambda low, high, size, device=None: torch.full(size, 400)
{main}.main(sys.argv[1:])
""")
    flags = {"ae": TINY_AE, "ldm": TINY_LDM + ["--ae", str(trained / "ae.pt")]}[stage] + ["--iters", "2", "--warmup", "1"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = lambda *cmd: subprocess.run([sys.executable, *cmd], env=env, capture_output=True, text=True, timeout=240)
    one = run(str(script), *flags, "--accum", "2", "--out", str(tmp_path / "one"))
    assert one.returncode == 0, one.stderr[-2000:]
    two = run("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script), *flags, "--out", str(tmp_path / "two"))
    assert two.returncode == 0, two.stderr[-2000:]
    a, b = (torch.load(tmp_path / n / f"{stage}_state.pt", weights_only=True) for n in ("one", "two"))
    key = "weights" if stage == "ae" else "unet"
    # Adam's first moment is the gradient, up to a factor: compare that, and the weights
    moments = [[s["exp_avg"] for s in x["optimizer"]["state"].values()] for x in (a, b)]
    assert max((x - y).abs().max() / x.abs().max().clamp(min=1e-4) for x, y in zip(*moments)) < 2e-3
    assert all(torch.allclose(x, y, atol=2e-3) for x, y in zip(leaves(a[key]), leaves(b[key])))
    assert len(read_log(tmp_path / "one")) == len(read_log(tmp_path / "two"))          # rank 0 alone writes
"""Placeholder removed below."""

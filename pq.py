"""pq.py: panoptic quality in plain NumPy (Kirillov et al. 2019; the paper's metric, section 4.1).

    python pq.py --gt gt.json --pred predictions.json                     # Table 2
    python pq.py --gt gt.json --pred predictions.json --class_agnostic    # Table 1: one category

A predicted and a true segment of the same category match where IoU > 0.5, which makes the match
unique. Per category, averaged over the categories that occur,
    SQ = mean IoU of the matches,  RQ = TP / (TP + FP/2 + FN/2),  PQ = SQ * RQ.
With categories void and crowds follow COCO's panoptic API; class-agnostic, every crowd is ignored.
"""

import argparse
import functools
import multiprocessing
import os
from pathlib import Path

import numpy as np

import data
from data import BadInput

OBJECT = [{"id": 1, "name": "object", "isthing": 1}]


def overlaps(a, b):
    """Which pairs of ids of two maps of one shape share pixels: id of a, id of b, pixels (P each).

    Looks up runs of equal pairs, not pixels: they are few. Memory is that of the runs."""
    a, b = a.reshape(-1), b.reshape(-1)
    change = (a[1:] != a[:-1]) | (b[1:] != b[:-1])
    start = np.concatenate([[0], 1 + np.flatnonzero(change)])
    pair, length = a[start].astype(np.int64) << 32 | b[start], np.diff(start, append=a.size)
    order = pair.argsort()
    pair, length = pair[order], length[order]
    first = np.flatnonzero(np.diff(pair, prepend=-1))
    return pair[first] >> 32, pair[first] & 0xFFFFFFFF, np.add.reduceat(length, first)


def places(ids, listed, what):
    """Where each of `ids` stands in the list of ids, from 1: 0 for void, -1 for one not listed."""
    known = np.array([0, *listed])
    order = known.argsort(kind="stable")
    if (np.diff(known[order]) == 0).any():
        raise BadInput(f"{what} lists a segment id twice, or 0")
    place = order[known.searchsorted(ids, sorter=order).clip(max=len(listed))]
    return np.where(known[place] == ids, place, -1)


class PanopticQuality:
    """Accumulates matches over images. `state` of several processes may be summed before `result`.

    categories: COCO's list of {id, isthing}; None is class-agnostic."""

    def __init__(self, categories=None):
        self.agnostic = categories is None
        self.categories = OBJECT if categories is None else categories
        self.row_of = {c["id"]: row for row, c in enumerate(self.categories)}
        self.state = np.zeros((len(self.categories), 4))  # per category: sum of IoU, TP, FP, FN

    def rows(self, segments, what):
        """Row of each segment's category. Raises BadInput for one that is not in the list."""
        if self.agnostic:
            return np.zeros(len(segments), np.int64)
        for s in segments:
            if s.get("category_id") not in self.row_of:
                told = f"category {s.get('category_id')!r:.60}, which the truth does not list"
                raise BadInput(f"{what}: segment {s['id']} has {told}")
        return np.array([self.row_of[s["category_id"]] for s in segments], np.int64)

    def update(self, gt, gt_segments, pred, pred_segments, what="image"):
        """Add one image: H x W integer id maps, 0 = void, and lists of {id, category_id[, iscrowd]}.

        Every id of pred must be listed, and every listed one occur. Raises BadInput, naming `what`.
        """
        if gt.shape != pred.shape:
            sizes = f"{pred.shape[1]} x {pred.shape[0]}, the truth {gt.shape[1]} x {gt.shape[0]}"
            raise BadInput(f"{what}: the prediction is {sizes} pixels")
        gt_row, pred_row = self.rows(gt_segments, what), self.rows(pred_segments, what)
        crowd = np.array([bool(s.get("iscrowd")) for s in gt_segments], bool)
        g, p, n = overlaps(gt, pred)
        g = places(g, [s["id"] for s in gt_segments], f"{what}: the truth")
        p = places(p, [s["id"] for s in pred_segments], f"{what}: the prediction")
        if (p < 0).any():
            raise BadInput(
                f"{what}: the prediction holds an id that its segments_info does not list"
            )
        gt_area = np.bincount(g + 1, n, len(gt_segments) + 2)[2:]
        pred_area = np.bincount(p, n, len(pred_segments) + 1)[1:]
        if not pred_area.all():
            absent = pred_segments[int(pred_area.argmin())]["id"]
            raise BadInput(f"{what}: the prediction lists segment {absent}, which has no pixel")

        # a prediction that lies mostly on void or on a crowd of its category is not counted
        void = np.bincount(p[g == 0], n[g == 0], len(pred_segments) + 1)[1:]
        pairs = (g > 0) & (p > 0)
        g, p, n = g[pairs] - 1, p[pairs] - 1, n[pairs]
        counts = crowd.copy()
        if not self.agnostic:  # the panoptic API knows the last crowd of a category only
            last = {row: i for i, row in enumerate(gt_row) if crowd[i]}
            counts[:] = False
            counts[list(last.values())] = True
        on_crowd = counts[g] & (gt_row[g] == pred_row[p])
        ignored = void + np.bincount(p[on_crowd], n[on_crowd], len(pred_segments))

        iou = n / (gt_area[g] + pred_area[p] - n - void[p])
        match = (iou > 0.5) & (gt_row[g] == pred_row[p]) & ~crowd[g]
        g, p, iou = g[match], p[match], iou[match]
        false_pos, false_neg = 2 * ignored <= pred_area, ~crowd
        false_pos[p], false_neg[g] = False, False
        np.add.at(self.state, (gt_row[g], 0), iou)
        np.add.at(self.state, (gt_row[g], 1), 1)
        np.add.at(self.state, (pred_row[false_pos], 2), 1)
        np.add.at(self.state, (gt_row[false_neg], 3), 1)

    def missed(self, gt_segments, what="image"):
        """Add an image without a prediction: all its segments are missed."""
        rows = self.rows([s for s in gt_segments if not s.get("iscrowd")], what)
        np.add.at(self.state, (rows, 3), 1)

    def result(self):
        """PQ, SQ, RQ as fractions in the panoptic API's layout: All, Things, Stuff (with n
        categories; None where that is 0) and per_class."""
        iou, tp, fp, fn = self.state.T
        found = np.maximum(tp + fp / 2 + fn / 2, 0.5)
        figures = np.stack([iou / found, iou / np.maximum(tp, 1), tp / found], 1)  # C x 3
        seen = tp + fp + fn > 0
        thing = np.array([bool(c.get("isthing", 1)) for c in self.categories])
        result = {}
        for name, group in (("All", seen), ("Things", seen & thing), ("Stuff", seen & ~thing)):
            means = figures[group].mean(0).tolist() if group.any() else [None] * 3
            result[name] = {**dict(zip(("pq", "sq", "rq"), means)), "n": float(group.sum())}
        rows = [dict(zip(("pq", "sq", "rq"), row)) for row in figures.tolist()]
        result["per_class"] = {str(c["id"]): row for c, row in zip(self.categories, rows)}
        return result


class Score:
    """Class-agnostic PQ, SQ and RQ over samples of data.py. In the instances layout, where all that
    is no instance is one background, they are those of the instances alone: matched with it, counted
    without it and without the segment that covers most of it. Then also ap50 = TP / (TP + FP + FN)
    and pq_with_background."""

    def __init__(self):
        self.everything = PanopticQuality()
        self.alone = PanopticQuality([{"id": 1, "isthing": 1}, {"id": 2, "isthing": 0}])

    def update(self, sample, found):
        """Add an id map (H x W, 0 = void) for a sample."""
        truth, segments, name = sample["ids"], sample["segments_info"], str(sample["file_name"])
        own = data.describe(found)
        self.everything.update(truth, segments, found, own, name)
        if "background_id" in sample:
            back = {s["id"] for s in segments if s["category_id"] == sample["background_id"]}
            covered = np.bincount(found[np.isin(truth, list(back))], minlength=2)[1:]
            most = int(covered.argmax()) + 1  # of it most has to lie on the background
            cover = {most} if 2 * covered[most - 1] > (found == most).sum() else set()
            segments = [{**s, "category_id": 1 + (s["id"] in back)} for s in segments]
            own = [{**s, "category_id": 1 + (s["id"] in cover)} for s in own]
            self.alone.update(truth, segments, found, own, name)

    def result(self):
        """The figures by name, as fractions, over all processes; None where nothing was to be found."""
        for quality in (self.everything, self.alone):
            quality.state = data.reduce_sum(quality.state)
        everything, alone = self.everything.result()["All"], self.alone.result()["Things"]
        if not self.alone.state.any():
            return {k: everything[k] for k in ("pq", "sq", "rq")}
        _, tp, fp, fn = self.alone.state[0]
        figures = {k: alone[k] for k in ("pq", "sq", "rq")}
        return figures | {
            "ap50": figures["pq"] and tp / (tp + fp + fn),  # None as pq is
            "pq_with_background": everything["pq"],
        }


def percent(figures):
    """The figures of `Score.result` in percent, as tables and JSON have them."""
    return {k: None if v is None else 100 * float(v) for k, v in figures.items()}


def line(values, width=8):
    """A line of a table: numbers with one decimal, "-" for None, text as it is."""
    cells = [f"{v:.1f}" if isinstance(v, float) else "-" if v is None else str(v) for v in values]
    return "".join(cell.rjust(max(width, len(cell) + 1)) for cell in cells)


def table(result):
    """The PQ/SQ/RQ table of `PanopticQuality.result`, in percent, as lines of text."""
    groups = ("All", "Things", "Stuff") if len(result["per_class"]) > 1 else ("All",)
    rows = [[k, *list(percent(result[k]).values())[:3], int(result[k]["n"])] for k in groups]
    return "\n".join(map(line, [["", "PQ", "SQ", "RQ", "n"], *rows]))


def count(images, categories, gt_dir, pred_dir):
    """The state of some images: (image_id, the truth's (file_name, segments), the prediction's)."""
    quality = PanopticQuality(categories)
    for image_id, (name, segments), prediction in images:
        what = f"image {image_id}"
        if prediction is None:
            quality.missed(segments, what)
            continue
        maps = []
        for folder, file, listed in ((gt_dir, name, segments), (pred_dir, *prediction)):
            path = data.find_file(file, [Path(folder)], what)
            maps += [data.read_id_png(path, [s["id"] for s in listed]), listed]
        quality.update(*maps, what)
    return quality.state


def evaluate(gt, pred, gt_dir=None, pred_dir=None, class_agnostic=False, processes=1):
    """Evaluate two COCO panoptic JSON files, paired by image_id; the PNGs' folders default to their
    paths without `.json`. Gives `PanopticQuality.result`. Raises BadInput."""
    lists = ("annotations",) if class_agnostic else ("annotations", "categories")
    content = data.read_coco(gt, lists)
    truth = data.by_image(content, gt, panoptic=True)
    found = data.by_image(data.read_coco(pred, ("annotations",)), pred, panoptic=True)
    paired = len(truth.keys() & found.keys())
    if not paired:
        ids = f"{next(iter(truth), '-')} in {gt}, {next(iter(found), '-')} in {pred}"
        raise BadInput(f"no image of the prediction is in the truth: image_id is {ids}")
    if not paired == len(truth) == len(found):
        images = f"{len(truth)} images in the truth, {len(found)} in the prediction"
        data.say_once(
            f"note: {images}, {paired} in both; those without a prediction count as missed"
        )
    images = [(i, entry, found.get(i)) for i, entry in truth.items()]
    groups = [images[k : k + 16] for k in range(0, len(images), 16)]
    quality = PanopticQuality(None if class_agnostic else content["categories"])
    job = functools.partial(
        count,
        categories=None if class_agnostic else content["categories"],
        gt_dir=gt_dir or str(gt).removesuffix(".json"),
        pred_dir=pred_dir or str(pred).removesuffix(".json"),
    )
    if min(processes, len(groups)) > 1:
        with multiprocessing.get_context("spawn").Pool(min(processes, len(groups))) as pool:
            quality.state = sum(pool.imap(job, groups), quality.state)
    else:
        quality.state = sum(map(job, groups), quality.state)
    return quality.result()


@data.command
def main(argv=None):
    """Command line: evaluate two COCO panoptic files, print the table."""
    parser = data.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--gt", required=True, help="COCO panoptic JSON of the truth")
    add("--pred", required=True, help="COCO panoptic JSON of the prediction")
    add("--gt_dir", help="its PNGs (default: the JSON's path without .json)")
    add("--pred_dir", help="its PNGs (default: the JSON's path without .json)")
    add("--class_agnostic", action="store_true", help="every category counts as one")
    add("--processes", type=data.positive, default=os.cpu_count(), help="(default %(default)s)")
    add("--json", help="also write the result, as fractions, to this file")
    args = parser.parse_args(argv)
    folders = args.gt_dir, args.pred_dir
    result = evaluate(args.gt, args.pred, *folders, args.class_agnostic, args.processes)
    print(table(result))
    if args.json:
        data.write_json(args.json, result)


if __name__ == "__main__":
    main()

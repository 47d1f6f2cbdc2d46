"""inpaint.py: complete a partial segmentation, keeping its ids (paper 3.3, Algorithm 3; Fig. 6, 9).

    python inpaint.py --drop 0.5 --block 8                # drop half of the 8 x 8 blocks, complete
    python inpaint.py --click 4                           # one click of this radius on each object
    python inpaint.py --sweep                             # over drop rates and block sizes
    python inpaint.py --image photo.jpg --mask part.png   # your own mask (id PNG, 0 = unknown)
    python inpaint.py --paper --steps 50                  # Algorithm 3 exactly as printed

Symbols: y the partial id map (0 = unknown), known = scale * E(y), M which latent cells count as
given (B x 1 x h x w: at least half of their pixels are); the rest as in diffusion.py. A block is so
many pixels of the network's input wide (512 for the paper's model).

Ids survive because they are content, not an order of outputs: latents of given cells are held,
given pixels pasted. A segmenter that matches its outputs to objects can't do that. But which
segment has which id is decided at high noise, where held cells say almost nothing. So by default
(`complete`, beyond the paper) the given ids first get the names that the noise would choose."""

import itertools
from pathlib import Path

import data  # before torch: it sets what PyTorch reads on loading
import numpy as np
import torch
import torch.nn.functional as F

import ae
import diffusion
import pq
import sample
from data import BadInput


@torch.no_grad()
def inpaint(model, image_latent, known, M, noise, steps):
    """Algorithm 3: sample the latent while given cells are held at their (noised) known value.
    known: B x 4 x h x w; M: B x 1 x h x w, 1 = given; noise: z^T and eps0, two of B x 4 x h x w."""
    (z, eps0), self_cond = noise, torch.zeros_like(known)
    for j, j_prev in model.ddim.timesteps(steps):
        z = M * model.ddim.add_noise(known, eps0, j) + (1 - M) * z  # given cells: noised to j
        output = model.denoise(z, image_latent, self_cond, j)
        z0 = model.ddim.remove_noise(z, output, j)
        z0 = self_cond = M * known + (1 - M) * z0
        z = model.ddim.step(z, z0, j, j_prev)  # eq. 5
    return z0


@torch.no_grad()
def complete(model, image_latent, given, M, noise, steps):
    """The default, beyond the paper: given ids (B x S x S), renamed by the noise -> B x 4 x h x w.
    As Algorithm 3, but the given part is told to the network from the start, where it looks for its
    last estimate (see --given), and pasted into each estimate's pixels. One noise for all."""
    given = diffusion.noise_chooses(model, given, image_latent, noise, steps)  # B x S x S
    known, cells = model.known(given)  # cells: those with any given pixel
    z, self_cond = noise, cells * known
    for j, j_prev in model.ddim.timesteps(steps):
        z = M * model.ddim.add_noise(known, noise, j) + (1 - M) * z
        output = model.denoise(z, image_latent, self_cond, j)
        z0 = model.ddim.remove_noise(z, output, j)
        if j_prev >= 0:
            z0 = model.encode(model.likeliest(z0, given))  # given pixels pasted
        z = model.ddim.step(z, z0, j, j_prev)
        self_cond = torch.where(cells, known, z0)
    return z0


def renamed(found, given, min_area):
    """Ids (H x W) and their certainty -> ids, int32: a segment gets the given id (0 = unknown) that
    it covers most, else an unused one. Uncertain and small ones become void, given pixels stay."""
    ids, certainty = found
    of_ids, of_given, pixels = pq.overlaps(ids, given)
    area, enough = data.areas(given), ids.max() + 1 + len(pixels)
    names = np.setdiff1d(np.arange(enough, dtype=np.int32), of_given[of_given > 0])  # unused ids
    for k in pixels.argsort():  # of several that a segment covers the last one stays
        # less than a twentieth of what is given of an id is a click that touches its surroundings
        if of_ids[k] and pixels[k] >= 0.05 * area.get(of_given[k], np.inf):
            names[of_ids[k]] = of_given[k]
    return np.where(given > 0, given, ae.keep(names[ids], certainty, min_area))


def complete_tiles(model, tiles, args):
    """Complete tiles (samples whose image is H x W x 4, int32: a picture and a partial map of any
    ids): of each its ids, which are not yet the given ones, and their certainty."""
    size, factor = model.settings["size"], model.autoencoder.factor
    partial, samples = [], []  # maps in random ids 1..N-1, as in training
    for tile in tiles:
        y, rng = tile["image"][..., 3], np.random.default_rng(args.seed)
        partial.append(data.relabel(y, data.describe(y), model.autoencoder.num_ids, rng)[0])
        samples.append(tile | {"image": tile["image"][..., :3].astype(np.uint8)})
    image_latent, noise = model.inputs(samples, args.seed)
    given = np.stack([data.resize_ids(y, size, size) for y in partial])
    given = torch.from_numpy(given).to(image_latent.device)  # B x S x S
    M = (F.avg_pool2d((given > 0).float()[:, None], factor) >= 0.5).float()  # B x 1 x h x w
    if args.paper:
        z0 = inpaint(model, image_latent, model.encode(given), M, noise, args.steps)
    else:
        z0 = complete(model, image_latent, given, M, noise[0], args.steps)
    for logits, y in zip(model.decode(z0), partial):
        ids, certainty = diffusion.segments(model, logits, *y.shape)
        # pasted here, each given id covers pixels of its own alone, which is how `renamed` knows it
        yield np.where(y > 0, y, ids) if args.paper else ids, certainty


def complete_batch(model, samples, partial, args):
    """Complete partial id maps (H x W, any ids, 0 = unknown) of samples (see `LDM.inputs`) -> list
    of H x W ids. Given ids are kept. args: steps, seed, votes, batch_size, paper."""
    pairs = [s | {"image": np.dstack([s["image"], y])} for s, y in zip(samples, partial)]
    found = sample.predict(model, pairs, args, complete_tiles)
    return [renamed(one, y, model.settings["min_area"]) for one, y in zip(found, partial)]


# ------------------------------------------------------------------------------------ evaluation
def part_of(sample_, stuff, settings, args):
    """Part of a sample's ids (H x W, 0 = unknown): blocks, or clicks but on `stuff` categories."""
    segments = sample_["segments_info"]
    unused = [s["id"] for s in segments if s["iscrowd"] or args.click and s["category_id"] in stuff]
    ids = np.where(np.isin(sample_["ids"], unused), 0, sample_["ids"])
    if not args.click:
        rng = np.random.default_rng((args.seed, 4, *str(sample_["image_id"]).encode()))
        # as many pixels as the network sees of the picture, all tiles together
        height, width = (round(n * settings["size"] / (settings["crop"] or n)) for n in ids.shape)
        blocks = data.drop_blocks(max(height, width), args.drop, args.block, rng)
        return np.where(data.resize_ids(blocks[:height, :width], *ids.shape), ids, 0)
    given = np.zeros_like(ids)
    for i in np.unique(ids[ids > 0]):
        pixels = np.argwhere(ids == i)  # P x 2
        # the pixel nearest to its centre, which may itself lie outside
        middle = pixels[np.linalg.norm(pixels - pixels.mean(0), axis=1).argmin()]
        given[tuple(pixels[np.linalg.norm(pixels - middle, axis=1) <= args.click].T)] = i
    return given


def evaluate(model, dataset, args):
    """Drop and complete a held-out set: a table, pictures. Returns, in percent, PQ and id_accuracy
    (the share of the unknown pixels of given segments that get the right id) of the completion, of
    a sample that is renamed after what is given, and of the input as it is."""
    scores, counts = {name: pq.Score() for name in ("completion", "renamed", "input")}, []
    stuff = [c["id"] for c in dataset.source.categories if not c["isthing"]]

    def complete_samples(samples):
        """Completions of one batch, and pictures of them."""
        partial = [part_of(s, stuff, model.settings, args) for s in samples]
        completed = complete_batch(model, samples, partial, args)
        sampled = sample.predict(model, samples, args)
        for s, y, done, other in zip(samples, partial, completed, sampled):
            # pixels that were not given, of segments that were
            to_find = (y == 0) & np.isin(s["ids"], y[y > 0])
            maps = done, renamed(other, y, model.settings["min_area"]), y
            counts.append([(ids == s["ids"])[to_find].sum() for ids in maps] + [to_find.sum()])
            for score, ids in zip(scores.values(), maps):
                score.update(s, ids)
            yield done, [data.colorize(ids) for ids in (y, done, s["ids"])]

    _, rows = ae.evaluate(dataset, complete_samples, args.batch_size)
    *right, unknown = np.sum(counts, 0).tolist()  # over all images
    figures, what = {}, f"drop {args.drop} block {args.block}"
    for (name, score), pixels in zip(scores.items(), right):
        figures[name] = score.result() | {"id_accuracy": 100 * pixels / max(unknown, 1)}
    print(pq.line([f"click {args.click}" if args.click else what, *figures["input"]], 12))
    for name, row in figures.items():
        print(pq.line([name, *row.values()], 12), flush=True)
    data.sheet(f"{args.out}/inpaint.png", rows, ["image", "given", "completion", "truth"])
    return figures


def sweep(model, dataset, args):
    """Fig. 9, right: the figures of `evaluate` over drop rates and block sizes, and a plot."""
    cells, curves = {}, {}
    blocks = [max(1, model.settings["size"] // n) for n in (32, 16, 8, 4)]
    for args.drop, args.block in itertools.product((0.1, 0.3, 0.5, 0.7, 0.9), blocks):
        figures = cells[f"drop {args.drop} block {args.block}"] = evaluate(model, dataset, args)
        point = args.drop, figures["completion"]["pq"] or 0
        curves.setdefault(f"block {args.block}", []).append(point)
    data.plot(f"{args.out}/inpaint_sweep.png", curves, "drop rate", "PQ")
    print(f"-> {args.out}/inpaint_sweep.png")
    return cells


def complete_file(model, args):
    """--image and --mask: complete a user's own partial mask. Raises BadInput."""
    image, given = data.read_image(args.image), data.read_id_png(args.mask)
    if given.shape != image.shape[:2]:
        raise BadInput(f"--mask {args.mask}: is {given.shape} pixels, the image {image.shape[:2]}")
    stem = Path(args.out, Path(args.image).stem)
    [ids] = complete_batch(model, [{"image": image, "image_id": stem.name}], [given], args)
    data.write_id_png(f"{stem}_completed.png", ids)
    row = [image, data.colorize(given), data.overlay(image, ids)]
    data.sheet(f"{stem}_inpaint.png", [row], ["image", "given", "completion"], cell=256)
    _, segments = model.label(image, ids, merge=False)
    kept = len(data.describe(given))
    added = len(segments) - kept
    print(f"{kept} ids kept, {added} added -> {stem}_completed.png, {stem}_inpaint.png")
    return {"given": kept, "added": added, "segments_info": segments}


@data.command
def main(argv=None):
    """Command line: complete dropped masks of a held-out set, or a user's mask."""
    parser = sample.sampling_parser(__doc__)
    flag = parser.flag
    flag("--steps", data.positive, "sampling steps (default: as the checkpoint says)")
    flag("--drop", data.fraction, "share of dropped blocks (%(default)s)", default=0.5)
    flag("--block", data.positive, "side of a block in px (%(default)s)", default=8)
    flag("--click", data.positive, "instead, clicks of this radius on things", metavar="R")
    flag("--sweep", bool, "drop 0.1..0.9 x blocks of 1/32..1/4 of the side")
    flag("--image", str, "a picture of yours, with --mask")
    flag("--mask", str, "its partial mask: id PNG of the same size, 0 = unknown")
    args = parser.parse_args(argv)
    if bool(args.image) != bool(args.mask):
        raise BadInput("--image and --mask belong together: give both")
    if data.WORLD > 1 or args.click and (args.sweep or args.image):
        raise BadInput("--click goes without --sweep and --image, and all without torchrun")
    device, mixed = data.setup(args)
    model = sample.load(args.ckpt, device, args.paper, args.min_area)
    args.steps = args.steps or model.settings["steps"]
    with mixed:
        if args.image:
            figures = complete_file(model, args)
        else:
            evaluation = sweep if args.sweep else evaluate
            figures = evaluation(model, sample.open_split(model, args), args)
    data.write(args.json, figures)


if __name__ == "__main__":
    main()

"""inpaint.py: complete a partial segmentation, with the ids that it has (paper section 3.3, Algorithm 3; Fig. 6, Fig. 9 right).

    python inpaint.py --drop 0.5 --block 8                # drop half of the 8 x 8 blocks of held-out masks, complete them
    python inpaint.py --click 4                           # complete discs of this radius, one on each object
    python inpaint.py --sweep                             # PQ over drop rate x block size: table and plot
    python inpaint.py --sweep --ae ae.pt --valid 0.05     # with an encoder that ae.py --drop_input taught to read partial maps
    python inpaint.py --image photo.jpg --mask part.png   # complete your own mask (id PNG, 0 = unknown)

Symbols: y the partial id map (0 = unknown), M which latent cells count as given (B x 1 x h x w), z_known = scale * E(y);
the rest as in diffusion.py. A block is `block` pixels of the network's input wide (512 for the paper's model).

Algorithm 3 as printed is `--no-renoise`. There the unknown cells keep their first noise, which speaks for ids of its own
against those given; by default each step draws it anew, which agrees with the given ids far more often (README, Results).
"""
import time
from pathlib import Path

import data
from data import BadInput

parser = data.Parser(__doc__, out="out")
data.sampling_flags(parser, renoise=True)
add = parser.add_argument
add("--steps", type=data.positive, default=50, help="sampling steps (default %(default)s)")
add("--drop", type=data.fraction, default=0.5, help="share of blocks that is dropped (default %(default)s)")
add("--block", type=data.positive, default=8, help="side of a block in pixels of the network's input (default %(default)s)")
add("--valid", type=data.fraction, default=0.5, help="share of given pixels from which a latent cell counts as given (default %(default)s)")
add("--click", type=data.positive, metavar="R", help="instead of blocks give one disc of this radius (pixels of the picture) on each thing")
add("--ae", help="read partially given latent cells with this autoencoder: one that ae.py --drop_input made from the model's own; "
    "needs a --valid below the share that is given")
add("--sweep", action="store_true", help="drop rates 0.1..0.9 x block sizes of 1/32..1/4 of the side")
add("--image", help="a picture of yours, with --mask")
add("--mask", help="its partial mask: id PNG of the same size, 0 = unknown")
if __name__ == "__main__":
    parser.at_once()                                                       # --help and wrong flags need not wait for torch

import numpy as np
import torch
import torch.nn.functional as F

import ae
import diffusion
import sample


@torch.no_grad()
def inpaint(model, image_latent, z_known, M, noise, eps0, steps, fresh=None):
    """Algorithm 3: sample the latent while the given cells are held at their (noised) known value.

    image_latent: B x c x h x w; z_known, noise, eps0: B x 4 x h x w; M: B x 1 x h x w, 1 where given;
    fresh: None is Algorithm 3; a function of j that gives new noise (`diffusion.fresh_noise`) makes the steps stochastic."""
    z, self_cond = noise, torch.zeros_like(noise)
    timesteps = model.ddim.timesteps(steps)
    for j, j_prev in zip(timesteps, timesteps[1:] + [-1]):
        z = M * model.ddim.add_noise(z_known, eps0, j) + (1 - M) * z       # given cells: known latent, noised to j
        output = model.denoise(z, image_latent, self_cond, j)
        z0 = model.ddim.remove_noise(z, output, j)
        z0 = M * z_known + (1 - M) * z0
        self_cond = z0 if model.settings["self_cond"] else self_cond
        z = model.ddim.step(z, z0, j, j_prev, fresh and fresh(j))          # eq. 5
    return z0


@torch.no_grad()
def complete_tiles(model, images, partial, keys, steps, seed, valid, renoise, reader=None):
    """Complete partial id maps: lists of images (H x W x 3, uint8) and maps (H x W, 0..N-1, 0 = unknown) -> list of ids, certainty.

    Parameters: `complete`. A given pixel keeps its id, with certainty 1."""
    device, size, f = next(model.parameters()).device, model.settings["size"], model.autoencoder.factor
    y = torch.from_numpy(np.stack([data.resize_ids(p, size, size) for p in partial]).astype(np.uint8)).to(device)
    z_known, image_latent = model.encode(y), model.encode_image(diffusion.network_input(images, size, device))
    share = F.avg_pool2d((y > 0).float()[:, None], f)                      # of a cell's pixels that are given: B x 1 x h x w
    if reader is not None:
        z_known = torch.where(share < 1, model.scale * reader.encode(y)[0], z_known)
    M = (share >= max(valid, 1e-6)).float()                                # B x 1 x h x w
    noise = diffusion.image_noise(seed, keys, (4, *z_known.shape[2:]), device)
    eps0 = diffusion.image_noise(seed, [f"{k} known" for k in keys], (4, *z_known.shape[2:]), device)
    fresh = diffusion.fresh_noise(seed, keys, (4, *z_known.shape[2:]), device) if renoise else None
    logits = model.decode(inpaint(model, image_latent, z_known, M, noise, eps0, steps, fresh))
    found = [ae.argmax(l, *p.shape) for l, p in zip(logits, partial)]
    return [(np.where(p > 0, p, ids), np.where(p > 0, np.float32(1), certainty)) for p, (ids, certainty) in zip(partial, found)]


def complete(model, images, partial, keys, steps=50, seed=0, valid=0.5, threshold=0.5, renoise=True, votes=1, overlap=0.25, batch_size=16,
             reader=None):
    """Complete partial id maps: lists of images (H x W x 3, uint8) and maps (H x W, 0 = unknown) of any sizes -> list of H x W int32.

    valid: share of given pixels from which a latent cell counts as given. Given pixels keep their ids, segments that the model
    adds get ids above them. votes: as in `sample.predict`. renoise: draw the noise of unknown cells anew at each step; False is Algorithm 3 as printed.
    reader: an `ae.Autoencoder` that reads the cells of which only a part is given (ae.py --drop_input).
    A model that was trained on crops works in tiles. Where a picture, or tile, has more than N - 1 ids, the smaller ones are left aside."""
    side, N, pieces = model.settings["crop"], model.autoencoder.num_ids, []
    names = [np.unique(np.append(y, 0)) if y.max() >= N else None for y in partial]            # large ids are counted through: 0, 1, 2, ...
    partial = [y if known is None else known.searchsorted(y) for y, known in zip(partial, names)]
    all_corners = [sample.tile_corners(*y.shape, side, overlap) if side else [None] for y in partial]
    for image, y, key, corners in zip(images, partial, keys, all_corners):
        parts = zip(sample.cut(image, side, corners), sample.cut(y, side, corners)) if side else [(image, y)]
        for corner, (part, ids) in zip(corners, parts):
            known, place, area = np.unique(ids, return_inverse=True, return_counts=True)       # the tile's ids become 1..N-1
            kept = sorted((k for k in range(len(known)) if known[k]), key=lambda k: -area[k])[:N - 1]
            own = known.copy() if known[-1] < N else np.zeros_like(known)
            if known[-1] >= N:
                own[kept] = np.arange(len(kept)) + 1
            pieces.append((part, own[place.reshape(ids.shape)], key if corner is None else f"{key} at {corner}", dict(zip(own.tolist(), known.tolist()))))
    parts, ids, places, backs = zip(*pieces)
    found = sample.vote(lambda keys, parts, ids: complete_tiles(model, parts, ids, keys, steps, seed, valid, renoise, reader), places, parts, ids,
                        votes=votes, batch_size=batch_size, shared=backs)
    results, done = [], 0
    for y, given, corners in zip(partial, names, all_corners):
        top, tiles = int(y.max()), []
        for (ids, certainty), (*_, back) in zip(found[done:done + len(corners)], pieces[done:]):
            table = np.array([back.get(i, top + i) if i else 0 for i in range(ids.max() + 1)])  # given ids as they were, new ones above them
            tiles.append((table[ids], certainty))
        done += len(corners)
        ids, certainty = sample.stitch(tiles, corners, y.shape, shared=top) if side else tiles[0]
        ids = np.where(y > 0, y, ae.keep(ids, certainty, threshold, model.settings["min_area"]))
        if given is not None:
            ids = np.append(given, given[-1] + 1 + np.arange(ids.max()))[ids]
        results.append(ids.astype(np.int32))
    return results


def drop_blocks(size, drop, block, rng):
    """Which pixels stay given (size x size, bool): each cell of a block x block grid is dropped with probability `drop`."""
    cells = rng.random((-(-size // block),) * 2) >= drop
    return cells.repeat(block, 0).repeat(block, 1)[:size, :size]


def discs(ids, things, radius):
    """Which pixels stay given (H x W, bool) if each thing was clicked on: a disc around the pixel nearest to its centre of gravity."""
    given, (y, x) = np.zeros(ids.shape, bool), np.indices(ids.shape)
    for i in things:
        rows, cols = np.nonzero(ids == i)
        middle = ((rows - rows.mean()) ** 2 + (cols - cols.mean()) ** 2).argmin() if len(rows) else None
        if middle is not None:
            given |= (ids == i) & ((y - rows[middle]) ** 2 + (x - cols[middle]) ** 2 <= radius ** 2)
    return given


def settings(args):
    """What the flags say, as the last parameters of `complete`."""
    return args.steps, args.seed, args.valid, args.threshold, *sample.choices(args), args.reader


def evaluate(model, dataset, drop, block, args, baselines=True):
    """Drop and complete a held-out set: PQ, SQ, RQ in percent by name (inpainting, and as baselines the input as it is
    and sampling without a mask), picture rows, seconds that inpainting took for an image."""
    names = ["inpainting", "input", "sampling"] if baselines else ["inpainting"]
    scores, rows, crop = {n: ae.Score() for n in names}, [], model.settings["crop"]
    size, num_ids, seconds = model.settings["size"], model.autoencoder.num_ids, 0.0
    stuff = {c["id"] for c in data.categories_of(dataset.source) if not c["isthing"]}
    for samples in data.evaluation_batches(dataset, args.batch_size, num_workers=args.num_workers):
        keys, images, truths, infos, partial = [s["image_id"] for s in samples], [s["image"] for s in samples], [], [], []
        for s in samples:
            rng = np.random.default_rng((args.seed, 4, *str(s["image_id"]).encode()))
            new = {i["id"]: 0 if i.get("iscrowd") else i["id"] for i in s["segments_info"]}
            truths.append(data.relabel(s["ids"], s["segments_info"], num_ids, rng, mapping=new) if not crop else
                          np.where(np.isin(s["ids"], [i for i in new if new[i]]), s["ids"], 0))
            infos.append([{**i, "id": new[i["id"]]} for i in s["segments_info"] if new[i["id"]]])
            if args.click:
                given = discs(truths[-1], [i["id"] for i in infos[-1] if i.get("category_id") not in stuff], args.click)
            elif crop:                                                     # a block is so many pixels of what the network sees
                scaled = [max(1, round(n * size / crop)) for n in truths[-1].shape]
                given = data.resize_ids(drop_blocks(max(scaled), drop, block, rng)[:scaled[0], :scaled[1]], *truths[-1].shape)
            else:
                given = data.resize_ids(drop_blocks(size, drop, block, rng), *truths[-1].shape)
            partial.append(np.where(given, truths[-1], 0))
        began = time.time()
        found = {"inpainting": complete(model, images, partial, keys, *settings(args)), "input": partial}
        seconds += time.time() - began
        if baselines:
            found["sampling"] = sample.segment_batch(model, images, keys, args.steps, args.seed, args.threshold, *sample.choices(args))
        for k, (s, truth) in enumerate(zip(samples, truths)):
            for name in names:
                scores[name].update(s, found[name][k], truth, infos[k])
            if len(rows) < 6:
                rows.append([s["image"], data.colorize(partial[k]), data.colorize(found["inpainting"][k]), data.colorize(truth)])
    return {name: diffusion.percent(score.result()) for name, score in scores.items()}, rows, seconds / len(dataset)


def complete_file(model, args, out):
    """--image and --mask: complete a user's own partial mask, keeping its ids. Raises BadInput."""
    image, given = data.read_image(args.image, upright=True), data.read_id_png(args.mask)
    if given.shape != image.shape[:2]:
        raise BadInput(f"--mask {args.mask}: is {given.shape[1]} x {given.shape[0]} pixels, the image {image.shape[1]} x {image.shape[0]}; "
                       "they must be of one size")
    known, num_ids = [int(i) for i in np.unique(given) if i], model.autoencoder.num_ids
    if known and known[-1] > (1 << 24) - 1 - (1 << 16):
        raise BadInput(f"--mask {args.mask}: its id {known[-1]} leaves no room for new ones in 24 bits; number its segments from 1")
    if len(known) > num_ids - 1 and not model.settings["crop"]:
        raise BadInput(f"--mask {args.mask}: holds {len(known)} ids, this model knows {num_ids - 1}")
    began = time.time()
    ids = complete(model, [image], [given], [Path(args.image).stem], *settings(args))[0]
    seconds = time.time() - began
    stem, out_ids = Path(args.image).stem, out / f"{Path(args.image).stem}_completed.png"
    data.write_id_png(out_ids, ids)
    segments_info = sample.label_batch(model, [image], [ids], merge=False)[0][1]
    data.write_json(out / f"{stem}_completed.json", {"file_name": out_ids.name, "segments_info": segments_info})
    row = [image, data.colorize(given), data.colorize(ids), data.overlay(image, ids)]
    data.picture(out / f"{stem}_inpaint.png", [row], ["image", "given", "completion", "overlay"], cell=256)
    added = len(set(np.unique(ids).tolist()) - {0, *known})
    if args.json:
        data.write_json(args.json, {"images": 1, "given": len(known), "added": added, "seconds_per_image": seconds})
    print(f"{len(known)} given ids kept, {added} added -> {out_ids}, {out / f'{stem}_inpaint.png'}")


@data.command
def main(argv=None):
    """Command line: complete dropped masks of a held-out set, sweep over them, or complete a user's mask."""
    args = parser.parse_args(argv)
    diffusion.DDIM().timesteps(args.steps)
    if bool(args.image) != bool(args.mask):
        raise BadInput("--image and --mask belong together: give both")
    if args.click and (args.sweep or args.image):
        raise BadInput("--click: clicks on a held-out set; it does not go with --sweep or --image")
    device, _, world = ae.setup(args)
    ae.alone(world, "inpaint.py")
    model, out = sample.open_model(args, device), Path(args.out)
    args.reader = reader = ae.load_autoencoder(args.ae).to(device) if args.ae else None
    if args.ae:
        own = model.autoencoder.decoder.state_dict()
        if reader.settings != model.autoencoder.settings or not all(torch.equal(v, own[k]) for k, v in reader.decoder.state_dict().items()):
            raise BadInput(f"--ae {args.ae}: its decoder is not this model's; make it with ae.py --ckpt MODEL --drop_input")
    with ae.autocast(ae.pick_precision(args.precision, device), device):
        if args.image:
            return complete_file(model, args, out)
        dataset, size = sample.open_split(model, args), model.settings["size"]
        if args.block > size:
            raise BadInput(f"--block {args.block}: larger than the network's input of {size} px")
        if not args.sweep:
            results, rows, seconds = evaluate(model, dataset, args.drop, args.block, args)
            given = f"discs of radius {args.click}" if args.click else f"drop {args.drop}, block {args.block}"
            print(f"{len(dataset)} images, {given}, {args.steps} steps, seed {args.seed}\n{'':12}{sample.table_of(results['input'])[0]}")
            for name, r in results.items():
                print(f"{name:12}{sample.table_of(r)[1]}")
            data.picture(out / "inpaint.png", rows, ["image", "given", "completion", "truth"])
            print(f"-> {out / 'inpaint.png'}")
            figures = {**results["inpainting"], "pq_input": results["input"]["pq"], "pq_sampling": results["sampling"]["pq"],
                       **({"click": args.click} if args.click else {"drop": args.drop, "block": args.block})}
        else:
            drops, blocks = (0.1, 0.3, 0.5, 0.7, 0.9), sorted({max(1, size // d) for d in (32, 16, 8, 4)})
            lines = ["| drop \\ block |" + "".join(f" {b} |" for b in blocks), "|---|" + "---|" * len(blocks)]
            print(f"PQ of {len(dataset)} images, {args.steps} steps, seed {args.seed}\n" + "\n".join(lines))
            cells = {}
            for drop in drops:
                cells[drop] = [evaluate(model, dataset, drop, block, args, baselines=False) for block in blocks]
                lines.append(f"| {drop} |" + "".join(f" {r['inpainting']['pq']:.1f} |" for r, _, _ in cells[drop]))
                print(lines[-1], flush=True)
            (out / "inpaint_sweep.md").write_text("\n".join(lines) + "\n")
            curves = {f"block {b}": (drops, [cells[d][k][0]["inpainting"]["pq"] for d in drops]) for k, b in enumerate(blocks)}
            data.plot(out / "inpaint_sweep.png", curves, "drop rate", "PQ")
            examples = [[part for _, rows, _ in row for part in rows[0][1:3]] for row in cells.values()]     # of the first image
            data.picture(out / "inpaint_examples.png", examples, [t for b in blocks for t in (f"block {b}: given", "completion")],
                         notes=[f"drop {d}" for d in drops], cell=96)
            print(f"-> {out / 'inpaint_sweep.md'}, {out / 'inpaint_sweep.png'}, {out / 'inpaint_examples.png'}")
            every = [cell for row in cells.values() for cell in row]
            seconds = float(np.mean([s for _, _, s in every]))             # pq, sq, rq: the mean over the grid
            figures = {**{k: float(np.mean([r["inpainting"][k] for r, _, _ in every])) for k in ("pq", "sq", "rq")}, "blocks": blocks,
                       "pq_by_drop": {str(d): [r["inpainting"]["pq"] for r, _, _ in row] for d, row in cells.items()}}
    if args.json:
        data.write_json(args.json, {**figures, "images": len(dataset), "seconds_per_image": seconds})


if __name__ == "__main__":
    main()

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
given pixels pasted. A segmenter that matches its outputs to objects can't do that. But which segment
has which id is decided at high noise, where held cells say almost nothing. So by default (`complete`,
beyond the paper) the given ids are first given the names that the noise would choose.
"""

import time
from pathlib import Path

import data  # before torch: it sets what PyTorch reads on loading
import numpy as np
import torch
import torch.nn.functional as F

import ae
import diffusion
import pq
import sample
from data import BadInput, world


@torch.no_grad()
def inpaint(model, image_latent, known, M, noise, steps):
    """Algorithm 3: sample the latent while given cells are held at their (noised) known value.

    known: B x 4 x h x w; M: B x 1 x h x w, 1 = given; noise: two of B x 4 x h x w, where sampling
    begins and what the given cells are noised with."""
    (z, eps0), self_cond = noise, torch.zeros_like(known)
    for j, j_prev in model.schedule(steps):
        z = M * model.ddim.add_noise(known, eps0, j) + (1 - M) * z  # given cells: noised to j
        output = model.denoise(z, image_latent, self_cond, j)
        z0 = model.ddim.remove_noise(z, output, j)
        z0 = M * known + (1 - M) * z0
        self_cond = z0
        z = model.ddim.step(z, z0, j, j_prev)  # eq. 5
    return z0


@torch.no_grad()
def complete(model, image_latent, given, noise, steps, fresh=None):
    """What is done by default, beyond the paper: B x 4 x h x w, from given ids (B x S x S).

    Which segment gets which id is decided by the noise, where held cells say almost nothing. So the
    given ids are first renamed after what the model makes of this noise by itself: names that the
    noise agrees with. Then Algorithm 3, but the given part is told to the network from the start,
    where it looks for its last estimate (trained by diffusion.py --given), and pasted into each
    estimate's pixels. noise: B x 4 x h x w; fresh: as in `LDM.sample`."""
    passes = model.settings["distill"] or steps
    own = model.likeliest(model.sample(image_latent, noise, passes)).cpu().numpy()
    given = [diffusion.rename(y, ids) for y, ids in zip(given.cpu().numpy(), own)]
    given = torch.from_numpy(np.stack(given)).to(noise.device)  # B x S x S
    known, cells = model.known(given)  # cells: those with any given pixel
    M = F.avg_pool2d((given > 0).float()[:, None], model.autoencoder.factor) >= 0.5
    z, self_cond = noise, cells * known
    for j, j_prev in model.schedule(steps):
        z = torch.where(M, model.ddim.add_noise(known, noise, j), z)
        output = model.denoise(z, image_latent, self_cond, j)
        z0 = model.ddim.remove_noise(z, output, j)
        if j_prev >= 0:
            z0 = model.encode(model.likeliest(z0, given))
        z = model.ddim.step(z, z0, j, j_prev, fresh and fresh(j))
        self_cond = torch.where(cells, known, z0)
    return z0


def renamed(ids, given):
    """An id map (H x W) whose segments get the given id (0 = unknown) that they cover most, one to
    one; given pixels are pasted."""
    return np.where(given > 0, given, diffusion.rename(ids, given, np.unique(given).tolist()))


def complete_tiles(model, keys, tiles, args, above):
    """Complete some tiles, each an image and a partial map of any ids: ids and certainty of each.

    In here a tile's ids are 1, 2, ..., the largest N - 1 of them; what is added gets ids above all.
    """
    images, partial = zip(*tiles)
    size, most = model.settings["size"], model.autoencoder.num_ids - 1
    names, local = [], []
    for y in partial:
        listed = sorted(data.describe(y), key=lambda s: -s["area"])[:most]
        names.append(np.array([0, *sorted(s["id"] for s in listed)]))
        local.append(np.where(np.isin(y, names[-1]), names[-1].searchsorted(y), 0))
    image_latent = model.encode_image(diffusion.network_input(model, images))  # B x c x h x w
    given = torch.from_numpy(np.stack([data.resize_ids(y, size, size) for y in local]))
    given = given.to(image_latent.device)  # B x S x S
    noise, fresh = diffusion.noises(model, image_latent, keys, args.seed)
    if args.paper:
        eps0, _ = diffusion.noises(model, image_latent, [f"{k} known" for k in keys], args.seed)
        M = (F.avg_pool2d((given > 0).float()[:, None], model.autoencoder.factor) >= 0.5).float()
        z0 = inpaint(model, image_latent, model.encode(given), M, (noise, eps0), args.steps)
    else:
        z0 = complete(model, image_latent, given, noise, args.steps, fresh)
    found = []
    for logits, y, known in zip(model.decode(z0), local, names):
        ids, certainty = diffusion.segments(model, logits, *y.shape)
        ids = np.where(y > 0, y, ids) if args.paper else renamed(ids, y)
        added = above + np.arange(max(0, ids.max() + 1 - len(known)))
        ids = np.append(known, added + 1)[ids]
        found.append((ids, np.where(y > 0, np.float32(1), certainty)))
    return found


def complete_batch(model, images, partial, keys, args):
    """Complete partial id maps: lists of images (H x W x 3, uint8) and maps (H x W, any ids, 0 =
    unknown) of any sizes -> list of H x W int32. Given pixels keep their ids, what the model adds
    gets ids above them. args: steps, seed, votes, batch_size, paper."""
    names = [np.unique(np.append(y, 0)) for y in partial]
    counted = [known.searchsorted(y) for y, known in zip(partial, names)]  # 0, 1, 2, ...
    above = max(map(len, names))

    def draw(keys, tiles):
        """One sample of some tiles."""
        return complete_tiles(model, keys, tiles, args, above)

    pairs, shared = list(zip(images, counted)), [above] * len(images)
    results = []
    for (image, y), known, one in zip(
        pairs, names, sample.in_tiles(model, pairs, keys, draw, args, shared)
    ):
        ids = diffusion.keep(model, image, *one)
        ids = np.where(y > 0, y, ids)
        added = known[-1] + np.arange(1, max(0, ids.max() + 1 - len(known)) + 1)
        results.append(np.append(known, added)[ids].astype(np.int32))
    return results


# ------------------------------------------------------------------------------------ evaluation


def given_pixels(sample_, stuff, args, side):
    """Which pixels of a sample are given (H x W, bool): a click on each thing, or blocks.

    side: of what the network sees, in pixels of the picture and of its input."""
    ids = sample_["ids"]
    if not args.click:
        rng = np.random.default_rng((args.seed, 4, *str(sample_["image_id"]).encode()))
        scaled = [max(1, round(n * side[1] / side[0])) if side[0] else side[1] for n in ids.shape]
        blocks = data.drop_blocks(max(scaled), args.drop, args.block, rng)
        return data.resize_ids(blocks[: scaled[0], : scaled[1]], *ids.shape)
    given = np.zeros(ids.shape, bool)
    for s in sample_["segments_info"]:
        pixels = np.argwhere(ids == s["id"])
        if s["category_id"] not in stuff and len(pixels):
            middle = pixels[np.linalg.norm(pixels - pixels.mean(0), axis=1).argmin()]
            given[tuple(pixels[data.stroke(pixels, middle, middle, args.click)].T)] = True
    return given


def evaluate(model, dataset, args):
    """Drop and complete a held-out set. Returns, in percent, PQ and id_accuracy (the share of the unknown
    pixels of given segments that get the right id) of the completion, of the input as it is and of a sample that is
    renamed after the input; and picture rows."""
    scores = {name: pq.Score() for name in ("completion", "input", "renamed")}
    right, unknown = dict.fromkeys(scores, 0), 0
    stuff = {c["id"] for c in dataset.source.categories if not c["isthing"]}
    side = model.settings["crop"], model.settings["size"]

    def predict(samples):
        """Completions of one batch."""
        nonlocal unknown
        images, keys = [s["image"] for s in samples], [s["image_id"] for s in samples]
        truths, partial = [], []
        for s in samples:
            listed = [i["id"] for i in s["segments_info"] if not i["iscrowd"]]
            truths.append(np.where(np.isin(s["ids"], listed), s["ids"], 0))
            partial.append(np.where(given_pixels(s, stuff, args, side), truths[-1], 0))
        drawn = sample.predict(model, images, keys, args)
        drawn = [
            renamed(diffusion.keep(model, i, *d), y) for i, d, y in zip(images, drawn, partial)
        ]
        done = complete_batch(model, images, partial, keys, args)
        for k, (s, truth, y) in enumerate(zip(samples, truths, partial)):
            to_find = (y == 0) & (truth > 0) & np.isin(truth, y)
            unknown += to_find.sum()
            for name, ids in (("completion", done[k]), ("input", y), ("renamed", drawn[k])):
                right[name] += (ids == truth)[to_find].sum()
                scores[name].update(s, ids)
            yield done[k], [data.colorize(m) for m in (y, done[k], truth)]

    _, rows = ae.evaluate(dataset, predict, args.batch_size)
    figures = {name: pq.percent(score.result()) for name, score in scores.items()}
    for name, found in right.items():
        figures[name]["id_accuracy"] = 100 * float(found) / max(int(unknown), 1)
    return figures, rows


def sweep(model, dataset, args):
    """Fig. 9, right: PQ and id accuracy over drop rates and block sizes: a table and a plot."""
    size, cells, curves = model.settings["size"], {}, {}
    blocks = sorted({max(1, size // d) for d in (32, 16, 8, 4)})
    lines = ["| drop |" + "".join(f" block {b} |" for b in blocks), "|---|" + "---|" * len(blocks)]
    print("PQ / id accuracy (both of sampling and renaming)\n" + "\n".join(lines))
    for args.drop in (0.1, 0.3, 0.5, 0.7, 0.9):
        row = [args.drop]
        for args.block in blocks:
            figures, _ = evaluate(model, dataset, args)
            cells[f"drop {args.drop} block {args.block}"] = figures
            ours, base = figures["completion"], figures["renamed"]
            curves.setdefault(f"block {args.block}", []).append((args.drop, ours["pq"]))
            pairs = ours["pq"], ours["id_accuracy"], base["pq"], base["id_accuracy"]
            row.append("{:.1f} / {:.1f} ({:.1f} / {:.1f})".format(*pairs))
        lines.append("".join(f"| {cell} " for cell in row) + "|")
        print(lines[-1], flush=True)
    with data.replacing(f"{args.out}/inpaint_sweep.md") as file:
        file.write_text("\n".join(lines) + "\n")
    data.plot(f"{args.out}/inpaint_sweep.png", curves, "drop rate", "PQ")
    print(f"-> {args.out}/inpaint_sweep.md, {args.out}/inpaint_sweep.png")
    return cells


def complete_file(model, args):
    """--image and --mask: complete a user's own partial mask. Raises BadInput."""
    image, given = data.read_image(args.image), data.read_id_png(args.mask)
    if given.shape != image.shape[:2]:
        sizes = [f"{x.shape[1]} x {x.shape[0]}" for x in (given, image)]
        raise BadInput(f"--mask {args.mask}: is {sizes[0]} pixels, the image {sizes[1]}")
    known = np.unique(given[given > 0])
    if len(known) and known[-1] > data.MAX_ID - (1 << 16):
        raise BadInput(f"--mask {args.mask}: id {known[-1]} leaves no room for more: count from 1")
    if len(known) >= model.autoencoder.num_ids and not model.settings["crop"]:
        most = model.autoencoder.num_ids - 1
        raise BadInput(f"--mask {args.mask}: holds {len(known)} ids, this model knows {most}")
    began, stem = time.time(), Path(args.out, Path(args.image).stem)
    ids = complete_batch(model, [image], [given], [stem.name], args)[0]
    seconds = time.time() - began
    data.write_id_png(f"{stem}_completed.png", ids)
    _, info = sample.label(model, [image], [ids], merge=False)[0]
    content = {"file_name": f"{stem.name}_completed.png", "segments_info": info}
    data.write_json(f"{stem}_completed.json", content)
    row = [image, data.colorize(given), data.colorize(ids), data.overlay(image, ids)]
    page = data.sheet([row], ["image", "given", "completion", "overlay"], cell=256)
    data.picture(f"{stem}_inpaint.png", page)
    added = len(set(np.unique(ids).tolist()) - {0, *known.tolist()})
    print(f"{len(known)} ids kept, {added} added -> {stem}_completed.png, {stem}_inpaint.png")
    return {"given": len(known), "added": added, "seconds_per_image": seconds}


def flags():
    """The command line."""
    parser = sample.sampling_parser(__doc__)
    add = parser.add_argument
    add("--steps", type=data.positive, help="sampling steps (default: as the checkpoint says)")
    add("--drop", type=data.fraction, default=0.5, help="share of dropped blocks (%(default)s)")
    add("--block", type=data.positive, default=8, help="side of a block in px (%(default)s)")
    add(
        "--click",
        type=data.positive,
        metavar="R",
        help="instead a click of this radius on each thing",
    )
    add(
        "--sweep", action="store_true", help="drop rates 0.1..0.9 x blocks of 1/32..1/4 of the side"
    )
    add("--image", help="a picture of yours, with --mask")
    add("--mask", help="its partial mask: id PNG of the same size, 0 = unknown")
    return parser


@data.command
def main(argv=None):
    """Command line: complete dropped masks of a held-out set, or a user's mask."""
    args = flags().parse_args(argv)
    if bool(args.image) != bool(args.mask):
        raise BadInput("--image and --mask belong together: give both")
    if world() > 1 or args.click and (args.sweep or args.image):
        raise BadInput("--click goes without --sweep and --image, and all without torchrun")
    device = data.setup(args)
    model = sample.open_model(args, device)
    args.steps = args.steps or model.settings["steps"]
    model.ddim.timesteps(args.steps)
    with data.autocast(args, device):
        if args.image:
            figures = complete_file(model, args)
        elif args.sweep:
            figures = sweep(model, sample.open_split(model, args), args)
        else:
            dataset, began = sample.open_split(model, args), time.time()
            figures, rows = evaluate(model, dataset, args)
            what = f"clicks of radius {args.click}" if args.click else f"drop {args.drop}"
            print(f"{len(dataset)} images, {what}, block {args.block}, {args.steps} steps")
            print(pq.line(["", *figures["input"]], 12))
            for name, row in figures.items():
                print(pq.line([name, *row.values()], 12))
            page = data.sheet(rows, ["image", "given", "completion", "truth"])
            data.picture(f"{args.out}/inpaint.png", page)
            print(f"-> {args.out}/inpaint.png")
            seconds = (time.time() - began) / len(dataset)
            figures |= {"images": len(dataset), "seconds_per_image": seconds}
    if args.json:
        data.write_json(args.json, figures)


if __name__ == "__main__":
    main()

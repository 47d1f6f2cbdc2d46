# make demo: see it work   make test: run the tests   make train: the weights of the scenes   make format: black
PYTHON ?= python3
BIN = .venv/bin/python

.venv/ready: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed: make PYTHON=python3.12 ...") if sys.version_info < (3, 10) else None'
	$(PYTHON) -m venv .venv
	$(BIN) -m pip install --quiet --upgrade pip
	$(BIN) -m pip install --quiet -r requirements.txt pytest
	touch $@

# The main job first: masks from the shipped weights. Then completion, then a taste of both trainings.
demo: .venv/ready
	@echo "== 1. Segment 24 scenes that the shipped model has never seen, in one and in four passes of its network."
	@echo "      PQ is panoptic quality in percent (100: every segment is found with its exact outline)."
	$(BIN) sample.py --ckpt assets/shapes.pt --limit 24 --steps 1 4 --out out/demo
	@echo "== 2. Complete a map of which half of the 8 x 8 blocks is given. id_accuracy: of the pixels that were"
	@echo "      not given, the percentage that gets the id of its segment."
	$(BIN) inpaint.py --ckpt assets/shapes.pt --limit 24 --drop 0.5 --block 8 --steps 4 --out out/demo
	@echo "== 3. A taste of training, stage 1: an autoencoder learns to compress id maps. PQ is that of its copies."
	$(BIN) ae.py --model small --data shapes --iters 120 --out out/taste
	@echo "== 4. A taste of training, stage 2: a UNet learns to denoise their latents, given the image. The loss"
	@echo "      falls; PQ stays near 0 for so short a training (the real one takes hours)."
	$(BIN) diffusion.py --iters 30 --out out/taste
	@echo "== Look at: out/demo/sample.png  out/demo/inpaint.png  out/taste/ae.png"

# A recipe for the weights of the built-in scenes: stage 1, stage 2, few passes, classes.
SHAPES = checkpoints/shapes
train: .venv/ready
	$(BIN) ae.py --model small --data shapes --out $(SHAPES)
	$(BIN) diffusion.py --given 0.4 --out $(SHAPES)
	$(BIN) diffusion.py --ckpt $(SHAPES)/ldm.pt --given 0.4 --distill 4 --lr 5e-4 --iters 500 --out $(SHAPES)
	$(BIN) diffusion.py --ckpt $(SHAPES)/ldm.pt --given 0.4 --distill 1 --lr 5e-4 --iters 5000 --out $(SHAPES)
	$(BIN) diffusion.py --ckpt $(SHAPES)/ldm.pt --classes --lr 2e-3 --iters 1200 --out $(SHAPES)

test: .venv/ready
	$(BIN) -m pytest -q test_all.py

format: .venv/ready
	$(BIN) -m pip install --quiet black
	$(BIN) -m black -q *.py

.PHONY: demo test train format

"""
What the toy's BACH images give away without learning: eva's probe on colour, on random filters, on random ViTs.

    python bench/toy_baselines.py --bach_dir=data/toy/bach     # after prepare/toy.py; a minute on one core
"""
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import eval_bach
import model
from configurator import configure

bach_dir = "data/toy/bach"


def score(name, features):
    result = eval_bach.probe(features, eval_bach.LABELS, eval_bach.TRAIN_INDEX, eval_bach.VAL_INDEX)
    print(f"{name:34} BACH {result['bach']:.3f} +- {result['std']:.3f}, plateau {result['plateau']:.3f}")


def standardise(features):
    train = features[eval_bach.TRAIN_INDEX]
    return (features - train.mean(0)) / (train.std(0) + 1e-9)


def filter_bank(images):
    """Log energies of 12 random zero-mean 7 x 7 filters at five octaves of grey images, each normalised: (n, 120)."""
    x = images.mean(1, keepdim=True)
    x = (x - x.mean((2, 3), keepdim=True)) / x.std((2, 3), keepdim=True)
    generator, energies = torch.Generator().manual_seed(0), []
    for _ in range(5):
        w = torch.randn(12, 1, 7, 7, generator=generator)
        y = F.conv2d(x, w - w.mean((2, 3), keepdim=True))
        energies += [y.abs().mean((2, 3)).log(), y.square().mean((2, 3)).log()]
        x = F.avg_pool2d(x, 2)
    return torch.cat(energies, 1)


if __name__ == "__main__":
    configure(globals())
    pixels = eval_bach.load_pixels(bach_dir)
    images = pixels.float() / 255
    score("mean and std of RGB", standardise(torch.cat([images.mean((2, 3)), images.std((2, 3))], 1)))
    score("random filter bank on grey", standardise(filter_bank(images)))
    for seed in range(3):
        torch.manual_seed(seed)
        vit = model.ViT(model.ARCHS["toy"])
        score(f"random toy ViT, seed {seed}", eval_bach.embed(vit, pixels, *model.NORMS["imagenet"], "cpu"))

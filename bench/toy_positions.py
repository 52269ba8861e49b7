"""
What of a position table an encoder needs before it has trained on: BACH at step 0 with parts of it drawn anew.

    python bench/toy_positions.py      # after bench/toy_ablations.py, or config/toy_pretrain.py; five minutes, one core

The encoder of config/toy_pretrain.py is read as config/toy_continue.py reads it, its table resampled to the training
grid; then the class token's slot, the patches', or both are drawn as OpenMidnight's released run drew all of it, normal
with std 0.02. `table` is the std of the trained table itself.
"""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import eval_bach
import model
from configurator import configure

weights = "out/toy_pretrain/teacher/300.pth"
bach_dir = "data/toy/bach"
grid = 6
draws = 5


def score(vit, table, pixels):
    vit.pos_embed.data = table
    features = eval_bach.embed(vit, pixels, *model.NORMS["imagenet"], "cpu")
    return eval_bach.probe(features, eval_bach.LABELS, eval_bach.TRAIN_INDEX, eval_bach.VAL_INDEX)["bach"]


if __name__ == "__main__":
    configure(globals())
    pixels = eval_bach.load_pixels(bach_dir)
    c = model.replace(model.ARCHS["toy"], pos_grid=grid)
    vit, state = model.ViT(c), model.first_weights(weights, c)
    vit.load_state_dict(state)
    trained = state["pos_embed"].clone()
    print(f"table: class token's slot {trained[:, 0].std():.3f}, patches {trained[:, 1:].std():.3f}")
    print(f"resampled               BACH {score(vit, trained, pixels):.3f}")
    parts = {"class token drawn": slice(0, 1), "patches drawn": slice(1, None), "all drawn": slice(None)}
    for name, slots in parts.items():
        found = []
        for draw in range(draws):
            table = trained.clone()
            generator = torch.Generator().manual_seed(1000 + draw)
            drawn = torch.nn.init.trunc_normal_(torch.empty_like(table), std=0.02, generator=generator)
            table[:, slots] = drawn[:, slots]
            found.append(score(vit, table, pixels))
        print(f"{name:23} BACH {sum(found) / draws:.3f}, " + " ".join(f"{x:.3f}" for x in found), flush=True)

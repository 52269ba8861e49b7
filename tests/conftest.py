import torch

torch.set_num_threads(1)  # the networks of the tests are too small to gain from more, and CI machines are shared

# question: which of the toy's answers hold when training continues from an encoder, as ours does from Meta's?
# parent:   config/toy.py
# run:      python train.py config/toy_continue.py     (after config/toy_pretrain.py)
# result:   docs/toy.md
from pathlib import Path

exec(Path(__file__).with_name("toy.py").read_text())
out_dir = "out/toy_continue"
weights = "out/toy_pretrain/teacher/300.pth"
max_steps = 100
eval_interval = 50

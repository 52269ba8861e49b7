# question: clip 3 is OpenMidnight's value, clip 30 DINOv3's; what does 3 give?   parent: config/vitg.py
# run:      torchrun --nproc_per_node=8 train.py config/vitg_clip3.py
# result:   not run yet
exec(open("config/vitg.py").read())
out_dir = "out/vitg_clip3"
clip_grad = 3.0

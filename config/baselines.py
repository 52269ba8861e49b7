# question: where does training start, and what is there to reach? BACH of untouched checkpoints, no training
# run:      python eval_bach.py config/baselines.py
# result:   not run yet; others report DINOv2 ViT-g 0.725, Midnight-12k 0.904, OpenMidnight 0.916
# What is there is scored; what is missing is named, with the command or page that gets it (docs/data.md). Each gets the
# pixel statistics that it was trained with, and ViT-g without registers also those with which Midnight's table has its
# 0.724. teacher_checkpoint.pth is OpenMidnight's, as its README names it.
bach_dir = "data/BACH"
_FILES = [
    ("dinov2_vitg14_pretrain.pth", "half"),
    ("dinov2_vitg14_pretrain.pth", "imagenet"),
    ("dinov2_vitg14_reg4_pretrain.pth", "imagenet"),
    ("dinov2_vitl14_reg4_pretrain.pth", "imagenet"),
    ("dinov2_vits14_reg4_pretrain.pth", "imagenet"),
    ("dinov3_vitl16_pretrain_lvd1689m-8aa4cbdd.pth", "imagenet"),
    ("dinov3_vith16plus_pretrain_lvd1689m-7c1da9a5.pth", "imagenet"),
    ("dinov3_vit7b16_pretrain_lvd1689m-a955f4ea.pth", "imagenet"),
    ("midnight", "half"),
    ("teacher_checkpoint.pth", "imagenet"),
]
weights = ",".join(f"data/weights/{name}" for name, _ in _FILES)
norm = ",".join(norm for _, norm in _FILES)

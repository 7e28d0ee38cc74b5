"""Tasks beyond classification: segmentation (Cityscapes' format), detection (COCO's); see `task.Task`."""

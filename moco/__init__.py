"""Supervised contrastive learning with momentum contrast: MoCo v2 with a label-aware queue."""

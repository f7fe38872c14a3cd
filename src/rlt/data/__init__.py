"""Labelled video: manifests and how they are made, sampling, augmentation, and batches of packed tokens."""

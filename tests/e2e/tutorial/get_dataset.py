"""Split a dataset of the hub, or a local folder in its form, into jsonl files for training and validation.

The tutorial's dataset is ola13/small-the_pile; the environment variable DATASET names
another one.
"""

import os

import datasets

source = os.environ.get("DATASET", "ola13/small-the_pile")
parts = datasets.load_dataset(source, split="train").train_test_split(
    test_size=0.01, seed=42
)
parts["train"].to_json("data/train/small-the_pile.train.jsonl")
parts["test"].to_json("data/val/small-the_pile.val.jsonl")

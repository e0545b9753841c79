"""Sentence vectors by sentence-transformers, as often as it is asked: run by the peers' Python.

python sentence_vectors.py MODEL TEXTS OUT --length 256 --batch 32 --threads 2

TEXTS is a JSON list. Each line of standard input is a number: so many of the texts, from the first, are read, their
vectors are saved to OUT (.npy, float32), and a JSON object with the seconds that reading took is printed.
"""

import argparse
import json
import sys
import time

import numpy as np
import torch
from sentence_transformers import SentenceTransformer


def arguments():
    """The command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("texts")
    parser.add_argument("out")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def main():
    given = arguments()
    torch.set_num_threads(given.threads)
    with open(given.texts, encoding="utf-8") as file:
        texts = json.load(file)
    model = SentenceTransformer(given.model, device="cpu")
    model.max_seq_length = given.length
    for line in sys.stdin:
        some = texts[: int(line)]
        began = time.perf_counter()
        vectors = model.encode(some, batch_size=given.batch, show_progress_bar=False)
        seconds = time.perf_counter() - began
        np.save(given.out, vectors)
        print(json.dumps({"seconds": seconds}), flush=True)


if __name__ == "__main__":
    main()

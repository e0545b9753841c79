"""llama.cpp by llama-cpp-python, built for this CPU, as often as it is asked: run by the peers' Python.

python llama_engine.py --threads 2

Each line of standard input is a JSON object with "file" (GGUF) and "do"; what that gives is printed as one:

- "write": "prompt" ids, "new": greedy "ids" behind it, "first" (seconds until the first), "seconds" of the others;
- "serve": "prompts", "new", "slots": all of them through the batch API, so many sequences at once, a new one as soon as
  one ends, prompts read whole beside the others' tokens: "seconds", and "first" of each prompt since its turn came;
- "score": "rows" of ids: the summed "nll" of each row's tokens but the first, in nats.

A file is loaded on its first use and kept; standard error is not its own.
"""

import argparse
import ctypes
import json
import sys
import time

import llama_cpp as api
import numpy as np

PASS = 512  # tokens of one pass, as there and here


class Model:
    """One file, and the context that it was last asked with."""

    def __init__(self, file, threads):
        self.model = api.llama_model_load_from_file(file.encode(), api.llama_model_default_params())
        if not self.model:
            raise SystemExit(f"llama.cpp cannot load {file}")
        self.vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self.model))
        self.threads, self.context, self.shape = threads, None, None

    def open(self, length, sequences):
        """An empty cache of `length` tokens for each sequence."""
        if self.shape != (length, sequences):
            if self.context:
                api.llama_free(self.context)
            given = api.llama_context_default_params()
            given.n_ctx, given.n_seq_max = length * sequences, sequences
            given.n_batch, given.n_ubatch = max(PASS, length), PASS
            given.n_threads = given.n_threads_batch = self.threads
            self.context, self.shape = api.llama_init_from_model(self.model, given), (length, sequences)
            self.batch = api.llama_batch_init(max(PASS, length) + sequences, 0, 1)
        self.clear()

    def clear(self):
        api.llama_memory_clear(api.llama_get_memory(self.context), True)

    def leave(self, sequence):
        api.llama_memory_seq_rm(api.llama_get_memory(self.context), sequence, -1, -1)

    def read(self, rows):
        """One pass over (sequence, first place, ids, whether all are scored) of each row; the places of the scores."""
        batch, count, wanted = self.batch, 0, []
        for sequence, start, ids, scored in rows:
            for number, token in enumerate(ids):
                batch.token[count], batch.pos[count] = token, start + number
                batch.n_seq_id[count], batch.seq_id[count][0] = 1, sequence
                batch.logits[count] = scored or number == len(ids) - 1
                if batch.logits[count]:
                    wanted.append(count)
                count += 1
        batch.n_tokens = count
        if problem := api.llama_decode(self.context, batch):
            raise SystemExit(f"llama_decode gave {problem}")
        return wanted

    def scores(self, place):
        found = api.llama_get_logits_ith(self.context, place)
        return np.ctypeslib.as_array(ctypes.cast(found, ctypes.POINTER(ctypes.c_float)), (self.vocab,))

    def best(self, place):
        return int(self.scores(place).argmax())


def write(model, prompt, new):
    """Greedy, one sequence."""
    model.open(-(-(len(prompt) + new) // 256) * 256, 1)
    began = time.perf_counter()
    ids = [model.best(model.read([(0, 0, prompt, False)])[-1])]
    first = time.perf_counter() - began
    for place in range(len(prompt), len(prompt) + new - 1):
        ids.append(model.best(model.read([(0, place, ids[-1:], False)])[0]))
    return {"ids": ids, "first": first, "seconds": time.perf_counter() - began - first}


def serve(model, prompts, new, slots):
    """All prompts, `slots` at once."""
    model.open(-(-(max(map(len, prompts)) + new) // 256) * 256, slots)
    left, going, first = list(enumerate(prompts))[::-1], {}, [0.0] * len(prompts)
    since = dict.fromkeys(range(slots), time.perf_counter())
    began = time.perf_counter()
    while left or going:
        rows = [(slot, place, [token], False) for slot, (_, place, token, _) in going.items()]
        free = PASS - len(rows)
        for slot in sorted(set(range(slots)) - going.keys(), key=since.get):
            if not left or len(left[-1][1]) > free:
                break
            number, prompt = left.pop()
            going[slot] = (number, 0, 0, 0)
            free -= len(prompt)
            rows.append((slot, 0, prompt, False))
        for (slot, start, ids, _), place in zip(rows, model.read(rows), strict=True):
            number, _, _, written = going[slot]
            token = model.best(place)
            if not written:
                first[number] = time.perf_counter() - since[slot]
            going[slot] = (number, start + len(ids), token, written + 1)
            if written + 1 == new:
                del going[slot]
                model.leave(slot)
                since[slot] = time.perf_counter()
    return {"seconds": time.perf_counter() - began, "first": first}


def score(model, rows):
    """Each row by itself."""
    found = []
    for ids in rows:
        model.open(-(-len(ids) // 256) * 256, 1)
        total = 0.0
        for place, target in zip(model.read([(0, 0, ids, True)]), ids[1:], strict=False):
            logits = model.scores(place).astype(np.float64)
            top = logits.max()
            total += top + np.log(np.exp(logits - top).sum()) - logits[target]
        found.append(total)
    return {"nll": found}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    quiet = api.llama_log_callback(lambda *_: None)
    api.llama_log_set(quiet, None)
    api.llama_backend_init()
    models = {}
    for line in sys.stdin:
        job = json.loads(line)
        file, do = job.pop("file"), job.pop("do")
        if file not in models:
            models[file] = Model(file, given.threads)
        print(
            json.dumps({"write": write, "serve": serve, "score": score}[do](models[file], **job)), flush=True
        )


if __name__ == "__main__":
    main()

"""llama.cpp by the xllamacpp wheel: ids, greedy tokens and chats of a GGUF file, run by the peers' Python.

python llama_wheel.py FILE JOB.json [--threads 1]

JOB: {"texts": [...], "prompts": [[id, ...], ...], "chats": [[message, ...], ...], "tokens": N}. Prints one JSON
object: "ids" of the texts, with what the file says to put before them, "written" ids behind the prompts and "chats",
the ids that the file's template makes of messages. Keys and values are cached as float32.
"""

import argparse
import json
import urllib.request

import xllamacpp


def start(file, threads):
    """A server on a port of its own choice, one request at a time."""
    given = xllamacpp.CommonParams()
    given.model.path = file
    given.n_ctx, given.n_parallel, given.warmup, given.n_gpu_layers, given.verbosity = 1024, 1, False, 0, 0
    given.cpuparams.n_threads = given.cpuparams_batch.n_threads = threads
    given.cache_type_k = given.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    given.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    given.use_jinja, given.cache_prompt = True, False
    return xllamacpp.Server(given)


def ask(server, route, **body):
    """What the server answers."""
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(server.listening_address + route, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("file")
    parser.add_argument("job")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    with open(given.job, encoding="utf-8") as file:
        job = json.load(file)
    server = start(given.file, given.threads)

    def ids(text, specials=False):
        return ask(server, "/tokenize", content=text, add_special=True, parse_special=specials)["tokens"]

    found = {"ids": [ids(text) for text in job["texts"]], "written": [], "chats": []}
    for prompt in job["prompts"]:
        body = {"prompt": prompt, "n_predict": job["tokens"], "temperature": 0, "return_tokens": True}
        found["written"].append(ask(server, "/completion", **body, cache_prompt=False)["tokens"])
    for chat in job["chats"]:
        prompt = ask(server, "/apply-template", messages=chat)["prompt"]
        found["chats"].append(ids(prompt, specials=True))
    print(json.dumps(found))


if __name__ == "__main__":
    main()

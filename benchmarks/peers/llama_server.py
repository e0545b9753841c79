"""llama.cpp's own HTTP server by the xllamacpp wheel, run by the peers' Python until its standard input ends.

python llama_server.py FILE [--slots 16] [--context 8192] [--threads 2]

Prints the server's address as one line.
"""

import argparse
import sys

import xllamacpp


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("file")
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    asked = xllamacpp.CommonParams()
    asked.model.path, asked.n_ctx, asked.n_parallel = given.file, given.context, given.slots
    asked.n_gpu_layers, asked.verbosity, asked.warmup = 0, 0, True
    asked.cpuparams.n_threads = asked.cpuparams_batch.n_threads = given.threads
    server = xllamacpp.Server(asked)
    print(server.listening_address, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()

"""Serve a GGUF file with llama.cpp on one thread: run by bench_serving.py with the environment of `.ci/llama`."""

import argparse
import threading

import xllamacpp

parser = argparse.ArgumentParser()
parser.add_argument("--model", required=True)
parser.add_argument("--lora", help="an adapter that requests ask for; without it, they get the base")
parser.add_argument("--rows", type=int, required=True)
parser.add_argument("--port", type=int, required=True)
options = parser.parse_args()

settings = xllamacpp.CommonParams()
settings.model.path = options.model
settings.port = options.port
settings.n_parallel = options.rows
settings.n_ctx = 256 * options.rows
settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
settings.cache_prompt = False
if options.lora:
    settings.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(options.lora, 1.0)]
server = xllamacpp.Server(settings)
threading.Event().wait()

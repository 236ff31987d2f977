"""Tokens and sentences a second of the nlp service, against loops in PyTorch and ONNX Runtime without a cache:
`python -m tests.benchmarks.generation`.

All ways write the same number of tokens behind the same prompt, and translate the same sentences greedily, in turns,
so that a disturbance of the machine hits all alike. The loops have one thread, as the service has for each step; the
service is another process, called by gRPC, first by one caller and then by eight. Networks of the loops have the
shipped sizes and random weights, which cost the same.
"""

import asyncio
import dataclasses
import json
import statistics
import tempfile
import time
from pathlib import Path

import grpc
import numpy as np
import torch
import tyro
from usagi.nlp.v1 import nlp_service_pb2 as pb
from usagi.nlp.v1 import nlp_service_pb2_grpc as pb_grpc

from services.nlp.demo import SENTENCES
from services.nlp.preprocess import split_english
from services.nlp.tokenizers.characters import CharacterTokenizer
from services.nlp.tokenizers.special import BOS, EOS, PAD
from services.nlp.tokenizers.vocabularies import Vocabularies
from services.nlp.training.data import padded
from services.nlp.training.models.gpt import Gpt, GptConfig
from services.nlp.training.models.transformer import Transformer, TransformerConfig
from services.nlp.training.offline import reading_feeds
from shared.artifacts import read_manifest
from shared.client.local import local_stack
from shared.training.export import open_session

ROOT = Path("deploy/models/nlp")
PROMPT = "ROMEO:\nBut"


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
    """Measures GenerateText and Translate."""

    repeats: int = 5
    """Turns; medians are printed."""
    tokens: int = 110
    """Tokens behind the prompt; within the model's context, so that the loops without a cache see everything."""
    callers: tuple[int, ...] = (1, 8)
    """Callers at a time."""


def loop_in_pytorch(config: GenerationConfig):
    """Tokens a second of the obvious loop: the whole text through the network for each token."""
    manifest = read_manifest(ROOT / "shakespeare-gpt" / "1")
    tokenizer = CharacterTokenizer.from_json((ROOT / "shakespeare-gpt/1/vocabulary.json").read_text(encoding="utf-8"))
    model = Gpt(GptConfig(len(tokenizer), context=manifest.preprocessing["context"])).eval()
    ids = torch.tensor([tokenizer.encode(PROMPT)])
    started = time.perf_counter()
    with torch.inference_mode():
        for _ in range(config.tokens):
            ids = torch.cat((ids, model(ids)[:, -1:].argmax(-1)), dim=1)
    return config.tokens / (time.perf_counter() - started)


def loop_in_onnxruntime(config: GenerationConfig, session):
    """The same loop over the exported graph."""
    ids = np.array([[20] * len(PROMPT)])
    started = time.perf_counter()
    for _ in range(config.tokens):
        values = session.run(["log_probabilities"], reading_feeds(session, ids))[0]
        ids = np.concatenate((ids, values[:, -1:].argmax(-1)), axis=1)
    return config.tokens / (time.perf_counter() - started)


def translate_in_pytorch(model, sources):
    """Sentences a second: the encoder once, the whole prefix through the decoder for each token."""
    started = time.perf_counter()
    with torch.inference_mode():
        for ids, length in sources:
            source = padded([ids])
            memory, target = model.encode(source), torch.full((1, 1), BOS)
            for _ in range(length):
                following = model.decode(target, memory, source != PAD)[:, -1:].argmax(-1)
                target = torch.cat((target, following), dim=1)
    return len(sources) / (time.perf_counter() - started)


async def generate(target, callers, config: GenerationConfig):
    """Tokens a second of all callers together, and seconds to the first token of each."""
    firsts = []

    async def one(stub, seed):
        request = pb.GenerateTextRequest(prompt=PROMPT, max_tokens=config.tokens, temperature=0.8, seed=seed)
        started, first = time.perf_counter(), 0.0
        async for _ in stub.GenerateText(request, timeout=60):
            first = first or time.perf_counter() - started
        firsts.append(first)

    async with grpc.aio.insecure_channel(target) as channel:
        stub = pb_grpc.NlpServiceStub(channel)
        started = time.perf_counter()
        await asyncio.gather(*(one(stub, seed) for seed in range(callers)))
        return callers * config.tokens / (time.perf_counter() - started), firsts


async def translate(target, callers, beam, rounds=4):
    """Sentences a second of all callers together, and the steps of each sentence."""
    async with grpc.aio.insecure_channel(target) as channel:
        stub = pb_grpc.NlpServiceStub(channel)

        async def one():
            return [
                (await stub.Translate(pb.TranslateRequest(text=sentence, beam=beam), timeout=60)).steps
                for _ in range(rounds)
                for sentence in SENTENCES
            ]

        started = time.perf_counter()
        steps = await asyncio.gather(*(one() for _ in range(callers)))
        return callers * rounds * len(SENTENCES) / (time.perf_counter() - started), steps[0][: len(SENTENCES)]


def measure(target: str, config: GenerationConfig):
    """Every way's figures, a list for each."""
    torch.set_num_threads(1)
    folder = ROOT / "shakespeare-gpt" / "1"
    session = open_session(folder / read_manifest(folder).variants["fp16"].file)
    text = (ROOT / "enja-transformer/1/vocabularies.json").read_text(encoding="utf-8")
    vocabularies = Vocabularies.from_json(text)
    translator = Transformer(TransformerConfig(len(vocabularies.english), len(vocabularies.japanese))).eval()
    found = {}
    _, steps = asyncio.run(translate(target, 1, 1))  # warms, and says how long the translations are
    sources = [
        ([*vocabularies.english.encode(split_english(sentence)), EOS], length)
        for sentence, length in zip(SENTENCES, steps, strict=True)
    ]
    asyncio.run(generate(target, 8, config))
    for _ in range(config.repeats):
        found.setdefault("tokens/s: PyTorch, no cache", []).append(loop_in_pytorch(config))
        found.setdefault("tokens/s: ONNX Runtime, no cache", []).append(loop_in_onnxruntime(config, session))
        found.setdefault("sentences/s: PyTorch, greedy, no cache", []).append(translate_in_pytorch(translator, sources))
        for callers in config.callers:
            rate, firsts = asyncio.run(generate(target, callers, config))
            found.setdefault(f"tokens/s: GenerateText, {callers} callers", []).append(rate)
            found.setdefault(f"ms to the first token, {callers} callers", []).append(1e3 * statistics.median(firsts))
            for beam in (1, 4):
                rate, _ = asyncio.run(translate(target, callers, beam))
                found.setdefault(f"sentences/s: Translate, beam {beam}, {callers} callers", []).append(rate)
    return found


def main(config: GenerationConfig) -> None:
    """Prints a table in Markdown."""
    with tempfile.TemporaryDirectory() as logs, local_stack(Path(logs), free_ports=True) as stack:
        found = measure(stack.target, config)
    print("| | median | least | most |\n|---|---:|---:|---:|")
    for name in sorted(found):
        values = found[name]
        print(f"| {name} | {statistics.median(values):.4g} | {min(values):.4g} | {max(values):.4g} |")
    Path("out").mkdir(exist_ok=True)
    Path("out/generation.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(tyro.cli(GenerationConfig, description=__doc__))

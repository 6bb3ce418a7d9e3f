"""A tiny model behind a real HTTP server in this process, and a tokenizer of single bytes."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from fastapi import FastAPI
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from evomesh.config.schema import ModelConfig, RotaryType
from evomesh.data.chat import build_template
from evomesh.data.tokenizer import load_tokenizer
from evomesh.generate.engine import GenerationEngine
from evomesh.models.language_model import LanguageModel, with_rotary_type
from evomesh.models.registry import build_model, initialize_weights
from evomesh.serve.app import create_app
from evomesh.serve.http_server import bind, create_server
from evomesh.serve.loop import EngineLoop
from evomesh.serve.service import GenerationService, ServedModel, ServiceLimits

VOCAB = 256
TRAINED = 64
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}[assistant]"
)


def byte_tokenizer(folder: Path, template: str = TEMPLATE) -> Path:
    """Writes a tokenizer with an id for each byte, and a chat template beside it."""
    alphabet = {
        symbol: number
        for number, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))
    }
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    if template:
        (folder / "chat_template.jinja").write_text(template)
    return folder


def tiny_model() -> LanguageModel:
    """Its argmax depends on the context, and its texts never end by themselves."""
    config = ModelConfig(
        model_type="LLAMA2",
        dtype="float64",
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        num_kv_attention_heads=2,
        mlp_ratio=2.0,
        multiple_of=8,
        vocab_size=VOCAB,
        max_position_embeddings=TRAINED,
    )
    model = build_model(config)
    initialize_weights(model, seed=3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8 if parameter.dim() > 1 else 1)
    return model.eval()


def tiny_service(
    folder: Path, model: LanguageModel, limits: ServiceLimits, template: str = TEMPLATE
) -> GenerationService:
    tokenizer = load_tokenizer(byte_tokenizer(folder, template))
    served = ServedModel(
        name="tiny",
        fingerprint="20-abc",
        created=1,
        tokenizer=tokenizer,
        template=build_template("tokenizer", tokenizer) if template else None,
        eos_ids=(),
        vocab_size=VOCAB,
        trained_length=TRAINED,
    )
    build = partial(
        GenerationEngine, slots=limits.slots, context_length=limits.context_length
    )
    builders: dict[RotaryType, Callable[[], GenerationEngine]] = {
        "origin": partial(build, model),
        "dynamic": partial(build, with_rotary_type(model, "dynamic")),
    }
    return GenerationService(served, EngineLoop(builders), limits)


@dataclass(frozen=True)
class Served:
    url: str
    service: GenerationService

    def idle(self, seconds: float = 30.0) -> bool:
        """Whether all slots are free within this time."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.service.open_sequences == 0 and self.service.engines.active == 0:
                return True
            time.sleep(0.01)
        return False


@contextlib.contextmanager
def serving(
    service: GenerationService,
    key: str | None = None,
    extend: Callable[[FastAPI], None] = lambda app: None,
) -> Iterator[Served]:
    """The service's API on a free port, until the block ends."""
    app = create_app(service, key=key)
    extend(app)
    listening = bind("127.0.0.1", 0)
    server = create_server(app, service.engines.end_answers)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        end = time.monotonic() + 20
        while not server.started and time.monotonic() < end:
            time.sleep(0.005)
        yield Served(f"http://127.0.0.1:{listening.getsockname()[1]}", service)
    finally:
        server.should_exit = True
        thread.join()

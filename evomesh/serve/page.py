"""The chat page: gradio over the same service as the API."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI

from evomesh.config.schema import RotaryType
from evomesh.data.chat import ChatMessage
from evomesh.errors import UserError
from evomesh.generate.options import SamplingParams
from evomesh.serve.loop import EngineError
from evomesh.serve.service import GenerationService, QueueFullError

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported

import gradio as gr

STYLE = """
footer {display: none !important}
.status p {font-variant-numeric: tabular-nums; color: var(--body-text-color-subdued); margin: 0}
"""
NEEDLE = "The pass key is {key}. Remember it: {key} is the pass key.\n"
HAY = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
QUESTION = "What is the pass key? The pass key is"
EVERY = 0.03  # seconds between updates: a browser gains nothing from more


@dataclass(frozen=True)
class PageSettings:
    """Values of the controls, in the order they stand on the page."""

    system: str
    temperature: float
    top_p: float
    top_k: float
    min_p: float
    repetition_penalty: float
    max_new_tokens: float
    seed: float
    dynamic: bool


class ChatPage:
    """Handlers of the page. A session is one open tab."""

    def __init__(self, service: GenerationService) -> None:
        self.service = service
        self._stopped: set[str] = set()

    def stop(self, request: gr.Request) -> None:
        self._stopped.add(str(request.session_hash))

    async def chat(
        self, history: list[dict[str, Any]], request: gr.Request, *controls: Any
    ) -> AsyncGenerator[tuple[list[dict[str, Any]], str], None]:
        """Streams the answer to the last message of the conversation."""
        settings = PageSettings(*controls)
        if not history or history[-1]["role"] != "user":
            return
        system = [ChatMessage("system", settings.system, False)] if settings.system.strip() else []
        try:
            turns = [ChatMessage(turn["role"], text_of(turn["content"]), False) for turn in history]
            prompt = self.service.chat_ids([*system, *turns])
            async with aclosing(self._write(prompt, settings, request)) as written:
                async for text, status in written:
                    yield [*history, {"role": "assistant", "content": text}], status
        except UserError as error:
            yield history, f"⚠ {error}"

    async def complete(
        self, text: str, request: gr.Request, *controls: Any
    ) -> AsyncGenerator[tuple[str, str], None]:
        """Streams what goes on from a text."""
        try:
            async with aclosing(
                self._write(self.service.text_ids(text), PageSettings(*controls), request)
            ) as written:
                async for new, status in written:
                    yield new, status
        except UserError as error:
            yield "", f"⚠ {error}"

    async def _write(
        self, prompt: Sequence[int], settings: PageSettings, request: gr.Request
    ) -> AsyncGenerator[tuple[str, str], None]:
        """(text so far, status line), at most every ``EVERY`` seconds and at the end."""
        session = str(request.session_hash)
        self._stopped.discard(session)
        service = self.service
        room = service.limits.context_length - len(prompt)
        most = max(1, min(int(settings.max_new_tokens), room))
        service.check([prompt], most)
        sampling = SamplingParams(
            temperature=settings.temperature,
            do_sample=settings.temperature > 0,
            top_k=int(settings.top_k),
            top_p=settings.top_p,
            min_p=settings.min_p,
            repetition_penalty=settings.repetition_penalty,
            seed=int(settings.seed) if settings.seed >= 0 else secrets.randbits(63),
            max_new_tokens=most,
            eos_ids=service.model.eos_ids,
        )
        rotary: RotaryType = "dynamic" if settings.dynamic else "origin"
        text, made, finish, shown = "", 0, "", 0.0
        start = first = time.perf_counter()
        yield "", f"{len(prompt)} prompt tokens"
        try:
            async with aclosing(service.answer([prompt], sampling, rotary_type=rotary)) as pieces:
                async for _, piece in pieces:
                    now = time.perf_counter()
                    first = first if made else now
                    text, made, finish = text + piece.text, piece.tokens, piece.finish
                    if session in self._stopped:
                        finish = "stopped"
                        break
                    if now - shown > EVERY:
                        shown = now
                        yield text, status(len(prompt), made, first - start, now - first, "")
        except QueueFullError:
            raise UserError("the queue is full", fix="try again in a moment") from None
        except EngineError as error:
            raise UserError(f"{error}; see the server's log") from None
        yield text, status(len(prompt), made, first - start, time.perf_counter() - first, finish)

    def long_text(self) -> str:
        """Half as long again as the model's trained length, with something to find near its beginning."""
        service = self.service
        wanted = min(service.model.trained_length * 3 // 2, service.limits.context_length - 32)
        key = f"{10000 + secrets.randbelow(90000)}"
        count = len(service.text_ids(HAY))
        frame = len(service.text_ids(NEEDLE.format(key=key) + QUESTION))
        lines = [HAY] * max(2, (wanted - frame) // count)
        lines.insert(len(lines) // 8, NEEDLE.format(key=key))
        return "".join(lines) + QUESTION


def status(prompt: int, made: int, wait: float, spent: float, finish: str) -> str:
    speed = f"{(made - 1) / spent:.1f} tokens/s" if made > 1 and spent > 0 else "… tokens/s"
    reasons = {"stop": "the model ended", "length": "length reached", "stopped": "stopped"}
    end = f" · {reasons[finish]}" if finish else ""
    return f"{prompt} prompt tokens · first token after {wait:.2f} s · {made} new tokens · {speed}{end}"


def text_of(content: Any) -> str:
    """A message's text; gradio gives it as text or as a list of parts."""
    if isinstance(content, str):
        return content
    return "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))


def controls(service: GenerationService) -> list[Any]:
    """The settings, in the order of ``Settings``."""
    can_chat = service.model.template is not None
    most = max(2, service.limits.context_length - 1)
    trained, longest = service.model.trained_length, service.limits.context_length
    return [
        gr.Textbox(label="System prompt", lines=2, visible=can_chat),
        gr.Slider(0, 2, 0.8, step=0.05, label="Temperature", info="0 is greedy"),
        gr.Slider(0.05, 1, 0.95, step=0.05, label="Top-p"),
        gr.Slider(0, 200, 0, step=1, label="Top-k", info="0: all"),
        gr.Slider(0, 1, 0, step=0.01, label="Min-p"),
        gr.Slider(0.5, 2, 1, step=0.05, label="Repetition penalty"),
        gr.Slider(1, most, min(256, most), step=1, label="Max new tokens"),
        gr.Number(-1, precision=0, minimum=-1, label="Seed", info="-1: another one each time"),
        gr.Checkbox(
            service.model.rotary_type == "dynamic",
            label="Dynamic NTK",
            info=f"stretches positions beyond the trained {trained} tokens; up to {longest} fit here",
        ),
    ]


def build_page(service: GenerationService) -> gr.Blocks:
    """The page, with tabs for conversations (models with a chat template) and for going on with a text."""
    page, model = ChatPage(service), service.model
    blocks: gr.Blocks
    with gr.Blocks(title=f"evomesh · {model.name}", analytics_enabled=False) as blocks:
        gr.Markdown(
            f"## {model.name}\ncheckpoint {model.fingerprint} · trained for {model.trained_length} tokens"
        )
        with gr.Row():
            with gr.Column(scale=3):
                with gr.Tabs():
                    chat = _chat_tab() if model.template is not None else None
                    prompt, made, go, halt = _completion_tab(page)
                line = gr.Markdown("", elem_id="status", elem_classes="status", container=False)
            with gr.Column(scale=1, min_width=260):
                settings = controls(service)
        options: dict[str, Any] = {
            "show_progress": "hidden",
            "concurrency_limit": None,
            "api_visibility": "private",
        }
        go.click(page.complete, [prompt, *settings], [made, line], **options)
        halt.click(page.stop, None, None, queue=False, api_visibility="private")
        if chat is not None:
            said, box, send, stop, clear = chat
            stop.click(page.stop, None, None, queue=False, api_visibility="private")
            for asked in (box.submit, send.click):
                asked(_say, [box, said], [box, said], queue=False, api_visibility="private").then(
                    page.chat, [said, *settings], [said, line], **options
                )
            clear.click(lambda: ([], ""), None, [said, line], queue=False, api_visibility="private")
    return blocks


def _chat_tab() -> tuple[gr.Chatbot, gr.Textbox, gr.Button, gr.Button, gr.Button]:
    with gr.Tab("Chat"):
        said = gr.Chatbot(
            height=460, label="Conversation", elem_id="conversation", buttons=["copy"], allow_tags=False
        )
        box = gr.Textbox(
            placeholder="Ask something", label="Message", elem_id="message", lines=1, max_lines=12
        )
        with gr.Row():
            send = gr.Button("Send", variant="primary", elem_id="send", scale=2)
            stop = gr.Button("Stop", elem_id="stop")
            clear = gr.Button("Clear")
    return said, box, send, stop, clear


def _completion_tab(page: ChatPage) -> tuple[gr.Textbox, gr.Textbox, gr.Button, gr.Button]:
    with gr.Tab("Completion"):
        prompt = gr.Textbox(
            label="Text", lines=8, max_lines=16, elem_id="prompt", placeholder="A text to go on from"
        )
        with gr.Row():
            go = gr.Button("Go on", variant="primary", elem_id="go", scale=2)
            halt = gr.Button("Stop", elem_id="halt")
            example = gr.Button("Long-text example", elem_id="example")
        made = gr.Textbox(label="What follows", lines=8, max_lines=16, elem_id="made", buttons=["copy"])
        example.click(page.long_text, None, prompt, queue=False, api_visibility="private")
    return prompt, made, go, halt


def _say(message: str, history: list[dict[str, Any]]) -> tuple[str, list[dict[str, Any]]]:
    """Moves what was typed into the conversation; an empty line asks nothing."""
    return "", [*history, {"role": "user", "content": message}] if message.strip() else history


def mount_page(app: FastAPI, service: GenerationService, key: str | None) -> None:
    """Puts the page at ``/``, beside the API; with a key, a login asks for it.

    Fonts are the system's: the page needs nothing from outside.
    """
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    gr.mount_gradio_app(
        app,
        build_page(service),
        path="",
        auth=("evomesh", key) if key else None,
        auth_message="User evomesh; the password is the server's key." if key else None,
        ssr_mode=False,
        max_file_size="1kb",  # nothing here takes files
        show_error=True,
        theme=gr.themes.Soft(**fonts),  # type: ignore[arg-type]
        css=STYLE,
        footer_links=[],
    )

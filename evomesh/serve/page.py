"""The chat page: gradio over the same service as the API."""

from __future__ import annotations

import math
import os
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, fields
from typing import Any

from fastapi import FastAPI
from starlette.routing import Mount

from evomesh.config.schema import RotaryType
from evomesh.data.chat import ChatMessage
from evomesh.errors import UserError
from evomesh.generate.options import SamplingParams
from evomesh.serve.detokenizer import TextDelta
from evomesh.serve.door import Door, text_of
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
FINISH_REASONS = {"stop": "end of answer", "length": "maximum length reached", "stopped": "stopped"}
QUESTION = "What is the pass key? The pass key is"
UPDATE_SECONDS = 0.03  # between updates: a browser gains nothing from more


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

    def __post_init__(self) -> None:
        """Check that each value has the type of its control.

        Raises:
            UserError: one does not.
        """
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "float":
                good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            else:
                good = isinstance(value, str if field.type == "str" else bool)
            if not good:
                raise UserError(f"{field.name.replace('_', ' ')} has no valid value")


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
        said: list[dict[str, Any]] = []
        try:
            said = plain(history)
            settings = PageSettings(*controls)
            if not said or said[-1]["role"] != "user":
                return
            system = [ChatMessage("system", settings.system, False)] if settings.system.strip() else []
            turns = [ChatMessage(turn["role"], turn["content"], False) for turn in said]
            prompt = self.service.chat_ids([*system, *turns])
            async with aclosing(self._write(prompt, settings, request)) as written:
                async for text, status in written:
                    yield [*said, {"role": "assistant", "content": text}], status
        except UserError as error:
            yield said, f"⚠ {error}"

    async def complete(
        self, text: str, request: gr.Request, *controls: Any
    ) -> AsyncGenerator[tuple[str, str], None]:
        """Streams what goes on from a text."""
        try:
            if not isinstance(text, str):
                raise UserError("the text is not text")
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
        """Yield (text so far, status line), at most once every ``UPDATE_SECONDS`` and at the end."""
        session = str(request.session_hash)
        self._stopped.discard(session)
        service = self.service
        remaining = service.limits.context_length - len(prompt)
        max_new_tokens = max(1, min(int(settings.max_new_tokens), remaining))
        service.check([prompt], max_new_tokens)
        sampling = SamplingParams.from_settings(
            settings,
            top_k=int(settings.top_k),  # gradio's sliders return floats
            seed=int(settings.seed) if settings.seed >= 0 else secrets.randbits(63),
            max_new_tokens=max_new_tokens,
            eos_ids=service.model.eos_ids,
        )
        rotary_type: RotaryType = "dynamic" if settings.dynamic else "origin"
        progress = AnswerProgress(len(prompt))
        text = ""
        last_update = 0.0
        yield text, f"{len(prompt)} prompt tokens"
        try:
            async with aclosing(service.answer([prompt], sampling, rotary_type=rotary_type)) as deltas:
                async for _, delta in deltas:
                    progress.add(delta)
                    text += delta.text
                    if session in self._stopped:
                        progress.finish = "stopped"
                        break
                    now = time.perf_counter()
                    if now - last_update > UPDATE_SECONDS and not delta.finish:
                        last_update = now
                        yield text, progress.status()
        except QueueFullError:
            raise UserError("the queue is full", fix="try again in a moment") from None
        except EngineError as error:
            raise UserError(f"{error}; see the server's log") from None
        yield text, progress.status()

    def long_text(self) -> str:
        """Return a text 1.5 times the trained length, with a pass key to find near its beginning."""
        service = self.service
        wanted = min(service.model.trained_length * 3 // 2, service.limits.context_length - 32)
        key = 10000 + secrets.randbelow(90000)
        needle = NEEDLE.format(key=key)
        tokens_per_line = len(service.text_ids(HAY))
        other_tokens = len(service.text_ids(needle + QUESTION))
        lines = [HAY] * max(2, (wanted - other_tokens) // tokens_per_line)
        lines.insert(len(lines) // 8, needle)
        return "".join(lines) + QUESTION


class AnswerProgress:
    """Tokens and times of an answer, for the status line."""

    def __init__(self, prompt_tokens: int) -> None:
        self.prompt_tokens = prompt_tokens
        self.new_tokens = 0
        self.finish = ""  # "stop", "length", "stopped" by the user, or "" while the answer continues
        self._started = self._first = self._last = time.perf_counter()

    def add(self, delta: TextDelta) -> None:
        self._last = time.perf_counter()
        if self.new_tokens == 0:
            self._first = self._last
        self.new_tokens = delta.tokens
        self.finish = delta.finish

    def status(self) -> str:
        """Return the status line."""
        seconds = self._last - self._first
        speed = "…"
        if self.new_tokens > 1 and seconds > 0:
            speed = f"{(self.new_tokens - 1) / seconds:.1f}"
        parts = [
            f"{self.prompt_tokens} prompt tokens",
            f"first token after {self._first - self._started:.2f} s",
            f"{self.new_tokens} new tokens",
            f"{speed} tokens/s",
        ]
        if self.finish:
            parts.append(FINISH_REASONS[self.finish])
        return " · ".join(parts)


def plain(history: Any) -> list[dict[str, Any]]:
    """Return the turns of a conversation with their text only, so that no file gets into an answer.

    Raises:
        UserError: a turn is of another kind or holds more than text.
    """
    if not isinstance(history, list):
        raise UserError("the conversation is not a list of turns")
    return [{"content": text_of(turn), "role": turn["role"]} for turn in history]


def controls(service: GenerationService) -> list[Any]:
    """Create the controls, in the order of ``PageSettings``."""
    model = service.model
    context_length = service.limits.context_length
    max_new_tokens = max(2, context_length - 1)
    return [
        gr.Textbox(label="System prompt", lines=2, visible=model.template is not None),
        gr.Slider(0, 2, 0.8, step=0.05, label="Temperature", info="0: greedy"),
        gr.Slider(0.05, 1, 0.95, step=0.05, label="Top-p"),
        gr.Slider(0, 200, 0, step=1, label="Top-k", info="0: all"),
        gr.Slider(0, 1, 0, step=0.01, label="Min-p"),
        gr.Slider(0.5, 2, 1, step=0.05, label="Repetition penalty"),
        gr.Slider(1, max_new_tokens, min(256, max_new_tokens), step=1, label="Max new tokens"),
        gr.Number(-1, precision=0, minimum=-1, label="Seed", info="-1: random"),
        gr.Checkbox(
            model.rotary_type == "dynamic",
            label="Dynamic NTK",
            info=f"stretches positions beyond the trained length of {model.trained_length} tokens, "
            f"up to the context length of {context_length}",
        ),
    ]


@dataclass(frozen=True)
class ChatTab:
    """Components of the tab for conversations."""

    conversation: gr.Chatbot
    message: gr.Textbox
    send: gr.Button
    stop: gr.Button
    clear: gr.Button


@dataclass(frozen=True)
class CompletionTab:
    """Components of the tab for completing a text."""

    prompt: gr.Textbox
    completion: gr.Textbox
    complete: gr.Button
    stop: gr.Button


def build_page(service: GenerationService) -> gr.Blocks:
    """Create the page, with a tab for chat (if the model has a chat template) and one for completion."""
    page = ChatPage(service)
    model = service.model
    # 1. Components: tabs and the status line on the left, settings on the right.
    blocks: gr.Blocks
    with gr.Blocks(title=f"evomesh · {model.name}", analytics_enabled=False) as blocks:
        gr.Markdown(
            f"## {model.name}\ncheckpoint {model.fingerprint} · trained for {model.trained_length} tokens"
        )
        with gr.Row():
            with gr.Column(scale=3):
                with gr.Tabs():
                    chat = _create_chat_tab() if model.template is not None else None
                    completion = _create_completion_tab(page)
                status = gr.Markdown("", elem_id="status", elem_classes="status", container=False)
            with gr.Column(scale=1, min_width=260):
                settings = controls(service)

        # 2. What they do. Answers are limited by the service's queue, not by gradio's.
        at_once: dict[str, Any] = {"queue": False, "api_visibility": "private"}
        streaming: dict[str, Any] = {
            "show_progress": "hidden",
            "concurrency_limit": None,
            "api_visibility": "private",
        }
        completion.complete.click(
            page.complete, [completion.prompt, *settings], [completion.completion, status], **streaming
        )
        completion.stop.click(page.stop, None, None, **at_once)
        if chat is not None:
            typed = [chat.message, chat.conversation]
            for sent in (chat.message.submit, chat.send.click):
                sent(_say, typed, typed, **at_once).then(
                    page.chat, [chat.conversation, *settings], [chat.conversation, status], **streaming
                )
            chat.stop.click(page.stop, None, None, **at_once)
            chat.clear.click(lambda: ([], ""), None, [chat.conversation, status], **at_once)
    return blocks


def _create_chat_tab() -> ChatTab:
    with gr.Tab("Chat"):
        conversation = gr.Chatbot(
            height=460, label="Conversation", elem_id="conversation", buttons=["copy"], allow_tags=False
        )
        message = gr.Textbox(
            placeholder="Ask something", label="Message", elem_id="message", lines=1, max_lines=12
        )
        with gr.Row():
            send = gr.Button("Send", variant="primary", elem_id="send", scale=2)
            stop = gr.Button("Stop", elem_id="stop")
            clear = gr.Button("Clear")
    return ChatTab(conversation, message, send, stop, clear)


def _create_completion_tab(page: ChatPage) -> CompletionTab:
    with gr.Tab("Completion"):
        prompt = gr.Textbox(
            label="Prompt",
            placeholder="Text to complete",
            elem_id="prompt",
            lines=8,
            max_lines=16,
        )
        with gr.Row():
            complete = gr.Button("Complete", variant="primary", elem_id="go", scale=2)
            stop = gr.Button("Stop", elem_id="halt")
            example = gr.Button("Long-text example", elem_id="example")
        completion = gr.Textbox(
            label="Completion",
            elem_id="made",
            lines=8,
            max_lines=16,
            buttons=["copy"],
        )
        example.click(page.long_text, None, prompt, queue=False, api_visibility="private")
    return CompletionTab(prompt, completion, complete, stop)


def _say(message: str, history: list[dict[str, Any]]) -> tuple[str, list[dict[str, Any]]]:
    """Moves what was typed into the conversation; an empty line asks nothing."""
    said = plain(history)
    if isinstance(message, str) and message.strip():
        said.append({"role": "user", "content": message})
    return "", said


def mount_page(app: FastAPI, service: GenerationService, key: str | None) -> None:
    """Puts the page at ``/``, beside the API; with a key, a login asks for it.

    Fonts are the system's: the page needs nothing from outside. Of gradio's routes only those that the page
    uses can be reached, through ``Door``.
    """
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    blocks = build_page(service)
    gr.mount_gradio_app(
        app,
        blocks,
        path="",
        auth=("evomesh", key) if key else None,
        auth_message="User evomesh; the password is the server's key." if key else None,
        ssr_mode=False,
        mcp_server=False,
        max_file_size="1kb",  # nothing here takes files
        show_error=True,
        theme=gr.themes.Soft(**fonts),  # type: ignore[arg-type]
        css=STYLE,
        footer_links=[],
    )
    blocks.has_launched = True  # gradio checks paths only from then on, and mounting does not set it
    mount = app.routes[-1]
    assert isinstance(mount, Mount)
    mount.app = Door(mount.app, service.limits.body_bytes)

"""The chat page: a gradio front end for the service behind the API."""

from __future__ import annotations

import math
import os
import secrets
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, fields
from typing import Any, TypeAlias

from fastapi import FastAPI
from starlette.routing import Mount

from evomesh.config.redact import redact_text
from evomesh.config.schema import RotaryType
from evomesh.data.chat_message import ChatMessage
from evomesh.errors import UserError
from evomesh.generate.options import SamplingParams
from evomesh.serve.answer_progress import AnswerProgress
from evomesh.serve.detokenizer import TextDelta
from evomesh.serve.loop import EngineError
from evomesh.serve.page_security import GradioGuard, message_text, page_error
from evomesh.serve.requests import run_in
from evomesh.serve.service import GenerationService, QueueFullError

# Read when gradio is imported.
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gradio as gr

Delta = tuple[int, TextDelta]  # index of the prompt, and what was added to its answer
Conversation: TypeAlias = list[dict[str, Any]]  # messages as gradio has them
STYLE = """
footer {display: none !important}
.status p {font-variant-numeric: tabular-nums; color: var(--body-text-color-subdued); margin: 0}
"""
NEEDLE = "The pass key is {key}. Remember it: {key} is the pass key.\n"
HAY = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
QUESTION = "What is the pass key? The pass key is"
SEED_INDEX = 7  # of the controls
UPDATE_SECONDS = 0.03  # between updates: nobody could see more of them

# How the page calls its functions. The service's queue limits the answers in progress,
# so gradio's does not.
IMMEDIATE: dict[str, Any] = {"queue": False, "api_visibility": "private"}
STREAMING: dict[str, Any] = {
    "show_progress": "hidden",
    "concurrency_limit": None,
    "api_visibility": "private",
}


@dataclass(frozen=True)
class PageSettings:
    """Values of the controls, in the order of the page."""

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
                is_number = isinstance(value, int | float) and not isinstance(
                    value, bool
                )
                valid = is_number and math.isfinite(value)
            elif field.type == "str":
                valid = isinstance(value, str)
            else:
                valid = isinstance(value, bool)
            if not valid:
                raise page_error(f"{field.name.replace('_', ' ')} has no valid value")


def read_settings(controls: Sequence[Any]) -> PageSettings:
    """Return the settings of the controls' values; an empty seed box means a random seed.

    Raises:
        UserError: a value does not have the type of its control.
    """
    values = list(controls)
    if len(values) == len(fields(PageSettings)) and values[SEED_INDEX] is None:
        values[SEED_INDEX] = -1
    return PageSettings(*values)


class ChatPage:
    """The functions that the page calls. A session is one open tab."""

    def __init__(self, service: GenerationService) -> None:
        self.service = service
        self._answers_of: Counter[str] = Counter()  # by session, those in progress
        self._stopped_sessions: set[str] = set()

    def stop_answer(self, request: gr.Request) -> None:
        """End the answer that the session is getting."""
        session = str(request.session_hash)
        if session in self._answers_of:
            self._stopped_sessions.add(session)

    @asynccontextmanager
    async def _stoppable(
        self, session: str, answer: AsyncGenerator[Delta, None]
    ) -> AsyncIterator[AsyncGenerator[Delta, None]]:
        """Let a session stop an answer while it is generated, and close it at the end."""
        self._stopped_sessions.discard(session)
        self._answers_of[session] += 1
        try:
            yield answer
        finally:
            await answer.aclose()
            self._answers_of[session] -= 1
            if not self._answers_of[session]:
                del self._answers_of[session]
                self._stopped_sessions.discard(session)

    async def answer_conversation(
        self, history: Conversation, request: gr.Request, *controls: Any
    ) -> AsyncGenerator[tuple[Conversation, str], None]:
        """Yield (conversation with the answer so far, status line) if the last message is the user's."""
        conversation: Conversation = []
        try:
            conversation = text_only(history)
            settings = read_settings(controls)
            if not conversation:
                return
            last_message = conversation[-1]
            if last_message["role"] != "user":
                return
            messages = _chat_messages(conversation, settings.system)
            service = self.service
            prompt = await run_in(service.tokenizers, service.chat_ids, messages)
            session = str(request.session_hash)
            stream = self._stream_answer(prompt, settings, session)
            async with aclosing(stream) as answer:
                async for text, status in answer:
                    reply = {"role": "assistant", "content": text}
                    with_answer = [*conversation, reply]
                    yield with_answer, status
        except UserError as error:
            yield conversation, warning(error)

    async def complete_text(
        self, text: str, request: gr.Request, *controls: Any
    ) -> AsyncGenerator[tuple[str, str], None]:
        """Yield (completion of a text so far, status line)."""
        try:
            if not isinstance(text, str):
                raise page_error("the prompt is not text")
            prompt = await run_in(self.service.tokenizers, self.service.text_ids, text)
            settings = read_settings(controls)
            session = str(request.session_hash)
            stream = self._stream_answer(prompt, settings, session)
            async with aclosing(stream) as answer:
                async for completion, status in answer:
                    yield completion, status
        except UserError as error:
            yield "", warning(error)

    async def _stream_answer(
        self, prompt: Sequence[int], settings: PageSettings, session: str
    ) -> AsyncGenerator[tuple[str, str], None]:
        """Yield (text so far, status line), at most once every ``UPDATE_SECONDS`` and at the end."""
        sampling = self._sampling_params(prompt, settings)
        rotary_type: RotaryType = "dynamic" if settings.dynamic else "origin"
        progress = AnswerProgress(len(prompt))
        text = ""
        last_update = 0.0
        yield text, f"{len(prompt)} prompt tokens"
        try:
            answer = self.service.answer([prompt], sampling, rotary_type=rotary_type)
            async with self._stoppable(session, answer) as deltas:
                async for _, delta in deltas:
                    progress.add(delta)
                    text += delta.text
                    if session in self._stopped_sessions:
                        progress.finish = "stopped"
                        break
                    now = time.perf_counter()
                    if now - last_update > UPDATE_SECONDS and not delta.finish:
                        last_update = now
                        yield text, progress.status()
        except QueueFullError:
            raise page_error("the queue is full", "try again in a moment") from None
        except EngineError as error:
            raise page_error(f"{error}; see the server's log") from None
        yield text, progress.status()

    def _sampling_params(
        self, prompt: Sequence[int], settings: PageSettings
    ) -> SamplingParams:
        """Check a prompt, and return the sampling parameters of its answer, which fits into the context length."""
        service = self.service
        remaining = service.limits.context_length - len(prompt)
        wanted = int(settings.max_new_tokens)
        max_new_tokens = max(1, min(wanted, remaining))
        service.check([prompt], max_new_tokens)
        seed = secrets.randbits(63)
        if settings.seed >= 0:
            seed = int(settings.seed)
        return SamplingParams.from_settings(
            settings,
            top_k=int(settings.top_k),  # gradio's sliders return floats
            seed=seed,
            max_new_tokens=max_new_tokens,
            eos_ids=service.model.eos_ids,
        )

    def long_text(self) -> str:
        """Return a text 1.5 times the trained length, with a pass key to find near its beginning."""
        service = self.service
        desired_tokens = service.model.trained_length * 3 // 2
        max_tokens = service.limits.context_length - 32  # leaves room for the answer
        key = 10000 + secrets.randbelow(90000)
        needle = NEEDLE.format(key=key)

        # Fill up with lines of hay, and put the needle after an eighth of them.
        num_tokens = min(desired_tokens, max_tokens)
        other_ids = service.text_ids(needle + QUESTION)
        hay_tokens = num_tokens - len(other_ids)
        ids_of_line = service.text_ids(HAY)
        num_lines = max(2, hay_tokens // len(ids_of_line))
        lines = [HAY] * num_lines
        lines.insert(num_lines // 8, needle)
        return "".join(lines) + QUESTION


def warning(error: UserError) -> str:
    """Return the status line for an error, without secrets that its message may repeat."""
    return redact_text(f"⚠ {error}")


def text_only(history: Any) -> Conversation:
    """Return the messages of a conversation with their text only, so that no file gets into an answer.

    Raises:
        UserError: a message has an unknown format or contains more than text.
    """
    if not isinstance(history, list):
        raise page_error("the conversation is not a list of messages")
    return [
        {"content": message_text(message), "role": message["role"]}
        for message in history
    ]


def append_message(message: str, history: Conversation) -> tuple[str, Conversation]:
    """Return an empty input box, and the conversation with the user's message unless that is blank."""
    conversation = text_only(history)
    if isinstance(message, str) and message.strip():
        conversation.append({"role": "user", "content": message})
    return "", conversation


def create_controls(service: GenerationService) -> list[Any]:
    """Create the controls, in the order of ``PageSettings``."""
    model = service.model
    context_length = service.limits.context_length
    max_new_tokens = max(2, context_length - 1)
    dynamic_info = (
        f"stretches positions beyond the trained length of {model.trained_length} tokens, "
        f"up to the context length of {context_length}"
    )
    return [
        # An invisible box sends its initial value, which must be text.
        gr.Textbox(
            "",
            label="System prompt",
            lines=2,
            visible=model.template is not None,
        ),
        gr.Slider(0, 2, value=0.8, step=0.05, label="Temperature", info="0: greedy"),
        gr.Slider(0.05, 1, value=0.95, step=0.05, label="Top-p"),
        gr.Slider(0, 200, value=0, step=1, label="Top-k", info="0: all"),
        gr.Slider(0, 1, value=0, step=0.01, label="Min-p"),
        gr.Slider(0.5, 2, value=1, step=0.05, label="Repetition penalty"),
        gr.Slider(
            1,
            max_new_tokens,
            value=min(256, max_new_tokens),
            step=1,
            label="Max new tokens",
        ),
        gr.Number(
            -1,
            precision=0,
            minimum=-1,
            label="Seed",
            info="-1: random",
        ),
        gr.Checkbox(
            model.rotary_type == "dynamic",
            label="Dynamic NTK",
            info=dynamic_info,
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
    example: gr.Button


def build_page(service: GenerationService) -> gr.Blocks:
    """Create the page, with a tab for chat (if the model has a chat template) and one for completion."""
    page = ChatPage(service)
    model = service.model
    title = f"## {model.name}\ncheckpoint {model.fingerprint} · trained for {model.trained_length} tokens"
    blocks: gr.Blocks
    with gr.Blocks(title=f"evomesh · {model.name}", analytics_enabled=False) as blocks:
        # 1. Components: tabs and the status line on the left, settings on the right.
        gr.Markdown(title)
        with gr.Row():
            with gr.Column(scale=3):
                with gr.Tabs():
                    chat_tab = (
                        _create_chat_tab() if model.template is not None else None
                    )
                    completion_tab = _create_completion_tab()
                status = gr.Markdown(
                    "", elem_id="status", elem_classes="status", container=False
                )
            with gr.Column(scale=1, min_width=260):
                settings = create_controls(service)

        # 2. What they do.
        _connect_completion_tab(completion_tab, page, settings, status)
        if chat_tab is not None:
            _connect_chat_tab(chat_tab, page, settings, status)
    return blocks


def _create_chat_tab() -> ChatTab:
    with gr.Tab("Chat"):
        conversation = gr.Chatbot(
            label="Conversation",
            elem_id="conversation",
            height=460,
            buttons=["copy"],
            allow_tags=False,
        )
        message = gr.Textbox(
            label="Message",
            placeholder="Ask something",
            elem_id="message",
            lines=1,
            max_lines=12,
        )
        with gr.Row():
            send = gr.Button("Send", variant="primary", elem_id="send", scale=2)
            stop = gr.Button("Stop", elem_id="stop")
            clear = gr.Button("Clear")
    return ChatTab(conversation, message, send, stop, clear)


def _connect_chat_tab(
    tab: ChatTab,
    page: ChatPage,
    settings: list[Any],
    status: gr.Markdown,
) -> None:
    # Components that a function reads (typed, asked) or writes (typed, shown).
    typed = [tab.message, tab.conversation]
    asked = [tab.conversation, *settings]
    shown = [tab.conversation, status]
    # The message appears at once, and its answer as it is generated.
    answer = page.answer_conversation
    sent = (tab.message.submit, tab.send.click)
    for event in sent:
        appended = event(append_message, typed, typed, **IMMEDIATE)
        appended.then(answer, asked, shown, **STREAMING)
    tab.stop.click(page.stop_answer, None, None, **IMMEDIATE)
    tab.clear.click(_nothing, None, shown, **IMMEDIATE)


def _nothing() -> tuple[Conversation, str]:
    """Return an empty conversation and status line."""
    return [], ""


def _create_completion_tab() -> CompletionTab:
    with gr.Tab("Completion"):
        prompt = gr.Textbox(
            label="Prompt",
            placeholder="Text to complete",
            elem_id="prompt",
            lines=8,
            max_lines=16,
        )
        with gr.Row():
            complete = gr.Button(
                "Complete", variant="primary", elem_id="complete", scale=2
            )
            stop = gr.Button("Stop", elem_id="stop-completion")
            example = gr.Button("Long-text example", elem_id="example")
        completion = gr.Textbox(
            label="Completion",
            elem_id="completion",
            lines=8,
            max_lines=16,
            buttons=["copy"],
        )
    return CompletionTab(prompt, completion, complete, stop, example)


def _connect_completion_tab(
    tab: CompletionTab,
    page: ChatPage,
    settings: list[Any],
    status: gr.Markdown,
) -> None:
    asked = [tab.prompt, *settings]
    shown = [tab.completion, status]
    complete = tab.complete.click
    complete(page.complete_text, asked, shown, **STREAMING)
    tab.stop.click(page.stop_answer, None, None, **IMMEDIATE)
    tab.example.click(page.long_text, None, tab.prompt, **IMMEDIATE)


def mount_page(app: FastAPI, service: GenerationService, key: str | None) -> None:
    """Mount the page at ``/`` of an app of ``create_app``, next to the API, behind ``GradioGuard``.

    With a key, a login asks for it; wrong ones count as those of the API do.

    The fonts are the system's, so that the page needs nothing from other servers.
    """
    blocks = build_page(service)
    fonts = {
        "font": ["system-ui", "sans-serif"],
        "font_mono": ["ui-monospace", "monospace"],
    }
    gr.mount_gradio_app(
        app,
        blocks,
        path="",
        auth=("evomesh", key) if key else None,
        auth_message="User evomesh; the password is the server's key." if key else None,
        ssr_mode=False,
        mcp_server=False,
        max_file_size="1kb",  # the page takes no files
        show_error=True,
        theme=gr.themes.Soft(**fonts),  # type: ignore[arg-type]
        css=STYLE,
        footer_links=[],
    )
    # Gradio checks paths only from then on, and mounting does not set it.
    blocks.has_launched = True
    mount = app.routes[-1]
    assert isinstance(mount, Mount)
    mount.app = GradioGuard(
        mount.app, service.limits.page_call_bytes, service.parser, app.state.key_gate
    )


def _chat_messages(
    conversation: Sequence[dict[str, Any]], system: str
) -> list[ChatMessage]:
    """Return the messages of a conversation, after that of the system if there is one."""
    messages: list[ChatMessage] = []
    if system.strip():
        first = ChatMessage("system", system, False)
        messages.append(first)
    for turn in conversation:
        message = ChatMessage(turn["role"], turn["content"], False)
        messages.append(message)
    return messages

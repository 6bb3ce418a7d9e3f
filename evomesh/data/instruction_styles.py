"""Facts of XTuner's prompt templates without special tokens: an instruction that the answer follows, and eos.

Of those that put sentences of their authors before a system message, the form of the other
messages is here: they have no place for a system message.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class InstructionStyle:
    """A prompt template as text.

    Attributes:
        instruction: what is around a user's text, before and after it; the answer follows.
        system: what is around a system message; None: there is no place for one.
        separator: text after eos, between two turns.
    """

    instruction: tuple[str, str]
    system: tuple[str, str] | None = None
    separator: str = "\n"


LINE = ("", "\n")
IN_BRACKETS = ("[INST] ", " [/INST]")

INSTRUCTION_STYLES = {
    "xtuner_default": InstructionStyle(
        instruction=("<|User|>:", "\n<|Bot|>:"),
        system=("<|System|>:", "\n"),
    ),
    "xtuner_zephyr": InstructionStyle(
        instruction=("<|user|>\n", "\n<|assistant|>\n"),
        system=("<|system|>\n", "\n"),
    ),
    "xtuner_mistral": InstructionStyle(
        instruction=IN_BRACKETS,
        system=("[INST] ", " [/INST]\n"),
    ),
    "xtuner_code_llama": InstructionStyle(
        instruction=IN_BRACKETS,
        system=LINE,
        separator="",
    ),
    "xtuner_llama2": InstructionStyle(instruction=IN_BRACKETS),
    "xtuner_vicuna": InstructionStyle(instruction=("USER: ", " ASSISTANT:")),
    "xtuner_wizardcoder": InstructionStyle(
        instruction=("### Instruction:\n", "\n\n### Response:"),
        separator="\n\n",
    ),
    "xtuner_deepseek_coder": InstructionStyle(
        instruction=("### Instruction:\n", "\n### Response:\n"),
    ),
    "xtuner_baichuan": InstructionStyle(
        instruction=("<reserved_102>", "<reserved_103>"),
        system=LINE,
    ),
    "xtuner_baichuan2": InstructionStyle(
        instruction=("<reserved_106>", "<reserved_107>"),
        system=LINE,
    ),
}

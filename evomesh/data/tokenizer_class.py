"""Choose the tokenizer class that ``transformers`` loads a folder with, and state what such a class does.

Most classes take a tokenizer.json as it is. Some take only its pieces and merges, and treat
spaces, digits and Unicode as their models were trained: those of ``CLASSES``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from evomesh.errors import UserError

Treatment = Literal["as it is", "llama", "gemma", "qwen2", "qwen3_5", "bytes", "digits"]

END = "<|endoftext|>"
LLAMA_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
CODE_TOKENS = {
    "prefix_token": "\u2581<PRE>",
    "middle_token": "\u2581<MID>",
    "suffix_token": "\u2581<SUF>",
    "eot_token": "\u2581<EOT>",
    "fill_token": "<FILL_ME>",
}
GPT2_TOKENS = {"bos_token": END, "eos_token": END, "unk_token": END}
QWEN_TOKENS = {"eos_token": END, "unk_token": END, "pad_token": END}


@dataclass(frozen=True)
class ClassRules:
    """The rules by which a tokenizer class reads a folder.

    Attributes:
        treatment: of spaces, digits and Unicode.
        tokens: the special tokens where the folder does not name them.
        composes: whether text is brought to Unicode's composed form (NFC) first.
        adds_bos: whether bos is prepended to texts where the folder does not say.
        keeps_end: whether what a tokenizer.json puts around texts is kept.
    """

    treatment: Treatment
    tokens: Mapping[str, str] = field(default_factory=dict)
    composes: bool = False
    adds_bos: bool = False
    keeps_end: bool = True


BACKEND = "TokenizersBackend"  # takes a tokenizer.json as it is
LLAMA = "LlamaTokenizer"
CLASSES: Mapping[str, ClassRules] = MappingProxyType(
    {
        BACKEND: ClassRules("as it is"),
        "LlamaTokenizer": ClassRules("llama", LLAMA_TOKENS),
        "CodeLlamaTokenizer": ClassRules(
            "llama", LLAMA_TOKENS | CODE_TOKENS, adds_bos=True, keeps_end=False
        ),
        "GemmaTokenizer": ClassRules(
            "gemma",
            {
                "bos_token": "<bos>",
                "eos_token": "<eos>",
                "unk_token": "<unk>",
                "pad_token": "<pad>",
                "mask_token": "<mask>",
            },
        ),
        "Qwen2Tokenizer": ClassRules("qwen2", QWEN_TOKENS, composes=True),
        "Qwen3_5Tokenizer": ClassRules("qwen3_5", QWEN_TOKENS, composes=True),
        "GPT2Tokenizer": ClassRules("bytes", GPT2_TOKENS),
        "CodeGenTokenizer": ClassRules("bytes", GPT2_TOKENS),
        "GPTNeoXTokenizer": ClassRules(
            "bytes",
            GPT2_TOKENS | {"pad_token": "<|padding|>"},
            composes=True,
            keeps_end=False,
        ),
        "CohereTokenizer": ClassRules(
            "digits",
            {
                "bos_token": "<BOS_TOKEN>",
                "eos_token": "<|END_OF_TURN_TOKEN|>",
                "unk_token": "<UNK>",
                "sep_token": "<SEP>",
                "pad_token": "<PAD>",
                "cls_token": "<CLS>",
                "mask_token": "<MASK_TOKEN>",
            },
            composes=True,
        ),
    }
)
OF_PIECES = (
    "as it is",
    "llama",
    "gemma",
)  # treatments that a sentencepiece model can have
OTHER_NAMES = {"Phi3Tokenizer": "LlamaTokenizer"}

# Classes that build a tokenizer in another way, mostly of models that only encode.
UNREAD = frozenset(
    {
        "AlbertTokenizer", "BartTokenizer", "BarthezTokenizer", "BartphoTokenizer",
        "BertGenerationTokenizer", "BertJapaneseTokenizer", "BertTokenizer", "BertweetTokenizer",
        "BigBirdTokenizer", "BioGptTokenizer", "BlenderbotSmallTokenizer", "BlenderbotTokenizer",
        "ByT5Tokenizer", "CLIPTokenizer", "CTRLTokenizer", "CamembertTokenizer", "CanineTokenizer",
        "ClvpTokenizer", "ConvBertTokenizer", "CpmAntTokenizer", "CpmTokenizer",
        "DPRQuestionEncoderTokenizer", "DebertaTokenizer", "DebertaV2Tokenizer", "DiaTokenizer",
        "DistilBertTokenizer", "EsmTokenizer", "EsmcTokenizer", "FNetTokenizer", "FSMTTokenizer",
        "FlaubertTokenizer", "FunnelTokenizer", "GPTNeoXJapaneseTokenizer", "GPTSw3Tokenizer",
        "HerbertTokenizer", "LEDTokenizer", "LasrTokenizer", "LayoutLMv2Tokenizer",
        "LayoutLMv3Tokenizer", "LayoutXLMTokenizer", "LukeTokenizer", "LxmertTokenizer",
        "M2M100Tokenizer", "MBart50Tokenizer", "MBartTokenizer", "MLukeTokenizer", "MPNetTokenizer",
        "MarianTokenizer", "MarkupLMTokenizer", "MgpstrTokenizer", "MobileBertTokenizer",
        "MvpTokenizer", "MyT5Tokenizer", "NllbTokenizer", "NougatTokenizer", "OpenAIGPTTokenizer",
        "PLBartTokenizer", "ParakeetTokenizer", "PegasusTokenizer", "PerceiverTokenizer",
        "PhobertTokenizer", "Pop2PianoTokenizer", "ProphetNetTokenizer", "RagTokenizer",
        "ReformerTokenizer", "RemBertTokenizer", "RoCBertTokenizer", "RoFormerTokenizer",
        "RobertaTokenizer", "SeamlessM4TTokenizer", "Siglip2Tokenizer", "SiglipTokenizer",
        "Speech2TextTokenizer", "SpeechT5Tokenizer", "SplinterTokenizer", "SqueezeBertTokenizer",
        "T5Tokenizer", "TapasTokenizer", "Tipsv2Tokenizer", "UdopTokenizer", "VideoPrismTokenizer",
        "VitsTokenizer", "Wav2Vec2CTCTokenizer", "Wav2Vec2PhonemeCTCTokenizer", "WhisperTokenizer",
        "XGLMTokenizer", "XLMRobertaTokenizer", "XLMTokenizer", "XLNetTokenizer",
    }
)  # fmt: skip

# The class of a model family, by the ``model_type`` of config.json; "" stands for
# Mistral's own library, in whose absence the folder's files are taken as they are.
FAMILIES: Mapping[str, str] = MappingProxyType(
    {
        **dict.fromkeys(("code_llama",), "CodeLlamaTokenizer"),
        **dict.fromkeys(("cohere", "cohere2"), "CohereTokenizer"),
        **dict.fromkeys(
            ("gemma", "gemma2", "gemma3", "gemma3_text", "recurrent_gemma"),
            "GemmaTokenizer",
        ),
        **dict.fromkeys(
            ("codegen", "dbrx", "gpt2", "gpt_neo", "gptj", "opt", "phi", "starcoder2"),
            "GPT2Tokenizer",
        ),
        **dict.fromkeys(
            ("falcon_mamba", "gpt_neox", "mamba", "mamba2", "mpt", "olmo", "olmoe"),
            "GPTNeoXTokenizer",
        ),
        **dict.fromkeys(
            ("qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "qwen3_next"), "Qwen2Tokenizer"
        ),
        **dict.fromkeys(
            ("qwen3_5", "qwen3_5_moe", "qwen3_5_text"), "Qwen3_5Tokenizer"
        ),
        **dict.fromkeys(
            ("ministral", "ministral3", "mistral", "mistral3", "mixtral"), ""
        ),
        **dict.fromkeys(
            (
                "arctic", "ernie4_5", "ernie4_5_moe", "flex_olmo", "glm", "glm4", "glm4_moe",
                "gpt_bigcode", "granite", "granitemoe", "internlm2", "internlm3", "jamba",
                "minicpm3", "minimax_m2", "modernbert", "nemotron", "olmo2", "olmo3",
                "persimmon", "phi3", "phimoe", "stablelm",
            ),
            BACKEND,
        ),
    }
)  # fmt: skip
# Families whose published folders name a wrong class: the family's own counts.
WRONGLY_NAMED = frozenset(
    {
        "arctic", "ernie4_5", "ernie4_5_moe", "internlm2", "internlm3", "jamba", "minicpm3",
        "minimax_m2", "modernbert", "nemotron", "phi3", "phimoe", "qwen2", "qwen3_5", "qwen3_5_moe",
    }
)  # fmt: skip


def choose_class(
    settings: Mapping[str, Any],
    config: Mapping[str, Any],
    record: Mapping[str, Any] | None,
    where: str,
) -> str:
    """Return the name in ``CLASSES`` of the class that a folder is loaded with.

    Args:
        settings: tokenizer_config.json.
        config: config.json of the model; empty if there is none.
        record: tokenizer.json; None if the folder has a sentencepiece model.

    Raises:
        UserError: the class builds its tokenizer in a way that is not known here.
    """
    declared = declared_class(settings, config)
    family_type = str(config.get("model_type") or "")
    family = FAMILIES.get(family_type)
    is_wrongly_named = family_type in WRONGLY_NAMED

    chosen = _agree(declared, family, is_wrongly_named)
    # LlamaTokenizer treats spaces in its way, which would break a tokenizer of bytes.
    is_llama_of_bytes = declared == LLAMA and _is_byte_level(record)
    if is_llama_of_bytes and not is_wrongly_named:
        chosen = BACKEND
    if chosen in UNREAD:
        raise UserError(
            f"the folder's tokenizer is a {chosen}, whose ids evomesh cannot reproduce",
            where=where,
            expected=f"no tokenizer_class, or one of {', '.join(CLASSES)}",
            fix="write PreTrainedTokenizerFast there, if the tokenizer.json is to be taken as it is",
            code="EVO-TOKEN-003",
        )
    if record is None and CLASSES[chosen].treatment not in OF_PIECES:
        raise UserError(
            f"the folder's tokenizer is a {chosen}, which reads bytes, but its file is a sentencepiece model",
            where=where,
            expected="a tokenizer.json, or another tokenizer_class",
            code="EVO-TOKEN-003",
        )
    return chosen


def declared_class(settings: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """Return the name in ``CLASSES`` or ``UNREAD`` of the class that a folder names itself; "" if it names none.

    ``choose_class`` looks into a tokenizer.json only where it is ``LLAMA``.
    """
    name = settings.get("tokenizer_class") or config.get("tokenizer_class") or ""
    return _known_class(str(name))


def _agree(declared: str, family: str | None, is_wrongly_named: bool) -> str:
    """Return the class that counts, of the one that a folder declares and that of the model's family."""
    if not declared:
        return family or BACKEND
    if family is None or family == declared:
        return declared
    if family in ("", BACKEND):
        return BACKEND
    return family if is_wrongly_named else declared


def _known_class(name: str) -> str:
    """Return the name in ``CLASSES`` or ``UNREAD`` of a class that a folder names; "" if it names none."""
    if not name:
        return ""
    name = name.removesuffix("Fast")
    name = OTHER_NAMES.get(name, name)
    return name if name in CLASSES or name in UNREAD else BACKEND


def _is_byte_level(record: Mapping[str, Any] | None) -> bool:
    if record is None:
        return False
    return "ByteLevel" in str([record.get("pre_tokenizer"), record.get("decoder")])
